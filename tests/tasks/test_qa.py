"""A user's own questions: sources, and grading by number or by text."""

import json
import time

import pytest

from mlx_traces.errors import UserError
from mlx_traces.tasks import get_task
from mlx_traces.tasks.qa import INSTEAD, TASK, find_text, gold_number, load, parse, same_text

ROWS = [{"question": "Which river?", "answer": "Elbe"}, {"question": "How long, in km?", "answer": "1,094"}]


def write(path, text):
    """Write a file and return its name."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_json_lines_and_csv_are_the_same_problems(tmp_path):
    """Both kinds of file give the same ids, columns and gold answers."""
    lines = write(tmp_path / "q.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    table = write(tmp_path / "q.csv", '\ufeffquestion,answer\nWhich river?,Elbe\n"How long, in km?","1,094"\n')
    assert load("test", lines, None, 0) == load("test", table, None, 0)
    assert [problem.gold for problem in load("test[1:]", table, None, 0)] == ["1,094"]
    assert len(load("any", lines, 1, 0)) == 1


def test_hub_data_sets(monkeypatch):
    """A name that is no file is looked for on the hub."""
    asked = []

    def hub_rows(*names):
        asked.append(names)
        return ((f"o/n[{place}]", row) for place, row in enumerate(ROWS))

    monkeypatch.setattr("mlx_traces.tasks.qa.hub_rows", hub_rows)
    assert [problem.gold for problem in load("test[:1]", "o/n", None, 0)] == ["Elbe"]
    assert asked == [("o/n", None, "test", INSTEAD)]


def test_further_columns_are_kept(tmp_path):
    """A user's own prompt may use any column."""
    table = write(tmp_path / "q.csv", "topic,question,answer\nrivers,Which?,Elbe\n")
    assert load("test", table, None, 0)[0].columns["topic"] == "rivers"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.csv", "question,reply\nWhich?,Elbe\n", ":1: 'answer' is missing; the header has question, reply"),
        ("q.csv", '"que\nstion",answer\n', r":1: 'question' is missing; the header has 'que\nstion', answer"),
        (
            "q.csv",
            "answer,question,answer\n1,Which?,Elbe\n",
            ":1: 'answer' is there twice; rename one; the header has an",
        ),
        ("q.csv", "", ":1: 'question' is missing; the header has no columns"),
        ("q.csv", "question,answer\nWhich?,Elbe\nWhy?\n", ":3: this row does not have the header's 2 columns"),
        ("q.csv", "question,answer\nWhich?,Elbe,Oder\n", ":2: this row does not have the header's 2 columns"),
        ("q.csv", "question,answer\nWhich?, \n", ":2: 'answer' must be text or a number"),
        ("q.csv", "question,answer\n", " has no problems"),
        ("q.csv", "question,answer\n" + "x" * 10_000_001 + ",1\n", ":1: a field of more than 10,000,000 characters"),
        ("q.jsonl", '{"question": "Which?"}\n', ":1: 'answer' is missing; this row has question"),
        ("q.jsonl", '{"question": "Which?", "answer": null}\n', ":1: 'answer' must be text or a number"),
        ("q.jsonl", '{"question": " ", "answer": "Elbe"}\n', ":1: 'question' must be text or a number"),
    ],
)
def test_malformed_files(tmp_path, name, text, message):
    """The message names file, line and what the row has."""
    path = write(tmp_path / name, text)
    with pytest.raises(UserError) as error:
        load("test", path, None, 0)
    assert str(error.value).startswith(path + message)


def test_a_long_field_of_a_csv_is_read(tmp_path):
    """Longer than Python's own limit of 131,072 characters."""
    path = write(tmp_path / "q.csv", "question,answer\n" + "x" * 200_000 + ",1\n")
    assert len(load("test", path, None, 0)[0].columns["question"]) == 200_000


