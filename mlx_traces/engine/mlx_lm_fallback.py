"""Generation by mlx_lm's own generator, for models whose cache is not a plain one (sliding window, state space).

A probe finds out which models its BatchGenerator computes correctly; the others are decoded one row at a time.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlx_traces.engine.logprobs import alike, probe
from mlx_traces.engine.sampling import Ending, Request, SamplingParams, draw, refuse_no_token, settings_of, uniforms_of
from mlx_traces.errors import UserError, first_line
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Rollout

PREFILL_ROWS = 8  # prompts read at once, padded to the longest of them
PREFILL_TOKENS = 2048  # of one prompt read at once, where rows are decoded one at a time
PROBED = 12  # tokens that each row of a probe draws: enough for rows that join one by one to be decoded together
KEPT = "_prompts_together"  # the attribute of a model that keeps what `prompts_together` found
UNFIT = (ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)  # of a model it cannot run


def generate_plainly(
    loaded: LoadedModel, requests: list[Request], params: list[SamplingParams], rows: int, logprobs: bool
) -> Iterator[tuple[int, Rollout]]:
    """Do what `generation.generate` does, with mlx_lm's generator: same random numbers, slower."""
    together = prompts_together(loaded.model)
    note = f"{loaded.name} has a special cache; mlx_lm's own batched generation is used, which is slower"
    if together == 1:
        note += ", and prompts are read one at a time, as mlx_lm does not mask padding for this model"
    elif not together:
        note = f"{loaded.name} has a special cache that mlx_lm cannot batch: one row at once, which is slow"
    if note not in loaded.notes:
        loaded.notes.append(note)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
    if together:
        return _batched(loaded, requests, params, order, rows, min(rows, together), logprobs)
    return _one_by_one(loaded, requests, params, order, logprobs)


def prompts_together(model: Any) -> int:
    """Find out how many prompts of different length mlx_lm may read together for a model.

    Some of its models ignore the mask that hides padding (Mamba, Jamba, RWKV-7). For them the answer is 1: prompts are
    read one at a time, without padding, and rows are decoded together. It is 0 if that is wrong too, as for caches that
    cannot be batched. A probe of three prompts, each compared with itself alone, decides; the answer is kept with the
    model.
    """
    if hasattr(model, KEPT):
        return getattr(model, KEPT)
    training = model.training
    model.eval()
    token = 3
    try:
        prompts = [probe(model, length) for length in (3, 24, 9)]
        rows = [mx.array([[*prompt, *[token] * (PROBED - 1)]]) for prompt in prompts]
        whole = [model(row, cache=make_prompt_cache(model))[:, -PROBED:] for row in rows]
        if not all(mx.isfinite(logits).all().item() for logits in whole):
            return 0  # with broken weights the probe says nothing; drawing the first token reports them
        found = 0
        for together in (PREFILL_ROWS, 1):
            try:
                drawn = _draws(model, prompts, token, together)
            except UNFIT:
                continue
            if all(alike(own, logits) for own, logits in zip(drawn, whole, strict=True)):
                found = together
                break
    except UNFIT:
        found = 0
    finally:
        model.train(training)
    setattr(model, KEPT, found)
    return found


def _draws(model: Any, prompts: Sequence[tuple[int, ...]], token: int, together: int) -> list[Any]:
    """Return the log-probabilities, (1, PROBED, V), of each prompt's draws by mlx_lm; all draw ``token``."""
    seen: list[list[Any]] = [[] for _ in prompts]

    def sampler(kept: list[Any]) -> Any:
        def draw_it(logprobs: Any) -> Any:
            kept.append(logprobs)
            return mx.array([token])

        return draw_it

    batch = _generator(model, [], len(prompts), together)
    try:
        most = [PROBED] * len(prompts)
        batch.insert([list(prompt) for prompt in prompts], most, samplers=[sampler(own) for own in seen])
        while batch.next_generated():
            pass
    finally:
        batch.close()
    return [mx.stack(own[:PROBED], axis=1) for own in seen]


def _generator(model: Any, stops: list[list[int]], rows: int, together: int) -> Any:
    return BatchGenerator(
        model,
        stop_tokens=stops,
        completion_batch_size=rows,
        prefill_batch_size=together,
        stream=mx.default_stream(mx.default_device()),  # the library's own was made at its import
    )


