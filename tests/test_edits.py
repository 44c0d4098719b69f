"""Edits: the property changes and nothing else, exact edits can be taken back, odd text comes back as it is."""

import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import reward_lens as rl
from reward_lens.edits import EDITS, JUDGED, TextEdit, append_token, edits_of, judged_edits
from reward_lens.edits.edit import may_be_english
from reward_lens.edits.form import EMOJI
from reward_lens.edits.length import FILLER, PARAGRAPHS
from reward_lens.edits.stance import AGREEMENT, CERTAINTY, DISCLAIMERS, DOUBT, PRAISE
from reward_lens.edits.text import pieces, sentences
from reward_lens.errors import DataError
from reward_lens.model.demo import demo_tokenizer

PROMPT = "How do I start? I have an hour."
MARKDOWN = """# Plan

The first step is **simple**. Open the file `a. b.py`, then read it; 3.14 is fine, e.g. here.

```python
# not a heading
x = 2 ** 3  # it is. Really.
```

## Steps
1. Dr. Smith reads the **long report** first.
2. He said "Go. It is late." and left.

- plain item
- see https://example.com/a_b?c=1. Then stop.

| a | b |
| - | - |

> quoted. It is here.

The end is near."""
ODD = (
    "",
    " ",
    "\n\n\t",
    "word",
    "42",
    "\U0001f642",
    "\U0001f642 \U0001f44d\U0001f680",
    "...",
    "???!",
    "\u6c34\u5728\u4e00\u767e\u5ea6\u6cb8\u817e\u3002\u5728\u5c71\u4e0a\u66f4\u4f4e\u3002",
    "Das ist nicht die Antwort. Der Hund und die Katze sind nicht da.",
    "\u0627\u0644\u0645\u0627\u0621 \u064a\u063a\u0644\u064a\u061f \u0646\u0639\u0645. \u0634\u0643\u0631\u0627.",
    "\u0412\u043e\u0434\u0430 \u043a\u0438\u043f\u0438\u0442. \u042d\u0442\u043e \u0432\u0441\u0451.",
    "```\nonly code\n```",
    "```python\nx = 1\nnever closed. It is cut",
    "    indented = code\n    more()",
    "# Only a heading",
    "- a\n- b\n- c",
    "1. One thing.\n2. Another thing.",
    "| a | b |\n| - | - |",
    "----",
    "****",
    "** **",
    "`a",
    "``` ```",
    '{"a": [1, 2]}',
    "[" * 3000,
    "no stop at the end",
    "all lower. it is so. yes it is.",
    "Trailing space.  \n",
    "\n\n Leading space. It is so.",
    "Windows.\r\nIt is a line.\r\n\r\nAnother is here.\r\n",
    "\x00\x85\u2028 It is. Odd.",
    "\udc80 a lone surrogate. It is bad.",
    "In other words: It is. In other words: It is.",
    "It is probably so. It is certain.",
    "One [1]. Two.",
    "already ** bold. Maybe.",
    MARKDOWN,
)
BITS = (
    "It is was will are not the The word Paris e.g. etc. Dr. 3.14 1. - * # ## ### ** `x` ``` . ! ? ... : ; , ( ) [1] | "
    '> a A I " https://a.b/c. \u2026 \u6c34\u3002 \u00e9t\u00e9 \U0001f642 great probably ~~~ _x_ __a_b__'
).split()
WORDS = st.sampled_from([*BITS, "\n", "\n\n", "\t", "\r\n", ""])
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(WORDS, max_size=20).map(" ".join), st.lists(WORDS, max_size=20).map("".join)
)
EXACT = [edit for edit in EDITS.values() if edit.exact]


@functools.cache
def bundled() -> list[tuple[str, str]]:
    return [(p.messages[-1]["content"], response) for p in rl.load_pairs("demo") for response in p.responses]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def edited(name: str, response: str, prompt: str = PROMPT) -> str:
    return EDITS[name].apply(prompt, response)


