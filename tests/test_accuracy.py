"""Agreement with labels: literals on planted scores, the obvious loop, and a model that has learnt length."""

import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import minimize
from scipy.stats import binom

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from planted import planted_model, planted_pairs
from reward_lens import stats
from reward_lens.errors import DataError
from reward_lens.methods.behaviour.accuracy import accuracy, calibration, length_partial, ranking
from reward_lens.methods.behaviour.style import style_matrix, style_summary
from reward_lens.methods.shared.paired_shares import paired_change
from reward_lens.methods.shared.preference_weights import preference_weight
from reward_lens.result import Result


@pytest.fixture(scope="module")
def rm():
    return rl.RewardModel(*tiny_model("llama"))


def with_scores(rm, pairs, margins, lengths=None) -> Result:
    """What `rm.score_pairs` would give if the margins, and the length differences, were these."""
    pairs = rl.Pairs(pairs)
    value = rm.score_pairs(pairs).value.copy()
    margins = np.asarray(margins, dtype=float)
    value.values[:] = np.stack([margins, np.zeros_like(margins), margins], 1)
    if lengths is not None:
        lengths = np.asarray(lengths)
        value = value.assign_coords(chosen_tokens=("pair", 100 + lengths), rejected_tokens=("pair", 100 + 0 * lengths))
    meta = rm.describe("score_pairs", pairs)
    return Result("score_pairs", value, unit="reward", meta=meta)


def some_pairs(n, prompts=None, subsets=None):
    prompts = range(n) if prompts is None else prompts
    subsets = [None] * n if subsets is None else subsets
    labels = enumerate(zip(prompts, subsets, strict=True))
    return [rl.Pair(f"p{p}", "a", f"b{i}", id=str(i), subset=s) for i, (p, s) in labels]


def cell(result, **labels):
    return float(result.value.sel(**labels))


# accuracy


def test_accuracy_by_subset_rule_and_length(rm):
    """Margins and lengths that can be counted by hand."""
    pairs = some_pairs(8, subsets=["x", "x", "x", "y", "y", "y", "y", None])
    scores = with_scores(rm, pairs, [1, -1, 0, 2, 3, -4, 5, 6], [1, 2, 3, 4, -1, -2, -3, 0])
    result = accuracy(rm, pairs, scores)
    model = result.value.sel(rule="reward model")
    expected = {"all": 5.5 / 8, "x": 1.5 / 3, "y": 3 / 4, "chosen longer": 2.5 / 4, "chosen shorter": 2 / 3,
                "equal length": 1.0, "balanced": (2.5 / 4 + 2 / 3) / 2}  # fmt: skip
    assert dict(zip(model["subset"].values.tolist(), model.values.tolist(), strict=True)) == pytest.approx(expected)
    assert model["group"].values.tolist() == ["all", "subset", "subset", *["length"] * 4]
    assert model["n_pairs"].values.tolist() == [8, 3, 4, 4, 3, 1, 7]
    longer = result.value.sel(rule="longer wins")
    assert longer.sel(subset="all") == 4.5 / 8 and longer.sel(subset="balanced") == 0.5
    assert longer.sel(subset="chosen longer") == 1 and longer.sel(subset="chosen shorter") == 0
    assert np.allclose(longer + result.value.sel(rule="shorter wins"), 1)
    low, high = (
        result.low.sel(subset="all", rule="reward model"),
        result.high.sel(subset="all", rule="reward model"),
    )
    assert (float(low), float(high)) == pytest.approx(stats.wilson(5.5, 8))
    assert result.unit == "fraction" and result.meta["shows"] and result.meta["cannot_show"]


