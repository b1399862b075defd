"""Write a comparison to a folder, in every format. No MLX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison
from mlx_traces.report import figures, tables
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.runtime.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd


def write_all(
    runs: Sequence[comparison.Run],
    frame: pd.DataFrame,
    out: Path,
    config: dict[str, Any] | None = None,
    quality: pd.DataFrame | None = None,
) -> list[Path]:
    """Write a comparison to a folder: table.md, .csv and .json, per_question.csv, results.json, accuracy.png.

    Also quality.csv, if there is such a table, and provenance.json: versions, every setting, and each run's
    ``run.json`` by the run's label.

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
        markdown += "\n" + "".join(f"* {warning}\n" for warning in warnings)
    abouts = [{"run": run.name, **run.about} for run in runs]
    texts = {
        "table.md": markdown,
        "table.csv": tables.to_csv(frame),
        "table.json": to_json(tables.to_json(frame)),
        "per_question.csv": tables.to_csv(comparison.per_question(runs)),
        "results.json": to_json(comparison.source_results(runs)),
        "provenance.json": to_json(
            {**provenance(), "config": config, "runs": dict(zip(comparison.labels(runs), abouts, strict=True))}
        ),
    }
    if quality is not None:
        texts["quality.csv"] = tables.to_csv(quality)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
        figures.save(figures.accuracy(frame, tables.protocol_line(frame)), out / "accuracy.png")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return [out / name for name in (*texts, "accuracy.png")]
