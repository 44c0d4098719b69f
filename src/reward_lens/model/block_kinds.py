"""Blocks that are not all alike: a mixer of another name in some layers, dense MLPs before experts.

Blocks with the same tree of modules are of one kind. The search looks at one block of each kind, and the structure
holds a path a block where kinds differ. What is no attention (a recurrent or convolutional mixer beside attention
layers) has no heads: its output map reads channels of its own, in another number and another sense.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from reward_lens.engine import hooks

_SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)


def kinds_of(blocks: Sequence[nn.Module]) -> list[list[int]]:
    """The blocks' indices, those of one kind together, in the order in which the kinds first come."""
    kinds: dict[tuple, list[int]] = {}
    for layer, block in enumerate(blocks):
        tree = tuple((path, type(module).__name__) for path, module in block.named_modules())
        kinds.setdefault(tree, []).append(layer)
    return list(kinds.values())


def that_run(model: nn.Module, lists: Sequence[str], run_probe: Callable[[], Tensor]) -> list[str]:
    """Those of the lists of modules whose first module is called in a run."""
    called: list[str] = []

    def calling(path: str):
        return lambda args, kwargs: called.append(path)

    with hooks.attached([hooks.read_call(model.get_submodule(f"{path}.0"), calling(path)) for path in lists]):
        run_probe()
    return [path for path in lists if path in called]


def spread(kinds: Sequence[Sequence[int]], found: Sequence[Any]) -> Any:
    """What was found of each kind, one entry a block; the entry itself where all are equal."""
    if all(one == found[0] for one in found):
        return found[0]
    by_layer = {layer: one for layers, one in zip(kinds, found, strict=True) for layer in layers}
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def with_attention(blocks: Sequence[nn.Module], writes: Sequence[str], run_probe: Callable[[], Tensor]) -> list[bool]:
    """Whether each block takes a softmax before its attention's write (a router's comes after it).

    Where none is seen to (a fused kernel hides it), all do if their mixers are of one class, and none is taken to if
    they are not: which of them is attention is then not known, and nothing is split.
    """
    watch = _Softmax()

    def entering(number: int):
        return lambda args, kwargs: watch.enter(number)

    wanted = []
    for number, (block, write) in enumerate(zip(blocks, writes, strict=True)):
        wanted.append(hooks.read_call(block, entering(number)))
        wanted.append(hooks.Hook(block.get_submodule(write), "return", lambda output: watch.leave()))
    with hooks.attached(wanted), watch:
        run_probe()
    if watch.seen:
        return [number in watch.seen for number in range(len(blocks))]
    mixers = {type(block.get_submodule(write)) for block, write in zip(blocks, writes, strict=True)}
    return [len(mixers) == 1] * len(blocks)


class _Softmax(TorchFunctionMode):
    """Notes in which block a softmax was taken."""

    def __init__(self):
        super().__init__()
        self.inside: int | None = None
        self.seen: set[int] = set()

    def enter(self, number: int) -> None:
        self.inside = number

    def leave(self) -> None:
        self.inside = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.inside is not None and (func is functional.scaled_dot_product_attention or func in _SOFTMAX):
            self.seen.add(self.inside)
        return func(*args, **(kwargs or {}))
