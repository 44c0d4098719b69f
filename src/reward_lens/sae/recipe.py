"""The settings of a training run with their defaults, and the statistics of the samples that it starts from."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.errors import DataError
from reward_lens.sae.batches import Samples
from reward_lens.sae.variants import VARIANTS

SAMPLE = 32_768  # samples that scale, variance and median are taken from ...
SAMPLE_NUMBERS = 2**26  # ... or as many as hold so many numbers, 256 MB
FEWEST_STEPS = 2_000
HIGHEST_RATE = 8e-3  # of short runs: the highest that was tried


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every setting that decides the weights; `train_sae` fills in what is None."""

    d_sae: int
    k: int
    variant: str = "batchtopk"
    seed: int = 0
    n_train: int | None = None
    """Samples to train on, repeats included."""
    batch_size: int | None = None
    lr: float | None = None
    warmup: int | None = None
    """Steps until the full rate."""
    prefixes: tuple[int, ...] | None = None
    """Matryoshka: numbers of latents that reconstruct on their own."""
    aux: float = 1 / 32
    dtype: str = "float32"
    centred: bool = True
    """b_dec is subtracted from the input."""
    skip: bool = False

    @property
    def steps(self) -> int:
        return (self.n_train or 0) // (self.batch_size or 1)

    @property
    def dead_after(self) -> int:
        return int(min(1e7, 0.1 * (self.n_train or 0)))

    @property
    def memory(self) -> float:
        """Decay of the running threshold: 1,000 steps, but at most a tenth of the run."""
        return min(0.999, max(0.0, 1 - 10 / self.steps))

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        up = min(1.0, (step + 1) / max(1, self.warmup or 0))
        return (self.lr or 0.0) * up * min(1.0, (self.steps - step) / max(1.0, 0.2 * self.steps))


def completed(recipe: Recipe, samples: Samples) -> Recipe:
    """The recipe with its defaults filled in for these samples."""
    if recipe.n_train is None and samples.one_pass:
        raise DataError("An iterator does not say how long it is", found="n_train=None", do="pass n_train=",
                        expected="the number of samples: rate and dead latents are timed by it")  # fmt: skip
    n = samples.n or recipe.n_train or len(samples.first(SAMPLE)[0])
    size = recipe.batch_size or min(2048, max(64, n // 64))
    total = recipe.n_train or max(n, FEWEST_STEPS * size)
    steps = total // max(1, size)
    whole, nested = recipe.d_sae, recipe.variant == "matryoshka"
    usual = tuple(sorted({max(1, whole // part) for part in (16, 8, 4, 2, 1)})) if nested else None
    filled = dataclasses.replace(
        recipe, n_train=total, batch_size=size,
        lr=usual_rate(whole, steps) if recipe.lr is None else recipe.lr,
        warmup=min(1000, steps // 10) if recipe.warmup is None else recipe.warmup,
        prefixes=recipe.prefixes or usual,
    )  # fmt: skip
    prefixes = list(filled.prefixes or ())
    wrong = [
        text
        for text, bad in {
            f"d_sae={whole}": whole < 1,
            f"k={recipe.k}": not 1 <= recipe.k <= whole,
            f"variant={recipe.variant!r}": recipe.variant not in VARIANTS,
            f"n_train={total}": total < size,
            f"batch_size={size}": size < 2,
            f"lr={filled.lr}": not 0 < (filled.lr or 0) < math.inf,
            f"warmup={filled.warmup}": not 0 <= (filled.warmup or 0) <= steps,
            f"dtype={recipe.dtype}": recipe.dtype not in ("float32", "bfloat16"),
            f"prefixes={prefixes}": bool(prefixes)
            and (not nested or prefixes != sorted(set(prefixes)) or prefixes[0] < 1 or prefixes[-1] != whole),
        }.items()
        if bad
    ]
    if wrong:
        raise DataError(
            "The training was not understood",
            found=", ".join(wrong),
            expected=f"1 <= k <= d_sae, a variant of {', '.join(VARIANTS)}, a batch of at least 2 and no more than "
            "n_train, a positive lr, a warm-up within the steps, float32 or bfloat16, prefixes that grow to d_sae, for "
            "matryoshka alone",
            do="correct these; what is left out has a default",
        )
    return filled


def usual_rate(d_sae: int, steps: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14); in fewer than 2,000 steps more, up to 8e-3, so that a short run goes as far."""
    rate = 2e-4 / math.sqrt(d_sae / 2**14)
    return max(rate, min(HIGHEST_RATE, rate * FEWEST_STEPS / max(1, steps)))


def geometric_median(x: Float[Tensor, "n d"], steps: int = 100) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the samples, by Weiszfeld's iteration.

    Returns [d]. Unlike the mean it is not drawn away by a few samples of huge norm.
    """
    middle = x.mean(0)
    spread = _distances(x, middle).mean()
    for _ in range(steps):
        weight = 1 / _distances(x, middle).clamp(min=1e-6 * float(spread) + 1e-30)
        moved = weight @ x / weight.sum()
        shift, middle = (moved - middle).norm(), moved
        if shift <= 1e-5 * spread:
            break
    return middle


def scale_around(x: Float[Tensor, "n d"], middle: Float[Tensor, " d"]) -> float:
    """What makes the mean squared distance from a point 1."""
    size = float(_distances(x, middle).square().mean().sqrt())
    if not size > 1e-6 * float(x.abs().max()):
        raise DataError(
            "The samples are all equal",
            found="a variance of zero",
            expected="samples that differ",
            do="check which site and positions were captured",
        )
    return 1 / size


def sample_size(width: int) -> int:
    """How many samples the statistics are taken from."""
    return min(SAMPLE, max(1024, SAMPLE_NUMBERS // width))


def _distances(x: Tensor, middle: Tensor) -> Tensor:
    """Without a table of differences, which would be as large as the samples."""
    return torch.cdist(x, middle[None], compute_mode="donot_use_mm_for_euclid_dist").squeeze(1)
