"""The exception for wrong input. Any other exception is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable

MOST_NAME = 100  # characters of an unknown name that are compared and shown


class UserError(Exception):
    """The input is wrong. The message is one line: where, what, and the way out."""


class Lost(UserError):
    """Another rank of a distributed run has ended; it, or its launcher, prints why."""


def choices(names: Iterable[str]) -> str:
    """List valid names for an error message: ``a, b or c``."""
    *head, last = list(names)
    return f"{', '.join(head)} or {last}" if head else last


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'close'?`` for a likely typing error, else an empty string."""
    close = difflib.get_close_matches(name[:MOST_NAME], list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(what: str, name: str, names: Iterable[str]) -> UserError:
    """Build the error for a name that is not among the known ones."""
    names = list(names)
    return UserError(f"unknown {what} {name[:MOST_NAME]!r}: choose {choices(names)}{did_you_mean(name, names)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the error's type if the message alone says little."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    telling = line and not isinstance(error, (KeyError, TypeError, AttributeError, IndexError, AssertionError))
    return line if telling else f"{type(error).__name__}: {line}".removesuffix(": ")


def typed_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message; the type alone if there is no message."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind or line.startswith(f"{kind}: ") else f"{kind}: {line}"
