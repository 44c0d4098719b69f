"""Reward models whose linear head or trunk has other names or layouts: the published scores, exact, or refused.

`published_linear` transcribes the published forwards on plain tensors, without the library's classes.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import published_heads
import published_linear as published
import reward_lens as rl
from families import TEXT_PAIRS
from published_linear import MODELS
from reward_lens.model.heads import table

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS])
ENDED = ("internlm2", "athene")
STANDARDISED = ("beaver", "beaver_cost", "openrlhf")
every = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module", autouse=True)
def tiny_athene():
    with published.own_reading_token():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and state dict of each model; without a template where the authors' checkpoints have none."""
    made = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        template = "markers" if name in (*ENDED, "starling", "openrlhf") else None
        state = published.make(folder, name, template=template)
        made[name] = (published.write(folder, state), state)
    return made


@pytest.fixture(scope="module")
def models(saved):
    return {name: rl.load(folder) for name, (folder, _) in saved.items()}


@every
def test_scores_are_those_of_the_published_forward(saved, name):
    folder, state = saved[name]
    rm = rl.load(folder, dtype=torch.float64)
    assert rm.readout.kind == "linear" and rm.readout.exactness == "exact"
    assert rm.load_report.value.sel(check="head in checkpoint") == 0
    for pair in PAIRS[:3]:
        tokens = rm.tokenize(pair.prompt, pair.chosen)
        assert tokens.reward_pos == len(tokens) - 1
        expected = published.published_score(folder, name, state, tokens.ids)
        assert rm.score(pair.prompt, pair.chosen) == pytest.approx(expected, abs=1e-6)
        assert rm.hf_score(pair.prompt, pair.chosen) == pytest.approx(expected, abs=1e-6)


@every
def test_contributions_sum_to_the_reward(models, name):
    rm = models[name]
    rewards = rm.score_pairs(PAIRS[:2]).value.sel(side=["chosen", "rejected"])
    for by in ("component", "head"):
        parts = rl.contributions(rm, PAIRS[:2], by=by).value.sel(side=["chosen", "rejected"])
        total = parts.sum([d for d in parts.dims if d not in ("pair", "side")])
        assert total.values == pytest.approx(rewards.values, abs=1e-4)


@every
def test_batches_and_padding_leave_the_rewards(models, name):
    rm = models[name]
    scores = rm.score_pairs(PAIRS).value.sel(side="rejected").values
    assert scores == pytest.approx([rm.score(p.prompt, p.rejected) for p in PAIRS], abs=2e-5)


@pytest.mark.parametrize(
    ("name", "form"),
    [("internlm2", "bin"), ("internlm2", "shards"), ("internlm2", "bin shards"), ("ultra", "bin shards"),
     ("starling", "shards")],
)  # fmt: skip
def test_every_usual_file_loads(models, tmp_path, name, form):
    state = published.make(tmp_path, name, template="markers")
    rm = rl.load(published.write(tmp_path, state, form))
    reference = models[name]
    ids = rm.tokenize(*TEXT_PAIRS[0][:2])
    assert float(rm.rewards([ids])[0]) == pytest.approx(float(reference.rewards([ids])[0]), abs=1e-6)


def test_shards_of_an_earlier_save_are_not_read(models, tmp_path):
    """transformers takes the whole file where there are both."""
    state = published.make(tmp_path, "internlm2", template="markers")
    published.write(tmp_path, {name: 2 * tensor for name, tensor in state.items()}, "shards")
    rm = rl.load(published.write(tmp_path, state))
    assert rm.score("a", "b") == pytest.approx(models["internlm2"].score("a", "b"), abs=1e-6)


@every
def test_a_head_that_is_not_there_is_refused(tmp_path, name):
    state = published.make(tmp_path, name)
    heads = [key for key in state if key.split(".")[0] in ("v_head", "regression_head", "score_head", "out_proj",
                                                           "value_head")]  # fmt: skip
    assert heads
    published.write(tmp_path, {key: tensor for key, tensor in state.items() if key not in heads})
    with pytest.raises(rl.LoadError, match="no trained reward head|could not be loaded"):
        rl.load(tmp_path)


def test_a_trunk_that_lacks_a_fused_tensor_is_refused(tmp_path):
    state = published.make(tmp_path, "internlm2")
    del state["model.layers.1.attention.wqkv.weight"]
    published.write(tmp_path, state)
    with pytest.raises(rl.LoadError, match=r"lacks weights of its trunk.*model.layers.1.self_attn.k_proj.weight"):
        rl.load(tmp_path)


