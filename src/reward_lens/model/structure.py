"""Where the parts of the network are: found by search, then proven on every layer.

For each block the search looks for two submodules whose outputs a, b close

    resid_pre + scale * (a + b) == resid_post

on a probe batch, first position left out (massive activations there hide errors). No table of families: an
unusual model is described by passing a `Structure`, which is put to the same proof.

Reference: the residual-stream view is Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.errors import StructureError
from reward_lens.model import block_kinds, post_norm
from reward_lens.model.first_token import first_token_tail
from reward_lens.model.linear_maps import is_linear, linear_weight
from reward_lens.model.tail_search import find_tail

ACCEPT = 0.02  # largest share of a block's change that its two writes may leave unexplained


@dataclasses.dataclass(frozen=True)
class Structure:
    """Paths of the network's parts. `attn` and `mlp` are relative to a block, the others to the model. A tuple holds
    one path a block, where blocks differ (mixers of two kinds, dense MLPs before experts)."""

    blocks: str
    """The list of blocks, e.g. ``"model.layers"``."""
    attn: str | tuple[str, ...]
    """Submodule whose output is attention's write (a post-norm in sandwich-norm models)."""
    mlp: str | tuple[str, ...]
    """Submodule whose output is the MLP's write."""
    attn_out: str | None | tuple[str | None, ...]
    """Linear map from the concatenated heads to (before any post-norm) the write; None: heads cannot be split."""
    mlp_out: str | None | tuple[str | None, ...]
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
    norms: tuple[str, str] | None = None
    """Post-norm blocks (`model.post_norm`): paths in a block of the norms behind attention's and the MLP's write."""
    pooler: str | None = None
    """What stands between the final state and the head and is read through the model's own code (`heads.tail`)."""
    reads_first: bool = False
    """Whether the head reads the first token's state rather than the last one's. Measured."""
    attention: bool | tuple[bool, ...] | None = None
    """Whether a block's mixer is attention, where blocks differ; None: it is where there is an `attn_out`, and
    everywhere if there is none at all."""
    gaps: tuple[float, ...] = dataclasses.field(default=(), compare=False)
    """Unexplained share of each block's change, measured by the proof."""

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> "Structure":
        """A structure as a file holds it, where tuples are lists."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}
        return cls(**fields)

    def path(self, part: str, layer: int) -> Any:
        """Path of "attn", "mlp", "attn_out" or "mlp_out" in one block."""
        found = getattr(self, part)
        return found[layer] if isinstance(found, tuple) else found

    def paths(self, part: str) -> tuple[Any, ...]:
        """The different paths of a part, in the order of the blocks."""
        found = getattr(self, part)
        return tuple(dict.fromkeys(found)) if isinstance(found, tuple) else (found,)

    def attends(self, layer: int) -> bool:
        """Whether a block's mixer is attention. One whose heads cannot be split (an adapter that is no product) is."""
        if self.attention is not None:
            return self.path("attention", layer)
        return self.path("attn_out", layer) is not None or self.paths("attn_out") == (None,)


