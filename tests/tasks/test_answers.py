"""Numbers, extractors and lm-eval's filters, against values derived by hand."""

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_traces.records import Score
from mlx_traces.tasks import answers, thoughts
from mlx_traces.tasks.answers import (
    flexible,
    judge_lm_eval,
    judge_number,
    last_answer_tag,
    last_boxed,
    last_number,
    parse_number,
    same_number,
    strict,
    tolerant,
)
from mlx_traces.tasks.thoughts import answer_part

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
        "1/2/3",
        "1 3/2",
        "1 1/2/3",
        "1\u00a02",
    ),
    *("10^5", "10^{5}", r"\sqrt{16}", r"2\pi", "x + 5", "2*x", "3 + 4", r"\frac{x}{4}", "x ="),
    "18 " + "x" * 1000,
    "2⁻³",
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


BOXES = [
    (r"so \boxed{18}.", "18"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
    (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\}5}", r"\}5"),
    (r"\boxed {7}", "7"),
    (r"\boxed{}", ""),
    (r"\boxed{5", None),
    (r"\boxed{\frac{3}{4}", None),
    (r"\boxed{4} and \boxed{5", "4"),
    (r"\boxed{4}, not \boxed{} nor \boxed{ } nor \boxed nor \boxed{", "4"),
    (r"\fbox{5}", None),
    (r"\boxed 5", None),
    ("boxed{5}", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_last_boxed(text, content):
    """Braces are balanced; an unclosed box is none."""
    assert last_boxed(text) == content


def test_last_boxed_is_bounded():
    """A box is closed within its bound or not at all."""
    text = "x" * (answers.MAX_BOXED - 1)
    assert last_boxed(rf"\boxed{{{text}}}") == text
    assert last_boxed(rf"\boxed{{{text}x}}") is None


@pytest.mark.parametrize(
    ("response", "part"),
    [
        ("just 5", "just 5"),
        ("<think>3</think>5", "5"),
        ("3</think>5", "5"),
        ("<think>1</think>2<think>3</think>4", "4"),
        ("<think>3", ""),
        ("<think>3</think>5<think>7", ""),
        ("<think>3</think>", ""),
        ("<|begin_of_thought|>3<|end_of_thought|>5", "5"),
        ("<|begin_of_thought|>3", ""),
        ("<think>a<|end_of_thought|>b</think>c", "c"),
        ("<thinking>so 18", ""),
        ("<thinking>so 18</thinking>19", "19"),
        ("<Think>so 18", ""),
        ("<THINK>17</Think>18", "18"),
        ("[THINK]so 18", ""),
        ("[THINK]so 18[/THINK]19", "19"),
        ("<|channel|>analysis<|message|>so 18", ""),
        ("<|channel|>analysis<|message|>18<|end|><|start|>assistant<|channel|>final<|message|>19", "19"),
        ("\u0130\u0130\u0130<think>1</think>2", "2"),
    ],
)
def test_answer_part(response, part):
    """The answer follows the last closed thought; an open one has none."""
    assert answer_part(response) == part


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<ANSWER>5</Answer>", "5"),
        ("<answer>4<answer>5</answer>", "5"),
        ("<answer>5</answer></answer>", "5"),
        ("<answer>5</answer><answer>6", "5"),
        ("<answer>\n5 x\n</answer>", "\n5 x\n"),
        ("<answer>5</answer>, not <answer> </answer>", "5"),
        ("<answer></answer>", ""),
        ("<answer>5", None),
        ("5</answer>", None),
        ("</answer>5<answer>", None),
    ],
)
def test_last_answer_tag(text, content):
    """The last closed pair counts, from its innermost opening."""
    assert last_answer_tag(text) == content


