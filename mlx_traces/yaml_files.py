"""Read YAML files from any source, with bounds on size, depth and time. No MLX."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mlx_traces.errors import MOST_NAME, UserError
from mlx_traces.readers import MOST_DEPTH, text_of

MOST_BYTES, MOST_VALUES = 1_000_000, 5_000  # of a YAML file
# Numbers in base 60 (1:30:00) included: parsing them takes quadratic time.
_LOOKS_LIKE_A_NUMBER = re.compile(r"[-+]?(?:0[xb][0-9a-fA-F_]+|\.?[0-9][0-9_:.]*)")


def read_yaml(path: Path, what: str = "configuration") -> dict[str, Any]:
    """Read a YAML mapping; UserError if it is not one, has a key twice, or exceeds the bounds above."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, if libyaml is installed
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: a {what} file of more than {MOST_BYTES:,} bytes; keep only its settings")
        text = text_of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    try:
        if sprawl := _sprawl(yaml.parse(text, loader)):
            raise UserError(f"{path}: {sprawl}; write less, without nested aliases")
        if twice := _twice(yaml.compose(text, loader)):
            line, key = twice
            raise UserError(f"{path}:{line}: {key[:MOST_NAME]!r} is given twice; keep one of them")
        content = yaml.load(text, loader)
    # For a wrong date, or a tag that does not fit its text, PyYAML raises errors of many types.
    except (ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}{_place(text, getattr(error, 'problem_mark', None))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'field: value' lines, found {type(content).__name__}; write one a line")
    return content


def _place(text: str, mark: Any) -> str:
    """Say where a text stops being YAML, and what to check; PyYAML's own messages differ between versions."""
    if mark is None:
        return ": not YAML: a control character, or a value that is not what it looks like (as 2001-99-99); quote it"
    line = next(iter(text.splitlines()[mark.line : mark.line + 1]), "")
    shown = f"'{line.strip()[:60]}'" if line.strip() else "the end of the file"
    return f":{mark.line + 1}: not YAML from column {mark.column + 1} on: {shown}; check indents, brackets and quotes"


def _twice(top: Any) -> tuple[int, str] | None:
    """Return the line and the name of the first key that occurs twice in its mapping; None if none does."""
    todo, seen, twice = [top], set(), []
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
                twice.append((key.start_mark.line + 1, key.value))
            keys.add((key.tag, key.value))
    return min(twice, default=None)


def _sprawl(events: Iterable[Any]) -> str:
    """Say which bound a YAML file exceeds once its aliases are expanded; every 50 characters of text count as a value.

    So nested aliases cannot build more values than that, and a value that contains itself is refused.
    """
    deep = f"more than {MOST_DEPTH} values within each other"
    sizes: dict[str, int] = {}  # of each anchor's value
    around: list[tuple[str | None, int]] = [(None, 0)]  # open collections: anchor, size so far
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
