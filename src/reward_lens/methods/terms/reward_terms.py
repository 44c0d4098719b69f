"""What a reward term is, beside a pool of responses: its scores, and the direction in which it wants states to move.

    edited pairs     direction v: mean over prompts of h(chosen) - h(rejected)
                     score of a response: s(h) C h . S v, the linear discriminant of the pairs: S is the inverse
                     covariance of responses' states within prompts, shrunk, s the final norm's scale, C its centring
    a reward model   score: its reward; direction: mean over prompts of h(best) - h(worst response by that reward)
    Result of rm.score_many     score: its rewards; no states, so no direction

All states are the last residual at the reward position, in the residual's own unit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from reward_lens import data, stats
from reward_lens.engine.activations import capture, captured
from reward_lens.errors import DataError
from reward_lens.methods.terms.direction_cosines import Moves, moves_of, whitening
from reward_lens.model.readout import require_linear
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Result


@dataclasses.dataclass(frozen=True)
class Pool:
    """Responses by prompt, flat [n, ...] or padded [group, response]."""

    groups: list[data.Group]
    keys: np.ndarray
    """[group] prompt keys; a key may come twice"""
    group: Int[np.ndarray, " n"]
    """Group of each response."""
    slot: Int[np.ndarray, " n"]
    """Its place within the group."""

    def padded(self, flat: Float[np.ndarray, " n"]) -> Float[np.ndarray, "group response"]:
        """NaN past a group's last response."""
        out = np.full((len(self.groups), int(self.slot.max()) + 1), np.nan)
        out[self.group, self.slot] = flat
        return out

    def means(self, flat: Float[np.ndarray, " n"]) -> Float[np.ndarray, " group"]:
        """Mean of each group."""
        return np.bincount(self.group, flat) / np.bincount(self.group)

    def spread(self, flat: Float[np.ndarray, " n"]) -> float:
        """SD within groups."""
        away = flat - self.means(flat)[self.group]
        return float(np.sqrt((away**2).sum() / (len(flat) - len(self.groups))))

    @property
    def length(self) -> Float[np.ndarray, "group response"]:
        """Characters of each response."""
        return self.padded(np.array([len(r) for g in self.groups for r in g.responses], float))


@dataclasses.dataclass(frozen=True)
class Term:
    """One term; None where it has no such thing."""

    name: str
    kind: str
    """"pairs", "model" or "scores"."""
    moves: Moves | None
    natural: np.ndarray | None
    """[n, d_model] states of the original responses of pairs, where there is no pool."""
    states: np.ndarray | None
    """[n, d_model] of the pool."""
    fixed: np.ndarray | None
    """[n] scores of the pool that no fitted direction enters."""
    whiten: np.ndarray | None
    """[d_model, d_model] inverse square root of the pool's covariance within prompts."""
    readout: Any

    @property
    def fitted_on(self) -> frozenset[str]:
        """Prompts that its scores depend on besides their own."""
        return frozenset(self.moves.keys) if self.kind == "pairs" and self.moves is not None else frozenset()

    def read(self, h: Float[np.ndarray, "n d_model"], without: frozenset[str] = frozenset()) -> Float[np.ndarray, " n"]:
        """Scores of states, the direction taken without some prompts."""
        if self.kind == "model":
            return self.readout.reward(torch.from_numpy(h).to(self.readout.weight)).double().cpu().numpy()
        return self.seen(h) @ self.weight(without)

    def weight(self, without: frozenset[str] = frozenset()) -> Float[np.ndarray, " d_model"]:
        """S v of pairs."""
        assert self.moves is not None and self.whiten is not None
        return self.whiten @ (self.whiten @ self.moves.mean(without))

    def seen(self, h: Float[np.ndarray, "n d_model"]) -> Float[np.ndarray, "n d_model"]:
        """s(h) C h: what a row of the head is put to, gains apart."""
        norm = self.readout.norm
        scale = norm.scale(torch.from_numpy(h).to(norm.gain)).double().cpu().numpy()
        return scale * (h - h.mean(1, keepdims=True) if norm.centred else h)

    def as_scored(self, pool: Pool) -> Moves:
        """Its moves with the dot product of the scores: how they order the pool's responses within prompts."""
        assert self.moves is not None and self.states is not None and self.whiten is not None
        seen = self.seen(self.states)
        away = seen - np.stack([pool.means(column) for column in seen.T], 1)[pool.group]
        _, sizes, axes = np.linalg.svd(away, full_matrices=False)
        return self.moves.by(self.whiten @ self.whiten @ (axes.T * sizes))

    def scores(self, without: frozenset[str] = frozenset()) -> Float[np.ndarray, " n"]:
        """Scores of the pool."""
        if self.fixed is not None:
            return self.fixed
        assert self.states is not None
        return self.read(self.states, without)


def pool_of(responses) -> Pool:
    """Groups of at least two responses, of at least 6 prompts."""
    groups = list(responses)
    if not all(isinstance(g, data.Group) for g in groups):
        raise DataError("The responses were not understood", found=f"{type(groups[0]).__name__} among them",
                        expected="rl.Group(prompt, responses) objects", do="build one a prompt")  # fmt: skip
    keys = np.array([g.prompt_key for g in groups])
    if len(set(keys.tolist())) < stats.FEWEST:
        raise DataError(
            "There are too few prompts with responses",
            found=f"{len(set(keys.tolist()))} different prompts",
            expected=f"at least {stats.FEWEST}: under that there is no interval",
            do="pass more groups; a hundred or more are usual",
        )
    sizes = [len(g.responses) for g in groups]
    return Pool(groups, keys, np.repeat(np.arange(len(groups)), sizes), np.concatenate([np.arange(n) for n in sizes]))


