"""Edits of a response that change one property and keep its content: what a probe of a bias compares.

`EDITS` holds all of them by name, `edits_of` chooses among them, `append_token` makes one of its own, and
`judged_edits` are written items for properties that no rule can edit. Every edit is a pure function
of prompt and response.

Reference: Reber et al. 2024, RATE: causal explainability of reward models with imperfect counterfactuals,
arXiv 2410.11348, on edits that change more than the one property and on editing back.
"""

import difflib
import types
from collections import Counter
from collections.abc import Mapping, Sequence

from reward_lens.arguments import checked_arguments
from reward_lens.edits.edit import TextEdit
from reward_lens.edits.form import append_token, form_edits
from reward_lens.edits.judged import JUDGED, JudgedEdit, judged_edits
from reward_lens.edits.length import length_edits
from reward_lens.edits.pairs import edited_pairs
from reward_lens.edits.stance import stance_edits
from reward_lens.errors import DataError

__all__ = ["EDITS", "JUDGED", "JudgedEdit", "TextEdit", "append_token", "edited_pairs", "edits_of", "judged_edits"]

EDITS: Mapping[str, TextEdit] = types.MappingProxyType(
    {edit.name: edit for edit in (*length_edits(), *stance_edits(), *form_edits())}
)
"""All edits in a fixed order, by name; read-only."""


@checked_arguments
def edits_of(names: Sequence[str | TextEdit] | None = None) -> tuple[TextEdit, ...]:
    """The edits of these names, in their order; all of `EDITS` for None.

    A family's name ("pad", "cut") stands for all its doses; a `TextEdit` stands for itself, whoever made it.

    Returns a tuple of `TextEdit` with different names. Raises `DataError` for an unknown name, with the names that are
    close to it, for a name that comes twice, for no names and for a text in place of a list of names.
    """
    if names is None:
        return tuple(EDITS.values())
    if isinstance(names, str) or not names:
        raise DataError(
            "The edits are a list of names",
            found=f"the text {names!r}" if isinstance(names, str) else "an empty list",
            expected="one or more names, or None for all edits",
            do="pass a list, such as ['pad', 'hedge']",
        )
    chosen = [edit for name in names for edit in _named(name)]
    twice = [name for name, count in Counter(edit.name for edit in chosen).items() if count > 1]
    if twice:
        raise DataError(
            "An edit is asked for twice",
            found=", ".join(twice),
            expected="edits with different names (a family's name stands for all its doses)",
            do="leave one out, or give an edit of your own another name",
        )
    return tuple(chosen)


def _named(name: str | TextEdit) -> list[TextEdit]:
    if isinstance(name, TextEdit):
        return [name]
    if name in EDITS:
        return [EDITS[name]]
    family = [edit for edit in EDITS.values() if edit.family == name]
    if not family:
        known = [*dict.fromkeys(edit.family for edit in EDITS.values() if edit.family), *EDITS]
        close = difflib.get_close_matches(name, known, n=3)
        raise DataError(
            f"There is no edit called '{name}'",
            found=f"'{name}'",
            expected=f"one of {', '.join(known)}",
            do=f"did you mean {' or '.join(close)}?" if close else "choose one of these names, or pass a TextEdit",
        )
    return family
