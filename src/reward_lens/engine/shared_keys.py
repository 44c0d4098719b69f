"""Grouped-query attention without a copy of the keys and values for every query head."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


@contextlib.contextmanager
def shared_keys(x: Tensor) -> Iterator[None]:
    """On a CPU the query heads of a group read their common keys and values where they lie, to the same bits.

    transformers copies them for every head where there is a mask, since CUDA kernels ask for that; this is its switch.
    """
    if x.device.type != "cpu" or x.shape[1] == 1 or torch.is_grad_enabled():  # one query token is not copied for
        yield
        return
    before = os.environ.get(GROUPED)
    os.environ[GROUPED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[GROUPED]
        else:
            os.environ[GROUPED] = before
