"""Keys and values of a text's first positions, computed once and read by every run that shares those positions.

In a causal network a change at position p reaches only positions >= p, so a run that differs from another from p on
needs the blocks for positions >= p alone, with the keys and values of the positions before. They are handed to the
unmodified Hugging Face classes as a cache that never changes: `update` gives back prefix and new keys joined, for as
many rows as it is asked, and keeps neither. (Hugging Face's own sliding-window caches drop keys; this one does not:
the window is in the attention mask.) Rows may go on from different positions of one text: what each reuses then stands
at the end of the room, as left padding would put it, so that every distance is the text's own.

Whether a model takes such a cache and gives its own reward with it is measured when it is loaded (row "prefix reuse" of
the load report). Where it does not, whole texts are run.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from reward_lens.model.forward import Trunk, suffix_batch
from reward_lens.model.placement import input_device
from reward_lens.model.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class KeyValues:
    """One block's keys and values a layer, of one text's first positions."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """(keys, values), each [1, kv_heads, pos, head_dim]."""

    def __len__(self) -> int:
        return self.layers[0][0].shape[-2] if self.layers else 0

    def first(self, n: int) -> "KeyValues":
        """Those of the first `n` positions (a view)."""
        return KeyValues(tuple((k[..., :n, :], v[..., :n, :]) for k, v in self.layers))


NO_PREFIX = KeyValues(())


class PrefixCache(Cache):
    """A Hugging Face cache that holds a prefix and is never changed by a run; see the top of the file.

    `reused`: how many of the prefix's positions each row reads, if not all of them; the caller's attention mask hides
    what stands before.
    """

    def __init__(self, prefix: KeyValues, n_layers: int, reused: Int[Tensor, " row"] | None = None):
        picked = None
        if reused is not None and prefix.layers and not (reused == len(prefix)).all():
            room = int(reused.max())
            picked = (torch.arange(room, device=reused.device) - room + reused[:, None]).clamp_min(0)
        self.held = [_PrefixLayer(pair, picked) for pair in prefix.layers or (None,) * n_layers]
        super().__init__(layers=list(self.held))

    def seen(self) -> KeyValues:
        """Prefix and new keys and values of the last run (one row)."""
        return KeyValues(tuple(layer.last for layer in self.held))


class _PrefixLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, prefix: tuple[Tensor, Tensor] | None, picked: Int[Tensor, "row room"] | None):
        super().__init__()
        self.prefix, self.picked = prefix, picked
        self.last: tuple[Tensor, Tensor]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows = key_states.shape[0]
        if self.prefix is not None:
            keys, values = (self._of_rows(x, rows) for x in self.prefix)
            key_states = torch.cat([keys, key_states], -2)
            value_states = torch.cat([values, value_states], -2)
        if rows == 1:
            self.last = (key_states, value_states)
        return key_states, value_states

    def _of_rows(self, x: Float[Tensor, "1 kv_heads pos d"], rows: int) -> Float[Tensor, "row kv_heads room d"]:
        if self.picked is None:
            return x.expand(rows, -1, -1, -1)
        return x[0][:, self.picked.to(x.device)].transpose(0, 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        if self.prefix is None:
            return 0
        return self.prefix[0].shape[-2] if self.picked is None else self.picked.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers 5


def keys_and_values(trunk: Trunk, tokens: Tokens, stop: int, known: KeyValues = NO_PREFIX) -> KeyValues:
    """Keys and values of the first `stop` positions; `known` are those of some of the first."""
    if len(known) >= stop:
        return known.first(stop)
    past = PrefixCache(known, len(trunk.blocks))
    trunk.run(suffix_batch(tokens, len(known), _device(trunk), stop), past=past)
    return past.seen()


def pooled_with_prefix(trunk: Trunk, tokens: Tokens, split: int) -> Float[Tensor, "1 d_model"]:
    """The pre-norm residual at the reward position when the first `split` positions come from their keys and values."""
    past = PrefixCache(keys_and_values(trunk, tokens, split), len(trunk.blocks))
    kept: list[Tensor] = []
    batch = suffix_batch(tokens, split, _device(trunk))
    at = tokens.reward_pos - split
    trunk.run(batch, trunk.read_residual(len(trunk.blocks), lambda x: kept.append(x[:, at].clone())), past=past)
    return kept[0]


def _device(trunk: Trunk) -> torch.device:
    return input_device(trunk.module)
