r"""Whether two mathematical answers are equal. No MLX.

Equal spellings, words, numbers and numbers with a base are compared exactly; formulas whose values differ are unequal.
math-verify decides all other pairs, in a separate process with a limit of a second of CPU time (`equality_worker`).
"""

import ast
import json
import math
import operator
import os
import re
import select
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from threading import Lock

from mlx_traces.errors import UserError
from mlx_traces.tasks.numbers import MAX_ANSWER, parse_number

MAX_PARTS = 64  # numbers and names in one answer
SECONDS = 20  # wall-clock limit of a reply; the worker's own limit is a second of CPU time, however busy the machine
START_SECONDS = 60  # wall-clock limit of its start
VERDICTS = ("correct", "wrong_value", "not_an_expression", "too_complex")
MISSING = "task math compares answers by math-verify, which is not installed: pip install 'mlx-traces[math]'"


@lru_cache(1)
def require() -> None:
    """Raise UserError if math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise UserError(MISSING)


@lru_cache(1 << 16)
def compare(gold: str, answer: str) -> str:
    r"""Compare an answer with the gold one; both without ``\boxed{}``.

    Returns:
        ``correct``, ``wrong_value``, ``not_an_expression`` (math-verify cannot read it) or ``too_complex``: more than
        64 parts or 1,000 characters, or more than a second of work.
    """
    require()
    if len(answer) > MAX_ANSWER:
        return "too_complex"
    if _other_half_of_day(gold, answer):
        return "wrong_value"
    wanted, found = normal(gold), normal(answer)
    if squeezed(wanted) == squeezed(found):
        return "correct"
    for decide in (_as_words, _in_a_base, _as_numbers, _by_brackets):
        if (equal := decide(gold, answer)) is not None:
            return "correct" if equal else "wrong_value"
    if not found:
        return "not_an_expression"
    if max(len(_PART.findall(text)) for text in (wanted, found)) > MAX_PARTS:
        return "too_complex"
    return "wrong_value" if _apart(wanted, found) else _ask(wanted, found)


# ---------------------------------------------------------------------------------------------- spellings

_PART = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[A-Za-z]+|[^\W\d_]")
_SPELLINGS = str.maketrans(
    {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full-width
    | dict.fromkeys("−–‐‑﹣", "-")
    | dict.fromkeys("⁄∕", "/")
    | {"π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "∪": r"\cup "}
    | {"≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "∈": r"\in ", "°": "", "²": "^2", "³": "^3"}
)
_WORD = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf) ?\{([^{}]*)\}")
_UNIT = re.compile(rf"(?:(?<=[0-9}}])|(?<=\\pi))\s*{_WORD.pattern}(?:\s*\^\s*\{{?[0-9]\}}?)?\s*$")
_AND = re.compile(r"(?:,\s*)?\\(?:text|mbox|textrm) ?\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+")
_IN = re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])")
_ROOT = re.compile(r"√ *([0-9]+|[A-Za-z])")
_NOTHING = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?|\\! *|\\[()\[\]$]|\$"
    r"|\^ *\{? *\\(?:circ|degree)(?![A-Za-z]) *\}?|\\degree(?![A-Za-z])"
)
_SPACE = re.compile(r"\\(?:q?quad|space)(?![A-Za-z])|\\[,;: ]|~|\s+")
_ROW_END = re.compile(r"\\\\(?: *\[-?[0-9.]+ ?[a-z]{2}\])?")
_FACTOR = re.compile(r"(?<=[0-9}]) (?=[A-Za-z](?![A-Za-z]))")


def normal(text: str) -> str:
    r"""Return a formula in one spelling: without dollars, ``\left``, thin spaces, degrees, units and a final dot.

    ``\dfrac`` becomes ``\frac``; the word between items of a list (``\text{ or }``) becomes a comma; ``x \in`` at the
    start is removed.
    """
    text = _ROOT.sub(r"\\sqrt{\1}", text).translate(_SPELLINGS)
    rows = _ROW_END.split(text)  # before the second half of \\ is taken for the first of \[ or \,
    text = r"\\".join(_SPACE.sub(" ", _NOTHING.sub("", row)) for row in rows)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text.replace(r"\%", "%").replace("{,}", ",").strip())
    text = _IN.sub("", _AND.sub(", ", text))
    unit = _UNIT.sub("", text)
    text = _WORD.sub(r"\1", unit if unit.strip() else text)
    return _FACTOR.sub("", " ".join(text.split())).rstrip(".,;: ")


def squeezed(text: str) -> str:
    """Remove the spaces of a normal spelling, except those between two letters or digits, as in ``a b``."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


