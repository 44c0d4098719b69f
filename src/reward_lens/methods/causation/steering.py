"""Dose and response of a direction: add it to the residual stream and see what the reward does.

    x_t  ->  x_t + s * n * v        at every steered position t of the residual entering block `depth`
    n = mean over these positions of |x_t| in the run itself (unit="resid_norm"), or 1 (unit="absolute"); |v| = 1

The reward is recomputed from there on; nothing is frozen. The slope is the least-squares line of the reward on the
strength s, one a pair and side. `nulls` random directions v = X' z / |X' z| (z normal, X the centred residuals of all
steered positions of these pairs) have the covariance of natural states, and the same norm: an isotropic direction
would lie where the network hardly ever goes and make any vector look strong.

What this cannot show: that the network uses this direction (it answers to any large enough push, hence the nulls), nor
a response that is not monotonic, which a slope hides: look at the curve. A steered state need not be a natural one.

Reference: Turner et al. 2023, arXiv 2308.10248 (activation addition); Sofroniew et al. 2026, transformer-circuits
(strengths in residual norms).
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import capture, positions_of
from reward_lens.engine.editing import Edit
from reward_lens.engine.intervention import add
from reward_lens.engine.patching import patch_rows
from reward_lens.errors import DataError
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.methods.shared.vectors import unit_vector
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import SIDES
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

UNITS = ("resid_norm", "absolute")


@checked_arguments
@torch.no_grad()
def steer(
    rm: RewardModel,
    pairs,
    vector,
    strengths: Sequence[int | float] = (-0.1, -0.05, 0.0, 0.05, 0.1),
    depth: int | None = None,
    unit: Literal["resid_norm", "absolute"] = "resid_norm",
    at: Literal["final", "response", "all"] = "response",
    nulls: int = 0,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Rewards of both responses as a vector is added to the residual stream at several strengths.

    Parameters
    ----------
    vector: [d_model], as a list, an array, a tensor or the Result of `bias_direction`; only its direction counts.
    strengths: at least two different ones, none twice; at 0 the reward is exactly the clean one.
    depth: the block whose input is changed, 0 to n_layers (then what the final norm reads). None: two thirds.
    unit: "resid_norm": of the mean norm of the run's own residuals there; "absolute": in the residual's own unit.
    at: "final" (the reward position), "response" (its first token through the reward position) or "all".
    nulls: number of random directions of the natural covariance to hold the slopes against.
    max_rows: changed runs walking at once.

    Returns value (pair, side, strength) in reward units; mean and interval over prompts. Coordinates `slope`
    (pair, side), reward per unit of strength, and `norm` (pair, side), n above. In `meta`: `slope` by side with its
    interval; with nulls, `nulls` has by side the mean slope of each, `quantile` of the observed mean among them
    (ties half), and p = (1 + #{|null| >= |observed|}) / (1 + nulls). Check "clean row" as in `effects`.
    Raises `DataError` for a vector of the wrong width, of zeros or not finite.
    """
    pairs = data.as_pairs(pairs)
    depth = round(2 * rm.n_layers / 3) if depth is None else depth
    direction = _direction(vector, rm.d_model)
    doses = checked_doses(rm, strengths, depth, unit, at, nulls)
    site = Site("resid_post", rm.n_layers - 1) if depth == rm.n_layers else Site("resid_pre", depth)
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    acts = capture(rm, pairs, [site], at)[site]
    states = [x.double().reshape(-1, rm.d_model).cpu() for x in acts]
    norms = np.array([float(x.norm(dim=1).mean()) if unit == "resid_norm" else 1.0 for x in states])
    directions = torch.cat([direction[None], natural_directions(torch.cat(states), nulls, seed)])
    clean = rm.rewards(tokens).double().numpy()
    rewards = np.empty((len(tokens), len(directions), len(doses)))
    gaps = []
    for i, text in enumerate(tokens):
        changes, gap = responses(rm, text, site, norms[i] * directions, doses, at, clean[i], max_rows)
        rewards[i] = clean[i] + changes
        gaps.append(gap)
    sided = margin_of(rewards[::2], rewards[1::2])  # [pair, side, direction, strength]
    slopes = line_slopes(sided, doses)
    of_pair = np.stack([norms[::2], norms[1::2], np.full(len(pairs), np.nan)], 1)
    coords = {"strength": doses, "slope": (("pair", "side"), slopes[..., 0]), "norm": (("pair", "side"), of_pair)}
    over = stats.mean_interval(slopes[..., 0], [p.prompt_key for p in pairs], seed=seed)
    words: dict[str, Any] = {"slope": {side: {key: _plain(getattr(over, key)[k]) for key in ("mean", "low", "high")}
                       for k, side in enumerate(SIDES)}}  # fmt: skip
    if nulls:
        words["nulls"] = _against_nulls(slopes.mean(0))
    return paired_result(
        rm, "steer", pairs, sided[:, :, 0], ("pair", "side", "strength"), coords, seed=seed,
        checks=[Check("clean row", max(gaps, default=0.0), 2e-2 if rm.sixteen_bit else 1e-4)],
        settings={"depth": depth, "site": str(site), "unit": unit, "at": at, "nulls": nulls},
        noise_floor=rm.noise_floor, title=f"Steering at depth {depth}",
        shows="How the reward answers to a direction added to the residual stream, by strength.",
        cannot_show="That the network uses this direction by itself: any large enough push moves the reward, so "
        "compare it with random directions.", **words,
    )  # fmt: skip


