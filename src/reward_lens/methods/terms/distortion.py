"""How far does paying a signal pull effort from what welfare asks for? The distortion index of each quality dimension.

    w~_i = lam r_i + (1 - lam) w_i  where covered,  (1 - lam) w_i  elsewhere
    D_i  = w~_i / w_i                   the index, signed: 1 undistorted, 1 - lam uncovered, under 0 the wrong way
    D_i / Dbar,  Dbar = sum w~ / sum w  for a fixed budget: over 1 the dimension gets more effort than is best
    |D_i - 1|                           severity
    K / N, kappa = (N - K) / N          coverage and incompleteness: K of N dimensions are paid for

r is what the signal pays per unit, w > 0 what it is worth. With log production e_i / e_i(best) = D_i / Dbar exactly.
`normalise` multiplies r by sum |w| / sum |r| over the covered dimensions, for the two have different units. lam, the
share of behaviour that the signal drives, cannot be read off a reward model: every number is given over lam.

Ours, beside the paper (which is theory only): estimated r and w, Fieller's intervals of D, K estimated from slopes. The
SDs that estimates are in are taken as known.

What this cannot show: that the dimensions are the right ones (their number is the analyst's, and K / N moves with it),
or that a policy trained on the signal would end there.

Reference: Wang and Huang 2026, "Reward Hacking as Equilibrium under Finite Evaluation", arXiv 2603.28063.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.shared.fieller import RatioSet, fieller
from reward_lens.methods.terms.slope_vectors import (
    Vector,
    aligned,
    degrees,
    dimension_names,
    in_unit_of,
    read_covered,
    read_vector,
)
from reward_lens.result import Check, Result

LAMBDAS = (0.25, 0.5, 0.75, 1.0)
DIMS = ("dimension", "lam")


@checked_arguments
def distortion_index(
    r,
    w,
    covered=None,
    lam: int | float = 1.0,
    normalise: bool = True,
    names: Iterable | None = None,
    level: float = 0.95,
) -> Result:
    """The distortion index of N >= 2 dimensions, at `lam` and at .25, .5, .75 and 1.

    Parameters
    ----------
    r: what the signal pays, N numbers or the Result of `sensitivity_slopes`.
    w: what each dimension is worth, N numbers above 0 or the Result of `fitted_weights`. Two Results are matched by
        attribute, and weights are put into the unit of the slopes where their SDs are of different pools.
    covered: N booleans, whether the signal sees the dimension; by default all.
    lam: share of behaviour driven by the signal, 0 to 1; 1 is the worst case.
    normalise: rescale r so that sum |r| = sum |w| over the covered dimensions.
    names: of the dimensions, where neither r nor w has any.
    level: of the intervals; 1 - level is the level at which a slope counts for the estimated K.

    Returns value (dimension, lam), the signed ratio D. low and high where r or w is estimated (NaN under 6 prompts):
    Fieller's, with the covariance of the prompts that r and w share, infinite where the interval of a weight includes
    0. Coordinates over both dims: `over_mean` (D / Dbar) with `over_mean_low` and `over_mean_high`, `severity` with
    `severity_low` and `severity_high`; over lam: `mean_index` (Dbar; not above 0 it compares nothing: D / Dbar is
    NaN, and a check says so); over dimension: `r` (as rescaled), `w`, `covered`, `weight` (a word where an estimated
    weight is not clearly above 0).
    meta: `coverage` (N, K, K / N, kappa, and K estimated: slopes whose
    Holm-adjusted p is under 1 - level), `unbounded` (infinite intervals in words), `scale` (what r was multiplied by)
    and `congruity`, the cosine of r and w (Baker 1992), which is not this paper's.

    Raises `DataError` for declared weights that are not above 0, lengths or names that do not match, no slope for a
    covered dimension, and r = 0 where it is to be rescaled. Cannot show how much of a policy's behaviour the signal
    drives: lam is an assumption.
    """
    dimensions = dimension_names(r, w, names)
    pay, worth = read_vector(r, "r", dimensions), read_vector(w, "w", dimensions)
    if isinstance(r, Result) and isinstance(w, Result):
        worth = in_unit_of(worth, *(x.dataset["attribute_sd"].sel(attribute=dimensions).values for x in (r, w)))
    seen = read_covered(covered, len(dimensions))
    _require(pay, worth, seen, lam, level, dimensions)
    shared = len(set(pay.prompts) & set(worth.prompts))
    pay, worth = aligned(pay.where(seen), worth)
    scaled, scale = _rescaled(pay, worth, seen) if normalise else (pay, 1.0)
    n = _prompts(pay, worth, normalise)
    lams = np.array(sorted({*LAMBDAS, float(lam)}))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(worth.value == 0, np.nan, scaled.value / worth.value)
    signal = _signal(scaled, worth, seen, n, level)
    index, low, high = (_along(x, lams) for x in (np.where(seen, ratio, 0.0), signal.low, signal.high))
    over = np.stack([_over_mean(scaled, worth, seen, x, n.min(), level) for x in lams.tolist()], -1)
    mean_index = lams * scaled.value.sum() / worth.value.sum() + 1 - lams
    compares = mean_index > 0
    over[..., ~compares] = np.nan
    coords: dict[str, Any] = {
        "dimension": np.array(dimensions, dtype=object),
        "lam": lams,
        "r": ("dimension", scaled.value),
        "w": ("dimension", worth.value),
        "covered": ("dimension", seen.astype(int)),
        "weight": ("dimension", np.array(_weight_words(worth, level), dtype=object)),
        "mean_index": ("lam", mean_index),
        "over_mean": (DIMS, over[0]),
        "severity": (DIMS, np.abs(index - 1)),
    }
    estimated = pay.estimated or worth.estimated
    if estimated:
        ends = (*over[1:], *_severity(low, high))
        keys = ("over_mean_low", "over_mean_high", "severity_low", "severity_high")
        coords |= {key: (DIMS, end) for key, end in zip(keys, ends, strict=True)}
    value = xr.DataArray(index, dims=DIMS, coords=coords)
    checks = []
    if not compares.all():
        which = ", ".join(f"{x:g}" for x in lams[~compares])
        checks.append(
            Check("lambdas without D / Dbar", float((~compares).sum()), np.inf, f"Dbar not above 0 at {which}")
        )
    if np.isfinite(over[0][:, compares]).all() and compares.any():
        known = over[0][:, compares]
        mean, size = worth.value @ known / worth.value.sum(), np.abs(worth.value) @ np.abs(known)
        gap = np.abs(mean - 1) / np.maximum(1, size / abs(worth.value.sum()))
        checks.append(Check("the weighted mean of D / Dbar is 1", float(gap.max()), 1e-9))
    meta = _provenance(r, w) | {
        "title": f"Distortion index, lambda {float(lam):g} and others",
        "settings": {"lam": float(lam), "normalise": normalise}, "scale": scale,
        "interval": _interval_words(pay, worth, n, level, shared, normalise),
        "unbounded": _unbounded(signal, worth, dimensions, float(lam), level),
        "coverage": _coverage(r, seen, dimensions, 1 - level),
        "congruity": _congruity(scaled, worth, n, level),
        "shows": "Where the signal pays more or less than a dimension is worth, for each share of behaviour (lambda) "
        "that the signal might drive; D / Dbar says which dimensions get too much of a fixed budget of effort.",
        "cannot_show": "The value of lambda, that these are all the dimensions that matter, or that a policy trained "
        "on the signal would end there.",
    }  # fmt: skip
    summary = {"low": value.copy(data=low), "high": value.copy(data=high)} if estimated else {}
    return Result("distortion_index", value, unit="ratio", checks=checks, meta=meta,
                  undefined="a fitted weight of 0" if (worth.value == 0).any() else None, **summary)  # fmt: skip


def _require(
    pay: Vector, worth: Vector, seen: np.ndarray, lam: int | float, level: float, dimensions: list[str]
) -> None:
    if len(dimensions) < 2 or not 0 <= lam <= 1 or not 0 < level < 1:
        raise DataError(
            "The distortion index was not understood",
            found=f"{len(dimensions)} dimension(s), lam={lam}, level={level}",
            expected="two dimensions or more (effort for one is taken from another), lam from 0 to 1, "
            "a level between 0 and 1",
            do="correct these",
        )
    if not worth.estimated and not (worth.value > 0).all():
        wrong = [f"{d} {v:g}" for d, v in zip(dimensions, worth.value, strict=True) if not v > 0]
        raise DataError("A declared weight is not above 0", found=", ".join(wrong), expected="w > 0",
                        do="turn a dimension that is bad round (score its absence), or leave it out")  # fmt: skip
    missing = [d for d, v, c in zip(dimensions, pay.value, seen, strict=True) if c and not np.isfinite(v)]
    missing += [d for d, v in zip(dimensions, worth.value, strict=True) if not np.isfinite(v)]
    if missing:
        raise DataError("A dimension has no slope or no weight", found=", ".join(missing),
                        expected="a number for every covered dimension", do="leave it out of r and w")  # fmt: skip


def _rescaled(pay: Vector, worth: Vector, seen: np.ndarray) -> tuple[Vector, float | None]:
    """c r with c = sum |w| / sum |r| over covered dimensions, c's own error (to first order) included."""
    if not seen.any():
        return pay, None
    size, paid = np.abs(worth.value[seen]).sum(), np.abs(pay.value[seen]).sum()
    if not paid > 0:
        raise DataError("Slopes that are all 0 cannot be rescaled", found="r = 0 in every covered dimension",
                        expected="a signal that pays for something", do="pass normalise=False")  # fmt: skip
    scale = size / paid
    change = worth.parts[:, seen] @ np.sign(worth.value[seen]) - scale * pay.parts[:, seen] @ np.sign(pay.value[seen])
    parts = scale * pay.parts + (change / paid)[:, None] * pay.value
    return dataclasses.replace(pay, value=scale * pay.value, parts=parts), float(scale)


