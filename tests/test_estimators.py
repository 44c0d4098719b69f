"""Estimators against finite differences, exact effects and each other; edges and screening on top of them (E8)."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import STRUCTURES, TEXT_PAIRS, by_family, tiny_model
from reward_lens.engine.alignment import align
from reward_lens.engine.editing import Edit
from reward_lens.engine.gradients import gradients, gradients_without
from reward_lens.engine.intervention import pattern, values
from reward_lens.engine.patching import patch_rows
from reward_lens.engine.runs import run_pair
from reward_lens.methods.causation import first_order
from reward_lens.methods.causation.effect_cells import cells_of
from reward_lens.methods.causation.estimate_task import Task

EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
UNEQUAL = rl.Pair("Is 7 a prime number?", "Yes, it is one.", "No, because it is 1", id="unequal")
MANY = [rl.Pair(*texts) for texts in TEXT_PAIRS]
SITES = ["embed", "L0.attn", "L1.mlp", "L1.H2", "L1.resid_pre", "L2.resid_post"]
every = pytest.mark.parametrize("family", by_family())
# No identity: about six structures in `make test`, every family in `make test-full`.
some = pytest.mark.parametrize("family", by_family(STRUCTURES))
ROUTED = ("mixtral", "qwen2_moe", "gpt_oss")  # routing makes the reward jump along a line
# Bloom's and gpt_oss' activations are functions, not modules.
FUNCTIONS = ("bloom", "gpt_oss")
ESTIMATORS = ("gradient", "integrated", "integrated_block", "integrated_joint", "relevance")


@functools.cache
def model(family: str, dtype=torch.float32) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1, dtype=dtype), name=family)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "falcon", "granite", "olmo2"])
def test_e8_the_gradient_is_the_finite_difference(family):
    rm = model(family, torch.float64)
    sites = [*SITES, "L1.N3", *([] if rm.structure.parallel else ["L1.resid_mid"])]
    parsed = [rl.Site.parse(s) for s in sites]
    tokens = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    start = len(tokens) - 8
    found = gradients(rm, tokens, parsed, 0)
    for site in parsed:
        where = range(start, tokens.reward_pos + 1)
        held = rl.capture(rm, [tokens], [site], at=where)[site][0]
        slopes = found.slopes[rl.Site(site.kind, site.layer)][list(where)]
        if site.index is not None:
            slopes = slopes[:, site.index, None] if site.kind == "neuron" else slopes[:, site.index]
        move = (slopes / slopes.norm()).reshape(held.shape)  # the steepest way
        step = 3e-3  # Llama's norm computes in float32 inside
        rows = [(Edit(site, where, values(held + sign * step * move)),) for sign in (1, -1)]
        up, down = patch_rows(rm, tokens, rows, reuse=False).rewards.tolist()
        slope = (up - down) / (2 * step)
        assert abs(found.along(site, where, move) - slope) <= 1e-3 * max(1e-3, abs(slope)), str(site)


@every
def test_e8_integrated_converges_to_the_exact_effect(family):
    if family in ROUTED:
        return
    rm = model(family)
    many = 640 if family == "opt" else 96  # kinks of a ReLU slow the quadrature down
    for at, steps in (("final", max(16, many // 4)), ("all", many)):
        sites = ["L0.mlp", "L1.attn", "L1.H2", "L2.resid_pre"]
        exact = rl.effects(rm, [EQUAL], sites, at=at).value.values
        gaps = []
        for n in (2, steps):
            estimate = rl.effects(rm, [EQUAL], sites, at=at, estimator="integrated", steps=n).value.values
            gaps.append(np.abs(estimate - exact).max() / max(1e-2, np.abs(exact).max()))
        assert gaps[1] <= 1e-3 and gaps[1] <= gaps[0] + 1e-5


@some
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_look_like_exact_effects(family, estimator):
    rm = model(family)
    if estimator == "relevance" and family in FUNCTIONS:
        with pytest.raises(rl.StructureError, match="without an activation module"):
            rl.effects(rm, [EQUAL], estimator=estimator)
        return
    for options in ({"at": "all", "align": "tail", "spans": "position"}, {"mode": "denoise"}):
        exact = rl.effects(rm, [EQUAL, UNEQUAL], SITES, **options)
        estimate = rl.effects(rm, [EQUAL, UNEQUAL], SITES, estimator=estimator, **options)
        assert estimate.value.dims == exact.value.dims and estimate.unit == "reward"
        assert set(estimate.value.coords) == set(exact.value.coords)
        assert estimate.value.identical(rl.effects(rm, [EQUAL, UNEQUAL], SITES, estimator=estimator, **options).value)
        assert estimate.meta["calibration"] == "uncalibrated" and "uncalibrated" in estimate.meta["title"]
    for module in rm.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in rm.module.parameters())


@every
def test_after_the_last_write_only_the_norm_bends_the_line(family):
    rm = model(family)
    last = [f"L{rm.n_layers - 1}.mlp"]
    exact = rl.effects(rm, [EQUAL], last).value.item()
    estimate = rl.effects(rm, [EQUAL], last, estimator="integrated", steps=32).value.item()
    assert abs(estimate - exact) <= 1e-4 * max(abs(exact), 0.1)


def test_relevance_is_the_gradient_where_its_rules_change_nothing():
    """At the last write no norm of a block, attention or activation stands between: what is left is the final norm,
    whose scale relevance holds, so the estimate is the frozen direct effect."""
    rm = model("llama")
    last = [f"L{rm.n_layers - 1}.mlp"]
    result = rl.effects(rm, [EQUAL, UNEQUAL], last, estimator="relevance")
    assert "the final one too" in result.meta["settings"]["held"]
    estimate = result.value[:, 0]
    direct = rl.effects(rm, [EQUAL, UNEQUAL], last, path="direct").value.sel(part="direct")[:, 0]
    np.testing.assert_allclose(estimate, direct, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "olmo", "bitnet", "deepseek_v2"])
def test_relevance_is_conserved(family):
    """Bias-free layers under the rules are homogeneous: each gate gives half to either factor, so what enters block 0
    carries the whole reward, minus what is held. (OLMo's norms have no weight; BitNet and latent attention have some
    of other widths.)"""
    rm = model(family)
    tokens = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    from reward_lens.methods.causation.relevance import RelevanceRules

    found = gradients(rm, tokens, [rl.Site("embed"), rl.Site("resid_pre", 1), rl.Site("resid_pre", 2)],
                      rules=RelevanceRules(rm))  # fmt: skip
    content = [float((found.slopes[s].double() * found.values[s].double()).sum()) for s in found.slopes]
    constant = float(rm.readout.direction(torch.ones(1, rm.d_model)).constant[0])
    np.testing.assert_allclose(content, found.reward - constant, atol=1e-3 * max(1, abs(found.reward)))


def test_calibration():
    rm = model("llama")
    result = rl.effects(rm, MANY * 2, "heads", at="all", align="tail", estimator="integrated", calibrate=100)
    found = result.meta["calibration"]
    assert found["cells"] >= 100 and found["spearman"] > 0.9 and found["pearson"] > 0.9
    assert "Spearman" in result.meta["title"]
    with pytest.raises(rl.DataError, match="at least 100"):
        rl.effects(rm, MANY, estimator="gradient", calibrate=10)
    with pytest.raises(rl.DataError, match="too few cells"):
        rl.effects(rm, MANY, ["L1.attn"], estimator="gradient", calibrate=100)


def test_the_ten_largest_of_ten_cells_are_no_recall():
    few = rl.effects(model("llama"), MANY * 20, estimator="gradient", calibrate=100).meta["calibration"]
    assert few["top_10_recall"] is None and "no pair has more than 10 cells" in few["no_recall"]
    more = rl.effects(model("llama"), MANY * 5, "heads", estimator="gradient", calibrate=100).meta["calibration"]
    assert 0 < more["top_10_recall"] <= 1 and "no_recall" not in more


@every
def test_edges_sum_to_the_gradient(family):
    rm = model(family)
    for options in ({}, {"mode": "denoise", "at": "all", "align": "tail"}, {"at": "all", "align": "tail", "steps": 3}):
        result = rl.edge_effects(rm, [EQUAL, UNEQUAL], **options)
        assert result.checks[0].gap <= 1e-5
        if "steps" not in options:
            by_sender = result.value.groupby("sender").sum()
            gradient = rl.effects(rm, [EQUAL, UNEQUAL], estimator="gradient", **options).value
            size = max(1, float(np.abs(result.value).sum()))
            for name in gradient["component"].values:
                np.testing.assert_allclose(by_sender.sel(sender=name), gradient.sel(component=name), atol=1e-4 * size)


def test_edges_are_what_small_changes_along_paths_do():
    """Two texts whose embeddings differ by a thousandth: patching a path does what the edge says, to first order."""
    rm = model("gpt2", torch.float64)
    module = rm.module
    tokens = [rm.tokenize(EQUAL.prompt, r) for r in (EQUAL.chosen, EQUAL.rejected)]
    weight = module.get_input_embeddings().weight
    with torch.no_grad():
        for a, b in zip(*(t.ids for t in tokens), strict=True):
            if a != b:
                weight[b] = weight[a] + 1e-4 * weight[b]
    edges = rl.edge_effects(rm, [EQUAL], at="all").value[0]
    paths = rl.path_effects(rm, [EQUAL], "components", ["L1.attn", "L1.mlp", "L2.mlp", "reward"], at="all").value[0]
    size = float(np.abs(paths).max())
    for sender in paths["sender"].values:
        for receiver in paths["receiver"].values:
            path = float(paths.sel(sender=sender, receiver=receiver))
            if np.isfinite(path):
                assert abs(float(edges.sel(edge=f"{sender} -> {receiver}")) - path) <= 2e-2 * size, (sender, receiver)
    model.cache_clear()


def test_screening():
    rm = model("llama")
    result = rl.screen_then_verify(rm, MANY, top=4, calibration_pairs=3)
    exact = rl.effects(rm, MANY, "heads").value
    shown = result.value.sel(kind="exact")
    verified = np.isfinite(shown).all("pair").values
    assert verified.sum() == 4 and 0 <= result.meta["recall"] <= 1
    np.testing.assert_allclose(shown[:, verified], exact[:, verified], atol=1e-5)
    estimate = np.abs(result.value.sel(kind="estimate")).mean("pair").values
    assert estimate[verified].min() >= estimate[~verified].max()
    with pytest.raises(rl.DataError, match="top from 1 to 12"):
        rl.screen_then_verify(rm, MANY, top=40)
    for options in ({"norm": "frozen"}, {"layers": [0]}, {"spans": "position"}):  # would change the estimate alone
        with pytest.raises(rl.DataError, match=f"do not have. Found: {next(iter(options))}"):
            rl.screen_then_verify(rm, MANY, top=3, **options)


def test_bad_input():
    rm = model("llama")
    with pytest.raises(rl.DataError, match="mode 'noise' or 'denoise'"):
        rl.effects(rm, MANY, mode="zero", estimator="gradient")
    with pytest.raises(rl.DataError, match="options path_length"):
        rl.effects(rm, MANY, estimator="gradient", path_length=3)
    for options in (
        {"steps": 3},
        {"estimator": "relevance", "steps": 3},
        {"estimator": "integrated", "grad_drop": True},
    ):
        with pytest.raises(rl.DataError, match="something it does not have"):
            rl.effects(rm, MANY, **{"estimator": "gradient"} | options)
    for steps in (0, -1, True):
        with pytest.raises(rl.DataError, match="a whole number, at least 1"):
            rl.effects(rm, MANY, estimator="integrated", steps=steps)
    for options in ({"steps": 3}, {"steps": 3, "at": "all", "align": "diff"}):
        with pytest.raises(rl.DataError, match="steps > 1 only"):
            rl.edge_effects(rm, MANY, **options)
    with pytest.raises(rl.AlignmentError):
        rl.effects(rm, [UNEQUAL], at="all", estimator="gradient")
    for site in ("L1.Q0", "L0.K0", "L1.P1"):
        for estimator in ESTIMATORS:
            with pytest.raises(rl.AlignmentError, match="another position"):
                rl.effects(rm, [UNEQUAL], [site], at="all", align="tail", estimator=estimator)
    with pytest.raises(rl.AlignmentError, match="no way to go"):
        rl.effects(rm, [UNEQUAL], at="all", align="diff", estimator="integrated_joint")
    with pytest.raises(rl.AlignmentError, match="no way to go"):
        rl.edge_effects(rm, [rl.Pair("Say it", "ggggk", "gk", id="ends alike")], steps=5, at="response", align="tail")
    with pytest.raises(rl.DataError, match="resid_mid"):
        rl.effects(rm, [EQUAL], ["L1.resid_mid"], estimator="gradient", grad_drop=True)
    with pytest.raises(rl.DataError, match="no estimator"):
        rl.screen_then_verify(rm, MANY, estimator="exact")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_clean_row_is_measured(estimator, monkeypatch):
    """A run whose reward is not that of the pass the gradients come from is found."""
    from reward_lens.methods.causation import estimators

    rm = model("llama")
    kept = rl.effects(rm, [EQUAL], SITES, estimator=estimator).checks[0]
    assert kept.name == "clean row" and kept.gap <= 1e-5
    own = estimators.run_pair

    def shifted(*args, **options):
        return tuple(dataclasses.replace(run, reward=run.reward + 0.1) for run in own(*args, **options))

    monkeypatch.setattr(estimators, "run_pair", shifted)
    with pytest.raises(rl.CheckFailed, match="clean row"):
        rl.effects(rm, [EQUAL], SITES, estimator=estimator)


@some
def test_frozen_norm_makes_the_last_write_linear(family):
    rm = model(family)
    last = [f"L{rm.n_layers - 1}.mlp"]
    exact = rl.effects(rm, [EQUAL, UNEQUAL], last, norm="frozen").value.values
    for options in (
        {"estimator": "gradient"},
        {"estimator": "integrated", "steps": 1},
        {"estimator": "integrated_block"},
    ):
        estimate = rl.effects(rm, [EQUAL, UNEQUAL], last, norm="frozen", **options).value.values
        np.testing.assert_allclose(estimate, exact, atol=1e-5)
        live = rl.effects(rm, [EQUAL, UNEQUAL], last, **options).value.values
        assert np.abs(live - estimate).max() > 0 or options["estimator"] == "gradient"


INSIDE = ["L1.Q1", "L1.K0", "L2.V0", "L1.P1"]


@every
def test_a_change_inside_attention_is_a_change_of_the_heads(family):
    """Putting the moved heads' outputs in place does to the reward what the change inside the attention does."""
    rm = model(family)
    tokens = [rm.tokenize(EQUAL.prompt, r) for r in (EQUAL.chosen, EQUAL.rejected)]
    for at in ("final", "all"):
        sites = [rl.Site.parse(s) for s in INSIDE]
        heads = [rl.Site("head", s.layer) for s in sites]
        base, source = run_pair(rm, *tokens, [*sites, *heads], only_final=False)
        where = align(base.tokens, source.tokens, at, None, "equal")
        task = Task(
            rm, "equal", sites, cells_of(base.tokens, where, None, 0, "equal"), where, base, source, "live", 1, None
        )
        for s, site in enumerate(sites):
            move = first_order._moves(task)[s, 0]
            assert move.site == heads[s] and move.by.abs().max() > 0
            given = values(source.at(site, where.source)) if site.kind != "pattern" else pattern(
                source.at(site, where.source))  # fmt: skip
            put = values(base.at(move.site, move.where.base) + move.by)
            rows = [(Edit(site, where.base, given),), (Edit(move.site, move.where.base, put),)]
            inside, outside = patch_rows(rm, base.tokens, rows).change.tolist()
            assert abs(inside - outside) <= 1e-5 * max(1, abs(base.reward)), (at, str(site))


