"""Queries, keys, values and attention patterns, read and changed inside the attention call itself.

The model's attention implementation is never switched. A torch function mode, active during one pass, sees the call
that mixes the values: `scaled_dot_product_attention`, or in eager attention the product of queries and keys and then
that of weights and values. Its tensors are laid out as [row, pos, head, ...], edited like every other site, and put
back. Queries and keys are taken after the rotary embedding, so they belong to their positions; keys and values count
key-value heads, as many as the model caches.

A pattern that is edited mixes the values that are there: z = A v. (Sinks and soft caps are inside the weights.)
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from reward_lens.engine import hooks
from reward_lens.engine.editing import Placed, edited
from reward_lens.errors import StructureError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site

OUTSIDE = -1  # no block that is read or edited is running
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
_BIASED_PRODUCTS = (torch.baddbmm, Tensor.baddbmm)  # Bloom: alibi + q k


class AttentionTap(TorchFunctionMode):
    """Reads and edits of one pass; use `with tap.active():` around a run that carries `tap.hooks()`."""

    def __init__(self, rm: RewardModel, edits: Iterable[Placed] = (), wanted: Iterable[Site] = ()):
        super().__init__()
        self.rm, self.n_kv_heads = rm, rm.n_kv_heads  # measured now: that takes a pass of its own
        self.edits: dict[int, list[Placed]] = {}
        for placed in edits:
            self.edits.setdefault(placed.edit.site.block, []).append(placed)
        self.wanted: dict[int, set[str]] = {}
        for site in wanted:
            self.wanted.setdefault(site.block, set()).add(site.kind)
        self.seen: dict[Site, Tensor] = {}
        """By site without index: [row, pos, head, head_dim], patterns [row, pos, head, key]."""
        self.reached: set[int] = set()
        self._enter(OUTSIDE, None)

    def active(self) -> AbstractContextManager:
        """The context to run in; nothing is intercepted where nothing is read or edited."""
        return self if self.edits or self.wanted else nullcontext()

    def hooks(self) -> list[hooks.Hook]:
        """Hooks that tell the tap which block is running."""
        touched = self.edits.keys() | self.wanted.keys()

        def entering(layer: int):
            def act(args, kwargs):
                self._enter(layer if layer in touched else OUTSIDE, hooks.first_input(args, kwargs))

            return act

        blocks = enumerate(self.rm.trunk.blocks) if touched else ()
        return [hooks.read_call(block, entering(layer)) for layer, block in blocks]

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        missed = (self.edits.keys() | self.wanted.keys()) - self.reached
        if kind is None and missed:
            raise StructureError(
                f"The attention of block {min(missed)} of {self.rm.name} could not be reached",
                found="no call that mixes values with attention weights (a fused kernel or a recurrent mixer)",
                expected="softmax attention through torch's scaled_dot_product_attention or plain products",
                do="load with attn_implementation='sdpa' or 'eager', or use heads instead of queries, keys and values",
            )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._layer == OUTSIDE:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func in _BIASED_PRODUCTS and self._step == 0:
            bias, *operands = *args, *(kwargs[k] for k in ("batch1", "batch2") if k in kwargs)
            rest = {k: v for k, v in kwargs.items() if k not in ("batch1", "batch2")}
            return func(bias, *self._scores(*operands), **rest)
        if func in _PRODUCTS and len(args) == 2 and min(args[0].dim(), args[1].dim()) >= 3:  # no weight matrix
            if self._step == 0:
                return func(*self._scores(*args)) if self._is_scores(*args) else func(*args, **kwargs)
            if self._mixes(*args):
                return self._mixed(func, *args)
            self._refuse_further_terms()
        return func(*args, **kwargs)

    def _enter(self, layer: int, x: Tensor | None) -> None:
        self._layer, self._step, self._keys = layer, 0, 0
        self._rows, self._length = (0, 0) if x is None else (x.shape[0], x.shape[1])

    def _is_scores(self, query: Tensor, keys: Tensor) -> bool:
        """Whether a product has as many queries as attention has heads and positions, and its keys: an indexer's, which
        chooses what attention may read, has others."""
        n = query.numel() // (self._rows * query.shape[-1])
        n_keys = keys.numel() // (self._rows * keys.shape[-1] * keys.shape[-2])
        return n == self.rm.n_heads * self._length and n_keys > 0 and n_keys % self.n_kv_heads == 0

    def _fused(self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
        if self._step:  # what was taken for attention's scores was not: the scores are made in this call
            self._refuse_further_terms()
        q, k, v = self._lay(query), self._lay(key), self._lay(value)
        # One query token a row may be packed as [row, kv_head, heads of its group, head_dim].
        packed = q.shape[1] != self._length
        q = q.transpose(1, 2).reshape(self._rows, self._length, self.rm.n_heads, -1) if packed else q
        new_q, new_k, new_v = self._edit("q", q), self._edit_keys("k", k), self._edit_keys("v", v)
        back = new_q.reshape(self._rows, query.shape[1], query.shape[2], -1) if packed else new_q.transpose(1, 2)
        operands = [
            back.to(query) if new_q is not q else query,
            new_k.transpose(1, 2) if new_k is not k else key,
            new_v.transpose(1, 2) if new_v is not v else value,
        ]
        out = func(*operands, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **rest)
        if self._touches("pattern"):
            weights = self._weights(new_q, new_k, attn_mask, is_causal, scale)
            z = self._lay(out)
            z = z.transpose(1, 2).reshape(self._rows, self._length, self.rm.n_heads, -1) if packed else z
            z = self._edit_pattern(weights, new_v, z)
            out = z.reshape(out.shape) if packed else z.transpose(1, 2)
        self._leave()
        return out

    def _scores(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of the product of queries [.., pos, head_dim] and keys [.., head_dim, key]."""
        self._step = 1
        q, k = self._lay(query), self._lay(keys.transpose(-1, -2))
        self._keys = keys.shape[-1]
        new_q, new_k = self._edit("q", q), self._edit_keys("k", k)
        return (
            new_q.transpose(1, 2).reshape(query.shape) if new_q is not q else query,
            new_k.transpose(1, 2).transpose(-1, -2).reshape(keys.shape) if new_k is not k else keys,
        )

    def _mixes(self, weights: Tensor, values: Tensor) -> bool:
        """Whether a product is that of attention weights and values: as many columns as the scores have keys, none
        negative, rows of at most one. (DeBERTa adds products of queries and keys with positions to its scores.)"""
        if weights.shape[-1] != self._keys or values.shape[-2] != self._keys:
            return False
        return bool(weights.min() >= 0) and bool(weights.sum(-1).max() <= 1 + 3e-2)

    def _refuse_further_terms(self) -> None:
        touched = [kind for kind in ("q", "k") if self._touches(kind)]
        if touched:
            raise StructureError(
                f"The {'queries' if touched[0] == 'q' else 'keys'} of block {self._layer} of {self.rm.name} stand in "
                "more than one product",
                found="a further product like that of queries and keys before the values are mixed (relative "
                "positions, an indexer)",
                expected="scores that are one product of queries and keys",
                do="change values ('v'), attention patterns or heads instead",
            )

    def _mixed(self, func, weights: Tensor, values: Tensor) -> Tensor:
        v = self._lay(values)
        new_v = self._edit_keys("v", v)
        out = func(weights, new_v.transpose(1, 2).reshape(values.shape) if new_v is not v else values)
        if self._touches("pattern"):
            z = self._edit_pattern(self._lay(weights), new_v, self._lay(out))
            out = z.transpose(1, 2).reshape(out.shape)
        self._leave()
        return out

    def _leave(self) -> None:
        self.reached.add(self._layer)
        self._layer = OUTSIDE

    def _lay(self, x: Tensor) -> Tensor:
        """[row, head, pos, d] or [row * head, pos, d] as [row, pos, head, d]."""
        return x.reshape(self._rows, -1, *x.shape[-2:]).transpose(1, 2)

    def _touches(self, kind: str) -> bool:
        return kind in self.wanted.get(self._layer, ()) or bool(self._of(kind))

    def _of(self, kind: str) -> list[Placed]:
        return [p for p in self.edits.get(self._layer, ()) if p.edit.site.kind == kind]

    def _edit(self, kind: str, x: Tensor) -> Tensor:
        """`x` [row, pos, head, d] with the edits of its kind; what was asked for is kept as it was before them."""
        if kind in self.wanted.get(self._layer, ()):
            self.seen[Site(kind, self._layer)] = x[:, -self._length :].clone()
        edits = self._of(kind)
        return edited(x, edits) if edits else x

    def _edit_keys(self, kind: str, x: Tensor) -> Tensor:
        """The same for keys and values, which have a prefix and, repeated, a copy for each head of a group."""
        copies = x.shape[2] // self.n_kv_heads
        single = x[:, :, ::copies]
        if copies > 1 and self._touches(kind) and not torch.equal(single.repeat_interleave(copies, 2), x):
            raise StructureError(
                f"The {'keys' if kind == 'k' else 'values'} of block {self._layer} of {self.rm.name} are not shared as "
                "they are cached",
                found=f"{x.shape[2]} different heads where the cache holds {self.n_kv_heads} (latent attention)",
                expected="key-value heads that are cached as they are, each copied to the heads of its group",
                do="change attention patterns, queries or heads instead",
            )
        before = x.shape[1] - self._length  # positions whose keys and values were reused
        if kind in self.wanted.get(self._layer, ()):
            self.seen[Site(kind, self._layer)] = single[:, -self._length :].clone()
        edits = [p._replace(offset=p.offset + before) for p in self._of(kind)]
        return edited(single, edits).repeat_interleave(copies, 2) if edits else x

    def _weights(self, q: Tensor, k: Tensor, mask, is_causal: bool, scale: float | None) -> Tensor:
        """[row, pos, head, key] of the fused call."""
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        like = self.rm.like.dtype
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(like), k.to(like))
        scores = scores * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
        if is_causal:
            # top-left aligned, as torch defines it; it is only used where queries and keys are as many
            shape = scores.shape[-2:]
            allowed = torch.ones(shape, dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(like)
        return scores.softmax(-1).transpose(1, 2).to(q)

    def _edit_pattern(self, weights: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """The mixed values [row, pos, head, d], made again where the pattern is edited."""
        new = self._edit("pattern", weights)
        if new is weights:
            return z
        v = v.repeat_interleave(new.shape[2] // v.shape[2], 2)
        mixed = torch.einsum("bqhk,bkhd->bqhd", new, v.to(new))
        changed = (new != weights).any(-1, keepdim=True)
        return torch.where(changed, mixed.to(z), z)
