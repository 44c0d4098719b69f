"""Commands that look at one model: its load report, scores, lens, attribution, patching."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

import reward_lens as rl
from reward_lens.cli.common import (
    LEFT,
    AsJson,
    Limit,
    Model,
    ModelOption,
    Objective,
    PairsFile,
    Part,
    Prompt,
    Response,
    Save,
    Split,
    Top,
    Truncation,
    app,
    err,
    load,
    load_both,
    load_pairs,
    refusals,
    say,
    show,
)
from reward_lens.report.sections import interval_words


@app.command(epilog="Example: reward-lens check Skywork/Skywork-Reward-V2-Llama-3.2-1B")
@refusals
def check(
    model: Model = "demo", objective: Objective = None, as_json: AsJson = False,
    golden: Annotated[bool, typer.Option("--golden", help="Also compare the scores that its authors printed.")] = False,
    entries: Annotated[Path | None, typer.Option(help="Golden scores from this JSON lines file instead.")] = None,
):  # fmt: skip
    """Load a reward model and print its load report: what was tested, the gaps, and what was found.

    With --golden (or --entries) also its published scores beside those it gives here (with --json these alone); exit
    code 1 where one is past its tolerance, or none is kept for this model.
    """
    rm = load(model, objective)
    compared = golden or entries is not None
    if not (compared and as_json):
        _print_report(rm.load_report, as_json)
    if compared:
        scores = rl.golden_scores(rm, entries)
        if as_json:
            show(scores, True)
        else:
            _print_golden(scores)
        if scores.meta["misses"]:
            raise typer.Exit(1)


def _print_report(report: "rl.Result", as_json: bool) -> None:
    if as_json:
        return show(report, True)
    m = report.meta
    typer.echo(f"{m['model']}: {m['architecture']}, {m['layers']} layers, {m['dtype']} on {m['device']}")
    for row in report.value:
        name, found = row["check"].item(), row.found.item()
        typer.echo(f"  {name:20} {float(row):9.1e} <= {float(row.tolerance):7.1e}  {found}")


def _print_golden(scores: "rl.Result") -> None:
    typer.echo(f"Published scores: {scores.meta['misses']} of {len(scores.value)} past the tolerance")
    for entry in scores.value:
        expected, found, gap, tolerance = map(float, entry)
        sign = "<=" if gap <= tolerance else "> "
        typer.echo(f"  {entry.objective.item():12} expected {expected:9.4f}  found {found:9.4f}  gap {gap:8.4f} {sign} "
                   f"{tolerance:g}  {entry.text.item()}  ({entry.source.item()})")  # fmt: skip


@app.command(epilog="Example: reward-lens score 'What is 2 + 2?' 'It is 4.' --model demo")
@refusals
def score(
    prompt: Prompt, response: Response, model: ModelOption = "demo", objective: Objective = None,
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
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    result = rl.accuracy(rm, data)
    if as_json:
        return show(result, True, save)
    table = result.value.to_series().unstack("rule")[list(result.value["rule"].values)]
    table = table.reindex(result.value["subset"].values)
    own = result.dataset.sel(rule="reward model")
    for place, name in enumerate(("low", "high"), start=1):
        table.insert(place, name, own[name].values)
    for name in ("n_pairs", "n_prompts"):
        table[name] = own[name].values
    typer.echo(f"accuracy [fraction], {interval_words(result)}")
    say(table.to_string(float_format=lambda x: f"{x:.3f}", na_rep=""))
    for row in result.value.sel(subset="all")[1:]:
        by, low, high = (float(row[name]) for name in ("ahead", "ahead_low", "ahead_high"))
        typer.echo(f"all pairs, ahead of '{row.rule.item()}' by {by:+.3f} ({low:+.3f} to {high:+.3f}), paired")
    for check in result.checks:
        typer.echo(str(check))
    if save is not None:
        result.save(save)


Norm = Annotated[Literal["own", "frozen"], typer.Option(help="Scale of the final norm: of each depth or the last.")]
By = Annotated[Literal["component", "head", "neuron", "expert", "token"], typer.Option(help="What gets a share.")]


@app.command(epilog="Example: reward-lens lens demo demo --norm frozen")
@refusals
def lens(
    model: Model = "demo", pairs: PairsFile = "demo", norm: Norm = "own", split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """The reward read off the residual stream at every depth."""
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    show(rl.reward_lens(rm, data, norm=norm), as_json, save)


@app.command(epilog="Example: reward-lens attribute demo demo --by head --top 10")
@refusals
def attribute(
    model: Model = "demo", pairs: PairsFile = "demo", by: By = "component", top: Top = 10, split: Split = None,
    limit: Limit = None, objective: Objective = None, truncation: Truncation = None, as_json: AsJson = False,
    save: Save = None,
):  # fmt: skip
    """Split rewards and margins exactly over components, heads, neurons or source tokens."""
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    show(rl.contributions(rm, data, by=by), as_json, save, top)


At = Annotated[Literal["final", "response", "all"], typer.Option(help="Positions that are changed.")]
Align = Annotated[Literal["tail", "diff"] | None, typer.Option(help="For responses of different length.")]
Estimator = Literal["exact", "gradient", "integrated", "integrated_block", "integrated_joint", "relevance"]


@app.command(epilog="Example: reward-lens patch demo demo --sites heads --mode denoise --top 10")
@refusals
def patch(
    model: Model = "demo", pairs: PairsFile = "demo",
    sites: Annotated[
        str, typer.Option(help="components, heads, residual, experts, or names such as L3.H5,L4.mlp.")
    ] = "components",
    mode: Annotated[Literal["noise", "denoise", "zero", "mean", "resample"], typer.Option(
        help="The other response's value (into chosen, into rejected), or an ablation of both.")] = "noise",
    at: At = "final", align: Align = None,
    path: Annotated[Literal["total", "direct"], typer.Option(help="'direct': direct and mediated apart.")] = "total",
    estimator: Annotated[Estimator, typer.Option(help="Run every change, or estimate from gradients.")] = "exact",
    calibrate: Annotated[int | None, typer.Option(help="Cells on which an estimate is held against exact.")] = None,
    reference: Annotated[str | None, typer.Option(help="Pairs of other prompts, for 'mean' and 'resample'.")] = None,
    by_position: Annotated[bool, typer.Option("--by-position", help="Each position by itself.")] = False,
    top: Top = 10, split: Split = None, limit: Limit = None, part: Part = None, objective: Objective = None,
    truncation: Truncation = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """The causal effect of sites on the reward."""
    if part is not None and mode in ("mean", "resample") and reference is None:
        raise typer.BadParameter("a --part would draw on its own pairs alone: name one --reference for all parts")
    rm, data = load_both(model, pairs, split, limit, objective, truncation, part)
    named: Any = sites if sites in ("components", "heads", "residual", "experts") else sites.split(",")
    options: Any = {"mode": mode, "at": at, "path": path, "estimator": estimator, "align": align}
    options |= {"spans": "position" if by_position else None} | ({} if calibrate is None else {"calibrate": calibrate})
    options |= {} if reference is None else {"reference": load_pairs(reference, None, None)}
    with Progress(*LEFT, console=err) as bar:
        task = bar.add_task("Patching", total=len(data))
        result = rl.effects(rm, data, named, **options, progress=lambda n, _: bar.update(task, completed=n))
    show(result, as_json, save, top)


@app.command(epilog="Example: reward-lens agree demo demo --limit 12 --estimators gradient")
@refusals
def agree(
    model: Model = "demo", pairs: PairsFile = "demo",
    sites: Annotated[str, typer.Option(help="components, heads, or names such as L3.H5,L4.mlp.")] = "components",
    at: At = "final", align: Align = None,
    estimators: Annotated[str, typer.Option(help="Estimators to hold against exact effects, by commas.")] = "",
    controls: Annotated[int, typer.Option(help="Copies with random weights, each run as well.", min=0)] = 1,
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """How far contributions, direct and total effects agree, beside a copy with random weights."""
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    named: Any = sites if sites in ("components", "heads") else sites.split(",")
    options: Any = {"at": at, "align": align, "estimators": [e for e in estimators.split(",") if e]}
    with err.status(f"Patching {len(data)} pairs"):
        result = rl.agreement(rm, data, named, controls=controls, **options)
    show(result, as_json, save)
    if not as_json:
        beside = result.summary().to_series().unstack(["mode", "model"])
        typer.echo(f"\nBeside random weights:\n{beside.to_string(float_format=lambda x: f'{x:.3f}', na_rep='')}")
        typer.echo(f"\nBy length:\n{rl.agreement_by_length(result)}")
