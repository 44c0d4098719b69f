"""`agreement` against rank correlations taken by hand, its identity, its artefact, and its interval under a null."""

import functools

import numpy as np
import pytest
from scipy.stats import spearmanr

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens import stats
from reward_lens.charts.choice import kind
from reward_lens.methods.causation import agreement as module
from reward_lens.methods.causation.agreement import FEWEST_SITES, LEGACY, _require, rank_correlation

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
COMPARISONS = ["contribution ~ direct", "contribution ~ live direct", "contribution ~ total", "direct ~ total"]
FEW = PAIRS[:2]
some = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])


@functools.cache
def model(family: str, n_layers: int = 4) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1, n_layers=n_layers), name=family)


@functools.cache
def found() -> rl.Result:
    return rl.agreement(model("llama"), PAIRS, legacy=True)


@some
def test_every_cell_is_a_rank_correlation_of_the_public_results(family):
    rm = model(family)
    result = rl.agreement(rm, FEW, controls=0, legacy=True)
    split = rl.contributions(rm, FEW).value.sel(side="margin")
    assert result.value.dims == ("pair", "comparison", "mode", "layers", "model")
    assert result.value["comparison"].values.tolist() == [*COMPARISONS, LEGACY]
    for mode in ("noise", "denoise"):
        parts = rl.effects(rm, FEW, mode=mode, path="direct").value
        total = rl.effects(rm, FEW, mode=mode).value
        live = parts.sel(part="direct") + parts.sel(part="norm_rescale")
        legacy = rl.effects(rm, FEW, mode=mode, at="all", align="legacy_prefix").value
        sides = [(split, parts.sel(part="direct")), (split, live), (split, total),
                 (parts.sel(part="direct"), total), (split, legacy)]  # fmt: skip
        names = total["component"].values
        layer = np.array([0 if n == "embed" else int(n[1]) for n in names])
        for layers, keep in {"all": layer >= 0, "early": layer < 2, "late": layer >= 2}.items():
            got = result.value.sel(mode=mode, layers=layers, model="trained").values
            for i in range(len(FEW)):
                for c, (x, y) in enumerate(sides):
                    a, b = (v.sel(component=names[keep]).values[i] for v in (x, y))
                    if np.ptp(a) <= rm.noise_floor or np.ptp(b) <= rm.noise_floor:
                        assert np.isnan(got[i, c])
                    else:
                        assert abs(got[i, c] - spearmanr(a, b).statistic) < 1e-12


def test_the_identity_is_checked_and_is_the_ceiling():
    """E7: the contribution is the mean over modes of the direct effects, so those two have a rho of 1."""
    rm, result = model("llama"), found()
    assert [c.name for c in result.checks][0] == "mean direct effect" and result.checks[0].gap < 1e-5
    direct = np.mean([rl.effects(rm, PAIRS, mode=m, path="direct").value.sel(part="direct") for m in
                      ("noise", "denoise")], 0)  # fmt: skip
    split = rl.contributions(rm, PAIRS).value.sel(side="margin").values[:, : direct.shape[1]]
    np.testing.assert_allclose(rank_correlation(split, direct, rm.noise_floor), 1.0)


def test_the_random_copies_are_other_models():
    rm, result = model("llama"), found()
    copy = rl.random_weight_copy(rm, seed=0)
    alone = rl.agreement(copy, PAIRS, controls=0, legacy=True, modes=("noise",))
    assert result.value["model"].values.tolist() == ["trained", "random 1"]
    np.testing.assert_array_equal(alone.value[..., 0], result.value.sel(model="random 1", mode=["noise"]))
    assert not np.array_equal(result.value.isel(model=0), result.value.isel(model=1), equal_nan=True)


