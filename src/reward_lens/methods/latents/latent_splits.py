"""One pair's rewards and margin split over the latents of its two texts, by each of four estimators.

See `latent_contributions` for what they mean. The margin is kept as what each text puts into it: the chosen one's
parts and the rejected one's with their sign turned.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from reward_lens.engine.editing import Edit
from reward_lens.engine.intervention import add, constant
from reward_lens.methods.latents.latent_effects import changes, latent_parts, path_slope, set_to, slope
from reward_lens.methods.latents.latent_states import TextLatents
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.sae.dictionary import SAE

Estimator = Literal["direct", "gradient", "integrated", "ablation"]
Both = tuple[TextLatents, TextLatents]


class Part(NamedTuple):
    """One text's rows, and what they put into the pair's margin."""

    active: np.ndarray
    own: Float[np.ndarray, " active"]
    to_margin: Float[np.ndarray, " active"]
    tails: Float[np.ndarray, "3"]
    """Error, b_dec, rest."""
    tails_to_margin: Float[np.ndarray, "3"]
    norm: float
    """Of shared margins, half of the row: (u - u of the other) . h / 2."""
    gap: float
    """Of the sum of the rows, over its scale."""
    other_gap: float
    """Of the margin (direct), of the integration (integrated) or of the clean row (ablation)."""


def split_pair(
    rm: RewardModel, sae: SAE, both: Both, site: Site, how: Estimator, scale: str, steps: int, max_rows: int | None
) -> tuple[Part, Part]:
    """The two texts' parts."""
    if how == "direct":
        return _direct(rm, sae, both, scale)
    ways = {"gradient": _gradient, "integrated": _integrated, "ablation": _ablation}
    plus, minus = (ways[how](rm, sae, text, site, steps, max_rows) for text in both)
    return plus, minus._replace(to_margin=-minus.own, tails_to_margin=-minus.tails)


def _direct(rm: RewardModel, sae: SAE, both: Both, scale: str) -> tuple[Part, Part]:
    h = torch.cat([text.x for text in both])
    at = h.to(rm.like)
    gates = rm.readout_inputs([text.tokens for text in both])
    direction = rm.readout.direction(at, gates)
    u, constants = direction.u.double().cpu(), direction.constant.double().tolist()
    rewards = rm.readout.reward(at, gates).double().tolist()
    bias = sae.b_dec.double().cpu()
    found = []
    for i, text in enumerate(both):
        by_direction = []
        for v in (u[i], u[1 - i]):
            tails = np.array([float(text.error[0] @ v), float(bias @ v), constants[i]])
            by_direction.append((latent_parts(text, v[None]), tails))
        (own, tails), (cross, crossed) = by_direction
        shared = ((own + cross) / 2, (tails + crossed) / 2) if scale == "shared" else (own, tails)
        norm = float((u[i] - u[1 - i]) @ h[i]) / 2 if scale == "shared" else 0.0
        found.append((text.active.numpy(), own, tails, shared, norm))
    sizes = [np.abs(own).sum() + np.abs(tails).sum() for _, own, tails, _, _ in found]
    sums = [shared[0].sum() + shared[1].sum() + norm for *_, shared, norm in found]
    split = abs(sums[0] - sums[1] - (rewards[0] - rewards[1])) / sum(sizes)
    parts = [
        Part(active, own, sign * shared[0], tails, sign * shared[1], sign * norm,
             abs(own.sum() + tails.sum() - reward) / size, split)
        for (active, own, tails, shared, norm), sign, reward, size in zip(found, (1, -1), rewards, sizes, strict=True)
    ]  # fmt: skip
    return parts[0], parts[1]


def _gradient(rm: RewardModel, sae: SAE, text: TextLatents, site: Site, steps: int, max_rows) -> Part:
    g, reward = slope(rm, text.tokens, text.positions, site)
    own = latent_parts(text, g)
    error, b_dec = float((g * text.error).sum()), float((g @ sae.b_dec.double().cpu()).sum())
    along = float((g * text.x).sum())
    size = np.abs(own).sum() + abs(error) + abs(b_dec) + abs(reward)
    return _part(text, own, error, b_dec, reward, abs(own.sum() + error + b_dec - along) / size)


def _integrated(rm: RewardModel, sae: SAE, text: TextLatents, site: Site, steps: int, max_rows) -> Part:
    g = path_slope(rm, sae, text, site, steps, max_rows)
    own, error = latent_parts(text, g), float((g * text.error).sum())
    along = float((g * (text.x - sae.b_dec.double().cpu())).sum())
    (change,), reward, _ = changes(rm, text, [Edit(site, text.positions, constant(sae.b_dec.detach()))], max_rows)
    size = np.abs(own).sum() + abs(error) + abs(reward)
    missed = abs(along + change) / size
    return _part(text, own, error, 0.0, reward, abs(own.sum() + error - along) / size, missed)


def _ablation(rm: RewardModel, sae: SAE, text: TextLatents, site: Site, steps: int, max_rows) -> Part:
    edits = [set_to(sae, text, site, [int(j)]) for j in text.active]
    edits += [Edit(site, text.positions, add(-part)) for part in (text.error, sae.b_dec.detach())]
    found, reward, clean = changes(rm, text, edits, max_rows)
    *own, error, b_dec = (-found).tolist()
    return _part(text, np.array(own), error, b_dec, reward, 0.0, clean)


def _part(
    text: TextLatents, own: np.ndarray, error: float, b_dec: float, reward: float, gap: float, other: float = 0.0
) -> Part:
    tails = np.array([error, b_dec, reward - own.sum() - error - b_dec])
    return Part(text.active.numpy(), own, own, tails, tails, 0.0, gap, other)
