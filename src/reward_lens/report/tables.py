"""Tables of the page: the cells of a result worth reading first, and every check with gap and tolerance."""

import dataclasses
import math

import pandas as pd

from reward_lens.charts import kind
from reward_lens.charts.strip import blocks
from reward_lens.report import numbers
from reward_lens.result import Check, Result

WHOLE = 60  # rows up to which a table is complete
TOP = 12  # rows of a table that is not
TEXTS = ("prompt", "prompt_id", "chosen", "rejected")  # coordinates that hold whole texts


@dataclasses.dataclass(frozen=True)
class Table:
    """Formatted cells. `numeric`: columns set flush right. `stacked`: on a phone a row becomes a block."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    stacked: bool = False


def values_table(result: Result) -> Table | None:
    """All cells of a small result in order; of a large one the largest, as the caption says."""
    form = kind(result)
    if form == "tokens":
        return _tokens(result)
    if form == "scores":
        return _scores(result)
    if not result.value.dims:
        numbers_ = {k: [float(result.dataset[k])] for k in ("value", "low", "high") if k in result.dataset}
        return _table(pd.DataFrame(numbers_), "")
    if result.value.dtype.kind not in "fiu":
        frame = result.to_frame()
        return _table(
            frame[:WHOLE], f"The first {WHOLE} of {len(frame):,} cells." if len(frame) > WHOLE else ""
        )
    summary = result.summary()
    if summary.size > WHOLE:
        top = result.top(TOP)
        margin = " of the margin" if "side" in summary.dims and "margin" in summary["side"].values else ""
        return _table(top, f"The {len(top)} largest values{margin} by absolute size.")
    data = result.dataset.assign(value=summary)
    names = [n for n in ("value", "low", "high") if n in data and set(data[n].dims) <= set(summary.dims)]
    frame = data[names].to_dataframe().reset_index()
    extra = [c for c in frame.columns if c not in (*summary.dims, *names)]
    return _table(
        frame[[*summary.dims, *names, *extra]], "Means over pairs." if "pair" in result.value.dims else ""
    )


def checks_table(result: Result) -> Table:
    """A result whose dim is `check`: one row a check, the coordinates as columns."""
    frame = result.value.to_dataframe(name="gap").reset_index()
    known = ["check", *(c for c in ("gap", "tolerance", "found", "note") if c in frame)]
    frame = frame[[*known, *(c for c in frame if c not in known)]]
    return dataclasses.replace(_table(frame, "", write=numbers.gap), stacked=True)


def check_rows(checks: list[tuple[str, Check]]) -> Table:
    """Checks of several results under the heading of each. A recorded fact has no tolerance."""
    rows = [[where, c.name, numbers.gap(c.gap), numbers.gap(c.tolerance), c.note] for where, c in checks]
    return Table(
        "",
        ["section", "check", "gap", "tolerance", "note"],
        rows,
        [False, False, True, True, False],
        stacked=True,
    )


def nearest(checks: list[tuple[str, Check]]) -> tuple[str, Check] | None:
    """The check whose gap takes up the largest part of its tolerance; None where no check has one."""
    bounded = [(w, c) for w, c in checks if 0 < c.tolerance < math.inf]
    return max(bounded, key=lambda pair: pair[1].gap / pair[1].tolerance, default=None)


def _scores(result: Result) -> Table:
    value = result.value
    frame = pd.DataFrame({c: value.coords[c].values for c in ("pair", "subset") if c in value.coords})
    if "side" in value.dims:
        frame = frame.assign(**{str(side): value.sel(side=side).values for side in value["side"].values})
    else:
        frame["value"] = value.values
    by = frame["margin" if "margin" in frame else frame.columns[-1]]
    if len(frame) <= WHOLE:
        return _table(frame.loc[by.sort_values(kind="stable").index], "All pairs, the lowest first.")
    frame = frame.loc[by.abs().sort_values(ascending=False, kind="stable").index[:TOP]]
    return _table(frame, f"The {len(frame)} pairs of {len(by):,} with the largest absolute value.")


def _tokens(result: Result) -> Table:
    cells = [
        {"pair": b.pair, "side": b.side, "token": repr(piece)[1:-1], "role": role, "value": value}
        for b in blocks(result)
        for piece, role, value in zip(b.pieces, b.roles, b.values, strict=True)
        if math.isfinite(value)
    ]
    frame = pd.DataFrame(cells, columns=["pair", "side", "token", "role", "value"])
    frame = frame.loc[frame["value"].abs().sort_values(ascending=False, kind="stable").index[:TOP]]
    return _table(frame, f"The {len(frame)} tokens of {len(cells):,} with the largest absolute value.")


def _table(frame: pd.DataFrame, caption: str, write=numbers.number) -> Table:
    frame = frame[[c for c in frame.columns if c not in TEXTS or frame[c].dtype.kind in "fiu"]]
    numeric = [frame[c].dtype.kind in "fiu" for c in frame.columns]
    rows = [
        [write(float(v)) if isinstance(v, float) else numbers.cell(v) for v in record]
        for record in frame.itertuples(index=False, name=None)
    ]
    return Table(caption, [str(c).replace("_", " ") for c in frame.columns], rows, numeric)
