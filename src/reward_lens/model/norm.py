"""A norm measured, not read: y = gain * centre(x) * s(x) + shift, with s(x) one number a position.

Whether a class stores its gain as `weight` or as `1 + weight` (Gemma), subtracts the mean or not, has a bias or
not, is found by feeding probes and is proven on further ones; a module that is no such map raises.
Freezing s at an input makes the norm linear, and `pull_back` is the transpose of that linear map.
"""

import dataclasses
import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.errors import StructureError
from reward_lens.model.placement import loaded_copy

HIDDEN = 3e-4
"""Size of an input in what epsilon adds to it, under which the scale is that at 0 to half of float32's last digit."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """A measured norm; `module` is a copy in the tail's precision (float32, or float64 for a float64 model)."""

    module: nn.Module
    """Maps [..., d_model] to [..., d_model]."""
    gain: Tensor
    """[d_model]"""
    shift: Tensor
    """[d_model], zero for a norm without bias"""
    centred: bool
    """True for LayerNorm (the mean is removed), False for RMSNorm and for no norm at all."""

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.module(x.to(self.gain))

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """s(x), recovered from the norm's own output (so its epsilon is exactly the module's)."""
        x = x.to(self.gain)
        if isinstance(self.module, nn.Identity):
            return torch.ones_like(x[..., :1])
        centred = self._centre(x)
        direction, size = self.gain * centred, centred.square().mean(-1, True).sqrt()
        small = size * self._at_zero < HIDDEN
        along, squared = ((self.module(x) - self.shift) * direction).sum(-1, True), direction.square().sum(-1, True)
        return torch.where(small, self._at_zero, along / torch.where(small, 1.0, squared))

    @functools.cached_property
    def _at_zero(self) -> float:
        """The scale where epsilon hides the input, which is where nothing is left of the input to recover it from."""
        module, size = tail_copy(self.module, torch.device("cpu"), torch.float64), len(self.gain)
        tiny = 1e-12 * torch.linspace(-1, 1, size, dtype=torch.float64)
        direction = self.gain.cpu().double() * tiny
        with torch.no_grad():
            return float(((module(tiny) - module(-tiny)) / 2 * direction).sum() / direction.square().sum())

    def frozen(self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*batch_or_1 1"]) -> Tensor:
        """The norm of `x` with its scale held at `scale`."""
        return self.gain * self._centre(x.to(self.gain)) * scale + self.shift

    def pull_back(self, w: Float[Tensor, "*any d_model"], scale: Float[Tensor, "*batch 1"]) -> Tensor:
        """u with u . x + w . shift == w . frozen(x, scale) for every x."""
        return self._centre(w.to(self.gain) * self.gain) * scale

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def measure_norm(module: nn.Module | None, d_model: int, like: Tensor, name: str = "final norm") -> Norm:
    """Measure `module` (None means no norm) in at least float32 on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    module = nn.Identity() if module is None else tail_copy(module, like.device, dtype)
    if isinstance(module, nn.Identity):
        one = torch.ones(d_model, dtype=dtype, device=like.device)
        return Norm(module, one, torch.zeros_like(one), False)

    generator = torch.Generator().manual_seed(0)
    # Large probes make every epsilon negligible.
    probes = (1e3 * torch.randn(8, d_model, generator=generator, dtype=torch.float64)).to(like.device, dtype)
    with torch.no_grad():
        up, down = module(probes), module(-probes)
        shift, odd = (up + down).mean(0) / 2, (up - down) / 2
        best = None
        for centred in (False, True):
            x = probes - probes.mean(-1, keepdim=True) if centred else probes
            unit = x / x.square().mean(-1, keepdim=True).sqrt()
            gain = (odd * unit).sum(0) / unit.square().sum(0)  # least squares over the probes
            gap = float((odd - gain * unit).norm() / odd.norm())
            if best is None or gap < best[0]:
                best = (gap, gain, centred)
    gap, gain, centred = best
    if gap > 1e-3:
        raise StructureError(
            f"The {name} ({type(module).__name__}) is not a norm the library can pull a direction through",
            found=f"gain * x / rms(x), with or without the mean removed, leaves {gap:.1%} of its output unexplained",
            expected="RMSNorm, LayerNorm or no norm between the last block and the head (under 0.1%)",
            do="pass structure= with the path of the module that normalises the residual stream",
        )
    return Norm(module, gain, shift, centred)


def tail_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy in the tail's precision, in eval mode and without gradients for its parameters."""
    return loaded_copy(module).to(device=device, dtype=dtype).eval().requires_grad_(False)
