"""Tiny random causal language models of real classes, for rewards that are read from a vocabulary."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from families import randomise, tiny_config, tiny_tokenizer

LANGUAGE_FAMILIES = ("llama", "qwen2", "gemma2", "granite", "cohere", "gpt2", "gpt_neox", "phi")
TIED = ("gpt2", "gemma2", "cohere")
EXTRA = {
    "gemma2": {"final_logit_softcapping": 3.0},  # low enough to bend logits of this size
    "granite": {"logits_scaling": 6.0},
    "cohere": {"logit_scale": 0.3},
}
JUDGE = 'Question: {prompt}\nAnswer: {response}\nIs that {"json": 1} right?'
PAIR_JUDGE = "Question: {prompt}\n[A] {a}\n[B] {b}\nWhich is right?"


def tiny_language_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, tokenizer=None, **keys):
    """A randomised causal language model of `family` in eval mode and its tokenizer; `keys` change its config."""
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    config = tiny_config(family, tokenizer, num_labels=1, n_layers=3, tie=family in TIED)
    for key, value in (EXTRA.get(family, {}) | keys).items():
        if not hasattr(config, key):
            raise KeyError(f"{type(config).__name__} declares no {key}")
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        module = AutoModelForCausalLM.from_config(config)
    randomise(module, seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    assert (module.get_output_embeddings().weight is module.get_input_embeddings().weight) == (family in TIED)
    return module.eval(), tokenizer


@torch.no_grad()
def plain_log_odds(module: nn.Module, ids: list[int], rows: tuple[int, ...], cap: float | None = None) -> float:
    """The published reading: logits of the last position, their rows subtracted; `cap` is undone in float64."""
    logits = module(input_ids=torch.tensor([ids])).logits[0, -1].double()
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    return float(logits[rows[0]] - (logits[rows[1]] if len(rows) > 1 else 0.0))
