"""Edits of length: words that say nothing new are added, or the end is cut off.

`pad_k` adds k sentences of filler, the first of which are those of every smaller dose; `cut_k` keeps the first k
sentences, so its dose falls as more is cut. A list item and a block of code count as sentences; a heading does
not, and goes with what follows it.

What padding cannot show: an effect of length apart from the effect of vapid text. `repeat_last`, `restate`
and `lengthen` add length in other ways, and a model that pays for length pays for all of them.
"""

import functools

from reward_lens.edits.edit import (
    TextEdit,
    added_after,
    after,
    exact,
    pick,
    rough,
    take_off_end,
)
from reward_lens.edits.text import pieces, split_stop

FILLER = (
    "This is what there is to say on the point that was raised.",
    "The matter is as it has been set out in the lines above.",
    "These are the things that come up when one looks at it.",
    "All of this belongs to the subject that was asked about.",
    "The words here follow from the ones that stand before them.",
    "What has been written so far is the answer to what was asked.",
    "It is a subject with a beginning, a middle and an end.",
    "There are sentences above, and this one comes after them.",
)
PARAGRAPHS = (
    "People come to a subject like this one from many places. Some have met it at work, some at home and some "
    "in a book that they happened to open, and each of them looks at it in the light of what they have seen before. It "
    "has been talked about in the past, and it will be talked about again.",
    "Every question has a place among other questions, and this one has its own. It touches some things that lie close "
    "to it and leaves others to one side. Whoever asks it has a setting in mind, with people, times and places in it, "
    "and the same holds for whoever answers it.",
    "A reply is made of parts, and the parts stand in an order. One thing is said, then another, and at the end comes "
    "a last thing, after which nothing more is said. That is how it goes with texts of this kind, in whatever "
    "language and at whatever length they happen to be written.",
)
_RESTATE = "In other words: "


def _filler(dose: int, start: int) -> str:
    return " ".join(FILLER[(start + i) % len(FILLER)] for i in range(dose))


def _pad(dose: int, _prompt: str, response: str) -> str:
    return after(response, _filler(dose, pick(FILLER, response)))


def _unpad(dose: int, prompt: str, edited: str) -> str:
    options = [_filler(dose, start) for start in range(len(FILLER))]
    return take_off_end(edited, options, lambda response: _pad(dose, prompt, response))


def _restate(_prompt: str, response: str) -> str:
    bodies = [piece.body for piece in pieces(response) if piece.kind == "sentence" and not piece.item]
    said = [body for body in bodies if not body.endswith((":", "?")) and any(c.isalpha() for c in body)]
    if not said:
        return response
    first = next((body for body in said if len(body.split()) > 2), said[0])
    return after(response, _RESTATE + first + ("" if split_stop(first)[1] else "."))


def _unrestate(prompt: str, edited: str) -> str:
    said = edited.rpartition(_RESTATE)[2]
    return take_off_end(edited, [_RESTATE + said], lambda response: _restate(prompt, response))


def _last_sentence(response: str) -> str:
    return next((p.body for p in reversed(pieces(response)) if p.kind == "sentence"), "")


def _repeat_last(_prompt: str, response: str) -> str:
    last = _last_sentence(response)
    return after(response, last) if any(c.isalnum() for c in last) else response


def _unrepeat_last(prompt: str, edited: str) -> str:
    return take_off_end(edited, [_last_sentence(edited)], lambda response: _repeat_last(prompt, response))


def _cut(dose: int, _prompt: str, response: str) -> str:
    kept, end, seen = 0, 0, 0
    for piece in pieces(response):
        if piece.kind in ("sentence", "code", "open code", "table", "quote"):
            if kept == dose:
                return response[:end]
            kept += 1
            end = seen + len(piece.lead) + len(piece.body)
        seen += len(piece.text)
    return response


def length_edits() -> tuple[TextEdit, ...]:
    pads = [
        exact(
            f"pad_{dose}",
            f"length by filler, {dose} {'sentence' if dose == 1 else 'sentences'}",
            functools.partial(_pad, dose),
            functools.partial(_unpad, dose),
            english=True,
            family="pad",
            dose=dose,
        )
        for dose in (1, 2, 4, 8)
    ]
    cuts = [
        rough(
            f"cut_{dose}",
            f"length by cutting after the first {'sentence' if dose == 1 else f'{dose} sentences'}",
            functools.partial(_cut, dose),
            family="cut",
            dose=dose,
        )
        for dose in (1, 2, 4)
    ]
    return (
        *pads,
        exact("restate", "length by restating the first sentence", _restate, _unrestate, english=True),
        added_after("lengthen", "length by a neutral paragraph", PARAGRAPHS, apart=True, english=True),
        exact("repeat_last", "length by repeating the last sentence", _repeat_last, _unrepeat_last),
        *cuts,
    )
