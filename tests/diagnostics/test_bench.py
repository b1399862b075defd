"""The benches: shapes of what they print, and that ours and the peer do the same work, by one process or several."""

import json
import sys
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from mlx_traces.cli import main
from mlx_traces.cli.diagnostics import _without_ranks
from mlx_traces.diagnostics import bench_generate, bench_ranks
from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.runtime import blas


def test_bench_generate_prints_a_row_per_number_of_rows():
    arguments = "bench generate --rows 2,4 --count 6 --max-tokens 12 --repeats 1 --against mlx-lm --json"
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    rows = told["rows"]
    assert [row["rows"] for row in rows] == [2, 4]
    assert told["versions"]["mlx"] and told["model"] == loading.load("nano").about()
    assert told["config"]["count"] == 6 and told["config"]["weights"] is None  # as the device likes them
    for row in rows:
        assert row["completion_tokens"] == row["peer_completion_tokens"] == 72  # nano never ends within 12 tokens
        assert row["ratio"] > 0 and 0 < row["occupancy"] <= 1 and row["peer_weights"] == "same"
        assert row["tokens_per_second"] > 0 and row["peak_memory_gb"] > 0


def test_bench_generate_beside_busy_processes(monkeypatch):
    started, whole = [], bench_generate.counting

    @contextmanager
    def counting(processes):
        started.append(processes)
        with whole(processes):
            yield

    monkeypatch.setattr(bench_generate, "counting", counting)
    rows = []
    made = bench_generate.bench_generate
    monkeypatch.setattr(bench_generate, "bench_generate", lambda *given: rows.extend(made(*given)) or rows)
    arguments = "bench generate --rows 2 --count 2 --max-tokens 4 --repeats 1 --busy 2"
    said = CliRunner().invoke(main, arguments.split()).output
    (row,) = rows
    assert started == [2, 2] and row.busy == 2 and row.busy_ratio > 0 and row.ratio is None
    assert f" tokens/s beside busy processes (2), {row.busy_ratio:.0%} of that" in said


def test_bench_generate_refuses_bad_rows():
    for rows in ("0", "4,x", "", "²"):
        result = CliRunner().invoke(main, ["bench", "generate", "--rows", rows])
        assert result.exit_code == 1 and "give numbers from 1 up" in result.output


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "sft", *(str(argument) for argument in arguments)])


def test_bench_sft_prints_a_row():
    result = run("--count", 4, "--batch-size", 2, "--repeats", 2, "--against", "mlx-lm", "--layers", 1, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["examples"], row["steps"], row["peer_weights"]) == (4, 2, "same")
    assert row["tokens"] > row["learned"] > 0 and row["ratio"] > 0 and row["padding"] < row["peer_padding"] < 1
    assert abs(row["tokens_per_second"] - row["tokens"] / row["seconds"]) < 1e-6
    assert 0 < row["peak_memory_gb"] < 1 and 0 < row["peer_peak_memory_gb"] < 1


