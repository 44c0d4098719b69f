"""Rewards of every response of some pairs as it is, after each of some edits, and edited back.

All texts of a prompt begin alike, so what they share is run once; an edit of a head reads the states of the same run.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from reward_lens import data, stats
from reward_lens.data.checks import shown
from reward_lens.edits import TextEdit
from reward_lens.engine.continuations import rewards_by_beginning
from reward_lens.errors import DataError, named
from reward_lens.model.reward_model import RewardModel

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class EditedRewards:
    """One model's rewards of the texts."""

    plain: np.ndarray
    """[pair, response]"""
    edited: np.ndarray
    """[pair, response, edit], of the edited text"""
    back: np.ndarray
    """[pair, response, edit], of the text edited and edited back"""
    changed: np.ndarray
    """[pair, response, edit], whether the edit changes the text"""
    undone: np.ndarray
    """[pair, response, edit], whether editing back changes the edited text; never for an exact edit"""
    added: np.ndarray
    """[pair, response, edit] tokens added; NaN where nothing changed"""

    def shifts(self) -> np.ndarray:
        """[pair, response, edit], NaN where nothing changed."""
        return np.where(self.changed, self.edited - self.plain[..., None], np.nan)

    def corrected(self) -> np.ndarray:
        """[pair, response, edit] against the text edited back; NaN for edits that restore the text or cannot."""
        return np.where(self.changed & self.undone, self.edited - self.back, np.nan)


def scored_edits(models: Sequence[RewardModel], pairs: data.Pairs, edits: Sequence[TextEdit]) -> list[EditedRewards]:
    """The texts' rewards by every model; the first one's tokens serve all."""
    first, shape = models[0], (len(pairs), 2, len(edits))
    groups: dict[str, list] = {}
    rows: list[list[tuple[str, int]]] = []
    changed, undone, lengths = [], [], []
    for pair in pairs:
        asked, group = pair.messages[-1]["content"], groups.setdefault(pair.prompt_key, [])
        for response in pair.responses:
            edited = [e.apply(asked, response) for e in edits]
            back = [_back(e, asked, response, t) for e, t in zip(edits, edited, strict=True)]
            texts = (response, *edited, *back)
            tokens = [named(f"Pair {pair.id}", first.tokenize, pair.prompt, text) for text in texts]
            rows.append([(pair.prompt_key, len(group) + i) for i in range(len(tokens))])
            group.extend(tokens)
            lengths.append([len(t.response) for t in tokens[: 1 + len(edits)]])
            changed.append([t != response for t in edited])
            undone.append([t != u for t, u in zip(edited, back, strict=True)])
    rewards = rewards_by_beginning(models, list(groups.values())).double().numpy()
    starts = dict(zip(groups, np.cumsum([0, *map(len, groups.values())]).tolist()[:-1], strict=True))
    index = np.array([[starts[key] + i for key, i in row] for row in rows]).reshape(*shape[:2], -1)
    was, back_again = (np.array(flags, bool).reshape(shape) for flags in (changed, undone))
    length = np.array(lengths, float).reshape(*shape[:2], -1)
    added = np.where(was, length[..., 1:] - length[..., :1], np.nan)
    out = []
    for column in rewards.T:
        cells = column[index]
        plain, edited, back = cells[..., 0], cells[..., 1 : 1 + len(edits)], cells[..., 1 + len(edits) :]
        out.append(EditedRewards(plain, edited, back, was, back_again, added))
    return out


def _back(edit: TextEdit, asked: str, response: str, edited: str) -> str:
    """The text edited back; as it is where nothing was edited, or without a way back, or where that leads to the
    response itself, which an exact edit has to show."""
    if edit.inverse is None or edited == response:
        return edited
    back = edit.inverse(asked, edited)
    if edit.exact and back != response:
        raise DataError(f"The edit '{edit.name}' is not exact", found=f"{shown(back)} for {shown(edited)} edited back",
                        expected=f"the response, {shown(response)}",
                        do="leave exact=False: the text edited back is then what it is compared with")  # fmt: skip
    return edited if edit.exact else back


def within_prompt_sd(rewards: np.ndarray, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> float:
    """Pooled SD of the rewards [pair, 2] of different responses to one prompt; NaN where no prompt has two."""
    squares, free = within_prompt_squares(rewards, prompts, texts).sum(0)
    return float(np.sqrt(squares / free)) if free else float("nan")


def within_prompt_squares(rewards: np.ndarray, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """[prompt, 2] in order of first appearance: sum of squares about the prompt's mean, and its degrees of freedom."""
    of_prompt: dict[str, dict[str, float]] = {}
    for key, some, values in zip(prompts, texts, rewards, strict=True):
        of_prompt.setdefault(key, {}).update(zip(some, map(float, values), strict=True))
    return np.array([(np.var(list(v.values())) * len(v), len(v) - 1) for v in of_prompt.values()], dtype=float)


@dataclasses.dataclass(frozen=True)
class ScaledShifts:
    """Mean shifts in SDs of the rewards within prompts, by probe; or two models' difference."""

    value: Float[np.ndarray, " probe"]
    without: Float[np.ndarray, "prompt probe"]
    """The same with one prompt left out of mean and SD together."""
    n: Int[np.ndarray, " probe"]
    """Prompts whose texts the probe changes."""

    def __sub__(self, other: "ScaledShifts") -> "ScaledShifts":
        return ScaledShifts(self.value - other.value, self.without - other.without, self.n)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the 95% interval, value +- t(n - 1) jackknife error; NaN under 6 prompts."""
        from scipy.stats import t

        groups = len(self.without)
        error = np.sqrt((groups - 1) / groups * ((self.without - self.value) ** 2).sum(0))
        half = t.ppf(0.975, np.where(self.n >= stats.FEWEST, self.n - 1, np.nan)) * error
        return self.value - half, self.value + half


def scaled_shifts(
    shift: Float[np.ndarray, "pair 2 probe"],
    rewards: Float[np.ndarray, "pair 2"],
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
) -> ScaledShifts:
    """Of shifts (NaN where a probe changes nothing) and the unedited rewards; NaN where these have no spread."""
    place = {key: i for i, key in enumerate(dict.fromkeys(prompts))}
    there = np.isfinite(shift)
    sums, counts = np.zeros((2, len(place), shift.shape[-1]))
    for out, cells in ((sums, np.where(there, shift, 0.0)), (counts, there)):
        np.add.at(out, [place[key] for key in prompts], cells.sum(1))
    squares = within_prompt_squares(rewards, prompts, texts)
    every = squares.sum(0)
    left = every - squares
    left[left[:, 0] <= 1e-12 * every[0]] = np.nan  # one prompt has all the spread, or none has any
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums.sum(0) / counts.sum(0) / np.sqrt(every[0] / every[1] if every[0] > 0 else np.nan)
        without = (sums.sum(0) - sums) / (counts.sum(0) - counts) / np.sqrt(left[:, :1] / left[:, 1:])
    return ScaledShifts(value, without, (counts > 0).sum(0))