@some
def test_estimates_inside_attention(family):
    """Without the saturation of the softmax, only what follows the heads is left to the first order."""
    rm = model(family)
    exact = rl.effects(rm, [EQUAL], INSIDE, at="all").value.values
    linear = rl.effects(rm, [EQUAL], INSIDE, at="all", estimator="gradient").value.values
    assert np.isfinite(linear).all()
    if family not in ROUTED:
        many = 640 if family == "opt" else 64
        close = rl.effects(rm, [EQUAL], INSIDE, at="all", estimator="integrated", steps=many).value.values
        np.testing.assert_allclose(close, exact, atol=1e-3 * max(1e-2, np.abs(exact).max()))


@some
def test_block_estimates_of_heads_sum_to_the_writes_effect(family):
    rm = model(family)
    layer = rm.n_layers - 1
    heads = [f"L{layer}.H{h}" for h in range(rm.n_heads)]
    sites = [f"L{layer}.attn", *heads, f"L{layer}.mlp", f"L{layer}.resid_pre"]
    for options in ({}, {"at": "all", "align": "tail", "mode": "denoise"}):
        exact = rl.effects(rm, [EQUAL, UNEQUAL], sites, **options).value.values
        rough = rl.effects(rm, [EQUAL, UNEQUAL], sites, estimator="integrated_block", **options).value.values
        np.testing.assert_allclose(rough[:, 1 : 1 + rm.n_heads].sum(1), rough[:, 0], atol=1e-6)
        if family not in ROUTED:
            many = 640 if family == "opt" else 64
            found = rl.effects(
                rm, [EQUAL, UNEQUAL], sites, estimator="integrated_block", steps=many, **options
            ).value.values
            size = 1e-3 * max(1e-2, np.abs(exact).max())
            np.testing.assert_allclose(found[:, [0, -2, -1]], exact[:, [0, -2, -1]], atol=size)
            np.testing.assert_allclose(found[:, 1 : 1 + rm.n_heads].sum(1), exact[:, 0], atol=size)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_block_estimates_of_neurons_sum_to_the_writes_effect(family):
    rm = model(family)
    width = rl.capture(rm, [EQUAL], ["L1.neuron"])["L1.neuron"].shape[-1]
    sites = ["L1.mlp", *(f"L1.N{n}" for n in range(width))]
    for at in ("final", "all"):
        exact = rl.effects(rm, [EQUAL], ["L1.mlp"], at=at).value.values
        found = rl.effects(rm, [EQUAL], sites, at=at, estimator="integrated_block", steps=64).value.values
        np.testing.assert_allclose(found[:, 1:].sum(1), found[:, 0], atol=1e-6)
        np.testing.assert_allclose(found[:, :1], exact, atol=1e-3 * max(1e-2, np.abs(exact).max()))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "falcon", "granite", "olmo2"])
