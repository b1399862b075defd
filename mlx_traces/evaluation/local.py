"""Completions of a model that is loaded here, through the engine."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from mlx_traces.evaluation.completion import Completion
from mlx_traces.evaluation.evaluator import Generate, Plan, Sample, grade_sample
from mlx_traces.records import Problem, Rollout
from mlx_traces.runtime import distributed


def measure(loaded: Any, planned: Plan) -> list[Sample]:
    """Answer a plan's problems by a model that is loaded, in memory; samples come in the problems' order."""
    todo = [(problem, sample) for problem in planned.problems for sample in range(planned.config.samples)]
    rows: list[Sample] = [{}] * len(todo)
    for index, completion in completions_of(loaded, planned)(todo):
        rows[index] = grade_sample(planned, *todo[index], completion)
    return rows


def completions_of(
    loaded: Any, planned: Plan, logprobs: bool = False, stop: Callable[[], bool] | None = None
) -> Generate:
    """Make the plain function from (problem, sample) pairs to completions, as they finish, until ``stop`` says so."""
    from mlx_traces.engine.generation import generate
    from mlx_traces.engine.sampling import Request, SamplingParams

    config = planned.config
    params = SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=planned.prompt.stop,
        stop_in_thoughts=config.stop_in_thoughts,
    )

    def completions(todo: list[tuple[Problem, int]]) -> Iterator[tuple[int, Completion]]:
        rendered = [loaded.render(planned.prompt, problem, config.thinking) for problem, _ in todo]
        seeds = [sample_seed(config.seed, problem.id, sample) for problem, sample in todo]
        requests = [Request(asked.ids, seed, asked.opened) for asked, seed in zip(rendered, seeds, strict=True)]

        def sampled(indices: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
            """Complete some requests."""
            asked = [requests[index] for index in indices]
            done = generate(loaded, asked, params, config.rows, logprobs=logprobs, memory_gb=config.memory_limit)
            return ((indices[place], rollout) for place, rollout in done)

        whole = sampled(range(len(requests)))  # refuses bad requests, on every rank alike
        return (
            (index, Completion(rendered[index].text, rendered[index].opened, rollout, loaded.own_tags))
            for index, rollout in _shared_out(whole, sampled, len(requests), 4 * config.rows, stop)
        )

    return completions


def _shared_out(
    whole: Iterator[tuple[int, Rollout]],
    sampled: Callable[[Sequence[int]], Iterator[tuple[int, Rollout]]],
    count: int,
    wave: int,
    stop: Callable[[], bool] | None,
) -> Iterator[tuple[int, Rollout]]:
    """Let every rank complete its part and hand it to the others, ``wave`` rollouts a rank at a time.

    One process alone completes the ``whole``, and hands on each rollout at once. After what is handed on, ``stop`` is
    asked.
    """
    size = distributed.world().size()
    if size == 1:
        for found in whole:
            yield found
            if stop and stop():
                return
        return
    for start in range(0, count, wave * size):
        part = range(start, min(count, start + wave * size))
        own = [(index, asdict(rollout)) for index, rollout in sampled([part[i] for i in distributed.share(len(part))])]
        for index, fields in distributed.gather(own):
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            yield index, Rollout(**fields | lists)
        if stop and stop():
            return


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """Return the 64-bit seed of one completion's random stream; it depends on nothing else in the run."""
    digest = hashlib.sha256(f"{seed} {problem_id} {sample}".encode()).digest()
    return int.from_bytes(digest[:8])
