"""Charts: chosen by dims and coordinates, drawn without colours of their own, nothing left out in silence."""

import json
import re

import numpy as np
import pytest
import vl_convert
import xarray as xr

import shapes
from reward_lens.charts import chart, kind, panels, save_chart, theme
from reward_lens.charts.rows import text_of
from reward_lens.charts.strip import COLUMNS, blocks, colour_limit, readable
from reward_lens.charts.theme import DARK, LIGHT
from reward_lens.errors import DataError
from reward_lens.result import Result

FORMS = {
    "accuracy": "list",
    "scores": "scores",
    "calibration": "calibration",
    "lens": "lines",
    "contributions": "components",
    "heads": "components",
    "neurons": "components",
    "effects": "components",
    "strips": "tokens",
    "grid": "grid",
    "rules": "list",
    "graded": "list",
    "before_after": "before_after",
    "listing": "list",
    "scalar": "table",
    "load_report": "table",
}


def spec(panel) -> dict:
    return panel.chart.to_dict()


def values(panel) -> list[dict]:
    """Rows of all data sets of a chart."""
    return [row for rows in spec(panel)["datasets"].values() for row in rows]


def find(tree, key: str) -> list:
    """All values under a key, anywhere in a specification."""
    if isinstance(tree, dict):
        return [v for k, v in tree.items() if k == key] + [hit for v in tree.values() for hit in find(v, key)]
    return [hit for v in tree for hit in find(v, key)] if isinstance(tree, list) else []


@pytest.mark.parametrize(("shape", "form"), FORMS.items())
def test_form_follows_from_dims(shape, form):
    result = getattr(shapes, shape)()
    assert kind(result) == form
    assert bool(panels(result)) == (form != "table")


@pytest.mark.parametrize("shape", FORMS)
def test_every_form_is_drawn(shape, tmp_path):
    svg = save_chart(getattr(shapes, shape)(), tmp_path / "chart.svg").read_text()
    assert svg.startswith("<svg") and len(svg) > 1500
    assert "<script" not in svg


def test_a_saved_svg_has_room_for_labels_in_a_wider_font(tmp_path):
    """In DejaVu Sans 'L0.attn -> L0.mlp' began 8 pixels left of the picture, as measured in Liberation Sans."""
    svg = save_chart(shapes.contributions(), tmp_path / "chart.svg").read_text()
    png = save_chart(shapes.contributions(), tmp_path / "chart.png").read_bytes()
    width = int.from_bytes(png[16:20], "big") / 2  # drawn at twice the size
    assert float(re.search(r'width="([\d.]+)"', svg)[1]) >= width + 25


@pytest.mark.parametrize("shape", FORMS)
def test_any_label_is_drawn(shape, tmp_path):
    result = getattr(shapes, shape)()
    data = result.dataset
    for name in set(data.coords) - {"side", "kind", "role"}:
        if data[name].dtype.kind in "UO":
            labels = data[name].values.astype(object)
            labels.flat[1] = "\\ ' \" ] \u2028 \u0001 \uffff \ud800 </script>"
            data = data.assign_coords({name: (data[name].dims, labels.astype(str))})
    save_chart(result._with(data), tmp_path / "chart.svg")


@pytest.mark.parametrize("shape", FORMS)
def test_no_chart_knows_a_method_or_a_colour(shape):
    result = getattr(shapes, shape)()
    renamed = result._with(result.dataset)
    renamed.name, renamed.meta = "another", {}
    drawn = [json.dumps(spec(p)) for p in panels(result)]
    assert drawn == [json.dumps(spec(p)) for p in panels(renamed)]
    assert not re.search(r'"#[0-9a-fA-F]{3,8}"', "".join(drawn))


def test_light_and_dark_are_one_specification_with_two_themes():
    light, dark = (chart(shapes.lens(), dark=dark).to_dict() for dark in (False, True))
    assert light.pop("config") == theme(False)
    assert dark.pop("config") == theme(True) != theme(False)
    assert light == dark


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<svg"), ("html", b"<!DOCTYPE html>")],
)
def test_files(suffix, start, tmp_path):
    path = save_chart(shapes.accuracy(), tmp_path / f"chart.{suffix}")
    assert path.read_bytes().lstrip().startswith(start)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be written to chart\.gif\. Found: the suffix '\.gif'"):
        save_chart(shapes.accuracy(), tmp_path / "chart.gif")


def test_plot_is_the_chart():
    assert shapes.grid().plot().to_dict() == chart(shapes.grid()).to_dict()


