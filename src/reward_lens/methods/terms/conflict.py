"""Are two reward terms aligned, orthogonal or in conflict? Four tests, each with an interval, or "undetermined".

    score           partial rank correlation of the two scores within prompts, given the responses' length in characters
                    (terms may have tokenizers of their own); over the root of the reliabilities of scores whose
                    direction was fitted
    direction       cosine of the two mean differences of states, freed of noise (`direction_cosines`)
    intervention    mean change of score b over that of score a, each in its SDs within prompts, as states move one
                    natural SD along v_a, the norm run again
    optimisation    1 - (max a + max b - max(a + b)) / the same with b shuffled, over a prompt's responses

    label   aligned where the interval lies over the edge, in_conflict where it lies under -edge, orthogonal where it
            lies between them; otherwise, or where a fitted direction's reliability is under .5, undetermined

All are near 0 for unrelated terms; noise in a fitted direction draws the last two towards 0. Intervals are over
prompts, by leaving each (from 61 of a set on, blocks of them) out of everything it enters, a fitted direction included.
That of the optimisation test is no narrower than Wilson's of as many coins as spread like its shuffles (`term_scores`),
that of scores which rank alike in every prompt than of as many coins as prompts. Every label has its own 5%: nothing
corrects for the number of terms.

This is an analogy. arXiv 2603.30036 classifies, before training, a reward on a chain of thought beside a reward on the
output: can a text that shows the computation the output needs also have the highest reward? Reward models that score
whole responses have no such split. The three words are the paper's; the four tests, their statistics and the edges are
ours, and its findings on monitorability do not carry over.

What this cannot show: what training on the sum would do. A pool of responses is what one policy says, and a direction
is one average; terms may agree on both and part elsewhere.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.shared.split_half import HELD_BACK
from reward_lens.methods.terms import direction_cosines as cosines
from reward_lens.methods.terms.direction_cosines import Measured
from reward_lens.methods.terms.reward_terms import Pool, Term, common_space, pool_of, prompts, reward_terms
from reward_lens.methods.terms.term_table import TermTable
from reward_lens.methods.terms.term_tests import losses_at_best, measured, own_effect, whitened
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

TESTS = ("score", "direction", "intervention", "optimisation")
EDGE = 0.2
UNITS = {
    "score": "rank correlation", "direction": "cosine", "intervention": "SD of the other score per SD of the own",
    "optimisation": "1 - share of the gap of shuffled responses",
}  # fmt: skip


@checked_arguments
@torch.no_grad()
def term_conflict(
    rm: RewardModel,
    terms,
    tests: Sequence[str] = TESTS,
    responses: Iterable | None = None,
    regions: Mapping[str, float] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> Result:
    """Relation of every two of several reward terms, by test, with a label only where the numbers decide.

    Parameters
    ----------
    terms: {name: term}, at least two. A term is one of: pairs whose chosen response is what the term wants and whose
        rejected response is the original, read by `rm`; a `RewardModel`, for example `rm.for_objective(name)`; or the
        Result of another model's `score_many` on the same `responses`. Pairs and responses share no prompt.
    tests: some of "score", "direction", "intervention", "optimisation". Terms of two networks have no common axes:
        there direction and intervention are not asked, and only the other two have a say in the joint label.
    responses: groups of two or more responses a prompt; all tests but "direction" between pairs need them.
    regions: {test: edge}, 0 < edge < 1; .2 for every test not named. Published cut-offs on raw cosines (.5, .2, -.3)
        say "orthogonal" of nearly everything under 100 prompts, where noise alone pulls a cosine to 0.

    Returns value (term, other, test), by `unit_of`, with `low`, `high`. Symmetric but for the intervention, which moves
    along `term` and reads `other`. By (term, other, test): `label`; `reason` where undetermined; `needed`, prompts that
    would settle it if the value stayed as it is (an extrapolation; NaN: none would, or no telling). By (term,
    other): `joint`, the label on which all the tests asked agree, else "undetermined"; `cosine_whitened` with its ends,
    the direction test in the metric of the natural covariance, shrunk and held fixed; `loss` with its ends, SDs of
    `term` lost at the best response for the sum (mean over tied ones; a fitted direction is held fixed). By term:
    `reliability`; `own_effect` with its ends, SDs that its own score moves by in the intervention: where they are not
    above 0 there is no positive control and no label (a low bar, as the direction was taken from that score).
    `meta["n"]` has the numbers of prompts, `meta["joint_reason"]` says why a joint label is missing.
    Raises `DataError` under 6 prompts, for unknown tests or edges, terms without what a test needs, and prompts in both
    pairs and responses.
    """
    tests, edges = _settings(tests, regions)
    pool = None if responses is None else pool_of(responses)
    if pool is None and set(tests) != {"direction"}:
        raise DataError("These tests need responses", found=f"tests {', '.join(tests)}, and responses=None",
                        expected="groups of responses that both terms score",
                        do="pass responses=[rl.Group(...), ...], or tests=('direction',)")  # fmt: skip
    built = reward_terms(rm, terms, pool)
    table, relied = related(built, tests, edges, pool, n_boot, seed)
    names = table.names
    joint, why = table.joint()
    labels: dict[str, Any] = {
        "term": np.array(names, dtype=object), "other": np.array(names, dtype=object),
        "test": np.array(tests, dtype=object),
        "unit_of": ("test", np.array([UNITS[t] for t in tests], dtype=object)),
        "edge": ("test", np.array([edges[t] for t in tests])),
        "reliability": ("term", np.array([relied[n].value if n in relied else math.nan for n in names])),
        "joint": (("term", "other"), joint), **table.coords(),
    }  # fmt: skip
    ends = {key: xr.DataArray(table.cells[key], dims=("term", "other", "test"), coords=labels)
            for key in ("value", "low", "high")}  # fmt: skip
    open_ = int((table.text["label"][np.triu_indices(len(names), 1)] == "undetermined").sum())
    meta = rm.describe(
        "term_conflict", None if pool is None else pool.groups, seed=seed, title="Relation of reward terms",
        settings={"tests": list(tests), "edges": edges, "n_boot": n_boot, "least_reliability": HELD_BACK},
        interval={"level": 0.95, "unit": "prompt", "method": "jackknife values in stats.mean_interval"},
        n=prompts(built, pool), kinds={t.name: t.kind for t in built}, joint_reason=why,
        terms_reliability={name: {"value": m.value, "low": _or_none(m.low), "high": _or_none(m.high), "n": m.n}
                           for name, m in relied.items()},
        shows="How two reward terms relate by their scores, their directions, an intervention and the best of several "
        "responses, each labelled only where its interval lies in one region.",
        cannot_show="What training on the sum of the terms would do. The words are those of arXiv 2603.30036, for "
        "another setting; the tests are this library's, and an undetermined label is no sign of independence.",
    )  # fmt: skip
    return Result(
        "term_conflict", ends["value"], unit="by test", meta=meta, low=ends["low"], high=ends["high"],
        checks=[Check("undetermined labels", float(open_), math.inf, "pairs of terms and tests")],
        undefined="a term beside itself, or a test that these terms cannot be put to (see reason)",
    )  # fmt: skip


def related(
    terms: Sequence[Term], tests: tuple[str, ...], edges: Mapping[str, float], pool: Pool | None, n_boot: int, seed: int
) -> tuple[TermTable, dict[str, Measured]]:
    """The table of every two terms, and the reliability of the directions."""
    relied = {t.name: cosines.reliability(t.moves, n_boot, seed) for t in terms if t.moves is not None}
    scoring = {} if pool is None else {t.name: t.as_scored(pool) for t in terms if t.kind == "pairs"}
    as_scores = {name: cosines.reliability(moves, n_boot, seed) for name, moves in scoring.items()}
    table = TermTable([t.name for t in terms], tests)
    for (i, a), (j, b) in itertools.combinations(enumerate(terms), 2):
        apart = common_space(a, b)
        for test in tests:
            if apart and test in ("direction", "intervention"):
                table.put(i, j, test, [_none(apart)] * 2, "undetermined", apart, math.nan, asked=False)
                continue
            ways = measured(a, b, test, pool, scoring, n_boot, seed)
            control = (
                "" if test != "intervention" or pool is None else _control(table, (i, a), (j, b), pool, n_boot, seed)
            )
            told = verdict(ways, edges[test], held_back(a, b, test, relied, as_scores), control)
            table.put(i, j, test, ways, *told)
        if "direction" in tests and not apart:
            table.pair("cosine_whitened", i, j, [whitened(a, b, n_boot, seed)] * 2)
        if pool is not None:
            table.pair("loss", i, j, losses_at_best(a, b, pool, n_boot, seed))
    return table, relied


def verdict(ways: Sequence[Measured], edge: float, held_back: tuple[str, float], control: str):
    """Label, reason and prompts needed; of two ways both have to lie in the region."""
    low, high = min(m.low for m in ways), max(m.high for m in ways)
    if held_back[0]:
        return "undetermined", *held_back
    missing = next((m.reason for m in ways if m.reason), "") or control
    if missing or math.isnan(low) or math.isnan(high):
        return "undetermined", missing or "no interval", math.nan
    label = (
        "aligned" if low > edge
        else "in_conflict" if high < -edge
        else "orthogonal" if low > -edge and high < edge
        else "undetermined"
    )  # fmt: skip
    if label != "undetermined":
        return label, "", math.nan
    needed = [m.n * ((m.high - m.low) / 2 / max(min(abs(m.value - e) for e in (-edge, edge)), 1e-9)) ** 2 for m in ways]
    reached = ", ".join(f"{e:g}" for e in (-edge, edge) if low <= e <= high)
    return label, f"the interval, {low:.2f} to {high:.2f}, holds {reached}", float(np.ceil(min(max(needed), 1e9)))


def held_back(
    a: Term, b: Term, test: str, relied: Mapping[str, Measured], relied_scores: Mapping[str, Measured]
) -> tuple[str, float]:
    """Which fitted direction is too noisy for the test, and the prompts at which it would not be.

    Where a direction of pairs scores responses, it is judged by how it orders them.
    """
    used = {t.name: relied[t.name] if test == "direction" or t.kind == "model" else relied_scores[t.name]
            for t in (a, b) if t.kind == "pairs" or test in ("direction", "intervention")}  # fmt: skip
    poor = {name: m for name, m in used.items() if not m.value >= HELD_BACK}
    if not poor:
        return "", math.nan
    needed = [math.ceil(m.n * (1 - m.value) / m.value * HELD_BACK / (1 - HELD_BACK)) if m.value > 0 else math.nan
              for m in poor.values()]  # fmt: skip
    said = ", ".join(f"{name!r} {m.value:.2f} at {m.n} prompts" for name, m in poor.items())
    return f"reliability of a direction under {HELD_BACK:g}: {said}", float(np.max(needed))


def _control(table: TermTable, one: tuple[int, Term], two: tuple[int, Term], pool: Pool, n_boot: int, seed: int) -> str:
    """Empty where each direction raises its own term's score; measured once a term."""
    failed = [
        repr(t.name)
        for place, t in (one, two)
        if not table.own(place, lambda t=t: own_effect(t, pool, n_boot, seed)) > 0
    ]
    return f"no positive control: the direction of {' and '.join(failed)} raises no score of its own" if failed else ""


def _none(reason: str) -> Measured:
    return Measured(math.nan, math.nan, math.nan, 0, reason)


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else x


def _settings(tests, regions) -> tuple[tuple[str, ...], dict[str, float]]:
    asked = (tests,) if isinstance(tests, str) else tuple(tests)
    edges = {test: EDGE for test in TESTS} | dict(regions or {})
    known = bool(asked) and set(asked) <= set(TESTS) and len(set(asked)) == len(asked) and set(edges) == set(TESTS)
    if not known or not all(0 < edge < 1 for edge in edges.values()):
        raise DataError(
            "The tests of the terms were not understood",
            found=f"tests={tests!r}, regions={regions!r}",
            expected=f"different ones of {', '.join(TESTS)}; edges between 0 and 1 by test",
            do="correct these; the defaults are a good start",
        )
    return asked, {test: float(edges[test]) for test in asked}