def test_the_model_ahead_of_a_rule_is_a_paired_difference(rm):
    pairs = some_pairs(8)
    result = accuracy(rm, pairs, with_scores(rm, pairs, [1, -1, 0, 2, 3, -4, 5, 6], [1, 2, 3, 4, -1, -2, -3, 0]))
    found = [[float(result.value[f"ahead{end}"].sel(subset=row, rule="longer wins")) for end in ("", "_low", "_high")]
             for row in ("all", "balanced", "chosen shorter")]  # fmt: skip
    change = np.array([0, -1, -0.5, 0, 1, 0, 1, 0.5])  # credit of the model less that of the rule
    assert found[0] == pytest.approx([change.mean(), *paired_change(change, np.arange(8))[2:]])
    own = result.dataset.sel(subset="balanced", rule="reward model")
    assert found[1] == pytest.approx([float(own[name]) - 0.5 for name in ("value", "low", "high")])
    assert found[2][0] == pytest.approx(2 / 3) and np.isnan(found[2][1:]).all()  # three prompts
    assert np.isnan(result.value["ahead"].sel(rule="reward model")).all()
    few = some_pairs(8, prompts=[0, 0, 0, 1, 1, 2, 3, 4])
    result = accuracy(rm, few, with_scores(rm, few, [1, -1, 0, 2, 3, -4, 5, 6], [1, 2, 3, 4, -1, -2, -3, 0]))
    assert np.isnan(result.value["ahead_low"]).all() and np.isnan(result.value["ahead_high"]).all()


def test_accuracy_counts_prompts(rm):
    """Eight pairs that repeat one another within a prompt say no more than their two prompts."""
    pairs = some_pairs(8, prompts=[0] * 4 + [1] * 4)
    result = accuracy(rm, pairs, with_scores(rm, pairs, [1] * 4 + [-1] * 4, [1] * 8))
    assert result.value["n_prompts"].sel(subset="all") == 2
    low, high = (float(e.sel(subset="all", rule="reward model")) for e in (result.low, result.high))
    assert (low, high) == pytest.approx(stats.wilson(1, 2))


def test_accuracy_of_a_model_that_learnt_length():
    rm = rl.RewardModel(*planted_model("length"))
    longer = [rl.Pair(*texts) for texts in planted_pairs("length", 8)]
    shorter = [rl.Pair(p.prompt + " then", p.rejected, p.chosen) for p in longer]
    result = accuracy(rm, [*longer, *shorter])
    model = result.value.sel(rule="reward model")
    assert model.sel(subset="chosen longer") == 1 and model.sel(subset="chosen shorter") == 0
    assert model.sel(subset="all") == 0.5 and model.sel(subset="balanced") == 0.5


def test_rows_without_pairs_say_so(rm):
    pairs = some_pairs(3)
    result = accuracy(rm, pairs, with_scores(rm, pairs, [1, 1, 1], [2, 2, 2]))
    model = result.value.sel(rule="reward model")
    assert np.isnan(model.sel(subset=["chosen shorter", "equal length", "balanced"])).all()
    assert "no pairs of that kind" in str(result.checks[0])


def test_a_subset_named_like_a_row_stays_apart(rm):
    pairs = some_pairs(2, subsets=["all", "balanced"])
    result = accuracy(rm, pairs, with_scores(rm, pairs, [1, -1]))
    assert result.value["subset"].values.tolist()[:3] == ["all", "subset all", "subset balanced"]
    assert cell(result, subset="subset all", rule="reward model") == 1


def test_balanced_interval_covers():
    """Shares of .7 and .4, forty prompts each: the interval of their mean holds .55 at its nominal rate."""
    from reward_lens.methods.behaviour.accuracy import _balanced, _share

    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        sides = [_share((rng.random(40) < p).astype(float), np.arange(40)) for p in (0.7, 0.4)]
        _, low, high = _balanced([sides[0]], [sides[1]], ["a"], ["b"])[0]
        _, wide_low, wide_high = _balanced([sides[0]], [sides[1]], ["a"], ["a"])[0]
        assert wide_low < low < high < wide_high
        inside += low <= 0.55 <= high
    assert 0.92 <= inside / 400 <= 0.985


