"""Which values go where: the rows of an interchange sweep over a pair, for `divergence` and `counterfactual_patch`.

    noise     the chosen response with a site's value from the rejected one      base chosen, source rejected
    denoise   the rejected response with the chosen value                        base rejected, source chosen
    zero, mean, resample    the chosen response with 0, the natural mean, or another prompt's natural value

Effects have the signs of `effects`: positive supports the preference in noise and denoise, and is what the chosen
response loses in the ablations. A site's value lands in the residual stream that enters some block; only what comes
after can respond to it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reward_lens import data
from reward_lens.engine.activations import Activations, capture, positions_of
from reward_lens.engine.editing import POSITIONAL, RESIDUALS, Edit
from reward_lens.engine.intervention import Source, constant, zeros
from reward_lens.engine.places import require_site
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens, require_equal_length

MODES = ("noise", "denoise", "zero", "mean", "resample")


def sites_named(rm: RewardModel, named: Any, depth: int) -> list[Site]:
    """The sites of "components", "heads" or "residual" that come before `depth`, or those listed one by one.

    A listed site that does not come before `depth` raises `DataError`, one the model lacks `StructureError`.
    """
    before = range(depth)
    if named == "components":
        return [Site("embed"), *(Site(kind, layer) for layer in before for kind in ("attn", "mlp"))]
    if named == "heads":
        return [Site("head", layer, i) for layer in before if rm.structure.attends(layer) for i in range(rm.n_heads)]
    if named == "residual":
        return [Site("resid_pre", layer) if layer else Site("embed") for layer in before]
    sites = [Site.parse(named)] if isinstance(named, str | Site) else [Site.parse(site) for site in named]
    if not sites:
        raise DataError("There are no sites to intervene at", found="an empty list", expected="at least one site",
                        do="pass 'components', 'heads', 'residual' or sites such as 'L1.attn'")  # fmt: skip
    for site in sites:
        require_site(rm, site)
        if site.kind in POSITIONAL:
            raise DataError(
                f"What stands at {site} belongs to its position",
                found="queries, keys or attention patterns among the sites",
                expected="sites whose values mean the same in another text",
                do="use values ('L1.V0'), heads or writes; `effects` patches these between responses of one length",
            )
        if lands_at(site) + (site.kind in RESIDUALS) > depth:
            raise DataError(
                f"What happens at {site} cannot be seen at depth {depth}",
                found=f"a site whose value is part of the residual stream at depth {lands_at(site)}",
                expected="a state further down the network than the site; a patched residual is its own source's state",
                do="choose a larger depth (rm.n_layers is the last) or leave the site out",
            )
    return list(dict.fromkeys(sites))


def lands_at(site: Site) -> int:
    """The first depth whose residual holds the site's value; for a residual site its own depth."""
    return site.block + (site.kind not in ("embed", "resid_pre"))


def first_mlp(rm: RewardModel, site: Site) -> int:
    """The first block whose MLP reads what the site's value makes of the residual stream."""
    beside = site.kind in ("attn", "head", "v", "resid_mid") and not rm.structure.parallel
    return site.block if beside else lands_at(site)


def require_apart(pairs: data.Pairs, natural: data.Pairs) -> None:
    """Raise unless pairs and natural pairs have no prompt in common."""
    shared = {p.prompt_key for p in natural} & {p.prompt_key for p in pairs}
    if shared:
        names = [p.id for p in pairs if p.prompt_key in shared]
        raise DataError(
            "The natural pairs share prompts with the pairs that are intervened on",
            found=f"{len(shared)} shared prompts (pairs {', '.join(map(str, names[:4]))})",
            expected="natural pairs of other prompts: a state is always close to states of its own prompt",
            do="split the pairs by prompt (pairs.split) and pass one part as pairs, the other as natural_pairs",
        )


class Interchange:
    """The texts and edits of one pair after another, for some sites, a mode and the positions `at`."""

    def __init__(
        self, rm: RewardModel, sites: Sequence[Site], mode: str, at: str | range, natural: data.Pairs, seed: int = 0
    ):
        if mode not in MODES:
            raise DataError(f"There is no intervention '{mode}'", found=repr(mode), expected=", ".join(MODES),
                            do="pass one of these as mode=")  # fmt: skip
        if mode in ("mean", "resample") and at != "final":
            raise DataError(
                f"A natural value for mode='{mode}' is known at the reward position only",
                found=f"at={at!r}",
                expected="at='final'",
                do="pass at='final', or mode='noise', 'denoise' or 'zero'",
            )
        self.rm, self.sites, self.mode, self.at = rm, sites, mode, at
        self.whole = list(dict.fromkeys(Site(s.kind, s.layer) for s in sites))
        self.generator = torch.Generator().manual_seed(seed)
        self.natural = None
        if mode in ("mean", "resample"):  # the chosen responses: the pair's chosen one is what runs
            held = capture(rm, natural, self.whole, "final")
            runs = range(0, len(held.tokens), 2)
            self.natural = [torch.stack([value_of(held, site, run) for run in runs]) for site in sites]

    def base(self, pair: tuple[Tokens, Tokens]) -> Tokens:
        """The text that is run."""
        return pair[1] if self.mode == "denoise" else pair[0]

    def effect(self, clean: Tensor, patched: Tensor) -> Tensor:
        """The effect of a patch, in the sign of the mode."""
        return patched - clean if self.mode == "denoise" else clean - patched

    def edits(self, pair: data.Pair, tokens: tuple[Tokens, Tokens]) -> list[Edit]:
        """One edit a site."""
        positions = positions_of(self.base(tokens), self.at)
        sources = self._sources(pair, tokens)
        return [Edit(site, positions, source) for site, source in zip(self.sites, sources, strict=True)]

    def values(self, pair: data.Pair, tokens: tuple[Tokens, Tokens]) -> list[Tensor]:
        """The other response's value at every site (noise and denoise), [pos, ...] or one position's."""
        if self.at != "final":
            require_equal_length(*tokens, pair_id=str(pair.id))
        held = capture(self.rm, [pair], self.whole, self.at)
        return [value_of(held, site, 0 if self.mode == "denoise" else 1) for site in self.sites]

    def _sources(self, pair: data.Pair, tokens: tuple[Tokens, Tokens]) -> list[Source]:
        if self.mode == "zero":
            return [zeros()] * len(self.sites)
        if self.natural is None:
            return [given(value) for value in self.values(pair, tokens)]
        if self.mode == "mean":
            return [constant(values.mean(0)) for values in self.natural]
        drawn = int(torch.randint(len(self.natural[0]), (), generator=self.generator))
        return [constant(values[drawn]) for values in self.natural]


def value_of(held: Activations, site: Site, run: int) -> Tensor:
    """One run's value at a site, out of what is held of all heads or neurons of its block."""
    value = held[Site(site.kind, site.layer)][run]
    if site.index is None:
        return value
    if site.kind == "neuron":  # keeps its axis, as an edit of one does
        return value.narrow(-1, site.index, 1)
    return value.select(-1 if site.kind == "router" else -2, site.index)


def given(value: Tensor) -> Source:
    """Returns a `Source`: these values, [pos, ...] or the same at every position."""
    return Source("values", lambda x, site, run, positions: value.to(x).expand_as(x))