@pytest.mark.parametrize("name", ENDED)
def test_the_token_that_is_read_stands_once_at_the_end(models, name):
    rm = models[name]
    tokens = rm.tokenize("Say it.", "Done.")
    assert tokens.ids[-1] == published.reading_token() and tokens.ids.count(published.reading_token()) == 1
    assert tokens.reward_pos in tokens.tail
    again = rm.tokenizer.text("Done.")
    assert again.ids[again.reward_pos] == published.reading_token()


def test_a_token_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    state = published.make(tmp_path, "internlm2", reward_token_id=319)
    with pytest.raises(rl.LoadError, match="not one of the tokenizer"):
        rl.load(published.write(tmp_path, state))


def test_precision_and_placement_are_the_checkpoints_and_the_callers(tmp_path):
    state = published.make(tmp_path, "internlm2", torch_dtype="bfloat16")
    published.write(tmp_path, {key: tensor.bfloat16() for key, tensor in state.items()})
    rm = rl.load(tmp_path, device_map={"": "cpu"})
    assert rm.dtype == torch.bfloat16 and rm.head.weight.dtype == torch.bfloat16
    assert rm.load_report.value.sel(check="own reward") <= rm.load_report.value.sel(check="own reward").tolerance


def test_the_authors_tokenizer_is_used_where_the_checkpoint_has_none(tmp_path, monkeypatch):
    """Starling-RM names the tokenizer of the model it was trained from."""
    state = published.make(tmp_path / "rm", "starling")
    (tmp_path / "tokenizer").mkdir()
    for file in (tmp_path / "rm").glob("*token*"):
        file.rename(tmp_path / "tokenizer" / file.name)
    for file in (tmp_path / "rm").glob("*.jinja"):
        file.rename(tmp_path / "tokenizer" / file.name)
    named = {"tokenizer_name": str(tmp_path / "tokenizer")}
    rows = tuple(dataclasses.replace(row, settings={**row.settings, **named}) for row in table.KNOWN)
    monkeypatch.setattr(table, "KNOWN", rows)
    rm = rl.load(published.write(tmp_path / "rm", state))
    assert rm.tokenizer.hf.name_or_path == named["tokenizer_name"]


def test_a_shared_class_name_alone_shows_nothing(tmp_path):
    """Other authors' `RewardModel` is not OpenRLHF's, nor any `LlamaRewardModel` UltraRM."""
    for name, config in (("RewardModel", {}), ("LlamaRewardModel", {})):
        rows = [row for row in table.KNOWN if row.fits({"architectures": [name], **config}, frozenset)]
        assert not rows


def test_the_last_token_is_read_where_it_pads_as_well(tmp_path):
    """pad == eos, and a template that ends in it: the published heads go by the mask, not by the token."""
    ending = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    state = published.make(tmp_path / "ultra", "ultra", template=ending, pad="eos", pad_token_id=2)
    rm = rl.load(published.write(tmp_path / "ultra", state), dtype=torch.float64)
    tokens = rm.tokenize("a", "b")
    assert tokens.ids[-1] == rm.pad_id and tokens.reward_pos == len(tokens) - 1
    expected = published.published_score(tmp_path / "ultra", "ultra", state, tokens.ids)
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-6)
    folder = published_heads.save(tmp_path / "grm", "grm", pad_token_id=2)
    published.tiny_tokenizer(chat_template=ending, pad="eos").save_pretrained(folder)
    rm = rl.load(folder)
    columns = published_heads.published_columns(folder, "grm", rm.tokenize("a", "b").ids)
    assert rm.score("a", "b") == pytest.approx(float(columns[0]), abs=1e-5)


def test_a_trunk_saved_twice_with_its_language_model_loads(models, tmp_path):
    """Starling-RM-7B: the language model beside the trunk taken out of it."""
    state = published.make(tmp_path, "starling")
    twice = {key.replace("transformer.", "model.model."): t for key, t in state.items() if "transformer." in key}
    published.write(tmp_path, state | twice | {"model.lm_head.weight": torch.zeros(2, 2)}, "bin")
    assert rl.load(tmp_path).score("a", "b") == pytest.approx(models["starling"].score("a", "b"), abs=1e-6)


def test_other_pooling_is_refused(tmp_path):
    state = published.make(tmp_path, "oasst", pooling="mean")
    with pytest.raises(rl.LoadError, match="pooling='mean'.*'last'"):
        rl.load(published.write(tmp_path, state))


