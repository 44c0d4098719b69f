"""Text features counted by hand: what each definition counts, what it leaves out, and texts of every kind."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_lens.errors import DataError
from reward_lens.features import TEXT_FEATURES, latin_share, text_features

MARKDOWN = """# Plan

Great start! Here is **the plan** and __more__:

- first item
* second item
  1. third item
2) fourth item
-not an item
#not a heading

```python
# a comment, no heading
- x ** y ** z!
```

Use `a ** b ** c` or my__name__here. The end"""


def one(name: str, response: str, prompt: str = "Why is the sky blue?") -> float:
    return text_features(prompt, response)[name]


def test_an_example_counted_by_hand():
    found = text_features("Tell me about the plan.", MARKDOWN)
    assert found == {
        "words": 41.0, "characters": float(len(MARKDOWN)), "sentences": 11.0, "list_items": 4.0, "headings": 1.0,
        "bold_spans": 2.0, "code_blocks": 1.0, "hedges_per_100_words": 0.0, "assertive_per_100_words": 0.0,
        "praise_opener": 0.0, "exclamation_marks": 1.0, "emoji": 0.0, "question_overlap": 2 / 5,
    }  # fmt: skip
    assert list(found) == list(TEXT_FEATURES)


def test_an_empty_response_has_nothing():
    for response in ("", "  \n\t "):
        found = text_features("", response)
        assert found.pop("characters") == len(response)
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("response", "words", "sentences"),
    [
        ("One two three.", 3, 1),
        ("well-known facts\u2014and don't stop - ever", 6, 1),
        ("Pi is 3.14. That is all!", 6, 2),
        ("No full stop\nNor here", 5, 2),
        ('Wait... what?! "Yes." He left.', 5, 4),
        ("*Really.* Yes", 2, 2),
        ("1. Go there.\n2. Come back.", 6, 2),
        ("... !!! ---", 0, 0),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", 4, 2),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440. \u0414\u0430.", 3, 2),
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", 2, 1),
    ],
)
def test_words_and_sentences(response, words, sentences):
    assert (one("words", response), one("sentences", response)) == (words, sentences)


@pytest.mark.parametrize(
    ("response", "rate"),
    [
        ("It might rain", 100 / 3),
        ("I THINK so", 100 / 3),
        ("i\nthink so", 100 / 3),
        ("Not sure. It depends.", 50.0),
        ("mighty maybes", 0.0),
        ("This is not certain", 25.0),
    ],
)
def test_hedges(response, rate):
    assert one("hedges_per_100_words", response) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("response", "rate"),
    [
        ("Of course it is certainly so", 2 * 100 / 6),
        ("I\u2019m sure of it", 25.0),
        ("without a doubt", 100 / 3),
        ("nevertheless mustard", 0.0),
    ],
)
def test_assertive(response, rate):
    assert one("assertive_per_100_words", response) == pytest.approx(rate)


@pytest.mark.parametrize(
    "response",
    [
        "Great question! The sky",
        "What a great question.",
        "That\u2019s a really insightful point",
        "**Excellent question!**",
        "Such an interesting idea",
        "You're absolutely right",
        "I love this question",
        "Thank you for asking! The",
        "Wow, what a brilliant idea",
    ],
)
def test_praise_opens_a_response(response):
    assert one("praise_opener", response) == 1.0
    assert one("praise_opener", f"The sky scatters light. {response}") == 0.0


@pytest.mark.parametrize("response", ["Great skies are blue", "A good question needs thought, so", "Thanks", "Light"])
def test_no_praise(response):
    assert one("praise_opener", response) == float(response.startswith("A good question"))


@pytest.mark.parametrize(
    ("response", "count"),
    [
        ("\U0001f600\U0001f600", 2),
        ("\U0001f44d\U0001f3fd", 1),
        ("\U0001f469\u200d\U0001f469\u200d\U0001f467", 1),
        ("\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", 2),
        ("\u2764\ufe0f 1\ufe0f\u20e3", 2),
        ("\u2192 \u00a9 \u2014 :) 1 # *", 0),
    ],
)
def test_emoji(response, count):
    assert one("emoji", response) == count


@pytest.mark.parametrize(
    ("response", "blocks", "items"),
    [
        ("```\n- a\n```\n- b", 1, 1),
        ("```\n- never closed", 1, 0),
        ("~~~\n```\n- a\n~~~\n- b\n```\n- c\n```", 2, 1),
        ("````\n```\n- a\n```\n````\n- b", 1, 1),
        ("1. step\n   ```sh\n   - x\n   ```\n2. step", 1, 2),
        ("```inline``` code", 0, 0),
        ("\u2022 one\r\n\u2022 two", 0, 2),
    ],
)
def test_code_and_lists(response, blocks, items):
    assert (one("code_blocks", response), one("list_items", response)) == (blocks, items)


@pytest.mark.parametrize(
    ("response", "count"),
    [("**a** and **b c**", 2), ("***both***", 1), ("** not bold **", 0), ("2**3**4", 1), ("**over\nlines**", 0),
     ("`**code**`", 0), ("a__b__c", 0)],
)  # fmt: skip
def test_bold(response, count):
    assert one("bold_spans", response) == count


def test_overlap_is_a_share_of_the_different_words_of_the_last_turn():
    assert one("question_overlap", 'The SKY, "blue"!', "Why is the sky blue, blue?") == 3 / 5
    assert one("question_overlap", "caf\u00e9", "cafe\u0301") == 1.0
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"},
             {"role": "user", "content": "and now"}]  # fmt: skip
    assert text_features(turns, "hello hi now")["question_overlap"] == 0.5
    assert one("question_overlap", "anything", "...") == 0.0


@given(st.text(), st.text())
def test_any_text_gives_thirteen_finite_numbers(prompt, response):
    found = text_features(prompt, response)
    assert len(found) == 13 and all(type(x) is float and math.isfinite(x) and x >= 0 for x in found.values())
    assert found["question_overlap"] <= 1 and found["praise_opener"] in (0, 1)
    assert found["words"] <= found["characters"] == len(response)
    assert found == text_features(prompt, response)
    twice = text_features(prompt, response + "\n\n" + response)
    assert twice["words"] == 2 * found["words"] and twice["emoji"] == 2 * found["emoji"]


@pytest.mark.parametrize(
    "text", ["**" * 20_000, "`" * 40_001, "~~~\n" * 9_001, "a " * 30_000, "#" * 40_000, "!" * 40_000, "1" * 40_000,
             "\U0001f469\u200d" * 9_000, "`a" * 20_000, "__a" * 12_000,
             "!" + ")" * 40_000, "." * 40_000 + "x", " " * 40_000, "\n" * 40_000,
             "not " + " " * 40_000],
    ids=lambda text: ascii(text[:4]),
)  # fmt: skip
def test_long_odd_texts_take_no_time(text):
    import time

    start = time.process_time()
    text_features(text, text)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ("p", None, "'response' cannot be used.*NoneType None.*text"),
        ("p", float("nan"), "'response' cannot be used.*float nan"),
        ("p", "\ud800", "lone surrogate"),
        (None, "r", "'prompt' cannot be used"),
        ([{"role": "assistant", "content": "x"}], "r", "ends? .*user|last message by 'user'"),
    ],
)
def test_what_is_no_text(prompt, response, message):
    with pytest.raises(DataError, match=message):
        text_features(prompt, response)


def test_latin_share():
    assert latin_share("caf\u00e9 na\u00efve") == 1.0 and latin_share("12 !") == 1.0
    assert latin_share("\u041f\u0440\u0438\u0432\u0435\u0442") == 0.0
    assert latin_share("ab\u4f60\u597d") == 0.5
