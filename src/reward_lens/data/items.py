"""Pairs, groups and style items, checked when they are made; `Pairs` says what is odd about its pairs."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import numbers
import random
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, no_type_check, overload

from reward_lens.data.checks import checked_text, checked_texts, checked_turns, malformed, shown
from reward_lens.errors import DataError

Message = dict[str, str]


class _Prompt:
    """The field `prompt`: checked, held as nested tuples, given back as a string or a fresh list of dicts."""

    def __get__(self, item, owner=None):
        if item is None:
            return self
        held = item.__dict__["prompt"]
        return held if isinstance(held, str) else [{"role": r, "content": c} for r, c in held]

    def __set__(self, item, value: Any) -> None:
        check = checked_text if isinstance(value, str) else checked_turns
        item.__dict__["prompt"] = check(value, "prompt")


class _Item:
    """What pairs, groups and style items share: a prompt, an id, a subset and two or more responses."""

    prompt: Any = _Prompt()
    responses: Any
    id: str | None
    subset: str | None

    @property
    def messages(self) -> list[Message]:
        """The prompt as messages, ready for a chat template; a string is one user turn."""
        prompt = self.prompt
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    @property
    def prompt_text(self) -> str:
        """The prompt to be read: one user turn as it is, several messages each under its role."""
        messages = self.messages
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)

    @functools.cached_property
    def prompt_key(self) -> str:
        """A short hash of `messages`, the same on any machine: the cluster label of the statistics."""
        return _digest([self.messages], 12)

    def __hash__(self):
        return hash((self.prompt_key, *self.responses, self.id, self.subset))

    def _check_labels(self) -> None:
        for name in ("id", "subset"):
            value = getattr(self, name)
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                value = str(value)
            object.__setattr__(self, name, None if value is None else checked_text(value, name))


@no_type_check  # not by the tests' run-time checker: a wrong type is a DataError, as for users
@dataclasses.dataclass(frozen=True)
class Pair(_Item):
    """A prompt with a preferred and a dispreferred response.

    `prompt` is a string (one user turn) or a list of ``{"role", "content"}`` messages that ends with `user`.
    Raises `DataError` for anything but text, and for lone surrogates (no tokenizer can encode them).
    """

    prompt: str | Sequence[Mapping[str, str]] = dataclasses.field()  # held by _Item.prompt
    chosen: str
    rejected: str
    id: str | None = None
    subset: str | None = None

    def __post_init__(self):
        checked_text(self.chosen, "chosen")
        checked_text(self.rejected, "rejected")
        self._check_labels()

    __hash__ = _Item.__hash__  # the one dataclass would write hashes the prompt's list

    @property
    def responses(self) -> tuple[str, str]:
        """`(chosen, rejected)`."""
        return (self.chosen, self.rejected)


@no_type_check
@dataclasses.dataclass(frozen=True)
class Group(_Item):
    """A prompt with k >= 2 responses; `labels` are k numbers, higher is better, ties allowed.

    Without labels the first response is the best and the others are not ordered.
    """

    prompt: str | Sequence[Mapping[str, str]] = dataclasses.field()  # held by _Item.prompt
    responses: Sequence[str]
    labels: Sequence[float] | None = None
    id: str | None = None
    subset: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "responses", checked_texts(self.responses, "responses"))
        if len(self.responses) < 2:
            raise malformed("responses", f"{len(self.responses)} response(s)", "two or more responses")
        if self.labels is not None:
            object.__setattr__(self, "labels", self._numbers(self.labels))
        self._check_labels()

    __hash__ = _Item.__hash__  # the one dataclass would write hashes the prompt's list

    def best(self) -> tuple[int, ...]:
        """Indices of the responses that share the highest label."""
        if self.labels is None:
            return (0,)
        return tuple(i for i, label in enumerate(self.labels) if label == max(self.labels))

    def _numbers(self, labels) -> tuple[float, ...]:
        expected = f"{len(self.responses)} finite numbers, one a response"
        if isinstance(labels, str | Mapping) or not isinstance(labels, Iterable):
            raise malformed("labels", shown(labels), expected)
        labels = tuple(labels)
        good = all(isinstance(label, numbers.Real) and math.isfinite(label) for label in labels)
        if not good or len(labels) != len(self.responses):
            raise malformed("labels", shown(list(labels)), expected)
        return tuple(float(label) for label in labels)


@no_type_check
@dataclasses.dataclass(frozen=True)
class StyleItem(_Item):
    """Three chosen and three rejected responses to one prompt, in the order of `styles` (RM-Bench)."""

    styles: ClassVar[tuple[str, str, str]] = ("concise", "detailed", "markdown")
    prompt: str | Sequence[Mapping[str, str]] = dataclasses.field()  # held by _Item.prompt
    chosen: Sequence[str]
    rejected: Sequence[str]
    id: str | None = None
    subset: str | None = None

    def __post_init__(self):
        for name in ("chosen", "rejected"):
            object.__setattr__(self, name, checked_texts(getattr(self, name), name))
            if len(getattr(self, name)) != len(self.styles):
                found = f"{len(getattr(self, name))} response(s)"
                raise malformed(name, found, "three responses: concise, detailed, detailed with markdown")
        self._check_labels()

    __hash__ = _Item.__hash__  # the one dataclass would write hashes the prompt's list

    @property
    def responses(self) -> tuple[str, ...]:
        """The three chosen responses, then the three rejected ones."""
        return (*self.chosen, *self.rejected)


class Pairs(Sequence):
    """An immutable sequence of `Pair` with unique ids; slicing gives `Pairs`.

    `source` names where they came from and `notes` says what is odd about them. Nothing is dropped: a missing
    id becomes the row's number and a repeated one gets ``#2``, ``#3``, ... appended.
    """

    def __init__(self, pairs: Iterable[Pair], source: str = "memory", notes: Iterable[str] = ()):
        self._pairs, repeated = with_unique_ids(pairs)
        self.source = source
        self.notes = (*notes, *_notes(self._pairs, repeated))

    @property
    def n_prompts(self) -> int:
        """Number of different prompts, the sample size of every interval."""
        return len({pair.prompt_key for pair in self._pairs})

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...
    def __getitem__(self, index):
        return Pairs(self._pairs[index], self.source) if isinstance(index, slice) else self._pairs[index]

    def split(self, *shares: float, seed: int = 0) -> tuple["Pairs", ...]:
        """Parts with these shares of the prompts, drawn by `seed`, and one of what is left; no prompt is in two.

        ``fit, dev, guard = pairs.split(0.3, 0.1)``. The pairs keep their order. Raises `DataError` for shares that are
        not above 0 or add up to more than 1, and where a part would have no prompt.
        """
        prompts = list(dict.fromkeys(pair.prompt_key for pair in self._pairs))
        random.Random(seed).shuffle(prompts)
        ends = [0]
        if shares and all(isinstance(share, numbers.Real) and 0 < share <= 1 for share in shares):
            ends = [round(len(prompts) * math.fsum(shares[:i])) for i in range(len(shares) + 1)]
            ends += [len(prompts)] * (ends[-1] < len(prompts))
        if len(ends) == 1 or ends != sorted(set(ends)) or ends[-1] > len(prompts):
            raise DataError("The pairs cannot be split so", found=f"shares {shares} of {len(prompts)} prompts",
                            expected="shares above 0 that add up to at most 1, and a prompt for every part",
                            do="pass fewer or other shares")  # fmt: skip
        return tuple(by_prompt(self, set(prompts[a:b]))[0] for a, b in itertools.pairwise(ends))

    def __repr__(self) -> str:
        lines = [f"<Pairs {len(self)} from {self.source}, prompts {self.n_prompts}>", *self.notes]
        return "\n  ".join(lines)


def by_prompt(pairs: Pairs, prompts: Container[str]) -> tuple[Pairs, Pairs]:
    """The pairs whose prompt is one of `prompts` (keys), and the others."""
    parts = ([p for p in pairs if (p.prompt_key in prompts) == inside] for inside in (True, False))
    inside, outside = (Pairs(part, pairs.source) for part in parts)
    return inside, outside


def as_pairs(pairs: Any) -> Pairs:
    """`Pairs` from one `Pair`, an iterable of them, or `Pairs` (as they are); none raises `DataError`."""
    if isinstance(pairs, Pair):
        pairs = [pairs]
    if isinstance(pairs, str | Path):
        do = f"read the file first: rl.load_pairs({str(pairs)!r})"
        raise malformed("pairs", shown(pairs), "rl.Pair objects", do=do)
    if not isinstance(pairs, Pairs):
        pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
        for index, pair in enumerate(pairs):
            if not isinstance(pair, Pair):
                do = "build each as rl.Pair(prompt, chosen, rejected), or read a file with rl.load_pairs"
                raise malformed(f"pairs[{index}]", shown(pair), "an rl.Pair", do=do)
        pairs = Pairs(pairs)
    if not len(pairs):
        raise DataError(
            "There are no pairs to work on",
            found="an empty sequence",
            expected="at least one rl.Pair",
            do="pass pairs, for example rl.load_pairs('demo')",
        )
    return pairs


def inputs_hash(items: Iterable) -> str:
    """Sixteen hex digits of the SHA-256 of all prompts and responses in order, without ids and subsets."""
    return _digest([[item.messages, list(item.responses)] for item in items], 16)


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as messages ready for a chat template, checked as in `Pair`; a string is one user turn."""
    return Pair(prompt, "", "").messages


