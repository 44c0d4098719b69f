"""Effects estimated from gradients, for sweeps that are too large to run: attribution patching and its kin.

    gradient          dr/dx (base) . (x' - x)                    2 forwards and 1 backward for all sites
    integrated        mean over a in (0, 1) of dr/dx (x + a (x' - x)) . (x' - x), one site moved, everything after it
                      responding; converges to that site's exact effect; `steps` rows a site
    integrated_joint  the same gradient averaged over runs in which the residual entering block 0 goes from the base
                      run's to the source run's: `steps` passes for all sites (EAP-IG). At the reward position alone,
                      where both runs have the same token, the mean of the two runs' own gradients
    relevance         one backward in which norms, attention weights and activations are held at their values and a
                      gate's two factors share (`relevance`)

x is the site's value in the changed run, x' the other run's; signs are those of `effects`. What this cannot show: that
an estimate is right. The first order misses what saturates and what cancels, so a result carries its calibration
against exact effects (`calibrate=N` cells) or says that it has none.

Reference: Nanda 2023 (attribution patching); Kramar et al. 2024, arXiv 2403.00745; Hanna et al. 2024, arXiv 2403.17806.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reward_lens.engine.alignment import Alignment
from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.gradients import Gradients, gradients
from reward_lens.engine.patching import patch_gradients
from reward_lens.engine.runs import TextRun, run_pair
from reward_lens.errors import DataError
from reward_lens.methods.effect_cells import Cells, cells_of, contiguous
from reward_lens.methods.relevance import RelevanceRules
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Result

FEWEST_CELLS = 100


def estimated_effects(
    rm: RewardModel, pairs, sites: Sequence[Site], settings: dict, *, spans=None, seed: int = 0,
    max_rows: int | None = None, progress=None, steps: int | None = None, calibrate: int | None = None, **unknown: Any,
) -> Result:  # fmt: skip
    """`effects(estimator=...)`. Returns value (pair, component[, position or span]) in reward units.

    `steps`: nodes of integrated (8) and integrated_joint (5). `calibrate`: at least 100 (pair, site) cells, of whole
    pairs drawn at random, on which the estimate is held against exact effects; Pearson, Spearman and the recall of the
    ten largest stand in meta["calibration"].
    """
    from reward_lens.methods.effects import Found, effects_result

    mode, estimator = settings["mode"], settings["estimator"]
    if mode not in ("noise", "denoise") or unknown:
        raise DataError(
            "An estimator was asked for something it does not have",
            found=f"mode={mode!r}" + (f", options {', '.join(unknown)}" if unknown else ""),
            expected="mode 'noise' or 'denoise'; options steps and calibrate",
            do="use estimator='exact' for ablations, and leave other options away",
        )
    if calibrate is not None and calibrate < FEWEST_CELLS:
        raise DataError("Too few cells to calibrate an estimator", found=f"calibrate={calibrate}",
                        expected=f"at least {FEWEST_CELLS} cells", do="calibrate on more")  # fmt: skip
    steps = steps or (8 if estimator == "integrated" else 5)
    found = Found()
    for i, (pair, tokens) in enumerate(zip(pairs, rm.tokenize_pairs(pairs), strict=True)):
        runs = run_pair(rm, tokens[0], tokens[1], sites, only_final=settings["at"] == "final")
        base, source = runs if mode == "noise" else runs[::-1]
        where = aligned(base.tokens, source.tokens, settings["at"], settings["align"], str(pair.id))
        cells = cells_of(base.tokens, where, spans, i, str(pair.id))
        change = cells.empty(len(sites))
        if where.base:
            _ESTIMATE[estimator](rm, sites, cells, where, base, source, steps, max_rows, change)
        found.values.append(-change if mode == "noise" else change)
        found.groups.append(cells)
        found.margins.append(runs[0].reward - runs[1].reward)
        if progress is not None:
            progress(i + 1, len(pairs))
    settings |= {"steps": steps} if estimator.startswith("integrated") else {}
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


def _by_slopes(
    passes: Sequence[tuple[Gradients, float, str]], sites, cells: Cells, base: TextRun, source: TextRun, out
):
    """Weighted sum over passes of slope . (x' - x); a pass of the source run is read at the source's positions."""
    for g, group in enumerate(cells.groups):
        if group is None or not group.base:
            continue
        for s, site in enumerate(sites):
            moved = source.at(site, group.source) - base.at(site, group.base)
            total = 0.0
            for slope, weight, run in passes:
                positions = group.base if run == "base" else group.source
                total += weight * slope.along(site, positions, moved)
            out[s, g] = total


def _gradient(rm, sites, cells, where: Alignment, base, source, steps, max_rows, out) -> None:
    _by_slopes([(_at(rm, base, sites, where.base), 1.0, "base")], sites, cells, base, source, out)


def _relevance(rm, sites, cells, where: Alignment, base, source, steps, max_rows, out) -> None:
    slope = _at(rm, base, sites, where.base, rules=RelevanceRules(rm))
    _by_slopes([(slope, 1.0, "base")], sites, cells, base, source, out)


def _joint(rm, sites, cells, where: Alignment, base, source, steps, max_rows, out) -> None:
    embed = Site("embed")
    own = _at(rm, base, [embed], where.base).values[embed]
    if where.base == (base.tokens.reward_pos,):
        passes = [
            (_at(rm, base, sites, where.base), 0.5, "base"),
            (_at(rm, source, sites, where.source), 0.5, "source"),
        ]
        return _by_slopes(passes, sites, cells, base, source, out)
    theirs = own.clone()
    start = _start(rm, base, where.base)
    from_source = _at(rm, source, [embed], where.source)
    rows = [p - start for p in where.base]
    theirs[rows] = from_source.values[embed][[p - from_source.start for p in where.source]]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    passes = []
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        entering = torch.lerp(own, theirs, float(node))
        passes.append((_at(rm, base, sites, where.base, entering=entering), float(weight), "base"))
    _by_slopes(passes, sites, cells, base, source, out)


def _integrated(rm, sites, cells, where: Alignment, base: TextRun, source: TextRun, steps, max_rows, out) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    rows, index, moves = [], [], []
    for g, group in enumerate(cells.groups):
        if group is None or not group.base:
            continue
        for s, site in enumerate(sites):
            x, moved = base.at(site, group.base), source.at(site, group.source) - base.at(site, group.base)
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                leaf = (x + float(node) * moved).requires_grad_(True)
                rows.append((Edit(site, contiguous(group.base), _leaf(leaf)), leaf))
                index.append((s, g))
                moves.append(float(weight) * moved)
    slopes = patch_gradients(rm, base.tokens, rows, known=base.keys, max_rows=max_rows)
    for (s, g), slope, moved in zip(index, slopes, moves, strict=True):
        out[s, g] += float((slope.double() * moved.double()).sum())


def _leaf(leaf: torch.Tensor) -> Source:
    return Source("leaf", lambda x, site, run, positions: leaf.to(x.dtype).reshape(x.shape))


_ESTIMATE = {"gradient": _gradient, "relevance": _relevance, "integrated_joint": _joint, "integrated": _integrated}


def _start(rm: RewardModel, run: TextRun, positions: Sequence[int]) -> int:
    return min(positions) if rm.reuses_prefix(run.tokens) else 0


def _at(rm: RewardModel, run: TextRun, sites, positions: Sequence[int], **options: Any) -> Gradients:
    return gradients(rm, run.tokens, sites, _start(rm, run, positions), run.keys, **options)


def _calibration(rm, pairs, sites, settings, spans, found, calibrate: int, seed: int) -> dict[str, Any]:
    """Estimates against exact effects on pairs drawn at random, cell by cell."""
    from scipy.stats import pearsonr, spearmanr

    from reward_lens.methods.effects import effects

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
        top = min(10, keep.sum())
        best = [set(np.argsort(-np.abs(v[keep]), kind="stable")[:top].tolist()) for v in (truth, estimate)]
        recalls.append(len(best[0] & best[1]) / max(1, top))
        if sum(map(len, exact)) >= calibrate:
            break
    x, y = np.concatenate(exact), np.concatenate(guess)
    if len(x) < calibrate:
        raise DataError("There are too few cells to calibrate on", found=f"{len(x)} (pair, site) cells",
                        expected=f"at least {calibrate}", do="pass more pairs or sites")  # fmt: skip
    return {"cells": len(x), "pairs": len(exact), "pearson": float(np.array(pearsonr(x, y))[0]),
            "spearman": float(np.array(spearmanr(x, y))[0]), "top_10_recall": float(np.mean(recalls))}  # fmt: skip