def _prompts(pay: Vector, worth: Vector, together: bool) -> np.ndarray:
    """Of every dimension the fewest prompts that an estimate in its ratio has (`together`: of any dimension)."""
    own = np.minimum(pay.n, worth.n)
    return np.full(len(own), own.min()) if together else own


def _set_of(top, bottom, top_parts: np.ndarray, bottom_parts: np.ndarray, n, level: float) -> RatioSet:
    """Fieller's set from values [N] and parts [prompt, N]."""
    moments = ((top_parts**2).sum(0), (bottom_parts**2).sum(0), (top_parts * bottom_parts).sum(0))
    return fieller(top, bottom, *moments, degrees(n), level)


def _signal(scaled: Vector, worth: Vector, seen: np.ndarray, n: np.ndarray, level: float) -> RatioSet:
    """Of r / w, which D is a straight line of; 0 exactly where the signal sees nothing."""
    found = _set_of(scaled.value, worth.value, scaled.parts, worth.parts, n, level)
    ends = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return RatioSet(**{k: np.where(seen, end, np.nan if k.startswith("gap") else 0.0) for k, end in ends.items()})


def _along(end: np.ndarray, lams: np.ndarray) -> np.ndarray:
    """lam r/w + 1 - lam [N, lam] at an end of r/w; without a signal D is 1, whatever r/w."""
    return np.where(lams > 0, lams, 1.0) * np.where(lams > 0, end[:, None], 1.0) + (1 - lams) * (lams > 0)


