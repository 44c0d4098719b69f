"""Estimators against finite differences, exact effects and each other; edges and screening on top of them (E8)."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import FAMILIES, STRUCTURES, TEXT_PAIRS, tiny_model
from reward_lens.engine.editing import Edit
from reward_lens.engine.gradients import gradients
from reward_lens.engine.intervention import values
from reward_lens.engine.patching import patch_rows

EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
UNEQUAL = rl.Pair("Is 7 a prime number?", "Yes, it is one.", "No, because it is 1", id="unequal")
MANY = [rl.Pair(*texts) for texts in TEXT_PAIRS]
SITES = ["embed", "L0.attn", "L1.mlp", "L1.H2", "L1.resid_pre", "L2.resid_post"]
every = pytest.mark.parametrize("family", FAMILIES)
# No identity: about six structures in `make test`, every family in `make test-full`.
some = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in STRUCTURES else pytest.mark.full) for f in FAMILIES]
)
ROUTED = ("mixtral", "qwen2_moe", "gpt_oss")  # routing makes the reward jump along a line
# Bloom's and gpt_oss' activations are functions, not modules.
FUNCTIONS = ("bloom", "gpt_oss")
ESTIMATORS = ("gradient", "integrated", "integrated_joint", "relevance")


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
    estimate = rl.effects(rm, [EQUAL, UNEQUAL], last, estimator="relevance").value[:, 0]
    direct = rl.effects(rm, [EQUAL, UNEQUAL], last, path="direct").value.sel(part="direct")[:, 0]
    np.testing.assert_allclose(estimate, direct, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_relevance_is_conserved(family):
    """Bias-free layers under the rules are homogeneous: each gate gives half to either factor, so what enters block 0
    carries the whole reward, minus what is held."""
    rm = model(family)
    tokens = rm.tokenize(EQUAL.prompt, EQUAL.chosen)
    from reward_lens.methods.relevance import RelevanceRules

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


@every
def test_edges_sum_to_the_gradient(family):
    rm = model(family)
    for options in ({}, {"mode": "denoise", "at": "all", "align": "tail"}, {"at": "all", "align": "diff", "steps": 3}):
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


def test_bad_input():
    rm = model("llama")
    with pytest.raises(rl.DataError, match="mode 'noise' or 'denoise'"):
        rl.effects(rm, MANY, mode="zero", estimator="gradient")
    with pytest.raises(rl.DataError, match="options path_length"):
        rl.effects(rm, MANY, estimator="gradient", path_length=3)
    with pytest.raises(rl.DataError, match="not estimated"):
        rl.effects(rm, MANY, ["L1.Q0"], estimator="gradient")
    with pytest.raises(rl.DataError, match="steps > 1 only"):
        rl.edge_effects(rm, MANY, steps=3)
    with pytest.raises(rl.AlignmentError):
        rl.effects(rm, [UNEQUAL], at="all", estimator="gradient")
