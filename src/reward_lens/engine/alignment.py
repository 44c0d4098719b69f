"""Which positions of one response stand for which of the other.

Two responses to one prompt share a token prefix; there every activation is the same, so nothing is patched. (In a
network that reads its first token no activation is: there all positions are aligned.) What follows is aligned

    final          the reward positions of the two runs
    none           position by position; needs equal token counts
    tail           from the right: the reward positions, and what is as far to the left of them
    diff           tokens matched by the longest common blocks of what is before the reward positions, and these two,
                   whatever they hold; the others are left alone
    legacy_prefix  absolute positions over the shorter length. A known artefact: in responses of different length it
                   patches one's template tail with the other's words, and leaves the longer one's reward position
                   alone, so late effects are zero by construction. Kept to take published findings apart.

Values that hold positions (queries, keys, attention patterns) can only be patched where both positions are the same.
"""

import dataclasses
import difflib
from collections.abc import Sequence

from reward_lens.errors import AlignmentError, DataError
from reward_lens.model.tokens import Tokens, common_prefix, require_equal_length

HOW = (None, "tail", "diff", "legacy_prefix")
WHERE = ("final", "response", "all")


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Positions of the run that is changed, and those of the run whose values they take."""

    base: tuple[int, ...]
    source: tuple[int, ...]

    def only(self, positions: Sequence[int]) -> "Alignment":
        """The part whose base positions are among `positions`."""
        keep = set(positions)
        both = [(b, s) for b, s in zip(self.base, self.source, strict=True) if b in keep]
        return Alignment(tuple(b for b, _ in both), tuple(s for _, s in both))

    @property
    def shifted(self) -> bool:
        """Whether any position takes a value from another position."""
        return self.base != self.source


def align(base: Tokens, source: Tokens, at: str, how: str | None, pair_id: str) -> Alignment:
    """Aligned positions from the first token that differs to the reward position; empty for equal texts."""
    if at not in WHERE or how not in HOW:
        raise not_understood(at, how)
    if base.ids == source.ids:
        return Alignment((), ())
    if at == "final":
        return Alignment((base.reward_pos,), (source.reward_pos,))
    prefix = common_prefix(base, source)
    if how == "diff":
        return _matched(base, source, prefix)
    if how == "legacy_prefix":
        positions = tuple(range(prefix, min(len(base), len(source))))
        return Alignment(positions, positions)
    if how is None:
        require_equal_length(base, source, pair_id)
    if base.reads_first:
        return _from_the_ends(base, source, prefix, at)
    shift = base.reward_pos - source.reward_pos
    # A text that goes on where the other ends has no token after the prefix; its reward is read all the same.
    start = min(prefix + max(0, shift), base.reward_pos)
    positions = range(start, base.reward_pos + 1)
    return Alignment(tuple(positions), tuple(p - shift for p in positions))


def not_understood(at: object, how: object) -> DataError:
    return DataError("The positions to patch were not understood", found=f"at={at!r}, align={how!r}",
                     expected="at 'final', 'response' or 'all'; align None, 'tail', 'diff' or 'legacy_prefix'",
                     do="pass one of these")  # fmt: skip


def _matched(base: Tokens, source: Tokens, prefix: int) -> Alignment:
    """Blocks of equal tokens of the two texts after their prefix, the reward position among them."""
    if base.reads_first:  # no position is the same in both runs, those of the common prefix neither
        a, b, prefix = base.ids, source.ids, 0
    else:
        a, b = base.ids[prefix : base.reward_pos], source.ids[prefix : source.reward_pos]
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    both = [(prefix + m.a + i, prefix + m.b + i) for m in blocks for i in range(m.size)]
    if base.reads_first:
        return Alignment(*map(tuple, zip(*both, strict=True)))
    both.append((base.reward_pos, source.reward_pos))
    return Alignment(tuple(x for x, _ in both), tuple(y for _, y in both))


def _from_the_ends(base: Tokens, source: Tokens, prefix: int, at: str) -> Alignment:
    """Where the first token is read: the positions before the first different token from the left, the others from the
    right; at "response" the responses' own positions only, and what stands behind them."""
    shift = len(base) - len(source)
    behind = range(prefix + max(0, shift), len(base))
    first = base.response.start if at == "response" else 0
    both = [*((p, p) for p in range(first, prefix)), *((p, p - shift) for p in behind if p >= first)]
    return Alignment(tuple(b for b, _ in both), tuple(s for _, s in both))


def require_unshifted(alignment: Alignment, kind: str, pair_id: str) -> None:
    """Raise where a value that holds positions would be moved."""
    if alignment.shifted:
        raise AlignmentError(
            f"A {kind} of pair {pair_id} cannot be taken from another position",
            found=f"positions {alignment.base[0]} and {alignment.source[0]}",
            expected="the same positions in both runs: queries, keys and attention patterns hold absolute positions",
            do="keep to pairs whose responses have the same token count, or patch 'v', heads or writes instead",
        )