# --- lines, lists, heat maps


def test_lines_have_a_band_a_side_and_the_names_of_the_sides():
    margin, others = panels(shapes.lens())
    assert (margin.title, others.title) == ("Margin", "Chosen and rejected")
    for panel, sides in ((margin, 1), (others, 2)):
        assert [m["type"] for m in find(spec(panel), "mark") if isinstance(m, dict)].count("area") == 1
        assert shapes.SIDES in find(spec(panel), "domain")  # so that a side keeps its colour
        assert sum("low" in row for row in values(panel)) == sides * (shapes.LAYERS + 1)


def test_no_interval_no_band():
    for panel in panels(Result("lens", shapes.lens().value, unit="reward")):
        assert "area" not in [m["type"] for m in find(spec(panel), "mark")]


def test_undefined_cells_are_gaps():
    value = xr.DataArray([1.0, np.nan, 3.0], dims="depth", coords={"depth": [0, 1, 2]})
    (panel,) = panels(Result("lens", value, unit="reward", undefined="no pairs"))
    assert [row["x"] for row in values(panel) if "x" in row] == [0, 2]
    nothing = Result("none", value * np.nan, unit="reward", undefined="no pairs")
    assert panels(nothing) == []


def test_no_line_crosses_an_undefined_cell(tmp_path):
    value = xr.DataArray([1.0, 2.0, np.nan, 3.0, 4.0, np.nan, 5.0], dims="depth", coords={"depth": range(7)})
    result = Result("lens", value, unit="reward", undefined="no pairs")
    marks = re.findall(r'roledescription="line mark" d="(.*?)"', save_chart(result, tmp_path / "c.svg").read_text())
    assert [path.count("L") for path in marks] == [1, 1, 0]
    (panel,) = panels(result)
    assert [row["x"] for row in values(panel)] == [0, 1, 3, 4, 6, 6]  # the last of them by itself, as a dot


def test_components_become_layer_by_kind_and_a_list():
    blocks_panel, outside = panels(shapes.contributions())
    cells = values(blocks_panel)
    assert len(cells) == 2 * shapes.LAYERS and {row["y"] for row in cells} == {"attn", "mlp"}
    assert {row["y"] for row in values(outside) if "y" in row} == {"embed", "norm", "bias"}
    assert outside.title == "Outside the blocks"


def test_heads_become_layer_by_head():
    by_head, by_kind, outside = panels(shapes.heads())
    assert len(values(by_head)) == shapes.LAYERS * shapes.HEADS
    assert {row["y"] for row in values(by_kind)} == {"mlp"}
    assert {row["y"] for row in values(outside) if "y" in row} == {"embed", "bias"}


def test_heads_have_a_scale_of_their_own_beside_larger_mlps():
    value = shapes.heads().value.copy()
    value[..., (value["kind"] == "mlp").values] *= 100
    mean = value.mean("pair")  # cells show no interval: their colours are not for its ends
    by_head, by_kind, _ = panels(Result("heads", value, unit="reward", mean=mean, low=mean - 50, high=mean + 50))
    ends = [abs(value.mean("pair").sel(side="margin").values[(value["kind"] == kind).values]).max()
            for kind in ("head", "mlp")]  # fmt: skip
    for panel, end in zip((by_head, by_kind), ends, strict=True):
        (scale,) = [s for s in find(spec(panel), "scale") if s.get("range") == "diverging"]
        assert scale["domain"] == pytest.approx([-end, end])


def test_tokens_are_listed_by_their_text_where_it_tells_them_apart():
    value = xr.DataArray([0.3, 0.2, -0.1], dims="token", coords={"token": ["\u0120is", "is", "\u010a"]})
    new_line = "\u201c\u21b5\u201d"
    for pieces, labels in (([" is", "is", "\n"], ["\u201c is\u201d", "\u201cis\u201d", new_line]),
                           (["is", "is", "\n"], ["\u0120is", "is", new_line]),
                           (["\ufffd", "is", "\n"], ["\u0120is", "\u201cis\u201d", new_line])):  # fmt: skip
        (panel,) = panels(Result("rows", value.assign_coords(piece=("token", pieces)), unit="cosine"))
        assert [row["y"] for row in values(panel) if "y" in row] == labels


def test_a_few_components_are_a_list():
    few = shapes.contributions().sel(component=["embed", "L0.attn", "L0.mlp", "bias"])
    assert kind(few) == "list"


