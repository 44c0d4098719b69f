"""How much a difference between two responses weighs in which of them is preferred.

    logit P(a preferred to b) = w (x_a - x_b) + v (z_a - z_b)        no constant

Which response is written first is arbitrary, so a constant can mean nothing. Every pair enters twice, as it is and
turned round, which leaves the weights as they are and puts the constant of `stats.partial_slope` at zero; both are rows
of one prompt, so the clustered errors are those of one entry.

What this cannot show: the weight of what is not among x and z and goes with them.

Reference: Bradley and Terry 1952.
"""

import numpy as np
from jaxtyping import Float

from reward_lens import stats


def preference_weight(
    x: Float[np.ndarray, " pair"], control: Float[np.ndarray, "pair k"], prompts, level: float = 0.95
) -> stats.Estimate:
    """w of the differences `x`, those of `control` held fixed, where the first response of every pair is preferred."""
    label = np.repeat([1.0, 0.0], len(x))
    twice = np.concatenate([prompts, prompts])
    return stats.partial_slope(label, np.append(x, -x), np.concatenate([control, -control]), twice, "logit", level)
