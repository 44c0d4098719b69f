"""Colours and type of charts, in light and in dark.

Blue and orange are told apart by every common kind of colour vision. The ends of the diverging scale stay
light enough (on dark: dark enough) that text in the ink colour keeps a contrast of at least 4.5 on every
shade of it, which is what lets a token's background carry its value.
"""

import dataclasses

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
MONO = 'ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace'


@dataclasses.dataclass(frozen=True)
class Palette:
    """The colours of one appearance. `series` starts with chosen, rejected, margin."""

    paper: str
    ink: str
    muted: str
    line: str
    negative: str
    neutral: str
    positive: str
    series: tuple[str, ...]


LIGHT = Palette(
    paper="#ffffff",
    ink="#16191d",
    muted="#5a626c",
    line="#dfe2e6",
    negative="#e0813a",
    neutral="#f3f3f1",
    positive="#5596d6",
    series=("#2170b8", "#c4570c", "#2b3038", "#1a8767", "#ab4f90", "#8a6f00", "#3d93c7", "#777d86"),
)
DARK = Palette(
    paper="#15181c",
    ink="#eceef0",
    muted="#a2aab3",
    line="#343a42",
    negative="#a8540f",
    neutral="#23282e",
    positive="#2867ad",
    series=("#6bb0f0", "#f0954c", "#e6e8eb", "#4cc2a0", "#e08fc1", "#d9b949", "#9ad0f5", "#9ba1a9"),
)


def theme(dark: bool = False) -> dict:
    """A Vega-Lite `config` object: the named ranges and mark styles that every chart refers to."""
    c = DARK if dark else LIGHT
    text = {"labelColor": c.muted, "titleColor": c.muted, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": c.paper,
        "font": FONT,
        "view": {"stroke": None, "continuousWidth": 640, "continuousHeight": 300},
        "axis": {
            **text,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "domainColor": c.line,
            "gridColor": c.line,
            "tickColor": c.line,
            "labelLimit": {"expr": "isFinite(containerSize()[0]) ? min(190, containerSize()[0] * 0.35) : 190"},
            "labelOverlap": "greedy",
            "labelSeparation": 8,
            "labelPadding": 5,
            "tickSize": 4,
            "tickCount": 6,
        },
        "axisY": {"domain": False, "ticks": False, "titleFontWeight": "normal"},
        "axisBand": {"grid": False, "domain": False, "ticks": False, "labelPadding": 9},  # a dot at the edge is 11 wide
        "legend": {
            **text,
            "orient": "top",
            "titleFontWeight": "normal",
            "titleLimit": 320,
            "labelLimit": 240,
            "symbolType": "stroke",
            "symbolStrokeWidth": 3,
            "symbolSize": 260,
            "gradientLength": 180,
            "gradientThickness": 10,
            "offset": 12,
        },
        "title": {
            "color": c.ink,
            "subtitleColor": c.muted,
            "anchor": "start",
            "fontSize": 14,
            "fontWeight": 600,
        },
        "range": {
            "category": list(c.series),
            "diverging": [c.negative, c.neutral, c.positive],
            "heatmap": [c.neutral, c.positive],
            "ramp": [c.neutral, c.positive],
        },
        "line": {"strokeWidth": 2.25, "strokeJoin": "round"},
        "style": {
            "band": {"opacity": 0.16},
            "zero": {"color": c.muted, "strokeWidth": 1, "opacity": 0.7},
            "reference": {"color": c.muted, "strokeWidth": 1, "strokeDash": [4, 4]},
            "cell": {"stroke": c.paper, "strokeWidth": 1},
            "celltext": {"color": c.ink, "fontSize": 12},
            "bar": {"color": c.series[0]},
            "interval": {"color": c.series[0], "strokeWidth": 2},
            "dot": {"color": c.series[0], "size": 90, "opacity": 1},
            "mark": {"color": c.series[0], "opacity": 0.5, "size": 14},
            "token": {"color": c.ink, "font": MONO, "fontSize": 12, "align": "left"},
            "heading": {"color": c.ink, "fontSize": 12, "fontWeight": 600, "align": "left"},
        },
    }
