"""Ensembles: figures against plain arithmetic, scale free of each member's unit, and planted members."""

import gc
import weakref

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from planted import planted_pairs

PAIRS = rl.Pairs([rl.Pair(*texts, id=str(i)) for i, texts in enumerate([*TEXT_PAIRS, *planted_pairs("length", 6)])])
CREDIT = {-1: 0.0, 0: 0.5, 1: 1.0}


def model(family: str = "llama", seed: int = 0, factor: float = 1.0, name: str | None = None) -> rl.RewardModel:
    module, tokenizer = tiny_model(family, seed=seed)
    with torch.no_grad():
        module.score.weight.mul_(factor)
    return rl.RewardModel(module, tokenizer, name=name or f"{family}{seed}")


@pytest.fixture(scope="module")
def members() -> dict[str, rl.RewardModel]:
    return {"a": model(), "b": model(seed=1), "c": model("gpt2", seed=2)}


def by_hand(members, scale: str) -> dict[str, np.ndarray]:
    out = {}
    for name, rm in members.items():
        rewards = {(p.prompt_key, r): rm.score(p.prompt, r) for p in PAIRS for r in p.responses}
        squares, free = 0.0, 0
        for prompt in {key[0] for key in rewards}:
            of = np.array([r for key, r in rewards.items() if key[0] == prompt])
            squares, free = squares + ((of - of.mean()) ** 2).sum(), free + len(of) - 1
        unit = np.sqrt(squares / free) if scale == "sd" else 1.0
        out[name] = (
            np.array([rewards[p.prompt_key, p.chosen] - rewards[p.prompt_key, p.rejected] for p in PAIRS]) / unit
        )
    return out


@pytest.mark.parametrize("scale", ["sd", "raw"])
def test_figures_are_those_of_plain_arithmetic(members, scale):
    result = rl.ensemble_rewards(members, PAIRS, scale=scale, k=0.5)
    expected = by_hand(members, scale)
    table = np.array(list(expected.values()))
    for name, margins in expected.items():
        assert result.value.sel(reading=name).values == pytest.approx(margins, abs=1e-5)
    assert result.value.sel(reading="mean").values == pytest.approx(table.mean(0), abs=1e-5)
    assert result.value.sel(reading="spread").values == pytest.approx(table.std(0, ddof=1), abs=1e-5)
    assert result.value.sel(reading="least").values == pytest.approx(table.min(0), abs=1e-5)
    cautious = table.mean(0) - 0.5 * table.std(0, ddof=1)
    assert result.value.sel(reading="cautious").values == pytest.approx(cautious, abs=1e-5)
    assert result.unit == {"sd": "reward_sd", "raw": "reward"}[scale]
    raw = result.value.sel(reading="b")
    margin = (raw["chosen"] - raw["rejected"]).values
    assert margin == pytest.approx(raw.values * float(raw["unit_of_one"]), abs=1e-6)
    assert result.low.sel(reading="mean") <= result.mean.sel(reading="mean") <= result.high.sel(reading="mean")


def test_a_members_unit_does_not_matter(members):
    larger = {**members, "b": model(seed=1, factor=100.0)}
    here, there = (rl.ensemble_rewards(m, PAIRS) for m in (members, larger))
    np.testing.assert_allclose(here.value.values, there.value.values, atol=2e-5)
    here, there = (rl.ensemble_rewards(m, PAIRS, scale="raw").value.sel(reading="mean") for m in (members, larger))
    assert np.corrcoef(there.values, here.values)[0, 1] < 0.9  # in raw rewards one member is the ensemble


