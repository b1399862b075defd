"""The benches: shapes of what they print, and that ours and the peer do the same work."""

import json

from click.testing import CliRunner

from mlx_traces.cli import main


def test_bench_generate_prints_a_row_per_number_of_rows():
    arguments = "bench generate --rows 2,4 --count 6 --max-tokens 12 --repeats 1 --against mlx-lm --json"
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["rows"] for row in rows] == [2, 4]
    for row in rows:
        assert row["completion_tokens"] == row["peer_completion_tokens"] == 72  # nano never ends within 12 tokens
        assert row["ratio"] > 0 and 0 < row["occupancy"] <= 1 and row["peer_weights"] == "same"
        assert row["tokens_per_second"] > 0 and row["peak_memory_gb"] > 0


def test_bench_generate_refuses_bad_rows():
    for rows in ("0", "4,x", ""):
        result = CliRunner().invoke(main, ["bench", "generate", "--rows", rows])
        assert result.exit_code == 1 and "give numbers from 1 up" in result.output
