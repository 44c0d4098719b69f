"""Many changed versions of one text in one walk down the layers: the wavefront sweep, exact on unmodified classes.

    a row = a set of edits;  a row whose first edit is in block k shares everything above k with the clean run

so the batch grows as the walk goes down: the clean row alone enters the first block, and at block k the rows whose
first edit is there join from the clean residual. Every block's weights are read once for all rows, and a row runs
only the blocks it changes: one that changes what a block adds last joins behind that block (`_joining_late`). With a
common prefix (`model.prefix`) only positions from the first edited one on are run: for an edit at the reward position,
one token a row. What follows it is not run in a causal network; in one that is not, everything is (`Tokens.seen`).
Behind the last block one position is read: its MLP runs there alone where its code allows that (`Trunk.mlp_alone`).

A prompt-gated head reads a second position, where its weights are set. Where a row's edits reach it the row is read
with its own weights; a row whose edits are all behind it has those of the clean row, to the bit.

The clean row goes all the way in the same batch, and each row is compared with it. Blocks are called with the
arguments they were called with in a recorded pass over the same positions (`forward.record`).

`tests/reference/sweeps.py` has the slow loop, one whole forward a row, that this is held against.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.engine.attention_tap import AttentionTap
from reward_lens.engine.editing import (
    IN_ATTENTION,
    IN_MLP,
    RESIDUALS,
    Edit,
    Placed,
    Source,
    block_hooks,
    depth_of,
    edited,
)
from reward_lens.engine.gradients import reward_at
from reward_lens.engine.places import gate_inside, reaches_gate, require_site
from reward_lens.engine.row_budget import gradient_budget, row_budget
from reward_lens.engine.shared_keys import shared_keys
from reward_lens.errors import CheckFailed, DataError
from reward_lens.model.forward import Recording, one_position, record, suffix_batch
from reward_lens.model.prefix import NO_PREFIX, KeyValues, PrefixCache, keys_and_values
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens

Row = tuple[Edit, ...]
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Patched:
    """What the rows of a sweep gave, each beside the clean row of its own batch."""

    clean: Float[Tensor, " row"]
    """Reward of the clean row that walked with this row, float64."""
    rewards: Float[Tensor, " row"]
    final: Float[Tensor, "row d_model"]
    """Pre-norm residual at the reward position."""
    clean_final: Float[Tensor, "row d_model"]
    """The same of the clean row that walked with it."""
    states: dict[int, Tensor]
    """{depth: [row, d_model]} residual entering block `depth` at the reward position, for the depths asked for."""
    clean_states: dict[int, Tensor]
    """{depth: [d_model]}"""
    gate: Tensor | None
    """[row, d_model] what a prompt-gated head read of the prompt in every row; None for other heads."""
    clean_gate: Tensor | None
    """The same of the clean row that walked with it; equal where the row's edits are behind the gate."""
    start: int
    """First position that was run; what is before came from its keys and values."""
    alone: float
    """Reward of the recorded pass, in which the text ran by itself."""
    clean_gap: float
    """Largest distance of a clean row from that, over the scale of that reward: what the other rows changed is no
    measure of it."""

    @property
    def change(self) -> Float[Tensor, " row"]:
        """Reward of the row less that of its clean row."""
        return self.rewards - self.clean


