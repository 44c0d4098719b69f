"""How often a linear probe finds a property that is not there, and one that is.

    python benchmarks/linear_probe_calibration.py [--runs 400] [--workers 1]

States are normal (white, or with a power-law spectrum), n prompts of one or two rows. Labels are noise, or move the
states along one random direction by `shift` within-class SDs. Reported, over runs: the mean AUC, the share of 95%
intervals that hold .5, of p < .05 and p < .005 (20 controls), and of selectivity intervals that lie above 0.
Writes benchmarks/linear_probe_calibration.md.
"""

import argparse
from pathlib import Path

import numpy as np

from reward_lens.methods.concepts.probe_fits import (
    against_controls,
    control_labels,
    cross_fit,
    evaluated,
    interval,
    make_task,
)
from workers import add_workers, in_order

SETTINGS = ((20, 3, 1), (20, 200, 2), (50, 10, 1), (50, 200, 1), (100, 200, 2))  # prompts, dimensions, rows a prompt
SHIFTS = (0.0, 1.5)
CONTROLS = 20


def states_and_labels(n: int, d: int, rows: int, shift: float, falling: bool, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng([seed, n, d])
    labels = rng.permutation(np.arange(n * rows) % 2).astype(float)
    states = rng.standard_normal((n * rows, d))
    direction = rng.standard_normal(d)
    states += shift * np.outer(labels - 0.5, direction / np.linalg.norm(direction))
    if falling:
        states = states * np.arange(1, d + 1) ** -1.0 @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    return states, labels, np.repeat(np.arange(n), rows)


def measured(n: int, d: int, rows: int, shift: float, falling: bool, run: int) -> list[float]:
    """The columns of the table for one run."""
    states, labels, groups = states_and_labels(n, d, rows, shift, falling, run)
    task = make_task(labels, groups, seed=run + 1)
    targets = np.concatenate([labels[None], control_labels(task, CONTROLS, run + 2)])
    scores, _ = cross_fit(states, task, targets)
    value, left_out = evaluated(task, labels, scores[0])
    low, high = interval(task, value, left_out, run)
    drawn = np.array([evaluated(task, y, s)[0] for y, s in zip(targets[1:], scores[1:], strict=True)])
    against = against_controls(value, low, high, drawn)
    p = against["p"]
    return [float(x) for x in (value, low <= 0.5 <= high, p < 0.05, p < 0.005, against["selectivity_low"] > 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    add_workers(parser)
    args = parser.parse_args()
    head = ["prompts", "rows each", "dimensions", "spectrum", "shift", "AUC", "intervals that hold .5", "p < .05",
            "p < .005", "selectivity above 0"]  # fmt: skip
    lines = [
        "# Calibration of linear probes", "",
        f"`python benchmarks/linear_probe_calibration.py --runs {args.runs}`: {args.runs} runs a row, {CONTROLS} "
        "controls. In brackets half of a 95% interval over runs.", "",
        "| " + " | ".join(head) + " |", "| --- " * len(head) + "|",
    ]  # fmt: skip
    settings = [(*one, shift, falling) for shift in SHIFTS for falling in (False, True) for one in SETTINGS]
    found = in_order(measured, [(*one, run) for one in settings for run in range(args.runs)], args.workers)
    for n, d, rows, shift, falling in settings:
        of_runs = np.array([next(found) for _ in range(args.runs)])
        half = 1.96 * of_runs.std(0, ddof=1) / np.sqrt(args.runs)
        cells = [f"{m:.3f} ({h:.3f})" for m, h in zip(of_runs.mean(0), half, strict=True)]
        kind = "power law" if falling else "white"
        lines.append("| " + " | ".join([str(n), str(rows), str(d), kind, f"{shift:g}", *cells]) + " |")
        print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
