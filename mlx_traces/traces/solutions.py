"""Make traces from the worked solutions of GSM8K and MATH, and from a solver's searches for Countdown."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_traces.errors import unknown
from mlx_traces.readers import is_file
from mlx_traces.records import Problem, Trace
from mlx_traces.tasks import countdown, gsm8k, math
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.tasks.solver import impatience, opening_line, solved
from mlx_traces.traces.importing import count_skipped

GSM8K_STYLES = {"think": "thinking", "plain": "hash", "boxed": "boxed"}  # a style and the prompt that asks for it
MATH_STYLES = {"think": "thinking", "boxed": "boxed"}
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FIGURE = re.compile(r"\[asy\].*?\[/asy\]\s*", re.DOTALL)


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
        split: of the data, as in the task's ``load``.
        data: a file or hub data set; None for the task's own.
        limit: size of a seeded sample; None for all.
        seed: of the sample.
        prompt: the prompt style; None for the one that asks for the style.
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
            count_skipped(skipped, "no worked solution")
            continue
        if style == "think":
            completion = f"{opening_line(prompt)}{solution}\n</think>\n<answer>{problem.gold}</answer>"
        else:
            end = f"#### {problem.gold}" if style == "plain" else f"\\boxed{{{problem.gold}}}"
            completion = f"{prompt.prefill}{solution}\n{end}"
        yield _task_trace("gsm8k", problem, prompt, completion, source)


def math_traces(
    split: str,
    data: str | None,
    limit: int | None,
    seed: int,
    prompt: Prompt | None = None,
    style: str = "think",
    skipped: Counter | None = None,
) -> Iterator[Trace]:
    r"""Yield MATH's solutions as traces, without the code of their figures ``[asy]…[/asy]``.

    Arguments as for ``gsm8k_traces``. ``style`` is ``think`` (solution as thought, then ``<answer>p - q</answer>``) or
    ``boxed`` (as in MATH: the answer is in a box at the solution's end). A solution whose answer differs from the row's
    is skipped.
    """
    if style not in MATH_STYLES:
        raise unknown("style", style, MATH_STYLES)
    prompt = prompt or math.TASK.prompts[MATH_STYLES[style]]
    source = Path(data).name if data and is_file(data) else f"{math.source_of(split, data)} {split}"
    for problem in math.load(split, data, limit, seed):
        solution = _FIGURE.sub("", str(problem.columns.get("solution") or "")).strip()
        if not math.grade(problem, solution)["strict"].correct:
            count_skipped(skipped, "another answer in its solution" if solution else "no worked solution")
            continue
        if style == "think":
            completion = f"{opening_line(prompt)}{solution}\n</think>\n<answer>{problem.gold}</answer>"
        else:
            completion = f"{prompt.prefill}{solution}"
        yield _task_trace("math", problem, prompt, completion, source)


def countdown_traces(
    count: int,
    split: str,
    seed: int,
    operands: tuple[int, int] = (3, 4),
    prompts: Sequence[Prompt] = (countdown.PROMPTS["thinking"],),
    skipped: Counter | None = None,
    give_up: float = 0.0,
    daunting: float = 0.0,
) -> Iterator[Trace]:
    """Yield the solver's traces of ``count`` generated problems, one for every prompt.

    Args:
        count: number of problems; a problem without a short trace gives none.
        split: as in ``countdown.generate``.
        seed: the same seed gives the same problems.
        operands: fewest and most numbers of a problem.
        prompts: one or more, each of which gives a trace of every problem.
        skipped: gets the number of problems without a short trace.
        give_up: probability that the solver gives up after a ``no``; it then answers with its nearest value.
        daunting: target at which it gives up after a ``no`` with probability 0.5; see `solver.impatience`.
    """
    gives_up = impatience(give_up, daunting, random.Random(f"{seed} give up"))
    for nums, target in countdown.generate(split, count, seed, operands):
        problem = countdown.parse({"nums": nums, "target": target}, "solver")
        for prompt in prompts:
            if (found := solved(prompt, nums, target, gives_up)) is None:
                count_skipped(skipped, "no short trace")
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
