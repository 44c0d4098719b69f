"""How the writes to the residual stream are cut into components: whole, by head, or by neuron.

A split answers one question for `contributions`: the dot product of every component's write with a direction, one
direction a run. Vectors of single heads or neurons are never formed: the direction is pulled back through the block's
output map (and its post-norm, scale frozen) to where heads and neurons live.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine.activations import Activations
from reward_lens.engine.places import out_map
from reward_lens.model.linear_maps import is_linear, linear_bias, linear_weight
from reward_lens.model.norm import Norm, measure_norm
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site

Labels = tuple[list[str], list[int], list[str], list[int]]


@runtime_checkable
class Split(Protocol):
    """A way to cut the writes."""

    sites: list[Site]
    """What must be captured; the last one is the pre-norm residual."""
    writes: list[Site]
    """What block 0 reads and each block's writes, in order."""

    def labels(self, scale: str) -> Labels:
        """Of each component: label, layer (-1 before block 0, n_layers after the last), kind, index in its layer."""
        ...

    def dots(self, acts: Activations, u: Float[Tensor, "run d_model"]) -> Float[Tensor, "run component"]:
        """Each run's component writes times that run's row of `u`, without the bias row."""
        ...

    def finer_gap(self, acts: Activations, u: Float[Tensor, "run d_model"]) -> Float[Tensor, " run"]:
        """Largest distance between a write and the sum of its parts along `u`; NaN where nothing is split further."""
        ...


class ComponentSplit:
    """embed, then each block's attention and MLP write."""

    def __init__(self, rm: RewardModel):
        self.rm = rm
        self.sites = [Site("embed")]
        for layer in range(rm.n_layers):
            self.sites += [Site("attn", layer), Site("mlp", layer)]
        self.writes = list(self.sites)
        self.sites.append(Site("resid_post", rm.n_layers - 1))

    def labels(self, scale: str) -> Labels:
        rows = [(str(s), -1 if s.layer is None else s.layer, s.kind, -1) for s in self.writes]
        return columns(rows + closing_rows(self.rm, scale))

    def dots(self, acts: Activations, u):
        along, shifts = self.along(acts, u)
        rows = [(acts[site] * one).sum(-1) for site, one in zip(self.writes, along, strict=True)]
        return self._closed(torch.stack(rows, 1), shifts, acts, u)

    def along(self, acts: Activations, u) -> tuple[list[Tensor], Tensor]:
        """The direction [run, d_model] of what block 0 reads and of each write that stands for `u` of the pre-norm
        residual (`u` itself, but in post-norm blocks), and the part [run] of the norms' shifts."""
        embed, *writes = (acts[site] for site in self.writes)
        return self.rm.trunk.carrier.pulled(embed, writes, u)

    def parts(self, acts: Activations) -> Float[Tensor, "run component d_model"]:
        """The components as vectors that sum to the pre-norm residual, without the row of rounding."""
        embed, *writes = (acts[site] for site in self.writes)
        return self.rm.trunk.carrier.carried(embed, writes)

    def finer_gap(self, acts: Activations, u):
        return torch.full_like(u[:, 0], torch.nan, dtype=torch.float64)

    def _closed(self, rows: Tensor, shifts: Tensor, acts: Activations, u) -> Tensor:
        """The rows with what closes their sum to u . h: in post-norm blocks the norms' shifts, carried like a write. In
        16 bits additions and output maps round; what they lost is a row of its own (its size is checked)."""
        if self.rm.trunk.norms:
            rows = torch.cat([rows, shifts[:, None].to(rows)], 1)
        if not self.rm.sixteen_bit:
            return rows
        h = acts[self.sites[-1]]
        lost = (h.double() * u).sum(-1, keepdim=True) - rows.double().sum(1, keepdim=True)
        return torch.cat([rows, lost.to(rows)], 1)


