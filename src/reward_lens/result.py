"""The one result type: labelled values, their intervals, the checks they passed and where they came from.

A `Result` wraps one `xarray.Dataset` with the variable `value` (per pair, never only a mean) and, where a
summary over pairs exists, `mean`, `low` and `high` (which lack the `pair` dim). A check out of tolerance raises
`CheckFailed` when the result is built, so a `Result` that exists is one whose identities hold.
"""

import dataclasses
import json
import math
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from reward_lens.arguments import checked_arguments
from reward_lens.errors import CheckFailed, DataError

FORMAT = "reward-lens result 1"
MISSING = "\\N"
SHOWN: dict[str, Any] = {"float_format": lambda x: f"{x:.4g}", "max_rows": 14, "max_cols": 14}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Check:
    """A number with a tolerance that can fail.

    `gap` is already divided by the scale the identity names; a NaN gap fails. `tolerance=inf` marks a recorded
    fact (such as how many cells are undefined, and why) rather than an identity.
    """

    name: str
    gap: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.gap <= self.tolerance)

    def __str__(self) -> str:
        if math.isinf(self.tolerance):
            return f"{self.name}: {self.gap:g}" + (f" ({self.note})" if self.note else "")
        return f"{self.name} gap {self.gap:.1e} (tolerance {self.tolerance:.0e})"


