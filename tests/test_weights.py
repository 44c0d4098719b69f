"""Readings of weights: planted circuits with known answers, and value maps written out by hand for each layout."""

import numpy as np
import pytest
import torch
import xarray as xr

import reward_lens as rl
from families import D_MODEL, HEAD_DIM, N_HEADS, N_KV, TEXT_PAIRS, tiny_model
from reward_lens.errors import CheckFailed, StructureError
from reward_lens.methods.observation import weights
from reward_lens.methods.observation.weights import ov_pull, value_maps, vocab_alignment


@pytest.fixture(scope="module")
def rm():
    return rl.RewardModel(*tiny_model("llama"))


# vocabulary


def test_vocab_alignment_by_hand(rm):
    """Every cosine from the model's own parameters, and the order of the rows."""
    result = vocab_alignment(rm, top=None)
    u = rm.module.model.norm.weight.detach() * rm.module.score.weight.detach()[0]
    table = rm.module.model.embed_tokens.weight.detach()
    ids = result.value["id"].values
    assert np.allclose(result.value["dot"], (table @ u)[ids], atol=1e-5)
    assert np.allclose(result.value, torch.cosine_similarity(table, u[None]).numpy()[ids], atol=1e-5)
    assert (np.diff(result.value) <= 0).all()
    assert sorted(ids.tolist()) == list(range(len(rm.tokenizer.hf)))  # the table's padding rows are no tokens
    names = dict(zip(ids.tolist(), result.value["token"].values.tolist(), strict=True))
    pieces = dict(zip(ids.tolist(), result.value["piece"].values.tolist(), strict=True))
    the = rm.tokenizer.hf.convert_tokens_to_ids("\u0120the")
    assert (names[the], pieces[the]) == ("\u0120the", " the")
    assert result.checks[0].gap < 1e-6 and result.unit == "cosine"


def test_vocab_alignment_of_layer_norms_and_positions():
    """A LayerNorm centres the direction; a learned position turns what enters block 0 away, and that is said."""
    rm = rl.RewardModel(*tiny_model("gpt2"))
    result = vocab_alignment(rm, top=None)
    u = rm.module.transformer.ln_f.weight.detach() * rm.module.score.weight.detach()[0]
    expected = torch.cosine_similarity(rm.module.transformer.wte.weight.detach(), (u - u.mean())[None])
    assert np.allclose(result.value, expected.numpy()[result.value["id"].values], atol=1e-5)
    assert result.checks[0].gap > 0.1


def test_vocab_alignment_keeps_both_ends(rm):
    full, ends = vocab_alignment(rm, top=None), vocab_alignment(rm, top=3)
    assert np.array_equal(ends.value, np.concatenate([full.value[:3], full.value[-3:]]))
    assert ends.meta["summary"]["mean"] == pytest.approx(float(full.value.mean()))
    assert ends.meta["summary"]["n_tokens"] == full.value.size


def test_vocab_alignment_finds_a_planted_token():
    module, tokenizer = tiny_model("llama")
    token = tokenizer.convert_tokens_to_ids("\u0120you")
    gain = module.model.norm.weight.data
    module.score.weight.data = (module.model.embed_tokens.weight.data[token] / gain)[None]
    module.model.embed_tokens.weight.data[7] = 0
    result = vocab_alignment(rl.RewardModel(module, tokenizer), top=5)
    assert float(result.value[0]) == pytest.approx(1, abs=1e-6)
    assert result.value["piece"].values[0] == " you"
    everything = vocab_alignment(rl.RewardModel(module, tokenizer), top=None)
    assert np.isnan(everything.value[-1]) and everything.value["id"].values[-1] == 7
    assert any("embedding is zero" in str(check) for check in everything.checks)


def test_vocab_alignment_scales_with_the_head(rm):
    module, tokenizer = tiny_model("llama")
    module.score.weight.data *= 3
    scaled, plain = vocab_alignment(rl.RewardModel(module, tokenizer)), vocab_alignment(rm)
    assert np.allclose(scaled.value, plain.value, atol=1e-6)
    assert np.allclose(scaled.value["dot"], 3 * plain.value["dot"], atol=1e-5)


# value maps


def fused(linear, order):
    """[head, head_dim, d_model] rows and biases of a fused map, cut by `order`(rows) -> rows of the values."""
    weight = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias
    return order(weight.detach()), order(bias.detach())


