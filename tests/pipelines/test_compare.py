"""Comparisons that stop when decided, go on, and group trainings; a rule answers in a model's place."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from factories import call, rendered

import mlx_traces
from mlx_traces.cli import main
from mlx_traces.config import CompareConfig, EvalConfig, StudyConfig, StudyModel, StudyTask, build, shipped
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, evaluator, local
from mlx_traces.evaluation.completion import Completion
from mlx_traces.evaluation.evaluator import Source
from mlx_traces.models import loading
from mlx_traces.pipelines import compare, study, verify
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.text import interval, percent

ROWS = 200


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Return the (prompt, number) of each problem asked, as they are: `boxed` knows all, `plain` the even ones."""
    rows = [{"question": f"question {i}", "answer": str(i), "document": i // 4} for i in range(ROWS)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []

    @contextmanager
    def opened(planned, path, resume, kept):
        folder = RunFolder(path)
        folder.refuse(resume)

        def generate(todo):
            for index, (problem, _) in reversed([*enumerate(todo)]):  # as a batch's short answers end before others
                number = int(problem.gold)
                found.append((planned.prompt.name, number))
                right = planned.prompt.name == "boxed" or number % 2 == 0
                yield index, Completion("?", "", f"\\boxed{{{number if right else -1}}}", 3, "stop")

        yield planned, folder, Source(generate, {}, {}, [])

    monkeypatch.setattr(local, "opened", opened)
    monkeypatch.setattr("mlx_traces.evaluation.run.import_mlx", lambda: None)
    return found


def settings(tmp_path, **more):
    shared = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "model": "nano", "prompt": ["plain", "boxed"]}
    return shared | {"runs_dir": tmp_path / "runs", "stop_when_decided": True, "block": 10} | more


def test_it_stops_when_the_difference_is_decided_and_goes_on_from_there(tmp_path, asked):
    frame = mlx_traces.compare(**settings(tmp_path))
    count = int(frame["total_questions"][0])
    assert count % 10 == 0 and 10 < count < 100 and list(frame["total_questions"]) == [count, count]
    assert frame["p_holm"][1] <= 0.05 and frame["diff_low"][1] > 0 and frame["test"][1] == "anytime"
    said = frame.attrs["stopped"]
    assert said.startswith(f"Stopped after {count} of {ROWS} problems: the difference is decided.")
    numbers = [number for prompt, number in asked if prompt == "plain"]
    assert sorted(asked) == sorted([(prompt, n) for n in numbers for prompt in ("plain", "boxed")])
    assert numbers != sorted(numbers) and len(set(numbers)) == count  # a seeded order, each problem once
    assert [prompt for prompt, _ in asked[:20]] == ["plain"] * 10 + ["boxed"] * 10  # block by block, all rows together
    for run in (tmp_path / "runs").iterdir():
        assert verify.verify(run) == (f"{count} samples, verdicts and figures agree", [])

    before = list(asked)
    again = mlx_traces.compare(**settings(tmp_path, block=count))  # other blocks, the same sequence: nothing is asked
    assert asked == before and again["p_value"][1] == frame["p_value"][1]
    longer = mlx_traces.compare(**settings(tmp_path, stop_when_decided=None, growing=True, limit=count + 7))
    assert len(asked) == len(before) + 14 and longer["test"][1] == "McNemar"
    stored = mlx_traces.compare(*(tmp_path / "runs").iterdir())  # tested as if their size had been fixed
    assert stored.attrs["stopped"] == longer.attrs["stopped"] == comparison.GREW
    shorter = mlx_traces.compare(**settings(tmp_path, block=count))  # what is stored beyond does not count
    assert asked[len(before) + 14 :] == [] and list(shorter["total_questions"]) == [count, count]
    assert shorter["p_value"][1] == frame["p_value"][1]


def test_an_interrupted_block_is_finished_and_the_budget_ends_it(tmp_path, asked, monkeypatch):
    whole = evaluator.grade_sample

    def dies(planned, problem, *rest):
        if len(asked) == 25:
            raise Stopped("stopped")
        return whole(planned, problem, *rest)

    monkeypatch.setattr("mlx_traces.evaluation.run.grade_sample", dies)
    same = {"limit": 30, "prompt": ["plain", "thinking"]}  # the two do equally well
    with pytest.raises(Stopped):
        mlx_traces.compare(**settings(tmp_path, **same))
    frame = mlx_traces.compare(**settings(tmp_path, **same))
    assert len(asked) == 61  # only the one that was under way is repeated
    assert list(frame["total_questions"]) == [30, 30]
    assert frame.attrs["stopped"].startswith("Ended with the budget of 30 problems: 0 of 1 differences decided.")
    assert (frame["p_value"][1], frame["diff"][1]) == (1.0, 0.0)


def test_the_folder_has_a_page_that_says_it_stopped_and_report_repeats_it(tmp_path, asked):
    out, again = tmp_path / "table", tmp_path / "again.html"
    frame = mlx_traces.compare(**settings(tmp_path, out=out, baseline="nano_boxed"))
    row, count = frame.iloc[0], frame["total_questions"][0]
    figures = f"{percent(row['diff'], signed=True)}<small>{interval(row['diff_low'], row['diff_high'])}</small>"

    def shown(page):
        text = page.read_text()
        return all(
            part in text for part in (f'<p class="summary">{frame.attrs["stopped"]}</p>', figures, "anytime-valid")
        )

    assert frame.attrs["stopped"].startswith(f"Stopped after {count} of {ROWS} problems: ")
    assert shown(out / "report.html")
    mlx_traces.compare(**settings(tmp_path, stop_when_decided=None, growing=True))  # its runs grow to all problems
    assert call("report", out, "--out", again).exit_code == 0 and shown(again)
    turned = call("report", out, "--out", again, "--baseline", frame["run"][0])
    assert turned.exit_code == 0 and not shown(again)
    grown = call("report", *(tmp_path / "runs").iterdir(), "--out", again)
    assert grown.exit_code == 0 and not shown(again) and "of the folder of its --out" in again.read_text()


def test_report_of_a_comparison_shows_its_trainings_and_clusters(tmp_path, asked):
    base = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "model": "nano", "runs_dir": tmp_path / "runs"}
    mlx_traces.compare(**base, prompt=["plain", "boxed"])
    runs = sorted((tmp_path / "runs").iterdir(), key=lambda path: "plain" in path.name)
    boxed, plain = map(str, runs)
    shutil.copytree(plain, tmp_path / "other")
    run_file = tmp_path / "other" / "run.json"
    stored = json.loads(run_file.read_text())
    for changes, said in (
        ({}, r"recipe all: .* and other are the same evaluation; name each training or seed once"),
        ({"think_tokens": 8}, "recipe all: think_tokens is None and 8; only their training and seed may differ"),
        ({"top_p": 0.5}, "recipe all: top_p is 1.0 and 0.5; only their training"),
    ):
        run_file.write_text(json.dumps(stored | {"identity": stored["identity"] | changes}))
        with pytest.raises(UserError, match=said):
            mlx_traces.compare(boxed, recipes={"all": [plain, str(tmp_path / "other")]})
    run_file.write_text(json.dumps(stored | {"identity": stored["identity"] | {"seed": 1}}))
    out, again = tmp_path / "table", tmp_path / "again.html"
    recipes = {"all": [plain, str(tmp_path / "other")]}
    frame = mlx_traces.compare(boxed, recipes=recipes, out=out, extractor="last_number")
    page = (out / "report.html").read_text()
    assert page.count("Student&#39;s t over trainings") == 1 and frame["trainings"].tolist() == [1, 2]
    assert call("report", out, "--out", again).exit_code == 0
    assert without_times(again.read_text()) == without_times(page)
    mlx_traces.compare(boxed, plain, out=out, cluster="document")
    assert call("report", out, "--out", again).exit_code == 0 and "cluster-robust" in again.read_text()
    assert without_times(again.read_text()) == without_times((out / "report.html").read_text())

    file = out / "provenance.json"
    stored = json.loads(file.read_text())
    for change, said in (
        (
            {"runs": {"a": {"run": "a"}}},
            "provenance.json: runs.a.folders is missing or wrong, perhaps as an older version",
        ),
        ({"runs": {}}, "provenance.json: runs is missing or wrong"),
        ({"baseline": "nobody"}, "provenance.json: baseline is missing or wrong"),
        (
            {"runs": {stored["baseline"]: stored["runs"]["nano_plain"] | {"folders": ["gone"]}}},
            "its run gone is not here; call report",
        ),
    ):
        file.write_text(json.dumps(stored | change))
        done = call("report", out, "--out", again)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1) and said in done.stderr


