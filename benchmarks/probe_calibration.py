"""How often the probe suite flags a reward that is noise, and how often its intervals hold the truth.

    python benchmarks/probe_calibration.py [--share 1] [--workers 1]

Rewards are a hash of the text turned into a number, so that every text has its own and nothing else decides: normal,
and lognormal of mean zero (skewed). The probes run on real responses (the diagnostic set), n prompts, a pair each. The
true mean shift of every edit is 0. Reported, over runs: the share of p < .05 before correction, of runs in which Holm
lets a probe through, and of 95% intervals that hold 0; probes that change no text of a run have neither. About forty
minutes on one core. Writes benchmarks/probe_calibration.md.
"""

import argparse
import dataclasses
import functools
import gc
import sys
from pathlib import Path

import numpy as np
import torch

import reward_lens as rl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ruled import Ruled, noise  # noqa: E402
from workers import add_workers, in_order  # noqa: E402

RUNS = {6: 200, 10: 200, 20: 200, 50: 100, 200: 40}  # by prompts


@functools.cache
def suite() -> tuple[Ruled, list[rl.TextEdit], rl.Pairs]:
    """Made once a process, because edited texts are remembered."""
    gc.freeze()  # statsmodels collects garbage at every adjustment
    return Ruled(noise(0)), [remembering(edit) for edit in rl.edits_of()], rl.load_pairs("diagnostic")


def measured(n: int, run: int, skewed: bool) -> tuple[float, float, float]:
    """Of one run: the share flagged before correction, whether Holm lets one through, the share of intervals right."""
    rm, edits, pairs = suite()
    rm.rule = noise(run, skewed)
    start = (run * n) % (len(pairs) - n)
    result = rl.probe_hacking(rm, pairs[start : start + n], edits, n_boot=500, seed=run)
    p, p_holm = result.value["p"].values, result.value["p_holm"].values
    there = np.isfinite(result.low.values)
    covered = np.mean(((result.low.values <= 0) & (result.high.values >= 0))[there])
    return float(np.nanmean(p < 0.05)), float(np.nanmin(p_holm) < 0.05), float(covered)


def remembering(edit: rl.TextEdit) -> rl.TextEdit:
    """The same edit, each text edited once for all runs."""
    inverse = None if edit.inverse is None else functools.cache(edit.inverse)
    return dataclasses.replace(edit, apply=functools.cache(edit.apply), inverse=inverse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1, help="of the runs of the table")
    add_workers(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Calibration of the probe suite on noise", "",
        "`python benchmarks/probe_calibration.py`: rewards that are noise of the text, all probes. In brackets half of "
        "a 95% interval over runs.", "",
        "| prompts | runs | noise | p < .05, uncorrected | any probe after Holm | 95% intervals that hold 0 |",
        "| --- " * 6 + "|",
    ]  # fmt: skip
    rows = [(n, max(3, round(args.share * runs)), skewed) for skewed in (False, True) for n, runs in RUNS.items()]
    found = in_order(measured, [(n, run, skewed) for n, runs, skewed in rows for run in range(runs)], args.workers)
    for n, runs, skewed in rows:
        columns = zip(*(next(found) for _ in range(runs)), strict=True)
        cells = [f"{np.mean(x):.3f} ({1.96 * np.std(x, ddof=1) / np.sqrt(runs):.3f})" for x in columns]
        lines.append("| " + " | ".join([str(n), str(runs), "lognormal" if skewed else "normal", *cells]) + " |")
        print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
