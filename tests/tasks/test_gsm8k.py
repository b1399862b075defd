"""GSM8K: gold answers, sources, splits, prompt styles and verdicts, on invented problems."""

import json
import sys
from types import SimpleNamespace

import pytest

from mlx_traces.errors import UserError
from mlx_traces.tasks import get_task
from mlx_traces.tasks.gsm8k import INSTEAD, TASK, load, parse

ROWS = [
    {
        "question": f"A crate holds {n} jars. How many do 3 crates hold?",
        "answer": f"3*{n}=<<3*{n}={3 * n}>>\n#### {3 * n}",
    }
    for n in range(400, 410)
]


@pytest.fixture
def file(tmp_path):
    """A file of ten problems."""
    path = tmp_path / "jars.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves the ten problems and notes what it was asked for."""
    asked = []

    def load_dataset(name, config=None, split=None, revision=None):
        asked.append((name, config, split, revision))
        return ROWS

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(
            load_dataset=load_dataset,
            disable_progress_bars=lambda: None,
            config=SimpleNamespace(HF_HUB_OFFLINE=False),
        ),
    )
    monkeypatch.setattr("mlx_traces.runtime.hub.switched_off", lambda: False)
    monkeypatch.setattr("mlx_traces.runtime.hub.fault", lambda: "")
    return asked


def questions(problems):
    """Return the problems' places among the rows."""
    return [int(problem.columns["question"].split()[3]) - 400 for problem in problems]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Half of 36 is <<36/2=18>>18.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### 1,20,000", "120000"),
        ("#### 3 was a slip\n#### -5 ", "-5"),
        ("18", "18"),
        ("1,234.5", "1234.5"),
        (18, "18"),
        (2.5, "2.5"),
        ("3/4", "3/4"),
    ],
)
def test_gold(answer, gold):
    """The gold answer is the number after ####, or the answer itself."""
    assert parse({"answer": answer}, "x:1").gold == gold


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "no idea"}, "x:7: 'answer' has no number, alone or after ####: 'no idea'"),
        ({"answer": "18\n####"}, "x:7: 'answer' has no number"),
        ({"answer": "2 and 3"}, "x:7: 'answer' has no number"),
        ({"answer": "#### 3,5"}, "x:7: 'answer' has no number"),
        ({"answer": "12,50"}, "x:7: 'answer' has no number"),
        ({"answer": "1.234,56"}, "x:7: 'answer' has no number"),
        ({"answer": "  "}, "x:7: 'answer' must be text or a number"),
        ({"answer": None}, "x:7: 'answer' must be text or a number, not 'None'"),
        ({"answer": True}, "x:7: 'answer' must be text or a number, not 'True'"),
        ({"answer": [18]}, "x:7: 'answer' must be text or a number, not '[18]'"),
        ({"answer": float("nan")}, "x:7: 'answer' has no number"),
        ({"question": "Why?", "solution": "18"}, "x:7: 'answer' is missing; this row has question, solution"),
        ({"question": {}, "answer": "18"}, "x:7: 'question' must be text"),
    ],
)
def test_malformed_rows(row, message):
    """A malformed row is named by its place."""
    with pytest.raises(UserError) as error:
        parse(row, "x:7")
    assert str(error.value).startswith(message)


def test_ids_follow_the_question():
    """The same question has the same id, whatever its answer's wording or other columns."""
    first = parse({"question": "How many?", "answer": "#### 1"}, "a:1")
    assert first.id == parse({"question": "How many?", "answer": "1", "source": "b"}, "b:9").id
    assert first.id != parse({"question": "How much?", "answer": "#### 1"}, "a:2").id
    assert first.id.startswith("gsm8k-")


def test_grade_by_every_extractor():
    """Four verdicts, of which each can differ from the others."""
    problem = parse({"answer": "#### 1,800"}, "x:1")
    scores = TASK.grade(problem, r"#### 17 at first. \boxed{\$1,800.00} in 2 days.")
    assert tuple(scores) == TASK.extractors
    assert {name: score.verdict for name, score in scores.items()} == {
        "tolerant": "correct",
        "strict": "wrong_value",
        "flexible": "wrong_value",
        "last_number": "wrong_value",
    }
    assert {name: score.extracted for name, score in scores.items()} == {
        "tolerant": r"\$1,800.00",
        "strict": "17",
        "flexible": "2",
        "last_number": "2",
    }
    assert TASK.grade(problem, "#### 1,800")["strict"].correct
    assert TASK.grade(problem, "It is $1,800.")["flexible"].correct
    assert TASK.grade(problem, "It is 1800.0")["last_number"].correct
    assert not TASK.grade(problem, "It is 1800.0")["flexible"].correct
    assert TASK.grade(problem, "<think>1800")["tolerant"].verdict == "no_answer"
    assert TASK.grade(problem, r"\boxed{many}")["tolerant"].verdict == "not_a_number"


