"""All objectives of one head, so that one pass answers for every one of them."""

from reward_lens.errors import StructureError
from reward_lens.model.own_readout import own_readout
from reward_lens.model.readout import PromptGated, Readout
from reward_lens.model.reward_model import RewardModel


def with_every_objective(rm: RewardModel) -> tuple[RewardModel, dict[str, Readout]]:
    """The model as it has to be run, and the readout of every objective by name, behind the one final norm.

    Where an objective is weighed by the prompt the model is read by that one, so that its passes keep what the gate
    reads. Raises `StructureError` for a head with one objective.
    """
    names = rm.objectives
    if len(names) < 2:
        raise StructureError(
            "The head has one objective",
            found=f"the objective {rm.readout.objective!r} of a readout of kind {rm.readout.kind!r}",
            expected="a head with several rows or objectives",
            do="use effects and contributions, which ask for the one that the model was loaded with",
        )
    readouts = {name: own_readout(rm, row) for row, name in enumerate(names)}
    gated = next((name for name, readout in readouts.items() if isinstance(readout, PromptGated)), None)
    return rm if gated is None or isinstance(rm.readout, PromptGated) else rm.for_objective(gated), readouts
