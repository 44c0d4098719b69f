"""Encoders with a head on their first token: scores, spans, parts, patches, refusals, against slow transcriptions."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import reward_lens as rl
from encoders import ENCODERS, MAX_POSITIONS, OTHERS, POST_NORM, loaded, tiny_encoder
from every_method import METHODS, NATURAL
from families import TEXT_PAIRS, more
from reference.sweeps import patched_reward, values_at
from reward_lens.engine.gradients import gradients
from reward_lens.engine.patching import Edit, patch_rows
from reward_lens.methods.observation.embedding_paths import baseline_residual
from reward_lens.methods.observation.lens import random_weight_copy
from reward_lens.model.structure import find_structure

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS if isinstance(texts[0], str)]
EQUAL = rl.Pair("What is 2 + 2?", "It is four.", "It is five.", id="equal")
UNEQUAL = rl.Pair("Is 7 prime?", "Yes.", "No, not it", id="unequal")
every = pytest.mark.parametrize("name", ENCODERS)
post_norm = pytest.mark.parametrize("name", POST_NORM)


def encoded(rm, pair: rl.Pair, response: str):
    return rm.tokenizer.hf(pair.prompt, response, return_tensors="pt")


@every
def test_structure_is_found_proven_and_reported(name):
    rm = loaded(name)
    found = rm.structure
    assert found.reads_first and found.pooler and not found.parallel
    assert (found.norms is not None) == (name in POST_NORM)
    assert len(found.gaps) == 3 and max(found.gaps) < 1e-6
    report = rm.load_report.value
    assert float(report.sel(check="own reward")) < 1e-5
    reuse = report.sel(check="prefix reuse")
    assert float(reuse) > 0.05 and np.isinf(reuse.tolerance) and not rm.reuses_prefix()
    assert rm.readout.kind == "mlp" and rm.readout.exactness == "local" and rm.objectives == ("reward",)


@pytest.mark.parametrize("name", [*ENCODERS, *more(*OTHERS)])
def test_rewards_are_the_models_own_whatever_the_batch(name):
    rm = loaded(name)
    texts = [(p, r) for p in PAIRS for r in (p.chosen, p.rejected)]
    with torch.no_grad():
        own = torch.cat([rm.module(**encoded(rm, p, r)).logits[:, 0] for p, r in texts])
    rewards = rm.rewards([rm.tokenize(p.prompt, r) for p, r in texts])
    assert rewards.numpy() == pytest.approx(own.numpy(), abs=5e-6)
    pair = PAIRS[0]
    assert rm.score(pair.prompt, pair.chosen) == pytest.approx(rm.hf_score(pair.prompt, pair.chosen), abs=1e-6)
    assert list(rm.tokenize(pair.prompt, pair.chosen).ids) == encoded(rm, pair, pair.chosen)["input_ids"][0].tolist()


def written_out(name: str, module, state: torch.Tensor) -> torch.Tensor:
    """The published heads, on the first token's final state."""
    if name == "bert":
        pooled = torch.tanh(F.linear(state, module.bert.pooler.dense.weight, module.bert.pooler.dense.bias))
        last = module.classifier
    elif name == "deberta":
        pooled = F.gelu(F.linear(state, module.pooler.dense.weight, module.pooler.dense.bias))
        last = module.classifier
    elif name == "roberta":
        dense, last = module.classifier.dense, module.classifier.out_proj
        pooled = torch.tanh(F.linear(state, dense.weight, dense.bias))
    else:
        norm = module.model.final_norm
        state = F.layer_norm(state, state.shape[-1:], norm.weight, None, norm.eps)
        hidden = F.gelu(F.linear(state, module.head.dense.weight))
        norm = module.head.norm
        pooled, last = F.layer_norm(hidden, state.shape[-1:], norm.weight, None, norm.eps), module.classifier
    return F.linear(pooled, last.weight, last.bias)[..., 0]


