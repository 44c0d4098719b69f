"""Heads whose weights depend on the prompt: what is exact for one prompt, where the gate is, what moves it."""

import pytest
import torch

import published_heads as published
import reward_lens as rl
from families import TEXT_PAIRS
from reward_lens.engine import hooks
from reward_lens.engine.gradients import gradients
from reward_lens.model.heads.gated import USER_TURN_ENDS

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS])
gated = pytest.mark.parametrize("name", ["armo", "qrm"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: published.save(tmp_path_factory.mktemp(name), name) for name in ("armo", "qrm")}


@pytest.fixture(scope="module")
def models(folders):
    return {name: rl.load(folder) for name, folder in folders.items()}


@gated
def test_for_one_prompt_the_gated_reward_is_linear_in_the_state_of_the_response(folders, name):
    rm = rl.load(folders[name], dtype=torch.float64)
    readout = rm.readout
    texts = [rm.tokenize("Is 7 a prime number?", r) for r in ("Yes, it is.", "No, it is 1", "Maybe")]
    gates = rm.readout_inputs(texts)
    assert bool((gates == gates[0]).all())
    torch.manual_seed(0)
    h = torch.randn(3 * rm.d_model, rm.d_model, dtype=torch.float64)
    normed, rewards = readout.norm(h), readout.reward(h, gates[:1])
    row = torch.linalg.lstsq(normed[: 2 * rm.d_model], rewards[: 2 * rm.d_model, None]).solution[:, 0]
    assert (normed @ row - rewards).abs().max() < 1e-6
    direction = readout.direction(h, gates[:1])
    assert ((direction.u * h).sum(-1) + direction.constant - rewards).abs().max() < 1e-6
    other = rm.readout_inputs([rm.tokenize("Write one word.", "Yes, it is.")])
    assert (readout.reward(h, other) - rewards).abs().max() > 1e-3


@gated
def test_the_gate_is_read_where_the_user_turn_ends(folders, models, name):
    rm = models[name]
    for prompt, chosen, _ in TEXT_PAIRS[:3]:  # the third has two user turns
        tokens = rm.tokenize(prompt, chosen)
        at = rm.readout.gate_position(tokens)
        assert at == published.published_gate(folders[name], tokens.ids) < tokens.response.start
        assert tokens.pieces[at] == "<|end|>"
    with pytest.raises(rl.DataError, match="end of the user turn was not found"):
        rm.rewards([rm.tokenizer.text("no turns here")])
    assert USER_TURN_ENDS["llama"] == (128009, 128006, 78191, 128007, 271)


@gated
def test_slopes_in_the_prompt_hold_both_routes(models, name):
    """A state before the gate moves the reward by what the response reads of it and by the weights."""
    rm = models[name]
    tokens = rm.tokenize(*TEXT_PAIRS[0][:2])
    site, gate = rl.Site("resid_post", 1), rm.readout.gate_position(tokens)
    torch.manual_seed(1)
    step = 2e-3 * torch.randn(rm.d_model)
    slope = gradients(rm, tokens, [site]).slopes[site][gate]
    moved = []
    for sign in (1, -1):

        def push(x, sign=sign):
            x = x.clone()
            x[:, gate] += sign * step
            return x

        with torch.no_grad(), hooks.attached([rm.trunk.edit_residual(2, push)]):
            moved.append(float(rm.module(input_ids=torch.tensor([tokens.ids])).logits[0, 0]))
    assert (moved[0] - moved[1]) / 2 == pytest.approx(float(slope @ step), rel=0.05, abs=2e-5)


@gated
def test_gate_weights_are_the_published_ones(folders, models, name):
    rm = models[name]
    result = rl.gate_weights(rm, PAIRS)
    assert result.value.dims == ("pair", "objective", "weight") and result.unit == "weight"
    assert list(result.value.objective.values) == list(rm.objectives[1:])
    for pair, row in zip(PAIRS[:3], result.value, strict=False):
        columns = published.published_columns(folders[name], name, rm.tokenize(pair.prompt, pair.rejected).ids)
        by = row.sel(weight="own" if name == "armo" else "transformed").values
        assert float(by @ columns[1:].numpy()) == pytest.approx(float(columns[0]), abs=1e-5)
    assert float(result.value.sel(weight="transformed").sum("objective").std()) < 1e-6  # a softmax times a factor
    with pytest.raises(rl.StructureError, match="no gate that reads the prompt"):
        rl.gate_weights(rm.for_objective(1), PAIRS)


@gated
def test_gate_attribution_sums_to_the_weights(models, name):
    rm = models[name]
    weights = rl.gate_weights(rm, PAIRS[:3]).value.sel(weight="transformed").values
    by_part = rl.gate_attribution(rm, PAIRS[:3])
    assert by_part.value.sum("component").values == pytest.approx(weights, abs=1e-5)
    assert by_part.mean is not None
    by_token = rl.gate_attribution(rm, PAIRS[:3], by="token").value
    assert (by_token.sum("position") + by_token.constant).values == pytest.approx(weights, abs=1e-5)
    lengths = [rm.readout.gate_position(rm.tokenize(p.prompt, p.chosen)) + 1 for p in PAIRS[:3]]
    assert by_token.n_positions.values.tolist() == lengths
    assert by_token.isel(pair=0, position=lengths[0] - 1).piece.item() == "<|end|>"


END = "<|end|>\n<|assistant|>\n"  # the tokens that end a user turn; the published search takes their last place
REPEATS = rl.Pairs([rl.Pair("Say it.", f"Hello.{END}q", "Hello there", id="one")])


def test_a_response_that_repeats_the_end_of_the_user_turn_has_weights_of_its_own(folders, models):
    rm = models["armo"]
    text, other = rm.tokenize_pairs(REPEATS)[0]
    assert rm.readout.gate_position(text) in text.response and rm.readout.gate_position(other) in other.prompt
    expected = published.published_columns(folders["armo"], "armo", text.ids)[0]
    assert rm.score(REPEATS[0].prompt, REPEATS[0].chosen) == pytest.approx(float(expected), abs=1e-5)
    for ask in (rl.gate_weights, rl.gate_attribution):
        with pytest.raises(rl.DataError, match="responses of pair one are read with different weights"):
            ask(rm, REPEATS)


def test_attributions_move_a_gate_that_is_read_in_the_response(models):
    """Start and slope against interventions, in which the gate answers; a token at which it reads cannot be hidden."""
    rm = models["armo"]
    text = rm.tokenize(REPEATS[0].prompt, REPEATS[0].chosen)
    side = {"pair": "one", "side": "chosen"}

    def reward(mask: float) -> float:
        found = rl.intervene(rm, [text], {"embed": rl.zeros()}, at=text.response, mask=mask)
        return float(found.value.sel(state="intervened")[0])

    slope = rl.token_attribution(rm, REPEATS, method="gradient", baseline="zero").value.sel(side)
    assert float(slope.sum()) == pytest.approx((reward(0.0) - reward(2e-3)) / 2e-3, rel=0.05)
    whole = rl.token_attribution(rm, REPEATS, method="integrated", baseline="zero").value.sel(side)
    assert float(whole.start) == pytest.approx(reward(1.0), abs=1e-5)
    assert float(whole.sum()) == pytest.approx(reward(0.0) - reward(1.0), abs=0.05)
    hidden = rl.token_attribution(rm, REPEATS, method="leave_one_out", removal="mask").value.sel(side)
    gone = hidden.isnull()[: len(text.response)].values.nonzero()[0] + text.response.start
    assert gone.tolist() == [rm.readout.gate_position(text)]


@gated
def test_a_reading_without_the_state_of_the_prompt_is_refused(models, name):
    for ask in (models[name].readout.reward, models[name].readout.direction):
        with pytest.raises(
            rl.StructureError, match="weights of this reward depend on the prompt.*helpsteer-helpfulness"
        ):
            ask(torch.zeros(1, 32))
    with pytest.raises(rl.StructureError, match="has no last depth under a gate that reads the prompt"):
        rl.gradient_lens(models[name], PAIRS, at="all")


@gated
def test_a_random_copy_keeps_the_head_and_its_gate(models, name):
    copy = rl.random_weight_copy(models[name])
    own, new = models[name].module.state_dict(), copy.module.state_dict()
    same = {key.split(".")[0] for key in own if torch.equal(own[key], new[key])}
    assert {"regression_layer", "reward_transform_matrix", "gating"} <= same
    assert not torch.equal(own["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])


def test_an_unknown_template_of_a_gate_is_refused(tmp_path):
    folder = published.save(tmp_path, "armo")
    config = (
        (folder / "config.json").read_text().replace("gating_token_pattern", "other").replace('"llama"', '"mistral"')
    )
    (folder / "config.json").write_text(config)
    with pytest.raises(rl.StructureError, match="Where the gate of this head is read is not known.*'mistral'"):
        rl.load(folder)
