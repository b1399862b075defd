r"""Find the answer in a response and compare numbers exactly.

Four ways to find it, all linear in the response's length: ``tolerant`` (the headline), ``last_number``, and
lm-eval's ``strict`` and ``flexible``. Nothing is evaluated, exponents are not numbers here, and no number of
more than 40 digits is made.
"""

import re
from fractions import Fraction

from mlx_traces.records import Score

MAX_ANSWER = 1_000  # characters of a marked answer; a longer one is not a number
MAX_BOXED = 10_000  # characters searched for the brace that closes a \boxed{
MAX_DIGITS = 40

# One number: sign (not the dash of a range such as 5-10), dollar, thousands commas, decimals, fraction.
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![0-9A-Za-z)\]}%]) [-+])? \$? (?P<minus>(?<=\$)-)?
    (?P<value> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )
    (?: [ ] (?P<part>[0-9]{1,9}/[0-9]{1,9}) (?![0-9]) )?
    (?: [ ]?/[ ]?(?P<over>[0-9]+) )?
    (?P<exponent> [eE][-+]?[0-9]+ )?
    """,
    re.VERBOSE,
)


def parse_number(text: str, words: bool = True) -> Fraction | None:
    r"""Return the exact value of an answer, or None if it is not one number.

    Understood: ``18.00``, ``$18``, ``1,234``, ``1{,}234``, ``3/4``, ``\frac{3}{4}``, ``1 1/2``, ``.5``,
    ``−5``, and units and words around the number (``18 dollars``, ``75%`` is 75, ``\text{…}``, ``cm^2``,
    ``90^\circ``). Of an equation the right-hand side counts. Two different numbers, a range or difference, an
    exponent, or what is left of a formula (``10^x``, ``\sqrt{2}``, ``x + 5``) are not one number; nor are a zero
    denominator and more than 40 digits.

    Args:
        text: the answer alone, not a whole response.
        words: whether letters may stand around the number.
    """
    if len(text) > MAX_ANSWER:
        return None
    text = _plain(text)
    text = re.sub(r"\^ *\{? *\\(?:circ|degree)(?![A-Za-z])", " ", text)
    text = re.sub(r"(?<=[A-Za-z])(\}?)\^\{?[0-9]\}?", r"\1", text)  # the power of a unit
    for _ in range(3):  # they may be nested
        text = _STYLED.sub(r" \1 ", text)
    text = _with_sign(_IGNORED.sub(" ", text).rpartition("=")[2].strip(" *"))
    rest = _NUMBER.sub(" ", text)
    if re.search(r"[\\^+*]", rest) or (not words and re.search(r"[^\W\d_]", rest)) or _BETWEEN.search(text):
        return None
    values = {_value(match) for match in _NUMBER.finditer(text)}
    return values.pop() if len(values) == 1 else None


_STYLED = re.compile(
    r"\\(?:text|textbf|textit|textrm|emph|underline|mathrm|mathbf|mathit|boldsymbol|bm|mbox|operatorname|boxed|fbox"
    r"|(?:textcolor|color) ?\{[A-Za-z0-9!]*\}) ?\{([^{}]*)\}"
)
_IGNORED = re.compile(
    r"\\(?:left|right|q?quad|space|approx|circ|degree|displaystyle|textstyle|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge"
    r"|bf|it|rm|color ?\{[A-Za-z0-9!]*\})(?![A-Za-z])|\\[()\[\];: ]|\*\*"
)
_BETWEEN = re.compile(r"[0-9][%)}]? *- *[$({]*[.0-9]")  # a range or a difference


def _with_sign(text: str) -> str:
    """Join a leading sign to its number: ``- 18`` is -18."""
    return re.sub(r"^([$({ ]*[-+])[ ({]+(?=\$?\.?[0-9])", r"\1", text)


def _plain(text: str) -> str:
    """Write number signs, spaces and LaTeX fractions in ASCII."""
    text = re.sub("[−–‐‑﹣－]", "-", text).replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"\\[,!]|(?<=[0-9])[\u00a0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\s", " ", text)
    text = re.sub(r"(?<=[0-9]) ?(?=\\[dt]?frac)", " ", text)
    return re.sub(r"\\[dt]?frac ?(?:\{ ?(-?[0-9.,]+) ?\} ?\{ ?([0-9]+) ?\}|([0-9])([0-9]))", r"\1\3/\2\4", text)


def _value(match: re.Match) -> Fraction | None:
    """Compute a matched number."""
    digits, over = match["value"].replace(",", ""), match["over"] or "1"
    if match["exponent"] or max(len(digits), len(over)) > MAX_DIGITS or not int(over):
        return None
    value = Fraction(digits)
    if match["part"]:
        above, below = map(int, match["part"].split("/"))
        if match["over"] or value.denominator != 1 or not above < below:
            return None
        value += Fraction(above, below)
    negative = (match["sign"] == "-") != bool(match["minus"])
    return (-value if negative else value) / int(over)


# ---------------------------------------------------------------------------------- parts of a response

# Between these a model thinks; small and capital letters are the same. The first is the usual one.
THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)
_OPEN, _CLOSE = (tuple(tag.lower() for tag in tags) for tags in zip(*THOUGHT_TAGS, strict=True))
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STARTS_WITH_NUMBER = re.compile(r"[\s*$\\(\[]*+[-+−–]?[\s$\\]*+(?:\.?[0-9]|[dt]?frac)")
_NUMBERED_HEADING = re.compile(r"[ *]*[0-9]+[.):][ *]+[A-Za-z]")


def answer_part(response: str) -> str:
    """Return what follows the last closed thought; nothing if a thought is still open.

    Thoughts are between any of ``THOUGHT_TAGS``; the opening may be missing, as where a chat template wrote it.
    A response without any is all answer.
    """
    part, thinking = after_thought(response)
    return "" if thinking else part


def after_thought(response: str) -> tuple[str, bool]:
    """Return the text after the last closed thought and whether it opens another."""
    lower = _lower(response)
    start = max((found + len(tag) for tag in _CLOSE if (found := lower.rfind(tag)) >= 0), default=0)
    return response[start:], any(lower.find(tag, start) >= 0 for tag in _OPEN)


def _lower(text: str) -> str:
    """Return small letters, each at its place; only İ has a small form of two characters."""
    return text.replace("İ", "I").lower()


def last_boxed(text: str, within: int = MAX_BOXED) -> str | None:
    r"""Return the content of the last ``\boxed{…}``, braces balanced; None without one or if it is open.

    Args:
        text: the answer part of a response.
        within: characters searched for its closing brace.
    """
    start = text.rfind(r"\boxed")
    opening = _BOXED.match(text, start) if start >= 0 else None
    if opening is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, opening.end(), opening.end() + within):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[opening.end() : brace.start()]
    return None


def last_answer_tag(text: str) -> str | None:
    """Return the content of the last closed ``<answer>…</answer>``, from the innermost opening, or None."""
    lower = _lower(text)
    opening = lower.rfind("<answer>", 0, max(0, lower.rfind("</answer>")))
    return text[opening + len("<answer>") : lower.find("</answer>", opening)] if opening >= 0 else None


def marked(part: str) -> str | None:
    r"""Return the last ``\boxed{}`` of an answer part, else its last <answer>; empty ones do not count."""
    for find in (last_boxed, last_answer_tag):
        if (found := find(part)) and found.strip():
            return found.strip()
    return None


def _after_hashes(part: str) -> str | None:
    """Return the line after the last ``####``, or the number that starts it; None for a Markdown heading."""
    before, hashes, rest = part.rpartition("####")
    line = rest.strip().partition("\n")[0].rstrip()
    is_heading = before.endswith("#") or _NUMBERED_HEADING.match(line)
    if not hashes or is_heading or not _STARTS_WITH_NUMBER.match(line):
        return None
    if parse_number(line) is not None:
        return line
    number = _NUMBER.search(_with_sign(_plain(line[:MAX_ANSWER])))
    return number and number[0]


