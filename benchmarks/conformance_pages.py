"""The tables of a conformance run as pages: benchmarks/conformance.md in numbers, docs/models.md for users."""

from pathlib import Path

import pandas as pd
import torch
import transformers

from every_method import READOUT_METHODS
from identities import IDENTITIES, LIMITS, over_limit

HERE = Path(__file__).parent
ABOUT = ("model", "class", "readout", "directions", "blocks", "heads", "neurons", "reuse")


def write_pages(methods: pd.DataFrame, identities: pd.DataFrame) -> None:
    """Both pages; raises if a gap is over its limit, so that no page shows one."""
    rows = identities.to_dict("records")
    too_large = [
        f"{row['model']} {row['precision']} {gap}" for row in rows for gap in over_limit(row, row["precision"])
    ]
    if too_large:
        raise SystemExit("over the tolerance: " + "; ".join(too_large))
    (HERE / "conformance.md").write_text(_numbers(methods, identities))
    (HERE.parent / "docs" / "models.md").write_text(_models(methods, identities))


def _numbers(methods: pd.DataFrame, identities: pd.DataFrame) -> str:
    n_families = int((methods["readout"] == "linear").sum())
    lines = [
        "# Conformance", "",
        f"Largest gap of each identity and the outcome of every method on {len(methods)} tiny random models: "
        f"{methods['class'].nunique()} classes, {n_families} of the models with a linear head; every norm and bias is "
        f"randomised. torch {torch.__version__}, transformers {transformers.__version__}. A dash: refused with the "
        "reason. E1 own reward, E2 completeness, E3 finer splits, E4 margins, E5 patching what is equal, E6 patching "
        "everything, E9 swapping the pair.", "",
    ]  # fmt: skip
    for precision, limits in LIMITS.items():
        lines += [f"## {precision}", "", _row("model", *IDENTITIES), _row(*["---"] * (len(IDENTITIES) + 1))]
        lines.append(_row("tolerance", *("at load" if x is None else f"{x:.0e}" for x in limits)))
        for row in identities[identities["precision"] == precision].to_dict("records"):
            cells = ["-" if pd.isna(row[name]) else f"{row[name]:.0e}" for name in IDENTITIES]
            lines.append(_row(row["model"], *cells))
        lines.append("")
    lines += ["## Methods", "", f"{len(_names(methods))} calls on each model, one of every method and of its forms; "
              "`conformance_methods.csv` has every outcome. Answered: no check is out of tolerance (one that is "
              "raises); used: the largest share of a tolerance that any check used.", "",
              _row("model", "answered", "used", "refused"), _row(*["---"] * 4)]  # fmt: skip
    for row in methods.to_dict("records"):
        outcomes = {name: row[name] for name in _names(methods)}
        used = [float(text.split()[1]) for text in outcomes.values() if text.startswith("holds")]
        refused = "; ".join(f"{' and '.join(names)}: {why}" for why, names in _refusals(outcomes).items())
        lines.append(_row(row["model"], len(used), f"{max(used):.2f}", refused))
    return "\n".join([*lines, ""])


def _models(methods: pd.DataFrame, identities: pd.DataFrame) -> str:
    lines = [
        "# Models", "",
        "What has been proven of which kind of model, by `make conformance`. Every row is a tiny random model of the "
        "real class with the published names of its weights; no weights of published models were used. A class that is "
        "not here is searched and put to the same proof when it is loaded: the load report decides, and refuses what "
        "does not hold (`reward-lens check MODEL`).", "",
        "Directions are *exact* where one axis reads every state whose norm has the same scale (and, behind a gate, of "
        "one prompt), and *local* where they are the head's slope at each state. Identities: in which precisions every "
        "sum closes. Heads and neurons: whether what each writes can be told apart. Prefix: whether the keys and "
        "values of a prompt are computed once for all of its texts, or whole texts are run.", "",
        _row("model", "class", "readout", "directions", "identities", "methods answered", "heads", "neurons", "prefix"),
        _row(*["---"] * 9),
    ]  # fmt: skip
    held = identities.set_index(["model", "precision"])
    for row in methods.to_dict("records"):
        outcomes = {name: str(row[name]) for name in _names(methods)}
        answered = sum(text.startswith("holds") for text in outcomes.values())
        refused = sum(map(len, _refusals(outcomes).values()))
        precisions = [
            p for p in LIMITS if (row["model"], p) in held.index and pd.notna(held.loc[(row["model"], p), "E1"])
        ]
        methods_told = f"{answered} of {answered + refused}"
        lines.append(_row(row["model"], f"`{row['class']}`", row["readout"], row["directions"], ", ".join(precisions),
                          methods_told, row["heads"], row["neurons"], row["reuse"]))  # fmt: skip
    lines += ["", "Which methods a model refuses, and why, stands in `benchmarks/conformance.md`; the gaps too. The "
              "reward that DPO implies is of two language models and so has no row: its sums by token, depth and "
              "component are tested on eight families (`tests/test_implicit_reward.py`).", ""]  # fmt: skip
    return "\n".join([*lines, *_published(), ""])


def _published() -> list[str]:
    """The published heads that load without remote code, and how process reward models are read."""
    from reward_lens import STEP_READOUTS
    from reward_lens.model.heads.table import KNOWN

    lines = ["## Published heads that load without their own code", "",
             _row("class in `config.json`", "checkpoints"), _row("---", "---")]  # fmt: skip
    lines += [_row(f"`{known.name}`", ", ".join(known.checkpoints)) for known in KNOWN if known.checkpoints]
    lines += ["", "## Process reward models", "", _row("key of `STEP_READOUTS`", "layout", "marker"),
              _row(*["---"] * 3)]  # fmt: skip
    lines += [_row(f"`{key}`", one.layout, f"`{one.marker!r}`") for key, one in STEP_READOUTS.items()]
    return lines


def _names(methods: pd.DataFrame) -> list[str]:
    return [name for name in methods.columns if name not in ABOUT]


def _refusals(outcomes: dict[str, str]) -> dict[str, list[str]]:
    """Methods by the reason of their refusal; of those of one kind of reward only what they answer is told."""
    found: dict[str, list[str]] = {}
    for name, text in outcomes.items():
        if text.startswith("refused: ") and name not in READOUT_METHODS:
            found.setdefault(text.removeprefix("refused: "), []).append(name)
    return found


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
