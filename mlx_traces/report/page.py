"""The report page: evaluations and trainings as one HTML file that fetches nothing. No MLX.

The page treats a model's text as data, never as markup: it is embedded as escaped JSON and shown by setting text. Its
Content-Security-Policy allows only its own script, and no requests.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import budgets, comparison, stats
from mlx_traces.readers import is_number
from mlx_traces.report import curves, export, figures, run_view, tables, terminal
from mlx_traces.report.run_view import EVALUATION, Record
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.runtime.provenance import now
from mlx_traces.tasks import thoughts
from mlx_traces.text import clean, interval, p_relation, p_text, percent, visible, whole

if TYPE_CHECKING:
    import pandas as pd

MOST_TRACES = 3000  # embedded samples of all runs together
MOST_CHARACTERS = 8_000_000  # of their texts
MOST_TEXT = 20_000  # characters of one text; its middle is left out
OVERLAID = len(figures.COLORS)  # trainings in one panel: one for each colour
TEMPLATES = Path(__file__).parent / "templates"
# What the SVG needs only as a file of its own: the namespace, and default colours.
_STANDALONE = re.compile(r""" xmlns="[^"]*"|(?<=var)(\(--\w+), \#[0-9a-f]{6}""")


@dataclass(frozen=True)
class Front:
    """The beginning of a study's page: the name of a part, its abstract, its key points, and their limits."""

    name: str
    abstract: str
    points: list[str]
    limits: str


def write(
    runs: Sequence[str | Path | comparison.Run],
    out: str | Path,
    png: str | Path | None = None,
    baseline: str | None = None,
    quality: pd.DataFrame | None = None,
    title: str | None = None,
    fronts: Sequence[Front] = (),
    baselines: Sequence[comparison.Run] = (),
) -> list[Path]:
    """Write runs as a page, and their figures as PNG.

    Evaluations of the same problems are compared; any other evaluation has a section of its own. Trainings of the same
    kind share their panels. Runs may be unfinished; the page says so.

    Args:
        runs: run folders of evaluations and trainings, folders of comparisons, or evaluations already read, in any mix.
        out: the HTML file, or a folder that gets ``report.html``; an existing page is replaced.
        png: a folder for the figures as PNG files.
        baseline: name of the run that others are compared with; default: one of ``baselines``, that of the
            comparison's folder, or the first run of each set of problems.
        quality: from `pipelines.quality.compare_quality`; shown with the evaluations of those runs.
        title: title of the page; default: the number of runs and their tasks.
        fronts: what to show before everything else.
        baselines: those of the ``runs`` that others of the same problems are compared with.

    Returns:
        The files: the page first.

    Raises:
        UserError: if there are no runs, one cannot be read, or the files cannot be written.
    """
    if not runs:
        raise UserError("there are no runs to report; name at least one run folder")
    given, baselines = [], list(baselines)
    for run in (Path(run) if isinstance(run, str) else run for run in runs):
        if isinstance(run, Path) and (run / export.PROVENANCE).exists():
            compared, base = export.read(run)
            given += compared
            baselines.append(compared[base])
        else:
            given.append(run)
    records = [
        Record(Path(*run.folders[:1] or [run.name]), EVALUATION, run.about, [], run.samples, run.result, run)
        if isinstance(run, comparison.Run)
        else run_view.read(run)
        for i, run in enumerate(given)
        if run not in given[:i]
    ]
    page = Page(quality)
    sections = [*page.comparisons(records, baseline, baselines), *page.trainings(records)]
    html = render(sections, records, title, fronts)
    out = Path(out)
    file = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, html)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another --out") from None
    if png is None:
        return [file]
    try:
        Path(png).mkdir(parents=True, exist_ok=True)
        for name, draw in page.pictures.items():
            figures.save(draw(), Path(png) / name)
    except OSError as error:
        raise UserError(f"{png}: cannot be written ({error.strerror}); choose another --png") from None
    return [file, *(Path(png) / name for name in page.pictures)]


