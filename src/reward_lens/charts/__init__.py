"""Charts of results. The form follows from a result's dims and coordinates alone; no chart knows a method.

    position with pieces       -> token strip         layer x head, layer x kind   -> heat map
    a number line (depth)      -> lines with bands    two sets of labels           -> heat map
    pair (and side) alone      -> distribution        one set of labels, interval  -> points with intervals
    bin, predicted, observed   -> calibration         one set of labels            -> bars; else -> table
    labels x before, after     -> pairs of points     labels with family and dose  -> lines by dose as well

Specifications name no colours: they refer to the ranges and styles of `theme`, so that one specification is
drawn in light and in dark. What a chart leaves out for space, it says in its note.
"""

from reward_lens.charts.choice import chart, kind, panels, save_chart
from reward_lens.charts.forms import Panel
from reward_lens.charts.theme import theme

__all__ = ["Panel", "chart", "kind", "panels", "save_chart", "theme"]
