"""Figures of a reward model on pairs: accuracies, length baselines, quality with length partialled out.

All functions take numpy arrays with one entry a pair: `margin` = reward(chosen) - reward(rejected),
`longer` = tokens(chosen) - tokens(rejected), `cluster` = the prompt. Intervals are 95% percentile
bootstraps over prompts.
"""

import numpy as np

DRAWS = 2000


def hits(margin):
    """1 where the chosen response has the higher reward, 1/2 for a tie."""
    return (margin > 0) + 0.5 * (margin == 0)


def balanced(margin, longer):
    """Mean of the accuracy over longer-chosen pairs and over shorter-chosen pairs."""
    return (hits(margin)[longer > 0].mean() + hits(margin)[longer < 0].mean()) / 2


def quality_and_length(margin, longer):
    """Coefficients of the logistic regression P(chosen wins) = sigmoid(a * margin / SD + b * longer / SD).

    No intercept: which of two responses is called chosen carries no information, so the fit over both
    orders has none. `a` is the log-odds per SD of margin at equal length, `b` per SD of length difference
    at equal margin. A hundredth of a ridge keeps the fit finite in draws that are separable.
    """
    x = np.stack([margin / (np.sqrt((margin**2).mean()) or 1), longer / (np.sqrt((longer**2).mean()) or 1)], 1)
    beta = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ beta))
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(2), x.T @ (1 - p) - 0.01 * beta)
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return beta


def interval(statistic, arrays, cluster, seed=0, draws=DRAWS):
    """(estimate, low, high) of `statistic(*arrays)` with whole prompts drawn with replacement."""
    rng = np.random.default_rng(seed)
    _, member = np.unique(cluster, return_inverse=True)
    rows = [np.flatnonzero(member == k) for k in range(member.max() + 1)]
    found = []
    for _ in range(draws):
        pick = np.concatenate([rows[k] for k in rng.integers(0, len(rows), len(rows))])
        found.append(statistic(*(a[pick] for a in arrays)))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return [round(float(v), 4) for v in (statistic(*arrays), low, high)]


def summary(margin, longer, cluster, draws=DRAWS):
    """Every figure of one set of pairs as a dictionary of (estimate, low, high)."""
    margin, longer, cluster = np.asarray(margin, float), np.asarray(longer, float), np.asarray(cluster)
    short, long = longer < 0, longer > 0

    def over(statistic, *arrays, keep=slice(None)):
        return interval(statistic, [a[keep] for a in arrays], cluster[keep], draws=draws)

    return {
        "pairs": len(margin),
        "prompts": len(set(cluster.tolist())),
        "shorter_chosen_pairs": int(short.sum()),
        "accuracy": over(lambda m: hits(m).mean(), margin),
        "balanced": over(balanced, margin, longer),
        "longer_chosen": over(lambda m: hits(m).mean(), margin, keep=long),
        "shorter_chosen": over(lambda m: hits(m).mean(), margin, keep=short),
        "longer_wins": over(lambda n: hits(n).mean(), longer),
        "shorter_wins": over(lambda n: hits(-n).mean(), longer),
        "quality_coefficient": over(lambda m, n: quality_and_length(m, n)[0], margin, longer),
        "length_coefficient": over(lambda m, n: quality_and_length(m, n)[1], margin, longer),
        "margin_mean": round(float(margin.mean()), 4),
        "margin_sd": round(float(margin.std()), 4),
    }


def style_matrix(chosen, rejected, draws=DRAWS):
    """RM-Bench: accuracy of chosen style i against rejected style j (concise, detailed, markdown); items x 3.

    `hard` = the rejected response is the fancier one (above the diagonal), `normal` = equal, `easy` = below.
    """
    won = hits(chosen[:, :, None] - rejected[:, None, :])
    items = np.arange(len(chosen))
    upper, lower = np.triu_indices(3, 1), np.tril_indices(3, -1)

    def over(statistic):
        return interval(statistic, [won], items, draws=draws)

    return {
        "items": len(chosen),
        "matrix": won.mean(0).round(4).tolist(),
        "accuracy": over(lambda w: w.mean()),
        "easy": over(lambda w: w.mean(0)[lower].mean()),
        "normal": over(lambda w: w.mean(0)[[0, 1, 2], [0, 1, 2]].mean()),
        "hard": over(lambda w: w.mean(0)[upper].mean()),
    }
