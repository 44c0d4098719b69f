"""How a reward is read off the pre-norm residual stream: the protocol every kind of head keeps, and the linear head.

Linear head:  r = w . N(h) + b  with N the final norm. With the norm's scale s(h) frozen,
    u(h) = s(h) * centre(gain * w)      and      r = u(h) . h + (w . shift + b)
exactly, so u (the effective direction) is the axis on which every write to the residual stream is measured.

Kinds: linear, vocabulary (rows of an unembedding), prompt_gated (direction depends on the prompt, exact), self_gated
and mlp (local gradient), log_ratio (summed over positions). Only the linear kind is built here; the protocol is what
the methods rely on, so the others join without a change to them.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from reward_lens.model.norm import Norm
from reward_lens.model.tokens import Tokens

Kind = Literal["linear", "vocabulary", "prompt_gated", "self_gated", "mlp", "log_ratio"]


class Direction(NamedTuple):
    """The affine form of the reward at one input: r = u . h + constant."""

    u: Tensor
    """[batch, d_model] effective direction."""
    constant: Tensor
    """[batch] what does not depend on h."""
    exactness: Literal["exact", "local"]
    """"exact": r equals u . h + constant. "local": the gradient's affine form at this h."""


@runtime_checkable
class Readout(Protocol):
    """What a method may ask of a reward head."""

    kind: Kind
    objective: str

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        """Positions the head reads: one for most, several for process rewards and log-ratios."""
        ...

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs=None) -> Float[Tensor, "*batch"]:
        """Reward of pre-norm residuals; `inputs` carries what a gate reads, and is unused by an ungated head."""
        ...

    def direction(self, h: Float[Tensor, "batch d_model"], inputs=None) -> Direction:
        """Effective direction at each row of `h`, with the norm's scale (and any gate) frozen there."""
        ...


@dataclasses.dataclass(frozen=True)
class LinearReadout:
    """One row of a linear head behind a norm; exact."""

    norm: Norm
    weight: Tensor
    """[d_model] in the tail's precision."""
    bias: Tensor
    """scalar"""
    objective: str = "reward"
    """Name of the row, for multi-label heads."""
    kind: Kind = "linear"

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        return (tokens.reward_pos,)

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs=None) -> Float[Tensor, "*batch"]:
        return self.norm(h) @ self.weight + self.bias

    def frozen_reward(self, h: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*rows 1"]) -> Tensor:
        """Reward of `h` with the norm's scale held at `scale`."""
        return self.norm.frozen(h, scale) @ self.weight + self.bias

    def direction(self, h: Float[Tensor, "batch d_model"], inputs=None) -> Direction:
        u = self.norm.pull_back(self.weight, self.norm.scale(h))
        constant = self.weight @ self.norm.shift + self.bias
        return Direction(u, constant.expand(h.shape[0]), "exact")


def linear_readout(norm: Norm, head, objective: int, name: str) -> LinearReadout:
    """The `objective`-th row of a linear head module, in the norm's precision."""
    from reward_lens.model.structure import linear_bias, linear_weight

    weight = linear_weight(head)[objective].detach().to(norm.gain)
    bias = linear_bias(head)
    bias = norm.gain.new_zeros(()) if bias is None else bias[objective].detach().to(norm.gain)
    return LinearReadout(norm, weight, bias, name)


def objective_names(config, n_rows: int) -> tuple[str, ...]:
    """Names of a head's rows: the checkpoint's labels, or "0", "1", ... ; one row is called "reward"."""
    if n_rows == 1:
        return ("reward",)
    labels = getattr(config, "id2label", None) or {}
    return tuple(str(labels.get(i, labels.get(str(i), i))) for i in range(n_rows))
