"""Read text, JSON and tables from any source: UTF-8, with or without a byte-order mark, and strict JSON. No MLX."""

import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mlx_traces.errors import UserError, first_line

MOST_DEPTH = 30  # nested values, in a row and in a YAML file

MARK = "\ufeff"  # byte-order mark
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}  # longer marks first, as UTF-32's begins with UTF-16's
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN|-?[0-9][0-9.eE+-]*')


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading, past its byte-order mark if it has one.

    Raises:
        UserError: if it cannot be read, or is not UTF-8; the message names UTF-16 and UTF-32.
    """
    try:
        with path.open("rb") as file:
            head = file.peek(4)[:4]
            zeros = tuple(byte == 0 for byte in head)  # alternate in UTF-16 letters without a mark
            without_mark = "UTF-16" if zeros in ((False, True, False, True), (True, False, True, False)) else None
            if encoding := next((_OTHER_MARKS[mark] for mark in _OTHER_MARKS if head.startswith(mark)), without_mark):
                raise UserError(f"{path}: is {encoding}; save it as UTF-8")
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
                yield text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def text_of(path: Path) -> str:
    """Return a file's text; UserError as `opened` raises it."""
    with opened(path) as file:
        return file.read().lstrip(MARK)


class _NotFinite(ValueError):
    """A number that is not JSON: ``NaN``, ``Infinity``, or one beyond a float's range."""


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
        where: its place, for error messages.
        several_lines: whether it is a whole file; messages then name the line too.
        finite: refuse ``NaN``, ``Infinity`` and numbers beyond a float's range, which are not JSON.

    Raises:
        UserError: if it is not JSON; the message names the place.
    """
    try:
        return (_STRICT if finite else _LENIENT).decode(text.lstrip(MARK))
    except _NotFinite as error:
        line = 1 + text.count("\n", 0, _place_of_not_finite(text))
        reason = f"{str(error)[:40]} is not a JSON number; write null, a finite number, or a text in quotes"
    except json.JSONDecodeError as error:
        line, character = error.lineno, error.colno if several_lines else error.pos + 1
        reason = f"not JSON ({error.msg[:60]} at character {character}); mend the line, or remove it"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        line, reason = None, f"not JSON ({str(error)[:80]})"
    raise UserError(f"{where}:{line}: {reason}" if several_lines and line else f"{where}: {reason}")


def _place_of_not_finite(text: str) -> int:
    """Return the index of the first number that is not finite, outside of quoted texts."""
    for token in _TOKEN.finditer(text):
        if token[0][0] != '"':
            try:
                _finite(token[0])
            except _NotFinite:
                return token.start()
            except ValueError:  # not a number; the parser reports it
                continue
    return 0


def read_json(path: Path, finite: bool = False) -> dict[str, Any]:
    """Read a JSON object; UserError if it is missing or broken, with ``finite`` also at a NaN or Infinity."""
    content = parse_json(text_of(path), str(path), several_lines=True, finite=finite)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


Row = dict[str, Any]
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # files that `datasets` reads, and its name for them
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", *TABLES)  # of files, not of hub data sets


def read_jsonl(path: Path, columns: Sequence[str] = (), finite: bool = True) -> Iterator[tuple[str, Row]]:
    """Yield (``file:line``, row) of a JSON-lines file; blank lines are skipped.

    Raises:
        UserError: at a line that is not a JSON object or lacks one of ``columns``; with ``finite`` also at a NaN or
            Infinity. The message names file, line and the row's own columns.
    """
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip().strip(MARK):  # concatenated files have marks in between
                yield (where := f"{path}:{number}"), parse_row(line, where, columns, finite)


def file_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a file of rows: JSON lines, a .json list, Parquet or Arrow.

    Raises:
        UserError: as `read_jsonl`; the place in a list or table is ``file[index]``.
    """
    suffix = path.suffix.lower()
    if suffix in TABLES:
        rows = _table_rows(path, TABLES[suffix])
    elif suffix == ".json" and (text := text_of(path)).lstrip().startswith("["):
        rows = ((f"{path}[{index}]", row) for index, row in enumerate(parse_json(text, str(path), several_lines=True)))
    else:
        yield from ((where, plain(row)) for where, row in read_jsonl(path, columns))
        return
    yield from ((where, _checked(plain(row), where, columns)) for where, row in rows)


def _table_rows(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Yield (``file[index]``, row) of a Parquet or Arrow file, read in parts."""
    import datasets  # takes a second to load

    if not path.is_file():
        raise UserError(f"{path}: cannot be read (No such file or directory)")
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    except UserError:
        raise
    except Exception as error:  # the readers of tables raise many unrelated types
        raise UserError(f"{path}: not a {kind} file ({first_line(error)[:80]})") from None


def plain(value: Any, depth: int = 0) -> Any:
    """Return a row's value as a JSON value; a byte-order mark at the start of a text is removed.

    NaN, which marks a missing number in a table, becomes None; dates become text. Values nested more than
    ``MOST_DEPTH`` deep are not changed.
    """
    if isinstance(value, str):
        return value.lstrip(MARK)
    if isinstance(value, dict) and depth < MOST_DEPTH:
        return {str(key): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple) and depth < MOST_DEPTH:
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | dict | list) else str(value)


def parse_row(line: str, where: str, columns: Sequence[str], finite: bool = True) -> Row:
    """Parse one JSON object, and check its columns and that UTF-8 can write its text."""
    row = parse_json(line, where, finite=finite)
    return _checked(row, where, columns, _SURROGATE.search(line) is not None)


def _checked(row: Any, where: str, columns: Sequence[str], halves: bool = True) -> Row:
    """Check a row's type and columns; with ``halves`` also that UTF-8 can write it (no unpaired surrogate)."""
    if halves:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: not valid Unicode text; a surrogate such as \\ud83d has no partner") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {', '.join(columns)}, found {type(row).__name__}")
    for column in columns:
        if column not in row:
            raise UserError(f"{where}: {column!r} is missing; this row has {listed(row)}")
    return row


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def listed(columns: Iterable[str]) -> str:
    """List column names on one line."""
    names = (name if name.isprintable() else repr(name) for name in map(str, columns))
    return ", ".join(name[:60] for name in names) or "no columns"


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number within a float's range; JSON allows any number of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


GENERATED = re.compile(r"([0-9])(?:-([0-9]))?-numbers")  # generated problems, given in place of a file


def is_file(data: str) -> bool:
    """Whether ``data`` names a file; otherwise it is a hub data set ``owner/name`` or generated problems."""
    if GENERATED.fullmatch(data):
        return False
    name = data.partition("@")[0]
    try:
        there = Path(data).exists()
    except OSError:  # a name that is too long
        there = True
    return there or name.count("/") != 1 or name.startswith((".", "/", "~")) or data.lower().endswith(SUFFIXES)
