"""The page in headless Chromium: drawn, quiet, safe, readable and usable, wide and narrow, light and dark."""

import json

import pytest
import xarray as xr

import shapes
from browsing import CONTRAST, visits
from reward_lens.report import write_report
from reward_lens.result import Result

pytestmark = pytest.mark.browser

CUT = """() => [...document.querySelectorAll(".chart svg")].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const { left, right, top, bottom, width } = text.getBoundingClientRect();
    return width && (left < box.left - 2 || right > box.right + 2 || top < box.top - 2 || bottom > box.bottom + 2);
  }).map((text) => text.textContent);
})"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_report(shapes.all_shapes(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def visit(browser, path):
    with visits(browser, path, lambda scheme: f"html[data-drawn={scheme}]") as go:
        yield go


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_drawn_and_fits(visit, width, scheme):
    tab = visit(width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("violations") == []
    charts = tab.locator(".chart")
    specs = "Object.keys(JSON.parse(document.getElementById('charts').textContent).specs).length"
    assert charts.count() == tab.evaluate(specs) > 10
    drawn = charts.evaluate_all(
        "all => all.map(c => [c.querySelectorAll('svg path, svg text').length, c.clientWidth, c.scrollWidth])"
    )
    assert all(marks > 5 for marks, _, _ in drawn)
    assert all(scroll <= client for _, client, scroll in drawn)
    assert tab.evaluate(CUT) == []
    for details in tab.locator("details").all():
        details.evaluate("d => { d.open = true; }")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_readable_on_their_background(visit, scheme):
    contrasts = visit(scheme=scheme).evaluate(CONTRAST)
    assert len(contrasts) > 100 and min(contrasts) >= 4.5


def test_hostile_text_is_seen_as_text(visit):
    tab = visit()
    for where in (".pair .name", ".quote", ".text.rejected > .strip", ".stacked td"):
        assert any("<script>alert(1)</script>" in text for text in tab.locator(where).all_inner_texts())
    labels = tab.locator("#accuracy-1 svg text").all_text_contents()
    assert any(label.startswith("<script>alert(1)</script>") for label in labels)
    assert tab.locator("script").count() == 3 and tab.locator("img").count() == 0


def test_toggle_changes_page_and_charts(visit):
    tab = visit()
    page_colour = "getComputedStyle(document.body).backgroundColor"
    chart_colour = "document.querySelector('.chart svg text').getAttribute('fill')"
    light = [tab.evaluate(page_colour), tab.evaluate(chart_colour)]
    button = tab.locator("#theme")
    button.click()
    tab.wait_for_selector("html[data-drawn=dark]")
    dark = [tab.evaluate(page_colour), tab.evaluate(chart_colour)]
    assert light[0] != dark[0] and light[1] != dark[1]
    for _ in range(3):  # fast clicks end where the last one points
        button.click()
    tab.wait_for_selector("html[data-drawn=light]")
    tab.wait_for_timeout(500)
    assert [tab.evaluate(page_colour), tab.evaluate(chart_colour)] == light
    assert tab.locator(".chart svg").count() == tab.locator(".chart").count()


def test_policy_holds(visit):
    tab = visit()
    ran = tab.evaluate("""async () => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.body.append(script);
      const fetched = await fetch("https://example.org/").then(() => true, () => false);
      return [window.ran ?? false, fetched];
    }""")
    assert ran == [False, False]
    assert set(tab.evaluate("violations")) == {"script-src-elem", "connect-src"}
    assert len(visit.noise) >= 2 and all("Content Security Policy" in line for line in visit.noise)
    visit.noise.clear()


def test_keyboard(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    focused = "document.activeElement.textContent.trim()"
    assert tab.evaluate(focused) == "Skip to the results"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    strip = tab.locator(".text.chosen > .strip").first
    strip.focus()
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
    (first,) = [b for b in shapes.texts().items() if b[0] == (0, "chosen")]
    readout = tab.locator(".text.chosen > output").first.inner_text()
    assert json.dumps(first[1][6][0]) in readout and "(2 of 9)" in readout
    summary = tab.locator(".more-rows summary").first
    summary.focus()
    tab.keyboard.press("Enter")
    assert summary.locator("..").evaluate("d => d.open")


def test_long_text_unfolds(visit):
    tab = visit(390)
    text = tab.locator(".quote.clamp").first
    button = tab.locator(f"[data-expand='{text.get_attribute('id')}']")
    whole = text.evaluate("t => t.scrollHeight")
    target = tab.locator(f"#{text.get_attribute('id')}")
    assert target.evaluate("t => t.clientHeight") < whole
    button.click()
    assert target.evaluate("t => t.clientHeight") == whole
    assert button.get_attribute("aria-expanded") == "true" and button.inner_text() == "Show less"


def test_without_javascript_the_text_is_whole(visit):
    tab = visit(script=False)
    assert tab.locator("button:visible").count() == 0
    assert tab.locator(".quote.clamp").first.bounding_box()["height"] > 500
    assert tab.get_by_text("The chart needs JavaScript").first.is_visible()


def test_print_is_light_and_whole(visit):
    tab = visit(scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator(".quote.clamp").first.bounding_box()["height"] > 500
    assert tab.locator("#theme").is_hidden()


def test_charts_of_a_dark_page_are_printed(visit, tmp_path):
    """Drawn anew for the paper they were not there when it was printed; turned light, each is a picture of the file."""
    tab = visit(scheme="dark")
    assert tab.pdf(path=tmp_path / "page.pdf").count(b"/Subtype /Image") >= tab.locator(".chart").count()
    tab.emulate_media(media="print", color_scheme="dark")
    assert "invert" in tab.locator(".chart svg").first.evaluate("s => getComputedStyle(s).filter")


def test_tooltip_names_the_cell(visit):
    tab = visit()
    tab.locator("#components-1 svg .mark-rect path").first.hover(force=True)
    assert "component" in tab.locator("#vg-tooltip-element.visible").inner_text()


def test_a_legend_of_short_names_is_whole_beside_long_labels(browser, tmp_path):
    """The names are too many for the chart's width only once the labels on its left have taken theirs."""
    labels = [f"contribution of {name} ~ its effect" for name in "abcd"]
    value = xr.DataArray(shapes.numbers(4, 3), dims=("comparison", "layers"),
                                coords={"comparison": labels, "layers": ["all", "early", "late"]})  # fmt: skip
    result = Result("agree", value, unit="spearman", low=value - 1, high=value + 1)
    page = write_report([result], tmp_path / "page.html")
    with visits(browser, page, lambda scheme: f"html[data-drawn={scheme}]") as go:
        tab = go(390)
        assert tab.evaluate(CUT) == []
        tab.set_viewport_size({"width": 1280, "height": 900})
        tab.wait_for_timeout(500)
        tab.set_viewport_size({"width": 390, "height": 900})
        tab.wait_for_timeout(500)
        assert tab.evaluate(CUT) == []


