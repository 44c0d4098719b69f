"""Post-norm blocks (BERT and its kin): each write is added to the residual stream, and the sum is normed.

    h_mid = N1(h_pre + a)        h_post = N2(h_mid + m)

Two writes do not close such a block as two plain additions. The search looks for two submodules N1, N2 whose inputs are
these sums; the proof measures both sums, and that N2's output is the next block's input, in every block.

With every norm's scale held at its value in the run, each N is affine, so the final state is a sum over all writes

    h_L = sum_j A_j w_j + sum_k B_k shift_k        A_j = the gained, centred norms behind write j, in order

and a direction u of the final state is A_j' u for write j. The scales are those of the run itself: they are found again
from what block 0 reads and the writes at the same position, by walking down the stream.

Reference: Kobayashi et al. 2021, arXiv 2109.07152 (norms in the residual path); Elhage et al. 2021 (folding norms).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.errors import StructureError
from reward_lens.model.norm import Norm

if TYPE_CHECKING:
    from reward_lens.model.structure import Structure

ACCEPT = 0.02  # largest share of a write that its sum may leave unexplained


@dataclasses.dataclass(frozen=True)
class Carrier:
    """The norms behind the writes of a network, one a write in order (attention, MLP, attention, ...); none of them in
    a network whose writes are added as they are."""

    norms: tuple[Norm, ...]

    def scales(self, embed: Float[Tensor, "run d_model"], writes: Sequence[Tensor]) -> list[Tensor]:
        """Each norm's scale [run, 1] in runs whose stream begins with `embed` and takes these writes."""
        h, scales = embed, []
        for norm, write in zip(self.norms, writes, strict=True):
            scales.append(norm.scale(h + write))
            h = norm(h + write)
        return scales

    def final(self, embed: Float[Tensor, "run d_model"], writes: Sequence[Tensor]) -> Float[Tensor, "run d_model"]:
        """The state of a stream that begins with `embed` behind these writes (all or the first), the norms live."""
        h = embed
        for norm, write in zip(self.norms[: len(writes)], writes, strict=True):
            h = norm(h + write)
        return h

    def pulled(
        self, embed: Float[Tensor, "run d_model"], writes: Sequence[Tensor], u: Float[Tensor, "run d_model"]
    ) -> tuple[list[Tensor], Tensor]:
        """Directions of what block 0 reads and of each write, [run, d_model] each, that stand for `u` of the final
        state, and the shifts' part [run] of u . h."""
        if not self.norms:
            return [u] * (1 + len(writes)), torch.zeros_like(u[..., 0])
        directions, constant = [], torch.zeros_like(u[..., 0])
        for norm, scale in zip(reversed(self.norms), reversed(self.scales(embed, writes)), strict=True):
            constant = constant + (u * norm.shift).sum(-1)
            u = norm.pull_back(u, scale)
            directions.append(u)
        return [u, *reversed(directions)], constant

    def carried(
        self, embed: Float[Tensor, "run d_model"], writes: Sequence[Tensor]
    ) -> Float[Tensor, "run part d_model"]:
        """What block 0 reads and each write as parts of the final state, and, where there are norms, their shifts as a
        last part: the parts sum to the final state."""
        parts = [embed]
        if not self.norms:
            return torch.stack([*parts, *writes], 1)
        shifts = torch.zeros_like(embed)
        for norm, scale, write in zip(self.norms, self.scales(embed, writes), writes, strict=True):
            parts = [norm.frozen(part, scale) - norm.shift for part in (*parts, write)]
            shifts = norm.frozen(shifts, scale)
        return torch.stack([*parts, shifts], 1)


