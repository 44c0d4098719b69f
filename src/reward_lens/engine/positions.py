"""Reading sites at chosen positions of every text, several a text, in batched passes: nothing else is kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reward_lens.engine.activations import Activations
from reward_lens.engine.run import read_sites
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens


@torch.no_grad()
def capture_at(
    rm: RewardModel, texts: Sequence[Tokens], positions: Sequence[Sequence[int]], sites: Sequence[Site],
    batch_size: int | None = None,
) -> Activations:  # fmt: skip
    """What stands at the sites at each of a text's positions, in the order of texts and positions.

    Returns `Activations` as at "final", [reading, ...] a site: each (text, position) is a run of its own, the text cut
    behind the position (which in a causal network changes nothing at it).
    """
    starts = [0]
    for wanted in positions:
        starts.append(starts[-1] + len(wanted))
    kept: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * starts[-1] for site in sites}
    for batch in rm.batches(texts, batch_size):
        places = [(k, p, starts[run] + i) for k, run in enumerate(batch.rows) for i, p in enumerate(positions[run])]
        row, column, reading = (torch.tensor(part, device=rm.device) for part in zip(*places, strict=True))
        column = column + batch.offset[row]

        def pick(x: Tensor, row=row, column=column) -> Tensor:
            return x[row.to(x.device), column.to(x.device)]

        for site, found in read_sites(rm, batch, sites, pick).items():
            for one, index in zip(found, reading.tolist(), strict=True):
                kept[site][index] = one
    return Activations(tuple(texts), {site: torch.stack(found) for site, found in kept.items()}, "final")
