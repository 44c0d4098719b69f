"""Path patching and attention knock-out against two plain runs a path, and masks of Hugging Face's own."""

import contextlib
import functools
import inspect

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import CHAT_TEMPLATES, STRUCTURES, TEXT_PAIRS, by_family, tiny_model, tiny_tokenizer
from reference.sweeps import _hook, _run, patched_reward, values_at
from reward_lens.methods.causation.knockout import without
from reward_lens.model.tokens import common_prefix

EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
UNEQUAL = rl.Pair("Is 7 a prime number?", "Yes, it is one.", "No, because it is 1", id="unequal")
MANY = [rl.Pair(*texts) for texts in TEXT_PAIRS]
every = pytest.mark.parametrize("family", by_family())
ALIBI = ("bloom", "falcon_alibi", "mpt")  # a 2-D mask moves their biases


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def given_by(rm, tokens, receiver, where, delta):
    """What a receiver gives when `delta` is added to what it reads: a whole run with that, the output kept."""
    site = rl.Site.parse(receiver)
    block = rm.module.get_submodule(rm.structure.blocks)[site.layer]
    reads_middle = site.kind == "mlp" and not rm.structure.parallel
    entry, where_in = (
        (block.get_submodule(rm.structure.path("attn", site.layer)), "out") if reads_middle else (block, "in")
    )
    delta = delta / rm.structure.write_scale if reads_middle else delta

    def move(x):
        out = x.clone()
        out.reshape(len(tokens), -1)[where] += delta
        return out

    kept = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        _hook(stack, entry, where_in, move)
        _hook(stack, block.get_submodule(getattr(rm.structure, site.kind)), "out", lambda x: kept.append(x.clone()))
        _run(rm, tokens)
    return kept[0].reshape(len(tokens), -1)


@every
@pytest.mark.parametrize("at", ["final", "all"])
def test_paths_equal_two_plain_runs(family, at):
    rm = model(family)
    chosen, rejected = rm.tokenize_pairs([EQUAL])[0]
    prefix = common_prefix(chosen, rejected) if at == "all" else chosen.reward_pos
    where = list(range(prefix, chosen.reward_pos + 1))
    senders, receivers = ["L0.attn", "L0.mlp", "L1.attn"], ["L1.attn", "L1.mlp", "L2.attn", "L2.mlp"]
    result = rl.path_effects(rm, [EQUAL], senders, receivers, at=at).value[0]
    own, other = (values_at(rm, t, senders) for t in (chosen, rejected))
    clean = rm.hf_score(EQUAL.prompt, EQUAL.chosen)
    for sender in senders:
        delta = (other[sender] - own[sender])[where] * rm.structure.write_scale
        for receiver in receivers:
            cell = float(result.sel(sender=sender, receiver=receiver))
            before, after = rl.Site.parse(sender), rl.Site.parse(receiver)
            inside = before.kind == "attn" and after.kind == "mlp" and not rm.structure.parallel
            if not (before.layer < after.layer or (before.layer == after.layer and inside)):
                assert np.isnan(cell)
                continue
            output = given_by(rm, chosen, receiver, where, delta)
            slow = clean - patched_reward(rm, chosen, [(receiver, where, output[where])])
            assert abs(cell - slow) < 3e-5, (sender, receiver)


def test_the_rows_of_a_path_keep_to_the_budget(monkeypatch):
    """Every sender is a row of its receiver's block: of many heads only so many run at once, to the same numbers."""
    rm = model("llama")
    whole = rl.path_effects(rm, [EQUAL], "heads", ["L2.attn", "L2.mlp"], at="all").value
    rows: list[int] = []
    handle = rm.trunk.writers["mlp"][2].register_forward_hook(lambda m, args, y: rows.append(y.shape[0]))
    monkeypatch.setattr("reward_lens.engine.row_budget.SEEN_PER_BATCH", 3 * len(rm.tokenize_pairs([EQUAL])[0][0]))
    few = rl.path_effects(rm, [EQUAL], "heads", ["L2.attn", "L2.mlp"], at="all").value
    handle.remove()
    assert max(rows) == 4  # three and the clean row of the sweep
    np.testing.assert_allclose(few, whole, atol=1e-5)


def test_a_path_that_does_not_exist_is_undefined_for_equal_responses_too():
    rm = model("llama")
    same = rl.Pair(EQUAL.prompt, EQUAL.chosen, EQUAL.chosen, id="same")
    result = rl.path_effects(rm, [EQUAL, same], ["L0.attn", "L1.mlp"], ["L1.attn", "reward"], at="all")
    assert np.isnan(result.value.sel(sender="L1.mlp", receiver="L1.attn")).all()  # a mean of one 0 is not an effect
    assert (result.value[1].sel(sender="L0.attn") == 0).all() and result.value[1].sel(receiver="reward").notnull().all()