def test_the_summary_counts_what_it_says(members):
    result = rl.ensemble_rewards(members, PAIRS)
    summary = rl.ensemble_summary(result).value
    table = np.sign(np.array(list(by_hand(members, "sd").values())))
    mean = np.sign(result.value.sel(reading="mean").values)
    contested = np.array([len(set(column)) > 1 for column in table.T])
    assert float(summary.sel(measure="contested")) == pytest.approx(contested.mean())
    for row, name in zip(table, members, strict=True):
        assert float(summary.sel(measure=f"accuracy: {name}")) == pytest.approx(np.mean([CREDIT[int(s)] for s in row]))
    assert float(summary.sel(measure="accuracy: least")) == pytest.approx((table.min(0) > 0).mean())
    assert float(summary.sel(measure="accuracy, agreed")) == pytest.approx((mean[~contested] > 0).mean())
    spread = result.value.sel(reading="spread").values
    expected = np.corrcoef(spread, (mean < 0).astype(float))[0, 1]
    assert float(summary.sel(measure="spread ~ error")) == pytest.approx(expected)
    assert set(summary["unit_of"].values) == {"fraction", "correlation"}


def test_equal_members_have_no_spread_and_nothing_contested():
    rm = model()
    result = rl.ensemble_rewards({"one": rm, "two": rm, "three": rm}, PAIRS)
    assert np.abs(result.value.sel(reading="spread").values).max() < 1e-12
    assert result.value.sel(reading="least").values == pytest.approx(result.value.sel(reading="one").values)
    summary = rl.ensemble_summary(result).value
    assert float(summary.sel(measure="contested")) == 0
    assert "no such pairs" in summary.sel(measure="accuracy, contested").reason.item()
    assert "vary" in summary.sel(measure="spread ~ error").reason.item()


def test_a_member_that_errs_alone_raises_the_spread_where_it_errs():
    """A member with its head turned round opposes the others everywhere: all is contested, and least never agrees."""
    three = {"one": model(), "two": model(factor=3.0), "turned": model(factor=-1.0)}
    result = rl.ensemble_rewards(three, PAIRS)
    summary = rl.ensemble_summary(result).value
    assert float(summary.sel(measure="contested")) == 1 and float(summary.sel(measure="accuracy: least")) == 0
    one = result.value.sel(reading="one").values
    assert result.value.sel(reading="mean").values == pytest.approx(one / 3, abs=1e-5)
    assert result.value.sel(reading="spread").values == pytest.approx(np.abs(one) * np.sqrt(4 / 3), abs=1e-5)


def test_members_are_loaded_one_after_the_other():
    alive: list[weakref.ref] = []

    def loads(seed: int):
        def load():
            gc.collect()
            assert not any(ref() is not None for ref in alive), "an earlier member is still in memory"
            rm = model(seed=seed)
            alive.append(weakref.ref(rm.module))
            return rm

        return load

    result = rl.ensemble_rewards({f"m{seed}": loads(seed) for seed in range(3)}, PAIRS)
    assert len(alive) == 3 and result.value.sizes["reading"] == 7


def test_what_is_no_ensemble_is_refused(members):
    with pytest.raises(rl.DataError, match="cannot be compared.*1 model"):
        rl.ensemble_rewards({"a": members["a"]}, PAIRS)
    with pytest.raises(rl.DataError, match="not understood.*a member named 'mean'"):
        rl.ensemble_rewards({"mean": members["a"], "b": members["b"]}, PAIRS)
    with pytest.raises(rl.DataError, match="not understood.*k=-1"):
        rl.ensemble_rewards(members, PAIRS, k=-1)
    same = [rl.Pair("a", "b", "b")]
    with pytest.raises(rl.DataError, match="rewards of a have no scale.*no spread within any prompt"):
        rl.ensemble_rewards(members, same)
    with pytest.raises(rl.DataError, match="no ensemble to sum up.*score_pairs"):
        rl.ensemble_summary(members["a"].score_pairs(PAIRS))


def test_a_result_is_kept_and_read_again(members, tmp_path):
    result = rl.ensemble_rewards(members, PAIRS)
    result.save(tmp_path / "ensemble.nc")
    again = rl.load_result(tmp_path / "ensemble.nc")
    np.testing.assert_array_equal(again.value.values, result.value.values)
    assert rl.ensemble_summary(again).value.equals(rl.ensemble_summary(result).value)
