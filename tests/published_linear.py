"""Tiny random reward models whose linear heads and trunks were published under names or layouts of their own.

The real config keys, class names, module names and tensor layouts, as checkpoint folders; the forwards are straight
transcriptions on the plain tensors of the saved state dict, one text at a time, and share no code with the library.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from families import D_MLP, D_MODEL, N_HEADS, N_KV, tiny_tokenizer
from reward_lens.model.heads import table

State = dict[str, Tensor]
LAYERS, HEAD = 3, D_MODEL // N_HEADS
SEPARATE = {
    "embed": "embed_tokens", "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "o": "self_attn.o_proj",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
FUSED = {
    "embed": "tok_embeddings", "norm1": "attention_norm", "norm2": "ffn_norm", "o": "attention.wo",
    "qkv": "attention.wqkv", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
}  # fmt: skip


def llama_state(trunk: str, names: dict[str, str], vocabulary: int, seed: int) -> State:
    """Random tensors of a Llama under these names."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * (1.3 * (shape[0] * shape[1]) ** -0.25)

    def gain() -> Tensor:
        return 1 + 0.3 * torch.randn(D_MODEL, generator=g)

    state = {f"{trunk}.{names['embed']}.weight": torch.randn(vocabulary, D_MODEL, generator=g)}
    rows = {"q": D_MODEL, "k": N_KV * HEAD, "v": N_KV * HEAD, "qkv": D_MODEL + 2 * N_KV * HEAD}
    for layer in range(LAYERS):
        block = f"{trunk}.layers.{layer}"
        for part in ("norm1", "norm2"):
            state[f"{block}.{names[part]}.weight"] = gain()
        for part in (part for part in rows if part in names):
            state[f"{block}.{names[part]}.weight"] = draw(rows[part], D_MODEL)
        state[f"{block}.{names['o']}.weight"] = draw(D_MODEL, D_MODEL)
        for part in ("gate", "up"):
            state[f"{block}.{names[part]}.weight"] = draw(D_MLP, D_MODEL)
        state[f"{block}.{names['down']}.weight"] = draw(D_MODEL, D_MLP)
    return state | {f"{trunk}.norm.weight": gain()}


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    single = x.float()  # as Llama's class does in every precision
    return (single * torch.rsqrt(single.square().mean(-1, keepdim=True) + eps)).to(x) * gain


def _rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [head, pos, width]: the halves of the width are the two coordinates."""
    width = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(0, width, 2) / width)
    cos, sin = torch.cat([angles, angles], -1).cos().to(x), torch.cat([angles, angles], -1).sin().to(x)
    return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin


def _queries_keys_values(state: State, block: str, names: dict[str, str], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[head, pos, width], keys and values once for every query head."""
    group = N_HEADS // N_KV
    if "qkv" in names:  # a row of "(kv-head, query heads of it then its key then its value, width)"
        mixed = functional.linear(x, state[f"{block}.{names['qkv']}.weight"]).view(len(x), N_KV, group + 2, HEAD)
        q, k, v = mixed[:, :, :group].reshape(len(x), N_HEADS, HEAD), mixed[:, :, -2], mixed[:, :, -1]
    else:
        q, k, v = (
            functional.linear(x, state[f"{block}.{names[part]}.weight"]).view(len(x), -1, HEAD) for part in "qkv"
        )
    return q.transpose(0, 1), *(y.transpose(0, 1).repeat_interleave(group, 0) for y in (k, v))


def llama_states(state: State, trunk: str, names: dict[str, str], ids: tuple[int, ...], config: dict) -> Tensor:
    """The normed states [pos, d_model] of one text."""
    eps, theta = config["rms_norm_eps"], config.get("rope_theta", 10_000.0)
    x = state[f"{trunk}.{names['embed']}.weight"][list(ids)]
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for layer in range(LAYERS):
        block = f"{trunk}.layers.{layer}"
        normed = _normed(x, state[f"{block}.{names['norm1']}.weight"], eps)
        q, k, v = _queries_keys_values(state, block, names, normed)
        scores = _rotated(q, theta) @ _rotated(k, theta).transpose(1, 2) / HEAD**0.5
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + functional.linear(mixed.transpose(0, 1).flatten(1), state[f"{block}.{names['o']}.weight"])
        normed = _normed(x, state[f"{block}.{names['norm2']}.weight"], eps)
        gate, up = (functional.linear(normed, state[f"{block}.{names[part]}.weight"]) for part in ("gate", "up"))
        x = x + functional.linear(functional.silu(gate) * up, state[f"{block}.{names['down']}.weight"])
    return _normed(x, state[f"{trunk}.norm.weight"], eps)


