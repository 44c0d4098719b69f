"""Names of the objectives of published heads, for checkpoints whose config does not name them."""

from typing import Any

from reward_lens.model.readout import objective_names

HELPSTEER = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
    "helpsteer-verbosity",
)  # fmt: skip
NINETEEN = (
    *HELPSTEER, "ultrafeedback-overall_score", "ultrafeedback-instruction_following", "ultrafeedback-truthfulness",
    "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe", "prometheus-score",
    "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style", "code-explanation",
    "code-instruction-following", "code-readability",
)  # fmt: skip
PUBLISHED = {len(names): names for names in (HELPSTEER, NINETEEN)}
"""By number of objectives, in the order of the rows on the model cards of ArmoRM, QRM and URM."""


def objectives_of(config: Any, n: int) -> tuple[str, ...]:
    """The config's own labels if it names `n` of them, else the published names, else "0", "1", ..."""
    labels = getattr(config, "id2label", None) or {}
    own = objective_names(config, n) if n > 1 else ("0",)
    if len(labels) == n and not all(str(name).startswith("LABEL_") for name in own):
        return own
    return PUBLISHED.get(n, tuple(str(i) for i in range(n)))