def changed(name: str) -> list[tuple[str, str, str]]:
    """(prompt, response, edited) of the bundled responses that an edit changes."""
    out = [(prompt, response, edited(name, response, prompt)) for prompt, response in bundled()]
    return [row for row in out if row[1] != row[2]]


# All edits


def test_the_list_of_edits():
    assert (
        list(EDITS)
        == (
            "pad_1 pad_2 pad_4 pad_8 restate lengthen repeat_last cut_1 cut_2 cut_4 hedge assert prepend_praise agree "
            "repeat_question append_disclaimer bulletise add_headings strip_headings add_bold strip_bold add_citations "
            "add_emoji lowercase_starts title_case widen_spaces exclaim template_marks append_great append_thanks "
            "append_therefore"
        ).split()
    )
    assert all(edit.name == name and edit.changes for name, edit in EDITS.items())
    assert len({edit.changes for edit in EDITS.values()}) == len(EDITS)
    assert {e.family: [d.dose for d in EDITS.values() if d.family == e.family] for e in EDITS.values() if e.family} == {
        "pad": [1, 2, 4, 8],
        "cut": [1, 2, 4],
    }
    with pytest.raises(TypeError):
        EDITS["pad_1"] = EDITS["pad_2"]  # type: ignore[index]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("prompt", ["", PROMPT, "\u6c34?", "x " * 200])
def test_odd_text_raises_nothing_and_blank_text_comes_back(name, prompt):
    for response in ODD:
        once = edited(name, response, prompt)
        assert once == edited(name, response, prompt), "the same every time"
        if not response.strip():
            assert once == response
        inverse = EDITS[name].inverse
        if inverse is not None:
            assert isinstance(inverse(prompt, response), str)
            if EDITS[name].exact:
                assert inverse(prompt, once) == response or once == response


@pytest.mark.parametrize("name", [edit.name for edit in EXACT])
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, response=TEXTS)
@example(prompt="", response="In other words: a. In other words: a.")
@example(prompt="Q?", response="a b\n\na b")
def test_exact_edits_are_undone_character_for_character(name, prompt, response):
    once = edited(name, response, prompt)
    if once != response:
        assert EDITS[name].inverse(prompt, once) == response


# What a response must have before the edit can change it; the share of bundled responses with it is below 80%.
NEEDS = {
    "cut_2": "three sentences or more",
    "cut_4": "five sentences or more",
    "strip_headings": "headings",
    "strip_bold": "bold words",
}


@pytest.mark.parametrize("name", EDITS)
def test_most_bundled_responses_are_changed(name):
    share = len(changed(name)) / len(bundled())
    assert (share >= 0.8) == (name not in NEEDS), (name, share)


def test_the_edits_that_change_few_change_what_they_need():
    def count(response):
        return sum(p.kind not in ("heading", "rule") for p in pieces(response))

    for k in (1, 2, 4):
        assert {r for _, r, _ in changed(f"cut_{k}")} == {r for _, r in bundled() if count(r) > k}
    for name in ("headings", "bold"):
        marked = [(p, r, edited(f"add_{name}", r, p)) for p, r in bundled()]
        stripped = [edited(f"strip_{name}", e, p) != e for p, r, e in marked if e != r]
        assert sum(stripped) >= 0.8 * len(bundled()) and all(stripped)


def test_on_a_text_full_of_markup_only_edits_that_find_their_property_there_change_nothing():
    unchanged = {name for name in EDITS if edited(name, MARKDOWN) == MARKDOWN}
    assert unchanged == {"add_headings", "add_bold", "lowercase_starts"}  # "see https" begins in lower case


def test_edits_are_pure_and_a_dose_is_nested_in_the_next():
    for prompt, response in bundled():
        padded = [edited(f"pad_{dose}", response, prompt) for dose in (1, 2, 4, 8)]
        assert all(b == a or b.startswith(a) for a, b in itertools.pairwise(padded))
        cuts = [edited(f"cut_{dose}", response, prompt) for dose in (1, 2, 4)]
        assert all(b.startswith(a) for a, b in itertools.pairwise([*cuts, response]))


