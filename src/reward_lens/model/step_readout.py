"""How a process reward model reads steps: which rows of which head, and how a solution is written for it."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from reward_lens.errors import LoadError

Layout = Literal["chat", "text", "turns"]


@dataclasses.dataclass(frozen=True)
class StepReadout:
    """How a process reward model reads steps: which rows of which head, and how a solution is written for it.

    Parameters
    ----------
    positive, negative: rows of the head (integers), or texts that are one token each and name rows of the vocabulary.
        The reward is positive minus negative; `negative=None` reads the one row (a value head).
    marker: what is put behind every step. Its token is read; in "turns" the position before it.
    layout: "chat" (the assistant's message), "text" (prompt and steps as raw text, the BOS first once where there is
        one) or "turns" (each step a user's turn, the marker its answer).
    separator: where a response given as one text is cut into steps; "" is the marker.
    after_prompt: stands between prompt and first step. between: stands between a marker and the next step.
    by_step: prompt, steps and markers are tokenised one by one, as trainers do that join ids (TRL, Skywork).
    system: a system message, put before prompts that have none.
    head: path of the head in the module; "" looks for the usual names.
    """

    positive: int | str
    negative: int | str | None
    marker: str
    layout: Layout = "chat"
    separator: str = ""
    after_prompt: str = ""
    between: str = ""
    by_step: bool = False
    system: str | None = None
    head: str = ""

    def __post_init__(self):
        kinds = {type(row) for row in (self.positive, self.negative) if row is not None}
        known = self.layout in ("chat", "text", "turns") and bool(self.marker)
        if len(kinds) != 1 or not kinds <= {int, str} or not known or (self.by_step and self.layout != "text"):
            raise LoadError(
                "The step readout was not understood",
                found=f"rows {self.positive!r} and {self.negative!r}, marker {self.marker!r}, layout {self.layout!r}, "
                f"by_step={self.by_step}",
                expected="two integers or two texts (the second may be None), a marker, layout 'chat', 'text' or "
                "'turns', by_step with 'text' only",
                do="start from one of STEP_READOUTS and replace what differs",
            )
        if not self.separator:
            object.__setattr__(self, "separator", self.marker)


# As their authors score with them (model cards and scoring code).
STEP_READOUTS: Mapping[str, StepReadout] = {
    "qwen2.5-math-prm": StepReadout(
        1,
        0,
        "<extra_0>",
        system="Please reason step by step, and put your final answer within \\boxed{}.",
        head="score",
    ),
    "math-shepherd": StepReadout("+", "-", " \u043a\u0438", "text", after_prompt=" ", between="\n"),
    "rlhflow": StepReadout("+", "-", "+", "turns", separator="\n\n", after_prompt=" "),
    "skywork-o1": StepReadout(0, None, "\n", "text", after_prompt="\n", by_step=True, head="v_head.summary"),
    "trl": StepReadout(1, 0, "\n", "text", by_step=True),
}
