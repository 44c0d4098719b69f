"""Are the states an intervention makes ones that the network reaches by itself?

For every site: run the pairs with the site changed, take the residual stream h^ at the reward position further down
(`depth`), and hold it against the residuals h of natural pairs at the same place:

    energy       D(h^, h), in natural SD, over the same between disjoint natural halves; p by relabelling
    local PCA    |h^ - plane of its nearest natural neighbours|
    null-space   max over natural y of |psi(y + v) - psi(y)|, v what is off the plane, psi the network from `depth` on
    units        share of MLP units past their natural range between the site and `depth`
    contexts     I2 of the effect over the pairs' subsets

Each stands beside the same quantity for natural states, and the row "clean" gives what the pairs' own unchanged
states have: a site can be as far off as that without having done anything. There is no total score; the columns answer
different questions (see `natural_distance`, `off_manifold`, `heterogeneity`).

Fixed: the text up to the reward position in psi; mean and SD of half of the natural prompts. What this cannot show:
that a divergence is harmless (evaluation states are finite), or harmful (a claim about a part may not mind).

Reference: Grant et al. 2025, arXiv 2511.04638.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.methods.causation.downstream import Downstream, NaturalStates, Psi, Units, downstream, natural_states
from reward_lens.methods.causation.heterogeneity import heterogeneity
from reward_lens.methods.causation.interchange import Interchange, require_apart, sites_named
from reward_lens.methods.causation.natural_distance import against_halves, distances, permutation_p
from reward_lens.methods.causation.off_manifold import null_space_test, off_plane
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

FEWEST_EVALUATION, ENOUGH_EVALUATION = 30, 200
TESTED = 10  # states a site put to the null-space test where psi is not just the norm and the head
CLEAN = "clean"
# What a value is of, and its unit: of a site, with the natural counterpart beside it, and of one pair at a site.
OF_SITE = {
    "effect": "reward", "energy distance": "natural SD", "energy baseline": "natural SD", "energy ratio": "ratio",
    "permutation p": "probability", "permutation p (BH)": "probability", "local PCA distance": "natural SD",
    "local PCA baseline": "natural SD", "reward change": "reward", "reward change, natural": "reward",
    "share harmless": "fraction", "share harmless, natural": "fraction", "hidden units": "fraction",
    "hidden units, natural": "fraction", "effect I2": "fraction", "effect I2 low": "fraction",
    "effect I2 high": "fraction", "effect Q": "Q", "effect Q p": "probability",
}  # fmt: skip
OF_PAIR = {
    "effect": "reward", "local PCA distance": "natural SD", "reward change": "reward", "share harmless": "fraction",
    "hidden units": "fraction",
}  # fmt: skip


@checked_arguments
@torch.no_grad()
def divergence(
    rm: RewardModel,
    pairs,
    interventions: Any,
    natural_pairs,
    *,
    depth: int | None = None,
    at: str | range = "final",
    mode: str = "noise",
    natural_class: str | None = None,
    n_neighbours: int = 50,
    variance: float = 0.95,
    eps: float | None = None,
    n_evaluation: int = ENOUGH_EVALUATION,
    min_evaluation: int = FEWEST_EVALUATION,
    n_tested: int | None = None,
    n_permutations: int = 999,
    by: str = "site",
    seed: int = 0,
) -> Result:
    """How far the states downstream of an intervention are from natural ones, and whether the reward notices.

    Parameters
    ----------
    interventions: "components", "heads", "residual", a list of sites, or a Result of `effects`, whose sites, mode and
        positions are run again (then `mode` and `at` are not read).
    natural_pairs: pairs of other prompts (a shared prompt raises `DataError`). Half of their prompts give mean, SD
        and the units' ranges, the other half is what is compared. Mean and resample take their values from a third of
        the prompts, which are no natural states then: a state is close to what it was made from.
    depth: where the states are compared, after every site; None: the pre-norm residual.
    natural_class: which responses are natural states. None: both for noise and denoise, the chosen ones for the
        ablations, whose runs are chosen responses. Of both, the energy distance is that to the nearer class
        (coordinate `nearer_class`) and its p the larger of the two: "like neither". All other columns pool them.
    n_neighbours, variance: natural neighbours of a state, and the share of their variance its plane holds.
    eps: largest harmless change of the reward; None: 0.05 SD of the reward over the natural states.
    n_evaluation, min_evaluation: most evaluation states used, and the fewest accepted.
    n_tested: states a site put to the null-space test; None: all at the last depth, else 10 (each is one run of every
        evaluation text from `depth` on).
    by: "site", or "pair" for the measures that single states have, with an interval over prompts.

    Returns value (component, measure), or (pair, component, measure). The coordinate `unit` says what a measure is in;
    `component` ends with the row "clean", the pairs' own states. "reward change" is D of Algorithm 1, its median over
    states; the p-value takes one state a prompt and is adjusted over the sites. The check "states give the rewards"
    holds the states against the patched rewards. NaN: no block with units between site and `depth`, subsets too few
    for I2, or states not put to the test.

    Raises `DataError` where the data cannot answer: fewer than 6 prompts, or 12 natural ones; natural states fewer
    than `n_neighbours` or `min_evaluation`. Source: Grant et al. 2025, arXiv 2511.04638.
    """
    bad = by not in ("site", "pair") or natural_class not in (None, "both", "chosen", "rejected")
    if bad or not 0 < variance <= 1 or (eps is not None and eps < 0) or (n_tested is not None and n_tested < 1):
        raise DataError(
            "Divergence was asked for something it does not have",
            found=f"by={by!r}, natural_class={natural_class!r}, variance={variance}, eps={eps}, n_tested={n_tested}",
            expected="by 'site' or 'pair', natural_class 'both', 'chosen' or 'rejected', variance over 0 and up to 1, "
            "eps at least 0, n_tested at least 1",
            do="pass one of these",
        )
    pairs, natural_pairs = data.as_pairs(pairs), data.as_pairs(natural_pairs)
    require_apart(pairs, natural_pairs)
    named = interventions
    if isinstance(interventions, Result):
        named, mode, at = _settings_of(interventions)
    depth = rm.n_layers if depth is None else depth
    if not 1 <= depth <= rm.n_layers:
        raise DataError("There is no such depth after a site", found=f"depth={depth}",
                        expected=f"1 to {rm.n_layers}", do="pass one of these, or None for the last")  # fmt: skip
    sites = sites_named(rm, named, depth)
    natural_hash, given = data.inputs_hash(natural_pairs), natural_pairs
    if mode in ("mean", "resample") and natural_pairs.n_prompts >= 2 * stats.FEWEST:  # fewer are refused below
        given, natural_pairs = set_aside(natural_pairs, seed)
    plan = Interchange(rm, sites, mode, at, given, seed)
    of_class = natural_class or ("both" if mode in ("noise", "denoise") else "chosen")
    rng = np.random.default_rng(seed)
    natural = natural_states(rm, natural_pairs, depth, of_class, rng)
    _require_enough(pairs, natural_pairs, natural, n_neighbours, n_evaluation, min_evaluation)
    units = Units(rm, sites, depth, natural.tokens, natural.reference)
    run = downstream(rm, pairs, plan, depth, units, float(natural.rewards.std(ddof=1)))
    planes = _off_planes(rm, natural, run, depth, n_neighbours, variance, n_evaluation, n_tested, eps, rng)
    if by == "pair":
        table, nearer, reasons = _of_pairs(run, planes), None, []
    else:
        table, nearer, reasons = _of_sites(rm, pairs, natural, run, planes, units, n_permutations, rng)
    measures = OF_PAIR if by == "pair" else OF_SITE
    labels = [str(site) for site in sites] + [CLEAN]
    coords = {
        "component": np.array(labels, dtype=object),
        "layer": ("component", np.array([-1 if s.layer is None else s.layer for s in sites] + [rm.n_layers])),
        "measure": np.array(list(measures), dtype=object),
        "unit": ("measure", np.array(list(measures.values()), dtype=object)),
    }
    if nearer is not None:
        coords["nearer_class"] = ("component", np.array(nearer, dtype=object))
    meta: dict[str, Any] = {
        "title": "Divergence of intervened states",
        "settings": {
            "sites": labels[:-1], "mode": mode, "at": str(at), "depth": depth, "natural_class": of_class, "by": by,
            "n_neighbours": n_neighbours, "variance": variance, "eps": planes.eps,
            "eps_rule": "0.05 SD of the reward over the natural states" if eps is None else "given",
            "n_natural": len(natural.states), "n_natural_prompts": natural_pairs.n_prompts,
            "n_evaluation": planes.n_evaluation, "evaluation_subsets": planes.subsets, "n_tested": planes.n_tested,
            "n_permutations": n_permutations, "natural_hash": natural_hash,
            "n_value_prompts": given.n_prompts if given is not natural_pairs else 0,
        },
        "shows": "How far the states after an intervention are from natural ones, in several measures that each stand "
        "beside their natural counterpart.",
        "cannot_show": "That a divergence is harmless or harmful: other inputs may respond to it, and a claim about "
        "one part of the network may be hurt by what leaves the reward alone.",
    }  # fmt: skip
    note = f"{ENOUGH_EVALUATION} are recommended, of several subsets; {len(planes.subsets)} subsets here"
    checks = [
        Check("states give the rewards", run.gap, 1e-2 if rm.sixteen_bit else 1e-5),
        Check("evaluation states", float(planes.n_evaluation), float("inf"), note),
    ]
    untested = ["states not put to the null-space test"] if by == "pair" and planes.n_tested < len(pairs) else []
    undefined = "; ".join(dict.fromkeys([*units.reasons, *reasons, *untested])) or None
    if by == "pair":
        return paired_result(rm, "divergence", pairs, table, ("pair", "component", "measure"), coords,
                             unit="by measure", checks=checks, undefined=undefined, seed=seed, **meta)  # fmt: skip
    value = xr.DataArray(table, dims=("component", "measure"), coords=coords)
    return Result("divergence", value, unit="by measure", checks=checks, undefined=undefined,
                  meta=rm.describe("divergence", pairs, seed=seed, **meta))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _OffPlanes:
    """Of every state the distance from its local plane, and of those tested D; natural states the same."""

    distance: Float[np.ndarray, "pair row"]
    natural_distance: Float[np.ndarray, " run"]
    worst: Float[np.ndarray, "pair row"]
    """NaN where a state was not tested."""
    natural_worst: Float[np.ndarray, " tested"]
    eps: float
    n_tested: int
    n_evaluation: int
    subsets: list[str]


def _off_planes(
    rm: RewardModel, natural: NaturalStates, run: Downstream, depth: int, n_neighbours: int, variance: float,
    n_evaluation: int, n_tested: int | None, eps: float | None, rng: np.random.Generator,
) -> _OffPlanes:  # fmt: skip
    """Neighbours and planes are found among standardised states; psi gets v back in the residual stream's own units."""
    n_pairs, n_rows, width = run.states.shape
    z, sd = natural.standard(natural.states), natural.standard.sd
    eps = 0.05 * float(natural.rewards.std(ddof=1)) if eps is None else eps
    few = n_pairs if n_tested is None and depth == rm.n_layers else n_tested or TESTED
    tested = np.sort(rng.permutation(n_pairs)[:few])
    natural_tested = np.sort(rng.permutation(len(z))[: few if n_tested is not None or depth < rm.n_layers else None])
    chosen = np.sort(rng.permutation(len(z))[:n_evaluation])

    other_prompt = natural.prompts[:, None] != natural.prompts[None]
    v, _ = off_plane(z, z, n_neighbours, variance, apart=other_prompt)
    natural_distance, moves = np.linalg.norm(v, axis=1) / np.sqrt(width), [(v * sd)[natural_tested]]
    distance, worst = np.empty((n_pairs, n_rows)), np.full((n_pairs, n_rows), np.nan)
    for row in range(n_rows):
        v, _ = off_plane(natural.standard(run.states[:, row]), z, n_neighbours, variance)
        distance[:, row] = np.linalg.norm(v, axis=1) / np.sqrt(width)
        moves.append((v * sd)[tested])
    all_worst, _ = null_space_test(np.concatenate(moves), Psi(rm, natural, depth, chosen.tolist()).change, eps)
    natural_worst = all_worst[: len(natural_tested)]
    worst[tested] = all_worst[len(natural_tested) :].reshape(n_rows, len(tested)).T
    subsets = sorted(set(natural.subsets[chosen]))
    return _OffPlanes(distance, natural_distance, worst, natural_worst, eps, len(tested), len(chosen), subsets)