# ---------------------------------------------------------------------------------- extractors


def tolerant(response: str) -> str | None:
    r"""Find the answer in whichever form: last \boxed{}, else <answer>, else ``####``, else the last number.

    Only what follows the thought is searched. In a thought that never ends a closed <answer> counts and
    nothing else, so the numbers of a truncated thought are no answer.
    """
    part, thinking = after_thought(response)
    if thinking:
        return (last_answer_tag(part) or "").strip() or None
    return marked(part) or _after_hashes(part) or last_number(part)


def last_number(response: str) -> str | None:
    """Return the last number of the whole response."""
    end = max(response.rfind(digit) for digit in "0123456789") + 1
    numbers = [match[0] for match in _NUMBER.finditer(_plain(response[max(0, end - 200) : end + 4]))]
    return numbers[-1].strip() if numbers else None


_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE_BACKWARDS = re.compile(r"[$0-9.,]{2,}-?|[0-9]-?")


def strict(response: str) -> str | None:
    """Return what lm-eval's gsm8k ``strict-match`` filter does: the first number after ``#### ``."""
    match = _STRICT.search(response)
    return match[1] if match else None


def flexible(response: str) -> str | None:
    """Return what lm-eval's gsm8k ``flexible-extract`` filter does: the last run of digits and ``$.,``.

    It may be without a digit, such as an ellipsis. The search is from the end, which finds the same one.
    """
    match = _FLEXIBLE_BACKWARDS.search(response[::-1])
    return match[0][::-1] if match else None


# ---------------------------------------------------------------------------------- verdicts


def same_number(extracted: str) -> str:
    """Return what is compared by value: ``18.00`` and ``$18`` are one answer, as are spacings of a text."""
    number = parse_number(extracted)
    return str(number) if number is not None else " ".join(extracted.split())


def judge_number(extracted: str | None, gold: Fraction) -> Score:
    """Compare by value: ``correct``, ``wrong_value``, ``not_a_number`` or ``no_answer``."""
    if extracted is None:
        return Score("no_answer", None)
    value = parse_number(extracted)
    verdict = "not_a_number" if value is None else "correct" if value == gold else "wrong_value"
    return Score(verdict, extracted[:MAX_ANSWER])


def judge_lm_eval(extracted: str | None, gold: str) -> Score:
    """Compare as lm-eval's exact_match does for gsm8k: as text, without ``,``, ``$`` and one final ``.``.

    So ``18.00`` is not ``18``. What has no digit, such as an ellipsis, is ``not_a_number``.
    """
    if extracted is None:
        return Score("no_answer", None)
    if lm_eval_text(extracted) == lm_eval_text(gold):
        return Score("correct", extracted[:MAX_ANSWER])
    verdict = "wrong_value" if re.search("[0-9]", extracted) else "not_a_number"
    return Score(verdict, extracted[:MAX_ANSWER])


def lm_eval_text(text: str) -> str:
    """Return what lm-eval compares of an answer."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()
