"""How often `detect_cascade` says something wrong in runs without a cascade, and how often it finds one that is there.

    python benchmarks/cascade_calibration.py [--runs 400]

Six dimensions, logits with AR(1) noise (phi; its SD, half of the variance shared by the dimensions). Hacking is flat at
.3%, at the edge of 2%, or rises to 80% in the middle of the run. Dimensions are flat (.3% to 3.5%), rise with hacking
(five of six, to between 5% and 37%), or follow a logit-linear trend over the whole run whatever hacking does. Reported:
the share with an onset, with each label, with p <= .05 of the joint change point, and of 95% intervals of the score's
change that hold the true one (runs with an onset where it was planted). Writes benchmarks/cascade_calibration.md.
"""

import argparse
import gc
import sys
from pathlib import Path

import numpy as np

from reward_lens.methods.training.cascade import detect_cascade

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoint_runs import run as simulated  # noqa: E402

FLAT = [("rises", "flat", None, 20, n, phi, sd) for n in (100, 200) for phi, sd in ((0.0, 0.0), (0.5, 0.4), (0.8, 0.4))]
SCENES = [
    # hacking, dims, dims of the control run, steps, episodes, phi, sd
    ("flat", "flat", None, 20, 200, 0.5, 0.4),
    ("edge", "flat", None, 20, 200, 0.5, 0.4),
    *FLAT,
    ("rises", "flat", "flat", 20, 200, 0.5, 0.4),
    ("rises", "flat", None, 12, 200, 0.5, 0.4),
    ("rises", "flat", None, 40, 200, 0.8, 0.4),
    ("rises", "trend", None, 20, 200, 0.5, 0.4),
    ("rises", "trend", "trend", 20, 200, 0.0, 0.0),
    ("rises", "trend", "trend", 20, 200, 0.5, 0.4),
    ("rises", "rise", None, 20, 200, 0.5, 0.4),
    ("rises", "rise", "flat", 20, 200, 0.5, 0.4),
    ("rises", "rise", None, 12, 200, 0.5, 0.4),
    ("rises", "rise", "flat", 12, 200, 0.5, 0.4),
    ("rises", "rise", None, 20, 50, 0.5, 0.4),
    ("rises", "rise", "flat", 20, 50, 0.5, 0.4),
]
HEADS = ("hacking", "dimensions", "control", "steps", "episodes", "phi", "sd", "onset", "cascade", "no cascade",
         "undetermined", "joint p <= .05", "covers")  # fmt: skip


def measured(scene: tuple, runs: int) -> list[str]:
    hacking, dims, control, n_steps, n, phi, sd = scene
    onset, labels, joint, covers = [], [], [], []
    for seed in range(runs):
        settings = {"n_steps": n_steps, "n": n, "phi": phi, "sd": sd}
        other = None if control is None else simulated(10**6 + seed, "flat", control, **settings)
        result = detect_cascade(
            **simulated(seed, hacking, dims, **settings), control=other, n_permutations=199, seed=seed
        )
        onset.append(result.meta["onset"]["step"] is not None)
        labels.append(result.meta["label"])
        joint.append(result.meta["joint"]["p"] <= 0.05)
        measure = "change" if control is None else "change beyond control"
        low, high = (float(end.sel(dimension="score", measure=measure)) for end in (result.low, result.high))
        if onset[-1] and dims == (control or "flat"):
            covers.append(low <= 0 <= high)
    shares = [onset, *([x == label for x in labels] for label in ("cascade", "no cascade", "undetermined")), joint]
    cells = [f"{np.mean(s):.3f}" for s in shares] + [f"{np.mean(covers):.3f}" if covers else ""]
    return [hacking, dims, control or "none", *map(str, scene[3:]), *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    args = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage at every adjustment of p
    lines = [
        "# Calibration of the cascade", "",
        f"`python benchmarks/cascade_calibration.py --runs {args.runs}`: {args.runs} simulated runs a row; half of a "
        f"95% interval of a share of .05 is {1.96 * np.sqrt(0.05 * 0.95 / args.runs):.3f}. Share of runs with an "
        "onset, with each label (none without an onset), with p <= .05 of the joint change point, and of intervals "
        "that hold the true change of 0.", "",
        "| " + " | ".join(HEADS) + " |", "| --- " * len(HEADS) + "|",
    ]  # fmt: skip
    for scene in SCENES:
        lines.append("| " + " | ".join(measured(scene, args.runs)) + " |")
        print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
