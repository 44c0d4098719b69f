"""Intervals and tests over preference pairs, with the prompt as the unit.

Pairs that share a prompt are not independent, so every function takes cluster labels (`Pair.prompt_key`) and resamples
or counts clusters, never rows, tokens or components. NaN marks a missing value and is left out, cell by cell. Under 6
clusters no interval of a mean is given: a bootstrap of 5 covers .83 where it claims .95.
"""

import dataclasses
import warnings
from math import factorial, prod

import numpy as np

from reward_lens.errors import DataError
from reward_lens.resampling import kept_signs, resamples

FEWEST = 6  # clusters for an interval or a test; a sign-flip test of 5 cannot reach p < .05
FEWEST_RESAMPLES = 100
FEWEST_BOOTSTRAP = 21  # clusters from which resampling takes over from the t interval
_AT_ONCE = 4_000_000  # floats of the largest temporary array (32 MB)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval; arrays where the values had trailing dims, numbers otherwise.

    `n` counts values and `n_clusters` prompts, both per cell. `method` names the rule or rules that were used.
    """

    mean: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray
    n: int | np.ndarray
    n_clusters: int | np.ndarray
    method: str


@dataclasses.dataclass(frozen=True)
class SignFlip:
    """Two-sided p of a sign-flip test over `n` prompts; `smallest_p` is the least this many could give."""

    p: float
    n: int
    exact: bool
    smallest_p: float
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A coefficient with its interval and two-sided p; `reason` says why a number is NaN."""

    value: float
    low: float
    high: float
    p: float
    n: int
    n_clusters: int
    reason: str = ""