def _batched(
    loaded: LoadedModel,
    requests: list[Request],
    params: list[SamplingParams],
    order: list[int],
    rows: int,
    together: int,
    logprobs: bool,
) -> Iterator[tuple[int, Rollout]]:
    """Decode ``rows`` at once, reading ``together`` prompts at once."""
    batch = _generator(loaded.model, [[token] for token in sorted(loaded.stop_ids)], rows, together)
    samplers = [RowSampler(loaded, requests[index], params[index], logprobs) for index in order]
    try:
        uids = batch.insert(
            [list(requests[index].prompt_ids) for index in order],
            [params[index].longest for index in order],
            samplers=samplers,
        )
        rows_of = dict(zip(uids, zip(order, samplers, strict=True), strict=True))
        del samplers  # so that a finished row's is freed
        while responses := batch.next_generated():
            finished = []
            for response in responses:
                index, sampler = rows_of[response.uid]
                sampler.take(loaded, response.token)
                rollout = sampler.finished()
                if rollout is not None:
                    if response.finish_reason is None:
                        batch.remove([response.uid])
                    finished.append((index, rollout))
                    del rows_of[response.uid]
            responses = response = sampler = None  # a response holds a vocabulary of log-probabilities
            yield from finished
    finally:
        batch.close()


def _one_by_one(
    loaded: LoadedModel, requests: list[Request], params: list[SamplingParams], order: list[int], logprobs: bool
) -> Iterator[tuple[int, Rollout]]:
    """Decode one row after the other, each with a cache of its own as the model makes it."""
    for index in order:
        request, settings = requests[index], params[index]
        sampler, rollout = RowSampler(loaded, request, settings, logprobs), None
        try:
            cache, body = make_prompt_cache(loaded.model), request.prompt_ids[:-1]
            for at in range(0, len(body), PREFILL_TOKENS):
                loaded.model(mx.array([body[at : at + PREFILL_TOKENS]]), cache=cache)
                mx.eval([layer.state for layer in cache])
            token = mx.array(request.prompt_ids[-1:])
            while rollout is None:
                token = sampler(loaded.model(token[:, None], cache=cache)[:, -1])
                sampler.take(loaded, token.item())
                rollout = sampler.finished()
        except UNFIT as error:
            raise UserError(
                f"{loaded.name}: mlx_lm cannot decode this model even one row at a time ({first_line(error)}); "
                "another version of mlx-lm may, or take another model"
            ) from error
        yield index, rollout


class RowSampler:
    """Draws the tokens of one row, (1, V) logits or log-probabilities to (1,) ids, and counts its own draws."""

    def __init__(self, loaded: LoadedModel, request: Request, params: SamplingParams, logprobs: bool):
        self.ending = Ending(loaded, request, params)
        self.settings = settings_of(params)[None]
        self.wanted, self.count = logprobs, 0
        self.ids: list[int] = []  # tokens that `take` has read; one more may be drawn already
        self.logprobs: list[np.ndarray] = []  # (1, 2) each, as ``draw`` returns them
        self.ahead: deque[Any] = deque()  # log-probabilities of draws that were not read yet, on the device

    @cached_property
    def uniforms(self) -> np.ndarray:
        """The random numbers of the row; a row that waits has none yet."""
        return uniforms_of(self.ending.request, self.ending.params)

    def __call__(self, logits: Any) -> Any:
        """Draw the next token."""
        number = self.uniforms[min(self.count, len(self.uniforms) - 1)]
        self.count += 1
        token, own = draw(logits.astype(mx.float32), np.array([number]), self.settings, self.wanted)
        self.ahead.append(own)
        if self.ending.thought is not None and (drawn := token.item()) >= 0:  # waits for it: the next one depends on it
            token = mx.array([self.ending.thought.take(drawn)])
        return token if own is None else mx.depends([token], [own])[0]  # compute both now, which frees the logits

    def take(self, loaded: LoadedModel, token: int) -> None:
        """Read the next token on the host."""
        refuse_no_token(loaded, np.array([token]))
        own = self.ahead.popleft()
        self.ids.append(token)
        if own is not None:
            self.logprobs.append(np.array(own))

    def finished(self) -> Rollout | None:
        """Return the rollout if its newest token ended it."""
        rollout = self.ending.rollout(self.ids)
        if rollout is None or not self.wanted:
            return rollout
        return self.ending.rollout(self.ids, np.concatenate(self.logprobs))
