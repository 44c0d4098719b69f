"""A ratio of two sums over prompts, with Fieller's set as its interval.

    ratio = sum_g T_g / sum_g B_g        T_g, B_g the sums of prompt g; their covariance over prompts, t(G - 1)

What this cannot show: more than the normal approximation of both sums carries. Where the bottom may be zero the set has
no ends, and they are infinite.
"""

from typing import NamedTuple

import numpy as np

from reward_lens import stats
from reward_lens.methods.shared.fieller import fieller


class Ratio(NamedTuple):
    """Value and ends, over the trailing dims of top. Under 6 prompts the ends are NaN, for a zero bottom all is."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def prompt_ratio(top, bottom, prompts) -> Ratio:
    """Ratio of the sums of `top` [n, ...] and `bottom` [n] or [n, ...] over rows of prompts; NaN of none."""
    top = np.asarray(top, dtype=float)
    bottom = np.asarray(bottom, dtype=float)
    bottom = np.broadcast_to(bottom.reshape(bottom.shape + (1,) * (top.ndim - bottom.ndim)), top.shape)
    _, codes = np.unique(np.asarray(prompts), return_inverse=True)
    groups = codes.max(initial=0) + 1
    sums = np.zeros((2, groups, *top.shape[1:]))
    for row, values in zip(sums, (top, bottom), strict=True):
        np.add.at(row, codes, values)
    means = sums.mean(1)
    value = np.divide(means[0], means[1], out=np.full(means[0].shape, np.nan), where=means[1] != 0)
    if groups < stats.FEWEST:
        return Ratio(value, np.full(value.shape, np.nan), np.full(value.shape, np.nan))
    away = sums - means[:, None]
    v_top, v_bottom, covariance = ((away[i] * away[j]).sum(0) / (groups - 1) / groups for i, j in
                                   ((0, 0), (1, 1), (0, 1)))  # fmt: skip
    found = fieller(means[0], means[1], v_top, v_bottom, covariance, groups - 1)
    known = means[1] != 0
    return Ratio(value, np.where(known, found.low, np.nan), np.where(known, found.high, np.nan))


def plain(x) -> float | str | None:
    """A number for JSON: None where there is none, words for an end that is not there."""
    return None if np.isnan(x) else float(x) if np.isfinite(x) else str(float(x))
