"""Every identity of the exactness contract in all its forms, on architecture families in float32 and bfloat16."""

import copy
import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from every_method import METHODS
from families import FURTHER, STRUCTURES, TEXT_PAIRS, by_family, more, tiny_model
from reference.loops import plain_contributions, plain_lens

DTYPES = (torch.float32, torch.bfloat16)
PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
# Seed 0 of olmo2 draws a reward whose spread is no larger than bfloat16's rounding of it; one seed serves all.
SEED = 1
SEEDS = {"dots1": 2}  # with seed 1 its residuals' rounding is just over the tolerance
# Between attention's product and the output map stands something else: a difference of two products, a gate, a norm.
UNREAD = ("diffllama", "axk2", "afmoe", "bitnet")
ROUTED = ("mixtral", "qwen2_moe", "gpt_oss")
# `test_identities` has the identities on every class and kind of readout; here all their forms, on different ones.
DIFFERENT = (*STRUCTURES, "granite", "olmo2", "gpt_oss")
every = pytest.mark.parametrize("family", [*by_family(DIFFERENT), *more(*FURTHER)])
both = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@functools.cache
def model(family: str, dtype: torch.dtype) -> rl.RewardModel:
    module, tokenizer = tiny_model(family, dtype=dtype, seed=SEEDS.get(family, SEED))
    return rl.RewardModel(module, tokenizer, name=family)


def equal_length(rm: rl.RewardModel) -> list[rl.Pair]:
    return [p for p, (a, b) in zip(PAIRS, rm.tokenize_pairs(PAIRS), strict=True) if len(a) == len(b)]


def tolerance(rm: rl.RewardModel, fp32: float, bf16: float) -> float:
    return bf16 if rm.sixteen_bit else fp32


def refuses(rm: rl.RewardModel, by: str) -> str | None:
    """The words with which a model refuses a split: experts have no neurons, recurrent mixers no heads; by head, a
    mixer stays whole where other blocks attend."""
    part = {"neuron": "mlp_out", "head": "attn_out", "token": "attn_out"}.get(by)
    paths = () if part is None else rm.structure.paths(part)
    if paths == (None,) or (None in paths and by != "head"):
        return "cannot be split into (heads|neurons)"
    return "could not be read position by position" if by == "token" and rm.name in UNREAD else None


@every
@both
def test_e1_reward_is_the_models_own(family, dtype):
    rm = model(family, dtype)
    scores = rm.score_pairs(PAIRS).value
    spread = float(scores.sel(side=["chosen", "rejected"]).std())
    for pair, row in zip(PAIRS, scores, strict=True):
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            own = rm.hf_score(pair.prompt, response)
            scale = max(abs(own), spread)
            step = 2.0 ** (np.floor(np.log2(max(abs(own), 1e-6))) - 7)
            alone = rm.score(pair.prompt, response)
            assert abs(alone - own) <= tolerance(rm, 1e-5 * scale, max(2 * step, 2e-2 * scale))
            if not rm.sixteen_bit:
                assert abs(float(row.sel(side=side)) - alone) <= 1e-4 * scale


@every
@both
@pytest.mark.parametrize("by", ["component", "head", "neuron", "token"])
@pytest.mark.parametrize("scale", ["shared", "own"])
def test_e2_e3_e4_contributions_sum(family, dtype, by, scale):
    rm = model(family, dtype)
    refused = refuses(rm, by)
    if refused is not None:
        with pytest.raises(rl.StructureError, match=refused):
            rl.contributions(rm, PAIRS, by=by, scale=scale)
        return
    result = rl.contributions(rm, PAIRS, by=by, scale=scale)
    assert {"completeness", *({"finer split"} if by != "component" else {"margin split"})} <= {
        c.name for c in result.checks
    }
    rewards = rm.score_pairs(PAIRS).value
    value = result.value if by != "token" else result.value.sum("position")
    sides = ["chosen", "rejected"] if by == "token" else ["chosen", "rejected", "margin"]
    total = value.sel(side=sides).sum("component")
    size = np.abs(result.value.sel(side=sides)).sum([d for d in result.value.dims if d not in ("pair", "side")])
    gap = np.abs(total - rewards.sel(side=sides)) / size
    assert float(gap.max()) <= tolerance(rm, 1e-5, 1e-2)