@torch.no_grad()
def reward_terms(rm: RewardModel, terms: Mapping[str, Any], pool: Pool | None) -> list[Term]:
    """The terms, each with what it has; a network runs the pool once for all of its head's rows."""
    if not isinstance(terms, Mapping) or len(terms) < 2 or not all(isinstance(name, str) for name in terms):
        raise DataError("There are no two terms to compare", found=f"{type(terms).__name__} {terms!r:.60}",
                        expected="a dict {name: term} with at least two entries", do="name the terms")  # fmt: skip
    terms = {name: t if isinstance(t, Result | RewardModel) else data.as_pairs(t) for name, t in terms.items()}
    for name, given in terms.items():
        _require(name, given, pool)  # before the first network runs
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def states(model: RewardModel) -> tuple[np.ndarray, np.ndarray] | None:
        if pool is not None and id(model.module) not in seen:
            h = _pool_states(model, pool)
            seen[id(model.module)] = h, whitening(h, pool.keys[pool.group])
        return seen.get(id(model.module))

    return [_term(rm, name, given, pool, states) for name, given in terms.items()]


def common_space(a: Term, b: Term) -> str:
    """Empty where states of the two are states of one network, otherwise why not."""
    for term in (a, b):
        if term.moves is None:
            return f"{term.name!r} has scores and no states"
    if a.states is None or b.states is None or a.states is b.states:
        return ""
    same = a.states.shape == b.states.shape and np.allclose(
        a.states, b.states, rtol=1e-3, atol=1e-3 * float(np.abs(a.states).max())
    )
    return "" if same else f"{a.name!r} and {b.name!r} are of two networks, whose axes do not correspond"


def _term(rm: RewardModel, name: str, given: Any, pool: Pool | None, states) -> Term:
    if isinstance(given, Result):
        return Term(name, "scores", None, None, None, _given_scores(name, given, pool), None, None)
    if isinstance(given, RewardModel):
        assert pool is not None
        h, whiten = states(given)
        readout = require_linear(given.readout, "The reward term of a model")
        rewards = readout.reward(torch.from_numpy(h).to(readout.weight)).double().cpu().numpy()
        return Term(name, "model", _best_less_worst(pool, h, rewards), None, h, rewards, whiten, readout)
    pairs: data.Pairs = given
    both = np.concatenate(
        [acts[_last(rm)].double().cpu().numpy() for acts in captured(rm, pairs, [_last(rm)])]
    ).reshape(len(pairs), 2, -1)
    moves = moves_of([p.prompt_key for p in pairs], both[:, 0] - both[:, 1])
    if not moves.rows.any():
        raise DataError(f"The term {name!r} moves nothing", found="equal states of chosen and rejected responses",
                        expected="pairs whose chosen response is what the term wants", do="check them")  # fmt: skip
    if pool is None:
        return Term(name, "pairs", moves, both[:, 1], None, None, None, rm.readout)
    h, whiten = states(rm)
    return Term(name, "pairs", moves, None, h, None, whiten, rm.readout)


def _require(name: str, given: Result | RewardModel | data.Pairs, pool: Pool | None) -> None:
    if isinstance(given, Result):
        _given_scores(name, given, pool)
    elif isinstance(given, RewardModel):
        if pool is None:
            raise DataError(f"The term {name!r} has nothing to score", found="a reward model, and responses=None",
                            expected="responses that it ranks", do="pass responses=[rl.Group(...), ...]")  # fmt: skip
    elif pool is not None and (shared := {p.prompt_key for p in given} & set(pool.keys.tolist())):
        raise DataError(
            f"The term {name!r} is fitted on prompts that it then scores",
            found=f"{len(shared)} prompts in its pairs and in the responses",
            expected="different prompts: the noise of a direction is found again in the texts it was taken from",
            do="split by prompt (pairs.split)",
        )


def _last(rm: RewardModel) -> Site:
    return Site("resid_post", rm.n_layers - 1)


def _pool_states(rm: RewardModel, pool: Pool) -> Float[np.ndarray, "n d_model"]:
    texts = [(g.messages, r) for g in pool.groups for r in g.responses]
    return capture(rm, texts, [_last(rm)])[_last(rm)].double().cpu().numpy()


def _best_less_worst(pool: Pool, h: Float[np.ndarray, "n d_model"], rewards: Float[np.ndarray, " n"]) -> Moves:
    table = pool.padded(rewards)
    start = np.concatenate([[0], np.cumsum(np.bincount(pool.group))[:-1]])
    moves = h[start + np.nanargmax(table, 1)] - h[start + np.nanargmin(table, 1)]
    return moves_of(pool.keys.tolist(), moves)


def _given_scores(name: str, scores: Result, pool: Pool | None) -> Float[np.ndarray, " n"]:
    found = (
        f"a Result of {scores.name}" if scores.name != "score_many"
        else "responses=None" if pool is None
        else "scores of other responses" if scores.meta["inputs_hash"] != data.inputs_hash(pool.groups)
        else None
    )  # fmt: skip
    if found or pool is None:
        raise DataError(f"The scores of the term {name!r} are not of these responses", found=found or "",
                        expected="the whole Result of score_many for the groups passed as responses",
                        do="score the same groups with every model")  # fmt: skip
    return scores.value.values[pool.group, pool.slot]


def prompts(terms: Sequence[Term], pool: Pool | None) -> dict[str, int]:
    """Number of prompts of each term's direction, and of the responses."""
    out = {t.name: len(t.moves.keys) for t in terms if t.moves is not None}
    return out | ({} if pool is None else {"responses": len(set(pool.keys.tolist()))})
