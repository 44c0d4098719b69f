"""How `make docs` builds these pages: MyST sources, examples executed, no network."""

import importlib.metadata
import os
import re

# Read by the kernels that execute the examples.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

project = "reward-lens"
author = "reward-lens contributors"
copyright = author
release = importlib.metadata.version("reward-lens")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"  # docstrings write names in single backticks
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"reward-lens {release}"

suppress_warnings = ["ref.python"]  # attributes of one name on several classes
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # the first load of the demo model merges and caches its weights
nb_output_stderr = "remove"  # progress bars; an exception still fails the build


def keep_absolute_values(app, what, name, obj, options, lines):
    """In a docstring's formulas |x| is an absolute value and * a star; to reStructuredText they are markup."""
    parts = re.split(r"(`+[^`]*`+)", "\n".join(lines))
    parts[::2] = [part.replace("|", r"\|").replace("[*", r"[\*") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def list_parameters(app, what, name, obj, options, lines):
    """A Parameters section ends at its first blank line and is a list; what follows is text, and no parameter."""
    out, inside, rest = [], False, iter(lines)
    for line in rest:
        if line.strip() == "Parameters":
            next(rest, None)  # the dashes
            out += [".. rubric:: Parameters", ""]
            inside = True
        elif inside and line.strip():
            out.append(f"  {line.strip()}" if line.startswith(" ") else f"* {line}")
        else:
            inside = False
            out.append(line)
    lines[:] = out


def setup(app):
    app.connect("autodoc-process-docstring", keep_absolute_values, priority=400)  # before napoleon's
    app.connect("autodoc-process-docstring", list_parameters, priority=410)
