"""One self-contained offline page from any results: it reads their dims, coordinates and provenance, never a method."""

from reward_lens.report.html import write_report

__all__ = ["write_report"]