def test_scores_are_used_and_checked(rm):
    pairs = rl.Pairs(rl.Pair(*t) for t in TEXT_PAIRS)
    scores = rm.score_pairs(pairs)
    xr.testing.assert_identical(accuracy(rm, pairs, scores).dataset, accuracy(rm, pairs).dataset)
    with pytest.raises(DataError, match="not of these inputs and this model"):
        accuracy(rm, pairs[:3], scores)
    with pytest.raises(DataError, match="5 rows"):
        accuracy(rm, pairs, scores._with(scores.dataset.isel(pair=slice(5))))
    with pytest.raises(DataError, match="model"):
        accuracy(rl.RewardModel(*tiny_model("gpt2"), name="other"), pairs, scores)
    halved = rl.RewardModel(*tiny_model("llama", dtype=torch.bfloat16), name=rm.name)
    with pytest.raises(DataError, match="dtype 'float32'"):
        accuracy(halved, pairs, scores)
    cut = rl.RewardModel(rm.module, rm.tokenizer.hf, name=rm.name, truncation="left")
    with pytest.raises(DataError, match="truncation None"):
        accuracy(cut, pairs, scores)


# calibration


def test_calibration_bins_and_summary(rm):
    """Margins 0.1 (3 of 4 right) and 3 (1 of 2 right), by hand."""
    pairs = some_pairs(6)
    result = calibration(rm, pairs, with_scores(rm, pairs, [0.1, 0.1, 0.1, -0.1, 3, -3]), bins=5)
    small, large = 1 / (1 + np.exp(-0.1)), 1 / (1 + np.exp(-3.0))
    assert result.value.values[[0, 4]].tolist() == [0.75, 0.5] and np.isnan(result.value.values[1:4]).all()
    assert result.value["predicted"].values[[0, 4]] == pytest.approx([small, large])
    assert result.value["n"].values.tolist() == [4, 0, 0, 0, 2]
    summary = result.meta["summary"]
    assert summary["ece"] == pytest.approx((4 * abs(0.75 - small) + 2 * abs(0.5 - large)) / 6)
    apart = [np.abs(np.arange(k + 1) - k * p) @ binom.pmf(np.arange(k + 1), k, p)
             for k, p in ((4, small), (2, large))]  # fmt: skip
    assert summary["ece_if_calibrated"] == pytest.approx(sum(apart) / 6, abs=0.05)
    assert summary["brier"] == pytest.approx((3 * (1 - small) ** 2 + small**2 + (1 - large) ** 2 + large**2) / 6)
    right = [small] * 3 + [1 - small, large, 1 - large]
    assert summary["log_loss"] == pytest.approx(-np.mean(np.log(right)))
    assert (float(result.low[0]), float(result.high[0])) == pytest.approx(stats.wilson(3, 4))
    assert result.plot() is not None


def test_calibration_recovers_a_scale(rm):
    """Labels drawn at sigmoid(margin / 2): the margin is twice too sure, and the slope says one half."""
    rng = np.random.default_rng(1)
    size = np.abs(rng.normal(0, 3, 3000))
    margins = np.where(rng.random(3000) < 1 / (1 + np.exp(-size / 2)), size, -size)
    pairs = some_pairs(3000)
    value = xr.DataArray(
        np.stack([margins, 0 * margins, margins], 1), dims=("pair", "side"),
        coords={"side": ["chosen", "rejected", "margin"], "chosen_tokens": ("pair", np.ones(3000, int)),
                "rejected_tokens": ("pair", np.ones(3000, int))},
    )  # fmt: skip
    meta = rm.describe("score_pairs", rl.Pairs(pairs))
    result = calibration(rm, pairs, Result("score_pairs", value, unit="reward", meta=meta))
    assert result.meta["summary"]["slope"] == pytest.approx(0.5, abs=0.04)
    halved = Result("score_pairs", value / 2, unit="reward", meta=meta)
    summary = calibration(rm, pairs, halved).meta["summary"]
    assert summary["ece"] == pytest.approx(summary["ece_if_calibrated"], abs=0.01)
    assert calibration(rm, pairs, halved).meta["summary"]["ece"] < 0.02 < result.meta["summary"]["ece"]


def test_calibration_without_a_slope(rm):
    pairs = some_pairs(2)
    assert calibration(rm, pairs, with_scores(rm, pairs, [1, 2])).meta["summary"]["slope"] is None
    with pytest.raises(DataError, match="bins"):
        calibration(rm, pairs, bins=0)


# length partialled out


