"""The files of a checkpoint, of a hub repository or a folder: the names of the tensors it holds, and the tensors."""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_lens.errors import LoadError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Whole or an index of shards, the first that is there as transformers takes it: others may be of an earlier save."""
VALUE_HEAD = ("value_head.safetensors", "value_head.bin")
"""Of a value head beside a language model or an adapter of one (LLaMA-Factory, ms-swift)."""
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER = "adapter_config.json"
_UNEMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out|lm_loss|output_layer)\.")


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


def has_tokenizer(path: str, revision: str | None) -> bool:
    """Whether there is a tokenizer beside the weights."""
    return any(file_of(path, revision, name) for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def lacking(path: str, tokenizer: bool) -> str | None:
    """What to do about a local path that cannot be loaded, where its files say it: it is a file of a checkpoint
    and not its folder, holds checkpoints instead of being one, names a base that is not there, or has no `tokenizer`
    where one is asked for."""
    folder = Path(path)
    if folder.is_file():
        return f"name the folder that holds it, {folder.parent}, with config.json and the tokenizer beside the weights"
    if not folder.is_dir():
        return None
    if (folder / _ADAPTER).exists():
        if not any((folder / name).exists() for name in ADAPTER):
            return f"save the adapter's weights beside its {_ADAPTER}, as {' or '.join(ADAPTER)}"
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base or not Path(base).is_dir():
            return (
                f"see to the adapter's base, {base!r} (base_model_name_or_path in {_ADAPTER}): a hub id that can be "
                "reached, or a folder that is there from here; a base in memory goes with the adapter around it to "
                "rl.RewardModel(module, tokenizer)"
            )
        tokenizer = tokenizer and not has_tokenizer(base, None)  # which stands in for the adapter's own
    elif not (folder / "config.json").exists():
        found = (f.parent for name in ("config.json", _ADAPTER) for f in folder.glob(f"*/{name}"))
        inside = sorted(found, key=lambda f: (int("0" + "".join(filter(str.isdecimal, f.name))), f.name))
        if inside:
            return f"load one of the folders in it: {some_of([str(f) for f in inside])}"
        return "name a folder that holds config.json beside the weights: this one has neither a model nor an adapter"
    if tokenizer and not has_tokenizer(path, None):
        return "save the tokenizer into the folder (tokenizer.save_pretrained), or pass rl.load(path, tokenizer=...)"
    return None


def names_in(path: str, revision: str | None) -> frozenset[str]:
    """Names of all tensors; empty for a checkpoint kept in no usual file."""
    file = _first_of(_WEIGHTS, path, revision)
    if file is None:
        return frozenset()
    if file.suffix == ".json":
        return frozenset(_shards(file))
    with _opened(file) as tensors:
        return frozenset(tensors)


def tensors_in(path: str, revision: str | None, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The tensors of these names that the checkpoint holds (None: all), whichever of the usual files it is kept in."""
    found: dict[str, Tensor] = {}
    for file in _files(path, revision, names):
        with _opened(file) as tensors:
            found |= {name: tensors[name] for name in tensors if names is None or name in names}
    return found


def value_head_in(path: str, revision: str | None) -> dict[str, Tensor]:
    """The tensors of a value head in a file of its own; empty where there is none."""
    file = _first_of(VALUE_HEAD, path, revision)
    if file is None:
        return {}
    with _opened(file) as tensors:
        return {key: tensors[key] for key in tensors}


def adapter_shapes(path: str, revision: str | None) -> dict[str, list[int]]:
    """Shapes of an adapter's tensors by name."""
    file = _first_of(ADAPTER, path, revision)
    if file is None:
        raise FileNotFoundError(f"{path} has no {' or '.join(ADAPTER)}")
    with _opened(file) as tensors:
        shape = tensors.shape if isinstance(tensors, _Lazy) else lambda key: list(tensors[key].shape)
        return {key: shape(key) for key in tensors}


def _first_of(names: Sequence[str], path: str, revision: str | None) -> Path | None:
    return next((file for name in names if (file := file_of(path, revision, name)) is not None), None)


