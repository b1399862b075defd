"""Processes killed by ``kill -9``, and what they leave: shared by the tests of commands that can be resumed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("MLX_TRACES_KILLS", "5"))  # of a suite's run; more for a longer one


def start(*arguments, cwd=None, code="from mlx_traces.cli import main; main()"):
    """Start a command of mlx-traces, or other Python, in a process of its own; stderr goes to a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for a process and fail with its last words unless it ended well."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-2000:]


def kill_when(process, condition, later=0.0):
    """Kill a process ``later`` seconds after a condition holds; return False if it had ended well before."""
    deadline = time.time() + 300
    while not condition():
        assert time.time() < deadline, "nothing to kill it at"
        if process.poll() is not None:
            finish(process)
            return False
        time.sleep(0.001)
    time.sleep(later)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


def changes(folder):
    """Return a function of nothing that counts how often a folder's files were seen to have changed, from 0."""
    last, count = None, 0

    def seen():
        nonlocal last, count
        now = state(folder)
        count += last is not None and now != last
        last = now
        return count

    return seen


def state(folder):
    """Return names, sizes and times of all files below a folder, hidden ones too."""
    found = set()
    for path in Path(folder).rglob("*"):
        try:
            about = path.stat()
        except FileNotFoundError:  # renamed since it was listed
            continue
        found.add((str(path), about.st_size, about.st_mtime_ns))
    return found


def watched(command, out, cwd=None):
    """Run a command to its end; return how often its run folder was seen to have changed."""
    process, count = start(*command, "--out", out, cwd=cwd), changes(out)
    assert not kill_when(process, lambda: count() < 0)
    return count()


def kill_again_and_again(command, out, whole, seed, kills=KILLS, cwd=None):
    """Run a command that takes ``--out`` and ``--resume`` to its end, killed on the way at random moments.

    A moment is the n-th change of the run folder and up to 10 ms later, so that it lies in or between writes on a fast
    machine as on a slow one. A run that ends before its moment is followed by another one, in another folder.

    Args:
        command: words of the command, without those two.
        out: the run folders' name; a number stands behind it.
        whole: about how many changes an uninterrupted run makes.
        seed: of the moments.
        kills: how many.
        cwd: where the command runs.

    Returns:
        The folders of all runs, finished, and for each kill how many lines of metrics were there.
    """
    draw, runs, lines = random.Random(seed), [], []
    while len(lines) < kills:
        runs.append(folder := Path(f"{out}-{len(runs)}"))
        while True:
            resume = ("--resume",) if (folder / "run.json").exists() else ()
            if len(lines) == kills:
                finish(start(*command, "--out", folder, *resume, cwd=cwd))
                break
            process, count = start(*command, "--out", folder, *resume, cwd=cwd), changes(folder)
            moment, later = draw.randint(1, whole), draw.uniform(0, 0.01)
            if not kill_when(process, lambda count=count, moment=moment: count() >= moment, later):
                break
            metrics = folder / "metrics.jsonl"
            lines.append(metrics.read_text().count("\n") if metrics.exists() else 0)
    return runs, lines
