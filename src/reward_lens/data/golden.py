"""Scores that authors printed for a text of their own, each with the page it stands on.

Whoever has the weights can hold them against what this library gives: the one test of a whole load, template included,
that needs nothing but the published number.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, no_type_check

from reward_lens.data.checks import checked_text, malformed, shown
from reward_lens.data.items import as_messages
from reward_lens.data.sources import open_rows
from reward_lens.errors import DataError, named


@no_type_check  # as in `data.items`: a wrong type is a DataError
@dataclasses.dataclass(frozen=True)
class GoldenScore:
    """One published score.

    Parameters
    ----------
    model: hub id of the model.
    expected, tolerance: the printed score, and how far another precision or attention kernel may move it.
    source: address of the page that prints it.
    prompt, response: the conversation; or
    text: a text that was scored as it is, without a template; `minus` is one whose score was taken off.
    objective: of a head with several; None: the model's reward.
    precision: what the authors ran it in. note: how the printed number became `expected`. revision: of the model.

    Raises `DataError` for what is none of these.
    """

    model: str
    expected: float
    tolerance: float
    source: str
    prompt: Any = None
    response: str | None = None
    text: str | None = None
    minus: str | None = None
    objective: str | None = None
    precision: str = "not said"
    note: str = ""
    revision: str | None = None

    def __post_init__(self):
        for name in ("model", "source"):
            if not checked_text(getattr(self, name), name).strip():
                raise malformed(name, "a blank", "the hub id, or the page's address")
        for name in ("expected", "tolerance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise malformed(name, shown(value), "a number")
        if not self.tolerance > 0:
            raise malformed("tolerance", shown(self.tolerance), "a number above 0")
        given = [n for n in ("prompt", "response", "text", "minus") if getattr(self, n) is not None]
        if given not in (["prompt", "response"], ["text"], ["text", "minus"]):
            found = f"{', '.join(given) or 'none'} given"
            raise malformed("text", found, "prompt and response, or text (and minus)")
        if self.prompt is not None:
            as_messages(self.prompt)
        for name in ("response", "text", "minus"):
            if getattr(self, name) is not None:
                checked_text(getattr(self, name), name)

    @property
    def words(self) -> str:
        """The scored text in short."""
        if self.text is not None:
            return _short(self.text) + (f" - {_short(self.minus)}" if self.minus is not None else "")
        return f"{_short(as_messages(self.prompt)[-1]['content'])} / {_short(self.response or '')}"

    def of(self, name: str, revision: str | None) -> bool:
        """Whether it is one of the model of that name (its hub id, or a folder called as the id ends) and revision,
        where both are known."""
        same = self.revision is None or revision is None or revision.startswith(self.revision)
        return same and name in (self.model, self.model.split("/")[-1])


def golden_entries(source: str | Path | Iterable[Any] | None = None) -> tuple[GoldenScore, ...]:
    """Published scores from a JSON lines file or from rows; None: those that come with the package.

    Raises `DataError` with the line of a row that cannot be used.
    """
    if source is None:
        source = Path(str(resources.files("reward_lens") / "assets" / "golden.jsonl"))
    if isinstance(source, str | Path):
        name, rows = open_rows(source, None, None)
    else:
        name, rows = "entries", ((f"entry {i}", row) for i, row in enumerate(source, 1))
    return tuple(_entry(f"{name}, {where}", row) for where, row in rows)


def _entry(where: str, row: Any) -> GoldenScore:
    if isinstance(row, GoldenScore):
        return row
    fields = {field.name for field in dataclasses.fields(GoldenScore)}
    needed = {"model", "expected", "tolerance", "source"}
    if not isinstance(row, Mapping) or not needed <= row.keys() <= fields:
        raise DataError(
            f"{where}: this is no golden score",
            found=", ".join(map(str, row)) if isinstance(row, Mapping) else shown(row),
            expected=f"an object with {', '.join(sorted(needed))}, and a conversation or a text",
            do="correct or leave out the row",
        )
    return named(where, functools.partial(GoldenScore, **row))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."