def test_units_without_a_cell_of_their_own_are_a_list_that_counts_what_it_leaves_out():
    (panel,) = panels(shapes.neurons())
    assert panel.note == "The 40 largest of 50 by absolute value."
    assert len([row for row in values(panel) if "y" in row]) == 40


def test_heat_map_is_symmetric_around_zero_and_shows_the_margin():
    (panel, _) = panels(shapes.contributions())
    margin = shapes.contributions().mean.sel(side="margin")
    (scale,) = [s for s in find(spec(panel), "scale") if s.get("range") == "diverging"]
    assert scale["domain"][0] == -scale["domain"][1]
    shown = {row["label"]: row["value"] for row in values(panel)}
    assert shown["L2.mlp"] == pytest.approx(margin.sel(component="L2.mlp").item(), rel=1e-5)
    assert "margin, reward" in find(spec(panel), "title")


def test_the_legend_of_a_colour_scale_names_its_ends():
    """Vega wrote 1 under a shade of 1.44."""
    value = xr.DataArray([[1.4372, -0.5], [0.5, 0.7]], dims=("a", "b"), coords={"a": ["x", "y"], "b": ["u", "v"]})
    drawn = vl_convert.vegalite_to_svg(chart(Result("one", value, unit="reward")).properties(width=300).to_dict())
    assert all(f">{sign}1.44<" in drawn for sign in ("", "\u2212")) and ">1<" not in drawn


def test_values_without_sign_get_a_scale_from_zero():
    value = xr.DataArray([[0.4, 0.9], [0.5, 0.7]], dims=("a", "b"), coords={"a": ["x", "y"], "b": ["u", "v"]})
    (panel,) = panels(Result("style", value, unit="accuracy"))
    (scale,) = [s for s in find(spec(panel), "scale") if s.get("range") == "heatmap"]
    assert scale["domain"] == [0, 0.9]


def test_panels_of_one_result_share_their_scales():
    drawn = panels(shapes.effects())
    assert [p.title for p in drawn if "Blocks" in p.title] == [
        "estimator exact: Blocks",
        "estimator gradient: Blocks",
    ]
    scales = [find(spec(p), "scale") for p in drawn if "Blocks" in p.title]
    assert scales[0] == scales[1]


def test_panels_that_are_not_drawn_are_counted():
    sizes = {"depth": 4, "model": 3, "objective": 4, "level": 3}
    coords = {dim: [f"{dim}{i}" for i in range(n)] for dim, n in sizes.items() if dim != "depth"}
    value = xr.DataArray(np.ones(tuple(sizes.values())), dims=tuple(sizes), coords=coords)
    drawn = panels(Result("many", value, unit="reward"))
    assert [p.note for p in drawn] == [""] * 7 + ["4 of 12 panels (objective, level) are not drawn."]


def test_two_sets_of_labels_with_intervals_are_a_list_in_colours():
    (panel,) = panels(shapes.rules())
    cells = [row for row in values(panel) if "low" in row]
    assert len(cells) == shapes.rules().value.size and all(row["n"] == 8 for row in cells)
    assert find(spec(panel), "yOffset")


def test_an_undefined_cell_moves_no_row_or_column_of_a_heat_map():
    numbers = xr.DataArray([[np.nan, 2.0, 3.0], [4.0, 5.0, 6.0]], dims=("k", "depth"), coords={"k": [1, 2]})
    (panel,) = panels(Result("grid", numbers, unit="reward", undefined="not asked"))
    assert find(spec(panel)["layer"][0]["encoding"]["x"], "domain") == [[0, 1, 2]]
    names = ["a", "b", "c"]
    matrix = xr.DataArray(1 - np.eye(3), dims=("term", "other"), coords={"term": names, "other": names})
    (panel,) = panels(Result("square", matrix.where(matrix > 0), unit="cosine", undefined="a term beside itself"))
    encoding = spec(panel)["layer"][0]["encoding"]
    assert find(encoding["x"], "domain") == find(encoding["y"], "domain") == [names]


def test_two_number_lines_are_a_heat_map_with_the_longer_one_across():
    value = xr.DataArray(shapes.numbers(9, 4), dims=("layer", "head"), coords={"layer": range(9), "head": range(4)})
    (panel,) = panels(Result("pull", value, unit="reward"))
    assert {row["x"] for row in values(panel)} == set(range(9))


