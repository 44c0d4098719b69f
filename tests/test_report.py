"""The page, read as text: one safe file that shows what the results hold and counts what it leaves out."""

import base64
import hashlib
import re

import numpy as np
import pytest
import xarray as xr

import shapes
from pages import Page
from reward_lens.errors import DataError
from reward_lens.report import numbers, sections, write_report
from reward_lens.report.tables import values_table
from reward_lens.result import Check, Result, load_result


def read(results, tmp_path, **more) -> Page:
    page = Page(write_report(results, tmp_path / "page.html", **more).read_text())
    assert page.stack == []
    return page


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_report(shapes.all_shapes(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(path) -> Page:
    return Page(path.read_text())


def test_doses_and_before_and_after_have_their_figures(page):
    specs = page.charts["specs"]
    assert {"graded-2", "graded-3", "before-and-after-1", "before-and-after-2"} <= set(specs)
    assert "Dose: pad" in page.words and "Sorted by the change" in page.words


# --- one file, safe and complete


def test_one_file_without_any_address(path, page):
    assert path.stat().st_size < 2_500_000
    links = [attrs[name] for _, attrs in page.elements for name in ("src", "href") if name in attrs]
    assert links and all(link.startswith("#") for link in links)
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    assert "url(" not in "".join(text for tag, _, text in page.raw if tag == "style")


def test_policy_allows_the_scripts_and_styles_by_hash_and_nothing_else(page):
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    assert {rules[name] for name in ("default-src", "base-uri", "form-action")} == {"'none'"}
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        texts = [t for name, attrs, t in page.raw if name == tag and attrs.get("type") != "application/json"]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules[rule].split() == [f"'sha256-{h}'" for h in hashes]
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_user_text_is_text(path, page):
    assert len(page.all("script")) == 3
    assert shapes.HOSTILE.replace("\u2028", "\\u2028") in page.text  # of the prompt, whole
    assert "<script>alert" not in path.read_text()
    (data,) = [text for _, attrs, text in page.raw if attrs.get("id") == "charts"]
    assert data.isascii() and not set("<>&") & set(data)
    assert "alert(1)" in data  # the labels are there, and inert


def test_text_that_is_no_text_is_written_as_its_escape(tmp_path):
    value = xr.DataArray([0.1, 0.2], dims="position", coords={"piece": ("position", ["\x00a", "\ud800"])})
    odd = Result("odd\ud800", value, unit="reward", meta={"title": "Odd \udfff"})
    page = read([odd], tmp_path)
    assert "\\u0000" in page.words and "\\ud800" in page.words and "Odd \\udfff" in page.words


def test_headings_and_ids(page):
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels[1:], levels[2:], strict=False))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    targets = [a["href"][1:] for a in page.all("a")]
    refs = [attrs[k] for _, attrs in page.elements for k in ("aria-labelledby", "aria-controls") if k in attrs]
    assert set(targets + refs) <= set(ids)
    assert {f["id"] for f in page.all("div") if f.get("class") == "chart"} == set(page.charts["specs"])


def test_sections_stand_in_the_order_given_with_their_two_sentences(page):
    titles = [r.meta["title"] for r in shapes.all_shapes()]
    places = [page.words.index(f"What {title} shows.") for title in titles]
    assert places == sorted(places)
    assert all(f"What {title} cannot show." in page.words for title in titles)


def test_head_names_the_model_and_the_check_nearest_its_tolerance(page):
    head = page.words[: page.words.index("Contents")]
    assert "tiny" in head and "abc123" in head and "reward_lens 0.1.0, torch 2.13.0" in head
    assert "8e\u22124 (tolerance 1e\u22123), of the check \u201csums to the difference from its baseline\u201d" in head


def test_all_checks_are_listed(page):
    table = page.words[page.words.rindex("All checks") :]
    for result in shapes.all_shapes():
        for check in result.checks:
            assert check.name in table
    assert "pairs under the noise floor 2 none their margin is undefined" in table


def test_load_report_is_a_table(page):
    assert "head keys 0 0 2 of 2 keys" in page.words
    assert "3.1e\u22127 1e\u22125 -1.8342 two texts" in page.words


