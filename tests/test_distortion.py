"""The distortion index by hand and by an optimiser, Fieller's sets by simulation, and slopes of planted rewards."""

import gc
from fractions import Fraction

import numpy as np
import pytest
import xarray as xr

import reward_lens as rl
from reward_lens import Result, data
from reward_lens.edits import EDITS, TextEdit
from reward_lens.features import text_features
from reward_lens.methods.shared.fieller import fieller
from reward_lens.methods.terms.distortion import distortion_index
from reward_lens.methods.terms.fitted_weights import fitted_weights
from reward_lens.methods.terms.sensitivity import sensitivity_slopes
from ruled import Ruled, noise, text_of

R, W = [2, 1, 0], [1, 1, 1]


def at(result: Result, lam: float, key: str = "value") -> np.ndarray:
    cells = result.value if key == "value" else result.dataset[key]
    return cells.sel(lam=lam).values


def estimates(values: np.ndarray, first: int = 0, **coords) -> Result:
    """Values by prompt, as sensitivity_slopes gives them."""
    n = values.shape[1]
    keys = np.array([f"p{first + i}" for i in range(len(values))], dtype=object)
    of = {"attribute_sd": np.ones(n)} | coords
    array = xr.DataArray(values, dims=("prompt_id", "attribute"), coords={
        "prompt_id": keys, "attribute": np.array([f"a{i}" for i in range(n)], dtype=object),
        **{k: ("attribute", v) for k, v in of.items()},
    })  # fmt: skip
    return Result("slopes", array, unit="reward SD", undefined="a test's gaps")


# The index


