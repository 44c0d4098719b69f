"""The causal effect of sites on the reward: change one, recompute everything after it, see what the reward does.

    noise     chosen run, site takes the rejected value     effect = r(chosen)  - r(patched)     is the site needed?
    denoise   rejected run, site takes the chosen value     effect = r(patched) - r(rejected)    does it suffice?
    zero, mean, resample   both runs, site ablated          effect = r(run)     - r(ablated)

Positive in noise and denoise: the site supports the preference. Nothing is frozen (`path="total"`, `norm="live"`)
unless asked for: `path="direct"` changes the site in what the reward head reads alone (see `direct`), `norm="frozen"`
holds the final norm's scale at its value in the clean run, and with it the slope of a head that is a network (URM, LDL,
INF-ORM: `meta["exactness"]` is "local"), so that effects are along the clean run's direction. A prompt-gated head's
weights answer to a change of the prompt like everything else; `gate_routes` takes that route apart. Every row is
compared with a clean row of its own batch.

What this cannot show: that the changed state is one the network ever reaches by itself (see `divergence`); and a small
effect of one site is no proof that it does nothing, since others may stand in for it.

Reference: Zhang and Nanda 2023, arXiv 2309.16042; Heimersheim and Nanda 2024, arXiv 2404.15255.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import Spans
from reward_lens.methods.causation.effect_readings import Reading
from reward_lens.methods.causation.effect_sweeps import (
    ABLATIONS,
    EXCHANGES,
    Progress,
    asked_sites,
    effects_result,
    sweep_settings,
    swept,
)
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Result

Mode = Literal["noise", "denoise", "zero", "mean", "resample"]
Estimator = Literal["exact", "gradient", "integrated", "integrated_block", "integrated_joint", "relevance"]
ESTIMATORS = get_args(Estimator)


@checked_arguments
def effects(
    rm: RewardModel,
    pairs,
    sites: str | Sequence["Site | str"] = "components",
    mode: Mode = "noise",
    at: Literal["final", "response", "all"] = "final",
    estimator: Estimator = "exact",
    path: Literal["total", "direct"] = "total",
    align: Literal["tail", "diff", "legacy_prefix"] | None = None,
    spans: Spans = None,
    norm: Literal["live", "frozen"] = "live",
    reference=None,
    n_draws: int = 20,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Causal effect of each site on the reward, in reward units.

    Parameters
    ----------
    sites: "components" (embed and every attention and MLP write), "heads", "residual" (the stream at every depth),
        "experts" (the weight of every routed expert), or a list of `Site` objects or written forms (``"L3.H5"``,
        ``"L3.N17"``, ``"L2.resid_mid"``, ``"L4.K1"``, ``"L3.R2"``, ``"L3.router"``: a block's routing as a whole).
    mode: see the top of the module. Ablations have a dim `side`; only its margin speaks of the preference.
    at: "final", the reward position, always comparable. "response" and "all" need responses of the same token count or
        an alignment; positions that chosen and rejected share are the same in both runs and are left alone.
    estimator: "exact" runs every change; the others estimate from gradients (see `estimators`) and are labelled so.
    path: "direct" adds a dim `part`: direct (frozen norm), norm_rescale, mediated, total; under a prompt-gated head
        also gate and interaction, the route through what the gate reads.
    align: "tail", "diff" or "legacy_prefix" (a known artefact; not with path="direct", whose end is what the head reads
        in both runs), for responses of different length; ablations have none and refuse one.
    spans: patch parts of the aligned positions one by one: "position" (each by itself: a dim `position`), or {name:
        range of positions in the changed run} for all pairs or one such mapping a pair (a dim `span` of all names; NaN
        where a pair lacks one). Ablations change both runs at these; by position their margin has those that the two
        runs begin with in common.
    norm: "live"; or "frozen", the final norm's scale (and the slope of a head that is a network) as in the clean run.
    reference: pairs of other prompts whose responses mean and resample take values from; None: the other prompts among
        `pairs`. Both ablations respect a token's role (prompt, response, template tail); at "final" their values are
        those of the references' reward positions.
    n_draws: of resample, at least 20; `value` is their mean, the coordinate `draw_sd` their spread.
    layers: keep only sites of these layers.
    max_rows: changed runs walking at once; None: as many as a token budget and the free memory allow.
    progress: called with (pairs done, pairs).
    options: of an estimator: `steps`, `calibrate`, `grad_drop`.

    Returns value (pair, component), with `side` before it for ablations and `position` or `span` after it, in reward
    units; mean and interval over prompts (none by position: other texts have other tokens there). Coordinate
    `recovered` of noise and denoise: effect / margin, NaN where the margin is under the noise floor. Checks: "clean
    row" (the unchanged row of each sweep is the run's reward). Raises `AlignmentError` for lengths that need an
    alignment, `StructureError` for a site the model lacks, `DataError` for empty spans and overlapping references,
    `CheckFailed` for values that are not finite.
    """
    pairs = data.as_pairs(pairs)
    wanted = asked_sites(rm, sites, layers)
    _require_settings(mode, estimator, path, norm, options)
    if reference is not None and mode not in ("mean", "resample"):
        raise DataError("effects was given a reference that it would not use", found=f"mode={mode!r}",
                        expected="mode='mean' or 'resample', whose values come from the reference",
                        do="leave reference out, or name one of these modes")  # fmt: skip
    settings = sweep_settings(
        rm, pairs, sites, wanted, mode, at, align, layers, spans, estimator=estimator, path=path, norm=norm
    )
    if path == "direct":
        from reward_lens.methods.causation.direct import direct_effects

        if estimator != "exact" or spans is not None or norm != "live" or align == "legacy_prefix":
            raise DataError("The direct path was asked for together with something it has not",
                            found=f"estimator={estimator!r}, norm={norm!r}, align={align!r}, "
                            f"spans given: {spans is not None}",
                            expected="estimator='exact', norm='live' (both norms are parts of the result), no spans, "
                            "and an alignment in which the reward positions correspond",
                            do="leave these at their defaults")  # fmt: skip
        return direct_effects(rm, pairs, wanted, settings, reference=reference, n_draws=n_draws, seed=seed,
                              max_rows=max_rows, progress=progress)  # fmt: skip
    if estimator != "exact":
        from reward_lens.methods.causation.estimators import estimated_effects

        return estimated_effects(rm, pairs, wanted, settings, spans=spans, seed=seed, max_rows=max_rows,
                                 progress=progress, **options)  # fmt: skip
    reading = Reading(rm, norm)
    found = swept(rm, pairs, wanted, settings, reading, spans, reference, n_draws, seed, max_rows, progress)
    return effects_result(rm, pairs, wanted, found, settings, seed)


def _require_settings(mode: str, estimator: str, path: str, norm: str, options: Mapping) -> None:
    known = {"mode": (mode, (*EXCHANGES, *ABLATIONS)), "estimator": (estimator, ESTIMATORS),
             "path": (path, ("total", "direct")), "norm": (norm, ("live", "frozen"))}  # fmt: skip
    for name, (value, allowed) in known.items():
        if value not in allowed:
            raise DataError(f"effects was asked for a {name} it does not have", found=repr(value),
                            expected=", ".join(map(repr, allowed)), do=f"pass one of these as {name}=")  # fmt: skip
    if options and estimator == "exact":
        raise DataError("effects was given options that only estimators have", found=", ".join(options),
                        expected="none with estimator='exact'", do="drop them, or name an estimator")  # fmt: skip
