"""The standard analysis behind `reward-lens report`: which questions are asked, in which order, of how many pairs.

Costly questions are asked of a few named pairs only; each result says how many pairs it is of.
"""

from collections.abc import Callable, Iterator
from functools import partial

import reward_lens as rl

FEW = 6  # pairs whose tokens are attributed one by one
PROBES = ("pad", "hedge", "assert", "prepend_praise", "bulletise", "add_bold", "append_disclaimer")
ENOUGH = 40  # prompts from which half of them can say what natural states are


def steps(
    rm: "rl.RewardModel", pairs: "rl.Pairs", few: int = FEW
) -> Iterator[tuple[str, "rl.Result | rl.RewardLensError"]]:
    """Name and result of each step, computed as the iterator is drawn; one pass over the pairs serves several. A
    question that this kind of model has no answer to comes with the refusal in the result's place; a check that is out
    of tolerance raises, as everywhere."""
    yield "load_report", rm.load_report
    scores = rm.score_pairs(pairs)
    yield "accuracy", rl.accuracy(rm, pairs, scores=scores)
    yield "scores", scores
    for name, ask in _questions(rm, pairs, few, scores):
        try:
            answer: rl.Result | rl.RewardLensError = ask()
        except (rl.StructureError, rl.DataError) as refusal:
            answer = refusal
        yield name, answer


def _questions(rm, pairs: "rl.Pairs", few: int, scores: "rl.Result") -> Iterator[tuple[str, Callable]]:
    if len(pairs) >= 20:
        yield "calibration", lambda: rl.calibration(rm, pairs, scores=scores)
    acts = rl.capture(rm, pairs, "components")
    yield "lens_own_norm", partial(rl.reward_lens, rm, acts, norm="own")
    yield "lens_frozen_norm", partial(rl.reward_lens, rm, acts, norm="frozen")
    yield "contributions", partial(rl.contributions, rm, acts)
    del acts
    yield "tokens_prefix", lambda: rl.token_attribution(rm, pairs, method="prefix")
    some = spread_over_subsets(pairs, few)
    yield "crystallization", lambda: rl.crystallization_depth(rm, some, control_seeds=1)
    yield "heads", lambda: rl.contributions(rm, some, by="head")
    yield "effects", lambda: rl.effects(rm, spread_over_subsets(pairs, 4 * few), path="direct")
    yield "head_effects", lambda: rl.effects(rm, some, "heads")
    yield "agreement", lambda: rl.agreement(rm, spread_over_subsets(pairs, few + 2), controls=1)
    if pairs.n_prompts >= ENOUGH:
        half = len(pairs) // 2  # one part is intervened on, the other says what is natural
        changed, natural = spread_over_subsets(pairs[:half], 2 * few), pairs[half:]
        depths = range(0, rm.n_layers, max(1, rm.n_layers // 6))
        sites = [f"L{layer}.{kind}" for layer in depths for kind in ("attn", "mlp")]
        yield "divergence", lambda: rl.divergence(rm, changed, sites, natural, n_neighbours=20, min_evaluation=30)
    yield "probes", lambda: rl.probe_hacking(rm, spread_over_subsets(pairs, few + 4), PROBES)
    yield "knockout", lambda: rl.attention_knockout(rm, some, "sentence")
    yield "vocabulary", lambda: rl.vocab_alignment(rm, top=15)
    yield "tokens_truncate", lambda: rl.token_attribution(rm, some, method="truncate")
    yield "words_leave_one_out", lambda: rl.token_attribution(rm, some, method="leave_one_out", by="word")


def spread_over_subsets(pairs: "rl.Pairs", n: int) -> "rl.Pairs":
    """`n` pairs: the first of every subset, then the second of every subset, and so on, in the order of the file."""
    seen: dict[str | None, int] = {}
    ranked = []
    for i, pair in enumerate(pairs):
        seen[pair.subset] = seen.get(pair.subset, 0) + 1
        ranked.append((seen[pair.subset], i))
    keep = sorted(i for _, i in sorted(ranked)[:n])
    return rl.Pairs([pairs[i] for i in keep])
