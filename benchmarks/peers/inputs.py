"""What every system is given: model folders, and pairs of equal length that part at a chosen token.

A pair is a stretch of real text and a copy of it in which whole words are replaced, the first of them exactly at the
chosen token. Only pairs whose texts come back from the tokenizer as exactly these tokens are used, so the number of
tokens and the place of the first difference are the same for a system that tokenises by itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT = "Explain."
# ChatML without the demo's standing system message: with it 33 tokens come before every response, which leaves no
# room for a first difference at a fifth of 100 tokens.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
)
EVERY = 3  # after the first difference every third whole word is replaced as well


def demo_folder(work: Path) -> Path:
    """The demo model as a plain Hugging Face folder."""
    folder = work / "demo"
    if not (folder / "config.json").exists():
        import reward_lens as rl

        rm = rl.load("demo", dtype="float32")
        rm.tokenizer.hf.chat_template = TEMPLATE
        rm.tokenizer.hf.save_pretrained(folder)
        rm.module.save_pretrained(folder)
    return folder


def random_folder(work: Path, layers: int) -> Path:
    """A reward model of the demo's width, so many layers and random weights; times do not depend on their values."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = work / f"depth-{layers}"
    if not (folder / "config.json").exists():
        torch.manual_seed(layers)
        config = AutoConfig.from_pretrained(demo_folder(work))
        config.num_hidden_layers = layers
        AutoTokenizer.from_pretrained(demo_folder(work)).save_pretrained(folder)
        AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def responses(source: str | None) -> list[str]:
    """Chosen responses of the bundled pairs, or of every file of a folder that holds preference pairs."""
    import reward_lens as rl

    files = ["demo"] if source is None else sorted(str(f) for f in Path(source).glob("*.jsonl"))
    texts = []
    for file in files:
        try:
            texts += [pair.chosen for pair in rl.load_pairs(file, limit=200)]
        except rl.DataError:
            continue  # another kind of file
    return texts


class Pairs:
    """Cuts pairs out of one long stretch of text."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer = tokenizer
        text = " ".join(" ".join(texts).split())
        self.stream = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = [i for i, ok in zip(self.stream, self._whole(self.stream), strict=True) if ok]
        self.words = sorted(set(whole))

    def make(self, length: int, first: int) -> dict:
        """A pair of `length` tokens whose first difference is token `first` (0-based)."""
        head = self._ids("")[: -len(self._tail())]
        room, place = length - len(head) - len(self._tail()), first - len(head)
        if place < 0 or place >= room:
            raise ValueError(f"the response covers tokens {len(head)} to {len(head) + room - 1}, not token {first}")
        for start in range(0, len(self.stream) - room, 11):
            pair = self._pair(self.stream[start : start + room], place, [head, self._tail()])
            if pair is not None:
                return pair | {"id": f"{length}-{first}", "length": length, "first": first}
        raise ValueError(f"no stretch of the text gives {length} tokens with a whole word at {first}")

    def _pair(self, ids: list[int], place: int, frame: list[list[int]]) -> dict | None:
        whole = self._whole(ids)
        if not whole[place]:
            return None
        other = list(ids)
        for n, i in enumerate(i for i, ok in enumerate(whole) if ok and i >= place):
            if n % EVERY == 0:
                at = (self.words.index(ids[i]) + 1 + 7 * n) % len(self.words)
                other[i] = self.words[at if self.words[at] != ids[i] else at - 1]
        texts = [self.tokenizer.decode(part) for part in (ids, other)]
        wanted = [frame[0] + part + frame[1] for part in (ids, other)]
        if [self._ids(text) for text in texts] != wanted:
            return None
        return {"prompt": PROMPT, "chosen": texts[0], "rejected": texts[1], "ids": wanted}

    def _whole(self, ids: list[int]) -> list[bool]:
        """Whether a token is a whole word: a space and letters, with no letters glued on behind."""
        pieces = [self.tokenizer.decode([i]) for i in ids]
        after = [*pieces[1:], " "]
        return [
            p[:1] == " " and p[1:].isascii() and p[1:].isalpha() and n[:1] == " "
            for p, n in zip(pieces, after, strict=True)
        ]

    def _ids(self, response: str) -> list[int]:
        messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": response}]
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))

    def _tail(self) -> list[int]:
        return self.tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
