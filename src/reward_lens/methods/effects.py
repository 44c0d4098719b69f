"""The causal effect of sites on the reward: change one, recompute everything after it, see what the reward does.

    noise     chosen run, site takes the rejected value     effect = r(chosen)  - r(patched)     is the site needed?
    denoise   rejected run, site takes the chosen value     effect = r(patched) - r(rejected)    does it suffice?
    zero, mean, resample   both runs, site ablated          effect = r(run)     - r(ablated)

Positive in noise and denoise: the site supports the preference. Nothing is frozen (`path="total"`, `norm="live"`)
unless asked for: `path="direct"` changes the site in what the reward head reads alone (see `direct`), `norm="frozen"`
holds the final norm's scale at its value in the clean run. Every row is compared with a clean row of its own batch.

What this cannot show: that the changed state is one the network ever reaches by itself (see `divergence`); and a small
effect of one site is no proof that it does nothing, since others may stand in for it.

Reference: Zhang and Nanda 2023, arXiv 2309.16042; Heimersheim and Nanda 2024, arXiv 2404.15255.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from reward_lens import data
from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.patching import patch_rows
from reward_lens.engine.places import require_site
from reward_lens.engine.runs import common_start, keys_before, run_text
from reward_lens.errors import DataError
from reward_lens.methods.ablations import ablated_pair, prepare_ablation
from reward_lens.methods.effect_cells import Cells, Spans, cells_of, change_of, exchange_rows, sites_of, span_coords
from reward_lens.methods.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

Mode = Literal["noise", "denoise", "zero", "mean", "resample"]
Estimator = Literal["exact", "gradient", "integrated", "integrated_block", "integrated_joint", "relevance"]
EXCHANGES, ABLATIONS = ("noise", "denoise"), ("zero", "mean", "resample")
ESTIMATORS = get_args(Estimator)
Progress = Callable[[int, int], None]


def effects(
    rm: RewardModel,
    pairs,
    sites: str | Sequence["Site | str"] = "components",
    mode: Mode = "noise",
    at: Literal["final", "response", "all"] = "final",
    estimator: Estimator = "exact",
    path: Literal["total", "direct"] = "total",
    align: Literal["tail", "diff", "legacy_prefix"] | None = None,
    spans: Spans = None,
    norm: Literal["live", "frozen"] = "live",
    reference=None,
    n_draws: int = 20,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Causal effect of each site on the reward, in reward units.

    Parameters
    ----------
    sites: "components" (embed and every attention and MLP write), "heads", "residual" (the stream at every depth), or a
        list of `Site` objects or written forms (``"L3.H5"``, ``"L3.N17"``, ``"L2.resid_mid"``, ``"L4.K1"``).
    mode: see the top of the module. Ablations have a dim `side`; only its margin speaks of the preference.
    at: "final", the reward position, always comparable. "response" and "all" need responses of the same token count or
        an alignment; positions that chosen and rejected share are the same in both runs and are left alone.
    estimator: "exact" runs every change; the others estimate from gradients (see `estimators`) and are labelled so.
    path: "direct" adds a dim `part`: direct (frozen norm), norm_rescale, mediated, total.
    align: "tail", "diff" or "legacy_prefix" (a known artefact), for responses of different length.
    spans: patch parts of the aligned positions one by one: "position" (each by itself: a dim `position`), or {name:
        range of positions in the changed run} for all pairs or one such mapping a pair (a dim `span`).
    reference: pairs of other prompts whose responses mean and resample take values from; None: the other prompts among
        `pairs`. Both ablations respect a token's role (prompt, response, template tail).
    n_draws: of resample, at least 20; `value` is their mean, the coordinate `draw_sd` their spread.
    layers: keep only sites of these layers.
    max_rows: changed runs walking at once; None: as many as a token budget and the free memory allow.
    progress: called with (pairs done, pairs).
    options: of an estimator: `steps`, `calibrate`, `grad_drop`.

    Returns value (pair, component), with `side` before it for ablations and `position` or `span` after it, in reward
    units; mean and interval over prompts. Coordinate `recovered` of noise and denoise: effect / margin, NaN where the
    margin is under the noise floor. Checks: "clean row" (the unchanged row of each sweep is the run's reward).
    Raises `AlignmentError` for lengths that need an alignment, `StructureError` for a site the model lacks, `DataError`
    for empty spans and overlapping references, `CheckFailed` for values that are not finite.
    """
    pairs = data.as_pairs(pairs)
    wanted = sites_of(rm, sites, layers)
    for site in wanted:
        require_site(rm, site)
    _require_settings(mode, estimator, path, norm, options)
    settings = {
        "sites": sites if isinstance(sites, str) else [str(s) for s in wanted], "mode": mode, "at": at,
        "estimator": estimator, "path": path, "align": align, "norm": norm, "layers": None if layers is None else
        list(layers), "spans": spans if isinstance(spans, str) else None if spans is None else "explicit",
        "base": {"noise": "chosen", "denoise": "rejected"}.get(mode, "both"), "prefix_reuse": rm.reuses_prefix(),
    }  # fmt: skip
    if path == "direct":
        from reward_lens.methods.direct import direct_effects

        if estimator != "exact" or spans is not None or norm != "live":
            raise DataError("The direct path was asked for together with something it has not",
                            found=f"estimator={estimator!r}, norm={norm!r}, spans given: {spans is not None}",
                            expected="estimator='exact', norm='live' (both norms are parts of the result), no spans",
                            do="leave these at their defaults")  # fmt: skip
        return direct_effects(rm, pairs, wanted, settings, reference=reference, n_draws=n_draws, seed=seed,
                              max_rows=max_rows, progress=progress)  # fmt: skip
    if estimator != "exact":
        from reward_lens.methods.estimators import estimated_effects

        return estimated_effects(rm, pairs, wanted, settings, spans=spans, seed=seed, max_rows=max_rows,
                                 progress=progress, **options)  # fmt: skip
    if mode in EXCHANGES:
        found = _exchanged(rm, pairs, wanted, settings, spans, max_rows, progress)
    else:
        found = _ablated(rm, pairs, wanted, settings, spans, reference, n_draws, seed, max_rows, progress)
    return effects_result(rm, pairs, wanted, found, settings, seed)


