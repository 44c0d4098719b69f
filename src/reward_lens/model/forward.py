"""One pass through the trunk: batches under a token budget, explicit positions, and replay from any layer.

The trunk is the Hugging Face model without its head. Its attention mask and position ids come from the texts'
lengths, never from `ids != pad`; the reward head is applied by the readout, in float32, to the pre-norm residual.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from reward_lens.engine import hooks
from reward_lens.errors import DataError
from reward_lens.model.adapters import network_in
from reward_lens.model.experts import Experts, find_experts
from reward_lens.model.norm import measure_norm
from reward_lens.model.placement import input_device
from reward_lens.model.post_norm import Carrier
from reward_lens.model.tokens import Tokens

if TYPE_CHECKING:
    from reward_lens.model.structure import Structure

TOKENS_PER_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded token ids of several texts."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch seen"]
    """1 where there is text. As wide as `ids`, or as `ids` and the positions whose keys and values are reused."""
    positions: Int[Tensor, "batch pos"]
    offset: Int[Tensor, " batch"]
    """Index of each text's first token (0 with right padding; negative where a prefix is reused)."""
    reward_pos: Int[Tensor, " batch"]
    rows: tuple[int, ...]
    """Where each text stood in the list the batch was made from."""

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()


def make_batch(
    tokens: Sequence[Tokens], rows: Iterable[int], pad_id: int, device: torch.device, padding: str = "right"
) -> Batch:
    """Pad `tokens` to one rectangle."""
    longest = max(len(t) for t in tokens)
    ids = torch.full((len(tokens), longest), pad_id)
    mask = torch.zeros(len(tokens), longest, dtype=torch.long)
    offsets = [longest - len(t) if padding == "left" else 0 for t in tokens]
    for i, (text, start) in enumerate(zip(tokens, offsets, strict=True)):
        ids[i, start : start + len(text)] = torch.tensor(text.ids)
        mask[i, start : start + len(text)] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    reward_pos = torch.tensor([start + t.reward_pos for t, start in zip(tokens, offsets, strict=True)])
    tensors = (ids, mask, positions, torch.tensor(offsets), reward_pos)
    ids, mask, positions, offset, reward_pos = (t.to(device) for t in tensors)
    return Batch(ids, mask, positions, offset, reward_pos, tuple(rows))


def suffix_batch(tokens: Tokens, start: int, device: torch.device, stop: int | None = None) -> Batch:
    """One text from position `start` on (to before `stop`), to be run with the keys and values of what is before."""
    stop = len(tokens) if stop is None else stop
    ids = torch.tensor([tokens.ids[start:stop]], device=device)
    seen = torch.ones(1, stop, dtype=torch.long, device=device)
    positions = torch.arange(start, stop, device=device)[None]
    reward_pos = torch.tensor([tokens.reward_pos - start], device=device)
    return Batch(ids, seen, positions, torch.tensor([-start], device=device), reward_pos, (0,))


def batches(
    tokens: Sequence[Tokens], pad_id: int, device: torch.device, batch_size: int | None = None
) -> Iterator[Batch]:
    """Length-bucketed batches: at most `TOKENS_PER_BATCH` padded tokens, or `batch_size` texts if given."""
    if batch_size is not None and batch_size < 1:
        raise DataError("No texts were to run at once", found=f"batch_size={batch_size}", expected="1 or more, or None",
                        do="leave batch_size away: batches are filled by length")  # fmt: skip
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (
            stop - start < batch_size
            if batch_size is not None
            else (stop - start + 1) * len(tokens[order[stop]]) <= TOKENS_PER_BATCH
        ):
            stop += 1
        rows = order[start:stop]
        yield make_batch([tokens[i] for i in rows], rows, pad_id, device)
        start = stop


