"""Commands of whole studies: comparison, concepts, conflict, cascade, distortion."""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

import reward_lens as rl
from reward_lens.cli.common import (
    SOURCES,
    AsJson,
    Limit,
    Model,
    Objective,
    PairsFile,
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


@app.command(epilog="Example: reward-lens compare demo ./edited --pairs diagnostic")
@refusals
def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more: 'demo', hub ids, folders or PEFT adapters.")],
    pairs: Annotated[str, typer.Option(help=SOURCES)] = "demo",
    split: Split = None, limit: Limit = None, objective: Objective = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """Where models agree: preferences, rewards, where in depth the margin arises, and states. All by one objective."""
    data = load_pairs(pairs, split, limit)
    with err.status(f"Running {len(models)} models on {len(data)} pairs"):
        result = rl.compare({name: partial(load, name, objective) for name in models}, data)
    show(result, as_json, save)
    if not as_json:
        opposed = rl.disagreements(result, n=5)
        listed = "none" if opposed.empty else opposed.to_string(index=False)
        say(f"\nLargest disagreements, margins in SDs of each model's rewards within prompts:\n{listed}")


@app.command(epilog="Example: reward-lens join effects-0.nc effects-1.nc --save effects.nc")
@refusals
def join(
    parts: Annotated[list[Path], typer.Argument(help="Saved Results of one question about different pairs.")],
    top: Top = 10, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """Results of parts of the data as one: of a sweep that ran in shards, or before and after an interruption."""
    show(rl.join_results(parts), as_json, save, top)


@app.command(epilog="Example: reward-lens concepts demo concepts --null 20 --steered 8")
@refusals
def concepts(
    model: Model = "demo",
    texts: Annotated[str, typer.Argument(help="'concepts' or a file: concept, topic, text, polarity.")] = "concepts",
    null: Annotated[int, typer.Option(help="Random directions to steer along.", min=0)] = 200,
    steered: Annotated[int, typer.Option(help="Texts to steer on.", min=1)] = 20,
    depth: Annotated[int | None, typer.Option(help="Residual entering this block; default: two thirds.")] = None,
    denoise_var: Annotated[
        float, typer.Option(help="Share of the neutral texts' variance taken out of the vectors; 0 needs none of them.")
    ] = 0.5,
    objective: Objective = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """Directions of concepts, which way the reward pays for each, and whether reading and steering agree."""
    given, rm = rl.load_concepts(texts), load(model, objective)
    with err.status(f"Reading {len(given)} texts"):
        vectors = rl.concept_vectors(rm, given, depth=depth, denoise_var=denoise_var)
    with err.status("Steering"):
        result = rl.valuation(rm, vectors, given, n_null=null, n_texts=steered)
    if as_json:
        return show(result, True, save)
    table = result.dataset[["mean", "low", "high"]].to_dataframe().rename(columns={"mean": "causal"})
    columns = ["causal", "low", "high", "direct", "read", "sign", "sign_share", "auc"]
    say(table[columns].to_string(float_format=lambda x: f"{x:.3g}"))
    typer.echo(f"\n{result.meta['shows']}")
    chance = result.meta["agreement"]["response"]["direct"]["null"]["median"]
    if chance is not None:
        typer.echo(f"Half of the sets of as many random directions agree with r of {chance:.2f} or more.")
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
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    chosen = {edit.name: rl.edited_pairs(data, edit) for edit in rl.edits_of(terms.split(","))}
    with err.status("Reading states"):
        result = rl.term_conflict(rm, chosen, tests=("direction",))
    show(result, as_json, save)
    if not as_json:
        for one, other in combinations(chosen, 2):
            cell = result.dataset.sel(term=one, other=other, test="direction")
            ends = f"{float(cell['value']):.3f} ({float(cell['low']):.3f} to {float(cell['high']):.3f})"
            why = f": {cell['reason'].item()}" if cell["reason"].item() else ""
            typer.echo(f"{one} ~ {other}: {cell['label'].item()}, cosine {ends}{why}")


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


@app.command(epilog="Example: reward-lens distortion demo demo --weights words=1,hedges_per_100_words=1")
@refusals
def distortion(
    model: Model = "demo", pairs: PairsFile = "demo",
    weights: Annotated[str, typer.Option(help="name=number by commas; default: fitted to the pairs' labels.")] = "",
    attributes: Annotated[str, typer.Option(help="Names by commas; default: those of --weights, or all.")] = "",
    lam: Annotated[float, typer.Option(help="Share of behaviour that the reward drives.", min=0, max=1)] = 1.0,
    split: Split = None, limit: Limit = None, objective: Objective = None, truncation: Truncation = None,
    as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """What the reward pays for attributes of the text, against what they are worth."""
    parts = [_weight(part) for part in weights.split(",") if part]
    given = dict(parts)
    if len(given) < len(parts):
        raise typer.BadParameter(f"{weights!r}: a name comes twice")
    names = set(filter(None, attributes.split(","))) or set(given) or set(rl.DEFAULT_EDITS)
    if not names <= set(rl.DEFAULT_EDITS) or (given and names != set(given)):
        expected = f"the names in --weights or, without these, some of {', '.join(rl.DEFAULT_EDITS)}"
        raise typer.BadParameter(f"{attributes!r}: expected {expected}")
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    chosen = {name: edits for name, edits in rl.DEFAULT_EDITS.items() if name in names}
    with err.status(f"Editing and scoring {2 * len(data)} responses"):
        slopes = rl.sensitivity_slopes(rm, chosen, data)
    worth = [given[name] for name in chosen] if given else rl.fitted_weights(data, list(chosen))
    show(rl.distortion_index(slopes, worth, lam=lam), as_json, save)


def _weight(part: str) -> tuple[str, float]:
    name, _, number = part.partition("=")
    try:
        if name in rl.DEFAULT_EDITS:
            return name, float(number)
    except ValueError:
        pass
    raise typer.BadParameter(f"{part!r}: expected name=number, a name of {', '.join(rl.DEFAULT_EDITS)}")
