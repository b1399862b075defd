"""Processes killed by ``kill -9``, and what they leave: shared by the tests of commands that can be resumed.

``python -m tests.stress.killing --kills 20`` kills each long command on the embedded model 20 times at random moments,
goes on with it each time, and compares what it ends with to an uninterrupted run; ``... --kills 20 sft grpo`` those two
alone, ``... --kills 20 -- COMMAND ... --out run`` any other (its inputs by full paths, its outputs by relative ones).
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MLX_TRACES_KILLS", "1"))  # of a suite's run; more for a longer one
POLL = 0.005  # seconds between two looks at a folder
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"mlx_traces.{name}" for name in ("cli", "evaluation.run", "traces.generate", "train.sft", "rl.grpo", "rl.ppo")]
)


class Started:
    """A process forked from one that has imported what takes seconds, with `subprocess.Popen`'s names.

    It runs Python code with arguments, in a folder and an environment; stderr goes to a file.
    """

    def __init__(self, code: str, arguments: Sequence[str], cwd: Path, environment: dict[str, str]):
        self.said = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - gone with this object
        self.process = FORKS.Process(target=_run, args=(code, arguments, cwd, self.said.name, environment))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for the end, at most ``timeout`` seconds; return what was said on stderr."""
        self.process.join(timeout)
        assert self.poll() is not None, f"process {self.pid} has not ended after {timeout} s"
        self.said.seek(0)
        return None, self.said.read()


