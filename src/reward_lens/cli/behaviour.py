"""Commands about behaviour: probes, repairs, pressure, benchmarks."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

import reward_lens as rl
from reward_lens.analysis import halves
from reward_lens.cli.common import (
    MODELS,
    SAVED,
    AsJson,
    Limit,
    Model,
    Objective,
    PairsFile,
    Save,
    Split,
    Truncation,
    app,
    err,
    load,
    load_both,
    load_pairs,
    refusals,
    result_file,
    say,
    show,
)
from reward_lens.report.sections import interval_words


@app.command(epilog="Example: reward-lens probe demo demo --probes pad,hedge,add_bold")
@refusals
def probe(
    model: Model = "demo", pairs: PairsFile = "demo",
    probes: Annotated[str, typer.Option(help="Edits by commas, families too; default: all.")] = "",
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """How much reward each edit of the responses buys, with p by Holm over the edits."""
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    with err.status(f"Editing and scoring {2 * len(data)} responses"):
        result = rl.probe_hacking(rm, data, [name for name in probes.split(",") if name] or None)
    if as_json:
        return show(result, True, save)
    columns = ["changes", "shift_sd", "p_holm", "net", "net_p_holm", "flips", "n_prompts"]
    table = result.dataset[["mean", "low", "high"]].to_dataframe().rename(columns={"mean": "shift"})
    typer.echo(table[["shift", "low", "high", *columns]].to_string(float_format=lambda x: f"{x:.3g}"))
    typer.echo(f"\nshift, net: {result.unit}, {interval_words(result)}; shift_sd: in SDs of the reward within prompts; "
               "net: less what as many tokens of filler buy; flips: share of the pairs that were right and are wrong "
               "once the rejected response is edited")  # fmt: skip
    typer.echo(f"Within-prompt SD {result.meta['within_prompt_sd']:.3g}; prompts needed for a shift of half an SD of "
               f"shifts: {result.meta['prompts_needed']['n']}")  # fmt: skip
    if save is not None:
        result.save(save)


@app.command(epilog="Example: reward-lens edit demo diagnostic --remove pad_4 -o edited/")
@refusals
def edit(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Empty folder for the edited checkpoint.", file_okay=False)
    ],
    remove: Annotated[str, typer.Option(help="The edit whose direction is taken out of the head.")],
    model: Model = "demo", pairs: PairsFile = "demo",
    alpha: Annotated[float, typer.Option(help="Share of the direction that is taken out.")] = 1.0,
    split: Split = None, limit: Limit = None,
    objective: Objective = None, truncation: Truncation = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help=f"Also save the table of before and after to {SAVED}", dir_okay=False,
                     callback=result_file),
    ] = None,
):  # fmt: skip
    """Take the direction of an edit out of the reward head and write a checkpoint that transformers loads.

    The direction comes from the pairs of every second prompt; probes and accuracy before and after are of the others.
    """
    chosen, *others = rl.edits_of([remove])
    if others:
        names = ", ".join(one.name for one in (chosen, *others))
        raise typer.BadParameter(f"{remove!r} is a family of edits: name one of {names}")
    from reward_lens.model.head import editable_readout  # not at the top: they import torch
    from reward_lens.model.saving import require_empty

    require_empty(output)  # before the work, not after it
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    editable_readout(rm)
    fit, test = halves(data)
    with err.status("Finding the direction"):
        direction = rl.bias_direction(rm, rl.edited_pairs(fit, chosen))
        edited = rl.edit_head(rm, direction, alpha)
    with err.status("Probing before and after"):
        outcome = rl.evaluate_edit(rm, edited, test, {pairs: test})
    edited.save_pretrained(output)
    reliability = direction.meta["reliability"]
    typer.echo(f"Direction of {remove}: reliability {reliability['value']:.2f}, {direction.meta['n_prompts']} prompts")
    table = outcome.value.to_series().unstack("state")[list(outcome.value["state"].values)]
    change = outcome.dataset.sel(state="change")
    table = table.reindex(change["measure"].values)
    for name in ("low", "high", "p_holm", "n_prompts"):
        table[name] = change[name].values
    typer.echo(table.to_string(float_format=lambda x: f"{x:.3g}", na_rep=""))
    typer.echo(f"low, high, p_holm: of the change, {interval_words(outcome)}; probes in within-prompt SDs")
    typer.echo(f"Checkpoint: {output}")
    if save is not None:
        outcome.save(save)


@app.command(epilog="Example: reward-lens pressure samples.parquet --save pressure.nc")
@refusals
def pressure(
    samples: Annotated[Path, typer.Argument(help="Columns prompt, response, reward and, if there is one, gold.")],
    model: Annotated[str | None, typer.Option(help="Scores the samples where there is no column reward.")] = None,
    n_max: Annotated[int | None, typer.Option(help="Largest n; default: the fewest samples of a prompt.")] = None,
    objective: Objective = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """What choosing the best of n by this reward chooses besides: length, layout, hedging, and the gold score."""
    rm = load(model, objective) if model else None
    result = rl.optimisation_pressure(samples, rm, n_max=n_max)
    show(result, as_json, save)
    if not as_json:
        turn = result.meta["gold_turns_down"]
        typer.echo(f"\nGold turns down at n = {turn['n']}" if turn["n"] else f"\nGold: {turn['reason']}")


@app.command(epilog="Example: reward-lens benchmark demo demo diagnostic --styles rm_bench.jsonl")
@refusals
def benchmark(
    model: Annotated[str, typer.Argument(help=MODELS)],
    sources: Annotated[list[str], typer.Argument(help="Sets of pairs: names, files or hub ids.")],
    styles: Annotated[list[str] | None, typer.Option(help="RM-Bench-shaped sets, three responses a side.")] = None,
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
):  # fmt: skip
    """Accuracy on several sets, beside the rule that the longer response wins, with intervals over prompts."""
    sets = [(source, load_pairs(source, split, limit)) for source in sources]
    styled = [(source, rl.load_style_items(source, split=split, limit=limit)) for source in styles or ()]
    rm = load(model, objective, truncation)
    rows = []
    for source, pairs in sets:
        found = rl.accuracy(rm, pairs).dataset
        for subset in ("all", "balanced"):
            cell = found.sel(subset=subset, rule="reward model")
            longer = float(found["value"].sel(subset=subset, rule="longer wins"))
            rows.append([f"{source}: {subset}", *(float(cell[k]) for k in ("value", "low", "high")), longer,
                         int(cell["n_prompts"])])  # fmt: skip
    for source, items in styled:
        summary = rl.style_summary(rl.style_matrix(rm, items)).dataset
        for name in summary["difficulty"].values:
            cell = summary.sel(difficulty=name)
            rows.append([f"{source}: {name}", *(float(cell[k]) for k in ("mean", "low", "high")), float("nan"),
                         len(set(summary["prompt_id"].values))])  # fmt: skip
    table = pd.DataFrame(rows, columns=["set", "accuracy", "low", "high", "longer wins", "prompts"])
    say(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
