"""A second device for machines that have none: its tensors live on the CPU, and mixing them with others is an error.

A tensor there is a wrapper that says it is on `DEVICE`. Inside `second_device()` every operation is looked at: `.to`
moves between the two, a factory with `device=` makes one there, and an operation on tensors of both raises what torch
raises on an accelerator. Indices and single numbers may be on the CPU, as they may for real.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cpu", 1)
_COPIES = (torch.ops.aten._to_copy.default,)
_CROSSING = (torch.ops.aten.copy_.default,)
_INDEXING = (
    torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
)  # fmt: skip


class There(torch.Tensor):
    """A tensor on the second device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"There({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def second_device():
    """Inside, tensors can be moved to `DEVICE`."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to: a parameter of the other class
    try:
        with _Watch():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _run(func, args, kwargs):
    wanted = kwargs.get("device")
    goes = None if wanted is None else torch.device(wanted) == DEVICE
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    flat, spec = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, There)]
    here = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, There)]
    if there and any(x.dim() and x.numel() for x in here) and func not in (*_CROSSING, *_INDEXING):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {DEVICE} and cpu")
    if func in _INDEXING and not isinstance(args[0], There) and there:
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor: {func}")
    inner, kw = tree_unflatten([x.inner if isinstance(x, There) else x for x in flat], spec)
    out = func(*inner, **kw)
    own = {id(x.inner): x for x in there}
    stays = bool(there) and (func not in _CROSSING or isinstance(args[0], There))
    if not (stays if goes is None or func not in _COPIES and there else goes):
        return out
    return tree_map(lambda x: own.get(id(x), There(x)) if isinstance(x, torch.Tensor) else x, out)


def spread(module: torch.nn.Module, parts: list[torch.nn.Module]) -> None:
    """Put some parts of a module on `DEVICE`, as accelerate does it: weights there, inputs moved by a hook."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for part in parts:
        for owner in part.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, torch.nn.Parameter(There(parameter.data), requires_grad=parameter.requires_grad))
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner._buffers[name] = There(buffer)
        add_hook_to_module(part, AlignDevicesHook(execution_device=DEVICE))
