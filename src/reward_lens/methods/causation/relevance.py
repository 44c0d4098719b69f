"""Relevance patching: a backward pass that spreads the reward by rules instead of by slopes (RelP).

    norm          its scale is held at its value:             N(x) = gain * centre(x) * s.detach() + shift
    attention     its weights are held:                       z = A.detach() v
    activation    the ratio of output and input is held:      f(x) = x * (f(x) / x).detach()
    gate          f(g) * u shares: each factor gets half of the gradient
    linear map    as it is

Norms are all those of a block, whatever their width. All else keeps its slope: a router's or an output gate's sigmoid,
a recurrent mixer.

The forward pass is the model's own; only what the backward sees changes. So a unit that is saturated still passes on
what it passed forward, where its slope would be zero. What this cannot show: the effect of a change; the rules are
those of the run as it is.

Reference: Rezaei Jafari et al. 2025, arXiv 2508.21258 (RelP); Achtibat et al. 2024, arXiv 2402.05602 (attention).
"""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import activations

from reward_lens.engine import hooks
from reward_lens.engine.gradients import Rules
from reward_lens.errors import StructureError
from reward_lens.model.norm import measure_norm
from reward_lens.model.reward_model import RewardModel

ACTIVATIONS = tuple(
    c for c in (nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, *vars(activations).values())
    if isinstance(c, type) and issubclass(c, nn.Module) and c is not nn.Module
)  # fmt: skip
HELD = "scales of all norms, the final one too; attention weights; ratios of activations; half of a gate's factors"
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)


class RelevanceRules(Rules):
    """The rules for one model: its norms measured, its activations found."""

    def __init__(self, rm: RewardModel):
        self.mode = _Mode()
        blocks = [m for block in rm.trunk.blocks for m in block.modules()]
        self.norms: list[tuple[nn.Module, Any]] = []
        for module in blocks:
            width = _normed_width(module)
            if width is not None:
                with torch.no_grad():
                    self.norms.append((module, measure_norm(module, width, rm.like, "norm of a block")))
        self.activations = [m for m in blocks if isinstance(m, ACTIVATIONS)]
        if not self.activations:
            raise StructureError(
                f"The rules of relevance patching do not fit {rm.name}",
                found="blocks without an activation module (a fused kernel or a function)",
                expected="an activation module in every MLP",
                do="use estimator='gradient' or 'integrated'",
            )

    def hooks(self, rm: RewardModel) -> list[hooks.Hook]:
        made = []
        for module, norm in self.norms:
            made += _held(module, lambda x, y, norm=norm: norm.frozen(x, norm.scale(x.detach())))
        for module in self.activations:
            made += _held(module, _ratio, self.mode.remember)
        return made

    def active(self) -> AbstractContextManager:
        return self.mode


class _Mode(TorchFunctionMode):
    """Attention weights without a gradient, and the half rule where an activation's output is multiplied."""

    def __init__(self):
        super().__init__()
        self.activated: Tensor | None = None

    def remember(self, output: Tensor) -> None:
        """The output of an activation, which a gate may multiply next."""
        self.activated = output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, *rest = args
            return func(query.detach(), key.detach(), *rest, **kwargs)
        if func in (functional.softmax, torch.softmax, Tensor.softmax):
            return func(*args, **kwargs).detach()
        if func in _PRODUCTS and self.activated is not None and len(args) == 2:
            a, b = args
            if isinstance(b, Tensor) and (a is self.activated or b is self.activated) and a.shape == b.shape:
                self.activated = None
                return (a * b.detach() + a.detach() * b) * 0.5
        return func(*args, **kwargs)


def _normed_width(module: nn.Module) -> int | None:
    """Width of the vectors that a norm takes; None for what is no norm, and for one with a weight a head (of queries
    and keys, which have no gradient here) or with a second input (a recurrent mixer's gate)."""
    if "Norm" not in type(module).__name__ or len(inspect.signature(module.forward).parameters) != 1:
        return None
    weight = getattr(module, "weight", None)
    shape = weight.shape if isinstance(weight, Tensor) else getattr(module, "normalized_shape", ())
    return shape[0] if len(shape) == 1 else None


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x times the ratio of output to input, held; zero where the input is."""
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return x * torch.where(x == 0, torch.zeros_like(x), y / safe).detach()


def _held(module: nn.Module, rule, tell=None) -> list[hooks.Hook]:
    """Hooks that give the module's output the gradient of `rule(input, output)`, and its own value."""
    seen: list[Tensor] = []

    def out(y: Tensor) -> Tensor:
        linear = rule(seen.pop(), y.detach()).to(y)
        new = linear + (y.detach() - linear.detach())
        if tell is not None:
            tell(new)
        return new

    return [hooks.read_input(module, lambda x: seen.append(x)), hooks.edit_output(module, out)]
