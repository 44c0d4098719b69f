"""A sparse autoencoder as it is used: fixed weights, `encode` and `decode`."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SAE(nn.Module):
    """z = activation(x W_enc + b_enc), x ~ z W_dec + b_dec."""

    def __init__(
        self,
        W_enc: Float[Tensor, "d_model d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, " d_model"],
        *,
        activation: Literal["topk", "jumprelu", "relu"] = "relu",
        threshold: Tensor | None = None,
        k: int | None = None,
        apply_b_dec_to_input: bool = False,
        site: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(w.detach().clone(), requires_grad=False) for w in (W_enc, b_enc, W_dec, b_dec)
        )
        self.threshold = None if threshold is None else nn.Parameter(threshold.detach().clone(), requires_grad=False)
        self.activation, self.k, self.apply_b_dec_to_input = activation, k, apply_b_dec_to_input
        self.site, self.meta = site, dict(meta or {})

    @property
    def d_model(self) -> int:
        """Width of what is encoded."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of the latents, none negative."""
        pre = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return torch.where(pre > self.threshold, pre, 0.0).clamp_min(0)
        z = pre.clamp_min(0)
        if self.k is None:
            return z
        top = z.topk(self.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction that activations stand for."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.decode(self.encode(x))
