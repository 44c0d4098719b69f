"""Commands about dictionaries (sparse autoencoders): train one, measure it, look at its latents."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.progress import Progress

import reward_lens as rl
from reward_lens.cli.common import (
    COLUMNS,
    MODELS,
    SAVED,
    SOURCES,
    AsJson,
    Limit,
    Objective,
    Seed,
    Split,
    Truncation,
    app,
    err,
    load_both,
    refusals,
    result_file,
    show,
    writable,
)
from reward_lens.data import by_prompt

sae = typer.Typer(
    help="Sparse autoencoders of a reward model's activations: train, measure, look. FOLDER holds a dictionary of "
    "reward-lens, SAELens, sparsify, Gemma Scope or Llama Scope, or is the hub id of one.",
    no_args_is_help=True,
)
app.add_typer(sae, name="sae")

STORE, TRAINING = "activations", "training"
MODEL = typer.Argument(help=MODELS)
PairsOption = Annotated[str, typer.Option(help=SOURCES)]
Folder = Annotated[str, typer.Argument(help="A dictionary's folder, or a hub id.")]
Subfolder = Annotated[str | None, typer.Option(help="Of a release of many: the dictionary's folder in it.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub.")]
SiteOption = Annotated[str | None, typer.Option(help="Where it is read, if its files do not say: L20.resid_post.")]
SaveFile = Annotated[
    Path | None,
    typer.Option("--save", help=f"Also save the Result to {SAVED}", dir_okay=False, callback=result_file),
]


@sae.command(epilog="Example: reward-lens sae train demo --site L29.resid_post --d-sae 2048 --k 32 -o dictionary/")
@refusals
def train(
    model: Annotated[str, MODEL],
    site: Annotated[str, typer.Option(help="What it is trained on: L20.resid_post, L3.mlp, ...")],
    d_sae: Annotated[int, typer.Option("--d-sae", help="Latents.", min=1)],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for the dictionary and what it is made from.", file_okay=False),
    ],
    k: Annotated[int, typer.Option("--k", help="Active latents of a sample.", min=1)] = 32,
    pairs: PairsOption = "demo",
    variant: Annotated[Literal["batchtopk", "topk", "jumprelu", "matryoshka"], typer.Option(
        help="How latents are chosen to be active.")] = "batchtopk",
    positions: Annotated[Literal["reward", "response", "all"], typer.Option(help="Of a text.")] = "response",
    n_train: Annotated[int | None, typer.Option("--n-train", help="Samples to train on, repeats included.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the prompts kept for the report.", min=0, max=0.9)] = 0.2,
    seed: Seed = 0, split: Split = None, limit: Limit = None, objective: Objective = None,
    truncation: Truncation = None, as_json: AsJson = False, save: SaveFile = None,
):  # fmt: skip
    """Store activations, train a dictionary on them, and measure it on prompts that had no part in it.

    A run that was stopped goes on from where it was when the same command is given again.
    """
    from reward_lens.methods.latents.latent_states import KINDS

    if rl.Site.parse(site).kind not in KINDS:  # before the activations, not after the training
        raise typer.BadParameter(f"{site!r}: expected a residual stream or a write, such as L20.resid_post or L3.mlp")
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    fit, test = _halves(data, held_out)
    estimate = rl.estimate_store(rm, fit, site, positions)
    size = f"{estimate.n_samples:,} samples of {estimate.n_texts:,} texts, {estimate.bytes / 2**20:,.1f} MiB"
    size = f"{'' if estimate.exact else 'about '}{size}, in {output / STORE}"
    err.print(f"Activations at {site}: {size}", markup=False, soft_wrap=True)
    with err.status("Storing activations"):
        store = rl.store_activations(rm, fit, site, positions, output / STORE, seed=seed)
    with Progress(*COLUMNS, console=err) as bar:
        task = bar.add_task("Training", total=None)

        def tell(now: dict[str, Any]) -> None:
            said = f"FVU {now['fvu']:.3f}, L0 {now['l0']:.1f}, dead {now['dead']:.1%}"
            bar.update(task, description=f"Training: {now['samples']:,} samples, {said}")

        found = rl.train_sae(store, d_sae, k, variant, seed, n_train=n_train, device=rm.device,
                             checkpoint=output / TRAINING, progress=tell,
                             meta={"pairs": pairs, "held_out": held_out})  # fmt: skip
    found.save(output)
    with err.status(f"Measuring on {len(test)} pairs"):
        report = rl.sae_report(rm, found, test, seed=seed)
    _print(report, as_json, save)
    if not as_json:
        whose = "that were held out" if held_out else "it was trained on, which flatters it"
        typer.echo(f"\nMeasured on {report.meta['n_prompts']} prompts {whose}. {found.meta['trust']}")
        typer.echo(f"Dictionary: {output}")


@sae.command("eval", epilog="Example: reward-lens sae eval demo dictionary/ --pairs diagnostic --seeds other/")
@refusals
def evaluate(
    model: Annotated[str, MODEL], folder: Folder, pairs: PairsOption = "demo",
    seeds: Annotated[list[str] | None, typer.Option(help="Dictionary of another seed; may be repeated.")] = None,
    subfolder: Subfolder = None, revision: Revision = None, site: SiteOption = None, split: Split = None,
    limit: Limit = None, objective: Objective = None, truncation: Truncation = None, seed: Seed = 0,
    as_json: AsJson = False, save: SaveFile = None,
):  # fmt: skip
    """How well a dictionary stands in for what it reads: variance, rewards, margins, and other seeds."""
    found, others = rl.SAE.load(folder, subfolder, revision), [rl.SAE.load(other) for other in seeds or ()]
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    _note_another_model(found, rm)
    with err.status(f"Running {2 * len(data)} responses with and without the dictionary"):
        report = rl.sae_report(rm, found, data, others, site=site, seed=seed)
    _print(report, as_json, save)
    if not as_json:
        for other, stable in zip(seeds or (), report.meta["stability"], strict=True):
            typer.echo(f"{other}: {_share(stable)} of the {stable['n']} latents that margins rest on have a match")


@sae.command(epilog="Example: reward-lens sae explore demo dictionary/ -o latents.html")
@refusals
def explore(
    model: Annotated[str, MODEL], folder: Folder,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The HTML file.", dir_okay=False, callback=writable)
    ] = Path("latents.html"),
    pairs: PairsOption = "demo",
    latents: Annotated[int, typer.Option(help="Latents on the page.", min=1)] = 200,
    tested: Annotated[int, typer.Option(help="Latents that are set to 0 and tested.", min=0)] = 20,
    contexts: Annotated[int, typer.Option(help="Texts shown of each.", min=1)] = 8,
    at: Annotated[Literal["final", "response"], typer.Option(help="Where latents count.")] = "final",
    subfolder: Subfolder = None, revision: Revision = None, site: SiteOption = None, split: Split = None,
    limit: Limit = None, objective: Objective = None, truncation: Truncation = None, seed: Seed = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also save the Results in this folder.", file_okay=False)
    ] = None,
):  # fmt: skip
    """Write one offline HTML page on which the latents of a dictionary are searched, sorted and looked at."""
    from reward_lens.explorer import explorer_results

    found = rl.SAE.load(folder, subfolder, revision)
    rm, data = load_both(model, pairs, split, limit, objective, truncation)
    _note_another_model(found, rm)
    results = []
    with Progress(*COLUMNS, console=err) as progress:
        task = progress.add_task(f"{len(data)} pairs", total=None)
        for result in explorer_results(rm, found, data, latents, tested, contexts, at, site, seed):
            results.append(result)
            progress.update(task, description=f"{result.meta['title']} done")
            if save is not None:
                result.save(save / f"{result.name}.nc")
    typer.echo(f"Latents: {rl.write_explorer(results, output)}")


def _note_another_model(found: Any, rm: "rl.RewardModel") -> None:
    """A dictionary of a base model may be held against its reward model; of any other its figures say little."""
    trained = found.meta.get("model")
    if trained and trained != rm.name:
        err.print(f"Note: the dictionary was trained on {trained}, this is {rm.name}", markup=False, soft_wrap=True)


def _halves(data: "rl.Pairs", held_out: float) -> tuple["rl.Pairs", "rl.Pairs"]:
    """Pairs to train on and pairs to measure on: whole prompts, and the same ones for dictionaries of every seed."""
    keys = sorted({pair.prompt_key for pair in data})
    order = np.random.default_rng(0).permutation(len(keys))
    out = {keys[i] for i in order[: round(held_out * len(keys))]}
    if not out:
        return data, data
    test, fit = by_prompt(data, out)
    return fit, test


def _print(report: "rl.Result", as_json: bool, save: Path | None) -> None:
    """Every measure at both places with its interval."""
    if as_json:
        return show(report, True, save)
    table = report.dataset[["value", "low", "high"]].to_dataframe()[["value", "low", "high", "n"]]
    typer.echo(table.to_string(float_format=lambda x: f"{x:.3g}", na_rep=""))
    for check in report.checks:
        typer.echo(str(check))
    if save is not None:
        report.save(save)


def _share(stable: dict[str, Any]) -> str:
    if stable["matched"] is None:
        return "none"
    return f"{stable['matched']:.0%} ({stable['low']:.0%} to {stable['high']:.0%})"
