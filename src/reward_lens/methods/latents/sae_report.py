"""How well a dictionary stands in for what it reads: variance, sparsity, rewards and margins, and other seeds.

    fvu               sum |x - SAE(x)|^2 / sum |x - mean x|^2                        over the read positions
    reward_recovered  1 - sum (r_sae - r)^2 / sum (r_mean - r)^2                     over the responses
    sign_agreement    share of pairs whose margin keeps its sign with the reconstruction spliced in (a zero: half)
    matched           share of the reward's latents with a latent of cosine > .7 in a dictionary of another seed

r_sae: the reward with the reconstruction in the place of the state; r_mean: with the mean state. See `splicing`. A
dictionary that gives the mean everywhere recovers 0; one that does worse than the mean is below 0.

What this cannot show: that latents mean something; a small fvu can go with a reward that is lost, since the reward may
live in little variance, and the other way round. Texts the dictionary was trained on flatter it.

Reference: Karvonen et al. 2025, arXiv 2503.09532 (core metrics, there of a loss); the reward version and the seeds of
the reward's latents are ours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_contributions import latent_contributions
from reward_lens.methods.latents.latent_states import described, encoded, site_of
from reward_lens.methods.latents.splicing import PLACES, Means, read_places, splice
from reward_lens.methods.shared.paired_shares import ends_of_change, won
from reward_lens.methods.shared.prompt_ratios import plain, prompt_ratio
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE

MEASURES = {
    "fvu": "fraction", "l0": "latents", "dead": "fraction", "error_norm": "fraction", "reward_recovered": "fraction",
    "sign_agreement": "fraction", "accuracy": "fraction", "accuracy_spliced": "fraction", "accuracy_change": "fraction",
}  # fmt: skip
MATCHED = 0.7
_UNDEFINED = "the texts' states or rewards do not differ from those of the mean state, so there is nothing to divide by"


@checked_arguments
@torch.no_grad()
def sae_report(
    rm: RewardModel,
    sae: SAE,
    pairs,
    seeds: Sequence[SAE] | None = None,
    n_relevant: int = 50,
    site: Site | str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Measures of a dictionary on the responses of some pairs, at the reward position and over the response.

    Parameters
    ----------
    seeds: dictionaries of the same site from other seeds, for the stability of the reward's latents.
    n_relevant: how many latents those are: the largest in mean absolute contribution to the margin
        (`latent_contributions` at the reward position).
    site: where the dictionary is read, if it does not say so itself. max_rows: changed runs walking at once.

    Returns value (measure, at) with its interval over prompts; `measure_unit` and `n` (texts, pairs, or positions for
    "dead") say of what. Measures: "fvu", "l0" (active latents of a position, its mean over a text and then over texts),
    "dead" (share of latents active at no position of these texts: a count, without interval), "error_norm" (|error| /
    |x|, averaged as l0), "reward_recovered" (NaN where the mean state gives every text its own reward),
    "sign_agreement", "accuracy", "accuracy_spliced" and their paired difference "accuracy_change". at = "final",
    "response": where the states are measured and the reconstruction is spliced in. In `meta`: `dead` with counts;
    `stability`, for each of `seeds` `matched`, `low`, `high`, `n`, `median_cosine` and `matched_active`, the share
    among all active latents, to compare with. Checks: "decoder" (SAE(x) is z W_dec + b_dec), "clean row".
    Raises `DataError` for a dictionary of another width or site.
    """
    pairs, where = data.as_pairs(pairs), site_of(rm, sae, site, "response")
    for other in seeds or ():
        site_of(rm, other, where, "response")
    if n_relevant < 1:
        raise DataError("No latents to match were asked for", found=f"n_relevant={n_relevant}", expected="1 or more",
                        do="leave it out for 50")  # fmt: skip
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    prompts = [p.prompt_key for p in pairs]
    by_text = np.repeat(np.array(prompts, dtype=object), 2).tolist()
    means, rows, sums = Means(rm.d_model), [], []
    used = np.zeros((2, sae.d_sae), bool)
    decoder = 0.0
    for i, places in enumerate(read_places(rm, sae, tokens, where)):
        means.take(*places)
        if i == 0:
            decoder = _decoder_gap(sae, places[1].x)
        for k, text in enumerate(places):
            x, error = text.x, text.error
            used[k, text.active.numpy()] = True
            squares = float(x.square().sum()), float(error.square().sum())
            norms = error.norm(dim=1) / x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            rows.append([len(x), *squares, float((text.z != 0).sum(1).double().mean()), float(norms.mean())])
            sums.append(x.sum(0))
    cells = np.array(rows).reshape(len(tokens), 2, -1)
    totals = torch.stack(sums).reshape(len(tokens), 2, -1)
    rewards, clean = splice(rm, sae, tokens, where, means, max_rows)
    columns = []
    for k in range(2):
        count, square, left, l0, norm = cells[:, k].T
        mean = means.at(k)
        spread = square - 2 * (totals[:, k] @ mean).numpy() + count * float(mean @ mean)
        left_over = prompt_ratio(left, np.where(spread > 1e-12 * square, spread, 0.0), by_text)
        fvu = _Cell(float(left_over.value), float(left_over.low), float(left_over.high), len(tokens))
        pair_cells = _of_rewards(rewards[:, [0, 1 + 2 * k, 2 + 2 * k]], rm.noise_floor, prompts, by_text)
        dead = _Cell(float((~used[k]).mean()), np.nan, np.nan, int(count.sum()))
        own = [fvu, _mean(l0, by_text, seed), dead, _mean(norm, by_text, seed)]
        columns.append([*own, *pair_cells])
    cube = np.array(columns).transpose(1, 0, 2)  # [measure, at, (value, low, high, n)]
    coords = {
        "measure": np.array(list(MEASURES), dtype=object),
        "at": np.array(PLACES, dtype=object),
        "measure_unit": ("measure", np.array(list(MEASURES.values()), dtype=object)),
        "n": (("measure", "at"), cube[..., 3].astype(int)),
    }
    value, low, high = (xr.DataArray(cube[..., i], dims=("measure", "at"), coords=coords) for i in range(3))
    meta = rm.describe(
        "sae_report", pairs, seed=seed, title=f"Dictionary at {where}", sae=described(sae, where),
        interval={"level": 0.95, "unit": "prompt"},
        settings={"n_relevant": n_relevant, "matched": f"cosine > {MATCHED}"},
        dead={at: {"latents": int((~used[k]).sum()), "of": sae.d_sae, "positions": int(cells[:, k, 0].sum())}
              for k, at in enumerate(PLACES)},
        stability=_stability(rm, sae, pairs, seeds, n_relevant, where, used[1]) if seeds else [],
        shows="How much of the states, the rewards and the margins the dictionary's reconstruction keeps.",
        cannot_show="That a latent means something, or what the dictionary keeps on other texts; a latent that is "
        "active on none of these texts may be on others.",
    )  # fmt: skip
    checks = [
        Check("decoder", decoder, 1e-2 if sae.W_dec.dtype.itemsize < 4 else 1e-4),
        Check("clean row", clean, 2e-2 if rm.sixteen_bit else 1e-4),
    ]
    return Result("sae_report", value, unit="by measure", low=low, high=high, meta=meta, checks=checks,
                  undefined=_UNDEFINED)  # fmt: skip


