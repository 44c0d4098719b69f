"""A direction of the residual stream as a caller gives it: its numbers at length one, or what is wrong with it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def unit_vector(given: Any, width: int) -> tuple[Tensor, str | None]:
    """`given`, a list, an array or a tensor, in float64 at length one, and None; or anything and what is wrong."""
    try:
        numbers = given.detach() if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given, dtype=float))
    except (TypeError, ValueError):
        return torch.empty(0), f"no numbers, but an object of type {type(given).__name__}"
    row = numbers.double().cpu()
    wrong = (
        f"shape {tuple(row.shape)}" if row.shape != (width,)
        else "NaN or infinite entries" if not bool(row.isfinite().all())
        else "zeros only" if not bool(row.any())
        else None
    )  # fmt: skip
    if wrong is None:
        row = row / row.abs().max()  # so that squares neither overflow nor vanish
        row = row / row.norm()
    return row, wrong
