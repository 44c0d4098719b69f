"""The exactness contract in numbers: the largest gap of each identity on every architecture family of the tests.

    python benchmarks/conformance.py

Writes benchmarks/conformance.md. A gap is divided by the scale its identity names; E5 is in reward units.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch

import reward_lens as rl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import FAMILIES, TEXT_PAIRS, tiny_model  # noqa: E402

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
COLUMNS = ("E1", "E2 lens", "E2 sum", "E3 heads", "E3 neurons", "E3 sources", "E4", "E5", "E6", "E9")
LIMITS = {torch.float32: (1e-5, *[1e-5] * 6, 0.0, 1e-5, 1e-6), torch.bfloat16: (None, *[1e-2] * 6, 0.0, 1e-2, None)}


def gaps(family: str, dtype: torch.dtype) -> list[float]:
    """One number a column; NaN where the model has no such split and says so."""
    rm = rl.RewardModel(*tiny_model(family, dtype=dtype, seed=1), name=family)
    equal = [p for p, (a, b) in zip(PAIRS, rm.tokenize_pairs(PAIRS), strict=True) if len(a) == len(b)]
    scores = rm.score_pairs(PAIRS).value.sel(side=["chosen", "rejected"])
    own = np.array([[rm.hf_score(p.prompt, r) for r in p.responses] for p in PAIRS])
    alone = np.array([[rm.score(p.prompt, r) for r in p.responses] for p in PAIRS])
    row = [float((np.abs(alone - own) / np.maximum(np.abs(own), float(scores.std()))).max())]
    parts = rl.contributions(rm, PAIRS)
    row += [check(rl.reward_lens(rm, PAIRS, norm="frozen"), "last depth"), check(parts, "completeness")]
    for by in ("head", "neuron", "token"):
        try:
            row.append(check(rl.contributions(rm, PAIRS, by=by), "finer split"))
        except rl.StructureError:
            row.append(float("nan"))
    row.append(check(parts, "margin split"))
    sites = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    acts = rl.capture(rm, equal, sites, at="all")
    own = rl.from_run(acts)
    unchanged = [rl.intervene(rm, equal, {s: own}, at="all").value.sel(state="change") for s in sites]
    row.append(max(float(np.abs(change).max()) for change in unchanged))
    other = rl.from_run(acts.swapped())
    every = rl.intervene(rm, equal, dict.fromkeys(sites, other), at="all").value
    off = every.sel(side="chosen", state="intervened") - every.sel(side="rejected", state="clean")
    row.append(float(np.abs(off).max() / np.abs(every.sel(state="clean")).max()))
    swapped = rl.contributions(rm, [rl.Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS]).value
    total = parts.value.sel(side="margin") + swapped.sel(side="margin")
    return [*row, float(np.abs(total).max() / np.abs(parts.value).max())]


def check(result: rl.Result, name: str) -> float:
    return next(c.gap for c in result.checks if c.name == name)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [
        "# Conformance", "",
        f"Largest gap of each identity over {len(PAIRS)} pairs; {len(FAMILIES)} families, tiny random models of the "
        f"real classes, every norm and bias randomised; torch {torch.__version__}. A dash: refused with the reason.",
        "",
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        limits = ["at load" if x is None else f"{x:.0e}" for x in LIMITS[dtype]]
        lines += [f"## {str(dtype).removeprefix('torch.')}", "", "| family | " + " | ".join(COLUMNS) + " |"]
        lines += ["| --- " * (len(COLUMNS) + 1) + "|", "| tolerance | " + " | ".join(limits) + " |"]
        for family in FAMILIES:
            row = gaps(family, dtype)
            print(family, dtype, flush=True)
            lines.append(f"| {family} | " + " | ".join("-" if np.isnan(x) else f"{x:.0e}" for x in row) + " |")
        lines.append("")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
