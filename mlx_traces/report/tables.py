"""Tables of comparisons and studies, in every output format. No MLX.

Accuracies, intervals and differences are fractions in frames, CSV and JSON, and percent in the terminal, Markdown and
figures. Differences and p-values pair the runs problem by problem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from mlx_traces.evaluation.budgets import Curve, budget_name
from mlx_traces.evaluation.comparison import JSON_KEYS, Run, extractors, model_name, strata
from mlx_traces.evaluation.pairs import Pair, sentence
from mlx_traces.text import clean, fold, interval, p_text, percent, times, visible, whole

if TYPE_CHECKING:
    import pandas as pd


_FORMULA_START = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER = re.compile(r"[+-]?(\d[\d,]*(\.\d*)?|\.\d+)([eE][+-]?\d+)?%?")
_MARKDOWN_SYNTAX = str.maketrans({c: f"\\{c}" for c in "\\`*[]<>|~"})


Cells = tuple[list[str], list[list[str]]]  # headings, rows
MOST_COLUMNS = 5  # parts of a table that stand beside each other
AT_K = ("pass@", "pass^", "maj@")  # columns of a comparison, each followed by k
TESTS = {  # of a comparison: the methods of the interval of a difference and of its p-value
    "McNemar": ("paired bootstrap", "exact McNemar test"),
    "sign-flip": ("paired bootstrap", "exact sign-flip permutation test"),
    "clusters": ("cluster-robust", "exact sign-flip permutation test of clusters"),
    "trainings": ("Student's t over trainings and problems", "the same t"),
    "anytime": ("anytime-valid by betting", "anytime-valid test"),
}


def protocol_line(frame: pd.DataFrame) -> str:
    """Return the protocol as a line: ``gsm8k test · tolerant extractor · at most 400 tokens · greedy``."""

    def values(key: str) -> str:
        return " / ".join(dict.fromkeys(clean(value) for value in frame[key]))

    greedy = all(value == 0 for value in frame["temperature"])
    parts = [
        f"{values('task')} {values('split')}",
        f"{values('extractor')} extractor",
        f"at most {values('max_tokens')} tokens",
        "greedy" if greedy else f"temperature {values('temperature')}",
    ]
    if frame["samples_per_problem"].max() > 1:
        parts.append(f"{values('samples_per_problem')} samples a problem")
    return " · ".join(parts)


def n_text(row: dict[str, Any]) -> str:
    """Return the number of problems, ``1,319``, or of problems and of samples of each, ``200 × 8``."""
    problems, samples = row["total_questions"] // row["samples_per_problem"], row["samples_per_problem"]
    return f"{problems:,}" if samples == 1 else f"{problems:,} × {samples}"


def to_terminal(frame: pd.DataFrame) -> Table:
    """Lay out the comparison for a terminal of 100 columns or more; intervals stand below their values."""
    table = Table(
        title=Text(protocol_line(frame), style="bold"),
        caption=Text(caption(frame)),
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_lines=True,
    )
    table.add_column("model", overflow="fold")
    table.add_column("prompt", max_width=8, overflow="fold")
    equations = has_equations(frame)
    last = "cut off\ntrue eq." if equations else "cut\noff"
    for heading in ("accuracy %", "correct", "difference", "p\nHolm", "tokens\nspeed", last):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        name = model_name(row["model"], row["adapter"])
        if row["label"] != f"{name}_{clean(row['prompt'])}":
            name += f" ({clean(row['run'])})"
        accuracy = f"{percent(row['accuracy'])} %\n{interval(row['ci_low'], row['ci_high'])}"
        for kind in AT_K:
            if (share := row.get(f"{kind}{row['samples_per_problem']}", math.nan)) == share:
                accuracy += f"\n{kind}{row['samples_per_problem']} {percent(share)} %"
        if row["trainings"] > 1:
            accuracy += f"\n{row['trainings']} trainings\nsd {percent(row['spread'])}"
        difference, p = "baseline", "–"
        if not math.isnan(row["diff"]):
            difference = f"{percent(row['diff'], signed=True)}\n{interval(row['diff_low'], row['diff_high'])}"
            p = f"{p_text(row['p_value'])}\n{p_text(row['p_holm'])}"
        cells = (
            "\n".join(fold(name, 23)),
            "\n".join(fold(clean(row["prompt"]), 8)),
            accuracy,
            f"{row['correct_count']:,}\nof {n_text(row)}",
            difference,
            p,
            f"{whole(row['tokens_per_answer'])}\n{whole(row['tokens_per_second'])}/s",
            f"{percent(row['truncated'])} %" + (f"\n{_share(row['true_equations'])}" if equations else ""),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def to_markdown(frame: pd.DataFrame) -> str:
    """Return the comparison as a Markdown table with its protocol above it."""
    headings = [
        "model",
        "prompt",
        "accuracy",
        "95 % interval",
        "correct",
        "n",
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
        *(["true equations"] if (equations := has_equations(frame)) else []),
        "tokens/answer",
        "tokens/s",
        "cut off",
    ]
    extra = [name for name in frame.columns if name.startswith(AT_K)]
    recipes = ["trainings", "sd"] if frame["trainings"].max() > 1 else []
    lines = []
    for row in frame.to_dict("records"):
        none = math.isnan(row["diff"])
        cells = [
            model_name(row["model"], row["adapter"]),
            clean(row["prompt"]),
            f"{percent(row['accuracy'])} %",
            interval(row["ci_low"], row["ci_high"]),
            f"{row['correct_count']:,}",
            n_text(row),
            "baseline" if none else percent(row["diff"], signed=True),
            "–" if none else interval(row["diff_low"], row["diff_high"]),
            p_text(row["p_value"]),
            p_text(row["p_holm"]),
            *([_share(row["true_equations"])] if equations else []),
            whole(row["tokens_per_answer"]),
            whole(row["tokens_per_second"]),
            f"{percent(row['truncated'])} %",
            *[str(row["trainings"]), "–" if math.isnan(row["spread"]) else percent(row["spread"])][: len(recipes)],
            *("–" if math.isnan(row[name]) else f"{percent(row[name])} %" for name in extra),
        ]
        lines.append(cells)
    table = markdown([*headings, *recipes, *extra], lines, left=2)
    return f"{escape_markdown(protocol_line(frame))}\n\n{table}\n{escape_markdown(caption(frame))}\n"


def has_equations(frame: pd.DataFrame) -> bool:
    """Whether a comparison has the share of true equations in the thoughts."""
    return "true_equations" in frame and bool(frame["true_equations"].notna().any())


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{percent(value)} %"


def to_csv(frame: pd.DataFrame) -> str:
    """Return any frame as CSV; text that a spreadsheet would run as a formula is prefixed with an apostrophe."""
    safe = frame.map(csv_cell).rename(columns=csv_cell)
    return safe.to_csv(index=False, lineterminator="\n")


def to_json(frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return the comparison as ``{"rows": [...]}``, each row with ``JSON_KEYS``; missing values are None.

    Rows also have ``true_equations`` if the comparison has them, and ``trainings`` and ``spread`` if it has recipes.
    The comparison has ``stopped`` if it may have stopped early.
    """
    keys = [*JSON_KEYS, *(("trainings", "spread") if frame["trainings"].max() > 1 else ())]
    keys += ["true_equations"] if "true_equations" in frame else []
    rows = [{key: row[key] for key in keys} for row in records(frame)]
    stopped = frame.attrs.get("stopped")
    return {"rows": rows, **({"stopped": stopped} if stopped else {})}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return any frame as plain data; missing values are None."""
    missing = (None, math.inf, -math.inf)  # and NaN, which differs from itself
    return [
        {key: None if value != value or value in missing else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]


def strata_table(runs: Sequence[Run]) -> Table | None:
    """Lay out the accuracies by stratum for a terminal; None if there are fewer than two strata."""
    frame = strata(runs)
    return None if frame is None else grid("accuracy by stratum", *parts_cells(frame))


def extractors_table(runs: Sequence[Run]) -> Table | None:
    """Lay out the accuracies by extractor for a terminal; None if there are fewer than two extractors."""
    frame = extractors(runs)
    return None if frame is None else grid("accuracy by extractor", *parts_cells(frame))


def parts_cells(frame: pd.DataFrame) -> Cells:
    """Lay out ``strata`` or ``extractors``: a row for each run, a column for each part; many parts below each other."""
    names, several = list(dict.fromkeys(frame["part"])), frame["label"].nunique() > 1
    rows: dict[str, dict[str, str]] = {}
    lines: list[list[str]] = []
    for row in frame.to_dict("records"):
        counts = f"{row['correct_count']:,} of {row['total_questions']:,}"
        figures = [f"{percent(row['accuracy'])} %", interval(row["ci_low"], row["ci_high"]), counts]
        rows.setdefault(row["label"], {})[row["part"]] = "\n".join(figures)
        part = clean(row["part"]) or "(none)"
        lines.append([f"{part}\n{row['label']}" if several else part, *figures])
    if len(names) > MOST_COLUMNS:
        return ["part\nmodel" if several else "part", "accuracy", "95 % interval", "correct"], lines
    cells = [[name, *(row.get(part, "–") for part in names)] for name, row in rows.items()]
    return ["model", *(clean(name) or "(none)" for name in names)], cells


def grid(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Table:
    """Lay out rows of cells for a terminal: the first column is a name, the others are numbers."""
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_lines=True,
    )
    for i, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
    for name, *cells in rows:
        table.add_row(Text("\n".join(line for part in name.split("\n") for line in fold(part, 34))), *map(Text, cells))
    return table


def caption(frame: pd.DataFrame) -> str:
    """Return the lines below a table: how to read it, and early stopping."""
    return "\n".join(filter(None, [how_to_read(frame), frame.attrs.get("stopped")]))


def how_to_read(frame: pd.DataFrame) -> str:
    """Return the methods of a table's figures, and the difference that it would have missed."""
    text = "95 % intervals: Wilson for an accuracy"
    if frame["trainings"].max() > 1:
        text += " (over trainings and problems where a row has several trainings)"
    elif frame["samples_per_problem"].max() > 1:
        text += " (samples of a problem clustered)"
    end = ". True equations: share of the equations in the thoughts, computed exactly." if has_equations(frame) else "."
    if frame["diff"].isna().all():
        return text + end
    base = frame.loc[frame["diff"].isna(), "label"].iloc[0]
    kinds = [TESTS[name] for name in dict.fromkeys(frame["test"].dropna())]
    intervals, tests = (" or ".join(dict.fromkeys(each)) for each in zip(*kinds, strict=True))
    text += f", {intervals} for the difference in points from {base}; p: {tests}, then Holm-adjusted{end}"
    shown = frame[frame["missed"].notna()].to_dict("records")
    found = [f"{percent(row['missed'])} points" + (f" ({row['label']})" if len(shown) > 1 else "") for row in shown]
    if found:
        problems = shown[0]["total_questions"] // shown[0]["samples_per_problem"]
        text += (
            f"\nNo difference shown: with {problems:,} problems a difference below {', '.join(found)} would have been "
            "missed half of the time or more."
        )
    return text


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Lay out a Markdown table whose first ``left`` columns are text and whose other columns are numbers."""
    lines = [
        [escape_markdown(clean(heading)) for heading in headings],
        [":--" if i < left else "--:" for i in range(len(headings))],
    ]
    lines += [[*(escape_markdown(cell) for cell in row[:left]), *row[left:]] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return text.translate(_MARKDOWN_SYNTAX)


def csv_cell(value: Any) -> Any:
    """Make text safe for spreadsheets and terminals: no formula, no control characters, nothing beyond UTF-8."""
    if not isinstance(value, str):
        return value
    text = f"'{value}" if value.startswith(_FORMULA_START) and not _NUMBER.fullmatch(value) else value
    # pandas does not quote a bare \r, and readers split at it.
    return visible(text.replace("\r\n", "\n").replace("\r", "\n"))


def pairs_frame(found: Sequence[Pair]) -> pd.DataFrame:
    """Return pairs as a frame, a row for each, with ``sentence`` as the last column."""
    import pandas as pd

    return pd.DataFrame([{**asdict(pair), "sentence": sentence(pair)} for pair in found])


def summary_cells(frame: pd.DataFrame) -> Cells:
    """Return the cells of ``summary``, with Wilson's interval."""
    rows = [
        [
            row["model"],
            f"{row['total_cases']:,}",
            f"{percent(row['success_rate'])} %",
            interval(row["ci_low"], row["ci_high"]),
            f"{row['correct']:,}",
            f"{row['incorrect']:,}",
        ]
        for row in frame.to_dict("records")
    ]
    return ["model", "total cases", "success rate", "95 % interval", "correct", "incorrect"], rows


