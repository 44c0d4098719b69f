"""`susceptibility_correlation` against scipy, statsmodels and planted relations."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import xarray as xr
from scipy.stats import rankdata, spearmanr

from reward_lens import DataError, stats
from reward_lens.methods.training.susceptibility import susceptibility_correlation
from reward_lens.result import Result, load_result

NAMES = ("a", "b", "c")


def table(values: np.ndarray, lengths: np.ndarray | None = None, names=NAMES) -> pd.DataFrame:
    rows = [
        {"item": f"i{i}", "dimension": name, "margin": values[i, j]}
        | ({} if lengths is None else {"length": lengths[i, j]})
        for i in range(len(values))
        for j, name in enumerate(names)
    ]
    return pd.DataFrame(rows)


def draws(seed: int, n: int = 100, shared: float = 0.0, k: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)) + shared * rng.normal(size=(n, 1))


def test_without_length_it_is_spearman_with_its_interval():
    values = draws(0, 60, 1.0)
    result = susceptibility_correlation(table(values))
    assert result.dataset["between"].values.tolist() == ["a ~ b", "a ~ c", "b ~ c"]
    for k, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        expected = stats.spearman(values[:, i], values[:, j])
        got = [float(result.dataset[name][k]) for name in ("value", "low", "high")]
        np.testing.assert_allclose(got, [expected.value, expected.low, expected.high], atol=1e-12)
        assert abs(float(result.value["p"][k]) - spearmanr(values[:, i], values[:, j]).pvalue) < 0.02
    np.testing.assert_array_equal(result.value["alone"], result.value)
    np.testing.assert_allclose(result.value["p_bh"], stats.adjust(result.value["p"].values, "bh"))


def test_with_length_it_is_the_correlation_of_residual_ranks():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, (80, 3)).astype(float)
    values = draws(2, 80) + 0.1 * lengths
    result = susceptibility_correlation(table(values, lengths), length="length")
    x, y = rankdata(values[:, 0]), rankdata(values[:, 2])
    design = sm.add_constant(np.column_stack([rankdata(lengths[:, 0]), rankdata(lengths[:, 2])]))
    rest = [sm.OLS(ranks, design).fit().resid for ranks in (x, y)]
    rho = np.corrcoef(rest)[0, 1]
    assert float(result.value.sel(between="a ~ c")) == pytest.approx(rho, abs=1e-10)
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / (80 - 2 - 3))
    assert float(result.low.sel(between="a ~ c")) == pytest.approx(np.tanh(np.arctanh(rho) - half), abs=1e-6)


def test_one_length_an_item_counts_once():
    length = np.random.default_rng(3).normal(size=(60, 1)).repeat(3, axis=1)
    values = draws(4, 60) + 2 * length
    result = susceptibility_correlation(table(values, length), length="length")
    x, y, z = (rankdata(column) for column in (values[:, 0], values[:, 1], length[:, 0]))
    r = np.corrcoef([x, y, z])
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert float(result.value[0]) == pytest.approx(partial, abs=1e-10)
    assert float(result.value["alone"][0]) > 0.5 > abs(partial)
    half = 1.959964 * np.sqrt((1 + partial**2 / 2) / (60 - 1 - 3))
    assert float(result.high[0]) == pytest.approx(np.tanh(np.arctanh(partial) + half), abs=1e-6)


@pytest.mark.parametrize("with_length", [False, True])
def test_p_and_labels_hold_their_level_where_nothing_goes_together(with_length):
    small, wrong, runs = [], 0, 80
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        lengths = rng.lognormal(3, 0.5, (100, 1)).repeat(3, axis=1)
        values = rng.standard_t(2, (100, 3)) + (0.1 * lengths if with_length else 0)
        result = susceptibility_correlation(
            table(values, lengths), length="length" if with_length else None, n_permutations=199, seed=seed
        )
        small.append(np.mean(result.value["p"] <= 0.05))
        wrong += bool(np.isin(result.value["label"].values, ("together", "opposed")).any())
    assert np.mean(small) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert wrong / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


def test_planted_relations_are_labelled():
    z = np.random.default_rng(0).normal(size=(120, 1))
    values = draws(5, 120) + z * np.array([1, 1, -1])
    result = susceptibility_correlation(table(values))
    assert result.value["label"].values.tolist() == ["together", "opposed", "opposed"]
    few = susceptibility_correlation(table(values[:60]))
    assert set(few.value["label"].values) == {"undetermined"}
    assert few.meta["needed"]["items_for_a_label"] == 100
    many = susceptibility_correlation(table(draws(6, 600, k=2), names=("a", "b")))
    assert many.value["label"].values.tolist() == ["unrelated"]


def test_invariances():
    values = draws(7, 50, 0.7)
    frame = table(values)
    first = susceptibility_correlation(frame, n_permutations=199)
    monotone = susceptibility_correlation(table(np.exp(values)), n_permutations=199)
    np.testing.assert_allclose(monotone.value, first.value, atol=1e-12)
    np.testing.assert_array_equal(monotone.value["p"], first.value["p"])
    turned = susceptibility_correlation(table(values * [-1, 1, 1]), n_permutations=199)
    np.testing.assert_allclose(turned.value, first.value * [-1, -1, 1], atol=1e-12)
    mixed = susceptibility_correlation(frame.sample(frac=1, random_state=0), n_permutations=199)
    found = zip(mixed.value["between"].values, mixed.value.values, strict=True)
    by_names = {frozenset(str(between).split(" ~ ")): float(rho) for between, rho in found}
    for between, rho in zip(first.value["between"].values, first.value, strict=True):
        assert by_names[frozenset(str(between).split(" ~ "))] == pytest.approx(float(rho))


def test_a_result_is_a_table_too(tmp_path):
    values, lengths = draws(8, 40), np.random.default_rng(0).normal(size=(40, 3))
    coords = {
        "item": [f"i{i}" for i in range(40)],
        "dimension": list(NAMES),
        "length": (("item", "dimension"), lengths),
    }
    given = Result("x", xr.DataArray(values, dims=("item", "dimension"), coords=coords), unit="reward")
    result = susceptibility_correlation(given, length="length", n_permutations=199)
    same = susceptibility_correlation(table(values, lengths), length="length", n_permutations=199)
    assert result.value.identical(same.value)
    back = load_result(result.save(tmp_path / "s.nc"))
    assert back.meta == result.meta and back.value.equals(result.value)


def test_constant_margins_and_perfect_ones_have_their_reasons():
    values = draws(9, 40)
    values[:, 1] = 3.0
    values[:, 2] = 2 * values[:, 0]
    result = susceptibility_correlation(table(values), n_permutations=199)
    assert np.isnan(result.value.sel(between=["a ~ b", "b ~ c"])).all() and "constant" in result.checks[-1].note
    assert float(result.value.sel(between="a ~ c")) == pytest.approx(1)
    assert np.isnan(result.low.sel(between="a ~ c"))


def test_a_missing_cell_is_named():
    frame = table(draws(0, 40)).drop(index=[4, 7])
    with pytest.raises(DataError, match="2 missing cells: i1 / b, i2 / b"):
        susceptibility_correlation(frame)


@pytest.mark.parametrize(
    ("frame", "settings", "words"),
    [
        (table(draws(0, 29)), {}, "at least 30 items"),
        (table(draws(0, 40, k=1), names=("a",)), {}, "2 dimensions"),
        (pd.concat([table(draws(0, 40)), table(draws(0, 40))[:1]]), {}, "there twice"),
        (table(draws(0, 40)).drop(columns="margin"), {}, "no margin"),
        (table(draws(0, 40)), {"length": "tokens"}, "no tokens"),
        (table(draws(0, 40)), {"length": "margin"}, "cannot be held fixed.*length='margin'"),
        (table(np.where(np.arange(120).reshape(40, 3) == 3, np.nan, 1.0)), {}, "i1 / a"),
        (table(draws(0, 40)), {"alpha": 1.5}, "out of range"),
        (table(draws(0, 40)), {"n_permutations": 5}, "out of range"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(frame, settings, words):
    with pytest.raises(DataError, match=words):
        susceptibility_correlation(frame, **settings)
