"""What the weights alone say about the reward, before any text is read.

    vocab_alignment   cos(u, E_t)                              E_t = row of token t in the input embedding
    ov_pull           p_h = N' (W_V^h)' (W_O^h)' P' u / |u|    what head h writes along u, as a reading of its source

u = centre(gain * w) is the effective direction. N is the norm before attention and P the one after it, where the
block has them, taken as linear maps (' their transposes). Frozen: the scale of every norm, at 1 (an input of root
mean square 1), and attention: p_h . x is what h would write along u if it read nothing but a position holding x.
Biases do not enter. W_V is found by running one-token texts, where a head can only attend to itself, and proven on
others: no weight is taken by its name.

What this cannot show: whether a head attends to such a position, or what residuals occur; depth changes what a
direction means, so a token's embedding is no more than a hint beyond the first blocks.

Reference: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (OV circuits).
"""

import dataclasses

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.engine.run import out_map
from reward_lens.errors import StructureError
from reward_lens.model.forward import Batch
from reward_lens.model.norm import Norm, measure_norm
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.structure import is_linear, linear_bias, linear_weight
from reward_lens.result import Check, Result

PROBES = 16  # one-token texts to find a map with, and as many others to prove it on
MATCH = 1e-4
READINGS = ("norm", "copy")


