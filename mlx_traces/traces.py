r"""Files of traces and their manifests, the tags around a thought, and raw traces made or brought in. No MLX.

The normal form of a completion is ``<think>\n{thought}\n</think>\n{solution}``; ``<answer>…</answer>``, ``\boxed{}``
and ``####`` stay where they stand in the solution.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import MARK, Row, file_rows, is_file, listed, read_json, read_jsonl, text_of
from mlx_traces.records import Problem, Trace
from mlx_traces.runtime.files import leftovers, replacing, sync, to_json
from mlx_traces.runtime.provenance import ids_digest, provenance
from mlx_traces.tasks import Task, countdown, gsm8k
from mlx_traces.tasks.data import content_id, hub_rows, split_slice
from mlx_traces.tasks.prompts import Message, Prompt
from mlx_traces.tasks.solver import _opening, solved
from mlx_traces.tasks.thoughts import STYLES, _parts, restyle, with_thought
from mlx_traces.text import clean

# ---------------------------------------------------------------------------------- files

NUMBER = (int, float)
FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("task", "prompt", "source", "finish_reason", "verdict"), ("a text", (str,))),
    **dict.fromkeys(("columns", "scores"), ("an object", (dict,))),
    **dict.fromkeys(("completion_ids", "logprobs", "not_learned"), ("a list of numbers", (list,))),
    "sample": ("a whole number", (int,)),
    "score": ("a number", NUMBER),
}


def read_traces(path: Path) -> Iterator[tuple[str, Trace]]:
    """Yield (``file:line``, trace) of a JSON-lines file; UserError at the first line that is not one."""
    for where, row in read_jsonl(Path(path)):
        if missing := [name for name in ("id", "messages", "completion") if name not in row]:
            raise UserError(
                f"{where}: {missing[0]!r} is missing; this row has {listed(row)}; "
                "rows of another form are brought in by `mlx-traces data import`"
            )
        row = {name: value for name, value in row.items() if value is not None or name not in FIELDS}
        for name, (kind, types) in FIELDS.items():
            if row.get(name) is not None and (not isinstance(row[name], types) or isinstance(row[name], bool)):
                raise UserError(f"{where}: {name!r} must be {kind}, not {type(row[name]).__name__}")
        for name in ("completion_ids", "logprobs"):
            if not all(isinstance(value, NUMBER) for value in row.get(name) or ()):
                raise UserError(f"{where}: {name!r} must be a list of numbers")
        turns = len(row["messages"]) if isinstance(row["messages"], list) else 0
        if not all(type(value) is int and 0 <= value < turns for value in row.get("not_learned") or ()):
            raise UserError(f"{where}: 'not_learned' must be numbers of messages, from 0 to {turns - 1}")
        if not all(value is None or isinstance(value, NUMBER) for value in row.get("scores", {}).values()):
            raise UserError(f"{where}: 'scores' must be numbers or null, by name")
        yield where, Trace.from_row(row, where)


def write_traces(path: Path, traces: Iterable[Trace], manifest: dict[str, Any]) -> int:
    """Write a new file of traces, all at once when the last one is there, then its manifest; return their number.

    Args:
        path: ``NAME.jsonl``; its folders are made.
        traces: may be a generator; nothing is drawn from it if the file exists.
        manifest: ``source``, where the content is from: a file (then `source_of` has its hash too), a data set, a
            model; ``config``, every setting, filled in; ``counts``, what was skipped for which reason; ``seed``, None
            where nothing was drawn; and where there were any, ``models`` that were used, by their part
            (`LoadedModel.about`), and ``problems``, whose ids are kept as a fingerprint. Counts and models are read at
            the end, so a generator may still add to them; the number ``written`` is put first.

    Raises:
        UserError: if the file or its manifest exists, it cannot be written, or there are no traces.
    """
    path, written = Path(path), 0
    refuse_written(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(manifest_path(path)) as about, replacing(path) as scratch:  # renamed from right to left
            with scratch.open("w", encoding="utf-8") as file:
                for written, trace in enumerate(traces, 1):  # noqa: B007
                    row = {"id": trace.id, "messages": trace.messages, "completion": trace.completion, **trace.to_row()}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not written:
                raise UserError(
                    f"{path}: there are no traces to write; counted: {counted(manifest['counts']) or 'nothing'}"
                )
            own = {**manifest, "counts": {"written": written, **manifest["counts"]}}
            about.write_text(to_json(_manifest(path.name, _sha256(scratch), **own)), encoding="utf-8")
            sync(about)
    except OSError as error:
        with suppress(OSError):
            discard_unfinished(path)  # it was not there before
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return written


def refuse_written(path: Path) -> None:
    """Raise UserError if a file of traces or its manifest is there.

    A writer that was killed between the file and its manifest has left the manifest, under the name of a temporary
    file, with the file's hash in it: it is put in its place.
    """
    try:
        if path.exists() and not manifest_path(path).exists():
            for left in leftovers(manifest_path(path)):
                with suppress(UserError):
                    if read_json(left).get("sha256") == _sha256(path):
                        left.replace(manifest_path(path))
                        break
        for file in (path, manifest_path(path)):
            if file.exists():
                raise UserError(f"{file} exists; remove it, or choose another --out")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def discard_unfinished(path: Path) -> None:
    """Remove a file without its manifest: its writer was stopped between the two."""
    if not manifest_path(path).exists():
        Path(path).unlink(missing_ok=True)


def manifest_path(path: Path) -> Path:
    """Return ``NAME.manifest.json`` for ``NAME.jsonl``."""
    return Path(path).with_suffix(".manifest.json")


def _manifest(
    file: str,
    sha256: str,
    *,
    source: str,
    config: dict[str, Any],
    counts: dict[str, Any],
    seed: int | None,
    source_sha256: str | None = None,
    models: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    problems: Iterable[Problem] = (),
) -> dict[str, Any]:
    """Say what a file of traces is and how it was made."""
    made = provenance()
    read = {"source_sha256": source_sha256} if source_sha256 else {}
    read |= {"problems": ids_digest(own)} if (own := [problem.id for problem in problems]) else {}
    read |= {"models": dict(models)} if models else {}
    return {
        "file": file,
        "sha256": sha256,
        "source": source,
        **read,
        "command": made["command"],
        "seed": seed,
        "counts": counts,
        "config": config,
        "config_hash": config_hash(config),
        "versions": made["versions"],
        "git_revision": made["git_revision"],
        "platform": made["platform"],
        "time": made["started"],
    }


def source_of(source: str | Path) -> dict[str, str]:
    """Return what a manifest says of a source: its name and, of a file, the hash of its content as it is now.

    What can be read once only, a pipe, has no hash.
    """
    try:
        return {"source": str(source)} | ({"source_sha256": _sha256(Path(source))} if Path(source).is_file() else {})
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def manifest_of(path: Path) -> dict[str, Any]:
    """Return a file's manifest; UserError if there is none, or the file has changed since."""
    manifest = read_json(manifest_path(path))
    try:
        same = manifest.get("sha256") == _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not same:
        raise UserError(f"{path} is not the file that its manifest describes; write it anew, or remove the manifest")
    return manifest


