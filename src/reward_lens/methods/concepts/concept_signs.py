"""Do a concept's positive texts project higher on its vector than texts of the opposite? An exact sign test.

    positive minus negative state on topic t, projected on the mean of X[c, s] over earlier topics s

The topics come in a random order and each is projected on a vector of those before it. Given these, the sign is fair
under the null that the two texts of a topic could be exchanged, so the number of higher ones is binomial, whatever the
vector is made of. Leaving one topic out at a time would not give that: two topics meet in each other's vectors, and
the share of positive signs varies up to twice as much as a binomial one does.

What this cannot show: a sign that is wrong in the texts of the vectors and in the tested ones alike.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from reward_lens import stats
from reward_lens.data.concepts import POLARITIES, ConceptTexts
from reward_lens.methods.concepts.concept_states import POSITIONS, cell_means, text_states
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Result

_FIELDS = {"share": "sign_share", "low": "sign_low", "high": "sign_high", "n": "sign_n", "p": "sign_p"}
NO_PAIRS = "no topic has a positive and a negative text"


@dataclasses.dataclass(frozen=True)
class SignTest:
    """How often a concept's positive text projects higher than its negative one, over topics."""

    higher: int
    n: int
    share: float
    low: float
    high: float
    p: float
    smallest_p: float
    reason: str = ""


def sign_test(
    differences: Float[np.ndarray, "t d"],
    tested: list[str],
    x: Float[np.ndarray, "s d"],
    made_of: list[str],
    rng,
) -> SignTest:
    """Exact two-sided sign test of positive minus negative projections, on vectors that the topic has no part in.

    `differences` of the topics `tested`, and the parts `x` of one vector, of the topics `made_of`. A topic that the
    vector was made of is projected on the mean of those before it in a random order (and of those that are not tested).
    Given what came before, the sign is then fair under the null that the two texts could be exchanged, so that the
    number of higher ones is binomial; leaving one topic out at a time would not give that, since topics would meet
    twice. The first topics make the vector only: at least a third of them, and no fewer than `stats.FEWEST`.
    """
    from scipy.stats import binomtest

    place, also, whole = {topic: i for i, topic in enumerate(made_of)}, set(tested), x.mean(0)
    shared = [i for i in rng.permutation(len(tested)) if tested[i] in place]
    known = [i for topic, i in place.items() if topic not in also]
    first = max(stats.FEWEST, -(-len(made_of) // 3))
    projections = [differences[i] @ whole for i in range(len(tested)) if tested[i] not in place]
    running = x[known].sum(0)
    count = len(known)
    for i in shared:
        if count >= first:
            projections.append(differences[i] @ running / count)
        running, count = running + x[place[tested[i]]], count + 1
    signs = np.sign(projections)
    higher, n = int((signs > 0).sum()), int((signs != 0).sum())
    if n < stats.FEWEST:
        needed = first + stats.FEWEST
        return SignTest(higher, n, np.nan, np.nan, np.nan, np.nan, np.nan,
                        f"{n} topics to test; with vectors of the same topics {needed} are needed")  # fmt: skip
    low, high = stats.wilson(higher, n)
    p = float(binomtest(higher, n).pvalue)
    return SignTest(higher, n, higher / n, low, high, p, 2.0 ** (1 - n))


def sign_tests(
    rm: RewardModel, vectors: Result, texts: ConceptTexts, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Coordinates (concept, pos) of the sign test of every vector, and why there is none where there is none."""
    x = vectors.value.values
    concepts, topics = ([str(v) for v in vectors.value[name].values] for name in ("concept", "topic"))
    some = [t for polarity in POLARITIES for t in texts.of(polarity) if t.concept in set(concepts)]
    names = sorted({t.topic for t in some})
    depth = vectors.meta["settings"]["depth"]
    states = text_states(rm, some, depth).states if some else np.zeros((0, *x.shape[2:]))
    sides = []
    for polarity in POLARITIES:
        mine = [i for i, t in enumerate(some) if t.polarity == polarity]
        sides.append(cell_means(states[mine], [some[i] for i in mine], concepts, names))
    shape = len(concepts), len(POSITIONS)
    both = sides[0] - sides[1]
    out = {name: np.full(shape, np.nan) for name in _FIELDS.values()}
    reasons = {}
    for c, concept in enumerate(concepts):
        there = np.flatnonzero(np.isfinite(both[c]).all((1, 2)))
        tested = [names[i] for i in there]
        for p, pos in enumerate(POSITIONS):
            test = sign_test(both[c, there, p], tested, x[c, :, p], topics, np.random.default_rng(seed))
            for field, name in _FIELDS.items():
                out[name][c, p] = getattr(test, field)
            if test.reason:
                reasons[f"{concept} ({pos})"] = test.reason if tested else NO_PAIRS
    holm = out["sign_p_holm"] = stats.adjust(out["sign_p"])
    named = np.where(out["sign_share"] > 0.5, "as named", "sign error")
    out["sign"] = np.where(holm < 0.05, named, "undetermined").astype(object)
    return out, reasons