@every
def test_the_path_to_the_reward_head_is_the_direct_effect(family):
    rm = model(family)
    for mode in ("noise", "denoise"):
        for senders in ("components", "heads"):
            path = rl.path_effects(rm, [EQUAL, UNEQUAL], senders, ["reward"], mode=mode).value[..., 0]
            parts = rl.effects(rm, [EQUAL, UNEQUAL], senders, mode=mode, path="direct").value
            direct = parts.sel(part=["direct", "norm_rescale"]).sum("part")
            np.testing.assert_allclose(path, direct, atol=2e-5 * max(1, float(np.abs(direct).max())))


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_heads_query_key_or_value_alone(kind):
    rm = model("llama")
    chosen, rejected = rm.tokenize_pairs([EQUAL])[0]
    where = list(range(common_prefix(chosen, rejected), chosen.reward_pos + 1))
    own, other = (values_at(rm, t, ["L0.mlp"])["L0.mlp"] for t in (chosen, rejected))
    block = rm.module.get_submodule(rm.structure.blocks)[1]
    projection, kept = getattr(block.self_attn, f"{kind}_proj"), []

    def move(x):
        out = x.clone()
        out[0, where] += (other - own)[where]
        return out

    with contextlib.ExitStack() as stack, torch.no_grad():
        _hook(stack, block, "in", move)
        _hook(stack, projection, "out", lambda x: kept.append(x.clone()))
        _run(rm, chosen)
    width = kept[0].shape[-1] // (rm.n_heads if kind == "q" else rm.n_kv_heads)

    def put(x):
        out = x.clone()
        out[0, where, width : 2 * width] = kept[0][0, where, width : 2 * width]
        return out

    with contextlib.ExitStack() as stack, torch.no_grad():
        _hook(stack, projection, "out", put)
        patched = _run(rm, chosen)
    slow = rm.hf_score(EQUAL.prompt, EQUAL.chosen) - patched
    path = rl.path_effects(rm, [EQUAL], ["L0.mlp"], [f"L1.{kind.upper()}1"], at="all").value
    assert abs(slow) > 1e-4 and abs(float(path[0, 0, 0]) - slow) < 2e-5


@every
def test_knock_out_is_a_blocked_attention(family):
    """Nothing after a span reads it: the same as Hugging Face's own mask over the span."""
    rm = model(family)
    result = rl.attention_knockout(rm, MANY, "word", "later")
    if family in ALIBI:
        assert float(np.nanmax(np.abs(result.value))) > 1e-3
        return
    masked = rl.token_attribution(rm, MANY, method="leave_one_out", by="word", removal="mask").value
    expected = masked.isel(position=slice(0, result.value.sizes["position"])).values
    np.testing.assert_allclose(result.value[:, :2], expected[:, :2], atol=3e-5 * max(1, np.nanmax(np.abs(expected))))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_knock_out_at_the_reward_position(family):
    rm = model(family)
    tokens = rm.tokenize(UNEQUAL.prompt, UNEQUAL.chosen)
    span = tokens.response
    result = rl.attention_knockout(rm, [UNEQUAL], {"unequal": [span, range(3, 6)]}, "reward").value
    n = len(tokens)
    mask = torch.full((1, 1, n, n), -torch.inf).triu(1)
    mask[0, 0, tokens.reward_pos, span.start : span.stop] = -torch.inf
    with torch.no_grad():
        hidden = rm.trunk.module(input_ids=torch.tensor([tokens.ids]), attention_mask=mask, use_cache=False)
        blocked = float(rm.head(hidden.last_hidden_state[0, tokens.reward_pos]))
    assert abs(float(result.sel(side="chosen")[0]) - (rm.score(UNEQUAL.prompt, UNEQUAL.chosen) - blocked)) < 2e-5
    one = rl.attention_knockout(rm, [UNEQUAL], {"unequal": [span, range(3, 6)]}, "reward", layers=[1]).value
    assert not np.allclose(one, result)


def test_units_that_end_where_the_reward_is_read_are_cut_before_it():
    """Padding with the EOS that ends a turn has the head read the response's last token, which reads itself."""
    template = CHAT_TEMPLATES["markers"].replace("<|end|>\\n", "' + eos_token + '")
    rm = rl.RewardModel(*tiny_model("llama", tokenizer=tiny_tokenizer(pad="eos", chat_template=template)))
    both = rm.tokenize_pairs([EQUAL])[0]
    assert [t.reward_pos for t in both] == [t.response.stop - 1 for t in both]
    given = {"equal": [range(t.response.start, t.reward_pos) for t in both]}
    result = rl.attention_knockout(rm, [EQUAL], "sentence")
    expected = rl.attention_knockout(rm, [EQUAL], given).value[:, :2]
    np.testing.assert_allclose(result.value[:, :2, 0], expected, atol=1e-6)
    assert result.value.piece.sel(side="chosen").values[0, 0] == EQUAL.chosen[:-2]  # its last token is "er"
    tokens = rl.attention_knockout(rm, [EQUAL], "token")
    n = len(both[0].response)
    assert np.isfinite(tokens.value[0, 0, : n - 1]).all() and np.isnan(tokens.value[0, 0, n - 1])
    assert any("nothing but the position that is read" in check.note for check in tokens.checks)


