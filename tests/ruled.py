"""Reward models whose reward is a known function of the text: answer keys for whatever reads rewards."""

import hashlib

import numpy as np
import torch

import reward_lens as rl
from families import tiny_model


class Ruled(rl.RewardModel):
    """A reward model whose reward is a rule about the text of the response."""

    def __init__(self, rule):
        self.rule, self.kept = None, {}  # the load report is of the network
        module, tokenizer = tiny_model("llama", seed=1)
        module.config.max_position_embeddings = 1 << 16  # only the rule reads the edited texts
        super().__init__(module, tokenizer, name="ruled")
        self.rule = rule

    def tokenize(self, prompt, response):
        key = str(prompt), response
        if key not in self.kept:
            self.kept[key] = super().tokenize(prompt, response)
        return self.kept[key]

    def reuses_prefix(self, *texts):
        return self.rule is None and super().reuses_prefix(*texts)  # a rule reads whole texts

    def rewards(self, tokens, batch_size=None, progress=None):
        if self.rule is None:
            return super().rewards(tokens, batch_size, progress)
        return torch.tensor([self.rule(t) for t in tokens], dtype=torch.float64).float()


def text_of(tokens) -> str:
    return "".join(tokens.pieces[p] for p in tokens.response)


def noise(salt: int, skewed: bool = False):
    """A number of the text alone: normal, or lognormal of mean zero."""

    def rule(tokens) -> float:
        digest = hashlib.sha256(f"{salt} {tokens.ids}".encode()).digest()
        z = float(np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal())
        return float(np.exp(z) - np.exp(0.5)) if skewed else z

    return rule
