"""Do the items on which a reward model leans one way also lean another? Correlation of bias margins over items.

    rho       Spearman of margin_a and margin_b over items: Pearson of their ranks
    given     the same of what is left of the ranks after a least squares fit on the ranks of length
    interval  tanh(atanh(rho) +- z sqrt((1 + rho^2 / 2) / (n - k - 3))), k lengths held fixed
    p         one dimension's ranks are dealt out to other items (what is left of them, where length is held fixed, and
              what length explains of that taken out again); share of deals with |rho| at least as large

All items carry all dimensions: a correlation over items that only some dimensions have would compare items, not
dimensions. p is adjusted over all pairs of dimensions (Benjamini and Hochberg).

What this cannot show: a common cause. Items differ in length, topic and wording, and anything about an item that moves
all its margins makes dimensions go together. The effect of a direction on other dimensions is an intervention's answer.

Reference: Bonett and Wright 2000 (interval); Kennedy 1995 (permuting what is left).
"""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from reward_lens import stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.result import Result

FEWEST_ITEMS, ENOUGH_ITEMS = 30, 100  # to print a correlation, and to classify one
SHOWN = 5
LABELS = ("together", "opposed", "unrelated", "undetermined")


@checked_arguments
def susceptibility_correlation(
    margins: pd.DataFrame | Result,
    length: str | None = None,
    alpha: float = 0.05,
    negligible: float = 0.2,
    n_permutations: int = 4999,
    seed: int = 0,
) -> Result:
    """Rank correlation over items of the margins of every two dimensions.

    Parameters
    ----------
    margins: a table with the columns item, dimension, margin, a row a cell; or a Result with the dims item and
        dimension, whose value is the margin. One item is one topic: items count as independent.
    length: the column (or the Result's coordinate) with the length of each cell, or of its item, to hold fixed: that of
        both dimensions. None: nothing is held fixed.
    negligible: |rho| that counts as none.

    Returns value (between,), Spearman's rho, with low and high at 1 - `alpha`; `between` is "a ~ b", coordinates
    `first`, `second`, `p`, `p_bh`, `alone` (rho with nothing held fixed) and `label`: "together" or "opposed" where
    p_bh <= alpha and the interval is above or below 0; "unrelated" where it lies inside +-`negligible`; else, and under
    100 items, "undetermined". NaN where a margin is constant or goes exactly with length.

    Raises `DataError` for fewer than 30 items or two dimensions, for a cell that is missing or there twice, and for
    missing columns. Source: our extension of arXiv 2604.26130, which correlates over two items.
    """
    if not 0 < alpha < 1 or not 0 < negligible < 1 or n_permutations < 99:
        raise DataError("A setting of the correlation is out of range",
                        found=f"{alpha=}, {negligible=}, {n_permutations=}",
                        expected="alpha and negligible between 0 and 1, at least 99 permutations",
                        do="pass such values")  # fmt: skip
    names, values, lengths = _crossed(_frame(margins, length), length)
    n = len(values)
    deals = _deals(n, n_permutations, seed)
    rows = []
    for a, b in itertools.combinations(range(len(names)), 2):
        held = np.zeros((n, 0)) if lengths is None else lengths[:, [a, b]]
        rows.append(_correlation(values[:, a], values[:, b], held, deals, alpha))
    p_bh = stats.adjust([row.p for row in rows], "bh")
    pairs = list(itertools.combinations(names, 2))
    alone = [stats.spearman(values[:, a], values[:, b]).value for a, b in itertools.combinations(range(len(names)), 2)]
    labels = [_label(row, p, n, alpha, negligible) for row, p in zip(rows, p_bh.tolist(), strict=True)]
    of_pair: dict[str, Any] = {
        "first": np.array([a for a, _ in pairs], dtype=object), "second": np.array([b for _, b in pairs], dtype=object),
        "p": np.array([row.p for row in rows]), "p_bh": p_bh, "alone": np.array(alone),
        "label": np.array(labels, dtype=object),
    }  # fmt: skip
    coords = {"between": np.array([f"{a} ~ {b}" for a, b in pairs], dtype=object)}
    coords |= {name: ("between", column) for name, column in of_pair.items()}
    value, low, high = (
        xr.DataArray(np.array([getattr(row, key) for row in rows]), dims=("between",), coords=coords)
        for key in ("value", "low", "high")
    )
    meta = {
        "method": "susceptibility_correlation", "title": "Which susceptibilities go together", "seed": seed,
        "n_items": n,
        "settings": {"length": length, "alpha": alpha, "negligible": negligible, "n_permutations": n_permutations},
        "interval": {"level": 1 - alpha, "unit": "item", "method": "Fisher, Bonett and Wright"},
        "needed": {"items_for_a_correlation": FEWEST_ITEMS, "items_for_a_label": ENOUGH_ITEMS,
                   "items_for_unrelated": _items_for(negligible, alpha)},
        "shows": "Whether items on which the model leans along one dimension are the ones on which it leans along "
        "another" + (f", {length} held fixed." if length else "."),
        "cannot_show": "A common cause: whatever about an item moves all its margins makes dimensions go together.",
    }  # fmt: skip
    reason = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason)) or None
    return Result("susceptibility_correlation", value, unit="spearman", low=low, high=high, meta=meta, undefined=reason)


