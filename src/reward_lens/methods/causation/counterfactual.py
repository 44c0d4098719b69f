"""Patching with a value pulled towards natural ones: does an effect depend on what is odd about the patched value?

    s       the value that a plain patch puts at the site: the other response's
    h_CL    mean of the m natural values nearest to s, at the same site, of the class s comes from
    h       argmin 1/2 |h - s|^2 + weight (1/2 |h - h_CL|^2 - 1/2 cos(h, h_CL))            "paper"
            argmin mean (h - s)^2 + weight (mean (h - h_CL)^2 + 1 - cos(h, h_CL))          "code": means over elements

The bracket is the counterfactual-latent (CL) loss of the paper and of its code. There it is added to the loss that
trains an alignment map, with the weight eps; nothing is trained here, and the first term, which keeps h at what the
patch was to carry, stands in that loss's place. Only the site's own value is pulled (the paper's stand-alone form, the
site being the causal variable). The minimum is exact: it lies in the plane of s and h_CL, where for every angle to
h_CL the best length has a closed form and the angle is found by bisection.

What this cannot show: that the pulled patch is natural further down. The value may be one that the site takes by
itself and still not go with the rest of the run: see `divergence`.

Reference: Grant et al. 2025, arXiv 2511.04638, section 6.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import capture
from reward_lens.engine.patching import Edit, patch_rows
from reward_lens.errors import DataError
from reward_lens.methods.causation.interchange import Interchange, given, require_apart, sites_named, value_of
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

PATCHES = ("plain", "counterfactual", "difference")
VARIANTS = ("paper", "code")
ANGLES = 513  # of the grid on which the angle is looked for


@checked_arguments
@torch.no_grad()
def counterfactual_patch(
    rm: RewardModel,
    pairs,
    sites: Any,
    natural_pairs,
    *,
    mode: str = "noise",
    at: str = "final",
    weight: float = 1.0,
    variant: str = "paper",
    n_natural: int = 20,
    seed: int = 0,
) -> Result:
    """Effects of patching each site with the other response's value, plain and pulled towards natural values.

    Parameters
    ----------
    sites: "components", "heads", "residual", or a list of sites.
    natural_pairs: pairs of other prompts (a shared prompt raises `DataError`); h_CL comes from their rejected responses
        in noise, from their chosen ones in denoise.
    mode: "noise" (the chosen response with the rejected value) or "denoise" (the reverse).
    at: "final", the one position whose natural values correspond.
    weight: of the CL loss. 0 is the plain patch exactly; as it grows the value goes to h_CL, which for a class mean
        removes what the pair's own text says.
    variant: "paper" or "code", the two forms of the loss.
    n_natural: m, the number of natural values averaged.

    Returns value (pair, component, patch) in reward units, patch = plain, counterfactual, difference (counterfactual
    less plain), with mean and interval over prompts. Coordinates `distance_before` and `distance_after` (pair,
    component): |s - h_CL| and |h - h_CL|. Check "minimum": the loss's gradient at h, relative to its terms,
    and "clean row" as in `effects`. Raises `DataError` for natural values fewer than `n_natural`. Source: Grant et al.
    2025, arXiv 2511.04638.
    """
    bad = mode not in ("noise", "denoise") or variant not in VARIANTS or at != "final"
    if bad or not 0 <= weight < float("inf") or n_natural < 1:
        raise DataError(
            "There is no such counterfactual patch",
            found=f"mode={mode!r}, at={at!r}, weight={weight}, variant={variant!r}, n_natural={n_natural}",
            expected="mode 'noise' or 'denoise' (only there has the value a class), at 'final', weight at least 0, "
            "variant 'paper' or 'code', n_natural at least 1",
            do="pass one of these; `effects` has the plain patches for other modes and positions",
        )
    pairs, natural_pairs = data.as_pairs(pairs), data.as_pairs(natural_pairs)
    require_apart(pairs, natural_pairs)
    if len(natural_pairs) < n_natural:
        raise DataError("There are too few natural values to average", found=f"{len(natural_pairs)} natural pairs",
                        expected=f"at least {n_natural}", do="pass more, or a smaller n_natural")  # fmt: skip
    wanted = sites_named(rm, sites, rm.n_layers)
    plan = Interchange(rm, wanted, mode, at, natural_pairs, seed)
    held = capture(rm, natural_pairs, plan.whole, "final")
    runs = range(1 if mode == "noise" else 0, len(held.tokens), 2)
    natural = [torch.stack([value_of(held, site, run).flatten() for run in runs]).double() for site in wanted]
    effects, before, after, gaps, worst = [], [], [], [], 0.0
    for pair, tokens in zip(pairs, rm.tokenize_pairs(pairs), strict=True):
        base = plan.base(tokens)
        where = range(base.reward_pos, base.reward_pos + 1)
        rows, which, distances = [], [], []
        for site, value, others in zip(wanted, plan.values(pair, tokens), natural, strict=True):
            plain = value.flatten().double()
            nearest = (others - plain).norm(dim=1).argsort(stable=True)[:n_natural]
            centre = others[nearest].mean(0)
            pulled = pulled_to(plain, centre, weight, variant)
            worst = max(worst, remaining_gradient(pulled, plain, centre, weight, variant))
            distances.append((float((plain - centre).norm()), float((pulled - centre).norm())))
            moved = pulled.reshape(value.shape).to(value)
            rows.append((Edit(site, where, given(value)),))
            which.append(len(rows) - 1)
            if not torch.equal(moved, value):  # the same value is the same patch: not run twice
                rows.append((Edit(site, where, given(moved)),))
            which.append(len(rows) - 1)
        out = patch_rows(rm, base, rows)
        gaps.append(out.clean_gap)
        effect = plan.effect(out.clean, out.rewards)[which].view(-1, 2)
        effects.append(torch.cat([effect, effect[:, 1:] - effect[:, :1]], 1).numpy())
        before.append([d for d, _ in distances])
        after.append([d for _, d in distances])
    coords = {
        "component": np.array([str(site) for site in wanted], dtype=object),
        "layer": ("component", np.array([-1 if site.layer is None else site.layer for site in wanted])),
        "patch": np.array(PATCHES, dtype=object),
        "distance_before": (("pair", "component"), np.array(before)),
        "distance_after": (("pair", "component"), np.array(after)),
    }
    return paired_result(
        rm, "counterfactual_patch", pairs, np.stack(effects), ("pair", "component", "patch"), coords,
        checks=[Check("minimum", worst, 1e-6), Check("clean row", max(gaps), 2e-2 if rm.sixteen_bit else 1e-4)],
        seed=seed, title="Patches pulled towards natural values",
        settings={"sites": [str(site) for site in wanted], "mode": mode, "at": at, "weight": weight,
                  "variant": variant, "n_natural": n_natural, "natural_class": "rejected" if mode == "noise" else
                  "chosen", "natural_hash": data.inputs_hash(natural_pairs)},
        shows="The effect of patching a site with the other response's value, and with that value pulled towards "
        "natural values of its class.",
        cannot_show="Whether the rest of the run goes with the pulled value; a mean of natural values also drops what "
        "only this text's value said.",
    )  # fmt: skip


def pulled_to(
    value: Float[Tensor, " d"], centre: Float[Tensor, " d"], weight: float, variant: str = "paper"
) -> Float[Tensor, " d"]:
    """h: `value` pulled towards `centre` with the CL loss's `weight`; exactly `value` at weight 0.

    Along h = r (cos t e1 + sin t e2), e1 the direction of the centre, the loss is least at r = A cos(t - p) / (1 +
    weight), with A and p the polar coordinates of value + weight * centre, and there is `loss` with the
    slope `slope`. Towards the origin, along e1, it is -turn.
    """
    size = float(centre.norm())
    if weight == 0 or size == 0:
        return value / (1 + weight)
    turn = _cosine_weight(weight, variant, len(value))
    first = centre / size
    along = float(value @ first)
    across = value - along * first
    beside = float(across.norm())
    aim, angle = math.hypot(along + weight * size, beside), math.atan2(beside, along + weight * size)

    best = aim**2 / (2 * (1 + weight))

    def loss(t: Any) -> Any:
        return -turn * np.cos(t) - best * np.cos(angle - t) ** 2

    def slope(t: float) -> float:
        return turn * math.sin(t) - best * math.sin(2 * (angle - t))

    low, high = max(0.0, angle - math.pi / 4), angle
    if angle > math.pi / 2:
        # A value that points away: there may be two minima, and the lowest point of a grid says which.
        grid = np.linspace(angle - math.pi / 2, angle, ANGLES)
        lowest = int(loss(grid).argmin())
        if loss(grid[lowest]) >= -turn:
            return torch.zeros_like(value)  # so small that the loss falls all the way to the origin
        low, high = float(grid[max(lowest - 1, 0)]), float(grid[min(lowest + 1, ANGLES - 1)])
    elif slope(low) > 0:
        low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    length = aim * math.cos(angle - high) / (1 + weight)
    second = across / beside if beside > 0 else across
    return length * (math.cos(high) * first + math.sin(high) * second)


def remaining_gradient(
    h: Float[Tensor, " d"], value: Float[Tensor, " d"], centre: Float[Tensor, " d"], weight: float, variant: str
) -> float:
    """Size of the loss's gradient at h over that of its terms; 0 at h = 0, where the cosine has none."""
    length, size = h.norm(), centre.norm()
    gradient, terms = (h - value) + weight * (h - centre), (h - value).norm() + weight * (h - centre).norm()
    if length == 0:
        return 0.0
    if size > 0:
        cosine = (h @ centre) / (length * size)
        turning = _cosine_weight(weight, variant, len(h)) * (centre / size - cosine * h / length) / length
        gradient, terms = gradient - turning, terms + turning.norm()
    return float(gradient.norm() / (terms + length + size))


def _cosine_weight(weight: float, variant: str, d: int) -> float:
    """Weight of -cos beside 1/2 |h - s|^2: a half in the paper, d / 2 in the code with its means over elements."""
    return weight * (0.5 if variant == "paper" else d / 2)
