"""Process reward models: scores as their authors compute them, boundaries, and what sums to a step's reward."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import reward_lens as rl
from reward_lens.model.step_tokens import StepTokenizer
from step_models import SOLUTIONS, STEP_TAG, causal_model, published, published_scores, step_tokenizer

NAMES = ("math-shepherd", "rlhflow", "skywork-o1", "trl", "qwen2.5-math-prm")
FEW = [rl.Solution(prompt, steps, id=f"s{i}") for i, (prompt, steps) in enumerate(SOLUTIONS)]
_MODELS: dict = {}


def model(name: str, dtype=torch.float32) -> rl.RewardModel:
    if (name, dtype) not in _MODELS:
        module, tokenizer, readout = published(name, dtype)
        _MODELS[name, dtype] = rl.step_model(module, tokenizer, readout, name=name)
    return _MODELS[name, dtype]


def log_odds(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_authors_code(name):
    result = rl.step_rewards(model(name), FEW)
    for solution in FEW:
        n = len(solution.steps)
        row = result.value.sel(solution=solution.id)[:n]
        own = published_scores(name, solution.prompt, list(solution.steps))
        np.testing.assert_allclose(row.probability, own, atol=2e-6)
        np.testing.assert_allclose(row, [log_odds(p) for p in own], rtol=2e-4)
        assert int(result.value.n_steps.sel(solution=solution.id)) == n
    assert {c.name for c in result.checks} >= {"solution cut at its steps"}


@pytest.mark.parametrize("name", NAMES)
def test_aggregates_are_columns_by_name(name):
    value = rl.step_rewards(model(name), FEW).value
    for i, solution in enumerate(FEW):
        p = np.array(published_scores(name, solution.prompt, list(solution.steps)))
        one = value[i]
        for column, expected in (("min", p.min()), ("product", p.prod()), ("last", p[-1])):
            assert float(one[f"{column}_probability"]) == pytest.approx(expected, abs=3e-6)
        assert float(one.min_log_odds) == pytest.approx(float(np.nanmin(one.values)))
        assert float(one.last_log_odds) == pytest.approx(float(one.values[len(p) - 1]))


def test_log_odds_of_any_size_have_a_probability():
    module, tokenizer, readout = published("skywork-o1")
    with torch.no_grad():
        module.v_head.summary.weight.mul_(1e5)
    value = rl.step_rewards(rl.step_model(module, tokenizer, readout), FEW).value
    assert float(value.min()) < -710 and float(value.max()) > 710
    assert set(value.probability.values[~np.isnan(value)].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_lens_and_contributions_end_at_the_steps_rewards(name):
    rm = model(name)
    rewards = rl.step_rewards(rm, FEW).value
    for norm in ("own", "frozen"):
        lens = rl.step_lens(rm, FEW, norm).value
        np.testing.assert_allclose(lens.isel(depth=-1), rewards, atol=1e-4)
    for by in ("component", "head", "neuron"):
        parts = rl.step_contributions(rm, FEW, by)
        np.testing.assert_allclose(parts.value.sum("component", skipna=False), rewards, atol=1e-4)
    assert rl.step_contributions(rm, FEW).value.component.values[-1] == "bias"


def test_lens_and_contributions_equal_a_plain_loop():
    """Math-Shepherd on Mistral, by hand: RMSNorm written out, rows of the unembedding subtracted."""
    module, tok, _ = published("math-shepherd")
    rm = model("math-shepherd")
    text = rm.tokenizer.solution(FEW[0].messages, FEW[0].steps)
    seen = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, out, k=k: seen.__setitem__(f"L{k}.attn", out[0][0]))
        for k, layer in enumerate(module.model.layers)
    ]
    handles += [
        layer.mlp.register_forward_hook(lambda m, a, out, k=k: seen.__setitem__(f"L{k}.mlp", out[0]))
        for k, layer in enumerate(module.model.layers)
    ]
    with torch.no_grad():
        states = module(torch.tensor([text.tokens.ids]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    plus, minus = tok.encode("+")[-1], tok.encode("-")[-1]
    w = (module.lm_head.weight[plus] - module.lm_head.weight[minus]).detach()
    norm = module.model.norm
    final = states[0][0] + sum(seen.values())
    lens, parts = rl.step_lens(rm, FEW[:1]).value[0], rl.step_contributions(rm, FEW[:1]).value[0]
    with torch.no_grad():
        for t, at in enumerate(text.positions):
            for depth in range(2):
                assert float(lens[t, depth]) == pytest.approx(float(norm(states[depth][0, at]) @ w), abs=1e-4)
            scale = (final[at].square().mean() + norm.variance_epsilon).rsqrt()
            for name, write in {"embed": states[0][0], **seen}.items():
                expected = float((write[at] * norm.weight * scale) @ w)
                assert float(parts[t].sel(component=name)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_load_report_and_every_method_read_the_last_step(name):
    rm = model(name)
    separator = rm.module.steps.separator
    rewards = rl.step_rewards(rm, FEW).value
    for i, solution in enumerate(FEW):
        for t in range(len(solution.steps)):
            text = separator.join(solution.steps[: t + 1])
            assert rm.score(solution.prompt, text) == pytest.approx(float(rewards[i, t]), abs=1e-4)
        assert rm.hf_score(solution.prompt, text) == pytest.approx(float(rewards[i, t]), abs=1e-4)
    report = rm.load_report.value
    assert float(report.sel(check="template tokens")) == 0
    assert {"own reward", "padding", "batching", "decomposition", "replay"} <= set(report.check.values)


@pytest.mark.parametrize("name", ["math-shepherd", "rlhflow"])
def test_effects_at_a_step_equal_a_change_in_the_whole_solution(name):
    """Zeroing a write at a step's position of the whole, uncut solution moves that step's score as `effects` says."""
    rm = model(name)
    module = published(name)[0]
    a, b = FEW[0], FEW[2]
    pairs = rl.step_pairs([a], [b], 1, rm.module.steps.separator)
    effects = rl.effects(rm, pairs, ["L0.mlp", "L1.attn"], mode="zero").value[0]
    for side, solution in (("chosen", a), ("rejected", b)):
        text = rm.tokenizer.solution(solution.messages, solution.steps)
        rewards = []
        for layer in (None, 0, 1):
            handle = None
            if layer is not None:
                part = module.model.layers[layer].mlp if layer == 0 else module.model.layers[layer].self_attn

                def blank(m, args, out, at=text.positions[1]):
                    new = (out if isinstance(out, torch.Tensor) else out[0]).clone()
                    new[:, at] = 0
                    return new if isinstance(out, torch.Tensor) else (new, *out[1:])

                handle = part.register_forward_hook(blank)
            with torch.no_grad():
                logits = module(torch.tensor([text.tokens.ids])).logits[0, text.positions[1]]
            tok = rm.tokenizer.hf
            rewards.append(float(logits[tok.encode("+")[-1]] - logits[tok.encode("-")[-1]]))
            if handle is not None:
                handle.remove()
        for component, changed in zip(("L0.mlp", "L1.attn"), rewards[1:], strict=True):
            expected = rewards[0] - changed
            assert float(effects.sel(side=side, component=component)) == pytest.approx(expected, abs=2e-4)


def test_a_step_that_the_template_spells_as_well_is_found_where_it_stands():
    """Turns end in "<|end|>\\n<|assistant|>\\n", which holds these steps too."""
    rm = model("rlhflow")
    for steps in (["x", "a"], ["s", "the end", "assistant"], ["user", "x"]):
        tokens = rm.tokenizer.solution([{"role": "user", "content": "Q"}], steps).tokens
        said = "".join(tokens.pieces[i] for i in tokens.response).strip()
        assert said == "<|end|>\n<|assistant|>\n+<|end|>\n<|user|>\n".join(steps)


def test_a_batch_and_padding_change_nothing():
    rm = model("math-shepherd")
    together = rl.step_rewards(rm, FEW).value
    for i, solution in enumerate(FEW):
        n = len(solution.steps)
        np.testing.assert_allclose(rl.step_rewards(rm, [solution]).value[0], together[i, :n], atol=1e-5)


def test_sixteen_bits_keep_the_identities():
    rm = model("math-shepherd", torch.bfloat16)
    assert rm.sixteen_bit and rm.module.score.weight.dtype == torch.float32
    rewards = rl.step_rewards(rm, FEW).value
    parts = rl.step_contributions(rm, FEW).value
    assert "rounding" in parts.component
    np.testing.assert_allclose(parts.sum("component", skipna=False), rewards, atol=2e-2)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3", "granite"])
def test_other_families(family):
    module, tokenizer = causal_model(family)
    rm = rl.step_model(module, tokenizer, rl.STEP_READOUTS["rlhflow"])
    text = rm.tokenizer.solution(FEW[0].messages, FEW[0].steps)
    with torch.no_grad():
        logits = module(torch.tensor([text.tokens.ids])).logits[0, list(text.positions)]
    own = logits[:, tokenizer.encode("+")[-1]] - logits[:, tokenizer.encode("-")[-1]]
    np.testing.assert_allclose(rl.step_rewards(rm, FEW[:1]).value[0], own, atol=1e-4)


def test_a_cap_on_the_logits_is_refused():
    module, tokenizer = causal_model("gemma2")
    with pytest.raises(rl.StructureError, match="not its rows"):
        rl.step_model(module, tokenizer, rl.STEP_READOUTS["math-shepherd"])


def test_hidden_units_make_a_local_readout_whose_slope_is_the_gradient():
    """Qwen2.5-Math-PRM: u is the gradient with the norm's scale held; contributions say that it is local."""
    rm = model("qwen2.5-math-prm")
    assert rm.readout.kind == "mlp"
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 3
    scale = rm.readout.norm.scale(h)
    at = h.clone().requires_grad_(True)
    n = rm.readout.norm.frozen(at, scale)
    first, last = rm.module.score[0], rm.module.score[2]
    (torch.relu(n @ first.weight.T + first.bias) @ last.weight[0]).sum().backward()
    direction = rm.readout.direction(h)
    torch.testing.assert_close(direction.u, at.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        (direction.u * h).sum(1) + direction.constant, rm.readout.reward(h), atol=1e-4, rtol=1e-4
    )
    assert rl.step_contributions(rm, FEW).meta["exactness"] == "local"
    assert rl.step_contributions(model("trl"), FEW).meta["exactness"] == "exact"
    assert rl.contributions(rm, [rl.Pair("a", "b", "c")]).meta["exactness"] == "local"
    with pytest.raises(rl.DataError, match="no head row to edit"):
        rl.edit_head(rm, [torch.ones(32)])


