"""Runs checked against themselves: whole ones pass, a change planted anywhere in one is found."""

import json
import shutil
from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from factories import CHATML, make_tokenizer, wrap

from mlx_traces.cli import main
from mlx_traces.config import EvalConfig, SFTConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.completion import Completion
from mlx_traces.pipelines import verify
from mlx_traces.records import Problem, Rollout, Trace
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.tasks import GRADER, get_task
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.traces import files
from mlx_traces.train import sft

QUESTIONS = [("6 apples and 7?", "13"), ("Capital of France?", "Paris"), ("6 apples and 7?", "13"), ("2 * 21?", "42")]


def run_of(folder, config, answers, prompt_end="\nA:", own_tags=None):
    """Write an evaluation whose completions are given, a problem's one after the other."""
    planned = evaluator.plan(config)
    rows = []
    for place, problem in enumerate(planned.problems):
        text = planned.prompt.messages(problem)[-1]["content"] + prompt_end
        for number in range(config.samples):
            answer = answers[(place * config.samples + number) % len(answers)]
            rollout = Rollout((1,), (2,) * 5, answer, "stop")
            opened = "<think>\n" if prompt_end.endswith("<think>\n") else ""
            completion = Completion.sampled(text, opened, rollout, own_tags)
            row = evaluator.grade_sample(planned, problem, number, completion)
            rows.append(row | {"elapsed": float(place)})
    run = RunFolder(folder)
    run.begin(planned.identity(), {}, grader=GRADER, **({"own_tags": own_tags} if own_tags else {}))
    run.finish(rows, asdict(evaluator.summarize(planned, rows, folder.name, 0.1, [])))
    return folder


@pytest.fixture
def qa(tmp_path):
    """Two samples a problem, a thought opened by the template, a question that is there twice."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    config = EvalConfig(model="nano", task="qa", data=str(file), limit=None, samples=2, temperature=1.0)
    return run_of(tmp_path / "qa", config, ["so 13", "hm</think>It is 13", "</think>Paris"], "\nA:<think>\n")


@pytest.fixture
def countdown(tmp_path):
    config = EvalConfig(model="nano", task="countdown", limit=12)
    return run_of(tmp_path / "countdown", config, ["<answer>1 + 2</answer>", "no", "<answer>x</answer>"])


def change(folder, name, place, edit):
    """Edit one line of a file of JSON lines, or remove it where ``edit`` returns None."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    rows[place : place + 1] = [row for row in [edit(rows[place])] if row is not None]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def change_json(folder, name, **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def call(*folders):
    return CliRunner().invoke(main, ["verify", *map(str, folders)], prog_name="mlx-traces")


def test_whole_evaluations_agree(qa, countdown):
    result = call(qa, countdown)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        f"{qa}: 8 samples, verdicts and figures agree",
        f"{countdown}: 12 samples, verdicts and figures agree",
    ]
    verdicts = [row["verdict"] for row in map(json.loads, (qa / "samples.jsonl").read_text().splitlines())]
    assert {"correct", "wrong_value", "no_answer"} == set(verdicts)  # the thought that never ends has no answer