def test_worked_solutions_are_right():
    """Every gold solution, given as a response, is correct by every extractor."""
    for row in ROWS:
        scores = TASK.grade(parse(row, "x:1"), row["answer"])
        assert all(score.correct for score in scores.values())


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("test", range(10)),
        ("test[:3]", range(3)),
        ("test[7:]", range(7, 10)),
        ("train[2:5]", range(2, 5)),
        ("test[8:100]", range(8, 10)),
    ],
)
def test_slices_of_files_and_hub(split, places, file, hub):
    """A part of a split is the same part of a file and of the hub."""
    assert questions(load(split, file, None, 0)) == list(places)
    assert not hub
    assert questions(load(split, None, None, 0)) == list(places)
    assert hub == [("openai/gsm8k", "main", split.partition("[")[0], None)]


def test_limit_is_a_seeded_sample(file):
    """The sample has the source's order, repeats with its seed, and differs with another."""
    samples = [questions(load("test", file, 5, seed)) for seed in (0, 0, 1, 2)]
    assert samples[0] == samples[1] == sorted(samples[0])
    assert len({tuple(sample) for sample in samples}) > 1
    assert all(len(set(sample)) == 5 for sample in samples)


def test_hub_names(hub):
    """Another revision keeps the configuration; another data set has its own splits."""
    load("test", "openai/gsm8k@abc", None, 0)
    load("validation", "someone/jars", None, 0)
    assert hub == [("openai/gsm8k", "main", "test", "abc"), ("someone/jars", None, "validation", None)]


def test_hub_rows_are_checked(hub, monkeypatch):
    """A hub data set with other columns is refused by its first row."""
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: [{"prompt": "?", "answer": "1"}])
    with pytest.raises(UserError, match=r"^someone/jars\[0\]: 'question' is missing; this row has prompt, answer$"):
        load("test", "someone/jars", None, 0)


@pytest.mark.parametrize("data", [None, "someone/jars"])
def test_no_network(data, hub, monkeypatch):
    """Without network the message ends with what to pass instead."""

    monkeypatch.setattr("mlx_traces.runtime.hub.fault", lambda: "no answer")
    monkeypatch.setattr("mlx_traces.tasks.data._downloaded", lambda *_: None)
    with pytest.raises(UserError) as error:
        load("test", data, None, 0)
    reason = "no network or hub not reachable: no answer"
    told = f"{data or 'openai/gsm8k'} could not be downloaded ({reason}), and was not downloaded before; {INSTEAD}"
    assert str(error.value) == told
    assert INSTEAD == 'pass --data FILE with one {"question", "answer"} object per line'


@pytest.mark.parametrize(
    ("split", "data", "limit", "message"),
    [
        ("tset", None, None, "unknown split 'tset': choose train or test; did you mean 'test'?"),
        ("test[5]", None, None, "unknown split 'test[5]'"),
        ("test[:10%]", None, None, "unknown split 'test[:10%]'"),
        ("test[20:]", "FILE", None, "FILE has no problems"),
        ("test[:4]", "FILE", 5, "--limit 5 is more than FILE has: 4 problems"),
        ("test", "missing.jsonl", None, "missing.jsonl: cannot be read (No such file or directory)"),
        ("test", "foo.txt", None, "foo.txt: cannot be read (No such file or directory)"),
        ("test", "a/b/missing", None, "a/b/missing: cannot be read (No such file or directory)"),
        ("test", "a/missing.jsonl", None, "a/missing.jsonl: cannot be read (No such file or directory)"),
    ],
)
def test_bad_sources(split, data, limit, message, file, hub):
    """Unknown splits list the choices; empty or missing sources are named."""
    with pytest.raises(UserError) as error:
        load(split, file if data == "FILE" else data, limit, 0)
    assert str(error.value).startswith(message.replace("FILE", file))


def test_file_without_question(tmp_path):
    """A row that cannot be asked is named by file and line."""
    path = tmp_path / "jars.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps({"answer": "18", "solution": "?"}) + "\n")
    with pytest.raises(UserError) as error:
        load("test", str(path), None, 0)
    assert str(error.value) == f"{path}:3: 'question' is missing; this row has answer, solution"


def test_prompt_styles():
    """Each style puts the question, and asks for what the grader reads."""
    problem = parse({"question": "How many {jars}?", "answer": "18"}, "x:1")
    assert TASK.default_prompt == "plain"
    assert TASK.styles == ("plain", "boxed", "hash", "brief", "thinking", "fewshot", "fewshot-chat")
    asked = {name: prompt.messages(problem) for name, prompt in TASK.prompts.items()}
    assert asked["plain"] == [{"role": "user", "content": "How many {jars}?"}]
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    assert asked["boxed"] == [{"role": "system", "content": system}, *asked["plain"]]
    for name, words in {
        "hash": ["####"],
        "brief": ["one or two short sentences", "####"],
        "thinking": ["<think>", "</think>", "<answer>", "</answer>"],
    }.items():
        (turn,) = asked[name]
        assert turn["content"].startswith("How many {jars}?\n")
        assert all(word in turn["content"] for word in words)


