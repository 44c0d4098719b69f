"""The reward that a policy trained by DPO implies against its reference, over a response and token by token.

    r(x, y) = beta * sum_t [ log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t) ]

t runs over the response's tokens, as the chat template renders it behind the generation prompt. Rewards of one prompt
compare; a constant of the prompt, beta log Z(x), is left out of all of them. Trunks run in their own precision, the
softmax in float32. Either model may be loaded, used and dropped before the other.

What this cannot show: that the policy acts on this reward: it is what DPO's optimum would have been paid. A token's
term says how much likelier the policy finds it than the reference does, not whether it is right.

Reference: Rafailov et al. 2023, arXiv 2305.18290; Rafailov et al. 2024, arXiv 2404.12358 (per token).
"""

from typing import Any

import numpy as np

from reward_lens import stats
from reward_lens.arguments import checked_arguments
from reward_lens.methods.readouts.implicit_reading import (
    by_text,
    by_token,
    final_states,
    implicit_result,
    masked_margin,
    read_both,
    token_coords,
    with_margin,
)
from reward_lens.methods.shared.prompt_ratios import plain
from reward_lens.model.language_model import End, Given
from reward_lens.result import Check, Result

READINGS = ("sum", "per token")


@checked_arguments
def implicit_reward(
    policy: Given, reference: Given, pairs, beta: float = 0.1, end: End = "template", seed: int = 0
) -> Result:
    """Implicit rewards and margins of preference pairs, and how often the margin agrees with the labels.

    Parameters
    ----------
    policy, reference: causal language models with one tokenizer: a hub id or folder, an `rl.LanguageModel`, or a
        function that returns one. What is named or made here is dropped before the other is loaded.
    beta: of the DPO run. end: what of the template's text behind the response counts: "template" (all of it), "first"
        (its first token, the end of the turn) or "none".

    Returns value (pair, side, reading) in reward units; reading "sum" is the reward, "per token" the reward divided by
    the number of counted tokens (another quantity: its margins are no difference of DPO rewards). Mean and interval
    over prompts. Coordinates: `chosen_tokens`, `rejected_tokens` (counted), and (pair, side) `policy_log_probability`
    and `reference_log_probability`. `meta["accuracy"]`: of each reading the share of pairs with a positive margin (a
    tie counts half) with its interval over prompts. Checks: "own log-probabilities" of either model (against the
    module's own logits).
    Raises `DataError` for different tokenizers, for a response without tokens and for a template whose conversation
    does not begin with its generation prompt.
    """
    pairs, first, second = read_both(policy, reference, pairs, beta, end, _read, lambda v: v)
    logs = [with_margin(by_text(r)) for r in (first, second)]
    lengths = np.array([len(r.counted) for r in first.texts]).reshape(-1, 2)
    reward = beta * (by_text(first) - by_text(second))
    values = with_margin(np.stack([reward, reward / lengths], -1))
    prompts = [p.prompt_key for p in pairs]
    margins = values[:, 2]
    shares = {reading: stats.proportion_interval((np.sign(margins[:, k]) + 1) / 2, prompts)
              for k, reading in enumerate(READINGS)}  # fmt: skip
    coords = {"reading": np.array(READINGS, dtype=object)}
    coords |= {f"{role}_log_probability": (("pair", "side"), log)
               for role, log in zip(("policy", "reference"), logs, strict=True)}  # fmt: skip
    return implicit_result(
        "implicit_reward", pairs, first, second, values, ("pair", "side", "reading"), coords, beta, end, seed,
        title="Implicit reward of DPO",
        accuracy={reading: {"value": plain(share.mean), "low": plain(share.low), "high": plain(share.high)}
                  for reading, share in shares.items()},
        shows="How much likelier the policy finds each response than its reference does, times beta.",
        cannot_show="That the policy acts on it; rewards of different prompts are not on a common scale.",
    )  # fmt: skip


@checked_arguments
def implicit_tokens(
    policy: Given, reference: Given, pairs, beta: float = 0.1, end: End = "template", seed: int = 0
) -> Result:
    """The implicit reward token by token: beta times the log-ratio of each token of the response.

    Returns value (pair, side, position) in reward units; positions count from the first token of the response and are
    padded (coordinates `n_positions`, `token`, `piece`, `role`); a margin exists only where both responses have had the
    same tokens so far. The tokens sum to the reward (check "tokens sum to the reward"). Parameters, checks and errors
    as for `implicit_reward`.
    """
    pairs, first, second = read_both(policy, reference, pairs, beta, end, _read, lambda v: v)
    ratio = beta * (by_token(first) - by_token(second))
    reward = beta * (by_text(first) - by_text(second))
    size = beta * np.maximum(np.abs(by_text(first)), np.abs(by_text(second)))
    gap = float((np.abs(np.nansum(ratio, -1) - reward) / np.maximum(size, 1e-12)).max())
    return implicit_result(
        "implicit_tokens", pairs, first, second, masked_margin(ratio, first), ("pair", "side", "position"),
        token_coords(first), beta, end, seed, checks=[Check("tokens sum to the reward", gap, 1e-9)], interval=False,
        undefined="a margin exists only where both responses have had the same tokens", **_words(),
    )  # fmt: skip


def _read(lm, batch, replies, where) -> np.ndarray:
    return lm.log_probabilities(final_states(lm, batch, where), where.target).double().cpu().numpy()


def _words() -> dict[str, Any]:
    return {
        "title": "Implicit reward of DPO by token",
        "shows": "At which tokens of a response policy and reference part, and by how much.",
        "cannot_show": "Whether a token is right, or what an earlier choice made of it: each is read after all before "
        "it.",
    }
