r"""The grammar of numbers in answers: find a number, by its longest match, and compute its exact value. No MLX.

A run of digits and separators is one number or none: ``1,234``, ``1,20,000``, ``10 000``, ``1'234`` and ``1_234`` are
numbers; ``12,50``, ``3:45``, ``1.234.567`` and ``2024-05-06`` are not, and neither are their parts. In a range or
difference in running text the last number counts. A sign belongs to the number or currency that it touches. With a
space after it, it is a sign only at the start of an answer and after ``=`` (``- $18``, ``x = - 18``), and a dash in
running text: ``Total - $18`` is 18. A dot that touches the word before it belongs to that word: ``Rs.18`` is 18. Texts
are bounded, nothing is executed, exponents are not read, and a number has at most 40 digits.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_ANSWER = 1_000  # characters of a marked answer; a longer one is not a number
MAX_DIGITS = 40
WINDOW = 200  # characters before the last digit that are searched for the last number
AFTER = 40  # and after it: a unit, a power, "million"

_POWERS = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}  # of 10
# Groups are atomic, not possessive: Python 3.11.2 matches possessive groups wrongly, 3.11.7 does not.
_SPACED = r"(?<![0-9.,])[1-9][0-9]{0,2}(?>(?:[ ][0-9]{3}(?![0-9]))+)(?>(?:\.[0-9]+)?)(?![.,'’_:]?[0-9]|[ ]?/)"
_LETTER = "[A-Za-zα-ωΑ-Ω]|[xyz]{2,}|[abc]{2,}|pi|sqrt|sin|cos|tan|log|ln"
_DATE = r"[12][0-9]{3}-[01][0-9]-[0-3][0-9](?![0-9])"
_RUN = r"(?:(?<![A-Za-z])\.)?[0-9]++(?>(?:[.,'’_:][0-9]+)*)"
NUMBER = re.compile(
    rf"""
    (?=[-+.0-9$€£¥₹√∛∜\\]|(?i:neg|minu))
    (?P<sign> (?<![0-9A-Za-z)\]}}%]) [-+] | (?:(?<==)|(?<==[ ]))[-+][ ]
        | (?<![A-Za-z]) (?<![0-9%)][ ]) (?i:negative|minus)[ ] )?
    (?: [$€£¥₹][ ]? (?P<minus>-)? )?
    (?P<root> [√∛∜][ (]? | \\sqrt[ ]?(?:\[[0-9]\])?\{{? )?
    (?P<run> {_SPACED} | {_DATE} | {_RUN} )
    (?: [ ] (?P<part>[0-9]{{1,9}}/[0-9]{{1,9}}) (?![0-9/]) )?
    (?P<over> (?: [ ]?/[ ]?-?{_RUN} )+ )?
    (?P<power> [eE][-+]?[0-9]+ | [ ]?(?:\^|\*\*(?=[0-9]))[ ]?[-+({{]*[0-9]* | [⁺⁻]?[⁰¹²³⁴-⁹ⁿ]
        | !(?=[0-9A-Za-z/^({{]|\*[0-9A-Za-z({{]) )?
    (?: (?P<kilo>[kK])(?![^\W_]) | (?P<letter> (?:{_LETTER})(?![A-Za-z]) | [ ]?(?:π|\\pi(?![A-Za-z]))
        | [ ]?\\sqrt[ ]?(?:\[[0-9]\])?\{{?[0-9]* ) )?
    (?P<words> (?: [ -]+(?i:{"|".join(_POWERS)})s?(?![A-Za-z]) )+ )?
    """,
    re.VERBOSE,
)


def parse_number(text: str, words: bool = True) -> Fraction | None:
    r"""Return the exact value of an answer, or None if it is not one number.

    Understood: ``18.00``, ``$18``, ``-€5``, ``minus 5``, ``1,234``, ``1,20,000``, ``1{,}234``, ``10 000``, ``３/４``,
    ``\frac{3}{4}``, ``\frac3{-4}``, ``3\over 4``, ``{3}/{4}``, ``1 1/2``, ``1½``, ``.5``, ``1.45 million``, ``70k``,
    and units and words around the number (``18 dollars``, ``75%`` is 75, ``\text{…}``, ``cm^2``, ``90^\circ``). Of an
    equation the right-hand side counts if the left one is a name or a calculation: ``x = 5``, ``3 + 4 = 7``.

    Not one number: two different ones, a range or difference, an exponent, a power, root or factorial (``10³``,
    ``√16``, ``5!``), a letter next to the number (``2x``, ``3R^2``, ``2\pi``), another formula (``\sqrt{2}``,
    ``x + 5``, ``x + y = 0``), a zero denominator, more than 40 digits.

    Args:
        text: the answer alone, not a whole response.
        words: whether letters may stand around the number.
    """
    found = readings(text, words)
    return found[0] if found else None


@lru_cache(4096)  # several extractors find the same answer, and a problem keeps its gold answer
def readings(text: str, words: bool = True) -> tuple[Fraction, ...]:
    """Return the possible values of an answer: none, one, or for ``4 million`` both 4,000,000 and 4 (a unit).

    Arguments as for ``parse_number``.
    """
    if len(text) > MAX_ANSWER:
        return ()
    text = plain(text)
    if "=" in text:
        text = _right_side(text)
    for _ in range(3 if "\\" in text else 0):  # they may be nested
        text = _STYLED.sub(r" \1 ", text)
    text = _IGNORED.sub(" ", text) if "\\" in text or "*" in text else text
    text = with_sign(_SPACES.sub(" ", text).strip(" *"))
    rest = NUMBER.sub(" ", text)
    if _LEFT_OVER.search(rest) or _BETWEEN.search(text) or (not words and re.search(r"[^\W\d_]", rest)):
        return ()
    matches = list(NUMBER.finditer(text))
    values = {_value(match) for match in matches}
    if len(values) != 1 or None in values:
        return ()
    plainly = {_value(match, False) for match in matches if match["words"]}
    return (*values, *(plainly - values))


def last_number(text: str) -> str | None:
    """Return the last number of a text, in ASCII; also what only looks like a number, such as ``3:45``."""
    digits = "0123456789" if text.isascii() else _DIGITS
    end = max(map(text.rfind, digits)) + 1
    numbers = list(NUMBER.finditer(plain(text[max(0, end - WINDOW) : end + AFTER]))) if end else []
    return numbers[-1][0].strip() if numbers else None


def first_number(text: str) -> str | None:
    """Return the first number of a text, in ASCII, with the ``!`` after it if there is one."""
    text = with_sign(plain(text[:MAX_ANSWER]))
    number = NUMBER.search(text)
    return number and (number[0] + "!" * text.startswith("!", number.end())).strip()


# ---------------------------------------------------------------------------------------------- spellings

_FRACTIONS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_DIGITS = "0123456789０１２３４５６７８９" + _FRACTIONS
SPELLINGS = str.maketrans(
    {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full-width
    | dict.fromkeys("−–‐‑﹣－", "-")
    | dict.fromkeys("⁄∕", "/")
    | dict.fromkeys(
        "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
    )
)
_VULGAR = re.compile(rf"(?:([0-9]) ?)?([{_FRACTIONS}])")
_PART = r"([-+]?(?:[0-9][0-9.,]*|\.[0-9]+))"
_BRACED = rf"\{{\s*{_PART}\s*\}}"
_FRACTION = re.compile(rf"(?:([-+]) ?)?\\[dtc]?frac\s*(?:{_BRACED}|([0-9]))\s*(?:{_BRACED}|([0-9]))")
_OVER = re.compile(rf"(?:{_BRACED}|(?<![0-9.,]){_PART})\s*(?:/|\\over(?![A-Za-z]))\s*(?:{_BRACED}|{_PART})")
_SCRIPT = re.compile(
    r"(?:\$|\\\() ?(?:(\^)|_) ?(\{?-?[0-9]+\}?|\\circ|\{\\circ\}) ?(?:\$|\\\))|<su(?:(p)|b)>(-?[0-9]+)</su[pb]>"
)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])(\}?)\^\{?-?[0-9](?![0-9])\}?")
_DEGREES = re.compile(r"\^ *\{? *\\(?:circ|degree)(?![A-Za-z])")
_SPACES = re.compile(r"\s+")
_NO_SPACE = re.compile(r"(?<=[0-9],)\\! ?(?=[0-9])|\\!")  # 11,\! 111 is 11,111
_STYLED = re.compile(
    r"\\(?:text|textbf|textit|textrm|emph|underline|mathrm|mathbf|mathit|boldsymbol|bm|mbox|operatorname|boxed|fbox"
    r"|(?:textcolor|color) ?\{[A-Za-z0-9!]*\}) ?\{([^{}]*)\}"
)
_IGNORED = re.compile(
    r"\\(?:left|right|q?quad|space|approx|circ|degree|displaystyle|textstyle|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge"
    r"|bf|it|rm|color ?\{[A-Za-z0-9!]*\})(?![A-Za-z])|\\[()\[\];: ]|\*\*"
)
_LEADING_SIGN = re.compile(r"^([$({ ]*(?:[-+]|(?:negative|minus)\b))[ ({]+(?=[$€£¥₹]?\.?[0-9])")


def plain(text: str) -> str:
    """Write digits, signs, spaces and LaTeX fractions in ASCII."""
    if not text.isascii():
        text = _VULGAR.sub(_in_ascii, text.translate(SPELLINGS))
    text = without_scripts(text)
    if "\\" not in text and "{" not in text and "^" not in text:
        return text
    text = _NO_SPACE.sub("", text.replace("{,}", ",")).replace(r"\$", "$").replace(r"\%", "%").replace(r"\,", " ")
    text = re.sub(r"(?<=[0-9]) ?(?=\\[dtc]?frac)", " ", text)
    text = _OVER.sub(lambda match: "/".join(filter(None, match.groups())), _FRACTION.sub(_in_line, text))
    return _UNIT_POWER.sub(r"\1²", _DEGREES.sub(" ", text))


def without_scripts(text: str) -> str:
    """Join an exponent that is a formula of its own to what it stands at: ``cm$^2$`` is ``cm^2``; remove an index."""
    return _SCRIPT.sub(lambda match: f"^{match[2] or match[4]}" if match[1] or match[3] else "", text)


def with_sign(text: str) -> str:
    """Join a leading sign to its number: ``- 18`` becomes ``-18``."""
    return _LEADING_SIGN.sub(lambda match: match[1] + " " * match[1][-1].isalpha(), text)


def _in_ascii(match: re.Match) -> str:
    """Write ``½`` as ``1/2``, and ``1½`` as ``1 1/2``."""
    value = Fraction(unicodedata.numeric(match[2])).limit_denominator(10)
    return f"{f'{match[1]} ' if match[1] else ''}{value.numerator}/{value.denominator}"


def _in_line(match: re.Match) -> str:
    r"""Write a LaTeX fraction in one line, with one sign: ``-\frac{3}{-4}`` as ``3/4``."""
    sign, above, below = match[1] or "", match[2] or match[3], match[4] or match[5]
    negative = (sign + above[0] + below[0]).count("-") % 2
    return ("-" if negative else "+" if sign else "") + above.lstrip("-+") + "/" + below.lstrip("-+")


# ---------------------------------------------------------------------------------------------- equations

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi"
    "|varphi|chi|psi|omega"
)
_UNKNOWN = re.compile(
    rf"(?<![A-Za-z'’\\])(?![aAI] [A-Za-z0-9])[A-Za-z](?![A-Za-z])|[α-ορ-ω]|\\(?:{_GREEK})(?![A-Za-z])"
)
_NAME = re.compile(r"[\s$({]*+\\?(?:(?!²)[^\W\d_])+(?:_(?:\w|\{[^{}]*\}))?['′]*(?:\([^()=]*\))?[\s$)}]*+")
_CALCULATED = re.compile(r"[-+*/^|,0-9²]")
_TIMES = re.compile(r"(?<=[0-9)]) ?[xX] ?(?=[0-9$(])")
_NEXT = re.compile(r"[,;]\s*[^\W\d]|\b(?:and|or)\b")


def _right_side(text: str) -> str:
    """Return the side right of the last ``=`` if each other side is one name or a calculation, else nothing."""
    *sides, right = text.split("=")
    for place, side in enumerate(sides):
        side = _TIMES.sub("*", side)
        named = _NAME.fullmatch(side) or not (_UNKNOWN.search(side) and _CALCULATED.search(side))
        if not named or (place and _NEXT.search(side)):
            return ""
    return right


# ---------------------------------------------------------------------------------------------- values

_LEFT_OVER = re.compile(r"[\\^+*√∛∜π×÷±≤≥≠]|[ ][xyz](?![^\W_])")
_BETWEEN = re.compile(
    r"[0-9][%)}]? *- *[$€£¥₹({]*[.0-9]"  # a range or a difference
    r"|(?<![A-Za-z'’])[b-z] *- *[$({]*[.0-9]|[0-9)}] *- *[b-z](?![A-Za-z])"  # a difference with an unknown
    r"|(?<![<\w/])[A-Za-z] ?[<>] ?-?[.0-9]|[0-9] ?[<>] ?[A-Za-z](?![\w>])"  # an inequality, but not <b>5</b>
    r"|[0-9]!"
)
_GROUPED = re.compile(
    r"[1-9][0-9]{0,2}(?P<mark>[,'’_ ])[0-9]{3}(?:(?P=mark)[0-9]{3})*(?:\.[0-9]+)?|"
    r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?|[0-9]*\.?[0-9]+"
)  # groups of three, Indian groups, or no groups


def _value(match: re.Match, words: bool = True) -> Fraction | None:
    """Return the value of a match, with or without words like "million"; None if it is not a number."""
    above, below = _magnitude(match["run"]), 1
    if match["over"]:
        bottom = match["over"].strip().removeprefix("/").strip()
        below = _magnitude(bottom.removeprefix("-"))
        below = -below if below and bottom.startswith("-") else below
    if above is None or not below or match["root"] or match["power"] or match["letter"]:
        return None
    if match["part"]:
        top, bottom = map(int, match["part"].split("/"))
        if match["over"] or above.denominator != 1 or not top < bottom:
            return None
        above += Fraction(top, bottom)
    tens = 3 if match["kilo"] else 0
    if words and match["words"]:
        tens += sum(_POWERS[word.rstrip("s")] for word in match["words"].lower().replace("-", " ").split())
    if tens and above >= 10 ** max(0, MAX_DIGITS - tens):
        return None
    negative = ((match["sign"] or "+")[0] != "+") != bool(match["minus"])
    value = above * 10**tens / below if tens or below != 1 else above
    return -value if negative else value


def _magnitude(run: str) -> Fraction | None:
    """Return the value of digits with separators; None if the groups are not those of a number."""
    if run.isdigit() and len(run) <= MAX_DIGITS:
        return Fraction(int(run))
    digits = re.sub(r"[,'’_ ]", "", run)
    return Fraction(digits) if len(digits) <= MAX_DIGITS and _GROUPED.fullmatch(run) else None