def without_times(page):
    return re.sub(r"written [^<]* UTC|\d\d:\d\d:\d\d", "", page)


def test_a_study_stops_when_all_its_pairs_are_decided(tmp_path, asked, monkeypatch):
    task = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "prompts": ["plain", "boxed"]}
    given = {"name": "early", "tasks": [task], "models": [{"model": "nano"}], "out": str(tmp_path / "out")}
    given |= {"runs_dir": str(tmp_path / "runs"), "stop_when_decided": True, "block": 10}
    config = build(StudyConfig, given)
    (part,) = study.run(config)
    frame = mlx_traces.compare(**settings(tmp_path))  # the same runs, decided by the same rule
    assert part.comparison["total_questions"].tolist() == frame["total_questions"].tolist()
    (pair,) = part.pairs
    assert (pair.p, pair.low, pair.high) == tuple(frame.loc[1, ["p_value", "diff_low", "diff_high"]])
    said = frame.attrs["stopped"]
    texts = [(tmp_path / "out" / name).read_text() for name in ("study.md", "study.json", "report.html")]
    texts.append(
        " ".join(
            item if isinstance(item, str) else " ".join(rendered(item).split()) for item in study.to_terminal(part)
        )
    )
    assert said.startswith("Stopped after ") and all(said in text for text in texts)
    assert "times as often" not in study.said(part)[0]  # the bootstrap of a ratio does not allow for stopping
    assert all(line.startswith("begun") for line in study.preview(config))

    monkeypatch.setattr(study, "write", lambda config, parts: None)
    asked.clear()
    three = given | {
        "block": 50,
        "tasks": [task | {"prompts": ["boxed", "plain", "thinking"]}],
    }  # the last two do equally well
    study.run(build(StudyConfig, three | {"pairs": "baseline"}))
    assert len({number for _, number in asked}) < ROWS / 2
    study.run(build(StudyConfig, three))
    assert len({number for _, number in asked}) > ROWS / 2
    for change, text in (
        ({"cluster": "document"}, "does not go with --cluster"),
        ({"tasks": [task | {"prompts": ["plain"]}]}, "needs two different rows or more"),
        (
            {"models": [{"model": "nano"}] * 2},
            "tasks.0: two rows are the same evaluation, so their difference is never",
        ),
    ):
        with pytest.raises(UserError, match=text):
            study.run(build(StudyConfig, given | change))


