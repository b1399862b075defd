"""Generation by mlx_lm's BatchGenerator, for models whose cache is not a plain one (sliding window, state space)."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_traces.drawing import Request, SamplingParams, draw, finish, settings_of, uniforms_of
from mlx_traces.models import LoadedModel
from mlx_traces.records import Rollout

PREFILL_ROWS = 8  # prompts read at once, padded to the longest of them


def generate_plainly(
    loaded: LoadedModel, requests: list[Request], params: list[SamplingParams], rows: int, logprobs: bool
) -> Iterator[tuple[int, Rollout]]:
    """Do what ``sampling.generate`` does, at mlx_lm's speed; same random numbers."""
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
    samplers = [RowSampler(requests[index], params[index], logprobs) for index in order]
    try:
        uids = batch.insert(
            [list(requests[index].prompt_ids) for index in order],
            [params[index].max_tokens for index in order],
            samplers=samplers,
        )
        rows_of = dict(zip(uids, zip(order, samplers, strict=True), strict=True))
        while responses := batch.next_generated():
            finished = []
            for response in responses:
                index, sampler = rows_of[response.uid]
                sampler.take(response.token)
                rollout = sampler.finished(loaded, requests[index], params[index])
                if rollout is not None:
                    if response.finish_reason is None:
                        batch.remove([response.uid])
                    finished.append((index, rollout))
            responses = response = None  # each holds a vocabulary of log-probabilities
            yield from finished
    finally:
        batch.close()


class RowSampler:
    """Draws the tokens of one row, (1, V) log-probabilities to (1,) ids, and counts its own draws."""

    def __init__(self, request: Request, params: SamplingParams, logprobs: bool):
        self.uniforms, self.settings = uniforms_of(request, params), settings_of(params)[None]
        self.wanted, self.count = logprobs, 0
        self.ids: list[int] = []  # that were looked at; one draw runs ahead of them
        self.logprobs: list[np.ndarray] = []  # (1, 2) each, as ``draw`` returns them
        self.ahead: deque[Any] = deque()  # of the draws that were not looked at yet, on the device

    def __call__(self, logprobs: Any) -> Any:
        """Draw the next token."""
        import mlx.core as mx

        number = self.uniforms[min(self.count, len(self.uniforms) - 1)]
        self.count += 1
        token, own = draw(logprobs.astype(mx.float32), np.array([number]), self.settings, self.wanted)
        self.ahead.append(own)
        return token if own is None else mx.depends([token], [own])[0]  # computed with it, or the logits would stay

    def take(self, token: int) -> None:
        """Look at the next token."""
        own = self.ahead.popleft()
        self.ids.append(token)
        if own is not None:
            self.logprobs.append(np.array(own))

    def finished(self, loaded: LoadedModel, request: Request, params: SamplingParams) -> Rollout | None:
        """Return the rollout if its newest token ended it."""
        rollout = finish(loaded, request, params, self.ids)
        if rollout is None or not self.wanted:
            return rollout
        return finish(loaded, request, params, self.ids, np.concatenate(self.logprobs))
