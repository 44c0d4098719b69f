"""What is read of the rows of a sweep: the change of the reward, or several columns of it from the same rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_lens.engine.patching import Patched
from reward_lens.engine.runs import TextRun
from reward_lens.model.heads.gated import require_gated
from reward_lens.model.readout import Readout
from reward_lens.model.reward_model import RewardModel


class Reading:
    """The change of the reward of every row against its clean row.

    With the final norm frozen its scale at the reward position is the clean row's; a gate that reads the prompt reads
    what stands there.
    """

    dim: str | None = None
    """Name of the dim of columns; None for one number a row."""
    names: tuple[str, ...] = ()
    whole: Any = ...
    """Index of the columns that are changes of a whole reward, which the last residual carries."""

    def __init__(self, rm: RewardModel, norm: str = "live"):
        self.rm, self.norm = rm, norm

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the columns: () or (number,)."""
        return () if self.dim is None else (len(self.names),)

    @torch.no_grad()
    def change(self, out: Patched) -> np.ndarray:
        """[(column,) row]"""
        if self.norm == "live":
            return out.change.numpy()
        frozen = self.rm.readout.direction(out.clean_final, out.clean_gate)
        change = ((out.final.double() - out.clean_final.double()) * frozen.u.double()).sum(-1)
        if out.gate is not None:
            moved = self.rm.readout.direction(out.clean_final, out.gate)
            change += ((moved.u.double() - frozen.u.double()) * out.final.double()).sum(-1)
            change += moved.constant.double() - frozen.constant.double()
        return change.cpu().numpy()

    def of_run(self, run: TextRun) -> np.ndarray:
        """[(column)] what the columns are of an unchanged run, for margins."""
        return np.array(run.reward)

    def of_clean(self, out: Patched) -> np.ndarray:
        """[(column)] the same of the unchanged run of a sweep."""
        return np.array(out.alone)


class Routes(Reading):
    """The ways in which a change of the prompt reaches a prompt-gated reward: see `gate_routes`."""

    dim, names, whole = "route", ("value", "gate", "interaction", "total"), 3

    def __init__(self, rm: RewardModel):
        super().__init__(rm)
        self.readout = require_gated(rm.readout)
        self.interaction_gap = 0.0
        """Largest distance of an interaction from (w' - w) . (N(h') - N(h)), over the scale of effects."""

    @torch.no_grad()
    def change(self, out: Patched) -> np.ndarray:
        assert out.gate is not None and out.clean_gate is not None
        (h, gate), (new_h, new_gate) = (out.clean_final, out.clean_gate), (out.final, out.gate)
        read = self.readout.reward
        kinds = ((h, gate), (new_h, gate), (h, new_gate), (new_h, new_gate))
        clean, value, through, total = (read(states, given).double() for states, given in kinds)
        both = (total - value) + (clean - through)  # 0 to the bit where the gate reads the same
        changes = torch.stack([value - clean, through - clean, both, total - clean])
        weights = self.readout.weights(new_gate) - self.readout.weights(gate)
        product = (weights @ self.readout.rows * (self.readout.norm(new_h) - self.readout.norm(h))).sum(-1).double()
        size = self.rm.effect_scale(out.alone, float(changes.abs().max()))
        self.interaction_gap = max(self.interaction_gap, float((changes[2] - product).abs().max()) / size)
        return changes.cpu().numpy()


class Objectives(Reading):
    """Every objective of a head, each a column."""

    dim = "objective"

    def __init__(self, rm: RewardModel, readouts: Mapping[str, Readout]):
        super().__init__(rm)
        self.names, self.readouts = tuple(readouts), tuple(readouts.values())

    @torch.no_grad()
    def change(self, out: Patched) -> np.ndarray:
        return self._read(out.final, out.gate) - self._read(out.clean_final, out.clean_gate)

    @torch.no_grad()
    def of_run(self, run: TextRun) -> np.ndarray:
        return self._read(run.final[None], run.gate)[:, 0]

    @torch.no_grad()
    def of_clean(self, out: Patched) -> np.ndarray:
        return self._read(out.clean_final[:1], None if out.clean_gate is None else out.clean_gate[:1])[:, 0]

    def _read(self, h: Tensor, gate: Tensor | None) -> np.ndarray:
        return torch.stack([one.reward(h, gate) for one in self.readouts]).double().cpu().numpy()
