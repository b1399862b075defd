"""Hostile input: readers that take anything, code that runs nothing, names that stay inside, texts that stay texts.

The long search is `python -m tests.stress.fuzzing`; what it found stands here as a test each.
"""

import ast
import csv
import html
import io
import json
import os
import random
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from factories import write_evaluation, write_training
from hypothesis import given, settings
from hypothesis import strategies as st
from stress import fuzzing
from stress.fuzzing import TARGETS, TOKENS, Tally, Target, long_inputs, mutated, tried

from mlx_traces.cli import main
from mlx_traces.config import EvalConfig, RoundsConfig, build, read_config
from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import comparison, evaluator
from mlx_traces.models import adapters
from mlx_traces.readers import is_file, parse_row
from mlx_traces.report import run_view, tables
from mlx_traces.report.page import Page, evaluated, write
from mlx_traces.rl import rewards
from mlx_traces.runtime import run_folder
from mlx_traces.tasks import gsm8k, qa
from mlx_traces.tasks.data import split_slice
from mlx_traces.tasks.prompts import Prompt, load_prompt
from mlx_traces.text import clean, inert, visible
from mlx_traces.traces import files, importing, quality

PACKAGE = Path(tables.__file__).parents[1]
IDS = [target.name for target in TARGETS]


@pytest.fixture(autouse=True)
def _a_busy_machine(monkeypatch):
    """Let a call of the suite take four times what the long search allows."""
    monkeypatch.setattr(fuzzing, "SECONDS", 4 * fuzzing.SECONDS)


# ------------------------------------------------------------------------------------------------ readers


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_a_reader_takes_anything(target):
    count = max(4, round(30 * min(1, target.share)))
    tally = Tally()

    @settings(max_examples=count, database=None)
    @given(
        st.randoms(use_true_random=False), st.integers(0, 5), st.lists(st.sampled_from(TOKENS) | st.text(), max_size=6)
    )
    def take(draw, times, pieces):
        text = draw.choice(target.seeds)
        for _ in range(times):
            text = mutated(text, draw, target.seeds)
        for given_text in (text, "".join(pieces)):
            tried(target, given_text, tally, weigh=tally.inputs % 8 == 0)
            assert not tally.failures

    take()
    assert tally.inputs >= count


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_a_long_input_takes_no_longer_than_its_length(target):
    tally, texts = Tally(), list(long_inputs(target, fuzzing.CHARACTERS // 4))
    for text in random.Random(target.name).sample(texts, 6):
        tried(target, text, tally, weigh=False)
    assert not tally.failures


def test_honest_inputs_are_read():
    """Seeds that are refused would lead nowhere."""
    refused = set()
    for target in TARGETS:
        for seed in target.seeds:
            try:
                target.call(seed)
            except UserError as error:
                refused.add((target.name, str(error)))
    assert not refused


def test_faults_are_found(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.002)
    monkeypatch.setattr(fuzzing, "MEMORY", 2**20)

    def broken(text):
        return {"a": 1}[text]

    def slow(text):
        return re.match(r"(a+)+$", "a" * 17 + "b")

    def large(text):
        return bytearray(2 * fuzzing.MEMORY)

    kinds = []
    for call in (broken, slow, large):
        tried(Target("planted", call, ("x",)), "x", tally := Tally(), weigh=True)
        kinds += [kind.partition(" at ")[0] for kind in tally.failures]
    assert list(dict.fromkeys(kinds)) == ["KeyError", "too slow", "too much memory"]


# ------------------------------------------------------------------------------------------------ what was found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("limit: 2001-99-99", "not YAML"),
        ("limit: !!timestamp x", "not YAML"),
        ("limit: !!bool x", "not YAML"),
        ("limit: !!int ''", "not YAML"),
        ("limit: 0x" + "f" * 6000, "a number of more than 100 characters"),
        ("limit: 0x" + "f" * 20, "limit: a whole number of more than 18 digits"),
        ("limit: 1" + ":2:31" * 20_000, "a number of more than 100 characters"),
        ("model: [" + "[" * 40 + "]" * 41, "within each other"),
        ("seed: " + "[" * 100_000, "within each other|not YAML"),
        ("model: &a [*a]", "within each other"),
        ("model: nano\n" + "#" * 1_000_001, "more than 1,000,000 bytes"),
        ("model: [" + "x, " * 6_000 + "]", "more than 5,000 values"),
        (
            "a: &a [x, x]\n" + "".join(f"{chr(i + 1)}: &{chr(i + 1)} [{f'*{chr(i)}, ' * 9}]\n" for i in range(97, 110)),
            "5,000",
        ),
        ("? [a, b]\n: c", "not YAML"),
        ("1: 2", "names of fields must be texts"),
        ("x" * 1_000 + ": 1", "unknown field 'xxx"),
    ],
)
def test_a_hostile_configuration_is_refused(tmp_path, content, message):
    file = tmp_path / "eval.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_config(EvalConfig, file, {})
    assert re.search(message, str(caught.value)) and len(str(caught.value)) < 1_000 + len(str(file))


