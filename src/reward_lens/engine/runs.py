"""The two runs of a pair, each computed once: what stands at the sites, keys and values, the pre-norm residual.

The tokens that chosen and rejected share are run once; each run goes on from their keys and values.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine.run import read_sites
from reward_lens.model.forward import suffix_batch
from reward_lens.model.prefix import NO_PREFIX, KeyValues, PrefixCache
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens, common_prefix


@dataclasses.dataclass(frozen=True)
class TextRun:
    """One text, run once."""

    tokens: Tokens
    start: int
    """First position whose values are held."""
    held: dict[Site, Tensor]
    """[pos - start, ...] a site; a site without an index holds all heads or neurons."""
    final: Float[Tensor, " d_model"]
    """Pre-norm residual at the reward position."""
    reward: float
    gate: Float[Tensor, "1 d_model"] | None
    """What a prompt-gated head read of the prompt; None for other heads."""
    keys: KeyValues
    """Of the whole text; `NO_PREFIX` where the model takes none."""

    def at(self, site: Site, positions: Sequence[int]) -> Tensor:
        """The site's values at these positions, [position, ...]."""
        whole = self.held[dataclasses.replace(site, index=None)] if site.index is not None else self.held[site]
        picked = whole[torch.as_tensor(positions, device=whole.device, dtype=torch.long) - self.start]
        if site.index is None:
            return picked
        return picked[:, site.index, None] if site.kind == "neuron" else picked[:, site.index]


@torch.no_grad()
def run_text(
    rm: RewardModel,
    tokens: Tokens,
    sites: Sequence[Site],
    *,
    only_final: bool,
    known: KeyValues = NO_PREFIX,
    hold: int | None = None,
) -> TextRun:
    """Run one text from the end of `known` on and hold the sites: at the reward position, or from `hold` on (None: all
    positions that are run)."""
    reuse = rm.reuses_prefix(tokens)
    start = len(known) if reuse else 0
    batch = suffix_batch(tokens, start, rm.device)
    past = PrefixCache(known, rm.n_layers) if reuse else None
    final: list[Tensor] = []
    at = tokens.reward_pos - start
    first = tokens.reward_pos if only_final else max(start, hold or 0)
    held_positions = slice(first - start, at + 1 if only_final else None)

    def pick(x: Tensor) -> Tensor:
        return x[0, held_positions].clone()

    whole = list(dict.fromkeys(dataclasses.replace(site, index=None) for site in sites))
    end = rm.trunk.read_residual(rm.n_layers, lambda x: final.append(x[0, at].to(rm.like)))
    held = read_sites(rm, batch, whole, pick, end, past=past)
    gate = rm.readout_inputs([tokens])
    reward = float(rm.readout.reward(final[0][None], gate)[0])
    return TextRun(tokens, first, held, final[0], reward, gate, past.seen() if past is not None else NO_PREFIX)


def common_start(*texts: Tokens) -> int:
    """Number of tokens that all texts begin with, before any one's reward position."""
    return min(min(common_prefix(texts[0], t), t.reward_pos) for t in texts)


def keys_before(rm: RewardModel, run: TextRun, stop: int, *others: Tokens) -> KeyValues:
    """Keys and values of a run's first positions, where other texts may go on from them."""
    return run.keys.first(stop) if stop and rm.reuses_prefix(run.tokens, *others) else NO_PREFIX


def run_pair(
    rm: RewardModel, chosen: Tokens, rejected: Tokens, sites: Sequence[Site], *, only_final: bool
) -> tuple[TextRun, TextRun]:
    """Both runs of a pair, their common tokens run once."""
    shared = common_start(chosen, rejected)
    first = run_text(rm, chosen, sites, only_final=only_final, hold=shared)
    known = keys_before(rm, first, shared, rejected)
    return first, run_text(rm, rejected, sites, only_final=only_final, known=known, hold=shared)
