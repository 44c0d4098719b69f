"""Does an effect differ between contexts by more than its scatter within them explains?

    Q  = sum_k w_k (m_k - m)^2,  w_k = n_k / s_k^2,  m = sum w_k m_k / sum w_k        contexts k, prompts inside them
    I2 = max(0, (Q - (K - 1)) / Q)        share of the variation of the context means that is not sampling

The s_k^2 are estimated from few prompts, which inflates Q (at 8 prompts a context by two fifths), so Q is K - 1 times
Welch's F, which corrects for that; with many prompts the two agree. Interval: the noncentralities at which the
observed F is the 2.5% or 97.5% point, as I2 = nc / (nc + K - 1).

What this cannot show: that contexts without a subset label of their own behave alike; and with two or three contexts
the interval is nearly the whole range. With many contexts of few prompts, or of skewed effects, it errs too often: in
simulations without any heterogeneity p < .05 in .12 of runs of 16 contexts of 4 prompts (.08 of 8 contexts), and of
lognormal effects in .15 of 16 contexts of 4 to 30 prompts.

Reference: Higgins and Thompson 2002 (I2); Welch 1951; Hedges and Pigott 2001 (noncentral interval).
"""

import dataclasses

import numpy as np

FEWEST_PROMPTS = 4  # a context with fewer has no variance to speak of


@dataclasses.dataclass(frozen=True)
class Heterogeneity:
    """I2 with its interval, and the test behind it; `reason` says why they are NaN."""

    i2: float
    low: float
    high: float
    q: float
    p: float
    n_contexts: int
    reason: str = ""

    @classmethod
    def undefined(cls, n_contexts: int, reason: str) -> "Heterogeneity":
        nan = float("nan")
        return cls(nan, nan, nan, nan, nan, n_contexts, reason)


def heterogeneity(values, contexts, clusters=None, floor: float = 0.0, level: float = 0.95) -> Heterogeneity:
    """Heterogeneity of `values` [n] over `contexts` [n]; rows of one cluster [n] are averaged first.

    Undefined with fewer than two contexts of `FEWEST_PROMPTS` clusters, where a context has no scatter, or where no
    value is larger than `floor`.
    """
    from scipy.special import ncfdtrinc
    from statsmodels.stats.oneway import anova_oneway

    values, contexts = np.asarray(values, dtype=float), np.asarray(contexts)
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    groups = []
    for context in np.unique(contexts):
        inside = contexts == context
        means = [values[inside & (clusters == c)].mean() for c in np.unique(clusters[inside])]
        if len(means) >= FEWEST_PROMPTS:
            groups.append(np.array(means))
    k = len(groups)
    if k < 2:
        reason = f"{k} contexts (subsets) with {FEWEST_PROMPTS} prompts; I2 needs two"
        return Heterogeneity.undefined(k, reason)
    if np.abs(values).max() <= floor:
        return Heterogeneity.undefined(k, "no I2 of effects under the noise floor")
    if min(np.ptp(group) for group in groups) == 0:
        return Heterogeneity.undefined(k, "a context in which every effect is the same has no weight")
    test = anova_oneway(groups, use_var="unequal", welch_correction=True)
    f, df, rest = float(test.statistic), float(test.df_num), float(test.df_denom)
    q = df * f
    i2 = max(0.0, 1 - df / q) if q > 0 else 0.0
    # The noncentrality at which F lies at the upper (lower) tail; 0 where even the central F has it further in.
    ends = [float(ncfdtrinc(df, rest, tail, f)) if f > 0 else 0.0 for tail in ((1 + level) / 2, (1 - level) / 2)]
    low, high = (nc / (nc + df) if nc > 0 else 0.0 for nc in ends)
    # scipy looks for noncentralities up to 10,000: past an I2 of .999 the ends give way to the value.
    return Heterogeneity(i2, min(low, i2), max(high, i2), q, float(test.pvalue), k)
