r"""MATH: data, prompts, extractors, strata, traces, and its own solutions graded.

``MLX_TRACES_MATH500`` names MATH-500's test.jsonl: each of its solutions must then be right, by every extractor.
"""

import json
import os
import time
from collections import Counter
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from mlx_traces.cli import main
from mlx_traces.config import EvalConfig, FilterConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.completion import Completion
from mlx_traces.pipelines.verify import problem_of
from mlx_traces.records import Trace, strata_of
from mlx_traces.tasks import get_task, math
from mlx_traces.tasks.math import TASK, first_box, strict, tolerant
from mlx_traces.traces.filtering import select
from mlx_traces.traces.quality import format_score
from mlx_traces.traces.solutions import math_traces

pytestmark = pytest.mark.skipif(not find_spec("math_verify"), reason="the extra `math` is not installed")
ROWS = [
    {
        "problem": "A square has a diagonal of length $2\\sqrt{6}$. What is the length of its side in simplest form?",
        "solution": "[asy]\ndraw((0,0)--(1,1));\n[/asy]\nIt is $\\frac{2\\sqrt{6}}{\\sqrt{2}}=\\boxed{2\\sqrt{3}}$.",
        **{"answer": "2\\sqrt{3}", "subject": "Geometry", "level": 2, "unique_id": "test/geometry/1.json"},
    },
    {
        "problem": "Solve $(x-1)(x+4)=0$ over the real numbers.",
        "solution": "Either factor is zero, so $x=\\boxed{1,-4}$.",
        **{"level": "Level 1", "type": "Algebra"},
    },
    {"problem": "Find the remainder when $2^{10}$ is divided by $1000$.", "answer": 24, "year": "2031"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


# ---------------------------------------------------------------------------------------------- problems


def test_rows_of_math_500_of_the_train_split_and_of_aime(file):
    problems = TASK.load("test", str(file), None, 0)
    assert [problem.gold for problem in problems] == ["2\\sqrt{3}", "1,-4", "24"]
    assert [strata_of(problem.stratum) for problem in problems] == [["level 2", "Geometry"], ["level 1", "Algebra"], []]
    assert [problem.columns["question"] for problem in problems] == [row["problem"] for row in ROWS]
    assert all("problem" not in problem.columns for problem in problems)
    assert len(TASK.load("test[1:]", str(file), None, 0)) == 2
    again = math.parse(problems[0].columns, "again")  # from a trace, or a row with a question
    assert again == problems[0]


@pytest.mark.parametrize(
    ("solution", "gold"),
    [("So $x = \\boxed 2$.", "2"), ("so \\boxed 9$.", "9"), ("$\\boxed{1}$, no, $\\boxed{\\sqrt{2}}$", "\\sqrt{2}")],
)
def test_the_answer_in_a_solution_also_in_a_box_without_braces(solution, gold):
    assert math.parse({"problem": "?", "solution": solution}, "f:1").gold == gold


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, r"f:1: 'problem' is missing; this row has answer"),
        ({"problem": "?", "solution": "It is \\boxed{3"}, r"f:1: there is no 'answer', and 'solution' has no closed"),
        (
            {"problem": "?", "solution": "It is $\\boxed{}$."},
            r"f:1: there is no 'answer', and 'solution' has no closed",
        ),
        ({"problem": "?", "answer": " "}, r"f:1: 'answer' must be text or a number"),
        ({"problem": "?", "answer": "1" * 1001}, r"f:1: 'answer' has more than 1,000 characters"),
        ({"problem": "?"}, r"f:1: 'solution' is missing"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(UserError, match=f"^{message}"):
        math._parse_asked(row, "f:1")


def test_a_split_that_math_does_not_have():
    with pytest.raises(UserError, match="^unknown split 'valid': choose train or test"):
        TASK.load("valid", None, None, 0)


def test_prompts(file):
    problem = TASK.load("test", str(file), 1, 0)[0]
    for name in ("plain", "boxed", "thinking"):
        text = json.dumps(TASK.prompt(name).messages(problem))
        assert ("boxed{}" in text, "<think>" in text) == (name == "boxed", name == "thinking")
        assert json.dumps(problem.columns["question"])[1:-1] in text and "solution" not in text
    assert TASK.default_prompt == "boxed" and TASK.extractors[0] == "tolerant"


# ---------------------------------------------------------------------------------------------- extractors


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("so \\boxed{1} or rather $\\boxed{\\frac{1}{2}}$.", ("\\frac{1}{2}", "\\frac{1}{2}", "1")),
        ("<think>\\boxed{3}</think> It is \\boxed{4}.", ("4", "4", "3")),
        ("<think>first \\boxed{3}", (None, None, "3")),
        ("<think>hm</think><answer>x^2</answer>", ("x^2", None, None)),
        ("<think>hm <answer>7</answer>", ("7", None, None)),
        ("Thus $x=3$ and the area is $12\\pi$ square units.", ("12\\pi", None, None)),
        ("Thus \\(a+b\\) is\n\\[ 2\\sqrt{3} \\]", (" 2\\sqrt{3} ", None, None)),
        ("With $n=5$ the sum is 17.", ("17", None, None)),
        ("The area is $14$ cm$^2$.", ("14", None, None)),
        ("The area is \\(14\\) cm\\(^2\\).", ("14", None, None)),
        ("It takes $14$ g of CO$_2$.", ("14", None, None)),
        ("It is 90$^\\circ$.", ("90", None, None)),
        ("It costs $5, or $6 with tax: 11", ("11", None, None)),
        ("$$\\frac{a}{b}$$", ("\\frac{a}{b}", None, None)),
        *(  # a formula without dollars, and a number near LaTeX that is no part of it
            (f"{before}{formula}{after}", (found, None, None))
            for before, formula, after, found in (
                ("The answer is ", "2\\pi", ".", "2\\pi"),
                ("The area is ", "36 \\pi", " square units.", "36 \\pi"),
                ("", "\\frac{\\sqrt{3}}{2}", "", "\\frac{\\sqrt{3}}{2}"),
                ("so the sum is **", "\\binom{10}{5}", "**", "\\binom{10}{5}"),
                ("x = ", "1 + 3 \\cdot \\sqrt{x - 2}", ", then", "1 + 3 \\cdot \\sqrt{x - 2}"),
                ("- ", "3\\sqrt{2", "", "3\\sqrt{2"),
                ("Thus ", "-\\frac{3}{4}", ".", "-3/4"),
                ("", "\\text{The area is }5 \\text{ cm}^2", "", "5"),
                ("", "\\sqrt{324} = 18", "", "18"),
                ("", "3\\sqrt{4}\\approx6", "", "6"),
                ("&= 7", "\\end{align*}", "", "7"),
            )
        ),
        ("so the answer is $\\boxed{\\frac{1}{2}$.", ("\\frac{1}{2}", None, None)),  # a box that never closes
        ("We get 12, so \\boxed{84", ("12", None, None)),  # 84 may be cut off
        ("\\boxed{\\boxed{5}}", ("5", "5", "5")),
        ("\\boxed{} then \\boxed{9}", ("9", "9", "9")),
        ("no answer here", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_extractors(response, found):
    assert (tolerant(response), strict(response), first_box(response)) == found


def test_extractors_are_linear():
    pieces = ("\\boxed{", "$", "\\(", "<answer>", "$x", "1 + {", "{{{ 1", "{x}1 \\", "\\cdot 1 ", "=1\\pi")
    for text in (piece * (200_000 // len(piece)) for piece in pieces):
        start = time.process_time()
        for find in (tolerant, strict, first_box):
            find(text)
        assert time.process_time() - start < 2


def test_grades_and_votes(file):
    problem = TASK.load("test", str(file), None, 0)[1]
    scores = TASK.grade(problem, "First \\boxed{1}. All: \\boxed{-4, 1}")
    assert {name: score.verdict for name, score in scores.items()} == {
        **{"tolerant": "correct", "strict": "correct"},
        "first_box": "wrong_value",
    }
    assert TASK.grade(problem, "none")["strict"].verdict == "no_answer"
    assert TASK.grade(problem, "\\boxed{9^{9^{9^9}}}")["strict"].verdict == "too_complex"
    votes = TASK.votes(["1, -4", "-4,1", None, "\\frac12", "0.50", "x+y", "x + y"], problem.gold, "tolerant")
    assert votes == ["1,-4", "1,-4", None, "1/2", "1/2", "x+y", "x+y"]


@pytest.mark.skipif("MLX_TRACES_MATH500" not in os.environ, reason="MLX_TRACES_MATH500 names no file")
def test_every_solution_of_math_500_is_right():
    problems = TASK.load("test", os.environ["MLX_TRACES_MATH500"], None, 0)
    assert len(problems) == 500
    assert {name for problem in problems for name in strata_of(problem.stratum) if name.startswith("level")} == {
        f"level {level}" for level in range(1, 6)
    }
    wrong = [
        (problem.gold, name)
        for problem in problems
        for name, score in TASK.grade(problem, problem.columns["solution"]).items()
        if not score.correct
    ]
    assert wrong == []


# ---------------------------------------------------------------------------------------------- whole ways


def test_an_evaluation_has_strata_of_level_and_of_subject_and_is_verified(file, tmp_path):
    planned = evaluator.plan(EvalConfig(model="nano", task="math", data=str(file)))
    texts = ("\\boxed{\\sqrt{12}}", "\\boxed{2}", "24")
    rows = [
        evaluator.grade_sample(planned, problem, 0, Completion("?", "", text, 1, "stop")) | {"elapsed": 1.0}
        for problem, text in zip(planned.problems, texts, strict=True)
    ]
    result = evaluator.summarize(planned, rows, "run", None, [])
    assert {name: (part["correct_count"], part["total_questions"]) for name, part in result.by_stratum.items()} == {
        **{"Algebra": (0, 1), "Geometry": (1, 1)},
        **{"level 1": (0, 1), "level 2": (1, 1)},
    }
    for row, problem in zip(rows, planned.problems, strict=True):
        found = problem_of(TASK, json.loads(json.dumps(row)), "sample")
        assert (found.id, found.gold, found.stratum) == (problem.id, problem.gold, problem.stratum)


def test_solutions_become_traces_that_are_right(file):
    skipped = Counter()
    think = list(math_traces("train", str(file), None, 0, skipped=skipped))
    assert skipped == {"no worked solution": 1} and len(think) == 2
    boxed = list(math_traces("train", str(file), None, 0, style="boxed"))
    for trace in (*think, *boxed):
        task = get_task(trace.task)
        assert task.grade(task.parse(trace.columns, "trace"), trace.completion)["tolerant"].correct
        assert "[asy]" not in trace.completion
    assert [format_score(trace.completion, None, "think", trace.messages[-1]["content"]) for trace in think] == [1, 1]
    assert boxed[1].completion == ROWS[1]["solution"]
    with pytest.raises(UserError, match="^unknown style 'plain': choose think or boxed"):
        next(math_traces("train", str(file), None, 0, style="plain"))


def test_the_filter_knows_maths_problems(file):
    problems = TASK.load("test", str(file), None, 0)
    asked = Trace("other", ({"role": "user", "content": f"Hint given. {ROWS[0]['problem']} Explain."},), "text")
    other = Trace("another", ({"role": "user", "content": "Compute one plus one."},), "2")
    same = Trace(problems[1].id, ({"role": "user", "content": "?"},), "2", task="math", columns=problems[1].columns)
    config = FilterConfig(correct_only=False, finished=False, duplicates=False, eval_task="math")
    assert select([asked, other, same], config, problems)[0] == [other]


def test_grade_prints_verdicts(file, tmp_path):
    rows = [
        {"answer": "\\frac{1}{2}", "completion": "\\boxed{0.5}"},
        {"answer": "x+1", "completion": "\\boxed{x-1}"},
        {"answer": "5", "completion": "\\boxed{5"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(main, ["grade", str(tmp_path / "rows.jsonl"), "--task", "math"])
    assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == ["correct", "wrong_value", "no_answer"]
    assert "1 of 3 correct by tolerant" in done.stderr


def test_data_math_writes_traces(file, tmp_path):
    out = tmp_path / "traces.jsonl"
    done = CliRunner().invoke(main, ["data", "math", "--data", str(file), "--style", "boxed", "--out", str(out)])
    assert done.exit_code == 0 and "2 traces written" in done.stderr and "1 skipped (no worked solution)" in done.stderr
    assert len(out.read_text().splitlines()) == 2


def test_a_row_with_problem_and_question_is_asked_its_problem():
    problem = math.parse({"problem": "1 + 1?", "question": "another", "answer": "2"}, "x:1")
    assert problem.columns["question"] == "1 + 1?"
    assert problem.id == math.parse({"problem": "1 + 1?", "answer": "2"}, "x:1").id


def test_an_answer_too_long_to_compare_is_its_own():
    long = "×\n" * 50_000
    assert math.same(long, "5", "tolerant") == long != math.same("×\n", "5", "tolerant")
