"""Figures: accuracies with intervals, wins and losses, accuracies by part, curves; as PNG or as SVG for a page. No MLX.

A figure is as wide as a phone's page, one unit per CSS pixel, so that its text is readable there. Its SVG takes the
page's font, and colours from CSS variables (``--c0`` to ``--c11``, ``--ink``, ``--mute``, ``--faint``,
``--card``), so that the page chooses light or dark.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlx_traces.evaluation import comparison
from mlx_traces.evaluation.budgets import Curve
from mlx_traces.report import tables
from mlx_traces.runtime.files import replacing
from mlx_traces.text import clean, fold, number, percent

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow, which fades on white. Then those
# farthest from all before them in Lab space, to normal, protan, deutan and tritan eyes (Machado et al., 2009).
COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f"),
    *("#4800a8", "#603000", "#481860", "#c0a860", "#184848"),
)
# When colours repeat, runs differ by these: a line's dashes, its markers, a legend's mark, a bar's hatching.
LOOKS = (
    ("solid", "o", "●", ""),
    ((0, (4, 1.6)), "D", "◆", "////"),
    ((0, (1.2, 1.2)), "^", "▲", "...."),
    ((0, (4, 1.4, 1, 1.4)), "s", "■", "xxxx"),
)
INK, MUTE, FAINT, CARD = "#222222", "#6b6b6a", "#dedddb", "#fefefe"
WON, LOST = COLORS[2], COLORS[5]
VARIABLES = {color: f"var(--c{i})" for i, color in enumerate(COLORS)}
VARIABLES |= {INK: "var(--ink)", MUTE: "var(--mute)", FAINT: "var(--faint)", CARD: "var(--card)"}
WIDTH, PANEL = 390, 330  # of a figure and of one of many, in CSS pixels

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mlx-traces", "text.parse_math": False, "path.snap": False}
_ASIDE = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
_ATTRIBUTES = re.compile(
    r' (?:xmlns(?::xlink)?|version|id)="(?:http[^"]*|1\.1|[\w.-]*_\d+)"|(?<=[" ])font-family: [^;"]*;? ?'
)
_SIZE = re.compile(r' (?:width|height)="[\d.]+pt"')


@dataclass(frozen=True)
class Line:
    """One run's curve in a panel.

    ``low`` and ``high`` are the ends of intervals, empty or one for each value. ``color`` is the run's number.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())


def color(i: int) -> str:
    """Return the colour of run ``i``; with more runs than ``COLORS`` colours repeat, in another `look`."""
    return COLORS[i % len(COLORS)]


