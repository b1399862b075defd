"""Comparisons: make the evaluations that are missing, then pair them all in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_traces.config import CompareConfig, EvalConfig, build
from mlx_traces.errors import UserError
from mlx_traces.runs import RunFolder, read_json
from mlx_traces.tables import Run
from mlx_traces.tasks.data import read_jsonl

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_LIMIT = 500  # problems of the comparison that runs without arguments


def read_run(path: str | Path) -> Run:
    """Read a finished run folder.

    Raises:
        UserError: if it is not one, or has no result yet.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{path}: no such run folder")
    if not folder.finished:
        raise UserError(f"{path}: no result.json; finish the run with: mlx-traces eval --resume --out {path} ...")
    samples = [row for _, row in read_jsonl(folder.samples_path, ("id", "sample", "correct"))]
    return Run(folder.path.name, read_json(folder.path / "result.json"), samples)


def default_evals() -> list[EvalConfig]:
    """Return the comparison without arguments: nano, direct against thinking, on held-out Countdown problems."""
    return [
        EvalConfig(model="nano", task="countdown", prompt=prompt, limit=DEFAULT_LIMIT, max_tokens=256, rows=128)
        for prompt in ("direct", "thinking")
    ]


def crossed(models: Sequence[str], prompts: Sequence[str | None], settings: dict[str, Any]) -> list[EvalConfig]:
    """Return an evaluation for every model with every prompt, other settings alike."""
    return [
        build(EvalConfig, {**settings, "model": model, "prompt": prompt})
        for model in models
        for prompt in (prompts or [None])
    ]


def collect(config: CompareConfig, progress: bool = False) -> list[Run]:
    """Read the named runs and make, or finish, the evaluations; one run each, in that order.

    An evaluation whose run folder is there with the same settings and the same model files is not repeated.

    Raises:
        UserError: if the input is wrong, or there are fewer than one run.
    """
    from mlx_traces.evaluation import plan, run

    paths = [Path(path) for path in config.runs]
    missing = [str(path) for path in paths if not path.is_dir()]
    if missing:
        raise UserError(f"{missing[0]}: no such run folder")
    plans = [plan(settings) for settings in config.evals]
    for planned in plans:
        path = Path(config.runs_dir) / planned.label
        if not RunFolder(path).finished:
            run(planned, path, resume=path.exists(), progress=progress)
        paths.append(path)
    return [read_run(path) for path in dict.fromkeys(paths)]


def compare(
    *runs: str | Path,
    models: Sequence[str] = (),
    prompts: Sequence[str] = (),
    baseline: str | None = None,
    out: str | Path | None = None,
    runs_dir: str | Path = "runs",
    progress: bool = False,
    config: CompareConfig | None = None,
    **settings: Any,
) -> "pd.DataFrame":
    """Compare runs and models; ``mlx-traces compare`` from Python.

    Args:
        *runs: finished run folders.
        models: models to evaluate, each ``MODEL`` or ``MODEL+ADAPTER``.
        prompts: prompt styles, each tried with each model.
        baseline: the run that the others are compared with, by its name or label; default: the first.
        out: folder for the table, the per-question CSV, ``results.json`` and the chart.
        runs_dir: where the run folders of evaluations are kept.
        progress: show progress bars on stderr.
        config: a complete comparison, in place of all this.
        **settings: other fields of ``EvalConfig``, the same for every model.

    Returns:
        One row per run: model, adapter, prompt, accuracy, correct_count, total_questions, ci_low, ci_high, diff,
        diff_low, diff_high, p_value, p_holm, tokens_per_answer, tokens_per_second. Without any argument: nano, direct
        against thinking.

    Raises:
        UserError: if the input is wrong, or the runs are of different problems.
    """
    from mlx_traces import report, tables

    if config is None:
        evals = crossed(models, prompts, settings) if models else []
        values = {"runs": [str(path) for path in runs], "runs_dir": str(runs_dir), "baseline": baseline}
        config = CompareConfig(evals=evals if models or runs else default_evals(), out=out and str(out), **values)
    collected = collect(config, progress)
    frame = tables.compare_runs(collected, config.baseline or 0)
    if config.out:
        report.write_all(collected, frame, Path(config.out))
    return frame
