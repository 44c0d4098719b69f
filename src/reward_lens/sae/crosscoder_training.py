"""Train a BatchTopK crosscoder: one dictionary of the activations that several models have of the same texts.

    scale     x'_m = s_m x_m with the total variance of every model 1; s_m is folded into the weights at the end
    latents   z = act(sum_m (x'_m - b_m) W_enc_m + b_enc), the k * batch largest v_j of a batch kept
    select    v_j = z_j sum_m |W_dec_m[j]|
    loss      mean over models of |x'_m - x^'_m|^2  +  1/32 AuxK

v_j is the published choice: the activation times the sum of the decoder rows' norms (the sum that the L1 crosscoder
penalises), which is how much a latent writes in all. Of two latents that write equally much into one model, one that
writes into both is thus kept first; a latent of one model has to be the larger, which errs towards shared latents, not
towards differences. The map does not change when z_j grows and the rows shrink alike, so rows are kept at
sum_m |W_dec_m[j]| = 1 after every step, and v_j = z_j: the dictionary is a BatchTopK autoencoder of the models'
activations side by side with another norm of its rows. All else is the recipe of `sae.training`. At inference a
threshold stands in for the selection (JumpReLU), the running mean of the smallest z kept.

BatchTopK has no penalty on norms, which is what makes rows of a model vanish under L1 (complete shrinkage), and latents
compete for places, which works against a shared latent being kept as two (latent decoupling): reduced, not excluded.

What it cannot show: which latents a model uses, or that another seed finds them.

Reference: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing"; Minder et al. 2025,
arXiv 2504.02922 (BatchTopK crosscoder); keeping the sum of norms at 1 instead of leaving it free is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_lens.arguments import checked_arguments
from reward_lens.engine.joined_stores import JoinedStores
from reward_lens.errors import DataError
from reward_lens.sae.crosscoder import Crosscoder
from reward_lens.sae.joined_samples import JoinedSamples
from reward_lens.sae.recipe import Recipe, completed, geometric_median, sample_size
from reward_lens.sae.training import Run


@checked_arguments
def train_crosscoder(
    sources,
    d_sae: int,
    k: int,
    seed: int = 0,
    *,
    n_train: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: Callable[[dict[str, Any]], None] | None = None,
    evaluate: Callable[[Crosscoder], Mapping[str, float]] | None = None,
    report_every: int | None = None,
    names: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Crosscoder:
    """A dictionary of `d_sae` latents, of which about `k` are active in a sample, that reconstructs several models.

    Parameters
    ----------
    sources: a tuple of tensors [n, d_m], one a model, row i of each the same position of the same text; a tuple of as
        many stores (`ActivationStore`) of the same texts (every sample's text, position and token are compared); or an
        iterator of tuples of tensors [b, d_m]. At least 200 samples. Stores of two models can be made one after the
        other, so one model is in memory at a time.
    names, sites: of the models and where their activations come from; taken from stores where not given.
    The others as in `train_sae`; a checkpoint goes on with the same weights as a run that was never stopped.

    Returns a `Crosscoder` on raw activations, with sum_m s_m |W_dec_m[j]| = 1 for every latent. Its `meta` has the
    settings, the progress, `fvu_of_models` (of up to 32,768 of the training samples), and under `enough` and `trust`
    whether the samples are as many as the recipe counts on, and what that means.
    Raises `DataError` for under 200 samples, unequal numbers of rows, stores of other texts, positions or tokens,
    samples that are not finite or all equal, and settings out of range.
    """
    samples = JoinedSamples(sources, seed, torch.device(device))
    recipe = Recipe(d_sae, k, "batchtopk", seed, n_train, batch_size, lr, warmup,
                    dtype=str(dtype).removeprefix("torch."))  # fmt: skip
    run = CrossRun(samples, completed(recipe, samples))
    run.train(checkpoint, checkpoint_every, progress, evaluate, report_every, lambda: Crosscoder(**run.weights()))
    of_stores = _of_stores(samples)
    names, sites = names or of_stores.get("names"), sites or of_stores.get("sites")
    found = {"fvu_of_models": run.fvu_of_models(), **of_stores.get("meta", {}), **dict(meta or {}), **run.describe()}
    return Crosscoder(**run.weights(), names=names, sites=sites, meta=found)


class CrossRun(Run):
    """A run on samples [b, sum of widths], every model's part in its own scale."""

    samples: JoinedSamples
    scale_in: Tensor
    scale_out: Tensor

    def _measured(self, x: Tensor, y: Tensor | None) -> Tensor:
        self.of_models = x.new_tensor([_scale(part, m) for m, part in enumerate(self._parts(x))])
        self.scale_in = self.scale_out = self._spread(self.of_models)
        self.variance = float(len(self.of_models))
        return torch.cat([geometric_median(part) for part in self._parts(x)]) * self.scale_out

    def _begun(self, rows: Tensor, same: bool) -> tuple[Tensor, Tensor]:
        # Rows of different models are drawn apart: a latent that never learns has unrelated ones.
        dec = rows / self._sizes(rows)
        return dec / dec.square().sum(1, keepdim=True), dec

    def _sizes(self, dec: Tensor) -> Tensor:
        return torch.stack([part.norm(dim=1) for part in self._parts(dec)]).sum(0)[:, None]

    def _along(self, dec: Tensor) -> Tensor:
        return dec / dec.norm(dim=1, keepdim=True)

    def weights(self) -> dict[str, Any]:
        """The arguments of a `Crosscoder` on raw samples."""
        net, scale = self.net, self.scale_out
        enc, dec, bias = net.enc.detach() * scale, net.dec.detach() / scale, net.b_dec.detach() / scale
        return {
            "W_enc": [part.T.contiguous() for part in self._parts(enc)],
            "b_enc": net.b_enc.detach().clone(),
            "W_dec": [part.clone() for part in self._parts(dec)],
            "b_dec": [part.clone() for part in bias.split(self.samples.widths)],
            "threshold": torch.full_like(net.b_enc, self.level).detach(),
            "scale": self.of_models.clone(),
        }

    def fvu_of_models(self) -> list[float]:
        """Share of every model's variance that the crosscoder leaves over, on the samples the run began with."""
        x, _ = self.samples.first(sample_size(self.samples.d_in))
        crosscoder = Crosscoder(**self.weights())
        left = torch.zeros(len(self.samples.widths), dtype=torch.float64)
        for some in x.split(4096):
            parts = self._parts(some)
            for m, (part, found) in enumerate(zip(parts, crosscoder(*parts), strict=True)):
                left[m] += float((part - found).square().sum(dtype=torch.float64))
        spread = [float(part.var(0, correction=0).sum()) * len(x) for part in self._parts(x)]
        return [float(a) / b for a, b in zip(left, spread, strict=True)]

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.samples.widths, 1)

    def _spread(self, of_models: Tensor) -> Tensor:
        """[sum of widths] from one number a model."""
        return of_models.repeat_interleave(torch.tensor(self.samples.widths, device=of_models.device))

    def _scales(self) -> list[Any]:
        return self.of_models.tolist()

    def _take_scales(self, held: list[Any]) -> None:
        self.of_models = torch.tensor(held).to(self.of_models)
        self.scale_in = self.scale_out = self._spread(self.of_models)


def _scale(x: Tensor, model: int) -> float:
    """One over the root of a model's total variance."""
    spread = float(x.var(0, correction=0).sum().sqrt())
    if not spread > 1e-6 * float(x.abs().max()):
        raise DataError(f"The samples of model {model} are all equal", found="a variance of zero",
                        expected="samples that differ", do="check which site and positions were captured")  # fmt: skip
    return 1 / spread


def _of_stores(samples: JoinedSamples) -> dict[str, Any]:
    """Names, sites and identities of the models, where stores say them."""
    if not isinstance(samples.store, JoinedStores):
        return {}
    stores = samples.store.stores
    return {
        "names": [str(store.meta["model"]["name"]) for store in stores],
        "sites": [str(store.site) for store in stores],
        "meta": {"trained_on": [dict(store.meta["model"]) for store in stores], "stores": samples.store.meta["joined"]},
    }
