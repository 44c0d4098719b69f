"""Rewards with a dictionary's reconstruction in the place of what stands at its site.

    x_p -> SAE(x_p)      at the positions: the reward position ("final"), or the response through it ("response")
    x_p -> mean          at the same positions: the mean over these texts' states there, what no dictionary at all gives

The dictionary is applied to the run's own states, so a perfect one changes nothing. Everything after is recomputed.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import positions_of
from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.intervention import constant
from reward_lens.engine.patching import patch_rows
from reward_lens.methods.latents.latent_states import TextLatents, described, read_latents, reconstructed, site_of
from reward_lens.methods.shared.paired import margin_of, paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE

PLACES: tuple[Literal["final"], Literal["response"]] = ("final", "response")
RUNS = ("clean", "sae, final", "mean, final", "sae, response", "mean, response")


@checked_arguments
@torch.no_grad()
def spliced_rewards(
    rm: RewardModel, sae: SAE, pairs, site: Site | str | None = None, seed: int = 0, max_rows: int | None = None
) -> Result:
    """Rewards and margins as they are, with the reconstruction and with the mean spliced in.

    `site`: where the dictionary is read, if it does not say so itself. `max_rows`: changed runs walking at once.

    Returns value (pair, side, run) in reward units; run = "clean", "sae, final", "mean, final", "sae, response", "mean,
    response". Mean and interval over prompts. Check "clean row". Cannot show which latents matter (`reward_latents`).
    Raises `DataError` for a dictionary of another width or site.
    """
    pairs, where = data.as_pairs(pairs), site_of(rm, sae, site, "response")
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    means = Means(rm.d_model)
    for places in read_places(rm, sae, tokens, where):
        means.take(*places)
    rewards, gap = splice(rm, sae, tokens, where, means, max_rows)
    return paired_result(
        rm, "spliced_rewards", pairs, margin_of(rewards[::2], rewards[1::2]), ("pair", "side", "run"),
        {"run": np.array(RUNS, dtype=object)}, seed=seed, sae=described(sae, where), noise_floor=rm.noise_floor,
        checks=[Check("clean row", gap, 2e-2 if rm.sixteen_bit else 1e-4)],
        settings={"site": str(where), "mean_of": data.inputs_hash(pairs)},
        title=f"Rewards with the reconstruction at {where}",
        shows="What the reward is when the network goes on from the dictionary's reconstruction.",
        cannot_show="Which latents matter, or whether errors of opposite sign cancel at later positions.",
    )  # fmt: skip


def read_places(
    rm: RewardModel, sae: SAE, tokens: list[Tokens], site: Site
) -> Iterator[tuple[TextLatents, TextLatents]]:
    """Every text at the reward position, which in an encoder is not in the response, and over the response."""
    return zip(*(read_latents(rm, sae, tokens, site, at) for at in PLACES), strict=True)


class Means:
    """Mean state over all texts, at the reward position and over the response."""

    def __init__(self, d_model: int):
        self.sums = torch.zeros(2, d_model, dtype=torch.float64)
        self.counts = [0, 0]

    def take(self, final: TextLatents, response: TextLatents) -> None:
        """One more text."""
        self.sums += torch.stack([final.x[0], response.x.sum(0)])
        self.counts = [self.counts[0] + 1, self.counts[1] + len(response.x)]

    def at(self, place: int) -> Float[Tensor, " d_model"]:
        """0: at the reward position; 1: over the response."""
        return self.sums[place] / self.counts[place]


def splice(
    rm: RewardModel, sae: SAE, tokens: list[Tokens], site: Site, means: Means, max_rows: int | None
) -> tuple[Float[np.ndarray, "text run"], float]:
    """Rewards by run, the clean one being the row that walked beside the others, and the clean rows' largest gap."""
    whole = Source("sae", lambda x, site, run, positions: reconstructed(sae, x))
    out, gaps = np.empty((len(tokens), len(RUNS))), []
    for i, text in enumerate(tokens):
        rows = [(Edit(site, positions_of(text, at), source),)
                for k, at in enumerate(PLACES) for source in (whole, constant(means.at(k)))]  # fmt: skip
        found = patch_rows(rm, text, rows, max_rows=max_rows)
        out[i] = [float(found.clean[0]), *found.rewards.tolist()]
        gaps.append(found.clean_gap)
    return out, max(gaps)
