"""The wavefront sweep against one whole forward a row, on every family; and what it must leave exactly alone."""

import dataclasses
import functools
import inspect
import os

import numpy as np
import pytest
import torch
from transformers.integrations import sdpa_attention

import reward_lens as rl
from families import STRUCTURES, by_family, tiny_model
from reference.sweeps import patched_reward, values_at
from reward_lens.engine import patching, shared_keys
from reward_lens.engine.editing import Edit
from reward_lens.engine.intervention import add, values
from reward_lens.engine.patching import patch_rows
from reward_lens.methods.causation.steering import responses
from reward_lens.model.forward import Trunk, suffix_batch
from reward_lens.model.prefix import NO_PREFIX, PrefixCache
from reward_lens.model.sites import Site
from reward_lens.model.tokens import common_prefix

PROMPT = "What is the capital of France, and why there?"
TEXTS = ("It is Paris, by the river", "It is Rybix, by a rive")  # as many tokens, the same first ones
every = pytest.mark.parametrize("family", by_family())


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def runs(rm):
    return [rm.tokenize(PROMPT, text) for text in TEXTS]


def sites_of(rm) -> list[str]:
    sites = ["embed", "L1.resid_pre", "L2.resid_post"]
    for layer in range(rm.n_layers):
        sites += [f"L{layer}.attn", f"L{layer}.mlp", f"L{layer}.H1", f"L{layer}.H3"]
    if None not in rm.structure.paths("mlp_out"):
        sites += ["L0.N3", "L2.N5"]
    return sites


def edit(rm, name: str, positions, value) -> Edit:
    """`value` as the module gives it; a write is that times the family's residual multiplier (Granite)."""
    site = rl.Site.parse(name)
    scale = rm.structure.write_scale if site.kind in ("attn", "mlp") else 1.0
    return Edit(site, positions, values(value * scale))


def test_the_texts_are_what_they_should_be():
    base, source = runs(model("llama"))
    assert len(base) == len(source) > 40 and 20 < common_prefix(base, source) < len(base) - 8


@every
@pytest.mark.parametrize("at", ["final", "response", "two"])
def test_the_sweep_equals_the_slow_loop(family, at):
    rm = model(family)
    base, source = runs(rm)
    assert rm.reuses_prefix(base)
    prefix = common_prefix(base, source)
    where = {
        "final": range(base.reward_pos, base.reward_pos + 1),
        "response": range(prefix, base.reward_pos + 1),
        "two": [prefix + 1, base.reward_pos - 2],
    }[at]
    given = values_at(rm, source, sites_of(rm))
    rows = [(edit(rm, name, where, given[name][list(where)]),) for name in sites_of(rm)]
    rows.append((rows[3][0], rows[-1][0]))  # two changes in one run
    slow = [
        patched_reward(rm, base, [(str(e.site), where, given[str(e.site)][list(where)]) for e in row]) for row in rows
    ]
    clean = float(rm.rewards([base])[0])
    moved = np.abs(np.array(slow) - clean)
    assert moved.max() > 1e-2  # the test could fail
    tolerance = 1e-5 * max(abs(clean), moved.max(), 1)
    for options in ({}, {"max_rows": 3}, {"reuse": False}):
        fast = patch_rows(rm, base, rows, **options)
        assert (fast.start > 0) == ("reuse" not in options)
        np.testing.assert_allclose(fast.rewards, slow, atol=tolerance)
        np.testing.assert_allclose(fast.clean, clean, atol=tolerance)
        np.testing.assert_allclose(rm.readout.reward(fast.final), fast.rewards, atol=tolerance)


@every
@pytest.mark.parametrize("reuse", [True, False])
def test_e5_a_runs_own_values_change_nothing(family, reuse):
    rm = model(family)
    base, source = runs(rm)
    held = rl.capture(rm, [base], sites_of(rm), at="all")
    for where in (range(base.reward_pos, base.reward_pos + 1), range(common_prefix(base, source), len(base))):
        rows = [(Edit(rl.Site.parse(s), where, values(held[s][0][list(where)])),) for s in sites_of(rm)]
        out = patch_rows(rm, base, rows, reuse=reuse, max_rows=5)
        assert float(out.change.abs().max()) <= rm.noise_floor


def test_a_large_change_does_not_loosen_what_is_asked_of_the_clean_row(monkeypatch):
    rm = model("gpt2")
    text, down = runs(rm)[0], patching._Walk.down
    alone = float(rm.rewards([text])[0])

    def clean_row_moved(self, rows, names):
        reached = down(self, rows, names)
        reached.final[0] += 0.01 * torch.arange(rm.d_model)
        return reached

    monkeypatch.setattr(patching._Walk, "down", clean_row_moved)
    push = 1e3 * torch.randn(4, rm.d_model, generator=torch.Generator().manual_seed(0))
    site = Site("resid_post", rm.n_layers - 1)
    out = patch_rows(rm, text, [(Edit(site, [text.reward_pos], add(one)),) for one in push])
    moved = float((out.clean - alone).abs().max())
    assert moved > 1e-3 and float(out.change.abs().max()) > 1.2 * rm.effect_scale(alone)
    assert out.clean_gap == pytest.approx(moved / rm.effect_scale(alone), rel=1e-3)
    _, gap = responses(rm, text, site, push, np.array([0.0, 1.0]), "final", alone, None)
    assert gap == pytest.approx(out.clean_gap, rel=1e-3)


