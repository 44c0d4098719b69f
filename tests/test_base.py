"""A base network under a reward model's head: the base's states, the reward model's reading."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]


@pytest.fixture(scope="module")
def rm():
    return rl.RewardModel(*tiny_model("llama", seed=1), name="tiny")


def base_of(rm, **changes) -> LlamaForCausalLM:
    torch.manual_seed(5)
    words = {k: v for k, v in rm.config.to_dict().items() if k not in ("architectures", "model_type", "dtype")}
    return LlamaForCausalLM(LlamaConfig(**words | changes)).eval()


def test_states_are_the_bases_and_the_head_is_the_reward_models(rm, tmp_path):
    base = base_of(rm)
    base.save_pretrained(tmp_path)
    for given in (base, str(tmp_path)):
        found = rl.base_under_head(rm, given)
        tokens = found.tokenize(PAIRS[0].prompt, PAIRS[0].chosen)
        with torch.no_grad():
            h = base.model(torch.tensor([tokens.ids])).last_hidden_state[0, tokens.reward_pos]
            expected = float(h @ rm.head.weight[0])
        assert found.score(PAIRS[0].prompt, PAIRS[0].chosen) == pytest.approx(expected, abs=1e-5)
    assert found.edits[-1]["method"] == "base_under_head" and "under the head of tiny" in found.name


def test_the_given_model_is_unchanged_and_its_own_trunk_gives_it_back(rm):
    before = rm.score(PAIRS[0].prompt, PAIRS[0].chosen)
    rl.base_under_head(rm, base_of(rm))
    assert rm.score(PAIRS[0].prompt, PAIRS[0].chosen) == before
    same = rl.base_under_head(rm, rm.module)
    assert same.score(PAIRS[0].prompt, PAIRS[0].chosen) == before
    result = rl.compare({"reward model": rm, "base": same}, PAIRS, n_permutations=0)
    assert float(result.value.sel(measure="agreement").item()) == 1


def test_a_smaller_vocabulary_keeps_the_added_rows(rm):
    base = base_of(rm, vocab_size=rm.config.vocab_size - 3)
    found = rl.base_under_head(rm, base)
    rows = found.module.get_input_embeddings().weight
    assert torch.equal(rows[:-3], base.get_input_embeddings().weight)
    assert torch.equal(rows[-3:], rm.module.get_input_embeddings().weight[-3:])
    assert found.edits[-1]["rows_kept"] == 3


def test_another_network_is_refused(rm, tmp_path):
    with pytest.raises(rl.LoadError, match="is not the base"):
        rl.base_under_head(rm, base_of(rm, num_hidden_layers=1))
    with pytest.raises(rl.LoadError, match="is not the base"):
        rl.base_under_head(rm, AutoModel.from_config(base_of(rm, intermediate_size=48).config))
    with pytest.raises(rl.LoadError, match="could not be loaded"):
        rl.base_under_head(rm, str(tmp_path))


def test_a_base_that_lacks_weights_is_refused(rm, tmp_path):
    base_of(rm).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    part = {name: weight for name, weight in whole.items() if "layers.1.mlp.up_proj" not in name}
    save_file(part, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(rl.LoadError, match="is not the base of tiny. Found: no layers.1.mlp.up_proj.weight"):
        rl.base_under_head(rm, str(tmp_path))