def pairs_cells(found: Sequence[Pair]) -> Cells:
    """Lay out pairs: the two runs, wins, losses, difference and ratio with their intervals, p, Holm's p."""
    rows = [
        [
            f"{pair.a}\nagainst {pair.b}",
            f"{pair.wins:,}",
            f"{pair.losses:,}",
            percent(pair.diff, signed=True),
            interval(pair.low, pair.high),
            times(pair.ratio),
            f"[{times(pair.ratio_low)}, {times(pair.ratio_high)}]",
            p_text(pair.p),
            p_text(pair.p_holm),
        ]
        for pair in found
    ]
    return ["pair", "won", "lost", "difference", "95 % interval", "ratio", "95 % interval", "p", "p (Holm)"], rows


def pairs_table(found: Sequence[Pair]) -> Table:
    """Lay out pairs for a terminal of 80 columns; intervals stand below their values."""
    return stacked("pairs", pairs_cells(found), ((1, 2), (3, 4), (5, 6), (7, 8)))


def budgets_cells(curve: Curve) -> Cells:
    """Lay out a curve: a row for each budget."""
    rows = [
        [
            budget_name(point.budget),
            f"{percent(point.accuracy)} %",
            interval(point.low, point.high),
            whole(point.tokens),
            f"{percent(point.forced)} %",
            f"{percent(point.cut_off)} %",
        ]
        for point in curve.points
    ]
    return ["budget", "accuracy", "95 % interval", "tokens used", "forced", "cut off"], rows


