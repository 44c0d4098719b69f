"""DPO's implicit reward against plain loops over the modules' own logits, its lens, and its contributions."""

import gc
import weakref

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS
from reward_lens.model.language_model import require_end
from step_models import causal_model, step_tokenizer

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox", "bloom", "granite", "cohere", "mixtral")
BETA = 0.3
FACTORS = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
}


def models(family: str, dtype=torch.float32) -> tuple[rl.LanguageModel, rl.LanguageModel]:
    keys = FACTORS.get(family, {})
    made = (causal_model(family, seed=seed, dtype=dtype, **keys) for seed in (1, 2))
    policy, reference = (rl.LanguageModel(*m, name=n) for m, n in zip(made, ("policy", "reference"), strict=True))
    return policy, reference


@torch.no_grad()
def plain(module, tokenizer, pair: rl.Pair, response: str, end: str = "template") -> list[float]:
    """log p of each token behind the generation prompt, one text alone, by the module's own logits."""
    prompt = tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True, return_dict=False)
    said = [*pair.messages, {"role": "assistant", "content": response}]
    ids = tokenizer.apply_chat_template(said, return_dict=False)
    assert ids[: len(prompt)] == prompt
    logs = module(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    out = [float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
    tail = len(tokenizer("<|end|>\n", add_special_tokens=False)["input_ids"])
    return out[: len(out) - tail + {"template": tail, "first": 1, "none": 0}[end]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["template", "first", "none"])
def test_the_reward_is_that_of_a_plain_loop(family, end):
    policy, reference = models(family)
    result = rl.implicit_reward(policy, reference, PAIRS, beta=BETA, end=end)
    for i, pair in enumerate(PAIRS):
        margin = []
        for side in ("chosen", "rejected"):
            a, b = (plain(m.module, m.tokenizer.hf, pair, getattr(pair, side), end) for m in (policy, reference))
            reward = BETA * (sum(a) - sum(b))
            cell = result.value[i].sel(side=side)
            assert float(cell.sel(reading="sum")) == pytest.approx(reward, abs=1e-4)
            assert float(cell.sel(reading="per token")) == pytest.approx(reward / len(a), abs=1e-4)
            assert int(result.value[f"{side}_tokens"][i]) == len(a)
            assert float(cell.policy_log_probability) == pytest.approx(sum(a), abs=1e-3)
            assert float(cell.reference_log_probability) == pytest.approx(sum(b), abs=1e-3)
            margin.append(reward)
        assert float(result.value[i].sel(side="margin", reading="sum")) == pytest.approx(
            margin[0] - margin[1], abs=2e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_lens_and_contributions_sum_to_the_reward(family):
    policy, reference = models(family)
    sides = ["chosen", "rejected"]
    reward = rl.implicit_reward(policy, reference, PAIRS, beta=BETA).value.sel(reading="sum")
    tokens = rl.implicit_tokens(policy, reference, PAIRS, beta=BETA).value
    np.testing.assert_allclose(tokens.sel(side=sides).sum("position"), reward.sel(side=sides), atol=1e-5)
    lens = rl.implicit_lens(policy, reference, PAIRS, beta=BETA).value
    np.testing.assert_allclose(lens.isel(depth=-1), reward, atol=1e-5)
    parts = rl.implicit_contributions(policy, reference, PAIRS, beta=BETA).value
    np.testing.assert_allclose(parts.sel(model="reward").sum("component"), reward, atol=1e-4)
    logs = {"policy": reward.policy_log_probability, "reference": reward.reference_log_probability}
    for model, log in logs.items():
        np.testing.assert_allclose(parts.sel(model=model).sum("component"), BETA * log, atol=1e-4)
    cap = np.abs(parts.sel(component="cap", model="policy")).max()
    assert (float(cap) > 1e-3) == (family == "gemma2")


def test_token_pieces_and_values():
    policy, reference = models("llama")
    value = rl.implicit_tokens(policy, reference, PAIRS, beta=BETA).value
    for i, pair in enumerate(PAIRS):
        for side in ("chosen", "rejected"):
            a, b = (plain(m.module, m.tokenizer.hf, pair, getattr(pair, side)) for m in (policy, reference))
            row = value[i].sel(side=side)
            n = int(row.n_positions)
            np.testing.assert_allclose(row[:n], BETA * (np.array(a) - np.array(b)), atol=1e-4)
            assert bool(row[n:].isnull().all())
            assert "".join(row.piece.values[:n]) == getattr(pair, side) + "<|end|>\n"
            assert list(row.role.values[:n]).count("tail") == 2


def test_a_margin_of_tokens_exists_where_the_responses_agree():
    policy, reference = models("llama")
    pair = rl.Pair("Count.", "one two three", "one two, four")
    value = rl.implicit_tokens(policy, reference, [pair]).value[0].sel(side="margin")
    shared = int(value.n_positions)
    assert shared >= 5 and np.abs(value[:shared]).max() < 1e-6 and bool(value[shared:].isnull().all())


def test_lens_and_contributions_equal_plain_loops():
    """Llama by hand: the model's own norm and unembedding on the hidden states; RMSNorm written out for the writes."""
    policy, reference = models("llama")
    pair = PAIRS[0]
    prompt = policy.tokenizer.hf.apply_chat_template(pair.messages, add_generation_prompt=True, return_dict=False)
    lens = rl.implicit_lens(policy, reference, [pair], beta=BETA, per="token").value[0].sel(side="chosen")
    lens = lens[:, : int(lens.n_positions)]
    parts = rl.implicit_contributions(policy, reference, [pair], beta=BETA, per="token").value[0].sel(side="chosen")
    parts = parts[..., : int(parts.n_positions)]
    said = [*pair.messages, {"role": "assistant", "content": pair.chosen}]
    ids = torch.tensor([policy.tokenizer.hf.apply_chat_template(said, return_dict=False)])
    targets, before = ids[0, len(prompt) :], slice(len(prompt) - 1, -1)
    read = {}
    for name, lm in (("policy", policy), ("reference", reference)):
        seen, handles = {}, []
        for k, layer in enumerate(lm.module.model.layers):
            for kind, part in (("attn", layer.self_attn), ("mlp", layer.mlp)):

                def keep(m, args, out, key=f"L{k}.{kind}", seen=seen):
                    seen[key] = (out if isinstance(out, torch.Tensor) else out[0])[0]

                handles.append(part.register_forward_hook(keep))
        with torch.no_grad():
            states = list(lm.module(ids, output_hidden_states=True).hidden_states[:-1])
            for handle in handles:
                handle.remove()
            final = states[0][0] + sum(seen.values())
            norm, head = lm.module.model.norm, lm.module.lm_head
            curves = []
            for h in (*(s[0] for s in states), final):
                logs = head(norm(h))[before].log_softmax(-1)
                curves.append(logs[torch.arange(len(targets)), targets])
            read[name] = torch.stack(curves)
            scale = (final.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            for component, write in {"embed": states[0][0], **seen}.items():
                dots = ((write * scale * norm.weight)[before] * head.weight[targets]).sum(-1)
                np.testing.assert_allclose(parts.sel(model=name, component=component), BETA * dots, atol=1e-4)
            total = head(norm(final))[before].logsumexp(-1)
            np.testing.assert_allclose(parts.sel(model=name, component="log normaliser"), -BETA * total, atol=1e-4)
    np.testing.assert_allclose(lens, BETA * (read["policy"] - read["reference"]), atol=1e-4)


def test_padding_and_batches_never_change_a_number(monkeypatch):
    policy, reference = models("gpt2")
    together = rl.implicit_tokens(policy, reference, PAIRS).value
    for i, pair in enumerate(PAIRS):
        alone = rl.implicit_tokens(policy, reference, [pair]).value[0]
        for side in ("chosen", "rejected"):
            n = int(alone.sel(side=side).n_positions)
            np.testing.assert_allclose(together[i].sel(side=side)[:n], alone.sel(side=side)[:n], atol=2e-6)
    import reward_lens.model.forward as forward

    plain_batch = forward.make_batch
    monkeypatch.setattr(forward, "make_batch", lambda *a, **k: plain_batch(*a, **{**k, "padding": "left"}))
    left = rl.implicit_tokens(policy, reference, PAIRS).value
    np.testing.assert_allclose(left, together, atol=2e-6)
    monkeypatch.undo()
    import reward_lens.model.language_model as language_model

    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 1)
    np.testing.assert_allclose(rl.implicit_tokens(policy, reference, PAIRS[:2]).value, together[:2, :, :len(
        rl.implicit_tokens(policy, reference, PAIRS[:2]).value.position)], atol=2e-6)  # fmt: skip


def test_bfloat16_takes_the_softmax_in_float32():
    policy, reference = models("llama", torch.bfloat16)
    result = rl.implicit_reward(policy, reference, PAIRS, beta=BETA)
    for i, pair in enumerate(PAIRS):
        a, b = (plain(m.module, m.tokenizer.hf, pair, pair.chosen) for m in (policy, reference))
        expected = BETA * (sum(a) - sum(b))
        assert float(result.value[i].sel(side="chosen", reading="sum")) == pytest.approx(expected, abs=0.1)
    parts = rl.implicit_contributions(policy, reference, PAIRS)
    assert "rounding" in parts.value.component and {"rounding", "completeness"} <= {c.name for c in parts.checks}


def test_planted_truth_a_policy_that_likes_a_word():
    """The reference with one row of its unembedding raised: the margin goes to the response with that token."""
    module, tokenizer = causal_model("llama", seed=3)
    other, _ = causal_model("llama", seed=3)
    word = tokenizer(" you", add_special_tokens=False)["input_ids"]
    assert len(word) == 1
    with torch.no_grad():
        h = other.model.norm.weight
        other.lm_head.weight[word[0]] += 2 * h / h.norm()
    pairs = [rl.Pair(f"Prompt {i}", f"I like you {i}", f"I like him {i}") for i in range(8)]
    policy, reference = rl.LanguageModel(other, tokenizer), rl.LanguageModel(module, tokenizer)
    tokens = rl.implicit_tokens(policy, reference, pairs).value.sel(side="chosen")
    at = np.argwhere(tokens.token.values == word[0])
    assert len(at) == 8
    parts = rl.implicit_contributions(policy, reference, pairs, per="token").value.sel(side="chosen", model="reward")
    for pair, position in at:
        moved = np.abs(parts[pair, :, position])
        logit = moved.sel(component=[c for c in parts.component.values if c not in ("log normaliser",)])
        assert float(logit.sum()) > 1e-3
    for pair in range(8):  # every other token moved by the normaliser alone
        for position in range(int(tokens.n_positions[pair])):
            if int(tokens.token[pair, position]) != word[0]:
                rest = parts[pair, :, position].drop_sel(component="log normaliser")
                assert float(np.abs(rest).max()) < 1e-6


def test_the_same_model_twice_gives_zero_and_half_the_accuracy():
    policy, _ = models("llama")
    result = rl.implicit_reward(policy, policy, PAIRS)
    assert float(np.abs(result.value).max()) == 0
    assert result.meta["accuracy"]["sum"]["value"] == 0.5
    assert "policy and reference are the same: 1 (both models read every token alike" in str(result.checks[-1])
    assert len(rl.implicit_tokens(*models("llama"), PAIRS[:2]).checks) == 3


def test_accuracy_and_intervals_are_over_prompts():
    policy, reference = models("llama")
    result = rl.implicit_reward(policy, reference, PAIRS)
    margins = result.value.sel(side="margin", reading="sum")
    accuracy = result.meta["accuracy"]["sum"]
    assert accuracy["value"] == pytest.approx(float((margins > 0).mean()))
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert result.mean.dims == ("side", "reading") and result.meta["interval"]["unit"] == "prompt"
    swapped = [rl.Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS]
    back = rl.implicit_reward(policy, reference, swapped).value.sel(side="margin", reading="sum")
    np.testing.assert_allclose(back, -margins, atol=1e-6)
    assert result.meta["models"]["reference"]["model"] == "reference"


def test_models_are_loaded_one_after_the_other(tmp_path):
    alive: list = []
    loaded = []

    def loader(name: str, seed: int):
        def load() -> rl.LanguageModel:
            gc.collect()
            loaded.append((name, [r() is not None for r in alive]))
            module, tokenizer = causal_model("llama", seed=seed)
            alive.append(weakref.ref(module))
            return rl.LanguageModel(module, tokenizer, name=name)

        return load

    made = rl.implicit_reward(loader("policy", 1), loader("reference", 2), PAIRS).value
    assert loaded == [("policy", []), ("reference", [False])]
    for name, seed in (("a", 1), ("b", 2)):
        module, tokenizer = causal_model("llama", seed=seed)
        module.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    named = rl.implicit_reward(str(tmp_path / "a"), tmp_path / "b", PAIRS)
    np.testing.assert_allclose(named.value, made, atol=1e-6)
    assert named.meta["model"] == "a"


def test_different_tokenizers_are_refused():
    policy, _ = models("llama")
    other = step_tokenizer()
    other.add_tokens(["Paris"])
    module, _ = causal_model("llama", other, seed=2)
    with pytest.raises(rl.DataError, match="different tokenizers"):
        rl.implicit_reward(policy, rl.LanguageModel(module, other), PAIRS)


def test_other_depths_are_refused_by_the_parts_alone():
    policy, _ = models("llama")
    module, tokenizer = causal_model("llama", n_layers=1, seed=2)
    reference = rl.LanguageModel(module, tokenizer)
    assert rl.implicit_reward(policy, reference, PAIRS).value.shape == (6, 3, 2)
    for method in (rl.implicit_lens, rl.implicit_contributions):
        with pytest.raises(rl.StructureError, match="part by part"):
            method(policy, reference, PAIRS)


def test_bad_input():
    policy, reference = models("llama")
    with pytest.raises(rl.DataError, match="beta"):
        rl.implicit_reward(policy, reference, PAIRS, beta=0.0)
    with pytest.raises(rl.DataError, match="response's end was not understood"):
        require_end.__wrapped__("all")
    with pytest.raises(rl.DataError, match="no token"):
        rl.implicit_reward(policy, reference, [rl.Pair("a", "", "b")], end="none")
    assert rl.implicit_reward(policy, reference, [rl.Pair("a", "", "b")]).value.chosen_tokens[0] == 2
    with pytest.raises(rl.LoadError, match="could not be loaded"):
        rl.implicit_reward("no/such-model-here", reference, PAIRS)
    with pytest.raises(rl.DataError, match="was not understood"):
        rl.implicit_reward(policy.module, reference, PAIRS)
    with pytest.raises(rl.DataError, match="policy was not understood"):
        rl.implicit_reward(lambda: None, reference, PAIRS)


def test_a_generation_prompt_that_the_conversation_does_not_begin_with_is_refused():
    template = (
        "{{ bos_token }}"
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n<think>\\n' }}{% endif %}"
    )
    tokenizer = step_tokenizer(chat_template=template)
    policy, reference = (rl.LanguageModel(*causal_model("llama", tokenizer, seed=s)) for s in (1, 2))
    with pytest.raises(rl.DataError, match="does not follow the generation prompt"):
        rl.implicit_reward(policy, reference, PAIRS)


def test_results_are_saved_and_read_back_and_leave_nothing_behind(tmp_path):
    policy, reference = models("llama")
    calls = (rl.implicit_reward, rl.implicit_tokens, rl.implicit_lens, rl.implicit_contributions)
    for method in calls:
        result = method(policy, reference, PAIRS)
        assert rl.load_result(result.save(tmp_path / "r.nc")).dataset.equals(result.dataset)
        assert result.plot() is not None and repr(result)
    for per in (rl.implicit_lens, rl.implicit_contributions):
        assert "position" in per(policy, reference, PAIRS[:2], per="token").value.dims
    for lm in (policy, reference):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.module.modules())
