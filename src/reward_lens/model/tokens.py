"""From a prompt and a response to token ids: the official chat template, tokenised once, with the spans it needs.

The template is rendered with a unique marker in the response's place; what stands before the marker is the prompt
part, what stands after it the template's tail. So the spans hold for every template, whatever the texts contain.
"""

import dataclasses
import datetime
import re
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from reward_lens.errors import AlignmentError, DataError, LoadError

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""Templates that print today's date (Llama 3) get this one, so that a reward does not depend on the day."""

PLAIN_TEXT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}"
"""Prompt and response as they are, as trainers of reward models write texts that are no conversations (TRL)."""

Role = Literal["prompt", "response", "tail"]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenised conversation."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """Text of each token; a character cut into several byte tokens stands whole at its first, "" at the others."""
    starts: tuple[int, ...]
    """Character offset of each token in the rendered text (equal for the byte tokens of one character)."""
    prompt: range
    response: range
    tail: range
    """Token positions of the three spans; together they cover all positions."""
    reward_pos: int
    """Position the reward head reads."""
    truncated: int = 0
    """Tokens cut off by an explicit `truncation`."""
    reads_first: bool = False
    """Whether the first token is read, which sees the whole text: a change anywhere then moves every position."""

    @property
    def seen(self) -> range:
        """Positions that can move the reward."""
        return range(len(self) if self.reads_first else self.reward_pos + 1)

    def __len__(self) -> int:
        return len(self.ids)

    def role(self, position: int) -> Role:
        """The span a position belongs to."""
        if position in self.response:
            return "response"
        return "prompt" if position in self.prompt else "tail"

    def first(self, stop: int) -> "Tokens":
        """The first `stop` tokens as a text of their own, read at its last one."""
        spans = (range(min(s.start, stop), min(s.stop, stop)) for s in (self.prompt, self.response, self.tail))
        prompt, response, tail = spans
        return Tokens(self.ids[:stop], self.pieces[:stop], self.starts[:stop], prompt, response, tail, stop - 1)

    def fragment(self, position: int) -> bool:
        """Whether the token continues a character begun by the token before."""
        return position > 0 and self.starts[position] == self.starts[position - 1] and self.pieces[position] == ""


class Tokenizer:
    """A Hugging Face tokenizer seen as a map from conversations to `Tokens`."""

    compares = False
    """Whether a "response" is an ordered pair of them (`model.judge`)."""
    adds_special = False
    """Whether special tokens are the tokenizer's to add; a chat template writes them itself."""
    n_embedded: int | None = None
    """Rows of the model's embedding, beyond which no token can be run; None where no model has said."""

    def __init__(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None):
        if not getattr(tokenizer, "is_fast", False):
            raise LoadError(
                "The tokenizer does not say where its tokens stand in the text",
                found=f"a {type(tokenizer).__name__}",
                expected="a fast tokenizer (PreTrainedTokenizerFast, a tokenizer.json beside the weights)",
                do="pass one: rl.load(path, tokenizer=...) or rl.RewardModel(module, tokenizer)"
                + ("; a processor holds it as .tokenizer" if hasattr(tokenizer, "tokenizer") else ""),
            )
        self.hf = tokenizer
        self.pooled_skips = pooled_skips
        self.max_length = max_length

    def conversation(self, messages: list[dict], response: Any, truncation: str | None = None) -> Tokens:
        """Tokens of a prompt's messages and a response, rendered by the official chat template."""
        self.check_response(response)
        before, after = self._frame(messages, response)
        rendered = self.written(messages, response)
        if not (rendered.startswith(before) and rendered.endswith(after)):
            # The template changes its frame with the response's content (think blocks): no marker can find the span.
            raise DataError(
                "The response could not be found in the rendered chat template",
                found="a template that changes the text around the response depending on the response",
                expected="the same text around every response",
                do="remove reasoning markup from the response, or set a plainer tokenizer.chat_template",
            )
        return self._encode(rendered, len(before), len(rendered) - len(after), truncation, self.adds_special)

    def both(self, messages: list[dict], chosen: str, rejected: str, truncation: str | None) -> tuple[Tokens, Tokens]:
        """The two texts of a preference pair."""
        return self.conversation(messages, chosen, truncation), self.conversation(messages, rejected, truncation)

    def written(self, messages: list[dict], response: Any) -> str:
        """The whole text that the model is shown."""
        return self.render([*messages, {"role": "assistant", "content": response}])

    def beside(self, messages: list[dict], response: Any) -> str:
        """The text that the response is tokenised in: the whole conversation."""
        return self.written(messages, response)

    def probes(self, texts: Sequence[tuple[str, str]]) -> list[tuple[str, Any]]:
        """The load report's texts in the form that `conversation` takes."""
        return list(texts)

    def check_response(self, response: Any) -> None:
        """Raise `DataError` for what is no response."""
        check_text(response, "response")

    def text(self, text: str, truncation: str | None = None) -> Tokens:
        """Tokens of a raw text with the tokenizer's own special tokens and no template; all but these is `response`."""
        check_text(text, "text")
        return self._encode(text, 0, len(text), truncation, special=True)

    def render(self, messages: list[dict], answer: bool = False) -> str:
        """The official chat template's text, with the date pinned; `answer` adds its generation prompt."""
        if getattr(self.hf, "chat_template", None) is None:
            raise LoadError(
                "The tokenizer has no chat template",
                found="tokenizer.chat_template is None",
                expected="the template the reward model was trained with",
                do="set tokenizer.chat_template to the Jinja template named by the model's authors and pass it, "
                "rl.load(path, tokenizer=tokenizer), or put it beside the weights as chat_template.jinja; for a model "
                f"trained on plain texts that is {PLAIN_TEXT!r}, without the BOS where the tokenizer adds none",
            )
        return self._templated(messages, answer, tokenize=False)

    def official_ids(self, messages: list[dict], response: Any) -> list[int]:
        """What Hugging Face's own template call gives, to hold ours against."""
        return self._official([*messages, {"role": "assistant", "content": response}])

    def _official(self, messages: list[dict], answer: bool = False) -> list[int]:
        return list(self._templated(messages, answer, tokenize=True, return_dict=False))

    def _templated(self, messages: list[dict], answer: bool, **form: Any) -> Any:
        date, pinned = TEMPLATE_DATE.strftime("%d %b %Y"), _pinned_dates(self.hf.chat_template)
        try:
            return self.hf.apply_chat_template(
                messages, add_generation_prompt=answer, date_string=date, **pinned, **form
            )
        except TemplateError as error:
            raise DataError(
                "The chat template does not take this conversation",
                found=f"{str(error) or type(error).__name__}; roles {', '.join(m['role'] for m in messages)}",
                expected="a conversation in the form that the model was trained with",
                do="write the conversation as the model's card says (a system message may have to go into the user's "
                "turn), or set another tokenizer.chat_template",
            ) from error

    def _frame(self, messages: list[dict], response: Any) -> tuple[str, str]:
        for message in messages:
            check_text(message["content"], f"{message['role']} message")
        marker = f"response{uuid.uuid4().hex}"
        before, _, after = self.written(messages, self._marked(response, marker)).partition(marker)
        return before, after

    def _marked(self, response: Any, marker: str) -> Any:
        """The response with the marker in place of the text whose span is wanted."""
        return marker

    def _encode(self, text: str, start: int, stop: int, truncation: str | None, special: bool = False) -> Tokens:
        encoded = self.hf(
            text, add_special_tokens=special, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if not ids:
            raise DataError(
                "A text has no tokens",
                found=repr(text[:80]),
                expected="at least one token for the reward head to read",
                do="pass a non-empty text",
            )
        self._require_embedded(ids)
        real = [i for i, (a, b) in enumerate(offsets) if b > a]  # the others are special tokens that were added
        first = next((i for i in real if offsets[i][1] > start), len(ids))
        end = next((i for i in real if i >= first and offsets[i][0] >= stop), real[-1] + 1 if real else len(ids))
        if start == stop:
            end = first
        keep, cut = self._fit(len(ids), first, end, truncation)
        gone_before, gone_inside = sum(1 for i in cut if i < first), sum(1 for i in cut if first <= i < end)
        first, end = first - gone_before, end - gone_before - gone_inside
        ids, offsets = [ids[i] for i in keep], [offsets[i] for i in keep]
        return Tokens(
            ids=tuple(ids),
            pieces=pieces_of(text, offsets, [self.hf.convert_ids_to_tokens(i) for i in ids]),
            starts=tuple(a for a, _ in offsets),
            prompt=range(0, first),
            response=range(first, end),
            tail=range(end, len(ids)),
            reward_pos=self.reward_position(ids),
            truncated=len(cut),
        )

    def _require_embedded(self, ids: Sequence[int]) -> None:
        """Raise for a token that the model has no embedding of: a tokenizer may have been given tokens since."""
        beyond = [] if self.n_embedded is None else sorted({i for i in ids if i >= self.n_embedded})
        if beyond:
            raise DataError(
                "A text has a token that the model has no embedding for",
                found=", ".join(f"{self.hf.convert_ids_to_tokens(i)!r} (id {i})" for i in beyond[:3]),
                expected=f"ids under {self.n_embedded}, the rows of the model's embedding",
                do="take it out of the text, or pass the tokenizer that was published with the model",
            )

    def _fit(self, length: int, first: int, end: int, truncation: str | None) -> tuple[list[int], list[int]]:
        """Positions kept and cut: "left" cuts the prompt's beginning (not its first token), "right" the response."""
        if truncation not in (None, "left", "right"):
            raise DataError(
                "truncation was not understood",
                found=repr(truncation),
                expected="None (raise), 'left' (cut the prompt's beginning) or 'right' (cut the response's end)",
                do="pass one of these",
            )
        excess = 0 if self.max_length is None else length - self.max_length
        if excess <= 0:
            return list(range(length)), []
        room = {"left": range(1, first), "right": range(first, end), None: range(0)}[truncation]
        if excess > len(room):
            ways = {"left": "'left' (cuts the prompt's beginning)",
                    "right": "'right' (cuts the response's end, which changes what is judged)"}  # fmt: skip
            raise DataError(
                "A conversation is longer than the model can read",
                found=f"{length} tokens ({first} of prompt, {end - first} of response)"
                + (f" of which truncation={truncation!r} may cut {len(room)}" if truncation else ""),
                expected=f"at most {self.max_length} tokens (config.max_position_embeddings)",
                do="shorten the text, or pass truncation="
                + " or ".join(way for name, way in ways.items() if name != truncation),
            )
        cut = list(room[:excess]) if truncation == "left" else list(room[len(room) - excess :])
        gone = set(cut)
        return [i for i in range(length) if i not in gone], cut

    def reward_position(self, ids: list[int]) -> int:
        """Hugging Face pools the last token that is not the padding token; unpadded, that is what it intends."""
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] != self.pooled_skips:
                return position
        return len(ids) - 1


