"""Measures of two summarised models, and of several by relative depth: what `compare` puts in its Result.

Depth is relative: layer l of n lies at l / n. Profiles over layers are summed in as many bins as the shallowest of the
models has layers (at most 10), attention and MLP apart; lens curves are read between depths by a straight line.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_lens import data, stats
from reward_lens.methods.comparison import compared_scores as scores
from reward_lens.methods.comparison import compared_states as states
from reward_lens.methods.comparison.model_summary import Summary, Texts
from reward_lens.stats import Estimate

MOST_BINS = 10
STATES = {"prompts": "cka prompts", "differences": "cka differences"}
UNITS = {
    "agreement": "fraction", "kappa": "kappa", "reward pearson": "correlation", "reward spearman": "correlation",
    "margin pearson": "correlation", "margin spearman": "correlation", "lens": "correlation",
    "contributions": "correlation", "effects": "correlation", "cka prompts": "cka", "cka differences": "cka",
    "reward angle": "cosine",
}  # fmt: skip
FLAT = "a profile does not vary between bins, in every pair"


class Cell(NamedTuple):
    """One measure of two models; `expected` is what it would be by chance, `p` of the permutation test."""

    estimate: Estimate
    expected: float = float("nan")
    p: float = float("nan")


def between(a: Summary, b: Summary, pairs: data.Pairs, n_bins: int, n_permutations: int, seed: int) -> dict[str, Cell]:
    """By measure, in the order of `UNITS`, those that both summaries allow."""
    prompts, texts = [p.prompt_key for p in pairs], Texts(pairs)
    x, y = (s.rewards.reshape(-1)[texts.first] for s in (a, b))
    out = {
        "agreement": Cell(scores.agreement(a.margins, b.margins, prompts),
                          scores.expected_agreement(a.margins, b.margins)),
        "kappa": Cell(scores.kappa(a.margins, b.margins, prompts), 0.0),
        "reward pearson": Cell(scores.correlation(x, y, texts.prompts, within=True)),
        "reward spearman": Cell(scores.correlation(x, y, texts.prompts, within=True, ranks=True)),
        "margin pearson": Cell(scores.correlation(a.margins, b.margins, prompts)),
        "margin spearman": Cell(scores.correlation(a.margins, b.margins, prompts, ranks=True)),
    }  # fmt: skip
    for name in ("lens", "contributions", "effects"):
        if getattr(a, name) is not None and getattr(b, name) is not None:
            first, second = (profile(s, name, n_bins) for s in (a, b))
            if name == "lens":
                first, second = np.diff(first), np.diff(second)
            rows = [v.reshape(len(pairs), -1) for v in (first, second)]
            out[name] = Cell(_mean_correlation(rows[0], rows[1], (a.noise_floor, b.noise_floor), prompts, seed))
    if a.states is not None and b.states is not None:
        for kind, name in STATES.items():
            first, second = (states.centred_gram(getattr(s.states, kind)[-1]) for s in (a, b))
            out[name] = _with_null(first, second, n_permutations, seed)
        out["reward angle"] = Cell(
            states.reward_angle(a.states.scaled, a.states.row, b.states.scaled, b.states.row, texts.prompts)
        )
    return out


def profile(summary: Summary, name: str, n_bins: int) -> np.ndarray:
    """Margins of a model by relative depth: [pair, depth] of the lens, [pair, kind, bin] of contributions, effects."""
    found = getattr(summary, name)
    n_layers = summary.about["n_layers"]
    if name == "lens":
        at = np.linspace(0, n_layers, n_bins + 1)
        below = np.minimum(at.astype(int), n_layers - 1)
        part = at - below
        return found[:, below] * (1 - part) + found[:, below + 1] * part
    bins = np.arange(n_layers) * n_bins // n_layers
    return np.stack([found[..., bins == i].sum(-1) for i in range(n_bins)], -1)


def bins_of(summaries: Sequence[Summary]) -> int:
    """As many bins as the shallowest model has layers, at most 10."""
    return min(MOST_BINS, *(s.about["n_layers"] for s in summaries))


def alignment(a: Summary, b: Summary) -> float:
    """Correlation of the entries of two models' states; NaN without states or where the widths differ."""
    if a.states is None or b.states is None:
        return float("nan")
    return states.state_alignment(a.states.scaled, b.states.scaled)


def two_of(summaries: Sequence) -> list[tuple[int, int]]:
    """Every two of them, by number."""
    return [(i, j) for i in range(len(summaries)) for j in range(i + 1, len(summaries))]


def pair_name(a: Summary, b: Summary) -> str:
    return f"{a.name} ~ {b.name}"


def plain(values) -> Any:
    """Arrays as nested lists and NaN as None, for JSON."""
    if isinstance(values, np.ndarray | list):
        return [plain(v) for v in values]
    return None if not np.isfinite(values) else float(values)


def _with_null(a, b, n_permutations: int, seed: int) -> Cell:
    found = states.cka_of(a, b)
    if np.isnan(found.value) or found.n_clusters < stats.FEWEST or not n_permutations:
        return Cell(found)
    null = states.cka_null(a, b, n_permutations, seed)
    return Cell(found, float(null.mean()), float((1 + (null >= found.value - 1e-12).sum()) / (1 + n_permutations)))


def _mean_correlation(x: np.ndarray, y: np.ndarray, floors, prompts: Sequence[str], seed: int) -> Estimate:
    """Mean over pairs of the correlation over bins of `x` and `y` [pair, bin]; flat rows have none."""
    away = [v - v.mean(1, keepdims=True) for v in (x, y)]
    sizes = [np.sqrt((v * v).sum(1)) for v in away]
    flat = [np.ptp(v, axis=1) <= floor for v, floor in zip((x, y), floors, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(flat[0] | flat[1], np.nan, (away[0] * away[1]).sum(1) / (sizes[0] * sizes[1])).clip(-1, 1)
    over = stats.mean_interval(rho, prompts, seed=seed, limits=(-1.0, 1.0))
    return scores.from_interval(over, "" if np.isfinite(rho).any() else FLAT)