def test_missing_files(tmp_path):
    """There is nothing to load without a file; bytes that are no text are told from a missing one."""
    with pytest.raises(UserError) as error:
        load("test", None, None, 0)
    assert str(error.value) == f"task qa has no questions of its own; {INSTEAD}"
    for name in ("none.csv", "none.jsonl"):
        with pytest.raises(UserError, match=r"none.*: cannot be read \(No such file or directory\)"):
            load("test", str(tmp_path / name), None, 0)
    with pytest.raises(UserError, match=r"^foo.txt: cannot be read"):
        load("test", "foo.txt", None, 0)
    (tmp_path / "latin.csv").write_bytes(b"question,answer\n\xe9,1\n")
    with pytest.raises(UserError, match=r"cannot be read \(not UTF-8 text\)"):
        load("test", str(tmp_path / "latin.csv"), None, 0)


@pytest.mark.parametrize(
    ("gold", "is_number"),
    [
        *[
            ("18", True),
            ("$1,234", True),
            ("75%", True),
            ("3/4", True),
            (r"\frac{3}{4}", True),
            ("-0.5", True),
        ],
        *[
            ("Apollo 11", False),
            ("7 samurai", False),
            ("18 dollars", False),
            ("2-1", False),
            ("10:30", False),
        ],
        *[("Elbe", False), ("?", False), ("1e5", False)],
    ],
)
def test_which_gold_answers_are_numbers(gold, is_number):
    """A number has no words beside it."""
    assert (gold_number(gold) is not None) == is_number


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("1,094", "It is 1094.0 km", "correct"),
        ("1,094", r"\boxed{1{,}094 \text{ km}}", "correct"),
        ("1,094", "1,095", "wrong_value"),
        ("1,094", r"\boxed{long}", "not_a_number"),
        ("1,094", "no idea", "no_answer"),
        ("Elbe", "Elbe", "correct"),
        ("Elbe", "I think so.\n\n  the answer is: **ELBE**.  ", "correct"),
        ("Elbe", "#### Elbe", "correct"),
        ("Elbe", r"\boxed{\text{Elbe}}", "correct"),
        ("Elbe", "<answer>\nElbe\n</answer>\nHope this helps!", "correct"),
        ("Elbe", "Oder, then Elbe", "wrong_value"),
        ("Elbe", "<think>Oder?</think>\nElbe", "correct"),
        ("Elbe", "<think>Elbe", "no_answer"),
        ("Elbe", "<think><answer>Elbe</answer>", "correct"),
        ("Elbe", "<think>Elbe</think>\n ", "no_answer"),
        ("Elbe", "", "no_answer"),
        ("Apollo 11", "apollo  11", "correct"),
        ("Apollo 11", "Soyuz 11", "wrong_value"),
        ("10:30", "10:30", "correct"),
        ("10:30", "10:31", "wrong_value"),
        ("5x - 7y + 11z + 4 = 0", "0", "wrong_value"),
        ("5x - 7y + 11z + 4 = 0", r"\boxed{x + y = 0}", "wrong_value"),
        ("a=3, b=4", "4", "wrong_value"),
        ("2", r"\boxed{2k}", "wrong_value"),
        ("3", r"\boxed{3R^2}", "not_a_number"),
        ("5", r"\boxed{x=5}", "correct"),
        ("1, -2", "1,-2", "correct"),
        ("(1,2)", "(1, 2)", "correct"),
        ("(3,4]", "[3,4)", "wrong_value"),
        (r"\frac{\pi}{4}", r"so it is $\dfrac{\pi}{4}$, \boxed{\dfrac{ \pi }{4}}", "correct"),
        ("1, 234", "1,234", "wrong_value"),
        ("Paris", "\\boxed{Paris}\nI put it in \\boxed as asked.", "correct"),
    ],
)
def test_grade(gold, response, verdict):
    """Numbers are judged by value, all else by its text."""
    scores = TASK.grade(parse({"answer": gold}, "x:1"), response)
    assert tuple(scores) == TASK.extractors
    assert scores["tolerant"].verdict == verdict


