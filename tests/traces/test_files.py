"""Files of traces, the tags around a thought, traces of the tasks, against values worked out by hand."""

import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from factories import MANIFEST, NATALIA, SKY, SKY_NORMAL, call, write_lines
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_traces.errors import UserError
from mlx_traces.records import Trace
from mlx_traces.tasks import countdown, gsm8k, solver, thoughts
from mlx_traces.tasks.thoughts import normalise, parts, restyle
from mlx_traces.traces import files, importing, solutions
from mlx_traces.traces.files import manifest_of, read_traces, write_traces
from mlx_traces.traces.importing import import_traces

ROUND = {"question": "What is 1,000 times two?", "answer": "It is $<<1000*2=2000>>2,000.\n#### 2,000"}
BARE = {"question": "What is 6 times 7?", "answer": "42"}


def trace(**changes):
    return Trace(**{"id": "a", "messages": ({"role": "user", "content": "Q?"},), "completion": "A", **changes})


# ---------------------------------------------------------------------------------- files


def test_a_file_comes_back_as_it_was_written(tmp_path):
    made = [
        trace(completion="<think>\nzwölf\n</think>\n🙂"),
        trace(sample=1, task="gsm8k", columns=NATALIA, prompt="boxed", source="hand", verdict="correct"),
        trace(
            messages=(),
            completion_ids=(5, 7),
            logprobs=(-0.5, 0.0),
            finish_reason="stop",
            scores={"a": None, "b": 0.0},
            score=0.0,
        ),
        trace(completion="", forced=(1,)),  # an earlier version's
        trace(completion="So Wait", completion_ids=(5, 7), forced=(1,), forced_text=((3, 7),)),
    ]
    path = tmp_path / "deep" / "file.jsonl"
    assert write_traces(path, iter(made), MANIFEST) == 5
    assert list(read_traces(path)) == [(f"{path}:{line}", one) for line, one in enumerate(made, 1)]
    assert sorted(file.name for file in path.parent.iterdir()) == ["file.jsonl", "file.manifest.json"]


