"""Which tokens a latent's activation at the reward position comes from.

    value_t = z_j - z_j(what enters block 0 at position t is replaced by the mean over this response)

One exact run a token: everything between the token and the dictionary's site is recomputed. Positive means that the
token raises the activation.

What this cannot show: what tokens do together (two that say the same each seem to matter little), or which of a word's
tokens carries it. The mean of embeddings is no token the network was trained on.

Reference: Zeiler and Fergus 2014, arXiv 1311.2901 (occlusion), with a latent in the place of a class score.
"""

import numpy as np
import torch

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import capture, positions_of
from reward_lens.engine.editing import Edit, depth_of
from reward_lens.engine.intervention import constant
from reward_lens.engine.patching import patch_rows
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_states import described, encoded, require_latents, site_of
from reward_lens.methods.observation.lens import token_coords
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import common_prefix
from reward_lens.result import Check, Result
from reward_lens.sae.dictionary import SAE

EMBED = Site("embed")
_UNDEFINED = (
    "only tokens of the response, through the reward position, are replaced; margins of positions have no value"
)


@checked_arguments
@torch.no_grad()
def latent_tokens(
    rm: RewardModel, sae: SAE, pairs, latent: int, site: Site | str | None = None, max_rows: int | None = None
) -> Result:
    """What each token of the responses gives to one latent at the reward position.

    `latent`: its index in the dictionary, which reads a residual stream (`site`, if it does not say so itself).
    `max_rows`: changed runs walking at once. Costs one changed run a token.

    Returns value (pair, side, position), in the latent's own unit; NaN before the response and for the side "margin",
    since positions of two responses do not correspond. Coordinates `token`, `piece`, `role`, and `activation`
    (pair, side), z_j of the run itself. Check "clean row" (of the reward).
    Raises `DataError` for a latent that the dictionary does not have and for a dictionary of a write.
    """
    pairs, where = data.as_pairs(pairs), site_of(rm, sae, site, "final")
    (wanted,) = require_latents(sae, [latent])
    if where.kind not in ("embed", "resid_pre", "resid_post"):
        raise DataError("The tokens behind a latent are read from residual streams", found=f"the site {where}",
                        expected="embed, resid_pre or resid_post", do="use a dictionary of one of these")  # fmt: skip
    depth = depth_of(where)
    both = rm.tokenize_pairs(pairs)
    tokens = [t for pair in both for t in pair]
    values = np.full((len(tokens), max(len(t) for t in tokens)), np.nan)
    activation, gaps = np.empty(len(tokens)), []
    for i, text in enumerate(tokens):
        positions = positions_of(text, "response")
        mean = capture(rm, [text], [EMBED], "response")[EMBED][0].mean(0)
        rows = [(Edit(EMBED, range(p, p + 1), constant(mean)),) for p in positions]
        found = patch_rows(rm, text, rows, [depth], max_rows=max_rows)
        states = torch.cat([found.clean_states[depth][None], found.states[depth]])
        z = encoded(sae, states)[:, wanted].double().cpu().numpy()
        values[i, positions.start : positions.stop] = z[0] - z[1:]
        activation[i] = z[0]
        gaps.append(found.clean_gap)
    shape = (len(pairs), 2, -1)
    sided = np.concatenate([values.reshape(shape), np.full((len(pairs), 1, values.shape[1]), np.nan)], 1)
    own = np.column_stack([activation.reshape(-1, 2), np.full(len(pairs), np.nan)])
    coords = token_coords(tokens, [common_prefix(*pair) for pair in both]) | {"activation": (("pair", "side"), own)}
    return paired_result(
        rm, "latent_tokens", pairs, sided, ("pair", "side", "position"), coords, unit="activation", interval=False,
        checks=[Check("clean row", max(gaps), 2e-2 if rm.sixteen_bit else 1e-4)], undefined=_UNDEFINED,
        title=f"Tokens behind latent {wanted} at {where}", sae=described(sae, where), settings={"latent": wanted},
        shows="Which tokens of a response a latent's activation at the reward position comes from.",
        cannot_show="What tokens do together; each is replaced by itself.",
    )  # fmt: skip
