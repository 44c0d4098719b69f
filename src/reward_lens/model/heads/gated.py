"""Heads whose objectives are weighed by a gate that reads the prompt: ArmoRM and QRM.

    r(x) = sum_k g_k (M' R)_k . N(h) = w . N(h)        w(prompt) = sum_k g_k (M' R)_k,   g = gate(N(h_p))

R has a row an objective (QRM: the mean of its quantiles' rows), M is the `reward_transform_matrix`, h the residual at
the reward position and h_p the one at the token that ends the last user turn. What stands there depends on the prompt
alone (unless a response repeats the tokens that end a user turn: their last place is read, as published), so for one
prompt the reward is an exact linear read-out of h. An objective by itself has no gate.

References: Wang et al. 2024, arXiv 2406.12845 (ArmoRM); Dorka 2024, arXiv 2409.10164 (QRM).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.errors import DataError, StructureError
from reward_lens.model.heads.names import objectives_of
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.norm import Norm, tail_copy
from reward_lens.model.readout import Direction, Exactness, Kind, LinearReadout, Rounding
from reward_lens.model.tokens import Tokens

USER_TURN_ENDS = {
    "llama": (128009, 128006, 78191, 128007, 271),  # <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n
}
"""By model type, the tokens between a user turn and the response; the gate is read at the first of them. A checkpoint
of another vocabulary says it in its config as `gating_token_pattern`."""


@dataclasses.dataclass(frozen=True)
class GatedReadout:
    """The gated sum of several rows behind a norm; exact for each prompt."""

    norm: Norm
    rows: Float[Tensor, "objective d_model"]
    """Of the objectives after the transform."""
    own: Float[Tensor, "objective d_model"]
    """Before it."""
    matrix: Float[Tensor, "objective objective"]
    """The transform: rows = matrix' own."""
    gate: nn.Module
    """Maps the normed residual [..., d_model] at the gate's position to the weights [..., objective]."""
    pattern: tuple[int, ...]
    objectives: tuple[str, ...]
    objective: str = "reward"
    kind: Kind = "prompt_gated"
    exactness: ClassVar[Exactness] = "exact"

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        return (tokens.reward_pos,)

    def gate_position(self, tokens: Tokens) -> int:
        """Where the last user turn ends; raises `DataError` for a text without one."""
        return gate_place(tokens.ids, self.pattern)

    def weights(self, inputs: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch objective"]:
        """g: the weights of the transformed objectives."""
        return self.gate(self.norm(inputs))

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs: Any = None) -> Float[Tensor, "*batch"]:
        return (self.norm(h) * (self.weights(self._given(inputs)) @ self.rows)).sum(-1)

    def rounded(self, h: Float[Tensor, "*batch d_model"], inputs: Any, round_to: Rounding) -> Float[Tensor, "*batch"]:
        gate = tail_copy(self.gate, self.norm.gain.device, round_to.dtype)
        weights = gate(round_to(self.norm(self._given(inputs))))
        own, matrix = (x.to(round_to.dtype) for x in (self.own, self.matrix))
        return (weights * (round_to(self.norm(h)) @ own.T @ matrix)).sum(-1).to(self.norm.gain)

    def direction(self, h: Float[Tensor, "batch d_model"], inputs: Any = None) -> Direction:
        w = self.weights(self._given(inputs)) @ self.rows
        u = self.norm.pull_back(w, self.norm.scale(h))
        return Direction(u, (w @ self.norm.shift).expand(h.shape[0]), "exact")

    def _given(self, inputs: Any) -> Tensor:
        if inputs is None:
            raise StructureError(
                "The weights of this reward depend on the prompt, and this method reads the response's state alone",
                found="a prompt-gated head and no state of the prompt",
                expected="a method that hands on the gate's state: scores, lens, contributions, effects, interventions",
                do=f"load one objective, whose row is fixed: objective={self.objectives[0]!r}",
            )
        return inputs


