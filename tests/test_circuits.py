"""`ablation_curve` and `minimal_circuit` against `intervene`, one whole pass a set of sites."""

import functools
from itertools import combinations

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from planted import planted_model, planted_pairs

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
SITES = ["embed", *(f"L{layer}.{kind}" for layer in range(3) for kind in ("attn", "mlp"))]
some = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


@functools.cache
def planted() -> rl.RewardModel:
    return rl.RewardModel(*planted_model("length"), name="planted")


def margin_without(rm, pair, ablated, source) -> float:
    """The pair's margin with some sites ablated at the reward position, by hooks on a whole pass."""
    if not ablated:
        return float(rm.score_pairs([pair]).value.sel(side="margin")[0])
    return float(
        rl.intervene(rm, [pair], {s: source(s) for s in ablated}).value[0].sel(side="margin", state="intervened")
    )


def means_of(rm, pairs):
    """Mean ablation at the reward position: the mean of what the site holds in these pairs."""
    held = rl.capture(rm, pairs, SITES if rm.n_layers == 3 else ["embed", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp"])
    return lambda site: rl.mean_of(held) if site in {str(s) for s in held.tensors} else None


@some
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_every_point_is_an_intervention(family, mode):
    rm, ks = model(family), (0, 1, 3, 6, 7)
    result = rl.ablation_curve(rm, PAIRS[:3], ranking=SITES[::-1], mode=mode, ks=ks)
    assert result.value.dims == ("pair", "curve", "k") and result.value["k"].values.tolist() == list(ks)
    for i, pair in enumerate(PAIRS[:3]):
        others = [p for p in PAIRS[:3] if p is not pair]
        source = means_of(rm, others) if mode == "mean" else lambda site: rl.zeros()
        for j, k in enumerate(ks):
            kept, knocked = SITES[::-1][:k], SITES[::-1][k:]
            assert abs(float(result.value[i, 0, j]) - margin_without(rm, pair, knocked, source)) < 3e-5
            assert abs(float(result.value[i, 1, j]) - margin_without(rm, pair, kept, source)) < 3e-5


def test_ends_and_faithfulness():
    rm = model("gemma2")
    result = rl.ablation_curve(rm, PAIRS, at="response", ks=[2, 4])
    margins = rm.score_pairs(PAIRS).value.sel(side="margin")
    for curve, k in (("keep", 7), ("knock out", 0)):
        np.testing.assert_allclose(result.value.sel(curve=curve, k=k), margins, atol=5e-6)  # batched otherwise
    none = result.value.sel(curve="keep", k=0)
    np.testing.assert_allclose(none, result.value.sel(curve="knock out", k=7), atol=1e-6)
    mean = result.value.mean("pair")
    expected = (mean - none.mean()) / (mean.sel(curve="keep", k=7) - none.mean())
    np.testing.assert_allclose(result.value["faithfulness"], expected, atol=1e-5)
    assert {c.name for c in result.checks} >= {"clean margin", "fully ablated"}


def test_nothing_is_left_of_a_response_whose_reward_position_is_ablated():
    rm = model("llama")
    result = rl.ablation_curve(rm, PAIRS[:3], mode="zero", ks=[])
    assert np.abs(result.value.sel(curve="keep", k=0)).max() < 1e-5


def test_the_ranking_is_of_other_prompts():
    rm = model("llama")
    twins = [rl.Pair(p.prompt, p.rejected, p.chosen, id=f"{p.id} back") for p in PAIRS[:2]]
    pairs = [*PAIRS[:4], *twins]
    result = rl.ablation_curve(rm, pairs, ks=[1], seed=2)
    half = result.value["half"].values
    assert half[:2].tolist() == half[4:].tolist() and set(half.tolist()) == {0, 1}
    margin = rl.effects(rm, pairs, mode="mean").value.sel(side="margin").values
    for h in (0, 1):
        order = np.argsort(-np.abs(margin[half != h].mean(0)))
        assert result.meta["ranking"][str(h)] == [SITES[i] for i in order]
        given = rl.ablation_curve(rm, pairs, ranking=[SITES[i] for i in order], ks=[1])
        np.testing.assert_allclose(given.value[half == h], result.value[half == h], atol=1e-9)


def test_no_margin_no_faithfulness():
    rm = model("llama")
    same = [rl.Pair(p.prompt, p.chosen, p.chosen, id=p.id) for p in PAIRS[:2]]
    result = rl.ablation_curve(rm, same, ks=[1])
    assert np.isnan(result.value["faithfulness"]).all()
    assert any(c.name == "faithfulness undefined" and "noise floor" in c.note for c in result.checks)
    with pytest.raises(rl.DataError, match=r"no margin that these sites carry.*clearer margin"):
        rl.minimal_circuit(rm, same[0], mode="zero")


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_a_minimal_circuit_by_hand(mode, threshold):
    """The planted model has five components: every set is run by `intervene` and greedy search replayed on them."""
    rm = planted()
    pair, *others = [rl.Pair(*texts) for texts in planted_pairs("length", 4)]
    names = ["embed", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp"]
    source = means_of(rm, others) if mode == "mean" else lambda site: rl.zeros()
    share = {}
    for size in range(6):
        for kept in combinations(names, size):
            share[frozenset(kept)] = margin_without(rm, pair, [n for n in names if n not in kept], source)
    none, clean = share[frozenset()], share[frozenset(names)]
    share = {kept: (m - none) / (clean - none) for kept, m in share.items()}
    enough = threshold - rm.noise_floor / abs(clean - none)
    result = rl.minimal_circuit(rm, pair, threshold, mode=mode, reference=others if mode == "mean" else None)
    members = result.value["component"].values.tolist()
    for i, one in enumerate(members):
        assert abs(float(result.value[i]) - share[frozenset(members[: i + 1])]) < 1e-4
        without = share[frozenset(members) - {one}]
        assert abs(float(result.value["without"][i]) - without) < 1e-4 and without < enough
    assert share[frozenset(members)] >= threshold - 1e-4
    chosen: list[str] = []
    while not chosen or share[frozenset(chosen)] < enough:
        rest = [n for n in names if n not in chosen]
        reach = [n for n in rest if share[frozenset([*chosen, n])] >= enough]
        best = min(reach, key=lambda n: abs(share[frozenset([*chosen, n])] - 1)) if reach else None
        chosen.append(best or max(rest, key=lambda n: share[frozenset([*chosen, n])]))
    while any(share[frozenset(chosen) - {n}] >= enough for n in chosen):
        chosen.remove(max(chosen, key=lambda n: share[frozenset(chosen) - {n}]))
    assert members == chosen
    assert abs(result.meta["circuit_margin"] - (none + share[frozenset(members)] * (clean - none))) < 1e-3


def test_heads_repeatable_saved_and_without_traces(tmp_path):
    rm = model("llama")
    before = {k: v.clone() for k, v in rm.module.state_dict().items()}
    curve = rl.ablation_curve(rm, PAIRS[:2], "heads", at="response")
    assert curve.value.sizes["k"] > 9 and curve.value["k"].values[-1] == 12
    assert curve.value.identical(rl.ablation_curve(rm, PAIRS[:2], "heads", at="response").value)
    circuit = rl.minimal_circuit(rm, PAIRS[0], 0.8, "heads", reference=PAIRS[1:])
    for i, result in enumerate((curve, circuit)):
        back = rl.load_result(result.save(tmp_path / f"{i}.nc"))
        assert back.value.equals(result.value) and back.meta == result.meta
        assert rl.save_chart(result, tmp_path / f"{i}.svg").stat().st_size > 3000
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    assert all(torch.equal(before[k], v) for k, v in rm.module.state_dict().items())


def test_bad_input():
    rm = model("llama")
    with pytest.raises(rl.DataError, match=r"separate writes.*L0.resid_pre"):
        rl.ablation_curve(rm, PAIRS, "residual")
    with pytest.raises(rl.DataError, match=r"separate writes.*L1.H2.*own part"):
        rl.ablation_curve(rm, PAIRS, ["L1.attn", "L1.H2"])
    with pytest.raises(rl.DataError, match="ranking is not one of these sites"):
        rl.ablation_curve(rm, PAIRS, ranking=SITES[1:])
    with pytest.raises(rl.DataError, match=r"ks=\[1, 99\].*0 to 7"):
        rl.ablation_curve(rm, PAIRS, ks=[1, 99])
    with pytest.raises(rl.DataError, match="at least 2"):
        rl.ablation_curve(rm, PAIRS[:1], mode="zero")
    with pytest.raises(rl.DataError, match="no reference response"):
        rl.minimal_circuit(rm, PAIRS[0])
    with pytest.raises(rl.DataError, match=r"out of reference=\.$"):  # one pair has no others
        rl.minimal_circuit(rm, PAIRS[0], reference=PAIRS)
    with pytest.raises(rl.DataError, match="one pair, 0 < threshold"):
        rl.minimal_circuit(rm, PAIRS[0], threshold=1.5)
    with pytest.raises(rl.DataError, match="a larger threshold"):  # a share within the noise floor: of no site
        rl.minimal_circuit(rm, PAIRS[0], threshold=1e-7, mode="zero")
    with pytest.raises(rl.DataError, match="2 pairs"):
        rl.minimal_circuit(rm, PAIRS[:2])
    with pytest.raises(rl.StructureError, match="L7.attn"):
        rl.ablation_curve(rm, PAIRS, ["L7.attn"])
