"""Changes of the prompt under a prompt-gated head, against whole forwards of the Hugging Face module."""

import inspect

import numpy as np
import pytest
import torch

import published_heads as published
import reward_lens as rl
from families import TEXT_PAIRS
from reference.sweeps import patched_reward, values_at
from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.patching import patch_gradients, patch_rows

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS[:3]])
TEXTS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS[3:6]])
SITES = ["embed", "L0.attn", "L1.mlp", "L1.H2", "L1.resid_pre", "L2.attn", "L2.mlp", "L2.resid_post", "L2.N3"]
gated = pytest.mark.parametrize("name", ["armo", "qrm"])
one_quick = pytest.mark.parametrize("name", ["armo", pytest.param("qrm", marks=pytest.mark.full)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: published.save(tmp_path_factory.mktemp(name), name) for name in ("armo", "qrm")}


@pytest.fixture(scope="module")
def models(folders):
    return {name: rl.load(folder) for name, folder in folders.items()}


def zeroed(rm, text, site, positions) -> float:
    """Reward of the module's own forward with a site at zero at some positions."""
    here = values_at(rm, text, [site])[site][list(positions)]
    return patched_reward(rm, text, [(site, positions, torch.zeros_like(here))])


@gated
def test_a_sweep_over_prompt_and_response_is_the_slow_loop(models, name):
    """Rows before, at and behind the gate in one sweep, with and without the keys of the beginning."""
    rm = models[name]
    text = rm.tokenize(*TEXT_PAIRS[0][:2])
    gate = rm.readout.gate_position(text)
    groups = [range(gate - 2, gate), range(gate, gate + 1), range(gate - 1, len(text)), range(gate + 1, gate + 3)]
    rows = [(Edit(rl.Site.parse(site), at, rl.zeros()),) for site in SITES for at in groups]
    slow = [zeroed(rm, text, site, at) for site in SITES for at in groups]
    clean = rm.hf_score(*TEXT_PAIRS[0][:2])
    for reuse in (True, False):
        out = patch_rows(rm, text, rows, reuse=reuse, max_rows=5)
        assert out.rewards.tolist() == pytest.approx(slow, abs=1e-5)
        assert out.alone == pytest.approx(clean, abs=1e-5) and out.clean_gap < 1e-5
        moved = (out.gate != out.clean_gate).any(1).view(len(SITES), len(groups))
        assert not moved[:, 3].any() and moved[:, 1:3].all()
        assert moved[:4, 0].all() and not moved[SITES.index("L2.mlp"), 0]  # nothing reads that write at the gate
    behind = patch_rows(rm, text, rows[3::4])
    assert behind.start == gate + 1
    assert behind.rewards.tolist() == pytest.approx(slow[3::4], abs=1e-5)


@one_quick
def test_an_intervention_on_the_prompt_moves_the_gate_with_it(models, name):
    rm = models[name]
    texts = [rm.tokenize(*t[:2]) for t in TEXT_PAIRS[:3]]
    for site in ("L0.attn", "L1.H2", "L1.resid_pre", "L2.resid_post", "embed"):
        for at in ("all", range(3, 9)):
            found = rl.intervene(rm, texts, {site: rl.zeros()}, at=at, batch_size=2).value
            positions = [range(len(t)) if at == "all" else at for t in texts]
            slow = [zeroed(rm, t, site, p) for t, p in zip(texts, positions, strict=True)]
            assert found.sel(state="intervened").values.tolist() == pytest.approx(slow, abs=1e-5)
        none = rl.intervene(rm, texts, {site: rl.zeros()}, at="all", mask=0.0).value
        assert (none.sel(state="change") == 0).all()
    padded = rl.intervene(rm, texts, {"L1.attn": rl.zeros()}, at="all").value  # texts of different length in a batch
    assert (
        float(abs(padded - rl.intervene(rm, texts, {"L1.attn": rl.zeros()}, at="all", batch_size=1).value).max()) < 1e-5
    )


@one_quick
def test_other_methods_read_the_prompt_as_it_was_changed(models, name):
    """Each against the module's own forward: ablation, knock-out, steering, circuits."""
    rm = models[name]
    ablated = rl.effects(rm, PAIRS[:2], SITES, mode="zero", at="all")
    tokens = rm.tokenize_pairs(PAIRS[:2])
    for pair, both in enumerate(tokens):
        for side, text in zip(("chosen", "rejected"), both, strict=True):
            own = float(rm.rewards([text])[0])
            slow = [own - zeroed(rm, text, site, range(len(text))) for site in SITES]
            assert ablated.value.sel(side=side)[pair].values.tolist() == pytest.approx(slow, abs=1e-5)
    blocked = rl.attention_knockout(rm, PAIRS[:1], {PAIRS[0].id: [range(2, 6), range(2, 6)]})
    by_hand = []
    for text in tokens[0]:
        mask = torch.ones(len(text), len(text)).tril()
        mask[6:, 2:6] = 0
        mask = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            out = rm.module(input_ids=torch.tensor([text.ids]), attention_mask=mask)
        by_hand.append(float(rm.rewards([text])[0]) - float(out.logits[0, 0]))
    assert blocked.value[0].sel(side=["chosen", "rejected"]).values.tolist() == pytest.approx(by_hand, abs=1e-5)
    vector = torch.ones(rm.d_model)
    steered = rl.steer(rm, PAIRS[:2], vector, depth=1, strengths=[0.0, 0.5], unit="absolute", at="all", nulls=0)
    for pair, both in enumerate(tokens):
        for side, text in zip(("chosen", "rejected"), both, strict=True):
            here = values_at(rm, text, ["L1.resid_pre"])["L1.resid_pre"]
            moved = patched_reward(rm, text, [("L1.resid_pre", range(len(text)), here + 0.5 * vector / vector.norm())])
            assert float(steered.value[pair].sel(side=side)[1]) == pytest.approx(moved, abs=1e-5)
    circuit = rl.minimal_circuit(rm, PAIRS[0], sites="components", mode="zero", at="all")
    assert not [c.name for c in circuit.checks if not c.passed]


def by_hand(folder, rm, text, changed) -> tuple[float, ...]:
    """value, gate, interaction and total of one changed run, from the states of two whole forwards and the head in
    plain tensors: the losses when `changed` = (site, positions, value) is made."""
    head = published.HEADS["qrm" if hasattr(rm.config, "num_quantiles") else "armo"][3]
    config, state = rm.config.to_dict(), published.load_file(folder / "model.safetensors")
    at = published.published_gate(folder, text.ids)
    read = []
    for change in (None, changed):
        kept = []
        norm = rm.module.get_submodule(rm.structure.final_norm)
        hook = norm.register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out[0]))
        patched_reward(rm, text, [] if change is None else [change])
        hook.remove()
        read += kept
    rewards = {}
    for response in (0, 1):
        for prompt in (0, 1):
            states = torch.cat([read[prompt][at : at + 1], read[response][text.reward_pos :][:1]])
            rewards[response, prompt] = float(head(state, states, 0, config)[0])
    clean = rewards[0, 0]
    value, gate, total = (clean - rewards[key] for key in ((1, 0), (0, 1), (1, 1)))
    return value, gate, total - value - gate, total


