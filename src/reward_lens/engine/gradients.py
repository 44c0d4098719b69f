"""The gradient of one text's reward with respect to what stands at its sites, all sites from one pass and one backward.

A site's tensor is taken where it is made and a copy goes on, so that classes that add in place (Falcon) leave it alone.
Positions before `start` come from their keys and values: a change at a later position does not reach them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.engine.editing import IN_ATTENTION, depth_of
from reward_lens.engine.places import gate_inside, out_map
from reward_lens.errors import DataError
from reward_lens.model.forward import suffix_batch
from reward_lens.model.prefix import NO_PREFIX, KeyValues, PrefixCache
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Slopes of one reward; every tensor is [pos from `start`, ...] in the readout's precision."""

    slopes: dict[Site, Tensor]
    """By site without index: all heads [pos, head, head_dim], all neurons [pos, d_mlp]."""
    values: dict[Site, Tensor]
    reward: float
    start: int

    def along(self, site: Site, positions: Sequence[int], moved: Tensor) -> float:
        """First-order change of the reward when the site's values at these positions move by `moved` [pos, ...]."""
        at = torch.as_tensor(list(positions)) - self.start
        slope = self.slopes[dataclasses.replace(site, index=None)][at]
        if site.index is not None:
            slope = slope[:, site.index, None] if site.kind == "neuron" else slope[:, site.index]
        return float((slope.double() * moved.to(slope).double()).sum())


def gradients(
    rm: RewardModel,
    tokens: Tokens,
    sites: Sequence[Site],
    start: int = 0,
    known: KeyValues = NO_PREFIX,
    entering: Tensor | None = None,
    rules: "Rules | None" = None,
    frozen_at: Tensor | None = None,
) -> Gradients:
    """One pass over the positions from `start` on, and one backward.

    `entering` [pos, d_model] stands in for the residual that enters block 0. `rules` change what the backward sees
    (`methods.relevance`), never the forward; with them the final norm's scale is held. `frozen_at` [d_model]: the
    pre-norm residual at which it is held. Raises `DataError` for sites inside the attention call.
    """
    traced = _Trace(rm, sites)
    extra = rules.hooks(rm) if rules is not None else []
    with torch.enable_grad(), rules.active() if rules is not None else nullcontext():
        h, gate = traced.run(tokens, start, known, entering, extra)
        held = h[0].detach() if rules is not None and frozen_at is None else frozen_at
        reward = reward_at(rm, h, held, gate)[0]
        return traced.gradients(reward, start)


def gradients_without(
    rm: RewardModel,
    tokens: Tokens,
    sites: Sequence[Site],
    start: int = 0,
    known: KeyValues = NO_PREFIX,
    frozen_at: Tensor | None = None,
) -> Iterator[Gradients]:
    """For every block the gradients with what goes through the block's writes dropped: one pass, one backward a block.

    A write's own slope in the run of its own block is zero.
    """
    traced = _Trace(rm, sites)
    dropped: list[int] = []

    def gate(layer: int) -> hooks.Edit:
        def pass_on(y: Tensor) -> Tensor:
            y = y.clone()
            y.register_hook(lambda slope: torch.zeros_like(slope) if dropped == [layer] else slope)
            return y

        return pass_on

    gates = [
        hooks.edit_output(writer, gate(layer))
        for writers in rm.trunk.writers.values() for layer, writer in enumerate(writers)
    ]  # fmt: skip
    with torch.enable_grad():
        h, read = traced.run(tokens, start, known, None, gates)
        reward = reward_at(rm, h, frozen_at, read)[0]
    for layer in range(rm.n_layers):
        dropped[:] = [layer]
        yield traced.gradients(reward, start, again=True)


def reward_at(
    rm: RewardModel, h: Tensor, frozen_at: Tensor | None, gate: Tensor | None = None
) -> Float[Tensor, " row"]:
    """Reward of pre-norm residuals [row, d_model], the final norm's scale (and a gate, and the slope of a head that is
    not linear) held at that of `frozen_at`, if given; `gate` is what a prompt-gated head reads, [1 or row, d_model],
    and the one that is held is its first row."""
    h = h.to(rm.like)
    if frozen_at is None:
        return rm.readout.reward(h, gate)
    direction = rm.readout.direction(frozen_at[None].to(h), None if gate is None else gate[:1].detach())
    return h @ direction.u[0] + direction.constant[0]


