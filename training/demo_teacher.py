"""A frozen-feature reader whose margins guide the tuning of the adapter.

What separates good responses is spread over their tokens: a logistic reader on statistics of a middle layer over the
response beats one on the last token by 4 points of balanced accuracy. A reward model can only read one position, so
the adapter has to learn to gather that there, and a graded target per pair teaches it faster than one bit per pair.
The reader sees training pairs only, and a pair's target comes from a fit without that pair's prompt.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from demo_data import pair_weights

TAIL = 2  # tokens after the response: end of turn and line break
FOLDS = 5
PENALTY = 1e-4


@torch.no_grad()
def pooled(scorer, indices):
    """Per text: mean, maximum, minimum of the frozen blocks' output over the response, its last row, base features."""
    made = np.zeros((len(scorer.lengths), 5 * scorer.base.shape[1]), np.float32)
    for i in indices:
        rows = scorer.low[scorer.rows(i)].float()
        stop = len(rows) - TAIL
        span = rows[max(0, stop - max(1, scorer.texts.response_tokens[i])) : stop]
        made[i] = torch.cat([span.mean(0), span.amax(0), span.amin(0), rows[-1], scorer.base[i]]).numpy()
    return made


def reader(features, pairs, weights):
    x = np.stack([features[p.chosen] - features[p.rejected] for p in pairs]).astype(float)
    scale = x.std(0) + 1e-6
    x = np.concatenate([x, -x]) / scale
    fit = LogisticRegression(C=PENALTY, fit_intercept=False, max_iter=1000)
    fit.fit(x, np.repeat([1, 0], len(pairs)), sample_weight=np.tile(weights, 2))
    return fit.coef_[0] / scale


def margins(weight, features, pairs):
    return np.array([(features[p.chosen] - features[p.rejected]).astype(float) @ weight for p in pairs])


def teacher_margins(scorer, training, validation, balance):
    """(one target a training pair, one reading a validation pair); off-topic pairs have the target NaN.

    Each source has its own reader. The validation readings are not used in training: they say what to hope for.
    """
    texts = scorer.texts
    features = pooled(scorer, sorted({i for p in [*training, *validation] for i in (p.chosen, p.rejected)}))
    target, reading = np.full(len(training), np.nan), np.zeros(len(validation))
    for source in sorted({p.source for p in training}):
        rows = np.array(
            [k for k, p in enumerate(training) if p.source == source and p.subset != "off_topic"], dtype=int
        )
        pairs = [training[k] for k in rows]
        weights = np.array(pair_weights(pairs, texts, balance))
        prompts = {prompt: n % FOLDS for n, prompt in enumerate(sorted({p.prompt for p in pairs}))}
        fold = np.array([prompts[p.prompt] for p in pairs])
        for k in range(FOLDS):
            inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            weight = reader(features, [pairs[n] for n in inside], weights[inside])
            target[rows[outside]] = margins(weight, features, [pairs[n] for n in outside])
        held = [n for n, p in enumerate(validation) if p.source == source]
        whole = reader(features, pairs, weights)
        reading[held] = margins(whole, features, [validation[n] for n in held])
    return target, reading
