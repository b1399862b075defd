"""Exact solver for Countdown: the number of solutions, and a search written as a thinking trace. No MLX."""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations

from mlx_traces.tasks import countdown
from mlx_traces.tasks.prompts import Message, Prompt

TRACE_LIMIT = 200  # the largest intermediate result a trace may show


def solutions(nums: Sequence[int], target: int) -> int:
    """Count the ways to reach ``target`` with every number once, by exact exhaustive search.

    A way is a tree of operations on the positions of ``nums``; a + b and b + a are one way, a - b and b - a are two.
    The fewer ways, the harder the problem; 0 means there is none.
    """
    everything = (1 << len(nums)) - 1
    values: dict[int, Counter] = {1 << i: Counter({Fraction(n): 1}) for i, n in enumerate(nums)}
    for size in range(2, len(nums) + 1):
        for chosen in combinations(range(len(nums)), size):
            whole, reached = sum(1 << i for i in chosen), Counter()
            part = (whole - 1) & whole
            while part > whole ^ part:  # every split of the set into two, once
                for a, ways_a in values[part].items():
                    for b, ways_b in values[whole ^ part].items():
                        quotients = [x / y for x, y in ((a, b), (b, a)) if y]
                        for value in (a + b, a * b, a - b, b - a, *quotients):
                            if whole != everything or value == target:
                                reached[value] += ways_a * ways_b
                part = (part - 1) & whole
            values[whole] = reached
    return values[everything][Fraction(target)]


Term = tuple[int, str]  # a value and the expression that made it


def search_trace(nums: Sequence[int], target: int) -> tuple[str, str] | None:
    """Write a systematic search for ``target`` as (thought, expression).

    First steps are tried in a fixed order (pairs by position; + - * /, the larger number first). Each line ends with
    its result: ``49 + 25 = 74, 22 no`` if the two numbers left cannot reach the target, else ``49 - 25 = 24, 24 + 22 =
    46 yes``. With more than three numbers, the trace starts with the first steps that lead to three (``12 + 7 = 19
    leaves 30, 4, 19``). A small model can learn to predict a fixed order, but not random wrong attempts.

    Returns:
        ``None`` if no solution stays within integers from 0 to ``TRACE_LIMIT``.
    """
    lines: list[str] = []
    expression = _search([(n, str(n)) for n in nums], target, lines)
    return None if expression is None else ("\n".join(lines), expression)


def _search(terms: list[Term], target: int, lines: list[str]) -> str | None:
    """Append the lines of a successful search to ``lines`` and return the expression, or None."""
    if len(terms) == 2:
        hit = next((step for step in _steps(*terms) if step[0][0] == target), None)
        if hit is not None:
            lines.append(f"{hit[1]} yes")
        return hit and hit[0][1][1:-1]  # without the outermost parentheses
    tried: list[str] = []
    for i, j in combinations(range(len(terms)), 2):
        rest = [other for k, other in enumerate(terms) if k not in (i, j)]
        for term, equation in _steps(terms[i], terms[j]):
            inner: list[str] = []
            left = [term, *rest] if len(rest) == 1 else [*rest, term]
            expression = _search(left, target, inner)
            if len(rest) == 1:
                tried.append(f"{equation}, {inner[0] if inner else f'{rest[0][0]} no'}")
            if expression is not None:
                opening = f"{equation} leaves {', '.join(str(value) for value, _ in left)}"
                lines += tried if len(rest) == 1 else [opening, *inner]
                return expression
    return None


def _steps(a: Term, b: Term) -> Iterator[tuple[Term, str]]:
    """Yield (new term, ``x + y = z``) for + - * /, the larger number first, within 0 to ``TRACE_LIMIT``."""
    (x, x_text), (y, y_text) = (a, b) if a[0] >= b[0] else (b, a)
    for sign, value in (("+", x + y), ("-", x - y), ("*", x * y), ("/", x // y if y and x % y == 0 else -1)):
        if 0 <= value <= TRACE_LIMIT:
            yield (value, f"({x_text} {sign} {y_text})"), f"{x} {sign} {y} = {value}"


def solved(prompt: Prompt, nums: list[int], target: int) -> tuple[list[Message], str] | None:
    """Return (messages, the solver's completion) of a Countdown problem, or None where no short trace exists.

    The completion has a thought if the prompt mentions ``<think>``; it starts with the prompt's prefill.
    """
    if (found := search_trace(nums, target)) is None:
        return None
    thought, expression = found
    thinks = "<think>" in prompt.user + prompt.prefill
    opening = f"{opening_line(prompt)}{thought}\n</think>\n" if thinks else prompt.prefill
    problem = countdown.parse({"nums": nums, "target": target}, "solver")
    return prompt.messages(problem), f"{opening}<answer>{expression}</answer>"


def opening_line(prompt: Prompt) -> str:
    """Return the first line of a completion with a thought; a prefill may already hold the opening tag."""
    return f"{prompt.prefill.removesuffix('<think>')}<think>\n"
