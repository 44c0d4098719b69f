"""What divergence is measured by: worked examples, slow loops, and error rates by simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom
from scipy.stats import energy_distance as scipy_energy_distance

from reward_lens.errors import DataError
from reward_lens.methods.causation.heterogeneity import heterogeneity
from reward_lens.methods.causation.natural_distance import (
    LEAST_SD,
    against_halves,
    distances,
    energy_distance,
    natural_standard,
    permutation_p,
)
from reward_lens.methods.causation.off_manifold import natural_range, null_space_test, off_plane


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def as_nominal(rejections: int, n: int, rate: float = 0.05) -> bool:
    """Whether so many rejections are within the binomial scatter of the nominal rate (1 in 1000)."""
    return binom.ppf(0.0005, n, rate) <= rejections <= binom.ppf(0.9995, n, rate)


# the worked circuit of Grant et al. 2025

W = np.array([[0.75, 0.25, 0, 0.5], [0, 1, 0, 0], [1, 1, -1, -1]])
B = np.array([-0.5, -0.5, 0])
CLASS_A = np.array([[1.0, 0, 1, 0], [0, 1, 1, 0]])
CLASS_B = np.array([[0.0, 0, 1, 0], [0, 0, 1, 1]])
DELTA = np.array([0.5, 0.5, 0, -0.5])
EVERY = np.concatenate([CLASS_A, CLASS_B])


def hidden(h: np.ndarray) -> np.ndarray:
    return np.maximum(h @ W.T + B, 0)


def score(h: np.ndarray) -> np.ndarray:
    return hidden(h).sum(-1)


def test_the_worked_circuit_is_as_in_the_paper():
    np.testing.assert_allclose(score(CLASS_A), [0.25, 0.5])
    np.testing.assert_allclose(score(CLASS_B), [0, 0])
    np.testing.assert_allclose(hidden(CLASS_B + DELTA), [[0, 0, 0.5], [0.25, 0, 0]])


def test_both_detectors_on_the_worked_circuit():
    """The null-space test flags both patched states, the audit of units only the one that wakes unit 3."""
    patched = CLASS_B + DELTA
    v, ranks = off_plane(patched, CLASS_A, n_neighbours=2, rank=1)
    np.testing.assert_allclose(v, [[0, 0, 0, -0.5], [0, 0, 0, 0.5]], atol=1e-12)
    assert ranks.tolist() == [1, 1]
    worst, harmless = null_space_test(v, lambda v: score(EVERY + v[:, None]) - score(EVERY), eps=0.05)
    np.testing.assert_allclose(worst, [0.5, 0.25], atol=1e-12)
    assert not harmless.any()

    outside = natural_range(hidden(EVERY)).outside(hidden(patched))
    assert outside.tolist() == [[False, False, True], [False, False, False]]


# energy distance


def test_energy_distance_is_scipys_in_one_dimension():
    x, y = normal(30, seed=1), 0.5 + 2 * normal(17, seed=2)
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(scipy_energy_distance(x, y) ** 2, rel=1e-9)


def test_energy_distance_is_the_double_loop():
    x, y = normal(7, 5, seed=1), normal(9, 5, seed=2) + 1

    def mean(a, b):
        return np.mean([np.sqrt(((s - t) ** 2).sum()) for s in a for t in b])

    slow = (2 * mean(x, y) - mean(x, x) - mean(y, y)) / np.sqrt(5)
    assert energy_distance(x, y) == pytest.approx(slow, rel=1e-12)


def test_a_shift_of_three_sd_is_seen():
    """Standardised apart it vanishes, which is the published code's flaw."""
    natural, shifted = normal(500, 32, seed=1), normal(500, 32, seed=2) + 3
    standard = natural_standard(normal(500, 32, seed=3))
    assert energy_distance(standard(shifted), standard(natural)) * np.sqrt(32) == pytest.approx(21.4, rel=0.05)
    apart = energy_distance(natural_standard(shifted)(shifted), natural_standard(natural)(natural))
    assert apart * np.sqrt(32) < 0.1


def test_baseline_halves_are_disjoint_and_of_the_distances_size():
    """Where all points are 1 apart, the energy distance of two disjoint sets of k is 2 / k, and less with overlap."""
    apart = 1.0 - np.eye(5 + 12)
    distance, baseline = against_halves(apart, 5, np.random.default_rng(0))
    assert distance == pytest.approx(2 / 5) and baseline == pytest.approx(2 / 5)
    distance, baseline = against_halves(apart, 12, np.random.default_rng(0))  # 5 natural states: halves of 2
    assert distance == pytest.approx(2 / 2) and baseline == pytest.approx(2 / 2)


