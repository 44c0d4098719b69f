"""The cosine of two mean differences, freed of what the noise of few prompts does to it.

    A_ab = mean over prompts g != h of d_a,g . d_b,h       d_a,g: mean difference of prompt g in set a
    cosine = A_ab / sqrt(A_aa A_bb)                        reliability of a = A_aa / |mean d_a|^2

A prompt never meets itself, so A_ab estimates mu_a . mu_b without bias, and A_aa |mu_a|^2, whether or not the two sets
share prompts: the noise that they share would otherwise pass for agreement. Averaged over all halvings of the prompts,
the dot product of the means of two halves is A; so this is the disattenuated split-half cosine without random halves.
The plain cosine of the two means is nearer to 0 by sqrt(reliability_a reliability_b) where the sets share no noise.

Intervals are over prompts by the jackknife: with t_k the statistic without prompt k of all that it appears in, the
values t - (K - 1) (t_k - mean t_k) go to `stats.mean_interval`. Where one of the two sets is small and has most of the
spread, K says too much: under 20 degrees of freedom by Welch the t interval takes them.

What a cosine cannot show: that two directions do the same to a reward (that also depends on how states spread along
them: see the cosine in the covariance metric), nor that they are the same in another model.

References: Spearman 1904 (correction for attenuation); Ledoit and Wolf 2004 (the covariance's shrinkage).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from reward_lens import stats
from reward_lens.errors import DataError


@dataclasses.dataclass(frozen=True)
class Moves:
    """Mean differences of states by prompt."""

    keys: tuple[str, ...]
    """Prompts, each once."""
    rows: np.ndarray
    """[prompt, d_model]"""

    def kept(self, without: frozenset[str]) -> np.ndarray:
        """[prompt] which are left without some."""
        return np.array([key not in without for key in self.keys])

    def mean(self, without: frozenset[str] = frozenset()) -> Float[np.ndarray, " d_model"]:
        """Over the prompts, without some of them."""
        return self.rows[self.kept(without)].mean(0)

    def by(self, matrix: Float[np.ndarray, "d_model k"]) -> "Moves":
        """The differences after a linear map."""
        return Moves(self.keys, self.rows @ matrix)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A statistic with its interval over `n` prompts; NaN, with the `reason`, where there is none."""

    value: float
    low: float
    high: float
    n: int
    reason: str = ""


def moves_of(keys: Sequence[str], rows: Float[np.ndarray, "n d_model"]) -> Moves:
    """Differences of pairs averaged by prompt. Raises `DataError` under 6 prompts."""
    labels, codes = np.unique(np.asarray(keys), return_inverse=True)
    if len(labels) < stats.FEWEST:
        raise DataError(
            "There are too few prompts for a direction",
            found=f"{len(labels)} different prompts",
            expected=f"at least {stats.FEWEST}: under that there is no interval",
            do="pass more prompts; several hundred are usual",
        )
    sums = np.zeros((len(labels), rows.shape[1]))
    np.add.at(sums, codes, rows)
    return Moves(tuple(labels.tolist()), sums / np.bincount(codes)[:, None])


def cosine(a: Moves, b: Moves, n_boot: int = 2000, seed: int = 0, level: float = 0.95) -> Measured:
    """Disattenuated cosine of the mean differences of `a` and `b`, held within -1 and 1.

    Returns NaN with the reason where one of them has no length beyond its noise (A_aa <= 0), and no interval where that
    is so without one of the prompts.
    """
    keys = sorted({*a.keys, *b.keys})
    (ab, ab_without), (aa, aa_without), (bb, bb_without) = (_product(*x, keys) for x in ((a, b), (a, a), (b, b)))
    if min(aa, bb) <= 0:
        return Measured(math.nan, math.nan, math.nan, len(keys), "a mean difference no longer than its noise")
    value = ab / math.sqrt(aa * bb)
    if min(aa_without.min(), bb_without.min()) <= 0:
        reason = "without one prompt a mean difference is no longer than its noise"
        return Measured(float(np.clip(value, -1, 1)), math.nan, math.nan, len(keys), reason)
    of = np.isin(keys, a.keys) + 2 * np.isin(keys, b.keys)
    over = jackknife(value, ab_without / np.sqrt(aa_without * bb_without), n_boot, seed, level, of)
    return Measured(*np.clip([over.value, over.low, over.high], -1, 1).tolist(), n=over.n)


