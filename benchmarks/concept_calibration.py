"""How often the tests of concept vectors claim something where labels say nothing, and what they find where they do.

    python benchmarks/concept_calibration.py [--runs 300]

States are drawn, not computed: topic + effect * concept + noise of a power-law spectrum (tests/planted_concepts.py),
with texts of the opposite for the sign test. Every cell is the share of p <= .05, uncorrected, over runs and concepts;
at effect 0 it is the size of the test. Also how often the 95% intervals of the reliability (split halves) and of the
direct valuation hold what another sample gives on average. Writes benchmarks/concept_calibration.md.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planted_concepts import coverage, rates  # noqa: E402

SIZES = ((6, 8), (6, 16), (12, 20), (12, 40))
EFFECTS = (0.0, 0.3, 0.7)
WIDTH = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    runs = parser.parse_args().runs
    lines = [
        "# Calibration of the statistics of concept vectors", "",
        f"`python benchmarks/concept_calibration.py --runs {runs}`: shares of p <= .05, uncorrected; in brackets half "
        f"of a 95% interval over runs. Width {WIDTH}.", "",
    ]  # fmt: skip
    header = None
    for effect in EFFECTS:
        for n_concepts, n_topics in SIZES:
            found = rates(runs, n_concepts=n_concepts, n_topics=n_topics, d=WIDTH, effect=effect)
            if header is None:
                header = ["effect", "concepts", "topics", *found]
                lines += ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
            cells = [f"{share:.3f} ({1.96 * error:.3f})" for share, error in found.values()]
            lines.append("| " + " | ".join([f"{effect:g}", str(n_concepts), str(n_topics), *cells]) + " |")
            print(lines[-1], flush=True)
    lines += ["", "Intervals that hold the truth (95% claimed):", "",
              "| effect | topics | reliability | direct valuation |", "| --- " * 4 + "|"]  # fmt: skip
    for effect in EFFECTS:
        for n_topics in (8, 16, 40):
            held = coverage(runs, n_topics=n_topics, d=WIDTH, effect=effect)
            lines.append(f"| {effect:g} | {n_topics} | {held['reliability']:.3f} | {held['direct']:.3f} |")
            print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
