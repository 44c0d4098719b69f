"""Interventions in bfloat16: held against the slow loop in bfloat16 and the same weights in float32, E5 exactly 0.

Float16 runs the same code with finer steps and a smaller range; its rewards and methods are looked at too.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import STRUCTURES, TEXT_PAIRS, more, tiny_model
from planted import planted_pairs
from reference.sweeps import patched_reward, values_at
from reward_lens.model import checks

EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
UNEQUAL = rl.Pair("Is 7 a prime number?", "Yes, it is one.", "No, because it is 1", id="unequal")
PAIRS = [EQUAL, UNEQUAL]
MANY = [rl.Pair(*texts) for texts in TEXT_PAIRS]
NATURAL = [rl.Pair(*texts) for texts in {t[0]: t for t in planted_pairs("length", 40)}.values()][:16]
some = pytest.mark.parametrize("family", STRUCTURES)


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, dtype=torch.bfloat16, seed=1), name=family)


@functools.cache
def wide(family: str) -> rl.RewardModel:
    """The same weights, bfloat16 values in float32."""
    module, tokenizer = tiny_model(family, dtype=torch.float32, seed=1)
    module.load_state_dict(model(family).module.state_dict())
    return rl.RewardModel(module, tokenizer, name=family)


@some
@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_patching_equals_the_slow_loop_and_float32(family, mode):
    rm = model(family)
    sites = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp")), "L1.H1"]
    result = rl.effects(rm, [EQUAL], sites, mode=mode, at="all")
    tokens = [rm.tokenize(EQUAL.prompt, r) for r in (EQUAL.chosen, EQUAL.rejected)]
    base, source = tokens if mode == "noise" else tokens[::-1]
    where = [i for i, (a, b) in enumerate(zip(base.ids, source.ids, strict=True)) if a != b]
    where = list(range(where[0], base.reward_pos + 1))
    held, sign = values_at(rm, source, sites), -1 if mode == "noise" else 1
    clean = rm.score(EQUAL.prompt, EQUAL.chosen if mode == "noise" else EQUAL.rejected)
    slow = np.array([sign * (patched_reward(rm, base, [(s, where, held[s][where])]) - clean) for s in sites])
    exact = rl.effects(wide(family), [EQUAL], sites, mode=mode, at="all").value.values[0]
    size = rm.effect_scale(*(rm.score(EQUAL.prompt, r) for r in EQUAL.responses))
    own = np.abs(slow - exact).max()  # what rounding does to the loop itself
    assert np.abs(result.value.values[0] - slow).max() <= max(4e-2 * size, 2 * own)
    assert np.abs(result.value.values[0] - exact).max() <= max(4e-2 * size, 2 * own)


@some
def test_e5_what_both_runs_share_has_no_effect(family):
    rm = model(family)
    same = rl.Pair(EQUAL.prompt, EQUAL.chosen, EQUAL.chosen, id="same")
    for at in ("final", "all"):
        assert (rl.effects(rm, [same], at=at).value == 0).all()
    spans = {"prompt": range(2, 6)}
    assert (rl.effects(rm, [EQUAL], at="all", spans=spans).value == 0).all()


METHODS = {
    "estimates": lambda rm: rl.effects(rm, PAIRS, estimator="gradient", grad_drop=True),
    "estimates inside": lambda rm: rl.effects(rm, [EQUAL], ["L1.Q1", "L1.V0"], estimator="gradient", at="all"),
    "integrated": lambda rm: rl.effects(rm, PAIRS, ["L1.attn", "L1.H1"], estimator="integrated_block"),
    "direct": lambda rm: rl.effects(rm, PAIRS, path="direct"),
    "resample": lambda rm: rl.effects(rm, MANY, ["L1.mlp"], mode="resample"),
    "paths": lambda rm: rl.path_effects(rm, PAIRS, ["embed", "L0.mlp"], ["reward", "L1.attn"]),
    "edges": lambda rm: rl.edge_effects(rm, PAIRS),
    "knock-out": lambda rm: rl.attention_knockout(rm, PAIRS, "word"),
    "steer": lambda rm: rl.steer(rm, MANY, torch.ones(rm.d_model), (-1.0, 0.0, 1.0), 1),
    "circuit": lambda rm: rl.minimal_circuit(rm, EQUAL, 0.5, mode="zero"),
    "divergence": lambda rm: rl.divergence(rm, MANY, ["L1.attn"], NATURAL, n_neighbours=10, min_evaluation=10,
                                           n_permutations=49),
    "counterfactual": lambda rm: rl.counterfactual_patch(rm, PAIRS, ["L1.attn"], NATURAL, n_natural=5),
}  # fmt: skip


@some
@pytest.mark.parametrize("name", METHODS)
def test_every_intervention_runs_and_its_checks_hold(family, name):
    """A check over its tolerance raises; what is left is that values are there."""
    result = METHODS[name](model(family))
    assert np.isfinite(result.value.values).any()
    assert all(check.gap <= check.tolerance for check in result.checks)


@functools.cache
def half(family: str) -> tuple[rl.RewardModel, rl.RewardModel]:
    """A model in float16, and float16 values in float32."""
    module, tokenizer = tiny_model(family, dtype=torch.float16, seed=1)
    same, _ = tiny_model(family, dtype=torch.float32, seed=1)
    same.load_state_dict(module.state_dict())
    return tuple(rl.RewardModel(m, tokenizer, name=family) for m in (module, same))


@pytest.mark.parametrize("family", ["llama", *more(*(f for f in STRUCTURES if f != "llama"))])
def test_float16_is_close_to_float32_and_its_tail_is_in_float32(family):
    rm, same = half(family)
    assert rm.dtype == torch.float16 and rm.sixteen_bit and rm.like.dtype == torch.float32
    here, there = (m.score_pairs(MANY).value.values for m in (rm, same))
    size = rm.effect_scale(*np.abs(there[:, :2]).ravel())
    assert np.abs(here - there).max() <= 2e-2 * size
    for mode in ("noise", "denoise"):
        here, there = (rl.effects(m, [EQUAL], mode=mode, at="all").value.values for m in (rm, same))
        assert np.abs(here - there).max() <= 4e-2 * size
    parts = rl.contributions(rm, MANY).value.sel(side="margin").sum("component").values
    assert parts == pytest.approx(rm.score_pairs(MANY).value.sel(side="margin").values, abs=1e-4 * size)


@pytest.mark.parametrize(
    "name", [n if n in ("estimates", "direct") else pytest.param(n, marks=pytest.mark.full) for n in METHODS]
)
def test_interventions_in_float16_keep_their_checks(name):
    result = METHODS[name](half("llama")[0])
    assert np.isfinite(result.value.values).any()
    assert all(check.gap <= check.tolerance for check in result.checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_that_is_ignored_is_refused_however_coarse_the_format(dtype, monkeypatch):
    """The rounding of batches without padding is no excuse for padding that is read as text."""
    make_batch = checks.make_batch

    def unmasked(tokens, rows, pad_id, device, padding="right"):
        batch = make_batch(tokens, rows, pad_id, device, padding)
        return dataclasses.replace(batch, mask=torch.ones_like(batch.mask)) if padding == "left" else batch

    monkeypatch.setattr(checks, "make_batch", unmasked)
    with pytest.raises(rl.LoadError, match="failed the test 'padding'"):
        rl.RewardModel(*tiny_model("llama", dtype=dtype))