def config_hash(config: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits that change with a setting, not with the settings' order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def counted(counts: dict[str, Any], name: str = "") -> str:
    """Tell counts in one line: ``12 written, 3 skipped (no short trace)``; ``name`` stands before an inner reason."""
    told = (
        counted(value, key) if isinstance(value, dict) else f"{value:,} {name} ({key})" if name else f"{value:,} {key}"
        for key, value in counts.items()
    )
    return ", ".join(filter(None, told))


def _sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- traces of the tasks

GSM8K_STYLES = {"think": "thinking", "plain": "hash", "boxed": "boxed"}  # and the prompt that asks for it
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def gsm8k_traces(
    split: str,
    data: str | None,
    limit: int | None,
    seed: int,
    prompt: Prompt | None = None,
    style: str = "think",
    skipped: Counter | None = None,
) -> Iterator[Trace]:
    r"""Yield GSM8K's worked solutions as traces, without their calculator annotations ``<<48/2=24>>``.

    Args:
        split: as for the task's ``load``, as are ``data``, ``limit`` and ``seed``.
        data: a file or hub data set, or None for the task's own.
        limit: size of a seeded sample, or None for all.
        seed: of the sample.
        prompt: how the question is put; None for the one that asks for the style.
        style: ``think`` (solution as thought, then ``<answer>72</answer>``), ``plain`` (then ``#### 72``) or ``boxed``
            (then ``\boxed{72}``).
        skipped: gets the number of rows without a worked solution.
    """
    if style not in GSM8K_STYLES:
        raise unknown("style", style, GSM8K_STYLES)
    prompt = prompt or gsm8k.PROMPTS[GSM8K_STYLES[style]]
    source = Path(data).name if data and is_file(data) else f"{data or gsm8k.HUB} {split}"
    for problem in gsm8k.load(split, data, limit, seed):
        solution = _ANNOTATION.sub("", str(problem.columns["answer"]).rpartition("####")[0]).strip()
        if not solution:
            _skip(skipped, "no worked solution")
            continue
        if style == "think":
            completion = f"{_opening(prompt)}{solution}\n</think>\n<answer>{problem.gold}</answer>"
        else:
            end = f"#### {problem.gold}" if style == "plain" else f"\\boxed{{{problem.gold}}}"
            completion = f"{prompt.prefill}{solution}\n{end}"
        yield _task_trace("gsm8k", problem, prompt, completion, source)


def countdown_traces(
    count: int,
    split: str,
    seed: int,
    operands: tuple[int, int] = (3, 4),
    prompts: Sequence[Prompt] = (countdown.PROMPTS["thinking"],),
    skipped: Counter | None = None,
) -> Iterator[Trace]:
    """Yield the solver's traces of ``count`` generated problems, one for every prompt.

    Args:
        count: how many problems; one without a short trace gives none.
        split: as for ``countdown.generate``, as are ``seed`` and ``operands``.
        seed: the same seed gives the same problems.
        operands: fewest and most numbers of a problem.
        prompts: how they are put.
        skipped: gets the number of problems without a short trace.
    """
    for nums, target in countdown.generate(split, count, seed, operands):
        problem = countdown.parse({"nums": nums, "target": target}, "solver")
        for prompt in prompts:
            if (found := solved(prompt, nums, target)) is None:
                _skip(skipped, "no short trace")
                break
            yield _task_trace("countdown", problem, prompt, found[1], "solver")


def _task_trace(task: str, problem: Problem, prompt: Prompt, completion: str, source: str) -> Trace:
    return Trace(
        id=problem.id,
        messages=tuple(prompt.messages(problem)),
        completion=completion,
        task=task,
        columns=problem.columns,
        prompt=prompt.name,
        source=source,
    )


def _skip(skipped: Counter | None, reason: str) -> None:
    if skipped is not None:
        skipped[reason] += 1


# ---------------------------------------------------------------------------------- traces from elsewhere

THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought")  # fields in which a turn's thought is kept apart
FORMATS = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "open-r1": ("problem", "generations"),
    "text": ("text",),
}  # and the columns that a row must have
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
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

    The last assistant's turn is the completion; what follows it is dropped. A trace's id is its problem's if there is
    a task, else a hash of the turns before the completion (of the completion, if there are none); ``sample`` numbers
    the conversations with one id, skipped ones included.

    A thought that a turn of the assistant keeps in a field of `THOUGHTS` is put before its content, in tags. A turn of
    ``weight`` 0 is not learned: the completion is then the last turn that is, and earlier ones are marked in the trace.

    Args:
        data: a file or ``owner/name``.
        format: one of ``FORMATS``.
        task: its columns are taken from every row, so that the traces can be graded; a ``question`` that the row lacks
            is the last user's turn.
        style: of the completions' tags, ``think`` or ``sky-t1``; None leaves them as they are.
        split: of a hub data set, or a part such as ``train[:1000]``; of a file only the part counts.
        skipped: gets the numbers of conversations left out, by reason.
        dropped: gets the numbers of turns of which a field was left out, by its name.
        strict: refuse such a turn.

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
        _skip(dropped, clean(name)[:80])

    for where, row in _rows(data, format, split):
        _need(row, (*FORMATS[format], *(task.graded_columns if task else ())), where)
        for turns, finish, fault in _conversations(row, format, where, style or "think", drop):
            messages, completion, unlearned, fault = _halves(turns, format, where, fault)
            identity, columns = content_id("trace", *(_spoken(messages) or [completion])), {}
            if task:
                asked = {"question": messages[-1]["content"]} if "question" in task.columns and messages else {}
                given = {name: row[name] for name in task.columns if row.get(name) is not None}
                try:
                    problem = task.parse({**asked, **given}, where)
                except UserError:
                    _skip(skipped, f"no {task.name} answer in the row")
                    continue
                identity, columns = problem.id, problem.columns
            seen[identity] += 1
            fault = fault or _fault(messages, completion, format)
            if fault:
                _skip(skipped, fault)
                continue
            yield Trace(
                id=identity,
                messages=tuple(messages),
                completion=completion if style is None else restyle(completion, style),
                task=task.name if task else "",
                columns=columns,
                source=source,
                sample=seen[identity] - 1,
                finish_reason=finish,
                not_learned=tuple(unlearned) or None,
            )


