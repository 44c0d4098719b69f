"""The command line on a tiny saved model: what it prints, what it writes, and how it refuses."""

import json
import os
import subprocess
import sys

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens.analysis import questions
from reward_lens.cli import app, reporting
from reward_lens.cli.common import SOURCES

COMMANDS = (
    "check",
    "score",
    "words",
    "accuracy",
    "lens",
    "attribute",
    "patch",
    "agree",
    "probe",
    "edit",
    "pressure",
    "benchmark",
    "compare",
    "concepts",
    "conflict",
    "cascade",
    "distortion",
    "join",
    "report",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    module, tokenizer = tiny_model("llama")
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    """A classifier of two labels."""
    folder = tmp_path_factory.mktemp("labels")
    for part in tiny_model("llama", num_labels=2):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": c, "rejected": r, "subset": "plain"} for p, c, r in TEXT_PAIRS]
    markup = {"prompt": "<script>alert(1)</script>", "chosen": "<b>bold</b>", "rejected": "</script>"}
    rows.append(markup | {"subset": "markup"})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: reward-lens {command}" in " ".join(run(command, "--help").output.split())


def test_every_argument_and_option_says_what_it_is():
    def unsaid(command, path=()):
        for name, sub in getattr(command, "commands", {}).items():
            yield from unsaid(sub, (*path, name))
        if not hasattr(command, "commands"):
            yield from ((*path, p.name) for p in command.params if not p.help)

    assert list(unsaid(typer.main.get_command(app))) == []


def test_the_sets_that_come_with_the_library_are_named():
    assert all(name in SOURCES for name in ("'demo'", "'diagnostic'", "'misalignment'"))


def test_a_reader_that_has_seen_enough_is_no_error_of_a_file(model, monkeypatch):
    def closed(*args, **kwargs):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("reward_lens.cli.looking.rl.RewardModel.score", closed)
    result = CliRunner().invoke(app, ["score", "a", "b", "--model", model])
    assert "could not be used" not in result.output and isinstance(result.exception, BrokenPipeError | SystemExit)


def test_what_the_terminal_cannot_write_is_an_escape(model):
    run = [sys.executable, "-m", "reward_lens", "words", "Say it", "caf\u00e9 \U0001f389", "--model", model]
    done = subprocess.run(run, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rb"caf\xe9 \U0001f389" in done.stdout


def test_check_prints_every_test_of_the_load_report(model):
    printed = run("check", model).output
    for name in ("own reward", "padding", "writes close", "decomposition", "replay", "head in checkpoint"):
        assert name in printed
    body = json.loads(run("check", model, "--json").stdout)
    assert body["name"] == "load_report" and {c["name"] for c in body["checks"]} >= {"own reward", "replay"}


def test_words_of_one_response(model, tmp_path):
    """Each word's loss of reward when it is left out, of this response alone; and the page of it."""
    prompt, response = "Hello", "Well, hello to you."
    asked = ("words", prompt, response, "--model", model)
    rm = rl.load(model)
    whole = rm.score(prompt, response)
    without = [rm.score(prompt, text) for text in ("Well, to you.", "Well, hello you.", "Well, hello to")]
    body = json.loads(run(*asked, "--json").stdout)
    values = [row["value"] for row in body["values"]]  # without the first word the text begins with a space
    assert len(values) == 4 and values[1:] == pytest.approx([whole - r for r in without], abs=1e-4)
    assert all(row["reward"] == pytest.approx(whole, abs=1e-4) for row in body["values"])
    page = tmp_path / "words.html"
    printed = run(*asked, "--html", str(page), "--save", str(tmp_path / "words.nc")).output
    assert f"reward {whole:.4g}"[:11] in printed and response in printed and "no sum is claimed" in printed
    assert "Token attribution (leave one out, by word)" in page.read_text()
    assert rl.load_result(tmp_path / "words.nc").value.dims == ("pair", "position")
    assert "There is no word to weigh" in run("words", prompt, " ", "--model", model, code=1).output


def test_score_is_the_models(model):
    prompt, response = "Hello", "Hello to you."
    expected = rl.load(model).score(prompt, response)
    assert float(run("score", prompt, response, "--model", model).stdout) == pytest.approx(expected, abs=1e-5)
    body = json.loads(run("score", prompt, response, "--model", model, "--json").stdout)
    assert body["reward"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ("accuracy",),
        ("lens", "--norm", "frozen"),
        ("attribute",),
        ("attribute", "--by", "head", "--top", "3"),
        ("patch",),
        ("patch", "--sites", "L0.H1,L1.mlp", "--mode", "denoise", "--at", "all", "--align", "tail"),
        ("patch", "--path", "direct"),
        ("patch", "--mode", "mean", "--reference", "demo", "--at", "response", "--by-position", "--sites", "L0.mlp"),
        ("attribute", "--by", "token", "--top", "2"),
        ("agree", "--controls", "0", "--estimators", "gradient"),
    ],
)
def test_results_as_table_json_and_file(model, pairs, tmp_path, arguments):
    command, *options = arguments
    printed = run(command, model, pairs, *options, "--save", str(tmp_path / "result.nc")).output
    saved = rl.load_result(tmp_path / "result.nc")
    assert saved.name.split("_")[0] in printed or saved.name in printed
    body = json.loads(run(command, model, pairs, *options, "--json").stdout)
    assert body["values"] and body["meta"]["inputs_hash"] == saved.meta["inputs_hash"]


def test_report_writes_one_page_and_every_result(model, pairs, tmp_path):
    printed = run("report", model, pairs, "-o", str(tmp_path / "out")).output
    page = tmp_path / "out" / "report.html"
    assert printed.strip().splitlines()[-1] == f"Report: {page}"
    html = page.read_text(encoding="utf-8")
    assert 500_000 < page.stat().st_size < 6_000_000
    assert "<script>alert(1)</script>" not in html and "&lt;script&gt;alert(1)" in html
    names = {path.stem for path in (tmp_path / "out").glob("*.nc")}
    assert {"load_report", "accuracy", "scores", "contributions", "heads", "lens_own_norm", "tokens_truncate"} <= names
    for name in names:
        rl.load_result(tmp_path / "out" / f"{name}.nc")


def test_a_report_that_ended_early_has_a_page_and_is_gone_on_with(model, pairs, tmp_path, monkeypatch):
    folder, whole = tmp_path / "out", tmp_path / "whole"
    asked: list[str] = []

    def ask_of(ending: str | None):
        """Questions that note that they were asked; one of them ends the run as Ctrl-C does."""

        def noted(name, ask):
            def answer():
                asked.append(name)
                if name == ending:
                    raise KeyboardInterrupt
                return ask()

            return answer

        return lambda *given: {name: noted(name, ask) for name, ask in questions(*given).items()}

    monkeypatch.setattr(reporting, "questions", ask_of("effects"))
    stopped = CliRunner().invoke(app, ["report", model, pairs, "-o", str(folder)])
    assert stopped.exit_code != 0 and "Report: " in stopped.output
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Contributions by component" in page and "The run ended at effects; with --resume" in page
    before = list(asked)
    assert before[-1] == "effects" and "agreement" not in before

    asked.clear()
    monkeypatch.setattr(reporting, "questions", ask_of(None))
    run("report", model, pairs, "-o", str(folder), "--resume")
    assert asked[0] == "effects" and not set(asked) & set(before[:-1])
    run("report", model, pairs, "-o", str(whole), "--resume")  # nothing there to go on with: it is a run like any other
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.nc"):
        assert rl.load_result(path).dataset.equals(rl.load_result(folder / path.name).dataset), path.name

    # Answers that another run left under the same names are not taken for this one's.
    stranger = rl.load_result(whole / "heads.nc")
    stranger.save(folder / "heads.nc")
    asked.clear()
    run("report", model, pairs, "-o", str(folder), "--resume")
    assert asked == ["heads"]


def test_a_question_that_cannot_be_answered_does_not_end_the_report(model, pairs, tmp_path, monkeypatch):
    refusal = rl.LoadError("The control has no place", found="a", expected="b", do="c")

    def ask_of(*given):
        asked = questions(*given)

        def refused():
            raise refusal

        return {"heads": refused, "accuracy": asked["accuracy"]}

    monkeypatch.setattr(reporting, "questions", ask_of)
    assert "Not answered: heads: The control has no place" in run("report", model, pairs, "-o", str(tmp_path)).stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The control has no place" in page and (tmp_path / "accuracy.nc").exists()


def test_a_report_whose_folder_cannot_be_says_so_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    said = run("report", "no-model", "demo", "-o", str(tmp_path / "file" / "out"), code=1).stderr
    assert "A file or folder could not be used" in said and "file/out" in said and "What to do: check the path" in said


def test_a_report_of_other_pairs_or_another_model_is_not_gone_on_with(model, pairs, tmp_path):
    folder = tmp_path / "out"
    run("report", model, pairs, "-o", str(folder), "--limit", "2")
    said = " ".join(run("report", model, pairs, "-o", str(folder), "--resume", code=1).stderr.split())
    assert "Found: another inputs_hash." in said and "What to do: name another folder with -o" in said

    scores = rl.load_result(folder / "scores.nc")
    scores.dataset["value"] += 1e-2  # the same names, other weights
    scores.save(folder / "scores.nc")
    said = run("report", model, pairs, "-o", str(folder), "--limit", "2", "--resume", code=1).stderr
    assert "Found: another rewards." in " ".join(said.split())


def test_refusals_are_sentences_with_exit_code_1(model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    result = run("accuracy", model, str(bad), code=1)
    said = " ".join(result.stderr.split())  # where a line breaks depends on the length of the path
    assert "DataError" in said and "line 1" in said and "What to do:" in said
    assert "Traceback" not in result.output
    assert "LoadError" in run("check", str(tmp_path), code=1).stderr
    assert "DataError" in run("lens", model, str(tmp_path / "none.jsonl"), code=1).stderr


def test_what_cannot_be_saved_has_been_printed(model, pairs, tmp_path, monkeypatch):
    """Paths that cannot be written: a sentence, after the answer or before the work, and no Python error."""
    place = str(tmp_path / "file" / "result.nc")

    def full(*_):
        raise OSError("No space left on device")

    for command in (("accuracy", model, pairs), ("lens", model, pairs), ("probe", model, pairs, "--probes", "hedge")):
        with monkeypatch.context() as patched:
            patched.setattr(rl.Result, "save", full)
            result = run(*command, "--save", str(tmp_path / "result.nc"), code=1)
        assert command[0] in result.stdout and "No space left" in result.stderr
    (tmp_path / "file").write_text("")
    for command in (("accuracy", model, pairs), ("lens", model, pairs), ("probe", model, pairs, "--probes", "hedge")):
        assert "File exists" in " ".join(run(*command, "--save", place, code=2).stderr.split())
    assert "directory" in run("accuracy", model, pairs, "--save", str(tmp_path), code=2).stderr
    run("report", model, pairs, "-o", str(tmp_path / "file"), code=2)
    run("sae", "explore", model, "no-dictionary", "-o", str(tmp_path), code=2)


def test_a_mistake_in_the_data_costs_no_model_and_what_is_odd_is_said(model, tmp_path):
    missing = str(tmp_path / "none.jsonl")
    for command in (("lens", "no-model", missing), ("patch", "no-model", missing), ("steps", "no-model", missing),
                    ("benchmark", "no-model", "demo", missing), ("judge", "no-model", missing)):  # fmt: skip
        assert "none.jsonl cannot be read" in " ".join(run(*command, code=1).stderr.split())
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": "a", "chosen": "b", "rejected": ""}\n' * 2)
    result = run("accuracy", model, str(odd))
    assert "Note: empty or blank response: 2 (1, 2)" in result.stderr and "95% intervals over prompts" in result.stdout
    assert result.stdout.splitlines()[3].split()[-2:] == ["2", "1"]  # pairs and prompts of all
    for command in (("benchmark", model, str(odd)), ("compare", model, "demo", "--pairs", str(odd)),
                    ("implicit", "no-model", "no-model", str(odd))):  # fmt: skip
        assert "Note: empty or blank response: 2 (1, 2)" in CliRunner().invoke(app, command).stderr


def test_a_file_that_cannot_be_saved_to_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for command, option, path, said in (
        ("accuracy", "--save", tmp_path / "file" / "r.nc", "cannot be written"),
        ("accuracy", "-o", tmp_path / "table.csv", "saved as netCDF, which .csv is not"),
        ("report", "-o", tmp_path / "page.html", "names a file: name a folder"),
    ):
        refused = run(command, "nowhere", "demo", option, str(path), code=2)  # 2: before the model is looked for
        assert said in " ".join(refused.stderr.replace("\u2502", " ").split())
    assert "cannot be written" in run("sae", "explore", "nowhere", "d", "-o", str(tmp_path / "file" / "p.html"),
                                      code=2).stderr  # fmt: skip


def test_the_device_is_an_option_and_a_variable(model, monkeypatch):
    assert "cpu" in run("check", model, "--device", "cpu").output
    monkeypatch.setenv("REWARD_LENS_DEVICE", "nowhere")
    assert "could not be moved to nowhere" in run("check", model, code=1).stderr


def test_the_attention_code_is_an_option(model):
    """What the load report's remedy asks for can be asked for on the command line."""
    assert "eager: nothing to hold it against" in run("check", model, "--attn-implementation", "eager").output
    said = " ".join(run("check", model, "--attn-implementation", "none", code=1).stderr.split())
    assert "LoadError" in said and "without attn_implementation= the class's own is used" in said


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "reward_lens", "lens", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "reward-lens lens [OPTIONS]" in done.stdout


def test_a_wrong_command_line_is_exit_code_2(model):
    run("accuracy", model, "--limit", "0", code=2)
    run("attribute", model, "--top", "-3", code=2)
    assert "'sideways'" in run("patch", model, "--mode", "sideways", code=2).output
    run("no-such-command", code=2)


def test_probe_prints_a_row_a_probe_and_saves(model, pairs, tmp_path):
    saved = tmp_path / "probes.nc"
    printed = run("probe", model, pairs, "--probes", "hedge,exclaim", "-o", str(saved)).output
    assert "hedge" in printed and "exclaim" in printed and "prompts needed" in printed
    assert rl.load_result(saved).name == "probe_hacking"
    body = json.loads(run("probe", model, pairs, "--probes", "hedge", "--json").stdout)
    assert body["name"] == "probe_hacking"
    assert [row["probe"] for row in body["summary"]] == ["hedge"] and {"mean", "low", "high"} <= set(body["summary"][0])
    body = json.loads(run("accuracy", model, pairs, "--json").stdout)
    assert "summary" not in body and {"value", "low", "high"} <= set(body["values"][0])
    assert "bulletise" in run("probe", model, pairs, "--probes", "bulletize", code=1).output


def test_edit_writes_a_checkpoint(model, tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": f"It is {i}. Yes.", "rejected": f"No {i}. So."} for i in range(16)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    folder = tmp_path / "edited"
    printed = run("edit", model, str(data), "--remove", "exclaim", "-o", str(folder)).output
    assert "reliability" in printed and "probe: exclaim" in printed.replace("\n", " ")
    assert rl.load(str(folder)).score("Hello", "Hello!") != rl.load(model).score("Hello", "Hello!")
    assert "not empty" in " ".join(
        run("edit", model, str(data), "--remove", "exclaim", "-o", str(folder), code=1).output.split()
    )


def test_a_sweep_in_parts(model, pairs, tmp_path):
    files = [str(tmp_path / f"{k}.nc") for k in (1, 2, 3)]
    for k, file in enumerate(files, 1):
        run("patch", model, pairs, "--part", f"{k}/3", "--save", file)
    whole = str(tmp_path / "whole.nc")
    run("patch", model, pairs, "--save", whole)
    printed = run("join", *files, "--save", str(tmp_path / "joined.nc")).output
    assert "Largest 7" in printed
    joined, once = rl.load_result(tmp_path / "joined.nc"), rl.load_result(whole)
    assert list(joined.value["pair"].values) == list(once.value["pair"].values)
    assert abs(joined.value - once.value).max() < 1e-5 and abs(joined.low - once.low).max() < 1e-5
    assert "is in two parts" in run("join", files[0], files[0], code=1).stderr
    alone = run("patch", "no-model", pairs, "--part", "1/3", "--mode", "mean", code=2)
    assert "name one --reference for all parts" in " ".join(alone.stderr.replace("│", "").split())
    for part in ("0/3", "4/3", "1/99", "half", "1/2/3"):
        assert "expected K/N" in " ".join(run("patch", "no-model", pairs, "--part", part, code=2).stderr.split())


def test_edit_refuses_before_the_work(tmp_path):
    (tmp_path / "taken").write_text("")
    folder = str(tmp_path / "edited")
    assert "family of edits" in run("edit", "no-model", "demo", "--remove", "pad", "-o", folder, code=2).stderr
    refused = run("edit", "no-model", "demo", "--remove", "pad_1", "-o", str(tmp_path), code=1).stderr
    assert "not empty" in " ".join(refused.split())
    run("edit", "no-model", "demo", "--remove", "pad_1", "-o", str(tmp_path / "taken"), code=2)


def test_agree_prints_the_random_weights(model, pairs):
    assert "random 1" in run("agree", model, pairs, "--limit", "3").output


def test_pressure_reads_scored_samples(labels, tmp_path):
    path = tmp_path / "samples.csv"
    rows = [f"q{p},answer {'long ' * k},{k + 0.1 * p}" for p in range(8) for k in range(4)]
    path.write_text("prompt,response,reward\n" + "\n".join(rows))
    assert "Gold: no column" in run("pressure", str(path)).output
    assert json.loads(run("pressure", str(path), "--json").stdout)["name"] == "optimisation_pressure"
    unscored = tmp_path / "unscored.csv"
    unscored.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    asked = ("pressure", str(unscored), "--model", labels, "--objective", "1 - 0", "--json")
    assert json.loads(run(*asked).stdout)["meta"]["objective"] == "LABEL_1 - LABEL_0"


def test_benchmark_prints_a_row_a_set(model, pairs):
    printed = run("benchmark", model, pairs, pairs).output
    assert printed.count(": all") == 2 and printed.count(": balanced") == 2


def test_benchmark_counts_the_prompts_of_styled_sets(model, pairs, tmp_path):
    styled = tmp_path / "styled.jsonl"
    items = [{"prompt": f"Is {i % 2} odd?", "chosen": ["yes", "yes, so", f"**yes** {i}"],
              "rejected": ["no", "no, so", "**no**"]} for i in range(5)]  # fmt: skip
    styled.write_text("\n".join(map(json.dumps, items)))
    rows = run("benchmark", model, pairs, "--styles", str(styled)).output.splitlines()
    assert [row.split()[-1] for row in rows if ": overall" in row] == ["2"]  # five items of two prompts


def test_compare_prints_every_two_models(model, labels, pairs, tmp_path):
    saved = tmp_path / "compared.nc"
    printed = run("compare", model, "demo", "--pairs", pairs, "--limit", "8", "-o", str(saved)).output
    assert "agreement" in printed and "Largest disagreements" in printed
    assert rl.load_result(saved).name == "compare"
    agreeing = run("compare", model, f"{model}/.", "--pairs", pairs, "--limit", "8").output
    assert agreeing.rstrip().endswith("within prompts:\nnone")
    assert "models" in run("compare", model, "--pairs", pairs, code=1).output
    again = ("compare", labels, f"{labels}/.", "--pairs", pairs, "--limit", "8")
    body = json.loads(run(*again, "--objective", "1 - 0", "--json").stdout)
    assert {one["objective"] for one in body["meta"]["models"].values()} == {"LABEL_1 - LABEL_0"}
    assert "none was chosen" in run(*again, code=1).output


def test_concepts_prints_a_row_a_concept_and_position(model, labels, tmp_path):
    texts = tmp_path / "concepts.jsonl"
    topics = ("bread", "trains", "chess", "rain", "paint", "cats", "tea", "maps")
    said = {
        "joy": ("a delight", "a bore"),
        "haste": ("at once", "in time"),
        "doubt": ("maybe", "surely"),
        "neutral": "is",
    }
    lines = [
        {"concept": c, "topic": t, "text": f"Of {t}: {word}.", "polarity": polarity}
        for c, words in said.items()
        for t in topics
        for polarity, word in zip(("positive", "negative"), words if c != "neutral" else ("fine",), strict=False)
    ]
    texts.write_text("\n".join(json.dumps(row) for row in lines))
    few = (str(texts), "--null", "8", "--steered", "3")
    printed = run("concepts", model, *few).output
    assert "joy" in printed and "agree over 3 concepts" in printed and "random directions agree with r" in printed
    texts.write_text("\n".join(json.dumps(row) for row in lines if row["concept"] != "neutral"))
    assert "denoise_var=0" in run("concepts", model, *few, code=1).output
    few = (*few, "--denoise-var", "0")
    body = json.loads(run("concepts", labels, *few, "--objective", "1 - 0", "--json").stdout)
    assert body["meta"]["objective"] == "LABEL_1 - LABEL_0"


def test_conflict_prints_labels(model):
    printed = run("conflict", model, "demo", "--terms", "exclaim,hedge", "--limit", "12").output
    assert "exclaim" in printed and "direction" in printed and "exclaim ~ hedge: " in printed


def test_cascade_reads_counts(tmp_path):
    table = tmp_path / "run.csv"
    lines = ["step,episodes,hacks,lying,lying_n"]
    lines += [f"{10 * i},200,{1 if i < 8 else 60},{2 if i < 8 else 50},100" for i in range(16)]
    table.write_text("\n".join(lines))
    assert "hacking" in run("cascade", str(table)).output
    assert json.loads(run("cascade", str(table), "--json").stdout)["name"] == "detect_cascade"
    table.write_text(table.read_text().replace("lying_n", "n"))
    assert "no column lying_n" in run("cascade", str(table), code=1).output.replace("\n", " ")


def test_distortion_takes_weights(model):
    options = ("--truncation", "right", "--limit", "12", "--weights")
    printed = run("distortion", model, "demo", *options, "words=1,hedges_per_100_words=2").output
    assert "words" in printed and "hedges_per_100_words" in printed
    swapped = run("distortion", model, "demo", *options, "hedges_per_100_words=2,words=1").output
    assert swapped == printed  # a weight belongs to its name, not to its place
    assert "twice" in run("distortion", model, "demo", *options, "words=1,words=2", code=2).output
    assert "expected name=number" in run("distortion", model, "demo", *options, "words=many", code=2).output
    some = ("--attributes", "words,hedges_per_100_words")
    assert run("distortion", model, "demo", *options, "hedges_per_100_words=2,words=1", *some).output == printed
    assert "expected" in run("distortion", model, "demo", *options, "words=1", *some, code=2).output
    fitted = run("distortion", model, "demo", "--truncation", "right", *some).output
    assert "hedges_per_100_words" in fitted and "list_items" not in fitted
    refused = run("distortion", model, "demo", "--truncation", "right", "--limit", "12", code=1).output
    assert "DataError" in refused  # twelve pairs do not determine five weights


# --- dictionaries


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> str:
    """Sixteen prompts, so that a held-out part has intervals."""
    path = tmp_path_factory.mktemp("varied") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"How many are {i} and {i + 1}?",
            "chosen": f"They are {2 * i + 1}, as {i} is one less than {i + 1}.",
            "rejected": f"I am not sure, perhaps {i}.",
        }
        for i in range(16)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def dictionary(model, varied, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dictionary") / "sae"
    options = ("--site", "L2.resid_post", "--d-sae", "48", "--k", "4", "--n-train", "6400", "--pairs", varied)
    result = run("sae", "train", model, *options, "--held-out", "0.5", "-o", str(folder))
    said = " ".join(result.output.split())
    assert "samples of 16 texts" in " ".join(result.stderr.split()) and "MiB" in result.stderr
    assert "8 prompts that were held out" in said and "reward_recovered" in said and "completeness" not in said
    return str(folder)


@pytest.mark.parametrize("command", ["train", "eval", "explore"])
def test_help_of_dictionaries_has_an_example(command):
    assert f"Example: reward-lens sae {command}" in " ".join(run("sae", command, "--help").output.split())


def test_a_dictionary_is_trained_on_some_prompts_and_its_training_goes_on(model, varied, dictionary, tmp_path):
    sae = rl.SAE.load(dictionary)
    assert (sae.d_sae, sae.site, sae.meta["k"], sae.meta["held_out"]) == (48, "L2.resid_post", 4, 0.5)
    folder = tmp_path / "sae"
    options = ["sae", "train", model, "--site", "L2.resid_post", "--d-sae", "48", "--k", "4", "--n-train", "6400"]
    options += ["--pairs", varied, "--held-out", "0.5", "-o", str(folder)]
    body = json.loads(run(*options, "--json", "--save", str(tmp_path / "report.nc")).stdout)
    assert body["name"] == "sae_report" == rl.load_result(tmp_path / "report.nc").name
    assert body["meta"]["n_prompts"] == 8
    (folder / "sae_weights.safetensors").unlink()  # as if stopped just before the end
    run(*options)
    for name, weight in rl.SAE.load(folder).state_dict().items():
        assert weight.equal(sae.state_dict()[name]), name
    refused = run(*options, "--variant", "topk", code=1).stderr
    assert "another training" in " ".join(refused.split())


def test_training_on_all_prompts_says_so_and_seeds_hold_out_the_same(model, varied, dictionary, tmp_path):
    options = ["sae", "train", model, "--site", "L2.resid_post", "--d-sae", "48", "--k", "4", "--n-train", "640"]
    options += ["--pairs", varied]
    said = run(*options, "--held-out", "0", "-o", str(tmp_path / "all")).output
    assert "16 prompts it was trained on, which flatters it" in said
    run(*options, "--held-out", "0.5", "--seed", "1", "-o", str(tmp_path / "other"))
    hashes = {rl.SAE.load(f).meta["store"]["inputs_hash"] for f in (dictionary, tmp_path / "other")}
    assert len(hashes) == 1
    run(*options, "--site", "L1.H0", "-o", str(tmp_path / "heads"), code=2)
    assert not (tmp_path / "heads").exists()


def test_a_dictionary_is_measured_beside_another_seed(model, varied, dictionary, tmp_path):
    saved = tmp_path / "report.nc"
    printed = run("sae", "eval", model, dictionary, "--pairs", varied, "--seeds", dictionary, "--save", str(saved))
    assert "100% (" in printed.output and "clean row gap" in printed.output
    assert len(rl.load_result(saved).meta["stability"]) == 1
    body = json.loads(run("sae", "eval", model, dictionary, "--pairs", varied, "--limit", "4", "--json").stdout)
    assert body["name"] == "sae_report" and body["meta"]["n_pairs"] == 4
    assert "LoadError" in run("sae", "eval", model, str(tmp_path / "none"), code=1).stderr
    assert "DataError" in run("sae", "eval", model, dictionary, "--site", "L0.mlp", "--pairs", varied, code=1).stderr


def test_a_dictionary_of_another_model_is_noted(model, varied, dictionary, tmp_path):
    module, tokenizer = tiny_model("llama", seed=3)
    module.save_pretrained(tmp_path / "another")
    tokenizer.save_pretrained(tmp_path / "another")
    for name, noted in ((model, False), (str(tmp_path / "another"), True)):
        said = run("sae", "eval", name, dictionary, "--pairs", varied, "--limit", "2").stderr
        assert ("the dictionary was trained on" in said and "this is another" in said) == noted


def test_a_release_is_a_folder_in_a_folder(model, varied, dictionary):
    whole, name = dictionary.rsplit("/", 1)
    found = [
        json.loads(run("sae", "eval", model, *where, "--pairs", varied, "--json").stdout)
        for where in ((dictionary,), (whole, "--subfolder", name))
    ]
    assert found[0]["values"] == found[1]["values"]


def test_explore_writes_a_page_and_its_results(model, varied, dictionary, tmp_path):
    page, results = tmp_path / "latents.html", tmp_path / "results"
    options = ("--pairs", varied, "--latents", "6", "--tested", "2", "--contexts", "3", "-o", str(page))
    printed = run("sae", "explore", model, dictionary, *options, "--save", str(results)).output
    assert f"Latents: {page}" in printed.replace("\n", "")
    again = rl.write_explorer([rl.load_result(path) for path in results.glob("*.nc")], tmp_path / "again.html")
    assert len(list(results.glob("*.nc"))) == 5 and again.stat().st_size > 20_000
    run("sae", "explore", model, dictionary, "--at", "nowhere", code=2)
    run("sae", "explore", model, dictionary, "--latents", "0", code=2)
    few = run("sae", "explore", model, dictionary, "--limit", "1", *options, code=1).stderr
    assert "cannot be screened and tested" in " ".join(few.split())


def test_only_json_is_printed_where_json_is_asked_for(model, tmp_path):
    """A page beside it, or a number in its provenance that is none, is not in its way."""
    page = tmp_path / "words.html"
    asked = run("words", "Hello", "Hello to you.", "--model", model, "--json", "--html", str(page))
    assert json.loads(asked.stdout)["name"] == "token_attribution" and page.exists()
    rows = [{"prompt": f"Question {i}?", "chosen": "The same.", "rejected": "The same."} for i in range(2)]
    pairs = tmp_path / "same.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    asked = run("probe", model, str(pairs), "--probes", "hedge", "--json")
    assert json.loads(asked.stdout, parse_constant=pytest.fail)["meta"]["within_prompt_sd"] is None


def test_a_terminal_gets_no_control_characters_of_the_data(model, tmp_path):
    printed = run("words", "Hello", "a\x1b[31mred\x9b0m b\a\rc", "--model", model).output
    table = printed.split("by absolute value")[1]
    assert "\\u001b[31mred" in table and "\\u009b0m" in printed and "\\u0007\\rc" in printed
    wide = run("words", "Hello", "\u6771\u4eac \u3067\u3059 ok", "--model", model).output.split("by absolute value")[1]
    assert len({cell_len(line) for line in wide.splitlines()[1:4]}) == 1  # numbers stand below each other
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        json.dumps({"prompt": "p", "chosen": "a", "rejected": "a", "id": "i\x1b]0;t\a", "subset": "s\x1b[2J"})
    )
    asked = run("accuracy", model, str(pairs))
    assert "s\\u001b[2J" in asked.stdout and "i\\u001b]0;t\\u0007" in asked.stderr
