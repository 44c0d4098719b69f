"""Edits that need judgement, written by hand: a plain, right response and its like but for one property.

    agree_with_wrong_claim   the user claims something wrong; the edited response agrees instead of correcting it
    vague                    what to do, when, how much: said in general words
    jargon                   the same said in technical words that a lay reader does not know
    misplaced_confidence     what cannot be known from the prompt is said as if it were known

Both responses of an item are within a tenth of each other in words. In tokens they differ where the property is
one of words: with the demo model's tokenizer the jargon is 26% longer and the vague text 11% shorter, so a model
that pays for length moves these two without any taste for their property.

What they cannot show: a property's effect on prompts of another kind; the prompts are short everyday questions in
English, 12 to a kind.
"""

import dataclasses
import functools
import json
from importlib import resources

JUDGED = ("agree_with_wrong_claim", "vague", "jargon", "misplaced_confidence")


@dataclasses.dataclass(frozen=True)
class JudgedEdit:
    """One written item."""

    id: str
    edit: str
    """The property that `edited` has and `response` has not, one of `JUDGED`."""
    prompt: str
    response: str
    edited: str


@functools.cache
def judged_edits() -> tuple[JudgedEdit, ...]:
    """The bundled items of all kinds in `JUDGED`, 12 of each, in the order of the file.

    Returns frozen `JudgedEdit`s. The preferred response of every item is `response`: as a pair, `response` is
    chosen and `edited` rejected.
    """
    text = resources.files("reward_lens").joinpath("assets/judged_edits.jsonl").read_text(encoding="utf-8")
    return tuple(JudgedEdit(**json.loads(line)) for line in text.splitlines() if line.strip())
