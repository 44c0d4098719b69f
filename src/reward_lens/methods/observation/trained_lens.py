"""Two lenses that do not apply the head early: one is fitted to every depth, one takes every depth's
gradient.

    tuned      f_d(h) = a_d . z(h) + c_d     ridge regression of the final reward on h_d, on other prompts
    gradient   r_d = g_d . h_d + b           g_d = d (u . h_L) / d h_d, u the effective direction of the run

h_d is the residual that enters block d and z its coordinates, standardised over the training responses. The
tuned lens says what a linear reader could know at a depth (decodable), whether or not the network uses it.
The gradient lens says how the rest of the network reads that depth, to first order: at the last depth g is u
and r_d the reward.

Frozen: the final norm's scale, at its value in the run (u is the effective direction). With the scale live
the product g . h at the last depth would be zero, because the reward does not depend on the size of h. Norms
and attention inside the blocks answer as they do.

What this cannot show: that the network uses what the tuned lens finds, or that a change as large as h itself
would act as its first order says.

Reference: Belrose et al. 2023, arXiv 2303.08112 (tuned lens); Hewitt and Liang 2019, arXiv 1909.03368
(control).
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import captured, kept, pairs_of
from reward_lens.errors import DataError, StructureError
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.model.forward import Batch, at_rows
from reward_lens.model.readout import PromptGated
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

ALPHAS = tuple(10.0**power for power in range(7))
FEWEST_RESPONSES = 50
FOLDS = 5


@checked_arguments
def tuned_lens(rm: RewardModel, train_pairs, pairs, alphas: Sequence[float] = ALPHAS, seed: int = 0) -> Result:
    """The final reward as a ridge regression, fitted on other prompts, reads it off every depth.

    Parameters
    ----------
    train_pairs: pairs (or their `Activations`) whose responses and rewards the read-outs are fitted on: at
        least 50 responses, and no prompt of `pairs`.
    pairs: the pairs, or their `Activations`, that the result is about.
    alphas: ridge penalties on standardised coordinates; each depth takes the one with the least squared error
        in cross-validation over the training prompts.
    seed: of the control, the same fit on training rewards that were shuffled.

    Returns value (pair, side, depth) in reward units, with mean and interval over prompts. Coordinates of
    `depth`: `r2` (share of the variance of the pairs' rewards that is predicted; under 0 is worse than their
    mean), `r2_control`, `sign_agreement` (share of pairs whose predicted margin has the sign of the margin)
    and `alpha`. The last depth need not equal the reward: the final norm is no linear map. All training
    residuals are held in memory (4 (n_layers + 1) d_model bytes a response). Raises `DataError` for shared
    prompts, too few training responses, training prompts too few to cross-validate, or penalties that are none.
    """
    if not len(alphas) or not all(0 <= alpha < np.inf for alpha in alphas):
        raise DataError("The tuned lens has no penalties to choose from", found=f"alphas={list(alphas)}",
                        expected="at least one, each 0 or more and finite", do="leave alphas out")  # fmt: skip
    train_pairs, pairs = kept(train_pairs), kept(pairs)
    train_of, test_of = pairs_of(train_pairs), pairs_of(pairs)
    prompts = [p.prompt_key for p in train_of for _ in range(2)]
    _require_split(prompts, {p.prompt_key for p in test_of})
    x, target = _residuals(rm, train_pairs)
    unknown, reward = _residuals(rm, pairs)
    rng = np.random.default_rng(seed)
    targets = np.stack([target, rng.permutation(target)], 1)
    fits = [_ridge(x[:, d], targets, unknown[:, d], prompts, alphas) for d in range(rm.n_layers + 1)]
    predicted = np.stack([values for values, _ in fits], 1)  # [run, depth, (fit, control)]
    # Rewards that are all equal leave R^2 undefined.
    spread = np.square(reward - reward.mean()).sum() or np.nan
    r2 = 1 - np.square(predicted - reward[:, None, None]).sum(0) / spread
    values = margin_of(predicted[::2, :, 0], predicted[1::2, :, 0])
    agree = np.sign(values[:, 2]) * np.sign(reward[::2] - reward[1::2])[:, None]
    coords = {
        "depth": np.arange(rm.n_layers + 1),
        "r2": ("depth", r2[:, 0]),
        "r2_control": ("depth", r2[:, 1]),
        "sign_agreement": ("depth", ((agree + 1) / 2).mean(0)),
        "alpha": ("depth", np.array([float(alpha) for _, alpha in fits])),
    }
    return paired_result(
        rm, "tuned_lens", test_of, values, ("pair", "side", "depth"), coords, seed=seed,
        title="Tuned reward lens (decodable)", claim="decodable",
        settings={"alphas": list(alphas), "seed": seed, "train_pairs": len(train_of),
                  "train_prompts": len(set(prompts)), "train_hash": data.inputs_hash(train_of)},
        shows="How much of the final reward a linear reader, fitted on other prompts, finds at every depth.",
        cannot_show="That the network uses what the reader finds there: decodable is not used.",
    )  # fmt: skip


@checked_arguments
def gradient_lens(
    rm: RewardModel, pairs, at: Literal["final", "all"] = "final", batch_size: int | None = None
) -> Result:
    """First-order reward content of the residual stream at every depth, from one backward pass for all
    depths.

    `at`: "final" takes gradient and residual at the reward position, "all" sums g . h over all positions. A
    backward pass keeps the activations of all blocks: `batch_size` (texts at once) bounds the memory.

    Returns value (pair, side, depth) = g_d . h_d + b in reward units (b the reward's constant, which the lens
    adds too), with mean and interval over prompts; the last depth is the reward (check "last depth"). The
    coordinate `cosine` of `depth` compares the mean gradient (at "all" summed over positions) with the mean
    effective direction. Check "last gradient": the gradient at the last depth is the effective direction.
    Leaves no `.grad`.
    """
    if at not in ("final", "all"):
        raise DataError("The gradient lens was asked for something it does not have", found=f"at={at!r}",
                        expected="'final' or 'all'", do="pass one of these")  # fmt: skip
    pairs = data.as_pairs(pairs)
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    content = np.empty((len(tokens), rm.n_layers + 1))
    # Sums over runs of the gradient at every depth and, in the last row, of the effective direction.
    sums = torch.zeros(rm.n_layers + 2, rm.d_model, dtype=torch.float64)
    gaps = []
    if at == "all" and isinstance(rm.readout, PromptGated):
        raise StructureError(
            "The gradient lens at all positions has no last depth under a gate that reads the prompt",
            found="at='all' and a prompt-gated readout: slopes in the prompt go through the gate too, a network of its "
            "own, so that slope times residual does not sum to the reward",
            expected="at='final', where the weights are those of the prompt",
            do="use at='final'; gate_attribution says what set the weights, gate_routes what a change of the prompt "
            "does through them; a single objective (objective=) has no gate",
        )
    gates = rm.readout_inputs(tokens)
    for batch in rm.batches(tokens, batch_size):
        inputs = None if gates is None else gates[list(batch.rows)]
        read, gradients, u, gap = _backward(rm, batch, at, inputs)
        content[list(batch.rows)] = read.cpu()
        sums += torch.cat([gradients, u[:, None]], 1).double().cpu().sum(0)
        gaps.append(gap)
    cosine = torch.nn.functional.cosine_similarity(sums[:-1], sums[-1:], dim=1)
    tolerance = 1e-2 if rm.sixteen_bit else 1e-5
    worst = np.max(gaps, axis=0)
    named = zip(("last gradient", "last depth"), worst, strict=True)
    checks = [Check(name, float(gap), tolerance) for name, gap in named]
    return paired_result(
        rm, "gradient_lens", pairs, margin_of(content[::2], content[1::2]), ("pair", "side", "depth"),
        {"depth": np.arange(rm.n_layers + 1), "cosine": ("depth", cosine.numpy())}, checks=checks,
        title="Gradient reward lens", settings={"at": at},
        shows="What the residual at every depth is worth to the reward, to first order, as later blocks read "
        "it.",
        cannot_show="What would happen without that residual: the first order holds for small changes.",
    )  # fmt: skip


def _residuals(rm: RewardModel, pairs) -> tuple[np.ndarray, np.ndarray]:
    """Residuals [run, depth, d_model] at the reward position and rewards [run]."""
    sites = [Site("embed"), *(Site("resid_post", layer) for layer in range(rm.n_layers))]
    parts = []
    for acts in captured(rm, pairs, sites):
        residuals = torch.stack([acts[site] for site in sites], 1)
        rewards = rm.readout.reward(residuals[:, -1], rm.readout_inputs(acts.tokens))
        parts.append((residuals.cpu().numpy(), rewards.double().cpu().numpy()))
    residuals, rewards = (np.concatenate(part) for part in zip(*parts, strict=True))
    return residuals, rewards


def _require_split(train_prompts: list[str], test_prompts: set[str]) -> None:
    shared = len(set(train_prompts) & test_prompts)
    if shared:
        raise DataError(
            "The tuned lens would be tested on prompts it was fitted to",
            found=f"{shared} prompts in both train_pairs and pairs",
            expected="disjoint prompts",
            do="split by prompt, so that all pairs of a prompt are on one side: pairs.split(0.5)",
        )
    if len(train_prompts) < FEWEST_RESPONSES:
        raise DataError(
            "The tuned lens has too little to be fitted on",
            found=f"{len(train_prompts)} training responses",
            expected=f"at least {FEWEST_RESPONSES} responses ({FEWEST_RESPONSES // 2} pairs)",
            do=f"pass {(FEWEST_RESPONSES - len(train_prompts) + 1) // 2} more pairs as train_pairs",
        )
    if len(set(train_prompts)) < 2:
        raise DataError(
            "The tuned lens cannot choose its penalty by cross-validation over prompts",
            found="training responses of one prompt",
            expected="at least two prompts",
            do="pass train_pairs of more prompts",
        )


def _ridge(
    x: np.ndarray, targets: np.ndarray, unknown: np.ndarray, prompts: list[str], alphas: Sequence[float]
) -> tuple[np.ndarray, float]:
    """Predictions [run, target] for `unknown`, each target with its best penalty, and the first one's
    penalty.

    All penalties are fitted at once: Ridge takes one a target, so the targets are repeated for each penalty.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(rows: np.ndarray, columns: np.ndarray, penalties: Any):
        return make_pipeline(StandardScaler(), Ridge(alpha=penalties)).fit(rows, columns)

    x, unknown = x.astype(np.float64), unknown.astype(np.float64)
    repeated = np.repeat(targets, len(alphas), axis=1)
    penalties = np.tile(alphas, targets.shape[1])
    error = np.zeros(len(penalties))
    for inside, outside in GroupKFold(min(FOLDS, len(set(prompts)))).split(x, groups=prompts):
        model = fitted(x[inside], repeated[inside], penalties)
        error += np.square(model.predict(x[outside]) - repeated[outside]).sum(0)
    best = np.asarray(alphas)[error.reshape(targets.shape[1], -1).argmin(1)]
    return fitted(x, targets, best).predict(unknown), float(best[0])


