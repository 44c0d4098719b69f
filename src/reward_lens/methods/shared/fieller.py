"""The set of values that a ratio of two estimates may have (Fieller).

    { D : (top - D bottom)^2 <= t^2 (v_top - 2 D c + D^2 v_bottom) }        v variances, c covariance, t at level and df

Where the bottom is far from zero (bottom^2 > t^2 v_bottom) this is an interval. Otherwise dividing by zero is not ruled
out and the set has no ends: it is everything outside a gap, or everything. The delta method would give a short interval
there, and cover too little.

What this cannot show: more than the normal approximation of top and bottom carries; with few prompts and skewed values
it covers less than it claims, as every t interval does.

Reference: Fieller 1954, "Some problems in interval estimation".
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RatioSet:
    """By ratio: ends of the set (infinite where it has none), and the gap that a set without ends leaves out."""

    low: np.ndarray
    high: np.ndarray
    gap_low: np.ndarray
    """NaN where there is no gap; the set is then everything"""
    gap_high: np.ndarray

    @property
    def unbounded(self) -> np.ndarray:
        return np.isinf(self.low) | np.isinf(self.high)

    def contains(self, ratio) -> np.ndarray:
        inside = (self.low <= ratio) & (ratio <= self.high)
        return np.asarray(inside & ~((self.gap_low < ratio) & (ratio < self.gap_high)))


def fieller(top, bottom, v_top, v_bottom, covariance, df, level: float = 0.95) -> RatioSet:
    """Fieller's set for top / bottom, element by element; NaN ends where df or a variance is NaN or df < 1.

    `covariance` is 0 for estimates from different prompts. `df`: degrees of freedom of the t quantile.
    """
    from scipy.stats import t

    top, bottom, v_top, v_bottom, covariance, df = np.broadcast_arrays(
        *(np.asarray(x, dtype=float) for x in (top, bottom, v_top, v_bottom, covariance, df))
    )
    square = t.ppf((1 + level) / 2, np.where(df >= 1, df, np.nan)) ** 2
    # a D^2 - 2 b D + c <= 0
    a, b, c = bottom**2 - square * v_bottom, top * bottom - square * covariance, top**2 - square * v_top
    root = np.sqrt(np.maximum(b**2 - a * c, 0.0))
    divisor = np.where(a == 0, np.nan, a)
    ends = np.sort(np.stack([(b - root) / divisor, (b + root) / divisor]), axis=0)
    known, bounded = ~np.isnan(a + b + c), a > 0
    low = np.where(bounded, ends[0], np.where(known, -np.inf, np.nan))
    high = np.where(bounded, ends[1], np.where(known, np.inf, np.nan))
    gap = known & (a < 0) & (b**2 - a * c > 0)
    return RatioSet(low, high, np.where(gap, ends[0], np.nan), np.where(gap, ends[1], np.nan))
