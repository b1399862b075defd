"""Pictures and files for readers: the accuracy chart, and a comparison written to a folder. No MLX."""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_traces import tables
from mlx_traces.errors import UserError
from mlx_traces.runs import to_json, write_atomic

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow is left out, it fades on white.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
_INK, _FAINT = "#222222", "#D9D9D9"


def accuracy_bars(frame: pd.DataFrame, path: Path) -> None:
    """Draw the accuracies of a comparison as bars from zero with their 95 % intervals, and save a PNG.

    Rows stand in the frame's order, top down; models of one family (``Qwen``, ``Phi``) share a colour; the
    baseline's accuracy is a dashed line where there is something to compare.

    Args:
        frame: from ``tables.compare_runs``.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = frame.to_dict("records")
    baseline = frame["diff"].isna().tolist().index(True)
    names = [_bar_name(row, len(rows) > 1 and i == baseline) for i, row in enumerate(rows)]
    families = list(dict.fromkeys(_family(row["model"]) for row in rows))
    lines = max(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(8.5, 1.3 + len(rows) * (0.2 + 0.16 * lines)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    shares = [100 * row["accuracy"] for row in rows]
    axes.barh(
        places,
        shares,
        height=0.6,
        color=[_COLORS[families.index(_family(row["model"])) % len(_COLORS)] for row in rows],
        xerr=[
            [100 * (row["accuracy"] - row["ci_low"]) for row in rows],
            [100 * (row["ci_high"] - row["accuracy"]) for row in rows],
        ],
        error_kw={"ecolor": _INK, "elinewidth": 1.2, "capsize": 3.5, "capthick": 1.2},
        zorder=2,
    )
    if len(rows) > 1:
        axes.axvline(shares[baseline], color=_INK, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
    top = max(100 * row["ci_high"] for row in rows)
    axes.set_xlim(0, min(100.0, 1.05 * top))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(places, names, color=_INK)
    beside = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "va": "center",
        "color": _INK,
    }
    for place, row in enumerate(rows):
        axes.annotate(f"{tables.percent(row['accuracy'])} %", (1, place), (52, 0), ha="right", **beside)
        axes.annotate(f"n = {tables.n_text(row)}", (1, place), (64, 0), ha="left", **beside)
    axes.set_xlabel("accuracy in %, with 95 % interval", color=_INK)
    axes.set_title("\n".join(textwrap.wrap(tables.protocol_line(frame), 100)), fontsize=10, color=_INK)
    for text in (*axes.get_yticklabels(), axes.title):
        text.set_parse_math(False)  # a "$" in a name is a dollar
    axes.tick_params(length=0)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    _replace(path, buffer.getvalue())


def write_all(runs: Sequence[tables.Run], frame: pd.DataFrame, out: Path) -> list[Path]:
    """Write a comparison to a folder: table.md, .csv and .json, per_question.csv, results.json, accuracy.png.

    Args:
        runs: the compared runs.
        frame: from ``tables.compare_runs(runs)``.
        out: the folder; it is made, and files of an earlier comparison in it are replaced one by one.

    Returns:
        The files.

    Raises:
        UserError: if the folder cannot be written.
    """
    markdown = tables.to_markdown(frame)
    if (strata := tables.strata(runs)) is not None:
        markdown += f"\n{tables.parts_to_markdown(strata)}"
    if warnings := tables.differences(runs):
        markdown += "\n" + "".join(f"* {warning}\n" for warning in warnings)
    texts = {
        "table.md": markdown,
        "table.csv": tables.to_csv(frame),
        "table.json": to_json(tables.to_json(frame)),
        "per_question.csv": tables.to_csv(tables.per_question(runs)),
        "results.json": to_json(tables.source_results(runs)),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
        accuracy_bars(frame, out / "accuracy.png")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return [out / name for name in (*texts, "accuracy.png")]


def _replace(path: Path, content: bytes) -> None:
    """Replace a binary file's content all at once."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _bar_name(row: dict, is_baseline: bool) -> str:
    """Name a bar: model and adapter, below them the prompt, and the run where two would be alike."""
    name = tables.model_name(row["model"], row["adapter"])
    prompt = tables.clean(row["prompt"])
    notes = [prompt] if row["label"] == f"{name}_{prompt}" else [prompt, tables.clean(row["run"])]
    if is_baseline:
        notes.append("baseline")
    return "\n".join([*tables.fold(name, 36), *tables.fold(", ".join(notes), 36)])


def _family(model: str) -> str:
    """Return the letters that a model's name begins with: ``qwen``, ``phi``, ``nano``."""
    return re.match(r"[^\W\d_]*", tables.model_name(model, None))[0].lower()
