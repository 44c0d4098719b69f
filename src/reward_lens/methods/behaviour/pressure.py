"""What choosing by this reward chooses: covariances within a prompt, and the best of n, from scored samples.

    cov_p(f)  = sum_i (f_i - f) (r_i - r) / (N_p - 1)      over the samples i of prompt p
    slope     = mean_p cov_p / mean_p var_p(f),  correlation = mean_p cov_p / sqrt(mean_p var_p(f) mean_p var_p(r))
    best of n = the exact expectation under draws of n without replacement (`methods.best_of_n`)

A policy that is moved a little towards the reward moves feature f by its covariance with it (Price's equation), so the
sign says which way pressure pushes; the curves say how far selection has pushed at n. Every prompt counts the same.

What this cannot show: a cause. A feature that goes with length covaries with a reward that pays for length. Nor other
policies: these are samples of one, and pressure finds texts that it hardly ever writes. With heavy tails its intervals
are too short: in simulations of 6 to 25 prompts of 2 to 15 samples, reward and feature lognormal and correlated .4, .71
of those of the covariance held it (nearly all others lay below), .82 of the slope's and .85 of the correlation's.

References: Gao, Schulman and Hilton 2023, arXiv 2210.10760; Beirami et al. 2024, arXiv 2401.01879.
"""

import importlib.metadata
import platform
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.data.samples import RESERVED, Samples, read_samples
from reward_lens.errors import DataError
from reward_lens.features import TEXT_FEATURES, latin_share, text_features
from reward_lens.methods.behaviour.best_of_n import best_of_n_weights, kl_bound, tail_index, turning_point
from reward_lens.result import Check, Result

DIMS = ("prompt_id", "feature", "n")


