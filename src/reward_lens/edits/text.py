"""A response as pieces: sentences, code, headings and the rest, none of its characters lost.

    text = lead + body + tail of every piece, joined

Edits change bodies and leave the rest of the text as it is. What is read as markdown: fenced and indented code,
headings, list items, table rows, block quotes and rules; a text that is JSON as a whole is code. Everything else is
prose and cut into sentences: after a stop that is followed by a space (decimals and addresses have none), after the
stops of Chinese and Japanese, and at a line break before a capital. No cut is made after an abbreviation or an
initial, before a lower-case letter (unless the paragraph has no capitals), inside inline code or inside quotation
marks.

The rules are for English; in other languages abbreviations are not known and a sentence may be cut in two.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator

Span = tuple[int, int]

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(?=\S)")
_RULE = re.compile(r"\s*([-*_=])(?:[ \t]*\1){2,}\s*$")
_ITEM = re.compile(r"\s*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+(?=\S)")

CODE = re.compile(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
LINK = re.compile(r"(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]*\w")
QUOTED = re.compile(
    r"\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|\u00ab[^\u00bb\n]*\u00bb|\u300c[^\u300d\n]*\u300d|\u300e[^\u300f\n]*\u300f"
    r"|\u2018[^\u2018\n]*?\u2019(?!\w)|(?<!\w)'(?=\S)[^'\n]*(?<=\S)'(?!\w)"
)

_CLOSERS = "\"'\u201d\u2019\u00bb)\\]*_"
_CLOSERS_CJK = "\u300d\u300f\u201d\u2019\uff09"
_CUT = re.compile(
    rf"(?P<stop>[.!?\u2026\u061f\u06d4\u0964]+)(?P<close>[{_CLOSERS}]*)(?=\s)"
    rf"|[\u3002\uff01\uff1f\uff61]+[{_CLOSERS_CJK}]*"
    r"|(?P<line>\n)"
)
_STOP = re.compile(
    rf"(?P<stop>[.!?\u2026\u061f\u06d4\u0964\u3002\uff01\uff1f\uff61]+)(?P<close>[{_CLOSERS}{_CLOSERS_CJK}]*)\Z"
)
_ABBREVIATED = frozenset(
    "mr mrs ms dr prof st mt gen sen rep rev hon capt lt col sgt e.g i.e eg ie cf vs approx fig eq viz al".split()
)
_BEFORE_NUMBER = frozenset(
    "no nos p pp vol ch sec art ca jan feb mar apr jun jul aug sep sept oct nov dec".split()
)  # "No. 5", "Jan. 3"; "No." alone is an answer
_INITIALS = re.compile(r"[A-HJ-Z]|(?:[A-Z]\.)+[A-Z]")  # "I" ends sentences
_GROWING = ("prose", "code", "table", "quote")
_LAST_WORD = re.compile(r"[\w.]*\Z")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A sentence or another block; `text` is `lead + body + tail`."""

    kind: str
    """sentence, code, open code (a block that is never closed), heading, table, quote or rule."""
    lead: str
    """Space, and the marker of a heading or list item, before the body."""
    body: str
    tail: str
    """The space after the body."""
    item: bool = False
    """Whether a sentence belongs to a list item."""

    @property
    def text(self) -> str:
        return self.lead + self.body + self.tail


def pieces(text: str, lower_starts: bool = False) -> list[Piece]:
    """The pieces of a text in order; none for a blank one. `lower_starts`: a sentence may begin in lower case."""
    lead, found = "", []
    for kind, block in _blocks(text):
        if kind == "blank":
            if found:
                found[-1] = dataclasses.replace(found[-1], tail=found[-1].tail + block)
            else:
                lead += block
            continue
        marker = ""
        if kind in ("heading", "item"):
            match = (_HEADING if kind == "heading" else _ITEM).match(block)
            marker = match[0] if match else ""
        rest = block[len(marker) :]
        parts = sentences(rest, lower_starts) if kind in ("prose", "item") else [rest]
        name = "sentence" if kind in ("prose", "item") else kind
        for part in parts:
            start = len(part) - len(part.lstrip()) if name == "sentence" else 0
            end = len(part.rstrip())
            found.append(Piece(name, lead + marker + part[:start], part[start:end], part[end:], kind == "item"))
            lead = marker = ""
    return found


