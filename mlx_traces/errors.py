"""The one exception that means "the input is wrong"; anything else is a bug and keeps its traceback."""

import difflib
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

MOST_NAME = 100  # characters of an unknown name that are looked at and shown


class UserError(Exception):
    """The input is wrong. The message is one line: where, what, and the way out."""


def choices(names: Iterable[str]) -> str:
    """List valid names for an error message: ``a, b or c``."""
    *head, last = list(names)
    return f"{', '.join(head)} or {last}" if head else last


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'close'?`` for a likely slip of the keyboard, else an empty string."""
    close = difflib.get_close_matches(name[:MOST_NAME], list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(what: str, name: str, names: Iterable[str]) -> UserError:
    """Build the error for a name that is not among the known ones."""
    names = list(names)
    return UserError(f"unknown {what} {name[:MOST_NAME]!r}: choose {choices(names)}{did_you_mean(name, names)}")


def clean(text: Any) -> str:
    """Put foreign text on one line, without the control and direction characters that could forge a display."""
    spaced = " ".join(str(text).split())
    if spaced.isprintable():
        return spaced
    return spaced.translate(dict.fromkeys(_acting()))


@cache
def _acting() -> dict[int, str]:
    """Return what stands for each character that controls a display, or how others are shown, or is half of one.

    Unicode has none of them outside of these two ranges.
    """
    codes = (*range(0x20000), *range(0xE0000, 0xE1000))
    return {code: _visible(chr(code)) for code in codes if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs")}


def visible(text: str) -> str:
    """Make control and direction characters visible, so that they cannot act: ``␛[31m``, ``⟨U+202E⟩``."""
    return text if text.isprintable() else text.translate(_acting())


def _visible(c: str) -> str:
    if c in "\n\t\u200d\u00ad":  # line ends, tabs, the joiner of emoji, the soft hyphen
        return c
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    return "␡" if ord(c) == 0x7F else f"⟨U+{ord(c):04X}⟩"


def inert(json_text: str) -> str:
    """Write the control and direction characters that JSON leaves as they are as its escapes: it means the same."""
    return json_text.translate({code: f"\\u{code:04x}" for code in _acting() if code < 0x10000 and code != 0x0A})


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's message, with its type where the message alone says little."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    telling = line and not isinstance(error, (KeyError, TypeError, AttributeError, IndexError, AssertionError))
    return line if telling else f"{type(error).__name__}: {line}".removesuffix(": ")
