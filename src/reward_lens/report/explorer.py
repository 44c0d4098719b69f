"""The explorer of a dictionary: every latent with what it gives to the margin, on one page that is searched and sorted.

What it shows comes from results alone (`latents`), so kept results are shown again without a model.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from markupsafe import Markup

from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.report import document, latents, numbers
from reward_lens.report.latents import HALF, PLACES, Given
from reward_lens.report.sections import provenance, settings
from reward_lens.report.tables import check_rows, nearest, values_table
from reward_lens.result import Result

NEEDED = {"latent_contributions": "contributions", "latent_contexts": "contexts"}
WELCOME = {"reward_latents": "effects", "latent_neighbours": "neighbours", "sae_report": "report"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One result, for the end of the page."""

    title: str
    shows: str
    cannot_show: str
    settings: list[tuple[str, str]]


@checked_arguments
def write_explorer(
    results: Iterable[Result] | Mapping[str, Result], path: str | Path, title: str | None = None
) -> Path:
    """Write one self-contained HTML file in which the latents of a dictionary are searched, sorted and looked at.

    Parameters
    ----------
    results: one each of `latent_contributions` and `latent_contexts`, and, if there are any, of `reward_latents`,
        `latent_neighbours` and `sae_report`, of one dictionary and one model. The latents of `latent_contexts` are
        those on the page.
    path: the file. title: its heading; None: the model and the site.

    Returns the path. A page of 200 latents with 8 contexts each holds about 1 MB.
    Raises `DataError` where one of the two is missing, for two results of one method, for results of other methods, and
    for results of different models, dictionaries or texts. The page cannot show what the results do not say; it names
    what was not measured.
    """
    named = dict(results) if isinstance(results, Mapping) else {str(i): r for i, r in enumerate(results)}
    given = _given(list(named.values()))
    all_results = {str(r.meta.get("title") or r.name): r for r in given if r is not None}
    checks = [(where, check) for where, result in all_results.items() for check in result.checks]
    style, script = document.style("explorer.css"), document.resource("shared.js", "explorer.js")
    meta = given.contributions.meta
    heading = title or f"{meta['model']}: latents at {meta['sae']['site']}"
    page = document.template("explorer.html.j2").render(
        title=heading,
        heading=heading,
        kicker="Latents of a dictionary",
        policy=document.policy(scripts=(script,), style=style),
        style=Markup(style),
        script=Markup(script),
        data=document.data_block({"latents": latents.details(given)}),
        head=latents.head(given),
        trained=latents.trained(given),
        provenance=provenance(all_results),
        rows=latents.rows(given),
        half=HALF,
        place=PLACES[meta["settings"]["at"]],
        margin=latents.margin_table(given),
        stand_in=None if given.report is None else values_table(given.report),
        has_effects=given.effects is not None,
        measured=[_measured(where, result) for where, result in all_results.items()],
        checks=check_rows(checks),
        n_checks=len(checks),
        nearest=nearest(checks),
        gap=numbers.gap,
        share=numbers.share,
    )
    return document.write(page, path)


def _measured(title: str, result: Result) -> Measured:
    shows, cannot_show = (str(result.meta.get(key, "")) for key in ("shows", "cannot_show"))
    return Measured(title, shows, cannot_show, settings(result))


def _given(results: list[Result]) -> Given:
    """The results by method, or a `DataError` for what does not belong on one page."""
    known = NEEDED | WELCOME
    names = [result.name for result in results]
    wrong = [f"no {name}" for name in NEEDED if name not in names]
    wrong += [f"{names.count(name)} of {name}" for name in known if names.count(name) > 1]
    wrong += [name for name in dict.fromkeys(names) if name not in known]
    for what, keys, among in (
        ("models", ("model", "revision", "objective"), known),
        ("dictionaries", ("sae",), known),
        ("texts", ("inputs_hash",), (*NEEDED, "sae_report")),  # effects are of half of them, neighbours of none
    ):
        found = {str([r.meta.get(key) for key in keys]) for r in results if r.name in among}
        wrong += [f"{len(found)} different {what}"] if len(found) > 1 else []
    if wrong:
        raise DataError(
            "These results do not make a page of latents",
            found=", ".join(wrong),
            expected=f"one result each of {' and '.join(NEEDED)}, at most one each of {', '.join(WELCOME)}, all of one "
            "model, dictionary and set of pairs",
            do="compute them from the same model, dictionary and pairs, or let latent_explorer do it",
        )
    return Given(**{"effects": None, "neighbours": None, "report": None, **{known[r.name]: r for r in results}})
