"""Annotations are checked while tests run: shapes by jaxtyping, the rest by beartype."""

import beartype.roar
import jaxtyping
import numpy as np
import pytest

from reward_lens.methods.comparison.compared_states import cka_of
from reward_lens.model.readout import Rows, chosen_rows
from reward_lens.result import Check

WRONG = (jaxtyping.TypeCheckError, beartype.roar.BeartypeCallHintViolation)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cka_of(np.zeros((2, 3)), np.zeros((2, 3))),  # not square
        lambda: cka_of(np.zeros((4, 4)), np.zeros((5, 5))),  # n is not n
        lambda: chosen_rows("names", None, "model"),
        lambda: chosen_rows(("a",), None, 1),
        lambda: Check(1, 0.0, 1.0),
    ],
)
def test_what_is_not_as_annotated_is_refused(call):
    with pytest.raises(WRONG):
        call()


def test_what_is_as_annotated_is_not():
    assert chosen_rows(("a",), None, "model") == Rows(0, None, "a")
    assert Check("gap", 0.0, 1.0).passed
