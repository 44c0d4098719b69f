"""Which latents matter to a margin: first order on one half of the prompts, exact runs on the other.

    screened on half A    |mean over pairs of  sum_p move_pj g_p . d_j  as it enters the margin|
    run on half B         r - r(the latent moved), one row a latent, the error term kept

`move` is what the exact run takes away: z for an ablation, z less the compared text's z for an exchange. Latents are
chosen on prompts that the tests have no part in, so choosing them leaves the tests' p as they are.
"""

import dataclasses
from typing import Literal

import numpy as np
from torch import Tensor

from reward_lens import data, stats
from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_effects import changes, set_to, slope
from reward_lens.methods.latents.latent_states import At, TextLatents, read_latents
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.sae.dictionary import SAE

Replace = Literal["zero", "other"]


@dataclasses.dataclass(frozen=True)
class Screened:
    """Effects of the screened latents on the pairs of the other half."""

    tested: data.Pairs
    n_screened: int
    """Prompts the latents were chosen on."""
    latents: list[int]
    estimate: np.ndarray
    """[latent], mean first-order effect on the margins of the screening half."""
    effects: np.ndarray
    """[pair, (chosen, rejected), latent]"""
    together: np.ndarray
    """[pair, (chosen, rejected)], all of them at once."""
    active: np.ndarray
    """[pair, (chosen, rejected), latent] 1 where the latent is active."""
    rewards: np.ndarray
    """[pair, (chosen, rejected)]"""
    gap: float


def screened_effects(
    rm: RewardModel, sae: SAE, pairs: data.Pairs, site: Site, at: At, replace: Replace, top: int, seed: int, max_rows
) -> Screened:
    """The `top` latents of one half of the prompts, run on the other half."""
    keys = sorted({p.prompt_key for p in pairs})
    if len(keys) < 2 or top < 1:
        raise DataError(
            "The latents cannot be screened and tested",
            found=f"{len(keys)} prompts, top={top}",
            expected=f"prompts for two halves (with {2 * stats.FEWEST} the tested half has intervals), top 1 or more",
            do="pass more pairs",
        )
    drawn = np.random.default_rng(seed).permutation(len(keys))
    chosen_on = {keys[i] for i in drawn[: len(keys) // 2]}
    halves = data.by_prompt(pairs, chosen_on)
    mean = _first_order(rm, sae, halves[0], site, at, replace)
    order = np.argsort(-np.abs(mean), kind="stable")[:top]
    latents = [int(j) for j in order if mean[j] != 0]
    if not latents:
        raise DataError("No latent has a first-order effect on these margins", found="zeros only",
                        expected="latents that are active at the read positions, and differ between the responses",
                        do="look at sae_report: the dictionary may be dead on these texts")  # fmt: skip
    effects, active, gaps, rewards = [], [], [], []
    for both in _pairs_of_texts(rm, sae, halves[1], site, at):
        for i, text in enumerate(both):
            other = None if replace == "zero" else both[1 - i]
            sets = [[j] for j in latents] + [latents]
            kept = replace == "other" and i == 1  # only the chosen response is changed
            edits = [None if kept else set_to(sae, text, site, some, _target(some, other)) for some in sets]
            found, reward, gap = changes(rm, text, edits, max_rows)
            effects.append(-found)
            rewards.append(reward)
            gaps.append(gap)
            active.append((text.activations(latents) > 0).any(0).numpy().astype(float))
    shape = (len(halves[1]), 2, -1)
    cells = np.stack(effects).reshape(shape)
    return Screened(
        halves[1], len(chosen_on), latents, mean[latents], cells[..., :-1], cells[..., -1],
        np.stack(active).reshape(shape), np.array(rewards).reshape(-1, 2), max(gaps),
    )  # fmt: skip


def _first_order(rm: RewardModel, sae: SAE, pairs: data.Pairs, site: Site, at: At, replace: Replace) -> np.ndarray:
    """[d_sae], the mean over pairs of every latent's first-order effect on the margin."""
    total = np.zeros(sae.d_sae)
    for both in _pairs_of_texts(rm, sae, pairs, site, at):
        for i, text in enumerate(both):
            if replace == "other" and i == 1:
                continue
            g, _ = slope(rm, text.tokens, text.positions, site)
            some = [int(j) for j in text.active]
            if replace == "other":
                some = sorted({*some, *(int(j) for j in both[1].active)})
            move = text.activations(some) - _target(some, None if replace == "zero" else both[1 - i])
            along = g @ sae.W_dec[some].double().cpu().T
            total[some] += (1 - 2 * i) * (move * along).sum(0).numpy()
    return total / len(pairs)


def _target(latents: list[int], other: TextLatents | None) -> Tensor | float:
    return 0.0 if other is None else other.activations(latents)


def _pairs_of_texts(rm: RewardModel, sae: SAE, pairs: data.Pairs, site: Site, at: At):
    texts = read_latents(rm, sae, [t for both in rm.tokenize_pairs(pairs) for t in both], site, at)
    return zip(texts, texts, strict=True)


def with_margin(cells: np.ndarray) -> np.ndarray:
    """[pair, (chosen, rejected, margin), ...]"""
    return np.concatenate([cells, cells[:, :1] - cells[:, 1:]], 1)


def flip_tests(
    margins: np.ndarray, prompts: list[str], adjust: str, seed: int, of: int = 0
) -> tuple[np.ndarray, np.ndarray, dict]:
    """p of every latent's margin effects, the adjusted ones, and what is said of them.

    As many flips are drawn as let a p adjusted over all tests (`of`, if that is more than are made) come under .05.
    """
    n_resamples = max(9999, 20 * max(of, margins.shape[1]))
    tests = [stats.sign_flip_test(column, prompts, n_resamples, seed) for column in margins.T]
    p = np.array([t.p for t in tests])
    words = {"test": "sign flips over prompts", "adjusted": adjust, "smallest_p": tests[0].smallest_p}
    return p, stats.adjust(p, adjust), words | ({"reason": tests[0].reason} if tests[0].reason else {})
