"""Results of one question about parts of the data, as one Result: a sweep that ran in shards, on several devices, or
before and after an interruption.

Values, their coordinates and what was checked are laid one after the other. A summary is computed anew from all values,
by the rule that gave the parts' own: each part's mean and interval must first come out again from its values, but for
the rounding of another machine, and a result for which they do not (a rank correlation, a test over all pairs) is
refused instead of averaged.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.result import Check, Result, load_result

SUMMARY = ("mean", "low", "high")
SIZES = {"pair": "n_pairs", "group": "n_groups", "solution": "n_items"}
COUNTED = ("forward_rows", "backward_rows")
"""Facts of `meta` that add up."""
OF_THE_PART = (*SIZES.values(), *COUNTED, "n_prompts", "noise_floor", "inputs_hash", "interval", "joined", "run")
"""Facts of `meta` that may differ between parts."""
PADDED = ("position", "span", "response", "step")
"""Dims that are as long as the longest text or list needs."""
RAN_APART = "What a part draws from the rest of its pairs (a reference set, random draws) it drew from its own."


@checked_arguments
def join_results(parts: Iterable[Result | str | Path], inputs: Iterable | None = None) -> Result:
    """One Result from those of one method, asked in the same way of different pairs (groups, solutions) of one model.

    Parameters
    ----------
    parts: Results, or files of saved ones, in the order in which their pairs shall stand. Two or more.
    inputs: all pairs (groups, solutions) in that order, if at hand: each part is held against its share of them, and
        the result then says which inputs it is of, so that `accuracy(scores=)` and the like take it.

    Returns the Result that one run over all pairs gives, where nothing that a method does to a pair depends on the
    others: values and coordinates in order, positions padded to the longest, mean and interval over all prompts (pairs
    of one prompt in several parts are resampled together). Identities keep their largest gap; recorded facts are listed
    part by part. `meta`: "joined" has the number and the hash of every part's inputs; settings, seed, versions and
    device are the same. What was joined can be joined on.

    Raises `DataError` for parts of another model, method or setting, for a pair twice, and for results that are of all
    of their pairs at once or tell a figure that is (a test, a share with its interval, a fit), which no joining gives.
    What a method draws from the rest of its pairs (reference sets, draws by place) it drew within each part.
    """
    alone = isinstance(parts, Result | str | Path)
    results = [part if isinstance(part, Result) else load_result(part) for part in ([parts] if alone else parts)]
    if len(results) < 2:
        _refuse("There is nothing to join", f"{len(results)} results", "two or more, of parts of the data",
                "pass the Results of all parts, or their files")  # fmt: skip
    along = _along(results)
    meta = _meta(results, along, inputs)
    variables = [{**r.value.coords, "value": r.value} for r in results]
    names = list(variables[0])
    for i, other in enumerate(variables[1:], 2):
        if odd := set(other) ^ set(names):
            _differ(i, f"coordinates {', '.join(sorted(map(str, odd)))} in one of them alone")
    widths = _widths(results)
    laid = {name: _laid_out(str(name), [some[name] for some in variables], along, widths) for name in names}
    value = laid.pop("value")
    value = xr.DataArray(value[1], dims=value[0], coords=laid)
    label, times = Counter(value[along].values).most_common(1)[0]
    if times > 1:
        _refuse(f"A {along} is in two parts", str(label), "every one once", "leave it out of one of them, or give it "
                "another id if it is another one: the parts of one rl.Pairs keep the ids of the whole")  # fmt: skip
    meta |= {SIZES[along]: value.sizes[along], "n_prompts": len(set(value["prompt_id"].values))}
    if "cannot_show" in meta:
        meta["cannot_show"] += f" {RAN_APART}"
    summary: dict[str, xr.DataArray] = {}
    if results[0].mean is not None:
        for i, result in enumerate(results, 1):
            _require_own_summary(result, i)
        over = _over_prompts(value, results[0].meta)
        meta["interval"] = {**results[0].meta.get("interval", {}), "method": over.method}
        rest = value.isel({along: 0}).drop_vars([n for n, c in value.coords.items() if along in c.dims])
        summary = {key: rest.copy(data=np.asarray(getattr(over, key))) for key in SUMMARY}
    checks, reason = _checks(results)
    if reason is None and any(width > 1 for width in map(len, map(set, widths.values()))):
        reason = "padding: the parts are of different lengths"
    return Result(results[0].name, value, unit=results[0].unit, checks=checks, meta=meta, undefined=reason, **summary)


def _along(results: Sequence[Result]) -> str:
    """The dim of the data, which all parts have first."""
    first = results[0]
    along = str(first.value.dims[0]) if first.value.dims else ""
    own = {"value", *SUMMARY, *first.value.coords}
    if along not in SIZES or "prompt_id" not in first.value.coords or set(first.dataset.variables) - own:
        _refuse("This result is no column of values by pair, so parts of it cannot be joined",
                f"{first.name} ({', '.join(map(str, first.value.dims))})", "a dim `pair`, `group` or `solution`, first",
                "ask it of all the data in one run")  # fmt: skip
    for i, other in enumerate(results[1:], 2):
        ours, theirs = ((r.name, r.unit, r.value.dims, r.mean is None) for r in (first, other))
        if ours != theirs:
            _differ(i, f"{other.name} [{other.unit}] ({', '.join(map(str, other.value.dims))})")
    return along


def _meta(results: Sequence[Result], along: str, inputs: Iterable | None) -> dict[str, Any]:
    metas = [
        {k: v.removesuffix(f" {RAN_APART}") if k == "cannot_show" else v for k, v in r.meta.items()} for r in results
    ]
    for key in sorted({*metas[0]} - {*OF_THE_PART}):
        if _estimates(metas[0][key]):  # refused even if equal in all parts: the interval would be one part's
            _refuse(f"A figure of {results[0].name} cannot be joined", f"{key}, of all of its pairs at once",
                    "values by pair and their mean alone", "ask it of all the data in one run")  # fmt: skip
    told = [dict(_flat({key: fact for key, fact in m.items() if key not in OF_THE_PART})) for m in metas]
    for i, other in enumerate(told[1:], 2):
        for key in sorted({*told[0], *other} - {"settings, most_steps"}):
            ours, theirs = told[0].get(key), other.get(key)
            if ours != theirs:
                _differ(i, f"{key} {json.dumps(theirs)[:200]} for {json.dumps(ours)[:200]}")
    meta = {key: value for key, value in metas[0].items() if key not in OF_THE_PART}
    meta |= {key: sum(m[key] for m in metas) for key in COUNTED if all(key in m for m in metas)}
    if floors := [m["noise_floor"] for m in metas if "noise_floor" in m]:  # measured at every loading
        meta["noise_floor"] = max(floors)
    if most := [m["settings"]["most_steps"] for m in metas if "most_steps" in m.get("settings", {})]:
        meta["settings"] = {**meta["settings"], "most_steps": max(most)}
    meta["joined"] = []
    for m, r in zip(metas, results, strict=True):
        share = {SIZES[along]: r.value.sizes[along], "inputs_hash": m.get("inputs_hash")}
        meta["joined"] += m.get("joined", [share])  # a part may have been joined itself
    if inputs is not None:
        items = list(data.as_pairs(inputs) if along == "pair" else inputs)
        ends = np.cumsum([0, *(share[SIZES[along]] for share in meta["joined"])])
        own = [data.inputs_hash(items[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        hashes = [share["inputs_hash"] for share in meta["joined"]]
        wrong = [str(i) for i, (a, b) in enumerate(zip(own, hashes, strict=True), 1) if a != b]
        if wrong or len(items) != ends[-1]:
            _refuse("The inputs are not those of the parts", f"{len(items)} for {ends[-1]} in the parts; other texts "
                    f"in part {', '.join(wrong) or 'none'}", "the inputs of all parts, in the parts' order",
                    "pass them so, or leave inputs= out")  # fmt: skip
        meta["inputs_hash"] = data.inputs_hash(items)
    return meta


def _flat(facts: dict[str, Any], of: str = "") -> Iterator[tuple[str, Any]]:
    """Facts of `meta` with the path of each."""
    for key, fact in facts.items():
        if isinstance(fact, dict):
            yield from _flat(fact, f"{of}{key}, ")
        else:
            yield f"{of}{key}", fact


def _estimates(fact: Any) -> bool:
    """Whether a fact of `meta` is an estimate with its interval, or has one in it."""
    return isinstance(fact, dict) and ("low" in fact or any(map(_estimates, fact.values())))


def _widths(results: Sequence[Result]) -> dict[str, list[int]]:
    """The sizes in every part of the dims that may differ."""
    out = {}
    for dim in PADDED:
        columns = [r.value[dim].values for r in results if dim in r.value.dims]
        if columns and all(np.array_equal(c, np.arange(len(c))) for c in columns):
            out[dim] = [len(c) for c in columns]
            for i, r in enumerate(results, 1):
                inside = r.value.coords.get(f"n_{dim}s")
                if len(set(out[dim])) > 1 and inside is not None and (inside > r.value.sizes[dim]).any():
                    _differ(i, f"the first {r.value.sizes[dim]} of dim {dim} alone")
    return out


def _laid_out(name: str, arrays: Sequence[xr.DataArray], along: str, widths: dict[str, list[int]]):
    """(dims, values) of one variable of all parts: one after the other, or the same in all."""
    dims = tuple(map(str, arrays[0].dims))
    padded = []
    for i, array in enumerate(arrays):
        if tuple(map(str, array.dims)) != dims:
            _differ(i + 1, f"{name} along {', '.join(map(str, array.dims))}")
        values = array.values
        pad = [(0, max(widths[d]) - size if d in widths else 0) for d, size in zip(dims, values.shape, strict=True)]
        whole: Any = 0 if name.startswith("n_") else -1  # as the methods pad
        fill: Any = math.nan if values.dtype.kind == "f" else "" if values.dtype.kind in "OUT" else whole
        padded.append(np.pad(values, pad, constant_values=fill) if pad else values)
    if along in dims:
        sizes = [tuple(n for d, n in zip(dims, p.shape, strict=True) if d != along) for p in padded]
        if len(set(sizes)) > 1:
            _differ(1 + next(i for i, s in enumerate(sizes) if s != sizes[0]), f"{name} of another size")
        return dims, np.concatenate(padded, axis=dims.index(along))
    if name in widths:
        return dims, np.arange(max(widths[name]))
    for i, values in enumerate(padded[1:], 2):
        if not _equal(padded[0], values):
            _differ(i, f"another {name}, which is of all of its pairs or another choice of what to show")
    return dims, padded[0]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f"))


def _over_prompts(value: xr.DataArray, meta: dict[str, Any]) -> stats.Interval:
    limits = tuple(meta.get("interval", {}).get("limits", (-math.inf, math.inf)))
    return stats.mean_interval(value.values, value["prompt_id"].values, seed=meta.get("seed", 0), limits=limits)


def _require_own_summary(result: Result, part: int) -> None:
    over = _over_prompts(result.value, result.meta)
    rounding = 1e-9 * float(np.abs(result.value).max())  # sums of some columns are added in another order than of all
    for key in SUMMARY:
        ours, own = np.asarray(getattr(over, key)), result.dataset[key].values
        if ours.shape != own.shape or not np.allclose(ours, own, rtol=0, atol=rounding, equal_nan=True):
            _refuse(
                f"The summary of {result.name} cannot be joined",
                f"in part {part} another {key} than the mean over pairs has",
                "a mean over pairs with its interval over prompts", "ask it of all the data in one run",
            )  # fmt: skip


def _checks(results: Sequence[Result]) -> tuple[list[Check], str | None]:
    """Identities by their largest gap, facts part by part; and the reasons for undefined cells, which are counted
    anew."""
    worst: dict[str, Check] = {}
    facts, reasons = [], []
    for i, result in enumerate(results, 1):
        for check in result.checks:
            if check.name == "undefined cells":
                reasons.append(check.note)
            elif math.isinf(check.tolerance):
                note = f"part {i}" + (f": {check.note}" if check.note else "")
                facts.append(Check(check.name, check.gap, check.tolerance, note))
            elif check.name not in worst or check.gap > worst[check.name].gap:
                worst[check.name] = check
    return [*worst.values(), *facts], "; ".join(dict.fromkeys(reasons)) or None


def _differ(part: int, found: str) -> NoReturn:
    _refuse(
        "The results are not parts of one", f"in part {part}, other than in the first: {found}",
        "one method, model and settings in all parts, of different data", "ask all parts in the same way",
    )  # fmt: skip


def _refuse(what: str, found: str, expected: str, do: str) -> NoReturn:
    raise DataError(what, found=found, expected=expected, do=do)