class Result:
    """Labelled values of one question asked of a reward model.

    Parameters
    ----------
    name: the method's name, e.g. ``"contributions"``.
    value: the values, with named dims and coordinates (`pair`, `side`, `component`, `depth`, `position`, ...).
    unit: ``"reward"``, ``"reward_sd"``, ``"fraction"``, ``"cosine"``, ``"accuracy"``, ...
    checks: the identities that hold for these values; one out of tolerance raises `CheckFailed`.
    meta: provenance and settings, JSON-able; ``shows`` and ``cannot_show`` are the two sentences of the report.
    mean, low, high: summary over pairs and its interval, each without the `pair` dim; other labels than those of
        `value` raise `ValueError`.
    undefined: the reason for NaN cells. NaN without a reason raises; padding past `n_positions` needs none.
    """

    def __init__(
        self,
        name: str,
        value: xr.DataArray,
        *,
        unit: str,
        checks: Iterable[Check] = (),
        meta: Mapping[str, Any] | None = None,
        mean: xr.DataArray | None = None,
        low: xr.DataArray | None = None,
        high: xr.DataArray | None = None,
        undefined: str | None = None,
    ):
        variables = {"value": value, "mean": mean, "low": low, "high": high}
        given = {k: v for k, v in variables.items() if v is not None}
        xr.align(*given.values(), join="exact", copy=False)  # a Dataset would join other labels and fill up with NaN
        self.dataset = xr.Dataset(given)
        self.name = name
        self.unit = unit
        self.meta = json.loads(json.dumps(dict(meta or {}), default=_plain))
        self.checks = (*checks, *_undefined_cells(self.dataset["value"], undefined))
        for check in self.checks:
            if not check.passed:
                raise CheckFailed(
                    f"The check '{check.name}' of the result '{name}' failed",
                    found=f"a gap of {check.gap:.3g}" + (f" ({check.note})" if check.note else ""),
                    expected=f"at most {check.tolerance:.3g}",
                    do="do not use these numbers. Run in float32 if the model is in 16 bits; if it already is, this "
                    "model does something the library does not describe: please report its class and this message",
                )

    @property
    def value(self) -> xr.DataArray:
        """Per-pair values."""
        return self.dataset["value"]

    @property
    def mean(self) -> xr.DataArray | None:
        """Mean over pairs, where the method gives one."""
        return self.dataset.get("mean")

    @property
    def low(self) -> xr.DataArray | None:
        """Lower end of the interval of `mean`."""
        return self.dataset.get("low")

    @property
    def high(self) -> xr.DataArray | None:
        """Upper end of the interval of `mean`."""
        return self.dataset.get("high")

    def sel(self, **labels) -> "Result":
        """Select by coordinate labels, as `xarray.Dataset.sel` does; checks and provenance stay. The summary is of all
        pairs, so a selection of pairs leaves it out; coordinates such as `p` or `net_low` stay those of all pairs."""
        chosen = self.dataset.sel(labels)
        if self.mean is not None and not labels.keys() <= set(self.mean.dims):
            chosen = chosen.drop_vars(["mean", "low", "high"], errors="ignore")
        return self._with(chosen)

    def summary(self) -> xr.DataArray:
        """Values averaged over pairs (the stored `mean` where there is one)."""
        if "mean" in self.dataset:
            return self.dataset["mean"]
        return self.value.mean("pair", skipna=True) if "pair" in self.value.dims else self.value

    @checked_arguments
    def top(self, n: int = 10) -> pd.DataFrame:
        """The `n` cells largest in absolute value of the summary over pairs (margin, where there are sides).

        Each interval is its cell's own and knows nothing of the picking: the largest of many look larger than they are.

        Of tokens without a stored mean: single cells of chosen and rejected, each with its `piece`, as the tokens that
        stand at one position in different texts have nothing in common.
        """
        if self._own_tokens:
            return self._top_tokens(n)
        summary = self.dataset.assign(value=self.summary())
        if "side" in summary["value"].dims and "margin" in summary["side"].values:
            summary = summary.sel(side="margin")
        names = [v for v in ("value", "low", "high") if v in summary]
        if not summary["value"].dims:
            return pd.DataFrame({v: [summary[v].item()] for v in names})
        frame = summary[names].to_dataframe().reset_index()
        keep = [*summary["value"].dims, *names]
        frame = pd.DataFrame(frame[keep])
        frame = frame[frame["value"].notna()]
        order = np.argsort(-np.abs(np.asarray(frame["value"])), kind="stable")
        return frame.iloc[order[: max(n, 0)]].reset_index(drop=True)

    @property
    def _own_tokens(self) -> bool:
        coords = self.dataset.coords
        return "mean" not in self.dataset and "piece" in coords and "position" in coords["piece"].dims

    def _top_tokens(self, n: int) -> pd.DataFrame:
        flat = self.to_frame()
        flat = flat[flat["value"].notna()]
        if "side" in flat:
            flat = flat[flat["side"] != "margin"]  # two tokens, of which `piece` could name one
        flat = flat.sort_values("value", key=lambda v: -v.abs(), kind="stable")
        return flat[[*self.value.dims, "piece", "value"]].head(max(n, 0)).reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """All values in long form: one row a cell, one column a coordinate; with `low` and `high` where they are those
        of the values themselves and not of a mean over pairs."""
        value = self.value
        frame = value.to_dataframe("value").reset_index() if value.dims else pd.DataFrame({"value": [value.item()]})
        for end in ("low", "high"):
            if end in self.dataset and self.dataset[end].dims == value.dims:
                frame[end] = self.dataset[end].values.ravel()
        return frame

    def plot(self):
        """An Altair chart chosen by the result's dims. A notebook without a network shows it after
        `altair.renderers.enable("svg")`: the interactive form fetches its scripts."""
        from reward_lens.charts import chart

        return chart(self)

    def save(self, path: str | Path) -> Path:
        """Write values, checks and provenance to one netCDF file; `load_result` reads it back equal."""
        path = Path(path)
        head = {"format": FORMAT, "name": self.name, "unit": self.unit, "meta": self.meta}
        head["checks"] = [dataclasses.asdict(check) for check in self.checks]
        plain = self.dataset.drop_attrs(deep=True).map(lambda v: v)
        for key in plain.variables:
            if plain[key].dtype.kind in "OUT":
                plain = plain.assign_coords({key: (plain[key].dims, _map_text(plain[key].values, _escape))})
            elif plain[key].dtype.kind == "b":
                raise TypeError(f"coordinate {key!r} is boolean, which netCDF cannot hold; store it as an integer")
        plain.attrs = {"reward_lens": _escape(json.dumps(head))}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a name of its own: another process may be saving to the same place. A reader never sees half a file.
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            plain.to_netcdf(partial, engine="h5netcdf")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _with(self, dataset: xr.Dataset) -> "Result":
        other = object.__new__(Result)
        other.dataset, other.name, other.unit = dataset, self.name, self.unit
        other.checks, other.meta = self.checks, self.meta
        return other

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k} {v}" for k, v in self.value.sizes.items())
        title = f"{self.name} [{self.unit}]" + (f"  ({sizes})" if sizes else "") + self._of_which()
        body = self._table().to_string(**SHOWN)
        return "\n".join([title, body, *(str(check) for check in self.checks)])

    def _repr_html_(self) -> str:
        from html import escape

        table = self._table().to_html(**SHOWN, escape=True, border=0)
        checks = "".join(f"<li>{escape(str(c))}</li>" for c in self.checks)
        title = f"<b>{escape(self.name)}</b> [{escape(self.unit)}]{escape(self._of_which())}"
        return f"<p>{title}</p>{table}<ul>{checks}</ul>"

    def _of_which_pair(self) -> str:
        """Tokens are shown of one pair: a mean over different tokens says nothing."""
        first = self._own_tokens and "pair" in self.value.dims
        return f", the first pair ({self.value['pair'].values[0]})" if first else ""

    def _of_which(self) -> str:
        """What the table is of, where it is of a part: the first pair, the margin, the first label of a further dim."""
        _, *others = self._table_dims()
        margin, sided = self._by_margin(), "side" in self.value.dims
        labels = self._with(self.dataset.isel(pair=0)).value.coords if self._of_which_pair() else self.value.coords
        cut = [d for d in (others if sided and not margin else others[1:]) if d in labels]
        return self._of_which_pair() + ", the margin" * margin + "".join(f", {d} {labels[d].values[0]}" for d in cut)

    def _table_dims(self) -> list[str]:
        """The dims of the summary beside the sides; one number has a nameless one."""
        dims = self.dataset["mean"].dims if "mean" in self.dataset else self.value.dims
        return [str(d) for d in dims if d not in ("pair", "side")] or [""]

    def _by_margin(self) -> bool:
        """Whether two dims beside the sides make a table of the margin: of all sides it would show one label alone."""
        _, *others = self._table_dims()
        sided = "side" in self.value.dims and "margin" in self.value["side"].values
        return sided and bool(others) and self.value.sizes[others[0]] <= 12

    def _table(self) -> pd.DataFrame:
        """Rows: the first dim beside pair and side. Columns: the second or the sides, or value with its interval."""
        if self._of_which_pair():
            return self._with(self.dataset.isel(pair=0))._table()
        if self._by_margin():
            return self._with(self.dataset.sel(side="margin", drop=True))._table()
        wide = "mean" in self.dataset or len([d for d in self.value.dims if d != "side"]) > 1
        data = self.dataset.assign(value=self.summary()) if wide else self.dataset
        dims = [d for d in data["value"].dims if d != "side"]
        sided = "side" in data["value"].dims
        for extra in dims[1:] if sided else dims[2:]:
            data = data.isel({extra: slice(0, 1)})  # the title gives the sizes; the whole stands in `value`
        across = "side" if sided else dims[1] if len(dims) > 1 else None
        if across is not None and dims:
            table: Any = data["value"].to_dataframe()["value"].unstack(across)
            return table[list(data[across].values)].reindex(data[dims[0]].values, level=0)
        names = [v for v in ("value", "low", "high") if v in data and data[v].dims == data["value"].dims]
        if not data["value"].dims:
            return pd.DataFrame({v: [data[v].item()] for v in names})
        frame: Any = data[names].to_dataframe()
        return frame[names]


