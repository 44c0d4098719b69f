"""A dictionary that writes a module's output from its input, and its training.

    z = act(x W_enc + b_enc)        y^ = z W_dec + b_dec  (+ W_skip x with a skip)

The trainer is that of `sae.training` with x as input and y as target, except that nothing is subtracted from x, the
decoder begins at zero (the first guess is b_dec, the geometric median of y) and its rows keep the norm they learn. With
a skip the linear part of the module goes through one matrix, and the latents are left with the rest.

What it cannot show: that the module computes in these steps; a transcoder imitates its input-output map on the samples.

Reference: Dunefsky et al. 2024, arXiv 2406.11944 (transcoders); Paulo et al. 2025, arXiv 2501.18823 (skip).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.sae.batches import Samples
from reward_lens.sae.dictionary import SAE
from reward_lens.sae.recipe import Recipe, completed
from reward_lens.sae.training import Run, Variant


class Transcoder(SAE):
    """A frozen transcoder: `transcoder(x)` is the predicted output, the skip's part included.

    Parameters as `SAE`, with W_dec [d_sae, d_out], b_dec [d_out] and `W_skip` [d_out, d_model] or None. `decode` gives
    the latents' part and b_dec, `skip(x)` the skip's part (zero without one). `site` is where x is taken,
    `meta["target"]` where y is, if known.
    """

    W_skip: torch.nn.Parameter | None

    def __init__(self, *weights: Float[Tensor, "..."], W_skip: Float[Tensor, "..."] | None = None, **settings: Any):
        super().__init__(*weights, **{"apply_b_dec_to_input": False, **settings})
        if W_skip is not None and (W_skip.shape != (self.d_out, self.d_model) or not bool(W_skip.isfinite().all())):
            raise DataError(
                "The skip does not fit the transcoder",
                found=f"W_skip {list(W_skip.shape)}" + ("" if W_skip.isfinite().all() else " with NaN or infinity"),
                expected=f"finite [{self.d_out}, {self.d_model}], output by input",
                do="check its orientation",
            )
        held = None if W_skip is None else torch.nn.Parameter(W_skip.detach().contiguous(), requires_grad=False)
        self.register_parameter("W_skip", held)

    @property
    def d_out(self) -> int:
        """Width of what comes out."""
        return self.W_dec.shape[1]

    def skip(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The linear part. Returns W_skip x [*batch, d_out]."""
        if self.W_skip is None:
            return x.new_zeros(*x.shape[:-1], self.d_out, dtype=self.W_dec.dtype)
        return x.to(self.W_skip.dtype) @ self.W_skip.T

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The predicted output. Returns `decode(encode(x)) + skip(x)`."""
        return self.decode(self.encode(x)) + self.skip(x)


@checked_arguments
def train_transcoder(
    source,
    d_sae: int,
    k: int,
    variant: Variant = "batchtopk",
    seed: int = 0,
    *,
    skip: bool = False,
    n_train: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: Callable[[dict[str, Any]], None] | None = None,
    evaluate: Callable[[SAE], Mapping[str, float]] | None = None,
    report_every: int | None = None,
    site: str | None = None,
    target: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Transcoder:
    """A transcoder of `d_sae` latents from a module's input to its output.

    Parameters
    ----------
    source: two tensors (x [n, d_model], y [n, d_out]), or an iterator of such pairs; at least 200 samples.
    skip: whether a matrix W_skip carries the linear part.
    site, target: where x and y come from, e.g. "L3.resid_mid" and "L3.mlp".
    The others are those of `train_sae`.

    Returns a `Transcoder` on raw activations. Its decoder rows are not of norm 1: a latent's activation times the norm
    of its row is the size of what it writes. Raises what `train_sae` raises.
    """
    samples = Samples(source, seed, True, torch.device(device))
    recipe = Recipe(d_sae, k, variant, seed, n_train, batch_size, lr, warmup, dtype=str(dtype).removeprefix("torch."),
                    centred=False, skip=skip)  # fmt: skip
    run = Run(samples, completed(recipe, samples))
    run.train(checkpoint, checkpoint_every, progress, evaluate, report_every, lambda: _made(run.weights()))
    return _made(run.weights(), site=site, meta={**dict(meta or {}), "target": target, **run.describe()})


def _made(weights: dict[str, Any], **more: Any) -> Transcoder:
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return Transcoder(*(weights[n] for n in names), **{k: v for k, v in weights.items() if k not in names}, **more)
