"""Does taking one bias out of the head change another? Biases by the directions that are taken out.

    T_ij = mean over the pairs of set j of   margin after the operation on direction i  -  margin before

    null    the head's row without direction i, the norm's scale held: the row of `edit_head(rm, v_i, alpha)`
    steer   h -> h + strength |h| v_i in both texts' last residual, the norm live

A margin of set j is r(edited) - r(original), so its mean is bias j and T_ij / bias j the share by which it changes; -1
says that it is gone. The states that the head reads depend on neither row nor direction, so every text runs once.

The diagonal is the positive control: what is done to direction i has to change bias i. Where the interval of T_ii holds
0, the rest of row i says nothing: an operation without effect has no side effects either.

Both texts are steered alike, so with the scale held their changes would cancel in the margin; what steering shows at
the last residual is what the norm makes of it, and is of second order.

What this cannot show: that two biases share a cause. Directions that overlap change each other's biases by geometry
alone, and what an edit writes along other directions is not touched.

Sources: the null-space projection of arXiv 2603.03291 and the head edit of arXiv 2606.03131, evaluated on every axis as
arXiv 2605.27996 asks. The matrix, its control and its intervals are ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.repair.head_editing import edited_row, margins_read, unit_directions
from reward_lens.methods.shared.prompt_ratios import prompt_ratio
from reward_lens.model.head import editable_readout, stored
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import pair_coords
from reward_lens.result import Check, Result

OPS = ("null", "steer")


@checked_arguments
@torch.no_grad()
def transfer_matrix(
    rm: RewardModel,
    directions,
    pair_sets,
    op: str = "null",
    alpha: int | float = 1.0,
    strength: int | float = 0.1,
    seed: int = 0,
) -> Result:
    """Change of every bias when the head loses, or the residual is moved along, one direction at a time.

    Parameters
    ----------
    directions: {name: Result of `bias_direction` at depth n_layers, or a vector [d_model] of the last residual}.
    pair_sets: {name: pairs whose chosen response is the edited one}, at least 6 prompts each. A direction and a set of
        one name belong together; at least one name has to be in both.
    op: "null" or "steer" (see above).
    alpha: of "null", as in `edit_head`; 0 changes nothing.
    strength: of "steer", in norms of the run's own last residual.

    Returns value (pair, direction) in reward units, the change of each pair's margin; the coordinates `pair_set` and
    `margin` (before) on `pair`. Mean and interval over prompts are (direction, bias), with the coordinates, where the
    last three are on `bias`:

    - `share`, `share_low`, `share_high` (Fieller): the mean over bias j before; NaN where bias j's interval holds 0.
    - `p` (sign flips of the prompts' mean changes) and `p_holm`, over the cells off the diagonal.
    - `flagged`: 1 where the row has no positive control, so that its other cells say nothing.
    - `shared_prompts`: prompts that the direction was taken from and that the set has too.
    - `before`, `before_low`, `before_high`: the biases as they are.

    `meta["control"]` has by direction the diagonal's `value`, `low`, `high`, and `present`, with `reason` in words. The
    check "prompts in a direction and a set" counts what `shared_prompts` does: there the effect is too good.
    Raises `DataError` under 6 prompts a set, for no name in common, and as `edit_head` does. It cannot show effects on
    biases that have no set here.
    """
    if op not in OPS or not np.isfinite([alpha, strength]).all():
        raise DataError(
            "The operation was not understood",
            found=f"op={op!r}, alpha={alpha}, strength={strength}",
            expected="op 'null' or 'steer', and finite numbers",
            do="correct these; the defaults are a good start",
        )
    given, sets = _named(directions, "directions"), _sets(pair_sets)
    names, biases = list(given), list(sets)
    _require_control(names, biases)
    vectors = torch.cat([unit_directions(rm, v if isinstance(v, Result) else _one(n, v)) for n, v in given.items()])
    changed = _nulled(rm, vectors, alpha) if op == "null" else _steered(rm, vectors, strength)
    margins = {name: margins_read(rm, pairs, changed) for name, pairs in sets.items()}
    changes = {name: m[:, 1:] - m[:, :1] for name, m in margins.items()}
    cells, before = _cells(sets, changes, {name: m[:, 0] for name, m in margins.items()}, rm.noise_floor, seed)
    diagonal = np.array([[i == j for j in biases] for i in names])
    cells["p_holm"] = stats.adjust(np.where(diagonal, np.nan, cells["p"]))
    control = _control(names, biases, cells, rm.noise_floor)
    cells["flagged"] = np.repeat([[int(not control[n]["present"])] for n in names], len(biases), axis=1)
    used = [set(v.meta.get("prompts", ())) if isinstance(v, Result) else set() for v in given.values()]
    cells["shared_prompts"] = np.array([[len(u & {p.prompt_key for p in s}) for s in sets.values()] for u in used])
    together = data.Pairs([p for pairs in sets.values() for p in pairs])
    labels: dict[str, Any] = {
        "direction": np.array(names, dtype=object), "bias": np.array(biases, dtype=object),
        **{name: (("direction", "bias"), cell) for name, cell in cells.items()
           if name not in ("mean", "low", "high")},
        **{name: ("bias", column) for name, column in before.items()},
    }  # fmt: skip
    of_pair = {
        **pair_coords(together), "direction": labels["direction"],
        "pair_set": ("pair", np.array([name for name, pairs in sets.items() for _ in pairs], dtype=object)),
        "margin": ("pair", np.concatenate([m[:, 0] for m in margins.values()])),
    }  # fmt: skip
    value = xr.DataArray(np.concatenate(list(changes.values())), dims=("pair", "direction"), coords=of_pair)
    mean, low, high = (
        xr.DataArray(cells[key], dims=("direction", "bias"), coords=labels) for key in ("mean", "low", "high")
    )
    seen = int(cells["shared_prompts"].sum())
    undefined = int(np.isnan(cells["share"]).sum())
    checks = [
        Check("prompts in a direction and a set", float(seen), np.inf,
              "the effect of a direction on the prompts it was taken from is too good" if seen else ""),
        Check("biases too near 0 for a share", float(undefined), np.inf,
              "cells whose bias before has an interval that holds 0" if undefined else ""),
    ]  # fmt: skip
    missing = [name for name in names if not control[name]["present"]]
    meta = rm.describe(
        "transfer_matrix", together, seed=seed, title="Transfer between biases",
        settings={"op": op, "alpha": float(alpha)} if op == "null" else {"op": op, "strength": float(strength)},
        interval={"level": 0.95, "unit": "prompt", "method": "stats.mean_interval; shares: Fieller"},
        n={name: {"n_pairs": len(p), "n_prompts": p.n_prompts} for name, p in sets.items()},
        positive_control="the diagonal: a direction's effect on the bias of its own name", control=control,
        noise_floor=rm.noise_floor,
        shows="The change of each bias's mean margin when the head loses one direction"
        + (" (rows)." if op == "null" else ", or the last residual is moved along it (rows)."),
        cannot_show="That two biases share a cause: overlapping directions do this by geometry. Rows without a "
        f"positive control say nothing off the diagonal; here: {', '.join(missing) if missing else 'none'}.",
    )  # fmt: skip
    return Result("transfer_matrix", value, unit="reward", checks=checks, meta=meta, mean=mean, low=low, high=high)


def _nulled(rm: RewardModel, vectors: Float[torch.Tensor, "k d_model"], alpha: int | float):
    """Rewards of states by the head as it is and without each direction, rounded as the edited head would hold it."""
    readout = editable_readout(rm)
    rows = torch.stack([readout.weight, *(stored(rm, edited_row(rm, v[None], alpha)) for v in vectors)])
    return lambda h: readout.norm(h) @ rows.T


def _steered(rm: RewardModel, vectors: Float[torch.Tensor, "k d_model"], strength: int | float):
    """Rewards of states as they are and moved along each direction."""
    readout = rm.readout

    def rewards(h):
        steps = strength * h.norm(dim=-1, keepdim=True)
        moved = [h, *(h + steps * v.to(h) for v in vectors)]
        return torch.stack([readout.reward(x) for x in moved], -1)

    return rewards


def _cells(sets, changes, margins, floor: float, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Columns (direction, bias) and those of `bias`; to the tests a change under the floor is none."""
    cells: dict[str, list] = {k: [] for k in ("mean", "low", "high", "share", "share_low", "share_high", "p")}
    before: dict[str, list] = {k: [] for k in ("before", "before_low", "before_high")}
    for name, pairs in sets.items():
        keys, change = [p.prompt_key for p in pairs], changes[name]
        over, was = stats.mean_interval(change, keys, seed=seed), stats.mean_interval(margins[name], keys, seed=seed)
        for key in ("mean", "low", "high"):
            cells[key].append(getattr(over, key))
        for key, end in zip(before, (was.mean, was.low, was.high), strict=True):
            before[key].append(end)
        defined = was.low > 0 or was.high < 0
        shares = prompt_ratio(change, margins[name], keys)
        for key, column in zip(("share", "share_low", "share_high"), shares, strict=True):
            cells[key].append(column if defined else np.full(len(column), np.nan))
        heard = np.where(np.abs(change) > floor, change, 0.0)  # rounding has a sign too
        cells["p"].append([stats.sign_flip_test(c, keys, seed=seed).p for c in heard.T])
    return {k: np.stack(v, axis=1) for k, v in cells.items()}, {k: np.array(v, float) for k, v in before.items()}


def _control(
    names: list[str], biases: list[str], cells: dict[str, np.ndarray], floor: float
) -> dict[str, dict[str, Any]]:
    out = {}
    for i, name in enumerate(names):
        if name not in biases:
            out[name] = {"value": None, "low": None, "high": None, "present": False,
                         "reason": "no set of pairs has this name"}  # fmt: skip
            continue
        value, low, high = (float(cells[key][i, biases.index(name)]) for key in ("mean", "low", "high"))
        present = (low > 0 or high < 0) and abs(value) > floor
        word = "is under the noise floor" if low > 0 or high < 0 else "holds 0"
        reason = "" if present else f"the interval of its own bias's change, {low:.3g} to {high:.3g}, {word}"
        out[name] = {"value": value, "low": low, "high": high, "present": present, "reason": reason}
    return out


def _named(given, what: str) -> dict[str, Any]:
    if isinstance(given, Mapping) and given and all(isinstance(name, str) for name in given):
        return dict(given)
    raise DataError(f"The {what} have no names", found=f"{type(given).__name__} {given!r:.60}",
                    expected="a dict {name: ...} with at least one entry",
                    do="name them; a direction and a set of one name belong together")  # fmt: skip


def _sets(pair_sets) -> dict[str, data.Pairs]:
    sets = {name: data.as_pairs(pairs) for name, pairs in _named(pair_sets, "pair_sets").items()}
    few = {name: pairs.n_prompts for name, pairs in sets.items() if pairs.n_prompts < stats.FEWEST}
    if few:
        raise DataError(
            "There are too few prompts for a transfer matrix",
            found=", ".join(f"{n} in the set {name!r}" for name, n in few.items()),
            expected=f"at least {stats.FEWEST} different prompts a set: under that there is no interval",
            do="edit responses to more prompts; a hundred a set are usual",
        )
    return sets


def _require_control(names: list[str], biases: list[str]) -> None:
    if not set(names) & set(biases):
        raise DataError(
            "There is no positive control",
            found=f"directions {', '.join(names)}; sets {', '.join(biases)}",
            expected="at least one name in both: its cell shows that the operation does anything",
            do="name the edited pairs of a direction as the direction",
        )


def _one(name: str, vector):
    """A vector by itself: rows of several would become directions without a name."""
    if getattr(vector, "ndim", None) == 1:
        return vector
    raise DataError(f"The direction {name!r} is not one vector", found=f"{type(vector).__name__} {vector!r:.60}",
                    expected="a Result of bias_direction or a vector [d_model]", do="name each one")  # fmt: skip
