"""One function a form: from labelled numbers to an Altair chart that names no colour and no method.

Each takes the result, the labelled numbers of this chart, the dims it shows, and the whole of which these
numbers are a part: neighbouring charts of one result share their scales.
"""

import dataclasses

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from reward_lens.charts.rows import (
    Drawing,
    bare,
    columns,
    frame,
    in_order,
    is_numeric,
    largest,
    layered,
    left_out,
    rows,
    shade,
    span,
    text_of,
    tooltip,
    unit_of,
    words,
    zero,
)
from reward_lens.charts.strip import blocks, quoted, strip_chart
from reward_lens.result import Result

MAX_ROWS = 40  # rows of one list; the largest are kept and the note says so
SIDES = ("chosen", "rejected", "margin")  # always in these colours
MAX_TICKS = 2_000  # pairs that are drawn one by one; of more, each subset's spread is
WRITTEN = 60  # up to this many cells a heat map writes its numbers


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: what sets it apart from its neighbours (may be empty), the chart, what it leaves out."""

    title: str
    chart: Drawing
    note: str = ""


def lines(result: Result, data: xr.Dataset, dims: list[str], whole: xr.Dataset) -> list[Panel]:
    """`dims`: the number line, and the labels told apart by colour (if any). Intervals are bands.

    The margin has a chart of its own: rewards far from zero would flatten it. No line crosses an undefined cell; a
    value with none beside it is a dot.
    """
    axis, series = dims[0], dims[1] if len(dims) > 1 else None
    sides = list(data["side"].values) if series == "side" else []
    if "margin" in sides and len(sides) > 1:
        others = [side for side in sides if side != "margin"]
        parts = (("Margin", ["margin"]), (" and ".join(others).capitalize(), others))
        return [
            dataclasses.replace(panel, title=title)
            for title, part in parts
            for panel in lines(result, data.sel(side=part), dims, whole.sel(side=part))
        ]
    gaps = data["value"].isnull()
    if broken := bool(gaps.any()):
        data = data.assign_coords(run_=gaps.cumsum(axis))
    table = frame(data, x=axis, series=series, run="run_" if broken else None)
    unit, limits = unit_of(result, data), span(whole)
    titles = {"series": series, "x": axis, "value": unit}
    ticks = alt.Axis(grid=False)
    if (table["x"] == table["x"].round()).all():
        ticks = alt.Axis(grid=False, tickMinStep=1)  # half a layer is none
    base = alt.Chart(rows(table)).encode(
        x=alt.X("x:Q", title=words(axis), scale=alt.Scale(nice=False), axis=ticks),
        y=alt.Y("value:Q", title=unit, scale=alt.Scale(domain=limits, zero=False)),
        tooltip=tooltip(table, titles),
    )
    if series:
        names = list(text_of(data[series].values))
        legend = _legend(names) if len(names) > 1 else None
        names = list(SIDES) if series == "side" else names
        dashes = [[5, 3] if name == "rejected" else [1, 0] for name in names]
        scale = alt.Scale(domain=names, range="category")
        base = base.encode(color=alt.Color("series:N", scale=scale, legend=legend))
        dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=dashes), legend=legend)
    if broken:
        base = base.encode(detail="run:N")
    line = base.mark_line()
    layers = [
        line.encode(strokeDash=dash) if series else line,
        base.mark_point(size=260, opacity=0, filled=True),
    ]
    if broken:
        alone = table[~table.duplicated(["run", "series"] if series else "run", keep=False)]
        layers.append(base.mark_point(style="dot", filled=True).properties(data=rows(alone)))
    if "low" in table:
        layers.insert(0, base.mark_area(style="band").encode(y=alt.Y("low:Q", title=unit), y2="high:Q"))
    if limits[0] <= 0 <= limits[1]:
        layers.insert(0, zero("y"))
    return [Panel("", layered(layers, 280))]


def components(result: Result, data: xr.Dataset, dims: list[str], whole: xr.Dataset) -> list[Panel]:
    """Heads as layer x head, block writes as layer x kind, what is in no block (embed, bias) as a list."""
    layer, head, sort = _places(data)
    blocks, heads = in_blocks(data), head >= 0
    out = []
    for members, row, name, title in (
        (heads, head, "head", "Heads"),
        (blocks & ~heads, sort, None, "Blocks"),
    ):
        if not members.any():
            continue
        part = data.isel(component=members)
        if pd.DataFrame({"layer": layer, "row": row})[members].duplicated().any():
            # Several units of one layer and kind, such as neurons, have no cell of their own.
            out += listing(result, part, dims, whole.isel(component=members))
            continue
        part = part.assign_coords(row_=("component", row[members]))
        limits = span(whole[["value"]].isel(component=members))  # of its own kind: a head is small beside an MLP
        fields = {"x": "layer", "y": "row_", "label": "component"}
        out.append(Panel(title, _heat(part, fields, unit_of(result, data), "layer", name, limits)))
    if not blocks.all() and (not out or data["value"].values[~blocks].any()):  # zeros are drawn only if all there is
        outside = listing(result, data.isel(component=~blocks), dims, whole.isel(component=~blocks))
        out += [dataclasses.replace(panel, title="Outside the blocks" if out else "") for panel in outside]
    return out


def scatter(result: Result, data: xr.Dataset) -> list[Panel]:
    """What every component does directly against what it does in all, where a result has both parts."""
    if not {"direct", "total"} <= set(data["part"].values):
        return []
    direct, total = (data["value"].sel(part=part, drop=True) for part in ("direct", "total"))
    both = total.to_dataset(name="value").assign(direct=direct)
    kinds = "kind" if "kind" in both.coords else None
    table, unit = frame(both, label="component", x="direct", series=kinds), unit_of(result, data)
    base = alt.Chart(rows(table)).mark_point(style="dot", filled=True)
    drawn = base.encode(
        x=alt.X("x:Q", title=f"direct, {unit}", scale=alt.Scale(domain=span(direct.to_dataset(name="value")))),
        y=alt.Y("value:Q", title=f"total, {unit}", scale=alt.Scale(domain=span(total.to_dataset(name="value")))),
        tooltip=tooltip(table, {"label": "component", "x": "direct", "value": "total"}),
    )
    if kinds:
        names = list(dict.fromkeys(table["series"]))
        dots = alt.Legend(values=names, title=None, symbolType="circle", symbolSize=80, symbolStrokeWidth=0)
        drawn = drawn.encode(color=alt.Color("series:N", scale=alt.Scale(domain=names, range="category"), legend=dots))
    return [Panel("Direct against total", layered([zero("x"), zero("y"), drawn], 320), "A dot is one component.")]


def in_blocks(data: xr.Dataset) -> np.ndarray:
    """Which components have a place in a grid of layers: heads, and kinds that several layers have."""
    _, head, sort = _places(data)
    repeated = [kind for kind in set(sort[head < 0]) if ((head < 0) & (sort == kind)).sum() > 2]
    return (head >= 0) | np.isin(sort, repeated)


def grid(result: Result, data: xr.Dataset, dims: list[str], whole: xr.Dataset) -> list[Panel]:
    """Two dims as a heat map. Numbers read from left to right, else the longer set of labels runs down."""
    counted = [d for d in dims if is_numeric(data["value"], d)]
    across = max(counted, key=lambda d: data.sizes[d]) if counted else min(dims, key=lambda d: data.sizes[d])
    down = next(d for d in dims if d != across)
    fields, limits = {"x": across, "y": down}, span(whole[["value"]])
    return [Panel("", _heat(data, fields, unit_of(result, data), across, down, limits))]


def listing(result: Result, data: xr.Dataset, dims: list[str], whole: xr.Dataset) -> list[Panel]:
    """One row a label: points with intervals where there are any, else bars. A second dim has a colour a label."""
    series = dims[1] if len(dims) > 1 else None
    spelled = "piece" in data.coords and data["piece"].dims == (dims[0],)
    table = frame(data, y=dims[0], series=series, n=_count(data), text="piece" if spelled else None)
    if spelled:  # a tokenizer's own names, such as "Ġis", are no text to read; parts of a character have no other
        legible = ~table["text"].duplicated(keep=False) & ~table["text"].str.contains("\ufffd")
        table.loc[legible, "y"] = [quoted(piece) for piece in table["text"][legible]]
    count, title, (least, most) = len(table), unit_of(result, data), span(whole)
    if count > MAX_ROWS and not series:
        table = table.iloc[largest(table["value"].to_numpy(), MAX_ROWS)]
    base = alt.Chart(rows(table)).encode(
        y=alt.Y("y:N", title=None, scale=in_order(table["y"])),
        tooltip=tooltip(table, {"y": dims[0], "series": series, "value": title, "n": "count"}),
    )
    height = 24 * len(set(table["y"]))
    if series:
        names = list(text_of(data[series].values))
        scale = alt.Scale(domain=names, range="category")
        color = alt.Color("series:N", scale=scale, legend=_legend(names))
        base = base.encode(color=color, yOffset=alt.YOffset("series:N", scale=in_order(names)))
        height *= 0.4 + 0.5 * len(names)
    if "low" in table:
        x = {"title": title, "scale": alt.Scale(domain=[least, most], zero=False)}
        layers = [
            base.mark_rule(style="interval").encode(x=alt.X("low:Q", **x), x2="high:Q"),
            base.mark_point(style="dot", filled=True).encode(x=alt.X("value:Q", **x)),
        ]
        layers = [zero("x"), *layers] if least <= 0 <= most else layers
    else:
        x = {"title": title, "scale": alt.Scale(domain=[min(least, 0), max(most, 0)])}
        layers = [base.mark_bar(style="bar").encode(x=alt.X("value:Q", **x)), zero("x")]
    note = f"The {MAX_ROWS} largest of {count:,} by absolute value." if len(table) < count else ""
    note = " ".join(part for part in (note, bare(table), left_out(count, data["value"].size)) if part)
    return [Panel("", layered(layers, max(60, round(height))), note)]


def scores(result: Result) -> list[Panel]:
    """One number a pair: a histogram, and for each subset a row of ticks, or of many pairs the quantiles."""
    value, name = result.value, unit_of(result)
    if "side" in value.dims:
        side = "margin" if "margin" in value["side"].values else str(value["side"].values[0])
        value, name = value.sel(side=side), f"{side}, {name}"
    numbers = value.values[np.isfinite(value.values)]
    if not len(numbers):
        return []
    left = value.size - len(numbers)
    edges = _edges(numbers)
    line = [zero("x")] if edges[0] < 0 < edges[-1] else []
    x = {"title": name, "scale": alt.Scale(domain=[float(edges[0]), float(edges[-1])], nice=False)}
    bins = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "pairs": np.histogram(numbers, edges)[0]})
    bars = (
        alt.Chart(rows(bins))
        .mark_bar(style="bar")
        .encode(
            x=alt.X("from:Q", bin="binned", **x),
            x2="to:Q",
            y=alt.Y("pairs:Q", title="pairs", axis=alt.Axis(tickMinStep=1, tickCount=min(6, int(bins["pairs"].max())))),
            tooltip=tooltip(bins, {"from": "from", "to": "to", "pairs": "pairs"}),
        )
    )
    note = f"{left} of {value.size} pairs have no value." if left else ""
    out = [Panel("All pairs", layered([bars, *line], 200), note)]
    if "subset" in value.coords and len(set(value["subset"].values)) > 1:
        out.append(_by_subset(value, x, line))
    return out


def calibration(result: Result) -> list[Panel]:
    """Observed against predicted, a point a bin; the dashed line is where the two agree."""
    data = result.dataset[[k for k in ("value", "low", "high") if k in result.dataset]]
    table = frame(data, x="predicted", y="observed", n=_count(data))
    if "low" in table:
        # The interval is of `value`: the observed rate, or its distance from the predicted one.
        shift = table["y"] - table["value"]
        table["low"], table["high"] = table["low"] + shift, table["high"] + shift
    ends = np.sort(table["x"].to_numpy())[[0, -1]].tolist()
    diagonal = alt.Chart(rows([{"x": e, "y": e} for e in ends])).mark_line(style="reference")
    y = {"title": "observed", "scale": alt.Scale(zero=False)}
    base = alt.Chart(rows(table)).encode(
        x=alt.X("x:Q", title="predicted", scale=alt.Scale(zero=False)),
        tooltip=tooltip(table, {"x": "predicted", "y": "observed", "n": "count"}),
    )
    layers = [
        diagonal.encode(x="x:Q", y="y:Q"),
        base.mark_point(style="dot", filled=True).encode(y=alt.Y("y:Q", **y)),
    ]
    if "low" in table:
        layers.insert(1, base.mark_rule(style="interval").encode(y=alt.Y("low:Q", **y), y2="high:Q"))
    return [Panel("", layered(layers, 320))]


def tokens(result: Result) -> list[Panel]:
    """Text with a coloured background; a page writes it as real text, this is the form for anywhere else."""
    texts = blocks(result)
    return [Panel("", *strip_chart(texts, unit_of(result)))] if texts else []


def _legend(names: list[str]) -> alt.Legend:
    """Names in a row, or below each other where the chart is too narrow for that (about 8 pixels a character).

    Decided by what contains the chart, less the most that labels of an axis take: its own width changes once these
    are drawn, and a legend that breaks up only then is cut off.
    """
    needed = sum(8 * len(name) + 40 for name in names)
    room = "(isFinite(containerSize()[0]) ? containerSize()[0] - 200 : width)"
    return alt.Legend(values=names, title=None, columns=alt.ExprRef(f"{room} < {needed} ? 1 : 0"))


def _places(data: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layer, head (-1 for what is no head) and kind of each component."""
    coords, size = data["component"].coords, data.sizes["component"]
    head = coords["head"].values if "head" in coords else np.full(size, -1)
    sort = coords["kind"].values.astype(str) if "kind" in coords else np.full(size, "component")
    return coords["layer"].values, head, sort


