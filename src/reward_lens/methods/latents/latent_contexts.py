"""Where in the texts a latent is active: its density, and the tokens at which it is largest, with those around them.

    density_j     mean over texts of the share of read positions with z_pj > 0
    histogram_j   number of read positions with z_pj in (i w, (i + 1) w], w the least power of two that needs 32 bins
    context       of each text the position of its largest activation; the `top` texts by that activation

One context a text, so that a single text does not fill the list. Texts with the same tokens count once.

What this cannot show: what the latent means. The largest activations are its tail; at its usual ones it may be about
something else, and what it does to the reward is another question (`reward_latents`, `clamp_latent`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_states import described, read_latents, require_latents, site_of
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Result
from reward_lens.sae.dictionary import SAE

BINS = 32
_EMPTY = "outside the response, or the latent is active in fewer texts than contexts asked for"


@checked_arguments
@torch.no_grad()
def latent_contexts(
    rm: RewardModel,
    sae: SAE,
    pairs,
    latents: Sequence[int],
    top: int = 10,
    around: int = 8,
    site: Site | str | None = None,
    seed: int = 0,
) -> Result:
    """Tokens at which latents are largest, in the responses of some pairs.

    Parameters
    ----------
    latents: indices in the dictionary, in the order of the rows. top: contexts of each. around: tokens on either side.
    site: where the dictionary is read, if it does not say so itself.

    Returns value (latent, context, offset), the activation at the token `offset` from the largest one (offset 0); NaN
    outside the response (through the reward position), and for contexts that are not there. Coordinates: `piece`
    (latent, context, offset), the token's text, prompt and template included; (latent, context): `text` (the pair's id
    and side, "" where there is none) and `token` (position in the text); (latent): `index`, `density` with
    `density_low`, `density_high`, `frequency` (share of texts with any activation), `largest`. In `meta`: `n_texts`,
    `n_tokens` (read positions), and `histogram`: for every latent that is active the `width` of the bins and `counts`,
    the positions in each; a 0 is in none.
    Raises `DataError` for latents that the dictionary does not have.
    """
    pairs, where = data.as_pairs(pairs), site_of(rm, sae, site, "response")
    wanted = require_latents(sae, latents)
    if top < 1 or around < 0:
        raise DataError("The contexts were not understood", found=f"top={top}, around={around}",
                        expected="top of 1 or more, around of 0 or more", do="leave them out for 10 and 8")  # fmt: skip
    names, prompts, tokens = _different(rm, pairs)
    best: list[list[tuple[float, int, int, np.ndarray]]] = [[] for _ in wanted]
    density, frequency = np.empty((len(tokens), len(wanted))), np.empty((len(tokens), len(wanted)))
    histograms = [_Histogram() for _ in wanted]
    n_tokens = 0
    for i, text in enumerate(read_latents(rm, sae, tokens, where, "response")):
        z = text.activations(wanted).numpy()
        density[i], frequency[i] = (z > 0).mean(0), (z > 0).any(0)
        n_tokens += len(z)
        for k in np.flatnonzero(z.any(0)):
            histograms[k].add(z[:, k])
            at = int(z[:, k].argmax())
            strip = np.full(2 * around + 1, np.nan)
            some = z[max(0, at - around) : at + around + 1, k]
            first = around - min(at, around)
            strip[first : first + len(some)] = some
            best[k] = sorted([*best[k], (float(z[at, k]), i, text.positions[at], strip)], key=lambda c: (-c[0], c[1]))[
                :top
            ]
    shape = (len(wanted), top, 2 * around + 1)
    values, pieces = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    texts, places = np.full(shape[:2], "", dtype=object), np.full(shape[:2], -1)
    for k, contexts in enumerate(best):
        for c, (_, i, position, strip) in enumerate(contexts):
            values[k, c], texts[k, c], places[k, c] = strip, names[i], position
            for o in range(max(0, around - position), min(2 * around + 1, len(tokens[i]) - position + around)):
                pieces[k, c, o] = tokens[i].pieces[position - around + o]
    over = stats.mean_interval(density, prompts, seed=seed, limits=(0.0, 1.0))
    coords = {
        "latent": np.array([f"F{j}" for j in wanted], dtype=object),
        "context": np.arange(1, top + 1),
        "offset": np.arange(-around, around + 1),
        "piece": (("latent", "context", "offset"), pieces),
        "text": (("latent", "context"), texts),
        "token": (("latent", "context"), places),
        "index": ("latent", np.array(wanted)),
        "density": ("latent", np.asarray(over.mean)),
        "density_low": ("latent", np.asarray(over.low)),
        "density_high": ("latent", np.asarray(over.high)),
        "frequency": ("latent", frequency.mean(0)),
        "largest": ("latent", np.array([b[0][0] if b else 0.0 for b in best])),
    }
    meta = rm.describe(
        "latent_contexts", pairs, seed=seed, title=f"Contexts of latents at {where}", sae=described(sae, where),
        settings={"latents": wanted, "top": top, "around": around}, n_texts=len(tokens), n_tokens=n_tokens,
        interval={"level": 0.95, "unit": "prompt", "method": over.method},
        histogram={f"F{j}": h.described() for j, h in zip(wanted, histograms, strict=True) if h.counts.any()},
        shows="The tokens at which each latent is largest, and how often it is active.",
        cannot_show="What a latent means at its usual activations, or what it does to the reward.",
    )  # fmt: skip
    value = xr.DataArray(values, dims=("latent", "context", "offset"), coords=coords)
    return Result("latent_contexts", value, unit="activation", meta=meta, undefined=_EMPTY)


class _Histogram:
    """Counts of positive values in equal bins from 0 on, whose width grows with the largest value.

    Widths are powers of two, so two bins become one without a value changing sides, and the order of the texts does not
    matter.
    """

    def __init__(self):
        self.exponent, self.counts = -1074, np.zeros(BINS, dtype=int)  # the least exponent that a double has

    def add(self, values: np.ndarray) -> None:
        values = values[values > 0]
        mantissa, exponent = np.frexp(values.max() / BINS)
        needed = max(int(exponent) - int(mantissa == 0.5), self.exponent)
        for _ in range(min(needed - self.exponent, BINS)):  # then all is in the first bin
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, dtype=int)])
        self.exponent = needed
        places = np.ceil(np.ldexp(values, -needed)).astype(int) - 1
        self.counts += np.bincount(places, minlength=BINS)

    def described(self) -> dict[str, Any]:
        used = np.flatnonzero(self.counts)[-1] + 1
        return {"width": float(np.ldexp(1.0, self.exponent)), "counts": self.counts[:used].tolist()}


def _different(rm: RewardModel, pairs: data.Pairs) -> tuple[list[str], list[str], list[Tokens]]:
    """Names, prompts and tokens of the different responses."""
    found = {}
    for pair, both in zip(pairs, rm.tokenize_pairs(pairs), strict=True):
        for side, text in zip(("chosen", "rejected"), both, strict=True):
            found.setdefault(text.ids, (f"{pair.id} {side}", pair.prompt_key, text))
    names, prompts, tokens = zip(*found.values(), strict=True)
    return list(names), list(prompts), list(tokens)