def test_strips_show_prompt_rewards_and_both_sides(page):
    rewards = shapes.scores().value.sel(side="margin").values
    assert f"margin {numbers.number(rewards[0], signed=True)}" in page.words
    assert "How are you?" in page.words and "Prompt tokens (5)" in page.words
    tokens = [attrs for name, attrs in page.elements if name == "span" and "title" in attrs]
    assert len(tokens) == sum(map(len, shapes.texts().values()))
    assert {attrs.get("class") for attrs in tokens} >= {"p1", "n1", "n10", None}


def test_what_is_no_text_of_the_response_is_said_and_stands_apart(page):
    """Byte tokens without a glyph, and the template's tokens, which would be mixed with words from right to left."""
    assert "A dot (\u00b7) with a value of its own is a further token of the character before it." in page.words
    tails = [attrs for attrs in page.all("span") if attrs.get("dir") == "ltr"]
    assert len(tails) == sum(role == "tail" for row in shapes.texts().values() for _, role in row)


def test_long_texts_are_whole_and_folded(page):
    assert shapes.LONG.strip() in page.words
    folded = [attrs["id"] for attrs in page.all("div") if "clamp" in attrs.get("class", "")]
    buttons = [attrs["data-expand"] for attrs in page.all("button") if "data-expand" in attrs]
    assert folded and folded == buttons


def test_the_page_does_not_depend_on_when_or_from_where(path, tmp_path):
    for result in (results := shapes.all_shapes()):
        result.save(tmp_path / f"{result.meta['title']}.nc")
    loaded = [load_result(tmp_path / f"{result.meta['title']}.nc") for result in results]
    assert write_report(loaded, tmp_path / "again.html").read_bytes() == path.read_bytes()


# --- what is given