TOLERANT = [
    (r"It is 42, \boxed{42}. I kept the \boxed{} in 1 answer, \boxed{", "42"),
    (r"So 80 + 4 = 84, \boxed{84", "84"),
    (r"So 8 are left: \boxed{84", "8"),
    (r"\boxed{84", None),
    (r"\boxed{84 is it", "84"),
    ("#### 18 and 3 more checks: 5", "18"),
    ("#### 18The next question has 7", "18"),
    ("#### 18\nQuestion: 3 + 4?\n#### 7", "7"),
    ("#### 12,50", "12,50"),
    ("#### 5!", "5!"),
    ("#### -€5", "-€5"),
    ("#### １８", "１８"),
    ("They meet at 3:45", "3:45"),
    ("It costs 1'234 francs", "1'234"),
    ("It is 1.234.567", "1.234.567"),
    ("That is 10³.", "10³"),
    ("That is 10^3.", "10^3"),
    ("That is √16", "√16"),
    ("That makes 18!", "18"),
    ("born 12/25/2024", "12/25/2024"),
    ("It covers 25 cm^2", "25"),
    ("It fell to minus 8 degrees", "minus 8"),
    ("10 minus 8", "8"),
    ("It is 2½ cups", "2 1/2"),
    ("They sold 10 000 of 20 000 tickets", "20 000"),
    ("It costs 4 million dollars", "4 million"),
    (r"2 + 2 = 4, so \boxed{4}. Checked in 3 ways. <answer>9</answer> #### 8", "4"),
    (r"put it in \boxed{}: <answer> 9 </answer> #### 8 or 7", "9"),
    ("<answer></answer>\n#### 8\nThat took 7 minutes.", "8"),
    ("#### 1\n#### 8", "8"),
    ("####8", "8"),
    ("#### $1,234 ", "$1,234"),
    ("####\n8", "8"),
    ("#### -8 degrees", "-8 degrees"),
    ("#### **8**", "**8**"),
    ("#### 8 eggs in 2 boxes", "8"),
    ("#### 2 * 4 = 8", "2 * 4 = 8"),
    ("#### Step 2\nThat makes 8 eggs.", "8"),
    ("#### 2. Add them up\nThat makes 8 eggs.", "8"),
    ("##### 2\nmakes 8", "8"),
    ("They have 3 and 5, which makes 8 eggs.", "8"),
    ("It costs $1,234.50.", "$1,234.50"),
    ("That is 75%.", "75"),
    ("It fell to \u22128 degrees", "-8"),
    ("5\u20138", "8"),
    (r"the share is $\frac{3}{4}$.", "$3/4"),
    ("It is 3/4 of it", "3/4"),
    ("no number", None),
    ("", None),
    ("<think>3 + 5 = 8", None),
    ("<thinking>so 18", None),
    ("<Thinking>so 18", None),
    ("[THINK]so 18", None),
    ("#### - 8 degrees in 2 days", "-8"),
    (r"<think>maybe \boxed{8} #### 8", None),
    ("<think>it is <answer>8</answer> or", "8"),
    ("<think>a draft: <answer>3</answer></think>It is 8.", "8"),
    ("<think>a draft: <answer>3</answer></think>No idea", None),
    ("<think>a draft: <answer>3</answer></think><think>again 8", None),
    ("3 + 5</think>\n\nIt is 8.", "8"),
    (r"\boxed{\text{eight}} of 9", r"\text{eight}"),
]


@pytest.mark.parametrize(("response", "found"), TOLERANT)
def test_tolerant(response, found):
    """Boxed, then tagged, then after ####, then the last number; a truncated thought has no answer."""
    assert tolerant(response) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("<think>3 + 5 = 8", "8"),
        (r"\boxed{4} in 3 ways", "3"),
        ("<answer>4</answer>", "4"),
        ("x" * 500 + " 12,345 " + "y" * 500, "12,345"),
        ("2 -5", "-5"),
        ("10-5", "5"),
        ("1e5", "1e5"),
        ("none", None),
    ],
)
def test_last_number(response, found):
    """The last number of all, wherever it stands."""
    assert last_number(response) == found


def test_small_letters_stay_in_place():
    """Every character has a small form of one character, so places in a text are kept."""
    every = "".join(map(chr, range(0x110000)))
    assert len(thoughts.small(every)) == len(every)


@pytest.mark.parametrize(
    ("extracted", "vote"),
    [
        ("", ""),
        ("18.00", "18"),
        ("$18 ", "18"),
        ("6/8", "3/4"),
        ("New \n York", "New York"),
        ("3 + 4", "3 + 4"),
    ],
)
def test_same_number(extracted, vote):
    """Equal numbers are one answer, as are spacings of one text."""
    assert same_number(extracted) == vote


def test_number_verdicts():
    """Value decides; a text is told from a missing answer, and is kept at a bounded length."""
    gold = Fraction(18)
    assert judge_number("18.00", gold).correct
    assert judge_number("19", gold).verdict == "wrong_value"
    assert judge_number("1e1", gold).verdict == "not_a_number"
    assert judge_number("eighteen", gold).verdict == "not_a_number"
    assert judge_number("eighteen", gold).extracted == "eighteen"
    assert judge_number(None, gold).verdict == "no_answer"
    assert len(judge_number("x" * 10**5, gold).extracted) == answers.MAX_ANSWER


