"""By how much do rates differ between two periods of one run, when steps of a run resemble their neighbours?

    mean        m = mean over the L steps of a period of count / n, every step alike
    variance    v = b / (L - b) mean_i (M_i - m)^2, M_i the mean of the steps i .. i + b - 1, b = sqrt(L) rounded
    floor       v is at least what counting alone gives: sum_t p (1 - p) / n_t / L^2, p = (K + 1/2) / (N + 1) of the
                period's K events among N
    difference  m_after - m_before +- t(df) sqrt(v_after + v_before), df by Welch from 1.5 (L / b - 1) a period

v is the variance that a moving block bootstrap of the steps has, in closed form, times L / (L - b), which makes it
unbiased for independent steps (overlapping batch means); resampling would add noise, and its percentiles cover too
little with two or three blocks in a period. Blocks hold the binomial noise already, so counts are not drawn again: that
would count it twice. The floor is for periods whose counts are all alike, such as all 0.

What this cannot show: steps that resemble each other over more than b steps make the intervals too short.

Reference: Kunsch 1989 (moving blocks); Meketon and Schmeiser 1984 (overlapping batch means, degrees of freedom).
"""

import dataclasses
import warnings

import numpy as np

from reward_lens.errors import DataError

FEWEST_SIDE = 3  # steps of a period with a variance


@dataclasses.dataclass(frozen=True)
class Shift:
    """A mean rate, or a difference of some, with the variance of it and its degrees of freedom.

    `counting` is the part of the variance that more episodes a step would take away. NaN where there is no number.
    """

    value: float
    variance: float
    df: float
    counting: float

    def __sub__(self, other: "Shift") -> "Shift":
        """The difference of two independent ones, degrees of freedom by Welch and Satterthwaite."""
        variance = self.variance + other.variance
        parts = self.variance**2 / self.df + other.variance**2 / other.df
        df = variance**2 / parts if parts > 0 else np.nan
        return Shift(self.value - other.value, variance, df, self.counting + other.counting)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided, at level 1 - `alpha`; NaN without a variance."""
        from scipy.stats import t

        half = float(t.ppf(1 - alpha / 2, self.df)) * np.sqrt(self.variance)
        return float(self.value - half), float(self.value + half)

    def p_above_zero(self) -> float:
        """One-sided p of "not above zero"; NaN without a variance."""
        from scipy.stats import t

        return float(t.sf(self.value / np.sqrt(self.variance), self.df)) if self.variance > 0 else float("nan")


NOTHING = Shift(np.nan, np.nan, np.nan, np.nan)


def block_length(n_steps: int) -> int:
    """Steps of a block: about the square root, and at least 2."""
    return max(2, round(n_steps**0.5))


def period_means(counts: np.ndarray, trials: np.ndarray) -> list[Shift]:
    """Mean rates of one period from `counts` [series, step] of `trials`: one a series, then that of their mean."""
    if counts.shape[1] == 0:
        return [NOTHING] * (len(counts) + 1)
    events, episodes = counts.sum(1), trials.sum(1)
    p = (events + 0.5) / (episodes + 1)
    floors = p * (1 - p) * (1 / trials).sum(1) / trials.shape[1] ** 2
    rates = counts / trials
    means = [_mean(series, floor) for series, floor in zip(rates, floors, strict=True)]
    return [*means, _mean(rates.mean(0), floors.sum() / len(floors) ** 2)]


def _mean(rates: np.ndarray, floor: float) -> Shift:
    n = len(rates)
    if n < FEWEST_SIDE:
        return Shift(float(rates.mean()), np.nan, np.nan, float(floor))
    b = block_length(n)
    blocks = np.convolve(rates, np.full(b, 1 / b), mode="valid")
    variance = b / (n - b) * float(((blocks - rates.mean()) ** 2).mean())
    return Shift(float(rates.mean()), max(variance, float(floor)), 1.5 * (n / b - 1), float(floor))


@dataclasses.dataclass(frozen=True)
class Trend:
    """Mean rate of a later period if an earlier period's trend went on, and its upper limit."""

    expected: float
    upper: float


def carried_forward(steps: np.ndarray, rates: np.ndarray, n: np.ndarray, later: np.ndarray, alpha: float) -> Trend:
    """What `rates` [step], of about `n` episodes each, would come to at the `later` steps.

    logit(rate) = a + b step, fitted by quasi-likelihood with half an event and half a non-event added to every step;
    dispersion by Pearson, at least 1. `upper` is the mean over the later steps of the one-sided pointwise limits at
    level 1 - `alpha`, t(L - 2). Growth that is faster than exponential at small rates escapes it. Raises `DataError`
    under 3 steps.
    """
    import statsmodels.api as sm
    from scipy.special import expit
    from scipy.stats import t
    from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

    if len(steps) < FEWEST_SIDE:
        raise DataError("No trend from so few steps", found=f"{len(steps)} steps", expected=f"at least {FEWEST_SIDE}",
                        do="evaluate more checkpoints before the onset")  # fmt: skip
    centre, scale = steps.mean(), steps.std()
    design, ahead = (np.column_stack([np.ones(len(s)), (s - centre) / scale]) for s in (steps, later))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfectSeparationWarning)  # rates right on the line; none is 0 or 1
        fit = sm.GLM((rates * n + 0.5) / (n + 1), design, family=sm.families.Binomial(), var_weights=n + 1).fit()
    dispersion = max(1.0, float(fit.pearson_chi2) / (len(steps) - 2))
    covariance = np.asarray(fit.normalized_cov_params) * dispersion
    line = ahead @ fit.params
    error = np.sqrt(np.einsum("ti,ij,tj->t", ahead, covariance, ahead))
    quantile = float(t.ppf(1 - alpha, len(steps) - 2))
    return Trend(float(expit(line).mean()), float(expit(line + quantile * error).mean()))


def sign_consistency(values: np.ndarray) -> dict[str, float | int]:
    """How many of `values` are above and below 0, with the exact one-sided p of that many if signs were coin flips."""
    from scipy.stats import binomtest

    up, down = int((values > 0).sum()), int((values < 0).sum())
    p = float(binomtest(up, up + down, alternative="greater").pvalue) if up + down else 1.0
    return {"up": up, "down": down, "p": p, "smallest_p": 0.5 ** max(1, len(values))}


def steps_and_episodes_needed(shift: Shift, n_steps: int, episodes: float, rise: float, alpha: float) -> dict[str, int]:
    """Steps (of these episodes) or episodes a step (at these steps) for a power of .8 to tell `rise` from none.

    The second counts on steps that scatter no more than counting does.
    """
    from scipy.stats import norm

    allowed = (rise / float(norm.ppf(1 - alpha / 2) + norm.ppf(0.8))) ** 2
    steps = int(np.ceil(n_steps * max(1.0, shift.variance / allowed)))
    return {"steps": steps, "episodes_per_step": int(np.ceil(episodes * shift.counting / allowed))}
