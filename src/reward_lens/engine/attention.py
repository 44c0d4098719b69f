"""The attention row of every head at the reward position, recomputed from what the pass itself computed.

The model's attention implementation is never switched. A torch function mode, active during one pass, sees the call
that mixes the values: `scaled_dot_product_attention(q, k, v)` (q and k after the rotary embedding; mask, scale and
causality are its arguments) or, in eager attention, the product of the attention weights with the values (soft caps and
sinks are then inside the weights). From it the row A[s] at the reward position and the values v[s] are kept, and
sum_s A[s] v[s] is held against the z that reached the output map in the same pass: a wrong guess cannot go unnoticed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from reward_lens.engine import hooks
from reward_lens.engine.places import out_map
from reward_lens.errors import StructureError
from reward_lens.model.forward import Batch, at_rows
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens

_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


@dataclasses.dataclass(frozen=True)
class AttentionRow:
    """What one block's heads read at the reward position."""

    weights: Float[Tensor, "batch head source"]
    values: Float[Tensor, "batch head source head_dim"]
    z: Float[Tensor, "batch head head_dim"]
    """The mixed values that reached the output map."""


def attention_rows(
    rm: RewardModel, tokens: Sequence[Tokens]
) -> Iterator[tuple[Batch, list[AttentionRow], list[Tensor]]]:
    """Batches with one `AttentionRow` a layer, and what was written at the reward position: the residual entering
    block 0, then each block's attention and MLP write, then the pre-norm residual."""
    for batch in rm.batches(tokens):
        yield batch, *_pass(rm, batch)


def _pass(rm: RewardModel, batch: Batch) -> tuple[list[AttentionRow], list[Tensor]]:
    recorder = _Recorder()
    rows: list[AttentionRow] = []
    writes: list[Tensor] = []
    pick, like = at_rows(batch.reward_pos), rm.like

    def keep(x: Tensor) -> None:
        writes.append(pick(x).to(like))

    def mixed(x: Tensor) -> None:
        z = pick(x.reshape(*batch.ids.shape, -1)).to(like).unflatten(-1, (rm.n_heads, -1))
        rows.append(_row(rm, len(rows), recorder, batch, z))

    wanted = [rm.trunk.read_residual(0, keep)]
    for layer, block in enumerate(rm.trunk.blocks):
        wanted.append(hooks.read_call(block, lambda args, kwargs: recorder.forget()))
        wanted.append(hooks.read_input(out_map(rm, layer, "attn"), mixed))
        wanted += [rm.trunk.read_write(batch, layer, kind, keep) for kind in ("attn", "mlp")]
    wanted.append(rm.trunk.read_residual(rm.n_layers, keep))
    with recorder:
        rm.trunk.run(batch, *wanted)
    return rows, writes


class _Recorder(TorchFunctionMode):
    """Remembers the last call that could have mixed values."""

    def __init__(self):
        super().__init__()
        self.call: tuple | None = None

    def forget(self) -> None:
        self.call = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.call = ("fused", args, kwargs)
        elif func in _PRODUCTS and len(args) == 2 and args[0].dim() >= 3:
            self.call = ("product", args, kwargs)
        return func(*args, **kwargs)


def _row(rm: RewardModel, layer: int, recorder: _Recorder, batch: Batch, z: Tensor) -> AttentionRow:
    if recorder.call is None:
        raise _unseen(rm, layer, "no attention product was seen in the block (a fused kernel or a recurrent mixer)")
    kind, args, kwargs = recorder.call
    recorder.forget()
    n, heads = batch.ids.shape[0], rm.n_heads
    try:
        if kind == "product":
            weights, values = (t.reshape(n, heads, *t.shape[-2:]) for t in args)
            weights = weights[torch.arange(n), :, batch.reward_pos.to(weights.device)].to(z)
        else:
            weights, values = _fused_row(batch, z, *args, **kwargs)
        values = values.repeat_interleave(heads // values.shape[1], 1).to(z)
        mixed = (weights.unsqueeze(-2) @ values).squeeze(-2)
        gap = float((mixed - z).norm() / z.norm())
    except (RuntimeError, IndexError) as error:
        raise _unseen(rm, layer, f"an attention product of unexpected shape ({error})") from error
    if not gap < (3e-2 if rm.sixteen_bit else 1e-4):
        raise _unseen(rm, layer, f"attention weights times values leave {gap:.1%} of the heads' output unexplained")
    return AttentionRow(weights, values, z)


def _fused_row(
    batch: Batch, like: Tensor, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The softmax row that `scaled_dot_product_attention` computed inside, for the reward position's query."""
    n = query.shape[0]
    rows, position = torch.arange(n, device=query.device), batch.reward_pos.to(query.device)
    q = query[rows, :, position].to(like)  # [batch, head, head_dim]
    k = key.repeat_interleave(query.shape[1] // key.shape[1], 1).to(like)
    scores = (k @ q.unsqueeze(-1)).squeeze(-1) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if is_causal:
        later = torch.arange(k.shape[2], device=k.device) > position.to(k.device)[:, None]
        scores = scores.masked_fill(later[:, None], -torch.inf)
    if attn_mask is not None:
        full = attn_mask.expand(n, attn_mask.shape[1], *attn_mask.shape[2:])
        mask = (full[rows, :, position] if full.shape[2] > 1 else full[:, :, 0]).to(scores.device)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(like)
    return scores.softmax(-1), value


def _unseen(rm: RewardModel, layer: int, found: str) -> StructureError:
    return StructureError(
        f"The attention of block {layer} of {rm.name} could not be read position by position",
        found=found,
        expected="softmax attention whose weights times values are what the output map reads",
        do="load with attn_implementation='sdpa' or 'eager'; gated and recurrent mixers have no source-token split",
    )
