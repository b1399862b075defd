"""Ctrl-C: the first is heard between units and what is done is kept, the second stops at once."""

import json
import os
import re
import signal
import threading
import time

import mlx.core as mx
import pytest
from stress import killing, several

from mlx_traces.runtime import interrupts

CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mlx_traces.cli import main; main()"
)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C do what it does in a terminal, wherever the suite runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_told_and_the_second_stops(capfd):
    with interrupts.listening() as pressed:
        assert not pressed()
        press()
        assert pressed() and "once more stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            press()
    with interrupts.listening(say=False) as pressed:
        press()
    assert pressed() and not capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # outside all is as it was
        press()


def test_where_python_does_not_hear_it_nothing_changes():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.listening() as pressed:
        press()
        assert not pressed() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    found = []

    def work():
        with interrupts.listening() as pressed:
            found.append(pressed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize("kind", ["sft", "generate"])
def test_a_stopped_run_ends_as_the_uninterrupted_one(kind, tmp_path):
    """The others of ``several`` are stopped and resumed in ``test_distributed``."""
    several.prepare(tmp_path)
    several.make(kind, tmp_path, "one")
    said = several.stopped(kind, tmp_path, "first")
    assert re.fullmatch(r"stopped after (step [12] of 3|\d+ of 20 completions)", said)
    several.make(kind, tmp_path, "first", resume=True)
    one, first = (several.place(kind, tmp_path, name) for name in ("one", "first"))
    if kind == "generate":
        a, b = ([json.loads(line)["completion_ids"] for line in path.read_text().splitlines()] for path in (one, first))
        assert a == b
        return
    a, b = (mx.load(str(path / "checkpoint.safetensors")) for path in (one, first))
    assert set(a) == set(b) and all(mx.array_equal(array, b[name]) for name, array in a.items())


def test_the_command_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    words = ("eval", "--prompt", "thinking", "--task", "countdown", "--limit", "400", "--rows", "2", "--out", out)
    process = killing.start(*words, code=CODE)
    deadline = time.time() + 120
    while not (out / "samples.jsonl").exists():
        assert time.time() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    kept = len((out / "samples.jsonl").read_text().splitlines())
    assert process.returncode == 130 and f"stopped after {kept} of 400 completions; go on with --resume\n" in said
    assert "Traceback" not in said and not (out / ".lock").exists() and 0 < kept < 400
