"""Import traces: chat messages, prompt and completion, ShareGPT, Alpaca, open-r1, plain text."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, unknown
from mlx_traces.models.chat import RESERVED, SWITCHES
from mlx_traces.readers import MARK, Row, file_rows, is_file, listed, text_of
from mlx_traces.records import Trace
from mlx_traces.tasks import Task
from mlx_traces.tasks.data import content_id, hub_rows, split_slice
from mlx_traces.tasks.prompts import Message
from mlx_traces.tasks.thoughts import STYLES, restyle, tagged_parts, tags, with_thought
from mlx_traces.text import clean
from mlx_traces.traces import FORMATS


def count_skipped(skipped: Counter | None, reason: str) -> None:
    """Add 1 to the count of a reason; do nothing without a counter."""
    if skipped is not None:
        skipped[reason] += 1


# ---------------------------------------------------------------------------------- traces from elsewhere

THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought")  # fields that hold a turn's thought
SETTINGS = ("on", "off", "true", "false", "yes", "no", "low", "medium", "high", "none")  # in such a field, no thought
TOOLS = ("tool", "function", "function_call", "observation", "ipython")
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    **{"system": "system", "developer": "system"},
    **dict.fromkeys(TOOLS, "tool"),
}
INSTEAD = "pass a .jsonl, .json or .parquet file of its rows"


def import_traces(
    data: str,
    format: str,
    task: Task | None = None,
    style: str | None = "think",
    split: str = "train",
    skipped: Counter | None = None,
    dropped: Counter | None = None,
    strict: bool = False,
) -> Iterator[Trace]:
    """Yield the traces of a .jsonl, .json (a list), .parquet, .arrow or .txt file, or of a hub data set.

    The assistant's last turn is the completion; turns after it are dropped. With a task a trace has its problem's id;
    without one the id is a hash of the turns before the completion, or of the completion if there are none.
    ``sample`` numbers the conversations with the same id, skipped ones included.

    If a turn of the assistant has its thought in a field of `THOUGHTS`, or in a part of its content, the thought is put
    before the content, in tags; texts in parts are joined. A turn of ``weight`` 0 is not learned: the completion is
    then the last turn that is, and earlier ones are marked in the trace, as are the assistant's turns in a ``prompt``.
    Conversations with tool turns are skipped, and those whose completion calls a tool.

    Args:
        data: a file or ``owner/name``.
        format: one of ``FORMATS``.
        task: its columns are taken from every row, so that the traces can be graded; if the row has no ``question``, it
            is the last user's turn.
        style: the tags of the assistant's turns, ``think`` or ``sky-t1``; None leaves the turns unchanged.
        split: of a hub data set, or a slice such as ``train[:1000]``; for a file only the slice counts.
        skipped: counts the skipped conversations, by reason.
        dropped: counts the turns that lose a field, by the field's name.
        strict: refuse a turn that would lose a field.

    Raises:
        UserError: for an unknown format or style, a file that cannot be read, a row without a column of the format or
            the task, a conversation without an assistant's turn, or, with ``strict``, a field that is not imported.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if style is not None and style not in STYLES:
        raise unknown("style", style, STYLES)
    seen: Counter[str] = Counter()
    source = Path(data).name if is_file(data) else data

    def drop(name: str, where: str) -> None:
        if strict:
            raise UserError(f"{where}: {clean(name)[:80]} is not imported; leave --strict out to go without it")
        count_skipped(dropped, clean(name)[:80])

    def styled(turn: _Turn) -> str:
        text = turn.message["content"]
        if style is None or turn.styled or turn.message["role"] != "assistant" or (format == "text" and _led(text)):
            return text
        bare = style == "think" and tagged_parts(text)[0] is None
        indent = re.match(r"(?:\s*\n)?(\t+| {2,}|)", text)[1] if bare else ""  # of a line of code
        return indent + restyle(text, style)

    for where, row in _rows(data, format, split):
        for column in (*FORMATS[format], *(task.graded_columns if task else ())):
            if row.get(column) is None:
                raise UserError(f"{where}: {column!r} is missing; this row has {listed(row)}")
        thinking, arguments, system = _of_template(row, where, drop)
        for turns, finish, fault in _conversations(row, format, where, style or "think", system, drop):
            before, last, unlearned, fault = _split_last(turns, format, where, fault)
            messages, completion = [turn.message for turn in before], last.message["content"]
            spoken = [text for turn in messages for text in (turn["role"], turn["content"])]
            identity, columns = content_id("trace", *(spoken or [completion])), {}
            if task:
                asked = {"question": messages[-1]["content"]} if "question" in task.columns and messages else {}
                given = {name: row[name] for name in task.columns if row.get(name) is not None}
                try:
                    problem = task.parse({**asked, **given}, where)
                except UserError:
                    count_skipped(skipped, f"no {task.name} answer in the row")
                    continue
                identity, columns = problem.id, problem.columns
            seen[identity] += 1
            if not fault and any(turn["role"] == "tool" for turn in messages):
                fault = "turns of a tool"
            elif not fault and last.calls:
                fault = "a call of a tool"
            elif not fault and not completion.strip():
                fault = "empty completion"
            elif not fault and messages and messages[-1]["role"] == "assistant":
                fault = "two turns of the assistant in a row"
            elif not fault and format != "text" and (not messages or messages[-1]["role"] != "user"):
                fault = "no user's turn before the completion"
            if fault:
                count_skipped(skipped, fault)
                continue
            yield Trace(
                id=identity,
                messages=tuple({**turn.message, "content": styled(turn)} for turn in before),
                completion=styled(last),
                task=task.name if task else "",
                columns=columns,
                source=source,
                sample=seen[identity] - 1,
                finish_reason=finish,
                not_learned=tuple(unlearned) or None,
                thinking=thinking,
                template_args=arguments,
            )