def test_statistics_may_stand_in_the_config_alone(saved, tmp_path):
    state = {key: t for key, t in published.make(tmp_path, "beaver").items() if "normalizer" not in key}
    rm = rl.load(published.write(tmp_path, state), dtype=torch.float64)
    ids = rm.tokenize("a", "b").ids
    expected = published.published_score(tmp_path, "beaver", state | saved["beaver"][1], ids)
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-6)


def test_statistics_that_are_nowhere_are_refused(tmp_path):
    state = published.make(tmp_path, "beaver", mean=None, var=None)
    published.write(tmp_path, {key: tensor for key, tensor in state.items() if "normalizer" not in key})
    with pytest.raises(rl.LoadError, match=r"lacks normalizer.mean, normalizer.var"):
        rl.load(tmp_path)


def test_a_cost_is_called_one(models):
    assert models["beaver_cost"].objectives == ("cost",) and models["beaver"].objectives == ("reward",)


@pytest.mark.parametrize("name", [*STANDARDISED, "internlm2", "oasst"])
def test_an_edited_head_gives_the_edited_reward(models, name):
    """Edited in units of the reward, whatever the map's own are; the load report holds the model against it."""
    rm = models[name]
    removed = torch.nn.functional.normalize(torch.arange(32.0) - 3, dim=0)
    edited = rl.edit_head(rm, removed)
    read = (m.readout.norm.pull_back(m.readout.weight, torch.ones(1, 1))[0] @ removed for m in (edited, rm))
    assert [abs(float(x)) > 1e-6 for x in read] == [False, True]
    assert edited.score("a", "b") != pytest.approx(rm.score("a", "b"), abs=1e-3)
    assert edited.score("a", "b") == pytest.approx(edited.hf_score("a", "b"), abs=1e-5)


@every
def test_a_saved_model_loads_again(models, tmp_path, name):
    """By its class name, under transformers' names, whatever the names it was published under."""
    folder = models[name].save_pretrained(tmp_path / "again")
    assert rl.load(folder).score("a", "b") == pytest.approx(models[name].score("a", "b"), abs=1e-6)


def test_the_published_ways_of_writing(models):
    written = {name: rm.tokenizer.written([{"role": "user", "content": "Q"}], "A") for name, rm in models.items()}
    assert written["ultra"] == "<bos>Human: Q\n\nAssistant: A"
    assert written["eurus"] == "<bos>[INST] Q [\\INST] A"
    assert written["beaver"] == "<bos>BEGINNING OF CONVERSATION: USER: Q ASSISTANT:A"
    assert written["oasst"] == "<|prompter|>Q<|endoftext|><|assistant|>A<|endoftext|>"
    report = models["ultra"].load_report.value.sel(check="template tokens")
    assert "the checkpoint has no chat template" in report.found.item()


PLAIN = {
    "Skywork-Reward-Llama-3.1-8B-v0.2, FsfairX-LLaMA3-RM-v0.1, OffsetBias": "LlamaForSequenceClassification",
    "Skywork-Reward-Gemma-2-27B-v0.2, GRM-Gemma2-2B-rewardmodel-ft": "Gemma2ForSequenceClassification",
    "Skywork-Reward-V2-Qwen3-8B": "Qwen3ForSequenceClassification",
    "RM-Mistral-7B": "MistralForSequenceClassification",
}


@pytest.mark.parametrize("architecture", PLAIN.values(), ids=PLAIN)
def test_plain_heads_are_left_to_transformers(tmp_path, architecture):
    from families import tiny_model

    family = architecture.removesuffix("ForSequenceClassification").lower()
    module, tokenizer = tiny_model(family)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    assert table.load_known(str(tmp_path), {}) is None
    save_file({"score.weight": torch.ones(1, 2)}, tmp_path / "other.safetensors")
    assert type(rl.load(tmp_path).module).__name__ == architecture


@pytest.mark.full
def test_the_layout_of_the_published_size_is_complete():
    """internlm2-7b-reward's shapes, without numbers: every tensor has its place, and no place stays empty."""
    config = table.INTERNLM2.config(
        published.INTERNLM2 | {
            "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_hidden_layers": 32, "vocab_size": 92544, "max_position_embeddings": 32768,
        }
    )  # fmt: skip
    config = table.CONFIG_MAPPING["llama"].from_dict(config)
    block = {
        "attention.wqkv": (6144, 4096), "attention.wo": (4096, 4096), "feed_forward.w1": (14336, 4096),
        "feed_forward.w3": (14336, 4096), "feed_forward.w2": (4096, 14336), "attention_norm": (4096,),
        "ffn_norm": (4096,),
    }  # fmt: skip
    shapes = {"model.tok_embeddings": (92544, 4096), "model.norm": (4096,), "v_head": (1, 4096)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in block.items()}
    with torch.device("meta"):
        saved = {f"{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
        row = next(row for row in table.KNOWN if row.name == "InternLM2ForRewardModel")
        module = table.class_for(row.head, config, row.name, row.settings)(config)
    state = table.INTERNLM2.state(saved, config)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in module.state_dict().items()}


