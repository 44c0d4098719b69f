"""Models that also take images, on text alone: the text tower is found beside a vision tower of as many layers."""

import functools

import numpy as np
import pytest
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
from families import TEXT_PAIRS, more, randomise, tiny_config, tiny_tokenizer
from reference.loops import plain_contributions, plain_lens
from reference.sweeps import patched_reward, values_at

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
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
each = pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", *more("qwen2_5_vl", "qwen3_5")])


@functools.cache
def model(name: str) -> rl.RewardModel:
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        module = MODELS[name](tokenizer)
    randomise(module, 1)
    return rl.RewardModel(module.eval(), tokenizer, name=name)


def vision_parameters(rm: rl.RewardModel) -> list[torch.nn.Parameter]:
    return [p for path, p in rm.module.named_parameters() if ".visual." in path or ".vision_tower." in path]


@each
def test_the_text_tower_is_found(name):
    rm = model(name)
    assert rm.structure.blocks == "model.language_model.layers" and max(rm.structure.gaps) < 1e-5
    assert sum(p.numel() for p in rm.module.parameters()) < 200_000 and vision_parameters(rm)
    towers = [m for m in rm.module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == rm.n_layers]
    assert len(towers) > 1  # the search had to choose


@each
def test_identities_on_text(name):
    rm = model(name)
    rewards = rm.score_pairs(PAIRS).value
    for pair, row in zip(PAIRS, rewards, strict=True):
        assert float(row.sel(side="chosen")) == pytest.approx(rm.hf_score(pair.prompt, pair.chosen), abs=1e-4)
    parts = rl.contributions(rm, PAIRS, scale="own").value
    lens = rl.reward_lens(rm, PAIRS).value
    np.testing.assert_allclose(parts.sum("component"), rewards, atol=1e-4)
    np.testing.assert_allclose(lens.isel(depth=-1), rewards, atol=1e-4)
    pair = PAIRS[0]
    np.testing.assert_allclose(lens.sel(side="chosen")[0], plain_lens(rm, pair.prompt, pair.chosen), atol=1e-4)
    for component, value in plain_contributions(rm, pair.prompt, pair.chosen).items():
        assert float(parts.sel(side="chosen", component=component)[0]) == pytest.approx(value, abs=1e-4)


@each
def test_effects_equal_plain_runs(name):
    rm, pair = model(name), PAIRS[0]
    sites = ["embed", "L0.mlp", "L1.attn", "L2.resid_pre"]
    effects = rl.effects(rm, [pair], sites).value[0]
    chosen, rejected = rm.tokenize(pair.prompt, pair.chosen), rm.tokenize(pair.prompt, pair.rejected)
    held = values_at(rm, rejected, [rl.Site.parse(s) for s in sites])
    for site in sites:
        change = (rl.Site.parse(site), [chosen.reward_pos], held[rl.Site.parse(site)][[rejected.reward_pos]])
        patched = patched_reward(rm, chosen, [change])
        clean = rm.score(pair.prompt, pair.chosen)
        assert float(effects.sel(component=site)) == pytest.approx(clean - patched, abs=1e-4)


@each
def test_the_vision_tower_has_no_say(name):
    rm = model(name)
    before = rm.score_pairs(PAIRS[:2]).value
    kept = [p.detach().clone() for p in vision_parameters(rm)]
    with torch.no_grad():
        for parameter in vision_parameters(rm):
            parameter.normal_()
    assert rm.score_pairs(PAIRS[:2]).value.identical(before)
    with torch.no_grad():
        for parameter, old in zip(vision_parameters(rm), kept, strict=True):
            parameter.copy_(old)
