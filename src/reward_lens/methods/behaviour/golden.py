"""Does the loaded model give the scores that its authors printed?"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from reward_lens.arguments import checked_arguments
from reward_lens.data.golden import GoldenScore, golden_entries
from reward_lens.errors import DataError
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import Check, Result

QUANTITIES = ("expected", "found", "gap", "tolerance")


@checked_arguments
def golden_scores(rm: RewardModel, entries: str | Path | Iterable | None = None) -> Result:
    """Published scores of this model beside those it gives here.

        gap = |found - expected|,      a miss where gap > tolerance

    Parameters
    ----------
    rm: the loaded model. Its name is its hub id, or a folder called as the id ends.
    entries: published scores: a JSON lines file or a list of `GoldenScore` or of their fields. None: those that come
        with the package, each with its page. Entries of other models are left out.

    Returns value (entry, quantity) in reward units; quantity = "expected", "found", "gap", "tolerance". Coordinates
    `text`, `objective`, `precision` (what the authors ran it in), `source` and `note`. `meta["misses"]` counts the
    entries past their tolerance, which the check "misses" records: a miss is a finding, not a broken identity, so it
    raises nothing. Raises `DataError` where no score is kept for this model, and for a row that is none.
    What it cannot show: that the model scores other texts as its authors' code does; and a printed score in 16 bits on
    another kernel differs from this one's by about 1%, so a small fault of the template may stay inside the tolerance.
    """
    given = golden_entries(entries)
    own = [entry for entry in given if entry.of(rm.name, rm.revision)]
    if not own:
        raise DataError(
            f"No golden score is kept for {rm.name}",
            found=f"scores of {', '.join(sorted({entry.model for entry in given})) or 'no model'}",
            expected="a published score of this model, under its hub id",
            do="pass entries= with the score that its card prints, or load it under its hub id",
        )
    models: dict[str, RewardModel] = {}
    found = []
    for entry in own:
        name = entry.objective or _usual_objective(rm)
        if name not in models:
            models[name] = rm if name == rm.readout.objective else rm.for_objective(name)
        found.append(_score(models[name], entry))
    expected, tolerance = (np.array([getattr(e, n) for e in own], dtype=float) for n in ("expected", "tolerance"))
    gap = np.abs(np.array(found) - expected)
    misses = int((~(gap <= tolerance)).sum())
    coords = {
        "entry": np.arange(1, len(own) + 1),
        "quantity": np.array(QUANTITIES, dtype=object),
        "text": ("entry", np.array([entry.words for entry in own], dtype=object)),
        "objective": ("entry", np.array([e.objective or _usual_objective(rm) for e in own], dtype=object)),
        "precision": ("entry", np.array([entry.precision for entry in own], dtype=object)),
        "source": ("entry", np.array([entry.source for entry in own], dtype=object)),
        "note": ("entry", np.array([entry.note for entry in own], dtype=object)),
    }
    value = xr.DataArray(np.stack([expected, found, gap, tolerance], 1), dims=("entry", "quantity"), coords=coords)
    meta = rm.describe(
        "golden_scores", title="Published scores", misses=misses,
        shows="Whether the model as it is loaded here, template and precision included, gives the scores its authors "
        "printed.",
        cannot_show="That other texts are scored as the authors' code does; a printed score in 16 bits differs by "
        "about 1% from one on another kernel.",
    )  # fmt: skip
    check = Check("misses", float(misses), float("inf"), f"of {len(own)} published scores")
    return Result("golden_scores", value, unit="reward", checks=[check], meta=meta)


def _usual_objective(rm: RewardModel) -> str:
    """The reward that a published score without an objective is of."""
    reward = isinstance(rm.module, OwnHead) and rm.module.first_is_reward
    return rm.objectives[0] if reward else rm.readout.objective


def _score(rm: RewardModel, entry: GoldenScore) -> float:
    if entry.text is None:
        return rm.score(entry.prompt, entry.response or "")
    texts = [entry.text] if entry.minus is None else [entry.text, entry.minus]
    rewards = rm.rewards([rm.tokenizer.text(text, rm.truncation) for text in texts]).double().tolist()
    return rewards[0] - sum(rewards[1:])
