"""Tuned and gradient lens: against the obvious loops, finite differences, and a model whose rule is known."""

import inspect

import numpy as np
import pytest
import torch
import xarray as xr

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from planted import planted_model, planted_pairs
from reward_lens.engine.activations import capture
from reward_lens.errors import DataError
from reward_lens.methods.observation.lens import reward_lens
from reward_lens.methods.observation.trained_lens import gradient_lens, tuned_lens
from reward_lens.model.forward import make_batch, record, replay

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
ALPHAS = (0.1, 10.0, 1000.0)


def split_pairs():
    """Thirty training pairs and eight others, no two of one prompt."""
    pairs = {}
    for texts in planted_pairs("length", 120):
        pairs.setdefault(texts[0], rl.Pair(*texts))
    pairs = list(pairs.values())
    assert len(pairs) >= 38
    return pairs[:30], pairs[30:38]


@pytest.fixture(scope="module")
def planted():
    return rl.RewardModel(*planted_model("length"))


@pytest.fixture(scope="module")
def tuned(planted):
    return tuned_lens(planted, *split_pairs(), alphas=ALPHAS)


# tuned lens


def test_tuned_lens_is_the_obvious_loop(planted, tuned):
    """One grid search a depth, by scikit-learn's own cross-validation."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = split_pairs()
    known, unknown = capture(planted, train), capture(planted, test)
    target, reward = (planted.readout.reward(a["L1.resid_post"]).double().numpy() for a in (known, unknown))
    groups = np.repeat(np.arange(30), 2)
    for depth, site in enumerate(("embed", "L0.resid_post", "L1.resid_post")):
        search = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": ALPHAS},
            cv=GroupKFold(5),
            scoring="neg_mean_squared_error",
        )
        search.fit(known[site].double().numpy(), target, groups=groups)
        predicted = search.predict(unknown[site].double().numpy())
        at = tuned.value.sel(depth=depth)
        assert np.allclose(at.sel(side="chosen"), predicted[::2], atol=1e-6)
        assert np.allclose(at.sel(side="margin"), predicted[::2] - predicted[1::2], atol=1e-6)
        r2 = 1 - np.sum((predicted - reward) ** 2) / np.sum((reward - reward.mean()) ** 2)
        assert float(at["r2"]) == pytest.approx(r2, abs=1e-6)
        if depth:  # the embedding at the reward position is one token's: every penalty predicts the mean
            assert float(at["alpha"]) == search.best_params_["ridge__alpha"]


def test_tuned_lens_finds_the_planted_rule(tuned):
    """Length stands in the last residual, not in the last token's embedding, and never in the control."""
    r2, control = tuned.value["r2"].values, tuned.value["r2_control"].values
    assert r2[-1] > 0.9 and r2[0] < 0.05 and (control < 0.3).all()
    assert tuned.value["sign_agreement"].values[-1] == 1
    assert tuned.value["sign_agreement"].values[0] == 0.5  # equal predictions agree by half
    assert tuned.meta["claim"] == "decodable" and tuned.meta["settings"]["train_pairs"] == 30


def test_tuned_lens_scales_with_the_head(planted, tuned):
    """E9: a head twice as large gives predictions twice as large, and the same R^2."""
    import copy

    module = copy.deepcopy(planted.module)
    module.score.weight.data *= 2
    twice = tuned_lens(rl.RewardModel(module, planted.tokenizer.hf), *split_pairs(), alphas=ALPHAS)
    assert np.allclose(twice.value, 2 * tuned.value, rtol=1e-4, atol=1e-5)
    assert np.allclose(twice.value["r2"], tuned.value["r2"], atol=1e-4)


def test_tuned_lens_from_activations(planted, tuned):
    train, test = split_pairs()
    result = tuned_lens(planted, capture(planted, train), capture(planted, test), alphas=ALPHAS)
    assert np.allclose(result.value, tuned.value, atol=1e-6)


def test_tuned_lens_refuses(planted):
    train, test = split_pairs()
    with pytest.raises(DataError, match="2 prompts in both"):
        tuned_lens(planted, train, [*test, train[0], rl.Pair(train[1].prompt, "the", "cat")])
    with pytest.raises(DataError, match=r"48 training responses.*at least 50.*pass 1 more pairs"):
        tuned_lens(planted, train[:24], test)
    with pytest.raises(DataError, match="one prompt"):
        tuned_lens(planted, [rl.Pair("the same", p.chosen, p.rejected) for p in train], test)
    for alphas in ((), (1.0, -1.0), (float("nan"),)):  # a ridge with a negative penalty fits, to nothing
        with pytest.raises(DataError, match="no penalties to choose from"):
            tuned_lens(planted, train, test, alphas=alphas)


