"""The tokens of a solution in steps, as a process reward model was trained to read them, and the positions it reads.

    chat    the steps, a marker behind each, are the assistant's message of the chat template
    text    prompt and steps with their markers are one raw text; the BOS token, where there is one, stands first once
    turns   every step is a user's turn, answered by the marker; what is read is the position before each marker

The text ends where the last step is read. A causal network is not changed by what follows, so the reward of a
solution's first t steps is read at the same place of the whole solution; and every method that reads a text's last
token reads its last step's reward.
"""

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from reward_lens.data.solutions import cut_steps, require_steps
from reward_lens.errors import DataError
from reward_lens.model.step_readout import StepReadout
from reward_lens.model.tokens import Tokenizer, Tokens, check_text


class SolutionTokens(NamedTuple):
    """One solution's tokens, and where its steps are read."""

    tokens: Tokens
    positions: tuple[int, ...]
    """Of each step, the position whose residual stream the head reads."""


class _Written(NamedTuple):
    """A solution as text: its parts in order (they are tokenised one by one where the form says so), the character
    offsets at which steps are read (the token that ends there), and where the first step begins and the last ends."""

    parts: tuple[str, ...]
    reads: tuple[int, ...]
    start: int
    stop: int
    said: tuple[dict, ...]
    """The conversation that the chat template is given; none for raw text."""


