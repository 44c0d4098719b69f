"""How far two networks' states of the same prompts agree: debiased linear CKA, and the angle between two read-outs.

    CKA(X, Y) = H(X, Y) / sqrt(H(X, X) H(Y, Y)),   H(X, Y) = sum_ij A_ij B_ij / (n (n - 3))

A and B are the Gram matrices X X' and Y Y' with the diagonal left out and rows and columns centred for it, so that H is
the unbiased estimate of HSIC: with the biased one, two unrelated networks of a width above n look alike (CKA near 1).
A row is a prompt. Debiased CKA can be negative; it lies in [-1, 1]. It does not change when either side is rotated,
shifted or rescaled, so the two may have different widths. Intervals leave out one prompt in turn: without row i,
sum A B becomes sum A B - 2 (n - 2) / (n - 3) sum_j A_ij B_ij. A bootstrap would repeat rows, and a repeated row is as
like itself as the diagonal is that the estimate leaves out. Near 0 this interval is wider than need be (the estimate is
degenerate there); the permutation null says how large the figure is between states that have nothing to do with each
other.

What this cannot show: that the same things are computed. Linear CKA weighs directions by their variance, so that a few
of large variance decide it; and it says nothing of what the reward reads.

Reference: Kornblith et al. 2019, arXiv 1905.00414 (CKA); Song et al. 2012 (unbiased HSIC); Nguyen et al. 2021, arXiv
2010.15327 (its use in CKA). The angle in the metric of the states' covariance and the jackknife are this library's.
"""

import numpy as np
from jaxtyping import Float

from reward_lens import stats
from reward_lens.methods.comparison.compared_scores import bounded, uncentred_correlation

FEWEST_ROWS = 4
SAME_SPACE = 0.5  # correlation of the states' entries from which two networks count as having one residual space
_AT_ONCE = 2**18  # entries of a block of rows: what a core's cache holds
ROUNDING = 1e-12  # of the states' sum of squares: a spread under it is none
STATES_CONSTANT = "the states do not differ between prompts"
NO_ROW = "a head that is no one linear row has an angle of its own at every text"
OTHER_SPACE = (
    f"the two networks' states are no versions of each other (entries correlate by less than {SAME_SPACE}), so their "
    "read-outs have no angle; the correlation of rewards within prompts takes its place"
)


def debiased_cka(x, y) -> stats.Estimate:
    """Debiased linear CKA of states `x` [prompt, d] and `y` [prompt, e] with its jackknife interval over prompts."""
    a, b = centred_gram(x), centred_gram(y)
    return cka_of(a, b)


def cka_of(a: Float[np.ndarray, "n n"] | None, b: Float[np.ndarray, "n n"] | None) -> stats.Estimate:
    """The same from centred Gram matrices; None stands for states without spread."""
    if a is None or b is None:
        n = max(len(g) if g is not None else 0 for g in (a, b))
        return stats.Estimate(np.nan, np.nan, np.nan, np.nan, n, n, STATES_CONSTANT)
    n = len(a)
    if n < FEWEST_ROWS:
        return stats.Estimate(np.nan, np.nan, np.nan, np.nan, n, n, f"{n} prompts; CKA needs {FEWEST_ROWS}")
    rows = np.stack([_row_sums(p, q) for p, q in ((a, b), (a, a), (b, b))])
    total = rows.sum(1)
    left = total[:, None] - 2 * (n - 2) / (n - 3) * rows
    left[1:] = np.where(left[1:] > ROUNDING * total[1:, None], left[1:], np.nan)
    return bounded(float(total[0] / np.sqrt(total[1] * total[2])), left[0] / np.sqrt(left[1] * left[2]), n)


def centred_gram(states) -> Float[np.ndarray, "n n"] | None:
    """X X' of `states` [n, d], its diagonal left out, every row and column summing to 0; None where nothing varies.

    NaN under 4 rows, which no such sums hold.
    """
    x = np.asarray(states, float)
    n, size = len(x), float((x**2).sum())
    if n < FEWEST_ROWS:
        return np.full((n, n), np.nan)
    x = x - x.mean(0)
    if not (x**2).sum() > ROUNDING * size:
        return None
    gram = x @ x.T
    np.fill_diagonal(gram, 0.0)
    sums = gram.sum(1)
    for some in _row_blocks(n):
        gram[some] += sums.sum() / ((n - 1) * (n - 2)) - (sums[some, None] + sums[None]) / (n - 2)
    np.fill_diagonal(gram, 0.0)
    return gram


def cka_null(a: Float[np.ndarray, "n n"], b: Float[np.ndarray, "n n"], n_permutations: int, seed: int) -> np.ndarray:
    """CKA [permutation] with the prompts of one side in random order."""
    size = np.sqrt(_row_sums(a, a).sum() * _row_sums(b, b).sum())
    rng, rows = np.random.default_rng(seed), range(len(a))
    orders = (rng.permutation(len(a)) for _ in range(n_permutations))  # above the diagonal: both are symmetric
    return np.array([2 * sum(a[i, i:] @ b[order[i]].take(order[i:]) for i in rows) / size for order in orders])


def _row_sums(a: Float[np.ndarray, "n n"], b: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    return np.concatenate([(a[some] * b[some]).sum(1) for some in _row_blocks(len(a))])


def _row_blocks(n: int) -> list[slice]:
    """Rows of an [n, n] matrix a few at a time, so that no temporary array is as large as the matrix."""
    step = max(1, _AT_ONCE // n)
    return [slice(start, start + step) for start in range(0, n, step)]


def state_alignment(x, y) -> float:
    """Correlation of the entries of two networks' states `x` and `y` [text, d], each as deviations from the prompt's
    mean; NaN where the widths differ. Near 0 for networks whose coordinates have nothing to do with each other."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape:
        return float("nan")
    size = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
    return float((x * y).sum() / size) if size > 0 else float("nan")


def reward_angle(x, u, y, v, prompts) -> stats.Estimate:
    """cos = u' S v / sqrt(u' S u  v' S v), S the covariance within prompts of both networks' states together.

    x, y: [text, d] deviations from the prompt's mean of the states as the final norm scales them; u, v: [d], what the
    heads read off them. On one trunk x = y, and this is the correlation of the two rewards within prompts. Undefined
    (NaN, with the reason) where the states are not in one space, by `state_alignment`, and where u or v is None: a head
    that reads with other weights from text to text.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    one_row = u is not None and v is not None
    if not one_row or not state_alignment(x, y) >= SAME_SPACE:
        n, reason = len(set(prompts)), OTHER_SPACE if one_row else NO_ROW
        return stats.Estimate(np.nan, np.nan, np.nan, np.nan, len(x), n, reason)
    both = np.concatenate([x, y])
    return uncentred_correlation(both @ np.asarray(u, float), both @ np.asarray(v, float), [*prompts, *prompts])
