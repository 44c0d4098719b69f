"""A tiny random reward model of every kind of readout: what stands between the pre-norm residual and the reward."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import published_heads
import published_linear
import reward_lens as rl
from families import tiny_model
from language_models import JUDGE, PAIR_JUDGE, tiny_language_model
from step_models import published

Build = Callable[[torch.dtype], rl.RewardModel]


def _several(dtype: torch.dtype) -> rl.RewardModel:
    module, tokenizer = tiny_model("llama", num_labels=3, dtype=dtype, seed=1)
    return rl.RewardModel(module, tokenizer, objective=1, name="one row of three")


def _vocabulary(family: str, *tokens: str | int, **options) -> Build:
    def build(dtype: torch.dtype) -> rl.RewardModel:
        module, tokenizer = tiny_language_model(family, dtype=dtype, seed=1)
        return rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(*tokens, **options), name=family)

    return build


@contextlib.contextmanager
def _folder(name: str) -> Iterator[Path]:
    """A folder of this name, after which a model that is loaded from it is called."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        folder.mkdir()
        yield folder


def _head(name: str) -> Build:
    def build(dtype: torch.dtype) -> rl.RewardModel:
        with _folder(name) as folder:
            return rl.load(published_heads.save(folder, name), dtype=dtype)

    return build


def _linear_head(name: str) -> Build:
    def build(dtype: torch.dtype) -> rl.RewardModel:
        with _folder(name) as folder, published_linear.own_reading_token():
            state = published_linear.make(folder, name, seed=1)
            return rl.load(published_linear.write(folder, state), dtype=dtype)

    return build


def _steps(name: str) -> Build:
    return lambda dtype: rl.step_model(*published(name, dtype), name=name)


READOUTS: dict[str, Build] = {
    "linear, one row of three": _several,
    "vocabulary, a row by its index": _vocabulary("llama", 0),
    "vocabulary, two tokens": _vocabulary("qwen2", "the", " the"),
    "vocabulary, before a soft cap": _vocabulary("gemma2", "the", " the", before_cap=True),
    "vocabulary, a judge": _vocabulary("llama", "A", "B", template=JUDGE),
    "vocabulary, a judge of pairs": _vocabulary("llama", "A", "B", template=PAIR_JUDGE),
    **{f"head of {name}": _head(name) for name in published_heads.HEADS},
    **{f"linear head of {name}": _linear_head(name) for name in published_linear.MODELS},
    **{f"steps of {name}": _steps(name) for name in rl.STEP_READOUTS},
}
