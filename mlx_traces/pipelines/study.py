"""Studies: every model in every prompt on the same problems, and a test of each pair.

`compare` makes the missing evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from mlx_traces.config import StudyConfig, StudyModel
from mlx_traces.errors import UserError
from mlx_traces.evaluation import budgets, comparison, endpoint, evaluator
from mlx_traces.evaluation import pairs as evaluation_pairs
from mlx_traces.evaluation.budgets import Curve
from mlx_traces.evaluation.comparison import Run
from mlx_traces.evaluation.pairs import Pair, bits_frame, sentence
from mlx_traces.models import convert, names
from mlx_traces.pipelines import compare, quality
from mlx_traces.pipelines.compare import Entry
from mlx_traces.report import export, figures, page, tables, terminal
from mlx_traces.report.tables import (
    bits_cells,
    bits_table,
    budgets_cells,
    cells_to_markdown,
    pairs_cells,
    pairs_frame,
    summary_cells,
)
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd


OPTIONAL = ("strata.csv", "pairs.csv", "bits.csv", "bits-*.csv", "budgets.csv", "accuracy-by-*.png")  # files


@dataclass(frozen=True)
class Layout:
    """The plan of one task of a study: its evaluations, the baseline's row, and notes on models that are left out."""

    name: str
    entries: list[Entry]
    plans: list[evaluator.Plan]
    baseline: int
    notes: list[str]


@dataclass(frozen=True)
class Part:
    """The runs of one task of a study, in the tables' order, with the baseline's index and their tables.

    ``bits`` has a data frame for every model and prompt that was evaluated at several bits.
    """

    name: str
    runs: list[Run]
    baseline: int
    comparison: pd.DataFrame
    summary: pd.DataFrame
    pairs: list[Pair]
    bits: list[pd.DataFrame]
    notes: list[str]

    @cached_property
    def scope(self) -> str:
        """What the sentences on pairs speak of."""
        recipes = any(run.trainings > 1 for run in self.runs)
        several = (self.comparison["samples_per_problem"] > self.comparison["trainings"]).any()
        row = "one model, or several trainings of one recipe," if recipes else "one model"
        return (
            f"Each row is {row} answering {'several times' if several else 'once'}, greedily or from one seed: it says "
            f"nothing about another {'recipe' if recipes else 'training run'}, prompt or token cap. Each interval of a "
            "difference covers 95 % by itself; the p-values after Holm allow for all pairs of a table."
        )

    @cached_property
    def curves(self) -> list[Curve]:
        """Accuracy by budget of thought, of each model and prompt that was evaluated with several budgets."""
        return budgets.curves(self.runs)


def budgeted(config: StudyConfig) -> list[StudyModel]:
    """Return the study's models, each with each of its budgets of thought.

    Raises:
        UserError: for a model with a budget of its own.
    """
    if not config.budgets:
        return config.models
    for place, model in enumerate(config.models):
        if "think_tokens" in model.settings:
            raise UserError(f"models.{place}.settings: 'think_tokens' is filled in by budgets; leave it out")
    return [
        model.model_copy(update={"settings": model.settings | {"think_tokens": budget}})
        for model in config.models
        for budget in dict.fromkeys(config.budgets)
    ]


def lay_out(config: StudyConfig) -> list[Layout]:
    """Check the whole study and plan it, task by task; nothing is written.

    Raises:
        UserError: for a wrong setting, a missing model, bad problems, models with different problems, and a baseline
            that is no row of a task.
    """
    found, config = [], config.model_copy(update={"models": budgeted(config)})
    for place, task in enumerate(config.tasks):
        before = sum(other.task == task.task for other in config.tasks[:place])
        name = f"{task.task}-{before + 1}" if before else task.task
        own, notes = compare.entries(config, task)
        if config.stop_when_decided:
            compare.check_stopping(config, own)
        plans = compare.plans_of(own)
        rows = {(plan.label, entry.conversion, plan.extractor) for plan, entry in zip(plans, own, strict=True)}
        if config.stop_when_decided and len(rows) < len(plans):
            raise UserError(
                f"tasks.{place}: two rows are the same evaluation, so their difference is never decided; leave out one "
                "of them, or stop_when_decided"
            )
        found.append(Layout(name, own, plans, _baseline(config, f"tasks.{place}", own, plans), notes))
    return found


