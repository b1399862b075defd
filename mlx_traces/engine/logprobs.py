"""Log-probabilities of given tokens by one forward pass, in memory that does not grow with the vocabulary.

The last hidden states are computed for whole rows, the vocabulary-wide logits for the wanted positions alone, a chunk
at a time. While a chunk's softmax is in memory, its slope d log p(y) / dh is computed too, which is as wide as the
hidden state. The backward pass then needs no logits at all (the idea of Liger Kernel's fused cross-entropy, arXiv
2410.10989, for a head that is not trained and a loss that is not known yet).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_traces.runtime.memory_budget import MemoryBudget

LOGITS_MB = 128  # most MiB of one vocabulary-wide float32 buffer
TOLERANCE = {mx.float32: 0.01, mx.bfloat16: 0.1, mx.float16: 0.1}  # of the relative norm in `alike`


@dataclass(frozen=True)
class Split:
    """A model in two: ``trunk`` maps (B, T) ids to (B, T, D) hidden states, ``head`` (..., D) states to logits.

    ``head_module`` returns the current head, which a context may have replaced, or ``None`` if there is no module.
    ``frozen_head`` says that nothing in it is trained. ``caches`` is the number of layers if rows may continue from a
    prompt's keys and values, else 0 (`forward.split` finds out). ``room`` bounds the micro-batches by the memory.
    ``layers`` are the model's.
    """

    trunk: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]
    head_module: Callable[[], nn.Module | None]
    frozen_head: bool
    caches: int = 0
    room: MemoryBudget = field(default_factory=lambda: MemoryBudget("micro_tokens", "tokens in a micro-batch"))
    layers: Sequence[nn.Module] = ()


def split(model: nn.Module) -> Split:
    """Find a model's trunk and head, and check on three tokens that together they are the model.

    The head is the linear map by its usual name; or else, if nothing in it is trained, whatever the model does with
    its trunk's output (soft-capped or scaled logits, another name). If neither is found, the trunk is the whole model
    and the head is the identity: that is right too, but the states are then as wide as the vocabulary.
    """
    training = model.training
    model.eval()  # dropout would make the halves differ from the model
    found = _halves(model) or _rest(model) or Split(model, lambda logits: logits, lambda: None, False)
    model.train(training)
    return replace(found, layers=model.layers)


def _halves(model: nn.Module) -> Split | None:
    """Return the trunk and its linear head, ``None`` if there are none by the usual names."""
    probe = mx.array([[1, 2, 3]])
    for owner in (model, getattr(model, "language_model", None)):
        trunk = getattr(owner, "model", None)
        for holder, name, call in ((owner, "lm_head", "__call__"), (trunk, "embed_tokens", "as_linear")):
            if trunk is None or getattr(holder, name, None) is None:
                continue
            module = partial(getattr, holder, name)
            head = partial(_call, module, call)
            try:
                same = mx.allclose(head(trunk(probe)), model(probe), rtol=1e-3, atol=1e-3).item()
            except (ValueError, TypeError, AttributeError):  # halves that do not go together
                continue
            if same:
                return Split(trunk, head, module, not module().trainable_parameters())
    return None


def _rest(model: nn.Module) -> Split | None:
    """Return a trunk, and as the head the model's own call once its trunk has run; ``None`` if that is not the model.

    Parameters of such a head are not known by name, so it must not be trained: only layers may be.
    """
    inside = {id(array) for layer in model.layers for _, array in tree_flatten(layer.trainable_parameters())}
    if any(id(array) not in inside for _, array in tree_flatten(model.trainable_parameters())):
        return None

    def trunk(ids: mx.array, cache: Any = None) -> mx.array:
        return model.model(ids, cache)

    def head(states: mx.array) -> mx.array:
        return type(model).__call__(_StandIn(model, model=_StandIn(model.model, states=states)), None)

    try:
        probe = mx.array([[1, 2, 3]])
        states, logits = trunk(probe), model(probe)
        if states.shape == logits.shape or not mx.allclose(head(states), logits, rtol=1e-3, atol=1e-3).item():
            return None
    except (ValueError, TypeError, AttributeError):
        return None
    return Split(trunk, head, lambda: None, True)


class _StandIn:
    """A module's attributes, some of them replaced; a call returns the given states."""

    def __init__(self, module: nn.Module, **own: Any):
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self.states


def _call(module: Callable[[], nn.Module], name: str, states: mx.array) -> mx.array:
    return getattr(module(), name)(states)


