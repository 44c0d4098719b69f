"""Where the parts of the network are: found by search, then proven on every layer.

For each block the search looks for two submodules whose outputs a, b close

    resid_pre + scale * (a + b) == resid_post

on a probe batch, first position left out (massive activations there hide errors). No table of families: an
unusual model is described by passing a `Structure`, which is put to the same proof.

Reference: the residual-stream view is Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reward_lens.engine import hooks
from reward_lens.errors import StructureError
from reward_lens.model.adapters import adapted_weight, is_adapted
from reward_lens.model.placement import held

ACCEPT = 0.02  # largest share of a block's change that its two writes may leave unexplained


@dataclasses.dataclass(frozen=True)
class Structure:
    """Paths of the network's parts. `attn` and `mlp` are relative to a block, the others to the model."""

    blocks: str
    """The list of blocks, e.g. ``"model.layers"``."""
    attn: str
    """Submodule whose output is attention's write (a post-norm in sandwich-norm models)."""
    mlp: str
    """Submodule whose output is the MLP's write."""
    attn_out: str | None
    """Linear map from the concatenated heads to (before any post-norm) the write; None: heads cannot be split."""
    mlp_out: str | None
    """Linear map from the neurons to the MLP's write; None (fused experts, say): neurons cannot be split."""
    final_norm: str | None
    """Norm between the last block and the head; None: the head reads the residual stream itself."""
    head: str
    """The reward head: a linear map, or what of a published head reads the normed residual."""
    n_heads: int
    """Attention heads of a block."""
    write_scale: float = 1.0
    """Factor on each write (Granite's residual multiplier)."""
    parallel: bool | None = None
    """True if the MLP reads the block's input rather than `resid_mid`. Measured; None: not known yet."""
    gaps: tuple[float, ...] = dataclasses.field(default=(), compare=False)
    """Unexplained share of each block's change, measured by the proof."""