def _rows(data: str, format: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a file or a hub data set."""
    name, span = split_slice(split)
    path = Path(data)
    if not is_file(data):
        rows = hub_rows(data, None, name, INSTEAD, lambda size: range(size)[span])
        span = slice(None)
    elif path.suffix.lower() == ".txt" and format == "text":
        rows = _paragraphs(path)
    else:
        rows = file_rows(path)
    yield from islice(rows, span.start, span.stop)


def _paragraphs(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (``file:line``, row) for each paragraph of a text file; UserError for a blank line within a thought."""
    lines: list[str] = []
    for number, line in enumerate([*text_of(path).split("\n"), ""], 1):
        line = line.removeprefix(MARK)  # in the middle, where files were joined
        if line.strip():
            lines.append(line)
        elif lines:
            where, text, lines = f"{path}:{number - len(lines)}", "\n".join(lines), []
            if tagged_parts(text)[2]:
                raise UserError(f"{where}: a blank line within a thought; pass JSON lines with 'text' instead")
            yield where, {"text": text}


@dataclass(frozen=True)
class _Turn:
    """A turn of a conversation, its thought in tags.

    ``learned`` is False for a weight of 0 and in a prompt, ``styled`` is True if the thought was put there and has the
    import's tags, ``calls`` if the turn goes on with a call of a tool.
    """

    message: Message
    learned: bool = True
    styled: bool = False
    calls: bool = False


def _of_template(row: Row, where: str, drop: Callable[[str, str], None]) -> tuple[bool | None, Row, str | None]:
    """Return the thinking switch, other variables and a system message of a row's ``chat_template_kwargs``."""
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        drop("a 'chat_template_kwargs' column that is no object", where)
        given = {}
    thinking, system, arguments = None, None, {}
    for name, value in given.items():
        if value in (None, "", [], {}):
            continue
        if name in SWITCHES and isinstance(value, bool):
            thinking = value
        elif name in ("custom_instructions", "system_message") and isinstance(value, str):
            system = value
        elif name not in RESERVED and isinstance(value, str | int | float):
            arguments[name] = value
        else:
            drop(f"a template's {name!r}", where)
    return thinking, arguments, system


def _conversations(
    row: Row, format: str, where: str, style: str, system: str | None, drop: Callable[[str, str], None]
) -> Iterator[tuple[list[_Turn], str | None, str | None]]:
    """Yield (turns, finish reason, reason to skip it or None) for each of a row's conversations.

    ``system`` is a system message for one that has none.
    """
    if row.get("tools") not in (None, "", "[]", [], {}):
        drop("a 'tools' column", where)
    said = row[FORMATS[format][-1]] if format in ("prompt-completion", "alpaca") else None
    for name in () if isinstance(said, str) else THOUGHTS:  # `_column_turns` takes it
        if _is_thought(row.get(name)):
            drop(f"a {name!r} column", where)
    if format in ("open-r1", "text") and (system or row.get("system")):
        drop("a system message", where)
    if format == "open-r1":
        yield from _generations(row, where)
        return
    if format == "text":
        yield [_Turn({"role": "assistant", "content": _text(row["text"], "text", where)})], None, None
        return
    if format == "messages":
        turns = _turns(row["messages"], "role", "content", where, style, drop)
    elif format == "sharegpt":
        turns = _turns(row["conversations"], "from", "value", where, style, drop)
    elif format == "alpaca":
        asked = [_text(row[name], name, where) for name in ("instruction", "input") if row.get(name)]
        turns = [*_history(row, where), _Turn({"role": "user", "content": "\n\n".join(asked)})]
        turns += _column_turns(row, "output", "assistant", where, style, drop)
    else:
        asked = _column_turns(row, "prompt", "user", where, style, drop)
        turns = [replace(turn, learned=False) for turn in asked]  # its assistant's turns are examples
        turns += _column_turns(row, "completion", "assistant", where, style, drop)
    systems = [turn.message["content"] for turn in turns if turn.message["role"] == "system"]
    for text, what in ((row.get("system"), "a system column"), (system, "a template's system message")):
        if text and systems and text not in systems:
            drop(f"{what} beside a system turn", where)
        elif text and not systems:
            systems.append(_text(text, "system", where))
            turns.insert(0, _Turn({"role": "system", "content": text}))
    yield turns, None, None


def _generations(row: Row, where: str) -> Iterator[tuple[list[_Turn], str | None, str | None]]:
    """Yield a conversation for each generation; it is to be skipped if it was cut off or every check finds it wrong.

    The checks are the row's lists ``correctness_…``; without any the generation counts as correct.
    """
    question = {"role": "user", "content": _text(row["problem"], "problem", where)}
    if not isinstance(row["generations"], list):
        raise UserError(f"{where}: 'generations' must be a list of texts")
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    for index, text in enumerate(row["generations"] or [""]):
        said = {name: values[index] for name, values in lists.items() if index < len(values)}
        checks = [value for name, value in said.items() if name.startswith("correctness_") and value is not None]
        wrong = "wrong by the row's own check" if checks and not any(checks) else None
        cut = "cut off" if said.get("is_reasoning_complete") is False else None
        finish = said.get("finish_reasons")
        finish = finish if finish in ("stop", "length") else None
        turn = {"role": "assistant", "content": _text(text, "generations", where)}
        yield [_Turn(question), _Turn(turn)], finish, wrong or cut


def _history(row: Row, where: str) -> Iterator[_Turn]:
    """Yield the turns of an Alpaca row's ``history``, a list of (question, answer) pairs."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{where}: 'history' must be a list of [question, answer] pairs")
    for pair in pairs:
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield _Turn({"role": role, "content": _text(text, "history", where)})


def _column_turns(
    row: Row, column: str, role: str, where: str, style: str, drop: Callable[[str, str], None]
) -> list[_Turn]:
    """Return a column's turns; a text is one turn of ``role``, whose thought may be in another column."""
    if isinstance(row[column], str):
        apart = {name: row[name] for name in THOUGHTS if role == "assistant" and _is_thought(row.get(name))}
        row = {column: [{"role": role, "content": row[column], **apart}]}
    return _turns(row[column], "role", "content", where, style, drop)


def _turns(
    turns: Any, role: str, content: str, where: str, style: str, drop: Callable[[str, str], None]
) -> list[_Turn]:
    """Read a list of turns with the fields ``role`` and ``content`` (their names in this format); drop other fields."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and role in turn and (content in turn or _thoughts(turn, role) or turn.get("tool_calls"))
        for turn in turns
    ):
        raise UserError(f"{where}: the turns must be a list of {{{role}, {content}}} objects")
    found = []
    for turn in turns:
        who = ROLES.get(str(turn[role]).lower())
        if who is None:
            understood = [name for name in ROLES if name not in TOOLS]
            raise UserError(
                f"{where}: a turn is from {str(turn[role])[:40]!r}; only {', '.join(understood)} are understood"
            )
        if who == "tool":
            drop("a tool's turn", where)
            found.append(_Turn({"role": who, "content": ""}))
            continue
        turn = _joined(turn, content, where)
        thoughts, said = _thoughts(turn, role), turn.get(content)
        text = "" if said is None and (thoughts or turn.get("tool_calls")) else _text(said, content, where)
        for name, thought in thoughts.items():
            if thought.strip() != next(iter(thoughts.values())).strip():
                drop(f"a second thought of a turn, {name!r}", where)
        if thoughts:
            text = with_thought(next(iter(thoughts.values())), text, style)  # once: its answer may have such tags
        for name, value in turn.items():
            said = value.strip() if isinstance(value, str) else value not in (None, [], {})
            if said and name not in (role, content, "weight", *thoughts):
                drop(f"a turn's {name!r}", where)
        if turn.get("weight", 1) not in (None, 0, 1):
            raise UserError(f"{where}: 'weight' of a turn must be 0 or 1, not {str(turn['weight'])[:40]!r}")
        message, calls = {"role": who, "content": text}, bool(turn.get("tool_calls"))
        found.append(_Turn(message, turn.get("weight", 1) != 0, styled=bool(thoughts), calls=calls))
    return found


def _joined(turn: Row, content: str, where: str) -> Row:
    """Return the turn with its content as one text: join a list of parts, and move thoughts to a separate field."""
    if not isinstance(turn.get(content), list):
        return turn
    texts, thoughts = [], []
    for part in turn[content]:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", *THOUGHTS) or not isinstance(part.get(kind), str):
            raise UserError(f"{where}: a part of {content!r} is {str(kind)[:40]!r}, not text; leave that row out")
        (texts if kind == "text" else thoughts).append(part[kind])
    free = next((name for name in THOUGHTS if not turn.get(name)), None)
    if thoughts and free is None:
        raise UserError(f"{where}: a turn has thoughts in {content!r} and in {', '.join(THOUGHTS)}; leave that row out")
    return {**turn, content: "".join(texts), **({free: "\n".join(thoughts)} if thoughts else {})}


def _thoughts(turn: Row, role: str) -> dict[str, str]:
    """Return the thoughts that an assistant's turn has in separate fields, by field."""
    if ROLES.get(str(turn[role]).lower()) != "assistant":
        return {}
    return {name: turn[name] for name in THOUGHTS if _is_thought(turn.get(name))}


def _is_thought(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() not in ("", *SETTINGS)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be a text, not {type(value).__name__}")
    return value


def _split_last(
    turns: list[_Turn], format: str, where: str, fault: str | None
) -> tuple[list[_Turn], _Turn, list[int], str | None]:
    """Return the turns before the last learned turn, that turn, the places of unlearned turns, and a fault."""
    roles = [turn.message["role"] for turn in turns]
    own = [at for at, role in enumerate(roles) if role == "assistant"]
    if "tool" in roles and not own:
        return turns, _Turn({"role": "assistant", "content": ""}), [], "turns of a tool"
    if not own:
        raise UserError(f"{where}: no turn is the assistant's; {format} needs a completion in every row")
    learned = [at for at in own if turns[at].learned]
    last = max(learned or own)
    fault = fault or (None if learned else "every turn of the assistant has weight 0")
    return turns[:last], turns[last], [at for at in own if at < last and not turns[at].learned], fault


def _led(text: str) -> bool:
    """Whether something, such as a question, stands before the opening tag of a text's thought."""
    first = next((tag for tag in tags(text) if tag.lastgroup), None)
    return first is not None and first.lastgroup == "open" and bool(text[: first.start()].strip())
