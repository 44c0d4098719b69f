"""What each latent of a dictionary gives to the reward; the error term and the decoder's bias are rows of their own.

    x_p = sum_j z_pj d_j + b_dec + e_p            exactly, at the read positions of the dictionary's site
    r   = sum_j c_j + c_error + c_b_dec + rest

    direct      c_j = z_j u . d_j       u: effective direction, the norm's scale frozen; at the last site, where
                                        rest = w . shift + bias and the split is exact
    gradient    c_j = sum_p z_pj g_p . d_j        g: slope at the run itself; first order, rest is what it leaves
    integrated  the same with g averaged from b_dec to x; b_dec is where the way begins, and its reward is in rest
    ablation    c_j = r - r(z_j set to 0, error kept); exact one by one, rest is what they do jointly

Direct margins are split by scale="shared" or "own" as in `contributions`; the other estimators subtract the two sides.

What this cannot show: what the dictionary has not found. That part is the row `error`, and `error_share` says how large
it is beside the latents. A direct contribution is not what an ablation would do: the norm answers to it.

Reference: Marks et al. 2024, arXiv 2403.19647 (latents with error terms); Sundararajan et al. 2017, arXiv 1703.01365.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.sparse import csr_array

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_splits import Estimator, Part, split_pair
from reward_lens.methods.latents.latent_states import At, described, is_last, read_latents, site_of
from reward_lens.methods.shared.paired import paired_result
from reward_lens.methods.shared.paired_shares import ends_of_change
from reward_lens.methods.shared.prompt_ratios import plain
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import SIDES
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE

Scale = Literal["shared", "own"]
TAILS = ("error", "b_dec", "rest")


@checked_arguments
@torch.no_grad()
def latent_contributions(
    rm: RewardModel,
    sae: SAE,
    pairs,
    estimator: Estimator | None = None,
    at: At = "final",
    scale: Scale | None = None,
    top: int | None = None,
    steps: int = 16,
    site: Site | str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Split rewards and margins over the latents that are active in some pairs.

    Parameters
    ----------
    sae: a dictionary of one of this model's sites. site: where it is read, if it does not say so itself.
    estimator: None is "direct" at the last site, read at the reward position, and "gradient" elsewhere.
    at: the positions whose latents count: "final" (the reward position) or "response" (through the reward position).
    scale: of direct margins; None is "shared" there.
    top: keep the latents largest in mean absolute margin; the others are summed in the row "other latents".
    steps: nodes of the integration. max_rows: changed runs walking at once.

    Returns value (pair, side, latent) in reward units; mean and interval over prompts. Rows: "F12" and so on, then
    "other latents" with `top`, "error", "b_dec", "rest" and, for shared margins, "norm"; they sum to the reward and to
    the margin. Coordinates on `latent`: `index` (-1 for the last rows), `kind`, `frequency_chosen` and
    `frequency_rejected` (share of responses in which it is active at a read position), `frequency_difference` with
    `_low` and `_high`; (pair, side): `error_share` = |error| / (|sum of latents| + |b_dec| + |error|), whose mean and
    interval are in `meta`. Checks: "completeness" (E3); direct: "margin split" (E4); integrated: "integration gap",
    what the nodes left (it is in rest); ablation: "clean row".
    Raises `DataError` for a dictionary of another width or site, and for settings that do not go together.
    """
    pairs, where = data.as_pairs(pairs), site_of(rm, sae, site, at)
    how, split = _settled(rm, where, estimator, at, scale, top, steps)
    texts = read_latents(rm, sae, [t for both in rm.tokenize_pairs(pairs) for t in both], where, at)
    parts: list[Part] = []
    for both in zip(texts, texts, strict=True):
        parts += split_pair(rm, sae, both, where, how, split, steps, max_rows)
    tables = [latent_table(parts[::2], sae.d_sae, False), latent_table(parts[1::2], sae.d_sae, False)]
    tables.append(latent_table(parts[::2], sae.d_sae, True) + latent_table(parts[1::2], sae.d_sae, True))
    kept = _kept(tables[2], parts, top)
    values = np.stack([table[:, kept].toarray() for table in tables], 1)
    whole = np.stack([np.asarray(table.sum(1)).ravel() for table in tables], 1)
    own, to_margin = (np.stack(some).reshape(-1, 2, 3) for some in
                      ([p.tails for p in parts], [p.tails_to_margin for p in parts]))  # fmt: skip
    tails = np.concatenate([own, to_margin.sum(1, keepdims=True)], 1)
    columns, names = [values], []
    if len(kept) < len(active_latents(parts)):
        columns, names = [values, (whole - values.sum(-1))[..., None]], ["other latents"]
    columns, names = [*columns, tails], [*names, *TAILS]
    if split == "shared":
        norm = np.array([[0.0, 0.0, a.norm + b.norm] for a, b in zip(parts[::2], parts[1::2], strict=True)])
        columns, names = [*columns, norm[..., None]], [*names, "norm"]
    prompts = [p.prompt_key for p in pairs]
    sizes = np.abs(np.concatenate([whole[..., None], tails[..., :2]], -1))  # latents, error, b_dec
    share = np.divide(sizes[..., 1], sizes.sum(-1), out=np.zeros(sizes.shape[:2]), where=sizes.sum(-1) > 0)
    over = stats.mean_interval(share, prompts, seed=seed, limits=(0.0, 1.0))
    coords = _coords(kept, names, parts, prompts) | {"error_share": (("pair", "side"), share)}
    settings = {"estimator": how, "at": at, "scale": split, "top": top, "steps": steps if how == "integrated" else None}
    return paired_result(
        rm, "latent_contributions", pairs, np.concatenate(columns, -1), ("pair", "side", "latent"), coords, seed=seed,
        checks=_checks(rm, parts, how), title=f"Latents at {where} ({how})", sae=described(sae, where),
        settings=settings, frozen="the final norm's scale" if how == "direct" else "nothing",
        error_share={side: {key: plain(getattr(over, key)[k]) for key in ("mean", "low", "high")}
                     for k, side in enumerate(SIDES)},
        shows="What each latent gives to rewards and margins; with the error term, the decoder's bias and the rest the "
        "rows sum to them.",
        cannot_show="What the dictionary has not found (the row error), or, unless the estimator is ablation, what "
        "removing a latent would do.",
    )  # fmt: skip


