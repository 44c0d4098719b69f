"""A reward head that no longer reads some directions of the residual stream, and what it still gets from them.

The head reads r = w . N(h) + b, with g the norm's gain, C its centring (the identity for RMSNorm), s its scale. With s
held, r = s (g w) . C h + const. For directions v_1 .. v_k in the residual that the final norm reads, let P project on
the span of C v_1 .. C v_k:

    w' = w - alpha P (g w) / g          so  g w' = (I - alpha P) g w,  and  u' . v = (1 - alpha) u . v  at every input

The directions have to be centred as the norm centres them: with P on the v themselves, (I - P) g w is orthogonal to v,
but what a LayerNorm's head reads is C (I - P) g w, which is not. A norm's shift gives w' another constant than w; it is
reported, and cancels in margins. At alpha = 1 the head is blind to the directions while s is held. It is not blind to
them through s: taking a part out of h makes the norm scale up the rest. `edit_report` measures that route.

What this cannot show: that the bias is gone. What the directions carry may also be written along others, and the edit
takes from every text, biased or not.

Reference: for a linear head, the null-space projection of arXiv 2603.03291 and the head edit of arXiv 2606.03131.
"""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import captured
from reward_lens.errors import DataError
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.methods.shared.vectors import unit_vector
from reward_lens.model.head import editable_readout, stored, trunk_name, with_row
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

SPAN_TOLERANCE = 1e-6  # singular value, of the largest, under which a direction adds nothing to the others
GAIN_TOLERANCE = 1e-3  # gain, of the median one, under which w' cannot be told from g w'


@checked_arguments
@torch.no_grad()
def edit_head(rm: RewardModel, directions, alpha: int | float = 1.0) -> RewardModel:
    """The reward model without what its head reads along some directions, the norm's scale held.

    Parameters
    ----------
    directions: [k, d_model] or [d_model], in the residual that the final norm reads; or a Result of `bias_direction` at
        depth n_layers, or several. Only their span counts, so lengths and repetitions do not matter.
    alpha: 0 leaves the head as it is, bit for bit; 1 removes the directions; above 1 turns their effect round.

    Returns a new `RewardModel`; the given one is unchanged, and all weights but the head's are shared. With the scale
    held, adding c v changes its reward by (1 - alpha) times what it changed it before. `edits` has the record: rank of
    the directions, norms of the row, `constant_shift` of every reward (reward units), and `left`, the largest
    |u' . v - (1 - alpha) u . v| / (|u| |v|) that rounding the row to the head's precision leaves.

    Whatever else the texts differ in along the directions goes with them, quality too: see `evaluate_edit`.
    `erase_concept` takes the edit out at the least change of the states: it may cost less where the two overlap, and
    leave more of the property in texts that nobody edited.

    Raises `DataError` for directions that are no directions or that the head cannot read (constant vectors under a
    LayerNorm), for a gain near 0 (under 1e-3 of the median), and where nothing of the reward would be left.
    """
    before = editable_readout(rm)
    if not np.isfinite(alpha):
        raise DataError("There is no such edit", found=f"alpha={alpha}", expected="a finite number", do="use 0 to 2")
    vectors = unit_directions(rm, directions)
    row = edited_row(rm, vectors, alpha)
    kept, gain = stored(rm, row).double().cpu(), before.norm.gain.double().cpu()
    old = before.weight.double().cpu()
    seen = _centred(rm, vectors)
    gap = (seen @ (gain * kept) - (1 - alpha) * (seen @ (gain * old))).abs().max() / (gain * old).norm()
    record = {
        "method": "edit_head",
        "directions": len(vectors),
        "rank": len(_basis(rm, vectors)),
        "alpha": float(alpha),
        "directions_hash": hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:16],
        "constant_shift": float((kept - old) @ before.norm.shift.double().cpu()),
        "left": float(gap),
    }
    return with_row(rm, row, record)


