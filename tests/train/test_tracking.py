"""What a tracking client gets: every row once, under its step; a resumed run; a client that fails or is not there."""

import json
import sys

import pytest

from mlx_traces.config import GRPOConfig, RoundsConfig, SFTConfig, build
from mlx_traces.errors import UserError
from mlx_traces.pipelines import rounds
from mlx_traces.rl import grpo
from mlx_traces.runtime import distributed
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.train import sft, tracking

FAKE = """
calls, fails = [], set()

class Run:
    def log(self, row, step=None):
        print("the client speaks")
        if step in fails:
            raise RuntimeError("the server is\\nall gone")
        calls.append(("log", step, row))

def finish(exit_code=None):
    calls.append(("finish", exit_code))

def init(**given):
    calls.append(("init", given))
    return Run()
"""


@pytest.fixture(params=["trackio", "wandb"])
def client(request, tmp_path, monkeypatch):
    """Put a client on the path that writes down what it is asked; return its name and the module's getter."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{request.param}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


@pytest.fixture
def settings(model_folder, tmp_path):
    """Settings of 4 steps of SFT, with a checkpoint every 2."""
    file = tmp_path / "traces.jsonl"
    asked = [[{"role": "user", "content": f"{i}+1"}] for i in range(8)]
    rows = [{"id": f"t{i}", "messages": asked[i], "completion": f"{i + 1}"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = {"valid_share": 0, "rank": 2, "batch_size": 2, "save_every": 2, "device": "cpu"}
    return {"model": str(model_folder), "data": str(file), **size}


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def told(name, what):
    return [call for call in sys.modules[name].calls if call[0] == what]


def logged(name):
    return [{"step": step, **row} for _, step, row in told(name, "log")]


def test_nothing_is_imported_without_the_setting(client, settings, tmp_path):
    sft.train(SFTConfig(**settings), tmp_path / "run")
    assert client not in sys.modules and not (tmp_path / "run" / "tracked.json").exists()


def test_every_row_arrives_once_with_its_step_and_the_settings(client, settings, tmp_path, capsys):
    out, shown = tmp_path / "run", []
    sft.train(SFTConfig(**settings, report_to=client), out, show=lambda row, steps: shown.append(row))
    assert logged(client) == metrics_of(out) == shown and [row["step"] for row in shown] == [1, 2, 3, 4]
    ((_, given),) = told(client, "init")
    identity = tracking.run_id(out)
    assert given["id" if client == "wandb" else "name"].endswith(identity) and given["resume"] == "allow"
    assert given["project"] == "mlx-traces" and given["config"]["batch_size"] == 2
    assert given["config"]["learning_rate"] == 1e-4 and given["config"]["versions"]["mlx"]  # defaults are filled in
    assert told(client, "finish") == [("finish", 0 if client == "wandb" else None)]
    heard = capsys.readouterr()
    assert "the client speaks" in heard.err and not heard.out
    stored = json.loads((out / "run.json").read_text())["identity"]
    assert "report_to" not in stored and "report_to" not in (out / "adapter" / "adapter_config.json").read_text()


def stopping_at(step):
    """Return a ``show`` that ends the training like a crash when a step's line is there."""

    def show(row, steps):
        if row["step"] == step:
            raise RuntimeError("crash")

    return show


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_resumed_run_goes_on_in_the_same_tracked_run(client, settings, tmp_path, from_the_start):
    """The crash comes after step 3, the checkpoint is of step 2: step 3 is made again, and not sent again."""
    out = tmp_path / "run"
    first = SFTConfig(**settings, report_to=client if from_the_start else None)
    with pytest.raises(RuntimeError, match="crash"):
        sft.train(first, out, show=stopping_at(3))
    if from_the_start:
        assert told(client, "finish") == [("finish", 1 if client == "wandb" else None)]
    sft.train(SFTConfig(**settings, report_to=client), out, resume=True)
    assert [row["step"] for row in logged(client)] == [1, 2, 3, 4]
    names = [given.get("id") or given["name"] for _, given in told(client, "init")]
    assert len(names) == 1 + from_the_start and len(set(names)) == 1


def test_a_client_that_fails_is_left_alone_and_the_training_ends_as_without_it(client, settings, tmp_path, capsys):
    __import__(client).fails.add(3)
    sft.train(SFTConfig(**settings, report_to=client), tmp_path / "run")
    assert [row["step"] for row in logged(client)] == [1, 2] and len(metrics_of(tmp_path / "run")) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line == f"warning: {client} failed (the server is); nothing is sent any more"
    assert not told(client, "finish") and (tmp_path / "run" / "result.json").exists()


def test_a_client_that_is_not_there_is_refused_before_anything_begins(tmp_path, monkeypatch):
    for name in tracking.CLIENTS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match="trackio is not installed; pip install trackio"):
        sft.train(SFTConfig(data="no such file", report_to="trackio"), tmp_path / "run")
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        grpo.train(GRPOConfig(report_to="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_client_that_breaks_while_it_is_imported_is_named(client, tmp_path):
    (tmp_path / "site" / f"{client}.py").write_text("raise RuntimeError('too old')")
    with pytest.raises(UserError, match=f"{client} cannot be imported .too old."):
        tracking.client(client)
    (tmp_path / "site" / f"{client}.py").write_text("import not_there_at_all")
    with pytest.raises(UserError, match=f"{client} needs not_there_at_all"):
        tracking.client(client)


def test_other_ranks_than_the_first_send_nothing(client, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "first", lambda: False)
    with tracking.reported(SFTConfig(data="", report_to=client), RunFolder(tmp_path), print) as show:
        assert show is print
    assert client not in sys.modules


def test_the_rounds_hand_the_setting_to_every_training_and_no_name_changes(client, monkeypatch):
    third = {"grpo": {"num_steps": 2}}
    plain, asked = (
        rounds.stages(build(RoundsConfig, {"name": "try", "round3": third, **extra}), None)
        for extra in ({}, {"report_to": client})
    )
    assert [stage.out for stage in plain] == [stage.out for stage in asked]
    assert [stage.recipe.report_to for stage in rounds.trainings(asked)] == [client] * 3
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(UserError, match="is not installed"):
        rounds.check(asked, None)
