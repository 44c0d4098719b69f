"""Cells of terms by terms, and by tests, filled in both ways at once; and the label on which the tests agree."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reward_lens.methods.terms.direction_cosines import Measured


class TermTable:
    """Cells (term, other, test) as they are filled in, both ways at once."""

    def __init__(self, names: list[str], tests: tuple[str, ...]):
        self.names, self.tests = names, tests
        shape = (len(names), len(names), len(tests))
        self.cells = {key: np.full(shape, np.nan) for key in ("value", "low", "high", "needed")}
        self.pairs = {f"{key}{end}": np.full(shape[:2], np.nan)
                      for key in ("cosine_whitened", "loss") for end in ("", "_low", "_high")}  # fmt: skip
        self.effects = {f"own_effect{end}": np.full(len(names), np.nan) for end in ("", "_low", "_high")}
        self.text = {key: np.full(shape, "", dtype=object) for key in ("label", "reason")}
        self.asked = np.ones(shape, bool)

    def put(self, i: int, j: int, test: str, ways, label: str, reason: str, needed: float, asked: bool = True) -> None:
        k = self.tests.index(test)
        for place, m in (((i, j, k), ways[0]), ((j, i, k), ways[1])):
            for key, number in (("value", m.value), ("low", m.low), ("high", m.high), ("needed", needed)):
                self.cells[key][place] = number
            self.text["label"][place], self.text["reason"][place], self.asked[place] = label, reason, asked

    def own(self, i: int, measure: Callable[[], Measured]) -> float:
        """Lower end of a term's effect on itself, measured when it is first asked for."""
        if np.isnan(self.effects["own_effect"][i]):
            m = measure()
            for end, number in (("", m.value), ("_low", m.low), ("_high", m.high)):
                self.effects["own_effect" + end][i] = number
        return float(self.effects["own_effect_low"][i])

    def pair(self, key: str, i: int, j: int, ways: Sequence[Measured]) -> None:
        for place, m in (((i, j), ways[0]), ((j, i), ways[1])):
            for end, number in (("", m.value), ("_low", m.low), ("_high", m.high)):
                self.pairs[key + end][place] = number

    def joint(self) -> tuple[np.ndarray, dict[str, str]]:
        """The label on which all tests asked agree, and why there is none."""
        out, why = np.full((len(self.names),) * 2, "", dtype=object), {}
        for i, j in itertools.combinations(range(len(self.names)), 2):
            told = {t: self.text["label"][i, j, k] for k, t in enumerate(self.tests) if self.asked[i, j, k]}
            one = set(told.values())
            out[i, j] = out[j, i] = one.pop() if len(one) == 1 else "undetermined"
            if out[i, j] == "undetermined":
                said = ", ".join(f"{test} {label}" for test, label in told.items())
                why[f"{self.names[i]}, {self.names[j]}"] = said or "none of the tests can be asked"
        return out, why

    def coords(self) -> dict[str, Any]:
        cube, square = ("term", "other", "test"), ("term", "other")
        return {
            **{key: (cube, table) for key, table in self.text.items()},
            "needed": (cube, self.cells["needed"]),
            **{key: (square, table) for key, table in self.pairs.items()},
            **{key: ("term", column) for key, column in self.effects.items()},
        }
