"""Live PEFT adapters: the network inside the wrapper, and the one matrix that an adapted linear map is.

    W = W_base + sum_a scaling_a B_a A_a        over the active adapters of a LoRA layer

What a merged adapter computes is the same but for rounding. Layers that add something else than such a product to their
matrix (DoRA and other variants, a bias of the adapter's own, IA3) are no plain linear maps here: components are exact
with them, heads and neurons are not split.
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reward_lens.errors import DataError
from reward_lens.model.placement import held


def network_in(module: Any) -> Any:
    """The model inside a `PeftModel`, whose layers hold the adapters; every other module itself."""
    return module.get_base_model() if hasattr(module, "peft_config") and hasattr(module, "get_base_model") else module


def saved_whole(module: Any) -> Any:
    """What stands now in the place of a module that adapters save whole (`modules_to_save`); others themselves."""
    if not hasattr(module, "modules_to_save") or not hasattr(module, "original_module"):
        return module
    used = [a for a in module.active_adapters if a in module.modules_to_save]
    return module.original_module if module.disable_adapters or not used else module.modules_to_save[used[0]]


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is a plain linear map with low-rank adapters around it."""
    given: Any = module
    base = getattr(module, "base_layer", None)
    plain = isinstance(base, Conv1D) or (isinstance(base, nn.Linear) and base.weight.is_floating_point())
    if not plain or not hasattr(module, "lora_A") or not hasattr(module, "get_delta_weight"):
        return False
    return not any(given.lora_variant.get(a) or given.lora_bias.get(a) for a in _active(given))


def adapted_weight(module: Any) -> Tensor:
    """[out, in] matrix of an adapted linear map as it is now: active adapters, none where they are disabled."""
    base = held(module.base_layer)
    weight = base.T if isinstance(module.base_layer, Conv1D) else base
    if module.disable_adapters or module.merged:
        return weight
    for adapter in _active(module):
        delta = module.get_delta_weight(adapter)
        weight = weight + (delta.T if isinstance(module.base_layer, Conv1D) else delta).to(weight)
    return weight


def merged(module: Any) -> Any:
    """A `PeftModel` with its active adapters in the weights, without the wrapper; every other module itself. The module
    given is used up: pass a copy."""
    if network_in(module) is module:
        return module
    _untie(network_in(module))
    return module.merge_and_unload()


def _untie(module: Any) -> None:
    """Give an unembedding that is the embedding too weights of its own where one of them has an adapter: live that
    changes this one alone, and merged it would change both."""
    tables = [saved_whole(getattr(module, f"get_{side}_embeddings", lambda: None)()) for side in ("input", "output")]
    plain: Any = [getattr(table, "base_layer", table) for table in tables]
    first, last = (getattr(table, "weight", None) for table in plain)
    if first is None or last is None:
        return
    if first is last and plain != tables:
        plain[1].weight = nn.Parameter(last.detach().clone(), requires_grad=False)
    if first is not plain[1].weight:
        module.config.tie_word_embeddings = module.config.get_text_config().tie_word_embeddings = False


def require_no_live_adapter(module: Any, question: str) -> None:
    """Raise `DataError` for a model with live adapters, for what writes or replaces weights."""
    if network_in(module) is not module:
        raise DataError(
            f"{question} needs the adapters in the weights",
            found=f"a {type(module).__name__} with live adapters: {', '.join(map(str, module.active_adapters))}",
            expected="a model without live adapters",
            do="merge them first: rl.RewardModel(module.merge_and_unload(), tokenizer), or rl.load(adapter_folder)",
        )


def _active(module: Any) -> list[str]:
    return [adapter for adapter in module.active_adapters if adapter in module.lora_A]
