"""Models that also take images, on text alone: the text tower is found beside a vision tower of as many layers."""

import pytest
import torch
from transformers import Gemma3ForConditionalGeneration

import reward_lens as rl
from families import TEXT_PAIRS, more, randomise, tiny_tokenizer
from identities import assert_slow_loops_agree
from multimodal import LAYERS, model
from reference.sweeps import patched_reward, values_at

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
each = pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", *more("qwen2_5_vl", "qwen3_5")])


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
    assert_slow_loops_agree(model(name))


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


def test_a_language_model_that_also_takes_images():
    """Its config names no padding token of its own."""
    module = Gemma3ForConditionalGeneration(model("gemma3").config).eval()
    randomise(module)
    lm = rl.LanguageModel(module, tiny_tokenizer())
    reply = lm.tokenizer.reply([{"role": "user", "content": "Hi"}], "Hello", "none")
    h = lm.trunk.pooled(next(lm.batches([reply])))
    assert lm.n_layers == LAYERS and h.shape == (1, 32)
    own = module(input_ids=torch.tensor([reply.tokens.ids])).logits[0, -1].log_softmax(-1)
    found = lm.log_probabilities(h.expand(len(own), -1), torch.arange(len(own)))
    assert torch.allclose(found, own, atol=1e-4)
