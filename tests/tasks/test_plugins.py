"""Tasks of the user's own: the documented one is used by every command; what is wrong with one is a line naming it."""

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_traces import tasks
from mlx_traces.cli import main
from mlx_traces.errors import UserError
from mlx_traces.tasks import get_task, plugins, task_of
from mlx_traces.tasks.plugins import load

README = Path(tasks.__file__).with_name("README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
NAME = "twenty_four:TASK"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in a folder of one's own, with no plug-in loaded before or after."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(tasks, "_LOADED", {})
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def example(here):
    (here / "twenty_four.py").write_text(EXAMPLE)
    return here / "twenty_four.py"


def run(*words, code=0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done


def write(folder, text, name="mine.py"):
    (folder / name).write_text(text)
    return folder / name


def forget(name):
    """Begin as a new process would."""
    tasks._LOADED.clear()
    sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------- the example


def test_the_example_has_some_thirty_lines():
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 30


def test_the_example_is_evaluated_generated_scored_filtered_and_verified(example):
    ask = ("--task", NAME, "--limit", 3, "--max-tokens", 60)
    run("eval", *ask, "--out", "run")
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and all(row["columns"]["nums"] for row in samples)
    about = json.loads(Path("run/run.json").read_text())
    assert about["identity"]["task"] == NAME
    assert about["identity"]["task_file"].startswith("twenty_four.py ")
    run("generate", *ask, "--samples", 2, "--out", "made.jsonl")
    run("score", "made.jsonl", "--task", NAME, "--out", "scored.jsonl")
    scored = json.loads(Path("scored.manifest.json").read_text())["config"]
    assert scored["task_file"] == about["identity"]["task_file"]
    run("filter", "scored.jsonl", "--task", NAME, "--no-correct-only", "--no-finished", "--out", "kept.jsonl")
    assert run("verify", "run", "made.jsonl", "--task", NAME).output.count("agree") == 2
    row = {"nums": [4, 6], "completion": "<answer>4 * 6</answer>"}
    write(example.parent, json.dumps(row) + "\n", "rows.jsonl")
    assert json.loads(run("grade", "rows.jsonl", "--task", NAME).stdout)["correct"]


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_the_example_trains_nano_and_its_file_is_the_runs(command, example):
    small = ("--num-steps", 1, "--prompts-per-step", 2, "--group-size", 4, "--max-tokens", 120, "--rank", 2)
    run(command, "--task", NAME, *small, "--out", "run", "--save-every", 1)
    about = json.loads(Path("run/run.json").read_text())
    assert about["identity"]["task_file"].startswith("twenty_four.py ")
    assert Path("run/adapter/adapters.safetensors").exists()
    forget("twenty_four")
    example.write_text(EXAMPLE + "# changed\n")
    done = run(command, "--task", NAME, *small, "--out", "run", "--save-every", 1, "--resume", code=1)
    assert "task_file was twenty_four.py " in done.stderr


def test_the_example_in_a_comparison_and_as_a_validation_of_sft(example):
    write(
        example.parent,
        f"tasks: [{{task: '{NAME}', prompts: [thinking], limit: 2, max_tokens: 40}}]\nmodels: [{{model: nano}}]\n",
        "compare.yaml",
    )
    assert "nano" in run("compare", "--config", "compare.yaml", "--format", "csv").stdout
    run("data", "countdown-traces", "--n", 4, "--out", "raw.jsonl")
    write(
        example.parent,
        f"data: raw.jsonl\nrank: 2\nvalid_share: 0\nevaluate: {{task: '{NAME}', limit: 2, max_tokens: 40}}\n",
        "sft.yaml",
    )
    run("sft", "sft.yaml", "--out", "run")
    assert "valid/accuracy" in Path("run/metrics.jsonl").read_text()


# ---------------------------------------------------------------------------------------------- loaded when named


def test_no_file_loads_a_plug_in(example):
    run("generate", "--task", NAME, "--limit", 2, "--samples", 1, "--max-tokens", 40, "--out", "made.jsonl")
    run("eval", "--task", NAME, "--limit", 2, "--max-tokens", 40, "--out", "run")
    forget("twenty_four")
    for words in (("score", "made.jsonl", "--out", "s.jsonl"), ("verify", "run"), ("verify", "made.jsonl")):
        done = run(*words, code=1)
        assert "its task twenty_four:TASK is code that is not part of mlx-traces; to run it, pass --task" in done.stderr
        assert "twenty_four" not in sys.modules
    assert "nano" in run("compare", "run", "--format", "csv").stdout
    assert "twenty_four" not in sys.modules


def test_a_task_in_a_file_that_does_not_exist():
    with pytest.raises(UserError, match="^f:1: unknown task 'gsm': choose gsm8k, countdown, math, qa or module:TASK"):
        task_of("gsm", "f:1")
    assert task_of("gsm8k", "f:1") is get_task("gsm8k")


def test_an_installed_package_adds_a_task_by_name(example, monkeypatch):
    points = [EntryPoint("twenty-four", NAME, plugins.GROUP), EntryPoint("gsm8k", NAME, plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == plugins.GROUP else [])
    assert plugins.names() == ["twenty-four"]  # none takes the place of ours
    assert get_task("gsm8k").source == ""
    with pytest.raises(UserError, match="choose gsm8k, countdown, math, qa, twenty-four or module:TASK"):
        get_task("twenty-fuor")
    assert "twenty_four" not in sys.modules
    task = get_task("twenty-four")
    assert task.name == "twenty-four" and task.source.startswith("twenty_four.py ")
    assert get_task("twenty-four") is task


# ---------------------------------------------------------------------------------------------- faults

BAD = [
    (
        "import nothing_of_this_name\n" + EXAMPLE,
        r"mine.py: cannot be imported as a task \(.*nothing_of_this_name.*line 1\)",
    ),
    ("raise ValueError('no\\nwork')", r"mine.py: cannot be imported as a task \(ValueError: no, line 1\)"),
    ("raise SystemExit(3)", r"mine.py: cannot be imported as a task \(SystemExit: 3, line 1\)"),
    ("def broken(:", r"mine.py: cannot be imported as a task \(SyntaxError: "),
    ("x = 1", r"mine.py: TASK must be a mlx_traces.tasks.Task; there is none"),
    ("TASK = {'grade': print}", r"mine.py: TASK must be a mlx_traces.tasks.Task; it is a dict"),
    (EXAMPLE.replace("    grade=grade,\n", ""), r"mine.py: cannot be imported as a task \(.*'grade'.*line \d+\)"),
    (EXAMPLE.replace("grade=grade", "grade=None"), r"mine.py: TASK.grade must be a function, not 'None'"),
    (
        EXAMPLE.replace(' columns=("nums",)', ' columns="nums"'),
        r"mine.py: TASK.columns must be a tuple of names, not 'nums'",
    ),
    (
        EXAMPLE.replace(' columns=("nums",)', " columns=(1,)"),
        r"mine.py: TASK.columns must be a tuple of names; \(1,\) has one that is no text",
    ),
    (
        EXAMPLE.replace("    grade=grade,", "    grade=grade,\n    few_shot=None,"),
        r"mine.py: TASK.few_shot must be a dict of functions by name, not 'None'",
    ),
    (EXAMPLE.replace('extractors=("answer",)', "extractors=()"), r"mine.py: TASK.extractors must name one extractor"),
    (EXAMPLE.replace('{"thinking":', '{"other":'), r"mine.py: TASK.prompts: 'other' must be a Prompt of that name"),
    (
        EXAMPLE.replace('default_prompt="thinking"', 'default_prompt="x"'),
        r"mine.py: TASK.default_prompt: .* no prompt 'x'",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[8:50] for _, message in BAD])
def test_a_plug_in_that_cannot_be_used(here, text, message):
    assert text != EXAMPLE
    write(here, text)
    with pytest.raises(UserError, match=message) as caught:
        load("mine:TASK")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(here))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_there:TASK", "task not_there:TASK: no module 'not_there' is here or installed"),
        ("json.not_there:TASK", "task json.not_there:TASK: no module 'json.not_there' is here or installed"),
        ("mine:", "task mine:: give a module and a name in it, as in my_task:TASK"),
        ("./mine.py:TASK", "task ./mine.py:TASK: give a module and a name in it"),
        ("os:system", r".*os.py: system must be a mlx_traces.tasks.Task; it is a builtin_function"),
    ],
)
def test_names_that_name_no_task(name, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lambda *given: 1 / 0", r"mine.py: few_shot failed for fs \(ZeroDivisionError: division by zero, line \d+\)"),
        ("lambda *given: 'x'", r"mine.py: few_shot returned 'x' for fs; it must return a Prompt"),
    ],
)
def test_a_few_shot_function_that_fails(here, function, message):
    write(here, EXAMPLE.replace("    grade=grade,", f'    grade=grade,\n    few_shot={{"fs": {function}}},'))
    with pytest.raises(UserError, match=message):
        load("mine:TASK").prompt("fs", (1, 0, None, frozenset()))