@gated
@pytest.mark.parametrize("at", ["prompt", "gate", "all"])
def test_the_routes_are_those_of_states_read_by_hand(folders, models, name, at):
    rm = models[name]
    sites = ["embed", "L0.attn", "L1.H2", "L2.resid_post"]
    found = rl.gate_routes(rm, PAIRS[:2], sites, mode="zero", at=at)
    assert found.value.dims == ("pair", "side", "component", "route")
    for pair, both in enumerate(rm.tokenize_pairs(PAIRS[:2])):
        for side, text in zip(("chosen", "rejected"), both, strict=True):
            gate = rm.readout.gate_position(text)
            where = {"prompt": range(gate + 1), "gate": range(gate, gate + 1), "all": range(len(text))}[at]
            for site in sites:
                nothing = torch.zeros_like(values_at(rm, text, [site])[site][list(where)])
                hand = by_hand(folders[name], rm, text, (site, where, nothing))
                ours = found.value[pair].sel(side=side, component=site).values.tolist()
                assert ours == pytest.approx(hand, abs=1e-5)
                assert abs(hand[1]) > 1e-6
    total = rl.effects(rm, PAIRS[:2], sites, mode="zero", at="all").value
    if at == "all":
        assert abs(found.value.sel(route="total") - total).max() < 1e-6
    parts = found.value.sel(route=["value", "gate", "interaction"]).sum("route")
    assert abs(parts - found.value.sel(route="total")).max() < 1e-12