def reliability(a: Moves, n_boot: int = 2000, seed: int = 0, level: float = 0.95) -> Measured:
    """Share of the squared length of the mean difference that is not noise, at this number of prompts.

    The expected cosine between this mean and that of as many new prompts; what `bias_direction` estimates by halving.
    At most 1, and below 0 where the differences agree less than by chance.
    """
    whole, without = _product(a, a, list(a.keys))
    total = a.rows.sum(0)
    size = total @ total / len(a.keys) ** 2
    sizes = ((total - a.rows) ** 2).sum(1) / (len(a.keys) - 1) ** 2
    if size <= 0 or sizes.min() <= 0:
        return Measured(math.nan, math.nan, math.nan, len(a.keys), "the differences cancel")
    over = jackknife(whole / size, without / sizes, n_boot, seed, level)
    return dataclasses.replace(over, low=min(over.low, 1.0), high=min(over.high, 1.0))


def share(a: Moves, without: frozenset[str] = frozenset()) -> float:
    """The reliability of the mean difference without some prompts, as a number alone."""
    rows = a.rows[a.kept(without)]
    total, own = rows.sum(0), float((rows**2).sum())
    size = float(total @ total)
    return (size - own) / (len(rows) - 1) * len(rows) / size if size > 0 else math.nan


def jackknife(
    whole: int | float,
    left_out: Float[np.ndarray, " prompt"],
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    of: Int[np.ndarray, " prompt"] | None = None,
) -> Measured:
    """A statistic with the interval of its jackknife values, centred at the statistic; `of`: each prompt's set."""
    n = len(left_out)
    if not math.isfinite(whole) or not np.isfinite(left_out).all():
        return Measured(float(whole), math.nan, math.nan, n, "undefined with all prompts or without one of them")
    values = whole - (n - 1) * (left_out - left_out.mean())
    parts, counts = (
        np.bincount(np.zeros(n, int) if of is None else of, x) for x in ((values - whole) ** 2, np.ones(n))
    )
    df = parts.sum() ** 2 / (parts**2 / np.maximum(counts - 1, 1)).sum() if parts.any() else n - 1
    if df < stats.FEWEST_BOOTSTRAP - 1:
        from scipy.stats import t

        half = float(t.ppf((1 + level) / 2, df)) * math.sqrt(parts.sum() / n / (n - 1))
        return Measured(float(whole), whole - half, whole + half, n)
    over = stats.mean_interval(values, np.arange(n), level=level, n_boot=n_boot, seed=seed)
    return Measured(float(whole), float(over.low), float(over.high), n)


def blocks(keys, most: int, seed: int = 0) -> list[frozenset[str]]:
    """The prompts dealt at random into at most `most` blocks of nearly equal size, for a statistic that is dear."""
    dealt = np.random.default_rng(seed).permutation(sorted(set(keys))).tolist()
    return [frozenset(dealt[start::most]) for start in range(min(most, len(dealt)))]


def whitening(states: Float[np.ndarray, "n d_model"], groups) -> Float[np.ndarray, "d_model d_model"]:
    """Inverse square root of the covariance of states centred within groups, shrunk as Ledoit and Wolf do.

    Differences times this matrix are in units of the natural spread along every axis. Raises `DataError` for states
    that do not differ within the groups.
    """
    from sklearn.covariance import LedoitWolf

    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((codes.max() + 1, states.shape[1]))
    np.add.at(sums, codes, states)
    centred = states - (sums / np.bincount(codes)[:, None])[codes]
    scale = float(np.abs(centred).max())
    if not scale > 0:
        raise DataError("The states have no spread", found="states that are equal within every prompt",
                        expected="different responses", do="pass more responses, or other ones")  # fmt: skip
    covariance = LedoitWolf(assume_centered=True).fit(centred / scale).covariance_
    sizes, axes = np.linalg.eigh(covariance)
    least = sizes.max() * len(sizes) * np.finfo(float).eps
    return axes @ np.diag(1 / np.sqrt(np.maximum(sizes, least))) @ axes.T / scale


def _product(a: Moves, b: Moves, keys: list[str]) -> tuple[float, Float[np.ndarray, " key"]]:
    """A_ab, and A_ab without each of the prompts `keys`."""
    (rows_a, in_a), (rows_b, in_b) = _spread(a, keys), _spread(b, keys)
    sum_a, sum_b = rows_a.sum(0), rows_b.sum(0)
    own = (rows_a * rows_b).sum(1)
    dot = float(sum_a @ sum_b)
    whole = (dot - own.sum()) / (in_a.sum() * in_b.sum() - (in_a * in_b).sum())
    without = dot - rows_a @ sum_b - rows_b @ sum_a + own - (own.sum() - own)
    pairs = (in_a.sum() - in_a) * (in_b.sum() - in_b) - ((in_a * in_b).sum() - in_a * in_b)
    return float(whole), without / pairs


def _spread(moves: Moves, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of `keys`, zero for a prompt that is not there, and which are."""
    place = {key: i for i, key in enumerate(moves.keys)}
    index = np.array([place.get(key, -1) for key in keys])
    there = (index >= 0).astype(float)
    return moves.rows[index] * there[:, None], there
