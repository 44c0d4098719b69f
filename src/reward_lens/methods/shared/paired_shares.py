"""Pairs won, and the change of their share from one model to another on the same pairs, as gains less losses.

    change = g - l        g, l: shares of the pairs that became right, and wrong

The interval is that of Zou and Donner from the two shares' own Wilson intervals and their correlation
-sqrt(g l / ((1 - g) (1 - l))). One from the spread of the changes would have no width where no pair changes, however
few they are; this one has. In simulations with 5% gains and 3% losses it holds the change in .99 of cases at 25
prompts, that of `stats.mean_interval` in .71.

Reference: Zou and Donner 2008, Stat. Med. 27.
"""

import numpy as np
from jaxtyping import Float

from reward_lens import stats


def won(margin):
    """1 where the margin is above 0, half for a tie, 0 otherwise."""
    return (np.sign(margin) + 1) / 2


def paired_change(change: Float[np.ndarray, " pair"], prompts) -> tuple[float, float, float, float]:
    """Gains, losses, and the ends of the interval of their difference; `change` is 1, 0 or -1 (halves for ties)."""
    gain, loss = (stats.proportion_interval(np.maximum(side, 0.0), prompts) for side in (change, -change))
    g, l = float(gain.mean), float(loss.mean)  # noqa: E741
    odds = g * l / ((1 - g) * (1 - l)) if max(g, l) < 1 else 0.0
    r = -np.sqrt(min(odds, 1.0))

    def reach(one, other):
        return np.sqrt(one**2 - 2 * r * one * other + other**2)

    low = g - l - reach(g - gain.low, loss.high - l)
    high = g - l + reach(gain.high - g, l - loss.low)
    return g, l, float(low), float(high)


def ends_of_change(change: Float[np.ndarray, " pair"], prompts) -> tuple[float, float]:
    """The ends of that interval alone; NaN under `stats.FEWEST` prompts, where no mean has one."""
    return paired_change(change, prompts)[2:] if len(set(prompts)) >= stats.FEWEST else (np.nan, np.nan)