class Found:
    """Values of all pairs as they come, and what the result needs besides."""

    def __init__(self):
        self.values: list[np.ndarray] = []
        """A pair: [site, group], or [side, site, group]."""
        self.groups: list[Cells] = []
        self.draw_sd: list[np.ndarray] = []
        self.grad_drop: list[np.ndarray] = []
        self.margins: list[float] = []
        self.gaps: list[float] = []
        """Distance of clean rows from the runs' own rewards, over the scale of effects."""
        self.closing: list[float] = []
        """Distance of the last residual's effect from the margin, where it is among the sites."""


def _exchanged(rm, pairs, sites, settings, spans, max_rows, progress) -> Found:
    found = Found()
    mode, only_final = settings["mode"], settings["at"] == "final"
    for i, (pair, tokens) in enumerate(zip(pairs, rm.tokenize_pairs(pairs), strict=True)):
        # The changed run's own values are not needed; the sweep runs it beside the changed rows.
        base, other = tokens if mode == "noise" else tokens[::-1]
        where = aligned(base, other, settings["at"], settings["align"], pair.id)
        cells = cells_of(base, where, spans, i, pair.id)
        shared = common_start(base, other)
        source = run_text(rm, other, sites, only_final=only_final, hold=shared)
        known = keys_before(rm, source, shared, base)
        rows, index = exchange_rows(sites, cells, source, pair.id)
        values = cells.empty(len(sites))
        if rows:
            out = patch_rows(rm, base, rows, known=known, max_rows=max_rows)
            change = change_of(rm, out, settings["norm"])
            values[tuple(np.array(index).T)] = -change if mode == "noise" else change
            own = out.alone
            size = rm.effect_scale(own, source.reward, own - source.reward)
            found.gaps.append(float((out.clean - own).abs().max()) / size)
        else:
            own = run_text(rm, base, [], only_final=True, known=known).reward
        margin = own - source.reward if mode == "noise" else source.reward - own
        last = Site("resid_post", rm.n_layers - 1)
        if last in sites and spans is None and settings["norm"] == "live" and where.base:
            size = rm.effect_scale(own, source.reward, margin)
            if (base.reward_pos, other.reward_pos) in zip(where.base, where.source, strict=True):
                found.closing.append(abs(values[sites.index(last), 0] - margin) / size)
        found.values.append(values)
        found.groups.append(cells)
        found.margins.append(margin)
        if progress is not None:
            progress(i + 1, len(pairs))
    return found


