"""Which latents the margins depend on, and which carry the shift that an edit of a text makes.

    reward_latents   effect_j = margin - margin(z_j set to 0 in both responses)
    probe_latents    effect_j = shift - shift(z_j given back the value it has without the edit, in the edited text)

Every number is a run in which the latent was changed at the read positions and all after it was recomputed; the error
term stays. Latents are screened by first order on one half of the prompts and run and tested on the other half
(`latent_screening`), each by a sign-flip test over prompts, adjusted over all that were tested.

What this cannot show: latents that the screening misses, or what the dictionary has not found (the error term, see
`sae_report`). Effects of single latents need not add up: `together` is the run in which all are changed at once. A
latent is a direction with a threshold; what it is about is read from its texts (`latent_contexts`).

Reference: Marks et al. 2024, arXiv 2403.19647 (indirect effects of latents).
"""

from typing import Any, Literal

import numpy as np
import torch

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_screening import Replace, Screened, flip_tests, screened_effects, with_margin
from reward_lens.methods.latents.latent_states import At, described, site_of
from reward_lens.methods.shared.paired import paired_result
from reward_lens.methods.shared.prompt_ratios import plain, prompt_ratio
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE

Adjust = Literal["holm", "bh"]


@checked_arguments
@torch.no_grad()
def reward_latents(
    rm: RewardModel,
    sae: SAE,
    pairs,
    top: int = 20,
    at: At = "final",
    adjust: Adjust = "holm",
    site: Site | str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """The latents whose ablation changes the margins most.

    Parameters
    ----------
    top: latents that are run and tested. adjust: "holm" or "bh", over these.
    at: where a latent is set to 0: "final" (the reward position) or "response" (through the reward position).
    site: where the dictionary is read, if it does not say so itself. seed: of the halves. max_rows: changed runs
        walking at once.

    Returns value (pair, side, latent), r - r(ablated) in reward units, of the pairs of the tested half, latents in
    order of the size of their mean effect on the margin; mean and interval over prompts. Coordinates (latent): `index`,
    `estimate` (mean first-order effect in the half that screened), `p` and `p_adjusted` (of the margin effect; NaN
    under 6 prompts), `frequency_chosen`, `frequency_rejected`. In `meta`: `together`, all of them ablated at once, with
    its interval; `prompts` of either half; `tests`, with the smallest p that so many can give. Check "clean row".
    Raises `DataError` for fewer than two prompts, and where no latent is active.
    """
    pairs, where = data.as_pairs(pairs), _read(rm, sae, site, at, adjust)
    found = screened_effects(rm, sae, pairs, where, at, "zero", top, seed, max_rows)
    return _result(
        rm, "reward_latents", sae, found, where, adjust, seed, {}, {},
        {"top": top, "at": at, "adjust": adjust, "n_pairs_given": len(pairs)},
        title=f"Latents at {where} by the effect of their ablation on margins",
        shows="How much of the margins goes with each latent, by runs without it on prompts that had no part in "
        "choosing it.",
        cannot_show="Latents that the first-order screening misses, and what is in the dictionary's error term.",
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def probe_latents(
    rm: RewardModel,
    sae: SAE,
    edited,
    top: int = 20,
    replace: Literal["original", "zero"] = "original",
    at: At = "final",
    adjust: Adjust = "holm",
    site: Site | str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """The latents that carry the shift an edit makes in the reward.

    Parameters
    ----------
    edited: `edited_pairs(pairs, edit)`: the edited response as chosen, the original one as rejected.
    replace: what a latent is set to: "original", in the edited text the value it has without the edit (at="final" only:
        other positions of the two texts do not correspond); "zero", 0 in both texts.
    The others as in `reward_latents`.

    Returns value (pair, side, latent) in reward units, as `reward_latents`; of side "margin" it is the part of the
    shift that goes with the latent. Besides its coordinates: `share` (latent), the sum of that part over the sum of the
    shifts, with `share_low`, `share_high` (Fieller; infinite where the mean shift may be zero), and `shift` (pair).
    In `meta` besides: `shift` and `together` with intervals and `together_share`.
    Raises `DataError` as `reward_latents`, and for replace="original" at other positions than "final".
    """
    edited, where = data.as_pairs(edited), _read(rm, sae, site, at, adjust)
    if replace not in ("original", "zero") or (replace == "original" and at != "final"):
        raise DataError(
            "What the latents are to be set to was not understood",
            found=f"replace={replace!r}, at={at!r}",
            expected="'original' with at='final', where the positions of both texts correspond, or 'zero'",
            do="use replace='zero' to ask about all positions of the response",
        )
    way: Replace = "other" if replace == "original" else "zero"
    found = screened_effects(rm, sae, edited, where, at, way, top, seed, max_rows)
    prompts = [p.prompt_key for p in found.tested]
    shift = found.rewards[:, 0] - found.rewards[:, 1]
    parts = found.effects[:, 0] - found.effects[:, 1]
    share = prompt_ratio(parts, shift, prompts)
    joint = prompt_ratio(found.together[:, 0] - found.together[:, 1], shift, prompts)
    by_latent = {"share": share.value, "share_low": share.low, "share_high": share.high}
    words = {"shift": _over(shift, prompts, seed), "together_share": {
        key: plain(getattr(joint, key)) for key in ("value", "low", "high")}}  # fmt: skip
    return _result(
        rm, "probe_latents", sae, found, where, adjust, seed, by_latent, words,
        {"top": top, "at": at, "adjust": adjust, "replace": replace, "edit": edited[0].subset,
         "n_pairs_given": len(edited)},
        {"shift": ("pair", shift)},
        title=f"Latents at {where} that carry the shift of an edit",
        shows="How much of the shift that the edit makes goes with each latent.",
        cannot_show="Latents that the first-order screening misses, and what is in the dictionary's error term. A "
        "latent that carries the shift need not be about the edited property alone.",
    )  # fmt: skip


def _read(rm: RewardModel, sae: SAE, site: Site | str | None, at: str, adjust: str) -> Site:
    if adjust not in ("holm", "bh"):
        raise DataError("The adjustment was not understood", found=repr(adjust), expected="'holm' or 'bh'",
                        do="pass either")  # fmt: skip
    return site_of(rm, sae, site, at)


def _over(values: np.ndarray, prompts: list[str], seed: int) -> dict[str, Any]:
    over = stats.mean_interval(values, prompts, seed=seed)
    return {key: plain(getattr(over, key)) for key in ("mean", "low", "high")}


def _result(
    rm: RewardModel, name: str, sae: SAE, found: Screened, where: Site, adjust: Adjust, seed: int,
    by_latent: dict[str, np.ndarray], words: dict[str, Any], settings: dict[str, Any],
    more: dict[str, Any] | None = None, **said: Any,
) -> Result:  # fmt: skip
    prompts = [p.prompt_key for p in found.tested]
    effects = with_margin(found.effects)
    p, adjusted, tests = flip_tests(effects[:, 2], prompts, adjust, seed)
    order = np.argsort(-np.abs(effects[:, 2].mean(0)), kind="stable")
    cells = {
        "index": np.array(found.latents), "estimate": found.estimate, "p": p, "p_adjusted": adjusted,
        "frequency_chosen": found.active[:, 0].mean(0), "frequency_rejected": found.active[:, 1].mean(0), **by_latent,
    }  # fmt: skip
    coords = {"latent": np.array([f"F{found.latents[i]}" for i in order], dtype=object), **(more or {})}
    coords |= {key: ("latent", values[order]) for key, values in cells.items()}
    together = with_margin(found.together)[:, 2]
    return paired_result(
        rm, name, found.tested, effects[..., order], ("pair", "side", "latent"), coords, seed=seed,
        checks=[Check("clean row", found.gap, 2e-2 if rm.sixteen_bit else 1e-4)], sae=described(sae, where),
        settings=settings, noise_floor=rm.noise_floor, together=_over(together, prompts, seed), tests=tests,
        prompts={"screened": found.n_screened, "tested": len(set(prompts))}, **words, **said,
    )  # fmt: skip
