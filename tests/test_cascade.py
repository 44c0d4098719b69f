"""`detect_cascade`: moments against resampling, and labels in runs whose truth is planted."""

import gc

import numpy as np
import pytest

from checkpoint_runs import run as simulated
from reward_lens import DataError
from reward_lens.methods.training.cascade import _broad, detect_cascade
from reward_lens.methods.training.change_point import block_orders, joint_change, rise_gains
from reward_lens.methods.training.rate_shift import Shift, block_length, carried_forward, period_means, sign_consistency
from reward_lens.result import load_result

EPISODES = np.full(20, 200)


@pytest.fixture(scope="module", autouse=True)
def frozen_objects():
    """Holm's adjustment in statsmodels collects garbage at every call; what was there before need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def by_hand(change: dict | None = None, **settings):
    """Ten steps: hacking 0, ..., 0, 50 from step 5 on, of 100; a rises from 10 to 30 of 100, b stays at 10."""
    given = {
        "steps": range(10), "hack_counts": [0] * 5 + [50] * 5, "n_episodes": 100,
        "dims": {"a": ([10] * 5 + [30] * 5, 100), "b": ([10] * 10, 100)},
    }  # fmt: skip
    return detect_cascade(**(given | (change or {})), **settings)


def labels(n_runs: int, control: str | None = None, **settings) -> list[str | None]:
    out = []
    for seed in range(n_runs):
        rest = {k: v for k, v in settings.items() if k not in ("hacking", "dims")}
        other = None if control is None else simulated(1000 + seed, "flat", control, **rest)
        out.append(detect_cascade(**simulated(seed, **settings), control=other, n_permutations=199).meta["label"])
    return out


# Changes


def test_changes_by_hand():
    result = by_hand()
    assert result.value.dims == ("dimension", "measure")
    assert result.dataset["dimension"].values.tolist() == ["hacking", "a", "b", "score"]
    expected = {"hacking": (0, 0.5, 0.5), "a": (0.1, 0.3, 0.2), "b": (0.1, 0.1, 0), "score": (0.1, 0.2, 0.1)}
    for name, numbers in expected.items():
        np.testing.assert_allclose(result.value.sel(dimension=name)[:3], numbers, atol=1e-12)
    assert result.meta["onset"]["step"] == 5
    assert np.isnan(result.low.sel(dimension="hacking")).all()
    assert "no control run" in result.checks[-1].note


def test_the_mean_after_leaves_the_rise_out():
    rising = {"dims": {"a": ([10] * 5 + [15, 25, 30, 30, 30], 100), "b": ([10] * 10, 100)}}
    result = by_hand(rising)
    assert result.meta["settled_from"] == 7
    np.testing.assert_allclose(result.value.sel(dimension="a", measure="after"), 0.3)
    np.testing.assert_allclose(by_hand(rising, settle=0.0).value.sel(dimension="a", measure="after"), 0.26)


def test_p_that_more_than_half_rise():
    p = np.array([0.5, 0.001, 0.01, 0.9, 0.002, 0.004])
    assert _broad(p) == pytest.approx(3 * 0.01)  # four of six: 6 - 4 + 1 times the fourth smallest
    assert _broad(p[:2]) == 0.5 and _broad(p[1:2]) == 1.0


def test_rates_that_never_vary_get_the_variance_of_counting():
    (zeros, _) = period_means(np.zeros((1, 8), int), np.full((1, 8), 50))
    p = 0.5 / 401
    np.testing.assert_allclose(zeros.variance, p * (1 - p) / 400, rtol=1e-12)


def test_the_variance_is_the_moving_block_bootstraps_made_unbiased():
    rng = np.random.default_rng(1)
    counts = rng.binomial(200, np.linspace(0.2, 0.6, 12))[None]
    mean, _ = period_means(counts, np.full((1, 12), 200))
    b, rates = block_length(12), counts[0] / 200
    starts = rng.integers(0, 12 - b + 1, (40000, 12 // b))
    resampled = rates[starts[..., None] + np.arange(b)].mean((1, 2))
    spread = ((resampled - rates.mean()) ** 2).mean()
    centred = ((resampled.mean() - rates.mean()) ** 2) * (12 / b - 1)  # the bootstrap's own centre is not the mean
    np.testing.assert_allclose(mean.variance, (spread + centred) * 12 / (12 - b), rtol=0.03)
    assert mean.df == 1.5 * (12 / b - 1)


def test_the_variance_is_unbiased_for_independent_steps():
    rng = np.random.default_rng(2)
    got = [period_means(rng.binomial(100, 0.3, (1, 9)), np.full((1, 9), 100))[0] for _ in range(2000)]
    true = 0.3 * 0.7 / 900
    free = [shift.variance for shift in got]  # the floor only raises it
    assert 0.95 * true < np.mean(free) < 1.6 * true


def test_differences_add_variances_and_share_degrees_of_freedom():
    a, b = Shift(0.5, 0.04, 4.0, 0.01), Shift(0.2, 0.04, 4.0, 0.02)
    both = a - b
    assert (both.value, both.variance, both.counting) == pytest.approx((0.3, 0.08, 0.03))
    assert both.df == pytest.approx(8)
    low, high = both.interval(0.05)
    assert (low + high) / 2 == pytest.approx(0.3) and (high - low) / 2 == pytest.approx(2.306004 * 0.08**0.5)
    assert both.p_above_zero() == pytest.approx(0.1599, abs=2e-4)


def test_the_control_runs_change_is_taken_off():
    same = {"steps": range(10), "hack_counts": [0] * 10, "n_episodes": 100}
    control = same | {"dims": {"b": ([10] * 10, 100), "a": ([10] * 5 + [25] * 5, 100)}}
    result = by_hand(control=control)
    np.testing.assert_allclose(result.value.sel(measure="control change"), [0, 0.15, 0, 0.075], atol=1e-12)
    np.testing.assert_allclose(result.value.sel(measure="change beyond control"), [0.5, 0.05, 0, 0.025], atol=1e-12)
    other_steps = control | {"steps": np.arange(10) + 0.5}  # 4.5 lies before the onset at 5: five steps on each side
    moved = by_hand(control=other_steps)
    np.testing.assert_array_equal(moved.value, result.value)


def test_a_trend_is_carried_forward():
    steps = np.arange(12.0)
    rates = 1 / (1 + np.exp(-(-3 + 0.2 * steps)))
    trend = carried_forward(steps[:6], rates[:6], np.full(6, 1e6), steps[6:], 0.05)
    assert trend.expected == pytest.approx(rates[6:].mean(), rel=1e-3) and trend.expected < trend.upper < 0.3
    few = carried_forward(steps[:6], rates[:6], np.full(6, 50), steps[6:], 0.05)
    assert few.upper > trend.upper
    nothing = carried_forward(steps[:6], np.zeros(6), np.full(6, 1000), steps[6:], 0.05)
    assert 0 < nothing.expected < nothing.upper < 0.1


def test_signs():
    assert sign_consistency(np.array([0.1, 0.2, 0.3, 0.1, 0.5, 0.6]))["p"] == 1 / 64
    mixed = sign_consistency(np.array([0.1, -0.2, 0.0, 0.1]))
    assert (mixed["up"], mixed["down"], mixed["p"]) == (2, 1, 0.5)


# Joint change point


def test_gains_by_hand():
    counts, trials = np.array([[[0, 0, 5, 5, 5]]]), np.full((1, 1, 5), 10)
    log = np.log
    whole = 15 * log(0.3) + 35 * log(0.7)
    after_two = 30 * log(0.5)
    third = 5 * log(5 / 30) + 25 * log(25 / 30) + 20 * log(0.5)
    np.testing.assert_allclose(rise_gains(counts, trials)[0, 0], [after_two - whole, third - whole])
    assert (rise_gains(counts[..., ::-1], trials) == 0).all()


def test_blocks_stay_together_and_every_step_stays():
    orders = block_orders(20, 300, 0)
    assert (np.sort(orders, axis=1) == np.arange(20)).all()
    assert ((np.diff(orders, axis=1) == 1).mean(1) >= 0.7).all()


def test_the_joint_change_point_is_where_all_rise():
    rise = np.array([1] * 12 + [40] * 8)
    n = np.full(20, 100)
    joint = joint_change((rise, n), (np.stack([rise, rise]), np.stack([n, n])), 999, 0)
    assert joint.index == 12 and joint.p < 0.05
    early = np.array([40] * 4 + [1] * 8 + [40] * 4 + [1] * 4)
    apart = joint_change((rise, n), (early[None], n[None]), 999, 0)
    assert apart.p > 0.05 and apart.index == 12


def test_the_joint_p_is_uniform_where_dimensions_wander_by_themselves():
    p = []
    for seed in range(200):
        given = simulated(seed, "rises", "flat", phi=0.5, sd=0.4)
        counts = np.array([k for k, _ in given["dims"].values()])
        joint = joint_change((given["hack_counts"], EPISODES), (counts, np.full_like(counts, 200)), 199, seed)
        p.append(joint.p)
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


# Labels


N = 40
ALLOWED = 0.05 + 2 * np.sqrt(0.05 * 0.95 / N)


@pytest.mark.parametrize("hacking", ["flat", "edge"])
def test_an_aligned_run_gets_no_cascade(hacking):
    got = labels(N, hacking=hacking, dims="flat", phi=0.5, sd=0.4)
    assert sum(label is not None for label in got) / N <= ALLOWED
    assert got.count("cascade") == 0


@pytest.mark.parametrize(("phi", "sd"), [(0.0, 0.0), (0.8, 0.4)])
@pytest.mark.parametrize("control", [None, "flat"])
def test_hacking_that_changes_nothing_else_is_no_cascade(control, phi, sd):
    got = labels(N, control, hacking="rises", dims="flat", phi=phi, sd=sd)
    assert got.count("cascade") / N <= ALLOWED
    assert got.count("no cascade") / N > (0.9 if sd == 0 else 0.4)


def test_a_trend_that_the_control_run_shares_is_no_cascade():
    got = labels(N, "trend", hacking="rises", dims="trend", phi=0.5, sd=0.4)
    assert got.count("cascade") / N <= ALLOWED


def test_a_trend_of_the_runs_own_is_no_cascade():
    got = labels(N, hacking="rises", dims="trend", phi=0.5, sd=0.4)
    assert got.count("cascade") / N <= ALLOWED


@pytest.mark.parametrize(("control", "sd"), [("flat", 0.4), (None, 0.0)])
def test_a_planted_cause_is_found(control, sd):
    """At 20 steps of 200 episodes. Without a control run only where the score before the onset hardly wanders."""
    got = labels(25, control, hacking="rises", dims="rise", phi=0.5, sd=sd)
    assert got.count("cascade") / 25 > 0.8
    assert got.count("no cascade") == 0


def test_without_an_onset_nothing_is_labelled():
    result = by_hand({"hack_counts": [0] * 10})
    assert result.meta["label"] is None and "no period after" in result.meta["reason"]
    assert np.isnan(result.value.sel(measure="change")).all()
    np.testing.assert_allclose(result.value.sel(measure="before", dimension="b"), 0.1)


@pytest.mark.parametrize(("counts", "words"), [([50] * 10, "0 steps before"), ([0] * 8 + [50] * 2, "2 steps from")])
def test_periods_that_are_too_short_are_undetermined(counts, words):
    result = by_hand({"hack_counts": counts})
    assert result.meta["label"] == "undetermined" and words in result.meta["reason"]
    assert result.meta["needed"]["steps_before_and_from_the_onset"] == 3


def test_a_control_run_that_hacks_is_none():
    given = simulated(0, "rises", "rise")
    meta = detect_cascade(**given, control=simulated(1, "rises", "rise")).meta
    assert meta["label"] == "undetermined" and "control run has an onset" in meta["reason"]


@pytest.mark.parametrize("steps", [range(7), range(6, 14)])
def test_a_control_run_that_lacks_a_period_is_undetermined(steps):
    n = len(steps)
    control = {"steps": steps, "hack_counts": [0] * n, "n_episodes": 100, "dims": {k: ([10] * n, 100) for k in "ab"}}
    result = by_hand(control=control)
    assert result.meta["label"] == "undetermined" and "control run has under 3 steps" in result.meta["reason"]
    assert "one of the two periods" in result.checks[-1].note


def test_fewer_than_ten_steps_say_how_many_it_takes():
    meta = by_hand({
        "steps": range(7), "hack_counts": [0] * 3 + [50] * 4,
        "dims": {name: ([1] * 3 + [50] * 4, 100) for name in "ab"},
    }).meta  # fmt: skip
    assert meta["label"] == "undetermined" and "at least 10 steps" in meta["reason"]


def test_one_dimension_is_no_cascade_of_several():
    given = simulated(0, "rises", "rise")
    given["dims"] = {"d5": given["dims"]["d5"]}
    assert detect_cascade(**given).meta["label"] == "undetermined"


def test_episodes_and_steps_needed():
    few = detect_cascade(**simulated(0, "rises", "flat", n=20)).meta
    assert few["needed"]["rise"] == 0.05
    assert few["needed"]["episodes_per_step"] > 0 and few["needed"]["steps"] >= 20


# Invariances


def test_the_order_of_dimensions_is_nothing():
    given = simulated(3, "rises", "rise", phi=0.5, sd=0.4)
    turned = given | {"dims": dict(reversed(given["dims"].items()))}
    first, second = detect_cascade(**given), detect_cascade(**turned)
    for name in ("value", "low", "high"):
        a, b = first.dataset[name], second.dataset[name]
        np.testing.assert_allclose(a, b.sel(dimension=a["dimension"]), atol=1e-12)
    assert first.meta["label"] == second.meta["label"]
    assert first.meta["joint"]["p"] == second.meta["joint"]["p"]


def test_ten_times_the_episodes_keep_the_changes_and_narrow_no_more_than_counting():
    given = simulated(3, "rises", "rise", phi=0.5, sd=0.4)
    more = given | {"hack_counts": 10 * given["hack_counts"], "n_episodes": 2000,
                    "dims": {k: (10 * c, 10 * n) for k, (c, n) in given["dims"].items()}}  # fmt: skip
    first, second = detect_cascade(**given), detect_cascade(**more)
    if first.meta["onset"]["step"] == second.meta["onset"]["step"]:
        np.testing.assert_allclose(first.value, second.value, atol=1e-12)
    width, narrower = ((r.high - r.low).sel(measure="change", dimension="score") for r in (first, second))
    assert narrower <= width + 1e-12
    assert second.meta["joint"]["gain"] == pytest.approx(10 * first.meta["joint"]["gain"])


def test_steps_given_twice_change_no_difference_and_add_little():
    widths = []
    for seed in range(20):
        given = simulated(seed, "rises", "rise", n_steps=16, phi=0.5, sd=0.4)
        twice = {
            "steps": (given["steps"][:, None] + [0, 1]).ravel(), "hack_counts": given["hack_counts"].repeat(2),
            "n_episodes": 200, "dims": {k: (c.repeat(2), n) for k, (c, n) in given["dims"].items()},
        }  # fmt: skip
        first, second = (detect_cascade(**g, settle=0.0, n_permutations=199) for g in (given, twice))
        if first.meta["onset"]["step"] != second.meta["onset"]["step"]:
            assert first.meta["onset"]["step"] < second.meta["onset"]["step"]
            continue
        np.testing.assert_allclose(first.value, second.value, atol=1e-12)
        assert first.meta["signs"] == second.meta["signs"]
        ends = [(r.high - r.low).sel(measure="change", dimension="score") for r in (first, second)]
        widths.append(float(ends[1] / ends[0]))
    assert len(widths) > 5 and np.median(widths) > 0.65


def test_the_seed_decides_and_the_result_survives_a_file(tmp_path):
    given = simulated(5, "rises", "rise")
    first, second = detect_cascade(**given, seed=1), detect_cascade(**given, seed=1)
    assert first.value.identical(second.value) and first.meta == second.meta
    back = load_result(first.save(tmp_path / "cascade.nc"))
    assert back.meta == first.meta and back.value.equals(first.value)
    assert "steps from the onset on" in repr(first)


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": range(5), "hack_counts": [0] * 5}, "at least 6"),
        ({"steps": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}, "8, then 8"),
        ({"hack_counts": [0] * 9 + [101]}, "101 of 100 at step 9"),
        ({"hack_counts": [0] * 9 + [0.5]}, "counts rather than rates"),
        ({"hack_counts": [0] * 9 + [-1]}, "-1 of 100"),
        ({"hack_counts": [0] * 9}, "shape \\(9,\\)"),
        ({"hack_counts": ["x"] * 10}, "no numbers"),
        ({"n_episodes": 0}, "0 of 0"),
        ({"n_episodes": [100] * 9 + [np.nan]}, "missing or infinite"),
        ({"dims": {}}, "at least one name"),
        ({"dims": {"score": ([1] * 10, 100)}}, "taken"),
        ({"dims": {"a": [1] * 10}}, "no pair"),
        ({"dims": {"a": ([1] * 10, 0)}}, "1 of 0"),
    ],
)
def test_bad_counts_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        by_hand(change)


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"steps": range(10)}, "no hack_counts, n_episodes, dims"),
        ({"steps": range(10), "hack_counts": [0] * 10, "n_episodes": 9, "dims": {"a": ([1] * 10, 9)}}, "a, b"),
    ],
)
def test_bad_controls_are_refused(control, words):
    with pytest.raises(DataError, match=words):
        detect_cascade(range(10), [0] * 10, 100, {"a": ([1] * 10, 100), "b": ([1] * 10, 100)}, control=control)


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"onset_rate": 1.0}, {"n_permutations": 10}])
def test_bad_settings_are_refused(change):
    with pytest.raises(DataError, match="out of range"):
        by_hand(**change)