# Each property, and nothing but it


@pytest.mark.parametrize("dose", [1, 2, 4, 8])
def test_pad_adds_that_many_filler_sentences(dose):
    used = Counter()
    for _, response, after in changed(f"pad_{dose}"):
        assert after.startswith(response)
        added = sentences(after[len(response) :].strip())
        assert len(added) == dose and {s.strip() for s in added} <= set(FILLER)
        assert len(set(added)) == dose
        used.update(s.strip() for s in added)
    assert set(used) == set(FILLER), "a hash of the response chooses among all of them"


def test_additions_keep_the_response_whole_and_add_only_their_phrase():
    for name, phrases in {"lengthen": PARAGRAPHS, "append_disclaimer": DISCLAIMERS}.items():
        for _, response, after in changed(name):
            assert after.startswith(response) and after[len(response) :].strip() in phrases
            assert name != "lengthen" or after[len(response) :].startswith("\n\n")
    for name, phrases in {"prepend_praise": PRAISE, "agree": AGREEMENT}.items():
        rows = changed(name)
        assert all(after.endswith(response) for _, response, after in rows)
        assert {after[: -len(response)].strip() for _, response, after in rows} == set(phrases)
    for word in ("great", "thanks", "therefore"):
        assert all(after == f"{response} {word}" for _, response, after in changed(f"append_{word}"))
    for _, response, after in changed("template_marks"):
        assert after == f"### Assistant:\n{response}\n###"


def test_restating_and_repeating_use_the_responses_own_words():
    for _, response, after in changed("restate"):
        said = after[len(response) :].strip().removeprefix("In other words: ")
        assert said.rstrip(".") in response
    for _, response, after in changed("repeat_last"):
        last = after[len(response) :].strip()
        assert last and last in response and words(after) == words(response) + words(last)
    assert edited("restate", "Yes. Paris is the capital. It is old.").endswith(" In other words: Paris is the capital.")
    assert edited("restate", "Paris") == "Paris\n\nIn other words: Paris."
    assert edited("restate", "Here are the steps:\n\n- a\n- b") == "Here are the steps:\n\n- a\n- b"
    assert edited("repeat_last", "One is. Two are.") == "One is. Two are. Two are."


def test_repeating_the_question():
    for prompt, response, after in changed("repeat_question"):
        assert after.endswith(response)
        assert words(after[: -len(response)])[2:] == words(prompt)
    long = "It was a long day. " * 20 + "Where is Rome? Tell me."
    assert edited("repeat_question", "Italy.", long) == "You asked: Where is Rome?\n\nItaly."
    assert edited("repeat_question", "Italy.", "It was a long day. " * 20) == "You asked: It was a long day.\n\nItaly."
    assert edited("repeat_question", "Italy.", " \n") == "Italy."


def test_cutting_keeps_a_beginning_and_never_ends_inside_code():
    text = "Intro is here.\n\n## Code\n```\na. B\n\nc\n```\nAfter it. Last one."
    assert edited("cut_1", text) == "Intro is here."
    assert edited("cut_2", text) == "Intro is here.\n\n## Code\n```\na. B\n\nc\n```"
    assert edited("cut_4", text) == text
    for k in (1, 2, 4):
        assert edited(f"cut_{k}", MARKDOWN).count("```") in (0, 2)


def test_bulletise_keeps_every_sentence():
    for _, response, after in changed("bulletise"):
        for piece in pieces(response):
            assert " ".join(piece.body.split()) in " ".join(after.split())
        assert words(after) == words(response)
        assert re.search("^- ", after, re.MULTILINE)
    assert edited("bulletise", "One is. Two are.\nThree is.") == "- One is.\n- Two are.\n- Three is."
    assert edited("bulletise", "The steps are:\n1. a\n2. b") == "The steps are:\n1. a\n2. b"
    assert (
        edited("bulletise", "One is. Two are.\n\n```\nx\n```\nEnd.") == "- One is.\n- Two are.\n\n```\nx\n```\n- End."
    )
    back = EDITS["bulletise"].inverse
    assert back(PROMPT, "- One is.\n- Two are.") == "One is. Two are."
    plain = [
        (p, r, e) for p, r, e in changed("bulletise") if not re.search(r"^\s*[-\d]", r, re.MULTILINE) and "\n" not in r
    ]
    assert len(plain) > 60 and all(back(p, e) == r for p, r, e in plain)


