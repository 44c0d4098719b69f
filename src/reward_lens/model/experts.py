"""Routed experts of a block: found by how they are called, and proven to be a weighted sum.

    experts(x [token, d_model], which [token, k], weights [token, k])  =  sum_k weights_k E_{which_k}(x)

No names are asked: a module inside a block that takes a float matrix, a matrix of whole numbers and a float matrix of
the latter's shape is put to the proof that its output is the sum of what it gives for each choice alone. Experts whose
weights multiply what they read (so that parts do not add up in the weights) are none in this sense.

Reference: Shazeer et al. 2017, arXiv 1701.06538.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reward_lens.engine import hooks

ACCEPT = 1e-3  # largest share of the experts' output that their parts may leave unexplained (16 bits: 2e-2)


class Call(NamedTuple):
    """What a module of experts was called with."""

    x: Tensor
    """[token, d_model]"""
    which: Tensor
    """[token, k] numbers of the chosen experts."""
    weights: Tensor
    """[token, k]"""


@dataclasses.dataclass(frozen=True)
class Experts:
    """The routed experts of one block."""

    module: nn.Module
    n: int
    """Number of experts."""

    def dense(self, call: Call) -> Tensor:
        """Weights of all experts, [token, n], zero where an expert is not chosen."""
        out = call.weights.new_zeros(len(call.x), self.n + 1)  # some classes number "none" as n
        return out.scatter_add(1, call.which.long().clamp(max=self.n), call.weights)[:, : self.n]

    def called(self, args: tuple, kwargs: dict, weights: Tensor) -> tuple[tuple, dict]:
        """The arguments with other weights [token, n]; the choices that were made keep their places, further experts
        with weight come behind them."""
        call = call_of(args, kwargs)
        assert call is not None
        index = call.which.long().clamp(max=self.n - 1)
        kept = weights.gather(1, index) * (call.which < self.n)
        left = weights.scatter(1, index, 0.0)
        more = int((left != 0).sum(1).max())
        extra = (left != 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :more]
        which = torch.cat([call.which, extra.to(call.which)], 1)
        new = torch.cat([kept, left.gather(1, extra)], 1).to(call.weights)
        place = {id(call.which): which, id(call.weights): new}
        return tuple(place.get(id(a), a) for a in args), {k: place.get(id(a), a) for k, a in kwargs.items()}

    def parts(self, x: Tensor, weights: Tensor) -> Tensor:
        """What each expert adds, weights included: [token, n, d_model] of x [token, d_model], weights [token, n]."""
        out = x.new_zeros(len(x), self.n, x.shape[1])
        for expert in weights.any(0).nonzero()[:, 0].tolist():
            which = torch.full((len(x), 1), expert, dtype=torch.long, device=x.device)
            one = self.module.forward(x, which, weights[:, expert, None])  # past the hooks: those of this call run
            out[:, expert] = one.reshape(x.shape)
        return out


def call_of(args: tuple, kwargs: dict) -> Call | None:
    """The tensors of a call of experts; None for any other call."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() in (2, 3)]
    floats = [a for a in tensors if a.is_floating_point()]
    whole = [a for a in tensors if not a.is_floating_point() and a.dtype != torch.bool]
    if len(floats) != 2 or len(whole) != 1 or whole[0].dim() != 2 or floats[1].shape != whole[0].shape:
        return None
    x = floats[0].reshape(-1, floats[0].shape[-1])
    return Call(x, whole[0], floats[1]) if len(x) == len(whole[0]) else None


@torch.no_grad()
def find_experts(blocks: list[nn.Module], run: Any) -> tuple[Experts | None, ...]:
    """The experts of every block, None where it has none; `run(hooks)` runs some text with hooks."""
    seen: dict[int, tuple[nn.Module, Call, Tensor]] = {}

    def watching(layer: int, module: nn.Module) -> Iterator[hooks.Hook]:
        box: list[Call | None] = []

        def after(output: Any) -> None:
            call = box.pop()
            if call is not None and isinstance(output, Tensor) and output.numel() == call.x.numel():
                seen[layer] = (module, call, output.reshape(call.x.shape).clone())

        yield hooks.read_call(module, lambda args, kwargs: box.append(call_of(args, kwargs)))
        yield hooks.Hook(module, "return", after)

    run([hook for layer, block in enumerate(blocks) for m in block.modules() for hook in watching(layer, m)])
    return tuple(_proven(*seen[layer]) if layer in seen else None for layer in range(len(blocks)))


def _proven(module: nn.Module, call: Call, output: Tensor) -> Experts | None:
    stacked = [p.shape[0] for p in module.parameters() if p.dim() == 3]
    listed = [len(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    named = [n for m in module.modules() if isinstance(n := getattr(m, "num_experts", None), int)]
    n = max(stacked or listed or named or [0])
    if n <= int(call.which.max()):
        return None
    experts = Experts(module, n)
    gap = unexplained(experts.parts(call.x, experts.dense(call)), output)
    return experts if gap < accepted(output) else None


def unexplained(parts: Tensor, output: Tensor) -> float:
    """Share of the experts' output [.., d_model] that the sum of parts [.., n, d_model] leaves."""
    return float((parts.double().sum(-2) - output.double()).norm() / output.double().norm().clamp_min(1e-30))


def accepted(output: Tensor) -> float:
    """The largest such share at the output's precision."""
    return 2e-2 if output.dtype in (torch.bfloat16, torch.float16) else ACCEPT
