"""Numbers that can be worked out by hand, planted rules, and attributions checked by intervening."""

import numpy as np
import pytest
import torch
from torch import nn

import reward_lens as rl
from families import STRUCTURES, TEXT_PAIRS, tiny_model
from micro import EXPECTED, EXPECTED_CONTRIBUTIONS, EXPECTED_LENS, PROMPT, micro_model
from planted import planted_model, planted_pairs
from reward_lens import stats

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]


@pytest.fixture(scope="module")
def micro():
    return rl.RewardModel(*micro_model(), name="micro")


def test_rewards_are_the_literals(micro):
    for response, reward in EXPECTED.items():
        assert micro.score(PROMPT, response) == pytest.approx(reward, abs=1e-5)


def test_lens_and_contributions_are_the_literals(micro):
    pairs = [rl.Pair(PROMPT, "b", "c")]
    lens = rl.reward_lens(micro, pairs, norm="own").value.sel(side="chosen")[0]
    np.testing.assert_allclose(lens, EXPECTED_LENS, atol=1e-5)
    parts = rl.contributions(micro, pairs).value.sel(side="chosen")[0]
    for component, value in EXPECTED_CONTRIBUTIONS.items():
        assert float(parts.sel(component=component)) == pytest.approx(value, abs=1e-5)
    assert float(parts.sel(component="norm")) == 0.0


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_contribution_is_what_removing_the_write_takes_away(family):
    """With every later write and the norm's scale pinned, dropping one write moves the reward by minus its
    contribution: the residual is recomputed as the sum of the others and read by the frozen norm."""
    rm = rl.RewardModel(*tiny_model(family))
    acts = rl.capture(rm, PAIRS)
    h = acts[f"L{rm.n_layers - 1}.resid_post"]
    scale = rm.readout.norm.scale(h)
    parts = rl.contributions(rm, acts, scale="own").value
    writes = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    full = rm.readout.norm.frozen(h, scale)
    for write in writes:
        without = rm.readout.norm.frozen(h - acts[write], scale)
        moved = ((full - without) @ rm.readout.weight).numpy()
        for start, side in enumerate(("chosen", "rejected")):
            np.testing.assert_allclose(parts.sel(side=side, component=write), moved[start::2], atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_scale_of_a_norm_near_zero_is_what_epsilon_makes_it(family):
    module, tokenizer = tiny_model(family)
    norm, eps = rl.RewardModel(module, tokenizer).readout.norm, {"llama": 1e-6, "gpt2": 1e-5}[family]
    x = torch.randn(norm.gain.shape, generator=torch.Generator().manual_seed(0))
    for h in (x, 1e-3 * x, 1e-7 * x, 0 * x, 0 * x + norm.centred):
        spread = float(h.var(correction=0) if norm.centred else h.square().mean())
        assert norm.scale(h).item() == pytest.approx((spread + eps) ** -0.5, rel=1e-6)
        np.testing.assert_allclose(norm.frozen(h, norm.scale(h)), norm(h), atol=1e-4)


def test_a_part_behind_a_norm_that_writes_nothing_is_split_like_the_others():
    module, tokenizer = tiny_model("gemma2")
    nn.init.zeros_(module.model.layers[1].mlp.down_proj.weight)
    parts = rl.contributions(rl.RewardModel(module, tokenizer), PAIRS[:2], by="neuron").value
    silent = parts.isel(component=(parts.layer == 1) & (parts.kind == "neuron"))
    assert silent.size and not silent.any()


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_last_write_is_removed_by_a_real_intervention(family):
    """The last MLP write has no later reader but the norm: zeroing it in the pass is h - write, read live."""
    rm = rl.RewardModel(*tiny_model(family))
    last = f"L{rm.n_layers - 1}.mlp"
    acts = rl.capture(rm, PAIRS)
    expected = rm.readout.reward(acts[f"L{rm.n_layers - 1}.resid_post"] - acts[last]).numpy()
    found = rl.intervene(rm, PAIRS, {last: rl.zeros()}).value.sel(state="intervened")
    np.testing.assert_allclose(found.sel(side="chosen"), expected[::2], atol=2e-5)
    np.testing.assert_allclose(found.sel(side="rejected"), expected[1::2], atol=2e-5)


class TestInterventions:
    @pytest.fixture(scope="class", params=["llama", "bloom"])
    @classmethod
    def rm(cls, request):
        return rl.RewardModel(*tiny_model(request.param))

    def test_mask_is_exact_at_both_ends_and_moves_between(self, rm):
        clean = rl.intervene(rm, PAIRS, {"L1.attn": rl.zeros()}, mask=0.0).value
        assert float(np.abs(clean.sel(state="change")).max()) == 0.0
        changes = [
            rl.intervene(rm, PAIRS[:1], {"L1.attn": rl.zeros()}, mask=m).value.sel(side="chosen", state="change").item()
            for m in (0.25, 1.0)
        ]
        assert 0 < abs(changes[0]) and changes[0] != changes[1]
        nothing = rl.constant(torch.full((rm.d_model,), float("inf")))
        at_zero = rl.intervene(rm, PAIRS, {"L1.attn": nothing}, mask=0.0).value  # no inf * 0
        assert float(np.abs(at_zero.sel(state="change")).max()) == 0.0

    def test_a_changed_residual_holds_its_value_whatever_was_done_to_the_write_before_it(self, rm):
        alone = rl.intervene(rm, PAIRS, {"L1.resid_mid": rl.zeros()}).value
        for order in (("L1.resid_mid", "L1.attn"), ("L1.attn", "L1.resid_mid")):
            both = rl.intervene(rm, PAIRS, dict.fromkeys(order, rl.zeros())).value
            np.testing.assert_allclose(both, alone, atol=2e-5)

    def test_adding_what_was_projected_out_restores_the_reward(self, rm):
        basis = torch.randn(2, rm.d_model, generator=torch.Generator().manual_seed(0))
        without = rl.intervene(rm, PAIRS, {"L1.resid_pre": rl.project_out(basis)}).value
        assert float(np.abs(without.sel(state="change")).max()) > 1e-3
        twice = rl.intervene(rm, PAIRS, {"L1.resid_pre": rl.project_out(basis[[1, 0]] * 3)}).value
        np.testing.assert_allclose(without, twice, atol=1e-5)
        dependent = torch.cat([basis, basis.sum(0, keepdim=True), torch.zeros(1, rm.d_model)])  # no further dimension
        same = rl.intervene(rm, PAIRS, {"L1.resid_pre": rl.project_out(dependent)}).value
        np.testing.assert_allclose(without, same, atol=1e-5)
        with pytest.raises(rl.DataError, match=r"basis does not fit L1.resid_pre.*vectors of 3"):
            rl.intervene(rm, PAIRS, {"L1.resid_pre": rl.project_out(torch.ones(1, 3))})
        one, row = (rl.intervene(rm, PAIRS, {"L1.resid_pre": rl.project_out(v)}).value for v in (basis[0], basis[:1]))
        assert one.equals(row)
        for odd in (basis[None], basis / 0):
            with pytest.raises(rl.DataError, match="no set of vectors"):
                rl.project_out(odd)

    def test_steering_is_linear_at_the_last_residual_with_a_frozen_direction(self, rm):
        vector = torch.randn(rm.d_model, generator=torch.Generator().manual_seed(1))
        site = f"L{rm.n_layers - 1}.resid_post"
        h = rl.capture(rm, PAIRS, [site])[site]
        expected = (rm.readout.reward(h + 2.0 * vector) - rm.readout.reward(h)).numpy()[::2]
        found = rl.intervene(rm, PAIRS, {site: rl.add(vector, 2.0)}).value.sel(side="chosen", state="change")
        np.testing.assert_allclose(found, expected, atol=2e-5)

    def test_mean_ablation_of_a_single_run_is_itself(self, rm):
        acts = rl.capture(rm, ["A text of its own"], ["L1.mlp"])
        value = rl.intervene(rm, ["A text of its own"], {"L1.mlp": rl.mean_of(acts)}).value
        assert value.sel(state="change").item() == 0.0

    def test_values_that_hold_positions_have_no_mean_over_others(self, rm):
        reference = rl.capture(rm, PAIRS, ["L1.Q1", "L1.K0", "L1.P1"])
        for site in reference.tensors:
            with pytest.raises(rl.DataError, match=f"cannot come from another text.*mean_of at {site}.*ablate by zero"):
                rl.intervene(rm, PAIRS, {site: rl.mean_of(reference)})

    def test_lengths_that_differ_are_refused(self, rm):
        uneven = [p for p, (a, b) in zip(PAIRS, rm.tokenize_pairs(PAIRS), strict=True) if len(a) != len(b)]
        acts = rl.capture(rm, uneven, ["L1.mlp"], at="all").swapped()
        with pytest.raises(rl.AlignmentError, match="positions to change.*at='final'"):
            rl.intervene(rm, uneven, {"L1.mlp": rl.from_run(acts)}, at="all")

    def test_a_run_gives_values_at_the_same_positions_or_none(self, rm):
        short, long = ("Is 7 a prime number?", "Yes."), ("Is 7 a prime number?", "No, because it is 1, as you know")
        whole = rl.from_run(rl.capture(rm, [long], ["L1.mlp"], at="all"))
        for at in ("final", "response", "all"):  # the places are elsewhere in the longer text
            with pytest.raises(rl.AlignmentError, match=r"positions to change, .* in the source"):
                rl.intervene(rm, [short], {"L1.mlp": whole}, at=at)
        part = rl.capture(rm, [long], ["L1.mlp"], at=range(2, 5))
        with pytest.raises(rl.AlignmentError, match=r"3 \(4 to 6\) positions to change, 3 \(2 to 4\) in the source"):
            rl.intervene(rm, [short], {"L1.mlp": rl.from_run(part)}, at=range(4, 7))
        alone = [rl.intervene(rm, [short], {"L1.mlp": s}, at=range(2, 5)).value for s in (whole, rl.from_run(part))]
        np.testing.assert_allclose(*alone, atol=1e-6)  # of the prompt that both begin with
        with pytest.raises(rl.AlignmentError, match="run 1 to change, 1 runs in the source"):
            rl.intervene(rm, [short, short], {"L1.mlp": rl.from_run(part)}, at=range(2, 5))
        with pytest.raises(rl.DataError, match=r"do not hold L1.attn. Found: L1.mlp.*rl.capture"):
            rl.intervene(rm, [short], {"L1.attn": whole}, at=range(2, 5))

    def test_inputs_that_could_be_meant_otherwise_are_refused(self, rm):
        group = rl.Group("Write one word.", ("apple", "plum"))
        for inputs in (("Write one word.", "apple"), [group], [("Write one word.", "apple", "plum")], [3]):
            with pytest.raises(rl.DataError, match="not texts or pairs"):  # a prompt and its response, or two raw texts
                rl.capture(rm, inputs, ["L1.mlp"])
        assert len(rl.capture(rm, ["Write one word.", "apple"], ["L1.mlp"]).tokens) == 2

    @pytest.mark.parametrize("site", ["L9.attn", "L1.H77", "L1.Q99", "nonsense", "L1.N99999"])
    def test_sites_that_do_not_exist_are_refused(self, rm, site):
        with pytest.raises(rl.StructureError, match="site"):
            rl.intervene(rm, PAIRS, {site: rl.zeros()})

    def test_nan_from_an_intervention_is_refused(self, rm):
        with pytest.raises(rl.CheckFailed, match="NaN or infinite cells"):
            rl.intervene(rm, PAIRS, {"L1.mlp": rl.constant(torch.full((rm.d_model,), float("nan")))})


def test_parallel_blocks_have_no_resid_mid():
    rm = rl.RewardModel(*tiny_model("gpt_neox"))
    with pytest.raises(rl.StructureError, match="no resid_mid"):
        rl.capture(rm, PAIRS, ["L1.resid_mid"])


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_resid_mid_is_what_the_mlp_norm_reads(family):
    rm = rl.RewardModel(*tiny_model(family))
    seen = []
    name = "pre_feedforward_layernorm" if family == "gemma2" else "post_attention_layernorm"
    norm = rm.trunk.blocks[1].get_submodule(name)
    tokens = rm.tokenize("Hello", "World")
    with torch.no_grad():
        handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        rm.module(input_ids=torch.tensor([tokens.ids]))
        handle.remove()
    captured = rl.capture(rm, [("Hello", "World")], ["L1.resid_mid"], at="all")["L1.resid_mid"][0]
    assert torch.equal(captured, seen[0][0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_source_tokens_do_not_depend_on_the_attention_implementation(attention):
    module, tokenizer = tiny_model("llama")
    module.set_attn_implementation(attention)
    found = rl.contributions(rl.RewardModel(module, tokenizer), PAIRS, by="token").value
    reference, tokenizer = tiny_model("llama")
    reference.set_attn_implementation("eager")
    expected = rl.contributions(rl.RewardModel(reference, tokenizer), PAIRS, by="token").value
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_source_tokens_equal_a_loop_over_eager_attentions():
    """Attention rows from Hugging Face's own `output_attentions`, values and output map written out."""
    module, tokenizer = tiny_model("llama")
    module.set_attn_implementation("eager")
    rm = rl.RewardModel(module, tokenizer)
    pair = PAIRS[0]
    found = rl.contributions(rm, [pair], by="token").value.sel(side="chosen")[0]
    tokens = rm.tokenize(pair.prompt, pair.chosen)
    acts = rl.capture(rm, [pair])
    u = rm.readout.direction(acts["L2.resid_post"]).u[0]
    norms = []
    with torch.no_grad():
        handles = [
            b.input_layernorm.register_forward_hook(lambda m, a, out: norms.append(out[0])) for b in rm.trunk.blocks
        ]
        out = module(input_ids=torch.tensor([tokens.ids]), output_attentions=True)
        for handle in handles:
            handle.remove()
    for layer, block in enumerate(rm.trunk.blocks):
        attention, heads = out.attentions[layer][0, :, tokens.reward_pos], rm.n_heads
        values = block.self_attn.v_proj(norms[layer]).view(len(tokens), -1, module.config.head_dim)
        values = values.repeat_interleave(heads // values.shape[1], 1)
        mixed = attention.T[..., None] * values  # [source, head, head_dim]
        weight = block.self_attn.o_proj.weight
        expected = (mixed.flatten(1) @ weight.T @ u).detach().numpy()
        np.testing.assert_allclose(found.sel(component=f"L{layer}.attn")[: len(tokens)], expected, atol=2e-5)


def test_a_planted_length_rule_is_found():
    module, tokenizer = planted_model("length")
    rm = rl.RewardModel(module, tokenizer, name="planted")
    pairs = [rl.Pair(*texts[:3]) for texts in planted_pairs("length")]
    result = rl.accuracy(rm, pairs)
    assert float(result.value.sel(subset="all", rule="longer wins")) == 1.0
    assert float(result.value.sel(subset="all", rule="reward model")) == 1.0


def test_random_weights_are_a_control_and_leave_the_model_alone():
    rm = rl.RewardModel(*tiny_model("llama"))
    before = rm.score("Hello", "World")
    control = rl.random_weight_copy(rm, seed=0)
    assert control.score("Hello", "World") != before == rm.score("Hello", "World")
    result = rl.crystallization_depth(rm, PAIRS, control_seeds=2)
    assert result.value.dims == ("pair", "model") and list(result.value["model"].values)[0] == "trained"
    assert "(pair, model)" in rl.crystallization_depth.__doc__
    inside = result.value.values[np.isfinite(result.value.values)]
    assert ((inside >= 0) & (inside <= 1)).all()


@pytest.mark.parametrize("family", ["cohere", "gpt_oss"])
def test_random_weights_keep_norms_and_biases_of_two_dimensions(family):
    """Cohere has a gain a head and channel, experts a bias an expert and unit."""
    rm = rl.RewardModel(*tiny_model(family))
    new = dict(rl.random_weight_copy(rm).module.named_parameters())
    own = dict(rm.module.named_parameters())
    kept = [name for name in own if "norm" in name or "bias" in name]
    assert any(own[name].dim() == 2 for name in kept)
    assert all(
        torch.equal(own[name], new[name]) == (name in [*kept, "score.weight"]) for name in own if "sinks" not in name
    )


def test_crystallization_by_its_definition():
    rm = rl.RewardModel(*tiny_model("llama"))
    margins = rl.reward_lens(rm, PAIRS).value.sel(side="margin").values
    found = rl.crystallization_depth(rm, PAIRS).value.values
    for row, depth in zip(margins, found, strict=True):
        settled = [np.sign(m) == np.sign(row[-1]) and abs(m) >= abs(row[-1]) / 2 for m in row]
        first = next(d for d in range(len(row)) if all(settled[d:]))
        assert depth == pytest.approx(first / (len(row) - 1))


def test_an_interval_of_a_share_of_the_depth_stays_inside_it():
    deep = rl.crystallization_depth(rl.RewardModel(*tiny_model("llama")), PAIRS, control_seeds=4)
    assert deep.low is not None and float(deep.low.min()) >= 0 and float(deep.high.max()) <= 1
    over = stats.mean_interval(deep.value.values, [p.prompt_key for p in PAIRS])
    assert np.nanmax(over.high) > 1 or np.nanmin(over.low) < 0


def test_a_negative_number_of_controls_is_refused(micro):
    with pytest.raises(rl.DataError, match="negative number of control models.*control_seeds=-1"):
        rl.crystallization_depth(micro, PAIRS, control_seeds=-1)


def test_a_reward_of_zero_does_not_fail_the_lens_at_all_positions():
    """What is left over is measured against what the head sums, not against a reward that happens to be zero."""
    module, tokenizer = tiny_model("llama")
    pair = rl.Pair("Q?", "same", "same")
    head = torch.nn.Linear(module.score.in_features, 1)
    head.weight.data.copy_(module.score.weight.data)
    head.bias.data.fill_(-rl.RewardModel(module, tokenizer).score(pair.prompt, pair.chosen))
    module.score = head
    rm = rl.RewardModel(module, tokenizer)
    assert abs(rm.score(pair.prompt, pair.chosen)) < 1e-6
    for norm in ("own", "frozen"):
        at = rm.tokenize(pair.prompt, pair.chosen).reward_pos
        last = rl.reward_lens(rm, [pair], norm=norm, at="all").value.isel(depth=-1, position=at)
        assert float(np.abs(last).max()) < 1e-5


def test_top_keeps_what_is_large_in_pairs_and_names_the_split_it_is_not_for():
    """A component whose margins cancel over the pairs is no small one."""
    rm = rl.RewardModel(*tiny_model("llama"))
    whole = rl.contributions(rm, PAIRS, by="head", scale="own").value
    margins = whole.sel(side="margin").values
    largest, in_mean = (np.sort(np.argsort(-size)[:3]) for size in (np.abs(margins).mean(0), np.abs(margins.mean(0))))
    assert set(largest) != set(in_mean)
    kept = rl.contributions(rm, PAIRS, by="head", scale="own", top=3).value
    assert kept.component.values.tolist() == [*whole.component.values[largest], "rest"]
    np.testing.assert_allclose(kept.sum("component"), whole.sum("component"), atol=1e-5)
    with pytest.raises(rl.DataError, match="by='token', top=3"):
        rl.contributions(rm, PAIRS, by="token", top=3)
