"""From arrays of per-pair values to a `Result` with sides, provenance and an interval over prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import SIDES, pair_coords
from reward_lens.result import Check, Result

SAME_SCORES = ("method", "model", "revision", "dtype", "objective", "reads", "truncation", "inputs_hash")
"""What says of a Result of scores whose they are, and of what."""


def paired_result(
    rm: RewardModel,
    name: str,
    pairs: data.Pairs,
    values: np.ndarray,
    dims: Sequence[str],
    coords: Mapping[str, Any] | None = None,
    *,
    unit: str = "reward",
    checks: Sequence[Check] = (),
    undefined: str | None = None,
    interval: bool = True,
    limits: tuple[float, float] = (-np.inf, np.inf),
    seed: int = 0,
    **meta: Any,
) -> Result:
    """`values` [pair, ...] with `dims` ("pair", ...); a dim "side" gets chosen, rejected, margin.

    The interval is over prompts (pairs of one prompt are resampled together); see `stats.mean_interval` for small n
    and for `limits`.
    """
    value = labelled(pairs, values, dims, coords)
    summary = {}
    if interval:
        summary, meta["interval"] = over_prompts(pairs, value, seed, limits)
    return Result(
        name,
        value,
        unit=unit,
        checks=checks,
        meta=rm.describe(name, pairs, seed=seed, **meta),
        undefined=undefined,
        **summary,
    )


def labelled(
    pairs: data.Pairs, values: np.ndarray, dims: Sequence[str], coords: Mapping[str, Any] | None = None
) -> xr.DataArray:
    """`values` with the coordinates of pairs and, where there is that dim, sides."""
    coordinates = dict(pair_coords(pairs))
    if "side" in dims:
        coordinates["side"] = np.array(SIDES, dtype=object)
    coordinates.update(coords or {})
    return xr.DataArray(np.asarray(values, dtype=np.float64), dims=tuple(dims), coords=coordinates)


def over_prompts(
    pairs: data.Pairs, value: xr.DataArray, seed: int, limits: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[dict[str, xr.DataArray], dict[str, Any]]:
    """Mean, low and high over pairs, and what is said of the interval."""
    over = stats.mean_interval(value.values, [p.prompt_key for p in pairs], seed=seed, limits=limits)
    of_pairs = [name for name, coord in value.coords.items() if "pair" in coord.dims]
    rest = value.drop_vars(of_pairs).isel(pair=0)
    summary = {key: rest.copy(data=np.asarray(getattr(over, key))) for key in ("mean", "low", "high")}
    said: dict[str, Any] = {"level": 0.95, "unit": "prompt", "method": over.method}
    return summary, said | ({"limits": list(limits)} if np.isfinite(limits).all() else {})


def margin_of(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """[pair, side, ...] from the two sides' [pair, ...], the margin being their difference."""
    return np.stack([chosen, rejected, chosen - rejected], axis=1)


def given_scores(rm: RewardModel, inputs, scores: Result | None, score, method: str) -> Result:
    """The given scores if they are of these inputs and this model as it stands, else new ones. Models in memory are
    told apart by their names (`rl.RewardModel(..., name=)`) alone."""
    if scores is None:
        return score(inputs)
    own = rm.describe(method, inputs)
    expected = {key: own.get(key) for key in SAME_SCORES}
    found = {key: scores.meta.get(key) for key in expected}
    other = [f"{key} {found[key]!r}" for key in expected if found[key] != expected[key]]
    if len(scores.value) != len(inputs):
        other.append(f"{len(scores.value)} rows")
    if other:
        raise DataError(
            "The scores are not of these inputs and this model",
            found=", ".join(other),
            expected=f"the whole Result of rm.{method} for the same inputs ({len(inputs)} rows)",
            do=f"pass scores=rm.{method}(...) of what you pass here, or leave scores out",
        )
    return scores
