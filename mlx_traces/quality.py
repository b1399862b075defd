r"""Scores of a thinking trace: text in, numbers from 0 to 1 out, or None where one does not apply. No MLX.

Each score is linear in the text and bounded: nothing is executed, no number of more than 40 digits is made. They are
pure functions, so the same ones filter a data set and reward a policy.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

from mlx_traces.config import ScoreConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Score, Trace
from mlx_traces.tasks import Task, get_task
from mlx_traces.tasks.thoughts import SKY, STEPS, TAGS, first_thought

COMPONENTS = ("correct", "format", "structure", "faithfulness", "length", "repetition", "perplexity", "judge")
Scores = dict[str, float | None]

MAX_TEXT = 200_000  # characters that structure and repetition look at, from the start


def quality_scores(
    task: Task | None,
    problem: Problem | None,
    completion: str,
    finish_reason: str | None,
    tokens: int | None,
    settings: ScoreConfig,
    prompt: str = "",
) -> Scores:
    """Return every score that needs no model, by name.

    Args:
        task: whose grader judges; None where none can.
        problem: of that task.
        completion: the assistant's whole turn, what its template or prompt opened included.
        finish_reason: ``"stop"``, ``"length"``, or None if unknown.
        tokens: length of the completion, or None if unknown; then words are counted.
        settings: tags and the length limit.
        prompt: the user's last turn; a thought that only copies it is no thought.
    """
    judged = None if task is None or problem is None else headline(task, problem, completion)
    correct = None if judged is None else float(judged.correct)
    return {"correct": correct, **text_scores(completion, finish_reason, tokens, settings, prompt)}


def text_scores(
    completion: str, finish_reason: str | None, tokens: int | None, settings: ScoreConfig, prompt: str = ""
) -> Scores:
    """Return the scores that follow from the text alone; see ``quality_scores``."""
    thought = thought_of(completion, settings.tags)
    return {
        "format": format_score(completion, finish_reason, settings.tags, prompt),
        "structure": structure(thought),
        "faithfulness": faithfulness(thought),
        "length": length(len(words(completion)) if tokens is None else tokens, settings.length_limit),
        "repetition": repetition(completion),
    }


def headline(task: Task, problem: Problem, completion: str) -> Score:
    """Judge a completion by the task's headline extractor."""
    return task.grade(problem, completion)[task.extractors[0]]


def problem_of(trace: Trace, where: str) -> Problem | None:
    """Return the problem that a trace answers, None without a task; UserError, starting with ``where``, if unknown."""
    if not trace.task:
        return None
    try:
        task = get_task(trace.task)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return task.parse(trace.columns, where)


def combined(scores: Mapping[str, float | None], mix: Mapping[str, float]) -> float:
    """Return one score: 0 for a wrong trace, (1 + m) / 2 for a correct one, m for one that nothing judged.

    m is the mean, weighted by ``mix``, of the other components that apply, and 1 if none does. So every correct trace,
    0.5 at least, is above every wrong one, and no form makes up for a wrong answer.
    """
    correct = scores.get("correct")
    if correct is not None and correct < 1:
        return 0.0
    parts = [(mix.get(name, 0.0), value) for name, value in scores.items() if name != "correct" and value is not None]
    total = sum(weight for weight, _ in parts)
    mean = min(1.0, sum(weight * value for weight, value in parts) / total) if total else 1.0
    return mean if correct is None else (1 + mean) / 2


# ---------------------------------------------------------------------------------------------- format


@dataclass(frozen=True)
class Style:
    """Tags around the thought, and around the answer or solution; without the latter any text after the thought is."""

    thought: tuple[str, str]
    answer: tuple[str, str] | None


