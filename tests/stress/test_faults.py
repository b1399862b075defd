"""Faults: kill -9, a disk that is full or read-only, files cut off or spoiled, a clock that goes back, two at once."""

import ast
import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from factories import Killed
from stress import killing

import mlx_traces
from mlx_traces.config import GenerateConfig, ScoreConfig, SFTConfig
from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.report import run_view, terminal
from mlx_traces.runtime import files, provenance
from mlx_traces.traces import generate, score
from mlx_traces.train import sft

ASKED = {"task": "countdown", "prompt": "thinking", "max_tokens": 12}
LONG = "MLX_TRACES_KILLS" in os.environ


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("name", killing.WORDS if LONG else ["generate"])
def test_kill_9_at_random_moments(name, tmp_path):
    found = killing.trial(killing.trials()[name], tmp_path, killing.KILLS)
    print(f"{name}: {found}")
    assert len(found.kills) == killing.KILLS and found.left <= {".lock"}


def test_what_the_comparison_would_find(tmp_path):
    """The harness's own eyes: each file that is not the uninterrupted run's is named, times are passed over."""
    whole, life = tmp_path / "whole", tmp_path / "life"
    for folder, seconds in ((whole, 1.0), (life, 2.0)):
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps({"correct": 3, "seconds": seconds, "peak_memory_gb": seconds}))
        (folder / "samples.jsonl").write_text(json.dumps({"id": "a", "elapsed": seconds, "logprobs": [-0.5]}) + "\n")
        (folder / "table.csv").write_text(f"model,tokens_per_second\na,{seconds}\n")
        (folder / "table.md").write_text(f"text\n\n| model | tokens/s |\n| :-- | --: |\n| a | {seconds} |\n")
        mx.save_safetensors(str(folder / "a.safetensors"), {"w": mx.full((2,), 1 + seconds * 1e-7)})
    assert 0 < killing.compare(whole, life) < 2e-7
    for name, old, new in (
        ("result.json", "3", "4"),
        ("samples.jsonl", '"a"', '"b"'),
        ("samples.jsonl", "-0.5", "-0.6"),
        ("samples.jsonl", "}\n", "}\n{}\n"),
        ("table.csv", "a,", "b,"),
        ("table.md", "| a", "| b"),
    ):
        content = (life / name).read_text()
        (life / name).write_text(content.replace(old, new))
        with pytest.raises(AssertionError, match=name):
            killing.compare(whole, life)
        (life / name).write_text(content)
    mx.save_safetensors(str(life / "a.safetensors"), {"w": mx.ones((2,)) + 1e-5})
    with pytest.raises(AssertionError, match="weights differ"):
        killing.compare(whole, life)
    (life / "more").touch()
    with pytest.raises(AssertionError, match="more"):
        killing.compare(whole, life)


# ---------------------------------------------------------------------------------- small runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    sums = [(f"{a}+{b}", str(a + b)) for a in range(3) for b in range(4)]
    rows = [{"id": asked, "messages": [{"role": "user", "content": asked}], "completion": told} for asked, told in sums]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def recipes(data, tiny_folder, monkeypatch):
    """One function for each kind of writer, of a folder and whether to resume."""
    loaded, load = {}, loading.load

    def once(name, *args, **kwargs):
        if name not in loaded:
            loaded[name] = load(name, *args, **kwargs)
        return loaded[name]

    training = {"model": str(tiny_folder), "data": str(data), "rank": 2, "batch_size": 3, "micro_tokens": 200}
    training |= {"valid_share": 0.2, "eval_every": 2, "save_every": 1, "device": "cpu", "learning_rate": 1e-2}
    asked = {**ASKED, "model": str(tiny_folder), "limit": 3, "device": "cpu", "rows": 2}

    made = {
        "sft": lambda resume: sft.train(SFTConfig(**training), "run", resume),
        "eval": lambda resume: mlx_traces.evaluate(out="run", resume=resume, **asked),
        "generate": lambda resume: generate.generate(GenerateConfig(**asked), "own.jsonl", resume),
        "score": lambda resume: score.score_file(data, Path("scored.jsonl"), ScoreConfig()),
    }

    def within(name, folder, resume):
        folder.mkdir(exist_ok=True)
        with contextlib.chdir(folder), monkeypatch.context() as patch:
            if name != "sft":  # the others do not change the model
                patch.setattr(loading, "load", once)
            made[name](resume)

    return {name: partial(within, name) for name in made}


