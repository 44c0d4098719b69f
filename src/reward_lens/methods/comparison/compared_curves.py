"""The curves of a comparison: where in relative depth margins arise and states agree, and what edits buy, side by side.

`compare` keeps them as lists in its Result, so that one file holds everything; `compared_curves` gives each kind as a
Result of its own. A difference of two models is paired: its interval is over the prompts of the same pairs.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.comparison import compared_scores as scores
from reward_lens.methods.comparison import compared_states as states
from reward_lens.methods.comparison.compared_models import STATES, pair_name, plain, profile, two_of
from reward_lens.methods.comparison.model_summary import DEPTHS, KINDS, Summary
from reward_lens.result import Result

CURVES = ("lens", "contributions", "effects", "states", "probes")


@checked_arguments
def compared_curves(result: Result, of: Literal["lens", "contributions", "effects", "states", "probes"]) -> Result:
    """The curves that a result of `compare` carries, as a Result of their own.

    Returns value with low and high over prompts:

    - "lens": (curve, depth), share of the final margin that the lens reads at a relative depth; curve = each model, and
      "a minus b" for every two, over the pairs whose margin exceeds both noise floors. A share is
      sum_i sign(m_i) lens_i / sum_i |m_i|, so that pairs of a small margin do not decide it; at depth 1 it is 1.
    - "contributions", "effects": (curve, part, depth), the same share of what attention and MLP blocks write or cause,
      summed in bins of relative depth (`depth` is the middle). The embedding and the norm's row are not in it.
    - "states": (models, states, depth), debiased CKA of prompts and of differences, like depths compared.
    - "probes": (curve, probe), mean shift in SDs of the model's rewards within prompts; the jackknife's
      interval, which leaves a prompt out of mean and SD together.

    Raises `DataError` for curves that the comparison was not asked for.
    """
    kept = result.meta.get("curves", {})
    if of not in kept:
        raise DataError(
            f"The result has no curves {of!r}",
            found=f"a result of '{result.name}' with {', '.join(kept) or 'no curves'}",
            expected=f"a result of compare that was asked for them ({', '.join(CURVES)})",
            do=f"pass profiles=({of!r},), or probes= for probes, to compare",
        )
    packed = kept[of]
    coords = {
        key: np.array(values, dtype=object if isinstance(values[0], str) else float)
        for key, values in packed["coords"].items()
    }
    value, low, high = (
        xr.DataArray(np.array(packed[key], dtype=float), dims=packed["dims"], coords=coords)
        for key in ("value", "low", "high")
    )
    meta = {key: v for key, v in result.meta.items() if key not in ("curves", "pairs")}
    words = {"method": "compared_curves", "title": f"Compared: {of}"}
    checks = [check for check in result.checks if check.name != "undefined cells"]
    reason = "states that do not differ between prompts, no margin over the noise floor, or an unchanged text"
    return Result(
        f"compared_{of}", value, unit=packed["unit"], low=low, high=high, meta=meta | words, checks=checks,
        undefined=reason if value.isnull().any() else None,
    )  # fmt: skip


def share_curves(summaries: Sequence[Summary], name: str, n_bins: int, pairs: data.Pairs) -> dict[str, Any]:
    """sum_i sign(m_i) profile_i / sum_i |m_i| over pairs whose margin m_i exceeds the noise floor, by relative depth.

    A row a model, and a row of the difference of every two over the pairs that both keep.
    """
    prompts = np.array([p.prompt_key for p in pairs])
    kept = [np.abs(s.margins) > s.noise_floor for s in summaries]
    profiles = [profile(s, name, n_bins) for s in summaries]

    def shares(i: int, keep: np.ndarray):
        sign = np.sign(summaries[i].margins)[keep]
        parts = profiles[i][keep]
        weighted = parts * sign.reshape(-1, *[1] * (parts.ndim - 1))
        return scores.share(weighted, np.abs(summaries[i].margins[keep]), prompts[keep])[:2]

    rows = [_ends(*shares(i, keep)) for i, keep in enumerate(kept)]
    for i, j in two_of(summaries):
        both = kept[i] & kept[j]
        (x, x_left), (y, y_left) = shares(i, both), shares(j, both)
        rows.append(_ends(x - y, x_left - y_left))
    if name == "lens":
        dims, coords = ["curve", "depth"], {"depth": np.linspace(0, 1, n_bins + 1).tolist()}
    else:
        middles = ((np.arange(n_bins) + 0.5) / n_bins).tolist()
        dims, coords = ["curve", "part", "depth"], {"part": list(KINDS), "depth": middles}
    return packed(dims, {"curve": curve_names(summaries), **coords}, np.stack(rows, 1), "fraction of the final margin")


def state_curves(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Debiased CKA of every two models' states by relative depth."""
    pairs_of_models = two_of(summaries)
    cells = np.full((3, len(pairs_of_models), len(STATES), len(DEPTHS)), np.nan)
    for d in range(len(DEPTHS)):
        for k, kind in enumerate(STATES):
            grams = [states.centred_gram(getattr(s.states, kind)[d]) for s in summaries]
            for row, (i, j) in enumerate(pairs_of_models):
                found = states.cka_of(grams[i], grams[j])
                cells[:, row, k, d] = found.value, found.low, found.high
    coords = {"models": [pair_name(summaries[i], summaries[j]) for i, j in pairs_of_models], "states": list(STATES)}
    return packed(["models", "states", "depth"], {**coords, "depth": DEPTHS.round(3).tolist()}, cells, "cka")


def probe_curves(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Mean shift under each edit in SDs of the model's rewards within prompts, and paired differences of models."""
    shifts = [s.shifts for s in summaries if s.shifts is not None]
    curves = [*shifts, *(shifts[i] - shifts[j] for i, j in two_of(summaries))]
    cells = np.array([(one.value, *one.ends()) for one in curves]).swapaxes(0, 1)
    coords = {"curve": curve_names(summaries), "probe": summaries[0].about["probes"]}
    return packed(["curve", "probe"], coords, cells, "within_prompt_sd")


def curve_names(summaries: Sequence[Summary]) -> list[str]:
    differences = [f"{summaries[i].name} minus {summaries[j].name}" for i, j in two_of(summaries)]
    return [s.name for s in summaries] + differences


def packed(dims: list[str], coords: dict[str, list], cells: np.ndarray, unit: str) -> dict[str, Any]:
    """Value, low and high as lists for JSON, None where undefined."""
    parts = zip(("value", "low", "high"), cells, strict=True)
    return {"dims": dims, "coords": coords, "unit": unit} | {key: plain(part) for key, part in parts}


def _ends(value: np.ndarray, without: np.ndarray) -> np.ndarray:
    return np.stack([value, *scores.jackknife(value, without)])
