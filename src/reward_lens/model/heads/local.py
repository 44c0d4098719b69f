"""Heads that are no linear map: a network between the final norm and the reward.

    r(h) = f(N(h))          u(h) = pull_back(df/dn at n = N(h))          r = u . h + constant

with the norm's scale held at h, as for a linear head. u changes from input to input, so the affine form is the head's
at this h only ("local"): its `constant` is what u . h leaves of the reward. Where f is made of linear maps and ReLUs
the form is exact until a unit of the head switches on or off.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.model.heads.own import OwnHead, last_attended
from reward_lens.model.norm import Norm, tail_copy
from reward_lens.model.readout import Direction, Exactness, Kind, LinearReadout, Rounding, linear_readout
from reward_lens.model.tokens import Tokenizer, Tokens


@dataclasses.dataclass(frozen=True)
class LocalReadout:
    """One column of a network behind a norm."""

    norm: Norm
    head: nn.Module
    """Maps the normed residual [..., d_model] to [..., column], in the tail's precision."""
    row: int
    objective: str = "reward"
    kind: Kind = "mlp"
    exactness: ClassVar[Exactness] = "local"

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        return (tokens.reward_pos,)

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs: Any = None) -> Float[Tensor, "*batch"]:
        return self.head(self.norm(h))[..., self.row]

    def rounded(self, h: Float[Tensor, "*batch d_model"], inputs: Any, round_to: Rounding) -> Float[Tensor, "*batch"]:
        head = tail_copy(self.head, self.norm.gain.device, round_to.dtype)
        return head(round_to(self.norm(h)))[..., self.row].to(self.norm.gain)

    def direction(self, h: Float[Tensor, "batch d_model"], inputs: Any = None) -> Direction:
        h = h.detach().to(self.norm.gain)
        with torch.enable_grad():
            normed = self.norm(h).detach().requires_grad_(True)
            reward = self.head(normed)[..., self.row]
            (slope,) = torch.autograd.grad(reward.sum(), normed)
        u = self.norm.pull_back(slope, self.norm.scale(h))
        return Direction(u, reward.detach() - (u * h).sum(-1), "local")

    def averaged(
        self, h: Float[Tensor, "batch d_model"], nodes: Sequence[float], weights: Sequence[float]
    ) -> Direction:
        """The slope averaged along the straight line from an empty normed state (the norm's shift) to N(h), at these
        nodes in (0, 1); the constant is the head's value at the beginning of the line."""
        h = h.detach().to(self.norm.gain)
        end, start = self.norm(h).detach(), self.norm.shift.detach()
        slope = torch.zeros_like(end)
        for node, weight in zip(nodes, weights, strict=True):
            with torch.enable_grad():
                at = (start + node * (end - start)).requires_grad_(True)
                (found,) = torch.autograd.grad(self.head(at)[..., self.row].sum(), at)
            slope += weight * found
        beginning = self.head(start)[..., self.row].detach().expand(h.shape[0])
        return Direction(self.norm.pull_back(slope, self.norm.scale(h)), beginning, "local")


def local_readout(norm: Norm, head: nn.Module, row: int, objective: str, kind: Kind = "mlp") -> LocalReadout:
    """A readout with a copy of the head in the norm's precision."""
    return LocalReadout(norm, tail_copy(head, norm.gain.device, norm.gain.dtype), row, objective, kind)


class TwoLayerScore(OwnHead):
    """INF-ORM, Qwen2.5-Math-RM, WorldPM: `score` = Linear, ReLU, Linear."""

    head_path = "score"

    def build(self, config: Any) -> None:
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, self.n_columns)
        )

    def columns(self, states: Tensor, ids: Tensor) -> Tensor:
        return self.score(states)

    def head_parts(self) -> nn.ModuleList:
        return nn.ModuleList([self.score])

    def readout(self, norm: Norm, row: int) -> LocalReadout:
        return local_readout(norm, self.score, row, self.objectives[row])


class OneScore(TwoLayerScore):
    """INF-ORM: one reward, whatever the config's number of labels."""

    @property
    def n_columns(self) -> int:
        return 1


class ValueHead(nn.Module):
    """`summary`: linear, or hidden layers with ReLUs and a linear map, as the config says."""

    def __init__(self, config: Any, linear: bool):
        super().__init__()
        width, layers = config.hidden_size, []
        if linear or getattr(config, "vhead_layer_type", "mlp") == "linear":
            self.summary: nn.Module = nn.Linear(width, 1)
            return
        for _ in range(getattr(config, "vhead_num_layers", 1)):
            layers += [nn.Linear(width, getattr(config, "vhead_num_neurons", 1024)), nn.ReLU()]
            width = layers[-2].out_features
        self.summary = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        return self.summary(states)


class ValueHeadScore(OwnHead):
    """GRM, or TRL's value head, with the text-generation head left out: `v_head.summary`, read at the last position
    that is attended to."""

    head_path = "v_head"
    linear: ClassVar[bool] = False
    """Whether the head is a linear map whatever the config says."""

    def build(self, config: Any) -> None:
        self.v_head = ValueHead(config, self.linear)

    @property
    def n_columns(self) -> int:
        return 1

    def columns(self, states: Tensor, ids: Tensor) -> Tensor:
        return self.v_head(states)

    def head_parts(self) -> nn.Module:
        summary = self.v_head.summary
        return summary if isinstance(summary, nn.Linear) else nn.ModuleList([self.v_head])

    def readout(self, norm: Norm, row: int) -> LocalReadout | LinearReadout:
        if isinstance(self.v_head.summary, nn.Linear):
            return linear_readout(norm, self.v_head.summary, 0, self.objectives[0])
        return local_readout(norm, self.v_head, row, self.objectives[row])

    def read_positions(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return last_attended(ids, mask)

    def tokenizer_for(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None) -> Tokenizer:
        """The last token is read even where it is the padding token's twin (pad == eos)."""
        return Tokenizer(tokenizer, None, max_length)
