"""Where a store's shards lie: in a folder of safetensors with a JSON index, or in memory.

    index.json                    what the store holds and how far it has come; written after every shard
    shard-00000.safetensors       "activations" [n, width]; "text", "position", "token" [n] int32; "norm" [n] float32
    shard-00000.texts.json        token pieces of the texts whose first sample stands in the shard, where they are kept

Every file is written under another name and then renamed, the index last: a run that is killed leaves whole files and
an index that speaks of whole shards alone. Sizes are compared when a store is opened, and the SHA-256 of a file when
it is first read.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reward_lens.errors import DataError

FORMAT = "reward-lens activation store"
VERSION = 1
INDEX = "index.json"
PARTIAL = ".partial"
SPARE_BYTES = 64 * 2**20
"""Disk room that is left free."""


class MemoryShelf:
    """Shards that are held."""

    folder = None

    def __init__(self):
        self._shards: list[dict[str, Tensor]] = []
        self._texts: list[dict[int, tuple[str, ...]]] = []

    def put(self, number: int, tensors: dict[str, Tensor], texts: dict[int, tuple[str, ...]] | None) -> dict[str, Any]:
        """Keep one shard; returns its entry in the index."""
        self._shards.append(tensors)
        self._texts.append(texts or {})
        return {"file": f"in memory, {number}"}

    def tensor(self, number: int, entry: dict[str, Any], name: str) -> Tensor:
        """One tensor of a shard."""
        return self._shards[number][name]

    def element(self, number: int, entry: dict[str, Any], name: str, row: int) -> int:
        """One number of a side tensor."""
        return int(self._shards[number][name][row])

    def texts(self, number: int, entry: dict[str, Any]) -> dict[int, tuple[str, ...]]:
        """The kept texts of a shard."""
        return self._texts[number]

    def write_index(self, index: dict[str, Any]) -> None:
        """Nothing: the index is held with the store."""

    def require_room(self, needed: int) -> None:
        """Nothing: only a disk is asked."""


class FolderShelf:
    """Shards in a folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._sound: set[str] = set()

    def read_index(self) -> dict[str, Any] | None:
        """The folder's index, None where there is no store yet; raises `DataError` for a folder of anything else."""
        path = self.folder / INDEX
        if not path.exists():
            others = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
            others = sorted(name for name in others if name != INDEX + PARTIAL)
            if others or (self.folder.exists() and not self.folder.is_dir()):
                raise self._foreign(", ".join(others[:3]) or "a file")
            return None
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._foreign(f"an {INDEX} that is not JSON ({error})") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise self._foreign(f"an {INDEX} of something else")
        if index.get("version") != VERSION:
            raise DataError(
                f"The store in {self.folder} was written in another version of the format",
                found=f"version {index.get('version')}",
                expected=f"version {VERSION}",
                do="store the activations again with this library",
            )
        for entry in index["shards"]:
            for file in filter(None, (entry, entry["texts"])):
                self._require_size(file)
        return index

    def put(self, number: int, tensors: dict[str, Tensor], texts: dict[int, tuple[str, ...]] | None) -> dict[str, Any]:
        """Write one shard; returns its entry in the index."""
        self.require_room(sum(t.nbytes for t in tensors.values()))
        name = f"shard-{number:05d}"
        path = self.folder / f"{name}.safetensors{PARTIAL}"
        save_file(tensors, path)
        entry = self._settle(path)
        entry["texts"] = None
        if texts is not None:
            path = self.folder / f"{name}.texts.json{PARTIAL}"
            path.write_text(json.dumps({str(text): pieces for text, pieces in texts.items()}), encoding="utf-8")
            entry["texts"] = self._settle(path)
        return entry

    def tensor(self, number: int, entry: dict[str, Any], name: str) -> Tensor:
        """One tensor of a shard, copied into memory."""
        with self._open(entry) as file:
            return file.get_tensor(name).clone()

    def element(self, number: int, entry: dict[str, Any], name: str, row: int) -> int:
        """One number of a side tensor, read alone."""
        with self._open(entry) as file:
            return int(file.get_slice(name)[row : row + 1][0])

    def texts(self, number: int, entry: dict[str, Any]) -> dict[int, tuple[str, ...]]:
        """The kept texts of a shard."""
        self._require_sound(entry["texts"])
        read = json.loads((self.folder / entry["texts"]["file"]).read_text(encoding="utf-8"))
        return {int(text): tuple(pieces) for text, pieces in read.items()}

    def write_index(self, index: dict[str, Any]) -> None:
        """Put the index in the place of the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / (INDEX + PARTIAL)
        path.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(path, self.folder / INDEX)

    def require_room(self, needed: int) -> None:
        """Raise `DataError` unless the disk has room for so many bytes and some spare."""
        there = next(p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        if free < needed + SPARE_BYTES:
            raise DataError(
                f"The disk of {self.folder} has too little room for the activations",
                found=f"{free / 2**20:,.0f} MiB free",
                expected=f"{(needed + SPARE_BYTES) / 2**20:,.0f} MiB",
                do="free some room, take fewer texts or positions (per_text=), or store in 16 bits (dtype=)",
            )

    def _settle(self, partial: Path) -> dict[str, Any]:
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = partial.with_name(partial.name.removesuffix(PARTIAL))
        os.replace(partial, path)
        self._sound.add(path.name)
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}

    def _open(self, entry: dict[str, Any]) -> Any:
        self._require_sound(entry)
        try:
            return safe_open(self.folder / entry["file"], framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._damaged(entry["file"], str(error)) from error

    def _require_size(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["file"]
        if not path.is_file():
            raise self._damaged(entry["file"], "no such file")
        if path.stat().st_size != entry["bytes"]:
            raise self._damaged(entry["file"], f"{path.stat().st_size} bytes instead of {entry['bytes']}")

    def _require_sound(self, entry: dict[str, Any]) -> None:
        if entry["file"] in self._sound:
            return
        self._require_size(entry)
        with (self.folder / entry["file"]).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise self._damaged(entry["file"], "other bytes than were written (their SHA-256 differs)")
        self._sound.add(entry["file"])

    def _damaged(self, name: str, found: str) -> DataError:
        return DataError(
            f"{name} of the store in {self.folder} is damaged",
            found=found,
            expected="the file that the index speaks of",
            do="copy the store again, or delete the folder and store the activations again",
        )

    def _foreign(self, found: str) -> DataError:
        return DataError(
            f"{self.folder} is not an activation store",
            found=found,
            expected="an empty folder, one that does not exist yet, or one that store_activations wrote",
            do="choose another folder",
        )


Shelf = MemoryShelf | FolderShelf


def dtype_of(name: str) -> torch.dtype:
    """A torch precision from its name in the index."""
    return getattr(torch, name)