def bits_cells(frame: pd.DataFrame) -> Cells:
    """Lay out ``bits_frame``, a row for each run."""
    rows = []
    for row in frame.to_dict("records"):
        base = math.isnan(row["diff"])
        rows.append(
            [
                row["label"],
                _number(row["bits"], ".0f"),
                _number(row["group_size"], ".0f"),
                _number(row["bits_per_weight"], ".2f"),
                _number(row["file_mb"], ",.2f" if row["file_mb"] and row["file_mb"] < 10 else ",.0f"),
                _number(row["peak_memory_gb"], ".2f"),
                _number(row["tokens_per_second"], ",.0f"),
                f"{percent(row['accuracy'])} %",
                interval(row["ci_low"], row["ci_high"]),
                "–" if base else percent(row["diff"], signed=True),
                "–" if base else interval(row["diff_low"], row["diff_high"]),
                p_text(row["p_value"]),
                p_text(row["p_holm"]),
            ]
        )
    headings = ["model", "bits", "group", "bits a weight", "file MB", "peak GB", "tokens/s", "accuracy"]
    return [*headings, "95 % interval", "vs most bits", "95 % interval", "p", "p (Holm)"], rows


def bits_table(frame: pd.DataFrame, title: str) -> Table:
    """Lay out ``bits_frame`` for a terminal of 100 columns; intervals stand below their values."""
    return stacked(title, bits_cells(frame), ((1, 2), (3,), (4, 5), (6,), (7, 8), (9, 10), (11, 12)))