@every
def test_head_is_the_published_arithmetic(name):
    rm = loaded(name)
    states = torch.randn(5, rm.d_model, generator=torch.Generator().manual_seed(3)) * 2
    with torch.no_grad():
        assert rm.readout.reward(states).numpy() == pytest.approx(
            written_out(name, rm.module, states).numpy(), abs=1e-6
        )
        assert rm.readout.reward(states.view(5, 1, -1)).shape == (5, 1)


@every
def test_spans_are_those_of_the_two_texts(name):
    rm = loaded(name)
    for prompt, response in (("Who \U0001f642?", "Me, I am."), ("a", ""), ("", "b")):
        t = rm.tokenize(prompt, response)
        read = ["".join(t.pieces[i] for i in span if t.ids[i] > 3) for span in (t.prompt, t.response, t.tail)]
        assert read == [prompt, response, ""]
        assert t.reward_pos == 0 and t.pieces[0] == "[CLS]" and t.pieces[t.response.stop] == "[SEP]"
        assert t.pieces[t.prompt[-1]] == "[SEP]" and list(t.seen) == list(range(len(t)))
    raw = rm.tokenizer.text("plain")
    assert raw.reward_pos == 0 and "".join(raw.pieces[i] for i in raw.response) == "plain"


def test_a_raw_text_that_is_cut_keeps_its_separator():
    tokenizer = loaded("bert").tokenizer
    whole, cut = tokenizer.text("x" * 20), tokenizer.text("x" * 1000, "right")
    assert (whole.response, whole.tail) == (range(1, 21), range(21, 22))
    assert len(cut) == tokenizer.max_length and cut.truncated == 1002 - len(cut)
    assert list(cut.ids) == tokenizer.hf("x" * 1000, truncation=True, max_length=len(cut))["input_ids"]


def test_what_is_no_pair_is_refused():
    rm = loaded("deberta")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(rl.DataError, match="several turns has no official form"):
        rm.score(turns, "d")
    with pytest.raises(rl.DataError, match="spells the separator"):
        rm.score("a [SEP] b", "c")
    with pytest.raises(rl.DataError, match="longer than the model can read"):
        rm.score("a" * MAX_POSITIONS, "b")
    half = MAX_POSITIONS // 2
    over = 2 * half + 3 - MAX_POSITIONS
    for side, kept in (("left", half), ("right", half - over)):
        text = rm.tokenizer.conversation([{"role": "user", "content": "p" * half}], "r" * half, side)
        assert len(text) == MAX_POSITIONS and text.truncated == over and len(text.response) == kept
        assert [text.pieces[i] for i in (0, text.prompt[-1], len(text) - 1)] == ["[CLS]", "[SEP]", "[SEP]"]


def test_positions_of_roberta_begin_behind_the_padding_token():
    rm = loaded("roberta")
    assert rm.trunk.first_position == 2 and rm.tokenizer.max_length == MAX_POSITIONS - 2
    assert loaded("bert").trunk.first_position == 0 and loaded("bert").trunk.second_begins == 2
    assert loaded("roberta").trunk.second_begins is None


def test_a_chat_template_is_used_where_there_is_one():
    module, tokenizer = tiny_encoder("modernbert")
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m['content'] }}[SEP]{% endfor %}"
    rm = rl.RewardModel(module, tokenizer)
    text = rm.tokenize([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}], "d")  # fmt: skip
    assert "".join(text.pieces) == "[CLS]a[SEP]b[SEP]c[SEP]d[SEP]" and text.reads_first and text.reward_pos == 0


def walked_with_held_scales(rm, tokens) -> tuple[dict[str, float], float]:
    """Each write's product with its slope, every norm's standard deviation held: written out with autograd."""
    names = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    held = values_at(rm, tokens, names)
    leaves = {n: held[n][0].double().requires_grad_(True) for n in names}
    h = leaves["embed"]
    for layer, block in enumerate(rm.trunk.blocks):
        for kind, path in zip(("attn", "mlp"), rm.structure.norms, strict=True):
            norm = block.get_submodule(path)
            total = h + leaves[f"L{layer}.{kind}"]
            centred = total - total.mean()
            size = (centred.square().mean() + norm.eps).sqrt().detach()
            shift = norm.bias.detach().double()
            h = centred / size * norm.weight.detach().double() + shift
    final = h.detach().float()[None]
    u = rm.readout.direction(final).u[0].double()
    reward = float(rm.readout.reward(final)[0])
    (u * h).sum().backward()
    return {n: float((x.grad * x.detach()).sum()) for n, x in leaves.items()}, reward


