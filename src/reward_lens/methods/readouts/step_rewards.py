"""What a process reward model gives to every step of a solution: rewards, the lens by depth, and who wrote them.

    reward_t = w . N(h_t) + b            h_t: the pre-norm residual where step t is read
    lens_t,d = w . N(h_t,d) + b          own norm; frozen: N at the scale of h_t
    reward_t = sum_c u_t . c_t + b       u_t: w pulled back through the norm at the scale of h_t; c_t: writes at t

All steps are read in one pass of the whole solution. In a causal network what follows a step changes nothing, so each
is also the reward of the solution cut there (checked); effects at a step are those of the pairs that `step_pairs` cuts.

Rewards are log-odds; sigmoid gives the probability that model cards print. What this cannot show: whether a step is
right, or what it adds: step t's reward is read with all earlier steps in sight, and is no increment.

Reference: Lightman et al. 2023, arXiv 2305.20050; Wang et al. 2023, arXiv 2312.08935 (Math-Shepherd).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr

from reward_lens import stats
from reward_lens.arguments import checked_arguments
from reward_lens.data.solutions import Solution, as_solutions
from reward_lens.engine.activations import Activations
from reward_lens.engine.positions import capture_at
from reward_lens.errors import DataError
from reward_lens.methods.observation.contributions import SPLITS
from reward_lens.methods.observation.splits import component_coords
from reward_lens.methods.shared.prompt_ratios import plain
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.step_scorer import steps_of
from reward_lens.model.step_tokens import SolutionTokens
from reward_lens.result import Check, Result

Norms = Literal["own", "frozen"]
By = Literal["component", "head", "neuron"]
CUT = "solution cut at its steps"


class _Read(NamedTuple):
    solutions: tuple[Solution, ...]
    texts: list[SolutionTokens]
    acts: Activations
    """A run for each step of each solution, in order."""


@checked_arguments
@torch.no_grad()
def step_rewards(rm: RewardModel, solutions, seed: int = 0) -> Result:
    """The reward of every step of every solution, and its aggregates as columns of their own.

    Parameters
    ----------
    rm: built by `step_model`. solutions: `Solution` objects, or (prompt, steps) tuples whose steps are a list of texts
        or one text with the model's separator between them.

    Returns value (solution, step) in log-odds (a value head's own number for one row), padded with NaN past `n_steps`;
    mean and interval over prompts at each step. Coordinates (solution, step): `probability` = sigmoid(value), `text`,
    `position` (token index read); (solution,): `min_log_odds`, `last_log_odds`, `min_probability`,
    `product_probability`, `last_probability`, `prompt_id`, `prompt`, `subset`. None of the aggregates is the reward:
    authors differ in which they use; their means and intervals over prompts are in `meta["aggregates"]`.
    Check: "solution cut at its steps" (the same rewards when nothing follows a step).
    Raises `DataError` for a solution without a boundary and for boundaries inside a token, `StructureError` for a model
    that rewards no steps.
    """
    from scipy.special import expit

    read = _read(rm, solutions, [Site("resid_post", rm.n_layers - 1)])
    reward = rm.readout.reward(read.acts[Site("resid_post", rm.n_layers - 1)]).double().cpu().numpy()
    values = _by_solution(read, reward)
    chance = expit(values)
    lengths = [len(text.positions) for text in read.texts]
    last = np.arange(len(lengths)), np.array(lengths) - 1
    aggregates = {
        "min_log_odds": np.nanmin(values, 1), "last_log_odds": values[last], "min_probability": np.nanmin(chance, 1),
        "product_probability": np.nanprod(chance, 1), "last_probability": chance[last],
    }  # fmt: skip
    columns: dict[str, Any] = {name: ("solution", column) for name, column in aggregates.items()}
    prompts = [s.prompt_key for s in read.solutions]
    limits = {name: (0.0, 1.0) if name.endswith("probability") else (-np.inf, np.inf) for name in aggregates}
    spread = {name: stats.mean_interval(column, prompts, seed=seed, limits=limits[name])
              for name, column in aggregates.items()}  # fmt: skip
    return _result(
        rm, "step_rewards", read, values, (), {"probability": (("solution", "step"), chance)} | columns, seed,
        checks=[_cut(rm, read, reward)], title="Rewards of steps",
        aggregates={name: {key: plain(getattr(over, key)) for key in ("mean", "low", "high")}
                    for name, over in spread.items()},
        shows="The reward a process reward model gives at the end of every step, as log-odds and as a probability.",
        cannot_show="Whether a step is right, or what it adds: each is read with all earlier steps in sight.",
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def step_lens(rm: RewardModel, solutions, norm: Norms = "own", seed: int = 0) -> Result:
    """The reward of every step read off the residual stream at every depth.

    Returns value (solution, step, depth) in log-odds, padded with NaN past `n_steps`; depth 0 = what enters block 0,
    n_layers = the step's reward (check "last depth", E2). norm: "own", or "frozen" at each step's final scale (the
    running sum of contributions). Mean and interval over prompts at each step. Coordinates as `step_rewards`.
    Raises as `step_rewards`, and `DataError` for another norm.
    """
    if norm not in ("own", "frozen"):
        raise DataError("The lens was asked for a norm it does not have", found=repr(norm),
                        expected="'own' or 'frozen'", do="pass one of these")  # fmt: skip
    sites = [Site("embed"), *(Site("resid_post", layer) for layer in range(rm.n_layers))]
    read = _read(rm, solutions, sites)
    final = read.acts[sites[-1]]
    reward, direction = rm.readout.reward(final), rm.readout.direction(final)
    depths = torch.stack([read.acts[site] for site in sites], 1)
    if norm == "own":
        lens = rm.readout.reward(depths)
    else:
        lens = (depths * direction.u[:, None]).sum(-1) + direction.constant[:, None]
    size = (direction.u * final).abs().sum(-1) + direction.constant.abs()
    gap = float(((lens[:, -1] - reward).abs() / size).max())
    return _result(
        rm, "step_lens", read, _by_solution(read, lens.double().cpu().numpy()), ("depth",),
        {"depth": np.arange(rm.n_layers + 1)}, seed, checks=[Check("last depth", gap, _tolerance(rm))],
        title=f"Lens at steps ({norm} norm)", settings={"norm": norm},
        shows="What the head reads at the end of every step at every depth; the last depth is the step's reward.",
        cannot_show="That the reward is computed where a curve settles: the head was trained on the last residual.",
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def step_contributions(rm: RewardModel, solutions, by: By = "component", seed: int = 0) -> Result:
    """The reward of every step split over the components that write to the residual stream where it is read.

    Parameters
    ----------
    by: "component" (embed, L0.attn, L0.mlp, ...), "head" or "neuron", as in `contributions`.

    Returns value (solution, step, component) in log-odds, padded with NaN past `n_steps`; with the row "bias" (and in
    16 bits "rounding") they sum to the step's reward: check "completeness" (E2), and "finer split" (E3) for heads and
    neurons. Mean and interval over prompts at each step. Coordinates as `step_rewards`, and `layer` and `kind`.
    A write at a step's position is made of all earlier tokens; what an earlier step put there is not told apart.
    Raises as `step_rewards`, and `StructureError` if a write cannot be split.
    """
    if by not in SPLITS:
        raise DataError("The split was not understood", found=repr(by), expected=", ".join(map(repr, SPLITS)),
                        do="pass one of these as by=")  # fmt: skip
    split = SPLITS[by](rm)
    read = _read(rm, solutions, split.sites)
    final = read.acts[split.sites[-1]]
    reward, direction = rm.readout.reward(final).double(), rm.readout.direction(final)
    parts = torch.cat([split.dots(read.acts, direction.u), direction.constant[:, None]], 1).double()
    size = parts.abs().sum(1)
    checks = [Check("completeness", float(((parts.sum(1) - reward).abs() / size).max()), _tolerance(rm))]
    if by != "component":
        finer = split.finer_gap(read.acts, direction.u) / size
        checks.append(Check("finer split", float(finer.max()), _tolerance(rm)))
    labels, layers, kinds, _ = split.labels("own")
    return _result(
        rm, "step_contributions", read, _by_solution(read, parts.cpu().numpy()), ("component",),
        component_coords(labels, layers, kinds), seed,
        checks=checks, title=f"Contributions at steps by {by}", settings={"by": by}, exactness=direction.exactness,
        shows="What each part writes along the effective reward direction where a step is read; the rows sum to it.",
        cannot_show="Whether removing a part would change the reward by that much, or which earlier step it read.",
    )  # fmt: skip


def _read(rm: RewardModel, solutions, sites: Sequence[Site]) -> _Read:
    tokenizer = steps_of(rm)
    listed = as_solutions(solutions, tokenizer.form.separator)
    texts = [tokenizer.solution(s.messages, s.steps) for s in listed]
    acts = capture_at(rm, [t.tokens for t in texts], [t.positions for t in texts], sites)
    return _Read(listed, texts, acts)


def _cut(rm: RewardModel, read: _Read, reward: np.ndarray) -> Check:
    """The rewards of one solution's steps (the one with most) when it is cut behind each of them."""
    most = int(np.argmax([len(text.positions) for text in read.texts]))
    start = sum(len(text.positions) for text in read.texts[:most])
    text = read.texts[most]
    alone = rm.rewards([text.tokens.first(p + 1) for p in text.positions]).double().numpy()
    there = reward[start : start + len(alone)]
    gap = float(np.abs(alone - there).max()) / rm.effect_scale(*there.tolist())
    return Check(CUT, gap, 2e-2 if rm.sixteen_bit else 1e-4)


def _by_solution(read: _Read, values: np.ndarray) -> np.ndarray:
    """[solution, step, ...], NaN past a solution's last step."""
    lengths = [len(text.positions) for text in read.texts]
    out = np.full((len(lengths), max(lengths), *values.shape[1:]), np.nan)
    start = 0
    for i, n in enumerate(lengths):
        out[i, :n] = values[start : start + n]
        start += n
    return out


def _result(
    rm: RewardModel, name: str, read: _Read, values: np.ndarray, dims: tuple[str, ...], coords: dict[str, Any],
    seed: int, **meta: Any,
) -> Result:  # fmt: skip
    solutions, lengths = read.solutions, [len(text.positions) for text in read.texts]
    shape = values.shape[:2]
    position, text = np.full(shape, -1), np.full(shape, "", dtype=object)
    for i, (solution, tokens) in enumerate(zip(solutions, read.texts, strict=True)):
        position[i, : lengths[i]] = tokens.positions
        text[i, : lengths[i]] = solution.steps
    words = {
        "solution": [s.id for s in solutions],
        "prompt_id": [s.prompt_key for s in solutions],
        "subset": [s.subset or "" for s in solutions],
        "prompt": [s.messages[-1]["content"] for s in solutions],
    }
    columns = {key: ("solution", np.array([*column, None], dtype=object)[:-1]) for key, column in words.items()}
    both = ("solution", "step")
    value = xr.DataArray(
        values, dims=(*both, *dims),
        coords={**columns, "step": np.arange(shape[1]), "n_steps": ("solution", np.array(lengths)),
                "position": (both, position), "text": (both, text)} | coords,
    )  # fmt: skip
    over = stats.mean_interval(values, words["prompt_id"], seed=seed)
    of_solutions = [key for key, coord in value.coords.items() if "solution" in coord.dims]
    rest = value.drop_vars(of_solutions).isel(solution=0)
    summary = {key: rest.copy(data=np.asarray(getattr(over, key))) for key in ("mean", "low", "high")}
    checks = meta.pop("checks")
    form = steps_of(rm).form
    meta["interval"] = {"level": 0.95, "unit": "prompt", "method": over.method}
    meta["steps"] = {"marker": form.marker, "layout": form.layout, "by_step": form.by_step}
    reason = "solutions have different numbers of steps" if len(set(lengths)) > 1 else None
    return Result(name, value, unit="log-odds", checks=checks, undefined=reason,
                  meta=rm.describe(name, solutions, seed=seed, **meta), **summary)  # fmt: skip


def _tolerance(rm: RewardModel) -> float:
    return 1e-2 if rm.sixteen_bit else 1e-5
