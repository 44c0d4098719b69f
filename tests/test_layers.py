"""The layers of the package, read off its imports, and the few rules that a linter does not know.

A module imports what its row in MAY_IMPORT lists, nothing above it: what is under `model` can be read without
knowing what is under `methods`.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "reward_lens"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

PLAIN = ("errors", "arguments", "result", "charts", "resampling", "stats", "data", "features", "edits", "joining")
MODEL = (*PLAIN, "engine.hooks", "model")
ENGINE = (*MODEL, "engine")
# Folders of methods, and the other folders that each may use.
THEMES: dict[str, tuple[str, ...]] = {
    "shared": (),
    "observation": ("shared",),
    "causation": ("shared", "observation"),
    "behaviour": ("shared", "observation"),
    "repair": ("shared", "behaviour"),
    "comparison": ("shared", "observation", "causation", "behaviour"),
    "terms": ("shared", "behaviour"),
    "concepts": ("shared", "causation"),
    "training": ("shared",),
    "readouts": ("shared", "observation", "causation"),
    "latents": ("shared", "observation", "behaviour", "comparison"),
}
# The first row that a module falls under holds. The surface (cli, app, the front door) may import everything.
MAY_IMPORT = {
    "errors": (),
    **dict.fromkeys(PLAIN, PLAIN),
    "engine.hooks": (),  # torch only, so that the search for structure in `model` can use it
    "model": MODEL,
    "engine": ENGINE,
    "sae": (*ENGINE, "sae"),
    **{
        f"methods.{theme}": (*ENGINE, "sae", *(f"methods.{other}" for other in (theme, *others)))
        for theme, others in THEMES.items()
    },
    "methods": (),
    "report": (*PLAIN, "report"),
}
SURFACE = ("__init__", "__main__", "cli", "app", "analysis", "explorer")


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Modules of the package that a source imports, inside functions and `TYPE_CHECKING` blocks too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["reward_lens", *module.split(".")]
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            # `from reward_lens.model import checks` names a module, `from reward_lens.errors import X` none.
            names = [
                f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("reward_lens.") in MODULES else base
                for a in node.names
            ]
        else:
            continue
        found |= {n.removeprefix("reward_lens.") for n in names if under(n, "reward_lens")}
    return found


def upward(module: str, imported: set[str]) -> set[str]:
    """Those of the imported modules that the module's row does not allow."""
    if any(under(module, name) for name in SURFACE):
        return set()
    row = next((allowed for prefix, allowed in MAY_IMPORT.items() if under(module, prefix)), None)
    assert row is not None, f"{module} belongs to no layer; give it a row in MAY_IMPORT"
    return {name for name in imported if not any(under(name, prefix) for prefix in row)}


INNER = [name for name in MODULES if name not in SURFACE]


@pytest.mark.parametrize("module", INNER)
def test_imports_point_down(module):
    path = MODULES[module]
    imported = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not upward(module, imported), f"{module} imports from above, or from a folder its own may not use"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.tokens", "from reward_lens.methods.observation.lens import reward_lens"),
        ("model.tokens", "from ..engine import run"),
        ("model.tokens", "def f():\n    import reward_lens.cli"),
        ("methods.behaviour.probes", "from reward_lens.methods.causation import agreement"),
        ("report.page", "from reward_lens.model.tokens import Tokens"),
        ("engine.hooks", "from reward_lens.errors import StructureError"),
        ("data", "import reward_lens"),
    ],
)
def test_the_layer_rule_can_fail(module, source):
    """Each of these lines breaks the rule, so a run without complaint means something."""
    assert upward(module, imports(source, module))


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_house_rules(module):
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    assert not module.endswith("utils"), "a file's name is its one idea"
    assert len(text.splitlines()) <= 400, "over 400 lines: time to split"
    assert module == "engine.hooks" or "register_forward" not in text, "only engine.hooks registers hooks"
    if not under(module, "cli"):
        printed = [call.lineno for call in calls(path) if getattr(call.func, "id", None) == "print"]
        assert not printed, f"print in lines {printed}"
    trusting = [
        call.lineno
        for call in calls(path)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is True
    ]
    assert not trusting, f"remote code trusted without being asked in lines {trusting}"
    broad = [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))
    ]
    assert not broad, f"every exception swallowed in lines {broad}"


HEAVY = ("torch", "transformers", "altair", "pandas", "xarray", "datasets", "sklearn", "scipy")


def heavy_after(statement: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_front_door_is_light():
    assert heavy_after("import reward_lens") == []


def test_help_does_not_wait_for_the_networks():
    assert not {"torch", "transformers", "scipy"} & set(heavy_after("import reward_lens.cli"))


def test_the_front_door_test_can_fail():
    assert "pandas" in heavy_after("import reward_lens, pandas")