GRADES = [
    ("1 / 0", r"grade failed on 24-1-2-3 \(ZeroDivisionError: division by zero, line \d+\)"),
    ("raise SystemExit", r"grade failed on 24-1-2-3 \(SystemExit, line \d+\)"),
    ("return True", r"grade returned 'True' for 24-1-2-3; it must return a dict with a Score for each of answer"),
    ("return {}", r"grade returned '{}' for 24-1-2-3"),
    ("return {'answer': 1}", r"grade returned \"{'answer': 1}\" for 24-1-2-3"),
    ("return {'answer': Score(True, None)}", r"grade returned .* for 24-1-2-3"),
    ("return {'other': Score('correct', '1')}", r"grade returned .* for 24-1-2-3"),
]


@pytest.mark.parametrize(("body", "message"), GRADES, ids=[body for body, _ in GRADES])
def test_a_grader_that_raises_or_returns_a_wrong_type(here, body, message):
    file = write(here, EXAMPLE.replace("    found = last_answer_tag(response)", f"    {body}\n    found = None"))
    task = load("mine:TASK")
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: {message}") as caught:
        task.grade(task.parse({"nums": [1, 2, 3]}, "f:1"), "x")
    assert "\n" not in str(caught.value)


def test_other_functions_that_fail(here):
    file = re.escape(str(write(here, EXAMPLE.replace('"24-" + ', "").replace("answer.replace", "answer.nothing"))))
    task = load("mine:TASK")
    with pytest.raises(UserError, match=rf"^{file}: parse failed on f:1 \(KeyError: 'nums', line \d+\)"):
        task.parse({}, "f:1")
    with pytest.raises(UserError, match=rf"^{file}: same failed on '1\+1' \(AttributeError: .*line \d+\)"):
        task.same("1+1", "24", "answer")
    write(here, EXAMPLE.replace('return load_rows((("generated"', 'return len((("generated"'), "other.py")
    with pytest.raises(UserError, match=r"other.py: load failed \(TypeError: .*line \d+\)"):
        load("other:TASK").load("train", None, 2, 0)
    write(here, EXAMPLE.replace("    made = ", "    return []\n    made = "), "empty.py")
    with pytest.raises(UserError, match=r"empty.py: load returned '\[\]' for split 'train'; it must return a list of"):
        load("empty:TASK").load("train", None, 2, 0)


