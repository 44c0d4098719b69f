"""First-order estimates: slopes of the reward times the moves of the sites, from a few passes for all sites.

    gradient          slope at the changed run
    relevance         the same, seen through the rules of `relevance`
    integrated_joint  slopes averaged over runs in which the residual entering block 0 goes from the base run's to the
                      source run's; at the reward position alone, the mean of the two runs' own slopes

Queries, keys, values and patterns sit inside the softmax, which saturates: there the move is that of the heads'
outputs, with the block's attention run again on the changed value (AtP*'s correction for saturation), and only what
comes after the heads is linear.

GradDrop, AtP*'s correction for cancellation: the gradient through one block's writes at a time is dropped; the mean
size of the estimates that remain is large also where paths of opposite sign cancel.

Reference: Kramar et al. 2024, arXiv 2403.00745; Hanna et al. 2024, arXiv 2403.17806. See `estimators`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from reward_lens.engine.alignment import Alignment
from reward_lens.engine.editing import IN_ATTENTION, Edit
from reward_lens.engine.gradients import Gradients, gradients, gradients_without
from reward_lens.engine.intervention import pattern, values
from reward_lens.engine.receivers import mixed
from reward_lens.engine.runs import TextRun
from reward_lens.errors import AlignmentError, DataError
from reward_lens.methods.causation.effect_cells import contiguous
from reward_lens.methods.causation.estimate_task import Estimate, Task
from reward_lens.methods.causation.relevance import RelevanceRules
from reward_lens.model.forward import record, suffix_batch
from reward_lens.model.prefix import PrefixCache
from reward_lens.model.sites import Site


class Pass(NamedTuple):
    """Slopes, their weight, and the run at whose positions they are read."""

    found: Gradients
    weight: float
    of_source: bool = False


class Move(NamedTuple):
    """What moves when a site is patched: a site, the positions in either run, and by how much."""

    site: Site
    where: Alignment
    by: torch.Tensor


def gradient(task: Task, grad_drop: bool = False) -> Estimate:
    """One backward; with `grad_drop` one more for every block."""
    own = _slopes(task, task.base)
    moves = _moves(task)
    change = _summed(task, moves, [Pass(own, 1.0)])
    return Estimate(change, task.gap([own.reward]), _grad_drop(task, moves) if grad_drop else None)


def relevance(task: Task) -> Estimate:
    """One backward under the rules of relevance, which hold the final norm's scale too."""
    own = _slopes(task, task.base, rules=RelevanceRules(task.rm))
    return Estimate(_summed(task, _moves(task), [Pass(own, 1.0)]), task.gap([own.reward]))


def integrated_joint(task: Task) -> Estimate:
    """A backward a node."""
    base, source, where = task.base, task.source, task.where
    moves = _moves(task)
    # Where the first token is read, its keys and values move the heads of every position, which no two texts share.
    moves_all = base.tokens.reads_first and any(s.kind in IN_ATTENTION for s in task.sites)
    if where.base == (base.tokens.reward_pos,) and not moves_all:
        own = _slopes(task, base)
        passes = [Pass(own, 0.5), Pass(_slopes(task, source), 0.5, of_source=True)]
        return Estimate(_summed(task, moves, passes), task.gap([own.reward]))
    embed = Site("embed")
    own = _slopes(task, base, sites=[embed])
    entering, other = own.values[embed], source.at(embed, where.source).to(own.values[embed])
    rows = [p - own.start for p in where.base]
    if torch.equal(entering[rows], other):
        raise no_way("integrated_joint", task.pair_id, "estimator='gradient' or 'integrated'")
    passes, theirs = [], entering.clone()
    theirs[rows] = other
    nodes, weights = np.polynomial.legendre.leggauss(task.steps)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        on_the_way = torch.lerp(entering, theirs, float(node))
        passes.append(Pass(_slopes(task, base, entering=on_the_way), float(weight)))
    return Estimate(_summed(task, moves, passes), task.gap([own.reward]))


def no_way(what: str, pair_id: str, instead: str) -> AlignmentError:
    """The error for two texts whose embeddings are the same where they are aligned."""
    return AlignmentError(
        f"{what} has no way to go between the texts of pair {pair_id}",
        found="the same token at every pair of aligned positions",
        expected="aligned positions with different tokens: the way goes from one text's embeddings to the other's",
        do=f"use {instead}, or leave this pair out",
    )