@pytest.mark.parametrize("architecture", ["RewardModel", "LlamaForSequenceClassification"])
def test_openrlhf_is_known_by_its_key_whatever_class_saved_the_model(tmp_path, architecture):
    """It reads the last token, padding token or not, and standardises; a sequence classifier does neither."""
    ending = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    changes = {"architectures": [architecture], "pad_token_id": 2, "value_head_prefix": "score"}
    state = published.make(tmp_path, "openrlhf", template=ending, pad="eos", **changes)
    saved = {name.replace("value_head", "score"): tensor for name, tensor in state.items()}
    rm = rl.load(published.write(tmp_path, saved), dtype=torch.float64)
    tokens = rm.tokenize("a", "b")
    assert tokens.ids[-1] == rm.pad_id and tokens.reward_pos == len(tokens) - 1
    expected = published.published_score(tmp_path, "openrlhf", state, tokens.ids)
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("template", "response", "ending"),
    [
        ("{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}", "B", "B<eos>"),
        ("{{ m['role'] + ': ' + m['content'] + '<|end|>\n' }}", "B", "B<|end|> <eos>"),
        ("{{ m['content'] }}", "B\n\n", "B <eos>"),
        ("{{ m['content'] + eos_token }}", "B\n", "B\n<eos>"),
    ],
)
def test_openrlhf_ends_every_text_in_an_eos(tmp_path, template, response, ending):
    """What a template writes behind it (ChatML's newline) was not there in training, and is not read."""
    template = "{{ bos_token }}{% for m in messages %}" + template + "{% endfor %}"
    state = published.make(tmp_path, "openrlhf", template=template)
    tokenizer = published.tiny_tokenizer(chat_template=template)
    rm = rl.load(published.write(tmp_path, state), dtype=torch.float64)
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    text = text if text.endswith("<eos>") else text + " <eos>"
    tokens = rm.tokenize("A", response)
    assert text.endswith(ending) and list(tokens.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(tokens.pieces[i] for i in tokens.response).rstrip("\n") == "B"
    expected = published.published_score(tmp_path, "openrlhf", state, tokens.ids)
    assert rm.score("A", response) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_head_of_another_trunk_is_known_by_its_key(tmp_path, kind):
    """safe-rlhf's GPT-2: the same head; its own texts begin without a BOS, so that no template is put in its place."""
    from families import tiny_model

    module, tokenizer = tiny_model("gpt2")
    tokenizer.save_pretrained(tmp_path)
    keys = {"architectures": ["GPT2ForScore"], "score_dim": 1, "score_type": kind, "do_normalize": True}
    (tmp_path / "config.json").write_text(
        json.dumps(module.config.to_diff_dict() | keys | {"bias": False}, default=str)
    )
    statistics = {"mean": torch.tensor([0.7]), "var": torch.tensor([2.5]), "count": torch.tensor([9])}
    state = {name.replace("score.", "score_head."): tensor for name, tensor in module.state_dict().items()}
    published.write(tmp_path, state | {f"normalizer.{name}": tensor for name, tensor in statistics.items()})
    rm = rl.load(tmp_path)
    with torch.no_grad():
        plain = float(module(input_ids=torch.tensor([rm.tokenize("a", "b").ids])).logits[0, 0])
    expected = (plain - (0.7 if kind == "reward" else 0)) / (2.5**0.5 + 1e-8)
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-5) and rm.objectives == (kind,)
    assert rl.load(rm.save_pretrained(tmp_path / "again")).score("a", "b") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_token_classifier_of_one_label_is_read_at_the_last_token(tmp_path, family):
    """The reward models of verl and AReaL: the last token that is attended to, padding token or not, and a bias."""
    from transformers import AutoModelForTokenClassification

    from families import tiny_model

    ending = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = published.tiny_tokenizer(chat_template=ending, pad="eos")
    config = tiny_model(family, tokenizer=tokenizer)[0].config
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    module = AutoModelForTokenClassification.from_config(config).eval()
    torch.nn.init.normal_(module.score.weight)
    torch.nn.init.normal_(module.score.bias)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rm = rl.load(tmp_path, attn_implementation="eager")
    tokens = rm.tokenize("a", "b")
    assert tokens.ids[-1] == rm.pad_id and rm.readout.kind == "linear"
    with torch.no_grad():
        expected = float(module(input_ids=torch.tensor([tokens.ids])).logits[0, -1, 0])
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-5)
    assert rm.hf_score("a", "b") == pytest.approx(expected, abs=1e-5)
    assert rl.load(rm.save_pretrained(tmp_path / "again")).score("a", "b") == pytest.approx(expected, abs=1e-5)
    with pytest.raises(rl.LoadError, match="no score of a text.*for every token.*save it and rl.load the folder"):
        rl.RewardModel(module, tokenizer)


