"""What a sweep changes: which sites, at which groups of positions, and the rows of edits that come of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from reward_lens.engine.alignment import Alignment, require_unshifted
from reward_lens.engine.editing import POSITIONAL, Edit
from reward_lens.engine.intervention import pattern, values
from reward_lens.engine.patching import Row
from reward_lens.engine.runs import TextRun
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens, common_prefix

Span = range | tuple[int, int]
Spans = Literal["position"] | Mapping[str, Span] | Sequence[Mapping[str, Span]] | None
UNTOUCHED = "the span has no position that the alignment patches"


@dataclasses.dataclass(frozen=True)
class Cells:
    """The groups of positions that are changed together in one text, and what they are called."""

    tokens: Tokens
    dim: str | None
    """None (one group), "position" or "span"."""
    names: tuple[Any, ...]
    groups: tuple[Alignment | None, ...]
    """None: nothing of the group can be patched (undefined). Empty: the runs are equal there (no effect)."""

    def empty(self, n_sites: int) -> np.ndarray:
        """[site, group] of zeros, NaN where the group is undefined."""
        out = np.zeros((n_sites, len(self.groups)))
        out[:, [g is None for g in self.groups]] = np.nan
        return out


def sites_of(rm: RewardModel, sites: "str | Sequence[Site | str]", layers: Sequence[int] | None = None) -> list[Site]:
    """The sites that a name or a list means; `layers` keeps those of some layers (embed counts as layer 0)."""
    depth = range(rm.n_layers)
    if isinstance(sites, str) and sites in ("components", "heads", "residual", "experts"):
        named = {
            "components": [Site("embed"), *(Site(kind, layer) for layer in depth for kind in ("attn", "mlp"))],
            "heads": [
                Site("head", layer, head)
                for layer in depth
                if rm.structure.attends(layer)
                for head in range(rm.n_heads)
            ],
            "experts": [
                Site("router", layer, expert)
                for layer, experts in enumerate(rm.experts if sites == "experts" else ())
                for expert in range(experts.n if experts is not None else 0)
            ],
            "residual": [*(Site("resid_pre", layer) for layer in depth), Site("resid_post", rm.n_layers - 1)],
        }
        out = named[sites]
    else:
        out = [Site.parse(s) for s in ([sites] if isinstance(sites, str | Site) else sites)]
    if layers is not None:
        if any(isinstance(k, bool) or k not in depth for k in layers):
            raise DataError("No sites of some layers", found=f"layers={list(layers)}",
                            expected=f"layers among 0 to {rm.n_layers - 1}", do="name others")  # fmt: skip
        out = [s for s in out if s.block in set(layers)]
    if not out or len(set(out)) < len(out):
        raise DataError(
            "No sites to change" if not out else "A site is named twice",
            found=f"sites={sites!r}, layers={layers!r}",
            expected="'components', 'heads', 'residual', 'experts' (where there are any), or a list of different "
            "sites, some of them in `layers`",
            do=f"name sites of this model (layers 0 to {rm.n_layers - 1})",
        )
    return out


def cells_of(
    tokens: Tokens, where: Alignment, spans: Spans, pair: int, pair_id: str, source: Tokens | None = None
) -> Cells:
    """The groups that `spans` makes of the positions to patch; `pair` is the pair's number in the list. `source`: the
    text that values come from, in which a position without a counterpart makes its span undefined, unless both texts
    are equal up to there; without one a span that has no position raises."""
    if spans is None:
        return Cells(tokens, None, (), (where,))
    if isinstance(spans, str):
        if spans != "position":
            raise _not_a_span(repr(spans), pair_id)
        names = tuple(sorted(where.base))  # none for equal responses, whose effects are none everywhere
        return Cells(tokens, "position", names, tuple(where.only([p]) for p in names))
    one = spans if isinstance(spans, Mapping) else spans[pair]
    if not isinstance(one, Mapping) or not one:
        raise _not_a_span(repr(one), pair_id)
    groups = []
    for name, span in one.items():
        positions = span if isinstance(span, range) else range(*span)
        if not len(positions) or positions[0] < 0 or positions[-1] >= len(tokens):
            raise _not_a_span(f"{name!r}: {positions.start} to {positions.stop} of {len(tokens)} tokens", pair_id)
        inside = where.only(positions)
        if source is None and not inside.base:
            raise _not_a_span(f"{name!r}: none of {positions.start} to {positions.stop} is among those of at=", pair_id)
        groups.append(inside if inside.base or (source is not None and _equal(tokens, source, positions)) else None)
    return Cells(tokens, "span", tuple(one), tuple(groups))


def exchange_rows(
    sites: Sequence[Site], cells: Cells, source: TextRun, pair_id: str
) -> tuple[list[Row], list[tuple[int, int]]]:
    """A row for every site and group that is patched with the source run's values, and their (site, group)."""
    rows, index = [], []
    for g, group in enumerate(cells.groups):
        if group is None or not group.base:
            continue
        positions = contiguous(group.base)
        for s, site in enumerate(sites):
            if site.kind in POSITIONAL:
                require_unshifted(group, site.kind, pair_id)
            given = source.at(site, group.source)
            rows.append((Edit(site, positions, pattern(given) if site.kind == "pattern" else values(given)),))
            index.append((s, g))
    return rows, index


