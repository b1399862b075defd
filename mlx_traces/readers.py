"""Text and JSON of files that others wrote: UTF-8, a byte-order mark passed over, and only what JSON knows. No MLX."""

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mlx_traces.errors import UserError

MARK = "\ufeff"  # byte-order mark
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}  # the longer ones first
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN|-?[0-9][0-9.eE+-]*')


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading; a byte-order mark at its start is passed over.

    Raises:
        UserError: if it cannot be read, or is not UTF-8; UTF-16 and UTF-32 are named.
    """
    try:
        with path.open("rb") as file:
            if encoding := _other_encoding(file.peek(4)[:4]):
                raise UserError(f"{path}: is {encoding}; save it as UTF-8")
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
                yield text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _other_encoding(head: bytes) -> str | None:
    """Name the encoding that a file's first four bytes are of, None for UTF-8."""
    for mark, name in _OTHER_MARKS.items():
        if head.startswith(mark):
            return name
    zeros = tuple(byte == 0 for byte in head)  # of two letters of UTF-16 without a mark
    return "UTF-16" if zeros in ((False, True, False, True), (True, False, True, False)) else None


def text_of(path: Path) -> str:
    """Return a file's text; UserError as `opened` raises it."""
    with opened(path) as file:
        return file.read().lstrip(MARK)


class _NotFinite(ValueError):
    """A number that JSON does not know: ``NaN``, ``Infinity``, or one that is too large."""


def _refused(text: str) -> Any:
    raise _NotFinite(text)


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refused(text)


_STRICT = json.JSONDecoder(parse_constant=_refused, parse_float=_finite)
_LENIENT = json.JSONDecoder()


def parse_json(text: str, where: str, several_lines: bool = False, finite: bool = True) -> Any:
    """Parse a JSON text.

    Args:
        text: the JSON.
        where: its place, for messages.
        several_lines: whether it is a whole file, so that its own line is added to the place.
        finite: refuse ``NaN``, ``Infinity`` and numbers beyond a float's range, which are no JSON.

    Raises:
        UserError: naming the place, if it is not JSON.
    """
    try:
        return (_STRICT if finite else _LENIENT).decode(text.lstrip(MARK))
    except _NotFinite as error:
        line = 1 + text.count("\n", 0, _place_of_not_finite(text))
        reason = f"{str(error)[:40]} is no number of JSON; write null, a finite number, or a text in quotes"
    except json.JSONDecodeError as error:
        line, character = error.lineno, error.colno if several_lines else error.pos + 1
        reason = f"not JSON ({error.msg[:60]} at character {character}); mend the line, or remove it"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        line, reason = None, f"not JSON ({str(error)[:80]})"
    raise UserError(f"{where}:{line}: {reason}" if several_lines and line else f"{where}: {reason}")


def _place_of_not_finite(text: str) -> int:
    """Return where the first number stands that is not finite, outside of the texts in quotes."""
    for token in _TOKEN.finditer(text):
        if token[0][0] != '"':
            try:
                _finite(token[0])
            except _NotFinite:
                return token.start()
            except ValueError:  # a slip that is looked at elsewhere
                continue
    return 0
