"""evaluate(): a plan, a source of completions, a run folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_traces.config import EvalConfig, build
from mlx_traces.errors import UserError
from mlx_traces.evaluation import endpoint
from mlx_traces.evaluation.completion import Answered
from mlx_traces.evaluation.evaluator import Plan, Sample, Source, Stop, grade_sample, plan, rehead, summarize
from mlx_traces.evaluation.local import completions_of, sample_seed
from mlx_traces.records import EvalResult, Problem
from mlx_traces.runtime import distributed
from mlx_traces.runtime.files import held
from mlx_traces.runtime.interrupts import Stopped, listening
from mlx_traces.runtime.provenance import provenance, settled
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.tasks import GRADER


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
        resume: continue a run that was cut off; finished samples are kept.
        progress: show a progress bar on stderr.
        runs_dir: where run folders are kept.
        config: complete settings, in place of ``settings``.
        **settings: the fields of ``EvalConfig``: ``model``, ``task``, ``prompt``, ``limit``, ...

    Returns:
        The result; the run folder holds it as ``result.json``, beside every sample.

    Raises:
        UserError: if the input is wrong.
    """
    if config is not None and settings:
        raise UserError(f"give config or {', '.join(settings)}, not both")
    planned = plan(config or build(EvalConfig, settings))
    return run(planned, Path(out) if out else Path(runs_dir) / planned.label, resume, progress)


def run(planned: Plan, path: Path, resume: bool, progress: bool) -> EvalResult:
    """Carry out a plan in the run folder ``path``.

    Raises:
        UserError: if the input is wrong.
        Stopped: after Ctrl-C; what was finished is kept.
    """
    if endpoint.behind(planned.config):
        with _alone(path, resume) as (folder, stop):
            folder.check(planned.identity(), planned.idle)
            with _server(planned, stop) as source:
                return _run(planned, folder, progress, source)
    with distributed.at_work(path, resume) as (folder, stop):
        from mlx_traces.models.loading import of_its_day

        planned = replace(planned, config=of_its_day(planned.config, folder.identity))
        with _engine(planned, stop) as source:
            return _run(planned, folder, progress, source)


@contextmanager
def _alone(path: Path, resume: bool) -> Iterator[tuple[RunFolder, Stop]]:
    """Begin or continue a run as `distributed.at_work` does, in the one process that asks a server and needs no MLX."""
    RunFolder(path).refuse(resume)
    with held(path / ".lock"), listening() as pressed:
        yield RunFolder(path), pressed


@contextmanager
def _engine(planned: Plan, stop: Stop) -> Iterator[Source]:
    """Load the model of a plan, its adapter merged for as long as it answers."""
    from mlx_traces.models.adapters import merged
    from mlx_traces.models.loading import load
    from mlx_traces.runtime import device

    config = planned.config
    loaded = load(config.model, config.adapter, **config.load_arguments())
    backend = loaded.backend
    device.reset_peak_memory()
    with merged(loaded.model, backend):
        yield Source(
            completions_of(loaded, planned, stop=stop),
            {"revision": loaded.revision, "weights": backend.weights, "dtype": backend.dtype, **loaded.shown()},
            ({"own_tags": loaded.own_tags} if loaded.own_tags else {})
            | {"backend": asdict(backend), "rows": config.rows, "ranks": distributed.world().size()}
            | _settled(planned, loaded.path),
            loaded.notes,
            device.peak_memory_gb,
        )


def _settled(planned: Plan, model: Path | None) -> dict[str, Any]:
    settings = {**planned.config.model_dump(mode="json"), "prompt": planned.prompt.name, "extractor": planned.extractor}
    return settled(settings, model, planned.config.adapter, problems=[problem.id for problem in planned.problems])


@contextmanager
def _server(planned: Plan, stop: Stop) -> Iterator[Source]:
    """Reach the server of a plan."""
    config = planned.config
    server = endpoint.Server(config)

    def generate(todo: list[tuple[Problem, int]]) -> Iterator[tuple[int, Answered]]:
        """Yield the server's answers as they come."""
        opened = "" if planned.prompt.chat else planned.prompt.prefill
        seeds = [sample_seed(config.seed, problem.id, sample) for problem, sample in todo]
        pairs = zip(todo, seeds, strict=True)
        asks = [endpoint.ask(config, planned.prompt, problem, seed) for (problem, _), seed in pairs]
        return (
            (
                index,
                Answered(asks[index].text, opened, reply.text, reply.tokens, reply.finish_reason, reply.stop_string),
            )
            for index, reply in endpoint.answers(server, asks, stop)
        )

    try:
        known = server.models()
        details = {"server": {"url": server.url, "models": known}, "concurrency": config.concurrency}
        details |= _settled(planned, None)
        if planned.prompt.chat and planned.prompt.stop and not config.stop_in_thoughts:
            server.notes.append("a server applies stop strings within thoughts too")
        if known and config.model not in known:
            server.notes.append(f"the server's list of models does not name {config.model}")
        yield Source(generate, {}, details, server.notes, lambda: None)
    finally:
        server.close()


def _run(planned: Plan, folder: RunFolder, progress: bool, source: Source) -> EvalResult:
    config = planned.config
    identity = planned.identity() | source.identity
    samples = [rehead(row, planned.extractor) for row in folder.recover(identity, planned.idle)]
    wanted = [(problem, sample) for problem in planned.problems for sample in range(config.samples)]
    done = {(row["id"], row["sample"]) for row in samples}
    todo = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
    completions = source.generate(todo)  # refuses bad requests before anything is written
    folder.begin(identity, {**provenance(), "grader": GRADER, **source.details})
    before = max((row["elapsed"] for row in samples), default=0.0)
    start = perf_counter()
    with _bar(progress, len(wanted), samples) as advance:
        for index, completion in completions:
            problem, sample = todo[index]
            row = grade_sample(planned, problem, sample, completion)
            row["elapsed"] = round(before + perf_counter() - start, 3)
            folder.log(folder.samples_path.name, row)
            samples.append(row)
            advance(row)
    if len(samples) < len(wanted):
        raise Stopped(f"stopped after {len(samples):,} of {len(wanted):,} completions")
    order = {(problem.id, sample): place for place, (problem, sample) in enumerate(wanted)}
    samples.sort(key=lambda row: order[row["id"], row["sample"]])
    notes = [*planned.notes, *source.notes]
    result = summarize(planned, samples, folder.path.name, source.memory(), notes)
    folder.finish(samples, asdict(result))
    return result


@contextmanager
def _bar(show: bool, total: int, samples: list[Sample]) -> Iterator[Callable[[Sample], None]]:
    """Yield a function to call with each finished sample; it drives the progress on stderr."""
    if not show:
        yield lambda row: None
        return
    from mlx_traces.runtime.progress import progress

    correct, tokens, start = sum(row["correct"] for row in samples), 0, perf_counter()
    done = len(samples)
    with progress("eval") as shown:
        shown.update(done, total)

        def advance(row: Sample) -> None:
            nonlocal correct, tokens, done
            correct, tokens, done = correct + row["correct"], tokens + (row["tokens"] or 0), done + 1
            speed = tokens / (perf_counter() - start)
            shown.update(done, total, [f"{100 * correct / done:.1f} % correct", f"{speed:.0f} tokens/s"])

        yield advance
