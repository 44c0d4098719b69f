"""From a result to what the page shows of it: heading, two sentences, charts, tables, checks, settings."""

import dataclasses
import re
import unicodedata
from collections.abc import Mapping

import numpy as np
import xarray as xr

from reward_lens.charts import kind, panels
from reward_lens.charts.rows import dims_of, text_of, words
from reward_lens.report import numbers
from reward_lens.report.tables import Table, checks_table, side_by_side, values_table
from reward_lens.report.texts import Strip, strip
from reward_lens.result import Check, Result

ROOM = 60_000  # tokens of all strips of a page together, about 3.5 MB
SHARED = ("model", "objective", "revision", "dtype", "device", "seed", "n_pairs", "n_prompts", "inputs_hash")
NAMES = {"n_pairs": "pairs", "n_prompts": "prompts", "inputs_hash": "hash of the inputs"}


@dataclasses.dataclass(frozen=True)
class Figure:
    id: str
    title: str
    note: str
    label: str
    spec: dict


@dataclasses.dataclass(frozen=True)
class Section:
    id: str
    title: str
    facts: str
    shows: str
    cannot_show: str
    figures: list[Figure]
    strip: Strip | None
    table: Table | None
    open_table: bool
    checks: list[Check]
    lists_checks: bool  # the table is of checks already
    settings: list[tuple[str, str]]


def sections(results: Mapping[str, Result]) -> list[Section]:
    """One section a result, in the order given."""
    rewards = _rewards(results)
    out, used, room = [], {"checks", "contents", "main", "refused"}, ROOM
    for key, result in results.items():
        title = str(result.meta.get("title") or heading(key))
        anchor = _anchor(title, used)
        form = kind(result)
        text = strip(result, _own_rewards(result) or rewards, room) if form == "tokens" else None
        room -= text.tokens if text else 0
        out.append(
            Section(
                id=anchor,
                title=title,
                facts=_facts(result),
                shows=str(result.meta.get("shows", "")),
                cannot_show=str(result.meta.get("cannot_show", "")),
                figures=[] if text else _figures(result, anchor, title),
                strip=text,
                table=checks_table(result) if "check" in result.value.dims else values_table(result),
                open_table=form == "table" or side_by_side(result),
                checks=list(result.checks),
                lists_checks="check" in result.value.dims,
                settings=settings(result),
            )
        )
    return out


def provenance(results: Mapping[str, Result], without: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """What all results say of model, inputs and versions; where they differ, each value once."""
    out = []
    for key in SHARED:
        if key in ("n_pairs", "n_prompts", "inputs_hash", *without):
            continue
        values = dict.fromkeys(numbers.cell(r.meta[key]) for r in results.values() if r.meta.get(key) is not None)
        if values:
            out.append((NAMES.get(key, key), ", ".join(values)))
    counts = {str(r.meta["n_pairs"]): r for r in results.values() if r.meta.get("n_pairs") is not None}
    if counts:
        most = max(counts.values(), key=lambda r: r.meta["n_pairs"])
        fewer = "; some sections are of fewer, as they say" if len(counts) > 1 else ""
        out.append(("data", _facts_of_data(most) + fewer))
    versions: dict[str, dict[str, None]] = {}
    for result in results.values():
        for name, version in (result.meta.get("versions") or {}).items():
            versions.setdefault(str(name), {})[str(version)] = None
    if versions:
        out.append(("versions", ", ".join(f"{name} {' and '.join(seen)}" for name, seen in versions.items())))
    return out


def _figures(result: Result, anchor: str, title: str) -> list[Figure]:
    return [
        Figure(
            id=f"{anchor}-{i}",
            title=panel.title,
            note=panel.note,
            label=f"{title}: {panel.title}" if panel.title else title,
            spec=panel.chart.to_dict(),
        )
        for i, panel in enumerate(panels(result), start=1)
    ]


def _rewards(results: Mapping[str, Result]) -> dict[tuple[str, str], float]:
    """Rewards by pair and side, from the first result that holds nothing else."""
    for result in results.values():
        value = result.value
        if set(value.dims) == {"pair", "side"} and result.unit == "reward" and {"pair", "side"} <= set(value.coords):
            return _by_name(value)
    return {}


def _own_rewards(result: Result) -> dict[tuple[str, str], float]:
    """Rewards by pair and side that a result carries as a coordinate."""
    coords = result.dataset.coords
    if "reward" not in coords or set(coords["reward"].dims) != {"pair", "side"} or not {"pair", "side"} <= set(coords):
        return {}
    return _by_name(coords["reward"])


def _by_name(value: xr.DataArray) -> dict[tuple[str, str], float]:
    pairs, sides = (text_of(value[dim].values) for dim in ("pair", "side"))
    cells = value.transpose("pair", "side").values
    return {(p, s): float(cells[i, j]) for i, p in enumerate(pairs) for j, s in enumerate(sides)}


def _facts(result: Result) -> str:
    unit = f"unit: {words(result.unit)}" if result.unit and "check" not in result.value.dims else ""
    return " \u00b7 ".join(part for part in (_facts_of_data(result), unit, interval_words(result)) if part)


def interval_words(result: Result) -> str:
    """What the intervals of a result are, in words; empty where it has none to speak of."""
    interval = result.meta.get("interval")
    if result.low is None or not isinstance(interval, Mapping):
        return ""
    if not np.isfinite(result.low).any():
        return f"no intervals {str(interval.get('method', '')).removeprefix('none ')}".strip()
    return f"{100 * interval['level']:g}% intervals over {interval['unit']}s"


def _facts_of_data(result: Result) -> str:
    counts = ((result.meta.get("n_pairs"), "pair"), (result.meta.get("n_prompts"), "prompt"))
    return ", ".join(f"{n:,} {name}{'' if n == 1 else 's'}" for n, name in counts if n is not None)


def settings(result: Result) -> list[tuple[str, str]]:
    """What a result was computed from and with, as names and text."""
    meta = result.meta
    rows = [("method", meta.get("method", result.name)), *(meta.get("settings") or {}).items()]
    rows += [(NAMES.get(key, key), meta[key]) for key in SHARED if meta.get(key) is not None]
    if (meta.get("interval") or {}).get("method"):
        rows.append(("method of the intervals", meta["interval"]["method"]))
    sizes = zip(dims_of(result.value), result.value.shape, strict=True)
    rows.append(("shape", ", ".join(f"{dim} {size}" for dim, size in sizes) or "one number"))
    return [(str(name), numbers.cell(value)) for name, value in rows]


def heading(key: str) -> str:
    words = key.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _anchor(title: str, used: set[str]) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    stem = re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "section"
    anchor, count = stem, 2
    while anchor in used:
        anchor, count = f"{stem}-{count}", count + 1
    used.add(anchor)
    return anchor