def test_lengths_and_groups():
    rm, result = model("llama"), found()
    tokens = rm.tokenize_pairs(PAIRS)
    diff = np.array([len(a.response) - len(b.response) for a, b in tokens])
    names = np.where(diff == 0, "equal", np.where(diff > 0, "chosen longer", "rejected longer"))
    assert result.value["lengths"].values.tolist() == names.tolist()
    assert (result.value["n_chosen_tokens"] - result.value["n_rejected_tokens"]).values.tolist() == diff.tolist()
    split = rl.agreement_by_length(result)
    assert split.value.dims == ("group", "comparison", "mode")
    whole = result.sel(layers="all", model="trained")
    np.testing.assert_allclose(split.value.sel(group="all"), whole.mean, atol=1e-12)
    np.testing.assert_allclose(split.low.sel(group="all"), whole.low, atol=1e-12)
    for group in ("equal", "chosen longer", "rejected longer"):
        inside = names == group
        got = split.value.sel(group=group, comparison="contribution ~ total", mode="noise")
        expected = whole.value.sel(comparison="contribution ~ total", mode="noise").values[inside]
        assert int(got["n"]) == np.isfinite(expected).sum()
        np.testing.assert_allclose(float(got), np.nanmean(expected), atol=1e-12)
        assert np.isnan(split.low.sel(group=group)).all()  # under 6 prompts
    assert "means without an interval" in {c.name for c in split.checks}
    equal = rl.agreement_by_length(rl.agreement(rm, [p for p, d in zip(PAIRS, diff, strict=True) if not d]))
    assert np.isnan(equal.value.sel(group="unequal")).all() and int(equal.value["n"].sel(group="unequal").max()) == 0
    assert any("no pairs of this kind" in c.note for c in equal.checks)


def test_the_artefact_leaves_the_late_half_of_the_longer_run_without_effects():
    """Absolute positions miss the longer response's reward position: the last writes have no effect to rank."""
    rm, result = model("llama"), found()
    longer = result.value["lengths"].values
    legacy = rl.effects(rm, PAIRS, ["L3.mlp", "L3.attn"], at="all", align="legacy_prefix").value
    assert not legacy.values[longer == "chosen longer"].any()
    aligned = result.sel(comparison="contribution ~ total", layers="late").value
    assert np.isfinite(aligned).all()


def test_undefined_correlations_have_a_reason():
    rm = model("llama")
    same = rl.Pair("What?", "The same.", "The same.", id="same")
    result = rl.agreement(rm, [same, PAIRS[0]], controls=0)
    assert np.isnan(result.value[0]).all() and np.isfinite(result.value[1].sel(layers="all")).all()
    assert any(f"under {FEWEST_SITES} sites" in c.note for c in result.checks)
    few = rl.agreement(rm, PAIRS[:2], ["L0.attn", "L0.mlp", "L3.mlp"], controls=0, modes=("noise",))
    assert np.isfinite(few.value.sel(layers="all")).all() and np.isnan(few.value.sel(layers=["early", "late"])).all()
    assert few.meta["settings"]["n_sites"] == {"all": 3, "early": 2, "late": 1}


def test_heads_and_neurons():
    rm = model("gpt2")
    result = rl.agreement(rm, PAIRS[:2], "heads", controls=0, modes=("denoise",))
    split = rl.contributions(rm, PAIRS[:2], by="head").value.sel(side="margin")
    total = rl.effects(rm, PAIRS[:2], "heads", mode="denoise").value
    expected = spearmanr(split.sel(component=total["component"])[1], total[1]).statistic
    assert abs(float(result.value.sel(comparison="contribution ~ total", layers="all")[1].squeeze()) - expected) < 1e-12
    mixed = rl.agreement(rm, PAIRS[:2], ["embed", "L1.H2", "L2.N5", "L3.mlp"], controls=0)
    assert np.isfinite(mixed.value.sel(layers="all")).all()


