"""Writes the page: one file, no request to anywhere, a Content-Security-Policy naming its scripts by hash.

What it shows comes from the results alone (`sections`). Text is escaped by the template; chart data stands in
a JSON block in which no character can end the script element.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from reward_lens.charts.choice import schema_version
from reward_lens.charts.theme import DARK, LIGHT, theme
from reward_lens.errors import DataError
from reward_lens.report import numbers
from reward_lens.report.sections import provenance, sections
from reward_lens.report.tables import check_rows, nearest
from reward_lens.result import Result


def write_report(results: Iterable[Result] | Mapping[str, Result], path: str | Path, title: str | None = None) -> Path:
    """Write one self-contained HTML file that shows `results` in the order given, and return its path.

    Each result becomes a section: its `meta` gives the heading (`title`), what it shows and cannot show, the
    settings and the provenance; its dims and coordinates give the charts and tables. Results of any method
    join without code here. Raises `DataError` if there is no result. The page cannot show more than fits:
    strips of very many pairs and long lists are cut, with a sentence that counts what is left out.
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
    style, bundle, script = _style(), _bundle(), _resource("page.js")
    charts = {"themes": {"light": _page_theme(False), "dark": _page_theme(True)}}
    charts["specs"] = {figure.id: figure.spec for part in parts for figure in part.figures}
    models = list(dict.fromkeys(str(r.meta["model"]) for r in named.values() if r.meta.get("model")))
    page = _template().render(
        title=title or (f"Reward model report: {', '.join(models)}" if models else "Reward model report"),
        heading=title or ", ".join(models) or "Reward model report",
        policy=_policy(scripts=(bundle, script), style=style),
        style=Markup(style),
        bundle=Markup(bundle),
        script=Markup(script),
        charts=Markup(_json(charts)),
        sections=parts,
        provenance=provenance(named, without=() if title else ("model",)),
        checks=check_rows(checks),
        n_checks=len(checks),
        nearest=nearest(checks),
        gap=numbers.gap,
    )
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    # A lone surrogate has no UTF-8 form; it is written as the escape that stands for it.
    partial.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")
    partial.replace(path)
    return path


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


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("reward_lens.report")
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, autoescape=True, **options)
    environment.tests["infinite"] = math.isinf
    return environment.get_template("report.html.j2")


@functools.cache
def _style() -> str:
    light, dark = dataclasses.asdict(LIGHT), dataclasses.asdict(DARK)
    colours = [f"  --{k}: light-dark({light[k]}, {dark[k]});" for k in light if k != "series"]
    colours += [
        f"  --{k}: light-dark({light['series'][i]}, {dark['series'][i]});" for i, k in enumerate(("chosen", "rejected"))
    ]
    return ":root {\n" + "\n".join(colours) + "\n}\n" + _resource("style.css")


def _page_theme(dark: bool) -> dict:
    """The page labels a chart as one image and lists its values in a table; labels of marks are noise."""
    return {**theme(dark), "aria": False}


def _resource(name: str) -> str:
    return resources.files("reward_lens.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str], style: str) -> str:
    hashes = " ".join(_hash(script) for script in scripts)
    rules = (
        "default-src 'none'",
        f"script-src {hashes}",
        f"style-src {_hash(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json(value) -> str:
    """JSON in ASCII whose text cannot close the element it stands in, nor open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