@checked_arguments
@torch.no_grad()
def edit_report(rm: RewardModel, edited: RewardModel, directions, pairs) -> Result:
    """How the reward changes when a direction's component is taken out of the residual, before and after an edit.

    For each unit direction v the residual h that the final norm reads is replaced by h - (v . h) v, and the norm is run
    on it (its scale is live). Route "direct" is that change with the scale held at the run's own, "scale" the rest,
    (s(h') - s(h)) (g w) . C h'; "total" is their sum.

    `rm` is the model before, `edited` the one after; `directions` as in `edit_head`; `pairs` any preference pairs.

    Returns value (pair, side, direction, route, model) in reward units, model = "before", "after"; direction = "1" ..
    "k", and "all" for the whole span at once. Mean and interval over prompts. After `edit_head(rm, directions, 1.0)`
    every "direct" is 0, and "scale" is what remains. Checks: "routes", that the two add up to the total; "same trunk",
    that the edited model's own reward is that of its head on these residuals. Raises `DataError` as `edit_head` does.

    Cannot show what the network does with the direction before the last residual, nor how natural a residual without
    it is.
    """
    pairs = data.as_pairs(pairs)
    vectors = unit_directions(rm, directions)
    heads = [editable_readout(model) for model in (rm, edited)]
    spans = [v[None] for v in vectors] + [_rows_of_span(vectors)]
    site = Site("resid_post", rm.n_layers - 1)
    parts, gaps, trunk_gap = [], [], None
    for acts in captured(rm, pairs, [site]):
        h = acts[site].double()
        trunk_gap = _trunk_gap(edited, pairs, h[:2]) if trunk_gap is None else trunk_gap
        routes = torch.stack([torch.stack([_routes(head, h, span) for span in spans], 1) for head in heads], -1)
        total, direct, by_scale, size = routes.unbind(2)
        gaps.append(float(((total - direct - by_scale).abs() / size).max()))
        values = torch.stack([total, direct, by_scale], 2).numpy()
        parts.append(margin_of(values[::2], values[1::2]))
    tolerance = 1e-2 if rm.sixteen_bit else 1e-4
    checks = [Check("routes", max(gaps), 1e-4), Check("same trunk", trunk_gap or 0.0, tolerance)]
    coords = {
        "direction": np.array([*(str(i + 1) for i in range(len(vectors))), "all"], dtype=object),
        "route": np.array(["total", "direct", "scale"], dtype=object),
        "model": np.array(["before", "after"], dtype=object),
    }
    return paired_result(
        rm, "edit_report", pairs, np.concatenate(parts), ("pair", "side", "direction", "route", "model"), coords,
        checks=checks, title="What a head edit leaves", edited=edited.name, edits=list(edited.edits),
        noise_floor=rm.noise_floor,
        shows="The change of the reward when a direction is taken out of the last residual, before and after the edit, "
        "directly and through the norm's scale.",
        cannot_show="Whether the bias itself is gone: what the direction stands for may also be written along others. "
        "Score edited texts with the edited model for that.",
    )  # fmt: skip


def unit_directions(rm: RewardModel, directions) -> Float[Tensor, "k d_model"]:
    """The directions as rows of length one in float64, checked; Results have to be of this trunk's last residual."""
    if isinstance(directions, Result) or getattr(directions, "ndim", None) == 1:
        directions = [directions]
    if isinstance(directions, Mapping):
        raise _no_direction(rm, f"a mapping of {', '.join(map(repr, list(directions)[:3]))}")
    if not isinstance(directions, Iterable):
        raise _no_direction(rm, f"an object of type {type(directions).__name__}")
    given = list(directions)
    rows = []
    for number, item in enumerate(given, 1):
        source = _vector_of(rm, item) if isinstance(item, Result) else item
        row, wrong = unit_vector(source, rm.d_model)
        if wrong:
            raise _no_direction(rm, f"{wrong} in direction {number}")
        rows.append(row)
    if not rows:
        raise _no_direction(rm, "no directions")
    return torch.stack(rows)


def margins_read(rm: RewardModel, pairs: data.Pairs, read) -> Float[np.ndarray, "pair column"]:
    """Margins of what `read` makes of the last residual, [text, d_model] to [text, column]; a bias cancels."""
    site = Site("resid_post", rm.n_layers - 1)
    found = torch.cat([read(acts[site]).double().cpu() for acts in captured(rm, pairs, [site])]).numpy()
    return found[::2] - found[1::2]


