"""Rows of several shards in shuffled batches, with one shard and one buffer in memory.

The shards come in random order and each shard's rows in random order; every row goes through a buffer, which it leaves
when later rows take its place at random. What is drawn depends on the seed, the epoch and the numbers of rows alone,
not on the rows. So a state is two counters, and going on from it replays the draws without reading a shard, then reads
the shards that the buffer has rows of.

With a buffer as large as the store this is a uniform shuffle; with a smaller one, rows of shards that are read far
apart never meet in a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_lens.errors import DataError


@dataclasses.dataclass(frozen=True)
class Step:
    """Some rows leave the buffer, others enter it."""

    leave: Int[np.ndarray, " out"]
    """Slots whose rows go into the batch."""
    into: Int[np.ndarray, " in"]
    """Slots that are filled."""
    enter: Int[np.ndarray, " in"]
    """Numbers of the rows that fill them, all of one shard."""
    ends: bool
    """Whether the batch is complete."""


def plan(counts: Sequence[int], size: int, buffer: int, rng: np.random.Generator) -> Iterator[Step]:
    """The steps of one epoch over shards of these many rows; the last batch may be short."""
    none = np.zeros(0, dtype=np.int64)
    starts = np.cumsum([0, *counts])
    capacity = min(buffer, int(starts[-1]))
    held = filled = 0  # rows in the buffer, and in the batch that is being made
    for shard in rng.permutation(len(counts)):
        rows = starts[shard] + rng.permutation(counts[shard])
        first = min(capacity - held, len(rows))
        if first:
            yield Step(none, np.arange(held, held + first), rows[:first], False)
            held += first
        done = first
        while done < len(rows):
            n = min(size - filled, len(rows) - done, capacity)
            slots = rng.choice(capacity, n, replace=False)
            filled = (filled + n) % size
            yield Step(slots, slots, rows[done : done + n], filled == 0)
            done += n
    rest = rng.permutation(held)
    done = 0
    while done < held:
        n = min(size - filled, held - done)
        filled = (filled + n) % size
        yield Step(rest[done : done + n], none, none, filled == 0 or done + n == held)
        done += n


class Batches(Iterator[Float[Tensor, "batch width"]]):
    """An iterator over float32 batches that can say where it stands (`state`)."""

    def __init__(
        self,
        counts: Sequence[int],
        load: Callable[[int], Tensor],
        store: str,
        width: int,
        dtype: torch.dtype,
        *,
        size: int,
        seed: int,
        epochs: int | None,
        buffer: int,
        drop_last: bool,
        start: dict[str, Any] | None,
    ):
        _require(sum(counts), size, seed, epochs, buffer, drop_last)
        self._counts, self._load, self._epochs = counts, load, epochs
        self._width, self._dtype = width, dtype
        self._starts = np.cumsum([0, *counts])
        self._fixed = {"store": store, "size": size, "seed": seed, "buffer": buffer, "drop_last": drop_last}
        self._epoch = self._batch = 0
        if start is not None:
            self._require_same(start)
            self._epoch, self._batch = start["epoch"], start["batch"]
        self._at: tuple[int, Tensor] | None = None  # the one shard in memory
        self._rows = self._all()

    def state(self) -> dict[str, Any]:
        """Where the iteration stands, for `start=`: numbers and text that JSON can hold."""
        return {**self._fixed, "epoch": self._epoch, "batch": self._batch}

    def __next__(self) -> Float[Tensor, "batch width"]:
        return next(self._rows)

    def _all(self) -> Iterator[Tensor]:
        while self._epochs is None or self._epoch < self._epochs:
            for batch in self._one_epoch(self._batch):
                self._batch += 1
                yield batch
            self._epoch, self._batch = self._epoch + 1, 0

    def _one_epoch(self, skip: int) -> Iterator[Tensor]:
        size, drop_last = self._fixed["size"], self._fixed["drop_last"]
        rng = np.random.default_rng([self._fixed["seed"], self._epoch])
        ids = np.full(min(self._fixed["buffer"], int(self._starts[-1])), -1)
        pool = None if skip else self._filled(ids)
        parts: list[Tensor] = []
        made = rows = 0
        for step in plan(self._counts, size, self._fixed["buffer"], rng):
            rows += len(step.leave)
            if pool is not None and len(step.leave):
                parts.append(pool[torch.from_numpy(step.leave)].float())
            ids[step.leave] = -1
            ids[step.into] = step.enter
            if pool is not None and len(step.enter):
                pool[torch.from_numpy(step.into)] = self._of_shard(step.enter)
            if step.ends:
                made += 1
                if pool is not None:
                    batch = torch.cat(parts)
                    parts = []
                    if rows == size or not drop_last:
                        yield batch
                elif made == skip:
                    pool = self._filled(ids)
                rows = 0
        self._at = None

    def _filled(self, ids: Int[np.ndarray, " slots"]) -> Tensor:
        """A buffer with the rows that stand in it, one shard after the other."""
        shard_of = np.searchsorted(self._starts, ids, side="right") - 1
        present = sorted({int(s) for s in shard_of if s >= 0})
        pool = torch.zeros(len(ids), self._width, dtype=self._dtype)
        for shard in present:
            slots = np.flatnonzero(shard_of == shard)
            pool[torch.from_numpy(slots)] = self._of_shard(ids[slots])
        return pool

    def _of_shard(self, rows: Int[np.ndarray, " rows"]) -> Tensor:
        """Rows of one shard, which takes the place of the shard in memory."""
        shard = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
        if self._at is None or self._at[0] != shard:
            self._at = None  # let go of the one before the next is read
            self._at = (shard, self._load(shard))
        return self._at[1][torch.from_numpy(rows - self._starts[shard])]

    def _require_same(self, start: dict[str, Any]) -> None:
        differing = [name for name, value in self._fixed.items() if start.get(name) != value]
        if differing or not all(isinstance(start.get(name), int) for name in ("epoch", "batch")):
            names = differing or ["epoch or batch"]
            raise DataError(
                "The batches cannot go on from this state",
                found="another " + ", ".join(f"{n} ({start.get(n)!r})" for n in names),
                expected=", ".join(f"{n}={self._fixed.get(n)!r}" for n in names),
                do="pass the settings that the state was taken with, and the store it was taken from",
            )


def _require(rows: int, size: int, seed: int, epochs: int | None, buffer: int, drop_last: bool) -> None:
    for name, value, least in (("size", size, 1), ("buffer", buffer, 1), ("epochs", epochs, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise DataError(
                f"The setting '{name}' cannot be used",
                found=str(value),
                expected=f"{least} or more",
                do=f"correct {name}=",
            )
    if drop_last and rows < size:
        raise DataError(
            "There is no whole batch",
            found=f"{rows} samples, and the last short batch dropped",
            expected=f"at least {size}, one batch",
            do="choose a smaller batch, or drop_last=False",
        )
