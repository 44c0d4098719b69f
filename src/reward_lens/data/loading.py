"""Rows of a file or the hub to items; an error names where the row stands, the field and the columns."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from reward_lens.arguments import checked_arguments
from reward_lens.data.checks import checked_texts, checked_turns, malformed, shown, unreadable
from reward_lens.data.items import Group, Pair, Pairs, StyleItem, with_unique_ids
from reward_lens.data.published import joined_ratings, standard_row
from reward_lens.data.solutions import Solution
from reward_lens.data.sources import Rows, open_rows
from reward_lens.errors import DataError

Source = str | Path | Iterable


@checked_arguments
def load_pairs(source: Source, split: str | None = None, limit: int | None = None) -> Pairs:
    """Preference pairs from ``"demo"`` (48), ``"diagnostic"`` (12 dimensions of 40) or ``"misalignment"`` (192), all
    written for this project, from a .jsonl, .json, .parquet or .csv file, a hub id ``"org/name"``, a data set of the
    datasets library or a folder that its `save_to_disk` wrote, or a pandas DataFrame or any rows that map names to
    values.

    Columns: `prompt` (text, or messages ending with a user turn), `chosen`, `rejected`, and where present
    `id` and `subset`; others are ignored. In TRL's conversational form `chosen` and `rejected` are message
    lists: one assistant message after an explicit `prompt`, or conversations that differ in the last turn
    only. A CSV cell may hold messages as JSON. `split` picks one of a data set, `limit` the first rows
    (two that are one pair count as one). Published sets with other columns (HH, LLMBar, JudgeBench,
    HelpSteer2 and 3; `data.published`) are read as they are; their rows without a preference are left out and
    noted.

    Returns `Pairs`, whose `notes` say what is odd, such as TRL's columns `tools` and `chat_template_kwargs`, which
    change the text that its trainer scores and are not given to the chat template here. Raises `DataError` naming file,
    line (row, for parquet, CSV, JSON arrays, the hub and data sets) and field.
    """
    name, rows = open_rows(source, split, limit, joined_ratings)
    ties: list[str] = []
    templated: list[str] = []
    pairs = parse_rows(name, _watched(rows, templated), _pair, ties)
    odd = {
        f"{len(ties)} rows without a preference left out": ties,
        f"tools or chat_template_kwargs, which the chat template is not given: {len(templated)} rows": templated,
    }
    return Pairs(pairs, name, [f"{what}: {_some(places)}" for what, places in odd.items() if places])


@checked_arguments
def load_groups(source: Source, split: str | None = None, limit: int | None = None) -> list[Group]:
    """Groups of k responses, from the sources of `load_pairs`.

    Columns: `prompt`, `responses` and optionally `labels`, `id`, `subset`; or RewardBench 2's `prompt` with
    the lists `chosen` and `rejected`, which become labels 1 and 0. Returns a list of `Group`, their ids made
    unique as in `Pairs`; raises `DataError` as `load_pairs` does.
    """
    return list(with_unique_ids(parse_rows(*open_rows(source, split, limit), _group))[0])


@checked_arguments
def load_style_items(source: Source, split: str | None = None, limit: int | None = None) -> list[StyleItem]:
    """RM-Bench-shaped items (`chosen` and `rejected` are lists of three), from the sources of `load_pairs`.

    Returns a list of `StyleItem`, their ids made unique; raises `DataError` as `load_pairs` does.
    """
    return list(with_unique_ids(parse_rows(*open_rows(source, split, limit), _style_item))[0])


@checked_arguments
def load_solutions(source: Source, split: str | None = None, limit: int | None = None) -> list[Solution]:
    """Solutions in steps, from the files and hub ids of `load_pairs`.

    Columns: `prompt`, and `steps` or TRL's `completions` (a list of texts); optionally `id` and `subset`; others, TRL's
    `labels` among them, are ignored. Returns a list of `Solution`, their ids made unique as in
    `Pairs`; raises `DataError` as `load_pairs` does.
    """
    return list(with_unique_ids(parse_rows(*open_rows(source, split, limit), _solution))[0])


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


def _watched(rows: Rows, templated: list[str]) -> Rows:
    """The rows; the places of those that have arguments of a chat template go to `templated`."""
    for where, row in rows:
        if isinstance(row, Mapping) and (row.get("tools") or row.get("chat_template_kwargs")):
            templated.append(where)
        yield where, row


def parse_rows(name: str, rows: Rows, build: Callable, ties: list[str] | None = None) -> list:
    """Items of all rows; where a row holds no preference, its place goes to `ties`."""
    items = []
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise malformed("row", shown(row), "an object with named fields")
            item = build(row)
            if item is not None:
                items.append(item)
            elif ties is not None:
                ties.append(where)
        except DataError as error:
            columns = f" (columns: {', '.join(map(str, row))})" if isinstance(row, Mapping) else ""
            what = f"{name}, {where}: {error.what[0].lower()}{error.what[1:]}"
            raise DataError(what, found=error.found + columns, expected=error.expected, do=error.do) from None
    if not items:
        found = "no rows" if not ties else f"{len(ties)} rows without a preference"
        raise unreadable(name, found, "at least one row" + (" with one" if ties else ""), do="check the source")
    return items


def _pair(row: Mapping) -> Pair | None:
    standard = standard_row(row)
    if standard is None:
        return None
    row = standard
    chosen, rejected, prompt = _column(row, "chosen"), _column(row, "rejected"), row.get("prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, list) and side and all(isinstance(response, str) for response in side):
            do = "use load_style_items for RM-Bench's lists of three, load_groups for lists of k responses"
            raise malformed(name, "a list of strings", "one response, as text or as messages", do=do)
    if isinstance(chosen, list) or isinstance(rejected, list):
        prompt, chosen, rejected = _conversations(prompt, chosen, rejected)
    elif prompt is None and "prompt" not in row:
        do = "rename the column; of whole texts without one, split off what both begin with (trl.extract_prompt)"
        raise malformed("prompt", "no such column", "a value in each row", do=do)
    elif prompt is None:
        prompt = _column(row, "prompt")
    return Pair(prompt, chosen, rejected, **_labels(row))


def _conversations(prompt, chosen, rejected) -> tuple[Any, str, str]:
    """Prompt and responses of TRL's conversational form; a missing prompt is the turns both sides share."""
    *before, (_, chosen) = checked_turns(chosen, "chosen", last="assistant")
    *other, (_, rejected) = checked_turns(rejected, "rejected", last="assistant")
    if before != other:
        found = "turns that differ from those of 'chosen' before the last one"
        raise malformed("rejected", found, "conversations that differ in their last turn only")
    if prompt is None:
        return [{"role": role, "content": content} for role, content in before], chosen, rejected
    given = [("user", prompt)] if isinstance(prompt, str) else list(checked_turns(prompt, "prompt"))
    if before and before != given:
        found = "turns before the last one that are not the prompt"
        do = "correct the row, or leave out the column prompt: the turns that both share stand for it then"
        raise malformed("chosen", found, "one assistant message, or the prompt's messages and then one", do)
    return prompt, chosen, rejected


