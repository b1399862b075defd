"""The evaluator end to end, on nano: run folders, resume, agreement of batched and single runs, comparison."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from stress import killing

import mlx_traces
from mlx_traces.cli import main
from mlx_traces.config import CompareConfig, EvalConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.comparison import Run, per_question, read_run
from mlx_traces.evaluation.completion import Completion
from mlx_traces.evaluation.evaluator import grade_sample, plan, sample_seed, summarize
from mlx_traces.models import loading
from mlx_traces.pipelines.compare import requested
from mlx_traces.pipelines.verify import verify
from mlx_traces.tasks import get_task

SMALL = {"task": "countdown", "limit": 24, "max_tokens": 128}


def test_without_mlx_an_evaluation_ends_in_one_line():
    code = (
        "import sys; sys.modules['mlx.core'] = None\n"
        "import mlx_traces; from mlx_traces.errors import UserError\n"
        "try: mlx_traces.evaluate(limit=1, out='never')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("MLX has no backend here: pip install 'mlx-traces[cpu]'")


def samples_of(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [{key: value for key, value in row.items() if key != "elapsed"} for row in rows]


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "batched"
    return folder, mlx_traces.evaluate(out=folder, rows=16, **SMALL)


def test_batched_and_one_by_one_agree(batched, tmp_path):
    folder, result = batched
    single = mlx_traces.evaluate(out=tmp_path / "single", rows=1, **SMALL | {"limit": 5})
    assert without_clock(samples_of(folder))[:5] == without_clock(samples_of(tmp_path / "single"))
    assert (single.total_questions, result.total_questions) == (5, 24)
    assert single.correct_count == sum(row["correct"] for row in samples_of(folder)[:5])
    assert len({row["completion"] for row in samples_of(folder)}) > 12


def test_the_run_folder_says_everything(batched):
    folder, result = batched
    stored = json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps(vars(result)))
    rows = samples_of(folder)
    assert stored["correct_count"] == sum(row["correct"] for row in rows)
    assert stored["mean_tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 24)
    assert stored["ci_low"] < stored["accuracy"] < stored["ci_high"]
    assert set(stored["by_stratum"]) == {"3 operands", "4 operands"}
    assert set(rows[0]["extractions"]) == {"answer", "tolerant"}
    assert rows[0]["prompt"].startswith("<|im_start|>user\nMake ") and rows[0]["question"].startswith("nums [")
    run = json.loads((folder / "run.json").read_text())
    assert run["identity"]["max_tokens"] == 128 and run["identity"]["prompt"]["name"] == "thinking"
    assert {"versions", "git_revision", "backend", "rows", "started", "command", "grader"} <= set(run)


def test_an_existing_run_is_not_overwritten(batched):
    folder, result = batched
    before, rows = (folder / "samples.jsonl").read_bytes(), without_clock(samples_of(folder))
    with pytest.raises(UserError, match="exists; pass --resume to continue it, or choose another --out .in Python"):
        mlx_traces.evaluate(out=folder, **SMALL)
    with pytest.raises(UserError, match=r"started with other settings \(max_tokens was 128, now 64\)"):
        mlx_traces.evaluate(out=folder, resume=True, **SMALL | {"max_tokens": 64})
    assert (folder / "samples.jsonl").read_bytes() == before
    again = mlx_traces.evaluate(out=folder, resume=True, rows=4, **SMALL)
    assert again.accuracy == result.accuracy and without_clock(samples_of(folder)) == rows


def test_a_run_of_an_older_version_is_not_mixed_with_this_ones_rules(tmp_path):
    """Of the stop rule, which decides what is sampled, it is refused; of the graders' rules a note says so."""
    (tmp_path / "mine.yaml").write_text("user: 'nums {nums}, target {target}'\nstop: [STOP]\n")
    settings = {**SMALL, "prompt": str(tmp_path / "mine.yaml"), "limit": 3, "max_tokens": 8}
    assert mlx_traces.evaluate(out=tmp_path / "a", **settings).notes == []
    folder = tmp_path / "a"
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    about = json.loads((folder / "run.json").read_text())
    assert about["identity"]["stops"] == "after thoughts"

    def resumed(**changes):
        (folder / "run.json").write_text(json.dumps(about | changes))
        (folder / "samples.jsonl").write_text("".join(lines[:2]))
        return mlx_traces.evaluate(out=folder, resume=True, **settings)

    before = {key: value for key, value in about["identity"].items() if key != "stops"}
    with pytest.raises(UserError, match=r"stops: an older version let stop strings end thoughts too\); choose another"):
        resumed(identity=before)
    assert resumed().notes == []
    assert re.match("2 samples were graded by version 1 of the graders' rules, the oth", *resumed(grader=1).notes)
    free = plan(EvalConfig(**settings, stop_in_thoughts=True)).identity()
    assert "stops" not in free | plan(EvalConfig(**SMALL)).identity()


