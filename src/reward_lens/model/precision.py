"""Which precisions a model can be loaded in."""

import torch

from reward_lens.errors import LoadError


def require_precision(dtype: torch.dtype | str | None) -> None:
    """Raise `LoadError` for a dtype that is no name of transformers, or in which no network runs."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise LoadError(
            "There is no such precision to load a model in",
            found=f"dtype={dtype!r}",
            expected="'bfloat16', 'float16', 'float32', 'float64', such a torch.dtype, or 'auto', the checkpoint's own",
            do="pass one of these; fewer bits are the affair of quantization_config=",
        )
