"""The effects of one sweep on every objective of a head: the changed runs are walked once, each row is read by all.

    effect_k = r_k(run) - r_k(changed run)         signs as in `effects`, r_k the reward of objective k

Under a gate that reads the prompt (ArmoRM, QRM) the first objective is the gated reward, whose weights answer to a
change of the prompt; the others are what it weighs. What this cannot show: how objectives compare, each having its own
scale.
"""

from collections.abc import Sequence
from typing import Literal

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import Spans
from reward_lens.methods.causation.effect_readings import Objectives
from reward_lens.methods.causation.effect_sweeps import (
    ABLATIONS,
    EXCHANGES,
    asked_sites,
    effects_result,
    sweep_settings,
    swept,
)
from reward_lens.model.objectives import with_every_objective
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import Progress
from reward_lens.model.sites import Site
from reward_lens.result import Result


@checked_arguments
def objective_effects(
    rm: RewardModel,
    pairs,
    sites: str | Sequence["Site | str"] = "components",
    mode: Literal["noise", "denoise", "zero", "mean", "resample"] = "noise",
    at: Literal["final", "response", "all"] = "final",
    align: Literal["tail", "diff"] | None = None,
    spans: Spans = None,
    reference=None,
    n_draws: int = 20,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Causal effect of each site on every objective of a head, from one sweep.

    Parameters
    ----------
    rm: a model with several objectives: a multi-label head, or ArmoRM, QRM, URM and LDL, whose first one is the gated
        reward; it does not matter for which of them it was loaded.
    sites, mode, at, align, spans, reference, n_draws, layers, max_rows, progress: as in `effects`.

    Returns value (pair, component, objective), with `side` before `component` for ablations and `position` or `span`
    last, in units of each objective's reward; mean and interval as in `effects`. Coordinates `margin` (pair, objective)
    and `recovered` of noise and denoise, as in `effects`. Checks: "clean row" (of the objective that the model was run
    for), "last residual" where it is among the sites (its effect is the margin of every objective). Raises
    `StructureError` for a head with one objective, and what `effects` raises.
    What it cannot show: how objectives compare, each having its own scale; nor what `effects` cannot.
    """
    rm, readouts = with_every_objective(rm)
    pairs = data.as_pairs(pairs)
    wanted = asked_sites(rm, sites, layers)
    if mode not in (*EXCHANGES, *ABLATIONS):
        raise DataError("objective_effects was asked for a mode it does not have", found=f"mode={mode!r}",
                        expected=", ".join(map(repr, (*EXCHANGES, *ABLATIONS))), do="pass one of these")  # fmt: skip
    settings = sweep_settings(rm, pairs, sites, wanted, mode, at, align, layers, spans)
    reading = Objectives(rm, readouts)
    found = swept(rm, pairs, wanted, settings, reading, spans, reference, n_draws, seed, max_rows, progress)
    return effects_result(
        rm, pairs, wanted, found, settings, seed, name="objective_effects",
        title=f"Effects on every objective ({mode}, {at})",
        shows="How much of each objective's reward, or of its margin, is lost or won when one site is changed and all "
        "after it is recomputed.",
        cannot_show="How objectives compare, each having its own scale; and whether the changed state is natural.",
    )  # fmt: skip
