"""What a reward model makes of concepts: where their vectors point, and what steering along them does to the reward.

    direct       cos(v_c, u)                      u: the slope of the mean reward in a vector added where v is read
    read         within-topic correlation of the other concepts' rewards with their projection on v_c
    causal       slope of the reward on s in  h -> h + s * n * v_c / |v_c|,  n the mean residual norm (`steering`)
    agreement    correlation over concepts of direct (and of read) with causal
    partial      the same of v_c without its part along g_c, the common direction of reward among the other concepts

At depth n_layers u is the effective direction w pulled back through the norm, the same at every input; before it, the
gradient through all later blocks, averaged over the steered texts: a local statement. There direct and causal are two
measures of one response, at strength 0 and over a range, and read is the only one that steers nothing.

Nulls. Random directions with the covariance of the concepts' states around their topics' means, neutral components
projected out as in the vectors: what any natural direction would get; agreement against sets of as many of them.
Shuffled labels, within topics: how far meaningless concepts would lie along u (the projection of v_c, not its cosine),
and how well they would be told apart. Sign: on topics the vector has no part
in, how often a positive text projects higher than the negative one (`concept_signs`).

What this cannot show: that the network uses a direction by itself; that g is goodness and not what else raises the
reward here, length among it; a sign that is wrong in the vectors' texts and in the tested texts alike.

Reference: Sofroniew et al. 2026, arXiv 2604.07729 (steering, read-write agreement). The nulls, the sign test, the
partial valuations and the intervals are our additions; the paper has no random-direction null.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.data.concepts import ConceptTexts, as_concept_texts
from reward_lens.engine.activations import capture
from reward_lens.errors import DataError
from reward_lens.methods.causation.steering import checked_doses, line_slopes, natural_directions, responses
from reward_lens.methods.concepts import concept_statistics as over_topics
from reward_lens.methods.concepts.concept_signs import sign_tests
from reward_lens.methods.concepts.concept_states import POSITIONS, STEERED_AT, reward_direction, site_at
from reward_lens.methods.shared.split_half import HELD_BACK, left_out_interval
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

FEWEST_CONCEPTS = 3
SAME = ("method", "model", "objective", "reads")
_UNDEFINED = "the vector lies along the common direction of reward"


@checked_arguments
@torch.no_grad()
def valuation(
    rm: RewardModel,
    vectors: Result,
    texts,
    on: data.Pair | Iterable | None = None,
    n_null: int = 200,
    strengths: Sequence[int | float] = (-0.1, -0.05, 0.0, 0.05, 0.1),
    n_texts: int = 20,
    n_shuffle: int = 2000,
    n_boot: int = 2000,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Direct and causal valuation of concept vectors, their agreement, and what chance would give of each.

    Parameters
    ----------
    vectors: the Result of `concept_vectors` of this model, read as it is here, of at least 3 concepts.
    texts: concept texts with negative ones, for the sign test; those the vectors were made of, or others.
    on: what to steer on: concept texts, or pairs (both responses are candidates). None: the neutral texts of `texts`,
        or the positive ones where there are none. One text a topic (prompt), drawn by `seed`, at most `n_texts`.
    n_null: random directions to steer along. strengths: at least two different ones, in residual norms.
    n_shuffle: draws of the nulls that cost no forward (shuffled labels; the direct valuation of random directions).
    n_boot: resamples of the intervals. max_rows: changed runs walking at once.

    Vectors of pos "response" are added at all positions of the response through the reward position, those of "reward"
    at the reward position. Cost: (2 concepts + n_null) (strengths but 0) changed runs a text and position.

    Returns value (text, concept, pos), the causal slope in reward per unit of strength; mean, low, high over topics.
    Coordinates (concept, pos): `direct` with `direct_low`, `direct_high` (topics left out of the vector; u is fixed)
    and `direct_disattenuated`, divided by the root of the vector's reliability (NaN where that is under .5); `read`,
    `direct_partial`, `causal_partial`, `common` (cosine with g); of the null of random directions `direct_quantile`,
    `direct_p`, `causal_quantile`, `causal_p`; of shuffled labels `shuffle_quantile`, `shuffle_p` (of the projection on
    u); `auc` (share of the other concepts' texts of a topic that project lower than the concept's own, that topic left
    out of the vector), `auc_low`, `auc_high`, `auc_p` (shuffled labels, one-sided); `sign_share` with `sign_low`,
    `sign_high`, `sign_n`, `sign_p`, and `sign`: "as named", "sign error" (the concept's negative texts are higher) or
    "undetermined", by `sign_p_holm` under .05. p with `_holm` are adjusted over concepts and positions.
    In `meta`: `agreement` by position, of "direct", "read" and "partial", each with r, low, high, n, spearman, and for
    direct and partial its null; `sign_errors`, `sign_reasons`; `smallest_p`, and the numbers with which a p_holm under
    .05 can be had: `n_null_needed`, `sign_topics_needed` (topics of the vectors and of the tested texts).
    Raises `DataError` for vectors of another model or objective, under 3 concepts, and for settings out of range.
    """
    texts = as_concept_texts(texts)
    _require(rm, vectors, n_null, n_texts, n_shuffle, n_boot)
    depth = vectors.meta["settings"]["depth"]
    doses = checked_doses(rm, strengths, depth, "resid_norm", "response", n_null)
    x, r = vectors.value.values, vectors.value["reward"].values
    n_concepts = len(x)
    ids, units, tokens = _steered(rm, texts if on is None else on, on is None, n_texts, seed)
    here: dict[str, list] = {}
    slopes, agreement, gaps = [], {}, []
    for p, pos in enumerate(POSITIONS):
        one = x[:, :, p]
        rng = np.random.default_rng([seed, p])
        common = over_topics.good_minus_bad(one, r)
        whole = over_topics.unit(one.mean(1))
        along = (whole * common).sum(-1)
        partial = over_topics.unit(whole - along[:, None] * common)
        partial[np.abs(along) > 1 - 1e-9] = 0.0
        natural = natural_directions(torch.as_tensor(one.reshape(-1, rm.d_model)), max(n_null, n_shuffle), seed).numpy()
        moved = np.concatenate([whole, partial, natural[:n_null]])
        found, norms, gap = _slopes(rm, tokens, depth, pos, moved, doses, max_rows)
        gaps.append(gap)
        u = reward_direction(rm, tokens, depth, pos, norms).numpy()
        u = over_topics.unit(u)
        write = np.split(found.mean(0), [n_concepts, 2 * n_concepts])
        direct, drawn = whole @ u, natural @ u
        lost = ~partial.any(1)
        direct_partial, causal_partial = (np.where(lost, np.nan, v) for v in (partial @ u, write[1]))
        read = over_topics.read_valuation(one, r)
        slopes.append(found[:, :n_concepts])
        cells = _intervals(one, u, n_boot, seed)
        cells |= _shuffles(one, u, cells, n_shuffle, rng)
        cells |= {"read": read, "common": along, "direct_partial": direct_partial, "causal_partial": causal_partial}
        cells["direct_quantile"], cells["direct_p"] = over_topics.against(direct, drawn[:, None])
        if n_null:
            cells["causal_quantile"], cells["causal_p"] = over_topics.against(write[0], write[2][:, None])
        for name, values in cells.items():
            here.setdefault(name, []).append(values)
        sets = (drawn[:n_null], write[2], n_concepts, n_shuffle, rng)
        agreement[pos] = {"read": over_topics.correlation(read, write[0])}
        for name, pair in (("direct", (direct, write[0])), ("partial", (direct_partial, causal_partial))):
            fit = over_topics.correlation(*pair)
            agreement[pos][name] = fit | {"null": over_topics.against_sets(fit["r"], *sets)}
    signs, reasons = sign_tests(rm, vectors, texts, seed)
    cells = {name: np.stack(values, 1) for name, values in here.items()} | signs
    reliability = vectors.value["reliability"].values
    kept = np.where(reliability >= HELD_BACK, reliability, np.nan)
    cells["direct_disattenuated"] = np.clip(cells["direct"] / np.sqrt(kept), -1.0, 1.0)
    settings = {
        "depth": depth, "strengths": doses.tolist(), "n_null": n_null, "n_texts": len(tokens), "n_shuffle": n_shuffle,
        "n_boot": n_boot,
    }  # fmt: skip
    return _result(
        rm, vectors, np.stack(slopes, 2), cells, agreement, reasons, ids, units, gaps, settings, n_boot, seed
    )


