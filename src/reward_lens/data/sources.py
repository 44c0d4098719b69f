"""Sources to rows: each row comes with the words that locate it."""

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from reward_lens.data.checks import shown, unreadable

Rows = Iterator[tuple[str, Any]]  # where a row stands, and the row
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_BOM = b"\xef\xbb\xbf"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # of what the datasets library saves
_BUNDLED = {"demo": "pairs.jsonl", "diagnostic": "diagnostic.jsonl", "misalignment": "misalignment.jsonl"}
_FORMS = (
    "a .jsonl, .json, .parquet or .csv file, a data set of the datasets library or the folder it is saved in, or a hub "
    "id such as 'org/name'"
)
_SETS = ", ".join(map(repr, _BUNDLED)) + f", {_FORMS}"  # which are of pairs


def open_rows(
    source: str | Path | Iterable, split: str | None, limit: int | None, joined: Callable[[Rows], Rows] = iter
) -> tuple[str, Rows]:
    """Name and rows of a source; of what `joined` makes of them the first `limit`."""
    given = not isinstance(source, str | Path)
    name = f"a {type(source).__name__}" if given else str(source)
    if limit is not None and limit < 1:
        raise unreadable(f"{name} with limit={limit}", "no rows asked for", "1 or more", "raise the limit")
    if given:
        return name, itertools.islice(joined(_rows_of(name, source, split)), limit)
    forms = _FORMS if joined is iter else _SETS
    path = resources.files("reward_lens") / "assets" / _BUNDLED[name] if name in _BUNDLED else Path(source)
    kind = Path(path.name).suffix.lower()
    if kind not in _READERS and _HUB_ID.fullmatch(name) and not os.path.exists(name):
        return name, itertools.islice(joined(_hub_rows(name, split)), limit)
    if any((path / file).is_file() for file in _SAVED):
        return name, itertools.islice(joined(_saved_rows(name, split)), limit)
    if kind not in _READERS and os.path.isfile(name):
        raise unreadable(name, f"a file ending in '{kind}'", forms, "convert the file")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        found = {FileNotFoundError: "nothing at that path", IsADirectoryError: "a folder"}.get(type(error), error)
        do = "name a file in the folder" if isinstance(error, IsADirectoryError) else "check the path"
        raise unreadable(name, found, forms, do) from error
    if split is not None:
        do = "leave split out, or cut the result: pairs[:100]"
        raise unreadable(f"{name} with split={split!r}", "a file", "a hub data set, which has splits", do)
    return name, itertools.islice(joined(_READERS[kind](name, data)), limit)


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
        raise unreadable(f"{name}, after row {number}", error, "a Parquet file with UTF-8 text") from error


def _csv_rows(name: str, data: bytes) -> Rows:
    reader = csv.reader(io.StringIO(_decode(name, data), newline=""), strict=True)
    usual = csv.field_size_limit(max(len(data), 131072))  # the default, 131072, is less than a long response
    try:
        header, *rows = [row for row in reader if row] or [[]]
    except csv.Error as error:
        raise unreadable(f"{name}, line {reader.line_num}", error, "comma-separated values") from error
    finally:
        csv.field_size_limit(usual)
    repeated = sorted({column for column in header if column and header.count(column) > 1})
    if repeated:
        raise unreadable(f"{name}, header", f"columns of one name: {', '.join(repeated)}", "different names")
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        if len(row) != len(header):
            do = "correct the file" if len(header) > 1 else "separate the columns by commas"
            raise unreadable(where, f"{len(row)} cells", f"{len(header)} cells, as in the header", do)
        cells = zip(header, row, strict=True)
        yield f"row {number}", {column: _cell(f"{where}, '{column}'", text) for column, text in cells}


def _cell(where: str, text: str) -> Any:
    """A CSV cell: messages where it holds them as JSON, otherwise its text."""
    if re.match(r"\s*\[\s*\{\s*'(role|content)'", text):
        raise unreadable(where, "messages as Python prints them", "messages as JSON (json.dumps)")
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return text  # a response may well begin with a bracket
    is_messages = bool(value) and all(isinstance(message, dict) and "role" in message for message in value)
    return value if is_messages else text


def _hub_rows(name: str, split: str | None) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(name, split=split)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:  # no narrower class is common to them
        do = "check the id, the split, the network and, for gated data, your hub login"
        raise unreadable(name, error, f"a data set of the Hugging Face hub, or {_FORMS}", do) from error
    yield from _rows_of(name, loaded)


def _saved_rows(name: str, split: str | None) -> Rows:
    """Of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(name)
    except (OSError, ValueError) as error:
        raise unreadable(name, error, "a folder that save_to_disk wrote") from error
    yield from _rows_of(name, loaded, split)


def _rows_of(name: str, loaded: Any, split: str | None = None) -> Rows:
    """Of a data set in memory: rows, or splits of them."""
    if isinstance(loaded, Mapping):
        if split is None and len(loaded) != 1 or split is not None and split not in loaded:
            do = "pass split=, one of them"
            name = name if split is None else f"{name} with split={split!r}"
            raise unreadable(name, f"the splits {', '.join(map(str, loaded))}", "one split", do)
        loaded = loaded[split] if split is not None else next(iter(loaded.values()))
    elif split is not None:
        raise unreadable(f"{name} with split={split!r}", "rows without splits", "splits", "leave split out")
    if hasattr(loaded, "iterrows"):  # a DataFrame, which iterates over its columns; Arrow knows its missing values
        loaded = _frame_rows(name, loaded)
    for number, row in enumerate(loaded, start=1):
        yield f"row {number}", row


def _frame_rows(name: str, frame: Any) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, Table

    try:
        return Table.from_pandas(frame, preserve_index=False).to_pylist()
    except (ArrowException, ValueError) as error:
        raise unreadable(name, error, "columns of one type each", "correct the columns") from error


_READERS = {".jsonl": _json_line_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at line {error.lineno}, column {error.colno} of {shown(text)}"
        raise unreadable(where, found, "valid JSON") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists nested too deep
        raise unreadable(where, error, "valid JSON") from error


def _decode(name: str, data: bytes) -> str:
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, offset) + 1
        found = f"byte 0x{data[offset]:02x} at byte offset {offset}"
        raise unreadable(f"{name}, line {line}", found, "UTF-8 text", "convert the file to UTF-8") from error