STYLES = {
    "think": Style(("<think>", "</think>"), ("<answer>", "</answer>")),
    "r1": Style(("<think>", "</think>"), None),
    "sky-t1": Style(SKY, ("<|begin_of_solution|>", "<|end_of_solution|>")),
}
_ALL_TAGS = {tag.lower() for pair in TAGS for tag in pair if tag != STEPS} | {
    tag for style in STYLES.values() if style.answer for tag in style.answer
}


def format_score(completion: str, finish_reason: str | None, tags: str, prompt: str = "") -> float:
    """Return 1 for one thought and then one answer or solution with nothing before, between or after; else 0.

    As a reward it leaves nothing to exploit: every tag stands exactly once, in order, so no answer is repeated or hides
    in the thought; no tag of another style occurs; thought and answer have a letter or digit; the thought says more
    than the prompt does; and the completion was not cut off. A solution of Sky-T1's may mark its answer by one
    ``<answer>…</answer>``. With tags ``"none"`` any text that was not cut off is well-formed.
    """
    if finish_reason == "length":
        return 0.0
    text = completion.strip()
    if tags == "none":
        return float(bool(text))
    style, lower = STYLES[tags], text.lower()
    wanted = (*style.thought, *(style.answer or ()))
    if tags == "sky-t1" and "<answer>" in lower:
        wanted = (*wanted[:3], *STYLES["think"].answer, wanted[3])
    if any(lower.count(tag) != 1 for tag in wanted) or any(tag in lower for tag in _ALL_TAGS - set(wanted)):
        return 0.0
    between = re.split("|".join(map(re.escape, wanted)), lower)
    before, thought, *rest = between
    gap, *answer, after = rest if style.answer else ("", *rest, "")
    in_order = [lower.find(tag) for tag in wanted] == sorted(lower.find(tag) for tag in wanted)
    if not in_order or before.strip() or gap.strip() or after.strip():
        return 0.0
    stated = answer[1] if len(answer) > 1 else answer[0]  # what the tags mark, or all of it
    return float(bool(_WORD.search(stated)) and _adds(thought, prompt))


_WORD = re.compile(r"\w")


def _adds(thought: str, prompt: str) -> bool:
    """Whether a thought has words, and more than copies of the prompt or a part of it."""
    said, asked = (f" {' '.join(text.lower().split())} " for text in (thought, prompt))
    if asked.strip():
        said = said.replace(asked.rstrip(), "")
    return bool(_WORD.search(said)) and said not in asked


def thought_of(completion: str, tags: str) -> str | None:
    """Return the first thought, to the end if it stays open; None where there is none; all of it for tags ``none``.

    One in the style's tags comes first, then one in any other of ``thoughts.TAGS``.
    """
    return completion if tags == "none" else first_thought(completion, (STYLES[tags].thought, *TAGS))


# ---------------------------------------------------------------------------------------------- structure

STEPS, VERIFICATIONS, REFLECTIONS = 5, 2, 2  # from which on more earns nothing
_STEP = re.compile(r"\n+|(?<=[.!?])\s+")
_VERIFICATION = re.compile(
    r"\b(?:double[- ]check|check|checks|checked|checking|verify|verifies|verified|verifying|verification|confirm"
    r"|confirms|confirmed|confirming|make sure|plug back|substitute back)\b|\b(?:yes|no)[.!,]?$"
)
_REFLECTION = re.compile(
    r"\b(?:wait|hmm|however|alternatively|actually|instead|mistake|mistaken|reconsider|rethink|re-?examine|let me try"
    r"|try again|another way|another approach|on second thought|go back|not right|that's wrong|that is wrong)\b"
)


