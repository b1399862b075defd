"""Runs as they stand, finished or not, and their curves: read, summed up, drawn with characters. No MLX."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_traces.errors import UserError
from mlx_traces.evaluation import stats
from mlx_traces.evaluation.comparison import check_samples
from mlx_traces.readers import is_number, parse_row, read_json
from mlx_traces.runtime.run_folder import SAMPLE_COLUMNS
from mlx_traces.text import clean, duration, number

if TYPE_CHECKING:
    from rich.console import RenderableType


BLOCKS = "▁▂▃▄▅▆▇█"
EVALUATION, REINFORCEMENT, FINE_TUNING = "evaluation", "reinforcement learning", "fine-tuning"


@dataclass(frozen=True)
class Metric:
    """One key of ``metrics.jsonl`` for readers.

    ``share``: a fraction, shown in percent. ``better``: 1 where more is better, -1 where less is, 0 for neither.
    """

    key: str
    title: str
    share: bool = False
    better: int = 0


METRICS = (
    Metric("valid/accuracy", "Held-out accuracy", share=True, better=1),
    Metric("valid/loss", "Held-out loss, nats a token", better=-1),
    Metric("reward/mean", "Reward", better=1),
    Metric("loss", "Loss"),
    Metric("rollout/length", "Tokens a completion"),
    Metric("rollout/finished", "Finished completions", share=True, better=1),
    Metric("policy/entropy", "Entropy, nats a token"),
    Metric("policy/kl_ref", "KL to the reference"),
    Metric("policy/kl_old", "KL of the step's updates"),
    Metric("policy/kl_sampler", "KL to the sampler"),
    Metric("policy/clip_fraction", "Clipped ratios", share=True),
    Metric("rollout/zero_std_groups", "Groups of equal reward", share=True, better=-1),
    Metric("valid/finished", "Held-out, finished", share=True, better=1),
    Metric("valid/length", "Held-out, tokens an answer"),
    Metric("optim/grad_norm", "Norm of the gradient"),
    Metric("optim/lr", "Learning rate"),
    Metric("tokens_per_second", "Tokens a second", better=1),
    Metric("time/step", "Seconds a step", better=-1),
    Metric("memory/peak_gb", "Peak memory, GB"),
)
TITLES = {
    "reward/": "Reward: ",
    "policy/": "Policy: ",
    "valid/": "Held-out ",
    "value/": "Value: ",
    "time/": "Seconds: ",
}
ASIDE = {"step", "tokens", "time/total", "optim/updates", "rollout/groups", "time/sample", "time/update", "time/reward"}


@dataclass(frozen=True)
class Curve:
    """The values of a metric over steps; ``low`` and ``high`` are 95 % intervals, empty where there are none."""

    metric: Metric
    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]

    @property
    def constant(self) -> bool:
        """Whether there is nothing to see: several values, all alike."""
        return len(self.values) > 1 and len(set(self.values)) == 1

    @property
    def best(self) -> float | None:
        """The best value; None where neither more nor less is better."""
        if not self.metric.better:
            return None
        return max(self.values) if self.metric.better > 0 else min(self.values)

    def text(self, value: float | None) -> str:
        """Write a value of this metric."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.metric.share else number(value)


@dataclass(frozen=True)
class Record:
    """A run folder as it stands.

    ``about`` is run.json, ``metrics`` and ``samples`` are the lines so far, ``result`` is None until it is finished.
    """

    path: Path
    kind: str
    about: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The folder's name."""
        return clean(self.path.resolve().name)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        identity = self.about.get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def step(self) -> int:
        """The last step of a training, or the number of samples of an evaluation."""
        if self.kind == EVALUATION:
            return len(self.samples)
        return int(max((row["step"] for row in self.metrics), default=0))

    @property
    def steps(self) -> int | None:
        """How many steps there will be, as far as that is known."""
        if self.result is not None:
            return self.step
        if self.kind == EVALUATION:
            limit, samples = whole(self.settings.get("limit")), whole(self.settings.get("samples") or 1)
            return limit * samples if limit and samples else None
        return whole(self.settings.get("num_steps")) or whole(self.about.get("steps"))

    @property
    def lost(self) -> bool:
        """Whether it is an evaluation that has its result, and no sample to show for it."""
        return self.kind == EVALUATION and self.result is not None and not self.samples

    @property
    def notes(self) -> list[str]:
        """The notes of its result, or of its beginning as long as there is none, each on one line."""
        return notes_of(self.about if self.result is None else self.result)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        key, rows = ("elapsed", self.samples) if self.kind == EVALUATION else ("time/total", self.metrics)
        return float(max((row[key] for row in rows if is_number(row.get(key))), default=0.0))

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest will take at the pace of the last 20 lines; None where that cannot be said."""
        timed = [(row["step"], row["time/total"]) for row in self.metrics if is_number(row.get("time/total"))]
        if self.kind == EVALUATION:
            timed = [(0, 0.0), (self.step, self.seconds)]
        timed = timed[-20:]
        if self.result is not None or self.steps is None or len(timed) < 2 or timed[-1][0] <= timed[0][0]:
            return None
        pace = (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0])
        return pace * (self.steps - self.step)


def read(path: str | Path) -> Record:
    """Read a run folder, finished or not; nothing is changed in it.

    A last line that is not whole is left out: it is being written, or was when the run was cut off.

    Raises:
        UserError: if it is no run folder, or a file in it is broken.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    if not any((path / name).exists() for name in ("run.json", "result.json")):
        raise UserError(f"{path}: not a run folder, it has no run.json; name one that eval, sft or grpo wrote")
    about = read_json(path / "run.json") if (path / "run.json").exists() else {}
    result = read_json(path / "result.json") if (path / "result.json").exists() else None
    settings = about.get("identity")
    settings = settings if isinstance(settings, dict) else {}
    trained = (path / "metrics.jsonl").exists() or "learning_rate" in settings
    metrics = lines_so_far(path / "metrics.jsonl", ("step",))
    if not trained:
        samples = lines_so_far(path / "samples.jsonl", SAMPLE_COLUMNS)
        check_samples(samples, str(path / "samples.jsonl"))
        return Record(path, EVALUATION, about, [], samples, result)
    reinforced = "group_size" in settings or any("reward/mean" in row for row in metrics)
    kind = REINFORCEMENT if reinforced else FINE_TUNING
    return Record(path, kind, about, metrics, lines_so_far(path / "samples.jsonl", ("step", "completion")), result)


