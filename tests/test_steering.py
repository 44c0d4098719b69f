"""`steer` against the head itself, against `intervene`, and its slopes and nulls against numpy."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens import stats
from reward_lens.methods.causation.steering import natural_directions

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
some = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom", "mixtral"])


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def direction(seed: int = 0) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


@some
@pytest.mark.parametrize("at", ["final", "response"])
def test_strength_zero_is_the_clean_reward_and_the_others_are_interventions(family, at):
    rm, v = model(family), direction()
    result = rl.steer(rm, PAIRS[:3], v, (-0.5, 0, 0.5), depth=1, at=at)
    clean = rm.score_pairs(PAIRS[:3]).value
    assert result.value.dims == ("pair", "side", "strength")
    np.testing.assert_array_equal(result.value.sel(strength=0), clean)
    acts = rl.capture(rm, PAIRS[:3], ["L1.resid_pre"], at)["L1.resid_pre"]
    for i, pair in enumerate(PAIRS[:3]):
        for k, (side, text) in enumerate(zip(("chosen", "rejected"), (pair.chosen, pair.rejected), strict=True)):
            norm = float(acts[2 * i + k].reshape(-1, 32).norm(dim=1).mean())
            assert abs(float(result.value["norm"].sel(side=side)[i]) - norm) < 1e-5 * norm
            source = rl.add(v / v.norm(), 0.5 * norm)
            steered = rl.intervene(rm, [(pair.messages, text)], {"L1.resid_pre": source}, at).value
            got = float(result.value.sel(side=side, strength=0.5)[i])
            assert abs(got - float(steered.sel(state="intervened")[0])) < 3e-5
    margin = result.value.sel(side="chosen") - result.value.sel(side="rejected")
    np.testing.assert_allclose(result.value.sel(side="margin"), margin, atol=1e-12)


@some
def test_at_the_last_depth_it_is_the_head_on_the_moved_residual(family):
    rm, v = model(family), direction(1)
    h = rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"]
    result = rl.steer(rm, PAIRS, v, (-2.0, 0.0, 3.0), depth=3, unit="absolute", at="final")
    for s in (-2.0, 3.0):
        expected = rm.readout.reward(h + s * v / v.norm())
        np.testing.assert_allclose(result.value.sel(strength=s, side="chosen"), expected[::2], atol=2e-5)
        np.testing.assert_allclose(result.value.sel(strength=s, side="rejected"), expected[1::2], atol=2e-5)


def test_slopes_are_least_squares_with_an_interval_over_prompts():
    rm, doses = model("llama"), (-0.2, 0.0, 0.1, 0.4)
    result = rl.steer(rm, PAIRS, 7 * direction(), doses)
    assert result.meta["settings"]["depth"] == 2 and result.meta["settings"]["at"] == "response"
    slope = result.value["slope"]
    for i in range(len(PAIRS)):
        for side in ("chosen", "rejected", "margin"):
            fitted = np.polyfit(doses, result.value.sel(side=side)[i], 1)[0]
            assert abs(float(slope.sel(side=side)[i]) - fitted) < 1e-9
    over = stats.mean_interval(slope.sel(side="margin").values, [p.prompt_key for p in PAIRS])
    given = result.meta["slope"]["margin"]
    assert np.allclose([given["mean"], given["low"], given["high"]], [over.mean, over.low, over.high])
    few = rl.steer(rm, PAIRS[:2], direction(), doses)
    assert few.meta["slope"]["margin"]["low"] is None and few.meta["slope"]["margin"]["mean"] is not None


def test_only_the_direction_counts_and_turning_it_turns_the_curve():
    rm, v = model("llama"), direction()
    one = rl.steer(rm, PAIRS[:2], v).value
    np.testing.assert_allclose(rl.steer(rm, PAIRS[:2], 1e30 * v.double()).value, one, atol=1e-6)
    back = rl.steer(rm, PAIRS[:2], -v).value
    np.testing.assert_allclose(back.values[..., ::-1], one, atol=2e-5)


def test_nulls():
    rm = model("llama")
    result = rl.steer(rm, PAIRS[:3], direction(), (-0.1, 0.1), nulls=8, seed=4)
    null = result.meta["nulls"]["margin"]
    observed = result.meta["slope"]["margin"]["mean"]
    assert len(null["slopes"]) == 8 and null["quantile"] == np.mean(np.array(null["slopes"]) < observed)
    assert null["p"] == (1 + sum(abs(s) >= abs(observed) for s in null["slopes"])) / 9
    acts = rl.capture(rm, PAIRS[:3], ["L2.resid_pre"], "response")["L2.resid_pre"]
    drawn = natural_directions(torch.cat(acts).double(), 8, 4)[5]
    alone = rl.steer(rm, PAIRS[:3], drawn, (-0.1, 0.1))
    assert abs(alone.meta["slope"]["margin"]["mean"] - null["slopes"][5]) < 1e-4
    again = rl.steer(rm, PAIRS[:3], direction(), (-0.1, 0.1), nulls=8, seed=4)
    assert again.meta == result.meta and again.value.identical(result.value)


def test_no_natural_directions_from_one_state():
    """At the reward position block 0 reads the template's last token in every text."""
    with pytest.raises(rl.DataError, match="Found: 12 steered positions, all in the same state"):
        rl.steer(model("llama"), PAIRS, direction(), depth=0, at="final", nulls=3)


