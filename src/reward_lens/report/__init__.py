"""One self-contained offline page from any results, by their dims, coordinates and provenance."""

from reward_lens.report.html import write_report

__all__ = ["write_report"]
