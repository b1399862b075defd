"""Evaluate: carry out a plan, with completions from the engine or a server, in a run folder."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_traces.config import EvalConfig, given
from mlx_traces.errors import UserError
from mlx_traces.evaluation import endpoint, server
from mlx_traces.evaluation.comparison import check_samples
from mlx_traces.evaluation.completion import Sample, rehead
from mlx_traces.evaluation.evaluator import Plan, grade_sample, plan, summarize
from mlx_traces.records import EvalResult
from mlx_traces.runtime.device import import_mlx
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.runtime.progress import progress as shown_progress
from mlx_traces.tasks import GRADER
from mlx_traces.text import clean

Show = Callable[[Sequence[Sample], int], None]


def evaluate(
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    runs_dir: str | Path = "runs",
    config: EvalConfig | None = None,
    **settings: Any,
) -> EvalResult:
    """Evaluate a model on a task; ``mlx-traces eval`` from Python.

    Args:
        out: the run folder; default: a name made of the settings, under ``runs_dir``.
        resume: continue an interrupted run; finished samples are kept.
        progress: show a progress bar on stderr.
        runs_dir: where run folders are kept.
        config: complete settings, in place of ``settings``.
        **settings: the fields of ``EvalConfig``: ``model``, ``task``, ``prompt``, ``limit``, ...

    Returns:
        The result; the run folder holds it as ``result.json``, beside every sample.

    Raises:
        UserError: if the input is wrong.
        Stopped: after Ctrl-C; finished samples are kept.
    """
    planned = plan(given(EvalConfig, config, settings))
    with progress_bar(progress) as show:
        return run(planned, Path(out) if out else Path(runs_dir) / planned.label, resume, show)


def run(
    planned: Plan,
    path: Path,
    resume: bool = False,
    show: Show = lambda samples, total: None,
    kept: dict[str, Any] | None = None,
) -> EvalResult:
    """Carry out a plan in the run folder ``path``.

    ``show`` gets the samples that are finished already, then each new one, each time with the number of all samples.
    ``kept`` holds the model that was loaded last, for the next call with it.

    Raises:
        UserError: if the input is wrong.
        Stopped: after Ctrl-C; finished samples are kept.
    """
    if endpoint.behind(planned.config):
        opened = server.opened
    else:
        import_mlx()  # a one-line error if it is missing
        from mlx_traces.evaluation import local  # an evaluation by a server does without MLX

        opened = partial(local.opened, kept={} if kept is None else kept)
    with opened(planned, path, resume) as (planned, folder, source):
        identity = planned.identity() | source.identity
        samples, place = folder.recover(identity, planned.idle), str(folder.samples_path)
        check_samples(samples, place)
        samples = [rehead(row, planned.extractor) for row in samples]
        counts = Counter((row["id"], row["sample"]) for row in samples)
        done, wanted = counts.keys(), planned.wanted
        if planned.config.growing and (more := len({name for name, _ in done}) - len(planned.problems)) > 0:
            raise UserError(f"{path} has {more:,} more problems than --limit names; pass a larger --limit")
        own = {(problem.id, sample) for problem, sample in wanted}
        for (name, sample), count in counts.items():
            if count > 1 or (name, sample) not in own:
                fault = f"occurs {count} times" if count > 1 else "is not one of this run's"
                raise UserError(f"{place}: sample {sample} of problem {clean(name)} {fault}; remove its surplus lines")
        todo = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
        notes = []
        if todo and samples and (rules := folder.about.get("grader", 1)) != GRADER:
            old = f"{len(samples):,} samples were graded by version {clean(rules)[:20]} of the graders' rules"
            notes.append(f"{old}, the others by version {GRADER}; mlx-traces verify says where they differ")
        completions = source.generate(todo)  # refuses bad requests before anything is written
        ids = {"problems": [problem.id for problem in planned.problems]}
        folder.begin(identity, planned.settings, source.files, ids, grader=GRADER, **source.details)
        if todo and folder.finished:
            folder.reopen()
        before = max((row["elapsed"] for row in samples), default=0.0)
        start = perf_counter()
        show(samples, len(wanted))
        for index, completion in completions:
            row = grade_sample(planned, *todo[index], completion)
            row["elapsed"] = round(before + perf_counter() - start, 3)
            folder.log(folder.samples_path.name, row)
            samples.append(row)
            show([row], len(wanted))
        if len(samples) < len(wanted):
            raise Stopped(f"stopped after {len(samples):,} of {len(wanted):,} completions")
        order = {(problem.id, sample): place for place, (problem, sample) in enumerate(wanted)}
        samples.sort(key=lambda row: order[row["id"], row["sample"]])
        result = summarize(planned, samples, folder.path.name, source.memory(), [*notes, *planned.notes, *source.notes])
        folder.finish(samples, asdict(result))
        return result


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Show]:
    """Yield the ``show`` of `run`: it shows the progress on stderr if ``wanted``, else it does nothing."""
    if not wanted:
        yield lambda samples, total: None
        return
    begun = done = correct = tokens = 0
    with shown_progress("eval") as shown:

        def show(samples: Sequence[Sample], total: int) -> None:
            nonlocal begun, done, correct, tokens
            done, correct = done + len(samples), correct + sum(row["correct"] for row in samples)
            if not begun:
                begun = perf_counter()
                shown.update(done, total)
                return
            tokens += sum(row["tokens"] or 0 for row in samples)
            speed = tokens / (perf_counter() - begun)
            shown.update(done, total, [f"{100 * correct / done:.1f} % correct", f"{speed:.0f} tokens/s"])

        yield show
