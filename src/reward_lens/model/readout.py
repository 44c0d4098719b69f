"""How a reward is read off the pre-norm residual stream: the protocol every kind of head keeps, and the linear head.

Linear head:  r = w . N(h) + b  with N the final norm. With the norm's scale s(h) frozen,
    u(h) = s(h) * centre(gain * w)      and      r = u(h) . h + (w . shift + b)
exactly, so u (the effective direction) is the axis on which every write to the residual stream is measured.

Kinds: linear, vocabulary (rows of an unembedding), prompt_gated (direction depends on the prompt, exact), self_gated
and mlp (local gradient), log_ratio (summed over positions). The linear kind is built here, those of the published
heads in `model.heads`; the protocol is what the methods rely on, so the others join without a change to them.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.errors import LoadError, StructureError
from reward_lens.model.norm import Norm
from reward_lens.model.tokens import Tokens

Kind = Literal["linear", "vocabulary", "prompt_gated", "self_gated", "mlp", "log_ratio"]
Exactness = Literal["exact", "local"]
LOCAL = (
    "The head is not linear in the residual stream: a direction is its gradient at each run's own state, with the norm "
    "held, and the row 'bias' is what that leaves of the reward."
)
"""What a result says of a readout whose directions are local."""


class Direction(NamedTuple):
    """The affine form of the reward at one input: r = u . h + constant."""

    u: Tensor
    """[batch, d_model] effective direction."""
    constant: Tensor
    """[batch] what does not depend on h."""
    exactness: Exactness
    """"exact": r is u . h + constant, the same u for every h whose norm has this scale. "local": u is the gradient
    behind the norm at this h, and constant is what it leaves of r."""


@runtime_checkable
class Readout(Protocol):
    """What a method may ask of a reward head."""

    @property
    def kind(self) -> Kind:
        """Of the head: see the module's docstring."""
        ...

    @property
    def objective(self) -> str:
        """Name of what is read."""
        ...

    exactness: ClassVar[Exactness]
    """Whether a direction is the same wherever the norm's scale (and the gate) is, or the head's slope at one h."""

    @property
    def norm(self) -> Norm:
        """The norm in front of the head."""
        ...

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        """Positions the head reads: one for most, several for process rewards and log-ratios."""
        ...

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs=None) -> Float[Tensor, "*batch"]:
        """Reward of pre-norm residuals; `inputs` carries what a gate reads, and is unused by an ungated head."""
        ...

    def direction(self, h: Float[Tensor, "batch d_model"], inputs=None) -> Direction:
        """Effective direction at each row of `h`, with the norm's scale (and any gate) frozen there."""
        ...


@runtime_checkable
class PromptGated(Protocol):
    """A head whose weights depend on the prompt: `inputs` of its `reward` and `direction` is the pre-norm residual at
    the gate's position, which `RewardModel.readout_inputs` gives."""

    def gate_position(self, tokens: Tokens) -> int:
        """Position whose residual sets the weights."""
        ...


class Rounding:
    """Rounding twice to the nearest in 16 bits, as a norm does: each number moves by at most one step."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, normed: Tensor) -> Tensor:
        step = torch.finfo(self.dtype).eps
        moved = (2 * torch.rand(normed.shape, generator=self.generator) - 1) * step
        return (normed.float() * (1 + moved.to(normed.device))).to(self.dtype)


@runtime_checkable
class RunsANetwork(Protocol):
    """A head with more than one map, whose values round between the maps in the wrapped model's precision."""

    def rounded(self, h: Float[Tensor, "*batch d_model"], inputs: Any, round_to: Rounding) -> Float[Tensor, "*batch"]:
        """The reward with the norm's output and the head in `round_to.dtype`."""
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
    exactness: ClassVar[Exactness] = "exact"

    def pool(self, tokens: Tokens) -> tuple[int, ...]:
        return (tokens.reward_pos,)

    def reward(self, h: Float[Tensor, "*batch d_model"], inputs=None) -> Float[Tensor, "*batch"]:
        return self.norm(h) @ self.weight + self.bias

    def direction(self, h: Float[Tensor, "batch d_model"], inputs=None) -> Direction:
        u = self.norm.pull_back(self.weight, self.norm.scale(h))
        constant = self.weight @ self.norm.shift + self.bias
        return Direction(u, constant.expand(h.shape[0]), "exact")


