"""What the best of n samples looks like, exactly, from N samples of a prompt: weights, KL, turning point, tail.

    w_k = C(k - 1, n - 1) / C(N, n)     chance that the k-th lowest reward of N is the highest of n drawn without
                                        replacement; samples with the same reward share their weights evenly
    E[f of the best of n] = sum_k w_k f_(k)
    KL(best of n || one sample) <= log n - (n - 1) / n

Averaged over all draws of n, so there is no sampling noise beyond that of the N samples; it is the unbiased estimate of
the best of n independent samples. At n = N one sample decides each prompt, and the curve is as noisy as that.

What this cannot show: what training on the reward would do. The best of n reweights what the policy already says.

References: Gao, Schulman and Hilton 2023, arXiv 2210.10760 (curves of proxy and gold); Beirami et al. 2024, arXiv
2401.01879 (the KL term is an upper bound, not the KL); Kwa et al. 2024, arXiv 2407.14503 (heavy tails of the error);
Hill 1975 (tail index).
"""

import numpy as np
from jaxtyping import Float, Int

from reward_lens import stats
from reward_lens.errors import DataError

FEWEST_EXCEEDANCES = 10  # of a tail index: 100 samples, of which the square root is used
SAME = 1e-12  # curves closer than this, relative to their size, do not differ


def best_of_n_weights(reward, n: int) -> Float[np.ndarray, " samples"]:
    """Chance of each sample to be the best of `n` drawn without replacement from all of them.

    `reward` [samples] orders them; those that tie share evenly. Returns weights (samples,) that sum to 1: at n = 1 all
    are equal, at n = N the best has all. Raises `DataError` for n outside 1 to N.
    """
    reward = np.asarray(reward, dtype=float)
    if not 1 <= n <= len(reward):
        raise DataError("That many samples cannot be drawn", found=f"n={n}", expected=f"1 to {len(reward)}",
                        do="lower n, or pass more samples of the prompt")  # fmt: skip
    # From the top: C(N - 1, n - 1) / C(N, n) = n / N, and C(k - 1, n - 1) = C(k, n - 1) (k - n + 1) / k.
    k = np.arange(len(reward) - 1, 0, -1)
    by_rank = n / len(reward) * np.cumprod(np.concatenate([[1.0], np.clip((k - n + 1) / k, 0, None)]))[::-1]
    order = np.argsort(reward, kind="stable")
    _, start, count = np.unique(reward[order], return_index=True, return_counts=True)
    weights = np.empty(len(reward))
    weights[order] = np.repeat(np.add.reduceat(by_rank, start) / count, count)
    return weights


def kl_bound(n) -> np.ndarray:
    """Upper bound log n - (n - 1) / n on the KL of the best of `n` from the policy, in nats, in the shape of n."""
    n = np.asarray(n, dtype=float)
    return np.asarray(np.log(n) - (n - 1) / n)


def turning_point(curves: Float[np.ndarray, "prompts n"], ns: Int[np.ndarray, " n"], n_boot: int, seed: int) -> dict:
    """Where the mean over prompts of gold by n is highest, and how sure that is over prompts.

    Returns a dict: `n`, where gold turns down (None where it does not within the curve, with `reason`), `kl` there, and
    `bootstrap`, the share of resamples of whole prompts with their maximum at each n (None under 6 prompts). The last n
    stands for "not within the curve"; an n of 1 says that gold falls from the start. Equal values count as the largest
    n, so a flat curve does not turn. Only the n given are looked at, and noise alone has a maximum somewhere: read the
    shares.
    """
    curves = curves[~np.isnan(curves).any(1)]
    places = _last_maximum(curves.mean(0))
    reason = ""
    if places == len(ns) - 1:
        flat = np.ptp(curves.mean(0)) <= SAME * np.abs(curves.mean(0)).max()
        reason = (
            "the mean gold is the same at every n" if flat else f"the mean gold is highest at the largest n, {ns[-1]}"
        )
    shares = None
    if len(curves) >= stats.FEWEST:
        draws = np.random.default_rng(seed).multinomial(len(curves), np.full(len(curves), 1 / len(curves)), n_boot)
        counts = np.bincount(_last_maximum(draws @ curves / len(curves)), minlength=len(ns))
        shares = {str(n): count / n_boot for n, count in zip(ns.tolist(), counts.tolist(), strict=True)}
    return {
        "n": None if reason else int(ns[places]),
        "kl": None if reason else float(kl_bound(ns[places])),
        "reason": reason,
        "bootstrap": shares,
        "n_prompts": len(curves),
    }


def tail_index(centred, prompts) -> dict:
    """Hill's estimate of the upper tail of within-prompt-centred rewards [n], with an interval over prompts.

    xi = mean of log(x / u) over the k = floor(sqrt(n)) values above u, the (k + 1)-th largest; alpha = 1 / xi. The tail
    falls off as x^-alpha: moments of order alpha and above do not exist. u is held fixed in the interval.

    Returns a dict: `xi`, `low`, `high`, `alpha`, `alpha_low`, `alpha_high`, `k`, `n`, `xi_of_a_normal` (what k and n
    give for normal rewards, whose true xi is 0) and `reason` where a number is None. Cannot tell heavy from light
    tails in few samples: xi is positive for any sample, and nears 0 only as 1 / log(n / k) for a normal. It is biased
    where the tail is a power only far out: for t with 2 degrees of freedom 0.51 on average of 0.50, with 4 degrees 0.31
    of 0.25 (1800 samples).
    """
    from scipy.stats import norm

    x, prompts = np.asarray(centred, dtype=float), np.asarray(prompts)
    n, k = len(x), int(np.sqrt(len(x)))
    out: dict = dict.fromkeys(("xi", "low", "high", "alpha", "alpha_low", "alpha_high", "xi_of_a_normal"))
    out |= {"k": k, "n": n, "reason": ""}
    if k < FEWEST_EXCEEDANCES:
        needed = FEWEST_EXCEEDANCES**2
        return out | {"reason": f"{n} samples; a tail index of {FEWEST_EXCEEDANCES} or more needs {needed}"}
    top = np.argsort(-x, kind="stable")[: k + 1]
    u = x[top[-1]]
    if u <= 0 or np.log(x[top[0]] / u) <= SAME:
        return out | {"reason": f"the {k + 1} largest centred rewards are equal" if u > 0 else "no upper tail above 0"}
    over = stats.mean_interval(np.log(x[top[:-1]] / u), prompts[top[:-1]])
    quantile = norm.isf((np.arange(k + 1) + 0.5) / n)
    out |= {
        "xi": over.mean,
        "alpha": 1 / over.mean,
        "xi_of_a_normal": float(np.log(quantile[:-1] / quantile[-1]).mean()),
    }
    if np.isnan(over.low):
        return out | {
            "reason": f"the {k} largest come from {over.n_clusters} prompts; an interval needs {stats.FEWEST}"
        }
    low = max(float(over.low), 0.0)
    out |= {"low": low, "high": over.high, "alpha_low": 1 / over.high, "alpha_high": 1 / low if low else None}
    return out | ({} if low else {"reason": "alpha has no upper end: the interval of xi reaches 0"})


def _last_maximum(curves: np.ndarray) -> np.ndarray:
    """Index along the last axis of the maximum, the last of those that are equal to it."""
    top = curves.max(-1, keepdims=True)
    near = curves >= top - SAME * np.abs(curves).max(-1, keepdims=True)
    return np.asarray(curves.shape[-1] - 1 - np.argmax(near[..., ::-1], axis=-1))