def test_estimators_are_held_against_the_exact_effect(monkeypatch):
    rm, real, asked = model("llama"), module.effects, []

    def effects(*args, estimator="exact", **options):
        result = real(*args, **options)
        if estimator == "exact":
            return result
        asked.append(estimator)
        return result._with(result.dataset.assign(value=-result.value))

    monkeypatch.setattr(module, "effects", effects)
    result = rl.agreement(rm, PAIRS[:3], estimators=("gradient", "relevance"), controls=0)
    assert set(asked) == {"gradient", "relevance"}
    np.testing.assert_allclose(result.value.sel(comparison="relevance ~ exact", layers="all"), -1.0)


def test_swapping_the_responses_swaps_the_modes():
    """E9: noise(a, b) == -denoise(b, a), and a contribution changes its sign too, so the correlations are the same."""
    rm = model("llama")
    back = [rl.Pair(p.prompt, p.rejected, p.chosen, id=p.id) for p in PAIRS]
    a, b = (rl.agreement(rm, pairs[:3], controls=0).value.sel(layers="all") for pairs in (PAIRS, back))
    np.testing.assert_allclose(a.sel(mode="noise"), b.sel(mode="denoise"), atol=1e-9)


def test_rank_correlation_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (20, 9)).astype(float), rng.normal(size=(20, 9))
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(rank_correlation(x, y, 0.0), expected, atol=1e-12)
    assert np.isnan(rank_correlation(x, 1e-6 * y, 1e-3)).all()


def test_the_interval_covers_zero_for_unrelated_sites():
    """Sites that are drawn apart, two pairs a prompt that share half of their noise: 95% should mean 95%."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(15), 2)
    covered = []
    for _ in range(300):
        shared = rng.normal(size=(2, 15, 9)).repeat(2, axis=1)
        x, y = shared + rng.normal(size=(2, 30, 9))
        interval = stats.mean_interval(rank_correlation(x, y, 0.0), clusters)
        covered.append(interval.low <= 0 <= interval.high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_an_interval_of_correlations_ends_at_one():
    split = rl.agreement_by_length(found())
    for result in (found(), split):
        assert result.low is not None and result.high is not None
        assert float(result.low.min()) >= -1 and float(result.high.max()) == 1  # the t interval would pass it
    inside = stats.mean_interval(found().value.values, [p.prompt_key for p in PAIRS])
    assert np.nanmax(inside.high) > 1
    np.testing.assert_allclose(found().high, np.minimum(inside.high, 1))


def test_repeatable_saved_drawn_and_without_traces(tmp_path):
    rm, result = model("llama"), found()
    assert rl.agreement(rm, FEW).value.identical(rl.agreement(rm, FEW).value)
    back = rl.load_result(result.save(tmp_path / "agreement.nc"))
    assert back.value.equals(result.value) and back.meta == result.meta
    split = rl.agreement_by_length(back)
    assert rl.load_result(split.save(tmp_path / "split.nc")).value.equals(split.value)
    assert kind(result) == "list" and kind(result.sel(layers="all", model="trained")) == "list"
    assert rl.save_chart(result, tmp_path / "agreement.svg").stat().st_size > 5000
    assert rl.save_chart(split, tmp_path / "split.svg").stat().st_size > 5000
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())


def test_bad_input():
    rm = model("llama")
    with pytest.raises(rl.DataError, match=r"needs sites that write.*L0.resid_pre.*sites='components'"):
        rl.agreement(rm, PAIRS, "residual")
    with pytest.raises(rl.DataError, match="modes that exchange"):
        _require(module.asked_sites(rm, "components", None), ["zero"], 0)
    with pytest.raises(rl.DataError, match="modes that exchange"):
        rl.agreement(rm, PAIRS, modes=("noise", "noise"))
    with pytest.raises(rl.StructureError, match="L9.attn"):
        rl.agreement(rm, PAIRS, ["L9.attn"])
    with pytest.raises(rl.AlignmentError, match="align='tail'"):
        rl.agreement(rm, PAIRS, at="all")
    with pytest.raises(rl.DataError, match="Only an agreement can be split"):
        rl.agreement_by_length(rl.effects(rm, PAIRS))
