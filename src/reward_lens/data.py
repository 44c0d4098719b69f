"""Preference data: pairs, lists and style items, from memory, a file or the hub, checked row by row.

A prompt is one user turn (a string) or a conversation that ends with one; its hash, `prompt_key`, is the
cluster of every interval and test. A row that cannot be used raises `DataError` with file, line and field;
one that is odd but usable (an empty response, a repeated id or prompt) is kept and named in `Pairs.notes`.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, no_type_check, overload

from reward_lens.errors import DataError

Message = dict[str, str]
Source = str | Path
Rows = Iterator[tuple[str, Any]]  # where a row stands, and the row
_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_BOM = b"\xef\xbb\xbf"
_FORMS = "'demo', a file ending in .jsonl, .json, .parquet or .csv, or a hub id such as 'org/name'"


class _Prompt:
    """The field `prompt`: checked, held as nested tuples, given back as a string or a fresh list of dicts."""

    def __get__(self, item, owner=None):
        if item is None:
            return self
        held = item.__dict__["prompt"]
        return held if isinstance(held, str) else [{"role": r, "content": c} for r, c in held]

    def __set__(self, item, value: Any) -> None:
        check = _text if isinstance(value, str) else _turns
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
            object.__setattr__(self, name, None if value is None else _text(value, name))


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
        _text(self.chosen, "chosen")
        _text(self.rejected, "rejected")
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
        object.__setattr__(self, "responses", _texts(self.responses, "responses"))
        if len(self.responses) < 2:
            raise _malformed("responses", f"{len(self.responses)} response(s)", "two or more responses")
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
            raise _malformed("labels", _short(labels), expected)
        labels = tuple(labels)
        good = all(isinstance(label, numbers.Real) and math.isfinite(label) for label in labels)
        if not good or len(labels) != len(self.responses):
            raise _malformed("labels", _short(list(labels)), expected)
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
            object.__setattr__(self, name, _texts(getattr(self, name), name))
            if len(getattr(self, name)) != len(self.styles):
                found = f"{len(getattr(self, name))} response(s)"
                raise _malformed(name, found, "three responses: concise, detailed, detailed with markdown")
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

    def __init__(self, pairs: Iterable[Pair], source: str = "memory"):
        self._pairs, repeated = _with_unique_ids(pairs)
        self.source = source
        self.notes = tuple(_notes(self._pairs, repeated))

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

    def __repr__(self) -> str:
        lines = [f"<Pairs {len(self)} from {self.source}, prompts {self.n_prompts}>", *self.notes]
        return "\n  ".join(lines)


def as_pairs(pairs: Any) -> Pairs:
    """`Pairs` from one `Pair`, an iterable of them, or `Pairs` (as they are); none raises `DataError`."""
    if isinstance(pairs, Pair):
        pairs = [pairs]
    if not isinstance(pairs, Pairs):
        pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
        for index, pair in enumerate(pairs):
            if not isinstance(pair, Pair):
                do = "build each as rl.Pair(prompt, chosen, rejected), or read a file with rl.load_pairs"
                raise _malformed(f"pairs[{index}]", _short(pair), "an rl.Pair", do=do)
        pairs = Pairs(pairs)
    if not len(pairs):
        raise DataError(
            "There are no pairs to work on",
            found="an empty sequence",
            expected="at least one rl.Pair",
            do="pass pairs, for example rl.load_pairs('demo')",
        )
    return pairs


def load_pairs(source: Source, split: str | None = None, limit: int | None = None) -> Pairs:
    """Preference pairs from ``"demo"``, a .jsonl, .json, .parquet or .csv file, or a hub id ``"org/name"``.

    Columns: `prompt` (text, or messages ending with a user turn), `chosen`, `rejected`, and where present
    `id` and `subset`; others are ignored. In TRL's conversational form `chosen` and `rejected` are message
    lists: one assistant message after an explicit `prompt`, or conversations that differ in the last turn
    only. A CSV cell may hold messages as JSON. `split` picks one of a hub data set, `limit` the first rows.

    Raises `DataError` naming file, line (row, for parquet, CSV, JSON arrays and the hub) and field.
    """
    name, rows = _open(source, split, limit)
    return Pairs(_parse(name, rows, _pair), name)


def load_groups(source: Source, split: str | None = None, limit: int | None = None) -> list[Group]:
    """Groups of k responses, from the sources of `load_pairs`.

    Columns: `prompt`, `responses` and optionally `labels`, `id`, `subset`; or RewardBench 2's `prompt` with
    the lists `chosen` and `rejected`, which become labels 1 and 0. Ids are made unique as in `Pairs`.
    """
    return list(_with_unique_ids(_parse(*_open(source, split, limit), _group))[0])


def load_style_items(source: Source, split: str | None = None, limit: int | None = None) -> list[StyleItem]:
    """RM-Bench-shaped items (`chosen` and `rejected` lists of three), from the sources of `load_pairs`."""
    return list(_with_unique_ids(_parse(*_open(source, split, limit), _style_item))[0])


def inputs_hash(items: Iterable[Pair | Group | StyleItem]) -> str:
    """Sixteen hex digits of the SHA-256 of all prompts and responses in order, without ids and subsets."""
    return _digest([[item.messages, list(item.responses)] for item in items], 16)


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as messages ready for a chat template, checked as in `Pair`; a string is one user turn."""
    return Pair(prompt, "", "").messages