def _of_pairs(run: Downstream, planes: _OffPlanes) -> Float[np.ndarray, "pair row measure"]:
    harmless = np.where(np.isnan(planes.worst), np.nan, planes.worst <= planes.eps)
    return np.stack([run.effects, planes.distance, planes.worst, harmless, run.hidden], -1)


def _of_sites(
    rm: RewardModel, pairs: data.Pairs, natural: NaturalStates, run: Downstream, planes: _OffPlanes, units: Units,
    n_permutations: int, rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "row measure"], list[str], list[str]]:  # fmt: skip
    """The table of `OF_SITE`, the nearer class of each row, and why some cells are empty."""
    prompts = [p.prompt_key for p in pairs]
    contexts = [p.subset or "" for p in pairs]
    firsts = sorted({key: i for i, key in reversed(list(enumerate(prompts)))}.values())  # one state a prompt
    compared = {name: natural.standard(natural.states[runs]) for name, runs in natural.compared.items()}
    natural_harmless = float((planes.natural_worst <= planes.eps).mean())
    seed, reasons, nearer, rows = int(rng.integers(2**32)), [], [], []
    for row, natural_units in enumerate(units.baseline()):
        states = natural.standard(run.states[firsts, row])
        distance, baseline, p, which = _nearest_class(states, compared, n_permutations, seed)
        nearer.append(which)
        worst = planes.worst[:, row][~np.isnan(planes.worst[:, row])]
        spread = heterogeneity(run.effects[:, row], contexts, prompts, floor=rm.noise_floor)
        reasons += [spread.reason] if spread.reason else []
        rows.append([
            run.effects[:, row].mean(), distance, baseline, distance / baseline, p, p,
            planes.distance[:, row].mean(), planes.natural_distance.mean(),
            np.median(worst), np.median(planes.natural_worst), (worst <= planes.eps).mean(), natural_harmless,
            run.hidden[:, row].mean(), natural_units,
            spread.i2, spread.low, spread.high, spread.q, spread.p,
        ])  # fmt: skip
    table = np.array(rows)
    raw, adjusted = (list(OF_SITE).index(name) for name in ("permutation p", "permutation p (BH)"))
    table[:-1, adjusted] = stats.adjust(table[:-1, raw], "bh")  # the clean row is no site
    return table, nearer, reasons