def _frame(margins: pd.DataFrame | Result, length: str | None) -> pd.DataFrame:
    """The columns item, dimension, margin and length, if one is to be held fixed."""
    table = margins.to_frame().rename(columns={"value": "margin"}) if isinstance(margins, Result) else margins
    wanted = ["item", "dimension", "margin", *([length] if length else [])]
    if len(set(wanted)) < len(wanted):
        raise DataError("Length cannot be held fixed", found=f"length={length!r}", expected="a column of lengths",
                        do="name another column, or pass length=None")  # fmt: skip
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise DataError("The table of margins lacks columns", found=f"no {', '.join(missing)}; it has "
                        f"{', '.join(map(str, table.columns))}", expected=", ".join(wanted),
                        do="rename the columns, or the dims of the Result")  # fmt: skip
    numbers = table[wanted[2:]].apply(pd.to_numeric, errors="coerce")
    bad = np.atleast_1d(~np.isfinite(numbers.to_numpy(dtype=float)).all(axis=1))
    if bad.any():
        cells = [f"{i} / {d}" for i, d, b in zip(table["item"], table["dimension"], bad, strict=True) if b]
        raise DataError("Some cells have no number", found=_some(cells), expected="finite margins and lengths",
                        do="leave the items of these cells out, in all dimensions")  # fmt: skip
    return pd.DataFrame({"item": table["item"], "dimension": table["dimension"], **numbers})


def _crossed(table: pd.DataFrame, length: str | None) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Names of dimensions, margins [item, dimension] and lengths of the same shape."""
    twice = table.duplicated(["item", "dimension"])
    if twice.any():
        cells = [f"{i} / {d}" for i, d in zip(table["item"][twice], table["dimension"][twice], strict=True)]
        raise DataError("Some cells are there twice", found=_some(cells), expected="one margin an item and dimension",
                        do="average repeats of an item first: it counts once")  # fmt: skip
    items, names = list(dict.fromkeys(table["item"])), list(dict.fromkeys(table["dimension"]))
    there = set(zip(table["item"], table["dimension"], strict=True))
    gaps = [f"{i} / {d}" for i in items for d in names if (i, d) not in there]
    if gaps:
        raise DataError("Items and dimensions are not fully crossed", found=f"{len(gaps)} missing cells: {_some(gaps)}",
                        expected=f"each of {len(items)} items in each of {len(names)} dimensions",
                        do="measure the missing cells, or leave their items out")  # fmt: skip
    if len(items) < FEWEST_ITEMS or len(names) < 2:
        raise DataError("There is too little to correlate", found=f"{len(items)} items, {len(names)} dimensions",
                        expected=f"at least {FEWEST_ITEMS} items and 2 dimensions ({ENOUGH_ITEMS} items for a label)",
                        do="measure more items; the interval of rho = 0 over 30 is +-.37")  # fmt: skip
    indexed = table.set_index(["item", "dimension"])
    order = pd.MultiIndex.from_product([items, names])
    square = {name: indexed[name].reindex(order).to_numpy(dtype=float).reshape(len(items), -1) for name in indexed}
    return [str(name) for name in names], square["margin"], square[length] if length else None


def _deals(n: int, n_permutations: int, seed: int) -> np.ndarray:
    """Orders [deal, item], the same for every pair of dimensions."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)


