"""How much faster several processes on this machine are: a bench by one process, then by ranks that share the work.

The ranks are started here over the loopback interface (MLX's ring, by ``MLX_RANK`` and ``MLX_HOSTFILE``), as
``mlx.launch`` starts them. ``mlx.launch`` itself keeps a core busy, which would change the figures. The two benches run
one after the other. On a CPU each process chooses its BLAS threads as always (`blas.threads_for`): a small model takes
one, a large one all C cores that this process may use, or C / N as one of N ranks. ``OPENBLAS_NUM_THREADS`` in the
environment wins over that, for both. Ranks on one GPU share it.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.runtime import blas
from mlx_traces.text import clean

COMMAND = "from mlx_traces.cli import main; main()"
PATIENCE = 0.05  # seconds between two checks whether the ranks have ended


@dataclass(frozen=True)
class Scaling:
    """A line of a bench, measured with one process (``one``) and with several (``several``), as in the bench's JSON.

    ``seconds`` are those of the same work: a whole run of generation, an epoch of fine-tuning, a step of reinforcement
    learning. ``ratio`` is the seconds of one process over those of the ranks: above 1 the ranks are faster. ``threads``
    are the most BLAS threads of one process, and of each rank.
    """

    ranks: int
    threads: tuple[int, int]
    seconds: tuple[float, float]
    ratio: float
    one: dict[str, Any]
    several: dict[str, Any]


def scaling(
    arguments: Sequence[str], count: int, progress: Callable[[str], None]
) -> tuple[list[Scaling], dict[str, Any]]:
    """Run a bench by one process, then by ``count`` ranks; return a `Scaling` for each row, and the other entries.

    Args:
        arguments: of ``mlx-traces``, from ``bench`` on, without ``--json``.
        count: how many ranks.
        progress: is called with a line before each run.

    Raises:
        UserError: if a process fails, with the last line that it wrote.
    """
    if "MLX_RANK" in os.environ:
        raise UserError("--ranks starts its ranks itself; leave out mlx.launch, or --ranks")
    cores, found = usable_cores(), []
    for size in (1, count):
        threads = threads_of(size, cores)
        most = f"{'at most ' if threads > 1 else ''}{threads} BLAS thread{'s' if threads > 1 else ''}"
        progress(f"{size} process{'es' if size > 1 else ''}, {most} each")
        found.append((threads, _run_bench(arguments, size)))
    (alone, one), (each, several) = found
    lines = [
        Scaling(count, (alone, each), (a["seconds"], b["seconds"]), a["seconds"] / b["seconds"], a, b)
        for a, b in zip(one.pop("rows"), several["rows"], strict=True)
    ]
    return lines, one


def text_of(line: Scaling) -> str:
    """Return the line that the terminal shows."""
    rows = f"{line.one['rows']:>5} rows  " if "rows" in line.one else ""
    sizes = (
        f"{size} x {threads} threads {seconds:.3f} s {found['tokens_per_second']:.0f} tokens/s "
        f"{found['peak_memory_gb']:.2f} GB"
        for size, threads, seconds, found in zip(
            (1, line.ranks), line.threads, line.seconds, (line.one, line.several), strict=True
        )
    )
    return f"{rows}{'; '.join(sizes)} a rank: ratio {line.ratio:.2f}"


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of(processes: int, cores: int) -> int:
    """Return the most BLAS threads of each of several processes; a number in the environment (`blas.GIVEN`) wins."""
    given = (os.environ.get(name, "") for name in blas.GIVEN)
    return next((int(text) for text in given if text.isdecimal() and int(text)), max(1, cores // processes))


def _run_bench(arguments: Sequence[str], count: int) -> dict[str, Any]:
    """Run a bench by ``count`` ranks, or by a single process for 1; return the JSON that the first printed."""
    with tempfile.TemporaryDirectory() as scratch, ranks(arguments, count, Path(scratch)) as started:
        while any(process.poll() is None for process in started):
            if any(process.returncode for process in started):
                break  # the others would wait for the lost one
            time.sleep(PATIENCE)
        faults = [
            _fault(Path(scratch) / f"{rank}.err", rank, process.returncode)
            for rank, process in enumerate(started)
            if process.returncode
        ]
        if faults:  # a rank's own error comes before the others' that it is gone
            raise UserError(min(faults, key=lambda fault: "is gone" in fault))
        return json.loads((Path(scratch) / "0.out").read_text())


def _fault(file: Path, rank: int, code: int) -> str:
    """Return the last line that a rank wrote."""
    said = file.read_text(errors="replace").strip().splitlines()
    return clean(said[-1]).removeprefix("Error: ") if said else f"rank {rank} ended with {code} and said nothing"


@contextmanager
def ranks(arguments: Sequence[str], count: int, scratch: Path) -> Iterator[list[subprocess.Popen]]:
    """Start ``mlx-traces`` with some arguments and ``--json`` as ``count`` ranks of a ring, or alone for 1.

    They write to ``RANK.out`` and ``RANK.err`` in ``scratch``. Those that still run when the context ends are killed.
    """
    command = [sys.executable, "-c", COMMAND, *arguments, "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started: list[subprocess.Popen] = []
    if count > 1:
        hosts = scratch / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        environment["MLX_HOSTFILE"] = str(hosts)
    try:
        for rank in range(count):
            own = {"MLX_RANK": str(rank)} if count > 1 else {}
            with ExitStack() as stack:
                out, err = (stack.enter_context((scratch / f"{rank}.{end}").open("w")) for end in ("out", "err"))
                started.append(
                    subprocess.Popen(command, env=environment | own, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
                )
        yield started
    finally:
        for process in started:
            with suppress(OSError):
                process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Return different free ports of the loopback interface."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
