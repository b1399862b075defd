"""Gradients of a step, micro-batch by micro-batch; a prompt that several rows share is read once.

Where prompts are read first (`engine.forward`), the backward pass is split at the same place: the micro-batches
accumulate gradients with respect to the prompts' keys and values, and one more pass takes that sum through the prompts.
The result is that of whole rows, up to float32's rounding. Memory is that of a micro-batch, plus the prompts' keys and
values and their gradient.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_traces.engine import forward
from mlx_traces.engine.batching import Example
from mlx_traces.engine.logprobs import Split
from mlx_traces.runtime import blas, distributed
from mlx_traces.train import optimizer

LossOf = Callable[[mx.array, mx.array, list[int]], tuple[mx.array, dict[str, mx.array]]]


def accumulate(
    model: nn.Module, halves: Split, examples: Sequence[Example], micro_tokens: int, loss_of: LossOf
) -> tuple[float, Any, Counter]:
    """Return a loss, its gradient in the trained parameters, and sums, each added up over micro-batches and ranks.

    Args:
        model: what is trained.
        halves: the model's trunk and head; from `forward.split`, shared prompts are read once where that saves work.
        examples: the rows, each with a trained token.
        micro_tokens: most tokens of a forward pass, padding included; fewer after memory ran out (`MemoryBudget`).
        loss_of: takes (N, D) hidden states, the (N,) tokens that they predict, row by row, and the indices of the
            micro-batch's rows; returns the micro-batch's part of the loss, and of the sums.
    """
    own = distributed.share(len(examples))
    shifted = loss_of if own.start == 0 else lambda *given: loss_of(*given[:2], [own.start + i for i in given[2]])
    rows = [examples[i] for i in own]
    prompts = forward.shared(halves, rows)

    def part(tokens: int) -> tuple[float, Any, Counter]:
        return _accumulate(model, halves, rows, prompts, tokens, shifted)

    with blas.threads_for(halves, micro_tokens, distributed.world().size()):
        loss, grads, sums = halves.room.fit(micro_tokens, forward.lengths_read(rows, prompts), part)
    return distributed.total_step(loss, grads, sums, model.trainable_parameters())


def _accumulate(
    model: nn.Module,
    halves: Split,
    examples: Sequence[Example],
    prompts: forward.Prompts | None,
    micro_tokens: int,
    loss_of: LossOf,
) -> tuple[float, Any, Counter]:
    """Compute this rank's part."""
    grads, prompt_grads, queue = None, None, forward.Queue()
    done = []  # each micro-batch's part of the loss, and of the sums
    if prompts is None:

        def whole(indices: list[int]) -> tuple[mx.array, dict[str, mx.array]]:
            return loss_of(*forward.whole(halves, examples, indices), indices)

        value_and_grad = nn.value_and_grad(model, whole)
        for indices in forward.micro_batches([len(example.ids) for example in examples], micro_tokens):
            part, grad = value_and_grad(indices)
            grads = optimizer.add(grads, grad)
            done.append(part)
            queue.compute(part, grads)
        return _total(done, grads)

    def continued(parameters: Any, memory: forward.Arrays, indices: list[int]) -> tuple[mx.array, dict[str, mx.array]]:
        model.update(parameters)
        return loss_of(*prompts.states(halves, memory, indices), indices)

    memory = prompts.read(halves, micro_tokens, queue)
    value_and_grads = mx.value_and_grad(continued, argnums=(0, 1))
    for indices in forward.micro_batches(prompts.rest, micro_tokens):
        part, (grad, pulls) = value_and_grads(model.trainable_parameters(), memory, indices)
        grads, prompt_grads = optimizer.add(grads, grad), optimizer.add(prompt_grads, pulls)
        done.append(part)
        queue.compute(part, grads, prompt_grads)
    for grad in prompts.pull_back(model, halves, prompt_grads, micro_tokens):
        grads = optimizer.add(grads, grad)
        queue.compute(grads)
    return _total(done, grads)


def _total(done: Sequence[tuple[mx.array, dict[str, mx.array]]], grads: Any) -> tuple[float, Any, Counter]:
    """Add up the micro-batches' parts of the loss and of the sums, in float64; wait for the gradient."""
    mx.eval(done, grads)
    sums = Counter()
    for _, more in done:
        sums.update({name: value.item() for name, value in more.items()})
    return sum((part.item() for part, _ in done), 0.0), grads, sums


@contextmanager
def checkpointed(layers: Sequence[nn.Module], wanted: bool = True) -> Iterator[None]:
    """Keep no activations inside these layers while the context lasts; the backward pass computes them again.

    Only these objects change, and only until the context ends: other models of the same class are not touched.
    """
    before = [type(layer) for layer in layers]
    if wanted:
        for layer in layers:
            drops = any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in layer.modules())
            layer.__class__ = _checkpointed_class(type(layer), drops)
    try:
        yield
    finally:
        for layer, kind in zip(layers, before, strict=True):
            layer.__class__ = kind


def _checkpointed_class(kind: type[nn.Module], drops: bool) -> type[nn.Module]:
    """Make the subclass whose call is checkpointed, with the trainable parameters as explicit inputs."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Dropout must drop the same elements when the layer is computed again. MLX's random stream cannot be rewound,
        # so there are three seeds: one for the layer, and one to continue with after each of its two calls.
        own, *after = mx.random.randint(0, 2**31 - 1, (3,)).tolist() if drops and self.training else (None,)

        def inner(parameters: Any, *inputs: Any, **named: Any) -> Any:
            self.update(parameters)
            if own is not None:
                mx.random.seed(own)
            result = kind.__call__(self, *inputs, **named)
            if own is not None:
                mx.random.seed(after.pop(0) if len(after) > 1 else after[0])
            return result

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
