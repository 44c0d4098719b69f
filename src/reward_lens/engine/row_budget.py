"""How many rows walk down the layers at once: bounded by tokens, as in plain scoring, and by a share of free memory."""

import torch

from reward_lens.errors import DataError
from reward_lens.model.forward import TOKENS_PER_BATCH
from reward_lens.model.reward_model import RewardModel

FREE_SHARE = 0.25  # of the free memory that the rows of one walk may take
SEEN_PER_BATCH = 16 * TOKENS_PER_BATCH
"""Positions attended to by the rows of one walk together: their keys and values are laid out once a row."""

CACHED_TOKENS, CACHED_ROWS = 1024, 16
"""Positions of a walk on a CPU, whose caches hold no more, and the rows that one clean row is spread over at least."""
GRADIENT_TOKENS = 1024
"""Positions of a walk with gradients: every block's activations are kept."""


def row_budget(rm: RewardModel, length: int, seen: int, asked: int | None = None) -> int:
    """Rows of `length` positions, each attending to `seen`, that walk at once: those asked for, or as many as a bound
    on tokens, as in plain scoring, and a share of the free memory allow."""
    if asked is not None:
        if asked < 1:
            raise DataError("No rows were to walk at once", found=f"max_rows={asked}", expected="1 or more, or None",
                            do="leave max_rows away: what fits is measured")  # fmt: skip
        return asked
    config = rm.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * rm.d_model
    floats = length * (6 * rm.d_model + 3 * wide) + 4 * seen * rm.d_model + length * seen * rm.n_heads
    by_memory = int(FREE_SHARE * _free_bytes(rm.device) / (4 * floats))
    by_tokens = TOKENS_PER_BATCH // length
    if rm.device.type == "cpu":
        by_tokens = min(by_tokens, max(CACHED_TOKENS // length, CACHED_ROWS))
    return max(1, min(by_tokens, SEEN_PER_BATCH // seen, by_memory))


def gradient_budget(rm: RewardModel, length: int, seen: int, asked: int | None = None) -> int:
    """The same for rows with gradients."""
    if asked is not None:
        return row_budget(rm, length, seen, asked)
    return max(1, min(GRADIENT_TOKENS // length, SEEN_PER_BATCH // (4 * seen)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
