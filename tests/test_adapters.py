"""Live PEFT adapters: rewards, splits and effects of the adapted network are those of the merged one."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import reward_lens as rl
from encoders import tiny_encoder
from every_method import METHODS
from families import TEXT_PAIRS, tiny_model
from language_models import tiny_language_model
from reward_lens.model.adapters import is_adapted
from reward_lens.model.linear_maps import linear_weight
from step_models import causal_model

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
TARGETS = {
    "llama": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
}


def adapted(module, family: str, task: str = "SEQ_CLS", **settings):
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, task_type=task, target_modules=TARGETS[family], init_lora_weights=False, lora_dropout=0.2,
        fan_in_fan_out=family == "gpt2", **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(copy.deepcopy(module), config)


@pytest.fixture(scope="module")
def models():
    """{family: (live, merged)} in float64, made when asked for."""
    made: dict[str, tuple[rl.RewardModel, rl.RewardModel]] = {}

    def get(family: str):
        if family not in made:
            module, tokenizer = tiny_model(family, seed=3, dtype=torch.float64)
            live = adapted(module, family).double()
            with torch.no_grad():
                live.base_model.model.score.modules_to_save["default"].weight.mul_(1.5)
            merged = copy.deepcopy(live).merge_and_unload()
            made[family] = tuple(rl.RewardModel(m, tokenizer, name="model") for m in (live, merged))
        return made[family]

    return get


@pytest.mark.parametrize("family", TARGETS)
def test_a_live_adapter_scores_as_the_merged_one(models, family):
    live, merged = models(family)
    here, there = (m.score_pairs(PAIRS).value.values for m in (live, merged))
    np.testing.assert_allclose(here, there, atol=1e-6)
    ids = torch.tensor([live.tokenize(PAIRS[0].prompt, PAIRS[0].chosen).ids])
    with torch.no_grad():
        assert here[0, 0] == pytest.approx(float(live.module(input_ids=ids).logits[0, 0]), abs=1e-5)
    split = [live.trunk.blocks[1].get_submodule(p) for p in (live.structure.attn_out, live.structure.mlp_out)]
    plain = [merged.trunk.blocks[1].get_submodule(p) for p in (merged.structure.attn_out, merged.structure.mlp_out)]
    for one, other in zip(split, plain, strict=True):
        assert is_adapted(one) and not is_adapted(other)
        torch.testing.assert_close(linear_weight(one), linear_weight(other), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["bert", "roberta"])  # a wrapped head behind a pooler, and both in one wrapper
def test_a_live_adapter_of_an_encoder(name):
    module, tokenizer = tiny_encoder(name, num_labels=2)
    torch.manual_seed(0)
    live = get_peft_model(
        module, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    )
    with torch.no_grad():
        for path, weight in live.named_parameters():
            weight.mul_(1.5 if "modules_to_save" in path else 1.0)
    rm = rl.RewardModel(live, tokenizer, objective="1 - 0", name=name)
    with torch.no_grad():
        logits = live(**tokenizer("What?", "Yes.", return_tensors="pt")).logits[0]
    assert rm.score("What?", "Yes.") == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)
    merged = rl.RewardModel(copy.deepcopy(live).merge_and_unload(), tokenizer, objective="1 - 0", name=name)
    here, there = (rl.contributions(m, PAIRS[:2]).value for m in (rm, merged))
    np.testing.assert_allclose(here, there, atol=1e-4)


@pytest.mark.parametrize("name", ["lens", "by head", "by neuron", "effects", "gradient", "path effects", "ov"])
def test_methods_on_a_live_adapter(models, name):
    live, merged = models("llama")
    here, there = (METHODS[name](m, PAIRS).value for m in (live, merged))
    if here.dtype.kind != "f":
        np.testing.assert_array_equal(here, there)
        return
    size = float(np.nanmax(np.abs(there.values), initial=0.0))
    np.testing.assert_allclose(here.values, there.values, atol=max(1e-4 * size, 1e-5))


def test_a_disabled_adapter_is_the_base():
    module, tokenizer = tiny_model("llama", seed=3)
    base = rl.RewardModel(module, tokenizer)
    live = rl.RewardModel(adapted(module, "llama"), tokenizer)
    with live.module.disable_adapter():
        off = rl.RewardModel(live.module, tokenizer)
        assert off.score("a", "b") == pytest.approx(base.score("a", "b"), abs=1e-6)
        o_proj = live.trunk.blocks[0].get_submodule("self_attn.o_proj")
        assert torch.equal(linear_weight(o_proj), module.model.layers[0].self_attn.o_proj.weight)
    assert abs(live.score("a", "b") - base.score("a", "b")) > 1e-2
    under = rl.base_under_head(live, module)
    assert under.score("a", "b") == pytest.approx(base.score("a", "b"), abs=1e-5)
    assert rl.compare({"on": live, "off": under}, PAIRS, ("states",), n_permutations=0).value.shape[0] == 1


def test_an_adapter_that_is_no_product_is_not_split():
    """DoRA divides by the norm of the sum; the matrix is not base + BA, and components stay exact."""
    module, tokenizer = tiny_model("llama", seed=3)
    rm = rl.RewardModel(adapted(module, "llama", use_dora=True), tokenizer)
    assert rm.structure.attn_out is None and rm.structure.mlp_out is None
    rl.contributions(rm, PAIRS)
    with pytest.raises(rl.StructureError, match="cannot be split into heads"):
        rl.contributions(rm, PAIRS, by="head")


def test_an_adapter_that_is_no_product_in_some_blocks_leaves_them_attention():
    """They are no recurrent mixers: nothing may leave them out, or keep them whole, without a word."""
    module, tokenizer = tiny_model("llama", seed=3)
    live = adapted(module, "llama", use_dora=True, layers_to_transform=[1])
    merged = rl.RewardModel(copy.deepcopy(live).merge_and_unload(), tokenizer)
    rm = rl.RewardModel(live, tokenizer)
    here, there = (rl.attention_knockout(m, PAIRS[:2]).value.values for m in (rm, merged))
    np.testing.assert_allclose(here, there, atol=1e-4)
    here, there = (rl.effects(m, PAIRS[:2], ["L1.V0"]).value.values for m in (rm, merged))
    np.testing.assert_allclose(here, there, atol=1e-4)
    for call in (rl.effects, rl.agreement):
        with pytest.raises(rl.StructureError, match="block 1 .* cannot be split into heads"):
            call(rm, PAIRS[:2], "heads")
    with pytest.raises(rl.StructureError, match="block 1 .* cannot be split into heads"):
        rl.contributions(rm, PAIRS[:2], by="head")


def test_what_writes_weights_asks_for_a_merge(models, tmp_path):
    live, _ = models("llama")
    with pytest.raises(rl.DataError, match="An edit of the head needs the adapters in the weights.*merge_and_unload"):
        rl.edit_head(live, torch.ones(live.d_model))
    with pytest.raises(rl.DataError, match="with live adapters: default"):
        live.save_pretrained(tmp_path / "saved")


def test_a_policy_given_by_its_adapter(tmp_path):
    """The usual outcome of DPO: an adapter folder for the policy, its base for the reference."""
    module, tokenizer = causal_model("llama", seed=1)
    module.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    module.config._name_or_path = module.name_or_path = str(tmp_path / "base")
    live = adapted(module, "llama", task="CAUSAL_LM")
    live.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    live.save_pretrained(tmp_path / "adapter")
    reference = rl.LanguageModel(module, tokenizer)
    by_path = rl.implicit_reward(tmp_path / "adapter", tmp_path / "base", PAIRS)
    given = rl.implicit_reward(rl.LanguageModel(live, tokenizer), reference, PAIRS)
    np.testing.assert_allclose(by_path.value.values, given.value.values, atol=1e-4)
    assert float(np.abs(given.value.values).max()) > 1e-2
    split = [rl.implicit_contributions(p, reference, PAIRS).value.values
             for p in (tmp_path / "adapter", rl.LanguageModel(live, tokenizer))]  # fmt: skip
    np.testing.assert_allclose(*split, atol=1e-4)


def test_a_reward_models_adapter_is_no_policy(tmp_path):
    module, tokenizer = tiny_model("llama", seed=3)
    adapted(module, "llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(rl.LoadError, match="not a language model.*adapter of task type SEQ_CLS"):
        rl.implicit_reward(tmp_path, tmp_path, PAIRS)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("at", ["lm_head", "embed_tokens", "whole lm_head"])
def test_an_adapted_unembedding_is_read_as_it_runs(family, at, tmp_path):
    """Live and saved; of a tied pair (Gemma-2) the adapter changes one table alone, merged in its base as well."""
    module, tokenizer = tiny_language_model(family, seed=2)
    module.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    whole = {"modules_to_save": ["lm_head"]} if at == "whole lm_head" else {}
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **whole,
                        target_modules=["q_proj", *([] if whole else [at])])  # fmt: skip
    torch.manual_seed(0)
    live = get_peft_model(type(module).from_pretrained(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for name, tensor in live.named_parameters():
            tensor.mul_(1.3 if "modules_to_save" in name else 1)
    live.save_pretrained(tmp_path / "adapter")
    readout = rl.VocabReadout("A", "B", before_cap=True)
    rm = rl.RewardModel(live, tokenizer, readout=readout)
    with torch.no_grad():
        logits = live(input_ids=torch.tensor([rm.tokenize("a", "b").ids])).logits[0, -1].double()
    logits = 3 * torch.atanh(logits / 3) if family == "gemma2" else logits
    a, b = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "AB")
    loaded = rl.load(tmp_path / "adapter", readout=readout)
    assert rm.score("a", "b") == pytest.approx(float(logits[a] - logits[b]), abs=1e-5)
    assert loaded.score("a", "b") == pytest.approx(rm.score("a", "b"), abs=1e-5)
    plain = rl.load(tmp_path / "base", readout=readout)
    assert abs(plain.score("a", "b") - rm.score("a", "b")) > 1e-2
