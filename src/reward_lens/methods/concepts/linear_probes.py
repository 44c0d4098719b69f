"""Where is a property of responses linearly decodable, and does the reward read it there?

    AUC (R^2)      of a logistic (ridge) probe on the residual stream at one depth and position, cross-validated with
                   prompts as groups; fits, intervals and controls as in `probe_fits`
    selectivity    AUC - mean AUC of the same pipeline on labels dealt anew over prompts
    cosine         of the probe's direction b with what the reward reads there, g = mean over texts of dr / d state
    used           difference in reward between the classes at equal length: reward ~ 1 + label + tokens

Positions are "response" (the mean over the response's tokens, template excluded; g sums the gradients over them, which
is the change of the reward when all of them move alike) and "reward" (the position the head reads). Frozen: the final
norm's scale, at its value in each run. At depth n_layers g at the reward position is the effective direction, exactly.

What this cannot show: that the network uses what the probe finds. Both b and g are read-outs; a cosine near zero says
that the reward's first-order reading of this state is another one than the probe's, not that the property is unused
(later blocks may move it, and many different b decode alike). A property decodable by length alone
(`meta["length_alone"]`) says nothing of its own.

Reference: Alain and Bengio 2016, arXiv 1610.01644 (probes by depth); Hewitt and Liang 2019, arXiv 1909.03368
(selectivity; here their control task over word types becomes one over prompts). The cosine with g is our addition.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.engine.gradients import gradients
from reward_lens.engine.run import passes
from reward_lens.errors import DataError
from reward_lens.features import TEXT_FEATURES, text_features
from reward_lens.methods.concepts import probe_fits
from reward_lens.methods.concepts.concept_states import site_at
from reward_lens.methods.concepts.probe_fits import Task
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

POSITIONS = ("response", "reward")
GRADIENT_TEXTS = 32
FEWEST_CONTROLS = 5
NOT_READ = "the reward does not depend on this state, or the state is the same in all texts"


@checked_arguments
def linear_probes(
    rm: RewardModel,
    texts: Iterable,
    labels: Iterable,
    depths: Sequence[int] | None = None,
    at: Sequence[str] = POSITIONS,
    groups: Sequence[str | int] | None = None,
    folds: int = 5,
    n_control: int = 20,
    seed: int = 0,
) -> Result:
    """How well a linear probe reads a property of the response at every depth and position, beside the reward.

    Parameters
    ----------
    texts: (prompt, response) tuples; or pairs, whose chosen and rejected responses are texts in turn.
    labels: one 0 or 1 a text (logistic probe, AUC) or one number a text (ridge, R^2); or a name of
        `features.TEXT_FEATURES`.
    depths: residuals entering these blocks, 0 to n_layers (what the final norm reads). None: all.
    at: "response" and "reward", or one of them.
    groups: labels of texts that belong together; by default their prompts, which they may join but not divide.
    n_control: permutations of the labels, at least 5. The same ones at every depth.

    Returns value (depth, at), AUC or R^2 on held-out prompts, with low and high over prompts. Coordinates of each cell:
    `control` and `control_sd` (over the controls), `selectivity`, `selectivity_low`, `selectivity_high`, `p` (of the
    probe among the controls, one-sided) and `p_bh` (Benjamini and Hochberg over the cells); `cosine`, `cosine_low`,
    `cosine_high` with what the reward reads, and `cosine_control_sd`, the SD of the controls' cosines.
    `meta["reward"]`: "across" prompts and "within" them (None under 6 prompts in which the label differs), the
    difference in reward between classes (or per unit of the label) at equal length in tokens, with interval and p.
    `meta["length_alone"]`: value, low, high of the same probe given the number of tokens only.
    Check "effective direction": the gradient at depth n_layers is the effective direction.
    Raises `DataError` for labels that are constant or not one a text, for under 10 prompts of a class (20 for numbers;
    2 a fold if that is more), empty responses with at="response", and groups that divide a prompt.

    Memory: 4 len(depths) len(at) d_model bytes a text; gradients are averaged over at most 32 prompts, a text each.
    """
    items = _items(texts)
    tokens = [rm.tokenize(item.prompt, item.chosen) for item in items]
    depths = list(range(rm.n_layers + 1)) if depths is None else [int(depth) for depth in depths]
    at = (at,) if isinstance(at, str) else tuple(at)
    _require(rm, items, tokens, depths, at, n_control)
    named, y = _labels(labels, items)
    task = probe_fits.make_task(y, _groups(groups, items), folds, seed)
    keys = [item.prompt_key for item in items]
    # Controls and gradients draw texts: in an order of their own, so that the caller's does not matter.
    order = sorted(range(len(items)), key=lambda i: (keys[i], items[i].chosen, y[i]))
    tokens, keys = [tokens[i] for i in order], [keys[i] for i in order]
    rows = {name: getattr(task, name)[order] for name in ("labels", "prompts", "fold")}
    task = dataclasses.replace(task, **rows)
    states, last = _states(rm, tokens, depths, at)
    some = _one_a_prompt(task, seed)
    read, gap = _gradients(rm, [tokens[i] for i in some], last[some], depths, at)
    targets = np.concatenate([task.labels[None], probe_fits.control_labels(task, n_control, seed)])
    rows = [_cell(task, targets, states[:, d, a], read[d, a], seed) for d in range(len(depths)) for a in range(len(at))]
    shape = (len(depths), len(at))
    cells = {key: np.array([row[key] for row in rows]).reshape(shape) for key in rows[0]}
    cells["p_bh"] = stats.adjust(cells["p"], "bh")
    coords: dict[str, Any] = {"depth": np.array(depths), "at": np.array(at, dtype=object)}
    coords |= {key: (("depth", "at"), cells[key]) for key in cells if key not in ("value", "low", "high")}
    value, low, high = (xr.DataArray(cells[k], dims=("depth", "at"), coords=coords) for k in ("value", "low", "high"))
    length = np.array([float(len(text.response)) for text in tokens])
    with torch.no_grad():
        rewards = rm.readout.reward(last, rm.readout_inputs(tokens)).double().cpu().numpy()
    alone = _reading(task, targets[:1], length[:, None], seed)[0]
    metric = "AUC" if task.classes else "R2"
    meta = rm.describe(
        "linear_probes", seed=seed, title=f"Linear probes of {named}", n_items=len(items), n_prompts=task.n_prompts,
        inputs_hash=data.inputs_hash(items),
        settings={"property": named, "folds": folds, "n_control": n_control, "gradient_texts": len(some),
                  "penalty": probe_fits.PENALTY if task.classes else probe_fits.RIDGE},
        interval={"level": 0.95, "unit": "prompt", "method": "jackknife over prompts, widened for shared training"},
        prompts_per_class=[task.prompts_with(k) for k in (0.0, 1.0)] if task.classes else None,
        reward=_used(rewards, task, length, keys),
        length_alone={k: _plain(alone[k]) for k in ("value", "low", "high")},
        shows=f"At which depths a linear probe reads {named} on held-out prompts, against labels dealt anew, and how "
        "far the probe's direction is the one the reward reads there.",
        cannot_show="That the network uses what the probe finds: decodable is not used. Nor that it is this property "
        "and not what goes with it: compare with length alone.",
    )  # fmt: skip
    undefined = NOT_READ if np.isnan(cells["cosine"]).any() else None
    checks = [Check("effective direction", gap, 1e-2 if rm.sixteen_bit else 1e-4)]
    if undefined:
        checks.append(Check("cells without a cosine", float(np.isnan(cells["cosine"]).sum()), np.inf, undefined))
    return Result("linear_probes", value, unit=metric, low=low, high=high, meta=meta, checks=checks)


def _items(texts) -> data.Pairs:
    """One pair a text, its response as the chosen one."""
    rows = list(texts)
    if all(isinstance(row, data.Pair) for row in rows):
        rows = [(pair.prompt, response) for pair in data.as_pairs(rows) for response in pair.responses]
    else:
        wrong = [i for i, row in enumerate(rows) if not isinstance(row, tuple | list) or len(row) != 2]
        if wrong:
            raise DataError("A text cannot be read", found=f"texts[{wrong[0]}] = {rows[wrong[0]]!r:.60}",
                            expected="(prompt, response) tuples, or pairs", do="correct the texts")  # fmt: skip
    return data.as_pairs([data.Pair(prompt, response, "") for prompt, response in rows])


def _require(rm: RewardModel, items, tokens: Sequence[Tokens], depths: list[int], at: tuple, n_control: int) -> None:
    known = at and set(at) <= set(POSITIONS) and len(set(at)) == len(at)
    inside = depths and all(0 <= depth <= rm.n_layers for depth in depths) and len(set(depths)) == len(depths)
    if not known or not inside or n_control < FEWEST_CONTROLS:
        raise DataError(
            "The probes were not understood",
            found=f"depths={depths}, at={at}, n_control={n_control}",
            expected=f"different depths of 0 to {rm.n_layers}, at of {', '.join(POSITIONS)}, n_control of at least "
            f"{FEWEST_CONTROLS}",
            do="correct these; the defaults are a good start",
        )
    empty = [i for i, text in enumerate(tokens) if not len(text.response)]
    if empty and "response" in at:
        raise DataError(
            "A response without tokens has no mean",
            found=f"{len(empty)} of {len(items)}, first text {empty[0]}",
            expected="responses of at least one token",
            do="leave these out, or pass at='reward'",
        )


def _labels(labels, items: data.Pairs) -> tuple[str, np.ndarray]:
    if not isinstance(labels, str):
        given = np.asarray(list(labels))
        if given.dtype.kind not in "biuf":
            raise DataError("The labels are not numbers", found=f"entries such as {given.ravel()[:1].tolist()}",
                            expected="numbers, or the name of a text feature", do="convert them")  # fmt: skip
        return "the given labels", given.astype(float)
    if labels not in TEXT_FEATURES:
        raise DataError("There is no such text feature", found=repr(labels), expected=", ".join(TEXT_FEATURES),
                        do="name one of these, or pass one label a text")  # fmt: skip
    return labels.replace("_", " "), np.array([text_features(p.prompt, p.chosen)[labels] for p in items])


def _groups(groups, items: data.Pairs) -> list[str]:
    """The given groups as text, or the prompts; a prompt in two groups would be in training and test at once."""
    keys = [item.prompt_key for item in items]
    if groups is None:
        return keys
    names = [str(group) for group in groups]
    if len(names) != len(keys):
        raise DataError("Texts and groups do not match", found=f"{len(names)} groups for {len(keys)} texts",
                        expected="one group a text", do="correct groups, or leave them out")  # fmt: skip
    divided = len(set(zip(keys, names, strict=True))) - len(set(keys))
    if divided:
        raise DataError("The groups divide a prompt", found=f"{divided} more (prompt, group) pairs than prompts",
                        expected="all texts of a prompt in one group", do="join these groups")  # fmt: skip
    return names


def _spans(text: Tokens) -> dict[str, range]:
    return {"response": text.response, "reward": range(text.reward_pos, text.reward_pos + 1)}


@torch.no_grad()
def _states(
    rm: RewardModel, tokens: Sequence[Tokens], depths: list[int], at: tuple[str, ...]
) -> tuple[Float[np.ndarray, "text depth at d"], Float[Tensor, "text d"]]:
    """States by depth and position, and the pre-norm residual at the reward position."""
    end = site_at(rm, rm.n_layers)
    sites = list(dict.fromkeys([*(site_at(rm, depth) for depth in depths), end]))
    states = np.empty((len(tokens), len(depths), len(at), rm.d_model), dtype=np.float32)
    last = torch.empty(len(tokens), rm.d_model, dtype=rm.like.dtype, device=rm.device)
    everywhere = "response" in at
    cells = [(site_at(rm, depth), d) for d, depth in enumerate(depths)]
    for batch, tensors in passes(rm, tokens, sites, everywhere=everywhere):
        for row, (text, start) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True)):
            spans = _spans(tokens[text])
            for site, d in cells:
                x = tensors[site][row]
                for a, where in enumerate(at):
                    span = spans[where]
                    here = x[start + span.start : start + span.stop].mean(0) if everywhere else x
                    states[text, d, a] = here.float().cpu().numpy()
            x = tensors[end][row]
            last[text] = x[start + tokens[text].reward_pos] if everywhere else x
    return states, last


def _one_a_prompt(task: Task, seed: int) -> list[int]:
    """One text of each of at most `GRADIENT_TEXTS` prompts, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(task.prompts))
    _, first = np.unique(task.prompts[order], return_index=True)
    return sorted(order[np.sort(first)[:GRADIENT_TEXTS]].tolist())


