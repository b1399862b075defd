"""Scores of a trace's text, against values worked out by hand."""

import subprocess
import sys
from fractions import Fraction
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_traces.config import ScoreConfig, build
from mlx_traces.errors import UserError
from mlx_traces.tasks import get_task
from mlx_traces.traces.equations import MAX_EQUATIONS, checked, equations, faithfulness
from mlx_traces.traces.quality import (
    combined,
    format_score,
    headline,
    length,
    repetition,
    structure,
    text_scores,
    thought_of,
)

COUNTDOWN = get_task("countdown")
PROBLEM = COUNTDOWN.parse({"nums": [49, 25, 22], "target": 46}, "test")
THOUGHT = "49 + 25 = 74, 22 no\n49 - 25 = 24, 24 + 22 = 46 yes"
GOOD = f"<think>\n{THOUGHT}\n</think>\n<answer>(49 - 25) + 22</answer>"


# ---------------------------------------------------------------------------------------------- all together


def test_all_scores_of_a_trace_of_nano():
    assert headline(COUNTDOWN, PROBLEM, GOOD).correct
    scores = text_scores(GOOD, "stop", 40, ScoreConfig(length_limit=160))
    assert scores == {
        "format": 1.0,
        "structure": 0.5 * 2 / 5 + 0.25 * 2 / 2,  # two lines, ending in no and yes
        "faithfulness": 1.0,
        "length": 0.75,
        "repetition": 1.0,
    }


def test_without_tokens_words_are_counted():
    scores = text_scores(GOOD, None, None, ScoreConfig(length_limit=100))
    assert scores["length"] == 1 - len(GOOD.split()) / 100


def test_the_headline_extractor_judges():
    wrong = GOOD.replace("(49 - 25) + 22", "49 - 25")
    assert not headline(COUNTDOWN, PROBLEM, wrong).correct
    boxed = "\\boxed{(49 - 25) + 22}"  # only the tolerant extractor finds it
    assert not headline(COUNTDOWN, PROBLEM, boxed).correct


def test_combined_by_hand():
    mix = {"format": 1, "faithfulness": 2, "judge": 5}
    scores = {"correct": 1.0, "format": 1.0, "faithfulness": 0.25, "judge": None, "length": 0.1}
    assert combined(scores, mix) == (1 + (1 * 1 + 2 * 0.25) / 3) / 2
    assert combined({**scores, "correct": None}, mix) == 0.5
    assert combined({**scores, "correct": 0.0}, mix) == 0
    assert combined({"correct": 1.0}, mix) == 1
    assert combined({"correct": 1.0, "format": 0.0}, {}) == 1


@given(st.dictionaries(st.sampled_from(["format", "length", "judge"]), st.none() | st.floats(0, 1)))
def test_every_correct_trace_is_above_every_wrong_one(scores):
    mix = {"format": 0.3, "length": 0.1, "judge": 7}
    best_wrong = combined({"correct": 0.0, "format": 1.0, "length": 1.0, "judge": 1.0}, mix)
    assert best_wrong < 0.5 <= combined({**scores, "correct": 1.0}, mix) <= 1


def test_an_unknown_component_or_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"^mix\.foo.*'format'"):
        build(ScoreConfig, {"mix": {"foo": 1}})
    with pytest.raises(UserError, match=r"^mix\.format"):
        build(ScoreConfig, {"mix": {"format": -1}})


# ---------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1),
        ("  <think>a</think>\n\n<answer>5</answer>\n", 1),
        ("<THINK>a</THINK><Answer>5</Answer>", 1),
        ("<think>a</think><answer>5</answer> done", 0),
        ("well <think>a</think><answer>5</answer>", 0),
        ("<think>a</think> so <answer>5</answer>", 0),
        ("<think>a</think><answer>5</answer><answer>6</answer>", 0),  # answers on approval
        ("<think>a <answer>5</answer></think><answer>6</answer>", 0),  # one in the thought
        ("<think>a <answer>5</answer></think>", 0),
        ("<think>a<think>b</think></think><answer>5</answer>", 0),
        ("<think>a</think><think>b</think><answer>5</answer>", 0),
        ("<think></think><answer>5</answer>", 0),
        ("<think> \n... </think><answer>5</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think><answer>5", 0),
        ("</think>a<think><answer>5</answer>", 0),
        ("<answer>5</answer><think>a</think>", 0),
        ("<think>[THINK]a</think><answer>5</answer>", 0),
        ("a</think><answer>5</answer>", 0),
        ("5", 0),
        ("", 0),
    ],
)
def test_format_of_thought_and_answer(text, expected):
    assert format_score(text, "stop", "think") == expected
    assert format_score(text, "length", "think") == 0


