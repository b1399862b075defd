"""The JSON file that ``bench all`` writes and ``bench show`` reads: one per machine, with the results of its steps."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from rich.console import Console
from rich.text import Text

from mlx_traces.diagnostics.bench_generate import GenerateRow
from mlx_traces.diagnostics.bench_graph import GraphRow
from mlx_traces.diagnostics.bench_ranks import Scaling
from mlx_traces.diagnostics.bench_rl import GRPORow
from mlx_traces.diagnostics.bench_sft import SFTRow
from mlx_traces.diagnostics.doctor import Line
from mlx_traces.errors import UserError
from mlx_traces.readers import read_json
from mlx_traces.records import EvalResult
from mlx_traces.report import figures, tables, terminal
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.text import clean

# The class of the rows that a step of each kind prints.
ROWS = {
    "doctor": TypeAdapter(list[Line]),
    "generate": TypeAdapter(list[GenerateRow]),
    "grpo": TypeAdapter(list[GRPORow]),
    "sft": TypeAdapter(list[SFTRow]),
    "eval": TypeAdapter(list[EvalResult]),
    "graph": TypeAdapter(list[GraphRow]),
    "ring": TypeAdapter(list[Scaling]),
}
WIDTH = 80  # of the table, in characters


class Part(BaseModel):
    """A part of a bench file."""

    model_config = ConfigDict(frozen=True)


class Step(Part):
    """A step: a command of ``mlx-traces``, its status, and the rows that it printed.

    ``seconds`` is the time of its process, ``memory_gb`` the peak memory of that process, in 1e9 bytes.
    """

    name: str
    kind: Literal["doctor", "generate", "grpo", "sft", "eval", "graph", "ring"]
    arguments: list[str]
    status: Literal["done", "failed", "cut", "skipped"]
    seconds: float = 0.0
    memory_gb: float | None = None
    message: str = ""
    rows: list[dict[str, Any]] = []

    @cached_property
    def found(self) -> list[Any]:
        """The rows as objects of the class in `ROWS`."""
        return ROWS[self.kind].validate_python(self.rows)

    @model_validator(mode="after")
    def _rows_are_of_their_kind(self) -> "Step":
        if not self.found and self.status == "done":
            raise ValueError("a step that is done has rows")
        return self


class Condition(Part):
    """The machine before or after the steps: load, swap in 1e9 bytes, and its own tools' output on power and heat."""

    load: float | None = None
    swap_gb: float | None = None
    low_power: bool | None = None
    said: dict[str, str] = {}


class Machine(Part):
    """The machine: MLX's name of the device, its backend, memory in 1e9 bytes, cores that the process may use."""

    device: str
    backend: Literal["metal", "cuda", "cpu"]
    memory_gb: float
    cores: int
    platform: str


class BenchFile(Part):
    """The results of ``bench all``; written again after each step."""

    bench: Literal[1] = 1
    machine: Machine
    model: str
    quick: bool
    started: str
    versions: dict[str, str | None]
    git_revision: str | None = None
    before: Condition
    after: Condition | None = None
    notes: list[str] = []
    steps: list[Step] = Field(max_length=100)

    def write(self, path: Path) -> None:
        """Replace the file; UserError if it cannot be written."""
        try:
            write_atomic(path, to_json(self.model_dump(mode="json")))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None

    def first(self, kind: str, **wanted: Any) -> Any | None:
        """Return the first row of a kind with these values; None if no step has one."""
        rows = (row for step in self.steps if step.kind == kind for row in step.found)
        return next((row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())), None)

    def decoded(self, weights: str) -> list[GenerateRow]:
        """Return the decoding rows with these weights, fewest completions at once first."""
        steps = (step for step in self.steps if step.kind == "generate" and weights in step.arguments)
        return sorted((row for step in steps for row in step.found), key=lambda row: row.rows)


def read(path: Path) -> BenchFile:
    """Read a file of ``bench all``; UserError if it is not one."""
    try:
        return BenchFile.model_validate(read_json(path, finite=True))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path}: not a file of bench all ({where}: {clean(fault['msg'])})") from None


def cells(files: Sequence[BenchFile]) -> tuple[list[str], list[list[str]]]:
    """Return the table's headings and its rows, one for each machine and kind of weights."""
    headings = ["machine, model, weights", "32 rows", "256 rows", "GRPO step", "SFT", "GB", "right"]
    rows = []
    for file in files:
        grpo, sft, right = (file.first(kind) for kind in ("grpo", "sft", "eval"))
        rest = [
            f"{grpo.seconds:.1f} s\n{grpo.sample_seconds:.1f} + {grpo.update_seconds:.1f}" if grpo else "–",
            f"{sft.tokens_per_second:,.0f}" if sft else "–",
            f"{max((row.peak_memory_gb for row in (grpo, sft) if row), default=0):.1f}" if grpo or sft else "–",
            f"{right.correct_count} of {right.total_questions}" if right else "–",
        ]
        for weights in ("quantized", "dense"):
            decoded = {row.rows: row for row in file.decoded(weights)}
            if decoded:
                name = f"{clean(file.machine.device)}, {clean(file.model)}, {weights}"
                rows.append([name, _speed(decoded.get(32)), _speed(decoded.get(256)), *rest])
    return headings, rows


def _speed(row: GenerateRow | None) -> str:
    """Return tokens per second, and the ratio to the peer."""
    if row is None:
        return "–"
    return f"{row.tokens_per_second:,.0f}" + (f"\n{row.ratio:.1f} x" if row.ratio else "")


def show(files: Sequence[BenchFile], width: int = WIDTH) -> None:
    """Print the table by machine, the curves, the steps that did not finish, and the notes."""
    console = Console(width=width)
    caption = "32, 256 rows: tokens/s decoding, ratio to mlx-lm. GRPO: seconds, sampling + update. SFT: tokens/s."
    console.print(tables.grid("Machines", *cells(files), caption))
    for line in lines(files):
        peaks = f"{min(line.values):,.0f} to {max(line.values):,.0f} tokens/s"
        rows = f"{line.steps[0]:.0f} to {line.steps[-1]:.0f} rows"
        console.print(Text(f"{terminal.blocks(line.values, 20)}  {line.name}: {rows}, {peaks}"))
    for file in files:
        name = clean(file.machine.device)
        for step in file.steps:
            if step.status != "done":
                console.print(Text(f"{name}: {clean(step.name)} {step.status} ({clean(step.message)})"))
        for note in file.notes:
            console.print(Text(f"{name}: {clean(note)}"))
    if not any(file.machine.backend == "metal" for file in files):
        console.print(Text("None of these files is from a Mac."))


def lines(files: Sequence[BenchFile]) -> list[figures.Line]:
    """Return tokens per second over the rows decoded at once, ours and the peer's, by machine and kind of weights."""
    found: list[figures.Line] = []
    for file in files:
        for weights in ("quantized", "dense"):
            rows = file.decoded(weights)
            for who, speeds in (
                ("mlx-traces", {row.rows: row.tokens_per_second for row in rows}),
                ("mlx-lm", {row.rows: row.peer_tokens_per_second for row in rows if row.peer_tokens_per_second}),
            ):
                if speeds:
                    name = f"{who}, {clean(file.machine.device)}, {weights}"
                    found.append(figures.Line(name, [*speeds], [*speeds.values()], len(found)))
    return found


def draw(files: Sequence[BenchFile], path: Path) -> None:
    """Draw the curves as PNG."""
    figures.save(figures.panel(lines(files), title="Tokens a second by rows decoded at once"), path)
