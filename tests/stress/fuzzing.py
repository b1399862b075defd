r"""Hostile input: every reader of what others wrote, and the search for an input that breaks one.

Graders, extractors, trace parsers, importers, the readers of run and adapter folders and the configuration's loader
take any text without an exception other than UserError, in `SECONDS` and `MEMORY`. The tests try a few inputs of each;
the long search is guided by coverage (atheris, of the extra ``fuzz``; Linux):

    pip install -e '.[fuzz]'
    python -m tests.stress.fuzzing --inputs 1000000

It prints for each reader its inputs, seconds, slowest call and greatest memory, then every failure with its smallest
input, and ends with status 1 if there is any.
"""

import argparse
import atexit
import gc
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain, islice
from math import ceil
from pathlib import Path

from mlx_traces import config
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison
from mlx_traces.models import adapters
from mlx_traces.readers import is_file, parse_row
from mlx_traces.records import Problem, Trace
from mlx_traces.report import run_view, tables, terminal
from mlx_traces.report.page import evaluated, render, visible
from mlx_traces.runtime import run_folder
from mlx_traces.tasks import (
    TASKS,
    Task,
    answers,
    countdown,
    equality,
    get_task,
    gsm8k,
    math,
    numbers,
    prompts,
    qa,
    thoughts,
)
from mlx_traces.tasks.data import split_slice
from mlx_traces.text import clean
from mlx_traces.traces import files, importing, judge, quality, reformat

CHARACTERS = 100_000  # of the longest input that has to keep to the bounds; of a longer one they grow in proportion
SECONDS = 0.05  # of the processor, for a call
MEMORY = 48 * 2**20  # bytes that a call may hold at a time
ROWS_READ = 1_000  # of files that are read row by row

PART = "\n=====\n"  # between the files, or the arguments, of one input


@dataclass(frozen=True)
class Target:
    """A reader: ``call`` takes a text, ``seeds`` are honest ones; ``share`` is of the inputs, for slow readers less."""

    name: str
    call: Callable[[str], object]
    seeds: tuple[str, ...]
    share: float = 1.0


# ------------------------------------------------------------------------------------------------ pieces of input

# fmt: off
TOKENS = (
    "<think>", "</think>", "<answer>", "</answer>", "<|begin_of_thought|>", "<|end_of_thought|>", "[THINK]",
    "<|begin_of_solution|>", "<|end_of_solution|>", "<|channel|>analysis<|message|>", "<|channel|>final<|message|>",
    "<|end|>", "<|start|>assistant", "<thinking>", "</reasoning>", "<solution>", "####", "#### 18", "\\boxed{", "}",
    "\\frac{1}{2}", "\\frac", "\\text{", "\\left(", "\\times", "\\div", "\\circ", "**", "^", "{,}", "\\$", "\\%", "=",
    "= ", " = 12", "1,000", "3/4", "1 1/2", "1e9", "9" * 50, "-", "−", "×", "(", ")", "((", "x", "%", "…", "...", ".",
    "\n", "\n\n", "\r\n", "\r", "\t", " ", "\u2028", "\x00", "\x1b[31m", "\u202e", "\u200b", "\ufeff", "İ", "ﬁ",
    "\ud83d", "\ud83d\ude00", "é", "٣", "²", "Ⅷ", "\U0001f600", "\x85", "\x9b", "\x7f", '"', "'", "\\", "\\u0000",
    "\\ud800", "[", "]", "{", "}", ",", ":", "null", "true", "NaN", "Infinity", "-1e999", "[[", "{}", '{"', '":',
    "1" * 5000, "0", "-0", "1e400", '""', "[]", '"id"', '"sample"', '"step"', "&a ", "*a", "<<: *a", "- ", "? ", ": ",
    "|\n", ">-\n", "!!python/object/apply:os.system", "!!binary ", "%YAML 9", "2001-99-99", "0x" + "f" * 6000,
    "1:2:3", "0o7", ".inf", "~", "#", "---\n", "...\n", "!!set ", "!!timestamp ", "../../x", "/etc/passwd", "~",
    "C:\\x", "con", "Score: 0.5", "Score: ", "check.", "wait", "of ", "times ", "[:64]", "=1+1", "@SUM(A1)", "|", "`",
    "<script>", "</script>", "<!--", "$x$", "os:system", "module:function", PART,
)
VALUES = (
    None, True, False, 0, -1, 1, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "correct",
    "\x00", "\x1b[31m\u202e", "../../x", "a" * 300, "1", "=1+1", [], {}, [[]], [None], [1, "x"], {"a": 1}, {"": {}},
    {"role": "user", "content": 1}, [{"role": "user", "content": "q"}], {"tolerant": None}, "length",
)
# fmt: on


