"""Does the reward agree with the labels, and would counting tokens have agreed as well?

    accuracy     share of pairs with r(chosen) > r(rejected); a tie counts half
    calibration  sigmoid(margin) as a probability (Bradley and Terry) against how often it is right
    length       logit P(a preferred to b) = alpha (r_a - r_b) + beta (n_a - n_b), n = tokens of the response
    ranking      the same questions of lists of k responses

The prompt is the unit of every interval: pairs of one prompt count together (`stats.proportion_interval`).

What this cannot show: that the labels are right, or that the reward is right for their reason. A model that
agrees with the labels where the chosen response is longer, and only there, has learnt length.

Reference: Lambert et al. 2024, arXiv 2403.13787 (accuracy by subset); Guo et al. 2017, arXiv 1706.04599
(ECE).
"""

import functools
import itertools
from collections.abc import Iterable

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.shared.paired import given_scores
from reward_lens.methods.shared.paired_shares import ends_of_change, won
from reward_lens.methods.shared.preference_weights import preference_weight
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Result

RULES = ("reward model", "longer wins", "shorter wins")
BY_LENGTH = ("chosen longer", "chosen shorter", "equal length", "balanced")
NO_MAXIMUM = (
    "the fit has no maximum: some weighting of margin and length is right on every pair, or the two are "
    "multiples of each other"
)
DRAWS = 200  # of labels, for the ECE of a calibrated model
LEVEL = {"level": 0.95, "unit": "prompt"}


@checked_arguments
def accuracy(rm: RewardModel, pairs, scores: Result | None = None) -> Result:
    """Share of pairs whose chosen response has the higher reward, by subset, beside two length rules.

    `scores` is the Result of `rm.score_pairs(pairs)`, where there is one already: then no text is scored
    again.

    Returns value (subset, rule) as a fraction with its interval. `rule` is "reward model", "longer wins" or
    "shorter wins" (response tokens; a tie counts half). `subset` begins with "all"; its coordinate `group`
    says what a row is: "all", "subset" (the pairs' own labels) or "length": "chosen longer", "chosen
    shorter", "equal length", and "balanced", the mean of the first two, which is one half for either length
    rule. Coordinates `n_pairs`, `n_prompts`, and `ahead`, `ahead_low`, `ahead_high` (subset, rule): the model's
    accuracy less a rule's on the same pairs, with the paired interval (`paired_shares`; from 6 prompts). A row without
    pairs is NaN, with the reason in the checks. Raises `DataError` if `scores` are of other pairs or of another model.
    """
    pairs = data.as_pairs(pairs)
    margin, longer = _margins(rm, pairs, scores)
    credit = np.stack([won(margin), won(longer), won(-longer)], 1)
    prompts = np.array([p.prompt_key for p in pairs])
    rows = _subset_rows(pairs, longer)
    cells = [[_share(credit[inside, i], prompts[inside]) for i in range(len(RULES))] for _, _, inside in rows]
    by_label = {label: (row, inside) for row, (label, _, inside) in zip(cells, rows, strict=True)}
    sides = (by_label["chosen longer"], by_label["chosen shorter"])
    cells.append(_balanced(*(row for row, _ in sides), *(prompts[inside] for _, inside in sides)))
    rows.append(("balanced", "length", sides[0][1] | sides[1][1]))
    cube = np.array(cells)
    ahead = [[_ahead(credit[inside, 0] - credit[inside, i], prompts[inside]) for i in range(len(RULES))]
             for _, _, inside in rows[:-1]]  # fmt: skip
    balanced = cube[-1, 0] - 0.5  # a length rule gets one half
    if len(set(prompts[rows[-1][2]])) < stats.FEWEST:
        balanced[1:] = np.nan
    ahead = np.array([*ahead, [balanced] * len(RULES)])
    ahead[:, 0] = np.nan  # of the model before itself
    labels, groups, members = zip(*rows, strict=True)
    coords = {
        "subset": np.array(labels, dtype=object),
        "group": ("subset", np.array(groups, dtype=object)),
        "n_pairs": ("subset", np.array([int(inside.sum()) for inside in members])),
        "n_prompts": ("subset", np.array([len(set(prompts[inside])) for inside in members])),
        "rule": np.array(RULES, dtype=object),
    } | {f"ahead{end}": (("subset", "rule"), ahead[..., i]) for i, end in enumerate(("", "_low", "_high"))}
    value, low, high = (xr.DataArray(cube[..., i], dims=("subset", "rule"), coords=coords) for i in range(3))
    return Result(
        "accuracy", value, unit="fraction", low=low, high=high, undefined="no pairs of that kind",
        meta=rm.describe(
            "accuracy", pairs, title="Accuracy", interval=LEVEL,
            shows="How often the chosen response has the higher reward, by subset, beside two rules that "
            "only count the response's tokens.",
            cannot_show="Why the reward prefers a response. Where a rule about length does as well, "
            "agreement with the labels is no evidence of anything else; read the balanced row.",
        ),
    )  # fmt: skip


