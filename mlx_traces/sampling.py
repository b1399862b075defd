"""Batched generation: prompts in, rollouts out as they finish. Runs on mlx_lm's BatchGenerator."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.models import LoadedModel
from mlx_traces.records import Rollout

_PREFILL_ROWS = 8  # prompts read at once, padded to the longest of them


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    ``temperature`` 0 is greedy and ignores the filters. Otherwise, as in mlx_lm: ``top_p``, then ``min_p``,
    then ``top_k`` drop tokens by their probabilities at temperature 1, and one of those left is drawn at
    ``temperature``. ``top_p`` 1, ``min_p`` 0 and ``top_k`` 0 drop nothing. ``max_tokens`` counts the stop
    token. ``stop`` are strings that end a completion.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError for a setting outside its range."""
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or above, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 to 1, not {self.min_p}")
        if "" in self.stop:
            raise UserError("a stop string is empty; it would end every completion at once")


@dataclass(frozen=True)
class Request:
    """A prompt to complete once; ``seed`` is that of this row's own random stream."""

    prompt_ids: tuple[int, ...]
    seed: int = 0


def generate(
    loaded: LoadedModel, requests: Sequence[Request], params: SamplingParams, rows: int = 32
) -> Iterator[tuple[int, Rollout]]:
    """Complete prompts, ``rows`` at once; yield (index into ``requests``, rollout) as each finishes.

    Rows are admitted longest prompt first, which pads least; a row that ends makes room for the next. A row's
    random stream depends on its seed and on how many tokens it has drawn, not on its neighbours, its place or
    ``rows``: the same seed draws the same completion again, up to rounding, which differs with the batch's
    shape and can turn a near tie. The model's ``stop_strings`` count beside ``params.stop``.

    Raises:
        UserError: before anything runs, for a setting outside its range, an empty prompt, ``rows`` below 1,
            or a prompt that leaves no room for ``max_tokens`` in the model's context.
    """
    requests = list(requests)
    params.check()
    if rows < 1:
        raise UserError(f"rows must be at least 1, not {rows}")
    for index, request in enumerate(requests):
        length = len(request.prompt_ids)
        if not length:
            raise UserError(f"prompt {index + 1} of {len(requests)} is empty")
        if loaded.context is not None and length + params.max_tokens > loaded.context:
            raise UserError(
                f"prompt {index + 1} of {len(requests)} has {length} tokens; {params.max_tokens} more pass "
                f"the model's context of {loaded.context}; lower --max-tokens or shorten the prompt"
            )
    return _run(loaded, requests, params, rows)


def _run(
    loaded: LoadedModel, requests: list[Request], params: SamplingParams, rows: int
) -> Iterator[tuple[int, Rollout]]:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
    samplers = [_row_sampler(params, requests[index].seed) for index in order] if params.temperature else None
    batch = BatchGenerator(
        loaded.model,
        max_tokens=params.max_tokens,
        stop_tokens=[[token] for token in sorted(loaded.stop_ids)],
        completion_batch_size=rows,
        prefill_batch_size=min(rows, _PREFILL_ROWS),
        stream=mx.default_stream(mx.default_device()),  # the library's own was made at its import
    )
    try:
        uids = batch.insert([list(requests[index].prompt_ids) for index in order], samplers=samplers)
        stops = (*params.stop, *loaded.stop_strings)
        alive = {
            uid: _Row(index, requests[index].prompt_ids, loaded, stops) for uid, index in zip(uids, order, strict=True)
        }
        while responses := batch.next_generated():
            finished = []
            for response in responses:
                row = alive[response.uid]
                row.completion_ids.append(response.token)
                reason = response.finish_reason
                if reason != "stop" and row.find_stop() is not None:
                    if reason is None:
                        batch.remove([response.uid])
                    reason = "stop"
                if reason is not None:
                    finished.append((row.index, row.rollout(reason)))
                    del alive[response.uid]
            responses = response = None  # each holds a vocabulary of log-probabilities
            yield from finished
    finally:
        batch.close()


@dataclass
class _Row:
    """One completion on its way."""

    index: int
    prompt_ids: tuple[int, ...]
    loaded: LoadedModel
    stops: tuple[str, ...]
    completion_ids: list[int] = field(default_factory=list)

    def find_stop(self) -> int | None:
        """Return where in the text the first stop string starts, if the newest token completed one.

        Only as many last tokens are decoded as a stop string can span: a token is at least a byte, bar a few
        special ones. What they show is looked for again in the whole text, which a tokenizer may write
        otherwise.
        """
        if not self.stops:
            return None
        span = max(len(stop.encode()) for stop in self.stops) + 8
        tail = self.decode(self.completion_ids[-span:])
        if not any(stop in tail for stop in self.stops):
            return None
        text = self.decode(self.completion_ids)
        return min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)

    def decode(self, ids: list[int]) -> str:
        """Return the ids' exact text, special tokens such as ``<think>`` included."""
        return self.loaded.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def rollout(self, finish_reason: str) -> Rollout:
        """Return the finished rollout."""
        ids = self.completion_ids
        ended = finish_reason == "stop" and ids[-1] in self.loaded.stop_ids
        cut = None if ended or finish_reason == "length" else self.find_stop()
        text = self.decode(ids[:-1] if ended else ids)[:cut]
        return Rollout(self.prompt_ids, tuple(ids), text, finish_reason)


def _row_sampler(params: SamplingParams, seed: int) -> Callable[[Any], Any]:
    """Return a sampler of one row, (1, V) log-probabilities to (1,) ids, that counts its own draws."""
    import mlx.core as mx
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    drawn = 0

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal drawn
        logprobs = logprobs.astype(mx.float32)
        if params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = apply_min_p(logprobs, params.min_p)
        if 0 < params.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, params.top_k)
        key = mx.random.key(_mix(seed, drawn))
        drawn += 1
        return mx.random.categorical(logprobs * (1 / params.temperature), key=key)

    return sample


def _mix(seed: int, drawn: int) -> int:
    """Return 64 bits that look unrelated for every (seed, count)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {drawn}".encode(), digest_size=8).digest(), "big")