def mutated(text: str, random: random.Random, seeds: tuple[str, ...] = ()) -> str:
    """Return a text changed once: a token put in, a part left out, repeated or exchanged, or a JSON value replaced."""
    kind = random.randrange(7)
    start, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    if kind == 0:
        return text[:start] + random.choice(TOKENS) + text[start:]
    if kind == 1:
        return text[:start] + random.choice(TOKENS) + text[end:]
    if kind == 2:
        return text[:start] + text[min(end, start + 40) :]
    if kind == 3:
        piece = text[start : min(end, start + 12)] or random.choice(TOKENS)
        return text[:start] + piece * random.choice((2, 3, 20, 100)) + text[start:]
    if kind == 4 and seeds:
        other = random.choice(seeds)
        return text[:start] + other[random.randrange(len(other) + 1) :]
    return _other_value(text, random) if "{" in text else text[:start] + random.choice(TOKENS) + text[start:]


def _other_value(text: str, random: random.Random) -> str:
    """Replace, remove or double a value somewhere in one of a text's JSON lines."""
    lines = text.split("\n")
    at = random.choice([index for index, line in enumerate(lines) if "{" in line])
    try:
        content = json.loads(lines[at])
    except (ValueError, RecursionError):
        return text
    places = list(_places(content))
    if not places:
        return text
    holder, key = random.choice(places)
    action = random.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[random.choice(TOKENS)] = holder[key]
    elif action == 1:
        holder.append(holder[key])
    else:
        holder[key] = random.choice(VALUES)
    lines[at] = json.dumps(content)
    if random.randrange(4) == 0:
        lines.insert(at, lines[at])
    return "\n".join(lines)


def _places(value: object, depth: int = 0) -> Iterator[tuple[dict | list, str | int]]:
    """Yield (holder, key or index) of every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        if depth < 6:
            yield from _places(inner, depth + 1)


# ------------------------------------------------------------------------------------------------ readers


@cache
def _folder() -> Path:
    """Return a folder of this process's own, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fuzzing-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _file(name: str, text: str) -> Path:
    """Write a file; an unpaired surrogate makes it other than UTF-8."""
    path = _folder() / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def _split(text: str, count: int) -> list[str]:
    """Return so many parts of an input, empty ones at the end if it has fewer."""
    parts = text.split(PART, count - 1)
    return parts + [""] * (count - len(parts))


def _found(text: str) -> None:
    for find in (answers.tolerant, answers.last_number, answers.strict, answers.flexible, thoughts.answer_part):
        found = find(text)
        for task in map(get_task, set(TASKS) - {"math"}) if found else ():  # math has readers of its own
            task.votes([found], "Apollo 11", task.extractors[0])
    answers.last_boxed(text), answers.last_answer_tag(text), answers.parse_number(text, words=False)


def _graded_gsm8k(text: str) -> None:
    gsm8k.grade(Problem("p", {}, "18"), text)


def _graded_countdown(text: str) -> None:
    countdown.grade(Problem("p", {"nums": [25, 4, 2], "target": 98}, "98"), text)


def _checked_countdown(text: str) -> None:
    countdown.check(text, [25, 4, 2], 98)


def _graded_qa(text: str) -> None:
    gold, response = _split(text, 2)
    qa.grade(Problem("p", {}, gold), response)


