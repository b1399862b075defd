"""Formats for numbers (percent, interval, p-value) and for text from outside (escapes)."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from functools import cache
from typing import Any


def duration(seconds: float) -> str:
    """Write seconds as ``0:07``, ``12:34`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clean(text: Any) -> str:
    """Put text from outside on one line, without control and direction characters, which could forge a display."""
    spaced = " ".join(str(text).split())
    if spaced.isprintable():
        return spaced
    return spaced.translate(dict.fromkeys(_replacements()))


@cache
def _replacements() -> dict[int, str]:
    """Return a visible replacement for each control, direction and surrogate character, by its code.

    Unicode has such characters only in these two ranges. Line ends, tabs, the joiner of emoji and the soft hyphen are
    mapped to themselves.
    """
    codes = (*range(0x20000), *range(0xE0000, 0xE1000))
    shown = {code: f"⟨U+{code:04X}⟩" for code in codes if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs")}
    shown |= {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡"}
    return shown | {ord(c): c for c in "\n\t\u200d\u00ad"}


def visible(text: str) -> str:
    """Replace control and direction characters by visible, harmless ones: ``␛[31m``, ``⟨U+202E⟩``."""
    return text if text.isprintable() else text.translate(_replacements())


def inert(json_text: str) -> str:
    r"""Write control and direction characters in a JSON text as ``\u`` escapes, which JSON reads as the same."""
    return json_text.translate({code: json.dumps(chr(code))[1:-1] for code in _replacements() if code != 0x0A})


def number(value: float) -> str:
    """Write a number with three significant digits, or as a whole number from 1,000 on: ``0.0123``, ``12,345``."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(share: float, signed: bool = False) -> str:
    """Format a fraction as a percentage with one decimal, without ``%``; zero has no plus or minus."""
    text = f"{100 * share:{'+' if signed else ''}.1f}"
    return "0.0" if float(text) == 0 else text


def interval(low: float, high: float) -> str:
    """Format an interval of fractions in percent: ``[28.6, 33.7]``."""
    return f"[{percent(low)}, {percent(high)}]"


def times(ratio: float) -> str:
    """Format a ratio: ``6.40``, from 10 on ``12.5``; a dash for NaN, ``∞`` for infinity."""
    if math.isnan(ratio):
        return "–"
    if math.isinf(ratio):
        return "∞"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.1f}"


def p_text(p: float) -> str:
    """Format a p-value: ``0.012``, ``0.0004``, ``<1e-4``; a dash for NaN."""
    if math.isnan(p):
        return "–"
    if p < 1e-4:
        return "<1e-4"
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def p_relation(p: float) -> str:
    """Format a p-value after the letter p: ``= 0.012``, ``< 1e-4``."""
    return f"= {p_text(p)}".replace("= <", "< ")


def fold(text: str, width: int) -> list[str]:
    """Break a long name into lines: after a space or one of ``-_/``, and before ``+ADAPTER``."""
    lines = [""]
    for part in re.findall(r"[+]?[^-_/ +]*[-_/ ]*", text):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def whole(number: float | None) -> str:
    """Format a number without decimals; a dash for None or NaN."""
    return "–" if number is None or math.isnan(number) else f"{number:,.0f}"