def rows_per_chunk(vocabulary: int, logits_mb: float = LOGITS_MB) -> int:
    """Return how many rows of float32 logits fill the bound, at least 1."""
    return max(1, int(logits_mb * 2**20 // (4 * vocabulary)))


def token_logprobs(
    halves: Split,
    ids: mx.array,
    positions: np.ndarray,
    *,
    temperature: float = 1.0,
    logits_mb: float = LOGITS_MB,
    slopes: bool = True,
    entropies: bool = True,
) -> tuple[mx.array, mx.array | None]:
    """Return the log-probabilities of some tokens of a right-padded batch, and the entropies they were drawn with.

    Args:
        halves: the model, by `split`.
        ids: (B, T) int32. Padding stands behind every real token, so the causal mask keeps it out.
        positions: (N,) indices into the flattened (B, T - 1): position b * (T - 1) + t asks for token t + 1 of row b,
            given those before it.
        temperature: the logits are divided by it.
        logits_mb: most MiB of one vocabulary-wide float32 buffer.
        slopes: whether the log-probabilities will be differentiated.
        entropies: whether entropies are wanted.

    Returns:
        (N,) float32 log-probabilities in nats, differentiable in the model's parameters if ``slopes``, and (N,)
        float32 entropies in nats, which are not; None if they are not wanted.
    """
    hidden, targets = token_states(halves, ids, positions)
    return head_logprobs(halves, hidden, targets, temperature, logits_mb, slopes, entropies)


def token_states(halves: Split, ids: mx.array, positions: np.ndarray) -> tuple[mx.array, mx.array]:
    """Return the (N, D) last hidden states that predict tokens, and the (N,) tokens; see `token_logprobs`.

    A token's state depends on the tokens before it only.
    """
    hidden = halves.trunk(ids[:, :-1])
    index = mx.array(positions)
    return hidden.reshape(-1, hidden.shape[-1])[index], ids[:, 1:].reshape(-1)[index]


def head_logprobs(
    halves: Split,
    hidden: mx.array,
    targets: mx.array,
    temperature: float = 1.0,
    logits_mb: float = LOGITS_MB,
    slopes: bool = True,
    entropies: bool = True,
    entropy_slopes: bool = False,
) -> tuple[mx.array, mx.array | None]:
    """Return (N,) log-probabilities and entropies of (N,) targets, given (N, D) hidden states; see `token_logprobs`.

    With ``entropy_slopes`` (and both others) the entropies are differentiable too, which costs one more product with
    the head.
    """
    count = rows_per_chunk(halves.head(hidden[:1]).shape[-1], logits_mb)  # a shape; it is never computed
    logprobs, spread, before = [], [], []
    for at in range(0, hidden.shape[0], count):
        states, wanted = hidden[at : at + count], targets[at : at + count]
        if before:  # one chunk after the other, or all their logits would be alive at once
            states = mx.depends([states], before)[0]
        if slopes and not halves.frozen_head:
            if before:
                states = states + 0 * before[0].sum()  # orders the backward pass too, which `depends` does not
            logprob, entropy = _trained_chunk(halves, states, wanted, temperature)
        else:
            both = _frozen_chunk(
                halves, mx.stop_gradient(states), wanted, temperature, slopes, slopes and entropy_slopes
            )
            moved = (states - mx.stop_gradient(states)).astype(mx.float32)  # 0, with a gradient of 1
            logprob, entropy = (_with_slope(value, slope, moved) for value, slope in both)
        logprobs.append(logprob)
        spread.append(entropy if entropy_slopes else mx.stop_gradient(entropy))
        before = [logprob, spread[-1]] if entropies else [logprob]  # an entropy still to be computed holds its logits
    return mx.concatenate(logprobs), mx.concatenate(spread) if entropies else None


def _with_slope(value: mx.array, slope: mx.array | None, moved: mx.array) -> mx.array:
    return value if slope is None else mx.stop_gradient(value) + (moved * mx.stop_gradient(slope)).sum(axis=-1)


def _trained_chunk(halves: Split, states: mx.array, targets: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Return log-probabilities and entropies of a trained head; the backward pass computes the logits again."""
    module = halves.head_module()
    trained = dict(tree_flatten(module.trainable_parameters())) if module is not None else {}

    def chunk(states: mx.array, *parameters: mx.array) -> list[mx.array]:
        if trained:
            module.update(tree_unflatten(list(zip(trained, parameters, strict=True))))
        logits = halves.head(states).astype(mx.float32) / temperature
        normalised = logits - logsumexp(logits)[:, None]
        entropy = -(mx.exp(normalised) * _finite(halves, normalised)).sum(axis=-1)
        return [mx.take_along_axis(normalised, targets[:, None], axis=-1)[:, 0], entropy]

    # Only inputs of a custom function get gradients, so the head's parameters are inputs.
    lean = mx.custom_function(chunk)

    @lean.vjp
    def backward(primals: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
        inputs = [primals] if isinstance(primals, mx.array) else list(primals)  # MLX passes a single one without a list
        slopes = mx.vjp(chunk, mx.depends(inputs, list(cotangents)), list(cotangents))[1]
        return (*mx.depends(slopes[:1], slopes[1:] or slopes[:1]), *slopes[1:])  # finish a chunk before the next one

    return tuple(lean(states, *trained.values()))


def _frozen_chunk(
    halves: Split, states: mx.array, targets: mx.array, temperature: float, slopes: bool, entropy_slopes: bool
) -> tuple[tuple[mx.array, mx.array | None], tuple[mx.array, mx.array | None]]:
    """Return log-probabilities and entropies, each with its (n, D) float32 slopes d / d states if those are wanted."""
    raw = halves.head(states)
    logits = raw.astype(mx.float32)
    if temperature != 1.0:
        logits = logits / temperature
    probs = mx.softmax(logits, axis=-1)  # one pass, where exponentials, their sum and a division would be four
    sums = sum_wide(probs)  # 1, up to the error of softmax's own sum
    log_total = logits.max(axis=-1) - mx.log(probs.max(axis=-1) / sums)  # the greatest is at least 1 / V, never 0
    logprob = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_total
    mean = sum_wide(probs * _finite(halves, logits)) / sums
    entropy = log_total - mean

    def slope(descent: mx.array) -> mx.array:
        """Return the gradient with respect to the states; ``descent`` is minus that of the logits, times ``sums``."""
        (slopes,) = mx.vjp(halves.head, [states], [descent.astype(raw.dtype)])[1]
        return slopes.astype(mx.float32) * (-1 / (temperature * sums))[:, None]

    slant = slope(probs * (_finite(halves, logits) - mean[:, None])) if entropy_slopes else None
    if not slopes:
        return (logprob, None), (entropy, slant)
    own = mx.take_along_axis(probs, targets[:, None], axis=-1)
    descent = mx.put_along_axis(probs, targets[:, None], own - sums[:, None], axis=-1)
    return (logprob, slope(descent)), (entropy, slant)


def _finite(halves: Split, logits: mx.array) -> mx.array:
    """Return logits, or log-probabilities, with a number for the -inf that some models give tokens that do not exist.

    Its product with a probability of 0 is 0, and its products with gradients are finite. A linear head gives no -inf.
    """
    return logits if halves.head_module() is not None else mx.maximum(logits, -1e30)


def logsumexp(logits: mx.array) -> mx.array:
    """Return the logarithm of the summed exponentials of (..., V) float32 logits; see `sum_wide`."""
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    return top[..., 0] + mx.log(sum_wide(mx.exp(logits - top)))


def sum_wide(array: mx.array) -> mx.array:
    """Return the sums of a last axis as wide as a vocabulary, (..., V) to (...): sums of the sums of its parts.

    On a CPU MLX adds the numbers one by one. In float32 that made the log-probabilities of a real model with 151,936
    logits wrong by 4e-4, all in the same direction. With partial sums the error is 3e-6.
    """
    return blocks(array, 0).sum(axis=-1).sum(axis=-1)


def blocks(array: mx.array, fill: float, size: int | None = None) -> mx.array:
    """Return a last axis as wide as a vocabulary in blocks, (..., V) to (..., B, size), both near the root of V.

    Where no divisor of V is near it, or V is no multiple of a given ``size``, the last block ends with ``fill``.
    """
    width = array.shape[-1]
    root = math.isqrt(width)
    size = size or next((size for size in range(root, root // 4, -1) if width % size == 0), root)
    if width % size:
        array = mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -width % size)], constant_values=fill)
    return array.reshape(*array.shape[:-1], -1, size)


def alike(found: mx.array, expected: mx.array) -> bool:
    """Whether two computations of the same states or logits, (..., N), agree up to the rounding of their type.

    Compares the norm of the difference with the norm of the expected values. The mean over N is subtracted first,
    since logits are only defined up to a constant. Another order of summation moves a real model's last states by 3 %
    in bfloat16 and float16, and by 0.1 % where a GPU's products round float32 to ten bits. False where a number is not
    finite.
    """
    if found.shape != expected.shape:
        return False
    wide, own = (array.astype(mx.float32) for array in (expected, found))
    wide, own = (array - array.mean(axis=-1, keepdims=True) for array in (wide, own))
    apart = mx.sqrt(((own - wide) ** 2).sum() / mx.maximum((wide**2).sum(), 1e-30))
    return apart.item() < TOLERANCE.get(expected.dtype, TOLERANCE[mx.float32])


def probe(model: Callable[[mx.array], mx.array], length: int) -> tuple[int, ...]:
    """Return ``length`` tokens to test a model with, from all over its vocabulary; always the same ones."""
    vocabulary = model(mx.array([[0]])).shape[-1]  # a shape; it is never computed
    return tuple(np.random.default_rng(length).integers(0, vocabulary, length).tolist())