def test_a_token_classifier_of_two_labels_is_a_process_reward_model(tmp_path):
    from transformers import AutoModelForTokenClassification

    from families import tiny_model

    module, tokenizer = tiny_model("llama", num_labels=2)
    AutoModelForTokenClassification.from_config(module.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(rl.LoadError, match=r"no place for its score.bias.*rl.load_step_model\(path, readout\) reads"):
        rl.load(tmp_path)


def _with_value_head(folder, form="safetensors", **changes):
    """As LLaMA-Factory saves a reward model: the language model, and TRL's value head in a file of its own."""
    state = published.make(folder, "ultra", **{"architectures": ["LlamaForCausalLM"]} | changes)
    head = {"v_head.summary.weight": state.pop("regression_head.weight"), "v_head.summary.bias": torch.tensor([0.7])}
    published.write(folder, state | {"lm_head.weight": torch.ones(320, 32)}, form)
    if form == "safetensors":
        save_file(head, folder / "value_head.safetensors", {"format": "pt"})
    else:
        torch.save(head, folder / "value_head.bin")
    return state, head


def _value(folder, state, head, ids):
    config = json.loads((folder / "config.json").read_text())
    states = published.llama_states(state, "model", published.SEPARATE, ids, config)
    return float(states[-1] @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"])


@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_a_value_head_in_a_file_of_its_own_is_read_at_the_last_token(tmp_path, form):
    ending = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    state, head = _with_value_head(tmp_path / "rm", form, template=ending, pad="eos", pad_token_id=2)
    rm = rl.load(tmp_path / "rm")
    tokens = rm.tokenize("a", "b")
    assert tokens.ids[-1] == rm.pad_id and rm.readout.kind == "linear"
    expected = _value(tmp_path / "rm", state, head, tokens.ids)
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-5)
    assert rm.hf_score("a", "b") == pytest.approx(expected, abs=1e-5)
    assert rl.load(rm.save_pretrained(tmp_path / "again")).score("a", "b") == pytest.approx(expected, abs=1e-5)
    edited = rl.edit_head(rm, torch.nn.functional.normalize(torch.arange(32.0) - 3, dim=0))
    assert edited.score("a", "b") != pytest.approx(expected, abs=1e-3)
    assert edited.score("a", "b") == pytest.approx(edited.hf_score("a", "b"), abs=1e-5)


def test_a_value_head_that_does_not_fit_is_refused(tmp_path):
    _with_value_head(tmp_path)
    save_file({"v_head.summary.weight": torch.ones(1, 7)}, tmp_path / "value_head.safetensors")
    with pytest.raises(rl.LoadError, match="no trained reward head.*value_head.safetensors or .bin: .*summary.bias"):
        rl.load(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_of_a_language_model_with_a_value_head_beside_it(tmp_path, safe):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    state, head = _with_value_head(tmp_path / "base")
    (tmp_path / "base" / "value_head.safetensors").unlink()
    settings = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    with pytest.raises(rl.LoadError, match="has no trained reward head"):
        rl.load(tmp_path / "adapter")
    torch.save(head, tmp_path / "adapter" / "value_head.bin")
    rm = rl.load(tmp_path / "adapter")
    ids = torch.tensor([rm.tokenize("a", "b").ids])
    with torch.no_grad():
        state = adapted(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    expected = float(state @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"])
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-5)


def test_a_value_head_among_the_weights_is_asked_what_it_is(tmp_path):
    """TRL saves it so, and so do process reward models: which of the two it is stands nowhere."""
    state, head = _with_value_head(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    published.write(tmp_path, state | head)
    with pytest.raises(rl.LoadError, match="no trained reward head.*v_head.summary.weight and .bias as value_head.saf"):
        rl.load(tmp_path)
    save_file(head, tmp_path / "value_head.safetensors", {"format": "pt"})
    rm = rl.load(tmp_path)
    expected = _value(tmp_path, state, head, rm.tokenize("a", "b").ids)
    assert rm.score("a", "b") == pytest.approx(expected, abs=1e-5)
