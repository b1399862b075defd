"""Runs as they stand and their curves in the terminal: torn lines, hostile text, numbers against hand-made ones."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from mlx_traces.cli import main
from mlx_traces.errors import UserError
from mlx_traces.evaluation import stats
from mlx_traces.report import curves, figures, run_view, terminal
from mlx_traces.text import duration


def write_training(path, steps=6, num_steps=10, finished=False, **identity):
    """Write a reinforcement run: reward step / 10, a validation at steps 0 and 4."""
    path.mkdir(parents=True)
    identity = {"model": "nano", "adapter": None, "num_steps": num_steps, "group_size": 8, **identity}
    (path / "run.json").write_text(json.dumps({"identity": identity, "notes": []}))
    rows = [{"step": 0, "valid/accuracy": 0.25}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward/mean": step / 10, "reward/correct": step / 10, "loss": 1 / step, "tokens": 300}
        row |= {"policy/entropy": 0.5, "policy/new_thing": -step, "time/sample": 2.0, "time/update": 1.0}
        row |= {"time/total": 4.0 * step, "memory/peak_gb": 1.5}
        rows.append(row | ({"valid/accuracy": 0.5} if step == 4 else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        {"step": 1, "kind": "best", "id": "p1", "question": "q", "completion": "<think>\nt\n</think>\n5"}
        | {
            "finish_reason": "stop",
            "tokens": 9,
            "reward": 1.2,
            "rewards": {"correct": 1.0, "format": 0.2},
            "gold": "5",
        },
        {"step": 4, "kind": "held out", "id": "p2", "question": "q", "completion": "6", "finish_reason": "length"}
        | {"verdict": "wrong_value", "correct": False, "gold": "7"},
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if finished:
        result = {"steps": steps, "best_step": 4, "tokens_per_second": 100.0, "notes": ["a \x1b[31mred note"]}
        (path / "result.json").write_text(json.dumps(result))
    return path


def shown(record, width=100, now=None):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal.display(record, width, now))
    return console.file.getvalue()


def test_curves_of_a_running_training(tmp_path):
    run = write_training(tmp_path / "run", evaluate={"limit": 40})
    record = run_view.read(run)
    found = {curve.metric.key: curve for curve in curves.curves(record)}
    assert (record.kind, record.step, record.steps, record.result) == ("reinforcement learning", 6, 10, None)
    assert (record.seconds, record.remaining) == (24.0, 16.0)
    reward = found["reward/mean"]
    assert (reward.steps, reward.values) == ([1, 2, 3, 4, 5, 6], pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert "reward/correct" not in found  # the reward once more
    held_out = found["valid/accuracy"]
    assert list(zip(held_out.low, held_out.high, strict=True)) == [stats.wilson(10, 40), stats.wilson(20, 40)]
    assert found["tokens_per_second"].values == [100.0] * 6 and found["time/step"].values == [3.0] * 6
    assert found["policy/new_thing"].metric.title == "Policy: new thing"
    assert (held_out.best, reward.best, found["loss"].best) == (0.5, 0.6, None)
    assert found["policy/entropy"].constant and not reward.constant
    assert terminal.state(record) == "step 6 of 10, 0:24, about 0:16 to go"


def test_intervals_only_where_the_shares_are_of_that_many_problems(tmp_path):
    record = run_view.read(write_training(tmp_path / "run", evaluate={"limit": 41}))
    assert curves.curves(record)[0].low == []


def test_a_torn_last_line_is_left_out_and_left_there(tmp_path):
    run = write_training(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b'{"step": 7, "reward/mean": 0.9\xc3')
    assert run_view.read(run).step == 6
    assert (run / "metrics.jsonl").read_bytes().startswith(whole + b'{"step": 7')
    (run / "metrics.jsonl").write_bytes(whole + b'{"step": 7, "rew\n{"step": 8}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:8: not JSON"):
        run_view.read(run)
    (run / "metrics.jsonl").write_bytes(whole + b'{"step": "x"}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:8: 'step' is not a number"):
        run_view.read(run)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        run_view.read(tmp_path / "none")
    with pytest.raises(UserError, match=r"it has no run\.json"):
        run_view.read(tmp_path)


@pytest.mark.parametrize("value", ["many", None, True, [3], {"x": 1}, float("nan"), 10**400, -5])
def test_what_is_no_number_in_a_foreign_folder_is_taken_as_unknown(tmp_path, value):
    run = write_training(tmp_path / "run", num_steps=value, evaluate={"limit": value})
    with (run / "metrics.jsonl").open("a") as file:
        row = {"step": 7, "time/sample": 2.0, "time/update": 1.0, "time/reward": value, "loss": value}
        file.write(json.dumps(row | {"time/total": value}) + "\n")
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"steps": value}))
    record = run_view.read(run)
    assert (record.step, record.steps, record.remaining) == (7, None, None)
    assert "step 7, 0:24" in shown(record) and "held-out accuracy 50.0 % at step 4" in shown(record)
    (run / "result.json").write_text(json.dumps({"notes": value if value != [3] else 3}))
    assert "finished, step 7 of 7" in shown(run_view.read(run)) and "note:" not in shown(run_view.read(run))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"limit": "y", "samples": "x"}, None),
        ({"limit": 6, "samples": "x"}, None),
        ({"limit": "y", "samples": 2}, None),
        ({"limit": None}, None),
        ({"limit": 6, "samples": None}, 6),
        ({"limit": 6, "samples": 2}, 12),
        ({"limit": 6.0}, 6),
    ],
)
def test_how_many_samples_there_will_be(settings, steps):
    record = run_view.Record(Path("run"), run_view.EVALUATION, {"identity": settings}, [], [], None)
    assert record.steps == steps and terminal.state(record) == "samples 0" + (f" of {steps}" if steps else "")


def test_a_finished_evaluation_without_its_samples_says_so():
    record = run_view.Record(Path("run"), run_view.EVALUATION, {}, [], [], {"model": "nano"})
    text = " ".join(shown(record).split())
    assert "result.json is there, samples.jsonl is missing or empty" in text and "no step yet" not in text


def test_blocks_by_hand():
    assert terminal.blocks([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert terminal.blocks([0, 0, 7, 7], 2) == "▁█"
    assert terminal.blocks([2, 2, 2], 8) == "▄▄▄"
    assert terminal.blocks([], 8) == ""
    assert terminal.blocks([1e308, 1e308, -1e308, -1e308], 2) == "█▁" and terminal.blocks([0.0, 0.0], 2) == "▄▄"
    assert len(terminal.blocks(list(range(1001)), 37)) == 37
    assert terminal.blocks([1, 0, -1], 3) == "█▅▁"


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (754.4, "12:34"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_display_fits_and_says_first_last_and_best(tmp_path, width):
    text = shown(run_view.read(write_training(tmp_path / "run", evaluate={"limit": 40})), width)
    assert max(map(len, text.splitlines())) <= width
    assert "step 6 of 10" in text and "held-out accuracy 50.0 % at step 4 [35.2, 64.8]" in text
    (reward,) = (
        line.split() for line in text.splitlines() if line.startswith(" Reward ") or line.startswith("Reward ")
    )
    assert reward[-3:] == ["0.1", "0.6", "0.6"]


def test_terminal_codes_do_not_reach_the_terminal(tmp_path):
    run = write_training(tmp_path / "run\x1b[31m", finished=True, model="na\x1b]0;title\x07no")
    text = shown(run_view.read(run))
    assert "red note" in text and not any(c in text for c in "\x1b\x07")


def test_watch_prints_once_where_there_is_no_terminal(tmp_path):
    result = CliRunner().invoke(main, ["watch", str(write_training(tmp_path / "run"))])
    assert result.exit_code == 0 and "Reward" in result.stdout and "▁" in result.stdout
    result = CliRunner().invoke(main, ["watch", "--once", str(write_training(tmp_path / "done", finished=True))])
    assert "finished, step 6 of 6" in result.stdout
    result = CliRunner().invoke(main, ["watch", str(tmp_path / "none")])
    assert result.exit_code == 1 and "no such run folder" in result.stderr


def test_watch_ends_by_itself_when_the_run_is_finished(tmp_path, monkeypatch):
    run = write_training(tmp_path / "run")
    looks = []

    def finish(_):
        looks.append(1)
        (run / "result.json").write_text(json.dumps({"steps": 6}))

    monkeypatch.setattr("mlx_traces.cli.report.sys.stdout", io.StringIO())
    monkeypatch.setattr("mlx_traces.cli.report.sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("mlx_traces.cli.report.time.sleep", finish)
    from mlx_traces.cli.report import watch_command

    watch_command.callback(run=str(run), once=False, every=1.0)
    assert looks == [1]


def test_a_run_without_a_step(tmp_path):
    run = write_training(tmp_path / "run", steps=0)
    (run / "metrics.jsonl").write_text("")
    assert "no step yet" in shown(run_view.read(run))
    assert "nothing new for" in shown(run_view.read(run), now=4e9)


def test_running_means_and_thinning_by_hand():
    assert figures.running_mean([0, 3, 6]) == [1.5, 3, 4.5]
    steps, values = figures.thinned(range(1000), [1.0] * 500 + [3.0] * 500, most=4)
    assert (list(steps), list(values)) == ([124.5, 374.5, 624.5, 874.5], [1, 1, 3, 3])
    assert figures.tick_texts([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert figures.tick_texts([1000, 2000]) == ["1,000", "2,000"]
    assert figures.tick_texts([0, 2e-12]) == ["0", "2e-12"]
    assert figures.rough([0, 1] * 15) and not figures.rough(list(range(40))) and not figures.rough([0, 1] * 5)
