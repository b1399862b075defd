"""Countdown: reach a target with + - * / and every given number exactly once. Checker and generator. No MLX."""

import ast
import hashlib
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import GENERATED, file_rows, is_file
from mlx_traces.records import Problem, Score, Span
from mlx_traces.tasks import Task
from mlx_traces.tasks.answers import last_answer_tag, last_boxed
from mlx_traces.tasks.data import hub_rows, load_rows, split_slice
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.tasks.thoughts import after_thought, answer_part

MAX_EXPRESSION = 256  # characters; no honest answer with a handful of numbers is longer
MAX_RESPONSE = 20_000  # characters after the thought that are searched for an answer, from the end
MAX_LOOSE = 2_000  # characters searched for an expression without tags or box, from the end
MAX_BOXED = 1_000  # characters searched for the brace that closes a \boxed{
MAX_FRACTIONS = 10  # nesting depth of LaTeX fractions
SPLITS = {
    "train": range(0, 80),
    "valid": range(80, 90),
    "test": range(90, 100),
}  # percent of all sets of numbers
DEFAULT_COUNT = 500
INSTEAD = (
    'pass --data FILE with one {"nums", "target"} object per line, --data 3-numbers or 3-4-numbers, or no --data, '
    "for generated problems"
)

HUB_SETS, HUB_SPLITS = ("/Countdown-Tasks-3to4", "/Countdown-Tasks-3to4-Unique"), ("train", "test")
TINYZERO_ROWS = 327_680, 1_024  # of the hub sets' one split: the first are train, the next test


# ---------------------------------------------------------------------------------------------- checker