def edited_row(rm: RewardModel, vectors: Float[Tensor, "k d_model"], alpha: int | float) -> Float[Tensor, " d_model"]:
    """w' in float64, before it is rounded to the head's precision."""
    readout = editable_readout(rm)
    gain, weight = readout.norm.gain.double().cpu(), readout.weight.double().cpu()
    least, median = float(gain.abs().min()), float(gain.abs().median())
    if least < GAIN_TOLERANCE * median:
        raise DataError(
            "The final norm's gain is too near 0 for an edit of the head",
            found=f"a gain of {least:.2g} where the median is {median:.2g}",
            expected=f"every gain at least {GAIN_TOLERANCE:g} of the median: the edited row is divided by it",
            do="take the direction out of the residual stream instead (rl.intervene with rl.project_out)",
        )
    basis = _basis(rm, vectors)
    return weight - alpha * (basis.T @ (basis @ (gain * weight))) / gain


def _basis(rm: RewardModel, vectors: Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows that span the directions as the norm centres them."""
    seen = _centred(rm, vectors)
    _, sizes, right = torch.linalg.svd(seen, full_matrices=False)
    # Against the directions before centring: a constant vector leaves rounding errors, which are no direction.
    basis = right[sizes > SPAN_TOLERANCE * torch.linalg.matrix_norm(vectors, 2)]
    if not len(basis):
        raise _no_direction(rm, "constant vectors, which the norm takes out of every residual")
    return basis


def _rows_of_span(vectors: Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    _, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
    return right[sizes > SPAN_TOLERANCE * sizes[0]]


def _centred(rm: RewardModel, vectors: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
    return vectors - vectors.mean(-1, keepdim=True) if editable_readout(rm).norm.centred else vectors


def _routes(head, h: Float[Tensor, "run d_model"], span: Float[Tensor, "rank d_model"]) -> Float[Tensor, "run 4"]:
    """Total change, its direct part, its part through the scale, and the size they are judged by."""
    span = span.to(h.device)
    without = h - (h @ span.T) @ span
    total = (head.reward(without) - head.reward(h)).double()
    scale, new = (head.norm.scale(x).double() for x in (h, without))
    u = head.norm.pull_back(head.weight, torch.ones_like(head.weight[:1])).double()
    direct = (scale * (without - h)) @ u
    by_scale = ((new - scale) * without) @ u
    size = ((scale * h * u).abs() + (new * without * u).abs()).sum(-1) + head.bias.abs().double()
    return torch.stack([total, direct, by_scale, size], -1).cpu()


def _trunk_gap(edited: RewardModel, pairs: data.Pairs, h: Float[Tensor, "two d_model"]) -> float:
    """How far the edited model's own rewards of the first pair are from its head's on the residuals used here."""
    own = edited.rewards(list(edited.tokenize_pairs(pairs[:1])[0])).double()
    here = editable_readout(edited).reward(h).double().cpu()
    return float((own - here).abs().max()) / edited.effect_scale(*own.tolist())


def _vector_of(rm: RewardModel, result: Result) -> np.ndarray:
    depth = result.meta.get("settings", {}).get("depth")
    found = (
        f"a Result of {result.name}" if result.name != "bias_direction"
        else f"a direction at depth {depth}" if depth != rm.n_layers
        else f"a direction of {result.meta['trunk']}" if result.meta["trunk"] != trunk_name(rm)
        else None
    )  # fmt: skip
    if found:
        raise DataError(
            "The head does not read this direction",
            found=found,
            expected=f"a Result of bias_direction at depth {rm.n_layers} (the residual that the final norm reads) of "
            f"{trunk_name(rm)}",
            do="take the direction with depth=None of this model; steer or project_out serve at other depths",
        )
    return result.value.values


def _no_direction(rm: RewardModel, found: str) -> DataError:
    return DataError(
        "There is no direction for the head to forget",
        found=found,
        expected=f"one or more vectors of {rm.d_model} finite numbers, not all zero, that the head can read",
        do="pass directions of the residual stream that the final norm reads, for example rl.bias_direction(rm, pairs)",
    )
