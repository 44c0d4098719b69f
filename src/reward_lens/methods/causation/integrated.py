"""Integrated estimates: the gradient of each changed run, averaged on the way from the site's value to the other run's.

    integrated        a row moves one site; converges to that site's exact effect
    integrated_block  a row moves all heads of a block's attention together, or all neurons of its MLP: the write's
                      estimate converges to its exact effect, and its heads' (neurons') estimates sum to the write's

Gauss-Legendre nodes. See `estimators`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.intervention import pattern
from reward_lens.engine.patching import patch_gradients
from reward_lens.methods.causation.effect_cells import contiguous
from reward_lens.methods.causation.estimate_task import Estimate, Task
from reward_lens.model.sites import Site

UNITS = {"attn": "head", "mlp": "neuron"}


def integrated(task: Task) -> Estimate:
    """Every site moved by itself."""
    return _integrated(task, {s: s for s in task.sites})


def integrated_block(task: Task) -> Estimate:
    """Units of a block moved together with the write they make."""
    return _integrated(task, block_carriers(task.sites))


def block_carriers(sites: Sequence[Site]) -> dict[Site, Site]:
    """By site, what is moved for it: all heads (neurons) of its block where any is among the sites, else itself."""
    finest = {(s.kind, s.layer) for s in sites}
    out = {}
    for site in sites:
        unit = UNITS.get(site.kind, site.kind)
        out[site] = Site(unit, site.layer) if unit in UNITS.values() and (unit, site.layer) in finest else site
    return out


def _integrated(task: Task, carriers: dict[Site, Site]) -> Estimate:
    """Averages of slope . move; a site's are a part or the whole of what its carrier's are."""
    base = task.base
    nodes, weights = np.polynomial.legendre.leggauss(task.steps)
    rows, index = [], []
    for g, group in task.groups():
        for carrier in dict.fromkeys(carriers.values()):
            x, moved = base.at(carrier, group.base), task.moved(carrier, group)
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                leaf = (x + float(node) * moved).requires_grad_(True)
                rows.append((Edit(carrier, contiguous(group.base), _leaf(carrier, leaf)), leaf))
                index.append((g, carrier, float(weight) * moved))
    change = task.cells.empty(len(task.sites))
    if not rows:
        return Estimate(change, 0.0)
    slopes, clean = patch_gradients(
        task.rm, base.tokens, rows, known=base.keys, max_rows=task.max_rows, frozen_at=task.frozen_at
    )
    # One sum a head or neuron, [unit]; one number for any other site.
    shares: dict[tuple[int, Site], torch.Tensor] = {}
    for (g, carrier, moved), slope in zip(index, slopes, strict=True):
        product = slope.double() * moved.double()
        whole = carrier.kind in UNITS.values() and carrier.index is None
        share = product.reshape(*product.shape[:2], -1).sum((0, 2)) if whole else product.sum()
        shares[g, carrier] = shares.get((g, carrier), 0) + share.cpu()
    for g, _ in task.groups():
        for s, site in enumerate(task.sites):
            share = shares[g, carriers[site]]
            change[s, g] = float(share.sum() if site.index is None or not share.dim() else share[site.index])
    return Estimate(change, task.gap(clean))


def _leaf(site: Site, leaf: torch.Tensor) -> Source:
    if site.kind == "pattern":
        return pattern(leaf)
    return Source("leaf", lambda x, site, run, positions: leaf.to(x.dtype).reshape(x.shape))