class StepTokenizer(Tokenizer):
    """A tokenizer whose conversations are solutions in steps; a response is its steps joined by the separator."""

    def __init__(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None, form: StepReadout):
        super().__init__(tokenizer, pooled_skips, max_length)
        self.form = form

    def conversation(self, messages: list[dict], response: str, truncation: str | None = None) -> Tokens:
        """Tokens up to where the response's last step is read; a response without the separator is one step. A solution
        longer than the model reads is refused whatever `truncation` says: cutting it would move its steps."""
        check_text(response, "response")
        return self.solution(messages, cut_steps(response, self.form.separator)).tokens

    def solution(self, messages: list[dict], steps: Sequence[str]) -> SolutionTokens:
        """Tokens of a solution and the positions its steps are read at. Raises `DataError` where a boundary does not
        fall between two tokens, or where the chat template changes the steps."""
        require_steps(steps)
        written = self._written(messages, list(steps))
        return self._piecewise(written) if self.form.by_step else self._whole(written)

    def render(self, messages: list[dict], answer: bool = False) -> str:
        """The text of a solution up to where its last step is read; of messages without a solution, the template's."""
        if messages[-1]["role"] != "assistant":
            return super().render(messages, answer)
        return "".join(
            self._written(messages[:-1], list(cut_steps(messages[-1]["content"], self.form.separator))).parts
        )

    def official_ids(self, messages: list[dict], response: Any) -> list[int]:
        """What the tokenizer's own calls give for a solution, up to where its last step is read."""
        steps = list(cut_steps(response, self.form.separator))
        written = self._written(messages, steps)
        if written.said:
            return self._official(list(written.said))[: len(self.solution(messages, steps).tokens)]
        bos = [] if self.hf.bos_token_id is None else [self.hf.bos_token_id]
        parts = written.parts if self.form.by_step else ("".join(written.parts),)
        ids = [i for part in parts for i in self.hf(part, add_special_tokens=False)["input_ids"]]
        if self._adds_bos() and not self.form.by_step:
            return list(self.hf("".join(written.parts))["input_ids"])[: len(ids) + 1]
        return [*bos, *ids]

    def reward_position(self, ids: list[int]) -> int:
        """A solution's text ends where its last step is read."""
        return len(ids) - 1

    def _written(self, messages: list[dict], steps: list[str]) -> _Written:
        form = self.form
        for step in steps:
            check_text(step, "step")
            if not form.by_step and form.layout != "turns" and form.marker in step:
                raise DataError("A step holds the marker that ends steps", found=repr(step[:80]),
                                expected=f"steps without {form.marker!r}, which the model would be read at as well",
                                do="cut the step there, or remove the marker")  # fmt: skip
        for message in messages:
            check_text(message["content"], f"{message['role']} message")
        if form.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": form.system}, *messages]
        if form.layout == "turns":
            return self._turns(messages, steps)
        if form.layout == "chat":
            before = self._before_answer(messages)
        else:
            before = self._raw_prompt(messages)
        before += form.after_prompt
        parts, reads, at, said = [before], [], len(before), ()
        for i, step in enumerate(steps):
            step = (form.between if i else "") + step
            parts += [step, form.marker]
            at += len(step) + len(form.marker)
            reads.append(at)
        if form.layout == "chat":
            content = form.after_prompt + "".join(parts[1:])
            said = (*messages, {"role": "assistant", "content": content})
            if not super().render(list(said)).startswith("".join(parts)):
                raise _changed_by_template()
        return _Written(tuple(parts), tuple(reads), len(before), at - len(form.marker), said)

    def _before_answer(self, messages: list[dict]) -> str:
        """What the chat template writes before an assistant's answer to these messages."""
        place = f"answer{uuid.uuid4().hex}"
        return super().render([*messages, {"role": "assistant", "content": place}]).partition(place)[0]

    def _behind_turn(self, messages: list[dict]) -> str:
        """What the chat template writes between the last of these messages and its answer."""
        place = f"turn{uuid.uuid4().hex}"
        return self._before_answer([*messages[:-1], {**messages[-1], "content": place}]).rpartition(place)[2]

    def _raw_prompt(self, messages: list[dict]) -> str:
        if len(messages) > 1:
            raise DataError(
                "A prompt of several messages cannot be written as one raw text",
                found=f"{len(messages)} messages",
                expected="one user turn, as this model was trained with",
                do="write the prompt as one text",
            )
        return messages[0]["content"]

    def _turns(self, messages: list[dict], steps: list[str]) -> _Written:
        form, turns, reads, before = self.form, [*messages[:-1]], [], ""
        texts = [messages[-1]["content"] + form.after_prompt + steps[0], *steps[1:]]
        # By place: what the template writes behind a turn may spell a short step too.
        behind = len(self._behind_turn([*turns, {"role": "user", "content": texts[0]}]))
        for text in texts:
            turns.append({"role": "user", "content": text})
            before = self._before_answer(turns)
            reads.append(len(before))
            turns.append({"role": "assistant", "content": form.marker})
        whole, first, stop = super().render(turns), reads[0] - behind, reads[-1] - behind
        there = whole.endswith(steps[0], 0, first) and whole.endswith(steps[-1], 0, stop)
        if not there or not whole.startswith(before + form.marker):
            raise _changed_by_template()
        begins = first - len(steps[0])
        return _Written((before,), tuple(reads), begins, stop, tuple(turns))

    def _whole(self, written: _Written) -> SolutionTokens:
        """The text tokenised at once, as the model's authors count markers: each is one token."""
        text = "".join(written.parts)
        raw = self.form.layout == "text"
        bos = self.hf.bos_token if raw and not self._adds_bos() and self.hf.bos_token is not None else ""
        shift = len(bos)
        text, special = bos + text, raw and self._adds_bos()
        encoded = self.hf(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        spans = list(encoded["offset_mapping"])
        ends: dict[int, int] = {}
        for i, (a, b) in enumerate(spans):
            if b > a:
                ends[b] = i  # the last of the byte tokens of one character
        turns, positions = self.form.layout == "turns", []
        for read in written.reads:
            position, begins = ends.get(read + shift), read + shift - len(self.form.marker)
            # One token that is the marker, or in turns any token that ends where the answer begins.
            if position is None or not (turns or (spans[position][0] >= begins >= spans[position - 1][1])):
                raise self._no_boundary(text[max(0, read + shift - 20) : read + shift])
            positions.append(position)
        tokens = self._encode(text, written.start + shift, written.stop + shift, None, special)
        return SolutionTokens(tokens.first(positions[-1] + 1), tuple(positions))

    def _piecewise(self, written: _Written) -> SolutionTokens:
        """Every part tokenised by itself, as trainers do that join ids; a marker may have several tokens, of which the
        last is read."""
        bos = () if self.form.layout != "text" or self.hf.bos_token_id is None else (self.hf.bos_token_id,)
        ids: list[int] = [*bos]
        pieces: list[str] = [self.hf.bos_token] * len(bos)
        starts, edges, done = [0] * len(bos), [], 0
        for part in written.parts:
            if part:
                encoded = self._encode(part, 0, len(part), None)
                ids += encoded.ids
                pieces += encoded.pieces
                starts += [done + a for a in encoded.starts]
            done += len(part)
            edges.append(len(ids))
        self._fit(len(ids), edges[0], len(ids), None)
        positions = tuple(edge - 1 for edge in edges[2::2])
        first, end = edges[0], edges[-2]
        tokens = Tokens(tuple(ids), tuple(pieces), tuple(starts), range(first), range(first, end),
                        range(end, len(ids)), len(ids) - 1)  # fmt: skip
        return SolutionTokens(tokens, positions)

    def _adds_bos(self) -> bool:
        ids = self.hf("a")["input_ids"]
        return bool(ids) and self.hf.bos_token_id is not None and ids[0] == self.hf.bos_token_id

    def _no_boundary(self, around: str) -> DataError:
        marker = self.hf(self.form.marker, add_special_tokens=False)["input_ids"]
        return DataError(
            "The end of a step is not a token of its own",
            found=f"{around!r}, where the marker {self.form.marker!r} alone has {len(marker)} token(s)",
            expected="one token that ends where the marker ends"
            + (" and covers all of it" if self.form.layout != "turns" else ""),
            do="use the marker the model was trained with, or StepReadout(by_step=True) for a model whose steps were "
            "tokenised one by one",
        )


def _changed_by_template() -> DataError:
    return DataError(
        "The steps could not be found in the rendered chat template",
        found="a template that changes the steps, their markers or what stands before them",
        expected="the steps as they are written",
        do="strip the steps' outer space, remove reasoning markup, or set a plainer tokenizer.chat_template",
    )