def test_a_heat_map_of_many_long_names_is_whole_on_a_phone(browser, tmp_path):
    """Its columns' names and the end of its colour scale stood outside the page, and every second row had no name."""
    coords = {"subset": [f"a subset with a long name {i}" for i in range(50)], "rule": ["reward model", "longer wins"]}
    value = xr.DataArray(shapes.numbers(50, 2), dims=("subset", "rule"), coords=coords)
    page = write_report([Result("accuracy", value, unit="fraction")], tmp_path / "page.html")
    with visits(browser, page, lambda scheme: f"html[data-drawn={scheme}]") as go:
        tab = go(390)
        assert tab.evaluate(CUT) == []
        shown = "s => [...document.querySelectorAll(s)].filter(t => getComputedStyle(t).opacity > 0).length"
        assert tab.evaluate(shown, ".chart svg .role-axis-label text") == 52
        ramp = tab.locator(".chart svg .role-legend-gradient").bounding_box()
        assert ramp["x"] + ramp["width"] <= 390


def test_the_template_stays_whole_behind_a_text_from_right_to_left(browser, tmp_path):
    """Its last characters were drawn on the other side of the words before it."""
    pieces = ["\u0644\u0627", " (Paris)", " 12.", "<|end|>"]
    roles = ["response"] * 3 + ["tail"]
    coords = {"piece": ("position", pieces), "role": ("position", roles)}
    value = xr.DataArray(shapes.numbers(4), dims="position", coords=coords)
    page = write_report([Result("tokens", value, unit="reward")], tmp_path / "page.html")
    with visits(browser, page, lambda scheme: f"html[data-drawn={scheme}]") as go:
        parts = go().locator(".strip span").evaluate_all("all => all.map(s => [...s.getClientRects()].length)")
        assert parts[3] == 1