def last_third(x):  # GPT-2, MPT: queries, keys, values
    return x.chunk(3)[2].unflatten(0, (N_HEADS, -1))


def third_of_each_head(x):  # GPT-NeoX, Bloom, the first Falcon with alibi: head by head
    return x.unflatten(0, (N_HEADS, 3, -1))[:, 2]


def last_rows(x):  # Phi-3: queries, keys, values, the latter shared
    head_dim = D_MODEL // N_HEADS
    return x[-N_KV * head_dim :].unflatten(0, (N_KV, head_dim)).repeat_interleave(N_HEADS // N_KV, 0)


def last_of_each_group(x):  # Falcon's new form: a group is its queries, one key, one value
    head_dim = D_MODEL // N_HEADS
    grouped = x.unflatten(0, (N_KV, N_HEADS // N_KV + 2, head_dim))
    return grouped[:, -1].repeat_interleave(N_HEADS // N_KV, 0)


def one_for_all(x):  # Falcon-7B, StarCoder: one value for all heads, at the end
    return x[-D_MODEL // N_HEADS :][None].repeat_interleave(N_HEADS, 0)


def separate(x):
    return x.unflatten(0, (N_KV, -1)).repeat_interleave(N_HEADS // N_KV, 0)


LAYOUTS = {
    "llama": ("self_attn.v_proj", separate),
    "gemma2": ("self_attn.v_proj", separate),
    "gpt_oss": ("self_attn.v_proj", separate),
    "phi3": ("self_attn.qkv_proj", last_rows),
    "gpt2": ("attn.c_attn", last_third),
    "mpt": ("attn.Wqkv", last_third),
    "gpt_neox": ("attention.query_key_value", third_of_each_head),
    "bloom": ("self_attention.query_key_value", third_of_each_head),
    "falcon": ("self_attention.query_key_value", one_for_all),
    "falcon_new": ("self_attention.query_key_value", last_of_each_group),
    "gpt_bigcode": ("attn.c_attn", one_for_all),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_value_maps_of_every_layout(family):
    path, order = LAYOUTS[family]
    rm = rl.RewardModel(*tiny_model(family))
    for block, found in zip(rm.trunk.blocks, value_maps(rm), strict=True):
        weight, bias = fused(block.get_submodule(path), order)
        assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
        assert found.gap < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "bloom", "falcon_new", "granite"])
def test_pull_is_what_a_head_writes(family):
    """One token, a head attends to itself: its write along u is p . resid times the norms' scales, plus biases."""
    rm = rl.RewardModel(*tiny_model(family))
    maps = value_maps(rm)
    u = weights._direction(rm)
    unit = u / u.norm()
    split = weights.HeadSplit(rm)
    ids = torch.arange(20, 26)
    for layer, (values, seen) in enumerate(zip(maps, weights._watch(rm, ids), strict=True)):
        pull = weights._pull(rm, split, layer, values, unit)
        norm, after = values.norm, split.norms[layer]
        scale = torch.ones(len(ids), 1) if norm is None else norm.scale(seen.resid)
        constant = values.bias if norm is None else values.bias + values.weight @ norm.shift
        z = seen.z.unflatten(1, (rm.n_heads, -1)) - constant
        out = weights.linear_weight(split.maps[layer]).unflatten(1, (rm.n_heads, -1))
        writes = torch.einsum("dhi,phi->phd", out, z) * rm.structure.write_scale
        if after is not None:
            writes = after.frozen(writes, torch.ones(1)) - after.shift
        assert torch.allclose(writes @ unit, scale * (seen.resid @ pull.T), atol=1e-4)


def test_pull_goes_through_the_norms_behind_the_write_of_post_norm_blocks():
    """GPT-1: attention's write is behind its own block's two norms and those of all later blocks, scales at 1."""
    rm = rl.RewardModel(*tiny_model("openai"))
    maps, split, blocks = value_maps(rm), weights.HeadSplit(rm), list(rm.trunk.blocks)
    u = weights._direction(rm)
    source = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        values = torch.einsum("hid,d->hi", maps[layer].weight, source)
        out = blocks[layer].attn.c_proj.weight.T.unflatten(1, (rm.n_heads, -1))
        writes = torch.einsum("dhi,hi->hd", out, values)
        for block in blocks[layer:]:
            for norm in (block.ln_1, block.ln_2):
                writes = (writes - writes.mean(-1, keepdim=True)) * norm.weight
        pull = weights._pull(rm, split, layer, maps[layer], u / u.norm())
        assert torch.allclose(pull @ source, writes @ u / u.norm(), atol=1e-4)


def test_planted_copies():
    """Head 0 copies u, head 1 (of the same value head) turns it round twice as large, head 2 reads elsewhere."""
    module, tokenizer = tiny_model("llama")
    gain = module.model.norm.weight.data
    u = gain * module.score.weight.data[0]
    unit = u / u.norm()
    across = torch.linalg.qr(torch.stack([unit, torch.arange(D_MODEL, dtype=torch.float32)], 1))[0][:, 1]
    attention, before = module.model.layers[1].self_attn, module.model.layers[1].input_layernorm.weight.data
    attention.v_proj.weight.data.zero_()
    attention.o_proj.weight.data.zero_()
    attention.v_proj.weight.data[0] = unit / before  # first value head, shared by heads 0 and 1
    attention.v_proj.weight.data[HEAD_DIM] = 3 * across / before
    attention.o_proj.weight.data[:, 0] = unit
    attention.o_proj.weight.data[:, HEAD_DIM] = -2 * unit
    attention.o_proj.weight.data[:, 2 * HEAD_DIM] = unit
    result = ov_pull(rl.RewardModel(module, tokenizer))
    layer = result.value.sel(component=["L1.H0", "L1.H1", "L1.H2", "L1.H3"])
    assert np.allclose(layer.sel(reading="copy"), [1, -2, 0, 0], atol=1e-5)
    assert np.allclose(layer.sel(reading="norm"), [1, 2, 3, 0], atol=1e-5)
    assert layer["layer"].values.tolist() == [1] * 4 and layer["head"].values.tolist() == [0, 1, 2, 3]
    assert result.top(1)["component"].item() in result.value["component"].values


def test_ov_pull_of_heads_without_values(rm):
    """Heads 0 and 1 share values that are zero: they pull nothing, all others what they pulled. Rows that are zero on
    every probe and not elsewhere are some head's, and nothing says which."""
    module, tokenizer = tiny_model("llama")
    module.model.layers[1].self_attn.v_proj.weight.data[:HEAD_DIM] = 0
    expected = ov_pull(rm).value
    expected.loc[{"component": ["L1.H0", "L1.H1"]}] = 0
    assert np.allclose(ov_pull(rl.RewardModel(module, tokenizer)).value, expected, atol=1e-6)
    module.model.embed_tokens.weight.data[:, 0] = 0
    module.model.layers[0].self_attn.v_proj.weight.data[:, 1:] = 0
    with pytest.raises(StructureError, match="block 0 .* 0 on every probe text, so that which rows are whose"):
        ov_pull(rl.RewardModel(module, tokenizer))


def test_ov_pull_does_not_scale_with_the_head(rm):
    module, tokenizer = tiny_model("llama")
    module.score.weight.data *= 5
    assert np.allclose(ov_pull(rl.RewardModel(module, tokenizer)).value, ov_pull(rm).value, atol=1e-5)


def test_latent_attention_is_refused():
    rm = rl.RewardModel(*tiny_model("deepseek_v3"))
    with pytest.raises(StructureError, match=r"no linear map of the residual stream.*leaves \d"):
        ov_pull(rm)
    assert vocab_alignment(rm).value.size == 50


def test_the_value_map_check_can_fail(rm, monkeypatch):
    """Rows of other heads are caught on the fresh texts."""
    match = weights._match

    def wrong(z, slices):
        return match(z, slices)[0], match(z, slices)[1].flip(0)

    monkeypatch.setattr(weights, "_match", wrong)
    with pytest.raises(CheckFailed, match="value map"):
        ov_pull(rm)


@pytest.mark.parametrize("method", [vocab_alignment, ov_pull])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_no_trace(method, dtype, tmp_path):
    rm = rl.RewardModel(*tiny_model("qwen3", dtype=dtype))
    before = rm.score_pairs([rl.Pair(*TEXT_PAIRS[0])]).value
    result = method(rm)
    loaded = rl.load_result(result.save(tmp_path / "result.nc"))
    xr.testing.assert_identical(loaded.dataset, result.dataset)
    assert repr(result) and result._repr_html_() and result.plot() is not None
    assert result.meta["title"] and result.meta["shows"] and result.meta["cannot_show"]
    assert np.array_equal(method(rm).value, result.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    xr.testing.assert_identical(rm.score_pairs([rl.Pair(*TEXT_PAIRS[0])]).value, before)