def test_grad_drop_is_the_slope_with_a_block_held(family):
    """Small moves while the writes of one block are held at their clean values: no slope goes through them."""
    rm = model(family, torch.float64)
    tokens = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    where = range(len(tokens) - 6, tokens.reward_pos + 1)
    sites = [rl.Site.parse(s) for s in ("embed", "L0.mlp", "L0.H1")]
    found = list(gradients_without(rm, tokens, sites))
    assert len(found) == rm.n_layers
    writes = [rl.Site(kind, layer) for layer in range(rm.n_layers) for kind in ("attn", "mlp")]
    clean = rl.capture(rm, [tokens], [*sites, *writes], at=where)
    for layer, one in enumerate(found):
        for site in sites:
            slopes = one.slopes[rl.Site(site.kind, site.layer)][list(where)]
            slopes = slopes if site.index is None else slopes[:, site.index]
            if site.layer == layer:
                assert slopes.abs().max() == 0
                continue
            held = clean[site][0]
            move = (slopes / slopes.norm()).reshape(held.shape)
            hold = tuple(Edit(w, where, values(clean[w][0])) for w in writes if w.layer == layer)
            rows = [(Edit(site, where, values(held + sign * 3e-3 * move)), *hold) for sign in (1, -1)]
            up, down = patch_rows(rm, tokens, rows, reuse=False).rewards.tolist()
            slope = (up - down) / 6e-3
            assert abs(one.along(site, where, move) - slope) <= 1e-3 * max(1e-3, abs(slope)), (str(site), layer)