def test_stripping_markup_leaves_the_words_and_the_code():
    bold, heads = edited("strip_bold", MARKDOWN), edited("strip_headings", MARKDOWN)
    assert bold == MARKDOWN.replace("**simple**", "simple").replace("**long report**", "long report")
    assert heads == MARKDOWN.replace("# Plan", "Plan").replace("#Plan", "Plan").replace("## Steps", "Steps")
    assert words(bold) == words(heads) == words(MARKDOWN)
    assert "x = 2 ** 3" in bold and "# not a heading" in heads
    assert edited("strip_bold", "***both*** and __two words__ and __init__") == "*both* and two words and __init__"
    for name in ("add_bold", "add_headings"):
        for _, response, after in changed(name):
            added = [] if name == "add_bold" else ["answer", "details"]
            assert sorted((Counter(words(after)) - Counter(words(response))).elements()) in (added, added[:1])


def test_bold_falls_on_one_word_of_a_sentence_and_never_on_code_or_links():
    assert edited("add_bold", "Water boils quickly. See `important_code` there.") == (
        "Water boils **quickly**. See `important_code` **there**."
    )
    assert edited("add_bold", "See https://example.com/verylongpath now, please.").endswith(
        "verylongpath now, **please**."
    )
    assert edited("add_bold", "The cafe\u0301 is ope\u0301ning soon.") == "The cafe\u0301 is ope\u0301ning **soon**."
    assert edited("add_bold", "It has **bold** already. Plain.") == "It has **bold** already. Plain."
    for _, response, after in changed("add_bold"):
        assert 1 <= after.count("**") / 2 <= sum(p.kind == "sentence" for p in pieces(response))


@pytest.mark.parametrize(("name", "phrases"), [("hedge", DOUBT), ("assert", CERTAINTY)])
def test_hedge_and_assert_add_only_their_words(name, phrases):
    allowed = set(words(" ".join(phrases)))
    for _, response, after in changed(name):
        added = Counter(words(after)) - Counter(words(response))
        assert added and set(added) <= allowed
        kept = iter(re.findall(r"\w+|[^\w\s]", after))
        assert all(token in kept for token in re.findall(r"\w+|[^\w\s]", response)), "the rest, in its order"


def test_hedge_and_assert_stand_at_the_same_places():
    for prompt, response in bundled():
        doubtful, certain = edited("hedge", response, prompt), edited("assert", response, prompt)
        swapped = doubtful
        for a, b in zip(DOUBT, CERTAINTY, strict=True):
            swapped = swapped.replace(a, b)
        assert certain == swapped or doubtful == response or certain == response


def test_hedge_leaves_code_quotations_questions_and_hedged_sentences_alone():
    for text, expected in {
        "It is red.": "It is probably red.",
        "It is not red. It will rain.": "It is probably not red. It will probably rain.",
        "Mix the flour. Bake it.": "Mix the flour, I would say. Bake it.",
        "Is it red? Maybe it is.": "Is it red? Maybe it is.",
        "It might be red.": "It might be red.",
        'He said "it is red" again.': 'He said "it is red" again, I would say.',
        "The flag `it is x` works.": "The flag `it is x` works, I would say.",
        "If it is late, go. The sky is dark.": "If it is late, go. The sky is probably dark.",
        "Her will was read.": "Her will was probably read.",
        "```\nIt is code.\n```": "```\nIt is code.\n```",
        "> It is quoted.": "> It is quoted.",
        "## It is a heading": "## It is a heading",
        "It is probably red. It is big.": "It is probably red. It is big.",
    }.items():
        assert edited("hedge", text) == expected
    inner = "# not a heading\nx = 2 ** 3  # it is. Really."
    for name in ("hedge", "assert"):
        assert inner in edited(name, MARKDOWN) and '"Go. It is late."' in edited(name, MARKDOWN)
        assert edited(name, MARKDOWN) != MARKDOWN


