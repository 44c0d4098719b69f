"""What changes with a dose, and what changes from before to after: charts of a few labelled estimates."""

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from reward_lens.charts.forms import Panel
from reward_lens.charts.rows import (
    Drawing,
    bare,
    dims_of,
    frame,
    in_order,
    layered,
    left_out,
    rows,
    span,
    text_of,
    tooltip,
    unit_of,
    words,
    zero,
)
from reward_lens.result import Result

STATES = ("before", "after")


def is_before_after(result: Result) -> bool:
    """Whether labels stand against states, two of which are before and after, with intervals."""
    value = result.value
    labels = [dim for dim in dims_of(value) if dim != "state"]
    both = "state" in value.dims and set(STATES) <= set(value["state"].values.tolist())
    return both and len(labels) == 1 and labels[0] in value.coords and result.low is not None


def before_after(result: Result) -> list[Panel]:
    """A row a label with the points before and after the change, each with its interval, sorted by the change.

    A panel for each `kind` of label where there are several: kinds may differ in unit, which `unit_of` says.
    """
    data = result.dataset[["value", "low", "high"]]
    (label,) = (dim for dim in dims_of(data["value"]) if dim != "state")
    before, after = (data["value"].sel(state=state) for state in STATES)
    change = (after - before).values
    data = data.sel(state=list(STATES)).assign_coords(change_=(label, change))
    kinds = text_of(data["kind"].values) if "kind" in data.coords else np.full(len(change), "", dtype=object)
    out = []
    for kind in dict.fromkeys(kinds.tolist()):
        inside = np.flatnonzero((kinds == kind) & np.isfinite(change))
        if len(inside):
            order = inside[np.argsort(change[inside], kind="stable")]
            left = left_out(len(inside), int((kinds == kind).sum()))
            out += _pairs_of_points(result, data.isel({label: order}), label, kind.capitalize(), left)
    return out


def dosed(result: Result, data: xr.Dataset) -> list[Panel]:
    """A line over the doses for each family of labels that differ in dose alone; they share the vertical scale."""
    value = data["value"]
    if len(value.dims) != 1 or not {"family", "dose"} <= set(value.coords) or not np.isfinite(value["dose"]).any():
        return []
    families, doses = text_of(value["family"].values), value["dose"].values
    members = {
        family: np.flatnonzero((families == family) & np.isfinite(doses))
        for family in dict.fromkeys(families)
        if family
    }
    members = {family: inside for family, inside in members.items() if len(set(doses[inside].tolist())) > 1}
    if not members:
        return []
    limits = span(data.isel({value.dims[0]: np.concatenate(list(members.values()))}))
    out = []
    for family, inside in members.items():
        order = inside[np.argsort(doses[inside], kind="stable")]
        table = frame(data.isel({value.dims[0]: order}), x="dose", label=str(value.dims[0]))
        if len(table):
            drawn = _curve(table, unit_of(result), limits)
            out.append(Panel(f"Dose: {words(family)}", drawn, left_out(len(table), len(order))))
    return out


def _curve(table: pd.DataFrame, unit: str, limits: tuple[float, float]) -> Drawing:
    """A line with its band, and a dot at each dose that was measured."""
    axis = alt.Axis(grid=False, values=sorted(set(table["x"].tolist())), format="~g")
    base = alt.Chart(rows(table)).encode(
        x=alt.X("x:Q", title="dose", scale=alt.Scale(nice=False, padding=8), axis=axis),
        y=alt.Y("value:Q", title=unit, scale=alt.Scale(domain=limits, zero=False)),
        tooltip=tooltip(table, {"label": "label", "x": "dose", "value": unit}),
    )
    layers = [base.mark_line(), base.mark_point(style="dot", filled=True)]
    if "low" in table:
        layers.insert(0, base.mark_area(style="band").encode(y=alt.Y("low:Q", title=unit), y2="high:Q"))
    return layered([zero("y"), *layers] if limits[0] <= 0 <= limits[1] else layers, 200)


def _pairs_of_points(result: Result, data: xr.Dataset, label: str, title: str, left: str) -> list[Panel]:
    units = list(dict.fromkeys(data["unit_of"].values.tolist())) if "unit_of" in data.coords else [result.unit]
    unit = words(" or ".join(map(str, units)))
    table = frame(data, y=label, series="state", change="change_")
    least, most = span(data)
    x = {"title": unit, "scale": alt.Scale(domain=[least, most], zero=False)}
    scale = alt.Scale(domain=list(STATES), range="category")
    base = alt.Chart(rows(table)).encode(
        y=alt.Y("y:N", title=None, scale=in_order(table["y"])),
        yOffset=alt.YOffset("series:N", scale=in_order(STATES)),
        color=alt.Color("series:N", scale=scale, legend=alt.Legend(values=list(STATES), title=None)),
        tooltip=tooltip(table, {"y": label, "series": "state", "value": unit, "change": "change"}),
    )
    layers = [
        base.mark_rule(style="interval").encode(x=alt.X("low:Q", **x), x2="high:Q"),
        base.mark_point(style="dot", filled=True).encode(x=alt.X("value:Q", **x)),
    ]
    layers = [zero("x"), *layers] if least <= 0 <= most else layers
    note = " ".join(p for p in ("Sorted by the change, the most negative first.", bare(table), left) if p)
    return [Panel(title, layered(layers, max(60, 34 * len(set(table["y"])))), note)]
