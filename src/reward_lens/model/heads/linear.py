"""Heads that are one linear map behind the final norm, under another name than `score`, or read elsewhere than there.

    r(h) = (w . N(h) + b - m) / s

m and s are 0 and 1 but for a head that standardises its rewards: that is a linear map too, so every readout here is
exact. Which name, which token is read, and what is put at a text's end are attributes; the table sets them.

References: Dai et al. 2023, arXiv 2310.12773 (Beaver); Cui et al. 2023, arXiv 2310.01377 (UltraRM); Yuan et al. 2024,
arXiv 2404.02078 (Eurus-RM); Cai et al. 2024, arXiv 2403.17297 (InternLM2); Hu et al. 2024, arXiv 2405.11143 (OpenRLHF).
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reward_lens.errors import DataError, LoadError
from reward_lens.model.heads.own import BeforePadding, OwnHead, last_attended
from reward_lens.model.norm import Norm
from reward_lens.model.readout import LinearReadout, linear_readout
from reward_lens.model.tokens import Tokenizer, Tokens, check_text


class LinearScore(OwnHead):
    """A linear map with a name of its own, read at the last position that is attended to, or at a token.

    Starling-RM, UltraRM, Eurus-RM, OpenAssistant's Pythia models, InternLM2-reward, Athene-RM.
    """

    head_path = "v_head"
    bias: ClassVar[bool | str] = False
    """Whether the map has one; a name is the config key that says so."""
    width_key: ClassVar[str | None] = None
    """Config key of the number of columns; None: one."""
    stops_at: ClassVar[int | None] = None
    """Id of a padding token, before which the last text token is read, whatever the mask."""
    reading_token: ClassVar[int | None] = None
    """Id of the token that is read and that stands at the end of every text."""
    reading_key: ClassVar[str | None] = None
    """Config key of that id, where it has one."""

    def build(self, config: Any) -> None:
        bias = getattr(config, self.bias, False) if isinstance(self.bias, str) else self.bias
        self.add_module(self.head_path, nn.Linear(config.hidden_size, self.n_columns, bias=bias))

    @property
    def n_columns(self) -> int:
        return 1 if self.width_key is None else getattr(self.config, self.width_key, 1)

    @property
    def ending(self) -> int | None:
        """Id of the token that is read; None where it is the last one, whichever that is."""
        return self.reading_token if self.reading_key is None else getattr(self.config, self.reading_key, None)

    @property
    def probe_ending(self) -> tuple[int, ...]:
        return () if self.ending is None else (self.ending,)

    def columns(self, states: Tensor, ids: Tensor) -> Tensor:
        head: Any = self.get_submodule(self.head_path)
        mean, scale = (x.to(states) for x in self.standard(head.weight))
        return (head(states) - mean) / scale

    def standard(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken off the map's columns, and what the rest is divided by."""
        return like.new_zeros(self.n_columns), like.new_ones(self.n_columns)

    def head_parts(self) -> Any:
        return self.get_submodule(self.head_path)

    def readout(self, norm: Norm, row: int) -> LinearReadout:
        read = linear_readout(norm, self.get_submodule(self.head_path), row, self.objectives[row])
        mean, scale = (x[row].to(read.weight) for x in self.standard(read.weight))
        return dataclasses.replace(read, weight=read.weight / scale, bias=(read.bias - mean) / scale)

    def read_positions(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if self.ending is not None:
            return last_attended(ids, ids == self.ending)
        if self.stops_at is not None:
            return (torch.eq(ids, self.stops_at).int().argmax(-1) - 1) % ids.shape[1]
        return last_attended(ids, mask)

    def tokenizer_for(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None) -> Tokenizer:
        if self.ending is not None:
            return EndedTokenizer(tokenizer, self.ending, max_length)
        return BeforePadding(tokenizer, self.stops_at, max_length)


class StandardisedScore(LinearScore):
    """Beaver's reward and cost models: `score_head`, and a `normalizer` whose mean and variance the config may ask to
    be used (a cost keeps its zero: it is scaled alone)."""

    head_path = "score_head"
    bias = "bias"
    width_key = "score_dim"

    def build(self, config: Any) -> None:
        super().build(config)
        self.normalizer: Any = nn.Module()
        self.normalizer.register_buffer("mean", torch.zeros(self.n_columns))
        self.normalizer.register_buffer("var", torch.ones(self.n_columns))
        self.normalizer.register_buffer("count", torch.zeros(1, dtype=torch.long))

    @property
    def objectives(self) -> tuple[str, ...]:
        names = super().objectives
        return (getattr(self.config, "score_type", "reward"),) if len(names) == 1 else names

    def fill(self, missing: list[str]) -> list[str]:
        """The statistics stand in the config too, and are not read where nothing is standardised."""
        used = getattr(self.config, "do_normalize", False)
        for name, default in (("mean", 0.0), ("var", 1.0), ("count", 0)):
            given = getattr(self.config, name, None)
            if f"normalizer.{name}" in missing and (given is not None or not used or name == "count"):
                self.normalizer.get_buffer(name).copy_(torch.tensor(default if given is None else given))
                missing = [key for key in missing if key != f"normalizer.{name}"]
        return missing

    def standard(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = super().standard(like)
        kind = getattr(self.config, "score_type", "reward")
        if not getattr(self.config, "do_normalize", False) or kind == "critic":
            return mean, scale
        scale = self.normalizer.var.to(like).sqrt() + 1e-8
        return (self.normalizer.mean.to(like) if kind == "reward" else mean), scale


class RegressionScore(LinearScore):
    """OpenRLHF's reward models: `value_head` or `score`, standardised by the config's `mean` and `std` where it has
    `normalize_reward`, of texts that end in an EOS."""

    head_path = "value_head"

    def tokenizer_for(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None) -> Tokenizer:
        return ClosedTokenizer(tokenizer, None, max_length)

    def standard(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = super().standard(like)
        if not getattr(self.config, "normalize_reward", False):
            return mean, scale
        return self._number("mean", 0.0) + mean, self._number("std", 1.0) * scale

    def _number(self, key: str, default: float) -> float:
        value = getattr(self.config, key, default)
        return float(value[0] if isinstance(value, list) else value)


class EndedTokenizer(Tokenizer):
    """Puts one special token behind every text (unless it ends in it), and has the head read there."""

    def __init__(self, tokenizer: Any, ending: int, max_length: int | None):
        super().__init__(tokenizer, None, max_length)
        self.ending = ending
        self.ending_text = str(tokenizer.convert_ids_to_tokens(ending))
        if tokenizer(self.ending_text, add_special_tokens=False)["input_ids"] != [ending]:
            raise LoadError(
                "The token that this reward head reads is not one of the tokenizer",
                found=f"id {ending}, which is {self.ending_text!r} there",
                expected="a special token of that id",
                do="use the tokenizer that was published with the model",
            )

    def written(self, messages: list[dict], response: Any) -> str:
        text = super().written(messages, response)
        return text if text.endswith(self.ending_text) else text + self.ending_text

    def official_ids(self, messages: list[dict], response: Any) -> list[int]:
        ids = super().official_ids(messages, response)
        return ids if ids[-1] == self.ending else [*ids, self.ending]

    def text(self, text: str, truncation: str | None = None) -> Tokens:
        check_text(text, "text")
        return self._encode(text + self.ending_text, 0, len(text), truncation, special=True)

    def reward_position(self, ids: list[int]) -> int:
        if self.ending not in ids:
            raise DataError(
                "The token that this reward head reads was not found",
                found=f"a text without {self.ending_text!r}",
                expected="that token at the text's end",
                do="pass a prompt and a response, and leave the end of the text in place",
            )
        return len(ids) - 1 - ids[::-1].index(self.ending)


class ClosedTokenizer(Tokenizer):
    """OpenRLHF's texts: newlines at the end of what the chat template writes are taken off, and an EOS is put there
    behind a space (unless the text ends in one), so that the head reads an EOS."""

    def closed(self, text: str) -> str:
        text, eos = text.rstrip("\n"), self.hf.eos_token
        return text if eos is None or text.endswith(eos) else f"{text} {eos}"

    def written(self, messages: list[dict], response: Any) -> str:
        return self.closed(super().written(messages, response))

    def official_ids(self, messages: list[dict], response: Any) -> list[int]:
        text = self._templated([*messages, {"role": "assistant", "content": response}], False, tokenize=False)
        return list(self.hf(self.closed(text), add_special_tokens=False)["input_ids"])

    def text(self, text: str, truncation: str | None = None) -> Tokens:
        check_text(text, "text")
        return self._encode(self.closed(text), 0, len(text), truncation, special=True)
