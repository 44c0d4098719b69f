"""The only place that registers hooks. Everything read or changed in a forward pass goes through `attached`.

Tensors arrive in three guises that this file hides: a block's residual is the first positional argument or the
keyword `hidden_states`; a module's output is a tensor in one transformers version and a tuple in another; and
some models add in place (Falcon), so whoever keeps a tensor must clone it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

Read = Callable[[Tensor], None]
Edit = Callable[[Tensor], Tensor]


class Hook(NamedTuple):
    """One module, when to act, and what to do with its arguments or its output."""

    module: nn.Module
    when: str  # "call": before, sees (args, kwargs); "return": after, sees the output
    act: Callable[..., Any]


def read_input(module: nn.Module, read: Read) -> Hook:
    """Show `read` the module's first tensor argument."""

    def act(args, kwargs):
        read(_arriving(module, first_input(args, kwargs)))

    return Hook(module, "call", act)


def edit_input(module: nn.Module, edit: Edit) -> Hook:
    """Replace the module's first tensor argument by `edit` of it."""

    def act(args, kwargs):
        return with_first_input(args, kwargs, edit(_arriving(module, first_input(args, kwargs))))

    return Hook(module, "call", act)


def read_call(module: nn.Module, read: Callable[[tuple, dict], None]) -> Hook:
    """Show `read` all arguments of the call, the first tensor on the module's device."""

    def act(args, kwargs):
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        if isinstance(given, Tensor):  # a whole network may be called with none, or with a table of masks first
            args, kwargs = with_first_input(args, kwargs, _arriving(module, given))
        read(args, kwargs)

    return Hook(module, "call", act)


def read_output(module: nn.Module, read: Read) -> Hook:
    """Show `read` the module's first tensor output."""

    def act(output):
        read(first_output(output))

    return Hook(module, "return", act)


def edit_output(module: nn.Module, edit: Edit) -> Hook:
    """Replace the module's first tensor output by `edit` of it."""

    def act(output):
        new = edit(first_output(output))
        return new if isinstance(output, Tensor) else [new, *output[1:]] if type(output) is list else (new, *output[1:])

    return Hook(module, "return", act)


@contextmanager
def attached(hooks: Iterable[Hook]) -> Iterator[None]:
    """Hooks live inside this block and are gone after it, whatever happens in between."""
    handles = []
    try:
        for hook in hooks:
            handles.append(_register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_input(args: tuple, kwargs: dict) -> Tensor:
    """The residual stream among a module's arguments."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def with_first_input(args: tuple, kwargs: dict, tensor: Tensor) -> tuple[tuple, dict]:
    """The same arguments with the residual stream replaced."""
    if args:
        return (tensor, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: tensor}


def first_output(output: Any) -> Tensor:
    """The tensor a module returns, alone or first in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _arriving(module: nn.Module, tensor: Any) -> Any:
    """The input on the device that the module computes on. accelerate moves it there after hooks have seen it, so at
    the first block of a device it would still be on the one before."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None and isinstance(tensor, Tensor):
            return tensor.to(device)
    return tensor


def _register(hook: Hook):
    if hook.when == "call":
        return hook.module.register_forward_pre_hook(lambda _m, args, kwargs: hook.act(args, kwargs), with_kwargs=True)
    return hook.module.register_forward_hook(lambda _m, _args, output: hook.act(output))