def stacked(title: str, cells: Cells, places: Sequence[tuple[int, ...]]) -> Table:
    """Lay out cells for a terminal; each of ``places`` names the cells that one column shows below each other."""
    headings, rows = cells
    lines = [
        [
            "\n".join(line for part in row[0].split("\n") for line in fold(part, 24)),
            *("\n".join(row[i] for i in column) for column in places),
        ]
        for row in rows
    ]
    names = ["\n".join(headings[i] for i in column if "interval" not in headings[i]) for column in places]
    return grid(title, [headings[0], *names], lines)


def quality_cells(frame: pd.DataFrame) -> Cells:
    """Lay out `quality.compare_quality`: a row with each run's name, then a row for each measure.

    Scores are from 0 to 100. Below a mean stands its number of problems, below a difference its interval, below Holm's
    p-value the number of paired problems. Without any pair there are only means.
    """
    tested = bool(frame["paired"].any())
    headings = [""]
    for kind in frame["answers"].unique():
        headings += [f"mean,\n{kind}", *["difference", "p\nHolm"] * tested]
    blocks: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in frame.assign(against=frame["against"].fillna("")).to_dict("records"):
        cells = blocks.setdefault((row["label"], row["against"]), {}).setdefault(row["measure"], [])
        cells += _quality(row)[: 3 if tested else 1]
    rows: list[list[str]] = []
    for (name, against), measures in blocks.items():
        rows.append([f"{name}\nagainst {against}" if against else name, *[""] * (len(headings) - 1)])
        rows += [[measure, *cells] for measure, cells in measures.items()]
    return headings, rows