def test_a_copied_prompt_is_no_thought():
    prompt = "Make 30 from the numbers 3, 4 and 6."
    answer = "</think><answer>3 * (4 + 6)</answer>"
    for copy in (prompt, f"{prompt}\n{prompt} ", prompt.upper(), "from the numbers", f"{prompt} from the"):
        assert format_score(f"<think>{copy}{answer}", "stop", "think", prompt) == 0
    assert format_score(f"<think>{prompt} 4 + 6 = 10{answer}", "stop", "think", prompt) == 1


def test_format_of_the_other_styles():
    sky = "<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n5\n\n<|end_of_solution|>"
    assert format_score(sky, None, "sky-t1") == 1
    assert format_score(sky + "!", None, "sky-t1") == format_score(sky, None, "think") == 0
    assert format_score(sky + sky, None, "sky-t1") == 0
    for solution, expected in (
        ("So <answer>5</answer>.", 1),
        ("So <answer> </answer>.", 0),
        ("So </answer>5<answer>.", 0),
        ("<answer>5</answer><answer>6</answer>", 0),
        ("<answer>5", 0),
        ("5</answer>", 0),
    ):
        assert format_score(sky.replace("\n5\n", solution), None, "sky-t1") == expected, solution
    assert format_score(sky.replace("\na\n", "a <answer>5</answer>"), None, "sky-t1") == 0
    assert format_score(sky + "<answer>5</answer>", None, "sky-t1") == 0
    assert format_score("<think>a</think>\nIt is 5.", "stop", "r1") == 1
    assert format_score("<think>a</think>\n", "stop", "r1") == 0
    assert format_score(GOOD, "stop", "r1") == 0  # a tag of another style
    assert format_score("It is 5.", "stop", "none") == format_score("It is 5.", None, "none") == 1
    assert format_score("It is 5.", "length", "none") == format_score(" \n", "stop", "none") == 0


def test_the_thought():
    assert thought_of("x<think>a</think>b", "think") == "a"
    assert thought_of("<think>a", "think") == "a"
    assert thought_of("a</think>b", "think") == "a"
    assert thought_of("b", "think") is None
    assert thought_of("b", "none") == "b"
    assert thought_of("İ<think>a</think>", "think") == "a"


# ---------------------------------------------------------------------------------------------- structure


def test_structure_by_hand():
    text = "First we add. Then check it. Wait, that is odd.\nHowever it fits. Let me verify again! Done now."
    assert structure(text) == 0.5 + 0.25 + 0.25  # 6 steps of 5, 2 checks, 2 reflections
    assert structure("First we add. Then we check it.") == 0.5 * 2 / 5 + 0.25 / 2
    assert structure("Wait, no. Wait, no. Wait, no.") == 0.5 / 5 + 0.25 / 2 + 0.25 / 2  # one step, said thrice
    assert structure("Hm.") == structure("") == 0
    assert structure(None) is None


def test_words_are_whole():
    assert structure("The waiter was actuallyish. Checkers and nowhere, noyes") == 0.5 * 2 / 5
    assert structure("There are no apples") == 0.5 / 5  # no verdict in the middle of a line
    assert structure("4 + 6 = 10, 3 no") == 0.5 / 5 + 0.25 / 2


# ---------------------------------------------------------------------------------------------- length, repetition


def test_length_and_repetition_by_hand():
    assert [length(amount, 100) for amount in (0, 25, 100, 200)] == [1, 0.75, 0, 0]
    assert repetition("a b c") is None
    assert repetition("a b c d e") == 1
    assert repetition("a b c d a b c d") == 4 / 5  # abcd bcda cdab dabc abcd
    assert repetition("one two three four five\nsix\nsix\nsix") == 2 / 4  # lines say more than 4-grams here
    assert repetition("A b C d a B c D") == 4 / 5
    assert repetition("我想我想我想我想") == 2 / 5  # 8 words: each character


# ---------------------------------------------------------------------------------------------- faithfulness