# ---------------------------------------------------------------------------------------------- decided here


def _as_words(gold: str, answer: str) -> bool | None:
    r"""Compare the letters and digits, ignoring case, if the gold answer is one ``\text{…}`` with a letter."""
    named = _WORD.fullmatch(gold.strip())
    if named is None or not re.search(r"[^\W\d_]", named[1]):
        return None
    one, other = (re.sub(r"[\W_]+", "", _WORD.sub(r"\1", text)).casefold() for text in (gold, answer))
    return one == other


_BASED = re.compile(r"([0-9A-F]*[0-9][0-9A-F]*)_\{?([0-9]{1,2})\}?")


def _in_a_base(gold: str, answer: str) -> bool | None:
    r"""Compare two numbers if one has a base, as ``52_8``; math-verify reads ``52_8`` and ``52_9`` both as 52.

    For a gold answer with a base the digits must be the same, and the base the same or missing. For one without, the
    values are compared.
    """
    one, other = (_BASED.fullmatch(normal(text).replace(" ", "")) for text in (gold, answer))
    if one is None:
        return None if other is None else parse_number(gold) == _value(other)
    plain = normal(answer).replace(" ", "")
    return one.groups() == other.groups() if other else one[1] == plain


def _value(based: re.Match) -> int | None:
    try:
        return int(based[1], int(based[2]))
    except ValueError:
        return None


_HALF_OF_DAY = re.compile(r"[0-9]\W*([ap])\.? ?m(?![^\W_])")


def _other_half_of_day(gold: str, answer: str) -> bool:
    """Whether one is a time a.m. and the other one p.m., which are no units."""
    one, other = (sorted(_HALF_OF_DAY.findall(_WORD.sub(r"\1", text).lower())) for text in (gold, answer))
    return bool(one and other and one != other)


_NAME = re.compile(r"^ ?\\?[A-Za-z]\w*'*(?: ?\([^()=]*\))? ?=")
_NO_NUMBER = re.compile(r"[<>|]|\\[gln]e|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|^(?:\\\{|[(\[]).*,")


def number(text: str) -> Fraction | None:
    r"""Return the exact value of an answer that is one number, with or without a unit and ``x =``.

    None for anything else: ``x > 5``, ``(1,234)``, and texts with a single letter, as ``5 i`` and ``x^2+1``.
    """
    text = _NAME.sub("", normal(text))
    return None if _NO_NUMBER.search(text) else parse_number(text)


def _as_numbers(gold: str, answer: str) -> bool | None:
    """Compare two numbers exactly; ``36%`` equals 36, and also 0.36 if the other one has no percent sign."""
    one, other = number(gold), number(answer)
    if one is None or other is None or ("=" in gold and "=" in answer):
        return None
    percents = "%" in gold, "%" in answer
    equal = {one, one / 100 if percents == (True, False) else one}
    return bool(equal & {other, other / 100 if percents == (False, True) else other})


def _by_brackets(gold: str, answer: str) -> bool | None:
    """Return False for a set and a tuple or an interval, of which math-verify compares only the elements; else None."""
    one, other = (re.match(r"\\\{|[(\[]", normal(text)) for text in (gold, answer))
    differ = one and other and (one[0] == "\\{") != (other[0] == "\\{")
    return False if differ and all("," in text for text in (gold, answer)) else None


