"""Raw access to activations: `capture` runs texts or pairs once and hands back named tensors."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.data.checks import shown
from reward_lens.engine.run import passes
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

CHUNK_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations of several runs. For pairs the runs are chosen and rejected in turn."""

    tokens: tuple[Tokens, ...]
    """One a run."""
    tensors: dict[Site, Tensor | tuple[Tensor, ...]]
    """At one position: [run, ...]. At several: one [pos, ...] a run."""
    at: str | range
    """"final", "response", "all" or a range of positions."""
    pairs: data.Pairs | None = None
    """The pairs, where pairs were given."""

    def __getitem__(self, site: "Site | str") -> Any:
        site = Site.parse(site)
        if site not in self.tensors:
            raise DataError(
                f"These activations do not hold {site}",
                found=", ".join(map(str, list(self.tensors)[:4])) + (" and others" if len(self.tensors) > 4 else ""),
                expected="a site that was captured, as it was written then (all heads of a block are 'L3.head')",
                do=f"capture it: rl.capture(rm, texts, ['{site}'])",
            )
        return self.tensors[site]

    def chosen(self, site: "Site | str"):
        """The chosen runs' activations at a site."""
        return self[site][::2]

    def rejected(self, site: "Site | str"):
        """The rejected runs' activations at a site."""
        return self[site][1::2]

    def swapped(self) -> "Activations":
        """Chosen and rejected exchanged: run i holds the other response's activations."""
        order = [i ^ 1 for i in range(len(self.tokens))]
        tensors = {
            s: v[order] if isinstance(v, Tensor) else tuple(v[i] for i in order) for s, v in self.tensors.items()
        }
        return Activations(tuple(self.tokens[i] for i in order), tensors, self.at, self.pairs)

    def __repr__(self) -> str:
        return f"Activations({len(self.tokens)} runs, {len(self.tensors)} sites, at={self.at!r})"


@checked_arguments
@torch.no_grad()
def capture(
    rm: RewardModel,
    texts_or_pairs: data.Pair | Iterable,
    sites: str | Iterable = "components",
    at: str | range = "final",
    batch_size: int | None = None,
) -> Activations:
    """Run texts or pairs through the model once and return what stands at the sites.

    Parameters
    ----------
    texts_or_pairs: pairs; or (prompt, response) tuples; or raw strings, which are tokenised without a template.
    sites: `Site` objects or their written forms (``"L3.attn"``, ``"L5.resid_pre"``, ``"L2.head"`` for all heads of a
        block); ``"components"``: what the lens and the component split need, every residual and every write.
    at: "final" (the reward position), "response" (its first token through the reward position), "all", or an explicit
        range of positions.

    Returns `Activations` in the readout's precision (float32): [run, d_model] a site at "final", a tuple of
    [pos, d_model] otherwise; heads [.., n_heads, head_dim] (z, before the output map), neurons [.., d_mlp], routers
    [.., n_experts] (weights, 0 where an expert is not chosen), experts [.., n_experts, d_model] (what each adds),
    attention patterns [.., n_heads, key] over the text's own keys (at "final" of the longest text, 0 behind one's own).
    Raises `StructureError` for a site the model does not have. Values are what the pass computed: padding is cut off.
    """
    tokens, pairs = runs_of(rm, texts_or_pairs)
    wanted = component_sites(rm) if sites == "components" else [Site.parse(s) for s in sites]
    kept: dict[Site, list] = {site: [None] * len(tokens) for site in wanted}
    placed: dict[Site, Tensor] = {}
    for batch, tensors in passes(rm, tokens, wanted, everywhere=at != "final", batch_size=batch_size):
        for site, tensor in tensors.items():
            if at == "final" and site.kind != "pattern":
                # At once into its place: pieces kept between a pass's large temporaries break the memory up.
                if site not in placed:
                    placed[site] = tensor.new_empty(len(tokens), *tensor.shape[1:])
                placed[site][list(batch.rows)] = tensor
                continue
            for row, (run, start) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True)):
                span = positions_of(tokens[run], at)
                one = tensor[row]
                if site.kind == "pattern":  # its keys are padded like its queries
                    one = one[..., start : start + len(tokens[run])]
                kept[site][run] = one if at == "final" else one[start + span.start : start + span.stop].clone()
    joined = {
        s: placed[s] if s in placed else _patterns(rows) if at == "final" else tuple(rows) for s, rows in kept.items()
    }
    return Activations(tuple(tokens), joined, at, pairs)


