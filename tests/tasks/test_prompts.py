"""Prompt templates and rows of problems."""

import json
import math
import sys

import pytest

from mlx_traces.config import EvalConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.readers import is_file, read_jsonl
from mlx_traces.records import Problem
from mlx_traces.tasks import get_task
from mlx_traces.tasks.data import content_id, hub_rows, load_rows, split_slice, text_column
from mlx_traces.tasks.prompts import Prompt, fill, load_prompt
from mlx_traces.traces.importing import import_traces
from mlx_traces.yaml_files import read_yaml

PROBLEM = Problem("p-1", {"question": "Use {x}?", "nums": [1, 2]}, "3")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {question}", "Q: Use {x}?"),
        ("{nums} {nums}", "[1, 2] [1, 2]"),
        (r"\boxed{}", r"\boxed{}"),
        ("{{question}}", "{question}"),
        ("{{{nums}}}", "{[1, 2]}"),
        ("{ question } {a b}", "{ question } {a b}"),
        ("", ""),
    ],
)
def test_fill(template, text):
    """Columns are put in once; what a column holds is not a template."""
    assert fill(template, PROBLEM.columns, "mine") == text


def test_fill_unknown_column():
    """A placeholder that is no column is named with the columns there are."""
    with pytest.raises(UserError) as error:
        fill("{questoin}", PROBLEM.columns, "mine")
    assert str(error.value) == (
        "prompt mine: {questoin} is not a column; the problems have question, nums "
        "(write {{questoin}} for literal braces)"
    )


def test_messages():
    """System, examples and question in this order; system and examples are not templates."""
    prompt = Prompt("mine", user="{question}", system="Be {brief}.", shots=(("a {x}", "b"),))
    assert [(turn["role"], turn["content"]) for turn in prompt.messages(PROBLEM)] == [
        ("system", "Be {brief}."),
        ("user", "a {x}"),
        ("assistant", "b"),
        ("user", "Use {x}?"),
    ]
    assert Prompt("mine", user="{question}").messages(PROBLEM) == [{"role": "user", "content": "Use {x}?"}]


def test_load_prompt(tmp_path):
    """A prompt file has the fields of a prompt and takes its name from the file."""
    path = tmp_path / "mine.yaml"
    path.write_text("user: 'Ä {question}'\nsystem: Be brief.\nprefill: <think>\nstop: [END, 7]\nchat: false\n", "utf-8")
    assert load_prompt(path) == Prompt(
        "mine", "Ä {question}", system="Be brief.", prefill="<think>", stop=("END", "7"), chat=False
    )
    path.write_text("user: '{question}'\n")
    assert load_prompt(path) == Prompt("mine", "{question}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("system: Be brief.\n", "a prompt needs a 'user' template"),
        ("- user\n", "expected 'field: value' lines, found list"),
        ("", "expected 'field: value' lines, found NoneType"),
        (
            "user: '{question}'\nsytem: x\n",
            "unknown field 'sytem'; a prompt has user, system, prefill, stop, chat, show_gold",
        ),
        ("user: 7\n", "'user' must be a str, not 7"),
        ("user: x\nstop: END\n", "'stop' must be a list, not 'END'"),
        ("user: x\nchat: 'no'\n", "'chat' must be a bool, not 'no'"),
    ],
)
def test_malformed_prompt_files(tmp_path, text, message):
    """The message names the file and the fault."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_prompt(path)
    assert str(error.value).startswith(f"{path}: {message}")
    path.write_text("user: [\n")
    with pytest.raises(UserError, match=r"mine.yaml:2: not YAML from column 1 on"):
        load_prompt(path)
    with pytest.raises(UserError, match=r"none.yaml: no such prompt file"):
        load_prompt(tmp_path / "none.yaml")


def test_a_prompt_shows_the_answer_only_where_it_says_so(tmp_path):
    """Of every task, wherever own prompts are read; the result of a run with one says so."""
    path, data = tmp_path / "mine.yaml", tmp_path / "q.jsonl"
    data.write_text('{"question": "Q?", "answer": "4"}\n')
    for task in ("gsm8k", "qa"):
        config = EvalConfig(task=task, data=str(data), prompt=str(path))
        path.write_text("user: '{question} Hint: {answer}'\n")
        for read in (get_task(task).prompt, lambda _: evaluator.plan(config)):  # noqa: B023
            with pytest.raises(UserError, match="mine.yaml: {answer} would show the model the answer; take it out, or"):
                read(str(path))
        path.write_text("user: '{question} Hint: {answer}'\nshow_gold: true\n")
        assert get_task(task).prompt(str(path)).user == "{question} Hint: {answer}"
        assert evaluator.plan(config).notes == ["the prompt mine shows the model the answer ({answer})"]
        path.write_text("user: '{question} {{answer}}'\nshow_gold: true\n")
        assert get_task(task).prompt(str(path)) == load_prompt(path)
        assert evaluator.plan(config).notes == []
    path.write_text("user: x\nshow_gold: 1\n")
    with pytest.raises(UserError, match="'show_gold' must be a bool, not 1"):
        load_prompt(path)


def test_read_jsonl(tmp_path):
    """Rows come with their place; blank lines count as lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\\u00e9", "b": [2]}\n')
    assert list(read_jsonl(path, ["a"])) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": "é", "b": [2]})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', ":2: not JSON ("),
        ("[1]", ":2: expected an object with a, found list"),
        ("[" * 100_000, ":2: not JSON ("),
        ('{"a": ' + "9" * 5000 + "}", ":2: not JSON ("),
        (r'{"a": "\ud800"}', ":2: not valid Unicode text"),
        (r'{"a": [{"\uDC00 b": 1}]}', ":2: not valid Unicode text"),
        (r'{"b\n": 1, "\u001b[31m": 2}', r":2: 'a' is missing; this row has 'b\n', '\x1b[31m'"),
        ('{"b": 1, "c": 2}', ":2: 'a' is missing; this row has b, c"),
        ("{}", ":2: 'a' is missing; this row has no columns"),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    """The first malformed line ends the reading, with its place and its columns."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        list(read_jsonl(path, ["a"]))
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_escaped_pairs_are_text(tmp_path):
    """Two escapes that make one character are fine, and so is an escaped backslash."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud800"}\n')
    assert [row["a"] for _, row in read_jsonl(path)] == ["\U0001f600", "\\ud800"]