def neox_state(vocabulary: int, seed: int) -> State:
    """Random tensors of a GPT-NeoX, with the buffers that its first releases saved."""
    module = _neox(vocabulary, seed)
    g = torch.Generator().manual_seed(seed)
    state = {f"gpt_neox.{k}": v + 0.3 * torch.randn(v.shape, generator=g) for k, v in module.state_dict().items()}
    return state | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)}


def _neox(vocabulary: int, seed: int = 0):
    from transformers import GPTNeoXConfig, GPTNeoXModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXModel(GPTNeoXConfig(**NEOX, vocab_size=vocabulary)).eval()


def neox_states(state: State, trunk: str, names: dict[str, str], ids: tuple[int, ...], config: dict) -> Tensor:
    """The normed states of one text, by transformers' own trunk."""
    module = _neox(config["vocab_size"]).to(next(iter(state.values())).dtype)
    module.load_state_dict({k.removeprefix("gpt_neox."): v for k, v in state.items() if "gpt_neox" in k}, strict=False)
    return module(input_ids=torch.tensor([ids])).last_hidden_state[0]


NEOX = {
    "hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": N_HEADS, "intermediate_size": D_MLP,
    "max_position_embeddings": 512, "rotary_pct": 0.25, "use_parallel_residual": True, "layer_norm_eps": 1e-5,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": D_MODEL, "initializer_range": 0.02,
    "intermediate_size": D_MLP, "max_position_embeddings": 512, "num_attention_heads": N_HEADS,
    "num_hidden_layers": LAYERS, "num_key_value_heads": N_KV, "rms_norm_eps": 1e-5, "rope_scaling": None,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
INTERNLM2 = LLAMA | {
    "model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"], "bias": False, "rope_theta": 1_000_000,
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config",
                 "AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
}  # fmt: skip
BEAVER = LLAMA | {"architectures": ["LlamaModelForScore"], "bias": False, "score_dim": 1, "score_type": "reward",
                  "do_normalize": True, "normalizer_type": "RunningMeanStd", "mean": [0.7], "var": [2.5]}  # fmt: skip


def _head(name: str, bias: bool = False) -> Callable[[int], State]:
    def drawn(seed: int) -> State:
        g = torch.Generator().manual_seed(seed)
        state = {f"{name}.weight": 0.4 * torch.randn(1, D_MODEL, generator=g)}
        return state | ({f"{name}.bias": torch.randn(1, generator=g)} if bias else {})

    return drawn


def _normalised(seed: int) -> State:
    statistics = {"mean": torch.tensor([0.7]), "var": torch.tensor([2.5]), "count": torch.tensor([9])}
    return _head("score_head")(seed) | {f"normalizer.{name}": value for name, value in statistics.items()}


def _linear(name: str) -> Callable[[State, Tensor], Tensor]:
    return lambda state, x: functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _affine(state: State, x: Tensor) -> Tensor:
    score = functional.linear(x, state["score_head.weight"])
    return (score - state["normalizer.mean"]) / (state["normalizer.var"].sqrt() + 1e-8)


def _scaled(state: State, x: Tensor) -> Tensor:
    return functional.linear(x, state["score_head.weight"]) / (state["normalizer.var"].sqrt() + 1e-8)