@post_norm
def test_contributions_carry_writes_through_the_norms_behind_them(name):
    rm = loaded(name)
    result = rl.contributions(rm, PAIRS[:2], scale="own")
    for i, pair in enumerate(PAIRS[:2]):
        expected, reward = walked_with_held_scales(rm, rm.tokenize(pair.prompt, pair.chosen))
        row = result.value.isel(pair=i).sel(side="chosen")
        for part, value in expected.items():
            assert float(row.sel(component=part)) == pytest.approx(value, abs=2e-5), part
        assert float(row.sum()) == pytest.approx(reward, abs=2e-5)
        assert "shifts" in row.component.values


@pytest.mark.parametrize("name", [*ENCODERS, *more(*OTHERS)])
def test_finer_splits_sum_to_the_components(name):
    rm = loaded(name)
    whole = rl.contributions(rm, PAIRS[:2]).value
    for by, kind in (("head", "attn"), ("neuron", "mlp")):
        fine = rl.contributions(rm, PAIRS[:2], by=by).value
        for layer in range(rm.n_layers):
            own = [str(c) for c in fine.component.values if str(c).startswith(f"L{layer}.{by[0].upper()}")]
            own += [f"L{layer}.{kind}_bias"] if f"L{layer}.{kind}_bias" in fine.component.values else []
            gap = fine.sel(component=own).sum("component") - whole.sel(component=f"L{layer}.{kind}")
            assert float(np.abs(gap).max()) < 2e-5
    sources = rl.contributions(rm, PAIRS[:2], by="token", scale="own").value
    own = rl.contributions(rm, PAIRS[:2], scale="own").value
    summed = sources.sel(component="L1.attn", side="chosen").sum("position")
    biases = sources.sel(component="L1.attn_bias", side="chosen").sum("position")
    assert (summed + biases).values == pytest.approx(own.sel(component="L1.attn", side="chosen").values, abs=2e-5)


@every
@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_integrated_contributions_are_complete(name, baseline):
    result = rl.integrated_contributions(loaded(name), PAIRS, baseline)
    gap = next(check for check in result.checks if check.name == "completeness")
    assert gap.gap < 1e-4
    rewards = loaded(name).score_pairs(PAIRS).value
    assert result.value.sum("component").values == pytest.approx(rewards.values, abs=1e-3)


def from_both_ends(base, source) -> list[tuple[int, int]]:
    """All positions: from the left up to the first different token, from the right after it."""
    n = next(i for i, (a, b) in enumerate(zip(base.ids, source.ids, strict=False)) if a != b)
    back = min(len(base), len(source)) - n
    right = [(len(base) - k, len(source) - k) for k in range(back, 0, -1)]
    return [(i, i) for i in range(n)] + right


SITES = ["embed", "L0.attn", "L1.mlp", "L2.resid_pre", "L2.resid_post", "L1.H2", "L2.N7"]


@pytest.mark.parametrize("name", [*ENCODERS, *more(*OTHERS)])
@pytest.mark.parametrize("pair", [EQUAL, UNEQUAL], ids=lambda p: p.id)
def test_patching_equals_the_slow_loop(name, pair):
    rm = loaded(name)
    sites = [*SITES, *(["L1.resid_mid"] if rm.trunk.norms else [])]
    base, source = (rm.tokenize(pair.prompt, r) for r in (pair.chosen, pair.rejected))
    held = values_at(rm, source, sites)
    clean = rm.hf_score(pair.prompt, pair.chosen)
    for at, positions in (("final", [(0, 0)]), ("all", from_both_ends(base, source))):
        found = rl.effects(rm, [pair], sites, mode="noise", at=at, align="tail").value.values[0]
        for site, effect in zip(sites, found, strict=True):
            value = held[site][[s for _, s in positions]]
            expected = clean - patched_reward(rm, base, [(site, [b for b, _ in positions], value)])
            assert effect == pytest.approx(expected, abs=2e-5), (at, site)
    last = rl.effects(rm, [pair], ["L2.resid_post"], at="all", align="tail")
    assert float(last.value[0, 0]) == pytest.approx(clean - rm.hf_score(pair.prompt, pair.rejected), abs=2e-5)