def test_exact_and_last_number():
    """``exact`` compares the text of a number too; ``last_number`` looks everywhere."""
    scores = TASK.grade(parse({"answer": "18"}, "x:1"), "<think>18")
    assert [scores[name].verdict for name in TASK.extractors] == ["no_answer", "no_answer", "correct"]
    scores = TASK.grade(parse({"answer": "18"}, "x:1"), "18.0")
    assert [scores[name].verdict for name in TASK.extractors] == ["correct", "wrong_value", "correct"]
    scores = TASK.grade(parse({"answer": "Elbe"}, "x:1"), "Elbe, km 12")
    assert scores["last_number"].extracted == "12" and not scores["last_number"].correct


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The answer is Elbe", "elbe"),
        ("So, the final answer: 'Elbe'!", "elbe"),
        ("the answer isotope", "the answer isotope"),
        ("answers", "answers"),
        ("Straße", "strasse"),
        ("New\u00a0 York", "new york"),
        ("C#", "c#"),
        ("C++", "c++"),
        ("#### Elbe", "elbe"),
        ("(b)", "b"),
        ("So, the answer is (B).", "b"),
        ("(Paris, France)", "paris, france"),
        (r"$\left(3,\! \dfrac{\pi}{2} \right)$", r"(3,\frac{\pi}{2})"),
        (r"\( 70 \sqrt{2} \)", r"70\sqrt{2}"),
        (r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}"),
        ("(3,4]", "(3, 4]"),
        ("巴黎。", "巴黎"),
        ("「巴黎」", "巴黎"),
        ("（Ｂ）", "b"),
        ("Don’t know", "don't know"),
        ("1914–1918", "1914-1918"),
        ("cafe\u0301", "café"),
        ("H₂O or x²", "h₂o or x²"),
        (r"5\ \text{km}", "5 km"),
        (r"5\,\text{km}", "5 km"),
        (r"10\,000 \text{ km}", "10000 km"),
        ("New~York", "new york"),
        ("?", "?"),
        ("The answer is", "the answer is"),
    ],
)
def test_same_text(text, same):
    """What does not matter is dropped, and nothing else."""
    assert same_text(text) == same


@pytest.mark.parametrize(
    ("gold", "extractor", "answers", "votes"),
    [
        (
            "Paris",
            "tolerant",
            ["Paris.", "**Paris**", "paris", "Rome", None],
            ["paris", "paris", "paris", "rome", None],
        ),
        ("Apollo 11", "tolerant", ["Gemini 11", "Apollo 11"], ["gemini 11", "apollo 11"]),
        ("11", "tolerant", ["11 men", "11.0", "none.", "none"], ["11", "11", "none", "none"]),
        ("11", "exact", ["11 men", "11.0", "11"], ["11 men", "11.0", "11"]),
    ],
)
def test_votes_are_counted_as_they_are_graded(gold, extractor, answers, votes):
    """What the extractor's comparison takes for one answer is one vote."""
    assert TASK.votes(answers, gold, extractor) == votes
    graded = [TASK.grade(parse({"answer": gold}, "x:1"), f"\\boxed{{{a}}}")[extractor].correct for a in answers if a]
    assert graded == [vote == TASK.same(gold, gold, extractor) for vote in votes if vote]


def test_last_line():
    """Without a mark the last line with text is the answer."""
    assert find_text("first\nsecond \n\n") == "second"
    assert find_text("first\n```\nsecond\n```") == "second"
    assert find_text("?\n") == "?"
    assert find_text(r"\boxed{} second") == r"\boxed{} second"


@pytest.mark.parametrize("piece", ["\\text{", "#", " ", "\n", "the answer is ", "<answer>", "\\boxed{", "'"])
def test_hostile_length(piece):
    """No response takes longer than its length; quadratic would take minutes."""
    problem = parse({"answer": "Elbe"}, "x:1")
    started = time.process_time()
    TASK.grade(problem, piece * (100_000 // len(piece)))
    assert time.process_time() - started < 1


def test_task():
    """The task is found by its name, and asks as the others do."""
    assert get_task("qa") is TASK and TASK.styles == ("plain", "boxed", "thinking")
    for prompt in TASK.prompts.values():
        assert prompt.messages(parse(ROWS[0], "x:1"))[-1]["content"].startswith("Which river?")