def with_unique_ids(items: Iterable) -> tuple[tuple, list[str]]:
    """The items with ids filled in and made unique, and the ids that were repeated."""
    out, seen, repeated, counts = [], set(), [], {}
    for number, item in enumerate(items, start=1):
        wanted = unique = str(number) if item.id is None else item.id
        while unique in seen:
            counts[wanted] = counts.get(wanted, 1) + 1  # the lower ones are taken
            unique = f"{wanted}#{counts[wanted]}"
        if unique != wanted:
            repeated.append(wanted)
        seen.add(unique)
        out.append(item if unique == item.id else dataclasses.replace(item, id=unique))
    return tuple(out), repeated


def _notes(pairs: Sequence[Pair], repeated: list[str]) -> Iterator[str]:
    content = [(pair.prompt_key, *pair.responses) for pair in pairs]
    first = {key: index for index, key in reversed(list(enumerate(content)))}
    turned = [(prompt, rejected, chosen) for prompt, chosen, rejected in content]
    odd = {
        "empty or blank prompt": [p.id for p in pairs if not p.messages[-1]["content"].strip()],
        "a transcript (Human: ...) as prompt, taken as one user turn": [
            p.id for p in pairs if isinstance(p.prompt, str) and p.prompt.lstrip().startswith("Human:")
        ],
        "both responses begin with the prompt, which the model is given before them": [
            p.id
            for p in pairs
            if (said := p.messages[-1]["content"].strip()) and all(r.lstrip().startswith(said) for r in p.responses)
        ],
        "empty or blank response": [p.id for p in pairs if not all(r.strip() for r in p.responses)],
        "chosen equal to rejected": [p.id for p in pairs if p.chosen == p.rejected],
        "same texts as an earlier pair": [p.id for i, p in enumerate(pairs) if first[content[i]] != i],
        "an earlier pair with the preference the other way round": [
            p.id for i, p in enumerate(pairs) if p.chosen != p.rejected and first.get(turned[i], i) < i
        ],
        "id used before (a number was appended)": repeated,
    }
    for what, ids in odd.items():
        if ids:
            yield f"{what}: {len(ids)} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
    prompts = len({key for key, *_ in content})
    if prompts < len(pairs):
        yield f"repeated prompts: {len(pairs)} pairs, different prompts {prompts}"


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:length]