@pytest.mark.parametrize(
    ("data", "file"),
    [
        ("foo.txt", True),
        ("foo", True),
        ("a/foo.JSONL", True),
        ("a/b/c", True),
        ("./foo", True),
        ("~/foo", True),
        ("owner/name", False),
        ("owner/name@refs/pr/1", False),
    ],
)
def test_is_file(data, file):
    """Only owner/name is a hub data set."""
    assert is_file(data) == file


def test_unreadable_files(tmp_path):
    """A missing file, a folder and bytes that are no text."""
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    for name, reason in {
        "none": "No such file",
        ".": "Is a directory",
        "latin.jsonl": "not UTF-8 text",
    }.items():
        with pytest.raises(UserError, match=rf"cannot be read \({reason}"):
            list(read_jsonl(tmp_path / name))


def rows(*names):
    """Number the rows of a source."""
    return [(f"s:{place}", {"a": name}) for place, name in enumerate(names, 1)]


def problem(row, where):
    """Make a problem of a row."""
    return Problem(f"p-{row['a']}", row, row["a"], where)


def test_load_rows():
    """Repeated problems keep separate ids; a sample keeps the order and depends on seed and size alone."""
    ids = [one.id for one in load_rows(rows("x", "y", "x", "x"), problem, None, 0, "s")]
    assert ids == ["p-x", "p-y", "p-x#2", "p-x#3"]
    names = [str(n) for n in range(50)]
    places = [[int(one.gold) for one in load_rows(rows(*names), problem, 20, seed, "s")] for seed in (0, 0, 1)]
    assert places[0] == places[1] == sorted(places[0]) and len(set(places[0])) == 20
    assert places[0] != places[2]
    others = load_rows(rows(*(f"{n}x" for n in range(50))), problem, 20, 0, "s")
    assert [f"{place}x" for place in places[0]] == [one.gold for one in others]
    assert len(load_rows(rows(*names), problem, 50, 0, "s")) == 50


def test_load_rows_refuses():
    """No problems, or fewer than asked for."""
    with pytest.raises(UserError, match=r"^s has no problems$"):
        load_rows([], problem, None, 0, "s")
    with pytest.raises(UserError, match=r"^--limit 3 is more than s has: 2 problems$"):
        load_rows(rows("x", "y"), problem, 3, 0, "s")


@pytest.mark.parametrize(
    ("split", "name", "span"),
    [
        ("test", "test", (None, None)),
        ("test[:64]", "test", (None, 64)),
        ("a[3:5]", "a", (3, 5)),
        ("a[3:]", "a", (3, None)),
    ],
)
def test_split_slice(split, name, span):
    """A split may say which part of it is meant."""
    assert split_slice(split) == (name, slice(*span))