@one_quick
def test_patches_between_responses_never_take_the_gates_route(models, name):
    """E5: chosen and rejected share the prompt, so the gate reads the same to the bit, with shortcuts or not."""
    rm = models[name]
    for mode in ("noise", "denoise"):
        for at, align in (("final", None), ("all", "tail")):
            found = rl.gate_routes(rm, PAIRS, SITES, mode=mode, at=at, align=align).value
            assert found.dims == ("pair", "component", "route")
            assert (found.sel(route=["gate", "interaction"]) == 0).all()
            assert (found.sel(route="value") == found.sel(route="total")).all()
            plain = rl.effects(rm, PAIRS, SITES, mode=mode, at=at, align=align).value
            assert abs(found.sel(route="total") - plain).max() < 1e-6
    text = rm.tokenize(*TEXT_PAIRS[0][:2])
    late = range(text.response.start, text.reward_pos + 1)
    rows = [(Edit(rl.Site("attn", 1), at, rl.zeros()),) for at in (late, range(0, 3))]
    out = patch_rows(rm, text, rows, reuse=False)
    assert torch.equal(out.gate[0], out.clean_gate[0]) and not torch.equal(out.gate[1], out.clean_gate[1])
    nothing = rl.gate_routes(rm, PAIRS[:1], SITES, mode=rl.add(torch.zeros(1)), at="response").value
    assert (nothing.sel(route=["gate", "interaction"]) == 0).all()


@one_quick
def test_another_prompts_values_are_a_prompt_edit(models, name):
    """All of the prompt's residuals from a run with other words in it: the routes of the edit itself."""
    rm = models[name]
    pair = PAIRS[1]
    other = rl.Pair(pair.prompt.replace("7", "9"), pair.chosen, pair.rejected)
    texts, edited = rm.tokenize_pairs([pair])[0], rm.tokenize_pairs([other])[0]
    assert all(len(a) == len(b) and a.ids != b.ids for a, b in zip(texts, edited, strict=True))
    acts = rl.capture(rm, rl.Pairs([other]), ["embed", "L2.resid_post"], "all")
    found = rl.gate_routes(rm, [pair], ["embed", "L2.resid_post"], mode=rl.from_run(acts), at="all")
    own, theirs = rm.rewards(texts).double(), rm.rewards(edited).double()
    for site in ("embed", "L2.resid_post"):
        routes = found.value[0].sel(component=site)
        assert routes.sel(route="total")[:2].values.tolist() == pytest.approx((own - theirs).tolist(), abs=1e-5)
        assert abs(routes.sel(route="gate")).min() > 1e-6
    gates = rm.readout_inputs(edited)
    final = rl.capture(rm, rl.Pairs([pair]), ["L2.resid_post"])[rl.Site("resid_post", 2)]
    through = own - rm.readout.reward(final, gates).detach().double()
    assert routes.sel(route="gate")[:2].values.tolist() == pytest.approx(through.tolist(), abs=1e-5)
    assert found.meta["settings"]["mode"] == "from_run"
    words = rl.gate_routes(rm, [pair], ["embed"], mode=rl.from_run(acts), at="prompt").value[0]
    total = words.sel(component="embed", route="total", side=["chosen", "rejected"]).values.tolist()
    assert total == pytest.approx((own - theirs).tolist(), abs=1e-5)  # the texts differ in the prompt alone