def _graded_math(text: str) -> None:
    gold, response = _split(text, 2)
    math.grade(Problem("p", {}, gold[: numbers.MAX_ANSWER]), response)


def _compared_math(text: str) -> None:
    """Its worker bounds a comparison's time and memory itself: what does not end there is ``too_complex``."""
    gold, answer = _split(text, 2)
    assert equality.compare(gold[: numbers.MAX_ANSWER], answer) in equality.VERDICTS
    assert math.same(answer, gold[: numbers.MAX_ANSWER], "strict") is not None


def _tags(text: str) -> None:
    assert thoughts.parts(thoughts.normalise(text)) == thoughts.parts(text)


def _reformatted(text: str) -> None:
    reformat.by_rule(text)


def _scored(tags: str, text: str) -> None:
    prompt, completion = _split(text, 2)
    scores = quality.text_scores(completion, "stop", None, config.ScoreConfig(tags=tags), prompt)
    assert all(value is None or 0 <= value <= 1 for value in scores.values())


def _judged(text: str) -> None:
    score = judge.parse_judgement(text)
    assert score is None or 0 <= score <= 1


def _row(task: str, text: str) -> None:
    problem = get_task(task).parse(parse_row(text, "file:1", get_task(task).columns), "file:1")
    problem.id.encode()
    get_task(task).grade(problem, "so 18")


def _read_traces(text: str) -> None:
    for where, trace in islice(files.read_traces(_file("traces.jsonl", text)), ROWS_READ):
        problem = quality.problem_of(trace, where)
        if problem is not None:
            quality.headline(get_task(trace.task), problem, trace.completion)
        json.dumps(trace.to_row())


def _imported(suffix: str, form: str, task: Task | None, text: str) -> None:
    for trace in islice(importing.import_traces(str(_file(f"import{suffix}", text)), form, task), ROWS_READ):
        assert isinstance(trace, Trace) and trace.completion.encode("utf-8") is not None


def _csv(text: str) -> None:
    for where, row in islice(qa.read_csv(_file("questions.csv", text)), ROWS_READ):
        qa.parse(row, where)


def _prompt(text: str) -> None:
    prompts.load_prompt(_file("prompt.yaml", text)).messages(Problem("p", {"question": "2 + 2?", "answer": "4"}, "4"))


def _settings(text: str) -> None:
    kind, content = _split(text, 2)
    kinds = {name: getattr(config, name) for name in dir(config) if name.endswith("Config") and name != "Config"}
    found = config.read_config(kinds.get(kind.strip(), config.EvalConfig), _file("settings.yaml", content), {})
    found.model_dump(mode="json")


def _adapter(text: str) -> None:
    (_folder() / "adapter").mkdir(exist_ok=True)
    (_folder() / "adapter" / adapters.WEIGHTS).touch()
    _file(f"adapter/{adapters.CONFIG}", text)
    adapters.own_settings(adapters.read_config(_folder() / "adapter"))


def _run_folder(name: str, text: str) -> Path:
    """Write a run folder of (run.json, result.json, metrics.jsonl, samples.jsonl); an empty part is no file."""
    folder = _folder() / name
    folder.mkdir(exist_ok=True)
    for file, content in zip(
        ("run.json", "result.json", "metrics.jsonl", "samples.jsonl"), _split(text, 4), strict=True
    ):
        if content:
            _file(f"{name}/{file}", content)
        else:
            (folder / file).unlink(missing_ok=True)
    return folder


def _watched(text: str) -> None:
    from rich.console import Console

    record = run_view.read(_run_folder("run", text))
    with Path("/dev/null").open("w") as nothing:
        Console(file=nothing, width=100).print(terminal.display(record, 100, 0.0))
    assert not set(terminal.state(record) + record.name) & set("\x1b\x00\u202e\n")


def _page(text: str) -> None:
    page = render([], [run_view.read(_run_folder("page", text))])
    assert page.count("<script") == page.count("</script") <= 2 and not set(page) & set("\x1b\x00\x9b\u202e")


