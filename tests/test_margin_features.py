"""What margins go with, on rewards that are a known function of the text."""

import numpy as np
import pytest

import reward_lens as rl
from ruled import Ruled, noise, text_of


def drawn(n: int, seed: int = 0) -> list[rl.Pair]:
    """Pairs whose responses differ in length and in bold spans, independently."""
    rng = np.random.default_rng(seed)
    words = "the sea is old and red trees run on".split()

    def response() -> str:
        text = " ".join(rng.choice(words, rng.integers(4, 30)))
        return text + " **so**" * int(rng.integers(0, 4))

    return [rl.Pair(f"q {i}", response(), response(), id=str(i)) for i in range(n)]


def bold(tokens) -> int:
    return text_of(tokens).count("**so**")


def test_a_rule_about_bold_is_found_with_tokens_held_fixed():
    pairs = drawn(60)
    rm = Ruled(lambda t: 0.8 * bold(t) + 0.05 * len(t.response) + 0.1 * noise(1)(t))
    result = rl.margin_features(rm, pairs)
    row = result.sel(feature="bold_spans")
    sd = float(row.value["sd"])
    assert float(row.low) <= 0.8 * sd <= float(row.high) and float(row.value["p_holm"]) < 0.001
    tokens = result.sel(feature="tokens")
    assert float(tokens.value) > 0
    assert np.isnan(result.value.sel(feature="headings"))  # never differs
    scores = rm.score_pairs(pairs)
    assert result.value.identical(rl.margin_features(rm, pairs, scores=scores).value)
    with pytest.raises(rl.DataError, match="not of these inputs"):
        rl.margin_features(rm, pairs[:9], scores=scores)
    with pytest.raises(rl.DataError, match="not known"):
        rl.margin_features(rm, pairs, ["boldness"])


def test_few_prompts_and_flat_rewards():
    few = rl.margin_features(Ruled(noise(1)), drawn(5))
    assert np.isnan(few.low.values).all() and np.isnan(few.value["p"].values).all()
    flat = rl.margin_features(Ruled(lambda t: 1.0), drawn(20))
    assert not np.isinf(flat.value.values).any() and np.nanmax(np.abs(flat.value.values)) < 1e-9


def test_a_feature_that_differs_in_few_prompts_has_no_interval():
    pairs = [rl.Pair(f"q {i}", "## A\n\nyes" if i < 5 else f"yes {i}", "no and no", id=str(i)) for i in range(40)]
    row = rl.margin_features(Ruled(noise(1)), pairs).sel(feature="headings")
    assert np.isfinite(row.value) and int(row.value["n_differ"]) == 5
    assert np.isnan(row.low) and np.isnan(row.value["p"]) and np.isnan(row.value["p_holm"])


def test_margin_debug_splits_the_margin_out_of_sample():
    pairs = drawn(80)
    rm = Ruled(lambda t: 0.8 * bold(t) + 0.02 * noise(3)(t))
    result = rl.margin_debug(rm, pairs, ["bold_spans"])
    parts = result.value
    margin, explained, rest = (parts.sel(part=p).values for p in ("margin", "explained", "rest"))
    np.testing.assert_allclose(explained + rest, margin, atol=1e-6)
    assert result.meta["r_squared"] > 0.95
    differ = np.array([bold_of(p.chosen) != bold_of(p.rejected) for p in pairs])
    assert parts["share"].values[differ].mean() > 0.9
    assert sorted(parts["against_label"].values.tolist()) == list(range(80))
    assert int(rest.argmin()) == int(parts["against_label"].values.argmin())
    flipped = parts["flips"].values == 1
    assert (np.sign(margin[flipped]) != np.sign(rest[flipped])).all()


def test_margin_debug_of_noise_explains_nothing_and_few_prompts_are_refused(tmp_path):
    result = rl.margin_debug(Ruled(noise(4)), drawn(60), ["bold_spans", "words"])
    assert result.meta["r_squared"] < 0.1
    path = tmp_path / "debug.parquet"
    result.to_frame().to_parquet(path)
    assert path.stat().st_size > 0
    with pytest.raises(rl.DataError, match="at least 20 prompts"):
        rl.margin_debug(Ruled(noise(4)), drawn(12), ["bold_spans"])


def bold_of(response: str) -> int:
    return response.count("**so**")
