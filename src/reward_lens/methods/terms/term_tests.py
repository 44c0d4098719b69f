"""The four tests of two reward terms, as numbers with intervals over prompts; `conflict` has the formulas."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from reward_lens import stats
from reward_lens.methods.terms import direction_cosines as cosines
from reward_lens.methods.terms import term_scores as scored
from reward_lens.methods.terms.direction_cosines import Measured, Moves
from reward_lens.methods.terms.reward_terms import Pool, Term

MOST_BLOCKS = 60  # of prompts left out in turn, where every one means a new fit


def measured(
    a: Term, b: Term, test: str, pool: Pool | None, scoring: Mapping[str, Moves], n_boot: int, seed: int
) -> list[Measured]:
    """A test from a to b and from b to a; the same twice for symmetric tests."""
    if test == "direction":
        assert a.moves is not None and b.moves is not None
        return [cosines.cosine(a.moves, b.moves, n_boot, seed)] * 2
    assert pool is not None
    if test == "intervention":
        return [_intervention(a, b, pool, n_boot, seed), _intervention(b, a, pool, n_boot, seed)]
    refit = a.fitted_on | b.fitted_on
    if test == "score":
        length = pool.length

        def ranks(without):
            return scored.rank_moments(pool.padded(a.scores(without)), pool.padded(b.scores(without)), length)

        fitted = [scoring[t.name] for t in (a, b) if t.name in scoring]

        def correlation(sums, without):
            noise = math.prod(max(cosines.share(moves, without), 0.0) for moves in fitted)
            return scored.partial_correlation(sums) / math.sqrt(noise) if noise > 0 else math.nan

        return [_within_one(_with_width(_over_prompts(ranks, correlation, pool, refit, n_boot, seed)))] * 2
    orders = scored.shuffles(pool.length, seed)

    def gaps(without):
        one, two = (scored.standardised(pool.padded(t.scores(without))) for t in (a, b))
        return scored.gaps(one, two, orders)

    index = _over_prompts(gaps, lambda sums, _: scored.conflict_index(sums), pool, refit, n_boot, seed)
    return [_with_width(index)] * 2


def _effects(a: Term, b: Term, pool: Pool):
    """By group and for prompts left out, the mean change of score b along v_a, in its SDs."""
    assert a.moves is not None and a.states is not None
    moves, h = a.moves, a.states

    def effects(without: frozenset[str]) -> np.ndarray:
        v = moves.mean(without)
        v = v / np.linalg.norm(v)
        before = b.read(h, without)
        change = b.read(h + pool.spread(h @ v) * v, without) - before
        return pool.means(change) / pool.spread(before)

    return effects, frozenset(moves.keys) | b.fitted_on


def _intervention(a: Term, b: Term, pool: Pool, n_boot: int, seed: int) -> Measured:
    (there, refit), (own, _) = _effects(a, b, pool), _effects(a, a, pool)

    def both(without):
        return np.stack([there(without), own(without)], 1)

    return _over_prompts(both, _ratio, pool, refit, n_boot, seed)


def own_effect(a: Term, pool: Pool, n_boot: int, seed: int) -> Measured:
    effects, refit = _effects(a, a, pool)

    def both(without):
        return np.stack([effects(without), np.ones(len(pool.groups))], 1)

    return _over_prompts(both, _ratio, pool, refit, n_boot, seed)


def _ratio(sums: np.ndarray, _without: frozenset[str]) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _over_prompts(parts, total, pool: Pool, refit: frozenset[str], n_boot: int, seed: int) -> Measured:
    """total(sum over groups of parts, prompts left out), and its interval by leaving out blocks of prompts."""
    whole, left_out = parts(frozenset()), []
    keys = {*pool.keys.tolist(), *refit}
    for block in cosines.blocks(keys, MOST_BLOCKS, seed):
        now = parts(block) if block & refit else whole
        left_out.append(total(now[[key not in block for key in pool.keys.tolist()]].sum(0), block))
    over = cosines.jackknife(total(whole.sum(0), frozenset()), np.array(left_out), n_boot, seed)
    return dataclasses.replace(over, n=len(set(pool.keys.tolist())))


def _with_width(m: Measured) -> Measured:
    """Where no prompt left out changes anything, Wilson's interval of all n prompts, on the scale from -1 to 1."""
    if not m.high - m.low < 1e-9:
        return m
    least = 2 * stats.wilson(m.n, m.n)[0] - 1
    return dataclasses.replace(m, low=min(m.low, least) if m.value > 0 else m.low,
                               high=max(m.high, -least) if m.value < 0 else m.high)  # fmt: skip


def _within_one(m: Measured) -> Measured:
    value, low, high = np.clip([m.value, m.low, m.high], -1, 1).tolist()
    return dataclasses.replace(m, value=value, low=low, high=high)


def whitened(a: Term, b: Term, n_boot: int, seed: int) -> Measured:
    assert a.moves is not None and b.moves is not None
    matrix = a.whiten
    if matrix is None:
        assert a.natural is not None and b.natural is not None
        groups = np.repeat([a.name, b.name], [len(a.natural), len(b.natural)])
        matrix = cosines.whitening(np.concatenate([a.natural, b.natural]), groups)
    return cosines.cosine(a.moves.by(matrix), b.moves.by(matrix), n_boot, seed)


def losses_at_best(a: Term, b: Term, pool: Pool, n_boot: int, seed: int) -> list[Measured]:
    lost = scored.losses(*(scored.standardised(pool.padded(t.scores())) for t in (a, b)))
    over = [stats.mean_interval(x, pool.keys, n_boot=n_boot, seed=seed) for x in lost]
    return [Measured(float(o.mean), float(o.low), float(o.high), int(o.n_clusters)) for o in over]
