"""Tasks: problems, the prompts that show them to a model, and the grader of the answers. No MLX."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_traces.errors import MOST_NAME, UserError, unknown
from mlx_traces.records import Problem, Score, Span
from mlx_traces.tasks.prompts import Prompt, load_prompt


@dataclass(frozen=True)
class Task:
    """A task as plain data and functions.

    A row needs the ``columns`` to become a prompt and the ``graded_columns`` to be graded; ``gold_columns`` hold the
    answer, and a prompt file may show them only with ``show_gold: true``.
    ``parse(row, where)`` makes a Problem of a row that has at least the graded columns; for a malformed row it raises a
    UserError that starts with ``where``. ``load(split, data, limit, seed)`` returns problems; ``data`` is a file, a hub
    data set, or None for the task's own source. ``grade(problem, response)`` judges a response by every extractor; the
    first in ``extractors`` is the headline. ``same(extracted, gold, extractor)`` returns the canonical form of an
    answer; answers with equal forms count as one in a majority vote. ``prompts`` has the built-in styles; ``few_shot``
    functions of (shots, seed, data, ids of problems to leave out) build prompts with worked examples.
    An evaluation stores the ``sample_columns`` with each sample, beside question and gold answer, so that it can be
    graded again. ``steps(problem, thought)``, if the task has it, checks single steps of a thought. It returns, by
    kind, spans (first character, one after the last, value); the value is 1 for a step that holds, else 0.
    ``in_split(id, split, data)``, of a task that generates problems, says whether the problem of an id belongs to a
    split, whichever of its problems are generated; the filter of traces asks it.
    ``source`` is a plug-in's file and the file's hash, filled in when it is loaded; else empty.
    """

    name: str
    columns: tuple[str, ...]
    graded_columns: tuple[str, ...]
    gold_columns: tuple[str, ...]
    extractors: tuple[str, ...]
    prompts: dict[str, Prompt]
    default_prompt: str
    parse: Callable[[dict[str, Any], str], Problem]
    load: Callable[[str, str | None, int | None, int], list[Problem]]
    grade: Callable[[Problem, str], dict[str, Score]]
    same: Callable[[str, str, str], str]
    few_shot: dict[str, Callable[[int, int, str | None, frozenset[str]], Prompt]] = field(default_factory=dict)
    sample_columns: tuple[str, ...] = ()
    steps: Callable[[Problem, str], dict[str, list[Span]]] | None = None
    in_split: Callable[[str, str, str | None], bool] | None = None
    source: str = ""

    def votes(self, answers: Iterable[str | None], gold: str, extractor: str) -> list[str | None]:
        """Return the canonical form (``same``) of each extracted answer; None where no answer was found."""
        return [answer and self.same(answer, gold, extractor) for answer in answers]

    @property
    def identity(self) -> dict[str, str]:
        """What a plug-in adds to a run's identity: its file's name and hash. Empty for a task of this package."""
        return {"task_file": self.source} if self.source else {}

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of all prompt styles."""
        return (*self.prompts, *self.few_shot)

    def prompt(self, name: str, examples: tuple[int, int, str | None, frozenset[str]] | None = None) -> Prompt:
        """Return a prompt style, or the prompt of ``FILE.yaml``; UserError if unknown.

        ``examples`` are the arguments of ``few_shot`` functions; without them their styles are unknown.
        """
        if name.endswith((".yaml", ".yml")):
            return load_prompt(Path(name), self.gold_columns)
        if examples and name in self.few_shot:
            return self.few_shot[name](*examples)
        if name not in self.prompts:
            raise unknown(f"prompt of {self.name}", name, (*(self.styles if examples else self.prompts), "FILE.yaml"))
        return self.prompts[name]


GRADER = 5  # version of the graders' rules; a run that stores none was graded by version 1
TASKS = ("gsm8k", "countdown", "math", "qa")
_LOADED: dict[str, Task] = {}


def get_task(name: str) -> Task:
    """Return a task that the user names: one of `TASKS`, ``module:TASK``, or one that an installed package adds.

    Raises:
        UserError: for an unknown name, with the choices; for a plug-in that cannot be used.
    """
    if name not in _LOADED:
        module = import_module(f"mlx_traces.tasks.{name if name in TASKS else 'plugins'}")
        _LOADED[name] = module.TASK if name in TASKS else module.load(name)
    return _LOADED[name]


def is_known(name: str) -> bool:
    """Whether a task is one of this package, or a plug-in that the user has named in this process."""
    return name in TASKS or name in _LOADED


def task_of(name: str, where: str) -> Task:
    """Return the task that a file names. A file never loads a plug-in: the user must have named it.

    Raises:
        UserError: starting with ``where``, if there is no such task, or it is a plug-in that was not named.
    """
    if not is_known(name) and import_module("mlx_traces.tasks.plugins").exists(name):
        name = name[:MOST_NAME]
        raise UserError(
            f"{where}: its task {name} is code that is not part of mlx-traces; to run it, pass --task {name}"
        )
    try:
        return get_task(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
