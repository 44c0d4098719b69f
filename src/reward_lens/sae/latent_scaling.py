"""Latent scaling: whether the model in which a latent has hardly a decoder row shows the latent all the same.

Of a crosscoder of two models and a latent j let s be the model with the larger row, d = its row, o the other model. In
each of them the latent is fitted by one number to what is to be explained, over samples i:

    beta_m = argmin_beta sum_i |beta z_ij d - t_mi|^2 = sum_i z_ij t_mi . d / (sum_i z_ij^2 |d|^2)
    nu     = beta_o / beta_s

    error            t_m = x_m - x^_m + z_j W_dec_m[j]     the model's error, with what the latent itself explains in it
    reconstruction   t_m = x^_m - b_m                      what all latents together write

nu_error near 1: model o has the latent's direction as strongly as model s has, only no latent writes it there (complete
shrinkage). nu_reconstruction near 1: other latents write it there (latent decoupling). Both near 0: model o does not
have it. Vectors are in the unit of each model's spread (`Crosscoder.scale`).

It presumes that a direction means the same in both models, as between a model and its fine-tuned version; models of
other widths are refused, unrelated ones of equal width cannot be told.

Reference: Minder et al. 2025, arXiv 2504.02922. Their reconstruction keeps the decoder's bias b_m; it is left out here,
since at late sites all texts share an offset that is far larger than what differs, and that both models have alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_lens.errors import DataError
from reward_lens.sae.crosscoder import Crosscoder


class Scaled(NamedTuple):
    """Per latent, NaN where it is active in no sample."""

    nu_error: Float[Tensor, " latent"]
    nu_reconstruction: Float[Tensor, " latent"]
    stronger: Int[Tensor, " latent"]
    """The model s."""
    n_active: Int[Tensor, " latent"]


def latent_scaling(crosscoder: Crosscoder, xs: Sequence[Tensor], latents: Sequence[int] | None = None) -> Scaled:
    """Latent scaling over samples xs[m] [n, d_m]; `latents`: all of them where None."""
    chosen = torch.arange(crosscoder.d_sae) if latents is None else torch.as_tensor(list(latents))
    if outside := [j for j in chosen.tolist() if not 0 <= j < crosscoder.d_sae]:
        raise DataError("There is no such latent", found=", ".join(map(str, outside)),
                        expected=f"0 to {crosscoder.d_sae - 1}", do="name latents of this crosscoder")  # fmt: skip
    sums = torch.zeros(2, 2, len(chosen), dtype=torch.float64)
    active = torch.zeros(len(chosen), dtype=torch.int64)
    for some in zip(*(x.split(1024) for x in xs), strict=True):
        sums += scaling_terms(crosscoder, some, chosen).sum(2)
        active += (crosscoder.encode(*some)[:, chosen] > 0).sum(0).cpu()
    nu = sums[:, 0] / sums[:, 1]
    return Scaled(nu[0], nu[1], stronger(crosscoder)[chosen], active)


def stronger(crosscoder: Crosscoder) -> Int[Tensor, " d_sae"]:
    """Of every latent the model with the larger row."""
    return crosscoder.norms.argmax(0).cpu()


@torch.no_grad()
def scaling_terms(
    crosscoder: Crosscoder, xs: Sequence[Tensor], latents: Int[Tensor, " latent"]
) -> Float[Tensor, "target model n latent"]:
    """z_ij t_mi . d_j of every sample; target: error, reconstruction; model: o, s. nu is a ratio of sums of these."""
    if len(set(crosscoder.widths)) != 1 or crosscoder.n_models != 2:
        raise DataError(
            "Latents cannot be scaled from one model to the other",
            found=f"widths {', '.join(map(str, crosscoder.widths))}",
            expected="two models of one width, in which a direction means the same",
            do="compare a model with its fine-tuned version; else read the relative norms with care",
        )
    codes = crosscoder.encode(*xs)
    z, found = codes[:, latents].double().cpu(), [x.double().cpu() for x in crosscoder.decode(codes)]
    scale, bias = crosscoder.scale.double().cpu(), [b.double().cpu() for b in crosscoder.b_dec]
    rows = torch.stack([w[latents].double().cpu() * s for w, s in zip(crosscoder.W_dec, scale, strict=True)])
    s = stronger(crosscoder)[latents]
    d = rows[s, torch.arange(len(latents))]
    by_model = []
    for m, (x, to) in enumerate(zip(xs, found, strict=True)):
        error = ((x.double().cpu() - to) * scale[m]) @ d.T + z * (rows[m] * d).sum(1)
        by_model.append(torch.stack([z * error, z * (((to - bias[m]) * scale[m]) @ d.T)]))
    first, second = by_model
    return torch.stack([torch.where(s == 0, second, first), torch.where(s == 0, first, second)], 1)