def test_what_was_opened_is_read_from_the_sample_or_as_before_from_its_prompt(qa):
    whole = (qa / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert {row["opened"] for row in rows} == {"<think>\n"}
    older = [{key: value for key, value in row.items() if key != "opened"} for row in rows]
    for kept in ([row | {"prompt": "another text"} for row in rows], older):
        (qa / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert verify.verify(qa)[1] == []
    change(qa, "samples.jsonl", 0, lambda row: row | {"opened": ""})
    assert "verdict by tolerant is no_answer, found correct" in call(qa).output


@pytest.mark.parametrize("opener", ["", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("prefill", ["", "Let me see.", "<think>\nI"])
@pytest.mark.parametrize("user", ["{question}", "Think in <think> and </think>: {question} \n", "{question} <think>"])
@pytest.mark.parametrize("chat", [True, False])
def test_what_was_opened_is_found_in_the_prompt_as_the_model_found_it(opener, prefill, user, chat):
    template = CHATML.replace("assistant\n{% endif", f"assistant\n{opener}{{% endif") if opener else CHATML
    prompt, problem = Prompt("p", user, prefill=prefill, chat=chat), Problem("x", {"question": "1 + 2?"}, "3")
    rendered = wrap(make_tokenizer(template)).render(prompt, problem)
    assert not chat or not opener or "<think>" in rendered.text.rpartition("assistant")[2]
    assert verify.opened_of(prompt, problem, rendered.text) == rendered.opened


def test_the_models_own_tags_are_stored_with_the_run(tmp_path):
    config = EvalConfig(model="nano", task="countdown", limit=2)
    answers = ["{{3}} <answer>3 + 4</answer> {{/3}}no", "{{3}} so 7"]
    folder = run_of(tmp_path / "own", config, answers, own_tags=("{{3}}", "{{/3}}"))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["no_answer", "no_answer"]
    assert call(folder).exit_code == 0
    change_json(folder, "run.json", own_tags="{{3}}")
    assert "verdict by answer is no_answer" in call(folder).output


def test_a_folder_may_be_moved(countdown, tmp_path):
    assert verify.verify(countdown.rename(tmp_path / "elsewhere"))[1] == []


@pytest.mark.parametrize(
    ("place", "edit", "message"),
    [
        (3, {"verdicts": {"answer": "correct", "tolerant": "correct"}}, "verdict by answer is correct, found wrong_"),
        (4, {"correct": True}, "correct is True, found False"),
        (0, {"verdict": "no_answer"}, "verdict is no_answer, found wrong_"),
        (1, {"completion": "<answer>1 + 2</answer>"}, "verdict by answer is no_answer, found wrong_"),
        (2, {"completion": "<answer>y</answer>"}, "extraction by answer is x, found y"),
        (2, {"gold": "7"}, "gold is 7, found "),
        (5, {"stratum": "9 operands"}, "stratum is 9 operands, found "),
        (5, {"tokens": 7000}, "7000 tokens, and max_tokens is 512"),
        (5, {"tokens": 9}, "mean_tokens is 5, the samples give 5.33333"),
        (5, {"finish_reason": "length"}, "truncated is 0, the samples give 0.0833333"),
        (5, {"elapsed": 99.0}, "wall_seconds is 11, the samples give 99"),
        (5, {"sample": 1}, "sample 0 is missing"),
    ],
)
def test_a_changed_sample_is_found(countdown, place, edit, message):
    rows = change(countdown, "samples.jsonl", place, lambda row: row | edit)
    result = call(countdown)
    assert result.exit_code == 1 and message in result.output, result.output
    assert rows[place]["id"] in result.output or "result.json" in result.output


def test_a_run_of_older_rules_is_told_from_a_changed_one(countdown):
    change_json(countdown, "run.json", grader=GRADER - 1)
    assert call(countdown).exit_code == 0  # the same verdicts
    change(countdown, "samples.jsonl", 0, lambda row: row | {"completion": "no"})
    assert f"graded by version {GRADER - 1} of the graders' rules, found by version {GRADER}" in call(countdown).output


def test_a_missing_a_doubled_and_a_moved_sample_are_found(countdown):
    whole = (countdown / "samples.jsonl").read_text()
    name = json.loads(whole.splitlines()[7])["id"]
    change(countdown, "samples.jsonl", 7, lambda row: None)
    found = call(countdown).output
    assert f"{name}: no sample of this problem" in found and "total_questions is 12, the samples give 11" in found
    (countdown / "samples.jsonl").write_text(whole + whole.splitlines(True)[7])
    assert f"{name}: sample 0 occurs 2 times" in call(countdown).output
    (countdown / "samples.jsonl").write_text("".join(reversed(whole.splitlines(True))))
    assert verify.verify(countdown)[1] == ["the samples are not in the order of the problems"]


def test_problems_that_are_not_at_hand_are_checked_by_their_digest(qa, tmp_path):
    (tmp_path / "questions.jsonl").unlink()
    assert verify.verify(qa)[1] == []
    change(qa, "samples.jsonl", 7, lambda row: None)
    lines = verify.verify(qa)[1]
    assert lines[0].endswith("sample 1 is missing") and "figures were not checked" in lines[1]
    change(qa, "samples.jsonl", 6, lambda row: None)
    assert "the 3 problems are not those of run.json, or not in their order" in verify.verify(qa)[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("accuracy", 0.9), ("correct_count", 5), ("ci_high", 0.1), ("mean_tokens", 6.0), ("verdicts", {"correct": 12})],
)
def test_a_changed_figure_is_found(countdown, name, value):
    change_json(countdown, "result.json", **{name: value})
    lines = verify.verify(countdown)[1]
    assert lines and all(line.startswith(f"result.json: {name}") for line in lines)


def test_no_more_than_ten_lines_are_shown(countdown):
    for place in range(12):
        change(countdown, "samples.jsonl", place, lambda row: row | {"stratum": "z"})
    lines = call(countdown).output.splitlines()
    assert len(lines) == 11 and lines[0].endswith("differences") and lines[-1].strip().startswith("and ")


def test_what_is_no_finished_run_is_refused(countdown, tmp_path):
    samples = (countdown / "samples.jsonl").read_text()
    for edit, message in (
        ({"question": "nums [1, 2, 3], target 6"}, r"has the question of countdown-1-2-3-to-6; the line was changed"),
        ({"question": "what?"}, "'nums' must be a list"),
        ({"verdicts": []}, "'verdicts' must be an object of texts, not list"),
    ):
        change(countdown, "samples.jsonl", 0, lambda row, edit=edit: row | edit)
        with pytest.raises(UserError, match=message):
            verify.verify(countdown)
        (countdown / "samples.jsonl").write_text(samples)
    (countdown / "samples.jsonl").write_text(samples[:-40])
    with pytest.raises(UserError, match=r"samples.jsonl:12: not JSON"):
        verify.verify(countdown)
    for name, message in (("result.json", "no result.json; finish"), ("run.json", "no run.json; name a folder")):
        (countdown / name).unlink()
        with pytest.raises(UserError, match=message):
            verify.verify(countdown)
    with pytest.raises(UserError, match="no such run folder"):
        verify.verify(tmp_path / "none")


def test_every_folder_is_told_and_those_after_one_that_cannot_be_checked_are_checked(countdown, qa, tmp_path):
    model, models, compared = (tmp_path / name for name in ("fused", "models", "compared"))
    for folder in (model, models / "nano-8bit"):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).touch()
    compared.mkdir()
    (compared / "provenance.json").touch()
    passed = call(model, models, compared, qa)
    assert passed.exit_code == 0, passed.output
    assert passed.stdout.splitlines() == [
        f"{model}: a model, not a run: nothing to check",
        f"{models}: a folder of models, not a run: nothing to check",
        f"{compared}: a comparison, not a run: nothing to check",
        f"{qa}: 8 samples, verdicts and figures agree",
    ]
    (countdown / "result.json").unlink()
    change_json(qa, "result.json", accuracy=0.9)
    (models / "empty").mkdir()
    checked = call(countdown, models, qa)
    assert checked.exit_code == 1 and f"{qa}: 1 difference\n" in checked.stdout
    assert checked.stderr.splitlines() == [
        f"{countdown}: not checked: no result.json; finish the run with --resume",
        f"{models}: not checked: no run.json; name a folder that eval, sft, grpo or ppo wrote",
    ]


# ------------------------------------------------------------------------------------------------ trainings


@pytest.fixture(scope="module")
def _trained(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("trained")
    asked = [({"role": "user", "content": f"1+{number}"},) for number in range(8)]
    rows = [Trace(f"t{number}", turns, f"It is {number}").to_row() for number, turns in enumerate(asked)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTConfig(
        model=str(tiny_folder), data=str(folder / "traces.jsonl"), batch_size=2, rank=2, eval_every=1, valid_share=0.3
    )
    sft.train(config, folder / "run")
    return folder / "run"


@pytest.fixture
def trained(_trained, tmp_path):
    return shutil.copytree(_trained, tmp_path / "run")


def test_a_whole_training_agrees(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["best_step"] is not None and result["steps"] > 1
    assert call(trained).output == f"{trained}: {result['steps']} steps, figures and adapter agree\n"


def test_a_changed_training_is_found(trained):
    metrics = (trained / "metrics.jsonl").read_text()
    for edit, message in (
        (lambda row: None, "row 3 is of step 3, expected step 2"),
        (lambda row: row | {"step": 7}, "row 3 is of step 7, expected step 2"),
        (lambda row: row | {"valid/loss": 1e-4}, "best_step is"),
    ):
        change(trained, "metrics.jsonl", 2, edit)
        result = call(trained)
        assert result.exit_code == 1 and message in result.output, result.output
        (trained / "metrics.jsonl").write_text(metrics)
    (trained / "metrics.jsonl").write_text("".join(metrics.splitlines(True)[:-1]))
    lines = verify.verify(trained)[1]
    assert any("is missing" in line for line in lines) and any("were planned" in line for line in lines)
    (trained / "metrics.jsonl").write_text(metrics)
    change_json(trained, "result.json", valid_loss=0.5)
    assert verify.verify(trained)[1][0].startswith("result.json: valid_loss is 0.5, metrics.jsonl gives ")


def test_a_damaged_adapter_is_found(trained):
    file = trained / "adapter" / "adapters.safetensors"
    whole = file.read_bytes()
    arrays = dict(mx.load(str(file)).items())
    mx.eval(arrays)
    name = sorted(arrays)[0]
    file.write_bytes(whole[:-10])
    assert "damaged" in verify.verify(trained)[1][0]
    mx.save_safetensors(str(file), {key: value for key, value in arrays.items() if key != name})
    assert "1 tensors missing from the file" in verify.verify(trained)[1][0]
    mx.save_safetensors(str(file), arrays | {name: arrays[name] * float("nan")})
    assert f"{name} has numbers that are not finite" in verify.verify(trained)[1][0]
    file.unlink()
    assert "adapters.safetensors is missing" in verify.verify(trained)[1][0]


def test_a_file_of_traces(tmp_path):
    task, made = get_task("countdown"), []
    for problem in task.load("train", None, 4, 0):
        answer = task.grade(problem, "<answer>1 + 1</answer>")["answer"].verdict
        made.append(Trace(problem.id, (), "<answer>1 + 1</answer>", task="countdown", columns=problem.columns))
        made[-1] = replace(made[-1], verdict=answer, finish_reason="length" if len(made) == 1 else "stop")
    told = {"source": "nano", "config": {"extractor": "answer"}, "seed": 0}

    def checked(name, rows, **counts):
        files.write_traces(tmp_path / name, rows, {**told, "counts": counts})
        return verify.verify(tmp_path / name)

    agrees, lines = checked("own.jsonl", made, **{"correct": 0, "cut off": 1})
    assert agrees == "4 traces, 4 verdicts and the manifest agree" and not lines
    turned = [replace(made[0], verdict="correct"), *made[1:]]
    lines = checked("turned.jsonl", turned, **{"correct": 1, "cut off": 1})[1]
    assert f"{made[0].id} sample 0: verdict is correct, found {made[0].verdict}" in lines
    assert "manifest: correct is 1, the traces give 0" in lines and len(lines) == 2
    with (tmp_path / "own.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="is not the file that its manifest describes"):
        verify.verify(tmp_path / "own.jsonl")