def test_steps_of_a_plug_in(here):
    text = EXAMPLE.replace("    grade=grade,\n", "    grade=grade,\n    steps=steps,\n")
    write(
        here, "def steps(problem, thought):\n    return {'ends': [(0, len(thought), 1)]} if thought else 1 / 0\n" + text
    )
    task = load("mine:TASK")
    problem = task.parse({"nums": [1, 2, 3]}, "f:1")
    assert task.steps(problem, "abc") == {"ends": [(0, 3, 1)]}
    with pytest.raises(UserError, match=r"mine.py: steps failed on 24-1-2-3 \(ZeroDivisionError: .*line 2\)"):
        task.steps(problem, "")
    write(here, text.replace("steps=steps", "steps=3"), "three.py")
    with pytest.raises(UserError, match=r"three.py: TASK.steps must be a function, not '3'"):
        load("three:TASK")
    write(here, text.replace("steps=steps", "steps=lambda problem, thought: [1]"), "list.py")
    with pytest.raises(
        UserError, match=r"list.py: steps returned '\[1\]' for 24-1-2-3; it must return a dict with a list"
    ):
        load("list:TASK").steps(problem, "x")
    write(here, EXAMPLE, "none.py")
    assert load("none:TASK").steps is None and load("none:TASK").in_split is None


def test_the_split_of_an_id_of_a_plug_in(here):
    own = 'in_split=lambda name, split, data: {"in": True, "out": False, "odd": 1}[name]'
    write(here, EXAMPLE.replace("    grade=grade,\n", f"    grade=grade,\n    {own},\n"))
    in_split = load("mine:TASK").in_split
    assert in_split("in", "test", None) is True and in_split("out", "test", None) is False
    with pytest.raises(UserError, match="mine.py: in_split returned '1' for odd; it must return True or False"):
        in_split("odd", "test", None)
    with pytest.raises(UserError, match=r"mine.py: in_split failed on none \(KeyError: "):
        in_split("none", "test", None)


def test_a_user_error_of_a_plug_in_is_its_own_line(here):
    text = EXAMPLE.replace("    made = ", "    raise UserError('no network today')\n    made = ")
    write(here, f"from mlx_traces.errors import UserError\n{text}")
    done = run("eval", "--task", "mine:TASK", code=1)
    assert done.stderr == "Error: no network today\n"