def test_the_issues_numbers():
    result = distortion_index(R, W)
    np.testing.assert_allclose(at(result, 1.0), [2, 1, 0], rtol=1e-12)
    np.testing.assert_allclose(at(result, 0.5), [1.5, 1, 0.5], rtol=1e-12)
    assert result.value["lam"].values.tolist() == [0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(at(result, 0.5, "severity"), [0.5, 0, 0.5], rtol=1e-12)
    assert result.low is None and "declared" in result.meta["interval"]["method"]
    assert result.meta["coverage"]["kappa"] == 0 and result.meta["scale"] == 1.0


def test_by_hand_with_exact_fractions():
    r, w, covered, lam = (
        (Fraction(3), Fraction(1), Fraction(5)),
        (Fraction(2), Fraction(1, 2), Fraction(4)),
        (1, 1, 0),
        Fraction(2, 5),
    )
    scale = (w[0] + w[1]) / (r[0] + r[1])
    mixed = [lam * scale * x * c + (1 - lam) * y for x, y, c in zip(r, w, covered, strict=True)]
    index = [m / y for m, y in zip(mixed, w, strict=True)]
    mean = sum(mixed) / sum(w)
    result = distortion_index([3, 1, 5], [2, 0.5, 4], covered=[True, True, False], lam=0.4)
    np.testing.assert_allclose(at(result, 0.4), [float(d) for d in index], rtol=1e-12)
    np.testing.assert_allclose(at(result, 0.4, "over_mean"), [float(d / mean) for d in index], rtol=1e-12)
    np.testing.assert_allclose(float(result.value["mean_index"].sel(lam=0.4)), float(mean), rtol=1e-12)
    assert at(result, 0.4)[2] == pytest.approx(0.6) and at(result, 1.0)[2] == 0
    cover = result.meta["coverage"]
    assert (cover["N"], cover["K"], cover["K_estimated"]) == (3, 2, None)
    assert cover["coverage"] == pytest.approx(2 / 3) and cover["kappa"] == pytest.approx(1 / 3)
    raw = distortion_index([3, 1, 5], [2, 0.5, 4], covered=[True, True, False], normalise=False)
    np.testing.assert_allclose(at(raw, 1.0), [1.5, 2, 0])


def test_d_over_mean_is_the_share_of_effort_that_an_optimiser_finds():
    """Production log, a fixed budget: effort over first-best effort is D / Dbar, found without the formula."""
    from scipy.optimize import minimize

    w, mixed = np.array([1.0, 2.0, 0.5]), distortion_index([1.5, 1, 1.0], [1, 2, 0.5], lam=0.7)
    paid = at(mixed, 0.7) * w

    def best(weights):
        budget = {"type": "eq", "fun": lambda e: e.sum() - 10}
        found = minimize(lambda e: -(weights * np.log(e)).sum(), np.full(3, 10 / 3), constraints=[budget],
                         bounds=[(1e-6, 10)] * 3, options={"ftol": 1e-14})  # fmt: skip
        return found.x

    np.testing.assert_allclose(best(paid) / best(w), at(mixed, 0.7, "over_mean"), rtol=1e-3)


def test_without_a_signal_nothing_is_distorted():
    rng = np.random.default_rng(0)
    result = distortion_index(rng.normal(size=5), rng.uniform(0.1, 3, 5), covered=[1, 1, 0, 1, 0], lam=0)
    np.testing.assert_array_equal(at(result, 0.0), 1)
    np.testing.assert_array_equal(at(result, 0.0, "over_mean"), 1)
    shaky = distortion_index(estimates(rng.normal(size=(20, 3))), estimates(rng.normal(0.01, 1, (20, 3)), 100), lam=0)
    for end in (shaky.value, shaky.low, shaky.high, shaky.dataset["over_mean_low"]):
        np.testing.assert_array_equal(end.sel(lam=0.0), 1)
    assert shaky.meta["unbounded"] == {}


def test_permuted_dimensions_and_rescaled_pay_change_nothing():
    rng = np.random.default_rng(1)
    r, w, order = rng.normal(size=(30, 4)) + [1, 2, 0.5, -1], rng.normal(size=(30, 4)) + 3, [2, 0, 3, 1]
    one = distortion_index(estimates(r), estimates(w))
    names = one.value["dimension"].values[order]
    for other in (
        distortion_index(estimates(r).sel(attribute=names), estimates(w)),
        distortion_index(estimates(17 * r), estimates(w)).sel(dimension=names),
        distortion_index(estimates(r), estimates(0.3 * w)).sel(dimension=names),
    ):
        assert other.value["dimension"].values.tolist() == names.tolist()
        for key in ("value", "low", "high", "over_mean", "over_mean_low", "over_mean_high", "severity_high"):
            np.testing.assert_allclose(other.dataset[key], one.dataset[key].sel(dimension=names), rtol=1e-9)
    plain = distortion_index(np.arange(1, 5), [1, 2, 3, 4], covered=[True, False, True, True])
    turned = distortion_index([4, 3, 2, 1], [4, 3, 2, 1], covered=[True, True, False, True])
    np.testing.assert_allclose(turned.value.values[::-1], plain.value)


def test_full_coverage_by_positive_pay_has_a_mean_of_one():
    result = distortion_index([1, 5, 2], [3, 1, 1])
    np.testing.assert_allclose(result.value["mean_index"], 1)
    np.testing.assert_allclose(result.dataset["over_mean"], result.value)


def test_a_mean_index_that_is_not_above_zero_compares_nothing():
    """r = 3, -5: Dbar is -.5 at lambda 1 after rescaling and .25 at .5. Over it, the dimension that the signal pays for
    came out as -3 and the one it punishes as 5."""
    for r in ([3, -5], estimates(np.random.default_rng(0).normal(size=(30, 2)) * 0.1 + [3, -5])):
        result = distortion_index(r, [1, 1])
        assert result.value["mean_index"].sel(lam=1) < 0 < result.value["mean_index"].sel(lam=0.5)
        keys = [k for k in result.dataset.coords if k.startswith("over_mean")]
        assert len(keys) == (1 if isinstance(r, list) else 3)
        for key in keys:
            assert np.isnan(at(result, 1.0, key)).all() and np.isfinite(at(result, 0.5, key)).all()
        np.testing.assert_allclose(at(result, 0.5, "over_mean").mean(), 1)
        (check,) = (c for c in result.checks if c.name == "lambdas without D / Dbar")
        assert check.gap == 1 and check.note.endswith("at 1")


def test_congruity_is_the_cosine_and_says_whose_it_is():
    cosine = distortion_index([3, 4, 9], [4, 3, 1e-9], covered=[1, 1, 0]).meta["congruity"]
    assert cosine["cosine"] == pytest.approx(24 / 25) and cosine["low"] is None
    assert "not arXiv 2603.28063" in cosine["note"]
    rng = np.random.default_rng(2)
    found = distortion_index(estimates(rng.normal(1, 1, (40, 3))), W).meta["congruity"]
    assert found["low"] < found["cosine"] < found["high"] <= 1


def test_results_and_their_unbounded_intervals_survive_saving_and_drawing(tmp_path):
    rng = np.random.default_rng(3)
    result = distortion_index(estimates(rng.normal(1, 1, (12, 3))), estimates(rng.normal([2, 0, 3], 1, (12, 3)), 50))
    assert np.isinf(result.low.sel(dimension="a1", lam=1.0))
    back = rl.load_result(result.save(tmp_path / "d.nc"))
    xr.testing.assert_identical(back.dataset, result.dataset)
    assert result.plot().to_dict()["config"] and "a1" in repr(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(r=R, w=[1, 0, 1]), "above 0"),
        (dict(r=R, w=[1, -1, 1]), "above 0"),
        (dict(r=R, w=[1, 1]), "shape"),
        (dict(r=[1, np.nan, 1], w=W), "finite"),
        (dict(r=["a", "b", "c"], w=W), "vector"),
        (dict(r=[1], w=[1]), "two dimensions"),
        (dict(r=R, w=W, lam=1.5), "lam from 0 to 1"),
        (dict(r=R, w=W, lam=float("nan")), "lam from 0 to 1"),
        (dict(r=[0, 0, 0], w=W), "normalise=False"),
        (dict(r=R, w=W, covered=[True]), "booleans"),
        (dict(r=R, w=W, covered=[0.5, 1, 1]), "booleans"),
        (dict(r=R, w=W, names=["a", "a", "b"]), "names"),
        (dict(r=R, w=W, level=1.0), "level"),
        (dict(r=estimates(np.ones((6, 3))), w=W, names=["x", "y", "z"]), "names"),
        (dict(r=estimates(np.full((6, 3), np.nan)), w=W), "no slope"),
        (dict(r=distortion_index(R, W), w=W), "sensitivity_slopes"),
    ],
)
def test_bad_input(arguments, said):
    with pytest.raises(rl.DataError, match=said):
        distortion_index(**arguments)


