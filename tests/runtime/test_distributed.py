"""Two processes do what one does, over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from stress import killing, several

from mlx_traces.cli import main
from mlx_traces.runtime import distributed

ROOT = Path(__file__).parents[2]
BAD = """
import os

if os.environ["MLX_RANK"] == "1":
    raise ValueError("no")


def reward(completions):
    return [0.0] * len(completions)
"""
GRPO = ("grpo", "--model", "nano", "--max-tokens", "4", "--prompts-per-step", "2", "--group-size", "2")


def ring(folder):
    """Write the addresses of two ranks; return the variables that make a process each of them."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in (one, two)]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    return [{"MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(rank)} for rank in (0, 1)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(kind, folder, name):
    """Check that a run has the outcome of the one that a single process made without a break."""
    expected, found = (several.place(kind, folder, each) for each in ("one", name))
    if kind == "generate":
        assert [row | {"logprobs": 0} for row in lines(found)] == [row | {"logprobs": 0} for row in lines(expected)]
        for a, b in zip(lines(expected), lines(found), strict=True):
            assert b["logprobs"] == pytest.approx(a["logprobs"], abs=1e-4)
        assert not list(folder.glob(f".{name}-*"))
        return
    assert not (found / ".lock").exists() and (found / "result.json").exists()
    if kind == "eval":
        a, b = (lines(path / "samples.jsonl") for path in (expected, found))
        assert [row | {"elapsed": 0} for row in a] == [row | {"elapsed": 0} for row in b]
        return
    one, two = (mx.load(str(path / "checkpoint.safetensors")) for path in (expected, found))
    assert set(one) == set(two)
    for key, array in one.items():
        assert mx.abs(array - two[key]).max().item() <= 1e-5, (name, kind, key)
    one, two = (mx.load(str(path / "adapter" / "adapters.safetensors")) for path in (expected, found))
    assert all(mx.allclose(array, two[key], rtol=0, atol=1e-5) for key, array in one.items())
    for a, b in zip(lines(expected / "metrics.jsonl"), lines(found / "metrics.jsonl"), strict=True):
        for key in {*a, *b} - {"memory/peak_gb", "tokens_per_second"}:
            assert key.startswith("time/") or b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), (name, kind, key)


def test_two_are_one_and_go_on_with_what_another_number_began(tmp_path):
    several.prepare(tmp_path)
    for kind in several.SETTINGS:
        several.make(kind, tmp_path, "one")
        assert several.stopped(kind, tmp_path, "first").startswith("stopped after ")
    code = "import sys; from pathlib import Path; from stress import several; several.main(Path(sys.argv[1]))"
    ranks = [killing.start(tmp_path, code=code, **each) for each in ring(tmp_path)]
    for process in ranks:
        killing.finish(process)
    assert json.loads((tmp_path / "said.json").read_text()) == {
        **dict.fromkeys(("grpo", "ppo"), "stopped after step 2 of 3"),
        **{"sft": "stopped after step 2 of 3", "eval": "stopped after 16 of 19 completions"},
        "generate": "stopped after 16 of 20 completions",
    }
    assert json.loads((several.place("sft", tmp_path, "second") / "run.json").read_text())["ranks"] == 2
    for kind in several.SETTINGS:
        several.make(kind, tmp_path, "second", resume=True)
        for name in ("first", "second"):
            assert_same_run(kind, tmp_path, name)
    start = mx.load(str(ROOT / "adapters/nano-epoch1/adapters.safetensors"))
    for kind in ("grpo", "ppo"):
        trained = mx.load(str(several.place(kind, tmp_path, "one") / "checkpoint.safetensors"))
        moved = [
            mx.abs(trained[key] - start[key.split("policy.")[-1].removeprefix("weights.")]).max().item()
            for key in trained
            if key.startswith("weights.") and "lora" in key
        ]
        assert max(moved) > 1e-4


def test_a_rank_that_fails_is_named_and_ends_the_others(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    words = (*GRPO, "--reward", "bad:reward", "--out", tmp_path / "run")
    ranks = [killing.start(*words, cwd=tmp_path, **each) for each in ring(tmp_path)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert "rank 1: reward bad:reward: bad cannot be imported (ValueError: no)" in said[1]
    assert all(process.returncode == 1 for process in ranks) and "rank 1" in said[0], said


def test_a_rank_that_is_killed_is_named_and_ends_the_others_in_time(tmp_path):
    words = (*GRPO, "--num-steps", "400", "--save-every", "1", "--out", tmp_path / "run")
    first, second = (killing.start(*words, cwd=tmp_path, **each) for each in ring(tmp_path))
    assert killing.kill_when(second, (tmp_path / "run/checkpoint.safetensors").exists)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 1 and "Error: rank 1 is gone (" in said and "Traceback" not in said, said
    assert said.rstrip().endswith("go on with --resume")


def started(*command, **own):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def test_a_lost_rank_is_named_without_a_launcher_too(tmp_path):
    """What MLX raises becomes one line; nobody but the ranks themselves is there to end them."""
    code = (
        "import os\nfrom mlx_traces.runtime import distributed as ranks\n"
        "try:\n    for turn in range(10**6):\n        ranks.gather([turn])\n"
        "        turn == 3 and ranks.world().rank() == 1 and os._exit(9)\n"
        "except ranks.Lost as lost:\n    print('lost:', lost)\n"
    )
    processes = [started(sys.executable, "-c", code, **each) for each in ring(tmp_path)]
    said, _ = (process.communicate(timeout=60)[0] for process in processes)
    assert said.startswith("lost: rank 1 is gone ([ring] ") and said.rstrip().endswith("go on with --resume")


def test_a_launcher_starts_ranks_that_share_work():
    command = Path(sys.executable).with_name("mlx.launch")
    if not command.exists():
        pytest.skip("mlx.launch is not beside this Python")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    code = "from mlx_traces.runtime import distributed as ranks; print(ranks.gather(list(ranks.share(5))))"
    launcher = started(command, "-n", "2", "-p", port, "--", sys.executable, "-c", code)
    said, _ = launcher.communicate(timeout=60)
    lines_said = [sorted(json.loads(line)) for line in said.splitlines()]
    assert launcher.returncode == 0 and lines_said == [[0, 1, 2, 3, 4]] * 2, said


def test_what_ranks_do_not_share_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    said = CliRunner().invoke(main, ["compare"]).output
    assert "compare runs in one process; mlx.launch can start eval, generate, sft" in said


def test_one_process_is_left_alone(tmp_path):
    assert distributed.world().size() == 1 and list(distributed.share(5)) == [0, 1, 2, 3, 4]
    tree = {"a": mx.ones(3)}
    assert (
        distributed.gather([1, 2]) == [1, 2]
        and distributed.total(tree) is tree
        and distributed.own_folder(tmp_path) == tmp_path
    )
    assert distributed.total_step(1.0, tree, {"n": 2.0}, tree) == (1.0, tree, {"n": 2.0}) and distributed.any_of(True)
