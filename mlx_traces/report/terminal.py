"""A run in the terminal: its progress, and its curves as sparklines; accuracy against the budget of a thought."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlx_traces.evaluation import budgets, stats
from mlx_traces.report.curves import curves
from mlx_traces.report.run_view import EVALUATION, Record
from mlx_traces.text import clean, duration, number, whole

BLOCKS = "▁▂▃▄▅▆▇█"
PLOT = (9, 32)  # rows and columns within the axes of a plot


def blocks(values: Sequence[float], width: int) -> str:
    """Draw values as a sparkline: the smallest and the largest value span the height of a character.

    More than ``width`` values are averaged over equal parts. Equal values give a line in the middle.
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


def budget_plots(curve: budgets.Curve) -> Columns:
    """Plot accuracies against the budget of a thought, and beside it, if there is room, against the tokens used."""
    most = max(1, len(curve.points) - 1)
    names = ["none" if point.budget is None else whole(point.budget) for point in curve.points]
    plots = [plot("accuracy % by budget of the thought", names, [i / most for i in range(len(names))], curve.points)]
    counted = sorted((point for point in curve.points if point.tokens is not None), key=lambda point: point.tokens)
    if counted:
        first, span = counted[0].tokens, counted[-1].tokens - counted[0].tokens or 1
        places = [(point.tokens - first) / span for point in counted]
        plots.append(
            plot("accuracy % by tokens really used", [whole(point.tokens) for point in counted], places, counted)
        )
    return Columns(plots, padding=(0, 2))


def plot(title: str, names: Sequence[str], places: Sequence[float], points: Sequence[budgets.Point]) -> Text:
    """Plot accuracies with their intervals: ``●`` on a bar, joined by dots; the axis ends at whole tens of percent.

    Args:
        title: the line above.
        names: of the points, below the horizontal axis where there is room.
        places: of the points on it, from 0 to 1, in order.
        points: accuracies and intervals, fractions.
    """
    height, width = PLOT
    low = math.floor(10 * min(point.low for point in points) + 1e-9) / 10
    high = max(math.ceil(10 * max(point.high for point in points) - 1e-9) / 10, low + 0.1)

    def row(share: float) -> int:
        return round((high - share) / (high - low) * (height - 1))

    cells = [[" "] * width for _ in range(height)]
    columns = [1 + round(place * (width - 3)) for place in places]
    ends = [(at, point.accuracy) for at, point in zip(columns, points, strict=True)]
    for (start, one), (end, two) in pairwise(ends):
        for at in range(start + 1, end):
            cells[row(one + (two - one) * (at - start) / (end - start))][at] = "·"
    for at, point in zip(columns, points, strict=True):
        top, bottom = row(point.high), row(point.low)
        for line in range(top, bottom + 1):
            cells[line][at] = "┬" if line == top else "┴" if line == bottom else "│"
    for at, share in ends:
        cells[row(share)][at] = "●"
    below = ""
    for at, name in zip(columns, names, strict=True):
        start = min(max(0, at - len(name) // 2), width - len(name))
        if start > len(below) or not below:
            below = below.ljust(start) + name
    values = [f"{100 * (high - (high - low) * i / (height - 1)):3.0f} ┤" for i in range(height)]
    axis = [value if i % 4 == 0 else "    │" for i, value in enumerate(values)]
    lines = [title, *(f"{mark}{''.join(line)}" for mark, line in zip(axis, cells, strict=True))]
    return Text("\n".join([*lines, f"    └{'─' * width}", f"     {below}"]), no_wrap=True)


def state(record: Record) -> str:
    """Describe a run's progress in a line: ``step 37 of 55, 2:10, about 1:03 to go``."""
    if record.lost:
        return "finished, but its samples are gone: result.json is there, samples.jsonl is missing or empty"
    what = "samples" if record.kind == EVALUATION else "step"
    parts = [f"{what} {record.step:,}" + (f" of {record.steps:,}" if record.steps else "")]
    if record.seconds:
        parts.append(duration(record.seconds))
    if record.result is not None:
        early = record.result.get("stopped") == "patience"
        return ", ".join(["stopped early by patience" if early else "finished", *parts])
    if record.remaining is not None:
        parts.append(f"about {duration(record.remaining)} to go")
    return ", ".join(parts)


def display(record: Record, width: int, now: float | None = None) -> RenderableType:
    """Lay a run out for a terminal: its name, its progress, and each curve with first, last and best value.

    Args:
        record: the run.
        width: of the terminal, in characters.
        now: seconds since 1970, to show for how long nothing was written; None leaves that out.
    """
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
    names = [clean(name) for key in ("model", "adapter") if isinstance(name := record.settings.get(key), str)]
    of = f" of {' + '.join(names)}" if names else ""
    lines = [Text(f"{record.name}  {record.kind}{of}", style="bold"), Text(state(record))]
    if record.kind == EVALUATION and record.samples:
        lines.append(Text(_verdicts(record)))
    if held_out := next((curve for curve in shown if curve.metric.key == "valid/accuracy"), None):
        text = f"held-out accuracy {held_out.text(held_out.values[-1])} at step {number(held_out.steps[-1])}"
        ends = f" [{100 * held_out.low[-1]:.1f}, {100 * held_out.high[-1]:.1f}]" if held_out.low else ""
        lines.append(Text(text + ends))
    lines += [Text(f"note: {note}", style="dim") for note in (record.notes if record.result else [])]
    if now is not None and record.result is None:
        files = [record.path / name for name in ("metrics.jsonl", "samples.jsonl", "run.json")]
        age = now - max((file.stat().st_mtime for file in files if file.exists()), default=now)
        if age > 60:
            lines.append(Text(f"nothing new for {duration(age)}", style="yellow"))
    return Group(*lines, *([table] if shown else [] if record.lost else [Text("no step yet")]))


def _verdicts(record: Record) -> str:
    """Return the accuracy so far, and how often each verdict was given."""
    outcomes: dict[str, list[bool]] = {}
    for row in record.samples:
        outcomes.setdefault(row["id"], []).append(bool(row["correct"]))
    share = stats.accuracy(list(outcomes.values()))
    accuracy, low, high = (f"{100 * share[key]:.1f}" for key in ("accuracy", "ci_low", "ci_high"))
    counts = Counter(clean(row["verdict"]) for row in record.samples).most_common()
    return f"correct {accuracy} % [{low}, {high}]; {', '.join(f'{name} {count:,}' for name, count in counts)}"
