"""`effects` against one whole forward a site, and the identities E5, E6, E7 and E9 on every family."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import STRUCTURES, TEXT_PAIRS, by_family, tiny_model, tiny_tokenizer
from reference.sweeps import patched_reward, values_at
from reward_lens.methods.causation.direct import _last_write
from reward_lens.methods.causation.effects import _require_settings
from reward_lens.model.tokens import common_prefix

EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
UNEQUAL = rl.Pair("Is 7 a prime number?", "Yes, it is one.", "No, because it is 1", id="unequal")
PAIRS = [EQUAL, UNEQUAL]
MANY = [rl.Pair(*texts) for texts in TEXT_PAIRS]
every = pytest.mark.parametrize("family", by_family())
some = pytest.mark.parametrize("family", STRUCTURES)


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def named(rm, result_sites: str) -> list[str]:
    if result_sites == "heads":
        return [f"L{layer}.H{head}" for layer in range(rm.n_layers) for head in range(rm.n_heads)]
    if result_sites == "residual":
        return [*(f"L{layer}.resid_pre" for layer in range(rm.n_layers)), f"L{rm.n_layers - 1}.resid_post"]
    return ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]


def tail(base, source):
    """Aligned positions written out: from the right, as long as both are past the common prefix."""
    prefix, out, back = common_prefix(base, source), [], 0
    while min(base.reward_pos, source.reward_pos) - back >= prefix:
        out.append((base.reward_pos - back, source.reward_pos - back))
        back += 1
    return out[::-1]


def slow(rm, pair, sites, mode, where) -> np.ndarray:
    chosen, rejected = (rm.tokenize(pair.prompt, r) for r in (pair.chosen, pair.rejected))
    base, source = (chosen, rejected) if mode == "noise" else (rejected, chosen)
    positions = where(base, source)
    held = values_at(rm, source, sites)
    clean = rm.hf_score(pair.prompt, pair.chosen if mode == "noise" else pair.rejected)
    out = []
    for name in sites:
        value = held[name][[s for _, s in positions]]
        change = patched_reward(rm, base, [(name, [b for b, _ in positions], value)]) - clean
        out.append(-change if mode == "noise" else change)
    return np.array(out)


@every
@pytest.mark.parametrize("sites", ["components", "heads", "residual"])
@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_patching_equals_the_slow_loop(family, sites, mode):
    rm = model(family)
    ways = [("final", None, lambda b, s: [(b.reward_pos, s.reward_pos)], PAIRS), ("all", "tail", tail, PAIRS)]
    ways += [("response", None, tail, [EQUAL])]
    for at, how, where, pairs in ways:
        result = rl.effects(rm, pairs, sites, mode=mode, at=at, align=how)
        expected = np.stack([slow(rm, pair, named(rm, sites), mode, where) for pair in pairs])
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(result.value, expected, atol=1e-5 * max(1, np.abs(expected).max()))
        margins = rm.score_pairs(pairs).value.sel(side="margin").values
        np.testing.assert_allclose(result.value["recovered"], result.value / margins[:, None], rtol=1e-4, atol=1e-5)
        if sites == "residual":  # E6: the last residual carries the whole margin
            assert "last residual" in {c.name for c in result.checks}
            np.testing.assert_allclose(result.value[:, -1], margins, atol=1e-5 * max(1, np.abs(margins).max()))


@every
def test_all_shortcuts_off_gives_the_same(family, monkeypatch):
    rm = model(family)
    fast = rl.effects(rm, PAIRS, at="all", align="tail")
    monkeypatch.setattr(rl.RewardModel, "reuses_prefix", lambda self, *texts: False)
    whole = rl.effects(rm, PAIRS, at="all", align="tail", max_rows=1)
    np.testing.assert_allclose(whole.value, fast.value, atol=1e-5 * max(1, float(np.abs(fast.value).max())))


@every
def test_e5_what_both_runs_share_has_no_effect(family):
    rm = model(family)
    same = rl.Pair(EQUAL.prompt, EQUAL.chosen, EQUAL.chosen, id="same")
    for at in ("final", "all"):
        assert not rl.effects(rm, [same], at=at).value.any()
        assert not rl.effects(rm, [same], "heads", at=at, align="diff").value.any()
    chosen = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    prefix = common_prefix(chosen, rm.tokenize(EQUAL.prompt, EQUAL.rejected))
    spans = {"prompt": chosen.prompt, "shared": range(0, prefix), "rest": range(prefix, len(chosen))}
    by_span = rl.effects(rm, [EQUAL], at="all", spans=spans).value[0]
    assert not by_span.sel(span=["prompt", "shared"]).values.any()
    whole = rl.effects(rm, [EQUAL], at="all").value[0]
    np.testing.assert_allclose(by_span.sel(span="rest"), whole, atol=1e-5 * max(1, float(np.abs(whole).max())))


@every
@pytest.mark.parametrize("sites", ["components", "heads"])
def test_e7_frozen_direct_effects_are_contributions(family, sites):
    rm = model(family)
    parts = {m: rl.effects(rm, PAIRS, sites, mode=m, path="direct").value for m in ("noise", "denoise", "zero")}
    names = parts["noise"]["component"].values
    by = sites.removesuffix("s")
    split = rl.contributions(rm, PAIRS, by=by).value.sel(component=names)
    own = rl.contributions(rm, PAIRS, by=by, scale="own").value.sel(component=names)
    scale = 1e-5 * max(1, float(np.abs(own).sum("component").max()))
    mean = (parts["noise"].sel(part="direct") + parts["denoise"].sel(part="direct")) / 2
    np.testing.assert_allclose(mean, split.sel(side="margin"), atol=scale)
    np.testing.assert_allclose(parts["zero"].sel(part="direct"), own, atol=scale)
    for mode, value in parts.items():
        total = rl.effects(rm, PAIRS, sites, mode=mode).value
        np.testing.assert_allclose(value.sel(part="total"), total)
        np.testing.assert_allclose(value.sel(part=["direct", "norm_rescale", "mediated"]).sum("part"), total, atol=1e-9)


@some
def test_the_live_direct_effect_is_the_head_on_the_changed_residual(family):
    rm = model(family)
    acts = rl.capture(rm, PAIRS)
    h = acts[f"L{rm.n_layers - 1}.resid_post"]
    result = rl.effects(rm, PAIRS, path="direct", mode="denoise").value
    live = result.sel(part=["direct", "norm_rescale"]).sum("part")
    for name in ("L0.attn", "L1.mlp"):
        moved = h[1::2] + acts.chosen(name) - acts.rejected(name)
        expected = rm.readout.reward(moved) - rm.readout.reward(h[1::2])
        np.testing.assert_allclose(live.sel(component=name), expected, atol=2e-5)


@every
def test_e9_swapping_and_scaling(family):
    rm = model(family)
    back = [rl.Pair(p.prompt, p.rejected, p.chosen, id=p.id) for p in PAIRS]
    noise = rl.effects(rm, PAIRS, at="all", align="tail").value
    denoise = rl.effects(rm, back, mode="denoise", at="all", align="tail").value
    np.testing.assert_allclose(noise, -denoise, atol=1e-6 * max(1, float(np.abs(noise).max())))
    module = copy.deepcopy(rm.module)
    with torch.no_grad():
        for parameter in module.get_submodule(rm.structure.head).parameters():
            parameter.mul_(2.0)
    scaled = rl.RewardModel(module, rm.tokenizer.hf)
    np.testing.assert_allclose(rl.effects(scaled, PAIRS, at="all", align="tail").value, 2 * noise, rtol=1e-6)


@some
@pytest.mark.parametrize("at", ["final", "response", "all"])
def test_ablations_are_interventions(family, at):
    rm = model(family)
    sites = ["embed", "L0.attn", "L1.mlp", "L1.H2", "L2.resid_pre"]
    result = rl.effects(rm, MANY, sites, mode="zero", at=at).value
    for name in sites:
        change = rl.intervene(rm, MANY, {name: rl.zeros()}, at=at).value.sel(state="change")
        np.testing.assert_allclose(result.sel(component=name), -change, atol=2e-5 * max(1, float(np.abs(change).max())))


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("path", ["total", "direct"])
def test_an_ablation_refuses_an_alignment(mode, path):
    with pytest.raises(rl.DataError, match=f"given an alignment.*'{mode}', align='tail'.*leave align= out"):
        rl.effects(model("llama"), PAIRS, ["L1.mlp"], mode=mode, at="all", align="tail", path=path)


@some
def test_mean_ablation_takes_the_mean_of_other_prompts(family):
    rm = model(family)
    result = rl.effects(rm, MANY, ["L1.attn"], mode="mean").value[:, :, 0]
    acts = rl.capture(rm, MANY, ["L1.attn"])["L1.attn"]
    for i, pair in enumerate(MANY):
        others = [j for j in range(2 * len(MANY)) if j // 2 != i]
        source = rl.constant(acts[others].mean(0))
        change = rl.intervene(rm, [pair], {"L1.attn": source}).value.sel(state="change")[0]
        np.testing.assert_allclose(result[i], -change, atol=2e-5)
    everywhere = rl.effects(rm, MANY, ["L1.attn"], mode="mean", at="response").value
    assert np.isfinite(everywhere).all() and float(np.abs(everywhere[:, :2] - result.values[:, :2, None]).max()) > 1e-3


@some
def test_resampling_draws_from_other_prompts_only(family):
    rm = model(family)
    result = rl.effects(rm, MANY, ["L1.attn", "L2.mlp"], mode="resample", n_draws=40, seed=3)
    assert result.value.identical(
        rl.effects(rm, MANY, ["L1.attn", "L2.mlp"], mode="resample", n_draws=40, seed=3).value
    )
    assert not result.value.equals(
        rl.effects(rm, MANY, ["L1.attn", "L2.mlp"], mode="resample", n_draws=40, seed=4).value
    )
    assert float(result.value["draw_sd"].min()) > 0 and "pair's own excluded" in result.meta["settings"]["reference"]
    one = [MANY[0]]
    other = rl.effects(rm, one, ["L1.attn"], mode="resample", reference=[MANY[1]]).value
    acts = rl.capture(rm, [MANY[1]], ["L1.attn"])["L1.attn"]
    changes = [rl.intervene(rm, one, {"L1.attn": rl.constant(v)}).value.sel(state="change")[0, 0].item() for v in acts]
    assert min(changes) - 1e-5 <= -float(other[0, 0, 0]) <= max(changes) + 1e-5


@some
def test_positions_one_by_one(family):
    rm = model(family)
    result = rl.effects(rm, PAIRS, ["L1.mlp", "L2.resid_pre"], at="all", align="tail", spans="position")
    for i, pair in enumerate(PAIRS):
        chosen, rejected = rm.tokenize_pairs([pair])[0]
        where = tail(chosen, rejected)
        assert int(result.value["n_positions"][i]) == len(where)
        assert result.value["token_position"][i].values[: len(where)].tolist() == [b for b, _ in where]
        held = values_at(rm, rejected, ["L1.mlp"])["L1.mlp"]
        b, s = where[1]
        change = patched_reward(rm, chosen, [("L1.mlp", [b], held[[s]])]) - rm.hf_score(pair.prompt, pair.chosen)
        assert abs(float(result.value[i, 0, 1]) + change) < 2e-5
    assert np.isnan(result.value.values).any()  # the padding of the shorter pair
    assert result.mean is None  # position k of one pair is no word of another
    (first,) = result.top(1).itertuples()
    cell = result.value.sel(pair=first.pair, component=first.component, position=first.position)
    assert cell.item() == first.value and cell["piece"].item() == first.piece


def test_positions_of_equal_responses_are_none_and_stop_no_sweep():
    rm = model("llama")
    same = rl.Pair(EQUAL.prompt, EQUAL.chosen, EQUAL.chosen, id="same")
    for estimator in ("exact", "gradient"):
        ways = {"at": "all", "spans": "position", "estimator": estimator}
        both = rl.effects(rm, [same, EQUAL], ["L1.mlp"], **ways)
        assert both.value.n_positions.values.tolist() == [0, both.value.sizes["position"]]
        assert np.isnan(both.value[0]).all() and both.value[1].notnull().all()
        np.testing.assert_allclose(both.value[1], rl.effects(rm, [EQUAL], ["L1.mlp"], **ways).value[0], atol=1e-5)
    with pytest.raises(rl.DataError, match="No pair has a position to patch.*equal responses in every pair"):
        rl.effects(rm, [same], ["L1.mlp"], at="all", spans="position")


def test_each_position_of_both_responses_ablated():
    """Responses of different length: every side has its own positions, and a margin those that both begin with."""
    rm = model("llama")
    for at in ("final", "response", "all"):
        value = rl.effects(rm, PAIRS, ["L1.mlp"], "zero", at, spans="position").value
        for i, (pair, both) in enumerate(zip(PAIRS, rm.tokenize_pairs(PAIRS), strict=True)):
            of = {"final": lambda t: [t.reward_pos], "response": lambda t: [*t.response, *t.tail],
                  "all": lambda t: list(range(len(t)))}[at]  # fmt: skip
            own = [[p for p in of(text) if p <= text.reward_pos] for text in both]
            for side, (text, positions) in enumerate(zip(both, own, strict=True)):
                n = int(value.n_positions[i, side])
                assert value.token_position[i, side].values[:n].tolist() == positions
                assert value.piece[i, side].values[:n].tolist() == [text.pieces[p] for p in positions]
                assert np.isnan(value[i, side, 0, n:]).all()
                p = positions[n // 2]
                whole = rm.hf_score(pair.prompt, pair.responses[side])
                patched = patched_reward(rm, text, [("L1.mlp", [p], torch.zeros(1, rm.d_model))])
                assert abs(float(value[i, side, 0, n // 2]) - (whole - patched)) < 2e-5
            prefix = next(k for k, (a, b) in enumerate(zip(*(t.ids for t in both), strict=False)) if a != b)
            shared = {"final": 1, "response": prefix - both[0].response.start, "all": prefix}[at]
            assert value.n_positions[i].values.tolist() == [len(own[0]), len(own[1]), shared]
            margin = (value[i, 0] - value[i, 1])[0, :shared]
            assert np.array_equal(value[i, 2, 0, :shared], margin) and np.isnan(value[i, 2, 0, shared:]).all()
    with pytest.raises(rl.DataError, match=r"'prompt': none of 1 to 3 is among those of at="):
        rl.effects(rm, PAIRS, ["L1.mlp"], "zero", "response", spans={"prompt": (1, 3)})


def test_spans_of_pairs_that_name_them_in_another_order_meet_by_name():
    rm = model("llama")
    other = rl.Pair("Where?", EQUAL.chosen, EQUAL.rejected, id="other")
    start = [rm.tokenize(pair.prompt, pair.chosen).response.start for pair in (EQUAL, other)]
    head, tail_ = ((s + 4, s + 8) for s in start), ((s + 9, s + 14) for s in start)
    spans = [dict(zip(("head", "tail"), both, strict=True)) for both in zip(head, tail_, strict=True)]
    turned = [spans[0], {name: spans[1][name] for name in ("tail", "head")}]
    for options in ({}, {"mode": "zero"}, {"estimator": "gradient"}):
        expected = rl.effects(rm, [EQUAL, other], ["L0.attn", "L1.mlp"], at="all", spans=spans, **options)
        result = rl.effects(rm, [EQUAL, other], ["L0.attn", "L1.mlp"], at="all", spans=turned, **options)
        assert result.value["span"].values.tolist() == ["head", "tail"]
        np.testing.assert_allclose(result.value, expected.value, atol=1e-5)
        np.testing.assert_allclose(result.mean, expected.mean, atol=1e-5)
    spans[1].pop("head")
    fewer = rl.effects(rm, [EQUAL, other], ["L0.attn", "L1.mlp"], at="all", spans=spans)
    assert fewer.value["span"].values.tolist() == ["head", "tail"] and np.isnan(fewer.value[1, :, 0]).all()
    assert (fewer.value[1, :, 1] != 0).all()


def test_alignments():
    rm = model("llama")
    chosen, rejected = rm.tokenize_pairs([UNEQUAL])[0]
    assert len(chosen) != len(rejected)
    from reward_lens.engine.alignment import align

    diff = align(chosen, rejected, "all", "diff", "x")
    assert all(chosen.ids[b] == rejected.ids[s] for b, s in zip(diff.base, diff.source, strict=True))
    assert diff.base[-1] == chosen.reward_pos and diff.source[-1] == rejected.reward_pos
    assert list(
        zip(*[align(chosen, rejected, "all", "tail", "x").__dict__[k] for k in ("base", "source")], strict=True)
    ) == tail(chosen, rejected)
    longer, shorter = (chosen, rejected) if len(chosen) > len(rejected) else (rejected, chosen)
    legacy = align(longer, shorter, "all", "legacy_prefix", "x")
    assert legacy.base == legacy.source and longer.reward_pos not in legacy.base


def test_prompts_that_were_cut_differently_are_not_of_one_length():
    """Cut on the left long conversations are as long as the model reads: equal counts, other tokens in each place."""
    rm = rl.RewardModel(*tiny_model("llama", seed=1), truncation="left")
    rm.tokenizer.max_length = 40
    uneven = rl.Pair("A prompt that has to be cut. " * 3, "It is Paris.", "It is not, as you know.", id="cut")
    even = dataclasses.replace(uneven, rejected="It is Rybix.")
    assert [len(t) for t in rm.tokenize_pairs([uneven])[0]] == [40, 40]
    with pytest.raises(rl.AlignmentError, match=r"pair cut .*40 and 40 tokens, of which \d+ and \d+ are of the prompt"):
        rl.effects(rm, [uneven], ["L1.attn"], at="response")
    assert rl.effects(rm, [even], ["L1.attn"], at="response").value.item() != 0


def test_a_span_that_is_not_patched_is_undefined():
    """Tokens of the changed response that have no counterpart are no tokens without an effect; shared ones are."""
    rm = model("llama")
    chosen, rejected = rm.tokenize_pairs([UNEQUAL])[0]
    prefix = common_prefix(chosen, rejected)
    mode, base = ("noise", chosen) if len(chosen) > len(rejected) else ("denoise", rejected)
    early = {"shared": range(prefix), "early": range(prefix, prefix + abs(len(chosen) - len(rejected)))}
    for estimator in ("exact", "gradient"):
        for at, how in (("all", "tail"), ("final", None)):
            ways = {"mode": mode, "at": at, "align": how, "estimator": estimator}
            result = rl.effects(rm, [UNEQUAL], ["L0.attn"], spans=early | {"end": (len(base) - 1, len(base))}, **ways)
            shared, before, end = result.value[0, 0].values
            assert shared == 0 and np.isnan(before) and end != 0
            notes = {c.name: c.note for c in result.checks}
            assert "no position that the alignment patches" in notes["undefined cells"]


def test_a_response_that_goes_on_where_the_other_ends():
    """Without a template tail the shorter text is all common prefix; from the right the reward positions correspond."""
    bare = tiny_tokenizer(chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rm = rl.RewardModel(*tiny_model("llama", seed=1, tokenizer=bare))
    pair = rl.Pair("Tell me: ", "Yes, it is", "Yes, it is not", id="longer")
    chosen, rejected = rm.tokenize_pairs([pair])[0]
    assert common_prefix(chosen, rejected) == len(chosen)
    for mode in ("noise", "denoise"):
        final = rl.effects(rm, [pair], "residual", mode=mode).value
        tail = rl.effects(rm, [pair], "residual", mode=mode, at="all", align="tail")
        np.testing.assert_allclose(tail.value, final, atol=1e-5)
        np.testing.assert_allclose(tail.value[:, -1], tail.value["margin"], atol=1e-5)
        assert "last residual" in {c.name for c in tail.checks}


def test_the_published_artefact():
    """With absolute positions the longer response's last write has no effect at all, whatever the network."""
    rm = model("llama")
    chosen, rejected = rm.tokenize_pairs([UNEQUAL])[0]
    mode = "noise" if len(chosen) > len(rejected) else "denoise"
    last = [f"L{rm.n_layers - 1}.attn", f"L{rm.n_layers - 1}.mlp"]
    assert not rl.effects(rm, [UNEQUAL], last, mode=mode, at="all", align="legacy_prefix").value.any()
    assert rl.effects(rm, [UNEQUAL], last, mode=mode, at="all", align="tail").value.all()


