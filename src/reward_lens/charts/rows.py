"""What every chart form needs: tidy rows under plain field names, axis titles, a zero line, a size."""

import math
import re
from collections.abc import Iterable

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from reward_lens.result import Result

# What XML lacks (control characters, lone surrogates), what ends a line in an expression, and what is read but not
# seen: the further controls, the soft hyphen, spaces and marks of no width, and the marks that turn the text behind
# them round. Joiners stay, which shape emoji and scripts.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u2028-\u202e\u2060-\u2064\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
Drawing = alt.LayerChart | alt.FacetChart  # what `alt.layer` returns


def rows(table: pd.DataFrame | list[dict]) -> alt.InlineData:
    """Rows as inline data: numbers under a million cut to six digits (a page holds many), undefined ones as null."""
    records: list = table if isinstance(table, list) else table.to_dict("records")
    return alt.InlineData(values=[{k: _plain(v) for k, v in record.items()} for record in records])


def columns(data: xr.Dataset, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Dims, coordinates or variables of `data` as flat columns, one entry a cell of `value`."""
    value = data["value"]
    flat = {name: data[name].broadcast_like(value).transpose(*value.dims).values.ravel() for name in names}
    return {name: text_of(column) if column.dtype.kind in "UO" else column for name, column in flat.items()}


def text_of(labels: Iterable) -> np.ndarray:
    """Labels as text, in which a character that no chart can hold or no reader can see is written as its escape.

    A renderer of SVG that is given one ends the whole process; the parser of expressions refuses the label.
    """
    legible = [_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(label)) for label in labels]
    return np.array(legible, dtype=object)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest absolute values, the largest first; undefined ones are left out."""
    order = np.argsort(-np.abs(values), kind="stable")
    return order[np.isfinite(values[order])][:count]


def frame(data: xr.Dataset, **fields: str | None) -> pd.DataFrame:
    """The cells of `data` with a value. `fields`: plain field name -> dim or coordinate; None is left out."""
    sources = {field: source for field, source in fields.items() if source is not None}
    sources |= {name: name for name in ("value", "low", "high") if name in data.data_vars}
    flat = columns(data, dict.fromkeys(sources.values()))
    defined = ~np.isnan(flat["value"])
    return pd.DataFrame({field: flat[source][defined] for field, source in sources.items()})


def left_out(drawn: int, of: int) -> str:
    """The note on labels whose value is undefined; empty where there are none."""
    return f"{of - drawn} of {of} values are undefined and not drawn." if drawn < of else ""


def bare(table: pd.DataFrame) -> str:
    """The note on dots that lack the interval which others have; empty where there are none."""
    lacks = table["low"].isna() if "low" in table else pd.Series([False])
    return "A dot without a line has no interval." if lacks.any() and not lacks.all() else ""


def tooltip(table: pd.DataFrame, titles: dict[str, str | None]) -> list[alt.Tooltip]:
    """One line a field of `table` that has a title, and the interval where there is one."""
    named = {field: title for field, title in titles.items() if title is not None and field in table}
    if "low" in table:
        named |= {"low": "interval from", "high": "to"}
    return [_line(table, field, title) for field, title in named.items()]


def words(name: str) -> str:
    """The name of a dim or unit as it is read on an axis."""
    return name.replace("_", " ")


def unit_of(result: Result, data: xr.Dataset | None = None) -> str:
    """The unit in words, for axes and legends; with the side in front where `data` is of one side."""
    side = f"{data['side'].item()}, " if data is not None and "side" in data.coords and not data["side"].dims else ""
    return side + words(result.unit)


def dims_of(array: xr.DataArray) -> list[str]:
    """The names of the dims (xarray allows any hashable; results have text)."""
    return [str(dim) for dim in array.dims]


def is_numeric(array: xr.DataArray, dim: str) -> bool:
    """Whether a dim counts something (depth, step) and is no set of labels."""
    return dim not in array.coords or array[dim].dtype.kind in "iuf"


def span(data: xr.Dataset) -> tuple[float, float]:
    """Smallest and largest number of values and intervals; (0, 0) where nothing is defined."""
    numbers = np.concatenate([data[k].values.ravel() for k in data.data_vars])
    numbers = numbers[np.isfinite(numbers)]
    return (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)


def in_order(labels: Iterable) -> alt.Scale:
    """A scale with the labels in the order given.

    As a domain and not as `sort`, which is compiled into an expression whose parser a label may break.
    """
    return alt.Scale(domain=[_plain(label) for label in dict.fromkeys(labels)])


def shade(size: float, signed: bool, title: str) -> alt.Color:
    """The colour of a value between zero and `size` either way. The legend names these ends, which Vega would round to
    the digits of its steps (1 for 1.44), and is no longer than a narrow chart."""
    ends, colours = ([-size, size], "diverging") if signed else ([0, size], "heatmap")
    scale = alt.Scale(domain=ends, range=colours, clamp=True, interpolate="rgb")
    length = "isFinite(containerSize()[0]) ? clamp(containerSize()[0] - 200, 90, 180) : 180"
    legend = alt.Legend(values=sorted({*ends, 0}), format=".3~g", gradientLength=alt.ExprRef(length))
    return alt.Color("value:Q", scale=scale, title=title, legend=legend)


def zero(channel: str) -> alt.Chart:
    """A line at zero across the chart."""
    return alt.Chart(alt.InlineData(values=[{}])).mark_rule(style="zero").encode(**{channel: alt.datum(0)})


def layered(layers: list[alt.Chart], height: int) -> Drawing:
    """Layers as one chart, as wide as what contains it and `height` pixels high."""
    return alt.layer(*layers).properties(width="container", height=height)


def _line(table: pd.DataFrame, field: str, title: str) -> alt.Tooltip:
    if table[field].dtype.kind in "fiu":
        return alt.Tooltip(field=field, type="quantitative", title=words(title), format=".4~g")
    return alt.Tooltip(field=field, type="nominal", title=words(title))


def _plain(value):
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return None
        return float(f"{value:.6g}") if abs(value) < 1e6 else float(value)  # steps past a million stay apart
    return value.item() if isinstance(value, np.generic) else value
