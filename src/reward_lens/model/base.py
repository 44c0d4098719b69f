"""The network that a reward model was trained from, under the reward model's head: for comparing their states.

The base has learnt nothing of rewards, so what its "reward" says is only what the head reads in states it was not
trained for. Structure, norm and tokens are those of the reward model.
"""

import copy
from typing import Any

import torch
from torch import nn

from reward_lens.arguments import checked_arguments
from reward_lens.errors import LoadError
from reward_lens.model.adapters import merged, network_in
from reward_lens.model.head import require_own_head
from reward_lens.model.placement import require_all_there
from reward_lens.model.reward_model import RewardModel


@checked_arguments
@torch.no_grad()
def base_under_head(rm: RewardModel, base: Any, revision: str | None = None) -> RewardModel:
    """A copy of the reward model whose trunk has the base's weights, for `compare` (its measures of states).

    `base`: a hub id or folder of a language model of the same architecture, or a loaded one. Rows of the embedding that
    only the reward model has (added tokens) stay the reward model's; their number is in `edits`.

    Raises `LoadError` where a weight of the trunk is missing in the base or has another shape, `DataError` where the
    head is part of the trunk (a tied unembedding). What this cannot show:
    what the base would prefer; its rewards are the reading of a head that was never trained with it.
    """
    require_own_head(rm)
    require_all_there(rm.module, "A copy of the model with another trunk")
    name = base if isinstance(base, str) else getattr(base.config, "name_or_path", "") or type(base).__name__
    loaded, absent = _loaded(rm, base, revision)
    given = {key: weight for key, weight in _trunk(loaded).state_dict().items() if key not in absent}
    module = merged(copy.deepcopy(rm.module))
    own, added = _trunk(module).state_dict(), 0
    lacking, other = [], []
    pooler = f"{rm.structure.pooler}.".removeprefix(f"{getattr(module, 'base_model_prefix', '')}.")
    for key, weight in own.items():
        if key.startswith(pooler):  # part of the head, wherever the class keeps it
            continue
        new = given.get(key)
        if new is None:
            lacking.append(key)
        elif new.shape == weight.shape:
            weight.copy_(new)
        elif _is_embedding(module, key) and new.shape[1:] == weight.shape[1:]:
            rows = min(len(new), len(weight))
            weight[:rows].copy_(new[:rows])
            added = len(weight) - rows
        else:
            other.append(f"{key} {tuple(new.shape)} for {tuple(weight.shape)}")
    if lacking or other:
        raise LoadError(
            f"{name} is not the base of {rm.name}",
            found="; ".join([*(f"no {key}" for key in lacking[:3]), *other[:3]]),
            expected="every weight of the trunk, in the same shape",
            do="pass the model that the reward model was trained from",
        )
    record = {"method": "base_under_head", "model": rm.name, "base": name, "rows_kept": added}
    return RewardModel(
        module, rm.tokenizer.hf, **rm.read_as, truncation=rm.truncation,
        structure=rm.structure if network_in(rm.module) is rm.module else None,  # paths without the wrapper differ
        name=f"{name} under the head of {rm.name}", edits=(*rm.edits, record),
    )  # fmt: skip


def _loaded(rm: RewardModel, base: Any, revision: str | None) -> tuple[nn.Module, set[str]]:
    """The base, and the weights that its checkpoint lacks: transformers draws them at random."""
    if isinstance(base, nn.Module):
        return base, set()
    from transformers import AutoModel

    try:
        loaded: Any = AutoModel.from_pretrained(base, revision=revision, dtype=rm.dtype, output_loading_info=True)
        return loaded[0], set(loaded[1]["missing_keys"])
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{base} could not be loaded as a base model",
            found=" ".join(str(error).split())[:300],
            expected="a hub id or folder of a language model",
            do="check the name, or load it yourself and pass the module",
        ) from error


def _trunk(module: Any) -> nn.Module:
    return getattr(module, module.base_model_prefix, module)


def _is_embedding(module: Any, key: str) -> bool:
    weight = module.get_input_embeddings().weight
    return any(p is weight for name, p in _trunk(module).named_parameters() if name == key)