# Rows to items


def _parse(name: str, rows: Rows, build: Callable) -> list:
    items = []
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise _malformed("row", _short(row), "an object with named fields")
            items.append(build(row))
        except DataError as error:
            columns = f" (columns: {', '.join(map(str, row))})" if isinstance(row, Mapping) else ""
            what = f"{name}, {where}: {error.what[0].lower()}{error.what[1:]}"
            raise DataError(what, found=error.found + columns, expected=error.expected, do=error.do) from None
    if not items:
        raise _unreadable(name, "no rows", "at least one row", do="check the source")
    return items


def _pair(row: Mapping) -> Pair:
    chosen, rejected, prompt = _column(row, "chosen"), _column(row, "rejected"), row.get("prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, list) and side and all(isinstance(response, str) for response in side):
            do = "use load_style_items for RM-Bench's lists of three, load_groups for lists of k responses"
            raise _malformed(name, "a list of strings", "one response, as text or as messages", do=do)
    if isinstance(chosen, list) or isinstance(rejected, list):
        prompt, chosen, rejected = _conversations(prompt, chosen, rejected)
    elif prompt is None:
        prompt = _column(row, "prompt")
    return Pair(prompt, chosen, rejected, **_labels(row))


def _conversations(prompt, chosen, rejected) -> tuple[Any, str, str]:
    """Prompt and responses of TRL's conversational form; a missing prompt is the turns both sides share."""
    *before, (_, chosen) = _turns(chosen, "chosen", last="assistant")
    *other, (_, rejected) = _turns(rejected, "rejected", last="assistant")
    if before != other:
        found = "turns that differ from those of 'chosen' before the last one"
        raise _malformed("rejected", found, "conversations that differ in their last turn only")
    if prompt is None:
        return [{"role": role, "content": content} for role, content in before], chosen, rejected
    given = [("user", prompt)] if isinstance(prompt, str) else list(_turns(prompt, "prompt"))
    if before and before != given:
        found = "turns before the last one that are not the prompt"
        raise _malformed("chosen", found, "one assistant message, or the prompt's messages and then one")
    return prompt, chosen, rejected


def _group(row: Mapping) -> Group:
    prompt, responses, labels = _column(row, "prompt"), row.get("responses"), row.get("labels")
    if responses is None:
        best, others = (_texts(_column(row, name), name) for name in ("chosen", "rejected"))
        responses, labels = best + others, [1.0] * len(best) + [0.0] * len(others)
    return Group(prompt, responses, labels, **_labels(row))


def _style_item(row: Mapping) -> StyleItem:
    return StyleItem(*(_column(row, name) for name in ("prompt", "chosen", "rejected")), **_labels(row))


def _column(row: Mapping, name: str) -> Any:
    if row.get(name) is None:
        found = "null" if name in row else "no such column"
        raise _malformed(name, found, "a value in each row", do="rename or fill the column")
    return row[name]


def _labels(row: Mapping) -> dict[str, Any]:
    """`id` and `subset`, where an absent column, null and an empty cell all mean none."""
    return {name: None if row.get(name) == "" else row.get(name) for name in ("id", "subset")}


def _with_unique_ids(items: Iterable) -> tuple[tuple, list[str]]:
    """The items with ids filled in and made unique, and the ids that were repeated."""
    out, seen, repeated = [], set(), []
    for number, item in enumerate(items, start=1):
        wanted = unique = str(number) if item.id is None else item.id
        for count in itertools.count(2):
            if unique not in seen:
                break
            unique = f"{wanted}#{count}"
        if unique != wanted:
            repeated.append(wanted)
        seen.add(unique)
        out.append(item if unique == item.id else dataclasses.replace(item, id=unique))
    return tuple(out), repeated


def _notes(pairs: Sequence[Pair], repeated: list[str]) -> Iterator[str]:
    content = [(pair.prompt_key, *pair.responses) for pair in pairs]
    first = {key: index for index, key in reversed(list(enumerate(content)))}
    odd = {
        "empty or blank response": [p.id for p in pairs if not all(r.strip() for r in p.responses)],
        "chosen equal to rejected": [p.id for p in pairs if p.chosen == p.rejected],
        "same texts as an earlier pair": [p.id for i, p in enumerate(pairs) if first[content[i]] != i],
        "id used before (a number was appended)": repeated,
    }
    for what, ids in odd.items():
        if ids:
            yield f"{what}: {len(ids)} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
    prompts = len({key for key, *_ in content})
    if prompts < len(pairs):
        yield f"repeated prompts: {len(pairs)} pairs, different prompts {prompts}"


# Sources to rows; each row comes with the words that locate it


def _open(source: Source, split: str | None, limit: int | None) -> tuple[str, Rows]:
    name = str(source)
    if limit is not None and limit < 1:
        raise _unreadable(f"{name} with limit={limit}", "no rows asked for", "1 or more", "raise the limit")
    path = resources.files("reward_lens") / "assets" / "pairs.jsonl" if name == "demo" else Path(source)
    kind = Path(path.name).suffix.lower()
    if kind not in _READERS and _HUB_ID.fullmatch(name) and not os.path.exists(name):
        return name, itertools.islice(_hub_rows(name, split), limit)
    if kind not in _READERS and os.path.isfile(name):
        raise _unreadable(name, f"a file ending in '{kind}'", _FORMS, "convert the file")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        found = "nothing at that path" if isinstance(error, FileNotFoundError) else error
        raise _unreadable(name, found, _FORMS, "check the path") from error
    if split is not None:
        do = "leave split out, or cut the result: pairs[:100]"
        raise _unreadable(f"{name} with split={split!r}", "a file", "a hub data set, which has splits", do)
    return name, itertools.islice(_READERS[kind](name, data), limit)


def _json_line_rows(name: str, data: bytes) -> Rows:
    for number, line in enumerate(_decode(name, data).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _json(f"{name}, line {number}", line)


def _json_rows(name: str, data: bytes) -> Rows:
    """A JSON array of objects; anything else is read as one object a line."""
    if not data.removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _json_line_rows(name, data)
        return
    for number, row in enumerate(_json(name, _decode(name, data)), start=1):
        yield f"row {number}", row


def _parquet_rows(name: str, data: bytes) -> Rows:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(BufferReader(data)).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(f"{name}, after row {number}", error, "a Parquet file with UTF-8 text") from error


def _csv_rows(name: str, data: bytes) -> Rows:
    reader = csv.reader(io.StringIO(_decode(name, data), newline=""), strict=True)
    usual = csv.field_size_limit(max(len(data), 131072))  # the default, 131072, is less than a long response
    try:
        header, *rows = [row for row in reader if row] or [[]]
    except csv.Error as error:
        raise _unreadable(f"{name}, line {reader.line_num}", error, "comma-separated values") from error
    finally:
        csv.field_size_limit(usual)
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        if len(row) != len(header):
            raise _unreadable(where, f"{len(row)} cells", f"{len(header)} cells, as in the header")
        cells = zip(header, row, strict=True)
        yield f"row {number}", {column: _cell(f"{where}, '{column}'", text) for column, text in cells}


def _cell(where: str, text: str) -> Any:
    """A CSV cell: messages where it holds them as JSON, otherwise its text."""
    if re.match(r"\s*\[\s*\{\s*'(role|content)'", text):
        raise _unreadable(where, "messages as Python prints them", "messages as JSON (json.dumps)")
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return text  # a response may well begin with a bracket
    is_messages = bool(value) and all(isinstance(message, dict) and "role" in message for message in value)
    return value if is_messages else text


def _hub_rows(name: str, split: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets, huggingface_hub and httpx share no narrower base class
        do = "check the id, the split, the network and, for gated data, your hub login"
        raise _unreadable(name, error, f"a data set of the Hugging Face hub, or {_FORMS}", do) from error
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            do = "pass split=, one of them"
            raise _unreadable(name, f"the splits {', '.join(map(str, loaded))}", "one split", do)
        loaded = next(iter(loaded.values()))
    for number, row in enumerate(loaded, start=1):
        yield f"row {number}", row


_READERS = {".jsonl": _json_line_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at line {error.lineno}, column {error.colno} of {_short(text)}"
        raise _unreadable(where, found, "valid JSON") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists nested too deep
        raise _unreadable(where, error, "valid JSON") from error


def _decode(name: str, data: bytes) -> str:
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, offset) + 1
        found = f"byte 0x{data[offset]:02x} at byte offset {offset}"
        raise _unreadable(f"{name}, line {line}", found, "UTF-8 text", "convert the file to UTF-8") from error


# Checks of single values


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _malformed(field, _short(value), "text")
    if lone := _SURROGATE.search(value):
        found = f"a lone surrogate, U+{ord(lone[0]):04X}, at character index {lone.start()}"
        raise _malformed(field, found, "text that UTF-8 can encode", "repair the text where it was decoded")
    return value


def _texts(values: Any, field: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise _malformed(field, _short(values), "a list of texts")
    return tuple(_text(value, f"{field}[{index}]") for index, value in enumerate(values))


def _turns(value: Any, field: str, last: str = "user") -> tuple[tuple[str, str], ...]:
    """Messages as (role, content); any other key (a tool call) is refused rather than lost."""
    if not isinstance(value, list | tuple) or not value:
        raise _malformed(field, _short(value), f"text, or a list of messages that ends with the {last}")
    turns = []
    for index, message in enumerate(value):
        extra = [k for k, v in message.items() if v is not None] if isinstance(message, Mapping) else []
        if not isinstance(message, Mapping) or not {"role", "content"}.issuperset(extra):
            raise _malformed(f"{field}[{index}]", _short(message), "an object of 'role' and 'content' alone")
        turns.append(tuple(_text(message.get(key), f"{field}[{index}].{key}") for key in ("role", "content")))
    if turns[-1][0] != last:
        raise _malformed(field, f"a last message by '{turns[-1][0]}'", f"a last message by '{last}'")
    return tuple(turns)


def _malformed(field: str, found: str, expected: str, do: str = "correct or leave out the row") -> DataError:
    return DataError(f"The field '{field}' cannot be used", found=found, expected=expected, do=do)


def _unreadable(where: str, found: Any, expected: str, do: str = "correct the file") -> DataError:
    found = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else found
    return DataError(f"{where} cannot be read", found=found, expected=expected, do=do)


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:length]
