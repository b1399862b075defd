"""Generation by mlx_lm's BatchGenerator, for models whose cache is not a plain one (sliding window, state space)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlx_traces.drawing import Request, SamplingParams, draw, finish, settings_of, uniforms_of
from mlx_traces.models import LoadedModel
from mlx_traces.records import Rollout

PREFILL_ROWS = 8  # prompts read at once, padded to the longest of them


def generate_plainly(
    loaded: LoadedModel, requests: list[Request], params: list[SamplingParams], rows: int
) -> Iterator[tuple[int, Rollout]]:
    """Do what ``sampling.generate`` does, without log-probabilities and at mlx_lm's speed; same random numbers."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    note = f"{loaded.name} has a special cache; mlx_lm's own batched generation is used, which is slower"
    if note not in loaded.notes:
        loaded.notes.append(note)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
    batch = BatchGenerator(
        loaded.model,
        stop_tokens=[[token] for token in sorted(loaded.stop_ids)],
        completion_batch_size=rows,
        prefill_batch_size=min(rows, PREFILL_ROWS),
        stream=mx.default_stream(mx.default_device()),  # the library's own was made at its import
    )
    try:
        uids = batch.insert(
            [list(requests[index].prompt_ids) for index in order],
            [params[index].max_tokens for index in order],
            samplers=[row_sampler(requests[index], params[index]) for index in order],
        )
        index_of = dict(zip(uids, order, strict=True))
        drawn: dict[int, list[int]] = {uid: [] for uid in uids}
        while responses := batch.next_generated():
            finished = []
            for response in responses:
                index, ids = index_of[response.uid], drawn[response.uid]
                ids.append(response.token)
                rollout = finish(loaded, requests[index], params[index], ids)
                if rollout is not None:
                    if response.finish_reason is None:
                        batch.remove([response.uid])
                    finished.append((index, rollout))
            responses = response = None  # each holds a vocabulary of log-probabilities
            yield from finished
    finally:
        batch.close()


def row_sampler(request: Request, params: SamplingParams) -> Callable[[Any], Any]:
    """Return a sampler of one row, (1, V) log-probabilities to (1,) ids, that counts its own draws."""
    import mlx.core as mx

    uniforms, settings, count = uniforms_of(request, params), settings_of(params)[None], 0

    def sample(logprobs: Any) -> Any:
        nonlocal count
        # One draw runs ahead of the last token that is kept.
        number = uniforms[min(count, len(uniforms) - 1)]
        count += 1
        return draw(logprobs.astype(mx.float32), np.array([number]), settings, False)[0]

    return sample
