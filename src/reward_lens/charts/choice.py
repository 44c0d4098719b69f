"""Which form a result takes, decided by dims and coordinates; and charts as objects and as files."""

import dataclasses
from pathlib import Path

import altair as alt
import numpy as np
import vl_convert
import xarray as xr

from reward_lens.arguments import checked_arguments
from reward_lens.charts import changes, forms
from reward_lens.charts.forms import Panel
from reward_lens.charts.rows import (
    Drawing,
    columns,
    dims_of,
    in_order,
    is_numeric,
    largest,
    rows,
    text_of,
    words,
)
from reward_lens.charts.theme import theme
from reward_lens.errors import DataError
from reward_lens.result import Result

WIDE = 12  # above this many components a grid of layers reads better than a list
MAX_LABELS = 80  # a heat map with more labels on a side is no longer read; the table is
MAX_SERIES = 4  # labels side by side in one row of a list
MAX_LINES = 8  # lines of one chart, as many as there are colours
MAX_PANELS = 8  # small multiples of one result
TABLE_ROWS = 20  # of the table that stands in for a chart
STILL_WIDTH = 720  # pixels of a chart in a file, where no container gives the width
# Who opens an SVG draws its labels in a font of their own, often a wider one than they were measured in.
SVG_PADDING = {"left": 28, "right": 12, "top": 5, "bottom": 5}
SUFFIXES = (".svg", ".png", ".pdf", ".html")


def chart(result: Result, dark: bool = False) -> Drawing | alt.Chart | alt.VConcatChart:
    """The chart of a result, chosen by its dims and coordinates.

    Returns an Altair chart, as wide as its container; several panels are stacked. It shows the mean over
    pairs, and of a heat map or list the margin where there are sides. It cannot show more than the result
    holds: without `low` and `high` there is no band.
    """
    parts = [_titled(panel) for panel in panels(result)] or [_table(result)]
    if len(parts) > 1:
        # Each panel has colours and a legend of its own, as on a page; a concatenation shares them otherwise.
        stacked = alt.vconcat(*(_fixed(part) for part in parts)).resolve_scale(color="independent")
        return stacked.properties(config=theme(dark))
    return parts[0].properties(config=theme(dark))


@checked_arguments
def save_chart(result: Result, path: str | Path, dark: bool = False) -> Path:
    """Write the chart of a result to `path` as its suffix says: .svg, .png, .pdf or .html (self-contained).

    Returns the path. Raises `DataError` for another suffix. Needs neither a browser nor a network.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"A chart cannot be written to {path.name}",
            found=f"the suffix '{path.suffix}'",
            expected=" or ".join(SUFFIXES),
            do="choose one of these suffixes",
        )
    drawn = _fixed(chart(result, dark)).to_dict()
    version = schema_version()
    if suffix == ".png":
        path.write_bytes(vl_convert.vegalite_to_png(drawn, vl_version=version, scale=2))
    elif suffix == ".pdf":
        path.write_bytes(vl_convert.vegalite_to_pdf(drawn, vl_version=version))
    elif suffix == ".svg":
        drawn["padding"] = SVG_PADDING
        path.write_text(vl_convert.vegalite_to_svg(drawn, vl_version=version), encoding="utf-8")
    else:
        path.write_text(vl_convert.vegalite_to_html(drawn, vl_version=version, bundle=True), encoding="utf-8")
    return path


def schema_version() -> str:
    """The Vega-Lite version that Altair writes, in vl-convert's form (major.minor)."""
    return alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]


def kind(result: Result) -> str:
    """The form of a result: before_after, tokens, calibration, scores, lines, components, grid, list or table."""
    dims, coords = set(result.value.dims), result.dataset.coords
    if result.value.dtype.kind not in "fiu":
        return "table"
    if changes.is_before_after(result):
        return "before_after"
    if dims & {"check", "measure"}:  # measures differ in unit
        return "table"
    if "position" in dims and "piece" in coords:
        return "tokens"
    if dims == {"bin"} and {"predicted", "observed"} <= set(coords):
        return "calibration"
    if "pair" in dims and dims <= {"pair", "side"}:
        return "scores"
    summary = result.summary()
    counted = [d for d in dims_of(summary) if is_numeric(summary, d)]
    labels = [d for d in dims_of(summary) if d not in counted and d != "side"]
    sizes = {d: summary.sizes[d] for d in labels}
    wide = "component" in labels and not counted and sizes["component"] > WIDE
    if wide and "layer" in coords and np.prod(list(sizes.values())) <= MAX_PANELS * sizes["component"]:
        return "components"
    if len(counted) == 1 and summary.sizes[counted[0]] > 1 and max(sizes.values(), default=0) <= MAX_LINES:
        return "lines"
    longest, second, *others = sorted([*sizes.values(), 0, 0], reverse=True)
    shown = len(labels) > 1 and not counted and _interval(result) is not None
    if shown and second <= MAX_SERIES and longest <= forms.MAX_ROWS and np.prod([n for n in others if n]) <= MAX_PANELS:
        return "list"  # a heat map would hide the intervals
    if len(counted) + len(labels) > 1:
        return "table" if max(sizes.values(), default=0) > MAX_LABELS else "grid"
    return "list" if summary.dims else "table"


