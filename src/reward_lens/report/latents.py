"""From results about a dictionary to what the explorer shows of each latent: a row of the list, and its detail.

Everything is read off the results by the latent's index; what a result does not say of a latent is said to be missing.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from reward_lens import stats
from reward_lens.charts.rows import text_of
from reward_lens.report import numbers
from reward_lens.report.tables import Table
from reward_lens.report.texts import token
from reward_lens.result import Result

PLACES = {"final": "at the reward position", "response": "in the response"}
MEASURES = {"fvu": "FVU", "reward_recovered": "reward recovered"}
TAILS = {
    "other latents": "latents without a row", "error": "error term, what the dictionary lacks",
    "b_dec": "decoder bias", "rest": "rest, what depends on no latent", "norm": "difference of the norm's scale",
}  # fmt: skip
HALF = 100.0  # of the drawing of an interval, zero in its middle
PEAKS = 4  # different peak tokens that a row names


class Given(NamedTuple):
    """The results by what they are about; None for what was not measured."""

    contributions: Result
    contexts: Result
    effects: Result | None
    neighbours: Result | None
    report: Result | None


class Estimate(NamedTuple):
    """A mean with the ends of its interval; NaN where there is none."""

    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return numbers.number(self.mean, signed=True)

    @property
    def ends(self) -> str:
        return numbers.ends(self.low, self.high)

    @property
    def short_ends(self) -> str:
        return numbers.ends(self.low, self.high, numbers.short)


@dataclasses.dataclass(frozen=True)
class Row:
    """One latent in the list."""

    label: str
    index: int
    contribution: Estimate | None
    effect: Estimate | None
    frequency: float
    density: float
    peaks: list[str]
    drawn: tuple[str, str, str] | None
    """Low end, mean and high end of the contribution, from -HALF to HALF."""


def rows(given: Given) -> list[Row]:
    """The latents of the contexts, the largest mean contribution first."""
    found = [_row(given, i) for i in range(given.contexts.value.sizes["latent"])]
    sizes = [abs(v) for row in found for v in row.contribution or () if math.isfinite(v)]
    limit = max(sizes, default=0.0)
    drawn = [dataclasses.replace(row, drawn=_drawn(row.contribution, limit)) for row in found]
    return sorted(drawn, key=lambda row: -abs(row.contribution.mean) if row.contribution else 1.0)


def details(given: Given) -> list[dict[str, Any]]:
    """What is shown of a latent that was chosen, as JSON, in the order of the contexts."""
    listed = {int(j) for j in given.contexts.value["index"].values}
    return [_detail(given, i, listed) for i in range(len(listed))]


def margin_table(given: Given) -> Table:
    """The mean margin as the sum of its rows, each with its interval."""
    margins = given.contributions.value.sel(side="margin")
    kinds, prompts = margins["kind"].values, [str(p) for p in margins["prompt_id"].values]
    own = margins.values[:, kinds == "latent"]
    named = {f"the {own.shape[1]:,} latents with a row": own.sum(1)}
    named |= {TAILS.get(str(kind), str(kind)): margins.values[:, i] for i, kind in enumerate(kinds) if kind != "latent"}
    named["margin"] = margins.values.sum(1)
    seed = given.contributions.meta.get("seed") or 0  # of the contributions' own intervals
    over = stats.mean_interval(np.column_stack(list(named.values())), prompts, seed=seed)
    cells = zip(named, *(np.asarray(end).tolist() for end in (over.mean, over.low, over.high)), strict=True)
    lines = [[name, *(numbers.number(v, signed=True) for v in ends)] for name, *ends in cells]
    return Table(
        "What the mean margin is the sum of", ["part", "mean", "low", "high"], lines, [False, True, True, True]
    )


def head(given: Given) -> list[tuple[str, str]]:
    """The dictionary, how well it stands in for what it reads, and the texts."""
    sae, contexts = given.contributions.meta["sae"], given.contexts.meta
    k = sae["k"] or sae["trained"].get("k")
    kept = sae["activation"] if k is None else f"{sae['activation']}, k {k}"
    out = [("site", sae["site"]), ("dictionary", f"{sae['d_sae']:,} latents, {kept}")]
    share = Estimate(*(_float(given.contributions.meta["error_share"]["margin"][k]) for k in ("mean", "low", "high")))
    out.append(("error term's share of the margin", _with_ends(share, numbers.share)))
    (whole,) = [c for c in given.contributions.checks if c.name == "completeness"]
    note = f", {whole.note}" if whole.note else ""
    out.append(("completeness gap", f"{numbers.gap(whole.gap)} (tolerance {numbers.gap(whole.tolerance)}){note}"))
    if given.report is None:
        out.append(("FVU, reward recovered", "not measured"))
    else:
        out += [(f"{words} {place}", _measured(given.report, name, at)) for name, words in MEASURES.items()
                for at, place in PLACES.items()]  # fmt: skip
    texts = f"{contexts['n_texts']:,} different responses to {contexts['n_prompts']:,} prompts, "
    return [*out, ("texts", texts + f"{contexts['n_tokens']:,} positions")]


def trained(given: Given) -> list[tuple[str, str]]:
    """What the dictionary says of its training."""
    return [(str(name), numbers.cell(value)) for name, value in given.contributions.meta["sae"]["trained"].items()]


def _row(given: Given, i: int) -> Row:
    one = given.contexts.value.isel(latent=i)
    index = int(one["index"])
    split = _of(given.contributions, index)
    peaks = [piece.strip() for piece in text_of(one.sel(offset=0)["piece"].values)]
    return Row(
        label=str(one["latent"].item()), index=index, contribution=_estimate(split), drawn=None,
        effect=_estimate(_of(given.effects, index)), density=float(one["density"]),
        frequency=float(split["frequency_chosen"] + split["frequency_rejected"]) / 2 if split is not None else math.nan,
        peaks=[p for p in dict.fromkeys(peaks) if p][:PEAKS],
    )  # fmt: skip


def _detail(given: Given, i: int, listed: set[int]) -> dict[str, Any]:
    one = given.contexts.value.isel(latent=i)
    index, label = int(one["index"]), str(one["latent"].item())
    near = _of(given.neighbours, index)
    return {
        "label": label,
        "facts": _facts(given, one, index, near),
        "histogram": given.contexts.meta["histogram"].get(label),
        "largest": numbers.number(float(one["largest"])),
        "neighbours": [] if near is None else _near(near, listed),
        "contexts": [_context(one.isel(context=c)) for c in range(one.sizes["context"]) if one["text"].values[c]],
    }  # fmt: skip


def _facts(given: Given, one: xr.DataArray, index: int, near: xr.Dataset | None) -> list[list[str]]:
    """Name, value and remark."""
    split, settings = _of(given.contributions, index, sides=True), given.contributions.meta["settings"]
    place = PLACES[settings["at"]]
    out = []
    if split is None:
        out.append(["contribution to the margin", "no row of its own", "it is in the sum of the other latents"])
    else:
        means = {side: Estimate(*(float(split[k].sel(side=side)) for k in ("mean", "low", "high")))
                 for side in ("margin", "chosen", "rejected")}  # fmt: skip
        for side, found in means.items():
            what = "margin" if side == "margin" else f"{side} response's reward"
            remark = found.ends or "no interval: too few prompts"
            out.append([f"contribution to the {what}", found.text, remark])
    out.append(_effect(given, index))
    if split is not None:
        shares = [numbers.share(float(split[f"frequency_{side}"])) for side in ("chosen", "rejected")]
        difference = [float(split[f"frequency_difference{end}"]) for end in ("", "_low", "_high")]
        remark = f"difference {_with_ends(Estimate(*difference), numbers.share)}"
        out.append([f"active {place}", f"{shares[0]} of chosen, {shares[1]} of rejected", remark])
    density = Estimate(*(float(one[f"density{end}"]) for end in ("", "_low", "_high")))
    anywhere = f"{numbers.share(float(one['frequency']))} of the responses at one position or more"
    out.append(["density", _with_ends(density, numbers.share), f"of a response's positions; {anywhere}"])
    if near is not None:
        along = float(near["reward_cosine"])
        remark = "there is a fixed one at the last site only" if math.isnan(along) else ""
        out.append(["cosine with the reward direction", numbers.number(along, signed=True), remark])
    return out


def _effect(given: Given, index: int) -> list[str]:
    name = "margin that goes when it is set to 0"
    found = _of(given.effects, index)
    if given.effects is None:
        return [name, "not measured", ""]
    n = given.effects.value.sizes["latent"]
    if found is None:
        return [name, "not measured", f"the {n} latents of the largest first-order effect were"]
    p = float(found["p_adjusted"])
    settings, prompts = given.effects.meta["settings"], given.effects.meta["prompts"]["tested"]
    how = {"holm": "Holm", "bh": "Benjamini-Hochberg"}[settings["adjust"]]
    tested = "no p: too few prompts" if math.isnan(p) else f"p {numbers.number(p)} after {how} over {n} latents"
    over = f"{tested}; {prompts} prompts that had no part in choosing them; set to 0 {PLACES[settings['at']]}"
    estimate = Estimate(*(float(found[k]) for k in ("mean", "low", "high")))
    return [name, estimate.text, "; ".join(part for part in (estimate.ends, over) if part)]


def _near(near: xr.Dataset, listed: set[int]) -> list[list[Any]]:
    """Label, cosine, and whether the page has the latent."""
    pairs = zip(near["neighbour_index"].values.tolist(), near["value"].values.tolist(), strict=True)
    return [[f"F{j}", numbers.number(cosine, signed=True), j in listed] for j, cosine in pairs if j >= 0]


def _context(one: xr.DataArray) -> dict[str, Any]:
    """Where it is, and its tokens: text, shade, value, 1 for the peak."""
    limit = float(one["largest"])
    tokens = []
    pieces = text_of(one["piece"].values)
    for offset, piece, value in zip(one["offset"].values.tolist(), pieces, one.values.tolist(), strict=True):
        if piece or math.isfinite(value):
            shown = token(piece, value, limit)
            tokens.append([shown.text, shown.shade, shown.value, int(offset == 0)])
    where = f"{text_of([one['text'].item()])[0]}, token {int(one['token']) + 1}"
    return {"where": where, "peak": numbers.number(float(one.sel(offset=0))), "tokens": tokens}


def _of(result: Result | None, index: int, sides: bool = False) -> xr.Dataset | None:
    """What a result says of a latent (of margins, unless all sides are wanted)."""
    if result is None:
        return None
    places = np.flatnonzero(result.value["index"].values == index)
    if not len(places):
        return None
    one = result.dataset.isel(latent=int(places[0]))
    return one if sides or "side" not in one.dims else one.sel(side="margin")


def _estimate(one: xr.Dataset | None) -> Estimate | None:
    return None if one is None else Estimate(*(float(one[k]) for k in ("mean", "low", "high")))


def _drawn(estimate: Estimate | None, limit: float) -> tuple[str, str, str] | None:
    if estimate is None or not limit:
        return None
    low, high = (estimate.mean if math.isnan(end) else end for end in (estimate.low, estimate.high))
    low, middle, high = (f"{HALF * v / limit:.1f}" for v in (low, estimate.mean, high))
    return low, middle, high


def _measured(report: Result, measure: str, at: str) -> str:
    cell = report.dataset.sel(measure=measure, at=at)
    return _with_ends(Estimate(*(float(cell[k]) for k in ("value", "low", "high"))), numbers.number)


def _with_ends(estimate: Estimate, write) -> str:
    ends = numbers.ends(estimate.low, estimate.high, write)
    return write(estimate.mean) + (f" ({ends})" if ends else "")


def _float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