def test_grad_drop_in_the_result():
    rm = model("llama")
    plain = rl.effects(rm, MANY, SITES, estimator="gradient")
    result = rl.effects(rm, MANY, SITES, estimator="gradient", grad_drop=True)
    assert result.value.drop_vars("grad_drop").identical(plain.value) and "grad_drop" not in plain.value.coords
    drop = result.value["grad_drop"]
    assert drop.dims == result.value.dims and bool((drop >= 0).all()) and float(drop.max()) > 0
    patched = align(*rm.tokenize_pairs([UNEQUAL])[0], "response", "diff", "unequal").base
    between = next(p for p in range(patched[0], patched[-1]) if p not in patched)
    spans = {"unpatched": range(between, between + 1), "patched": range(patched[0], between)}
    for one in (rm, rl.RewardModel(*tiny_model("llama", seed=1, n_layers=1), name="one block")):
        some = rl.effects(one, [UNEQUAL], SITES[:2], at="response", align="diff", spans=spans, estimator="gradient",
                          grad_drop=True).value  # fmt: skip
        assert np.isnan(some[:, :, 0]).all() and np.isnan(some.grad_drop[:, :, 0]).all()
        assert np.isfinite(some.grad_drop[:, :, 1]).all()
    screened = rl.screen_then_verify(rm, MANY, "components", top=2, calibration_pairs=1, grad_drop=True)
    assert np.isfinite(screened.value.sel(kind="exact")).all("pair").sum() == 2
