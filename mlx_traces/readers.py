"""Text and JSON of files that others wrote: UTF-8, a byte-order mark passed over, and only what JSON knows. No MLX."""

import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mlx_traces.errors import MOST_NAME, UserError, first_line

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


MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1_000_000, 5_000, 30  # of a YAML file; the last one also of a row
# In base 60 too, which takes quadratic time to read.
_LOOKS_LIKE_A_NUMBER = re.compile(r"[-+]?(?:0[xb][0-9a-fA-F_]+|\.?[0-9][0-9_:.]*)")


def read_yaml(path: Path, what: str = "configuration") -> dict[str, Any]:
    """Read a YAML mapping; UserError if it is not one, or larger or deeper than any that is honest."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where libyaml is there
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: a {what} file of more than {MOST_BYTES:,} bytes")
        text = text_of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    try:
        if sprawl := _sprawl(yaml.parse(text, loader)):
            raise UserError(f"{path}: {sprawl}")
        if twice := _twice(yaml.compose(text, loader)):
            line, key = twice
            raise UserError(f"{path}:{line}: {key[:MOST_NAME]!r} is given twice; keep one of them")
        content = yaml.load(text, loader)
    # PyYAML meets a wrong date, or a tag that its text does not fit, with whatever its code runs into.
    except (ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}{_place(text, getattr(error, 'problem_mark', None))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'field: value' lines, found {type(content).__name__}")
    return content


def _place(text: str, mark: Any) -> str:
    """Say where a text is no YAML, and what to look for; PyYAML's own words change from version to version."""
    if mark is None:
        return ": not YAML: a control character, or a value that is not what it looks like (as 2001-99-99); quote it"
    line = next(iter(text.splitlines()[mark.line : mark.line + 1]), "")
    shown = f"'{line.strip()[:60]}'" if line.strip() else "the end of the file"
    return f":{mark.line + 1}: not YAML from column {mark.column + 1} on: {shown}; check indents, brackets and quotes"


def _twice(top: Any) -> tuple[int, str] | None:
    """Return the line and the name of the first key that its mapping has already, None if there is none."""
    import yaml

    todo, seen, found = [top], set(), []
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        mapping = isinstance(node, yaml.MappingNode)
        todo += [part for pair in node.value for part in pair] if mapping else node.value
        keys = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if mapping else ():
            if (key.tag, key.value) in keys:
                found.append((key.start_mark.line + 1, key.value))
            keys.add((key.tag, key.value))
    return min(found, default=None)


def _sprawl(events: Iterable[Any]) -> str:
    """Say in what a YAML file is too large, its aliases written out; 50 characters of a text count as a value.

    So what is read is bounded although an alias may stand for others, and a value never holds itself.
    """
    import yaml

    deep = f"more than {MOST_DEPTH} values within each other"
    sizes: dict[str, int] = {}  # of what an anchor names
    around: list[tuple[str | None, int]] = [(None, 0)]  # the collections that are open: anchor, size so far
    for event in events:
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((anchor, 1))
            sizes.pop(anchor, None)
            if len(around) > MOST_DEPTH:
                return deep
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = around.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == outer for outer, _ in around):
                return deep
            size = sizes.get(anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            if event.implicit[0] and len(event.value) > MOST_NAME and _LOOKS_LIKE_A_NUMBER.fullmatch(event.value):
                return f"a number of more than {MOST_NAME} characters"
            size = 1 + len(event.value) // 50
        if anchor is not None:
            sizes[anchor] = size
        around[-1] = (around[-1][0], around[-1][1] + size)
        if around[-1][1] > MOST_VALUES:
            return f"more than {MOST_VALUES:,} values"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if it is missing or broken."""
    content = parse_json(text_of(path), str(path), several_lines=True, finite=False)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


Row = dict[str, Any]
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # files that the `datasets` package reads, and its name for them
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", *TABLES)  # of files, never of hub data sets


def read_jsonl(path: Path, columns: Sequence[str] = (), finite: bool = True) -> Iterator[tuple[str, Row]]:
    """Yield (``file:line``, row) of a JSON-lines file; blank lines are passed over.

    Raises:
        UserError: at a line that is not a JSON object or lacks one of ``columns``, naming file, line and the row's own
            columns; with ``finite`` at a NaN or Infinity too.
    """
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip().strip(MARK):  # files put together have marks in between
                yield (where := f"{path}:{number}"), parse_row(line, where, columns, finite)


def file_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a file of rows: JSON lines, a .json list, Parquet or Arrow.

    Raises:
        UserError: as `read_jsonl` does; the place in a list or table is ``file[index]``.
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
    """Yield (``file[index]``, row) of a Parquet or Arrow file, a part of it in memory at a time."""
    import datasets

    if not path.is_file():
        raise UserError(f"{path}: cannot be read (No such file or directory)")
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    except UserError:
        raise
    except Exception as error:  # the readers of tables raise a dozen unrelated types
        raise UserError(f"{path}: not a {kind} file ({first_line(error)[:80]})") from None


def plain(value: Any, depth: int = 0) -> Any:
    """Return a value of somebody's row as JSON has it, its texts without the byte-order marks that they start with.

    NaN, which stands for a missing number in a table, is None; dates and the like are texts. What stands more than
    ``MOST_DEPTH`` deep is left as it is.
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
    """Parse one JSON object and check its columns and that its text can be written again."""
    row = parse_json(line, where, finite=finite)
    return _checked(row, where, columns, _SURROGATE.search(line) is not None)


def _checked(row: Any, where: str, columns: Sequence[str], halves: bool = True) -> Row:
    """Check a row's kind and columns, and, if it may have ``halves`` of pairs, that its text can be written again."""
    if halves:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: not valid Unicode text; half of a pair such as \\ud83d stands alone") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {', '.join(columns)}, found {type(row).__name__}")
    for column in columns:
        if column not in row:
            raise UserError(f"{where}: {column!r} is missing; this row has {listed(row)}")
    return row


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def listed(columns: Iterable[str]) -> str:
    """List names of columns in one line."""
    names = (name if name.isprintable() else repr(name) for name in map(str, columns))
    return ", ".join(name[:60] for name in names) or "no columns"


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that can be computed with and shown: JSON allows any number of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_file(data: str) -> bool:
    """Whether ``data`` names a file; if not, it is a hub data set ``owner/name``."""
    name = data.partition("@")[0]
    try:
        there = Path(data).exists()
    except OSError:  # too long for a name
        there = True
    return there or name.count("/") != 1 or name.startswith((".", "/", "~")) or data.lower().endswith(SUFFIXES)