def _compared(text: str) -> None:
    record = run_view.read(_run_folder("compared", text))
    if record.kind == run_view.EVALUATION:
        found = [evaluated(record)]
        frame = comparison.compare_runs(found)
        json.dumps(tables.to_json(frame)), json.dumps(comparison.source_results(found))
        texts = [tables.to_markdown(frame), tables.to_csv(frame), tables.to_csv(comparison.per_question(found))]
        (
            tables.to_terminal(frame),
            tables.strata_table(found),
            tables.extractors_table(found),
            comparison.differences(found),
        )
        assert not set(texts[0]) & set("\x1b\x00\x9b\u202e")


def _resumed(text: str) -> None:
    folder = run_folder.RunFolder(_run_folder("resumed", text))
    folder.recover(json.loads(json.dumps(TRAINED["identity"])))
    folder.rewind("metrics.jsonl", 3)


def _manifest(text: str) -> None:
    _file("data.manifest.json", text)
    _file("data.jsonl", "{}")
    files.manifest_of(_folder() / "data.jsonl")


def _cache(text: str) -> None:
    judge.Cache(_file("judge.jsonl", text))


def _names(text: str) -> None:
    split_slice(text)


def _data_names(text: str) -> None:
    is_file(text)


def _shown(text: str) -> None:
    assert not set(visible(text)) & set(ACTING)


def _shown_line(text: str) -> None:
    line = clean(text)
    assert not set(line) & set(ACTING + "\n\r\t")
    table = tables.markdown(["a", "b"], [[line, "1"]], left=1).splitlines()
    assert len(table) == 3 and table[2].replace("\\\\", "").replace("\\|", "").count("|") == 3


def _shown_cell(text: str) -> None:
    cell = tables.csv_cell(text)
    assert not set(cell) & set(ACTING)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r") or tables._NUMBER.fullmatch(cell)


ACTING = "\x00\x07\x1b\x7f\x85\x9b\u200f\u202e\u2066"  # some of the characters that control a display


def _jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


