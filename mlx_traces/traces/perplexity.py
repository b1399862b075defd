"""Perplexity of traces under a model."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_traces.engine.batching import Example, micro_batches, pad
from mlx_traces.engine.logprobs import split, token_logprobs
from mlx_traces.engine.sampling import NO_TOKEN, refuse_no_token
from mlx_traces.errors import UserError
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Trace
from mlx_traces.traces.encoding import encode

BATCH_TOKENS = 4096  # in a batch, padding included


def mean_probabilities(
    loaded: LoadedModel, traces: Sequence[Trace], thinking: bool | None = None
) -> list[float | None]:
    """Return 1 / perplexity of each completion under a model: the geometric mean of its tokens' probabilities.

    The tokens are those that SFT learns (`encoding.encode`), without the stop token and earlier turns; plain text is
    put after a stop token. ``thinking`` sets the chat template's switch, None leaves it as each trace was made. The
    result is None for an empty completion, and for a sequence longer than the model's context.

    Raises:
        UserError: for a trace that cannot be encoded, and for a model whose outputs are not finite numbers.
    """
    examples: dict[int, Example] = {}
    for index, trace in enumerate(traces):
        if not trace.completion:
            continue
        try:
            example = encode(loaded, trace, None, thinking)
        except UserError as error:
            raise UserError(f"trace {trace.id}: {error}") from None
        if not trace.messages:
            ids = example.ids if loaded.chat.encode("") else (*sorted(loaded.stop_ids)[:1], *example.ids)
            example = Example(trace.id, ids, (False, *example.trained[len(example.ids) + 1 - len(ids) :]))
        if example.count and (loaded.context is None or len(example.ids) <= loaded.context):
            examples[index] = example
    found: list[float | None] = [None] * len(traces)
    order = list(examples)
    lengths = [len(examples[index].ids) for index in order]
    with adapters.merged(loaded.model, loaded.backend):
        trunk_and_head = split(loaded.model)
        for batch in micro_batches(range(len(order)), lengths, BATCH_TOKENS):
            members = [order[place] for place in batch]
            ids, positions = pad([examples[index] for index in members])
            logprobs, _ = token_logprobs(trunk_and_head, mx.array(ids), positions, slopes=False, entropies=False)
            rows = np.array(logprobs, np.float64)
            refuse_no_token(loaded, np.where(np.isfinite(rows), 0, NO_TOKEN))
            at = 0
            for index in members:
                count = examples[index].count
                found[index] = min(1.0, math.exp(rows[at : at + count].mean()))
                at += count
    return found