def test_bad_input():
    rm = model("llama")
    with pytest.raises(rl.AlignmentError, match=r"unequal cannot be compared.*tokens.*align='tail'"):
        rl.effects(rm, PAIRS, at="all")
    with pytest.raises(rl.StructureError, match="L7.attn"):
        rl.effects(rm, PAIRS, ["L7.attn"])
    with pytest.raises(rl.StructureError, match="could not be understood"):
        rl.effects(rm, PAIRS, ["L0.attention"])
    with pytest.raises(rl.DataError, match="No sites"):
        rl.effects(rm, PAIRS, [])
    with pytest.raises(rl.DataError, match="named twice"):
        rl.effects(rm, PAIRS, ["L0.attn", "L0.attn"])
    with pytest.raises(rl.DataError, match="No sites"):
        rl.effects(rm, PAIRS, layers=[11])
    for layers in ([1, 11], [-1], [True]):
        with pytest.raises(rl.DataError, match="No sites of some layers.*layers among 0 to 2"):
            rl.effects(rm, PAIRS, layers=layers)
    for n in (1, 3):
        with pytest.raises(rl.DataError, match=f"not one mapping a pair.*{n} mappings, 2 pairs"):
            rl.effects(rm, PAIRS, at="all", align="tail", spans=[{"x": (1, 3)}] * n)
    for span in ((3, 3), (4, 2), (0, 999)):
        with pytest.raises(rl.DataError, match="spans of pair equal cannot be patched"):
            rl.effects(rm, [EQUAL], at="all", spans={"x": span})
    with pytest.raises(rl.DataError, match=r"reference set overlaps.*take those pairs out"):
        rl.effects(rm, MANY[:2], mode="mean", reference=MANY[1:4])
    for site in ("L1.Q0", "L1.K0", "L1.P1"):
        for mode in ("mean", "resample"):
            with pytest.raises(rl.DataError, match=rf"holds positions.*{mode}.*{site}.*'L1.V0'"):
                rl.effects(rm, MANY, [site], mode=mode)
    for source in (rl.constant(torch.ones(3)), rl.add(torch.ones(3, rm.d_model))):
        with pytest.raises(rl.DataError, match=r"does not fit L1.attn.*shape \(3.*shape \(32,\)"):
            rl.intervene(rm, [EQUAL], {"L1.attn": source})
    with pytest.raises(rl.DataError, match="no reference response"):
        rl.effects(rm, MANY[:1], mode="resample")
    with pytest.raises(rl.DataError, match="Too few draws"):
        rl.effects(rm, MANY, mode="resample", n_draws=5)
    with pytest.raises(rl.DataError, match="a mode it does not have"):
        _require_settings("swap", "exact", "total", "live", {})
    with pytest.raises(rl.DataError, match="only estimators have"):
        rl.effects(rm, MANY, steps=3)
    with pytest.raises(rl.DataError, match="direct path was asked.*align='legacy_prefix'.*reward positions correspond"):
        rl.effects(rm, [UNEQUAL], ["L0.attn"], at="all", align="legacy_prefix", path="direct")
    with pytest.raises(rl.DataError, match="Only a write has a direct effect"):
        rl.effects(rm, MANY, "residual", path="direct")


def test_a_source_of_nan_is_caught():
    rm = model("llama")
    module = copy.deepcopy(rm.module)
    broken = rl.RewardModel(module, rm.tokenizer.hf)
    block = module.get_submodule(broken.structure.blocks)[1]
    with torch.no_grad():
        block.get_submodule(broken.structure.mlp_out).weight.fill_(torch.nan)
    with pytest.raises(rl.CheckFailed, match="not finite"):
        rl.effects(broken, [EQUAL], ["L0.attn"], at="all")


def test_the_check_of_the_last_write_can_fail():
    rm = model("llama")
    last = [rl.Site("mlp", rm.n_layers - 1)]
    for mediated, passed in ((1e-6, True), (1e-4, False)):
        values = np.zeros((2, 1))
        values[0, 0] = mediated
        assert _last_write(rm, np.ones(2), last, values)[0].passed is passed