RESPONSES = (
    "<think>\n25 * 4 = 100, 100 - 2 = 98. Wait, check: yes.\n</think>\n<answer>25 * 4 - 2</answer>",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May, 48+24 = 72 altogether.\n#### 72",
    "Thus $x = \\frac{3}{4}$ and the answer is \\boxed{18.00\\text{ dollars}}.",
    "<|begin_of_thought|>\n\na = 5 red apples * 2 = 10\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n"
    "The final answer is: **1,234**\n\n<|end_of_solution|>",
    "<|channel|>analysis<|message|>Hmm, 10/3 = 3.33...<|end|><|start|>assistant<|channel|>final<|message|>It is 75%.",
)
FORMULAS = (
    *("\\frac{3}{4}", "-1,234.50", "\\left(3, \\frac{\\pi}{2}\\right)", "[0,1) \\cup (2, \\infty)"),
    *("2x^2 - 3\\sqrt{2}x + 1", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\text{even}"),
    *("52_8", "75\\%", "\\{1, 2\\}", "1\\frac12", "2^{10}", "1 \\pm i", "x \\in [-2, 7]"),
    *("10\\text{ cm}^2", "\\binom{5}{2} + 3!", "e^{i\\pi}"),
)
QUESTION = {"question": "How many clips?", "answer": "48/2 = 24.\n#### 72"}
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "so 72"},
]
TRACE = {
    **{"id": "countdown-2-4-25-to-98", "messages": TURNS[:2], "completion": RESPONSES[0], "task": "countdown"},
    **{"columns": {"nums": [25, 4, 2], "target": 98}, "prompt": "thinking", "source": "nano", "sample": 1},
    **{"completion_ids": [1, 2], "logprobs": [-0.5, -0.1], "finish_reason": "stop", "verdict": "correct"},
    **{"scores": {"correct": 1.0, "judge": None}, "score": 0.9},
}
ROWS = {
    "messages": {"messages": TURNS, **QUESTION},
    "prompt-completion": {"prompt": TURNS[:2], "completion": "so 72", **QUESTION},
    "sharegpt": {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "open-r1": {
        **{"problem": "q", "generations": RESPONSES[:2], "correctness_math": [True, None], "answer": "98"},
        **{"finish_reasons": ["stop", None], "is_reasoning_complete": [True, False], "nums": [1], "target": 1},
    },
    "text": {"text": RESPONSES[0]},
}
JUDGES = {"messages": gsm8k.TASK, "prompt-completion": qa.TASK, "open-r1": countdown.TASK}
SAMPLE = {
    **{"id": "p-1", "sample": 0, "question": "nums [1, 2], target 3", "prompt": "Make 3", "completion": RESPONSES[0]},
    **{"tokens": 7, "finish_reason": "stop", "extracted": "1 + 2", "extractions": {"tolerant": "1 + 2"}, "gold": "3"},
    **{"verdicts": {"tolerant": "correct"}, "correct": True, "verdict": "correct", "stratum": "2 operands"},
    "elapsed": 1.5,
}
RESULT = {
    **{
        "run": "a",
        "model": "nano",
        "adapter": None,
        "task": "countdown",
        "prompt": "thinking",
        "extractor": "tolerant",
    },
    **{"split": "test", "accuracy": 1.0, "correct_count": 2, "total_questions": 2, "ci_low": 0.3, "ci_high": 1.0},
    **{"samples_per_problem": 1, "temperature": 0.0, "max_tokens": 64, "seed": 0, "truncated": 0.0, "mean_tokens": 7.0},
    **{"tokens_per_second": 10.0, "wall_seconds": 1.4, "peak_memory_gb": 0.1, "timestamp": "2026-01-01T00:00:00+00:00"},
    **{
        "verdicts": {"correct": 2},
        "by_stratum": {},
        "extractors": {},
        "pass_at_k": {"1": 1.0},
        "maj_at_k": {},
        "notes": ["n"],
    },
}
ABOUT = {
    "identity": {
        "model": "nano",
        "task": "countdown",
        "prompt": {"name": "thinking", "user": "{nums}"},
        "limit": 2,
        "samples": 1,
    },
    **{"versions": {"mlx": "0.32"}, "backend": {"description": "cpu"}, "command": "mlx-traces eval", "started": "now"},
}
TRAINED = {
    "identity": {"model": "nano", "learning_rate": 1e-3, "group_size": 8, "num_steps": 3, "evaluate": {"limit": 4}}
}
METRICS = [
    {
        "step": 1,
        "reward/mean": 0.5,
        "rollout/length": 9.0,
        "time/sample": 1.0,
        "time/update": 2.0,
        "tokens": 50,
        "time/total": 3,
    },
    {
        "step": 2,
        "reward/mean": 0.7,
        "valid/accuracy": 0.5,
        "optim/lr": 1e-5,
        "loss": -0.1,
        "memory/peak_gb": 0.2,
        "time/total": 6,
    },
]
STEP = {
    "step": 1,
    "completion": RESPONSES[0],
    "rewards": {"correct": 1.0},
    "reward": 1.0,
    "tokens": 7,
    "id": "p",
    "sample": 1,
}
EVALUATION = PART.join(
    (json.dumps(ABOUT), json.dumps(RESULT), "", _jsonl(SAMPLE, {**SAMPLE, "id": "p-2", "correct": False}))
)
UNFINISHED = PART.join((json.dumps(ABOUT), "", "", _jsonl(SAMPLE)))
TRAINING = PART.join((json.dumps(TRAINED), json.dumps({"best_step": 2, "notes": []}), _jsonl(*METRICS), _jsonl(STEP)))
KINDS = {name.lower(): name for name in dir(config) if name.endswith("Config")}
SHIPPED = tuple(
    f"{KINDS[f'{command}config']}{PART}{path.read_text()}"
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    for command in re.findall(r"mlx-traces (\w+)", path.read_text())[:1]
)
ADAPTER = {
    "fine_tune_type": "lora",
    "num_layers": 4,
    "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": ["q"]},
}

