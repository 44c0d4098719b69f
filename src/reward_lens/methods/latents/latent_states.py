"""What the latents of a dictionary say of texts: their activations, and the error that keeps the sum exact.

    x_p = sum_j z_pj d_j + b_dec + e_p        at every read position p of the dictionary's site

`e` is what is left, so the identity holds whatever the dictionary is like; how large it is says how much of what
follows is about the dictionary at all. Sums are taken in float64.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_lens.engine.activations import capture, positions_of
from reward_lens.engine.places import require_site
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.sae.dictionary import SAE

At = Literal["final", "response"]
KINDS = ("embed", "resid_pre", "resid_mid", "resid_post", "attn", "mlp")
TEXTS = {"final": 256, "response": 16}  # texts whose states are held at once


@dataclasses.dataclass(frozen=True)
class TextLatents:
    """One text, read at the site of a dictionary."""

    tokens: Tokens
    positions: range
    x: Float[Tensor, "pos d_model"]
    """What stands at the site, float64 as everything here."""
    active: Int[Tensor, " active"]
    """The latents that are active at one of the positions or more, in order."""
    z: Float[Tensor, "pos active"]
    directions: Float[Tensor, "active d_model"]
    """Rows of the decoder."""
    error: Float[Tensor, "pos d_model"]

    def activations(self, latents: Sequence[int]) -> Float[Tensor, "pos latent"]:
        """Activations of any latents; zeros for those that are not active."""
        place = {int(j): i for i, j in enumerate(self.active)}
        out = self.z.new_zeros(len(self.positions), len(latents))
        for column, latent in enumerate(latents):
            if latent in place:
                out[:, column] = self.z[:, place[latent]]
        return out


def read_latents(rm: RewardModel, sae: SAE, tokens: Sequence[Tokens], site: Site, at: At) -> Iterator[TextLatents]:
    """The texts in order, a few run at once."""
    for start in range(0, len(tokens), TEXTS[at]):
        some = tokens[start : start + TEXTS[at]]
        held = capture(rm, some, [site], at)[site]
        states = [x.reshape(-1, rm.d_model) for x in held]
        if at == "final":
            codes = list(encoded(sae, torch.cat(states)).split(1))
        for i, text in enumerate(some):
            z = codes[i] if at == "final" else encoded(sae, states[i])
            active = (z != 0).any(0).nonzero().flatten()
            directions = sae.W_dec[active].double().cpu()
            x, z, bias = states[i].double().cpu(), z[:, active].double().cpu(), sae.b_dec.double().cpu()
            error = x - z @ directions - bias
            yield TextLatents(text, positions_of(text, at), x, active.cpu(), z, directions, error)


def encoded(sae: SAE, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
    """Activations, computed where and in what the dictionary is held in."""
    return sae.encode(x.to(sae.W_enc))


def reconstructed(sae: SAE, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The dictionary's own output, in the form of `x`."""
    return sae(x.to(sae.W_enc)).to(x)


def site_of(rm: RewardModel, sae: SAE, site: Site | str | None, at: str) -> Site:
    """The site that a dictionary is read at; raises `DataError` where it does not fit this model."""
    if sae.d_model != rm.d_model:
        raise DataError(
            "The dictionary is not of this model's width",
            found=f"{sae.d_model} (the dictionary), {rm.d_model} ({rm.name})",
            expected="equal widths",
            do="load a dictionary that was trained on this model or its base model",
        )
    if hasattr(sae, "skip"):  # a transcoder: what it gives is not what it reads, so no error term closes the sum
        raise DataError(
            "The dictionary does not reconstruct what it reads",
            found=type(sae).__name__,
            expected="a sparse autoencoder of one site",
            do="use an SAE of the site; a transcoder predicts another one",
        )
    if sae.meta.get("centred_writes") and getattr(getattr(rm.readout, "norm", None), "centred", False):
        raise DataError(
            "The dictionary was trained on a residual stream without its mean over dimensions",
            found=f"center_writing_weights in its file, and LayerNorm in {rm.name}",
            expected="a dictionary of what the model itself computes",
            do="centre its encoder, SAE(W_enc - W_enc.mean(0), ...), and where b_dec is subtracted take b_dec.mean() * "
            "W_enc.sum(0) from b_enc",
        )
    require_at(at)
    return settled_site(rm, sae.site, site)


def require_at(at: str) -> None:
    """Raise `DataError` for positions that latents are not read at."""
    if at not in TEXTS:
        raise DataError(
            "The positions were not understood",
            found=repr(at),
            expected="'final' (the reward position) or 'response' (its first token through the reward position)",
            do="pass either",
        )


def settled_site(rm: RewardModel, trained_at: str | None, site: Site | str | None) -> Site:
    """The site that a dictionary says it is of, or the one given where it says none; `DataError` for neither or two."""
    own = None if trained_at is None else Site.parse(trained_at)
    wanted = own if site is None else Site.parse(site)
    if wanted is None or wanted.kind not in KINDS or (own is not None and _same(own) != _same(wanted)):
        raise DataError(
            "The site to read the dictionary at is not known",
            found=f"sae.site={trained_at!r}, site={None if site is None else str(site)!r}",
            expected="one residual stream or write, in the dictionary (sae.site) or in site=, not two different ones",
            do="pass site='L3.resid_post' or the like: the place whose activations the dictionary was trained on",
        )
    require_site(rm, wanted)
    return wanted


def is_last(rm: RewardModel, site: Site) -> bool:
    """Whether the site is what the final norm reads."""
    return site == Site("resid_post", rm.n_layers - 1)


def require_latents(sae: SAE, latents: Sequence[Any]) -> list[int]:
    """The latents as plain numbers, or a `DataError` for one that the dictionary does not have."""
    wanted = [_whole(j) for j in latents]
    if not wanted or not all(0 <= j < sae.d_sae for j in wanted) or len(set(wanted)) < len(wanted):
        raise DataError(
            "The latents were not understood",
            found=", ".join(map(repr, latents)) or "none",
            expected=f"different whole numbers from 0 to {sae.d_sae - 1}",
            do="choose latents of this dictionary; `reward_latents` and `latent_contributions` name some",
        )
    return wanted


def _whole(latent: Any) -> int:
    """The latent's number, -1 for what is none ("F3", NaN)."""
    try:
        return -1 if isinstance(latent, bool) or int(latent) != latent else int(latent)
    except (TypeError, ValueError, OverflowError):
        return -1


def described(sae: SAE, site: Site) -> dict[str, Any]:
    """What a result keeps of a dictionary."""
    plain = {k: v for k, v in sae.meta.items() if v is None or isinstance(v, str | int | float | bool)}
    own = {"site": str(site), "d_sae": sae.d_sae, "activation": sae.activation, "k": sae.k}
    return {**own, "trained": plain}


def _same(site: Site) -> Site:
    """One name for one residual: `L3.resid_pre` is `L2.resid_post`."""
    if site.kind == "resid_pre" and site.layer:
        return Site("resid_post", site.layer - 1)
    return Site("embed") if site == Site("resid_pre", 0) else site
