"""How far a set of states is from a natural one.

    D(X, Y) = 2 E|x - y| - E|x - x'| - E|y - y'|        energy distance; 0 only where X and Y have one distribution

States are standardised by the mean and SD of natural states, both sets by the same ones: standardised apart, a pure
shift of the mean would vanish. Norms are divided by sqrt(d), so D is in natural SD a coordinate. All pairs are summed,
self-pairs included (the V-statistic), which biases D upwards by E|y - y'| (1/n + 1/m) where nothing differs. So the
baseline is the same quantity between *disjoint* natural subsets of the *same sizes*, and the ratio of an ordinary set
is about 1.

The natural states that give mean and SD must be none of those compared: states inside their own standardisation lie
closer together than others, by some 2/n of the squared distance in every coordinate. With 20 against 30 states of 512
coordinates that alone rejects .18 of the time at a nominal .05 (.05 with a scale from 30 others).

The p-value relabels which states were intervened on. It is exact for independent states: one a prompt. What it cannot
show: how the sets differ, or that the difference matters to the reward.

Reference: Szekely and Rizzo 2013 (energy statistics); Grant et al. 2025, arXiv 2511.04638 (divergent representations).
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from reward_lens.errors import DataError

N_SPLITS = 64  # random subsets a distance and its baseline are averaged over
LEAST_SD = 1e-2  # of the median: what a coordinate that never moves by nature is divided by


@dataclasses.dataclass(frozen=True)
class Standard:
    """The mean and SD that all states are measured in."""

    mean: Float[np.ndarray, " d"]
    sd: Float[np.ndarray, " d"]

    def __call__(self, states: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        return (states - self.mean) / self.sd


def natural_standard(natural: Float[np.ndarray, "n d"]) -> Standard:
    """Mean and SD of natural states; an SD under `LEAST_SD` of the median SD is raised to that."""
    sd = natural.std(0, ddof=1) if len(natural) > 1 else np.zeros(natural.shape[1])
    if not sd.any():
        raise DataError(
            "Natural states that never vary are no scale",
            found=f"{len(natural)} states, all the same",
            expected="states of different texts at a place that depends on the text",
            do="pass natural pairs with different responses, or a depth that the reward position's text can reach",
        )
    return Standard(natural.mean(0), np.maximum(sd, LEAST_SD * np.median(sd[sd > 0])))


def distances(
    states: Float[np.ndarray, "n d"], natural: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n_plus_m n_plus_m"]:
    """Distances within and between the two sets, over sqrt(d): `states` first, `natural` after them."""
    from scipy.spatial.distance import cdist

    both = np.concatenate([states, natural])
    return cdist(both, both) / np.sqrt(both.shape[1])


def energy(
    apart: Float[np.ndarray, "k k"], weights: Float[np.ndarray, "*draws k"]
) -> Float[np.ndarray, "*draws"] | float:
    """-w' A w. With weights 1/n on one set and -1/m on the other this is 2 E|x-y| - E|x-x'| - E|y-y'|."""
    return -(weights @ apart * weights).sum(-1)


def energy_distance(states: Float[np.ndarray, "n d"], natural: Float[np.ndarray, "m d"]) -> float:
    """Energy distance of two sets of standardised states, a coordinate."""
    n, m = len(states), len(natural)
    return float(energy(distances(states, natural), np.repeat([1 / n, -1 / m], [n, m])))


def against_halves(apart: Float[np.ndarray, "k k"], n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Energy distance of the first `n` states to the natural ones after them, and its natural baseline.

    Both are means over random subsets of one size, min(n, m // 2), so that they can be compared: of each set for
    the distance, two disjoint ones of the natural set for the baseline.
    """
    m = len(apart) - n
    size = min(n, m // 2)
    own = rng.permuted(np.tile(np.arange(n), (N_SPLITS, 1)), axis=1)[:, :size]
    natural = n + rng.permuted(np.tile(np.arange(m), (N_SPLITS, 1)), axis=1)
    ours, first, second = np.zeros((3, N_SPLITS, len(apart)))
    for weights, index in ((ours, own), (first, natural[:, :size]), (second, natural[:, size : 2 * size])):
        np.put_along_axis(weights, index, 1 / size, axis=1)
    return float(np.mean(energy(apart, ours - first))), float(np.mean(energy(apart, second - first)))


def permutation_p(apart: Float[np.ndarray, "k k"], n: int, n_permutations: int, seed: int = 0) -> float:
    """Share of relabellings whose energy distance is at least that of the first `n` states to the others.

    The observed labels count as one of them; all relabellings are tried where there are no more than
    `n_permutations`.
    """
    from scipy.stats import permutation_test

    m = len(apart) - n

    def statistic(ours, theirs, axis):
        weights = np.full((*ours.shape[:-1], len(apart)), -1 / m)
        np.put_along_axis(weights, ours, 1 / n, axis=-1)
        return energy(apart, weights)

    test = permutation_test(
        (np.arange(n), n + np.arange(m)), statistic, permutation_type="independent", alternative="greater",
        n_resamples=n_permutations, batch=max(1, 4_000_000 // len(apart)), vectorized=True,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)