def test_aliases_and_long_prompts_are_read(tmp_path):
    file = tmp_path / "prompt.yaml"
    file.write_text("user: &a '{question}'\nsystem: *a\nstop: [&b '\\n', *b]\nprefill: " + "x " * 40_000)
    prompt = load_prompt(file)
    assert prompt.user == prompt.system == "{question}" and len(prompt.prefill) == 79_999


def test_names_of_any_length():
    assert is_file("x" * 5_000) and is_file("a/" + "b" * 5_000) and not is_file("a/b")
    for split in ("test[:" + "9" * 5_000 + "]", "\u2028" * 9_000):
        with pytest.raises(UserError) as caught:
            split_slice(split)
        assert len(str(caught.value)) < 500
    assert len(str(unknown("task", "x" * 10_000, ["gsm8k"]))) < 200


def test_json_too_deep_is_no_json(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        run_view.read(tmp_path)
    (tmp_path / adapters.CONFIG).write_text("[" * 100_000)
    (tmp_path / adapters.WEIGHTS).touch()
    with pytest.raises(UserError, match="not JSON"):
        adapters.read_config(tmp_path)
    with pytest.raises(UserError, match="not JSON"):
        parse_row("[" * 100_000, "x:1", ())


@pytest.mark.parametrize(
    ("run", "old", "new"),
    [
        ("UNFINISHED", '"task": "countdown"', '"task": {"": {}}'),
        ("TRAINING", '"tokens": 7', '"tokens": 1e999'),
        ("TRAINING", '"sample": 1', '"sample": NaN'),
        ("TRAINING", '"reward": 1.0', '"reward": 1' + 400 * "0"),
        ("TRAINING", '"rollout/length": 9.0', '"rollout/length": 1e308'),
    ],
)
def test_a_page_shows_what_it_can(run, old, new):
    text = getattr(fuzzing, run)
    assert old in text
    for reader in (fuzzing._page, fuzzing._watched):
        reader(text.replace(old, new))


def test_a_step_that_is_no_number_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(UserError, match="'step' must be a number, not str"):
        run_folder.RunFolder(tmp_path).rewind("metrics.jsonl", 1)


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"id": ["p"]},
            {"id": None},
            {"tokens": "7"},
            {"tokens": 10**400},
            {"tokens": float("nan")},
            {"correct": "false"},
        ),
        *({"sample": [0]}, {"verdicts": ["correct"]}, {"verdicts": {"answer": 1}}, {"stratum": {"a": 1}}, {"gold": 5}),
        *({"extracted": ["5"]}, {"question": None}, {"finish_reason": 0}, {"verdict": {}}),
        *({"elapsed": "1"}, {"completion": None}, {"prompt": 1}, {"extractions": ["5"]}),
    ],
)
def test_samples_of_other_kinds_are_refused(tmp_path, change):
    run = write_evaluation(tmp_path / "a", [1, 0])
    lines = (run / "samples.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"sample 2: '{next(iter(change))}' must be"):
        write([run], tmp_path / "page.html")


@pytest.mark.parametrize(
    "change",
    [
        {"model": 1},
        {"prompt": None},
        {"adapter": ["x"]},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"pass_at_k": [1]},
        {"maj_at_k": {"| x": 1}},
    ],
)
def test_a_result_of_other_kinds_is_refused(tmp_path, change):
    run = write_evaluation(tmp_path / "a", [1, 0])
    (run / "result.json").write_text(json.dumps(json.loads((run / "result.json").read_text()) | change))
    with pytest.raises(UserError, match=rf"result.json: '{next(iter(change))}' must be"):
        write([run], tmp_path / "page.html")


# ------------------------------------------------------------------------------------------------ no code of others

