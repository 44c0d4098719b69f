"""What the trainers of dictionaries share: one JSON request in a file, one JSON answer beside it.

    train     train on the first rows of a file of activations and write the dictionary in the system's own files
    encode    latents of held-out rows by a dictionary in such files

`train(x, request) -> seconds of the training alone`, x on the request's device; `encode(x, folder) -> z [n, d_sae]`.
Loading data, building networks and writing files are not timed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def serve(train: Callable, encode: Callable) -> None:
    path = Path(sys.argv[1])
    request = json.loads(path.read_text())
    torch.set_num_threads(request["threads"])
    x = load_file(request["activations"])["activations"].float()
    if request["task"] == "train":
        answer = {"seconds": train(x[: request["n"]].to(request["device"]), request)}
    else:
        z = encode(x[request["n"] :][: request["rows"]], request["folder"])
        save_file({"z": z.float().contiguous()}, request["out"])
        answer = {"out": request["out"]}
    path.with_suffix(".answer.json").write_text(json.dumps(answer))


def order(n: int, total: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers, pass after pass in random order, `total` in all."""
    generator = torch.Generator().manual_seed(seed)
    while total > 0:
        rows = torch.randperm(n, generator=generator)[:total]
        total -= len(rows)
        yield rows


def now(device: str) -> float:
    """Seconds, once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def batches(x: torch.Tensor, total: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    rows = torch.cat(list(order(len(x), total, seed)))
    for some in rows.split(size):
        yield x[some.to(x.device)]
