"""The sweeps behind `effects` and its kin: what every pair gives, site by site, and the result that it becomes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reward_lens.engine.activations import positions_of
from reward_lens.engine.alignment import HOW, Alignment, not_understood
from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.patching import patch_rows
from reward_lens.engine.places import gate_inside, require_site
from reward_lens.engine.runs import common_start, keys_before, run_text
from reward_lens.errors import DataError
from reward_lens.methods.causation.ablations import Ablation, ablated_cells, prepare_ablation
from reward_lens.methods.causation.effect_cells import (
    Cells,
    Spans,
    cells_of,
    exchange_rows,
    in_common,
    sites_of,
    span_coords,
)
from reward_lens.methods.causation.effect_readings import Reading
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import Progress
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

EXCHANGES, ABLATIONS = ("noise", "denoise"), ("zero", "mean", "resample")


class Found:
    """Values of all pairs as they come, and what the result needs besides."""

    def __init__(self, reading: Reading | None = None):
        self.reading = reading
        self.values: list[np.ndarray] = []
        """A pair: [site, group], with the reading's columns before and then the sides, where there are any."""
        self.groups: list[tuple[Cells, ...]] = []
        """A pair: of the run that is changed, or of both."""
        self.draw_sd: list[np.ndarray] = []
        self.grad_drop: list[np.ndarray] = []
        self.margins: list[np.ndarray | float] = []
        self.gaps: list[float] = []
        """Distance of clean rows from the runs' own rewards, over the scale of effects."""
        self.closing: list[float] = []
        """Distance of the last residual's effect from the margin, where it is among the sites."""


def asked_sites(rm: RewardModel, sites: str | Sequence["Site | str"], layers: Sequence[int] | None) -> list[Site]:
    """The sites that a sweep was asked for; `StructureError` for one the model lacks."""
    wanted = sites_of(rm, sites, layers)
    for site in wanted:
        require_site(rm, site)
    return wanted