@every
def test_positions_one_by_one_equal_the_slow_loop(name):
    """A change at any position reaches the first one: nothing before or behind it may be cut away."""
    rm = loaded(name)
    base = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    source = rm.tokenize(EQUAL.prompt, EQUAL.rejected)
    held = values_at(rm, source, ["L1.resid_pre"])["L1.resid_pre"]
    result = rl.effects(rm, [EQUAL], ["L1.resid_pre"], at="all", spans="position").value.values[0, 0]
    clean = rm.hf_score(EQUAL.prompt, EQUAL.chosen)
    assert len(result) == len(base)
    for p in (0, 3, base.response.start, len(base) - 1):
        expected = clean - patched_reward(rm, base, [("L1.resid_pre", [p], held[[p]])])
        assert result[p] == pytest.approx(expected, abs=2e-5)
    zero = rl.effects(rm, [EQUAL], ["L1.mlp"], mode="zero", at="response").value.values[0, 0, 0]
    at = list(range(base.response.start, len(base)))
    expected = clean - patched_reward(rm, base, [("L1.mlp", at, torch.zeros(len(at), rm.d_model))])
    assert zero == pytest.approx(expected, abs=2e-5)


@every
def test_slopes_are_those_of_small_changes(name):
    rm = loaded(name)
    text = rm.tokenize(UNEQUAL.prompt, UNEQUAL.chosen)
    names = ["embed", "L0.attn", "L1.resid_mid", "L1.mlp", "L2.resid_post"]
    found = gradients(rm, text, [rl.Site.parse(s) for s in names])
    generator = torch.Generator().manual_seed(1)
    for site in map(rl.Site.parse, names):
        assert found.slopes[site].shape == (len(text), rm.d_model)
        v = torch.randn(rm.d_model, generator=generator)
        at = 0 if site.kind == "resid_post" else 5
        rows = [(Edit(site, [at], rl.add(v, sign * 1e-2)),) for sign in (1, -1)]
        up, down = patch_rows(rm, text, rows).rewards
        assert float(found.slopes[site][at] @ v) == pytest.approx(float(up - down) / 2e-2, abs=3e-3, rel=2e-2)


@pytest.mark.parametrize("name", ["deberta", "modernbert"])
def test_slopes_averaged_on_the_way_are_the_exact_effects(name):
    rm = loaded(name)
    sites = ["L0.attn", "L1.H1", "L1.mlp", "L2.resid_pre", "L1.resid_mid" if name == "deberta" else "L1.resid_pre"]
    for at in ("final", "all"):
        exact = rl.effects(rm, [EQUAL], sites, at=at).value.values
        averaged = rl.effects(rm, [EQUAL], sites, at=at, estimator="integrated", steps=24).value.values
        assert averaged == pytest.approx(exact, abs=2e-3), at


@every
def test_blocked_attention_is_a_masked_text(name):
    """Nothing may read a span, in any block: two ways to the same rewards, one through the attention tap."""
    rm = loaded(name)
    cut = rl.attention_knockout(rm, [EQUAL], "word").value.values[0, :2]
    masked = rl.token_attribution(rm, [EQUAL], "leave_one_out", by="word", removal="mask").value.values[0, :2]
    assert cut == pytest.approx(masked, abs=2e-5)