@every
@both
@pytest.mark.parametrize("norm", ["own", "frozen"])
@pytest.mark.parametrize("at", ["final", "all"])
def test_e2_lens_ends_at_the_reward(family, dtype, norm, at):
    rm = model(family, dtype)
    lens = rl.reward_lens(rm, PAIRS, norm=norm, at=at).value
    rewards = rm.score_pairs(PAIRS).value.sel(side="chosen")
    last = lens.sel(side="chosen").isel(depth=-1)
    if at == "all":
        where = [a.reward_pos for a, _ in rm.tokenize_pairs(PAIRS)]
        last = last.values[np.arange(len(PAIRS)), where]
    spread = max(float(np.abs(rewards).max()), float(rewards.std()))
    assert float(np.abs(last - rewards).max()) <= tolerance(rm, 1e-5, 2e-2) * spread


@every
def test_lens_and_contributions_equal_the_slow_loops(family):
    rm = model(family, torch.float32)
    lens = rl.reward_lens(rm, PAIRS).value
    parts = rl.contributions(rm, PAIRS, scale="own").value
    for i, pair in enumerate(PAIRS[:3]):
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            slow = plain_lens(rm, pair.prompt, response)
            np.testing.assert_allclose(lens.sel(side=side)[i], slow, atol=2e-5 * max(1, np.abs(slow).max()))
            slow = plain_contributions(rm, pair.prompt, response)
            fast = parts.sel(side=side)[i]
            for component, value in slow.items():
                assert abs(float(fast.sel(component=component)) - value) <= 2e-5 * max(1, np.abs(fast).sum())


@every
@both
def test_e4_shared_split_from_its_formula(family, dtype):
    rm = model(family, dtype)
    acts = rl.capture(rm, PAIRS)
    shared = rl.contributions(rm, acts, scale="shared").value.sel(side="margin")
    h = acts["L2.resid_post"]
    u = rm.readout.direction(h).u
    for layer in range(rm.n_layers):
        for kind in ("attn", "mlp"):
            c = acts[f"L{layer}.{kind}"]
            expected = ((u[::2] + u[1::2]) / 2 * (c[::2] - c[1::2])).sum(1)
            np.testing.assert_allclose(shared.sel(component=f"L{layer}.{kind}"), expected, atol=1e-4)
    expected = ((u[::2] - u[1::2]) / 2 * (h[::2] + h[1::2])).sum(1)
    np.testing.assert_allclose(shared.sel(component="norm"), expected, atol=1e-4)


@every
@both
def test_e5_patching_what_is_equal_changes_nothing(family, dtype):
    rm = model(family, dtype)
    pairs = equal_length(rm)
    assert pairs
    sites = ["embed", "L1.resid_pre", "L1.attn", "L1.mlp", "L2.resid_post"]
    sites += [] if rm.structure.parallel else ["L1.resid_mid"]
    sites += ["L1.head", "L1.H2"] if rm.structure.path("attn_out", 1) else []
    sites += ["L1.neuron", "L1.N3"] if rm.structure.path("mlp_out", 1) else []
    prefix = min(rl_common_prefix(*both_tokens) for both_tokens in rm.tokenize_pairs(pairs))
    everywhere = rl.capture(rm, pairs, sites, at="all")
    final = rl.capture(rm, pairs, sites, at="final")
    for site in sites:
        for source, at in ((final, "final"), (everywhere, "all"), (everywhere.swapped(), range(0, prefix))):
            change = rl.intervene(rm, pairs, {site: rl.from_run(source)}, at=at).value.sel(state="change")
            assert float(np.abs(change).max()) == 0.0, (site, at)


@every
@both
@pytest.mark.parametrize("at", ["final", "response", "all"])
def test_e6_patching_everything_gives_the_other_reward(family, dtype, at):
    rm = model(family, dtype)
    pairs = equal_length(rm)
    sites = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    source = rl.from_run(rl.capture(rm, pairs, sites, at=at).swapped())
    value = rl.intervene(rm, pairs, dict.fromkeys(sites, source), at=at).value
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        patched = value.sel(side=side, state="intervened")
        target = value.sel(side=other, state="clean")
        moved = np.abs(target - value.sel(side=side, state="clean")).max()
        assert float(moved) > 1e-2  # the test could fail
        assert float(np.abs(patched - target).max()) <= tolerance(rm, 1e-5, 1e-2) * max(1, float(np.abs(target).max()))


