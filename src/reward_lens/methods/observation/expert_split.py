"""MLP writes cut by routed expert: what each adds, its weight included, and the rest (shared experts)."""

import torch
from torch import Tensor

from reward_lens.engine.activations import Activations
from reward_lens.engine.places import experts_of
from reward_lens.errors import StructureError
from reward_lens.methods.observation.splits import ComponentSplit, Labels, closing_rows, columns
from reward_lens.model.norm import Norm, measure_norm
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site


class ExpertSplit(ComponentSplit):
    """A block with experts has a row for each, ``"L3.E5"`` (zero where it is not chosen), and ``"L3.mlp_rest"``: the
    write less their sum. Blocks without experts keep their MLP whole."""

    def __init__(self, rm: RewardModel):
        super().__init__(rm)
        self.layers = [layer for layer, experts in enumerate(rm.experts) if experts is not None]
        if not self.layers:
            experts_of(rm, 0)  # says why
        self.norms = {layer: self._post_norm(layer) for layer in self.layers}
        self.sites = [*(Site("expert", layer) for layer in self.layers), *self.sites]

    def labels(self, scale: str) -> Labels:
        rows = [("embed", -1, "embed", -1)]
        for layer in range(self.rm.n_layers):
            rows.append((f"L{layer}.attn", layer, "attn", -1))
            if layer in self.norms:
                n = experts_of(self.rm, layer).n
                rows += [(f"L{layer}.E{i}", layer, "expert", i) for i in range(n)]
                rows.append((f"L{layer}.mlp_rest", layer, "mlp_rest", -1))
            else:
                rows.append((f"L{layer}.mlp", layer, "mlp", -1))
        return columns(rows + closing_rows(self.rm, scale))

    def dots(self, acts: Activations, u):
        along, shifts = self.along(acts, u)
        found = [(acts[Site("embed")] * along[0]).sum(-1, keepdim=True)]
        for layer in range(self.rm.n_layers):
            found.append(self._whole(acts, along, Site("attn", layer)))
            if layer in self.norms:
                units, rest = self._layer(acts, self._own(along, layer), layer)
                found += [units, rest[:, None]]
            else:
                found.append(self._whole(acts, along, Site("mlp", layer)))
        return self._closed(torch.cat(found, 1), shifts, acts, u)

    def finer_gap(self, acts: Activations, u):
        gaps = []
        along, _ = self.along(acts, u)
        for layer in self.layers:
            own = self._own(along, layer)
            units, rest = self._layer(acts, own, layer)
            gaps.append((units.double().sum(1) + rest - (acts[Site("mlp", layer)] * own).sum(-1)).abs())
        return torch.stack(gaps).max(0).values

    def _own(self, along: list[Tensor], layer: int) -> Tensor:
        return along[self.writes.index(Site("mlp", layer))]

    def _whole(self, acts: Activations, along: list[Tensor], site: Site) -> Tensor:
        return (acts[site] * along[self.writes.index(site)]).sum(-1, keepdim=True)

    def _layer(self, acts: Activations, u, layer: int) -> tuple[Tensor, Tensor]:
        """[run, expert] and the rest [run] of one block."""
        parts, write = acts[Site("expert", layer)], acts[Site("mlp", layer)]
        scale, norm = self.rm.structure.write_scale, self.norms[layer]
        whole = parts.sum(1)
        if norm is None:
            return (parts * u[:, None]).sum(-1) * scale, ((write - whole * scale) * u).sum(-1)
        if not (gap := float((norm(whole) * scale - write).norm() / write.norm())) < (
            2e-2 if self.rm.sixteen_bit else 1e-3
        ):
            raise StructureError(
                f"The MLP write of block {layer} of {self.rm.name} cannot be split into experts",
                found=f"a norm follows, and the norm of the experts' sum leaves {gap:.1%} of the write",
                expected="nothing beside the routed experts before that norm",
                do="use the split by component; a norm of experts and shared experts together is not linear in either",
            )
        pulled = norm.pull_back(u, norm.scale(whole))
        return (parts * pulled[:, None]).sum(-1) * scale, (u @ norm.shift) * scale

    def _post_norm(self, layer: int) -> Norm | None:
        writer, experts = self.rm.trunk.writers["mlp"][layer], experts_of(self.rm, layer)
        if any(m is experts.module for m in writer.modules()):
            return None
        return measure_norm(writer, self.rm.d_model, self.rm.like, f"post-norm of block {layer}")
