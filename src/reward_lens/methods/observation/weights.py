"""What the weights alone say about the reward, before any text is read.

    vocab_alignment   cos(u, E_t)                              E_t = row of token t in the input embedding
    ov_pull           p_h = N' (W_V^h)' (W_O^h)' P' u / |u|    what head h writes along u, as a reading of its
    source

u = centre(gain * w) is the effective direction. N is the norm before attention and P the one after it, where
the block has them (in post-norm blocks: every norm behind the write), taken as linear maps (' their
transposes). Frozen: the scale of every norm, at 1 (an input of root mean square 1), and attention: p_h . x is
what h would write along u if it read nothing but a position holding x. Biases do not enter. W_V is found by
running one-token texts, where a head can only attend to itself, and proven on others: no weight is taken by
its name.

What this cannot show: whether a head attends to such a position, or what residuals occur; depth changes what
a direction means, so a token's embedding is no more than a hint beyond the first blocks.

Reference: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (OV circuits).
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.arguments import checked_arguments
from reward_lens.engine import hooks
from reward_lens.engine.places import out_map
from reward_lens.errors import DataError, StructureError
from reward_lens.methods.observation.splits import HeadSplit
from reward_lens.model.forward import Batch
from reward_lens.model.linear_maps import is_linear, linear_bias, linear_weight
from reward_lens.model.norm import Norm, measure_norm
from reward_lens.model.placement import held
from reward_lens.model.readout import require_linear
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

PROBES = 16  # one-token texts to find a map with, and as many others to prove it on
MATCH = 1e-4  # share of a head's z that its value map may leave unexplained
AT_ONCE = 8192  # rows of the embedding in float32 at a time
READINGS = ("norm", "copy")


@checked_arguments
@torch.no_grad()
def vocab_alignment(rm: RewardModel, top: int | None = 25) -> Result:
    """Cosine of every token's embedding with the effective direction of the reward.

    `top`: keep the so many highest and lowest tokens; None keeps all.

    Returns value (token,), cosines in descending order; `token` is the tokenizer's own name of it, with
    coordinates `id`, `piece` (its text) and `dot` (u . E_t, which scales with the head). Rows are taken as
    they are stored: where a position vector, a factor or a norm follows the lookup, the recorded check
    "embedding against residual" says how far what enters block 0 turns away (1 - cosine). Rows that no token
    uses are left out; `meta["summary"]` has mean and SD over all tokens, against which a cosine is to be read
    (rows share a common part). Raises `StructureError` if the embedding is not as wide as the residual
    stream.
    """
    if top is not None and top < 1:
        raise DataError("There are no tokens to keep", found=f"top={top}", expected="1 or more, or None for all",
                        do="pass top=25, say")  # fmt: skip
    table = _embedding(rm)
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
    parts = []
    for some in np.array_split(ids, len(ids) // AT_ONCE + 1):
        rows = table[torch.as_tensor(some, device=table.device)].to(u)
        parts.append(torch.stack([rows @ u, rows.norm(dim=1)]))
    dot, size = torch.cat(parts, 1).double().cpu().numpy()
    size = size * float(u.norm())
    cosine = np.divide(dot, size, out=np.full(len(ids), np.nan), where=size > 0)
    order = np.argsort(-cosine, kind="stable")  # zero rows come last
    if top is not None and 2 * top < len(order):
        defined = int((size > 0).sum())
        order = np.concatenate([order[:top], order[max(top, defined - top) : defined]])
    coords = {
        "token": np.array([names[i] for i in ids[order]], dtype=object),
        "id": ("token", ids[order]),
        "piece": (
            "token",
            np.array([rm.tokenizer.hf.decode([i]) for i in ids[order].tolist()], dtype=object),
        ),
        "dot": ("token", dot[order]),
    }
    summary = {"mean": float(np.nanmean(cosine)), "sd": float(np.nanstd(cosine)), "n_tokens": len(ids)}
    return Result(
        "vocab_alignment", xr.DataArray(cosine[order], dims=("token",), coords=coords), unit="cosine",
        checks=[_residual_gap(rm, table)], undefined="the token's embedding is zero",
        meta=rm.describe(
            "vocab_alignment", title="Tokens along the reward direction", settings={"top": top},
            summary=summary,
            shows="Which tokens' embeddings point along the direction that the reward head reads, and which "
            "against it.",
            cannot_show="What these tokens do to a reward: every block stands between embedding and head.",
        ),
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def ov_pull(rm: RewardModel) -> Result:
    """How strongly each head's OV circuit can write along the reward direction, whatever it reads.

    Returns value (component, reading), labels "L3.H5" with coordinates `layer`, `head` and `kind`. "norm" is
    |p_h|: the most that the head can write along u / |u| for a source of unit length (norm scales at 1).
    "copy" is p_h . u / |u|: what it writes there for a source that points along u itself; positive heads pass
    a reward direction on, negative ones turn it round. Check "value map": z of one-token texts, recomputed
    from the weights found. Raises `StructureError` where no linear map makes the values (latent or recurrent
    attention).
    """
    u = _direction(rm)
    unit = u / u.norm()
    split = HeadSplit(rm)
    split.require_heads_everywhere()
    maps = value_maps(rm)
    pulls = torch.stack([_pull(rm, split, layer, values, unit) for layer, values in enumerate(maps)])
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
            shows="How much of what a head reads it can write along the reward direction, from its weights "
            "alone.",
            cannot_show="Whether the head attends to anything that would make it do so.",
        ),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ValueMap:
    """Values of one block: v = weight . norm(resid_pre) + bias, for every query head (shared ones repeat)."""

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
    ids = _probe_ids(rm)
    seen, fresh = _watch(rm, ids[::2]), _watch(rm, ids[1::2])
    return [_value_map(rm, layer, seen[layer], fresh[layer]) for layer in range(rm.n_layers)]


def _embedding(rm: RewardModel) -> Tensor:
    module: Any = rm.module
    return held(module.get_input_embeddings())


def _probe_ids(rm: RewardModel) -> Tensor:
    """Twice `PROBES` token ids, drawn without the padding token."""
    n_tokens = min(len(rm.tokenizer.hf), len(_embedding(rm)))
    ids = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    return ids[ids != rm.pad_id][: 2 * PROBES]


@dataclasses.dataclass
class _Seen:
    """What one block did to one-token texts: inputs and outputs of its modules, its residual and its z."""

    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    resid: Tensor = dataclasses.field(init=False)
    z: Tensor = dataclasses.field(init=False)


def _watch(rm: RewardModel, ids: Tensor) -> list[_Seen]:
    """What every block does to texts of one token each, one a row of a single batch."""
    n = len(ids)
    seen = [_Seen() for _ in range(rm.n_layers)]
    wanted = []
    for layer, block in enumerate(rm.trunk.blocks):
        at = seen[layer]
        for path, module in block.named_modules():
            if path:
                wanted += _record(at, path, module, n, rm.d_model)
        wanted.append(rm.trunk.read_residual(layer, functools.partial(_keep, at, "resid", n)))
        wanted.append(hooks.read_input(out_map(rm, layer, "attn"), functools.partial(_keep, at, "z", n)))
    rm.trunk.run(_one_token_batch(rm, ids), *wanted)
    return seen


def _one_token_batch(rm: RewardModel, ids: Tensor) -> Batch:
    one, zero = torch.ones(len(ids), 1, dtype=torch.long), torch.zeros(len(ids), dtype=torch.long)
    tensors = (t.to(rm.device) for t in (ids[:, None], one, zero[:, None], zero, zero))
    return Batch(*tensors, rows=tuple(range(len(ids))))


def _record(at: _Seen, path: str, module: nn.Module, n: int, d_model: int) -> tuple[hooks.Hook, hooks.Hook]:
    """Keep input and output of a module that reads one vector of the residual's width a text."""

    def before(args, kwargs):
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is not None and first.numel() == n * d_model:
            at.inputs[path] = _flat(first, n)

    def after(output):
        if isinstance(output, Tensor) and path in at.inputs and output.numel() % n == 0:
            at.outputs[path] = _flat(output, n)

    return hooks.read_call(module, before), hooks.Hook(module, "return", after)


