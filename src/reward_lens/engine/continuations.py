"""Rewards of many texts that begin alike, the keys and values of their beginning computed once.

A text costs only the positions from the first one on in which it differs from the text that was run whole. Texts of
like remaining length go together, so that little is padded.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine.row_budget import row_budget
from reward_lens.engine.runs import common_start
from reward_lens.model.forward import Batch
from reward_lens.model.prefix import NO_PREFIX, KeyValues, PrefixCache, keys_and_values
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens, common_prefix

PADDED, ENOUGH = 0.75, 256  # a batch of so many tokens takes no text shorter than this share of its longest


@torch.no_grad()
def beginning(rm: RewardModel, texts: Sequence[Tokens]) -> KeyValues:
    """Keys and values of the tokens that all texts begin with, before any reward position; `NO_PREFIX` where the model
    takes none."""
    shared = common_start(*texts)
    return keys_and_values(rm.trunk, texts[0], shared) if shared and rm.reuses_prefix(*texts) else NO_PREFIX


@torch.no_grad()
def rewards_after(
    rm: RewardModel, known: KeyValues, texts: Sequence[Tokens], max_rows: int | None = None
) -> Float[Tensor, " n"]:
    """Rewards of texts that begin with the tokens `known` belongs to, on the CPU in the order given.

    Without a known beginning whole texts are run, as `rm.rewards` does. `max_rows`: texts run at once; None: as many
    as a token budget and the free memory allow.
    """
    if not len(known) or not rm.reuses_prefix(*texts):
        return rm.rewards(texts, max_rows)
    return _read(rm, [rm], known, texts, [len(known)] * len(texts), max_rows=max_rows)[:, 0]


@torch.no_grad()
def rewards_of_variants(
    rm: RewardModel, text: Tokens, variants: Sequence[Tokens], hidden: Sequence[range], known: KeyValues = NO_PREFIX
) -> tuple[Float[Tensor, " n"], KeyValues]:
    """Rewards of variants of a text, on the CPU in their order, and the keys and values of the text that they read.

    `hidden`: positions of each variant that no later one may attend to. `known` are keys and values of some of the
    text's first positions. For models that reuse a prefix, and variants that differ from the text in what they hide
    behind the position where a prompt-gated head reads.
    """
    starts = [_goes_on_from(text, t, none) for t, none in zip(variants, hidden, strict=True)]
    known = keys_and_values(rm.trunk, text, max(starts), known)
    return _read(rm, [rm], known, variants, starts, hidden)[:, 0], known


@torch.no_grad()
def rewards_by_beginning(models: Sequence[RewardModel], groups: Sequence[Sequence[Tokens]]) -> Float[Tensor, "n model"]:
    """Rewards of groups of texts that begin alike, group after group: one run serves all heads of a trunk.

    `models`: reward models; those whose weights but the head's are the same tensors (`edit_head`) are run once.
    """
    if not all(m.reuses_prefix(*group) for m in models for group in groups):
        flat = [t for group in groups for t in group]
        return torch.stack([m.rewards(flat) for m in models], 1)
    columns: list[Tensor | None] = [None] * len(models)
    for i, model in enumerate(models):
        if columns[i] is not None:
            continue
        same = [j for j in range(i, len(models)) if shares_trunk(model, models[j])]
        parts = []
        for group in groups:
            different = {t.ids: t for t in group}
            place = {ids: k for k, ids in enumerate(different)}
            texts = list(different.values())
            known, starts = _beside_first(model, texts)
            read = _read(model, [models[j] for j in same], known, texts, starts)
            parts.append(read[[place[t.ids] for t in group]])
        for k, j in enumerate(same):
            columns[j] = torch.cat([part[:, k] for part in parts])
    return torch.stack([c for c in columns if c is not None], 1)


def shares_trunk(one: RewardModel, other: RewardModel) -> bool:
    """Whether two models' tensors are the same ones, but those of their heads."""

    def tensors(rm: RewardModel) -> set[int]:
        own = {id(t) for t in (*rm.head.parameters(), *rm.head.buffers())}
        return {id(t) for t in (*rm.module.parameters(), *rm.module.buffers())} - own

    return tensors(one) == tensors(other)


