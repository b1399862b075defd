"""Completions of a model that is loaded here, through the engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date as Date
from pathlib import Path
from typing import Any

from mlx_traces.config import AnswerConfig
from mlx_traces.engine import generation
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.evaluation.completion import Completion, Sample
from mlx_traces.evaluation.evaluator import Generate, Plan, Source, grade_sample, sample_seed
from mlx_traces.models import adapters, loading
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Problem, Rollout
from mlx_traces.runtime import device, distributed
from mlx_traces.runtime.run_folder import RunFolder


@contextmanager
def opened(planned: Plan, path: Path, resume: bool, kept: dict[str, Any]) -> Iterator[tuple[Plan, RunFolder, Source]]:
    """Open the run folder ``path`` and load the plan's model; yield the plan with its date and batch size set.

    ``kept`` holds the model that was loaded last; the same model is not loaded again.

    Raises:
        UserError: if the run cannot be written there, or the model cannot be loaded.
    """
    with distributed.at_work(path, resume) as (folder, stop):
        config = loading.of_its_day(planned.config, folder.identity)
        loaded = loaded_or_kept(config, kept)
        device.reset_peak_memory()
        with adapters.merged(loaded.model, loaded.backend):
            config = config.sized(distributed.sizes(loaded.backend))
            planned = replace(planned, config=config)
            details = {"own_tags": loaded.own_tags} if loaded.own_tags else {}
            details |= {"backend": asdict(loaded.backend), "rows": config.rows, "ranks": distributed.world().size()}
            completions, memory = completions_of(loaded, planned, stop=stop), device.peak_memory_gb
            source = Source(completions, identity_of(loaded), details, loaded.notes, loaded.fingerprints, memory)
            yield planned, folder, source


def loaded_or_kept(config: AnswerConfig, kept: dict[str, Any]) -> LoadedModel:
    """Return the model of these settings: the ``kept`` one if it is the same, else load it and keep it instead."""
    asked = {"name": config.model, "adapter": config.adapter, **config.load_arguments()}
    asked["date"] = asked["date"] or Date.today()
    if kept.get("asked") != asked:
        kept.clear()  # frees the other model first
        loaded = loading.load(**asked)
        kept |= {"asked": asked, "loaded": loaded, "notes": [*loaded.notes]}
        return loaded
    loaded = replace(kept["loaded"], notes=[*kept["notes"]])  # without the notes of the run before
    loaded.fingerprints = kept["loaded"].fingerprints  # of the files that were loaded
    return loaded


def identity_of(loaded: LoadedModel) -> dict[str, Any]:
    """Return the entries that a loaded model adds to a run's identity: revision, weights, type, the template's date."""
    backend = loaded.backend
    return {"revision": loaded.revision, "weights": backend.weights, "dtype": backend.dtype, **loaded.shown()}


def measure(loaded: LoadedModel, planned: Plan) -> list[Sample]:
    """Answer a plan's problems with a loaded model, in memory; samples come in the problems' order."""
    todo = planned.wanted
    rows: list[Sample] = [{}] * len(todo)
    for index, completion in completions_of(loaded, planned)(todo):
        rows[index] = grade_sample(planned, *todo[index], completion)
    return rows


def completions_of(
    loaded: LoadedModel, planned: Plan, logprobs: bool = False, stop: Callable[[], bool] | None = None
) -> Generate:
    """Return the function from (problem, sample) pairs to (index, completion) pairs, yielded as they finish.

    It ends early once ``stop`` returns True.
    """
    config = planned.config
    params = SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=planned.prompt.stop,
        stop_in_thoughts=config.stop_in_thoughts,
        think_tokens=config.think_tokens,
        think_at_least=config.think_at_least,
        think_more=config.think_more,
        think_then=config.think_then,
    )

    def completions(todo: list[tuple[Problem, int]]) -> Iterator[tuple[int, Completion]]:
        prompts = [loaded.render(planned.prompt, problem, config.thinking) for problem, _ in todo]
        seeds = [sample_seed(config.seed, problem.id, sample) for problem, sample in todo]
        requests = [Request.of(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

        def sampled(indices: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
            """Complete some of the requests."""
            part, limit = [requests[index] for index in indices], config.memory_limit
            done = generation.generate(loaded, part, params, config.rows, logprobs=logprobs, memory_gb=limit)
            return ((indices[place], rollout) for place, rollout in done)

        whole = sampled(range(len(requests)))  # refuses bad requests, on every rank
        return (
            (index, Completion.sampled(prompts[index].text, prompts[index].opened, rollout, loaded.own_tags))
            for index, rollout in _shared(whole, sampled, len(requests), 4 * config.rows, stop)
        )

    return completions


def _shared(
    whole: Iterator[tuple[int, Rollout]],
    sampled: Callable[[Sequence[int]], Iterator[tuple[int, Rollout]]],
    count: int,
    wave: int,
    stop: Callable[[], bool] | None,
) -> Iterator[tuple[int, Rollout]]:
    """Yield every rollout on every rank: each rank samples ``wave`` rollouts at a time and shares them with the others.

    A single process yields ``whole``, each rollout as soon as it ends.
    """
    if (size := distributed.world().size()) == 1:
        for pair in whole:
            yield pair
            if stop and stop():
                return
        return
    for start in range(0, count, wave * size):
        part = range(start, min(count, start + wave * size))
        mine = [(index, asdict(rollout)) for index, rollout in sampled([part[i] for i in distributed.share(len(part))])]
        for index, fields in distributed.gather(mine):
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            lists |= {"forced_text": tuple(map(tuple, fields["forced_text"]))}
            yield index, Rollout(**fields | lists)
        if stop and stop():
            return