def test_what_the_signal_does_not_see_needs_no_slope():
    values = np.random.default_rng(4).normal(2, 1, (10, 3))
    values[:, 2] = np.nan
    result = distortion_index(estimates(values), W, covered=[True, True, False])
    assert at(result, 0.25)[2] == 0.75 and float(result.low.sel(lam=0.25)[2]) == 0.75
    none = distortion_index(R, W, covered=[False] * 3)
    np.testing.assert_allclose(at(none, 0.75), 0.25)
    assert np.isnan(at(none, 1.0, "over_mean")).all() and none.meta["coverage"]["kappa"] == 1


# Intervals


def test_fieller_by_hand():
    """(D - 2)^2 terms: top 4, bottom 2, no covariance, t^2 v = 1 for both: 3 D^2 - 16 D + 15 <= 0."""
    from scipy.stats import t

    v = 1 / t.ppf(0.975, 9) ** 2
    found = fieller(4, 2, v, v, 0, 9)
    np.testing.assert_allclose([found.low, found.high], [(8 - 19**0.5) / 3, (8 + 19**0.5) / 3])
    outside = fieller(4, 0.5, v, v, 0, 9)  # -.75 D^2 - 4 D + 15 <= 0
    assert np.isinf(outside.low) and np.isinf(outside.high)
    np.testing.assert_allclose([outside.gap_low, outside.gap_high], [(-4 - 61**0.5) / 1.5, (-4 + 61**0.5) / 1.5])
    assert not outside.contains(0) and outside.contains(8)
    anything = fieller(0.5, 0.5, v, v, 0, 9)
    assert np.isinf(anything.high) and np.isnan(anything.gap_low) and anything.contains(1e9)
    assert np.isnan(fieller(1, 1, 1, 1, 0, np.nan).low)


