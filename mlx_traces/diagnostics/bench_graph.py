"""Count the operations, kernels and bytes of a decode step and of an update on a GPU, on any machine.

The engine, mlx_lm's generator and the trainer build their usual graphs, and `graph` reads them. The model's weights are
not read: shapes are enough. A decode step has ``rows`` completions with prompts of different lengths. An update has 16
rollouts of one prompt in one micro-batch.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_traces.config import AdapterConfig, GRPOConfig
from mlx_traces.diagnostics import graph
from mlx_traces.diagnostics.bench_sft import twin
from mlx_traces.diagnostics.graph import Count
from mlx_traces.engine.batching import Example
from mlx_traces.engine.generation import generate
from mlx_traces.engine.mlx_lm_fallback import UNFIT
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.models.loading import LoadedModel
from mlx_traces.rl import grpo
from mlx_traces.rl.rollouts import Row
from mlx_traces.rl.trainer import Learner

SAMPLED = {
    "greedy": SamplingParams(4),
    "temperature-1": SamplingParams(4, 1.0),
    "temperature-0.7": SamplingParams(4, 0.7),
    "top-p": SamplingParams(4, 1.0, top_p=0.95),
}
PROMPTS = range(97, 161)  # lengths of the prompts of a decode step
GROUP, PROMPT, COMPLETION = 16, 129, 128  # rollouts and tokens of an update


@dataclass(frozen=True)
class GraphRow:
    """One line of ``bench graph``.

    ``primitives`` is the number of operations in the graph, ``kernels`` that of the kernels that the GPU runs, ``gb``
    the bytes that they read and write, in 1e9. ``vocabulary_passes`` is the part of ``gb`` in arrays as wide as the
    vocabulary: 1 is reading or writing rows x vocabulary float32 numbers.
    """

    what: str
    variant: str
    logprobs: bool
    primitives: int
    kernels: int
    gb: float
    vocabulary_passes: float


def bench_graph(model: str, rows: int, backend: str, config: AdapterConfig | None = None) -> list[GraphRow]:
    """Load a model without its weights, and count its decode steps and an update; see `count`."""
    with graph.uncomputed():
        loaded = loading.load(model, device="cpu", weights="quantized", dtype="bfloat16")
    return count(loaded, rows, backend, config or AdapterConfig())


def count(loaded: LoadedModel, rows: int, backend: str, config: AdapterConfig) -> list[GraphRow]:
    """Count decode steps and an update; see `GraphRow`.

    ``bare`` is a loop over the model with equal rows that takes the likeliest token, ``mlx-lm`` its BatchGenerator,
    which always computes log-probabilities. The others are our engine; with an adapter it draws at temperature 1.
    On Metal the weights are the model's, on CUDA they are dense; ``adapter-merged`` takes dense ones on both,
    ``adapter-quantized`` 4-bit ones. The update is GRPO's: a ``micro-batch``, the share of the ``prompts``, which are
    read once, and the ``optimizer`` with clipping.

    Args:
        loaded: the model; its weights are lost, so do not use it afterwards.
        rows: completions decoded at once.
        backend: ``"metal"`` or ``"cuda"``.
        config: the adapter.

    Raises:
        UserError: if a layer's cache is not one of plain keys and values.
    """
    if not all(type(cache) is KVCache for cache in make_prompt_cache(loaded.model)):
        raise UserError(f"{loaded.name}: bench graph counts models whose layers keep plain keys and values")
    own = replace(loaded.backend, name=backend, weights="quantized", dtype="bfloat16")
    given = quantized = replace(loaded, backend=own, stop_ids=frozenset(), stop_strings=())
    with graph.uncomputed():
        dense = replace(given, model=twin(given.model), backend=replace(own, weights="dense"))
        loading.place(dense.model, dense.backend)
        if not any("scales" in module for _, module in given.model.named_modules()):
            quantized = replace(given, model=twin(given.model))
            nn.quantize(quantized.model, 32, 4)
            mx.eval(quantized.model.parameters())
        base = given if backend == "metal" else dense
        trained, *rollouts = (_adapted(one, config) for one in (base, dense, quantized))
    vocabulary = dense.model(mx.array([[0]])).shape[-1]  # a shape; it is never computed

    def decode(variant: str, logprobs: bool, run: Callable, *given: Any) -> GraphRow:
        counts = _counts(backend, vocabulary, "async_eval", run, *given)
        return _row("decode", variant, logprobs, counts[-1], rows * vocabulary)

    found = []
    for logprobs in (False, True):
        found.append(decode("bare", logprobs, _bare, base.model, rows, logprobs))
        with suppress(*UNFIT):  # a model whose rows it cannot decode together has no such line
            found.append(decode("mlx-lm", logprobs, _batch_generator, base.model, rows))
        for variant, params in SAMPLED.items():
            found.append(decode(variant, logprobs, _engine, base, rows, params, logprobs))
        for variant, adapted in zip(("adapter-merged", "adapter-quantized"), rollouts, strict=True):
            found.append(decode(variant, logprobs, _merged, adapted, rows, logprobs))

    learning = GRPOConfig(micro_tokens=2 * GROUP * (PROMPT + COMPLETION), logits_mb=2**19)
    with graph.uncomputed():
        learner = grpo.start(trained, learning)
        learner.optimizer.init(learner.module.trainable_parameters())
        mx.eval(learner.optimizer.state)
    *parts, optimizer = _counts(backend, vocabulary, None, _learn, learner, learning)
    micro = sum((part for part in parts if part.wide_bytes), Count())
    prompts = sum((part for part in parts if not part.wide_bytes), Count())
    update = {"micro-batch": micro, "prompts": prompts, "optimizer": optimizer}
    numbers = GROUP * COMPLETION * vocabulary
    return found + [_row("update", variant, False, part, numbers) for variant, part in update.items()]


def _adapted(loaded: LoadedModel, config: AdapterConfig) -> LoadedModel:
    """Return a second model of the same arrays, with an adapter."""
    model = twin(loaded.model)
    adapters.start(model, config)
    mx.eval(model.parameters())
    model.eval()
    return replace(loaded, model=model)


class _Counted(Exception):
    """Ends a run once enough steps are counted."""


def _counts(backend: str, vocabulary: int, by: str | None, run: Callable, *given: Any) -> list[Count]:
    """Return the counts of a run's evaluations that have kernels; with ``by``, only the first two by that function."""
    found: list[Count] = []

    def take(count: Count) -> None:
        if count.kernels:
            found.append(count)
        if by and len(found) == 2:
            raise _Counted

    with suppress(_Counted), graph.traced(backend, take, vocabulary, by):
        run(*given)
    return found


