"""The rounds as a whole on the embedded model: what is there is not made again, what changes is made anew."""

import json
from contextlib import nullcontext

import pytest

from mlx_traces import rounds
from mlx_traces.config import RoundsConfig, build
from mlx_traces.errors import UserError
from mlx_traces.tables import Run
from mlx_traces.traces import manifest_path

TINY = {
    "name": "try",
    "raw": {"count": 24},
    "epoch1": {"rank": 4, "learning_rate": 1e-3, "batch_size": 8, "valid_share": 0},
    "generate": {"limit": 16, "samples": 4, "max_tokens": 96, "rows": 32},
    "filter": {"per_problem": 2, "eval_task": "countdown", "eval_limit": 8},
    "epoch2": {"learning_rate": 1e-4, "valid_share": 0},
    "compare": {"limit": 8, "max_tokens": 96, "rows": 8},
}
NAMES = ["raw", "epoch1", "generated", "scored", "filtered", "epoch2"]


def quiet(name):
    return nullcontext(lambda row, total: None)


def config_in(folder, **changes):
    folders = {"data_dir": str(folder / "data"), "runs_dir": str(folder / "runs")}
    return build(RoundsConfig, {**TINY, **folders, **changes})


def made(said):
    return [line.partition(":")[0] for line in said if ": making " in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("rounds"), []
    frame, runs = rounds.run(config_in(folder), said.append, quiet)
    return folder, said, frame, runs


def test_all_stations_are_made_in_order_and_compared_on_the_same_problems(finished):
    folder, said, frame, runs = finished
    assert made(said) == NAMES
    assert [run.result["adapter"] is None for run in runs] == [True, False, False]
    assert "epoch1" in runs[1].result["adapter"] and "epoch2" in runs[2].result["adapter"]
    assert len({tuple(row["id"] for row in run.samples) for run in runs}) == 1 and len(frame) == 3
    plan = {station.name: station for station in rounds.stations(config_in(folder), quiet)}
    settings = json.loads((plan["epoch2"].out / "run.json").read_text())["identity"]
    assert settings["adapter"] == str(plan["epoch1"].out / "adapter")  # the second epoch goes on from the first
    assert json.loads(manifest_path(plan["filtered"].out).read_text())["source"] == str(plan["scored"].out)


def test_nothing_is_made_twice_and_a_change_remakes_what_follows(finished):
    folder = finished[0]
    said = []
    rounds.run(config_in(folder), said.append, quiet)
    assert made(said) == [] and len(said) == len(NAMES)

    def left(**changes):
        return [
            station.name for station in rounds.stations(config_in(folder, **changes), quiet) if not station.finished
        ]

    assert left(compare={"limit": 9}) == []
    assert left(epoch2={"learning_rate": 2e-4, "valid_share": 0}) == ["epoch2"]
    assert left(filter={"per_problem": 1}) == ["filtered", "epoch2"]
    assert left(raw={"count": 25}) == NAMES
    assert left(prompt="direct") == NAMES
    assert left(epoch1=None) == NAMES[2:]
    assert left(generate={**TINY["generate"], "rows": 7}) == []  # does not decide what is sampled


def test_another_content_of_a_file_of_problems_is_another_station(finished, tmp_path):
    file = tmp_path / "problems.jsonl"
    generate = {**TINY["generate"], "data": str(file)}

    def name():
        plan = rounds.stations(config_in(finished[0], generate=generate), quiet)
        return next(station.out.name for station in plan if station.name == "generated")

    file.write_text('{"nums": [1, 2, 3], "target": 6}\n')
    first = name()
    assert name() == first
    file.write_text('{"nums": [1, 2, 4], "target": 7}\n')
    assert name() != first


def test_a_station_that_was_cut_off_is_continued(finished, tmp_path, monkeypatch):
    """Killed in the first epoch, then run again: the adapters are those of the uninterrupted rounds."""
    from mlx_traces import sft

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
    rounds.run(config, lambda line: None, quiet)
    for ours, theirs in zip(
        rounds.stations(config, quiet), rounds.stations(config_in(finished[0]), quiet), strict=True
    ):
        if ours.name.startswith("epoch"):
            weights = [s.out / "adapter" / "adapters.safetensors" for s in (ours, theirs)]
            assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_station_cut_off_before_its_manifest_is_made_again(finished):
    config, said = config_in(finished[0]), []
    plan = {station.name: station.out for station in rounds.stations(config, quiet)}
    before = {name: plan[name].read_bytes() for name in ("raw", "filtered")}
    for name in before:
        manifest_path(plan[name]).unlink()
    rounds.run(config, said.append, quiet)
    assert made(said) == ["raw", "filtered"]
    assert {name: plan[name].read_bytes() for name in before} == before


def test_a_raw_file_counts_by_its_content(finished, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(next((finished[0] / "data" / "raw").glob("*.jsonl")).read_bytes())
    config = config_in(tmp_path, raw={"file": str(file)})
    names = [[station.out for station in rounds.stations(config, quiet)] for _ in range(2)]
    assert names[0] == names[1]
    with file.open("a") as lines:
        lines.write("\n")
    assert not set(names[0]) & {station.out for station in rounds.stations(config, quiet)}


def test_gains_are_paired():
    def run(name, outcomes):
        result = {"model": name, "adapter": None, "prompt": "thinking"}
        return Run(name, result, [{"id": str(i), "correct": bool(c)} for i, c in enumerate(outcomes)])

    (line,) = rounds.gains([run("one", [1, 0, 0, 0, 0, 0, 0]), run("two", [0, 1, 1, 1, 1, 1, 1])])
    assert "two_thinking against one_thinking: +71.4 points, 6 won, 1 lost of 7, exact McNemar 0.125" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "qa"}, "unknown task with worked solutions 'qa': choose countdown or gsm8k"),
        ({"generate": {"model": "nano"}}, "generate.model: the rounds fill this in"),
        ({"compare": {"adapter": "x"}}, "compare.adapter: the rounds fill this in"),
        ({"raw": {"file": "nowhere.jsonl"}}, "raw.file: nowhere.jsonl does not exist"),
        ({"compare": {"extractor": "best"}}, "unknown extractor of countdown 'best'"),
        ({"prompt": "slow"}, "unknown prompt of countdown 'slow'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        rounds.run(config_in(tmp_path, **changes), lambda line: None, quiet)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_filter_that_takes_everything_names_its_rule(finished):
    with pytest.raises(UserError, match=r"min score|min_score|score"):
        rounds.run(config_in(finished[0], filter={"min_score": 1.0}), lambda line: None, quiet)
