"""The page: one safe file that shows what the results hold, read as text here and opened in a browser below."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import sync_playwright

import shapes
from reward_lens.errors import DataError
from reward_lens.report import numbers, write_report
from reward_lens.result import Check, Result, load_result

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.raw, self.text, self.stack = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("script", "style"):
            self.raw[-1][2] += data
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def charts(self) -> dict:
        return next(json.loads(text) for _, attrs, text in self.raw if attrs.get("id") == "charts")


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
    assert shapes.HOSTILE.replace("\u2028", " ") in page.words.replace("\u2028", " ")
    raw = path.read_text()
    assert "<script>alert" not in raw and "<img" not in raw
    (data,) = [text for _, attrs, text in page.raw if attrs.get("id") == "charts"]
    assert data.isascii() and not set("<>&") & set(data)
    assert "alert(1)" in data  # the labels are there, and inert


def test_text_that_is_no_text_is_written_as_its_escape(tmp_path):
    value = xr.DataArray([0.1, 0.2], dims="position", coords={"piece": ("position", ["a\x00", "\ud800"])})
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
    assert {attrs.get("class") for attrs in tokens} >= {"p10", "n10", None}


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


def test_without_checks_there_is_no_table_of_them(tmp_path):
    page = read([shapes.grid()], tmp_path)
    assert "All checks" not in page.words and "completeness gap" not in page.words


def test_results_that_differ_in_model_name_both(tmp_path):
    other = shapes.grid()
    other.meta["model"] = "another"
    assert "tiny, another" in read([shapes.grid(), other], tmp_path).words


def test_text_values_and_undefined_values(tmp_path):
    words = Result("words", xr.DataArray(["a", "b"], dims="name", coords={"name": ["x", "y"]}), unit="")
    undefined = xr.DataArray([np.nan, np.nan], dims="name", coords={"name": ["x", "y"]})
    nothing = Result("nothing", undefined, unit="reward", undefined="too few pairs")
    page = read([words, nothing], tmp_path)
    assert "undefined cells: 2, too few pairs" in page.words and "x a y b" in page.words


def test_very_many_tokens_are_counted_not_dropped_in_silence(tmp_path):
    path = write_report([shapes.strips(pairs=300)], tmp_path / "page.html")
    assert path.stat().st_size < 6_000_000
    found = re.search(r"The first (\d+) of 300 pairs; the saved result holds all\.", path.read_text())
    assert found and 1 < int(found[1]) < 300


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.1e-7, "3.1e\u22127"),
        (1e-5, "1e\u22125"),
        (0.0, "0"),
        (2.0, "2"),
        (float("inf"), "none"),
        (0.25, "0.25"),
    ],
)
def test_gap(value, text):
    assert numbers.gap(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.25, "\u22120.25"), (1234567.0, "1.235e6"), (float("nan"), "\u2013"), (-1e-9, "\u22121e\u22129")],
)
def test_number(value, text):
    assert numbers.number(value) == text


# --- in a browser


LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll(".strip span[class]:not(.u)")].map((token) => {
    const style = getComputedStyle(token);
    const [low, high] = [style.color, style.backgroundColor].map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=[*LAUNCH, "--no-first-run"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, path):
    """Opens the page; at the end of the test: no console message, no request, no violation it did not ask for."""
    opened, noise = [], []

    def go(width: int = 1280, scheme: str = "light", script: bool = True, height: int = 900):
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script)
        tab = context.new_page()
        tab.add_init_script(WATCH)
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("dialog", lambda dialog: noise.append(dialog.message))
        tab.on("request", lambda request: None if request.url == path.as_uri() else noise.append(request.url))
        tab.goto(path.as_uri())
        if script:
            tab.wait_for_selector(f"html[data-drawn={scheme}]")
        opened.append(context)
        return tab

    go.noise = noise
    yield go
    for context in opened:
        context.close()
    assert noise == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_drawn_and_fits(visit, page, width, scheme):
    tab = visit(width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("violations") == []
    charts = tab.locator(".chart")
    assert charts.count() == len(page.charts["specs"]) > 10
    drawn = charts.evaluate_all(
        "all => all.map(c => [c.querySelectorAll('svg path, svg text').length, c.clientWidth, c.scrollWidth])"
    )
    assert all(marks > 5 for marks, _, _ in drawn)
    assert all(scroll <= client for _, client, scroll in drawn)
    for details in tab.locator("details").all():
        details.evaluate("d => { d.open = true; }")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_readable_on_their_background(visit, scheme):
    contrasts = visit(scheme=scheme).evaluate(CONTRAST)
    assert len(contrasts) > 100 and min(contrasts) >= 4.5


@pytest.mark.browser
def test_hostile_text_is_seen_as_text(visit):
    tab = visit()
    assert tab.locator(".pair .name").first.inner_text() == shapes.HOSTILE.replace("\u2028", "\n") or (
        "<script>alert(1)</script>" in tab.locator(".pair .name").first.inner_text()
    )
    assert "<script>alert(1)</script>" in tab.locator(".quote").first.inner_text()
    assert "<script>alert(1)</script>" in tab.locator("#accuracy-1 svg").inner_html().replace("&lt;", "<").replace(
        "&gt;", ">"
    )
    assert tab.locator("script").count() == 3 and tab.locator("img").count() == 0


@pytest.mark.browser
def test_toggle_changes_page_and_charts(visit):
    tab = visit()
    colours = "[getComputedStyle(document.body).backgroundColor, document.querySelector('.chart svg text').getAttribute('fill')]"
    light = tab.evaluate(colours)
    button = tab.locator("#theme")
    button.click()
    tab.wait_for_selector("html[data-drawn=dark]")
    dark = tab.evaluate(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    for _ in range(3):  # fast clicks end where the last one points
        button.click()
    tab.wait_for_selector("html[data-drawn=light]")
    tab.wait_for_timeout(500)
    assert tab.evaluate(colours) == light and tab.locator(".chart svg").count() == tab.locator(".chart").count()


@pytest.mark.browser
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


@pytest.mark.browser
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
    assert json.dumps(first[1][6][0]) in readout and "(token 2 of 9)" in readout
    summary = tab.locator(".more-rows summary").first
    summary.focus()
    tab.keyboard.press("Enter")
    assert summary.locator("..").evaluate("d => d.open")


@pytest.mark.browser
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


@pytest.mark.browser
def test_without_javascript_the_text_is_whole(visit):
    tab = visit(script=False)
    assert tab.locator("button:visible").count() == 0
    assert tab.locator(".quote.clamp").first.is_visible()
    style = tab.locator(".quote.clamp").first
    assert style.bounding_box()["height"] > 500
    assert tab.get_by_text("The chart needs JavaScript").first.is_visible()


@pytest.mark.browser
def test_print_is_light_and_whole(visit):
    tab = visit(scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator(".quote.clamp").first.bounding_box()["height"] > 500
    assert tab.locator("#theme").is_hidden()


@pytest.mark.browser
def test_tooltip_names_the_cell(visit):
    tab = visit()
    cells = tab.locator("#components-1 svg .mark-rect path").first
    cells.hover()
    assert "component" in tab.locator("#vg-tooltip-element.visible").inner_text()


def test_checks_come_from_the_results_alone(tmp_path):
    one = Result("one", xr.DataArray(0.5), unit="reward", checks=[Check("sum", 0.0, 0.0)])
    assert "completeness gap" not in read([one], tmp_path).words
