"""Run every bench of this machine and write one file, to send or to compare; ``mlx-traces bench all``.

Each step is a process of its own with a time limit, so one that hangs or runs out of memory does not stop the others.
The file is written after each step. The most important steps come first.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_traces.diagnostics.bench_file import BenchFile, Condition, Machine, Step
from mlx_traces.diagnostics.bench_ranks import COMMAND, usable_cores
from mlx_traces.models.names import NANO
from mlx_traces.runtime import device
from mlx_traces.runtime.provenance import provenance
from mlx_traces.text import clean
from mlx_traces.train.model_card import last_parts

GSM8K = "eval --task gsm8k --limit 100 --json"
COUNTDOWN = "eval --task countdown --limit 100 --json"
PEER = "--repeats 0 --against mlx-lm-lora"
REAL = "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
MINUTES = 20
PATIENCE = 0.05  # seconds between two checks whether a step has ended
GRACE = 5  # seconds between the interrupt of a step at its limit and its kill
LITTLE_SWAP = 0.2  # GB that swap may grow by without a note
MOST_SAID = 2000  # characters that are kept of a tool's output
# Tools that report heat, power saving and swap; powermetrics needs root.
TOOLS = (
    ("pmset", "-g"),
    ("pmset", "-g", "therm"),
    ("pmset", "-g", "batt"),
    ("sysctl", "vm.swapusage"),
    ("powermetrics", "-n", "1", "-i", "200", "--samplers", "cpu_power,gpu_power,thermal"),
    (
        "nvidia-smi",
        "--query-gpu=name,driver_version,temperature.gpu,power.draw,power.limit,clocks.sm,memory.used,memory.total",
        "--format=csv",
    ),
)


@dataclass(frozen=True)
class Planned:
    """A step to run: its name, its kind, the arguments of ``mlx-traces``, its limit in seconds.

    ``unless`` names another step; if that is done, this one is left out.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    limit: float
    unless: str | None = None


def plan(model: str, backend: str, quick: bool, data: str | None = None) -> list[Planned]:
    """Return the steps, the most important first.

    Args:
        model: as for ``loading.load``.
        backend: ``"metal"``, ``"cuda"`` or ``"cpu"``; a CPU decodes with dense weights only, as 4 bits are slow there.
        quick: fewer and shorter steps, for a first look.
        data: a file of GSM8K-like problems.
    """
    kinds = {"quantized": ("--weights", "quantized"), "dense": ("--weights", "dense", "--dtype", "bfloat16")}
    kinds = {"dense": ("--weights", "dense")} if backend == "cpu" else kinds
    prompts, group, longest, tokens = (4, 8, 32, 32) if quick else (8, 16, 128, 64)
    grpo = f"bench grpo --prompts {prompts} --group-size {group} --max-tokens {longest} --every-row --json"
    sft = f"bench sft --count {16 if quick else 64} --repeats 1 --against mlx-lm --json"
    ring = "bench generate --rows 8 --count 16 --max-tokens 16 --repeats 1 --ranks 2 --json"

    def step(name: str, kind: str, command: str, limit: float, *more: str, unless: str | None = None) -> Planned:
        return Planned(name, kind, (*command.split(), "--model", model, *more), limit, unless)

    def generate(*sizes: int) -> list[Planned]:
        command = f"bench generate --max-tokens {tokens} --repeats 1 --against mlx-lm --json"
        names = {rows: f"{rows} row{'s' if rows > 1 else ''}" for rows in sizes}
        return [
            step(f"{names[rows]}, {weights}", "generate", f"{command} --rows {rows} --count {max(4, rows)}", 120, *own)
            for rows in sizes
            for weights, own in kinds.items()
        ]

    return [
        Planned("doctor", "doctor", ("doctor", "--json"), 90),
        *generate(32),
        step("grpo", "grpo", f"{grpo} --repeats 1", 180),
        *([] if model == NANO else [step("gsm8k", "eval", GSM8K, 180, *(("--data", data) if data else ()))]),
        step("countdown", "eval", COUNTDOWN, 120, unless="gsm8k"),
        step("sft", "sft", sft, 120),
        *generate(*((1,) if quick else (1, 256, 128, 8))),
        Planned("ring", "ring", tuple(ring.split()), 60),
        step("graph", "graph", "bench graph --json", 60),
        *([] if quick or not find_spec("mlx_lm_lora") else [step("grpo, mlx-lm-lora", "grpo", f"{grpo} {PEER}", 300)]),
    ]


def bench_all(
    out: Path,
    model: str | None = None,
    quick: bool = False,
    data: str | None = None,
    minutes: float = MINUTES,
    progress: Callable[[str], None] = lambda line: None,
) -> BenchFile:
    """Run the steps, write the file after each, and return its content.

    Args:
        out: the JSON file; it is replaced.
        model: default: a 4-bit Qwen2.5 of 0.5B, and nano on a CPU or for a quick look.
        quick: fewer and shorter steps.
        data: a file of GSM8K-like problems; default: the hub's, or Countdown if that is out of reach.
        minutes: limit for all steps together; those that do not fit are skipped.
        progress: called with a line before and after each step.

    Raises:
        UserError: if the file cannot be written, or MLX does not run here.
    """
    backend, began = device.choose(), time.monotonic()
    model = model or (NANO if quick or backend.name == "cpu" else REAL)
    made, before = provenance(), condition()
    name = backend.description.split(")")[0] + ")"
    file = BenchFile(
        machine=Machine(
            device=name,
            backend=backend.name,
            memory_gb=backend.memory_gb,
            cores=usable_cores(),
            platform=made["platform"],
        ),
        model=last_parts(model),  # others read the file
        quick=quick,
        started=made["started"],
        versions=made["versions"],
        git_revision=made["git_revision"],
        before=before,
        notes=warnings(before, usable_cores()),
        steps=[],
    )
    file.write(out)
    for note in file.notes:
        progress(note)
    for step in plan(model, backend.name, quick, data):
        done = {one.name for one in file.steps if one.status == "done"}
        if step.unless in done:
            continue
        left = 60 * minutes - (time.monotonic() - began)
        progress(f"{step.name} (at most {min(step.limit, max(left, 0)):.0f} s)")
        ended = run(step, min(step.limit, left))
        progress(f"{step.name}: {ended.status} in {ended.seconds:.0f} s{f', {ended.message}' if ended.message else ''}")
        file = file.model_copy(update={"steps": [*file.steps, ended], "after": condition()})
        file.write(out)
    if file.after and (file.after.swap_gb or 0) > (before.swap_gb or 0) + LITTLE_SWAP:
        grown = f"swap grew from {before.swap_gb or 0:.1f} to {file.after.swap_gb:.1f} GB: memory was short"
        file = file.model_copy(update={"notes": [*file.notes, grown]})
        file.write(out)
    return file


