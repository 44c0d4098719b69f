"""Zero, mean and resample ablation: what a site is replaced by when nothing of the other response is wanted there.

    zero       the zero vector
    mean       the mean over all tokens of the same role (prompt, response, template tail) of the reference responses
    resample   the value of a reference response drawn at random: position j of n of a role takes position
               floor(j m / n) of the m that the drawn text has of it

At "final" both take the references' reward positions alone, one a response. References are responses to other prompts:
the pair's own prompt is excluded. Queries, keys and attention patterns belong to positions of their own text and cannot
be averaged over others or drawn from them. Zero is a point the network never visits, a mean is off its manifold too, a
resampled value brings another text's information; none of them is "nothing".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.engine.activations import Activations, capture, positions_of
from reward_lens.engine.editing import POSITIONAL, Edit, Source
from reward_lens.engine.intervention import positional_elsewhere, values, zeros
from reward_lens.engine.patching import patch_rows
from reward_lens.engine.run import passes
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import Cells, contiguous
from reward_lens.methods.causation.effect_readings import Reading
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

FEWEST_DRAWS = 20
ROLES = ("prompt", "response", "tail")


@dataclasses.dataclass(frozen=True)
class Ablation:
    """How sites are ablated: a mode, and the reference responses where it needs them."""

    mode: str
    name: str
    """What the references are, for the result."""
    tokens: tuple[Tokens, ...] = ()
    prompts: tuple[str, ...] = ()
    """The prompt of each reference response."""
    means: "dict[Site, dict[tuple[str, str], tuple[Tensor, int]]]" = dataclasses.field(default_factory=dict)
    """Of mean ablation: by site, by (prompt, role), the sum over positions and their number."""
    n_draws: int = FEWEST_DRAWS
    seed: int = 0
    at: str = "final"
    """Where values of references are wanted: at the reward position, or ("response", "all") anywhere."""
    given: Source | None = None
    """A source that stands for a mode."""

    def others(self, prompt: str) -> list[int]:
        """References of other prompts."""
        return [i for i, p in enumerate(self.prompts) if p != prompt]


def prepare_ablation(
    rm: RewardModel, pairs, sites: Sequence[Site], mode: str, at: str, reference, n_draws: int, seed: int
) -> Ablation:
    """Check the reference set and, for means, run it once."""
    if mode == "zero":
        return Ablation("zero", "none")
    positional = [site for site in sites if site.kind in POSITIONAL]
    if positional:
        raise positional_elsewhere(f"mode={mode!r}", positional)
    if mode == "resample" and n_draws < FEWEST_DRAWS:
        raise DataError("Too few draws to resample", found=f"n_draws={n_draws}", expected=f"at least {FEWEST_DRAWS}",
                        do="draw more: one draw brings one other text's information")  # fmt: skip
    own = {p.prompt_key for p in pairs}
    held = data.as_pairs(pairs if reference is None else reference)
    if reference is not None:
        shared = [p.id for p in held if p.prompt_key in own]
        if shared:
            raise DataError(
                "The reference set overlaps the pairs it is to stand in for",
                found=f"{len(shared)} reference pairs with a prompt of the pairs ({', '.join(map(str, shared[:3]))})",
                expected="responses to other prompts",
                do="take those pairs out of reference="
                + (", or leave it away: then each pair's own prompt is excluded" if len(own) > 1 else ""),
            )
    lonely = [p.id for p in pairs if all(r.prompt_key == p.prompt_key for r in held)]
    if lonely:
        raise DataError(
            f"There is no reference response for pair {lonely[0]}",
            found=f"{len({p.prompt_key for p in held})} prompt(s) in the reference set",
            expected="at least one other prompt",
            do="pass reference= with pairs of other prompts, or more pairs",
        )
    tokens = tuple(t for both in rm.tokenize_pairs(held) for t in both)
    prompts = tuple(p.prompt_key for p in held for _ in range(2))
    of = f"{len(tokens)} responses to {len(set(prompts))} prompts (inputs {data.inputs_hash(held)})"
    name = f"{of}, the pair's own excluded"
    means = _means(rm, tokens, prompts, sites, at) if mode == "mean" else {}
    return Ablation(mode, name, tokens, prompts, means, n_draws, seed, at)


def ablated_cells(
    rm: RewardModel, ablation: Ablation, pair, run: int, cells: Cells, sites: Sequence[Site], reading: Reading,
    max_rows: int | None,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Of one text: effects [(column,) site, group], their spread over draws, the clean row's gap. `run` is the text's
    number, by which a given source knows it."""
    text = cells.tokens
    draws = _draws(rm, ablation, pair, sites) if ablation.mode == "resample" else [None]
    rows, index = [], []
    for g, group in enumerate(cells.groups):
        if group is None:
            continue
        for s, site in enumerate(sites):
            for d, drawn in enumerate(draws):
                source = source_of(ablation, pair.prompt_key, text, site, group.base, drawn, run)
                rows.append((Edit(site, contiguous(group.base), source),))
                index.append((s, g, d))
    out = patch_rows(rm, text, rows, max_rows=max_rows)
    each = np.full((*reading.shape, len(sites), len(cells.groups), len(draws)), np.nan)
    each[(..., *np.array(index).T)] = -reading.change(out)
    spread = each.std(-1, ddof=1) if len(draws) > 1 else np.zeros(each.shape[:-1])
    return each.mean(-1), spread, out.clean_gap


