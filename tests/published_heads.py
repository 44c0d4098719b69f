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


def _gated(seed: int, quantiles: int = 1) -> State:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 0.4) -> Tensor:
        return size * torch.randn(*shape, generator=g)

    matrix = torch.eye(5) - 0.3 * torch.rand(5, 5, generator=g)
    state = {"regression_layer.weight": draw(5 * quantiles, D_MODEL), "reward_transform_matrix": matrix}
    state["gating.logit_scale"] = torch.tensor([1.5])
    widths = (D_MODEL, WIDE, WIDE)
    if quantiles == 1:
        for i in range(3):
            state[f"gating.layers.{i}.weight"] = draw((*widths, 5)[i + 1], widths[i])
            state[f"gating.layers.{i}.bias"] = draw((*widths, 5)[i + 1])
        return state
    for i in range(2):
        norm = f"gating.layers.{3 * i + 2}"
        state[f"gating.layers.{3 * i}.weight"] = draw(WIDE, widths[i])
        state |= {f"{norm}.weight": 1 + draw(WIDE), f"{norm}.bias": draw(WIDE), f"{norm}.running_mean": draw(WIDE)}
        state |= {f"{norm}.running_var": 1 + draw(WIDE).square(), f"{norm}.num_batches_tracked": torch.tensor(7)}
    return state | {"gating.layers.6.weight": draw(5, WIDE), "gating.layers.6.bias": draw(5)}


def _armo(state: State, states: Tensor, gate_at: int, config: dict) -> Tensor:
    rewards = _linear(state, "regression_layer", states[-1])
    x = states[gate_at]
    for i in range(2):
        x = functional.relu(_linear(state, f"gating.layers.{i}", x))
    gate = torch.softmax(_linear(state, "gating.layers.2", x) / config["gating_temperature"], 0)
    score = (gate * state["gating.logit_scale"] * (rewards @ state["reward_transform_matrix"])).sum()
    return torch.cat([score[None], rewards])


def _quantiles(state: State, states: Tensor, gate_at: int, config: dict) -> Tensor:
    rewards = _linear(state, "regression_layer", states[-1]).reshape(5, config["num_quantiles"]).mean(1)
    x = states[gate_at]
    for i in range(2):
        x = functional.relu(_linear(state, f"gating.layers.{3 * i}", x))
        norm = f"gating.layers.{3 * i + 2}"
        kept = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = (x - kept[0]) / (kept[1] + 1e-5).sqrt() * kept[2] + kept[3]
    gate = torch.softmax(_linear(state, "gating.layers.6", x) / config["gating_temperature"], 0)
    adjusted = rewards @ state["reward_transform_matrix"]
    return torch.cat([(gate * state["gating.logit_scale"] * adjusted).sum()[None], adjusted])


