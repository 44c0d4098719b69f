"""The direct path: a site is changed in what the reward head reads, and nowhere else; everything later is frozen.

With h the pre-norm residual of the changed run, u its effective direction, c the site's write there and c' what it is
replaced by, the loss of reward splits exactly:

    direct        u . (c - c')                                 the final norm's scale frozen
    norm_rescale  [r(h) - r(h - c + c')] - u . (c - c')        what the norm's own answer adds (and the head's, where it
                                                               is not linear)
    mediated      total - [r(h) - r(h - c + c')]               what later components do about it
    total         the total effect, everything after the site recomputed (`effects`)

In post-norm blocks c and c' are what is left of the writes behind the norms that follow (`contributions`), each run's
scales frozen; the state with c replaced by c' is that of the stream with the one write replaced and all norms live, so
that `norm_rescale` is what every norm behind the write answers.

A prompt-gated head has a second direct route, where the gate reads the site's write. With p its position and g, g' what
it reads before and after,

    direct, norm_rescale   as above, the gate held at g
    gate                   r(h, g) - r(h, g')
    interaction            what both changes do beyond the two: r(h, g) - r(h - c + c', g') less the three above
    mediated               total - [r(h, g) - r(h - c + c', g')]

Both are exactly 0 where the change does not reach the gate's position.

(signs as in `effects`: for denoise the differences are turned round). `direct` is made of contributions: its noise and
denoise mean is the shared margin split and its zero ablation the contribution itself (E7). That is an identity, not
evidence for either. The last write has no mediated part, which is checked. A head's or a neuron's write is its own
share of its block's write, each run's post-norm scale frozen where the block has a post-norm, as in `contributions`;
the live difference is taken through the post-norm.

Reference: Wang et al. 2022, arXiv 2211.00593 (path patching); Elhage et al. 2021 (direct attribution).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_lens.engine.activations import Activations, capture, positions_of
from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.places import gate_inside, require_behind_gate
from reward_lens.errors import DataError
from reward_lens.methods.causation.ablations import Ablation, drawn_references, prepare_ablation
from reward_lens.methods.causation.effect_sweeps import site_coords
from reward_lens.methods.observation.splits import ComponentSplit, HeadSplit, NeuronSplit, Split
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.readout import PromptGated, read_size
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

PARTS = ("direct", "norm_rescale", "mediated", "total")
GATED_PARTS = ("direct", "norm_rescale", "gate", "interaction", "mediated", "total")
SPLIT_OF = {"embed": ComponentSplit, "attn": ComponentSplit, "mlp": ComponentSplit, "head": HeadSplit,
            "neuron": NeuronSplit}  # fmt: skip


@torch.no_grad()
def direct_effects(
    rm: RewardModel, pairs, sites: Sequence[Site], settings: dict, *, reference, n_draws: int, seed: int,
    max_rows: int | None, progress,
) -> Result:  # fmt: skip
    """`effects(path="direct")`. Returns value (pair[, side], component, part) in reward units."""
    from reward_lens.methods.causation.effects import effects

    whole = [str(s) for s in sites if s.kind not in SPLIT_OF or (s.kind in ("head", "neuron") and s.index is None)]
    if whole:
        raise DataError(
            "Only a write has a direct effect",
            found=", ".join(whole[:4]),
            expected="embed, attention and MLP writes, single heads and neurons",
            do="use path='total' for residual streams, whole layers of heads, queries, keys and values",
        )
    mode = settings["mode"]
    if mode in ("mean", "resample") and settings["at"] != "final":
        raise DataError(
            "The direct path of a mean or a resampled value was asked for at several positions",
            found=f"mode={mode!r}, at={settings['at']!r}",
            expected="at='final': the direct path ends in what the reward head reads there",
            do="use at='final', or mode='zero', 'noise' or 'denoise'",
        )
    total = effects(
        rm, pairs, sites, mode, settings["at"], align=settings["align"], reference=reference, n_draws=n_draws,
        seed=seed, max_rows=max_rows, progress=progress,
    )  # fmt: skip
    writes = Writes(rm, sites)
    ablation = None
    if mode in ("mean", "resample", "zero"):
        ablation = prepare_ablation(rm, pairs, sites, mode, settings["at"], reference, n_draws, seed)
        settings["reference"] = ablation.name
    for pair, both in zip(pairs, rm.tokenize_pairs(pairs), strict=True) if ablation is None else ():
        base, source = both if mode == "noise" else both[::-1]
        require_behind_gate(rm, base, aligned(base, source, settings["at"], settings["align"], str(pair.id)).base)
    found = [_of_pair(rm, writes, pair, mode, settings["at"], ablation) for pair in pairs]
    frozen, live, sizes = (np.stack(part) for part in zip(*found, strict=True))  # [pair(, side), site(, 3)], [pair]
    value, gate, whole = np.moveaxis(live, -1, 0)
    totals = total.value.values
    parts = [frozen, value - frozen, gate, whole - value - gate, totals - whole, totals]
    names = GATED_PARTS if isinstance(rm.readout, PromptGated) else PARTS
    values = np.stack([part for name, part in zip(GATED_PARTS, parts, strict=True) if name in names], -1)
    if mode in ("mean", "resample", "zero"):
        values[:, 2] = values[:, 0] - values[:, 1]
    mediated = values[..., names.index("mediated")]
    checks = [c for c in total.checks if c.name == "clean row"] + _last_write(rm, sizes, sites, mediated)
    dims = (*map(str, total.value.dims), "part")
    settings["norm"] = "frozen and live, apart"
    kinds = {s.kind for s in sites}
    of = f" of {kinds.pop()}s" if kinds in ({"head"}, {"neuron"}) else ""
    return paired_result(
        rm, "effects", pairs, values, dims, {**site_coords(sites), "part": np.array(names, dtype=object)},
        checks=checks, settings=settings, seed=seed, noise_floor=rm.noise_floor,
        title=f"Direct and mediated effects{of} ({mode}, {settings['at']})",
        shows="What a site's change does to what the reward head reads (direct), what the final norm's answer adds "
        "(norm rescale), what later components do about it (mediated) and, under a prompt gate, what the gate reads of "
        "it (gate, interaction): these sum to the total effect.",
        cannot_show="The direct part is made of contributions, the change of the site's write along one run's reward "
        "direction: that it goes with them is an identity and no evidence.",
    )  # fmt: skip


class Writes:
    """The sites' writes at the reward position: their products with a direction, and their live differences."""

    def __init__(self, rm: RewardModel, sites: Sequence[Site]):
        self.rm, self.sites = rm, list(sites)
        self.splits: dict[type, Split] = {kind: kind(rm) for kind in {SPLIT_OF[s.kind] for s in sites}}
        self.column = {}
        for kind, split in self.splits.items():
            place = {label: i for i, label in enumerate(split.labels("own")[0])}
            self.column |= {s: (kind, place[str(s)]) for s in sites if SPLIT_OF[s.kind] is kind}
        self.needed = list(dict.fromkeys(site for split in self.splits.values() for site in split.sites))

    def dots(self, acts: Activations, u: Tensor) -> Tensor:
        """[run, site]: each run's writes times that run's row of `u`, float64."""
        by_split = {kind: split.dots(acts, u).double() for kind, split in self.splits.items()}
        return torch.stack([by_split[kind][:, i] for kind, i in (self.column[s] for s in self.sites)], 1)

    def moved(self, site: Site, own: Activations, new: Tensor, run: int) -> Tensor:
        """[d_model] what the block's write gains when the site's value in `run` becomes `new`, post-norm live."""
        if site.kind not in ("head", "neuron"):
            return new - own[site][run]
        split: Any = self.splits[SPLIT_OF[site.kind]]
        x = own[Site(site.kind, site.layer)][run]
        changed = x.clone()
        changed[site.index] = new
        before, after = (split.write(v.flatten()[None], site.block)[0] for v in (x, changed))
        return after - before

    def behind_norms(self, acts: Activations, run: int, moved: Tensor) -> Tensor:
        """[1 + site, d_model] final states of a post-norm run, first as it is, then with one block's write moved: the
        other writes are held, the norms behind every write live."""
        order: list[Site] = next(iter(self.splits.values())).writes
        stream = [acts[site][run].expand(1 + len(moved), -1).clone() for site in order]
        for row, (site, by) in enumerate(zip(self.sites, moved, strict=True), start=1):
            whole = {"head": "attn", "neuron": "mlp"}.get(site.kind, site.kind)
            stream[order.index(Site(whole, site.layer))][row] += by
        return self.rm.trunk.carrier.final(stream[0], stream[1:])

    def value(self, site: Site, acts: Activations, run: int) -> Tensor:
        """The site's value in one run."""
        if site.kind in ("head", "neuron"):
            return acts[Site(site.kind, site.layer)][run, site.index]
        return acts[site][run]


