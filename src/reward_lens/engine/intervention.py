"""Changing a forward pass: blend the current value at a site towards a source, at given positions.

    x  ->  x                    mask 0, exactly
           source(x)            mask 1, exactly
           lerp(x, source, m)   in between

Zero, a constant, a mean, another run's value, an added vector, a projected-out subspace: each is a *source*. There are
no subclasses of interventions; whatever gives a tensor for a tensor is a source.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.engine.activations import Activations, positions_of, runs_of
from reward_lens.engine.run import out_map, require_site
from reward_lens.errors import AlignmentError, DataError
from reward_lens.model.forward import Batch
from reward_lens.model.reward_model import SIDES, RewardModel, pair_coords
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Result


@dataclasses.dataclass(frozen=True)
class Source:
    """What a site's value is replaced by.

    `give(current [pos, ...], site, run, positions)` returns a tensor of the same shape; `run` is the index of the text.
    """

    name: str
    give: Callable[[Tensor, Site, int, range], Tensor]


def zeros() -> Source:
    """Zero ablation. Returns a `Source` for `intervene`."""
    return Source("zeros", lambda x, site, run, positions: torch.zeros_like(x))


def constant(vector: Tensor) -> Source:
    """Returns a `Source`: the same vector at every position."""
    return Source("constant", lambda x, site, run, positions: vector.to(x).expand_as(x))


def add(vector: Tensor, strength: float = 1.0) -> Source:
    """Steering. Returns a `Source`: the current value plus `strength` times a vector."""
    return Source("add", lambda x, site, run, positions: x + strength * vector.to(x))


def project_out(basis: Tensor) -> Source:
    """The current value without its part in the span of `basis` [k, d] (rows need not be orthogonal)."""
    orthonormal = torch.linalg.qr(basis.double().T).Q

    def give(x: Tensor, site: Site, run: int, positions: range) -> Tensor:
        q = orthonormal.to(x.device)
        return (x.double() - (x.double() @ q) @ q.T).to(x)

    return Source("project_out", give)


def mean_of(reference: Activations) -> Source:
    """Mean ablation. Returns a `Source`: the mean over a reference set's runs (and positions, if it holds several)."""
    means: dict[Site, Tensor] = {}

    def give(x: Tensor, site: Site, run: int, positions: range) -> Tensor:
        if site not in means:
            held = reference[site]
            means[site] = (held if isinstance(held, Tensor) else torch.cat(held)).mean(0)
        return means[site].to(x).expand_as(x)

    return Source("mean", give)


def from_run(source: Activations) -> Source:
    """Patching. Returns a `Source`: run i takes the value of the given run i at the same positions.

    `Activations.swapped()` gives each response the other one's values.

    Raises `AlignmentError` where the two runs do not have the same positions there.
    """

    def give(x: Tensor, site: Site, run: int, positions: range) -> Tensor:
        held = source[site][run]
        if isinstance(source[site], Tensor):
            if len(positions) != 1:
                raise _unaligned(len(positions), 1)
            return held[None].to(x)
        if source.at == "all" and positions.stop <= len(held) and len(positions) != len(held):
            held = held[positions.start : positions.stop]
        if len(held) != len(positions):
            raise _unaligned(len(positions), len(held))
        return held.to(x)

    return Source("from_run", give)


