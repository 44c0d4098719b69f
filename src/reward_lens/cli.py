"""The command line: each command is a few lines over the API. Errors in the house style, no tracebacks for them.

Exit codes: 0 done, 1 the library refused (model, data or a check), 2 the command line was wrong.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, cast

import pandas as pd
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import reward_lens as rl

app = typer.Typer(
    help="Look inside reward models. MODEL is 'demo', a hub id, a folder or a PEFT adapter; PAIRS is 'demo', a JSONL, "
    "Parquet or CSV file, or a hub id.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())

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
    with err.status(f"Loading {model}"):
        return rl.load(model, objective=objective, truncation=truncation)


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


@app.command(epilog="Example: reward-lens check Skywork/Skywork-Reward-V2-Llama-3.2-1B")
@refusals
def check(model: Model = "demo", objective: Objective = None, as_json: AsJson = False):
    """Load a reward model and print its load report: what was tested, the gaps, and what was found."""
    report = load(model, objective).load_report
    if as_json:
        return show(report, True)
    typer.echo(f"{report.meta['model']}: {report.meta['architecture']}, {report.meta['layers']} layers")
    for row in report.value:
        name, found = row["check"].item(), row.found.item()
        typer.echo(f"  {name:20} {float(row):9.1e} <= {float(row.tolerance):7.1e}  {found}")


@app.command(epilog="Example: reward-lens score 'What is 2 + 2?' 'It is 4.' --model demo")
@refusals
def score(
    prompt: str, response: str, model: Annotated[str, typer.Option()] = "demo", objective: Objective = None,
    as_json: AsJson = False,
):  # fmt: skip
    """Score one response to a prompt."""
    reward = load(model, objective).score(prompt, response)
    typer.echo(json.dumps({"model": model, "reward": reward}) if as_json else f"{reward:.6g}")


@app.command(epilog="Example: reward-lens accuracy demo pairs.jsonl --json")
@refusals
def accuracy(
    model: Model = "demo", pairs: PairsFile = "demo", split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """How often the chosen response wins, by subset and beside length-only rules."""
    rm = load(model, objective, truncation)
    show(rl.accuracy(rm, rl.load_pairs(pairs, split=split, limit=limit)), as_json, save)


@app.command(epilog="Example: reward-lens lens demo demo --norm frozen")
@refusals
def lens(
    model: Model = "demo", pairs: PairsFile = "demo", norm: str = "own", split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """The reward read off the residual stream at every depth."""
    rm = load(model, objective, truncation)
    show(rl.reward_lens(rm, rl.load_pairs(pairs, split=split, limit=limit), norm=cast(Any, norm)), as_json, save)


@app.command(epilog="Example: reward-lens attribute demo demo --by head --top 10")
@refusals
def attribute(
    model: Model = "demo", pairs: PairsFile = "demo", by: str = "component", top: int = 10, split: Split = None,
    limit: Limit = None, objective: Objective = None, truncation: Truncation = None, as_json: AsJson = False,
    save: Save = None,
):  # fmt: skip
    """Split rewards and margins exactly over components, heads, neurons or source tokens."""
    rm = load(model, objective, truncation)
    show(rl.contributions(rm, rl.load_pairs(pairs, split=split, limit=limit), by=cast(Any, by)), as_json, save, top)


@app.command(epilog="Example: reward-lens patch demo demo --sites heads --mode denoise --top 10")
@refusals
def patch(
    model: Model = "demo", pairs: PairsFile = "demo", sites: str = "components", mode: str = "noise",
    at: str = "final", path: str = "total", estimator: str = "exact",
    align: Annotated[str | None, typer.Option(help="'tail' or 'diff', for responses of different length.")] = None,
    top: int = 10, split: Split = None, limit: Limit = None, objective: Objective = None,
    truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """The causal effect of sites on the reward. SITES: components, heads, residual, or names such as L3.H5,L4.mlp."""
    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    named: Any = sites if sites in ("components", "heads", "residual") else sites.split(",")
    options: Any = {"mode": mode, "at": at, "path": path, "estimator": estimator, "align": align}
    with Progress(*COLUMNS, console=err) as bar:
        task = bar.add_task("Patching", total=len(data))
        show(
            rl.effects(rm, data, named, **options, progress=lambda n, _: bar.update(task, completed=n)),
            as_json,
            save,
            top,
        )


@app.command(epilog="Example: reward-lens agree demo demo --limit 12 --estimators gradient")
@refusals
def agree(
    model: Model = "demo", pairs: PairsFile = "demo", sites: str = "components", at: str = "final",
    align: Annotated[str | None, typer.Option(help="'tail' or 'diff', for responses of different length.")] = None,
    estimators: Annotated[str, typer.Option(help="Estimators to hold against exact effects, by commas.")] = "",
    controls: int = 1, split: Split = None, limit: Limit = None, objective: Objective = None,
    truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """How far contributions, direct and total effects agree, beside a copy with random weights."""
    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    named: Any = sites if sites in ("components", "heads") else sites.split(",")
    options: Any = {"at": at, "align": align, "estimators": [e for e in estimators.split(",") if e]}
    with err.status(f"Patching {len(data)} pairs"):
        result = rl.agreement(rm, data, named, controls=controls, **options)
    show(result, as_json, save)
    if not as_json:
        typer.echo(f"\nBy length:\n{rl.agreement_by_length(result)}")


@app.command(epilog="Example: reward-lens probe demo demo --probes pad,hedge,add_bold")
@refusals
def probe(
    model: Model = "demo", pairs: PairsFile = "demo",
    probes: Annotated[str, typer.Option(help="Edits by commas, families too; default: all.")] = "",
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """How much reward each edit of the responses buys, with p by Holm over the edits."""
    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    with err.status(f"Editing and scoring {2 * len(data)} responses"):
        result = rl.probe_hacking(rm, data, [name for name in probes.split(",") if name] or None)
    if as_json:
        return show(result, True, save)
    columns = ["changes", "shift_sd", "p_holm", "net", "net_p_holm", "flips", "n_prompts"]
    table = result.dataset[["mean", "low", "high"]].to_dataframe().rename(columns={"mean": "shift"})
    typer.echo(table[["shift", "low", "high", *columns]].to_string(float_format=lambda x: f"{x:.3g}"))
    typer.echo(f"\nWithin-prompt SD {result.meta['within_prompt_sd']:.3g}; prompts needed for a shift of half an SD of "
               f"shifts: {result.meta['prompts_needed']['n']}")  # fmt: skip
    if save is not None:
        result.save(save)


@app.command(epilog="Example: reward-lens edit demo diagnostic --remove pad_4 -o edited/")
@refusals
def edit(
    output: Annotated[Path, typer.Option("-o", "--output", help="Empty folder for the edited checkpoint.")],
    remove: Annotated[str, typer.Option(help="The edit whose direction is taken out of the head.")],
    model: Model = "demo", pairs: PairsFile = "demo", alpha: float = 1.0, split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None,
    save: Annotated[Path | None, typer.Option("--save", help="Also save the table of before and after.")] = None,
):  # fmt: skip
    """Take the direction of an edit out of the reward head and write a checkpoint that transformers loads.

    The direction comes from every second pair; probes and accuracy before and after are of the others.
    """
    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    fit, test = rl.Pairs(data[::2]), rl.Pairs(data[1::2])
    (chosen,) = rl.edits_of([remove])
    with err.status("Finding the direction"):
        direction = rl.bias_direction(rm, rl.edited_pairs(fit, chosen))
        edited = rl.edit_head(rm, direction, alpha)
    with err.status("Probing before and after"):
        outcome = rl.evaluate_edit(rm, edited, test, {pairs: test})
    edited.save_pretrained(output)
    reliability = direction.meta["reliability"]
    typer.echo(f"Direction of {remove}: reliability {reliability['value']:.2f}, {direction.meta['n_prompts']} prompts")
    show(outcome, False, save)
    typer.echo(f"Checkpoint: {output}")


@app.command(epilog="Example: reward-lens pressure samples.parquet --save pressure.nc")
@refusals
def pressure(
    samples: Annotated[Path, typer.Argument(help="Columns prompt, response, reward and, if there is one, gold.")],
    model: Annotated[str | None, typer.Option(help="Scores the samples where there is no column reward.")] = None,
    n_max: int | None = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """What choosing the best of n by this reward chooses besides: length, layout, hedging, and the gold score."""
    rm = load(model) if model else None
    result = rl.optimisation_pressure(samples, rm, n_max=n_max)
    show(result, as_json, save)
    if not as_json:
        turn = result.meta["gold_turns_down"]
        typer.echo(f"\nGold turns down at n = {turn['n']}" if turn["n"] else f"\nGold: {turn['reason']}")


@app.command(epilog="Example: reward-lens benchmark demo demo diagnostic --styles rm_bench.jsonl")
@refusals
def benchmark(
    model: Annotated[str, typer.Argument(help="'demo', a hub id, a folder or a PEFT adapter.")],
    sources: Annotated[list[str], typer.Argument(help="Sets of pairs: names, files or hub ids.")],
    styles: Annotated[list[str] | None, typer.Option(help="RM-Bench-shaped sets, three responses a side.")] = None,
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
):  # fmt: skip
    """Accuracy on several sets, beside the rule that the longer response wins, with intervals over prompts."""
    rm = load(model, objective, truncation)
    rows = []
    for source in sources:
        found = rl.accuracy(rm, rl.load_pairs(source, split=split, limit=limit)).dataset
        for subset in ("all", "balanced"):
            cell = found.sel(subset=subset, rule="reward model")
            longer = float(found["value"].sel(subset=subset, rule="longer wins"))
            rows.append([f"{source}: {subset}", *(float(cell[k]) for k in ("value", "low", "high")), longer,
                         int(cell["n_prompts"])])  # fmt: skip
    for source in styles or ():
        summary = rl.style_summary(rl.style_matrix(rm, rl.load_style_items(source, split=split, limit=limit))).dataset
        for name in summary["difficulty"].values:
            cell = summary.sel(difficulty=name)
            rows.append([f"{source}: {name}", *(float(cell[k]) for k in ("mean", "low", "high")), float("nan"),
                         summary.sizes["item"]])  # fmt: skip
    table = pd.DataFrame(rows, columns=["set", "accuracy", "low", "high", "longer wins", "prompts"])
    typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))


@app.command(epilog="Example: reward-lens compare demo ./edited --pairs diagnostic")
@refusals
def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more: 'demo', hub ids, folders or PEFT adapters.")],
    pairs: Annotated[str, typer.Option(help="'demo', a file, or a hub id.")] = "demo",
    split: Split = None, limit: Limit = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """Where models agree: preferences, rewards, where in depth the margin arises, and states."""
    data = rl.load_pairs(pairs, split=split, limit=limit)
    with err.status(f"Running {len(models)} models on {len(data)} pairs"):
        result = rl.compare({name: partial(load, name) for name in models}, data)
    show(result, as_json, save)
    if not as_json:
        typer.echo(f"\nLargest disagreements:\n{rl.disagreements(result, n=5).to_string(index=False)}")


@app.command(epilog="Example: reward-lens concepts demo concepts --null 20 --steered 5")
@refusals
def concepts(
    model: Model = "demo",
    texts: Annotated[str, typer.Argument(help="'concepts' or a file: concept, topic, text, polarity.")] = "concepts",
    null: Annotated[int, typer.Option(help="Random directions to steer along.", min=0)] = 200,
    steered: Annotated[int, typer.Option(help="Texts to steer on.", min=1)] = 20,
    depth: Annotated[int | None, typer.Option(help="Residual entering this block; default: two thirds.")] = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """Directions of concepts, which way the reward pays for each, and whether reading and steering agree."""
    rm, given = load(model), rl.load_concepts(texts)
    with err.status(f"Reading {len(given)} texts"):
        vectors = rl.concept_vectors(rm, given, depth=depth)
    with err.status("Steering"):
        result = rl.valuation(rm, vectors, given, n_null=null, n_texts=steered)
    if as_json:
        return show(result, True, save)
    table = result.dataset[["mean", "low", "high"]].to_dataframe().rename(columns={"mean": "causal"})
    columns = ["causal", "low", "high", "direct", "read", "sign", "sign_share", "auc"]
    typer.echo(table[columns].to_string(float_format=lambda x: f"{x:.3g}"))
    typer.echo(f"\n{result.meta['shows']}")
    if save is not None:
        result.save(save)


@app.command(epilog="Example: reward-lens conflict demo demo --terms hedge,add_bold,exclaim")
@refusals
def conflict(
    terms: Annotated[str, typer.Option(help="Edits by commas: each is the term that pays for it.")],
    model: Model = "demo", pairs: PairsFile = "demo", split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """How the directions of several edits relate: aligned, orthogonal or in conflict, where the numbers decide."""
    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    chosen = {edit.name: rl.edited_pairs(data, edit) for edit in rl.edits_of(terms.split(","))}
    with err.status("Reading states"):
        result = rl.term_conflict(rm, chosen, tests=("direction",))
    show(result, as_json, save)


@app.command(epilog="Example: reward-lens cascade run.csv --control control.csv")
@refusals
def cascade(
    counts: Annotated[Path, typer.Argument(help="Columns step, episodes, hacks, and <name>, <name>_n an evaluation.")],
    control: Annotated[Path | None, typer.Option(help="The same of a run without hacking.")] = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """Onset of hacking over the checkpoints of a run, and what changes with it."""
    result = rl.detect_cascade(**rl.load_counts(counts), control=None if control is None else rl.load_counts(control))
    show(result, as_json, save)
    if not as_json:
        typer.echo(f"\n{result.meta['label'] or 'no label'}: {result.meta['reason']}")


@app.command(epilog="Example: reward-lens distortion demo diagnostic")
@refusals
def distortion(
    model: Model = "demo", pairs: PairsFile = "demo", lam: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """What the reward pays for attributes of the text, against what the pairs' labels pay for them."""
    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    with err.status(f"Editing and scoring {2 * len(data)} responses"):
        slopes = rl.sensitivity_slopes(rm, pairs=data)
    names = [str(name) for name in slopes.value["attribute"].values]
    show(rl.distortion_index(slopes, rl.fitted_weights(data, names), lam=lam), as_json, save)


@app.command(epilog="Example: reward-lens report demo demo -o out/")
@refusals
def report(
    model: Model = "demo", pairs: PairsFile = "demo", split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page and the results.")] = Path("out"),
):  # fmt: skip
    """Run the whole analysis and write one offline HTML file, every Result beside it."""
    from reward_lens.analysis import steps

    rm, data = load(model, objective, truncation), rl.load_pairs(pairs, split=split, limit=limit)
    results = {}
    with Progress(*COLUMNS, console=err) as progress:
        task = progress.add_task(f"{len(data)} pairs", total=None)
        for name, result in steps(rm, data):
            results[name] = result
            result.save(output / f"{name}.nc")
            progress.update(task, description=f"{result.meta['title']} done")
    for note in data.notes:
        err.print(f"Note: {note}", markup=False)
    page = rl.write_report(results, output / "report.html", title=f"{rm.name}: reward model report")
    typer.echo(f"Report: {page}")


if __name__ == "__main__":
    app()
