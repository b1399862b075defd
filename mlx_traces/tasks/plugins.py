"""Tasks that users write: ``module:TASK``, and those that installed packages add by an entry point. No MLX.

A plug-in is loaded only when the user names it; README.md has an example.
"""

import hashlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_traces.errors import MOST_NAME, UserError, typed_line, unknown
from mlx_traces.records import Problem, Score, Span
from mlx_traces.tasks import TASKS, Task
from mlx_traces.tasks.prompts import Prompt

GROUP = "mlx_traces.tasks"  # of entry points
_KINDS = {  # the type that a field of a task must have, and its name in messages
    "columns": (tuple, "a tuple of names"),
    "graded_columns": (tuple, "a tuple of names"),
    "gold_columns": (tuple, "a tuple of names"),
    "extractors": (tuple, "a tuple of names"),
    "prompts": (dict, "a dict of prompts by name"),
    "default_prompt": (str, "the name of a prompt"),
    **dict.fromkeys(("parse", "load", "grade", "same"), (Callable, "a function")),
    **dict.fromkeys(("steps", "in_split"), (Callable | None, "a function")),
    "few_shot": (dict, "a dict of functions by name"),
    "sample_columns": (tuple, "a tuple of names"),
}


def names() -> list[str]:
    """Return the names of the tasks that installed packages add, without loading them."""
    return sorted({point.name for point in entry_points(group=GROUP)} - set(TASKS))


def exists(name: str) -> bool:
    """Whether a name refers to a plug-in: ``module:TASK``, or a task that an installed package adds."""
    return ":" in name or name in names()


def load(name: str) -> Task:
    """Import a plug-in and check it; wrap its functions, so that their errors become UserErrors.

    Args:
        name: ``module:TASK``, with a module in the working folder or on Python's path, or the name of an entry point in
            the group ``mlx_traces.tasks``. It becomes the task's name.

    Raises:
        UserError: if there is no such task; naming the file, if it cannot be imported or its task cannot be used.
    """
    if not exists(name):
        raise unknown("task", name, (*TASKS, *names(), "module:TASK"))
    value = name if ":" in name else next(point.value for point in entry_points(group=GROUP) if point.name == name)
    module, _, attribute = value.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UserError(f"task {value[:MOST_NAME]}: give a module and a name in it, as in my_task:TASK")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    file = module
    try:
        spec = find_spec(module)
        file = (spec and spec.origin) or module
        found = import_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"task {name[:MOST_NAME]}: no module {module!r} is here or installed") from None
        raise UserError(f"{file}: cannot be imported as a task ({_describe(error, file)})") from error
    file = getattr(found, "__file__", None) or file
    task = getattr(found, attribute, None)
    if not isinstance(task, Task):
        what = "there is none" if task is None else f"it is a {type(task).__name__}"
        raise UserError(f"{file}: {attribute or 'TASK'} must be a mlx_traces.tasks.Task; {what}")
    for field, (kind, what) in _KINDS.items():
        if not isinstance(value := getattr(task, field), kind):
            raise UserError(f"{file}: {attribute}.{field} must be {what}, not {str(value)[:60]!r}")
        if kind is tuple and not all(isinstance(each, str) for each in value):
            raise UserError(f"{file}: {attribute}.{field} must be {what}; {str(value)[:60]} has one that is no text")
    if not task.extractors:
        raise UserError(f"{file}: {attribute}.extractors must name one extractor or more")
    if wrong := [key for key, prompt in task.prompts.items() if not isinstance(prompt, Prompt) or prompt.name != key]:
        raise UserError(f"{file}: {attribute}.prompts: {wrong[0]!r} must be a Prompt of that name")
    if task.default_prompt not in task.styles:
        raise UserError(f"{file}: {attribute}.default_prompt: there is no prompt {task.default_prompt!r}")
    columns = dict.fromkeys((*task.sample_columns, *task.columns, *task.graded_columns))
    return replace(_guarded(task, file), name=name, source=_digest(file), sample_columns=tuple(columns))


