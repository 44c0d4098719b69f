"""A graph of who writes to whom: every component-to-component edge that ends in the reward, to first order.

    score(u -> v) = (c'_u - c_u) . dr/d(input of v)

c_u and c'_u are the sender's writes in the changed run and the other one, and the slope is what the reward gains when
the receiver v alone reads a little more: dr/d(input of v) = J_v^T dr/d(write of v), J_v the receiver's own Jacobian,
taken by running its block again. Receivers are the attention and the MLP of every block, and the reward head.
Signs are those of `effects`: noise r(chosen) - r(patched), denoise r(patched) - r(rejected). `steps=1` is EAP, more
average the slopes over runs between the two (EAP-IG).

In post-norm blocks a sender's move reaches a reader through the norms of the writes in between: their Jacobians are
part of the edge.

Identity, checked: a write reaches the reward through its readers only, so the edges out of a sender sum to its gradient
estimate. What this cannot show: that patching an edge does this much (see `path_effects`, which runs it).

Reference: Syed et al. 2023, arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine import hooks
from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.gradients import gradients
from reward_lens.engine.runs import TextRun, run_pair
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import sites_of
from reward_lens.methods.causation.first_order import no_way
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.forward import record, suffix_batch
from reward_lens.model.prefix import PrefixCache
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

REWARD = "reward"


@checked_arguments
def edge_effects(
    rm: RewardModel,
    pairs,
    steps: int = 1,
    mode: Literal["noise", "denoise"] = "noise",
    at: Literal["final", "response", "all"] = "final",
    align: Literal["tail", "diff"] | None = None,
    seed: int = 0,
) -> Result:
    """First-order effect of every edge between components, and from components to the reward.

    Parameters
    ----------
    steps: 1 takes the slopes of the changed run (EAP); more average them over runs whose residual entering block 0 goes
        from the changed run's to the other's at the aligned positions (EAP-IG; needs at "response" or "all", and not
        align "diff", which pairs equal tokens), at the nodes of Gauss and Legendre.
    mode, at, align: as in `effects`.

    Returns value (pair, edge) in reward units; coordinates `sender`, `receiver`, `sender_layer`, `receiver_layer` of
    `edge` ("L3.attn -> L5.mlp"); mean and interval over prompts. `result.to_frame()` is the table of edges, `.top(n)`
    the largest. Check "edges sum to the gradient". Raises `DataError` and `AlignmentError` as `effects` does, and
    the latter for steps > 1 where all aligned tokens are the same.
    """
    pairs = data.as_pairs(pairs)
    ways = mode in ("noise", "denoise") and align in (None, "tail", "diff") and isinstance(steps, int | np.integer)
    if not ways or steps < 1 or (steps > 1 and (at == "final" or align == "diff")):
        raise DataError(
            "The edges were asked for something they do not have",
            found=f"mode={mode!r}, steps={steps}, at={at!r}, align={align!r}",
            expected="mode 'noise' or 'denoise', align None, 'tail' or 'diff', whole steps, at least 1, and steps > 1 "
            "only at 'response' or 'all' without align='diff'",
            do="use steps=1 where both runs have the same tokens: there is no way between their embeddings",
        )
    senders = sites_of(rm, "components")
    receivers = [*senders[1:], REWARD]
    edges = [(s, r) for r in range(len(receivers)) for s in range(len(senders)) if _reads(rm, receivers[r], senders[s])]
    found, gaps = [], []
    for pair, tokens in zip(pairs, rm.tokenize_pairs(pairs), strict=True):
        runs = run_pair(rm, tokens[0], tokens[1], senders, only_final=at == "final")
        base, source = runs if mode == "noise" else runs[::-1]
        where = aligned(base.tokens, source.tokens, at, align, str(pair.id))
        if not where.base:
            found.append(np.zeros(len(edges)))
            continue
        moved = torch.stack([source.at(s, where.source) - base.at(s, where.base) for s in senders]).double()
        scores, gap = _scores(rm, base, source, senders, where, moved, edges, steps, str(pair.id))
        found.append(-scores if mode == "noise" else scores)
        gaps.append(gap)
    names = [(str(senders[s]), str(receivers[r])) for s, r in edges]
    layers = [(senders[s].layer, getattr(receivers[r], "layer", rm.n_layers)) for s, r in edges]
    coords = {
        "edge": np.array([f"{a} -> {b}" for a, b in names], dtype=object),
        "sender": ("edge", np.array([a for a, _ in names], dtype=object)),
        "receiver": ("edge", np.array([b for _, b in names], dtype=object)),
        "sender_layer": ("edge", np.array([-1 if a is None else a for a, _ in layers])),
        "receiver_layer": ("edge", np.array([b for _, b in layers])),
    }
    return paired_result(
        rm, "edge_effects", pairs, np.stack(found), ("pair", "edge"), coords, seed=seed,
        checks=[Check("edges sum to the gradient", max(gaps, default=0.0), 2e-2 if rm.sixteen_bit else 1e-4)],
        title=f"Edges ({'EAP' if steps == 1 else f'EAP-IG, {steps} steps'}, {mode}, {at}; uncalibrated)",
        settings={"steps": steps, "mode": mode, "at": at, "align": align}, calibration="uncalibrated",
        shows="To first order, what each component's write does to the reward through each single reader.",
        cannot_show="What patching an edge does: the first order misses what saturates and what cancels.",
    )  # fmt: skip


def _scores(
    rm, base: TextRun, source: TextRun, senders, where, moved: Tensor, edges, steps, pair_id: str
) -> tuple[np.ndarray, float]:
    """First-order change of the reward of every edge, and how far the edges of a sender are from its gradient."""
    start = where.base[0] if rm.reuses_prefix(base.tokens) else 0
    rows = [p - start for p in where.base]
    entering: Sequence[Tensor | None] = [None]
    weights = np.ones(1)
    if steps > 1:
        own = gradients(rm, base.tokens, [senders[0]], start, base.keys).values[senders[0]]
        theirs = own.clone()
        theirs[rows] = source.at(senders[0], where.source).to(own)
        if torch.equal(own, theirs):
            raise no_way(f"edge_effects(steps={steps})", pair_id, "steps=1")
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        entering, weights = [torch.lerp(own, theirs, (float(n) + 1) / 2) for n in nodes], weights / 2
    total, gradient = np.zeros(len(edges)), np.zeros(len(senders))
    which_sender, which_receiver = np.array(edges).T
    for residual, weight in zip(entering, weights, strict=True):
        read, written, values = _reader_slopes(rm, base, senders, start, residual)
        at_rows = [slope[rows] for slope in read]
        if rm.trunk.norms:
            products = _through_norms(rm, [value[rows] for value in values], moved, at_rows)
        else:
            products = torch.einsum("spd,rpd->sr", moved, torch.stack(at_rows).double()).cpu().numpy()
        total += weight * products[which_sender, which_receiver]
        slopes = torch.stack([w[rows] for w in written]).double()
        gradient += weight * torch.einsum("spd,spd->s", moved, slopes).cpu().numpy()
    out = np.zeros(len(senders))
    np.add.at(out, which_sender, total)
    return total, float(np.abs(out - gradient).max() / max(np.abs(total).sum(), 1e-12))


def _reader_slopes(
    rm: RewardModel, base: TextRun, senders: Sequence[Site], start: int, entering: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dr/d(input of v) of every receiver (the reward head last), dr/d(write) of every sender, and what each sender
    writes in that run, [pos, d_model]."""
    last = Site("resid_post", rm.n_layers - 1)
    found = gradients(rm, base.tokens, [*senders, last], start, base.keys, entering=entering)
    slopes = found.slopes
    past = PrefixCache(base.keys.first(start), rm.n_layers) if start else None
    batch = suffix_batch(base.tokens, start, rm.device, base.tokens.seen.stop)
    put = [] if entering is None else [rm.trunk.edit_residual(0, lambda x: entering[None].to(x))]
    with torch.no_grad():
        recording = record(rm.trunk, batch, *put, past=past)
    read = []
    for layer in range(rm.n_layers):
        read += _block_slopes(rm, recording, layer, slopes)
    return [*read, slopes[last]], [slopes[s] for s in senders], [found.values[s] for s in senders]