def test_values_and_patterns_of_disentangled_attention_but_not_its_queries():
    rm = loaded("deberta")
    text = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    acts = rl.capture(rm, [(EQUAL.prompt, EQUAL.chosen)], ["L1.v", "L1.pattern", "L1.head"], at="all")
    mixed = torch.einsum("qhk,khd->qhd", acts["L1.pattern"][0], acts["L1.v"][0])
    assert torch.allclose(mixed, acts["L1.head"][0], atol=1e-5)
    # A head's values set to zero leave nothing of its output.
    by_value = rl.effects(rm, [EQUAL], ["L1.V2"], mode="zero", at="all").value.values[0, 0]
    by_head = rl.effects(rm, [EQUAL], ["L1.H2"], mode="zero", at="all").value.values[0, 0]
    assert by_value == pytest.approx(by_head, abs=2e-5) and len(text) == len(acts["L1.v"][0])
    for site in ("L1.Q2", "L1.K2"):
        with pytest.raises(rl.StructureError, match="stand in more than one product"):
            rl.effects(rm, [EQUAL], [site])
    assert rl.effects(loaded("bert"), [EQUAL], ["L1.Q2"], at="all").value.shape == (1, 1)


@every
@pytest.mark.parametrize("steps", [1, 3])
def test_edges_out_of_a_part_sum_to_its_gradient(name, steps):
    rm = loaded(name)
    pair = rl.Pair(EQUAL.prompt, EQUAL.chosen, EQUAL.rejected)
    edges = rl.edge_effects(rm, [pair], steps=steps, at="all")
    assert next(c for c in edges.checks if c.name == "edges sum to the gradient").gap < 1e-4
    gradient = rl.effects(rm, [pair], "components", at="all", estimator="gradient").value.isel(pair=0)
    if steps == 1:
        total = edges.value.isel(pair=0).groupby("sender").sum()
        for part in gradient.component.values:
            assert float(total.sel(sender=part)) == pytest.approx(float(gradient.sel(component=part)), abs=1e-3)


@every
def test_direct_effects_hold_every_later_write(name):
    """Live: the run with one write changed and all that is written after it put back, norms and head at work."""
    rm = loaded(name)
    order = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    sites = [*order, "L1.H2", "L1.N5"]
    result = rl.effects(rm, [UNEQUAL], sites, path="direct")
    base, source = (rm.tokenize(UNEQUAL.prompt, r) for r in (UNEQUAL.chosen, UNEQUAL.rejected))
    own, other = values_at(rm, base, sites), values_at(rm, source, sites)
    clean = rm.hf_score(UNEQUAL.prompt, UNEQUAL.chosen)
    for site in sites:
        first = order.index({"L1.H2": "L1.attn", "L1.N5": "L1.mlp"}.get(site, site))
        held = [(later, [0], own[later][[0]]) for later in order[first + 1 :]]
        live = clean - patched_reward(rm, base, [(site, [0], other[site][[0]]), *held])
        found = result.value.isel(pair=0).sel(component=site)
        assert float(found.sel(part=["direct", "norm_rescale"]).sum()) == pytest.approx(live, abs=3e-5), site
    zero = rl.effects(rm, [UNEQUAL], order, mode="zero", path="direct").value.sel(part="direct", side="chosen")
    whole = rl.contributions(rm, [UNEQUAL], scale="own").value.sel(side="chosen", component=order)
    assert zero.values == pytest.approx(whole.values, abs=2e-5)


@every
def test_paths_hold_what_is_written_between_sender_and_receiver(name):
    rm = loaded(name)
    base, source = (rm.tokenize(EQUAL.prompt, r) for r in (EQUAL.chosen, EQUAL.rejected))
    order = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    own, other = (values_at(rm, text, [*order, "L0.H3"]) for text in (base, source))
    clean, everywhere = rm.hf_score(EQUAL.prompt, EQUAL.chosen), range(len(base))
    senders, receivers = ["embed", "L0.attn", "L0.H3", "L0.mlp"], ["L1.attn", "L1.mlp", "reward"]
    for at, moved in (("response", list(range(base.response.start, len(base)))), ("final", [0])):
        found = rl.path_effects(rm, [EQUAL], senders, receivers, at=at).value.isel(pair=0)
        moved = [p for p in moved if at == "final" or p >= 1]
        for sender in senders:
            first = order.index({"L0.H3": "L0.attn"}.get(sender, sender))
            for receiver in receivers:
                last = len(order) if receiver == "reward" else order.index(receiver)
                held = [(later, everywhere, own[later]) for later in order[first + 1 : last]]
                changes = [(sender, moved, other[sender][moved]), *held]
                if receiver == "reward":
                    changed = patched_reward(rm, base, changes)
                else:
                    given = values_at(rm, base, [receiver], changes)[receiver]
                    changed = patched_reward(rm, base, [(receiver, everywhere, given)])
                effect = float(found.sel(sender=sender, receiver=receiver))
                assert effect == pytest.approx(clean - changed, abs=3e-5), (at, sender, receiver)


