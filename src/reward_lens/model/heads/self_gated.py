"""Heads whose weights depend on the state that they weigh: URM, and LDL.

    URM   r = sum_k m_k(n) w_k(n)          m: means of the objectives (every other row of `score`), w: a network
    LDL   r = sum_j y_j sum_k w_k(n) p_kj(n)      p: distributions over ten levels y_j from 0 to 1, w: a network

with n = N(h). Nothing is left fixed over inputs, so a direction is local (`heads.local`). The objectives of URM by
themselves are rows of a linear head; those of LDL are expectations of softmaxes, local as well.

References: Lou et al. 2024, arXiv 2410.00847 (URM); the model card of LDL-Reward-Gemma-2-27B-v0.1.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.model.heads.local import LocalReadout, local_readout
from reward_lens.model.heads.names import objectives_of
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.norm import Norm
from reward_lens.model.readout import LinearReadout

LEVELS = 10


class Weights(nn.Module):
    """URM's weights: `fc`, three linear maps with SELUs."""

    def __init__(self, width: int, objectives: int):
        super().__init__()
        maps = (nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, objectives))
        self.fc = nn.Sequential(maps[0], nn.SELU(), maps[1], nn.SELU(), maps[2])

    def forward(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch objective"]:
        return self.fc(states)


class WeighedMeans(nn.Module):
    """URM's head: the reward, then the objectives' means."""

    def __init__(self, score: nn.Module, weights: nn.Module):
        super().__init__()
        self.score, self.weights = score, weights

    def forward(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch column"]:
        means = self.score(states)[..., ::2]  # the odd rows are spreads
        reward = (means * self.weights(states)).sum(-1, keepdim=True)
        return torch.cat([reward, means], -1)


class NormalScore(OwnHead):
    """URM: `score` has a mean and a spread an objective, `weights` weighs the means."""

    head_path = "score"
    first_is_reward = True

    def build(self, config: Any) -> None:
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.weights = Weights(config.hidden_size, config.num_labels // 2)

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("reward", *objectives_of(self.config, self.config.num_labels // 2))

    def columns(self, states: Tensor, ids: Tensor) -> Tensor:
        return WeighedMeans(self.score, self.weights)(states)

    def head_parts(self) -> nn.ModuleList:
        return nn.ModuleList([self.score, self.weights])

    def readout(self, norm: Norm, row: int) -> LocalReadout | LinearReadout:
        if row:
            weight = self.score.weight.detach()[2 * (row - 1)].to(norm.gain)
            return LinearReadout(norm, weight, torch.zeros_like(weight[0]), self.objectives[row])
        return local_readout(norm, WeighedMeans(self.score, self.weights), 0, "reward", "self_gated")


class Network(nn.Module):
    """LDL's maps: `network`, linear maps with leaky ReLUs (the gate's with a place for dropout after each)."""

    def __init__(self, width: int, outputs: int, hidden: int, dropout: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for a in (width, hidden):
            layers += [nn.Linear(a, hidden), nn.LeakyReLU(), *[nn.Identity()] * dropout]
        self.network = nn.Sequential(*layers, nn.Linear(hidden, outputs))

    def forward(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch output"]:
        return self.network(states)


class WeighedLevels(nn.Module):
    """LDL's head: the expected level of the weighed distributions, then each objective's own."""

    def __init__(self, regression: nn.Module, gate: nn.Module, temperature: float | None):
        super().__init__()
        self.regression, self.gate, self.temperature = regression, gate, temperature

    def forward(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch column"]:
        shares = self.regression(states).unflatten(-1, (-1, LEVELS)).softmax(-1)
        expected = shares @ torch.linspace(0, 1, LEVELS, device=shares.device, dtype=shares.dtype)
        weights = self.gate(states)
        if self.temperature is not None:
            weights = (weights / self.temperature).softmax(-1)
        return torch.cat([(weights * expected).sum(-1, keepdim=True), expected], -1)


class LevelScore(OwnHead):
    """LDL: `regression_layer` gives ten levels an objective, `gating_layer` weighs the objectives."""

    head_path = "regression_layer"
    first_is_reward = True
    hidden = 4096

    def build(self, config: Any) -> None:
        hidden = getattr(config, "ldl_hidden_dim", self.hidden)
        self.regression_layer = Network(config.hidden_size, self.n_objectives * LEVELS, hidden, dropout=False)
        self.gating_layer = Network(config.hidden_size, self.n_objectives, hidden, dropout=True)

    @property
    def n_objectives(self) -> int:
        """The published `num_objectives` counts levels: ten an objective."""
        return getattr(self.config, "num_objectives", 220) // LEVELS

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("reward", *objectives_of(self.config, self.n_objectives))

    def _whole(self) -> WeighedLevels:
        softmax = getattr(self.config, "softmax", False)
        temperature = getattr(self.config, "temperature", 1.0) if softmax else None
        return WeighedLevels(self.regression_layer, self.gating_layer, temperature)

    def columns(self, states: Tensor, ids: Tensor) -> Tensor:
        return self._whole()(states)

    def head_parts(self) -> nn.ModuleList:
        return nn.ModuleList([self.regression_layer, self.gating_layer])

    def readout(self, norm: Norm, row: int) -> LocalReadout:
        return local_readout(norm, self._whole(), row, self.objectives[row], "self_gated")
