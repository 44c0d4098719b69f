"""Effects estimated from gradients, for sweeps that are too large to run: attribution patching and its kin.

    gradient          dr/dx (base) . (x' - x)                    2 forwards and 1 backward for all sites
    integrated        mean over a in (0, 1) of dr/dx (x + a (x' - x)) . (x' - x), one site moved, everything after it
                      responding; converges to that site's exact effect; `steps` rows a site
    integrated_block  the same with the heads (neurons) of a block moved together: `steps` rows a write; converges to
                      the write's exact effect, to which its heads' estimates sum
    integrated_joint  the same gradient averaged over runs in which the residual entering block 0 goes from the base
                      run's to the source run's: `steps` passes for all sites (EAP-IG). At the reward position alone,
                      where both runs have the same token, the mean of the two runs' own gradients
    relevance         one backward in which norms, attention weights and activations are held at their values and a
                      gate's two factors share (`relevance`)

x is the site's value in the changed run, x' the other run's; signs are those of `effects`. Queries, keys, values and
patterns: the block's attention is run again on the changed value, and what follows the heads is estimated (AtP*;
`integrated` estimates the softmax too). What this cannot show: that an estimate is right. The first order misses what
saturates and what cancels, so a result carries its calibration against exact effects (`calibrate=N` cells) or says
that it has none. Check "clean row": the reward of the pass that gradients were taken from is the run's reward.

Reference: Nanda 2023 (attribution patching); Kramar et al. 2024, arXiv 2403.00745; Hanna et al. 2024, arXiv 2403.17806.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.places import require_behind_gate
from reward_lens.engine.runs import run_pair
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import cells_of
from reward_lens.methods.causation.effect_sweeps import Found, effects_result
from reward_lens.methods.causation.estimate_task import Estimate, Task
from reward_lens.methods.causation.first_order import gradient, integrated_joint, relevance
from reward_lens.methods.causation.integrated import block_carriers, integrated, integrated_block
from reward_lens.methods.causation.relevance import HELD
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Result

RECALLED = 10
FEWEST_CELLS = 100


def estimated_effects(
    rm: RewardModel, pairs, sites: Sequence[Site], settings: dict, *, spans=None, seed: int = 0,
    max_rows: int | None = None, progress=None, steps: int | None = None, calibrate: int | None = None,
    grad_drop: bool = False, **unknown: Any,
) -> Result:  # fmt: skip
    """`effects(estimator=...)`. Returns value (pair, component[, position or span]) in reward units.

    `steps`: nodes of integrated (8), integrated_joint (5) and integrated_block (2). `grad_drop` (of gradient): a
    coordinate of that name, the mean size of the estimate over gradients that skip one block each. `calibrate`: at
    least 100 (pair, site) cells, of whole pairs drawn at random, on which the estimate is held against exact effects;
    Pearson, Spearman and the recall of the ten largest (over pairs with more than ten, None without any) stand in
    meta["calibration"].
    """
    mode, estimator = settings["mode"], settings["estimator"]
    steps = _require(mode, estimator, steps, grad_drop, calibrate, unknown)
    settings |= {"steps": steps} if estimator in STEPS else {}
    settings |= {"held": HELD} if estimator == "relevance" else {}
    options = {"grad_drop": True} if grad_drop else {}
    settings |= options
    held = list(dict.fromkeys([*sites, *_ALSO_HELD.get(estimator, lambda sites: [])(sites)]))
    found = Found()
    for i, (pair, tokens) in enumerate(zip(pairs, rm.tokenize_pairs(pairs), strict=True)):
        runs = run_pair(rm, tokens[0], tokens[1], held, only_final=settings["at"] == "final")
        base, source = runs if mode == "noise" else runs[::-1]
        where = aligned(base.tokens, source.tokens, settings["at"], settings["align"], str(pair.id))
        if settings["norm"] == "frozen":
            require_behind_gate(rm, base.tokens, where.base)
        cells = cells_of(base.tokens, where, spans, i, str(pair.id), source.tokens)
        change, drop = cells.empty(len(sites)), cells.empty(len(sites))
        if where.base:
            task = Task(rm, str(pair.id), sites, cells, where, base, source, settings["norm"], steps, max_rows)
            estimate = _ESTIMATE[estimator](task, **options)
            change, drop = estimate.change, drop if estimate.grad_drop is None else estimate.grad_drop
            found.gaps.append(estimate.gap)
        found.values.append(-change if mode == "noise" else change)
        if grad_drop:
            found.grad_drop.append(drop)
        found.groups.append((cells,))
        found.margins.append(runs[0].reward - runs[1].reward)
        if progress is not None:
            progress(i + 1, len(pairs))
    calibration: Any = "uncalibrated"
    if calibrate is not None:
        calibration = _calibration(rm, pairs, sites, settings, spans, found, calibrate, seed)
    label = "uncalibrated" if calibrate is None else f"Spearman {calibration['spearman']:.2f} with exact effects"
    return effects_result(
        rm, pairs, sites, found, settings, seed, calibration=calibration,
        title=f"Effects estimated by {estimator} ({mode}, {settings['at']}; {label})",
        shows="An estimate, from gradients, of the reward lost or won when one site is changed.",
        cannot_show="The effect itself: first-order estimates miss what saturates and what cancels. "
        + ("This one has not been held against exact effects." if calibrate is None else f"Here: {label}."),
    )  # fmt: skip


_ESTIMATE: dict[str, Callable[..., Estimate]] = {
    "gradient": gradient, "relevance": relevance, "integrated_joint": integrated_joint, "integrated": integrated,
    "integrated_block": integrated_block,
}  # fmt: skip
# What an estimator reads of the two runs besides the sites.
_ALSO_HELD: dict[str, Callable[[Sequence[Site]], Iterable[Site]]] = {
    "integrated_joint": lambda sites: [Site("embed")],
    "integrated_block": lambda sites: block_carriers(sites).values(),
}
STEPS = {"integrated": 8, "integrated_joint": 5, "integrated_block": 2}


def _require(mode: str, estimator: str, steps, grad_drop: bool, calibrate, unknown: dict) -> int:
    """The number of steps, or an error for what the estimator does not have."""
    wrong = [f"options {', '.join(unknown)}"] if unknown else []
    wrong += [f"mode={mode!r}"] if mode not in ("noise", "denoise") else []
    wrong += [f"steps={steps!r} with estimator={estimator!r}"] if steps is not None and estimator not in STEPS else []
    wrong += [f"grad_drop with estimator={estimator!r}"] if grad_drop and estimator != "gradient" else []
    if wrong:
        raise DataError(
            "An estimator was asked for something it does not have",
            found="; ".join(wrong),
            expected="mode 'noise' or 'denoise'; options calibrate, steps (of the integrated ones) and grad_drop (of "
            "gradient)",
            do="use estimator='exact' for ablations, and leave other options away",
        )
    for name, value, least in (("steps", steps, 1), ("calibrate", calibrate, FEWEST_CELLS)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and (not whole or value < least):
            raise DataError(f"An estimator was given {name} that it cannot use", found=f"{name}={value!r}",
                            expected=f"a whole number, at least {least}", do=f"raise {name} or drop it")  # fmt: skip
    return steps or STEPS.get(estimator, 1)


def _calibration(rm, pairs, sites, settings, spans, found, calibrate: int, seed: int) -> dict[str, Any]:
    """Estimates against exact effects on pairs drawn at random, cell by cell."""
    from scipy.stats import pearsonr, spearmanr

    from reward_lens.methods.causation.effects import effects

    rng = np.random.default_rng(seed)
    exact, guess, recalls = [], [], []
    for i in rng.permutation(len(pairs)):
        one: Any = spans if spans is None or isinstance(spans, str) or hasattr(spans, "items") else [spans[i]]
        result = effects(rm, [pairs[i]], sites, settings["mode"], settings["at"], align=settings["align"], spans=one,
                         norm=settings["norm"])  # fmt: skip
        truth, estimate = result.value.values.ravel(), found.values[i].ravel()
        keep = np.isfinite(truth) & np.isfinite(estimate)
        exact.append(truth[keep])
        guess.append(estimate[keep])
        if keep.sum() > RECALLED:
            best = [set(np.argsort(-np.abs(v[keep]), kind="stable")[:RECALLED].tolist()) for v in (truth, estimate)]
            recalls.append(len(best[0] & best[1]) / RECALLED)
        if sum(map(len, exact)) >= calibrate:
            break
    x, y = np.concatenate(exact), np.concatenate(guess)
    if len(x) < calibrate:
        raise DataError("There are too few cells to calibrate on", found=f"{len(x)} (pair, site) cells",
                        expected=f"at least {calibrate}", do="pass more pairs or sites")  # fmt: skip
    recall: dict[str, Any] = {"top_10_recall": float(np.mean(recalls)) if recalls else None}
    if not recalls:
        recall["no_recall"] = f"no pair has more than {RECALLED} cells, so that all of them are the largest"
    return {"cells": len(x), "pairs": len(exact), "pearson": float(np.array(pearsonr(x, y))[0]),
            "spearman": float(np.array(spearmanr(x, y))[0])} | recall  # fmt: skip