@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("bottom", [0.0, 0.5, 2.0, 10.0])
def test_fieller_covers_near_and_far_from_zero(bottom, correlation):
    """Means of n = 12, the bottom so many standard errors from zero; the ratio is 1.5 (any, at zero)."""
    rng, runs, n = np.random.default_rng(5), 4000, 12
    top, low = 1.5 * bottom / np.sqrt(n), bottom / np.sqrt(n)
    draws = rng.multivariate_normal([top, low], [[1, correlation], [correlation, 1]], (runs, n))
    means, parts = draws.mean(1), draws - draws.mean(1, keepdims=True)
    v = (parts**2).sum(1) / (n * (n - 1))
    c = (parts[..., 0] * parts[..., 1]).sum(1) / (n * (n - 1))
    found = fieller(means[:, 0], means[:, 1], v[:, 0], v[:, 1], c, n - 1)
    covered = found.contains(1.5).mean()
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / runs)
    assert found.unbounded.mean() > 0.8 if bottom < 1 else found.unbounded.mean() < 0.8


def test_the_interval_is_fiellers_with_the_prompts_that_both_have():
    """One covered dimension of r and w from the same prompts, raw: the set of 1.96-free algebra, by a root finder."""
    from scipy.optimize import brentq
    from scipy.stats import t

    rng = np.random.default_rng(6)
    r = rng.normal(2, 1, (15, 2))
    w = 0.8 * r + rng.normal(1.5, 0.5, (15, 2))
    result = distortion_index(estimates(r), estimates(w), normalise=False)

    def beyond(ratio: float) -> float:
        """|t| of the mean of r - D w, less the quantile: D is in the interval where it is below 0."""
        z = r[:, 0] - ratio * w[:, 0]
        return abs(z.mean()) / (z.std(ddof=1) / 15**0.5) - t.ppf(0.975, 14)

    centre = r[:, 0].mean() / w[:, 0].mean()
    np.testing.assert_allclose(float(result.value.sel(lam=1.0)[0]), centre)
    ends = [brentq(beyond, centre - 2, centre), brentq(beyond, centre, centre + 2)]
    np.testing.assert_allclose([float(result.low.sel(lam=1.0)[0]), float(result.high.sel(lam=1.0)[0])], ends)
    np.testing.assert_allclose(float(result.high.sel(lam=0.25)[0]), 0.25 * ends[1] + 0.75)
    apart = distortion_index(estimates(r), estimates(w, 500), normalise=False)
    assert (apart.high - apart.low).sel(lam=1.0)[0] > ends[1] - ends[0]  # a positive covariance narrows
    assert "15 shared" in result.meta["interval"]["method"] and "0 shared" in apart.meta["interval"]["method"]


def test_a_weight_near_zero_is_flagged_and_kept():
    rng = np.random.default_rng(7)
    w = rng.normal(0, 1, (20, 4))
    w += np.array([2, 0.01, 3, -2]) - w.mean(0)
    result = distortion_index(estimates(rng.normal(1, 1, (20, 4))), estimates(w, 90))
    assert result.value["weight"].values.tolist() == ["", "interval includes 0", "", "below 0"]
    assert np.isinf(result.high.sel(dimension="a1")).all() and np.isfinite(result.high.sel(dimension="a0")).all()
    assert list(result.meta["unbounded"]) == ["a1"] and "includes 0" in result.meta["unbounded"]["a1"]
    assert float(result.dataset["severity_low"].sel(dimension="a1", lam=1.0)) == 0
    assert np.isinf(result.dataset["severity_high"].sel(dimension="a1", lam=1.0))


def test_few_prompts_give_no_interval():
    rng = np.random.default_rng(8)
    result = distortion_index(estimates(rng.normal(2, 1, (5, 3))), W)
    assert np.isnan(result.low).all() and np.isfinite(result.value).all()
    assert "5 prompts" in result.meta["interval"]["method"]
    few = distortion_index(R, estimates(rng.normal(2, 1, (3, 3))), normalise=False)
    assert few.value["weight"].values.tolist() == ["no interval"] * 3


