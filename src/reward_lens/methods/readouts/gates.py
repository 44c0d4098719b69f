"""What a prompt-gated head weighs its objectives with, and what in the prompt set the weights.

    r(x) = sum_k g_k (own . M)_k = sum_j (M g)_j own_j         own: the objectives' rewards, M: the published transform

`gate_weights` gives g (of the transformed objectives) and M g (of the objectives themselves) for each prompt.
`gate_attribution` splits each weight over what was written at the position where the gate is read, h_p:

    g_k = u_k . h_p + constant_k        u_k: the slope of the gate's k-th weight at h_p, pulled back through the norm

with the norm's scale held. The gate is a network, so u_k is local: its slope at this prompt.

What a change of the prompt does to the reward through the gate, and past it, is `gate_routes`.

Reference: Wang et al. 2024, arXiv 2406.12845.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import capture
from reward_lens.errors import DataError
from reward_lens.methods.observation.source_tokens import placed, source_runs
from reward_lens.methods.observation.splits import ComponentSplit, HeadSplit, component_coords
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.heads.gated import GatedReadout, require_gated
from reward_lens.model.heads.local import LocalReadout
from reward_lens.model.readout import LOCAL
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

AT_ONCE = 64  # prompts whose writes are held together


@checked_arguments
@torch.no_grad()
def gate_weights(rm: RewardModel, pairs) -> Result:
    """The weights that a prompt gives to the objectives of a gated head.

    Parameters
    ----------
    rm: a model whose readout is prompt-gated (ArmoRM, QRM), loaded for its reward.
    pairs: preference pairs; a weight depends on what is read up to the gate's position alone, the prompt.

    Returns value (pair, objective, weight) in units of reward per unit of an objective's reward; weight = "transformed"
    (what the gate gives, g) and "own" (M g: of the objectives before the transform). Mean and interval over prompts.
    Check "weighted sum": the objectives' rewards times their own weights are both responses' rewards (1e-5 of the sum
    of their sizes; 1e-2 in 16 bits). Raises `StructureError` for a head without a prompt gate, `DataError` for a pair
    whose responses have different weights (one repeats the tokens that end a user turn, or truncation cut the prompts).
    What it cannot show: how far an objective moves the margin, which depends on how its reward differs as well.
    """
    readout = require_gated(rm.readout)
    pairs = data.as_pairs(pairs)
    both = [t for two in rm.tokenize_pairs(pairs) for t in two]
    _prompts(readout, pairs, both)
    last = Site("resid_post", rm.n_layers - 1)
    h, inputs = capture(rm, both, [last])[last], rm.readout_inputs(both)
    assert inputs is not None
    transformed = readout.weights(inputs)
    own = transformed @ readout.matrix.T
    parts = (readout.norm(h) @ readout.own.T * own).double()
    gap = (parts.sum(1) - readout.reward(h, inputs).double()).abs() / parts.abs().sum(1)
    values = torch.stack([transformed, own], -1)[::2].double().cpu().numpy()
    coords = {
        "objective": np.array(readout.objectives, dtype=object),
        "weight": np.array(["transformed", "own"], dtype=object),
    }
    return paired_result(
        rm, "gate_weights", pairs, values, ("pair", "objective", "weight"), coords, unit="weight",
        checks=[Check("weighted sum", float(gap.max()), 1e-2 if rm.sixteen_bit else 1e-5)],
        title="Weights of the objectives", settings={"pattern": list(readout.pattern)},
        shows="How much of each objective's reward the prompt lets into the gated reward.",
        cannot_show="How far an objective moves a margin: that is its weight times the difference of its rewards.",
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def gate_attribution(rm: RewardModel, pairs, by: Literal["component", "token"] = "component") -> Result:
    """Which components, or which tokens of the prompt, set the weights of a gated head.

    Parameters
    ----------
    rm: a model whose readout is prompt-gated, loaded for its reward.
    pairs: preference pairs; every prompt is run once, to the position where its gate is read.
    by: "component" (embed, L0.attn, ...; the row "bias" is the constant), or "token" (attention's writes at the gate's
        position, split over the positions its heads read; everything else stands at the gate's position).

    Returns value (pair, objective, component), or (pair, objective, position) with coordinates `constant` (what no
    position wrote), `token`, `piece` and `n_positions`; both in the unit of a weight, and both sum to g (by token: with
    the constant). Mean and interval over prompts by component. Checks "completeness" and, by token, "finer split":
    1e-5 of the sum of sizes, 1e-2 in 16 bits. Raises as `gate_weights`.
    What it cannot show: what a weight would be without a component (`gate_routes` takes it out); the gate is a network,
    and its slope is local.
    """
    readout = require_gated(rm.readout)
    if by not in ("component", "token"):
        raise DataError("The attribution was asked for something it does not have", found=f"by={by!r}",
                        expected="'component' or 'token'", do="pass one of these")  # fmt: skip
    pairs = data.as_pairs(pairs)
    beginnings = _prompts(readout, pairs, [t for two in rm.tokenize_pairs(pairs) for t in two])
    different = {t.ids: t for t in beginnings}
    place = {ids: i for i, ids in enumerate(different)}
    where = [place[t.ids] for t in beginnings]
    weights = [
        LocalReadout(readout.norm, readout.gate, k, name, "self_gated") for k, name in enumerate(readout.objectives)
    ]
    found = _by_component if by == "component" else _by_token
    values, coords, gaps = found(rm, list(different.values()), weights)
    tolerance = 1e-2 if rm.sixteen_bit else 1e-5
    coords = {name: (dims, of[where]) if dims[0] == "pair" else (dims, of) for name, (dims, of) in coords.items()}
    last = "component" if by == "component" else "position"
    return paired_result(
        rm, "gate_attribution", pairs, values[where], ("pair", "objective", last),
        {"objective": np.array(readout.objectives, dtype=object), **coords}, unit="weight",
        checks=[Check(name, gap, tolerance) for name, gap in gaps.items()], interval=by == "component",
        title=f"What set the weights, by {by}", settings={"by": by, "pattern": list(readout.pattern)},
        shows="What was written at the gate's position along the slope of each objective's weight.",
        cannot_show="What the weight would be if a part were not there: later parts read its write. " + LOCAL,
    )  # fmt: skip


def _prompts(readout: GatedReadout, pairs: data.Pairs, both: Sequence[Tokens]) -> list[Tokens]:
    """What the gate reads of each pair, which both responses have to share."""
    chosen, rejected = ([t.first(readout.gate_position(t) + 1) for t in both[side::2]] for side in (0, 1))
    for pair, a, b in zip(pairs, chosen, rejected, strict=True):
        if a.ids != b.ids:
            raise DataError(
                f"The two responses of pair {pair.id} are read with different weights",
                found=f"a gate that reads {len(a)} tokens of the chosen conversation and {len(b)} of the rejected one",
                expected="one prompt: the gate reads where the tokens that end a user turn stand last",
                do="leave out pairs with a response that repeats these tokens; shorten prompts that truncation cuts",
            )
    return chosen


def _by_component(rm: RewardModel, texts: Sequence[Tokens], weights: Sequence[LocalReadout]):
    split = ComponentSplit(rm)
    parts, gaps = [], [0.0]
    for start in range(0, len(texts), AT_ONCE):
        acts = capture(rm, texts[start : start + AT_ONCE], split.sites)
        h = acts[split.sites[-1]]
        rows = []
        for weight in weights:
            direction = weight.direction(h)
            row = torch.cat([split.dots(acts, direction.u), direction.constant[:, None]], 1).double()
            gaps.append(float(((row.sum(1) - weight.reward(h).double()).abs() / row.abs().sum(1)).max()))
            rows.append(row)
        parts.append(torch.stack(rows, 1).cpu().numpy())
    labels, layers, kinds, _ = split.labels("own")
    return np.concatenate(parts), component_coords(labels, layers, kinds), {"completeness": max(gaps)}


def _by_token(rm: RewardModel, texts: Sequence[Tokens], weights: Sequence[LocalReadout]):
    split, longest = HeadSplit(rm), max(map(len, texts))
    values = np.full((len(texts), len(weights), longest), np.nan)
    constants = np.zeros((len(texts), len(weights)))
    gaps = []
    for k, weight in enumerate(weights):
        for i, text in enumerate(texts):
            (run,) = source_runs(rm, split, [text], weight)
            parts = run.parts(run.direction.u)
            *rows, constant = placed(parts, text.reward_pos, len(text))
            values[i, k, : len(text)] = np.sum(rows, 0)
            constants[i, k] = constant.sum()
            gaps.append(run.gaps(*parts)[:2])
    ids = np.full((len(texts), longest), -1)
    pieces = np.full((len(texts), longest), "", dtype=object)
    for i, text in enumerate(texts):
        ids[i, : len(text)], pieces[i, : len(text)] = text.ids, text.pieces
    coords = {
        "position": (("position",), np.arange(longest)),
        "n_positions": (("pair",), np.array([len(t) for t in texts])),
        "constant": (("pair", "objective"), constants),
        "token": (("pair", "position"), ids),
        "piece": (("pair", "position"), pieces),
    }
    whole, finer = np.max(gaps, axis=0)
    return values, coords, {"completeness": float(whole), "finer split": float(finer)}
