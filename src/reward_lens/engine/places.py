"""Which sites a model has, where they may be changed, and the linear maps behind heads and neurons."""

from collections.abc import Iterable

from torch import nn

from reward_lens.errors import StructureError
from reward_lens.model.experts import Experts
from reward_lens.model.linear_maps import linear_weight
from reward_lens.model.readout import PromptGated
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
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
        if not rm.structure.attends(site.block):
            attending = ", ".join(str(i) for i in range(rm.n_layers) if rm.structure.attends(i))
            raise _no_site(rm, site, f"a block with attention ({attending}); this one's mixer has no queries and keys")
        count = rm.n_heads if site.kind in ("q", "pattern") else rm.n_kv_heads
        if site.index is not None and not 0 <= site.index < count:
            raise _no_site(rm, site, f"indices 0 to {count - 1}")
    elif site.kind in ("router", "expert"):
        count = experts_of(rm, site.block).n
        if site.index is not None and not 0 <= site.index < count:
            raise _no_site(rm, site, f"experts 0 to {count - 1}")
    elif site.kind == "latent":
        raise _no_site(rm, site, "residual streams, writes, heads, neurons, queries, keys, values, patterns, routers")


def gate_inside(rm: RewardModel, tokens: Tokens, start: int) -> int | None:
    """Where, in a pass over a text from position `start` on, a prompt-gated head reads its weights; None where the
    head has no such gate, or reads it before `start`, so that nothing in the pass moves it."""
    if not isinstance(rm.readout, PromptGated):
        return None
    at = rm.readout.gate_position(tokens) - start
    return at if at >= 0 else None


def reaches_gate(rm: RewardModel, tokens: Tokens, positions: Iterable[int]) -> bool:
    """Whether a change at these positions can move the weights of a prompt-gated head: the network is causal, so one
    behind the position where they are read cannot."""
    return isinstance(rm.readout, PromptGated) and min(positions) <= rm.readout.gate_position(tokens)


def require_behind_gate(rm: RewardModel, tokens: Tokens, positions: Iterable[int]) -> None:
    """Raise where a patch from one response to the other reaches the position that a prompt-gated head reads, for
    methods that hold the weights: they share the prompt, unless it was cut differently."""
    positions = list(positions)
    if positions and reaches_gate(rm, tokens, positions):
        raise StructureError(
            "A patch between two responses reaches the gate of the reward head, which is held here",
            found=f"a patch at position {min(positions)}; the gate is read at position {gate_inside(rm, tokens, 0)}",
            expected="two texts that share the prompt, which truncation may cut to different lengths",
            do="shorten the conversation, patch at='final', or ask effects (path='total', norm='live') or "
            "gate_routes, where the gate answers",
        )


def experts_of(rm: RewardModel, layer: int) -> Experts:
    """The routed experts of one block."""
    experts = rm.experts[layer]
    if experts is None:
        having = [str(i) for i, one in enumerate(rm.experts) if one is not None]
        raise StructureError(
            f"Block {layer} of {rm.name} has no experts that can be told apart",
            found=f"experts in blocks {', '.join(having)}" if having else "no experts in any block",
            expected="a module called with states, numbers of chosen experts and their weights, whose output is their "
            "weighted sum",
            do="name a block that has them; experts whose weights multiply what they read have no separate parts",
        )
    return experts


def require_readings_along(rm: RewardModel, tokens: Iterable[Tokens]) -> None:
    """Raise where the head's readings at single positions are no readings of beginnings of the text."""
    if any(t.reads_first for t in tokens):
        raise StructureError(
            "The reward cannot be read along the text",
            found=f"{rm.name} reads the first token, and every position sees the whole text",
            expected="a causal network, in which the state at a position is that of the text up to there",
            do="use token_attribution with method='truncate' or 'leave_one_out', or the lens at='final'",
        )


def out_map(rm: RewardModel, layer: int, kind: str) -> nn.Module:
    """The linear map from heads (kind "attn") or neurons ("mlp") to the write of one block."""
    path = rm.structure.path(f"{kind}_out", layer)
    unit = "heads" if kind == "attn" else "neurons"
    try:
        if path is None:
            kept = "its maps are quantised" if rm.quantised else "no single linear map makes the write"
            if kind == "attn" and not rm.structure.attends(layer):
                kept = "a mixer that is no attention and has no heads"
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
