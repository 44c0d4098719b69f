"""States of concept texts drawn by a rule: answer keys for what is computed from them.

A state is topic + effect * concept + noise, the noise with a power-law spectrum as residual streams have. The opposite
of a concept has its direction turned round. At effect 0 labels and polarities say nothing.
"""

import numpy as np
import torch

from reward_lens.methods.causation.steering import natural_directions
from reward_lens.methods.concepts import concept_statistics as over_topics
from reward_lens.methods.concepts.concept_signs import sign_test
from reward_lens.methods.shared.split_half import halves, left_out_interval, spearman_brown


def drawn(rng, n_concepts=6, n_topics=16, d=24, effect=0.0, planted=None):
    """(X, positive minus negative) of every concept and topic, and the unit vectors that were planted."""
    spectrum = 1.0 / np.sqrt(1.0 + np.arange(d))
    if planted is None:
        planted = over_topics.unit(rng.standard_normal((n_concepts, d)) * spectrum)
    noise = rng.standard_normal((2, n_concepts, n_topics, d)) * spectrum
    topic = 3.0 * rng.standard_normal((n_topics, d)) * spectrum
    positive = topic + noise[0] + effect * planted[:, None]
    negative = topic + noise[1] - effect * planted[:, None]
    return positive - positive.mean(0), positive - negative, planted


def p_values(rng, n_shuffle=99, **sizes) -> dict[str, np.ndarray]:
    """p of every test of one draw, by concept, with u a direction of the same spectrum."""
    x, differences, _ = drawn(rng, **sizes)
    n_topics, d = x.shape[1:]
    u = over_topics.unit(rng.standard_normal(d) / np.sqrt(1.0 + np.arange(d)))
    direct = over_topics.unit(x.sum(1)) @ u
    auc, left_out = over_topics.held_out_auc(x)
    projections, aucs = over_topics.shuffle_nulls(x, u, n_shuffle, rng)
    natural = natural_directions(torch.as_tensor(x.reshape(-1, d)), n_shuffle, int(rng.integers(1 << 30))).numpy()
    names = [str(t) for t in range(n_topics)]
    signs = [sign_test(differences[c], names, x[c], names, rng).p for c in range(len(x))]
    fits = [left_out_interval(float(a), b, np.asarray, np.asarray, 200, 0) for a, b in zip(auc, left_out, strict=True)]
    return {
        "random directions": over_topics.against(direct, (natural @ u)[:, None])[1],
        "shuffled labels": over_topics.against(x.mean(1) @ u, projections)[1],
        "held-out AUC": (1 + (aucs >= auc - 1e-12).sum(0)) / (1 + n_shuffle),
        "AUC's interval leaves out .5": np.array([0.0 if f["low"] > 0.5 or f["high"] < 0.5 else 1.0 for f in fits]),
        "sign": np.array(signs),
    }


def rates(runs: int, seed: int = 0, level: float = 0.05, **sizes) -> dict[str, tuple[float, float]]:
    """By test the share of p under the level, and its standard error over runs (the concepts of a run share topics)."""
    rng = np.random.default_rng(seed)
    found = [p_values(rng, **sizes) for _ in range(runs)]
    out = {}
    for name in found[0]:
        share = np.array([np.mean(one[name] <= level) for one in found])
        out[name] = float(share.mean()), float(share.std(ddof=1) / np.sqrt(runs))
    return out


def coverage(runs: int, seed: int = 0, **sizes) -> dict[str, float]:
    """Share of runs whose 95% interval holds the mean over runs: of the reliability's half cosine, and of the cosine of
    the first concept's vector with a fixed direction that leans on it."""
    rng = np.random.default_rng(seed)
    planted = drawn(np.random.default_rng(seed), **sizes)[2]
    u = over_topics.unit(planted[0] + 0.2 * rng.standard_normal(planted.shape[1]))
    fits: dict[str, list] = {"reliability": [], "direct": []}
    for _ in range(runs):
        x = drawn(rng, planted=planted, **sizes)[0][0]
        value, left_out = halves(x, 100, rng)
        fits["reliability"].append(left_out_interval(value, left_out, np.arctanh, spearman_brown, 1000, 0))
        sums = x.sum(0)
        cosine, left_out = float(over_topics.unit(sums) @ u), over_topics.unit(sums - x) @ u
        fits["direct"].append(left_out_interval(cosine, left_out, np.arctanh, np.tanh, 1000, 0))
    out = {}
    for name, some in fits.items():
        truth = np.mean([f["value"] for f in some])
        out[name] = float(np.mean([f["low"] <= truth <= f["high"] for f in some]))
    return out
