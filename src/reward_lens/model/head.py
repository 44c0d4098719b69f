"""A reward model with one row of its head replaced; every other weight is shared with the model it came from.

The copy is a `RewardModel` of its own, load report included, so every method takes it. What was done to the row is kept
in its `edits`, one record a change, oldest first. The new row is stored in the head's own precision, because that is
what a checkpoint can hold: what a method computes from the edited model is what the saved one gives.
"""

import copy
import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_lens.errors import DataError
from reward_lens.model.adapters import require_no_live_adapter
from reward_lens.model.heads.linear import LinearScore
from reward_lens.model.heads.own import OwnHead, head_of
from reward_lens.model.linear_maps import linear_bias, linear_weight
from reward_lens.model.placement import require_all_there
from reward_lens.model.readout import LinearReadout
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.vocab_readout import refuse_change


def trunk_name(rm: RewardModel) -> str:
    """Name of the model whose trunk this is: its own, or that of the one whose head was edited first."""
    return rm.edits[0]["model"] if rm.edits else rm.name


def editable_readout(rm: RewardModel) -> LinearReadout:
    """The linear readout, or a `DataError` for a reward that is no row of a linear head."""
    if isinstance(rm.readout, LinearReadout) and not isinstance(rm.head, nn.ModuleList):
        return rm.readout
    gated = f", objective {rm.readout.objective!r} of a head of several parts" if len(rm.objectives) > 1 else ""
    raise DataError(
        "This reward has no head row to edit",
        found=f"a readout of kind {rm.readout.kind!r}{gated}",
        expected="one row of a linear head behind the final norm, which no other reward is made of",
        do="load a model with a linear head; or take directions out of the residual at run time (rl.intervene with "
        "rl.project_out at the last resid_post)",
    )


def stored(rm: RewardModel, row: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
    """Rows as the head's precision holds them, in the readout's precision and units."""
    _, scale = _standard(rm)
    return (row * scale.to(row)).to(linear_weight(rm.head).dtype).to(editable_readout(rm).weight) / scale


def _standard(rm: RewardModel) -> tuple[Tensor, Tensor]:
    """What the model takes off its head's output, and what it divides the rest by: 0 and 1 but for a head that
    standardises its rewards, whose readout is in units of the reward."""
    weight = editable_readout(rm).weight
    if not isinstance(rm.module, LinearScore):
        return weight.new_zeros(()), weight.new_ones(())
    mean, scale = rm.module.standard(weight)
    return mean[rm.row], scale[rm.row]


@torch.no_grad()
def with_row(
    rm: RewardModel, row: Float[Tensor, " d_model"], record: Mapping[str, Any], bias: Tensor | None = None
) -> RewardModel:
    """The same model with another row in its head.

    `bias` replaces the row's own (None: left as it is); a head without one keeps none. `record` says what was done; the
    model, the objective, the sizes of the rows and this library's version are added. The given model is unchanged.
    Raises `DataError` for a row that leaves nothing of the reward, and for a head that another part of the model uses.
    """
    refuse_change(rm, "An edit of the head")
    before, number = editable_readout(rm), rm.row
    require_no_live_adapter(rm.module, "An edit of the head")
    require_all_there(rm.module, "An edit of the head", rm.structure.head)
    after = stored(rm, row)
    require_own_head(rm)
    size, left = (float((w * before.norm.gain).double().norm()) for w in (before.weight, after))
    if not left > 1e-6 * size:
        raise DataError(
            "Nothing of the reward would be left",
            found=f"a row of {left / size:.1e} of its former size, gains of the norm counted",
            expected="a row that still reads the residual stream",
            do="remove fewer directions, or use a smaller alpha",
        )
    module = sharing_copy(rm.module, but=rm.head)
    head = head_of(module, rm.structure)
    mean, scale = _standard(rm)
    linear_weight(head)[number].copy_(after * scale)
    has_bias = linear_bias(head)
    if bias is not None:
        if has_bias is None:
            raise DataError("The head has no bias to set", found="a head without bias", expected="bias=None",
                            do="report the constant instead")  # fmt: skip
        has_bias[number].copy_(bias * scale + mean)
    kept = (w.double() for w in (before.weight, after))
    words = {
        **record,
        "model": rm.name,
        "objective": before.objective,
        "row": number,
        "weight_norm_before": float(before.weight.double().norm()),
        "weight_norm_after": float(after.double().norm()),
        "weight_cosine": float(torch.cosine_similarity(*kept, dim=0)),
        "head_dtype": str(linear_weight(head).dtype).removeprefix("torch."),
        "reward_lens": importlib.metadata.version("reward-lens"),
    }
    return RewardModel(
        module, rm.tokenizer.hf, objective=number, structure=rm.structure, truncation=rm.truncation,
        name=f"{trunk_name(rm)} (head {_digest(head)})", revision=rm.revision, edits=(*rm.edits, words),
    )  # fmt: skip


def sharing_copy(module: Any, but: nn.Module | None = None) -> Any:
    """A copy of a network with a configuration of its own whose tensors are the same ones, except those of `but`."""
    own = set() if but is None else {id(t) for t in (*but.parameters(), *but.buffers())}
    shared = (t for t in (*module.parameters(), *module.buffers()) if id(t) not in own)
    return copy.deepcopy(module, {id(t): t for t in shared})


def require_own_head(rm: RewardModel) -> None:
    """Raise `DataError` where another part of the model uses the head's weights too."""
    own = {id(p) for p in rm.head.parameters()}
    paths = [rm.structure.head, rm.structure.pooler, *(n for n, part in rm.module.named_modules() if part is rm.head)]
    inside = tuple(f"{path}." for path in paths if path is not None)
    named = rm.module.named_parameters(remove_duplicate=False)
    trunk = f"{rm.module.base_model_prefix}." if isinstance(rm.module, OwnHead) else ""  # its head has several parts
    others = [name for name, p in named if id(p) in own and name.startswith(trunk) and not name.startswith(inside)]
    if others:
        raise DataError(
            "The head cannot be edited alone",
            found=f"its weights are also those of {', '.join(others)}",
            expected="a head with weights of its own",
            do="untie them (tie_word_embeddings=False) before loading",
        )


def _digest(head: nn.Module) -> str:
    """Eight hex digits of the head's numbers: two edits of one model differ in name, and so never share scores."""
    numbers = [t.detach().double().cpu().numpy().tobytes() for t in head.parameters()]
    return hashlib.sha256(b"".join(numbers)).hexdigest()[:8]