def _quality(row: dict[str, Any]) -> list[str]:
    def text(value: float, signed: bool = False) -> str:
        if row["measure"] == "reward":
            return f"{value:{'+' if signed else ''}.3f}"
        return percent(value / (100 if row["measure"] == "tokens" else 1), signed)

    mean = f"{text(row['mean'])}\n({row['problems']:,})" if row["problems"] else "–"
    if not row["paired"]:
        return [mean, "–", "–"]
    ends = f"[{text(row['diff_low'])}, {text(row['diff_high'])}]"
    return [mean, f"{text(row['diff'], signed=True)}\n{ends}", f"{p_text(row['p_holm'])}\n({row['paired']:,})"]


def quality_caption(frame: pd.DataFrame) -> str:
    """Return the line that says how to read the quality of answers."""
    text = (
        "Means over problems (in brackets: how many) of all and of correct answers: tokens, and scores of "
        "`mlx-traces score` from 0 to 100 (faithfulness: true equations; repetition: 100 where nothing is repeated)."
    )
    if "reward" in set(frame["measure"]):
        text += " reward: that of a rollout by the training's configuration."
    if frame.attrs.get("pooled"):
        text += " Trainings of a recipe are pooled: no interval or p here allows for how they vary."
    tests = [str(int((part["paired"] > 0).sum())) for _, part in frame.groupby("answers", sort=False)]
    if set(tests) == {"0"}:
        return text
    ends, p = "paired bootstrap", "exact sign-flip test"
    if frame.attrs.get("clusters"):
        ends, p = "jackknife over clusters", "exact sign-flip test of the clusters' sums"
    return (
        f"{text} Differences are over the problems where both runs have a value (for correct answers: both are right), "
        f"95 % {ends}; p: {p}, Holm-adjusted over {' and '.join(tests)} tests."
    )


def quality_table(frame: pd.DataFrame) -> Table:
    """Lay out the quality of answers for a terminal of 80 columns."""
    headings, rows = quality_cells(frame)
    table = grid("quality of the answers", headings, [], quality_caption(frame))
    table.show_lines = False
    for name, *cells in rows:
        heads = not any(cells)
        if heads:
            table.add_section()
        lines = [line for part in name.split("\n") for line in fold(part, 15)]
        table.add_row(Text("\n".join(lines), style="bold" if heads else ""), *map(Text, cells))
    return table


def quality_markdown(frame: pd.DataFrame) -> str:
    """Return the quality of answers as Markdown."""
    return f"{cells_to_markdown(quality_cells(frame))}\n{escape_markdown(quality_caption(frame))}\n"


def bullets(lines: Iterable[str]) -> str:
    """Return lines of text as a Markdown list."""
    return "".join(f"* {escape_markdown(line)}\n" for line in lines)


def cells_to_markdown(cells: Cells) -> str:
    """Return cells as a Markdown table whose first column is text."""
    headings, rows = cells
    return markdown(headings, [[cell.replace("\n", " ") for cell in row] for row in rows], left=1)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)