def find_blocks(model: Any, n_layers: int) -> str:
    """Path of the outermost ModuleList with one entry a layer."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    paths = [path for path, m in lists if len(m) == n_layers and n_layers > 0]
    if not paths:
        raise StructureError(
            f"The blocks of {type(model).__name__} were not found",
            found="module lists " + (", ".join(f"{p} ({len(m)})" for p, m in lists) or "none"),
            expected=f"one list of {n_layers} blocks (config.num_hidden_layers)",
            do="pass structure=rl.Structure(blocks=...) with the path of the list of blocks",
        )
    return min(paths, key=lambda path: path.count("."))


def find_structure(model: Any, run_probe, n_layers: int, n_heads: int, head: str | None = None) -> Structure:
    """Search the parts; `run_probe()` runs one probe batch through the whole model and returns its logits. `head`: the
    path of what reads the normed residual, where it is known and is no linear map to the logits."""
    blocks_path = find_blocks(model, n_layers)
    blocks = list(model.get_submodule(blocks_path))
    seen = _record_outputs(blocks[0], run_probe)
    pre, post, outputs, inputs = seen
    scales = (1.0, *_config_scales(model))
    attn, mlp, write_scale = _closing_pair(type(model).__name__, pre, post, outputs, scales)
    attn_out = _linear_behind(blocks[0], attn, outputs, inputs)
    mlp_out = _linear_behind(blocks[0], mlp, outputs, inputs)
    if attn_out is not None and linear_weight(blocks[0].get_submodule(attn_out)).shape[1] % n_heads:
        attn_out = None
    final_norm, head = _find_tail(model, blocks_path, run_probe, head)
    return Structure(blocks_path, attn, mlp, attn_out, mlp_out, final_norm, head, n_heads, write_scale)


def prove(model: Any, structure: Structure, run_probe) -> Structure:
    """Check the paths and the closure of every layer; returns the structure with its gaps and `parallel` filled in."""
    blocks = _resolve(model, structure)
    gaps: list[float] = []
    pending: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda tensor: pending.__setitem__(name, tensor.detach().clone())

    def close(output: Tensor):
        writes = (pending["attn"].reshape(output.shape), pending["mlp"].reshape(output.shape))
        gaps.append(_gap(pending["pre"], output, *writes, structure.write_scale))
        pending.clear()

    wanted = []
    for block in blocks:
        wanted += [
            hooks.read_input(block, keep("pre")),
            hooks.read_output(block.get_submodule(structure.attn), keep("attn")),
            hooks.read_output(block.get_submodule(structure.mlp), keep("mlp")),
            hooks.read_output(block, close),
        ]
    try:
        with hooks.attached(wanted):
            run_probe()
    except KeyError as missing:
        raise _not_closed(type(model).__name__, len(gaps), f"{missing} never ran in that block") from missing
    for layer, gap in enumerate(gaps):
        if not gap < ACCEPT:
            pre, post, outputs, _ = _record_outputs(blocks[layer], run_probe)
            best = _ranked_pairs(pre, post, outputs, (1.0, *_config_scales(model)))[:3]
            listed = "; ".join(f"({a}, {b}) leaves {g:.1%}" for g, a, b, _s in best)
            raise _not_closed(
                type(model).__name__,
                layer,
                f"({structure.attn}, {structure.mlp}) leaves {gap:.1%} of the block's change unexplained; "
                f"the best candidates there are {listed or 'none'}",
            )
    parallel = _is_parallel(blocks[0], structure, run_probe)
    return dataclasses.replace(structure, gaps=tuple(gaps), parallel=parallel)


def linear_weight(module: nn.Module) -> Tensor:
    """[out, in] weight of a linear map, whichever way round its class stores it, live low-rank adapters included."""
    if is_adapted(module):
        return adapted_weight(module)
    if isinstance(module, Conv1D):
        return held(module).T
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return held(module)
    raise StructureError(
        f"{type(module).__name__} cannot be split",
        found="a module that is no plain linear map (quantised or fused)",
        expected="torch.nn.Linear or transformers' Conv1D with floating-point weights",
        do="load the model unquantised, or ask for the split by component",
    )


def linear_bias(module: nn.Module) -> Tensor | None:
    """Bias of a linear map, or None."""
    return held(module, "bias")


def is_linear(module: nn.Module) -> bool:
    """Whether `linear_weight` can read the module."""
    plain = isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and module.weight.is_floating_point())
    return plain or is_adapted(module)


def _resolve(model: Any, structure: Structure) -> list[nn.Module]:
    try:
        blocks = list(model.get_submodule(structure.blocks))
        for block in blocks:
            for path in (structure.attn, structure.mlp):
                block.get_submodule(path)
        for path in (structure.attn_out, structure.mlp_out):
            if path is not None:
                blocks[0].get_submodule(path)  # a later block may differ (dense, then experts)
        for path in (structure.head, structure.final_norm):
            if path is not None:
                model.get_submodule(path)
    except AttributeError as error:
        raise StructureError(
            f"The structure does not fit {type(model).__name__}",
            found=str(error),
            expected="paths that exist in the model and in every block",
            do="print the model and correct the path; attn, mlp, attn_out and mlp_out are relative to a block",
        ) from error
    return blocks


def _record_outputs(block: nn.Module, run_probe):
    """resid_pre, resid_post, and of every submodule with a residual-sized output: output and input, in call order.

    A submodule called twice in a block (one dropout behind both writes) names no single write and is left out.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}
    twice: set[str] = set()

    def record(path: str, module: nn.Module) -> Iterator[hooks.Hook]:
        def before(args, kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if tensors:
                inputs[path] = tensors[0].detach().clone()

        def after(output):
            first = output[0] if isinstance(output, tuple | list) and output else output
            pre = ends["pre"]
            if path in outputs:
                twice.add(path)
            elif isinstance(first, Tensor) and first.numel() == pre.numel() and first.shape[-1] == pre.shape[-1]:
                outputs[path] = first.detach().clone().reshape(pre.shape)  # OPT's MLP works on [batch * pos, d]

        yield hooks.read_call(module, before)
        yield hooks.Hook(module, "return", after)

    wanted = [hooks.read_input(block, lambda t: ends.__setitem__("pre", t.detach().clone()))]
    for path, module in block.named_modules():
        if path:
            wanted += record(path, module)
    wanted.append(hooks.read_output(block, lambda t: ends.__setitem__("post", t.detach().clone())))
    with hooks.attached(wanted):
        run_probe()
    outputs = {path: tensor for path, tensor in outputs.items() if path not in twice}
    return ends["pre"], ends["post"], outputs, inputs


def _gap(pre: Tensor, post: Tensor, a: Tensor, b: Tensor, scale: float) -> float:
    """Share of the block's change left unexplained, first position excluded; the additions are repeated in the
    model's own precision, and exactly, and the closer one counts (a residual of norm 1000 in 16 bits rounds away
    more than a small write)."""
    same = ((pre + a * scale) + b * scale).double()
    pre, post, a, b = pre.double(), post.double(), a.double(), b.double()
    change = (post - pre)[:, 1:].norm()
    rounded = (post - same)[:, 1:].norm() / change
    exact = (post - pre - scale * (a + b))[:, 1:].norm() / change
    return float(torch.minimum(rounded, exact))


def _ranked_pairs(pre, post, outputs, scales) -> list[tuple[float, str, str, float]]:
    pairs = []
    for a, b in itertools.combinations(outputs, 2):
        for scale in scales:
            pairs.append((_gap(pre, post, outputs[a], outputs[b], scale), a, b, scale))
    return sorted(pairs, key=lambda pair: pair[0])


def _closing_pair(model_name, pre, post, outputs, scales) -> tuple[str, str, float]:
    for scale in scales:  # a plain sum is the usual case; other factors are tried only if it fails
        ranked = _ranked_pairs(pre, post, outputs, (scale,))
        good = [pair for pair in ranked if pair[0] < ACCEPT]
        if good:
            # Aliases (mlp and mlp.down_proj) close equally well: take the shallowest names. Attention is called first.
            _, a, b, _ = min(good, key=lambda pair: (pair[1].count(".") + pair[2].count("."), pair[0]))
            order = list(outputs)
            first, second = sorted((a, b), key=order.index)
            return first, second, scale
    best = "; ".join(f"({a}, {b}) leaves {g:.1%}" for g, a, b, _ in _ranked_pairs(pre, post, outputs, scales)[:3])
    raise _not_closed(model_name, 0, f"best pairs of submodules: {best or 'none with an output of residual shape'}")


def _not_closed(model_name: str, layer: int, found: str) -> StructureError:
    return StructureError(
        f"Block {layer} of {model_name} does not add up",
        found=found,
        expected=f"two submodules whose outputs explain the block's change but for {ACCEPT:.0%}",
        do="pass structure=rl.Structure(...) naming the submodules that write to the residual stream, "
        "if two such exist; blocks with other than two writes are not supported",
    )


def _config_scales(model: Any) -> tuple[float, ...]:
    config = model.config.get_text_config()
    return tuple(sorted({v for v in config.to_dict().values() if isinstance(v, float) and 1e-3 < v < 1e3 and v != 1.0}))


def _linear_behind(block: nn.Module, write: str, outputs, inputs) -> str | None:
    """The linear map whose output is the write, or is what the write's post-norm reads."""
    for path, module in block.named_modules():
        if path in outputs and is_linear(module):
            if torch.equal(outputs[path], outputs[write]):
                return path
            if write in inputs and not is_linear(block.get_submodule(write)):
                if inputs[write].shape == outputs[path].shape and torch.equal(outputs[path], inputs[write]):
                    return path
    return None


def _find_tail(model: Any, blocks_path: str, run_probe, known: str | None) -> tuple[str | None, str]:
    """The final norm (input: last resid_post, output: what the head reads) and the head (output: the logits)."""
    last = list(model.get_submodule(blocks_path))[-1]
    ends: dict[str, Tensor] = {}
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record(path, module) -> Iterator[hooks.Hook]:
        box = {}
        yield hooks.read_call(
            module, lambda args, kwargs: box.__setitem__("in", next((a for a in args if isinstance(a, Tensor)), None))
        )

        def after(output):
            if isinstance(output, Tensor) and isinstance(box.get("in"), Tensor):
                calls[path] = (box["in"].detach(), output.detach())

        yield hooks.Hook(module, "return", after)

    wanted = [hooks.read_output(last, lambda t: ends.__setitem__("post", t.detach().clone()))]
    for path, module in model.named_modules():
        if path and not path.startswith(blocks_path):
            wanted += record(path, module)
    with hooks.attached(wanted):
        logits = run_probe()

    heads = [p for p, (_, out) in calls.items() if is_linear(model.get_submodule(p)) and _holds(out, logits)]
    heads = heads if known is None else [known]
    if not heads:
        raise StructureError(
            f"The reward head of {type(model).__name__} was not found",
            found="no linear module whose output contains the model's scores",
            expected="a linear reward head, one row an objective",
            do="pass structure= with the head's path, or readout= for a reward that is not a linear head",
        )
    read = calls[heads[0]][0]
    if _same(read, ends["post"]):
        return None, heads[0]
    for path, (entered, left) in calls.items():
        same = entered.shape == ends["post"].shape and left.shape == read.shape
        if same and _same(entered, ends["post"]) and _same(left, read):
            return path, heads[0]
    raise StructureError(
        f"What stands between the last block and the head {heads[0]} of {type(model).__name__} was not understood",
        found="no single module that turns the last block's output into the head's input",
        expected="one final norm, or none",
        do="pass structure= with final_norm=, or readout= if a further network stands before the head (an MLP head)",
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, on whichever devices."""
    return torch.equal(a.to(b.device), b)


def _holds(output: Tensor, logits: Tensor) -> bool:
    """Whether each row of the logits [batch, k] stands somewhere in the head's output [batch, (pos,) k]."""
    if output.shape[-1] != logits.shape[-1] or output.shape[0] != logits.shape[0]:
        return False
    rows = output.reshape(output.shape[0], -1, output.shape[-1])
    return bool((rows == logits[:, None].to(rows.device)).all(-1).any(-1).all())


def _is_parallel(block: nn.Module, structure: Structure, run_probe) -> bool:
    """The MLP of a parallel block does not notice when attention's write is zeroed."""
    kept: list[Tensor] = []
    mlp = hooks.read_output(block.get_submodule(structure.mlp), lambda t: kept.append(t.detach().clone()))
    blank = hooks.edit_output(block.get_submodule(structure.attn), torch.zeros_like)
    with hooks.attached([mlp]):
        run_probe()
    with hooks.attached([mlp, blank]):
        run_probe()
    return torch.equal(kept[0], kept[1])