def panels(result: Result) -> list[Panel]:
    """The charts of a result, without a theme, as wide as their container; none where a table is better."""
    drawn, data = _drawn(result), result.dataset
    if drawn and any(np.isinf(data[end]).any() for end in ("low", "high") if end in data):
        drawn[0] = dataclasses.replace(
            drawn[0], note=f"{drawn[0].note} An interval without an end is not drawn.".strip()
        )
    return drawn


def _drawn(result: Result) -> list[Panel]:
    form = kind(result)
    if form == "table":
        return []
    if form in ("tokens", "calibration", "scores"):
        return getattr(forms, form)(result)
    if form == "before_after":
        return changes.before_after(result)
    data = _summary(result)
    if form == "lines":
        axis = next(d for d in dims_of(data["value"]) if is_numeric(data["value"], d))
        labels = sorted((d for d in dims_of(data["value"]) if d != axis), key=lambda d: d != "side")
        return _split(result, data, [axis, *labels[:1]], forms.lines)
    if "side" in data.dims and len(data["value"].dims) > 1 and "margin" in data["side"].values:
        data = data.sel(side="margin")
    dims = [d for d in dims_of(data["value"]) if d != "side"] or ["side"]
    main, build = {
        "components": (["component"], forms.components),
        "grid": (dims[:2], forms.grid),
        "list": (sorted(dims, key=lambda d: -data.sizes[d])[:2], forms.listing),
    }[form]
    across = forms.scatter(result, data) if {"part", "component"} <= set(data["value"].dims) else []
    return across + _split(result, data, main, build) + changes.dosed(result, data)


def _summary(result: Result) -> xr.Dataset:
    """The mean over pairs as `value`, with its interval where the result has one over the same dims."""
    data = xr.Dataset({"value": result.summary()})
    interval = _interval(result)
    return data if interval is None else data.assign(low=interval[0], high=interval[1])


def _interval(result: Result) -> tuple[xr.DataArray, xr.DataArray] | None:
    low, high = result.low, result.high
    if low is None or high is None or set(low.dims) != set(result.summary().dims):
        return None
    return low, high


def _split(result: Result, data: xr.Dataset, main: list[str], build) -> list[Panel]:
    """One group of panels for each label of the dims that one chart has no room for."""
    rest = [d for d in dims_of(data["value"]) if d not in main]
    if not any(np.isfinite(data[k]).any() for k in data.data_vars):
        return []
    if not rest:
        return build(result, data, main, data)
    cells = list(np.ndindex(*(data.sizes[d] for d in rest)))
    out = []
    for index in cells[:MAX_PANELS]:
        where = dict(zip(rest, index, strict=True))
        names = [f"{words(d)} {data[d].values[i] if d in data.coords else i}" for d, i in where.items()]
        label = ", ".join(text_of(names))
        for panel in build(result, data.isel(where, drop=True), main, data):
            out.append(dataclasses.replace(panel, title=f"{label}: {panel.title}" if panel.title else label))
    if len(cells) > MAX_PANELS:
        left = f"{len(cells) - MAX_PANELS} of {len(cells)} panels ({', '.join(rest)}) are not drawn."
        out[-1] = dataclasses.replace(out[-1], note=f"{out[-1].note} {left}".strip())
    return out


def _table(result: Result) -> alt.Chart:
    """The largest cells as text, for a result that no chart fits; and how many there are."""
    countable = result.value.dtype.kind in "fiu"
    data = result.dataset.assign(value=result.summary() if countable else result.value)
    flat = columns(data, [*dims_of(data["value"]), "value"])
    count = int(np.isfinite(flat["value"]).sum()) if countable else flat["value"].size
    order = largest(flat["value"], TABLE_ROWS) if countable else np.arange(count)[:TABLE_ROWS]
    cells = []
    for name, column in flat.items():
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in column[order])
        cells += [{"row": i, "column": name, "text": text} for i, text in enumerate(shown)]
    axis = alt.Axis(orient="top", labelAngle=0)
    x = alt.X("column:N", scale=in_order(flat), title=None, axis=axis)
    base = alt.Chart(rows(cells)).mark_text(style="celltext")
    drawn = base.encode(x=x, y=alt.Y("row:O", axis=None), text="text:N")
    if count > TABLE_ROWS:
        which = "largest by absolute value" if countable else "first"
        drawn = drawn.properties(title=alt.Title("", subtitle=f"The {TABLE_ROWS} {which}, of {count:,}."))
    return drawn.properties(width="container", height=max(24, 22 * len(order)))


def _titled(panel: Panel) -> Drawing:
    if not (panel.title or panel.note):
        return panel.chart
    return panel.chart.properties(title=alt.Title(panel.title, subtitle=panel.note or alt.Undefined))


def _fixed(drawn):
    """A file has no container: its width is a number."""
    return drawn.properties(width=STILL_WIDTH) if getattr(drawn, "width", None) == "container" else drawn