def _fault(messages: list[Message], completion: str, format: str) -> str | None:
    """Return why a conversation is no trace, or None."""
    if not completion.strip():
        return "empty completion"
    if format != "text" and (not messages or messages[-1]["role"] != "user"):
        return "no user's turn before the completion"
    return None


def _spoken(messages: list[Message]) -> list[str]:
    return [text for turn in messages for text in (turn["role"], turn["content"])]


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
    """Yield (``file:line``, row) of a text file's paragraphs; UserError if a blank line is within a thought."""
    lines: list[str] = []
    for number, line in enumerate([*text_of(path).split("\n"), ""], 1):
        line = line.removeprefix(MARK)  # of a file that was put behind another
        if line.strip():
            lines.append(line)
        elif lines:
            where, text, lines = f"{path}:{number - len(lines)}", "\n".join(lines), []
            if _parts(text)[2]:
                raise UserError(f"{where}: a blank line within a thought; pass JSON lines with 'text' instead")
            yield where, {"text": text}


def _need(row: Row, columns: Sequence[str], where: str) -> None:
    """Raise UserError for a row without one of the columns."""
    for column in columns:
        if row.get(column) is None:
            raise UserError(f"{where}: {column!r} is missing; this row has {listed(row)}")


@dataclass(frozen=True)
class _Turn:
    """A turn of a conversation, its thought in tags, and whether the assistant's are learned."""

    message: Message
    learned: bool = True


