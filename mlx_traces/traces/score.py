"""The command ``score``: grade traces by their tasks; score them by their text and, on request, by models."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_traces.config import ScoreConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Trace
from mlx_traces.runtime.files import held
from mlx_traces.tasks import get_task
from mlx_traces.traces.files import read_traces, refuse_written, source_of, write_traces
from mlx_traces.traces.judge import judge
from mlx_traces.traces.quality import (
    COMPONENTS,
    combined,
    headline,
    last_turn,
    named,
    own_words,
    problem_of,
    text_scores,
)


def score_file(source: Path, out: Path, config: ScoreConfig) -> list[Trace]:
    """Score the traces of a file and write them to a new one with its manifest; return them.

    Raises:
        UserError: if ``out`` exists, before anything is read; for a malformed trace; for the reasons of `score_traces`.
    """
    refuse_written(out)
    origin = source_of(source)
    settings = config.model_dump(mode="json") | named(config)
    located = list(read_traces(source))
    if not located:
        raise UserError(f"{source} has no traces")
    with held(out.with_name(f".{out.stem}.lock")):
        models: dict[str, Any] = {}
        traces = score_traces([trace for _, trace in located], config, [where for where, _ in located], models)
        manifest = {**origin, "config": settings, "counts": {}, "seed": None, "models": models}
        write_traces(out, traces, manifest)
    return traces


def score_traces(
    traces: Sequence[Trace],
    config: ScoreConfig,
    where: Sequence[str] = (),
    used: dict[str, Any] | None = None,
) -> list[Trace]:
    """Return the traces with verdict, ``scores`` and ``score``.

    Args:
        traces: earlier scores are replaced.
        config: the form of a trace, the mix, and the models.
        where: the place of each trace, for error messages; default: its id.
        used: gets a description of the loaded models, ``model`` and ``judge``.

    Raises:
        UserError: for a trace whose task is unknown or cannot read its columns; for a model that cannot be loaded; for
            a judge if more of its replies than ``judge_failures`` allows cannot be read.
    """
    places = where or [f"trace {trace.id}" for trace in traces]
    problems = [problem_of(trace, place) for trace, place in zip(traces, places, strict=True)]
    own = []
    for trace, problem in zip(traces, problems, strict=True):
        judged = headline(get_task(trace.task), problem, trace.completion) if problem else None
        tokens = None if trace.completion_ids is None else len(trace.completion_ids)
        scores = text_scores(own_words(trace), trace.finish_reason, tokens, config, last_turn(trace))
        own.append((judged and judged.verdict, {"correct": judged and float(judged.correct), **scores}))
    models = model_scores(traces, problems, config, {} if used is None else used)
    scored = []
    for trace, (verdict, scores), extra in zip(traces, own, models, strict=True):
        known = {name: None if value is None else round(value, 6) for name, value in {**scores, **extra}.items()}
        scores = {name: known[name] for name in COMPONENTS}
        scored.append(replace(trace, verdict=verdict, scores=scores, score=round(combined(scores, config.mix), 6)))
    return scored


def summary(traces: Iterable[Trace]) -> list[tuple[str, float | None, float]]:
    """Return (name, mean, share of traces it applies to) of each component, ``score`` last."""
    traces = list(traces)
    rows = []
    for name in (*COMPONENTS, "score"):
        values = [trace.score if name == "score" else trace.scores.get(name) for trace in traces]
        known = [value for value in values if value is not None]
        rows.append((name, sum(known) / len(known) if known else None, len(known) / len(traces)))
    return rows


# ---------------------------------------------------------------------------------- scores by models


def model_scores(
    traces: Sequence[Trace], problems: Sequence[Problem | None], config: ScoreConfig, used: dict[str, Any]
) -> list[dict[str, float | None]]:
    """Return ``perplexity`` and ``judge`` of each trace, with one model in memory at a time; ``used`` describes it."""

    def load(part: str) -> Any:
        loaded = loading.load(getattr(config, part), **config.load_arguments())
        used[part] = loaded.about()
        return loaded

    if config.model or config.judge:
        from mlx_traces.models import loading
        from mlx_traces.traces import perplexity
    if config.model:
        certainty = perplexity.mean_probabilities(load("model"), traces, config.thinking)
    else:
        certainty = [own_probability(trace) for trace in traces]
    judged: list[float | None] = [None] * len(traces)
    if config.judge:
        judged = judge(load("judge"), traces, problems, config)
    return [{"perplexity": p, "judge": j} for p, j in zip(certainty, judged, strict=True)]


def own_probability(trace: Trace) -> float | None:
    """Return exp(mean log-probability) of the sampled tokens, stop token included.

    None without log-probabilities, or if all are 0, as greedy sampling stores them.
    """
    drawn = [value for value in trace.logprobs or () if value is not None]
    if not any(drawn):
        return None
    return min(1.0, math.exp(sum(drawn) / len(drawn)))