def read_size(readout: Readout, h: Float[Tensor, "batch d_model"], inputs: Any = None) -> Float[Tensor, " batch"]:
    """Sizes of what the head sums at each row (not of the sum, which may be near zero): the scale of E2."""
    direction = readout.direction(h, inputs)
    return (direction.u * h.to(direction.u)).abs().sum(-1) + direction.constant.abs()


def require_linear(readout: Any, question: str) -> LinearReadout:
    """The readout, if one row reads every input; a `StructureError` that names the question otherwise."""
    if isinstance(readout, LinearReadout):
        return readout
    raise StructureError(
        f"{question} has no answer for this reward head",
        found=f"a readout of kind {readout.kind!r}, whose direction depends on the input",
        expected="one row of a linear head, the same for every input",
        do="ask reward_lens, contributions or effects, which take the direction at each run; a head with several "
        "objectives has a row of its own for each (objective=)",
    )


def linear_readout(norm: Norm, head, row: int, name: str, less: int | None = None) -> LinearReadout:
    """One row of a linear head module, or one row less another, in the norm's precision."""
    from reward_lens.model.linear_maps import linear_bias, linear_weight

    def of(table: Tensor) -> Tensor:
        rows = table.detach().to(norm.gain)
        return rows[row] if less is None else rows[row] - rows[less]

    bias = linear_bias(head)
    return LinearReadout(norm, of(linear_weight(head)), norm.gain.new_zeros(()) if bias is None else of(bias), name)


def objective_names(config, n_rows: int) -> tuple[str, ...]:
    """Names of a head's rows: the checkpoint's labels, or "0", "1", ... where it has none that tell them apart; one row
    is called "reward"."""
    if n_rows == 1:
        return ("reward",)
    labels = getattr(config, "id2label", None) or {}
    names = tuple(str(labels.get(i, labels.get(str(i), i))) for i in range(n_rows))
    return names if len(set(names)) == n_rows else tuple(map(str, range(n_rows)))


class Rows(NamedTuple):
    """What of a head with several rows is the reward: one, or one less another."""

    row: int
    less: int | None
    name: str


LESS = " - "
"""Stands between the names of two rows whose difference is the reward."""


def chosen_rows(names: tuple[str, ...], objective: str | int | None, model: str) -> Rows:
    """The rows that `objective` names: one by name or index, or the difference of two, "A - B". Raises `LoadError` for
    none of several, and for one that is not there."""
    if objective is None and len(names) > 1:
        raise LoadError(
            f"The head of {model} has {len(names)} rows and none was chosen",
            found="objective=None; rows " + ", ".join(names),
            expected="the name or index of one row (a mean over rows is no reward the model was trained for), or the "
            f"difference of two, 'A{LESS}B': the log-odds of label A against B for a head trained with cross-entropy",
            do=f"pass objective={names[0]!r}, or another row, or objective={names[1] + LESS + names[0]!r}",
        )
    row = 0 if objective is None else _index(names, objective)
    if row is not None:
        return Rows(row, None, names[row])
    found = _differences(names, objective)
    if len(found) == 1:
        ((row, less),) = found
        by_name, by_index = (f"{a}{LESS}{b}" for a, b in ((names[row], names[less]), (row, less)))
        name = by_name if by_name not in names and _differences(names, by_name) == found else by_index
        return Rows(row, less, name)
    ways = f", of which {objective!r} may be {len(found)} differences" if found else ""
    raise LoadError(
        f"The head of {model} has no row {objective!r}",
        found="rows " + ", ".join(names) + ways,
        expected=f"one of these names or its index, or the difference of two, 'A{LESS}B'",
        do=f"name rows by their indices, as in '1{LESS}0'" if found else "correct objective=",
    )


def _differences(names: tuple[str, ...], objective: Any) -> list[tuple[int, int]]:
    """The pairs of rows that "A - B" may mean; several where names hold the sign themselves."""
    parts = objective.split(LESS) if isinstance(objective, str) else []
    cuts = [[_index(names, LESS.join(some)) for some in (parts[:i], parts[i:])] for i in range(1, len(parts))]
    return [(row, less) for row, less in cuts if row is not None and less is not None and row != less]


def _index(names: tuple[str, ...], objective: str | int) -> int | None:
    """Index of the row of that name or number; None where there is none."""
    if objective in names:
        return names.index(objective)
    if isinstance(objective, str) and objective.isdecimal():
        objective = int(objective)  # an index in the words of a command line
    if not isinstance(objective, int) or isinstance(objective, bool):  # True names no row
        return None
    return objective % len(names) if -len(names) <= objective < len(names) else None
