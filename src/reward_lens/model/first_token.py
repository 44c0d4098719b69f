"""Where an encoder's head reads: the first token's final state, through a pooler, measured rather than known.

Behind the last block (and a final norm, if there is one) the network may do anything with the final states. What is
measured is which token's state moves the scores; where it is the first one alone, the modules that ran behind it are
the head: the linear map that gives the scores, and what stands before it (a pooler).
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.errors import StructureError
from reward_lens.model.norm import measure_norm


class FirstTokenTail(NamedTuple):
    """Paths of what stands behind the blocks."""

    final_norm: str | None
    pooler: str
    head: str


def first_token_tail(model: Any, blocks_path: str, run_probe) -> FirstTokenTail | None:
    """What reads the first token's final state; None where the scores do not come from there.

    Raises `StructureError` where several tokens' states move the scores (mean pooling), and where what stands behind
    the final state is not a pooler followed by a linear map.
    """
    last = list(model.get_submodule(blocks_path))[-1]
    logits = run_probe()
    first, others = _moved(last, run_probe, first=True), _moved(last, run_probe, first=False)
    if not torch.equal(others, logits):
        if torch.equal(first, logits):
            return None
        raise StructureError(
            f"The head of {type(model).__name__} reads more than one token's state",
            found="scores that move with the final states of the first token and of the others (mean pooling)",
            expected="a head that reads one token's final state",
            do="load a checkpoint that pools the first token (ModernBERT: classifier_pooling='cls'): a reward averaged "
            "over tokens is read at no position, so no direction or position of it can be asked for",
        )
    calls = _behind(model, blocks_path, last, run_probe)
    final_norm = next((path for path, module in calls if _is_final_norm(model, path, module, last, run_probe)), None)
    behind = {p: m for p, m in calls if p != final_norm and any(True for _ in m.parameters())}
    parts = _outermost(behind)
    while len(parts) == 1 and len(behind) > 1:  # one module holds pooler and head (RoBERTa's classifier)
        del behind[parts[0]]
        parts = _outermost(behind)
    # An adapter's wrapper holds the linear map that runs.
    within = tuple(f"{part}." for part in parts[1:])
    heads = [p for p, m in behind.items() if f"{p}.".startswith(within) and isinstance(m, nn.Linear)]
    if len(parts) != 2 or len(heads) != 1:
        raise StructureError(
            f"What reads the first token of {type(model).__name__} was not understood",
            found="behind the last block: " + (", ".join(parts) or "nothing with parameters"),
            expected="a pooler, and a linear map from it to the scores",
            do="pass structure= with final_norm=, pooler=, head= and reads_first=True",
        )
    return FirstTokenTail(final_norm, parts[0], heads[0])


def _outermost(paths: Collection[str]) -> list[str]:
    """Those that are inside no other one, in order."""
    return [p for p in paths if not any(p.startswith(q + ".") for q in paths)]


def _moved(last: nn.Module, run_probe, first: bool) -> Tensor:
    """The scores when the final states of the first token, or of all others, are others."""

    def move(x: Tensor) -> Tensor:
        x = x.clone()
        part = x[:, :1] if first else x[:, 1:]
        part.copy_(part.flip(-1) * 1.5 + 0.1)
        return x

    with hooks.attached([hooks.edit_output(last, move)]):
        return run_probe()


def _behind(model: Any, blocks_path: str, last: nn.Module, run_probe) -> list[tuple[str, nn.Module]]:
    """The modules that ran after the last block, in order, without those that hold it."""
    over: list[bool] = []
    found: list[tuple[str, nn.Module]] = []
    holders = {path for path, module in model.named_modules() if any(m is last for m in module.modules())}
    wanted = [hooks.read_output(last, lambda x: over.append(True))]
    for path, module in model.named_modules():
        if path not in holders and not path.startswith(blocks_path + "."):
            act = lambda args, kwargs, p=path, m=module: found.append((p, m)) if over else None  # noqa: E731
            wanted.append(hooks.read_call(module, act))
    with hooks.attached(wanted):
        run_probe()
    return found


def _is_final_norm(model: Any, path: str, module: nn.Module, last: nn.Module, run_probe) -> bool:
    """Whether the module norms the last block's output at every position."""
    seen: dict[str, Tensor] = {}
    wanted = [
        hooks.read_output(last, lambda x: seen.__setitem__("post", x.detach().clone())),
        hooks.read_input(module, lambda x: seen.__setitem__("in", x.detach().clone())),
        hooks.Hook(module, "return", lambda out: seen.__setitem__("out", out)),
    ]
    with hooks.attached(wanted):
        run_probe()
    out = seen.get("out")
    if not isinstance(out, Tensor) or out.shape != seen["post"].shape or not torch.equal(seen["in"], seen["post"]):
        return False
    try:
        measure_norm(module, out.shape[-1], next(model.parameters()))
    except StructureError:
        return False
    return True
