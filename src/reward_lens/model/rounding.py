"""What rounding in 16 bits alone moves a reward: measured on the model, where a test of its load report needs it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.model.forward import make_batch
from reward_lens.model.readout import Rounding, RunsANetwork
from reward_lens.model.tokens import Tokens

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel

DRAWS = 8  # of the head's rounding
PASSES = 2  # of the writes' rounding, each a pass of the network


def of_head(rm: "RewardModel", tokens: Sequence[Tokens]) -> float:
    """What rounding of the final norm and of a head of several maps moves the rewards of these texts: root mean square
    over texts and draws."""
    dtype, readout = next(rm.head.parameters()).dtype, cast(RunsANetwork, rm.readout)
    moved = []
    for text in tokens:
        h = rm.trunk.pooled(make_batch([text], [0], rm.pad_id, rm.device)).to(rm.like)
        inputs = rm.readout_inputs([text])
        exact = rm.readout.reward(h, inputs)
        moved += [readout.rounded(h, inputs, Rounding(dtype, seed)) - exact for seed in range(DRAWS)]
    return _size(moved)


def of_kernels(rm: "RewardModel", tokens: Sequence[Tokens], alone: Tensor) -> float:
    """What may be put down to kernels that sum in another order: twice what batches of copies of one text, which need
    no padding, move its reward, or three times what a step of the format on every attention write moves it, if that is
    more. A mask, a position or a part of attention that is left out moves rewards by many times as much."""
    return max(2 * _of_batches(rm, tokens, alone), 3 * _of_writes(rm, tokens, alone))


def _of_batches(rm: "RewardModel", tokens: Sequence[Tokens], alone: Tensor) -> float:
    moved = []
    for text, reward in zip(tokens, alone, strict=True):
        batch = make_batch([text] * len(tokens), range(len(tokens)), rm.pad_id, rm.device)
        inputs = rm.readout_inputs([text] * len(tokens))
        moved.append(rm.readout.reward(rm.trunk.pooled(batch), inputs).double().cpu() - reward)
    return _size(moved)


def _of_writes(rm: "RewardModel", tokens: Sequence[Tokens], alone: Tensor) -> float:
    moved = []
    for text, reward in zip(tokens, alone, strict=True):
        batch, inputs = make_batch([text], [0], rm.pad_id, rm.device), rm.readout_inputs([text])
        for seed in range(PASSES):
            noise = Rounding(rm.dtype, seed)
            made = [hooks.edit_output(writer, noise) for writer in rm.trunk.writers["attn"]]
            moved.append(rm.readout.reward(rm.trunk.pooled(batch, *made), inputs).double().cpu() - reward)
    return _size(moved)


def _size(moved: Sequence[Tensor]) -> float:
    return float(torch.cat([x.reshape(-1).double() for x in moved]).square().mean().sqrt())
