"""An activation store as it is read: shuffled batches for training, samples in order, and where a sample is from."""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_lens.engine.store_batches import Batches
from reward_lens.engine.store_files import FolderShelf, Shelf, dtype_of
from reward_lens.engine.store_identity import require_same_model
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site


class Place(NamedTuple):
    """Where a sample is from."""

    text: int
    """Number of the text in the inputs (for pairs 2i is the chosen, 2i + 1 the rejected text of pair i)."""
    position: int
    token: int
    """Id of the token at the position."""


class Chunk(NamedTuple):
    """Consecutive samples, in the order of texts and positions."""

    start: int
    """Number of the first sample."""
    values: Float[Tensor, "n width"]
    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    norm: Float[Tensor, " n"]


class ActivationStore:
    """Activations of a site, in shards; `store_activations` makes one, `ActivationStore.open` finds it again.

    At most one shard is in memory at a time (besides a buffer and a batch, see `batches`), unless the store is held in
    memory as a whole. `meta` says what is in it: `site`, `positions`, the model, `n_samples`, `n_texts`, `left_out`
    (positions left out, by reason, and `duplicates`, texts), `norm_mean` and `norm_rms` of the samples, `inputs_hash`.
    """

    def __init__(self, shelf: Shelf, index: dict[str, Any]):
        self._shelf, self._index = shelf, index
        self._starts = list(itertools.accumulate((s["rows"] for s in index["shards"]), initial=0))
        self.folder: Path | None = shelf.folder
        self.site = Site.parse(index["settings"]["site"])
        self.d_model: int = index["width"]
        self.meta: dict[str, Any] = _meta(index)

    @classmethod
    def open(cls, folder: str | Path, rm: RewardModel | None = None, partial: bool = False) -> "ActivationStore":
        """The store in a folder.

        Parameters
        ----------
        rm: the model it should be of; another model raises `DataError`.
        partial: open a store that is not finished, with the shards it has; otherwise it raises `DataError`.

        Raises `DataError` for a folder that is no store, a store without samples, and files that are missing or of
        another size than was written (other bytes are noticed when a shard is first read).
        """
        shelf = FolderShelf(folder)
        index = shelf.read_index()
        if index is None:
            raise DataError(
                f"There is no activation store in {folder}",
                found="an empty folder" if Path(folder).is_dir() else "nothing at that path",
                expected="a folder that store_activations wrote",
                do="check the path",
            )
        if not index["complete"] and not partial:
            raise DataError(
                f"The store in {folder} is not finished",
                found=f"{index['n_samples']} samples of the first {index['n_texts']} texts",
                expected="a store whose run came to its end",
                do="call store_activations again with the same arguments, or pass partial=True",
            )
        require_samples(index)
        store = cls(shelf, index)
        if rm is not None:
            store.require_model(rm)
        return store

    def require_model(self, rm: RewardModel) -> None:
        """Raise `DataError` unless the samples are of this model's trunk (an edit of the head does not matter)."""
        require_same_model(rm, self._index["model"], f"The store of {self.site}", ("fingerprint",))

    def __len__(self) -> int:
        return self._starts[-1]

    def batches(
        self,
        size: int,
        seed: int = 0,
        epochs: int | None = 1,
        buffer: int = 16384,
        drop_last: bool = False,
        start: dict[str, Any] | None = None,
    ) -> Batches:
        """Shuffled batches for training.

        Parameters
        ----------
        size: samples a batch; the last one of an epoch may be short, unless `drop_last`.
        seed: of the order; every epoch has another order.
        epochs: how often every sample comes; None: without end.
        buffer: samples that are mixed with the shard that is read. In memory are one shard and the buffer in the
            precision of the store, and one float32 batch.
        start: a `state()` of batches of this store with the same size, seed, buffer and drop_last: go on from there.

        Returns an iterator over float32 tensors [size, d_model] on the CPU; its `state()`, after any batch, is a dict
        that JSON can hold.
        Raises `DataError` for a state of other batches and where there would be no batch.
        """
        return Batches(
            self.shard_sizes, lambda shard: self._tensor(shard, "activations"), self.identity, self.d_model, self.dtype,
            size=size, seed=seed, epochs=epochs, buffer=buffer, drop_last=drop_last, start=start,
        )  # fmt: skip

    def chunks(self, size: int = 4096) -> Iterator[Chunk]:
        """All samples in the order of texts and positions, in float32, at most `size` at once and one shard held."""
        for shard, start in enumerate(self._starts[:-1]):
            values, *sides = (self._tensor(shard, n) for n in ("activations", "text", "position", "token", "norm"))
            for first in range(0, len(values), size):
                rows = slice(first, first + size)
                yield Chunk(start + first, values[rows].float(), *(side[rows] for side in sides))

    def tensor(self) -> Float[Tensor, "n width"]:
        """All samples in order, in float32: for stores that fit in memory."""
        out = torch.empty(len(self), self.d_model)
        for chunk in self.chunks():
            out[chunk.start : chunk.start + len(chunk.values)] = chunk.values
        return out

    def column(self, name: str, start: int, stop: int) -> Tensor:
        """Consecutive samples' "activations", "text", "position", "token" or "norm" as stored, read shard by shard."""
        parts = []
        for shard in range(bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop)):
            first = self._starts[shard]
            parts.append(self._tensor(shard, name)[max(0, start - first) : stop - first].clone())
        return torch.cat(parts)

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the samples are stored in."""
        return dtype_of(self._index["settings"]["dtype"])

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in every shard."""
        return [shard["rows"] for shard in self._index["shards"]]

    @property
    def identity(self) -> str:
        """Tells the store's samples, and the shards they are read from, from those of another."""
        settings = hashlib.sha256(json.dumps(self._index["settings"], sort_keys=True).encode()).hexdigest()[:16]
        model = self._index["model"]["fingerprint"]
        return f"{self.site} {len(self)} {self._index['inputs_hash']} {model} {settings}"

    def at(self, sample: int) -> Place:
        """The text, the position and the token id of a sample (in the order of `chunks` and `tensor`)."""
        if not 0 <= sample < len(self):
            raise DataError(
                "The store has no such sample",
                found=str(sample),
                expected=f"0 to {len(self) - 1}",
                do="correct the number",
            )
        shard = bisect.bisect_right(self._starts, sample) - 1
        entry, row = self._index["shards"][shard], sample - self._starts[shard]
        return Place(*(self._shelf.element(shard, entry, n, row) for n in ("text", "position", "token")))

    @property
    def texts(self) -> "Texts":
        """Token pieces of every text that has a sample, by its number; raises `DataError` unless they were kept."""
        if not self._index["settings"]["keep_texts"]:
            raise DataError(
                "The texts of this store were not kept",
                found="keep_texts=False",
                expected="a store with token pieces",
                do="store the activations with keep_texts=True, or tokenise the text that store.at(i) names",
            )
        return Texts(self._shelf, self._index["shards"])

    def _tensor(self, shard: int, name: str) -> Tensor:
        return self._shelf.tensor(shard, self._index["shards"][shard], name)

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {self.folder}"
        return (
            f"<ActivationStore {len(self)} samples [{self.d_model}] of {self.site}, {self.meta['positions']!r}"
            f" positions of {self.meta['n_texts']} texts, {len(self._starts) - 1} shard(s) {where}>"
        )