def _nearest_class(
    states: Float[np.ndarray, "n d"], natural: dict[str, Float[np.ndarray, "m d"]], n_permutations: int, seed: int
) -> tuple[float, float, float, str]:
    """Energy distance, baseline, p and name of the nearer class.

    States of one class are no mixture of both, so each class is compared on its own. The larger of the two p-values is
    that of the claim "like neither class"; it errs at no more than its rate where the states are like either.
    """
    # The same subsets and relabellings for every site: sites then differ by their states alone.
    rows, n = [], len(states)
    for name, theirs in natural.items():
        apart = distances(states, theirs)
        distance, baseline = against_halves(apart, n, np.random.default_rng(seed))
        rows.append((distance, baseline, permutation_p(apart, n, n_permutations, seed), name))
    distance, baseline, _, name = min(rows)
    return distance, baseline, max(p for _, _, p, _ in rows), name


def _settings_of(effects: Result) -> tuple[Any, str, str]:
    """Sites, mode and positions of a Result of `effects`."""
    settings = effects.meta.get("settings", {})
    plain = {"path": "total", "norm": "live", "align": None, "spans": None, "layers": None}
    unlike = {key: settings[key] for key, usual in plain.items() if settings.get(key, usual) not in (usual, None)}
    if not {"sites", "mode", "at"} <= set(settings) or unlike:
        raise DataError(
            "These interventions cannot be run again",
            found=f"a result '{effects.name}' with " + (str(unlike) if unlike else f"settings {sorted(settings)}"),
            expected="a Result of `effects` (total effects, live norm, no alignment, spans or layers)",
            do="pass the sites themselves, with mode= and at=",
        )
    return settings["sites"], settings["mode"], settings["at"]


