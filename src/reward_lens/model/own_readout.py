"""From a model's own head to its readout: linear, behind a pooler, a published head's or a hidden layer's."""

from typing import TYPE_CHECKING

from reward_lens.errors import LoadError
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.heads.tail import tail_readout
from reward_lens.model.linear_maps import linear_weight
from reward_lens.model.norm import measure_norm
from reward_lens.model.readout import Readout, chosen_rows, linear_readout
from reward_lens.model.step_hidden import hidden_readout, is_hidden

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel


def own_readout(rm: "RewardModel", objective: str | int | None) -> Readout:
    """The readout of a model's head, of the row (or the two rows) that `objective` names."""
    names, final = rm.objectives, rm.trunk.final_norm
    own = rm.module if isinstance(rm.module, OwnHead) else None
    if is_hidden(rm.head):
        return hidden_readout(rm.head, final, names[0])
    if objective is None and own is not None and own.first_is_reward:
        objective = 0
    rows = chosen_rows(names, objective, rm.name)
    if rm.structure.pooler is not None:
        norm = measure_norm(final, rm.config.get_text_config().hidden_size, next(rm.head.parameters()))
        return tail_readout(rm.module, rm.structure, norm, rows)
    if own is None:
        weight = linear_weight(rm.head)
        norm = measure_norm(final, weight.shape[1], weight)
        return linear_readout(norm, rm.head, rows.row, rows.name, rows.less)
    if rows.less is not None:
        raise LoadError("A published head is read by one objective", found=f"the difference {rows.name}",
                        expected="one of " + ", ".join(names), do=f"pass objective={names[rows.row]!r}")  # fmt: skip
    return own.readout(measure_norm(final, own.width, next(rm.head.parameters())), rows.row)
