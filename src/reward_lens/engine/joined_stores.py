"""Activation stores of several models over the same texts and positions, read as one: their samples side by side.

Which positions count as attention sinks is decided by a model's own norms, so two models' stores of the same texts can
hold different samples, even equally many. Every sample's text, position and token are compared before anything is read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reward_lens.engine.activation_store import ActivationStore
from reward_lens.engine.store_batches import Batches
from reward_lens.errors import DataError

_SAME = ("inputs_hash", "positions", "n_samples")
_COLUMNS = ("text", "position", "token")


class JoinedStores:
    """Samples [n, sum of widths] of two or more stores; in memory are one shard of each, the buffer and a batch.

    `widths`: of each store's part; `meta`: what each store says of itself. Raises `DataError` unless the stores hold
    the same positions of the same texts in the same tokens.
    """

    def __init__(self, stores: Sequence[ActivationStore]):
        self.stores = tuple(stores)
        self._require_same()
        self.widths = tuple(store.d_model for store in self.stores)
        self.meta: dict[str, Any] = {"joined": [dict(store.meta) for store in self.stores]}

    def __len__(self) -> int:
        return len(self.stores[0])

    def batches(
        self,
        size: int,
        seed: int = 0,
        epochs: int | None = 1,
        buffer: int = 16384,
        drop_last: bool = False,
        start: dict[str, Any] | None = None,
    ) -> Batches:
        """Shuffled batches [size, sum of widths]; settings and `state()` as of `ActivationStore.batches`."""
        identity = " + ".join(store.identity for store in self.stores)
        kinds = {store.dtype for store in self.stores}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        sizes = self.stores[0].shard_sizes
        starts = [sum(sizes[:shard]) for shard in range(len(sizes))]

        def load(shard: int) -> Tensor:
            rows = starts[shard], starts[shard] + sizes[shard]
            return torch.cat([store.column("activations", *rows).to(dtype) for store in self.stores], 1)

        return Batches(
            sizes, load, identity, sum(self.widths), dtype,
            size=size, seed=seed, epochs=epochs, buffer=buffer, drop_last=drop_last, start=start,
        )  # fmt: skip

    def _require_same(self) -> None:
        first = self.stores[0]
        for number, other in enumerate(self.stores[1:], 2):
            found = [f"{key} {other.meta[key]} (store {number}), {first.meta[key]} (store 1)" for key in _SAME
                     if other.meta[key] != first.meta[key]]  # fmt: skip
            found = found or self._differing(other, number)
            if found:
                raise DataError(
                    "The stores are not of the same positions of the same texts",
                    found="; ".join(found),
                    expected="the same texts, positions and tokens, sample by sample",
                    do="store the same inputs with both models and the same settings; where the models' attention "
                    "sinks or tokenizers differ, with exclude=('first',) or models of one tokenizer",
                )

    def _differing(self, other: ActivationStore, number: int) -> list[str]:
        start = 0
        for rows in self.stores[0].shard_sizes:
            for name in _COLUMNS:
                mine, theirs = (store.column(name, start, start + rows) for store in (self.stores[0], other))
                at = (mine != theirs).nonzero().flatten()
                if len(at):
                    i = int(at[0])
                    return [f"{name} {int(theirs[i])} (store {number}), {int(mine[i])} (store 1) at sample {start + i}"]
            start += rows
        return []
