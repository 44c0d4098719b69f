"""Published scores held against a model's: hits and misses, what is compared, and rows that are refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

import published_heads as published
import reward_lens as rl
from families import tiny_model
from reward_lens.cli import app
from reward_lens.data.golden import GoldenScore, golden_entries

PAGE = "https://example.org/card"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "tiny-rm"
    module, tokenizer = tiny_model("llama")
    module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rm(folder):
    return rl.load(folder)


def entry(expected: float, **more) -> dict:
    base = {"model": "someone/tiny-rm", "expected": expected, "tolerance": 0.01, "source": PAGE}
    return base | ({"prompt": "Hello", "response": "Hello to you."} if "text" not in more else {}) | more


def test_a_hit_and_a_miss(rm):
    score = rm.hf_score("Hello", "Hello to you.")
    result = rl.golden_scores(rm, [entry(score), entry(score + 0.5, precision="bfloat16"), entry(0.0, model="a/b")])
    assert result.value.dims == ("entry", "quantity") and result.value.shape == (2, 4)
    assert result.meta["misses"] == 1
    hit, miss = result.value.sel(entry=1), result.value.sel(entry=2)
    assert float(hit.sel(quantity="gap")) < 1e-4 and float(hit.sel(quantity="found")) == pytest.approx(score, abs=1e-4)
    assert float(miss.sel(quantity="gap")) == pytest.approx(0.5, abs=1e-4)
    assert hit.source.item() == PAGE and hit.text.item() == "Hello / Hello to you."
    assert miss.precision.item() == "bfloat16"


def test_a_raw_text_and_a_difference_of_two(rm):
    own = {}
    for text in ("Human: a", "Human: b"):
        ids = torch.tensor([rm.tokenizer.hf(text)["input_ids"]])
        with torch.no_grad():
            own[text] = float(rm.module(input_ids=ids).logits[0, 0])
    entries = [
        entry(own["Human: a"], text="Human: a"),
        entry(own["Human: a"] - own["Human: b"], text="Human: a", minus="Human: b"),
    ]
    assert rl.golden_scores(rm, entries).meta["misses"] == 0


def test_objectives_of_a_gated_head_are_their_own(tmp_path):
    rm = rl.load(published.save(tmp_path / "armo", "armo"))
    columns = published.published_columns(tmp_path / "armo", "armo", rm.tokenize("a", "b").ids)
    told = {"prompt": "a", "response": "b", "model": "x/armo"}
    entries = [entry(float(columns[0]), **told), entry(float(columns[2]), objective=rm.objectives[2], **told)]
    result = rl.golden_scores(rm, entries)
    assert result.meta["misses"] == 0 and list(result.value.objective.values) == ["reward", rm.objectives[2]]
    # the gated reward is what a score without an objective is of, whichever row the model was loaded by
    assert rl.golden_scores(rm.for_objective(rm.objectives[3]), entries).meta["misses"] == 0


def test_a_model_without_golden_scores_is_told(rm):
    with pytest.raises(rl.DataError, match="No golden score is kept for tiny-rm.*Skywork"):
        rl.golden_scores(rm)
    with pytest.raises(rl.DataError, match="No golden score is kept.*scores of no model"):
        rl.golden_scores(rm, [])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"model": "a/b"}, "entry 1: this is no golden score"),
        (entry(1.0, other=1), "this is no golden score"),
        (entry(float("nan")), "'expected'"),
        (entry(1.0, tolerance=0), "'tolerance'"),
        (entry(1.0, tolerance=True), "'tolerance'"),
        (entry(1.0, text="a", prompt="b", response="c"), "'text'"),
        (entry(1.0, response=None), "'text'"),
        (entry(1.0, text="a", prompt="b"), "prompt, text given"),
        (entry(1.0, text="a", response="b"), "response, text given"),
        (entry(1.0, minus="a"), "'text'"),
        (entry(1.0, source=" "), "'source'"),
        ("a text", "this is no golden score"),
    ],
)
def test_rows_that_are_refused(row, said):
    with pytest.raises(rl.DataError, match=said):
        golden_entries([row])


def test_revisions_that_are_known_must_agree():
    known = GoldenScore(**entry(1.0, revision="abc123"))
    assert known.of("someone/tiny-rm", None) and known.of("tiny-rm", "abc123def")
    assert not known.of("tiny-rm", "def") and not known.of("other/tiny-rm", None)


def test_what_comes_with_the_package_has_a_page_each():
    entries = golden_entries()
    assert len(entries) >= 16 and len({e.model for e in entries}) >= 7
    assert all(e.source.startswith("https://") and "/" in e.model for e in entries)


def test_check_compares_and_leaves_with_1_on_a_miss(folder, rm, tmp_path):
    score = rm.hf_score("Hello", "Hello to you.")
    for name, value, code in (("hit", score, 0), ("miss", score + 1, 1)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(entry(value)))
        done = CliRunner().invoke(app, ["check", str(folder), "--golden", "--entries", str(path)])
        assert done.exit_code == code, done.output
        assert "own reward" in done.output and f"Published scores: {code} of 1 past the tolerance" in done.output
        assert f"expected {value:9.4f}" in done.output and PAGE in done.output
        done = CliRunner().invoke(app, ["check", str(folder), "--entries", str(path), "--json"])
        assert done.exit_code == code and json.loads(done.stdout)["meta"]["misses"] == code
    done = CliRunner().invoke(app, ["check", str(folder), "--golden"])
    assert done.exit_code == 1 and "No golden score is kept for tiny-rm" in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["armo", "inf_orm", "urm"])
def test_check_prints_the_whole_report_of_every_kind_of_head(tmp_path, name):
    """Gated, a network, and weighed by the state itself."""
    done = CliRunner().invoke(app, ["check", str(published.save(tmp_path, name))])
    assert done.exit_code == 0, done.output
    for row in rl.load(tmp_path).load_report.value:
        assert row["check"].item() in done.output and row.found.item() in done.output