def _baseline(config: StudyConfig, where: str, found: list[Entry], plans: list[evaluator.Plan]) -> int:
    """Find the baseline among a task's evaluations before they are made."""
    try:
        return comparison.baseline_index(compare.outlines(found, plans), config.baseline or 0)
    except UserError as error:
        raise UserError(f"{where}: {error}" if len(config.tasks) > 1 else str(error)) from None


def preview(config: StudyConfig) -> Iterator[str]:
    """Yield a line for each evaluation and conversion, finished or not; run none.

    Raises:
        UserError: as `lay_out` does.
    """
    converted = set()
    for part in lay_out(config):
        yield from part.notes
        for entry, planned in zip(part.entries, part.plans, strict=True):
            wanted = entry.conversion
            if wanted is not None and wanted.path not in converted:
                converted.add(wanted.path)
                yield f"{'finished  ' if entry.ready else 'to convert'} {wanted.path}"
            if not entry.ready:
                yield f"to make    {planned.task.name}, {wanted.label}, {planned.prompt.name}, once it is converted"
                continue
            path = Path(config.runs_dir) / planned.label
            state = "finished  " if RunFolder(path).finished else "to finish " if path.exists() else "to make   "
            state = "begun     " if config.stop_when_decided and path.exists() else state
            yield f"{state} {path}"


def run(config: StudyConfig, say: Callable[[str], None] = lambda line: None, progress: bool = False) -> list[Part]:
    """Run a study: convert models, make missing evaluations, compute the tables, and write the files (`write`).

    Args:
        config: the study.
        say: gets a line before each conversion, and for each model that is left out.
        progress: show progress bars on stderr.

    Raises:
        UserError: if the input is wrong; `lay_out` checks it before the first evaluation.
    """
    parts = []
    for layout in lay_out(config):
        for note in layout.notes:
            say(note)
        if config.stop_when_decided:
            base = layout.baseline if config.pairs == "baseline" else None
            runs = compare.until_decided(config, layout.entries, layout.plans, base, progress, say, config.apart)
        else:
            runs = compare.make(layout.entries, layout.plans, config.runs_dir, say, progress, config.apart)
        parts.append(computed(config, layout, runs))
    write(config, parts)
    return parts