def test_ratio_of_natural_states_is_one():
    ratios = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pair = against_halves(distances(rng.normal(size=(15, 20)), rng.normal(size=(40, 20))), 15, rng)
        ratios.append(pair[0] / pair[1])
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


# permutation p


def test_permutation_p_of_few_states_counts_every_relabelling():
    x, y = normal(3, 4, seed=1) + 1, normal(4, 4, seed=2)
    apart, both = distances(x, y), np.concatenate([x, y])
    observed = energy_distance(x, y)
    every = [
        energy_distance(both[list(ours)], np.delete(both, ours, axis=0)) for ours in itertools.combinations(range(7), 3)
    ]
    assert permutation_p(apart, 3, 999) == pytest.approx(np.mean([e >= observed - 1e-12 for e in every]))


def rejected(n_runs: int, d: int, shift: float = 0.0, own_scale: bool = False) -> int:
    """How often 20 states differ from 30 natural ones at .05, with a scale from 30 others or from the same."""
    count = 0
    for seed in range(n_runs):
        rng = np.random.default_rng(seed)
        states, natural, others = rng.normal(size=(20, d)) + shift, rng.normal(size=(30, d)), rng.normal(size=(30, d))
        standard = natural_standard(natural if own_scale else others)
        count += permutation_p(distances(standard(states), standard(natural)), 20, 199, seed) <= 0.05
    return count


def test_permutation_p_errs_at_its_rate():
    assert as_nominal(rejected(300, d=16), 300)
    assert as_nominal(rejected(150, d=512), 150)


def test_a_scale_from_the_compared_states_would_err_more_often():
    """Why half of the natural prompts are kept for the scale."""
    assert not as_nominal(rejected(150, d=512, own_scale=True), 150)


def test_permutation_p_has_power():
    assert rejected(50, d=32, shift=0.5) == 50
    assert 15 <= rejected(50, d=32, shift=0.25) <= 45  # measured on 200: .60


# standardisation


def test_a_coordinate_that_never_moves_by_nature_counts_when_it_does():
    natural = normal(40, 6)
    natural[:, 2] = 5.0
    standard = natural_standard(natural)
    moved = np.zeros((1, 6)) + standard.mean
    moved[0, 2] += 1.0
    assert standard(moved)[0, 2] == pytest.approx(1 / (LEAST_SD * np.median(natural.std(0, ddof=1)[[0, 1, 3, 4, 5]])))


def test_states_that_never_vary_are_refused():
    with pytest.raises(DataError, match="never vary are no scale. Found: 10 states, all the same"):
        natural_standard(np.ones((10, 3)))


# local planes


def test_off_plane_is_exact_on_a_plane():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(7, 3)))[0]
    plane, normal_to_it = basis[:, :2], basis[:, 2]
    natural = 4.0 + rng.normal(size=(60, 2)) @ plane.T
    inside = 4.0 + rng.normal(size=(9, 2)) @ plane.T
    heights = np.linspace(-2, 2, 9)
    v, ranks = off_plane(inside + heights[:, None] * normal_to_it, natural, n_neighbours=20, variance=1.0)
    np.testing.assert_allclose(v, heights[:, None] * normal_to_it, atol=1e-9)
    assert (ranks == 2).all()


@pytest.mark.parametrize(("n_neighbours", "variance"), [(10, 0.95), (10, 0.5), (40, 0.95)])
def test_off_plane_is_the_obvious_loop(n_neighbours, variance):
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    natural, states = normal(80, 12, seed=1) * np.linspace(0.1, 2, 12), normal(6, 12, seed=2)
    v, ranks = off_plane(states, natural, n_neighbours, variance)
    _, nearest = NearestNeighbors(n_neighbors=n_neighbours).fit(natural).kneighbors(states)
    for i, (state, index) in enumerate(zip(states, nearest, strict=True)):
        pca = PCA(svd_solver="full").fit(natural[index])
        rank = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), variance)) + 1
        axes = pca.components_[:rank]
        away = state - natural[index].mean(0)
        np.testing.assert_allclose(v[i], away - away @ axes.T @ axes, atol=1e-9)
        assert ranks[i] == rank


def test_off_plane_leaves_out_the_neighbours_it_is_told_to():
    natural = normal(20, 3)
    same = np.eye(20, dtype=bool)
    v, _ = off_plane(natural, natural, n_neighbours=1, apart=~same)
    far = np.linalg.norm(natural[:, None] - natural[None], axis=-1) + 1e9 * same
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), far.min(1))


