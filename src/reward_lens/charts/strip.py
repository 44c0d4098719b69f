"""Token strips: text in which every token carries a value. The blocks here feed the chart and the report."""

import dataclasses
import math
import unicodedata

import altair as alt
import numpy as np

from reward_lens.charts.rows import Drawing, dims_of, rows, shade, text_of
from reward_lens.result import Result

COLUMNS, BLOCKS = 92, 6  # of the chart form: characters a row, texts shown
CHARACTER, ROW = 7.3, 21  # pixels of one monospaced character and of one row
CLIP = 0.99  # the colour scale ends at this quantile of the absolute values; the legend says so where it matters


@dataclasses.dataclass(frozen=True)
class Block:
    """One text: its pair and side (empty where there is no such dim), and one entry a token in each tuple."""

    pair: str
    side: str
    pieces: tuple[str, ...]
    roles: tuple[str, ...]
    values: tuple[float, ...]
    depth: str = ""


def blocks(result: Result) -> list[Block]:
    """The texts of a result with `position` and `piece`, in order of pair and side.

    Positions past `n_positions` are padding and are left out, and so is a side without any token (a margin
    exists only where two texts are aligned). Of a further dim, such as depth, the last label is taken.
    """
    data = result.dataset[["value"]]
    extra = [d for d in dims_of(data["value"]) if d not in ("pair", "side", "position")]
    label = ", ".join(f"{d} {data[d].values[-1]}" if d in data.coords else d for d in extra)
    data = data.isel({d: -1 for d in extra})
    for dim in ("side", "pair"):
        if dim not in data["value"].dims:
            fixed = str(data[dim].item()) if dim in data.coords else ""
            data = data.drop_vars(dim, errors="ignore").expand_dims({dim: [fixed]})
    names = {"value": data["value"], "piece": data["piece"]} | ({"role": data["role"]} if "role" in data.coords else {})
    table = {k: v.broadcast_like(data["value"]).transpose("pair", "side", "position").values for k, v in names.items()}
    lengths = np.full(table["value"].shape[:2], data.sizes["position"])
    if "n_positions" in data.coords:
        counts = data["n_positions"].broadcast_like(data["value"].isel(position=0)).transpose("pair", "side")
        lengths = np.nan_to_num(counts.values.astype(float)).astype(int)
    pairs = text_of(data["pair"].values)
    out = []
    for (p, s), n in np.ndenumerate(lengths):
        if n:
            cut = {k: v[p, s, :n] for k, v in table.items()}
            roles = tuple(text_of(cut["role"])) if "role" in cut else ("",) * n
            pair, side = str(pairs[p]), str(data["side"].values[s])
            values = tuple(float(v) for v in cut["value"])
            out.append(Block(pair, side, tuple(text_of(cut["piece"])), roles, values, label))
    return out


def colour_limit(texts: list[Block]) -> tuple[float, float]:
    """Where the symmetric colour scale ends, and the largest absolute value; (0, 0) without values."""
    sizes = np.abs([v for block in texts for v in block.values if math.isfinite(v)])
    if not sizes.any():
        return 0.0, 0.0
    largest, usual = float(sizes.max()), float(np.quantile(sizes, CLIP))
    return (usual if largest > 1.5 * usual > 0 else largest), largest


def readable(piece: str) -> str:
    """A piece as it is shown: what has no glyph of its own gets one, so that no token is invisible."""
    if not piece:
        return "\u00b7"
    return piece.replace("\r", "\\r").replace("\n", "\u21b5\n")  # HTML would make a line break of the first


def quoted(piece: str) -> str:
    """Quotation marks show where a token begins and ends."""
    return f"\u201c{readable(piece).replace(chr(10), '')}\u201d"


def strip_chart(texts: list[Block], unit: str) -> tuple[Drawing, str]:
    """The chart form (notebook, SVG, PNG), monospaced, of a fixed width; and a note on what is left out."""
    cells, headings, height = _typeset(texts[:BLOCKS])
    limit, _ = colour_limit(texts)
    across = {"axis": None, "scale": alt.Scale(domain=[0, COLUMNS], nice=False)}
    where = {
        "x": alt.X("x:Q", **across),
        "y": alt.Y("row:O", axis=None, scale=alt.Scale(domain=list(range(height)), paddingInner=0.08)),
    }
    tip = [
        alt.Tooltip("text:N", title="token"),
        alt.Tooltip("value:Q", format="+.3~g"),
        alt.Tooltip("role:N"),
    ]
    base = alt.Chart(rows(cells)).encode(**where, tooltip=tip)
    titles = alt.Chart(rows(headings)).mark_text(style="heading")
    layers = [
        base.mark_rect().encode(x2="end:Q", color=shade(limit or 1, True, unit)),
        base.mark_text(style="token").encode(x=alt.X("letters:Q", **across), text="text:N"),
        titles.encode(y=where["y"], x=alt.datum(0), text="text:N"),
    ]
    note = f"The first {BLOCKS} of {len(texts)} texts." if len(texts) > BLOCKS else ""
    if any(unicodedata.bidirectional(c) in ("R", "AL") for block in texts[:BLOCKS] for c in "".join(block.pieces)):
        note = f"{note} Tokens follow each other from the left, those written from right to left too.".strip()
    return alt.layer(*layers).properties(width=int(COLUMNS * CHARACTER), height=ROW * height), note


def _typeset(texts: list[Block]) -> tuple[list[dict], list[dict], int]:
    """Cells and headings with their row and columns, and the number of rows. A line break ends its row."""
    cells, headings, row = [], [], 0
    for block in texts:
        headings.append({"row": row, "text": "  ".join(t for t in (block.pair, block.side, block.depth) if t)})
        row, column = row + 1, 0
        for piece, role, value in zip(block.pieces, block.roles, block.values, strict=True):
            shown = readable(piece).replace("\n", "").replace("\t", " ").replace(" ", "\u00a0")
            step = COLUMNS if _width(shown) <= len(shown) else COLUMNS // 2
            for start in range(0, len(shown), step):
                part = shown[start : start + step]
                if column + _width(part) > COLUMNS:
                    row, column = row + 1, 0
                end = column + _width(part)
                letters = column + len(part) - len(part.lstrip())  # Vega trims a text before it draws it
                cells.append({"row": row, "x": column, "letters": letters, "end": end, "text": part, "value": value,
                              "role": role})  # fmt: skip
                column = end
            if piece.endswith("\n"):
                row, column = row + 1, 0
        row += 2
    return cells, headings, row


def _width(text: str) -> int:
    """Columns of a monospaced font: none for marks, two for the wide characters of Chinese, Japanese, Korean, emoji."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)
