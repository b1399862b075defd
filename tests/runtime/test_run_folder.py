"""Run folders: one process at a time, and what a killed one left."""

import ast
import errno
import fcntl
import json
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from stress import killing, several

from mlx_traces.config import EvalConfig, GenerateConfig, GRPOConfig, PPOConfig, SFTConfig
from mlx_traces.errors import UserError
from mlx_traces.runtime import files
from mlx_traces.runtime.files import held
from mlx_traces.runtime.run_folder import best_of

HOLD = "import sys, time; from pathlib import Path; from mlx_traces.runtime import files\n"
HOLD += "with files.held(Path(sys.argv[1])):\n    Path(sys.argv[1] + '.on').touch()\n    time.sleep(600)\n"
RACE = """
import os, sys; from pathlib import Path; from mlx_traces import errors; from mlx_traces.runtime import files
folder = Path(sys.argv[1])
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    pass
for turn in range(300):
    try:
        with files.held(folder / "run" / ".lock"):
            mark = folder / "mark"
            mark.touch(exist_ok=False)
            mark.unlink()
    except errors.UserError as error:
        assert "in use by" in str(error), error
"""


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]


def test_a_second_process_is_refused_and_a_killed_one_is_followed(tmp_path):
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    process = killing.start(lock, code=HOLD)
    wait_for(tmp_path / "run" / ".lock.on", process)
    content = lock.read_bytes()
    for _ in range(2):
        told = f"run is in use by process {process.pid} on .*; wait until that has ended"
        with pytest.raises(UserError, match=told), held(lock):
            pass
    assert lock.read_bytes() == content
    process.kill()
    process.communicate()
    assert lock.read_bytes() == content  # what it left
    with held(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on {files.machine()}, since 20"), held(lock):
            pass
    assert not lock.exists()


@pytest.mark.parametrize("kind", several.SETTINGS)
def test_every_long_command_respects_the_lock(kind, tmp_path):
    out = several.place(kind, tmp_path, "run")
    lock = tmp_path / f".{out.stem}.lock" if kind == "generate" else out / ".lock"
    with held(lock):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="is in use by process"):
            several.make(kind, tmp_path, "run")
        assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_a_number_that_was_given_away_again_misleads_nobody(tmp_path):
    """The owner's number is this living process's, but nobody holds the lock."""
    lock = tmp_path / ".lock"
    for content in ({"pid": os.getpid(), "host": files.machine(), "since": "2020-01-01"}, "", "[]", "{", {"pid": 1}):
        lock.write_text(content if isinstance(content, str) else json.dumps(content))
        with held(lock):
            assert json.loads(lock.read_text())["since"] > "2025"
        assert not lock.exists()


def test_a_mac_is_known_in_every_network(tmp_path, monkeypatch):
    """What it is called changes with the network; its local name does not."""
    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(files.subprocess, "run", lambda words, **_: SimpleNamespace(stdout=f"{words[-1]}-of-a-Mac\n"))
    monkeypatch.setattr(files, "machine", cache(files.machine.__wrapped__))
    lock, seen = tmp_path / ".lock", []
    for network in ("Mac.fritz.box", "Mac.local"):
        monkeypatch.setattr(files.platform, "node", lambda network=network: network)
        with held(lock):
            seen.append(lock.read_text())
        lock.write_text(seen[0])  # as a process that was killed leaves it
        assert json.loads(seen[-1])["host"] == "LocalHostName-of-a-Mac"
    monkeypatch.setattr(files.subprocess, "run", lambda *_, **more: (_ for _ in ()).throw(OSError))
    files.machine.cache_clear()
    assert files.machine() == "Mac.local"


def test_another_machines_lock_is_kept(tmp_path):
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2020-01-01"}))
    content = lock.read_bytes()
    with pytest.raises(UserError) as caught, held(lock):
        pass
    told = "process 1 on elsewhere, since 2020-01-01"
    assert str(caught.value) == f"{lock.parent} is in use by {told}; if that has ended, remove {lock}"
    assert lock.read_bytes() == content


