"""How far what a site writes and what it causes agree: rank correlations over sites, one a pair.

    rho_p = Spearman over sites of (x_ps, y_ps)        mean over pairs, interval over prompts

    contribution ~ direct        the shared margin split, beside one run's frozen-norm direct effect
    contribution ~ live direct   the same with the final norm answering (direct + norm_rescale)
    contribution ~ total         the claim at stake: does the write predict what follows from changing the site?
    direct ~ total               the same without the averaging of two runs that the split does
    gradient ~ exact, ...        an estimate of the total effect beside the exact one

`contribution ~ direct` is near 1 by an identity (the split is the mean of the noise and the denoise direct effect,
which is checked) and no evidence; it is the ceiling that the others are read against. The norm is frozen in the
contribution and in `direct`, in nothing else. The copies with random weights say what the architecture alone gives.

    contribution ~ total, legacy prefix

is a known artefact, off by default: totals by absolute positions over the shorter response, as published (mean
Spearman -.256). In responses of unequal length it patches unlike tokens with each other and leaves the longer one's
reward position alone, so that late effects are zero by construction. It is here to be reproduced and taken apart.

What this cannot show: agreement in size (ranks only), or why two views differ; a rho over few sites is coarse.

Reference: Zhang and Nanda 2023, arXiv 2309.16042 (noise and denoise); Adebayo et al. 2018, arXiv 1810.03292 (random
weights as a control).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Float

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_sweeps import EXCHANGES, asked_sites
from reward_lens.methods.causation.effects import effects
from reward_lens.methods.observation.contributions import By, contributions
from reward_lens.methods.observation.lens import random_weight_copy
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

FEWEST_SITES = 3
SPLITS: tuple[By, ...] = ("component", "head", "neuron")
LAYERS = ("all", "early", "late")
LEGACY = "contribution ~ total, legacy prefix"
LENGTHS = ("equal", "chosen longer", "rejected longer")
GROUPS = {"all": LENGTHS, "equal": LENGTHS[:1], "unequal": LENGTHS[1:], **{name: (name,) for name in LENGTHS[1:]}}
BY: dict[str, By] = {"embed": "component", "attn": "component", "mlp": "component", "head": "head", "neuron": "neuron"}
UNDEFINED = f"under {FEWEST_SITES} sites, or one of the two differs between them by no more than the noise floor"
SHOWS = "Whether sites that write more towards the reward also matter more to it, pair by pair, as a rank correlation."
CANNOT_SHOW = (
    "Agreement in size, or why two views differ. Contribution against direct effect is an identity, no evidence."
)


@checked_arguments
def agreement(
    rm: RewardModel,
    pairs,
    sites: "str | Sequence[Site | str]" = "components",
    at: Literal["final", "response", "all"] = "final",
    align: Literal["tail", "diff"] | None = None,
    estimators: Sequence[str] = (),
    modes: Sequence[Literal["noise", "denoise"]] = ("noise", "denoise"),
    controls: int = 1,
    legacy: bool = False,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Rank correlation over sites of contributions, direct effects, total effects and their estimates.

    Parameters
    ----------
    sites: "components", "heads", or a list of writes, single heads and neurons.
    at, align: of the total effects; see `effects`.
    estimators: names of `effects`' estimators, each to be held against the exact effect.
    controls: copies of the model with random weights (their seeds follow `seed`).
    legacy: add the comparison with totals by absolute positions, a known artefact (top of the module).
    max_rows: as in `effects`.

    Returns value (pair, comparison, mode, layers, model), Spearman's rho; layers = all, early, late (halves by block,
    the embedding early); model = trained, random 1, ... Mean and interval over prompts. Coordinates of `pair`:
    n_chosen_tokens, n_rejected_tokens and lengths = equal, chosen longer, rejected longer (see `agreement_by_length`).
    NaN where there are under 3 sites or nothing varies. Check: "mean direct effect" (E7).
    Raises `DataError` for sites that are no writes, and what `effects` raises.
    """
    pairs = data.as_pairs(pairs)
    wanted = asked_sites(rm, sites, None)
    _require(wanted, modes, controls)
    halves = _halves(rm, wanted)
    rhos, checks = [], []
    for model in _models(rm, controls, seed):
        split, size = _contributions(model, pairs, wanted)
        rho, direct = {}, []
        for mode in modes:
            found = _of_mode(model, pairs, wanted, split, mode, at, align, estimators, legacy, max_rows)
            direct.append(found["contribution ~ direct"][1])
            for name, (x, y) in found.items():
                rho[name, mode] = np.stack([rank_correlation(x[:, h], y[:, h], model.noise_floor) for h in halves], -1)
        names = list(dict.fromkeys(name for name, _ in rho))
        rhos.append(np.stack([np.stack([rho[name, mode] for mode in modes], 1) for name in names], 1))
        if set(modes) == set(EXCHANGES):
            gap = np.abs(np.mean(direct, 0) - split).max(1) / size
            checks.append(float(gap.max()))
    values = np.stack(rhos, -1)  # [pair, comparison, mode, layers, model]
    coords = {
        "comparison": np.array(names, dtype=object), "mode": np.array(list(modes), dtype=object),
        "layers": np.array(LAYERS, dtype=object),
        "model": np.array(["trained", *(f"random {i + 1}" for i in range(controls))], dtype=object),
        **_length_coords(rm, pairs),
    }  # fmt: skip
    tolerance = 1e-2 if rm.sixteen_bit else 1e-5
    return paired_result(
        rm, "agreement", pairs, values, ("pair", "comparison", "mode", "layers", "model"), coords, unit="spearman",
        limits=(-1.0, 1.0),
        checks=[Check("mean direct effect", max(checks), tolerance)] if checks else [],
        undefined=UNDEFINED if np.isnan(values).any() else None, seed=seed, noise_floor=rm.noise_floor,
        settings={"sites": sites if isinstance(sites, str) else [str(s) for s in wanted], "at": at, "align": align,
                  "estimators": list(estimators), "controls": controls, "legacy": legacy,
                  "n_sites": {name: len(half) for name, half in zip(LAYERS, halves, strict=True)}},
        title=f"Agreement of contributions and effects ({at})", shows=SHOWS, cannot_show=CANNOT_SHOW,
    )  # fmt: skip