def _over_mean(
    scaled: Vector, worth: Vector, seen: np.ndarray, lam: float, n: float, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """D / Dbar with its interval: of w~_i / (w_i Dbar), and of (1 - lam) / Dbar where the signal sees nothing."""
    if lam == 0:
        one = np.ones(len(seen))
        return one, one, one
    w, dw = worth.value, worth.parts
    mixed, dmixed = lam * scaled.value + (1 - lam) * w, lam * scaled.parts + (1 - lam) * dw
    total, dtotal, whole, dwhole = mixed.sum(), dmixed.sum(1)[:, None], w.sum(), dw.sum(1)[:, None]
    mean = total / whole if whole != 0 else np.nan
    dmean = (dtotal - mean * dwhole) / whole if whole != 0 else dtotal * np.nan
    top, dtop = np.where(seen, mixed, 1 - lam), np.where(seen, dmixed, 0.0)
    bottom, dbottom = np.where(seen, w, 1.0) * mean, np.where(seen, w * dmean + mean * dw, dmean)
    value = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)
    found = _set_of(top, bottom, dtop, dbottom, n, level)
    return value, found.low, found.high


def _severity(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of |D - 1| from those of D."""
    ends = np.abs(np.stack([low, high]) - 1)
    return np.where((low <= 1) & (1 <= high), 0.0, ends.min(0)), ends.max(0)


def _weight_words(worth: Vector, level: float) -> list[str]:
    """What is to be said of each weight; nothing of one that is declared or clearly above 0."""
    if not worth.estimated:
        return [""] * len(worth.value)
    low, high = worth.ends(level)
    words = np.where(high < 0, "below 0", np.where(low > 0, "", "interval includes 0"))
    return [str(x) for x in np.where(worth.n < stats.FEWEST, "no interval", words)]


def _unbounded(signal: RatioSet, worth: Vector, dimensions: list[str], lam: float, level: float) -> dict[str, str]:
    """By dimension without bounds, what its interval is."""
    out = {}
    low, high = worth.ends(level)
    for i in np.flatnonzero(signal.unbounded if lam > 0 else np.zeros(len(dimensions), bool)):
        gap = [f"{lam * end + 1 - lam:.3g}" for end in (signal.gap_low[i], signal.gap_high[i])]
        anything = "anything" if np.isnan(signal.gap_low[i]) else f"anything but what lies between {' and '.join(gap)}"
        out[dimensions[i]] = (
            f"the interval of its weight, {worth.value[i]:.3g} ({low[i]:.3g} to {high[i]:.3g}), includes 0: "
            f"D at lambda {lam:g} may be {anything}"
        )
    return out


def _interval_words(pay: Vector, worth: Vector, n: np.ndarray, level: float, shared: int, normalise: bool) -> dict:
    if not (pay.estimated or worth.estimated):
        return {"level": level, "unit": "prompt", "method": "none (r and w are declared numbers: they have no error)"}
    if not (n >= stats.FEWEST).any():
        method = f"none ({int(n.min())} prompts; an interval needs {stats.FEWEST})"
    else:
        method = "Fieller, t" + (", the scale's error to first order" if normalise else "")
        if pay.estimated and worth.estimated:
            method += f", covariance from {shared} shared prompts"
    fewest = n[np.isfinite(n)]
    return {"level": level, "unit": "prompt", "method": method, "n": int(fewest.min()) if len(fewest) else None}


def _coverage(r, seen: np.ndarray, dimensions: list[str], alpha: float) -> dict[str, Any]:
    """K and N as declared, and K as estimated from the slopes' Holm-adjusted p."""
    n, k = len(seen), int(seen.sum())
    out: dict[str, Any] = {"N": n, "K": k, "coverage": k / n, "kappa": (n - k) / n, "alpha": alpha}
    if not isinstance(r, Result) or "p_holm" not in r.dataset:
        return out | {"K_estimated": None, "reason": "r is no Result of slopes, which have a p"}
    p = np.where(seen, r.dataset["p_holm"].sel(attribute=dimensions).values, np.nan)
    if np.isnan(p[seen]).all():
        return out | {"K_estimated": None, "reason": f"no p under {stats.FEWEST} prompts"}
    paid = [d for d, q in zip(dimensions, p, strict=True) if q < alpha]
    unknown = [d for d, q, c in zip(dimensions, p, seen, strict=True) if c and np.isnan(q)]
    reason = f"not counted, having no p under {stats.FEWEST} prompts: {', '.join(unknown)}" if unknown else ""
    return out | {"K_estimated": len(paid), "coverage_estimated": len(paid) / n, "paid_for": paid, "reason": reason}


def _congruity(pay: Vector, worth: Vector, n: np.ndarray, level: float) -> dict[str, Any]:
    """cos(r, w) with the interval of its atanh, to first order."""
    from scipy.stats import t

    r, w = pay.value, worth.value
    sizes = float(np.linalg.norm(r)), float(np.linalg.norm(w))
    note = "Baker 1992 and Feltham and Xie 1994, not arXiv 2603.28063"
    if not min(sizes) > 0:
        return {"cosine": None, "one_minus": None, "low": None, "high": None, "note": note}
    cosine = float(np.clip(r @ w / (sizes[0] * sizes[1]), -1, 1))
    change = (pay.parts @ w + worth.parts @ r) / (sizes[0] * sizes[1])
    change = change - cosine * (pay.parts @ r / sizes[0] ** 2 + worth.parts @ w / sizes[1] ** 2)
    ends = (None, None)
    if len(change) and n.min() >= stats.FEWEST and abs(cosine) < 1 - 1e-12:
        half = float(t.ppf((1 + level) / 2, n.min() - 1)) * float(np.linalg.norm(change)) / (1 - cosine**2)
        ends = tuple(float(np.tanh(np.arctanh(cosine) + side * half)) for side in (-1, 1))
    return {"cosine": cosine, "one_minus": 1 - cosine, "low": ends[0], "high": ends[1], "note": note}


def _provenance(r, w) -> dict[str, Any]:
    """Of which model and prompts r is, and of which labels w."""
    keys = ("model", "revision", "objective", "readout", "dtype", "versions", "n_pairs", "n_prompts", "inputs_hash")
    out: dict[str, Any] = {"method": "distortion_index"}
    for name, x in (("r", r), ("w", w)):
        if isinstance(x, Result):
            out |= {key: x.meta[key] for key in keys if key in x.meta and (name == "r" or key not in out)}
            out[name] = {"method": x.name, "inputs_hash": x.meta.get("inputs_hash"), "unit": x.unit}
        else:
            out[name] = {"method": "declared"}
    return out