def test_other_hidden_heads_are_refused():
    module, tokenizer, _ = published("trl")
    head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    shaped = nn.Module()
    shaped.model, shaped.score, shaped.config = module.base_model, head, module.config
    with pytest.raises(rl.StructureError, match="Sequential"):
        rl.step_model(shaped, tokenizer, rl.STEP_READOUTS["qwen2.5-math-prm"])


def test_intervals_are_over_prompts():
    solutions = [rl.Solution(f"Prompt {i}", ["one", "two"][: 1 + i % 2]) for i in range(14)]
    result = rl.step_rewards(model("trl"), solutions)
    assert result.low.dims == ("step",) and bool((result.low <= result.mean).all())
    assert set(result.meta["aggregates"]) == {
        "min_log_odds", "last_log_odds", "min_probability", "product_probability", "last_probability"
    }  # fmt: skip
    assert result.meta["n_prompts"] == 14


def test_results_are_saved_and_read_back_and_leave_nothing_behind(tmp_path):
    rm = model("skywork-o1")
    hooked = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in rm.module.modules())
    for result in (rl.step_rewards(rm, FEW), rl.step_lens(rm, FEW), rl.step_contributions(rm, FEW)):
        assert rl.load_result(result.save(tmp_path / "r.nc")).dataset.equals(result.dataset)
        assert result.unit == "log-odds" and result.plot() is not None and repr(result)
    assert hooked == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in rm.module.modules())


