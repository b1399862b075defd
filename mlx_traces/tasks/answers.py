r"""Find the answer in a response and compare numbers exactly.

The extractors take time linear in the response's length: ``tolerant``, and lm-eval's ``strict`` and ``flexible``.
`tasks.numbers` defines what a number is.
"""

import re
from fractions import Fraction

from mlx_traces.records import Score
from mlx_traces.tasks.numbers import MAX_ANSWER, first_number, last_number, parse_number, plain, readings
from mlx_traces.tasks.thoughts import after_thought, small

MAX_BOXED = 10_000  # characters searched for the brace that closes a \boxed{
MAX_BOXES = 8  # boxes tried, from the last one backwards, until one is closed and not empty


# ---------------------------------------------------------------------------------- parts of a response

_BOXED = re.compile(r"\\boxed\s*\{")
_OPEN_BOX = re.compile(r"\\boxed\s*+\{[^}\s]*+\Z")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STARTS_WITH_NUMBER = re.compile(
    r"[\s*$€£¥₹\\({\[]*+(?:[-+]|(?:negative|minus) )?[\s$€£¥₹\\({]*+(?:\.?[0-9]|[dtc]?frac|√|sqrt)", re.IGNORECASE
)
_NUMBERED_HEADING = re.compile(r"[ *]*[0-9]+[.):][ *]+[A-Za-z]")


def last_boxed(text: str, within: int = MAX_BOXED) -> str | None:
    r"""Return the content of the last ``\boxed{…}`` that is closed and not empty, braces balanced; None without one.

    Later ones that are empty or not closed are skipped. If all are empty, the content is empty.

    Args:
        text: the answer part of a response.
        within: characters searched for its closing brace.
    """
    start, found, looked_at = len(text), None, 0
    while (start := text.rfind(r"\boxed", 0, start)) >= 0 and looked_at < MAX_BOXES:
        if opening := _BOXED.match(text, start):
            looked_at += 1
            content = _braced(text, opening.end(), within)
            if content and content.strip():
                return content
            found = content if found is None else found
    return found


def _braced(text: str, start: int, within: int) -> str | None:
    """Return the text from ``start`` up to the brace that closes the one before ``start``; None if none does."""
    depth = 1
    for brace in _BRACE.finditer(text, start, start + within):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def last_answer_tag(text: str) -> str | None:
    """Return the content of the last closed ``<answer>…</answer>``, from the innermost opening, or None.

    Later empty ones are skipped.
    """
    lower = small(text)
    end, found = len(lower), None
    while (opening := lower.rfind("<answer>", 0, max(0, lower.rfind("</answer>", 0, end)))) >= 0:
        found = text[opening + len("<answer>") : lower.find("</answer>", opening)]
        if found.strip():
            break
        end = opening
    return found


def marked(part: str) -> str | None:
    r"""Return the last ``\boxed{}`` of an answer part, else its last <answer>; empty ones are skipped."""
    for find in (last_boxed, last_answer_tag):
        if (found := find(part)) and found.strip():
            return found.strip()
    return None


def after_hashes(part: str) -> str | None:
    """Return the line after the last ``####`` if it is a number, else the number it starts with; None for a heading."""
    before, hashes, rest = part.rpartition("####")
    line = rest.strip().partition("\n")[0].rstrip()
    is_heading = before.endswith("#") or _NUMBERED_HEADING.match(line)
    if not hashes or is_heading or not _STARTS_WITH_NUMBER.match(plain(line[:MAX_ANSWER])):
        return None
    if parse_number(line) is not None:
        return line
    return first_number(line)


# ---------------------------------------------------------------------------------- extractors