T, F = True, False


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        (THOUGHT, [T, T, T]),
        ("12 + 7 = 19 leaves 30, 4, 19\n19 * 4 = 76", [T, T]),
        ("2 + 3 * 4 = 14, (2 + 3) * 4 = 20, 2 - 3 - 4 = -5, 8 / 4 / 2 = 1", [T] * 4),
        ("2 + 3 * 4 = 20", [F]),
        ("-(2 + 3) * -4 = 20, -2 + 3 = 1, 2 - -3 = 5", [T, T, T]),
        ("5 + 3 red apples = 9, 5 + 3 leaves me with = 9", [F]),  # two words are a unit, three a sentence
        ("3 − 8 = − 5", [T]),
        ("3 × 4 ÷ 2 = 6", [T]),
        ("3 x 4 = 12 and 3 times 4 = 13", [T, F]),
        ("1 + 1 = 2 = 4 / 2 = 3", [T, T, F]),  # every = of a chain counts
        ("10 - 5 = 5 - 2 = 3", [F, T]),
        ("1 + 2 = 3 and then 2 + 2 = 5", [T, F]),
        ("14 = 2 * 7", [T]),
        ("0.1 + 0.2 = 0.3", [T]),  # exactly, unlike floats
        ("12345678901234567890 + 1 = 12345678901234567890", [F]),
        ("$1,234.50 + $5.50 = $1,240", [T]),
        ("1,000 * 3 = 3000", [T]),
        ("5 red apples * 2 = 10 apples", [T]),
        ("6 hours - 2 hours = 3 hours", [F]),
        ("5kg + 2kg = 7kg", [T]),
        ("2(3 + 4) = 14", [T]),
        ("(so 5 + 3 = 8)", [T]),
        ("5*2=<<5*2=10>>10", [T]),
        ("1. 5 + 3 = 8\n- 5 + 3 = 8\n* 5 + 3 = 8", [T, T, T]),  # numbered and bulleted
        ("- 5 + 3 = 8", [T]),
        ("**5 + 3 = 8**", [T]),
        (r"\(3 \times 4 = 12\), \frac{1}{2} + \frac{1}{4} = \frac{3}{4}, 6 \div 3 = 3", [T, T, F]),
        ("20% of 50 = 10; 50 * 20% = 10; 15/20 * 100 = 75%; 1/3 = 33%; 20% of 50 = 11", [T, T, T, T, F]),
        # rounded, to the digits shown
        ("10/3 = 3.33", [T]),
        ("10/3 = 3.34", [F]),
        ("2/3 = 0.67, 2/3 = 0.66, 2/3 = 0.66..., 2/3 = 0.65...", [T, F, T, F]),
        ("3.33 = 10/3", [T]),
        ("2/3 = 67%, 2/3 * 100 = 67%, 2/3 = 66%, 2/3 * 100 = 66.6%", [T, T, F, F]),
        ("1/8 = 0.12 and 1/8 = 0.13", [T, T]),  # half to even, half up
        ("7 / 2 = 3 1/2 cups, 10/3 = 3 1/3 cups, 10/4 = 2 1/4, 1 1/2 + 1/2 = 2, -2 1/2 * 2 = -5", [T, T, F, T, T]),
        (r"7/2 = 3\frac{1}{2}, 7/2 = 3 \dfrac{1}{2}, 3\frac{6 + 2}{4} = 6", [T, T, T]),
        ("7/2 = 4", [F]),  # a whole number is not meant to be rounded
        ("5 / 0 = 0", [F]),
        # no equations
        ("x + 3 = 5, 3x = 6, 3 + x = 5, 2 y = 4, n = 5 + m", []),
        ("2^3 = 8, 2**3 = 8, 2³ + 1 = 9", []),
        ("sqrt(16) + 1 = 5, f(2) + 1 = 4, half of 50 + 5 = 30", []),
        ("√16 + 2 = 18, √(16) + 2 = 6, ∛8 + 1 = 3, 2 √16 = 8, 1 + √16 = 17", []),
        ("3 squared + 1 = 10, 10 = 1 + 3 squared, 2 cubed + 1 = 9, 1 + 7 = 2 to the power 3", []),
        ("5 factorial + 1 = 121, 5 choose 2 + 1 = 11, 7 mod 4 + 1 = 4", []),
        (
            "17/5 = 3, remainder 2; 17/5 = 3 R2; 17/5 = 3 (remainder 2), 17/5 = 3, with a remainder of 2; 1 + 1 = 2",
            [True],
        ),
        (
            r"$17 \div 5 = 3 \text{ R } 2$, $17 / 5 = 3 \text{, remainder } 2$, $17/5 = 3 \, r \, 2$; 2 + 2 = 5",
            [False],
        ),
        ("7 / 2 = 3 remainder 1, 7 / 2 = 3 R 1, 7 / 2 = 3 with a remainder of 1, 2 1/2 hours = 150 minutes", []),
        ("8:00 + 2 = 10:00, 9:30 - 7:00 = 2:30, 2 + 3 = 5 6/2", []),
        (r"log_2 8 + 1 = 4, \log_{2} 8 + 1 = 4, log10 100 + 1 = 3, log₂ 8 + 1 = 4, sin 0 + 1 = 1", []),
        ("3 out of 5 = 0.6", []),
        ("5 = 5, 5 apples = 5, a = b", []),
        ("5 + 3\n= 8", []),
        ("5 + 3 != 9, 5 + 3 >= 7, 5 + 3 ≈ 9, 5 + 3 => 9, 5 + 3 :=9", []),
        ("9" * 41 + " + 1 = 2", []),
        ("+".join("1" * 33) + " = 33", []),
        ("numbers 22 49 - 25 = 24", []),
        ("", []),
    ],
)
def test_equations(text, verdicts):
    assert list(equations(text)) == verdicts


