r"""Countable properties of a response: length, layout, hedging, confidence, praise, and words taken from the prompt.

Thirteen numbers from the text alone, each defined by one line of `TEXT_FEATURES`. A word is a run of characters
between white space or dashes that holds a letter or a digit; Chinese and Japanese, written without spaces, are cut at
every character. "Outside code" leaves out fenced blocks.

What these cannot show: what a text means. A hedge is a word of a list, whatever it is doing there ("May" the month
counts, "I could be wrong" counts once), and the lists of hedges, assertive words and praise are English only:
`latin_share` says how much of a text could be. Thai, Lao and Khmer words are not cut apart. An abbreviation ("e.g. ")
ends a sentence.

Reference: Hyland 2005, Metadiscourse (hedges and boosters as classes of words; the lists here are our own).
"""

import functools
import re
import unicodedata

from reward_lens.arguments import checked_arguments
from reward_lens.data import as_messages
from reward_lens.data.checks import checked_text

TEXT_FEATURES = {
    "words": "number of words",
    "characters": "number of characters (Unicode code points), spaces included",
    "sentences": "stretches with a letter, outside code; cut at line ends and after . ! ? or an ellipsis and a space",
    "list_items": "lines outside code that begin with -, *, +, a bullet sign, or a number and . or ), then a space",
    "headings": "lines outside code that begin with one to six # and a space",
    "bold_spans": "stretches between ** and **, or __ and __, on one line outside code",
    "code_blocks": "blocks fenced by ``` or ~~~; one that is never closed counts",
    "hedges_per_100_words": "100 x hedging expressions (might, perhaps, it depends, ...) / words; 0 without words",
    "assertive_per_100_words": "100 x assertive expressions (certainly, of course, ...) / words; 0 without words",
    "praise_opener": "1 if the response opens by praising the question or the user, else 0",
    "exclamation_marks": "number of exclamation marks outside code",
    "emoji": "number of emoji and pictographs; a sequence that is drawn as one sign counts once",
    "question_overlap": "share of the different words of the last user turn that the response repeats; 0 without words",
}

