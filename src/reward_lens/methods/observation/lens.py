"""The reward lens: the reward read off the residual stream at every depth.

    own norm      r_d = w . N(h_d) + b              the head as it stands, applied early (the logit-lens habit)
    frozen norm   r_d = u(h_L) . h_d + constant     at the final scale s(h_L): the running sum of contributions

h_d is the residual that enters block d; d = n_layers is the pre-norm residual, where both equal the reward. The two
differ by the norm's scale: residual norms grow with depth, so a frozen lens of an untrained network already rises.

In post-norm blocks a depth's state is the normed sum of everything before it, as the next block reads it: the own lens
reads that state, and the frozen one, no running sum there, is refused.

What this cannot show: that the network "knows" its reward at the depth where the lens settles. The head was trained
on the last residual only; an early read-out may be off its axis (see the tuned lens), and a late one may be mere norm
growth (see the random-weight control of `crystallization_depth`).

Reference: nostalgebraist 2020 (logit lens); Belrose et al. 2023, arXiv 2303.08112.
"""

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import captured, kept, pairs_of
from reward_lens.engine.places import require_readings_along
from reward_lens.errors import DataError
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.model.forward import Batch
from reward_lens.model.heads.own import head_of
from reward_lens.model.placement import require_all_there
from reward_lens.model.post_norm import require_added
from reward_lens.model.readout import Direction, read_size
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens, common_prefix
from reward_lens.result import Check, Result

Norms = Literal["own", "frozen"]