class _Cell(NamedTuple):
    value: float
    low: float
    high: float
    n: int


def _of_rewards(runs: Float[np.ndarray, "text 3"], floor: float, prompts: list[str], by_text: list[str]) -> list[_Cell]:
    """Measures of the clean rewards, those with the reconstruction and those with the mean state."""
    clean, spliced, mean = runs.T
    moved = np.abs(mean - clean).max() > floor  # else a sum of roundings would be divided by
    lost = prompt_ratio((spliced - clean) ** 2, (mean - clean) ** 2 * moved, by_text)
    recovered = _Cell(1 - float(lost.value), 1 - float(lost.high), 1 - float(lost.low), len(runs))
    margins = [r[::2] - r[1::2] for r in (clean, spliced)]
    signs = np.sign(margins[0]) * np.sign(margins[1])
    same = np.where(np.sign(margins[0]) == np.sign(margins[1]), 1.0, (signs + 1) / 2)
    right = [won(m) for m in margins]
    shares = [_cell(stats.proportion_interval(credit, prompts), len(credit)) for credit in (same, *right)]
    change = right[1] - right[0]
    return [recovered, *shares, _Cell(float(change.mean()), *ends_of_change(change, np.array(prompts)), len(change))]


def _mean(values: np.ndarray, prompts: list[str], seed: int) -> _Cell:
    return _cell(stats.mean_interval(values, prompts, seed=seed), len(values))


def _cell(over: stats.Interval, n: int) -> _Cell:
    return _Cell(float(over.mean), float(over.low), float(over.high), n)


def _decoder_gap(sae: SAE, x: Float[torch.Tensor, "pos d_model"]) -> float:
    """How far the dictionary's output is from the sum of its latents and bias, over the size of both."""
    given = x.to(sae.W_enc)
    z = encoded(sae, given).double()
    own = z @ sae.W_dec.double() + sae.b_dec.double()
    return float((sae(given).double() - own).norm() / (own.norm() + given.double().norm()).clamp_min(1e-30))


def _stability(
    rm: RewardModel, sae: SAE, pairs, seeds: Sequence[SAE], n_relevant: int, site: Site, used: np.ndarray
) -> list[dict[str, Any]]:
    """Of every other dictionary: how many of the latents that the margins rest on it has too."""
    split = latent_contributions(rm, sae, pairs, top=n_relevant, site=site).value.sel(side="margin")
    latents = split["index"].values[(split["kind"].values == "latent") & (split != 0).any("pair").values]
    out = []
    for other in seeds:
        closest = _closest(sae, other, latents)
        share = float((closest > MATCHED).mean()) if len(latents) else np.nan
        ends = stats.wilson(share * len(latents), len(latents)) if len(latents) else (np.nan, np.nan)
        everywhere = _closest(sae, other, np.flatnonzero(used))
        out.append({
            "matched": plain(share), "low": plain(ends[0]), "high": plain(ends[1]), "n": len(latents),
            "median_cosine": plain(np.median(closest)) if len(latents) else None,
            "matched_active": plain((everywhere > MATCHED).mean()) if len(everywhere) else None,
            "n_active": len(everywhere),
        })  # fmt: skip
    return out


def _closest(sae: SAE, other: SAE, latents: np.ndarray) -> np.ndarray:
    """[latent] the largest cosine of each latent's direction with one of the other dictionary."""
    theirs = torch.nn.functional.normalize(other.W_dec.float(), dim=1)
    out = []
    for start in range(0, len(latents), 1024):
        mine = torch.nn.functional.normalize(sae.W_dec[latents[start : start + 1024]].float(), dim=1)
        out.append((mine.to(theirs) @ theirs.T).max(1).values.cpu().numpy())
    return np.concatenate(out) if out else np.empty(0)
