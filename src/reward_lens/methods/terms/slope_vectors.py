"""Numbers over dimensions, declared or estimated prompt by prompt: how slopes and weights are read.

    estimate_i = mean over prompts of v_gi     variance = sum_g parts_gi^2,  parts_gi = (v_gi - mean) / sqrt(n (n - 1))

Parts of two estimates multiply to their covariance, for prompts that both have; a declared number has no parts.
"""

import dataclasses

import numpy as np

from reward_lens import stats
from reward_lens.errors import DataError
from reward_lens.result import Result

ESTIMATES = ("prompt_id", "attribute")


@dataclasses.dataclass(frozen=True)
class Vector:
    """N numbers; where they are estimates, what each prompt adds to their error."""

    value: np.ndarray
    parts: np.ndarray
    """[prompt, N], adding up to 0; the sum of squares is the variance. No rows for declared numbers"""
    prompts: list[str]
    n: np.ndarray
    """[N] prompts; infinite for declared numbers"""

    @property
    def estimated(self) -> bool:
        return bool(np.isfinite(self.n).any())

    def where(self, kept: np.ndarray) -> "Vector":
        """The same with a plain 0 in every other dimension."""
        value, parts = np.where(kept, self.value, 0.0), np.where(kept, self.parts, 0.0)
        return dataclasses.replace(self, value=value, parts=parts, n=np.where(kept, self.n, np.inf))

    def ends(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the t intervals, NaN under 6 prompts."""
        from scipy.stats import t

        half = t.ppf((1 + level) / 2, degrees(self.n)) * np.sqrt((self.parts**2).sum(0))
        return self.value - half, self.value + half


def degrees(n) -> np.ndarray:
    """Degrees of freedom of so many prompts; NaN under 6, where no interval is given."""
    n = np.asarray(n, dtype=float)
    return np.where(n >= stats.FEWEST, n - 1, np.nan)


def dimension_names(r, w, names) -> list[str]:
    """Attributes of r, else of w, else the names given, else 1 to N."""
    of = [_attributes(x) for x in (r, w)]
    found = of[0] or of[1] or (None if names is None else [str(name) for name in names])
    if found is None:
        found = [str(i + 1) for i in range(np.size(r))]
    wrong = len(set(found)) != len(found) or (of[0] and of[1] and set(of[0]) != set(of[1]))
    if wrong or (names is not None and [str(name) for name in names] != found):
        raise DataError(
            "The dimensions have no common names",
            found=f"r: {of[0] or 'numbers'}; w: {of[1] or 'numbers'}; names: {names}",
            expected="the same attributes in r and w, each once; names only where neither has any",
            do="fit the weights to the attributes of the slopes",
        )
    return found


def _attributes(x) -> list[str] | None:
    if not isinstance(x, Result) or "attribute" not in x.dataset:
        return None
    return [str(a) for a in x.dataset["attribute"].values]


def read_vector(x, name: str, dimensions: list[str]) -> Vector:
    if isinstance(x, Result):
        if set(x.value.dims) != set(ESTIMATES):
            raise DataError(
                f"{name} holds no estimates by prompt",
                found=f"the result '{x.name}' with dims {', '.join(map(str, x.value.dims))}",
                expected="N numbers, or the Result of sensitivity_slopes or fitted_weights",
                do="pass one of these",
            )
        values = x.value.sel(attribute=dimensions).transpose(*ESTIMATES).values
        there = np.isfinite(values)
        n = there.sum(0)
        mean = np.where(n > 0, np.where(there, values, 0.0).sum(0) / np.maximum(n, 1), np.nan)
        parts = np.where(there, values - mean, 0.0) / np.maximum(n, 1) * np.sqrt(n / np.maximum(n - 1, 1))
        return Vector(mean, parts, [str(k) for k in x.value["prompt_id"].values], n.astype(float))
    try:
        value = np.asarray(x, dtype=float)
    except (TypeError, ValueError) as error:
        raise _no_vector(name, repr(x)[:80], len(dimensions)) from error
    if value.shape != (len(dimensions),) or not np.isfinite(value).all():
        found = f"shape {value.shape}" if value.shape != (len(dimensions),) else f"{value.tolist()}"
        raise _no_vector(name, found, len(dimensions))
    return Vector(value, np.zeros((0, len(value))), [], np.full(len(value), np.inf))


def _no_vector(name: str, found: str, n: int) -> DataError:
    return DataError(f"{name} is no vector over the dimensions", found=found, expected=f"{n} finite numbers",
                     do="pass one number a dimension, in the same order for r and w")  # fmt: skip


def in_unit_of(worth: Vector, wanted: np.ndarray, has: np.ndarray) -> Vector:
    return dataclasses.replace(worth, value=worth.value * wanted / has, parts=worth.parts * wanted / has)


def read_covered(covered, n: int) -> np.ndarray:
    seen = np.ones(n, bool) if covered is None else np.asarray(covered)
    if seen.shape != (n,) or seen.dtype.kind not in "bi" or not np.isin(seen, [0, 1]).all():
        raise DataError("Which dimensions are covered was not understood", found=repr(covered)[:80],
                        expected=f"{n} booleans, or None for all", do="pass one boolean a dimension")  # fmt: skip
    return seen.astype(bool)


def aligned(pay: Vector, worth: Vector) -> tuple[Vector, Vector]:
    """Both over the prompts of either: a prompt that only one of them has adds nothing to their covariance."""
    prompts = list(dict.fromkeys([*pay.prompts, *worth.prompts]))
    place = {key: i for i, key in enumerate(prompts)}
    out = []
    for x in (pay, worth):
        parts = np.zeros((len(prompts), len(x.value)))
        parts[[place[key] for key in x.prompts]] = x.parts
        out.append(dataclasses.replace(x, parts=parts, prompts=prompts))
    return out[0], out[1]
