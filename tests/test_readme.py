"""The README is run: its sessions against the demo model, output compared; its `make` lines name targets. The cells
of the quickstart are run against a tiny model."""

import doctest
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import reward_lens as rl
from families import tiny_model
from reward_lens.analysis import questions

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


class CloseEnough(doctest.OutputChecker):
    """Text has to be equal; numbers to two decimals, and gaps under a tolerance of 1e-5 only to be as small.

    Another processor adds in another order, so the last digits are not the README's to promise.
    """

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        same_text = NUMBER.sub("#", want).split() == NUMBER.sub("#", got).split()
        numbers = [[float(x) for x in NUMBER.findall(text)] for text in (want, got)]
        return same_text and all(abs(a - b) <= 0.011 for a, b in zip(*numbers, strict=True))


def blocks(*languages: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def test_python_blocks_do_what_they_show(demo, tmp_path, monkeypatch):
    """One session from the first block to the last; `...` in an expected output stands for anything."""
    monkeypatch.chdir(tmp_path)  # a block may write files
    sessions = blocks("python")
    assert sessions, "README.md has no python block"
    parser, report = doctest.DocTestParser(), []
    runner = doctest.DocTestRunner(checker=CloseEnough(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names: dict[str, object] = {}
    for number, session in enumerate(sessions, 1):
        test = parser.get_doctest(session, names, f"block {number} of README.md", "README.md", 0)
        assert test.examples, f"block {number} has no >>> line, so nothing of it would be run:\n{session}"
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_the_quickstart_runs_to_its_last_cell(monkeypatch):
    cells = re.findall(
        r"^```\{code-cell\} python\n(.*?)^```", (ROOT / "docs" / "quickstart.md").read_text("utf-8"), re.M | re.S
    )
    rm = rl.RewardModel(*tiny_model("llama"))
    monkeypatch.setattr(rl, "load", lambda name: rm)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(SVG=Path))  # shows the file in a notebook
    names: dict[str, object] = {}
    for cell in cells:
        exec(cell, names)
    assert len(cells) > 5


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        target
        for block in blocks("bash", "sh", "console")
        for target in re.findall(r"^(?:\$ )?make\s+([\w-]+)", block, re.MULTILINE)
    }
    assert named, "README.md names no make target"
    assert named <= targets


def test_the_reading_guide_names_files_that_are_there_and_every_question_of_the_report():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`", text)
    missing = [n for n in named if not (ROOT / n).exists() and not (ROOT / "src" / "reward_lens" / n).exists()]
    assert missing == []
    rm, pairs = rl.RewardModel(*tiny_model("llama")), rl.load_pairs("demo")
    asked = questions(rm, pairs, rm.score_pairs(pairs))
    rows = re.findall(r"^\| (`\w+`.*?) \|", text, re.MULTILINE)
    asked |= {"pair_judge": None, "gate_weights": None}  # of the kinds of model that have them
    assert sorted(asked) == sorted(step for row in rows for step in re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_between_files_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