def test_bench_sft_leaves_out_what_fills_no_batch_and_needs_one_batch():
    (row,) = json.loads(run("--count", 5, "--batch-size", 2, "--repeats", 1, "--layers", 1, "--json").stdout)["rows"]
    assert row["examples"] == 4 and row["ratio"] is None
    for arguments, message in (
        (("--count", 2, "--batch-size", 4), "batch_size: 4 traces make a batch"),
        (("--count", 2, "--max-length", 5), "no trace of at most 5 tokens"),
        (("--data", "a", "--problems", "b"), "not both"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output


def test_the_peer_computes_our_loss_and_both_leave_the_model_as_it_was(tiny):
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    from mlx_traces.config import SFTConfig
    from mlx_traces.diagnostics import bench_sft
    from mlx_traces.engine import logprobs
    from mlx_traces.engine.batching import Example
    from mlx_traces.train import sft

    rows = [
        Example(str(row), tuple(range(5, 5 + length)), (False,) * 4 + (True,) * (length - 4))
        for row, length in enumerate((33, 31, 20, 9))  # mlx_lm also learns the first padding token; 33 of 33 has none
    ]
    config = SFTConfig(data="", batch_size=1, max_length=33)
    data = [(list(row.ids), bench_sft.prompt_length(row)) for row in rows]
    batches = list(iterate_batches(data, 1, 33))
    assert sum(ids.size for ids, _ in batches) == bench_sft.peer_cells(rows, config) == 4 * 33
    whole = next(batch for batch in batches if batch[1][0, 1].item() == 33)
    loss, count = default_loss(tiny.model, *whole)
    assert count.item() == rows[0].count == 29
    assert abs(loss.item() - sft.mean_loss(logprobs.split(tiny.model), rows[:1], config)) < 1e-4
    before = tree_flatten(tiny.model.parameters())
    bench_sft.bench_sft(tiny, rows, config, "mlx-lm", repeats=1)
    after = tree_flatten(tiny.model.parameters())
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


def run_grpo(*arguments):
    return CliRunner().invoke(main, ["bench", "grpo", *(str(argument) for argument in arguments)])


SIZES = ("--prompts", 2, "--group-size", 3, "--max-tokens", 12, "--repeats", 2)


def test_bench_grpo_prints_a_row():
    result = run_grpo(*SIZES, "--every-row", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    (row,) = told["rows"]
    assert told["config"]["group_size"] == 3 and told["config"]["every_row"] and told["model"]["name"] == "nano"
    assert (row["prompts"], row["group_size"], row["max_tokens"], row["steps"]) == (2, 3, 12, 2)
    assert row["completion_tokens"] == 72 and row["learned"] == 1  # nano never ends within 12 tokens
    assert 0 < row["sample_seconds"] < row["seconds"] and row["update_seconds"] > 0
    assert 0 < row["peak_memory_gb"] < 1 and row["estimated_memory_gb"] > 0 and row["ratio"] is None
    assert 0 <= row["kl_sampler"] < 1e-3  # what sampled and what trains are one model, in float32


def test_bench_grpo_without_repeats_times_the_first_step():
    result = run_grpo("--prompts", 1, "--group-size", 2, "--max-tokens", 8, "--repeats", 0, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["steps"] == 1 and row["seconds"] == row["warmup_seconds"] > 0 and row["completion_tokens"] == 16


def test_bench_grpo_leaves_out_what_teaches_nothing_and_the_model_as_it_was(tiny):
    from mlx.utils import tree_flatten

    from mlx_traces.config import GRPOConfig
    from mlx_traces.diagnostics import bench_rl

    before = tree_flatten(tiny.model.parameters())
    config = GRPOConfig(prompts_per_step=1, group_size=2, max_tokens=8)
    line = bench_rl.bench_grpo(tiny, config, repeats=1)
    assert line.learned == 0  # random text solves nothing
    after = tree_flatten(tiny.model.parameters())
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


def test_bench_grpo_says_how_to_install_its_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm_lora.trainer", None)
    result = run_grpo(*SIZES, "--against", "mlx-lm-lora")
    assert result.exit_code == 1 and "mlx-lm-lora is not installed" in result.output
    assert "pip install 'mlx-traces[peers]'" in result.output


@pytest.mark.parametrize("shipped", [False, True])
def test_bench_grpo_beside_its_peer(shipped):
    pytest.importorskip("mlx_lm_lora", reason="the extra `peers` is not installed")
    sizes = ("--prompts", 2, "--group-size", 2, "--max-tokens", 6, "--repeats", 1)  # 4-bit weights are slow on a CPU
    result = run_grpo(*sizes, "--against", "mlx-lm-lora", "--json", *(["--as-shipped"] if shipped else []))
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["peer_weights"] == ("as shipped" if shipped else "same")
    assert row["completion_tokens"] == row["peer_completion_tokens"] == 24
    assert row["ratio"] > 0 and row["tokens_ratio"] > 0 and 0 < row["peer_peak_memory_gb"] < 1
    assert 0 < row["peer_sample_seconds"] < row["peer_seconds"]


def test_bench_ppo_beside_grpo():
    sizes = ("--prompts", 2, "--group-size", 3, "--max-tokens", 8, "--repeats", 1, "--epochs", 1)
    result = CliRunner().invoke(main, ["bench", "ppo", *map(str, sizes), "--against", "grpo", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["prompts"], row["group_size"], row["max_tokens"], row["steps"], row["peer"]) == (2, 3, 8, 1, "grpo")
    assert row["completion_tokens"] == row["peer_completion_tokens"] == 48 and row["learned"] == 1
    assert 0 < row["sample_seconds"] < row["seconds"] and 0 < row["peer_sample_seconds"] < row["peer_seconds"]
    assert row["estimated_memory_gb"] > 0 and row["peak_memory_gb"] > 0 and row["ratio"] > 0
    refused = CliRunner().invoke(main, ["bench", "ppo", "--against", "mlx-lm-lora"])
    assert refused.exit_code == 2 and "'grpo'" in refused.output


def test_a_ppo_step_of_the_bench_moves_policy_and_values_and_not_the_model(tiny):
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_traces.config import PPOConfig
    from mlx_traces.diagnostics import bench_rl
    from mlx_traces.rl import rollouts

    before = tree_flatten(tiny.model.parameters())
    config = PPOConfig(prompts_per_step=1, group_size=2, max_tokens=8, value_warmup_steps=3, num_steps=9)
    config = bench_rl._alone(config, 2)
    steps = bench_rl.OurSteps(tiny, rollouts.prepare(config)[0], config, every_row=True)
    start = [mx.array(array) for _, array in tree_flatten(steps.learner.module.trainable_parameters())]
    step, problems = steps.make()
    assert step.tokens and step.learned == 1 and len(problems) == 1 and 0 < step.sampling < step.seconds
    moved = [
        name
        for old, (name, new) in zip(start, tree_flatten(steps.learner.module.trainable_parameters()), strict=True)
        if not mx.array_equal(old, new).item()
    ]
    assert any("lora_b" in name for name in moved) and any(name.startswith("value.") for name in moved)
    after = tree_flatten(tiny.model.parameters())
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


def test_bench_times_one_process_and_two(monkeypatch):
    """The one test that starts them: three processes."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    arguments = "bench generate --count 5 --rows 2,3 --max-tokens 2 --repeats 1 --json --ranks 2"
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)["rows"]
    assert [line["one"]["rows"] for line in lines] == [2, 3]
    for line in lines:
        assert (line["ranks"], line["threads"], line["one"]["ranks"], line["several"]["ranks"]) == (2, [1, 1], 1, 2)
        assert line["one"]["completion_tokens"] == line["several"]["completion_tokens"] == 10  # of all ranks
        assert line["ratio"] == pytest.approx(line["one"]["seconds"] / line["several"]["seconds"]) and line["ratio"] > 0
    assert "1 process, 1 BLAS thread each" in result.stderr and "2 processes" in result.stderr


def test_ranks_choose_their_own_threads(monkeypatch, tmp_path):
    """A number in the environment would be final, and a small model's products would wait for each other."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(bench_ranks, "COMMAND", "import os; print(os.environ.get('OPENBLAS_NUM_THREADS'))")
    for count in (1, 2):
        with bench_ranks.ranks([], count, tmp_path) as started:
            assert [process.wait(30) for process in started] == [0] * count
        assert [(tmp_path / f"{rank}.out").read_text() for rank in range(count)] == ["None\n"] * count


def test_what_ranks_cannot_do_is_said_before_anything_is_timed(monkeypatch):
    result = CliRunner().invoke(main, ["bench", "sft", "--ranks", "2", "--against", "mlx-lm"])
    assert result.exit_code == 1 and "leave out --against" in result.output
    result = CliRunner().invoke(main, ["bench", "generate", "--ranks", "2", "--busy", "1"])
    assert result.exit_code == 1 and "leave out --busy" in result.output
    with pytest.raises(UserError, match="give numbers from 1 up"):  # the process's own fault, in its words
        bench_ranks.scaling(["bench", "generate", "--rows", "x"], 2, lambda line: None)
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(UserError, match="leave out mlx.launch"):
        bench_ranks.scaling(["bench", "sft"], 2, lambda line: None)


def test_blas_threads_are_split(monkeypatch):
    for name in blas.GIVEN:
        monkeypatch.delenv(name, raising=False)
    assert [bench_ranks.threads_of(count, 8) for count in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert bench_ranks.threads_of(2, 8) == 5
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert bench_ranks.threads_of(2, 8) == 3
    given = ["--rows", "2", "--ranks", "4", "--json", "--ranks=3", "--count", "5"]
    assert _without_ranks(given) == ["--rows", "2", "--count", "5"]