class Texts(Mapping[int, tuple[str, ...]]):
    """Token pieces by the number of the text, read a shard at a time."""

    def __init__(self, shelf: Shelf, shards: list[dict[str, Any]]):
        self._shelf, self._shards = shelf, shards
        self._held: tuple[int, dict[int, tuple[str, ...]]] = (-1, {})

    def __getitem__(self, text: int) -> tuple[str, ...]:
        # the first shard that reaches as far as the text: where it begins, if it has samples
        return self._of(bisect.bisect_left(self._shards, text, key=lambda shard: shard["last_text"]))[text]

    def __iter__(self) -> Iterator[int]:
        for shard in range(len(self._shards)):
            yield from self._of(shard)

    def __len__(self) -> int:
        return sum(shard["n_texts"] for shard in self._shards)

    def _of(self, shard: int) -> dict[int, tuple[str, ...]]:
        if shard >= len(self._shards):
            return {}
        if self._held[0] != shard:
            self._held = (shard, self._shelf.texts(shard, self._shards[shard]))
        return self._held[1]


def require_samples(index: dict[str, Any]) -> None:
    """Raise `DataError` for a store of nothing, with what was left out."""
    if not index["n_samples"]:
        out = ", ".join(f"{reason} {n}" for reason, n in index["left_out"].items() if n)
        raise DataError(
            "There are no samples to store",
            found=f"{index['n_texts']} texts" + (f"; left out: {out}" if out else ""),
            expected="at least one sample",
            do="pass texts, or leave fewer positions out (exclude=, sink_multiple=)",
        )


def _meta(index: dict[str, Any]) -> dict[str, Any]:
    shards, n = index["shards"], index["n_samples"]
    return {
        **index["settings"], "model": index["model"], "width": index["width"], "complete": index["complete"],
        "n_samples": n, "n_texts": index["n_texts"], "left_out": dict(index["left_out"]),
        "inputs_hash": index["inputs_hash"],
        "norm_mean": sum(s["norm_mean"] * s["rows"] for s in shards) / n,
        "norm_rms": (sum(s["norm_rms"] ** 2 * s["rows"] for s in shards) / n) ** 0.5,
    }  # fmt: skip