def test_natural_directions_have_the_covariance_of_the_states():
    rng = torch.Generator().manual_seed(0)
    states = 5 + torch.randn(400, 3, generator=rng, dtype=torch.float64) * torch.tensor([4.0, 1.0, 0.0])
    drawn = natural_directions(states, 4000, 1)
    np.testing.assert_allclose(drawn.norm(dim=1), 1.0)
    assert not drawn[:, 2].any()
    # x / y of a normal pair of SD 4 and 1 has the quartile 4 in absolute value, a median of |4 z / z'|
    assert abs(float((drawn[:, 0] / drawn[:, 1]).abs().median()) - 4) < 0.5


def test_saved_drawn_and_without_traces(tmp_path):
    rm = model("llama")
    before = {k: v.clone() for k, v in rm.module.state_dict().items()}
    result = rl.steer(rm, PAIRS[:2], direction(), nulls=2)
    back = rl.load_result(result.save(tmp_path / "steer.nc"))
    assert back.value.equals(result.value) and back.meta == result.meta
    assert rl.save_chart(result, tmp_path / "steer.svg").stat().st_size > 5000
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    assert all(torch.equal(before[k], v) for k, v in rm.module.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vector": torch.ones(31)}, r"no direction.*shape \(31,\).*32 finite numbers"),
        ({"vector": torch.zeros(32)}, "zeros only"),
        ({"vector": torch.full((32,), torch.nan)}, "NaN or infinite"),
        ({"vector": "honesty"}, "no numbers, but an object of type str"),
        ({"vector": {"honesty": torch.ones(32)}}, "no numbers, but an object of type dict"),
        ({"strengths": (0.1,)}, "at least two different"),
        ({"strengths": (0.1, 0.1)}, "at least two different"),
        ({"nulls": -1}, "nulls=-1.*defaults are a good start"),
        ({"depth": 4}, "depth=4.*0 to 3"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(rl.DataError, match=message):
        rl.steer(model("llama"), PAIRS[:1], **({"vector": direction()} | changed))


def test_a_direction_that_was_measured_is_a_vector():
    rm = model("llama")
    measured = rl.bias_direction(rm, rl.edited_pairs([rl.Pair(f"Say {i}", "Yes.", "No.") for i in range(6)], "hedge"))
    expected = rl.steer(rm, PAIRS[:1], measured.value.values).value
    for vector in (measured, measured.value, measured.value.values.tolist()):
        assert rl.steer(rm, PAIRS[:1], vector).value.identical(expected)