def tolerant(response: str) -> str | None:
    r"""Find the answer in any form: last \boxed{}, else <answer>, else ``####``, else the last number.

    Only the text after the thought is searched. In a thought that is not closed only a closed <answer> counts, so the
    numbers of a truncated thought are no answer. Of several marks of a kind the last one counts. Of the line after
    ``####`` the first number counts. A ``\boxed{84`` at the end of the response is skipped, since its number may be cut
    off (840); with more text after it, its number counts like one in plain text.
    """
    part, thinking = after_thought(response)
    if thinking:
        return (last_answer_tag(part) or "").strip() or None
    start = part.rfind(r"\boxed")
    whole = part[:start] if start >= 0 and _OPEN_BOX.match(part, start) else part
    return marked(part) or after_hashes(part) or last_number(whole)


_FORMS = {  # forms of an answer that a prompt may name: the function that finds one, and the form filled in
    r"\boxed": (last_boxed, r"\boxed{{{}}}"),
    "<answer>": (last_answer_tag, "<answer>{}</answer>"),
    "####": (after_hashes, "#### {}"),
}


def forms_of(asked: str) -> list[str]:
    r"""Return the forms of an answer that a prompt's text names: ``\boxed``, ``<answer>``, ``####``."""
    return [form for form in _FORMS if form in small(asked)]


def as_asked(response: str, asked: str) -> str:
    r"""Return only the response's answer, in the form that its prompt asks for; empty if it has none in that form.

    If the prompt names several forms, the first one that the response has counts; if it names none, the whole response
    is returned. Thoughts are skipped as in `tolerant`.

    Args:
        response: the assistant's whole turn.
        asked: the prompt's text, without the problem.
    """
    forms = forms_of(asked)
    if not forms:
        return response
    part, thinking = after_thought(response)
    for form in forms:
        find, write = _FORMS[form]
        if (not thinking or form == "<answer>") and (found := find(part)) and found.strip():
            return write.format(found.strip())
    return ""


_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE_BACKWARDS = re.compile(r"[$0-9.,]{2,}-?|[0-9]-?")


def strict(response: str) -> str | None:
    """Find the answer as lm-eval's gsm8k ``strict-match`` filter does: the first number after ``#### ``."""
    match = _STRICT.search(response)
    return match[1] if match else None


def flexible(response: str) -> str | None:
    """Find the answer as lm-eval's gsm8k ``flexible-extract`` filter does: the last run of digits and ``$.,``.

    The run may have no digit, like an ellipsis. Searching from the end finds the same run in linear time.
    """
    match = _FLEXIBLE_BACKWARDS.search(response[::-1])
    return match[0][::-1] if match else None


# ---------------------------------------------------------------------------------- verdicts


def same_number(extracted: str) -> str:
    """Return an answer's value as text, so ``18.00`` and ``$18`` are equal; else its text with single spaces."""
    number = parse_number(extracted)
    return str(number) if number is not None else " ".join(extracted.split())


def judge_number(extracted: str | None, gold: Fraction) -> Score:
    """Compare by value: ``correct``, ``wrong_value``, ``not_a_number`` or ``no_answer``.

    ``4 million`` is right for 4,000,000, and for 4, since the question may ask for millions; a note then says so.
    """
    if extracted is None:
        return Score("no_answer", None)
    values = readings(extracted)
    verdict = "not_a_number" if not values else "correct" if gold in values else "wrong_value"
    note = f"read as {gold}" if verdict == "correct" and gold != values[0] else ""
    return Score(verdict, extracted[:MAX_ANSWER], note)


def judge_lm_eval(extracted: str | None, gold: str) -> Score:
    """Compare as lm-eval's exact_match does for gsm8k: as text, without ``,``, ``$`` and one final ``.``.

    So ``18.00`` is not ``18``. An answer without a digit, such as an ellipsis, is ``not_a_number``.
    """
    if extracted is None:
        return Score("no_answer", None)
    if lm_eval_text(extracted) == lm_eval_text(gold):
        return Score("correct", extracted[:MAX_ANSWER])
    verdict = "wrong_value" if re.search("[0-9]", extracted) else "not_a_number"
    return Score(verdict, extracted[:MAX_ANSWER])


def lm_eval_text(text: str) -> str:
    """Return an answer's text as lm-eval compares it."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return (re.sub(r"\.$", "", text) if text.endswith((".", ".\n")) else text).lower()
