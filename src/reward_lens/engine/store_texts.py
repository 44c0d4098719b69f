"""Texts for a store as they come: one stream of pairs, groups, tuples or raw texts, cut into windows.

A window is a run of consecutive texts that is computed at once. Where it ends depends on the texts alone, so that a
run which begins at a later window computes the same batches, and so the same bits, as one that began at the first.
Texts are told apart by a digest; of those gone by, only 16 bytes each are kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from reward_lens import data
from reward_lens.data.checks import shown
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens

WINDOW_TOKENS = 16384

Source = tuple[str | list[dict[str, str]] | None, str | tuple[str, str]]
"""A prompt (None: a raw text without one) and a response, or for a judge of pairs two in order."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Consecutive texts of the stream, those seen before left out."""

    start: int
    """Number of its first text in the stream."""
    stop: int
    numbers: tuple[int, ...]
    """Numbers of the texts that are kept, which count the duplicates: text 2i + 1 is the rejected one of pair i."""
    tokens: tuple[Tokens, ...]
    duplicates: int
    inputs_hash: str
    """Of all texts before `stop`, in order."""


@dataclasses.dataclass(frozen=True)
class Known:
    """How far an earlier run had read the same inputs."""

    start: int = 0
    """The first text that has to be run again."""
    n_texts: int = 0
    inputs_hash: str = ""
    """Of the first `n_texts` texts."""


NOTHING = Known()


def source_texts(inputs: Any, compares: bool = False) -> Iterator[Source]:
    """Every text of pairs, groups, style items, (prompt, response) tuples or raw strings, in order and lazily; of pairs
    for a judge that `compares`, both orders."""
    if isinstance(inputs, tuple) and inputs and all(isinstance(part, str) for part in inputs):
        raise _unusable("The inputs are", inputs, "put the tuple in a list")
    if isinstance(inputs, str) or hasattr(inputs, "responses"):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise _unusable("The inputs are", inputs, "pass rl.Pairs, or a list or generator of these")
    for index, item in enumerate(inputs):
        if compares and isinstance(item, data.Pair):
            yield item.messages, (item.chosen, item.rejected)
            yield item.messages, (item.rejected, item.chosen)
        elif hasattr(item, "responses"):
            for response in item.responses:
                yield item.messages, response
        elif isinstance(item, str):
            yield None, item
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (str, tuple) if compares else str):
            yield data.as_messages(item[0]), item[1]
        else:
            raise _unusable(f"Item {index} of the inputs is", item, "correct or leave out the item")


def new_texts(inputs: Any, compares: bool = False) -> Iterator[tuple[Source, bool, Any]]:
    """Every text with whether it is the first of its kind, and the running SHA-256 of all texts so far."""
    seen: set[bytes] = set()
    running = hashlib.sha256()
    for source in source_texts(inputs, compares):
        digest = hashlib.blake2b(json.dumps(source).encode(), digest_size=16).digest()
        running.update(digest)
        yield source, digest not in seen, running
        seen.add(digest)


def windows(rm: RewardModel, inputs: Any, batch_size: int | None = None, known: Known = NOTHING) -> Iterator[Window]:
    """The stream from `known.start` on. A window closes at `WINDOW_TOKENS` tokens and `batch_size` texts or more.

    Raises `DataError` where the inputs are not those that `known` speaks of.
    """
    start, stop, repeated, length, digest = known.start, 0, 0, 0, hashlib.sha256()
    numbers: list[int] = []
    tokens: list[Tokens] = []
    for number, (source, new, digest) in enumerate(new_texts(inputs, rm.tokenizer.compares)):
        stop = number + 1
        if stop == known.n_texts and digest.hexdigest() != known.inputs_hash:
            raise _other_inputs(f"other texts among the first {stop}", known)
        if number < known.start:
            continue
        if new:
            numbers.append(number)
            tokens.append(tokens_of(rm, source))
            length += len(tokens[-1])
        else:
            repeated += 1
        if length >= WINDOW_TOKENS and len(tokens) >= (batch_size or 1):
            yield Window(start, stop, tuple(numbers), tuple(tokens), repeated, digest.hexdigest())
            start, repeated, length, numbers, tokens = stop, 0, 0, [], []
    if stop < known.n_texts:
        raise _other_inputs(f"{stop} texts", known)
    if stop > start:
        yield Window(start, stop, tuple(numbers), tuple(tokens), repeated, digest.hexdigest())


def tokens_of(rm: RewardModel, source: Source) -> Tokens:
    prompt, response = source
    if prompt is not None:
        return rm.tokenize(prompt, response)
    assert isinstance(response, str)  # a raw text
    return rm.tokenizer.text(response, rm.truncation)


def measured(rm: RewardModel, inputs: Any, most: int) -> tuple[list[Tokens], int, int, float]:
    """Tokens of the first `most` new texts, the numbers of new and of repeated texts, and the characters of all new
    texts as a multiple of those of the tokenised ones."""
    tokens: list[Tokens] = []
    new_count = repeated = read = characters = 0
    for source, new, _ in new_texts(inputs, rm.tokenizer.compares):
        if not new:
            repeated += 1
            continue
        new_count += 1
        size = len("".join(source[1])) + 1
        characters += size
        if len(tokens) < most:
            tokens.append(tokens_of(rm, source))
            read += size
    return tokens, new_count, repeated, characters / max(read, 1)


def _unusable(what: str, found: Any, do: str) -> DataError:
    return DataError(
        f"{what} not something that texts can be taken from",
        found=shown(found),
        expected="rl.Pair, rl.Group, a (prompt, response) tuple or a text, in a list, rl.Pairs or a generator",
        do=do,
    )


def _other_inputs(found: str, known: Known) -> DataError:
    return DataError(
        "The store was begun with other inputs",
        found=found,
        expected=f"inputs that begin with the {known.n_texts} texts it has read (hash {known.inputs_hash[:16]})",
        do="pass the same inputs in the same order, or choose another folder",
    )
