"""Token strips as text of the page: each token with the class that colours it and the value it carries."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

from reward_lens.charts.rows import text_of
from reward_lens.charts.strip import Block, blocks, colour_limit, readable
from reward_lens.report import numbers
from reward_lens.result import Result

LEVELS = 10  # shades on either side of zero; style sheet and legend have as many
LONG = 1200  # characters above which a text is folded to a few lines with a button for the rest
OPEN = 2  # pairs that are open when the page is read first


@dataclasses.dataclass(frozen=True)
class Token:
    text: str
    shade: str
    value: str
    tail: bool = False
    """Whether it is the template's, which must not be turned round among the words of a text from right to left."""


@dataclasses.dataclass(frozen=True)
class Text:
    """One side: the tokens of the prompt (kept apart, both sides share them) and what follows."""

    side: str
    reward: str
    prompt: list[Token]
    tokens: list[Token]
    long: bool


@dataclasses.dataclass(frozen=True)
class PairText:
    pair: str
    subset: str
    prompt: str
    prompt_long: bool
    margin: str
    texts: list[Text]
    open: bool


@dataclasses.dataclass(frozen=True)
class Strip:
    """All pairs of one result that fit on the page, with the legend of their common colour scale."""

    pairs: list[PairText]
    ends: tuple[str, str]
    note: str
    shades: list[str]
    tokens: int


def strip(result: Result, rewards: Mapping[tuple[str, str], float], room: int) -> Strip:
    """`room`: tokens the page has space for. The first pair always fits; the note counts what is left out."""
    # Nothing in every token that both responses begin with is no text to read.
    texts = [block for block in blocks(result) if block.side != "margin" or any(block.values)]
    limit, largest = colour_limit(texts)
    grouped = [(pair, list(group)) for pair, group in itertools.groupby(texts, key=lambda block: block.pair)]
    shown, used = [], 0
    for pair, group in grouped:
        size = sum(len(block.pieces) for block in group)
        if shown and used + size > room:
            break
        used += size
        shown.append(_pair(result, pair, group, limit, rewards, opened=len(shown) < OPEN))
    notes = [f"Read at {texts[0].depth}."] if texts and texts[0].depth else []
    if largest > limit:
        ends, size = numbers.number(limit), numbers.number(largest)
        notes.append(f"The colour ends at \u00b1{ends}; the largest absolute value is {size}.")
    if any("" in block.pieces for block in texts):
        notes.append("A dot (\u00b7) with a value of its own is a further token of the character before it.")
    if len(shown) < len(grouped):
        notes.append(f"The first {len(shown)} of {len(grouped):,} pairs; the saved result holds all.")
    shades = [f"n{i}" for i in range(LEVELS, 0, -1)] + [""] + [f"p{i}" for i in range(1, LEVELS + 1)]
    ends = (numbers.number(-limit), numbers.number(limit, signed=True))
    return Strip(shown, ends, " ".join(notes), shades, used)


def _pair(result: Result, pair: str, group: list[Block], limit: float, rewards: Mapping, opened: bool) -> PairText:
    prompt, subset = _label(result, pair, "prompt"), _label(result, pair, "subset")
    texts = [_text(block, limit, rewards.get((pair, block.side))) for block in group]
    margin = rewards.get((pair, "margin"))
    shown = "" if margin is None else numbers.number(margin, signed=True)
    return PairText(pair, subset, prompt, len(prompt) > LONG, shown, texts, opened)


def _text(block: Block, limit: float, reward: float | None) -> Text:
    entries = zip(block.pieces, block.values, block.roles, strict=True)
    tokens = [dataclasses.replace(token(piece, value, limit), tail=role == "tail") for piece, value, role in entries]
    lead = len(list(itertools.takewhile(lambda role: role == "prompt", block.roles)))
    if lead == len(tokens):  # nothing but prompt: it is the text
        lead = 0
    length = sum(len(piece) for piece in block.pieces[lead:])
    written = "" if reward is None else numbers.number(reward, signed=True)
    return Text(block.side, written, tokens[:lead], tokens[lead:], length > LONG)


def token(piece: str, value: float, limit: float) -> Token:
    """A token in its shade, which is the strongest from `limit` on."""
    if not math.isfinite(value):
        return Token(readable(piece), "u", "no value")
    level = min(LEVELS, round(LEVELS * abs(value) / limit)) if limit else 0
    shade = f"{'p' if value > 0 else 'n'}{level}" if level else ""
    if not shade and not piece.strip():
        shade = "u"  # the glyph that stands for a line break stays in the background unless it carries something
    return Token(readable(piece), shade, numbers.number(value, signed=True))


def _label(result: Result, pair: str, name: str) -> str:
    coords = result.dataset.coords
    if name not in coords or "pair" not in coords:
        return ""
    if coords[name].dims == ():
        return text_of([coords[name].item()])[0]
    names = list(text_of(coords["pair"].values.ravel()))
    return text_of([coords[name].values[names.index(pair)]])[0] if coords[name].dims == ("pair",) else ""