def test_fewshot_is_one_text(tmp_path):
    """Questions and worked solutions stand word for word in lm-eval's layout, braces included."""
    rows = [{"question": f"Set {{{n}, x}}?", "answer": f"{{{n}}} <<{n}={n}>>\n#### {n}"} for n in range(6)]
    path = tmp_path / "sets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = TASK.few_shot["fewshot"](2, 3, str(path))
    assert not prompt.chat and prompt.stop == ("Question:", "</s>", "<|im_end|>")
    (turn,) = prompt.messages(parse({"question": "New {x}?", "answer": "1"}, "x:1"))
    shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]
    expected = [a + b + "Question: New {x}?\nAnswer:" for a in shots for b in shots if a != b]
    assert turn["content"] in expected
    chosen = {TASK.few_shot["fewshot"](2, seed, str(path)).user for seed in range(5)}
    assert len(chosen) > 1 and TASK.few_shot["fewshot"](2, 3, str(path)) == prompt


def test_fewshot_as_chat(file):
    """The same examples as turns of a chat."""
    prompt = TASK.few_shot["fewshot-chat"](3, 1, file)
    turns = prompt.messages(parse({"question": "New?", "answer": "1"}, "x:1"))
    assert prompt.chat and [turn["role"] for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    answers = {f"Question: {row['question']}\nAnswer:": row["answer"] for row in ROWS}
    assert all(answers[user["content"]] == shot["content"] for user, shot in zip(turns[::2], turns[1::2], strict=False))
    assert turns[-1]["content"] == "Question: New?\nAnswer:"
    one_text = TASK.few_shot["fewshot"](3, 1, file).user
    assert [one_text.index(user) for user, _ in prompt.shots] == sorted(
        one_text.index(user) for user, _ in prompt.shots
    )


def test_fewshot_draws_from_train(hub):
    """Without a file the examples are the hub's training problems."""
    assert len(TASK.few_shot["fewshot-chat"](10, 0, None).shots) == 10
    assert hub == [("openai/gsm8k", "main", "train", None)]
    assert TASK.few_shot["fewshot"](0, 0, None).user == "Question: {question}\nAnswer:"
    with pytest.raises(UserError, match=r"^--shots 11: openai/gsm8k has 10 to choose from; take fewer$"):
        TASK.few_shot["fewshot"](11, 0, None)
    with pytest.raises(UserError, match=r"^--shots -1: "):
        TASK.few_shot["fewshot"](-1, 0, None)


@pytest.mark.parametrize("style", ["fewshot", "fewshot-chat"])
def test_no_example_is_asked_itself(style, tmp_path):
    """Problems to be asked are left out, which changes no other example; repeated ones are drawn once."""
    path = tmp_path / "jars.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS + ROWS))
    build, ids = TASK.few_shot[style], [parse(row, "x:1").id for row in ROWS]
    every = build(10, 1, str(path))
    for row, identity in zip(ROWS, ids, strict=True):
        prompt = build(9, 1, str(path), leave_out=frozenset([identity + "#2"]))
        shown = prompt.user + "".join(user for user, _ in prompt.shots)
        assert [other["question"] in shown for other in ROWS] == [other is not row for other in ROWS]
        assert build(10, 1, str(path), leave_out=frozenset(["gsm8k-0"])) == every
    with pytest.raises(UserError, match=r"^--shots 2: .* has 1 to choose from; .*--shots-data FILE$"):
        build(2, 1, str(path), leave_out=frozenset(ids[1:]))


def test_fewshot_without_network(hub, monkeypatch):
    """The message names the option of the examples."""

    def fail(*_, **__):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    with pytest.raises(UserError, match=r'pass --shots-data FILE with one {"question", "answer"} object per line$'):
        TASK.few_shot["fewshot"](5, 0, None)


def test_get_task():
    """The task is found by its name."""
    assert get_task("gsm8k") is TASK
    with pytest.raises(UserError, match=r"^unknown task 'gsm8': choose gsm8k, countdown, math, qa or module:TASK; did"):
        get_task("gsm8")


def test_votes_by_value_and_as_lm_eval_compares():
    found = ["$18", "18.00", None, "nothing  found"]
    assert TASK.votes(found, "18", "tolerant") == ["18", "18", None, "nothing found"]
    assert TASK.votes(found[:3], "18", "strict") == ["18", "18.00", None]
