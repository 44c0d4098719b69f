"""How often the distortion index's intervals hold the truth, and how often noise counts as paid for.

    python benchmarks/distortion_calibration.py [--runs 1000] [--workers 1]

Four tables. Fieller's set for a ratio of two means (correlation .5, true ratio 1.5) against the delta method, the
bottom 0 to 10 standard errors from zero. D and D / Dbar at lambda .5 from estimated slopes and weights that are
rescaled. K (slopes whose Holm-adjusted p is under .05) and the slopes' intervals where the reward is noise of the text.
And the share of studies that count a slope of .3 reward SD. Values are normal, or lognormal with mean and SD the same.
Writes benchmarks/distortion_calibration.md.
"""

import argparse
import functools
import gc
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t

import reward_lens as rl
from reward_lens import data, stats
from reward_lens.methods.shared.fieller import fieller
from reward_lens.methods.terms import sensitivity

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ruled import Ruled, noise  # noqa: E402
from test_distortion import coverage_of_index  # noqa: E402
from workers import add_workers, in_order  # noqa: E402

KINDS = {False: "normal", True: "lognormal"}


def drawn(rng, shape: tuple[int, ...], skewed: bool) -> np.ndarray:
    """Of mean 0 and SD 1."""
    z = rng.standard_normal(shape)
    return (np.exp(z) - np.exp(0.5)) / np.sqrt(np.e**2 - np.e) if skewed else z


def ratio_row(n: int, skewed: bool, bottom: float, runs: int) -> tuple:
    rng = np.random.default_rng(n)
    shared, own = drawn(rng, (runs, n, 1), skewed), drawn(rng, (runs, n, 2), skewed)
    values = (shared + own) / np.sqrt(2) + np.array([1.5, 1.0]) * bottom / np.sqrt(n)
    mean, away = values.mean(1), values - values.mean(1, keepdims=True)
    v = (away**2).sum(1) / (n * (n - 1))
    c = away.prod(-1).sum(1) / (n * (n - 1))
    found = fieller(mean[:, 0], mean[:, 1], v[:, 0], v[:, 1], c, n - 1)
    ratio = mean[:, 0] / mean[:, 1]
    error = np.sqrt(np.maximum(v[:, 0] - 2 * ratio * c + ratio**2 * v[:, 1], 0)) / np.abs(mean[:, 1])
    delta = np.abs(ratio - 1.5) <= t.ppf(0.975, n - 1) * error
    shares = (found.contains(1.5), found.unbounded, delta)
    return n, KINDS[skewed], f"{bottom:g}", *(f"{x.mean():.3f}" for x in shares)


def index_row(n: int, skewed: bool, w: list[float], runs: int) -> tuple:
    held = coverage_of_index(runs, n, w, seed=n, skewed=skewed)
    return n, KINDS[skewed], w, *("  ".join(f"{x:.3f}" for x in row) for row in held)


def slope_row(n: int, skewed: bool, runs: int) -> tuple:
    """The contrasts are those of real edits of real responses; every text's reward is drawn anew."""
    contrasts, own, n_edits, n_pairs = edited()
    rng, wrong, held = np.random.default_rng(n), [], []
    for run in range(runs):
        plain, changed = (drawn(rng, (len(contrasts.prompt), k), skewed) for k in (1, n_edits))
        y = np.where(contrasts.there, changed - plain, 0.0)
        some = rng.permutation(n_pairs)[:n]
        by_prompt = (sensitivity._slopes(contrasts, c, i, y, n_pairs) for i, c in enumerate(own))
        values = np.stack([column[some] for column in by_prompt], 1)
        p = [stats.sign_flip_test(column, n_resamples=999, seed=run).p for column in values.T]
        over = stats.mean_interval(values, np.arange(n), n_boot=500, seed=run)
        wrong.append(np.nanmin(stats.adjust(p)) < 0.05)
        held.append(np.mean(((over.low <= 0) & (over.high >= 0))[over.n_clusters >= stats.FEWEST]))
    return n, f"{KINDS[skewed]} noise", f"{np.mean(wrong):.3f}", f"{np.mean(held):.3f}"


@functools.cache
def edited() -> tuple:
    """Once a process: contrasts, the edits of each attribute, and the numbers of edits and pairs."""
    gc.freeze()  # statsmodels collects garbage at every adjustment
    pairs = data.as_pairs(list(rl.load_pairs("diagnostic"))[::3])
    attributes = sensitivity._attributes(sensitivity.DEFAULT_EDITS)
    edits = [e for a in attributes.values() for e in a.edits]
    own = [np.isin(np.arange(len(edits)), [edits.index(e) for e in a.edits]) for a in attributes.values()]
    contrasts, _ = sensitivity._contrasts(Ruled(noise(0)), pairs, attributes, edits, np.ones(len(attributes)))
    return contrasts, own, len(edits), len(pairs)


def power_row(n: int, runs: int) -> tuple:
    """Slopes of single prompts scatter with an SD of 1 reward SD about .3; Holm over 5 attributes, 4 of them null."""
    rng, hits, false = np.random.default_rng(n), 0, 0
    for _ in range(runs):
        values = rng.standard_normal((n, 5)) + np.array([0.3, 0, 0, 0, 0])
        p = stats.adjust([stats.sign_flip_test(column, n_resamples=999).p for column in values.T])
        hits, false = hits + (p[0] < 0.05), false + (p[1:] < 0.05).any()
    return n, f"{hits / runs:.3f}", f"{false / runs:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    add_workers(parser)
    args = parser.parse_args()
    runs, few = args.runs, max(20, args.runs // 2)
    torch.set_num_threads(1)
    lines = ["# Calibration of the distortion index", "",
             f"`python benchmarks/distortion_calibration.py --runs {runs}`. All claims are 95%."]  # fmt: skip
    both = (False, True)
    tables = (
        (f"A ratio of two means ({10 * runs} runs a row)",
         ("prompts", "values", "bottom, in SE from 0", "Fieller holds 1.5", "without ends", "delta method holds 1.5"),
         ratio_row,
         [(n, s, bottom, 10 * runs) for s in both for n in (6, 12, 50, 200) for bottom in (0.0, 1.0, 3.0, 10.0)]),
        (f"The rescaled index at lambda .5 ({runs} runs a row; r = 1, 2, -.5)",
         ("prompts", "values", "weights", "D, by dimension", "D / Dbar, by dimension"),
         index_row, [(n, s, w, runs) for s in both for n in (20, 100) for w in ([1.5, 1.0, 0.5], [1.5, 1.0, 0.1])]),
        (f"Slopes of noise, the default edits on the diagnostic set ({few} runs a row)",
         ("prompts", "reward", "any slope counts (K > 0)", "95% intervals that hold 0"),
         slope_row, [(n, s, few) for s in both for n in (10, 20, 50, 100)]),
        (f"Slopes that are counted ({few} runs a row)",
         ("prompts", "counts the slope of .3", "counts a null slope"),
         power_row, [(n, few) for n in (20, 50, 100, 200)]),
    )  # fmt: skip
    for title, head, row, tasks in tables:
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for cells in in_order(row, tasks, args.workers):
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
