"""The test models are what they promise: tiny, fully random, deterministic, with awkward shapes."""

import math
import re
import time
from pathlib import Path

import pytest
import torch
import transformers

import families
import micro
import planted
import reward_lens as rl
from families import FAMILIES, FURTHER, REFUSED, SPECIAL, STRUCTURES, TEXT_PAIRS, more, tiny_model, tiny_tokenizer

# classes whose heads are not d_model / n_heads wide
WIDE_HEADS = (
    "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "nemotron", "glm4", "mixtral", "gpt_oss",
)  # fmt: skip


NEW = ("deepseek_v2", "qwen3_next")  # latent attention and experts; mixers of two kinds
every = pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL, *NEW, *more(*(f for f in FURTHER if f not in NEW))])


def _texts(tokenizer):
    """Every text of TEXT_PAIRS, rendered by the tokenizer's template."""
    return [
        tokenizer.apply_chat_template(
            [
                *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
                {"role": "assistant", "content": response},
            ],
            tokenize=False,
        )
        for prompt, *responses in TEXT_PAIRS
        for response in responses
    ]


def _rewards(module, tokenizer, texts):
    """The rewards of the Hugging Face forward, one unpadded text at a time."""
    with torch.no_grad():
        encoded = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
        return torch.cat([module(**inputs).logits.float() for inputs in encoded])


@every
def test_family_is_tiny_deterministic_and_alive(family):
    module, tokenizer = tiny_model(family)
    assert sum(p.numel() for p in module.parameters()) == families.parameter_count(family) < 200_000
    assert not module.training
    assert module.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert module.config.vocab_size > max(tokenizer.get_vocab().values())

    rewards = _rewards(module, tokenizer, _texts(tokenizer))
    assert rewards.shape == (2 * len(TEXT_PAIRS), 1)
    assert rewards.isfinite().all()
    assert 0.2 < rewards.std() < 4
    assert (rewards[::2] - rewards[1::2]).abs().min() > 1e-3

    torch.manual_seed(123)  # the global state must not matter
    again, _ = tiny_model(family)
    other, _ = tiny_model(family, seed=1)
    state, same, different = module.state_dict(), again.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not any(torch.equal(state[name], different[name]) for name, _ in module.named_parameters())


@every
def test_no_parameter_is_at_its_default(family):
    module, _ = tiny_model(family)
    for name, parameter in module.named_parameters():
        # a constant tensor is a default; 0.02 is Hugging Face's usual scale of weights
        if parameter.numel() > 1:
            assert parameter.std() > (0.05 if parameter.numel() > 8 else 0.01), name
    norms = [m for m in module.modules() if "Norm" in type(m).__name__ and list(m.parameters(recurse=False))]
    assert norms or family == "olmo"  # OLMo's norms have no parameters


