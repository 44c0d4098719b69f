"""The ways from latents to a reward: slopes, slopes along a path, and runs in which latents are set to other values.

    slope       g_p = dr / dx_p at the read positions of the run's own site
    path slope  the mean of g on the straight way from b_dec to x (Gauss-Legendre nodes)
    set         x_p -> x_p + (value_pj - z_pj) d_j at the read positions, the error term kept; all after it recomputed

Setting a latent to 0 is its ablation. A latent that already has the value is no row: its change is 0 exactly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.gradients import gradients
from reward_lens.engine.patching import patch_gradients, patch_rows
from reward_lens.methods.latents.latent_states import TextLatents
from reward_lens.model.prefix import NO_PREFIX, keys_and_values
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.sae.dictionary import SAE


def slope(rm: RewardModel, tokens: Tokens, positions: range, site: Site) -> tuple[Float[Tensor, "pos d_model"], float]:
    """Gradient of the reward at some positions, nothing frozen, and the reward."""
    start = positions.start if rm.reuses_prefix(tokens) else 0
    with torch.no_grad():
        known = keys_and_values(rm.trunk, tokens, start) if start else NO_PREFIX
    found = gradients(rm, tokens, [site], start, known)
    first = positions.start - start
    return found.slopes[site][first : first + len(positions)].double().cpu(), found.reward


def path_slope(rm: RewardModel, sae: SAE, text: TextLatents, site: Site, steps: int, max_rows: int | None) -> Tensor:
    """[pos, d_model]; times x - b_dec it sums to the change of the reward along the way, as steps grow."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    bias = sae.b_dec.double().cpu()
    rows = []
    for node in (nodes + 1) / 2:
        leaf = (bias + float(node) * (text.x - bias)).to(rm.like).requires_grad_(True)
        rows.append((Edit(site, text.positions, _leaf(leaf)), leaf))
    found, _ = patch_gradients(rm, text.tokens, rows, max_rows=max_rows)
    stacked = torch.stack([g.double().cpu() for g in found])
    return (stacked * torch.as_tensor(weights / 2)[:, None, None]).sum(0)


def set_to(
    sae: SAE, text: TextLatents, site: Site, latents: Sequence[int], to: "Float[Tensor, 'pos latent'] | float" = 0.0
) -> Edit | None:
    """The edit that gives latents these activations together; None where they have them already."""
    move = to - text.activations(latents)
    where = move.any(1).nonzero().flatten()
    if not len(where):
        return None
    some, wanted = move[where], list(latents)

    def give(x: Tensor, site: Site, run: int, positions) -> Tensor:
        # Made when it is used: for all latents of a long text the moved vectors would be many times its states.
        return x + (some.to(sae.W_dec.device) @ sae.W_dec[wanted].double()).to(x)

    return Edit(site, [text.positions[int(p)] for p in where], Source("latents", give))


def changes(
    rm: RewardModel, text: TextLatents, edits: Sequence[Edit | None], max_rows: int | None
) -> tuple[Float[np.ndarray, " edit"], float, float]:
    """Change of the reward by every edit, the reward, and the gap of the clean rows that walked beside them."""
    out = np.zeros(len(edits))
    rows = [i for i, edit in enumerate(edits) if edit is not None]
    if not rows:
        return out, float(rm.rewards([text.tokens])[0]), 0.0
    found = patch_rows(rm, text.tokens, [(edit,) for edit in edits if edit is not None], max_rows=max_rows)
    out[rows] = found.change.numpy()
    return out, found.alone, found.clean_gap


def latent_parts(text: TextLatents, g: Float[Tensor, "pos d_model"]) -> Float[np.ndarray, " active"]:
    """sum_p z_pj g_p . d_j for every active latent."""
    return (text.z * (g @ text.directions.T)).sum(0).numpy()


def _leaf(leaf: Tensor) -> Source:
    return Source("leaf", lambda x, site, run, positions: leaf.to(x.dtype).reshape(x.shape))
