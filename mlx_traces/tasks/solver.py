"""Exact solver for Countdown: count the solutions, and write a search as a thinking trace. No MLX."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations, islice

from mlx_traces.tasks import countdown
from mlx_traces.tasks.prompts import Message, Prompt

TRACE_LIMIT = 200  # the largest intermediate result a trace may show
TRACE_LINES = 32  # the most lines of a trace; a longer search gives no trace


def solutions(nums: Sequence[int], target: int) -> int:
    """Count the ways to reach ``target`` with every number once, by exact exhaustive search.

    A way is a tree of operations on the positions of ``nums``; a + b and b + a are one way, a - b and b - a are two.
    A problem with fewer ways is harder; with 0 it has no solution.
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


def search_trace(
    nums: Sequence[int], target: int, gives_up: Callable[[int], bool] | None = None
) -> tuple[str, str] | None:
    """Write an exhaustive search for ``target``, up to its end, as (thought, expression).

    First steps are tried in a fixed order (pairs by position; + - * /, the larger number first). A line has a first
    step and all the second steps that follow from it, and ends with the verdict: ``49 + 25 = 74, 74 + 22 = 96, 74 - 22
    = 52 no``, or, at the hit, ``49 - 25 = 24, 24 + 22 = 46 yes``. With more than three numbers, a separate line has a
    step that leaves fewer (``12 + 7 = 19 leaves 30, 4, 19``). No step with an integer result from 0 to ``TRACE_LIMIT``
    is left out, so every word follows from those before it, and a small model can learn to predict it.

    Args:
        nums: the given numbers.
        target: the number to reach.
        gives_up: called with the target after each ``no``; True ends the search. The last line then states the nearest
            value (``near 52``; the first of equally near ones), and the expression makes that value, so it is a wrong
            answer. None: the search never gives up.

    Returns:
        ``None`` if no such steps lead to the target, or not within ``TRACE_LINES`` lines.
    """
    written, nearest = [], None
    for line, tried in islice(_lines([(n, str(n)) for n in nums], target), TRACE_LINES):
        hit = bool(tried) and tried[-1][0] == target
        written.append(line if not tried else f"{line} yes" if hit else f"{line} no")
        if hit:
            return "\n".join(written), _bare(tried[-1])
        if tried:
            nearest = min([*([nearest] if nearest else []), *tried], key=lambda term: abs(term[0] - target))
            if gives_up and gives_up(target):
                return "\n".join([*written, f"near {nearest[0]}"]), _bare(nearest)
    return None


def impatience(give_up: float, daunting: float, draw: random.Random) -> Callable[[int], bool] | None:
    """Return a random function for ``gives_up`` of ``search_trace``.

    Args:
        give_up: the probability of giving up after any ``no``.
        daunting: the target at which the solver gives up after a ``no`` with probability 0.5. For a target t the
            probability is t^2 / (t^2 + daunting^2); with 0 the target does not matter.
        draw: source of the random numbers.

    Returns:
        ``None`` if the solver never gives up.
    """
    if not give_up and not daunting:
        return None

    def gives_up(target: int) -> bool:
        daunted = target**2 / (target**2 + daunting**2) if daunting else 0.0
        return draw.random() < 1 - (1 - give_up) * (1 - daunted)

    return gives_up


def _lines(terms: list[Term], target: int, opening: str = "") -> Iterator[tuple[str, list[Term]]]:
    """Yield each line without its verdict, and its terms that use all numbers, up to and including a hit."""
    if len(terms) == 2:
        steps = list(_steps(*terms))
        hit = next((place for place, (term, _) in enumerate(steps) if term[0] == target), len(steps))
        steps = steps[: hit + 1]
        yield opening + ", ".join(equation for _, equation in steps), [term for term, _ in steps]
        return
    for i, j in combinations(range(len(terms)), 2):
        rest = [other for k, other in enumerate(terms) if k not in (i, j)]
        for term, equation in _steps(terms[i], terms[j]):
            if len(rest) == 1:
                yield from _lines([term, *rest], target, f"{equation}, ")
            else:
                left = [*rest, term]
                yield f"{equation} leaves {', '.join(str(value) for value, _ in left)}", []
                yield from _lines(left, target)


def _bare(term: Term) -> str:
    """Return a term's expression without its outermost parentheses."""
    return term[1][1:-1]


def _steps(a: Term, b: Term) -> Iterator[tuple[Term, str]]:
    """Yield (new term, ``x + y = z``) for + - * /, the larger number first, within 0 to ``TRACE_LIMIT``."""
    (x, x_text), (y, y_text) = (a, b) if a[0] >= b[0] else (b, a)
    for sign, value in (("+", x + y), ("-", x - y), ("*", x * y), ("/", x // y if y and x % y == 0 else -1)):
        if 0 <= value <= TRACE_LIMIT:
            yield (value, f"({x_text} {sign} {y_text})"), f"{x} {sign} {y} = {value}"


def solved(
    prompt: Prompt, nums: list[int], target: int, gives_up: Callable[[int], bool] | None = None
) -> tuple[list[Message], str] | None:
    """Return (messages, the solver's completion) of a Countdown problem, or None where no short trace exists.

    The completion starts with the prompt's prefill, and has a thought if the prompt mentions ``<think>``. Without a
    thought it has the answer of the same search. ``gives_up`` is that of ``search_trace``.
    """
    if (found := search_trace(nums, target, gives_up)) is None:
        return None
    thought, expression = found
    thinks = "<think>" in prompt.user + prompt.prefill
    opening = f"{opening_line(prompt)}{thought}\n</think>\n" if thinks else prompt.prefill
    problem = countdown.parse({"nums": nums, "target": target}, "solver")
    return prompt.messages(problem), f"{opening}<answer>{expression}</answer>"


def opening_line(prompt: Prompt) -> str:
    """Return the first line of a completion with a thought; a prefill may already hold the opening tag."""
    return f"{prompt.prefill.removesuffix('<think>')}<think>\n"
