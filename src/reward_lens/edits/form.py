"""Edits of form: markup, letters, spaces and marks; the words stay.

Code (fenced, indented, inline) and links are left alone by every edit here but the tokens that stand around or
after the whole response. `add_` edits leave a response alone that has such markup already; `strip_` edits change
nothing else, so a response without markup comes back equal.

What these cannot show: whether a model pays for markup as such or for what markup usually comes with, since
a set of responses in which the two are apart has to be written, not edited.
"""

import re
import unicodedata

from reward_lens.data.checks import checked_text
from reward_lens.edits.edit import TextEdit, exact, pick, rough
from reward_lens.edits.text import (
    CODE,
    LINK,
    Piece,
    map_sentences,
    outside_code,
    pieces,
    spans,
    split_stop,
)
from reward_lens.errors import DataError

EMOJI = ("\U0001f642", "\U0001f44d", "\u2728", "\U0001f4a1", "\U0001f31f", "\U0001f680")
_HEADS = ("## Answer\n\n", "## Details\n\n")
_BOLD = re.compile(r"\*\*(?=[^\s*])([^\n]+?)(?<=[^\s*])\*\*|(?<!\w)__(?=\S)([^_\n]*\s[^_\n]*)(?<=\S)__(?!\w)")
_WORD = re.compile(r"(?<![\w*`'\u2019/.-])[^\W\d_]{4,}(?![\w*`'\u2019/-])")
_MARKS = re.compile(r" {0,3}#+[ \t]+\Z")
_CITED = re.compile(r" \[\d+\]")
_GAP = re.compile(r"(?<=\S) +(?=\S)")
_FIRST_LETTER = re.compile(r"(?<![\w'\u2019])[^\W\d_]")
_BULLET = "- "
_OPENING, _CLOSING = "### Assistant:\n", "\n###"


def _bulletise(_prompt: str, response: str) -> str:
    """Sentences outside lists become items; what is a list already, code and headings stay as they are."""
    parts = pieces(response)
    following = [*parts[1:], None]
    bare = [
        piece.kind == "sentence" and not piece.item and not _introduces(piece, after)
        for piece, after in zip(parts, following, strict=True)
    ]
    if not any(bare) or sum(piece.kind == "sentence" for piece in parts) < 2:
        return response  # one sentence is no list
    out = []
    for piece, is_bare, after in zip(parts, bare, following, strict=True):
        text = piece.text
        if is_bare:
            text = piece.lead.lstrip() + _BULLET + re.sub(r"\s*\n\s*", " ", piece.body) + piece.tail
            if after:
                text = text.rstrip() + ("\n" if after.kind == "sentence" else "\n\n")
        out.append(text)
    return "".join(out)


def _introduces(piece: Piece, following: Piece | None) -> bool:
    """Whether a sentence leads to a list or a block of code, as "The steps are:" does."""
    return piece.body.endswith(":") and following is not None and (following.item or following.kind != "sentence")


def _unbulletise(_prompt: str, edited: str) -> str:
    """Items marked "-" run on as one paragraph; which line breaks there were is not known."""
    out = ""
    for piece in pieces(edited):
        text = piece.text
        if piece.kind == "sentence" and piece.item and piece.lead.lstrip().startswith(_BULLET):
            joins = out.rstrip(" \n") if out.endswith("\n") and not out.endswith("\n\n") else None
            text = piece.lead.lstrip()[len(_BULLET) :] + piece.body + piece.tail
            out = out if joins is None else joins + " "
        out += text
    return out


def _add_headings(_prompt: str, response: str) -> str:
    parts = pieces(response)
    if any(piece.kind == "heading" for piece in parts):
        return response
    for i, piece in enumerate(parts[:-1], start=1):
        if "\n\n" in piece.tail and not parts[i].item:
            first, rest = ("".join(p.text for p in some) for some in (parts[:i], parts[i:]))
            return _HEADS[0] + first + _HEADS[1] + rest
    return _HEADS[0] + response


def _unadd_headings(prompt: str, edited: str) -> str:
    rest = edited.removeprefix(_HEADS[0])
    places = [match.start() for match in re.finditer(re.escape(_HEADS[1]), rest)]
    for response in (rest, *(rest[:at] + rest[at + len(_HEADS[1]) :] for at in places)):
        if response != edited and response.strip() and _add_headings(prompt, response) == edited:
            return response
    return edited


def _strip_headings(_prompt: str, response: str) -> str:
    def plain(piece: Piece) -> str:
        return _MARKS.sub("", piece.lead) + piece.body + piece.tail if piece.kind == "heading" else piece.text

    return "".join(map(plain, pieces(response))) or response


def _add_bold(_prompt: str, response: str) -> str:
    """The longest word of every sentence, the first of several."""

    def bold(_number: int, piece: Piece) -> str:
        hidden = spans(piece.body, CODE, LINK)
        found = (m for m in _WORD.finditer(piece.body) if not any(a <= m.start() < b for a, b in hidden))
        words = [m for m in found if not any(_is_mark(piece.body, at) for at in (m.start() - 1, m.end()))]
        if not words:
            return piece.body
        word = max(words, key=lambda match: len(match[0]))
        return f"{piece.body[: word.start()]}**{word[0]}**{piece.body[word.end() :]}"

    return map_sentences(response, bold)