def _through_norms(rm: RewardModel, own: list[Tensor], moved: Tensor, read: list[Tensor]) -> np.ndarray:
    """[sender, receiver] in post-norm blocks: a receiver's slope pulled back through the norms between it and a write,
    the other writes held. Receiver r reads what block 0 reads and the first r writes."""
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_(True) for x in own]
        states = [rm.trunk.carrier.final(leaves[0], leaves[1 : 1 + n]) for n in range(len(leaves))]
    out = np.zeros((len(own), len(read)))
    for r, (state, slope) in enumerate(zip(states, read, strict=True)):
        pulled = torch.autograd.grad((state * slope).sum(), leaves[: r + 1])
        out[: r + 1, r] = [float((by * one.double()).sum()) for by, one in zip(moved, pulled, strict=False)]
    return out


def _block_slopes(rm: RewardModel, recording, layer: int, slopes: dict[Site, Tensor]) -> list[Tensor]:
    """Slopes at the inputs of a block's attention and MLP: each write's slope pulled back through its part alone."""
    x = recording.resid(layer).detach().clone().requires_grad_(True)
    middle = torch.zeros_like(x, requires_grad=True)
    kept: dict[str, Tensor] = {}

    def attention(y: Tensor) -> Tensor:
        kept["attn"] = y
        return (
            y.clone() if rm.structure.parallel or rm.trunk.norms else y + middle.reshape(y.shape) / rm.trunk.write_scale
        )

    def mlp(y: Tensor) -> Tensor:
        kept["mlp"] = y
        return y.clone()  # Falcon adds attention's write to it in place

    def between(x: Tensor) -> Tensor:
        return x + middle

    wanted = [
        hooks.edit_output(rm.trunk.writers["attn"][layer], attention),
        *([hooks.edit_output(rm.trunk.norms[layer][0], between)] if rm.trunk.norms else []),
        hooks.edit_output(rm.trunk.writers["mlp"][layer], mlp),
    ]
    args, kwargs = recording.calls[layer]
    args, kwargs = hooks.with_first_input(args, kwargs, x.clone())
    with torch.enable_grad(), hooks.attached(wanted):
        rm.trunk.blocks[layer](*args, **kwargs)
    out = []
    for kind in ("attn", "mlp"):
        leaf = x if kind == "attn" or rm.structure.parallel else middle
        # A slope is for the scaled write; what the module gave is that over the scale.
        along = (slopes[Site(kind, layer)] * rm.trunk.write_scale).reshape(kept[kind].shape).to(kept[kind])
        (slope,) = torch.autograd.grad(kept[kind], leaf, along, retain_graph=kind == "attn")
        out.append(slope[0].to(rm.like))
    return out


def _reads(rm: RewardModel, receiver: "Site | str", sender: Site) -> bool:
    if receiver == REWARD or sender.kind == "embed":
        return True
    assert isinstance(receiver, Site)
    inside = sender.block == receiver.block and sender.kind == "attn" and receiver.kind == "mlp"
    return sender.block < receiver.block or (inside and not rm.structure.parallel)
