"""Statistics of concept vectors over topics, from arrays alone.

Throughout X [concept, topic, d_model]: the state of a concept on a topic less the mean over concepts on that topic, so
that v_c = mean over topics of X[c]. Under the null that labels say nothing, the concepts of one topic are exchangeable,
and permuting them within topics gives the null of whatever is computed from X, cross-validation included.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from reward_lens import stats

_AT_ONCE = 2**19  # products of states held at once (4 MB)
_SAME = 1e-6  # correlations closer than this are ties: what rounding in float32 leaves of an identity


def neutral_basis(states: Float[np.ndarray, "topic d_model"], share: float) -> Float[np.ndarray, "k d_model"]:
    """The fewest leading principal components of neutral states that hold this share of their variance.

    None where the states are the same but for rounding, as at a position that holds the same token in all texts.
    """
    centred = states - states.mean(0)
    if share == 0 or (centred**2).sum() <= 1e-12 * (states**2).sum():
        return states[:0]
    _, size, components = np.linalg.svd(centred, full_matrices=False)
    held = np.cumsum(size**2) / (size**2).sum()
    return components[: int(np.searchsorted(held, share - 1e-12)) + 1]


def compact(x: Float[np.ndarray, "c t d"], *vectors: np.ndarray) -> tuple[np.ndarray, ...]:
    """X and vectors in coordinates of the span of X, which keep every product with a member of the span."""
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) >= flat.shape[1]:
        return (x, *vectors)
    basis, coordinates = np.linalg.qr(flat.T)
    return (coordinates.T.reshape(*x.shape[:2], -1), *(v @ basis for v in vectors))


def held_out_auc(x: Float[np.ndarray, "c t d"]) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "c t"]]:
    """Leave-one-topic-out AUC of every concept, and the same without each topic (in training and in test).

    In a topic it is the share of other concepts whose state projects lower on the vector of the other topics than the
    concept's own; topics count alike.
    """
    n_concepts, n_topics = x.shape[:2]
    whole, parts = np.empty(n_concepts), np.empty((n_concepts, n_topics))
    step = max(1, _AT_ONCE // (n_concepts * n_topics))  # topics left out at once: all would be topics^2 a concept
    for c in range(n_concepts):
        held = x @ x[c].sum(0) - np.einsum("ktd,td->kt", x, x[c])
        whole[c] = _within_topic(held, c).mean()
        for start in range(0, n_topics, step):
            left = np.arange(start, min(start + step, n_topics))
            products = np.einsum("ktd,sd->kts", x, x[c, left], optimize=True)
            without = _within_topic(held[:, :, None] - products, c)  # [topic, the one left out]
            without[left, left - start] = 0.0
            parts[c, left] = without.sum(0) / (n_topics - 1)
    return whole, parts


def _within_topic(scores: np.ndarray, c: int) -> np.ndarray:
    """Share of the other rows that are lower than row c, ties half."""
    others = np.delete(scores, c, axis=0)
    return ((others < scores[c]) + 0.5 * (others == scores[c])).mean(0)


def shuffle_nulls(
    x: Float[np.ndarray, "c t d"], u: Float[np.ndarray, " d"], count: int, rng
) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n c"]]:
    """Projections of the vectors on the unit vector `u`, and held-out AUCs, with the concepts of every topic permuted.

    The projection, not the cosine: a vector of noise is short, but its direction may be any.
    """
    x, u = compact(x, u)
    n_concepts, n_topics = x.shape[:2]
    projections, aucs = np.empty((count, n_concepts)), np.empty((count, n_concepts))
    for i in range(count):
        order = np.argsort(rng.random((n_concepts, n_topics)), axis=0)
        y = np.take_along_axis(x, order[:, :, None], axis=0)
        sums = y.sum(1)
        projections[i] = sums @ u / n_topics
        # [which vector, whose state, topic]: products with the sums, less those of the topic with itself
        held = np.einsum("ktd,cd->ckt", y, sums, optimize=True) - np.einsum("ktd,ctd->ckt", y, y, optimize=True)
        own = np.einsum("cct->ct", held)[:, None]
        lower = (held < own).sum(1) + 0.5 * ((held == own).sum(1) - 1)
        aucs[i] = (lower / (n_concepts - 1)).mean(1)
    return projections, aucs


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one; zeros stay zeros."""
    size = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, size, out=np.zeros_like(vectors), where=size > 0)


