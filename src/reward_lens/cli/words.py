"""The command that asks of one response which of its words earned the reward."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

import reward_lens as rl
from reward_lens.charts.strip import Block, blocks, colour_limit
from reward_lens.charts.theme import LIGHT
from reward_lens.cli.common import (
    AsJson,
    ModelOption,
    Objective,
    Prompt,
    Response,
    Save,
    app,
    err,
    load,
    out,
    refusals,
    say,
    show,
    writable,
)
from reward_lens.report.numbers import number

Method = Literal["prefix", "truncate", "gradient", "integrated", "leave_one_out"]
MORE, LESS = (bytes.fromhex(colour.removeprefix("#")) for colour in (LIGHT.positive, LIGHT.negative))


@app.command(epilog="Example: reward-lens words 'What is 2 + 2?' 'It is 4, of course.' --model demo --html words.html")
@refusals
def words(
    prompt: Prompt, response: Response, model: ModelOption = "demo",
    method: Annotated[Method, typer.Option(help="How a share is found; 'leave_one_out' removes a unit and runs the "
                                                "rest again.")] = "leave_one_out",
    by: Annotated[Literal["token", "word", "sentence"], typer.Option(help="What gets a share.")] = "word",
    html: Annotated[Path | None, typer.Option(help="Also write a page with the coloured text.", dir_okay=False,
                                                callback=writable)] = None,
    objective: Objective = None, as_json: AsJson = False, save: Save = None,
):  # fmt: skip
    """What each word of one response is worth to its reward."""
    if not response.strip():
        raise rl.DataError("There is no word to weigh", found=f"the response {response!r}", expected="a response",
                           do="pass it in quotes behind the prompt")  # fmt: skip
    rm, pair = load(model, objective), rl.Pair(prompt, response, "", id="response")  # beside an empty one
    with err.status(f"Sharing out the reward: {method}"):
        answer = rl.token_attribution(rm, [pair], method, by)
    result = answer.sel(side="chosen")
    reward = result.dataset["reward"].item()
    if as_json:
        show(result, True, save)
    else:
        typer.echo(f"{rm.name}: reward {reward:.6g}. {result.meta['title']}: {result.meta['shows']}\n")
        (text,) = blocks(result)
        out.print(coloured(text))
        largest = result.top(10)[["position", "piece", "value"]]
        say(f"\nLargest {len(largest)} by absolute value:\n{largest.to_string(index=False)}")
        for check in result.checks:
            typer.echo(str(check))
        if save is not None:
            result.save(save)
    if html is not None:
        page = rl.write_report([result], html, f"Reward {number(reward)} by {rm.name}")
        typer.echo(f"Page: {page}", err=as_json)  # beside JSON, nothing else


def coloured(text: Block) -> Text:
    """The pieces, each on a ground whose strength is its share of the largest."""
    limit, _ = colour_limit([text])
    drawn = Text()
    for piece, value in zip(text.pieces, text.values, strict=True):
        part = min(1.0, abs(value) / limit) if limit else 0.0
        ground = ",".join(str(round(255 + part * (end - 255))) for end in (MORE if value > 0 else LESS))
        drawn.append(piece.replace("\r", "\\r"), f"black on rgb({ground})" if part >= 0.1 else "")
    return drawn
