"""Tiny random reward models with published heads: the real config keys and state-dict names, as checkpoint folders.

The forwards below are straight transcriptions of what was published, one text at a time, on the plain tensors of a
state dict; they share no code with the library's classes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from families import D_MODEL, tiny_model

WIDE = 24  # hidden units of a head whose width is its own
State = dict[str, Tensor]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _two_layers(seed: int, name: str, hidden: int = D_MODEL) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        f"{name}.0.weight": 0.4 * torch.randn(hidden, D_MODEL, generator=g),
        f"{name}.0.bias": 0.3 * torch.randn(hidden, generator=g),
        f"{name}.2.weight": 0.4 * torch.randn(1, hidden, generator=g),
        f"{name}.2.bias": 0.3 * torch.randn(1, generator=g),
    }


def _mlp(name: str) -> Callable[[State, Tensor, int, dict], Tensor]:
    def forward(state: State, states: Tensor, gate_at: int, config: dict) -> Tensor:
        return _linear(state, f"{name}.2", functional.relu(_linear(state, f"{name}.0", states[-1])))

    return forward


HEADS: dict[str, tuple[str, dict, Callable[[int], State], Callable]] = {
    "inf_orm": (
        "llama", {"architectures": ["INFORMForSequenceClassification"], "num_labels": 1},
        lambda seed: _two_layers(seed, "score"), _mlp("score"),
    ),
    "qwen_math": (
        "qwen2", {"architectures": ["Qwen2ForRewardModel"], "num_labels": 1},
        lambda seed: _two_layers(seed, "score"), _mlp("score"),
    ),
    "grm": (
        "gemma2",
        {"architectures": ["GRewardModel"], "vhead_layer_type": "mlp", "vhead_num_neurons": WIDE,
         "vhead_num_layers": 1},
        lambda seed: _two_layers(seed, "v_head.summary", WIDE), _mlp("v_head.summary"),
    ),
}  # fmt: skip


def save(folder: Path, name: str, seed: int = 0, **changes) -> Path:
    """Write a checkpoint of one of `HEADS`; `changes` are keys of its config."""
    family, keys, head, _ = HEADS[name]
    module, tokenizer = tiny_model(family, seed=seed)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    config |= keys | changes
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_custom.Published"}
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("score")}
    save_file(state | head(seed + 1), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_weights(folder: Path, change: Callable[[State], State]) -> None:
    """Rewrite the checkpoint's weights."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def published_score(folder: Path, name: str, ids: tuple[int, ...], gate_at: int = 0) -> Tensor:
    """The published forward on one unpadded text: the trunk by transformers, the head by hand."""
    from transformers import AutoModel

    trunk = AutoModel.from_pretrained(folder).eval()
    states = trunk(input_ids=torch.tensor([ids])).last_hidden_state[0]
    config = json.loads((folder / "config.json").read_text())
    return HEADS[name][3](load_file(folder / "model.safetensors"), states, gate_at, config)