@one_quick
def test_means_draws_and_single_prompt_tokens(models, name):
    rm = models[name]
    mean = rl.gate_routes(rm, PAIRS[:2], ["L1.attn"], reference=TEXTS)
    drawn = rl.gate_routes(rm, PAIRS[:2], ["L1.attn"], mode="resample", reference=TEXTS)
    for found in (mean, drawn):
        parts = found.value.sel(route=["value", "gate", "interaction"]).sum("route")
        assert abs(parts - found.value.sel(route="total")).max() < 1e-12
        assert (abs(found.value.sel(side="chosen", route="gate")) > 1e-7).all()
        assert found.mean is not None and found.mean.dims == ("side", "component", "route")
    assert drawn.value.draw_sd.dims == drawn.value.dims and float(drawn.value.draw_sd.sel(route="gate").min()) > 0
    plain = rl.effects(rm, PAIRS[:2], ["L1.attn"], mode="mean", at="all", reference=TEXTS).value
    whole = rl.gate_routes(rm, PAIRS[:2], ["L1.attn"], mode="mean", at="all", reference=TEXTS).value
    assert abs(whole.sel(route="total") - plain).max() < 1e-6
    by_token = rl.gate_routes(rm, PAIRS[:2], ["embed", "L2.mlp"], mode="zero", spans="position").value
    assert by_token.dims == ("pair", "side", "component", "route", "position")
    last = by_token.sel(component="L2.mlp", route="gate", side="chosen")[0]
    count = int(by_token.n_positions.sel(side="chosen")[0])
    assert (last[: count - 1] == 0).all() and last[count - 1] != 0  # the last write is read where it stands
    assert by_token.piece.sel(side="chosen")[0].values[count - 1] == "<|end|>"
    rl.gate_routes(rm, PAIRS[:2], ["L1.attn"], mode="zero", at=range(2, 5)).to_frame()


@one_quick
def test_the_direct_path_has_a_route_through_the_gate(models, name):
    rm = models[name]
    sites = ["embed", "L1.attn", "L1.H2", "L2.attn", "L2.mlp", "L2.N3"]
    found = rl.effects(rm, PAIRS[:2], sites, mode="zero", at="all", path="direct").value
    assert found.part.values.tolist() == ["direct", "norm_rescale", "gate", "interaction", "mediated", "total"]
    assert abs(found.sel(part="mediated", component=["L2.mlp", "L2.N3"])).max() < 1e-5
    assert abs(found.drop_sel(part="total").sum("part") - found.sel(part="total")).max() < 1e-6
    total = rl.effects(rm, PAIRS[:2], sites, mode="zero", at="all").value
    assert abs(found.sel(part="total") - total).max() < 1e-6
    last = rl.gate_routes(rm, PAIRS[:2], ["L2.mlp"], mode="zero", at="all").value.sel(component="L2.mlp")
    direct = found.sel(component="L2.mlp")
    assert abs(direct.sel(part=["direct", "norm_rescale"]).sum("part") - last.sel(route="value")).max() < 1e-5
    for part in ("gate", "interaction"):
        assert abs(direct.sel(part=part) - last.sel(route=part)).max() < 1e-5
        assert abs(direct.sel(part=part)).max() > 1e-6
    readout, text = rm.readout, rm.tokenize_pairs(PAIRS[:1])[0][0]
    at = readout.gate_position(text)
    written = values_at(rm, text, ["L1.attn"])["L1.attn"]
    h, read = (values_at(rm, text, ["L2.resid_post"])["L2.resid_post"][p][None] for p in (text.reward_pos, at))
    with torch.no_grad():
        loss = readout.reward(h, read) - readout.reward(h, read - written[at])
    assert float(found[0].sel(side="chosen", component="L1.attn", part="gate")) == pytest.approx(float(loss), abs=1e-5)
    for settings in ({"mode": "noise"}, {"mode": "zero", "at": "response"}):
        behind = rl.effects(rm, PAIRS[:2], sites, path="direct", **settings).value
        assert (behind.sel(part=["gate", "interaction"]).fillna(0) == 0).all()