def test_blocks_are_evaluated_in_processes_of_their_own_if_asked(tmp_path, asked, monkeypatch):
    limits = []

    class InThisProcess:
        def __init__(self, *_, **__): ...

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def submit(self, function, **settings):
            limits.append(settings["limit"])
            result = function(**settings)
            return type("Done", (), {"result": lambda self: result})()

    monkeypatch.setattr(compare, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(study, "write", lambda config, parts: None)
    task = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "prompts": ["plain", "thinking"], "limit": 50}
    given = {"name": "apart", "tasks": [task], "models": [{"model": "nano"}], "runs_dir": str(tmp_path / "runs")}
    (part,) = study.run(build(StudyConfig, given | {"apart": True, "stop_when_decided": True, "block": 20}))
    assert limits == [20, 20, 40, 40, 50, 50] and len(asked) == len(set(asked)) == 100
    assert part.runs[0].stopped.startswith("Ended with the budget of 50 problems: 0 of 1 differences decided.")


def test_the_study_command_takes_the_options(tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = {"task": "qa", "data": "qa.jsonl", "prompts": ["plain", "boxed"]}
    (tmp_path / "s.yaml").write_text(json.dumps({"name": "s", "tasks": [task, task], "models": [{"model": "nano"}]}))
    done = call("study", "s.yaml", "--stop-when-decided", "--block", 25)
    assert done.exit_code == 0 and done.stderr.count("25 of 200 problems: ") == 2  # each task stops by itself


def test_problems_of_two_tasks_are_named_with_their_tasks(tmp_path, asked):
    file = str(tmp_path / "qa.jsonl")
    tasks = [{"task": "qa", "data": file, "prompts": ["plain"]}, {"task": "gsm8k", "data": file, "prompts": ["plain"]}]
    config = {"tasks": tasks, "models": [{"model": "nano"}], "runs_dir": str(tmp_path / "runs")}
    for more in ({}, {"stop_when_decided": True}):
        said = "tasks.1, models.0: its 200 problems of gsm8k are not the 200 of qa in tasks.0, models.0, and .*"
        with pytest.raises(UserError, match=said + "name one task, or use `mlx-traces study`"):
            compare.compared(build(CompareConfig, config | more))
    short = [tasks[0], tasks[0] | {"limit": 5}]
    with pytest.raises(
        UserError, match="tasks.1, models.0: its 5 problems of qa are not the 200 of tasks.0, models.0,"
    ):
        compare.compared(build(CompareConfig, config | {"tasks": short}))


def test_a_model_is_loaded_once_where_rows_share_it(tmp_path, monkeypatch):
    loads, load = [], loading.load

    def counted(name, adapter=None, **settings):
        loads.append(adapter)
        return load(name, adapter, **settings)

    monkeypatch.setattr(loading, "load", counted)
    shared = {"model": "nano", "data": "3-numbers", "limit": 4, "max_tokens": 16, "rows": 4}
    frame = mlx_traces.compare(
        **shared, prompt=["direct", "thinking"], stop_when_decided=True, block=2, runs_dir=tmp_path / "runs"
    )
    assert frame["total_questions"].tolist() == [4, 4] and loads == [None]
    for name, prompt in zip(frame["run"], ("direct", "thinking"), strict=True):
        mlx_traces.evaluate(**shared, prompt=prompt, growing=True, out=tmp_path / prompt)
        texts = [
            [row["completion"] for row in comparison.read_run(path).samples]
            for path in (tmp_path / "runs" / name, tmp_path / prompt)
        ]
        assert texts[0] == texts[1]
    loads.clear()
    evals = [EvalConfig(**shared, prompt="direct", thinking=switch) for switch in (True, None)]
    noted, quiet = compare.collect(CompareConfig(evals=evals, runs_dir=str(tmp_path / "noted")))
    assert loads == [None] and "has no thinking switch" in noted.result["notes"][0] and quiet.result["notes"] == []
    loads.clear()
    adapter = str(shipped("adapters") / "nano-grpo")
    mlx_traces.compare(
        **shared | {"model": ["nano", f"nano+{adapter}", "nano"]},
        prompt="thinking",
        runs_dir=tmp_path / "more",
        system="x",
    )
    assert loads == [None, adapter]


def test_the_command_says_that_it_stopped(tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "compare --task qa --data qa.jsonl --prompt plain --prompt boxed --stop-when-decided --block 25 --format json"
    )
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 0
    assert json.loads(done.stdout)["stopped"].startswith("Stopped after ")
    assert "25 of 200 problems: " in done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": "plain"}, "needs two different rows or more"),
        ({"prompt": ["plain", "plain"]}, "needs two different rows or more"),
        ({"baseline": "nobody"}, "unknown baseline 'nobody'"),
        ({"baseline": "nobody", "stop_when_decided": None}, "unknown baseline 'nobody'"),
        ({"cluster": "document"}, "problem by problem, so it does not go with --cluster document; leave out one"),
        ({"recipes": {"grpo": ["a", "b"]}}, r"finished runs \(recipe grpo\); name models in their place, or"),
        ({"block": 0}, "block: must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_evaluation(tmp_path, asked, more, said):
    with pytest.raises(UserError, match=said):
        mlx_traces.compare(**settings(tmp_path, **more))
    assert asked == []


def test_equal_rows_are_one_and_do_not_keep_it_from_stopping(tmp_path, asked):
    frame = mlx_traces.compare(**settings(tmp_path, prompt=["plain", "boxed", "boxed"]))
    assert list(frame["prompt"]) == ["plain", "boxed"] and frame["total_questions"][0] < 100


def test_rows_that_differ_in_the_extractor_alone_are_two(tmp_path, asked):
    shared = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "prompt": "boxed", "limit": 8}
    evals = [EvalConfig(**shared, extractor=extractor) for extractor in ("tolerant", "exact")]
    frame = compare.compared(CompareConfig(evals=evals, runs_dir=str(tmp_path / "runs"))).frame
    assert list(frame["extractor"]) == ["tolerant", "exact"] and len(asked) == 8


def test_rows_on_different_problems_cannot_stop_together(tmp_path, asked):
    shared = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "model": "nano"}
    evals = [EvalConfig(**shared, prompt="plain", seed=seed) for seed in (0, 1)]  # another order
    config = CompareConfig(evals=evals, stop_when_decided=True, runs_dir=str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"evals.1: its 200 problems of qa are not the 200 of evals.0"):
        compare.compared(config)
    mlx_traces.compare(**settings(tmp_path, stop_when_decided=None, limit=5))
    runs = [str(path) for path in (tmp_path / "runs").iterdir()]
    with pytest.raises(UserError, match=r"cannot continue finished runs \(.*\); name models in their place"):
        mlx_traces.compare(*runs, stop_when_decided=True)