def test_the_manifest_says_what_the_file_is(tmp_path):
    path, skipped = tmp_path / "file.jsonl", Counter()

    def some():
        yield trace()
        skipped["too long"] += 2

    write_traces(path, some(), {**MANIFEST, "counts": {"skipped": skipped}})
    manifest = manifest_of(path)
    assert manifest["counts"] == {"written": 1, "skipped": {"too long": 2}}
    assert (manifest["file"], manifest["source"], manifest["seed"]) == ("file.jsonl", "hand", 3)
    line = b'{"id": "a", "messages": [{"role": "user", "content": "Q?"}], "completion": "A", "sample": 0}\n'
    assert path.read_bytes() == line
    assert manifest["sha256"] == hashlib.sha256(line).hexdigest()
    assert manifest["config"] == {"b": 1, "a": None}
    assert manifest["config_hash"] == files.config_hash({"a": None, "b": 1}) != files.config_hash({"a": 0, "b": 1})
    assert set(manifest["versions"]) >= {"python", "mlx-traces"} and manifest["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["time"])
    path.write_bytes(line.replace(b'"A"', b'"B"'))
    with pytest.raises(UserError, match="is not the file that its manifest describes"):
        manifest_of(path)
    with pytest.raises(UserError, match=r"other\.manifest\.json: cannot be read"):
        manifest_of(tmp_path / "other.jsonl")


def test_nothing_is_overwritten_or_left_half(tmp_path):
    path = tmp_path / "file.jsonl"

    def broken():
        yield trace()
        raise UserError("source.jsonl:2: broken")

    with pytest.raises(UserError, match="source.jsonl:2"):
        write_traces(path, broken(), MANIFEST)
    counts = {"skipped": Counter({"empty completion": 2})}
    with pytest.raises(UserError, match=r"no traces to write; counted: 2 skipped \(empty completion\)"):
        write_traces(path, [], {**MANIFEST, "counts": counts})
    assert not list(tmp_path.iterdir())
    for name in ("file.jsonl", "file.manifest.json"):
        (tmp_path / name).write_text("mine")
        drawn = iter([trace()])
        with pytest.raises(UserError, match=f"{name} exists; remove it, or choose another --out"):
            write_traces(path, drawn, MANIFEST)
        assert next(drawn) and [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(.*\); choose another --out"):
        write_traces(tmp_path / "file" / "x.jsonl", [trace()], MANIFEST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": "Q?"}, "'messages' must be a list"),
        ({"completion": None}, "'completion' must be a text, not NoneType"),
        ({"columns": "x"}, "'columns' must be an object, not str"),
        ({"sample": True}, "'sample' must be a whole number, not bool"),
        ({"sample": 1.5}, "'sample' must be a whole number, not float"),
        ({"completion_ids": 5}, "'completion_ids' must be a list of numbers, not int"),
        ({"logprobs": ["x"]}, "'logprobs' must be a list of numbers"),
        ({"forced_text": 5}, "'forced_text' must be a list of pairs, not int"),
        ({"forced_text": [5]}, "'forced_text' must be pairs of places in the completion, 0 to 1"),
        ({"forced_text": [[0, 1, 1]]}, "'forced_text' must be pairs of places"),
        ({"forced_text": [[1, 0]]}, "'forced_text' must be pairs of places"),
        ({"forced_text": [[-1, 1]]}, "'forced_text' must be pairs of places"),
        ({"forced_text": [[0, 2]]}, "'forced_text' must be pairs of places"),
        ({"forced_text": [[0, True]]}, "'forced_text' must be pairs of places"),
        ({"score": "1"}, "'score' must be a number, not str"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"scores": {"format": "x"}}, "'scores' must be numbers or null, by name"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, changes, message):
    row = trace().to_row()
    path = write_lines(tmp_path / "file.jsonl", row, {**row, **changes})
    with pytest.raises(UserError, match=re.escape(f"{path}:2: {message}")):
        list(read_traces(path))
    Path(path).write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r":1: 'messages' is missing; this row has id; .*`mlx-traces data import`"):
        list(read_traces(path))
    Path(path).write_text("{\n")
    with pytest.raises(UserError, match=r":1: not JSON \(.* at character \d+\); mend the line, or remove it"):
        list(read_traces(path))


def test_null_is_as_if_left_out(tmp_path):
    row = trace(scores={"format": None}).to_row()
    nothing = dict.fromkeys(("task", "columns", "prompt", "source", "sample", "completion_ids", "finish_reason"))
    path = write_lines(tmp_path / "file.jsonl", {**row, **nothing}, {**row, "scores": None, "score": None})
    one, other = (trace for _, trace in read_traces(path))
    assert (one.task, one.columns, one.sample, one.scores) == ("", {}, 0, {"format": None})
    assert (other.scores, other.score) == ({}, None)


# ---------------------------------------------------------------------------------- tags


@pytest.mark.parametrize(
    ("text", "thought", "solution", "normal"),
    [
        ("<think>\na\n</think>\n<answer>4</answer>", "a", "<answer>4</answer>", None),
        (SKY["conversations"][1]["value"], "Two and two.\n\nWait, count: 3, 4.", "The sum is \\(\\boxed{4}\\).", ...),
        ("Okay, so a\n</think>\n\nIt is \\boxed{4}.", "Okay, so a", "It is \\boxed{4}.", ...),
        ("<Thinking>a</THINKING>b", "a", "b", ...),
        ("<reasoning>\na\n</reasoning>\n<answer>\n4\n</answer>", "a", "<answer>\n4\n</answer>", ...),
        ("<think>a</think><solution>b\n#### 4</solution>", "a", "b\n#### 4", ...),
        ("[THINK]a[/THINK]b", "a", "b", ...),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            "a",
            "b",
            ...,
        ),
        ("Let me see.\n<think>a</think>b", "Let me see.\na", "b", ...),
        ("<think>a<think>b</think>c</think>d", "a\nb\nc", "d", ...),
        ("<think>a</think>b<think>c</think>d", "a\nb\nc", "d", ...),
        ("<think>\n\n</think>\n\nb", "", "b", "<think>\n\n</think>\nb"),
        ("<think>a</think>", "a", "", "<think>\na\n</think>"),
        ("<think>a", "a", "", "<think>\na"),
        ("<think>a</think>b<think>c", "a\nb\nc", "", "<think>\na\nb\nc"),
        # Tags of another pair are words, but may close what is open.
        ("<think>\na Vec<Thought>\n</think>\nVec<Thought> b", "a Vec<Thought>", "Vec<Thought> b", None),
        ("<think>\n[/THINK]\n</think>\n<reasoning>b</reasoning>", "[/THINK]", "<reasoning>b</reasoning>", None),
        ("a</think>b Vec<Thought>", "a", "b Vec<Thought>", ...),
        ("[THINK]a<thinking>[/THINK]b<thinking>", "a<thinking>", "b<thinking>", ...),
        ("<think>a Vec<Thought> b", "a Vec<Thought> b", "", "<think>\na Vec<Thought> b"),
        ("<think>a</thinking>b", "a", "b", ...),
        ("<think>a</think>b</thinking>c<think>d</thinking>e", "a\nb\nc\nd", "e", ...),
        ("a <answer>4</answer> \n", None, "a <answer>4</answer>", "a <answer>4</answer>"),
        ("<solution>a</solution>", None, "a", "a"),
        ("<th<think>ink>a</think>b", "<th\nink>a", "b", ...),
        ("a < b, <thinkk>, < think >", None, "a < b, <thinkk>, < think >", "a < b, <thinkk>, < think >"),
        ("", None, "", ""),
    ],
)
def test_parts_and_normal_form(text, thought, solution, normal):
    assert parts(text) == (thought, solution)
    expected = {None: text, ...: f"<think>\n{thought}\n</think>\n{solution}"}.get(normal, normal)
    assert normalise(text) == expected