RUNS_CODE = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
UNPACKS_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "runpy", "pty", "commands"}
SHELLS = {
    "system",
    "popen",
    "getoutput",
    "getstatusoutput",
    "execv",
    "execve",
    "execvp",
    "spawnl",
    "spawnv",
    "unsafe_load",
}
IMPORTERS = {  # by a table, or what the user names: a reward, a task
    "__init__.py": 1,
    "tasks/__init__.py": 2,
    "tasks/plugins.py": 1,
    "train/tracking.py": 1,
    "rl/rewards.py": 1,
}


def nodes_of(source):
    return list(ast.walk(ast.parse(source)))


def name_of(function):
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def faults(nodes):
    """Yield what in a source could run code that came as data, and where a flag would be on by itself."""
    for node in nodes:
        if isinstance(node, ast.Call):
            function, name = node.func, name_of(node.func)
            owner = getattr(getattr(function, "value", None), "id", "")
            if isinstance(function, ast.Name) and name in RUNS_CODE:
                yield name
            if name in SHELLS and owner in ("", "os", "subprocess", "yaml"):
                yield name
            if (
                owner == "yaml"
                and name == "load"
                and "safe" not in ast.unparse(node)
                and "loader" not in ast.unparse(node)
            ):
                yield "yaml.load"
            for word in node.keywords:
                on = isinstance(word.value, ast.Constant) and bool(word.value.value)
                if word.arg in ("shell", "trust_remote_code", "allow_pickle") and on:
                    yield word.arg
        elif isinstance(node, ast.Import | ast.ImportFrom):
            roots = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (root for root in roots if root.partition(".")[0] in UNPACKS_CODE)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            both = [*zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)]
            both += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            yield from (
                arg.arg for arg, value in both if arg.arg == "trust_remote_code" and ast.unparse(value) == "True"
            )


def test_nothing_runs_code_that_came_as_data():
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes, name = nodes_of(path.read_text()), str(path.relative_to(PACKAGE))
        assert not list(faults(nodes)), name
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        imports = [call for call in calls if name_of(call.func) in ("import_module", "spec_from_file_location")]
        assert len(imports) <= IMPORTERS.get(name, 0), f"{name} imports by name"
        seen += len(imports)
    assert seen == sum(IMPORTERS.values())


@pytest.mark.parametrize(
    "source",
    [
        *("eval(x)", "exec(x)", "import pickle", "from marshal import loads", "os.system(x)", "run(x, shell=True)"),
        *("load(p, trust_remote_code=True)", "numpy.load(p, allow_pickle=True)", "yaml.load(text)", "os.execvp(a, b)"),
        *("def load(p, trust_remote_code=True): ...", "def load(p, *, trust_remote_code=True): ..."),
    ],
)
def test_the_look_at_the_source_sees(source):
    assert list(faults(nodes_of(source)))


def test_the_flag_is_off_by_itself():
    assert EvalConfig().trust_remote_code is False
    assert "model.eval()" in (PACKAGE / "models/loading.py").read_text() and not list(
        faults(nodes_of("model.eval(); mx.eval(x); re.compile(y)"))
    )