def _group(row: Mapping) -> Group:
    prompt, responses, labels = _column(row, "prompt"), row.get("responses"), row.get("labels")
    if responses is None:
        best, others = (checked_texts(_column(row, name), name) for name in ("chosen", "rejected"))
        responses, labels = best + others, [1.0] * len(best) + [0.0] * len(others)
    return Group(prompt, responses, labels, **_labels(row))


def _style_item(row: Mapping) -> StyleItem:
    labels = _labels(row)
    labels["subset"] = labels["subset"] or row.get("domain")  # RM-Bench's name for it
    return StyleItem(*(_column(row, name) for name in ("prompt", "chosen", "rejected")), **labels)


def _solution(row: Mapping) -> Solution:
    name = "completions" if row.get("steps") is None and "completions" in row else "steps"
    return Solution(_column(row, "prompt"), _column(row, name), **_labels(row))


def _column(row: Mapping, name: str) -> Any:
    if row.get(name) is None:
        found = "null" if name in row else "no such column"
        raise malformed(name, found, "a value in each row", do="rename or fill the column")
    return row[name]


def _labels(row: Mapping) -> dict[str, Any]:
    """`id` and `subset`, where an absent column, null and an empty cell all mean none."""
    return {name: None if row.get(name) == "" else row.get(name) for name in ("id", "subset")}
