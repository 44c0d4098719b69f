"""Checks of single values, and the words of the errors of the package."""

import re
from collections.abc import Mapping
from typing import Any

from reward_lens.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")


def checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise malformed(field, shown(value), "text")
    if lone := _SURROGATE.search(value):
        found = f"a lone surrogate, U+{ord(lone[0]):04X}, at character index {lone.start()}"
        raise malformed(field, found, "text that UTF-8 can encode", "repair the text where it was decoded")
    return value


def checked_texts(values: Any, field: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise malformed(field, shown(values), "a list of texts")
    return tuple(checked_text(value, f"{field}[{index}]") for index, value in enumerate(values))


def checked_turns(value: Any, field: str, last: str = "user") -> tuple[tuple[str, str], ...]:
    """Messages as (role, content); any other key (a tool call) is refused rather than lost."""
    if not isinstance(value, list | tuple) or not value:
        raise malformed(field, shown(value), f"text, or a list of messages that ends with the {last}")
    turns = []
    for index, message in enumerate(value):
        extra = [k for k, v in message.items() if v is not None] if isinstance(message, Mapping) else []
        if not isinstance(message, Mapping) or not {"role", "content"}.issuperset(extra):
            raise malformed(f"{field}[{index}]", shown(message), "an object of 'role' and 'content' alone")
        turns.append(tuple(checked_text(message.get(key), f"{field}[{index}].{key}") for key in ("role", "content")))
    if turns[-1][0] != last:
        raise malformed(field, f"a last message by '{turns[-1][0]}'", f"a last message by '{last}'")
    return tuple(turns)


def as_float(value: Any) -> float:
    """The number that a value is or that its text says (all cells of a CSV file are text); NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def malformed(field: str, found: str, expected: str, do: str = "correct or leave out the row") -> DataError:
    return DataError(f"The field '{field}' cannot be used", found=found, expected=expected, do=do)


def unreadable(where: str, found: Any, expected: str, do: str = "correct the file") -> DataError:
    found = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else found
    return DataError(f"{where} cannot be read", found=found, expected=expected, do=do)


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
