"""The state of a training run in one file: weights, optimizer, counters, position. Numbers and text only, no pickle.

Training that goes on from the file takes the same steps as training that was never stopped, bit for bit on CPU.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reward_lens.errors import DataError, LoadError

FILE = "training.safetensors"
_FORMAT = "reward-lens sae training 1"


def write(folder: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`state` is JSON-able and holds the settings under "settings"."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for index, held in optimizer.state_dict()["state"].items():
        flat |= {f"adam.{index}.{key}": value.detach().cpu().contiguous() for key, value in held.items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.part"
    save_file(flat, partial, metadata={"format": _FORMAT, "state": json.dumps(state)})
    partial.replace(folder / FILE)  # a run killed here leaves the checkpoint before


def read(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the checkpoint in a folder; None where there is none. Other settings raise `DataError`."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, str(error)) from error
    if head.get("format") != _FORMAT:
        raise _unreadable(path, f"format {head.get('format')!r}")
    state = json.loads(head["state"])
    then, now = state["settings"], json.loads(json.dumps(settings))
    differ = [f"{name} {then.get(name)!r}, now {now.get(name)!r}" for name in now if then.get(name) != now.get(name)]
    if differ:
        raise DataError(
            f"The checkpoint {path} is of another training",
            found="; ".join(differ),
            expected="the samples and settings that it was begun with",
            do="pass these again to go on, or another folder to begin anew",
        )
    return tensors, state


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the optimizer's moments and step count back."""
    held: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, index, key = name.split(".")
            held.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": held})


def _unreadable(path: Path, found: str) -> LoadError:
    return LoadError(f"The checkpoint {path} cannot be read", found=found, expected=f"a file of {_FORMAT!r}",
                     do="delete it to begin anew, or pass another folder")  # fmt: skip