def good_minus_bad(x: Float[np.ndarray, "c t d"], rewards: Float[np.ndarray, "c t"]) -> Float[np.ndarray, "c d"]:
    """For every concept the common direction of reward among the others: unit vector of the mean over topics of (states
    with a reward over the topic's mean) - (those under it). Zeros where the others do not differ in reward."""
    out = []
    for c in range(len(x)):
        others, r = np.delete(x, c, axis=0), np.delete(rewards, c, axis=0)
        good, bad = r > r.mean(0), r < r.mean(0)
        there = good.any(0) & bad.any(0)
        sides = [
            np.einsum("ktd,kt->td", others[:, there], side[:, there] / side[:, there].sum(0)) for side in (good, bad)
        ]
        out.append((sides[0] - sides[1]).mean(0) if there.any() else np.zeros(x.shape[2]))
    return unit(np.array(out))


def read_valuation(x: Float[np.ndarray, "c t d"], rewards: Float[np.ndarray, "c t"]) -> Float[np.ndarray, " c"]:
    """For every concept the correlation, within topics, of the reward of the other concepts' texts with their
    projection on its vector; NaN where either does not vary."""
    out = np.full(len(x), np.nan)
    for c in range(len(x)):
        others, r = np.delete(x, c, axis=0), np.delete(rewards, c, axis=0)
        a = others @ x[c].mean(0)
        a, r = a - a.mean(0), r - r.mean(0)
        size = np.sqrt((a**2).sum() * (r**2).sum())
        out[c] = (a * r).sum() / size if size > 1e-12 * len(x) else np.nan
    return out


def correlation(read: np.ndarray, write: np.ndarray) -> dict[str, Any]:
    """Pearson's r over concepts with Fisher's interval, and Spearman's rho with its own; None with a reason."""
    from scipy.stats import pearsonr

    keep = np.isfinite(read) & np.isfinite(write)
    read, write, n = read[keep], write[keep], int(keep.sum())
    out: dict[str, Any] = {"r": None, "low": None, "high": None, "n": n, "spearman": None, "reason": ""}
    if n < 3 or np.ptp(read) == 0 or np.ptp(write) == 0:
        return out | {"reason": f"{n} concepts" if n < 3 else "one of the two is constant"}
    fit: Any = pearsonr(read, write)
    rho = stats.spearman(read, write)
    out |= {"r": float(fit.statistic), "spearman": rho.value}
    if n < stats.FEWEST:
        return out | {"reason": f"{n} concepts; an interval needs {stats.FEWEST}"}
    if abs(fit.statistic) > 1 - 1e-12:
        return out | {"reason": "a perfect correlation has no Fisher interval"}
    ends = fit.confidence_interval()
    return out | {"low": float(ends.low), "high": float(ends.high)}


def against_sets(r: float | None, read: np.ndarray, write: np.ndarray, size: int, count: int, rng) -> dict[str, Any]:
    """Where `r` stands among the correlations of sets of as many random directions; p is one-sided."""
    if r is None or len(read) <= size:
        return {"quantile": None, "p": None, "median": None, "n": 0}
    picks = np.argsort(rng.random((count, len(read))), axis=1)[:, :size]
    a, b = (values[picks] - values[picks].mean(1, keepdims=True) for values in (read, write))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    null = np.divide((a * b).sum(1), scale, out=np.zeros(count), where=scale > 0)
    same = np.abs(null - r) < _SAME
    lower = (null < r) & ~same
    return {"quantile": float(lower.mean() + same.mean() / 2), "p": float((1 + (~lower).sum()) / (1 + count)),
            "median": float(np.median(null)), "n": count}  # fmt: skip


def against(observed: np.ndarray, null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantile of each observed value among its null (ties half), and two-sided p of |observed|; null [n, ...]."""
    quantile = (null < observed).mean(0) + (null == observed).mean(0) / 2
    p = (1 + (np.abs(null) >= np.abs(observed)).sum(0)) / (1 + len(null))
    return quantile, p
