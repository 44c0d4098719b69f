"""Reading sites in batched passes: only the positions asked for are kept, and what is not needed is never stored.

`read` is the one place where a `Site` becomes a hook that reads. Every tensor handed on is in the readout's
precision (float32, or float64 for a float64 model), cut to the positions wanted and so a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.errors import StructureError
from reward_lens.model.forward import Batch, at_rows
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.structure import linear_weight
from reward_lens.model.tokens import Tokens

Pick = Callable[[Tensor], Tensor]


def passes(
    rm: RewardModel, tokens: Sequence[Tokens], sites: Iterable[Site], *, everywhere: bool = False, batch_size=None
) -> Iterator[tuple[Batch, dict[Site, Tensor]]]:
    """Run all texts in length-bucketed batches, giving of each batch the sites' tensors.

    At the reward position a tensor is [batch, d]; `everywhere` gives [batch, pos, d] (padding included).
    Head sites give z, [.., n_heads, head_dim]; neuron sites [.., d_mlp].
    """
    sites = list(sites)
    for site in sites:
        require_site(rm, site)
    for batch in rm.batches(tokens, batch_size):
        kept: dict[Site, Tensor] = {}
        pick = torch.clone if everywhere else at_rows(batch.reward_pos)
        wanted = [hook for site in sites for hook in reading(rm, batch, site, pick, kept)]
        rm.trunk.run(batch, *wanted)
        yield batch, kept


def require_site(rm: RewardModel, site: Site) -> None:
    """Raise unless the site exists in this model and can be read."""
    if site.layer is not None and not 0 <= site.layer < rm.n_layers:
        raise _no_site(rm, site, f"layers 0 to {rm.n_layers - 1}")
    if site.kind == "head":
        out_map(rm, site.block, "attn")
        if site.index is not None and not 0 <= site.index < rm.n_heads:
            raise _no_site(rm, site, f"heads 0 to {rm.n_heads - 1}")
    elif site.kind == "neuron":
        width = linear_weight(out_map(rm, site.block, "mlp")).shape[1]
        if site.index is not None and not 0 <= site.index < width:
            raise _no_site(rm, site, f"neurons 0 to {width - 1}")
    elif site.kind == "resid_mid" and rm.structure.parallel:
        raise _no_site(rm, site, "resid_pre and resid_post: the blocks are parallel, so there is no resid_mid")
    elif site.kind in ("q", "k", "v", "pattern", "latent", "router"):
        raise _no_site(rm, site, "residual streams, attn and mlp writes, heads and neurons")


def out_map(rm: RewardModel, layer: int, kind: str) -> torch.nn.Module:
    """The linear map from heads (kind "attn") or neurons ("mlp") to the write of one block."""
    path = rm.structure.attn_out if kind == "attn" else rm.structure.mlp_out
    unit = "heads" if kind == "attn" else "neurons"
    try:
        if path is None:
            raise AttributeError("no single linear map makes the write")
        return rm.trunk.blocks[layer].get_submodule(path)
    except AttributeError as error:
        raise StructureError(
            f"The {kind} write of block {layer} of {rm.name} cannot be split into {unit}",
            found=str(error),
            expected=f"one linear map from the {unit} to the write",
            do="use the split by component; fused experts and recurrent mixers have no such map",
        ) from error


def reading(rm: RewardModel, batch: Batch, site: Site, pick: Pick, kept: dict) -> Iterator[hooks.Hook]:
    """Hooks that put what stands at a site, cut by `pick` and in the readout's precision, into `kept`."""
    like = rm.readout.weight

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


def _no_site(rm: RewardModel, site: Site, there: str) -> StructureError:
    return StructureError(
        f"The site {site} cannot be read in {rm.name}",
        found=str(site),
        expected=there,
        do="choose a site that this model has (rm.n_layers, rm.n_heads)",
    )