def _keep(at: _Seen, name: str, n: int, x: Tensor) -> None:
    setattr(at, name, _flat(x, n))


def _flat(x: Tensor, n: int) -> Tensor:
    return x.detach().cpu().reshape(n, -1).clone()


def _value_map(rm: RewardModel, layer: int, seen: _Seen, fresh: _Seen) -> ValueMap:
    block, like = rm.trunk.blocks[layer], rm.like
    heads = seen.z.unflatten(1, (rm.n_heads, -1)).double()
    width = heads.shape[2]
    found = {
        path: _match(heads, output.unflatten(1, (-1, width)).double())
        for path, output in seen.outputs.items()
        if is_linear(block.get_submodule(path)) and output.shape[1] % width == 0
    }
    path = min(found, key=lambda path: found[path][0], default=None)
    if path is None or not found[path][0] < (1e-2 if rm.sixteen_bit else MATCH):
        best = "none of that width" if path is None else f"{path}, which leaves {found[path][0]:.1%}"
        raise _no_map(rm, layer, f"no linear map whose rows are the heads' values; the nearest is {best}")
    linear, starts = block.get_submodule(path), found[path][1]
    slices = linear_weight(linear).to(like).unflatten(0, (-1, width))
    zero = (seen.outputs[path].unflatten(1, (-1, width)) == 0).all(2).all(0)
    if (heads == 0).all(2).all(0).any() and zero.sum() > 1 and slices[zero.to(slices.device)].any():
        raise _no_map(rm, layer, "several heads whose values are 0 on every probe text, so that which rows are whose "
                      "cannot be told")  # fmt: skip
    weight = slices[starts]
    bias = linear_bias(linear)
    bias = torch.zeros_like(weight[..., 0]) if bias is None else bias.to(like).unflatten(0, (-1, width))[starts]
    norm = _norm_before(rm, layer, path, seen)
    x = fresh.resid.to(like)
    x = x if norm is None else norm(x)
    values = torch.einsum("hid,pd->phi", weight, x) + bias
    size = torch.einsum("hid,pd->phi", weight.abs(), x.abs()) + bias.abs()
    z = fresh.z.to(like).unflatten(1, (rm.n_heads, -1))
    share = ((z * values).sum(-1, True) / values.square().sum(-1, True)).nan_to_num(0.0).clamp(0, 1)
    left = (z - share * values).abs()
    return ValueMap(weight, bias, norm, float(torch.where((left == 0) & (size == 0), 0.0, left / size).max()))


