"""What the pages have in common: one file, no request to anywhere, a Content-Security-Policy naming scripts by hash.

Text is escaped by the templates; data stands in a JSON block in which no character can end the script element.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from reward_lens.charts.theme import DARK, LIGHT


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of the package, with everything that is put into it escaped."""
    loader = jinja2.PackageLoader("reward_lens.report")
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, autoescape=True, **options)
    environment.tests["infinite"] = math.isinf
    return environment.get_template(name)


@functools.cache
def style(*more: str) -> str:
    """The colours of charts as custom properties, the style sheet of all pages, and further ones by name."""
    light, dark = dataclasses.asdict(LIGHT), dataclasses.asdict(DARK)
    colours = [f"  --{k}: light-dark({light[k]}, {dark[k]});" for k in light if k != "series"]
    colours += [
        f"  --{k}: light-dark({light['series'][i]}, {dark['series'][i]});" for i, k in enumerate(("chosen", "rejected"))
    ]
    return ":root {\n" + "\n".join(colours) + "\n}\n" + resource("style.css", *more)


def resource(*names: str) -> str:
    """The text of files beside this module, one after the other."""
    folder = resources.files("reward_lens.report")
    return "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def policy(scripts: Iterable[str], style: str) -> str:
    """The page's Content-Security-Policy: these scripts, this style sheet, and nothing else."""
    hashes = " ".join(_hash(script) for script in scripts)
    rules = (
        "default-src 'none'",
        f"script-src {hashes}",
        f"style-src {_hash(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def data_block(value) -> Markup:
    """JSON in ASCII whose text cannot close the element it stands in, nor open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def write(page: str, path: str | Path) -> Path:
    """Write a page, whole or not at all, and the folders it is in. Returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    # A lone surrogate has no UTF-8 form; it is written as the escape that stands for it.
    try:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
