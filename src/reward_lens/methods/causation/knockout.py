"""Attention knock-out: what the reward loses when nothing may be read from a span of text.

    A[q, s] -> 0 for s in the span,  the rest of the row scaled up to what is left        (softmax without these keys)

in every head of the chosen blocks, for the queries at the reward position ("reward") or at every position after the
span ("later"). The span's own activations stay as they are, and so do positions: only the reading is blocked. It needs
no counterpart in the other response, so it is the tool for responses of different length.

What this cannot show: what the span is worth through readers before the blocked ones ("reward" leaves the route over
other tokens open; "later" closes it), nor what the network would do had the span never been written.

Reference: Geva et al. 2023, arXiv 2304.14767.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.patching import patch_rows
from reward_lens.errors import CheckFailed, DataError
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.methods.shared.units import By, Unit, units_of
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

ROUNDING = 1e-5  # a row of float32 weights misses one by less than this without a sink; of 16 bits by half a step
MARGIN = "spans of two responses have no common order: no margin"
NOTHING_ELSE = "a span that is nothing but the position that is read has no effect of its own"


@checked_arguments
@torch.no_grad()
def attention_knockout(
    rm: RewardModel,
    pairs,
    spans: By | Mapping[str, Sequence[range]] = "sentence",
    queries: Literal["reward", "later"] = "later",
    layers: Sequence[int] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
) -> Result:
    """Loss of reward when attention to a span is blocked, for every span of a response.

    Parameters
    ----------
    spans: "token", "word" or "sentence": every unit of the response, one that ends at the reward position without it
        (padding with the EOS has the head read a response's last token); or {pair id: [range for the chosen response,
        range for the rejected one]}, one span a response, any part of the text.
    queries: who may not read the span: the reward position, or every position after the span.
    layers: blocks in which reading is blocked; None: all that have attention.

    Returns value (pair, side, position) in reward units, effect = r(run) - r(blocked), `position` counting spans,
    padded past `n_positions`; with explicit spans value (pair, side), where the margin is the difference of the two.
    Coordinates `piece`, `role`, `token_position`. Check "clean row". Raises `DataError` for empty spans and spans that
    hold the reading position itself.
    """
    pairs = data.as_pairs(pairs)
    blocks = [b for b in range(rm.n_layers) if rm.structure.attends(b)] if layers is None else list(layers)
    named = not isinstance(spans, str)
    known = queries in ("reward", "later") and (named or spans in get_args(By))
    if not known or not blocks or not set(blocks) <= set(range(rm.n_layers)):
        raise DataError("The knock-out was not understood",
                        found=f"queries={queries!r}, layers={layers!r}" + ("" if named else f", spans={spans!r}"),
                        expected=f"queries 'reward' or 'later', layers among 0 to {rm.n_layers - 1}, spans 'token', "
                        "'word', 'sentence' or ranges by pair id", do="pass one of these")  # fmt: skip
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    units = [_units(rm, pairs[i // 2], i % 2, text, spans) for i, text in enumerate(tokens)]
    found, gaps = [], []
    for text, own in zip(tokens, units, strict=True):
        effects, gap = _of_text(rm, text, own, queries, blocks, max_rows)
        found.append(effects)
        gaps.append(gap)
    width = max(len(u) for u in units)
    padded = np.stack([np.pad(f, (0, width - len(f)), constant_values=np.nan) for f in found])
    value = margin_of(padded[::2], padded[1::2])
    settings = {"queries": queries, "layers": blocks, "spans": "explicit" if named else spans}
    words = {
        "title": f"Attention knock-out ({queries})", "settings": settings, "noise_floor": rm.noise_floor,
        "shows": "What the reward loses when nothing may be read from a span of the response.",
        "cannot_show": "What the network would have done had the span never been written: its own activations stay.",
    }  # fmt: skip
    checks = [Check("clean row", max(gaps), 2e-2 if rm.sixteen_bit else 1e-4)]
    if named:
        return paired_result(rm, "attention_knockout", pairs, value[..., 0], ("pair", "side"), checks=checks, seed=seed,
                             **words)  # fmt: skip
    value[:, 2] = np.nan
    alone = any(not len(unit.positions) for own in units for unit in own)
    return paired_result(
        rm, "attention_knockout", pairs, value, ("pair", "side", "position"), _coords(units, width), checks=checks,
        interval=False, undefined=f"{MARGIN}; {NOTHING_ELSE}" if alone else MARGIN, seed=seed, **words,
    )  # fmt: skip


def without(span: range) -> Source:
    """Attention rows [pos, (head,) key] with the keys of `span` taken out of the softmax."""

    def give(x: Tensor, site: Site, run: int, positions) -> Tensor:
        out = x.clone()
        out[..., span.start : span.stop] = 0
        # What the rows lack of one is a sink's share, which stays in the softmax (gpt_oss).
        whole, left = (rows.double().sum(-1, keepdim=True) for rows in (x, out))
        sink = 1 - whole
        sink = torch.where(sink > max(ROUNDING, torch.finfo(x.dtype).eps / 2), sink, 0.0)
        if not bool((left + sink > 0).all()):
            raise CheckFailed(
                "Nothing is left to read once a span is taken out",
                found=f"attention rows that {x.dtype} rounds to zero outside positions {span.start} to {span.stop}",
                expected="some weight on other positions in every row",
                do="load the model in float32, or take the first token out of the span",
            )
        # Over the row's own sum: a row that does not read the span keeps its bits.
        return (out.double() * ((whole + sink) / (left + sink))).to(x)

    return Source("without", give)


def _of_text(
    rm: RewardModel, text: Tokens, units: list[Unit], queries: str, blocks: list[int], max_rows: int | None
) -> tuple[np.ndarray, float]:
    effects = np.full(len(units), np.nan)
    some = [i for i, unit in enumerate(units) if len(unit.positions)]
    if not some:
        return effects, 0.0
    rows = []
    for i in some:
        span = units[i].positions
        if queries == "reward":
            readers = range(text.reward_pos, text.reward_pos + 1)
        else:  # whoever sees the span: what follows it, or, where the first token is read, all others
            readers = tuple(p for p in text.seen if p >= span.stop or (text.reads_first and p < span.start))
        source = without(span)
        rows.append(tuple(Edit(Site("pattern", layer), readers, source) for layer in blocks))
    out = patch_rows(rm, text, rows, max_rows=max_rows)
    effects[some] = -out.change.numpy()
    return effects, out.clean_gap


def _unread(text: Tokens, unit: Unit) -> Unit:
    """The unit before the reward position, which reads itself whatever is blocked."""
    span = range(unit.positions.start, max(unit.positions.start, min(unit.positions.stop, text.reward_pos)))
    if text.reads_first or span == unit.positions:
        return unit
    return Unit(span, "".join(text.pieces[i] for i in span) or unit.text, unit.role)


def _units(rm: RewardModel, pair, side: int, text: Tokens, spans) -> list[Unit]:
    """The spans of one response, before the reward position; those that were given are checked."""
    if isinstance(spans, str):
        return [_unread(text, unit) for unit in units_of(text, cast(By, spans))]
    both = spans.get(pair.id, ())
    if len(both) != 2 or not all(isinstance(span, range) and span.step == 1 for span in both):
        raise DataError(f"Pair {pair.id} has no spans", found=f"{both!r}" if both else ", ".join(map(str, spans)),
                        expected="{pair id: [range for chosen, range for rejected]} for every pair",
                        do="add two ranges without steps to spans=")  # fmt: skip
    span = both[side]
    if not len(span) or span.start < 0 or span.stop > text.seen.stop or text.reward_pos in span:
        raise DataError(
            f"A span of pair {pair.id} cannot be knocked out",
            found=f"positions {span.start} to {span.stop}; the reward is read at {text.reward_pos}",
            expected="at least one position, all of them read by another one: before the reward position, or, "
            "where the first token is read, behind it",
            do="choose such a range (rm.tokenize shows positions and pieces)",
        )
    return [Unit(span, "", "response")]


def _coords(units: list[list[Unit]], width: int) -> dict:
    shape = (len(units) // 2, 3, width)
    pieces, roles = (np.full(shape, "", dtype=object) for _ in range(2))
    starts = np.full(shape, -1)
    counts = np.zeros(shape[:2], dtype=int)
    for run, own in enumerate(units):
        cell = divmod(run, 2)
        counts[cell] = len(own)
        pieces[cell][: len(own)] = [u.text for u in own]
        roles[cell][: len(own)] = [u.role for u in own]
        starts[cell][: len(own)] = [u.positions.start for u in own]
    where = ("pair", "side", "position")
    return {
        "position": np.arange(width),
        "n_positions": (("pair", "side"), counts),
        "piece": (where, pieces),
        "role": (where, roles),
        "token_position": (where, starts),
    }  # fmt: skip
