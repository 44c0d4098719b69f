"""What a crosscoder needs of two models on the same texts, read off one model after the other.

x   states at the site and the read positions
g   what a change of x is worth: the effective direction u, the norm's scale frozen (direct, at the last site), or
    the gradient of the reward, nothing frozen
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from reward_lens import data
from reward_lens.engine.activations import capture, positions_of
from reward_lens.engine.store_identity import fingerprint
from reward_lens.errors import DataError
from reward_lens.methods.behaviour.edited_texts import within_prompt_sd
from reward_lens.methods.comparison.model_summary import each_model, named_models
from reward_lens.methods.latents.latent_effects import slope
from reward_lens.methods.latents.latent_states import TEXTS, At, is_last, require_at, settled_site
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.sae.crosscoder import Crosscoder

Estimator = Literal["direct", "gradient"]
DIFFERENCE = "difference"


@dataclasses.dataclass(frozen=True)
class Reading:
    """One model on the texts of some pairs, chosen and rejected in turn."""

    name: str
    about: dict[str, Any]
    site: Site
    estimator: Estimator
    sixteen_bit: bool
    tokens: list[Tokens]
    x: list[Tensor]
    """[pos, d_model] a text."""
    g: list[Tensor]
    constant: np.ndarray
    """[text] what of the reward does not depend on x; NaN for gradients, where it is what they leave."""
    reward: np.ndarray
    """[text]"""
    spread: float
    """SD of the rewards within prompts."""
    noise_floor: float
    """Differences of its rewards under this are numerical."""


def read_two(
    models, crosscoder: Crosscoder, pairs: data.Pairs, sites: Sequence[str | None], at: At, estimator: Estimator | None
) -> tuple[Reading, Reading]:
    """Readings in the crosscoder's order. Raises `DataError` for models, sites or tokens that do not go together."""
    require_at(at)
    sources = named_models(models)
    if len(sources) != 2 or crosscoder.n_models != 2 or DIFFERENCE in sources:
        raise DataError(
            "Two models and a crosscoder of these are compared",
            found=f"models {', '.join(sources)}; a crosscoder of {crosscoder.n_models}",
            expected=f"two models under other names than {DIFFERENCE!r}, in the crosscoder's order",
            do="pass {'first': ..., 'second': ...}",
        )
    order = {name: m for m, name in enumerate(sources)}
    settled = estimator

    def read(name: str, rm: RewardModel) -> Reading:
        nonlocal settled
        m = order[name]
        site = _site(rm, crosscoder, m, sites[m])
        exact = at == "final" and is_last(rm, site)
        settled = settled or ("direct" if exact else "gradient")
        if settled not in ("direct", "gradient") or (settled == "direct" and not exact):
            raise DataError(
                "The split over latents cannot be had",
                found=f"estimator={settled!r} at {site} of {name}, at={at!r}",
                expected="'gradient', or 'direct' where both sites are what the final norm reads and at='final'",
                do="pass estimator='gradient' for latents of other places",
            )
        return _read(name, rm, pairs, site, at, settled)

    first, second = each_model(sources, read)
    _require_same_tokens(first, second, pairs)
    return first, second


def _read(name: str, rm: RewardModel, pairs: data.Pairs, site: Site, at: At, estimator: Estimator) -> Reading:
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    x, g, constant, reward = [], [], [], []
    for start in range(0, len(tokens), TEXTS[at]):
        some = tokens[start : start + TEXTS[at]]
        held = capture(rm, some, [site], at)[site]
        x += [states.reshape(-1, rm.d_model).cpu() for states in held]
        if estimator == "direct":
            gates = rm.readout_inputs(some)
            direction = rm.readout.direction(held, gates)
            g += list(direction.u.cpu().split(1))
            constant += direction.constant.double().tolist()
            reward += rm.readout.reward(held, gates).double().tolist()
            continue
        for text in some:
            found, value = slope(rm, text, positions_of(text, at), site)
            g.append(found.float())
            constant.append(float("nan"))
            reward.append(value)
    about = rm.describe("crosscoder_latents") | {"site": str(site)}
    del about["method"]
    rewards = np.array(reward)
    spread = within_prompt_sd(rewards.reshape(-1, 2), [p.prompt_key for p in pairs], [list(p.responses) for p in pairs])
    return Reading(
        name, about, site, estimator, rm.sixteen_bit, tokens, x, g, np.array(constant), rewards, spread, rm.noise_floor
    )


def _site(rm: RewardModel, crosscoder: Crosscoder, m: int, site: str | None) -> Site:
    if crosscoder.widths[m] != rm.d_model:
        raise DataError(
            "The crosscoder is not of this model's width",
            found=f"{crosscoder.widths[m]} (the crosscoder's model {m + 1}), {rm.d_model} ({rm.name})",
            expected="equal widths",
            do="give the models in the order that the crosscoder was trained in",
        )
    trained_on = crosscoder.meta.get("trained_on")
    if trained_on and trained_on[m].get("fingerprint") != fingerprint(rm):
        raise DataError(
            "The crosscoder was trained on another model",
            found=f"{rm.name}, whose weights have the fingerprint {fingerprint(rm)}",
            expected=f"{trained_on[m].get('name')}, {trained_on[m].get('fingerprint')}, as model {m + 1}",
            do="give the models in the order that the crosscoder was trained in",
        )
    return settled_site(rm, crosscoder.sites[m], site)


def _require_same_tokens(first: Reading, second: Reading, pairs: data.Pairs) -> None:
    for i, (one, other) in enumerate(zip(first.tokens, second.tokens, strict=True)):
        if (one.ids, one.pieces, one.reward_pos) != (other.ids, other.pieces, other.reward_pos):
            raise DataError(
                "The two models do not read the same tokens",
                found=f"{len(one)} tokens of {first.name}, {len(other)} of {second.name} for a response of pair "
                f"{pairs[i // 2].id}, {sum(a != b for a, b in zip(one.ids, other.ids, strict=False))} ids different",
                expected="one tokenizer and chat template: a crosscoder's latents are of positions, and position p has "
                "to be the same place in the text for both",
                do="compare models that share a tokenizer; `compare` takes any two",
            )