@checked_arguments
def calibration(rm: RewardModel, pairs, scores: Result | None = None, bins: int = 10) -> Result:
    """Is sigmoid(margin) the probability that the chosen response is the preferred one?

    Every pair is labelled chosen first, so pairs are folded: predicted = sigmoid(|margin|), observed = share
    with margin > 0 (a tie counts half), in `bins` bins of equal width over [0.5, 1]. `scores` as in
    `accuracy`.

    Returns value (bin,) = the observed share, a fraction with its interval; coordinates `predicted` (mean in
    the bin), `observed`, `n` and `n_prompts`. An empty bin is NaN. `meta["summary"]`: `ece` = sum n / N
    |observed - predicted|; `ece_if_calibrated`, its mean were every pair right with the probability predicted
    (never 0: about .14 for 48 pairs in 10 bins, .05 for 500; pairs taken as independent); `brier` = mean
    (1 - sigmoid(margin))^2; `log_loss` = mean -log sigmoid(margin) (these two 0.25 and 0.693 for a model that
    always says one half); and `slope`, the factor on the margin that fits best (1 where calibrated; None where
    no factor does: all pairs right or all wrong).

    Cannot show calibration on other data: the size of rewards is arbitrary unless the model was trained with
    this loss on pairs like these. A small ECE also comes to a model that is never sure, and one near
    `ece_if_calibrated` is no sign of miscalibration.
    """
    if bins < 1:
        raise DataError("Calibration needs bins", found=f"bins={bins}", expected="1 or more", do="raise bins")
    pairs = data.as_pairs(pairs)
    margin, _ = _margins(rm, pairs, scores)
    prompts = np.array([p.prompt_key for p in pairs])
    predicted, credit = _sigmoid(np.abs(margin)), won(margin)
    edges = np.linspace(0.5, 1.0, bins + 1)
    member = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    inside = [member == i for i in range(bins)]
    n = np.array([int(m.sum()) for m in inside])
    cells = np.array([_share(credit[m], prompts[m]) for m in inside])
    mean = np.array([predicted[m].mean() if m.any() else np.nan for m in inside])
    coords = {
        "bin": np.array([f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges)], dtype=object),
        "predicted": ("bin", mean),
        "observed": ("bin", cells[:, 0]),
        "n": ("bin", n),
        "n_prompts": ("bin", np.array([len(set(prompts[m])) for m in inside])),
    }
    value, low, high = (xr.DataArray(cells[:, i], dims=("bin",), coords=coords) for i in range(3))
    summary = {
        "ece": float(np.nansum(n * np.abs(cells[:, 0] - mean)) / n.sum()),
        "ece_if_calibrated": _ece_if_calibrated([predicted[m] for m in inside]),
        "brier": float(np.mean((1 - _sigmoid(margin)) ** 2)),
        "log_loss": float(np.mean(np.logaddexp(0, -margin))),
        "slope": _slope(margin),
    }
    return Result(
        "calibration", value, unit="fraction", low=low, high=high, undefined="no pairs in the bin",
        meta=rm.describe(
            "calibration", pairs, title="Calibration of the margin", summary=summary, settings={"bins": bins},
            interval=LEVEL,
            shows="How often a margin of a given size points the right way, against what its sigmoid "
            "predicts.",
            cannot_show="Calibration on other data, or that small errors mean much: a model that is never "
            "sure is calibrated too.",
        ),
    )  # fmt: skip


