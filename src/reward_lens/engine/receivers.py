"""What a part of a block gives when its input, or what is inside it, is moved; everything else as in the clean run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.engine.attention_tap import AttentionTap
from reward_lens.engine.editing import IN_ATTENTION, Edit, Placed, block_hooks, edited
from reward_lens.engine.intervention import add
from reward_lens.engine.patching import grown
from reward_lens.engine.places import out_map
from reward_lens.engine.row_budget import row_budget
from reward_lens.model.forward import Recording
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site

Move = tuple[Sequence[int], Tensor]
"""Positions, and what is added to the residual stream there, [pos, d_model]."""


@torch.no_grad()
def received(
    rm: RewardModel, recording: Recording, start: int, layer: int, kinds: Sequence[str], moves: Sequence[Move]
) -> dict[str, Tensor]:
    """Runs of block `layer` with a row for every move of what the receivers read, as many at once as `row_budget` says.

    `kinds`: "attn", "q", "k", "v" read the block's input, which is moved; "mlp" reads the residual between the two
    writes (in parallel blocks the block's input too). `start` is the first position of the recorded pass.
    Returns [move, pos, ...] a kind, from `start` on. One call takes kinds that read the same input.
    """
    length = recording.resid(layer).shape[1]
    budget = row_budget(rm, length, start + length)
    parts = [
        _received(rm, recording, start, layer, kinds, moves[begin : begin + budget])
        for begin in range(0, len(moves), budget)
    ]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in kinds}


def _received(
    rm: RewardModel, recording: Recording, start: int, layer: int, kinds: Sequence[str], moves: Sequence[Move]
) -> dict[str, Tensor]:
    reads_middle = kinds == ["mlp"] and not rm.structure.parallel
    middle = "resid_mid" if rm.trunk.norms else "attn"
    site = Site(middle if reads_middle else "resid_pre", layer)
    placed = [
        Placed(Edit(site, positions, add(delta)), row, row, -start) for row, (positions, delta) in enumerate(moves)
    ]
    clean = recording.resid(layer)
    x = clean.expand(len(moves), -1, -1)
    x = x if reads_middle else edited(x, placed)
    kept: dict[str, Tensor] = {}
    tap = AttentionTap(rm, wanted=[Site(kind, layer) for kind in kinds if kind in IN_ATTENTION])
    made = block_hooks(rm, (x.shape[0], x.shape[1]), placed if reads_middle else [])
    for kind in kinds:
        if kind not in IN_ATTENTION:
            made.append(hooks.read_output(rm.trunk.writers[kind][layer], _keep(kept, kind, x.shape, rm)))
    args, kwargs = grown(rm, *hooks.with_first_input(*recording.calls[layer], x), x.shape[0])
    with hooks.attached([*tap.hooks(), *made]), tap.active():
        rm.trunk.blocks[layer](*args, **kwargs)
    like = rm.like
    return kept | {s.kind: t.to(like) for s, t in tap.seen.items()}


@torch.no_grad()
def mixed(
    rm: RewardModel,
    recording: Recording,
    start: int,
    layer: int,
    edits: Sequence[Edit],
    max_rows: int | None = None,
) -> Tensor:
    """Change of the outputs of all heads of block `layer` for every edit inside its attention, against a clean row.

    Returns [edit, pos, head, head_dim], from `start` on.
    """
    clean = recording.resid(layer)
    length = clean.shape[1]
    budget = row_budget(rm, length, start + length, max_rows)
    out = []
    for begin in range(0, len(edits), budget):
        some = edits[begin : begin + budget]
        x = clean.expand(1 + len(some), -1, -1)
        tap = AttentionTap(rm, [Placed(edit, 1 + row, row, -start) for row, edit in enumerate(some)])
        kept: list[Tensor] = []
        read = hooks.read_input(out_map(rm, layer, "attn"), lambda z, kept=kept: kept.append(z.clone()))
        args, kwargs = grown(rm, *hooks.with_first_input(*recording.calls[layer], x), x.shape[0])
        with hooks.attached([*tap.hooks(), read]), tap.active():
            rm.trunk.blocks[layer](*args, **kwargs)
        z = kept[0].to(rm.like).reshape(*x.shape[:2], rm.n_heads, -1)
        out.append(z[1:] - z[:1])
    return torch.cat(out)


def _keep(kept: dict, kind: str, shape, rm: RewardModel):
    def keep(x: Tensor) -> None:
        kept[kind] = x.reshape(shape).to(rm.like) * rm.trunk.write_scale

    return keep
