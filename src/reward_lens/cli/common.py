"""What all commands share: the application, options, loading, printing, and errors as sentences."""

import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import reward_lens as rl
from reward_lens.charts.rows import text_of
from reward_lens.cli.loading import given, quietly, readout_of, with_loading
from reward_lens.report.sections import interval_words

app = typer.Typer(
    help="Look inside reward models. MODEL is 'demo', a hub id, a folder or a PEFT adapter; PAIRS is 'demo', "
    "'diagnostic' or 'misalignment', a JSONL, Parquet or CSV file, a folder of `save_to_disk`, or a hub id.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
OTHER_FORMATS = (".csv", ".html", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".xlsx")
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
LEFT = (*COLUMNS, TimeRemainingColumn(), TextColumn("left"))  # where every step costs about the same


MODELS = "'demo', a hub id, a folder or a PEFT adapter."
Model = Annotated[str, typer.Argument(help=MODELS)]
ModelOption = Annotated[str, typer.Option(help=MODELS)]
Prompt = Annotated[str, typer.Argument(help="What the user asks.")]
Response = Annotated[str, typer.Argument(help="The response that is judged.")]
SOURCES = (
    "'demo', 'diagnostic', 'misalignment', a .jsonl, .json, .parquet or .csv file, a folder of save_to_disk, or a hub "
    "id."
)
PairsFile = Annotated[str, typer.Argument(help=SOURCES)]
Objective = Annotated[str | None, typer.Option(help="Row of a head with several, or one less another: 'good - bad'.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first N pairs.", min=1)]
Split = Annotated[str | None, typer.Option(help="Split of a data set that has several.")]
Truncation = Annotated[str | None, typer.Option(help="'left' or 'right' cuts over-long texts; default: refuse them.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]
Part = Annotated[
    str | None, typer.Option(help="'2/8': ask the second eighth of the pairs alone; see `reward-lens join`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def writable(path: Path | None) -> Path | None:
    """A file to write, tried before the work: what cannot be saved after it is lost."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written ({error}): name another place") from error
    return path


def result_file(path: Path | None) -> Path | None:
    """A file that a Result is saved to; a name that promises another format is refused."""
    if path is not None and path.suffix.lower() in OTHER_FORMATS:
        name = path.with_suffix(".nc").name
        raise typer.BadParameter(f"{path}: a Result is saved as netCDF, which {path.suffix} is not: name it {name}")
    return writable(path)


SAVED = "this file (netCDF; rl.load_result reads it)."
Save = Annotated[
    Path | None,
    typer.Option("--save", "-o", help=f"Also save the Result to {SAVED}", dir_okay=False, callback=result_file),
]
Top = Annotated[
    int, typer.Option(help="Largest cells that are listed; 0 lists none, and with --json prints all values.", min=0)
]


def refusals(command: Callable) -> Callable:
    """Print the library's own errors, and files that cannot be read or written, as sentences and leave with exit code
    1; a command that loads a model also gets the options of loading."""

    @wraps(command)
    def run(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):  # of another encoding than UTF-8: what it lacks is written as an escape
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        try:
            with pd.option_context("display.unicode.east_asian_width", True):  # columns of Chinese stand in line
                return command(*args, **kwargs)
        except BrokenPipeError:  # `| head` has seen enough: no error of a file, and left to Click, which goes silently
            raise
        except (rl.RewardLensError, OSError) as error:
            said = str(error) if isinstance(error, rl.RewardLensError) else _of_file(error)
            err.print(f"{type(error).__name__}: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return with_loading(command, run)


def _of_file(error: OSError) -> rl.DataError:
    return rl.DataError("A file or folder could not be used", found=str(error), expected="a path that can be used so",
                        do="check the path, the rights to it and the free space")  # fmt: skip


def load(model: str, objective: str | None = None, truncation: str | None = None) -> "rl.RewardModel":
    """`rl.load` with the settings of the command line, nothing else on the terminal."""
    quietly()
    asked = given.get()
    with err.status(f"Loading {model}"):
        return rl.load(model, objective=objective, truncation=truncation, readout=readout_of(asked.readout),
                       **asked.settings())  # fmt: skip


def load_both(
    model: str, pairs: str, split: str | None = None, limit: int | None = None, objective: str | None = None,
    truncation: str | None = None, part: str | None = None,
) -> tuple["rl.RewardModel", "rl.Pairs"]:  # fmt: skip
    """Model and pairs. The pairs are read first, so that a mistake in them costs no loading."""
    data = _part_of(load_pairs(pairs, split, limit), part)
    return load(model, objective, truncation), data


def load_pairs(pairs: str, split: str | None, limit: int | None) -> "rl.Pairs":
    """The pairs; what is odd about them is said."""
    data = rl.load_pairs(pairs, split=split, limit=limit)
    for note in data.notes:
        err.print(f"Note: {text_of([note])[0]}", markup=False, highlight=False, soft_wrap=True)
    return data


def _part_of(pairs: "rl.Pairs", part: str | None) -> "rl.Pairs":
    """The pairs of "K/N": the Kth of N stretches as long as each other, or all."""
    if part is None:
        return pairs
    number, _, of = part.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= len(pairs)):
        raise typer.BadParameter(f"{part!r}: expected K/N with K from 1 to N and N at most {len(pairs)}, the pairs")
    ends = [len(pairs) * i // int(of) for i in (int(number) - 1, int(number))]
    return pairs[slice(*ends)]


def say(text: str) -> None:
    """Print what holds texts of the data: a control character as its escape, which a terminal would obey or drop."""
    typer.echo(text_of([text])[0].replace("\r", "\\r"))


def show(result: "rl.Result", as_json: bool, save: Path | None = None, top: int | None = None) -> None:
    """Print a result as a table or as JSON, then save it: what cannot be saved has been seen."""
    if as_json:
        frame = result.top(top) if top else result.to_frame()
        checks = pd.DataFrame([dataclasses.asdict(c) for c in result.checks])  # pandas writes NaN and inf as null
        tables = {"values": frame, "checks": checks}
        if "mean" in result.dataset and not top:  # the means over pairs that the text form shows
            ends = [end for end in ("mean", "low", "high") if end in result.dataset]
            tables["summary"] = result.dataset[ends].to_dataframe().reset_index()
        body = {name: json.loads(str(table.to_json(orient="records"))) for name, table in tables.items()}
        meta = json.loads(json.dumps(result.meta), parse_constant=lambda _: None)
        body = {"name": result.name, "unit": result.unit, **body, "meta": meta}
        typer.echo(json.dumps(body, allow_nan=False))
    else:
        say(str(result))
        if top:
            largest = result.top(top)
            over = f", {interval_words(result)}" if "low" in largest else ""
            say(f"\nLargest {len(largest)} by absolute value{over}:\n{largest.to_string(index=False)}")
    if save is not None:
        result.save(save)
