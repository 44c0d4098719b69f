"""Solutions in steps, for models that reward every step: checked when they are made."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, no_type_check

from reward_lens.arguments import checked_arguments
from reward_lens.data.checks import checked_text, checked_texts, malformed, shown
from reward_lens.data.items import Pair, Pairs, _Item, with_unique_ids
from reward_lens.errors import DataError


@no_type_check  # as for pairs: a wrong type is a DataError
@dataclasses.dataclass(frozen=True)
class Solution(_Item):
    """A prompt and the steps of one solution, in order (TRL's `prompt` and `completions`).

    `steps` are one or more texts, none of them blank; a model's own separator is not part of them. Raises `DataError`
    for anything else.
    """

    prompt: str | Sequence[Mapping[str, str]] = dataclasses.field()  # held by _Item.prompt
    steps: Sequence[str]
    id: str | None = None
    subset: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "steps", checked_texts(self.steps, "steps"))
        require_steps(self.steps)
        self._check_labels()

    __hash__ = _Item.__hash__

    @property
    def responses(self) -> tuple[str, ...]:
        """The steps, which is what the hash of inputs is of."""
        return tuple(self.steps)


def require_steps(steps: Sequence[str]) -> None:
    """Raise `DataError` for a solution without steps, and for a blank step."""
    blank = [i for i, step in enumerate(steps) if not step.strip()]
    if blank or not len(steps):
        raise DataError(
            "A solution has no text to reward" if not len(steps) else "A step of a solution is blank",
            found="no steps" if not len(steps) else f"{len(steps)} steps, of which number {blank[0] + 1} is blank",
            expected="one or more steps with text",
            do="leave blank steps out; a step's separator is put in by the model's StepReadout",
        )


def split_steps(text: Any, separator: str) -> tuple[str, ...]:
    """The steps of a solution written as one text, cut at `separator`; what follows the last one is a step if it has
    any text. A text without the separator raises `DataError`: one step is written as a list of one."""
    if separator not in checked_text(text, "solution"):
        raise DataError(
            "No step boundary was found in a solution",
            found=shown(text),
            expected=f"the separator {separator!r} between its steps",
            do="pass the steps as a list of texts",
        )
    return cut_steps(text, separator)


def cut_steps(text: str, separator: str) -> tuple[str, ...]:
    """As `split_steps`, a text without the separator being one step."""
    steps = text.split(separator)
    if not steps[-1].strip():
        steps.pop()
    require_steps(steps)
    return tuple(steps)


def joined_steps(steps: Sequence[str], separator: str) -> str:
    """The steps as one text, from which `cut_steps` gives them back; `DataError` where a step holds the separator."""
    inside = [step for step in steps if separator in step]
    if inside:
        raise DataError(
            "A step holds the separator of steps",
            found=shown(inside[0]),
            expected=f"steps without {separator!r}",
            do="cut the step there, or build the StepReadout with another separator",
        )
    return separator.join(steps)


def as_solutions(solutions: Any, separator: str) -> tuple[Solution, ...]:
    """`Solution`s with unique ids, from `Solution`s or (prompt, steps) tuples, steps being a list of texts or one text
    that is cut at `separator`; none raises `DataError`."""
    if isinstance(solutions, Solution):
        solutions = [solutions]
    listed = list(solutions) if isinstance(solutions, Iterable) and not isinstance(solutions, str) else [solutions]
    out = []
    for index, item in enumerate(listed):
        if isinstance(item, tuple) and len(item) == 2:
            prompt, steps = item
            item = Solution(prompt, split_steps(steps, separator) if isinstance(steps, str) else steps)
        if not isinstance(item, Solution):
            do = "build each as rl.Solution(prompt, steps), or pass (prompt, steps) tuples"
            raise malformed(f"solutions[{index}]", shown(item), "an rl.Solution", do=do)
        out.append(item)
    if not out:
        raise DataError("There are no solutions to work on", found="an empty sequence",
                        expected="at least one rl.Solution", do="pass solutions")  # fmt: skip
    return with_unique_ids(out)[0]


@checked_arguments
def step_pairs(chosen: Iterable[Solution], rejected: Iterable[Solution], step: int, separator: str) -> Pairs:
    """Pairs of two solutions of one prompt, each up to and with its `step`-th step (from 0; -1 is the last), for the
    methods that take pairs: on a model built by `step_model` they read that step's reward, `separator` being
    `rm.module.steps.separator`.

    Returns `Pairs`. Raises `DataError` where the numbers of solutions or the prompts differ, a solution has no such
    step, or a step holds the separator.
    """
    pairs, firsts, seconds = [], list(chosen), list(rejected)
    if len(firsts) != len(seconds):
        raise DataError("The solutions do not pair up", found=f"{len(firsts)} chosen and {len(seconds)} rejected",
                        expected="as many of either", do="pair solutions by their prompt")  # fmt: skip
    for a, b in zip(firsts, seconds, strict=True):
        if a.prompt_key != b.prompt_key:
            raise DataError("Two solutions have different prompts", found=f"{shown(a.prompt)} and {shown(b.prompt)}",
                            expected="solutions of one prompt", do="pair solutions by their prompt")  # fmt: skip
        texts = []
        for solution in (a, b):
            n = len(solution.steps)
            if not -n <= step < n:
                raise DataError(
                    "A solution has no such step",
                    found=f"{n} steps, step {step} asked for",
                    expected="a step that both solutions have",
                    do="choose a smaller step, or -1",
                )
            texts.append(joined_steps(solution.steps[: step % n + 1], separator))
        pairs.append(Pair(a.prompt, *texts, id=a.id, subset=a.subset))
    return Pairs(pairs, source="solutions")
