"""Onsets by hand, and the sizes of their rules by enumeration and simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import beta, binom

from reward_lens import DataError
from reward_lens.methods.training.onset import (
    any_step_size,
    find_onset,
    lower_bounds,
    qualifying_chance,
    smallest_counts,
    two_running_level,
    two_running_size,
)

EPISODES = np.full(20, 200)


def test_smallest_counts_of_one_look():
    n = np.array([50, 100, 200, 300, 500, 1000])
    assert smallest_counts(n, 0.02, 0.05).tolist() == [4, 6, 8, 11, 16, 29]


@pytest.mark.parametrize("level", [0.05, 0.0025])
def test_a_count_qualifies_exactly_where_its_lower_bound_is_over_the_rate(level):
    k = np.arange(201)
    lower = lower_bounds(k, np.full(201, 200), level)
    assert lower[0] == 0
    assert lower[7] == beta.ppf(level, 7, 194)
    np.testing.assert_array_equal(lower > 0.02, k >= smallest_counts(np.array([200]), 0.02, level)[0])


def test_where_no_count_qualifies_the_smallest_is_out_of_reach():
    assert smallest_counts(np.array([1, 2]), 0.3, 0.05).tolist() == [2, 3]


def test_the_size_of_looking_every_time():
    onset = find_onset(np.zeros(20), EPISODES, 0.02, 0.05)
    assert abs(onset.uncorrected - 0.64) < 0.005
    one = binom.sf(7, 200, 0.02)
    assert abs(onset.uncorrected - (1 - (1 - one) ** 20)) < 1e-12
    assert onset.size <= 0.05


def test_the_size_of_two_running_is_that_of_all_sequences():
    chance = np.array([0.1, 0.4, 0.2, 0.3, 0.15])
    total = 0.0
    for hits in itertools.product((False, True), repeat=5):
        if any(a and b for a, b in itertools.pairwise(hits)):
            total += np.prod(np.where(hits, chance, 1 - chance))
    assert abs(two_running_size(chance) - total) < 1e-12
    assert abs(any_step_size(chance) - (1 - np.prod(1 - chance))) < 1e-12


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_two_running_spends_what_it_may_and_no_more(n):
    episodes = np.full(20, n)
    level = two_running_level(episodes, 0.02, 0.05)
    k = smallest_counts(episodes, 0.02, level)
    assert two_running_size(binom.sf(k - 1, n, 0.02)) <= 0.05 < two_running_size(binom.sf(k - 2, n, 0.02))


@pytest.mark.parametrize("rule", ["spent", "two running"])
def test_sizes_hold_in_simulated_runs(rule):
    rng = np.random.default_rng(0)
    onset = find_onset(np.zeros(20), EPISODES, 0.02, 0.05, rule)
    over = rng.binomial(200, 0.02, (20000, 20)) >= onset.smallest
    found = over.any(1) if rule == "spent" else (over[:, 1:] & over[:, :-1]).any(1)
    assert abs(found.mean() - onset.size) < 4 * np.sqrt(onset.size / 20000)
    assert onset.size <= 0.05


def test_the_onset_is_the_first_of_two_running():
    counts = np.zeros(20, int)
    counts[[5, 9, 10, 11]] = 40
    spent, running = (find_onset(counts, EPISODES, 0.02, 0.05, rule) for rule in ("spent", "two running"))
    assert (spent.index, spent.noticed) == (5, 5)
    assert (running.index, running.noticed) == (9, 10)
    assert find_onset(np.zeros(20), EPISODES, 0.02, 0.05).index is None


def test_steps_looked_at_twice_make_no_onset():
    counts = np.array([0, 0, 9, 10, 10, 11, 12, 0])
    n = np.full(8, 200)
    once, twice = find_onset(counts, n, 0.02, 0.05), find_onset(counts.repeat(2), n.repeat(2), 0.02, 0.05)
    assert once.index is not None
    assert (twice.smallest.min() >= once.smallest.max()) and twice.level == once.level / 2
    assert twice.index is None or twice.index // 2 >= once.index


def test_another_rule_is_refused():
    with pytest.raises(DataError, match="spent or two running"):
        find_onset(np.zeros(20), EPISODES, 0.02, 0.05, "raw")


def test_chances_are_of_the_smallest_counts():
    assert qualifying_chance(np.array([200]), 0.02, 0.05)[0] == pytest.approx(binom.sf(7, 200, 0.02))