@checked_arguments
def load_result(path: str | Path) -> Result:
    """Read a result written by `Result.save`.

    Returns a `Result` with equal values, coordinates, checks and provenance. Raises `DataError` for any other file.
    """
    path = Path(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf") as opened:
            dataset = opened.load()
        head = json.loads(str(_unescape(dataset.attrs["reward_lens"])))
        if head["format"] != FORMAT:
            raise ValueError(f"the format {head['format']!r}, where this version reads {FORMAT!r}")
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"The file {path} could not be read as a result",
            found=f"{type(error).__name__}: {error}",
            expected="a netCDF file written by Result.save",
            do="check the path; the file may be cut short or come from another program",
        ) from error
    result = object.__new__(Result)
    dataset.attrs = {}
    for key in list(dataset.variables):
        if dataset[key].dtype.kind in "OUT":
            dataset = dataset.assign_coords({key: (dataset[key].dims, _map_text(dataset[key].values, _unescape))})
        dataset[key].encoding = {}
    result.dataset, result.name, result.unit = dataset, head["name"], head["unit"]
    result.meta = head["meta"]
    result.checks = tuple(Check(**check) for check in head["checks"])
    return result


def _plain(value: Any) -> Any:
    """A setting in Python's types, where a caller gave a number of numpy's, an array, a tensor or a column."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"meta holds an object of type {type(value).__name__}, which JSON has no form for")
    return value.tolist()


def _undefined_cells(value: xr.DataArray, reason: str | None) -> tuple[Check, ...]:
    if value.dtype.kind != "f":
        return ()
    missing = ~np.isfinite(value)
    if "position" in value.dims and "n_positions" in value.coords:
        inside = xr.DataArray(np.arange(value.sizes["position"]), dims="position") < value["n_positions"]
        missing = missing & inside
    count = int(missing.sum())
    if count and reason is None:
        raise CheckFailed(
            "A result has cells without a value and without a reason",
            found=f"{count} NaN or infinite cells of {value.size}",
            expected="finite values, or the reason why a cell is undefined",
            do="look for NaN or inf in the model's weights or activations; rl.load reports them",
        )
    return (Check("undefined cells", float(count), math.inf, reason or ""),) if count else ()


def _map_text(values: np.ndarray, change) -> np.ndarray:
    out = np.empty(values.shape, dtype=object)
    for index, text in np.ndenumerate(values):
        out[index] = change(text)
    # pandas makes Arrow strings of an object array, which hold no lone surrogates; fixed-width text does.
    return out.astype(str) if any(isinstance(text, str) and _SURROGATE.search(text) for text in out.flat) else out


def _escape(text: str | float) -> str:
    """netCDF strings hold neither NUL nor lone surrogates; both are written as backslash escapes, a NaN (which xarray
    puts where a text is missing) as another."""
    if text != text:
        return MISSING
    text = str(text).replace("\\", "\\\\").replace("\0", "\\u0000")
    return _SURROGATE.sub(lambda lone: f"\\u{ord(lone[0]):04x}", text)


def _unescape(text: str) -> str | float:
    if text == MISSING:
        return math.nan
    parts = str(text).split("\\\\")
    for i, part in enumerate(parts):
        head, *rest = part.split("\\u")
        parts[i] = head + "".join(chr(int(r[:4], 16)) + r[4:] for r in rest)
    return "\\".join(parts)