def find_blocks(model: Any, n_layers: int, run_probe) -> str:
    """Path of the outermost ModuleList with one entry a layer; of those that run on text, where there are several (a
    vision tower may have as many layers)."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    paths = [path for path, m in lists if len(m) == n_layers and n_layers > 0]
    if len(paths) > 1:
        paths = block_kinds.that_run(model, paths, run_probe) or paths
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
    blocks_path = find_blocks(model, n_layers, run_probe)
    blocks = list(model.get_submodule(blocks_path))
    kinds = block_kinds.kinds_of(blocks)
    found: list[tuple[str, str, str | None, str | None]] = []
    write_scale: float | None = None
    norms: tuple[str, str] | None = None
    for layers in kinds:
        block = blocks[layers[0]]
        pre, post, outputs, inputs = _record_outputs(block, run_probe)
        scales = _scales(model, block) if write_scale is None else (write_scale,)
        try:
            attn, mlp, write_scale = _closing_pair(type(model).__name__, layers[0], pre, post, outputs, scales)
        except StructureError:
            closing = post_norm.closing_writes(pre, post, outputs, inputs) if len(kinds) == 1 else None
            if closing is None:
                raise
            attn, mlp, *behind = closing
            norms = (behind[0], behind[1])
        attn_out = _linear_behind(block, attn, outputs, inputs)
        if attn_out is not None and linear_weight(block.get_submodule(attn_out)).shape[1] % n_heads:
            attn_out = None
        found.append((attn, mlp, attn_out, _linear_behind(block, mlp, outputs, inputs)))
    attention = None
    if len(kinds) > 1:
        some = [blocks[layers[0]] for layers in kinds]
        attending = block_kinds.with_attention(some, [attn for attn, *_ in found], run_probe)
        found = [(a, m, out if has else None, n) for (a, m, out, n), has in zip(found, attending, strict=True)]
        attention = block_kinds.spread(kinds, attending) if any(attending) else None
    attn, mlp, attn_out, mlp_out = (block_kinds.spread(kinds, part) for part in zip(*found, strict=True))
    first: dict[str, Any] = {}
    try:
        final_norm, head = find_tail(model, blocks_path, run_probe, head)
    except StructureError:
        tail = first_token_tail(model, blocks_path, run_probe)
        if tail is None:
            raise
        final_norm, head, first = tail.final_norm, tail.head, {"pooler": tail.pooler, "reads_first": True}
    return Structure(
        blocks_path, attn, mlp, attn_out, mlp_out, final_norm, head, n_heads, write_scale or 1.0, norms=norms,
        attention=attention, **first,
    )  # fmt: skip


def prove(model: Any, structure: Structure, run_probe) -> Structure:
    """Check the paths and the closure of every layer; returns the structure with its gaps and `parallel` filled in."""
    blocks = _resolve(model, structure)
    if structure.norms is not None:
        measured = post_norm.proven_gaps(type(model).__name__, blocks, structure, run_probe)
        return dataclasses.replace(structure, gaps=measured, parallel=_is_parallel(blocks[0], structure, 0, run_probe))
    gaps: list[float] = []
    pending: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda tensor: pending.__setitem__(name, tensor.detach().clone())

    def close(output: Tensor):
        writes = (pending["attn"].reshape(output.shape), pending["mlp"].reshape(output.shape))
        gaps.append(_gap(pending["pre"], output, *writes, structure.write_scale))
        pending.clear()

    wanted = []
    for layer, block in enumerate(blocks):
        wanted += [
            hooks.read_input(block, keep("pre")),
            hooks.read_output(block.get_submodule(structure.path("attn", layer)), keep("attn")),
            hooks.read_output(block.get_submodule(structure.path("mlp", layer)), keep("mlp")),
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
            best = _ranked_pairs(pre, post, outputs, _scales(model, blocks[layer]))[:3]
            listed = "; ".join(f"({a}, {b}) leaves {g:.1%}" for g, a, b, _s in best)
            raise _not_closed(
                type(model).__name__,
                layer,
                f"({structure.path('attn', layer)}, {structure.path('mlp', layer)}) leaves {gap:.1%} of the block's "
                "change unexplained; "
                f"the best candidates there are {listed or 'none'}",
            )
    firsts = [layers[0] for layers in block_kinds.kinds_of(blocks)]
    parallel = any(_is_parallel(blocks[layer], structure, layer, run_probe) for layer in firsts)
    return dataclasses.replace(structure, gaps=tuple(gaps), parallel=parallel)


def _resolve(model: Any, structure: Structure) -> list[nn.Module]:
    try:
        blocks = list(model.get_submodule(structure.blocks))
        for part in ("attn", "mlp", "attn_out", "mlp_out"):
            held = getattr(structure, part)
            if isinstance(held, tuple) and len(held) != len(blocks):
                raise AttributeError(f"{part} has {len(held)} paths for {len(blocks)} blocks")
            for layer, block in enumerate(blocks):
                path = structure.path(part, layer)
                # One out map for all blocks may lack in some (dense, then experts): those cannot be split.
                if path is not None and (layer == 0 or part in ("attn", "mlp") or isinstance(held, tuple)):
                    block.get_submodule(path)
        for block in blocks:
            for path in structure.norms or ():
                block.get_submodule(path)
        for path in (structure.head, structure.final_norm, structure.pooler):
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


def _closing_pair(model_name, layer, pre, post, outputs, scales) -> tuple[str, str, float]:
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
    raise _not_closed(model_name, layer, f"best pairs of submodules: {best or 'none with an output of residual shape'}")


def _not_closed(model_name: str, layer: int, found: str) -> StructureError:
    return StructureError(
        f"Block {layer} of {model_name} does not add up",
        found=found,
        expected=f"two submodules whose outputs explain the block's change but for {ACCEPT:.0%}",
        do="pass structure=rl.Structure(...) naming the submodules that write to the residual stream, "
        "if two such exist; blocks with other than two writes are not supported",
    )


def _scales(model: Any, block: nn.Module) -> tuple[float, ...]:
    """Factors that the writes may have: one, or a number of the config's or of the block's own."""
    held = [*model.config.get_text_config().to_dict().values(), *vars(block).values()]
    return (1.0, *sorted({v for v in held if isinstance(v, float) and 1e-3 < v < 1e3 and v != 1.0}))


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


def _is_parallel(block: nn.Module, structure: Structure, layer: int, run_probe) -> bool:
    """The MLP of a parallel block does not notice when attention's write is zeroed."""
    kept: list[Tensor] = []
    attn, mlp = (block.get_submodule(structure.path(part, layer)) for part in ("attn", "mlp"))
    mlp = hooks.read_output(mlp, lambda t: kept.append(t.detach().clone()))
    blank = hooks.edit_output(attn, torch.zeros_like)
    with hooks.attached([mlp]):
        run_probe()
    with hooks.attached([mlp, blank]):
        run_probe()
    return torch.equal(kept[0], kept[1])
