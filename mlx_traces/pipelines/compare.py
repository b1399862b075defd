"""Comparisons: make the evaluations that are missing, then pair them all in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_traces.config import CompareConfig, EvalConfig, build, shipped
from mlx_traces.errors import UserError
from mlx_traces.evaluation.comparison import Run, by_extractor, read_run
from mlx_traces.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from mlx_traces.evaluation.evaluator import Plan


DEFAULT_LIMIT = 500  # problems of the comparison that runs without arguments
# Adapters that come with the repository, and the prompt each is shown with.
TRAINED = (
    *(("nano-epoch1", "thinking"), ("nano-epoch2", "thinking"), ("nano-epoch2", "direct")),
    *(("nano-grpo", "direct"), ("nano-ppo", "direct")),
)


def default_evals() -> list[EvalConfig]:
    """Return the comparison without arguments: nano on held-out Countdown problems.

    Direct against thinking, and the adapters that come along: from the working folder, the installed package, or the
    checkout that this package runs from.
    """
    homes = (Path("adapters"), shipped("adapters"))
    found = [
        (prompt, folder)
        for name, prompt in TRAINED
        if (folder := next((home / name for home in homes if (home / name).is_dir()), None))
    ]
    settings = {"task": "countdown", "limit": DEFAULT_LIMIT, "max_tokens": 256, "rows": 128}
    return [
        *(EvalConfig(prompt=prompt, **settings) for prompt in ("direct", "thinking")),
        *(EvalConfig(prompt=prompt, adapter=str(folder), **settings) for prompt, folder in found),
    ]


def crossed(models: Sequence[str], prompts: Sequence[str | None], settings: dict[str, Any]) -> list[EvalConfig]:
    """Return an evaluation for every model with every prompt, other settings alike."""
    return [
        build(EvalConfig, {**settings, "model": model, "prompt": prompt})
        for model in models
        for prompt in (prompts or [None])
    ]


def requested(
    config: CompareConfig,
    runs: Sequence[str] = (),
    models: Sequence[str] = (),
    prompts: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> CompareConfig:
    """Add what was asked for to a configuration; with nothing at all it is the default comparison.

    Models are crossed with prompts. Without models, prompts and settings win over those of the configuration's own
    evaluations. An ``extractor`` also judges finished runs; other settings cannot change those.

    Raises:
        UserError: for a wrong setting, or one that finished runs cannot follow.
    """
    settings, everything, evals = dict(settings or {}), [*config.runs, *runs], list(config.evals)
    if models:
        evals += crossed(models, prompts, settings)
    elif evals:
        evals = [
            build(EvalConfig, {**eval_.model_dump(exclude_unset=True), **settings, "prompt": prompt})
            for eval_ in evals
            for prompt in prompts or [eval_.prompt]
        ]
    elif everything:
        fixed = [*(["prompt"] if prompts else []), *(name for name in settings if name != "extractor")]
        if fixed:
            raise UserError(f"finished runs cannot be given another {fixed[0]}; name a model to evaluate it anew")
    elif prompts or settings:
        evals = crossed(["nano"], prompts, settings)
    else:
        evals = default_evals()
    extractor = settings.get("extractor", config.extractor)
    return config.model_copy(update={"runs": everything, "evals": evals, "extractor": extractor})


def collect(config: CompareConfig, progress: bool = False) -> list[Run]:
    """Read the named runs and make, or finish, the evaluations; one run each, in that order.

    An evaluation whose run folder is there, with the same settings, problems and model files, is not repeated.

    Raises:
        UserError: if the input is wrong; runs, settings, models and problems are looked at before the first evaluation.
    """
    from mlx_traces.evaluation.evaluator import plan

    collected, evals = [read_run(path) for path in dict.fromkeys(config.runs)], config.evals
    if config.extractor:
        collected = [by_extractor(finished, config.extractor) for finished in collected]
        evals = [settings.model_copy(update={"extractor": config.extractor}) for settings in evals]
    plans = {planned.label: planned for planned in map(plan, evals)}
    for label, planned in plans.items():
        collected.append(obtain(planned, Path(config.runs_dir) / label, progress))
    return collected


def obtain(planned: "Plan", path: Path, progress: bool = False, apart: bool = False) -> Run:
    """Return a planned evaluation's run, made, or finished, in ``path`` unless it is there.

    Args:
        planned: the evaluation.
        path: its run folder.
        progress: show a progress bar on stderr.
        apart: evaluate in a process of its own, so that the peak memory is that of this evaluation alone.

    Raises:
        UserError: if the input is wrong, or a process apart dies.
    """
    from mlx_traces.evaluation.run import run

    if not RunFolder(path).finished:
        if apart:
            _run_apart(planned.config, path, progress)
        else:
            run(planned, path, resume=path.exists(), progress=progress)
    return by_extractor(read_run(path), planned.extractor)


def _run_apart(config: EvalConfig, path: Path, progress: bool) -> None:
    """Evaluate in a process of its own, whose peak memory is that of this evaluation alone."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    settings = config.model_dump(exclude_unset=True)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_evaluate, settings, path, progress).result()
    except BrokenProcessPool:
        raise UserError(
            f"{path}: the process that evaluated it died, of too little memory perhaps; try fewer rows"
        ) from None