MODELS: dict[str, tuple[dict, str, dict[str, str], Callable[[int], State], Callable[[State, Tensor], Tensor]]] = {
    "internlm2": (INTERNLM2, "model", FUSED, _head("v_head"), _linear("v_head")),
    "athene": (LLAMA | {"architectures": ["AtheneForSequenceClassification"]}, "model", SEPARATE, _head("v_head"),
               _linear("v_head")),
    "ultra": (LLAMA | {"architectures": ["LlamaRewardModel"]}, "model", SEPARATE, _head("regression_head"),
              _linear("regression_head")),
    "eurus": (LLAMA | {"architectures": ["EurusRewardModel"], "model_type": "mistral", "sliding_window": 4096,
                       "auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"}},
              "model", SEPARATE, _head("regression_head"), _linear("regression_head")),
    "beaver": (BEAVER, "model", SEPARATE, _normalised, _affine),
    "beaver_cost": (BEAVER | {"score_type": "cost", "architectures": ["LlamaForScore"]}, "model", SEPARATE,
                    _normalised, _scaled),
    "oasst": (NEOX | {"architectures": ["GPTNeoXRewardModel"], "model_type": "gpt_neox_reward_model",
                      "pooling": "last"}, "gpt_neox", {}, _head("out_proj", bias=True), _linear("out_proj")),
    "starling": (LLAMA | {"architectures": ["LlamaForSequenceClassification"], "vocab_size": 64000}, "transformer",
                 SEPARATE, _head("v_head"), _linear("v_head")),
    "openrlhf": (LLAMA | {"architectures": ["LLMForSequenceRegression"], "normalize_reward": True, "mean": 0.4,
                          "std": 1.6}, "model", SEPARATE, _head("value_head"),
                 lambda state, x: (functional.linear(x, state["value_head.weight"]) - 0.4) / 1.6),
}  # fmt: skip


def reading_token() -> int:
    """The token of the tests' tokenizer that stands for the one that a head reads."""
    return tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")


@contextmanager
def own_reading_token() -> Iterator[None]:
    """Athene reads a token of Llama-3's vocabulary: in here one of the tests'."""
    rows = tuple(
        dataclasses.replace(row, settings={**row.settings, "reading_token": reading_token()})
        if row.name == "AtheneForSequenceClassification" else row
        for row in table.KNOWN
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "KNOWN", rows)
        yield


def make(
    folder: Path, name: str, *, seed: int = 0, template: str | None = "markers", pad: str = "own", **changes
) -> State:
    """Write a checkpoint of one of `MODELS` without its weights; `changes` are keys of its config. Returns the state
    dict to write with `write`."""
    keys, trunk, names, head, _ = MODELS[name]
    tokenizer = tiny_tokenizer(add_bos=name != "oasst", chat_template=template, pad=pad)  # GPT-NeoX's adds none
    tokenizer.save_pretrained(folder)
    if name == "internlm2":  # the tokenizer's class is published as code too
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        classes = ["tokenization_internlm2.InternLM2Tokenizer", "tokenization_internlm2_fast.InternLM2TokenizerFast"]
        settings |= {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": classes}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    reading = reading_token()
    config = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
    config |= keys | ({"reward_token_id": reading} if name == "internlm2" else {}) | changes
    (folder / "config.json").write_text(json.dumps(config))
    drawn = neox_state(config["vocab_size"], seed) if not names else llama_state(
        trunk, names, config["vocab_size"], seed)  # fmt: skip
    return drawn | head(seed + 1)


def write(folder: Path, state: State, form: str = "safetensors") -> Path:
    """The weights in one file, in shards with an index, or in PyTorch's own format."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if form == "safetensors":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        stem, end = ("model", "safetensors") if form == "shards" else ("pytorch_model", "bin")
        files = [f"{stem}-0000{i + 1}-of-00002.{end}" for i in range(2)]
        where = {name: files[i % 2] for i, name in enumerate(state)}
        for file in files:
            part = {k: state[k] for k in state if where[k] == file}
            save_file(part, folder / file, {"format": "pt"}) if form == "shards" else torch.save(part, folder / file)
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


@torch.no_grad()
def published_score(folder: Path, name: str, state: State, ids: tuple[int, ...], at: int = -1) -> float:
    """The published forward on one unpadded text in float64, read at the position `at`."""
    _, trunk, names, _, head = MODELS[name]
    config = json.loads((folder / "config.json").read_text())
    state = {key: tensor.double() for key, tensor in state.items()}
    states = (llama_states if names else neox_states)(state, trunk, names, ids, config)
    return float(head(state, states[at]))
