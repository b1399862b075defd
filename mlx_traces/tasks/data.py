"""Load rows of hub data sets, and make problems of rows. No MLX."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import Row, listed, plain
from mlx_traces.records import Problem
from mlx_traces.runtime import hub


def hub_rows(
    dataset: str, config: str | None, split: str, instead: str, part: Callable[[int], range] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (``dataset[index]``, row) of a hub data set ``owner/name`` or ``owner/name@revision``.

    ``part`` takes the number of rows and returns the range of those to yield; None yields all.

    Raises:
        UserError: if it cannot be loaded; the message ends with ``instead``, which names an alternative.
    """
    name, _, revision = dataset.partition("@")
    away = hub.out_of_reach()
    rows = _downloaded(name, config, split, revision) if away else _download(name, config, split, revision, instead)
    if rows is None:
        raise UserError(f"{dataset} could not be downloaded ({away}), and was not downloaded before; {instead}")
    if part is None:
        yield from ((f"{name}[{index}]", plain(row)) for index, row in enumerate(rows))
    else:
        yield from ((f"{name}[{index}]", plain(rows[index])) for index in part(len(rows)))


def _download(name: str, config: str | None, split: str, revision: str, instead: str) -> Any:
    """Return the rows of a hub data set, downloaded unless they are in the cache."""
    import datasets  # takes a second to load

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision or None)
    except Exception as error:  # the client raises a dozen unrelated types
        why = hub.ask_why(name, revision or None, "dataset")
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{why or f'{name} could not be downloaded ({reason})'}; {instead}") from None
    commit = hub.commit_here(name, revision, "dataset") or revision
    files = getattr(rows, "cache_files", None)
    if not re.fullmatch("[0-9a-f]{40}", commit):  # the hub lacks this revision; older clients hide that
        if revision and (why := hub.ask_why(name, revision, "dataset")):
            raise UserError(f"{why}; {instead}")
        return rows
    if not files or Path(files[0]["filename"]).parent.name == commit:
        return rows
    # The hub failed during the request, and the client took another revision from the cache.
    if (rows := _downloaded(name, config, split, revision)) is None:
        raise UserError(f"{name} could not be downloaded (the hub failed meanwhile); repeat the command, or {instead}")
    return rows


def _downloaded(name: str, config: str | None, split: str, revision: str) -> Any:
    """Return the rows of exactly this revision of a hub data set from the cache; None if they are not there.

    The hub's own client would return the latest download of any revision.

    Raises:
        UserError: if the cache has the data set, and it has no such split.
    """
    import datasets

    owner, _, short = name.partition("/")
    commit = hub.commit_here(name, revision, "dataset") or revision
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{datasets.naming.camelcase_to_snakecase(short)}"
    folders = [
        made
        for made in (info.parent for info in folder.glob("*/*/*/dataset_info.json"))
        if made.parts[-3] == (config or made.parts[-3]) and made.name == (commit or made.name)
    ]
    if len(folders) != 1:
        return None
    files = sorted([*folders[0].glob(f"*-{split}.arrow"), *folders[0].glob(f"*-{split}-*-of-*.arrow")])
    if not files:
        splits = json.loads((folders[0] / "dataset_info.json").read_text(encoding="utf-8")).get("splits") or {}
        raise unknown("split", split, splits)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def load_rows(
    rows: Iterable[tuple[str, Row]],
    parse: Callable[[Row, str], Problem],
    limit: int | None,
    seed: int,
    source: str,
) -> list[Problem]:
    """Parse rows into problems; return all of them, or a random sample of ``limit``, in the source's order.

    A problem that occurs twice stays twice, the second time with ``#2`` after its id. The sample depends only on the
    number of rows, ``limit`` and ``seed``, so every model gets the same problems.

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
    """Return a column as text, also if it is a number; ``default``, if given, if the row lacks it.

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
    """Parse ``test[:64]`` into the split's name and a slice of its rows.

    Raises:
        UserError: for any other form, such as a step or a percentage.
    """
    match = re.fullmatch(r"(\w+)(?:\[([0-9]{0,15}):([0-9]{0,15})\])?", split)
    if match is None:
        raise UserError(f"unknown split {split[:60]!r}: give a name, or a part as in 'test[:64]' or 'test[64:128]'")
    return match[1], slice(*(int(bound) if bound else None for bound in match.groups()[1:]))


def content_id(prefix: str, *parts: str) -> str:
    """Return an id derived from the content alone: ``prefix-`` and 10 hexadecimal digits."""
    return f"{prefix}-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:10]}"