def _match(z: Float[Tensor, "probe head width"], slices: Float[Tensor, "probe slice width"]) -> tuple[float, Tensor]:
    """The largest share of a head's z that its best slice, times a factor in [0, 1] a probe, leaves
    unexplained; and which slice that is, for every head."""
    dots = torch.einsum("phi,psi->phs", z, slices)
    sizes = slices.square().sum(-1)[:, None]
    share = (dots / sizes).nan_to_num(0.0).clamp(0, 1)
    left = (z.square().sum(-1, True) - 2 * share * dots + share.square() * sizes).clamp_min(0).sum(0)
    size = z.square().sum((0, 2))[:, None]
    silent = torch.where(sizes.sum(0) == 0, 0.0, torch.inf)  # of a head that is 0 on every probe
    gaps, starts = torch.where(size > 0, left / size, silent).sqrt().min(1)
    return float(gaps.max()), starts


def _norm_before(rm: RewardModel, layer: int, path: str, seen: _Seen) -> Norm | None:
    """The norm between the residual stream and the map at `path`."""
    read = seen.inputs[path]
    if torch.equal(read, seen.resid):
        return None
    for other, output in seen.outputs.items():
        if torch.equal(output, read) and torch.equal(seen.inputs[other], seen.resid):
            module = rm.trunk.blocks[layer].get_submodule(other)
            return measure_norm(module, rm.d_model, rm.like, f"norm {other} of block {layer}")
    raise _no_map(rm, layer, f"something other than one norm between the residual stream and {path}")


def _no_map(rm: RewardModel, layer: int, found: str) -> StructureError:
    return StructureError(
        f"The values of the heads in block {layer} of {rm.name} are no linear map of the residual stream",
        found=found,
        expected="a linear map, after at most one norm, whose outputs are the heads' values",
        do="this reading of weights is for plain attention; latent, gated and recurrent attention have none",
    )


def _pull(rm: RewardModel, split: HeadSplit, layer: int, values: ValueMap, unit: Tensor) -> Tensor:
    """[head, d_model]: the direction `unit` pulled back through each head's maps and the norms around them."""
    one = torch.ones_like(unit[:1])
    for norm in reversed(rm.trunk.carrier.norms[2 * layer :]):  # of post-norm blocks, one a write
        unit = norm.pull_back(unit, one)
    after = split.norms[layer]
    u = (unit if after is None else after.pull_back(unit, one)) * rm.structure.write_scale
    heads = (u @ linear_weight(split.maps[layer]).to(u)).unflatten(0, (rm.n_heads, -1))
    pulled = torch.einsum("hi,hid->hd", heads, values.weight)
    return pulled if values.norm is None else values.norm.pull_back(pulled, one)


def _direction(rm: RewardModel) -> Tensor:
    """The effective direction where the final norm's scale is 1."""
    readout = require_linear(rm.readout, "What the weights alone say")
    return readout.norm.pull_back(readout.weight, torch.ones_like(readout.weight[:1]))


def _residual_gap(rm: RewardModel, table: Tensor) -> Check:
    """A recorded fact: how far the lookup's row and what enters block 0 differ in direction."""
    ids = _probe_ids(rm)
    kept: list[Tensor] = []
    entered = rm.trunk.read_residual(0, lambda x: kept.append(_flat(x, len(ids))))
    rm.trunk.run(_one_token_batch(rm, ids), entered)
    rows = table[ids.to(table.device)].cpu().double()
    gap = float((1 - torch.cosine_similarity(rows, kept[0].double())).max())
    note = "1 - cosine, at the first position; position vectors, or a norm after the lookup"
    return Check("embedding against residual", max(gap, 0.0), math.inf, note)
