r"""MATH: competition problems with a formula as the answer (arXiv 2103.03874), MATH-500 and AIME among them. No MLX."""

import re
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import file_rows, is_file
from mlx_traces.records import Problem, Score
from mlx_traces.tasks import Task, qa
from mlx_traces.tasks.answers import last_answer_tag, last_boxed, marked
from mlx_traces.tasks.data import content_id, hub_rows, load_rows, split_slice, text_column
from mlx_traces.tasks.equality import compare, normal, number, require, squeezed
from mlx_traces.tasks.numbers import MAX_ANSWER, WINDOW, last_number, parse_number, without_scripts
from mlx_traces.tasks.thoughts import after_thought, answer_part

HUB = {"train": "DigitalLearningGmbH/MATH-lighteval", "test": "HuggingFaceH4/MATH-500"}
INSTEAD = 'pass --data FILE with one {"problem", "answer"} object per line'


_BOX = re.compile(r"\\boxed\s*\{")
_BARE_BOX = re.compile(r"\\boxed ([^$\s{}]+)\$")  # in two solutions of MATH's train split
_AROUND_FORMULAS = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_COMMAND = re.compile(r"(?<!\\)\\[A-Za-z]")
_BREAK = re.compile(  # between two formulas
    r"=|\\(?:approx|implies|iff|to|n|therefore|item|newline|q?quad|[A-Za-z]*(?:arrow|square))(?![A-Za-z])"
    r"|\\(?:begin|end) ?\{[a-z]*\*?\}"
)
_BARE = re.compile(  # spaces belong to a formula in braces, and next to a command or sign after a number
    r"(?:\\(?:cdot|times) |[^\s{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|(?<=[0-9)}]) (?:(?=\\)|[-+*/] (?=\S)))+"
)


def tolerant(response: str) -> str | None:
    r"""Find the answer after the thought: last \boxed{}, else <answer>, else the last formula or number.

    In a thought that is not closed only a closed <answer> counts.
    """
    part, thinking = after_thought(response)
    return last_answer_tag(part) if thinking else marked(part) or last_formula(part)


def last_formula(part: str) -> str | None:
    r"""Return the last formula in dollars, ``\(…\)`` or ``\[…\]``, or the number after it; else the last number.

    If that number is part of a bare formula, as in ``2\pi`` and ``\frac{\sqrt{3}}{2}``, the whole formula counts.

    A ``\boxed{84`` at the end is skipped, as it may be cut off. For a box that is not closed within its formula, the
    rest of the formula counts. An exponent or index in dollars of its own, as in ``cm$^2$``, is no formula.
    """
    text = without_scripts(part.replace(r"\$", " ").replace("$$", "$"))
    box = text.rfind(r"\boxed")
    text = text[:box] if box >= 0 and not any(closing in text[box:] for _, closing in _AROUND_FORMULAS) else text
    found = ""
    end = 0
    for opening, closing in _AROUND_FORMULAS:
        stop = text.rfind(closing)
        start = text.rfind(opening, 0, max(stop, 0)) + len(opening)
        formula = text[start:stop]
        if start >= len(opening) and stop > end and re.search(r"\w", formula) and "\n\n" not in formula:
            found, end = formula, stop
    return _bare_formula(text[end:]) or last_number(text[end:]) or (_BOX.split(found)[-1] if found else None)


def _bare_formula(text: str) -> str | None:
    """Return the formula around the last digit that has a LaTeX command and is not just a number; None without one."""
    end = max(map(text.rfind, "0123456789")) + 1
    start = _BREAK.split(text[max(0, end - WINDOW) : end])[-1]
    near = start + _BREAK.split(text[end : end + WINDOW])[0]
    formula = next((run[0] for run in _BARE.finditer(near) if run.start() < len(start) <= run.end()), "")
    formula = formula.strip("*`'\".,;:!?")
    return formula if _COMMAND.search(formula) and parse_number(formula) is None else None


def strict(response: str) -> str | None:
    r"""Return the last closed \boxed{} after the thought."""
    return last_boxed(answer_part(response))


