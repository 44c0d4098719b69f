"""How much reward does one more SD of an attribute buy, when the text is edited to have it?

    slope of prompt g    b_g = sum x y / sum x^2, over edits of g's responses
                         y = r(edited) - r(before), in SDs of reward within prompts
                         x = a(edited) - a(before), in SDs of the attribute over a pool of unedited responses
    slope                mean of b_g over prompts

"Before" is the response itself where the edit can be undone exactly, and the text edited and edited back where it can
be undone roughly (RATE): what both rewrites do to a text cancels. An edit that cannot be undone is compared with the
response itself, and said to be (`contrast`). No slope comes from comparing different responses.

What this cannot show: that an edit changes nothing but its attribute. `off_target` says how many SDs of each other
attribute it moves a SD of its own; the slope is the sum of what all of them buy. A prompt whose edits change the
attribute little weighs as much as another, and is noisier.

Reference: Reber et al. 2024, arXiv 2410.11348 (RATE); the use as r_i = dR/dq_i of Wang and Huang 2026, arXiv
2603.28063, is ours.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.edits import TextEdit, edits_of
from reward_lens.errors import DataError
from reward_lens.methods.behaviour.edited_texts import scored_edits, within_prompt_sd
from reward_lens.methods.terms.attribute_scores import Score, pool_spread, score_of
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Result

DEFAULT_EDITS: Mapping[str, Sequence[str]] = {
    "words": ["pad"],
    "list_items": ["bulletise"],
    "hedges_per_100_words": ["hedge"],
    "assertive_per_100_words": ["assert"],
    "question_overlap": ["repeat_question"],
}
RECOMMENDED = 100  # edit pairs an attribute
NEEDED_FOR = 0.5  # SD of slopes
UNCHANGED = "no edit of the prompt's responses changes the attribute"


@dataclasses.dataclass(frozen=True)
class _Attribute:
    score: Score
    edits: tuple[TextEdit, ...]


@dataclasses.dataclass(frozen=True)
class _Contrasts:
    """Edited against before, [text, edit]; zero where there is no contrast."""

    reward: np.ndarray
    scores: np.ndarray
    """[text, edit, attribute], in SDs"""
    there: np.ndarray
    prompt: np.ndarray
    """[text], number of its prompt"""


@checked_arguments
def sensitivity_slopes(
    rm: RewardModel, edits: Mapping[str, Any] | None = None, pairs=None, pool=None, level: float = 0.95,
    n_boot: int = 2000, seed: int = 0,
) -> Result:  # fmt: skip
    """Reward slope of each attribute, from matched edits of the same responses.

    Parameters
    ----------
    edits: attribute name -> edits, or a tuple (score, edits). Edits: a `TextEdit`, the name of one or of a family, or a
        list of these (graded edits). Score: a function (last user turn, response) -> number or the name of a text
        feature; without one the attribute's name is the feature's. By default `DEFAULT_EDITS`.
    pairs: whose responses are edited; by default the bundled ones.
    pool: pairs whose responses give the SDs of reward and attributes; by default `pairs`.

    Returns value (prompt_id, attribute) in reward SD per attribute SD, NaN where no edit changes the attribute. mean,
    low and high (attribute,) over prompts (`stats.mean_interval`: none under 6 prompts), both SDs taken as known: they
    say nothing of how well these pairs or this pool measure an SD. Coordinates of `attribute`:
    `p` (sign flips of the prompts' slopes; its null is symmetry about zero), `p_holm`, `n_prompts`, `n_edits` (texts
    that an edit changes), `contrast` (exact, double, single), `attribute_sd`, `n_vary`
    (responses of the pool away from the commonest score: a few make a poor SD), `per_unit` (reward per unit of the
    score), `mean_change` (of the score, in SDs). meta: `reward_sd`, `off_target`, `prompts_needed`, `smallest_p`.
    Raises `DataError` for an attribute that nothing counts, that does not vary in the pool or that no edit changes, and
    where rewards do not vary within prompts.

    100 edited texts an attribute are recommended.
    """
    pairs = data.as_pairs(data.load_pairs("demo") if pairs is None else pairs)
    attributes = _attributes(DEFAULT_EDITS if edits is None else edits)
    reference = pairs if pool is None else data.as_pairs(pool)
    sd, away = pool_spread({name: a.score for name, a in attributes.items()}, reference)
    chosen = tuple(dict.fromkeys(e for a in attributes.values() for e in a.edits))
    edits_of(chosen)  # refuses two edits of one name
    contrasts, plain = _contrasts(rm, pairs, attributes, chosen, sd)
    if pool is not None:
        plain = rm.score_pairs(reference).value.sel(side=["chosen", "rejected"]).values
    reward_sd = within_prompt_sd(plain, [p.prompt_key for p in reference], [p.responses for p in reference])
    if not reward_sd > 0:
        raise DataError(
            "Rewards have no spread to be measured in",
            found=f"an SD of {reward_sd:g} within prompts",
            expected="prompts with two responses that differ in reward",
            do="pass pairs (or a pool) whose responses differ",
        )
    names, n = list(attributes), len(dict.fromkeys(p.prompt_key for p in pairs))
    own = [np.isin(np.arange(len(chosen)), [chosen.index(e) for e in a.edits]) for a in attributes.values()]
    slopes = np.stack([_slopes(contrasts, c, i, contrasts.reward, n) for i, c in enumerate(own)], 1) / reward_sd
    never = [name for name, column in zip(names, slopes.T, strict=True) if np.isnan(column).all()]
    if never:
        raise DataError(
            "An attribute is not changed by its edits",
            found=", ".join(never),
            expected="edits after which the score of the attribute is another",
            do="check the score and the edits on one response, or leave the attribute out",
        )
    units = np.array(list(dict.fromkeys(p.prompt_key for p in pairs)), dtype=object)
    over = stats.mean_interval(slopes, units, level=level, n_boot=n_boot, seed=seed)
    # A difference under the noise floor is none: rounding has a sign too, and a test would find it.
    heard = np.where(np.abs(contrasts.reward) > rm.noise_floor, contrasts.reward, 0.0)
    tests = [stats.sign_flip_test(_slopes(contrasts, c, i, heard, n), seed=seed) for i, c in enumerate(own)]
    p = np.array([test.p for test in tests])
    moved = [contrasts.there[:, c] & (contrasts.scores[:, c, i] != 0) for i, c in enumerate(own)]
    size = [np.abs(contrasts.scores[:, c, i])[m].mean() for i, (c, m) in enumerate(zip(own, moved, strict=True))]
    of_attribute: dict[str, Any] = {
        "p": p,
        "p_holm": stats.adjust(p),
        "n_prompts": np.asarray(over.n_clusters),
        "n_edits": np.array([m.sum() for m in moved]),
        "contrast": np.array([", ".join(sorted(set(map(_contrast, a.edits)))) for a in attributes.values()], object),
        "attribute_sd": sd,
        "n_vary": away,
        "per_unit": np.asarray(over.mean) * reward_sd / sd,
        "mean_change": np.array(size),
    }
    named = {"attribute": np.array(names, dtype=object)} | {k: ("attribute", v) for k, v in of_attribute.items()}
    summary = {
        key: xr.DataArray(np.asarray(getattr(over, key)), dims=("attribute",), coords=named)
        for key in ("mean", "low", "high")
    }
    value = xr.DataArray(slopes, dims=("prompt_id", "attribute"), coords={"prompt_id": units, **named})
    meta = rm.describe(
        "sensitivity_slopes", pairs, title="Reward bought by each attribute", seed=seed,
        settings={"edits": {name: [e.name for e in a.edits] for name, a in attributes.items()}, "n_boot": n_boot,
                  "pool": "pairs" if pool is None else data.inputs_hash(reference)},
        interval={"level": level, "unit": "prompt", "method": over.method},
        reward_sd=reward_sd, off_target=_off_target(contrasts, own, names, n),
        prompts_needed=_needed(len(names)), smallest_p=min(test.smallest_p for test in tests),
        shows="How much the reward moves with each attribute when a response is edited to have more or less of it.",
        cannot_show="That an edit changes its attribute alone (off_target says what else it moves), or that the "
        "attribute deserves no reward. The test's null is that slopes are symmetric about zero.",
    )  # fmt: skip
    return Result("sensitivity_slopes", value, unit="reward SD per attribute SD", meta=meta, undefined=UNCHANGED,
                  **summary)  # fmt: skip


def _attributes(edits: Mapping[str, Any]) -> dict[str, _Attribute]:
    if not isinstance(edits, Mapping) or not edits:
        raise DataError(
            "The edits are a dict by attribute",
            found=f"{type(edits).__name__} of {len(edits)}",
            expected="{attribute: edits} or {attribute: (score, edits)}, at least one",
            do="pass for example {'words': ['pad'], 'hedges_per_100_words': ['hedge']}",
        )
    out = {}
    for name, given in edits.items():
        if isinstance(given, tuple) and len(given) != 2:
            raise DataError(f"The edits of '{name}' were not understood", found=f"a tuple of {len(given)}",
                            expected="a list of edits, or a tuple (score, edits)", do="pass a list")  # fmt: skip
        score, some = given if isinstance(given, tuple) else (None, given)
        out[str(name)] = _Attribute(
            score_of(str(name), score), edits_of([some] if isinstance(some, str | TextEdit) else list(some))
        )
    return out


def _contrast(edit: TextEdit) -> str:
    return "exact" if edit.exact else "single" if edit.inverse is None else "double"


def _contrasts(
    rm: RewardModel, pairs: data.Pairs, attributes: Mapping[str, _Attribute], edits: Sequence[TextEdit], sd: np.ndarray
) -> tuple[_Contrasts, np.ndarray]:
    """The contrasts of every different response of a prompt, and the rewards [pair, response] of the unedited ones."""
    (texts,) = scored_edits([rm], pairs, edits)
    double = np.array([_contrast(e) == "double" for e in edits])
    reward = texts.edited - np.where(double, texts.back, texts.plain[..., None])
    there = texts.changed & (texts.undone | ~double)
    rows, seen, prompt, keys = [], set(), [], {}
    for i, pair in enumerate(pairs):
        number = keys.setdefault(pair.prompt_key, len(keys))
        for side, response in enumerate(pair.responses):
            if (number, response) not in seen:  # a repeated response is no second observation
                seen.add((number, response))
                rows.append((i, side))
                prompt.append(number)
    at = tuple(np.array(rows).T)
    scores = np.zeros((len(rows), len(edits), len(attributes)))
    for row, (i, side) in enumerate(rows):
        asked, response = pairs[i].messages[-1]["content"], pairs[i].responses[side]
        for e, edit in enumerate(edits):
            if there[i, side, e]:
                after = edit.apply(asked, response)
                before = edit.inverse(asked, after) if double[e] and edit.inverse is not None else response
                scores[row, e] = [a.score(asked, after) - a.score(asked, before) for a in attributes.values()]
    return _Contrasts(np.where(there, reward, 0.0)[at], scores / sd, there[at], np.array(prompt)), texts.plain


def _slopes(contrasts: _Contrasts, chosen: np.ndarray, i: int, y: np.ndarray, n: int) -> np.ndarray:
    """Of every prompt, least squares of y on attribute i through the origin, over the chosen edits."""
    x, y = contrasts.scores[:, chosen, i], y[:, chosen]
    top = np.bincount(contrasts.prompt, (x * y).sum(1), n)
    size = np.bincount(contrasts.prompt, (x * x).sum(1), n)
    return np.divide(top, size, out=np.full(n, np.nan), where=size > 0)


def _off_target(contrasts: _Contrasts, own: Sequence[np.ndarray], names: Sequence[str], n: int) -> dict[str, dict]:
    """By attribute, the SDs of each other one that its edits add with a SD of its own (mean over prompts)."""
    return {
        name: {
            other: float(np.nanmean(_slopes(contrasts, own[i], i, contrasts.scores[..., j], n)))
            for j, other in enumerate(names)
            if j != i
        }
        for i, name in enumerate(names)
    }


def _needed(n_attributes: int) -> dict[str, Any]:
    """Prompts at which a mean slope of half an SD of slopes is found in 80% of studies after Holm, and at which a
    sign-flip test can pass Holm's first step at all."""
    alpha = 0.05 / n_attributes
    by_power, floor = stats.paired_n_needed(NEEDED_FOR, alpha=alpha), int(np.ceil(1 - np.log2(alpha)))
    return {"slope_in_sd_of_slopes": NEEDED_FOR, "attributes": n_attributes, "by_power": by_power,
            "by_smallest_p": floor, "n": max(by_power, floor), "edits_recommended": RECOMMENDED}  # fmt: skip
