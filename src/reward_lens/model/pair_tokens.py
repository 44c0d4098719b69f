"""Texts of encoders that read a question and its answer as a pair: ``[CLS] question [SEP] answer [SEP]``.

The tokenizer's own call on two texts writes the separators. There is no chat template, so a conversation of several
turns has no official form and is refused. A tokenizer that has a template is used through it.

The reward is read at the first token, which sees the whole text: a change anywhere moves every position.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.errors import DataError, StructureError
from reward_lens.model.forward import Trunk, make_batch
from reward_lens.model.tokens import Tokenizer, Tokens, check_text, pieces_of


class FirstTokenTokenizer(Tokenizer):
    """Conversations as the two texts of a pair, read at the first token."""

    @property
    def templated(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return getattr(self.hf, "chat_template", None) is not None

    def conversation(self, messages: list[dict], response: Any, truncation: str | None = None) -> Tokens:
        """Tokens of a prompt and a response."""
        if self.templated:
            return _read_first(super().conversation(messages, response, truncation))
        self.check_response(response)
        return self._pair(self._question(messages), response, truncation)

    def text(self, text: str, truncation: str | None = None) -> Tokens:
        """Tokens of a raw text with the tokenizer's own special tokens; all but these is `response`."""
        return _read_first(super().text(text, truncation))

    def official_ids(self, messages: list[dict], response: Any) -> list[int]:
        """What Hugging Face's own call gives, to hold ours against."""
        if self.templated:
            return super().official_ids(messages, response)
        return list(self.hf(self._question(messages), response)["input_ids"])

    def written(self, messages: list[dict], response: Any) -> str:
        """The texts that the model is shown, without the separators between them."""
        return super().written(messages, response) if self.templated else self._question(messages) + response

    def beside(self, messages: list[dict], response: Any) -> str:
        """The text that the response is tokenised in: itself."""
        return super().beside(messages, response) if self.templated else response

    def reward_position(self, ids: list[int]) -> int:
        """The first token."""
        return 0

    def second_begins(self) -> int | None:
        """Id of the separator behind which a text is the second of a pair to the model; None where its tokenizer tells
        no two segments apart."""
        encoded = self.hf("a", "b")
        kinds = encoded.get("token_type_ids")
        return self.hf.sep_token_id if kinds is not None and 1 in list(kinds) else None

    def _question(self, messages: list[dict]) -> str:
        roles = [message["role"] for message in messages]
        if roles != ["user"]:
            raise DataError(
                "A conversation of several turns has no official form for this model",
                found="roles "
                + ", ".join(roles)
                + "; the tokenizer has no chat template and the model reads a question "
                "and an answer",
                expected="one user message and a response",
                do="write the turns into one prompt as the model's card says, or set tokenizer.chat_template and build "
                "rl.RewardModel(module, tokenizer)",
            )
        check_text(messages[0]["content"], "user message")
        return messages[0]["content"]

    def _pair(self, question: str, answer: str, truncation: str | None) -> Tokens:
        # In a list an empty answer is one; alone the tokenizer takes it for none.
        encoded = self.hf([question], [answer], return_offsets_mapping=True, truncation=False, verbose=False)
        ids, offsets = list(encoded["input_ids"][0]), list(encoded["offset_mapping"][0])
        self._require_embedded(ids)
        part = list(encoded.sequence_ids(0))
        closing = _closing(list(self.hf("a", "a").sequence_ids(0)))  # an empty answer leaves two separators there
        end = len(ids) - closing
        first = part.index(1) if 1 in part else end
        self._require_separators(ids, question + answer)
        opening = next((i for i in range(first, 0, -1) if part[i - 1] == 0), 1)  # the separator that ends the question
        keep, cut = self._fit(len(ids), opening if truncation == "left" else first, end, truncation)
        gone_before, gone_inside = sum(i < first for i in cut), sum(first <= i < end for i in cut)
        first, end = first - gone_before, end - gone_before - gone_inside
        starts = [a + (len(question) if part[i] == 1 else 0) for i, (a, _) in enumerate(offsets)]
        ids, offsets, starts = ([some[i] for i in keep] for some in (ids, offsets, starts))
        names = self.hf.convert_ids_to_tokens(ids)
        pieces = pieces_of(question, offsets[:first], names[:first]) + pieces_of(answer, offsets[first:], names[first:])
        return Tokens(
            ids=tuple(ids), pieces=pieces, starts=tuple(starts),
            prompt=range(0, first), response=range(first, end), tail=range(end, len(ids)), reward_pos=0,
            truncated=len(cut), reads_first=True,
        )  # fmt: skip

    def _require_separators(self, ids: Sequence[int], text: str) -> None:
        """Raise where a text spells the separator: what is the second text could not be told any more."""
        separator = self.hf.sep_token_id
        expected = list(self.hf("a", "a")["input_ids"]).count(separator)
        found = list(ids).count(separator)
        if separator is not None and found != expected:
            raise DataError(
                "A text spells the separator between question and answer",
                found=f"{found} of {self.hf.sep_token!r} in {text[:80]!r}",
                expected=f"{expected}: those that the tokenizer writes itself",
                do="take the special tokens out of the text",
            )


