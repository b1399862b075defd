"""Rows of problems from files and from the hub. No MLX."""

import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_traces import hub
from mlx_traces.errors import UserError, first_line, unknown
from mlx_traces.readers import MARK, opened, parse_json, text_of
from mlx_traces.records import Problem

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
        yield from read_jsonl(path, columns)
        return
    yield from ((where, _checked(row, where, columns)) for where, row in rows)


def _table_rows(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Yield (``file[index]``, row) of a Parquet or Arrow file, a part of it in memory at a time."""
    import datasets

    if not path.is_file():
        raise UserError(f"{path}: cannot be read (No such file or directory)")
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from ((f"{path}[{index}]", _plain(row)) for index, row in enumerate(rows))
    except UserError:
        raise
    except Exception as error:  # the readers of tables raise a dozen unrelated types
        raise UserError(f"{path}: not a {kind} file ({first_line(error)[:80]})") from None


def _plain(value: Any) -> Any:
    """Return a table's value as JSON has it: NaN, which stands for a missing number there, as None; dates as text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


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


def hub_rows(
    dataset: str, config: str | None, split: str, instead: str, part: Callable[[int], range] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (``dataset[index]``, row) of a hub data set, or only the rows that ``part`` of their number names.

    Raises:
        UserError: if it cannot be had; the message ends with ``instead``, what to pass in its place.
    """
    name, _, revision = dataset.partition("@")
    away = hub.out_of_reach()
    rows = _downloaded(name, config, split, revision) if away else _download(name, config, split, revision, instead)
    if rows is None:
        raise UserError(f"{dataset} could not be downloaded ({away}), and is not here from before; {instead}")
    if part is None:
        yield from ((f"{name}[{index}]", _plain(row)) for index, row in enumerate(rows))
    else:
        yield from ((f"{name}[{index}]", _plain(rows[index])) for index in part(len(rows)))


def _download(name: str, config: str | None, split: str, revision: str, instead: str) -> Any:
    """Return the rows of a hub data set, downloaded if they were not before."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision or None)
    except Exception as error:  # the client raises a dozen unrelated types
        why = hub.ask_why(name, revision or None, "dataset")
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{why or f'{name} could not be downloaded ({reason})'}; {instead}") from None
    commit = hub.commit_here(name, revision, "dataset") or revision
    files = getattr(rows, "cache_files", None)
    if not re.fullmatch("[0-9a-f]{40}", commit):  # no such revision, says the hub, and older clients do not pass it on
        if revision and (why := hub.ask_why(name, revision, "dataset")):
            raise UserError(f"{why}; {instead}")
        return rows
    if not files or Path(files[0]["filename"]).parent.name == commit:
        return rows
    # The hub failed in the middle, and the client took what it found here, of whatever revision.
    if (rows := _downloaded(name, config, split, revision)) is None:
        raise UserError(f"{name} could not be downloaded (the hub failed meanwhile); repeat the command, or {instead}")
    return rows


def _downloaded(name: str, config: str | None, split: str, revision: str) -> Any:
    """Return the rows of a hub data set as they are on this disk, of that very revision; None if they are not.

    The data sets' client itself would take the latest that it finds, of whatever revision.

    Raises:
        UserError: if the data set is there and has no such split.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, own = name.partition("/")
    commit = hub.commit_here(name, revision, "dataset") or revision
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(own)}"
    found = [
        made
        for made in (info.parent for info in folder.glob("*/*/*/dataset_info.json"))
        if made.parts[-3] == (config or made.parts[-3]) and made.name == (commit or made.name)
    ]
    if len(found) != 1:
        return None
    files = sorted([*found[0].glob(f"*-{split}.arrow"), *found[0].glob(f"*-{split}-*-of-*.arrow")])
    if not files:
        splits = json.loads((found[0] / "dataset_info.json").read_text(encoding="utf-8")).get("splits") or {}
        raise unknown("split", split, splits)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def load_rows(
    rows: Iterable[tuple[str, Row]],
    parse: Callable[[Row, str], Problem],
    limit: int | None,
    seed: int,
    source: str,
) -> list[Problem]:
    """Parse rows into problems and take a seeded sample of ``limit`` of them, in the source's order.

    A problem that occurs twice keeps both occurrences, the later with ``#2`` at its id. The sample depends on the
    number of rows and the seed alone, so every model gets the same one.

    Raises:
        UserError: if there are no problems, or ``limit`` is above their number.
    """
    problems, seen = [], {}
    for where, row in rows:
        problem = parse(row, where)
        seen[problem.id] = count = seen.get(problem.id, 0) + 1
        if count > 1:
            problem = Problem(f"{problem.id}#{count}", problem.columns, problem.gold, problem.stratum)
        problems.append(problem)
    if not problems:
        raise UserError(f"{source} has no problems")
    if limit is None:
        return problems
    if limit > len(problems):
        raise UserError(f"--limit {limit} is more than {source} has: {len(problems)} problems")
    chosen = sorted(random.Random(seed).sample(range(len(problems)), limit))
    return [problems[i] for i in chosen]


def text_column(row: Row, column: str, where: str, default: str | None = None) -> str:
    """Return a column as text, numbers included; ``default``, if given, where the row lacks it.

    Raises:
        UserError: if it is missing, empty, or neither text nor a number.
    """
    if column not in row and default is not None:
        return default
    if column not in row:
        raise UserError(f"{where}: {column!r} is missing; this row has {listed(row)}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: {column!r} must be text or a number, not {str(value)[:60]!r}")
    return str(value)


def split_slice(split: str) -> tuple[str, slice]:
    """Take ``test[:64]`` apart into the split's name and a slice of its rows.

    Raises:
        UserError: for another form, such as a step or a percentage.
    """
    match = re.fullmatch(r"(\w+)(?:\[([0-9]{0,15}):([0-9]{0,15})\])?", split)
    if match is None:
        raise UserError(f"unknown split {split[:60]!r}: give a name, or a part as in 'test[:64]' or 'test[64:128]'")
    return match[1], slice(*(int(bound) if bound else None for bound in match.groups()[1:]))


def content_id(prefix: str, *parts: str) -> str:
    """Return an id that depends on the content alone: ``prefix-`` and 10 hexadecimal digits."""
    return f"{prefix}-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:10]}"