@pytest.mark.parametrize("split", ["", "test[", "test[5]", "test[::2]", "test[-5:]", "test[:10%]", "[:5]", "test[:5]x"])
def test_split_slice_refuses(split):
    """Other forms are refused with an example."""
    with pytest.raises(UserError, match=r"^unknown split .*'test\[:64\]'"):
        split_slice(split)


def test_text_column():
    """Numbers are text; a default is for a missing column, not for a malformed one."""
    assert text_column({"a": 1.5}, "a", "s:1") == "1.5"
    assert text_column({}, "a", "s:1", default="") == ""
    for value in (None, "", " ", [], True):
        with pytest.raises(UserError, match=r"^s:1: 'a' must be text or a number, not "):
            text_column({"a": value}, "a", "s:1", default="")
    with pytest.raises(UserError, match=r"^s:1: 'a' is missing; this row has b$"):
        text_column({"b": 1}, "a", "s:1")


class FakeHub:
    """A client of the hub that serves one row, or raises, and notes what it was asked."""

    def __init__(self, fault=None):
        self.fault, self.asked = fault, []

    def disable_progress_bars(self):
        """Do nothing."""

    def load_dataset(self, *names, **options):
        """Serve the row or raise the fault."""
        self.asked.append((names, options))
        if self.fault:
            raise self.fault
        return [{"a": 1}]


def test_hub_rows(monkeypatch):
    """Rows come with their place; a revision stands after @."""
    client = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", client)
    monkeypatch.setattr("mlx_traces.runtime.hub.switched_off", lambda: False)
    monkeypatch.setattr("mlx_traces.runtime.hub.fault", lambda: "")
    assert list(hub_rows("o/n@r1", "main", "test", "")) == [("o/n[0]", {"a": 1})]
    assert client.asked == [(("o/n", "main"), {"split": "test", "revision": "r1"})]
    assert list(hub_rows("o/n", None, "test", "", lambda size: range(size)[1:])) == []
    assert list(hub_rows("o/n", None, "test", "", lambda size: range(size)[:5])) == [("o/n[0]", {"a": 1})]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (RuntimeError("gated\ndata set"), "gated data set"),
        (ValueError("Unknown split 'tset'.\n" + "x" * 999), "Unknown split 'tset'. " + "x" * 138),
    ],
)
def test_hub_faults(monkeypatch, fault, reason):
    """Whatever the hub's client raises becomes one line with a way out."""
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(fault))
    monkeypatch.setattr("mlx_traces.runtime.hub.switched_off", lambda: False)
    monkeypatch.setattr("mlx_traces.runtime.hub.fault", lambda: "")
    with pytest.raises(UserError) as error:
        list(hub_rows("o/n@main", None, "test", "pass X"))
    assert str(error.value) == f"o/n could not be downloaded ({reason}); pass X"


def test_content_id():
    """The id depends on the parts and where they end, and takes any text."""
    assert content_id("t", "ab", "c") == content_id("t", "ab", "c") != content_id("t", "a", "bc")
    assert len(content_id("t", json.loads('"\\ud800"'))) == len("t-") + 10


def test_a_mark_of_byte_order_is_passed_over_in_every_format(tmp_path):
    """Also where files with one were put together; it is neither text nor part of a key."""
    mark, line = "\ufeff", '{"question": "Q?", "answer": "A"}\n'
    (tmp_path / "q.jsonl").write_text(mark + line + "\n" + mark + line + mark, "utf-8")
    (tmp_path / "q.json").write_text(f"{mark}[{line}]", "utf-8")
    (tmp_path / "q.csv").write_text(f"{mark}question,answer\nQ?,A\n", "utf-8")
    wanted = {"question": "Q?", "answer": "A"}
    for name, count in {"q.jsonl": 2, "q.json": 1, "q.csv": 1}.items():
        assert [one.columns for one in get_task("qa").load("test", str(tmp_path / name), None, 0)] == [wanted] * count
    (tmp_path / "mine.yaml").write_text(f"{mark}user: hello\n", "utf-8")
    assert load_prompt(tmp_path / "mine.yaml").user == "hello"
    (tmp_path / "t.txt").write_text(f"{mark}one\n\n{mark}two\n", "utf-8")
    assert [trace.completion for trace in import_traces(str(tmp_path / "t.txt"), "text")] == ["one", "two"]


