"""Relations of reward terms: hand arithmetic, planted directions and heads, and labels of unrelated terms."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, rankdata, t

import reward_lens as rl
from families import tiny_model
from reward_lens.errors import DataError
from reward_lens.methods.repair.bias_direction import bias_direction
from reward_lens.methods.terms import direction_cosines as cosines
from reward_lens.methods.terms import term_scores as scored
from reward_lens.methods.terms.conflict import TESTS, related, term_conflict, verdict
from reward_lens.methods.terms.direction_cosines import Measured, Moves, moves_of
from reward_lens.methods.terms.reward_terms import Term, pool_of
from reward_lens.methods.terms.term_tests import _over_prompts, _ratio
from term_states import planted_terms

EDGES = dict.fromkeys(TESTS, 0.2)
WORDS = "cat dog sun tree red old sea hat run it you and is on".split()
HEAD = {"help": 0, "again": 1, "against": 2, "other": 3}


@functools.cache
def model() -> rl.RewardModel:
    """Four rows: the second is the first in another unit, the third its opposite, the fourth has nothing of it."""
    module, tokenizer = tiny_model("llama", seed=1, num_labels=4)
    with torch.no_grad():
        weight = module.score.weight
        weight[1], weight[2] = 3 * weight[0], -0.5 * weight[0]
    return rl.RewardModel(module, tokenizer, name="four", objective=0)


@functools.cache
def groups(n: int = 30, k: int = 4) -> list[rl.Group]:
    rng = np.random.default_rng(0)
    return [rl.Group(f"Say {i}", [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(k)]) for i in range(n)]


@functools.cache
def rows() -> dict[str, rl.RewardModel]:
    return {name: model().for_objective(row) for name, row in HEAD.items()}


@functools.cache
def relation():
    return term_conflict(model(), rows(), responses=groups())


def cell(result, *place):
    return result.dataset.sel(term=place[0], other=place[1], test=place[2])


# --- arithmetic by hand -------------------------------------------------------------------------------------


def test_cosine_by_hand():
    """Different prompts only: A_ab = (0 + 1 + 2 + 2 + 2 + 2) / 6, A_aa = (1 + 1 + 3) / 3, A_bb = (0 + 2 + 1) / 3; with
    all prompts different A_ab is the product of the means (1, 1) and (1, 2/3)."""
    a = Moves(("p", "q", "r"), np.array([[1.0, 0], [1, 1], [1, 2]]))
    b = Moves(("p", "q", "r"), np.array([[2.0, 0], [0, 1], [1, 1]]))
    keys = ["p", "q", "r"]
    assert cosines._product(a, b, keys)[0] == 1.5
    assert cosines._product(a, a, keys)[0] == pytest.approx(5 / 3)
    assert cosines._product(b, b, keys)[0] == pytest.approx(1)
    apart = Moves(("s", "t", "u"), b.rows)
    assert cosines._product(a, apart, [*keys, "s", "t", "u"])[0] == pytest.approx(5 / 3)
    assert cosines.share(a) == pytest.approx(5 / 6)  # A_aa over |(1, 1)|^2
    assert cosines.share(a, frozenset({"r"})) == pytest.approx(1 / 1.25)  # (1, 0).(1, 1) over |(1, 1/2)|^2
    turned = Moves(keys=b.keys, rows=np.array([[1.0, 0], [-1, 0.1], [0, -0.1]]))
    assert math.isnan(cosines.cosine(a, turned).value) and "noise" in cosines.cosine(a, turned).reason


def test_products_without_a_prompt_against_a_loop():
    rng = np.random.default_rng(0)
    a = moves_of([f"{i}" for i in range(8)], rng.standard_normal((8, 5)))
    b = moves_of([f"{i}" for i in range(4, 14)], rng.standard_normal((10, 5)))
    keys = sorted({*a.keys, *b.keys})

    def slow(without):
        dots = [x @ y for g, x in zip(a.keys, a.rows, strict=True) for h, y in zip(b.keys, b.rows, strict=True)
                if g != h and without not in (g, h)]  # fmt: skip
        return np.mean(dots)

    whole, parts = cosines._product(a, b, keys)
    assert whole == pytest.approx(slow(None))
    np.testing.assert_allclose(parts, [slow(key) for key in keys])


def test_shared_noise_is_no_agreement():
    """Two orthogonal directions measured against the same originals: the plain cosine is drawn up, this one is not."""
    rng, plain, freed = np.random.default_rng(0), [], []
    for _ in range(100):
        shared = rng.standard_normal((60, 40))
        sets = [moves_of([f"{i}" for i in range(60)], 1.5 * np.eye(40)[k] - shared) for k in (0, 1)]
        a, b = (m.rows.mean(0) for m in sets)
        plain.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        freed.append(cosines.cosine(*sets, n_boot=100).value)
    assert np.mean(plain) > 0.15
    assert abs(np.mean(freed)) < 0.06


def test_a_small_set_beside_a_large_one_has_its_own_degrees_of_freedom():
    """Six prompts against a hundred: the spread is that of the six, and so is the t. By simulation .97 of 600 intervals
    hold the cosine; with the quantile of 106 prompts .89 did."""
    rng = np.random.default_rng(0)
    few = moves_of([f"a{i}" for i in range(6)], [1.5, 0] + 0.5 * rng.standard_normal((6, 2)))
    many = moves_of([f"b{i}" for i in range(100)], [1.5, 1.5] + 1e-6 * rng.standard_normal((100, 2)))
    found = cosines.cosine(few, many)
    left = [cosines.cosine(Moves(few.keys[:i] + few.keys[i + 1 :], np.delete(few.rows, i, 0)), many).value
            for i in range(6)]  # fmt: skip
    spread = np.sqrt(105 / 106 * np.square(np.array(left) - found.value).sum())
    assert found.high - found.value == pytest.approx(t.ppf(0.975, 5) * spread, rel=0.05)


def test_reliability_is_that_of_bias_direction():
    pairs = [rl.Pair(f"Say {i}", t.responses[0] + " sorry sorry", t.responses[0]) for i, t in enumerate(groups())]
    direction = bias_direction(model(), pairs)
    terms = {"a": pairs, "b": [rl.Pair(p.prompt, p.rejected, p.chosen) for p in pairs]}
    result = term_conflict(model(), terms, tests=("direction",))
    np.testing.assert_allclose(result.value.reliability, direction.meta["reliability"]["value"], atol=0.03)
    assert cell(result, "a", "b", "direction").value == pytest.approx(-1)
    assert result.value.joint.sel(term="a", other="b") == "in_conflict"


def test_ranks_and_partial_correlation_against_scipy():
    rng = np.random.default_rng(0)
    a, b, length = (rng.integers(0, 5, (20, 6)).astype(float) for _ in range(3))
    ranks = [((rankdata(x, axis=1) - 3.5) / 6).ravel() for x in (a, b, length)]
    np.testing.assert_allclose(scored.centred_ranks(a).ravel(), ranks[0])
    left = [r - ranks[2] * (r @ ranks[2]) / (ranks[2] @ ranks[2]) for r in ranks[:2]]
    want = np.corrcoef(*left)[0, 1]
    assert scored.partial_correlation(scored.rank_moments(a, b, length).sum(0)) == pytest.approx(want)
    assert math.isnan(scored.partial_correlation(scored.rank_moments(a, b, a).sum(0)))


def test_ranks_pass_over_missing_responses():
    np.testing.assert_allclose(scored.centred_ranks(np.array([[3.0, 1, np.nan]])), [[0.25, -0.25, 0]])


def test_gap_by_hand():
    """a = 1, 0, -1 and b = -a: the sum is 0 everywhere and 1 + 1 is lost. Over the six orders of b the largest sums are
    0, 1, 1, 1, 2, 2, so the mean gap is 2 - 7/6 = 5/6."""
    a = np.array([[1.0, 0.0, -1.0]])
    orders = np.array([[o] for o in itertools.permutations(range(3))])
    np.testing.assert_allclose(scored.gaps(a, -a, orders), [[2, 5 / 6, 17 / 36]])
    np.testing.assert_allclose(scored.gaps(a, a, orders), [[0, 5 / 6, 17 / 36]])
    assert scored.conflict_index(scored.gaps(a, -a, orders).sum(0)[:2]) == pytest.approx(1 - 12 / 5)
    assert scored.conflict_index(scored.gaps(a, a, orders).sum(0)[:2]) == 1
    lost = scored.losses(a, np.array([[-1.0, 0.5, 0.5]]))  # sums 0, .5, -.5: the second is best
    assert [x.tolist() for x in lost] == [[1.0], [0.0]]


def test_responses_that_tie_share_what_is_lost():
    """Of opposite terms every response is best for the sum: neither the order of responses nor rounding decides."""
    a = np.array([[3.0, 1.0, -1.0], [0.5, -0.5, np.nan]])
    for one in (a, a[:, [2, 1, 0]]):
        lost = scored.losses(one, -one + 1e-7 * np.arange(3))
        np.testing.assert_allclose(lost, [[2, 0.5], [2, 0.5]], atol=1e-5)


def test_shuffles_come_with_their_inverses_and_leave_gaps_alone():
    there = np.array([[1.0, 2, 3, 4], [1, 2, np.nan, np.nan]])
    orders = scored.shuffles(there)
    assert (np.sort(orders, axis=2) == np.arange(4)).all()
    assert (orders[:, 1, 2:] == [2, 3]).all()
    half = len(orders) // 2
    np.testing.assert_array_equal(
        np.take_along_axis(orders[:half], orders[half:], axis=2), np.broadcast_to(np.arange(4), (half, 2, 4))
    )


@pytest.mark.parametrize(
    ("ends", "label"),
    [
        ((0.3, 0.5), "aligned"),
        ((0.2, 0.5), "undetermined"),
        ((-0.1, 0.15), "orthogonal"),
        ((-0.9, -0.21), "in_conflict"),
        ((-0.5, -0.1), "undetermined"),
    ],
)
def test_labels(ends, label):
    m = Measured(sum(ends) / 2, *ends, n=100)
    told, reason, needed = verdict([m, m], 0.2, ("", math.nan), "")
    assert told == label
    assert (label == "undetermined") == bool(reason) == (not math.isnan(needed))
    other = Measured(0.0, -0.1, 0.1, n=100)
    assert verdict([m, other], 0.2, ("", math.nan), "")[0] == (
        "orthogonal" if label == "orthogonal" else "undetermined"
    )
    assert verdict([m, m], 0.2, ("noise", 40.0), "") == ("undetermined", "noise", 40.0)


def test_number_needed():
    """-.3 with half-width .2 at 100 prompts is .1 from the edge: four times as many."""
    m = Measured(-0.3, -0.5, -0.1, n=100)
    assert verdict([m, m], 0.2, ("", math.nan), "")[2] == pytest.approx(400, abs=1)


# --- planted ------------------------------------------------------------------------------------------------


def test_opposing_terms_are_in_conflict_at_300_and_undetermined_at_10():
    """True cosine -.6, a difference of .15 of the spread of states, the size at which fixed cut-offs say orthogonal."""
    labels = {}
    for n in (10, 300):
        for seed in range(3):
            a, b, pool = planted_terms(n, -0.6, seed=seed)
            table, _ = related([a, b], TESTS, EDGES, pool, 500, 0)
            labels[n, seed] = str(table.joint()[0][0, 1])
    assert [labels[10, seed] for seed in range(3)] == ["undetermined"] * 3
    assert [labels[300, seed] for seed in range(3)].count("in_conflict") >= 2
    assert not {"aligned", "orthogonal"} & set(labels.values())


def test_labels_of_unrelated_terms():
    """True cosine 0, independent scores: at most 5% + 2 SE labels that are neither orthogonal nor undetermined."""
    runs, wrong = 20, dict.fromkeys(TESTS, 0)
    for seed in range(runs):
        a, b, pool = planted_terms((10, 40)[seed % 2], 0.0, seed=seed, shift=0.6, n_pool=40)
        table, _ = related([a, b], TESTS, EDGES, pool, 300, 0)
        for k, test in enumerate(TESTS):
            wrong[test] += table.text["label"][0, 1, k] in ("aligned", "in_conflict")
    assert max(wrong.values()) <= runs * 0.05 + 2 * math.sqrt(runs * 0.05 * 0.95), wrong


def test_prompts_that_all_agree_leave_an_interval_of_some_width():
    """Six prompts of two responses: six coins of .6 fall alike in .05 of all cases, and so may a label be wrong."""
    responses = [rl.Group(f"Say {i}", ["a sea", "a red"]) for i in range(6)]
    x = np.tile([1.0, 0.0], 6) * np.repeat([1, 2, 3, 4, 5, 6], 2)
    a, same, against = (Term(str(k), "scores", None, None, None, k * x, None, None) for k in (1, 2, -1))
    wilson = 2 * 6 / (6 + norm.ppf(0.975) ** 2) - 1
    for b, sign in ((same, 1), (against, -1)):
        table, _ = related([a, b], ("score", "optimisation"), EDGES, pool_of(responses), 300, 0)
        inner = table.cells["low" if sign > 0 else "high"][0, 1]
        np.testing.assert_allclose(table.cells["value"][0, 1, 0], sign)
        np.testing.assert_allclose(inner[0], sign * wilson)
        if sign > 0:  # prompts count by what is at stake in them: fewer than six coins
            np.testing.assert_allclose(table.cells["value"][0, 1, 1], sign)
            assert inner[1] < wilson


def test_the_index_of_few_responses_that_agree_by_chance():
    """Unrelated scores of two responses to six prompts: the jackknife alone gave .12 of them a label."""
    rng, wrong, runs = np.random.default_rng(1), 0, 150
    pool = pool_of([rl.Group(f"Say {i}", ["a sea", "a red"]) for i in range(6)])
    for seed in range(runs):
        a, b = (Term(name, "scores", None, None, None, rng.standard_normal(12), None, None) for name in "ab")
        table, _ = related([a, b], ("optimisation",), EDGES, pool, 300, seed)
        wrong += table.text["label"][0, 1, 0] in ("aligned", "in_conflict")
    assert wrong <= 0.05 * runs


def test_a_few_pairs_beside_a_large_pool_have_their_own_degrees_of_freedom():
    """Six prompts decide a number that no prompt of the pool changes: the t of its interval is that of six. Blocks that
    mixed both sets took the quantile of 60: of an intervention by 6 pairs beside 100, .86 held; now .92 of 200 do."""
    pool = pool_of([rl.Group(f"Say {i}", ["a sea", "a red"]) for i in range(100)])
    values = {f"a {i}": float(i * i) for i in range(6)}

    def parts(without):
        mean = np.mean([x for key, x in values.items() if key not in without])
        return np.tile([mean, 1.0], (100, 1))

    found = _over_prompts(parts, _ratio, pool, (frozenset(values),), 300, 0)
    left = [_ratio(parts(frozenset([key]))[0], frozenset()) for key in values]
    spread = np.sqrt(65 / 66 * np.square(np.array(left) - np.mean(left)).sum())
    assert found.value == pytest.approx(np.mean(list(values.values())))
    assert found.high - found.value == pytest.approx(t.ppf(0.975, 5) * spread, rel=1e-3)


def test_the_seed_is_that_of_every_interval():
    a, b, pool = planted_terms(30, 0.0, seed=0, shift=0.6, n_pool=40)
    ends = [related([a, b], ("intervention",), EDGES, pool, 300, seed)[0].effects["own_effect_low"] for seed in (0, 1)]
    assert (ends[0] != ends[1]).all()


def test_rows_of_a_head():
    result = relation()
    for name, label, sign in (("again", "aligned", 1), ("against", "in_conflict", -1)):
        for test in ("score", "direction"):
            one = cell(result, "help", name, test)
            assert one.value == pytest.approx(sign, abs=1e-4) and one.label == label
        one = cell(result, "help", name, "intervention")
        assert one.value == pytest.approx(sign, abs=1e-3) and one.label == label
        assert cell(result, "help", name, "optimisation").label == label
        assert result.value.joint.sel(term="help", other=name) == label
    assert result.value.loss.sel(term="help", other="again") == pytest.approx(0, abs=1e-5)
    assert result.value.loss.sel(term="help", other="against") > 0.5
    assert result.value.joint.sel(term="help", other="help") == ""


def test_intervention_by_the_head():
    """One natural SD along the mean of best less worst, with the norm run again."""
    rm = rows()["help"]
    texts = [(g.prompt, r) for g in groups() for r in g.responses]
    site = f"L{rm.n_layers - 1}.resid_post"
    h = rl.capture(rm, texts, [site])[site].double()
    by_group = h.reshape(30, 4, -1)
    rewards = rm.readout.reward(h).double().reshape(30, 4)
    best, worst = (by_group[torch.arange(30), pick] for pick in (rewards.argmax(1), rewards.argmin(1)))
    v = (best - worst).mean(0)
    v = v / v.norm()
    along = (by_group @ v) - (by_group @ v).mean(1, keepdim=True)
    moved = h + (along.square().sum() / 90).sqrt() * v
    effects = []
    for name in ("help", "other"):
        readout = rows()[name].readout
        change = (readout.reward(moved) - readout.reward(h)).double().mean()
        spread = readout.reward(h).double().reshape(30, 4)
        effects.append(float(change / ((spread - spread.mean(1, keepdim=True)).square().sum() / 90).sqrt()))
    assert relation().value.own_effect.sel(term="help") == pytest.approx(effects[0], abs=1e-3)
    assert effects[0] > 0.5
    got = cell(relation(), "help", "other", "intervention").value
    assert got == pytest.approx(effects[1] / effects[0], abs=1e-3)


def test_swapping_terms_swaps():
    back = term_conflict(model(), dict(reversed(rows().items())), responses=groups())
    for end in ("value", "low", "high"):
        same = back.dataset[end].sel(term=relation().value.term, other=relation().value.other)
        np.testing.assert_allclose(same, relation().dataset[end], atol=1e-4)
    there = relation().value
    np.testing.assert_array_equal(back.value.label.sel(term=there.term, other=there.other), there.label)


def test_rescaling_a_term_changes_nothing():
    """`again` is `help` in another unit, so both stand to `other` alike."""
    for test in TESTS:
        for end in ("value", "low", "high"):
            one, two = (cell(relation(), name, "other", test)[end] for name in ("help", "again"))
            assert one == pytest.approx(float(two), abs=1e-3), (test, end)


def test_clones_of_prompts_add_no_evidence():
    terms = {name: rows()[name] for name in ("help", "other")}
    once, twice = (term_conflict(model(), terms, responses=g) for g in (groups(), [*groups(), *groups()]))
    for test in ("score", "direction", "intervention"):
        for end in ("value", "low", "high"):
            a, b = (cell(r, "help", "other", test)[end] for r in (once, twice))
            assert a == pytest.approx(float(b), abs=0.03), (test, end)
    wide = [float(r.high.sel(test="optimisation")[0, 1] - r.low.sel(test="optimisation")[0, 1]) for r in (once, twice)]
    assert wide[1] > 0.8 * wide[0]  # the shuffles of a clone are new ones


def test_scores_of_another_model():
    module, tokenizer = tiny_model("gpt2", seed=2)
    other = rl.RewardModel(module, tokenizer, name="gpt2")
    result = term_conflict(
        model(), {"help": rows()["help"], "gpt2": other, "given": other.score_many(groups())}, responses=groups()
    )
    for test in ("direction", "intervention"):
        for name, words in (("gpt2", "two networks"), ("given", "scores and no states")):
            one = cell(result, "help", name, test)
            assert one.label == "undetermined" and words in str(one.reason.item()) and np.isnan(one.value)
    for test in ("score", "optimisation"):
        assert cell(result, "gpt2", "given", test).value == pytest.approx(1)
        one, two = (cell(result, "help", name, test).value for name in ("gpt2", "given"))
        assert one == pytest.approx(float(two))
    assert result.value.joint.sel(term="gpt2", other="given") == "aligned"
    assert result.meta["kinds"] == {"help": "model", "gpt2": "model", "given": "scores"}


def test_pairs_of_one_model(tmp_path):
    """Opposite edits are opposite terms by every test; few or noisy pairs are held back with the number needed."""
    pairs = [rl.Pair(f"Edit {i}", t.responses[0] + " sorry sorry", t.responses[0]) for i, t in enumerate(groups())]
    rng = np.random.default_rng(3)
    noise = [rl.Pair(f"Noise {i}", " ".join(rng.choice(WORDS, 4)), " ".join(rng.choice(WORDS, 4))) for i in range(12)]
    terms = {"sorry": pairs, "plain": [rl.Pair(p.prompt, p.rejected, p.chosen) for p in pairs], "noise": noise}
    result = term_conflict(model(), terms, responses=groups(), n_boot=300)
    for test in TESTS:
        assert cell(result, "sorry", "plain", test).label == "in_conflict", test
    assert result.value.joint.sel(term="plain", other="sorry") == "in_conflict"
    assert result.value.reliability.sel(term="noise") < 0.5
    one = cell(result, "sorry", "noise", "direction")
    assert one.label == "undetermined" and "'noise'" in str(one.reason.item())
    assert result.meta["n"] == {"sorry": 30, "plain": 30, "noise": 12, "responses": 30}
    again = rl.load_result(result.save(tmp_path / "c.nc"))
    assert again.dataset.identical(result.dataset)
    assert "undetermined labels" in repr(result) and result.plot() is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tests": ("colour",)}, "tests=\\('colour',\\)"),
        ({"tests": ()}, "tests=\\(\\)"),
        ({"regions": {"score": 1.5}}, "regions="),
        ({"regions": {"colour": 0.2}}, "regions="),
        ({"responses": None}, "need responses"),
        ({"responses": None, "tests": ("direction",)}, "nothing to score"),
        ({"terms": {"one": None}}, "no two terms"),
        ({"responses": [rl.Group(f"{i}", ["a", "b"]) for i in range(5)]}, "5 different prompts"),
        ({"responses": ["a", "b"]}, "responses were not understood"),
    ],
)
def test_bad_input(change, words):
    given = {"terms": rows(), "responses": groups()} | change
    with pytest.raises(DataError, match=words):
        term_conflict(model(), **given)


def test_terms_that_cannot_be_read():
    pairs = [rl.Pair(f"Edit {i}", "a b", "a") for i in range(8)]
    cases = [
        (pairs[:5], "5 different prompts"),
        ([rl.Pair(f"Edit {i}", "a", "a") for i in range(8)], "moves nothing"),
        ([rl.Pair(g.prompt, "a b", "a") for g in groups()], "30 prompts in its pairs and in the responses"),
        (model().score_many(groups()[:8]), "scores of other responses"),
        (model().score_pairs(pairs), "a Result of score_pairs"),
    ]
    for term, words in cases:
        with pytest.raises(DataError, match=words):
            term_conflict(model(), {"help": rows()["help"], "odd": term}, responses=groups())


def test_terms_that_do_not_go_with_the_responses_are_refused_before_a_network_runs(monkeypatch):
    shared = [rl.Pair(g.prompt, "a b", "a") for g in groups()]
    cases = [(shared, "30 prompts in its pairs"), (model().score_pairs(shared), "a Result of score_pairs")]
    monkeypatch.setattr(model().module, "forward", lambda *_, **__: pytest.fail("a network ran"))
    for term, words in cases:
        with pytest.raises(DataError, match=words):
            term_conflict(model(), {"help": rows()["help"], "odd": iter(term) if term is shared else term},
                          responses=groups())  # fmt: skip