def test_many_at_once_hold_it_one_after_the_other(tmp_path):
    started = [killing.start(tmp_path, code=RACE) for _ in range(3)]
    for process in started:
        wait_for(tmp_path / f"ready-{process.pid}", process)
    (tmp_path / "go").touch()
    for process in started:
        killing.finish(process)


def test_nothing_is_left_of_a_run_that_did_not_begin(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b" / ".lock"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "a" / "b" / ".lock"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "file").touch()
    told = r"file: cannot be written \(.*\); choose another --out"
    with pytest.raises(UserError, match=told), held(tmp_path / "file" / ".lock"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / ".lock"):
        assert (tmp_path / ".lock").exists()
    assert files.fcntl is fcntl and not (tmp_path / ".lock").exists()


def test_a_folder_that_another_removes_at_that_moment_is_made_again(tmp_path, monkeypatch):
    lock, opened, made, turns = tmp_path / "run" / ".lock", os.open, Path.mkdir, []

    def late(path, *given):
        if path == lock and len(turns) < 2:
            turns.append(lock.parent.rmdir())
        return opened(path, *given)

    def gone(path, *given, **options):
        """It was there when it was to be made, and is not when it is looked at."""
        if path == lock.parent and not turns:
            turns.append(None)
            raise FileExistsError(errno.EEXIST, "File exists")
        return made(path, *given, **options)

    monkeypatch.setattr(os, "open", late)
    monkeypatch.setattr(Path, "mkdir", gone)
    with files.held(lock):
        assert len(turns) == 2 and lock.exists()
    assert not lock.parent.exists()


def test_a_lock_that_its_owner_removes_while_it_is_looked_at_is_taken_anew(tmp_path, monkeypatch):
    lock, state, removed = tmp_path / ".lock", Path.stat, []

    def late(path, **options):
        if path == lock and not removed and path.exists():
            removed.append(lock.unlink())
        return state(path, **options)

    monkeypatch.setattr(Path, "exists", lambda path, **_: os.path.lexists(path))
    monkeypatch.setattr(Path, "stat", late)
    with files.held(lock):
        assert removed and os.path.lexists(lock)


def test_only_the_run_folder_reads_what_a_run_says():
    """Of the files of a run, no other module opens run.json, result.json or metrics.jsonl by itself."""
    told, found = re.compile(r"'(run\.json|result\.json|metrics\.jsonl)'"), set()
    for path in sorted(Path(files.__file__).parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reads = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("read_json", "whole_lines")
            found |= {path.name} if reads and told.search(ast.unparse(node)) else set()
    assert found == {"run_folder.py"}


FREE = {"device", "save_every", "report_to", "micro_tokens", "logits_mb", "checkpoint_layers"}  # of any training
SERVER = {"endpoint", "concurrency", "retries", "timeout", "api_key_env"}


@pytest.mark.parametrize(
    ("config", "free"),
    [
        (EvalConfig(), {"rows", "device", "memory_limit", "extractor", *SERVER}),
        (GenerateConfig(), {"rows", "device", "memory_limit", "extractor"}),
        (SFTConfig(data="x"), {*FREE, "data", "valid"}),
        (GRPOConfig(), {*FREE, "rows", "memory_limit", "data", "judge_cache"}),
        (PPOConfig(), {*FREE, "rows", "memory_limit", "data", "judge_cache"}),
    ],
)
def test_these_settings_alone_may_change_when_a_run_is_continued(config, free):
    """Runs of earlier versions store all the others; files are compared by their content."""
    stored = config.model_dump(mode="json")
    assert stored.keys() - config.identity().keys() == free
    assert config.identity() == {name: value for name, value in stored.items() if name not in free}


def test_the_best_validation_is_the_first_of_equals_by_accuracy_else_by_loss():
    rows = [{"step": 1}, {"step": 2, "valid/loss": 2.0}, {"step": 3, "valid/loss": 1.0}, {"step": 4, "valid/loss": 1.0}]
    assert best_of(rows)["step"] == 3 and best_of(rows[:1]) is None
    accurate = [{**row, "valid/accuracy": value} for row, value in zip(rows, (0.0, 0.5, 0.25, 0.5), strict=True)]
    assert best_of(accurate)["step"] == 2