def _evaluate(settings: dict[str, Any], path: Path, progress: bool) -> None:
    from mlx_traces.evaluation.evaluator import plan
    from mlx_traces.evaluation.run import run

    run(plan(build(EvalConfig, settings)), path, resume=path.exists(), progress=progress)


def compared(config: CompareConfig, progress: bool = False) -> "tuple[pd.DataFrame, list[Run]]":
    """Carry out a comparison: its runs, their table, and the files in ``config.out`` if that is set."""
    from mlx_traces.evaluation import comparison
    from mlx_traces.report import export

    runs = collect(config, progress)
    frame = comparison.compare_runs(runs, config.baseline or 0)
    if config.out:
        export.write_all(runs, frame, Path(config.out), config.model_dump(mode="json"))
    return frame, runs


def compare(
    *runs: str | Path,
    model: str | Sequence[str] = (),
    prompt: str | Sequence[str] = (),
    baseline: str | None = None,
    out: str | Path | None = None,
    runs_dir: str | Path | None = None,
    progress: bool = False,
    config: CompareConfig | None = None,
    **settings: Any,
) -> "pd.DataFrame":
    """Compare runs and models; ``mlx-traces compare`` from Python.

    Args:
        *runs: finished run folders.
        model: models to evaluate, each ``MODEL`` or ``MODEL+ADAPTER``.
        prompt: prompt styles, each tried with each model.
        baseline: the run that the others are compared with, by its name or label; default: the first.
        out: folder for the table, the per-question CSV, ``results.json`` and the chart.
        runs_dir: where the run folders of evaluations are kept; default: ``runs``.
        progress: show progress bars on stderr.
        config: a comparison to add all this to, as from a YAML file.
        **settings: other fields of ``EvalConfig``, the same for every model.

    Returns:
        One row per run: model, adapter, prompt, accuracy, correct_count, total_questions, ci_low, ci_high, diff,
        diff_low, diff_high, p_value, p_holm, tokens_per_answer, tokens_per_second. Without any argument: nano, direct
        against thinking.

    Raises:
        UserError: if the input is wrong, or the runs are of different problems.
    """
    changes = {"baseline": baseline, "out": out and str(out), "runs_dir": runs_dir and str(runs_dir)}
    config = (config or CompareConfig()).model_copy(update={k: v for k, v in changes.items() if v is not None})
    models, prompts = ([names] if isinstance(names, str) else list(names) for names in (model, prompt))
    config = requested(config, [str(path) for path in runs], models, prompts, settings)
    return compared(config, progress)[0]