def _correlation(x: np.ndarray, y: np.ndarray, held: np.ndarray, deals: np.ndarray, alpha: float) -> stats.Estimate:
    """Partial Spearman of `x` and `y` [item] given `held` [item, k], its interval and its permutation p."""
    from scipy.stats import rankdata

    n = len(x)
    ranks_x, ranks_y = rankdata(x), rankdata(y)
    basis = _basis(rankdata(held, axis=0))
    k = basis.shape[1] - 1
    rest_x, rest_y = (_without(ranks - ranks.mean(), basis) for ranks in (ranks_x, ranks_y))
    spread = np.linalg.norm(rest_x), np.linalg.norm(rest_y)
    if min(spread) <= 1e-6 * n or n - k < 4:
        reason = "a margin is constant, or goes exactly with what is held fixed"
        return stats.Estimate(np.nan, np.nan, np.nan, np.nan, n, n, reason)
    rho = float(rest_x @ rest_y / (spread[0] * spread[1]))
    dealt = _without(rest_y[deals], basis)
    nulls = dealt @ rest_x / (spread[0] * np.linalg.norm(dealt, axis=1))
    p = (1 + int((np.abs(nulls) >= abs(rho) - 1e-12).sum())) / (len(deals) + 1)
    if abs(rho) > 1 - 1e-12:
        return stats.Estimate(rho, np.nan, np.nan, p, n, n, "a perfect correlation has no Fisher interval")
    if k == 0:
        found = stats.spearman(x, y, 1 - alpha)
        return stats.Estimate(found.value, found.low, found.high, p, n, n)
    half = _quantile(alpha) * np.sqrt((1 + rho**2 / 2) / (n - k - 3))
    low, high = np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half]).tolist()
    return stats.Estimate(rho, low, high, p, n, n)


def _basis(held: np.ndarray) -> np.ndarray:
    """Orthonormal columns for a constant and `held`, one that repeats another (or is constant) once."""
    design = np.column_stack([np.full(len(held), 1 / np.sqrt(len(held))), held - held.mean(0)])
    left, size, _ = np.linalg.svd(design / np.maximum(np.linalg.norm(design, axis=0), 1e-12), full_matrices=False)
    return left[:, size > 1e-8]


def _without(values: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """`values` [..., item] less their projection on the columns of `basis` [item, k]."""
    return values - (values @ basis) @ basis.T


def _label(row: stats.Estimate, p: float, n: int, alpha: float, negligible: float) -> str:
    if n < ENOUGH_ITEMS or np.isnan(row.low):
        return "undetermined"
    if p <= alpha and (row.low > 0 or row.high < 0):
        return "together" if row.low > 0 else "opposed"
    return "unrelated" if -negligible < row.low and row.high < negligible else "undetermined"


def _quantile(alpha: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha / 2))


def _items_for(negligible: float, alpha: float) -> int:
    """Items at which the interval of an observed rho of 0 lies inside +-`negligible`."""
    return int(np.ceil(3 + (_quantile(alpha) / np.arctanh(negligible)) ** 2))


def _some(cells: list[str]) -> str:
    return ", ".join(cells[:SHOWN]) + (f", ... ({len(cells)} in all)" if len(cells) > SHOWN else "")
