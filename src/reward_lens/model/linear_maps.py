"""Linear maps as their classes store them: weights, biases, and which modules can be read so."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reward_lens.errors import StructureError
from reward_lens.model.adapters import adapted_weight, is_adapted
from reward_lens.model.placement import held


def linear_weight(module: nn.Module) -> Tensor:
    """[out, in] weight of a linear map, whichever way round its class stores it, live low-rank adapters included."""
    if is_adapted(module):
        return adapted_weight(module)
    if isinstance(module, Conv1D):
        return held(module).T
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return held(module)
    raise StructureError(
        f"{type(module).__name__} cannot be split",
        found="a module that is no plain linear map (quantised or fused)",
        expected="torch.nn.Linear or transformers' Conv1D with floating-point weights",
        do="load the model unquantised, or ask for the split by component",
    )


def linear_bias(module: nn.Module) -> Tensor | None:
    """Bias of a linear map, or None."""
    return held(module, "bias")


def is_linear(module: nn.Module) -> bool:
    """Whether `linear_weight` can read the module."""
    plain = isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and module.weight.is_floating_point())
    return plain or is_adapted(module)