def sweep_settings(
    rm: RewardModel, pairs, sites: str | Sequence["Site | str"], wanted: Sequence[Site], mode: str, at: Any, align: Any,
    layers: Sequence[int] | None, spans: Spans, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What every sweep's result says of how it was asked."""
    if align not in HOW:
        raise not_understood(at, align)
    if align is not None and mode not in EXCHANGES:
        raise DataError(
            "An ablation was given an alignment of the two responses",
            found=f"mode={mode!r}, align={align!r}",
            expected="align=None: every run is changed where it stands, by nothing of the other one",
            do="leave align= out, or exchange values between the responses (mode='noise' or 'denoise')",
        )
    named = isinstance(spans, str)
    if not named and isinstance(spans, Sequence) and len(spans) != len(pairs):
        raise DataError("The spans are not one mapping a pair", found=f"{len(spans)} mappings, {len(pairs)} pairs",
                        expected="a mapping for every pair, in their order, or one for all",
                        do="pass as many as there are pairs")  # fmt: skip
    return {
        "sites": sites if isinstance(sites, str) else [str(s) for s in wanted], "mode": mode, "at": at, "align": align,
        "layers": None if layers is None else list(layers),
        "spans": spans if named else None if spans is None else "explicit",
        "base": {"noise": "chosen", "denoise": "rejected"}.get(mode, "both"), "prefix_reuse": rm.reuses_prefix(),
        **more,
    }  # fmt: skip


def swept(
    rm: RewardModel, pairs, sites: Sequence[Site], settings: dict, reading: Reading, spans: Spans, reference,
    n_draws: int, seed: int, max_rows: int | None, progress: Progress | None,
) -> "Found":  # fmt: skip
    """The sweep of a mode: values exchanged between the two responses, or ablated in each."""
    if settings["mode"] in EXCHANGES:
        return exchanged(rm, pairs, sites, settings, reading, spans, max_rows, progress)
    ablation = prepare_ablation(rm, pairs, sites, settings["mode"], settings["at"], reference, n_draws, seed)
    return ablated(rm, pairs, sites, settings, reading, ablation, spans, max_rows, progress)


def exchanged(
    rm: RewardModel, pairs, sites: Sequence[Site], settings: Mapping[str, Any], reading: Reading, spans: Spans = None,
    max_rows: int | None = None, progress: Progress | None = None,
) -> Found:  # fmt: skip
    """Every site patched with the other run's value; `settings` has mode, at and align as `effects` takes them."""
    found = Found(reading)
    mode, only_final = settings["mode"], settings["at"] == "final"
    for i, (pair, tokens) in enumerate(zip(pairs, rm.tokenize_pairs(pairs), strict=True)):
        # The changed run's own values are not needed; the sweep runs it beside the changed rows.
        base, other = tokens if mode == "noise" else tokens[::-1]
        where = aligned(base, other, settings["at"], settings["align"], pair.id)
        cells = cells_of(base, where, spans, i, pair.id, other)
        shared = common_start(base, other)
        source = run_text(rm, other, sites, only_final=only_final, hold=shared)
        known = keys_before(rm, source, shared, base)
        rows, index = exchange_rows(sites, cells, source, pair.id)
        values = np.broadcast_to(cells.empty(len(sites)), (*reading.shape, len(sites), len(cells.groups))).copy()
        if rows:
            out = patch_rows(rm, base, rows, known=known, max_rows=max_rows)
            change = reading.change(out)
            values[(..., *np.array(index).T)] = -change if mode == "noise" else change
            own, read = out.alone, reading.of_clean(out)
            size = rm.effect_scale(own, source.reward, own - source.reward)
            found.gaps.append(float((out.clean - own).abs().max()) / size)
        else:
            alone = run_text(rm, base, [], only_final=True, known=known)
            own, read = alone.reward, reading.of_run(alone)
        margin = read - reading.of_run(source) if mode == "noise" else reading.of_run(source) - read
        last = Site("resid_post", rm.n_layers - 1)
        gate = gate_inside(rm, base, 0)
        one_gate = gate is None or gate < shared  # prompts that truncation cut differently set different weights
        if last in sites and spans is None and reading.norm == "live" and where.base and one_gate:
            size = rm.effect_scale(own, source.reward, *np.ravel(read).tolist(), *np.ravel(margin).tolist())
            if (base.reward_pos, other.reward_pos) in zip(where.base, where.source, strict=True):
                gap = np.abs(values[..., sites.index(last), 0] - margin)
                found.closing.append(float(gap[reading.whole].max()) / size)
        found.values.append(values)
        found.groups.append((cells,))
        found.margins.append(margin)
        if progress is not None:
            progress(i + 1, len(pairs))
    return found


def ablated(
    rm: RewardModel, pairs, sites: Sequence[Site], settings: dict[str, Any], reading: Reading, ablation: Ablation,
    spans: Spans = None, max_rows: int | None = None, progress: Progress | None = None,
    where: Callable[[Tokens], range] | None = None,
) -> Found:  # fmt: skip
    """Every site of both runs ablated, at `where` (None: what `settings` has as at); notes in `settings` by what."""
    found = Found(reading)
    where = where or (lambda text: positions_of(text, settings["at"]))
    settings["reference"] = ablation.name
    if ablation.mode == "resample":
        settings["n_draws"] = ablation.n_draws
    for i, (pair, tokens) in enumerate(zip(pairs, rm.tokenize_pairs(pairs), strict=True)):
        sides, spreads, both = [], [], []
        for side, text in enumerate(tokens):
            cells = cells_of(text, _itself(where(text)), spans, i, pair.id)
            both.append(cells)
            values, spread, gap = ablated_cells(rm, ablation, pair, 2 * i + side, cells, sites, reading, max_rows)
            sides.append(values)
            spreads.append(spread)
            found.gaps.append(gap)
        shared = in_common(*both)
        found.values.append(_sides(sides, sides[0][..., :shared] - sides[1][..., :shared]))
        found.draw_sd.append(_sides(spreads, np.hypot(spreads[0][..., :shared], spreads[1][..., :shared])))
        found.groups.append(tuple(both))
        if progress is not None:
            progress(i + 1, len(pairs))
    return found


def effects_result(
    rm: RewardModel, pairs, sites: Sequence[Site], found: Found, settings: dict, seed: int, *, name: str = "effects",
    more_checks: Sequence[Check] = (), **meta: Any,
) -> Result:  # fmt: skip
    """The `Result` of one sweep over pairs, ragged groups padded with NaN."""
    widest = max(v.shape[-1] for v in found.values)
    coords, group, undefined = span_coords(found.groups, widest)
    coords |= site_coords(sites)
    column = found.reading.dim if found.reading is not None else None
    if found.reading is not None and column is not None:
        coords[column] = np.array(found.reading.names, dtype=object)
    sided = found.values[0].ndim > 2 + (column is not None)
    ends = [*([column] if column else []), *([group] if group else [])]
    dims = ["pair", *(["side"] if sided else []), "component", *ends]

    if group == "span":  # pairs may name different ones, or in another order
        places = {name: k for k, name in enumerate(coords["span"])}
        at = [[places[name] for name in cells[0].names] for cells in found.groups]
    else:
        at = [list(range(v.shape[-1])) for v in found.values]

    def laid_out(parts: list[np.ndarray]) -> np.ndarray:
        whole = np.full((len(parts), *parts[0].shape[:-1], len(coords[group]) if group else 1), np.nan)
        for one, v, where in zip(whole, parts, at, strict=True):
            one[..., where] = v
        whole = whole if column is None else np.moveaxis(whole, -3, -2)
        return whole if group else whole[..., 0]

    values = laid_out(found.values)
    if found.draw_sd and settings["mode"] == "resample":
        coords["draw_sd"] = (dims, laid_out(found.draw_sd))
    if found.grad_drop:
        coords["grad_drop"] = (dims, laid_out(found.grad_drop))
    if found.margins:
        margins = np.array(found.margins)  # [pair], or [pair, column]
        by_column = margins.ndim == 2
        shape = [dim in ("pair", column) if by_column else dim == "pair" for dim in dims]
        margin = margins.reshape([values.shape[axis] if kept else 1 for axis, kept in enumerate(shape)])
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(np.abs(margin) > rm.noise_floor, values / margin, np.nan)
        coords["recovered"] = (dims, share)
        coords["margin"] = (("pair", column) if by_column else "pair", margins)
    checks = [Check("clean row", max(found.gaps), 2e-2 if rm.sixteen_bit else 1e-4)] if found.gaps else []
    if found.closing:
        checks.append(Check("last residual", max(found.closing), 2e-2 if rm.sixteen_bit else 1e-5))
    words: dict[str, Any] = {
        "title": f"Effects ({settings['mode']}, {settings['at']})",
        "shows": "How much of the reward, or of the margin, is lost or won when one site is changed and all after it "
        "is recomputed: a total effect.",
        "cannot_show": "Whether the changed state is natural, and whether other sites would stand in for this one.",
    }
    return paired_result(
        rm, name, pairs, values, dims, coords, checks=[*checks, *more_checks], undefined=undefined, settings=settings,
        interval=group != "position",  # the tokens at one position of different texts have nothing in common
        seed=seed, noise_floor=rm.noise_floor, **(words | meta),
    )  # fmt: skip


def site_coords(sites: Sequence[Site]) -> dict[str, Any]:
    """Coordinates of `component`: its name, layer (-1 before block 0), kind, and index of a head or expert."""
    coords = {
        "component": np.array([str(s) for s in sites], dtype=object),
        "layer": ("component", np.array([-1 if s.layer is None else s.layer for s in sites])),
        "kind": ("component", np.array([s.kind for s in sites], dtype=object)),
    }
    if any(s.kind == "head" for s in sites):
        coords["head"] = ("component", np.array([s.index if s.kind == "head" else -1 for s in sites]))
    if any(s.kind == "router" and s.index is not None for s in sites):
        coords["expert"] = ("component", np.array([s.index if s.kind == "router" else -1 for s in sites]))
    return coords


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    short = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, short, constant_values=np.nan)


def _sides(runs: list[np.ndarray], margin: np.ndarray) -> np.ndarray:
    """Chosen, rejected and their margin, each padded to the most positions."""
    widest = max(part.shape[-1] for part in runs)
    return np.stack([_padded(part, widest) for part in (*runs, margin)])


def _itself(positions: range) -> Alignment:
    """A text's positions, changed where they stand."""
    return Alignment(tuple(positions), tuple(positions))
