"""Several reward models read as one: margins on a common scale, their mean, their spread, and what caution leaves.

    m_ip = (r_i(chosen) - r_i(rejected)) / s_i        s_i: pooled SD of model i's rewards within prompts
    mean_p = mean_i m_ip        spread_p = SD_i m_ip (n - 1)        least_p = min_i m_ip
    cautious_p = mean_p - k spread_p

A reward has no unit and no zero of its own: any positive factor and any constant a prompt leave every preference as it
is. So the mean of raw rewards of different models is not a reward: the model with the largest unit sets it, and the
spread of raw rewards is mostly the distance between scales. Margins take the constants out and s_i the unit; both are
measured on the pairs given. Only members trained with one loss on the same comparisons share a unit (margins are then
log-odds), and scale="raw" is for those.

`least` and `cautious` are bounds on how much better the chosen response is than the rejected one: least > 0 where every
member prefers it. On rewards instead of margins both would hang on the zero given to each member.

What this cannot show: that the members are right where they agree. Members with a common base or common data err
together, and their agreement then says little.

Reference: Coste et al. 2024, arXiv 2310.02743 (worst member; mean less a multiple of the variance, here of the SD,
which has the margin's unit); Eisenstein et al. 2023, arXiv 2312.09244 (members that err together).
"""

from typing import Any, Literal

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.comparison import compared_scores as scores
from reward_lens.methods.comparison.model_summary import Summary, named_models, summaries
from reward_lens.methods.shared.paired import labelled, over_prompts
from reward_lens.methods.shared.paired_shares import won
from reward_lens.result import Check, Result
from reward_lens.stats import Estimate

Scale = Literal["sd", "raw"]
OF_ALL = ("mean", "spread", "least", "cautious")
"""Readings of the ensemble, behind those of its members."""


@checked_arguments
def ensemble_rewards(models, pairs, scale: Scale = "sd", k: int | float = 1.0, seed: int = 0) -> Result:
    """Margins of every member and of the ensemble: mean, spread over members, least, and mean less `k` spreads.

    Parameters
    ----------
    models: {name: model}, two or more, or a sequence of models and paths, as in `compare`: a `RewardModel`, a path or
        hub id, or a function that loads one. What is loaded here is gone before the next one is loaded. Tokenizers,
        templates and sizes may differ.
    pairs: preference pairs.
    scale: "sd" puts every margin in SDs of its model's rewards within prompts, measured on these pairs; "raw" leaves
        rewards as they are, for members that share a unit (top of the module).
    k: how many spreads "cautious" takes off the mean.

    Returns value (pair, reading) in reward_sd (reward with scale="raw"), with mean, low and high over prompts (the SDs
    taken as known); reading = the members' names, then "mean", "spread", "least", "cautious". Coordinates of both dims
    `chosen` and `rejected`: raw rewards of the members, NaN for the ensemble; of `reading`: `kind` ("member",
    "ensemble") and `unit_of_one`, the rewards that one unit of the value is. Check: "squares" (mean square of the
    members = mean^2 + spread^2 (n - 1) / n).

    Raises `DataError` for fewer than two models, a name twice or one of the readings', a model whose rewards do not
    differ within any prompt, a negative `k`; and what loading raises. Cannot show who is right: see `ensemble_summary`
    for what the labels say.
    """
    pairs = data.as_pairs(pairs)
    models = named_models(models)
    _require(models, scale, k)
    read = summaries(models, pairs, (), None)
    unit = np.array([_unit(one, scale) for one in read])
    margins = np.stack([one.margins for one in read], 1) / unit
    n = len(read)
    mean, spread = margins.mean(1), margins.std(1, ddof=1)
    squares = (margins**2).mean(1)
    spread[spread <= 1e-12 * np.sqrt(squares)] = 0  # equal members: what is left is the rounding of the mean
    values = np.column_stack([margins, mean, spread, margins.min(1), mean - k * spread])
    gap = np.abs(squares - mean**2 - spread**2 * (n - 1) / n) / np.maximum(squares, np.finfo(float).tiny)
    blank = np.full((len(pairs), len(OF_ALL)), np.nan)
    rewards = np.stack([one.rewards for one in read], 2)
    coords: dict[str, Any] = {
        "reading": np.array([*(one.name for one in read), *OF_ALL], dtype=object),
        "kind": ("reading", np.array(["member"] * n + ["ensemble"] * len(OF_ALL), dtype=object)),
        "unit_of_one": ("reading", np.concatenate([unit, np.full(len(OF_ALL), np.nan)])),
    }
    for side, column in (("chosen", rewards[:, 0]), ("rejected", rewards[:, 1])):
        coords[side] = (("pair", "reading"), np.hstack([column, blank]))
    value = labelled(pairs, values, ("pair", "reading"), coords)
    summary, interval = over_prompts(pairs, value, seed)
    ties = int((np.abs(np.stack([one.margins for one in read])) <= [[one.noise_floor] for one in read]).sum())
    return Result(
        "ensemble_rewards", value, unit="reward_sd" if scale == "sd" else "reward",
        checks=[Check("squares", float(gap.max()), 1e-9),
                Check("margins within a member's rounding", float(ties), np.inf, "their sign is no preference")],
        meta={
            "method": "ensemble_rewards", "model": ", ".join(one.name for one in read),
            "models": {one.name: one.about for one in read}, "versions": read[0].about["versions"],
            "n_pairs": len(pairs), "n_prompts": pairs.n_prompts, "inputs_hash": data.inputs_hash(pairs), "seed": seed,
            "interval": interval, "settings": {"scale": scale, "k": k},
            "title": f"Ensemble of {n} reward models",
            "shows": "How far each member, their mean and a cautious reading of them prefer the chosen response, and "
            "how far the members are apart.",
            "cannot_show": "Who is right, or that agreeing members are: those with a common base or common data err "
            "together. The scale is measured on these pairs.",
        },
        mean=summary["mean"], low=summary["low"], high=summary["high"],
    )  # fmt: skip


