"""The directions that a latent's decoder row lies beside: other latents', and the reward's.

    cosine_jk   d_j . d_k / |d_j| |d_k|          the largest ones, k != j
    reward_j    d_j . u / |d_j| |u|              u: the effective direction, at the last site alone

The final norm's scale, which differs from text to text, multiplies u as a whole and drops out of the cosine. At other
sites no fixed direction of the residual stream is the reward's: what a latent does is up to later layers.

What this cannot show: that neighbours are active together, or that a small cosine is a small effect; a direction of the
right angle that is written strongly gives more than an aligned one that is not.

Reference: Bricken et al. 2023, transformer-circuits (similarity of dictionary directions, splitting of features).
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_states import described, is_last, require_latents, site_of
from reward_lens.model.readout import LinearReadout
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE

_ROWS = 1024  # latents compared with all others at once
_NO_LENGTH = "a decoder row of length zero has no direction"


@checked_arguments
@torch.no_grad()
def latent_neighbours(
    rm: RewardModel, sae: SAE, latents: Sequence[int], top: int = 8, site: Site | str | None = None
) -> Result:
    """The latents of a dictionary whose decoder rows point the way that some latents' do.

    Parameters
    ----------
    latents: indices in the dictionary, in the order of the rows. top: neighbours of each, of all latents there are.
    site: where the dictionary is read, if it does not say so itself.

    Returns value (latent, neighbour), the cosine in -1 to 1, the largest first. Coordinates: `neighbour_index`
    (latent, neighbour); (latent): `index`, `norm` (length of the row), `reward_cosine` (NaN away from the last site).
    Check "self cosine": the same products give every row a cosine of 1 with itself.
    Raises `DataError` for latents that the dictionary does not have, and for a dictionary of one latent.
    """
    where, wanted = site_of(rm, sae, site, "final"), require_latents(sae, latents)
    if top < 1 or sae.d_sae < 2:
        raise DataError("No neighbours can be given", found=f"top={top}, {sae.d_sae} latents in the dictionary",
                        expected="top of 1 or more, 2 latents or more", do="leave top out for 8")  # fmt: skip
    norms = sae.W_dec.float().norm(dim=1)
    unit = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    values, indices, gaps = [], [], [0.0]
    for start in range(0, len(wanted), _ROWS):
        some = torch.tensor(wanted[start : start + _ROWS], device=unit.device)
        cosines = unit[some] @ unit.T
        own = cosines.gather(1, some[:, None])[:, 0]
        there = norms[some] > 0
        gaps += (own - 1).abs()[there].tolist()
        cosines[:, norms == 0] = -torch.inf
        cosines.scatter_(1, some[:, None], -torch.inf)
        best = cosines.topk(min(top, sae.d_sae - 1), dim=1)
        known = there[:, None] & best.values.isfinite()
        values.append(torch.where(known, best.values, torch.nan).double().cpu().numpy())
        indices.append(torch.where(known, best.indices, -1).cpu().numpy())
    cosine, index = np.concatenate(values), np.concatenate(indices)
    coords = {
        "latent": np.array([f"F{j}" for j in wanted], dtype=object),
        "neighbour": np.arange(1, cosine.shape[1] + 1),
        "neighbour_index": (("latent", "neighbour"), index),
        "index": ("latent", np.array(wanted)),
        "norm": ("latent", norms[wanted].double().cpu().numpy()),
        "reward_cosine": ("latent", _with_the_reward(rm, sae, wanted, where)),
    }
    meta = rm.describe(
        "latent_neighbours", title=f"Neighbours of latents at {where}", sae=described(sae, where),
        settings={"latents": wanted, "top": top},
        shows="Which decoder rows lie closest to each latent's, and how far along the reward's direction it writes.",
        cannot_show="That neighbours are active together, or how strongly a latent writes.",
    )  # fmt: skip
    value = xr.DataArray(cosine, dims=("latent", "neighbour"), coords=coords)
    checks = [Check("self cosine", max(gaps), 1e-5)]
    return Result("latent_neighbours", value, unit="cosine", meta=meta, checks=checks, undefined=_NO_LENGTH)


def _with_the_reward(rm: RewardModel, sae: SAE, latents: list[int], site: Site) -> np.ndarray:
    """[latent] cosines with the effective direction; NaN where there is no fixed one."""
    readout = rm.readout
    if not is_last(rm, site) or not isinstance(readout, LinearReadout):
        return np.full(len(latents), np.nan)
    u = readout.norm.pull_back(readout.weight, readout.weight.new_ones(1, 1)).double().flatten().cpu()
    rows = sae.W_dec[latents].double().cpu()
    return ((rows @ u) / (rows.norm(dim=1) * u.norm())).numpy()
