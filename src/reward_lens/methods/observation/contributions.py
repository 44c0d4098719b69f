"""What each part of the network writes along the effective reward direction.

    r = sum_c u . c + b          u = s(h) * centre(gain * w),  b = w . shift + head bias

`c` runs over the vectors written to the residual stream at the reward position: `embed` (what enters block 0), then
each block's attention and MLP write (after any post-norm). Heads, neurons and source tokens are finer splits of the
same writes. The final norm's scale s(h), in sandwich-norm blocks the post-norm's scale, and the weights of a gate that
reads the prompt are frozen at their values in the run; w is the weighted row there, and the slope at the run's state
where the head is a network. A margin is split by

    scale="shared":  margin_c = (u+ + u-)/2 . (c+ - c-),  and one row `norm` = (u+ - u-)/2 . (h+ + h-)
    scale="own":     margin_c = u+ . c+ - u- . c-

which both sum to r+ - r-. In post-norm blocks (BERT) a write is what is left of it behind the norms that follow it,
their scales frozen at the run's own, and the norms' shifts are a row of their own, `shifts` (`model.post_norm`).

What this cannot show: whether a component matters causally. A write also feeds every later component, and the norm's
scale answers to all of them (see `effects`).

Reference: direct logit attribution (Elhage et al. 2021), with the reward head in the place of the unembedding.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import Activations, captured, kept, pairs_of
from reward_lens.errors import DataError
from reward_lens.methods.observation.expert_split import ExpertSplit
from reward_lens.methods.observation.splits import ComponentSplit, HeadSplit, NeuronSplit, Split, component_coords
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.objectives import with_every_objective
from reward_lens.model.readout import LOCAL, Readout
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

By = Literal["component", "head", "neuron", "expert", "token"]
SPLITS: dict[str, Callable[[RewardModel], Split]] = {
    "component": ComponentSplit,
    "head": HeadSplit,
    "neuron": NeuronSplit,
    "expert": ExpertSplit,
}


@checked_arguments
@torch.no_grad()
def contributions(
    rm: RewardModel,
    pairs,
    by: By = "component",
    scale: Literal["shared", "own"] = "shared",
    top: int | None = None,
) -> Result:
    """Split rewards and margins exactly over components, heads, neurons, experts or source tokens.

    Parameters
    ----------
    pairs: preference pairs, or `Activations` of pairs that hold every residual and write (`by="component"`).
    by: "component" (embed, L0.attn, L0.mlp, ...); "head" or "neuron" (attention or MLP writes split further, the other
        write kept whole, as are recurrent mixers beside attention); "expert" (MLP writes of blocks with routed experts
        split further: what each adds, and the rest); "token" (attention writes split over the positions their heads
        read).
    scale: how a margin treats the two runs' different norm scales.
    top: keep only the components largest in mean absolute margin; the others are summed in the row "rest".
        Not for `by="token"`.

    Returns value (pair, side, component) in reward units, with coordinates `layer`, `kind` and `head` on `component`;
    `by="token"` has a further dim `position`. Mean and interval over prompts. Checks: "completeness" (E2), "finer
    split" (E3), "margin split" (E4), and in 16 bits "residual rounding", whose row closes the sum.
    Raises `StructureError` if a write cannot be split (fused experts), `CheckFailed` if the sums do not close.
    """
    _require(by, (*SPLITS, "token"), scale)
    if top is not None and top < 1:
        raise DataError("There are no components to keep", found=f"top={top}", expected="1 or more, or None for all",
                        do="pass top=10, say")  # fmt: skip
    if by == "token":
        if top is not None:
            raise DataError("Source tokens are not cut down to the largest components", found=f"by='token', top={top}",
                            expected="top=None: a margin exists only where both runs have the same tokens",
                            do="leave top out, and take the components you want with .sel")  # fmt: skip
        from reward_lens.methods.observation.source_tokens import source_token_contributions

        return source_token_contributions(rm, pairs, scale)
    split, pairs = SPLITS[by](rm), kept(pairs)
    parts = [
        _of_chunk(rm, rm.readout, rm.readout_inputs(acts.tokens), split, acts, scale)
        for acts in captured(rm, pairs, split.sites)
    ]
    values = np.concatenate([p[0] for p in parts])
    all_pairs = pairs_of(pairs)
    checks = _checks(rm, by, np.stack([p[1] for p in parts]))
    labels, layers, kinds, units = split.labels(scale)
    if top is not None and top < len(labels):
        values, keep = _keep_top(values, top)
        labels, kinds = [*(labels[i] for i in keep), "rest"], [*(kinds[i] for i in keep), "rest"]
        layers, units = [*(layers[i] for i in keep), -1], [*(units[i] for i in keep), -1]
    coords = _coords(by, labels, layers, kinds, units)
    return paired_result(
        rm, "contributions", all_pairs, values, ("pair", "side", "component"), coords,
        checks=checks, title=f"Contributions by {by}", settings={"by": by, "scale": scale, "top": top},
        shows="What each part writes along the effective reward direction; the rows sum to the reward, and their "
        "margins to the margin.",
        cannot_show="Whether removing a part would change the reward by that much: later parts read its write, and the "
        "norm rescales. That is a total effect."
        + (" The weights that the prompt gives the objectives are held." if rm.readout.kind == "prompt_gated" else ""),
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def objective_contributions(
    rm: RewardModel,
    pairs,
    by: Literal["component", "head", "neuron"] = "component",
    scale: Literal["shared", "own"] = "shared",
) -> Result:
    """`contributions` to every objective of a head, the writes captured once.

    Parameters
    ----------
    rm: a model with several objectives: a multi-label head, or ArmoRM, QRM, URM and LDL, whose first one is the gated
        reward; it does not matter for which of them it was loaded.
    by, scale: as in `contributions`.

    Returns value (pair, side, component, objective) in units of each objective's reward; mean and interval over
    prompts. Checks as in `contributions`, the worst objective's. Raises `StructureError` for a head with one objective,
    and what `contributions` raises.
    What it cannot show: how objectives compare, each having its own scale; nor what `contributions` cannot.
    """
    _require(by, ("component", "head", "neuron"), scale)
    rm, readouts = with_every_objective(rm)
    split, pairs = SPLITS[by](rm), kept(pairs)
    values, gaps = [], []
    for acts in captured(rm, pairs, split.sites):
        inputs = rm.readout_inputs(acts.tokens)
        found = [_of_chunk(rm, readout, inputs, split, acts, scale) for readout in readouts.values()]
        values.append(np.stack([part for part, _ in found], -1))
        gaps += [gap for _, gap in found]
    coords = _coords(by, *split.labels(scale)) | {"objective": np.array(list(readouts), dtype=object)}
    local = [name for name, readout in readouts.items() if readout.exactness == "local"]
    return paired_result(
        rm, "objective_contributions", pairs_of(pairs), np.concatenate(values),
        ("pair", "side", "component", "objective"), coords, checks=_checks(rm, by, np.stack(gaps)),
        title=f"Contributions to every objective by {by}", settings={"by": by, "scale": scale}, local_objectives=local,
        shows="What each part writes along the effective direction of every objective.",
        cannot_show="How objectives compare, each having its own scale; nor whether removing a part would change one "
        "by that much." + (" " + LOCAL if local and rm.readout.exactness == "exact" else ""),
    )  # fmt: skip


def _require(by: str, splits: Sequence[str], scale: str) -> None:
    for name, value, allowed in (("by", by, splits), ("scale", scale, ("shared", "own"))):
        if value not in allowed:
            raise DataError(f"Contributions were asked for a {name} that they do not have", found=repr(value),
                            expected=", ".join(map(repr, allowed)), do=f"pass one of these as {name}=")  # fmt: skip


def _checks(rm: RewardModel, by: str, gaps: np.ndarray) -> list[Check]:
    """From [part, check] gaps; NaN: no such check."""
    tolerance = 1e-2 if rm.sixteen_bit else 1e-5
    names = ["completeness", "margin split", *(["residual rounding"] if rm.sixteen_bit else [])]
    names += ["finer split"] if by != "component" else []
    worst = [float(g) for g in gaps.max(0) if not np.isnan(g)]
    return [Check(name, gap, tolerance) for name, gap in zip(names, worst, strict=True)]


def _coords(by: str, labels, layers, kinds, units) -> dict:
    coords = component_coords(labels, layers, kinds)
    return coords | ({by: ("component", np.array(units))} if by in ("head", "neuron", "expert") else {})


def _of_chunk(
    rm: RewardModel, readout: Readout, inputs: Any, split: Split, acts: Activations, scale: str
) -> tuple[np.ndarray, np.ndarray]:
    """[pair, side, component] of one chunk, and its gaps (completeness, margin, rounding, finer; NaN: no check)."""
    h = acts[split.sites[-1]]
    reward, direction = readout.reward(h, inputs), readout.direction(h, inputs)
    other = torch.arange(len(h)).view(-1, 2).flip(1).flatten()  # the same pair's other run
    bias = direction.constant[:, None]
    own = torch.cat([split.dots(acts, direction.u), bias], 1).double()
    total = own.abs().sum(1)
    gaps = [(own.sum(1) - reward.double()).abs() / total]
    plus, minus = own[::2], own[1::2]
    if scale == "own":
        margin = plus - minus
    else:
        cross = torch.cat([split.dots(acts, direction.u[other]), bias[other]], 1).double()
        margin = (plus + cross[::2] - cross[1::2] - minus) / 2
        margin[:, -1] = bias[::2, 0] - bias[1::2, 0]
        norm = ((direction.u[::2] - direction.u[1::2]).double() * (h[::2] + h[1::2]).double()).sum(1, True) / 2
        margin = torch.cat([margin, norm], 1)
        plus, minus = (torch.cat([side, torch.zeros_like(norm)], 1) for side in (plus, minus))
    difference = reward[::2].double() - reward[1::2].double()
    gaps.append((margin.sum(1) - difference).abs() / (total[::2] + total[1::2]))
    rounding = own[:, -2].abs() / total if rm.sixteen_bit else torch.full_like(total, torch.nan)
    gaps += [rounding, split.finer_gap(acts, direction.u) / total]
    worst = [float(g.max()) if not g.isnan().all() else float("nan") for g in gaps]
    return torch.stack([plus, minus, margin], 1).cpu().numpy(), np.array(worst)


def _keep_top(values: np.ndarray, top: int) -> tuple[np.ndarray, list[int]]:
    order = np.argsort(-np.abs(values[:, 2]).mean(0), kind="stable")[:top]
    keep = sorted(order.tolist())
    rest = values.sum(2, keepdims=True) - values[:, :, keep].sum(2, keepdims=True)
    return np.concatenate([values[:, :, keep], rest], axis=2), keep