def _closing(part: Sequence[int | None]) -> int:
    """Special tokens at the end of a pair."""
    n = 0
    while n < len(part) and part[len(part) - 1 - n] is None:
        n += 1
    return n


def _read_first(tokens: Tokens) -> Tokens:
    return dataclasses.replace(tokens, reward_pos=0, reads_first=True)


@torch.no_grad()
def set_inputs(trunk: Trunk, tokenizer: Tokenizer, config: Any) -> None:
    """Tell the trunk of a model that reads its first token how its own class numbers positions and segments.

    Where the first position id stands (RoBERTa: behind that of the padding) is measured: the embeddings of the class's
    own numbering are those of the numbering that is given.
    """
    if not isinstance(tokenizer, FirstTokenTokenizer):
        return
    if getattr(config, "type_vocab_size", 0) > 1 and not tokenizer.templated:
        trunk.second_begins = tokenizer.second_begins()
        _require_segments(trunk, tokenizer)
    tokens = tokenizer.text("a b")
    batch = make_batch([tokens], [0], 0, next(trunk.module.parameters()).device)
    kept: list[Tensor] = []
    read = [trunk.read_residual(0, lambda x: kept.append(x.clone()))]
    with hooks.attached(read):
        trunk.module(input_ids=batch.ids, attention_mask=batch.mask)
    for first in (0, (config.pad_token_id or 0) + 1):
        trunk.first_position = first
        trunk.run(batch, *read)
        if torch.equal(kept[-1], kept[0]):
            if tokenizer.max_length is not None:
                tokenizer.max_length -= first
            return
    raise StructureError(
        f"How {type(trunk.module).__name__} numbers positions was not understood",
        found="embeddings of its own numbering that are those of no numbering tried",
        expected="position ids that count from 0, or from behind the padding token's id",
        do="please report the model's class",
    )


def _require_segments(trunk: Trunk, tokenizer: FirstTokenTokenizer) -> None:
    """Raise unless the segments that are read off the separators are the tokenizer's own."""
    encoded = tokenizer.hf("a b", "c d", return_tensors="pt")
    own = encoded.get("token_type_ids")
    given = trunk.segments(encoded["input_ids"]).get("token_type_ids", torch.zeros_like(encoded["input_ids"]))
    if own is not None and not torch.equal(own, given):
        raise StructureError(
            "How the tokenizer tells a question from its answer was not understood",
            found=f"segments {own[0].tolist()} of the tokenizer",
            expected=f"{given[0].tolist()}: the second text begins behind the first {tokenizer.hf.sep_token!r}",
            do="please report the tokenizer's class",
        )
