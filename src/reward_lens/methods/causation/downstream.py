"""The residual stream further down the network: of natural texts, after an intervention, and what the rest makes of it.

    h_d       what enters block d at the reward position (d = n_layers: the pre-norm residual)
    h^_d      the same with a site changed; everything after the site is recomputed
    psi(h_d)  the reward when h_d stands there: the blocks from d on, with the text before the reward position as it is,
              then norm and head. At the last depth norm and head alone.

MLP units are read in the same patched run, where the write's output map reads them, by an edit that gives back what it
sees. What this cannot show: anything about other positions; they are part of psi.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reward_lens import data
from reward_lens.engine.activations import CHUNK_BYTES, capture
from reward_lens.engine.intervention import Source, add
from reward_lens.engine.patching import Edit, Row, patch_rows
from reward_lens.engine.places import out_map, require_site
from reward_lens.errors import StructureError
from reward_lens.methods.causation.interchange import Interchange, first_mlp
from reward_lens.methods.causation.natural_distance import Standard, natural_standard
from reward_lens.methods.causation.off_manifold import UnitRange, natural_range
from reward_lens.model.linear_maps import linear_weight
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

_ROWS_AT_ONCE = 4096  # residuals that go through norm and head together


@dataclasses.dataclass(frozen=True)
class NaturalStates:
    """Residuals of natural texts at one depth, split by prompt into a half that gives the scale and one to compare."""

    tokens: tuple[Tokens, ...]
    states: Float[np.ndarray, "run d"]
    rewards: Float[np.ndarray, " run"]
    prompts: np.ndarray
    """Prompt key of each run."""
    subsets: np.ndarray
    reference: Bool[np.ndarray, " run"]
    """The half that gives mean, SD and the ranges of units."""
    compared: dict[str, Int[np.ndarray, " prompt"]]
    """Of each class one run a prompt of the other half."""
    standard: Standard


def natural_states(
    rm: RewardModel, pairs: data.Pairs, depth: int, of_class: str, rng: np.random.Generator
) -> NaturalStates:
    """States of the pairs' responses: "both", "chosen" or "rejected" ones."""
    here, last = residual_site(depth), residual_site(rm.n_layers)
    acts = capture(rm, pairs, dict.fromkeys([here, last]), "final")
    which = {"both": slice(None), "chosen": slice(0, None, 2), "rejected": slice(1, None, 2)}[of_class]
    prompts, subsets = (np.repeat(np.array(names, dtype=object), 2)[which] for names in
                        ([p.prompt_key for p in pairs], [p.subset or "" for p in pairs]))  # fmt: skip
    classes = np.tile(np.array(["chosen", "rejected"], dtype=object), len(pairs))[which]
    states = acts[here][which].double().cpu().numpy()
    tokens = acts.tokens[which]
    rewards = rm.readout.reward(acts[last][which], rm.readout_inputs(tokens)).double().cpu().numpy()
    order = rng.permutation(sorted(set(prompts)))
    reference = np.isin(prompts, order[: len(order) // 2])
    compared = {
        name: np.array([np.flatnonzero((prompts == p) & (classes == name))[0] for p in order[len(order) // 2 :]])
        for name in dict.fromkeys(classes)
    }
    return NaturalStates(
        tokens, states, rewards, prompts, subsets, reference, compared, natural_standard(states[reference])
    )


def residual_site(depth: int) -> Site:
    """The residual stream that enters block `depth`; n_layers: the pre-norm residual."""
    return Site("resid_post", depth - 1) if depth else Site("embed")


class Units:
    """The MLP units between each site and `depth`: their natural ranges, and which of them a run goes beyond."""

    def __init__(
        self, rm: RewardModel, sites: Sequence[Site], depth: int, tokens: Sequence[Tokens], reference: np.ndarray
    ):
        self.first = [first_mlp(rm, site) for site in sites]
        self.depth, self.reasons = depth, []
        layers = list(range(min(self.first), depth))
        if any(first >= depth for first in self.first):
            self.reasons.append("no MLP between the site and the depth")
        self.ranges: dict[int, UnitRange] = {}
        self.natural: dict[int, float] = {}
        try:
            for layer in layers:
                require_site(rm, Site("neuron", layer))
        except StructureError as error:
            self.reasons.append(f"units cannot be read ({error.found})")
            layers = []
        width = max((linear_weight(out_map(rm, layer, "mlp")).shape[1] for layer in layers), default=1)
        at_once = max(1, CHUNK_BYTES // (4 * width * len(tokens)))
        for start in range(0, len(layers), at_once):
            wanted = {layer: Site("neuron", layer) for layer in layers[start : start + at_once]}
            acts = capture(rm, tokens, list(wanted.values()), "final")
            for layer, site in wanted.items():
                values = acts[site].double().cpu().numpy()
                self.ranges[layer] = natural_range(values[reference])
                self.natural[layer] = float(self.ranges[layer].outside(values[~reference]).mean())

    def layers(self, first: int) -> list[int]:
        """Blocks whose units come after a site, up to the depth."""
        return [layer for layer in self.ranges if layer >= first]

    def baseline(self) -> Float[np.ndarray, " row"]:
        """Natural share outside the range, for the units after each site and (last) after the first of them."""
        return np.array([self._mean(self.natural, first) for first in [*self.first, min(self.first)]])

    def reading(self, position: int, first: int, seen: dict[int, float]) -> Row:
        """Edits that change nothing and note in `seen` the share of each block's units outside their range."""

        def keep(x: Tensor, site: Site, run: int, positions) -> Tensor:
            values = x[-1].detach().double().cpu().numpy()
            seen[site.block] = float(self.ranges[site.block].outside(values).mean())
            return x

        at = range(position, position + 1)
        return tuple(Edit(Site("neuron", layer), at, Source("read", keep)) for layer in self.layers(first))

    def share(self, seen: dict[int, float], first: int) -> float:
        """Share of the units after a site that were outside their range; NaN where there are none."""
        return self._mean(seen, first)

    def _mean(self, shares: dict[int, float], first: int) -> float:
        layers = self.layers(first)
        return float(np.mean([shares[layer] for layer in layers])) if layers else float("nan")


@dataclasses.dataclass(frozen=True)
class Downstream:
    """What the patched runs gave. Rows are the sites and, last, the clean run."""

    states: Float[np.ndarray, "pair row d"]
    effects: Float[np.ndarray, "pair row"]
    hidden: Float[np.ndarray, "pair row"]
    """Share of the units after the site that are outside their natural range."""
    gap: float
    """Largest distance of a row's reward from that of its pre-norm residual, over the larger of the pair's largest
    reward and `spread`."""


@torch.no_grad()
def downstream(
    rm: RewardModel, pairs: data.Pairs, plan: Interchange, depth: int, units: Units, spread: float
) -> Downstream:
    """Run every pair with each site changed. `spread` is the SD of the reward."""
    states, effects, hidden, gaps = [], [], [], []
    firsts = [*units.first, min(units.first)]
    for pair, tokens in zip(pairs, rm.tokenize_pairs(pairs), strict=True):
        base = plan.base(tokens)
        seen: list[dict[int, float]] = [{} for _ in firsts]
        reads = [units.reading(base.reward_pos, first, s) for first, s in zip(firsts, seen, strict=True)]
        rows = [(edit, *read) for edit, read in zip(plan.edits(pair, tokens), reads[:-1], strict=True)]
        out = patch_rows(rm, base, [*rows, *([reads[-1]] if reads[-1] else [])], (depth, rm.n_layers))
        rewards, clean = out.rewards[: len(rows)], out.clean[: len(rows)]
        gate = None if out.gate is None else out.gate[: len(rows)]
        given = rm.readout.reward(out.states[rm.n_layers][: len(rows)], gate).double().cpu()
        size = max(spread, float(torch.cat([rewards, clean]).abs().max()))
        gaps.append(float((given - rewards).abs().max()) / size)
        after = torch.cat([out.states[depth][: len(rows)], out.clean_states[depth][None]])
        states.append(after.float().cpu().numpy())
        effects.append([*plan.effect(clean, rewards).tolist(), 0.0])
        hidden.append([units.share(s, first) for s, first in zip(seen, firsts, strict=True)])
    return Downstream(np.stack(states), np.array(effects), np.array(hidden), max(gaps))


class Psi:
    """How the rewards of evaluation texts change when something is added to their state at one depth."""

    def __init__(self, rm: RewardModel, natural: NaturalStates, depth: int, chosen: Sequence[int]):
        self.rm, self.natural, self.depth, self.chosen = rm, natural, depth, chosen

    @torch.no_grad()
    def change(self, added: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n evaluation"]:
        """psi(y + v) - psi(y) for every v in `added` and every evaluation state y."""
        vectors = torch.from_numpy(np.ascontiguousarray(added)).to(self.rm.like)
        if self.depth == self.rm.n_layers:
            return self._by_head(vectors)
        columns = []
        for run in self.chosen:
            text = self.natural.tokens[run]
            at = range(text.reward_pos, text.reward_pos + 1)
            out = patch_rows(self.rm, text, [(Edit(residual_site(self.depth), at, add(v)),) for v in vectors])
            columns.append((out.rewards - out.clean).numpy())
        return np.stack(columns, 1)

    def _by_head(self, vectors: Tensor) -> np.ndarray:
        reward, gates = self.rm.readout.reward, self.rm.readout_inputs([self.natural.tokens[i] for i in self.chosen])
        states = torch.from_numpy(self.natural.states[list(self.chosen)]).to(vectors)
        clean, parts = reward(states, gates), []
        step = max(1, _ROWS_AT_ONCE // len(states))
        for start in range(0, len(vectors), step):
            moved = states + vectors[start : start + step, None]
            parts.append((reward(moved, gates) - clean).double().cpu())
        return torch.cat(parts).numpy()