def source_of(
    ablation: Ablation, prompt: str, text: Tokens, site: Site, positions, drawn: Any = None, run: int = 0
) -> Source:
    """What a site of a text with this prompt is replaced by; `drawn` is the reference that a resample takes, `run` the
    text's number."""
    if ablation.given is not None:
        give = ablation.given.give
        return Source(ablation.name, lambda x, site, row, positions: give(x, site, run, positions))
    if ablation.mode == "zero":
        return zeros()
    if ablation.mode == "mean":
        by_role = {role: _mean(ablation, site, prompt, role) for role in {text.role(p) for p in positions}}
        return values(torch.stack([by_role[text.role(p)] for p in positions]))
    other, held = drawn
    if other is None:  # at the reward position: one value
        return values(held[site])
    at = [_counterpart(text, other, p) for p in positions]
    return values(held[site][at])


def _mean(ablation: Ablation, site: Site, prompt: str, role: str) -> Tensor:
    parts = [v for (p, r), v in ablation.means[site].items() if p != prompt and r == role]
    if not parts:
        raise DataError(
            f"There is no reference value for {role} tokens",
            found="reference texts without such tokens",
            expected=f"at least one {role} token in a reference response of another prompt",
            do="use at='final' or at='response', or references made with the same chat template",
        )
    return torch.stack([total for total, _ in parts]).sum(0) / sum(n for _, n in parts)


def _means(rm, tokens, prompts, sites, at: str) -> dict:
    """Sums by prompt and role; at "final" only the reward position counts, under its own role."""
    sums: dict[Site, dict] = {site: {} for site in sites}
    for batch, tensors in passes(rm, tokens, sites, everywhere=True):
        for row, (run, start) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True)):
            text = tokens[run]
            for role in ROLES:
                where = [p for p in positions_of(text, at) if text.role(p) == role]
                if not where:
                    continue
                for site, x in tensors.items():
                    total, n = sums[site].get((prompts[run], role), (0.0, 0))
                    picked = x[row, [start + p for p in where]].double().sum(0)
                    sums[site][prompts[run], role] = (total + picked, n + len(where))
    return sums


def drawn_references(rm: RewardModel, ablation: Ablation, pair, sites: Sequence[Site]) -> Activations:
    """The references one pair is held against, at the reward position: all (mean) or those drawn (resample)."""
    which = ablation.others(pair.prompt_key) if ablation.mode == "mean" else _drawn(ablation, pair)
    return capture(rm, [ablation.tokens[i] for i in which], sites)


def _drawn(ablation: Ablation, pair) -> list[int]:
    """References drawn for one pair, without replacement where there are enough."""
    rng = np.random.default_rng([ablation.seed, int(pair.prompt_key, 16)])
    others = ablation.others(pair.prompt_key)
    return rng.choice(others, ablation.n_draws, replace=len(others) < ablation.n_draws).tolist()


def _draws(rm: RewardModel, ablation: Ablation, pair, sites) -> list[tuple[Tokens | None, dict]]:
    """Of each draw: the text (None at the reward position, where one value is held) and its values at the sites."""
    drawn = _drawn(ablation, pair)
    different = list(dict.fromkeys(drawn))
    acts = capture(rm, [ablation.tokens[i] for i in different], sites, at="final" if ablation.at == "final" else "all")
    place = {i: n for n, i in enumerate(different)}
    if ablation.at == "final":
        return [(None, {site: acts[site][place[i]][None] for site in sites}) for i in drawn]
    return [(ablation.tokens[i], {site: acts[site][place[i]] for site in sites}) for i in drawn]


def _counterpart(text: Tokens, other: Tokens, position: int) -> int:
    """The position of the other text that stands for this one: the same role, as far along it."""
    role = text.role(position)
    own, its = getattr(text, role), getattr(other, role)
    if not len(its):
        raise DataError(
            f"A drawn reference text has no {role} tokens",
            found="an empty span",
            expected=f"at least one {role} token in every reference text",
            do="take pairs with empty responses out of the reference set",
        )
    return its.start + (position - own.start) * len(its) // len(own)