def first_box(response: str) -> str | None:
    r"""Return the first closed \boxed{} of the whole response, thought included."""
    boxes = map(last_boxed, re.split(r"(?=\\boxed)", response)[1:])
    return next((content for content in boxes if content and content.strip()), None)


EXTRACTORS = {"tolerant": tolerant, "strict": strict, "first_box": first_box}


def grade(problem: Problem, response: str) -> dict[str, Score]:
    """Judge a response by every extractor; the verdicts are those of `equality.compare`, and ``no_answer``."""
    return {name: _judged(find(response), problem.gold) for name, find in EXTRACTORS.items()}


def _judged(extracted: str | None, gold: str) -> Score:
    if extracted is None or not extracted.strip():
        return Score("no_answer", None)
    return Score(compare(gold, extracted.strip()), extracted.strip()[:MAX_ANSWER])


def same(extracted: str, gold: str, extractor: str) -> str:
    """Return the canonical form of an answer: the gold answer if they are equal, else its value or normal spelling.

    An answer too long to compare is its own.
    """
    if len(extracted) > MAX_ANSWER:
        return extracted
    if compare(gold, extracted) == "correct":
        return gold
    value = number(extracted)
    return squeezed(normal(extracted)) if value is None else str(value)


def parse(row: dict[str, Any], where: str) -> Problem:
    r"""Make a Problem of a row with ``problem`` or ``question``, and ``answer`` or a ``solution`` with a box.

    The stratum is level and subject (``subject`` or ``type``), as far as the row has them. A row without a question can
    be graded but not become a prompt.
    """
    require()
    question = text_column(row, _question_column(row), where, default="")
    if "answer" in row:
        gold = text_column(row, "answer", where).strip()
    elif not (gold := last_boxed(_BARE_BOX.sub(r"\\boxed{\1}$", text_column(row, "solution", where)))):
        raise UserError(f"{where}: there is no 'answer', and 'solution' has no closed \\boxed{{}}")
    if len(gold) > MAX_ANSWER:
        raise UserError(f"{where}: 'answer' has more than {MAX_ANSWER:,} characters")
    level = str(row.get("level") or "").removeprefix("Level").strip()
    parts = (f"level {level}" if level else "", str(row.get("subject") or row.get("type") or ""))
    others = {key: value for key, value in row.items() if key not in ("problem", "question", "answer")}
    columns = {"question": question, **others, "answer": gold}
    return Problem(content_id("math", question or gold), columns, gold, "; ".join(filter(None, parts)))


def _question_column(row: dict[str, Any]) -> str:
    return "question" if "question" in row and "problem" not in row else "problem"


def _parse_asked(row: dict[str, Any], where: str) -> Problem:
    text_column(row, _question_column(row), where)
    return parse(row, where)


def load(split: str, data: str | None, limit: int | None, seed: int) -> list[Problem]:
    """Return problems of MATH-500 (``test``), MATH's train split, a file, or a hub set with the same columns.

    Args:
        split: ``train`` or ``test``, or a part such as ``test[:64]``; for a file only the part counts.
        data: a file, a hub data set ``owner/name`` such as one of AIME, or None for MATH's own.
        limit: size of a seeded sample of those rows, or None for all.
        seed: of the sample.
    """
    name, span = split_slice(split)
    source = source_of(split, data)
    rows = file_rows(Path(source)) if data and is_file(data) else hub_rows(source, None, name, INSTEAD)
    return load_rows(islice(rows, span.start or 0, span.stop), _parse_asked, limit, seed, source)


def source_of(split: str, data: str | None) -> str:
    """Return the file or hub data set that ``load`` reads; UserError for a split that MATH does not have."""
    name, _ = split_slice(split)
    if data is None and name not in HUB:
        raise unknown("split", name, HUB)
    return data or HUB[name]


TASK = Task(
    name="math",
    columns=("question", "answer"),
    graded_columns=("answer",),
    gold_columns=("answer", "solution"),
    extractors=tuple(EXTRACTORS),
    prompts=qa.PROMPTS,
    default_prompt="boxed",
    parse=parse,
    load=load,
    grade=grade,
    same=same,
    sample_columns=("subject", "type", "level"),
)
