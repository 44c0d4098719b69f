"""A reward behind one hidden layer of ReLUs: Linear, ReLU, Linear on the normed residual (Qwen2.5-Math-PRM).

    f(n) = v . relu(A n + a) + c          n = N(h)

With the norm's scale and the units that are on held at h, f is affine in h, and exactly its value there:

    u = pull_back(A^T D v)      r = u . h + (A^T D v) . shift + v . D a + c       D: 1 for the units that are on at h

So contributions sum to the reward, but u is the direction of this input alone ("local").
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.model.checks import run_probe
from reward_lens.model.norm import Norm, measure_norm
from reward_lens.model.readout import Direction, Kind
from reward_lens.model.structure import Structure, find_structure, is_linear
from reward_lens.model.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class HiddenReadout:
    """One output of a hidden layer of ReLUs behind a norm; local."""

    norm: Norm
    hidden: Tensor
    """[unit, d_model] A"""
    hidden_bias: Tensor
    """[unit] a"""
    out: Tensor
    """[unit] v"""
    bias: Tensor
    """scalar c"""
    objective: str = "reward"
    kind: Kind = "mlp"
    exactness: str = "local"

    @property
    def weight(self) -> Tensor:
        """[d_model] NaN in the tail's precision: there is no one row, and what is computed from one must not pass."""
        return torch.full_like(self.norm.gain, torch.nan)

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        return (tokens.reward_pos,)

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs=None) -> Float[Tensor, "*batch"]:
        return torch.relu(self.norm(h) @ self.hidden.T + self.hidden_bias) @ self.out + self.bias

    def direction(self, h: Float[Tensor, "batch d_model"], inputs=None) -> Direction:
        on = (self.norm(h) @ self.hidden.T + self.hidden_bias > 0) * self.out
        slope = on @ self.hidden
        constant = slope @ self.norm.shift + on @ self.hidden_bias + self.bias
        return Direction(self.norm.pull_back(slope, self.norm.scale(h)), constant, "local")


def is_hidden(head: nn.Module) -> bool:
    """Whether a head is Linear, ReLU, Linear."""
    parts = list(head.children()) if isinstance(head, nn.Sequential) else []
    return len(parts) == 3 and is_linear(parts[0]) and isinstance(parts[1], nn.ReLU) and is_linear(parts[2])


def hidden_readout(scorer: Any, score: Any, structure: Structure | None) -> tuple[Structure, HiddenReadout]:
    """The structure and the readout of a network whose `score` is such a head: what its first map reads is what a
    linear head would."""
    device = next(scorer.parameters()).device
    seen: list[Tensor] = []

    def probe() -> Tensor:
        with hooks.attached([hooks.read_output(score[0], seen.append)]):
            run_probe(scorer, device)
        return seen.pop()[:, -1]

    if structure is None:
        config = scorer.config.get_text_config()
        found = find_structure(scorer, probe, config.num_hidden_layers, config.num_attention_heads)
        structure = dataclasses.replace(found, head="score.2")
    final = None if structure.final_norm is None else scorer.get_submodule(structure.final_norm)
    norm = measure_norm(final, score[0].in_features, score[0].weight)
    tensors = (score[0].weight, score[0].bias, score[2].weight[0], score[2].bias[0])
    return structure, HiddenReadout(norm, *(t.detach().to(norm.gain) for t in tensors))
