"""Rewards of preference pairs and of lists of responses as Results: what `score_pairs` and `score_many` give."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from reward_lens import data
from reward_lens.data.checks import malformed, shown
from reward_lens.errors import DataError, named
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel

Progress = Callable[[int, int], None]
SIDES = ("chosen", "rejected", "margin")


def pairs(rm: "RewardModel", pairs: Iterable["data.Pair"], batch_size: int | None, progress: Progress | None) -> Result:
    """Value (pair, side) of the rewards of both responses and their margin."""
    pairs = data.as_pairs(pairs)
    flat = [t for both in rm.tokenize_pairs(pairs) for t in both]
    rewards = rm.rewards(flat, batch_size, progress).double().numpy().reshape(-1, 2)
    values = np.column_stack([rewards, rewards[:, 0] - rewards[:, 1]])
    lengths = np.array([len(t.response) for t in flat]).reshape(-1, 2)
    coords = {
        **pair_coords(pairs),
        "side": np.array(SIDES, dtype=object),
        "chosen_tokens": ("pair", lengths[:, 0]),
        "rejected_tokens": ("pair", lengths[:, 1]),
    }
    value = xr.DataArray(values, dims=("pair", "side"), coords=coords)
    meta = rm.describe(
        "score_pairs", pairs, title="Rewards and margins",
        shows="The reward of each response and the margin between chosen and rejected.",
        cannot_show="Rewards of different prompts are not on a common scale: only margins within a prompt compare.",
    )  # fmt: skip
    return Result("score_pairs", value, unit="reward", checks=_cut(flat), meta=meta)


def groups(rm: "RewardModel", groups: Iterable, batch_size: int | None, progress: Progress | None) -> Result:
    """Value (group, response) of the rewards of every response of a prompt, padded with NaN."""
    groups = list(groups)
    if not groups:
        raise DataError("There are no groups to work on", found="an empty sequence",
                        expected="at least one rl.Group", do="pass groups, as load_groups gives them")  # fmt: skip
    for index, group in enumerate(groups):
        if not isinstance(group, data.Group):
            do = "build each as rl.Group(prompt, responses), or read a file with rl.load_groups"
            raise malformed(f"groups[{index}]", shown(group), "an rl.Group", do=do)
    tokens = [named(f"Group {g.id or i}", rm.tokenize, g.messages, r)
              for i, g in enumerate(groups, 1) for r in g.responses]  # fmt: skip
    rewards = iter(rm.rewards(tokens, batch_size, progress).tolist())
    width = max(len(g.responses) for g in groups)
    value = np.full((len(groups), width), np.nan)
    labels = np.full((len(groups), width), np.nan)
    for i, group in enumerate(groups):
        n = len(group.responses)
        value[i, :n] = [next(rewards) for _ in range(n)]
        labels[i, :n] = group.labels if group.labels is not None else [1.0] + [0.0] * (n - 1)
    array = xr.DataArray(
        value, dims=("group", "response"),
        coords={
            "group": np.array([g.id or str(i + 1) for i, g in enumerate(groups)], dtype=object),
            "response": np.arange(width),
            "label": (("group", "response"), labels),
            "prompt_id": ("group", np.array([g.prompt_key for g in groups], dtype=object)),
            "subset": ("group", np.array([g.subset or "" for g in groups], dtype=object)),
            "n_responses": ("group", np.array([len(g.responses) for g in groups])),
        },
    )  # fmt: skip
    meta = rm.describe("score_many", groups, title="Rewards of lists of responses",
                         shows="The reward of every response of a prompt.",
                         cannot_show="Rewards of different prompts are not on a common scale.")  # fmt: skip
    padding = sum(width - len(g.responses) for g in groups)
    # A reward that is no number has no reason, and the padding must not lend it one.
    padded = padding and int((~np.isfinite(value)).sum()) == padding
    reason = "groups have different numbers of responses" if padded else None
    return Result("score_many", array, unit="reward", checks=_cut(tokens), meta=meta, undefined=reason)


def pair_coords(pairs: "data.Pairs") -> dict[str, Any]:
    """Coordinates of the `pair` dim: id, prompt (the unit of statistics), subset, and a readable prompt."""
    texts = {
        "pair": [p.id for p in pairs],
        "prompt_id": [p.prompt_key for p in pairs],
        "subset": [p.subset or "" for p in pairs],
        "prompt": [p.prompt_text for p in pairs],
    }
    return {name: ("pair", np.array(values + [None], dtype=object)[:-1]) for name, values in texts.items()}


def _cut(tokens: Sequence[Tokens]) -> list[Check]:
    """How many texts were cut, where any was."""
    cut = [t.truncated for t in tokens if t.truncated]
    return [Check("texts cut", float(len(cut)), math.inf, f"by up to {max(cut)} tokens")] if cut else []