@every
def test_every_parameter_reaches_the_reward(family):
    module, tokenizer = tiny_model(family)
    text = _texts(tokenizer)[0]
    module(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.sum().backward()
    silent = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # What only chooses (experts, keys to attend to) has no gradient.
    assert [n for n in silent if not any(part in n for part in (".indexer.", "correction_bias", "expert_bias"))] == []


@every
def test_bf16_forward(family):
    module, tokenizer = tiny_model(family, dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for n, b in module.named_buffers() if "inv_freq" in n)
    texts = _texts(tokenizer)[:2]
    exact = _rewards(*tiny_model(family), texts)
    assert (_rewards(module, tokenizer, texts) - exact).abs().max() < 0.3


@pytest.mark.parametrize("family", [*REFUSED])
def test_what_is_refused_says_so(family):
    """No tuple of paths describes these networks (see `REFUSED` for why); none gives numbers that are wrong."""
    module, tokenizer = tiny_model(family)
    error, _ = REFUSED[family]
    with pytest.raises((rl.StructureError, rl.LoadError), match=error):
        rl.RewardModel(module, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_does_not_move_the_reward(family):
    module, tokenizer = tiny_model(family)
    texts = _texts(tokenizer)[:2]
    with torch.no_grad():
        batch = module(**tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits
    assert torch.allclose(batch, _rewards(module, tokenizer, texts), atol=2e-5)


@pytest.mark.parametrize("family", ["phi3_longrope", "llama_dynamic"])
def test_rotary_factors_of_the_longest_text_move_the_shorter_one(family):
    module, tokenizer = tiny_model(family)
    texts = sorted(_texts(tokenizer), key=lambda text: len(tokenizer(text)["input_ids"]))
    texts = [texts[0], texts[-1]]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert lengths[0] < families.LONG_FROM < lengths[1]
    with torch.no_grad():
        batch = module(**tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits
    assert (batch - _rewards(module, tokenizer, texts))[0].abs() > 1e-3


@pytest.mark.parametrize("family", WIDE_HEADS)
def test_head_width_is_not_d_model_over_heads(family):
    config = tiny_model(family)[0].config
    assert config.head_dim == families.HEAD_DIM != config.hidden_size / config.num_attention_heads
    assert config.num_key_value_heads < config.num_attention_heads


def test_structures_are_six_families_that_reload_from_disk(tmp_path):
    from transformers import AutoModelForSequenceClassification

    assert len(set(STRUCTURES)) == 6 and set(STRUCTURES) <= set(FAMILIES)
    assert not set(FAMILIES) & set(SPECIAL)
    for family in STRUCTURES:
        module, tokenizer = tiny_model(family)
        module.save_pretrained(tmp_path / family)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / family).eval()
        texts = _texts(tokenizer)[:1]
        assert torch.equal(_rewards(loaded, tokenizer, texts), _rewards(module, tokenizer, texts))


def test_more_than_eighty_classes_of_backbones():
    classes = {families._classes(family)[1].__name__ for family in (*FAMILIES, *SPECIAL, *FURTHER)}
    assert len(classes) > 80 and not set(FURTHER) & {*FAMILIES, *SPECIAL, *REFUSED}
    # every causal class of Hugging Face's own mixin is among them or refused with a reason
    mixed_in = re.compile(r"^class (\w+)\(GenericForSequenceClassification", re.M)
    models = Path(transformers.__file__).parent / "models"
    named = {name for file in models.glob("*/modeling_*.py") for name in mixed_in.findall(file.read_text())}
    named -= {"Gemma3ForSequenceClassification", "Qwen3_5ForSequenceClassification"}  # in test_multimodal_text
    assert named <= classes | {families._classes(family)[1].__name__ for family in REFUSED}


def test_options_of_tiny_model():
    tokenizer = tiny_tokenizer(pad="eos")
    module, returned = tiny_model("llama", num_labels=3, n_layers=1, tie=True, tokenizer=tokenizer)
    assert returned is tokenizer
    assert module.config.pad_token_id == tokenizer.eos_token_id
    assert module.config.tie_word_embeddings and len(module.model.layers) == 1
    assert _rewards(module, tokenizer, _texts(tokenizer)[:1]).shape == (1, 3)


def test_models_are_built_quickly():
    for family in STRUCTURES:
        tiny_model(family)  # imports
    start = time.process_time()
    for family in STRUCTURES:
        tiny_model(family)
    assert (time.process_time() - start) / len(STRUCTURES) < 0.1


def test_config_typos_and_huge_models_are_refused(monkeypatch):
    monkeypatch.setitem(families._SPECS, "typo", families.Family("llama", "Llama", lambda n: {"hidden_dim": 32}))
    with pytest.raises(KeyError, match="LlamaConfig declares no hidden_dim"):
        tiny_model("typo")
    spec = families.Family("llama", "Llama", rename={"hidden_size": None})  # falls back to a width of 4096
    monkeypatch.setitem(families._SPECS, "huge", spec)
    with pytest.raises(ValueError, match="huge would have"):
        tiny_model("huge")


def test_tokenizer_round_trips_and_has_offsets():
    tokenizer = tiny_tokenizer(add_bos=False)
    text = "the thing you sing\n\u00e9 \U0001f642"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert "the" in pieces and " you" in pieces
    assert encoded["offset_mapping"][-4:] == [(len(text) - 1, len(text))] * 4  # four bytes of one character
    assert pieces.count("\u00e9") == 2
    assert tokenizer.unk_token_id is None and len(tokenizer) == len(tokenizer.get_vocab())


def test_tokenizer_variants():
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "you"}]
    for name, expected in (
        ("markers", "<bos><|user|>\n hi <|end|>\n<|assistant|>\nyou<|end|>\n"),
        ("trim", "<bos><|user|>\nhi<|end|>\n<|assistant|>\nyou<|end|>\n"),
        ("chatml", "<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n"),
    ):
        tokenizer = tiny_tokenizer(chat_template=name)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        assert rendered == expected and rendered.startswith(prompt)
        own = rendered.count(tokenizer.bos_token)
        assert tokenizer(rendered)["input_ids"].count(tokenizer.bos_token_id) == own + 1  # the trap
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == own
        plain = tiny_tokenizer(add_bos=False, chat_template=name)
        assert plain(rendered)["input_ids"].count(plain.bos_token_id) == own
        assert plain.get_vocab() == tokenizer.get_vocab()
    assert "Today is 2" in tiny_tokenizer(chat_template="dated").apply_chat_template(messages, tokenize=False)
    assert tiny_tokenizer(chat_template=None).chat_template is None
    assert tiny_tokenizer(pad="eos").pad_token_id == tiny_tokenizer().eos_token_id


def test_text_pairs_have_equal_and_unequal_lengths():
    tokenizer = tiny_tokenizer(add_bos=False)
    equal = [len(tokenizer(c)["input_ids"]) == len(tokenizer(r)["input_ids"]) for _, c, r in TEXT_PAIRS]
    assert equal == [False, True, False, False, True, False]
    assert sum(not isinstance(prompt, str) for prompt, *_ in TEXT_PAIRS) == 1
    assert max(len(tokenizer(text)["input_ids"]) for text in _texts(tokenizer)) < 100


def test_micro_model_gives_the_literals():
    module, tokenizer = micro.micro_model()
    assert all(p.eq(p.round()).all() for p in module.parameters())
    for prompt, response, expected in [
        *((micro.PROMPT, response, reward) for response, reward in micro.EXPECTED.items()),
        ("b", "a", micro.EXPECTED["b"]),
    ]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert math.isclose(_rewards(module, tokenizer, [text]).item(), expected, abs_tol=1e-6)
    reward = micro.EXPECTED["b"]
    assert math.isclose(sum(micro.EXPECTED_CONTRIBUTIONS.values()), reward, abs_tol=1e-12)
    assert micro.EXPECTED_LENS[-1] == reward


@pytest.mark.parametrize("rule", ["length", "keyword"])
def test_planted_models_obey_their_rule(rule):
    accuracy, r_squared = planted.planted_accuracy(rule)
    assert accuracy == 1.0
    assert r_squared > 0.99
    module, tokenizer = planted.planted_model(rule)
    assert planted.planted_model(rule)[0] is module
    assert not module.training and all(p.grad is None for p in module.parameters())
    for _, chosen, rejected in planted.planted_pairs(rule):
        assert planted.truth(rule, tokenizer, chosen) > planted.truth(rule, tokenizer, rejected)