_HEDGES = (
    "might", "may", "could", "would seem", "perhaps", "possibly", "possible", "probably", "maybe", "likely", "unlikely",
    "presumably", "seem", "seems", "seemingly", "appear to", "appears", "apparently", "suggest", "suggests",
    "generally", "usually", "typically", "often", "sometimes", "roughly", "approximately", "arguably", "somewhat",
    "unclear", "uncertain", "tend to", "tends to", "i think", "i believe", "i suspect", "i guess", "in my opinion",
    "in my view", "as far as i know", "to my knowledge", "it depends", "not sure", "hard to say", "not certain",
)  # fmt: skip
_ASSERTIVE = (
    "certainly", "definitely", "absolutely", "clearly", "obviously", "undoubtedly", "unquestionably", "undeniably",
    "surely", "always", "never", "must", "indeed", "of course", "without doubt", "without a doubt", "no doubt",
    "in fact", "guaranteed", "guarantees", "certain that", "i am sure", "i'm sure", "i am certain", "i am confident",
    "i'm confident", "there is no question", "beyond question", "every single", "exactly", "precisely", "proven",
)  # fmt: skip
_GOOD = (
    "great|good|excellent|fantastic|wonderful|awesome|amazing|brilliant|insightful|thoughtful|interesting|fascinating|"
    "lovely|superb|terrific|smart|clever|perceptive|important"
)
_ASKED = "questions?|points?|ideas?|observations?|thoughts?|topics?|requests?|choices?|insights?|plans?|work|job"
_PRAISE = re.compile(
    rf"\W*(?:(?:wow|oh|ah|well|yes)\W+)?(?:"
    rf"(?:(?:what|that's|that is|this is|it's|you've asked|you have asked|you asked)\s+)?(?:(?:such|an?|some)\s+)*"
    rf"(?:(?:really|very|truly|quite|absolutely|such)\s+)*(?:{_GOOD})\s+(?:{_ASKED})\b"
    rf"|(?:you're|you are)\s+(?:(?:absolutely|completely|totally|so|quite)\s+)?(?:right|correct|brilliant|amazing)\b"
    rf"|i\s+(?:really\s+|absolutely\s+)?(?:love|admire|appreciate)\s+(?:this|that|your|the|how)\b"
    rf"|(?:thanks|thank you)(?:\s+so much)?\s+for\s+(?:asking|your|this|the|bringing|sharing)\b"
    rf"|(?:great|good|nice|well|excellent)\s+(?:asked|done|spotted)\b)"
)

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s\u2013\u2014{_UNSPACED}]+")
_CODE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^`\n]*$.*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_CODE_SPAN = re.compile(r"(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
_SENTENCE_END = re.compile(
    # 3.14 is not the end of a sentence. Possessive, and begun once a run: "!!!!..." takes no time.
    "(?<![.!?\u2026])[.!?\u2026]++[\"'\u201d\u2019)\\]*_]*+(?=\\s)"
    "|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09]*"
    "|[\r\n]+"
)
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+\u2022\u2023\u25e6\u25aa\u25cf]|\d{1,3}[.)])[ \t]+(?=\S)", re.MULTILINE)
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)(?:(?!\*\*).)+?(?<=\S)\*\*|(?<!\w)__(?=\S)(?:(?!__).)+?(?<=\S)__(?!\w)")
# A pictograph with its variation selector, skin tone and joined signs; two regional letters (a flag); a keycap.
_SIGN = "[\U0001f300-\U0001f5ff\U0001f600-\U0001faff\u2600-\u27bf\u2b50\u2b55\u231a\u231b\u23e9-\u23f3]"
_TAIL = "[\ufe0f\U0001f3fb-\U0001f3ff]*"
_EMOJI = re.compile(
    rf"[\U0001f1e6-\U0001f1ff]{{2}}|[0-9#*]\ufe0f?\u20e3|{_SIGN}{_TAIL}(?:\u200d(?:{_SIGN}|[\u2640\u2642]){_TAIL})*"
)


@checked_arguments
def text_features(prompt, response) -> dict[str, float]:
    """The features of one response to one prompt, by the names and definitions of `TEXT_FEATURES`.

    Parameters
    ----------
    prompt: text, or messages that end with a user turn; only the last turn is read (for `question_overlap`).
    response: text; an empty one has 0 for every feature.

    Returns a dict of 13 finite floats in the order of `TEXT_FEATURES`: counts, two rates per 100 words, a 0 or 1 and a
    share. Raises `DataError` where either is not text. Cannot show what a text means: see the module.
    """
    question = as_messages(prompt)[-1]["content"]
    response = checked_text(response, "response")
    outside = _CODE.sub("", response)
    plain = response.casefold().replace("\u2019", "'")
    n_words = len(words := _words(response))
    asked, said = _vocabulary(question), set(map(_bare, set(words)))
    counted = {
        "words": n_words,
        "characters": len(response),
        "sentences": sum(any(map(str.isalpha, piece)) for piece in _SENTENCE_END.split(outside)),
        "list_items": len(_LIST_ITEM.findall(outside)),
        "headings": len(_HEADING.findall(outside)),
        "bold_spans": len(_BOLD.findall(_CODE_SPAN.sub("", outside))),
        "code_blocks": len(_CODE.findall(response)),
        "hedges_per_100_words": 100 * len(_any_of(_HEDGES).findall(plain)) / max(n_words, 1),
        "assertive_per_100_words": 100 * len(_any_of(_ASSERTIVE).findall(plain)) / max(n_words, 1),
        "praise_opener": _PRAISE.match(plain) is not None,
        "exclamation_marks": outside.count("!") + outside.count("\uff01"),
        "emoji": len(_EMOJI.findall(response)),
        "question_overlap": len(asked & said) / max(len(asked), 1),
    }
    return {name: float(counted[name]) for name in TEXT_FEATURES}


def latin_share(text: str) -> float:
    """Share of the letters of a text that are of the Latin script, in [0, 1]; 1 for a text without letters.

    Returns a fraction. Cannot tell English from other languages in that script.
    """
    letters = [] if text.isascii() else [c for c in text if c.isalpha()]
    return sum(map(_is_latin, letters)) / len(letters) if letters else 1.0


@functools.lru_cache(maxsize=4096)
def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "")


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if any(map(str.isalnum, word))]


@functools.lru_cache(maxsize=65536)
def _bare(word: str) -> str:
    """A word without the punctuation around it, the same whatever its case or its way of writing an accent."""
    word = unicodedata.normalize("NFC", word.casefold())
    inside = [i for i, c in enumerate(word) if c.isalnum()]
    return word[inside[0] : inside[-1] + 1] if inside else ""


@functools.lru_cache(maxsize=256)
def _vocabulary(text: str) -> frozenset[str]:
    return frozenset(map(_bare, _words(text)))


@functools.cache
def _any_of(expressions: tuple[str, ...]) -> re.Pattern[str]:
    """The longest expression that fits counts, once."""
    longest_first = [r"\s+".join(map(re.escape, e.split())) for e in sorted(expressions, key=len, reverse=True)]
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
