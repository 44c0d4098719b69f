"""Changes of the prompt under a prompt-gated head, against whole forwards of the Hugging Face module."""

import pytest
import torch

import published_heads as published
import reward_lens as rl
from families import TEXT_PAIRS
from reference.sweeps import patched_reward, values_at
from reward_lens.engine.intervention import Edit
from reward_lens.engine.patching import patch_rows

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS[:3]])
SITES = ["embed", "L0.attn", "L1.mlp", "L1.H2", "L1.resid_pre", "L2.attn", "L2.mlp", "L2.resid_post", "L2.N3"]
gated = pytest.mark.parametrize("name", ["armo", "qrm"])


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


@gated
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


@gated
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
