"""The gradient of one text's reward with respect to what stands at its sites, all sites from one pass and one backward.

A site's tensor is taken where it is made and a copy goes on, so that classes that add in place (Falcon) leave it alone.
Positions before `start` come from their keys and values: a change at a later position does not reach them.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.engine.editing import IN_ATTENTION, depth_of
from reward_lens.engine.places import out_map
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
) -> Gradients:
    """One pass over the positions from `start` on, and one backward.

    `entering` [pos, d_model] stands in for the residual that enters block 0. `rules` change what the backward sees
    (`methods.relevance`), never the forward. Raises `DataError` for sites inside the attention call.
    """
    inside = [str(s) for s in sites if s.kind in IN_ATTENTION]
    if inside:
        raise DataError(
            "Gradients of queries, keys, values and patterns are not estimated",
            found=", ".join(inside[:4]),
            expected="embed, residual streams, attention and MLP writes, heads and neurons",
            do="use estimator='exact' for these sites, or estimate the heads they belong to",
        )
    stop = tokens.reward_pos + 1
    batch = suffix_batch(tokens, start, rm.device, stop)
    past = PrefixCache(known.first(start), rm.n_layers) if start else None
    kept: dict[Site, Tensor] = {}
    ends: list[Tensor] = []
    whole = dict.fromkeys(dataclasses.replace(s, index=None) for s in sites)
    # resid_mid = resid_pre + attention's write: the slope is that of the write, the value the sum.
    parts = [Site(kind, s.layer) for s in whole if s.kind == "resid_mid" for kind in ("resid_pre", "attn")]

    def enter(x: Tensor) -> Tensor:
        leaf = (x if entering is None else entering[None].to(x)).detach().requires_grad_(True)
        kept[Site("embed")] = leaf
        return leaf.clone()

    wanted = [rm.trunk.edit_residual(0, enter)]
    for site in dict.fromkeys([*whole, *parts]):
        if site.kind not in ("embed", "resid_mid") and site != Site("resid_pre", 0):
            wanted.append(_keeping(rm, site, kept))
    at = tokens.reward_pos - start
    wanted.append(rm.trunk.read_residual(rm.n_layers, lambda x: ends.append(x[:, at])))
    extra = rules.hooks(rm) if rules is not None else []
    with torch.enable_grad(), rules.active() if rules is not None else nullcontext():
        rm.trunk.run(batch, *wanted, *extra, past=past)
        h = ends[0].to(rm.readout.weight)
        if rules is None:
            reward = rm.readout.reward(h)[0]
        else:  # the final norm's scale is held, as every norm's is
            direction = rm.readout.direction(h.detach())
            reward = (direction.u * h).sum() + direction.constant[0]
        origin = {s: Site("embed") if s == Site("resid_pre", 0) else s for s in whole}
        origin |= {s: Site("attn", s.layer) for s in whole if s.kind == "resid_mid"}
        different = list(dict.fromkeys(origin.values()))
        found = torch.autograd.grad(reward, [kept[s] for s in different], allow_unused=True)
    slope = {s: torch.zeros_like(kept[s]) if g is None else g for s, g in zip(different, found, strict=True)}
    slopes, values = {}, {}
    for site, source in origin.items():
        scale = rm.trunk.write_scale if source.kind in ("attn", "mlp") else 1.0
        shape = (batch.ids.shape[1], -1)
        g, x = (t.detach().reshape(shape).to(rm.readout.weight) for t in (slope[source], kept[source]))
        slopes[site], values[site] = g / scale, x * scale
        if site.kind == "head":
            slopes[site], values[site] = (t.unflatten(-1, (rm.n_heads, -1)) for t in (slopes[site], values[site]))
        if site.kind == "resid_mid":
            pre = kept[Site("resid_pre", site.layer) if site.layer else Site("embed")]
            values[site] = values[site] + pre.detach()[0].to(rm.readout.weight)
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
    if site.kind in ("attn", "mlp"):
        return hooks.edit_output(rm.trunk.writers[site.kind][site.block], keep)
    return hooks.edit_input(out_map(rm, site.block, "attn" if site.kind == "head" else "mlp"), keep)