@torch.no_grad()
def patch_rows(
    rm: RewardModel,
    base: Tokens,
    rows: Sequence[Row],
    depths: Sequence[int] = (),
    *,
    known: KeyValues = NO_PREFIX,
    reuse: bool = True,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Patched:
    """Run every row of edits on one text; everything after an edit is recomputed.

    Parameters
    ----------
    base: the text.
    rows: for each row the edits made in it together.
    depths: also keep the residual at the reward position at these depths.
    known: keys and values of some of the text's first positions, where the caller has them.
    reuse: whether the positions before the first edited one may come from their keys and values.
    max_rows: rows walking at once; None: as many as a token budget and the free memory allow.
    progress: told the number of rows done, walk by walk.

    Returns `Patched`. Raises `StructureError` for a site the model does not have, `DataError` for a row without edits
    or positions outside the text, `CheckFailed` where an edit gave NaN or infinite values.
    """
    if not rows:
        raise DataError("A sweep has no rows", found="an empty list", expected="at least one row of edits",
                        do="pass the sites to change")  # fmt: skip
    for row in rows:
        _require(rm, base, row)
    first_position = min(min(edit.positions) for row in rows for edit in row)
    start = first_position if reuse and rm.reuses_prefix(base) else 0
    last = max(max(edit.positions) for row in rows for edit in row)
    stop = max(base.reward_pos, last) + 1 if start else len(base)
    past = None
    if start:
        past = PrefixCache(keys_and_values(rm.trunk, base, start, known), rm.n_layers)
    writes: dict[Site, Tensor] = {}
    keeping = [
        hooks.read_output(rm.trunk.writers[s.kind][s.block], lambda y, s=s: writes.__setitem__(s, y.clone()))
        for s in dict.fromkeys(row[0].site for row in rows if _adds_last(rm, row))
    ]
    recording = record(rm.trunk, suffix_batch(base, start, rm.device, stop), *keeping, past=past)
    rows = [_joining_late(rm, row, i, writes, start) if _adds_last(rm, row) else row for i, row in enumerate(rows)]
    at = base.reward_pos - start
    walk = _Walk(rm, recording, at, gate_inside(rm, base, start), -start, sorted(set(depths)))
    moves_gate = [reaches_gate(rm, base, [p for edit in row for p in edit.positions]) for row in rows]
    out = _Collected(rm, base, walk, moves_gate)
    budget = row_budget(rm, stop - start, stop, max_rows)
    order = sorted(range(len(rows)), key=lambda i: _block(rows[i]))  # late rows together: early blocks are skipped
    for begin in range(0, len(order), budget):
        some = order[begin : begin + budget]
        out.take(some, walk.down([rows[i] for i in some], some))
        if progress is not None:
            progress(len(some))
    return out.patched(start)


def patch_gradients(
    rm: RewardModel,
    base: Tokens,
    rows: Sequence[tuple[Edit, Tensor]],
    *,
    known: KeyValues = NO_PREFIX,
    max_rows: int | None = None,
    frozen_at: Tensor | None = None,
) -> tuple[list[Tensor], list[float]]:
    """Of every row, which has one edit whose source gives a leaf: the gradient of the row's reward for that leaf.

    The walk is that of `patch_rows`; its rows are fewer, since every block's activations are kept for the backward.
    `frozen_at`: the pre-norm residual [d_model] at which the final norm's scale, and a gate, are held. Returned
    besides: the rewards of the clean rows that walked with them.
    """
    start = min(min(edit.positions) for edit, _ in rows) if rm.reuses_prefix(base) else 0
    stop = base.seen.stop
    with torch.no_grad():
        past = PrefixCache(keys_and_values(rm.trunk, base, start, known), rm.n_layers) if start else None
        recording = record(rm.trunk, suffix_batch(base, start, rm.device, stop), past=past)
    walk = _Walk(rm, recording, base.reward_pos - start, gate_inside(rm, base, start), -start, [])
    moves_gate = [reaches_gate(rm, base, edit.positions) for edit, _ in rows]
    fixed = rm.readout_inputs([base]) if walk.gate_at is None else None
    budget = gradient_budget(rm, stop - start, stop, max_rows)
    order = sorted(range(len(rows)), key=lambda i: _layer_of(rows[i][0]))
    out: list[Tensor] = [rows[0][1]] * len(rows)
    clean: list[float] = []
    for begin in range(0, len(order), budget):
        some = order[begin : begin + budget]
        with torch.enable_grad():
            reached = walk.down([(rows[i][0],) for i in some], some)
            gate = fixed if reached.gate is None else _read_by_gate(rm, reached.gate, [moves_gate[i] for i in some])
            rewards = reward_at(rm, reached.final, frozen_at, gate)
            slopes = torch.autograd.grad(rewards[1:].sum(), [rows[i][1] for i in some])
        clean.append(float(rewards[0].detach()))
        for i, slope in zip(some, slopes, strict=True):
            out[i] = slope
    return out, clean


class _Reached(NamedTuple):
    """What a walk came to."""

    final: Float[Tensor, "row d_model"]
    """Pre-norm residual at the reward position of the clean row and then of all rows."""
    gate: Float[Tensor, "row d_model"] | None
    """The same at the gate's position, where that was walked."""
    states: dict[int, tuple[list[int], Tensor]]
    """By depth which rows had joined, and their residuals at the reward position."""


class _Walk:
    """The walks over one recorded pass."""

    def __init__(
        self, rm: RewardModel, recording: Recording, at: int, gate_at: int | None, offset: int, depths: list[int]
    ):
        self.rm, self.recording, self.at, self.gate_at = rm, recording, at, gate_at
        self.offset, self.depths = offset, depths

    def down(self, rows: Sequence[Row], names: Sequence[int]) -> _Reached:
        """Rows in order of their first block; `names` is how their sources know them."""
        rm, blocks = self.rm, [_block(row) for row in rows]
        joined = 0
        x = self.recording.resid(blocks[0])
        states = {}
        for layer in range(blocks[0], rm.n_layers + 1):
            new = sum(b == layer for b in blocks[joined:])
            if new:
                x = torch.cat([x, x[:1].expand(new, -1, -1)])
                joined += new
            placed = [
                Placed(edit, 1 + i, names[i], self.offset)
                for i, row in enumerate(rows[:joined]) for edit in row if _layer_of(edit) == layer
            ]  # fmt: skip
            entering = [p for p in placed if p.edit.site.kind in RESIDUALS]
            if entering:
                x = edited(x, entering)
            if layer in self.depths:
                states[layer] = (list(range(joined)), x[1:, self.at].clone())
            if layer < rm.n_layers:
                x = self._block(layer, x, [p for p in placed if p.edit.site.kind not in RESIDUALS])
        gate = None if self.gate_at is None else x[:, self.gate_at].clone()
        return _Reached(x[:, self.at].clone(), gate, states)

    def _block(self, layer: int, x: Tensor, placed: list[Placed]) -> Tensor:
        args, kwargs = hooks.with_first_input(*self.recording.calls[layer], x)
        args, kwargs = grown(self.rm, args, kwargs, x.shape[0])
        tap = AttentionTap(self.rm, [p for p in placed if p.edit.site.kind in IN_ATTENTION])
        made = [
            *tap.hooks(),
            *block_hooks(self.rm, (x.shape[0], x.shape[1]), placed),
            *self._one_read(layer, x, placed),
        ]
        with hooks.attached(made), tap.active(), shared_keys(x):
            return hooks.first_output(self.rm.trunk.blocks[layer](*args, **kwargs))

    def _one_read(self, layer: int, x: Tensor, placed: list[Placed]) -> list[hooks.Hook]:
        """Behind the last block one position is read, so its MLP, where nothing in it is edited, runs there alone."""
        mlp = self.rm.trunk.mlp_alone if layer == self.rm.n_layers - 1 and x.shape[1] > 1 else None
        if mlp is None or self.gate_at is not None or any(p.edit.site.kind in IN_MLP for p in placed):
            return []
        return [one_position(mlp, self.at)]


class _Collected:
    """The rows' outcomes, walk by walk."""

    def __init__(self, rm: RewardModel, base: Tokens, walk: _Walk, moves_gate: list[bool]):
        self.rm, self.moves_gate, like, n = rm, moves_gate, rm.like, len(moves_gate)
        last = walk.recording.last
        gate = rm.readout_inputs([base]) if walk.gate_at is None else last[:, walk.gate_at].to(like)
        self.gate, self.clean_gate = (None if gate is None else gate.repeat(n, 1) for _ in range(2))
        self.alone = float(rm.readout.reward(last[:, walk.at].to(like), gate)[0])
        self.clean_final, self.final = (like.new_empty(n, like.shape[0]) for _ in range(2))
        self.clean_states = {d: walk.recording.resid(d)[0, walk.at].to(like) for d in walk.depths}
        self.states = {d: s.repeat(n, 1) for d, s in self.clean_states.items()}
        self.clean, self.rewards = (torch.empty(n, dtype=torch.float64) for _ in range(2))

    def take(self, rows: list[int], reached: _Reached) -> None:
        final, gate = reached.final.to(self.final), None
        if self.gate is not None and self.clean_gate is not None:
            if reached.gate is not None:
                read = _read_by_gate(self.rm, reached.gate, [self.moves_gate[i] for i in rows])
                self.clean_gate[rows], self.gate[rows] = read[0], read[1:]
            gate = torch.cat([self.clean_gate[rows[:1]], self.gate[rows]])
        rewards = self.rm.readout.reward(final, gate).double().cpu()
        if not torch.isfinite(rewards).all():
            raise CheckFailed(
                "An intervention gave rewards that are not finite",
                found=f"{int((~torch.isfinite(rewards)).sum())} of {len(rewards)} rows with NaN or infinite rewards",
                expected="finite rewards",
                do="look for NaN or infinite values in the source of the edit (a vector, a reference set); in float16 "
                "an added vector may overflow",
            )
        self.clean[rows], self.rewards[rows] = rewards[0], rewards[1:]
        self.clean_final[rows], self.final[rows] = final[0], final[1:]
        for depth, (which, state) in reached.states.items():
            self.states[depth][[rows[i] for i in which]] = state.to(self.final)

    def patched(self, start: int) -> Patched:
        gap = float((self.clean - self.alone).abs().max()) / self.rm.effect_scale(self.alone)
        return Patched(
            self.clean,
            self.rewards,
            self.final,
            self.clean_final,
            self.states,
            self.clean_states,
            self.gate,
            self.clean_gate,
            start,
            self.alone,
            gap,
        )


def _read_by_gate(rm: RewardModel, walked: Tensor, moves_gate: list[bool]) -> Float[Tensor, "row d_model"]:
    """Of a walk's clean row and its rows what the gate reads: the clean row's where a row's edits cannot reach it."""
    live = torch.tensor([False, *moves_gate], device=walked.device)
    return torch.where(live[:, None], walked, walked[:1]).to(rm.like)


def grown(rm: RewardModel, args: tuple, kwargs: dict, rows: int) -> tuple[tuple, dict]:
    """The arguments of a recorded call of one row, for `rows` rows: what grows with the rows is expanded."""
    names = list(inspect.signature(rm.trunk.blocks[0].forward).parameters)
    shared = rm.trunk.shared_arguments

    def grow(value, name: str):
        if isinstance(value, tuple):  # rotary cosines and sines
            return tuple(grow(v, name) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or name in shared:
            return value
        if "alibi" in name and value.shape[0] == rm.n_heads:  # [batch * heads, 1, pos]
            return value.repeat(rows, *[1] * (value.dim() - 1))
        return value.expand(rows, *value.shape[1:]) if value.shape[0] == 1 else value

    args = (args[0], *(grow(v, names[i + 1]) for i, v in enumerate(args[1:]))) if args else args
    return args, {k: v if v is hooks.first_input(args, kwargs) else grow(v, k) for k, v in kwargs.items()}


def _adds_last(rm: RewardModel, row: Row) -> bool:
    """Whether the row changes nothing but what a block adds to the residual stream after everything that it computes
    (in a post-norm block a norm comes behind).

    In 16 bits such a row runs its block, since adding the change to the rounded sum would round once more.
    """
    kinds = ("attn", "mlp") if rm.structure.parallel else ("mlp",)
    return len(row) == 1 and row[0].site.kind in kinds and not rm.sixteen_bit and not rm.trunk.norms


def _joining_late(rm: RewardModel, row: Row, number: int, writes: dict[Site, Tensor], start: int) -> Row:
    """The same change as one of the residual behind the block: + (new write - clean write), exactly 0 where equal."""
    (edit,) = row
    scale = rm.trunk.write_scale
    clean = writes[edit.site]
    clean = clean.reshape(1, -1, clean.shape[-1])
    placed = Placed(edit, 0, number, -start)
    moved = (edited(clean, [placed], scale=scale) - clean)[0, placed.where] * scale
    source = Source(edit.source.name, lambda x, site, run, positions: x + moved.to(x))
    return (Edit(Site("resid_post", edit.site.layer), edit.positions, source),)


def _block(row: Row) -> int:
    """The block at which a row leaves the clean run (n_layers: only the pre-norm residual is edited)."""
    return min(_layer_of(edit) for edit in row)


def _layer_of(edit: Edit) -> int:
    return depth_of(edit.site) if edit.site.kind in RESIDUALS else edit.site.block


def _require(rm: RewardModel, base: Tokens, row: Row) -> None:
    positions = [p for edit in row for p in edit.positions]
    for edit in row:
        require_site(rm, edit.site)
    if not row or any(not len(edit.positions) for edit in row) or not 0 <= min(positions) <= max(positions) < len(base):
        raise DataError(
            "An intervention names positions that cannot be changed",
            found="no edit or an empty span" if not positions else f"positions {min(positions)} to {max(positions)}",
            expected=f"at least one position, within the text's {len(base)} tokens",
            do="choose positions of the text (rm.tokenize shows them)",
        )