def in_common(chosen: Cells, rejected: Cells) -> int:
    """How many groups two runs begin with in common: spans all, positions while both hold the same token or are where
    the reward is read."""
    if chosen.dim != "position":
        return len(chosen.groups)
    a, b = chosen.tokens, rejected.tokens
    same = [a.ids[p] == b.ids[q] or (p, q) == (a.reward_pos, b.reward_pos)
            for p, q in zip(chosen.names, rejected.names, strict=False)]  # fmt: skip
    return same.index(False) if False in same else len(same)


def span_coords(groups: Sequence[tuple[Cells, ...]], width: int) -> tuple[dict[str, Any], str | None, str | None]:
    """Coordinates of the extra dim, its name, and the reason for cells without a value. A pair has the cells of the run
    that is changed, or of both; then their margin has the positions in common. Spans: the names of all."""
    dim = groups[0][0].dim
    if dim is None:
        return {}, None, None
    runs = [cells for both in groups for cells in both]
    hole = any(g is None for cells in runs for g in cells.groups)
    if dim == "span":
        names = list(dict.fromkeys(name for cells in runs for name in cells.names))
        ragged = any(len(cells.names) < len(names) for cells in runs)
        reason = "; ".join([UNTOUCHED] * hole + ["the pair has no span of that name"] * ragged) or None
        return {"span": np.array(names, dtype=object)}, dim, reason
    if not width:
        raise DataError("No pair has a position to patch", found="equal responses in every pair",
                        expected="a pair whose responses differ", do="pass other pairs")  # fmt: skip
    sides = [[(cells, len(cells.names)) for cells in both] for both in groups]
    if len(groups[0]) > 1:
        sides = [[*own, (both[0], in_common(*both))] for own, both in zip(sides, groups, strict=True)]
    shape = (len(groups), len(sides[0]), width)
    at, pieces = np.full(shape, -1), np.full(shape, "", dtype=object)
    for i, side in np.ndindex(shape[:2]):
        cells, n = sides[i][side]
        at[i, side, :n] = cells.names[:n]
        pieces[i, side, :n] = [cells.tokens.pieces[p] for p in cells.names[:n]]
    counts = np.array([[n for _, n in one] for one in sides])
    dims, only = (("pair", "side"), ...) if shape[1] > 1 else (("pair",), 0)
    return {
        "position": np.arange(width),
        "n_positions": (dims, counts[:, only]),
        "token_position": ((*dims, "position"), at[:, only]),
        "piece": ((*dims, "position"), pieces[:, only]),
    }, dim, None  # fmt: skip


def _equal(tokens: Tokens, source: Tokens, positions: range) -> bool:
    """Whether both runs hold the same at these positions: before the first difference, unless the first token is read,
    which sees what follows."""
    return tokens.ids == source.ids or (not tokens.reads_first and max(positions) < common_prefix(tokens, source))


def contiguous(positions: Sequence[int]) -> Sequence[int]:
    """A range, where the positions are one."""
    first, last = positions[0], positions[-1]
    return range(first, last + 1) if list(positions) == list(range(first, last + 1)) else tuple(positions)


def _not_a_span(found: str, pair_id: str) -> DataError:
    return DataError(
        f"The spans of pair {pair_id} cannot be patched",
        found=found,
        expected="'position', or {name: range of positions in the changed run}, none of them empty; one mapping for "
        "all pairs or one a pair",
        do="choose ranges within the text (rm.tokenize(prompt, response) shows positions and pieces)",
    )