def _of_pair(rm, writes: Writes, pair, mode: str, at: str, ablation: Ablation | None) -> tuple[np.ndarray, ...]:
    """Frozen [site] and live [site, 3] direct effects of one pair (see `_live`), with the sides before them for
    ablations (the margin is left empty); and the scale of the head's sum."""
    acts = capture(rm, [pair], writes.needed)
    h = acts[Site("resid_post", rm.n_layers - 1)]
    inputs = rm.readout_inputs(acts.tokens)
    size = float(read_size(rm.readout, h, inputs).max())
    u = rm.readout.direction(h, inputs).u
    if ablation is None:
        base, source, sign = (0, 1, 1) if mode == "noise" else (1, 0, -1)
        cross = writes.dots(acts, u[[base, base]])
        frozen = sign * (cross[base] - cross[source])
        new = [writes.value(s, acts, source) for s in writes.sites]
        live = sign * _live(rm, writes, acts, h, base, new)
        return frozen.cpu().numpy(), live.cpu().numpy(), np.array(size)
    sides = []
    for run in (0, 1):
        own = writes.dots(acts, u)[run]
        if mode == "zero":
            none = [torch.zeros_like(writes.value(s, acts, run)) for s in writes.sites]
            frozen, live = own, _live(rm, writes, acts, h, run, none, _at_gate(rm, writes, acts.tokens[run], at))
        else:
            frozen, live = _against_references(rm, writes, ablation, pair, acts, h, u, run, own)
        sides.append((frozen.cpu().numpy(), live.cpu().numpy()))
    frozen, live = (np.stack([a, b, np.full_like(a, np.nan)]) for a, b in zip(*sides, strict=True))
    return frozen, live, np.array(size)