TARGETS = (
    Target("answers", _found, RESPONSES),
    Target("grade gsm8k", _graded_gsm8k, RESPONSES),
    Target("grade countdown", _graded_countdown, RESPONSES),
    Target(
        "check countdown",
        _checked_countdown,
        ("25 * 4 - 2", "\\frac{25}{4} \\times (2 - 4) = 98", "**\\boxed{25×4−2}**"),
    ),
    Target("grade qa", _graded_qa, ("Apollo 11" + PART + RESPONSES[2], "75%" + PART + RESPONSES[4])),
    Target("grade math", _graded_math, tuple(f"{gold}{PART}Thus \\boxed{{{gold}}}." for gold in FORMULAS), 0.1),
    Target("compare math", _compared_math, tuple(f"{gold}{PART}{gold}" for gold in FORMULAS), 0.1),
    Target("tags", _tags, RESPONSES),
    Target("reformatting", _reformatted, RESPONSES),
    *(
        Target(f"scores {tags}", partial(_scored, tags), tuple(f"Make 98.{PART}{text}" for text in RESPONSES), 0.4)
        for tags in quality.STYLES
    ),
    Target("judgement", _judged, ("<think>hmm</think>It is fine.\nScore: 0.75", "Score: 1")),
    *(
        Target(f"row {task}", partial(_row, task), (json.dumps({**QUESTION, "nums": [1, 2], "target": 3}),))
        for task in ("gsm8k", "countdown", "qa")
    ),
    Target("traces file", _read_traces, (_jsonl(TRACE), _jsonl(TRACE, {**TRACE, "task": "", "sample": 2})), 0.5),
    *(
        Target(f"import {form}", partial(_imported, ".jsonl", form, JUDGES.get(form)), (_jsonl(row, row),), 0.3)
        for form, row in ROWS.items()
    ),
    Target("import list", partial(_imported, ".json", "messages", None), (json.dumps([ROWS["messages"]]),), 0.3),
    Target("import paragraphs", partial(_imported, ".txt", "text", None), ("\n\n".join(RESPONSES[1:3]),), 0.3),
    Target("csv", _csv, ('question,answer\n"a, ""b""?",4\nc,"5\n6"\n',), 0.5),
    Target(
        "prompt file",
        _prompt,
        ("user: |\n  {question} {{x}}\nstop: ['\\n']\nchat: false\n", "user: hi\nsystem: s\n"),
        0.3,
    ),
    Target("settings", _settings, SHIPPED, 0.3),
    Target("adapter", _adapter, (json.dumps(ADAPTER), json.dumps({"fine_tune_type": "full", "num_layers": -1}))),
    Target("watched run", _watched, (EVALUATION, UNFINISHED, TRAINING), 0.1),
    Target("page of a run", _page, (EVALUATION, UNFINISHED, TRAINING), 0.1),
    Target("compared run", _compared, (EVALUATION, UNFINISHED), 0.05),
    Target(
        "resumed run",
        _resumed,
        (PART.join((json.dumps(TRAINED), "", _jsonl(*METRICS), _jsonl(SAMPLE))),),
        0.2,
    ),
    Target(
        "manifest",
        _manifest,
        (json.dumps({"file": "data.jsonl", "sha256": hashlib.sha256(b"{}").hexdigest(), "counts": {"written": 1}}),),
        0.3,
    ),
    Target("judge's cache", _cache, (_jsonl({"key": "a", "reply": "Score: 1"}),), 0.3),
    Target("split", _names, ("test[:64]", "train[10:20]")),
    Target("data name", _data_names, ("openai/gsm8k", "data/x.jsonl", "a/b@main")),
    Target("shown text", _shown, RESPONSES, 0.5),
    Target("shown line", _shown_line, RESPONSES, 0.5),
    Target("shown cell", _shown_cell, RESPONSES, 0.5),
)


# ------------------------------------------------------------------------------------------------ bounds


