"""Two scores of the same responses: do they rank alike within a prompt, and what does the best for both cost each?

    rank        half the sum over the prompt's other responses of sign(x_i - x_j), over their number: centred
    partial     correlation of the two scores' ranks less what the length's ranks explain of each, all prompts together
    gap         max a + max b - max(a + b) of a prompt's responses, a and b centred within the prompt, in SDs
    index       1 - mean gap / mean gap with b shuffled within the prompt

The gap is what the two terms lose together when one response has to serve both. It is 0 where they have the same
favourite. By itself it also grows with the number of responses, so it is held against shuffled responses: the index is
1 where nothing is lost, 0 where as much is lost as between unrelated terms, and below 0 where more is. Of unrelated
terms it spreads as 2 share - 1 of `coins` = (sum of mean shuffled gaps)^2 / sum of their variances coins does.

Scores are arrays [group, response], NaN past a group's last response.

What these cannot show: why two terms disagree, nor what training on them does: only these responses are looked at.

Sources: the partial rank correlation is Spearman's within blocks; the gap restates for a pool of responses what arXiv
2603.30036 asks of two reward terms, and is ours.
"""

import numpy as np
from jaxtyping import Float, Int

SHUFFLES = 50  # with as many inverse ones
TIED = 1e-4  # SDs: the rounding of rewards in float32


def centred_ranks(x: Float[np.ndarray, "group response"]) -> Float[np.ndarray, "group response"]:
    """Ranks within each group less their mean, over the group's size; ties share, NaN counts for nothing (0)."""
    signs = np.sign(x[:, :, None] - x[:, None, :])
    sizes = np.maximum((~np.isnan(x)).sum(1, keepdims=True), 1)
    return np.nan_to_num(signs).sum(2) / 2 / sizes


def rank_moments(
    a: Float[np.ndarray, "group response"],
    b: Float[np.ndarray, "group response"],
    length: Float[np.ndarray, "group response"],
) -> Float[np.ndarray, "group 3 3"]:
    """Sums of products of the ranks of a, b and length, by group."""
    ranks = np.stack([centred_ranks(x) for x in (a, b, length)], -1)
    return np.einsum("gri,grj->gij", ranks, ranks)


def partial_correlation(moments: Float[np.ndarray, "3 3"]) -> float:
    """Of the first two given the third; NaN where one of them does not vary beyond the third."""
    left = moments[:2, :2].copy()
    if moments[2, 2] > 0:
        left -= np.outer(moments[:2, 2], moments[:2, 2]) / moments[2, 2]
    if (np.diag(left) <= 1e-12 * np.diag(moments)[:2]).any():
        return float("nan")
    return float(left[0, 1] / np.sqrt(left[0, 0] * left[1, 1]))


def standardised(x: Float[np.ndarray, "group response"]) -> Float[np.ndarray, "group response"]:
    """Less the group's mean, over the SD within groups; all zeros where nothing varies."""
    centred = x - np.nanmean(x, 1, keepdims=True)
    there = ~np.isnan(centred)
    free = (there.sum(1) - 1).sum()
    spread = np.sqrt(np.nansum(centred**2) / free) if free else 0.0
    return centred / spread if spread > 1e-12 * np.nanmax(np.abs(x), initial=0.0) else np.where(there, 0.0, np.nan)


def losses(
    a: Float[np.ndarray, "group response"], b: Float[np.ndarray, "group response"]
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """What each of two standardised terms loses at the best response for their sum; they add up to the gap.

    Mean over the responses that are best: of opposite terms all are, and rounding or order should not choose.
    """
    both = a + b
    best = both >= np.nanmax(both, 1, keepdims=True) - TIED
    of_a, of_b = (np.nanmax(x, 1) - x.mean(1, where=best) for x in (a, b))
    return of_a, of_b


def shuffles(there: Float[np.ndarray, "group response"], seed: int = 0) -> Int[np.ndarray, "shuffle group response"]:
    """Orders of the responses that are `there` (not NaN), the others staying at the end.

    Every shuffle comes with its inverse, so that exchanging two terms changes nothing.
    """
    drawn = np.random.default_rng(seed).random((SHUFFLES, *there.shape))
    order = np.argsort(np.where(np.isnan(there), np.inf, drawn), axis=2, kind="stable")
    return np.concatenate([order, np.argsort(order, axis=2)])


def gaps(
    a: Float[np.ndarray, "group response"],
    b: Float[np.ndarray, "group response"],
    orders: Int[np.ndarray, "shuffle group response"],
) -> Float[np.ndarray, "group 3"]:
    """Gap of two standardised terms, and its mean and variance with b in other `orders`, by group."""
    a, b = (np.where(np.isnan(x), -np.inf, x) for x in (a, b))
    top = a.max(1) + b.max(1)
    shuffled = np.take_along_axis(np.broadcast_to(b, orders.shape), orders, axis=2)
    chance = top - (a + shuffled).max(2)
    return np.stack([top - (a + b).max(1), chance.mean(0), chance.var(0)], 1)


def conflict_index(sums: Float[np.ndarray, " 2"]) -> float:
    """1 - gap / gap of shuffled responses; NaN where shuffling loses nothing."""
    gap, chance = sums.tolist()
    return 1 - gap / chance if chance > 0 else float("nan")