def _unadd_bold(_prompt: str, edited: str) -> str:
    return outside_code(edited, lambda run: run.replace("**", ""))


def _strip_bold(_prompt: str, response: str) -> str:
    return outside_code(response, lambda run: _BOLD.sub(lambda m: m[1] or m[2], run))


def _cite(_prompt: str, response: str) -> str:
    def cited(number: int, piece: Piece) -> str:
        words, stop, close = split_stop(piece.body)
        mark = f" [{number + 1}]"
        return piece.body + mark if close or not stop else words + mark + stop

    return map_sentences(response, cited)


def _uncite(_prompt: str, edited: str) -> str:
    return outside_code(edited, lambda run: _CITED.sub("", run))


def _add_emoji(_prompt: str, response: str) -> str:
    start = pick(EMOJI, response)
    return map_sentences(response, lambda number, piece: f"{piece.body} {EMOJI[(start + number) % len(EMOJI)]}")


def _unadd_emoji(_prompt: str, edited: str) -> str:
    return outside_code(edited, lambda run: re.sub(f" (?:{'|'.join(EMOJI)})", "", run))


def _first_letters(response: str, up: bool) -> str:
    def change(_number: int, piece: Piece) -> str:
        body = piece.body
        if not body[:1].isalpha() or body[1:2].isupper() or (piece.item and not split_stop(body)[1]):
            return body
        return (body[0].upper() if up else body[0].lower()) + body[1:]

    # Sentences are found without the help of their capitals, so that both ways find the same ones.
    return map_sentences(response, change, lower_starts=True)


def _title_case(_prompt: str, response: str) -> str:
    def capital(match: re.Match[str]) -> str:
        upper = match[0].upper()
        # A German sharp s has no capital of one letter; a letter after an accent of its own is inside a word.
        return match[0] if len(upper) > 1 or _is_mark(match.string, match.start() - 1) else upper

    return outside_code(response, lambda run: _FIRST_LETTER.sub(capital, run))


def _is_mark(text: str, at: int) -> bool:
    """Whether a combining mark stands there (an accent written by itself, a vowel sign): a word goes on around it."""
    return 0 <= at < len(text) and unicodedata.category(text[at])[0] == "M"


def _exclaim(response: str, old: str, new: str) -> str:
    def change(_number: int, piece: Piece) -> str:
        words, stop, close = split_stop(piece.body)
        return words + new if stop == old and not close else piece.body

    return map_sentences(response, change)


def _widen(_prompt: str, response: str) -> str:
    return outside_code(response, lambda run: _GAP.sub(lambda m: m[0] + " ", run))


def _narrow(_prompt: str, edited: str) -> str:
    return outside_code(edited, lambda run: _GAP.sub(lambda m: m[0][1:], run))


def append_token(token: str) -> TextEdit:
    """The edit that appends one token (a word, a mark) after a space; with a space of its own it goes as it is.

    Returns the exact `TextEdit` ``append_<token>``. The text is appended, not a token id: whether the tokenizer
    makes one token of it is for the caller to check. Raises `DataError` for anything but text with a visible character.
    """
    if not checked_text(token, "token").strip():
        raise DataError(
            "There is no token to append",
            found=repr(token),
            expected="text with at least one visible character",
            do="pass a word or a mark, for example append_token('great')",
        )
    added = token if token[0].isspace() else " " + token
    word = token.strip()
    name = f"append_{word if word.isalnum() else repr(token)}"
    return exact(name, f"one more token, {word!r}", lambda _, r: r + added, lambda _, e: e.removesuffix(added))


def form_edits() -> tuple[TextEdit, ...]:
    return (
        rough("bulletise", "bullets instead of running sentences", _bulletise, _unbulletise),
        exact("add_headings", "markdown headings added", _add_headings, _unadd_headings, english=True),
        rough("strip_headings", "markdown headings made plain lines", _strip_headings),
        exact("add_bold", "markdown bold added", _add_bold, _unadd_bold),
        rough("strip_bold", "markdown bold removed", _strip_bold),
        exact("add_citations", "citation marks that cite nothing", _cite, _uncite),
        exact("add_emoji", "an emoji after every sentence", _add_emoji, _unadd_emoji),
        exact(
            "lowercase_starts",
            "lower-case first letters of sentences",
            lambda _, r: _first_letters(r, up=False),
            lambda _, e: _first_letters(e, up=True),
        ),
        rough("title_case", "capital first letters of words", _title_case),
        exact("widen_spaces", "redundant spaces between words", _widen, _narrow),
        exact(
            "exclaim",
            "exclamation marks instead of full stops",
            lambda _, r: _exclaim(_exclaim(r, ".", "!"), "\u3002", "\uff01"),
            lambda _, e: _exclaim(_exclaim(e, "!", "."), "\uff01", "\u3002"),
        ),
        exact(
            "template_marks",
            "marks that look like a chat template's, as plain text",
            lambda _, r: _OPENING + r + _CLOSING,
            lambda _, e: e.removeprefix(_OPENING).removesuffix(_CLOSING),
        ),
        *(append_token(token) for token in ("great", "thanks", "therefore")),
    )
