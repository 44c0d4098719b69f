"""The files of a checkpoint, of a hub repository or a folder: the names of the tensors it holds, and the tensors."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Of an unsharded checkpoint; a sharded one has an index beside its shards."""


def file_of(path: str, revision: str | None, name: str) -> Path | None:
    """One file, downloaded if need be; None where there is none of that name."""
    if Path(path).exists():
        file = Path(path) / name
        return file if file.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except EntryNotFoundError:
        return None


def names_in(path: str, revision: str | None) -> frozenset[str]:
    """Names of all tensors; empty for a checkpoint kept in no usual file."""
    for whole in WHOLE:
        index = file_of(path, revision, whole + ".index.json")
        if index is not None:
            return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        file = file_of(path, revision, whole)
        if file is not None:
            with _opened(file) as tensors:
                return frozenset(tensors)
    return frozenset()


def tensors_in(path: str, revision: str | None, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The tensors of these names that the checkpoint holds (None: all), whichever of the usual files it is kept in."""
    found: dict[str, Tensor] = {}
    for file in _files(path, revision, names):
        with _opened(file) as tensors:
            found |= {name: tensors[name] for name in tensors if names is None or name in names}
    return found


class _Lazy:
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, opened: Any):
        self._opened = opened

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            yield _Lazy(opened)
    else:
        yield torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _files(path: str, revision: str | None, names: tuple[str, ...] | None) -> list[Path]:
    for whole in WHOLE:
        index = file_of(path, revision, whole + ".index.json")
        if index is not None:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = set(where.values()) if names is None else {where[name] for name in names if name in where}
            return [file for shard in sorted(shards) if (file := file_of(path, revision, shard)) is not None]
        if (file := file_of(path, revision, whole)) is not None:
            return [file]
    return []
