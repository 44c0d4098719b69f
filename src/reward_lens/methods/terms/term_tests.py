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
    refit = (a.fitted_on, b.fitted_on)
    if test == "score":
        length = pool.length

        def ranks(without):
            return scored.rank_moments(pool.padded(a.scores(without)), pool.padded(b.scores(without)), length)

        fitted = [scoring[t.name] for t in (a, b) if t.name in scoring]

        def correlation(sums, without):
            noise = math.prod(max(cosines.share(moves, without), 0.0) for moves in fitted)
            return scored.partial_correlation(sums) / math.sqrt(noise) if noise > 0 else math.nan

        ranked = _over_prompts(ranks, correlation, pool, refit, n_boot, seed)
        return [_within_one(_as_wide_as_coins(ranked, ranked.n) if ranked.high - ranked.low < 1e-9 else ranked)] * 2
    orders = scored.shuffles(pool.length, seed)

    def gaps(without):
        one, two = (scored.standardised(pool.padded(t.scores(without))) for t in (a, b))
        return scored.gaps(one, two, orders)

    index = _over_prompts(gaps, lambda sums, _: scored.conflict_index(sums[:2]), pool, refit, n_boot, seed)
    _, chance, spread = gaps(frozenset()).sum(0).tolist()
    return [_as_wide_as_coins(index, chance**2 / spread if spread else math.nan)] * 2


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

    return effects, (frozenset(moves.keys), b.fitted_on)


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


def _over_prompts(parts, total, pool: Pool, refit: tuple[frozenset[str], ...], n_boot: int, seed: int) -> Measured:
    """total(sum over groups of parts, prompts left out), and its interval by leaving out blocks of prompts.

    `refit`: prompts of each fit that enters. Blocks are of one set of prompts each, so that a small one beside a large
    one keeps its own degrees of freedom.
    """
    whole, left_out, of = parts(frozenset()), [], []
    sets = (frozenset(pool.keys.tolist()), *refit)
    members: dict[int, set[str]] = {}
    for key in frozenset().union(*sets):
        members.setdefault(sum(2**i for i, one in enumerate(sets) if key in one), set()).add(key)
    for code, keys in sorted(members.items()):
        for block in cosines.blocks(keys, MOST_BLOCKS, seed):
            now = parts(block) if code > 1 else whole
            left_out.append(total(now[[key not in block for key in pool.keys.tolist()]].sum(0), block))
            of.append(code)
    over = cosines.jackknife(total(whole.sum(0), frozenset()), np.array(left_out), n_boot, seed, of=np.array(of))
    return dataclasses.replace(over, n=len(set(pool.keys.tolist())))


def _as_wide_as_coins(m: Measured, coins: int | float) -> Measured:
    """No narrower than Wilson's interval of the share (1 + value) / 2 in so many coins, on the scale from -1 to 1.

    Few prompts of few responses agree by chance, and then no prompt left out changes much.
    """
    if not math.isfinite(m.low + m.high + coins):
        return m
    ends = stats.wilson(float(np.clip((1 + m.value) / 2, 0, 1)) * coins, coins)
    return dataclasses.replace(m, low=min(m.low, 2 * ends[0] - 1), high=max(m.high, 2 * ends[1] - 1))


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
