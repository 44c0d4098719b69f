"""Changes of biases by the direction taken out: against edited heads, planted directions and hand arithmetic."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import t

import reward_lens as rl
from families import tiny_model
from reward_lens import stats
from reward_lens.errors import DataError
from reward_lens.methods.causation.steering import steer
from reward_lens.methods.repair.bias_direction import bias_direction
from reward_lens.methods.repair.head_editing import edit_head
from reward_lens.methods.repair.transfer import transfer_matrix

WORDS = "cat dog sun tree red old sea hat run it you and is on".split()


@functools.cache
def model(scale: float = 1.0, family: str = "llama") -> rl.RewardModel:
    module, tokenizer = tiny_model(family, seed=1)
    with torch.no_grad():
        module.score.weight *= scale
    return rl.RewardModel(module, tokenizer, name=f"{family} {scale}")


def edited(extra: str, n: int = 12, seed: int = 0) -> list[rl.Pair]:
    rng = np.random.default_rng(seed)
    said = [" ".join(rng.choice(WORDS, 4)) for _ in range(n)]
    return [rl.Pair(f"Say {extra} {seed} {i}", text + extra, text) for i, text in enumerate(said)]


SETS = {"sorry": edited(" sorry"), "hat": edited(" hat hat", seed=1)}


@functools.cache
def directions(scale: float = 1.0, family: str = "llama"):
    return {name: bias_direction(model(scale, family), pairs) for name, pairs in SETS.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_nulling_is_what_the_edited_head_does(alpha, family):
    rm, given = model(1.0, family), directions(1.0, family)
    result = transfer_matrix(rm, given, SETS, alpha=alpha)
    for j, pairs in SETS.items():
        rows = result.value.pair_set == j
        before = rm.score_pairs(pairs).value.sel(side="margin").values
        np.testing.assert_allclose(result.value.margin[rows], before, atol=1e-5)
        for i, v in given.items():
            after = edit_head(rm, v, alpha).score_pairs(pairs).value.sel(side="margin").values
            got = result.value.sel(direction=i)[rows].values
            np.testing.assert_allclose(got, after - before, atol=2e-5)
            over = stats.mean_interval(after - before, [p.prompt_key for p in pairs])
            cell = result.sel(direction=i, bias=j)
            for got, want in zip((cell.mean, cell.low, cell.high), (over.mean, over.low, over.high), strict=True):
                assert got is not None and abs(float(got) - want) < 5e-5
    assert result.unit == "reward" and result.mean is not None and result.mean.dims == ("direction", "bias")


def test_steering_is_what_steer_does():
    rm, given = model(), directions()
    result = transfer_matrix(rm, given, SETS, op="steer", strength=0.2)
    for j, pairs in SETS.items():
        for i, v in given.items():
            curve = steer(rm, pairs, v.value.values, strengths=(0.0, 0.2), depth=rm.n_layers, at="final")
            want = curve.value.sel(side="margin", strength=0.2) - curve.value.sel(side="margin", strength=0.0)
            got = result.value.sel(direction=i)[result.value.pair_set == j]
            np.testing.assert_allclose(got.values, want.values, atol=1e-4)


def test_orthogonal_directions_leave_each_other_alone(monkeypatch):
    """Two edits along two orthogonal axes, each read by the head; states of one norm, so that the scale is held."""
    rm, generator = model(), torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(rm.d_model, rm.d_model, generator=generator, dtype=torch.float64))[0].T
    gain = rm.readout.norm.gain.double()
    row = (axes[0] + axes[1]) / gain
    readout = rm.readout.__class__(rm.readout.norm, row.float(), rm.readout.bias)
    other = object.__new__(rl.RewardModel)
    other.__dict__.update(rm.__dict__ | {"readout": readout})
    noise = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def states(pairs, which):
        out = []
        for i in range(len(pairs)):
            size = 1.0 + 0.3 * noise[i, which]
            out += [5 * axes[2] + size * axes[which], 5 * axes[2] - size * axes[which]]  # equal norms
        return torch.stack(out)

    of_set = {SETS["sorry"][0].prompt_key: 0, SETS["hat"][0].prompt_key: 1}

    def fake(rm, pairs, sites):
        yield {sites[0]: states(pairs, of_set[pairs[0].prompt_key])}

    monkeypatch.setattr("reward_lens.methods.repair.head_editing.captured", fake)
    result = transfer_matrix(other, {"sorry": axes[0], "hat": axes[1]}, SETS)
    changes, shares = result.mean.values, result.mean.share.values
    assert abs(changes[0, 1]) < 1e-5 and abs(changes[1, 0]) < 1e-5
    np.testing.assert_allclose(np.diag(changes), -result.mean.before.values, atol=1e-5)  # the bias is gone
    np.testing.assert_allclose(np.diag(shares), -1, atol=1e-5)
    np.testing.assert_allclose(shares[[0, 1], [1, 0]], 0, atol=1e-5)
    assert (result.mean.flagged == 0).all() and all(c["present"] for c in result.meta["control"].values())


def test_the_ends_of_a_share_are_where_change_less_share_times_bias_is_told_from_nothing():
    """Fieller's: at either end D of share, t of the prompts' sums of change - D margin is that of its quantile."""
    result = transfer_matrix(model(), directions(), SETS, alpha=0.5)
    defined = [bias for bias in SETS if result.mean.share.sel(bias=bias).notnull().all()]
    assert defined
    for bias in defined:
        inside = result.value["pair_set"].values == bias
        _, codes = np.unique(result.value["prompt_id"].values[inside], return_inverse=True)
        margin = np.bincount(codes, result.value["margin"].values[inside])
        for direction in directions():
            change = np.bincount(codes, result.value.sel(direction=direction).values[inside])
            cell = result.mean.sel(direction=direction, bias=bias)
            assert float(cell.share) == pytest.approx(change.sum() / margin.sum())
            for end in (float(cell.share_low), float(cell.share_high)):
                rest = change - end * margin
                off = abs(rest.mean()) - t.ppf(0.975, len(rest) - 1) * rest.std(ddof=1) / np.sqrt(len(rest))
                assert abs(off) < 1e-6 * np.abs(margin).mean()


def test_rescaling_the_reward_changes_no_share():
    small, large = (transfer_matrix(model(s), directions(s), SETS) for s in (1.0, 4.0))
    np.testing.assert_allclose(large.value, 4 * small.value, rtol=1e-3, atol=1e-5)
    for name in ("share", "p", "p_holm", "flagged"):
        np.testing.assert_allclose(large.mean[name], small.mean[name], atol=1e-3)


def test_order_of_directions_and_sets():
    one = transfer_matrix(model(), directions(), SETS)
    two = transfer_matrix(model(), dict(reversed(directions().items())), dict(reversed(SETS.items())))
    again = two.mean.sel(direction=one.mean.direction, bias=one.mean.bias)
    np.testing.assert_allclose(again, one.mean, atol=1e-6)


def test_nothing_is_done_at_alpha_0():
    result = transfer_matrix(model(), directions(), SETS, alpha=0.0)
    assert not result.value.any()
    assert (result.mean.flagged == 1).all()
    assert "holds 0" in result.meta["control"]["hat"]["reason"]
    assert "sorry, hat" in result.meta["cannot_show"]


def test_rounding_is_no_control():
    """Changes of one sign, but of a third of the noise floor of rewards."""
    whole = transfer_matrix(model(), directions(), SETS)
    alpha = model().noise_floor / 3 / float(np.abs(whole.value).max())
    least = transfer_matrix(model(), directions(), SETS, alpha=alpha)
    assert (whole.mean["p"] < 0.01).any() and any(c["present"] for c in whole.meta["control"].values())
    assert (least.mean["p"] == 1).all() and (least.mean["flagged"] == 1).all()
    assert any("noise floor" in c["reason"] for c in least.meta["control"].values())


def test_holm_is_over_the_cells_off_the_diagonal():
    result = transfer_matrix(model(), directions(), SETS)
    p, holm = result.mean.p.values, result.mean.p_holm.values
    assert np.isnan(np.diag(holm)).all()
    np.testing.assert_allclose(holm[[0, 1], [1, 0]], stats.adjust(p[[0, 1], [1, 0]]))


def test_clones_of_prompts_add_no_evidence():
    twice = {name: [*pairs, *pairs] for name, pairs in SETS.items()}
    once, again = transfer_matrix(model(), directions(), SETS), transfer_matrix(model(), directions(), twice)
    for end in ("mean", "low", "high"):
        np.testing.assert_allclose(again.dataset[end], once.dataset[end], atol=1e-6)
    np.testing.assert_allclose(again.mean.p, once.mean.p, atol=1e-6)


def test_prompts_that_a_direction_was_taken_from_are_counted():
    result = transfer_matrix(model(), directions(), SETS)
    assert result.mean.shared_prompts.values.tolist() == [[12, 0], [0, 12]]
    assert {c.name: c.gap for c in result.checks}["prompts in a direction and a set"] == 24
    plain = transfer_matrix(model(), {n: v.value.values for n, v in directions().items()}, SETS)
    assert {c.name: c.gap for c in plain.checks}["prompts in a direction and a set"] == 0
    np.testing.assert_allclose(plain.value, result.value)


def test_a_direction_without_pairs_is_flagged(tmp_path):
    given = {**directions(), "random": np.random.default_rng(0).standard_normal(model().d_model)}
    result = transfer_matrix(model(), given, SETS)
    assert (result.mean.flagged.sel(direction="random") == 1).all()
    assert result.meta["control"]["random"]["reason"] == "no set of pairs has this name"
    again = rl.load_result(result.save(tmp_path / "t.nc"))
    assert again.dataset.identical(result.dataset) and "random" in repr(result)
    assert result.plot() is not None


def test_a_bias_near_0_has_no_share():
    """Margins of both signs: the bias before has an interval that holds 0."""
    pairs = [rl.Pair(p.prompt, *(p.responses if i % 2 else p.responses[::-1])) for i, p in enumerate(SETS["hat"])]
    result = transfer_matrix(model(), directions(), {**SETS, "mixed": pairs})
    assert result.mean.share.sel(bias="mixed").isnull().all()
    assert {c.name: c.gap for c in result.checks}["biases too near 0 for a share"] >= 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "remove"}, "op='remove'"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"directions": {}}, "directions have no names"),
        ({"directions": [np.ones(32)]}, "directions have no names"),
        ({"directions": {"other": np.ones(32)}}, "no positive control"),
        ({"directions": {"hat": np.ones((2, 32))}}, "not one vector"),
        ({"directions": {"hat": np.ones(5)}}, "no direction for the head"),
        ({"pair_sets": {"hat": edited(" hat", n=5)}}, "5 in the set 'hat'"),
        ({"pair_sets": edited(" hat")}, "pair_sets have no names"),
    ],
)
def test_bad_input(change, words):
    given = {"directions": directions(), "pair_sets": SETS} | change
    with pytest.raises(DataError, match=words):
        transfer_matrix(model(), **given)


def test_p_keeps_its_level_where_which_text_is_the_edited_one_is_drawn():
    """Texts exchanged by a coin: no direction changes a bias on average, whatever it does to each pair."""
    rm, runs, flags = model(), 40, []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        sets = {
            name: [rl.Pair(p.prompt, *(p.responses if rng.random() < 0.5 else p.responses[::-1])) for p in pairs]
            for name, pairs in SETS.items()
        }
        drawn = {name: torch.from_numpy(rng.standard_normal(rm.d_model)).float() for name in SETS}
        p = transfer_matrix(rm, drawn, sets).mean["p"].values
        flags.append(np.mean(p[~np.eye(2, dtype=bool)] < 0.05))
    assert np.mean(flags) <= 0.05 + 2 * np.std(flags, ddof=1) / np.sqrt(runs)
