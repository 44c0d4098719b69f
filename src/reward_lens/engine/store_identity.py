"""Which model a store is of: a fingerprint of the trunk's weights, and all else its numbers depend on."""

import hashlib
from typing import Any

import torch

from reward_lens.errors import DataError
from reward_lens.model.head import trunk_name
from reward_lens.model.reward_model import RewardModel

NUMBERS = 64  # of every parameter; a training step changes nearly all


def identity(rm: RewardModel) -> dict[str, Any]:
    """What the activations of a text depend on, as JSON can hold it."""
    asked = rm.vocabulary.asked if rm.vocabulary else None  # a judge's template is part of every text
    return {
        "name": trunk_name(rm), **rm.surroundings(), "d_model": rm.d_model, "n_layers": rm.n_layers,
        "truncation": rm.truncation, "fingerprint": fingerprint(rm), "asked": asked,
    }  # fmt: skip


@torch.no_grad()
def fingerprint(rm: RewardModel) -> str:
    """Sixteen hex digits of the SHA-256 of the trunk's parameters: names, shapes and up to 64 numbers of each, spread
    evenly. The head is no part of it, so an edit of the head leaves it alone."""
    digest = hashlib.sha256()
    for name, parameter in rm.trunk.module.named_parameters():
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, len(flat) - 1, min(NUMBERS, len(flat)), dtype=torch.float64).round().long()
        numbers = flat[index.to(flat.device)].double().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + numbers)
    return digest.hexdigest()[:16]


def require_same_model(rm: RewardModel, stored: dict[str, Any], what: str, keys: tuple[str, ...] = ()) -> None:
    """Raise `DataError` unless the model is the stored one, in all of its identity or in some keys of it."""
    now = identity(rm)
    differing = [key for key in keys or now if stored.get(key) != now[key]]
    if differing:
        shown = [key for key in dict.fromkeys(["name", *differing]) if key in now]
        raise DataError(
            f"{what} is of another model, or was made in other surroundings",
            found=", ".join(f"{key} {stored.get(key)}" for key in shown),
            expected=", ".join(f"{key} {now[key]}" for key in shown),
            do="load the model that the store names as the store names it, or choose another folder",
        )
