"""How many sites carry a margin: keep or ablate the top k together, and the smallest set that greedy search finds.

    M(K)  = margin with the sites of K left alone and all others ablated together (everything after them recomputed)
    F(K)  = (M(K) - M(none)) / (M(all) - M(none))          over pairs: ratio of means, never mean of ratios

    keep        F of the top k                is the top enough?           (faithfulness)
    knock out   F of all but the top k        does anything go on without? (a complete circuit leaves 0)

Every pair is ranked by the mean effects of *other* prompts: a ranking by the same pairs would flatter its own curve.
Ablations are zero or mean (see `ablations`); no norm is frozen. M(none) is what the ablated sites leave, which depends
on the ablation and on `at`: at the reward position, zero or mean ablation of all components leaves nothing of either
response. Both ends are computed once more by `intervene`, one whole pass a text, and have to agree.

What this cannot show: that the circuit is *the* mechanism. Sites that stand in for each other make several small
circuits, greedy search finds one, and a faithful set need not do on its own what it does in the network.

Reference: Wang et al. 2022, arXiv 2211.00593 (faithfulness, completeness, minimality); Hanna et al. 2024, arXiv
2403.17806 (normalised faithfulness).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import positions_of
from reward_lens.engine.editing import Edit, Source
from reward_lens.engine.intervention import intervene
from reward_lens.engine.patching import patch_rows
from reward_lens.errors import DataError
from reward_lens.methods.causation.ablations import Ablation, prepare_ablation, source_of
from reward_lens.methods.causation.effect_sweeps import asked_sites, site_coords
from reward_lens.methods.causation.effects import effects
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

CURVES = ("keep", "knock out")
FLAT = "M(all) and M(none) differ by no more than the noise floor"


@checked_arguments
@torch.no_grad()
def ablation_curve(
    rm: RewardModel,
    pairs,
    sites: "str | Sequence[Site | str]" = "components",
    ranking: "Sequence[Site | str] | None" = None,
    mode: Literal["zero", "mean"] = "mean",
    ks: Sequence[int] | None = None,
    at: Literal["final", "response", "all"] = "final",
    reference=None,
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """Margins as the top k sites are kept, or ablated, together.

    Parameters
    ----------
    sites: "components", "heads", or a list of writes, single heads and neurons.
    ranking: all these sites, most important first. None: by |mean effect on the margin| (`effects`, the same ablation)
        over the prompts of the other half; the halves are drawn with `seed` and stand in the coordinate `half`.
    mode, at, reference: of the ablations; see `effects`.
    ks: numbers of sites; 0 and all are always added. None: every number up to 8, then about 8 more.
    max_rows: changed runs walking at once.

    Returns value (pair, curve, k) in reward units, curve = keep, knock out; mean and interval over prompts.
    Coordinate `faithfulness` (curve, k), the ratio of means F above, NaN where M(all) - M(none) is under the noise
    floor. Checks: "clean margin" (k = all of keep, 0 of knock out) and "fully ablated", each against `intervene`.
    Raises `DataError` for sites that are no writes, a ranking of other sites, or a single prompt without `ranking`.
    """
    pairs = data.as_pairs(pairs)
    wanted = _writes(rm, sites, mode)
    counts = _counts(ks, len(wanted))
    order, half, by = _ranked(rm, pairs, wanted, ranking, mode, at, reference, seed, max_rows)
    ablation = prepare_ablation(rm, pairs, wanted, mode, at, reference, 0, seed)
    values, gaps = np.empty((len(pairs), 2, len(counts))), []
    for i, pair in enumerate(pairs):
        margins = Margins(rm, ablation, pair, wanted, at, max_rows)
        top = order[half[i]]
        values[i, 0] = margins.keeping([top[:k] for k in counts])
        values[i, 1] = margins.keeping([top[k:] for k in counts])
        gaps.append(margins.gaps(values[i, 0, -1], values[i, 1, 0], values[i, 0, 0], values[i, 1, -1]))
    mean = values.mean(0)
    span = mean[0, -1] - mean[0, 0]
    share = (mean - mean[0, 0]) / span if abs(span) > rm.noise_floor else np.full_like(mean, np.nan)
    names = [str(s) for s in wanted]
    tolerance = 2e-2 if rm.sixteen_bit else 1e-4
    checks = [Check(n, g, tolerance) for n, g in zip(("clean margin", "fully ablated"), np.max(gaps, 0), strict=True)]
    if np.isnan(share).any():
        checks.append(Check("faithfulness undefined", 1.0, float("inf"), FLAT))
    return paired_result(
        rm, "ablation_curve", pairs, values, ("pair", "curve", "k"),
        {"curve": np.array(CURVES, dtype=object), "k": np.array(counts), "half": ("pair", half),
         "faithfulness": (("curve", "k"), share)},
        checks=checks, seed=seed, noise_floor=rm.noise_floor,
        ranking={str(h): [names[i] for i in row] for h, row in enumerate(order)},
        settings={"sites": sites if isinstance(sites, str) else names, "mode": mode, "at": at, "ranked_by": by,
                  "reference": ablation.name},
        title=f"Ablation curve ({mode}, {at})",
        shows="The margin with the top k sites kept and all others ablated, and with the top k ablated.",
        cannot_show="That the kept sites are the mechanism: others may stand in for them, and the rest is in a state "
        "the network never reaches.",
    )  # fmt: skip


@checked_arguments
@torch.no_grad()
def minimal_circuit(
    rm: RewardModel,
    pair,
    threshold: float = 0.9,
    sites: "str | Sequence[Site | str]" = "components",
    mode: Literal["zero", "mean"] = "mean",
    reference=None,
    at: Literal["final", "response", "all"] = "final",
    seed: int = 0,
    max_rows: int | None = None,
) -> Result:
    """A set of sites that keeps at least `threshold` of one pair's margin, none of which it can do without.

    Greedy: the site that raises F most is added until F >= threshold (of several that reach it, the one whose F is
    nearest 1); then members that are not needed are taken out again, and every remaining one is verified. F counts as
    reaching the threshold within the noise floor.

    Parameters
    ----------
    pair: one pair.
    threshold: over 0, at most 1.
    reference: pairs of other prompts, needed for mode="mean".
    sites, mode, at, max_rows: as in `ablation_curve`.

    Returns value (component), members in the order they were added: F with this one and those before it kept.
    Coordinate `without`: F of the circuit less this member, below the threshold for each ("every member is needed").
    `meta` has the circuit's margin, the clean and the fully ablated one. It need not be the smallest such set.
    Raises `DataError` where `threshold` of what clean and fully ablated margin differ by is within the noise floor.
    """
    pairs = data.as_pairs([pair] if isinstance(pair, data.Pair) else pair)
    if len(pairs) != 1 or not 0 < threshold <= 1:
        raise DataError("A minimal circuit is of one pair, to a share of its margin",
                        found=f"{len(pairs)} pairs, threshold={threshold}", expected="one pair, 0 < threshold <= 1",
                        do="pass one pair; ablation_curve takes many")  # fmt: skip
    wanted = _writes(rm, sites, mode)
    ablation = prepare_ablation(rm, pairs, wanted, mode, at, reference, 0, seed)
    margins = Margins(rm, ablation, pairs[0], wanted, at, max_rows)
    everything = list(range(len(wanted)))
    none, clean = margins.keeping([[], everything])
    least = rm.noise_floor / threshold  # else no site at all reaches it
    if abs(clean - none) <= least:
        raise DataError(f"Pair {pairs[0].id} has no margin that these sites carry", found=f"{clean:.3g} clean, "
                        f"{none:.3g} with all of them ablated", expected=f"a difference over {least:.1g}",
                        do="take a pair with a clearer margin, more sites, or a larger threshold")  # fmt: skip

    def faithfulness(sets: Iterable[Sequence[int]]) -> np.ndarray:
        return (margins.keeping(sets) - none) / (clean - none)

    exact = rm.noise_floor / abs(clean - none)
    enough = threshold - exact
    members = _pruned(_grown(everything, faithfulness, enough), faithfulness, enough)
    kept = faithfulness([members[: i + 1] for i in range(len(members))])
    without = faithfulness([[m for m in members if m != one] for one in members])
    gaps = margins.gaps(clean, clean, none, none)
    names = ("clean margin", "fully ablated")
    checks = [Check(n, g, 2e-2 if rm.sixteen_bit else 1e-4) for n, g in zip(names, gaps, strict=True)]
    checks.append(Check("faithful", float(max(enough - kept[-1], 0.0)), exact))
    checks.append(Check("every member is needed", float(max(without.max() - enough, 0.0)), exact))
    coords: dict[str, Any] = site_coords([wanted[m] for m in members]) | {"without": ("component", without)}
    return Result(
        "minimal_circuit", xr.DataArray(kept, dims=("component",), coords=coords), unit="fraction", checks=checks,
        meta=rm.describe(
            "minimal_circuit", pairs, seed=seed, noise_floor=rm.noise_floor, title=f"Minimal circuit of {pairs[0].id}",
            clean_margin=float(clean), ablated_margin=float(none),
            circuit_margin=float(none + kept[-1] * (clean - none)),
            settings={"sites": sites if isinstance(sites, str) else [str(s) for s in wanted], "mode": mode, "at": at,
                      "threshold": threshold, "reference": ablation.name},
            shows="Sites that keep the margin when all others are ablated together, in the order they were found.",
            cannot_show="That this is the smallest or the only such set, or that it holds for another pair.",
        ),
    )  # fmt: skip


class Margins:
    """The margins of one pair with any sets of sites kept and the others ablated."""

    def __init__(self, rm: RewardModel, ablation: Ablation, pair, sites: Sequence[Site], at: str, max_rows: int | None):
        self.rm, self.sites, self.max_rows, self.at = rm, list(sites), max_rows, at
        self.texts = rm.tokenize_pairs([pair])[0]
        self.clean = rm.rewards(self.texts).double().numpy()
        self.positions = [positions_of(text, at) for text in self.texts]
        self.sources: list[list[Source]] = [
            [source_of(ablation, pair.prompt_key, text, site, positions) for site in self.sites]
            for text, positions in zip(self.texts, self.positions, strict=True)
        ]

    def keeping(self, sets: Iterable[Sequence[int]]) -> Float[np.ndarray, " set"]:
        """M of each set of indices of sites."""
        out = [set(range(len(self.sites))) - set(kept) for kept in sets]
        rewards = np.repeat(self.clean[:, None], len(out), 1)
        changed = [i for i, ablated in enumerate(out) if ablated]
        if changed:
            for side, text in enumerate(self.texts):
                rows = [tuple(self._edit(side, s) for s in sorted(out[i])) for i in changed]
                rewards[side, changed] += patch_rows(self.rm, text, rows, max_rows=self.max_rows).change.numpy()
        return rewards[0] - rewards[1]

    def gaps(self, *found: float) -> tuple[float, float]:
        """Worst distance of two clean and of two fully ablated margins from those of `intervene`."""
        both = np.empty((2, 2))
        for side, text in enumerate(self.texts):
            everything: dict[Site | str, Source] = dict(zip(self.sites, self.sources[side], strict=True))
            states = intervene(self.rm, [text], everything, at=self.positions[side]).value
            both[side] = states.sel(state=["clean", "intervened"])[0]
        expected = both[0] - both[1]
        size = max(float(np.abs(both).max()), 1e-12)
        return float(np.abs(found[:2] - expected[0]).max() / size), float(np.abs(found[2:] - expected[1]).max() / size)

    def _edit(self, side: int, site: int) -> Edit:
        return Edit(self.sites[site], self.positions[side], self.sources[side][site])


def _grown(everything: list[int], faithfulness, threshold: float) -> list[int]:
    members: list[int] = []
    while True:
        rest = [i for i in everything if i not in members]
        shares = faithfulness([[*members, i] for i in rest])
        reach = np.flatnonzero(shares >= threshold)
        if len(reach):
            return [*members, rest[reach[np.argmin(np.abs(shares[reach] - 1))]]]
        members.append(rest[int(np.argmax(shares))])


def _pruned(members: list[int], faithfulness, threshold: float) -> list[int]:
    """Members less those that can go, the one that is missed least first."""
    while True:
        fewer = [[m for m in members if m != one] for one in members]
        shares = faithfulness(fewer)
        if shares.max() < threshold:
            return members
        members = fewer[int(np.argmax(shares))]


def _ranked(rm, pairs, sites, ranking, mode, at, reference, seed, max_rows) -> tuple[list[list[int]], np.ndarray, str]:
    """The order of sites for each half, the half of every pair, and where the order comes from."""
    if ranking is not None:
        named = [Site.parse(s) for s in ranking]
        if sorted(map(str, named)) != sorted(map(str, sites)):
            raise DataError("The ranking is not one of these sites", found=f"{len(named)} sites, "
                            f"{len(set(named) & set(sites))} of them among the {len(sites)} to rank",
                            expected="each of them once", do="pass the sites, most important first")  # fmt: skip
        return [[sites.index(s) for s in named]], np.zeros(len(pairs), dtype=int), "given"
    prompts = np.array([p.prompt_key for p in pairs])
    different = np.unique(prompts)
    if len(different) < 2:
        raise DataError("One prompt gives no ranking from other prompts", found="1 prompt", expected="at least 2",
                        do="pass more pairs, or ranking=")  # fmt: skip
    first = np.random.default_rng(seed).permutation(different)[: len(different) // 2]
    half = np.where(np.isin(prompts, first), 0, 1)
    found = effects(rm, pairs, sites, mode, at, reference=reference, seed=seed, max_rows=max_rows)
    margin = found.value.sel(side="margin").transpose("pair", "component").values
    order = [np.argsort(-np.abs(margin[half != h].mean(0)), kind="stable").tolist() for h in (0, 1)]
    return order, half, "|mean effect| over the other half of the prompts"


def _writes(rm: RewardModel, sites, mode: str) -> list[Site]:
    if mode not in ("zero", "mean"):
        raise DataError("A circuit was asked for an ablation it does not have", found=f"mode={mode!r}",
                        expected="'zero' or 'mean'", do="pass one of these as mode=")  # fmt: skip
    wanted = asked_sites(rm, sites, None)
    parts = {(s.kind, s.layer) for s in wanted}
    bad = [str(s) for s in wanted if s.kind not in ("embed", "attn", "mlp", "head", "neuron")
           or (s.kind in ("head", "neuron") and s.index is None)]  # fmt: skip
    bad += [str(s) for s in wanted if ({"head": "attn", "neuron": "mlp"}.get(s.kind), s.layer) in parts]
    if bad:
        raise DataError(
            "A circuit is made of separate writes",
            found=", ".join(bad[:4]),
            expected="embed, attention and MLP writes, single heads and neurons, and none together with its own part",
            do="use sites='components' or 'heads', or leave these out",
        )
    return wanted


def _counts(ks: Sequence[int] | None, n: int) -> list[int]:
    some = [*range(min(n, 8)), *np.geomspace(8, max(n, 8), 9).round().astype(int).tolist()] if ks is None else list(ks)
    if any(not 0 <= k <= n for k in some) and ks is not None:
        raise DataError("There are not as many sites to keep", found=f"ks={list(ks)}", expected=f"0 to {n}",
                        do="choose numbers of sites")  # fmt: skip
    return sorted({0, n, *(int(k) for k in some if k <= n)})
