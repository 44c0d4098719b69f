"""Samples of several models at the same positions of the same texts, side by side in one batch: for a crosscoder."""

from typing import Any

import torch
from torch import Tensor

from reward_lens.engine.activation_store import ActivationStore
from reward_lens.engine.joined_stores import JoinedStores
from reward_lens.errors import DataError
from reward_lens.sae.batches import Chunk, Samples, sample_tensors


class JoinedSamples(Samples):
    """As `Samples`, each batch [b, sum of widths]; `widths` says where one model's part ends and the next begins."""

    expected = (
        "a tuple of two or more tensors [n, d_i], one a model, of as many activation stores, or an iterator of "
        "tuples of tensors [b, d_i]"
    )
    do = "give every model's activations at the same positions of the same texts, in the same order"

    def __init__(self, source: Any, seed: int, device: torch.device):
        self.widths: tuple[int, ...] = ()
        several = isinstance(source, tuple | list)
        if several and source and all(isinstance(one, ActivationStore) for one in source) and len(source) > 1:
            source = JoinedStores(source)
            self.widths = source.widths
        elif isinstance(source, Tensor | ActivationStore) or (several and len(source) < 2 and not _nested(source)):
            found = f"{len(source)} of them" if several else f"one {type(source).__name__}"
            raise DataError("A crosscoder needs several models' activations", found=found, expected=self.expected,
                            do=self.do)  # fmt: skip
        super().__init__(source, seed, False, device)

    def _read(self, value: Any) -> tuple[Tensor, ...] | None:
        if isinstance(value, Tensor) and self.widths:
            return value.split(self.widths, 1)  # a batch of joined stores
        if not isinstance(value, tuple | list) or len(value) < 2:
            return None
        tensors = sample_tensors(value, len(value))
        if tensors is None:
            return None
        widths = tuple(t.shape[1] for t in tensors)
        if self.widths and widths != self.widths:
            raise DataError("The samples have different widths", found=f"{widths}, then {self.widths}",
                            expected="one width a model", do="keep the models in one order")  # fmt: skip
        self.widths = widths
        return tensors

    def _chunk(self, *tensors: Tensor) -> Chunk:
        return super()._chunk(torch.cat([t.detach().to(self.device, torch.float32) for t in tensors], 1))


def _nested(source: Any) -> bool:
    return any(isinstance(one, tuple | list) for one in source)
