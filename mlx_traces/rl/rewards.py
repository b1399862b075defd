r"""Rewards of completions: the task's own grader, scores of the text, a judge, any Python function.

``correct`` is the task's verdict by the extractor, 0 or 1. ``correct_strict`` is 1 if that is also the verdict of the
answer alone, in the form that the prompt asks for: the last ``\boxed{}``, ``<answer>`` or number after ``####``. A
tolerant extractor finds an answer anywhere, so ``correct`` lets a model lose the form. ``{correct_strict: 1, correct:
0}`` reports both. ``gated`` is 1 for a correct completion in exactly the form of ``tags`` (``quality.format_score``),
else 0.

``flash`` and ``judge`` apply to right completions only and are None for the others, so a wrong answer earns nothing by
them. The last of ``correct``, ``correct_strict`` and ``gated`` that is a reward says which are right. ``flash``
compares the lengths of a problem's right completions: 1 for the shortest, 0 for the longest, linear in tokens between
them, None if all have the same length (after Sky-T1-Flash). Its weight must be below the sum of those three, so being
right always counts more than being short. ``judge`` is a model's grade by a rubric; without any of the three it grades
every completion.

``equations`` and ``steps`` also give a value, 1 or 0, to single steps of the thought (`records.Stepped`); the
completion's value is their mean, None without steps. ``equations`` checks every equation that the exact checker
understands; others are not steps. ``steps`` uses the steps that the task itself checks, if any.

The other rewards are scores of the text (`quality`), for wrong completions too.

Your own function is named ``module:function``; the module may be a file in the working folder. It is called with the
list of completions (the assistant's whole turns, as texts) and, by name, with those of these lists that it takes: every
column of the problems, ``prompts`` (what the model was shown), ``completion_ids`` and ``finish_reasons``. It returns a
number for each completion, or None if the reward does not apply; the reward is then left out of the completion's sum
and of the reward's mean. It may also return `records.Stepped` values, their spans in characters of these texts.

A completion to which no reward with a weight applies has no reward: it has no gradient, and the others of its group are
not compared with it. TRL does the same, except that it counts rewards of weight 0 as applying.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_traces.config import RLConfig, ScoreConfig
from mlx_traces.errors import UserError, choices, did_you_mean, typed_line
from mlx_traces.evaluation.completion import Completion
from mlx_traces.evaluation.evaluator import Plan, strictly_correct
from mlx_traces.models import loading
from mlx_traces.records import Problem, Stepped, Trace
from mlx_traces.tasks import Task
from mlx_traces.tasks.answers import forms_of
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.traces import equations, judge
from mlx_traces.traces.quality import text_scores, thought_span

TEXT = ("format", "structure", "faithfulness", "length", "repetition")
RIGHT = ("correct", "correct_strict", "gated")  # say whether a completion is right; the last one that is used decides
LARGEST = 1e18  # of a reward and of their sum; advantages square it in float32
FEWEST_JUDGED = 20  # completions; with fewer a judge's failures do not stop the run
STEPPED = ("equations", "steps")  # also give values to single steps
MAX_KINDS = 20  # kinds of a reward's steps in one batch of rollouts; each kind has metrics
BUILT_IN = (*RIGHT, *STEPPED, "flash", "judge", *TEXT)

Sample = tuple[Problem, Completion]
Parts = dict[str, float | None]
Value = float | Stepped | None


def load(
    weights: Mapping[str, float],
    columns: Sequence[str],
    config: RLConfig | None = None,
    prompt: Prompt | None = None,
    task: Task | None = None,
) -> dict[str, Callable]:
    """Import the functions among the rewards' names, load the judge, and check that the problems have what they need.

    Args:
        weights: by name, as in ``GRPOConfig.rewards``.
        columns: of the problems.
        config: says which model judges, and how.
        prompt: tells which form the answer should have.
        task: checks the steps that the reward ``steps`` needs.

    Raises:
        UserError: if all weights are 0; if a reward is unknown, cannot be imported, or needs an argument that does not
            exist; if ``flash`` does not weigh less than being right; if ``correct_strict`` is a reward and the prompt
            asks for no form; if the judge is missing or does not load; if ``steps`` is a reward and the task checks
            none; if there is a ``step_weight`` and no reward that gives values to steps.
    """
    if not any(weights.values()):
        raise UserError("rewards: none has a weight other than 0; set one, as in {correct: 1}")
    functions = {name: _imported(name) for name in weights if ":" in name}
    for name in weights:
        if name not in BUILT_IN and name not in functions:
            hint = did_you_mean(name, BUILT_IN)
            raise UserError(f"unknown reward {name!r}: choose {choices((*BUILT_IN, 'module:function'))}{hint}")
    known = (*columns, *_own_columns([]))
    for name, function in functions.items():
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty:
                continue
            if parameter.name not in known:
                raise UserError(f"reward {name}: there is no column {parameter.name!r}; there are {', '.join(known)}")
    if prompt and "correct_strict" in weights and not forms_of(prompt.text):
        raise UserError(
            f"reward correct_strict: the prompt {prompt.name} asks for no form (\\boxed{{}}, <answer> or ####) of the "
            "answer; choose another prompt, or correct"
        )
    if "steps" in weights and task and not task.steps:
        raise UserError(f"reward steps: the task {task.name} checks no steps of its own; equations checks arithmetic")
    if config and config.step_weight and not functions and not set(weights) & set(STEPPED):
        raise UserError(
            "step_weight: no reward gives values to steps; add equations, as in {correct: 1, equations: 0}, or leave "
            "step_weight out"
        )
    right = sum(weights.get(name, 0) for name in RIGHT)
    if "flash" in weights and not 0 <= weights["flash"] < right:
        raise UserError(
            f"reward flash: its weight {weights['flash']:g} must be 0 or more and below that of {' and '.join(RIGHT)}, "
            f"{right:g}; as in {{gated: 1, flash: 0.2}}"
        )
    named = config.judge if config else None
    if ("judge" in weights) != bool(named):
        raise UserError(
            f"judge: {named} is set, but judge is not among the rewards; add it, as in {{correct: 1, judge: 0.5}}"
            if named
            else "reward judge: no model is named; set judge: MODEL"
        )
    return functions | ({"judge": _judge_of(config)} if named else {})


def sources(name: str, function: Callable) -> list[Path]:
    """Return the files of a user's function: that of the module in its ``name``, and that of the one that defines it.

    Files that these import are not included.
    """
    modules = dict.fromkeys((name.partition(":")[0], getattr(inspect.unwrap(function), "__module__", "")))
    files = [getattr(sys.modules.get(module), "__file__", None) for module in modules]
    return [Path(file) for file in files if file]


def score(
    planned: Plan, samples: Sequence[Sample], functions: Mapping[str, Callable], weights: Mapping[str, float], tags: str
) -> list[dict[str, Value]]:
    """Return every reward of each completion, by name and in the order of ``weights``; None where one does not apply.

    ``length`` is 1 for a short completion and 0 at the token limit; the module's docstring describes the others.

    Raises:
        UserError: naming the function, if one fails or does not return a number or None for each completion; if more
            than the share ``judge_failures`` of the judge's replies cannot be read; if a reward's steps have more than
            `MAX_KINDS` kinds.
    """
    settings = ScoreConfig(tags=tags, length_limit=planned.config.longest)
    known: dict[str, list[Value]] = {}
    if set(weights) & {*TEXT, "gated"}:
        texts = [_text_scores(planned, *sample, settings) for sample in samples]
        known = {name: [text[name] for text in texts] for name in TEXT}
    if set(weights) & {*RIGHT}:
        grades = (planned.task.grade(problem, completion.whole) for problem, completion in samples)
        known["correct"] = [float(grade[planned.extractor].correct) for grade in grades]
    if "gated" in weights:
        known["gated"] = [c * form for c, form in zip(known["correct"], known["format"], strict=True)]
    if "correct_strict" in weights:
        strict = [strictly_correct(planned, problem, completion.whole) for problem, completion in samples]
        known["correct_strict"] = list(map(float, strict))
    # flash and judge apply to right completions only
    chosen = next((known[name] for name in reversed(RIGHT) if name in weights), [1.0] * len(samples))
    right = [index for index, value in enumerate(chosen) if value == 1]
    for name in set(weights) & set(STEPPED):
        known[name] = [_checked_steps(planned, *sample, name, tags) for sample in samples]
    parts: list[dict[str, Value]] = [{} for _ in samples]
    for name in weights:
        if name == "judge":
            values = _placed(functions[name](planned, [samples[i] for i in right]), right, len(samples))
        elif name == "flash":
            values = _placed(_flash([samples[i] for i in right]), right, len(samples))
        else:
            values = _call(name, functions[name], samples) if name in functions else known[name]
        kinds = {kind for value in values if isinstance(value, Stepped) for kind in value.steps}
        if len(kinds) > MAX_KINDS:
            raise UserError(f"reward {name}: its steps have {len(kinds)} kinds, more than {MAX_KINDS}; use fewer names")
        for part, value in zip(parts, values, strict=True):
            part[name] = value
    return parts


def apart(parts: Mapping[str, Value]) -> tuple[Parts, list[list[Any]]]:
    """Split a completion's rewards into plain values, and steps as rows of kind, start, end and value.

    Raises:
        UserError: if two rewards give values to steps of one kind.
    """
    owners: dict[str, str] = {}
    rows = []
    for name, part in parts.items():
        for kind, spans in part.steps.items() if isinstance(part, Stepped) else ():
            if owners.setdefault(kind, name) != name:
                raise UserError(f"reward {name}: reward {owners[kind]} has steps of the kind {kind!r} too; rename one")
            rows += [[kind, *span] for span in spans]
    return {name: part.value if isinstance(part, Stepped) else part for name, part in parts.items()}, rows


def _checked_steps(planned: Plan, problem: Problem, completion: Completion, name: str, tags: str) -> Stepped:
    """Return ``equations`` or ``steps`` of a completion's thought."""
    text = completion.opened + completion.text
    if (span := thought_span(text, tags, completion.own_tags)) is None:
        return Stepped(None)
    begin, thought = span[0], text[slice(*span)]
    if name == "equations":
        found = {name: [(start, end, float(true)) for start, end, true in equations.checked(thought)]}
    else:
        of_task = Stepped(None, planned.task.steps(problem, thought))
        found = _in_order(name, of_task, len(thought)).steps
    found = {kind: [(begin + start, begin + end, value) for start, end, value in own] for kind, own in found.items()}
    values = [value for own in found.values() for *_, value in own]
    return Stepped(sum(values) / len(values) if values else None, found)