def closing_writes(pre: Tensor, post: Tensor, outputs: dict[str, Tensor], inputs: dict[str, Tensor]):
    """(attn, mlp, norm behind attn, norm behind mlp) of a post-norm block, or None where no such four are found."""
    order = list(outputs)
    named = [path for path in order if path in inputs and inputs[path].shape == pre.shape]

    def sums(stream: Tensor, norm: str) -> list[str]:
        return [w for w in order if w != norm and left_over(stream, outputs[w], inputs[norm]) < ACCEPT]

    seconds = [n for n in named if torch.equal(outputs[n], post)]
    found = [
        (first_write, second_write, first, second)
        for second in seconds
        for first in named if first != second
        for second_write in sums(outputs[first], second)
        for first_write in sums(pre, first)
    ]  # fmt: skip
    # Aliases (a dense layer and the dropout behind it) close equally well: the shallowest, then the first called.
    return min(found, key=lambda four: [(p.count("."), order.index(p)) for p in four]) if found else None


def proven_gaps(name: str, blocks: list[nn.Module], structure: "Structure", run_probe) -> tuple[float, ...]:
    """Unexplained share of each block; raises `StructureError` for one that does not add up as a post-norm block."""
    assert structure.norms is not None
    seen: dict[str, Tensor] = {}
    gaps: list[float] = []
    last: list[Tensor] = []

    def keep(what: str):
        return lambda x: seen.__setitem__(what, x.detach().clone())

    def enter(x: Tensor) -> None:
        seen.clear()
        seen["pre"] = x.detach().clone()
        if last:
            gaps[-1] = max(gaps[-1], float((x - last[-1]).norm() / x.norm()))

    def close(x: Tensor) -> None:
        first = left_over(seen["pre"], seen["attn"], seen["first sum"])
        second = left_over(seen["mid"], seen["mlp"], seen["second sum"])
        behind = float((x - seen["post"]).norm() / x.norm())
        gaps.append(max(first, second, behind))
        last.append(x.detach().clone())

    wanted = []
    for layer, block in enumerate(blocks):
        first, second = (block.get_submodule(path) for path in structure.norms)
        wanted += [
            hooks.read_input(block, enter),
            hooks.read_output(block.get_submodule(structure.path("attn", layer)), keep("attn")),
            hooks.read_input(first, keep("first sum")),
            hooks.read_output(first, keep("mid")),
            hooks.read_output(block.get_submodule(structure.path("mlp", layer)), keep("mlp")),
            hooks.read_input(second, keep("second sum")),
            hooks.read_output(second, keep("post")),
            hooks.read_output(block, close),
        ]
    try:
        with hooks.attached(wanted):
            run_probe()
    except KeyError as missing:
        raise _not_closed(name, len(gaps), f"{missing} never ran in that block") from missing
    for layer, gap in enumerate(gaps):
        if not gap < ACCEPT:
            raise _not_closed(name, layer, f"{gap:.1%} is left unexplained by ({structure.attn}, {structure.mlp}) and "
                              f"the norms ({', '.join(structure.norms)})")  # fmt: skip
    return tuple(gaps)


def left_over(stream: Tensor, write: Tensor, total: Tensor) -> float:
    """Share of what was added to the stream that the write leaves unexplained."""
    stream, write, total = (x.reshape(total.shape).double() for x in (stream, write, total))
    added = (total - stream).norm()
    return float((total - stream - write).norm() / added) if added > 0 else 1.0


def require_added(rm: Any, question: str) -> None:
    """Raise for post-norm blocks, where what a part writes does not reach later parts as it is."""
    if rm.structure.norms is not None:
        raise StructureError(
            f"{question} has no answer in post-norm blocks",
            found=f"norms behind every write of {rm.name} ({', '.join(rm.structure.norms)}), which rescale what is "
            "already in the residual stream",
            expected="blocks that add their writes to the residual stream and leave it as it was",
            do="ask contributions, effects or path_effects, which carry every write through the norms behind it",
        )


def _not_closed(name: str, layer: int, found: str) -> StructureError:
    return StructureError(
        f"Block {layer} of {name} does not add up as a post-norm block",
        found=found,
        expected=f"h_mid = N1(h + a), h_post = N2(h_mid + m), each sum explained but for {ACCEPT:.0%}, and h_post "
        "handed on to the next block",
        do="pass structure=rl.Structure(..., norms=(N1, N2)) naming the norms whose inputs are these sums; networks "
        "with further layers between the blocks (a convolution) are not supported",
    )
