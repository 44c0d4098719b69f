"""Linear probes: what is planted is found, noise is not, copies are worth nothing, every number has an oracle."""

import functools
import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import reward_lens as rl
from families import tiny_model
from reward_lens.methods.concepts import probe_fits
from reward_lens.methods.concepts.linear_probes import _gradients, _used, linear_probes
from reward_lens.methods.concepts.probe_fits import (
    against_controls,
    control_labels,
    cross_fit,
    evaluated,
    interval,
    make_task,
)

WORDS = "the cat and dog is on red you to sun hat tree it an old sea run".split()


def planted(n: int, d: int, strength: float, rows: int = 1, seed: int = 0):
    """States [n * rows, d] of n prompts, labels by row, and the direction along which classes differ."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n), rows)
    labels = rng.permutation(np.arange(n * rows) % 2).astype(float)
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)
    states = rng.standard_normal((n * rows, d)) + strength * (labels - 0.5)[:, None] * direction
    return states, labels, groups, direction


def read(states, task, seed: int = 0):
    scores, directions = cross_fit(states, task, task.labels[None])
    value, left_out = evaluated(task, task.labels, scores[0])
    return value, left_out, interval(task, value, left_out, seed), scores[0], directions[0]


# --- the fits


@pytest.mark.parametrize("d", [20, 400])
def test_a_planted_direction_is_found(d):
    states, labels, groups, direction = planted(80, d, 8.0)
    task = make_task(labels, groups)
    value, _, (low, high), _, directions = read(states, task)
    assert value > 0.97 and 0.8 < low < value <= high <= 1
    mean = directions.mean(0)
    assert mean @ direction / np.linalg.norm(mean) > (0.8 if d == 20 else 0.35)
    controls = control_labels(task, 8)
    scores, _ = cross_fit(states, task, controls)
    drawn = np.array([evaluated(task, y, s)[0] for y, s in zip(controls, scores, strict=True)])
    against = against_controls(value, low, high, drawn)
    assert against["selectivity_low"] > 0.2 and against["p"] < 0.01


@pytest.mark.parametrize("d", [12, 200])
def test_the_fit_is_that_of_the_standardised_states(d):
    """In principal components or not, the scores are those of the same penalised fit on all dimensions."""
    states, labels, groups, _ = planted(60, d, 2.0)
    task = make_task(labels, groups)
    _, _, _, scores, directions = read(states, task)
    train = task.fold != 0
    z = (states - states[train].mean(0)) / states[train].std(0) / np.sqrt(d)
    fit = LogisticRegression(C=1 / probe_fits.PENALTY, tol=1e-10, max_iter=10_000).fit(z[train], labels[train])
    np.testing.assert_allclose(scores[~train], fit.decision_function(z[~train]), atol=1e-4)
    coefficients = fit.coef_[0] / states[train].std(0)
    np.testing.assert_allclose(directions[0], coefficients / np.linalg.norm(coefficients), atol=1e-4)


def test_ridge_is_least_squares_with_the_penalty():
    rng = np.random.default_rng(3)
    states = rng.standard_normal((50, 7))
    y = states @ rng.standard_normal(7) + 0.1 * rng.standard_normal(50)
    task = make_task(y, np.arange(50))
    assert not task.classes
    value, left_out, _, scores, _ = read(states, task)
    train = task.fold != 1
    z = (states - states[train].mean(0)) / states[train].std(0) / np.sqrt(7)
    inverse = np.linalg.inv(z[train].T @ z[train] + probe_fits.RIDGE * np.eye(7))
    expected = z[~train] @ (inverse @ z[train].T @ (y[train] - y[train].mean()))
    np.testing.assert_allclose(scores[~train], expected, atol=1e-9)
    means = np.array([y[task.fold != k].mean() for k in task.fold])
    squares = [((y - means - scores) ** 2), (y - means) ** 2]
    assert value == pytest.approx(1 - squares[0].sum() / squares[1].sum()) and value > 0.8
    assert left_out[4] == pytest.approx(1 - np.delete(squares[0], 4).sum() / np.delete(squares[1], 4).sum())


def test_auc_is_that_of_the_pairs_within_a_fold():
    states, labels, groups, _ = planted(24, 5, 1.0, rows=2)
    task = make_task(labels, groups)
    rng = np.random.default_rng(1)
    scores = np.round(rng.standard_normal(48), 1)  # ties

    def slow(keep):
        gain = total = 0.0
        for k in range(task.folds):
            rows = (task.fold == k) & keep
            pairs = (labels[rows] == 1).sum() * (labels[rows] == 0).sum()
            if pairs:
                gain, total = gain + pairs * roc_auc_score(labels[rows], scores[rows]), total + pairs
        return gain / total

    value, left_out = evaluated(task, labels, scores)
    assert value == pytest.approx(slow(np.ones(48, dtype=bool)))
    for g in range(24):
        assert left_out[g] == pytest.approx(slow(groups != g))


@pytest.mark.parametrize("d", [10, 150])
def test_units_and_places_of_the_states_change_nothing(d):
    states, labels, groups, _ = planted(50, d, 1.5)
    task = make_task(labels, groups)
    scales = np.exp(np.random.default_rng(0).standard_normal(d))
    first, *others = (read(x, task) for x in (states, 1000 * states, states * scales + 7.0))
    for other in others:
        assert other[0] == pytest.approx(first[0], abs=1e-9) and other[2] == pytest.approx(first[2], abs=1e-9)
        np.testing.assert_allclose(other[3], first[3], atol=1e-7)


def test_copies_of_a_prompt_are_worth_nothing():
    states, labels, groups, _ = planted(40, 6, 1.0)
    often = np.repeat(np.arange(40), np.where(np.arange(40) < 10, 9, 1))
    single, copied = (make_task(labels[rows], groups[rows]) for rows in (np.arange(40), often))
    one, many = read(states, single), read(states[often], copied)
    assert many[0] == pytest.approx(one[0], abs=1e-9) and many[2] == pytest.approx(one[2], abs=1e-7)
    np.testing.assert_allclose(many[1], one[1], atol=1e-9)


def test_a_prompt_is_never_in_training_and_test():
    _, labels, groups, _ = planted(40, 3, 1.0, rows=3)
    task = make_task(labels, groups, folds=4)
    assert all(len(set(task.fold[groups == g])) == 1 for g in range(40))
    assert sorted(set(task.fold)) == [0, 1, 2, 3]


def test_controls_keep_a_prompts_labels_together():
    groups = np.repeat(np.arange(30), 2)
    labels = np.repeat(np.arange(30) % 2, 2).astype(float)
    drawn = control_labels(make_task(labels, groups), 6)
    assert (drawn[:, ::2] == drawn[:, 1::2]).all() and (drawn.sum(1) == 30).all()
    assert len({tuple(row) for row in drawn}) == 6
    np.testing.assert_array_equal(drawn, control_labels(make_task(labels, groups), 6))
    alternating = np.tile([0.0, 1.0], 30)
    drawn = control_labels(make_task(alternating, groups), 6)
    assert (drawn[:, ::2] + drawn[:, 1::2] == 1).all() and (drawn != alternating).any(1).all()


def calibration(n: int, d: int, rows: int, runs: int, n_control: int = 5) -> dict[str, float]:
    """On labels that are noise: share of intervals with .5, share of p < .05, mean selectivity and its error."""
    covered, small, gaps = [], [], []
    for run in range(runs):
        states, labels, groups, _ = planted(n, d, 0.0, rows, seed=10_000 + run)
        task = make_task(labels, groups, seed=run)
        targets = np.concatenate([labels[None], control_labels(task, n_control, run)])
        scores, _ = cross_fit(states, task, targets)
        value, left_out = evaluated(task, labels, scores[0])
        ends = interval(task, value, left_out, run)
        drawn = np.array([evaluated(task, y, s)[0] for y, s in zip(targets[1:], scores[1:], strict=True)])
        against = against_controls(value, *ends, drawn)
        covered.append(ends[0] <= 0.5 <= ends[1])
        small.append(against["p"] < 0.05)
        gaps.append(against["selectivity"])
    return {"covered": np.mean(covered), "small": np.mean(small), "gap": np.mean(gaps),
            "error": np.std(gaps) / np.sqrt(runs)}  # fmt: skip


@pytest.mark.parametrize(("d", "rows"), [(3, 1), (60, 2)])
def test_noise_is_not_decoded(d, rows):
    found = calibration(24, d, rows, runs=30)
    assert found["covered"] >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / 30)
    assert found["small"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 30)
    assert abs(found["gap"]) < 3 * found["error"]


def test_states_that_do_not_differ_say_nothing():
    _, labels, groups, _ = planted(30, 3, 1.0)
    task = make_task(labels, groups)
    value, _, (low, high), _, directions = read(np.full((30, 4), 1e4) + 1e-5, task)
    assert value == 0.5 and low < 0.35 and high > 0.65 and not directions.any()
    assert against_controls(0.5, low, high, np.full(5, 0.5))["p"] == 1


# --- the method


@functools.cache
def model() -> rl.RewardModel:
    return rl.RewardModel(*tiny_model("llama", seed=1), name="llama")


@functools.cache
def texts(n: int = 24, rows: int = 2):
    """Texts in which "apple" stands or not, at random places, and whether it does."""
    rng = random.Random(0)
    out, labels = [], []
    for i in range(n):
        for k in range(rows):
            words = rng.choices(WORDS, k=rng.randint(4, 9))
            labels.append((i + k) % 2)
            if labels[-1]:
                words[rng.randrange(len(words))] = "apple"
            out.append((f"question {i}", " ".join(words)))
    return out, labels


@functools.cache
def found() -> rl.Result:
    return linear_probes(model(), *texts(), n_control=12)


def test_a_word_is_decodable_in_the_mean_of_the_response():
    result = found()
    assert result.value.dims == ("depth", "at") and result.unit == "AUC"
    assert result.value["depth"].values.tolist() == [0, 1, 2, 3]
    first = result.value.sel(depth=0, at="response")
    assert float(first) > 0.95 and float(first["p_bh"]) < 0.02 and float(first["selectivity_low"]) > 0.1
    assert (result.low <= result.value).all() and (result.value <= result.high).all()
    assert result.meta["n_prompts"] == 24 and result.meta["prompts_per_class"] == [24, 24]
    assert 0 <= result.meta["length_alone"]["value"] <= 1
    assert float(result.value["p_bh"].min()) >= float(result.value["p"].min())


def test_where_states_are_equal_there_is_no_cosine():
    """At the reward position the embedding is that of the template's last token, whatever the text."""
    cell = found().value.sel(depth=0, at="reward")
    assert float(cell) == 0.5 and np.isnan(float(cell["cosine"])) and float(cell["p"]) == 1
    assert any(check.name == "cells without a cosine" for check in found().checks)