def _ablated(rm, pairs, sites, settings, spans, reference, n_draws, seed, max_rows, progress) -> Found:
    found = Found()
    ablation = prepare_ablation(rm, pairs, sites, settings["mode"], settings["at"], reference, n_draws, seed)
    settings["reference"] = ablation.name
    if settings["mode"] == "resample":
        settings["n_draws"] = n_draws
    for i, (pair, tokens) in enumerate(zip(pairs, rm.tokenize_pairs(pairs), strict=True)):
        sides, spreads = [], []
        for text in tokens:
            cells, values, spread, gap = ablated_pair(
                rm, ablation, pair, i, text, sites, settings["at"], spans, settings["norm"], max_rows
            )
            sides.append(values)
            spreads.append(spread)
            found.gaps.append(gap)
        found.values.append(np.stack([*sides, sides[0] - sides[1]]))
        found.draw_sd.append(np.stack([*spreads, np.sqrt(spreads[0] ** 2 + spreads[1] ** 2)]))
        found.groups.append(cells)
        if progress is not None:
            progress(i + 1, len(pairs))
    return found


def effects_result(
    rm: RewardModel, pairs, sites: Sequence[Site], found: Found, settings: dict, seed: int, **meta
) -> Result:
    """The `Result` of one sweep over pairs, ragged groups padded with NaN."""
    widest = max(v.shape[-1] for v in found.values)
    values = np.stack([_padded(v, widest) for v in found.values])
    coords, dim, undefined = span_coords(found.groups, widest)
    coords |= site_coords(sites)
    dims = ["pair", *(["side"] if values.ndim == 4 else []), "component", *([dim] if dim else [])]
    if dim is None:
        values = values[..., 0]
    if found.draw_sd and settings["mode"] == "resample":
        spread = np.stack([_padded(v, widest) for v in found.draw_sd])
        coords["draw_sd"] = (dims, spread if dim else spread[..., 0])
    if found.grad_drop:
        drop = np.stack([_padded(v, widest) for v in found.grad_drop])
        coords["grad_drop"] = (dims, drop if dim else drop[..., 0])
    if found.margins:
        margin = np.array(found.margins).reshape(-1, *[1] * (values.ndim - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(np.abs(margin) > rm.noise_floor, values / margin, np.nan)
        coords["recovered"] = (dims, share)
        coords["margin"] = ("pair", np.array(found.margins))
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
        rm, "effects", pairs, values, dims, coords, checks=checks, undefined=undefined, settings=settings, seed=seed,
        noise_floor=rm.noise_floor, **(words | meta),
    )  # fmt: skip


def site_coords(sites: Sequence[Site]) -> dict[str, Any]:
    """Coordinates of `component`: its name, layer (-1 before block 0), kind, and index of a head or neuron."""
    coords = {
        "component": np.array([str(s) for s in sites], dtype=object),
        "layer": ("component", np.array([-1 if s.layer is None else s.layer for s in sites])),
        "kind": ("component", np.array([s.kind for s in sites], dtype=object)),
    }
    if any(s.kind == "head" for s in sites):
        coords["head"] = ("component", np.array([s.index if s.kind == "head" else -1 for s in sites]))
    return coords


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    short = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, short, constant_values=np.nan)


def _require_settings(mode: str, estimator: str, path: str, norm: str, options: Mapping) -> None:
    known = {"mode": (mode, (*EXCHANGES, *ABLATIONS)), "estimator": (estimator, ESTIMATORS),
             "path": (path, ("total", "direct")), "norm": (norm, ("live", "frozen"))}  # fmt: skip
    for name, (value, allowed) in known.items():
        if value not in allowed:
            raise DataError(f"effects was asked for a {name} it does not have", found=repr(value),
                            expected=", ".join(map(repr, allowed)), do=f"pass one of these as {name}=")  # fmt: skip
    if options and estimator == "exact":
        raise DataError("effects was given options that only estimators have", found=", ".join(options),
                        expected="none with estimator='exact'", do="drop them, or name an estimator")  # fmt: skip