def _pinned_dates(template: str) -> dict[str, Any]:
    """For a template that asks for today's date: a macro of that name in front of it, which gives the pinned one."""
    if not isinstance(template, str) or "strftime_now(" not in template:
        return {}
    # Every quoted text that may be one: a template may name the form before it asks.
    quoted = re.findall(r"""(?=(["'])((?:%-?[A-Za-z]|[^"'%{}\n])+)\1)""", template)
    forms = {form for _, form in quoted if "%" in form}
    known = "{% if format not in reward_lens_dates %}{{ raise_exception('a date in the form ' ~ format) }}{% endif %}"
    macro = "{% macro strftime_now(format) %}" + known + "{{ reward_lens_dates[format] }}{% endmacro %}"
    # Jinja drops a newline behind a block; a template that begins with one keeps it.
    joined = macro + ("\n" if template.startswith("\n") else "") + template
    return {"chat_template": joined, "reward_lens_dates": {form: TEMPLATE_DATE.strftime(form) for form in forms}}


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common token prefix."""
    for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def require_equal_length(a: Tokens, b: Tokens, pair_id: str) -> None:
    """Raise unless the two runs can be compared position by position."""
    cut_apart = a.truncated != b.truncated and a.prompt != b.prompt  # to one length, with other tokens in each place
    if len(a) != len(b) or cut_apart:
        cut = f", of which {len(a.prompt)} and {len(b.prompt)} are of the prompt, cut to fit" if cut_apart else ""
        raise AlignmentError(
            f"The two responses of pair {pair_id} cannot be compared position by position",
            found=f"{len(a)} and {len(b)} tokens{cut}",
            expected="equal token counts for at='all' and at='response'",
            do="use at='final', keep to pairs of equal length, or name an alignment (align='tail' or 'diff')",
        )


def check_text(text: Any, field: str) -> None:
    """Raise `DataError` unless `text` is a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise DataError(
            f"The {field} is not a text",
            found=type(text).__name__,
            expected="a str",
            do="convert it, or look for a missing value in the data",
        )
    for position, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise DataError(
                f"The {field} holds half a character",
                found=f"the lone surrogate U+{ord(character):04X} at character {position}",
                expected="text that can be written as UTF-8",
                do="decode the source with the right encoding, or drop the character",
            )


def pieces_of(text: str, offsets: list[tuple[int, int]], names: list[str]) -> tuple[str, ...]:
    """Text of each token. Together they give the text back, spaces that a tokenizer's offsets leave out included."""
    pieces: list[str] = []
    done = 0
    for (a, b), name in zip(offsets, names, strict=True):
        if b > a:
            pieces.append(text[done:b] if a - done < 8 else text[a:b])
            done = max(done, b)
        else:
            pieces.append(name)  # a special token that stands for no character of the text
    return tuple(pieces)