def test_a_row_without_a_span_still_sums_to_what_it_had():
    row = torch.tensor([[[0.5, 0.3, 0.2]], [[0.4, 0.3, 0.2]]])  # the second leaves .1 to a sink
    out = without(range(0, 1)).give(row, rl.Site("pattern", 0), 0, range(2))
    torch.testing.assert_close(out, torch.tensor([[[0.0, 0.6, 0.4]], [[0.0, 0.5, 1 / 3]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_a_row_is_no_sink(dtype):
    """Most of the attention on the span: the rest is the softmax without it, in 16 bits too."""
    scores = 1.5 * torch.randn(200, 1, 20, generator=torch.Generator().manual_seed(0))
    scores[..., 0] += 9
    rows, where = scores.softmax(-1).to(dtype), (rl.Site("pattern", 0), 0, range(200))
    left = without(range(0, 1)).give(rows, *where)[..., 1:].float()
    torch.testing.assert_close(left, scores[..., 1:].softmax(-1), atol=max(1e-6, torch.finfo(dtype).eps), rtol=0)
    rows[..., 3:5] = 0  # a span outside a sliding window
    assert torch.equal(without(range(3, 5)).give(rows, *where), rows)


def test_a_span_that_takes_the_whole_row_is_refused():
    row = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float16)
    with pytest.raises(rl.CheckFailed, match="float16 rounds to zero outside positions 0 to 1"):
        without(range(0, 1)).give(row, rl.Site("pattern", 0), 0, range(1))


@pytest.mark.parametrize("family", STRUCTURES)
def test_results_are_deterministic_and_saved(family, tmp_path):
    rm = model(family)
    for make in (
        lambda: rl.path_effects(rm, [EQUAL, UNEQUAL], "components", ["reward", "L1.mlp", "L2.Q1"]),
        lambda: rl.attention_knockout(rm, MANY, "sentence"),
    ):
        result, again = make(), make()
        assert result.value.identical(again.value)
        assert rl.load_result(result.save(tmp_path / "r.nc")).value.identical(result.value)


def test_bad_input():
    rm = model("llama")
    for senders, receivers in ((["L0.resid_pre"], ["reward"]), (["L0.attn"], ["L1.resid_pre"]), (["L0.attn"], [])):
        with pytest.raises(rl.DataError, match="needs a write at one end"):
            rl.path_effects(rm, [EQUAL], senders, receivers)
    with pytest.raises(rl.AlignmentError):
        rl.path_effects(rm, [UNEQUAL], ["L0.attn"], ["reward"], at="all")
    with pytest.raises(rl.DataError, match="L1.mlp twice.*each once"):
        rl.path_effects(rm, [EQUAL], ["L0.attn"], ["L1.mlp", "reward", "L1.mlp"])
    paths, edges = map(inspect.unwrap, (rl.path_effects, rl.edge_effects))
    with pytest.raises(rl.DataError, match="Found: mode='zero', align=None. Expected"):  # the receivers are well
        paths(rm, [EQUAL], ["L0.attn"], ["reward"], mode="zero")
    with pytest.raises(rl.DataError, match="align='legacy_prefix'.*align None, 'tail' or 'diff'"):
        paths(rm, [UNEQUAL], ["L2.mlp"], ["reward"], at="all", align="legacy_prefix")
    with pytest.raises(rl.DataError, match="align='legacy_prefix'.*align None, 'tail' or 'diff'"):
        edges(rm, [UNEQUAL], at="all", align="legacy_prefix")
    with pytest.raises(rl.DataError, match="whole steps"):
        edges(rm, [EQUAL], steps=1.5, at="all")
    one, listed = (rl.path_effects(rm, [EQUAL], ["L0.attn"], r) for r in ("reward", ["reward"]))
    assert one.value.identical(listed.value)
    with pytest.raises(rl.DataError, match="cannot be knocked out"):
        rl.attention_knockout(rm, [EQUAL], {"equal": [range(2, 2), range(1, 3)]})
    with pytest.raises(rl.DataError, match="has no spans"):
        rl.attention_knockout(rm, [EQUAL], {"other": [range(1, 2), range(1, 3)]})
    for spans in ([range(1, 5, 2), range(1, 5, 2)], [range(1, 3)]):
        with pytest.raises(rl.DataError, match="has no spans.*two ranges without steps"):
            rl.attention_knockout(rm, [EQUAL], {"equal": spans})
    with pytest.raises(rl.DataError, match="layers among 0 to 2"):
        rl.attention_knockout(rm, [EQUAL], layers=[5])