def mean_interval(
    values, clusters, level: float = 0.95, n_boot: int = 2000, seed: int = 0, limits: tuple = (-np.inf, np.inf)
) -> Interval:
    """Mean over rows of `values` [n, ...] and its interval over `clusters` (n labels), in the values' unit.

    The interval is cut at `limits`, which no value can pass. Where the prompts are all alike, so that there is no
    spread to go by, it is Wilson's of the mean as a share of the way between them.

    With S_g, N_g the sum and count of cluster g, the mean is sum S_g / sum N_g. By the number G of clusters
    that have a value in the cell:

    - G < 6: no interval (NaN).
    - 6 to 20: mean +- t(G - 1) * se, se^2 = (G - 1) / G * sum_g (mean without g - mean)^2. This is the
      cluster-robust jackknife (CR3); for equal cluster sizes, the t interval of the cluster means.
    - more: percentile bootstrap of whole clusters (ratio of sums), its tails moved out to Phi(-sqrt(G / (G - 1))
      t(G - 1)), which undoes the percentile method's shortfall at small G (Hesterberg 2015).

    Cannot show: anything about prompts unlike these. At level .95 it covers less than it claims where values are
    strongly skewed (lognormal: .85 at G = 6, .88 at 20, .93 at 150), few prompts differ from the rest, or one has most
    rows (two thirds: .87 to .91 at G = 6 to 20). Raises `DataError` for infinite values, wrong lengths, few resamples.
    """
    values = np.asarray(values)
    codes, n_clusters = _codes(clusters, len(values))
    if n_boot < FEWEST_RESAMPLES and n_clusters >= FEWEST_BOOTSTRAP:
        raise DataError("Too few resamples for an interval", found=f"n_boot={n_boot}",
                        expected=f"at least {FEWEST_RESAMPLES}", do="leave n_boot at its default")  # fmt: skip
    cells = values.reshape(len(values), -1)
    block = max(1, _AT_ONCE // max(len(values), n_boot))
    blocks = [_block(cells[:, i : i + block], codes, n_clusters, n_boot, seed, level)
              for i in range(0, cells.shape[1], block)]  # fmt: skip
    mean, low, high, n, groups = (np.concatenate(part).reshape(values.shape[1:]) for part in zip(*blocks, strict=True))
    low, high = _within(mean, low, high, groups, level, *limits)
    rules = {"none (n < 6)": groups < FEWEST, "cluster bootstrap": groups >= FEWEST_BOOTSTRAP}
    rules["cluster t"] = ~rules["none (n < 6)"] & ~rules["cluster bootstrap"]
    fields = [field if values.ndim > 1 else field.item() for field in (mean, low, high, n, groups)]
    return Interval(*fields, method=", ".join(rule for rule, used in rules.items() if used.any()))


def sign_flip_test(values, clusters=None, n_resamples: int = 9999, seed: int = 0) -> SignFlip:
    """Is the mean of `values` [n] zero? Two-sided, over the means of the clusters (each row one, by default).

    p = share of sign assignments whose |mean| is at least the observed one: all 2^n of them up to n = 14, otherwise
    `n_resamples` drawn at random with the observed one counted in. (Flips keep the sum of squares, so |t| rises with
    |mean|: studentising would change nothing.) Cannot show a non-zero mean where the values are skewed: the null is
    symmetry about zero, and a lognormal of mean zero is rejected at .05 in .10 to .17 of runs (n = 6 to 30).
    """
    values = np.asarray(values, dtype=float)
    codes, n_clusters = _codes(np.arange(len(values)) if clusters is None else clusters, len(values))
    sums, counts = _cluster_sums(values[:, None], codes, n_clusters)
    units = sums[counts > 0] / counts[counts > 0]
    n = len(units)
    exact = n <= 14
    smallest = 2.0 ** (1 - n) if exact else max(2.0 ** (1 - n), 1 / (n_resamples + 1))
    if n < FEWEST:
        reason = f"{n} prompts; a two-sided p under .05 needs at least {FEWEST}"
        return SignFlip(np.nan, n, exact, smallest, reason)
    count, whole = 2**n if exact else n_resamples, units.sum()
    least = abs(whole) - 1e-12 * np.abs(units).sum()  # sums that differ by rounding are equal
    extreme = sum(int((abs(2 * (kept @ units) - whole) >= least).sum()) for kept in kept_signs(n, count, exact, seed))
    return SignFlip(extreme / count if exact else (extreme + 1) / (count + 1), n, exact, smallest)


def adjust(pvalues, method: str = "holm") -> np.ndarray:
    """P-values adjusted for their number, in the same shape; NaN stays NaN and does not count as a test.

    ``"holm"`` bounds the chance of any false claim (a handful of headline tests), ``"bh"`` the expected share of false
    ones among those claimed (layers x components; Benjamini and Hochberg, for tests positively dependent).
    """
    from scipy.stats import false_discovery_control
    from statsmodels.stats.multitest import multipletests

    if method not in ("holm", "bh"):
        raise DataError(f"No adjustment '{method}'", found=repr(method), expected="'holm' or 'bh'", do="use either")
    adjusted = np.array(pvalues, dtype=float)
    known = ~np.isnan(adjusted)
    if known.any():
        tests, holm = adjusted[known], method == "holm"
        adjusted[known] = multipletests(tests, method="holm")[1] if holm else false_discovery_control(tests)
    return adjusted


def spearman(x, y, level: float = 0.95) -> Estimate:
    """Spearman's rank correlation of `x` and `y` [n]; rows with a NaN are left out, ties get mean ranks.

    Interval: tanh(atanh(rho) +- z sqrt((1 + rho^2 / 2) / (n - 3))) (Bonett and Wright 2000). NaN, with a reason, for n
    < 6, for a constant input and, the interval alone, for a perfect correlation (p: its share of all orders). Rows
    count as independent: pass one row a prompt. Cannot show a linear relation, or a cause.
    """
    from scipy.stats import norm, spearmanr

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = ~(np.isnan(x) | np.isnan(y))
    x, y, n = x[keep], y[keep], int(keep.sum())
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan, np.nan, n, n, f"{n} points" if n < 3 else "one of the two is constant")
    rho, p = np.array(spearmanr(x, y)).tolist()
    if n < FEWEST:
        return Estimate(rho, np.nan, np.nan, np.nan, n, n, f"{n} points; an interval needs {FEWEST}")
    if abs(rho) > 1 - 1e-12:
        ties = np.unique(x, return_counts=True)[1].tolist()
        p = prod(map(factorial, ties)) * (1 + (ties == ties[::-1])) / factorial(n)  # of rho, and of a possible -rho
        return Estimate(rho, np.nan, np.nan, p, n, n, "a perfect correlation has no Fisher interval")
    half = norm.ppf((1 + level) / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half]).tolist()
    return Estimate(rho, low, high, p, n, n)


