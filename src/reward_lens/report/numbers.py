"""How the page writes numbers: few digits, a true minus sign, no padded exponents."""

import json
import math
import re

import numpy as np


def number(value: float, signed: bool = False) -> str:
    """Four digits; "signed" writes the plus too. An undefined value is a dash."""
    if math.isnan(value):
        return "\u2013"
    return _typeset(f"{value:+.4g}" if signed and value else f"{value:.4g}")


def short(value: float) -> str:
    """Two digits, for where many stand close together."""
    return "\u2013" if math.isnan(value) else _typeset(f"{value:.2g}")


def share(value: float) -> str:
    """A fraction as a percentage of three digits."""
    return "\u2013" if math.isnan(value) else f"{_typeset(f'{100 * value:.3g}')}%"


def ends(low: float, high: float, write=number) -> str:
    """An interval in words; empty where there is none."""
    return "" if math.isnan(low) or math.isnan(high) else f"{write(low)} to {write(high)}"


def gap(value: float) -> str:
    """Two digits in exponent form, as in 3.1e-7; zero is exact and stays 0, an infinite tolerance is none."""
    if not math.isfinite(value):
        return "none" if value > 0 else "\u2013"
    return "0" if value == 0 else _typeset(f"{value:.1e}" if abs(value) < 0.01 else f"{value:.2g}")


def fact(value: float) -> str:
    """A recorded number; a count stands in full."""
    return _typeset(f"{value:,.0f}") if math.isfinite(value) and value == round(value) else number(value)


def cell(value) -> str:
    """Whatever stands in a table or in the settings, as text."""
    if value is None:
        return "none"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return number(float(value))
    if isinstance(value, int | np.integer):
        return _typeset(str(int(value)))
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _typeset(text: str) -> str:
    text = re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].replace('+', '')}{m[2]}", text).replace(".0e", "e")
    return "0" if text == "-0" else text.replace("-", "\u2212").replace("inf", "\u221e")
