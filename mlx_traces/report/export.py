"""Write a comparison to a folder, in every format, and read its runs again. No MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison
from mlx_traces.readers import read_json
from mlx_traces.report import figures, tables
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.runtime.provenance import provenance
from mlx_traces.text import clean

if TYPE_CHECKING:
    import pandas as pd

PROVENANCE = "provenance.json"


class _StoredRun(BaseModel):
    """What `write_all` stores of a run so that `read` finds it again."""

    folders: list[str] = Field(min_length=1)
    problems: int = Field(ge=1)
    result: dict[str, Any]


class _Stored(BaseModel):
    """What `write_all` stores of a comparison."""

    runs: dict[str, _StoredRun] = Field(min_length=1)
    baseline: str
    cluster: str | None
    stopped: str


def write_all(
    runs: Sequence[comparison.Run],
    frame: pd.DataFrame,
    out: Path,
    config: dict[str, Any] | None = None,
    quality: pd.DataFrame | None = None,
) -> list[Path]:
    """Write a comparison to a folder: table.md, .csv and .json, per_question.csv, results.json, accuracy.png.

    Also quality.csv, if there is such a table, and provenance.json: versions, every setting, each run's ``run.json`` by
    the run's label, and what `read` needs.

    Args:
        runs: the compared runs.
        frame: from `comparison.compare_runs`.
        out: the folder, created if needed; the files of an earlier comparison in it are replaced.
        config: all settings of the command that made the table.
        quality: the quality of the answers, from `pipelines.quality.compare_quality`.

    Returns:
        The files.

    Raises:
        UserError: if the folder cannot be written.
    """
    markdown = tables.to_markdown(frame)
    if (strata := comparison.strata(runs)) is not None:
        markdown += f"\n{tables.cells_to_markdown(tables.parts_cells(strata))}"
    if quality is not None:
        markdown += f"\n{tables.quality_markdown(quality)}"
    if warnings := comparison.differences(runs):
        markdown += f"\n{tables.bullets(warnings)}"
    labels = comparison.labels(runs)
    abouts = [
        {
            "run": run.name,
            **run.about,
            "folders": run.folders,
            "problems": len(comparison.outcomes_of(run)),
            "result": run.result,
        }
        for run in runs
    ]
    about = {
        **provenance(),
        "config": config,
        "baseline": frame.loc[frame["diff"].isna(), "label"].iloc[0],
        "cluster": (config or {}).get("cluster"),
        "stopped": runs[0].stopped,
        "runs": dict(zip(labels, abouts, strict=True)),
    }
    texts = {
        "table.md": markdown,
        "table.csv": tables.to_csv(frame),
        "table.json": to_json(tables.to_json(frame)),
        "per_question.csv": tables.to_csv(comparison.per_question(runs)),
        "results.json": to_json(comparison.source_results(runs)),
        PROVENANCE: to_json(about),
    }
    if quality is not None:
        texts["quality.csv"] = tables.to_csv(quality)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "quality.csv").unlink(missing_ok=True)  # an earlier comparison's
        for name, text in texts.items():
            write_atomic(out / name, text)
        figures.save(figures.accuracy(frame, tables.protocol_line(frame)), out / "accuracy.png")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return [out / name for name in (*texts, "accuracy.png")]


def read(folder: Path) -> tuple[list[comparison.Run], int]:
    """Read the runs of a comparison as `write_all` compared them, from their run folders; also the baseline's index.

    A run that grew since then has its first problems only.

    Raises:
        UserError: if a run is not where it was, has other problems, or the folder does not say where its runs are.
    """
    try:
        stored = _Stored.model_validate(read_json(folder / PROVENANCE))
        field = "" if stored.baseline in stored.runs else "baseline"
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
    if field:
        raise UserError(
            f"{folder / PROVENANCE}: {clean(field)} is missing or wrong, perhaps as an older version wrote it; repeat "
            "the comparison with --out, or name its run folders"
        )
    runs = []
    for label, one in stored.runs.items():
        if absent := next((path for path in one.folders if not Path(path).is_dir()), None):
            raise UserError(
                f"{folder}: its run {clean(absent)} is not here; call report where it was compared, or name run folders"
            )
        parts = [comparison.read_run(path) for path in one.folders]
        if extractor := one.result.get("extractor"):
            parts = [comparison.by_extractor(part, extractor) for part in parts]
        run = comparison.recipe(label, parts) if len(parts) > 1 else parts[0]
        first = set(list(comparison.outcomes_of(run))[: one.problems])
        samples = [row for row in run.samples if row["id"] in first]
        runs.append(replace(run, result=one.result, samples=samples, stopped=stored.stopped))
    return comparison.clustered(runs, stored.cluster), list(stored.runs).index(stored.baseline)
