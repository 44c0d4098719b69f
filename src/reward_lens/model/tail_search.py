"""The search for what stands behind the last block: the final norm and the head."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.errors import StructureError
from reward_lens.model.linear_maps import is_linear


def find_tail(model: Any, blocks_path: str, run_probe, known: str | None) -> tuple[str | None, str]:
    """The final norm (input: last resid_post, output: what the head reads) and the head (output: the logits)."""
    last = list(model.get_submodule(blocks_path))[-1]
    ends: dict[str, Tensor] = {}
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record(path, module) -> Iterator[hooks.Hook]:
        box = {}
        yield hooks.read_call(
            module, lambda args, kwargs: box.__setitem__("in", next((a for a in args if isinstance(a, Tensor)), None))
        )

        def after(output):
            if isinstance(output, Tensor) and isinstance(box.get("in"), Tensor):
                calls[path] = (box["in"].detach(), output.detach())

        yield hooks.Hook(module, "return", after)

    wanted = [hooks.read_output(last, lambda t: ends.__setitem__("post", t.detach().clone()))]
    for path, module in model.named_modules():
        if path and not path.startswith(blocks_path + "."):
            wanted += record(path, module)
    with hooks.attached(wanted):
        logits = run_probe()

    heads = [p for p, (_, out) in calls.items() if is_linear(model.get_submodule(p)) and _holds(out, logits)]
    heads = heads if known is None else [known]
    if not heads:
        raise StructureError(
            f"The reward head of {type(model).__name__} was not found",
            found="no linear module whose output contains the model's scores",
            expected="a linear reward head, one row an objective",
            do="pass structure= with the head's path, or readout= for a reward that is not a linear head",
        )
    read = calls[heads[0]][0]
    if _same(read, ends["post"]):
        return None, heads[0]
    for path, (entered, left) in calls.items():
        same = entered.shape == ends["post"].shape == left.shape == read.shape
        if same and _same(entered, ends["post"]) and _same(left, read):
            return path, heads[0]
    raise StructureError(
        f"What stands between the last block and the head {heads[0]} of {type(model).__name__} was not understood",
        found="no single module that turns the last block's output into the head's input",
        expected="one final norm, or none",
        do="pass structure= with final_norm=, or readout= if a further network stands before the head (an MLP head)",
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, on whichever devices."""
    return torch.equal(a.to(b.device), b)


def _holds(output: Tensor, logits: Tensor) -> bool:
    """Whether each row of the logits [batch, k] stands somewhere in the head's output [batch, (pos,) k]."""
    if output.shape[-1] != logits.shape[-1] or output.shape[0] != logits.shape[0]:
        return False
    rows = output.reshape(output.shape[0], -1, output.shape[-1])
    return bool((rows == logits[:, None].to(rows.device)).all(-1).any(-1).all())