def wilson(successes: int | float, n: int | float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; a tie is half a success, so neither argument need be whole."""
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= successes <= n or n == 0:
        found = f"{successes} successes of {n}"
        raise DataError("No share to speak of", found=found, expected="0 <= successes <= n, n > 0", do="check both")
    low, high = np.clip(np.array(proportion_confint(successes, n, 1 - level, "wilson")), 0.0, 1.0).tolist()
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)  # exact, and rounded by the formula


def proportion_interval(values01, clusters, level: float = 0.95) -> Interval:
    """Share of successes among `values01` [n] (0, 1, or .5 for a tie) with an interval inside [0, 1].

    One row a cluster: Wilson's interval. Otherwise Wilson's with n replaced by n_eff = n / deff * (z / t(G - 1))^2,
    deff = CR3 variance of the share (see `mean_interval`) over p (1 - p) / n (Korn and Graubard 1998), held between n^2
    / sum N_g^2 (rows of a prompt say the same) and n (independent). Where deff cannot be estimated (G < 6, or p is 0 or
    1) the former is used. Ties make it wider than need be.
    """
    from scipy.stats import norm

    values = np.asarray(values01, dtype=float)
    if ((values < 0) | (values > 1)).any():
        found = f"{np.nanmin(values):g} to {np.nanmax(values):g}"
        raise DataError("A share needs successes and failures", found=found, expected="0 to 1", do="check the values")
    sums, counts = _cluster_sums(values[:, None], *_codes(clusters, len(values)))
    sums, counts = sums[counts > 0], counts[counts > 0]
    n, groups = int(counts.sum()), len(counts)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0, 0, "none (no values)")
    share = float(sums.sum() / n)
    if groups == n:
        return Interval(share, *wilson(share * n, n, level), n, groups, "wilson")
    effective = fewest = n**2 / float((counts**2).sum())
    if groups >= FEWEST and 0 < share < 1:
        variance = float(_jackknife_se(sums[:, None], counts[:, None])[0]) ** 2
        shrink = (norm.ppf((1 + level) / 2) / float(_t_quantile(level, groups))) ** 2
        effective = n if variance == 0 else float(np.clip(share * (1 - share) / variance * shrink, fewest, n))
    low, high = wilson(min(share, 1.0) * effective, effective, level)
    return Interval(share, low, high, n, groups, f"wilson, effective n {effective:.0f}")


def paired_n_needed(d: int | float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Number of prompts at which a paired t-test finds a mean shift of `d` SD with this power."""
    from scipy.stats import nct, t
    from statsmodels.stats.power import TTestPower

    if not abs(d) > 0:
        raise DataError("No number of prompts finds a shift of zero", found=f"d={d}", expected="d != 0", do="set d")
    if abs(d) > 2:  # the solver finds no root there, and the wrong side of the test has no part in the power
        shift = min(abs(d), 100.0)
        return next(n for n in range(2, 99) if nct.sf(t.isf(alpha / 2, n - 1), n - 1, shift * n**0.5) >= power)
    return int(np.ceil(TTestPower().solve_power(effect_size=abs(d), alpha=alpha, power=power)))


def partial_slope(y, x, control, clusters, model: str = "ols", level: float = 0.95) -> Estimate:
    """Coefficient of `x` [n] in `y` [n] ~ 1 + x + control ([n] or [n, k]), errors clustered by prompt.

    ``"ols"`` is least squares, in units of y per unit of x, its error the jackknife's (CR3, as in `mean_interval`);
    ``"logit"`` a logistic regression of y in {0, 1}, in log-odds per unit of x, its error that of the fit's last step,
    which is one of least squares. Interval and p from t(G - 1); none under 6 clusters, for a constant y or where x less
    one cluster is a linear function of the control. Rows with a NaN are left out. The value is NaN, with a reason,
    where x is such a function or the logistic fit has no maximum (separable data). CR1 rejects an OLS slope of 0 in .15
    of cases at 6 clusters, a logit one in .10 to .24 where one of 20 to 60 clusters has half of the rows or more; CR3
    in .05. Where x differs in few clusters both reject too often (of 48: .14 with 2, .08 with 5).

    Cannot show an effect net of what is not among the controls, nor one that is not linear in them.
    """
    from scipy.stats import t

    if model not in ("ols", "logit"):
        raise DataError(f"No model '{model}'", found=repr(model), expected="'ols' or 'logit'", do="use either")
    y, x, control = (np.asarray(a, dtype=float) for a in (y, x, control))
    design = np.column_stack([np.ones(len(y)), x, control])
    keep = ~(np.isnan(y) | np.isnan(design).any(1))
    codes, groups = _codes(np.asarray(clusters)[keep], int(keep.sum()))
    y, design = y[keep], design[keep]
    undefined = (np.nan, np.nan, np.nan, np.nan, len(y), groups)
    if len(y) <= design.shape[1] or _rank(design) == _rank(np.delete(design, 1, axis=1)):
        return Estimate(*undefined, "x is constant or a linear function of the control, or there are too few rows")
    slope, se = (_ols_slope if model == "ols" else _logit_slope)(y, design, codes, groups)
    if np.isnan(slope):
        return Estimate(*undefined, "the logistic fit has no maximum: the data are separable")
    if groups < FEWEST or not se > 0:
        few = f"{groups} prompts; an interval needs {FEWEST}"
        none = "y is constant" if np.ptp(y) == 0 else "one prompt alone tells x from the control: no interval"
        return Estimate(slope, *undefined[1:], few if groups < FEWEST else none)
    half = float(_t_quantile(level, groups)) * se
    return Estimate(slope, slope - half, slope + half, float(2 * t.sf(abs(slope) / se, groups - 1)), len(y), groups)


def within_group_rank_correlation(scores, labels, kind: str = "kendall") -> float:
    """Rank agreement of `scores` [k] with `labels` [k] in one group: ``"kendall"`` (tau-b) or ``"spearman"``.

    In [-1, 1]; ties are allowed on both sides. NaN where either is constant or fewer than two have both: such a group
    orders nothing. Average over groups with `mean_interval`, one row a group.
    """
    from scipy.stats import kendalltau, spearmanr

    if kind not in ("kendall", "spearman"):
        raise DataError(f"No '{kind}'", found=repr(kind), expected="'kendall' or 'spearman'", do="use either")
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    keep = ~(np.isnan(scores) | np.isnan(labels))
    scores, labels = scores[keep], labels[keep]
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return np.array((kendalltau if kind == "kendall" else spearmanr)(scores, labels)).tolist()[0]


def _ols_slope(y: np.ndarray, design: np.ndarray, codes: np.ndarray, groups: int) -> tuple[float, float]:
    """Least squares coefficient of column 1 and its error by leaving one cluster out; NaN where that leaves none."""
    scale = np.abs(design).max(0)
    u, sizes, axes = np.linalg.svd(design / np.where(scale > 0, scale, 1.0), full_matrices=False)
    rank = _rank(design)
    basis, read = u[:, :rank], axes[:rank, 1] / sizes[:rank] / scale[1]
    moments = basis.T @ y
    # Without cluster g the normal equations in this orthonormal basis are (1 - U_g' U_g) b = U' y - U_g' y_g.
    squares = (basis[:, :, None] * basis[:, None, :]).reshape(len(y), -1)
    own, said = (_cluster_sums(v, codes, groups)[0] for v in (squares, basis * y[:, None]))
    left = np.eye(rank) - own.reshape(groups, rank, rank)
    inverse = np.linalg.pinv(left, rcond=1e-9, hermitian=True)
    slope, without = float(moments @ read), np.einsum("i,gij,gj->g", read, inverse, moments - said)
    if np.ptp(y) == 0 or not np.allclose(left @ inverse @ read, read, atol=1e-6 * np.abs(read).max()):
        return slope, np.nan
    return slope, float(np.sqrt((groups - 1) / groups * ((without - slope) ** 2).sum()))


def _logit_slope(y: np.ndarray, design: np.ndarray, codes: np.ndarray, groups: int) -> tuple[float, float]:
    """Coefficient of column 1 in a logistic regression and its clustered error; NaN where there is no maximum."""
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import PerfectSeparationError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit without a maximum warns at each step; its outcome tells
        try:
            fit = sm.Logit(y, design).fit(disp=0, maxiter=100)
        except (PerfectSeparationError, np.linalg.LinAlgError):
            return np.nan, np.nan
    if not fit.mle_retvals["converged"]:
        return np.nan, np.nan
    chance = fit.predict()  # the last step is least squares of a working response on the weighted design
    weight = np.sqrt(np.maximum(chance * (1 - chance), np.finfo(float).tiny))
    working = weight * fit.fittedvalues + (y - chance) / weight
    return float(fit.params[1]), _ols_slope(working, design * weight[:, None], codes, groups)[1]


def _codes(clusters, n: int) -> tuple[np.ndarray, int]:
    """Clusters as integers 0 .. G - 1, and G."""
    clusters = np.asarray(clusters)
    if clusters.shape != (n,) or n == 0:
        raise DataError("Values and cluster labels do not match",
                        found=f"{n} rows and labels of shape {clusters.shape}",
                        expected="one label a row, and at least one row",
                        do="pass [pair.prompt_key for pair in pairs]")  # fmt: skip
    labels, codes = np.unique(clusters, return_inverse=True)
    return codes, len(labels)


def _cluster_sums(values: np.ndarray, codes: np.ndarray, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the values that are there, per cluster and cell: two arrays [G, cells]."""
    from scipy.sparse import csr_array

    member = csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n_clusters, len(codes)))
    if np.isinf(values).any():
        found = f"{int(np.isinf(values).sum())} infinite values"
        do = "look for overflow in the model's outputs"
        raise DataError("Infinite values have no mean", found=found, expected="finite values, or NaN", do=do)
    there = ~np.isnan(values)
    return member @ np.where(there, values, 0.0), member @ there.astype(float)


def _jackknife_se(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Standard error of sum S / sum N by leaving one cluster out, among the clusters that have a value."""
    groups = (counts > 0).sum(0)
    total, n = sums.sum(0), counts.sum(0)
    shift = np.where(counts > 0, (total - sums) / (n - counts) - total / n, 0.0)
    return np.sqrt((groups - 1) / groups * (shift**2).sum(0))


def _t_quantile(level: float, groups):
    from scipy.stats import t

    return t.ppf((1 + level) / 2, np.asarray(groups) - 1)


def _block(values, codes, n_clusters, n_boot, seed, level) -> tuple[np.ndarray, ...]:
    """Mean, low, high, number of values and of clusters for some of the cells of `mean_interval`."""
    sums, counts = _cluster_sums(values.astype(float), codes, n_clusters)
    n, groups = counts.sum(0), (counts > 0).sum(0)
    mean = np.divide(sums.sum(0), n, out=np.full(len(n), np.nan), where=n > 0)
    low, high = np.full(len(n), np.nan), np.full(len(n), np.nan)
    middle, many = (groups >= FEWEST) & (groups < FEWEST_BOOTSTRAP), groups >= FEWEST_BOOTSTRAP
    if middle.any():
        half = _t_quantile(level, groups[middle]) * _jackknife_se(sums[:, middle], counts[:, middle])
        low[middle], high[middle] = mean[middle] - half, mean[middle] + half
    if many.any():
        sums, counts, drawn = sums[:, many], counts[:, many], resamples(n_clusters, n_boot, seed)
        counts = counts[:, :1] if (counts == counts[:, :1]).all() else counts  # no gaps: one column speaks for all
        pieces = np.array_split(drawn, -(-drawn.size // _AT_ONCE))
        means = np.concatenate([(w @ sums) / (w @ counts) for w in (piece.astype(float) for piece in pieces)])
        low[many], high[many] = _percentiles(means, groups[many], level)
    return mean, low, high, n.astype(int), groups


def _within(mean, low, high, groups, level: float, least: float, most: float) -> np.ndarray:
    """Ends cut at the limits of the values, or Wilson's where they are finite and the interval has no width."""
    from statsmodels.stats.proportion import proportion_confint

    ends, span = np.array([low, high]), most - least
    if np.isfinite(span):
        flat, n = ends[1] - ends[0] <= 1e-9 * span, np.maximum(groups, 1)
        share = np.where(flat, (mean - least) / span, 0.0)
        low, high = proportion_confint(share * n, n, 1 - level, "wilson")
        ends = np.where(flat, least + span * np.array([np.minimum(low, share), np.maximum(high, share)]), ends)
    return np.clip(ends, least, most)


def _percentiles(means: np.ndarray, groups: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the bootstrap interval of each cell; cells with as many clusters share their two quantiles."""
    from scipy.stats import norm

    low, high = np.empty(len(groups)), np.empty(len(groups))
    for count in np.unique(groups):
        tail = norm.cdf(-np.sqrt(count / (count - 1)) * _t_quantile(level, count))
        same = groups == count
        low[same], high[same] = np.quantile(means[:, same], [tail, 1 - tail], axis=0)
    return low, high


def _rank(design: np.ndarray) -> int:
    scale = np.abs(design).max(0)
    return int(np.linalg.matrix_rank(design / np.where(scale > 0, scale, 1.0)))