def test_marks_letters_and_spaces_change_alone():
    for _, response, after in changed("add_citations"):
        assert re.sub(r" \[\d+\]", "", after) == response
        numbers = re.findall(r"(?<= \[)\d+(?=\])", after)
        assert numbers == [str(i + 1) for i in range(len(numbers))]
    for _, response, after in changed("add_emoji"):
        assert re.sub(f" ({'|'.join(EMOJI)})", "", after) == response
    for name in ("lowercase_starts", "title_case"):
        for _, response, after in changed(name):
            assert after.lower() == response.lower()
    for _, response, after in changed("widen_spaces"):
        assert after.split() == response.split() and len(after) > len(response)
    for _, response, after in changed("exclaim"):
        assert len(after) == len(response) and words(after) == words(response)
        assert {pair for pair in zip(response, after, strict=True) if pair[0] != pair[1]} == {(".", "!")}


def test_form_edits_on_text_with_code():
    assert edited("title_case", "the cafe\u0301s ope\u0301nings") == "The Cafe\u0301s Ope\u0301nings"  # accents apart
    assert edited("title_case", "one `two three` it's https://a.b/c four") == "One `two three` It's https://a.b/c Four"
    assert edited("widen_spaces", "a b `c d` e\n  f  g") == "a  b `c d` e\n  f   g"
    assert edited("lowercase_starts", "The end. NASA is. I am.") == "the end. NASA is. i am."
    assert edited("exclaim", "It is 3.14, e.g. here. Is it? Yes...") == "It is 3.14, e.g. here! Is it? Yes..."
    assert edited("exclaim", "\u6c34\u3002\u706b\u3002") == "\u6c34\uff01\u706b\uff01"
    assert edited("add_citations", 'One is. He said "two." Three') == 'One is [1]. He said "two." [2] Three [3]'
    code = MARKDOWN[MARKDOWN.index("```") : MARKDOWN.rindex("```") + 3]
    for name in EDITS:
        if not name.startswith("cut"):
            assert code in edited(name, MARKDOWN), name
            assert "`a. b.py`" in edited(name, MARKDOWN)


def test_headings_are_added_once_and_only_where_there_are_none():
    assert edited("add_headings", "One is.\n\nTwo are.\n\nThree are.") == (
        "## Answer\n\nOne is.\n\n## Details\n\nTwo are.\n\nThree are."
    )
    assert edited("add_headings", "One is.") == "## Answer\n\nOne is."
    assert edited("add_headings", "# Title\n\nOne is.") == "# Title\n\nOne is."
    assert edited("add_headings", "```\n# code\n```") == "## Answer\n\n```\n# code\n```"


@pytest.mark.parametrize("text", [t for t in ODD if not may_be_english(t)])
def test_english_words_are_not_put_into_other_languages(text):
    for name in ("pad_1", "restate", "lengthen", "hedge", "assert", "agree", "prepend_praise", "append_disclaimer"):
        assert edited(name, text) == text
    assert edited("repeat_last", text) != text


def test_which_texts_may_be_english():
    assert [t for t in ODD if not may_be_english(t)] == [
        t for t in ODD if t.startswith(("\u6c34", "Das", "\u0627", "\u0412"))
    ]
    assert all(may_be_english(response) for _, response in bundled())
    assert may_be_english("The word der is German.")
    assert not may_be_english("Il faut que les enfants et le chien dorment dans une chambre.")


def test_additions_keep_clear_of_lists_and_code():
    assert edited("append_disclaimer", "- a\n- b").startswith("- a\n- b\n\n")
    assert edited("append_disclaimer", "```\nx\n```").startswith("```\nx\n```\n\n")
    assert edited("append_disclaimer", "```\nx") == "```\nx"
    assert edited("pad_1", "Paris").startswith("Paris\n\n")
    assert edited("pad_1", "It is Paris.").startswith("It is Paris. ")
    assert edited("agree", "1. a\n2. b").endswith(".\n\n1. a\n2. b")