@cache
def _template() -> Template:
    """Return the page's template, compiled."""
    environment = Environment(
        loader=PackageLoader("mlx_traces.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.globals |= {"colors": len(figures.COLORS), "looks": len(figures.LOOKS)}
    environment.filters |= {
        "percent": percent,
        "interval": lambda row, name="ci": interval(row[f"{name}_low"], row[f"{name}_high"]),
        "p": p_text,
    }
    return environment.get_template("report.html")


def render(
    sections: Sequence[dict[str, Any]],
    records: Sequence[Record],
    title: str | None = None,
    fronts: Sequence[Front] = (),
) -> str:
    """Fill in the page's template. The default title is the number of runs and their tasks."""
    tasks = [record.settings.get("task") or (record.result or {}).get("task") for record in records]
    names = [clean(task) for task in dict.fromkeys(task for task in tasks if isinstance(task, str))]
    title = (
        clean(title)
        if title
        else f"{len(records)} run{'s' if len(records) > 1 else ''}" + (f" on {', '.join(names)}" if names else "")
    )
    pipeline = ""
    if any(record.kind != EVALUATION for record in records):
        pipeline = _STANDALONE.sub(r"\1", (TEMPLATES / "pipeline.svg").read_text(encoding="utf-8"))
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = embedded(records)
    page = _template().render(
        title=title,
        sections=sections,
        fronts=fronts,
        pipeline=pipeline,
        runs=[_provenance(record) for record in records],
        traces=shown,
        left_out=shown["total"] - len(shown["rows"]),
        style=style,
        script=script,
        script_hash=digest,
        written=now().replace("T", " ").removesuffix("+00:00") + " UTC",
    )
    return page.encode("utf-8", "replace").decode()


class Page:
    """The sections of a page and the figures in them; a figure is drawn once for the page and once for a PNG."""

    def __init__(self, quality: pd.DataFrame | None = None) -> None:
        self.pictures: dict[str, Callable[[], Figure]] = {}
        self.quality = quality

    def picture(self, name: str, title: str, label: str, draw: Callable[[str], Figure], note: str = "") -> dict:
        """Draw a figure for the page, which has the title in HTML, and keep it for a PNG with the title in it."""
        count = sum(known.startswith(name) for known in self.pictures)
        file = f"{name}-{count + 1}.png" if count else f"{name}.png"
        self.pictures[file] = lambda: draw(title)
        return {"title": title, "svg": figures.svg(draw(""), label), "note": note, "last": ""}

    def comparisons(
        self, records: Sequence[Record], baseline: str | None = None, others: Sequence[comparison.Run] = ()
    ) -> list[dict[str, Any]]:
        """Return a section for the evaluations of each set of problems; unfinished ones have one each.

        The baseline of a set is the run named ``baseline``, else the first run that is one of ``others``, else the
        first run.

        Raises:
            UserError: if a finished evaluation is damaged, or no run is named ``baseline``.
        """
        groups: dict[Any, list[comparison.Run]] = {}
        states: dict[Any, str | None] = {}
        empty = []
        for i, record in enumerate(records):
            if record.kind != EVALUATION:
                continue
            run, finished = evaluated(record), record.result is not None
            if not run.samples:
                state = terminal.state(record)
                text = f"{state[:1].upper()}{state[1:]}." if record.lost else "No sample is finished."
                section = {"kind": "empty", "title": record.name, "text": text, "notes": []}
                empty.append(section | {"state": None if record.lost else state})
                continue
            problems = frozenset(row["id"] for row in run.samples)
            key = (run.result.get("task"), problems) if finished else i
            groups.setdefault(key, []).append(run)
            states[key] = None if finished else terminal.state(record)
        names = [run.name for group in groups.values() for run in group]
        if baseline is not None and baseline not in names:
            raise unknown("baseline", baseline, names) if names else UserError("there is no evaluation to compare with")
        sections = []
        for key, group in groups.items():
            chosen = [i for i, run in enumerate(group) if run.name == baseline]
            chosen += [i for i, run in enumerate(group) if run in others]
            first = next(iter(chosen), 0)
            sections.append(self.comparison(group, first, states[key]))
        return [*sections, *empty]

    def comparison(self, runs: list[comparison.Run], baseline: int, state: str | None) -> dict[str, Any]:
        """Return the section of the evaluations of one set of problems."""
        frame = comparison.compare_runs(runs, baseline)
        protocol = tables.protocol_line(frame)
        rows = _rows(frame, runs, baseline)
        several = len(runs) > 1
        said = "; ".join(f"{row['name']} {row['notes']} {percent(row['accuracy'])} %" for row in rows)
        charts = [
            self.picture(
                "accuracy",
                "Accuracy",
                f"Accuracies: {said}",
                lambda title: figures.accuracy(frame, title and f"{title}: {protocol}"),
                "The dashed line is the baseline's accuracy." if several else "",
            )
        ]
        if several:
            base = f"{rows[baseline]['name']}, {rows[baseline]['notes']}"
            pairs = [
                {
                    "name": row["name"],
                    "notes": f"{percent(row['diff'], signed=True)} points {interval(row['diff_low'], row['diff_high'])}"
                    f", p {p_relation(row['p_value'])}",
                    "won": row["wins"],
                    "lost": row["losses"],
                }
                for i, row in enumerate(rows)
                if i != baseline
            ]
            charts.append(
                self.picture(
                    "wins",
                    "Problems won and lost",
                    "; ".join(f"{row['name']} won {row['won']} and lost {row['lost']}" for row in pairs),
                    lambda title: figures.wins(pairs, title and f"{title} against {base}"),
                    f"Against {base}; problems that both get right or both get wrong are left out.",
                )
            )
        for name, title, parts, note in (
            ("difficulty", "Accuracy by difficulty", comparison.strata(runs), ""),
            ("extractors", "Accuracy by extractor", comparison.extractors(runs), _agreement(runs)),
        ):
            if parts is not None:
                charts.append(
                    self.picture(
                        name,
                        title,
                        "; ".join(
                            f"{row['label']}, {row['part']}: {percent(row['accuracy'])} %"
                            for row in parts.to_dict("records")
                        ),
                        lambda title, parts=parts: figures.parts(parts, title),
                        note,
                    )
                )
        quality = None
        if self.quality is not None and set(self.quality["run"]) <= {run.name for run in runs}:
            headings, cells = tables.quality_cells(self.quality)
            quality = {"headings": headings, "rows": cells, "note": tables.quality_caption(self.quality)}
        charts += self.budgets(runs)
        task = clean(runs[0].result.get("task") or "task")
        task = task[:1].upper() + task[1:]
        return {
            "kind": "comparison" if several else "evaluation",
            "title": f"{task}: {len(runs)} runs on the same problems" if several else f"{task}: {rows[0]['name']}",
            "state": state,
            "protocol": protocol,
            "summary": _summary(rows, baseline) if several else "",
            "stopped": frame.attrs.get("stopped", ""),
            "rows": rows,
            "at_k": [key for key in frame.columns if key.startswith(tables.AT_K) and key[-2:] not in ("@1", "^1")],
            "several": several,
            "quality": quality,
            "warnings": comparison.differences(runs),
            "notes": [f"{run.name}: {note}" for run in runs for note in run_view.notes_of(run.result)],
            "charts": charts,
            "caption": tables.how_to_read(frame),
        }

    def budgets(self, runs: list[comparison.Run]) -> list[dict[str, Any]]:
        """Return the figures of runs that differ in the budget of a thought, with a sentence on each curve."""
        found = budgets.curves(runs)
        note = " ".join(budgets.sentence(curve) for curve in found)
        label = "; ".join(
            f"{curve.name}, {budgets.budget_name(point.budget)}: {percent(point.accuracy)} %"
            for curve in found
            for point in curve.points
        )
        titles = {"budget": "Accuracy by budget of thought", "tokens": "Accuracy by tokens really used"}
        return [
            self.picture(f"accuracy-by-{by}", title, label, partial(figures.budgets, found, by), note)
            for by, title in titles.items()
            if any(getattr(point, by) is not None for curve in found for point in curve.points)
        ]

    def trainings(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Return sections for the trainings of each kind, at most ``OVERLAID`` trainings in one."""
        sections = []
        for kind in (run_view.REINFORCEMENT, run_view.FINE_TUNING):
            runs = [record for record in records if record.kind == kind]
            for at in range(0, len(runs), OVERLAID):
                sections.append(self.training(kind, runs[at : at + OVERLAID], at))
        return sections

    def training(self, kind: str, runs: Sequence[Record], first: int) -> dict[str, Any]:
        """Return a section of trainings of one kind: their results, and a panel for each metric.

        ``first`` is the number of trainings in the sections before; colours go on from there.
        """
        metrics: dict[str, list[tuple[int, curves.Curve]]] = {}
        for i, run in enumerate(runs):
            for curve in curves.curves(run):
                metrics.setdefault(curve.metric.key, []).append((i, curve))
        order = [metric.key for metric in curves.METRICS]
        keys = sorted(metrics, key=lambda key: order.index(key) if key in order else len(order))
        panels, constant = [], []
        for key in keys:
            lines, metric = metrics[key], metrics[key][0][1].metric
            if all(curve.constant for _, curve in lines) and len({curve.values[0] for _, curve in lines}) == 1:
                constant.append(f"{metric.title} {lines[0][1].text(lines[0][1].values[0])}")
                continue
            drawn = [figures.Line(runs[i].name, c.steps, c.values, first + i, c.low, c.high) for i, c in lines]
            ends = [f"{runs[i].name}: {c.text(c.values[0])} to {c.text(c.values[-1])}" for i, c in lines]
            plain = re.sub(r"[^A-Za-z0-9]", "-", key).strip("-").lower()[:60] or "metric"
            name = f"{kind.split()[0]}-{plain}"
            draw = lambda title, drawn=drawn, share=metric.share: figures.panel(drawn, share, title)  # noqa: E731
            picture = self.picture(name, metric.title, f"{metric.title}, {'; '.join(ends)}", draw)
            picture["last"] = lines[0][1].text(lines[0][1].values[-1]) if len(lines) == 1 else ""
            panels.append(picture)
        rows = [training_row(first + i, run) for i, run in enumerate(runs)]
        return {
            "kind": "training",
            "state": None,
            "title": f"{kind[0].upper()}{kind[1:]}: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
            "rows": rows,
            "headings": [name for name in rows[0]["cells"] if any(row["cells"][name] != "–" for row in rows)],
            "panels": panels,
            "constant": constant,
            "notes": [f"{run.name}: {note}" for run in runs for note in run.notes],
        }


# ------------------------------------------------------------------------------------------------ evaluations


def evaluated(record: Record) -> comparison.Run:
    """Return an evaluation in the form that a comparison reads; an unfinished one with its complete problems only.

    Raises:
        UserError: if result.json lacks what a comparison needs.
    """
    if record.run is not None:
        return record.run
    if record.result is not None:
        if missing := [key for key in ("model", "prompt") if key not in record.result]:
            raise UserError(f"{record.path}: result.json lacks {', '.join(missing)}; evaluate it anew")
        return comparison.Run(record.name, record.result, record.samples, record.about)
    settings = record.settings
    prompt = settings.get("prompt")
    size = run_view.whole(settings.get("samples")) or 1
    counts = Counter(row["id"] for row in record.samples)
    keys = ("model", "adapter", "task", "split", "max_tokens", "temperature")
    result = {key: settings.get(key) for key in keys} | {"samples_per_problem": size}
    result["model"] = str(result["model"])
    result["prompt"] = str(prompt.get("name") if isinstance(prompt, dict) else prompt)
    result["extractor"] = next((next(iter(row["verdicts"]), None) for row in record.samples), None)
    return comparison.Run(
        record.name, result, [row for row in record.samples if counts[row["id"]] == size], record.about
    )


def _rows(frame: pd.DataFrame, runs: Sequence[comparison.Run], baseline: int) -> list[dict[str, Any]]:
    """Return the comparison's rows with names, colours and paired counts."""
    rows = []
    for i, row in enumerate(frame.to_dict("records")):
        name, notes = figures.row_name(row)
        pair = comparison.paired(runs[i], runs[baseline]) if i != baseline else {"wins": 0, "losses": 0}
        speed = row["tokens_per_second"]
        rows.append(
            {
                **row,
                "wins": pair["wins"],
                "losses": pair["losses"],
                "name": name,
                "notes": notes,
                "n": tables.n_text(row),
                "color": i,
                "baseline": i == baseline and len(runs) > 1,
                "tokens": whole(row["tokens_per_answer"]),
                "speed": whole(speed if isinstance(speed, int | float) else None),
            }
        )
    return rows


def _summary(rows: Sequence[dict[str, Any]], baseline: int) -> str:
    """Return a sentence: which run is highest, and how it differs from the baseline."""
    base = rows[baseline]
    best = max(rows, key=lambda row: (row["accuracy"], row is base))
    share = f"{percent(best['accuracy'])} %"
    names = [f"{row['name']} ({row['notes']})" for row in (best, base)]
    if best is base:
        return f"No run is above the baseline, {names[1]}, at {share} of {best['n']}."
    sure = "" if best["p_holm"] < stats.LEVEL else ", not significant"
    return (
        f"{names[0]} is highest with {share} of {best['n']}: {percent(best['diff'], signed=True)} points "
        f"{interval(best['diff_low'], best['diff_high'])} over {names[1]}, {best['wins']:,} won and "
        f"{best['losses']:,} lost, Holm-adjusted p {p_relation(best['p_holm'])}{sure}."
    )


def _agreement(runs: Sequence[comparison.Run]) -> str:
    """Return a sentence that says how often all extractors agree on a completion, for each run."""
    parts = []
    for run, name in zip(runs, comparison.labels(runs), strict=True):
        alike = sum(len({verdict == "correct" for verdict in row["verdicts"].values()}) == 1 for row in run.samples)
        parts.append(f"{name} {percent(alike / len(run.samples))} %")
    return f"Completions that all extractors judge the same, correct or not: {', '.join(parts)}."


# ------------------------------------------------------------------------------------------------ trainings


def training_row(i: int, run: Record) -> dict[str, Any]:
    """Summarize a training; ``cells`` by heading."""
    result, found = run.result or {}, {curve.metric.key: curve for curve in curves.curves(run)}
    adapter = run.settings.get("adapter")

    def ends(key: str) -> str:
        if (curve := found.get(key)) is None:
            return "–"
        return " → ".join(dict.fromkeys([curve.text(curve.values[0]), curve.text(curve.values[-1])]))

    held_out = found.get("valid/accuracy") or found.get("valid/loss")
    best, speed = (value if is_number(value := result.get(key)) else None for key in ("best_step", "tokens_per_second"))
    memory = found.get("memory/peak_gb")
    return {
        "name": run.name,
        "notes": comparison.model_name(
            str(run.settings.get("model", "–")), adapter if isinstance(adapter, str) else None
        ),
        "color": i,
        "baseline": False,
        "finished": run.result is not None,
        "state": terminal.state(run).removeprefix("finished, "),
        "cells": {
            "held out": ends(held_out.metric.key) if held_out else "–",
            "best": held_out.text(held_out.best) if held_out else "–",
            "kept step": "–" if best is None else f"{best:,}",
            "reward": ends("reward/mean"),
            "loss": ends("loss") if run.kind == run_view.FINE_TUNING else "–",
            "tokens": ends("rollout/length"),
            "tokens/s": f"{speed:,.0f}" if speed else "–",
            "memory": f"{max(memory.values):.2f} GB" if memory else "–",
        },
    }


def _provenance(record: Record) -> dict[str, Any]:
    """Return how a run was made, for the end of the page."""
    about = record.about
    backend, server, versions = (
        value if isinstance(value := about.get(key), dict) else {} for key in ("backend", "server", "versions")
    )
    items = {
        "folder": str(record.path),
        "kind": record.kind,
        "state": terminal.state(record),
        "command": about.get("command"),
        "started": about.get("started"),
        "device": backend.get("description"),
        "server": server.get("url"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "revision": about.get("git_revision"),
    }
    prompt = record.settings.get("prompt")
    return {
        "name": record.name,
        "rows": {name: visible(str(value)) for name, value in items.items() if value},
        "prompt": visible(str(prompt.get("user") or "")) if isinstance(prompt, dict) else "",
        "settings": visible(to_json(record.settings)),
    }


# ------------------------------------------------------------------------------------------------ traces


def embedded(records: Sequence[Record]) -> dict[str, Any]:
    """Return the samples that the page holds, as JSON values, evenly from all runs up to a limit.

    An evaluation gives its first problems, so evaluations of the same problems give the same ones. A training gives
    lines spread over its steps. ``total`` is the number of all samples.
    """
    total = sum(len(record.samples) for record in records)
    quota = MOST_TRACES // max(1, sum(bool(record.samples) for record in records))
    while True:
        rows = [_trace(row, number) for number, record in enumerate(records) for row in _chosen(record, quota)]
        if quota <= 1 or sum(len(str(value)) for row in rows for value in row.values()) <= MOST_CHARACTERS:
            break
        quota //= 2
    return {"runs": [record.name for record in records], "rows": rows, "total": total}


def _chosen(record: Record, most: int) -> list[dict[str, Any]]:
    rows, count = record.samples, len(record.samples)
    if count <= most:
        return rows
    if record.kind == EVALUATION:
        return rows[:most]
    return [rows[round(i * (count - 1) / max(1, most - 1))] for i in range(most)]


def _trace(row: dict[str, Any], run: int) -> dict[str, Any]:
    """Return one sample for the page; keys without a value are left out."""
    thought, solution = thoughts.parts(marked(str(row.get("completion", "")), row.get("forced")))
    rewards = row.get("rewards")
    parts = {clean(name): value for name, value in rewards.items()} if isinstance(rewards, dict) else {}
    verdict = row.get("verdict")
    if verdict is None and isinstance(parts.get("correct"), int | float):
        verdict = "correct" if parts["correct"] == 1 else "not correct"
    values = {
        "run": run,
        "id": _text(row.get("id")),
        "sample": _figure(row.get("sample")) or None,
        "step": _figure(row.get("step")),
        "kind": _text(row.get("kind")),
        "question": _text(row.get("question")),
        "thought": _text(thought),
        "solution": _text(solution),
        "reference": _text(row.get("trace")),
        "verdict": _text(verdict) or "not judged",
        "extracted": _text(row.get("extracted")),
        "gold": _text(row.get("gold")),
        "tokens": _figure(row.get("tokens")),
        "cut": row.get("finish_reason") == "length" or None,
        "forced": bool(row.get("forced")) or None,
        "reward": _figure(row.get("reward")),
        "rewards": {name: _figure(value) for name, value in parts.items()} or None,
        "stratum": _text(row.get("stratum")),
    }
    return {name: value for name, value in values.items() if value is not None}


def marked(text: str, forced: Any) -> str:
    """Return a completion with its forced text, which was not sampled, in brackets: ``⟦Wait⟧``.

    A closing tag that the budget forced has a note in brackets before it instead.
    """
    spans = forced if isinstance(forced, list | tuple) else ()
    spans = [s for s in spans if isinstance(s, list | tuple) and len(s) == 2 and all(type(at) is int for at in s)]
    parts, done = [], 0
    for start, end in sorted(spans):
        if not done <= start <= end:  # a damaged file
            continue
        put = text[start:end]
        closed = next((tag for tag in thoughts.tags(put) if tag.lastgroup == "close"), None)
        if closed is None:
            shown = f"⟦{put}⟧"
        else:  # what follows the tag is the text of think_then, after line feeds
            then = put[closed.end() :].lstrip()
            after = put[closed.start() : len(put) - len(then)] + (f"⟦{then}⟧" if then else "")
            shown = f"{put[: closed.start()].rstrip()}\n⟦closed here by the budget⟧\n{after}"
        parts += [text[done:start], shown]
        done = end
    return "".join([*parts, text[done:]])


def _figure(value: Any) -> float | None:
    return round(value, 4) if is_number(value) else None


def _text(value: Any) -> str | None:
    """Return a text for the page, without its middle if it is very long; None for an empty one."""
    if value is None or value == "":
        return None
    text = str(value)
    if len(text) > MOST_TEXT:
        half = MOST_TEXT // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
    return visible(text)