def _conversations(
    row: Row, format: str, where: str, style: str, drop: Callable[[str, str], None]
) -> Iterator[tuple[list[_Turn], str | None, str | None]]:
    """Yield (turns, finish reason, why it is to be skipped) of a row's conversations."""
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
    else:
        turns = _said(row, "prompt", "user", where, style, drop)
        turns += _said(row, "completion", "assistant", where, style, drop)
    if row.get("system") and any(turn.message["role"] == "system" for turn in turns):
        drop("a system column beside a system turn", where)
    elif row.get("system"):
        turns.insert(0, _Turn({"role": "system", "content": _text(row["system"], "system", where)}))
    yield turns, None, None


def _generations(row: Row, where: str) -> Iterator[tuple[list[_Turn], str | None, str | None]]:
    """Yield a conversation for each generation; faulty are those cut off, and those no check of the row finds correct.

    The checks are the lists ``correctness_…``; where none says anything, the generation counts as correct.
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


def _said(row: Row, column: str, role: str, where: str, style: str, drop: Callable[[str, str], None]) -> list[_Turn]:
    """Return a column's turns; a text is one turn of ``role``, whose thought may be in a column beside it."""
    if isinstance(row[column], str):
        apart = {name: row[name] for name in THOUGHTS if role == "assistant" and isinstance(row.get(name), str)}
        row, column = {column: [{"role": role, "content": row[column], **apart}]}, column
    return _turns(row[column], "role", "content", where, style, drop)


def _turns(
    turns: Any, role: str, content: str, where: str, style: str, drop: Callable[[str, str], None]
) -> list[_Turn]:
    """Read a list of turns with these names for who speaks and what; other fields than these are dropped."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and role in turn and (content in turn or _thoughts(turn, role)) for turn in turns
    ):
        raise UserError(f"{where}: the turns must be a list of {{{role}, {content}}} objects")
    found = []
    for turn in turns:
        if str(turn[role]) not in ROLES:
            raise UserError(f"{where}: a turn is from {str(turn[role])[:40]!r}; only {', '.join(ROLES)} are understood")
        thoughts, said = _thoughts(turn, role), turn.get(content)
        text = "" if said is None and thoughts else _text(said, content, where)
        for name, thought in thoughts.items():
            if thought.strip() != next(iter(thoughts.values())).strip():
                drop(f"a second thought of a turn, {name!r}", where)
        if thoughts:
            text = with_thought(next(iter(thoughts.values())), text, style)
        for name, value in turn.items():
            if name not in (role, content, "weight", *thoughts) and value not in (None, "", [], {}):
                drop(f"a turn's {name!r}", where)
        if turn.get("weight", 1) not in (None, 0, 1):
            raise UserError(f"{where}: 'weight' of a turn must be 0 or 1, not {str(turn['weight'])[:40]!r}")
        found.append(_Turn({"role": ROLES[turn[role]], "content": text}, turn.get("weight", 1) != 0))
    return found


def _thoughts(turn: Row, role: str) -> dict[str, str]:
    """Return the thoughts that a turn of the assistant keeps apart, by field."""
    if ROLES.get(str(turn[role])) != "assistant":
        return {}
    return {name: turn[name] for name in THOUGHTS if isinstance(turn.get(name), str) and turn[name].strip()}


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be a text, not {type(value).__name__}")
    return value


def _halves(
    turns: list[_Turn], format: str, where: str, fault: str | None
) -> tuple[list[Message], str, list[int], str | None]:
    """Return the messages before the last turn that is learned, its text, which of them are not, and a fault."""
    own = [at for at, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    if not own:
        raise UserError(f"{where}: no turn is the assistant's; {format} needs a completion in every row")
    learned = [at for at in own if turns[at].learned]
    last = max(learned or own)
    messages = [turn.message for turn in turns[:last]]
    fault = fault or (None if learned else "every turn of the assistant has weight 0")
    return messages, turns[last].message["content"], [at for at in own if at < last and not turns[at].learned], fault