@checked_arguments
def optimisation_pressure(
    samples, rm=None, *, features: Iterable | None = None, n_max: int | None = None, seed: int = 0, n_boot: int = 2000
) -> Result:
    """What goes up and what goes down as responses are chosen by their reward.

    Parameters
    ----------
    samples: a data frame, or the path of a .csv, .parquet, .jsonl or .json file: `prompt`, `response`, `reward`, and
        where there is one `gold`, the score that the reward stands in for. A prompt needs two samples or more.
    rm: scores the responses where there is no column `reward`; both together raise.
    features: names of columns of numbers and of `features.TEXT_FEATURES`; None takes all of both. A column named like
        a text feature stands in its place. The columns id and subset are no features.
    n_max: the curves' n are the powers of two up to here; None: the fewest samples of any prompt. Prompts with fewer
        than a given n_max are left out of the curves (not of the covariances).
    n_boot: resamples of whole prompts, for intervals of more than 20 prompts and for where gold turns down.

    Returns value (prompt_id, feature, n): how far the best of n lies above the mean of the prompt's samples, in
    within-prompt SDs of the feature, that SD taken as known; `mean`, `low`, `high` (feature, n) over prompts. The
    features are "reward", "gold" if given, and the others. Coordinates of (feature, n): `expected`, `expected_low`,
    `expected_high`, the mean over prompts in the feature's own unit. Of n: `kl`, an upper bound in nats. Of feature:
    `kind`; `sd`; `covariance`, `slope` (reward per unit of the feature) and `correlation`, each with `_low` and `_high`
    (ratios linearised); `p` (sign-flip over prompts, whose null is symmetry about zero) and `p_holm`. Of prompt_id:
    `prompt`, `n_samples`. In `meta`: `gold_turns_down` and `tail` (`methods.best_of_n`), `test`, `notes`.

    Under 6 prompts there is no interval and no p. Where a feature is the same in all samples of every prompt its value,
    slope, correlation and p are NaN, as are correlation and p where the reward is; the reward is not tested against
    itself. Raises `DataError` for missing
    columns, cells that are no finite numbers, names that are neither column nor text feature, an n_max that no prompt
    has, and where no prompt has two samples. Cannot show a cause, nor what another policy would find.
    """
    read = read_samples(samples)
    rewards = _rewards(read, rm)
    names, kinds, values = _features(read, features, rewards)
    ns = _sizes(read, n_max)
    spreads = np.array([_moments(values[rows]) for rows in read.rows])  # [prompt, (covariance, variance), feature]
    raw, gaps = _curves(read, values, ns)
    sd = np.sqrt(spreads[:, 1].mean(0))
    keys = np.array([g.prompt_key for g in read.groups], dtype=object)
    gain = (raw - raw[..., :1]) / np.where(sd > 0, sd, np.nan)[:, None]
    over, own = (stats.mean_interval(cube, keys, n_boot=n_boot, seed=seed) for cube in (gain, raw))
    within, test = _within(spreads, names, keys, n_boot, seed)
    coords: dict[str, Any] = {
        "prompt_id": keys,
        "prompt": ("prompt_id", np.array([g.messages[-1]["content"] for g in read.groups] + [None], object)[:-1]),
        "n_samples": ("prompt_id", np.array([len(rows) for rows in read.rows])),
        "feature": np.array(names, dtype=object),
        "kind": ("feature", np.array(kinds, dtype=object)),
        "sd": ("feature", sd),
        "n": ns,
        "kl": ("n", kl_bound(ns)),
        "expected": (DIMS[1:], own.mean),
        "expected_low": (DIMS[1:], own.low),
        "expected_high": (DIMS[1:], own.high),
    } | {key: ("feature", column) for key, column in within.items()}
    value = xr.DataArray(gain, dims=DIMS, coords=coords)
    rest = value.drop_vars(["prompt_id", "prompt", "n_samples"]).isel(prompt_id=0)
    mean, low, high = (rest.copy(data=np.asarray(part)) for part in (over.mean, over.low, over.high))
    if read.left_out:
        found = f"prompts with one sample: {', '.join(read.left_out[:5])}{', ...' if len(read.left_out) > 5 else ''}"
        gaps.append(Check("rows left out", float(len(read.left_out)), np.inf, found))
    never = [name for name, spread in zip(names, sd, strict=True) if spread == 0]
    short = int(np.isnan(raw[:, 0, 0]).sum())
    reasons = [f"no spread within any prompt: {', '.join(never)}"] if never else []
    reasons += [f"{short} prompts with fewer than {ns[-1]} samples"] if short else []
    gold = (
        turning_point(raw[:, names.index("gold")], ns, n_boot, seed)
        if "gold" in names
        else {"n": None, "kl": None, "reason": "no column 'gold'", "bootstrap": None, "n_prompts": 0}
    )
    centred = np.concatenate([rewards[rows] - rewards[rows].mean() for rows in read.rows])
    meta = {
        "title": "Optimisation pressure", "seed": seed, "n_samples": len(rewards),
        "settings": {"n_max": n_max, "n_boot": n_boot, "features": names},
        "interval": {"level": 0.95, "unit": "prompt", "method": own.method},
        "definitions": {name: TEXT_FEATURES[name] for name, kind in zip(names, kinds, strict=True) if kind == "text"},
        "test": test, "gold_turns_down": gold,
        "tail": tail_index(centred, np.repeat(keys, [len(rows) for rows in read.rows])),
        "notes": _notes(read, spreads[:, 1, 0], ns, n_max, short),
        "shows": "How far each property of the responses moves when the best of n by reward is kept, and which "
        "properties go with the reward among responses to one prompt.",
        "cannot_show": "That a property is what the reward pays for: it may go with one that is. Nor what training "
        "would find: the best of n only reweights these samples, the KL is an upper bound, and few samples cannot "
        "tell a light tail of the reward from a heavy one.",
    }  # fmt: skip
    return Result(
        "optimisation_pressure", value, unit="within_prompt_sd", mean=mean, low=low, high=high, checks=gaps,
        undefined="; ".join(reasons) or None, meta=_provenance(rm, read) | meta,
    )  # fmt: skip


def _rewards(read: Samples, rm) -> np.ndarray:
    """Rewards [row], from the table or from the model."""
    if (rm is None) == ("reward" not in read.frame):
        raise DataError(
            f"{read.name}: it is not clear which rewards to take",
            found="no column 'reward' and no reward model" if rm is None else "a column 'reward' and a reward model",
            expected="one of the two",
            do="add the column 'reward' or pass rm=" if rm is None else "drop the column 'reward' or leave rm out",
        )
    if rm is None:
        return read.numbers("reward")
    scores = rm.score_many(read.groups).value.values
    rewards = np.empty(len(read.frame))
    for row, members in zip(scores, read.rows, strict=True):
        rewards[members] = row[: len(members)]
    return rewards


