"""Does the reward prefer the right response, or the better dressed one?

An item has three chosen and three rejected responses to one prompt, each in three styles of growing
decoration: concise, detailed, detailed with markdown.

    matrix[i, j] = share of items with r(chosen in style i) > r(rejected in style j); a tie counts half

Hard is the mean over i < j (the wrong answer is dressed better), normal over i = j, easy over i > j. A reward
that follows style alone scores 0 on hard and 1 on easy; the drop from normal to hard is what style buys.

What this cannot show: that a drop is due to style rather than to length, which grows with it in every item.

Reference: Liu et al. 2024, RM-Bench, arXiv 2410.16184.
"""

from collections.abc import Iterable

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Result

STYLES = data.StyleItem.styles
DIFFICULTIES = {
    "hard": np.triu(np.ones((3, 3), dtype=bool), 1),
    "normal": np.eye(3, dtype=bool),
    "easy": np.tril(np.ones((3, 3), dtype=bool), -1),
    "overall": np.ones((3, 3), dtype=bool),
}


@checked_arguments
def style_matrix(rm: RewardModel, items: Iterable) -> Result:
    """How often the chosen response wins, for each of its three styles against each of the rejected one's.

    `items` are `rl.StyleItem`, as `rl.load_style_items` reads them from RM-Bench's files.

    Returns value (item, chosen_style, rejected_style): 1 where the chosen response has the higher reward, .5
    for a tie, 0 otherwise; `mean` is the matrix, with its interval over prompts, a fraction. Coordinates of
    `item`: its id, `prompt_id`, `subset`, `prompt`. Raises `DataError` for no items, or for anything but
    `StyleItem`.
    """
    items = list(items)
    wrong = [type(item).__name__ for item in items if not isinstance(item, data.StyleItem)]
    if wrong or not items:
        raise DataError(
            "A style matrix needs items with three chosen and three rejected responses",
            found=f"{len(wrong)} of {len(items)} items of another kind: {wrong[0]}" if wrong else "no items",
            expected="rl.StyleItem objects",
            do="read them with rl.load_style_items, or build rl.StyleItem(prompt, chosen, rejected)",
        )
    tokens = [rm.tokenize(item.messages, response) for item in items for response in item.responses]
    rewards = rm.rewards(tokens).double().numpy().reshape(-1, 2, 3)
    credit = (np.sign(rewards[:, 0, :, None] - rewards[:, 1, None, :]) + 1) / 2
    texts = {
        "item": [str(i + 1) if item.id is None else item.id for i, item in enumerate(items)],
        "prompt_id": [item.prompt_key for item in items],
        "subset": [item.subset or "" for item in items],
        "prompt": [item.messages[-1]["content"] for item in items],
    }
    styles = {side: np.array(STYLES, dtype=object) for side in ("chosen_style", "rejected_style")}
    value = xr.DataArray(
        credit,
        dims=("item", "chosen_style", "rejected_style"),
        coords={name: ("item", np.array(column, dtype=object)) for name, column in texts.items()} | styles,
    )
    cells = [[_share(credit[:, i, j], texts["prompt_id"]) for j in range(3)] for i in range(3)]
    return _result(
        rm.describe("style_matrix", items, title="Style matrix"), "style_matrix", value, np.array(cells),
        shows="How often the right answer wins when it is written in one style and the wrong one in another.",
        cannot_show="That style itself is what decides: length grows with it in every item.",
    )  # fmt: skip


@checked_arguments
def style_summary(matrix: Result) -> Result:
    """Hard, normal, easy and overall accuracy of a style matrix.

    `matrix` is the Result of `style_matrix`. Hard: the chosen response is plainer than the rejected one;
    normal: both are of one style; easy: the chosen one is the more decorated.

    Returns value (item, difficulty) = the share of the item's comparisons won; `mean`, `low` and `high` over
    prompts, whose comparisons count together. Raises `DataError` for another method's result.
    """
    if matrix.name != "style_matrix" or matrix.value.dims != ("item", "chosen_style", "rejected_style"):
        raise DataError(
            "The summary is of a style matrix",
            found=f"a result of '{matrix.name}' with dims {', '.join(map(str, matrix.value.dims))}",
            expected="the whole Result of style_matrix",
            do="pass rl.style_matrix(rm, items)",
        )
    credit, prompts = matrix.value.values, matrix.value["prompt_id"].values
    won = {name: credit[:, cells] for name, cells in DIFFICULTIES.items()}  # [item, comparison]
    coords = {name: c for name, c in matrix.value.coords.items() if c.dims == ("item",)}
    value = xr.DataArray(
        np.stack([cells.mean(1) for cells in won.values()], 1),
        dims=("item", "difficulty"),
        coords=coords | {"difficulty": np.array(list(won), dtype=object)},
    )
    shares = [_share(cells.ravel(), np.repeat(prompts, cells.shape[1])) for cells in won.values()]
    return _result(
        matrix.meta | {"method": "style_summary", "title": "Accuracy by difficulty of style"},
        "style_summary", value, np.array(shares),
        shows="How often the right answer wins when it is plainer than the wrong one (hard), of the same "
        "style (normal) or more decorated (easy).",
        cannot_show="That style itself is what decides: length grows with it in every item.",
    )  # fmt: skip


def _share(credit: np.ndarray, prompts) -> tuple:
    over = stats.proportion_interval(credit, prompts)
    return over.mean, over.low, over.high


def _result(meta: dict, name: str, value: xr.DataArray, cells: np.ndarray, **words: str) -> Result:
    """`cells` [..., (mean, low, high)] beside the per-item values."""
    summary = value.isel(item=0, drop=True)
    mean, low, high = (summary.copy(data=cells[..., i]) for i in range(3))
    meta = meta | words | {"interval": {"level": 0.95, "unit": "prompt"}}
    return Result(name, value, unit="fraction", mean=mean, low=low, high=high, meta=meta)