class _Trace:
    """One pass that keeps its graph and the tensors at the sites."""

    def __init__(self, rm: RewardModel, sites: Sequence[Site]):
        inside = [str(s) for s in sites if s.kind in (*IN_ATTENTION, "router", "expert")]
        if inside:
            raise DataError(
                "Slopes of queries, keys, values, patterns and routers are not taken",
                found=", ".join(inside[:4]),
                expected="embed, residual streams, attention and MLP writes, heads and neurons",
                do="take those of the heads or the MLP they belong to",
            )
        self.rm = rm
        self.sites = list(dict.fromkeys(dataclasses.replace(s, index=None) for s in sites))
        self.kept: dict[Site, Tensor] = {}

    def run(
        self, tokens: Tokens, start: int, known: KeyValues, entering: Tensor | None, extra
    ) -> tuple[Tensor, Tensor | None]:
        """The pre-norm residual at the reward position, [1, d_model], and the one that a gate reads: of this pass, or
        a fixed one where the pass starts behind the gate and so cannot move it."""
        rm, kept = self.rm, self.kept
        self.batch = suffix_batch(tokens, start, rm.device, tokens.seen.stop)
        past = PrefixCache(known.first(start), rm.n_layers) if start else None
        ends: list[Tensor] = []

        def enter(x: Tensor) -> Tensor:
            leaf = (x if entering is None else entering[None].to(x)).detach().requires_grad_(True)
            kept[Site("embed")] = leaf
            return leaf.clone()

        wanted = [rm.trunk.edit_residual(0, enter)]
        # resid_mid = resid_pre + attention's write: the slope is that of the write, the value the sum.
        self.summed = [] if rm.trunk.norms else [s for s in self.sites if s.kind == "resid_mid"]
        parts = [Site(kind, s.layer) for s in self.summed for kind in ("resid_pre", "attn")]
        for site in dict.fromkeys([*self.sites, *parts]):
            if site.kind != "embed" and site not in self.summed and site != Site("resid_pre", 0):
                wanted.append(_keeping(rm, site, kept))
        at = tokens.reward_pos - start
        gate = gate_inside(rm, tokens, start)
        read = [at] if gate is None else [at, gate]
        wanted.append(rm.trunk.read_residual(rm.n_layers, lambda x: ends.extend(x[:, p] for p in read)))
        rm.trunk.run(self.batch, *wanted, *extra, past=past)
        return ends[0], rm.readout_inputs([tokens]) if gate is None else ends[1].to(rm.like)

    def gradients(self, reward: Tensor, start: int, again: bool = False) -> Gradients:
        """Slopes and values at the sites; `again`: the graph is kept for another backward."""
        rm, kept = self.rm, self.kept
        origin = {s: Site("embed") if s == Site("resid_pre", 0) else s for s in self.sites}
        origin |= {s: Site("attn", s.layer) for s in self.summed}
        different = list(dict.fromkeys(origin.values()))
        found = torch.autograd.grad(reward, [kept[s] for s in different], allow_unused=True, retain_graph=again)
        slope = {s: torch.zeros_like(kept[s]) if g is None else g for s, g in zip(different, found, strict=True)}
        slopes, values = {}, {}
        for site, source in origin.items():
            scale = rm.trunk.write_scale if source.kind in ("attn", "mlp") else 1.0
            shape = (self.batch.ids.shape[1], -1)
            g, x = (t.detach().reshape(shape).to(rm.like) for t in (slope[source], kept[source]))
            slopes[site], values[site] = g / scale, x * scale
            if site.kind == "head":
                slopes[site], values[site] = (t.unflatten(-1, (rm.n_heads, -1)) for t in (slopes[site], values[site]))
            if site in self.summed:
                pre = kept[Site("resid_pre", site.layer) if site.layer else Site("embed")]
                values[site] = values[site] + pre.detach()[0].to(rm.like)
        return Gradients(slopes, values, float(reward.detach()), start)


class Rules:
    """What a modified backward needs: hooks, and a context to run in. See `methods.relevance`."""

    def hooks(self, rm: RewardModel) -> list[hooks.Hook]:
        raise NotImplementedError

    def active(self) -> AbstractContextManager:
        raise NotImplementedError


def _keeping(rm: RewardModel, site: Site, kept: dict[Site, Tensor]) -> hooks.Hook:
    """A hook that keeps the site's tensor and lets a copy go on."""

    def keep(x: Tensor) -> Tensor:
        kept[site] = x
        return x.clone()

    if site.kind in ("resid_pre", "resid_post"):
        return rm.trunk.edit_residual(depth_of(site), keep)
    if site.kind == "resid_mid":
        return hooks.edit_output(rm.trunk.norms[site.block][0], keep)
    if site.kind in ("attn", "mlp"):
        return hooks.edit_output(rm.trunk.writers[site.kind][site.block], keep)
    return hooks.edit_input(out_map(rm, site.block, "attn" if site.kind == "head" else "mlp"), keep)
