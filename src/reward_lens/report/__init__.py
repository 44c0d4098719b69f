"""Self-contained offline pages: of any results, by their dims and provenance, and of the latents of a dictionary."""

from reward_lens.report.explorer import write_explorer
from reward_lens.report.html import write_report

__all__ = ["write_explorer", "write_report"]
