"""Trunks that were published under other names or layouts than transformers': the state dict in transformers' terms.

A layout is data: which names become which, and which tensors hold several of transformers'. The attention itself is
transformers' own then, so the rotary embedding must be of the same layout (halves rotated, as InternLM2 has it).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Parts = Callable[[Tensor, Any], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a published trunk's state dict becomes that of a transformers class."""

    renames: tuple[tuple[str, str | None], ...] = ()
    """(regular expression, replacement), all that match in their order; None leaves the tensor out."""
    parts: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
    """By the expression of a fused tensor's name: its parts, keyed by what stands in place of the match."""
    model_type: str | None = None
    """transformers' own type of this trunk, where the config names one that it does not know."""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Config keys by other names: published, transformers'."""

    def names(self, name: str) -> str | None:
        """What a tensor is called in transformers; None for one that is left out."""
        for pattern, replacement in self.renames:
            if re.search(pattern, name):
                if replacement is None:
                    return None
                name = re.sub(pattern, replacement, name)
        return name

    def state(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The whole state dict."""
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            fused = next((pattern for pattern in self.parts if re.search(pattern, name)), None)
            pieces = {name: tensor}
            if fused is not None:
                found = self.parts[fused](tensor, config)
                pieces = {re.sub(fused, part, name): piece for part, piece in found.items()}
            for key, piece in pieces.items():
                renamed = self.names(key)
                if renamed is not None:
                    state[renamed] = piece
        return state

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The config's values under transformers' names, without those that choose between the authors' own classes."""
        theirs = ("auto_map", "attn_implementation")
        named = {self.keys.get(key, key): value for key, value in values.items() if key not in theirs}
        return named | ({} if self.model_type is None else {"model_type": self.model_type})


def grouped_heads(tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """InternLM2's `wqkv`: for each key-value head its query heads, then its key, then its value; rows are kept in order
    within each, so a query head stays with its key-value head."""
    n_kv = config.num_key_value_heads
    n_queries = config.num_attention_heads // n_kv
    rest = tensor.shape[1:]
    groups = tensor.reshape(n_kv, n_queries + 2, -1, *rest)
    parts = {"q_proj": groups[:, :n_queries], "k_proj": groups[:, -2], "v_proj": groups[:, -1]}
    return {f"self_attn.{name}": rows.reshape(-1, *rest).contiguous() for name, rows in parts.items()}


INTERNLM2 = Layout(
    renames=(
        (r"^model\.tok_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    ),
    parts={r"attention\.wqkv": grouped_heads},
    model_type="llama",
    keys={"bias": "attention_bias"},
)
"""A Llama under the names of its first release."""

UNDER_TRANSFORMER = Layout(
    renames=((r"^model\.lm_head\.", None), (r"^model\.model\.", "model."), (r"^transformer\.", "model."))
)
"""A Llama trunk as `transformer`; saved with the language model it came from, it stands there a second time."""

OF_ITS_OWN_TYPE = Layout(model_type="gpt_neox")
"""GPT-NeoX under a type of the authors' own, its weights as transformers has them."""