def test_a_plan_and_a_model_read_their_files_once(monkeypatch):
    read = []
    for module in (evaluator, loading):
        monkeypatch.setattr(module, "fingerprint", lambda folder: read.append(folder.name) or f"of {folder.name}")
    planned, loaded = plan(EvalConfig(**SMALL, adapter="adapters/nano-grpo")), loading.load("nano")
    assert planned.label and planned.identity() == planned.identity()
    assert planned.identity()["adapter_files"] == "of nano-grpo" and loaded.about()["fingerprint"] == "of nano"
    assert loaded.about() == loaded.about() and sorted(read) == ["nano", "nano", "nano-grpo"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "samples": 2, "limit": 12}], ids=["greedy", "sampled"])
def test_kill_and_resume_equals_an_uninterrupted_run(settings, batched, tmp_path):
    """The greedy run is compared with the batched one: the number of rows changes nothing."""
    settings, whole = {**SMALL, "rows": 4, **settings}, batched[0]
    if "temperature" in settings:
        settings["max_tokens"], whole = 64, tmp_path / "whole"
        mlx_traces.evaluate(out=whole, **settings)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    folder = tmp_path / "killed"
    process = killing.start("eval", *flags, "--out", folder)
    begun = (folder / "samples.jsonl").exists
    assert killing.kill_when(process, lambda: begun() and len(samples_of_partial(folder)) >= 4)
    kept = samples_of_partial(folder)
    assert 4 <= len(kept) < 24 and not (folder / "result.json").exists()
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"id": "cut off while being wri')
    resumed = mlx_traces.evaluate(out=folder, resume=True, **settings)
    assert without_clock(samples_of(folder)) == without_clock(samples_of(whole))
    assert resumed.accuracy == json.loads((whole / "result.json").read_text())["accuracy"]
    finished = {(row["id"], row["sample"]): row for row in samples_of(folder)}
    assert all(finished[row["id"], row["sample"]] == row for row in kept)


