"""What every estimator is given for one pair, and what it gives back."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from reward_lens.engine.alignment import Alignment, require_unshifted
from reward_lens.engine.editing import POSITIONAL
from reward_lens.engine.intervention import pattern
from reward_lens.engine.runs import TextRun
from reward_lens.methods.causation.effect_cells import Cells
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site


@dataclasses.dataclass(frozen=True)
class Task:
    """The changes of one pair whose effects are wanted: every site, at every group of positions."""

    rm: RewardModel
    pair_id: str
    sites: Sequence[Site]
    cells: Cells
    where: Alignment
    """All positions that are patched in the pair, whatever the groups."""
    base: TextRun
    """The run that is changed."""
    source: TextRun
    """The run that values come from."""
    norm: str
    steps: int
    max_rows: int | None

    @property
    def frozen_at(self) -> Tensor | None:
        """Pre-norm residual at which the final norm's scale is held; None: it is live."""
        return self.base.final if self.norm == "frozen" else None

    @property
    def start(self) -> int:
        """First position that a pass over the changed run needs."""
        return min(self.where.base) if self.rm.reuses_prefix(self.base.tokens) else 0

    def groups(self) -> Iterator[tuple[int, Alignment]]:
        """The groups that hold a position, with their numbers."""
        for g, group in enumerate(self.cells.groups):
            if group is not None and group.base:
                yield g, group

    def moved(self, site: Site, group: Alignment) -> Tensor:
        """The other run's value less the changed run's, [position, ...]; raises where a position would be moved."""
        if site.kind in POSITIONAL:
            require_unshifted(group, site.kind, self.pair_id)
        own, other = self.base.at(site, group.base), self.source.at(site, group.source)
        if site.kind == "pattern":  # texts of different length have rows of different length
            other = pattern(other).give(own, site, 0, group.base)
        return other - own

    def gap(self, clean: Sequence[float]) -> float:
        """Largest distance of rewards of the unchanged run from the run's own, over the scale of effects."""
        a, b = self.base.reward, self.source.reward
        return max(abs(c - a) for c in clean) / self.rm.effect_scale(a, b, a - b)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated change of the changed run's reward."""

    change: np.ndarray
    """[site, group]"""
    gap: float
    """See `Task.gap`."""
    grad_drop: np.ndarray | None = None
    """[site, group] mean size over gradients that skip one block each."""
