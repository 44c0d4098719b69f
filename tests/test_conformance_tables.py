"""The committed tables of `make conformance`: every model and method of the tests, no error, no gap over its limit."""

from pathlib import Path

import pandas as pd

from every_method import METHODS, READOUT_METHODS
from identities import MODELS, over_limit, precisions

ROOT = Path(__file__).parents[1]


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "benchmarks" / f"conformance_{name}.csv")


def test_every_model_and_every_method_has_an_outcome():
    methods = table("methods")
    assert set(methods["model"]) == set(MODELS), "run `make conformance`"
    assert {*METHODS, *READOUT_METHODS} <= set(methods.columns), "run `make conformance`"
    outcomes = methods[[*METHODS, *READOUT_METHODS]].stack()
    assert outcomes.str.match(r"holds \d|refused: \w").all()
    assert len(set(methods["class"])) > 100


def test_no_gap_is_over_its_limit():
    rows = table("identities").to_dict("records")
    assert not [(row["model"], gap) for row in rows for gap in over_limit(row, row["precision"])]
    assert {(row["model"], row["precision"]) for row in rows} == {(m, p) for m in MODELS for p in precisions(m)}


def test_the_page_of_models_has_a_row_a_model():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"| {name} | `" in page for name in MODELS)
