"""Commands for rewards that are no reward head's: steps of solutions, judges of pairs, and what DPO implies."""

from functools import partial
from typing import Annotated, Any, Literal, cast

import typer

import reward_lens as rl
from reward_lens.cli.common import (
    AsJson,
    Limit,
    Model,
    PairsFile,
    Save,
    Split,
    app,
    err,
    load,
    load_pairs,
    quietly,
    refusals,
    say,
    show,
)
from reward_lens.cli.loading import given

Beta = Annotated[float, typer.Option(help="Of the DPO run.")]


def _require_readout(expected: str) -> None:
    """Before the model is loaded: without one it would be read as a reward model, and refused for that."""
    if given.get().readout is None:
        raise rl.DataError("Nothing says how this model is read", found="no --readout", expected=expected,
                           do="pass --readout")  # fmt: skip


@app.command(epilog="Example: reward-lens steps peiyi9979/math-shepherd-mistral-7b-prm solutions.jsonl "
             "--readout math-shepherd")  # fmt: skip
@refusals
def steps(
    model: Model, solutions: Annotated[str, typer.Argument(help="A file or hub id with columns prompt and steps.")],
    what: Annotated[
        Literal["rewards", "lens", "contributions"], typer.Option(help="What is asked of every step.")
    ] = "rewards",
    split: Split = None, limit: Limit = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """What a process reward model gives to every step of solutions; --readout says how it reads them."""
    data = rl.load_solutions(solutions, split=split, limit=limit)
    _require_readout(f"one of {', '.join(rl.STEP_READOUTS)}, or the fields of a StepReadout as JSON")
    rm = load(model)
    ask = {"rewards": rl.step_rewards, "lens": rl.step_lens, "contributions": rl.step_contributions}[what]
    with err.status(f"Reading {len(data)} solutions"):
        result = ask(rm, data)
    show(result, as_json, save)
    if what == "rewards" and not as_json:
        for i, solution in enumerate(data):
            say(f"\n{solution.id}")
            for step, reward, chance in zip(solution.steps, result.value[i], result.value.probability[i], strict=False):
                say(f"  {float(reward):8.3f}  p {float(chance):.3f}  {step}")


@app.command(epilog="Example: reward-lens judge my-judge pairs.jsonl --readout judge.json")
@refusals
def judge(
    model: Model, pairs: PairsFile = "demo", split: Split = None, limit: Limit = None, as_json: AsJson = False,
    save: Save = None,
):  # fmt: skip
    """Both orders of every pair before a judge, its preference and its position bias; --readout gives its question."""
    data = load_pairs(pairs, split, limit)
    _require_readout("fields of a VocabReadout as JSON, with a template of {prompt}, {a} and {b}, or a file of them")
    rm = load(model)
    with err.status(f"Asking about {len(data)} pairs in both orders"):
        result = rl.pair_judge(rm, data)
    show(result, as_json, save)
    if not as_json:
        _shares(result.meta["summary"])


@app.command(epilog="Example: reward-lens implicit my-dpo-policy its-sft-reference pairs.jsonl --beta 0.1")
@refusals
def implicit(
    policy: Annotated[str, typer.Argument(help="The policy that DPO trained: a hub id or a folder.")],
    reference: Annotated[str, typer.Argument(help="The model it was trained from.")],
    pairs: PairsFile = "demo",
    what: Annotated[
        Literal["rewards", "tokens", "lens", "contributions"], typer.Option(help="What is asked of every pair.")
    ] = "rewards",
    beta: Beta = 0.1,
    end: Annotated[
        str, typer.Option(help="What counts of the template behind a response: 'template', 'first' or 'none'.")
    ] = "template",
    split: Split = None, limit: Limit = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """The reward that a DPO policy implies beside its reference: log-ratios by response, token, depth or component."""
    data = load_pairs(pairs, split, limit)
    asks: Any = {"rewards": rl.implicit_reward, "tokens": rl.implicit_tokens, "lens": rl.implicit_lens,
                 "contributions": rl.implicit_contributions}  # fmt: skip
    with err.status(f"Reading {2 * len(data)} responses with either model"):
        quietly()
        models = (partial(rl.load_language_model, name, **given.get().settings()) for name in (policy, reference))
        result = asks[what](*models, data, beta=beta, end=cast(Any, end))
    show(result, as_json, save)
    if what == "rewards" and not as_json:
        _shares({f"accuracy ({name})": share for name, share in result.meta["accuracy"].items()})


def _shares(named: dict[str, dict[str, Any]]) -> None:
    for name, share in named.items():
        typer.echo(f"{name}: {share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})")