def run(planned: Planned, limit: float) -> Step:
    """Run a step in a process of its own for at most ``limit`` seconds; a failure is returned, not raised."""
    about = {"name": planned.name, "kind": planned.kind, "arguments": [*map(last_parts, planned.arguments)]}
    if limit < 1:
        return Step(**about, status="skipped", message="no time was left")
    began, peak, cut = time.monotonic(), None, False
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", COMMAND, *planned.arguments]
    with tempfile.TemporaryDirectory() as scratch:
        out, err = (Path(scratch) / end for end in ("out", "err"))
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # so that the processes that it starts can be ended with it
            )
        try:
            for how, end in ((signal.SIGINT, limit), (signal.SIGKILL, limit + GRACE), (None, float("inf"))):
                peak = _wait(process, began + end)
                if process.returncode is not None or how is None:
                    break
                cut = True
                _signal(process, how)
        finally:
            _signal(process, signal.SIGKILL)
        about |= {"seconds": round(time.monotonic() - began, 2), "memory_gb": peak}
        said = err.read_text(errors="replace").strip().splitlines()
        message = clean(said[-1])[:300] if said else ""
        if cut:
            return Step(**about, status="cut", message=f"after {limit:.0f} s")
        try:
            return Step(**about, status="done", rows=_rows(out.read_text(errors="replace")))
        except (ValueError, ValidationError):
            return Step(**about, status="failed", message=message or f"ended with {process.returncode}")


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and to those that it started, if they still run."""
    with suppress(ProcessLookupError, PermissionError):  # macOS denies permission if all have ended
        os.killpg(process.pid, number)


def _wait(process: subprocess.Popen, until: float) -> float | None:
    """Wait for a process until a time; return its peak memory in 1e9 bytes, None if it has not ended."""
    while time.monotonic() < until:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        time.sleep(PATIENCE)
    return None


def _rows(text: str) -> list[dict[str, Any]]:
    """Return the rows in the JSON that a command printed; ValueError if it is not JSON or has none.

    Paths of this machine in the words of `doctor` are cut to their last parts, as others read the file.
    """
    found = json.loads(text)
    if isinstance(found, dict):
        found = found.get("rows", [found])
    if not isinstance(found, list):
        raise ValueError("no rows")
    for row in found:
        if isinstance(row, dict) and isinstance(value := row.get("value"), str):
            row["value"] = " ".join(map(last_parts, value.split(" ")))
    return found


def condition() -> Condition:
    """Return the state of the machine from its own tools; missing tools are left out."""
    said, english = {}, {**os.environ, "LC_ALL": "C"}  # with decimal points
    for command in TOOLS:
        if not shutil.which(command[0]) or (command[0] == "powermetrics" and os.geteuid()):
            continue
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, env=english)
            said[" ".join(command)] = done.stdout[:MOST_SAID]
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        said["/proc/meminfo"] = "\n".join(line for line in lines if line.startswith(("MemTotal", "MemAvail", "Swap")))
    return Condition(load=os.getloadavg()[0], swap_gb=swap_gb(said), low_power=low_power(said), said=said)


def swap_gb(said: dict[str, str]) -> float | None:
    """Return the swap in use, in 1e9 bytes; None if no tool reports it."""
    words = said.get("sysctl vm.swapusage", "").replace("=", " ").split()
    if "used" in words[:-1]:
        with suppress(ValueError):
            return float(words[words.index("used") + 1].rstrip("M")) * 2**20 / 1e9
    sizes = dict(line.split(":", 1) for line in said.get("/proc/meminfo", "").splitlines() if ":" in line)
    if {"SwapTotal", "SwapFree"} <= sizes.keys():
        total, free = (int(sizes[name].split()[0]) for name in ("SwapTotal", "SwapFree"))
        return (total - free) * 1024 / 1e9
    return None


def low_power(said: dict[str, str]) -> bool | None:
    """Whether a Mac is in low-power mode; None if no tool reports it."""
    for line in said.get("pmset -g", "").splitlines():
        if line.split()[:1] in (["lowpowermode"], ["powermode"]):  # the second on newer systems; 2 is high power
            return line.split()[1:] == ["1"]
    return None


def warnings(before: Condition, cores: int) -> list[str]:
    """Return notes on conditions that make a machine slower."""
    found = []
    if before.low_power:
        found.append("low-power mode is on: switch it off in the settings of the battery, and repeat")
    if "Battery Power" in before.said.get("pmset -g batt", ""):
        found.append("on battery: plug it in, and repeat")
    if before.load is not None and before.load > 0.5 * cores:
        found.append(f"busy: a load of {before.load:.1f} on {cores} cores before the first step")
    return found