# Derived by hand from the patterns that lm-eval documents for gsm8k. strict-match: the first `-?[0-9.,]+`
# after `#### `. flexible-extract: the last `-?[$0-9.,]{2,}` or `-?[0-9]+`. The two texts are compared after
# dropping every `,` and `$`, and one final `.`. A + is a correct answer.
LM_EVAL = [
    # response, gold, strict, flexible
    ("#### 18", "18", "18 +", "18 +"),
    ("#### 18.", "18", "18. +", "18. +"),
    ("#### 18.00", "18", "18.00", "18.00"),
    ("#### 1,234", "1234", "1,234 +", "1,234 +"),
    ("#### 1,234.", "1,234", "1,234. +", "1,234. +"),
    ("#### $18", "18", None, "$18 +"),
    ("####18", "18", None, "18 +"),
    ("####  18", "18", None, "18 +"),
    ("#### 18 apples", "18", "18 +", "18 +"),
    ("#### 17\n#### 18", "18", "17", "18 +"),
    ("#### 18\n\nQuestion 2", "18", "18 +", "2"),
    ("##### 18", "18", "18 +", "18 +"),
    ("#### -5", "-5", "-5 +", "-5 +"),
    ("#### \u22125", "-5", None, "5"),
    ("The answer is 18.", "18", None, "18. +"),
    ("The answer is 18..", "18", None, "18.."),
    ("The answer is 7.", "7", None, "7. +"),
    ("The answer is 7", "7", None, "7 +"),
    ("It costs $7", "7", None, "$7 +"),
    ("It costs -$7", "-7", None, "-$7 +"),
    ("It costs $-7", "-7", None, "-7 +"),
    ("10-7", "7", None, "-7"),
    ("18 dollars and so on...", "18", None, "..."),
    ("18, or so", "18", None, "18, +"),
    (r"\boxed{18}", "18", None, "18 +"),
    (r"\boxed{\$18}", "18", None, "$18 +"),
    ("<think>#### 17</think> 18", "18", "17", "18 +"),
    ("18 out of 20", "18", None, "20"),
    ("3/4", "3/4", None, "4"),
    ("75%", "75", None, "75 +"),
    ("#### .5", "0.5", ".5", ".5"),
    ("#### .", "18", ".", None),
    ("#### ..", "18", "..", ".."),
    ("$", "18", None, None),
    ("eighteen", "18", None, None),
    ("", "18", None, None),
]


@pytest.mark.parametrize(("response", "gold", "by_strict", "by_flexible"), LM_EVAL)
def test_lm_eval_filters(response, gold, by_strict, by_flexible):
    """Both filters find and judge as lm-eval's do."""
    for find, expected in ((strict, by_strict), (flexible, by_flexible)):
        extracted, correct = (expected.removesuffix(" +"), expected.endswith(" +")) if expected else (None, False)
        assert find(response) == extracted
        assert judge_lm_eval(extracted, gold).correct == correct


def test_lm_eval_verdicts():
    """An ellipsis is what the flexible filter takes for a number; its verdict says so."""
    assert judge_lm_eval(None, "18").verdict == "no_answer"
    assert judge_lm_eval("...", "18").verdict == "not_a_number"
    assert judge_lm_eval("18.0", "18").verdict == "wrong_value"


MARKS = "#### - $ . , / % = { } \\ \\boxed{ \\frac{ \\text{ <think> </think> <answer> </answer>"
PIECES = st.sampled_from(
    [*MARKS.split(), "#### ", " ", "\n", "5", "18", "1,234", "x", "e", "\u2212", "\u0661", "\u00b2"]
)


@given(st.lists(PIECES, max_size=40).map("".join))
@settings(max_examples=300)
def test_flexible_from_the_end(response):
    """The search from the end finds what all matches from the start end with."""
    matches = [max(groups, key=len) for groups in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", response)]
    assert flexible(response) == (matches[-1] if matches else None)


@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=60).map("".join)))
@settings(max_examples=400)
def test_nothing_raises(response):
    """Any text has a verdict, and what was found is not empty."""
    for find in (tolerant, last_number, strict, flexible):
        found = find(response)
        assert found is None or found.strip()
        judge_number(found, Fraction(18))
        judge_lm_eval(found, "18")


@given(st.integers(-(10**9), 10**9), st.text("abc #.\n$<>\\{}", max_size=60))
def test_marked_answers_are_found(number, noise):
    """A marked answer at the end is found whatever stands before it."""
    assert parse_number(tolerant(f"{noise} \\boxed{{{number:,}}}")) == number
    assert parse_number(tolerant(f"{noise}\n<answer>{number}</answer>")) == number
    assert parse_number(tolerant(f"{noise}\n#### {number}")) == number


SIZE = 100_000
HOSTILE = (
    *(
        "\\boxed{",
        "{",
        "<answer>",
        "</answer>",
        "<answer>1</answer>",
        "<think>",
        "</think>",
        "1",
        "1,",
        ",111",
        "1/",
    ),
    *(
        "#",
        "#### ",
        "#### 1",
        "$",
        "-",
        ".",
        " ",
        "\n",
        "\\",
        "\\frac{",
        "\\frac{1",
        "\\text{",
        "1e",
        "(",
        "*",
        "\u2212",
    ),
)


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("head", ["", "\\boxed{", "#### ", "#### 1.", "5"])
def test_hostile_length(head, piece):
    """No repetition makes any search slower than linear: quadratic would take minutes here."""
    response = head + piece * (SIZE // len(piece))
    started = time.perf_counter()
    for find in (tolerant, last_number, strict, flexible, last_boxed, last_answer_tag, parse_number):
        find(response)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("head", ["", "1", "-", "\\frac{", "\\text{"])
def test_hostile_number(head, piece):
    """Nor does any answer just within the length that is read."""
    text = (head + piece * answers.MAX_ANSWER)[: answers.MAX_ANSWER]
    started = time.perf_counter()
    value = parse_number(text)
    assert time.perf_counter() - started < 0.2
    assert value is None or abs(value) < 10**40