def samples_of_partial(folder):
    lines = (folder / "samples.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def test_several_samples_give_pass_and_majority_at_k(tmp_path):
    result = mlx_traces.evaluate(
        out=tmp_path / "run", task="countdown", limit=6, samples=4, temperature=1.0, max_tokens=128
    )
    rows = samples_of(tmp_path / "run")
    solved = {row["id"] for row in rows if row["correct"]}
    assert result.total_questions == 24 and set(result.pass_at_k) == {"1", "2", "4"}
    assert result.pass_at_k["1"] == pytest.approx(result.accuracy)
    assert result.pass_at_k["4"] == pytest.approx(len(solved) / 6)
    assert result.pass_at_k["1"] <= result.pass_at_k["2"] <= result.pass_at_k["4"]
    assert result.maj_at_k["1"] == pytest.approx(sum(r["correct"] for r in rows if r["sample"] == 0) / 6)
    assert len({row["completion"] for row in rows}) > 12
    assert sample_seed(0, "a", 1) != sample_seed(0, "a", 0) != sample_seed(1, "a", 0)


def test_the_majority_is_counted_by_the_graders_equality(tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text('{"question": "Capital of France?", "answer": "Paris"}\n')
    planned = plan(EvalConfig(task="qa", data=str(data), samples=5, temperature=1))
    said = ["Rome", "Rome", "Paris.", "**Paris**", "Paris"]
    answers = [Completion("?", "", text, 1, "stop") for text in said]
    rows = [grade_sample(planned, planned.problems[0], at, answer) for at, answer in enumerate(answers)]
    result = summarize(planned, [row | {"elapsed": 1.0} for row in rows], "run", None, [])
    assert result.maj_at_k == {"1": 0.0, "2": 0.0, "4": 0.0, "5": 1.0}
    assert per_question([Run("run", vars(result), rows)]).iloc[0, 3] == "Paris."


def test_a_sample_says_which_of_two_readings_was_right(tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text('{"question": "How many millions?", "answer": "4"}\n')
    planned = plan(EvalConfig(task="qa", data=str(data)))
    said = [Completion("?", "", text, 1, "stop") for text in ("It is 4 million.", "It is 4.")]
    rows = [grade_sample(planned, planned.problems[0], 0, answer) for answer in said]
    assert rows[0]["correct"] and rows[0]["notes"] == {"tolerant": "read as 4", "last_number": "read as 4"}
    assert rows[1]["correct"] and "notes" not in rows[1]


def test_a_model_that_never_stops_is_a_share_not_an_error(tmp_path):
    result = mlx_traces.evaluate(out=tmp_path / "run", task="countdown", limit=6, max_tokens=3)
    assert result.truncated == 1.0 and result.accuracy == 0.0 and result.verdicts == {"no_answer": 6}


def test_own_questions_and_an_own_prompt(tmp_path):
    data, prompt = tmp_path / "own.jsonl", tmp_path / "asked.yaml"
    data.write_text('{"question": "two and two?", "answer": 4}\n{"question": "sky?", "answer": "blue"}\n')
    prompt.write_text("system: Be brief.\nuser: 'Say it: {question}'\nprefill: 'I say '\n")
    mlx_traces.evaluate(
        out=tmp_path / "run", task="qa", data=str(data), prompt=str(prompt), max_tokens=4, system="Be kind."
    )
    first = samples_of(tmp_path / "run")[0]
    assert first["prompt"].endswith("Say it: two and two?<|im_end|>\n<|im_start|>assistant\nI say ")
    assert "system\nBe kind.<|im_end|>" in first["prompt"] and first["gold"] == "4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": "gsm9k"},
            "unknown task 'gsm9k': choose gsm8k, countdown, math, qa or module:TASK; did",
        ),
        ({"prompt": "thinkin"}, "unknown prompt of countdown 'thinkin': choose direct, thinking, tinyzero"),
        ({"extractor": "strict"}, "unknown extractor of countdown 'strict': choose answer or tolerant"),
        ({"task": "gsm8k", "data": "nothing.jsonl"}, r"nothing.jsonl: cannot be read \(No such file"),
        ({"task": "qa"}, "task qa has no questions of its own; pass --data FILE"),
        ({"limit": 0}, "limit: must be at least 1"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"modle": "nano"}, "unknown field 'modle'; did you mean 'model'"),
        ({"model": "nano+nowhere"}, "nowhere"),
        ({"adapter": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        mlx_traces.evaluate(out=tmp_path / "run", **{"model": "nano", "limit": 2, **settings})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_malformed_data_line_is_named_and_no_run_is_left(tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text('{"nums": [3, 4], "target": 7}\n{"numbers": [3, 4], "target": 7}\n')
    with pytest.raises(UserError, match=r"problems.jsonl:2: 'nums' is missing; this row has numbers, target"):
        mlx_traces.evaluate(out=tmp_path / "run", task="countdown", data=str(data))
    data.write_text("\n")
    with pytest.raises(UserError, match="has no problems"):
        mlx_traces.evaluate(out=tmp_path / "run", task="countdown", data=str(data))
    assert not (tmp_path / "run").exists()


def test_a_question_is_never_its_own_worked_example(tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"question": f"Ann has {n} hats and gets {n}?", "answer": f"{2 * n}\n#### {2 * n}"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": "gsm8k", "data": str(data), "prompt": "fewshot", "shots_data": str(data), "split": "train[:3]"}
    planned = plan(EvalConfig(shots=5, **settings))
    assert planned.prompt.user.count("Answer: ") == 5
    assert not any(row["question"] in planned.prompt.user for row in rows[:3])
    with pytest.raises(UserError):
        plan(EvalConfig(shots=6, **settings))
    shown = [plan(EvalConfig(shots=3, **settings, **seeds)).prompt for seeds in ({}, {"seed": 1}, {"seed": 2})]
    assert plan(EvalConfig(shots=3, **settings, seed=1, data_seed=0)).prompt == shown[0] not in shown[1:]


def test_stop_strings_end_answers_and_are_counted(tmp_path):
    prompt = tmp_path / "mine.yaml"
    prompt.write_text(f"user: '{get_task('countdown').prompts['thinking'].user}'\nstop: [' no', </answer>]\n")
    result = mlx_traces.evaluate(out=tmp_path / "run", prompt=str(prompt), **SMALL | {"limit": 12})
    rows = samples_of(tmp_path / "run")
    ended = [row for row in rows if "stop_string" in row]
    assert (result.stopped, result.stopped_in_thoughts) == (len(ended), 0)
    assert len(ended) > 6 and {row["stop_string"] for row in ended} == {"</answer>"}
    assert any(" no" in row["completion"] and not row["in_thought"] for row in ended)
    assert verify(tmp_path / "run")[1] == []

    flags = ("--prompt", prompt, "--stop-in-thoughts", "--limit", 8, "--max-tokens", 128, "--out", tmp_path / "inside")
    told = CliRunner().invoke(main, ["eval", *map(str, flags)]).output
    inside = read_run(tmp_path / "inside").result["stopped_in_thoughts"]
    assert inside > 1 and f"of 8 by a stop string, {inside} of them in a thought" in told


def test_a_sample_with_objects_within_objects_is_read(batched, tmp_path):
    shutil.copytree(batched[0], tmp_path / "deep")
    row = samples_of(tmp_path / "deep")[0] | {"more": json.loads('{"a": ' * 700 + "1" + "}" * 700)}
    (tmp_path / "deep" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert len(read_run(tmp_path / "deep").samples) == 1


def test_a_result_from_before_stop_strings_were_counted_is_read(batched, tmp_path):
    shutil.copytree(batched[0], tmp_path / "old")
    result = json.loads((tmp_path / "old" / "result.json").read_text())
    del result["stopped"], result["stopped_in_thoughts"]
    (tmp_path / "old" / "result.json").write_text(json.dumps(result))
    assert read_run(tmp_path / "old").result["stopped"] == 0
    assert verify(tmp_path / "old")[1] == []
    assert "stop_in_thoughts" not in json.loads((batched[0] / "run.json").read_text())["identity"]


def test_bad_requests_leave_no_run_behind(tmp_path):
    prompt = tmp_path / "mine.yaml"
    for content, settings, message in (
        ("user: 'Say {foo}'", {"prompt": str(prompt)}, "{foo} is not a column; the problems have nums, target"),
        ("user: 'Say'\nstop: ['']", {"prompt": str(prompt)}, "a stop string is empty"),
        ("", {"max_tokens": 9999}, "the model's context of 1024"),
        ("", {"samples": 4}, "--samples 4 would all be the same at temperature 0"),
    ):
        prompt.write_text(content)
        with pytest.raises(UserError) as raised:
            mlx_traces.evaluate(out=tmp_path / "run", **{"limit": 2, **settings})
        assert message in str(raised.value) and not (tmp_path / "run").exists()


def test_places_where_no_run_can_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="file is a file; choose another --out"):
        mlx_traces.evaluate(out=tmp_path / "file", **SMALL)
    for resume, message in ((False, "exists; pass --resume"), (True, "is not a run folder")):
        with pytest.raises(UserError, match=message):
            mlx_traces.evaluate(out=tmp_path / "folder", resume=resume, **SMALL)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine"]
    assert mlx_traces.evaluate(out=tmp_path / "empty", **SMALL | {"limit": 2}).total_questions == 2


def test_damaged_run_folders_are_named(batched, tmp_path):
    folder = tmp_path / "run"
    mlx_traces.evaluate(out=folder, **SMALL | {"limit": 4})
    whole = {path.name: path.read_text() for path in folder.iterdir()}
    lines = whole["samples.jsonl"].splitlines(keepends=True)
    other, empty = (json.dumps(json.loads(lines[0]) | change) + "\n" for change in ({"id": "zzz"}, {"verdicts": None}))
    for name, content, action, message in (
        ("samples.jsonl", other + lines[1], "resume", "sample 0 of problem zzz is not one of this run's"),
        ("samples.jsonl", lines[1] * 2, "resume", "sample 0 of problem .* occurs 2 times"),
        ("samples.jsonl", empty, "resume", "sample 1: 'verdicts' must be an object of texts, not NoneType"),
        ("samples.jsonl", whole["samples.jsonl"] + "garbage\n", "resume", "samples.jsonl:5: not JSON"),
        ("samples.jsonl", '{"id": "x"}\n', "resume", "samples.jsonl:1: 'sample' is missing"),
        ("run.json", '{"identity": [1]}', "resume", "'identity' is missing; the file is damaged"),
        ("result.json", "{}", "compare", "result.json lacks run, model"),
        ("samples.jsonl", '{"id": "x"}\n', "compare", "samples.jsonl:1: 'sample' is missing"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=message):
            if action == "compare":
                mlx_traces.compare(folder)
            else:
                mlx_traces.evaluate(out=folder, resume=True, **SMALL | {"limit": 4})
        (folder / name).write_text(whole[name])
    assert len(mlx_traces.compare(folder)) == 1


def test_changed_data_or_template_is_another_evaluation(tmp_path):
    import shutil

    from mlx_traces.models.names import resolve

    data, model = tmp_path / "own.jsonl", tmp_path / "model"
    shutil.copytree(resolve("nano")[0], model)
    settings = {"model": str(model), "task": "qa", "data": str(data)}

    def label():
        return plan(EvalConfig(**settings)).label

    data.write_text('{"question": "two and two?", "answer": 4}\n')
    labels = [label()]
    data.write_text('{"question": "two and two?", "answer": 5}\n')
    labels.append(label())
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    labels.append(label())
    assert len(set(labels)) == 3 and label() == labels[-1]
    prompt = tmp_path / f"{'ä' * 100}.yaml"
    prompt.write_text("user: '{question}'\n")
    settings["prompt"] = str(prompt)
    assert 150 < len(label().encode()) < 200  # a file system takes 255 bytes of a name


def test_compare_takes_the_flags_and_nothing_else(batched, tmp_path):
    folder, result = batched
    with pytest.raises(UserError, match="unknown field 'modles'; did you mean 'model'"):
        mlx_traces.compare(modles=["nano"], runs_dir=tmp_path)
    with pytest.raises(UserError, match="finished runs cannot be given another limit"):
        mlx_traces.compare(folder, limit=4)
    with pytest.raises(UserError, match="unknown extractor of this run 'strict': choose answer or tolerant"):
        mlx_traces.compare(folder, extractor="strict")
    frame = mlx_traces.compare(folder, extractor="tolerant")
    assert frame["extractor"][0] == "tolerant"
    assert frame["correct_count"][0] == result.extractors["tolerant"]["correct_count"]
    with pytest.raises(UserError, match="nope"):
        mlx_traces.compare(model=["nano", "nano+nope"], runs_dir=tmp_path / "runs", **SMALL)
    assert not (tmp_path / "runs").exists()  # found before the first evaluation


def test_requested_evaluations():
    def asked(config=None, **arguments):
        return [(e.model, e.prompt, e.limit) for e in requested(config or CompareConfig(), **arguments).evals]

    assert asked()[:2] == [("nano", "direct", 500), ("nano", "thinking", 500)]
    assert asked(settings={"limit": 5}) == [("nano", None, 5)]
    assert asked(prompts=["direct"], settings={"limit": 5}) == [("nano", "direct", 5)]
    assert asked(models=["a", "b"], prompts=["x"]) == [("a", "x", None), ("b", "x", None)]
    config = CompareConfig(evals=[EvalConfig(model="a", prompt="x", limit=9), EvalConfig(model="b", prompt="y")])
    assert asked(config) == [("a", "x", 9), ("b", "y", None)]
    assert asked(config, settings={"limit": 3}) == [("a", "x", 3), ("b", "y", 3)]
    assert asked(config, models=["c"]) == [("a", "x", 9), ("b", "y", None), ("c", None, None)]
    assert asked(runs=["somewhere"]) == []


def test_the_label_follows_the_settings_that_decide_the_result():
    def label(**settings):
        return plan(EvalConfig(**settings)).label

    assert label() == label(rows=7) == label(prompt="thinking")
    assert len({label(), label(seed=1), label(max_tokens=9), label(prompt="direct"), label(system="x")}) == 5
    assert label().startswith("countdown-nano-thinking-")


def test_compare_evaluates_what_is_missing_and_pairs_by_problem(tmp_path):
    settings = {"model": "nano", "prompt": ["direct", "thinking"], "runs_dir": tmp_path, "data": "3-numbers"}
    settings |= {"limit": 16, "max_tokens": 24}  # too few for a thought
    frame = mlx_traces.compare(out=tmp_path / "table", **settings)
    assert list(frame["prompt"]) == ["direct", "thinking"] and list(frame["total_questions"]) == [16, 16]
    direct, thinking = (read_run(tmp_path / name) for name in frame["run"])
    wins = [b["correct"] - a["correct"] for a, b in zip(direct.samples, thinking.samples, strict=True)]
    assert any(wins) and frame["diff"][1] == pytest.approx(sum(wins) / 16)
    written = {path.name for path in (tmp_path / "table").iterdir()}
    assert {
        "table.md",
        "table.csv",
        "table.json",
        "provenance.json",
        "per_question.csv",
        "results.json",
        "accuracy.png",
        "report.html",
    } <= written
    times = [(tmp_path / name / "result.json").stat().st_mtime_ns for name in frame["run"]]
    again = mlx_traces.compare(**settings)
    assert times == [(tmp_path / name / "result.json").stat().st_mtime_ns for name in again["run"]]
    reversed_ = mlx_traces.compare(*[tmp_path / name for name in frame["run"]], baseline=frame["run"][1])
    assert reversed_["diff"][0] == pytest.approx(-frame["diff"][1])


def test_compare_refuses_other_problems_and_unfinished_runs(batched, tmp_path):
    folder, _ = batched
    mlx_traces.evaluate(out=tmp_path / "other", **SMALL | {"limit": 4, "max_tokens": 4})
    with pytest.raises(UserError, match="different problems.*20 only in"):
        mlx_traces.compare(folder, tmp_path / "other")
    (tmp_path / "other" / "result.json").unlink()
    with pytest.raises(UserError, match="no result.json"):
        mlx_traces.compare(tmp_path / "other")
    with pytest.raises(UserError, match="no such run folder"):
        mlx_traces.compare(tmp_path / "nowhere")


@pytest.mark.real_model
def test_a_real_model_answers_word_problems(real_model, tmp_path):
    data = tmp_path / "problems.jsonl"
    questions = [("Tom has 3 apples and buys 4 more. How many apples has he?", 7), ("What is 12 + 30?", 42)]
    data.write_text("".join(json.dumps({"question": q, "answer": str(a)}) + "\n" for q, a in questions))
    result = mlx_traces.evaluate(
        model=str(real_model),
        task="gsm8k",
        data=str(data),
        prompt="plain",
        max_tokens=200,
        out=tmp_path / "run",
    )
    assert result.accuracy == 1.0 and result.truncated == 0.0, samples_of(tmp_path / "run")
