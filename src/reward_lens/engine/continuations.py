"""Rewards of many texts that begin alike, the keys and values of their beginning computed once.

A text costs only the positions after the beginning. Texts of like length go together, so that little is padded.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine.patching import row_budget
from reward_lens.model.forward import Batch
from reward_lens.model.prefix import NO_PREFIX, KeyValues, PrefixCache, keys_and_values
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens, common_prefix


def shared_start(texts: Sequence[Tokens]) -> int:
    """Number of tokens that all texts begin with, before any one's reward position."""
    return min(min(common_prefix(texts[0], t), t.reward_pos) for t in texts)


@torch.no_grad()
def beginning(rm: RewardModel, texts: Sequence[Tokens]) -> KeyValues:
    """Keys and values of the tokens that all texts begin with, before any reward position; `NO_PREFIX` where the model
    takes none."""
    shared = shared_start(texts)
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
    return _read(rm, [rm], known, texts, max_rows)[:, 0]


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
            read = _read(model, [models[j] for j in same], beginning(model, texts), texts)
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


def _read(
    rm: RewardModel, heads: Sequence[RewardModel], known: KeyValues, texts: Sequence[Tokens],
    max_rows: int | None = None,
) -> Float[Tensor, "n head"]:  # fmt: skip
    """What every head reads at the end of every text. Texts of like length are run together, padded on the right."""
    start, past = len(known), PrefixCache(known, rm.n_layers)
    out = torch.empty(len(texts), len(heads), dtype=rm.like.dtype)
    left = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    gates = [head.readout_inputs(texts) for head in heads]
    while left:
        longest = len(texts[left[0]])
        count = row_budget(rm, longest - start, longest, max_rows)
        rows, left = left[:count], left[count:]
        pooled = rm.trunk.pooled(_from(rm, [texts[i] for i in rows], start), past=past)
        read = [
            head.readout.reward(pooled, None if gate is None else gate[rows])
            for head, gate in zip(heads, gates, strict=True)
        ]
        out[rows] = torch.stack(read, 1).cpu()
    return out


def _from(rm: RewardModel, texts: Sequence[Tokens], start: int) -> Batch:
    """Texts from position `start` on, padded on the right; they attend to everything before it."""
    ends = [len(t) for t in texts]
    longest = max(ends)
    ids = torch.full((len(texts), longest - start), rm.pad_id)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) - start] = torch.tensor(text.ids[start:])
    seen = (torch.arange(longest) < torch.tensor(ends)[:, None]).long()
    positions = torch.minimum(torch.arange(start, longest), torch.tensor(ends)[:, None] - 1)
    offset = torch.full((len(texts),), -start)
    reward_pos = torch.tensor([t.reward_pos - start for t in texts])
    ids, seen, positions, offset, reward_pos = (t.to(rm.device) for t in (ids, seen, positions, offset, reward_pos))
    return Batch(ids, seen, positions, offset, reward_pos, tuple(range(len(texts))))
