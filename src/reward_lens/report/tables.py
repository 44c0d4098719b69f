"""Tables of the page: the cells of a result worth reading first, and every check with its gap and tolerance."""

import dataclasses
import math

import pandas as pd

from reward_lens.charts import kind
from reward_lens.charts.strip import blocks
from reward_lens.report import numbers
from reward_lens.result import Check, Result

WHOLE = 60  # rows up to which a table is complete
TOP = 12  # rows of a table that is not
HIDDEN = ("prompt", "prompt_id", "chosen", "rejected")  # long or redundant coordinates of a pair


@dataclasses.dataclass(frozen=True)
class Table:
    """Formatted cells. `numeric` says column by column whether it is set flush right."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]


def values_table(result: Result) -> Table | None:
    """All cells of a small result in order; of a large one the largest by absolute value, as the caption says."""
    form = kind(result)
    if form == "tokens":
        return _tokens(result)
    if not result.value.dims:
        return _table(_with_interval(result), "The value.")
    if form == "scores":
        return _scores(result)
    summary = result.summary()
    if summary.size <= WHOLE:
        data = result.dataset.assign(value=summary)
        names = [n for n in ("value", "low", "high") if n in data and set(data[n].dims) <= set(summary.dims)]
        frame = data[names].to_dataframe().reset_index()
        extra = [c for c in frame.columns if c not in (*summary.dims, *names)]
        return _table(frame[[*summary.dims, *names, *extra]], "All values." if "pair" not in result.value.dims else "Means over pairs.")
    top = result.top(TOP)
    margin = " of the margin" if "side" in summary.dims and "margin" in summary["side"].values else ""
    return _table(top, f"The {len(top)} largest values{margin} by absolute size.")


def checks_table(result: Result) -> Table:
    """A result whose dim is `check`: one row a check, the coordinates as columns."""
    frame = result.value.to_dataframe(name=result.unit or "gap").reset_index()
    columns = [result.unit or "gap", "tolerance", "found", "note"]
    known = ["check", *(c for c in columns if c in frame)]
    frame = frame[[*known, *(c for c in frame if c not in known)]]
    return _table(frame, "", write=numbers.gap)


def check_rows(checks: list[tuple[str, Check]]) -> Table:
    """Checks of several results under the heading of each. A recorded fact has no tolerance."""
    rows = [
        [where, c.name, numbers.gap(c.gap), "recorded" if math.isinf(c.tolerance) else numbers.gap(c.tolerance), c.note]
        for where, c in checks
    ]
    return Table("", ["section", "check", "gap", "tolerance", "note"], rows, [False, False, True, True, False])


def nearest(checks: list[tuple[str, Check]]) -> tuple[str, Check] | None:
    """The check whose gap takes up the largest part of its tolerance; None where there is no tolerance at all."""
    bounded = [(w, c) for w, c in checks if 0 < c.tolerance < math.inf]
    return max(bounded, key=lambda pair: pair[1].gap / pair[1].tolerance, default=None)


def _scores(result: Result) -> Table:
    value = result.value
    frame = value.to_dataframe(name="value").reset_index()
    names = [c for c in ("pair", "subset") if c in frame]
    if "side" in value.dims:
        frame = frame.pivot(index=names, columns="side", values="value").reset_index()
        frame = frame[[*names, *value["side"].values]]
    else:
        frame = frame[[*names, "value"]]
    by = frame["margin"] if "margin" in frame else frame.iloc[:, -1]
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


def _with_interval(result: Result) -> pd.DataFrame:
    return pd.DataFrame([{k: float(result.dataset[k]) for k in ("value", "low", "high") if k in result.dataset}])


def _table(frame: pd.DataFrame, caption: str, write=numbers.number) -> Table:
    frame = frame[[c for c in frame.columns if c not in HIDDEN or c in ("chosen", "rejected") and numbers.is_number(frame[c].iloc[0])]]
    numeric = [frame[c].dtype.kind in "fiu" for c in frame.columns]
    rows = [
        [write(float(v)) if isinstance(v, float) else numbers.cell(v) for v in record]
        for record in frame.itertuples(index=False, name=None)
    ]
    return Table(caption, [str(c).replace("_", " ") for c in frame.columns], rows, numeric)
