"""The standard analysis behind `reward-lens report`: which questions are asked, in which order, of how many pairs.

Costly questions are asked of a few named pairs only; each result says how many pairs it is of.
"""

import functools
from collections import Counter
from collections.abc import Callable

import reward_lens as rl
from reward_lens.data import by_prompt

Question = Callable[[], "rl.Result"]
FEW = 6  # pairs whose tokens are attributed one by one
SHOWN = 200  # pairs whose tokens are read in one pass: more than a page has room for, and 100 kB a pair
PROBES = ("pad", "hedge", "assert", "prepend_praise", "bulletise", "add_bold", "append_disclaimer")
SHARED_BYTES = 4 * 2**30  # of writes that several questions share; past it, each runs the pairs itself
ENOUGH = 40  # prompts from which half of them can say what natural states are


def questions(rm: "rl.RewardModel", pairs: "rl.Pairs", scores: "rl.Result", few: int = FEW) -> dict[str, Question]:
    """The questions of the page in its order, by name; nothing is computed before one is asked. `scores` are those of
    the pairs. A question that this kind of model has no answer to raises the refusal when it is asked."""
    ask: dict[str, Question] = {
        "load_report": lambda: rm.load_report,
        "accuracy": lambda: rl.accuracy(rm, pairs, scores=scores),
        "scores": lambda: scores,
    }
    if rm.tokenizer.compares:
        ask["pair_judge"] = lambda: rl.pair_judge(rm, pairs)
    if rm.readout.kind == "prompt_gated":
        ask["gate_weights"] = lambda: rl.gate_weights(rm, pairs)
    if len(pairs) >= 20:
        ask["calibration"] = lambda: rl.calibration(rm, pairs, scores=scores)
    held = len(pairs) * 2 * 4 * rm.d_model * (3 * rm.n_layers + 1)
    writes = functools.cache(lambda: rl.capture(rm, pairs, "components") if held <= SHARED_BYTES else pairs)

    def last_of_three() -> "rl.Result":
        answer = rl.reward_lens(rm, writes(), norm="frozen")
        writes.cache_clear()  # one pass over the pairs serves three questions
        return answer

    some, more = spread_over_subsets(pairs, few), spread_over_subsets(pairs, 4 * few)
    ask |= {
        "words_leave_one_out": lambda: rl.token_attribution(rm, some, method="leave_one_out", by="word"),
        "heads": lambda: rl.contributions(rm, some, by="head"),
        "head_effects": lambda: rl.effects(rm, some, "heads", path="direct"),
        "contributions": lambda: rl.contributions(rm, writes()),
        "lens_own_norm": lambda: rl.reward_lens(rm, writes(), norm="own"),
        "lens_frozen_norm": last_of_three,
        "crystallization": lambda: rl.crystallization_depth(rm, some, control_seeds=1),
        "effects": lambda: rl.effects(rm, more, path="direct"),
        "agreement": lambda: rl.agreement(rm, spread_over_subsets(pairs, few + 2), controls=1),
    }
    if pairs.n_prompts >= ENOUGH:
        changed, natural = halves(pairs)  # one part is intervened on, the other says what is natural
        changed = spread_over_subsets(changed, 2 * few)
        depths = range(0, rm.n_layers, max(1, rm.n_layers // 6))
        sites = [f"L{layer}.{kind}" for layer in depths for kind in ("attn", "mlp")]
        ask["divergence"] = lambda: rl.divergence(rm, changed, sites, natural, n_neighbours=20, min_evaluation=30)
    return ask | {
        "knockout": lambda: rl.attention_knockout(rm, some, "sentence"),
        "probes": lambda: rl.probe_hacking(rm, spread_over_subsets(pairs, few + 4), PROBES),
        "vocabulary": lambda: rl.vocab_alignment(rm, top=15),
        "tokens_prefix": lambda: rl.token_attribution(rm, spread_over_subsets(pairs, SHOWN), method="prefix"),
        "tokens_truncate": lambda: rl.token_attribution(rm, some, method="truncate"),
    }


def spread_over_subsets(pairs: "rl.Pairs", n: int) -> "rl.Pairs":
    """`n` pairs: the first of every subset, then the second of every subset, and so on, in the order of the file. A
    prompt comes again when all others have come, as it is prompts that are counted."""
    subsets: Counter[str | None] = Counter()
    prompts: Counter[str] = Counter()
    ranked = []
    for i, pair in enumerate(pairs):
        subsets[pair.subset] += 1
        prompts[pair.prompt_key] += 1
        ranked.append((prompts[pair.prompt_key], subsets[pair.subset], i))
    keep = sorted(i for *_, i in sorted(ranked)[:n])
    return rl.Pairs([pairs[i] for i in keep], pairs.source)


def halves(pairs: "rl.Pairs") -> tuple["rl.Pairs", "rl.Pairs"]:
    """The pairs of every second prompt, and those of the others: no prompt is in both."""
    prompts = list(dict.fromkeys(pair.prompt_key for pair in pairs))
    return by_prompt(pairs, set(prompts[::2]))
