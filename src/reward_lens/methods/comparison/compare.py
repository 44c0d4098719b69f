"""Where two or more reward models agree, where they do not, and how far their insides are alike.

    agreement      share of pairs on which both prefer the same response; a tie of either counts half
    kappa          (agreement - e) / (1 - e), e = what two independent ones would reach by how often each is right
    reward         correlation of rewards as deviations from their mean over the different responses to a prompt
    margin         correlation of margins over pairs
    lens           mean over pairs of the correlation of what the lens margin gains between relative depths
    contributions  the same of what attention and MLP write towards the margin, by relative depth; effects: of effects
    cka            debiased linear CKA of the states at the reward position: of prompts (mean over responses), and of
                   the differences between chosen and rejected; of the last depth, by depth in `compared_curves`
    reward angle   u' S v / sqrt(u' S u  v' S v), u and v the head rows times their norm's gain, S the covariance within
                   prompts of both models' states; only where the states are versions of each other

What is compared is texts, so tokenizers may differ; everything that is a correlation is free of a reward's scale and
constant. Rewards of different prompts share no scale, hence within prompts. One model is in memory at a time.

What this cannot show: which model is right where they differ, or that alike states are used alike. Agreement has a
floor that accuracy sets: two models right on nine pairs of ten agree on .82 without anything else in common.

Reference: Cohen 1960 (kappa); Kornblith et al. 2019, arXiv 1905.00414, and Nguyen et al. 2021, arXiv 2010.15327 (CKA).
The relative depth, the profiles and the angle between models are this library's.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.comparison import compared_curves as curves_of
from reward_lens.methods.comparison import compared_models as compared
from reward_lens.methods.comparison import compared_scores as scores
from reward_lens.methods.comparison.compared_models import STATES, Cell, plain
from reward_lens.methods.comparison.model_summary import PROFILES, Summary, Texts, named_models, summaries
from reward_lens.methods.shared.paired_shares import paired_change
from reward_lens.result import Check, Result
from reward_lens.stats import Estimate

OF_CHECKPOINTS = {
    "accuracy": "fraction", "accuracy change": "fraction", "reward sd": "reward", "reward sd ratio": "ratio"
}  # fmt: skip
LEVEL = {
    "level": 0.95, "unit": "prompt",
    "method": "jackknife of prompts; wilson (agreement, accuracy, accuracy change); mean_interval",
}  # fmt: skip


@checked_arguments
def compare(
    models,
    pairs,
    profiles: Sequence[str] = ("lens", "contributions", "states"),
    probes: Sequence | None = None,
    n_permutations: int | None = None,
    seed: int = 0,
) -> Result:
    """Agreement of every two reward models on the same texts: preferences, rewards, profiles by depth, states.

    Parameters
    ----------
    models: {name: model}, two or more, or a sequence of models and paths (named by themselves). A model is a
        `RewardModel`, a path or hub id for `load`, or a function without arguments that loads one. What is loaded here
        is gone before the next one is loaded; a `RewardModel` is yours and stays.
    pairs: preference pairs. A pair with the texts of an earlier one is left out (check "repeated pairs").
    profiles: any of "lens", "contributions", "states" (one pass each model) and "effects" (of all components, noise and
        denoise at the reward position: a sweep a pair). () compares rewards alone.
    probes: edits as in `probe_hacking`, whose shifts `compared_curves` puts side by side; None: no probes.
    n_permutations: of the null of CKA (prompts of one side in random order); 0: none. None: 199, or as many as let a p
        adjusted over all of the result come under .05.

    Returns value (models, measure) in [-1, 1] with low and high over prompts; models = "a ~ b" for every two, with
    coordinates `first`, `second` and `alignment` (correlation of their states' entries; an angle needs .5). Coordinates
    of both dims: `expected` (agreement by chance given the accuracies; mean of CKA's null), `p` of the permutation test
    with `p_holm` over all of the result, `n` (pairs, texts or prompts), `n_prompts`, and `reason` where there is no
    value or no interval. `unit_of` says what a measure is. No interval under 6 prompts, nor of a perfect correlation.
    The interval of a correlation, kappa and CKA is the jackknife's over prompts. In `meta`: "models" (by name: accuracy
    with interval, SD of rewards within prompts, mean tokens, layers, width, provenance), margins of all pairs (see
    `disagreements`) and the curves (see `compared_curves`).

    Raises `DataError` for fewer than two models, a name twice, something that is no model, unknown profiles; and what
    loading and the methods raise. A base language model has no reward head: put it under the reward model's
    (`base_under_head`) and read the measures of states.

    Cannot show which model is right where they differ, nor that states which are alike are used alike.
    """
    pairs, repeated = _distinct(data.as_pairs(pairs))
    read = _read(models, pairs, profiles, probes, n_permutations)
    n_bins = compared.bins_of(read)
    two = compared.two_of(read)
    n_permutations = _enough(n_permutations, len(two))
    cells = [compared.between(read[i], read[j], pairs, n_bins, n_permutations, seed) for i, j in two]
    names = np.array([compared.pair_name(read[i], read[j]) for i, j in two], dtype=object)
    coords = {"models": names}
    coords |= {
        key: ("models", np.array([read[pair[k]].name for pair in two], dtype=object))
        for k, key in enumerate(("first", "second"))
    }
    coords["alignment"] = ("models", np.array([compared.alignment(read[i], read[j]) for i, j in two]))
    curves = {}
    for name in ("lens", "contributions", "effects"):
        if name in profiles:
            curves[name] = curves_of.share_curves(read, name, n_bins, pairs)
    if "states" in profiles:
        curves["states"] = curves_of.state_curves(read)
    if probes is not None:
        curves["probes"] = curves_of.probe_curves(read)
    return _result(
        "compare", read, pairs, repeated, "models", coords, cells, compared.UNITS, seed, unit="share or correlation",
        settings={"profiles": list(profiles), "n_permutations": n_permutations, "n_bins": n_bins},
        title=f"{len(read)} reward models compared", curves=curves,
        shows="How far every two models agree in preferences, rewards, where in depth the margin arises, and states.",
        cannot_show="Which one is right where they differ. Agreement has a floor set by accuracy (`expected`), and "
        "states that are alike need not be used alike.",
    )  # fmt: skip


@checked_arguments
def compare_checkpoints(
    models,
    pairs,
    steps: Sequence[int | float] | None = None,
    against: Literal["first", "last"] = "first",
    profiles: Sequence[str] = ("states",),
    n_permutations: int | None = None,
    seed: int = 0,
) -> Result:
    """Checkpoints of one run beside its first or last: agreement, states, read-out angle, accuracy, spread of rewards.

    `models` in the order of training and `pairs`, `profiles`, `n_permutations` as in `compare`. `steps`: a number a
    model, rising; None takes those of a Trainer's folders (names that end in "checkpoint-500" or so), else counts from
    0. `against`: the checkpoint that all others are held against.

    Returns value (step, measure) with low and high over prompts: those of `compare` against that checkpoint, and
    "accuracy" (fraction; a tie counts half), "accuracy change" (difference from that checkpoint, paired), "reward sd"
    (within prompts, reward units) and "reward sd ratio" to that checkpoint. Coordinates as in `compare`, with `name` of
    each step. That checkpoint's own row compares it with itself, so its correlations are 1 without an interval or a p.

    Raises `DataError` as `compare` does, and for steps that do not rise or match. Cannot show what happened between two
    checkpoints; and a trend over steps is one run's, its intervals are over prompts, not runs.
    """
    pairs, repeated = _distinct(data.as_pairs(pairs))
    if against not in ("first", "last"):
        raise DataError("There is no such checkpoint to compare with", found=f"against={against!r}",
                        expected="'first' or 'last'", do="pass one of these")  # fmt: skip
    models = named_models(models)
    at = _steps(steps, list(models))
    read = _read(models, pairs, profiles, None, n_permutations)
    reference = read[0] if against == "first" else read[-1]
    n_bins = compared.bins_of(read)
    cells, n_permutations = [], _enough(n_permutations, len(read) - 1)
    for one in read:
        cells.append(_alone(one, reference, pairs))
        permuted = 0 if one is reference else n_permutations  # it is like itself, which is no finding
        cells[-1] |= compared.between(reference, one, pairs, n_bins, permuted, seed)
    coords = {"step": at, "name": ("step", np.array([s.name for s in read], dtype=object))}
    coords["alignment"] = ("step", np.array([compared.alignment(reference, s) for s in read]))
    return _result(
        "compare_checkpoints", read, pairs, repeated, "step", coords, cells, OF_CHECKPOINTS | compared.UNITS, seed,
        unit="as unit_of says",
        settings={"profiles": list(profiles), "n_permutations": n_permutations, "n_bins": n_bins, "against": against},
        title=f"Checkpoints compared with the {against}", curves={},
        shows=f"How far each checkpoint agrees with the {against}, and how accuracy and the spread of rewards move.",
        cannot_show="What happened between two checkpoints, or what another run would do: intervals are over prompts.",
    )  # fmt: skip


@checked_arguments
def disagreements(result: Result, first: str | None = None, second: str | None = None, n: int = 20) -> pd.DataFrame:
    """The pairs on which two models prefer different responses most clearly.

    `result` of `compare` or `compare_checkpoints`; `first` and `second` are names of its models, by default the first
    two. Returns a table of at most `n` rows: `pair`, `prompt`, `subset`, the margins of both in SDs of their rewards
    within prompts (positive: the chosen response), and `gap`, the distance between the two, by which it is sorted.
    Pairs on which either ties are not in it. Raises `DataError` for another result or an unknown name.
    """
    kept = result.meta.get("pairs")
    names = list(result.meta.get("models", ()))
    wanted = [name for name in names[:2]] if first is None and second is None else [first, second]
    if kept is None or len(wanted) < 2 or wanted[0] == wanted[1] or not set(wanted) <= set(names):
        raise DataError(
            "There is nothing to list the disagreements of",
            found=f"a result of '{result.name}'" if kept is None else f"models {first!r} and {second!r}",
            expected="a result of compare, and two of its models" + (f": {', '.join(names)}" if names else ""),
            do="pass compare(models, pairs) and two different names, or none",
        )
    spreads = [result.meta["models"][name]["within_prompt_sd"] for name in wanted]
    a, b = (np.array(kept["margins"][w]) / (sd or np.nan) for w, sd in zip(wanted, spreads, strict=True))
    table = pd.DataFrame({key: kept[key] for key in ("pair", "prompt", "subset")})
    table[wanted[0]], table[wanted[1]], table["gap"] = a, b, np.abs(a - b)
    opposed = table[np.sign(a) * np.sign(b) < 0]
    return opposed.sort_values("gap", ascending=False, kind="stable").head(n).reset_index(drop=True)


def _enough(n_permutations: int | None, rows: int) -> int:
    """The number given, or one at which Holm's first step over the rows' tests can come under .05."""
    return max(199, 20 * len(STATES) * rows) if n_permutations is None else n_permutations


def _read(models, pairs: data.Pairs, profiles, probes, n_permutations: int | None) -> list[Summary]:
    unknown = [p for p in profiles if p not in PROFILES] if not isinstance(profiles, str) else [profiles]
    if unknown or (n_permutations is not None and n_permutations < 0):
        raise DataError(
            "The comparison was not understood",
            found=f"profiles={profiles!r}, n_permutations={n_permutations}",
            expected=f"a sequence of {', '.join(PROFILES)}, and 0 permutations or more",
            do="correct these; the defaults are a good start",
        )
    return summaries(named_models(models), pairs, profiles, probes)


def _result(
    name: str, read: list[Summary], pairs: data.Pairs, repeated: int, dim: str, coords: dict[str, Any],
    cells: Sequence[dict[str, Cell]], units: dict[str, str], seed: int, unit: str, **meta: Any,
) -> Result:  # fmt: skip
    measures = [m for m in units if m in cells[0]]
    table = [[row[m] for m in measures] for row in cells]
    dims = (dim, "measure")

    def column(get: Callable[[Cell], Any], kind: type = float) -> np.ndarray:
        return np.array([[get(c) for c in row] for row in table], dtype=kind)

    p = column(lambda c: c.p)
    reasons = column(lambda c: c.estimate.reason, object)
    coords |= {"measure": np.array(measures, dtype=object)}
    coords |= {"unit_of": ("measure", np.array([units[m] for m in measures], dtype=object))}
    coords |= {"expected": (dims, column(lambda c: c.expected)), "p": (dims, p), "p_holm": (dims, stats.adjust(p))}
    coords |= {"n": (dims, column(lambda c: c.estimate.n, int)), "reason": (dims, reasons)}
    coords |= {"n_prompts": (dims, column(lambda c: c.estimate.n_clusters, int))}
    value, low, high = (
        xr.DataArray(column(lambda c, key=key: getattr(c.estimate, key)), dims=dims, coords=coords)
        for key in ("value", "low", "high")
    )
    undefined = "; ".join(dict.fromkeys(reasons[value.isnull().values].tolist()))
    checks = _checks(read)
    if repeated:
        checks.append(Check("repeated pairs", float(repeated), np.inf, "texts of an earlier pair: left out"))
    columns = {"pair": [p.id for p in pairs], "prompt": [p.messages[-1]["content"] for p in pairs]}
    columns |= {"subset": [p.subset or "" for p in pairs], "margins": {s.name: plain(s.margins) for s in read}}
    provenance = {
        "method": name, "model": ", ".join(s.name for s in read), "models": {s.name: _about(s, pairs) for s in read},
        "versions": read[0].about["versions"], "n_pairs": len(pairs), "n_prompts": pairs.n_prompts,
        "inputs_hash": data.inputs_hash(pairs), "seed": seed, "interval": LEVEL, "pairs": columns,
    }  # fmt: skip
    return Result(name, value, unit=unit, low=low, high=high, checks=checks, undefined=undefined or None,
                  meta=provenance | meta)  # fmt: skip


def _about(summary: Summary, pairs: data.Pairs) -> dict[str, Any]:
    right = _accuracy(summary, pairs)
    return summary.about | {"accuracy": {key: plain(getattr(right, key)) for key in ("value", "low", "high")}}


def _alone(one: Summary, reference: Summary, pairs: data.Pairs) -> dict[str, Cell]:
    """What a checkpoint is by itself, and how that differs from the reference."""
    texts, prompts = Texts(pairs), [p.prompt_key for p in pairs]
    rewards, others = (s.rewards.reshape(-1)[texts.first] for s in (one, reference))
    change = (np.sign(one.margins) - np.sign(reference.margins)) / 2
    ends = (0.0, 0.0) if one is reference else paired_change(change, prompts)[2:]
    gain = stats.Interval(float(change.mean()), *ends, len(pairs), pairs.n_prompts, "paired shares")
    return {
        "accuracy": Cell(_accuracy(one, pairs)),
        "accuracy change": Cell(scores.from_interval(gain)),
        "reward sd": Cell(scores.spread(rewards, texts.prompts)),
        "reward sd ratio": Cell(scores.spread_ratio(rewards, others, texts.prompts)),
    }


def _accuracy(summary: Summary, pairs: data.Pairs) -> Estimate:
    """Agreement with one who always prefers the chosen response."""
    return scores.agreement(summary.margins, np.ones(len(pairs)), [p.prompt_key for p in pairs])


def _checks(read: Iterable[Summary]) -> list[Check]:
    """The worst of each model's checks of a name."""
    worst: dict[str, Check] = {}
    for summary in read:
        for check in summary.checks:
            name = f"{summary.name}: {check.name}"
            if name not in worst or check.gap > worst[name].gap:
                worst[name] = Check(name, check.gap, check.tolerance, check.note)
    return list(worst.values())


def _distinct(pairs: data.Pairs) -> tuple[data.Pairs, int]:
    """The pairs without those of an earlier one's texts: a copy is no further evidence."""
    first = {(p.prompt_key, *p.responses): p for p in reversed(pairs)}
    kept = [p for p in pairs if first[p.prompt_key, *p.responses] is p]
    return (pairs, 0) if len(kept) == len(pairs) else (data.Pairs(kept, pairs.source), len(pairs) - len(kept))


def _steps(steps: Sequence[int | float] | None, names: Sequence[str]) -> np.ndarray:
    numbers = [int(end[1]) for name in names if (end := re.search(r"checkpoint-(\d+)$", name))]
    if steps is None:
        steps = numbers if len(numbers) == len(names) else range(len(names))
    at = np.asarray(steps, dtype=float)
    if at.shape != (len(names),) or not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise DataError(
            "The steps do not go with the checkpoints",
            found=f"steps {list(steps)} and the models {', '.join(names)}",
            expected="one finite number a model, each above the one before",
            do="pass the models in the order of training (by name checkpoint-1000 stands before checkpoint-500), "
            "and steps where the names do not tell them",
        )
    return at
