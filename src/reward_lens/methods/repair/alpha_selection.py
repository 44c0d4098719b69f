"""How strong an edit of the head may be: the bias it leaves on one set of pairs, the accuracy it costs on another.

    shift(alpha)   = mean margin r_alpha(edited) - r_alpha(original) over `dev`, the pairs on which it should vanish
    change(alpha)  = accuracy of r_alpha on `guard` less that of the model as it stands (a tie counts half)

An alpha is allowed where the lower end of the interval of its change lies over -margin: non-inferiority, which a small
or noisy guard set cannot show, and not the absence of a difference, which it can. The states that the head reads do not
depend on its row, so every text runs once and every alpha is a dot product, rounded as the edited head would hold it.

The interval of the change is that of `shared.paired_shares`, which has a width where no pair changes.

What this cannot show: the shift on other edits or prompts. The chosen alpha was chosen on `dev`: report its value on
pairs of a third set. Fixing one bias can move the reward to another.

Reference: arXiv 2606.03131 (a grid of alphas under a bound on the loss).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.repair.head_editing import edited_row, margins_read, unit_directions
from reward_lens.methods.shared.paired import paired_result
from reward_lens.methods.shared.paired_shares import paired_change, won
from reward_lens.model.head import editable_readout, stored
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

ALPHAS = tuple(i / 4 for i in range(9))


@checked_arguments
@torch.no_grad()
def select_alpha(
    rm: RewardModel,
    directions,
    dev,
    guard,
    alphas: Sequence[int | float] | np.ndarray = ALPHAS,
    margin: float = 0.05,
    seed: int = 0,
) -> Result:
    """Bias shift and accuracy of `edit_head(rm, directions, alpha)` over a grid of alphas, and the one to take.

    Parameters
    ----------
    directions: as in `edit_head`.
    dev: pairs whose chosen response is the edited one, on which the margin should vanish. At least 6 prompts.
    guard: preference pairs, none of a prompt in `dev`, on which accuracy may fall by less than `margin`. So many that
        an alpha that changes no pair would be allowed (73 prompts at .05).
    alphas: different finite numbers.

    Returns value (pair, alpha) in reward units, the margin of each dev pair; mean and interval over prompts. On
    `alpha`: `accuracy` on the guard pairs, `accuracy_change` with `accuracy_change_low` and `accuracy_change_high`
    (fractions), `gains`, `losses`, and `allowed`, 1 or 0 (alpha = 0 changes nothing and is always allowed). In `meta`:
    `alpha`, the allowed one whose mean shift is nearest to 0 (the smaller alpha of equals), or None, with the `reason`
    in words. The check "prompts of the directions in dev or guard" counts them where the directions are Results.
    Raises `DataError` for prompts in both sets, too few prompts, and as `edit_head` does.
    """
    dev, guard = data.as_pairs(dev), data.as_pairs(guard)
    grid = _grid(alphas, margin)
    _require(dev, guard, margin)
    vectors = unit_directions(rm, directions)
    rows = torch.stack([stored(rm, edited_row(rm, vectors, float(alpha))) for alpha in grid])
    now = editable_readout(rm).weight[None]
    shift = _margins(rm, dev, rows)
    credit = won(_margins(rm, guard, torch.cat([now, rows.to(now)])))
    change = credit[:, 1:] - credit[:, :1]
    prompts = np.array([p.prompt_key for p in guard])
    cells = np.array([paired_change(change[:, i], prompts) for i in range(len(grid))])
    cells[grid == 0, 2:] = 0.0  # the same model: there is nothing to estimate
    allowed = cells[:, 2] > -margin
    mean = np.asarray(stats.mean_interval(shift, [p.prompt_key for p in dev], seed=seed).mean)
    chosen, reason = _choice(grid, mean, cells[:, 2], allowed, margin)
    columns: dict[str, Any] = {
        "gains": cells[:, 0], "losses": cells[:, 1], "accuracy": credit[:, 1:].mean(0),
        "accuracy_change": change.mean(0), "accuracy_change_low": cells[:, 2], "accuracy_change_high": cells[:, 3],
        "allowed": allowed.astype(int),
    }  # fmt: skip
    used = _prompts_of(directions)
    seen = len(used & {p.prompt_key for both in (dev, guard) for p in both})
    note = "the shift of a direction on the prompts it was taken from is too good" if seen else ""
    return paired_result(
        rm, "select_alpha", dev, shift, ("pair", "alpha"),
        {"alpha": grid, **{name: ("alpha", column) for name, column in columns.items()}}, seed=seed,
        checks=[Check("prompts of the directions in dev or guard", float(seen), np.inf, note)],
        settings={"margin": margin, "directions": len(vectors)}, alpha=chosen, reason=reason,
        guard={"n_pairs": len(guard), "n_prompts": guard.n_prompts, "inputs_hash": data.inputs_hash(guard),
               "accuracy": float(credit[:, 0].mean())},
        title="Strength of a head edit",
        shows="The margin that an edit of the response still buys, by the strength of the head's edit, beside what the "
        "head's edit costs in accuracy.",
        cannot_show="The shift on other prompts or edits: alpha was chosen on these pairs, so report its value on a "
        "set of its own, and the other biases with it.",
    )  # fmt: skip


def _margins(rm: RewardModel, pairs: data.Pairs, rows: Float[torch.Tensor, "row d_model"]) -> np.ndarray:
    """[pair, row] margins under each row of a head."""
    norm = editable_readout(rm).norm
    return margins_read(rm, pairs, lambda h: norm(h) @ rows.T)


def _choice(grid, mean, low, allowed, margin: float) -> tuple[float | None, str]:
    if not allowed.any():
        best = int(np.argmax(low))
        return None, (
            f"no alpha is allowed: the lower end of the change in accuracy is nearest to -{margin:g} at alpha "
            f"{grid[best]:g}, where it is {low[best]:.3f}"
        )
    order = np.lexsort((np.abs(grid), np.abs(mean)))
    best = next(int(i) for i in order if allowed[i])
    if not (allowed & (grid != 0)).any():
        return 0.0, f"no alpha that changes the head is allowed: the shift stays as it is, {mean[best]:.4g}"
    return float(grid[best]), (
        f"of {int(allowed.sum())} allowed of {len(grid)}, the mean shift is nearest to 0 at alpha {grid[best]:g}: "
        f"{mean[best]:.4g}; the lower end of the change in accuracy there is {low[best]:.3f}"
    )


def _grid(alphas, margin: float) -> Float[np.ndarray, " alpha"]:
    grid = np.asarray(alphas, dtype=float)
    fit = grid.ndim == 1 and grid.size > 0 and np.isfinite(grid).all() and len(set(grid.tolist())) == grid.size
    if not fit or not 0 < margin < 1:
        raise DataError(
            "The choice of alpha was not understood",
            found=f"alphas={alphas!r}, margin={margin!r}",
            expected="one or more different finite alphas, and a margin between 0 and 1",
            do="correct these; the defaults are a good start",
        )
    return grid


def _require(dev: data.Pairs, guard: data.Pairs, margin: float) -> None:
    both = {p.prompt_key for p in dev} & {p.prompt_key for p in guard}
    if both:
        raise DataError(
            "The two sets share prompts",
            found=f"{len(both)} prompts in dev and in guard",
            expected="pairs of different prompts: alpha is chosen on one set and held back by the other",
            do="split the original pairs by prompt, before they are edited: pairs.split(0.2)",
        )
    if dev.n_prompts < stats.FEWEST:
        raise DataError(
            "There are too few dev prompts to choose alpha on",
            found=f"{dev.n_prompts} different prompts",
            expected=f"at least {stats.FEWEST}: under that there is no interval",
            do="edit responses to more prompts",
        )
    counts = np.unique([p.prompt_key for p in guard], return_counts=True)[1]
    worth = counts.sum() ** 2 / np.square(counts).sum()  # as `stats.proportion_interval` counts prompts
    best = float(stats.proportion_interval(np.zeros(len(guard)), [p.prompt_key for p in guard]).high)
    if not best < margin or guard.n_prompts < stats.FEWEST:
        raise DataError(
            "The guard set is too small for this margin",
            found=f"{guard.n_prompts} different prompts in {len(guard)} pairs, worth {worth:.0f} prompts of one pair "
            f"each: if the edit changed none of them, the interval would still reach to -{best:.3f}",
            expected=f"at least {max(stats.FEWEST, _needed(margin))} prompts at a margin of {margin:g} (one pair each)",
            do="pass pairs of more prompts (uneven numbers of pairs a prompt count for less), or state a wider margin",
        )


def _needed(margin: float) -> int:
    """Prompts at which Wilson's interval of no losses stays under the margin."""
    n = 1
    while stats.wilson(0, n)[1] >= margin:
        n += 1 + n // 100
    while n > 1 and stats.wilson(0, n - 1)[1] < margin:
        n -= 1
    return n


def _prompts_of(directions) -> set[str]:
    given = directions if isinstance(directions, list | tuple) else [directions]
    return {key for item in given if isinstance(item, Result) for key in item.meta.get("prompts", ())}
