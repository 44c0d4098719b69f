"""From which step on is an event more frequent than a given rate? Many looks, one level.

    qualifies    step t at level g: the one-sided Clopper-Pearson lower bound of k_t / n_t is over the rate, which is to
                 say P(X >= k_t) < g for X binomial(n_t, rate)
    spent        the first step that qualifies at level alpha / number of steps
    two running  the first of two steps running that both qualify at level g, g the largest whose size is at most alpha

The size of a rule is the chance that it finds an onset anywhere in a run whose true rate is the given rate at every
step. It is computed: of one look a step 1 - prod_t (1 - q_t), q_t = P(X >= smallest k that qualifies), and of two
running by a Markov chain over "the last step qualified". Looking at every step at level alpha has a size far over
alpha: .64 at a rate of .02, 200 episodes, 20 steps.

Fixed: episodes of a step are independent, and so are steps, given their rates. What this cannot show: when the rate
itself passed the given one; a step is found when its count says so, later with fewer episodes.

Reference: Clopper and Pearson 1934; the rate of .02 and its use: MacDiarmid et al. 2025, arXiv 2511.18397.
"""

import dataclasses

import numpy as np

from reward_lens.errors import DataError

RULES = ("spent", "two running")


@dataclasses.dataclass(frozen=True)
class Onset:
    """Where an onset was found, and what the rule does in a run without one.

    `index` is None where no step was found; `noticed` is the step at which the rule could tell (the second of two).
    `lower` are the steps' lower bounds at `level`, `smallest` the counts that qualify (n + 1: none does). `size` is the
    rule's, `uncorrected` that of looking at every step at level alpha.
    """

    rule: str
    index: int | None
    noticed: int | None
    level: float
    lower: np.ndarray
    smallest: np.ndarray
    size: float
    uncorrected: float


def find_onset(counts: np.ndarray, n: np.ndarray, rate: float, alpha: float, rule: str = "spent") -> Onset:
    """The onset in `counts` [step] of `n` [step] by one of `RULES`. Raises `DataError` for another rule."""
    if rule not in RULES:
        raise DataError(f"No onset rule '{rule}'", found=repr(rule), expected=" or ".join(RULES), do="use either")
    level = alpha / len(n) if rule == "spent" else two_running_level(n, rate, alpha)
    smallest = smallest_counts(n, rate, level)
    over = counts >= smallest
    running = over[:-1] & over[1:]
    found = np.flatnonzero(over if rule == "spent" else running)
    index = int(found[0]) if len(found) else None
    chance = qualifying_chance(n, rate, level)
    return Onset(
        rule, index, None if index is None else index + (rule == "two running"), level, lower_bounds(counts, n, level),
        smallest, any_step_size(chance) if rule == "spent" else two_running_size(chance),
        any_step_size(qualifying_chance(n, rate, alpha)),
    )  # fmt: skip


def lower_bounds(counts: np.ndarray, n: np.ndarray, level: float) -> np.ndarray:
    """One-sided Clopper-Pearson lower bounds [step] at `level` of `counts` out of `n`."""
    from scipy.stats import beta

    some = counts > 0
    return np.where(some, beta.ppf(level, np.where(some, counts, 1), n - np.where(some, counts, 1) + 1), 0.0)


def smallest_counts(n: np.ndarray, rate: float, level: float) -> np.ndarray:
    """The smallest count out of each of `n` whose lower bound at `level` is over `rate`; n + 1 where none is."""
    from scipy.stats import binom

    # isf gives the least x with P(X > x) <= level, so x + 1 is the least k with P(X >= k) <= level
    return binom.isf(level, n, rate).astype(int) + 1


def qualifying_chance(n: np.ndarray, rate: float, level: float) -> np.ndarray:
    """Chance [step] that a step at exactly `rate` qualifies."""
    from scipy.stats import binom

    return binom.sf(smallest_counts(n, rate, level) - 1, n, rate)


def any_step_size(chance: np.ndarray) -> float:
    """Chance that at least one step qualifies."""
    return float(-np.expm1(np.log1p(-chance).sum()))


def two_running_size(chance: np.ndarray) -> float:
    """Chance that two steps running qualify: the absorbed share of a chain over whether the last step did."""
    before, last = 1.0, 0.0  # nothing found yet, and the last step did not (did) qualify
    for q in chance.tolist():
        before, last = (before + last) * (1 - q), before * q
    return max(0.0, 1 - before - last)


def two_running_level(n: np.ndarray, rate: float, alpha: float) -> float:
    """The largest level a step at which two running have a size of at most `alpha`, by bisection."""
    low, high = alpha / len(n), 1.0  # alpha / steps is always allowed: it holds even a single qualifying step
    for _ in range(50):
        middle = float(np.sqrt(low * high))
        allowed = two_running_size(qualifying_chance(n, rate, middle)) <= alpha
        low, high = (middle, high) if allowed else (low, middle)
    return low
