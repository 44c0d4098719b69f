"""Routed experts: their weights as a site, what each adds, and what taking one away does, against plain PyTorch."""

import contextlib
import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS, more, tiny_model

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
LAYER, N = 1, 4
OTHERS = (
    "gpt_oss", "deepseek_v3", "jamba", "qwen3_moe", "phimoe", "granitemoe", "cohere2_moe", "ernie4_5_moe", "lfm2_moe",
)  # fmt: skip
routed = pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", *more(*OTHERS)])


@functools.cache
def model(family: str, dtype: torch.dtype = torch.float32) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1, dtype=dtype), name=family)


def layer_of(rm: rl.RewardModel) -> int:
    return next(layer for layer, experts in enumerate(rm.experts) if experts is not None and layer)


def experts_module(rm: rl.RewardModel, layer: int):
    """The fused experts of a block, by their names in Hugging Face's classes."""
    block = rm.module.get_submodule(rm.structure.blocks)[layer]
    return next(m for m in block.modules() if hasattr(m, "down_proj") and getattr(m.down_proj, "ndim", 0) == 3)


@contextlib.contextmanager
def without(rm: rl.RewardModel, layer: int, expert: int):
    """The model while one expert's output map is zero."""
    experts = experts_module(rm, layer)
    maps = [getattr(experts, name) for name in ("down_proj", "down_proj_bias") if hasattr(experts, name)]
    kept = [one[expert].detach().clone() for one in maps]
    with torch.no_grad():
        for one in maps:
            one[expert] = 0.0
        yield
        for one, values in zip(maps, kept, strict=True):
            one[expert] = values


@torch.no_grad()
def plain_run(rm: rl.RewardModel, tokens, layer: int, act) -> float:
    """The model's own reward with a plain hook on its experts; `act(module, args)` may return other arguments."""
    handle = experts_module(rm, layer).register_forward_pre_hook(act)
    try:
        return float(rm.module(input_ids=torch.tensor([tokens.ids])).logits[0, 0])
    finally:
        handle.remove()


def routing_of(rm: rl.RewardModel, tokens, layer: int) -> torch.Tensor:
    """[pos, expert] weights, written out choice by choice."""
    seen = []
    plain_run(rm, tokens, layer, lambda module, args: seen.append(args))
    _, which, weights = seen[0]
    out = torch.zeros(len(tokens), N)
    for position in range(len(tokens)):
        for expert, weight in zip(which[position].tolist(), weights[position].tolist(), strict=True):
            out[position, expert] = weight
    return out


@routed
def test_the_router_is_what_the_model_chose(family):
    rm = model(family)
    layer = layer_of(rm)
    acts = rl.capture(rm, PAIRS, [f"L{layer}.router", f"L{layer}.R2"], at="all")
    for tokens, all_weights, one in zip(acts.tokens, acts[f"L{layer}.router"], acts[f"L{layer}.R2"], strict=True):
        expected = routing_of(rm, tokens, layer)
        np.testing.assert_allclose(all_weights, expected, atol=1e-5)
        assert torch.equal(one, all_weights[:, 2])
        assert ((all_weights != 0).sum(1) == 2).all()
    final = rl.capture(rm, PAIRS, [f"L{layer}.router"])[f"L{layer}.router"]
    for tokens, row, everywhere in zip(acts.tokens, final, acts[f"L{layer}.router"], strict=True):
        np.testing.assert_allclose(row, everywhere[tokens.reward_pos], atol=1e-5)


@routed
def test_what_an_expert_adds_is_what_its_absence_takes_away(family):
    rm = model(family)
    layer = layer_of(rm)
    acts = rl.capture(rm, PAIRS[:2], [f"L{layer}.expert", f"L{layer}.mlp"])
    parts, write = acts[f"L{layer}.expert"] * rm.structure.write_scale, acts[f"L{layer}.mlp"]
    for expert in range(N):
        with without(rm, layer, expert):
            less = rl.capture(rm, PAIRS[:2], [f"L{layer}.mlp"])[f"L{layer}.mlp"]
        np.testing.assert_allclose(parts[:, expert], write - less, atol=2e-6)
    if family in ("mixtral", "gpt_oss"):  # without shared experts nothing is left
        np.testing.assert_allclose(parts.sum(1), write, atol=2e-6)