def _require(rm: RewardModel, vectors: Result, n_null: int, n_texts: int, n_shuffle: int, n_boot: int) -> None:
    own = rm.describe("concept_vectors")
    found, expected = ({key: meta.get(key) for key in SAME} for meta in (vectors.meta, own))
    if found != expected or vectors.value.sizes["d_model"] != rm.d_model:  # they come with the rewards of their texts
        raise DataError(
            "The vectors are not concept vectors of this model",
            found="a Result of {method} of {model}, objective {objective!r}".format_map(found),
            expected="the Result of {method} of {model}, objective {objective!r}".format_map(expected),
            do="pass concept_vectors(rm, texts)",
        )
    if vectors.value.sizes["concept"] < FEWEST_CONCEPTS:
        raise DataError(
            "There are too few concepts to value",
            found=f"{vectors.value.sizes['concept']}",
            expected=f"at least {FEWEST_CONCEPTS} (two vectors are each other's opposite); "
            f"{stats.FEWEST} for an interval of the agreement",
            do="make the vectors of more concepts",
        )
    if n_null < 0 or n_texts < 1 or n_shuffle < 1 or n_boot < 1:
        raise DataError(
            "The valuation was not understood",
            found=f"n_null={n_null}, n_texts={n_texts}, n_shuffle={n_shuffle}, n_boot={n_boot}",
            expected="n_null of 0 or more, the others of 1 or more",
            do="correct these; the defaults are a good start",
        )