@one_quick
def test_a_frozen_norm_leaves_the_gate_live(models, name):
    """The scale at the reward position is the clean run's, the weights are those of the changed prompt."""
    rm = models[name]
    text = rm.tokenize_pairs(PAIRS[:1])[0][0]
    found = rl.effects(rm, PAIRS[:1], ["L1.attn"], mode="zero", at="all", norm="frozen").value
    out = patch_rows(rm, text, [(Edit(rl.Site("attn", 1), range(len(text)), rl.zeros()),)])
    readout = rm.readout
    with torch.no_grad():
        w, new_w = (readout.weights(g) @ readout.rows for g in (out.clean_gate, out.gate))
        norm, h, new_h = readout.norm, out.clean_final, out.final
        scale = norm(h) / h  # no shift, no mean in these models
        loss = (w * scale * h).sum() - (new_w * scale * new_h).sum()
    assert float(found[0].sel(side="chosen", component="L1.attn")) == pytest.approx(float(loss), abs=1e-5)


@gated
def test_gradients_of_changed_runs_hold_both_routes(models, name):
    """The slope of a row's reward for a write at the gate's position, against differences of whole forwards."""
    rm = models[name]
    text = rm.tokenize_pairs(PAIRS[:1])[0][0]
    gate = rm.readout.gate_position(text)
    write = values_at(rm, text, ["L1.mlp"])["L1.mlp"]
    here = write[gate : gate + 1] + 0.01  # on the way, as integrated estimates are: not the clean value itself
    leaf = here.clone().requires_grad_(True)
    source = Source("leaf", lambda x, site, run, positions: leaf.to(x).reshape(x.shape))
    (slope,), _ = patch_gradients(rm, text, [(Edit(rl.Site("mlp", 1), range(gate, gate + 1), source), leaf)])
    step = 2e-3 * torch.randn(1, rm.d_model, generator=torch.Generator().manual_seed(0))
    moved = [patched_reward(rm, text, [("L1.mlp", [gate], here + sign * step)]) for sign in (1, -1)]
    assert float((slope * step).sum()) == pytest.approx((moved[0] - moved[1]) / 2, rel=0.05, abs=1e-5)


def test_what_has_no_gates_route_is_refused(models):
    rm = models["armo"]
    with pytest.raises(rl.StructureError, match="no gate that reads the prompt"):
        rl.gate_routes(rm.for_objective(1), PAIRS)
    with pytest.raises(rl.DataError, match="noise has nothing to patch in the prompt"):
        rl.gate_routes(rm, PAIRS, mode="noise")
    with pytest.raises(rl.DataError, match="gate_routes was asked for a mode it does not have"):
        inspect.unwrap(rl.gate_routes)(rm, PAIRS, mode="swap")