@checked_arguments
def length_partial(rm: RewardModel, pairs, scores: Result | None = None) -> Result:
    """What the margin says about the label once the difference in length is accounted for, and the reverse.

    Logistic regression logit P(a preferred to b) = alpha (r_a - r_b) + beta (n_a - n_b) without intercept
    (`shared.preference_weights`). Both regressors are in units of their own root mean square over the pairs.

    Returns value (term,) in log-odds per SD: "margin_per_sd" and "length_per_sd", with intervals from the
    error clustered by prompt (CR3, t(G - 1); none under 6 prompts); the coordinate `alone` is each term's
    coefficient without the other, `sd` its SD (reward, tokens). Undefined (NaN, with the reason) where the
    fit has no maximum: some weighting of margin and length is right on every pair, or one of the two is a
    multiple of the other.

    Cannot show an effect of length that is not linear, nor anything else that goes with length.
    """
    pairs = data.as_pairs(pairs)
    margin, longer = _margins(rm, pairs, scores)
    prompts = np.array([p.prompt_key for p in pairs])
    sd = np.sqrt(np.mean([margin**2, longer**2], axis=1))
    design = np.stack([margin, longer], 1) / np.where(sd > 0, sd, 1.0)
    reason, cells, p = NO_MAXIMUM, np.full((2, 3), np.nan), [None, None]
    if not _has_no_maximum(design):
        rows = [preference_weight(design[:, i], design[:, [1 - i]], prompts) for i in range(2)]
        reason, cells = rows[0].reason or None, np.array([(row.value, row.low, row.high) for row in rows])
        p = [None if np.isnan(row.p) else row.p for row in rows]
    alone = [_slope(design[:, i]) for i in range(2)]
    coords = {
        "term": np.array(["margin_per_sd", "length_per_sd"], dtype=object),
        "alone": ("term", np.array([np.nan if slope is None else slope for slope in alone])),
        "sd": ("term", sd),
    }
    value, low, high = (xr.DataArray(cells[:, i], dims=("term",), coords=coords) for i in range(3))
    return Result(
        "length_partial", value, unit="log-odds", low=low, high=high, undefined=reason,
        meta=rm.describe(
            "length_partial", pairs, title="Margin and length", interval=LEVEL,
            p={"margin": p[0], "length": p[1]},
            shows="The weight of the reward margin in predicting the label with the difference in length "
            "held fixed, and the weight of length with the margin held fixed.",
            cannot_show="An effect of length that is not linear, or of anything else that goes with length.",
        ),
    )  # fmt: skip


@checked_arguments
def ranking(rm: RewardModel, groups: Iterable, scores: Result | None = None) -> Result:
    """How well rewards order the k responses of a prompt.

    `groups` are `rl.Group`; `scores` is the Result of `rm.score_many(groups)`, where there is one already.

    Returns value (metric,) with intervals over prompts: "top-1 accuracy" (the highest reward is on a response
    of the highest label; responses tied for it share the credit), "pairwise accuracy" (over all pairs of one
    prompt whose labels differ; a tied reward counts half) and "kendall tau-b" (mean over groups), in [-1, 1];
    the coordinate `unit_of` says which is a fraction and which a correlation, `n` over how many groups or
    pairs it runs. Groups whose labels are all equal order nothing and are left out, as are constant rewards
    from tau. NaN, with the reason, if none is left.

    Cannot show how good the best response is; and k-way accuracies compare only at equal k (chance is about
    1 / k).
    """
    groups = list(groups)
    scores = given_scores(rm, groups, scores, rm.score_many, "score_many")
    prompts = np.array([g.prompt_key for g in groups])
    top, pairwise, tau = [], [], []
    for i, group in enumerate(groups):
        k = len(group.responses)
        # The groups' own labels: rewards that were scored before may carry others.
        reward, label = scores.value.values[i, :k], np.array(group.labels or [1.0] + [0.0] * (k - 1))
        if np.ptp(label) == 0:
            continue
        first = reward == reward.max()
        top.append((prompts[i], (label[first] == label.max()).mean()))
        better, worse = np.nonzero(label[:, None] > label[None, :])
        pairwise += [(prompts[i], credit) for credit in won(reward[better] - reward[worse])]
        tau.append((prompts[i], stats.within_group_rank_correlation(reward, label)))
    cells = [_over_prompts(rows, stats.proportion_interval) for rows in (top, pairwise)]
    cells.append(_over_prompts(tau, functools.partial(stats.mean_interval, limits=(-1.0, 1.0))))
    coords = {
        "metric": np.array(["top-1 accuracy", "pairwise accuracy", "kendall tau-b"], dtype=object),
        "unit_of": ("metric", np.array(["fraction", "fraction", "correlation"], dtype=object)),
        "n": ("metric", np.array([int(cell[3]) for cell in cells])),
        "n_prompts": ("metric", np.array([int(cell[4]) for cell in cells])),
    }
    columns = np.array(cells)[:, :3].T
    value, low, high = (xr.DataArray(column, dims=("metric",), coords=coords) for column in columns)
    return Result(
        "ranking", value, unit="fraction", low=low, high=high, undefined="no group has responses that differ",
        meta=rm.describe(
            "ranking", groups, title="Ranking of k responses", interval=LEVEL,
            shows="How often the best response has the highest reward, and how far rewards order the others.",
            cannot_show="How much better one response is than another; and accuracies of lists of different "
            "lengths do not compare, because chance differs.",
        ),
    )  # fmt: skip


