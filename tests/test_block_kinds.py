"""Blocks that differ: recurrent and convolutional mixers beside attention, dense MLPs before experts."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS, more, tiny_model
from identities import assert_slow_loops_agree
from reference.loops import plain_contributions
from reference.sweeps import patched_reward, values_at
from reward_lens.model import block_kinds

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
# (attn, mlp, attn_out, mlp_out) of blocks 0 and 1; block 2 is as block 0 but for what is said
HYBRIDS = {
    "qwen3_next": (("linear_attn", "self_attn"), ("mlp", "mlp"), "self_attn.o_proj", ("mlp.down_proj", None, None)),
    "jamba": (
        ("mamba", "self_attn"), ("feed_forward",) * 2, "self_attn.o_proj", (None, "feed_forward.down_proj", None),
    ),
    "bamba": (("mamba", "self_attn"), ("feed_forward",) * 2, "self_attn.o_proj", ("feed_forward.down_proj",) * 3),
    "lfm2": (("conv", "self_attn"), ("feed_forward",) * 2, "self_attn.out_proj", ("feed_forward.w2",) * 3),
    "granitemoehybrid": (
        ("mamba", "self_attn"), ("shared_mlp",) * 2, "self_attn.o_proj", ("shared_mlp.output_linear",) * 3,
    ),
    "olmo_hybrid": (
        ("linear_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"), "self_attn.o_proj",
        ("mlp.down_proj",) * 3,
    ),
}  # fmt: skip
each = pytest.mark.parametrize("family", ["qwen3_next", *more(*(f for f in HYBRIDS if f != "qwen3_next"))])


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


@each
def test_each_block_has_its_own_paths(family):
    rm = model(family)
    attn, mlp, attn_out, mlp_out = HYBRIDS[family]
    found = rm.structure
    for layer in range(3):
        assert found.path("attn", layer) == attn[layer % 2] and found.path("mlp", layer) == mlp[layer % 2]
        assert found.path("attn_out", layer) == (attn_out if layer == 1 else None)
        assert found.path("mlp_out", layer) == mlp_out[layer]
    assert [found.attends(layer) for layer in range(3)] == [False, True, False]
    assert max(found.gaps) < 1e-5 and not found.parallel
    assert " or ".join(dict.fromkeys(attn)) in str(rm.load_report.value.sel(check="writes close").found.item())
    assert not rm.reuses_prefix()  # a recurrent state is no list of keys and values


@each
def test_identities(family):
    assert_slow_loops_agree(model(family))


@each
def test_effects_equal_plain_runs(family):
    rm = model(family)
    sites = ["embed", "L0.attn", "L0.mlp", "L1.attn", "L1.H2", "L1.resid_pre", "L2.attn", "L1.resid_post"]
    for pair in PAIRS[1:3]:
        effects = rl.effects(rm, [pair], sites).value[0]
        chosen, rejected = rm.tokenize(pair.prompt, pair.chosen), rm.tokenize(pair.prompt, pair.rejected)
        held = values_at(rm, rejected, sites)
        clean = rm.hf_score(pair.prompt, pair.chosen)
        for site in sites:
            change = (site, [chosen.reward_pos], held[site][[rejected.reward_pos]])
            patched = patched_reward(rm, chosen, [change])
            assert float(effects.sel(component=site)) == pytest.approx(clean - patched, abs=1e-4)


@each
def test_what_has_no_heads_is_not_split(family):
    rm = model(family)
    with pytest.raises(rl.StructureError, match="block 0 .* cannot be split into heads"):
        rl.contributions(rm, PAIRS[:1], by="token")
    with pytest.raises(rl.StructureError, match="block 0 .* cannot be split into heads"):
        rl.ov_pull(rm)
    for site in ("L0.H1", "L0.head"):
        with pytest.raises(rl.StructureError, match="cannot be split into heads.*no attention and has no heads"):
            rl.effects(rm, PAIRS[:1], [site])
    for site in ("L0.Q1", "L2.K0", "L0.pattern"):
        with pytest.raises(rl.StructureError, match=r"a block with attention \(1\)"):
            rl.capture(rm, PAIRS[:1], [site])
    heads = rl.effects(rm, PAIRS[:1], "heads").value
    assert [str(name) for name in heads.component.values] == [f"L1.H{i}" for i in range(rm.n_heads)]
    queries = rl.capture(rm, PAIRS[:1], ["L1.Q0", "L1.K1", "L1.pattern"])
    np.testing.assert_allclose(queries["L1.pattern"].sum(-1), 1.0, atol=1e-5)
    knocked = rl.attention_knockout(rm, PAIRS[:1], "word")
    assert knocked.meta["settings"]["layers"] == [1]
    with pytest.raises(rl.StructureError, match="a block with attention"):
        rl.attention_knockout(rm, PAIRS[:1], "word", layers=[0])


@each
def test_heads_are_split_where_there_are_some_and_other_mixers_stay_whole(family):
    """Each head's row is what goes from its block's write with it, along the gradient of head and frozen norm."""
    rm, pair = model(family), PAIRS[1]
    result = rl.contributions(rm, [pair], by="head")
    names = [f"L1.H{i}" for i in range(rm.n_heads)]
    kinds = dict(zip(result.value.component.values, result.value.kind.values, strict=True))
    assert [n for n in kinds if kinds[n] in ("head", "attn")] == ["L0.attn", *names, "L2.attn"]
    rows = result.value.sel(side="chosen")[0]
    whole = plain_contributions(rm, pair.prompt, pair.chosen)
    for name in ("embed", "L0.attn", "L0.mlp", "L1.mlp", "L2.attn", "L2.mlp"):
        assert float(rows.sel(component=name)) == pytest.approx(whole[name], abs=1e-4)
    direct = rl.effects(rm, [pair], names, "zero", path="direct").value.sel(side="chosen", part="direct")[0]
    out = rm.module.get_submodule(rm.structure.blocks)[1].get_submodule(rm.structure.path("attn_out", 1))
    tokens = rm.tokenize(pair.prompt, pair.chosen)
    gradient = _gradient_at_the_write(rm, tokens)
    for i, name in enumerate(names):
        z = _input_of(rm, out, tokens)[tokens.reward_pos].view(rm.n_heads, -1)
        lost = z.clone()
        lost[i] = 0
        one = float(((out(z.flatten()) - out(lost.flatten())) * rm.structure.write_scale * gradient).sum().detach())
        if rm.name != "olmo_hybrid":  # there a post-norm stands between, whose frozen scale the split knows
            assert float(rows.sel(component=name)) == pytest.approx(one, abs=1e-4)
        assert float(direct.sel(component=name)) == pytest.approx(float(rows.sel(component=name)), abs=1e-5)
    parts = [float(rows.sel(component=n)) for n in kinds if n in names or n == "L1.attn_bias"]
    assert sum(parts) == pytest.approx(whole["L1.attn"], abs=1e-4)


def _input_of(rm, module, tokens):
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach().clone()))
    with torch.no_grad():
        rm.module(input_ids=torch.tensor([tokens.ids]))
    handle.remove()
    return seen[0]


def _gradient_at_the_write(rm, tokens):
    """Of the head's reading of the pre-norm residual, the norm's scale held constant (RMSNorm)."""
    h = _input_of(rm, rm.module.get_submodule(rm.structure.final_norm), tokens)[tokens.reward_pos]
    norm, head = (rm.module.get_submodule(p) for p in (rm.structure.final_norm, rm.structure.head))
    with torch.no_grad():
        return norm(h) / h * head.weight[rm.row]


def test_a_structure_with_a_path_a_block_can_be_passed():
    rm = model("qwen3_next")
    kept = json.loads(json.dumps(dataclasses.asdict(rm.structure)))
    assert rl.Structure.of(kept) == rm.structure
    given = dataclasses.replace(rm.structure, gaps=(), parallel=None)
    again = rl.RewardModel(*tiny_model("qwen3_next", seed=1), structure=given)
    assert again.structure == rm.structure and again.structure.gaps == rm.structure.gaps
    short = dataclasses.replace(given, attn=("linear_attn", "self_attn"))
    with pytest.raises(rl.StructureError, match="attn has 2 paths for 3 blocks"):
        rl.RewardModel(*tiny_model("qwen3_next", seed=1), structure=short)
    absent = dataclasses.replace(given, attn=("linear_attn",) * 3)
    with pytest.raises(rl.StructureError, match="no attribute `linear_attn`"):
        rl.RewardModel(*tiny_model("qwen3_next", seed=1), structure=absent)


def test_a_kernel_that_hides_its_softmax(monkeypatch):
    """Which of two kinds of mixers is attention is then not known: no heads anywhere, and the rest as before."""
    monkeypatch.setattr(block_kinds._Softmax, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **(k or {})))
    rm = rl.RewardModel(*tiny_model("qwen3_next", seed=1))
    assert rm.structure.attn_out is None and rm.structure.attn == model("qwen3_next").structure.attn
    with pytest.raises(rl.StructureError, match="cannot be split into heads"):
        rl.effects(rm, PAIRS[:1], "heads")
    alike = rl.RewardModel(*tiny_model("qwen2_moe", seed=1))  # dense MLP, then experts, but one class of mixer
    assert alike.structure.attn_out == "self_attn.o_proj"


def test_a_factor_of_the_blocks_own_is_found():
    """MiniCPM3 scales its writes by a number that stands in no config: scale_depth / sqrt(layers)."""
    rm = rl.RewardModel(*tiny_model("minicpm3", seed=1))
    assert rm.structure.write_scale == pytest.approx(1.1 / 3**0.5) and max(rm.structure.gaps) < 1e-5


def test_a_short_text_runs_whole():
    """What a recurrent mixer keeps cannot be cut from a longer text: a prefix alone gives its own reward."""
    rm = model("qwen3_next")
    tokens = rm.tokenize(PAIRS[0].prompt, PAIRS[0].chosen)
    batch = rm.rewards([tokens, tokens.first(len(tokens) - 3)])
    with torch.no_grad():
        alone = rm.module(input_ids=torch.tensor([tokens.ids[:-3]])).logits[0, 0]
    assert float(batch[1]) == pytest.approx(float(alone), abs=1e-4)
