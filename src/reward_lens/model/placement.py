"""Where a network's parts are: on several devices, in main memory or on disk (accelerate's hooks).

Blocks are always called as modules, so what accelerate does around a call (it moves the inputs, loads the weights and
drops them again) is done in every replay too. What is read outside a call, a weight, goes through `held`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from reward_lens.errors import DataError, StructureError


def held(module: nn.Module, name: str = "weight") -> Any:
    """A parameter of a module's own; one that is offloaded is read from where it is kept, onto the device it runs on.

    Raises `StructureError` for a weight that is nowhere (a module left on the meta device).
    """
    own = getattr(module, name)
    if not isinstance(own, Tensor) or not own.is_meta:
        return own
    hook = _offloading(module)
    if hook is None:
        raise StructureError(
            f"The {name} of a {type(module).__name__} has no numbers",
            found="a tensor on the meta device that no hook of accelerate loads",
            expected="loaded weights, or ones offloaded to memory or disk by device_map",
            do="load the checkpoint with rl.load, or with from_pretrained",
        )
    return hook.weights_map[name].to(hook.execution_device, own.dtype)


def input_device(module: nn.Module) -> torch.device:
    """Where a module's inputs go: the device of its first parameter, or the one it is loaded onto when it runs."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            hook = _offloading(owner) if parameter.is_meta else None
            return parameter.device if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


def loaded_copy(module: nn.Module) -> nn.Module:
    """A copy without accelerate's hooks whose weights are all there."""
    hooks = {id(hook): hook for m in module.modules() if (hook := getattr(m, "_hf_hook", None)) is not None}
    if not hooks:
        return copy.deepcopy(module)
    copied = copy.deepcopy(module, dict(hooks))  # a hook knows the weights of the whole network: it is shared
    for part, own in zip(copied.modules(), module.modules(), strict=True):
        for name, parameter in own.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(part, name, nn.Parameter(held(own, name), parameter.requires_grad))
        # Not by accelerate's own removal: it would put the offloaded weights back to where they came from.
        if part.__dict__.pop("_hf_hook", None) is not None and "_old_forward" in part.__dict__:
            part.__dict__["forward"] = part.__dict__.pop("_old_forward")
    return copied


def require_all_there(module: nn.Module, question: str, under: str = "") -> None:
    """Raise `DataError` where weights (under a path) are offloaded, for what changes or copies them."""
    gone = [name for name, parameter in module.named_parameters() if parameter.is_meta and name.startswith(under)]
    if gone:
        raise DataError(
            f"{question} needs the weights in memory",
            found=f"{len(gone)} offloaded, {gone[0]} among them",
            expected="no part of the model on disk or offloaded to main memory",
            do="load the model without device_map, or with one that gives these parts a device of their own",
        )


def _offloading(module: nn.Module) -> Any:
    """The hook that loads a module's own weights when it runs; None where there is none."""
    hook: Any = getattr(module, "_hf_hook", None)
    several = getattr(hook, "hooks", (hook,))
    return next((h for h in several if getattr(h, "offload", False)), None)