@every
def test_nothing_is_read_along_the_text(name):
    rm = loaded(name)
    for call in (lambda: rl.reward_lens(rm, PAIRS, at="all"), lambda: rl.token_attribution(rm, PAIRS, "prefix")):
        with pytest.raises(rl.StructureError, match="cannot be read along the text"):
            call()
    lens = rl.reward_lens(rm, PAIRS)
    rewards = rm.score_pairs(PAIRS).value
    assert lens.value.isel(depth=-1).values == pytest.approx(rewards.values, abs=1e-5)


@post_norm
def test_the_frozen_lens_is_no_running_sum_there(name):
    with pytest.raises(rl.StructureError, match="last state's scale has no answer in post-norm"):
        rl.reward_lens(loaded(name), PAIRS, norm="frozen")


@pytest.mark.parametrize("name", ["roberta", "deberta"])
def test_responses_of_one_token_stand_between_the_separators(name):
    rm = loaded(name)
    sweep = rl.vocab_sweep(rm, ["What?", "Who"])
    assert sweep.meta["left_out"] == {"byte fragment": 128, "special token": 4} and not sweep.meta["prefix_reused"]
    for token in ("a", "?"):
        found = float(sweep.value.sel(token=token).isel(prompt=0))
        assert found == pytest.approx(rm.score("What?", token), abs=2e-6)


def test_the_base_of_an_encoder_keeps_the_reward_models_pooler():
    rm, (other, _) = loaded("bert"), tiny_encoder("bert", seed=5)
    base = rl.base_under_head(rm, other.bert)
    state = torch.randn(3, rm.d_model, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base.readout.reward(state), rm.readout.reward(state))
    assert base.score("a", "b") != rm.score("a", "b")


def test_mean_pooling_is_refused_and_a_wrong_structure_too():
    with pytest.raises(rl.StructureError, match="reads more than one token's state.*classifier_pooling='cls'"):
        rl.RewardModel(*tiny_encoder("modernbert", classifier_pooling="mean"))
    module, tokenizer = tiny_encoder("bert")
    right = loaded("bert").structure
    swapped = dataclasses.replace(right, norms=right.norms[::-1])
    with pytest.raises(rl.StructureError, match="does not add up as a post-norm block"):
        rl.RewardModel(module, tokenizer, structure=swapped)
    assert rl.RewardModel(module, tokenizer, structure=right).score("a", "b") == loaded("bert").score("a", "b")


def test_a_convolution_between_the_blocks_is_refused():
    with pytest.raises(rl.StructureError, match="does not add up as a post-norm block.*convolution"):
        rl.RewardModel(*tiny_encoder("deberta", conv_kernel_size=3, conv_act="gelu"))


def test_several_objectives_of_an_encoder():
    module, tokenizer = tiny_encoder("roberta", num_labels=3)
    with pytest.raises(rl.LoadError, match="3 rows and none was chosen"):
        rl.RewardModel(module, tokenizer)
    rm = rl.RewardModel(module, tokenizer, objective=1)
    with torch.no_grad():
        logits = module(**tokenizer("a", "b", return_tensors="pt")).logits[0]
    assert rm.score("a", "b") == pytest.approx(float(logits[1]), abs=1e-6)
    assert rm.for_objective(2).score("a", "b") == pytest.approx(float(logits[2]), abs=1e-6)
    for every, one in ((rl.objective_contributions, rl.contributions), (rl.objective_effects, rl.effects)):
        np.testing.assert_allclose(every(rm, PAIRS[:1]).value[..., 1], one(rm, PAIRS[:1]).value, atol=1e-5)


