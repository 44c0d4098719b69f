"""`valuation` on models whose answer is known, and its statistics against hand counts and under their nulls."""

import dataclasses
import functools
import gc
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import binom, pearsonr

import reward_lens as rl
from families import tiny_model
from planted_concepts import drawn, p_values, rates
from reward_lens import stats
from reward_lens.data.concepts import ConceptText, ConceptTexts
from reward_lens.methods.concepts import concept_statistics as over_topics
from reward_lens.methods.concepts.concept_signs import sign_test
from reward_lens.methods.concepts.concept_vectors import concept_vectors
from reward_lens.methods.concepts.valuation import valuation


@pytest.fixture(scope="module", autouse=True)
def quick_adjustments():
    """statsmodels collects garbage at every adjustment, torch's objects included."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


WORDS = {"calm": "sea", "angry": "fire", "proud": "oak", "shy": "mouse", "kind": "bread", "sly": "fox"}
TOPICS = [f"{a}{b}" for a in ("rain", "soup", "tax", "chess") for b in ("", " now", " here", " soon")]
FEW = {"n_null": 12, "n_texts": 6, "n_shuffle": 200, "n_boot": 200, "strengths": (-0.1, 0.1)}


def texts_of(words=WORDS, topics=TOPICS) -> ConceptTexts:
    rows = [ConceptText(c, t, f"{w}, {t} {w}.") for c, w in words.items() for t in topics]
    rows += [ConceptText(c, t, f"{w[::-1].upper()}, {t}?", "negative") for c, w in words.items() for t in topics]
    return ConceptTexts([*rows, *(ConceptText("neutral", t, f"This is about {t}.") for t in topics)])


def swapped(texts, concept) -> ConceptTexts:
    """The same texts with the polarities of one concept exchanged."""
    other = {"positive": "negative", "negative": "positive"}
    return ConceptTexts(
        dataclasses.replace(t, polarity=other[t.polarity]) if t.concept == concept else t for t in texts
    )


@functools.cache
def model(norm: bool = True, scale: float = 1.0) -> rl.RewardModel:
    module, tokenizer = tiny_model("llama", seed=1)
    if not norm:
        module.model.norm = torch.nn.Identity()
    module.score.weight.data *= scale
    return rl.RewardModel(module, tokenizer, name="llama")


@functools.cache
def vectors(norm: bool = True, depth: int = 2, scale: float = 1.0) -> rl.Result:
    return concept_vectors(model(norm, scale), texts_of(), depth=depth)


@functools.cache
def valued(norm: bool = True, depth: int = 2, scale: float = 1.0) -> rl.Result:
    return valuation(model(norm, scale), vectors(norm, depth, scale), texts_of(), **FEW)


# --- the model ----------------------------------------------------------------------------------------------


def test_with_a_linear_read_out_reading_and_writing_agree_exactly():
    """No norm and the last depth: r = w . h + b, so the slope is n |w| cos(v, w) for any vector."""
    rm, result = model(norm=False), valued(norm=False, depth=3)
    w = rm.readout.weight.double().numpy()
    value, direct = result.value, result.value["direct"].values
    v = over_topics.unit(vectors(norm=False, depth=3).mean.values)
    np.testing.assert_allclose(direct, v @ w / np.linalg.norm(w), atol=1e-9)
    for p, pos in enumerate(("response", "reward")):
        per_text = value.sel(pos=pos).values / direct[:, p]
        assert np.ptp(per_text, axis=1).max() < 1e-3 * per_text.max() and (per_text > 0).all()
        for kind in ("direct", "partial"):
            found = result.meta["agreement"][pos][kind]
            assert found["r"] > 1 - 1e-6 and found["null"]["p"] > 0.9, "any direction agrees as well"
            assert found["null"]["median"] > 1 - 1e-6


def test_before_the_last_depth_the_direct_valuation_is_the_slope_of_small_steps():
    rm = model()
    small = valuation(rm, vectors(), texts_of(), **FEW | {"strengths": (-1e-3, 1e-3)})
    for pos in ("response", "reward"):
        direct, causal = small.value["direct"].sel(pos=pos), small.mean.sel(pos=pos)
        np.testing.assert_allclose(causal / direct, float((causal / direct).mean()), rtol=0.05)
        assert small.meta["agreement"][pos]["direct"]["r"] > 0.99
    assert small.meta["u"] == "gradient, averaged over texts"


def test_causal_valuation_is_that_of_steer():
    rm, result = model(), valued()
    v = vectors().mean.sel(concept="proud", pos="reward").values
    texts = {t.topic: t for t in texts_of().neutral}
    for i, topic in enumerate(result.value["unit"].values[:3]):
        pair = rl.Pair(texts[topic].messages, texts[topic].text, "x")
        steered = rl.steer(rm, [pair], v, FEW["strengths"], depth=2, at="final")
        slope = float(steered.value["slope"].sel(side="chosen")[0])
        assert abs(float(result.value.sel(concept="proud", pos="reward")[i]) - slope) < 1e-3
    over = stats.mean_interval(result.value.values, list(result.value["unit"].values), n_boot=200)
    np.testing.assert_allclose(result.low, over.low)


def test_rescaling_the_reward_changes_no_cosine_and_no_p():
    one, ten = valued(), valued(scale=10.0)
    np.testing.assert_allclose(vectors(scale=10.0).mean, vectors().mean, atol=1e-9)
    for name in ("direct", "read", "direct_partial", "common", "auc", "sign_share"):
        np.testing.assert_allclose(ten.value[name], one.value[name], atol=1e-5)
    np.testing.assert_allclose(ten.mean, 10 * one.mean, rtol=1e-3, atol=1e-3)
    for name in ("direct_p", "causal_p", "shuffle_p", "auc_p", "sign_p"):
        np.testing.assert_array_equal(ten.value[name], one.value[name])


def test_permuting_concepts_permutes():
    order = list(WORDS)[::-1]
    texts = ConceptTexts(sorted(texts_of(), key=lambda t: (t.concept != "sly", t.concept)))
    turned = valuation(model(), concept_vectors(model(), texts, depth=2), texts, **FEW).sel(concept=order)
    base = valued().sel(concept=order)
    np.testing.assert_allclose(turned.mean, base.mean, atol=1e-4)
    for name in ("direct", "read", "direct_partial", "causal_partial", "auc", "sign_p", "direct_low"):
        np.testing.assert_allclose(turned.value[name], base.value[name], atol=1e-4)
    for pos in ("response", "reward"):
        r = [one.meta["agreement"][pos]["direct"]["r"] for one in (turned, base)]
        assert abs(r[0] - r[1]) < 1e-4


def test_a_planted_sign_error_is_caught_and_only_that_one():
    rm, right = model(), texts_of()
    base = valued()
    assert (base.value["sign"].sel(pos="response") == "as named").all() and not base.meta["sign_errors"]
    wrong = valuation(rm, vectors(), swapped(right, "shy"), **FEW)
    assert wrong.meta["sign_errors"] and all(name.startswith("shy") for name in wrong.meta["sign_errors"])
    np.testing.assert_allclose(wrong.value["sign_share"].sel(concept="shy"), 1 - base.value["sign_share"].sel(
        concept="shy"))  # fmt: skip
    others = [c for c in WORDS if c != "shy"]
    assert wrong.value["sign"].sel(concept=others).equals(base.value["sign"].sel(concept=others))
    turned = valuation(rm, concept_vectors(rm, swapped(right, "shy"), depth=2), right, **FEW)
    assert "shy (response)" in turned.meta["sign_errors"]
    assert all(name.startswith("shy") for name in turned.meta["sign_errors"])


def test_what_is_steered_on():
    rm = model()
    assert valued().value.sizes == {"text": 6, "concept": 6, "pos": 2}
    pairs = [rl.Pair(f"q {i}", "yes it is", f"no {i}") for i in range(3)] + [rl.Pair("q 0", "again", "and again")]
    on_pairs = valuation(rm, vectors(), texts_of(), on=pairs, **FEW | {"n_null": 0})
    assert on_pairs.value.sizes["text"] == 3 == len(set(on_pairs.value["unit"].values))
    assert np.isnan(on_pairs.low).all(), "three prompts give no interval"
    assert "causal_p" not in on_pairs.value.coords
    none = ConceptTexts([t for t in texts_of() if t.concept != "neutral"])
    assert all(":" in text for text in valuation(rm, vectors(), none, **FEW | {"n_null": 0}).value["text"].values)


def test_saved_with_everything(tmp_path):
    result = valued()
    back = rl.load_result(result.save(tmp_path / "v.nc"))
    assert back.value.equals(result.value) and back.meta == result.meta and repr(result)
    for one in (result, vectors()):
        assert rl.save_chart(one, tmp_path / "chart.svg").stat().st_size > 5000
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model().module.modules())
    again = valuation(model(), vectors(), texts_of(), **FEW)
    assert again.value.identical(result.value) and again.meta == result.meta


def test_too_little_data_gives_no_number():
    texts = texts_of(words={k: WORDS[k] for k in ("calm", "angry", "shy")}, topics=TOPICS[:8])
    rm = model()
    few = valuation(rm, concept_vectors(rm, texts), texts, **FEW)
    found = few.meta["agreement"]["response"]["direct"]
    assert found["low"] is None and found["reason"] == "3 concepts; an interval needs 6"
    assert np.isnan(few.value["sign_p"]).all() and (few.value["sign"] == "undetermined").all()
    assert few.meta["sign_reasons"]["calm (reward)"].startswith("2 topics to test; with vectors of the same topics 12")
    without = ConceptTexts([t for t in texts if t.polarity == "positive"])
    bare = valuation(rm, concept_vectors(rm, texts), without, **FEW)
    assert bare.meta["sign_reasons"]["calm (reward)"] == "no topic has a positive and a negative text"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vectors": "score"}, "not concept vectors.*score_pairs"),
        ({"vectors": "other"}, "not concept vectors.*of other"),
        ({"vectors": "two"}, "too few concepts.*at least 3"),
        ({"n_null": -1}, "n_null=-1"),
        ({"n_texts": 0}, "n_texts=0"),
        ({"strengths": (0.1, 0.1)}, "at least two different"),
        ({"texts": []}, "no concept texts"),
        ({"on": []}, "no concept texts"),
    ],
)
def test_bad_input(changed, message):
    rm = model()
    if "vectors" in changed:
        two = texts_of(words={k: WORDS[k] for k in ("calm", "angry")})
        other = rl.RewardModel(*tiny_model("llama", seed=2), name="other")
        made = {"score": lambda: rm.score_pairs([rl.Pair("a", "b", "c")]),
                "other": lambda: concept_vectors(other, two), "two": lambda: concept_vectors(rm, two)}  # fmt: skip
        changed = {"vectors": made[changed["vectors"]]()}
    given = {"vectors": vectors(), "texts": texts_of()} | FEW | changed
    with pytest.raises(rl.DataError, match=message):
        valuation(rm, given.pop("vectors"), given.pop("texts"), **given)


def test_vectors_read_by_another_objective_are_refused():
    """They come with the rewards of their texts: `read` and the common direction would be of the other objective."""
    rm = rl.RewardModel(*tiny_model("llama", num_labels=2), objective=0, name="rows")
    texts = texts_of(words={k: WORDS[k] for k in ("calm", "angry", "shy")}, topics=TOPICS[:6])
    with pytest.raises(rl.DataError, match="of rows, objective 'LABEL_0'.*of rows, objective 'LABEL_1 - LABEL_0'"):
        valuation(rm.for_objective("1 - 0"), concept_vectors(rm, texts), texts, **FEW)


# --- the statistics -----------------------------------------------------------------------------------------


def test_held_out_auc_of_many_topics_holds_no_array_of_topics_by_topics():
    x = np.random.default_rng(0).normal(0.1, 1, (3, 1500, 2))
    x -= x.mean(0)
    tracemalloc.start()
    _, parts = over_topics.held_out_auc(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 1500**2 * 8 / 2
    for left in (0, 700, 1499):
        expected, _ = over_topics.held_out_auc(np.delete(x, left, axis=1))
        np.testing.assert_allclose(parts[:, left], expected, atol=1e-12)


def test_held_out_auc_by_a_loop():
    x, _, _ = drawn(np.random.default_rng(0), n_concepts=4, n_topics=7, d=5, effect=0.5)

    def slow(x):
        out = []
        for c in range(len(x)):
            shares = []
            for t in range(x.shape[1]):
                v = np.delete(x[c], t, axis=0).mean(0)
                shares.append(np.mean([x[c, t] @ v > x[k, t] @ v for k in range(len(x)) if k != c]))
            out.append(np.mean(shares))
        return np.array(out)

    whole, parts = over_topics.held_out_auc(x)
    np.testing.assert_allclose(whole, slow(x))
    for t in range(7):
        np.testing.assert_allclose(parts[:, t], slow(np.delete(x, t, axis=1)))


def test_shuffles_are_permutations_within_topics():
    """Against arrays that are permuted one topic at a time, and the AUC of each."""
    rng = np.random.default_rng(3)
    x, _, _ = drawn(rng, n_concepts=3, n_topics=6, d=40, effect=1.0)
    u = over_topics.unit(rng.standard_normal(40))
    projections, aucs = over_topics.shuffle_nulls(x, u, 5, np.random.default_rng(8))
    again = np.random.default_rng(8)
    for i in range(5):
        order = np.argsort(again.random((3, 6)), axis=0)
        y = np.array([[x[order[c, t], t] for t in range(6)] for c in range(3)])
        np.testing.assert_allclose(projections[i], y.mean(1) @ u, atol=1e-12)
        np.testing.assert_allclose(aucs[i], over_topics.held_out_auc(y)[0])


def test_the_common_direction_is_that_of_the_others():
    rng = np.random.default_rng(1)
    axis, sides = np.eye(8)[0], np.array([1.0, -1.0, 1.0, -1.0])
    x = sides[:, None, None] * axis + 0.01 * rng.standard_normal((4, 9, 8))
    rewards = np.tile(sides[:, None], (1, 9))
    assert (over_topics.good_minus_bad(x, rewards) @ axis > 0.99).all()
    assert (over_topics.good_minus_bad(x, -rewards) @ axis < -0.99).all()
    turned = over_topics.good_minus_bad(x, np.concatenate([50 - rewards[:1], rewards[1:]]))
    np.testing.assert_allclose(turned[0], over_topics.good_minus_bad(x, rewards)[0])
    assert not over_topics.good_minus_bad(x, np.ones((4, 9))).any()
    assert np.nanmin(over_topics.read_valuation(x, rewards) * sides) > 0.99


def test_the_sign_test_by_hand():
    names = [str(i) for i in range(18)]
    x, ones = np.ones((18, 2)), np.ones((18, 2))
    test = sign_test(ones, names, x, names, np.random.default_rng(0))
    assert (test.n, test.higher, test.share) == (12, 12, 1.0) and test.p == 2.0**-11 == test.smallest_p
    assert sign_test(-ones, names, x, names, np.random.default_rng(0)).share == 0.0
    others = [f"new {i}" for i in range(9)]
    mixed = np.concatenate([ones[:8], -ones[:1]])
    fresh = sign_test(mixed, others, x, names, np.random.default_rng(0))
    assert fresh.n == 9 and abs(fresh.p - 2 * binom.cdf(1, 9, 0.5)) < 1e-12
    assert (fresh.low, fresh.high) == stats.wilson(8, 9)
    few = sign_test(ones[:5], others[:5], x, names, np.random.default_rng(0))
    assert few.n == 5 and np.isnan(few.p) and "5 topics" in few.reason
    tied = sign_test(0 * ones, names, x, names, np.random.default_rng(0))
    assert tied.n == 0 and np.isnan(tied.p)


def test_agreement_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9))
    found = over_topics.correlation(a, np.append(b[:8], np.nan))
    fit = pearsonr(a[:8], b[:8])
    half = 1.959963984540054 / np.sqrt(5)
    assert found["n"] == 8 and abs(found["r"] - fit.statistic) < 1e-12
    assert np.allclose([found["low"], found["high"]], np.tanh(np.arctanh(fit.statistic) + np.array([-half, half])))
    assert over_topics.correlation(a, 2 * a)["low"] is None and over_topics.correlation(a[:5], b[:5])["low"] is None
    assert over_topics.correlation(a, np.ones(9))["reason"] == "one of the two is constant"
    null = over_topics.against_sets(0.3, a, a, 4, 50, rng)
    assert (null["quantile"], null["p"], null["median"]) == (0.0, 1.0, pytest.approx(1.0))
    assert over_topics.against_sets(0.3, a[:4], a[:4], 4, 50, rng)["p"] is None


def test_agreement_of_unrelated_valuations_is_about_zero_and_its_interval_holds_zero():
    rng = np.random.default_rng(5)
    found = [over_topics.correlation(*rng.standard_normal((2, 12))) for _ in range(400)]
    assert abs(np.mean([f["r"] for f in found])) < 0.04
    missed = np.mean([f["low"] > 0 or f["high"] < 0 for f in found])
    assert missed <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_every_test_keeps_its_level_where_labels_say_nothing():
    for name, (share, error) in rates(120).items():
        assert share <= 0.05 + 2 * max(error, np.sqrt(0.05 * 0.95 / 720)), name


def test_power_at_forty_topics():
    found = [p_values(np.random.default_rng(s), n_topics=40, effect=0.7) for s in range(5)]
    for name, power in {"shuffled labels": 0.2, "held-out AUC": 0.9, "sign": 0.9}.items():
        assert np.mean([np.mean(f[name] <= 0.05) for f in found]) >= power, name


def test_clones_of_topics_are_refused_or_add_no_evidence():
    texts = list(texts_of())
    clones = [dataclasses.replace(t, topic=t.topic + " (copy)") for t in texts]
    with pytest.raises(rl.DataError, match="under two topics"):
        ConceptTexts([*texts, *clones])
    twice = valuation(model(), concept_vectors(model(), [*texts, *texts], depth=2), [*texts, *texts], **FEW)
    for name in ("sign_p", "sign_n", "auc", "auc_low", "direct_low", "shuffle_p"):
        np.testing.assert_allclose(twice.value[name], valued().value[name], atol=1e-6)


def test_texts_that_show_nothing_of_the_concepts_are_not_tested():
    neutral = ConceptTexts(texts_of().neutral)
    bare = valuation(model(), vectors(), neutral, **FEW | {"n_null": 0})
    assert np.isnan(bare.value["sign_p"]).all() and len(bare.meta["sign_reasons"]) == 12
