"""The explorer in headless Chromium: searched, sorted and looked through by pointing and by keys, wide and narrow."""

import itertools
import re

import pytest

import reward_lens as rl
from browsing import CONTRAST, visits
from dictionaries import random_sae
from families import tiny_model
from planted import planted_pairs

pytestmark = pytest.mark.browser

HOSTILE = "</script><script>alert(1)</script>"
SHOWN = ".latents tbody tr:not([hidden])"
ROWS = f"() => [...document.querySelectorAll('{SHOWN}')].map((row) => row.dataset)"
CUT = """() => [...document.querySelectorAll(".latents :is(th, td), #detail *, .tools *")].filter((element) => {
  const { right, width } = element.getBoundingClientRect();
  return width && getComputedStyle(element).clipPath === "none" && right > document.documentElement.clientWidth + 1;
}).map((element) => element.outerHTML)"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rm = rl.RewardModel(*tiny_model("llama", seed=1), name="tiny")
    texts = {t[0]: t for t in planted_pairs("length", 30)}
    pairs = [rl.Pair(*t, id=f"q{i} {HOSTILE}") for i, t in enumerate(texts.values())][:12]
    sae = random_sae()
    return rl.latent_explorer(
        rm, sae, pairs, tmp_path_factory.mktemp("explorer") / "latents.html", n_latents=20, n_tested=4, contexts=3
    )


@pytest.fixture
def visit(browser, path):
    with visits(browser, path, lambda scheme: "#detail h2") as go:
        yield go


def numbers(tab, key: str) -> list[float | None]:
    return [float(row[key]) if key in row else None for row in tab.evaluate(ROWS)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits(visit, width, scheme):
    tab = visit(width, scheme)
    for details in tab.locator("details").all():
        details.evaluate("d => { d.open = true; }")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator(".list").evaluate("list => list.scrollWidth <= list.clientWidth")
    assert tab.evaluate(CUT) == []
    assert tab.evaluate("violations") == []
    contrasts = tab.evaluate(CONTRAST)
    assert contrasts and min(contrasts) >= 4.5
    beside = tab.evaluate("document.querySelector('#detail').getBoundingClientRect().left") > 200
    assert beside == (width == 1280)


def test_no_heading_is_skipped(visit):
    levels = visit().evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_search_by_index_and_by_words(visit):
    tab = visit()
    rows = tab.evaluate(ROWS)
    label = rows[3]["label"]
    for wanted in (label, label.lower(), label[1:], f"  {label} "):
        tab.fill("#query", wanted)
        assert label in [row["label"] for row in tab.evaluate(ROWS)]
    tab.fill("#query", "no text has this")
    assert tab.locator(SHOWN).count() == 0 and tab.locator("#found").inner_text() == f"0 of {len(rows)} latents"
    word = re.findall("[a-z]{3,}", tab.locator("#detail .strip").first.inner_text().lower())[0]
    tab.fill("#query", word.upper())
    left = [row["label"] for row in tab.evaluate(ROWS)]
    assert left and tab.locator("#detail-name").inner_text() in left
    tab.fill("#query", "")
    assert len(tab.evaluate(ROWS)) == len(rows)


def test_sorting(visit):
    tab = visit()
    for option in tab.locator("#order option").all():
        key, way = option.get_attribute("value").split(" ")
        tab.select_option("#order", f"{key} {way}")
        values = numbers(tab, key)
        known = [abs(v) if way == "size" else v for v in values if v is not None]
        assert known == sorted(known, reverse=way != "up") and len(known) > 1
        assert None not in values[: len(known)]  # what was not measured comes last
    assert 1 < len([v for v in numbers(tab, "effect") if v is not None]) <= 4


def test_a_click_shows_the_latent_and_the_address_names_it(visit):
    tab = visit()
    row = tab.locator(SHOWN).nth(4)
    label = row.get_attribute("data-label")
    row.locator("td").first.click()
    assert tab.locator("#detail-name").inner_text() == label and tab.evaluate("location.hash") == f"#{label}"
    assert tab.locator(".latents [aria-current]").get_attribute("data-label") == label
    near = tab.locator("#detail .near a").first
    there = near.inner_text()
    near.click()
    assert tab.locator("#detail-name").inner_text() == there
    again = visit(part=f"#{label}")
    assert again.locator("#detail-name").inner_text() == label
    again.evaluate(f"location.hash = '#{there}'")
    again.wait_for_function(f"document.getElementById('detail-name').textContent === '{there}'")


def test_keys(visit):
    tab = visit()
    labels = [row["label"] for row in tab.evaluate(ROWS)]
    tab.locator("#order").focus()
    tab.keyboard.press("Tab")
    name = "document.getElementById('detail-name').textContent"
    focused = "document.activeElement.textContent"
    assert tab.evaluate(focused) == labels[0]  # one stop in the list, not twenty
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", -1), ("Home", 0), ("ArrowUp", 0)):
        tab.keyboard.press(key)
        assert tab.evaluate(focused) == labels[place] == tab.evaluate(name), key
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "detail"
    strip = tab.locator("#detail .strip").first
    strip.focus()
    tab.keyboard.press("ArrowRight")
    assert "(1 of " in tab.locator("#detail output").first.inner_text()


def test_the_peak_is_marked_and_hostile_text_is_text(visit):
    tab = visit()
    strips = tab.locator("#detail .strip")
    assert strips.count() > 0
    for strip in strips.all():
        assert strip.locator(".peak").count() == 1
        assert "underline" in strip.locator(".peak").evaluate("p => getComputedStyle(p).textDecorationLine")
    assert HOSTILE in tab.locator("#detail .where").first.inner_text()
    assert tab.locator("script").count() == 2
    assert tab.locator("#detail .activations rect").count() > 1


def test_on_a_phone_a_touch_leads_to_the_detail_and_back(visit):
    tab = visit(390)
    tab.locator(SHOWN).nth(2).click()
    tab.wait_for_function("Math.abs(document.getElementById('detail').getBoundingClientRect().top) < 40")
    tab.get_by_text("Back to the list").click()
    tab.wait_for_function("Math.abs(document.getElementById('list').getBoundingClientRect().top) < 60")


def test_toggle_changes_the_colours(visit):
    tab = visit()
    colour = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(colour)
    tab.locator("#theme").click()
    assert tab.evaluate(colour) != light and tab.locator("#theme").inner_text() == "Light colours"


def test_without_javascript_the_list_is_whole(visit):
    tab = visit(script=False)
    assert tab.locator(".latents tbody tr").last.is_visible() and tab.locator("#query").is_hidden()
    assert tab.get_by_text("need JavaScript").is_visible()
