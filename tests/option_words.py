"""Every public function called with a word that one of its options does not have, and with no rows at once.

A script, since the tests' type checker would refuse these calls before the library can: prints {call: what it raised}.
"""

import functools
import inspect
import json
import sys
from typing import Any

import torch

import reward_lens as rl
from dictionaries import random_crosscoder, random_sae
from every_method import NATURAL, STEPS
from families import TEXT_PAIRS, tiny_model
from language_models import tiny_language_model
from readout_models import READOUTS
from step_models import published

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]


@functools.cache
def model(kind: str = "llama") -> rl.RewardModel:
    if kind == "steps":
        return rl.step_model(*published("math-shepherd"))
    return READOUTS[kind](torch.float32) if kind in READOUTS else rl.RewardModel(*tiny_model(kind))


@functools.cache
def language_model() -> rl.LanguageModel:
    return rl.LanguageModel(*tiny_language_model("llama"))


def given(function: str) -> dict[str, Any]:
    """What the function's parameters without a default take."""
    kind = "head of armo" if function.startswith(("gate", "objective")) else "llama"
    dictionary = random_crosscoder() if function == "crosscoder_latents" else random_sae()
    known: dict[str, Any] = {
        "rm": model("steps" if function.startswith("step") else kind), "pairs": PAIRS, "pair": PAIRS[0],
        "sae": dictionary, "crosscoder": dictionary, "solutions": STEPS, "policy": language_model(),
        "reference": language_model(), "senders": ["L0.mlp"], "receivers": ["reward"], "vector": torch.ones(32),
        "natural_pairs": NATURAL, "models": {"a": model(), "b": model()}, "latent": 3, "value": 0.5, "d_sae": 8, "k": 2,
        "source": torch.randn(256, 4), "edited": rl.edited_pairs(NATURAL, rl.edits_of(["hedge"])[0]), "prompt": "Why?",
        "path": "nowhere", "of": "lens",
    }  # fmt: skip
    if function == "compared_curves":
        known["result"] = rl.compare(known["models"], NATURAL, n_permutations=0)
    more = {"minimal_circuit": {"reference": NATURAL}, "screen_then_verify": {"top": 3, "calibration_pairs": 1},
            "latent_contributions": {"estimator": "ablation"},
            "train_transcoder": {"source": [(torch.randn(256, 4),) * 2]}}  # fmt: skip
    wanted = inspect.signature(getattr(rl, function)).parameters.values()
    needed = {p.name: known[p.name] for p in wanted if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    return needed | more.get(function, {})


FUNCTIONS = [name for name in rl.__all__ if inspect.isfunction(getattr(rl, name))]
WORDS = [
    (name, p.name)
    for name in FUNCTIONS
    for p in inspect.signature(getattr(rl, name)).parameters.values()
    if "Literal[" in str(p.annotation)
]
ROWS = [name for name in FUNCTIONS if "max_rows" in inspect.signature(getattr(rl, name)).parameters]
ROWS.remove("valuation")  # walks as `steer` does, behind concept vectors


def outcome(function: str, **wrong: Any) -> str:
    try:
        got = getattr(rl, function)(**(given(function) | wrong))
        if inspect.isgenerator(got):
            next(got)
    except rl.RewardLensError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {f"{name} {option}": outcome(name, **{option: ("sideways",) if option == "modes" else "sideways"})
             for name, option in WORDS}  # fmt: skip
    found |= {f"{name} max_rows {n}": outcome(name, max_rows=n) for name in ROWS for n in (0, -1)}
    found["contributions top"] = outcome("contributions", top=0)
    found["vocab_alignment top"] = outcome("vocab_alignment", top=-1)
    sys.stdout.write(json.dumps(found))