class Disk:
    """Stands for a disk: notes each kind of write to each file, and fails at the one that is ``wanted``."""

    def __init__(self, monkeypatch, number):
        self.seen, self.wanted, self.number = [], None, number
        self.patch(monkeypatch, Path, "write_text", lambda path, *_: path.name)
        self.patch(monkeypatch, Path, "replace", lambda _, path: path.name)
        self.patch(monkeypatch, files, "sync", lambda path: path.name)
        self.patch(monkeypatch, mx, "save_safetensors", lambda path, *_: Path(path).name, RuntimeError)
        whole = Path.open

        def opened(path, mode="r", *args, **kwargs):
            if mode in ("a", "w", "r+b") and not str(path).startswith(os.devnull):
                self.at("open", path.name)
            return whole(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", opened)

    def patch(self, monkeypatch, owner, name, file, kind=OSError):
        whole = getattr(owner, name)

        def called(*args, **kwargs):
            self.at(name, file(*args), kind)
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    def at(self, name, file, kind=OSError):
        moment = (name, file.partition("tmp-")[2] if ".tmp-" in file else file)
        if moment == self.wanted:
            raise kind(self.number, os.strerror(self.number)) if kind is OSError else kind("[write] Unable to write 9")
        if moment not in self.seen:
            self.seen.append(moment)


@pytest.mark.parametrize("name", ["sft", "eval", "generate", "score"])
def test_a_full_disk_at_every_kind_of_write(name, recipes, tmp_path, monkeypatch):
    disk = Disk(monkeypatch, errno.ENOSPC)
    recipes[name](tmp_path / "whole", False)
    moments, disk.seen = list(disk.seen), []
    assert len(moments) >= 5
    if name in ("sft", "generate") and not LONG:  # one kind of write for each file, another for the next
        files = [[moment for moment in moments if moment[1] == file] for file in dict.fromkeys(m[1] for m in moments)]
        moments = [kinds[place % len(kinds)] for place, kinds in enumerate(files)]
    for place, moment in enumerate(moments):
        folder = tmp_path / str(place)
        disk.wanted = moment
        with pytest.raises(UserError) as caught:
            recipes[name](folder, False)
        said = str(caught.value)
        file, what, way_out = said.partition(": cannot be written (")
        assert what and "\n" not in said and file.startswith(("run", "own.jsonl", ".own.part", "scored.jsonl")), said
        assert moment[1] in file if "--resume" in way_out else way_out.endswith("; choose another --out"), said
        left = [path for path in folder.rglob("*") if ".tmp-" in path.name or path.name.endswith(".lock")]
        assert not left, f"{moment}: {left}"
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        disk.wanted = None
        recipes[name](folder, True)
        assert killing.compare(tmp_path / "whole", folder) == 0, moment


MOUNT = """
import os, subprocess, sys
from pathlib import Path
from click.testing import CliRunner
from mlx_traces.cli import main

disk, out = Path(sys.argv[1]), Path(sys.argv[1]) / "run"
def mount(*words):
    if subprocess.run(["mount", *words, disk]).returncode:
        sys.exit(77)
def call(*more):
    words = ["eval", "--task", "countdown", "--limit", "6", "--rows", "2", "--max-tokens", "12", "--out", str(out)]
    done = CliRunner().invoke(main, [*words, *more])
    return done.exit_code, (done.stderr.strip().splitlines() or [""])[-1], done.exception
def filled(kib):
    (disk / "filler").unlink(missing_ok=True)
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            os.ftruncate(file.fileno(), max(0, file.tell() - 1024 * kib) // 4096 * 4096)
mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
seen = []
for kib in (4, 12, 16, 20, 24, 28):  # pages of 4 KiB: for the folder's lock, run.json, some samples, the rest
    filled(kib)
    code, said, error = call("--resume")
    assert (code, type(error)) in ((1, SystemExit), (0, type(None))), (kib, code, said, error)
    assert code == 0 or "No space left on device" in said and said.startswith(f"Error: {out}"), said
    assert not list(disk.rglob("*.tmp-*")) and not list(disk.rglob(".lock"))
    seen.append(code and said.partition(" (")[0].removeprefix(f"Error: {out}"))
print(seen)
assert len(set(seen)) >= 3, seen
(disk / "filler").unlink()
assert call("--resume")[0] == 0
assert call("--out", sys.argv[2])[0] == 0
mount("-o", "remount,ro")
before = sorted(path.name for path in out.iterdir())
for place in (out, disk / "new"):
    code, said, error = call("--resume", "--out", str(place))
    assert code == 1 and isinstance(error, SystemExit), (said, error)
    assert said == f"Error: {place}: cannot be written (Read-only file system); choose another --out", said
assert sorted(path.name for path in out.iterdir()) == before
subprocess.run(["cp", "-r", out, sys.argv[3]], check=True)
"""


@pytest.mark.skipif(not shutil.which("unshare") or sys.platform != "linux", reason="no mounts of one's own")
def test_a_disk_that_is_really_full_or_read_only(tmp_path):
    """In a small file system of the test's own, where the system lets it mount one."""
    disk, whole, kept = (tmp_path / name for name in ("disk", "whole/run", "kept/run"))
    for folder in (disk, whole.parent, kept.parent):
        folder.mkdir(parents=True)
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    words = [*unshare, sys.executable, "-c", MOUNT, disk, whole, kept]
    environment = {**os.environ, "PYTHONPATH": str(killing.ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("mounting is not permitted here")
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in (whole, kept):
        (folder / "run.json").unlink()  # names of the folders are no matter
    assert killing.compare(whole, kept) == 0


def test_nothing_is_written_to_a_full_pipe(data):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    rows = [{"completion": "<answer>1+2</answer>", "nums": [1, 2], "target": 3}] * 9
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "from mlx_traces.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-c", code, "grade", "--task", "countdown", "rows.jsonl"]
        environment = {**os.environ, "PYTHONPATH": str(killing.ROOT)}
        done = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    told = "Error: the output cannot be written (No space left on device); make room, then repeat the command\n"
    assert done.returncode == 1 and done.stderr.endswith(told) and "Traceback" not in done.stderr, done.stderr


# ---------------------------------------------------------------------------------- files cut off or spoiled


def cut_off(recipe, folder, monkeypatch):
    """Run until the second checkpoint is there, and what was logged after it."""
    from mlx_traces.train import checkpoints

    whole, count = checkpoints.save, []

    def save(*args):
        count.append(1)
        if len(count) == 3:
            raise Killed
        whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        with pytest.raises(Killed):
            recipe(folder, False)


def test_lines_that_are_cut_off_and_lines_of_steps_that_are_made_again(recipes, tmp_path, monkeypatch):
    """The first step after the checkpoint was logged, by metrics and samples alike, and the next line half."""
    recipes["sft"](tmp_path / "whole", False)
    cut_off(recipes["sft"], tmp_path / "cut", monkeypatch)
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = tmp_path / "cut" / "run" / name
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        with file.open("a") as lines:
            lines.write(json.dumps({**rows[-1], "step": 3}) + "\n" + '{"step": 4, "los')
    recipes["sft"](tmp_path / "cut", True)
    assert killing.compare(tmp_path / "whole", tmp_path / "cut") == 0


def test_a_spoiled_checkpoint(recipes, tmp_path, monkeypatch):
    recipes["sft"](tmp_path / "whole", False)
    cut_off(recipes["sft"], tmp_path / "cut", monkeypatch)
    file = tmp_path / "cut" / "run" / "checkpoint.safetensors"
    content = file.read_bytes()
    garbage = [content[: len(content) // 2], content[:-1], content[:7], b"", bytes(len(content)), os.urandom(500)]
    mx.save_safetensors(str(file), {"weights.x": mx.zeros((2,))}, {"state": "{}"})
    garbage += [file.read_bytes()]
    mx.save_safetensors(str(file), {"weights.x": mx.zeros((2,))})
    for spoiled in (*garbage, file.read_bytes()):
        file.write_bytes(spoiled)
        before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
        with pytest.raises(UserError) as caught:
            recipes["sft"](tmp_path / "cut", True)
        told = "its weights are not those" if spoiled is garbage[-1] else "not a checkpoint ("
        assert str(caught.value).startswith(f"run/{file.name}: {told}") and "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()} == before
    file.unlink()  # as the message says
    recipes["sft"](tmp_path / "cut", True)
    assert killing.compare(tmp_path / "whole", tmp_path / "cut") == 0


def test_a_writer_killed_between_a_file_and_its_manifest(data, tmp_path, monkeypatch):
    """The manifest is put in its place, by its hash of the file; nobody else's file gets it."""
    out, about = tmp_path / "scored.jsonl", tmp_path / "scored.manifest.json"
    score.score_file(data, out, ScoreConfig())
    left = tmp_path / f".999999999-{files.machine()}.tmp-{about.name}"
    content, lines = about.read_bytes(), out.read_bytes()
    about.rename(left)
    out.write_bytes(lines + b"\n")
    with pytest.raises(UserError, match=f"{out} exists; remove it"):
        score.score_file(data, out, ScoreConfig())
    assert left.exists() and not about.exists()
    out.write_bytes(lines)
    with pytest.raises(UserError, match=f"{out} exists; remove it"):
        score.score_file(data, out, ScoreConfig())
    assert about.read_bytes() == content and not left.exists()


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path):
    node, file = files.machine(), tmp_path / "result.json"
    gone = tmp_path / f".999999999-{node}.tmp-result.json"
    others = [f".{os.getppid()}-{node}.tmp-result.json", ".999999999-elsewhere.tmp-result.json", ".tmp-result.json"]
    others += [f".999999999-{node}.tmp-other.json", f".x-{node}.tmp-result.json"]
    for path in (gone, *(tmp_path / name for name in others)):
        path.touch()
    files.write_atomic(file, "{}")
    assert not gone.exists() and sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, file.name])


# ---------------------------------------------------------------------------------- the clock, and two at once


def test_a_clock_that_goes_back(recipes, tmp_path, monkeypatch):
    recipes["sft"](tmp_path / "whole", False)
    monkeypatch.setattr(provenance, "now", lambda: "2020-01-01T00:00:00+00:00")
    cut_off(recipes["sft"], tmp_path / "cut", monkeypatch)
    out = tmp_path / "cut" / "run"
    (out / ".lock").write_text(json.dumps({"pid": 1, "host": files.machine(), "since": "2099-01-01T00:00:00"}))
    for path in out.iterdir():
        os.utime(path, (4e9, 4e9))  # files of the future
    monkeypatch.setattr(provenance, "now", lambda: "1970-01-01T00:00:00+00:00")
    record = run_view.read(out)
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal.display(record, 80, 1e9))
    assert "nothing new" not in console.export_text()
    recipes["sft"](tmp_path / "cut", True)
    assert killing.compare(tmp_path / "whole", tmp_path / "cut") == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    spent = [row["time/total"] for row in rows if "time/total" in row]
    assert spent == sorted(spent) and spent[0] > 0