def _placed(values: Sequence[float | None], places: Sequence[int], count: int) -> list[float | None]:
    """Return a list of ``count`` with the values at their places and None elsewhere."""
    found = dict(zip(places, values, strict=True))
    return [found.get(index) for index in range(count)]


def _flash(samples: Sequence[Sample]) -> list[float | None]:
    """Return ``flash`` of each completion; see the module's docstring."""
    lengths = [len(completion.rollout.completion_ids) for _, completion in samples]
    of_problem: dict[str, list[int]] = {}
    for (problem, _), length in zip(samples, lengths, strict=True):
        of_problem.setdefault(problem.id, []).append(length)
    ends = {name: (min(own), max(own)) for name, own in of_problem.items()}
    values = []
    for (problem, _), length in zip(samples, lengths, strict=True):
        low, high = ends[problem.id]
        values.append((high - length) / (high - low) if high > low else None)
    return values


def _judge_of(config: RLConfig) -> Callable[[Plan, Sequence[Sample]], list[float | None]]:
    """Load the judge; return the function that grades completions.

    Its failures are counted over the whole run and checked from `FEWEST_JUDGED` completions on.
    """
    loaded = loading.load(config.judge, **config.load_arguments())
    failed = total = 0

    def grades(planned: Plan, samples: Sequence[Sample]) -> list[float | None]:
        nonlocal failed, total
        problems = [problem for problem, _ in samples]
        traces = [
            Trace(problem.id, tuple(planned.prompt.messages(problem)), completion.opened + completion.rollout.text)
            for problem, completion in samples
        ]
        said = judge.judgements(loaded, traces, problems, config)
        found = [judge.parse_judgement(reply or "") for reply in said]
        failed, total = failed + found.count(None), total + len(found)
        if total >= FEWEST_JUDGED:
            judge.refuse_failures(loaded, failed, total, said, config)
        return found

    grades.identity = judge.identity_of(loaded)
    return grades