def _slopes(task: Task, run: TextRun, sites: Sequence[Site] | None = None, **options: Any) -> Gradients:
    wanted = _sloped(task.sites) if sites is None else sites
    return gradients(task.rm, run.tokens, wanted, _start(task, run), run.keys, frozen_at=task.frozen_at, **options)


def _start(task: Task, run: TextRun) -> int:
    if run is task.base:
        return task.start
    return min(task.where.source) if task.rm.reuses_prefix(run.tokens) else 0


def _sloped(sites: Sequence[Site]) -> list[Site]:
    """The sites whose slopes are needed: heads stand for what is inside their attention."""
    return list(dict.fromkeys(Site("head", s.block) if s.kind in IN_ATTENTION else s for s in sites))


def _moves(task: Task) -> dict[tuple[int, int], Move]:
    """By (site, group): what moves."""
    out, inside = {}, {}
    for g, group in task.groups():
        for s, site in enumerate(task.sites):
            moved = task.moved(site, group)
            if site.kind not in IN_ATTENTION:
                out[s, g] = Move(site, group, moved)
                continue
            new = task.base.at(site, group.base) + moved
            given = pattern(new) if site.kind == "pattern" else values(new)
            inside.setdefault(site.block, []).append(((s, g), Edit(site, contiguous(group.base), given)))
    if inside:
        out |= _attention_moves(task, inside)
    return out


def _attention_moves(task: Task, inside: dict[int, list[tuple[tuple[int, int], Edit]]]) -> dict:
    """Moves of the heads' outputs, from the first patched position on, with each block's attention run again."""
    rm, tokens, start = task.rm, task.base.tokens, task.start
    past = PrefixCache(task.base.keys.first(start), rm.n_layers) if start else None
    with torch.no_grad():
        recording = record(rm.trunk, suffix_batch(tokens, start, rm.device, tokens.seen.stop), past=past)
    after = tuple(range(start, tokens.seen.stop))
    shift = task.source.tokens.reward_pos - tokens.reward_pos
    where = Alignment(after, tuple(p + shift for p in after))
    if task.where.base == (tokens.reward_pos,) and not tokens.reads_first:
        where = where.only([tokens.reward_pos])
    out = {}
    for layer, some in inside.items():
        moved = mixed(rm, recording, start, layer, [edit for _, edit in some], task.max_rows)
        for (cell, _), by in zip(some, moved, strict=True):
            out[cell] = Move(Site("head", layer), where, by[[p - start for p in where.base]])
    return out


def _summed(task: Task, moves: dict[tuple[int, int], Move], passes: Sequence[Pass]) -> np.ndarray:
    """Weighted sum over passes of slope . move."""
    out = task.cells.empty(len(task.sites))
    for cell, move in moves.items():
        out[cell] = 0.0
        for found, weight, of_source in passes:
            positions = move.where.source if of_source else move.where.base
            out[cell] += weight * found.along(move.site, positions, move.by)
    return out


def _grad_drop(task: Task, moves: dict[tuple[int, int], Move]) -> np.ndarray:
    """Mean size of the estimates over blocks dropped, those left out whose writes are the site itself."""
    if any(s.kind == "resid_mid" for s in task.sites):
        raise DataError("GradDrop was asked for a site it does not have", found="resid_mid",
                        expected="writes, heads, neurons, what is inside the attention, resid_pre or resid_post",
                        do="leave resid_mid out, or grad_drop=True away")  # fmt: skip
    found = gradients_without(task.rm, task.base.tokens, _sloped(task.sites), task.start, task.base.keys,
                              frozen_at=task.frozen_at)  # fmt: skip
    sizes = np.stack([np.abs(_summed(task, moves, [Pass(one, 1.0)])) for one in found])
    kept = np.ones(sizes.shape[:2])
    for s, site in enumerate(task.sites):
        if site.kind not in ("embed", "resid_pre", "resid_post"):
            kept[site.block, s] = 0
    return (sizes * kept[:, :, None]).sum(0) / np.maximum(kept.sum(0), 1)[:, None]
