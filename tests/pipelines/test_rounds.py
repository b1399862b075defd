"""The rounds as a whole on the embedded model: what is there is not made again, what changes is made anew."""

import json
import re
from contextlib import nullcontext
from itertools import product

import pytest
import yaml
from click.testing import CliRunner

from mlx_traces.cli import main
from mlx_traces.config import EvalConfig, RoundsConfig, build, find_config, read_config
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.comparison import Run
from mlx_traces.models import loading
from mlx_traces.pipelines import compare, estimate, rounds
from mlx_traces.report import page
from mlx_traces.rl import trainer
from mlx_traces.traces.files import manifest_path, read_traces

TINY = {
    "name": "try",
    "raw": {"count": 24},  # 22 traces: two searches are too long
    "epoch1": {"rank": 4, "learning_rate": 1e-3, "batch_size": 8, "valid_share": 0},
    "generate": {"limit": 8, "samples": 4, "max_tokens": 80, "rows": 32},
    "filter": {"per_problem": 2, "eval_task": "countdown", "eval_limit": 8},
    "epoch2": {"learning_rate": 1e-4, "valid_share": 0},
    "compare": {"limit": 4, "max_tokens": 64, "rows": 4},
}
STEPS = {"num_steps": 2, "prompts_per_step": 2, "max_tokens": 48, "rows": 8, "micro_tokens": 512, "save_every": 1}
GRPO = {"grpo": {**STEPS, "group_size": 4, "advantage": "none", "rewards": {"length": 1}}}
PPO = {"ppo": {**STEPS, "group_size": 2, "epochs": 1, "minibatches": 1, "rewards": {"length": 1}}}
NAMES = ["raw", "epoch1", "generated", "scored", "filtered", "epoch2"]


def quiet(name):
    return nullcontext(lambda row, total: None)


def config_in(folder, **changes):
    folders = {"data_dir": str(folder / "data"), "runs_dir": str(folder / "runs")}
    return build(RoundsConfig, {**TINY, **folders, **changes})