def _gradients(
    rm: RewardModel, tokens: Sequence[Tokens], last: Float[Tensor, "text d"], depths: list[int], at: tuple[str, ...]
) -> tuple[Float[np.ndarray, "depth at d"], float]:
    """Mean over texts of the reward's gradient, summed over a position's tokens; and its largest gap at the end."""
    end = site_at(rm, rm.n_layers)
    mean = np.zeros((len(depths), len(at), rm.d_model))
    gap = 0.0
    for text, h in zip(tokens, last, strict=True):
        slopes = gradients(rm, text, list(dict.fromkeys([*(site_at(rm, k) for k in depths), end])), frozen_at=h).slopes
        spans = _spans(text)
        for d, depth in enumerate(depths):
            for a, where in enumerate(at):
                span = spans[where]
                slope = slopes[site_at(rm, depth)][span.start : span.stop]
                mean[d, a] += slope.double().sum(0).cpu().numpy() / len(tokens)
        u = rm.readout.direction(h[None], rm.readout_inputs([text])).u[0].double()
        off = float((slopes[end][text.reward_pos].double() - u).norm())
        gap = max(gap, off / float(u.norm()) if float(u.norm()) > 0 else off)
    return mean, gap


def _reading(
    task: Task, targets: Float[np.ndarray, "target row"], states: Float[np.ndarray, "row d"], seed: int
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The probe's value and interval, the controls' values, and all directions [target, fold, d]."""
    scores, directions = probe_fits.cross_fit(states, task, targets)
    value, left_out = probe_fits.evaluated(task, targets[0], scores[0])
    low, high = probe_fits.interval(task, value, left_out, seed)
    controls = [probe_fits.evaluated(task, y, s)[0] for y, s in zip(targets[1:], scores[1:], strict=True)]
    return {"value": value, "low": low, "high": high}, np.array(controls), directions


def _cell(task: Task, targets, states, read: Float[np.ndarray, " d"], seed: int) -> dict[str, float]:
    """All numbers of one depth and position."""
    found, controls, directions = _reading(task, targets, states, seed)
    cosine, low, high = probe_fits.cosine_interval(directions[0], read)
    drawn = np.array([probe_fits.cosine_interval(one, read)[0] for one in directions[1:]])
    known = drawn[np.isfinite(drawn)]
    return {
        **found, **probe_fits.against_controls(found["value"], found["low"], found["high"], controls),
        "cosine": cosine, "cosine_low": low, "cosine_high": high,
        "cosine_control_sd": float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
    }  # fmt: skip


def _used(rewards: np.ndarray, task: Task, length: np.ndarray, keys: Sequence[str]) -> dict[str, Any]:
    """The reward per unit of the label, tokens held fixed, across prompts and within them (means of each taken off)."""
    columns = np.stack([rewards, task.labels, length])
    _, prompts = np.unique(keys, return_inverse=True)
    sums = np.stack([np.bincount(prompts, column) for column in columns])
    inside = columns - (sums / np.bincount(prompts))[:, prompts]
    differ = len(set(task.prompts[np.abs(inside[1]) > 1e-12].tolist()))
    out: dict[str, Any] = {"unit": "reward between classes" if task.classes else "reward per unit of the label"}
    for name, (y, x, control) in (("across", columns), ("within", inside)):
        if name == "within" and differ < stats.FEWEST:
            out[name] = None
            continue
        slope = stats.partial_slope(y, x, control, task.prompts)
        out[name] = {key: _plain(getattr(slope, key)) for key in ("value", "low", "high", "p")}
        out[name] |= {"n_prompts": differ if name == "within" else slope.n_clusters, "reason": slope.reason}
    return out


def _plain(x: float) -> float | None:
    """A number for JSON; None where there is none."""
    return None if np.isnan(x) else float(x)