def require_places(path: str, module: Any, unexpected: Iterable[str]) -> None:
    """Raise `LoadError` where a tensor of a checkpoint belongs to a part that the module has, or to a block that its
    list of blocks has no number for: the class drops it, and what it gives is not what was trained. (Tensors of parts
    that a class leaves out altogether, an unused pooler or a buffer of masks, are not meant.)"""
    dropped = sorted(name for name in unexpected if _is_dropped(module, name))
    if dropped:
        raise LoadError(
            f"A part of {path} would be dropped",
            found=f"{type(module).__name__} has no place for its {some_of(dropped)}",
            expected="a place for every weight of the parts that run",
            do="correct config.json (number of layers, biases), or merge the adapter whose weights these are; if they "
            "have no part in the reward, load the module yourself and pass rl.RewardModel(module, tokenizer)",
        )


def require_sizes(path: str, mismatched: Iterable[Sequence[Any]]) -> None:
    """Raise `LoadError` for tensors (name, shape, the config's shape) of other sizes than the config gives them."""
    if mismatched:
        name, found, expected = min(map(tuple, mismatched))
        raise LoadError(
            f"The weights of {path} are not of the sizes that its config gives them",
            found=f"{name} of shape {tuple(found)}",
            expected=f"shape {tuple(expected)}, by config.json",
            do="correct config.json (num_labels and id2label for a head, vocab_size for an embedding, and so on)",
        )


def other_names(module: Any, missing: Sequence[str], unexpected: Iterable[str]) -> str | None:
    """What to do where the weights that a class lacks are there under other names: of a wrapper (`module.`,
    `rwtransformer.`), of a head, of TRL's value head. None where they are not."""
    trunk, left = module.base_model_prefix + ".", set(unexpected)
    lacking = [name.removeprefix(trunk) for name in missing if name.startswith(trunk)]
    starts = {name.removesuffix(lacking[0]) for name in left if name.endswith(lacking[0])} if lacking else set()
    start = next((one for one in sorted(starts) if left.issuperset(one + rest for rest in lacking)), None)
    steps = [] if start is None else [f"rename weights of the checkpoint, {start!r} to {trunk!r}"]
    own = sorted(
        name for name in left if not name.startswith((start or trunk, trunk)) and not _UNEMBEDDING.search(name)
    )
    heads = [name for name in missing if not name.startswith(trunk)]
    if own == ["v_head.summary.bias", "v_head.summary.weight"]:
        steps.append(
            "save v_head.summary.weight and .bias as value_head.safetensors beside the weights if the reward is at "
            "the last token; rl.load_step_model(path, readout) reads one at the end of every step"
        )
    elif len(own) == len(heads) == 1 and own[0].endswith("weight"):
        steps.append(
            f"rename {own[0]} to {heads[0]}, which is read at the last token that is not config.json's padding"
        )
    return "; ".join(steps) or None


def some_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_dropped(module: nn.Module, name: str) -> bool:
    owner, rest = module, name.split(".")
    while len(rest) > 1 and rest[0] in owner._modules:
        owner, rest = owner.get_submodule(rest[0]), rest[1:]
    packed = rest[0] == "weight" and len(rest) > 1  # what belongs to a weight in few bits
    holds = isinstance(owner, nn.ModuleList) or any(True for _ in owner.parameters(recurse=False))
    return owner is not module and holds and not packed


class _Lazy:
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, opened: Any):
        self._opened = opened

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._opened.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return self._opened.get_slice(name).get_shape()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            yield _Lazy(opened)
    else:
        yield torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _files(path: str, revision: str | None, names: tuple[str, ...] | None) -> list[Path]:
    file = _first_of(_WEIGHTS, path, revision)
    if file is None or file.suffix != ".json":
        return [] if file is None else [file]
    where = _shards(file)
    shards = set(where.values()) if names is None else {where[name] for name in names if name in where}
    return [file for shard in sorted(shards) if (file := file_of(path, revision, shard)) is not None]


def _shards(index: Path) -> dict[str, str]:
    """File of each tensor."""
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
