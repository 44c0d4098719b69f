"""Which sites a model has, where they may be changed, and the linear maps behind heads and neurons."""

from collections.abc import Iterable

from torch import nn

from reward_lens.errors import StructureError
from reward_lens.model.readout import PromptGated
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.structure import linear_weight
from reward_lens.model.tokens import Tokens


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
    elif site.kind in ("q", "k", "v", "pattern"):
        count = rm.n_heads if site.kind in ("q", "pattern") else rm.n_kv_heads
        if site.index is not None and not 0 <= site.index < count:
            raise _no_site(rm, site, f"indices 0 to {count - 1}")
    elif site.kind in ("latent", "router"):
        raise _no_site(rm, site, "residual streams, writes, heads, neurons, queries, keys, values, patterns")


def require_behind_gate(rm: RewardModel, tokens: Tokens, positions: Iterable[int]) -> None:
    """Raise for a change at or before the position at which a prompt-gated head reads its weights: the change would
    move the weights too, and what is computed here holds them fixed."""
    if not isinstance(rm.readout, PromptGated):
        return
    gate, first = rm.readout.gate_position(tokens), min(positions)
    if first <= gate:
        raise StructureError(
            "A change in the prompt would move the gate of the reward head",
            found=f"a change at position {first}; the gate is read at position {gate}",
            expected=f"changes from position {gate + 1} on, where the weights of the objectives stay as they are",
            do="change the response, ask gate_attribution what sets the weights, or load one objective (objective=), "
            "which has no gate",
        )


def out_map(rm: RewardModel, layer: int, kind: str) -> nn.Module:
    """The linear map from heads (kind "attn") or neurons ("mlp") to the write of one block."""
    path = rm.structure.attn_out if kind == "attn" else rm.structure.mlp_out
    unit = "heads" if kind == "attn" else "neurons"
    try:
        if path is None:
            kept = "its maps are quantised" if rm.quantised else "no single linear map makes the write"
            raise AttributeError(kept)
        return rm.trunk.blocks[layer].get_submodule(path)
    except AttributeError as error:
        raise StructureError(
            f"The {kind} write of block {layer} of {rm.name} cannot be split into {unit}",
            found=str(error),
            expected=f"one linear map from the {unit} to the write",
            do="use the split by component; fused experts and recurrent mixers have no such map, and those of a "
            "quantised model can be split once it is loaded unquantised",
        ) from error


def _no_site(rm: RewardModel, site: Site, there: str) -> StructureError:
    return StructureError(
        f"The site {site} cannot be read in {rm.name}",
        found=str(site),
        expected=there,
        do="choose a site that this model has (rm.n_layers, rm.n_heads)",
    )
