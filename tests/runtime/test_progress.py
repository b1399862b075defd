"""Progress: a live line that fits the terminal, a plain one every 30 seconds in a log."""

import io
import re
from time import sleep

import pytest
from rich.console import Console

from mlx_traces.cli.train import training_bar
from mlx_traces.evaluation import run
from mlx_traces.runtime import progress

REINFORCED = {
    **{"reward/mean": 0.4321, "rollout/length": 123.4, "rollout/finished": 0.98, "rollout/zero_std_groups": 0.25},
    **{"policy/kl_ref": 0.0123, "value/explained_variance": 0.5, "policy/entropy": 0.33, "time/sample": 12.3},
    **{"time/update": 45.6, "loss": 0.1234, "memory/peak_gb": 12.34, "tokens_per_second": 1234.5},
}
COMMANDS = {
    "generate": ({"step": 1, "correct": 12.345}, "12.3 % correct"),
    "sft": ({"loss": 1.2345, "tokens_per_second": 1234.5, "memory/peak_gb": 1.5}, "loss 1.2345"),
    "grpo": (REINFORCED, "reward 0.432"),
    "ppo": (REINFORCED, "reward 0.432"),
    "a-long-name-of-rounds-epoch2-12345678": ({"loss": 1.2345}, "loss 1.2345"),
}


class Terminal(io.StringIO):
    """A terminal's text, without its control sequences."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def lines(self):
        return [line for line in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", self.getvalue()) if line.strip()]


@pytest.fixture
def terminal(monkeypatch, request):
    file = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        "mlx_traces.runtime.progress.Console", lambda **_: Console(file=file, width=request.param, force_terminal=True)
    )
    return request.param, file


@pytest.mark.parametrize("terminal", [80, 60], indirect=True)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_live_line_of_a_training_fits_the_terminal(terminal, name):
    width, file = terminal
    row, told = COMMANDS[name]
    with training_bar(name) as show:
        show({**row, "step": 900}, 1000)
        sleep(0.01)
        show({**row, "step": 901, "valid/accuracy": 0.5}, 1000)
    shown, bar = file.lines(), " ━+─" if width == 80 else ""
    assert max(map(len, shown)) <= width and "…" not in file.getvalue()
    assert "step 901: held out: accuracy 0.5" in shown
    assert re.fullmatch(rf"{name[:16]}{bar}  901/1,000  [0-9.]+/s  \d+:\d\d left  {told}.*", shown[-1]), shown[-1]


@pytest.mark.parametrize("terminal", [80, 60], indirect=True)
def test_the_live_line_of_an_evaluation_fits_the_terminal(terminal):  # eval's, compare's and study's
    width, file = terminal
    row = {"correct": True, "tokens": 900}
    with run.progress_bar(True) as show:
        show([row | {"correct": False}] * 5, 13_190)  # of a run that continues
        for _ in range(20):
            show([row], 13_190)
    last = file.lines()[-1]
    assert max(map(len, file.lines())) <= width
    assert re.match(rf"eval{' ─+' if width == 80 else ''}  25/13,190  .* left  80.0 % correct", last), last


def test_a_log_gets_a_plain_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with training_bar("sft") as show:
        sleep(0.3)  # the model is loaded
        show({"step": 0, "valid/loss": 1.5}, 40)
        sleep(0.1)
        show({"step": 10, "loss": 1.25}, 40)
        sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft: 0:00 so far" and "step 0: held out: loss 1.5" in lines
    assert re.fullmatch(r"sft: 10/40, \d+\.\d/s, \d+:\d\d left, loss 1\.2500", lines[-1])
    assert len(lines) >= 4 and not any("\x1b" in line or "━" in line for line in lines)


def test_a_short_command_prints_no_progress_in_a_log(capsys):
    with run.progress_bar(True) as show:
        show([], 2)
        show([{"correct": True, "tokens": None}], 2)
    assert capsys.readouterr().err == "" and progress.EVERY == 30


def test_rates_and_times():
    shown = progress.Progress("grpo", Console(file=io.StringIO()))
    shown.update(5, 100)  # done before
    shown.first = (5, shown.first[1] - 150)
    shown.done = 10
    assert shown.parts() == ["10/100", "30.0 s each", "45:00 left"]
    shown.first, shown.total = (0, shown.first[1]), 10_000
    assert shown.parts()[:3] == ["10/10,000", "15.0 s each", "41:37:30 left"]


def test_the_rate_of_a_second_stage_counts_from_its_beginning():
    shown = progress.Progress("nano", Console(file=io.StringIO()))
    shown.update(0, 1000)
    shown.first = (0, shown.first[1] - 3600)
    shown.update(1000, 1000)
    assert shown.parts()[1] == "3.6 s each"
    shown.update(1, 50)
    shown.first = (1, shown.first[1] - 20)
    shown.update(11, 50)
    assert shown.parts()[1:] == ["2.0 s each", "1:18 left"]