@checked_arguments
def ensemble_summary(result: Result) -> Result:
    """What the labels say of an ensemble: accuracy, disagreement, and whether the members are apart where it errs.

    `result` of `ensemble_rewards`; the chosen response counts as right.

    Returns value (measure,) with low and high over prompts. Measures, with the coordinate `unit_of`:
    "accuracy: NAME" for every member, and of "mean", "least" and "cautious" (fraction; a tie counts half; for the last
    two that is the share of pairs on which even the bound is on the chosen side); "contested", the share of pairs on
    which the members do not all prefer the same response; "accuracy, agreed" and "accuracy, contested", of the mean on
    the two kinds of pairs; "spread ~ error" and "size of mean ~ error", correlations over pairs with the error of the
    mean (1 wrong, .5 tie, 0 right): the spread carries news beyond the mean where it does better than the second.
    Coordinates `n` (pairs), `n_prompts` and `reason` where there is no value or no interval. Intervals of shares are
    Wilson's for clusters, of correlations the jackknife's over prompts.

    Raises `DataError` for another result. Cannot show how spread and error go together on other texts: under
    optimisation members are pushed to where they err.
    """
    if result.name != "ensemble_rewards":
        raise DataError("There is no ensemble to sum up", found=f"a result of '{result.name}'",
                        expected="a result of ensemble_rewards", do="pass ensemble_rewards(models, pairs)")  # fmt: skip
    value = result.value
    prompts = value["prompt_id"].values
    members = value.values[:, value["kind"].values == "member"]
    by_name = {name: value.sel(reading=name).values for name in OF_ALL}
    contested = np.abs(np.sign(members).sum(1)) < members.shape[1]
    error = 1 - won(by_name["mean"])
    cells: dict[str, tuple[Estimate, str]] = {}
    for name in [*value["reading"].values[: members.shape[1]], "mean", "least", "cautious"]:
        cells[f"accuracy: {name}"] = _share(won(value.sel(reading=name).values), prompts), "fraction"
    cells["contested"] = _share(contested.astype(float), prompts), "fraction"
    for name, kind in (("agreed", ~contested), ("contested", contested)):
        cells[f"accuracy, {name}"] = _share(won(by_name["mean"][kind]), prompts[kind]), "fraction"
    for name, of in (("spread", by_name["spread"]), ("size of mean", np.abs(by_name["mean"]))):
        cells[f"{name} ~ error"] = scores.correlation(of, error, prompts), "correlation"
    estimates = [estimate for estimate, _ in cells.values()]
    coords = {
        "measure": np.array(list(cells), dtype=object),
        "unit_of": ("measure", np.array([unit for _, unit in cells.values()], dtype=object)),
        "n": ("measure", np.array([e.n for e in estimates])),
        "n_prompts": ("measure", np.array([e.n_clusters for e in estimates])),
        "reason": ("measure", np.array([e.reason for e in estimates], dtype=object)),
    }
    table = [xr.DataArray(np.array([getattr(e, key) for e in estimates]), dims="measure", coords=coords)
             for key in ("value", "low", "high")]  # fmt: skip
    undefined = "; ".join(dict.fromkeys(e.reason for e in estimates if np.isnan(e.value)))
    kept = ("model", "models", "versions", "n_pairs", "n_prompts", "inputs_hash", "seed", "settings")
    return Result(
        "ensemble_summary", table[0], unit="as unit_of says", low=table[1], high=table[2], undefined=undefined or None,
        meta={key: result.meta[key] for key in kept} | {
            "method": "ensemble_summary", "title": f"What the labels say of the {members.shape[1]} members",
            "interval": {"level": 0.95, "unit": "prompt", "method": "wilson for clusters; jackknife (correlations)"},
            "shows": "How often the members and the ensemble are right, how often they differ, and whether they are "
            "further apart on the pairs that the ensemble gets wrong.",
            "cannot_show": "The same on other texts, above all on texts found by optimising the ensemble; nor errors "
            "that all members share, which leave the spread small.",
        },
    )  # fmt: skip


def _require(models, scale: str, k: int | float) -> None:
    taken = [name for name in models if name in OF_ALL]
    found = (
        f"a member named {taken[0]!r}" if taken
        else f"scale={scale!r}" if scale not in ("sd", "raw")
        else f"k={k}" if not (np.isfinite(k) and k >= 0)
        else None
    )  # fmt: skip
    if found:
        raise DataError("The ensemble was not understood", found=found,
                        expected=f"names other than {', '.join(OF_ALL)}, scale 'sd' or 'raw', and k of 0 or more",
                        do="correct these; {'first': model, 'second': model} names the members")  # fmt: skip


def _unit(one: Summary, scale: str) -> float:
    """Rewards of a member that one unit of the ensemble's scale is."""
    if scale == "raw":
        return 1.0
    sd = one.about["within_prompt_sd"]
    if not sd:
        raise DataError(
            f"The rewards of {one.name} have no scale",
            found="no spread within any prompt of these pairs",
            expected="a member that tells some responses apart",
            do="leave it out, or pass pairs whose responses differ",
        )
    return sd


def _share(values01: np.ndarray, prompts: np.ndarray) -> Estimate:
    if not len(values01):
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0, "no such pairs")
    return scores.from_interval(stats.proportion_interval(values01, prompts))
