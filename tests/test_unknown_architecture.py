"""An architecture invented here, which follows none of the names, needs no line in the package."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS
from invented import BULK, FORMS, LOBES, SLABS, Quarry, invented_model
from reference.loops import plain_lens

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
each = pytest.mark.parametrize("form", FORMS)


@functools.cache
def model(form: str) -> rl.RewardModel:
    return rl.RewardModel(*invented_model(form), name=form)


def test_the_package_knows_none_of_its_names():
    source = "".join(path.read_text() for path in Path(rl.__file__).parent.rglob("*.py"))
    for name in ("slab", "grind", "Leveller", "quarry", "skim", "gauge", "lobes"):
        assert name not in source


@each
def test_parts_are_found_and_the_reward_is_the_models_own(form):
    rm = model(form)
    found = rm.structure
    attn, mlp = ("exit", "second_exit") if form == "sandwich" else ("gather", "grind")
    assert (found.blocks, found.attn, found.mlp) == ("quarry.slabs", attn, mlp)
    assert (found.attn_out, found.mlp_out) == ("gather.together", "grind.press")
    assert (found.final_norm, found.head, found.parallel) == ("quarry.skim", "gauge", form == "parallel")
    assert (rm.n_layers, rm.n_heads) == (SLABS, LOBES) and max(found.gaps) < 1e-5
    for pair, row in zip(PAIRS, rm.score_pairs(PAIRS).value.sel(side="chosen").values, strict=True):
        own = rm.hf_score(pair.prompt, pair.chosen)
        assert row == pytest.approx(own, abs=1e-4) and rm.score(pair.prompt, pair.chosen) == pytest.approx(
            own, abs=1e-5
        )


def test_a_part_whose_name_begins_like_the_blocks_is_none_of_them(monkeypatch):
    module, tokenizer = invented_model("plain")
    module.quarry.add_module("slabs_end", module.quarry.skim)
    del module.quarry.skim
    monkeypatch.setattr(Quarry, "skim", property(lambda self: self.slabs_end), raising=False)
    rm = rl.RewardModel(module, tokenizer)
    assert rm.structure.final_norm == "quarry.slabs_end"
    assert rm.score("Is it?", "Yes.") == model("plain").score("Is it?", "Yes.")


@each
@pytest.mark.parametrize("by", ["component", "head", "neuron", "token"])
def test_contributions_sum_to_the_reward(form, by):
    rm = model(form)
    if by == "token" and form == "parallel":  # its attention is one einsum: what each position gave stays hidden
        with pytest.raises(rl.StructureError, match="no attention product was seen"):
            rl.contributions(rm, PAIRS, by=by)
        return
    value = rl.contributions(rm, PAIRS, by=by).value
    value = value.sum("position") if by == "token" else value
    rewards = rm.score_pairs(PAIRS).value
    assert float(np.abs(value.sum("component") - rewards).sel(side=["chosen", "rejected"]).max()) < 1e-4


@each
def test_lens_equals_the_slow_loop_and_ends_at_the_reward(form):
    rm = model(form)
    lens = rl.reward_lens(rm, PAIRS).value.sel(side="chosen")
    for pair, row in zip(PAIRS[:2], lens.values, strict=False):
        np.testing.assert_allclose(row, plain_lens(rm, pair.prompt, pair.chosen), atol=2e-5)
    np.testing.assert_allclose(lens[:, -1], rm.score_pairs(PAIRS).value.sel(side="chosen"), atol=1e-4)


@each
def test_effects_equal_plain_hooks(form):
    """Noise at the reward position: the write of the rejected run, put into the chosen run by a hook of our own."""
    rm = model(form)
    sites = [f"L{layer}.{kind}" for layer in range(SLABS) for kind in ("attn", "mlp")]
    effects = rl.effects(rm, PAIRS[:3], sites).value
    for i, pair in enumerate(PAIRS[:3]):
        chosen, rejected = rm.tokenize(pair.prompt, pair.chosen), rm.tokenize(pair.prompt, pair.rejected)
        clean = plain_run(rm, chosen)
        for site in sites:
            layer, kind = int(site[1]), site[3:]
            writer = rm.module.quarry.slabs[layer].get_submodule(getattr(rm.structure, kind))
            taken = []
            plain_run(rm, rejected, writer, lambda x, taken=taken: taken.append(x.clone()) or x)

            def put(x, value=taken[0][0, rejected.reward_pos], at=chosen.reward_pos):
                x = x.clone()
                x[0, at] = value
                return x

            patched = plain_run(rm, chosen, writer, put)
            assert float(effects.sel(component=site)[i]) == pytest.approx(clean - patched, abs=1e-4)
    for sites in ("heads", ["L1.N5", f"L2.N{BULK - 1}", "L1.resid_pre"]):
        assert np.isfinite(rl.effects(rm, PAIRS[:1], sites, at="all", align="tail").value).all()


@torch.no_grad()
def plain_run(rm: rl.RewardModel, tokens, writer=None, change=None) -> float:
    """The wrapped model's own reward, with one module's output changed."""
    handle = None
    if writer is not None:

        def act(_module, _args, output):
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handle = writer.register_forward_hook(act)
    try:
        return float(rm.module(input_ids=torch.tensor([tokens.ids])).logits[0, 0])
    finally:
        if handle is not None:
            handle.remove()
