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
from reward_lens.engine.editing import IN_ATTENTION
from reward_lens.engine.places import out_map, require_site
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
    [.., n_kv_heads, head_dim]; patterns [.., n_heads, key].
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

    if site.kind in ("embed", "resid_pre", "resid_post"):
        yield rm.trunk.read_residual(_depth(site), keep)
    elif site.kind in ("attn", "mlp"):
        yield rm.trunk.read_write(batch, site.block, site.kind, keep)
    elif site.kind == "resid_mid":
        box: list[Tensor] = []
        yield rm.trunk.read_residual(site.block, lambda x: box.append(pick(x)))
        yield rm.trunk.read_write(
            batch, site.block, "attn", lambda x: kept.__setitem__(site, (box.pop() + pick(x)).to(like))
        )
    else:  # head or neuron: what the output map reads

        def units(x: Tensor) -> None:
            x = pick(x.reshape(*batch.ids.shape, x.shape[-1])).to(like)
            if site.kind == "head":
                x = x.unflatten(-1, (rm.n_heads, -1))
            if site.index is not None:
                x = x[..., site.index, :] if site.kind == "head" else x[..., site.index, None]
            kept[site] = x

        yield hooks.read_input(out_map(rm, site.block, "attn" if site.kind == "head" else "mlp"), units)


def _depth(site: Site) -> int:
    return site.block + (site.kind == "resid_post")
