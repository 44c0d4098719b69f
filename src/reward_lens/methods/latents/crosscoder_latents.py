"""Which latents of a crosscoder carry the difference of two models' margins.

    r_m = sum_j c_mj + c_m,error + c_m,b_dec + rest_m        of model m, exactly
    c_mj = sum_p z_pj g_mp . W_dec_m[j]        z: one activation for both models, p: the read positions

    direct      g = u_m, the effective direction with the norm's scale frozen, at the last site and the reward position:
                rest is w . shift + bias (E3, checked)
    gradient    g = dr_m / dx_m elsewhere: first order, rest is what it leaves

Difference: second model minus first, row by row, and so its sum. With D_i the difference of the margins of pair i and
C_ij what latent j has of it (sum_j C_ij over all rows = D_i),

    share_j = sum_i C_ij D_i / sum_i D_i^2        sums to 1 over all rows

which counts what a latent does in pairs where the models differ, whichever of them is higher; the mean of C_ij counts
only what goes one way.

What this cannot show: that a latent is a thing of one model because its row is small in the other; `nu_error` and
`nu_reconstruction` near 1 speak against it (`sae.latent_scaling`). Rewards have no common unit: with unit="reward" a
model whose rewards spread wider makes the difference.

Reference: Lindsey et al. 2024 (crosscoders, relative norm); Minder et al. 2025, arXiv 2504.02922 (latent scaling). The
split of a reward difference is this library's.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.crosscoder_splits import Codes, chunks, codes_of, parts_of, values_of
from reward_lens.methods.latents.latent_contributions import Scale, active_latents
from reward_lens.methods.latents.latent_screening import flip_tests
from reward_lens.methods.latents.latent_splits import Part
from reward_lens.methods.latents.latent_states import At
from reward_lens.methods.latents.model_readings import DIFFERENCE, Estimator, Reading, read_two
from reward_lens.methods.shared.paired import labelled, margin_of, over_prompts
from reward_lens.methods.shared.prompt_ratios import plain, prompt_ratio
from reward_lens.result import Check, Result
from reward_lens.sae.crosscoder import Crosscoder
from reward_lens.sae.latent_scaling import scaling_terms, stronger

Unit = Literal["reward", "reward_sd"]
TARGETS = ("nu_error", "nu_reconstruction")
_OTHER_WIDTHS = "not measured: the models' widths differ, so a direction of one is none of the other"


@checked_arguments
@torch.no_grad()
def crosscoder_latents(
    models,
    crosscoder: Crosscoder,
    pairs,
    estimator: Estimator | None = None,
    at: At = "final",
    scale: Scale | None = None,
    unit: Unit = "reward",
    top: int | None = 50,
    sites: Sequence[str] | None = None,
    seed: int = 0,
) -> Result:
    """Latents by how much of the difference of two reward models' margins they carry.

    Parameters
    ----------
    models: {name: model} of two, in the crosscoder's order; a `RewardModel`, a path or hub id, or a function that loads
        one. What is loaded here is gone before the next one is loaded, so one is in memory at a time.
    crosscoder: of both models' activations (`train_crosscoder`).
    estimator: None is "direct" at the last sites, read at the reward position, and "gradient" elsewhere.
    at: the positions whose latents count: "final" (the reward position) or "response" (through the reward position).
    scale: how a direct margin treats the two runs' norm scales, "shared" or "own"; None is "shared" there.
    unit: "reward", or "reward_sd": each model's rewards in SDs of its own rewards within prompts. Intervals and p take
        these SDs as known, so that p also finds what they differ by chance on these pairs.
    top: keep the latents largest in |share|; the others are summed in the row "other latents". None: all.
    sites: where either model is read, if the crosscoder does not say so itself.

    Returns value (pair, side, model, latent) in that unit; model = both names and "difference" (second minus first);
    mean and interval over prompts, which know nothing of the choice of latents. Rows: "F12" and so on, largest |share|
    first, then "other latents", "error", "b_dec", "rest" and, for shared margins, "norm"; they sum to the rewards and
    margins. Coordinates on `latent`: `index` (-1 for the last rows), `kind`, `share` with `_low`, `_high` (Fieller,
    over prompts; NaN where no margin differs by more than the models' noise floor), `p` (sign flips over prompts, of
    the margin difference) and `p_adjusted` (Holm over all active latents), `delta` (relative decoder norm: 0 first
    model only, 1 second only), `cosine` of the two decoder rows, `stronger` (the model of the larger row),
    `frequency_chosen`, `frequency_rejected`, `nu_error` and `nu_reconstruction` with `_low`, `_high` (latent scaling on
    the read positions); (pair, side, model): `error_share` = |error| / (|sum of latents| + |b_dec| + |error|). In
    `meta`: "models", `fvu` of either at the read positions.
    Checks: "completeness" (E3), "difference" of the two rewards, and direct "margin split" (E4).
    Raises `DataError` for models that read other tokens, that the crosscoder is not of (by width and, where it was
    trained from stores, weights), for other than two, and for settings that do not go together.
    """
    pairs = data.as_pairs(pairs)
    if unit not in ("reward", "reward_sd") or scale not in (None, "shared", "own") or (top is not None and top < 1):
        raise DataError("The comparison was not understood", found=f"unit={unit!r}, scale={scale!r}, top={top}",
                        expected="unit 'reward' or 'reward_sd', scale 'shared' or 'own', top of 1 or more",
                        do="leave them out for the usual choice")  # fmt: skip
    read = read_two(models, crosscoder, pairs, sites or (None, None), at, estimator)
    how = read[0].estimator
    split = scale or ("shared" if how == "direct" else "own")
    if split == "shared" and how != "direct":
        raise DataError("Two runs share a norm's scale in the direct split only", found=f"scale={scale!r}, {how}",
                        expected="scale='own', or estimator='direct'", do="leave scale out")  # fmt: skip
    codes, units = codes_of(crosscoder, read), [_unit_of(one, unit) for one in read]
    parts = [parts_of(crosscoder, m, one, codes, split, units[m]) for m, one in enumerate(read)]
    prompts = [p.prompt_key for p in pairs]
    names, values, whole, kept = values_of(parts, crosscoder.d_sae, split, top)
    difference = values[:, 2, 2]
    total = difference.sum(-1)
    floor = max(one.noise_floor * unit for one, unit in zip(read, units, strict=True))
    known = np.abs(total).max() > floor  # else models of equal margins are told apart by rounding
    share = prompt_ratio(difference * total[:, None], total**2 * known, prompts)
    n_active = len(active_latents(parts[0]))
    tests = flip_tests(difference[:, : len(kept)], prompts, "holm", seed, n_active)
    coords = {
        "model": np.array([*(one.name for one in read), DIFFERENCE], dtype=object),
        "latent": np.array([*(f"F{j}" for j in kept), *names], dtype=object),
        "kind": ("latent", np.array([*("latent" for _ in kept), *names], dtype=object)),
        "index": ("latent", np.array([*kept, *(-1 for _ in names)])),
        "share": ("latent", share.value), "share_low": ("latent", share.low), "share_high": ("latent", share.high),
        "error_share": (("pair", "side", "model"), _error_share(whole, values, names)),
    }  # fmt: skip
    by_latent = {"p": tests[0], "p_adjusted": _over_all(tests[0], n_active)}
    by_latent |= _of_rows(crosscoder, kept) | _frequencies(parts[0], kept) | _scaling(crosscoder, read, kept, prompts)
    tail = np.full(len(names), np.nan)
    coords |= {name: ("latent", np.concatenate([numbers, tail])) for name, numbers in by_latent.items()}
    which = [read[m].name for m in stronger(crosscoder)[kept]]
    coords["stronger"] = ("latent", np.array([*which, *("" for _ in names)], dtype=object))
    value = labelled(pairs, values, ("pair", "side", "model", "latent"), coords)
    summary, interval = over_prompts(pairs, value, seed)
    frozen = "the final norm's scale" if how == "direct" else "nothing"
    meta = {
        "method": "crosscoder_latents", "model": ", ".join(one.name for one in read),
        "models": {one.name: one.about | {"reward_sd": plain(one.spread)} for one in read},
        "versions": read[0].about["versions"], "n_pairs": len(pairs), "n_prompts": pairs.n_prompts,
        "inputs_hash": data.inputs_hash(pairs), "seed": seed, "interval": interval, "frozen": frozen,
        "settings": {"estimator": how, "at": at, "scale": split, "unit": unit, "top": top},
        "crosscoder": _described(crosscoder), "n_active": n_active, "tests": tests[2] | {"adjusted": "holm",
                                                                                       "of": n_active},
        "fvu": {one.name: _fvu(crosscoder, m, one, codes) for m, one in enumerate(read)},
        "latent_scaling": "of the read positions" if len(set(crosscoder.widths)) == 1 else _OTHER_WIDTHS,
        "title": f"Latents that carry the difference of two rewards ({how})",
        "shows": "What each latent gives to either model's rewards and margins, and how much of their difference it "
        "carries; with the error term, the decoder's bias and the rest the rows sum to them.",
        "cannot_show": "What the crosscoder has not found (the row error), or that a latent with a small row is absent "
        "from a model where the latent scaling is near 1.",
    }  # fmt: skip
    return Result(
        "crosscoder_latents", value, unit=unit, checks=_checks(read, parts, values, units), meta=meta,
        mean=summary["mean"], low=summary["low"], high=summary["high"],
    )  # fmt: skip


def _unit_of(one: Reading, unit: Unit) -> float:
    if unit == "reward":
        return 1.0
    if not one.spread > 0:
        raise DataError(f"The rewards of {one.name} have no spread within prompts", found=f"an SD of {one.spread}",
                        expected="different responses of different rewards", do="use unit='reward'")  # fmt: skip
    return 1 / one.spread


def _error_share(whole: np.ndarray, values: np.ndarray, names: list[str]) -> np.ndarray:
    start = values.shape[-1] - len(names)
    error, bias = (np.abs(values[..., start + names.index(name)]) for name in ("error", "b_dec"))
    size = np.abs(whole) + error + bias
    return np.divide(error, size, out=np.zeros_like(size), where=size > 0)


def _over_all(p: np.ndarray, n_active: int) -> np.ndarray:
    """Holm over all active latents, those without a row of their own counted as if they had p = 1."""
    return stats.adjust(np.concatenate([p, np.ones(n_active - len(p))]), "holm")[: len(p)]


def _of_rows(crosscoder: Crosscoder, kept: np.ndarray) -> dict[str, np.ndarray]:
    return {name: getattr(crosscoder, name)[kept].double().cpu().numpy() for name in ("delta", "cosine")}


def _frequencies(parts: list[Part], kept: np.ndarray) -> dict[str, np.ndarray]:
    there = np.stack([np.isin(kept, p.active) for p in parts]).reshape(-1, 2, len(kept)).mean(0)
    return {"frequency_chosen": there[0], "frequency_rejected": there[1]}


def _scaling(
    crosscoder: Crosscoder, read: tuple[Reading, Reading], kept: np.ndarray, prompts: list[str]
) -> dict[str, np.ndarray]:
    """Latent scaling with intervals: it is a ratio of two sums over texts."""
    ends = {"": "value", "_low": "low", "_high": "high"}
    if len(set(crosscoder.widths)) != 1:
        return {name + end: np.full(len(kept), np.nan) for name in TARGETS for end in ends}
    latents = torch.from_numpy(kept)
    sums = []
    for lengths, xs in chunks(crosscoder, read):
        sums += [some.sum(2).numpy() for some in scaling_terms(crosscoder, xs, latents).split(lengths, 2)]
    of_texts = np.stack(sums)  # [text, target, (o, s), latent]
    by_text = np.repeat(np.array(prompts, dtype=object), 2).tolist()
    out = {}
    for t, name in enumerate(TARGETS):
        found = prompt_ratio(of_texts[:, t, 0], of_texts[:, t, 1], by_text)
        out |= {name + end: getattr(found, key) for end, key in ends.items()}
    return out


def _fvu(crosscoder: Crosscoder, m: int, one: Reading, codes: Codes) -> float | str | None:
    rows, bias = crosscoder.W_dec[m].double().cpu(), crosscoder.b_dec[m].double().cpu()
    left = sum(float((x.double() - z @ rows[torch.from_numpy(a)] - bias).square().sum())
               for x, (a, z) in zip(one.x, codes, strict=True))  # fmt: skip
    every = torch.cat(one.x).double()
    spread = float((every - every.mean(0)).square().sum())
    return plain(left / spread) if spread > 0 else None


def _checks(
    read: tuple[Reading, Reading], parts: list[list[Part]], values: np.ndarray, units: list[float]
) -> list[Check]:
    tolerance = 1e-2 if any(one.sixteen_bit for one in read) else 1e-5
    direct = read[0].estimator == "direct"
    note = "" if direct else "by construction, the row rest closing it"
    rewards = [one.reward.reshape(-1, 2) * unit for one, unit in zip(read, units, strict=True)]
    apart = margin_of(*(rewards[1] - rewards[0]).T)
    size = np.abs(values[:, :, :2]).sum((2, 3))
    gap = np.abs(values[:, :, 2].sum(-1) - apart)  # two equal texts, read by equal models: 0 of 0
    gap = np.divide(gap, size, out=np.where(gap > 0, np.inf, 0.0), where=size > 0)
    checks = [Check("completeness", float(max(p.gap for mine in parts for p in mine)), tolerance, note)]
    checks.append(Check("difference", float(gap.max()), tolerance, note))
    if direct:
        checks.append(Check("margin split", float(max(p.other_gap for mine in parts for p in mine)), tolerance))
    return checks


def _described(crosscoder: Crosscoder) -> dict[str, Any]:
    kept = {k: v for k, v in crosscoder.meta.items() if v is None or isinstance(v, str | int | float | bool)}
    return {"d_sae": crosscoder.d_sae, "names": crosscoder.names, "sites": crosscoder.sites, "trained": kept}
