"""Check the equations of a text exactly, without executing anything."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

MAX_EQUATIONS = 1_000  # in a text; later ones are not checked
MAX_PARTS = 10_000  # numbers, signs and words read in a text
MAX_SIDE = 120  # characters read on either side of an =
MAX_OPERANDS = 32
MAX_DIGITS = 40
MAX_UNIT = 3  # words between a number and the operation on it: 5 red apples * 2
_SPELLINGS = str.maketrans(
    dict.fromkeys("×·⋅∗•∙✕✖", "*")
    | dict.fromkeys("÷∕⁄", "/")
    | dict.fromkeys("−–‐‑﹣－", "-")
    | dict.fromkeys("$€£`", " ")
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
    | {"＋": "+", "（": "(", "）": ")"}
)
_LATEX = re.compile(r"\\(?:(times|cdot|ast)|(div)|left|right|text|mathrm)(?![a-zA-Z])|\\([$%])|\\[,;:! ()\[\]]")
_FRACTION = re.compile(r"(?:(?<![0-9.,])([0-9]+ ?))?\\[dtc]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_COMMA = re.compile(r"\{,\}")
_BULLET = re.compile(r"(?<=\n)[ \t]*[-+*>#]+[ \t]+")
_STARS = re.compile(r"(?<![0-9)])\*\*|\*\*(?![0-9( ])|(?<= )\*\*(?! )")  # bold, not a power
_PART = re.compile(
    r"""
    (?P<space> [ \t]+ )? (?:
      (?P<number> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ )
          (?: \.[0-9]+ | [ ]+(?P<top>[0-9]{1,9})/(?P<bottom>[0-9]{1,9})(?![0-9/]) )? | \.[0-9]+ )
      (?P<more> \.{3} | … )? (?P<percent> [ ]?% )? (?P<glued> [A-Za-z_^²³°'] [A-Za-z_0-9]* | :[0-9:]+ )?
    | (?P<operator> \*\* | [-+*/^] | (?: times | plus | minus | divided[ ]by | of | x | X )(?=[ ]+[-(.0-9]) )
    | (?P<open> \( ) | (?P<close> \) )
    | (?P<word> [^\W\d_] [\w']* (?: (?<=_)\{\w+\} )? | [√∛∜] )
    | (?P<other> [^ \t] ) )
    """,
    re.VERBOSE | re.DOTALL,
)
_WORDY = {"times": "*", "plus": "+", "minus": "-", "divided by": "/", "of": "*", "x": "*", "X": "*"}
_SPOILERS = frozenset(  # after one of these words, a number does not begin an expression
    ("of", "half", "twice", "double", "triple", "square", "squared", "cube", "cubed", "root", "sqrt", "log", "ln")
    + ("sin", "cos", "tan", "exp", "gcd", "lcm", "choose", "√", "∛", "∜")
    + ("mod", "modulo", "power", "times", "plus", "minus", "by", "over", "per", "than")
)
_OPERATIONS = frozenset(("squared", "cubed", "power", "factorial", "choose", "mod", "modulo", "remainder"))  # no units
_REMAINDER = re.compile(r"(?:[ ,;({~]|\\(?:text|[ ,;])|and |with |a ){0,8}(?:remainder|rem\b|[rR][ },\\]{0,4}[0-9])")
_SUBSCRIPT = re.compile(r"_.*|[0-9₀-₉]+$")
_RELATION = re.compile(r"(?<![<>!≠:=])=+(?!>)")


def faithfulness(thought: str | None) -> float | None:
    """Return the share of a thought's equations that are true; None if it has none."""
    verdicts = list(equations(thought or ""))
    return sum(verdicts) / len(verdicts) if verdicts else None


def equations(text: str) -> Iterator[bool]:
    """Yield whether each arithmetic equation of a text is true; see `checked`."""
    return (true for *_, true in checked(text))


def checked(text: str) -> Iterator[tuple[int, int, bool]]:
    r"""Yield each arithmetic equation of a text: its first character, the one after its last, whether it is true.

    An equation has an ``=`` between two expressions of numbers with + - * / and parentheses, at least one with an
    operation; in a chain a = b = c every ``=`` is one, and the second equation begins at its ``=``, so that equations
    do not overlap. Understood: decimals, mixed numbers, thousands commas, ``$``, ``×``, ``÷``, ``−``, ``\times``,
    ``\frac{}{}``, *times* or *of* between numbers, and a unit of up to 3 words (2 before the ``=``), as in
    ``5 red apples * 2 = 10``. A percentage may mean hundredths or the plain number. A decimal or percentage alone on
    its side may be rounded: it must be the value to the digits shown (10/3 = 3.33), or its first digits if ``...``
    follows. Arithmetic is exact.

    Not equations: those with a variable, a function, a root, a power, a factorial or a remainder, also in words, with a
    time (``8:00``), with a number of more than 40 digits, with more than 32 numbers, or across a line's end. An
    equation with a division by zero is false.
    """
    marks = [mark.span() for mark in islice(_RELATION.finditer(text), MAX_EQUATIONS)]
    budget, first, left, last_end = MAX_PARTS, None, None, 0
    for place in range(len(marks) + 1):  # the i-th gap is between the relations i - 1 and i
        start = marks[place - 1][1] if place else 0
        end = marks[place][0] if place < len(marks) else len(text)
        head, tail, whole = _sides(text, start, end)
        if place:
            first = _runs(head, budget, start)
            right = first.at_start(whole)
            verdict = _compare(left, right)
            budget -= first.read
            if verdict is not None and not _REMAINDER.match(text, right[-1].end):
                begin = left[0].start if left[0].start >= last_end else marks[place - 1][0]
                last_end = right[-1].end
                yield begin, last_end, verdict
        if place < len(marks):
            last = first if first is not None and whole else _runs(tail, budget, end - len(tail))
            budget -= 0 if last is first else last.read
            left = last.at_end(whole)
        if budget <= 0:
            return


def _sides(text: str, start: int, end: int) -> tuple[str, str, bool]:
    """Return the text right of one relation and left of the next, within their lines, and whether they are the same."""
    if end - start <= MAX_SIDE and "\n" not in (gap := text[start:end]) and start:
        return gap, gap, True
    head, tail = text[start : min(end, start + MAX_SIDE)], text[max(start, end - MAX_SIDE) : end]
    at_beginning = "" if start or len(tail) < end else "\n"  # as after a line's end
    return head[: head.find("\n") + 1] or head, at_beginning + tail[max(0, tail.rfind("\n")) :], False


class Part(NamedTuple):
    """A number, sign or parenthesis: its kind, its plain text, and its characters ``start`` to ``end``, exclusive."""

    kind: str
    text: str
    start: int
    end: int


@dataclass
class _Run:
    """A maximal run of operands and operations; ``sound`` if it was understood completely."""

    parts: list[Part]
    sound: bool
    starts: bool  # at the beginning of the text
    ends: bool = False  # at the end of the text
    units: int = 0  # words since the last operand


@dataclass
class _Runs:
    found: list[_Run]
    read: int

    def at_start(self, whole: bool) -> list[Part] | None:
        """Return the expression right of an ``=``, None if none was understood."""
        run = self.found[0] if self.found else None
        if run is None or not run.starts or not run.sound or (run.ends and not whole):
            return None
        depth = 0
        for place, (kind, *_) in enumerate(run.parts):
            depth += {"open": 1, "close": -1}.get(kind, 0)
            if depth < 0:  # closes a parenthesis that opened before the =
                return run.parts[:place]
        return run.parts if depth == 0 else None

    def at_end(self, whole: bool) -> list[Part] | None:
        """Return the expression left of an ``=``, None if none was understood."""
        run = self.found[-1] if self.found else None
        if run is None or not run.ends or not run.sound or run.units >= MAX_UNIT or (run.starts and not whole):
            return None
        depth = 0
        for place in range(len(run.parts) - 1, -1, -1):
            depth += {"close": 1, "open": -1}.get(run.parts[place][0], 0)
            if depth < 0:  # opens a parenthesis that closes after the =
                return run.parts[place + 1 :]
        return run.parts if depth == 0 else None


def _plain(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Rewrite typographic and LaTeX spellings as ASCII arithmetic; return also each character's span in ``text``."""
    text, places = text.translate(_SPELLINGS), [(at, at + 1) for at in range(len(text))]
    rewrites = [(_COMMA, lambda m: ",")] if "{,}" in text else []
    if "\\" in text:
        rewrites += [(_LATEX, lambda m: "*" if m[1] else "/" if m[2] else (m[3] or " ").replace("$", " "))]
        rewrites += [(_FRACTION, _in_line)] * 3
    for pattern, written in (*rewrites, (_BULLET, lambda m: "\n"), (_STARS, lambda m: "")):
        pieces, kept, at = [], [], 0
        for match in pattern.finditer(text):
            start, end = match.span()
            pieces += [text[at:start], written(match)]
            kept += places[at:start] + [(places[start][0], places[end - 1][1])] * len(pieces[-1])
            at = end
        if at:
            text, places = "".join((*pieces, text[at:])), kept + places[at:]
    return text, places


def _in_line(match: re.Match) -> str:
    r"""Write a LaTeX fraction in one line: ``\frac{1}{2}`` as ``((1)/(2))``, ``3\frac{1}{2}`` as ``3 1/2``."""
    whole, top, bottom = match[1] or "", match[2], match[3]
    return f"{whole} {top}/{bottom}" if whole and top.isdigit() and bottom.isdigit() else f"{whole}(({top})/({bottom}))"


def _runs(text: str, budget: int, begin: int) -> _Runs:
    """Split a text into runs, reading at most ``budget`` parts; ``begin`` is the place of its first character."""
    found: list[_Run] = []
    run: _Run | None = None
    before, read = "", 0  # the last word, if nothing came after it; how many parts

    def close(ends: bool = False) -> None:
        nonlocal run
        if run is not None:
            while run.parts and run.parts[-1][0] == "open" and not ends:
                run.parts.pop()
            run.sound &= bool(run.parts) and run.parts[-1][0] in ("number", "close")
            run.ends = ends
            found.append(run)
        run = None

    first = True  # nothing but space so far
    text, places = _plain(text)
    for match in _PART.finditer(text):
        kind = "number" if match["number"] else match.lastgroup
        value, blank = match[kind], bool(match["space"])
        span = begin + places[match.start(kind)][0], begin + places[match.end() - 1][1]
        if value == "of" and (run is None or run.units or run.parts[-1][0] not in ("number", "close")):
            kind = "word"  # 3 out of 5
        read += 1
        if read >= budget:
            break
        last = run.parts[-1][0] if run and run.parts else ""
        if kind == "number":
            if run is None or last in ("number", "close"):
                spoilt = (run is not None and not run.units) or before in _SPOILERS
                close()
                run = _Run([], not spoilt, first)
            marks = ("…" if match["more"] else "") + ("%" if match["percent"] else "")
            run.parts.append(Part("number", match["number"] + marks, *span))
            glued = match["glued"] or "units"
            run.sound &= len(match["number"]) <= MAX_DIGITS and len(glued) > 1 and glued.isalpha()
            run.sound &= not match["top"] or int(match["top"]) < int(match["bottom"])
            run.units = 0
        elif kind == "open":
            if run is not None and last in ("number", "close"):
                if run.units or blank:  # with a space before it, it may be a factor or a new expression
                    apart = run.units > 0
                    close()
                    run = _Run([], apart and (blank or not before) and before not in _SPOILERS, first)
                else:
                    run.parts.append(Part("operator", "*", *span))
            elif run is None:
                run = _Run([], (blank or not before) and before not in _SPOILERS, first)
            run.parts.append(Part("open", "(", *span))
            run.units = 0
        elif kind == "close":
            if run is not None and last in ("number", "close"):
                run.parts.append(Part("close", ")", *span))
                run.units = 0
            else:
                close()
        elif kind == "operator":
            sign = _WORDY.get(value, value)
            if run is None:
                run = _Run([], sign in "+-" and not before, first)
            elif last == "operator":
                run.sound &= sign == "-"
            elif last == "open":
                run.sound &= sign in "+-"
            run.sound &= sign not in ("**", "^")
            run.parts.append(Part("operator", sign, *span))
            run.units = 0
        elif kind == "word":
            if run is not None:
                run.units += 1
                if last in ("operator", "open") or len(value) == 1 or value.lower() in _OPERATIONS:
                    run.sound = False
                if last in ("operator", "open") or run.units > MAX_UNIT:
                    close()
        else:
            close()
        before = _SUBSCRIPT.sub("", value.lower()) if kind == "word" else ""
        first = False
    close(ends=read < budget)
    return _Runs(found, read)


@dataclass(frozen=True)
class _Value:
    exact: Fraction | None  # None after a division by zero
    digits: int | None  # decimals shown, of a decimal or percentage alone
    more: bool
    operations: int


def _compare(left: list[Part] | None, right: list[Part] | None) -> bool | None:
    """Return whether two expressions are equal; None if one is missing or neither has an operation."""
    if left is None or right is None:
        return None
    percent = any(value.endswith("%") for kind, value, *_ in (*left, *right) if kind == "number")
    verdicts = []
    for hundredth in (Fraction(1, 100), Fraction(1)) if percent else (Fraction(1),):
        a, b = _evaluate(left, hundredth), _evaluate(right, hundredth)
        if a is None or b is None or not a.operations + b.operations:
            return None
        finite = a.exact is not None and b.exact is not None
        verdicts.append(finite and (a.exact == b.exact or _rounds(a, b) or _rounds(b, a)))
    return any(verdicts)


def _rounds(value: _Value, shown: _Value) -> bool:
    """Whether ``shown``, a decimal or percentage alone, is ``value`` to the digits shown."""
    if shown.digits is None:
        return False
    unit, off = Fraction(1, 10**shown.digits), abs(value.exact - shown.exact)
    return off < unit if shown.more else off * 2 <= unit


def _evaluate(parts: list[Part], hundredth: Fraction) -> _Value | None:
    """Compute an expression by precedence (Dijkstra's shunting yard); None if it is not one."""
    if not parts or len(parts) > 4 * MAX_OPERANDS:
        return None
    values: list[Fraction | None] = []
    signs: list[str] = []
    operations, numbers, operand_next = 0, 0, True
    for kind, text, *_ in parts:
        if kind == "number":
            value = sum(map(Fraction, text.rstrip("…%").replace(",", "").split()))
            values.append(value * hundredth if text.endswith("%") else value)
            numbers, operand_next = numbers + 1, False
        elif kind == "open":
            signs.append("(")
            operand_next = True
        elif kind == "close":
            while signs and signs[-1] != "(" and not operand_next:
                _apply(values, signs.pop())
            if not signs or operand_next:
                return None
            signs.pop()
        else:
            if operand_next:  # a sign, not an operation
                if text == "-":
                    signs.append("neg")
                elif text != "+":
                    return None
                continue
            operations += 1
            while signs and signs[-1] != "(" and _RANK[signs[-1]] >= _RANK[text]:
                _apply(values, signs.pop())
            signs.append(text)
            operand_next = True
    if operand_next or "(" in signs or numbers > MAX_OPERANDS:
        return None
    while signs:
        _apply(values, signs.pop())
    alone = parts[-1][1] if numbers == 1 and parts[-1][0] == "number" else ""
    digits = len(alone.strip("…%").partition(".")[2]) + (2 if alone.endswith("%") and hundredth != 1 else 0)
    return _Value(values[0], digits if "." in alone or alone.endswith("%") else None, "…" in alone, operations)


_RANK = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}


def _apply(values: list[Fraction | None], sign: str) -> None:
    """Replace the operands on top of the stack by the result, which is None after a division by zero."""
    b = values.pop()
    if sign == "neg":
        values.append(None if b is None else -b)
        return
    a = values.pop()
    if a is None or b is None or (sign == "/" and b == 0):
        values.append(None)
    else:
        values.append(a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b)