def active_latents(parts: Sequence[Part]) -> np.ndarray:
    """The latents that are active in a text or more, in order."""
    return np.unique(np.concatenate([p.active for p in parts]))


def latent_table(parts: Sequence[Part], width: int, margin: bool) -> csr_array:
    """[pair, latent] of one side, or of what it puts into the margin."""
    values = np.concatenate([p.to_margin if margin else p.own for p in parts])
    starts = np.cumsum([0, *(len(p.active) for p in parts)])
    return csr_array((values, np.concatenate([p.active for p in parts]), starts), shape=(len(parts), width))


def _kept(margin: csr_array, parts: Sequence[Part], top: int | None) -> np.ndarray:
    """The latents with a row of their own, in the dictionary's order."""
    active = active_latents(parts)
    if top is None:
        return active
    size = np.asarray(abs(margin).mean(0)).ravel()[active]
    return np.sort(active[np.argsort(-size, kind="stable")[:top]])


def _coords(kept: np.ndarray, names: list[str], parts: Sequence[Part], prompts: list[str]) -> dict[str, Any]:
    there = np.stack([np.isin(kept, p.active) for p in parts]).astype(float).reshape(len(prompts), 2, -1)
    tail = np.full(len(names), np.nan)
    difference = there[:, 0] - there[:, 1]
    low, high = _ends_of_change(difference, prompts)
    by_latent = {"frequency_chosen": there[:, 0].mean(0), "frequency_rejected": there[:, 1].mean(0),
                 "frequency_difference": difference.mean(0), "frequency_difference_low": low,
                 "frequency_difference_high": high}  # fmt: skip
    return {
        "latent": np.array([*(f"F{j}" for j in kept), *names], dtype=object),
        "index": ("latent", np.array([*kept, *(-1 for _ in names)])),
        "kind": ("latent", np.array([*("latent" for _ in kept), *names], dtype=object)),
        **{name: ("latent", np.concatenate([values, tail])) for name, values in by_latent.items()},
    }


def _ends_of_change(difference: np.ndarray, prompts: list[str]) -> np.ndarray:
    """[(low, high), latent] of the mean of -1, 0 and 1 over pairs. Many latents are active in the same few texts."""
    patterns = {column.tobytes(): column for column in difference.T}
    found = {key: ends_of_change(column, prompts) for key, column in patterns.items()}
    return np.array([found[column.tobytes()] for column in difference.T]).reshape(-1, 2).T


def _checks(rm: RewardModel, parts: Sequence[Part], how: Estimator) -> list[Check]:
    sixteen = rm.sixteen_bit
    gap, other = max(p.gap for p in parts), max(p.other_gap for p in parts)
    note = "" if how == "direct" else "by construction, the row rest closing it"
    checks = [Check("completeness", float(gap), 1e-2 if sixteen else 1e-5, note)]
    if how == "direct":
        checks.append(Check("margin split", float(other), 1e-2 if sixteen else 1e-5))
    if how == "integrated":
        checks.append(Check("integration gap", float(other), float("inf"), "falls as steps grow; part of rest"))
    if how == "ablation":
        checks.append(Check("clean row", float(other), 2e-2 if sixteen else 1e-4))
    return checks


def _settled(
    rm: RewardModel, site: Site, estimator: str | None, at: str, scale: str | None, top: int | None, steps: int
) -> tuple[Estimator, Scale]:
    """The estimator and scale that are used, or a `DataError` for what does not go together."""
    exact = is_last(rm, site) and at == "final"
    how: Any = ("direct" if exact else "gradient") if estimator is None else estimator
    split: Any = ("shared" if how == "direct" else "own") if scale is None else scale
    if how not in get_args(Estimator) or split not in get_args(Scale) or (top is not None and top < 1) or steps < 1:
        raise DataError(
            "The split over latents was not understood",
            found=f"estimator={how!r}, scale={split!r}, top={top}, steps={steps}",
            expected="estimator 'direct', 'gradient', 'integrated' or 'ablation'; scale 'shared' or 'own'; top and "
            "steps of 1 or more",
            do="leave them out for the usual choice",
        )
    if how == "direct" and not exact:
        raise DataError(
            "A direct split of the reward is exact at one place only",
            found=f"the site {site}, at={at!r}",
            expected=f"L{rm.n_layers - 1}.resid_post, what the final norm reads, at='final'",
            do="use estimator='gradient', 'integrated' or 'ablation' for latents of other places",
        )
    if split == "shared" and how != "direct":
        raise DataError(
            "Two runs share a norm's scale in the direct split only",
            found=f"scale='shared', estimator={how!r}",
            expected="scale='own', or estimator='direct'",
            do="leave scale out",
        )
    return how, split