@routed
@pytest.mark.parametrize("scale", ["shared", "own"])
def test_contributions_by_expert(family, scale):
    rm = model(family)
    by_expert = rl.contributions(rm, PAIRS, by="expert", scale=scale)
    whole = rl.contributions(rm, PAIRS, scale=scale).value
    rewards = rm.score_pairs(PAIRS).value
    np.testing.assert_allclose(by_expert.value.sum("component"), rewards, atol=1e-4)
    assert {"completeness", "margin split", "finer split"} <= {c.name for c in by_expert.checks}
    kinds, layers = by_expert.value.kind.values, by_expert.value.layer.values
    for layer, experts in enumerate(rm.experts):
        if experts is None:
            continue
        mine = np.isin(kinds, ["expert", "mlp_rest"]) & (layers == layer)
        assert mine.sum() == N + 1 and by_expert.value.expert.values[mine].tolist() == [*range(N), -1]
        together = by_expert.value.isel(component=mine).sum("component")
        np.testing.assert_allclose(together, whole.sel(component=f"L{layer}.mlp"), atol=1e-4)
    layer = layer_of(rm)
    acts = rl.capture(rm, PAIRS, [f"L{layer}.expert", "L2.resid_post"])
    u = rm.readout.direction(acts["L2.resid_post"]).u
    own = (acts[f"L{layer}.expert"] * u[:, None]).sum(-1)[::2] * rm.structure.write_scale
    found = by_expert.value.sel(side="chosen", component=[f"L{layer}.E{i}" for i in range(N)])
    np.testing.assert_allclose(found, own, atol=1e-5)


@routed
def test_taking_an_expert_away_equals_a_model_without_it(family):
    rm = model(family)
    layer = layer_of(rm)
    sites = [f"L{layer}.R{expert}" for expert in range(N)]
    effects = rl.effects(rm, PAIRS[:2], sites, mode="zero", at="all").value
    assert effects.expert.values.tolist() == list(range(N))
    for expert, site in enumerate(sites):
        for i, pair in enumerate(PAIRS[:2]):
            with without(rm, layer, expert):
                less = rm.hf_score(pair.prompt, pair.chosen)
            change = rm.hf_score(pair.prompt, pair.chosen) - less
            assert float(effects.sel(side="chosen", component=site)[i]) == pytest.approx(change, abs=2e-5)
    assert float(np.abs(effects).max()) > 1e-2  # the test could fail
    assert rl.effects(rm, PAIRS[:1], "experts", mode="zero").value.sizes["component"] == N * sum(map(bool, rm.experts))


@routed
@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_patching_the_routing_equals_a_plain_hook(family, mode):
    """All of a block's weights at the reward position are the other run's; the experts read their own run's state."""
    rm = model(family)
    layer = layer_of(rm)
    effects = rl.effects(rm, PAIRS[:3], [f"L{layer}.router"], mode=mode).value
    for i, pair in enumerate(PAIRS[:3]):
        both = rm.tokenize(pair.prompt, pair.chosen), rm.tokenize(pair.prompt, pair.rejected)
        base, other = both if mode == "noise" else both[::-1]
        wanted = routing_of(rm, other, layer)[other.reward_pos]

        def put(module, args, wanted=wanted, at=base.reward_pos):
            x, which, weights = args
            own = torch.zeros(len(x), N).scatter(1, which, weights)
            own[at] = wanted
            return x, torch.arange(N).expand(len(x), N), own

        clean, patched = rm.score(pair.prompt, pair.chosen if mode == "noise" else pair.rejected), plain_run(
            rm, base, layer, put
        )  # fmt: skip
        expected = clean - patched if mode == "noise" else patched - clean
        assert float(effects[i, 0]) == pytest.approx(expected, abs=2e-5)


@routed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_runs_own_weights_change_nothing(family, dtype):
    rm = model(family, dtype)
    layer = layer_of(rm)
    sites = [f"L{layer}.router", f"L{layer}.R1"]
    for at in ("final", "all"):
        acts = rl.capture(rm, PAIRS[1:2], sites, at=at)
        for site in sites:
            change = rl.intervene(rm, PAIRS[1:2], {site: rl.from_run(acts)}, at=at).value.sel(state="change")
            assert float(np.abs(change).max()) == 0.0


def test_an_expert_that_was_not_chosen_can_be_given_weight():
    rm = model("mixtral")
    text = rm.tokenize(PAIRS[0].prompt, PAIRS[0].chosen)
    absent = int((routing_of(rm, text, LAYER)[text.reward_pos] == 0).nonzero()[0])
    more_weight = rl.intervene(rm, PAIRS[:1], {f"L{LAYER}.R{absent}": rl.constant(torch.tensor(0.5))})

    def put(module, args):
        x, which, weights = args
        own = torch.zeros(len(x), N).scatter(1, which, weights)
        own[text.reward_pos, absent] = 0.5
        return x, torch.arange(N).expand(len(x), N), own

    expected = plain_run(rm, text, LAYER, put)
    found = more_weight.value.sel(side="chosen", state="intervened")[0]
    assert float(found) == pytest.approx(expected, abs=2e-5)
    assert abs(expected - rm.score(PAIRS[0].prompt, PAIRS[0].chosen)) > 1e-3


