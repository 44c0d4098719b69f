"""Attributes of a response as numbers of its text, and their spread over a pool of responses.

    score       a function (last user turn, response) -> number, or one of `features.text_features` by name
    SD          over the pool's different responses, prompts apart: the unit in which slopes and weights are given

What these cannot show: that a number of the text measures the quality that its name promises.
"""

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from reward_lens import data
from reward_lens.errors import DataError
from reward_lens.features import TEXT_FEATURES, text_features

Score = Callable[[str, str], Any]
"""(last user turn, response) -> number."""


def score_of(name: str, score: Any = None) -> Score:
    """The function behind an attribute: `score` if it is one, else the text feature it names (None: `name`)."""
    if callable(score):
        return functools.partial(_checked, name, score)
    feature = name if score is None else score
    if not isinstance(feature, str) or feature not in TEXT_FEATURES:
        raise DataError(
            f"Nothing says how the attribute '{name}' is counted",
            found=f"the score {feature!r}",
            expected=f"a function (prompt, response) -> number, or one of {', '.join(TEXT_FEATURES)}",
            do="give the attribute a function of the text, or name a feature of this list",
        )
    return functools.partial(_feature, feature)


def pool_spread(scores: Mapping[str, Score], pool: data.Pairs) -> tuple[np.ndarray, np.ndarray]:
    """SD of every attribute over the different responses of the pool (a repeated response counts once), and how many
    responses are away from its commonest value: an SD that a few responses make is a poor unit."""
    texts = {(p.prompt_key, r): (p.messages[-1]["content"], r) for p in pool for r in p.responses}
    values = np.array([[score(*text) for score in scores.values()] for text in texts.values()])
    sd = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(scores))
    flat = [name for name, size in zip(scores, sd, strict=True) if not size > 0]
    if flat:
        raise DataError(
            "An attribute has no spread to be measured in",
            found=f"{', '.join(flat)}: the same for all {len(values)} responses of the pool",
            expected="responses that differ in every attribute",
            do="pass a pool of responses that differ in it, or leave it out",
        )
    away = [len(column) - np.unique(column, return_counts=True)[1].max() for column in values.T]
    return sd, np.array(away)


def _feature(feature: str, prompt: str, response: str) -> float:
    return _features(prompt, response)[feature]


@functools.lru_cache(maxsize=8192)
def _features(prompt: str, response: str) -> dict[str, float]:
    return text_features(prompt, response)


def _checked(name: str, score: Score, prompt: str, response: str) -> float:
    value = score(prompt, response)
    if not isinstance(value, numbers.Real | np.bool_) or not np.isfinite(float(value)):
        raise DataError(
            f"The score of '{name}' is no number",
            found=f"{value!r} for the response {response[:60]!r}",
            expected="a finite number for every text, edited ones included",
            do="correct the function",
        )
    return float(value)
