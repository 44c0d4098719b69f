"""Tiny random models that also take images, beside a vision tower of as many layers as the text tower has."""

import functools

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForSequenceClassification,
    Qwen2_5_VLConfig,
    Qwen2_5_VLPreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLPreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForSequenceClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification

import reward_lens as rl
from families import randomise, tiny_config, tiny_tokenizer

LAYERS = 3
SPECIAL_IDS = {"image_token_id": 287, "video_token_id": 286, "vision_start_token_id": 285, "vision_end_token_id": 284}
_VISION = {"num_heads": 2, "patch_size": 8, "depth": LAYERS}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def _under_head(base: type, name: str) -> type:
    """A reward model trained from a class that has no sequence classifier."""
    return type(name, (GenericForSequenceClassification, base), {"__module__": __name__})


def _gemma3(tokenizer):
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 20, "image_size": 16,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=_text("gemma3_text", tokenizer), vision_config=vision, mm_tokens_per_image=4, num_labels=1,
        image_token_index=287, boi_token_index=285, eoi_token_index=286, tie_word_embeddings=False,
    )  # fmt: skip
    return Gemma3ForSequenceClassification(config)


def _qwen3_5(tokenizer):
    vision = {
        **_VISION,
        "hidden_size": 16,
        "intermediate_size": 20,
        "out_hidden_size": 32,
        "num_position_embeddings": 4,
    }
    text = _text("qwen3_5_text", tokenizer)
    return Qwen3_5ForSequenceClassification(_config(Qwen3_5Config, text, vision))


def _qwen2_vl(tokenizer):
    vision = {**_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    text = _text("qwen2", tokenizer) | {"rope_parameters": _ROTARY}
    return _under_head(Qwen2VLPreTrainedModel, "Qwen2VLForRewards")(_config(Qwen2VLConfig, text, vision))


def _qwen2_5_vl(tokenizer):
    vision = {**_VISION, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 20,
              "fullatt_block_indexes": [1], "window_size": 16}  # fmt: skip
    text = _text("qwen2", tokenizer) | {"rope_parameters": _ROTARY}
    return _under_head(Qwen2_5_VLPreTrainedModel, "Qwen2_5_VLForRewards")(_config(Qwen2_5_VLConfig, text, vision))


def _text(family: str, tokenizer) -> dict:
    text = tiny_config(family, tokenizer, num_labels=1, n_layers=LAYERS, tie=False).to_dict()
    return {key: value for key, value in text.items() if key != "model_type"}


def _config(config_class: type, text: dict, vision: dict):
    return config_class(text_config=text, vision_config=vision, num_labels=1, tie_word_embeddings=False, **SPECIAL_IDS)


MODELS = {"gemma3": _gemma3, "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_5": _qwen3_5}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> rl.RewardModel:
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        module = MODELS[name](tokenizer)
    randomise(module, 1)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    return rl.RewardModel(module.eval(), tokenizer, name=name)
