"""Refusals of rewards that no test of a load report could be made of: no numbers, or one number for every text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reward_lens.errors import LoadError

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel


def require_finite(name: str, dtype: torch.dtype, finite: Tensor) -> None:
    """Raise `LoadError` unless all rewards (or logits) of texts are `finite`."""
    undefined = int((~finite).sum())
    if undefined:
        raise LoadError(
            f"{name} gives texts rewards that are no numbers",
            found=f"NaN or infinite rewards of {undefined} of {finite.numel()} texts in {dtype}",
            expected="finite rewards",
            do="pass dtype='bfloat16' or 'float32': what is over 65,504 is infinite in float16"
            if dtype == torch.float16
            else "look with hooks how large its activations become; the weights themselves are finite",
        )


def require_rewards(rm: "RewardModel", alone: Tensor, own: Sequence[Sequence[float]]) -> None:
    """Raise `LoadError` for rewards of texts that are no numbers (float16 overflows), be it only the model's own of
    them, or all the same."""
    finite, published = torch.isfinite(alone), torch.tensor([sum(terms) for terms in own])
    finite[: len(own)] &= published.isfinite().to(finite.device)
    require_finite(rm.name, rm.dtype, finite)
    if bool((alone == alone[0]).all()) and bool((published == published[0]).all()):  # else the two are not the same
        raise LoadError(
            f"{rm.name} gives every text the reward {float(alone[0]):.6g}",
            found=f"{float(alone[0]):.6g} for each of {len(alone)} texts",
            expected="a trained reward head; one of zeros is where training begins",
            do="load a checkpoint from after training, or another objective",
        )
