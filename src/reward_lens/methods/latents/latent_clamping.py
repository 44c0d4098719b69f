"""What the reward becomes when a latent is held at a value.

    x_p -> x_p + (value - z_pj) d_j      at every read position p, the error term kept; everything after it recomputed

Exact: no slope and no frozen part. The value is in the latent's own unit, that of its activations; `activation` says
what the texts themselves reach.

What this cannot show: whether the network ever reaches such a state by itself. A value far above the activations seen
pushes the residual stream where it never is.

Reference: Templeton et al. 2024, transformer-circuits (clamping of dictionary features).
"""

from collections.abc import Iterable

import numpy as np
import torch

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_effects import changes, set_to
from reward_lens.methods.latents.latent_states import At, described, read_latents, require_latents, site_of
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE


@checked_arguments
@torch.no_grad()
def clamp_latent(
    rm: RewardModel,
    sae: SAE,
    pairs,
    latent: int,
    value,
    at: At = "response",
    site: Site | str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Exact change of the rewards when one latent is set to a value, or to each of several.

    Parameters
    ----------
    latent: its index in the dictionary. value: a number, or several different ones; 0 removes the latent.
    at: where it is set: "response" (its first token through the reward position) or "final" (the reward position).
    site: where the dictionary is read, if it does not say so itself. max_rows: changed runs walking at once.

    Returns value (pair, side, clamp), r(set) - r in reward units; mean and interval over prompts. Coordinate
    `activation` (pair, side): the largest one at the read positions of the run itself. Check "clean row".
    Raises `DataError` for a latent the dictionary does not have, and for values that are not finite.
    """
    pairs, where = data.as_pairs(pairs), site_of(rm, sae, site, at)
    (wanted,) = require_latents(sae, [latent])
    try:
        several = isinstance(value, Iterable) and getattr(value, "ndim", 1)  # an array of no dim is one number
        values = np.array(list(value) if several else [value], dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or len(set(values.tolist())) < len(values):
        raise DataError(
            "The values to hold a latent at were not understood",
            found=repr(value),
            expected="a finite number, or different ones",
            do="pass value=0.0 to remove the latent",
        )
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    found, largest, gaps = np.empty((len(tokens), len(values))), np.empty(len(tokens)), []
    for i, text in enumerate(read_latents(rm, sae, tokens, where, at)):
        edits = [set_to(sae, text, where, [wanted], float(v)) for v in values]
        found[i], _, gap = changes(rm, text, edits, max_rows)
        largest[i] = float(text.activations([wanted]).max())
        gaps.append(gap)
    reached = np.column_stack([largest.reshape(-1, 2), np.full(len(pairs), np.nan)])
    return paired_result(
        rm, "clamp_latent", pairs, margin_of(found[::2], found[1::2]), ("pair", "side", "clamp"),
        {"clamp": values, "activation": (("pair", "side"), reached)}, seed=seed,
        checks=[Check("clean row", max(gaps), 2e-2 if rm.sixteen_bit else 1e-4)],
        title=f"Latent {wanted} at {where} held at a value", noise_floor=rm.noise_floor, sae=described(sae, where),
        settings={"latent": wanted, "clamp": values.tolist(), "at": at},
        shows="How the reward changes when the latent has this activation at the read positions.",
        cannot_show="Whether the network reaches such a state by itself; compare the values with `activation`.",
    )  # fmt: skip