# gradient lens


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "falcon", "gpt_neox"])
def test_gradient_lens_is_the_finite_difference(family):
    """float64: the residual of each depth stretched by 1 + e and 1 - e, the effective direction held fixed.

    RMSNorms compute in float32 whatever the model's precision, so the step cannot be smaller.
    """
    rm = rl.RewardModel(*tiny_model(family, dtype=torch.float64))
    tokens = [t for both in rm.tokenize_pairs(rl.Pairs(PAIRS[:2])) for t in both]
    results = {at: gradient_lens(rm, PAIRS[:2], at) for at in ("final", "all")}
    for i, text in enumerate(tokens):
        batch = make_batch([text], [0], rm.pad_id, rm.device)
        with torch.no_grad():
            recording = record(rm.trunk, batch)
            u, constant, _ = rm.readout.direction(recording.last[:, text.reward_pos])
            for at in ("final", "all"):
                for depth in range(rm.n_layers + 1):
                    where = torch.ones(len(text)) if at == "all" else torch.zeros(len(text))
                    where[text.reward_pos] = 1
                    step, ends = 3e-3, []
                    for sign in (1, -1):
                        moved = recording.resid(depth) * (1 + sign * step * where.double()[:, None])
                        last = replay(rm.trunk, recording, depth, moved)
                        ends.append(float((u * last[:, text.reward_pos]).sum()))
                    expected = (ends[0] - ends[1]) / (2 * step) + float(constant)
                    value = results[at].value.values[i // 2, i % 2, depth]
                    assert value == pytest.approx(expected, abs=1e-3), (at, depth)


def test_gradient_lens_directions():
    """Mean gradients by one backward pass a run and a depth, on the replayed tail; cosines with mean u."""
    rm = rl.RewardModel(*tiny_model("qwen3"))
    tokens = [t for both in rm.tokenize_pairs(rl.Pairs(PAIRS)) for t in both]
    sums = {at: torch.zeros(rm.n_layers + 1, rm.d_model) for at in ("final", "all")}
    mean_u = torch.zeros(rm.d_model)
    for text in tokens:
        batch = make_batch([text], [0], rm.pad_id, rm.device)
        with torch.no_grad():
            recording = record(rm.trunk, batch)
            u = rm.readout.direction(recording.last[:, text.reward_pos]).u
        mean_u += u[0]
        for depth in range(rm.n_layers + 1):
            start = recording.resid(depth).clone().requires_grad_()
            last = replay(rm.trunk, recording, depth, start)
            (gradient,) = torch.autograd.grad((u * last[:, text.reward_pos]).sum(), start)
            sums["final"][depth] += gradient[0, text.reward_pos]
            sums["all"][depth] += gradient[0].sum(0)
    for at, total in sums.items():
        expected = torch.nn.functional.cosine_similarity(total, mean_u[None], dim=1)
        assert np.allclose(gradient_lens(rm, PAIRS, at).value["cosine"], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", ["final", "all"])
def test_gradient_lens_ends_in_the_reward(dtype, at):
    rm = rl.RewardModel(*tiny_model("gemma2", dtype=dtype))
    result = gradient_lens(rm, PAIRS, at)
    end = reward_lens(rm, PAIRS, norm="frozen").value.isel(depth=-1)
    assert np.allclose(result.value.isel(depth=-1), end, atol=1e-5 if dtype is torch.float32 else 0.05)
    assert {c.name for c in result.checks} == {"last gradient", "last depth"}
    alone = np.concatenate([gradient_lens(rm, pair, at).value for pair in PAIRS])
    assert np.allclose(alone, result.value, atol=1e-5 if dtype is torch.float32 else 0.1)


def test_gradient_lens_leaves_nothing_behind():
    """No hook, no gradient, no flag; and it works where the caller has gradients switched off."""
    rm = rl.RewardModel(*tiny_model("llama"))
    flags = [p.requires_grad for p in rm.module.parameters()]
    before = rm.rewards([rm.tokenize("a", "b")])
    with torch.no_grad():
        quiet = gradient_lens(rm, PAIRS)
        assert not torch.is_grad_enabled()
    assert np.array_equal(quiet.value, gradient_lens(rm, PAIRS).value)
    assert all(p.grad is None for p in rm.module.parameters())
    assert [p.requires_grad for p in rm.module.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    assert torch.equal(rm.rewards([rm.tokenize("a", "b")]), before)
    with pytest.raises(DataError, match="at='first'"):
        inspect.unwrap(gradient_lens)(rm, PAIRS, "first")


def test_round_trip(planted, tuned, tmp_path):
    for i, result in enumerate((tuned, gradient_lens(planted, PAIRS[:2]))):
        loaded = rl.load_result(result.save(tmp_path / f"{i}.nc"))
        xr.testing.assert_identical(loaded.dataset, result.dataset)
        assert repr(result) and result.plot() is not None
        assert result.meta["title"] and result.meta["shows"] and result.meta["cannot_show"]