@pytest.mark.parametrize("name", ["rlhflow", "qwen2.5-math-prm"])
def test_random_weights_keep_the_layout_and_the_whole_head(name):
    control = rl.random_weight_copy(model(name))
    assert control.tokenizer.form == model(name).tokenizer.form
    kept, new = (dict(rm.module.score.named_parameters()) for rm in (model(name), control))
    assert all(torch.equal(kept[key], new[key]) for key in kept)
    assert control.score("Q", "A step.") == pytest.approx(control.hf_score("Q", "A step."), abs=1e-4)


@pytest.mark.parametrize("name", ["math-shepherd", "qwen2.5-math-prm"])
def test_the_base_under_the_head_of_steps(name):
    rm = model(name)
    trunk = copy.deepcopy(rm.module.trunk)
    trunk.norm.weight.data.mul_(1.5)
    found = rl.base_under_head(rm, trunk)
    tokens = rm.tokenize("Q", "A step.")
    with torch.no_grad():
        own = rm.module.score(trunk(torch.tensor([tokens.ids])).last_hidden_state)[0, tokens.reward_pos, 0]
    assert found.score("Q", "A step.") == pytest.approx(float(own), abs=1e-4)


def test_no_boundary_and_no_text_are_refused():
    rm = model("math-shepherd")
    with pytest.raises(rl.DataError, match="No step boundary"):
        rl.step_rewards(rm, [("Question?", "One step without a marker")])
    text = f"One{STEP_TAG}Two{STEP_TAG}"
    cut = rl.step_rewards(rm, [("Question?", text)]).value
    np.testing.assert_allclose(cut, rl.step_rewards(rm, [("Question?", ["One", "Two"])]).value)
    for steps in ([], ["a", " "], ["  "]):
        with pytest.raises(rl.DataError, match="no text|blank"):
            rl.step_rewards(rm, [("Question?", steps)])
    with pytest.raises(rl.DataError, match="no text"):
        rm.score("Question?", "")
    with pytest.raises(rl.DataError, match="no solutions"):
        rl.step_rewards(rm, [])
    with pytest.raises(rl.DataError, match="rl.Solution"):
        rl.step_rewards(rm, [rl.Pair("a", "b", "c")])


