"""This library as a trainer of dictionaries."""

import torch
from sae_request import now, serve

from reward_lens.sae.dictionary import SAE
from reward_lens.sae.training import train_sae


def train(x: torch.Tensor, request: dict) -> float:
    start = now(request["device"])
    sae = train_sae(x, request["d_sae"], request["k"], request["variant"], request["seed"], n_train=request["n_train"],
                    batch_size=request["batch"], device=request["device"])  # fmt: skip
    seconds = now(request["device"]) - start
    sae.save(request["folder"])
    if request["variant"] == "topk":
        sae.save(request["folder"] + "-sparsify", fmt="sparsify")
    return seconds


def encode(x: torch.Tensor, folder: str) -> torch.Tensor:
    return SAE.load(folder).encode(x)


if __name__ == "__main__":
    serve(train, encode)
