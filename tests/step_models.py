"""Tiny random process reward models of the published shapes, and causal language models of the families."""

import functools
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedTokenizerFast
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel

import reward_lens as rl
from families import randomise, tiny_config, tiny_tokenizer

STEP_TAG = " \u043a\u0438"
SOLUTIONS = (
    ("What is 2 + 3 * 4?", ["First, 3 * 4 is 12.", "Then 2 and 12 is 14.", "The answer is 14"]),
    ("Is 7 a prime number?", ["It is odd.", "No number from 2 to 6 divides it, so yes"]),
    ("What is 2 + 3 * 4?", ["2 + 3 is 5 \U0001f642.", "5 times 4 is 20", "so 20", "The answer: 20"]),
)


def step_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """The families' tokenizer with the markers of the published models as tokens."""
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.add_tokens([AddedToken("<extra_0>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(STEP_TAG, special=False, normalized=False)])
    return tokenizer


def _drawn(module: nn.Module, dtype: torch.dtype, seed: int) -> Any:
    randomise(module, seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    return module.eval()


def causal_model(
    family: str, tokenizer: Any = None, *, n_layers: int = 3, dtype=torch.float32, seed: int = 0, **keys: Any
):
    """A randomised causal language model of a family, further config keys set, and its tokenizer."""
    tokenizer = step_tokenizer() if tokenizer is None else tokenizer
    config = tiny_config(family, tokenizer, num_labels=2, n_layers=n_layers, tie=False)
    for key, value in keys.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        module = AutoModelForCausalLM.from_config(config)
    return _drawn(module, dtype, seed), tokenizer


class ValueHeadModel(nn.Module):
    """Skywork-o1's tree: a causal language model and, beside it, `v_head.summary` on its last states."""

    def __init__(self, pretrained_model: Any):
        super().__init__()
        self.pretrained_model, self.config = pretrained_model, pretrained_model.config
        self.v_head = nn.Module()
        self.v_head.summary = nn.Linear(self.config.hidden_size, 1)

    def forward(self, input_ids, attention_mask=None):
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = output.hidden_states[-1].to(self.v_head.summary.weight)
        return output.logits.float(), None, self.v_head.summary(states).squeeze(-1)


class ProcessRewardModel(Qwen2PreTrainedModel):
    """Qwen2.5-Math-PRM's tree: `model`, and `score` = Linear, ReLU, Linear with two labels, at every position."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return TokenClassifierOutput(logits=self.score(states))


@functools.cache
def published(name: str, dtype=torch.float32) -> tuple[Any, Any, rl.StepReadout]:
    """(module, tokenizer, readout) of a published form."""
    readout = rl.STEP_READOUTS[name]
    tokenizer = step_tokenizer()
    if name == "trl":
        config = tiny_config("qwen2", tokenizer, num_labels=2, n_layers=3, tie=False)
        with torch.random.fork_rng(devices=[]):
            module = AutoModelForTokenClassification.from_config(config)
        return _drawn(module, dtype, 1), tokenizer, readout
    if name == "qwen2.5-math-prm":
        return _drawn(ProcessRewardModel(published("trl")[0].config), dtype, 5), tokenizer, readout
    module, _ = causal_model(
        {"math-shepherd": "mistral", "rlhflow": "llama"}.get(name, "qwen2"), tokenizer, dtype=dtype
    )
    if name == "skywork-o1":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            module = ValueHeadModel(module).eval()
        module.v_head.summary.weight.data.mul_(3.0)
    return module, tokenizer, readout


@torch.no_grad()
def published_scores(name: str, prompt: str, steps: list[str]) -> list[float]:
    """Probabilities of the steps, computed as the model's authors do: their ids, their positions, their softmax."""
    module, tok, readout = published(name)
    if name == "math-shepherd":
        text = prompt + " " + "\n".join(step + STEP_TAG for step in steps)
        ids = torch.tensor([tok.encode(text)])
        tags = tok.encode(STEP_TAG)[-1]
        rows = [tok.encode("+")[-1], tok.encode("-")[-1]]
        chance = module(ids).logits[:, :, rows].softmax(-1)[:, :, 0]
        return chance[ids == tags].tolist()
    if name == "rlhflow":
        rows, said, out = [tok.encode("+")[-1], tok.encode("-")[-1]], [], []
        for k, step in enumerate(steps):
            said += [
                {"role": "user", "content": step if k else f"{prompt} {step}"},
                {"role": "assistant", "content": "+"},
            ]
            ids = tok.apply_chat_template(said, return_dict=False)
            plus = max(i for i, token in enumerate(ids) if token == rows[0])
            logits = module(torch.tensor([ids])).logits[0, plus - 1, rows]
            out.append(float(logits.softmax(-1)[0]))
        return out
    if name == "qwen2.5-math-prm":
        said = "<extra_0>".join(steps) + "<extra_0>"
        messages = [{"role": "system", "content": readout.system}, {"role": "user", "content": prompt}]
        ids = tok.apply_chat_template([*messages, {"role": "assistant", "content": said}], return_dict=False)
        ids = torch.tensor([ids])
        chance = module(ids).logits.softmax(-1)[..., 1]
        return chance[ids == tok.encode("<extra_0>", add_special_tokens=False)[0]].tolist()
    ids, reads = [tok.bos_token_id, *tok.encode(prompt + readout.after_prompt, add_special_tokens=False)], []
    for step in steps:
        ids += tok.encode(step, add_special_tokens=False) + tok.encode("\n", add_special_tokens=False)
        reads.append(len(ids) - 1)
    if name == "skywork-o1":
        return module(torch.tensor([ids]))[2][0, reads].sigmoid().tolist()
    return module(torch.tensor([ids])).logits[0, reads].softmax(-1)[:, 1].tolist()
