"""Column forms of published preference sets, recognised by their columns and turned into prompt, chosen, rejected.

    HH                    chosen, rejected: transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." and no prompt
    LLMBar                input, output_1, output_2, label (1 or 2)
    JudgeBench            question, response_A, response_B, label ("A>B", "B>A")
    HelpSteer2 preference prompt, response_1, response_2, preference_strength (below 0: the first)
    HelpSteer3            context (messages), response1, response2, overall_preference (below 0: the first)
    HelpSteer2 ratings    two rows in a row with one prompt: prompt, response, helpfulness, ...

RewardBench 1 and UltraFeedback (binarised) have prompt, chosen and rejected already; RewardBench 2 is read by
`load_groups`, RM-Bench by `load_style_items`. A row without a preference is a tie: it is left out and noted.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from reward_lens.data.checks import as_float, malformed, shown
from reward_lens.data.sources import Rows

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
RATED = frozenset({"prompt", "response", "helpfulness"})


def standard_row(row: Mapping) -> Mapping | None:
    """The row with columns prompt, chosen and rejected; None for a tie; as it is where no form fits."""
    for columns, convert in _FORMS:
        if columns <= row.keys() and not {"chosen", "rejected"} <= row.keys():
            return convert(row)
    sides = {name: row.get(name) for name in ("chosen", "rejected")}
    texts = {name: side for name, side in sides.items() if isinstance(side, str) and side.startswith("\n\nHuman:")}
    if "prompt" not in row and len(texts) == 2:
        return {**row, **{name: _transcript(text, name) for name, text in texts.items()}}
    return row


def joined_ratings(rows: Rows) -> Rows:
    """Two rated responses to one prompt, which stand in two rows, as one row; other rows as they are."""
    held: tuple[str, Any] | None = None
    for where, row in rows:
        rated = isinstance(row, Mapping) and row.keys() >= RATED and "chosen" not in row
        if held is not None and not (rated and held[1]["prompt"] == row["prompt"]):
            yield held[0], _alone(held[1])
            held = None
        if not rated:
            yield where, row
        elif held is None:
            held = where, row
        else:
            yield f"{held[0]} and {where}", _joined(held[1], row)
            held = None
    if held is not None:
        yield held[0], _alone(held[1])


def _joined(a: Mapping, b: Mapping) -> dict[str, Any]:
    ratings = [a["helpfulness"], b["helpfulness"]]
    strength = as_float(ratings[1]) - as_float(ratings[0])
    return {"prompt": a["prompt"], "response_1": a["response"], "response_2": b["response"],
            "preference_strength": strength if math.isfinite(strength) else ratings}  # fmt: skip


def _alone(row: Mapping) -> dict[str, Any]:
    """A rated response without a second one: its error is raised where the row is built."""
    return {"prompt": row["prompt"], "response_1": row["response"], "response_2": None, "preference_strength": None}


def _numbered(first: str, second: str, preference: str, prompt: str) -> Callable[[Mapping], Mapping | None]:
    """A form whose preference is a number: below 0 the first response, above 0 the second."""

    def convert(row: Mapping) -> Mapping | None:
        strength = as_float(row[preference])
        if not math.isfinite(strength):
            raise malformed(preference, shown(row[preference]), "a number, and two responses to the prompt")
        if strength == 0:
            return None
        sides = (row[first], row[second]) if strength < 0 else (row[second], row[first])
        return _standard(row, row[prompt], *sides)

    return convert


def _llmbar(row: Mapping) -> Mapping:
    label = as_float(row["label"])
    if label not in (1, 2):
        raise malformed("label", shown(row["label"]), "1 or 2, the better output")
    one, two = row["output_1"], row["output_2"]
    return _standard(row, row["input"], *((one, two) if label == 1 else (two, one)))


def _judgebench(row: Mapping) -> Mapping | None:
    sides = {"A>B": ("response_A", "response_B"), "B>A": ("response_B", "response_A")}
    if row["label"] == "A=B":
        return None
    better, worse = sides.get(str(row["label"]), (None, None))
    if better is None:
        raise malformed("label", shown(row["label"]), "'A>B' or 'B>A'")
    row = {"subset": row.get("source"), "id": row.get("pair_id"), **row}
    return _standard(row, row["question"], row[better], row[worse])


def _standard(row: Mapping, prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    subset = row.get("subset") or row.get("domain")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": row.get("id"), "subset": subset}


def _transcript(text: str, field: str) -> list[dict[str, str]]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    _, *parts = _TURN.split(text)
    spoken = zip(parts[::2], parts[1::2], strict=True)
    turns = [{"role": _ROLES[who], "content": said.strip()} for who, said in spoken]
    if not turns or turns[-1]["role"] != "assistant":
        raise malformed(field, shown(text), "a transcript that ends with an assistant's turn")
    return turns


_FORMS: tuple[tuple[frozenset[str], Callable[[Mapping], Mapping | None]], ...] = (
    (frozenset({"input", "output_1", "output_2", "label"}), _llmbar),
    (frozenset({"question", "response_A", "response_B", "label"}), _judgebench),
    (
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        _numbered("response_1", "response_2", "preference_strength", "prompt"),
    ),
    (
        frozenset({"context", "response1", "response2", "overall_preference"}),
        _numbered("response1", "response2", "overall_preference", "context"),
    ),
)