def stations(config, say=lambda line: None):
    """Make the stations as `rounds.run` does, interrupted when they are to be compared."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compare, "compared", interrupted)
        rounds.run(config, say, quiet)


@pytest.fixture
def unwritten(monkeypatch):
    """Leave out the page of the comparison."""
    monkeypatch.setattr(page, "write", lambda *_, **__: [])


def made(said):
    return [line.partition(":")[0] for line in said if ": making " in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("rounds"), []
    done = rounds.run(config_in(folder), said.append, quiet)
    assert done.page == folder / "runs" / "try-comparison" / "report.html" and "epoch2" in done.page.read_text()
    return folder, said, done.frame, done.runs


@pytest.fixture(scope="module")
def third(finished):
    """The same rounds with a third one by GRPO on top."""
    folder, said = finished[0], []
    return said, rounds.run(config_in(folder, round3=GRPO), said.append, quiet)


def test_all_stations_are_made_in_order_and_compared_on_the_same_problems(finished):
    folder, said, frame, runs = finished
    assert made(said) == NAMES
    assert [run.about["identity"]["adapter"] is None for run in runs] == [True, False, False]
    assert [run.result["model"] for run in runs] == ["nano", "epoch1", "epoch2"]  # rows by their stages
    assert all(f"-epoch{i}-" in runs[i].about["identity"]["adapter"] for i in (1, 2))
    assert len({tuple(row["id"] for row in run.samples) for run in runs}) == 1 and len(frame) == 3
    plan = {stage.name: stage for stage in rounds.stages(config_in(folder), quiet)}
    about = json.loads((plan["epoch2"].out / "run.json").read_text())
    assert about["steps"] == json.loads((plan["epoch2"].out / "result.json").read_text())["steps"]
    settings = about["identity"]
    assert plan["epoch2"].recipe.data == str(plan["filtered"].out)
    assert settings["adapter"] == str(plan["epoch1"].out / "adapter")  # the second epoch goes on from the first
    assert json.loads(manifest_path(plan["filtered"].out).read_text())["source"] == str(plan["scored"].out)
    told = json.loads((folder / "runs" / "try-comparison" / "rounds.json").read_text())
    assert told["config"] == config_in(folder).model_dump(mode="json") and told["versions"]["mlx"]
    assert {stage["name"]: stage["out"] for stage in told["stations"]} == {n: str(s.out) for n, s in plan.items()}
    assert told["stations"][-1]["config"]["adapter"] == settings["adapter"]
    assert told["gains"] == rounds.gains(runs, [(1, 0), (2, 1)]) and "after Holm over 2 pairs" in told["gains"][0]


def test_nothing_is_made_twice_and_a_change_remakes_what_follows(finished, unwritten):
    folder = finished[0]
    said = []
    rounds.run(config_in(folder), said.append, quiet)
    assert made(said) == [] and len(said) == len(NAMES)

    def left(**changes):
        return [stage.name for stage in rounds.stages(config_in(folder, **changes), quiet) if not stage.finished]

    assert left(compare={"limit": 9}) == []
    assert left(epoch2={"learning_rate": 2e-4, "valid_share": 0}) == ["epoch2"]
    assert left(filter={"per_problem": 1}) == ["filtered", "epoch2"]
    assert left(raw={"count": 25}) == NAMES
    assert left(prompt="direct") == NAMES
    assert left(epoch1=None) == NAMES[2:]
    assert left(generate={**TINY["generate"], "rows": 7}) == []  # does not decide what is sampled


def test_the_third_round_goes_on_from_the_second_and_is_not_made_twice(finished, third):
    folder, (said, outcome) = finished[0], third
    config, again = config_in(folder, round3=GRPO), []
    assert made(said) == ["round3"]  # the others keep their names, and their results
    stage = rounds.stages(config, quiet)[-1]
    settings = json.loads((stage.out / "run.json").read_text())["identity"]
    before = next(s for s in rounds.stages(config, quiet) if s.name == "epoch2")
    assert settings["adapter"] == str(before.out / "adapter") and settings["prompt"]["name"] == "thinking"
    weights = [(s.out / "adapter" / "adapters.safetensors").read_bytes() for s in (before, stage)]
    assert weights[0] != weights[1]
    assert [run.about["identity"]["adapter"] for run in outcome.runs][2:] == [
        str(s.out / "adapter") for s in (before, stage)
    ]
    assert len({tuple(row["id"] for row in run.samples) for run in outcome.runs}) == 1 and len(outcome.frame) == 4
    assert len(rounds.gains(outcome.runs, outcome.pairs)) == 3 and outcome.pairs == [(1, 0), (2, 1), (3, 2)]
    page = outcome.page.read_text()
    assert all(name in page for name in ("epoch1", "epoch2", "round3", "reinforcement learning"))
    stations(config, again.append)
    assert made(again) == []
    longer = {"grpo": {**GRPO["grpo"], "num_steps": 3}}
    left = [s.name for s in rounds.stages(config_in(folder, round3=longer), quiet) if not s.finished]
    assert left == ["round3"]


def test_the_quality_of_answers_is_compared_between_the_rounds(third):
    outcome = third[1]
    found = outcome.quality[outcome.quality["answers"] == "all"]
    names = list(outcome.frame["label"])
    assert list(found["label"].unique()) == names
    assert list(found.drop_duplicates("label")["against"].fillna("")) == ["", *names[:-1]]  # each with the one before
    tokens = found[found["measure"] == "tokens"].set_index("label")["mean"]
    assert list(tokens[names]) == pytest.approx(list(outcome.frame["tokens_per_answer"]))
    assert "Quality of the answers" in outcome.page.read_text()
    assert (outcome.page.parent / "quality.csv").exists()
    assert "| faithfulness |" in (outcome.page.parent / "table.md").read_text()


def test_two_arms_of_the_third_round_start_alike_and_are_compared_with_each_other(finished):
    plan = rounds.stages(config_in(finished[0], round3={**GRPO, **PPO}), quiet)
    arms, (second,) = plan[-2:], [stage for stage in plan if stage.name == "epoch2"]
    assert [stage.name for stage in arms] == ["round3-grpo", "round3-ppo"]
    assert {stage.recipe.adapter for stage in arms} == {str(second.out / "adapter")} and second.finished
    assert rounds.pairs_of(plan) == [(1, 0), (2, 1), (3, 2), (4, 2), (4, 3)]
    slower = {**GRPO, "ppo": {**PPO["ppo"], "learning_rate": 1e-6}}
    changed = rounds.stages(config_in(finished[0], round3=slower), quiet)[-2:]
    assert changed[0].out == arms[0].out and changed[1].out != arms[1].out  # an arm's name is its own
    longer = {"grpo": {**GRPO["grpo"], "num_steps": 3}, **PPO}
    changed = rounds.stages(config_in(finished[0], round3=longer), quiet)[-2:]
    assert changed[0].out != arms[0].out and changed[1].out == arms[1].out


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_the_shipped_rounds_with_scores_after_sky_t1(model, tmp_path, tiny_folder, request):
    """Both arms run on tiny budgets, with every reward and one start; one of the two has a page."""
    if model == "tiny":
        request.getfixturevalue("unwritten")
    file = {"nano": "rounds_countdown_nano_sky", "tiny": "rounds_gsm8k_qwen_sky"}[model]
    shipped = read_config(RoundsConfig, find_config(file), {}).model_dump(exclude_unset=True)
    arms = shipped["round3"]
    assert (
        arms["ppo"]["rewards"]
        == arms["grpo"]["rewards"]
        == {"gated": 1, "faithfulness": 0.3, "flash": 0.1, "correct": 0}
    )
    sizes = [arm["num_steps"] * arm["prompts_per_step"] * arm["group_size"] for arm in arms.values()]
    assert sizes[0] == sizes[1]  # as many rollouts
    for arm in arms.values():
        arm |= {"num_steps": 1, "prompts_per_step": 2, "group_size": 2, "max_tokens": 24, "rows": 4, "limit": 4}
        arm |= {"evaluate": {**arm["evaluate"], "limit": 2, "max_tokens": 8}}
    shipped |= {"data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs"), "epoch2": None}
    shipped["compare"] |= {"limit": 2, "max_tokens": 24}
    if model == "nano":
        shipped["raw"]["count"] = 24
    else:
        rows = [
            json.dumps({"question": f"{i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}) for i in range(30)
        ]
        (tmp_path / "q.jsonl").write_text("\n".join(rows))
        data = {"data": str(tmp_path / "q.jsonl")}
        shipped |= {"model": str(tiny_folder), "epoch1": None}
        for part, split in ((shipped["compare"], "test[20:]"), *((arm, "train[:10]") for arm in arms.values())):
            part |= {**data, "split": split}
        for arm in arms.values():
            arm["evaluate"] |= {**data, "split": "train[10:20]"}
    config = build(RoundsConfig, shipped)
    assert sum("round3-" in line for line in estimate.lines(config)) == 4
    outcome = rounds.run(config, lambda line: None, quiet)
    assert len(outcome.runs) == 3 + (model == "nano") and outcome.pairs[-1] == (
        len(outcome.runs) - 1,
        len(outcome.runs) - 2,
    )
    last = rounds.gains(outcome.runs, outcome.pairs)[-1]
    assert last.startswith("round3-ppo_thinking against round3-grpo_thinking: ")
    metrics = [json.loads(line) for line in next((tmp_path / "runs").glob("*-ppo-*/metrics.jsonl")).open()]
    assert any("reward/gated" in row for row in metrics)


def test_a_third_round_that_was_cut_off_is_continued(finished, third, monkeypatch):
    """Killed in its second step, then run again: the adapter is that of the uninterrupted one."""
    from mlx_traces.rl import grpo

    settings = {"grpo": {**GRPO["grpo"], "rewards": {"length": 1.0, "format": 0}}}  # another name, the same rewards
    config, real, steps, said = config_in(finished[0], round3=settings), grpo.learn, [], []

    def dying(*arguments):
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError
        return real(*arguments)

    monkeypatch.setattr(grpo, "learn", dying)
    with pytest.raises(RuntimeError):
        rounds.run(config, said.append, quiet)
    monkeypatch.setattr(grpo, "learn", real)
    stations(config, said.append)
    assert made(said) == ["round3", "round3"] and len(steps) == 2
    files = [
        rounds.stages(c, quiet)[-1].out / "adapter" / "adapters.safetensors"
        for c in (config, config_in(finished[0], round3=GRPO))
    ]
    assert files[0] != files[1] and files[0].read_bytes() == files[1].read_bytes()


def test_a_round_of_ppo_alone_starts_from_the_model_itself(tmp_path, unwritten):
    config, said = config_in(tmp_path, epoch1=None, epoch2=None, round3=PPO), []
    outcome = rounds.run(config, said.append, quiet)
    assert made(said) == ["round3"] and [run.about["identity"]["adapter"] is None for run in outcome.runs] == [
        True,
        False,
    ]
    (stage,) = rounds.stages(config, quiet)
    settings = json.loads((stage.out / "run.json").read_text())["identity"]
    assert settings["adapter"] is None and settings["gae_lambda"] == 0.95


def test_the_reference_is_what_the_third_round_starts_from_unless_it_is_named(finished):
    def third_of(**changes):
        settings = {"grpo": {**GRPO["grpo"], **changes}}
        return rounds.stages(config_in(finished[0], round3=settings), quiet)[-1].recipe

    def reference_of(**changes):
        return trainer.with_reference(third_of(**changes), {}).reference

    assert reference_of(kl_coef=0.1) == third_of().adapter and "epoch2" in third_of().adapter
    assert reference_of() is None and reference_of(kl_coef=0.1, reference="base") == "base"


def test_a_reward_counts_by_the_content_of_its_file(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"grpo": {**GRPO["grpo"], "rewards": {"own_reward:short": 1}}}

    def names():
        return [s.out.name for s in rounds.stages(config_in(finished[0], round3=settings), quiet)]

    before = names()
    (tmp_path / "own_reward.py").write_text("def short(completions): return [0 for c in completions]\n")
    first = names()
    (tmp_path / "own_reward.py").write_text("def short(completions): return [1 for c in completions]\n")
    assert len({before[-1], first[-1], names()[-1]}) == 3 and before[:-1] == first[:-1] == names()[:-1]


def test_another_content_of_a_file_of_problems_is_another_station(finished, tmp_path):
    file = tmp_path / "problems.jsonl"
    generate = {**TINY["generate"], "data": str(file)}

    def name():
        plan = rounds.stages(config_in(finished[0], generate=generate), quiet)
        return next(stage.out.name for stage in plan if stage.name == "generated")

    file.write_text('{"nums": [1, 2, 3], "target": 6}\n')
    first = name()
    assert name() == first
    file.write_text('{"nums": [1, 2, 4], "target": 7}\n')
    assert name() != first


@pytest.mark.parametrize("setting", ["prompt", "judge_prompt"])
def test_another_content_of_a_prompt_or_rubric_is_another_station(finished, tmp_path, setting):
    file = tmp_path / "own.yaml"
    own = {"prompt": str(file)} if setting == "prompt" else {"score": {"judge_prompt": str(file)}}

    def last():
        return rounds.stages(config_in(finished[0], **own), quiet)[-1].out.name

    file.write_text("user: '{question}'\n")
    first = last()
    assert last() == first
    file.write_text("user: 'Q: {question}'\n")
    assert last() != first


def test_a_station_that_was_cut_off_is_continued(finished, tmp_path, monkeypatch):
    """Killed in the first epoch, then run again: the adapters are those of the uninterrupted rounds."""
    from mlx_traces.train import sft

    config, real, steps = config_in(tmp_path, epoch1={**TINY["epoch1"], "save_every": 1}), sft.step_gradient, []

    def dying(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sft, "step_gradient", dying)
    with pytest.raises(KeyboardInterrupt):
        rounds.run(config, lambda line: None, quiet)
    monkeypatch.setattr(sft, "step_gradient", real)
    stations(config)
    for ours, theirs in zip(rounds.stages(config, quiet), rounds.stages(config_in(finished[0]), quiet), strict=True):
        if ours.name.startswith("epoch"):
            weights = [s.out / "adapter" / "adapters.safetensors" for s in (ours, theirs)]
            assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_station_cut_off_before_its_manifest_is_made_again(finished):
    config, said = config_in(finished[0]), []
    plan = {stage.name: stage.out for stage in rounds.stages(config, quiet)}
    before = {name: plan[name].read_bytes() for name in ("raw", "filtered")}
    for name in before:
        manifest_path(plan[name]).unlink()
    stations(config, said.append)
    assert made(said) == ["raw", "filtered"]
    assert {name: plan[name].read_bytes() for name in before} == before


def test_a_raw_file_counts_by_its_content(finished, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(next((finished[0] / "data" / "raw").glob("*.jsonl")).read_bytes())
    config = config_in(tmp_path, raw={"file": str(file)})
    names = [[stage.out for stage in rounds.stages(config, quiet)] for _ in range(2)]
    assert names[0] == names[1]
    with file.open("a") as lines:
        lines.write("\n")
    assert not set(names[0]) & {stage.out for stage in rounds.stages(config, quiet)}


def test_gains_are_paired():
    def run(name, outcomes):
        result = {"model": name, "adapter": None, "prompt": "thinking"}
        return Run(name, result, [{"id": str(i), "correct": bool(c)} for i, c in enumerate(outcomes)])

    (line,) = rounds.gains([run("one", [1, 0, 0, 0, 0, 0, 0]), run("two", [0, 1, 1, 1, 1, 1, 1])], [(1, 0)])
    assert "two_thinking against one_thinking: +71.4 points, 6 won, 1 lost of 7, exact McNemar p = 0.125" in line
    three = [run("one", [0] * 7), run("two", [0, 1, 1, 1, 1, 1, 1]), run("three", [1] * 7)]
    lines = rounds.gains(three, [(1, 0), (2, 0), (2, 1)])  # p 0.03125, 0.015625 and 1
    assert [line.partition("exact McNemar ")[2] for line in lines] == [
        f"p = {p} after Holm over 3 pairs" for p in ("0.062", "0.047", "1.000")
    ]


def test_gains_count_every_sample_of_a_problem():
    """Three samples a problem; the p-value is that of all 2^4 flips of the signs of 2, 2, 2, -1."""

    def run(name, outcomes):
        rows = [{"id": str(i), "sample": j, "correct": bool(c)} for i, own in enumerate(outcomes) for j, c in own]
        return Run(name, {"model": name, "adapter": None, "prompt": "thinking"}, rows)

    def samples(*counts):
        return [[(j, j < count) for j in range(3)] for count in counts]  # the last one is right only where all are

    changes = (2, 2, 2, -1)
    sums = [
        sum(sign * change for sign, change in zip(signs, changes, strict=True)) for signs in product((1, -1), repeat=4)
    ]
    p = sum(abs(total) >= 5 for total in sums) / 16
    (line,) = rounds.gains([run("one", samples(0, 0, 1, 2)), run("two", samples(2, 2, 3, 1))], [(1, 0)])
    assert f"two_thinking against one_thinking: +41.7 points, 3 won, 1 lost of 4, exact sign-flip p = {p:.3f}" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "qa"}, "unknown task with worked solutions 'qa': choose countdown, gsm8k or math"),
        ({"generate": {"model": "nano"}}, "generate.model: the rounds fill this in"),
        ({"compare": {"adapter": "x"}}, "compare.adapter: the rounds fill this in"),
        ({"raw": {"file": "nowhere.jsonl"}}, "raw.file: nowhere.jsonl does not exist"),
        ({"compare": {"extractor": "best"}}, "unknown extractor of countdown 'best'"),
        ({"prompt": "slow"}, "unknown prompt of countdown 'slow'"),
        ({"round3": {}}, "round3: give grpo, ppo or both"),
        ({"round3": {**GRPO, "ppo": {**STEPS, "rewards": {"corect": 1}}}}, "unknown reward 'corect'"),
        ({"round3": {"grpo": {**STEPS, "rewards": {"corect": 1}}, **PPO}}, "unknown reward 'corect'"),
        ({"round3": {"grpo": {"adapter": "x"}}}, "round3.grpo.adapter: the rounds fill this in"),
        ({"round3": {"ppo": {"prompt": "direct"}}}, "round3.ppo.prompt: the rounds fill this in"),
        ({"round3": {"grpo": {"rewards": {"corect": 1}}}}, "unknown reward 'corect': .*; did you mean 'correct'"),
        ({"round3": {"grpo": {**STEPS, "split": "test"}}}, "round3: . of its 4 problems are the comparison's"),
        ({"epoch1": None, "epoch2": None}, "epoch1, epoch2 and round3 are all null"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        rounds.run(config_in(tmp_path, **changes), lambda line: None, quiet)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch2": {"rank": 8}}, r"epoch2: rank 8 differs from that of epoch1 \(4\)"),
        ({"epoch2": {"kind": "dora"}}, r"epoch2: kind dora differs from that of epoch1 \(lora\)"),
        ({"epoch2": {"layers": 2}}, r"epoch2: layers 2 differs from that of epoch1 \(-1\)"),
        ({"epoch2": {"targets": ["mlp.up_proj"]}}, r"epoch2: targets \['mlp.up_proj'\] differs .* epoch1 \(None\)"),
        ({"round3": {"grpo": {**STEPS, "scale": 4.0}}}, r"round3: scale 4.0 differs from that of epoch1 \(2.0\)"),
        ({"epoch1": None, "epoch2": {"rank": 4}, "round3": {"ppo": {"rank": 8}}}, r"round3: rank 8 .* epoch2 \(4\)"),
        ({"epoch1": {"kind": "full"}, "epoch2": {"kind": "lora"}}, r"epoch2: kind lora differs .* epoch1 \(full\)"),
    ],
)
def test_another_adapter_than_the_one_a_round_goes_on_with_is_refused_at_the_start(tmp_path, changes, message):
    config = config_in(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        rounds.run(config, lambda line: None, quiet)
    assert "the rounds would end with: " in estimate.lines(config)[-1] and not list(tmp_path.iterdir())


def test_a_first_round_is_held_against_the_adapter_that_the_model_comes_with(finished, tmp_path):
    folder = next(s for s in rounds.stages(config_in(finished[0]), quiet) if s.name == "epoch1").out / "adapter"

    def check(**changes):
        config = config_in(tmp_path, model=f"nano+{folder}", **changes)
        plan = rounds.stages(config, quiet)
        rounds.check(plan, rounds.comparison_of(config, plan))

    check()
    check(epoch2={"rank": 4, "scale": 2.0, "kind": "lora", "layers": -1, "dropout": 0.0})
    with pytest.raises(UserError, match=r"epoch1: rank 8 differs from that of .*adapter \(4\)"):
        check(epoch1={"rank": 8})


def test_a_dry_run_tells_completions_that_pass_the_context(tmp_path):
    room = loading.load("nano").context
    config = config_in(tmp_path, epoch1=None, epoch2=None, round3={"grpo": {**STEPS, "max_tokens": room}})
    said = estimate.lines(config)[-1]
    assert "the rounds would end with: round3: problem " in said and f"context of {room}" in said


def test_a_filter_that_takes_everything_names_its_rule(finished):
    with pytest.raises(UserError, match=r"min score|min_score|score"):
        rounds.run(config_in(finished[0], filter={"min_score": 1.0}), lambda line: None, quiet)


def test_a_wrong_field_of_the_third_round_is_named_with_its_place(tmp_path):
    file = tmp_path / "rounds.yaml"
    for settings, message in (
        ({"grpo": {"learning_rte": 1}}, r"unknown field 'round3.grpo.learning_rte'; did you mean 'learning_rate'"),
        ({"dpo": {}}, r"unknown field 'round3.dpo'; did you mean 'ppo'"),
        ({"ppo": {"gamma": 2}}, r"round3.ppo.gamma: must be at most 1, not '2'"),
        ({"ppo": {"clip_eps_high": 0.3}}, r"unknown field 'round3.ppo.clip_eps_high'; did you mean 'clip_eps'"),
    ):
        file.write_text(yaml.safe_dump({"name": "x", "round3": settings}))
        with pytest.raises(UserError, match=message):
            read_config(RoundsConfig, file, {})


# ------------------------------------------------------------------------------------------------ the dry run


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def column(lines, place):
    """Return a column of the table by stage."""
    rows = [line.split("  ") for line in lines[: lines.index("") if "" in lines else None]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[place] for row in rows[1:]}


def test_a_dry_run_names_what_is_there_and_what_is_left_and_writes_nothing(finished, third, tmp_path):
    folder = finished[0]
    longer = {"grpo": {**GRPO["grpo"], "num_steps": 3}}
    file = tmp_path / "rounds.yaml"
    folders = {"data_dir": str(folder / "data"), "runs_dir": str(folder / "runs")}
    file.write_text(yaml.safe_dump({**TINY, **folders, "round3": longer}))
    before = tree(folder)
    result = CliRunner().invoke(main, ["rounds", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert tree(folder) == before and [path.name for path in tmp_path.iterdir()] == ["rounds.yaml"]
    said = result.output.splitlines()
    assert column(said, 1) == {**dict.fromkeys(NAMES, "finished"), "round3": "to make", "comparison": "to make"}
    assert column(said, 3)["round3"].endswith(" GB") and column(said, 3)["epoch1"] == "–"
    assert column(said, 2)["round3"] == f"{3 * 2 * 4 * 48:,}" and column(said, 2)["comparison"] == f"{4 * 64}"
    assert "round3: 3 steps of 2 problems x 4, at most 48 tokens each" in said
    assert "comparison: 1 of 4 evaluations, each of 4 problems, at most 64 tokens each" in said
    assert (
        re.search(r"in all [\d.]+ GB at most; ", result.output) and "about" not in result.output
    )  # no time is guessed


def test_a_dry_run_of_what_is_there_measures_nothing(finished, monkeypatch):
    monkeypatch.setattr(loading, "load", None)
    said = estimate.lines(config_in(finished[0]))
    assert set(column(said, 1).values()) == {"finished"} and "" not in said


def test_a_dry_run_of_a_model_that_is_not_here_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", None)
    said = estimate.lines(config_in(tmp_path, model="someone/some-model-4bit", round3=PPO))
    assert set(column(said, 1).values()) == {"to make"} and not list(tmp_path.iterdir())
    assert said[-1].startswith("no estimates: someone/some-model-4bit is not on this machine yet")


def test_a_dry_run_says_what_would_stop_the_rounds(tmp_path):
    said = estimate.lines(config_in(tmp_path, round3={"grpo": {**STEPS, "split": "test"}}))
    assert set(column(said, 1).values()) == {"to make"} and "round3" in column(said, 1)
    assert "no estimates, and the rounds would end with: round3: " in said[-1]


def test_tokens_at_most_are_those_of_the_settings(tmp_path):
    held_out = {"task": "countdown", "prompt": "thinking", "limit": 3, "max_tokens": 10}
    grpo = {**STEPS, "group_size": 4, "num_steps": 10, "limit": 2, "pass_rate_low": 0.1, "evaluate": held_out}
    grpo["max_resamples"] = 2
    config = config_in(tmp_path, round3={"grpo": grpo})
    plan = rounds.stages(config, quiet)
    outlook, by_name = estimate.Outlook(config, plan), {stage.name: stage for stage in plan}
    loaded = loading.load("nano")
    planned = evaluator.plan(EvalConfig(prompt="thinking", split="train", limit=8))
    prompt = max(len(loaded.render(planned.prompt, problem).ids) for problem in planned.problems)
    found = {name: outlook.of(by_name[name]) for name in ("generated", "epoch1", "epoch2", "round3")}
    assert found["generated"].tokens == 8 * 4 * 80
    assert found["epoch2"].tokens == 16 * (prompt + 80)  # two of four are kept
    assert found["round3"].tokens == (10 * 2 * 4 * 3 + 2 * 4) * 48 + 2 * 3 * 10  # steps, pass rates, two validations
    assert "22 traces of at most " in found["epoch1"].told and "2 validations of 3 problems" in found["round3"].told
    assert "2 problems x 4, drawn up to 3 times where a group's rewards are equal" in found["round3"].told
    longest = max(len(tokens) for tokens in map(loaded.tokenizer.encode, (t.completion for t in outlook.raw)))
    assert found["epoch1"].tokens % 22 == 0 and found["epoch1"].tokens >= 22 * longest
    assert all(one.memory_gb > 0.001 for one in found.values())
    assert outlook.of(by_name["filtered"]).tokens is None and not list(tmp_path.iterdir())


def test_a_stage_without_a_model_is_forecast_without_one(tmp_path, monkeypatch):
    plan = rounds.stages(config_in(tmp_path), quiet)
    monkeypatch.setattr(loading, "load", None)
    outlook = estimate.Outlook(config_in(tmp_path), plan)
    assert [outlook.of(stage).told for stage in plan if stage.name in ("scored", "filtered")] == ["no model runs"] * 2


@pytest.mark.parametrize("stage", ["raw", "generated", "round3"])
def test_what_is_learned_is_not_what_is_compared(tmp_path, stage):
    """One file has no splits, whatever names are given; the same questions in another file are found too."""
    lines = "".join(f'{{"question": "{i} and one?", "answer": "#### {i}"}}\n' for i in range(9))
    (tmp_path / "q.jsonl").write_text(lines)
    again = "".join(f'{{"question": "{i}  AND one?", "answer": "so #### {i}"}}\n' for i in range(9))
    (tmp_path / "again.jsonl").write_text(again)
    names = {"raw": "raw", "generated": "generate"}

    def refused(file, split):
        learned = {"data": str(tmp_path / file), "split": split}
        apart = {"data": str(tmp_path / "q.jsonl"), "split": "x[6:]"}
        settings = {
            "raw": {"count": None, **apart},
            "generate": {"limit": None, **apart},
            "round3": {"grpo": {**STEPS}},
        }
        settings["round3"]["grpo"] |= {"limit": None, **apart}
        if stage == "round3":
            settings["round3"]["grpo"] |= learned
        else:
            settings[names[stage]] |= learned
        compared = {"data": str(tmp_path / "q.jsonl"), "split": "test[:6]", "limit": None}
        config = config_in(tmp_path, task="gsm8k", prompt="thinking", compare=compared, **settings)
        plan = rounds.stages(config, quiet)
        rounds.check(plan, rounds.comparison_of(config, plan))

    for file in ("q.jsonl", "again.jsonl"):
        with pytest.raises(UserError, match=rf"{stage}: \d of its \d problems are the comparison's") as caught:
            refused(file, "train")
        assert ("q.jsonl has no splits" in str(caught.value)) == (file == "q.jsonl")
        refused(file, "train[6:]")


def test_problems_drawn_by_a_seed_of_their_own_are_looked_at_too(tmp_path):
    drawn = {"data": "3-numbers", "split": "train", "limit": 10}
    config = config_in(tmp_path, generate={**drawn, "data_seed": 7}, compare={**drawn, "seed": 7})
    plan = rounds.stages(config, quiet)
    with pytest.raises(UserError, match="generated: 10 of its 10 problems are the comparison's"):
        rounds.check(plan, rounds.comparison_of(config, plan))


def test_finished_traces_are_not_compared_on_later(finished, tmp_path):
    """The comparison's settings name no stage, so what is there is looked at."""
    folder = finished[0]
    plan = rounds.stages(config_in(folder), quiet)
    raw = next(stage for stage in plan if stage.name == "raw")
    assert raw.finished
    problems = tmp_path / "seen.jsonl"
    problems.write_text("".join(json.dumps(trace.columns) + "\n" for _, trace in read_traces(raw.out)))
    config = config_in(folder, compare={"data": str(problems), "split": "test", "limit": None})
    with pytest.raises(UserError, match="raw: 22 of its 22 problems are the comparison's"):
        rounds.check(plan, rounds.comparison_of(config, plan))
