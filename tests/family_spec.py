"""How a family of tiny models is described, and the sizes and config keys that many share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

D_MODEL, N_HEADS, N_KV, HEAD_DIM, D_MLP, WINDOW, MAX_POSITIONS = 32, 4, 2, 12, 56, 16, 512


@dataclass(frozen=True)
class Family:
    """Where a family's classes live and which config keys it takes besides the common ones.

    `rename` maps a common key to the class's own name for it, or to None where it has no such key. `wrapped`
    marks a family without a sequence-classification class: Hugging Face's own mixin is put on its base model.
    """

    package: str
    prefix: str
    keys: Callable[[int], Mapping[str, object]] = lambda n_layers: {}
    rename: Mapping[str, str | None] = field(default_factory=dict)
    wrapped: bool = False


GQA = {"num_key_value_heads": N_KV}
WIDE = {**GQA, "head_dim": HEAD_DIM}  # heads whose width is not d_model / n_heads
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def alternating(n_layers: int) -> dict[str, object]:
    """Sliding-window attention on the even layers, full attention on the odd ones."""
    kinds = ("sliding_attention", "full_attention")
    return {"sliding_window": WINDOW, "layer_types": [kinds[i % 2] for i in range(n_layers)]}