_TWO_WAYS = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{2}|\^ *[0-9]{2}|[0-9] +[0-9]|[0-9] *\\frac|/ *(?![0-9]+ *(?:$|[-+)}]))"
)
_INNERMOST = re.compile(
    r"\\frac *(?:\{([^{}]+)\}|([0-9])) *(?:\{([^{}]+)\}|([0-9]))|\\sqrt *(?:\{([^{}]+)\}|([0-9]))|\^ *\{([^{}]+)\}"
)
_NAMED = re.compile(r"\\(?:pi|cdot|times)(?![A-Za-z])|[A-Za-z]|[{}^]")
_MEANT = {letter: f"({0.31 + 0.07 * place:.2f})" for place, letter in enumerate(ascii_lowercase)} | {
    **{"\\pi": f"({math.pi})", "\\cdot": "*", "\\times": "*", "{": "(", "}": ")", "^": "**"},
    **{"i": "(1j)", "e": f"({math.e})"},
}
_NO_SCALAR = re.compile(r"[(\[][^()]*,.*[)\]]$|\\begin|.*\\cup|[A-Za-z]{3,}$")
_FACTORS = re.compile(r"(?<=[0-9.)])(?=\()|(?<=\))(?=[0-9.])")
_OPERATIONS = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.Pow: operator.pow, ast.UAdd: operator.pos, ast.USub: operator.neg},
}


def _apart(gold: str, answer: str) -> bool:
    """Whether two formulas surely differ: their values at one point differ by more than 1e-10, relative to the larger.

    A tuple, an interval, a matrix and a word have no value, so they differ from a formula that has one. Most wrong
    answers so need no math-verify, which rounds to decimal places and would accept 10^-21 for 10^-20.
    """
    one, other = value(gold), value(answer)
    if one is None or other is None:
        return (one is None) != (other is None) and bool(_NO_SCALAR.match(gold if one is None else answer))
    return abs(one - other) > 1e-10 * max(abs(one), abs(other)) > 1e-90


def value(text: str) -> complex | None:
    r"""Return the value of a formula of numbers, single letters, ``+-*/^``, fractions and roots at one point.

    At that point each letter has a fixed value, the same in upper and lower case; i and e keep their meaning. None for
    any other formula, and for one that can be read in two ways: ``1\frac12``, ``2/3x``, ``ab``, ``2^10``.
    """
    if _TWO_WAYS.search(text):
        return None
    while (inner := _INNERMOST.sub(_in_python, text)) != text:
        text = inner
    text = _NAMED.sub(lambda name: _MEANT[name[0].lower()], text).replace(" ", "")
    if not re.fullmatch(r"[0-9.j+\-*/()]+", text):
        return None
    try:
        return _computed(ast.parse(_FACTORS.sub("*", text), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, KeyError):
        return None


def _in_python(match: re.Match) -> str:
    above, below, root, power = match[1] or match[2], match[3] or match[4], match[5] or match[6], match[7]
    return f"(({above})/({below}))" if above else f"(({root})**.5)" if root else f"^({power})"


def _computed(node: ast.expr) -> complex:
    """Compute a parsed formula in complex floats; KeyError for anything but arithmetic."""
    if isinstance(node, ast.Constant) and node.value is not ...:  # Python parses three dots as a constant
        return complex(node.value)
    if isinstance(node, ast.UnaryOp):
        return _OPERATIONS[type(node.op)](_computed(node.operand))
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_computed(node.left), _computed(node.right))
    raise KeyError(type(node))


# ---------------------------------------------------------------------------------------------- worker

_ONE_AT_A_TIME = Lock()


@lru_cache(1)
def _worker(process_id: int) -> subprocess.Popen:
    """Start the worker of this process (a forked process needs its own); UserError if it does not start."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("equality_worker.py"))]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
    if _reply(worker, START_SECONDS) != "ready":
        worker.kill()
        said = (worker.communicate()[1].decode(errors="replace").strip().splitlines() or ["no reply"])[-1]
        raise UserError(f"math-verify does not start ({said[:200]}): pip install 'mlx-traces[math]'")
    return worker


def _reply(worker: subprocess.Popen, seconds: float) -> str:
    ready, _, _ = select.select([worker.stdout], [], [], seconds)
    return worker.stdout.readline().decode().strip() if ready else ""


def _ask(gold: str, answer: str) -> str:
    """Let the worker compare two formulas; end it and return ``too_complex`` if it does not reply."""
    with _ONE_AT_A_TIME:
        worker = _worker(os.getpid())
        try:
            worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            reply = _reply(worker, SECONDS)
        except OSError:
            reply = ""
        if reply not in VERDICTS:
            with suppress(OSError):  # it may have ended by itself
                os.killpg(worker.pid, 9)
            worker.communicate()
            _worker.cache_clear()
            return "too_complex"
        return reply