@checked_arguments
@torch.no_grad()
def reward_lens(rm: RewardModel, pairs, norm: Norms = "own", at: Literal["final", "all"] = "final") -> Result:
    """Reward at every depth, at the reward position or (as a prefix reward curve) at every position.

    Returns value (pair, side, depth[, position]) in reward units; depth 0 = what enters block 0, n_layers = the reward
    itself (check "last depth", E2). Mean and interval over prompts at "final". At "all" the positions are padded
    (coordinates `n_positions`, `token`, `piece`, `role`), and a margin exists only where the two runs' tokens agree.
    """
    if norm not in ("own", "frozen") or at not in ("final", "all"):
        raise DataError("The lens was asked for something it does not have", found=f"norm={norm!r}, at={at!r}",
                        expected="norm 'own' or 'frozen', at 'final' or 'all'", do="pass one of these")  # fmt: skip
    if norm == "frozen":
        require_added(rm, "The lens at the last state's scale")
    if at == "all":
        return _lens_everywhere(rm, data.as_pairs(pairs), norm)
    sites = [Site("embed"), *(Site("resid_post", layer) for layer in range(rm.n_layers))]
    values, gaps, pairs = [], [], kept(pairs)
    for acts in captured(rm, pairs, sites):
        h, inputs = acts[sites[-1]], rm.readout_inputs(acts.tokens)
        reward = rm.readout.reward(h, inputs)
        depths = torch.stack([acts[site] for site in sites], 1)
        if norm == "own":
            read = rm.readout.reward(depths, None if inputs is None else inputs[:, None])
        else:
            u, constant, _ = rm.readout.direction(h, inputs)
            read = (depths * u[:, None]).sum(-1) + constant[:, None]
        size = read_size(rm.readout, h, inputs)
        gaps.append(((read[:, -1] - reward).abs() / size).max())
        values.append(margin_of(read[::2].cpu().numpy(), read[1::2].cpu().numpy()))
    all_pairs = pairs_of(pairs)
    check = Check("last depth", float(torch.stack(gaps).max()), 1e-2 if rm.sixteen_bit else 1e-5)
    return paired_result(
        rm, "reward_lens", all_pairs, np.concatenate(values), ("pair", "side", "depth"),
        {"depth": np.arange(rm.n_layers + 1)}, checks=[check], **_words(norm, at),
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def crystallization_depth(rm: RewardModel, pairs, norm: Norms = "own", control_seeds: int = 0, seed: int = 0) -> Result:
    """Smallest relative depth after which the lens margin keeps its final sign and at least half its final size.

    Returns value (pair,) as a fraction of the depth, or (pair, model) with `control_seeds` copies of the model with
    random weights (norms and biases kept) behind it: late values can be mere norm growth. Undefined (NaN, with the
    reason) where the final margin is under the model's noise floor. Mean and interval over prompts.
    """
    if control_seeds < 0:
        raise DataError("A negative number of control models was asked for", found=f"control_seeds={control_seeds}",
                        expected="0 or more", do="leave control_seeds out for none")  # fmt: skip
    pairs = data.as_pairs(pairs)
    names, rows = ["trained"], [_crystallized(rm, reward_lens(rm, pairs, norm))]
    for i in range(control_seeds):
        names.append(f"random {i + 1}")
        control = random_weight_copy(rm, seed + i)
        rows.append(_crystallized(control, reward_lens(control, pairs, norm)))
    values = np.stack(rows, 1)
    dims, coords = ("pair", "model"), {"model": np.array(names, dtype=object)}
    if not control_seeds:
        values, dims, coords = values[:, 0], ("pair",), {}
    return paired_result(
        rm, "crystallization_depth", pairs, values, dims, coords, unit="fraction", limits=(0.0, 1.0), seed=seed,
        undefined="the final margin is under the noise floor", title="Crystallization depth",
        settings={"norm": norm, "control_seeds": control_seeds, "noise_floor": rm.noise_floor},
        shows="How late in the network the lens margin takes its final sign and half its final size.",
        cannot_show="When the network decides: compare with the random-weight rows, which decide nothing.",
    )  # fmt: skip


@checked_arguments
def random_weight_copy(rm: RewardModel, seed: int = 0) -> RewardModel:
    """The same network with every weight matrix redrawn at its own mean and spread; norms, biases and head are kept.

    Returns a `RewardModel` for any method: what a random network shows too is no finding about training.
    """
    require_all_there(rm.module, "A copy of the model with other weights")
    module = copy.deepcopy(rm.module)
    generator = torch.Generator().manual_seed(seed)
    head = {id(p) for p in head_of(module, rm.structure).parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            # A norm by head and the biases of fused experts have two dimensions, as weights do.
            kept = parameter.dim() < 2 or owner.endswith("Norm") or name.endswith("bias")
            if not kept and id(parameter) not in head:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(drawn * parameter.float().std().cpu() + parameter.float().mean().cpu())
    return RewardModel(
        module, rm.tokenizer.hf, **rm.read_as, structure=rm.structure, truncation=rm.truncation,
        name=f"{rm.name} (random weights, seed {seed})", revision=rm.revision,
    )  # fmt: skip


def _crystallized(rm: RewardModel, lens: Result) -> np.ndarray:
    margins = lens.value.sel(side="margin").values
    final = margins[:, -1:]
    settled = (margins * np.sign(final) > 0) & (np.abs(margins) >= np.abs(final) / 2)
    # The first depth from which every later one is settled.
    from_here = np.flip(np.logical_and.accumulate(np.flip(settled, 1), axis=1), 1)
    depth = from_here.argmax(1) / (margins.shape[1] - 1)
    return np.where(np.abs(final[:, 0]) > rm.noise_floor, depth, np.nan)


def _lens_everywhere(rm: RewardModel, pairs: data.Pairs, norm: Norms) -> Result:
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    require_readings_along(rm, tokens)
    longest = max(len(t) for t in tokens)
    read = np.full((len(tokens), rm.n_layers + 1, longest), np.nan)
    for batch in rm.batches(tokens):
        gates = rm.readout_inputs([tokens[run] for run in batch.rows])
        gates = None if gates is None else gates[:, None]
        frozen = _at_own_state(rm, batch, gates) if norm == "frozen" else None
        rows: list[Tensor] = []

        def project(x: Tensor, rows=rows, gates=gates, frozen=frozen) -> None:
            x = x.to(rm.like)
            if frozen is None:
                rows.append(rm.readout.reward(x, gates))
            else:
                rows.append((x * frozen.u).sum(-1) + frozen.constant)

        rm.trunk.run(batch, *(rm.trunk.read_residual(d, project) for d in range(rm.n_layers + 1)))
        curves = torch.stack(rows, 1)
        for i, run in enumerate(batch.rows):
            read[run, :, : len(tokens[run])] = curves[i, :, : len(tokens[run])].cpu()
    chosen, rejected = read[::2], read[1::2]
    values = margin_of(chosen, rejected)
    prefixes = [common_prefix(a, b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    for i, n in enumerate(prefixes):
        values[i, 2, :, n:] = np.nan
    final = np.array([read[i, -1, t.reward_pos] for i, t in enumerate(tokens)])
    reward = rm.rewards(tokens).numpy()
    gap = float(np.max(np.abs(final - reward) / [rm.effect_scale(r) for r in reward.tolist()]))
    return paired_result(
        rm, "reward_lens", pairs, values, ("pair", "side", "depth", "position"),
        {"depth": np.arange(rm.n_layers + 1), **token_coords(tokens, prefixes)},
        checks=[Check("last depth", gap, 2e-2 if rm.sixteen_bit else 1e-5)], interval=False,
        undefined="a margin exists only where both runs have the same tokens",
        **_words(norm, "all"),
    )  # fmt: skip


def _at_own_state(rm: RewardModel, batch: Batch, gates: Tensor | None) -> Direction:
    """The direction at every position's own final state, [batch, pos, d_model], from a pass of its own."""
    last: list[Tensor] = []
    rm.trunk.run(batch, rm.trunk.read_residual(rm.n_layers, lambda x: last.append(x.to(rm.like))))
    shape = last[0].shape[:2]
    flat = None if gates is None else gates.expand(*shape, -1).flatten(0, 1)
    u, constant, exactness = rm.readout.direction(last[0].flatten(0, 1), flat)
    return Direction(u.unflatten(0, shape), constant.unflatten(0, shape), exactness)


def token_coords(tokens: list[Tokens], prefixes: list[int]) -> dict:
    """Coordinates of a padded `position` dim: per side `n_positions`, `token`, `piece` and `role`; the margin's
    positions are the pair's common prefix."""
    longest = max(len(t) for t in tokens)
    shape = (len(tokens) // 2, 3, longest)
    ids = np.full(shape, -1)
    pieces, roles = np.full(shape, "", dtype=object), np.full(shape, "", dtype=object)
    lengths = np.zeros(shape[:2], dtype=int)
    for i in range(shape[0]):
        for side, text, n in zip(
            range(3), (*tokens[2 * i : 2 * i + 2], tokens[2 * i]), (None, None, prefixes[i]), strict=True
        ):
            n = len(text) if n is None else n
            lengths[i, side] = n
            ids[i, side, :n] = text.ids[:n]
            pieces[i, side, :n] = text.pieces[:n]
            roles[i, side, :n] = [text.role(p) for p in range(n)]
    where = ("pair", "side", "position")
    return {
        "position": np.arange(longest),
        "n_positions": (("pair", "side"), lengths),
        "token": (where, ids),
        "piece": (where, pieces),
        "role": (where, roles),
    }


def _words(norm: str, at: str) -> dict:
    return {
        "title": f"Reward lens ({norm} norm)",
        "settings": {"norm": norm, "at": at},
        "shows": "What the reward head reads off the residual stream at every depth, through the final norm with "
        + {"own": "each depth's own scale", "frozen": "the scale of the last depth"}[norm]
        + "; the last depth is the reward.",
        "cannot_show": "That the reward is computed where the curve settles: the head was trained on the last residual "
        "only, and a curve can rise because residual norms grow.",
    }