def _patterns(values: list[Tensor]) -> Tensor:
    """Patterns of all runs, as wide as the longest text, with zeros behind each one's last key."""
    widest = max(v.shape[-1] for v in values)
    return torch.stack([pad(v, (0, widest - v.shape[-1])) for v in values])


def positions_of(tokens: Tokens, at: str | range) -> range:
    """The positions that "final", "response" or "all" names in one text; an explicit range names itself."""
    if isinstance(at, range) and at.step == 1 and 0 <= at.start < at.stop <= len(tokens):
        return at
    if at == "final":
        return range(tokens.reward_pos, tokens.reward_pos + 1)
    if at == "response":
        return range(tokens.response.start, tokens.seen.stop)
    if at == "all":
        return range(len(tokens))
    raise DataError(
        "The positions were not understood",
        found=repr(at),
        expected=f"'final' (the reward position), 'response', 'all', or a non-empty range within {len(tokens)} tokens",
        do="pass one of these",
    )


def component_sites(rm: RewardModel) -> list[Site]:
    """Every residual (depth 0 to n_layers) and every write."""
    sites = [Site("embed")]
    for layer in range(rm.n_layers):
        sites += [Site("attn", layer), Site("mlp", layer), Site("resid_post", layer)]
    return sites


def captured(rm: RewardModel, pairs, sites: Sequence[Site]) -> Iterator[Activations]:
    """Activations at the reward position of all pairs, in chunks that fit a memory budget and in the pairs' order.

    What already is an `Activations` of pairs that holds the sites is handed on: one pass can serve several methods.
    """
    if isinstance(pairs, Activations):
        lacking = [str(site) for site in sites if site not in pairs.tensors]
        if pairs.pairs is None or pairs.at != "final" or lacking:
            raise DataError(
                "These activations cannot answer the question",
                found=f"at={pairs.at!r}" + ("" if pairs.pairs is not None else ", not of pairs")
                + (f", without {', '.join(lacking[:4])}" if lacking else ""),
                expected="activations of pairs at 'final' with every site the method reads",
                do="pass the pairs themselves, or capture(rm, pairs, 'components')",
            )  # fmt: skip
        yield pairs
        return
    pairs = data.as_pairs(pairs)
    widths = (rm.d_model * _vectors(rm, site) for site in sites)
    a_pair = 2 * 4 * max(1, sum(widths))  # two runs in float32
    step = max(1, CHUNK_BYTES // a_pair)
    for start in range(0, len(pairs), step):
        yield capture(rm, pairs[start : start + step], sites)


def _vectors(rm: RewardModel, site: Site) -> int:
    """About how many vectors of the stream's width a site holds a position."""
    if site.kind == "expert" and (experts := rm.experts[site.block]) is not None:
        return experts.n
    return 4 if site.kind == "neuron" else 1


def kept(inputs: Any) -> Activations | data.Pairs:
    """Activations as they are, else the pairs: what can be gone over once, such as a generator, is gone over here."""
    return inputs if isinstance(inputs, Activations) else data.as_pairs(inputs)


def pairs_of(inputs: Any) -> data.Pairs:
    """The pairs, or those that activations are of."""
    return data.as_pairs(inputs.pairs if isinstance(inputs, Activations) else inputs)


def runs_of(rm: RewardModel, inputs: Any) -> tuple[list[Tokens], data.Pairs | None]:
    """The tokenised runs of texts or pairs, and the pairs if that is what they are."""
    if isinstance(inputs, str | data.Pair):
        inputs = [inputs]
    if isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs):
        raise _unusable(inputs, "put one (prompt, response) in a list; pass two raw texts as a list too")
    if isinstance(inputs, Iterable) and not isinstance(inputs, data.Pairs):
        inputs = list(inputs)
    if isinstance(inputs, data.Pairs) or all(isinstance(x, data.Pair) for x in inputs):
        pairs = data.as_pairs(inputs)
        return [t for both in rm.tokenize_pairs(pairs) for t in both], pairs
    tokens = []
    for item in inputs:
        if isinstance(item, Tokens):
            tokens.append(item)
        elif isinstance(item, str):
            tokens.append(rm.tokenizer.text(item, rm.truncation))
        elif isinstance(item, tuple | list) and len(item) == 2:
            tokens.append(rm.tokenize(*item))
        else:
            raise _unusable(item, "correct the item; of an rl.Group pass its prompt with each response")
    return tokens, None


def _unusable(found: Any, do: str) -> DataError:
    return DataError(
        "The inputs are not texts or pairs that can be run",
        found=shown(found),
        expected="rl.Pairs, or a list of rl.Pair, of (prompt, response) tuples or of raw texts",
        do=do,
    )
