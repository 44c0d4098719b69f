"""What the reward head reads of a changed pass: the reward position and, under a prompt-gated head, the gate's."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.model.forward import Batch, at_rows
from reward_lens.model.readout import PromptGated
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens


def pooled_and_gate(
    rm: RewardModel, batch: Batch, tokens: Sequence[Tokens], fixed: Tensor | None, moves_gate: Sequence[bool],
    *wanted: hooks.Hook,
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_model"] | None]:  # fmt: skip
    """The pre-norm residual at the reward positions of one pass with the given hooks, and the readout's `inputs`.

    `batch` is of some of `tokens`; `fixed` holds what `rm.readout_inputs` gives for all of them, which stands for every
    text but those whose change reaches the gate (`moves_gate`): theirs is read in this pass.
    """
    rows, readout = list(batch.rows), rm.readout
    if fixed is None or not isinstance(readout, PromptGated) or not any(moves_gate[run] for run in rows):
        return rm.trunk.pooled(batch, *wanted), None if fixed is None else fixed[rows]
    places = torch.tensor([readout.gate_position(tokens[run]) for run in rows], device=batch.offset.device)
    pick, kept = at_rows(batch.offset + places), []
    pooled = rm.trunk.pooled(batch, *wanted, rm.trunk.read_residual(rm.n_layers, lambda x: kept.append(pick(x))))
    live = torch.tensor([moves_gate[run] for run in rows], device=fixed.device)
    return pooled, torch.where(live[:, None], kept[0].to(fixed), fixed[rows])