@every
@both
def test_e9_scaling_the_head_and_swapping_the_pair(family, dtype):
    rm = model(family, dtype)
    module = copy.deepcopy(rm.module)
    with torch.no_grad():
        for parameter in module.get_submodule(rm.structure.head).parameters():
            parameter.mul_(2.0)  # exact in every format
    scaled = rl.RewardModel(module, rm.tokenizer.hf, name=family)
    swapped = [rl.Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS]
    for method in (rl.reward_lens, rl.contributions, functools.partial(rl.contributions, scale="own")):
        value = method(rm, PAIRS).value
        size = float(np.abs(value).max())
        np.testing.assert_allclose(method(scaled, PAIRS).value, 2 * value, atol=1e-6 * size)
        back = method(rm, swapped).value.sel(side="margin")
        np.testing.assert_allclose(back, -value.sel(side="margin"), atol=1e-6 * max(1, size))


@every
@both
def test_e10_nothing_is_left_behind_or_printed(family, dtype, capfd):
    rm = model(family, dtype)
    before = fingerprint(rm)
    capfd.readouterr()
    for by in ("component", "head", "token"):
        if refuses(rm, by) is None:
            rl.contributions(rm, PAIRS, by=by)
    for at in ("final", "all"):
        rl.reward_lens(rm, PAIRS, at=at)
    rl.intervene(rm, PAIRS, {"L1.attn": rl.zeros(), "L2.resid_pre": rl.add(torch.ones(rm.d_model))}, at="all")
    rl.gradient_lens(rm, PAIRS)
    assert capfd.readouterr() == ("", "")
    assert fingerprint(rm) == before


slow = by_family(("llama", "gpt2", "gemma2"))


@pytest.mark.parametrize("family", slow)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_house_rules(family, name, tmp_path, capfd):
    """Valid, deterministic, saved and loaded equal, and (E10) it leaves the model, torch and the terminal alone."""
    rm = model(family, torch.float32)
    if family in ROUTED and name in ("by neuron", "integrated"):
        # Experts have no neurons of their own, and a reward that routing makes jump has no integral of its gradient.
        refused = rl.StructureError if name == "by neuron" else rl.CheckFailed
        with pytest.raises(refused, match="cannot be split into neurons|do not add up"):
            METHODS[name](rm, PAIRS)
        return
    before = fingerprint(rm)
    capfd.readouterr()
    result = METHODS[name](rm, PAIRS)
    again = METHODS[name](rm, PAIRS)
    assert capfd.readouterr() == ("", "")
    assert fingerprint(rm) == before
    assert isinstance(result, rl.Result) and result.unit and result.meta["title"] and result.meta["shows"]
    assert result.value.identical(again.value)
    loaded = rl.load_result(result.save(tmp_path / "result.nc"))
    assert loaded.value.identical(result.value)
    assert loaded.checks == result.checks and loaded.meta == result.meta
    assert repr(loaded) == repr(result)
    assert len(result.top(3)) <= 3 and len(result.to_frame()) == result.value.size


@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize(
    "name", ["lens", "contributions", "by head", "by token", "truncate", "effects", "effects, heads, tail", "knock-out"]
)
def test_alone_equals_in_a_batch(family, name):
    rm = model(family, torch.float32)
    together = METHODS[name](rm, PAIRS).value
    for i, pair in enumerate(PAIRS):
        alone = METHODS[name](rm, [pair]).value[0]
        row = together[i]
        if "position" in alone.dims:
            row = row.isel(position=slice(0, alone.sizes["position"]))
        np.testing.assert_allclose(row, alone, atol=1e-4 * max(1.0, float(np.nanmax(np.abs(together)))))


def fingerprint(rm: rl.RewardModel) -> tuple:
    """What E10 forbids a method to change."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in rm.module.modules())
    weights = tuple(float(p.detach().double().sum()) for p in rm.module.parameters())
    grads = sum(p.grad is not None for p in rm.module.parameters())
    wants = sum(p.requires_grad for p in rm.module.parameters())
    config = rm.config.to_json_string(), rm.config._attn_implementation
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed()
    state = int(torch.get_rng_state().sum()), int(np.random.get_state()[1].sum())
    return hooks, weights, grads, wants, config, flags, state, rm.module.training


def rl_common_prefix(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), min(len(a), len(b)))