@checked_arguments
def agreement_by_length(result: Result, layers: str = "all", model: str = "trained") -> Result:
    """The mean rank correlation of `agreement` by which response is longer.

    Returns value (group, comparison, mode), the mean of each group of pairs, with `low` and `high` over prompts and
    the coordinates `n` (pairs with a value) and `n_prompts`; group = all, equal, unequal, chosen longer, rejected
    longer. NaN for a group without pairs; under 6 prompts a mean has no interval (check "means without an interval").
    Raises `DataError` for a result that is not of `agreement`.
    """
    if result.name != "agreement" or "lengths" not in result.value.coords:
        raise DataError("Only an agreement can be split by length", found=f"a result of '{result.name}'",
                        expected="the result of agreement(rm, pairs)", do="pass that one")  # fmt: skip
    value = result.value.sel(layers=layers, model=model)
    dims = ("comparison", "mode")
    value = value.transpose("pair", *dims)
    lengths, prompts = value["lengths"].values, value["prompt_id"].values
    found: dict[str, list] = {name: [] for name in ("mean", "low", "high", "n", "n_clusters")}
    for members in GROUPS.values():
        inside = np.isin(lengths.astype(str), members)
        if inside.any():
            seed = result.meta.get("seed", 0)
            over = stats.mean_interval(value.values[inside], prompts[inside], seed=seed, limits=(-1.0, 1.0))
            cells = {key: getattr(over, key) for key in found}
        else:
            cells = {key: np.full(value.shape[1:], 0.0 if key.startswith("n") else np.nan) for key in found}
        for key, cell in cells.items():
            found[key].append(cell)
    stacked = {key: np.stack(cells) for key, cells in found.items()}
    coords: dict[str, Any] = {"group": np.array(list(GROUPS), dtype=object)} | {d: value[d].values for d in dims}
    coords |= {"n": (("group", *dims), stacked["n"].astype(int))}
    coords |= {"n_prompts": (("group", *dims), stacked["n_clusters"].astype(int))}
    mean, low, high = (
        xr.DataArray(stacked[key], dims=("group", *dims), coords=coords) for key in ("mean", "low", "high")
    )
    bare = float((np.isnan(stacked["low"]) & ~np.isnan(stacked["mean"])).sum())
    note = f"an interval needs {stats.FEWEST} prompts"
    return Result(
        "agreement_by_length", mean, unit=result.unit, mean=mean, low=low, high=high,
        checks=[Check("means without an interval", bare, float("inf"), note)] if bare else [],
        undefined="no pairs of this kind, or none whose correlation is defined" if mean.isnull().any() else None,
        meta={**result.meta, "method": "agreement_by_length", "title": "Agreement by length",
              "shows": "The same agreement for pairs whose responses have equal and different numbers of tokens.",
              "cannot_show": "That length is the reason: pairs of equal length differ in other ways too.",
              "settings": result.meta.get("settings", {}) | {"layers": layers, "model": model}},
    )  # fmt: skip


