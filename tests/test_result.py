"""Results: what they refuse, how they read, that a saved one comes back equal. Errors: words and pickling."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from reward_lens import errors
from reward_lens.errors import CheckFailed, DataError, RewardLensError
from reward_lens.result import Check, Result, load_result

ODD_TEXT = ["", "nul\0", "back\\slash", "\\u0041", "\\\\u0000\\", "\0\\\0", "\ufffd", "\U0001f600", "a\nb\tc"]
COMPLETE = Check("completeness", 2e-7, 1e-5)


def components(**settings) -> Result:
    """Two pairs, three sides, three components, with the summary over pairs of a method that gives one."""
    values = np.array([[[1.0, -4.0, 0.5], [0.5, 1.0, 0.0], [0.5, -5.0, 0.5]]] * 2)
    value = xr.DataArray(
        values,
        dims=("pair", "side", "component"),
        coords={
            "pair": ["p1", "p2"],
            "side": ["chosen", "rejected", "margin"],
            "component": ["embed", "L0.attn", "L0.mlp"],
        },
    )
    mean = value.mean("pair")
    given = {
        "unit": "reward",
        "checks": [COMPLETE],
        "mean": mean,
        "low": mean - 1,
        "high": mean + 1,
        **settings,
    }
    return Result("contributions", value, **given)


def assert_equal(left: Result, right: Result) -> None:
    xr.testing.assert_identical(left.dataset, right.dataset)
    assert (left.name, left.unit, left.meta, left.checks) == (
        right.name,
        right.unit,
        right.meta,
        right.checks,
    )


# What a result refuses


def test_a_check_out_of_tolerance_raises_and_says_what():
    with pytest.raises(CheckFailed) as error:
        components(checks=[COMPLETE, Check("margin split", 0.03, 1e-5, "worst at pair p2")])
    assert str(error.value).startswith(
        "The check 'margin split' of the result 'contributions' failed. Found: a gap of 0.03 "
        "(worst at pair p2). Expected: at most 1e-05. What to do: do not use these numbers. "
    )


@pytest.mark.parametrize("gap", [float("nan"), float("inf"), 1.1e-5])
def test_a_gap_that_is_no_number_or_too_large_fails(gap):
    assert not Check("c", gap, 1e-5).passed
    with pytest.raises(CheckFailed):
        components(checks=[Check("c", gap, 1e-5)])


def test_a_gap_at_its_tolerance_passes_and_infinite_tolerance_records_a_fact():
    assert Check("c", 1e-5, 1e-5).passed and Check("c", 0.0, 0.0).passed
    assert str(Check("pairs left out", 3.0, float("inf"), "too long")) == "pairs left out: 3 (too long)"
    assert str(COMPLETE) == "completeness gap 2.0e-07 (tolerance 1e-05)"


def test_a_cell_without_value_needs_a_reason():
    value = xr.DataArray([1.0, np.nan, np.nan], dims="pair", coords={"pair": ["a", "b", "c"]})
    with pytest.raises(CheckFailed, match="2 NaN or infinite cells of 3"):
        Result("fraction", value, unit="fraction")
    result = Result("fraction", value, unit="fraction", undefined="the margin is under the noise floor")
    assert result.checks[-1] == Check("undefined cells", 2.0, float("inf"), "the margin is under the noise floor")
    assert Result("f", value.fillna(0), unit="fraction", undefined="never happens").checks == ()


def test_padding_past_n_positions_needs_no_reason():
    value = xr.DataArray(
        [[1.0, 2.0, np.nan], [1.0, 2.0, 3.0]],
        dims=("pair", "position"),
        coords={"pair": ["a", "b"], "n_positions": ("pair", [2, 3])},
    )
    assert Result("curve", value, unit="reward").checks == ()
    with pytest.raises(CheckFailed, match="1 NaN or infinite cells"):
        Result("curve", value.assign_coords(n_positions=("pair", [3, 3])), unit="reward")


def test_a_summary_of_other_labels_than_the_values_is_refused():
    """xarray would join the labels and fill up with NaN, or sort them where only their order differs."""
    mean = components().mean.transpose("component", "side")
    renamed = mean.assign_coords(component=["embed", "L0.attn", "L1.mlp"])
    for other in (renamed, mean[:2], mean[::-1]):
        for name in ("mean", "low", "high"):
            with pytest.raises(ValueError, match="join='exact'.*component"):
                components(**{name: other}, undefined="a reason")


def test_meta_is_copied_and_must_be_json():
    meta = {"layers": [1, 2], "norm": "own"}
    result = components(meta=meta)
    meta["layers"].append(3)
    assert result.meta == {"layers": [1, 2], "norm": "own"}
    with pytest.raises(TypeError, match="JSON"):
        components(meta={"model": object()})


def test_meta_has_numpys_numbers_and_arrays_as_pythons():
    meta = {"seed": np.int64(3), "share": np.float32(0.5), "layers": np.arange(2), "ks": [np.int32(1)]}
    assert components(meta=meta).meta == {"seed": 3, "share": 0.5, "layers": [0, 1], "ks": [1]}


# Reading a result


def test_sel_keeps_intervals_checks_and_provenance():
    part = components(meta={"seed": 1}).sel(component="L0.attn", side="margin")
    assert part.value.dims == ("pair",) and part.value.values.tolist() == [-5.0, -5.0]
    assert (part.mean.item(), part.low.item(), part.high.item()) == (-5.0, -6.0, -4.0)
    assert part.checks == (COMPLETE,) and part.meta == {"seed": 1} and part.unit == "reward"
    assert components(mean=None, low=None, high=None).low is None
    with pytest.raises(KeyError):
        components().sel(component="L9.attn")


def test_a_selection_of_pairs_is_not_summarised_by_the_mean_of_all():
    value = xr.DataArray(
        [[1.0, -4.0], [3.0, 0.0], [8.0, 1.0]],
        dims=("pair", "component"),
        coords={"pair": ["p1", "p2", "p3"], "component": ["embed", "L0.attn"]},
    )
    mean = value.mean("pair")
    result = Result("c", value, unit="reward", checks=[COMPLETE], mean=mean, low=mean - 1, high=mean + 1)
    one, two = result.sel(pair="p1"), result.sel(pair=["p1", "p2"], component=["embed", "L0.attn"])
    assert one.top().values.tolist() == [["L0.attn", -4.0], ["embed", 1.0]]
    assert two.summary().values.tolist() == [2.0, -2.0]
    assert one.mean is one.low is two.high is None and one.checks == (COMPLETE,)
    assert result.sel(component="embed").mean.item() == 4.0


def test_top_ranks_margins_by_size():
    top = components().top(2)
    assert list(top.columns) == ["component", "value", "low", "high"]
    assert top.values.tolist() == [["L0.attn", -5.0, -6.0, -4.0], ["embed", 0.5, -0.5, 1.5]]
    bare = components(mean=None, low=None, high=None).top(1)
    assert bare.values.tolist() == [["L0.attn", -5.0]]
    assert components().top(0).empty and components().top(-1).empty


def test_top_leaves_out_undefined_cells():
    value = xr.DataArray([np.nan, 1.0], dims="depth", coords={"depth": [0, 1]})
    assert Result("lens", value, unit="reward", undefined="why").top().values.tolist() == [[1.0, 1.0]]


def test_top_of_tokens_is_of_single_tokens_and_the_text_form_of_one_pair():
    """No mean over what stands at one position of different texts, and no difference of two tokens under one name."""
    value = xr.DataArray(
        [[[1.0, -4.0], [3.0, np.nan], [-2.0, np.nan]], [[1.0, 4.0], [0.5, 0.0], [0.5, 4.0]]],
        dims=("pair", "side", "position"),
        coords={"pair": ["a", "b"], "side": ["chosen", "rejected", "margin"]},
    )
    pieces = np.array([[["Hi", "!"], ["No", ""], ["", ""]], [["Yes", "?"], ["So", "it"], ["", ""]]], dtype=object)
    counts = [[2, 1, 1], [2, 2, 2]]
    value = value.assign_coords(piece=(value.dims, pieces), n_positions=(("pair", "side"), counts))
    result = Result("tokens", value, unit="reward")
    rows = [["a", "chosen", 1, "!", -4.0], ["b", "chosen", 1, "?", 4.0], ["a", "rejected", 0, "No", 3.0]]
    assert result.top(3).values.tolist() == rows
    assert result.sel(pair="b").top(1).values.tolist() == [["chosen", 1, "?", 4.0]]
    assert "the first pair (a)" in repr(result) and "the first pair (a)" in result._repr_html_()
    assert "-4" in repr(result) and "4.5" not in repr(result)


def test_top_of_a_single_number():
    result = Result("accuracy", xr.DataArray(0.75), unit="accuracy")
    assert result.top().values.tolist() == [[0.75]]
    value = xr.DataArray([[2.0, -1.0], [4.0, 5.0]], dims=("pair", "side"), coords={"side": ["chosen", "margin"]})
    assert Result("scores", value, unit="reward").top().values.tolist() == [[2.0]]  # the mean margin


def test_to_frame_has_one_row_a_cell():
    frame = components().to_frame()
    assert list(frame.columns) == ["pair", "side", "component", "value"] and len(frame) == 18
    assert Result("accuracy", xr.DataArray(0.75), unit="accuracy").to_frame()["value"].tolist() == [0.75]
    shares = xr.DataArray([0.5, 1.0], dims="subset", coords={"subset": ["a", "b"], "n": ("subset", [4, 2]), "seed": 0})
    shares = Result("accuracy", shares, unit="fraction", low=shares - 0.25, high=shares + 0.25)
    assert list(shares.to_frame().columns) == ["subset", "n", "seed", "value", "low", "high"]
    assert shares.sel(subset="a").to_frame()[["value", "low", "high"]].values.tolist() == [[0.5, 0.25, 0.75]]


def test_repr_shows_title_table_and_checks():
    lines = repr(components()).splitlines()
    assert lines[0] == "contributions [reward]  (pair 2, side 3, component 3)"
    assert lines[-1] == "completeness gap 2.0e-07 (tolerance 1e-05)"
    assert any(line.split() == ["L0.attn", "-4", "1", "-5"] for line in lines)
    assert repr(Result("accuracy", xr.DataArray(0.75), unit="accuracy")).splitlines()[-1].split() == [
        "0",
        "0.75",
    ]


def test_repr_of_pairs_alone_shows_the_values():
    value = xr.DataArray([[1.0, 2.0, -1.0]], dims=("pair", "side"), coords={"side": ["chosen", "rejected", "margin"]})
    text = repr(Result("scores", value.assign_coords(pair=["a"]), unit="reward"))
    assert any(line.split() == ["a", "1", "2", "-1"] for line in text.splitlines())


def test_repr_is_short_for_large_results():
    value = xr.DataArray(np.ones((40, 30, 200)), dims=("pair", "depth", "position"))
    text = repr(Result("lens", value.assign_coords(pair=np.arange(40)), unit="reward"))
    assert len(text.splitlines()) < 30 and max(map(len, text.splitlines())) < 160


def test_html_escapes_what_users_wrote():
    value = xr.DataArray([1.0, 2.0], dims="pair", coords={"pair": ["<script>alert(1)</script>", "&"]})
    html = Result("<b>name", value, unit="<i>", checks=[Check("<u>", 0.0, 1.0)])._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    for markup in ("<b>name", "<i>", "<u>"):
        assert markup not in html


# Saving


def test_a_saved_result_comes_back_equal(tmp_path):
    result = components(meta={"model": "m\0\ud800", "seed": None, "flags": {"strict": True}, "depths": [0.5]})
    path = result.save(tmp_path / "result.nc")
    assert path == tmp_path / "result.nc"
    assert_equal(load_result(path), result)
    assert [file.name for file in tmp_path.iterdir()] == ["result.nc"]


def test_ids_pieces_and_numbers_come_back_equal(tmp_path):
    n = len(ODD_TEXT)
    pieces = np.array([ODD_TEXT, ODD_TEXT[::-1]], dtype=object)
    value = xr.DataArray(
        np.arange(2.0 * n).reshape(2, n).astype(np.float32),
        dims=("pair", "position"),
        coords={
            "pair": np.array(["nul\0", "back\\slash\\u0000"], dtype=object),
            "n_positions": ("pair", [n, n - 2]),
            "piece": (("pair", "position"), pieces),
            "token": (("pair", "position"), np.arange(2 * n).reshape(2, n)),
        },
    )
    value[1, n - 2 :] = np.nan
    result = Result("tokens", value, unit="reward", checks=[Check("odd \0 \udfff", 0.0, 1.0, "\\u0000")])
    loaded = load_result(result.save(tmp_path / "odd.nc"))
    assert loaded.value["pair"].values.tolist() == ["nul\0", "back\\slash\\u0000"]
    assert loaded.value["piece"].values.tolist() == pieces.tolist()
    assert loaded.value.dtype == np.float32 and loaded.value["token"].dtype == value["token"].dtype
    assert loaded.checks == result.checks
    xr.testing.assert_identical(loaded.dataset, result.dataset)


def test_a_text_that_is_missing_comes_back_missing(tmp_path):
    texts = np.array(["nan", None, "\\N", "N", np.nan], dtype=object)
    value = xr.DataArray(np.zeros(5), dims="pair", coords={"label": ("pair", texts)})
    result = Result("tokens", value, unit="reward")
    loaded = load_result(result.save(tmp_path / "result.nc"))
    assert loaded.value["label"].isnull().values.tolist() == [False, True, False, False, True]
    xr.testing.assert_identical(loaded.dataset, result.dataset)


def test_numpys_own_strings_come_back_equal(tmp_path):
    texts = np.array(ODD_TEXT, dtype=np.dtypes.StringDType())
    value = xr.DataArray(np.zeros(len(texts)), dims="pair", coords={"pair": texts})
    loaded = load_result(Result("tokens", value, unit="reward").save(tmp_path / "odd.nc"))
    assert loaded.value["pair"].values.tolist() == ODD_TEXT


def test_lone_surrogates_come_back_equal(tmp_path):
    """As fixed-width text, the one form of coordinate that xarray takes them in."""
    texts = np.array(["\ud83d", "\udc00x\\u0000\ud800"])
    value = xr.DataArray([1.0, 2.0], dims="pair", coords={"pair": texts, "piece": ("pair", texts)})
    loaded = load_result(Result("tokens", value, unit="reward").save(tmp_path / "odd.nc"))
    assert loaded.value["pair"].values.tolist() == loaded.value["piece"].values.tolist() == texts.tolist()


def test_long_provenance_is_saved(tmp_path):
    result = components(meta={"ids": ["x" * 100] * 3000})  # HDF5 holds no plain attribute over 64 KiB
    assert_equal(load_result(result.save(tmp_path / "long.nc")), result)


def test_a_loaded_result_reads_and_saves_like_the_first(tmp_path):
    result = components()
    loaded = load_result(result.save(tmp_path / "first.nc"))
    assert repr(loaded) == repr(result)
    pd.testing.assert_frame_equal(loaded.top(), result.top())
    again = load_result(loaded.sel(side="margin").save(tmp_path / "second.nc"))
    assert_equal(again, result.sel(side="margin"))


def test_infinite_tolerances_and_undefined_cells_are_saved(tmp_path):
    value = xr.DataArray([1.0, np.nan], dims="pair", coords={"pair": ["a", "b"]})
    result = Result("f", value, unit="fraction", undefined="small margin")
    loaded = load_result(result.save(tmp_path / "f.nc"))
    assert loaded.checks == result.checks and np.isnan(loaded.value.values[1])


def test_boolean_coordinates_are_refused_before_anything_is_written(tmp_path):
    value = xr.DataArray([1.0], dims="pair", coords={"pair": ["a"], "tie": ("pair", [True])})
    with pytest.raises(TypeError, match="'tie' is boolean"):
        Result("f", value, unit="reward").save(tmp_path / "f.nc")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_result_is_named(tmp_path):
    missing, other, cut = tmp_path / "none.nc", tmp_path / "other.nc", tmp_path / "cut.nc"
    xr.Dataset({"x": ("i", [1, 2])}).to_netcdf(other, engine="h5netcdf")
    cut.write_bytes(components().save(tmp_path / "whole.nc").read_bytes()[:500])
    for path in (missing, other, cut):
        with pytest.raises(DataError) as error:
            load_result(path)
        assert str(path) in str(error.value) and "Result.save" in str(error.value)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = components().save(tmp_path / "later.nc")
    with xr.open_dataset(path, engine="h5netcdf") as opened:
        later = opened.load()
    later.attrs["reward_lens"] = later.attrs["reward_lens"].replace("result 1", "result 2")
    later.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(DataError, match="the format 'reward-lens result 2', where this version reads"):
        load_result(path)


# Errors


@pytest.mark.parametrize("kind", ["LoadError", "StructureError", "AlignmentError", "DataError", "CheckFailed"])
def test_errors_are_four_sentences_and_survive_pickling(kind):
    cls = getattr(errors, kind)
    error = cls("It broke", found="a thing.", expected="another", do="mend it!")
    assert isinstance(error, RewardLensError)
    assert str(error) == "It broke. Found: a thing. Expected: another. What to do: mend it!"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls and str(copy) == str(error)
    assert (copy.what, copy.found, copy.expected, copy.do) == ("It broke", "a thing.", "another", "mend it!")


def test_an_error_raised_again_in_a_worker_keeps_its_words():
    error = DataError("It broke", found="a", expected="b", do="c")
    assert json.loads(json.dumps(str(error))) == str(pickle.loads(pickle.dumps(error, protocol=2)))


def test_several_may_save_to_one_place_at_once(tmp_path):
    """The load report of the demo model is kept by whoever loads it first, and several may at once."""
    result = Result("r", xr.DataArray(np.zeros((200, 200)), dims=("a", "b")), unit="reward", meta={"title": "t"})
    path = tmp_path / "r.nc"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: result.save(path), range(12)))
    assert load_result(path).value.identical(result.value)
    assert [p.name for p in tmp_path.iterdir()] == ["r.nc"]


def test_the_table_of_several_dims_says_what_it_is_of():
    """Under the sides it showed the first label of the second dim, and did not say so."""
    value = xr.DataArray(np.arange(24.0).reshape(3, 2, 4), dims=("side", "model", "component"),
                         coords={"side": ["chosen", "rejected", "margin"], "model": ["a", "b"],
                                 "component": ["embed", "L0.attn", "L0.mlp", "bias"]})  # fmt: skip
    title, heads, *body = repr(Result("r", value, unit="reward")).splitlines()
    assert title.endswith("the margin") and heads.split() == ["component", "embed", "L0.attn", "L0.mlp", "bias"]
    assert [line.split() for line in body[1:]] == [["a", "16", "17", "18", "19"], ["b", "20", "21", "22", "23"]]
    wide = value.isel(component=[0] * 13).assign_coords(component=[f"L{i}.attn" for i in range(13)])
    assert "component L0.attn" in repr(Result("r", wide, unit="reward")).splitlines()[0]
    assert "the margin" in Result("r", value, unit="reward")._repr_html_()
