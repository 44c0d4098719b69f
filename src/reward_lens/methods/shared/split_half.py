"""Split-half reliability of a direction that is a mean over units, and intervals by leaving one unit out.

    reliability = 2 c / (1 + c),  c = mean over random halves of the units of cos(mean of one half, mean of the other)

The units are prompts or topics; their dot products are taken through the sums of halves, so that cost and memory grow
with the number of units and not with its square. Interval: with t_g the statistic without unit g, the values
G t - (G - 1) t_g, moved to have mean t, go to `stats.mean_interval`.

Reference: Spearman 1910, Brown 1910; Quenouille 1956 and Tukey 1958 (the jackknife's values).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from reward_lens import stats

FEWEST_SPLITS = 50
HELD_BACK = 0.5  # reliability under which nothing should be said about a direction


def halves(units: Float[np.ndarray, "g d"], n_splits: int, rng) -> tuple[float, Float[np.ndarray, " g"]]:
    """Mean cosine between the sums of two halves, with all units and without each of them (same halves)."""
    n = len(units)
    order = np.argsort(rng.random((n_splits, n)), axis=1)
    first = np.zeros((n_splits, n))
    np.put_along_axis(first, order[:, : n // 2], 1.0, axis=1)
    second = 1.0 - first
    by_first, by_second = (first @ units) @ units.T, (second @ units) @ units.T
    dot, a, b = ((x * y).sum(1, keepdims=True) for x, y in
                 ((by_first, second), (by_first, first), (by_second, second)))  # fmt: skip
    own = (units**2).sum(1)
    without = (
        dot - first * by_second - second * by_first,
        a - first * (2 * by_first - own),
        b - second * (2 * by_second - own),
    )
    return float(_cosines(dot, a, b).mean()), _cosines(*without).mean(0)


def _cosines(dot: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """dot / sqrt(a b); a half that sums to zero agrees with nothing: 0."""
    size = np.sqrt(np.maximum(a, 0.0) * np.maximum(b, 0.0))
    return np.clip(np.divide(dot, size, out=np.zeros_like(dot), where=size > 0), -1.0, 1.0)


def spearman_brown(z):
    """Reliability of the whole from atanh of the halves' cosine; -1 where the formula leaves the range of cosines."""
    c = np.maximum(np.tanh(z), -1 / 3)
    return 2 * c / (1 + c)


def left_out_interval(
    value: float, left_out: np.ndarray, to: Callable, back: Callable, n_boot: int, seed: int
) -> dict[str, Any]:
    """`back(to(value))` with the interval of the jackknife values, centred at the value."""
    if to is np.log and not (left_out > 0).all():
        return {"value": float(back(to(value))), "low": None, "high": None}
    edge = 1 - 1e-12 if to is np.arctanh else np.inf  # of what atanh is finite for
    n, whole, parts = len(left_out), float(to(np.clip(value, -edge, edge))), to(np.clip(left_out, -edge, edge))
    over = stats.mean_interval(whole - (n - 1) * (parts - parts.mean()), np.arange(n), n_boot=n_boot, seed=seed)
    return {"value": float(back(whole)), "low": float(back(over.low)), "high": float(back(over.high))}
