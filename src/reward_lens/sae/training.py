"""Train a sparse autoencoder on activations.

    scale     x' = s x with E |x' - b|^2 = 1, b the geometric median; s is folded into the weights at the end
    start     decoder rows random and of norm 1, encoder their transpose, b_dec = s b
    loss      |x' - x^|^2 / variance  +  1/32 AuxK: the latents that are dead reconstruct what is left over
    step      decoder gradient without its part along the row, clip at norm 1, Adam, rows back to norm 1
    rate      2e-4 / sqrt(d_sae / 2^14), a linear warm-up, a linear decay over the last fifth; a run of fewer than 2,000
              steps has that rate times 2,000 / steps, up to 8e-3

The scale is taken around the median, not around zero: where all samples share a large offset, as at late sites, what is
to be reconstructed would otherwise be tiny against the step size. A latent is dead that did not fire for
min(1e7, 10% of the training samples), so that AuxK acts on small data too.

What it cannot show: that latents are what the model computes with, or that another seed finds them. FVU, L0 and dead
share of the progress are those of the training samples.

Reference: Gao et al. 2024, arXiv 2406.04093 (recipe, AuxK, rate; the factor for short runs is ours: 205 steps on
activations of the demo model left an FVU of .346 without it and .23 with it); `sae.variants` names the papers of the
variants.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.result import Check
from reward_lens.sae import checkpoints
from reward_lens.sae.batches import FEWEST_SAMPLES, Samples, too_few
from reward_lens.sae.dictionary import SAE
from reward_lens.sae.recipe import Recipe, completed, geometric_median, sample_size, scale_around
from reward_lens.sae.variants import Net, Pass, forward

FIRINGS = 100  # firings a latent that the recipe counts on, by a rule of thumb
_ENOUGH = "FVU, L0 and dead share are those of the training samples; other samples can differ."
_FEW = (
    "With fewer, latents describe these samples more than the model: expect a higher FVU on other samples and other "
    "latents from another seed, and compare both before reading a latent."
)
Variant = Literal["batchtopk", "topk", "jumprelu", "matryoshka"]


@checked_arguments
def train_sae(
    source,
    d_sae: int,
    k: int,
    variant: Variant = "batchtopk",
    seed: int = 0,
    *,
    n_train: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    prefixes: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: Callable[[dict[str, Any]], None] | None = None,
    evaluate: Callable[[SAE], Mapping[str, float]] | None = None,
    report_every: int | None = None,
    site: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> SAE:
    """A dictionary of `d_sae` directions, of which about `k` are active in a sample, that reconstructs activations.

    Parameters
    ----------
    source: a tensor [n, d_model], an `ActivationStore`, or an iterator of tensors [b, d_model]; at least 200 samples.
    variant: "batchtopk" (saved with its threshold, as JumpReLU), "topk" (exactly k), "jumprelu" (learned thresholds; k
        is the mean that the loss aims at) or "matryoshka" (BatchTopK whose first latents reconstruct on their own).
    n_train: samples to train on, repeats included, in whole batches. None: one pass, or as many as make 2,000 steps.
        An iterator is gone through once and needs the number.
    batch_size: samples a step. None: a 64th of the samples, from 64 to 2,048.
    lr, warmup: None: 2e-4 / sqrt(d_sae / 2^14), more in under 2,000 steps (see above); a tenth of the steps, at most
        1,000.
    prefixes: for "matryoshka", growing numbers of latents up to d_sae. None: a 16th, 8th, quarter, half and all.
    dtype: of the large products, torch.float32 or torch.bfloat16; weights, sums and optimizer stay in float32.
    checkpoint: a folder; a run that finds its own checkpoint there goes on from it, with the same weights in the end as
        if it had never stopped (same seed, CPU). Written every `checkpoint_every` steps and at the end.
    progress: called every `report_every` steps (None: 50 times) with step, samples, loss, fvu, l0, dead and lr.
    evaluate: called with the dictionary as it is then; its numbers, such as the reward recovered, join the progress.
    site, meta: where the activations come from; taken from a store where not given.

    Returns an `SAE` on raw activations, with unit-norm decoder rows. Its `meta` has the settings, the progress, the
    last FVU, L0 and dead share (of the training samples), and under `enough` and `trust` whether the samples are as
    many as the recipe counts on, and what that means.
    Raises `DataError` under 200 samples, for samples that are not finite or all equal, and for settings out of range.
    """
    samples = Samples(source, seed, False, torch.device(device))
    recipe = Recipe(d_sae, k, variant, seed, n_train, batch_size, lr, warmup, tuple(prefixes) if prefixes else None,
                    dtype=str(dtype).removeprefix("torch."))  # fmt: skip
    run = Run(samples, completed(recipe, samples))
    run.train(checkpoint, checkpoint_every, progress, evaluate, report_every, lambda: SAE(**run.weights()))
    found = {**_of_store(samples.store), **dict(meta or {}), **run.describe()}
    own = found.pop("site", None)
    return SAE(**run.weights(), site=site or own, meta=found)


class Run:
    """Weights in training, and what decides the next step: optimizer, counters of silence, threshold, position."""

    def __init__(self, samples: Samples, recipe: Recipe):
        self.samples, self.recipe, self.step = samples, recipe, 0
        x, y = samples.first(sample_size(max(samples.d_in, samples.d_out)))
        if len(x) < FEWEST_SAMPLES:
            raise too_few(len(x))
        middle = self._measured(x, y)
        generator = torch.Generator().manual_seed(recipe.seed)
        enc, dec = self._begun(torch.randn(recipe.d_sae, samples.d_in, generator=generator).to(x.device), y is None)
        self.net = Net(enc, dec, middle, jumps=recipe.variant == "jumprelu", skip=recipe.skip, centred=recipe.centred)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.0, eps=6.25e-10, fused=True)
        self.silent = torch.zeros(recipe.d_sae, dtype=torch.int64, device=x.device)
        """Samples since each latent was last active."""
        self.level, self.width = self._first_level(x)
        self.stream: dict[str, Any] | None = None
        """Where a store's batches go on after a checkpoint."""
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(4, dtype=torch.float64)
        """Loss, FVU and L0, summed over the steps since the last report, and the number of these."""

    def _measured(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Set the scales and the scaled variance. Returns where b_dec begins, scaled."""
        target = x if y is None else y
        middle = geometric_median(target)
        self.scale_out: float | Tensor = scale_around(target, middle)
        self.scale_in = self.scale_out if y is None else scale_around(x, torch.zeros_like(x[0]))
        self.variance = float(target.var(0, correction=0).sum()) * self.scale_out**2
        return middle * self.scale_out

    def _begun(self, rows: Tensor, same: bool) -> tuple[Tensor, Tensor]:
        """Encoder and decoder that the training begins with, from random rows."""
        enc = rows / rows.norm(dim=1, keepdim=True)
        # A transcoder's decoder begins at zero (its best guess is the mean), and has no norm to keep.
        return enc, enc.clone() if same else enc.new_zeros(self.recipe.d_sae, self.samples.d_out)

    def _sizes(self, dec: Tensor) -> Tensor:
        """What every row of the decoder is kept at 1 in, [d_sae, 1]."""
        return dec.norm(dim=1, keepdim=True)

    def _along(self, dec: Tensor) -> Tensor:
        """The rows' directions, of norm 1."""
        return dec

    def train(self, checkpoint, checkpoint_every: int, progress, evaluate, report_every: int | None, current) -> None:
        """All steps that are left."""
        for name, number in (("checkpoint_every", checkpoint_every), ("report_every", report_every)):
            if number is not None and number < 1:
                raise DataError(f"{name} is no number of steps", found=f"{name}={number}", expected="1 or more",
                                do="leave it at its default")  # fmt: skip
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is not None:
            self._resume(folder)
        recipe, every = self.recipe, report_every or max(1, self.recipe.steps // 50)
        batches = self.samples.batches(recipe.batch_size or 1, self.step * (recipe.batch_size or 1), self.stream)
        while self.step < recipe.steps:
            x, y = next(batches, (None, None))
            if x is None:
                raise DataError(
                    "The samples ended before the training",
                    found=f"an iterator that gave fewer than {recipe.n_train:,} samples, {self.step} steps of them",
                    expected=f"{recipe.steps} steps of {recipe.batch_size} samples",
                    do="pass n_train= as many as there are, or a tensor or store, which is gone through again",
                )
            self._step(x, y)
            if self.step % every == 0 or self.step == recipe.steps:
                self._report(progress, evaluate, current)
            if folder is not None and (self.step % checkpoint_every == 0 or self.step == recipe.steps):
                self._write(folder)

    def weights(self) -> dict[str, Any]:
        """The arguments of a dictionary on raw samples: both scales folded in, decoder rows as trained."""
        net, out = self.net, self.scale_out
        level = net.threshold if net.threshold is not None else None
        if self.recipe.variant in ("batchtopk", "matryoshka"):
            level = torch.full_like(net.b_enc, self.level)
        kept: dict[str, Any] = {"activation": "topk", "k": self.recipe.k}
        if level is not None:
            kept = {"activation": "jumprelu", "threshold": (level.detach() / out).clone()}
        folded = {
            "W_enc": (net.enc.detach().T * (self.scale_in / out)).contiguous(),
            "b_enc": net.b_enc.detach() / out,
            "W_dec": net.dec.detach().clone(),
            "b_dec": net.b_dec.detach() / out,
        }
        if net.skip is not None:
            folded["W_skip"] = net.skip.detach() * (self.scale_in / out)
        return {**folded, **kept, "apply_b_dec_to_input": self.recipe.centred}

    def describe(self) -> dict[str, Any]:
        """Settings, outcome, and how far the number of samples carries."""
        recipe, train = self.recipe, self.recipe.n_train or 0
        n = min(self.samples.n or train, train)
        needed = math.ceil(FIRINGS * recipe.d_sae / recipe.k)
        enough = Check("samples for the recipe", needed / n, 1.0, f"{n} samples, {needed} counted on")
        a_latent = n * recipe.k / recipe.d_sae
        trust = f"{n:,} different samples, in which a latent is active {a_latent:.0f} times on average. The recipe "
        trust += f"counts on {needed:,} ({FIRINGS} times a latent). {_ENOUGH if enough.passed else _FEW}"
        last = self.history[-1] if self.history else {}
        return {
            "settings": {**dataclasses.asdict(recipe), "prefixes": list(recipe.prefixes or ())},
            "seed": recipe.seed, "variant": recipe.variant, "k": recipe.k, "n_samples": self.samples.n,
            "n_train": recipe.n_train, "passes": train / (self.samples.n or train),
            "versions": _versions(), "fvu": last.get("fvu"), "l0": last.get("l0"), "dead": last.get("dead"),
            "progress": list(self.history), "enough": {**dataclasses.asdict(enough), "passed": enough.passed},
            "trust": trust,
        }  # fmt: skip

    @torch.enable_grad()
    def _step(self, x: Tensor, y: Tensor | None) -> None:
        recipe, net = self.recipe, self.net
        x = x * self.scale_in
        target = x if y is None else y * self.scale_out
        done = self._forward(x)
        errors = [(part - target).square().sum(1).mean() for part in done.parts]
        loss = torch.stack(errors).mean() / self.variance
        dead = self.silent >= recipe.dead_after
        if recipe.aux and bool(dead.any()):
            loss = loss + recipe.aux * self._aux(net.centre(x).detach(), (target - done.parts[-1]).detach(), dead)
        if net.threshold is not None:
            eager = min(1.0, (self.step + 1) / max(1, recipe.warmup or 0))
            loss = loss + eager * (done.active / recipe.k - 1) ** 2
        net.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.centred:  # rows keep their size: what is along them would be undone below
            grad, along = _grad(net.dec), self._along(net.dec.detach())
            grad -= (grad * along).sum(1, keepdim=True) * along
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = recipe.rate(self.step)
        self.optimizer.step()
        with torch.no_grad():
            if recipe.centred:
                net.dec.div_(self._sizes(net.dec))
            if net.threshold is not None:
                net.threshold.clamp_(min=0)
        if done.lowest is not None:
            self.level = recipe.memory * self.level + (1 - recipe.memory) * float(done.lowest)
        self.silent = torch.where(done.fired, 0, self.silent + len(x))
        seen = torch.stack([loss, errors[-1] / self.variance, done.active, torch.ones_like(loss)])
        self.sums += seen.detach().double().cpu()
        self.step += 1

    def _forward(self, x: Tensor) -> Pass:
        recipe = self.recipe
        dtype = getattr(torch, recipe.dtype)
        return forward(self.net, x, recipe.variant, recipe.k, recipe.prefixes or (), self.level, self.width, dtype)

    def _aux(self, centred: Tensor, left: Tensor, dead: Tensor) -> Tensor:
        """Share of what is left over that the dead latents, the d / 2 largest of a sample, do not reconstruct."""
        index = dead.nonzero().squeeze(1)
        most = max(1, left.shape[1] // 2)
        z = torch.relu(centred @ self.net.enc[index].T + self.net.b_enc[index])
        if len(index) > most:
            values, at = z.topk(most, dim=1, sorted=False)
            z = torch.zeros_like(z).scatter(1, at, values)
        error = (z @ self.net.dec[index] - left).square().sum(1).mean()
        spread = (left - left.mean(0)).square().sum(1).mean()
        return torch.nan_to_num(error / spread, nan=0.0, posinf=0.0) * min(1.0, len(index) / most)

    def _first_level(self, x: Tensor) -> tuple[float, float]:
        """The pre-activation that the k largest of a sample lie over on average, and a window's width around it."""
        some = x[: max(32, min(2048, 2**24 // self.recipe.d_sae))] * self.scale_in
        with torch.no_grad():
            pre = self.net.centre(some) @ self.net.enc.T
            level = float(pre.flatten().kthvalue(max(1, pre.numel() - self.recipe.k * len(some))).values.clamp(min=0))
            if self.net.threshold is not None:
                self.net.threshold.fill_(level)
        return level, 0.1 * float(pre.std())

    def _report(self, progress, evaluate, current) -> None:
        loss, fvu, l0 = (self.sums[:3] / self.sums[3]).tolist()
        self.sums.zero_()
        dead = float((self.silent >= self.recipe.dead_after).double().mean())
        entry = {"step": self.step, "samples": self.step * (self.recipe.batch_size or 0), "loss": loss, "fvu": fvu,
                 "l0": l0, "dead": dead, "lr": self.recipe.rate(self.step - 1)}  # fmt: skip
        if not math.isfinite(loss):
            raise DataError("The training diverged", found=f"a loss of {loss} at step {self.step}",
                            expected="a finite loss", do="lower lr, or look for samples of extreme norm")  # fmt: skip
        if evaluate is not None:
            entry |= {name: float(value) for name, value in evaluate(current()).items()}
        self.history.append(entry)
        if progress is not None:
            progress(dict(entry))

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.recipe), "source": self.samples.fingerprint()}

    def _write(self, folder: Path) -> None:
        tensors = {**dict(self.net.named_parameters()), "silent": self.silent, "sums": self.sums}
        checkpoints.write(folder, tensors, self.optimizer, {
            "settings": self._settings(), "step": self.step, "level": self.level, "width": self.width,
            "stream": self.samples.state(), "scales": self._scales(), "history": self.history,
        })  # fmt: skip

    def _resume(self, folder: Path) -> None:
        found = checkpoints.read(folder, self._settings())
        if found is None:
            return
        tensors, state = found
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(tensors[name])
        self.silent, self.sums = tensors["silent"].to(self.silent.device), tensors["sums"]
        checkpoints.restore(self.optimizer, tensors)
        self.step, self.level, self.width, self.history = (state[n] for n in ("step", "level", "width", "history"))
        self._take_scales(state["scales"])
        self.stream = state["stream"]

    def _scales(self) -> list[Any]:
        return [self.scale_in, self.scale_out, self.variance]

    def _take_scales(self, held: list[Any]) -> None:
        self.scale_in, self.scale_out, self.variance = held


def _of_store(store: Any) -> dict[str, Any]:
    """Site, model and the rest of what a store says of its samples."""
    if store is None:
        return {}
    model = store.meta.get("model")
    named = dict(model) if isinstance(model, Mapping) else {"name": model}
    return {"site": str(store.site), "model": named.get("name"), "revision": named.get("revision"),
            "store": dict(store.meta)}  # fmt: skip


def _grad(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _versions() -> dict[str, str]:
    found = {}
    for name in ("reward-lens", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
