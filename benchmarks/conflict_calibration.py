"""How often `term_conflict` labels two terms, rightly and wrongly, by the number of prompts and the true cosine.

    python benchmarks/conflict_calibration.py [--runs 200] [--workers 1]

States are drawn as in tests/term_states.py: a power-law spectrum, two mean differences with a known cosine, and scores
that are independent where it is 0; n pairs a term and n prompts of four responses. `shift` is the length of a
difference in units of the states' spread. Reported by test: the share of each label, and for the direction test of
95% intervals that hold the true cosine, among the runs that have one with both reliabilities of at least .5.
Writes benchmarks/conflict_calibration.md.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reward_lens.methods.terms.conflict import EDGE, TESTS, related  # noqa: E402
from term_states import planted_terms  # noqa: E402
from workers import add_workers, in_order  # noqa: E402

SIZES = (10, 30, 100, 300)
CASES = ((0.0, 0.15), (0.0, 0.6), (-0.6, 0.15), (-0.6, 0.6), (0.6, 0.15))
LABELS = ("aligned", "orthogonal", "in_conflict", "undetermined")


def measured(n: int, cosine: float, shift: float, run: int) -> tuple[dict[str, str], bool | None]:
    """Labels by test and the joint one, and whether the direction's interval holds the cosine, if it has one."""
    a, b, pool = planted_terms(n, cosine, seed=run, shift=shift)
    table, relied = related([a, b], TESTS, dict.fromkeys(TESTS, EDGE), pool, 500, run)
    told = {test: str(table.text["label"][0, 1, k]) for k, test in enumerate(TESTS)}
    told["joint"] = str(table.joint()[0][0, 1])
    low, high = (float(table.cells[end][0, 1, TESTS.index("direction")]) for end in ("low", "high"))
    reliable = min(m.value for m in relied.values()) >= 0.5 and np.isfinite([low, high]).all()
    return told, low <= cosine <= high if reliable else None


def rows_of(n: int, cosine: float, shift: float, runs: list[tuple[dict[str, str], bool | None]]) -> list[list[str]]:
    """Rows of the table, one a test and one of the joint label."""
    rows = []
    held = [right for _, right in runs if right is not None]
    for test in (*TESTS, "joint"):
        shares = [f"{np.mean([told[test] == label for told, _ in runs]):.3f}" for label in LABELS]
        covered = f"{np.mean(held):.3f} of {len(held)}" if test == "direction" and held else ""
        rows.append([f"{cosine:g}", f"{shift:g}", str(n), test, *shares, covered])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    add_workers(parser)
    args = parser.parse_args()
    lines = [
        "# Labels of two reward terms by number of prompts", "",
        f"`python benchmarks/conflict_calibration.py --runs {args.runs}`: {args.runs} runs a row; shares of labels.",
        "", "| true cosine | shift | prompts | test | " + " | ".join(LABELS) + " | intervals that hold the cosine |",
        "| --- " * 9 + "|",
    ]  # fmt: skip
    settings = [(n, *case) for case in CASES for n in SIZES]
    found = in_order(measured, [(*one, run) for one in settings for run in range(args.runs)], args.workers)
    for one in settings:
        for row in rows_of(*one, [next(found) for _ in range(args.runs)]):
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