def test_an_equation_far_into_its_line_and_one_cut_by_the_window():
    words = "so we go on and on " * 20
    assert list(equations(f"{words}2 + 2 = 4 {words} 2 + 2 = 5")) == [True, False]
    assert list(equations("1 + " * 31 + "1 = 32")) == []  # 125 characters on the left: too long to read
    assert list(equations("1 + " * 28 + "1 = 29")) == [True]
    assert list(equations("24000 = " + "1000+" * 30 + "1000")) == []  # what is cut off is no end


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("so 49 + 25 = 74, 74 + 22 = 96 no", ["49 + 25 = 74", "74 + 22 = 96"]),
        ("2 + 2 = 4 = 1 + 3 = 5, x", ["2 + 2 = 4", "= 1 + 3", "= 5"]),  # a chain
        (r"so \frac{3}{4} \times 2 = 1.5 and", [r"\frac{3}{4} \times 2 = 1.5"]),
        (r"and 10{,}000 \div 4 = 2{,}500.", [r"10{,}000 \div 4 = 2{,}500"]),
        ("- 5 apples × 2 = 10 apples\n- (3 - 1) = 2", ["5 apples × 2 = 10", "(3 - 1) = 2"]),
        ("go on " * 40 + "2 + 2 = 4 " + "go on " * 40 + "$2 + 2 = $5", ["2 + 2 = 4", "2 + 2 = $5"]),
        ("1/2 = 50 %, 10/3 = 3.33...", ["1/2 = 50 %", "10/3 = 3.33..."]),
    ],
)
def test_where_an_equation_stands(text, spans):
    assert [text[start:end] for start, end, _ in checked(text)] == spans


def test_faithfulness_is_the_share_that_is_true():
    assert faithfulness("1 + 1 = 2\n2 + 2 = 5\n3 + 3 = 6\n") == pytest.approx(2 / 3)
    assert faithfulness("no numbers") is None
    assert faithfulness(None) is None


def test_the_first_equations_count():
    assert len(list(equations("1 + 1 = 2\n" * 3000))) == MAX_EQUATIONS


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(lambda t: f"({' '.join(t)})"),
        max_leaves=8,
    ).filter(lambda expression: "(" in expression),
    st.integers(-3, 3),
)
def test_agrees_with_exact_python(expression, off):
    try:
        value = eval(
            "".join(f"Fraction({t})" if t.isdigit() else t for t in _tokens(expression)), {"Fraction": Fraction}
        )
    except ZeroDivisionError:
        assert list(equations(f"{expression} = 1")) == [False]
        return
    assert list(equations(f"{expression} = {value + off}")) == [off == 0]


def _tokens(expression):
    return expression.replace("(", "( ").replace(")", " )").split()


# ---------------------------------------------------------------------------------------------- whatever the text

ALPHABET = "0123456789+-*/=()., \n%$.x<>&^…×\\{}İ" + "é²"
PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "wait", "\\frac{", "1,000", "...", " of ", " x ", "=", "= ", "**"]
)


@settings(max_examples=300)
@given(
    st.lists(st.text(ALPHABET, max_size=20) | PIECES | st.text(max_size=8), max_size=12).map("".join),
    st.sampled_from(["think", "r1", "sky-t1", "none"]),
    st.sampled_from(["stop", "length", None]),
)
def test_any_text_has_scores_from_0_to_1(text, tags, finish):
    config = ScoreConfig(tags=tags)
    scores = text_scores(text, finish, None, config, "Make 46 from 49, 25, 22")
    assert all(value is None or 0 <= value <= 1 for value in scores.values())
    assert scores == text_scores(text, finish, None, config, "Make 46 from 49, 25, 22")
    assert 0 <= combined(scores, config.mix) <= 1


@pytest.mark.parametrize(
    "pattern",
    ["1+1=2 ", "=", "= ", "(", "(=", "1", "1,", "1-", "a ", "(1+", "\n- ", "1 =", r"\frac{1}{2}=", "−=", "<think>", "*"]
    + ["...…", "check. ", "\\", "$", "<think></think>", "1 1/2 ", "{", "\\frac{"],
)
def test_a_megabyte_of_anything_is_quick(pattern):
    text = pattern * (1_000_000 // len(pattern))
    start = process_time()
    faithfulness(text)
    assert process_time() - start < 0.5  # of the processor: 4 to 35 ms
    start = process_time()
    structure(text), repetition(text), format_score(text, None, "think", text[:1000])
    assert process_time() - start < 1


def test_no_mlx():
    code = "import sys, mlx_traces.traces.filtering\nassert not any(name.startswith('mlx.') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