def computed(config: StudyConfig, layout: Layout, runs: list[Run]) -> Part:
    """Compute the tables of one task."""
    found = [layout.entries[row[0]] for row in compare.rows(layout.entries)]
    runs = comparison.clustered(compare.joined(layout.entries, runs), config.cluster)
    frame = comparison.compare_runs(runs, layout.baseline)
    frame["true_equations"] = [quality.true_equations(one) for one in runs]
    chosen = evaluation_pairs.pairs(runs, layout.baseline if config.pairs == "baseline" else None)
    about = [weights_of(config, entry, made) for entry, made in zip(found, runs, strict=True)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, entry in enumerate(found):
        same = entry.config.model, entry.config.adapter, entry.config.prompt, entry.config.think_tokens
        groups.setdefault(same, []).append(i)
    several = [group for group in groups.values() if len(group) > 1 and any(found[i].conversion for i in group)]
    bits = [bits_frame([runs[i] for i in group], [about[i] for i in group]) for group in several]
    notes = [*layout.notes, *comparison.differences(runs)]
    for model in dict.fromkeys(entry.conversion.model for entry in found if entry.conversion):
        if stored := convert.origin(model):
            notes.append(
                f"{model} comes with {stored['bits']}-bit weights, and its 16-bit model is these weights expanded: the "
                "table shows the cost of rounding once more, not of the first rounding; for that, start from a model's "
                "16-bit weights"
            )
    return Part(layout.name, runs, layout.baseline, frame, evaluation_pairs.summary(runs), chosen, bits, notes)


def weights_of(config: StudyConfig, entry: Entry, made: Run) -> dict[str, Any]:
    """Describe a run's weights, on disk and as computed with."""
    stored = RunFolder(Path(config.runs_dir) / made.name).about
    folder = entry.conversion.path if entry.conversion else None
    loaded = not endpoint.behind(entry.config)
    if loaded and folder is None:
        folder = names.local_folder(entry.config.model)
    blank = dict.fromkeys(("bits", "group_size", "bits_per_weight", "file_mb"))
    facts = convert.describe(folder) if folder else blank
    identity, backend = stored["identity"], stored.get("backend") or {}
    if not loaded:
        return {**facts, "ran_as": f"as served at {entry.config.endpoint}"}
    kind = "dense" if facts["bits"] and facts["group_size"] is None else identity.get("weights")
    return {**facts, "ran_as": f"{kind} {identity.get('dtype') or 'as in the folder'} on {backend.get('name')}"}


def write(config: StudyConfig, parts: list[Part]) -> None:
    """Write a study's files into ``config.out``, or a folder per task there if it has several.

    These are the files of a comparison (`export.write_all`), ``study.md`` and ``study.json`` with everything, and, if
    they have rows, ``summary.csv``, ``strata.csv``, ``pairs.csv``, ``bits.csv`` and ``budgets.csv`` with two figures;
    those of an earlier study are removed.
    ``report.html`` in ``config.out`` itself shows all runs.

    Raises:
        UserError: if the folder cannot be written.
    """
    if config.out is None:
        return
    for part in parts:
        folder = Path(config.out) / part.name if len(parts) > 1 else Path(config.out)
        export.write_all(part.runs, part.comparison, folder, config.model_dump(mode="json"))
        frames = {"summary": part.summary, "strata": comparison.strata(part.runs)}
        frames |= {"pairs": pairs_frame(part.pairs)} if part.pairs else {}
        frames |= {"budgets": budgets.frame(part.curves)} if part.curves else {}
        frames |= {f"bits{f'-{i}' if i > 1 else ''}": frame for i, frame in enumerate(part.bits, start=1)}
        try:
            for old in (path for pattern in OPTIONAL for path in folder.glob(pattern)):
                old.unlink()
            for name, frame in frames.items():
                if frame is not None:
                    write_atomic(folder / f"{name}.csv", tables.to_csv(frame))
            for by in ("budget", "tokens") if part.curves else ():
                picture = figures.budgets(part.curves, by, f"{config.name}: {part.name}")
                figures.save(picture, folder / f"accuracy-by-{by}.png")
            write_atomic(folder / "study.md", to_markdown(config.name, part))
            write_atomic(folder / "study.json", to_json(as_json(config.name, part)))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    fronts = [page.Front(part.name, *front_of(part), part.scope) for part in parts]
    runs, baselines = [run for part in parts for run in part.runs], [part.runs[part.baseline] for part in parts]
    page.write(runs, config.out, title=config.name, fronts=fronts, baselines=baselines)


def front_of(part: Part) -> tuple[str, list[str]]:
    """Return a part's abstract, with how it ended if it could stop early, and its key points."""
    abstract = evaluation_pairs.abstract(part.runs, part.pairs, tables.protocol_line(part.comparison))
    abstract += f" {part.runs[0].stopped}" if part.runs[0].stopped else ""
    return abstract, evaluation_pairs.key_points(part.runs, part.pairs)


def to_markdown(name: str, part: Part) -> str:
    """Return a part as a Markdown page: abstract, key points, tables, a sentence on each pair, notes."""
    abstract, points = front_of(part)
    sections = [("Abstract", f"{tables.escape_markdown(abstract)}\n")]
    if points:
        sections.append(("Key points", f"{tables.bullets(points)}\n{part.scope}\n"))
    sections.append(("Summary", cells_to_markdown(summary_cells(part.summary))))
    sections.append(("Comparison", tables.to_markdown(part.comparison)))
    if (strata := comparison.strata(part.runs)) is not None:
        sections.append(("By stratum", cells_to_markdown(tables.parts_cells(strata))))
    if part.pairs:
        pairs = cells_to_markdown(pairs_cells(part.pairs))
        sections.append(("Pairs", f"{pairs}\n{tables.bullets(said(part))}\n{part.scope}\n"))
    for curve in part.curves:
        lines = f"{cells_to_markdown(budgets_cells(curve))}\n{tables.escape_markdown(budgets.sentence(curve))}\n"
        sections.append((f"Budgets: {tables.escape_markdown(curve.name)}", lines))
    if part.curves:
        pictures = [f"![Accuracy by {by}](accuracy-by-{by}.png)\n" for by in ("budget", "tokens")]
        sections.append(("Budgets: curves", "".join(pictures)))
    for frame in part.bits:
        sections.append(("Bits", f"{cells_to_markdown(bits_cells(frame))}\n{tables.escape_markdown(ran_as(frame))}\n"))
    if part.notes:
        sections.append(("Notes", tables.bullets(part.notes)))
    return f"# {name}: {part.name}\n" + "".join(f"\n## {title}\n\n{text}" for title, text in sections)


def to_terminal(part: Part) -> list[RenderableType]:
    """Return a part's tables, plots and lines for a terminal, in order."""
    shown: list[RenderableType | None] = [
        tables.grid(f"{part.name}: summary", *summary_cells(part.summary)),
        tables.to_terminal(part.comparison),
        tables.strata_table(part.runs),
    ]
    if part.pairs:
        shown.append(tables.pairs_table(part.pairs))
        shown += [*said(part), part.scope]
    for curve in part.curves:
        table = tables.grid(f"budgets: {curve.name}", *budgets_cells(curve))
        shown += [table, terminal.budget_plots(curve), budgets.sentence(curve)]
    for frame in part.bits:
        shown += [bits_table(frame, "bits"), ran_as(frame)]
    return [item for item in (*shown, *(f"note: {note}" for note in part.notes)) if item is not None]


def said(part: Part) -> list[str]:
    """Return a sentence on each pair."""
    return [sentence(pair) for pair in part.pairs]


def ran_as(frame: pd.DataFrame) -> str:
    """Say which weights computed the answers in a table of bits; speed and memory depend on them."""
    kinds: dict[str, list[str]] = {}
    for row in frame.to_dict("records"):
        kinds.setdefault(row["ran_as"], []).append(row["label"])
    text = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    text = f"{next(iter(kinds))} in every row" if len(kinds) == 1 else text
    dense = all(kind.startswith("dense") for kind in kinds)
    extra = " Expanded weights cost the same whatever their bits: speed and memory cannot differ here." if dense else ""
    return f"Weights that computed the answers: {text}.{extra} File: weights on disk; peak: of the whole process."


def as_json(name: str, part: Part) -> dict[str, Any]:
    """Return a part as plain data; missing values are None."""
    strata = comparison.strata(part.runs)
    abstract, points = front_of(part)
    return {
        "study": name,
        "abstract": abstract,
        "key_points": points,
        "task": part.name,
        "protocol": tables.protocol_line(part.comparison),
        "runs": [run.name for run in part.runs],
        "summary": tables.records(part.summary),
        "comparison": tables.to_json(part.comparison)["rows"],
        "stopped": part.runs[0].stopped or None,
        "strata": [] if strata is None else tables.records(strata),
        "pairs": tables.records(pairs_frame(part.pairs)) if part.pairs else [],
        "budgets": [
            {
                **asdict(curve),
                "pairs": tables.records(pairs_frame(curve.pairs)),
                "sentence": budgets.sentence(curve),
            }
            for curve in part.curves
        ],
        "bits": [tables.records(frame) for frame in part.bits],
        "notes": part.notes,
    }