def _against_references(rm, writes, ablation, pair, acts, h, u, run, own):
    """Mean over the references (mean: of their values; resample: of the effects)."""
    references = drawn_references(rm, ablation, pair, writes.needed)
    n = len(references.tokens)
    theirs = writes.dots(references, u[run].expand(n, -1))
    frozen = own - theirs.mean(0)
    if ablation.mode == "mean":
        means = [torch.stack([writes.value(s, references, i) for i in range(n)]).mean(0) for s in writes.sites]
        return frozen, _live(rm, writes, acts, h, run, means)
    each = [_live(rm, writes, acts, h, run, [writes.value(s, references, i) for s in writes.sites]) for i in range(n)]
    return frozen, torch.stack(each).mean(0)


def _live(
    rm, writes: Writes, acts: Activations, h: Tensor, run: int, new: Sequence[Tensor],
    at_gate: Activations | None = None,
) -> Tensor:  # fmt: skip
    """[site, 3]: reward of the run less that with one write replaced in what the head reads, norm live: at the reward
    position, at the gate's position, at both. `at_gate` holds the writes there where the change reaches it."""

    def replaced(held: Activations, place: int) -> Tensor:
        return torch.stack([writes.moved(s, held, v, place) for s, v in zip(writes.sites, new, strict=True)])

    gate, read = rm.readout_inputs([acts.tokens[run]]), rm.readout.reward
    moved = replaced(acts, run)
    states = writes.behind_norms(acts, run, moved) if rm.trunk.norms else torch.cat([h[run][None], h[run] + moved])
    changed = states[1:]
    value = read(states, gate).double()
    losses = value[0] - value[1:]
    if gate is None or at_gate is None:
        return torch.stack([losses, torch.zeros_like(losses), losses], -1)
    gates = gate + replaced(at_gate, 0)
    through, whole = (read(states, gates).double() for states in (h[run].expand_as(changed), changed))
    return torch.stack([losses, value[0] - through, value[0] - whole], -1)


def _at_gate(rm: RewardModel, writes: Writes, text: Tokens, at: str) -> Activations | None:
    """The writes where a prompt-gated head reads its weights, if a change at these positions reaches that."""
    gate = gate_inside(rm, text, 0)
    if gate is None or gate not in positions_of(text, at):
        return None
    return capture(rm, [text.first(gate + 1)], writes.needed)


def _last_write(rm: RewardModel, sizes: np.ndarray, sites: Sequence[Site], mediated: np.ndarray) -> list[Check]:
    """Nothing comes after the last MLP (in parallel blocks, after either write): its mediated part is zero."""
    last = rm.n_layers - 1
    kinds = ("mlp", "neuron", *(("attn", "head") if rm.structure.parallel else ()))
    columns = [i for i, s in enumerate(sites) if s.layer == last and s.kind in kinds]
    if not columns:
        return []
    worst = np.abs(mediated[..., columns]).reshape(len(sizes), -1).max(1)
    return [Check("last write is not mediated", float((worst / sizes).max()), 2e-2 if rm.sixteen_bit else 1e-5)]
