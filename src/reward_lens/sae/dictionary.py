"""`SAE`: a frozen dictionary that writes an activation as a sparse sum of directions.

    z = act((x - b_dec) W_enc + b_enc) >= 0        x^ = z W_dec + b_dec

act is ReLU on the k largest of a sample ("topk"), everything over a threshold ("jumprelu") or ReLU ("relu").
Dictionaries that do not subtract b_dec first say so in `apply_b_dec_to_input`. Activations go in as the model has them:
whatever scale the training used is folded into the weights.

What it cannot show: a latent is a unit of this dictionary. Whether the model uses it, or another seed finds it again,
is a question to other functions.

Reference: Gao et al. 2024, arXiv 2406.04093 (TopK); Rajamanoharan et al. 2024, arXiv 2407.14435 (JumpReLU).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.errors import DataError

ACTIVATIONS = ("topk", "jumprelu", "relu")


class SAE(torch.nn.Module):
    """A frozen sparse autoencoder; `encode`, `decode`, and `sae(x)` for both.

    Parameters
    ----------
    W_enc, b_enc, W_dec, b_dec: weights [d_model, d_sae], [d_sae], [d_sae, d_model], [d_model].
    activation: "topk" (needs `k`), "jumprelu" (needs `threshold` [d_sae], not negative) or "relu".
    apply_b_dec_to_input: whether b_dec is subtracted before encoding.
    site: where its activations come from, e.g. "L20.resid_post"; None if unknown.
    meta: what it was trained on and how; JSON-able.

    Gradients pass through to `x`, never into the weights. `x` is cast to the dtype of the weights. Raises `DataError`
    for weights that do not fit together or are not finite.
    """

    W_enc: torch.nn.Parameter
    b_enc: torch.nn.Parameter
    W_dec: torch.nn.Parameter
    b_dec: torch.nn.Parameter
    threshold: torch.nn.Parameter | None

    def __init__(
        self,
        W_enc: Float[Tensor, "..."],
        b_enc: Float[Tensor, "..."],
        W_dec: Float[Tensor, "..."],
        b_dec: Float[Tensor, "..."],
        *,
        activation: str,
        k: int | None = None,
        threshold: Float[Tensor, "..."] | None = None,
        apply_b_dec_to_input: bool = True,
        site: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        given = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        self.activation, self.k, self.site = activation, k, site
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.meta = dict(meta or {})
        _require_fit(given, activation, k, apply_b_dec_to_input)
        for name, tensor in given.items():
            held = None if tensor is None else torch.nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            self.register_parameter(name, held)

    @property
    def d_model(self) -> int:
        """Width of what goes in."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of activations.

        Returns z [*batch, d_sae], none negative, most of them zero.
        """
        if x.shape[-1] != self.d_model:
            raise DataError(
                "The activations do not fit the dictionary",
                found=f"a last dimension of {x.shape[-1]}",
                expected=f"{self.d_model}" + (f", the width at {self.site}" if self.site else ""),
                do="take activations of the site and the model that the dictionary was trained on",
            )
        x = x.to(self.W_enc.dtype)
        pre = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        if self.activation == "topk":
            values, at = pre.topk(self.k or 0, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, at, values.relu())
        if self.threshold is not None:
            return torch.where(pre > self.threshold, pre, 0.0)
        return pre.relu()

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Activations that latents stand for.

        Returns z W_dec + b_dec [*batch, d_model].
        """
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction. Returns `decode(encode(x))`."""
        return self.decode(self.encode(x))

    def save(self, folder: str | Path, fmt: Literal["saelens", "sparsify"] = "saelens") -> Path:
        """Write the weights and `cfg.json` so that SAELens or sparsify reads them. Returns the folder.

        Raises `DataError` for what the format has no words for (sparsify knows no threshold).
        """
        from reward_lens.sae.formats import save_sae

        return save_sae(self, folder, fmt)

    @classmethod
    def load(cls, folder: str | Path, subfolder: str | None = None, revision: str | None = None) -> "SAE":
        """Read a dictionary of SAELens, sparsify, Gemma Scope or Llama Scope, by what is there.

        `folder`: a local folder or a hub id such as "org/name"; `subfolder` inside it; `revision` of the hub. Returns
        an `SAE`, a `Transcoder` if the files say so. Raises `LoadError` for what is missing or has no equal here.
        """
        from reward_lens.sae.formats import load_sae

        return load_sae(folder, subfolder, revision)

    def extra_repr(self) -> str:
        kept = f"k={self.k}" if self.activation == "topk" else self.activation
        return f"d_model={self.d_model}, d_sae={self.d_sae}, {kept}, site={self.site}"


def _require_fit(given: dict[str, Tensor | None], activation: str, k: int | None, centred: bool) -> None:
    shapes = {name: tuple(t.shape) for name, t in given.items() if t is not None}
    d_in, d_sae = shapes["W_enc"] if len(shapes["W_enc"]) == 2 else (-1, -1)
    d_out = shapes["b_dec"][0] if len(shapes["b_dec"]) == 1 else -1
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,),
                "threshold": (d_sae,)}  # fmt: skip
    wrong = [f"{name} {list(shape)}" for name, shape in shapes.items() if shape != expected[name]]
    if centred and d_in != d_out:
        wrong.append(f"b_dec [{d_out}] subtracted from an input of width {d_in}")
    wrong += [f"{name} with NaN or infinity" for name, t in given.items() if t is not None and not t.isfinite().all()]
    threshold = given["threshold"]
    if activation not in ACTIVATIONS:
        wrong.append(f"activation {activation!r}")
    if (activation == "jumprelu") != (threshold is not None):
        wrong.append(f"activation {activation!r} " + ("with" if threshold is not None else "without") + " a threshold")
    if threshold is not None and bool((threshold < 0).any()):
        wrong.append("a negative threshold")
    if activation == "topk" and not 1 <= (k or 0) <= d_sae:
        wrong.append(f"k={k} of {d_sae} latents")
    if wrong:
        raise DataError(
            "The weights do not make a dictionary",
            found="; ".join(wrong),
            expected="finite W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model]; k for "
            "'topk', a threshold [d_sae] that is not negative for 'jumprelu' and for no other",
            do="check which weight is which, and its orientation",
        )
