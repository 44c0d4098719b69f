"""Contributions to a reward whose head is not linear, from a stated baseline: integrated over the pooled state.

    r(h) - r(b) = sum_c u . (c - c_b),      u = integral over t of dr/dh at b + t (h - b)

h is the pre-norm residual at the reward position, c the writes that it is the sum of. Two baselines:

    "mean"   b = the mean state of the runs given, c_b the mean writes; the norm is live along the line
    "zero"   the line runs behind the norm, from its shift (a state in which nothing was written) to N(h), with the
             norm's scale held at h; c_b = 0

The local split (`contributions`) is complete by construction: its row "bias" is what the slope at h leaves. Here the
row "baseline" is the reward of a state that is named, and the gap of the sum is measured.

Reference: Sundararajan et al. 2017, arXiv 1703.01365 (integrated gradients).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import captured, kept, pairs_of
from reward_lens.errors import DataError
from reward_lens.methods.observation.splits import ComponentSplit, component_coords
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.model.heads.local import LocalReadout
from reward_lens.model.readout import Direction
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

Baseline = Literal["mean", "zero"]


@checked_arguments
@torch.no_grad()
def integrated_contributions(rm: RewardModel, pairs, baseline: Baseline = "mean", steps: int = 64) -> Result:
    """Split rewards over components from a baseline state, the head's slope averaged on the way to each run's state.

    Parameters
    ----------
    pairs: preference pairs, or `Activations` of pairs that hold every residual and write.
    baseline: "mean" (the mean state and the mean writes of the runs given) or "zero" (nothing written; the norm's scale
        held), see above.
    steps: nodes of the Gauss-Legendre rule along the line.

    Returns value (pair, side, component) in reward units; the rows and "baseline" sum to the reward, up to the rule's
    error. Mean and interval over prompts. Check "completeness": that sum against the reward, over the sum of the rows'
    sizes (1e-2; a head with ReLUs has a slope that jumps along the line, so more steps narrow it slowly). For a linear
    head "zero" gives `contributions` themselves. Raises `DataError` for an unknown baseline or no steps, `CheckFailed`
    where the sum does not close.
    What it cannot show: what removing a component would change; another baseline splits the same reward differently.
    """
    if baseline not in ("mean", "zero") or steps < 1:
        raise DataError("The integration was asked for something it does not have",
                        found=f"baseline={baseline!r}, steps={steps}",
                        expected="baseline 'mean' or 'zero', and at least one step", do="pass these")  # fmt: skip
    split, pairs = ComponentSplit(rm), kept(pairs)
    chunks = list(captured(rm, pairs, split.sites))
    runs = sum(len(acts.tokens) for acts in chunks)
    last = split.sites[-1]
    mean = torch.stack([acts[last].double().sum(0) for acts in chunks]).sum(0) / runs
    mean_parts = torch.stack([split.parts(acts).double().sum(0) for acts in chunks]).sum(0) / runs
    points, weights = np.polynomial.legendre.leggauss(steps)
    rule = ((points + 1) / 2).tolist(), (weights / 2).tolist()
    values, gaps = [], []
    for acts in chunks:
        h, inputs = acts[last], rm.readout_inputs(acts.tokens)
        reward = rm.readout.reward(h, inputs)
        if baseline == "zero":
            direction = _from_nothing(rm, h, inputs, *rule)
            rows = split.dots(acts, direction.u)
        else:
            center = mean.to(h).expand(len(h), -1)
            direction = _from_mean(rm, h, center, inputs, *rule)
            rows = ((split.parts(acts) - mean_parts.to(h)) * direction.u[:, None]).sum(-1)
            if rm.sixteen_bit:  # additions round: what they lost is a row of its own
                lost = ((h - center).double() * direction.u).sum(-1, keepdim=True)
                rows = torch.cat([rows, (lost - rows.double().sum(1, keepdim=True)).to(rows)], 1)
        whole = torch.cat([rows, direction.constant[:, None]], 1).double()
        gaps.append(float(((whole.sum(1) - reward.double()).abs() / whole.abs().sum(1)).max()))
        values.append(margin_of(whole[::2].cpu().numpy(), whole[1::2].cpu().numpy()))
    of = {"baseline_of": data.inputs_hash(pairs_of(pairs))} if baseline == "mean" else {}
    labels, layers, kinds, _ = split.labels("own")
    coords = component_coords([*labels[:-1], "baseline"], layers, [*kinds[:-1], "baseline"])
    return paired_result(
        rm, "integrated_contributions", pairs_of(pairs), np.concatenate(values), ("pair", "side", "component"), coords,
        checks=[Check("completeness", max(gaps), 1e-2, f"{steps} steps; take more of them")],
        title=f"Integrated contributions from the {baseline} state",
        settings={"baseline": baseline, **of, "steps": steps, "quadrature": "Gauss-Legendre"},
        shows="How each part's write moved the reward on the straight way from the baseline to the run's own state.",
        cannot_show="Whether removing a part would change the reward by that much; and another baseline or way splits "
        "the same reward differently.",
    )  # fmt: skip


def _from_nothing(
    rm: RewardModel, h: Tensor, inputs: Tensor | None, nodes: Sequence[float], weights: Sequence[float]
) -> Direction:
    if isinstance(rm.readout, LocalReadout):
        return rm.readout.averaged(h, nodes, weights)
    return rm.readout.direction(h, inputs)  # linear behind the norm: the slope is the same all along


def _from_mean(
    rm: RewardModel, h: Tensor, start: Tensor, inputs: Tensor | None, nodes: Sequence[float], weights: Sequence[float]
) -> Direction:
    slope = torch.zeros_like(h)
    for node, weight in zip(nodes, weights, strict=True):
        with torch.enable_grad():
            at = (start + node * (h - start)).detach().requires_grad_(True)
            (found,) = torch.autograd.grad(rm.readout.reward(at, inputs).sum(), at)
        slope += weight * found
    return Direction(slope, rm.readout.reward(start, inputs), "local")
