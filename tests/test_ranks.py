"""Two processes, started by mlx.launch over loopback, do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_traces import ranks

ROOT = Path(__file__).parent.parent
GRPO = """
model: nano
adapter: {root}/adapters/nano-epoch1
task: countdown
prompt: thinking
num_steps: 2
prompts_per_step: 6
group_size: 4
max_tokens: 48
micro_tokens: 512
learning_rate: 0.001
warmup: 0
minibatches: 2
eval_every: 2
save_every: 1
evaluate: {{task: countdown, prompt: thinking, limit: 9, max_tokens: 48}}
"""
BAD = """
import os


def reward(completions):
    if os.environ["MLX_RANK"] == "1":
        raise ValueError("no")
    return [0.0] * len(completions)
"""
EVAL = ("eval", "--model", "nano", "--task", "countdown", "--prompt", "thinking", "--max-tokens", "48", "--limit", "21")


def mlx_traces(*arguments, ranks=1, cwd):
    """Run a command in a process of its own, or in several; return its output."""
    program = [sys.executable, "-c", "from mlx_traces.cli import main; main()"]
    if ranks > 1:
        launch = Path(sys.executable).with_name("mlx.launch")
        if not launch.exists():
            pytest.skip("mlx.launch is not beside this Python")
        script = cwd / "main.py"
        script.write_text("from mlx_traces.cli import main\n\nmain()\n")
        program = [launch, "-n", str(ranks), "--env", f"PYTHONPATH={ROOT}", "--python", sys.executable, script]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, program), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 or ranks > 1, done.stderr
    return done.stdout + done.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grpo_and_eval_are_those_of_one_process(tmp_path):
    config = tmp_path / "grpo.yaml"
    config.write_text(GRPO.format(root=ROOT))
    mlx_traces("grpo", config, "--out", tmp_path / "one", cwd=tmp_path)
    told = mlx_traces("grpo", config, "--out", tmp_path / "two", ranks=2, cwd=tmp_path)
    one, two = (mx.load(str(tmp_path / name / "checkpoint.safetensors")) for name in ("one", "two"))
    assert set(one) == set(two) and told.count("; adapter in ") == 1, told
    start = mx.load(str(ROOT / "adapters/nano-epoch1/adapters.safetensors"))
    trained = {name.removeprefix("weights."): array for name, array in one.items() if name.startswith("weights.")}
    assert max(mx.abs(array - start[name]).max().item() for name, array in trained.items()) > 1e-3
    for name, array in one.items():
        assert mx.abs(array - two[name]).max().item() <= 1e-5, name
    for a, b in zip(lines(tmp_path / "one/metrics.jsonl"), lines(tmp_path / "two/metrics.jsonl"), strict=True):
        for key in {*a, *b} - {"memory/peak_gb"}:
            assert key.startswith("time/") or b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key

    # The run of two goes on in one, and that of one in two; a finished one has nothing to do.
    (tmp_path / "two/result.json").unlink()
    mlx_traces("grpo", config, "--out", tmp_path / "two", "--resume", cwd=tmp_path)
    assert (tmp_path / "two/result.json").exists()

    mlx_traces(*EVAL, "--out", tmp_path / "a", cwd=tmp_path)
    mlx_traces(*EVAL, "--out", tmp_path / "b", ranks=2, cwd=tmp_path)
    a, b = (lines(tmp_path / name / "samples.jsonl") for name in "ab")
    assert len(a) == 21 and [row | {"elapsed": 0} for row in a] == [row | {"elapsed": 0} for row in b]


def test_a_rank_that_fails_is_named_and_ends_the_others(tmp_path):
    config = tmp_path / "grpo.yaml"
    config.write_text(GRPO.format(root=ROOT) + "rewards: {'bad:reward': 1}\n")
    (tmp_path / "bad.py").write_text(BAD)
    told = mlx_traces("grpo", config, "--out", tmp_path / "run", ranks=2, cwd=tmp_path)
    assert "rank 1: reward bad:reward failed (ValueError: no)" in told


def test_one_process_is_left_alone(tmp_path):
    assert ranks.world().size() == 1 and list(ranks.share(5)) == [0, 1, 2, 3, 4]
    tree = {"a": mx.ones(3)}
    assert ranks.gather([1, 2]) == [1, 2] and ranks.total(tree) is tree and ranks.own_folder(tmp_path) == tmp_path