def test_prompts_cut_to_different_lengths_differ_at_the_gate(tmp_path):
    """Left truncation: the two responses of a pair no longer share the prompt, and patches do move the weights."""
    rm = rl.load(published.save(tmp_path, "armo"), truncation="left")
    rm.tokenizer.max_length = 48
    chosen, rejected = rm.tokenize_pairs(PAIRS[:1])[0]
    assert len(chosen) == len(rejected) == 48 and chosen.prompt != rejected.prompt
    sites = ["embed", "L1.attn", "L2.resid_post"]
    found = rl.gate_routes(rm, PAIRS[:1], sites, mode="noise", at="all", align="tail").value[0]
    given = values_at(rm, rejected, sites)
    for site in sites:
        slow = patched_reward(rm, chosen, [(site, range(48), given[site])])
        assert float(found.sel(component=site, route="total")) == pytest.approx(
            float(rm.rewards([chosen])[0]) - slow, abs=1e-5
        )
        assert abs(float(found.sel(component=site, route="gate"))) > 1e-6
    held = (
        lambda at: rl.effects(rm, PAIRS[:1], ["L1.attn"], at=at, align="tail", path="direct"),
        lambda at: rl.path_effects(rm, PAIRS[:1], ["L1.attn"], ["reward"], at=at, align="tail"),
        lambda at: rl.effects(rm, PAIRS[:1], ["L1.attn"], at=at, align="tail", estimator="gradient", norm="frozen"),
    )
    refused = "reaches the gate of the reward head, which is held here.*shorten the conversation, patch at='final', or"
    for ask in held:
        for at in ("all", "response"):
            with pytest.raises(rl.StructureError, match=refused):
                ask(at)
        assert np.isfinite(ask("final").value).all()


@one_quick
def test_what_patches_responses_is_as_it_was(models, name):
    """Estimates, edges, paths and states downstream, which never reach the gate, against exact effects."""
    rm = models[name]
    exact = rl.effects(rm, PAIRS, ["L1.attn", "L2.mlp"], at="all", align="tail")
    close = rl.effects(rm, PAIRS, ["L1.attn", "L2.mlp"], at="all", align="tail", estimator="integrated")
    assert abs(close.value - exact.value).max() < 0.05 * abs(exact.value).max()
    last = rl.path_effects(rm, PAIRS, ["L2.mlp"], ["reward"], at="all", align="tail").value[:, 0, 0]
    assert abs(last - exact.value.sel(component="L2.mlp")).max() < 1e-5
    rl.edge_effects(rm, PAIRS[:2], at="all", align="tail")


ASKED = {
    "routes": lambda rm: rl.gate_routes(rm, PAIRS, mode="zero", spans="position", layers=[1]),
    "routes, means": lambda rm: rl.gate_routes(rm, PAIRS, reference=TEXTS),
    "routes, noise": lambda rm: rl.gate_routes(rm, PAIRS, mode="noise", at="final"),
    "objectives": lambda rm: rl.objective_effects(rm, PAIRS),
    "splits": lambda rm: rl.objective_contributions(rm, PAIRS),
}


@pytest.mark.parametrize(
    "asked", [name if name == "routes, means" else pytest.param(name, marks=pytest.mark.full) for name in ASKED]
)
def test_results_keep_the_house_rules(models, asked, tmp_path):
    rm = models["armo"]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in rm.module.modules())
    result, again = ASKED[asked](rm), ASKED[asked](rm)
    assert result.value.identical(again.value)
    loaded = rl.load_result(result.save(tmp_path / "result.nc"))
    assert loaded.value.identical(result.value) and loaded.checks == result.checks and loaded.meta == result.meta
    assert len(result.top(3)) <= 3 and len(result.to_frame()) == result.value.size
    assert repr(loaded) == repr(result)
    rl.save_chart(result, tmp_path / "chart.svg")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in rm.module.modules()) == hooks


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@gated
def test_routes_in_other_precisions(folders, name, dtype):
    rm = rl.load(folders[name], dtype=dtype)
    found = rl.gate_routes(rm, PAIRS[:2], ["L1.attn", "L2.mlp"], mode="zero", at="all").value
    assert (abs(found.sel(route="gate", side=["chosen", "rejected"])) > 0).all()
    rl.effects(rm, PAIRS[:2], ["L1.attn", "L2.mlp"], mode="zero", at="all", path="direct")
    rl.objective_effects(rm, PAIRS[:2], ["L1.attn", "L2.resid_post"])
    rl.objective_contributions(rm, PAIRS[:2])
