"""Extractors and lm-eval's filters, against values derived by hand."""

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    ("That makes **18!**", "18"),
    ("*That makes 18!*", "18"),
    ("That makes 3!*n", "3!"),
    ("born 12/25/2024", "12/25/2024"),
    ("It covers 25 cm^2", "25"),
    ("It covers 25 cm$^2$.", "25"),
    (r"It covers 25 cm\(^{2}\).", "25"),
    ("It covers 25 m<sup>2</sup>.", "25"),
    ("#### 25 cm$^2$", "25 cm$^2$"),
    ("25 g of CO$_2$", "25"),
    ("That is 10$^3$.", "10^3"),
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
        (r"an area of 36\pi square units", r"36\pi"),
        ("an area of 36 π", "36 π"),
        (r"a side of 3\sqrt{2} cm", r"3\sqrt{2"),
        (r"2\pitch", "2"),
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
    started = time.process_time()
    for find in (tolerant, last_number, strict, flexible, last_boxed, last_answer_tag, parse_number):
        find(response)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("head", ["", "1", "-", "\\frac{", "\\text{"])
def test_hostile_number(head, piece):
    """Nor does any answer just within the length that is read."""
    text = (head + piece * answers.MAX_ANSWER)[: answers.MAX_ANSWER]
    started = time.process_time()
    value = parse_number(text)
    assert time.process_time() - started < 0.2
    assert value is None or abs(value) < 10**40