def _row(what: str, variant: str, logprobs: bool, count: Count, numbers: int) -> GraphRow:
    passes = count.wide_bytes / (4 * numbers)
    return GraphRow(what, variant, logprobs, count.primitives, count.kernels, count.bytes / 1e9, passes)


def _prompts(rows: int) -> list[list[int]]:
    return [[1] * PROMPTS[row % len(PROMPTS)] for row in range(rows)]


def _engine(loaded: LoadedModel, rows: int, params: SamplingParams, logprobs: bool) -> None:
    """Sample by the engine."""
    requests = [Request(tuple(prompt), seed) for seed, prompt in enumerate(_prompts(rows))]
    for _ in generate(loaded, requests, params, rows, logprobs=logprobs, memory_gb=1e6):
        pass


def _merged(loaded: LoadedModel, rows: int, logprobs: bool) -> None:
    """Sample with an adapter, as a training does."""
    with adapters.merged(loaded.model, loaded.backend):
        _engine(loaded, rows, SAMPLED["temperature-1"], logprobs)


def _bare(model: nn.Module, rows: int, logprobs: bool) -> None:
    """Decode equal rows in a loop over the model that takes the likeliest token."""
    cache = make_prompt_cache(model)
    model(mx.zeros((rows, PROMPTS[-1]), mx.int32), cache=cache)
    tokens = mx.zeros((rows, 1), mx.int32)
    mx.eval(tokens, [layer.state for layer in cache])
    while True:
        logits = model(tokens, cache=cache)[:, -1]
        tokens = mx.argmax(logits, axis=-1, keepdims=True)
        found = [tokens]
        if logprobs:
            logits = logits.astype(mx.float32)
            total = mx.logsumexp(logits, axis=-1, keepdims=True)
            found.append(mx.take_along_axis(logits, tokens, axis=-1) - total)
        mx.async_eval(*found)


def _batch_generator(model: nn.Module, rows: int) -> None:
    """Decode by mlx_lm, greedily."""
    stream = mx.default_stream(mx.Device(mx.cpu))
    batch = BatchGenerator(model, completion_batch_size=rows, prefill_batch_size=rows, stream=stream)
    try:
        batch.insert(_prompts(rows), [4] * rows)
        while batch.next_generated():
            pass
    finally:
        batch.close()


def _learn(learner: Learner, config: GRPOConfig) -> None:
    """Make an update of GRPO."""
    learned = (False,) * PROMPT + (True,) * COMPLETION
    ids = [(1,) * PROMPT + (2 + row,) * COMPLETION for row in range(GROUP)]
    logprobs = np.full(COMPLETION, -1, np.float32)
    rows = [Row(Example(str(row), own, learned), logprobs, 1 - 2 * (row % 2)) for row, own in enumerate(ids)]
    with suppress(ZeroDivisionError):  # by the metrics, since all arrays are zeros
        grpo.learn(learner, rows, 1, config)
