"""Rewards of many texts that begin alike, the keys and values of their beginning computed once.

A text costs only the positions after the beginning. Texts of one length go together, so that nothing is padded.
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
    start = len(known)
    if not start or not rm.reuses_prefix(*texts):
        return rm.rewards(texts, max_rows)
    out = torch.empty(len(texts), dtype=rm.readout.weight.dtype)
    past = PrefixCache(known, rm.n_layers)
    for length in sorted({len(t) for t in texts}):
        same = [i for i, t in enumerate(texts) if len(t) == length]
        for rows in torch.tensor(same).split(max_rows or row_budget(rm, length - start, length)):
            batch = _from(rm, [texts[i] for i in rows.tolist()], start)
            out[rows] = rm.readout.reward(rm.trunk.pooled(batch, past=past)).cpu()
    return out


def _from(rm: RewardModel, texts: Sequence[Tokens], start: int) -> Batch:
    """Texts of one length from position `start` on."""
    count, length = len(texts), len(texts[0])
    ids = torch.tensor([t.ids[start:] for t in texts], device=rm.device)
    seen = torch.ones(count, length, dtype=torch.long, device=rm.device)
    positions = torch.arange(start, length, device=rm.device).expand(count, -1)
    offset = torch.full((count,), -start, device=rm.device)
    ends = torch.tensor([t.reward_pos - start for t in texts], device=rm.device)
    return Batch(ids, seen, positions, offset, ends, tuple(range(count)))
