"""The units of a response that attribution gives points to: tokens, words or sentences.

A unit is a run of whole tokens, because a token is the least that a model can be shown without. Words and
sentences are cut in the text that the tokens spell, and a token belongs to the unit in which it begins; byte
tokens of one character stay together. A leading space belongs to its word, punctuation to the word before it.
Scripts written without spaces (Chinese, Japanese) are cut at every character, which is what a tokenizer knows
of their words.
"""

import bisect
import dataclasses
import itertools
import re
from typing import Literal

from reward_lens.model.tokens import Role, Tokens

By = Literal["token", "word", "sentence"]

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"(?<=\S)(?=[\s{_UNSPACED}])|(?<=[{_UNSPACED}])(?=\w)")
_SENTENCE = re.compile(
    "[.!?\u2026]+[\"'\u201d\u2019)\\]]*(?=\\s)"  # 3.14 is not the end of a sentence
    "|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09]*"
    "|\n+"
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Consecutive tokens of one role."""

    positions: range
    """Absolute token positions."""
    text: str
    role: Role


def units_of(text: Tokens, by: By, tail: bool = False) -> list[Unit]:
    """The units of the response in order; with `tail` the template's tail follows, token by token or as one
    unit."""
    first, pieces = text.response.start, [text.pieces[i] for i in text.response]
    if by == "token":
        starts = [True] * len(pieces)
    else:
        cuts = _word_cuts("".join(pieces)) if by == "word" else _sentence_cuts("".join(pieces))
        starts, done, last = [], 0, -1
        for i, piece in enumerate(pieces):
            index = last if i and text.fragment(first + i) else bisect.bisect_right(cuts, done)
            starts.append(index != last)
            last, done = index, done + len(piece)
    edges = [first + i for i, begins in enumerate(starts) if begins]
    spans = [range(a, b) for a, b in itertools.pairwise([*edges, text.response.stop])]
    if tail and len(text.tail):
        spans += [range(i, i + 1) for i in text.tail] if by == "token" else [text.tail]
    return [Unit(span, "".join(text.pieces[i] for i in span), text.role(span.start)) for span in spans]


def common_units(a: list[Unit], b: list[Unit], prefix: int) -> int:
    """How many leading units two runs share, given the length of their common token prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if (x.positions, x.role) != (y.positions, y.role) or x.positions.stop > prefix:
            return i
    return min(len(a), len(b))


def _word_cuts(text: str) -> list[int]:
    end = len(text.rstrip())  # space after the last word joins it
    return [m.start() for m in _WORD.finditer(text) if 0 < m.start() < end]


def _sentence_cuts(text: str) -> list[int]:
    """A sentence has a letter: a list's "1." opens the sentence after it, and a closing smile joins the one
    before."""
    cuts, last = [], 0
    for match in _SENTENCE.finditer(text):
        if _has_letter(text[last : match.end()]) and _has_letter(text[match.end() :]):
            last = match.end()
            cuts.append(last)
    return cuts


def _has_letter(text: str) -> bool:
    return any(c.isalpha() for c in text)