def _goes_on_from(text: Tokens, variant: Tokens, hidden: range) -> int:
    """First position of a variant that has to be run: all before it are as in the text, or seen by none."""
    alike = common_prefix(text, variant)
    if hidden and hidden.start < alike:
        alike = min(alike, hidden.stop)
    return min(alike, variant.reward_pos)


def _beside_first(rm: RewardModel, texts: Sequence[Tokens]) -> tuple[KeyValues, list[int]]:
    """Keys and values of the first text's beginning, as far as another goes on from there, and where each does."""
    starts = [_goes_on_from(texts[0], t, range(0)) for t in texts[1:]]
    stop = max(starts, default=0)
    return keys_and_values(rm.trunk, texts[0], stop), [min(stop, texts[0].reward_pos), *starts]


def _read(
    rm: RewardModel, heads: Sequence[RewardModel], known: KeyValues, texts: Sequence[Tokens], starts: Sequence[int],
    hidden: Sequence[range] | None = None, max_rows: int | None = None,
) -> Float[Tensor, "n head"]:  # fmt: skip
    """What every head reads at the end of every text, run from its start on after that many of the known positions."""
    out = torch.empty(len(texts), len(heads), dtype=rm.like.dtype)
    hidden = [range(0)] * len(texts) if hidden is None else hidden
    lengths = [len(t) - start for t, start in zip(texts, starts, strict=True)]
    left = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
    gates = [head.readout_inputs(texts) for head in heads]
    while left:
        longest = lengths[left[0]]
        count = row_budget(rm, longest, longest + max(starts), max_rows)
        if max_rows is None:
            alike = sum(lengths[i] >= PADDED * longest for i in left[:count])
            count = min(count, max(alike, ENOUGH // longest))
        rows, left = left[:count], left[count:]
        batch, reused = _from(rm, [texts[i] for i in rows], [starts[i] for i in rows], [hidden[i] for i in rows])
        pooled = rm.trunk.pooled(batch, past=PrefixCache(known, rm.n_layers, reused))
        read = [
            head.readout.reward(pooled, None if gate is None else gate[rows])
            for head, gate in zip(heads, gates, strict=True)
        ]
        out[rows] = torch.stack(read, 1).cpu()
    return out


def _from(
    rm: RewardModel, texts: Sequence[Tokens], starts: Sequence[int], hidden: Sequence[range]
) -> tuple[Batch, Tensor]:
    """Texts from their starts on, padded on the right, behind room for the longest beginning, in which each row's own
    stands at the end; and the lengths of the beginnings."""
    room = max(starts)
    longest = max(len(t) - start for t, start in zip(texts, starts, strict=True))
    ids = torch.full((len(texts), longest), rm.pad_id)
    seen = torch.zeros(len(texts), room + longest, dtype=torch.long)
    for row, (text, start, gone) in enumerate(zip(texts, starts, hidden, strict=True)):
        ids[row, : len(text) - start] = torch.tensor(text.ids[start:])
        first = room - start  # where the text begins
        seen[row, first : first + len(text)] = 1
        seen[row, first + gone.start : first + gone.stop] = 0
    reused = torch.tensor(starts)
    ends = torch.tensor([len(t) for t in texts])
    positions = torch.minimum(torch.arange(longest) + reused[:, None], ends[:, None] - 1)
    reward_pos = torch.tensor([t.reward_pos for t in texts]) - reused
    ids, seen, positions, offset, reward_pos = (t.to(rm.device) for t in (ids, seen, positions, -reused, reward_pos))
    return Batch(ids, seen, positions, offset, reward_pos, tuple(range(len(texts)))), reused.to(rm.device)
