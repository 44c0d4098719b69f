"""Responses with parts cut off, deleted or hidden from attention, scored again.

The tokens are cut, not the text, so that what stays is the same tokens at the model's input. Prompt and
template tail are kept. Every list of variants opens with the reference and ends with the whole text. Where the model
reuses a prefix, a variant is run from the first position on that differs from the whole text's run; where it does not,
or the change reaches the position at which a prompt-gated head reads, from its beginning.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reward_lens.engine.continuations import rewards_of_variants
from reward_lens.engine.gate_states import pooled_and_gate
from reward_lens.engine.places import gate_inside, reaches_gate
from reward_lens.errors import DataError
from reward_lens.methods.shared.units import Unit
from reward_lens.model.prefix import NO_PREFIX
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens, common_prefix

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
def rewards(rm: RewardModel, groups: Sequence[Sequence[Variant]]) -> tuple[list[np.ndarray], int]:
    """Rewards of each text's variants and how many rows they took (equal ones are scored once).

    NaN where a position is hidden at which the head reads, for the reward or for a prompt gate: its own token would
    still be seen there.
    """
    read: dict[tuple, float] = {}
    known, n_rows, before = NO_PREFIX, 0, groups[0][-1][0]
    for group in groups:
        whole = group[-1][0]
        distinct = list({_key(one): one for one in group if _key(one) not in read}.values())
        if not distinct:
            continue
        texts, hidden = [text for text, _ in distinct], [positions for _, positions in distinct]
        if rm.reuses_prefix(whole, *texts) and not any(_moves_gate(rm, one) for one in distinct):
            known = known.first(common_prefix(before, whole))
            values, known = rewards_of_variants(rm, whole, texts, hidden, known)
            before = whole
            n_rows += 1  # for the keys and values
        else:
            values = _whole(rm, distinct)
        n_rows += len(distinct)
        for one, value in zip(distinct, values.double().tolist(), strict=True):
            read[_key(one)] = np.nan if _hides_what_is_read(rm, one) else value
    return [np.array([read[_key(one)] for one in group]) for group in groups], n_rows


def _key(variant: Variant) -> tuple:
    return variant[0].ids, variant[1]


def _hides_what_is_read(rm: RewardModel, variant: Variant) -> bool:
    text, hidden = variant
    return text.reward_pos in hidden or gate_inside(rm, text, 0) in hidden


def _moves_gate(rm: RewardModel, variant: Variant) -> bool:
    text, hidden = variant
    return len(hidden) > 0 and reaches_gate(rm, text, hidden)


def _whole(rm: RewardModel, variants: Sequence[Variant]) -> Tensor:
    """Rewards of variants, each run from its beginning."""
    texts = [text for text, _ in variants]
    out = torch.empty(len(texts), dtype=rm.like.dtype)
    moves_gate = [_moves_gate(rm, one) for one in variants]
    gates = rm.readout_inputs(texts)
    for batch in rm.batches(texts):
        mask = batch.mask.clone()
        for row, (run, first) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True)):
            hidden = variants[run][1]
            mask[row, first + hidden.start : first + hidden.stop] = 0
        # The position ids are those of the whole text: only attention is blocked.
        pooled, inputs = pooled_and_gate(rm, dataclasses.replace(batch, mask=mask), texts, gates, moves_gate)
        out[list(batch.rows)] = rm.readout.reward(pooled, inputs).cpu()
    return out