def test_a_growing_run_takes_a_larger_limit_and_no_smaller_one(tmp_path, asked):
    shared = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "prompt": "plain", "growing": True}
    out = tmp_path / "run"
    assert mlx_traces.evaluate(out=out, limit=20, **shared).total_questions == 20
    assert mlx_traces.evaluate(out=out, limit=30, resume=True, **shared).total_questions == 30
    assert len(asked) == len(set(asked)) == 30
    with pytest.raises(UserError, match="has 10 more problems than --limit names; pass a larger --limit"):
        mlx_traces.evaluate(out=out, limit=20, resume=True, **shared)
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "another", "answer": "1"}) + "\n")
    with pytest.raises(UserError, match="was started with other settings"):
        mlx_traces.evaluate(out=out, resume=True, **shared)


def test_a_generated_sequence_grows_too():
    few, many = (evaluator.plan(EvalConfig(growing=True, limit=limit)) for limit in (30, 700))
    ids = [problem.id for problem in many.problems]
    assert len(ids) == 700 and [problem.id for problem in few.problems] == ids[:30]
    assert few.label == many.label != evaluator.plan(EvalConfig(limit=30)).label
    sampled = evaluator.plan(EvalConfig(growing=True, limit=700, seed=1, data_seed=0))  # another seed of sampling alone
    assert sampled.problems == many.problems and sampled.label != many.label


