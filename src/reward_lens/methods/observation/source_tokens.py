"""Contributions by source token: from which position each write at the reward position was read.

Head h of block l writes  W_O sum_s A[s] v[s]  at the reward position: the part of source s is A[s] v[s], through the
output map and (scale frozen) the post-norm. `embed`, MLP writes, biases and rounding have no other source than the
reward position itself and stand there. Summed over positions this is the component split, summed over components it
says which tokens the reward was read from.

What this cannot show: what a source token itself meant: v[s] already holds what earlier blocks moved there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.engine.attention import AttentionRow, attention_rows
from reward_lens.methods.observation.lens import token_coords
from reward_lens.methods.observation.splits import HeadSplit, Labels, closing_rows, columns, component_coords
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.readout import Readout
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens, common_prefix
from reward_lens.result import Check, Result


@torch.no_grad()
def source_token_contributions(rm: RewardModel, pairs, scale: str) -> Result:
    """Value (pair, side, component, position) in reward units; see `contributions(by="token")`.

    Margins exist only at positions where both runs have the same tokens. Checks: completeness (E2) and the split of
    each attention write (E3), recomputed attention against the same pass's write.
    """
    pairs = data.as_pairs(pairs)
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    prefixes = [common_prefix(a, b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    split = HeadSplit(rm)
    labels, layers, kinds, _ = _labels(rm)
    values = np.full((len(pairs), 3, len(labels), max(len(t) for t in tokens)), np.nan)
    gaps: list[tuple[float, ...]] = []
    for i in range(len(pairs)):
        both = tokens[2 * i : 2 * i + 2]
        runs = source_runs(rm, split, both, rm.readout, rm.readout_inputs(both))
        own = [runs[side].parts(runs[side].direction.u) for side in (0, 1)]
        n = prefixes[i]
        for side in (0, 1):
            length = len(both[side])
            values[i, side, :, :length] = placed(own[side], both[side].reward_pos, length)
            gaps.append(runs[side].gaps(*own[side]))
        if scale == "shared":
            cross = [runs[side].parts(runs[1 - side].direction.u) for side in (0, 1)]
            own = [((a + x) / 2, (b + y) / 2) for (a, b), (x, y) in zip(own, cross, strict=True)]
        shared = [placed(own[side], both[side].reward_pos, len(both[side]))[:, :n] for side in (0, 1)]
        values[i, 2, :, :n] = shared[0] - shared[1]
    tolerance = 1e-2 if rm.sixteen_bit else 1e-5
    worst = np.max(gaps, axis=0)
    names = ["completeness", "finer split", *(["residual rounding"] if rm.sixteen_bit else [])]
    coords = component_coords(labels, layers, kinds) | token_coords(tokens, prefixes)
    return paired_result(
        rm, "contributions", pairs, values, ("pair", "side", "component", "position"), coords,
        checks=[Check(name, float(gap), tolerance) for name, gap in zip(names, worst, strict=False)],
        undefined="a margin exists only where both runs have the same tokens", interval=False,
        title="Contributions by source token", settings={"by": "token", "scale": scale},
        shows="From which positions the heads read what they write at the reward position.",
        cannot_show="What a source token meant by itself: earlier blocks have moved other tokens' content there.",
    )  # fmt: skip


def source_runs(
    rm: RewardModel, split: HeadSplit, texts: Sequence[Tokens], readout: Readout, gates: Tensor | None = None
) -> "list[SourceRun]":
    """Each text's run, to be split for what `readout` reads at its reward position. A mixer without heads reads its
    sources through a state that no map splits: `StructureError`."""
    split.require_heads_everywhere()
    runs = {}
    for batch, rows, writes in attention_rows(rm, texts):
        for place, run in enumerate(batch.rows):
            gate = None if gates is None else gates[run : run + 1]
            row = [_one(r, place) for r in rows]
            runs[run] = SourceRun(rm, split, row, [w[place] for w in writes], readout, gate)
    return [runs[i] for i in range(len(texts))]


class SourceRun:
    """One run's attention rows and writes, ready to be projected on any direction."""

    def __init__(
        self, rm: RewardModel, split: HeadSplit, rows: list[AttentionRow], writes: list[Tensor], readout: Readout,
        gate: Tensor | None,
    ):  # fmt: skip
        self.rm, self.split, self.rows = rm, split, rows
        self.embed, *self.writes, self.h = writes
        self.direction = readout.direction(self.h[None], gate)
        self.reward = readout.reward(self.h[None], gate)[0]

    def parts(self, u: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """([layer, source] attention parts, [component] what stands at the reward position)."""
        along, shifts = self._along(u)
        attention, local = [], [(self.embed * along[0][0]).sum()]
        for layer, row in enumerate(self.rows):
            pulled, constant = self.split.pulled(row.z, along[1 + 2 * layer], layer)
            by_source = row.weights[0] * (row.values[0] @ pulled.view(self.rm.n_heads, -1, 1)).squeeze(-1)
            attention.append(by_source.double().sum(0))
            local += [constant[0], (self.writes[2 * layer + 1] * along[2 + 2 * layer][0]).sum()]
        local += [shifts[0]] * bool(self.rm.trunk.norms)
        if self.rm.sixteen_bit:
            lost = (self.h.double() * u[0]).sum() - torch.stack(attention).sum() - torch.stack(local).double().sum()
            local.append(lost)
        local.append(self.direction.constant[0])
        return torch.stack(attention).cpu().numpy(), torch.stack([x.double() for x in local]).cpu().numpy()

    def _along(self, u: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.rm.trunk.carrier.pulled(self.embed[None], [w[None] for w in self.writes], u)

    def gaps(self, attention: np.ndarray, local: np.ndarray) -> tuple[float, ...]:
        size = np.abs(attention).sum() + np.abs(local).sum()
        whole = abs(attention.sum() + local.sum() - float(self.reward)) / size
        along, _ = self._along(self.direction.u)
        writes = [float((self.writes[2 * layer] * along[1 + 2 * layer][0]).sum()) for layer in range(len(self.rows))]
        constants = local[1 : 1 + 2 * len(self.rows) : 2]
        finer = np.abs(attention.sum(1) + constants - np.array(writes)).max() / size
        rounding = abs(local[-2]) / size if self.rm.sixteen_bit else 0.0
        return float(whole), float(finer), float(rounding)


def placed(parts: tuple[np.ndarray, np.ndarray], reward_pos: int, length: int) -> np.ndarray:
    """[component, position]: attention over its sources, everything else at the reward position."""
    attention, local = parts
    n_layers = attention.shape[0]
    out = np.zeros((n_layers + len(local), length))
    out[0, reward_pos] = local[0]
    for layer in range(n_layers):
        out[1 + 3 * layer, :] = attention[layer, :length]
        out[2 + 3 * layer, reward_pos] = local[1 + 2 * layer]
        out[3 + 3 * layer, reward_pos] = local[2 + 2 * layer]
    out[1 + 3 * n_layers :, reward_pos] = local[1 + 2 * n_layers :]
    return out


def _labels(rm: RewardModel) -> Labels:
    rows = [("embed", -1, "embed", -1)]
    for layer in range(rm.n_layers):
        rows += [(f"L{layer}.{kind}", layer, kind, -1) for kind in ("attn", "attn_bias", "mlp")]
    return columns(rows + closing_rows(rm, "own"))


def _one(row: AttentionRow, place: int) -> AttentionRow:
    keep = slice(place, place + 1)
    return AttentionRow(row.weights[keep], row.values[keep], row.z[keep])