@torch.no_grad()
def vocab_alignment(rm: RewardModel, top: int | None = 25) -> Result:
    """Cosine of every token's embedding with the effective direction of the reward.

    `top`: keep the so many highest and lowest tokens; None keeps all.

    Returns value (token,), cosines in descending order; `token` is the tokenizer's own name of it, with coordinates
    `id`, `piece` (its text) and `dot` (u . E_t, which scales with the head). Rows are taken as they are stored:
    where a position vector, a factor or a norm follows the lookup, the recorded check "embedding against residual"
    says how far what enters block 0 turns away (1 - cosine). Rows that no token uses are left out; `meta["summary"]`
    has mean and SD over all tokens, against which a cosine is to be read (rows share a common part). Raises
    `StructureError` if the embedding is not as wide as the residual stream.
    """
    table = rm.module.get_input_embeddings().weight
    if table.shape[1] != rm.d_model:
        raise StructureError(
            f"The embedding of {rm.name} cannot be held against the reward direction",
            found=f"rows of width {table.shape[1]}",
            expected=f"rows as wide as the residual stream ({rm.d_model})",
            do="project the rows yourself: rm.readout.direction gives the effective direction",
        )
    names = rm.tokenizer.hf.convert_ids_to_tokens(list(range(min(len(table), len(rm.tokenizer.hf)))))
    ids = np.array([i for i, name in enumerate(names) if name is not None])
    u = _direction(rm).to(table.device)
    blocks = [table[torch.as_tensor(part, device=table.device)].to(u) for part in np.array_split(ids, len(ids) // 8192 + 1)]  # fmt: skip
    dot = torch.cat([rows @ u for rows in blocks]).double().cpu().numpy()
    size = torch.cat([rows.norm(dim=1) for rows in blocks]).double().cpu().numpy() * float(u.norm())
    cosine = np.divide(dot, size, out=np.full(len(ids), np.nan), where=size > 0)
    order = np.argsort(-cosine, kind="stable")  # zero rows come last
    if top is not None and 2 * top < len(order):
        defined = int((size > 0).sum())
        order = np.concatenate([order[:top], order[max(top, defined - top) : defined]])
    coords = {
        "token": np.array([names[i] for i in ids[order]], dtype=object),
        "id": ("token", ids[order]),
        "piece": ("token", np.array([rm.tokenizer.hf.decode([i]) for i in ids[order].tolist()], dtype=object)),
        "dot": ("token", dot[order]),
    }
    summary = {"mean": float(np.nanmean(cosine)), "sd": float(np.nanstd(cosine)), "n_tokens": len(ids)}
    return Result(
        "vocab_alignment", xr.DataArray(cosine[order], dims=("token",), coords=coords), unit="cosine",
        checks=[_residual_gap(rm, table)], undefined="the token's embedding is zero",
        meta=rm.describe(
            "vocab_alignment", title="Tokens along the reward direction", settings={"top": top}, summary=summary,
            shows="Which tokens' embeddings point along the direction that the reward head reads, and which against "
            "it.",
            cannot_show="What these tokens do to a reward: every block stands between the embedding and the head.",
        ),
    )  # fmt: skip


@torch.no_grad()
def ov_pull(rm: RewardModel) -> Result:
    """How strongly each head's OV circuit can write along the reward direction, whatever it reads.

    Returns value (component, reading), labels "L3.H5" with coordinates `layer`, `head` and `kind`. "norm" is |p_h|:
    the most that the head can write along u / |u| for a source of unit length (norm scales at 1). "copy" is
    p_h . u / |u|: what it writes there for a source that points along u itself; positive heads pass a reward
    direction on, negative ones turn it round. Check "value map": z of one-token texts, recomputed from the weights
    found. Raises `StructureError` where no linear map makes the values (latent or recurrent attention).
    """
    u = _direction(rm)
    unit = u / u.norm()
    maps = value_maps(rm)
    pulls = torch.stack([_pull(rm, layer, value_map, unit) for layer, value_map in enumerate(maps)])
    readings = torch.stack([pulls.norm(dim=-1), pulls @ unit], -1).flatten(0, 1)
    layers, heads = np.indices((rm.n_layers, rm.n_heads)).reshape(2, -1)
    coords = {
        "component": np.array([f"L{a}.H{b}" for a, b in zip(layers, heads, strict=True)], dtype=object),
        "layer": ("component", layers),
        "head": ("component", heads),
        "kind": ("component", np.array(["head"] * len(heads), dtype=object)),
        "reading": np.array(READINGS, dtype=object),
    }
    value = xr.DataArray(readings.double().cpu().numpy(), dims=("component", "reading"), coords=coords)
    check = Check("value map", max(m.gap for m in maps), 1e-2 if rm.sixteen_bit else MATCH)
    return Result(
        "ov_pull", value, unit="gain", checks=[check],
        meta=rm.describe(
            "ov_pull", title="Pull of the heads on the reward direction",
            shows="How much of what a head reads it can write along the reward direction, from its weights alone.",
            cannot_show="Whether the head attends to anything that would make it do so.",
        ),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ValueMap:
    """Values of one block: v = weight . norm(resid_pre) + bias, for every query head (shared ones repeated)."""

    weight: Float[Tensor, "head head_dim d_model"]
    bias: Float[Tensor, "head head_dim"]
    norm: Norm | None
    """The norm before attention, None where it reads the residual stream itself."""
    gap: float
    """Largest error on fresh one-token texts, in units of the sum of the absolute products."""


@torch.no_grad()
def value_maps(rm: RewardModel) -> list[ValueMap]:
    """One a block, found on one-token texts (where z of a head is its value) and proven on others.

    An attention sink takes part of the weight even then: z may be the value times a factor in (0, 1].
    """
    ids = torch.randperm(len(rm.tokenizer.hf), generator=torch.Generator().manual_seed(0))
    ids = ids[(ids != rm.pad_id) & (ids < len(rm.module.get_input_embeddings().weight))]
    seen = _watch(rm, ids[:PROBES])
    fresh = _watch(rm, ids[PROBES : 2 * PROBES])
    return [_value_map(rm, layer, seen[layer], fresh[layer]) for layer in range(rm.n_layers)]


@dataclasses.dataclass
class _Seen:
    """What one block did to one-token texts: every module's input and output [probe, width]."""

    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    resid: Tensor | None = None
    z: Tensor | None = None


def _watch(rm: RewardModel, ids: Tensor) -> list[_Seen]:
    n = len(ids)
    one, zero = torch.ones(n, 1, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    tensors = (t.to(rm.device) for t in (ids[:, None], one, zero[:, None], zero, zero))
    seen = [_Seen() for _ in range(rm.n_layers)]
    wanted = []
    for layer, block in enumerate(rm.trunk.blocks):
        for path, module in block.named_modules():
            if path:
                wanted += _record(seen[layer], path, module, n)
        wanted.append(rm.trunk.read_residual(layer, lambda x, at=seen[layer]: setattr(at, "resid", _flat(x, n))))
        read_z = hooks.read_input(out_map(rm, layer, "attn"), lambda x, at=seen[layer]: setattr(at, "z", _flat(x, n)))
        wanted.append(read_z)
    rm.trunk.run(Batch(*tensors, rows=tuple(range(n))), *wanted)
    return seen


def _record(seen: _Seen, path: str, module: nn.Module, n: int) -> tuple[hooks.Hook, hooks.Hook]:
    def before(args, kwargs):
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is not None and first.is_floating_point() and first.numel() % n == 0:
            seen.inputs[path] = _flat(first, n)

    def after(output):
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel() % n == 0:
            seen.outputs[path] = _flat(output, n)

    return hooks.read_call(module, before), hooks.Hook(module, "return", after)


def _flat(x: Tensor, n: int) -> Tensor:
    return x.detach().reshape(n, -1).clone()


def _value_map(rm: RewardModel, layer: int, seen: _Seen, fresh: _Seen) -> ValueMap:
    z = seen.z.unflatten(1, (rm.n_heads, -1))
    best = (float("inf"), "", [])
    for path, output in seen.outputs.items():
        linear = is_linear(rm.trunk.blocks[layer].get_submodule(path))
        if linear and output.shape[1] % z.shape[2] == 0 and seen.inputs[path].shape[1] == rm.d_model:
            best = min(best, (*_slices(z, output), path)[::2] + (_slices(z, output)[1],), key=lambda b: b[0])
    return best