def test_many_labels_are_a_table():
    value = xr.DataArray(
        shapes.numbers(200, 3),
        dims=("word", "model"),
        coords={"word": [f"w{i}" for i in range(200)], "model": list("abc")},
    )
    result = Result("words", value, unit="reward")
    assert panels(result) == []
    assert find(chart(result).to_dict(), "subtitle") == ["The 20 largest by absolute value, of 600."]
    assert not find(chart(shapes.load_report()).to_dict(), "subtitle")


# --- doses, and before and after


def test_labels_that_differ_in_dose_get_a_line_a_family_beside_the_list():
    _, *doses = panels(shapes.graded())
    assert [panel.title for panel in doses] == ["Dose: pad", "Dose: cut"]  # one dose is no curve
    mean = shapes.graded().mean
    shown = [row for row in values(doses[0]) if "x" in row]
    assert [row["x"] for row in shown] == [1, 2, 4]
    for row, name in zip(shown, ["pad_1", "pad_2", "pad_4"], strict=True):
        assert row["value"] == pytest.approx(float(mean.sel(probe=name)), rel=1e-5)
        assert row["low"] == pytest.approx(row["value"] - 0.2, abs=1e-5)
        assert row["high"] == pytest.approx(row["value"] + 0.2, abs=1e-5)
    assert "area" in [m["type"] for m in find(spec(doses[0]), "mark") if isinstance(m, dict)]
    scales = [[y["scale"]["domain"] for y in find(spec(panel), "y") if "scale" in y] for panel in doses]
    assert scales[0] == scales[1] and scales[0]


def test_doses_without_values_or_intervals():
    graded = shapes.graded()
    value = graded.value.where(graded.value["family"] != "cut")
    assert [p.title for p in panels(Result("graded", value, unit="reward", undefined="none"))][1:] == ["Dose: pad"]
    single = graded.sel(probe=["hedge", "pad_1"])
    assert len(panels(single)) == 1


def test_before_and_after_are_points_with_intervals_sorted_by_the_change():
    probes, accuracies = panels(shapes.before_after())
    assert (probes.title, accuracies.title) == ("Probe", "Accuracy")
    shown = [row for row in values(probes) if "low" in row]
    assert [(row["y"], row["series"]) for row in shown] == [
        (str(text_of([shapes.HOSTILE])[0]), "before"), (str(text_of([shapes.HOSTILE])[0]), "after"),
        ("probe: b", "before"), ("probe: b", "after"),
    ]  # fmt: skip
    assert [row["value"] for row in shown] == [0.5, 0.1, -0.2, 0.3]
    assert [row["change"] for row in shown] == pytest.approx([-0.4, -0.4, 0.5, 0.5])
    assert all(row["low"] == pytest.approx(row["value"] - 0.1) for row in shown)
    assert "within-prompt SD" in find(spec(probes), "title") and "fraction" in find(spec(accuracies), "title")
    assert "Sorted by the change" in probes.note


def test_states_without_intervals_or_of_more_dims_are_no_pairs_of_points():
    bare = shapes.before_after()
    assert kind(Result("x", bare.value, unit="x", undefined="none")) == "table"
    assert kind(bare.sel(state=["before", "change"])) == "table"


# --- distributions and calibration


def test_histogram_counts_every_pair_and_has_an_edge_at_zero():
    value = xr.DataArray(shapes.numbers(300, seed=1), dims="pair", coords={"pair": [str(i) for i in range(300)]})
    (panel,) = panels(Result("margins", value, unit="reward"))
    bins = [row for row in values(panel) if "pairs" in row]
    assert sum(row["pairs"] for row in bins) == 300
    assert any(abs(row["from"]) < 1e-9 for row in bins)


def test_pairs_without_a_value_and_intervals_without_ends_are_said():
    value = xr.DataArray([1.0, np.nan, 3.0], dims="pair", coords={"pair": ["a", "b", "c"]})
    (panel,) = panels(Result("margins", value, unit="reward", undefined="not scored"))
    assert panel.note == "1 of 3 pairs have no value."
    index = xr.DataArray([1.0, 2.0], dims="dimension", coords={"dimension": ["a", "b"]})
    (panel,) = panels(Result("index", index, unit="ratio", low=index - [1, np.inf], high=index + [1, np.inf]))
    assert panel.note == "An interval without an end is not drawn."


def test_a_dot_without_its_interval_is_explained():
    value = xr.DataArray([1.0, 2.0], dims="probe", coords={"probe": ["a", "b"]})
    for width, note in (([1, np.nan], "A dot without a line has no interval."), ([1, 1], ""), ([np.nan, np.nan], "")):
        (panel,) = panels(Result("probes", value, unit="reward", low=value - width, high=value + width))
        assert panel.note == note