@pytest.mark.parametrize("family", STRUCTURES)
def test_states_on_the_way_down(family):
    """A row's residual at a depth is the clean one above its first edit, and what a capture of the edited run shows."""
    rm = model(family)
    base, _ = runs(rm)
    final = range(base.reward_pos, base.reward_pos + 1)
    row = (Edit(rl.Site.parse("L1.attn"), final, rl.zeros()),)
    out = patch_rows(rm, base, [row], depths=[0, 1, 2, rm.n_layers])
    assert torch.equal(out.states[1][0], out.clean_states[1])
    assert not torch.allclose(out.states[2][0], out.clean_states[2], atol=1e-3)
    assert torch.equal(out.states[rm.n_layers], out.final)
    expected = rl.capture(rm, [base], ["L1.resid_post"])["L1.resid_post"][0]
    torch.testing.assert_close(out.clean_states[2], expected, atol=1e-4, rtol=1e-4)


def test_bad_rows_are_refused():
    rm = model("llama")
    base, _ = runs(rm)
    with pytest.raises(rl.DataError, match="no rows"):
        patch_rows(rm, base, [])
    for positions in ([], [len(base)], [-1]):
        with pytest.raises(rl.DataError, match="positions that cannot be changed"):
            patch_rows(rm, base, [(Edit(rl.Site.parse("L1.attn"), positions, rl.zeros()),)])
    with pytest.raises(rl.StructureError, match="L9.attn"):
        patch_rows(rm, base, [(Edit(rl.Site.parse("L9.attn"), [5], rl.zeros()),)])
    bad = rl.constant(torch.full((rm.d_model,), torch.nan))
    with pytest.raises(rl.CheckFailed, match="not finite"):
        patch_rows(rm, base, [(Edit(rl.Site.parse("L1.attn"), [base.reward_pos], bad),)])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_keys_that_heads_share_are_read_in_place_to_the_same_bits(family, monkeypatch):
    """What transformers copies for every query head, and the sweep has it not copy, where there is a mask."""
    rm = model(family)
    assert rm.n_kv_heads < rm.n_heads
    base, source = runs(rm)
    where = range(common_prefix(base, source), base.reward_pos + 1)
    sites = [rl.Site.parse(name) for name in ("L0.mlp", "L1.attn", "L1.K0", "L2.V1")]
    held = rl.capture(rm, [source], sites, at=where)
    rows = [(Edit(site, where, values(held[site][0])),) for site in sites]
    used = []
    monkeypatch.setattr(shared_keys, "GROUPED", "REWARD_LENS_TESTS_NOTHING")
    copied = patch_rows(rm, base, rows).rewards
    monkeypatch.undo()
    copy = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: used.append(x.shape[0]) or copy(x, n))
    monkeypatch.delenv(shared_keys.GROUPED, raising=False)
    assert torch.equal(patch_rows(rm, base, rows).rewards, copied)
    assert max(used, default=1) == 1 and shared_keys.GROUPED not in os.environ  # the recorded pass alone copies
    monkeypatch.setenv(shared_keys.GROUPED, "0")
    with pytest.raises(rl.CheckFailed):
        patch_rows(rm, base, [(edit(rm, "L1.attn", where, torch.full((len(where), rm.d_model), torch.nan)),)])
    assert os.environ[shared_keys.GROUPED] == "0"


@every
def test_the_last_mlp_is_shown_one_position_where_the_block_allows_it(family):
    rm = model(family)
    base = runs(rm)[0]
    adds_in_place, on_rows_of_positions = ("falcon", "falcon_new"), ("opt",)
    mlp = rm.trunk.mlp_alone
    assert (mlp is None) == (family in adds_in_place + on_rows_of_positions)
    if mlp is None:
        return
    last, where = rm.n_layers - 1, range(30, len(base))
    shown: list[int] = []
    handle = mlp.register_forward_hook(lambda module, args, output: shown.append(args[0].shape[1]))
    try:
        for name, positions in ((f"L{last}.attn", 1), (f"L{last}.mlp", len(base) - 30)):
            target = torch.randn(len(where), rm.d_model)
            row = [(edit(rm, name, where, target), edit(rm, "L0.resid_pre", where, target))]
            got = float(patch_rows(rm, base, row).rewards)
            assert shown[-1] == positions
            changes = [("L0.resid_pre", where, target), (name, where, target)]
            assert abs(got - patched_reward(rm, base, changes)) <= 1e-5 * rm.effect_scale(got)
    finally:
        handle.remove()


def test_a_last_mlp_that_mixes_positions_is_run_on_all(monkeypatch):
    rm = model("llama")
    held, plain = rm.trunk.last_mlp, rm.trunk.last_mlp.forward
    assert dataclasses.replace(rm.trunk).mlp_alone is held
    monkeypatch.setattr(held, "forward", lambda x: plain(x + 0.1 * x.roll(1, 1)))
    assert dataclasses.replace(rm.trunk).mlp_alone is None


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_keys_and_values_are_handed_over_under_the_name_that_the_class_declares(argument):
    """transformers 5.24 renamed the argument; code of a published model's own keeps the former name."""
    handed = {}

    class Renamed(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache, **others):
            handed.update(others)

    parameters = [*inspect.signature(Renamed.forward).parameters.values()][:-1]
    parameters.append(inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY))
    Renamed.forward.__signature__ = inspect.Signature(parameters)
    rm = model("llama")
    past = PrefixCache(NO_PREFIX, 0)
    Trunk(Renamed().eval(), [], None, {}).run(suffix_batch(runs(rm)[0], 0, torch.device("cpu")), past=past)
    assert handed == {argument: past}
