"""Numbers in every spelling, against values derived by hand."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_traces
from mlx_traces.records import Score
from mlx_traces.tasks.answers import (
    judge_number,
    last_number,
    parse_number,
    tolerant,
)

NUMBERS = {
    "18": 18,
    "18.": 18,
    "18.00": 18,
    "$18": 18,
    r"\$18": 18,
    "$18$": 18,
    "18 dollars": 18,
    "about 18 apples!": 18,
    "**18**": 18,
    "*18*": 18,
    r"\(18\)": 18,
    "18 (18)": 18,
    "007": 7,
    "1,234": 1234,
    "1,234,567.5": Fraction(2469135, 2),
    "1{,}234": 1234,
    r"1\,234": 1234,
    r"1,\!234": 1234,
    "12\u202f345\u00a0678": 12345678,
    "75%": 75,
    r"75\%": 75,
    "-5": -5,
    "\u22125": -5,
    "\u20135": -5,
    "- 5": -5,
    "+5": 5,
    "-$5": -5,
    "$-5$": -5,
    ".5": Fraction(1, 2),
    "-.25": Fraction(-1, 4),
    "3/4": Fraction(3, 4),
    "3 / 4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4),
    "6/8": Fraction(3, 4),
    r"\frac{3}{4}": Fraction(3, 4),
    r"\dfrac{ 3 }{ 4 }": Fraction(3, 4),
    r"-\tfrac{3}{4}": Fraction(-3, 4),
    r"\frac{-3}{4}": Fraction(-3, 4),
    r"\frac34": Fraction(3, 4),
    "1 1/2": Fraction(3, 2),
    "-1 1/2": Fraction(-3, 2),
    r"2\frac{1}{2}": Fraction(5, 2),
    "x = 5": 5,
    "= 5": 5,
    "3 + 4 = 7": 7,
    "x = -5": -5,
    r"18 \text{ dollars}": 18,
    r"\text{\$18}": 18,
    r"18\,\mathrm{kg}": 18,
    "18\u00a0kg": 18,
    "25 cm^2": 25,
    r"25 \text{ cm}^{2}": 25,
    "$25$ cm$^2$": 25,
    r"25 \text{cm}\(^{2}\)": 25,
    "25 m s<sup>-2</sup>": 25,
    "18 eggs": 18,
    r"90^\circ": 90,
    r"90^{\circ}": 90,
    r"-90^{\circ}\text{C}": -90,
    r"90 ^ { \circ } C": 90,
    "90\u00b0": 90,
    r"\underline{18}": 18,
    r"\textcolor{red}{18}": 18,
    r"-\textcolor{red}{18}": -18,
    r"\boxed{\textbf{\underline{18}}}": 18,
    r"18\space dollars": 18,
    r"\large 18": 18,
    r"{\large -18}": -18,
    "\u2212 18": -18,
    "- 18 dollars": -18,
    "<b>18</b>": 18,
    r"11,\! 111,\!100": 11_111_100,
    "$- 18$": -18,
    "\u2011 18": -18,
    "-{18}": -18,
    "9" * 40: int("9" * 40),
    "minus ½": Fraction(-1, 2),
    "NEGATIVE 5": -5,
    "2½": Fraction(5, 2),
    "1¾": Fraction(7, 4),
    "-½": Fraction(-1, 2),
    "3 ⅓ cups": Fraction(10, 3),
    "-€5": -5,
    "-£5": -5,
    "-$ 18": -18,
    r"-\$ 5": -5,
    "negative 5": -5,
    "Minus $5": -5,
    "10 000": 10_000,
    "1 234 567.5": Fraction(2_469_135, 2),
    "１８": 18,
    "−１，２３４．５": Fraction(-2469, 2),
    "Rs 1,20,000": 120_000,
    "Rs.18": 18,
    "Rs.1,800.50": Fraction(3601, 2),
    "is .5": Fraction(1, 2),
    "1,00,000": 100_000,
    "1'234": 1234,
    "1_234": 1234,
    "1.45 million": 1_450_000,
    "1450 thousand": 1_450_000,
    r"\$70k": 70_000,
    r"4 \text{ Million}": 4_000_000,
    "2 hundred thousand dollars": 200_000,
    r"\frac3{4}": Fraction(3, 4),
    r"\cfrac{3}{4}": Fraction(3, 4),
    r"\frac{3}{-4}": Fraction(-3, 4),
    r"-\frac{-3}{4}": Fraction(3, 4),
    r"3\over 4": Fraction(3, 4),
    r"-{3 \over 4}": Fraction(-3, 4),
    "{3}/{4}": Fraction(3, 4),
    r"\frac{1.5}{2}": Fraction(3, 4),
    r"\frac{3}{0.5}": 6,
    "f(x) = 5": 5,
    "x_1 = 5": 5,
    r"\theta = 30": 30,
    "Cost of a shirt = $18": 18,
    "x = 3 + 4 = 7": 7,
    "4 x 3 = 12": 12,
    "18元": 18,
    "18kg": 18,
    "1st": 1,
}
NO_NUMBERS = [
    *(
        "",
        " ",
        ".",
        "-",
        "$",
        "five",
        r"\text{five}",
        "1e5",
        "2.5e-3",
        "1E9",
        "1e999999999",
        "3/0",
        r"\frac{3}{0}",
    ),
    *(
        "9" * 41,
        "1/" + "9" * 41,
        "5, 6",
        "5-10",
        "5 to 10",
        "9-9",
        "9 - 9",
        "9\u20139",
        "$9-$9",
        "x = 9 - 9",
        "9%-9%",
        r"10^{\circ 5}",
        "10:30",
        "18 or 19",
        *("x > 18", "x<5", "18 < x", "-3 < x < 5", "2024-05-06", "5-10 minutes"),
        "1/2/3",
        "1 3/2",
        "1 1/2/3",
        "1\u00a02",
    ),
    *(
        "10^5",
        "10$^5$",
        "10<sup>5</sup>",
        "10^{5}",
        r"\sqrt{16}",
        r"2\pi",
        "x + 5",
        "2*x",
        "3 + 4",
        r"\frac{x}{4}",
        "x =",
    ),
    "18 " + "x" * 1000,
    *("2⁻³", "10$^5$", "10<sup>5</sup>"),
    *("10³", "5²", "√16", "5!", "12,50", "3:45", "2:3", "1.234.567", "0,5", "1,2,3", "12/25/2024", "5'11", "1,2345"),
    *("2x", "3R^2", "3R²", "2π", "4n", "2xy", "5 y", "x - 5", "5 - x", "10 minus 5", "±5", "4 x 4", "4 × 4"),
    *("5x - 7y + 11z + 4 = 0", "x + y = 0", "2x = 10", "x^2 = 4", "a=3, b=4", "Tom = 3, Ann = 4", "x = 3 or x = -3"),
    "5" + " million" * 7,
]


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_parse_number(text, value):
    """Every writing has its exact value."""
    assert parse_number(text) == value
    assert parse_number(f"  {text}\n") == value


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_parse_number_refuses(text):
    """What is not one number is not guessed at."""
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("It is -$18.", -18), ("It is -$ 18.", -18), (r"It is -\$ 5.", -5), ("It is $-5.", -5)],
        *[("The answer is - $18.", 18), ("Total - $18", 18), ("- 18", 18), ("Monday - 18", 18)],  # dashes
        *[("It takes 5-10 minutes.", 10), ("on 2024–05–06.", None), ("20-2 = 18", 18)],
        *[("so x = - 18.", -18), ("so 3 - 21 =- $18", -18), ("total = + 7", 7), ("x - 18", 18)],
        *[("#### - $18", -18), (r"\boxed{- \$18}", -18), ("<answer>- 18</answer>", -18)],
    ],
)
def test_signs_dashes_and_ranges(text, value):
    """A sign with a space after it counts where an answer or the right side of an equation starts with it."""
    assert parse_number(tolerant(text)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,234", 1234),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("75%", 75),
        ("Apollo 11", None),
        ("7 samurai", None),
    ],
)
def test_parse_number_without_words(text, value):
    """Without words, a title with a number in it is none."""
    assert parse_number(text, words=False) == value


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6), st.sampled_from(["", "$", "= ", "**"]))
def test_parse_number_is_exact(above, below, around):
    """Fractions and thousands commas keep their value, however they are written."""
    value = Fraction(above, below)
    sign, size = "-" if above < 0 else "", abs(above)
    close = "**" if around == "**" else ""
    assert parse_number(f"{around}{sign}{size}/{below}{close}") == value
    assert parse_number(rf"{around}{sign}\frac{{{size}}}{{{below}}}{close}") == value
    assert parse_number(f"{around}{above:,}{close}") == above
    assert parse_number(f"{around}{above:,}.250{close}") == above + (Fraction(-1, 4) if sign else Fraction(1, 4))


MARKS_OF_GROUPS = st.sampled_from([",", " ", "'", "_", "\u00a0", "\u202f"])
SEPARATORS = st.sampled_from(list(",.'_:/"))


@given(st.integers(0, 10**15), MARKS_OF_GROUPS, st.sampled_from(["", "-", "-$", "$-", "-€ ", "minus ", "negative £"]))
def test_every_grouping_keeps_its_value(size, mark, sign):
    """However the thousands are parted and the sign is written, a number is itself, alone and in a sentence."""
    written = sign + f"{size:,}".replace(",", mark)
    value = -size if sign else size
    assert parse_number(written) == value
    assert parse_number(f"{written} apples") == parse_number(last_number(f"It is {written}.")) == value
    assert parse_number(written.translate({ord(str(digit)): 0xFF10 + digit for digit in range(10)})) == value


@given(st.lists(st.tuples(st.text("0123456789", min_size=1, max_size=4), SEPARATORS), min_size=1, max_size=6))
def test_a_run_of_digits_and_separators_is_one_number_or_none(pieces):
    """No part of a run is ever taken for a number."""
    run = "".join(digits + mark for digits, mark in pieces)[:-1]
    assert tolerant(f"It is {run}") == tolerant(f"#### {run}") == run
    value = parse_number(run)
    assert value is None or re.sub("[,'_]", "", run).lstrip("0") in (f"{value}", run.lstrip("0")) or {*"./"} & {*run}


@given(st.integers(-99, 99), st.integers(-99, 99).filter(bool), st.sampled_from(["frac", "dfrac", "tfrac", "cfrac"]))
def test_fractions_in_every_spelling(above, below, macro):
    """All spellings of a LaTeX fraction have its value."""
    for text in (rf"\{macro}{{{above}}}{{{below}}}", rf"{{{above} \over {below}}}", f"{{{above}}}/{{{below}}}"):
        assert parse_number(text) == Fraction(above, below), text


def test_both_readings_of_millions():
    """The question may ask for millions; which reading was right is said."""
    assert judge_number("4 million", Fraction(4_000_000)) == Score("correct", "4 million")
    assert judge_number("4 million", Fraction(4)) == Score("correct", "4 million", "read as 4")
    assert judge_number("4 million", Fraction(40)) == Score("wrong_value", "4 million")
    assert judge_number("2k", Fraction(2)) == Score("wrong_value", "2k")


def test_no_group_is_repeated_possessively():
    """Python 3.11.2 gives such a group too much, ``84,`` for ``84``; an atomic group is right there too."""
    package = Path(mlx_traces.__file__).parent
    wrong = [path.name for path in package.rglob("*.py") if re.search(r"\)(?:[*+?]|\{[0-9,]+\})\+", path.read_text())]
    assert wrong == []