def _backward(
    rm: RewardModel, batch: Batch, at: str, inputs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
    """Of one batch: g . h + b [run, depth], gradients [run, depth, d_model], u [run, d_model] and the two
    gaps.

    Every residual is moved by mask * (shift + stretch * residual) with shift and stretch zero: the derivative
    by shift is the gradient summed over the mask, the derivative by stretch the sum of g . h. No weight is
    asked for.
    """
    like = rm.like
    mask = torch.zeros_like(batch.mask) if at == "final" else batch.mask
    if at == "final":
        mask[torch.arange(len(batch.rows)), batch.reward_pos] = 1
    shifts: list[Tensor] = []
    stretches: list[Tensor] = []
    last: list[Tensor] = []

    def nudge(x: Tensor) -> Tensor:
        wide = x.to(like.dtype)
        shifts.append(torch.zeros_like(wide[:, 0], requires_grad=True))
        stretches.append(torch.zeros_like(wide[:, 0, 0], requires_grad=True))
        step = shifts[-1][:, None] + stretches[-1][:, None, None] * wide
        return x + (mask.to(wide)[..., None] * step).to(x.dtype)

    pick = at_rows(batch.reward_pos)
    edits = [rm.trunk.edit_residual(depth, nudge) for depth in range(rm.n_layers + 1)]
    with torch.enable_grad():
        rm.trunk.run(batch, *edits, rm.trunk.read_residual(rm.n_layers, lambda x: last.append(pick(x))))
        h = last[0].to(like)
        u, constant, _ = rm.readout.direction(h.detach(), inputs)
        found = torch.autograd.grad((u * h).sum(), [*shifts, *stretches])
    h = h.detach()
    gradients = torch.stack([g.to(like) for g in found[: len(shifts)]], 1)
    content = torch.stack([g.to(like) for g in found[len(shifts) :]], 1) + constant[:, None]
    size = (u * h).abs().sum(-1) + constant.abs()
    last_gradient = (gradients[:, -1] - u).norm(dim=-1) / u.norm(dim=-1)
    last_depth = (content[:, -1] - rm.readout.reward(h, inputs)).abs() / size
    return content, gradients, u, (float(last_gradient.max()), float(last_depth.max()))