def set_aside(pairs: data.Pairs, seed: int) -> tuple[data.Pairs, data.Pairs]:
    """The pairs of a third of the prompts, and the others."""
    prompts = np.random.default_rng(seed).permutation(sorted({pair.prompt_key for pair in pairs}))
    chosen = set(prompts[: len(prompts) // 3].tolist())
    return data.by_prompt(pairs, chosen)


def _require_enough(
    pairs: data.Pairs, natural_pairs: data.Pairs, natural: NaturalStates, n_neighbours: int, n_evaluation: int,
    min_evaluation: int,
) -> None:  # fmt: skip
    """Raise where the data cannot answer, with the number that would do."""
    n = len(natural.states)
    others = n - max(int((natural.prompts == prompt).sum()) for prompt in set(natural.prompts))
    needs = [
        (pairs.n_prompts, stats.FEWEST, "prompts among the pairs", "pass pairs of more prompts"),
        (natural_pairs.n_prompts, 2 * stats.FEWEST, "natural prompts", "pass natural pairs of more prompts"),
        (others, n_neighbours, "natural states of other prompts, to be the neighbours of one",
         "pass more natural pairs, or a smaller n_neighbours"),
        (min(n, n_evaluation), min_evaluation, "natural states to evaluate on",
         "pass more natural pairs, or a smaller min_evaluation"),
    ]  # fmt: skip
    for found, needed, what, do in needs:
        if found < needed:
            raise DataError("There is too little data to tell divergence from chance", found=f"{found} {what}",
                            expected=f"at least {needed}", do=do)  # fmt: skip