def _features(read: Samples, wanted, rewards: np.ndarray) -> tuple[list[str], list[str], np.ndarray]:
    """Names, kinds and values [row, feature], the reward first, then gold."""
    columns = read.numeric_columns()
    texts = [name for name in TEXT_FEATURES if name not in columns]
    if wanted is None:
        wanted = [*texts, *columns]
    listed = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [
        name for name in listed
        if not isinstance(name, str) or name in RESERVED or (name not in read.frame and name not in TEXT_FEATURES)
    ]  # fmt: skip
    if isinstance(wanted, str) or unknown or len(set(listed)) < len(listed):
        raise DataError(
            "The features were not understood",
            found=f"the text {wanted!r}" if isinstance(wanted, str)
            else f"no features of {read.name}: {', '.join(map(repr, unknown))}" if unknown else "a name given twice",
            expected=f"a list of different names out of {', '.join([*texts, *columns])}",
            do="correct the names; reward and gold are always among the features",
        )  # fmt: skip
    named = [(name, "column" if name in read.frame else "text") for name in listed]
    named = [("reward", "reward"), *([("gold", "gold")] if "gold" in read.frame else []), *named]
    counted: dict[str, np.ndarray] = {"reward": rewards}
    if any(kind == "text" for _, kind in named):
        rows = np.concatenate(read.rows)
        cells = [text_features(group.prompt, response) for group in read.groups for response in group.responses]
        for name in TEXT_FEATURES:
            counted[name] = np.empty(len(rows))
            counted[name][rows] = [cell[name] for cell in cells]
    taken = [read.numbers(name) if kind in ("column", "gold") else counted[name] for name, kind in named]
    return [name for name, _ in named], [kind for _, kind in named], np.stack(taken, 1)


def _sizes(read: Samples, n_max: int | None) -> np.ndarray:
    counts = [len(rows) for rows in read.rows]
    largest = min(counts) if n_max is None else n_max
    if not 2 <= largest <= max(counts):
        raise DataError("No prompt has that many samples", found=f"n_max={n_max}", expected=f"2 to {max(counts)}",
                        do="lower n_max, or leave it out for the fewest samples of any prompt")  # fmt: skip
    return 2 ** np.arange(int(largest).bit_length())


def _moments(values: np.ndarray) -> np.ndarray:
    """Covariance with the first column and variance, [2, feature], of the samples of one prompt."""
    # Rounding of a mean is no spread: a constant column is exactly zero from its mean.
    centred = np.where(np.ptp(values, axis=0) > 0, values - values.mean(0), 0.0)
    return np.stack([centred[:, 0] @ centred, (centred**2).sum(0)]) / (len(values) - 1)


def _curves(read: Samples, values: np.ndarray, ns: np.ndarray) -> tuple[np.ndarray, list[Check]]:
    """Expected value of each feature of the best of n [prompt, feature, n], NaN for prompts with too few samples."""
    raw = np.full((len(read.rows), values.shape[1], len(ns)), np.nan)
    total = first = falls = 0.0
    size = np.abs(values).max(0) + np.finfo(float).tiny
    for curve, rows in zip(raw, read.rows, strict=True):
        if len(rows) < ns[-1]:
            continue
        weights = np.stack([best_of_n_weights(values[rows, 0], int(n)) for n in ns], 1)
        curve[:] = values[rows].T @ weights
        total = max(total, float(np.abs(weights.sum(0) - 1).max()))
        first = max(first, float((np.abs(curve[:, 0] - values[rows].mean(0)) / size).max()))
        falls = max(falls, float(-np.diff(curve[0]).min() / size[0]))
    checks = [Check("weights sum to one", total, 1e-9), Check("the best of one is the mean", first, 1e-9)]
    return raw, [*checks, Check("the reward does not fall with n", falls, 1e-9)]


