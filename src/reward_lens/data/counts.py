"""Counts of an evaluated training run: one row a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reward_lens.arguments import checked_arguments
from reward_lens.data.sources import open_rows
from reward_lens.errors import DataError

COLUMNS = ("step", "episodes", "hacks")


@checked_arguments
def load_counts(source: str | Path | pd.DataFrame) -> Mapping[str, Any]:
    """Counts of a run, as `detect_cascade` takes them: `rl.detect_cascade(**rl.load_counts("run.csv"))`.

    `source`: a data frame, or a .csv, .parquet, .jsonl or .json file, with the columns `step`, `episodes` and `hacks`
    (episodes with a successful hack), and for every evaluation a column of counts and one of its number of episodes,
    `<name>` and `<name>_n`. Returns steps, hack_counts, n_episodes and dims. Raises `DataError` for a missing column or
    a cell that is no whole number of 0 or more.
    """
    if isinstance(source, pd.DataFrame):
        name, frame = "the data frame", source.reset_index(drop=True)
    else:
        name, rows = open_rows(source, None, None)
        frame = pd.DataFrame([row for _, row in rows])
    columns = [str(c) for c in frame]
    evaluations = [c for c in columns if c not in COLUMNS and not c.endswith("_n")]
    wanted = [*COLUMNS, *(f"{c}_n" for c in evaluations)]
    missing = [c for c in wanted if c not in columns]
    if missing or not evaluations or frame.empty:
        raise DataError(
            f"{name}: the table cannot be used as counts of a run",
            found=f"no column {' and no column '.join(missing)}; columns: {', '.join(columns)}" if missing
            else "no evaluation beside the hacks" if not evaluations else "no rows",
            expected="one checkpoint a row: step, episodes, hacks, and <name> with <name>_n for every evaluation",
            do="rename the columns",
        )  # fmt: skip
    numbers = {c: _whole(name, c, frame[c]) for c in [*wanted, *evaluations]}
    return {
        "steps": numbers["step"],
        "hack_counts": numbers["hacks"],
        "n_episodes": numbers["episodes"],
        "dims": {c: (numbers[c], numbers[f"{c}_n"]) for c in evaluations},
    }


def _whole(name: str, column: str, cells: pd.Series) -> np.ndarray:
    values = pd.to_numeric(cells, errors="coerce").to_numpy(float)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0) & (values == np.round(values))))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"{name}: a count is no count",
            found=f"{cells.iloc[row]!r} in row {row + 1}, column '{column}'",
            expected="a whole number of 0 or more",
            do="correct the cell, or take the row out",
        )
    return values.astype(int)