def total(parts: Parts, weights: Mapping[str, float]) -> float | None:
    """Return the weighted sum of the rewards that apply; None where none with a weight does.

    Raises:
        UserError: naming the greatest part, if the sum is beyond `LARGEST`.
    """
    products = {name: weights[name] * value for name, value in parts.items() if value is not None}
    if not any(weights[name] for name in products):
        return None
    found = sum(products.values())
    if not abs(found) <= LARGEST:
        name = max(products, key=lambda name: abs(products[name]))
        raise UserError(f"the weighted rewards add up to {found:g}, beyond {LARGEST:g}; lower the weight of {name}")
    return found


def _text_scores(planned: Plan, problem: Problem, completion: Completion, settings: ScoreConfig) -> Parts:
    rollout, asked = completion.rollout, planned.prompt.messages(problem)[-1]["content"]
    return text_scores(completion.whole, rollout.finish_reason, len(rollout.completion_ids), settings, asked)


def _own_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    return {
        "prompts": [completion.prompt for _, completion in samples],
        "completion_ids": [list(completion.rollout.completion_ids) for _, completion in samples],
        "finish_reasons": [completion.rollout.finish_reason for _, completion in samples],
    }


def _call(name: str, function: Callable, samples: Sequence[Sample]) -> list[Value]:
    """Call a user's function and check what it returns."""
    columns = dict.fromkeys(column for problem, _ in samples for column in problem.columns)
    lists = {column: [problem.columns.get(column) for problem, _ in samples] for column in columns}
    lists |= _own_columns(samples)
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        taken = {parameter.name for parameter in list(parameters)[1:]}
        lists = {column: values for column, values in lists.items() if column in taken}
    texts = [completion.opened + completion.rollout.text for _, completion in samples]
    try:
        values = function(texts, **lists)
        values = list(values) if inspect.isgenerator(values) else values
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name} failed ({typed_line(error)})") from error
    try:
        values = list(values)
    except TypeError:
        said = "None" if values is None else f"a {type(values).__name__}"
        raise UserError(f"reward {name} returned {said}, not a list of a number or None for each completion") from None
    if len(values) != len(samples):
        raise UserError(f"reward {name} returned {len(values)} values for {len(samples)} completions")
    return [_value(name, value, len(text)) for value, text in zip(values, texts, strict=True)]