@dataclass
class Tally:
    """What the calls of a target came to; ``failures`` holds the smallest input of each kind."""

    inputs: int = 0
    slowest: float = 0.0
    memory: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def fail(self, kind: str, text: str) -> None:
        """Keep an input that broke a bound, if it is the first or smallest of its kind."""
        if kind not in self.failures or len(text) < len(self.failures[kind]):
            self.failures[kind] = text


def tried(target: Target, text: str, tally: Tally, weigh: bool) -> None:
    """Call a reader once and tally it; a call that seems slow, or broken by a full memory, is measured again.

    ``weigh``: call it once more to measure its memory, which takes longer.
    """
    scale = max(1.0, len(text) / CHARACTERS)
    tally.inputs += 1
    try:
        seconds = _seconds(target, text)
        if seconds > SECONDS * scale:
            gc.collect()
            seconds = min(_seconds(target, text) for _ in range(5))
        memory = _memory(target, text) if weigh else 0
    except Exception as error:
        tally.fail(_kind(error), text)
        return
    tally.slowest = max(tally.slowest, seconds / scale)
    tally.memory = max(tally.memory, int(memory / scale))
    if seconds > SECONDS * scale:
        tally.fail("too slow", text)
    if memory > MEMORY * scale:
        tally.fail("too much memory", text)


def _seconds(target: Target, text: str) -> float:
    """Return the processor's seconds that a call takes."""
    start = time.thread_time()
    try:
        target.call(text)
    except UserError as error:
        assert "\n" not in clean(error)
    return time.thread_time() - start


