"""From arrays of per-pair values to a `Result` with sides, provenance and an interval over prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.model.reward_model import SIDES, RewardModel, pair_coords
from reward_lens.result import Check, Result


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
    seed: int = 0,
    **meta: Any,
) -> Result:
    """`values` [pair, ...] with `dims` ("pair", ...); a dim "side" gets chosen, rejected, margin.

    The interval is over prompts (pairs of one prompt are resampled together); see `stats.mean_interval` for small n.
    """
    coordinates = dict(pair_coords(pairs))
    if "side" in dims:
        coordinates["side"] = np.array(SIDES, dtype=object)
    coordinates.update(coords or {})
    value = xr.DataArray(np.asarray(values, dtype=np.float64), dims=tuple(dims), coords=coordinates)
    summary = {}
    if interval:
        over = stats.mean_interval(value.values, [p.prompt_key for p in pairs], seed=seed)
        of_pairs = [name for name, coord in value.coords.items() if "pair" in coord.dims]
        rest = value.drop_vars(of_pairs).isel(pair=0)
        summary = {key: rest.copy(data=np.asarray(getattr(over, key))) for key in ("mean", "low", "high")}
        meta["interval"] = {"level": 0.95, "unit": "prompt", "method": over.method}
    return Result(
        name,
        value,
        unit=unit,
        checks=checks,
        meta=rm.describe(name, pairs, seed=seed, **meta),
        undefined=undefined,
        **summary,
    )


def margin_of(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """[pair, side, ...] from the two sides' [pair, ...], the margin being their difference."""
    return np.stack([chosen, rejected, chosen - rejected], axis=1)