def test_an_encoder_is_loaded_from_a_folder(tmp_path):
    module, tokenizer = tiny_encoder("deberta")
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rm = rl.load(tmp_path)
    assert rm.load_report.value.sel(check="head in checkpoint") == 0
    assert rm.score("What?", "Yes.") == pytest.approx(loaded("deberta").score("What?", "Yes."), abs=1e-6)
    half = rl.load(tmp_path, dtype=torch.bfloat16)
    assert half.score("What?", "Yes.") == pytest.approx(rm.score("What?", "Yes."), abs=0.2)
    checks = rl.contributions(half, PAIRS[:2]).checks
    assert {c.name for c in checks} >= {"completeness", "residual rounding"}


def test_structure_search_is_the_only_source(name="bert"):
    """Names play no part: the same network under other names is found just so."""
    module, tokenizer = tiny_encoder(name)
    for block in module.bert.encoder.layer:
        block.first, block.forward = block.attention, functools.partial(type(block).forward, block)
    assert find_structure(module, lambda: _probe(module), 3, 4).norms == loaded(name).structure.norms
    assert random_weight_copy(loaded(name), 1).structure.norms == loaded(name).structure.norms


def _probe(module):
    ids = torch.arange(4, 18).view(2, 7)
    return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.full
@every
def test_a_suffix_is_searched_for_inside_the_pair(name):
    found = rl.find_exploits(loaded(name), NATURAL[:12], 1500, n_tokens=2, candidates=4)
    assert np.isfinite(found.value.values).any()


ALONG = ("lens, all", "prefix")
ONE_ROW = ("direction", "transfer", "compare", "vocabulary", "ov")
"""What asks for one row of a head, which a pooler is not: some of these refuse, none answers something else."""


@pytest.mark.full
@every
@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_or_refuses(name, method):
    rm = loaded(name)
    pairs = rl.Pairs([*PAIRS, EQUAL, UNEQUAL])
    # One of the paths ends in a query, which DeBERTa's attention multiplies with positions too.
    if method in ALONG or (method == "path effects" and name == "deberta"):
        with pytest.raises(rl.StructureError):
            METHODS[method](rm, pairs)
        return
    try:
        assert METHODS[method](rm, pairs).value.size
    except (rl.StructureError, rl.DataError):
        assert method in ONE_ROW


@pytest.mark.parametrize("name", [*ENCODERS, *more(*OTHERS)])
def test_baselines_stand_in_the_responses_place(name):
    """Its segment and its positions included, and the norm behind their sum."""
    rm = loaded(name)
    text = rm.tokenize(PAIRS[0].prompt, PAIRS[0].chosen)

    def entering(tokens):
        replaced = [tuple(t if i in text.response else old for i, old in enumerate(text.ids)) for t in tokens]
        texts = [dataclasses.replace(text, ids=ids) for ids in replaced]
        kept = []
        (batch,) = rm.batches(texts, len(texts))
        with torch.no_grad():
            rm.trunk.run(batch, rm.trunk.read_residual(0, lambda x: kept.append(x.clone())))
        return kept[0][:, text.response.start : text.response.stop], float(rm.rewards(texts)[0])

    own, reward = entering([rm.pad_id])
    start = rl.token_attribution(rm, PAIRS[:1], method="gradient", baseline="pad").value["start"]
    assert float(start[0, 0]) == pytest.approx(reward, abs=2e-5)
    everything, _ = entering(range(len(rm.tokenizer.hf)))
    for baseline, expected in (("pad", own[0]), ("mean", everything.mean(0))):
        base = baseline_residual(rm, len(text), baseline, rm.trunk.second_begins)
        torch.testing.assert_close(base[text.response.start : text.response.stop], expected, atol=1e-5, rtol=1e-5)
