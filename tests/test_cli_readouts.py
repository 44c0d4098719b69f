"""Commands for rewards of other readouts, and the options of loading that every command with a model has."""

import json

import pytest
import torch

import published_heads
import reward_lens as rl
from encoders import tiny_encoder
from families import TEXT_PAIRS, tiny_tokenizer
from language_models import JUDGE, PAIR_JUDGE, tiny_language_model
from reward_lens.cli.loading import readout_of
from step_models import SOLUTIONS, published
from test_cli import run

YES = {"positive": "A", "negative": "B", "template": JUDGE}
PLAIN = [pair for pair in TEXT_PAIRS if isinstance(pair[0], str)]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("language_model"), *tiny_language_model("llama", seed=1))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in PLAIN))
    return str(path)


def saved(folder, module, tokenizer) -> str:
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def solutions(folder, column: str = "steps") -> str:
    path = folder / "solutions.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, column: steps, "id": f"s{i}"})
                              for i, (p, steps) in enumerate(SOLUTIONS)))  # fmt: skip
    return str(path)


@pytest.mark.parametrize("command", ["steps", "judge", "implicit"])
def test_help_has_an_example(command):
    said = " ".join(run(command, "--help").output.split())
    assert f"Example: reward-lens {command}" in said and "Loading the model" in said


@pytest.mark.parametrize("column", ["steps", "completions"])
def test_steps_prints_the_reward_of_every_step(tmp_path, column):
    module, tokenizer, readout = published("math-shepherd")
    folder = saved(tmp_path / "model", module, tokenizer)
    printed = run("steps", folder, solutions(tmp_path, column), "--readout", "math-shepherd").output
    expected = rl.step_rewards(rl.step_model(module, tokenizer, readout), [tuple(s) for s in SOLUTIONS]).value
    assert f"{float(expected[0, 0]):8.3f}  p {float(expected.probability[0, 0]):.3f}  {SOLUTIONS[0][1][0]}" in printed
    body = json.loads(run("steps", folder, solutions(tmp_path), "--readout", "math-shepherd", "--what", "lens",
                          "--json", "--limit", "1").stdout)  # fmt: skip
    assert body["name"] == "step_lens" and {row["depth"] for row in body["values"]} == {0, 1, 2, 3}


def test_solutions_of_a_file_are_checked(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "steps": ["b"]}\n{"prompt": "a", "steps": "b"}\n')
    with pytest.raises(rl.DataError, match=r"bad.jsonl, line 2.*steps"):
        rl.load_solutions(path)
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(rl.DataError, match=r"line 1.*'steps'.*no such column"):
        rl.load_solutions(path)


def test_a_readout_is_named_or_written_as_json_or_in_a_file(language_model, tmp_path):
    module, tokenizer = tiny_language_model("llama", seed=1)
    rm = rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(**YES))
    expected = rm.score("What is 2 + 2?", "It is 4.")
    for readout in (json.dumps(YES), str(tmp_path / "judge.json")):
        (tmp_path / "judge.json").write_text(json.dumps(YES))
        command = ("score", "What is 2 + 2?", "It is 4.", "--model", language_model, "--readout", readout)
        assert float(run(*command).stdout) == pytest.approx(expected, abs=1e-5)


def test_readouts_that_are_none(tmp_path):
    with pytest.raises(rl.DataError, match=r"no field 'positive'.*StepReadout has"):
        readout_of('{"marker": "+"}')
    with pytest.raises(rl.DataError, match="unknown fields postive"):
        readout_of('{"postive": "A"}')
    with pytest.raises(rl.DataError, match="one of .*math-shepherd"):
        readout_of("math_shepherd")
    with pytest.raises(rl.DataError, match="JSONDecodeError"):
        readout_of("{positive: A}")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(rl.DataError, match="no object"):
        readout_of(str(tmp_path / "list.json"))


@pytest.mark.parametrize(("command", "said"), [("steps", "math-shepherd"), ("judge", "{a} and {b}")])
def test_a_command_without_its_readout_says_so_before_the_model_is_loaded(command, said, tmp_path):
    refused = " ".join(
        run(command, "nowhere", solutions(tmp_path) if command == "steps" else "demo", code=1).stderr.split()
    )
    assert "Found: no --readout" in refused and said in refused


def test_judge_prints_shares_with_intervals(language_model, pairs):
    readout = json.dumps({"positive": "A", "negative": "B", "template": PAIR_JUDGE})
    printed = run("judge", language_model, pairs, "--readout", readout).output
    for share in ("accuracy", "consistent", "says_a"):
        assert f"{share}: " in printed
    refused = run("judge", language_model, pairs, "--readout", json.dumps(YES), code=1)
    assert "no judge of pairs" in " ".join(refused.stderr.split())


def test_implicit_reads_both_models(language_model, pairs, tmp_path):
    reference = saved(tmp_path / "reference", *tiny_language_model("llama", seed=2, tokenizer=tiny_tokenizer()))
    printed = run("implicit", language_model, reference, pairs, "--beta", "0.3", "-o", str(tmp_path / "r.nc")).output
    assert "accuracy (sum): " in printed
    expected = rl.implicit_reward(language_model, reference, [rl.Pair(*p) for p in PLAIN], beta=0.3)
    assert rl.load_result(tmp_path / "r.nc").value.equals(expected.value)
    for what, dimension in (("lens", "depth"), ("contributions", "component"), ("tokens", "position")):
        body = json.loads(run("implicit", language_model, reference, pairs, "--what", what, "--limit", "1",
                              "--json").stdout)  # fmt: skip
        assert dimension in body["values"][0]


def test_precision_is_an_option(language_model):
    rl.load(language_model, readout=rl.VocabReadout(**YES), dtype=torch.bfloat16)
    printed = run("check", language_model, "--readout", json.dumps(YES), "--dtype", "bfloat16").output
    assert "bfloat16 on cpu" in printed


def test_report_on_a_model_with_other_answers_says_what_is_not_answered(tmp_path, pairs):
    """A gated head has no row for the vocabulary; an encoder reads no beginnings: the page has the rest and says so."""
    published_heads.save(tmp_path / "armo", "armo")
    saved(tmp_path / "encoder", *tiny_encoder("deberta"))
    for folder, missing in (("armo", ["vocabulary"]), ("encoder", ["lens_frozen_norm", "tokens_prefix", "vocabulary"])):
        result = run("report", str(tmp_path / folder), pairs, "-o", str(tmp_path / f"{folder}-out"))
        page = (tmp_path / f"{folder}-out" / "report.html").read_text()
        assert 'id="refused"' in page and "Not answered" in page
        for name in missing:
            assert f"Not answered: {name}: " in " ".join(result.stderr.split())
            assert f"<dt>{name[:1].upper()}{name[1:].replace('_', ' ')}</dt>" in page
            assert not (tmp_path / f"{folder}-out" / f"{name}.nc").exists()
        assert (tmp_path / f"{folder}-out" / "contributions.nc").exists()
        assert page.count("What to do:") >= len(missing)
