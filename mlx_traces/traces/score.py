"""The recipe of ``score``: traces judged by their tasks, scored by their text, and by models where they are named."""

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
from mlx_traces.traces.quality import COMPONENTS, combined, headline, named, problem_of, text_scores

BATCH_TOKENS = 4096  # read at once for perplexity, padding included


def score_file(source: Path, out: Path, config: ScoreConfig) -> list[Trace]:
    """Score the traces of a file and write them to a new one with its manifest; return them.

    Raises:
        UserError: if ``out`` exists, before anything is read; for a malformed trace; as ``score_traces`` does.
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
        traces: in any state; earlier scores are replaced.
        config: what a trace should look like, the mix, and the models.
        where: places of the traces, for messages; default: their ids.
        used: gets what there is to know of the models that were loaded, ``model`` and ``judge``.

    Raises:
        UserError: for a trace whose task is unknown or cannot read its columns; for a model that cannot be loaded; for
            a judge whose replies cannot be read more often than ``judge_failures`` allows.
    """
    places = where or [f"trace {trace.id}" for trace in traces]
    problems = [problem_of(trace, place) for trace, place in zip(traces, places, strict=True)]
    own = [_own(trace, problem, config) for trace, problem in zip(traces, problems, strict=True)]
    models = model_scores(traces, problems, config, {} if used is None else used)
    scored = []
    for trace, (verdict, scores), extra in zip(traces, own, models, strict=True):
        scores = {name: _rounded({**scores, **extra}[name]) for name in COMPONENTS}
        scored.append(replace(trace, verdict=verdict, scores=scores, score=_rounded(combined(scores, config.mix))))
    return scored


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _own(trace: Trace, problem: Problem | None, config: ScoreConfig) -> tuple[str | None, dict[str, float | None]]:
    """Return a trace's verdict and the scores that need no model."""
    verdict, correct, prefill = None, None, ""
    if problem is not None:
        task = get_task(trace.task)
        judged = headline(task, problem, trace.completion)
        verdict, correct = judged.verdict, float(judged.correct)
        if trace.prompt in task.prompts:
            prefill = task.prompts[trace.prompt].prefill.removesuffix("<think>")
    completion = trace.completion.removeprefix(prefill)  # the prompt's own words are no fault of the trace
    tokens = None if trace.completion_ids is None else len(trace.completion_ids)
    return verdict, {"correct": correct, **text_scores(completion, trace.finish_reason, tokens, config, _asked(trace))}


def _asked(trace: Trace) -> str:
    return trace.messages[-1]["content"] if trace.messages else ""


def summary(traces: Iterable[Trace]) -> list[tuple[str, float | None, float]]:
    """Return for each component, ``score`` last, its mean where it applies and the share of traces it applies to."""
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
    """Return ``perplexity`` and ``judge`` of each trace, one model in memory at a time; tell ``used`` of them."""

    def load(part: str) -> Any:
        from mlx_traces.models import loading

        loaded = loading.load(getattr(config, part), **config.load_arguments())
        used[part] = loaded.about()
        return loaded

    if config.model:
        certainty = mean_probabilities(load("model"), traces, config.thinking)
    else:
        certainty = [own_probability(trace) for trace in traces]
    judged: list[float | None] = [None] * len(traces)
    if config.judge:
        judged = judge(load("judge"), traces, problems, config)
    return [{"perplexity": p, "judge": j} for p, j in zip(certainty, judged, strict=True)]


def own_probability(trace: Trace) -> float | None:
    """Return exp(mean log-probability) of the tokens as they were sampled, stop token included.

    None without log-probabilities, and where all are 0, as greedy sampling notes them.
    """
    if not trace.logprobs or not any(trace.logprobs):
        return None
    return min(1.0, math.exp(sum(trace.logprobs) / len(trace.logprobs)))


def mean_probabilities(loaded: Any, traces: Sequence[Trace], thinking: bool | None = None) -> list[float | None]:
    """Return 1 / perplexity of each completion under a model: the geometric mean of its tokens' probabilities.

    The tokens are those that SFT learns of it (`encoding.encode`), without a stop token and earlier turns; a bare text
    comes after a stop token. ``thinking`` sets the chat template's switch, None leaves it as each trace was made. None
    for an empty completion and for what is longer than the model's context.
    """
    import mlx.core as mx
    import numpy as np

    from mlx_traces.engine.batching import Example, micro_batches, pad
    from mlx_traces.engine.logprobs import split, token_logprobs
    from mlx_traces.traces.encoding import encode

    examples: dict[int, Example] = {}
    for index, trace in enumerate(traces):
        if not trace.completion:
            continue
        try:
            example = encode(loaded, trace, None, thinking)
        except UserError as error:
            raise UserError(f"trace {trace.id}: {error}") from None
        if not trace.messages:
            ids = example.ids if loaded.tokenizer.encode("") else (*sorted(loaded.stop_ids)[:1], *example.ids)
            example = Example(trace.id, ids, (False, *[True] * (len(ids) - 1)))
        if example.count and (loaded.context is None or len(example.ids) <= loaded.context):
            examples[index] = example
    found: list[float | None] = [None] * len(traces)
    halves = split(loaded.model)
    order = list(examples)
    lengths = [len(examples[index].ids) for index in order]
    for batch in micro_batches(range(len(order)), lengths, BATCH_TOKENS):
        members = [order[place] for place in batch]
        ids, positions = pad([examples[index] for index in members])
        logprobs, _ = token_logprobs(halves, mx.array(ids), positions, slopes=False, entropies=False)
        rows = np.array(logprobs, np.float64)
        at = 0
        for index in members:
            count = examples[index].count
            found[index] = min(1.0, math.exp(rows[at : at + count].mean()))
            at += count
    return found