# Sentences and pieces


@pytest.mark.parametrize(
    "expected",
    [
        ["Dr. Smith is here. ", "He left at 3.14 p.m. on Jan. 3. ", "Fine."],
        ["See e.g. Rome, i.e. the city. ", "J. K. Rowling wrote it. ", "So did I. ", "Yes."],
        ["Really?! ", "Yes\u2026 ", "No... it is not. ", "Wait."],
        ['He said "Go. Now." ', "Then he left."],
        ["Run `a. B` now. ", "See https://a.b/c. ", "Done."],
        ["1. First. ", "It is second."],
        ["\u6c34\u3002", "\u706b\uff01", "\u571f"],
        ["\u300c\u6c34\u3002\u300d\u3068\u8a00\u3063\u305f\u3002", "\u706b\u3002"],
        ["\u0939\u093e\u0901\u0964 ", "\u0928\u0939\u0940\u0902\u0964"],
        ["all lower. ", "it is so."],
        ["Roses are red\n", "Violets are blue\n", "It wraps\nhere. ", "End."],
        ["No. ", "Question No. 5 is hard. ", "It ends in etc. ", "Yes."],
        ["Nice. ", "\U0001f642 Bye."],
    ],
)
def test_sentences(expected):
    assert sentences("".join(expected)) == expected


def test_pieces_know_markdown():
    found = [(p.kind, p.item, p.body) for p in pieces(MARKDOWN)]
    assert found == [
        ("heading", False, "Plan"),
        ("sentence", False, "The first step is **simple**."),
        ("sentence", False, "Open the file `a. b.py`, then read it; 3.14 is fine, e.g. here."),
        ("code", False, "```python\n# not a heading\nx = 2 ** 3  # it is. Really.\n```"),
        ("heading", False, "Steps"),
        ("sentence", True, "Dr. Smith reads the **long report** first."),
        ("sentence", True, 'He said "Go. It is late." and left.'),
        ("sentence", True, "plain item"),
        ("sentence", True, "see https://example.com/a_b?c=1."),
        ("sentence", True, "Then stop."),
        ("table", False, "| a | b |\n| - | - |"),
        ("quote", False, "> quoted. It is here."),
        ("sentence", False, "The end is near."),
    ]
    assert [p.kind for p in pieces("```\na")] == ["open code"]
    assert [p.kind for p in pieces('{"a": "It is. So."}')] == ["code"]
    assert [p.kind for p in pieces("~~~\n```\n~~~\nEnd.")] == ["code", "sentence"]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_no_character_is_lost(text):
    found = pieces(text)
    assert "".join(p.text for p in found) == (text if text.strip() else "")
    assert all(p.body and p.body == p.body.rstrip() for p in found)
    assert "".join(sentences(text)) == text


# Choosing edits


def test_edits_of():
    assert edits_of(None) == edits_of() == tuple(EDITS.values())
    assert [e.name for e in edits_of(["hedge", "pad", "cut_2"])] == [
        "hedge",
        "pad_1",
        "pad_2",
        "pad_4",
        "pad_8",
        "cut_2",
    ]
    own = TextEdit("shout", "capitals", lambda _, r: r.upper())
    assert edits_of([own, "agree"]) == (own, EDITS["agree"])
    with pytest.raises(DataError, match="did you mean hedge") as error:
        edits_of(["hegde"])
    assert "'hegde'" in error.value.found and "bulletise" in error.value.expected
    for names, words_of_it in (([], "empty list"), ("hedge", "the text 'hedge'"), (["pad", "pad_1"], "pad_1")):
        with pytest.raises(DataError, match=words_of_it):
            edits_of(names)
    with pytest.raises(DataError, match="choose one of these"):
        edits_of(["zzzzzz"])


