"""Sampled responses: a table of prompt, response and numbers, read, checked and grouped by prompt."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from reward_lens.data.checks import as_float, shown, unreadable
from reward_lens.data.items import Group, Pair
from reward_lens.data.sources import open_rows
from reward_lens.errors import DataError

FILES = (".csv", ".parquet", ".jsonl", ".json")
RESERVED = ("prompt", "response", "reward", "gold", "id", "subset")  # columns with a meaning of their own


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of the prompts that have two or more; `rows[i]` are the rows of `frame` that are `groups[i]`."""

    name: str
    frame: pd.DataFrame
    groups: list[Group]
    rows: list[np.ndarray]
    left_out: tuple[str, ...]
    """Rows, in words, of prompts with one sample."""

    def numbers(self, column: str) -> np.ndarray:
        """A column as floats [row]. Raises `DataError` for a cell that is no finite number."""
        return _numbers(self.name, self.frame, column)

    def numeric_columns(self) -> list[str]:
        """Columns of numbers (or booleans) beside those with a meaning of their own."""
        return [str(c) for c in self.frame if c not in RESERVED and pd.api.types.is_numeric_dtype(self.frame[c])]


def read_samples(samples) -> Samples:
    """Samples from a data frame or the path of a .csv, .parquet, .jsonl or .json file, one sample a row.

    Columns: `prompt` (text, or messages that end with a user turn; a CSV cell holds messages as JSON), `response`, and
    columns of numbers. Prompts are told apart by `prompt_key`. Returns `Samples`; raises `DataError` naming row and
    column for a missing column or a cell that is no text, and where no prompt has two samples.
    """
    name, frame = _frame(samples)
    missing = [column for column in ("prompt", "response") if column not in frame]
    repeated = sorted({str(c) for c in frame.columns[frame.columns.duplicated()]})
    if missing or repeated or not len(frame):
        raise DataError(
            f"{name}: the table cannot be used as samples",
            found=f"no column {' and no column '.join(missing)}; columns: {', '.join(map(str, frame))}" if missing
            else f"columns of one name: {', '.join(repeated)}" if repeated else "no rows",
            expected="one sample a row, with the columns prompt, response and reward",
            do="rename the columns, or check the source",
        )  # fmt: skip
    by_prompt: dict[str, list[int]] = {}
    items = [
        _sample(name, row, *cells) for row, cells in enumerate(zip(frame["prompt"], frame["response"], strict=True))
    ]
    for row, item in enumerate(items):
        by_prompt.setdefault(item.prompt_key, []).append(row)
    single = [rows[0] for rows in by_prompt.values() if len(rows) == 1]
    kept = np.array(sorted(row for rows in by_prompt.values() if len(rows) > 1 for row in rows), dtype=int)
    if not len(kept):
        raise DataError(
            f"{name}: no prompt has two samples",
            found=f"{len(frame)} rows, {len(by_prompt)} different prompts",
            expected="two or more responses to the same prompt",
            do="draw more samples of each prompt; prompts have to be equal to the letter",
        )
    place = {row: i for i, row in enumerate(kept.tolist())}
    rows = [np.array([place[row] for row in rows]) for rows in by_prompt.values() if len(rows) > 1]
    groups = []
    for members in rows:
        first = items[kept[members[0]]]
        groups.append(Group(first.prompt, [items[kept[i]].chosen for i in members]))
    left_out = tuple(f"row {row + 1}" for row in single)
    return Samples(name, frame.iloc[kept].reset_index(drop=True), groups, rows, left_out)


def _frame(samples) -> tuple[str, pd.DataFrame]:
    if isinstance(samples, pd.DataFrame):
        return "samples", samples
    if not isinstance(samples, str | Path) or Path(samples).suffix.lower() not in FILES:
        expected = f"a pandas data frame, or the path of a file ending in {', '.join(FILES)}"
        raise DataError("The samples cannot be read", found=shown(samples), expected=expected, do="pass either")
    name, rows = open_rows(samples, None, None)
    table = [row for _, row in rows]
    if not all(isinstance(row, Mapping) for row in table):
        raise unreadable(name, "a row that is no object", "objects with named fields")
    frame = pd.DataFrame(table)
    return name, _typed(frame) if name.lower().endswith(".csv") else frame


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """A CSV file's columns of numbers as numbers; blank cells are NaN."""
    out = {}
    for column in frame:
        blank = np.array([isinstance(cell, str) and not cell.strip() for cell in frame[column]], dtype=bool)
        values = np.array([as_float(cell) for cell in frame[column]])
        typed = column not in ("prompt", "response") and not (np.isnan(values) & ~blank).any() and not blank.all()
        out[column] = values if typed else frame[column]
    return pd.DataFrame(out)


def _sample(name: str, row: int, prompt, response) -> Pair:
    """Prompt and response, checked as in every other item."""
    prompt = list(prompt) if isinstance(prompt, np.ndarray) else prompt  # lists, as pandas reads them from Parquet
    try:
        return Pair(prompt, response, "")
    except DataError as error:
        what = error.what.replace("'chosen'", "'response'")
        what = f"{name}, row {row + 1}: {what[0].lower()}{what[1:]}"
        raise DataError(what, found=error.found, expected=error.expected, do=error.do) from None


def _numbers(name: str, frame: pd.DataFrame, column: str) -> np.ndarray:
    values = np.array([as_float(cell) for cell in frame[column]])
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"{name}: the column '{column}' has cells that are no finite numbers",
            found=f"{len(bad)} of {len(values)} cells, the first {shown(frame[column].tolist()[bad[0]])} "
            f"in a sample of {shown(frame['prompt'].iloc[bad[0]])}",
            expected="a finite number in every row",
            do="repair or drop these rows; a column that is no feature can be left out by features=[...]",
        )
    return values