def test_a_reward_runs_only_when_it_is_named(tmp_path, monkeypatch):
    """Data, prompts, adapters and runs that name a function import nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\ndef f(texts):\n    return [1] * len(texts)\n"
    )
    named = {"reward": "evil:f", "rewards": {"evil:f": 1}, "judge": "evil:f", "task": "evil:f", "model_file": "evil.py"}
    row = {"question": "evil:f", "answer": "evil:f 4", "extractor": "evil:f", "verdict": "evil:f"} | named
    for task in (gsm8k, qa):
        problem = task.parse(parse_row(json.dumps(row), "x:1", ()), "x:1")
        task.grade(problem, "evil:f <answer>evil:f</answer>")
    trace = {"id": "a", "messages": [{"role": "user", "content": "evil:f"}], "completion": "4", "prompt": "evil:f"}
    trace |= {"columns": row, "source": "evil:f", "scores": {"evil:f": 1}}
    Path("t.jsonl").write_text(json.dumps(trace | {"task": "evil:f"}) + "\n")
    with pytest.raises(UserError, match="is code that is not part of mlx-traces"):
        [quality.problem_of(trace, where) for where, trace in files.read_traces(Path("t.jsonl"))]
    Path("t.jsonl").write_text(json.dumps(trace | {"task": "qa"}) + "\n")
    assert CliRunner().invoke(main, ["score", "t.jsonl", "--out", "s.jsonl"], catch_exceptions=False).exit_code == 0
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / adapters.WEIGHTS).touch()
    settings = {"num_layers": 1, "lora_parameters": {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["evil:f"]}}
    (folder / adapters.CONFIG).write_text(json.dumps(settings | named))
    adapters.own_settings(adapters.read_config(folder))
    run = write_training(tmp_path / "run", finished=True, rewards={"evil:f": 1}, reward="evil:f")
    write([run], tmp_path / "page.html")
    assert "evil" not in sys.modules and not Path("ran").exists()
    assert rewards.load({"evil:f": 1.0}, ())["evil:f"](["x"]) == [1] and Path("ran").exists()
    del sys.modules["evil"]


# ------------------------------------------------------------------------------------------------ names

NAMES = (
    "../../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "~/x",
    "a\x00b",
    "x" * 5_000,
    "con",
    "a/b",
    "..\\x",
    "\u202e",
    "-rf",
    "a\nb",
)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_any_name_are_pictures_in_their_folder(tmp_path, name):
    run = write_training(tmp_path / "runs" / "a")
    lines = [json.dumps({"step": step, name: step * 0.5}) for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    before = set(tmp_path.rglob("*"))
    (file,) = write([run], tmp_path / "out" / "page.html")
    page = Page()
    page.trainings([run_view.read(run)])
    assert all(re.fullmatch(r"[a-z0-9-]{1,80}\.png", picture) for picture in page.pictures)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "out", file}


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_folder_is_under_runs_whatever_model_and_prompt_are_called(tmp_path, name):
    config = build(EvalConfig, {"model": name, "adapter": None, "task": "qa"})
    try:
        label = evaluator.Plan(config, qa.TASK, Prompt(name, "x"), "tolerant", []).label
    except UserError:  # a folder that is there, and no model
        assert Path(name).is_dir()
        return
    assert label == os.path.basename(label) and label[0].isalnum() and "\x00" not in label  # noqa: PTH119
    assert label.isprintable()


@pytest.mark.parametrize("name", NAMES[:6] + NAMES[7:8] + NAMES[9:])
def test_rounds_have_a_name_that_is_no_path(name):
    if name == "con":
        return
    with pytest.raises(UserError, match="name: "):
        build(RoundsConfig, {"name": name, "model": "nano", "task": "countdown", "prompt": "thinking"})


def test_rows_of_any_content_are_written_to_the_file_that_was_named(tmp_path):
    for index, name in enumerate(NAMES):
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": name or "x"}]
        row = {"messages": turns, "id": name, "source": name, "question": name or "?", "answer": "4", "task": name}
        file = tmp_path / f"{index}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        made = importing.import_traces(str(file), "messages", qa.TASK, "think")
        before = set(tmp_path.rglob("*"))
        files.write_traces(
            tmp_path / f"{index}-out.jsonl", made, {"source": name, "config": row, "counts": {}, "seed": None}
        )
        new = {path.name for path in set(tmp_path.rglob("*")) - before}
        assert new == {f"{index}-out.jsonl", f"{index}-out.manifest.json"}


# ------------------------------------------------------------------------------------------------ texts

HOSTILE = "\x1b[31m\x1b]0;t\x07\x9b31m\u202e\u2066\x7f|=1+1</script><script>x</script>\r\n`[a](b)`"


def assert_plain(text):
    """No character of a text controls a display, or hides or turns others; line ends may stand."""
    strange = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - {"\n"}
    assert not strange, strange


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("grade --task qa", {"answer": HOSTILE, "completion": HOSTILE, HOSTILE: HOSTILE}),
        ("grade --task qa", {HOSTILE: 1}),
        ("grade --task countdown", {"completion": HOSTILE, "nums": [HOSTILE], "target": HOSTILE}),
        ("data import --format messages", {HOSTILE: 1}),
        ("data import --format messages", {"messages": [{"role": HOSTILE, "content": HOSTILE}]}),
        ("score --out o", {"id": "a", "messages": [], "completion": "x", HOSTILE: 1}),
        ("score --out o", {"id": "a", "messages": [], "completion": HOSTILE, "task": HOSTILE}),
        ("reformat --out o", {"id": "a", "messages": HOSTILE, "completion": "x"}),
        ("filter --out o", {HOSTILE: HOSTILE}),
        ("sft", {HOSTILE: HOSTILE}),
        ("compare --config", {HOSTILE: HOSTILE}),
        ("study", {"name": HOSTILE, "tasks": HOSTILE, "models": [{"model": HOSTILE, HOSTILE: 1}]}),
        ("eval --config", {"prompt": HOSTILE, "task": "qa", "data": HOSTILE}),
    ],
)
def test_errors_and_results_show_no_control_characters(tmp_path, monkeypatch, command, content):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(content) + "\n")
    words = command.split()
    at = len(words) if words[0] != "data" else 2
    result = CliRunner().invoke(main, [*words[:at], "in.jsonl", *words[at:]])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.output
    assert_plain(result.output)


def test_runs_with_hostile_texts_are_shown_as_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    for name in "ab":
        run = write_evaluation(
            tmp_path / name, [1, 0, 1, 1], completion=HOSTILE, model=f"{HOSTILE}{name}", task=HOSTILE
        )
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        for index, row in enumerate(rows):
            row |= {
                "id": f"{HOSTILE}{index}",
                "question": f"={HOSTILE}",
                "extracted": f"@{HOSTILE}",
                "gold": f"-{HOSTILE}",
            }
            row |= {
                "stratum": f"{HOSTILE}{index % 2}",
                "verdict": HOSTILE,
                "verdicts": {HOSTILE: HOSTILE, "answer": "correct"},
            }
        (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = json.loads((run / "result.json").read_text()) | {
            "prompt": HOSTILE,
            "extractor": HOSTILE,
            "notes": [HOSTILE],
        }
        (run / "result.json").write_text(json.dumps(result))
        runs.append(run)
    (runs[0] / "result.json").rename(runs[0] / "kept")
    assert_plain(CliRunner().invoke(main, ["watch", "--once", "a"], catch_exceptions=False).output)
    (runs[0] / "kept").rename(runs[0] / "result.json")
    assert_plain(CliRunner().invoke(main, ["watch", "--once", "a"], catch_exceptions=False).output)
    assert_plain(CliRunner().invoke(main, ["verify", "a"]).output)
    found = [evaluated(run_view.read(run)) for run in runs]
    frame = comparison.compare_runs(found)
    from rich.console import Console

    shown = Console(file=io.StringIO(), width=100)
    for table in (tables.to_terminal(frame), tables.strata_table(found), tables.extractors_table(found)):
        shown.print(table)
    assert_plain(shown.file.getvalue() + "".join(comparison.differences(found)))
    for markdown in (tables.to_markdown(frame), tables.cells_to_markdown(tables.parts_cells(comparison.strata(found)))):
        assert_plain(markdown)
        assert "<script" not in markdown.replace("\\<", "")
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}
        assert len(bars) == 1
    for text in (
        tables.to_csv(frame),
        tables.to_csv(comparison.per_question(found)),
        tables.to_csv(comparison.strata(found)),
    ):
        assert_plain(text)
        for cell in (cell for row in csv.reader(io.StringIO(text)) for cell in row if cell):
            assert cell[0] not in "=+-@\t\r＝＋－＠" or re.fullmatch(r"-?[0-9.e-]+", cell)
    page = write(runs, tmp_path / "page.html")[0].read_text()
    assert_plain(page.replace("\t", ""))
    assert page.count("<script") == page.count("</script") == 2
    assert not re.search(r"<[^>]*\son[a-z]+\s*=", re.sub(r"(?s)<script.*?</script>", "", page))
    for label in re.findall(r'aria-label="([^"]*)"', page):
        assert "<" not in label and (HOSTILE[-8:] in html.unescape(label) or "script" in label or label)


def test_a_json_line_keeps_its_meaning_without_control_characters():
    line = json.dumps({HOSTILE: HOSTILE + "\U000e0001é😀"}, ensure_ascii=False)
    assert json.loads(inert(line)) == json.loads(line)
    assert_plain(inert(line))
    assert "é😀" in inert(line)


def test_every_character_that_acts_is_known():
    categories = ("Cc", "Cf", "Cs")
    acting = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in categories]
    assert not clean("".join(acting)).strip()
    assert set(visible("".join(acting))) & set(acting) == set("\n\t\u200d\u00ad")


@settings(max_examples=100)
@given(st.text() | st.lists(st.sampled_from(TOKENS)).map("".join))
def test_no_text_acts(text):
    assert_plain(clean(text))
    assert_plain(re.sub("[\t\u200d\u00ad]", "", visible(text)))
    cell = tables.csv_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")) or tables._NUMBER.fullmatch(cell)