@torch.no_grad()
def intervene(
    rm: RewardModel,
    texts_or_pairs,
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
        (attn, mlp), heads (``"L3.H5"``) and neurons (``"L3.N17"``).
    at: "final" (the reward position), "response" (the response's first token through the reward position), "all", or
        an explicit range of positions.
    mask: 0 leaves the value exactly as it is, 1 takes exactly the source.

    Returns value (pair, side, state) or (text, state) in reward units; state = clean, intervened, change.
    A total effect: everything after the site is recomputed. What it cannot show: whether the changed state is one the
    network ever reaches by itself.
    """
    sites = {Site.parse(site): source for site, source in sources.items()}
    for site in sites:
        require_site(rm, site)
    if not 0.0 <= mask <= 1.0:
        raise DataError("The mask of an intervention is out of range", found=str(mask), expected="a number from 0 to 1",
                        do="pass 1 to take the source, 0 to leave the value")  # fmt: skip
    tokens, pairs = runs_of(rm, texts_or_pairs)
    rewards = torch.empty(len(tokens), 2, dtype=torch.float64)
    for batch in rm.batches(tokens, batch_size):
        for column, changed in enumerate(({}, sites)):
            edits = [h for site, source in changed.items() for h in _edit(rm, batch, tokens, site, source, at, mask)]
            rewards[list(batch.rows), column] = rm.readout.reward(rm.trunk.pooled(batch, *edits)).double().cpu()
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


def _edit(
    rm: RewardModel, batch: Batch, tokens: Sequence[Tokens], site: Site, source: Source, at: str | range, mask: float
) -> list[hooks.Hook]:
    spans = [positions_of(tokens[run], at) for run in batch.rows]

    def blended(x: Tensor, carried: Tensor | None = None) -> Tensor:
        """`x` with the spans replaced; `carried` is added for the source's eyes (resid_mid seen from the write)."""
        out = x.clone()
        for row, (run, span, start) in enumerate(zip(batch.rows, spans, batch.offset.tolist(), strict=True)):
            where = slice(start + span.start, start + span.stop)
            now = x[row, where]
            seen = now * scale if carried is None else carried[row, where] + now * scale
            wanted = source.give(seen, site, run, span)
            new = seen if mask == 0.0 else wanted if mask == 1.0 else torch.lerp(seen, wanted.to(seen), mask)
            back = (new if carried is None else new - carried[row, where]) / scale
            out[row, where] = torch.where(new == seen, now, back.to(now))  # what does not change keeps its bits
        return out

    scale = rm.trunk.write_scale if site.kind in ("attn", "mlp", "resid_mid") else 1.0
    if site.kind in ("embed", "resid_pre"):
        return [rm.trunk.edit_residual(site.block, blended)]
    if site.kind == "resid_post":
        return [rm.trunk.edit_residual(site.block + 1, blended)]
    if site.kind in ("attn", "mlp"):
        return [hooks.edit_output(rm.trunk.writers[site.kind][site.block], _shaped(batch, blended))]
    if site.kind == "resid_mid":
        return _edit_mid(rm, batch, site, blended)
    return [_edit_units(rm, batch, site, blended)]


def _edit_mid(rm: RewardModel, batch: Batch, site: Site, blended) -> list[hooks.Hook]:
    """resid_mid is changed through attention's write: the residual itself is added outside any module."""
    pre: list[Tensor] = []
    block, writer = rm.trunk.blocks[site.block], rm.trunk.writers["attn"][site.block]
    edit = _shaped(batch, lambda write: blended(write, pre.pop()))
    return [hooks.read_input(block, lambda x: pre.append(x.clone())), hooks.edit_output(writer, edit)]


def _edit_units(rm: RewardModel, batch: Batch, site: Site, blended) -> hooks.Hook:
    kind = "attn" if site.kind == "head" else "mlp"

    def edit(x: Tensor) -> Tensor:
        units = x.reshape(*batch.ids.shape, x.shape[-1])
        if site.kind == "head":
            units = units.unflatten(-1, (rm.n_heads, -1))
        if site.index is None:
            return blended(units).reshape(x.shape)
        new = units.clone()
        if site.kind == "head":
            new[:, :, site.index] = blended(units[:, :, site.index])
        else:
            new[:, :, site.index] = blended(units[:, :, site.index, None])[..., 0]
        return new.reshape(x.shape)

    return hooks.edit_input(out_map(rm, site.block, kind), edit)


def _shaped(batch: Batch, change: hooks.Edit) -> hooks.Edit:
    return lambda x: change(x.reshape(*batch.ids.shape, x.shape[-1])).reshape(x.shape)


def _unaligned(wanted: int, held: int) -> AlignmentError:
    return AlignmentError(
        "A run cannot take another run's values at these positions",
        found=f"{wanted} positions to change, {held} in the source",
        expected="as many in both: equal token counts, or the reward position alone",
        do="use at='final', or pairs whose responses have the same token count; capture the source with the same at=",
    )
