"""What a judge of pairs prefers, asked in both orders, and how much of its answer is the order.

    L(a, b)         log p(A) / p(B) where the judge reads answer a first and answer b second
    chosen is a     m1 = L(chosen, rejected)
    chosen is b     m2 = -L(rejected, chosen)
    preference      (m1 + m2) / 2           of the chosen one; what the order adds is gone from it
    position bias   (m1 - m2) / 2           towards whatever stands as a

m1 and m2 are what the two orders say for the chosen response. With position bias larger than the preference the judge
says the same letter both times. The margin that every other method splits for such a model is L(chosen, rejected) -
L(rejected, chosen), twice the preference.

What this cannot show: that the preference is right, or what the judge would answer after reasoning; and a bias for the
letter A over B, wherever it stands, is not told from one for the first place.

Reference: Zheng et al. 2023, arXiv 2306.05685 (position bias of judges); Wang et al. 2023, arXiv 2305.17926 (both
orders averaged).
"""

import numpy as np
import torch

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import StructureError
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.checks import reward_tolerance
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

READINGS = ("chosen is a", "chosen is b", "preference", "position bias")


@checked_arguments
def pair_judge(rm: RewardModel, pairs, batch_size: int | None = None, seed: int = 0) -> Result:
    """Log-odds of a pair judge for the chosen response in both orders, their mean, and half their difference.

    Parameters
    ----------
    rm: a model with `rl.VocabReadout(" A", " B", template=...)` whose template has {prompt}, {a} and {b}.
    batch_size: texts run together; None chooses by length.

    Returns value (pair, reading) in log-odds; reading = "chosen is a", "chosen is b" (log-odds for the chosen response
    in that order), "preference" (their mean) and "position bias" (half their difference, positive towards a); mean, low
    and high over prompts. `meta["summary"]`, each share with its interval over prompts: `accuracy`, the pairs with a
    preference for the chosen response (a tie counts half); `consistent`, the pairs in which both orders prefer the same
    response; `says_a`, the texts in which a is preferred. Check: "own logits", the log-odds of the first pair against
    the model's own logits.

    Raises `StructureError` for a model that is no judge of pairs.
    """
    if not rm.tokenizer.compares or len(rm.vocabulary.rows if rm.vocabulary else ()) < 2:
        raise StructureError(
            f"{rm.name} is no judge of pairs",
            found=f"a readout of kind {rm.readout.kind!r} ({rm.readout.objective})",
            expected="the log-odds of two tokens after a template with {a} and {b}",
            do="load it with readout=rl.VocabReadout(' A', ' B', template='... {prompt} ... {a} ... {b} ...')",
        )
    pairs = data.as_pairs(pairs)
    texts = rm.tokenize_pairs(pairs)
    towards_a = rm.rewards([t for both in texts for t in both], batch_size).double().reshape(-1, 2)
    m1, m2 = towards_a[:, 0].numpy(), -towards_a[:, 1].numpy()
    values = np.stack([m1, m2, (m1 + m2) / 2, (m1 - m2) / 2], 1)
    prompts = [p.prompt_key for p in pairs]
    says_a = np.concatenate([_credit(m1), _credit(-m2)])
    summary = {
        "accuracy": _share(_credit(m1 + m2), prompts),
        "consistent": _share((np.sign(m1) == np.sign(m2)).astype(float), prompts),
        "says_a": _share(says_a, [*prompts, *prompts]),
    }
    return paired_result(
        rm, "pair_judge", pairs, values, ("pair", "reading"), {"reading": np.array(READINGS, dtype=object)},
        unit="log-odds", checks=[_own_logits(rm, texts[0], towards_a[0])], seed=seed, summary=summary,
        title="Judge of pairs in both orders", settings={"batch_size": batch_size},
        shows="How strongly the judge prefers the chosen response, the mean of both orders, and how far its answer "
        "depends on which response stands first.",
        cannot_show="That the preference is right, or what the judge would say after reasoning. A bias for a letter is "
        "not told from one for a place.",
    )  # fmt: skip


def _credit(margin: np.ndarray) -> np.ndarray:
    """1 for a positive margin, 0 for a negative one, one half for a tie."""
    return (np.sign(margin) + 1) / 2


def _share(credit: np.ndarray, prompts: list[str]) -> dict[str, float | str]:
    over = stats.proportion_interval(credit, prompts)
    return {"value": float(over.mean), "low": float(over.low), "high": float(over.high), "method": over.method}


def _own_logits(rm: RewardModel, texts, rewards: torch.Tensor) -> Check:
    """Our log-odds of one pair's two orders against the model's own logits, relative to what E1 allows."""
    gaps = []
    for text, reward in zip(texts, rewards.tolist(), strict=True):
        terms = rm.own_terms(text)
        size = max(map(abs, terms))
        gaps.append(abs(sum(terms) - reward) / reward_tolerance(rm, size, rm.effect_scale(reward, size)))
    # Batching may move a reward by ten times what the readout may (E1).
    return Check("own logits", max(gaps), 1.0 if rm.sixteen_bit else 10.0, "in units of the tolerance of E1")
