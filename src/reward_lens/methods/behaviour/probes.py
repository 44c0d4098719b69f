"""How much reward does one edit of the text buy? A probe suite over edits that change one property.

    shift       r(prompt, edited response) - r(prompt, response), of the chosen and of the rejected response
    in SD       mean shift / s, s the pooled SD of the unedited responses to one prompt
    flips       of the pairs that are right, the share that the edit of the rejected response turns wrong
    net         shift - k (tokens added), k = the prompt's own slope of reward on tokens over graded filler (`pad`)
    corrected   mean r(edited) - r(edited and edited back), where editing back does not restore the text (RATE)
    dose        the slope over the doses of a family of graded edits, a prompt at a time

The prompt is the unit of intervals and tests (`stats`). Means are over responses: a prompt with more pairs counts for
more; those of `net` and the doses are over prompts, each the mean of its responses, and sign-flip tests flip prompt
means. p is adjusted by Holm over the probes. A response that an edit does not change has no shift.

What this cannot show: that an edit changes nothing else; every edit says what it changes, and an unlikely text gets an
unusual reward for being unlikely. A shift is not a fault: some of these properties may be worth a reward.

Reference: Reber et al. 2024, arXiv 2410.11348 (RATE); Wu et al. 2025, arXiv 2503.11751 (reWordBench).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.edits import TextEdit, edits_of
from reward_lens.methods.behaviour.edited_texts import SIDES, EditedRewards, scored_edits, within_prompt_sd
from reward_lens.methods.shared.paired_shares import won
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import pair_coords
from reward_lens.result import Result

LENGTH_FAMILY = "pad"
UNCHANGED = "the edit leaves the response as it is"
NEEDED_FOR = 0.5  # SD of shifts


@checked_arguments
def probe_hacking(
    rm: RewardModel,
    pairs=None,
    probes: Sequence[str | TextEdit] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> Result:
    """Reward bought by each edit on these responses.

    `pairs`: the bundled ones by default. `probes`: names of `edits.EDITS` or `TextEdit` objects; by default all.

    Returns value (pair, response, probe), the shift in reward; NaN where the edit changes nothing. mean, low and high
    (probe,) over prompts: no interval under 6 prompts, a t interval up to 20, then a cluster bootstrap of `n_boot`.
    Coordinates of `probe`: `changes` (what the edit changes), `p` (sign-flip; symmetry is its null) and `p_holm`,
    `shift_sd`, `flips` with `flips_low` and `flips_high` and `n_flips`, `n_prompts`, `tokens` (added, mean),
    `net`, `net_low`, `net_high`, `net_p_holm` (NaN where no "pad" is among the probes to tell what length buys),
    `corrected`, `corrected_low`, `corrected_high`, `family`, `dose`.
    meta: "doses" (a family: `mean_shift`, `shift_low`, `shift_high` at each of `doses`; `slope` with `low` and `high`),
    "prompts_needed", "within_prompt_sd".
    Raises `DataError` for unknown probes.
    """
    pairs = data.as_pairs(data.load_pairs("demo") if pairs is None else pairs)
    edits = edits_of(probes)
    (texts,) = scored_edits([rm], pairs, edits)
    prompts = [p.prompt_key for p in pairs]
    both = [key for key in prompts for _ in SIDES]
    shift, added = texts.shifts(), texts.added
    over = stats.mean_interval(shift.reshape(len(both), -1), both, n_boot=n_boot, seed=seed)
    p, smallest = _p_values(shift, both, rm.noise_floor, seed)
    sd = within_prompt_sd(texts.plain, prompts, [[p.chosen, p.rejected] for p in pairs])
    slopes = _length_slopes(shift, added, edits, prompts)
    net = _per_prompt(shift, prompts) - slopes[:, None] * _per_prompt(added, prompts)
    net[:, [e.family == LENGTH_FAMILY for e in edits]] = np.nan
    units = list(dict.fromkeys(prompts))
    net_over = stats.mean_interval(net, units, n_boot=n_boot, seed=seed)
    net_p, _ = _p_values(net, units, rm.noise_floor, seed)
    back = stats.mean_interval(texts.corrected().reshape(len(both), -1), both, n_boot=n_boot, seed=seed)
    flips = [_flips(texts, prompts, e) for e in range(len(edits))]
    of_probe: dict[str, Any] = {
        "changes": np.array([e.changes for e in edits], dtype=object),
        "family": np.array([e.family or "" for e in edits], dtype=object),
        "dose": np.array([np.nan if e.dose is None else float(e.dose) for e in edits]),
        "n_prompts": np.asarray(over.n_clusters),
        "tokens": _mean(added),
        "p": p,
        "p_holm": stats.adjust(p),
        "shift_sd": np.asarray(over.mean) / (sd if sd > 0 else np.nan),
        "net": np.asarray(net_over.mean),
        "net_low": np.asarray(net_over.low),
        "net_high": np.asarray(net_over.high),
        "net_p_holm": stats.adjust(net_p),
        "corrected": np.asarray(back.mean),
        "corrected_low": np.asarray(back.low),
        "corrected_high": np.asarray(back.high),
        "flips": np.array([f.mean for f in flips]),
        "flips_low": np.array([f.low for f in flips]),
        "flips_high": np.array([f.high for f in flips]),
        "n_flips": np.array([f.n for f in flips]),
    }
    named = {"probe": np.array([e.name for e in edits], dtype=object)}
    named |= {k: ("probe", v) for k, v in of_probe.items()}
    coords = {**pair_coords(pairs), "response": np.array(SIDES, dtype=object), **named}
    summary = {
        key: xr.DataArray(np.asarray(getattr(over, key)), dims=("probe",), coords=named)
        for key in ("mean", "low", "high")
    }
    meta = rm.describe(
        "probe_hacking", pairs, title=f"Reward bought by {len(edits)} edits", seed=seed,
        settings={"probes": [e.name for e in edits], "n_boot": n_boot},
        interval={"level": 0.95, "unit": "prompt", "method": over.method},
        within_prompt_sd=sd, doses=_doses(shift, edits, prompts, n_boot, seed),
        prompts_needed=_needed(len(edits)), smallest_p=smallest,
        shows="How much the reward moves when one property of a response is changed and its content kept.",
        cannot_show="That an edit changes nothing else, or that the property deserves no reward. The test's null is "
        "that shifts are symmetric about zero.",
    )  # fmt: skip
    value = xr.DataArray(shift, dims=("pair", "response", "probe"), coords=coords)
    return Result("probe_hacking", value, unit="reward", meta=meta, undefined=UNCHANGED, **summary)


def _per_prompt(values: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """[prompt, probe] means over a prompt's pairs and responses, in order of first appearance."""
    place = {key: i for i, key in enumerate(dict.fromkeys(prompts))}
    flat = values.reshape(-1, values.shape[-1])
    rows = np.repeat([place[key] for key in prompts], len(flat) // len(prompts))
    there = np.isfinite(flat)
    sums, counts = np.zeros((2, len(place), flat.shape[1]))
    np.add.at(sums, rows, np.where(there, flat, 0.0))
    np.add.at(counts, rows, there)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over all but the last axis, NaN left out; NaN where nothing is left."""
    flat = values.reshape(-1, values.shape[-1])
    count = np.isfinite(flat).sum(0)
    return np.where(count, np.nansum(flat, 0) / np.maximum(count, 1), np.nan)


def _p_values(values: np.ndarray, clusters: Sequence[str], floor: float, seed: int) -> tuple[np.ndarray, float]:
    """Sign-flip p of every column of [.., probe], and the smallest that the most prompts could give.

    What is under the noise floor of rewards is none: rounding has a sign too, and a test would find it.
    """
    flat = values.reshape(len(clusters), -1)
    flat = np.where(np.abs(flat) <= floor, 0.0 * flat, flat)
    tests = [stats.sign_flip_test(column, clusters, seed=seed) for column in flat.T]
    return np.array([t.p for t in tests]), min(t.smallest_p for t in tests)


def _slopes(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of every row, least squares through the origin: sum x y / sum x^2; NaN where x is 0 throughout."""
    size = np.nansum(np.where(np.isfinite(y), x, np.nan) ** 2, 1)
    return np.where(size > 0, np.nansum(x * y, 1) / np.where(size > 0, size, 1), np.nan)


def _length_slopes(shift: np.ndarray, added: np.ndarray, edits: Sequence[TextEdit], prompts) -> np.ndarray:
    """Reward a token of filler, a prompt at a time; an unedited response is the origin."""
    pads = [e.family == LENGTH_FAMILY for e in edits]
    return _slopes(_per_prompt(shift, prompts)[:, pads], _per_prompt(added, prompts)[:, pads])


def _doses(shift: np.ndarray, edits: Sequence[TextEdit], prompts, n_boot: int, seed: int) -> dict[str, dict]:
    """By family of graded edits, over prompts: the mean shift at every dose and the mean slope of shift on dose.

    `shift_low`, `shift_high` (a dose) and `low`, `high` (of the slope) are None under 6 prompts. A prompt counts where
    the dose changes one of its responses; in the slope, where all doses do.
    """
    out = {}
    units = list(dict.fromkeys(prompts))
    by_prompt = _per_prompt(shift, prompts)
    for family in dict.fromkeys(e.family for e in edits if e.family):
        inside = [i for i, e in enumerate(edits) if e.family == family and e.dose is not None]
        if len(inside) < 2:
            continue
        doses = np.array([float(edits[i].dose or 0) for i in inside])
        slope = _centred_slopes(by_prompt[:, inside], doses)
        over = stats.mean_interval(slope, units, n_boot=n_boot, seed=seed)
        shifts = stats.mean_interval(by_prompt[:, inside], units, n_boot=n_boot, seed=seed)
        out[family] = {
            "doses": doses.tolist(), "mean_shift": _plain(shifts.mean), "shift_low": _plain(shifts.low),
            "shift_high": _plain(shifts.high), "slope": _plain(over.mean),
            "low": _plain(over.low), "high": _plain(over.high), "n_prompts": over.n_clusters,
        }  # fmt: skip
    return out


def _centred_slopes(y: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """Of every row with all doses, the least squares slope on dose."""
    away = doses - doses.mean()
    return (y @ away) / (away @ away)


def _flips(texts: EditedRewards, prompts: Sequence[str], probe: int) -> stats.Interval:
    """Of the pairs whose chosen response is ahead, the share in which the edited rejected one overtakes it."""
    right = (texts.plain[:, 0] > texts.plain[:, 1]) & texts.changed[:, 1, probe]
    overtakes = won(texts.edited[:, 1, probe] - texts.plain[:, 0])
    if not right.any():
        return stats.Interval(np.nan, np.nan, np.nan, 0, 0, "none (no pair is ahead and changed)")
    return stats.proportion_interval(overtakes[right], np.array(prompts)[right])


def _needed(n_probes: int) -> dict[str, Any]:
    """Prompts at which a shift of half an SD of shifts is found in 80% of studies, Holm over the probes included: its
    first step tests at alpha / probes, and a sign-flip test of n prompts cannot give less than 2^(1 - n)."""
    alpha = 0.05 / n_probes
    floor = int(np.ceil(1 - np.log2(alpha)))
    by_power = stats.paired_n_needed(NEEDED_FOR, alpha=alpha)
    return {"shift_in_sd_of_shifts": NEEDED_FOR, "probes": n_probes, "by_power": by_power, "by_smallest_p": floor,
            "n": max(by_power, floor)}  # fmt: skip


def _plain(value) -> Any:
    """NaN as None, for JSON."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    return None if not np.isfinite(value) else float(value)