_SPELLINGS = str.maketrans(
    {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full-width
    | dict.fromkeys("×·⋅∗•∙⨯⨉✕✖﹡", "*")
    | dict.fromkeys("÷∕⁄➗", "/")
    | dict.fromkeys("−–—﹣➖", "-")
    | dict.fromkeys("﹢➕", "+")
    | {"﹙": "(", "﹚": ")", "﹦": "="}
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")  # zero-width
)
_LATEX = re.compile(
    r"\\(?:(times|ast|bullet|cdot|div)|left|right|q?quad|space|(?:display|text)style|[bB]igg?[lr]?)(?![a-zA-Z])"
    r"|(\\[()\[\]]|[$`])|\\[,;:! ]"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_TIMES = re.compile(r"(?<=[0-9)]) ?[xX] ?(?=[-+]?[0-9(])")
_HEXADECIMAL = re.compile(r"(?<![0-9])0[xX]")
_WRAPPED = re.compile(
    r"\\(?:boxed|fbox|mbox|text|textbf|mathrm|mathbf)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
    r"|\*\*((?:(?!\*\*).)*)\*\*"
)
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_STATED = re.compile(r" ?-?[0-9]{1,40} ?")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def check(expression: str, nums: list[int], target: int) -> str:
    r"""Judge an expression; nothing is executed and the work is bounded by ``MAX_EXPRESSION``.

    Understood: + - * / parentheses and integers, their signs, ``×``, ``x``, ``÷``, ``−``, ``\times``, ``\div``, LaTeX
    fractions, full-width characters, ``\boxed{}``, ``\text{}`` or ``**`` around the expression, and a true ``= value``
    at its end. Arithmetic is exact.

    Returns:
        ``"correct"``, ``"not_an_expression"``, ``"wrong_numbers"`` (not every number exactly once) or
        ``"wrong_value"`` (also for a division by zero and for a false ``= value``).
    """
    if len(expression) > MAX_EXPRESSION:
        return "not_an_expression"
    parts = _sides(expression)
    if len(parts) > 2 or not all(map(_EXPRESSION.fullmatch, parts)):
        return "not_an_expression"
    if len(parts) == 2 and not _STATED.fullmatch(parts[1]):
        return "not_an_expression"
    try:
        tree = ast.parse(parts[0], mode="eval").body
        value = _value(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not_an_expression"
    if Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)) != Counter(nums):
        return "wrong_numbers"
    if value != target or (len(parts) == 2 and int(parts[1]) != value):
        return "wrong_value"
    return "correct"


def same(expression: str, gold: str, extractor: str) -> str:
    """Return an expression as the checker reads it, without spaces; one that is too long to check stays unchanged."""
    if len(expression) > MAX_EXPRESSION:
        return expression
    return "=".join(_sides(expression)).replace(" ", "")


def _sides(expression: str) -> list[str]:
    """Return an expression, and the value stated after ``=`` if there is one, in plain spelling."""
    return [_unwrapped(part) for part in _unwrapped(" ".join(_plain(expression).split())).split("=")]


def _plain(text: str) -> str:
    """Rewrite typographic and LaTeX spellings as the ASCII expression they mean."""
    text = re.sub(r"[^\S\n]+", " ", text.translate(_SPELLINGS))
    text = _LATEX.sub(
        lambda match: ("/" if match[1] == "div" else "*") if match[1] else "\n" if match[2] else " ", text
    )
    for _ in range(MAX_FRACTIONS):  # innermost first; each pass removes at least one
        text, rewrites = _FRACTION.subn(r"((\1\2)/(\3\4))", text)
        if not rewrites:
            break
    return text if _HEXADECIMAL.search(text) else _TIMES.sub("*", text)


def _unwrapped(text: str) -> str:
    r"""Strip ``\boxed{}``, ``\text{}``, ``**`` and a final dot from around an expression."""
    while match := _WRAPPED.fullmatch(text := text.strip().removesuffix(".").rstrip()):
        text = match[1] or match[2] or ""
    return text


def _value(node: ast.expr) -> Fraction | None:
    """Compute a parsed expression exactly, None after a division by zero; ValueError for any other syntax."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left), _value(node.right)
        if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
            return None
        return _OPERATIONS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        value = _value(node.operand)
        return None if value is None else _SIGNS[type(node.op)](value)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise ValueError("not arithmetic")


_RUN = re.compile(r"[0-9+\-*/() =]+")  # maximal, so the search is linear; it is trimmed afterwards
_BEFORE = re.compile(r"^(?:[+*/) ]|-(?![0-9(]))+")  # bullets and bold; a minus that touches its operand is a sign
_HAS_OPERATION = re.compile(r"[0-9)] ?[-+*/]")


def loose(response: str) -> str | None:
    r"""Find an answer, with or without tags: last <answer>, else last \boxed{}, else the last arithmetic expression."""
    if (found := tagged(response)) is not None:
        return found
    part = answer_part(response)[-MAX_RESPONSE:]
    if (boxed := last_boxed(part, MAX_BOXED)) is not None:
        return boxed
    for run in reversed(_RUN.findall(_plain(part[-MAX_LOOSE:]))):
        sides = [_BEFORE.sub("", side).rstrip("+-*/( ") for side in run.split("=")]
        if found := next((side for side in sides if _HAS_OPERATION.search(side)), None):
            stated = re.fullmatch("[-0-9]+", run.rpartition("=")[2].strip("* ")) if len(sides) > 1 else None
            return f"{found} = {stated[0]}" if stated else found
    return None


def tagged(response: str) -> str | None:
    """Find the last closed <answer>; one inside a finished thought is a draft and does not count."""
    return last_answer_tag(after_thought(response)[0][-MAX_RESPONSE:])


EXTRACTORS = {"answer": tagged, "tolerant": loose}


def grade(problem: Problem, response: str) -> dict[str, Score]:
    """Judge a response by every extractor; the verdicts are those of ``check``, and ``"no_answer"``."""
    nums, target = problem.columns["nums"], problem.columns["target"]
    extracted = {name: extract(response) for name, extract in EXTRACTORS.items()}
    verdicts = {text: check(text, nums, target) for text in {*extracted.values()} if text and text.strip()}
    return {
        name: Score(verdicts.get(text, "no_answer"), text and text.strip()[:MAX_EXPRESSION])
        for name, text in extracted.items()
    }


# ---------------------------------------------------------------------------------------------- steps of a thought

MAX_STEPS = 500  # equations, claims and line ends of a thought; later ones are not checked
MAX_WAYS = 16  # sets of given numbers remembered for each value that was made of them
_STEP = re.compile(
    r"""
    (?<![0-9.)=+*/-]) (?: (?<![-+*/=(][ ]) | (?<=\n[-*+][ ]) )  # not in the middle of an expression; after a bullet
    (?P<left> [0-9(] [0-9()+*/ -]{2,80}? ) [ ]?=[ ]? (?P<result> -?[0-9]{1,9} ) (?! [.]?[0-9] | [ ]?[-+*/(] )
    (?: ,?[ ] (?P<said> yes | no )\b )?
    | \bnear[ ] (?P<near> [0-9]{1,9} )\b
    | (?P<end> \n )
    """,
    re.VERBOSE,
)


def steps(problem: Problem, thought: str) -> dict[str, list[Span]]:
    """Check the steps of a thought: 1 for one that holds, 0 for one that does not.

    ``numbers`` are the left sides of equations. One holds if each of its numbers is given or the result of an earlier
    equation, and no given number is used twice in making them. ``claims`` are the words after an equation: a ``yes``
    holds if the equation is true, uses all numbers and makes the target; a ``no`` if no equation of its line does.
    ``near N`` is a claim too: it holds if true equations made N of all numbers, and nothing nearer to the target.
    ``numbers`` ignores whether an equation is true; the reward ``equations`` checks that.
    """
    nums, target = sorted(problem.columns["nums"]), problem.columns["target"]
    ways: dict[int, set[tuple[int, ...]]] = {number: {(number,)} for number in nums}
    numbers, claims, reached, hit = [], [], [], False
    for match in islice(_STEP.finditer(thought), MAX_STEPS):
        if match["end"]:
            hit = False
        elif match["near"]:
            nearest = min((abs(value - target) for value in reached), default=None)
            near = int(match["near"])
            claims.append((*match.span(), float(near in reached and abs(near - target) == nearest)))
        else:
            try:
                tree = ast.parse(match["left"].strip(), mode="eval").body
                value = _value(tree)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            if len(used) < 2:
                continue
            found, result = _made_of(used, ways, nums), int(match["result"])
            numbers.append((*match.span("left"), float(bool(found))))
            ways[result] = {*sorted(ways.get(result, set()) | found)[:MAX_WAYS]}
            if tuple(nums) in found and value == result:
                reached.append(result)
            hits = tuple(nums) in found and value == result == target
            hit |= hits
            if match["said"]:
                claims.append((*match.span("said"), float(hits if match["said"] == "yes" else not hit)))
    return {"numbers": numbers, "claims": claims}


def _made_of(used: list[int], ways: dict[int, set[tuple[int, ...]]], nums: list[int]) -> set[tuple[int, ...]]:
    """Return the sets of given numbers, as sorted tuples, that an expression may be made of; empty if there is none.

    Args:
        used: the numbers in the expression.
        ways: for each known value, the sets of given numbers that it may be made of.
        nums: the given numbers, sorted.
    """
    given, found = Counter(nums), {()}
    for number in used:
        joined = {tuple(sorted(a + b)) for a in found for b in ways.get(number, ())}
        found = {*sorted(way for way in joined if not Counter(way) - given)[:MAX_WAYS]}
    return found


# ---------------------------------------------------------------------------------------------- problems


def split_of(nums: list[int]) -> str:
    """Return the split that a set of numbers belongs to.

    It depends only on a hash of the sorted numbers, so no problem is in two splits, whatever the seed.
    """
    digest = hashlib.sha256(" ".join(map(str, sorted(nums))).encode()).digest()
    bucket = int.from_bytes(digest[:4]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def in_split(identity: str, split: str, data: str | None) -> bool:
    """Whether the problem of this id (`parse`) could be generated for a split, in any number and with any operands.

    False if ``data`` names problems that are not generated.
    """
    match = re.match(r"countdown-([0-9]+(?:-[0-9]+)*)-to-", identity)
    if not match or not generated_operands(data):
        return False
    return split_of([int(number) for number in match[1].split("-")]) == split_slice(split)[0]


def generate(
    split: str,
    count: int,
    seed: int,
    operands: tuple[int, int] = (3, 4),
    numbers: tuple[int, int] = (1, 50),
    target: tuple[int, int] = (10, 100),
) -> Iterator[tuple[list[int], int]]:
    """Yield ``count`` different solvable problems (nums, target) of a split.

    Numbers are uniform; the target is the value of a random expression over them, every intermediate result a
    non-negative integer. The i-th problem has ``operands[0] + i mod (operands[1] - operands[0] + 1)`` numbers, so
    every operand count has its equal share.

    Args:
        split: ``train``, ``valid`` or ``test``.
        count: how many problems.
        seed: the same seed gives the same problems.
        operands: fewest and most numbers of a problem.
        numbers: smallest and largest number.
        target: smallest and largest target.

    Raises:
        UserError: for an unknown split, an empty range, or if 20,000 draws find no further problem.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    for name, (low, high), least in (
        ("operands", operands, 2),
        ("numbers", numbers, 1),
        ("target", target, 1),
    ):
        if not least <= low <= high:
            raise UserError(f"countdown: {name} {low}-{high} is not a range from at least {least} upward")
    if operands[1] > 6:
        raise UserError(
            f"countdown: operands {operands[0]}-{operands[1]}: at most 6 numbers can be solved exhaustively"
        )
    draw, seen = random.Random(f"{seed} {split}"), set()
    for index in range(count):
        size = operands[0] + index % (operands[1] - operands[0] + 1)
        for _ in range(20_000):
            nums = [draw.randint(*numbers) for _ in range(size)]
            value = _random_value(nums, draw)
            key = (*sorted(nums), value)
            if target[0] <= value <= target[1] and key not in seen and split_of(nums) == split:
                seen.add(key)
                yield nums, value
                break
        else:
            raise UserError(
                f"countdown: only {index} different problems of split {split} found with these ranges, not {count}; "
                "ask for fewer or widen the numbers or the target"
            )


@lru_cache(8)
def _generated(split: str, count: int, seed: int, operands: tuple[int, int]) -> tuple[tuple[list[int], int], ...]:
    """Return the problems of `generate`, which a comparison loads for every model."""
    return tuple(generate(split, count, seed, operands))


def _random_value(nums: list[int], draw: random.Random) -> int:
    """Combine the numbers in random order by random operations that stay within the non-negative integers."""
    pool = list(nums)
    while len(pool) > 1:
        a, b = (pool.pop(draw.randrange(len(pool))) for _ in range(2))
        results = [a + b, a * b, abs(a - b)]
        if min(a, b) > 0 and max(a, b) % min(a, b) == 0:
            results.append(max(a, b) // min(a, b))
        pool.append(draw.choice(results))
    return pool[0]


def parse(row: dict[str, Any], where: str) -> Problem:
    """Make a Problem of a row with ``nums`` and ``target``; its stratum is the operand count."""
    nums, target = row.get("nums"), row.get("target")
    if isinstance(target, float) and target.is_integer():
        target = int(target)
    if not isinstance(nums, list | tuple) or not 1 <= len(nums) <= 16 or not all(map(_is_small_int, nums)):
        raise UserError(f"{where}: 'nums' must be a list of 1 to 16 integers, not {repr(nums)[:60]}")
    if min(nums) < 0:
        raise UserError(f"{where}: 'nums' must not be negative, since a sign would look like a minus: {nums}")
    if not _is_small_int(target):
        raise UserError(f"{where}: 'target' must be an integer, not {repr(target)[:60]}")
    columns = {**row, "nums": list(nums), "target": target}
    identity = f"countdown-{'-'.join(map(str, sorted(nums)))}-to-{target}"
    return Problem(identity, columns, str(target), f"{len(nums)} operands")


def _is_small_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 10**9


def generated_operands(data: str | None) -> tuple[int, int] | None:
    """Return fewest and most numbers of the generated problems that ``data`` names, None if it names other problems.

    ``3-numbers`` gives (3, 3); ``3-4-numbers`` and None give (3, 4).
    """
    if data is None:
        return 3, 4
    match = GENERATED.fullmatch(data)
    return match and (int(match[1]), int(match[2] or match[1]))


def load(split: str, data: str | None, limit: int | None, seed: int) -> list[Problem]:
    """Return problems: generated ones, a file's, or a hub set's (``Jiayi-Pan/Countdown-Tasks-3to4``, ``-Unique``).

    Without ``data``, or with ``3-numbers`` or the like, ``generate`` makes ``limit`` (None: 500) problems of the split
    from ``seed``, beginning at the slice's start; from a slice with an end, such as ``test[:64]``, a random sample of
    ``limit`` problems is drawn. ``hub_part`` divides the one split of those hub sets into train and test.
    """
    name, span = split_slice(split)
    if operands := generated_operands(data):
        stop = span.stop if span.stop is not None else (span.start or 0) + (limit or DEFAULT_COUNT)
        rows = ({"nums": nums, "target": target} for nums, target in _generated(name, stop, seed, operands))
        return load_rows((("generated", row) for row in islice(rows, span.start, None)), parse, limit, seed, split)
    if is_file(data):
        rows = islice(file_rows(Path(data), TASK.columns), span.start, span.stop)
    elif data.partition("@")[0].endswith(HUB_SETS):
        if name not in HUB_SPLITS:
            raise unknown("split", name, HUB_SPLITS)
        rows = hub_rows(data, None, "train", INSTEAD, lambda size: hub_part(name, size)[span])
    else:
        rows = hub_rows(data, None, name, INSTEAD, lambda size: range(size)[span])
    return load_rows(rows, parse, limit, seed, data)


def hub_part(split: str, size: int) -> range:
    """Return the rows of a split in a hub set of ``size`` rows.

    As in TinyZero the first 327,680 are train and the next 1,024 test. In a shorter set the last 1,024 (or the last
    half, if that is less) are test and all before them train.
    """
    train, test = TINYZERO_ROWS
    cut = min(train, size - min(test, size // 2))
    return range(cut) if split == "train" else range(cut, min(size, cut + test))


RULES = "Use each number exactly once, with + - * / and parentheses."
PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt(
            name="direct",
            user=f"Make {{target}} from the numbers {{nums}}. {RULES} Answer at once: <answer>expression</answer>.",
        ),
        Prompt(
            name="thinking",
            user=f"Make {{target}} from the numbers {{nums}}. {RULES} Think first: <think>trials</think>, "
            "then <answer>expression</answer>.",
        ),
        Prompt(
            name="tinyzero",
            system="You are a helpful assistant. You first thinks about the reasoning process in the mind and then "
            "provides the user with the answer.",
            user="Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic "
            "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. "
            "And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.",
            prefill="Let me solve this step by step.\n<think>",
        ),
    )
}

TASK = Task(
    name="countdown",
    columns=("nums", "target"),
    graded_columns=("nums", "target"),
    gold_columns=(),
    extractors=tuple(EXTRACTORS),
    prompts=PROMPTS,
    default_prompt="thinking",
    parse=parse,
    load=load,
    grade=grade,
    same=same,
    steps=steps,
    in_split=in_split,
)