def _run(code: str, arguments: Sequence[str], cwd: Path, said: str, environment: dict[str, str]) -> None:
    for number, file in ((0, os.devnull), (1, os.devnull), (2, said)):
        os.dup2(os.open(file, os.O_RDWR), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    sys.path.insert(0, "")
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def start(*arguments, cwd=None, code="from mlx_traces.cli import main; main()", **environment):
    """Start a command of mlx-traces, or other Python, in a process of its own, with further variables."""
    return Started(code, list(map(str, arguments)), Path(cwd or Path.cwd()), {**os.environ, **environment})


def finish(process):
    """Wait for a process and fail with its last words unless it ended well."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-2000:]


def kill_when(process, condition, later=0.0):
    """Kill a process ``later`` seconds after a condition holds; return False if it had ended well before."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing to kill it at"
        if process.poll() is not None:
            finish(process)
            return False
        time.sleep(POLL)
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


# ---------------------------------------------------------------------------------- any command, and all it writes


@dataclass(frozen=True)
class Trial:
    """A command that is killed: its words, run in a folder that holds ``files``; ``resume`` is how it goes on."""

    words: tuple[str, ...]
    resume: tuple[str, ...] = ("--resume",)
    files: dict[str, str] = field(default_factory=dict)  # by name


@dataclass
class Outcome:
    """What became of a trial: kills with the changes seen before each, lives, the greatest difference of weights."""

    changes: int = 0
    seconds: float = 0.0
    kills: list[int] = field(default_factory=list)
    lives: int = 0
    difference: float = 0.0
    left: set[str] = field(default_factory=set)  # hidden files of finished lives

    def __str__(self) -> str:
        said = f"{len(self.kills)} kills in {self.lives} lives of {self.changes} changes and {self.seconds:.1f} s"
        said += f"; after {self.kills} changes; weights within {self.difference:.1g}"
        return said + (f"; left: {', '.join(sorted(self.left))}" if self.left else "")


def trial(one: Trial, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Run a command to its end once; then kill it at random moments and go on, and compare what it ends with.

    Three in four moments are the n-th change of the folder and up to 10 ms later, as in `kill_again_and_again`; the
    others a time since the start, so that loading is hit too. A life that ends before its moment is followed by the
    next. A command that is repeated without ``--resume`` may say that its file exists: then it was finished.

    Raises:
        AssertionError: if a life does not end well, or does not end as the uninterrupted run did.
    """
    found, draw = Outcome(), random.Random(seed)
    whole = _made(one, folder / "whole")
    began, process, count = time.monotonic(), start(*one.words, cwd=whole), changes(whole)
    assert not kill_when(process, lambda: count() < 0)
    found.changes, found.seconds = count(), time.monotonic() - began
    while len(found.kills) < kills:
        life, again = _made(one, folder / f"life-{found.lives}"), ()
        while True:
            process, count, began = start(*one.words, *again, cwd=life), changes(life), time.monotonic()
            moment, later = draw.randint(1, found.changes), draw.uniform(0, 0.01)
            at = draw.uniform(0, found.seconds) if draw.random() < 0.25 else float("inf")
            last = len(found.kills) == kills

            def reached(count=count, moment=moment, began=began, at=at):
                return time.monotonic() - began > at or (count() >= moment and at == float("inf"))

            try:
                if last:
                    finish(process)
                if last or not kill_when(process, reached, later):
                    break
            except AssertionError as error:
                if again == () and found.kills and not one.resume and "exists; remove it" in str(error):
                    break
                raise
            found.kills.append(count())
            again = one.resume
        found.lives += 1
        found.difference = max(found.difference, compare(whole, life))
        found.left |= {path.name for path in life.rglob(".*")}
        shutil.rmtree(life)
    return found


def _made(one: Trial, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in one.files.items():
        (folder / name).write_text(content)
    return folder


def compare(whole: Path, life: Path) -> float:
    """Return the greatest difference of two folders' weights; fail if anything else differs that no clock made.

    Log-probabilities, and scores made of them, may differ by a unit of the last of their five digits: how rows are
    batched after a kill rounds them otherwise. The hashes of files that hold them are then others too.
    """
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
        for folder in (whole, life)
    ]
    assert names[0] == names[1], set(names[0]) ^ set(names[1])
    return max((_apart(content(whole / name), content(life / name), name) for name in names[0]), default=0.0)


def _apart(one: Any, other: Any, where: str) -> float:
    """Return the greatest difference of arrays within two values; fail where they differ otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), f"{where}: {sorted(one.keys() ^ other.keys())}"
        return max((_apart(one[key], other[key], f"{where} {key}") for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other), f"{where}: {len(one)} entries, and {len(other)}"
        pairs = enumerate(zip(one, other, strict=True), 1)
        return max((_apart(*pair, f"{where}:{at}") for at, pair in pairs), default=0.0)
    if hasattr(one, "shape"):
        apart = float(abs(one - other).max(initial=0))
        assert apart <= 1e-6, f"{where}: weights differ by {apart}"
        return apart
    near = " logprobs:" in where or where.endswith((" perplexity", " score"))
    same = (
        one == other
        or (near and abs(one - other) < 2.5e-5)
        or where.endswith((" sha256", " source_sha256", " data_files"))
    )
    assert same, f"{where}: {str(one)[:200]!r} is not {str(other)[:200]!r}"
    return 0.0


def content(path: Path) -> Any:
    """Return what a file holds, without what a clock made: of JSON the values, of weights the arrays and the state."""
    if path.suffix == ".safetensors":
        import mlx.core as mx
        import numpy as np

        arrays, metadata = mx.load(str(path), return_metadata=True)
        told = timeless(json.loads(metadata["state"])) if "state" in metadata else None
        return {"state": told, **{name: np.array(array, np.float64) for name, array in arrays.items()}}
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return [timeless(row) for row in csv.DictReader(path.read_text().splitlines())]
    if path.suffix == ".md":
        return _without_speed(path.read_text())
    return None if path.suffix == ".html" else path.read_bytes()  # a page shows times


def _without_speed(text: str) -> list[list[str]]:
    """Return a Markdown text's lines as cells, those of a column of tokens/s left out."""
    lines, at = [], None
    for line in text.splitlines():
        cells = line.split("|")
        if len(cells) < 2:
            at = None
        elif at is None:
            at = next((i for i, cell in enumerate(cells) if cell.strip() == "tokens/s"), -1)
        lines.append([cell for i, cell in enumerate(cells) if i != at])
    return lines


def timeless(value: Any) -> Any:
    """Return a JSON value without times, memory, and the command's own words."""
    if isinstance(value, list):
        return [timeless(one) for one in value]
    if not isinstance(value, dict):
        return value
    clock = ("time", "memory", "seconds", "tokens_per_second", "elapsed", "peak_memory", "started", "command")
    return {
        key: timeless(one) for key, one in value.items() if not key.startswith(clock) and not key.endswith("seconds")
    }


ASKED = {"task": "countdown", "prompt": "thinking", "max_tokens": 32, "rows": 4}
HELD_OUT = {"evaluate": {**ASKED, "limit": 4}, "eval_every": 2}
STEPS = {"num_steps": 4, "prompts_per_step": 2, "group_size": 4, "micro_tokens": 512, "save_every": 1}
REINFORCE = {**ASKED, **STEPS, **HELD_OUT, "rewards": {"length": 1}, "learning_rate": 1e-3}
TRAIN = {"rank": 4, "learning_rate": 1e-3, "batch_size": 4}
ROUNDS = {
    "name": "try",
    "raw": {"count": 16},
    "epoch1": {**TRAIN, "save_every": 1},
    "generate": {"limit": 6, "samples": 4, "temperature": 0.7, "max_tokens": 48, "rows": 4},
    "filter": {"correct_only": False, "finished": False, "per_problem": 2},
    "epoch2": {"learning_rate": 1e-3, "batch_size": 4, "valid_share": 0, "save_every": 1},
    "round3": {"grpo": {**STEPS, "num_steps": 2, "max_tokens": 32, "rows": 8, "rewards": {"length": 1}}},
    "compare": {"limit": 4, "max_tokens": 32, "rows": 4},
}
ASK = ("--task", "countdown", "--prompt", "thinking", "--rows", "4", "--max-tokens", "32")
WORDS = {
    "eval": (*ASK, "--limit", "40", "--out", "run"),
    "generate": (*ASK, "--limit", "5", "--samples", "4", "--temperature", "1", "--out", "own.jsonl"),
    "score": ("data.jsonl", "--model", "nano", "--out", "scored.jsonl"),
    **{name: ("settings.yaml", "--out", "run") for name in ("sft", "grpo", "ppo")},
    "rounds": ("settings.yaml",),
}
SETTINGS = {
    "sft": {**TRAIN, **HELD_OUT, "data": "data.jsonl", "epochs": 2, "save_every": 1},
    "grpo": {**REINFORCE, "advantage": "none"},
    "ppo": {**REINFORCE, "epochs": 1, "minibatches": 2},
    "rounds": ROUNDS,
}


def trials() -> dict[str, Trial]:
    """Return each long command on the embedded model, at settings that take it seconds."""
    from mlx_traces.tasks import countdown
    from mlx_traces.traces import solutions

    made = solutions.countdown_traces(24, "train", 3, prompts=[countdown.TASK.prompt("thinking")])
    data = "".join(
        json.dumps({"id": one.id, "messages": one.messages, "completion": one.completion, **one.to_row()}) + "\n"
        for one in made
    )
    return {
        name: Trial(
            (name, *words),
            () if name in ("score", "rounds") else ("--resume",),
            {
                **({"settings.yaml": json.dumps(SETTINGS[name])} if name in SETTINGS else {}),  # JSON is YAML
                **({"data.jsonl": data} if name in ("sft", "score") else {}),
            },
        )
        for name, words in WORDS.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill the commands that are named, and print what became of each."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(prog="python -m tests.stress.killing", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"{', '.join(WORDS)}; default: all.")
    parser.add_argument("--kills", type=int, default=KILLS, help="Of each command.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--no-resume", action="store_true", help="The command after -- is repeated as it is.")
    given = parser.parse_args(arguments[: arguments.index("--")] if own else arguments)
    wanted = {own[0]: Trial(tuple(own), () if given.no_resume else ("--resume",))} if own else trials()
    for name in wanted if own else given.names or wanted:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {trial(wanted[name], Path(folder), given.kills, given.seed)}", flush=True)


if __name__ == "__main__":
    main()