def lines_so_far(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the whole lines of a file of JSON lines that may still be written; without the file there are none.

    Raises:
        UserError: at a whole line that is no JSON object, lacks a column, or has a step that is no number.
    """
    try:
        content = path.read_bytes()
        text = content[: content.rfind(b"\n") + 1].decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    rows = []
    for line_number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(parse_row(line, f"{path}:{line_number}", columns, finite=False))
            if "step" in columns and not is_number(rows[-1]["step"]):
                raise UserError(f"{path}:{line_number}: 'step' is no number; the file is damaged")
    return rows


def curves(record: Record) -> list[Curve]:
    """Return a run's curves in the order of ``METRICS``, then the metrics that are not named there.

    An evaluation has one, the accuracy so far over the samples.
    """
    if record.kind == EVALUATION:
        return _running_accuracy(record)
    rows = [_derived(row) for row in record.metrics]
    keys = [metric.key for metric in METRICS]
    others = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in keys and key not in ASIDE]
    known = [metric if metric.key != "loss" else _loss(record.kind) for metric in METRICS]
    made = [_curve(rows, metric) for metric in (*known, *(Metric(key, _title(key)) for key in others))]
    found = [curve for curve in made if curve.values]
    mean = next((curve.values for curve in found if curve.metric.key == "reward/mean"), None)
    alone = [curve for curve in found if curve.metric.key.startswith("reward/") and curve.values == mean]
    return [_with_intervals(curve, record) for curve in found if curve not in alone[1:]]


def _loss(kind: str) -> Metric:
    """Return the loss's metric; a policy's loss has no better side, its gradient alone says something."""
    return Metric("loss", "Loss", better=-1 if kind == FINE_TUNING else 0)


def _derived(row: dict[str, Any]) -> dict[str, Any]:
    """Add tokens a second and seconds a step where a line has what they follow from."""
    parts = [row.get(key) for key in ("time/sample", "time/update")]
    if not all(map(is_number, parts)):
        return row
    seconds = sum(parts) + (row["time/reward"] if is_number(row.get("time/reward")) else 0)
    speed = {"tokens_per_second": row["tokens"] / sum(parts)} if is_number(row.get("tokens")) and sum(parts) else {}
    return {"time/step": seconds, **speed, **row}


def _curve(rows: Sequence[dict[str, Any]], metric: Metric) -> Curve:
    points = [(row["step"], float(row[metric.key])) for row in rows if is_number(row.get(metric.key))]
    return Curve(metric, [step for step, _ in points], [value for _, value in points], [], [])


def _with_intervals(curve: Curve, record: Record) -> Curve:
    """Give held-out accuracies their Wilson intervals, where the number of problems is known."""
    held_out = record.settings.get("evaluate")
    count = whole(held_out.get("limit")) if isinstance(held_out, dict) else None
    if curve.metric.key != "valid/accuracy" or not count:
        return curve
    correct = [value * count for value in curve.values]
    if any(abs(value - round(value)) > 1e-6 or not 0 <= value <= count for value in correct):
        return curve  # fewer problems than asked for
    ends = [stats.wilson(round(value), count) for value in correct]
    return Curve(curve.metric, curve.steps, curve.values, [low for low, _ in ends], [high for _, high in ends])


def _running_accuracy(record: Record) -> list[Curve]:
    values, correct = [], 0
    for count, row in enumerate(record.samples, 1):
        correct += bool(row["correct"])
        values.append(correct / count)
    metric = Metric("accuracy", "Correct so far", share=True)
    return [Curve(metric, list(range(1, len(values) + 1)), values, [], [])] if values else []


def _title(key: str) -> str:
    prefix = next((prefix for prefix in TITLES if key.startswith(prefix)), "")
    return clean(TITLES.get(prefix, "") + key.removeprefix(prefix).replace("_", " "))


def notes_of(content: dict[str, Any]) -> list[str]:
    """Return the notes of a file's content, each on one line; none where they are no list."""
    notes = content.get("notes")
    return [clean(note) for note in notes] if isinstance(notes, list) else []


def whole(value: Any) -> int | None:
    """Return a count from a file; None for what is none."""
    return int(value) if is_number(value) and value >= 1 else None


# ------------------------------------------------------------------------------------------------ terminal


def blocks(values: Sequence[float], width: int) -> str:
    """Draw values with eighths of a character's height, from their least to their most.

    More values than ``width`` are averaged over equal parts; values all alike are a line in the middle.
    """
    if not values:
        return ""
    count, largest = min(width, len(values)), max(map(abs, values)) or 1.0
    ends = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(value / largest for value in values[start:end]) / (end - start) for start, end in pairwise(ends)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[3] * count
    return "".join(BLOCKS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def state(record: Record) -> str:
    """Say in one line how far a run is: ``step 37 of 55, 2:10, about 1:03 to go``."""
    if record.lost:
        return "finished, but its samples are gone: result.json is there, samples.jsonl is missing or empty"
    what = "samples" if record.kind == EVALUATION else "step"
    parts = [f"{what} {record.step:,}" + (f" of {record.steps:,}" if record.steps else "")]
    if record.seconds:
        parts.append(duration(record.seconds))
    if record.result is not None:
        return ", ".join(["finished", *parts])
    if record.remaining is not None:
        parts.append(f"about {duration(record.remaining)} to go")
    return ", ".join(parts)


def display(record: Record, width: int, now: float | None = None) -> RenderableType:
    """Lay a run out for a terminal: what it is, how far, and each curve with its first, last and best value.

    Args:
        record: the run.
        width: of the terminal, in characters.
        now: seconds since 1970, to say how old the last line is; None leaves it out.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    narrow = width < 72
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=18 if narrow else 28)
    room = max(8, min(60, width - (40 if narrow else 64)))
    table.add_column("", no_wrap=True, width=room)
    for heading in ("first", "last", "best"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = curves(record)
    for curve in shown:
        first, last = curve.values[0], curve.values[-1]
        texts = [curve.text(value) for value in (first, last, curve.best)]
        style = "dim" if curve.constant else "cyan"
        table.add_row(Text(curve.metric.title), Text(blocks(curve.values, room), style=style), *map(Text, texts))
    lines = [Text(f"{record.name}  {_what(record)}", style="bold"), Text(state(record))]
    if record.kind == EVALUATION and record.samples:
        lines.append(Text(_verdicts(record)))
    if held_out := next((curve for curve in shown if curve.metric.key == "valid/accuracy"), None):
        lines.append(Text(_held_out(held_out)))
    lines += [Text(f"note: {note}", style="dim") for note in (record.notes if record.result else [])]
    if now is not None and record.result is None and (age := now - _touched(record.path)) > 60:
        lines.append(Text(f"nothing new for {duration(age)}", style="yellow"))
    return Group(*lines, *([table] if shown else [] if record.lost else [Text("no step yet")]))


def _what(record: Record) -> str:
    model, adapter = record.settings.get("model"), record.settings.get("adapter")
    names = [clean(name) for name in (model, adapter) if isinstance(name, str)]
    return f"{record.kind} of {' + '.join(names)}" if names else record.kind


def _verdicts(record: Record) -> str:
    outcomes: dict[str, list[bool]] = {}
    for row in record.samples:
        outcomes.setdefault(row["id"], []).append(bool(row["correct"]))
    share = stats.accuracy(list(outcomes.values()))
    accuracy, low, high = (f"{100 * share[key]:.1f}" for key in ("accuracy", "ci_low", "ci_high"))
    counts = Counter(clean(row["verdict"]) for row in record.samples).most_common()
    return f"correct {accuracy} % [{low}, {high}]; {', '.join(f'{name} {count:,}' for name, count in counts)}"


def _held_out(curve: Curve) -> str:
    text = f"held-out accuracy {curve.text(curve.values[-1])} at step {number(curve.steps[-1])}"
    return text + (f" [{100 * curve.low[-1]:.1f}, {100 * curve.high[-1]:.1f}]" if curve.low else "")


def _touched(path: Path) -> float:
    """Return when a run's lines were last added to."""
    files = [path / name for name in ("metrics.jsonl", "samples.jsonl", "run.json")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=time.time())