def _normal_weights(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    state = {"score.weight": 0.4 * torch.randn(10, D_MODEL, generator=g)}
    for layer, out in ((0, D_MODEL), (2, D_MODEL), (4, 5)):
        state[f"weights.fc.{layer}.weight"] = 0.2 * torch.randn(out, D_MODEL, generator=g)
        state[f"weights.fc.{layer}.bias"] = 0.2 * torch.randn(out, generator=g)
    return state


def _urm(state: State, states: Tensor, gate_at: int, config: dict) -> Tensor:
    means = _linear(state, "score", states[-1]).view(5, 2)[:, 0]
    x = states[-1]
    for layer in (0, 2):
        x = functional.selu(_linear(state, f"weights.fc.{layer}", x))
    return torch.cat([(means * _linear(state, "weights.fc.4", x)).sum()[None], means])


def _levels(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, places, out in (("regression_layer", (0, 2, 4), 30), ("gating_layer", (0, 3, 6), 3)):
        for place, (a, b) in zip(places, ((D_MODEL, WIDE), (WIDE, WIDE), (WIDE, out)), strict=True):
            state[f"{name}.network.{place}.weight"] = 0.4 * torch.randn(b, a, generator=g)
            state[f"{name}.network.{place}.bias"] = 0.2 * torch.randn(b, generator=g)
    return state


def _ldl(state: State, states: Tensor, gate_at: int, config: dict) -> Tensor:
    def network(name: str, places: tuple[int, ...]) -> Tensor:
        x = states[-1]
        for place in places[:-1]:
            x = functional.leaky_relu(_linear(state, f"{name}.network.{place}", x))
        return _linear(state, f"{name}.network.{places[-1]}", x)

    shares = torch.softmax(network("regression_layer", (0, 2, 4)).view(3, 10), -1)
    levels = torch.linspace(0, 1, 10, dtype=shares.dtype)
    weights = network("gating_layer", (0, 3, 6))
    return torch.cat([((weights @ shares) * levels).sum()[None], shares @ levels])


_GATE = {"architectures": ["LlamaForRewardModelWithGating"], "num_objectives": 5, "gating_temperature": 2.0,
         "gating_hidden_dim": WIDE, "gating_n_hidden": 2}  # fmt: skip
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
        "gemma",
        {"architectures": ["GRewardModel"], "vhead_layer_type": "mlp", "vhead_num_neurons": WIDE,
         "vhead_num_layers": 1},
        lambda seed: _two_layers(seed, "v_head.summary", WIDE), _mlp("v_head.summary"),
    ),
    "armo": ("llama", _GATE, _gated, _armo),
    "qrm": ("llama", _GATE | {"num_quantiles": 3}, lambda seed: _gated(seed, 3), _quantiles),
    "urm": (
        "llama", {"architectures": ["LlamaForSequenceClassificationWithNormal_Weights"], "num_labels": 10},
        _normal_weights, _urm,
    ),
    "ldl": (
        "gemma2", {"architectures": ["LDLRewardModel27B"], "num_objectives": 30, "ldl_hidden_dim": WIDE},
        _levels, _ldl,
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
    if "gating_temperature" in keys:
        config["gating_token_pattern"] = gate_pattern(tokenizer)
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_custom.Published"}
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("score")}
    if name == "ldl":  # the head's parts stand in files of their own
        for part in ("regression_layer", "gating_layer"):
            cut = len(part) + 1
            own = {k[cut:]: v for k, v in head(seed + 1).items() if k.startswith(part)}
            torch.save(own, folder / f"{part}.pt")
    else:
        state |= head(seed + 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gate_pattern(tokenizer) -> list[int]:
    """What the tests' template puts between a user turn and the response."""
    return tokenizer("<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]


def published_gate(folder: Path, ids: tuple[int, ...]) -> int:
    """Where the published search finds the pattern's last occurrence."""
    pattern = json.loads((folder / "config.json").read_text())["gating_token_pattern"]
    return max(i for i in range(len(ids)) if list(ids[i : i + len(pattern)]) == pattern)


def edit_weights(folder: Path, change: Callable[[State], State]) -> None:
    """Rewrite the checkpoint's weights."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def published_columns(
    folder: Path, name: str, ids: tuple[int, ...], dtype: torch.dtype = torch.float32, trunk=None
) -> Tensor:
    """The published forward on one unpadded text: the trunk by transformers, the head by hand. The reward first, then
    the objectives that are published beside it. `trunk`: in place of the folder's."""
    from transformers import AutoModel

    trunk = AutoModel.from_pretrained(folder, dtype=dtype).eval() if trunk is None else trunk
    states = trunk(input_ids=torch.tensor([ids])).last_hidden_state[0]
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    for part in ("regression_layer", "gating_layer") if name == "ldl" else ():
        state |= {f"{part}.{k}": v for k, v in torch.load(folder / f"{part}.pt").items()}
    gate_at = published_gate(folder, ids) if "gating_token_pattern" in config else 0
    return HEADS[name][3]({k: v.to(dtype) for k, v in state.items()}, states, gate_at, config)
