"""How often the intervals of a comparison of models hold the truth, and what CKA's permutation test says of noise.

    python benchmarks/compare_calibration.py [--runs 500]

Two columns of margins are drawn with a known correlation: normal, or with the tails of a t distribution of 5 degrees of
freedom; two pairs a prompt share half of their variance. States are normal with a known covariance, so that CKA has a
known population value. Reported by number of prompts, over runs: the share of 95% intervals that hold the truth.
Agreement, kappa and Spearman are held against the figure of 400,000 draws. Writes benchmarks/compare_calibration.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from reward_lens.methods.comparison import compared_scores as scores
from reward_lens.methods.comparison import compared_states as states

SIZES = (6, 12, 20, 50, 150)
WIDTHS = (8, 400)
FIGURES: dict[str, Callable] = {
    "agreement": scores.agreement,
    "kappa": scores.kappa,
    "reward pearson": scores.uncentred_correlation,  # what it is where the pairs share no response
    "margin pearson": scores.correlation,
    "margin spearman": lambda x, y, prompts: scores.correlation(x, y, prompts, ranks=True),
}


def margins(rng, n: int, rho: float, heavy: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of n prompts with two pairs each; a third of a SD above 0, as of a model that is mostly right."""
    prompts = np.repeat(np.arange(n), 2)

    def column(common):
        drawn = (rng.normal(size=n)[prompts] + rng.normal(size=2 * n)) / np.sqrt(2)
        return np.sqrt(rho) * common + np.sqrt(1 - rho) * drawn

    common = (rng.normal(size=n)[prompts] + rng.normal(size=2 * n)) / np.sqrt(2)
    x, y = column(common), column(common)
    if heavy:  # one scale a prompt for both models: prompts differ in how large their margins are
        scale = np.sqrt(5 / rng.chisquare(5, size=n))[prompts]
        x, y = x * scale, y * scale
    return x + 1 / 3, y + 1 / 3, prompts


def truth(figure: str, rho: float, heavy: bool) -> float:
    x, y, _ = margins(np.random.default_rng(99), 200_000, rho, heavy)
    if figure == "agreement":
        return float(np.mean(x * y > 0))
    if figure == "kappa":
        chance = scores.expected_agreement(x, y)
        return float((np.mean(x * y > 0) - chance) / (1 - chance))
    if figure == "margin spearman":
        x, y = x.argsort().argsort(), y.argsort().argsort()
    if figure == "reward pearson":
        return float(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))
    return float(np.corrcoef(x, y)[0, 1])


def held(found: list, value: float) -> str:
    inside = np.array([f.low <= value <= f.high for f in found if np.isfinite(f.low)], float)
    return f"{inside.mean():.3f}" + (f" ({len(inside)})" if len(inside) < len(found) else "")


def of_margins(runs: int) -> list[str]:
    lines = ["| figure | tails | correlation | truth | " + " | ".join(f"{n} prompts" for n in SIZES) + " |"]
    lines.append("| --- " * (4 + len(SIZES)) + "|")
    for name, figure in FIGURES.items():
        for heavy in (False, True):
            for rho in (0.0, 0.7):
                value = truth(name, rho, heavy)
                cells = [
                    held([figure(*margins(np.random.default_rng(run), n, rho, heavy)) for run in range(runs)], value)
                    for n in SIZES
                ]
                row = [name, "heavy" if heavy else "normal", f"{rho:g}", f"{value:.3f}", *cells]
                lines.append("| " + " | ".join(row) + " |")
                print(lines[-1], flush=True)
    return lines


def of_states(runs: int) -> list[str]:
    lines = ["| states | width | CKA | prompts | mean estimate | intervals that hold CKA | p <= .05 |"]
    lines.append("| --- " * 7 + "|")
    for width in WIDTHS:
        sizes = np.arange(1, width + 1) ** -0.5
        for noise in (None, 1.0):
            for n in SIZES:
                found, p = [], []
                for run in range(runs):
                    rng = np.random.default_rng(run)
                    x = rng.normal(size=(n, width)) * sizes
                    y = rng.normal(size=(n, width)) * sizes
                    y = y if noise is None else x + noise * y
                    a, b = states.centred_gram(x), states.centred_gram(y)
                    found.append(states.cka_of(a, b))
                    null = states.cka_null(a, b, 39, runs + run)
                    p.append((1 + (null >= found[-1].value - 1e-12).sum()) / 40)
                value = 0.0 if noise is None else 0.5
                row = ["unrelated" if noise is None else "half in common", str(width), f"{value:g}", str(n)]
                row += [
                    f"{np.mean([f.value for f in found]):.3f}",
                    held(found, value),
                    f"{np.mean(np.array(p) <= 0.05):.3f}",
                ]
                lines.append("| " + " | ".join(row) + " |")
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    args = parser.parse_args()
    half = 1.96 * np.sqrt(0.05 * 0.95 / args.runs)
    lines = [
        "# Calibration of the comparison of models", "",
        f"`python benchmarks/compare_calibration.py --runs {args.runs}`. Share of 95% intervals that hold the truth; "
        f"half of a 95% interval of a share of .95 is {half:.3f}. In brackets the number of runs that had an interval, "
        "where not all had. Two pairs a prompt.", "", *of_margins(args.runs), "",
        "States with variances 1, 1/2, 1/3, ... by direction; y is noise of the same variances, or x plus such noise.",
        "", *of_states(args.runs),
    ]  # fmt: skip
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