def test_append_token():
    assert append_token("great").apply("", "Yes.") == "Yes. great"
    mark = append_token("\n###")
    assert mark.apply("", "Yes.") == "Yes.\n###" and mark.inverse("", "Yes.\n###") == "Yes."
    assert mark.name == "append_'\\n###'" and append_token(" sure").name == "append_sure"
    for token in ("", " \n", "\udc80"):
        with pytest.raises(DataError):
            append_token(token)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"name": " "}, "no name"),
        ({"exact": True}, "no inverse"),
        ({"dose": 2}, "a dose without a family"),
        ({"family": "pad"}, "a family without a dose"),
    ],
)
def test_an_incomplete_edit_is_refused(fields, found):
    with pytest.raises(DataError, match=found):
        TextEdit(**{"name": "own", "changes": "x", "apply": lambda _, r: r, **fields})


@pytest.mark.parametrize(
    ("field", "found"), [("name", "no name"), ("apply", "no function"), ("inverse", "no function")]
)
def test_fields_of_other_types_are_refused(field, found):
    edit = object.__new__(TextEdit)  # past the check of annotations, which tests alone have
    vars(edit).update({**vars(EDITS["hedge"]), field: 3})
    with pytest.raises(DataError, match="no name" if field == "name" else "no function"):
        edit.__post_init__()


def test_an_edit_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EDITS["hedge"].name = "other"  # type: ignore[misc]


def test_no_model_code_is_loaded():
    code = "import sys, reward_lens.edits; print(*[n for n in ('torch', 'transformers', 'pandas') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Items that were written by hand


ITEMS = judged_edits()
each_item = pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)


def test_there_are_twelve_of_each_kind_as_in_the_file():
    rows = files("reward_lens").joinpath("assets/judged_edits.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row) for row in rows] == [dataclasses.asdict(item) for item in ITEMS]
    assert Counter(item.edit for item in ITEMS) == dict.fromkeys(JUDGED, 12)
    assert judged_edits() is ITEMS


@each_item
def test_an_item_is_clean(item):
    assert item.id.startswith(item.edit + "-")
    for text in (item.prompt, item.response, item.edited):
        assert text and text == text.strip() and text.isascii() and "\n" not in text
    assert item.response != item.edited
    a, b = len(item.response.split()), len(item.edited.split())
    assert abs(a - b) <= 0.1 * max(a, b)


def test_ids_prompts_and_responses_are_unique_and_new():
    texts = [text for item in ITEMS for text in (item.response, item.edited)]
    assert len({item.id for item in ITEMS}) == len(ITEMS) and len(set(texts)) == len(texts)
    prompts = [set(words(item.prompt)) for item in ITEMS]
    others = {" ".join(words(prompt)) for prompt, _ in bundled()}
    for a, b in itertools.combinations([*prompts, *(set(other.split()) for other in others)], 2):
        assert len(a & b) / len(a | b) < 0.5


@pytest.mark.parametrize("kind", JUDGED)
def test_lengths_balance_within_a_kind(kind):
    counts = [(len(i.response.split()), len(i.edited.split())) for i in ITEMS if i.edit == kind]
    plain, changed_to = (sum(column) for column in zip(*counts, strict=True))
    assert abs(changed_to - plain) <= 0.03 * plain
    longer = sum(b > a for a, b in counts)
    assert 1 <= longer <= 11, "neither side is the longer one throughout"


def test_token_lengths_are_as_the_module_says():
    tokenizer, ratios = demo_tokenizer(), {}
    for kind in JUDGED:
        sides = zip(*((i.response, i.edited) for i in ITEMS if i.edit == kind), strict=True)
        plain, changed_to = (sum(map(len, tokenizer(list(side))["input_ids"])) for side in sides)
        ratios[kind] = round(changed_to / plain, 2)
    assert 1.2 < ratios.pop("jargon") < 1.3 and 0.85 < ratios.pop("vague") < 0.92
    assert all(0.97 < ratio < 1.03 for ratio in ratios.values())
