"""What an edit is, and the three ways to make one: exactly reversible, one way, or roughly reversible.

An edit changes one property of a response and keeps its content. Where it cannot (a blank response, no markup to strip,
English words and a text in another language) it gives the response back, equal: such a response carries no evidence,
and whoever averages over responses has to leave it out and say how many were changed.

Nothing is drawn at random: where there is a choice of phrases, a hash of the response makes it, so that one
response is always edited in the same way and no single phrase stands for the property.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from reward_lens.edits.text import pieces, split_stop
from reward_lens.errors import DataError

Change = Callable[[str, str], str]
"""(text of the last user turn, response) -> response."""

# Function words that are frequent in one language and absent from the other side's list.
_ENGLISH = frozenset("the of and to is in that it you for with this are be not your or can if from".split())
_OTHER = frozenset(
    "der das und ist nicht ein eine mit auf den el los las que y es una por para le les des et est une dans pour "
    "il che di non della um uma não os em het een van niet och att det som jest nie się".split()
)


@dataclasses.dataclass(frozen=True)
class TextEdit:
    """A function on text that changes one property of a response.

    Parameters
    ----------
    changes: the one property that it changes, in a few words.
    apply: (last user turn, response) -> edited response; equal to the response where the edit cannot change it.
    inverse: (last user turn, edited response) -> response; without `exact` only roughly, as an edit back.
    exact: whether the inverse gives back every response that the edit changes, character for character.
    family: what edits that differ in dose alone have in common.
    dose: how much of it, in the family's own unit (sentences added, sentences kept).

    Raises `DataError` for an empty name, for what is no function, for `exact` without an inverse, and for a dose
    without a family.
    """

    name: str
    changes: str
    apply: Change
    inverse: Change | None = None
    exact: bool = False
    family: str | None = None
    dose: int | None = None

    def __post_init__(self):
        wrong = {
            "no name": not (isinstance(self.name, str) and self.name.strip()),
            "no function": not callable(self.apply) or not (self.inverse is None or callable(self.inverse)),
            "exact=True and no inverse": self.exact and self.inverse is None,
            "a family without a dose, or a dose without a family": (self.family is None) != (self.dose is None),
        }
        for found, is_wrong in wrong.items():
            if is_wrong:
                raise DataError(
                    f"The edit '{self.name}' is not complete",
                    found=found,
                    expected="a name; functions (prompt, response) -> response as apply and inverse, which may be left "
                    "out unless exact is True; family and dose together or neither",
                    do="give what is missing to reward_lens.edits.TextEdit",
                )


def exact(
    name: str,
    changes: str,
    forward: Change,
    back: Change,
    *,
    english: bool = False,
    family: str | None = None,
    dose: int | None = None,
) -> TextEdit:
    """An edit that leaves alone every response that `back` would not restore, and is exact for that reason.

    Such a response already holds what the edit adds (a bold word, a mark like "[1]"), so that after the edit
    nobody could tell the two apart. `english`: it adds English words, and only to text that may be English.
    """

    def apply(prompt: str, response: str) -> str:
        edited = _applied(forward, english, prompt, response)
        return edited if edited == response or back(prompt, edited) == response else response

    return TextEdit(name, changes, apply, back, exact=True, family=family, dose=dose)


def rough(
    name: str,
    changes: str,
    forward: Change,
    back: Change | None = None,
    *,
    english: bool = False,
    family: str | None = None,
    dose: int | None = None,
) -> TextEdit:
    """An edit with an inverse that restores the response only roughly, or with none."""

    def apply(prompt: str, response: str) -> str:
        return _applied(forward, english, prompt, response)

    return TextEdit(name, changes, apply, back, family=family, dose=dose)


def _applied(forward: Change, english: bool, prompt: str, response: str) -> str:
    if not response.strip() or (english and not may_be_english(response)):
        return response
    return forward(prompt, response)


def may_be_english(text: str) -> bool:
    """False where most letters are of another script than Latin, or the words of another language are more frequent.

    A text without either (a number, a list of nouns) may be English.
    """
    letters = [c for c in text if c.isalpha()]
    latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    if 2 * latin < len(letters):
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in _ENGLISH for word in words) >= sum(word in _OTHER for word in words)


def pick(options: Sequence[str], response: str) -> int:
    """An index into the options that depends on nothing but the response."""
    digest = hashlib.sha256(response.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % len(options)


def after(response: str, phrase: str, apart: bool = False) -> str:
    """The response and a phrase: in its last paragraph if that ends in a stop, else (or `apart`) in one of its own.

    A response that ends within a code block (it was cut off there) comes back as it is.
    """
    last = pieces(response)[-1]
    if last.kind == "open code":
        return response
    flows = not apart and last.kind == "sentence" and not last.item and not last.tail and split_stop(last.body)[1]
    return f"{response}{' ' if flows else _BREAK}{phrase}"


def before(response: str, phrase: str) -> str:
    """A phrase and the response: in its first paragraph if that is prose, otherwise in one of its own."""
    first = pieces(response)[0]
    flows = first.kind == "sentence" and not first.lead
    return f"{phrase}{' ' if flows else _BREAK}{response}"


def take_off_end(edited: str, phrases: Iterable[str], forward: Callable[[str], str]) -> str:
    """The response that `forward` made into `edited` by adding one of the phrases at its end; `edited` if none."""
    for phrase in phrases:
        for gap in (_BREAK, " "):
            response = edited.removesuffix(gap + phrase)
            if response != edited and response.strip() and forward(response) == edited:
                return response
    return edited


def take_off_start(edited: str, phrases: Iterable[str], forward: Callable[[str], str]) -> str:
    """As `take_off_end`, for a phrase at the start."""
    for phrase in phrases:
        for gap in (_BREAK, " "):
            response = edited.removeprefix(phrase + gap)
            if response != edited and response.strip() and forward(response) == edited:
                return response
    return edited


def added_after(name: str, changes: str, options: Sequence[str], apart: bool = False, **more) -> TextEdit:
    """The exact edit that adds one of the phrases at the end; a hash of the response chooses."""

    def forward(response: str) -> str:
        return after(response, options[pick(options, response)], apart)

    return exact(name, changes, lambda _, r: forward(r), lambda _, e: take_off_end(e, options, forward), **more)


def added_before(name: str, changes: str, options: Sequence[str], **more) -> TextEdit:
    """As `added_after`, for a phrase at the start."""

    def forward(response: str) -> str:
        return before(response, options[pick(options, response)])

    return exact(name, changes, lambda _, r: forward(r), lambda _, e: take_off_start(e, options, forward), **more)


_BREAK = "\n\n"