def structure(thought: str | None) -> float | None:
    """Return min(1, s/5) / 2 + min(1, v/2) / 4 + min(1, r/2) / 4; 0 without a word, None without a thought.

    s counts the different steps, which are lines and sentences of at least two words; v those of them with a word of
    verification (*check*, *verify*, ..., or a last word *yes* or *no*, as nano's search has), r those with a word of
    reflection (*wait*, *however*, *alternatively*, ...). Whole words count: a *waiter* does not wait. Said twice, a
    step counts once.
    """
    if thought is None:
        return None
    steps = {" ".join(step.lower().split()) for step in _STEP.split(thought[:MAX_TEXT])}
    steps = {step for step in steps if " " in step and _WORD.search(step)}
    verified = sum(bool(_VERIFICATION.search(step)) for step in steps)
    reflected = sum(bool(_REFLECTION.search(step)) for step in steps)
    parts = (len(steps) / STEPS, verified / VERIFICATIONS, reflected / REFLECTIONS)
    return sum(share * min(1.0, part) for share, part in zip((0.5, 0.25, 0.25), parts, strict=True))


# ---------------------------------------------------------------------------------------------- length, repetition

N = 4  # words of an n-gram
_UNSPACED = re.compile(  # Han, kana, bopomofo: written without spaces; Korean has them
    "[\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """Return a text's words, case aside; each Chinese or Japanese character is one, as no spaces part words."""
    return _UNSPACED.sub(r" \g<0> ", text.lower()).split()


def length(amount: int, limit: int) -> float:
    """Return 1 - amount / limit, at least 0."""
    return max(0.0, 1 - amount / limit)


def repetition(text: str) -> float | None:
    """Return the share of different ones among the 4-grams of words, or among the lines if that is less.

    The former is 1 - seq-rep-4 of Welleck et al. (arXiv 1908.04319). None for fewer than 4 words.
    """
    said = words(text := text[:MAX_TEXT])
    if len(said) < N:
        return None
    grams = list(zip(*(said[i:] for i in range(N)), strict=False))
    lines = [line for line in map(str.strip, text.lower().splitlines()) if line]
    return min(len(set(grams)) / len(grams), len(set(lines)) / len(lines))


# ---------------------------------------------------------------------------------------------- faithfulness

MAX_EQUATIONS = 1_000  # of a text; later ones are not looked at
MAX_PARTS = 10_000  # numbers, signs and words read for them
MAX_SIDE = 120  # characters read on either side of an =
MAX_OPERANDS = 32
MAX_DIGITS = 40
MAX_UNIT = 3  # words between a number and what is done with it: 5 red apples * 2
_SPELLINGS = str.maketrans(
    dict.fromkeys("×·⋅∗•∙✕✖", "*")
    | dict.fromkeys("÷∕⁄", "/")
    | dict.fromkeys("−–‐‑﹣－", "-")
    | dict.fromkeys("$€£`", " ")
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
    | {"＋": "+", "（": "(", "）": ")"}
)
_LATEX = re.compile(r"\\(?:(times|cdot|ast)|(div)|left|right|text|mathrm)(?![a-zA-Z])|\\([$%])|\\[,;:! ()\[\]]")
_FRACTION = re.compile(r"\\[dtc]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_BULLET = re.compile(r"(?<=\n)[ \t]*[-+*>#]+[ \t]+")
_STARS = re.compile(r"(?<![0-9)])\*\*|\*\*(?![0-9( ])|(?<= )\*\*(?! )")  # bold, not a power
_PART = re.compile(
    r"""
    (?P<space> [ \t]+ )? (?:
      (?P<number> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )
      (?P<more> \.{3} | … )? (?P<percent> [ ]?% )? (?P<glued> [A-Za-z_^²³°'] [A-Za-z_0-9]* )?
    | (?P<operator> \*\* | [-+*/^] | (?: times | plus | minus | divided[ ]by | of | x | X )(?=[ ]+[-(.0-9]) )
    | (?P<open> \( ) | (?P<close> \) )
    | (?P<word> [^\W\d_] [\w']* )
    | (?P<other> [^ \t] ) )
    """,
    re.VERBOSE | re.DOTALL,
)
_WORDY = {"times": "*", "plus": "+", "minus": "-", "divided by": "/", "of": "*", "x": "*", "X": "*"}
_SPOILERS = frozenset(  # the number after one of these is not the number meant
    ("of", "half", "twice", "double", "triple", "square", "squared", "cube", "cubed", "root", "sqrt", "log", "ln")
    + ("mod", "modulo", "power", "times", "plus", "minus", "by", "over", "per", "than")
)
_RELATION = re.compile(r"(?<![<>!≠:=])=+(?!>)")


def faithfulness(thought: str | None) -> float | None:
    """Return the share of a thought's equations that are true; None if it has none."""
    if thought is None:
        return None
    verdicts = list(equations(thought))
    return sum(verdicts) / len(verdicts) if verdicts else None


def equations(text: str) -> Iterator[bool]:
    r"""Yield for each arithmetic equation of a text whether it is true, computed exactly.

    An equation has an ``=`` between two expressions of numbers with + - * / and parentheses, at least one with an
    operation; in a chain a = b = c every ``=`` is one. Understood: decimals, thousands commas, ``$``, ``×``, ``÷``,
    ``−``, ``\times``, ``\frac{}{}``, *times* or *of* between numbers, and up to 3 words after a number as its unit
    (``5 red apples * 2 = 10``). A percentage may be meant as a hundredth or as a plain number. A decimal or percentage
    alone on its side may be rounded: it must be the value to the digits shown (10/3 = 3.33), or its beginning where
    ``...`` follows.

    Not equations: with a variable, a function or a power; with a number of more than 40 digits or more than 32 of
    them; what goes on over a line's end. A division by zero is false.
    """
    marks = [mark.span() for mark in islice(_RELATION.finditer(text), MAX_EQUATIONS)]
    budget, first, left = MAX_PARTS, None, None
    for place in range(len(marks) + 1):  # the i-th gap is between the relations i - 1 and i
        start = marks[place - 1][1] if place else 0
        end = marks[place][0] if place < len(marks) else len(text)
        head, tail, whole = _sides(text, start, end)
        if place:
            first = _runs(head, budget)
            verdict = _compare(left, first.at_start(whole))
            budget -= first.read
            if verdict is not None:
                yield verdict
        if place < len(marks):
            last = first if first is not None and whole else _runs(tail, budget)
            budget -= 0 if last is first else last.read
            left = last.at_end(whole)
        if budget <= 0:
            return


def _sides(text: str, start: int, end: int) -> tuple[str, str, bool]:
    """Return what is right of one relation and left of the next, within their lines, and whether both are all of it."""
    if end - start <= MAX_SIDE and "\n" not in (gap := text[start:end]) and start:
        return gap, gap, True
    head, tail = text[start : min(end, start + MAX_SIDE)], text[max(start, end - MAX_SIDE) : end]
    at_beginning = "" if start or len(tail) < end else "\n"  # as after a line's end
    return head[: head.find("\n") + 1] or head, at_beginning + tail[max(0, tail.rfind("\n")) :], False


Part = tuple[str, str]  # kind and text


@dataclass
class _Run:
    """A maximal run of operands and operations; ``sound`` if all in it was understood."""

    parts: list[Part]
    sound: bool
    starts: bool  # at the beginning of what was read
    ends: bool = False  # at its end
    units: int = 0  # words since the last operand


@dataclass
class _Runs:
    found: list[_Run]
    read: int

    def at_start(self, whole: bool) -> list[Part] | None:
        """Return the expression right of an ``=``, None if there is none that is understood."""
        run = self.found[0] if self.found else None
        if run is None or not run.starts or not run.sound or (run.ends and not whole):
            return None
        depth = 0
        for place, (kind, _) in enumerate(run.parts):
            depth += {"open": 1, "close": -1}.get(kind, 0)
            if depth < 0:  # closes what opened before the =
                return run.parts[:place]
        return run.parts if depth == 0 else None

    def at_end(self, whole: bool) -> list[Part] | None:
        """Return the expression left of an ``=``, None if there is none that is understood."""
        run = self.found[-1] if self.found else None
        if run is None or not run.ends or not run.sound or run.units >= MAX_UNIT or (run.starts and not whole):
            return None
        depth = 0
        for place in range(len(run.parts) - 1, -1, -1):
            depth += {"close": 1, "open": -1}.get(run.parts[place][0], 0)
            if depth < 0:  # opens what closes after the =
                return run.parts[place + 1 :]
        return run.parts if depth == 0 else None


def _plain(text: str) -> str:
    """Rewrite typographic and LaTeX spellings as ASCII arithmetic."""
    text = text.translate(_SPELLINGS).replace("{,}", ",")
    if "\\" in text:
        text = _LATEX.sub(lambda m: "*" if m[1] else "/" if m[2] else (m[3] or " ").replace("$", " "), text)
        for _ in range(3):
            text = _FRACTION.sub(r"((\1)/(\2))", text)
    return _STARS.sub("", _BULLET.sub("\n", text))


def _runs(text: str, budget: int) -> _Runs:
    """Read a text into runs, ``budget`` parts at most."""
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
    for match in _PART.finditer(_plain(text)):
        kind = "number" if match["number"] else match.lastgroup
        value, blank = match[kind], bool(match["space"])
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
            run.parts.append(("number", match["number"] + marks))
            glued = match["glued"] or "units"
            run.sound &= len(match["number"]) <= MAX_DIGITS and len(glued) > 1 and glued.isalpha()
            run.units = 0
        elif kind == "open":
            if run is not None and last in ("number", "close"):
                if run.units or blank:  # with a space it may be either
                    apart = run.units > 0
                    close()
                    run = _Run([], apart and (blank or not before) and before not in _SPOILERS, first)
                else:
                    run.parts.append(("operator", "*"))
            elif run is None:
                run = _Run([], (blank or not before) and before not in _SPOILERS, first)
            run.parts.append(("open", "("))
            run.units = 0
        elif kind == "close":
            if run is not None and last in ("number", "close"):
                run.parts.append(("close", ")"))
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
            run.parts.append(("operator", sign))
            run.units = 0
        elif kind == "word":
            if run is not None:
                run.units += 1
                if last in ("operator", "open") or len(value) == 1:
                    run.sound = False
                if last in ("operator", "open") or run.units > MAX_UNIT:
                    close()
        else:
            close()
        before = value.lower() if kind == "word" else ""
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
    """Say whether two expressions are equal; None if one is none or neither has an operation."""
    if left is None or right is None:
        return None
    percent = any(value.endswith("%") for kind, value in (*left, *right) if kind == "number")
    verdicts = []
    for hundredth in (Fraction(1, 100), Fraction(1)) if percent else (Fraction(1),):
        a, b = _evaluate(left, hundredth), _evaluate(right, hundredth)
        if a is None or b is None or not a.operations + b.operations:
            return None
        verdicts.append(_equal(a, b))
    return any(verdicts)


def _equal(a: _Value, b: _Value) -> bool:
    if a.exact is None or b.exact is None:
        return False
    return a.exact == b.exact or _rounds(a, b) or _rounds(b, a)


def _rounds(value: _Value, shown: _Value) -> bool:
    """Whether ``shown``, a decimal or percentage alone, is ``value`` to its digits."""
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
    for kind, text in parts:
        if kind == "number":
            values.append(_number(text, hundredth))
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
            if operand_next:  # a sign
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
    """Replace the operands on top of the stack by the result; None stands for a division by zero."""
    b = values.pop()
    if sign == "neg":
        values.append(None if b is None else -b)
        return
    a = values.pop()
    if a is None or b is None or (sign == "/" and b == 0):
        values.append(None)
    else:
        values.append(a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b)


def _number(text: str, hundredth: Fraction) -> Fraction:
    value = Fraction(text.rstrip("…%").replace(",", ""))
    return value * hundredth if text.endswith("%") else value