def _count(data: xr.Dataset) -> str | None:
    """The coordinate that says how many cases stand behind a value."""
    return next((name for name in ("n", "count", "n_pairs") if name in data.coords), None)


def _heat(
    data: xr.Dataset,
    fields: dict[str, str],
    unit: str,
    across: str,
    down: str | None,
    limits: tuple[float, float],
) -> Drawing:
    """Cells at the labels `fields["x"]` and `fields["y"]`; one without a value stays blank in its place."""
    table, places = frame(data, **fields), columns(data, (fields["x"], fields["y"]))
    xs, ys = (list(dict.fromkeys(places[fields[axis]].tolist())) for axis in ("x", "y"))
    counted = all(isinstance(x, int | float | np.number) for x in xs)
    step = 1 if len(xs) <= 12 else 5 if len(xs) <= 60 else 10
    flat = counted or (len(xs) <= 4 and max(len(str(x)) for x in xs) <= 14)
    axis = alt.Axis(labelAngle=0 if flat else -35, values=xs[::step] if counted else alt.Undefined)
    if flat and not counted:  # on a phone a name is cut to its column, neither left out nor half outside
        axis.labelLimit, axis.labelSeparation = alt.ExprRef("bandwidth('x') - 2"), 0
    base = alt.Chart(rows(table)).encode(
        x=alt.X("x:O", title=words(across), scale=in_order(xs), axis=axis),
        y=alt.Y("y:O", title=down and words(down), scale=in_order(ys), axis=alt.Axis(labelSeparation=0)),
        tooltip=tooltip(table, {"label": fields.get("label"), "y": down or "kind", "x": across, "value": unit}),
    )
    color = shade(max(map(abs, limits)) or 1.0, limits[0] < 0, unit)
    layers = [base.mark_rect(style="cell").encode(color=color)]
    if len(table) <= WRITTEN and len(xs) <= 6:
        layers.append(base.mark_text(style="celltext").encode(text=alt.Text("value:Q", format=".2~g")))
    return layered(layers, max(52, (15 if len(ys) > 20 else 26 if len(ys) > 3 else 34) * len(ys)))


