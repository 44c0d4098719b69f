"""What gold labels pay for each attribute: weights to set a model's slopes against.

    P(chosen is preferred) = 1 / (1 + exp(-sum_i w_i d_i)),  d_i = (a_i(chosen) - a_i(rejected)) / SD of a_i over a pool

w_i is in log-odds per SD, the other attributes held fixed (`shared.preference_weights`), errors clustered by prompt:
with H the information, H_g and s_g what prompt g adds to it and to the score, w without g is w - (H - H_g)^-1 s_g to
first order.

What these cannot show: that raters care for the attribute itself. Labels are not edited texts, and what goes with an
attribute and is not among the others is credited to it. With few prompts an attribute the fit is too far from zero.

Reference: Bradley and Terry 1952 (the model); Liang and Zeger 1986 (clustered errors). Our own choice of weights for
arXiv 2603.28063, which takes them as given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.shared.preference_weights import preference_weight
from reward_lens.methods.terms.attribute_scores import pool_spread, score_of
from reward_lens.result import Check, Result

PROMPTS_PER_ATTRIBUTE = 10


@checked_arguments
def fitted_weights(pairs, scores: Mapping[str, Any] | Sequence[str], pool=None, level: float = 0.95) -> Result:
    """Weight of each attribute in the preferences of these pairs.

    Parameters
    ----------
    pairs: preferences by a gold judge: `chosen` is the response it prefers.
    scores: attributes by name, each a function (prompt, response) -> number or the name of a text feature; or names of
        features of `features.text_features`.
    pool: the pairs whose responses give the SDs; by default `pairs`. Take the pool of `sensitivity_slopes`.
    level: of the intervals.

    Returns value (prompt_id, attribute): one value a prompt whose mean is w and whose spread is that of the estimate,
    w + (G - 1) (H - H_g)^-1 s_g (G prompts), centred. mean is w in log-odds per SD, low and high from errors clustered
    by prompt (CR3, `stats.partial_slope`; none under 6 prompts), the attributes' SDs taken as known. Coordinates
    `p`, `p_holm`, `attribute_sd`, `n_vary` (responses of the pool away from the commonest score), `n_prompts`,
    `n_differ` (pairs). Raises `DataError` where the labels are separable or an attribute is fixed by the others, with
    or without one of the prompts.
    """
    pairs = data.as_pairs(pairs)
    if isinstance(scores, str) or not scores:
        raise DataError("The attributes are a list of names", found=repr(scores), expected="one or more attributes",
                        do="pass a list of feature names, or a dict of functions")  # fmt: skip
    given = scores if isinstance(scores, Mapping) else dict.fromkeys(scores)
    functions = {str(name): score_of(str(name), score) for name, score in given.items()}
    sd, away = pool_spread(functions, pairs if pool is None else data.as_pairs(pool))
    names, keys = list(functions), [p.prompt_key for p in pairs]
    d = np.array([_difference(p, list(functions.values())) for p in pairs]) / sd
    rows = [preference_weight(d[:, i], np.delete(d, i, axis=1), keys, level) for i in range(len(names))]
    # From so many prompts on each weight has an interval, unless one prompt alone decides it.
    decided = [row.low if len(set(keys)) >= stats.FEWEST else row.value for row in rows]
    failed = {name: row.reason for name, row, end in zip(names, rows, decided, strict=True) if np.isnan(end)}
    if failed:
        raise DataError(
            "The labels do not determine the weights",
            found="; ".join(f"{name}: {reason}" for name, reason in failed.items()),
            expected=f"pairs that disagree, and about {PROMPTS_PER_ATTRIBUTE} prompts an attribute "
            f"({PROMPTS_PER_ATTRIBUTE * len(names)} here; there are {len(set(keys))})",
            do="pass more pairs, or leave out attributes that others fix",
        )
    w = np.array([row.value for row in rows])
    values, gap = _by_prompt(d, w, keys)
    p = np.array([row.p for row in rows])
    of_attribute: dict[str, Any] = {
        "p": p,
        "p_holm": stats.adjust(p),
        "attribute_sd": sd,
        "n_vary": away,
        "n_prompts": np.full(len(names), len(values)),
        "n_differ": (d != 0).sum(0),
    }
    named = {"attribute": np.array(names, dtype=object)} | {k: ("attribute", v) for k, v in of_attribute.items()}
    mean, low, high = (
        xr.DataArray(np.array([getattr(row, key) for row in rows]), dims=("attribute",), coords=named)
        for key in ("value", "low", "high")
    )
    units = np.array(list(dict.fromkeys(keys)), dtype=object)
    value = xr.DataArray(values, dims=("prompt_id", "attribute"), coords={"prompt_id": units, **named})
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    return Result(
        "fitted_weights", value, unit="log-odds per attribute SD", mean=mean, low=low, high=high,
        checks=[Check("score equations", gap, 1e-5, "of the mean score, against the mean size of scores")],
        meta={
            "method": "fitted_weights", "title": "What the gold labels pay for", "source": pairs.source,
            "n_pairs": len(pairs), "n_prompts": len(units), "inputs_hash": data.inputs_hash(pairs),
            "settings": {"attributes": names, "pool": "pairs" if pool is None else "given"},
            "interval": {"level": level, "unit": "prompt",
                         "method": f"none ({reasons[0]})" if reasons else "clustered errors, t"},
            "prompts_needed": {"n": PROMPTS_PER_ATTRIBUTE * len(names), "attributes": len(names)},
            "shows": "How the preference goes with each attribute, the others held fixed.",
            "cannot_show": "That raters care for the attribute itself and not for something that goes with it.",
        },
    )  # fmt: skip


def _difference(pair: data.Pair, scores: Sequence) -> list[float]:
    asked = pair.messages[-1]["content"]
    return [score(asked, pair.chosen) - score(asked, pair.rejected) for score in scores]


def _by_prompt(d: np.ndarray, w: np.ndarray, keys: list[str]) -> tuple[np.ndarray, float]:
    """w and each prompt's part in its error, [prompt, attribute]; and how far the scores are from adding up to zero."""
    units = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    codes = np.array([units[key] for key in keys])
    chance = 1 / (1 + np.exp(-d @ w))
    information, score = np.zeros((len(units), d.shape[1], d.shape[1])), np.zeros((len(units), d.shape[1]))
    np.add.at(information, codes, (chance * (1 - chance))[:, None, None] * d[:, :, None] * d[:, None, :])
    np.add.at(score, codes, (1 - chance)[:, None] * d)
    gap = float(np.abs(score.sum(0)).max() / max(np.abs(score).sum(0).max(), 1e-300))
    left = information.sum(0) - information
    moves = np.einsum("gij,gj->gi", np.linalg.pinv(left, rcond=1e-9, hermitian=True), score)
    return w + (len(units) - 1) * (moves - moves.mean(0)), gap
