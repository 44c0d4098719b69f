"""Responses beside their edited selves, in the form that everything about pairs understands."""

from reward_lens.arguments import checked_arguments
from reward_lens.data import Pair, Pairs, as_pairs
from reward_lens.edits.edit import TextEdit
from reward_lens.errors import DataError


@checked_arguments
def edited_pairs(pairs, edit: TextEdit | str) -> Pairs:
    """Pairs whose chosen response is an edited one and whose rejected response is the original.

    `edit` is a `TextEdit` or the name of one. Both responses of every pair are edited; those that it leaves as they are
    are left out, and noted.

    Returns `Pairs` with ids "<id>, chosen" and "<id>, rejected" and the edit's name as subset: for `bias_direction`,
    `contributions`, `effects` (what carries the edit) and `select_alpha`. Raises `DataError` where no response changes.
    """
    from reward_lens.edits import edits_of

    pairs = as_pairs(pairs)
    edit, *others = edits_of([edit])
    if others:
        names = ", ".join(one.name for one in (edit, *others))
        raise DataError("A family of edits is several", found=names, expected="one edit", do="name one of these")
    out = []
    for pair in pairs:
        for side, response in zip(("chosen", "rejected"), pair.responses, strict=True):
            edited = edit.apply(pair.messages[-1]["content"], response)
            if edited != response:
                out.append(Pair(pair.prompt, edited, response, id=f"{pair.id}, {side}", subset=edit.name))
    if not out:
        raise DataError(
            f"The edit '{edit.name}' changes none of these responses",
            found=f"{2 * len(pairs)} responses left as they are",
            expected="responses that it can change",
            do="choose another edit, or other pairs",
        )
    left = 2 * len(pairs) - len(out)
    return Pairs(
        out, f"{edit.name} of {pairs.source}", [f"{left} responses left as they are by the edit"] if left else []
    )