def _memory(target: Target, text: str) -> int:
    """Return the bytes that a call has at most at a time."""
    tracemalloc.start()
    try:
        with_suppressed(target, text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def with_suppressed(target: Target, text: str) -> None:
    """Call a reader; a UserError is an answer too."""
    try:
        target.call(text)
    except UserError:
        return


def _kind(error: Exception) -> str:
    """Name an exception by its type and the last line of ours that it came through."""
    place, frame = "", error.__traceback__
    while frame:
        file = Path(frame.tb_frame.f_code.co_filename)
        if "mlx_traces" in file.parts or file == Path(__file__):
            place = f"{file.name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return f"{type(error).__name__} at {place}"


def long_inputs(target: Target, size: int) -> Iterator[str]:
    """Yield inputs of about ``size`` characters: a token, or two, over and over, after the head of a seed."""
    heads = ["", target.seeds[0], target.seeds[0][: len(target.seeds[0]) // 2]]
    for index, token in enumerate(TOKENS):
        head = heads[index % len(heads)]
        for piece in (token, token + TOKENS[(index * 7 + 3) % len(TOKENS)]):
            yield head + piece * (size // len(piece))


# ------------------------------------------------------------------------------------------------ the search

_PLAIN = "import sys; from tests.stress import fuzzing; fuzzing.lengthen(sys.argv[1], int(sys.argv[2]), sys.argv[4])"
_GUIDED = """
import sys, atheris
with atheris.instrument_imports(include=["mlx_traces"]):
    from tests.stress import fuzzing
fuzzing.search(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def lengthen(name: str, inputs: int, report: str) -> None:
    """Try long inputs of one target, ``inputs`` at most, and write the tally; every 4th is weighed too."""
    target = next(target for target in TARGETS if target.name == name)
    tally, start = Tally(), time.process_time()
    longest = islice(long_inputs(target, 10 * CHARACTERS), 60)
    for index, text in enumerate(islice(chain(long_inputs(target, CHARACTERS), longest), inputs)):
        tried(target, text, tally, weigh=index % 4 == 0)
    Path(report).write_text(json.dumps({**asdict(tally), "seconds": time.process_time() - start}))


def search(name: str, inputs: int, seed: int, report: str) -> None:
    """Try what libFuzzer makes of a target's seeds, guided by the branches of the package that inputs reach.

    Runs in a process of its own, which it ends; the tally is written as it goes. Every 20th input is weighed too.
    """
    import atheris

    target = next(target for target in TARGETS if target.name == name)
    tally, start = Tally(), time.process_time()

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        tried(target, text, tally, weigh=tally.inputs % 20 == 0)
        if tally.inputs >= inputs or tally.inputs % 5_000 == 0:
            Path(report).write_text(json.dumps({**asdict(tally), "seconds": time.process_time() - start}))

    def other(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.3:
            return atheris.Mutate(data, most)
        text = data.decode("utf-8", "surrogateescape")
        for _ in range(draw.choice((1, 1, 2, 4))):
            text = mutated(text, draw, target.seeds)
        return text.encode("utf-8", "surrogatepass")[:most]

    corpus = _folder() / "corpus"
    corpus.mkdir()
    for index, text in enumerate(target.seeds):
        (corpus / f"seed{index}").write_bytes(text.encode())
    limits = ("-max_len=1500", "-len_control=0", "-rss_limit_mb=4096", "-timeout=600", "-verbosity=0")
    arguments = ["fuzzing", str(corpus), f"-seed={seed + 1}", f"-atheris_runs={inputs}", *limits]
    atheris.Setup(arguments, one, custom_mutator=other)
    atheris.Fuzz()


def _searched(target: Target, inputs: int, seed: int) -> dict:
    """Search one target in processes of its own, a tenth of the inputs at most being long; return what they came to.

    The long ones go first, to a process whose code is not slowed down by counting branches.
    """
    found = {**asdict(Tally()), "seconds": 0.0}
    for code, count in ((_PLAIN, inputs // 10), (_GUIDED, inputs)):
        with tempfile.TemporaryDirectory() as folder:
            report, said = Path(folder) / "report.json", Path(folder) / "said"
            command = [sys.executable, "-c", code, target.name, str(count - found["inputs"]), str(seed), str(report)]
            with said.open("w") as file:
                status = subprocess.run(command, stdout=file, stderr=file).returncode
            part = json.loads(report.read_text()) if report.exists() else {}
            if status:
                found["failures"][f"the process ended with {status}"] = said.read_text(errors="replace")[-2000:]
        found["inputs"] += part.get("inputs", 0)
        found["seconds"] += part.get("seconds", 0.0)
        found["slowest"] = max(found["slowest"], part.get("slowest", 0.0))
        found["memory"] = max(found["memory"], part.get("memory", 0))
        found["failures"] |= part.get("failures", {})
    return found


def main() -> int:
    """Search every target, or those named; print a line for each; return 1 if anything was found."""
    options = argparse.ArgumentParser(
        prog="python -m tests.stress.fuzzing", description="Search for inputs that break a reader."
    )
    options.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    options.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1, help="readers searched at a time")
    given = options.parse_args()
    if find_spec("atheris") is None:
        options.error("atheris is missing; pip install -e '.[fuzz]' (Linux)")
    chosen = [target for target in TARGETS if target.name in (given.target or [target.name])]
    each = given.inputs / sum(target.share for target in chosen)
    print(f"{'reader':<24} {'inputs':>9} {'seconds':>8} {'slowest ms':>10} {'most MB':>8}  failures", flush=True)
    total, failed = 0, []
    with ThreadPoolExecutor(given.jobs) as pool:
        done = pool.map(lambda target: _searched(target, ceil(each * target.share), given.seed), chosen)
        for target, found in zip(chosen, done, strict=True):
            total += found["inputs"]
            failed += [(target.name, kind, text) for kind, text in found["failures"].items()]
            figures = f"{found['inputs']:>9,} {found['seconds']:>8.0f} {1000 * found['slowest']:>10.1f}"
            figures += f" {found['memory'] / 2**20:>8.1f}"
            print(f"{target.name:<24} {figures}  {len(found['failures'])}", flush=True)
    for name, kind, text in failed:
        print(f"\n{name}: {kind}, {len(text):,} characters: {text[:400]!r}")
    print(f"\n{total:,} inputs, {len(failed)} kinds of failure")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
