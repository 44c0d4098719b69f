"""Residual states of concept texts at the two read positions, and their means by concept and topic."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.data.concepts import ConceptText
from reward_lens.engine.activations import capture, positions_of
from reward_lens.engine.gradients import gradients
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

POSITIONS = ("response", "reward")
STEERED_AT = {"response": "response", "reward": "final"}
_AT_ONCE = 32  # texts whose states at all response positions are held together


@dataclasses.dataclass(frozen=True)
class TextStates:
    """States of some texts, in their order."""

    states: Float[np.ndarray, "text pos d_model"]
    """Mean over the response's tokens; at the reward position."""
    norms: Float[np.ndarray, "text pos"]
    """Mean norm over the same positions."""
    rewards: Float[np.ndarray, " text"]


def site_at(rm: RewardModel, depth: int) -> Site:
    """The residual entering block `depth`; at n_layers what the final norm reads."""
    return Site("resid_post", rm.n_layers - 1) if depth == rm.n_layers else Site("resid_pre", depth)


def text_states(rm: RewardModel, texts: Sequence[ConceptText], depth: int) -> TextStates:
    """One forward a text; its reward is read off the same pass."""
    site, last = site_at(rm, depth), site_at(rm, rm.n_layers)
    states, norms, rewards = [], [], []
    for start in range(0, len(texts), _AT_ONCE):
        tokens = [rm.tokenize(t.messages, t.text) for t in texts[start : start + _AT_ONCE]]
        acts = capture(rm, tokens, list(dict.fromkeys([site, last])), "response")
        ends = torch.stack([h[-1] for h in acts[last]])
        rewards.append(rm.readout.reward(ends, rm.readout_inputs(tokens)).double().cpu().numpy())
        for text, h in zip(tokens, acts[site], strict=True):
            h = h.double().cpu().numpy()
            said, size = h[: len(text.response)], np.linalg.norm(h, axis=1)
            states.append([said.mean(0), h[-1]])
            norms.append([size[: len(text.response)].mean(), size[-1]])
    return TextStates(np.array(states), np.array(norms), np.concatenate(rewards))


def cell_means(
    values: np.ndarray, texts: Sequence[ConceptText], concepts: Sequence[str], topics: Sequence[str]
) -> np.ndarray:
    """[concept, topic, ...] means of `values` [text, ...]; NaN for a cell without a text."""
    row, column = ({name: i for i, name in enumerate(names)} for names in (concepts, topics))
    sums = np.zeros((len(concepts), len(topics), *values.shape[1:]))
    counts = np.zeros(sums.shape[:2])
    for value, text in zip(values, texts, strict=True):
        if text.concept in row and text.topic in column:
            cell = row[text.concept], column[text.topic]
            sums[cell] += value
            counts[cell] += 1
    counts = counts.reshape(*counts.shape, *[1] * (values.ndim - 1))
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def reward_direction(
    rm: RewardModel, tokens: Sequence[Tokens], depth: int, pos: str, norms: np.ndarray
) -> Float[Tensor, " d_model"]:
    """The slope of the mean reward of these texts in a vector added at strength 0, in units of `norms` [text].

    At depth n_layers the effective direction, the norm's scale frozen at each text (of a linear head the same direction
    at every input). Before it the gradient of the reward, summed over the positions that steering changes.
    """
    site = site_at(rm, depth)
    total = torch.zeros(rm.d_model, dtype=torch.float64)
    if depth == rm.n_layers:
        h = capture(rm, list(tokens), [site])[site]
        u = rm.readout.direction(h, rm.readout_inputs(tokens)).u
        return (u.double().cpu() * torch.as_tensor(norms)[:, None]).mean(0)
    for text, norm in zip(tokens, norms.tolist(), strict=True):
        slopes = gradients(rm, text, [site]).slopes[site][list(positions_of(text, STEERED_AT[pos]))]
        total += norm * slopes.double().sum(0).cpu()
    return total / len(tokens)
