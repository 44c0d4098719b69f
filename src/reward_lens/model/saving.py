"""A reward model as a folder that plain transformers loads, with a card of what was changed in its head.

Every weight is written as it is, in the precision it is held in; an edited head is part of them, so whoever loads the
folder needs nothing of this library. What the card says is read off `rm.edits`.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_lens.errors import DataError
from reward_lens.model.adapters import require_no_live_adapter
from reward_lens.model.head import sharing_copy
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.vocab_readout import refuse_change

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel

USE = (
    "from transformers import AutoModelForSequenceClassification, AutoTokenizer", "",
    'model = AutoModelForSequenceClassification.from_pretrained("this folder")',
    'tokenizer = AutoTokenizer.from_pretrained("this folder")',
)  # fmt: skip
PUBLISHED_USE = ("import reward_lens as rl", "", 'rm = rl.load("this folder")')
"""transformers has no class for these heads."""
FIGURES = (
    ("directions", "directions removed"),
    ("rank", "dimensions they span, as the head sees them"),
    ("alpha", "alpha"),
    ("n_prompts", "prompts the erasure was fitted on"),
    ("weight_norm_before", "norm of the row before"),
    ("weight_norm_after", "norm of the row after"),
    ("weight_cosine", "cosine between the two"),
    ("left", "largest share of a direction's weight that rounding left"),
    ("constant_shift", "constant added to every reward"),
)


def save_pretrained(rm: "RewardModel", folder: str | Path) -> Path:
    """Write weights, configuration, tokenizer and a README.md; returns the folder.

    Raises `DataError` for a path that is a file or a folder with something in it: nothing is ever overwritten; and
    `StructureError` for a reward read from a language model's vocabulary.
    """
    refuse_change(rm, "A checkpoint with a reward head")
    require_no_live_adapter(rm.module, "A checkpoint with a reward head")
    folder = require_empty(folder)
    # Saving writes the class and the precision into the configuration it saves; the copy's, not the model's.
    sharing_copy(rm.module).save_pretrained(folder)
    rm.tokenizer.hf.save_pretrained(folder)
    (folder / "README.md").write_text(card(rm), encoding="utf-8")
    return folder


def require_empty(folder: str | Path) -> Path:
    """The folder as a path; a `DataError` where it is a file or has something in it."""
    folder = Path(folder)
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise DataError(
            f"{folder} was not written",
            found="a folder that is not empty" if folder.is_dir() else "a file of that name",
            expected="an empty folder, or one that does not exist yet",
            do="choose another folder",
        )
    return folder


def card(rm: "RewardModel") -> str:
    """The model card, in Markdown."""
    version = importlib.metadata.version("reward-lens")
    original = rm.edits[0]["model"] if rm.edits else rm.name
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-classification", "tags:", "- reward-model",
        "- reward-lens", "---", "", f"# {original}, head edited" if rm.edits else f"# {original}", "",
        f"A reward model ({type(rm.module).__name__}), written by reward-lens {version}.", "",
        f"- model: {original}" + (f", revision {rm.revision}" if rm.revision else ""),
        f"- precision: {str(rm.dtype).removeprefix('torch.')}",
        f"- edits of the head: {len(rm.edits)}",
        "",
    ]  # fmt: skip
    if not rm.edits:
        lines += ["No weight was changed.", ""]
    else:
        rows = ", ".join(sorted({f"{e['objective']} (row {e['row']})" for e in rm.edits}))
        lines += [f"Changed: the head's row {rows}. Every other weight is that of the model named above.", ""]
    for number, edit in enumerate(rm.edits, 1):
        lines += [f"## Edit {number}: {edit['method']}", "", "| what | value |", "| --- | --- |"]
        lines += [f"| {label} | {_number(edit[key])} |" for key, label in FIGURES if key in edit]
        lines += [""]
    lines += ["```python", *(PUBLISHED_USE if isinstance(rm.module, OwnHead) else USE), "```", ""]
    if rm.edits:
        lines += [
            "An edit of the head removes what the head reads along a direction while the final norm's scale is held; "
            "it does not remove what the network writes there, nor what reaches the reward by that scale or by other "
            "directions. How the edited model does on data that played no part in the edit is not said here.",
            "", "## Record", "", "```json", json.dumps(list(rm.edits), indent=2), "```", "",
        ]  # fmt: skip
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)
