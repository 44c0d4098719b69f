"""Tiny random reward models of the real Hugging Face classes, and the byte-level tokenizer they share.

Built from configs in memory, without a network. Every parameter is redrawn (`randomise`), because the
defaults hide mistakes: with norm gains of one, biases of zero and weights of 0.02 a forgotten final norm, a
forgotten bias or a swapped pair of writes changes the reward by less than a tolerance. The width, the head
width, the MLP width and the number of heads all differ, so that confused axes do not fit by accident.
"""

import functools
import importlib
import math

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_layers import GenericForSequenceClassification

from family_spec import (
    D_MLP,
    D_MODEL,
    GQA,
    HEAD_DIM,
    MAX_POSITIONS,
    MOE,
    N_HEADS,
    N_KV,
    WIDE,
    WINDOW,
    Family,
    alternating,
)
from further_families import FURTHER_SPECS, POST_NORM_DECODERS, REFUSED

MAX_PARAMETERS = 2_000_000

# --- tokenizer ----------------------------------------------------------------------------------------------

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = ("<pad>", "<bos>", "<eos>", *_ROLES, "<|end|>", "<|im_start|>", "<|im_end|>")

# Byte-level merges (U+0120 spells a space): enough that some tokens span several characters.
_SPACE = "\u0120"
_MERGES = (
    ("t", "h"), ("th", "e"), (_SPACE, "the"), ("i", "n"), ("in", "g"), (_SPACE, "a"), (_SPACE, "i"),
    (_SPACE + "i", "s"), ("e", "r"), ("o", "u"), ("y", "ou"), (_SPACE, "you"), ("o", "r"), ("a", "n"),
    ("an", "d"), (_SPACE, "and"), ("r", "e"), ("o", "n"), ("l", "l"), ("a", "t"), (_SPACE, "t"),
    (_SPACE + "t", "o"),
)  # fmt: skip

_MARKERS = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + CONTENT + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHAT_TEMPLATES: dict[str, str] = {
    # the usual form: BOS once, a role marker and an end marker a message, content untouched
    "markers": _MARKERS.replace("CONTENT", "m['content']"),
    # as Llama-3: content is trimmed, so a response that begins or ends in white space is not found verbatim
    "trim": _MARKERS.replace("CONTENT", "m['content'] | trim"),
    # the rendering depends on the day unless the caller pins it
    "dated": _MARKERS.replace("CONTENT", "m['content']").replace(
        "{{ bos_token }}",
        "{{ bos_token + '<|system|>\\nToday is ' + strftime_now('%Y-%m-%d') + '.<|end|>\\n' }}",
    ),
    # ChatML with the opening marker as BOS token: the BOS opens every message, and that is right
    "chatml": (
        "{% for m in messages %}"
        "{{ bos_token + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
    ),
}


def tiny_tokenizer(
    add_bos: bool = True, chat_template: str | None = "markers", pad: str = "own"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 256 bytes, a few merges and `SPECIALS`, the same ids in every variant.

    `add_bos` lets the post-processor put the BOS in front of what it encodes: with a template that writes the
    BOS itself, `tok(rendered)` then has two of them, as it does for Llama-3. `chat_template` is a key of
    `CHAT_TEMPLATES`, a Jinja template, or None for a tokenizer without one. `pad="eos"` pads with the EOS.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIALS, *alphabet, *(a + b for a, b in _MERGES)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])

    bos, eos = ("<|im_start|>", "<|im_end|>") if chat_template == "chatml" else ("<bos>", "<eos>")
    steps = [processors.ByteLevel(trim_offsets=False)]
    if add_bos:
        ids = [(bos, backend.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ids))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token={"own": "<pad>", "eos": eos}[pad],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATES.get(chat_template, chat_template),
    )


# (prompt, chosen, rejected). The second and the fifth pair have responses of one length in tokens.
_MULTI_TURN = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And another one, please."},
]
TEXT_PAIRS: tuple[tuple[str | list[dict[str, str]], str, str], ...] = (
    ("What is the capital of France?", "The capital is Paris.", "I do not know, and I do not care."),
    ("Is 7 a prime number?", "Yes, it is.", "No, it is 1"),
    (_MULTI_TURN, "Green is another colour.", "Blue."),
    ("Cheer me up \U0001f642", "You did well \U0001f389\U0001f44d\U0001f3fd", "Why should I? \U0001f612"),
    ("Write one word.", "apple", "plumb"),
    ("Say hello in two languages.", "Hello and bonjour.", "Hello, hello: there is what you asked for."),
)

# --- families -----------------------------------------------------------------------------------------------

_GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
}  # fmt: skip
_FALCON_NAMES = {"intermediate_size": "ffn_hidden_size"}
_BLOOM_NAMES = {
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": None,
    "max_position_embeddings": None,
}  # fmt: skip
_MPT_NAMES = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": None, "max_position_embeddings": "max_seq_len",
}  # fmt: skip
_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

_YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": MAX_POSITIONS // 4,
}  # fmt: skip


_SPECS: dict[str, Family] = {
    "llama": Family("llama", "Llama", lambda n: WIDE),
    "mistral": Family("mistral", "Mistral", lambda n: {**WIDE, "sliding_window": WINDOW}),
    "qwen2": Family("qwen2", "Qwen2", lambda n: {**GQA, "use_sliding_window": True, **alternating(n)}),
    "qwen3": Family("qwen3", "Qwen3", lambda n: WIDE),
    "gemma": Family("gemma", "Gemma", lambda n: WIDE),
    # the attention soft cap is low enough to bend scores of this size
    "gemma2": Family(
        "gemma2", "Gemma2",
        lambda n: {**WIDE, **alternating(n), "query_pre_attn_scalar": HEAD_DIM,
                   "attn_logit_softcapping": 3.0},
    ),
    "gemma3_text": Family(
        "gemma3", "Gemma3Text", lambda n: {**WIDE, **alternating(n), "query_pre_attn_scalar": HEAD_DIM}
    ),
    "phi": Family("phi", "Phi", lambda n: GQA),
    "phi3": Family(
        "phi3", "Phi3",
        lambda n: {**GQA, "sliding_window": WINDOW, "original_max_position_embeddings": MAX_POSITIONS},
    ),
    "gpt2": Family("gpt2", "GPT2", lambda n: _GPT2_DROPOUT, _GPT2_NAMES),
    "gpt_bigcode": Family(
        "gpt_bigcode", "GPTBigCode", lambda n: {**_GPT2_DROPOUT, "multi_query": True}, _GPT2_NAMES
    ),
    "gpt_neo": Family(
        "gpt_neo", "GPTNeo",
        lambda n: {"attention_types": [[[("local", "global")[i % 2] for i in range(n)], 1]],
                   "window_size": WINDOW, "classifier_dropout": 0.0},
        {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    ),
    "gpt_neox": Family("gpt_neox", "GPTNeoX", lambda n: {"classifier_dropout": 0.0}),
    "gptj": Family("gptj", "GPTJ", lambda n: {**_GPT2_DROPOUT, "rotary_dim": 4}, _GPT2_NAMES),
    "bloom": Family("bloom", "Bloom", rename=_BLOOM_NAMES),
    "falcon": Family("falcon", "Falcon", lambda n: {"multi_query": True, "bias": True}, _FALCON_NAMES),
    "falcon_new": Family(
        "falcon", "Falcon", lambda n: {"new_decoder_architecture": True, "num_kv_heads": N_KV}, _FALCON_NAMES
    ),
    "falcon_alibi": Family(
        "falcon", "Falcon",
        lambda n: {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        _FALCON_NAMES,
    ),
    "mpt": Family("mpt", "Mpt", rename=_MPT_NAMES),
    "opt": Family(
        "opt", "OPT",
        lambda n: {"word_embed_proj_dim": D_MODEL, "dropout": 0.0}, {"intermediate_size": "ffn_dim"},
    ),
    "olmo": Family("olmo", "Olmo", lambda n: GQA),
    "olmo2": Family("olmo2", "Olmo2", lambda n: GQA),
    "olmo3": Family("olmo3", "Olmo3", lambda n: {**GQA, **alternating(n)}),
    "stablelm": Family(
        "stablelm", "StableLm", lambda n: {**GQA, "use_qkv_bias": True, "qk_layernorm": True}
    ),
    "starcoder2": Family("starcoder2", "Starcoder2", lambda n: {**GQA, "sliding_window": WINDOW}),
    "nemotron": Family("nemotron", "Nemotron", lambda n: {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "helium": Family("helium", "Helium", lambda n: {**GQA, "head_dim": D_MODEL // N_HEADS}),
    "glm4": Family("glm4", "Glm4", lambda n: WIDE),
    "smollm3": Family("smollm3", "SmolLM3", lambda n: {**GQA, "no_rope_layer_interval": 2}),
    "exaone4": Family("exaone4", "Exaone4", lambda n: {**GQA, **alternating(n)}),
    "granite": Family(
        "granite", "Granite",
        lambda n: {**GQA, "residual_multiplier": 0.4, "embedding_multiplier": 3.0,
                   "attention_multiplier": 0.2},
        wrapped=True,
    ),
    "cohere": Family("cohere", "Cohere", lambda n: {**GQA, "use_qk_norm": True}, wrapped=True),
    "mixtral": Family("mixtral", "Mixtral", lambda n: {**WIDE, **MOE}),
    "qwen2_moe": Family(
        "qwen2_moe", "Qwen2Moe",
        lambda n: {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                   "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "gpt_oss": Family(
        "gpt_oss", "GptOss", lambda n: {**WIDE, **MOE, **alternating(n), "rope_parameters": _YARN}
    ),
}  # fmt: skip

FAMILIES: tuple[str, ...] = tuple(_SPECS)
_SPECS |= FURTHER_SPECS
FURTHER: tuple[str, ...] = tuple(family for family in FURTHER_SPECS if family not in (*REFUSED, *POST_NORM_DECODERS))

# Left out of FAMILIES, because an honest answer of the library may be a smaller batch or a refusal:
# `deepseek_v3` has latent attention, `qwen3_5_text` a recurrent layer between attention layers; in
# `phi3_longrope` and `llama_dynamic` the rotary factors change with the longest text of the batch, beyond
# LONG_FROM tokens.
LONG_FROM = 48
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": MAX_POSITIONS / LONG_FROM,
    "original_max_position_embeddings": LONG_FROM,
    "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
_SPECS |= {
    "deepseek_v3": Family(
        "deepseek_v3", "DeepseekV3",
        lambda n: {"num_key_value_heads": N_HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2,
                   "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
                   "q_lora_rank": 20, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
                   "v_head_dim": 10},
    ),
    "qwen3_5_text": Family(
        "qwen3_5", "Qwen3_5Text",
        lambda n: {**WIDE, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "layer_types": [("full_attention", "linear_attention")[i % 2] for i in range(n)]},
    ),
    "phi3_longrope": Family(
        "phi3", "Phi3",
        lambda n: {**GQA, "original_max_position_embeddings": LONG_FROM, "rope_parameters": _LONGROPE},
    ),
    "llama_dynamic": Family(
        "llama", "Llama",
        lambda n: {**WIDE, "rope_parameters": _DYNAMIC, "max_position_embeddings": LONG_FROM},
    ),
}  # fmt: skip
SPECIAL: tuple[str, ...] = tuple(family for family in _SPECS if family not in (*FAMILIES, *FURTHER_SPECS))

# Plain pre-norm with GQA; sandwich norms, soft cap and sliding windows; parallel blocks with LayerNorms and
# biases; learned positions and transposed weights; alibi with a norm after the embedding; experts.
STRUCTURES: tuple[str, ...] = ("llama", "gemma2", "gpt_neox", "gpt2", "bloom", "mixtral")

# Of families that differ in little one stands for the others wherever the engine is tested: sandwich norms, parallel
# blocks, grouped queries, sliding windows, alibi, learned positions, experts. `make test-full` runs all.
USUAL: tuple[str, ...] = (
    *STRUCTURES, "mistral", "qwen3", "gemma3_text", "phi", "gptj", "falcon_alibi", "mpt", "opt", "olmo2", "granite",
    "cohere", "qwen2_moe", "gpt_oss",
)  # fmt: skip


def more(*families: str) -> list:
    """Families that only `make test-full` runs."""
    return [pytest.param(family, marks=pytest.mark.full) for family in families]


def by_family(usual: tuple[str, ...] = USUAL) -> list:
    """Every family as a parameter; those that are not usual for `make test-full` alone."""
    return [*usual, *more(*(family for family in FAMILIES if family not in usual))]


@functools.cache
def _classes(family: str) -> tuple[type, type]:
    """The config class and the sequence-classification class of a family."""
    spec = _SPECS[family]
    package = f"transformers.models.{spec.package}"
    modeling = importlib.import_module(f"{package}.modeling_{spec.package}")
    configuration = importlib.import_module(f"{package}.configuration_{spec.package}")
    config_class = getattr(configuration, f"{spec.prefix}Config")
    name = f"{spec.prefix}ForSequenceClassification"
    if spec.wrapped:
        base = getattr(modeling, f"{spec.prefix.removesuffix('Text')}PreTrainedModel")
        return config_class, type(name, (GenericForSequenceClassification, base), {"__module__": __name__})
    return config_class, getattr(modeling, name)


def tiny_config(
    family: str, tokenizer: PreTrainedTokenizerFast, *, num_labels: int, n_layers: int, tie: bool
) -> PreTrainedConfig:
    """The config of a tiny model. Raises where a key is not one that the config class declares."""
    spec = _SPECS[family]
    config_class, _ = _classes(family)
    common = {
        "vocab_size": 16 * math.ceil((len(tokenizer) + 1) / 16),
        "hidden_size": D_MODEL,
        "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEADS,
        "intermediate_size": D_MLP,
        "max_position_embeddings": MAX_POSITIONS,
    }
    keys = {spec.rename.get(key, key): value for key, value in common.items()} | dict(spec.keys(n_layers))
    keys.pop(None, None)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    declared = set(config_class.__dataclass_fields__)
    absent = {key: value for key, value in ids.items() if key not in declared}  # Hugging Face's pooling reads it anyway
    keys |= {"tie_word_embeddings": tie, **{key: value for key, value in ids.items() if key in declared}}
    unknown = sorted(set(keys) - declared)
    if unknown:
        raise KeyError(f"{config_class.__name__} declares no {', '.join(unknown)}")
    config = config_class(**keys, num_labels=num_labels)
    for key, value in absent.items():
        setattr(config, key, value)
    changed = {key: getattr(config, key) for key, value in keys.items() if not _holds(getattr(config, key), value)}
    if changed:
        raise ValueError(f"{config_class.__name__} changed what it was given: {changed}")
    return config


def _holds(given: object, value: object) -> bool:
    if isinstance(given, PreTrainedConfig) and isinstance(value, dict):  # a config within the config
        return all(_holds(getattr(given, key), inner) for key, inner in value.items())
    return given == value


@functools.cache
def parameter_count(family: str, num_labels: int = 1, n_layers: int = 3) -> int:
    """Parameters of a tiny model, counted on the meta device: a typo falls back to a default of billions."""
    config = tiny_config(family, tiny_tokenizer(), num_labels=num_labels, n_layers=n_layers, tie=False)
    with torch.device("meta"):
        return sum(p.numel() for p in _classes(family)[1](config).parameters())


def tiny_model(
    family: str,
    *,
    num_labels: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    n_layers: int = 3,
    tie: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A randomised reward model of `family` in eval mode and its tokenizer; one seed, one set of weights."""
    count = parameter_count(family, num_labels, n_layers)
    if count > MAX_PARAMETERS:
        raise ValueError(f"{family} would have {count:,} parameters; at most {MAX_PARAMETERS:,} are tiny")
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    config = tiny_config(family, tokenizer, num_labels=num_labels, n_layers=n_layers, tie=tie)
    with torch.random.fork_rng(devices=[]):  # the class draws initial weights: leave the global state alone
        module = _classes(family)[1](config)
    randomise(module, seed)
    # Parameters only: `module.to(dtype)` would round the rotary frequencies; `from_pretrained` does not.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    return module.eval(), tokenizer


def _adds_one(norm: nn.Module) -> bool:
    """Whether the gain is 1 + weight (Gemma, Nemotron). Measured: does a zero weight pass anything on?"""
    probe = torch.randn((1, *norm.weight.shape), generator=torch.Generator().manual_seed(0)).to(norm.weight)
    for parameter in norm.parameters():
        parameter.data.zero_()
    with torch.no_grad():  # a gated norm takes the gate as a second argument
        output = norm(probe, probe) if "Gated" in type(norm).__name__ else norm(probe)
    return bool(output.abs().max() > 0)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter in place, so that each part of the network matters to the reward.

    Gains 1 + 0.3 z, biases 0.1 z, attention sinks z, embeddings z (after the family's own scaling), other
    weights such that a normalised input leaves with about unit size (so that writes are comparable with the
    embedding), the head 0.4 z (rewards then differ by about one between texts).
    """
    generator = torch.Generator().manual_seed(seed)
    embed_scale = getattr(module.config, "embedding_multiplier", 1.0)
    if module.config.model_type.startswith("gemma"):
        embed_scale = module.config.get_text_config().hidden_size ** 0.5

    def draw(parameter: nn.Parameter, std: float, mean: float = 0.0) -> None:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.data = (mean + std * values).to(parameter)

    for owner_name, owner in module.named_modules():
        is_norm = "Norm" in type(owner).__name__
        one_plus = is_norm and getattr(owner, "weight", None) is not None and _adds_one(owner)
        for name, parameter in owner.named_parameters(recurse=False):
            if name.endswith("bias"):
                draw(parameter, 0.1)
            elif is_norm:
                draw(parameter, 0.3, mean=0.0 if one_plus else 1.0)
            elif isinstance(owner, nn.Embedding):
                draw(parameter, 1.0 / embed_scale)
            elif owner_name == "score":
                draw(parameter, 0.4)
            elif parameter.ndim == 1:
                draw(parameter, 1.0)
            else:  # Linear, Conv1D and stacked experts keep fan-in and fan-out in different orders: take both
                draw(parameter, 1.3 * math.prod(parameter.shape[-2:]) ** -0.25)