def test_labels_without_a_value_are_counted():
    names = {"label": np.array(["a", "b", "c"], dtype=object)}
    dose = {"family": ("label", np.array(["f"] * 3, dtype=object)), "dose": ("label", [1.0, 2.0, 3.0])}
    one = xr.DataArray([1.0, np.nan, 3.0], dims=("label",), coords=names | dose)
    states = xr.DataArray([[1.0, 2.0], [np.nan, 1.0], [3.0, 2.0]], dims=("label", "state"),
                          coords=names | {"state": np.array(["before", "after"], dtype=object)})  # fmt: skip
    for value, forms in ((one, 2), (states, 1)):
        drawn = panels(Result("x", value, unit="reward", low=value - 1, high=value + 1, undefined="a test's gap"))
        assert len(drawn) == forms and all("1 of 3 values are undefined and not drawn." in p.note for p in drawn)


def test_steps_past_a_million_stay_apart():
    steps = [1_000_001.0, 1_000_002.0, 1_000_003.0]
    value = xr.DataArray([1.0, 2.0, 3.0], dims=("step",), coords={"step": steps})
    (panel,) = panels(Result("x", value, unit="reward"))
    (rows,) = (list(r) for r in panel.chart.to_dict()["datasets"].values() if "x" in r[0])
    assert [row["x"] for row in rows] == steps


def test_subsets_get_a_row_each():
    _, by_subset = panels(shapes.scores())
    assert {row["y"] for row in values(by_subset) if "pair" in row} == {"one", "two"}


def test_of_many_pairs_each_subset_has_its_spread_and_of_many_subsets_none_is_lost_in_silence():
    cells = np.random.default_rng(0).normal(size=3_000)
    subset = np.repeat([f"subset {i}" for i in range(60)], 50).astype(object)
    subset[:40] = "few"
    coords = {"pair": np.arange(3_000).astype(str), "subset": ("pair", subset)}
    _, panel = panels(Result("scores", xr.DataArray(cells, dims=("pair",), coords=coords), unit="reward"))
    table = [row for row in values(panel) if "mean" in row]
    assert len(table) == 40 and "40 subsets with the most pairs, of 61" in panel.note
    assert not any("pair" in row for row in values(panel)) and len(json.dumps(spec(panel))) < 20_000
    row = next(row for row in table if row["y"] == "subset 7")
    own = cells[subset == "subset 7"]
    assert [row["mean"], row["q5"], row["q95"]] == pytest.approx(
        [own.mean(), *np.quantile(own, [0.05, 0.95])], rel=1e-4
    )
    coords = {"pair": np.arange(300).astype(str), "subset": ("pair", [f"s{i % 50}" for i in range(300)])}
    few = Result("scores", xr.DataArray(cells[:300], dims=("pair",), coords=coords), unit="reward")
    _, ticks = panels(few)
    assert sum("pair" in row for row in values(ticks)) == 240 and "of 50" in ticks.note


def test_equal_scores_are_drawn():
    value = xr.DataArray([1.0, 1.0], dims="pair", coords={"pair": ["a", "b"]})
    (panel,) = panels(Result("margins", value, unit="reward"))
    assert sum(row.get("pairs", 0) for row in values(panel)) == 2


def test_calibration_intervals_are_around_the_observed_rate_whatever_the_value_is():
    rate = shapes.calibration()
    difference = rate.value - rate.value["predicted"]
    shifted = Result("calibration", difference, unit="fraction", low=difference - 0.1, high=difference + 0.1)
    rows = [[row for row in values(panels(r)[0]) if "low" in row] for r in (rate, shifted)]
    assert [row["low"] for row in rows[0]] == pytest.approx([row["low"] for row in rows[1]])


# --- token strips


def test_blocks_hold_the_texts_without_padding():
    found = {(b.pair, b.side): b for b in blocks(shapes.strips())}
    assert len(found) == 2 * shapes.PAIRS  # no margin: it has no token
    for (pair, side), tokens in shapes.texts().items():
        (name,) = text_of([shapes.of_pairs()["pair"][pair]])
        assert found[name, side].pieces == tuple(text_of(text for text, _ in tokens))
        assert found[name, side].roles == tuple(role for _, role in tokens)
        assert np.isfinite(found[name, side].values).all()


def test_blocks_without_pair_and_side():
    value = xr.DataArray([0.1, -0.2], dims="position", coords={"piece": ("position", ["a", " b"])})
    (block,) = blocks(Result("one", value, unit="reward"))
    assert (block.pair, block.side, block.pieces) == ("", "", ("a", " b"))


