"""From a window of texts to samples of a site: which positions are taken, and which are left out and counted.

Massive activations (attention sinks: few tokens whose residual is tens to thousands of times the usual size) would
dominate a squared error. A position is left out as a sink where its residual norm exceeds `sink_multiple` times the
median over the window's candidate positions. At a residual site that is its own norm; at a write, or at what a write
is made from, the larger of the norms of the residual before the block and after it: a sink is written by one block and
taken away by another, and both writes are massive.

Reference: Sun et al. 2024, arXiv 2402.17762 (massive activations). The multiple is ours.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_lens.engine.activations import positions_of
from reward_lens.engine.places import require_site
from reward_lens.engine.run import passes
from reward_lens.engine.store_texts import Window
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site

EXCLUDABLE = ("first", "sinks")
POSITIONS = ("reward", "response", "all")
RESIDUALS = ("embed", "resid_pre", "resid_mid", "resid_post")
_STORABLE = (*RESIDUALS, "attn", "mlp", "head", "neuron", "q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is taken of every text."""

    site: Site
    positions: str
    exclude: tuple[str, ...]
    sink_multiple: float
    per_text: int | None
    batch_size: int | None
    seed: int


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples in the order of texts and positions."""

    values: Float[Tensor, "n width"]
    """In the readout's precision."""
    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    norm: Float[Tensor, " n"]
    left_out: dict[str, int]


def require_recipe(rm: RewardModel, recipe: Recipe) -> None:
    """Raise `DataError` for a setting that cannot be followed, `StructureError` for a site the model lacks."""
    require_site(rm, recipe.site)
    if recipe.site.kind not in _STORABLE or (recipe.site.kind == "neuron" and recipe.site.index is not None):
        raise _setting("site", str(recipe.site), "a residual, a write, or all or one of the heads of a block")
    if recipe.positions not in POSITIONS:
        raise _setting("positions", repr(recipe.positions), "'reward', 'response' or 'all'")
    if not set(recipe.exclude) <= set(EXCLUDABLE):
        raise _setting("exclude", repr(recipe.exclude), "any of 'first' and 'sinks', or ()")
    if not recipe.sink_multiple > 1:
        raise _setting("sink_multiple", repr(recipe.sink_multiple), "a number over 1")
    for name in ("per_text", "batch_size"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise _setting(name, repr(value), "1 or more, or None")
    if recipe.seed < 0:
        raise _setting("seed", repr(recipe.seed), "0 or more")


@torch.no_grad()
def samples_of(rm: RewardModel, window: Window, recipe: Recipe) -> Samples:
    """Run a window's texts and take the samples of the recipe."""
    final = recipe.positions == "reward"
    at = "final" if final else recipe.positions
    guards = _guards(recipe.site) if "sinks" in recipe.exclude and not final else []
    count = len(window.tokens)
    values: list[Tensor] = [torch.empty(0)] * count
    sizes = [np.zeros(0)] * count
    spans = [positions_of(tokens, at) for tokens in window.tokens]
    sites = list(dict.fromkeys([recipe.site, *guards]))
    for batch, tensors in passes(rm, window.tokens, sites, everywhere=not final, batch_size=recipe.batch_size):
        for row, (run, start) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True)):
            here = slice(row, row + 1) if final else slice(start + spans[run].start, start + spans[run].stop)
            cut = {site: (x if final else x[row])[here].flatten(1) for site, x in tensors.items()}
            values[run] = cut[recipe.site].cpu().clone()
            if guards:
                norms = torch.stack([cut[site].norm(dim=1) for site in guards])
                sizes[run] = norms.amax(0).double().cpu().numpy()
    kept, left_out = _kept(recipe, window.numbers, spans, sizes if guards else None)
    return _gathered(window, spans, values, kept, left_out)


def _kept(recipe: Recipe, numbers, spans, sizes) -> tuple[list[np.ndarray], dict[str, int]]:
    """Of every text the indices into its span that are taken, and the numbers of positions left out."""
    kept = [np.arange(len(span)) for span in spans]
    left_out: dict[str, int] = {"first": 0, "sinks": 0, "per_text": 0}

    def keep(text: int, chosen: np.ndarray, reason: str) -> None:
        left_out[reason] += len(kept[text]) - len(chosen)
        kept[text] = chosen

    if "first" in recipe.exclude and recipe.positions != "reward":
        for i, span in enumerate(spans):
            keep(i, kept[i][np.asarray(span)[kept[i]] > 0], "first")
    candidates = sum(map(len, kept))
    if sizes is not None and candidates:
        most = recipe.sink_multiple * np.median(np.concatenate([s[k] for s, k in zip(sizes, kept, strict=True)]))
        for i, size in enumerate(sizes):
            keep(i, kept[i][size[kept[i]] <= most], "sinks")
    for i, number in enumerate(numbers):
        if recipe.per_text is not None and len(kept[i]) > recipe.per_text:
            drawn = np.random.default_rng([recipe.seed, number]).choice(kept[i], recipe.per_text, replace=False)
            keep(i, np.sort(drawn), "per_text")
    return kept, left_out


def _gathered(window: Window, spans, values: list[Tensor], kept, left_out) -> Samples:
    positions = [np.asarray(span)[k] for span, k in zip(spans, kept, strict=True)]
    ids = [[tokens.ids[p] for p in where] for tokens, where in zip(window.tokens, positions, strict=True)]
    text = np.repeat(np.asarray(window.numbers, dtype=np.int32), [len(k) for k in kept])
    position = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int32), *positions]).astype(np.int32))
    token = torch.tensor([i for one in ids for i in one], dtype=torch.int32)
    stacked = torch.cat([v[torch.from_numpy(k)] for v, k in zip(values, kept, strict=True)] or [torch.empty(0, 0)])
    norm = stacked.norm(dim=1)
    if not bool(norm.isfinite().all()):
        bad = int((~norm.isfinite()).nonzero()[0, 0])
        raise DataError(
            "A sample is not finite",
            found=f"text {text[bad]}, position {int(position[bad])}",
            expected="finite activations",
            do="load the model in bfloat16 or float32, or leave the text out",
        )
    return Samples(stacked, torch.from_numpy(text), position, token, norm.float(), left_out)


def _guards(site: Site) -> list[Site]:
    """The residuals whose norms tell a sink."""
    if site.kind in RESIDUALS:
        return [site]
    return [Site("resid_pre", site.block), Site("resid_post", site.block)]


def _setting(name: str, found: str, expected: str) -> DataError:
    return DataError(f"The setting '{name}' cannot be used", found=found, expected=expected, do=f"correct {name}=")