def _within(spreads: np.ndarray, names: list[str], keys: np.ndarray, n_boot: int, seed: int) -> tuple[dict, dict]:
    """Columns by feature of the within-prompt statistics, and what the test was."""
    covariance, variance = spreads[:, 0], spreads[:, 1]
    c, v = covariance.mean(0), variance.mean(0)
    scaled = np.where(v > 0, v, np.nan)
    slope, both = c / scaled, np.sqrt(scaled * scaled[0])
    correlation = c / both
    # A ratio of means plus its linearised deviation, one row a prompt: the rows' mean is the ratio itself.
    deviations = {
        "covariance": covariance,
        "slope": slope + (covariance - slope * variance) / scaled,
        "correlation": correlation
        + covariance / both
        - correlation / 2 * (variance / scaled + variance[:, :1] / scaled[0]),
    }
    columns: dict[str, np.ndarray] = {}
    for name, rows in deviations.items():
        over = stats.mean_interval(rows, keys, n_boot=n_boot, seed=seed)
        limit = 1.0 if name == "correlation" else np.inf
        columns[name] = np.asarray(over.mean)
        columns[f"{name}_low"], columns[f"{name}_high"] = np.clip(np.array([over.low, over.high]), -limit, limit)
    p, smallest = np.full(len(names), np.nan), np.nan
    for i in range(1, len(names)):
        if covariance[:, i].any():  # all zero: nothing varies, and there is nothing to test
            test = stats.sign_flip_test(covariance[:, i], keys, seed=seed)
            p[i], smallest = test.p, test.smallest_p
    columns |= {"p": p, "p_holm": stats.adjust(p)}
    tests = int((~np.isnan(p)).sum())
    reason = (
        "" if tests
        else f"{len(keys)} prompts; a p needs {stats.FEWEST}" if len(keys) < stats.FEWEST
        else "within every prompt the rewards are all equal, or every feature is"
    )  # fmt: skip
    needed = int(np.ceil(1 + np.log2(tests / 0.05))) if tests else None
    return columns, {
        "name": "sign flip of the prompts' covariances", "assumes": "symmetry about zero", "n_tests": tests,
        "smallest_p": None if not tests else smallest, "prompts_needed_for_holm": needed, "reason": reason,
    }  # fmt: skip


def _notes(read: Samples, reward_variance: np.ndarray, ns: np.ndarray, n_max: int | None, short: int) -> list[str]:
    """What is odd about the samples, in words."""
    responses = [response for group in read.groups for response in group.responses]
    equal = int((reward_variance == 0).sum())
    foreign = sum(latin_share(response) < 0.5 for response in responses)
    counts = [len(rows) for rows in read.rows]
    unused = [str(c) for c in read.frame if c not in (*RESERVED, *read.numeric_columns())]
    found = {
        f"rewards all equal in {equal} of {len(counts)} prompts: nothing is chosen there": equal,
        f"{len(counts)} prompts: under {stats.FEWEST} there is no interval and no p": len(counts) < stats.FEWEST,
        f"empty or blank responses: {sum(not r.strip() for r in responses)}": not all(r.strip() for r in responses),
        f"responses mostly in another script than Latin: {foreign} (the lists of hedges, assertive words and praise "
        "are English)": foreign,
        f"prompts with fewer than {ns[-1]} samples, left out of the curves: {short}": short,
        f"the curves end at n = {ns[-1]} because a prompt has {min(counts)} samples; others have up to {max(counts)}":
        n_max is None and min(counts) < max(counts),
        f"columns that are not numbers, not used: {', '.join(unused)}": unused,
    }  # fmt: skip
    return [words for words, holds in found.items() if holds]


def _provenance(rm, read: Samples) -> dict[str, Any]:
    if rm is not None:
        return rm.describe("optimisation_pressure", read.groups, source=read.name)
    versions = {name: importlib.metadata.version(name) for name in ("reward-lens", "numpy")}
    return {
        "method": "optimisation_pressure", "source": read.name,
        "versions": versions | {"python": platform.python_version()},
        "n_groups": len(read.groups), "n_prompts": len(read.groups), "inputs_hash": data.inputs_hash(read.groups),
    }  # fmt: skip
