"""From "this site, at these positions, gets that value" to the hooks that do it. One arithmetic for every intervention.

    x  ->  x                    mask 0, exactly
           source(x)            mask 1, exactly
           lerp(x, source, m)   in between

Zero, a constant, a mean, another run's value, an added vector, a projected-out subspace: each is a *source*. There are
no subclasses of interventions; whatever gives a tensor for a tensor is a source.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.engine.places import experts_of, out_map
from reward_lens.errors import StructureError
from reward_lens.model.experts import call_of
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

RESIDUALS = ("embed", "resid_pre", "resid_post")
IN_ATTENTION = ("q", "k", "v", "pattern")
IN_MLP = ("mlp", "neuron", "router", "expert")
POSITIONAL = ("q", "k", "pattern")
"""Kinds whose values belong to the positions of their own text."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What a site's value is replaced by.

    `give(current [pos, ...], site, run, positions)` returns a tensor of the same shape; `run` is the index of the text,
    `positions` the range or list of positions that are changed.
    """

    name: str
    give: Callable[[Tensor, Site, int, Any], Tensor]
    texts: Sequence[Tokens] | None = None
    """The texts that values are taken from at the same positions, one a run; None where they come from no position."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of one run: the value at a site, at some positions, blended towards a source."""

    site: Site
    positions: Sequence[int]
    """Positions in the text; a range where they are contiguous."""
    source: Source
    mask: float = 1.0


class Placed(NamedTuple):
    """An edit in a batch: the row it belongs to, the run its source knows it by, and where position 0 lies."""

    edit: Edit
    row: int
    run: int
    offset: int = 0

    @property
    def where(self) -> slice | Tensor:
        """Index of the edit's positions in the row."""
        positions = self.edit.positions
        if isinstance(positions, range) and positions.step == 1:
            return slice(positions.start + self.offset, positions.stop + self.offset)
        return torch.as_tensor(list(positions)) + self.offset


def edited(x: Tensor, edits: Iterable[Placed], carried: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`x` [row, pos, ...] with the edits made, in order.

    What a source sees and gives is `scale * x`, plus `carried` if given (resid_mid seen from attention's write).
    """
    out = x.clone()
    for placed in edits:
        edit, row, where = placed.edit, placed.row, placed.where
        index = (row, where)
        if edit.site.index is not None:
            one = edit.site.index
            index = (row, where, slice(one, one + 1) if edit.site.kind == "neuron" else one)
        now = out[index]
        seen = now * scale if carried is None else carried[index] + now * scale
        wanted = edit.source.give(seen, edit.site, placed.run, edit.positions)
        new = seen if edit.mask == 0.0 else wanted if edit.mask == 1.0 else torch.lerp(seen, wanted.to(seen), edit.mask)
        back = (new if carried is None else new - carried[index]) / scale
        out[index] = torch.where(new == seen, now, back.to(now))  # what does not change keeps its bits
    return out


def hooks_of(rm: RewardModel, shape: tuple[int, int], edits: Iterable[Placed]) -> list[hooks.Hook]:
    """Hooks that make the edits in a pass over [row, pos] = `shape`."""
    return residual_hooks(rm, [p for p in edits if p.edit.site.kind in RESIDUALS]) + block_hooks(
        rm, shape, [p for p in edits if p.edit.site.kind not in RESIDUALS]
    )


def residual_hooks(rm: RewardModel, edits: Iterable[Placed]) -> list[hooks.Hook]:
    """Hooks that edit the residual stream between blocks."""
    groups = _grouped(edits, lambda site: depth_of(site))
    return [rm.trunk.edit_residual(depth, lambda x, some=some: edited(x, some)) for depth, some in groups.items()]


def block_hooks(rm: RewardModel, shape: tuple[int, int], edits: Iterable[Placed]) -> list[hooks.Hook]:
    """Hooks that edit what happens inside blocks: writes, heads, neurons, and the residual between the two writes.

    What is inside the attention call (`IN_ATTENTION`) is left to `engine.attention_tap`.
    """
    # resid_mid comes after the write in the pass but is changed through the same module: its hook has to be the later.
    edits = sorted(
        (p for p in edits if p.edit.site.kind not in IN_ATTENTION), key=lambda p: p.edit.site.kind == "resid_mid"
    )
    made = []
    for (kind, layer), some in _grouped(edits, lambda site: (site.kind, site.block)).items():
        scale = rm.trunk.write_scale if kind in ("attn", "mlp", "resid_mid") else 1.0
        if kind == "resid_mid" and rm.trunk.norms:
            change = _shaped(shape, lambda x, some=some: edited(x, some))
            made.append(hooks.edit_output(rm.trunk.norms[layer][0], change))
        elif kind == "resid_mid":
            made += _mid_hooks(rm, shape, layer, some, scale)
        elif kind in ("attn", "mlp"):
            change = _shaped(shape, lambda x, some=some, scale=scale: edited(x, some, scale=scale))
            made.append(hooks.edit_output(rm.trunk.writers[kind][layer], change))
        elif kind == "router":
            made.append(_router_hook(rm, shape, layer, some))
        elif kind == "expert":
            raise StructureError(
                "What an expert adds was to be changed by itself",
                found=f"the site {some[0].edit.site}",
                expected="its weight: 0 takes away what it adds, another run's weights patch the routing",
                do=f"name the router's site, L{layer}.R0 for expert 0",
            )
        else:
            made.append(_unit_hook(rm, shape, kind, layer, some))
    return made


def depth_of(site: Site) -> int:
    """The depth whose residual a residual site is."""
    return site.block + (site.kind == "resid_post")


def _mid_hooks(rm: RewardModel, shape, layer: int, edits: list[Placed], scale: float) -> list[hooks.Hook]:
    """resid_mid is changed through attention's write: the residual itself is added outside any module."""
    pre: list[Tensor] = []
    change = _shaped(shape, lambda write: edited(write, edits, pre.pop(), scale))
    keep = hooks.read_input(rm.trunk.blocks[layer], lambda x: pre.append(x.clone()))
    return [keep, hooks.edit_output(rm.trunk.writers["attn"][layer], change)]


def _unit_hook(rm: RewardModel, shape, kind: str, layer: int, edits: list[Placed]) -> hooks.Hook:
    """Heads and neurons are changed where the output map reads them."""

    def change(x: Tensor) -> Tensor:
        units = x.reshape(*shape, x.shape[-1])
        if kind == "head":
            units = units.unflatten(-1, (rm.n_heads, -1))
        return edited(units, edits).reshape(x.shape)

    return hooks.edit_input(out_map(rm, layer, "attn" if kind == "head" else "mlp"), change)


def _router_hook(rm: RewardModel, shape, layer: int, edits: list[Placed]) -> hooks.Hook:
    """The router is changed where the experts read its weights. Weights are not made to sum to one again, and nothing
    is chosen anew: an expert whose weight becomes zero takes away exactly what it added."""
    experts = experts_of(rm, layer)

    def act(args, kwargs):
        call = call_of(args, kwargs)
        assert call is not None
        weights = experts.dense(call)
        new = edited(weights.reshape(*shape, -1), edits).reshape(weights.shape)
        return experts.called(args, kwargs, new)

    return hooks.Hook(experts.module, "call", act)


def _shaped(shape: tuple[int, int], change: hooks.Edit) -> hooks.Edit:
    return lambda x: change(x.reshape(*shape, x.shape[-1])).reshape(x.shape)


def _grouped(edits: Iterable[Placed], key: Callable) -> dict:
    groups: dict = {}
    for placed in edits:
        groups.setdefault(key(placed.edit.site), []).append(placed)
    return groups
