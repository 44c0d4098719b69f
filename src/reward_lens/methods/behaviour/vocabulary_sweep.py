"""The reward of every response of one token.

    r(prompt, t)     for every token t that a response can consist of

The response is the text of the token, in the model's chat template, read by its tokenizer: a token is scored where
that reading gives exactly this token in the response's place and the template's own tokens around it. The others
(special tokens, fragments of a character, tokens that merge with the template, ...) stand in no response; they are left
out and counted by reason. A prompt is run once, each token then from its keys and values.

What this cannot show: what a token does in a longer response. Few models were trained on responses of one token, so
these rewards are also a look at where the model was never told what to do.

Reference: Christian et al. 2025, arXiv 2506.07326.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.engine.continuations import beginning, rewards_after
from reward_lens.errors import DataError
from reward_lens.model.checks import reward_tolerance
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import Progress
from reward_lens.model.vocabulary import ResponseSlot, Vocabulary
from reward_lens.result import Check, Result

TABLE = 20
CHECKED = 16
BATCHED = 1e-4
"""E1 of a reward computed in a batch or from keys and values, as in the load report's rows of these names."""
AT_ONCE = 4096
"""Tokens whose conversations are held at one time."""


@checked_arguments
def vocab_sweep(
    rm: RewardModel,
    prompt,
    tokens: Iterable[int] | None = None,
    *,
    reuse: bool = True,
    seed: int = 0,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Rewards of all responses of one token to one prompt, or to each of several.

    Parameters
    ----------
    prompt: a text, one conversation (a list of messages), or a list of several of these.
    tokens: ids to try; None: the whole vocabulary.
    reuse: whether the prompt's keys and values may be computed once (where the load report found that the model gives
        its own reward with them) instead of running every conversation whole.
    seed: draws the tokens that are scored a second time, plainly, for the check "own reward".
    max_rows: conversations run at once. progress: told (conversations done, of how many).

    Returns value (token, prompt) in reward units, `prompt` numbered from "1", `token` the token's text. Coordinates:
    `token_id`, `piece` (by token), `prompt_id`, `text` (by prompt). `meta`: `n_scored`, `n_left_out` and `left_out`
    (count by reason; tokens left out for one prompt are left out for all); `moments` by prompt: mean, sd (n - 1),
    skewness and excess kurtosis (None where all rewards are equal); `top` and `bottom` by prompt, 20 rows of piece,
    token_id, reward; `spearman`: rank correlation of the token rewards of each two prompts and n tokens. These describe
    the whole vocabulary, which is no sample, so none has an interval. Check "own reward": 16 random tokens a prompt
    scored alone as text, over max(|reward|, SD of the load report's rewards), within the load report's tolerance of a
    batched reward (1e-4; in 16 bits that of E1).
    Raises `DataError` for ids that are no tokens, or if no token is left.

    Cannot show what happens to longer responses. Reference: Christian et al. 2025, arXiv 2506.07326.
    """
    items = [data.Pair(one, "", "") for one in _prompts(prompt)]
    vocabulary = Vocabulary(rm.tokenizer, min(len(rm.tokenizer.hf), rm.config.get_text_config().vocab_size))
    slots = [ResponseSlot(vocabulary, item.messages, rm.truncation) for item in items]
    ids, texts, left_out = _standing(slots, _wanted(vocabulary, tokens))
    total, done = len(slots) * len(ids), 0
    rewards = np.empty((len(slots), len(ids)))
    for slot, row in zip(slots, rewards, strict=True):
        for start in range(0, len(ids), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            row[some] = _rewards(rm, slot, ids[some], texts[some], reuse, max_rows)
            done += len(ids[some])
            if progress is not None:
                progress(done, total)
    words = np.array([*texts, None], dtype=object)[:-1]
    coords = {
        "prompt": np.array([str(i + 1) for i in range(len(items))], dtype=object),
        "token": words,
        "token_id": ("token", np.array(ids)),
        "piece": ("token", words),
        "prompt_id": ("prompt", np.array([item.prompt_key for item in items], dtype=object)),
        "text": ("prompt", np.array([item.messages[-1]["content"] for item in items], dtype=object)),
    }
    meta = rm.describe(
        "vocab_sweep", title="Responses of one token", n_prompts=len({item.prompt_key for item in items}),
        inputs_hash=data.inputs_hash(items), seed=seed, settings={"reuse": reuse, "whole_vocabulary": tokens is None},
        prefix_reused=reuse and all(rm.reuses_prefix(slot.reference) for slot in slots),
        n_scored=len(ids), n_left_out=sum(left_out.values()), left_out=left_out,
        moments=[_moments(row) for row in rewards], spearman=_between(rewards), noise_floor=rm.noise_floor,
        top=[_table(row, ids, texts, -1) for row in rewards], bottom=[_table(row, ids, texts, 1) for row in rewards],
        shows="The reward of every response that is one token, and which tokens are paid most and least.",
        cannot_show="What these tokens do in longer responses; few models were trained on responses of one token.",
    )  # fmt: skip
    value = xr.DataArray(rewards.T, dims=("token", "prompt"), coords=coords)
    check = _own_reward(rm, items, texts, rewards, seed)
    return Result("vocab_sweep", value, unit="reward", checks=[check], meta=meta)


def _standing(slots: Sequence[ResponseSlot], ids: list[int]) -> tuple[list[int], list[str], dict[str, int]]:
    """The tokens that stand alone in every prompt's slot, their texts, and the number left out by reason."""
    texts = slots[0].vocabulary.texts([[i] for i in ids])
    left_out: collections.Counter[str] = collections.Counter()
    for slot in slots:
        reasons = slot.reasons(ids, texts)
        left_out.update(reason for reason in reasons if reason)
        kept = [k for k, reason in enumerate(reasons) if not reason]
        ids, texts = [ids[k] for k in kept], [texts[k] for k in kept]
    if not ids:
        raise DataError(
            "No token is left to score",
            found=", ".join(f"{reason}: {n}" for reason, n in sorted(left_out.items())) or "an empty list of tokens",
            expected="at least one token that is read back as itself in the response's place",
            do="pass other ids, or tokens=None for the whole vocabulary",
        )
    return ids, texts, dict(sorted(left_out.items()))


def _rewards(rm: RewardModel, slot: ResponseSlot, ids, texts, reuse: bool, max_rows: int | None) -> np.ndarray:
    conversations = [slot.tokens(i, text) for i, text in zip(ids, texts, strict=True)]
    if not reuse:
        return rm.rewards(conversations, max_rows).double().numpy()
    return rewards_after(rm, beginning(rm, conversations), conversations, max_rows).double().numpy()


def _own_reward(rm: RewardModel, items, texts: list[str], rewards: np.ndarray, seed: int) -> Check:
    """The worst of some tokens scored one at a time from their text, over the scale of E1."""
    drawn = np.random.default_rng(seed).permutation(len(texts))[:CHECKED]
    worst = (0.0, BATCHED)
    for item, row in zip(items, rewards, strict=True):
        for k in drawn.tolist():
            own = float(rm.rewards([rm.tokenize(item.messages, texts[k])])[0])
            scale = rm.effect_scale(own)
            pair = abs(own - float(row[k])) / scale, max(reward_tolerance(rm, own, scale) / scale, BATCHED)
            worst = max(worst, pair, key=lambda gap: gap[0] / gap[1])
    return Check("own reward", *worst, note=f"{len(drawn)} tokens a prompt, each scored alone as text")


def _moments(rewards: np.ndarray) -> dict[str, float | None]:
    from scipy.stats import kurtosis, skew

    out: dict[str, float | None] = {"mean": float(rewards.mean()), "sd": None, "skewness": None, "kurtosis": None}
    if len(rewards) > 1:
        out["sd"] = float(rewards.std(ddof=1))
    if np.ptp(rewards):
        out |= {"skewness": float(skew(rewards)), "kurtosis": float(kurtosis(rewards))}
    return out


def _between(rewards: np.ndarray) -> list[dict[str, Any]]:
    """Rank correlation of the token rewards of every two prompts."""
    out = []
    for a in range(len(rewards)):
        for b in range(a + 1, len(rewards)):
            found = stats.spearman(rewards[a], rewards[b])
            undefined = np.isnan(found.value)
            out.append(
                {"prompts": [str(a + 1), str(b + 1)], "rho": None if undefined else found.value, "n": found.n,
                 "reason": found.reason if undefined else ""}
            )  # fmt: skip
    return out


def _table(rewards: np.ndarray, ids: list[int], texts: list[str], sign: int) -> list[dict[str, Any]]:
    order = np.argsort(sign * rewards, kind="stable")[:TABLE].tolist()
    return [{"piece": texts[k], "token_id": ids[k], "reward": float(rewards[k])} for k in order]


def _prompts(prompt) -> list:
    """The prompts, whether one was passed or several."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt or isinstance(prompt[0], Mapping):
        return [prompt]
    return list(prompt)


def _wanted(vocabulary: Vocabulary, tokens: Iterable[int] | None) -> list[int]:
    if tokens is None:
        return list(range(vocabulary.size))
    wanted = list(dict.fromkeys(tokens))
    wrong = [i for i in wanted if isinstance(i, bool) or not isinstance(i, int | np.integer)]
    wrong = wrong or [i for i in wanted if not 0 <= i < vocabulary.size]
    if wrong:
        raise DataError(
            "Some ids are no tokens of this model",
            found=", ".join(map(repr, wrong[:5])),
            expected=f"whole numbers from 0 to {vocabulary.size - 1}",
            do="pass ids of rm.tokenizer.hf, or tokens=None for the whole vocabulary",
        )
    return [int(i) for i in wanted]
