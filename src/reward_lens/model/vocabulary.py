"""Which tokens are the text that they decode to: what a response can consist of, or end in.

A reward model is shown text, and text is tokenised anew. A token whose text is read as other tokens can be put into a
batch but into no response: special tokens, fragments of a character, tokens that the tokenizer's merges never reach,
and those that run together with what stands beside them in the template.
"""

import dataclasses
import functools
import uuid
from collections.abc import Sequence

from reward_lens.errors import DataError
from reward_lens.model.tokens import Tokenizer, Tokens

REASONS = (
    "special token", "byte fragment", "no text", "other tokens spell it", "merges with the template",
    "changed by the template", "not taken as a response",
)  # fmt: skip
_REFERENCES = ("a", "A", "0", "x", "the", " a")
"""Responses of one token to find the slot by; the last for templates with a space before it."""
_ANCHOR = "."


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens as texts."""

    tokenizer: Tokenizer
    size: int
    """Ids run from 0 to before this: those the tokenizer knows and the model has embeddings for."""

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Ids with a meaning of their own, which no text is meant to spell."""
        hf = self.tokenizer.hf
        added = hf.added_tokens_decoder.items()
        return frozenset(hf.all_special_ids) | {i for i, token in added if token.special}

    def texts(self, many: Sequence[Sequence[int]]) -> list[str]:
        """What each sequence of ids says inside a text. Decoded behind another token, since some tokenizers drop the
        space in front of a text's first word."""
        hf = self.tokenizer.hf
        anchor = self._anchor()
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        before = hf.decode(anchor, **settings)
        behind = [hf.decode([*anchor, *ids], **settings) for ids in many]
        return [text.removeprefix(before) for text in behind]

    def readable(self) -> list[int]:
        """Ids of tokens, none of them special, that their own text is read as, alone or behind a full stop."""
        ids = [i for i in range(self.size) if i not in self.special]
        texts = self.texts([[i] for i in ids])
        alone = self.read(texts)
        behind = self.read([_ANCHOR + text for text in texts])
        anchor = self._anchor()
        return [
            i for i, text, own, after in zip(ids, texts, alone, behind, strict=True)
            if text and (own == [i] or after == [*anchor, i])
        ]  # fmt: skip

    def read(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, nothing put before or after it."""
        if not texts:
            return []
        hf = self.tokenizer.hf
        return hf(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    def _anchor(self) -> list[int]:
        return self.read([_ANCHOR])[0]


class ResponseSlot:
    """The place of the response in the template around one prompt, for responses of one token."""

    def __init__(self, vocabulary: Vocabulary, messages: list[dict[str, str]], truncation: str | None = None):
        self.vocabulary, self.messages = vocabulary, messages
        read = [vocabulary.tokenizer.conversation(messages, text, truncation) for text in _REFERENCES]
        fitting = [i for i, tokens in enumerate(read) if len(tokens.response) == 1]
        if not fitting:
            raise DataError(
                "The response's place in the template could not be found",
                found=f"no response of one token among {', '.join(map(repr, _REFERENCES))}",
                expected="a prompt that leaves room for a token, and a tokenizer that reads a letter as one",
                do="shorten the prompt, or load the model with truncation='left'",
            )
        # Behind a space some references are read as another token, which takes the template's space with it.
        alone = vocabulary.read(list(_REFERENCES))
        itself = [i for i in fitting if [read[i].ids[read[i].response.start]] == alone[i]]
        found = (itself or fitting)[0]
        self.reference: Tokens = read[found]
        marker = f"response{uuid.uuid4().hex}"
        self._before, _, self._after = self._render(marker).partition(marker)
        # The whole conversation, also where the model is shown a truncated one.
        whole = vocabulary.read([self._before + _REFERENCES[found] + self._after])[0]
        stop = len(whole) - (len(self.reference.tail) if self._after else 0)
        self._head, self._tail = whole[: stop - 1], whole[stop:]

    def reasons(self, ids: Sequence[int], texts: Sequence[str]) -> list[str]:
        """For each token why no response consists of it alone (one of `REASONS`); "" where its text is read as
        exactly this token between the template's."""
        rendered = [self._taken(text) for text in texts]
        read = self.vocabulary.read([text or "" for text in rendered])
        alone = self.vocabulary.read(list(texts))
        out = []
        for i, text, whole, seen, own in zip(ids, texts, rendered, read, alone, strict=True):
            out.append(
                "special token" if i in self.vocabulary.special
                else "no text" if not text
                else "not taken as a response" if whole is None
                else "changed by the template" if whole != self._before + text + self._after
                else "" if seen == [*self._head, i, *self._tail]
                else "byte fragment" if "\ufffd" in text
                else "merges with the template" if own == [i]
                else "other tokens spell it"
            )  # fmt: skip
        return out

    def tokens(self, token: int, text: str) -> Tokens:
        """The conversation whose response is this token."""
        at = self.reference.response.start
        ids = (*self.reference.ids[:at], token, *self.reference.ids[at + 1 :])
        pieces = (*self.reference.pieces[:at], text, *self.reference.pieces[at + 1 :])
        end = self.vocabulary.tokenizer.reward_position(list(ids))
        return dataclasses.replace(self.reference, ids=ids, pieces=pieces, reward_pos=end)

    def _taken(self, response: str) -> str | None:
        """None for a text that the model's form refuses, such as a blank step of a solution."""
        try:
            return self._render(response)
        except DataError:
            return None

    def _render(self, response: str) -> str:
        return self.vocabulary.tokenizer.beside(self.messages, response)