@dataclasses.dataclass
class Trunk:
    """The network up to the pre-norm residual, addressed by its proven structure."""

    module: Any
    """Called with token ids."""
    blocks: list[nn.Module]
    final_norm: nn.Module | None
    writers: dict[str, list[nn.Module]]
    """The modules whose outputs are the "attn" and the "mlp" writes, one a block."""
    write_scale: float = 1.0
    norms: tuple[tuple[nn.Module, nn.Module], ...] = ()
    """Post-norm blocks: the norms behind attention's and the MLP's write, a pair a block."""
    second_begins: int | None = None
    """Separator behind which a text is the second of a pair, where the model tells two segments apart."""
    first_position: int = 0
    """Position id of a text's first token."""
    last_mlp: nn.Module | None = None
    """What in the last block holds the MLP, or as much of it as one module does."""

    def __post_init__(self):
        self._accepts = inspect.signature(self.module.forward).parameters
        # transformers 5.24 renamed the argument; a published model's own code may keep the former name.
        self._cache_argument = "cache" if "cache" in self._accepts else "past_key_values"

    def run(self, batch: Batch, *wanted: hooks.Hook, past: Cache | None = None) -> None:
        """One forward pass with the given hooks; whoever wants a tensor reads it through a hook.

        `past` holds the keys and values of the positions before the batch's (`model.prefix`).
        """
        if self.module.training:
            raise DataError(
                "The network is in training mode",
                found=f"a {type(self.module).__name__} whose train() was called since it was wrapped, its dropout on",
                expected="eval mode, as RewardModel puts it in",
                do="call rm.module.eval() before, and train() after, where a training run goes on",
            )
        extra: dict[str, object] = {} if past is None else {self._cache_argument: past}
        if "position_ids" in self._accepts:
            extra["position_ids"] = batch.positions + self.first_position
        extra |= self.segments(batch.ids)
        with hooks.attached(wanted):
            self.module(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **extra)

    def segments(self, ids: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
        """The argument that tells the second text of a pair from the first, for models that take it."""
        if self.second_begins is None or "token_type_ids" not in self._accepts:
            return {}
        separators = ids.eq(self.second_begins).long()
        return {"token_type_ids": ((separators.cumsum(1) - separators) > 0).long()}

    @functools.cached_property
    def shared_arguments(self) -> frozenset[str]:
        """Arguments of the blocks that are the same for all rows of a batch (DeBERTa's relative positions): those that
        two rows make no longer than one. A block that is called with more rows takes them as they are."""
        shapes: list[dict[str, int]] = []
        for rows in (1, 2):
            ids = torch.zeros(rows, 2, dtype=torch.long, device=next(self.module.parameters()).device)
            order = torch.arange(2, device=ids.device).expand(rows, 2)
            batch = Batch(ids, torch.ones_like(ids), order, ids[:, 0], ids[:, 1], tuple(range(rows)))
            with torch.no_grad():
                calls = record(self, batch).calls
            found: dict[str, int] = {}
            for block, (args, kwargs) in zip(self.blocks, calls, strict=True):
                names = inspect.signature(block.forward).parameters
                for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                    if isinstance(value, Tensor) and value.dim() >= 2:
                        found[name] = max(value.shape[0], found.get(name, 0))
            shapes.append(found)
        one, two = shapes
        return frozenset(name for name in one if one[name] == two.get(name))

    @functools.cached_property
    def mlp_alone(self) -> nn.Module | None:
        """`last_mlp`, if one position may be shown to it alone: what the block then adds is broadcast over all
        positions and is right at that one. Measured on a text; None where it mixes positions or its code forbids it."""
        if self.last_mlp is None:
            return None
        parameter = next(self.module.parameters())
        ids, at = torch.arange(8, device=parameter.device)[None], 5
        ones = torch.ones_like(ids)
        batch = Batch(ids, ones, ids, ids[:, 0], ids[:, at], (0,))
        before: list[Tensor] = []
        entering = self.read_residual(len(self.blocks) - 1, lambda x: before.append(x[0, at].float()))
        try:
            with torch.no_grad():
                whole = self.pooled(batch, entering)[0].float()
                alone = self.pooled(batch, one_position(self.last_mlp, at))[0].float()
        except (RuntimeError, IndexError, ValueError):  # an addition in place, a shape that the block counts on
            return None
        apart = (alone - whole).norm() / (whole - before[0]).norm()
        return self.last_mlp if apart < (3e-2 if parameter.element_size() < 4 else 1e-4) else None

    @functools.cached_property
    def carrier(self) -> Carrier:
        """What carries a write through the norms behind it, measured."""
        like, width = next(self.module.parameters()), self.module.config.get_text_config().hidden_size
        return Carrier(tuple(
            measure_norm(norm, width, like, f"norm behind the write of block {layer}")
            for layer, both in enumerate(self.norms) for norm in both
        ))  # fmt: skip

    def read_middle(self, layer: int, read: hooks.Read) -> hooks.Hook:
        """Hook on the residual between the two writes of a post-norm block."""
        return hooks.read_output(self.norms[layer][0], read)

    def pooled(self, batch: Batch, *wanted: hooks.Hook, past: Cache | None = None) -> Float[Tensor, "batch d_model"]:
        """The pre-norm residual at each text's reward position, of one pass with the given hooks."""
        kept: list[Tensor] = []
        pick = at_rows(batch.reward_pos)
        self.run(batch, *wanted, self.read_residual(len(self.blocks), lambda x: kept.append(pick(x))), past=past)
        return kept[0]

    def read_residual(self, depth: int, read: hooks.Read) -> hooks.Hook:
        """Hook on the residual that enters block `depth`; depth n_layers is the pre-norm residual."""
        if depth < len(self.blocks):
            return hooks.read_input(self.blocks[depth], read)
        if self.final_norm is not None:
            return hooks.read_input(self.final_norm, read)
        return hooks.read_output(self.blocks[-1], read)

    def read_write(self, batch: Batch, layer: int, kind: str, read: hooks.Read) -> hooks.Hook:
        """Hook on what attention or the MLP of a block adds to the residual stream, [batch, pos, d_model]."""

        def scaled(x: Tensor) -> None:
            x = x.reshape(*batch.ids.shape, x.shape[-1])
            read(x if self.write_scale == 1.0 else x * self.write_scale)

        return hooks.read_output(self.writers[kind][layer], scaled)

    def edit_residual(self, depth: int, edit: hooks.Edit) -> hooks.Hook:
        """Hook that replaces the residual entering block `depth` (n_layers: what the final norm reads)."""
        if depth < len(self.blocks):
            return hooks.edit_input(self.blocks[depth], edit)
        return hooks.edit_output(self.blocks[-1], edit)


@dataclasses.dataclass(frozen=True)
class Recording:
    """The arguments every block was called with in one pass, so that any tail of the network can be run again."""

    calls: tuple[tuple[tuple, dict], ...]
    last: Float[Tensor, "batch pos d_model"]
    """The pre-norm residual of the recorded pass."""

    def resid(self, depth: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual that entered block `depth`."""
        return hooks.first_input(*self.calls[depth]) if depth < len(self.calls) else self.last


def record(trunk: Trunk, batch: Batch, *wanted: hooks.Hook, past: Cache | None = None) -> Recording:
    """Run the trunk once and keep what each block was called with."""
    calls: list[tuple[tuple, dict]] = []
    last: list[Tensor] = []

    def keep(args, kwargs):
        x = hooks.first_input(args, kwargs).clone()
        calls.append(hooks.with_first_input(args, kwargs, x))

    reading = [hooks.read_call(block, keep) for block in trunk.blocks]
    reading.append(trunk.read_residual(len(trunk.blocks), lambda t: last.append(t.clone())))
    trunk.run(batch, *wanted, *reading, past=past)  # what a caller's hook puts into a block is what is recorded
    return Recording(tuple(calls), last[0])


def replay(
    trunk: Trunk, recording: Recording, depth: int, resid: Float[Tensor, "batch pos d_model"], *wanted: hooks.Hook
) -> Float[Tensor, "batch pos d_model"]:
    """The pre-norm residual when `resid` enters block `depth` and the later blocks run as they were called before."""
    with hooks.attached(wanted):
        for block, (args, kwargs) in zip(trunk.blocks[depth:], recording.calls[depth:], strict=True):
            args, kwargs = hooks.with_first_input(args, kwargs, resid)
            resid = hooks.first_output(block(*args, **kwargs))
    return resid


def one_position(module: nn.Module, at: int) -> hooks.Hook:
    """Hook that shows a module [batch, pos, d] no position but one."""
    return hooks.edit_input(module, lambda x: x[:, at : at + 1])


def at_rows(positions: Int[Tensor, " batch"]) -> Callable[[Tensor], Tensor]:
    """Pick one position a row from [batch, pos, d]: a copy, so the full tensor can be freed."""

    def pick(x: Tensor) -> Tensor:
        index = positions.to(x.device)
        return x[torch.arange(x.shape[0], device=x.device), index]

    return pick


def trunk_of(module: Any, structure: "Structure") -> Trunk:
    """The trunk of a module whose structure is proven."""
    blocks = list(module.get_submodule(structure.blocks))
    writers = {
        kind: [block.get_submodule(structure.path(kind, layer)) for layer, block in enumerate(blocks)]
        for kind in ("attn", "mlp")
    }
    final_norm = None if structure.final_norm is None else module.get_submodule(structure.final_norm)
    norms = ()
    if structure.norms is not None:
        first, second = structure.norms
        norms = tuple((block.get_submodule(first), block.get_submodule(second)) for block in blocks)
    last = len(blocks) - 1
    paths = (structure.path("mlp_out", last), structure.path("mlp", last))  # in front of the norm behind, if there is
    holding = (getattr(blocks[last], path.split(".")[0], None) for path in paths if path is not None)
    return Trunk(
        trunk_module(module, structure.blocks), blocks, final_norm, writers, structure.write_scale, norms,
        last_mlp=next(module for module in holding if module is not None),
    )  # fmt: skip


class OnTrunk:
    """What every model with a proven trunk says of itself."""

    module: Any
    trunk: Trunk
    tokenizer: Any

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.trunk.blocks)

    @functools.cached_property
    def experts(self) -> tuple[Experts | None, ...]:
        """The routed experts of every block, None where it has none."""
        batch = suffix_batch(self.tokenizer.text("Experts are chosen by token."), 0, self.device)
        return find_experts(self.trunk.blocks, lambda wanted: self.trunk.run(batch, *wanted))

    @property
    def device(self) -> torch.device:
        """Device that inputs go to: where the embedding runs."""
        return input_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the trunk."""
        return next(self.module.parameters()).dtype

    @property
    def sixteen_bit(self) -> bool:
        """Whether the trunk runs in bfloat16 or float16, or on quantised weights, with the tolerances of 16 bits."""
        return self.dtype in (torch.bfloat16, torch.float16) or self.quantised

    @functools.cached_property
    def quantised(self) -> bool:
        """Whether weights of the trunk are kept in 8 or 4 bits. Around such a product numbers pass 16 bits or fewer,
        so sums in another order (batches, attention) come out as far apart as they do in bfloat16."""
        whole = all(p.is_floating_point() for p in self.module.parameters())
        return not whole or bool(getattr(self.module, "is_quantized", False))


def trunk_module(module: nn.Module, blocks_path: str) -> nn.Module:
    """The headless network: what Hugging Face calls the base model."""
    module = network_in(module)
    base = getattr(module, "base_model", module)
    if base is module:
        base = module.get_submodule(blocks_path.split(".")[0])
    return base


def padding_id(config) -> int | None:
    """The padding token that a config names: its own, or that of its text model."""
    named = (getattr(some, "pad_token_id", None) for some in (config, config.get_text_config()))
    return next((i for i in named if i is not None), None)


def rotary_threshold(config) -> int | None:
    """The length past which a model's rotary factors change (longrope, dynamic); None where they do not."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    if kind not in ("longrope", "dynamic"):
        return None
    original = scaling.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return original or config.max_position_embeddings