def test_the_sky_t1_style_is_written_as_that_data_set_is():
    assert restyle(SKY_NORMAL, "sky-t1") == SKY["conversations"][1]["value"]
    assert restyle("<think>a", "sky-t1") == "<|begin_of_thought|>\n\na"
    assert restyle("4", "sky-t1") == "<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>"
    with pytest.raises(UserError, match="unknown style 'sky-t2': choose think or sky-t1; did you mean 'sky-t1'"):
        restyle("4", "sky-t2")


PIECES = [
    *("<think>", "</think>", "<thinking>", "</reasoning>", "<|begin_of_thought|>", "<|end_of_thought|>", "[/THINK]"),
    *("<|begin_of_solution|>", "</solution>", "<answer>", "</answer>", "<|end|>", "<|channel|>", "analysis"),
    *("final<|message|>", "<|start|>assistant", "<th", "ink>", "</", "\n", " ", "\u2028", "a", "İ", "\\boxed{4}"),
    *("<solution>", "<output>", "</output>"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14).map("".join)


@given(TEXTS)
def test_normalising_twice_is_normalising_once(text):
    normal = normalise(text)
    thought, solution = parts(text)
    assert normalise(normal) == normal and parts(normal) == (thought, solution)
    for style in thoughts.STYLES:
        styled = restyle(text, style)
        assert normalise(styled) == normal and restyle(styled, style) == styled
        assert parts(styled) == (thought, solution)
    found = re.compile(r"</?think>|_of_(thought|solution)\|>")
    assert not found.search((thought or "") + "\0" + solution)


@given(TEXTS)
@example("<|end|></think><answer>")
def test_only_tags_ends_of_turns_and_white_space_change(text):
    def untagged(text):
        found = list(thoughts.tags(text))
        starts, ends = [0, *(tag.end() for tag in found)], [*(tag.start() for tag in found), len(text)]
        return " ".join(text[start:end] for start, end in zip(starts, ends, strict=True))

    words, kept = untagged(text), " ".join(untagged(part or "") for part in parts(text))  # whose words may be tags
    kept = re.sub("</?(?:solution|output)>", " ", kept)  # those within a part are its text
    ends_of_turns = re.compile("|".join(map(re.escape, thoughts.ENDS)))  # each part may lose those at its end
    assert ends_of_turns.sub(" ", kept).split() == ends_of_turns.sub(" ", words).split()


@given(st.sampled_from(["", "<think>", "<thinking>"]), st.text("ab 4#\n{}\\", max_size=20))
def test_grades_do_not_change(opening, thought):
    problem = gsm8k.parse({"question": "?", "answer": "4"}, "here")
    for end in ("#### 4", "\\boxed{4}", "so 5", "<answer>4</answer>", ""):
        text = f"{opening}{thought}</think>{end}" if opening != "<thinking>" else f"{opening}{thought}</thinking>{end}"
        before = gsm8k.grade(problem, text)["tolerant"].verdict
        assert gsm8k.grade(problem, normalise(text))["tolerant"].verdict == before
        assert gsm8k.grade(problem, restyle(text, "sky-t1"))["tolerant"].verdict == before


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<", "<|", "<|end|>", "<|end|><|start|>assistant", " ", "<<"])
def test_hostile_texts_take_linear_time(tmp_path, piece):
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    normalise(text), restyle(text + "x", "sky-t1"), solutions._ANNOTATION.sub("", text)
    assert time.process_time() - start < 5


# ---------------------------------------------------------------------------------- traces of the tasks


def test_worked_solutions_become_traces(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", NATALIA, BARE, ROUND)
    told = "In May 48/2 = 24 clips.\nAltogether 48+24 = 72 clips."
    for style, prompt, completion, extractors in (
        (
            "think",
            "thinking",
            f"<think>\n{told}\n</think>\n<answer>72</answer>",
            {"tolerant", "flexible", "last_number"},
        ),
        ("plain", "hash", f"{told}\n#### 72", set(gsm8k.TASK.extractors)),
        ("boxed", "boxed", f"{told}\n\\boxed{{72}}", {"tolerant", "flexible", "last_number"}),
    ):
        skipped = Counter()
        first, second = solutions.gsm8k_traces("train", path, None, 0, style=style, skipped=skipped)
        assert skipped == {"no worked solution": 1}
        assert first.source == "rows.jsonl"
        assert first.completion == completion and "It is $2,000." in second.completion
        problem = gsm8k.parse(NATALIA, "here")
        assert (first.id, first.task, first.columns, first.prompt) == (problem.id, "gsm8k", NATALIA, prompt)
        assert list(first.messages) == gsm8k.PROMPTS[prompt].messages(problem)
        for one in (first, second):
            scores = gsm8k.grade(gsm8k.parse(one.columns, "here"), one.completion)
            assert {name for name, score in scores.items() if score.correct} == extractors
    with pytest.raises(UserError, match="unknown style 'bold'"):
        list(solutions.gsm8k_traces("train", path, None, 0, style="bold"))


def test_the_solvers_traces_are_correct_in_every_prompt_style():
    skipped = Counter()
    made = list(solutions.countdown_traces(60, "train", 4, (3, 4), tuple(countdown.PROMPTS.values()), skipped))
    assert len(made) == 3 * (60 - skipped["no short trace"])
    assert [one.prompt for one in made[:3]] == ["direct", "thinking", "tinyzero"] and made[0].id == made[2].id
    for one in made:
        problem = countdown.parse(one.columns, "here")
        assert countdown.grade(problem, one.completion)["answer"].correct and one.id == problem.id
        assert list(one.messages) == countdown.PROMPTS[one.prompt].messages(problem)
        assert (parts(one.completion)[0] is None) == (one.prompt == "direct")
        assert one.completion.startswith(countdown.PROMPTS[one.prompt].prefill)


def test_a_countdown_trace_word_for_word():
    messages, completion = solver.solved(countdown.PROMPTS["thinking"], [2, 3, 4], 20)
    thought = "3 + 2 = 5, 5 + 4 = 9, 5 - 4 = 1, 5 * 4 = 20 yes"
    assert completion == f"<think>\n{thought}\n</think>\n<answer>(3 + 2) * 4</answer>"
    assert messages[0]["content"].startswith("Make 20 from the numbers [2, 3, 4].")
    assert solver.solved(countdown.PROMPTS["direct"], [2, 3, 4], 20)[1] == "<answer>(3 + 2) * 4</answer>"
    assert solver.solved(countdown.PROMPTS["tinyzero"], [2, 3, 4], 20)[1] == (
        f"Let me solve this step by step.\n<think>\n{thought}\n</think>\n<answer>(3 + 2) * 4</answer>"
    )
    assert solver.solved(countdown.PROMPTS["direct"], [1, 1, 1], 50) is None
    skipped = Counter()
    list(solutions.countdown_traces(50, "train", 0, (4, 4), skipped=skipped))
    assert skipped["no short trace"] > 0


def test_a_solver_that_gives_up_does_so_the_same_way_each_time_with_or_without_a_thought():
    styles = (countdown.PROMPTS["direct"], countdown.PROMPTS["thinking"])
    for reason in ({"give_up": 0.5}, {"daunting": 40}):
        made = list(solutions.countdown_traces(60, "train", 4, (3, 3), styles, **reason))
        assert made == list(solutions.countdown_traces(60, "train", 4, (3, 3), styles, **reason))
        wrong = {"direct": 0, "thinking": 0}
        for one in made:
            verdict = countdown.grade(countdown.parse(one.columns, "here"), one.completion)["answer"].verdict
            wrong[one.prompt] += verdict == "wrong_value"
            if one.prompt == "thinking":
                assert verdict == ("wrong_value" if "no\nnear " in one.completion else "correct")
        assert all(10 < count < 40 for count in wrong.values())


# ---------------------------------------------------------------------------------- the command line


def test_the_commands_write_traces_and_say_how_many(tmp_path):
    rows, out = write_lines(tmp_path / "rows.jsonl", NATALIA, BARE), tmp_path / "new" / "gsm8k.jsonl"
    result = call("data", "gsm8k", "--data", rows, "--style", "plain", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"1 traces written to {out}; 1 skipped (no worked solution)\n" and not result.stdout
    assert [one.completion[-7:] for _, one in read_traces(out)] == ["#### 72"]
    assert manifest_of(out)["config"] == {
        **{"split": "train", "data": rows, "limit": None, "seed": 0, "style": "plain", "prompt": "hash"}
    }
    again = call("data", "gsm8k", "--data", rows, "--out", out)
    assert again.exit_code == 1 and "exists; remove it, or choose another --out" in again.output

    out = tmp_path / "countdown.jsonl"
    result = call("data", "countdown-traces", "--n", 9, "--prompt", "direct", "--prompt", "thinking", "--out", out)
    assert result.exit_code == 0 and f"traces written to {out}" in result.stderr
    assert {one.prompt for _, one in read_traces(out)} == {"direct", "thinking"}
    assert manifest_of(out)["config"]["operands"] == [3, 4] and manifest_of(out)["seed"] == 0

    sky, out = tmp_path / "sky.json", tmp_path / "sky.jsonl"
    sky.write_text(json.dumps([SKY]))
    result = call("data", "import", sky, "--format", "sharegpt", "--style", "keep", "--out", out)
    assert result.stderr == f"1 traces written to {out}\n"
    assert next(read_traces(out))[1].completion == SKY["conversations"][1]["value"]
    assert manifest_of(out)["counts"] == {"written": 1, "skipped": {}, "dropped": {}}


def test_errors_of_the_commands_are_one_line(tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", NATALIA)
    for arguments, message in (
        (["gsm8k", "--data", rows, "--style", "bold"], "unknown style 'bold': choose think, plain or boxed"),
        (["gsm8k", "--data", rows, "--prompt", "thinkin"], "unknown prompt of gsm8k 'thinkin'"),
        (["countdown-traces", "--prompt", "x"], "unknown prompt of countdown 'x'"),
        (["import", rows, "--format", "sharegpt"], "rows.jsonl:1: 'conversations' is missing; this row has question"),
        (["import", rows, "--format", "text", "--task", "x"], "unknown task 'x'"),
        (["import", rows, "--format", "text", "--style", "x"], "unknown style 'x'"),
    ):
        result = call("data", *arguments, "--out", tmp_path / "out.jsonl")
        assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("command", ["filter IN", "score IN", "reformat IN", "data countdown-traces", "generate"])
def test_a_folder_is_refused_where_a_file_is_written(command, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", trace().to_row())
    for folder in ("", ".", "/"):
        result = call(*command.replace("IN", file).split(), "--out", folder)
        assert result.exit_code == 1 and re.search(r"Error: [./] is a folder; name a file with --out", result.output)


def test_help_names_every_format_and_style():
    text = call("data", "import", "--help").output
    assert all(name in text for name in (*importing.FORMATS, *thoughts.STYLES, "keep"))
    assert all(name in call("data", "gsm8k", "--help").output for name in solutions.GSM8K_STYLES)


def test_the_readmes_field_table_and_lines_are_true(tmp_path):
    text = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(Trace.__dataclass_fields__)
    (block,) = re.findall(r"```json trace\n(.*?)```", text, re.DOTALL)
    (tmp_path / "trace.jsonl").write_text(block)
    assert len(list(read_traces(tmp_path / "trace.jsonl"))) == block.count("\n") > 1
    blocks = dict(re.findall(r"^`([\w-]+)`: (?:[^\n]+\n)+\n```json\n(.*?)```", text, re.DOTALL | re.MULTILINE))
    assert set(blocks) == set(importing.FORMATS)
    for form, block in blocks.items():
        (tmp_path / "rows.jsonl").write_text(block)
        assert list(import_traces(str(tmp_path / "rows.jsonl"), form))


def test_this_room_loads_no_mlx():
    code = "import sys, mlx_traces.traces\nassert not {'mlx', 'datasets', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
