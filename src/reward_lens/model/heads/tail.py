"""What stands behind the final state, run as the model's own code: poolers of encoders, without a transcription of any.

The module is copied without its blocks and with an embedding of two rows. A state to be read is put where the last
block (or the final norm) would give it, as that of a text of one token, so the pooler, the activation and the head are
the classes' own, in the tail's precision.
"""

import copy
import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.model.heads.local import LocalReadout
from reward_lens.model.norm import Norm
from reward_lens.model.readout import Rows


class OwnTail(nn.Module):
    """Maps the (normed) final state of the first token to the model's scores."""

    def __init__(self, module: Any, structure: Any, like: Tensor):
        super().__init__()
        self.given = _Given()
        blocks = module.get_submodule(structure.blocks)
        last = blocks[len(blocks) - 1]
        n_outputs = _outputs_of(module, last)
        embedding = module.get_input_embeddings()
        pad = module.config.pad_token_id
        self.token = 1 if pad == 0 else 0
        replaced: dict[int, Any] = {
            id(blocks): nn.ModuleList([_stub(last, self.given, n_outputs)]),
            id(embedding): nn.Embedding(2, embedding.weight.shape[1]),
        }
        if structure.final_norm is not None:
            replaced[id(module.get_submodule(structure.final_norm))] = _stub(last, self.given, 0)
        own = copy.deepcopy(module, replaced)
        if any(hasattr(m, "_hf_hook") for m in own.modules()):  # accelerate's device moves; the copy is on one device
            from accelerate.hooks import remove_hook_from_module

            own = remove_hook_from_module(own, recurse=True)
        self.module = own.to(device=like.device, dtype=like.dtype).eval().requires_grad_(False)

    def forward(self, state: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch column"]:
        self.given.state = state.reshape(-1, 1, state.shape[-1])
        ids = torch.full(self.given.state.shape[:2], self.token, device=state.device)
        scores = self.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        self.given.state = None
        return scores.reshape(*state.shape[:-1], -1)


class Difference(nn.Module):
    """One column of a tail less another, as its only column."""

    def __init__(self, tail: OwnTail, rows: Rows):
        super().__init__()
        self.tail, self.rows = tail, rows

    def forward(self, state: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        columns = self.tail(state)
        return (columns[..., self.rows.row] - columns[..., self.rows.less])[..., None]


def tail_readout(module: Any, structure: Any, norm: Norm, rows: Rows) -> LocalReadout:
    """The readout of one score behind a pooler, or of one less another."""
    tail = OwnTail(module, structure, norm.gain)
    if rows.less is None:
        return LocalReadout(norm, tail, rows.row, rows.name)
    return LocalReadout(norm, Difference(tail, rows), 0, rows.name)


class _Given:
    """Where the state to be read stands while the copy runs."""

    state: Tensor | None = None


def _stub(block: nn.Module, given: _Given, n_outputs: int) -> nn.Module:
    """A module with the block's attributes (its kind of attention, say) and none of its parts, giving `given`."""
    stub = copy.copy(block)
    for name in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        stub.__dict__[name] = {}
    stub.__dict__.pop("_hf_hook", None)
    stub.forward = functools.partial(_give, given, n_outputs)
    return stub


def _give(given: _Given, n_outputs: int, *args: Any, **kwargs: Any) -> Any:
    return given.state if n_outputs == 0 else (given.state, *(None,) * (n_outputs - 1))


def _outputs_of(module: Any, last: nn.Module) -> int:
    """How many values the last block gives in a tuple; 0 where it gives a tensor."""
    seen: list[int] = []
    ids = torch.full((1, 2), 1 if module.config.pad_token_id == 0 else 0, device=next(module.parameters()).device)
    note = hooks.Hook(last, "return", lambda out: seen.append(0 if isinstance(out, Tensor) else len(out)))
    with torch.no_grad(), hooks.attached([note]):
        module(input_ids=ids, attention_mask=torch.ones_like(ids))
    return seen[0]
