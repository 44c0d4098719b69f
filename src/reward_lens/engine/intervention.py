"""Sources, and `intervene`: the reward with some sites changed. The arithmetic is in `engine.editing`."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import Activations, positions_of, runs_of
from reward_lens.engine.attention_tap import AttentionTap
from reward_lens.engine.editing import IN_ATTENTION, POSITIONAL, Edit, Placed, Source, hooks_of
from reward_lens.engine.gate_states import pooled_and_gate
from reward_lens.engine.places import reaches_gate, require_site
from reward_lens.errors import AlignmentError, DataError
from reward_lens.model.forward import Batch
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import SIDES, pair_coords
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Result


@checked_arguments
def zeros() -> Source:
    """Zero ablation. Returns a `Source` for `intervene`."""
    return Source("zeros", lambda x, site, run, positions: torch.zeros_like(x))


@checked_arguments
def constant(vector: Tensor) -> Source:
    """Returns a `Source`: the same vector at every position."""
    return Source("constant", lambda x, site, run, positions: _fitted(vector, x, site))


@checked_arguments
def add(vector: Tensor, strength: float = 1.0) -> Source:
    """Steering. Returns a `Source`: the current value plus `strength` times a vector."""
    return Source("add", lambda x, site, run, positions: x + strength * _fitted(vector, x, site))


def _fitted(vector: Tensor, x: Tensor, site: Site) -> Tensor:
    try:
        return vector.to(x).expand_as(x)
    except RuntimeError:
        raise DataError(
            f"A vector does not fit {site}",
            found=f"shape {tuple(vector.shape)}",
            expected=f"shape {tuple(x.shape[1:])}, or one for each of the {x.shape[0]} positions",
            do="pass a vector of that site (`capture` shows the shape of what stands there)",
        ) from None


def values(tensor: Tensor) -> Source:
    """Returns a `Source`: these values [pos, ...], one a position."""
    return Source("values", lambda x, site, run, positions: tensor.to(x).reshape(x.shape))


def pattern(rows: Tensor) -> Source:
    """Returns a `Source`: these attention rows [pos, .., key], cut or filled with zeros to the keys that are there."""

    def give(x: Tensor, site: Site, run: int, positions) -> Tensor:
        width = min(rows.shape[-1], x.shape[-1])
        out = torch.zeros_like(x)
        out[..., :width] = rows[..., :width].to(x)
        return out

    return Source("pattern", give)


@checked_arguments
def project_out(basis: Tensor) -> Source:
    """The current value without its part along `basis` [d], or in the span of [k, d] (rows need not be independent)."""
    span = torch.atleast_2d(basis.double())
    if span.ndim > 2 or not span.isfinite().all():
        raise DataError("A basis is no set of vectors", found=f"shape {tuple(basis.shape)}, "
                        f"{int((~basis.isfinite()).sum())} numbers that are not finite",
                        expected="finite numbers, one vector or one a row", do="check the vectors")  # fmt: skip
    rows = torch.linalg.svd(span, full_matrices=False).Vh
    orthonormal = rows[: int(torch.linalg.matrix_rank(span, rtol=1e-6))]

    def give(x: Tensor, site: Site, run: int, positions: range) -> Tensor:
        q = orthonormal.to(x.device)
        if q.shape[1] != x.shape[-1]:
            raise DataError(f"A basis does not fit {site}", found=f"vectors of {q.shape[1]} numbers",
                            expected=f"vectors of {x.shape[-1]}",
                            do="pass vectors of that site (`capture` shows what stands there)")  # fmt: skip
        return (x.double() - (x.double() @ q.T) @ q).to(x)

    return Source("project_out", give)


@checked_arguments
def mean_of(reference: Activations) -> Source:
    """Mean ablation. Returns a `Source`: the mean over a reference set's runs (and positions, if it holds several).

    Raises `DataError` for queries, keys and attention patterns, which hold positions of their own text.
    """
    means: dict[Site, Tensor] = {}

    def give(x: Tensor, site: Site, run: int, positions: range) -> Tensor:
        if site.kind in POSITIONAL:
            raise positional_elsewhere("mean_of", [site])
        if site not in means:
            held = reference[site]
            means[site] = (held if isinstance(held, Tensor) else torch.cat(held)).mean(0)
        return means[site].to(x).expand_as(x)

    return Source("mean", give)


def positional_elsewhere(found: str, sites: Sequence[Site]) -> DataError:
    """The refusal of queries, keys and patterns of other texts than the one that is changed."""
    return DataError(
        "A value that holds positions cannot come from another text",
        found=f"{found} at {', '.join(map(str, sites[:4]))}",
        expected="sites other than queries, keys and attention patterns, which belong to positions of their text",
        do="ablate by zero, or exchange values between responses of the same token count; or ablate values ('L1.V0'), "
        "heads or writes",
    )


@checked_arguments
def from_run(source: Activations) -> Source:
    """Patching. Returns a `Source`: run i takes the value of the given run i at the same positions; of activations at
    "final" one reward position takes the value of the other.

    `Activations.swapped()` gives each response the other one's values.

    Raises `AlignmentError` where the two runs do not have the same positions there, or a query, key or pattern would be
    moved.
    """

    def give(x: Tensor, site: Site, run: int, positions: Sequence[int]) -> Tensor:
        held = source[site]
        if run >= len(held):
            raise _unaligned(f"run {run} to change, {len(held)} runs in the source")
        own = positions_of(source.tokens[run], source.at)
        if isinstance(held, Tensor) and site.kind not in POSITIONAL:
            fits = len(positions) == 1
        else:
            fits = own.start <= min(positions) and max(positions) < own.stop
        if not fits:
            raise _unaligned(f"{_named(positions)} positions to change, {_named(own)} in the source")
        value = held[run][None] if isinstance(held, Tensor) else held[run][[p - own.start for p in positions]]
        return pattern(value).give(x, site, run, positions) if site.kind == "pattern" else value.to(x)

    return Source("from_run", give, None if source.at == "final" else source.tokens)


@checked_arguments
@torch.no_grad()
def intervene(
    rm: RewardModel,
    texts_or_pairs: data.Pair | Iterable,
    sources: Mapping["Site | str", Source],
    at: str | range = "final",
    mask: float = 1.0,
    batch_size: int | None = None,
) -> Result:
    """Rewards with some sites changed, beside the rewards of the same batches unchanged.

    Parameters
    ----------
    texts_or_pairs: as for `capture`.
    sources: site -> source, all applied in one pass: residuals (embed, resid_pre, resid_mid, resid_post), writes
        (attn, mlp), heads (``"L3.H5"``), neurons (``"L3.N17"``), the weights of routed experts (``"L3.router"``,
        ``"L3.R2"``; they are not made to sum to one again), queries, keys, values and attention patterns of a head
        (``"L3.Q5"``, ``"L3.K1"``, ``"L3.V1"``, ``"L3.P5"``; keys and values count key-value heads).
    at: "final" (the reward position), "response" (the response's first token through the reward position, or
        through the last one where the first is read), "all", or
        an explicit range of positions.
    mask: 0 leaves the value exactly as it is, 1 takes exactly the source.

    Returns value (pair, side, state) or (text, state) in reward units; state = clean, intervened, change.
    A total effect: everything after the site is recomputed, and under a prompt-gated head the weights too where a
    change reaches the position they are read at (`gate_routes` takes the routes apart). What it cannot show: whether
    the changed state is one the network ever reaches by itself.
    """
    sites = {Site.parse(site): source for site, source in sources.items()}
    for site in sites:
        require_site(rm, site)
    if not 0.0 <= mask <= 1.0:
        raise DataError("The mask of an intervention is out of range", found=str(mask), expected="a number from 0 to 1",
                        do="pass 1 to take the source, 0 to leave the value")  # fmt: skip
    tokens, pairs = runs_of(rm, texts_or_pairs)
    for source in sites.values():
        _require_same_place(tokens, source, at)
    rewards = torch.empty(len(tokens), 2, dtype=torch.float64)
    moves_gate = [reaches_gate(rm, text, positions_of(text, at)) for text in tokens]
    gates = rm.readout_inputs(tokens)
    for batch in rm.batches(tokens, batch_size):
        for column, changed in enumerate(({}, sites)):
            edits = [p for site, source in changed.items() for p in _placed(batch, tokens, site, source, at, mask)]
            tap = AttentionTap(rm, [p for p in edits if p.edit.site.kind in IN_ATTENTION])
            made = [*tap.hooks(), *hooks_of(rm, (batch.ids.shape[0], batch.ids.shape[1]), edits)]
            with tap.active():
                pooled, read = pooled_and_gate(rm, batch, tokens, gates, moves_gate, *made)
            rewards[list(batch.rows), column] = rm.readout.reward(pooled, read).double().cpu()
    states = torch.cat([rewards, rewards[:, 1:] - rewards[:, :1]], 1).numpy()
    coords = {"state": np.array(["clean", "intervened", "change"], dtype=object)}
    settings = {"sites": {str(s): source.name for s, source in sites.items()}, "at": str(at), "mask": mask}
    meta = rm.describe(
        "intervene", pairs, title="Intervention", settings=settings,
        shows="How the reward changes when the named sites are changed and everything after them is recomputed.",
        cannot_show="Whether the changed state is one that the network reaches by itself.",
    )  # fmt: skip
    if pairs is None:
        value = xr.DataArray(states, dims=("text", "state"), coords=coords)
    else:
        both = states.reshape(-1, 2, 3)
        sided = np.concatenate([both, both[:, :1] - both[:, 1:]], 1)
        coords |= {"side": np.array(SIDES, dtype=object), **pair_coords(pairs)}
        value = xr.DataArray(sided, dims=("pair", "side", "state"), coords=coords)
    return Result("intervene", value, unit="reward", meta=meta)


def _placed(batch: Batch, tokens: Sequence[Tokens], site: Site, source: Source, at, mask: float) -> list[Placed]:
    return [
        Placed(Edit(site, positions_of(tokens[run], at), source, mask), row, run, start)
        for row, (run, start) in enumerate(zip(batch.rows, batch.offset.tolist(), strict=True))
    ]


def _require_same_place(tokens: Sequence[Tokens], source: Source, at: str | range) -> None:
    """Raise where a place that is named lies elsewhere in the texts that the source takes values from."""
    if source.texts is None or isinstance(at, range):
        return
    for text, other in zip(tokens, source.texts, strict=False):
        wanted, held = positions_of(text, at), positions_of(other, at)
        if wanted != held:
            raise _unaligned(f"{_named(wanted)} positions to change, {_named(held)} in the source")


def _named(positions: Sequence[int]) -> str:
    return f"{len(positions)} ({positions[0]} to {positions[-1]})"


def _unaligned(found: str) -> AlignmentError:
    return AlignmentError(
        "A run cannot take another run's values at these positions",
        found=found,
        expected="the same positions in both: equal token counts, or the reward position alone",
        do="use at='final', or pairs whose responses have the same token count; capture the source with the same at=",
    )
