"""The report command: every answer goes to a file at once, and a run that ended early can be gone on with."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import MofNCompleteColumn, Progress

import reward_lens as rl
from reward_lens.analysis import Question, questions
from reward_lens.cli.common import (
    COLUMNS,
    LEFT,
    OTHER_FORMATS,
    Limit,
    Model,
    Objective,
    PairsFile,
    Split,
    Truncation,
    app,
    err,
    load_both,
    refusals,
)

SAME = ("model", "revision", "dtype", "objective", "reads", "inputs_hash", "versions")


def report_folder(path: Path) -> Path:
    """A folder; a name that reads as the page's own is refused before a folder of that name holds everything."""
    if path.suffix.lower() in OTHER_FORMATS:
        raise typer.BadParameter(f"{path} names a file: name a folder, the page is written to report.html in it")
    return path


@app.command(epilog="Example: reward-lens report demo demo -o out/")
@refusals
def report(
    model: Model = "demo", pairs: PairsFile = "demo", split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the page and the results.", file_okay=False, callback=report_folder
        ),
    ] = Path("out"),
    resume: Annotated[bool, typer.Option("--resume", help="Take over what an earlier run left there.")] = False,
):  # fmt: skip
    """Run the whole analysis and write one offline HTML file, every Result beside it.

    A run that ends early (an interrupt, too little memory, a failed check) leaves a page of what it answered; the same
    command with --resume asks the rest. It scores the pairs first, and refuses the answers of another model or pairs.
    """
    output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is no reason to wait for the model
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    with Progress(*LEFT, console=err) as progress:
        task = progress.add_task(f"Scoring {len(data)} pairs", total=None)
        scores = rm.score_pairs(data, progress=lambda done, n: progress.update(task, completed=done, total=n))
    folder = AnswerFolder(output, scores, rm.noise_floor, resume)
    asked = questions(rm, data, scores)
    answers: dict[str, rl.Result | rl.RewardLensError] = {}
    try:
        _ask(asked, folder, answers)
    finally:  # hours of answers are worth a page, whatever ended the run
        if answers:
            _write(list(asked), answers, output / "report.html", f"{rm.name} on {data.source}")


def _ask(asked: Mapping[str, Question], folder: "AnswerFolder", answers: dict[str, rl.Result | rl.RewardLensError]):
    """Put the answer of every question, or the refusal in its place, into `answers` as it comes."""
    with Progress(*COLUMNS, MofNCompleteColumn(), console=err) as progress:
        task = progress.add_task("", total=len(asked))
        for name, ask in asked.items():
            progress.update(task, description=name)
            try:
                answers[name] = folder.answer(name, ask)
            except rl.CheckFailed:
                raise
            except rl.RewardLensError as refusal:  # asked again it would say the same
                answers[name] = refusal
            progress.advance(task)


def _write(asked: Sequence[str], answers: Mapping[str, rl.Result | rl.RewardLensError], path: Path, title: str) -> None:
    results = {name: answer for name, answer in answers.items() if isinstance(answer, rl.Result)}
    missing: dict[str, Exception] = {n: answer for n, answer in answers.items() if isinstance(answer, Exception)}
    if left := [name for name in asked if name not in answers]:
        missing |= dict.fromkeys(left, Exception(f"The run ended at {left[0]}; with --resume it goes on from there."))
    page = rl.write_report(results, path, title, missing)
    for name, why in missing.items():
        err.print(f"Not answered: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    typer.echo(f"Report: {page}")


class AnswerFolder:
    """Answers of one run, a file each. A run has a name, which each of its files carries: files that an earlier run of
    something else left in the folder are never taken for its own."""

    def __init__(self, folder: Path, scores: rl.Result, noise_floor: float, resume: bool):
        self.folder, self.run = folder, uuid.uuid4().hex
        before = folder / "scores.nc"
        self.resumes = resume and before.exists()
        if self.resumes:
            self.run = _same_run(rl.load_result(before), scores, noise_floor, folder)

    def answer(self, name: str, ask: Question) -> rl.Result:
        """The answer that this run has in its folder; else the question is asked and its answer saved."""
        path = self.folder / f"{name}.nc"
        if self.resumes and path.exists() and (saved := rl.load_result(path)).meta.get("run") == self.run:
            return saved
        answer = ask()
        answer.meta["run"] = self.run
        answer.save(path)
        return answer


def _same_run(saved: rl.Result, scores: rl.Result, noise_floor: float, folder: Path) -> str:
    """The name of the run that left `saved`, if it was of these pairs and a model with these rewards."""
    other = [key for key in SAME if saved.meta.get(key) != scores.meta.get(key)]
    if not other and np.abs(saved.value.values - scores.value.values).max() > noise_floor:
        other = ["rewards"]
    if other or "run" not in saved.meta:
        raise rl.DataError(
            f"The answers in {folder} cannot be gone on with",
            found=f"another {', '.join(other)}" if other else "scores without the name of a run",
            expected="answers of a run of this model on these pairs, by the same versions",
            do="name another folder with -o, or leave --resume out to ask every question again",
        )
    return saved.meta["run"]