def rank_correlation(
    x: Float[np.ndarray, "pair site"], y: Float[np.ndarray, "pair site"], floor: float
) -> Float[np.ndarray, " pair"]:
    """Spearman of every row, ties at their mean rank; NaN under 3 sites or where a row spans no more than `floor`."""
    from scipy.stats import rankdata

    if x.shape[1] < FEWEST_SITES:
        return np.full(len(x), np.nan)
    a, b = (rankdata(v, axis=1) - (x.shape[1] + 1) / 2 for v in (x, y))
    flat = (np.ptp(x, axis=1) <= floor) | (np.ptp(y, axis=1) <= floor)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    rho = np.divide((a * b).sum(1), size, out=np.full(len(x), np.nan), where=~flat & (size > 0))
    return rho.clip(-1, 1)


def _models(rm: RewardModel, controls: int, seed: int) -> Iterator[RewardModel]:
    """The model itself and its random copies, one at a time."""
    yield rm
    for i in range(controls):
        yield random_weight_copy(rm, seed=seed + i)


def _contributions(rm: RewardModel, pairs, sites: Sequence[Site]) -> tuple[np.ndarray, np.ndarray]:
    """Shared margin split [pair, site], and the scale [pair] of its rounding: the sum of all |contributions|."""
    column, size = {}, np.zeros(len(pairs))
    needed: list[By] = [by for by in SPLITS if by in {BY[s.kind] for s in sites}]
    for by in needed:
        value = contributions(rm, pairs, by=by).value.transpose("component", "pair", "side")
        size = np.maximum(size, abs(value.sel(side=["chosen", "rejected"])).sum(("component", "side")).values)
        named = [str(s) for s in sites if BY[s.kind] == by]
        column |= dict(zip(named, value.sel(component=named, side="margin").values, strict=True))
    return np.stack([column[str(s)] for s in sites], 1), size


def _of_mode(
    rm: RewardModel, pairs, sites, split: np.ndarray, mode, at, align, estimators, legacy: bool, max_rows
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By comparison its two sides, each [pair, site]."""
    parts = effects(rm, pairs, sites, mode, at, path="direct", align=align, max_rows=max_rows).value
    direct, rescale, total = (parts.sel(part=p).values for p in ("direct", "norm_rescale", "total"))
    found = {
        "contribution ~ direct": (split, direct),
        "contribution ~ live direct": (split, direct + rescale),
        "contribution ~ total": (split, total),
        "direct ~ total": (direct, total),
    }
    for name in estimators:
        estimate = effects(rm, pairs, sites, mode, at, estimator=name, align=align, max_rows=max_rows)
        found[f"{name} ~ exact"] = (estimate.value.values, total)
    if legacy:
        by_position = effects(rm, pairs, sites, mode, "all", align="legacy_prefix", max_rows=max_rows)
        found[LEGACY] = (split, by_position.value.values)
    return found


def _halves(rm: RewardModel, sites: Sequence[Site]) -> list[list[int]]:
    """Indices of all sites, of those in the first half of the blocks, and of the others."""
    early = [i for i, s in enumerate(sites) if s.layer is None or 2 * s.layer < rm.n_layers]
    return [list(range(len(sites))), early, [i for i in range(len(sites)) if i not in early]]


def _length_coords(rm: RewardModel, pairs) -> dict[str, Any]:
    lengths = np.array([[len(t.response) for t in both] for both in rm.tokenize_pairs(pairs)])
    longer = [LENGTHS[int(np.sign(a - b)) % 3] for a, b in lengths]  # 0 equal, 1 chosen longer, -1 rejected longer
    return {
        "n_chosen_tokens": ("pair", lengths[:, 0]),
        "n_rejected_tokens": ("pair", lengths[:, 1]),
        "lengths": ("pair", np.array(longer, dtype=object)),
    }


def _require(sites: Sequence[Site], modes: Sequence[str], controls: int) -> None:
    bad = [str(s) for s in sites if s.kind not in BY or (s.kind in ("head", "neuron") and s.index is None)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if bad or not modes or len(set(modes)) < len(modes) or not set(modes) <= set(EXCHANGES) or controls < 0:
        raise DataError(
            "Agreement needs sites that write, and modes that exchange the two responses' values",
            found=", ".join(bad[:4]) or f"modes={modes!r}, controls={controls}",
            expected="embed, attention and MLP writes, single heads and neurons; modes 'noise', 'denoise' or both; "
            "controls of 0 or more",
            do="use sites='components' or 'heads', and a tuple of different modes",
        )