def _by_subset(value: xr.DataArray, x: dict, line: list) -> Panel:
    table = frame(value.to_dataset(name="value"), y="subset", pair="pair")
    table["y"] = table["y"].replace("", "no subset")
    by = table.groupby("y", sort=False)["value"]
    means = pd.DataFrame(
        {"mean": by.mean(), "pairs": by.size()} | {f"q{q}": by.quantile(q / 100) for q in (5, 25, 75, 95)}
    )
    left = f"The {MAX_ROWS} subsets with the most pairs, of {len(means)}." if len(means) > MAX_ROWS else ""
    means = means.sort_values("pairs", ascending=False, kind="stable").head(MAX_ROWS)
    means = means.reset_index().sort_values("mean", ascending=False)
    y = alt.Y("y:N", title=None, scale=in_order(means["y"]))
    whole = alt.Chart(rows(means)).encode(
        y=y,
        tooltip=tooltip(means, {"y": "subset", "mean": "mean", "pairs": "pairs"}),
    )
    if len(table) > MAX_TICKS:
        layers = [
            whole.mark_rule(style="interval").encode(x=alt.X("q5:Q", **x), x2="q95:Q"),
            whole.mark_bar(style="bar", size=9, opacity=0.5).encode(x=alt.X("q25:Q", **x), x2="q75:Q"),
        ]
        note = "A bar is the middle half of a subset's pairs, its line the middle nine tenths, a dot the mean."
    else:
        drawn = table[table["y"].isin(means["y"])]
        tip = tooltip(table, {"pair": "pair", "y": "subset", "value": "value"})
        ticks = alt.Chart(rows(drawn)).mark_tick(style="mark", thickness=1.5)
        layers = [ticks.encode(x=alt.X("value:Q", **x), y=y, tooltip=tip)]
        note = "A tick is one pair, a dot the mean of the subset."
    dots = whole.mark_point(style="dot", filled=True).encode(x=alt.X("mean:Q", **x))
    return Panel("By subset", layered([*line, *layers, dots], 26 * len(means)), f"{note} {left}".strip())


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Bin edges of equal width; one lies at zero, so that no bin mixes won and lost pairs."""
    edges = np.histogram_bin_edges(numbers, bins=min(40, max(8, int(2 * len(numbers) ** 0.5))))
    if not edges[0] < 0 < edges[-1]:
        return edges
    width = edges[1] - edges[0]
    return np.arange(np.floor(edges[0] / width), np.ceil(edges[-1] / width) + 1) * width