# null-space test and units


def test_null_space_test_of_a_linear_network():
    w, states = normal(6, seed=1), normal(30, 6, seed=2)
    along = normal(5, 6, seed=3)
    across = along - np.outer(along @ w, w) / (w @ w)

    def change(v):
        return (states + v[:, None]) @ w - states @ w

    worst, harmless = null_space_test(across, change, eps=1e-9)
    assert harmless.all() and worst.max() < 1e-12
    worst, harmless = null_space_test(along, change, eps=1e-9)
    np.testing.assert_allclose(worst, np.abs(along @ w))
    assert not harmless.any()


def test_units_past_their_natural_range():
    natural = np.abs(normal(400, 3))
    natural[:, 1] = 0.0  # silent
    natural[:, 2] = 1e-9  # as good as silent
    limits = natural_range(natural)
    most = natural[:, 0].max()
    states = np.array([[most, 0, 1e-8], [-1.01 * most, 0, 0], [0, 0.5, 0], [0, 0, 0.5]])
    assert limits.outside(states).tolist() == [
        [False, False, False],
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_a_unit_that_fires_rarely_enough_counts_as_silent():
    natural = np.zeros((2000, 1))
    natural[0] = 3.0  # a rate of .05%
    assert natural_range(natural).outside(np.array([[1.0]])).all()
    natural[:4] = 3.0  # .2%
    assert not natural_range(natural).outside(np.array([[1.0]])).any()


# heterogeneity


def test_heterogeneity_in_numbers():
    """Means 1.5 and 11.5, variances 5/3 over 4: Q = 10^2 / (5/6) = 120 for two contexts, I2 = 119/120."""
    found = heterogeneity([0, 1, 2, 3, 10, 11, 12, 13], list("aaaabbbb"))
    assert found.q == pytest.approx(120) and found.i2 == pytest.approx(119 / 120)
    assert found.low < found.i2 < found.high and found.p < 1e-4
    same = heterogeneity([0, 1, 2, 3, 3, 2, 1, 0], list("aaaabbbb"))
    assert same.q == pytest.approx(0, abs=1e-12) and same.i2 == same.low == 0 and same.p == pytest.approx(1)


def test_q_is_cochrans_with_many_prompts():
    rng = np.random.default_rng(0)
    groups = [mean + sd * rng.normal(size=3000) for mean, sd in ((0.0, 1.0), (0.05, 2.0), (0.1, 0.5))]
    means, weights = np.array([g.mean() for g in groups]), np.array([len(g) / g.var(ddof=1) for g in groups])
    q = (weights * (means - weights @ means / weights.sum()) ** 2).sum()
    found = heterogeneity(np.concatenate(groups), np.repeat([0, 1, 2], 3000))
    assert found.q == pytest.approx(q, rel=2e-3)
    assert found.i2 == pytest.approx(1 - 2 / q, rel=2e-3)


def test_rows_of_a_prompt_count_once():
    values, contexts = [0, 1, 2, 3, 5, 6, 8, 9], list("aaaabbbb")
    twice = heterogeneity(np.repeat(values, 2), np.repeat(contexts, 2), np.repeat(np.arange(8), 2))
    assert twice == heterogeneity(values, contexts)


def test_heterogeneity_errs_at_its_rate():
    """Four prompts a context and unequal variances; the interval's lower end is above 0 about 2.5% of the time."""
    rng = np.random.default_rng(0)
    found = [
        heterogeneity(rng.normal(size=24) * np.repeat(rng.uniform(0.5, 2, 6), 4), np.repeat(np.arange(6), 4))
        for _ in range(300)
    ]
    assert as_nominal(sum(f.p <= 0.05 for f in found), 300)
    assert as_nominal(sum(f.low > 0 for f in found), 300, rate=0.025)


@pytest.mark.parametrize(
    ("values", "contexts", "floor", "reason"),
    [
        (np.arange(8), ["a"] * 8, 0.0, "1 contexts (subsets) with 4 prompts; I2 needs two"),
        (np.arange(8), list("aaaaabbb"), 0.0, "1 contexts"),
        ([1, 1, 1, 1, 2, 3, 4, 5], list("aaaabbbb"), 0.0, "every effect is the same"),
        (np.arange(8) / 1e9, list("aaaabbbb"), 1e-6, "under the noise floor"),
    ],
)
def test_heterogeneity_says_why_it_is_undefined(values, contexts, floor, reason):
    found = heterogeneity(values, contexts, floor=floor)
    assert np.isnan([found.i2, found.low, found.high, found.q, found.p]).all()
    assert reason in found.reason
