"""Tables of the page: the cells of a result worth reading first, and every check with gap and tolerance."""

import dataclasses
import math

import numpy as np
import xarray as xr

from reward_lens.charts import kind
from reward_lens.charts.choice import MAX_SERIES
from reward_lens.charts.rows import columns, dims_of, is_numeric, largest, text_of, words
from reward_lens.charts.strip import blocks, quoted
from reward_lens.report import numbers
from reward_lens.result import Check, Result

WHOLE = 60  # rows up to which a table is complete
ROWS = 100  # rows of a table with a column a label
TOP = 12  # rows of a table that is not
EVERY = slice(None)
PICKED = " An interval is each for itself, and what is picked for its size out of many looks larger than it is."
TEXTS = ("prompt", "prompt_id", "chosen", "rejected")  # coordinates that hold whole texts


@dataclasses.dataclass(frozen=True)
class Table:
    """Formatted cells. `numeric`: columns set flush right. `stacked`: on a phone a row becomes a block."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    stacked: bool = False


def values_table(result: Result) -> Table:
    """All cells of a small result, or of one that begins with "all", in order; of a large one the largest, as the
    caption says."""
    form = kind(result)
    if form == "tokens":
        return _tokens(result)
    if form == "scores":
        return _scores(result)
    countable = result.value.dtype.kind in "fiu"
    data = result.dataset.assign(value=result.summary() if countable else result.value)
    dims = dims_of(data["value"])
    names = [n for n in ("value", "low", "high") if n in data and set(data[n].dims) <= set(dims)]
    if not countable:
        return _table(columns(data, [*dims, *names]), "Cells", slice(WHOLE))
    if data["value"].size > WHOLE and "measure" in dims and len(dims) == 2:
        return _measures(data["value"])
    if side_by_side(result):
        return _parts(data)
    if data["value"].size > WHOLE and form in ("list", "grid") and (two := _rows_and_columns(data["value"])):
        return _beside_each_other(data, *two)
    whole = any(data[d].dtype.kind in "UO" and data[d].values[0] == "all" for d in dims)  # said first, then its parts
    if data["value"].size > WHOLE and not whole:
        side = "side" in dims and "margin" in data["side"].values
        data = data.sel(side="margin") if side else data
        flat = columns(data, [*dims_of(data["value"]), *names])
        return _table(flat, "Values of the margin" if side else "Values", largest(flat["value"], TOP))
    extra = [str(c) for c in data.coords if c not in dims and data[c].dims and set(data[c].dims) <= set(dims)]
    means = "Means over pairs." if "pair" in result.value.dims else ""
    return _table(columns(data, [*dims, *names, *extra]), means)


def checks_table(result: Result) -> Table:
    """A result whose dim is `check`: one row a check, the coordinates as columns."""
    data = result.dataset.rename(value="gap").assign(value=result.value)
    names = ["check", "gap", *(c for c in ("tolerance", "found", "note") if c in data.coords)]
    names += [str(c) for c in data.coords if c not in names]
    return dataclasses.replace(_table(columns(data, names), "", write=numbers.gap), stacked=True)


def check_rows(checks: list[tuple[str, Check]]) -> Table:
    """Checks of several results under the heading of each. A recorded fact has no tolerance."""
    rows = [
        [
            where,
            c.name,
            (numbers.fact if math.isinf(c.tolerance) else numbers.gap)(c.gap),
            numbers.gap(c.tolerance),
            c.note,
        ]
        for where, c in checks
    ]
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


def _measures(value: xr.DataArray) -> Table:
    """A column a measure: they differ in unit, and the largest of all would be those of one measure."""
    (of,) = (dim for dim in dims_of(value) if dim != "measure")
    flat = {of: text_of(value[of].values)}
    flat |= {str(name): value.sel(measure=name).values for name in value["measure"].values}
    return _table(flat, "")


def _rows_and_columns(value: xr.DataArray) -> tuple[str, str] | None:
    """Of two sets of labels the long one and the one of a few, such as subsets and rules; None for anything else."""
    dims = sorted(dims_of(value), key=lambda d: -value.sizes[d])
    fits = len(dims) == 2 and value.sizes[dims[1]] <= MAX_SERIES and not any(is_numeric(value, d) for d in dims)
    return (dims[0], dims[1]) if fits and "side" not in dims else None


def _beside_each_other(data: xr.Dataset, down: str, across: str) -> Table:
    """A row a label in order, a column for each of the few, and the interval of the first: the largest cells of all
    would be those of one of them, and the row of all pairs would be among them by accident."""
    first = data[across].values[0]
    flat = {down: text_of(data[down].values), str(first): data["value"].sel({across: first}).values}
    flat |= {f"{first}, {end}": data[end].sel({across: first}).values for end in ("low", "high") if end in data}
    flat |= {str(label): data["value"].sel({across: label}).values for label in data[across].values[1:]}
    flat |= {str(name): coord.values for name, coord in data.coords.items() if coord.dims == (down,) and name != down}
    return _table(flat, "Rows" if data.sizes[down] > ROWS else "", slice(ROWS))


def side_by_side(result: Result) -> bool:
    """Whether a result holds what components write beside what follows from changing them, and nothing else."""
    dims = set(result.summary().dims)
    return dims == {"component", "part"} and {"direct", "total"} <= set(result.value["part"].values)


def _parts(data: xr.Dataset) -> Table:
    """A row a component, largest totals first: what it writes directly beside the total effect and its interval, where
    it has one, then the parts between the two."""
    parts = {str(part): data["value"].sel(part=part).values for part in data["part"].values}
    ends = {end: data[end].sel(part="total").values for end in ("low", "high") if end in data.data_vars}
    ends = {f"total, {end}": bound for end, bound in ends.items() if np.isfinite(bound).any()}
    flat = {"component": text_of(data["component"].values), "direct": parts.pop("direct"), "total": parts.pop("total")}
    order = largest(flat["total"], TOP)
    caption = "Means over pairs." + " Components by their total" * (len(order) < len(flat["total"]))
    return _table(flat | ends | parts, caption, order)


def _scores(result: Result) -> Table:
    value = result.value
    flat = {c: text_of(value.coords[c].values) for c in ("pair", "subset") if c in value.coords}
    if "side" in value.dims:
        flat |= {str(side): value.sel(side=side).values for side in value["side"].values}
    else:
        flat["value"] = value.values
    by = flat["margin" if "margin" in flat else list(flat)[-1]]
    if len(by) <= WHOLE:
        return _table(flat, "All pairs, the lowest first.", np.argsort(by, kind="stable"))
    return _table(flat, "Pairs", largest(by, TOP))


def _tokens(result: Result) -> Table:
    cells = [
        (block.pair, block.side, quoted(piece), role, value)
        for block in blocks(result)
        for piece, role, value in zip(block.pieces, block.roles, block.values, strict=True)
    ]
    names = ("pair", "side", "token", "role", "value")
    flat = {name: np.array([cell[i] for cell in cells]) for i, name in enumerate(names)}
    return _table(flat, "Tokens", largest(flat["value"], TOP))


def _table(flat: dict, caption: str, order: slice | np.ndarray = EVERY, write=numbers.number) -> Table:
    """`order` picks rows; where it leaves some out, the caption becomes a sentence that counts them."""
    flat = {name: np.asarray(column) for name, column in flat.items()}
    flat = {name: c for name, c in flat.items() if name not in TEXTS or c.dtype.kind in "fiu"}
    count = len(next(iter(flat.values())))
    picked = zip(*(column[order].tolist() for column in flat.values()), strict=True)
    rows = [[write(v) if isinstance(v, float) else numbers.cell(v) for v in row] for row in picked]
    if len(rows) < count:
        which = "first" if isinstance(order, slice) else "largest by absolute value"
        caption = f"{caption}: the {len(rows)} {which} of {count:,}."
        caption += PICKED if not isinstance(order, slice) and {"low", "total, low"} & set(flat) else ""
    numeric = [column.dtype.kind in "fiu" for column in flat.values()]
    return Table(caption, [words(name) for name in flat], rows, numeric)
