"""Reading sites in batched passes: only the positions asked for are kept, and what is not needed is never stored.

`read_sites` is the one place where a `Site` becomes something that reads. Every tensor handed on is in the readout's
precision (float32, or float64 for a float64 model), cut to the positions wanted and so a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache

from reward_lens.engine import hooks
from reward_lens.engine.attention_tap import AttentionTap
from reward_lens.engine.editing import IN_ATTENTION, RESIDUALS, depth_of
from reward_lens.engine.places import experts_of, out_map, require_site
from reward_lens.errors import StructureError
from reward_lens.model.experts import Experts, accepted, call_of, unexplained
from reward_lens.model.forward import Batch, at_rows
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

Pick = Callable[[Tensor], Tensor]


def passes(
    rm: RewardModel, tokens: Sequence[Tokens], sites: Iterable[Site], *, everywhere: bool = False, batch_size=None
) -> Iterator[tuple[Batch, dict[Site, Tensor]]]:
    """Run all texts in length-bucketed batches, giving of each batch the sites' tensors.

    At the reward position a tensor is [batch, d]; `everywhere` gives [batch, pos, d] (padding included).
    Head sites give z, [.., n_heads, head_dim]; neuron sites [.., d_mlp]; q [.., n_heads, head_dim], k and v
    [.., n_kv_heads, head_dim]; patterns [.., n_heads, key]; routers [.., n_experts], experts [.., n_experts, d_model].
    """
    sites = list(sites)
    for site in sites:
        require_site(rm, site)
    for batch in rm.batches(tokens, batch_size):
        pick = torch.clone if everywhere else at_rows(batch.reward_pos)
        yield batch, read_sites(rm, batch, sites, pick)


def read_sites(
    rm: RewardModel, batch: Batch, sites: Sequence[Site], pick: Pick, *wanted: hooks.Hook, past: Cache | None = None
) -> dict[Site, Tensor]:
    """One pass: of every site what `pick` takes of [batch, pos, ...]; `wanted` are further hooks."""
    kept: dict[Site, Tensor] = {}
    outside = [s for s in sites if s.kind not in IN_ATTENTION]
    inside = [s for s in sites if s.kind in IN_ATTENTION]
    tap = AttentionTap(rm, wanted=inside)
    reads = [hook for site in outside for hook in _reading(rm, batch, site, pick, kept)]
    with tap.active():
        rm.trunk.run(batch, *tap.hooks(), *reads, *wanted, past=past)
    for site in inside:
        x = pick(tap.seen[Site(site.kind, site.layer)]).to(rm.like)
        kept[site] = x if site.index is None else x[..., site.index, :]
    return kept


def _reading(rm: RewardModel, batch: Batch, site: Site, pick: Pick, kept: dict) -> Iterator[hooks.Hook]:
    """Hooks that put what stands at a site, cut by `pick` and in the readout's precision, into `kept`."""
    like = rm.like

    def keep(x: Tensor) -> None:
        kept[site] = pick(x).to(like)

    def store(x: Tensor) -> None:
        kept[site] = x.to(like)

    if site.kind in RESIDUALS:
        yield rm.trunk.read_residual(depth_of(site), keep)
    elif site.kind in ("attn", "mlp"):
        yield rm.trunk.read_write(batch, site.block, site.kind, keep)
    elif site.kind == "resid_mid":
        if rm.trunk.norms:
            yield rm.trunk.read_middle(site.block, keep)
            return
        box: list[Tensor] = []
        yield rm.trunk.read_residual(site.block, lambda x: box.append(pick(x)))
        yield rm.trunk.read_write(
            batch, site.block, "attn", lambda x: kept.__setitem__(site, (box.pop() + pick(x)).to(like))
        )
    elif site.kind in ("router", "expert"):
        yield from _reading_experts(experts_of(rm, site.block), batch, site, pick, store)
    else:  # head or neuron: what the output map reads

        def units(x: Tensor) -> None:
            x = pick(x.reshape(*batch.ids.shape, x.shape[-1])).to(like)
            if site.kind == "head":
                x = x.unflatten(-1, (rm.n_heads, -1))
            if site.index is not None:
                x = x[..., site.index, :] if site.kind == "head" else x[..., site.index, None]
            kept[site] = x

        yield hooks.read_input(out_map(rm, site.block, "attn" if site.kind == "head" else "mlp"), units)


def _reading_experts(
    experts: Experts, batch: Batch, site: Site, pick: Pick, keep: Callable[[Tensor], None]
) -> Iterator[hooks.Hook]:
    """Weights of the router, or what each expert adds; parts that do not sum to the experts' output raise."""
    box: list[tuple[Tensor, Tensor]] = []

    def before(args, kwargs):
        call = call_of(args, kwargs)
        assert call is not None
        x, weights = (pick(t.reshape(*batch.ids.shape, -1)) for t in (call.x, experts.dense(call)))
        box.append((x, weights))

    def after(output):
        x, weights = box.pop()
        if site.kind == "router":
            keep(weights if site.index is None else weights[..., site.index])
            return
        parts = experts.parts(x.flatten(0, -2), weights.flatten(0, -2)).unflatten(0, x.shape[:-1])
        whole = pick(output.reshape(*batch.ids.shape, -1))
        if not (gap := unexplained(parts, whole)) < accepted(whole):
            raise StructureError(
                f"The experts of block {site.layer} do not add up",
                found=f"their parts leave {gap:.1%} of their output unexplained",
                expected=f"under {accepted(whole):.1%}",
                do="use the MLP's write as a whole",
            )
        keep(parts if site.index is None else parts[..., site.index, :])

    yield hooks.read_call(experts.module, before)
    yield hooks.Hook(experts.module, "return", after)
