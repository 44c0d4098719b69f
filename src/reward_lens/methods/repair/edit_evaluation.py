"""What an edit of a reward model changes: every probe and the accuracy on every set, before, after, and the difference.

    shift of a probe    mean over responses of r(edited text) - r(text), in units of that model's within-prompt SD
    accuracy            share of pairs in the right order, a tie half

Differences are paired: the same prompts, both models; that of accuracies as in `shared.paired_shares`. All probes are
measured, not the one that was edited for: taking one bias away may move its pressure to another. Intervals are over
prompts, of which one with more pairs counts for more; p of the differences by sign-flips of prompt means, adjusted by
Holm over all rows. The SD is measured on the same prompts, and two models' SDs differ by chance: of a probe one prompt
at a time is left out of mean and SD together, T_g, the interval is T +- t sqrt((G - 1) / G sum_g (T_g - T)^2), and the
test flips T - (G - 1) (T_g - mean T_g), which for a known SD would be the prompt means. With the SDs held, a shift of 1
SD that neither model changes is called a change in .6 of cases, at any number of prompts; so in .05.

What this cannot show: effects on texts unlike these, or on what is trained against the edited model. A shift that is
gone where the edit was made may be there where texts differ in the property by themselves: `margin_features` of both
models tells. The prompts should be ones that neither the directions nor alpha were chosen on.

Reference: arXiv 2605.27996 (bias substitution after single-axis edits).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.edits import TextEdit, edits_of
from reward_lens.errors import DataError
from reward_lens.methods.behaviour.edited_texts import scaled_shifts, scored_edits, within_prompt_sd
from reward_lens.methods.shared.paired_shares import ends_of_change, won
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Result

STATES = ("before", "after", "change")
UNITS = {"probe": "within-prompt SD", "accuracy": "fraction"}


@checked_arguments
def evaluate_edit(
    before: RewardModel,
    after: RewardModel,
    pairs,
    sets: Mapping[str, Any],
    probes: Sequence[str | TextEdit] | None = None,
    seed: int = 0,
) -> Result:
    """Every probe on `pairs`, and accuracy on every one of `sets` {name: pairs}, of a model before and after an edit.

    Returns value (measure, state), state = before, after, change (after - before), with low and high over prompts;
    `kind` = probe or accuracy (of a set, and of its subsets where it has several), `unit_of` = within-prompt SD or
    fraction; coordinates `p` and `p_holm` of the change, `n_prompts` (of a probe, those whose texts it changes; under 6
    there is no interval and no p). Rows of probes that change no text are NaN. SDs are each model's own. The interval
    of a change in accuracy has a width where no pair changes, so it may hold 0 beside a small p.
    Raises `DataError` for sets without pairs or models with different tokenizers.
    """
    pairs, sets = data.as_pairs(pairs), {name: data.as_pairs(some) for name, some in sets.items()}
    if before.tokenize(pairs[0].prompt, pairs[0].chosen).ids != after.tokenize(pairs[0].prompt, pairs[0].chosen).ids:
        raise DataError("The two models read texts differently", found="different token ids of the first pair",
                        expected="a model and an edit of it", do="pass the model that edit_head was given")  # fmt: skip
    rows = _probe_rows(before, after, pairs, probes, seed)
    for name, some in sets.items():
        rows += _accuracy_rows(before, after, name, some, seed)
    p = np.array([row["p"] for row in rows])
    coords = {
        "measure": np.array([row["name"] for row in rows], dtype=object),
        "state": np.array(STATES, dtype=object),
        "kind": ("measure", np.array([row["kind"] for row in rows], dtype=object)),
        "unit_of": ("measure", np.array([UNITS[row["kind"]] for row in rows], dtype=object)),
        "p": ("measure", p),
        "p_holm": ("measure", stats.adjust(p)),
        "n_prompts": ("measure", np.array([row["n_prompts"] for row in rows])),
    }
    cube = np.array([row["cells"] for row in rows])  # [measure, state, (mean, low, high)]
    value, low, high = (xr.DataArray(cube[..., i], dims=("measure", "state"), coords=coords) for i in range(3))
    return Result(
        "evaluate_edit", value, unit="SD or fraction", low=low, high=high, undefined="the probe changes no text here",
        meta=before.describe(
            "evaluate_edit", pairs, title="Before and after an edit", seed=seed, after=after.name,
            settings={"sets": {name: len(some) for name, some in sets.items()}},
            interval={"level": 0.95, "unit": "prompt"},
            shows="What the edit changes: the reward bought by every probe, and accuracy, with paired differences.",
            cannot_show="Effects on other texts, or on a policy that is trained against the edited model.",
        ),
    )  # fmt: skip


def _probe_rows(before: RewardModel, after: RewardModel, pairs: data.Pairs, probes, seed: int) -> list[dict[str, Any]]:
    edits, prompts = edits_of(probes), [pair.prompt_key for pair in pairs]
    found, texts = scored_edits([before, after], pairs, edits), [pair.responses for pair in pairs]
    first, second = (scaled_shifts(one.shifts(), one.plain, prompts, texts) for one in found)
    change = second - first
    sds = [within_prompt_sd(one.plain, prompts, texts) for one in found]
    floor = max(rm.noise_floor / sd if sd > 0 else 0.0 for rm, sd in zip((before, after), sds, strict=True))
    flipped = change.value - (len(change.without) - 1) * (change.without - change.without.mean(0))
    flipped[np.abs(flipped) <= floor] = 0.0  # rounding has a sign too
    cells = np.array([(some.value, *some.ends()) for some in (first, second, change)])
    return [
        {"name": f"probe: {edit.name}", "kind": "probe", "cells": cells[..., i], "n_prompts": int(n),
         "p": stats.sign_flip_test(flipped[:, i], seed=seed).p if n >= stats.FEWEST else np.nan}
        for i, (edit, n) in enumerate(zip(edits, change.n, strict=True))
    ]  # fmt: skip


def _accuracy_rows(
    before: RewardModel, after: RewardModel, name: str, pairs: data.Pairs, seed: int
) -> list[dict[str, Any]]:
    """A row for all pairs of a set and, where it has several subsets, one for each."""
    prompts = np.array([pair.prompt_key for pair in pairs])
    scored = scored_edits([before, after], pairs, [])
    same = np.array_equal(scored[0].plain, scored[1].plain)
    first, second = (won(one.plain[:, 0] - one.plain[:, 1]) for one in scored)
    subset = np.array([pair.subset or "" for pair in pairs])
    named = list(dict.fromkeys(subset.tolist()))
    parts = {f"accuracy: {name}": np.ones(len(pairs), bool)}
    if len(named) > 1:
        parts |= {f"accuracy: {name}, {one or 'no subset'}": subset == one for one in named}
    rows = []
    for label, keep in parts.items():
        some = prompts[keep]
        change = second[keep] - first[keep]
        test = stats.sign_flip_test(change, some, seed=seed)
        shares = [stats.proportion_interval(credit[keep], some) for credit in (first, second)]
        # Of the same model there is nothing to estimate.
        ends = (0.0, 0.0) if same and test.n >= stats.FEWEST else ends_of_change(change, some)
        cells = [*([share.mean, share.low, share.high] for share in shares), [change.mean(), *ends]]
        rows.append({"name": label, "kind": "accuracy", "cells": cells, "p": test.p, "n_prompts": test.n})
    return rows