def test_a_marker_of_two_tokens_or_inside_a_token_is_refused():
    tokenizer = step_tokenizer()
    assert len(tokenizer("##", add_special_tokens=False)["input_ids"]) == 2
    for marker, step in (("##", "a step"), ("h", "t")):  # "t" and "h" merge
        readout = rl.StepReadout(1, 0, marker, "text")
        other = StepTokenizer(tokenizer, None, None, readout)
        with pytest.raises(rl.DataError, match="not a token of its own"):
            other.solution([{"role": "user", "content": "Prompt"}], [step, "more"])
    two = StepTokenizer(tokenizer, None, None, rl.StepReadout(1, 0, "##", "text", by_step=True))
    text = two.solution([{"role": "user", "content": "Prompt"}], ["a step", "more"])
    assert [text.tokens.pieces[p] for p in text.positions] == ["#", "#"]


def test_steps_with_the_marker_inside_are_refused():
    rm = model("math-shepherd")
    with pytest.raises(rl.DataError, match="holds the marker"):
        rl.step_rewards(rm, [("Question?", [f"One{STEP_TAG} and", "Two"])])
    with pytest.raises(rl.DataError, match="holds the separator"):
        rl.step_pairs([rl.Solution("Q", [f"a{STEP_TAG}b"])], [rl.Solution("Q", ["c"])], 0, rm.module.steps.separator)
    with pytest.raises(rl.DataError, match="1 chosen and 0 rejected"):
        rl.step_pairs([rl.Solution("Q", ["a"])], [], 0, STEP_TAG)
    with pytest.raises(rl.DataError, match="no such step"):
        rl.step_pairs([rl.Solution("Q", ["a"])], [rl.Solution("Q", ["c"])], 1, STEP_TAG)
    with pytest.raises(rl.DataError, match="different prompts"):
        rl.step_pairs([rl.Solution("Q", ["a"])], [rl.Solution("P", ["c"])], 0, STEP_TAG)


def test_bad_readouts_are_refused():
    module, tokenizer, _ = published("math-shepherd")
    with pytest.raises(rl.LoadError, match="not understood"):
        rl.StepReadout("+", 0, "+")
    with pytest.raises(rl.LoadError, match="not understood"):
        rl.StepReadout(1, 0, "+", "chat", by_step=True)
    with pytest.raises(rl.LoadError, match="names no row"):
        rl.step_model(module, tokenizer, rl.StepReadout("plus", "minus", STEP_TAG, "text"))
    with pytest.raises(rl.LoadError, match="no such row"):
        rl.step_model(published("trl")[0], tokenizer, rl.StepReadout(2, 0, "\n", "text", by_step=True))
    with pytest.raises(rl.StructureError, match="no module at nowhere"):
        rl.step_model(module, tokenizer, rl.StepReadout(1, 0, STEP_TAG, "text", head="nowhere"))


def test_other_reward_models_do_not_reward_steps(tmp_path):
    from families import tiny_model

    module, tokenizer = tiny_model("llama", n_layers=1)
    with pytest.raises(rl.StructureError, match="does not say how it rewards steps"):
        rl.step_rewards(rl.RewardModel(module, tokenizer), FEW)
    with pytest.raises(rl.StructureError, match="cannot be written as a classifier"):
        model("trl").save_pretrained(tmp_path / "out")


def test_a_model_that_sees_later_steps_is_refused():
    module, tokenizer = causal_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(rl.StructureError, match="rewards a step by what follows it"):
        rl.step_model(module, tokenizer, rl.STEP_READOUTS["math-shepherd"])