def _margins(rm: RewardModel, pairs: data.Pairs, scores: Result | None) -> tuple[np.ndarray, np.ndarray]:
    """Reward margin and length difference in tokens, [pair] each."""
    value = given_scores(rm, pairs, scores, rm.score_pairs, "score_pairs").value
    longer = value["chosen_tokens"].values - value["rejected_tokens"].values
    return value.sel(side="margin").values.astype(float), longer.astype(float)


def _subset_rows(pairs: data.Pairs, longer: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """(label, group, mask) of every row but the balanced one."""
    rows = [("all", "all", np.ones(len(pairs), dtype=bool))]
    subsets = np.array([p.subset or "" for p in pairs])
    for name in [name for name in dict.fromkeys(subsets.tolist()) if name]:
        taken = name in ("all", *BY_LENGTH)  # two rows of one name could not be told apart by .sel
        label = f"subset {name}" if taken else name
        rows.append((label, "subset", subsets == name))
    masks = (longer > 0, longer < 0, longer == 0)
    return rows + [(label, "length", mask) for label, mask in zip(BY_LENGTH, masks, strict=False)]


def _share(credit: np.ndarray, prompts: np.ndarray) -> tuple:
    if not len(credit):
        return np.nan, np.nan, np.nan
    over = stats.proportion_interval(credit, prompts)
    return over.mean, over.low, over.high


def _ahead(change: np.ndarray, prompts: np.ndarray) -> tuple:
    if not len(change):
        return np.nan, np.nan, np.nan
    return change.mean(), *ends_of_change(change, prompts)


def _balanced(longer, shorter, longer_prompts, shorter_prompts) -> list[tuple[float, float, float]]:
    """Mean of two shares and its interval, from each share's own (Zou and Donner 2008), for every rule.

    Half-widths add in squares where no prompt is in both, and plainly, whatever the dependence, where one is.
    """
    apart = not set(longer_prompts) & set(shorter_prompts)
    out = []
    for (p, p_low, p_high), (q, q_low, q_high) in zip(longer, shorter, strict=True):
        down, up = ((p - p_low, q - q_low), (p_high - p, q_high - q))
        reach = [np.hypot(*ends) if apart else sum(ends) for ends in (down, up)]
        out.append(((p + q) / 2, (p + q - reach[0]) / 2, (p + q + reach[1]) / 2))
    return out


def _over_prompts(rows: list[tuple[str, float]], interval) -> tuple:
    if not rows:
        return np.nan, np.nan, np.nan, 0, 0
    prompts, values = zip(*rows, strict=True)
    over = interval(np.array(values), np.array(prompts))
    return over.mean, over.low, over.high, over.n, over.n_clusters


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


def _ece_if_calibrated(bins: list[np.ndarray]) -> float:
    """Mean ECE over labels drawn at the predicted probabilities [pair] of each bin."""
    rng = np.random.default_rng(0)
    gaps = sum(np.abs(((rng.random((DRAWS, len(p))) < p) - p).sum(1)) for p in bins)
    return float(np.mean(gaps) / sum(map(len, bins)))


def _slope(x: np.ndarray) -> float | None:
    """The factor on `x` that fits "chosen is preferred" best; None where the likelihood has no maximum."""
    if not ((x > 0).any() and (x < 0).any()):
        return None
    sd = np.sqrt(np.mean(x**2))
    return preference_weight(x / sd, np.zeros((len(x), 0)), np.arange(len(x))).value / sd


def _has_no_maximum(design: np.ndarray) -> bool:
    """Whether a half-plane holds every (margin, length): the likelihood then rises for ever, or is flat."""
    rows = design[(design != 0).any(1)]
    if len(rows) < 3:
        return True
    angles = np.sort(np.arctan2(rows[:, 1], rows[:, 0]))
    return bool(np.diff(np.append(angles, angles[0] + 2 * np.pi)).max() >= np.pi - 1e-9)
