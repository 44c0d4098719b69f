"""Every error the library raises on purpose.

    RewardLensError
    |-- LoadError        a checkpoint, tokenizer or file of weights cannot be used
    |-- StructureError   the network's parts could not be found or proven
    |-- AlignmentError   two runs cannot be compared position by position
    |-- DataError        preference data or text is malformed
    `-- CheckFailed      an identity that a result claims does not hold

The message is four sentences: what happened, what was found, what was expected, what to do.
"""

from collections.abc import Callable
from typing import Any


class RewardLensError(Exception):
    """Base of all errors of the library; `what`, `found`, `expected` and `do` are also attributes."""

    def __init__(self, what: str, *, found: str, expected: str, do: str):
        self.what, self.found, self.expected, self.do = what, found, expected, do
        super().__init__(what, found, expected, do)

    def __str__(self) -> str:
        return (
            f"{_sentence(self.what)} Found: {_sentence(self.found)} "
            f"Expected: {_sentence(self.expected)} What to do: {_sentence(self.do)}"
        )

    def __reduce__(self):
        # Keyword-only arguments do not survive the default pickling of exceptions (worker processes).
        return _rebuild, (type(self), self.what, self.found, self.expected, self.do)


class LoadError(RewardLensError):
    """A checkpoint, its tokenizer or its reward head cannot be used as a reward model."""


class StructureError(RewardLensError):
    """The network's residual writes, norm or head could not be found, or failed the proof."""


class AlignmentError(RewardLensError):
    """Two runs cannot be compared position by position."""


class DataError(RewardLensError):
    """Preference data or a text is malformed; names the file, line and field where there is one."""


class CheckFailed(RewardLensError):
    """An identity that a result claims does not hold within its tolerance."""


def named(item: str, call: Callable, *args: Any) -> Any:
    """`call(*args)`; a `DataError` that it raises says which item of many it is about."""
    try:
        return call(*args)
    except DataError as error:
        what = f"{item}: {error.what[0].lower()}{error.what[1:]}"
        raise DataError(what, found=error.found, expected=error.expected, do=error.do) from error


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def _rebuild(cls, what, found, expected, do):
    return cls(what, found=found, expected=expected, do=do)