def coverage_of_index(runs: int, n: int, w, seed: int, skewed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Of D and D / Dbar (lambda .5), shares of normalised intervals that hold the truth, [dimension]."""
    rng, r, w = np.random.default_rng(seed), np.array([1.0, 2.0, -0.5]), np.asarray(w, dtype=float)
    true = distortion_index(r, w, lam=0.5)
    held = np.zeros((2, 3))
    for _ in range(runs):
        both = rng.standard_normal((n, 6))
        if skewed:
            both = (np.exp(both) - np.exp(0.5)) / np.sqrt(np.e**2 - np.e)
        both[:, 3:] += 0.5 * both[:, :3]
        result = distortion_index(estimates(r + both[:, :3]), estimates(w + both[:, 3:]), lam=0.5).dataset.sel(lam=0.5)
        for k, (low, high, key) in enumerate(
            (("low", "high", "value"), ("over_mean_low", "over_mean_high", "over_mean"))
        ):
            truth = at(true, 0.5, key)
            held[k] += (result[low].values <= truth) & (truth <= result[high].values)
    return held[0] / runs, held[1] / runs


def test_normalised_intervals_hold_the_truth():
    """The scale sum |w| / sum |r| is estimated too; w of the last dimension is near zero (1.2 standard errors)."""
    index, over = coverage_of_index(150, 40, [1.5, 1.0, 0.2], seed=9)
    assert (index > 0.95 - 3.5 * np.sqrt(0.95 * 0.05 / 150)).all(), index
    assert (over > 0.95 - 3.5 * np.sqrt(0.95 * 0.05 / 150)).all(), over


def test_k_counts_the_slopes_that_holm_lets_through():
    p = np.array([0.001, 0.2, 0.06])
    result = distortion_index(estimates(np.ones((8, 3)), p_holm=p), W)
    assert result.meta["coverage"]["K_estimated"] == 1 and result.meta["coverage"]["paid_for"] == ["a0"]
    wide = distortion_index(estimates(np.ones((8, 3)), p_holm=p), W, level=0.7)
    assert wide.meta["coverage"]["K_estimated"] == 3
    unseen = distortion_index(estimates(np.ones((8, 3)), p_holm=p), W, covered=[0, 1, 1])
    assert unseen.meta["coverage"]["K_estimated"] == 0 and unseen.meta["coverage"]["paid_for"] == []
    assert unseen.meta["coverage"]["reason"] == ""
    some = distortion_index(estimates(np.ones((8, 3)), p_holm=np.array([0.001, np.nan, 0.2])), W)
    assert some.meta["coverage"]["K_estimated"] == 1 and some.meta["coverage"]["reason"].endswith("6 prompts: a1")


def test_weights_in_another_unit_are_put_into_that_of_the_slopes():
    rng = np.random.default_rng(10)
    r, w = rng.normal(1, 1, (9, 2)), rng.normal(2, 1, (9, 2))
    one = distortion_index(estimates(r), estimates(w))
    other = distortion_index(estimates(r), estimates(w * [2.0, 5.0], attribute_sd=np.array([2.0, 5.0])))
    np.testing.assert_allclose(other.value, one.value)
    np.testing.assert_allclose(other.high, one.high)


# Slopes


@pytest.fixture(scope="module")
def pairs():
    marked = rl.Pair("How is it?", "It is **so**! And so! It has been.", "It is so. And it stays so.", id="marked")
    return data.Pairs([marked, *rl.load_pairs("demo")[:23]])


EDITED = {"words": ["pad"], "exclamation_marks": ["exclaim"], "bold_spans": ["add_bold"]}


def test_a_reward_a_word_has_that_slope(pairs):
    rm = Ruled(lambda t: 0.3 * text_features("q", text_of(t))["words"])
    result = sensitivity_slopes(rm, EDITED, pairs)
    words = result.dataset.sel(attribute="words")
    np.testing.assert_allclose(float(words["per_unit"]), 0.3, rtol=1e-4)
    np.testing.assert_allclose(words["value"].dropna("prompt_id"), float(words["mean"]), rtol=1e-3)
    size = 0.3 * float(words["attribute_sd"]) / result.meta["reward_sd"]
    np.testing.assert_allclose(float(words["mean"]), size, rtol=1e-4)
    assert float(words["p_holm"]) < 0.01 and int(words["n_prompts"]) == len(pairs)
    assert float(result.mean.sel(attribute="exclamation_marks")) == pytest.approx(0, abs=1e-6)
    assert float(result.value["p"].sel(attribute="exclamation_marks")) == 1
    assert result.meta["off_target"]["words"]["exclamation_marks"] == 0
    everything = {p.prompt_key + r: text_features("q", r)["words"] for p in pairs for r in p.responses}
    np.testing.assert_allclose(float(words["attribute_sd"]), np.std(list(everything.values()), ddof=1))
    index = distortion_index(result, [1, 1, 1])
    assert index.meta["coverage"]["K_estimated"] == 1 and index.meta["coverage"]["paid_for"] == ["words"]
    np.testing.assert_allclose(at(index, 1.0), [3, 0, 0], atol=1e-4)


def test_slopes_do_not_depend_on_the_rewards_unit_nor_on_clones(pairs):
    def rule(t):
        return 0.1 * len(t.response) + noise(3)(t)

    pairs = pairs[:10]
    one = sensitivity_slopes(Ruled(rule), EDITED, pairs)
    scaled = sensitivity_slopes(Ruled(lambda t: 40 * rule(t) + 7), EDITED, pairs)
    np.testing.assert_allclose(scaled.value, one.value, atol=1e-4)
    cloned = sensitivity_slopes(Ruled(rule), EDITED, [*pairs, *pairs, *pairs[:3]])
    for key in ("value", "mean", "low", "high", "p", "p_holm", "n_prompts", "n_edits", "attribute_sd"):
        np.testing.assert_allclose(cloned.dataset[key], one.dataset[key], rtol=1e-9)


def test_a_rough_edit_is_compared_with_the_text_edited_back(pairs):
    """The edit adds a star and drops all spaces; editing back takes the star away and leaves the spaces dropped."""
    star = TextEdit("star", "a star", lambda _, r: r.replace(" ", "") + "*", lambda _, e: e.removesuffix("*"))
    blunt = TextEdit("blunt", "a star, no way back", lambda _, r: r.replace(" ", "") + "*")
    rm = Ruled(lambda t: 1.0 * text_of(t).count("*") + 5.0 * text_of(t).count(" ") + 0.01 * noise(1)(t))

    def stars(_prompt: str, response: str) -> float:
        return float(response.count("*"))

    starred = [rl.Pair(f"q {i}", f"one two {'* ' * i}", f"three four {i}") for i in range(8)]
    result = sensitivity_slopes(rm, {"stars": (stars, [star]), "blunt": (stars, blunt)}, starred)
    assert result.value["contrast"].values.tolist() == ["double", "single"]
    assert float(result.value["per_unit"].sel(attribute="stars")) == pytest.approx(1, abs=0.05)
    assert float(result.value["per_unit"].sel(attribute="blunt")) < -4
    np.testing.assert_allclose(result.value["attribute_sd"], result.value["attribute_sd"][0])


def test_graded_edits_give_the_least_squares_slope():
    def marks(_prompt: str, response: str) -> float:
        return float(response.count("!"))

    def grade(k: int) -> TextEdit:
        return TextEdit(f"m{k}", "marks", lambda _, r: r + "!" * k, lambda _, e: e[:-k], exact=True)

    table = {0: 0.0, 1: 3.0, 2: 1.0, 4: 2.0}
    rm = Ruled(lambda t: table[text_of(t).count("!")] + 10.0 * ("b" in text_of(t)))
    pairs = [rl.Pair(f"q{i}", f"b {i}", f"c {i}") for i in range(6)]
    pool = [rl.Pair("pool", "b !", "c !!!!")]
    result = sensitivity_slopes(rm, {"marks": (marks, [grade(1), grade(2), grade(4)])}, pairs, pool)
    by_hand = (1 * 3 + 2 * 1 + 4 * 2) / (1 + 4 + 16)  # through the unedited response
    np.testing.assert_allclose(result.value["per_unit"], by_hand, rtol=1e-5)
    assert int(result.value["n_edits"][0]) == 36
    np.testing.assert_allclose(result.value["attribute_sd"], np.std([1, 4], ddof=1))
    np.testing.assert_allclose(result.meta["reward_sd"], np.std([13, 2], ddof=1))


def test_few_prompts_give_no_interval_of_a_slope(pairs):
    result = sensitivity_slopes(Ruled(noise(4)), EDITED, pairs[:5])
    assert np.isnan(result.low).all() and np.isnan(result.value["p"]).all() and np.isfinite(result.mean).all()
    assert result.meta["prompts_needed"]["n"] >= 34 and result.meta["prompts_needed"]["edits_recommended"] == 100
    assert distortion_index(result, W).meta["coverage"]["K_estimated"] is None


def marked(mark: str) -> tuple:
    """An attribute, the number of these marks, and the edit that adds one."""
    add = TextEdit(mark, "a mark", lambda _, r: f"{r} {mark}", lambda _, e: e.removesuffix(f" {mark}"), exact=True)
    return (lambda _, r: float(r.count(mark)), add)


MARKED = {"stars": marked("*"), "dashes": marked("-"), "bars": marked("|")}
PLAIN = [rl.Pair(f"q {i}", f"yes * {i}", f"no - | {i}") for i in range(10)]


def false_k(runs: int, skewed: bool, pairs=PLAIN, edits=MARKED) -> np.ndarray:
    """K in runs whose rewards are noise of the text: any but 0 is false."""
    rm, found = Ruled(noise(0)), []
    gc.collect()
    gc.freeze()  # statsmodels collects at every adjustment, torch's objects included
    for salt in range(runs):
        rm.rule = noise(salt, skewed)
        slopes = sensitivity_slopes(rm, edits, pairs, n_boot=50)
        found.append(distortion_index(slopes, np.ones(len(edits))).meta["coverage"]["K_estimated"])
    gc.unfreeze()
    return np.array(found)


@pytest.mark.parametrize("skewed", [False, True])
def test_noise_pays_for_nothing(skewed):
    wrong = (false_k(60, skewed) > 0).mean()
    assert wrong <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 60)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({}, "at least one"),
        ({"niceness": ["pad"]}, "TEXT|features|words, characters"),
        ({"words": ["padd"]}, "edit called"),
        ({"words": (len, ["pad"], 3)}, "tuple"),
        ({"headings": ["exclaim"]}, "not changed|no spread"),
        ({"constant": (lambda p, r: 1.0, ["pad"])}, "no spread"),
        ({"broken": (lambda p, r: "many", ["pad"])}, "no number"),
        ({"nan": (lambda p, r: float("nan"), ["pad"])}, "no number"),
        ({"first": (lambda p, r: float(len(r.split()[0])), ["pad"])}, "not changed"),
    ],
)
def test_bad_edits(pairs, edits, said):
    with pytest.raises(rl.DataError, match=said):
        sensitivity_slopes(Ruled(noise(1)), edits, pairs[:6])


def test_rewards_without_spread_have_no_unit(pairs):
    with pytest.raises(rl.DataError, match="spread"):
        sensitivity_slopes(Ruled(lambda t: 1.0), EDITED, pairs[:6])


# Weights


def preferences(n: int, weights, seed: int) -> list[rl.Pair]:
    """Responses of words and marks, the preferred one drawn from the model that the weights are of."""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        words, marks = rng.integers(1, 9, 2), rng.integers(0, 5, 2)
        texts = [" ".join(["word"] * a) + "!" * b + f" x{j}" for j, (a, b) in enumerate(zip(words, marks, strict=True))]
        odds = weights[0] * (words[0] - words[1]) + weights[1] * (marks[0] - marks[1])
        first = int(rng.random() < 1 / (1 + np.exp(-odds)))
        out.append(rl.Pair(f"q {i}", texts[1 - first], texts[first]))
    return out


def test_fitted_weights_find_those_that_made_the_labels():
    pairs = preferences(600, [0.4, 0.8], 11)
    result = fitted_weights(pairs, ["words", "exclamation_marks"])
    raw = result.dataset[["low", "high", "mean"]] / result.value["attribute_sd"]
    for attribute, true in (("words", 0.4), ("exclamation_marks", 0.8)):
        one = raw.sel(attribute=attribute)
        assert float(one["low"]) < true < float(one["high"]) < true + 0.4
    np.testing.assert_allclose(result.value.mean("prompt_id"), result.mean, rtol=1e-6)
    # the spread of the prompts' values is the clustered error
    n = result.value.sizes["prompt_id"]
    error = result.value.std("prompt_id", ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(error, (result.high - result.low) / 2 / 1.964, rtol=0.01)
    index = distortion_index([1, 1], result)
    assert np.isfinite(index.high).all() and index.value["weight"].values.tolist() == ["", ""]


def test_fitted_weights_are_statsmodels_logit_on_a_random_order():
    """The order of a pair says nothing: one fit with each pair turned at random and no constant, as an oracle."""
    import statsmodels.api as sm

    pairs = preferences(120, [0.4, 0.8], 12)
    result = fitted_weights(pairs, ["words", "exclamation_marks"])
    d = np.array([[text_features("q", p.chosen)[k] - text_features("q", p.rejected)[k]
                   for k in ("words", "exclamation_marks")] for p in pairs])  # fmt: skip
    turn = np.random.default_rng(0).choice([-1, 1], len(d))
    fit = sm.Logit((turn > 0).astype(float), d * turn[:, None]).fit(disp=0)
    np.testing.assert_allclose(result.mean / result.value["attribute_sd"], fit.params, rtol=1e-5)


def test_clones_add_no_evidence_to_weights():
    pairs = preferences(80, [0.4, 0.8], 13)
    one, twice = (fitted_weights(some, ["words", "exclamation_marks"]) for some in (pairs, [*pairs, *pairs]))
    np.testing.assert_allclose(twice.mean, one.mean, rtol=1e-6)
    np.testing.assert_allclose(twice.high - twice.low, one.high - one.low, rtol=0.02)
    np.testing.assert_allclose(twice.value, one.value, rtol=1e-5)


def test_labels_that_determine_no_weights_are_refused(pairs):
    with pytest.raises(rl.DataError, match="separable"):
        fitted_weights([rl.Pair(f"q{i}", "a b c", "a") for i in range(8)], ["words"])
    with pytest.raises(rl.DataError, match="linear function"):
        twice = {"words": "words", "doubled": lambda p, r: 2 * text_features(p, r)["words"]}
        fitted_weights(preferences(40, [0.4, 0.8], 14), twice)
    with pytest.raises(rl.DataError, match="exclamation_marks: one prompt alone"):
        many = [
            rl.Pair(p.prompt, p.chosen.replace("!", ""), p.rejected.replace("!", ""))
            for p in preferences(40, [1, 0], 16)
        ]
        fitted_weights([*many, *(rl.Pair("q", "a" + "!" * i, "b" + "!" * (3 - i)) for i in range(4))],
                       ["words", "exclamation_marks"])  # fmt: skip
    with pytest.raises(rl.DataError, match="names"):
        fitted_weights(pairs, "words")


def test_slopes_against_weights_of_one_pool():
    """A model that pays 1 a word and nothing for marks, gold labels that pay for both."""
    gold = preferences(300, [0.4, 0.8], 15)
    names = {"words": ["pad_1", "pad_2"], "exclamation_marks": (None, ["exclaim"])}
    texts = [rl.Pair(p.prompt, f"It is so. {p.chosen}.", f"It is so. {p.rejected}.") for p in gold[:40]]
    rm = Ruled(lambda t: 1.0 * text_features("q", text_of(t))["words"] + 0.01 * noise(5)(t))
    slopes = sensitivity_slopes(rm, names, texts, pool=gold[:100])
    weights = fitted_weights(gold, list(names), pool=gold[:100])
    index = distortion_index(slopes, weights)
    words, marks = at(index, 1.0)
    assert abs(marks) < 0.05 and words > 1.2 and (index.low <= index.value).all() and (index.value <= index.high).all()
    assert index.meta["coverage"]["K_estimated"] == 1 and index.meta["w"]["method"] == "fitted_weights"
    assert set(EDITS) >= {"pad_1", "exclaim"}
