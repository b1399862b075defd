"""A user's own questions with short answers, graded as numbers or as exact text. No MLX."""

import csv
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.readers import Row, file_rows, is_file, listed, opened, plain
from mlx_traces.records import Problem, Score
from mlx_traces.tasks import Task, gsm8k
from mlx_traces.tasks.answers import (
    judge_number,
    marked,
    same_number,
    tolerant,
)
from mlx_traces.tasks.data import content_id, hub_rows, load_rows, split_slice, text_column
from mlx_traces.tasks.numbers import MAX_ANSWER, SPELLINGS, last_number, parse_number
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.tasks.thoughts import answer_part

MOST_FIELD = 10_000_000  # characters of a field in a .csv
INSTEAD = 'pass --data FILE with one {"question", "answer"} object per line, or a .csv with these columns'

_LEAD = re.compile(r"(?:(?:so|thus|therefore),? )?(?:the )?(?:final |correct )?answer(?: is)?(?: ?:|(?<=is)(?!\w)) ?")
_COMMA = re.compile(r",(?!(?<=[0-9],)[0-9]{3}(?![0-9]))")  # not a thousands separator
_SIZES = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)\\[!()\[\]]|(?<=[0-9])\\,(?=[0-9])")
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|(?<=\w)~(?=\w)")
_ALIKE = SPELLINGS | str.maketrans("‘’—", "''-")
_AROUND = " \t\"'`“”*_$.,;:!?。、「」『』《》"
_MATHS = re.compile(r"[0-9\\]")
_BRACKETS = "()[]"  # not stripped from a tuple or an interval


def same_text(text: str) -> str:
    r"""Return the canonical form of a text answer: answers with equal forms are equal.

    It ignores case, white space, surrounding quotes and punctuation, the form of apostrophes, dashes and full-width
    characters, ``\text{}``, a leading ``####`` and "The answer is", and the space after the commas of a list: ``1,-2``
    is ``1, -2``, but ``1,234`` is a number and not ``1, 234``. In LaTeX it ignores spaces, the sizes of brackets and
    fractions, and the dollars or brackets around formulas.
    """
    text = unicodedata.normalize("NFC", text).translate(_ALIKE)
    text = re.sub(r"\\(?:text|textbf|mathrm) ?\{([^{}]*)\}", r"\1", text)
    text = _SIZES.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")) if "\\" in text else text
    text = " ".join(_COMMA.sub(", ", _SPACE.sub(" ", text).casefold()).split()).lstrip("# ")
    for _ in range(2):  # the lead may be in quotes, and so may the answer after it
        text = text.strip(_AROUND if "," in text and _MATHS.search(text) else _AROUND + _BRACKETS) or text
        text = text[match.end() :] or text if (match := _LEAD.match(text)) else text
    return "".join(text.split()) if "\\" in text else text


def find_text(response: str) -> str | None:
    r"""Find a text answer after the thought: last \boxed{}, else <answer>, else the last line with text.

    That line may start with ``####``. In a thought that never ends, only a closed <answer> counts.
    """
    part = answer_part(response)
    if not part.strip():
        return tolerant(response)
    lines = part.strip().split("\n")
    return marked(part) or next((line for line in reversed(lines) if re.search(r"\w", line)), lines[-1]).strip()


def grade(problem: Problem, response: str) -> dict[str, Score]:
    """Judge a response: ``exact`` compares text (`same_text`); the others compare values if the gold is a number."""
    exact = judge_text(find_text(response), problem.gold)
    gold = gold_number(problem.gold)
    if gold is None:
        return {
            "tolerant": exact,
            "exact": exact,
            "last_number": judge_text(last_number(response), problem.gold),
        }
    return {
        "tolerant": judge_number(tolerant(response), gold),
        "exact": exact,
        "last_number": judge_number(last_number(response), gold),
    }


def same(extracted: str, gold: str, extractor: str) -> str:
    """Return the canonical form of an answer: its value if the extractor compares values, else `same_text`."""
    by_value = extractor != "exact" and gold_number(gold) is not None and parse_number(extracted) is not None
    return same_number(extracted) if by_value else same_text(extracted)


def gold_number(gold: str) -> Fraction | None:
    """Return the value of a gold answer that is a number without words; ``Apollo 11`` is a text."""
    return parse_number(gold, words=False)


def judge_text(extracted: str | None, gold: str) -> Score:
    """Compare as text (`same_text`): ``correct``, ``wrong_value`` or ``no_answer``."""
    if extracted is None:
        return Score("no_answer", None)
    return Score("correct" if same_text(extracted) == same_text(gold) else "wrong_value", extracted[:MAX_ANSWER])


def parse(row: dict[str, Any], where: str) -> Problem:
    """Make a Problem of a row; a row without a ``question`` can be graded but not become a prompt."""
    question, answer = (
        text_column(row, "question", where, default=""),
        text_column(row, "answer", where).strip(),
    )
    return Problem(content_id("qa", question or answer), dict(row), answer)


def load(split: str, data: str | None, limit: int | None, seed: int) -> list[Problem]:
    """Return the problems of a file or, if ``data`` is not a file, of the hub data set ``owner/name``.

    For a file only the slice of ``split`` counts, as in ``test[:64]``.

    Raises:
        UserError: without data, for a malformed row, or as ``load_rows`` does.
    """
    if data is None:
        raise UserError(f"task qa has no questions of its own; {INSTEAD}")
    name, span = split_slice(split)
    path = Path(data)
    if not is_file(data):
        rows = hub_rows(data, None, name, INSTEAD)
    else:
        rows = read_csv(path) if path.suffix.lower() == ".csv" else file_rows(path, TASK.columns)
    return load_rows(islice(rows, span.start or 0, span.stop), parse, limit, seed, data)


def read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (``file:line``, row) of a .csv whose header has the task's columns.

    Raises:
        UserError: if it cannot be read, or a column is missing from the header or a row, or twice in the header.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MOST_FIELD))
    with opened(path, newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            header = list(reader.fieldnames or ())
            for column in TASK.columns:
                if header.count(column) != 1:
                    fault = "is there twice; rename one" if column in header else "is missing"
                    raise UserError(f"{path}:1: {column!r} {fault}; the header has {listed(header)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: this row does not have the header's {len(header)} columns")
                yield where, plain(row)
        except csv.Error as error:
            long = f"a field of more than {MOST_FIELD:,} characters; perhaps a quotation mark is not closed"
            raise UserError(
                f"{path}:{reader.line_num}: {long if 'field limit' in str(error) else f'not a .csv ({error})'}"
            ) from None


PROMPTS = {
    "plain": gsm8k.PROMPTS["plain"],
    "boxed": gsm8k.PROMPTS["boxed"],
    "thinking": Prompt(
        name="thinking",
        user="{question}\n\nThink first, between <think> and </think>. "
        "Then give the answer alone: <answer>answer</answer>.",
    ),
}

TASK = Task(
    name="qa",
    columns=("question", "answer"),
    graded_columns=("answer",),
    gold_columns=("answer",),
    extractors=("tolerant", "exact", "last_number"),
    prompts=PROMPTS,
    default_prompt="plain",
    parse=parse,
    load=load,
    grade=grade,
    same=same,
)