def test_length_partial_is_the_maximum_of_the_likelihood(rm):
    """Against scipy's minimiser and the clustered error written out."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(-30, 30, 60)
    margins = 0.05 * lengths + rng.normal(0.3, 1, 60)
    pairs = some_pairs(60, prompts=np.arange(60) // 2)
    result = length_partial(rm, pairs, with_scores(rm, pairs, margins, lengths))
    sd = np.sqrt([np.mean(margins**2), np.mean(lengths**2)])
    design = np.stack([margins, lengths], 1) / sd
    best = minimize(lambda b: np.logaddexp(0, -design @ b).sum(), [0.0, 0.0], tol=1e-12).x
    assert result.value.values == pytest.approx(best, abs=1e-4)
    assert result.value["sd"].values == pytest.approx(sd)
    alone = minimize(lambda b: np.logaddexp(0, -design[:, :1] @ b).sum(), [0.0], tol=1e-12).x
    assert float(result.value["alone"][0]) == pytest.approx(alone[0], abs=1e-4)
    # The jackknife of the last step, written out: G = 30 clusters and t(29).
    residual = 1 - 1 / (1 + np.exp(-design @ best))
    curved = design * np.sqrt(residual * (1 - residual))[:, None]
    whole, scores = curved.T @ curved, (design * residual[:, None]).reshape(30, 2, 2).sum(1)
    moves = [np.linalg.solve(whole - own.T @ own, s) for own, s in zip(curved.reshape(30, 2, 2), scores, strict=True)]
    error = np.sqrt(29 / 30 * (np.array(moves) ** 2).sum(0))
    assert (result.high - result.value).values == pytest.approx(2.045230 * error, rel=1e-3)


def test_size_of_a_preference_weight_where_one_prompt_has_half_of_the_pairs():
    """Margins and lengths that prompts share and labels do not go with: CR1 rejects .11 of them."""
    rng, prompts, p = np.random.default_rng(5), np.append(np.arange(20), np.zeros(20, int)), []
    for _ in range(400):
        margins, lengths = (rng.normal(size=20)[prompts] + rng.normal(size=40) for _ in range(2))
        p.append(preference_weight(margins, lengths[:, None], prompts).p)
    assert np.mean(np.array(p) <= 0.05) <= 0.06


def test_length_partial_tells_quality_from_length(rm):
    """Labels that follow length alone: the margin, which goes with length, loses its weight to it."""
    rng = np.random.default_rng(3)
    lengths = rng.normal(0, 10, 400)
    lengths *= np.where(rng.random(400) < 1 / (1 + np.exp(-np.abs(lengths) / 8)), np.sign(lengths), -np.sign(lengths))
    lengths = lengths.round().astype(int)
    margins = 0.1 * lengths + rng.normal(0, 1, 400)
    pairs = some_pairs(400)
    result = length_partial(rm, pairs, with_scores(rm, pairs, margins, lengths))
    assert float(result.value["alone"].sel(term="margin_per_sd")) > 0.3
    assert result.low.sel(term="margin_per_sd") < 0 < result.high.sel(term="margin_per_sd")
    assert result.low.sel(term="length_per_sd") > 0


@pytest.mark.parametrize(
    ("margins", "lengths"),
    [
        ([1, 2, 3, 1, 2, 3, 1], [1, -1, 2, -2, 3, -3, 0]),  # the margin is always right
        ([1, -1, 2, -2, 3, 1, 1], [2, -2, 4, -4, 6, 2, 2]),  # the margin is a multiple of length
        ([1, -1, 2, -2, 3, 1, 1], [0] * 7),  # all of equal length
        ([1, -1], [1, 1]),
    ],
)
def test_length_partial_without_a_maximum(rm, margins, lengths):
    pairs = some_pairs(len(margins))
    result = length_partial(rm, pairs, with_scores(rm, pairs, margins, lengths))
    assert np.isnan(result.value).all() and "no maximum" in str(result.checks[0])


# ranking


def groups_and_scores(rm, rewards, labels):
    groups = [
        rl.Group(f"p{i}", [f"r{i}{j}" for j in range(len(r))], labels=lab)
        for i, (r, lab) in enumerate(zip(rewards, labels, strict=True))
    ]
    scores = rm.score_many(groups)
    for i, r in enumerate(rewards):
        scores.value.values[i, : len(r)] = r
    return groups, scores


def test_ranking_by_hand(rm):
    rewards = [[3, 2, 1], [1, 1, 0, -1], [0, 5], [2, 2], [1, 4]]
    labels = [[3, 2, 1], [1, 0, 0, 0], None, [1, 0], [7, 7]]
    groups, scores = groups_and_scores(rm, rewards, labels)
    result = ranking(rm, groups, scores)
    assert cell(result, metric="top-1 accuracy") == (1 + 0.5 + 0 + 0.5) / 4  # the last orders nothing
    assert cell(result, metric="pairwise accuracy") == (3 + 2.5 + 0 + 0.5) / 8
    tau = np.nanmean([stats.within_group_rank_correlation(r, lab) for r, lab in
                      zip(rewards[:3], ([3, 2, 1], [1, 0, 0, 0], [1, 0]), strict=True)])  # fmt: skip
    assert cell(result, metric="kendall tau-b") == pytest.approx(tau)  # constant rewards order nothing either
    assert result.value["n"].values.tolist() == [4, 8, 3]
    assert result.value["unit_of"].values.tolist() == ["fraction", "fraction", "correlation"]
    assert np.isnan(result.low.sel(metric="kendall tau-b"))  # three prompts


def test_the_interval_of_tau_ends_at_one_and_has_a_width(rm):
    """Seven short lists all in order are no proof that every list is; one that is not leaves the t interval past 1."""
    groups, scores = groups_and_scores(rm, [[3, 2, 1]] * 7, [[2, 1, 0]] * 7)
    for case, turned in ((0, []), (1, [0])):
        for i in turned:
            scores.value.values[i, :3] = [2, 3, 1]
        result = ranking(rm, groups, scores).dataset.sel(metric="kendall tau-b")
        assert result["high"] == 1 and result["low"] < result["value"], case
    alone = stats.wilson(7, 7)[0]
    scores.value.values[0, :3] = [3, 2, 1]
    assert float(ranking(rm, groups, scores).low.sel(metric="kendall tau-b")) == pytest.approx(2 * alone - 1)


def test_scores_from_before_do_not_bring_their_labels(rm):
    groups, scores = groups_and_scores(rm, [[3, 2, 1]], [[3, 2, 1]])
    turned = [rl.Group(g.prompt, g.responses, labels=[1, 2, 3]) for g in groups]
    assert ranking(rm, turned, scores).value.values.tolist() == [0.0, 0.0, -1.0]
    assert ranking(rm, groups, scores).value.values.tolist() == [1.0, 1.0, 1.0]


def test_pairwise_accuracy_is_accuracy_of_the_pairs():
    """On real rewards: the expansion of lists into pairs, scored as pairs, gives the same number."""
    rm = rl.RewardModel(*tiny_model("llama"))
    groups = [rl.Group(p, [a, b, "Blue and red.", "x"], labels=[3, 1, 1, 0]) for p, a, b in TEXT_PAIRS]
    pairs = [
        rl.Pair(g.prompt, g.responses[i], g.responses[j])
        for g in groups
        for i, j in itertools.permutations(range(4), 2)
        if g.labels[i] > g.labels[j]
    ]
    expanded = accuracy(rm, pairs)
    result = ranking(rm, groups)
    for ours, theirs in (
        (result.value, expanded.value),
        (result.low, expanded.low),
        (result.high, expanded.high),
    ):
        expected = float(theirs.sel(subset="all", rule="reward model"))
        assert float(ours.sel(metric="pairwise accuracy")) == pytest.approx(expected)


def test_ranking_without_an_order(rm):
    groups, scores = groups_and_scores(rm, [[1, 2]], [[1, 1]])
    assert np.isnan(ranking(rm, groups, scores).value).all()
    with pytest.raises(DataError, match="not of these inputs"):
        ranking(rm, [*groups, *groups], scores)
    with pytest.raises(DataError, match=r"'groups\[0\]' cannot be used.*an rl.Group.*rl.load_groups"):
        ranking(rm, [{"prompt": "a", "responses": ["b", "c"]}])


# style

CHOSEN, REJECTED = ("yes", "yes, it is", "**yes**, it is so"), ("no", "no, it is not", "**no**, it is not so")


def test_style_matrix_by_hand(rm):
    """Each cell against two calls of `rm.score`; the summary against the triangles."""
    items = [rl.StyleItem(f"Is {n} prime?", CHOSEN, REJECTED, id=f"i{n}", subset="maths") for n in range(6)]
    items.append(rl.StyleItem("Is 0 prime?", CHOSEN, CHOSEN, id="same"))
    matrix = style_matrix(rm, items)
    for item, row in zip(items, matrix.value.values, strict=True):
        for i, j in np.ndindex(3, 3):
            a, b = rm.score(item.prompt, item.chosen[i]), rm.score(item.prompt, item.rejected[j])
            assert row[i, j] == (0.5 if item.chosen[i] == item.rejected[j] else float(a > b))
    cells = matrix.value.values
    assert np.allclose(matrix.mean, cells.mean(0)) and matrix.mean.dims == ("chosen_style", "rejected_style")
    assert ((matrix.low <= matrix.mean) & (matrix.mean <= matrix.high)).all()
    summary = style_summary(matrix)
    hard = [cells[:, 0, 1], cells[:, 0, 2], cells[:, 1, 2]]
    assert float(summary.mean.sel(difficulty="hard")) == pytest.approx(np.mean(hard))
    assert float(summary.mean.sel(difficulty="easy")) == pytest.approx(np.tril(cells, -1).sum() / 21)
    assert float(summary.mean.sel(difficulty="normal")) == pytest.approx(np.trace(cells, axis1=1, axis2=2).mean() / 3)
    assert float(summary.mean.sel(difficulty="overall")) == pytest.approx(cells.mean())
    assert matrix.value["subset"].values.tolist() == ["maths"] * 6 + [""]


def test_style_of_a_model_that_learnt_length():
    """Whatever is right, the longer response wins: nothing on hard, everything on easy."""
    rm = rl.RewardModel(*planted_model("length"))
    styles = ("the cat", "the cat and the dog", "the cat and the dog is on the red hat and the sun")
    items = [rl.StyleItem(f"{word} the", styles, styles) for word in ("run", "sea", "old", "hat", "tree", "dog", "cat")]
    summary = style_summary(style_matrix(rm, items))
    assert summary.mean.values.tolist() == [0.0, 0.5, 1.0, 0.5]
    assert (summary.high - summary.low).sel(difficulty="hard") < 0.45


@pytest.mark.parametrize("build", [style_matrix, lambda rm, items: style_summary(style_matrix(rm, items))])
def test_style_round_trip(rm, build, tmp_path):
    result = build(rm, [rl.StyleItem("p", CHOSEN, REJECTED)])
    xr.testing.assert_identical(rl.load_result(result.save(tmp_path / "r.nc")).dataset, result.dataset)
    assert repr(result) and result.plot() is not None and result.meta["shows"] and result.meta["cannot_show"]


def test_style_refuses_other_things(rm):
    with pytest.raises(DataError, match="1 of 1 items of another kind: Pair"):
        style_matrix(rm, [rl.Pair("p", "a", "b")])
    with pytest.raises(DataError, match="no items"):
        style_matrix(rm, [])
    with pytest.raises(DataError, match="a result of 'accuracy'"):
        style_summary(accuracy(rm, [rl.Pair("p", "a", "b")]))


@pytest.mark.parametrize("method", [accuracy, calibration, length_partial])
def test_round_trip_and_no_trace(rm, method, tmp_path):
    pairs = [rl.Pair(*t) for t in TEXT_PAIRS]
    result = method(rm, pairs)
    loaded = rl.load_result(result.save(tmp_path / "result.nc"))
    xr.testing.assert_identical(loaded.dataset, result.dataset)
    assert repr(result) and result._repr_html_() and result.plot() is not None
    assert all(p.grad is None for p in rm.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    assert torch.equal(rm.rewards([rm.tokenize("a", "b")]), rm.rewards([rm.tokenize("a", "b")]))