def _digest(file: str) -> str:
    """Return a file's name and 12 hexadecimal digits of its content's hash; files that it imports are not included."""
    content = Path(file).read_bytes() if Path(file).is_file() else b""
    return f"{Path(file).name} {hashlib.sha256(content).hexdigest()[:12]}"


def _describe(error: BaseException, file: str) -> str:
    """Return an error's type, the first line of its message, and the last line of ``file`` in its traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return typed_line(error) + (f", line {lines[-1]}" if lines else "")


def _guarded(task: Task, file: str) -> Task:
    """Wrap the task's functions: for an exception or a wrong result they raise a UserError that names the file."""

    def call(function: Callable, name: str, about: str, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{file}: {name} failed{about} ({_describe(error, file)})") from error

    def wrong(name: str, about: str, must: str, value: Any) -> UserError:
        return UserError(f"{file}: {name} returned {str(value)[:60]!r}{about}; it must return {must}")

    def parse(row: dict[str, Any], where: str) -> Problem:
        problem = call(task.parse, "parse", f" on {where}", row, where)
        if not _is_problem(problem):
            raise wrong("parse", f" for {where}", "a Problem, its id and gold texts", problem)
        return problem

    def load(split: str, data: str | None, limit: int | None, seed: int) -> list[Problem]:
        problems = call(task.load, "load", "", split, data, limit, seed)
        if not isinstance(problems, list) or not problems or not all(map(_is_problem, problems)):
            raise wrong("load", f" for split {split!r}", "a list of Problems, one or more", problems)
        return problems

    def grade(problem: Problem, response: str) -> dict[str, Score]:
        scores = call(task.grade, "grade", f" on {problem.id}", problem, response)
        if not isinstance(scores, dict) or {*scores} != {*task.extractors} or not all(map(_is_score, scores.values())):
            must = f"a dict with a Score for each of {', '.join(task.extractors)}"
            raise wrong("grade", f" for {problem.id}", must, scores)
        return scores

    def same(extracted: str, gold: str, extractor: str) -> str:
        text = call(task.same, "same", f" on {extracted[:40]!r}", extracted, gold, extractor)
        if not isinstance(text, str):
            raise wrong("same", f" for {extracted[:40]!r}", "a text", text)
        return text

    def steps(problem: Problem, thought: str) -> dict[str, list[Span]]:
        found = call(task.steps, "steps", f" on {problem.id}", problem, thought)
        if not isinstance(found, dict):
            raise wrong("steps", f" for {problem.id}", "a dict with a list of (start, end, value) for each kind", found)
        return found

    def in_split(identity: str, split: str, data: str | None) -> bool:
        found = call(task.in_split, "in_split", f" on {identity}", identity, split, data)
        if not isinstance(found, bool):
            raise wrong("in_split", f" for {identity}", "True or False", found)
        return found

    def examples(style: str, function: Callable) -> Callable[..., Prompt]:
        def prompt(*arguments: Any) -> Prompt:
            made = call(function, "few_shot", f" for {style}", *arguments)
            if not isinstance(made, Prompt):
                raise wrong("few_shot", f" for {style}", "a Prompt", made)
            return made

        return prompt

    few_shot = {style: examples(style, function) for style, function in task.few_shot.items()}
    guarded = {"parse": parse, "load": load, "grade": grade, "same": same, "few_shot": few_shot}
    return replace(task, **guarded, steps=task.steps and steps, in_split=task.in_split and in_split)


def _is_problem(value: Any) -> bool:
    return isinstance(value, Problem) and isinstance(value.id, str) and isinstance(value.gold, str)


def _is_score(value: Any) -> bool:
    return isinstance(value, Score) and isinstance(value.verdict, str) and isinstance(value.extracted, str | None)