def test_means_and_draws_of_a_router():
    rm = model("mixtral")
    weights = rl.capture(rm, PAIRS, [f"L{LAYER}.router"])[f"L{LAYER}.router"]
    expert = int(weights.std(0).argmax())
    site = f"L{LAYER}.R{expert}"
    mean = rl.effects(rm, PAIRS, [site], mode="mean").value.sel(side="chosen")
    resampled = rl.effects(rm, PAIRS[:2], [site, f"L{LAYER}.router"], mode="resample")
    assert np.isfinite(resampled.value).all() and float(np.abs(resampled.value).max()) > 1e-3
    one = rl.intervene(rm, PAIRS[:1], {site: rl.constant(weights[2:, expert].mean())})  # of the other prompts' runs
    assert float(mean[0, 0]) == pytest.approx(-float(one.value.sel(side="chosen", state="change")[0]), abs=2e-5)


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("llama", "L1.router", "no experts that can be told apart.*no experts in any block"),
        ("llama", "L1.expert", "no experts that can be told apart"),
        ("qwen2_moe", "L0.R1", "experts in blocks 1, 2"),
        ("mixtral", "L1.R4", "experts 0 to 3"),
        ("mixtral", "L9.R0", "layers 0 to 2"),
    ],
)
def test_sites_that_are_not_there(family, site, message):
    rm = model(family)
    with pytest.raises(rl.StructureError, match=message):
        rl.capture(rm, PAIRS[:1], [site])
    with pytest.raises(rl.StructureError, match=message):
        rl.effects(rm, PAIRS[:1], [site])


@pytest.mark.full
def test_experts_that_unfold_their_states_themselves():
    """DBRX hands its experts [batch, pos, d_model]."""
    rm = model("dbrx")
    value = rl.contributions(rm, PAIRS, by="expert").value
    assert all(rm.experts)
    np.testing.assert_allclose(value.sum("component"), rm.score_pairs(PAIRS).value, atol=1e-4)
    np.testing.assert_allclose(value.isel(component=value.kind.values == "mlp_rest"), 0.0, atol=1e-5)
    own = rl.from_run(rl.capture(rm, PAIRS[:1], ["L1.router"], at="all"))
    change = rl.intervene(rm, PAIRS[:1], {"L1.router": own}, at="all").value.sel(state="change")
    assert float(np.abs(change).max()) == 0.0


@pytest.mark.parametrize("family", more("jetmoe", "llama4_text"))
def test_experts_without_separate_parts_are_none(family):
    """JetMoE sorts its tokens by expert outside of them; Llama 4 weights what its experts read."""
    assert not any(model(family).experts)


def test_what_experts_do_not_have():
    rm = model("mixtral")
    with pytest.raises(rl.StructureError, match="L1.R0 for expert 0"):
        rl.intervene(rm, PAIRS[:1], {"L1.E0": rl.zeros()})
    with pytest.raises(rl.DataError, match="routers are not taken"):
        rl.effects(rm, PAIRS[:1], ["L1.R0"], estimator="gradient")
    with pytest.raises(rl.DataError, match="Only a write has a direct effect"):
        rl.effects(rm, PAIRS[:1], ["L1.R0"], path="direct")
    with pytest.raises(rl.StructureError, match="no experts in any block"):
        rl.contributions(model("llama"), PAIRS[:1], by="expert")
    assert str(rl.Site.parse("L3.R2")) == "L3.R2" and str(rl.Site("router", 3)) == "L3.router"


@pytest.mark.full
def test_a_norm_behind_the_experts():
    """FlexOlmo's write is the norm of the experts' sum; AFMoE's norm reads shared experts too, and is refused."""
    value = rl.contributions(model("flex_olmo"), PAIRS, by="expert").value
    np.testing.assert_allclose(value.sum("component"), model("flex_olmo").score_pairs(PAIRS).value, atol=1e-4)
    with pytest.raises(rl.StructureError, match="a norm follows"):
        rl.contributions(model("afmoe"), PAIRS, by="expert")


def test_a_precision_that_experts_do_not_run_in():
    with pytest.raises(rl.LoadError, match="does not run in the prec.*float64.*set_experts_implementation"):
        model("mixtral", torch.float64)
    module, tokenizer = tiny_model("mixtral", dtype=torch.float64)
    module.set_experts_implementation("eager")
    assert np.isfinite(rl.RewardModel(module, tokenizer).score("a", "b"))