def _steered(rm: RewardModel, on, own: bool, n_texts: int, seed: int) -> tuple[list[str], list[str], list[Tokens]]:
    """Ids, units and tokens of the texts to steer on: one a topic or prompt, at most `n_texts`."""
    rows: list[tuple[str, str, Any, str]]
    given = [on] if isinstance(on, data.Pair) else list(on)
    if given and all(isinstance(item, data.Pair) for item in given):
        rows = [(f"{p.id} {side}", p.prompt_key, p.messages, text) for p in data.as_pairs(given)
                for side, text in zip(("chosen", "rejected"), p.responses, strict=True)]  # fmt: skip
    else:
        some = ConceptTexts(given)
        chosen = (some.neutral or some.of("positive")) if own else list(some)
        rows = [(t.id or f"{t.concept}: {t.topic}", t.topic, t.messages, t.text) for t in chosen]
    one_each = {rows[i][1]: rows[i] for i in np.random.default_rng([seed, 1]).permutation(len(rows))}
    names = sorted(one_each)
    kept = sorted(np.random.default_rng(seed).permutation(len(names))[:n_texts])
    picked = [one_each[names[i]] for i in kept]
    ids, units, prompts, said = zip(*picked, strict=True)
    return list(ids), list(units), [rm.tokenize(p, t) for p, t in zip(prompts, said, strict=True)]


def _slopes(rm: RewardModel, tokens, depth: int, pos: str, moved: np.ndarray, doses: np.ndarray, max_rows):
    """Slope of every text along every direction [text, direction], norms, and the clean rows' largest gap."""
    site = site_at(rm, depth)
    states = capture(rm, tokens, [site], STEERED_AT[pos])[site]
    norms = np.array([float(h.double().reshape(-1, rm.d_model).norm(dim=1).mean()) for h in states])
    clean = rm.rewards(tokens).double().numpy()
    out, gaps = np.zeros((len(tokens), len(moved))), [0.0]
    walked = np.flatnonzero(moved.any(1))  # a partial vector may be zero
    for i, text in enumerate(tokens):
        moves = torch.as_tensor(norms[i] * moved[walked])
        changes, gap = responses(rm, text, site, moves, doses, STEERED_AT[pos], clean[i], max_rows)
        out[i, walked] = line_slopes(changes, doses)
        gaps.append(gap)
    return out, norms, max(gaps)