def test_adapters_of_a_recipe_are_one_row_and_a_column_of_the_data_clusters(tmp_path, asked, monkeypatch):
    monkeypatch.setattr("mlx_traces.models.names.check", lambda *_: None)
    for name in ("s0", "s1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapters.safetensors").write_text(name)
    adapters = [str(tmp_path / name) for name in ("s0", "s1")]
    models = [StudyModel(model="nano"), StudyModel(model="nano", adapters=adapters, label="grpo")]
    task = StudyTask(task="qa", data=str(tmp_path / "qa.jsonl"), limit=40, prompts=["plain"])
    config = CompareConfig(tasks=[task], models=models, runs_dir=str(tmp_path / "runs"), cluster="document")
    frame = compare.compared(config)[0]
    assert list(frame["trainings"]) == [1, 2] and list(frame["total_questions"]) == [40, 80]
    assert frame["label"][1] == "grpo_plain" and frame["test"][1] == "trainings"
    with pytest.raises(UserError, match=r"models.0: adapters are trainings of one recipe; give them a label"):
        compare.collect(CompareConfig(tasks=[task], models=[StudyModel(model="nano", adapters=adapters)]))
    several = r"does not go with several trainings of a recipe \(models.1.adapters\); leave out one of them"
    with pytest.raises(UserError, match=several):
        compare.compared(config.model_copy(update={"cluster": None, "stop_when_decided": True}))
    runs = ",".join(str(path) for path in (tmp_path / "runs").iterdir())
    shown = CliRunner().invoke(main, ["compare", "--recipe", f"all={runs}", "--format", "csv"])
    assert shown.exit_code == 0 and shown.stdout.splitlines()[1].startswith("all,")
    wrong = CliRunner().invoke(main, ["compare", "--recipe", "all"])
    assert "Error: --recipe all: give NAME=RUN,RUN, as in grpo=runs/grpo-1,runs/grpo-2" in wrong.output
    twice = CliRunner().invoke(main, ["compare", "--recipe", f"all={runs}", "--recipe", f"all={runs}"])
    assert "Error: --recipe all: named twice; name all its runs at once" in twice.output


