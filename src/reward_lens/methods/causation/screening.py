"""Screen, then verify: estimate the effect of every site, run the largest exactly.

    estimate   all sites, by an estimator (`estimators`)
    exact      the `top` sites by mean |estimate|, each run (`effects`)
    recall     of the `top` sites by mean |exact effect|, the share among the screened ones, measured on calibration
               pairs on which every site is run

What this cannot show: a site that the estimator misses and that is not among the calibration pairs' largest; the recall
says how often that happens.

Reference: Kramar et al. 2024, arXiv 2403.00745 (AtP* with verification).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import sites_of
from reward_lens.methods.causation.effect_sweeps import site_coords
from reward_lens.methods.causation.effects import Estimator, effects
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

OPTIONS = ("steps", "calibrate", "grad_drop")
UNVERIFIED = "not among the screened sites: only an estimate"


@checked_arguments
def screen_then_verify(
    rm: RewardModel,
    pairs,
    sites: "str | Sequence[Site | str]" = "heads",
    top: int = 20,
    estimator: Estimator = "gradient",
    mode: Literal["noise", "denoise"] = "noise",
    at: Literal["final", "response", "all"] = "final",
    align: Literal["tail", "diff"] | None = None,
    calibration_pairs: int = 4,
    seed: int = 0,
    max_rows: int | None = None,
    **options: Any,
) -> Result:
    """Estimates of all sites and exact effects of the largest.

    `calibration_pairs`: pairs drawn at random on which every site is run, for the recall. `options` are the
    estimator's; with `grad_drop=True` sites are ranked by that coordinate (AtP*).

    Returns value (pair, component, kind) in reward units, kind = estimate, exact (NaN where a site was not verified).
    The recorded check "recall" and meta["recall"] give the share of the truly largest sites that were screened, on the
    calibration pairs; meta["screened"] names them. Raises `DataError` for top or calibration_pairs under 1, for more of
    them than there are sites or pairs, and what `effects` does.
    """
    pairs = data.as_pairs(pairs)
    wanted = sites_of(rm, sites)
    if estimator == "exact":
        raise DataError("The screening has no estimator", found="estimator='exact'", expected="an estimator",
                        do="use effects(...), which runs every site")  # fmt: skip
    others = sorted(set(options) - set(OPTIONS))
    if others:
        raise DataError("The screening was given options that estimators do not have", found=", ".join(others),
                        expected=", ".join(OPTIONS), do="leave these out: they would change the estimate "
                        "and not the exact effect beside it")  # fmt: skip
    if not 1 <= top <= len(wanted) or not 1 <= calibration_pairs <= len(pairs):
        raise DataError("The screening was not understood", found=f"top={top}, calibration_pairs={calibration_pairs}",
                        expected=f"top from 1 to {len(wanted)}, calibration_pairs from 1 to {len(pairs)}",
                        do="pass numbers in these ranges")  # fmt: skip
    shared: Any = {"mode": mode, "at": at, "align": align, "max_rows": max_rows, "seed": seed}
    estimate = effects(rm, pairs, wanted, estimator=estimator, **shared, **options)
    ranked = estimate.value["grad_drop"] if "grad_drop" in estimate.value.coords else estimate.value
    size = np.abs(ranked.values).mean(0)
    screened = np.sort(np.argsort(-size, kind="stable")[:top])
    exact = np.full(estimate.value.shape, np.nan)
    verified = effects(rm, pairs, [wanted[i] for i in screened], **shared)
    exact[:, screened] = verified.value.values
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:calibration_pairs])
    whole = effects(rm, [pairs[int(i)] for i in drawn], wanted, **shared).value.values
    largest = np.argsort(-np.abs(whole).mean(0), kind="stable")[:top]
    recall = len(set(largest) & set(screened)) / top
    note = f"share of the {top} largest sites of {calibration_pairs} pairs, on which every site was run"
    return paired_result(
        rm, "screen_then_verify", pairs, np.stack([estimate.value.values, exact], -1), ("pair", "component", "kind"),
        _coords(wanted),
        checks=[*verified.checks, Check("recall", recall, math.inf, note)], undefined=UNVERIFIED, seed=seed,
        title=f"Screened by {estimator}, verified exactly ({mode}, {at})", recall=recall, noise_floor=rm.noise_floor,
        screened=[str(wanted[i]) for i in screened],
        settings={"estimator": estimator, "top": top, "mode": mode, "at": at, "align": align,
                  "calibration_pairs": calibration_pairs, **options},
        shows="Exact effects of the sites that an estimate finds largest, beside the estimates of all.",
        cannot_show="The sites the estimate misses; the recall, measured on pairs on which every site was run, says "
        "how many those are.",
    )  # fmt: skip


def _coords(sites: Sequence[Site]) -> dict[str, Any]:
    """Coordinates of the components; `kind` is the dim of estimates here, so a site's own kind is `site_kind`."""
    coords = site_coords(sites)
    coords["site_kind"] = coords.pop("kind")
    return coords | {"kind": np.array(["estimate", "exact"], dtype=object)}
