"""Rows of edits on one text, one whole forward pass a row: the slow form of the sweep engine's interface."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from reward_lens.engine.intervention import Source, _edit
from reward_lens.model.forward import at_rows
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replace the value at a site, at some positions of the base run, by what the source gives."""

    site: Site
    positions: Sequence[int]
    source: Source


Row = tuple[Edit, ...]


@dataclasses.dataclass(frozen=True)
class Patched:
    """Rewards (float64) and residuals at the reward position, of the rows and of the clean run."""

    clean: Tensor
    rewards: Tensor
    final: Tensor
    states: dict[int, Tensor]
    clean_states: dict[int, Tensor]


@torch.no_grad()
def patch_rows(rm: RewardModel, base: Tokens, rows: Sequence[Row], depths: Sequence[int] = ()) -> Patched:
    """Run every row of edits on one text."""
    batch = next(iter(rm.batches([base])))
    wanted = sorted({*depths, rm.n_layers})
    pick, like = at_rows(batch.reward_pos), rm.readout.weight
    kept: dict[int, list[Tensor]] = {depth: [] for depth in wanted}
    for row in ((), *rows):
        made = [
            hook
            for edit in row
            for hook in _edit(rm, batch, [base], edit.site, edit.source,
                              range(min(edit.positions), max(edit.positions) + 1), 1.0)
        ]  # fmt: skip
        read = [rm.trunk.read_residual(d, lambda x, d=d: kept[d].append(pick(x)[0].to(like))) for d in wanted]
        rm.trunk.run(batch, *made, *read)
    states = {depth: torch.stack(rows) for depth, rows in kept.items()}
    rewards = rm.readout.reward(states[rm.n_layers]).double().cpu()
    return Patched(
        rewards[0], rewards[1:], states[rm.n_layers][1:], {d: states[d][1:] for d in depths},
        {d: states[d][0] for d in depths},
    )  # fmt: skip