def test_a_mark_of_byte_order_at_the_start_of_a_text_in_a_row_is_no_part_of_it(tmp_path):
    """Files of which each was read with its mark, and then put in a row; in any format, at any reasonable depth."""
    mark, turn = "\ufeff", {"role": "assistant", "content": "\ufeff<think>\nso\n</think>\n4"}
    turns = [{"role": "system", "content": f"{mark}s"}, {"role": "user", "content": f"{mark}{mark}2 + 2?"}, turn]
    row = {"question": f"{mark}Q?", "answer": f"{mark}A", "messages": turns, "deep": json.loads("[" * 400 + "]" * 400)}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    (tmp_path / "q.json").write_text(json.dumps([row]), "utf-8")
    (tmp_path / "q.csv").write_text(f'{mark}question,answer\n{mark}Q?,"{mark}A"\n', "utf-8")
    for name, count in {"q.jsonl": 2, "q.json": 1, "q.csv": 1}.items():
        problems = get_task("qa").load("test", str(tmp_path / name), None, 0)
        assert [(one.columns["question"], one.gold) for one in problems] == [("Q?", "A")] * count
        made = list(import_traces(str(tmp_path / name), "messages")) if name != "q.csv" else []
        assert all(trace.completion == "<think>\nso\n</think>\n4" for trace in made)
        assert all([turn["content"] for turn in trace.messages] == ["s", "2 + 2?"] for trace in made)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    """Excel and Windows tools write UTF-16; the message says so, whatever the format."""
    for name, content in {
        "q.jsonl": "{}\n",
        "q.json": "[{}]",
        "q.csv": "question,answer\n",
        "q.yaml": "user: x",
    }.items():
        path = tmp_path / name
        path.write_text(content, encoding)
        with pytest.raises(UserError) as error:
            load_prompt(path) if name == "q.yaml" else get_task("qa").load("test", str(path), None, 0)
        assert str(error.value) == f"{path}: is {encoding.upper()[:6]}; save it as UTF-8"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know_are_refused(tmp_path, number):
    """With file and line; in quotes they are texts."""
    fine, bad = '{"question": "NaN, Infinity?", "answer": "NaN"}', f'{{"question": "Q?", "answer": {number}}}'
    (tmp_path / "q.jsonl").write_text(f"{fine}\n\n{bad}\n")
    (tmp_path / "q.json").write_text(f"[{fine},\n{fine},\n{bad}]\n")
    for name in ("q.jsonl", "q.json"):
        with pytest.raises(UserError) as error:
            get_task("qa").load("test", str(tmp_path / name), None, 0)
        assert str(error.value).startswith(f"{tmp_path / name}:3: {number} is not a JSON number; write null")


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    """At any depth, with file and line; the same key in two mappings is fine, and so is one that an alias brings."""
    path = tmp_path / "mine.yaml"
    path.write_text("user: a\nsystem: s\nuser: b\n")
    with pytest.raises(UserError, match=r"mine.yaml:3: 'user' is given twice; keep one of them"):
        load_prompt(path)
    path.write_text("sft: &sft {rank: 1}\ntwo: [{rank: 2, <<: *sft}, {rank: 3}]\n")
    assert read_yaml(path)["two"] == [{"rank": 2}, {"rank": 3}]
    path.write_text("a:\n  - b: 1\n    c: 2\n    b: 3\n")
    with pytest.raises(UserError, match=r"mine.yaml:4: 'b' is given twice"):
        read_yaml(path)


def test_tables_are_read(tmp_path):
    """Parquet and Arrow files are rows like others; NaN is a missing value there, and a broken file ends in a line."""
    import datasets

    columns = {"question": ["Q?", "R?"], "answer": ["4", "5"], "note": [math.nan, 1.0]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "q.parquet"))
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for file in (tmp_path / "q.parquet", arrow):
        found = get_task("qa").load("test", str(file), None, 0)
        assert [(one.gold, one.columns["note"]) for one in found] == [("4", None), ("5", 1.0)]
    (tmp_path / "bad.parquet").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"bad.parquet: not a parquet file \("):
        get_task("qa").load("test", str(tmp_path / "bad.parquet"), None, 0)
    with pytest.raises(UserError, match=r"none.parquet: cannot be read"):
        get_task("qa").load("test", str(tmp_path / "none.parquet"), None, 0)
    with pytest.raises(UserError, match=r"q.parquet\[0\]: 'nums' is missing; this row has question, answer, note"):
        get_task("countdown").load("test", str(tmp_path / "q.parquet"), None, 0)
