"""What all commands share: the application, options, loading, printing, and errors as sentences."""

import dataclasses
import json
import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

import reward_lens as rl

app = typer.Typer(
    help="Look inside reward models. MODEL is 'demo', a hub id, a folder or a PEFT adapter; PAIRS is 'demo', a JSONL, "
    "Parquet or CSV file, or a hub id.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
wanted_device: ContextVar[str | None] = ContextVar("wanted_device", default=None)
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())


@app.callback()
def settings(
    device: Annotated[
        str | None,
        typer.Option(help="'cpu', 'cuda', 'cuda:1', ...; default: a CUDA device if there is one.",
                     envvar="REWARD_LENS_DEVICE"),
    ] = None,
):  # fmt: skip
    wanted_device.set(device)


Model = Annotated[str, typer.Argument(help="'demo', a hub id, a folder or a PEFT adapter.")]
PairsFile = Annotated[str, typer.Argument(help="'demo', a .jsonl, .json, .parquet or .csv file, or a hub id.")]
Objective = Annotated[str | None, typer.Option(help="Row of a head with several.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first N pairs.", min=1)]
Split = Annotated[str | None, typer.Option(help="Split of a hub data set.")]
Truncation = Annotated[str | None, typer.Option(help="'left' or 'right' cuts over-long texts; default: refuse them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Save = Annotated[Path | None, typer.Option("--save", "-o", help="Also save the Result to this file.")]


def refusals(command: Callable) -> Callable:
    """Print the library's own errors as sentences and leave with exit code 1."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except rl.RewardLensError as error:
            err.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error

    return run


def load(model: str, objective: str | None = None, truncation: str | None = None) -> "rl.RewardModel":
    """`rl.load`, with transformers' own progress and advice kept off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    device = wanted_device.get() or ("cuda" if torch.cuda.is_available() else None)
    with err.status(f"Loading {model}"):
        return rl.load(model, device=device, objective=objective, truncation=truncation)


def show(result: "rl.Result", as_json: bool, save: Path | None = None, top: int | None = None) -> None:
    """Print a result as a table or as JSON, and save it."""
    if save is not None:
        result.save(save)
    if as_json:
        frame = result.top(top) if top else result.to_frame()
        checks = pd.DataFrame([dataclasses.asdict(c) for c in result.checks])  # pandas writes NaN and inf as null
        values, checks = (json.loads(str(table.to_json(orient="records"))) for table in (frame, checks))
        body = {"name": result.name, "unit": result.unit, "values": values, "checks": checks, "meta": result.meta}
        typer.echo(json.dumps(body, allow_nan=False))
    else:
        typer.echo(str(result))
        if top:
            typer.echo(f"\nLargest {top}:\n{result.top(top).to_string(index=False)}")
