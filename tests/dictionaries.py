"""Dictionaries made by hand: random ones, one that loses nothing, and one that knows nothing."""

import torch

from reward_lens.sae.crosscoder import Crosscoder
from reward_lens.sae.dictionary import SAE

_PLAIN: dict = {"activation": "relu", "apply_b_dec_to_input": False}


def random_sae(d_model: int = 32, d_sae: int = 48, site: str | None = "L2.resid_post", seed: int = 0, k=6) -> SAE:
    rng = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(shape, generator=rng) for shape in ((d_model, d_sae), (d_sae, d_model)))
    b_enc, b_dec = 0.1 * torch.randn(d_sae, generator=rng), torch.randn(d_model, generator=rng)
    return SAE(
        encoder / d_model**0.5, b_enc, decoder / d_model**0.5, b_dec,
        activation="topk", k=k, apply_b_dec_to_input=True, site=site, meta={"seed": seed},
    )  # fmt: skip


def identity_sae(d_model: int = 32, site: str | None = "L2.resid_post") -> SAE:
    """relu(x) - relu(-x) = x: every state is its own reconstruction."""
    eye = torch.eye(d_model)
    both = torch.cat([eye, -eye])
    return SAE(both.T, torch.zeros(2 * d_model), both, torch.zeros(d_model), **_PLAIN, site=site)


def constant_sae(state: torch.Tensor, site: str | None = "L2.resid_post", d_sae: int = 4) -> SAE:
    """Latents that are never active: the reconstruction is `state`."""
    d_model = len(state)
    return SAE(torch.zeros(d_model, d_sae), torch.zeros(d_sae), torch.zeros(d_sae, d_model), state, **_PLAIN, site=site)


def random_crosscoder(d: int = 32, d_sae: int = 20, site: str | None = "L2.resid_post", seed: int = 0) -> Crosscoder:
    """Of two models of one width."""
    rng = torch.Generator().manual_seed(seed)
    enc, dec = ([torch.randn(shape, generator=rng) / d**0.5 for _ in range(2)] for shape in ((d, d_sae), (d_sae, d)))
    bias = [torch.randn(d, generator=rng) for _ in range(2)]
    return Crosscoder(
        enc, torch.randn(d_sae, generator=rng), dec, bias,
        threshold=torch.full((d_sae,), 0.5), scale=torch.tensor([1.0, 0.7]), sites=[site] * 2,
    )  # fmt: skip
