"""Resamples of clusters and sign flips of units, for `stats`: the seed alone decides what is drawn."""

import functools
from collections.abc import Iterator

import numpy as np

AT_ONCE = 64_000  # units of a block of flips: what a core's cache holds


@functools.lru_cache(maxsize=1)
def resamples(n_clusters: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each cluster is in each resample, [n_boot, cluster]; 255 times never happens.

    Kept: a method asks for the same ones measure after measure, and drawing them takes longer than all that is done
    with them.
    """
    rng, chance = np.random.default_rng(seed), np.full(n_clusters, 1 / n_clusters)
    out = np.empty((n_boot, n_clusters), dtype=np.uint8)
    for row in out:
        row[:] = rng.multinomial(n_clusters, chance)
    out.flags.writeable = False
    return out


def kept_signs(n: int, count: int, exact: bool, seed: int) -> Iterator[np.ndarray]:
    """Blocks [flip, n], 1 where a unit keeps its sign and 0 where it is turned: all 2^n, or `count` at random.

    Those at random are the very ones of scipy's permutation_test, which turns the units one by one in Python.
    """
    drawn = np.random.default_rng(seed).bit_generator
    rows = max(2, AT_ONCE // n // 2 * 2)  # even: a word has two signs
    for start in range(0, count, rows):
        k = min(rows, count - start)
        if exact:
            bits = np.arange(start, start + k)[:, None] >> np.arange(n)
        else:
            bits = np.asarray(drawn.random_raw((k * n + 1) // 2)).view(np.uint32)[: k * n].reshape(k, n)
        yield (bits & 1).astype(float)
