"""Prompt templates and rows of problems."""

import json
import sys

import pytest

from mlx_traces.errors import UserError
from mlx_traces.records import Problem
from mlx_traces.tasks.data import (
    content_id,
    hub_rows,
    is_file,
    load_rows,
    read_jsonl,
    split_slice,
    text_column,
)
from mlx_traces.tasks.prompts import Prompt, fill, load_prompt

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
            "unknown field 'sytem'; a prompt has user, system, prefill, stop, chat",
        ),
        ("user: 7\n", "'user' must be a str, not 7"),
        ("user: x\nstop: END\n", "'stop' must be a list, not 'END'"),
        ("user: x\nchat: 'no'\n", "'chat' must be a bool, not 'no'"),
        ("user: [\n", "not a YAML file"),
    ],
)
def test_malformed_prompt_files(tmp_path, text, message):
    """The message names the file and the fault."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_prompt(path)
    assert str(error.value).startswith(f"{path}: {message}")
    with pytest.raises(UserError, match=r"none.yaml: no such prompt file"):
        load_prompt(tmp_path / "none.yaml")


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
    monkeypatch.setattr("mlx_traces.hub.switched_off", lambda: False)
    monkeypatch.setattr("mlx_traces.hub.fault", lambda: "")
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
    monkeypatch.setattr("mlx_traces.hub.switched_off", lambda: False)
    monkeypatch.setattr("mlx_traces.hub.fault", lambda: "")
    with pytest.raises(UserError) as error:
        list(hub_rows("o/n@main", None, "test", "pass X"))
    assert str(error.value) == f"o/n could not be downloaded ({reason}); pass X"


def test_content_id():
    """The id depends on the parts and where they end, and takes any text."""
    assert content_id("t", "ab", "c") == content_id("t", "ab", "c") != content_id("t", "a", "bc")
    assert len(content_id("t", json.loads('"\\ud800"'))) == len("t-") + 10