def _intervals(x: np.ndarray, u: np.ndarray, n_boot: int, seed: int) -> dict[str, np.ndarray]:
    """Direct valuation and held-out AUC with their intervals, from leaving topics out."""
    sums, auc = x.sum(1, keepdims=True), over_topics.held_out_auc(x)
    direct, left_out = over_topics.unit(sums[:, 0]) @ u, over_topics.unit(sums - x) @ u  # [concept], [concept, topic]
    out: dict[str, list] = {}
    for c in range(len(x)):
        fits = {
            "direct": left_out_interval(float(direct[c]), left_out[c], np.arctanh, np.tanh, n_boot, seed),
            "auc": left_out_interval(float(auc[0][c]), auc[1][c], np.asarray, np.asarray, n_boot, seed),
        }
        for name, fit in fits.items():
            for key, ending in (("value", ""), ("low", "_low"), ("high", "_high")):
                out.setdefault(name + ending, []).append(fit[key])
    arrays = {name: np.array(values) for name, values in out.items()}
    return arrays | {name: arrays[name].clip(0.0, 1.0) for name in ("auc_low", "auc_high")}


def _shuffles(x: np.ndarray, u: np.ndarray, of: dict[str, np.ndarray], n_shuffle: int, rng) -> dict[str, np.ndarray]:
    projections, aucs = over_topics.shuffle_nulls(x, u, n_shuffle, rng)
    quantile, p = over_topics.against(x.mean(1) @ u, projections)
    return {"shuffle_quantile": quantile, "shuffle_p": p,
            "auc_p": (1 + (aucs >= of["auc"] - 1e-12).sum(0)) / (1 + n_shuffle)}  # fmt: skip


def _result(rm, vectors, slopes, cells, agreement, reasons, ids, units, gaps, settings, n_boot, seed) -> Result:
    for name in ("direct_p", "causal_p", "shuffle_p", "auc_p"):
        if name in cells:
            cells[f"{name}_holm"] = stats.adjust(cells[name])
    n_cells = cells["direct"].size
    n_signs = int(np.ceil(1 - np.log2(0.05 / n_cells)))  # tested ones; a third of all make the first vector
    coords = {
        "text": np.array(ids, dtype=object),
        "unit": ("text", np.array(units, dtype=object)),
        "concept": vectors.value["concept"].values,
        "pos": vectors.value["pos"].values,
        **{name: (("concept", "pos"), values) for name, values in cells.items()},
    }
    value = xr.DataArray(slopes, dims=("text", "concept", "pos"), coords=coords)
    over = stats.mean_interval(slopes, units, n_boot=n_boot, seed=seed)
    rest = value.drop_vars(["text", "unit"]).isel(text=0, drop=True)
    mean, low, high = (rest.copy(data=np.asarray(getattr(over, key))) for key in ("mean", "low", "high"))
    n_null, depth = settings["n_null"], settings["depth"]
    wrong = [f"{coords['concept'][c]} ({POSITIONS[p]})" for c, p in np.argwhere(cells["sign"] == "sign error")]
    r = agreement[POSITIONS[0]]["direct"]
    said = "none" if r["r"] is None else f"{r['r']:.2f}"
    ends = "" if r["low"] is None else f", {r['low']:.2f} to {r['high']:.2f}"
    meta = rm.describe(
        "valuation", seed=seed, title=f"Valuation of concepts at depth {depth}", settings=settings,
        interval={"level": 0.95, "unit": "topic", "method": over.method},
        vectors=vectors.meta["inputs_hash"], agreement=agreement, sign_errors=wrong, sign_reasons=reasons,
        u="effective direction, the same at every input" if depth == rm.n_layers else "gradient, averaged over texts",
        smallest_p={"direct and shuffled": 1 / (1 + settings["n_shuffle"]), "causal": 1 / (1 + n_null)},
        n_null_needed=20 * n_cells, sign_topics_needed=n_signs + max(stats.FEWEST, -(-n_signs // 2)),
        shows=f"How the reward answers to each concept. Direct and causal valuation agree over {r['n']} concepts with "
        f"r = {said}{ends} (pos response).",
        cannot_show="That the network uses a direction by itself. Where sets of random directions agree as well, the "
        "agreement is about the network's linearity, not about the concepts. A sign that is wrong in the vectors' "
        "texts and in the tested ones alike is not found.",
    )  # fmt: skip
    checks = [Check("clean row", max(gaps), 2e-2 if rm.sixteen_bit else 1e-4)]
    lost = int(np.isnan(cells["direct_partial"]).sum())
    if lost:
        checks.append(Check("no partial valuation", float(lost), float("inf"), _UNDEFINED))
    return Result(
        "valuation", value, unit="reward per strength", meta=meta, checks=checks, mean=mean, low=low, high=high
    )
