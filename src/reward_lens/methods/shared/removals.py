"""Responses with parts cut off, deleted or hidden from attention, scored again.

The tokens are cut, not the text, so that what stays is the same tokens at the model's input. Prompt and
template tail are kept. Every list of variants opens with the reference and ends with the whole text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from reward_lens.engine.gate_states import pooled_and_gate
from reward_lens.engine.places import reaches_gate
from reward_lens.errors import DataError
from reward_lens.methods.shared.units import Unit
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens

Variant = tuple[Tokens, range]
"""A text, and positions of it that no one may attend to."""


def truncated(rm: RewardModel, text: Tokens, units: list[Unit]) -> list[Variant]:
    """The response cut before its first unit, after each unit."""
    first = text.response.start
    ends = [first, *(unit.positions.stop for unit in units)]
    return [(_keep(rm, text, range(first, end)), range(0)) for end in ends]


def deleted(rm: RewardModel, text: Tokens, units: list[Unit]) -> list[Variant]:
    """The empty response, the response without each unit, the whole."""
    kept = [[], *([i for i in text.response if i not in unit.positions] for unit in units), text.response]
    return [(_keep(rm, text, positions), range(0)) for positions in kept]


def masked(rm: RewardModel, text: Tokens, units: list[Unit]) -> list[Variant]:
    """The whole response hidden, each unit hidden, nothing hidden."""
    return [(text, text.response), *((text, unit.positions) for unit in units), (text, range(0))]


def _keep(rm: RewardModel, text: Tokens, kept: Sequence[int]) -> Tokens:
    """The text with these tokens of its response, and its prompt and tail as they are."""
    order = [*text.prompt, *kept, *text.tail]
    if not order:
        raise DataError(
            "A response cannot be removed from a conversation that has nothing else",
            found="no token in the prompt and none in the template's tail",
            expected="at least one token for the reward head to read",
            do="use method='prefix', 'gradient' or 'integrated', or give the conversation a prompt",
        )
    ids = [text.ids[i] for i in order]
    first, end = len(text.prompt), len(text.prompt) + len(kept)
    return dataclasses.replace(
        text, ids=tuple(ids),
        pieces=tuple(text.pieces[i] for i in order), starts=tuple(text.starts[i] for i in order),
        prompt=range(first), response=range(first, end), tail=range(end, len(ids)),
        reward_pos=rm.tokenizer.reward_position(ids),
    )  # fmt: skip


@torch.no_grad()
def rewards(rm: RewardModel, variants: Sequence[Variant]) -> tuple[np.ndarray, int]:
    """Rewards of the variants and how many rows they took (equal ones are scored once).

    NaN where the position at which the reward is read is hidden: its own token would still be seen there.
    """
    index = {(text.ids, hidden): i for i, (text, hidden) in enumerate(variants)}
    distinct = [variants[i] for i in index.values()]
    read = np.full(len(distinct), np.nan)
    texts = [text for text, _ in distinct]
    moves_gate = [len(hidden) > 0 and reaches_gate(rm, text, hidden) for text, hidden in distinct]
    gates = rm.readout_inputs(texts)
    for batch in rm.batches(texts):
        mask = batch.mask.clone()
        for row, (run, first) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True)):
            hidden = distinct[run][1]
            mask[row, first + hidden.start : first + hidden.stop] = 0
        # The position ids are those of the whole text: only attention is blocked.
        pooled, inputs = pooled_and_gate(rm, dataclasses.replace(batch, mask=mask), texts, gates, moves_gate)
        read[list(batch.rows)] = rm.readout.reward(pooled, inputs).double().cpu().numpy()
    for i, (text, hidden) in enumerate(distinct):
        if text.reward_pos in hidden:
            read[i] = np.nan
    order = {key: i for i, key in enumerate(index)}
    return read[[order[text.ids, hidden] for text, hidden in variants]], len(distinct)
