"""A language model as a judge: its prompt template around a response, or two, read where its answer would begin.

    single   {prompt}, {response}     one text a response; the reward is what the model would answer about it
    pair     {prompt}, {a}, {b}       one text an ordered pair; the reward is what speaks for a

The span `response` is the text put in place of {response} or {a}; what the template writes after it, the other answer
included, is the `tail`. A preference pair is read by a pair judge in both orders: chosen as a, then rejected as a.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from reward_lens.errors import DataError
from reward_lens.model.tokens import Tokenizer, Tokens, check_text

FIELDS = re.compile(r"\{(prompt|response|a|b)\}")


def check_template(template: str) -> None:
    """Raise `DataError` unless the template has {response}, or {a} and {b}, each once, and not both forms.

    One without {prompt} judges responses alone; where it has a {word} of another name instead, that was meant.
    """
    check_text(template, "judge's template")
    count = {name: len(re.findall(rf"\{{{name}\}}", template)) for name in ("response", "a", "b")}
    if list(count.values()) not in ([1, 0, 0], [0, 1, 1]):
        raise DataError(
            "The judge's template has no place for what is judged",
            found=", ".join(f"{{{name}}} {n} times" for name, n in count.items()),
            expected="{response} once, or {a} once and {b} once",
            do="write these placeholders where the texts belong; other braces are left as they are",
        )
    others = re.findall(r"\{\w+\}", FIELDS.sub("", template))
    if others and "{prompt}" not in template:
        raise DataError(
            "The judge's template does not ask about the prompt, and has a placeholder that nothing fills",
            found=", ".join(dict.fromkeys(others)),
            expected="{prompt} where the prompt belongs, or no placeholder besides those of the responses",
            do="write {prompt} in its place",
        )


def prompt_text(messages: Sequence[dict]) -> str:
    """What {prompt} stands for: the text of a single user message, else "role: text" of every message in turn."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def digest(template: str, chat: bool) -> str:
    """Eight hex digits that tell two ways of asking apart."""
    return hashlib.sha256(f"{chat} {template}".encode()).hexdigest()[:8]


class JudgeTokenizer(Tokenizer):
    """A tokenizer that puts prompt and response into a judge's template.

    `chat=True` sends the template as one user message through the chat template and reads at the end of its
    generation prompt; False takes it for the whole text, the tokenizer's own special tokens added.
    """

    def __init__(self, hf: Any, max_length: int | None, template: str, chat: bool):
        super().__init__(hf, None, max_length)
        check_template(template)
        self.template, self.chat, self.adds_special = template, chat, not chat
        self.compares = "{a}" in template

    def written(self, messages: list[dict], response: Any) -> str:
        text = self._filled(messages, response)
        return self.render(self._asked(text), answer=True) if self.chat else text

    def official_ids(self, messages: list[dict], response: Any) -> list[int]:
        text = self._filled(messages, response)
        return self._official(self._asked(text), answer=True) if self.chat else list(self.hf(text)["input_ids"])

    def both(self, messages: list[dict], chosen: str, rejected: str, truncation: str | None) -> tuple[Tokens, Tokens]:
        """The two texts of a preference pair; of a pair judge its two orders, chosen as a first."""
        if not self.compares:
            return super().both(messages, chosen, rejected, truncation)
        orders = ((chosen, rejected), (rejected, chosen))
        first, second = (self.conversation(messages, order, truncation) for order in orders)
        return first, second

    def probes(self, texts: Sequence[tuple[str, str]]) -> list[tuple[str, Any]]:
        """The load report's texts; a pair judge compares each response with the next text's."""
        if not self.compares:
            return list(texts)
        others = [*(response for _, response in texts[1:]), texts[0][1]]
        return [(prompt, (response, other)) for (prompt, response), other in zip(texts, others, strict=True)]

    def check_response(self, response: Any) -> None:
        """Raise `DataError` unless it is a text, or for a pair judge an ordered pair of texts."""
        if not self.compares:
            return super().check_response(response)
        if not isinstance(response, tuple | list) or len(response) != 2:
            raise DataError(
                "A pair judge gives no reward to one response alone",
                found=f"a {type(response).__name__}",
                expected="two responses: (a, b), in the order in which the judge reads them",
                do="pass (a, b), or preference pairs to rl.pair_judge, rm.score_pairs and the methods for pairs",
            )
        for name, text in zip("ab", response, strict=True):
            check_text(text, f"response {name}")

    def _filled(self, messages: list[dict], response: Any) -> str:
        answers = dict(zip("ab", response, strict=True)) if self.compares else {"response": response}
        texts = {"prompt": prompt_text(messages), **answers}
        # One pass, so that a placeholder inside a text stays what it is: text.
        return FIELDS.sub(lambda field: texts[field[1]], self.template)

    def _asked(self, text: str) -> list[dict]:
        return [{"role": "user", "content": text}]

    def _marked(self, response: Any, marker: str) -> Any:
        return (marker, response[1]) if self.compares else marker