def test_no_duration_is_taken_from_the_calendar_and_no_order_from_file_times():
    """Only the display of a run that goes on looks at the clock beside a file's; `provenance.now` makes stamps."""
    found = set()
    for path in (killing.ROOT / "mlx_traces").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                name = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else node.attr
                if name in ("time.time", "datetime.now") or node.attr in ("st_mtime", "st_ctime", "getmtime", "utcnow"):
                    found.add((path.stem, node.attr))
    assert found == {("report", "time"), ("terminal", "st_mtime"), ("provenance", "now")}


def test_two_scorers_of_one_file(data, tmp_path):
    out = tmp_path / "new" / "scored.jsonl"
    with files.held(tmp_path / "new" / ".scored.lock"):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
            score.score_file(data, out, ScoreConfig())
        assert not out.exists()
    score.score_file(data, out, ScoreConfig())
    assert sorted(path.name for path in out.parent.iterdir()) == ["scored.jsonl", "scored.manifest.json"]


def test_a_finished_file_of_completions_stays(recipes, tmp_path):
    recipes["generate"](tmp_path / "run", False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    recipes["generate"](tmp_path / "run", True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before and len(before) == 2
    with pytest.raises(UserError, match="exists; remove it"):
        recipes["generate"](tmp_path / "run", False)