def look(i: int) -> tuple[Any, str, str, str]:
    """Return dashes, marker, legend's mark and hatching of run ``i``; they change when the colours repeat."""
    return LOOKS[i // len(COLORS) % len(LOOKS)]


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, on white."""
    buffer = io.BytesIO()
    figure.set_dpi(180)
    with rc_context(_STYLE):
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element for a page, without declaration, URLs or size.

    Args:
        figure: drawn by this module.
        label: the text for screen readers; it is escaped here.
    """
    buffer = io.StringIO()
    figure.patch.set_alpha(0)
    with rc_context(_STYLE):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    text = re.sub(r"\s*\n\s*", "\n", _ASIDE.sub("", buffer.getvalue()))
    opening, end, rest = text.partition(">")
    opening = _SIZE.sub("", opening) + f' role="img" aria-label="{escape(clean(label))}"'
    colors = re.compile("|".join(VARIABLES))

    def in_tag(tag: re.Match) -> str:  # labels, outside of the tags, stay as they are
        return colors.sub(lambda found: VARIABLES[found[0]], _ATTRIBUTES.sub("", tag[0]))

    return re.sub(r"<[^<>]*>", in_tag, opening + end + rest).strip()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file is replaced atomically."""
    with replacing(path) as scratch:
        scratch.write_bytes(png(figure))


def row_name(row: dict[str, Any]) -> tuple[str, str]:
    """Name a row of a comparison: (model and adapter, prompt); the prompt with the run's name if labels are alike."""
    name, prompt = comparison.model_name(row["model"], row["adapter"]), clean(row["prompt"])
    same = row["label"] == f"{name}_{prompt}"
    return name, prompt if same else f"{prompt}, {clean(row['run'])}"


def accuracy(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw the accuracies of a comparison as bars from zero with their 95 % intervals, in the frame's order.

    With several rows the baseline's accuracy is a dashed line.

    Args:
        frame: from `comparison.compare_runs`.
        title: text above the bars; a page has its own.
    """
    rows = frame.to_dict("records")
    baseline = frame["diff"].isna().tolist().index(True)
    names = []
    for i, row in enumerate(rows):
        name, notes = row_name(row)
        notes += ", baseline" if len(rows) > 1 and i == baseline else ""
        names.append((fold(name, 44), fold(notes, 52)))
    *tops, height = accumulate((15 * (len(first) + len(second)) + 26 for first, second in names), initial=0.0)
    figure, axes = _canvas(height, title, right=78)
    top = max(100 * row["ci_high"] for row in rows)
    axes.set_xlim(0, min(100.0, 1.05 * top) or 1)
    axes.set_ylim(height, 0)
    for i, (row, place, (first, second)) in enumerate(zip(rows, tops, names, strict=True)):
        share, low, high = (100 * row[key] for key in ("accuracy", "ci_low", "ci_high"))
        _text(axes, "\n".join(first), 0, place, weight="bold")
        _text(axes, "\n".join(second), 0, place + 15 * len(first), color=MUTE, size=11)
        middle = place + 15 * (len(first) + len(second)) + 9
        axes.barh(middle, share, height=13, color=color(i), hatch=look(i)[3], edgecolor=CARD, linewidth=0, zorder=2)
        for shade, width in ((CARD, 3.3), (INK, 1.3)):  # light around dark: it shows on every colour
            axes.plot([low, high], [middle, middle], color=shade, linewidth=width, zorder=3, solid_capstyle="butt")
            for end in (low, high):
                axes.plot([end, end], [middle - 4, middle + 4], color=shade, linewidth=width, zorder=3)
        _text(axes, f"{percent(row['accuracy'])} %", 1, middle, dx=70, ha="right", va="center", weight="bold")
        _text(axes, f"n = {tables.n_text(row)}", 1, place, dx=70, ha="right", color=MUTE, size=11)
    if len(rows) > 1:
        axes.axvline(100 * rows[baseline]["accuracy"], color=MUTE, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    axes.set_yticks([])
    _grid(axes, "x")
    axes.set_xlabel("accuracy in %, with 95 % interval", color=MUTE, fontsize=11)
    return figure


def wins(rows: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Draw how many problems each run won and lost against the baseline, as bars to the right and to the left.

    Args:
        rows: ``name``, ``notes`` (below the name), ``won``, ``lost``, counts of problems.
        title: text above the figure.
    """
    names = [(fold(row["name"], 44), fold(row["notes"], 58)) for row in rows]
    *tops, height = accumulate((15 * (len(first) + len(second)) + 26 for first, second in names), initial=0.0)
    figure, axes = _canvas(height, title)
    most = max(1, *(max(row["won"], row["lost"]) for row in rows))
    axes.set_xlim(-1.22 * most, 1.22 * most)
    axes.set_ylim(height, 0)
    for row, place, (first, second) in zip(rows, tops, names, strict=True):
        _text(axes, "\n".join(first), 0, place, weight="bold")
        _text(axes, "\n".join(second), 0, place + 15 * len(first), color=MUTE, size=11)
        middle = place + 15 * (len(first) + len(second)) + 9
        for count, side, shade in ((row["won"], 1, WON), (row["lost"], -1, LOST)):
            axes.barh(middle, side * count, height=13, color=shade, zorder=2)
            axes.annotate(
                f"{count:,}",
                (side * count, middle),
                (side * 5, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                color=INK,
                fontsize=12,
            )
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks([])
    _grid(axes, "x")
    axes.xaxis.set_major_locator(_ticks(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_xlabel("problems lost  ←   → problems won", color=MUTE, fontsize=11)
    return figure


def parts(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw accuracies by part (difficulty, extractor) as dots with 95 % intervals, a colour for each run.

    Args:
        frame: from `comparison.strata` or `comparison.extractors`; colours follow the order of its labels.
        title: text above the figure.
    """
    labels = list(dict.fromkeys(frame["label"]))
    groups = {part: frame[frame["part"] == part].to_dict("records") for part in dict.fromkeys(frame["part"])}
    *tops, height = accumulate((24 + 17 * len(rows) for rows in groups.values()), initial=0.0)
    figure, axes = _canvas(height, title, [(clean(name), i) for i, name in enumerate(labels)], right=70)
    axes.set_xlim(0, min(100.0, 105 * frame["ci_high"].max()) or 1)
    axes.set_ylim(height, 0)
    for (part, rows), place in zip(groups.items(), tops, strict=True):
        _text(axes, clean(part)[:52] or "(none)", 0, place, weight="bold")
        count = max(row["total_questions"] for row in rows)
        _text(axes, f"n = {count:,}", 1, place, dx=62, ha="right", color=MUTE, size=11)
        for k, row in enumerate(rows):
            run, middle = labels.index(row["label"]), place + 26 + 17 * k
            shade, mark = color(run), look(run)[1]
            axes.plot([100 * row["ci_low"], 100 * row["ci_high"]], [middle, middle], color=shade, linewidth=2.2)
            axes.plot(100 * row["accuracy"], middle, mark, color=shade, markersize=7.5, markeredgecolor=CARD, zorder=3)
            text = f"{percent(row['accuracy'])} %"
            _text(axes, text, 1, middle, dx=62, ha="right", va="center", size=11.5)
    axes.set_yticks([])
    _grid(axes, "x")
    axes.set_xlabel("accuracy in %, with 95 % interval", color=MUTE, fontsize=11)
    return figure


def budgets(found: Sequence[Curve], by: str, title: str = "") -> Figure:
    """Draw accuracies against the budget of a thought (``by="budget"``) or the mean tokens (``by="tokens"``).

    Runs without a budget, or without a count of tokens, are left out.
    """
    lines = []
    for i, curve in enumerate(found):
        points = sorted((p for p in curve.points if getattr(p, by) is not None), key=lambda point: getattr(point, by))
        columns = ([getattr(point, name) for point in points] for name in (by, "accuracy", "low", "high"))
        steps, values, low, high = columns
        lines.append(Line(curve.name, steps, values, i, low, high))
    across = {"budget": "budget of the thought, in tokens", "tokens": "tokens of an answer, its thought included"}[by]
    return panel(lines, True, title, across)


def panel(lines: Sequence[Line], share: bool = False, title: str = "", across: str = "") -> Figure:
    """Draw curves over steps.

    A noisy curve is a thin line under its running mean; a curve with intervals has a dot for each value.

    Args:
        lines: one for each run.
        share: the values are fractions, shown in percent.
        title: text above the panel; several lines then have a legend.
        across: label of the horizontal axis; default: none, as for steps.
    """
    names = [(line.name, line.color) for line in lines]
    bottom = 42 if across else 26
    figure, axes = _canvas(150, title, names if len(lines) > 1 else (), PANEL, left=46, right=14, bottom=bottom, top=8)
    if across:
        axes.set_xlabel(across, color=MUTE, fontsize=11)
    unit = 100 if share else 1
    for line in lines:
        shade, values = color(line.color), [unit * value for value in line.values]
        if line.low:
            bars = [[unit * end for end in ends] for ends in (line.low, line.high)]
            axes.vlines(line.steps, *bars, color=shade, linewidth=1.6, alpha=0.45)
        many = rough(values) and not line.low
        dashes, marker, *_ = look(line.color)
        shown = marker if line.low or len(values) < 12 else None
        axes.plot(
            *thinned(line.steps, values),
            color=shade,
            linewidth=0.9 if many else 1.8,
            alpha=0.35 if many else 1,
            linestyle="solid" if many else dashes,
            marker=shown,
            markersize=5.5,
            markeredgecolor=CARD,
        )
        if many:
            axes.plot(*thinned(line.steps, running_mean(values)), color=shade, linewidth=2, linestyle=dashes)
    axes.xaxis.set_major_locator(_ticks(5))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.margins(x=0.02)
    low, high = _limits([(line, [unit * value for value in line.values]) for line in lines], unit, share)
    axes.set_ylim(low, high)
    ticks = [
        tick
        for tick in _ticks(4, integer=False).tick_values(low, high)
        if low <= tick <= (min(high, 100) if share else high)
    ]
    axes.set_yticks(ticks, [text + (" %" if share else "") for text in tick_texts(ticks)])
    _grid(axes, "y")
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(FAINT)
    return figure


def _limits(lines: Sequence[tuple[Line, Sequence[float]]], unit: float, share: bool) -> tuple[float, float]:
    """Return a panel's vertical limits: around its curves, but not so close that noise looks large.

    The highest and lowest 1 % of a noisy curve's values may lie outside of the panel.
    """
    inside: list[float] = []
    for line, values in lines:
        inside += [unit * end for end in (*line.low, *line.high)]
        cut = len(values) // 100 if rough(values) and not line.low else 0
        inside += sorted(values)[cut : len(values) - cut]
        inside += running_mean(values) if cut else []
    low, high = min(inside), max(inside)
    room = max(0.1 * (high - low), (2 - (high - low) / 2) if share else 0, 0.02 * abs(high)) or 1
    if share:
        return max(low - room, -1), min(high + room, 101)
    return low - room, high + room


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Format the numbers of an axis with just enough decimals to tell them apart."""
    if len(ticks) < 2 or (step := ticks[1] - ticks[0]) < 1e-4 * (1 - 1e-9):
        return [f"{tick:.3g}" for tick in ticks]
    decimals = next(d for d in range(9) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * 10**d * step)
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def rough(values: Sequence[float]) -> bool:
    """Whether a curve is noisy: 30 or more values, a quarter or more of them turning points."""
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return len(values) >= 30 and turns >= len(values) / 4


def thinned(steps: Sequence[float], values: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """Return at most ``most`` points of a curve, each a mean of neighbours."""
    size = -(-len(values) // most) or 1
    chunks = [slice(at, at + size) for at in range(0, len(values), size)]
    return ([sum(part) / len(part) for part in (row[at] for at in chunks)] for row in (steps, values))


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the running mean over a window of a fifteenth of all values, shorter at the ends."""
    half = max(1, len(values) // 30)
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _canvas(
    height: float,
    title: str,
    names: Sequence[tuple[str, int]] = (),
    width: float = WIDTH,
    left: float = 8,
    right: float = 8,
    bottom: float = 36,
    top: float = 6,
) -> tuple[Figure, Axes]:
    """Make a figure with axes of this height and margins around them, all in CSS pixels.

    With a title, ``names`` (name, number of its colour) stand below it as a legend.
    """
    heading = [(line, INK, "bold") for line in textwrap.wrap(title, int(width / 8))]
    heading += [(f"{look(i)[2]}  {name}", color(i), "normal") for name, i in names if title]
    top += 17 * len(heading) + (12 if title else 0)
    whole = height + top + bottom
    figure = Figure(figsize=(width / 72, whole / 72), dpi=72)
    axes = figure.add_axes((left / width, bottom / whole, (width - left - right) / width, height / whole))
    axes.patch.set_alpha(0)
    for i, (line, shade, weight) in enumerate(heading):
        figure.text(left / width, 1 - (20 + 17 * i) / whole, line, fontsize=12, weight=weight, color=shade)
    for text in figure.texts:
        text.set_parse_math(False)  # a "$" in a name is a dollar
    return figure, axes


def _text(axes: Axes, text: str, x: float, y: float, dx: float = 0, size: float = 12, **style: Any) -> None:
    """Write a text at ``x``, a fraction of the axes' width, and ``y``, in data units."""
    behind = {"facecolor": CARD, "edgecolor": "none", "pad": 1.5}
    style = {"color": INK, "va": "top", "linespacing": 1.25, "bbox": behind, **style}
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (x, y), (dx, 0), fontsize=size, annotation_clip=False, parse_math=False, **where, **style)


def _grid(axes: Axes, axis: str) -> None:
    axes.tick_params(length=0, labelsize=11, labelcolor=MUTE, pad=4)
    axes.grid(axis=axis, color=FAINT, linewidth=0.9, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _ticks(bins: int, integer: bool = True) -> MaxNLocator:
    return MaxNLocator(nbins=bins, integer=integer, steps=[1, 2, 5, 10])
