"""Toy reward models with a planted rule, trained in seconds: answer keys for what drives a reward.

`length`: the standardised number of tokens of the response. `keyword`: +1 where the response has the word
`KEYWORD`, -1 where it has not; prompts have it as often, so the rule is about the response. `truth` is the
rule itself, `planted_pairs` are newly drawn pairs in which the rule decides, `planted_accuracy` measures how
well the model obeys.
"""

import functools
import random
from typing import Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from families import tiny_tokenizer

Rule = Literal["length", "keyword"]

KEYWORD = "sorry"
_WORDS = (
    "the", "cat", "and", "dog", "is", "on", "red", "you", "to", "sun", "hat", "tree", "it", "an", "old",
    "sea", "run",
)  # fmt: skip
_MEAN_LENGTH, _SD_LENGTH = 18.0, 10.0  # in tokens; measured on 3000 responses: 17.6 and 9.8
_PROMPT_WORDS, _RESPONSE_WORDS = 4, 12  # at most
_STEPS, _BATCH, _LEARNING_RATE = 120, 32, 1e-2


def _words(rng: random.Random, keyword: bool, most: int) -> str:
    """One to `most` words, one of them the keyword if asked."""
    words = rng.choices(_WORDS, k=rng.randint(1, most))
    if keyword:
        words[rng.randrange(len(words))] = KEYWORD
    return " ".join(words)


def truth(rule: Rule, tokenizer: PreTrainedTokenizerFast, response: str) -> float:
    """The reward that the rule itself gives to a response."""
    if rule == "keyword":
        return 1.0 if KEYWORD in response.split() else -1.0
    n_tokens = len(tokenizer(response, add_special_tokens=False)["input_ids"])
    return (n_tokens - _MEAN_LENGTH) / _SD_LENGTH


def planted_pairs(rule: Rule, n: int = 16, seed: int = 1) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) texts, drawn anew, in which the rule prefers the chosen one."""
    rng = random.Random(f"{rule} {seed}")
    tokenizer = tiny_tokenizer()
    pairs = []
    while len(pairs) < n:
        prompt = _words(rng, rng.random() < 0.5, _PROMPT_WORDS)
        chosen, rejected = (_words(rng, rule == "keyword" and side, _RESPONSE_WORDS) for side in (True, False))
        if truth(rule, tokenizer, chosen) < truth(rule, tokenizer, rejected):
            chosen, rejected = rejected, chosen
        if truth(rule, tokenizer, chosen) - truth(rule, tokenizer, rejected) >= 0.4:  # length: four tokens
            pairs.append((prompt, chosen, rejected))
    return pairs


def _batch(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
        )
        for prompt, response in texts
    ]
    return dict(tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt"))


@functools.cache
def planted_model(rule: Rule = "length", seed: int = 0) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A two-layer llama trained to give the rule's reward. One model a process: do not change its weights."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=56,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    rng = random.Random(f"train {rule} {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForSequenceClassification(config).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    for _ in range(_STEPS):
        texts = [
            (
                _words(rng, rng.random() < 0.5, _PROMPT_WORDS),
                _words(rng, rng.random() < 0.5, _RESPONSE_WORDS),
            )
            for _ in range(_BATCH)
        ]
        targets = torch.tensor([truth(rule, tokenizer, response) for _, response in texts])
        loss = nn.functional.mse_loss(module(**_batch(tokenizer, texts)).logits.flatten(), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()  # leave no gradients behind
    return module.eval(), tokenizer


def planted_accuracy(rule: Rule = "length", seed: int = 0, n: int = 64) -> tuple[float, float]:
    """Share of new pairs that the model orders as the rule does; R squared of its rewards for the rule's."""
    module, tokenizer = planted_model(rule, seed)
    pairs = planted_pairs(rule, n, seed=seed + 1)
    texts = [(prompt, response) for prompt, *responses in pairs for response in responses]
    with torch.no_grad():
        rewards = module(**_batch(tokenizer, texts)).logits.flatten()
    targets = torch.tensor([truth(rule, tokenizer, response) for _, response in texts])
    margins = rewards.reshape(-1, 2).diff(dim=1)
    r_squared = 1 - (rewards - targets).square().sum() / (targets - targets.mean()).square().sum()
    return (margins < 0).double().mean().item(), r_squared.item()
