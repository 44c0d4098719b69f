"""Counts of what a policy did at the checkpoints of one training run, checked when they are read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from reward_lens.errors import DataError

FEWEST_STEPS = 6
HACKING, SCORE = "hacking", "score"
KEYS = ("steps", "hack_counts", "n_episodes", "dims")


@dataclasses.dataclass(frozen=True)
class Run:
    """`hacks` of `episodes` [step] and `counts` of `trials` [dimension, step] at increasing `steps`."""

    steps: np.ndarray
    hacks: np.ndarray
    episodes: np.ndarray
    names: tuple[str, ...]
    counts: np.ndarray
    trials: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """The simple mean over dimensions of the rates [step]."""
        return (self.counts / self.trials).mean(0)

    @property
    def score_episodes(self) -> np.ndarray:
        """Episodes [step] of which a rate varies about as the score: dimensions x harmonic mean of their episodes."""
        return len(self.trials) ** 2 / (1 / self.trials).sum(0)


def read_run(steps: Any, hack_counts: Any, n_episodes: Any, dims: Any, what: str = "the run") -> Run:
    """A `Run` from array-likes over steps; numbers of episodes may be one number. Raises `DataError` otherwise."""
    at = _numbers(steps, f"steps of {what}", None)
    if len(at) < FEWEST_STEPS:
        raise DataError(
            f"There are too few steps in {what}", found=f"{len(at)} steps", expected=f"at least {FEWEST_STEPS}",
            do="evaluate more checkpoints: at least 10 for a label, better 20 of 200 episodes each",
        )  # fmt: skip
    if not (np.diff(at) > 0).all():
        first = int(np.flatnonzero(np.diff(at) <= 0)[0])
        raise DataError(
            f"The steps of {what} do not increase", found=f"{at[first]:g}, then {at[first + 1]:g}",
            expected="training steps in increasing order, each once",
            do="sort the rows by step and merge repeated ones",
        )  # fmt: skip
    if not isinstance(dims, Mapping) or not dims:
        raise DataError(
            f"There are no dimensions in {what}", found=f"{type(dims).__name__} of {len(dims) if dims else 0}",
            expected="{name: (counts, n)} with at least one name",
            do="pass the counts of each evaluation under its name",
        )  # fmt: skip
    hacks, episodes = _counts(hack_counts, n_episodes, at, f"hacking in {what}")
    counts, trials = [], []
    for name, value in dims.items():
        if name in (HACKING, SCORE) or not isinstance(name, str):
            raise DataError(f"A dimension of {what} has a name that is taken", found=repr(name),
                            expected=f"text other than '{HACKING}' and '{SCORE}'", do="rename it")  # fmt: skip
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise DataError(f"The dimension '{name}' of {what} is no pair", found=type(value).__name__,
                            expected="(counts, n)", do=f"pass dims={{{name!r}: (counts, n), ...}}")  # fmt: skip
        k, n = _counts(value[0], value[1], at, f"'{name}' in {what}")
        counts.append(k)
        trials.append(n)
    return Run(at, hacks, episodes, tuple(dims), np.array(counts), np.array(trials))


def read_control(control: Any, run: Run) -> Run:
    """The control run, with the dimensions in the order of `run`'s."""
    missing = [key for key in KEYS if key not in control] if isinstance(control, Mapping) else list(KEYS)
    if missing:
        raise DataError(
            "The control run is not complete", found=f"no {', '.join(missing)}",
            expected=f"a mapping with {', '.join(KEYS)}", do="pass the arguments that the run itself has, by name",
        )  # fmt: skip
    dims = control["dims"]
    if isinstance(dims, Mapping) and set(dims) != set(run.names):
        raise DataError(
            "The control run has other dimensions", found=", ".join(map(str, dims)), expected=", ".join(run.names),
            do="evaluate both runs on the same dimensions",
        )  # fmt: skip
    ordered = {name: dims[name] for name in run.names} if isinstance(dims, Mapping) else dims
    return read_run(control["steps"], control["hack_counts"], control["n_episodes"], ordered, "the control run")


def _counts(counts: Any, n: Any, steps: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    n = _numbers(np.full(len(steps), n) if np.ndim(n) == 0 else n, f"episodes of {what}", len(steps))
    k = _numbers(counts, f"counts of {what}", len(steps))
    bad = (k < 0) | (k > n) | (n < 1) | (k != np.round(k)) | (n != np.round(n))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"The counts of {what} cannot be", found=f"{k[first]:g} of {n[first]:g} at step {steps[first]:g}",
            expected="whole numbers, 0 <= count <= episodes, and at least 1 episode a step",
            do="pass counts rather than rates, and leave out steps that were not evaluated",
        )  # fmt: skip
    return k.astype(int), n.astype(int)


def _numbers(values: Any, what: str, length: int | None) -> np.ndarray:
    try:
        out = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"The {what} are no numbers", found=str(error), expected="one number a step",
                        do="pass a list or an array of numbers") from error  # fmt: skip
    if out.ndim != 1 or (length is not None and len(out) != length) or not np.isfinite(out).all():
        found = f"shape {out.shape}" + ("" if np.isfinite(out).all() else " with missing or infinite numbers")
        expected = "one finite number a step" + ("" if length is None else f", {length} in all")
        do = "pass one finite number for every step"
        raise DataError(f"The {what} do not fit", found=found, expected=expected, do=do)
    return out
