"""Do several rates rise at the same step of a run as another one?

    gain    G_s(k) = log-likelihood of series s with one rate up to step k and another after, less that with one rate
            over all steps; binomial; 0 where the second rate is not the higher one
    joint   max over k of G_lead(k) + sum over the others of G_s(k)

p: the steps of the others, all series together, are cut into blocks that are put in random order, while the lead stays;
p = share of orders whose joint gain is at least the observed one, that one counted in. Blocks (a fifth of the steps or
their square root, whichever is shorter; the first cut at random) keep most of the likeness of neighbouring steps, which
permuting single steps would destroy and so call slow wandering a change. Circular shifts keep all of it, but with T
steps no p of theirs is under 1 / T. Moving all series together keeps their likeness among each other.

The null is that the others have no trend and no relation to the lead's time. A trend through the whole run rejects it
without being a change: only a control run, or the trend before the onset, speaks to that. Wandering over longer
stretches than a block makes p too small (benchmarks/cascade_calibration.md). Orders within the steps before the change,
and within those after, are as good as the observed one: with five or six blocks p is seldom under .02.

Reference: Kunsch 1989 (blocks); Hinkley and Hinkley 1970 (binomial change points by likelihood).
"""

import dataclasses

import numpy as np

FEWEST_STEPS = 10  # below, the observed order is more than one in twenty of all
EDGE = 2  # steps on each side of a change point


@dataclasses.dataclass(frozen=True)
class JointChange:
    """The common change point (index of the first step after it), gains by series, and the p of the others."""

    index: int
    gain: float
    lead_gain: float
    gains: np.ndarray
    p: float
    smallest_p: float


def joint_change(
    lead: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray], n_permutations: int, seed: int
) -> JointChange:
    """Change point of `lead` (counts [step], trials) together with `others` (counts [series, step], trials)."""
    own = rise_gains(lead[0][None, None], lead[1][None, None])[0, 0]
    counts, trials = others
    n_steps = counts.shape[1]
    orders = np.vstack([np.arange(n_steps), block_orders(n_steps, n_permutations, seed)])
    gains = rise_gains(counts[:, orders], trials[:, orders])  # [series, order, change point]
    joint = own + gains.sum(0)
    best = joint.max(1)
    at = int(joint[0].argmax())
    same = (orders[1:] == orders[0]).all(1)
    return JointChange(
        at + EDGE, float(best[0]), float(own[at]), gains[:, 0, at],
        float(1 + (best[1:] >= best[0] - 1e-9).sum()) / (n_permutations + 1),
        float(1 + same.sum()) / (n_permutations + 1),
    )  # fmt: skip


def rise_gains(counts: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Gains [series, order, change point] of `counts` [series, order, step]; the first is after EDGE steps."""
    before_k, before_n = (np.cumsum(a, axis=-1)[..., EDGE - 1 : -EDGE] for a in (counts, trials))
    all_k, all_n = (a.sum(-1, keepdims=True) for a in (counts, trials))
    after_k, after_n = all_k - before_k, all_n - before_n
    gain = _likelihood(before_k, before_n) + _likelihood(after_k, after_n) - _likelihood(all_k, all_n)
    return np.where(after_k * before_n > before_k * after_n, gain, 0.0)


def block_orders(n_steps: int, n_orders: int, seed: int) -> np.ndarray:
    """Random orders [order, step] of the steps in which blocks stay together."""
    rng = np.random.default_rng(seed)
    b = block_length(n_steps)
    orders = np.empty((n_orders, n_steps), dtype=int)
    for row in orders:
        block = (np.arange(n_steps) + rng.integers(b)) // b
        rank = rng.permutation(block[-1] + 1)
        row[:] = np.argsort(rank[block], kind="stable")
    return orders


def block_length(n_steps: int) -> int:
    """Steps of a block: about the square root, but five or six blocks at least, and 2 steps at least."""
    return max(2, min(n_steps // 5, round(n_steps**0.5)))


def _likelihood(k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Largest binomial log-likelihood of k of n, without the coefficient."""
    from scipy.special import xlogy

    return xlogy(k, k / n) + xlogy(n - k, 1 - k / n)
