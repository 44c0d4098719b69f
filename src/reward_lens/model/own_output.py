"""What a whole network gives by itself: the number that every reward of this library is held against."""

from typing import Any

from torch import Tensor

from reward_lens.errors import LoadError


def own_output(module: Any, **inputs: Any) -> Any:
    """What a whole network gives, in the precision of its weights: a trainer's autocast, which accelerate puts around
    the `forward` of a network that it prepares, is left out and stays where it is."""
    trained = module.__dict__.get("forward")
    if trained is None or "_original_forward" not in module.__dict__:
        return module(**inputs)
    try:
        module.forward = module._original_forward
        return module(**inputs)
    finally:
        module.forward = trained


def scores_of(module: Any, **inputs: Any) -> Tensor:
    """The scores [text, label] that a whole network gives; `LoadError` for one that gives none of a text."""
    output = own_output(module, **inputs)
    scores, kind = getattr(output, "logits", None), type(module).__name__
    if isinstance(scores, Tensor) and scores.dim() == 2:
        return scores
    every = isinstance(scores, Tensor)
    do = "save it and rl.load the folder, which knows the reward models of other frameworks"
    if kind.endswith("ForTokenClassification"):
        do += " (one label: the last token); for a reward at every step rl.step_model(module, tokenizer, readout)"
    elif every:
        do += "; for a reward read from a language model's vocabulary pass readout=rl.VocabReadout(...)"
    raise LoadError(
        f"A {kind} gives no score of a text",
        found=f"logits of shape {tuple(scores.shape)}, for every token" if every else f"a {type(output).__name__}",
        expected=".logits of shape (texts, labels), as a sequence classifier gives them",
        do=do,
    )