def test_a_page_makes_its_folder_and_leaves_nothing_where_it_cannot_be(tmp_path):
    assert write_report([shapes.scores()], tmp_path / "new" / "folder" / "page.html").stat().st_size
    with pytest.raises(OSError):
        write_report([shapes.scores()], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(DataError, match="The report has nothing to show"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_names_title_and_equal_headings(tmp_path):
    plain = Result("one_number", xr.DataArray(0.5), unit="reward")
    page = read({"first_key": plain, "b": plain, "c": shapes.grid(), "d": shapes.grid()}, tmp_path, title="My page")
    ids = [attrs["id"] for attrs in page.all("h2")]
    assert ids == ["contents", "first-key", "b", "probes", "probes-2"]
    assert "First key" in page.words and "My page" in page.words


def test_intervals_are_named_and_counts_stand_in_full(tmp_path):
    over = {"level": 0.9, "unit": "prompt", "method": "cluster t"}
    value = xr.DataArray([0.1, 0.2], dims="component", coords={"component": ["a", "b"]})
    known = Result("known", value, unit="reward", low=value - 1, high=value + 1, meta={"interval": over, "n_pairs": 20},
                   checks=[Check("undefined cells", 12345.0, float("inf"), "padding")])  # fmt: skip
    none = over | {"method": "none (n < 6)"}
    few = Result("few", value, unit="reward", low=value * np.nan, high=value * np.nan,
                 meta={"interval": none, "n_pairs": 3})  # fmt: skip
    words = read([few, known], tmp_path).words
    assert "20 pairs \u00b7 unit: reward \u00b7 90% intervals over prompts" in words
    assert "method of the intervals cluster t" in words
    assert "3 pairs \u00b7 unit: reward \u00b7 no intervals (n < 6)" in words
    assert "undefined cells: 12,345, padding" in words and "undefined cells 12,345 none padding" in words
    assert "data 20 pairs; some sections are of fewer, as they say" in words


def test_measures_of_different_units_are_not_ranked_against_each_other(tmp_path):
    value = xr.DataArray(np.arange(80.0).reshape(20, 4), dims=("component", "measure"),
                         coords={"component": [f"c{i}" for i in range(20)], "measure": list("wxyz")})  # fmt: skip
    words = read([Result("several", value, unit="by measure")], tmp_path).words
    assert "component w x y z c0 0 1 2 3 c1 4 5 6 7" in words and "largest" not in words


def test_intervals_of_what_is_picked_for_its_size_have_a_word_of_caution(tmp_path):
    value = xr.DataArray(np.arange(80.0), dims="component", coords={"component": [f"c{i}" for i in range(80)]})
    bare, ended = (read([Result("many", value, unit="reward", **ends)], tmp_path).words
                   for ends in ({}, {"low": value - 1, "high": value + 1}))  # fmt: skip
    assert "the 12 largest by absolute value of 80." in bare and "picked for its size" not in bare
    assert "of 80. An interval is each for itself, and what is picked for its size" in ended


def test_what_is_written_stands_beside_what_follows_from_a_change(tmp_path):
    """A row a component in the page itself, the largest total effect first; a sentence on picking by size."""
    names, parts = [f"L{i}.H0" for i in range(20)], ["direct", "mediated", "total"]
    direct, total = np.arange(20.0), np.arange(20.0) ** 2 * np.where(np.arange(20) % 2, -1, 1)
    value = xr.DataArray(np.stack([direct, total - direct, total], 1), dims=("component", "part"),
                         coords={"component": names, "part": parts})  # fmt: skip
    page = read([Result("effects", value, unit="reward", low=value - 1, high=value + 2)], tmp_path)
    heads = "component direct total total, low total, high mediated "
    shown = heads + "L19.H0 19 \u2212361 \u2212362 \u2212359 \u2212380 L18.H0 18"
    assert shown in page.words and "L7.H0" not in page.words.split("total, high")[1]
    assert "picked for its size" in page.words and "the 12 largest by absolute value of 20." in page.words
    few = read([Result("effects", value[:6], unit="reward")], tmp_path).words
    assert "component direct total mediated L5.H0" in few and "picked" not in few
    none = read(
        [Result("effects", value[:6], unit="reward", low=value[:6] * np.nan, high=value[:6] * np.nan)], tmp_path
    )
    assert "Means over pairs. component direct total mediated L5.H0" in none.words


def test_the_largest_completeness_gap_is_said_first(tmp_path):
    one, two = (Result(n, xr.DataArray(0.5), unit="reward", checks=[Check("completeness", gap, 1e-5)])
                for n, gap in (("a", 3e-7), ("b", 2e-8)))  # fmt: skip
    words = read([two, one], tmp_path).words
    assert "Contributions sum to the reward: completeness gap 3e\u22127 (tolerance 1e\u22125)." in words


def test_a_margin_of_shared_tokens_is_named_and_left_out_where_there_is_none(tmp_path):
    value = xr.DataArray(np.zeros((2, 3, 1)), dims=("pair", "side", "position"),
                         coords={"pair": ["a", "b"], "side": shapes.SIDES})  # fmt: skip
    value = value.assign_coords(piece=(value.dims, np.full(value.shape, "Hm", dtype=object)))
    value[1, 2, 0] = 0.5
    words = read([Result("tokens", value, unit="reward")], tmp_path).words
    assert words.count("Margin at tokens that both begin with") == 1


def test_the_table_of_many_subsets_says_the_number_of_all(tmp_path):
    """The twelve largest of many fractions were ones, whichever they were of."""
    subsets = ["all", *(f"s{i}" for i in range(60))]
    value = xr.DataArray([[0.625, 0.5]] + [[1.0, 1.0]] * 60, dims=("subset", "rule"),
                         coords={"subset": subsets, "rule": ["reward model", "longer wins"]})  # fmt: skip
    words = read([Result("accuracy", value, unit="fraction", low=value - 0.1, high=value)], tmp_path).words
    assert "all 0.625 0.525 0.625 0.5 s0 1 " in words and " s59 1 " in words
    one = value.sel(rule="reward model", drop=True)
    words = read([Result("accuracy", one, unit="fraction", low=one - 0.1, high=one)], tmp_path).words
    assert "all 0.625 0.525 0.625 s0 1 " in words and " s59 1 " in words


def test_without_checks_there_is_no_table_of_them(tmp_path):
    page = read([shapes.grid()], tmp_path)
    assert "All checks" not in page.words and "completeness gap" not in page.words


def test_an_exact_check_is_no_gap(tmp_path):
    one = Result("one", xr.DataArray(0.5), unit="reward", checks=[Check("sum", 0.0, 0.0)])
    assert "completeness gap" not in read([one], tmp_path).words


def test_results_that_differ_in_model_name_both(tmp_path):
    other = shapes.grid()
    other.meta["model"] = "another"
    assert "tiny, another" in read([shapes.grid(), other], tmp_path).words


def test_the_page_says_which_reward_it_is_of(tmp_path):
    """Reports of two rows of one head, or of one less the other, are of one model and of other rewards."""
    results = [shapes.grid(), shapes.grid()]
    for result, objective in zip(results, ("good", "good - bad"), strict=True):
        result.meta["objective"] = objective
    assert "good, good - bad" in read(results, tmp_path, title="tiny on pairs").words


def test_text_values_and_undefined_values(tmp_path):
    words = Result("words", xr.DataArray(["a", "b"], dims="name", coords={"name": ["x", "y"]}), unit="")
    undefined = xr.DataArray([np.nan, np.nan], dims="name", coords={"name": ["x", "y"]})
    nothing = Result("nothing", undefined, unit="reward", undefined="too few pairs")
    page = read([words, nothing], tmp_path)
    assert "undefined cells: 2, too few pairs" in page.words and "x a y b" in page.words


def test_pairs_beyond_the_room_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "ROOM", 1450)  # the second pair has one long text
    words = read([shapes.strips()], tmp_path).words
    assert f"The first 2 of {shapes.PAIRS} pairs; the saved result holds all." in words
    assert "pair-1" in words and "pair-2" not in words


def test_a_full_page_is_under_six_megabytes(path):
    tokens = sum(map(len, shapes.texts().values()))
    strips = re.findall(r'<div class="strip.*?</div>', path.read_text(), flags=re.DOTALL)
    assert 1.5 * path.stat().st_size + sum(map(len, strips)) / tokens * sections.ROOM < 6_000_000


GAPS = {3.1e-7: "3.1e\u22127", 1e-5: "1e\u22125", 0.0: "0", 2.0: "2", 0.25: "0.25", float("inf"): "none"}
NUMBERS = {
    -0.25: "\u22120.25",
    -0.0: "0",
    float("-inf"): "\u2212\u221e",
    1234567.0: "1.235e6",
    -1e-9: "\u22121e\u22129",
    float("nan"): "\u2013",
}


@pytest.mark.parametrize(("value", "text"), GAPS.items())
def test_gap(value, text):
    assert numbers.gap(value) == text


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_number(value, text):
    assert numbers.number(value) == text


def test_counts_of_pairs_are_whole_and_pairs_without_a_subset_are_called_so(tmp_path):
    value = xr.DataArray([0.5, -0.5, 0.5], dims=("pair",), coords={"pair": ["a", "b", "c"],
                         "subset": ("pair", ["x", "", ""])})  # fmt: skip
    page = read([Result("scores", value, unit="reward")], tmp_path)
    drawn = str(page.charts["specs"])
    assert "'tickCount': 2" in drawn and "no subset" in drawn


def test_a_table_of_many_subsets_keeps_the_row_of_all_pairs_and_the_intervals():
    subsets = ["all", *(f"subset {i}" for i in range(30)), "balanced"]
    cells = np.column_stack([np.linspace(0.5, 0.6, 32), np.full(32, 0.9), np.full(32, 0.1)])
    rules = ["reward model", "longer wins", "shorter wins"]
    coords = {"subset": subsets, "rule": rules, "n_pairs": ("subset", np.arange(32))}
    value = xr.DataArray(cells, dims=("subset", "rule"), coords=coords)
    table = values_table(Result("accuracy", value, unit="fraction", low=value - 0.1, high=value + 0.1))
    assert [row[0] for row in table.rows] == subsets
    assert table.columns == ["subset", "reward model", "reward model, low", "reward model, high", "longer wins",
                             "shorter wins", "n pairs"]  # fmt: skip
    assert table.rows[0] == ["all", "0.5", "0.4", "0.6", "0.9", "0.1", "0"]
