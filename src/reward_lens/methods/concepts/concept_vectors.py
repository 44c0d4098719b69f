"""A direction of the residual stream for every concept of a set of texts, with its reliability.

    X[c, t] = P (mean state of the texts of concept c on topic t  -  mean of that over all concepts)
    v_c     = mean over the shared topics of X[c, t]

P projects out the leading principal components of neutral texts, as many as hold `denoise_var` of their variance. The
state is the residual entering block `depth`, read at two places: `pos` "response" (mean over the response's tokens) and
"reward" (the position that the head reads). Topics are shared by all concepts, so that what differs between topics is
in no vector; the grand mean is subtracted, so the vectors sum to zero: each says what sets a concept apart from the
others of this set, and another set would give other vectors.

The unit is the topic: the texts of a concept on one topic are averaged first. Reliability: `methods.split_half`.

What this cannot show: that the model uses a direction (see `valuation`), or that the texts show what the concept's name
says and not whatever else they share (`valuation` tests the sign against texts of the opposite).

Reference: Sofroniew et al. 2026, arXiv 2604.07729 (recipe; their means leave out the first 50 tokens of a story, ours
take all of a short response). The reward position and the reliability are our additions.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from reward_lens import stats
from reward_lens.arguments import checked_arguments
from reward_lens.data.concepts import NEUTRAL, ConceptTexts, as_concept_texts
from reward_lens.errors import DataError
from reward_lens.methods.concepts.concept_states import POSITIONS, cell_means, site_at, text_states
from reward_lens.methods.concepts.concept_statistics import neutral_basis
from reward_lens.methods.shared.split_half import FEWEST_SPLITS, HELD_BACK, halves, left_out_interval, spearman_brown
from reward_lens.model.head import trunk_name
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result


@checked_arguments
@torch.no_grad()
def concept_vectors(
    rm: RewardModel,
    texts,
    neutral=None,
    depth: int | None = None,
    denoise_var: int | float = 0.5,
    n_splits: int = 200,
    n_boot: int = 2000,
    seed: int = 0,
) -> Result:
    """Vectors of the concepts of some texts at both read positions. Costs one forward a text.

    Parameters
    ----------
    texts: `ConceptTexts` (see `load_concepts`) or an iterable of `ConceptText`; the positive ones make the vectors.
    neutral: texts of no concept; None: those of `texts` that are marked neutral.
    depth: the residual entering this block, 0 to n_layers. None: two thirds. At n_layers, what the final norm reads,
        the direct valuation of a vector is exact.
    denoise_var: share of the neutral texts' variance whose components are projected out, from 0 (none) to under 1.
    n_splits: random halvings of the topics, at least 50.
    n_boot: resamples of the intervals (from 21 topics on).

    Returns value (concept, topic, pos, d_model), X above, in the residual's own unit; `mean` (concept, pos, d_model) is
    the vectors. Coordinates (concept, pos): `reliability` with `reliability_low` and `reliability_high`, the cosine to
    expect with the vector of as many other topics; `norm` of the vector and `norm_share`, of the texts' mean residual
    norm. `reward` (concept, topic), the mean reward of the texts; `texts` (concept), their number. In `meta`:
    `topics_left_out`, those that not every concept has; `neutral`, by position the number of components that were
    projected out and of neutral topics; `topics_needed`.
    Raises `DataError` under 2 concepts, under 6 shared topics and, unless denoise_var is 0, under 6 neutral topics.
    """
    given = as_concept_texts(texts)
    blank = given.neutral if neutral is None else list(as_concept_texts(neutral))
    blank = [dataclasses.replace(t, concept=NEUTRAL, polarity="positive") for t in blank]
    depth = round(2 * rm.n_layers / 3) if depth is None else depth
    concepts, topics, left_out = _shared_topics(given)
    blank_topics = sorted({t.topic for t in blank})
    _require(rm, concepts, topics, left_out, blank_topics, depth, denoise_var, n_splits, n_boot)
    shared = set(topics)
    used = [t for t in given.of("positive") if t.topic in shared]
    found = text_states(rm, used, depth)
    x = cell_means(found.states, used, concepts, topics)
    x = x - x.mean(0)
    removed = dict.fromkeys(POSITIONS, 0)
    if denoise_var:
        states = cell_means(text_states(rm, blank, depth).states, blank, [NEUTRAL], blank_topics)[0]
        for p, pos in enumerate(POSITIONS):
            basis = neutral_basis(states[:, p], float(denoise_var))
            x[:, :, p] -= (x[:, :, p] @ basis.T) @ basis
            removed[pos] = len(basis)
    mean, size = x.mean(1), found.norms.mean(0)
    norm = np.linalg.norm(mean, axis=-1)
    if not (norm > 1e-9 * size).all():
        where = ", ".join(f"{concepts[c]} ({POSITIONS[p]})" for c, p in np.argwhere(norm <= 1e-9 * size)[:4])
        raise DataError(
            "A concept leaves no direction",
            found=f"a mean of zero for {where}",
            expected="texts whose states differ from the mean over concepts",
            do="check that the texts of the concepts differ; at depth 0 the template's tail is the same for all texts",
        )
    reliability = [[_reliability(x[c, :, p], n_splits, n_boot, seed) for p in range(2)] for c in range(len(concepts))]
    here, counts = ("concept", "pos"), [sum(t.concept == c for t in used) for c in concepts]
    coords: dict[str, Any] = {
        "concept": np.array(concepts, dtype=object),
        "topic": np.array(topics, dtype=object),
        "pos": np.array(POSITIONS, dtype=object),
        "d_model": np.arange(rm.d_model),
        "norm": (here, norm),
        "norm_share": (here, norm / size),
        "reward": (("concept", "topic"), cell_means(found.rewards, used, concepts, topics)),
        "texts": ("concept", np.array(counts)),
    }
    for name, key in (("reliability", "value"), ("reliability_low", "low"), ("reliability_high", "high")):
        coords[name] = (here, np.array([[one[key] for one in row] for row in reliability]))
    value = xr.DataArray(x, dims=("concept", "topic", "pos", "d_model"), coords=coords)
    vectors = value.drop_vars(["topic", "reward"]).isel(topic=0, drop=True).copy(data=mean)
    meta = rm.describe(
        "concept_vectors", used, seed=seed, title=f"Concept vectors at depth {depth}", trunk=trunk_name(rm),
        settings={"depth": depth, "site": str(site_at(rm, depth)), "denoise_var": float(denoise_var),
                  "n_splits": n_splits, "n_boot": n_boot},
        interval={"level": 0.95, "unit": "topic", "method": "jackknife values in stats.mean_interval"},
        source=given.source, n_topics=len(topics), topics_left_out=left_out, topics_needed=stats.FEWEST,
        neutral={"components": removed, "topics": len(blank_topics) if denoise_var else 0},
        held_back=HELD_BACK, below=[f"{concepts[c]} ({pos})" for c in range(len(concepts))
                                    for p, pos in enumerate(POSITIONS) if reliability[c][p]["value"] < HELD_BACK],
        shows=f"In which direction each of {len(concepts)} concepts differs from the mean over them, over "
        f"{len(topics)} shared topics, and how well these topics determine it.",
        cannot_show="That the model uses a direction, or that the texts show what the concept's name says. Under a "
        f"reliability of {HELD_BACK:.2f} as many other topics would give a rather different vector.",
    )  # fmt: skip
    gap = float(np.abs(mean.sum(0)).max() / norm.max())
    checks = [Check("vectors sum to zero", gap, 1e-9)]
    return Result("concept_vectors", value, unit="residual", mean=vectors, checks=checks, meta=meta)


def _shared_topics(texts: ConceptTexts) -> tuple[list[str], list[str], list[str]]:
    """Concepts, the topics on which all of them have positive texts, and the other topics of theirs."""
    concepts = list(texts.concepts)
    has = {c: {t.topic for t in texts.of("positive") if t.concept == c} for c in concepts}
    every = set().union(*has.values())
    shared = every.intersection(*has.values())
    return concepts, sorted(shared), sorted(every - shared)


def _require(rm, concepts, topics, left_out, blank_topics, depth, denoise_var, n_splits: int, n_boot: int) -> None:
    if len(concepts) < 2:
        raise DataError("Concept vectors are differences from a mean over concepts", found=f"{len(concepts)} concepts",
                        expected="at least 2", do="pass positive texts of several concepts")  # fmt: skip
    if len(topics) < stats.FEWEST:
        raise DataError(
            "The concepts share too few topics",
            found=f"{len(topics)} topics with texts of all {len(concepts)} concepts, {len(left_out)} others",
            expected=f"at least {stats.FEWEST}: under that there is no interval; 40 and more are usual",
            do="write texts of every concept on the same topics",
        )
    if denoise_var and len(blank_topics) < stats.FEWEST:
        raise DataError(
            "There are too few neutral texts to take components from",
            found=f"neutral texts on {len(blank_topics)} topics",
            expected=f"at least {stats.FEWEST}",
            do="pass neutral=, or denoise_var=0 to project nothing out",
        )
    if not 0 <= depth <= rm.n_layers or not 0 <= denoise_var < 1 or n_splits < FEWEST_SPLITS or n_boot < 1:
        raise DataError(
            "The vectors were not understood",
            found=f"depth={depth}, denoise_var={denoise_var}, n_splits={n_splits}, n_boot={n_boot}",
            expected=f"a depth of 0 to {rm.n_layers}, denoise_var from 0 to under 1, n_splits of at least "
            f"{FEWEST_SPLITS}, n_boot of at least 1",
            do="correct these; the defaults are a good start",
        )


def _reliability(x: Float[np.ndarray, "t d_model"], n_splits: int, n_boot: int, seed: int) -> dict[str, Any]:
    value, left_out = halves(x, n_splits, np.random.default_rng(seed))
    return left_out_interval(value, left_out, np.arctanh, spearman_brown, n_boot, seed)