def test_two_sampling_seeds_on_the_same_problems_are_one_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampled = "eval --model nano --data 3-numbers --prompt direct --temperature 0.7 --limit 20 --max-tokens 32"
    for name, seeds in (("s0", ""), ("s1", "--seed 1 --data-seed 0"), ("other", "--seed 1")):
        done = CliRunner().invoke(main, [*sampled.split(), *seeds.split(), "--out", name])
        assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(main, ["compare", "--recipe", "nano=s0,s1", "--format", "json"])
    (row,) = json.loads(shown.stdout)["rows"]
    runs = [comparison.read_run(name) for name in ("s0", "s1")]
    right = [[sample["correct"] for sample in run.samples] for run in runs]
    assert right[0] != right[1] and row["correct_count"] == sum(map(sum, right)) and row["total_questions"] == 40
    assert (row["trainings"], row["ci_low"] < row["accuracy"] < row["ci_high"]) == (2, True)
    assert row["spread"] == pytest.approx(abs(sum(right[0]) - sum(right[1])) / 20 / 2**0.5)
    refused = CliRunner().invoke(main, ["compare", "--recipe", "nano=s0,other"])
    assert "are over different problems: 20 only in s0" in refused.output
    assert "--limit and --seed, or --data-seed where the seeds differ" in " ".join(refused.output.split())
    lines = (tmp_path / "s1" / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "s1" / "samples.jsonl").write_text("".join(lines[1:]))
    assert [line for line in verify.verify(tmp_path / "s1")[1] if "problem" in line] == [
        f"{runs[0].samples[0]['id']}: no sample of this problem"
    ]


def test_the_columns_of_a_run_with_another_data_seed_are_read(tmp_path, asked):
    shared = {"task": "qa", "data": str(tmp_path / "qa.jsonl"), "limit": 40, "data_seed": 5, "runs_dir": tmp_path}
    frame = mlx_traces.compare(model="nano", prompt=["plain", "boxed"], cluster="document", **shared)
    assert list(frame["test"])[1:] == ["clusters"]


def test_a_data_seed_that_is_the_seed_is_the_same_run():
    plain, given, other = (
        evaluator.plan(EvalConfig(limit=10, seed=2, data_seed=data_seed)) for data_seed in (None, 2, 3)
    )
    assert plain.label == given.label != other.label and plain.identity() == given.identity()
    assert other.problems == evaluator.plan(EvalConfig(limit=10, seed=3)).problems != plain.problems
    grown = [evaluator.plan(EvalConfig(limit=10, growing=True, **seeds)) for seeds in ({"seed": 3}, {"data_seed": 3})]
    assert grown[0].problems == grown[1].problems and grown[0].label != grown[1].label