def test_the_cosine_is_with_what_the_reward_reads():
    rm, result = model(), found()
    cosine = result.value["cosine"]
    np.testing.assert_array_less(result.value["cosine_low"].sel(at="response", depth=[0, 1, 2]),
                                 result.value["cosine_high"].sel(at="response", depth=[0, 1, 2]))  # fmt: skip
    rows, labels = texts()
    h = rl.capture(rm, rows, ["L2.resid_post"])["L2.resid_post"].double().numpy()
    task = make_task(labels, [rl.Pair(p, r, "").prompt_key for p, r in rows])
    _, directions = cross_fit(h.astype(np.float32), task, task.labels[None])
    u = rm.readout.direction(torch.from_numpy(h[:1]).float()).u[0].double().numpy()
    mean = directions[0].mean(0)
    expected = mean @ u / np.linalg.norm(mean) / np.linalg.norm(u)
    assert float(cosine.sel(depth=3, at="reward")) == pytest.approx(expected, abs=1e-4)


def test_gradients_are_those_of_the_gradient_lens():
    rm = model()
    pairs = [rl.Pair(f"q{i}", "the cat is red", "you and an old tree") for i in range(3)]
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    last = rl.capture(rm, pairs, ["L2.resid_post"])["L2.resid_post"]
    mean, gap = _gradients(rm, tokens, last, [0, 1, 2, 3], ("reward", "response"))
    assert gap < 1e-5
    final = mean[:, 0] / np.linalg.norm(mean[:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(final @ final[-1], rl.gradient_lens(rm, pairs).value["cosine"], atol=1e-5)
    assert not mean[3, 1].any()  # the head does not read the response's tokens


def test_the_reward_between_classes_is_at_equal_length():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 2)
    labels = np.tile([0.0, 1.0], 40)
    length = rng.integers(5, 50, 80).astype(float) + 20 * labels
    task = make_task(labels, groups)
    keys = [str(g) for g in groups]
    rewards = 2.0 * labels + 0.1 * length + 1e-3 * rng.standard_normal(80)
    shifted = rewards + 5 * rng.standard_normal(40)[groups]
    assert _used(rewards, task, length, keys)["across"]["value"] == pytest.approx(2, abs=0.01)
    within = _used(shifted, task, length, keys)["within"]
    assert within["value"] == pytest.approx(2, abs=0.01) and within["low"] < 2 < within["high"]
    constant = make_task((np.arange(80) // 2 % 2).astype(float), groups)
    assert _used(rewards, constant, length, keys)["within"] is None


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "gpt2", "bloom", "mixtral"])
def test_every_structure_gives_values_and_the_effective_direction(family):
    rm = rl.RewardModel(*tiny_model(family, seed=1), name=family)
    rows, labels = texts()
    result = linear_probes(rm, rows[:20], labels[:20], depths=[0, 3], n_control=5)
    assert np.isfinite(result.value).all() and result.checks[0].gap < 1e-4
    assert np.isfinite(float(result.value["cosine"].sel(depth=3, at="reward")))
    assert type(result.plot()).__name__ == "LayerChart"


def test_a_number_and_a_named_feature():
    rm, (rows, _) = model(), texts()
    result = linear_probes(rm, rows, "characters", depths=[1, 3], at="response", n_control=5)
    assert result.unit == "R2" and result.value.shape == (2, 1) and result.meta["settings"]["property"] == "characters"
    assert float(result.high.max()) <= 1 and (result.low <= result.value).all()
    rewards = [rm.score(*row) for row in rows]
    own = linear_probes(rm, rows, rewards, depths=[3], at=["reward"], n_control=5)
    assert float(own.value[0, 0]) > 0.5 and float(own.value["cosine"][0, 0]) > 0.3


def test_the_order_of_the_texts_does_not_matter():
    """One text a prompt gives the gradients; from the same texts in another order other ones were drawn."""
    rm, (rows, labels) = model(), texts()
    order = np.random.default_rng(2).permutation(len(rows))
    settings = {"depths": [0, 1], "n_control": 5}
    first = linear_probes(rm, rows, labels, **settings)
    again = linear_probes(rm, [rows[i] for i in order], [labels[i] for i in order], **settings)
    for key in ("value", "low", "high", "cosine", "cosine_low", "cosine_high", "control", "cosine_control_sd"):
        np.testing.assert_allclose(again.dataset[key], first.dataset[key], atol=1e-4, err_msg=key)


def test_pairs_are_texts_in_turn_and_the_same_call_gives_the_same(tmp_path):
    rm = model()
    pairs = [rl.Pair(f"q{i}", f"the apple {WORDS[i]} {WORDS[-i]}", f"{WORDS[i]} sun {WORDS[3]}") for i in range(12)]
    settings = {"depths": [1], "n_control": 5}
    first = linear_probes(rm, pairs, [1, 0] * 12, **settings)
    rows = [(p.prompt, r) for p in pairs for r in p.responses]
    second = linear_probes(rm, rows, np.tile([True, False], 12), **settings)
    assert first.dataset.equals(second.dataset)
    assert rl.load_result(first.save(tmp_path / "x.nc")).dataset.equals(first.dataset)


BAD = {
    "constant": (lambda rows, y: {"labels": [1] * len(rows)}, "nothing to tell apart"),
    "too short": (lambda rows, y: {"labels": y[:-1]}, "do not fit"),
    "not finite": (lambda rows, y: {"labels": [float("nan"), *y[1:]]}, "do not fit"),
    "words": (lambda rows, y: {"labels": ["yes"] * len(rows)}, "not numbers"),
    "no feature": (lambda rows, y: {"labels": "wordz"}, "no such text feature"),
    "rare": (lambda rows, y: {"labels": [1] * 5 + [0] * (len(rows) - 5)}, "at least 10 different prompts of each"),
    "few numbers": (lambda rows, y: {"texts": rows[:24], "labels": np.arange(24.0)}, "at least 20 different prompts"),
    "groups": (lambda rows, y: {"groups": [i // 24 for i in range(len(rows))]}, "too few prompts"),
    "groups length": (lambda rows, y: {"groups": ["a"]}, "do not match"),
    "divided": (lambda rows, y: {"groups": list(range(len(rows)))}, "divide a prompt"),
    "folds": (lambda rows, y: {"folds": 1}, "too few prompts"),
    "many folds": (lambda rows, y: {"folds": 13}, "at least 26 different prompts"),
    "depth": (lambda rows, y: {"depths": [4]}, "not understood"),
    "at": (lambda rows, y: {"at": "final"}, "not understood"),
    "controls": (lambda rows, y: {"n_control": 1}, "not understood"),
    "empty": (lambda rows, y: {"texts": [*rows[:-1], (rows[-1][0], "")]}, "without tokens"),
    "strings": (lambda rows, y: {"texts": [r for _, r in rows]}, "cannot be read"),
    "nothing": (lambda rows, y: {"texts": []}, "no pairs"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_is_refused(case):
    change, message = BAD[case]
    rows, labels = texts()
    given = {"texts": rows, "labels": labels, **change(rows, labels)}
    with pytest.raises(rl.DataError, match=message):
        linear_probes(model(), given.pop("texts"), given.pop("labels"), **given)