def _value(name: str, value: Any, length: int) -> Value:
    if isinstance(value, Stepped):
        return _in_order(name, value, length)
    return None if value is None else _number(name, value)


def _in_order(name: str, stepped: Stepped, length: int) -> Stepped:
    """Check a reward's steps in a text of ``length`` characters, and sort each kind's steps by position.

    Raises:
        UserError: naming the reward, for a span that is not (start, end, value), is empty, is not within the
            completion or overlaps another one of its kind; for a value that is not a number up to `LARGEST`; for a
            kind's name of more than 40 characters, or with others than letters, digits, ``_`` and ``-``.
    """
    if not isinstance(stepped.steps, Mapping):
        raise UserError(f"reward {name}: its steps are a {type(stepped.steps).__name__}, not a dict of spans by kind")
    found = {}
    for kind, spans in stepped.steps.items():
        if not isinstance(kind, str) or not kind.replace("_", "").replace("-", "").isalnum() or len(kind) > 40:
            raise UserError(f"reward {name}: {str(kind)[:40]!r} is not the name of a kind of steps; use letters and _")
        if not isinstance(spans, Sequence):
            what = f"an {type(spans).__name__}" if type(spans) is int else f"a {type(spans).__name__}"
            raise UserError(f"reward {name}: the steps of {kind!r} are {what}, not a list of spans")
        own = []
        for span in spans:
            try:
                start, end, value = span
                start, end = start.__index__(), end.__index__()
                if value is None:  # a whole completion may have no value; a step must
                    raise TypeError
            except (TypeError, ValueError, AttributeError):
                raise UserError(f"reward {name}: {str(span)[:60]} of {kind!r} is not (start, end, value)") from None
            if not 0 <= start < end <= length:
                where = f"({start}, {end}) of {kind!r}"
                raise UserError(f"reward {name}: step {where} is not within the completion's {length} characters")
            own.append((start, end, _number(name, value)))
        own.sort()
        for one, other in pairwise(own):
            if one[1] > other[0]:
                raise UserError(f"reward {name}: steps {one[:2]} and {other[:2]} of {kind!r} overlap")
        found[kind] = own
    return Stepped(None if stepped.value is None else _number(name, stepped.value), found)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise UserError(f"reward {name} returned {str(value)[:40]!r}, not a finite number or None")
    if abs(number) > LARGEST:
        raise UserError(f"reward {name} returned {number:g}, beyond {LARGEST:g}; scale it down")
    return number


def _imported(name: str) -> Callable:
    """Import ``module:function``."""
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(import_module(module), attribute, None)
    except Exception as error:  # a user's module may raise anything
        raise UserError(f"reward {name}: {module} cannot be imported ({typed_line(error)})") from error
    if not callable(found):
        raise UserError(f"reward {name}: {module} has no function {attribute!r}")
    try:
        if not inspect.signature(found).parameters:
            raise UserError(f"reward {name}: takes no argument; the first is the list of completions")
    except ValueError:
        raise UserError(f"reward {name}: its arguments cannot be seen; wrap it in a Python function") from None
    return found