def sentences(prose: str, lower_starts: bool = False) -> list[str]:
    """The sentences of a paragraph, each with the space after it; joined, they are the paragraph."""
    lower_starts = lower_starts or not any(c.isupper() for c in prose)
    hidden = spans(prose, CODE, LINK, QUOTED)
    letters = [i for i, c in enumerate(prose) if c.isalpha()]
    out, last, next_letter = [], 0, 0
    for match in _CUT.finditer(prose):
        end = match.end()
        while end < len(prose) and prose[end].isspace():
            end += 1
        while next_letter < len(letters) and letters[next_letter] < last:
            next_letter += 1
        # As in the units of attribution, a sentence has a letter: "1." opens the sentence after it.
        lettered = next_letter < len(letters) and letters[next_letter] < end <= letters[-1]
        if end > last and lettered and not inside(match.end(), hidden) and _ends(prose, match, end, lower_starts):
            out.append(prose[last:end])
            last = end
    return [*out, prose[last:]]


def _ends(prose: str, match: re.Match[str], end: int, lower_starts: bool) -> bool:
    following = next((c for c in prose[end : end + 8] if c.isalnum()), "")
    if match["line"]:
        return following.isalpha() and not following.islower()
    if match["stop"] is None:  # a closed quotation that the sentence goes on after
        return not (prose[match.end() - 1] in "\u300d\u300f" and end == match.end())
    if following.islower() and (not lower_starts or match["close"] or len(match["stop"]) > 1):
        return False
    if match["stop"] != ".":
        return True
    found = _LAST_WORD.search(prose, max(0, match.start() - 24), match.start())
    word = found[0] if found else ""
    if word.lower() in _ABBREVIATED or (following.isdigit() and word.lower() in _BEFORE_NUMBER):
        return False
    return not _INITIALS.fullmatch(word)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(kind, lines) in order; a paragraph or list item takes the prose lines that follow it."""
    if _is_json(text):
        yield "code", text
        return
    kind, held, fence, listed = "", "", "", False
    for line in re.split(r"(?<=\n)", text):
        if not line:
            continue
        mark = _FENCE.match(line)
        if fence:
            held += line
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                yield "code", held
                kind, held, fence = "code", "", ""
            continue
        new = "fence" if mark else _line_kind(line, indented=not listed and kind != "prose")
        listed = new == "item" or (listed and (new == "blank" or line[0].isspace() or kind == "item"))
        grows = kind in (("prose", "item") if new == "prose" else (new,)) and new in _GROWING
        if held and not grows:
            yield kind, held
            held = ""
        if new == "fence" and mark:
            kind, held, fence = "code", line, mark[1]
        elif held:
            held += line
        else:
            held, kind = line, new
        if kind == "blank" and held:
            yield kind, held
            held = ""
    if held:
        yield ("open code" if fence else kind), held


def _is_json(text: str) -> bool:
    if not text.strip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or nested too deep to say
        return False
    return True


def _line_kind(line: str, indented: bool) -> str:
    if not line.strip():
        return "blank"
    if _RULE.match(line):
        return "rule"
    if _HEADING.match(line):
        return "heading"
    if _ITEM.match(line):
        return "item"
    if indented and line.startswith(("    ", "\t")):
        return "code"
    return {"|": "table", ">": "quote"}.get(line.lstrip()[0], "prose")


def spans(text: str, *patterns: re.Pattern[str]) -> list[Span]:
    """Where the patterns match."""
    return [match.span() for pattern in patterns for match in pattern.finditer(text)]


def inside(position: int, hidden: list[Span]) -> bool:
    """Whether a position lies strictly inside one of the spans."""
    return any(a < position < b for a, b in hidden)


def split_stop(body: str) -> tuple[str, str, str]:
    """A sentence as its words, its stop and what closes after the stop (a quotation mark); either may be empty."""
    match = _STOP.search(body)
    return (body[: match.start()], match["stop"], match["close"]) if match else (body, "", "")


def map_sentences(text: str, change: Callable[[int, Piece], str], lower_starts: bool = False) -> str:
    """The text with each sentence's body replaced by `change(number, piece)`."""
    out, number = [], 0
    for piece in pieces(text, lower_starts):
        body = piece.body
        if piece.kind == "sentence":
            body, number = change(number, piece), number + 1
        out.append(piece.lead + body + piece.tail)
    return "".join(out) or text


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with every run between pieces of code (blocks, inline code, links) replaced by `change(run)`."""
    out: list[str] = []
    run = ""
    for piece in pieces(text):
        if piece.kind in ("code", "open code"):
            out += [_outside_inline(run, change), piece.text]
            run = ""
        else:
            run += piece.text
    return "".join([*out, _outside_inline(run, change)]) or text


def _outside_inline(run: str, change: Callable[[str], str]) -> str:
    out, last = [], 0
    for start, end in sorted(spans(run, CODE, LINK)):
        if start >= last:
            out += [change(run[last:start]), run[start:end]]
            last = end
    return "".join([*out, change(run[last:])])