class _UnitSplit(ComponentSplit):
    """One kind of write cut into units that its output map adds up; the other kind stays whole, and so do blocks that
    have no such units."""

    kind: str  # "attn" or "mlp"
    unit: str  # "head" or "neuron"
    letter: str

    def __init__(self, rm: RewardModel):
        super().__init__(rm)
        self.unit_layers = [layer for layer in range(rm.n_layers) if self._has_units(layer)]
        self.maps = {layer: out_map(rm, layer, self.kind) for layer in self.unit_layers}
        self.norms = {layer: self._post_norm(layer) for layer in self.unit_layers}
        self.sites = [*(Site(self.unit, layer) for layer in self.unit_layers), *self.sites]

    def _has_units(self, layer: int) -> bool:
        return True

    def _post_norm(self, layer: int) -> Norm | None:
        """The norm between the output map and the residual stream in sandwich-norm blocks."""
        writer = self.rm.trunk.writers[self.kind][layer]
        if is_linear(writer) or any(m is self.maps[layer] for m in writer.modules()):
            return None
        return measure_norm(writer, self.rm.d_model, self.rm.like, f"post-norm of block {layer}")

    def n_units(self, layer: int) -> int:
        raise NotImplementedError

    def labels(self, scale: str) -> Labels:
        rows = [("embed", -1, "embed", -1)]
        for layer in range(self.rm.n_layers):
            for kind in ("attn", "mlp"):
                if kind == self.kind and layer in self.maps:
                    rows += [(f"L{layer}.{self.letter}{i}", layer, self.unit, i) for i in range(self.n_units(layer))]
                    rows += [(f"L{layer}.{kind}_bias", layer, f"{kind}_bias", -1)] * self._has_constant(layer)
                else:
                    rows.append((f"L{layer}.{kind}", layer, kind, -1))
        return columns(rows + closing_rows(self.rm, scale))

    def dots(self, acts: Activations, u):
        along, shifts = self.along(acts, u)
        columns = []
        for site, one in zip(self.writes, along, strict=True):
            if site.kind == self.kind and site.layer in self.maps:
                units, constant = self._layer(acts, one, site.layer)
                columns += [units, *([constant[:, None]] * self._has_constant(site.layer))]
            else:
                columns.append((acts[site] * one).sum(-1, keepdim=True))
        return self._closed(torch.cat(columns, 1), shifts, acts, u)

    def finer_gap(self, acts: Activations, u):
        gaps = []
        along, _ = self.along(acts, u)
        for layer in self.unit_layers:
            own = Site(self.kind, layer)
            one = along[self.writes.index(own)]
            units, constant = self._layer(acts, one, layer)
            write = (acts[own] * one).sum(-1)
            gaps.append((units.double().sum(1) + constant - write).abs())
        return torch.stack(gaps).max(0).values

    def _has_constant(self, layer: int) -> bool:
        norm = self.norms[layer]
        return linear_bias(self.maps[layer]) is not None or (norm is not None and bool(norm.shift.any()))

    def pulled(self, x: Tensor, u, layer: int) -> tuple[Tensor, Tensor]:
        """`u` pulled back to the units x [run, ...] of one block, [run, width], and the constant part [run]."""
        weight = linear_weight(self.maps[layer]).to(u)
        bias = linear_bias(self.maps[layer])
        bias = torch.zeros_like(u[0]) if bias is None else bias.to(u)
        norm = self.norms[layer]
        constant = torch.zeros_like(u[:, 0])
        if norm is not None:
            before = x.flatten(1) @ weight.T + bias
            constant = u @ norm.shift
            u = norm.pull_back(u, norm.scale(before))
        scale = self.rm.structure.write_scale
        return (u @ weight) * scale, (u @ bias + constant) * scale

    def write(self, x: Float[Tensor, "run width"], layer: int) -> Float[Tensor, "run d_model"]:
        """The write that units make, through the output map and, live, the post-norm."""
        weight, bias = linear_weight(self.maps[layer]).to(x), linear_bias(self.maps[layer])
        before = x @ weight.T if bias is None else x @ weight.T + bias.to(x)
        norm = self.norms[layer]
        return (before if norm is None else norm(before)) * self.rm.structure.write_scale

    def _layer(self, acts: Activations, u: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """[run, unit] and the constant [run] of one block, whose write is read along `u`."""
        x = acts[Site(self.unit, layer)]
        pulled, constant = self.pulled(x, u, layer)
        return self._units(x, pulled), constant

    def _units(self, x: Tensor, pulled: Tensor) -> Tensor:
        raise NotImplementedError


class HeadSplit(_UnitSplit):
    """Attention writes by head. A recurrent or convolutional mixer beside attention stays whole."""

    kind, unit, letter = "attn", "head", "H"

    def _has_units(self, layer: int) -> bool:
        return self.rm.structure.attends(layer)

    def require_heads_everywhere(self) -> None:
        """Raise `StructureError` for a model some of whose blocks have no heads."""
        for layer in range(self.rm.n_layers):
            out_map(self.rm, layer, "attn")

    def n_units(self, layer: int) -> int:
        return self.rm.n_heads

    def _units(self, x, pulled):
        return (x * pulled.view_as(x)).sum(-1)


class NeuronSplit(_UnitSplit):
    """MLP writes by neuron."""

    kind, unit, letter = "mlp", "neuron", "N"

    def n_units(self, layer: int) -> int:
        return linear_weight(self.maps[layer]).shape[1]

    def _units(self, x, pulled):
        return x * pulled


def closing_rows(rm: RewardModel, scale: str) -> list[tuple[str, int, str, int]]:
    """The rows behind all writes that close the sum."""
    names = (
        ["shifts"] * bool(rm.trunk.norms) + ["rounding"] * rm.sixteen_bit + ["bias"] + ["norm"] * (scale == "shared")
    )
    return [(name, rm.n_layers, name, -1) for name in names]


def columns(rows) -> Labels:
    """Rows of labels as columns."""
    labels, layers, kinds, units = zip(*rows, strict=True)
    return list(labels), list(layers), list(kinds), list(units)


def component_coords(labels: Sequence[str], layers: Sequence[int], kinds: Sequence[str]) -> dict[str, Any]:
    """Coordinates of the `component` dim."""
    return {
        "component": ("component", np.array(labels, dtype=object)),
        "layer": ("component", np.array(layers)),
        "kind": ("component", np.array(kinds, dtype=object)),
    }
