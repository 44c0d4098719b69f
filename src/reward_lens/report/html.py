"""The report: any results, one section each, on one page.

What it shows comes from the results alone (`sections`); how a page is made and kept safe is in `document`.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import vl_convert
from markupsafe import Markup

from reward_lens.arguments import checked_arguments
from reward_lens.charts.choice import schema_version
from reward_lens.charts.theme import theme
from reward_lens.errors import DataError
from reward_lens.report import document, numbers
from reward_lens.report.sections import heading, provenance, sections
from reward_lens.report.tables import check_rows, nearest
from reward_lens.result import Result


@checked_arguments
def write_report(
    results: Iterable[Result] | Mapping[str, Result], path: str | Path, title: str | None = None,
    refused: Mapping[str, Exception] | None = None,
) -> Path:  # fmt: skip
    """Write one self-contained HTML file that shows `results` in the order given, and return its path.

    Each result becomes a section: its `meta` gives the heading (`title`), what it shows and cannot show, the settings
    and the provenance; its dims and coordinates give the charts and tables. Results of any method join without code
    here. `refused` are questions that had no answer, by name, each with the error that says why: a section lists them,
    so that nothing is missing in silence. Raises `DataError` if there is no result. The page cannot show more than
    fits: strips of very many pairs and long lists are cut, with a sentence that counts what is left out.
    """
    named = _named(results)
    if not named:
        raise DataError(
            "The report has nothing to show",
            found="no result",
            expected="at least one Result",
            do="pass the results of one or more methods, for example [rl.accuracy(rm, pairs)]",
        )
    parts = sections(named)
    checks = [(part.title, check) for part in parts for check in part.checks]
    style, bundle, script = document.style(), _bundle(), document.resource("shared.js", "page.js")
    charts = {"themes": {"light": _page_theme(False), "dark": _page_theme(True)}}
    charts["specs"] = {figure.id: figure.spec for part in parts for figure in part.figures}
    models = list(dict.fromkeys(str(r.meta["model"]) for r in named.values() if r.meta.get("model")))
    page = document.template("report.html.j2").render(
        kicker="Reward model report",
        title=title or (f"Reward model report: {', '.join(models)}" if models else "Reward model report"),
        heading=title or ", ".join(models) or "Reward model report",
        policy=document.policy(scripts=(bundle, script), style=style),
        style=Markup(style),
        bundle=Markup(bundle),
        script=Markup(script),
        charts=document.data_block(charts),
        sections=parts,
        refused=[(heading(name), str(error)) for name, error in (refused or {}).items()],
        provenance=provenance(named, without=() if title else ("model",)),
        checks=check_rows(checks),
        n_checks=len(checks),
        nearest=nearest(checks),
        completeness=nearest([(where, check) for where, check in checks if check.name == "completeness"]),
        gap=numbers.gap,
        fact=numbers.fact,
    )
    return document.write(page, path)


def _named(results: Iterable[Result] | Mapping[str, Result]) -> dict[str, Result]:
    if isinstance(results, Mapping):
        return {str(name): result for name, result in results.items()}
    out: dict[str, Result] = {}
    for result in results:
        key, count = result.name, 2
        while key in out:
            key, count = f"{result.name} {count}", count + 1
        out[key] = result
    return out


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, with the interpreter that needs no `eval`; once for all charts."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", schema_version())


def _page_theme(dark: bool) -> dict:
    """The page labels a chart as one image and lists its values in a table; labels of marks are noise."""
    return {**theme(dark), "aria": False}