class Gate(nn.Module):
    """ArmoRM's: linear maps with ReLUs between them, a softmax with a temperature, and a factor."""

    def __init__(self, width: int, objectives: int, hidden: int, depth: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(self.stacked(width, objectives, hidden, depth))

    def stacked(self, width: int, objectives: int, hidden: int, depth: int) -> list[nn.Module]:
        """The layers in their published order."""
        widths = [width, *[hidden] * depth, objectives]
        return [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]

    def logits(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row objective"]:
        """What the softmax is taken of, temperature apart."""
        *before, last = self.layers
        for layer in before:
            x = layer(x).relu()
        return last(x)

    def forward(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch objective"]:
        logits = self.logits(states.reshape(-1, states.shape[-1])) / self.temperature
        return (logits.softmax(-1) * self.logit_scale[0]).reshape(*states.shape[:-1], -1)


class NormedGate(Gate):
    """QRM's: linear maps without bias, each with a ReLU and a batch norm (at its kept statistics) behind it."""

    def stacked(self, width: int, objectives: int, hidden: int, depth: int) -> list[nn.Module]:
        widths = [width, *[hidden] * depth]
        pairs = zip(widths, widths[1:], strict=False)
        layers: list[nn.Module] = []
        for a, b in pairs:
            layers += [nn.Linear(a, b, bias=False), nn.ReLU(), nn.BatchNorm1d(b)]
        return [*layers, nn.Linear(widths[-1], objectives)]

    def logits(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row objective"]:
        for layer in self.layers:
            x = layer(x)
        return x


class GatedRows(OwnHead):
    """ArmoRM: `regression_layer`, `reward_transform_matrix` and `gating`; the columns are the gated reward and then the
    objectives before the transform."""

    head_path = "regression_layer"
    first_is_reward = True
    gate: ClassVar[type[Gate]] = Gate

    def build(self, config: Any) -> None:
        n = self.n_objectives
        self.regression_layer = nn.Linear(config.hidden_size, n * self.n_quantiles, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(n), requires_grad=False)
        hidden, depth = getattr(config, "gating_hidden_dim", 1024), getattr(config, "gating_n_hidden", 3)
        self.gating = self.gate(config.hidden_size, n, hidden, depth, getattr(config, "gating_temperature", 10))

    @property
    def n_objectives(self) -> int:
        """Rows of the head, quantiles counted once."""
        return getattr(self.config, "num_objectives", 19)

    @property
    def n_quantiles(self) -> int:
        """Rows an objective."""
        return 1

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("reward", *objectives_of(self.config, self.n_objectives))

    @property
    def pattern(self) -> tuple[int, ...]:
        """Tokens between a user turn and the response."""
        named = getattr(self.config, "gating_token_pattern", None) or USER_TURN_ENDS.get(self.config.model_type)
        if named is None:
            raise StructureError(
                "Where the gate of this head is read is not known",
                found=f"model type {self.config.model_type!r} and no gating_token_pattern in the config",
                expected="the tokens of the template between a user turn and the response",
                do="add gating_token_pattern, a list of token ids, to config.json",
            )
        return tuple(named)

    @property
    def probe_ending(self) -> tuple[int, ...]:
        return self.pattern

    def expected(self, values: Float[Tensor, "*batch row"]) -> Float[Tensor, "*batch objective"]:
        """The objectives of the regression's outputs: means over quantiles."""
        return values.unflatten(-1, (self.n_objectives, self.n_quantiles)).mean(-1)

    def columns(self, states: Tensor, ids: Tensor) -> Tensor:
        own = self.expected(self.regression_layer(states))
        transformed = own @ self.reward_transform_matrix
        places = [gate_place(row, self.pattern) for row in ids.tolist()]
        weights = self.gating(states[torch.arange(len(ids)), places])
        reward = (weights[:, None] * transformed).sum(-1, keepdim=True)
        return torch.cat([reward, self.shown(own, transformed)], -1)

    def shown(self, own: Tensor, transformed: Tensor) -> Tensor:
        """What is published as the objectives' rewards."""
        return own

    def head_parts(self) -> nn.ModuleList:
        return nn.ModuleList([self.regression_layer, self.gating, nn.ParameterList([self.reward_transform_matrix])])

    def readout(self, norm: Norm, row: int) -> GatedReadout | LinearReadout:
        matrix = self.reward_transform_matrix.detach().to(norm.gain)
        own = self.expected(self.regression_layer.weight.detach().to(norm.gain).T).T
        transformed = matrix.T @ own
        if row:
            weight = self.shown(own.T, transformed.T).T[row - 1]
            return LinearReadout(norm, weight, torch.zeros_like(weight[0]), self.objectives[row])
        gate = tail_copy(self.gating, norm.gain.device, norm.gain.dtype)
        return GatedReadout(norm, transformed, own, matrix, gate, self.pattern, self.objectives[1:])


class GatedQuantiles(GatedRows):
    """QRM: a row for every quantile of every objective; the objectives' rewards are means, after the transform."""

    gate = NormedGate

    @property
    def n_quantiles(self) -> int:
        return self.config.num_quantiles

    def shown(self, own: Tensor, transformed: Tensor) -> Tensor:
        return transformed


def require_gated(readout: Any) -> GatedReadout:
    """The readout, if its weights are set by the prompt; a `StructureError` otherwise."""
    if isinstance(readout, GatedReadout):
        return readout
    raise StructureError(
        "This reward has no gate that reads the prompt",
        found=f"a readout of kind {readout.kind!r} for the objective {readout.objective!r}",
        expected="a prompt-gated head (ArmoRM, QRM), loaded without objective=",
        do="load the model without objective=, or ask contributions and effects what an ungated head reads",
    )


def gate_place(ids: Sequence[int], pattern: tuple[int, ...]) -> int:
    """Where the pattern begins for the last time; raises `DataError` if it does not occur."""
    for at in range(len(ids) - len(pattern), -1, -1):
        if tuple(ids[at : at + len(pattern)]) == pattern:
            return at
    raise DataError(
        "The end of the user turn was not found, where this head reads what weighs its objectives",
        found=f"a text without the tokens {list(pattern)}",
        expected="a conversation in the template that the model was trained with",
        do="pass a prompt and a response (not a raw text) of which truncation leaves the end of the user turn, and use "
        "the model's own tokenizer and template",
    )