def natural_directions(states: Float[Tensor, "n d"], count: int, seed: int) -> Float[Tensor, "count d"]:
    """Unit vectors drawn with the covariance of the states."""
    alike = bool((states == states[:1]).all())  # then every draw is zero
    if count and (len(states) < 3 or alike):
        raise DataError(
            "There are too few states to draw natural directions from",
            found=f"{len(states)} steered positions" + (", all in the same state" if alike else ""),
            expected="at least 3, not all the same",
            do="pass more pairs, or steer at='response'; what enters block 0 is often the token alone",
        )
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, len(states), generator=generator, dtype=torch.float64)
    drawn = weights @ (states - states.mean(0))
    return drawn / drawn.norm(dim=1, keepdim=True)


def responses(
    rm: RewardModel, text: Tokens, site: Site, moves: Tensor, doses: np.ndarray, at, clean: float, max_rows
) -> tuple[Float[np.ndarray, "direction strength"], float]:
    """Change of the reward by direction and strength, and the clean row's gap; a strength of 0 is not run."""
    positions = positions_of(text, at)
    cells = [(d, k) for d in range(len(moves)) for k, dose in enumerate(doses) if dose != 0]
    rows = [(Edit(site, positions, add(moves[d], float(doses[k]))),) for d, k in cells]
    out = patch_rows(rm, text, rows, max_rows=max_rows)
    changes = np.zeros((len(moves), len(doses)))
    changes[tuple(np.array(cells).T)] = out.change.numpy()
    return changes, float((out.clean - clean).abs().max()) / rm.effect_scale(clean)


def line_slopes(rewards: Float[np.ndarray, "*some strength"], doses: Float[np.ndarray, " strength"]) -> np.ndarray:
    away = doses - doses.mean()
    return (rewards - rewards.mean(-1, keepdims=True)) @ away / (away @ away)


def _against_nulls(slopes: Float[np.ndarray, "side direction"]) -> dict:
    """By side the nulls' mean slopes, and where the observed one stands among them."""
    out = {}
    for side, (observed, *drawn) in zip(SIDES, slopes.tolist(), strict=True):
        null = np.array(drawn)
        out[side] = {
            "slopes": drawn,
            "quantile": float((null < observed).mean() + (null == observed).mean() / 2),
            "p": float((1 + (np.abs(null) >= abs(observed)).sum()) / (1 + len(null))),
        }
    return out


def _plain(x) -> float | None:
    """A number for JSON; None where there is no interval."""
    return None if np.isnan(x) else float(x)


def _direction(vector, width: int) -> Float[Tensor, " d"]:
    row, wrong = unit_vector(vector.value if isinstance(vector, Result) else vector, width)
    if wrong:
        raise DataError(
            "The vector gives no direction to steer along",
            found=wrong,
            expected=f"{width} finite numbers (the width of the residual stream), not all zero",
            do="pass one vector of this model's residual stream",
        )
    return row


def checked_doses(
    rm: RewardModel, strengths, depth: int, unit: str, at: str, nulls: int
) -> Float[np.ndarray, " strength"]:
    doses = np.asarray(strengths, dtype=float)
    fit = doses.ndim == 1 and len(set(doses.tolist())) == doses.size >= 2 and np.isfinite(doses).all()
    if not fit or unit not in UNITS or at not in ("final", "response", "all") or nulls < 0:
        raise DataError(
            "The steering was not understood",
            found=f"strengths={strengths!r}, unit={unit!r}, at={at!r}, nulls={nulls}",
            expected="at least two different finite strengths, none twice; unit 'resid_norm' or 'absolute'; at "
            "'final', 'response' or 'all'; nulls of 0 or more",
            do="correct these; the defaults are a good start",
        )
    if not 0 <= depth <= rm.n_layers:
        raise DataError("There is no such depth to steer at", found=f"depth={depth}", expected=f"0 to {rm.n_layers}",
                        do="choose a block, or the number of blocks for what the final norm reads")  # fmt: skip
    return doses