def test_of_a_further_dim_the_last_label_is_read():
    strips = shapes.strips()
    stacked = xr.concat([0 * strips.value, strips.value], "depth").assign_coords(depth=[0, 7])
    (first, *_) = blocks(Result("lens", stacked, unit="reward"))
    assert first.depth == "depth 7" and any(first.values)


def test_strip_chart_wraps_and_says_what_it_leaves_out():
    (panel,) = panels(shapes.strips())
    cells = [row for row in values(panel) if "end" in row]
    assert max(row["end"] for row in cells) <= COLUMNS
    assert panel.note == "The first 6 of 10 texts."
    places = [(row["row"], row["x"]) for row in cells]
    assert len(set(places)) == len(places)


def test_colour_limit_is_not_set_by_one_outlier():
    values = [0.1] * 500 + [9.0]
    value = xr.DataArray(values, dims="position", coords={"piece": ("position", ["x"] * 501)})
    assert colour_limit(blocks(Result("one", value, unit="reward"))) == (pytest.approx(0.1), 9.0)


@pytest.mark.parametrize(
    ("piece", "shown"),
    [("", "\u00b7"), ("a\n", "a\u21b5\n"), (" b", " b"), ("\r\n", "\\r\u21b5\n"), ("\u200b", "\\u200b"),
     ("\u202ea", "\\u202ea"), ("\u009b1m", "\\u009b1m"), ("\u200d", "\u200d")],
)  # fmt: skip
def test_no_token_is_invisible(piece, shown):
    value = xr.DataArray([1.0], dims="position", coords={"piece": ("position", [piece])})
    (block,) = blocks(Result("one", value, unit="reward"))
    assert readable(block.pieces[0]) == shown


# --- colours


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(palette):
    for background in (palette.negative, palette.neutral, palette.positive, palette.paper):
        assert contrast(palette.ink, background) >= 4.5
    assert contrast(palette.muted, palette.paper) >= 4.5
    assert contrast(palette.series[0], palette.paper) >= 4.5  # links have this colour
    assert all(contrast(colour, palette.paper) >= 3 for colour in palette.series)


def test_panels_drawn_together_keep_their_own_colours_and_legends():
    """A concatenation shares colours: the second panel's series had none of its own, and no legend."""
    parts = ["direct", "mediated", "total"]
    value = xr.DataArray(np.arange(9.0).reshape(3, 3), dims=("component", "part"), coords={
        "component": ["L0.attn", "L0.mlp", "L1.attn"], "part": parts, "kind": ("component", ["attn", "mlp", "attn"]),
    })  # fmt: skip
    drawn = chart(Result("effects", value, unit="reward", low=value - 1, high=value + 1)).to_dict()
    assert len(drawn["vconcat"]) == 2 and drawn["resolve"]["scale"]["color"] == "independent"


def test_a_token_that_begins_with_a_space_is_drawn_behind_it():
    """Vega trims what it draws: ' is' stood where its space should be."""
    dims = ("pair", "side", "position")
    coords = {
        "pair": ["a"],
        "side": ["chosen"],
        "piece": (dims, [[["It", " is"]]]),
        "role": (dims, [[["response"] * 2]]),
    }
    value = xr.DataArray(np.ones((1, 1, 2)), dims=dims, coords=coords)
    cells = values(panels(Result("tokens", value, unit="reward"))[0])
    assert [(c["x"], c["letters"], c["end"]) for c in cells if "letters" in c] == [(0, 0, 2), (2, 3, 5)]


def test_wide_characters_have_two_columns_and_marks_none():
    """Drawn one column wide, Chinese tokens lay over each other."""
    pieces = ["\u6771\u4eac", " ok", "e\u0301", "\u5b57" * 60]
    value = xr.DataArray(np.ones(4), dims="position", coords={"piece": ("position", pieces)})
    (panel,) = panels(Result("tokens", value, unit="reward"))
    cells = [(c["row"], c["x"], c["end"]) for c in values(panel) if "letters" in c]
    assert cells == [(1, 0, 4), (1, 4, 7), (1, 7, 8), (2, 0, 92), (3, 0, 28)] and not panel.note
    arabic = value.assign_coords(piece=("position", ["\u0644\u0627", "a", "b", "c"]))
    (panel,) = panels(Result("tokens", arabic, unit="reward"))
    assert "from right to left" in panel.note
