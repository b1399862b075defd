"""Forward passes over rows, micro-batch by micro-batch, with the prompt of several rows read once for all of them.

Rows of a group repeat their prompt, which for short completions is half of the work or more. Where it pays, the prompts
are read first, and each row continues from its prompt's keys and values. The result is that of whole rows, up to
float32's rounding; `train.gradients` takes gradients through both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, create_attention_mask, make_prompt_cache

from mlx_traces.engine import batching, cpu_trunk, logprobs
from mlx_traces.engine.batching import Example
from mlx_traces.engine.logprobs import Split
from mlx_traces.runtime import blas, cores, device, distributed

LEAST_SAVED = 0.1  # prompts are read once if that saves at least this share of a step's tokens

Arrays = list[mx.array]


def split(model: nn.Module) -> Split:
    """Split a model as `logprobs.split` does; find out whether rows can continue from a prompt's keys and values.

    The trunk is `cpu_trunk.trunk` where that computes the same.
    """
    with blas.threads_for(model, 64):
        halves, caches = logprobs.split(model), make_prompt_cache(model)
        if not all(type(cache) is KVCache for cache in caches):
            return halves
        fast = [cpu_trunk.trunk(model)] if cpu_trunk.serves(model) else []
        able = [replace(halves, trunk=trunk, caches=len(caches)) for trunk in (*fast, halves.trunk)]
        return next((each for each in able if _right(model, each, halves)), halves)


def _right(model: nn.Module, able: Split, halves: Split) -> bool:
    """Return whether two rows that continue from their prompts have the states of whole rows.

    The prompts are long enough to change the logits by more than the rounding of 16 bits.
    """
    rows = [
        Example("", logprobs.probe(model, prompt + rest), (False,) * prompt + (True,) * rest)
        for prompt, rest in ((32, 16), (24, 9))
    ]
    training = model.training
    model.eval()
    try:
        prompts = Prompts(able, rows)
        found, _ = prompts.states(able, prompts.read(able, 64, Queue()), [0, 1])
        wanted, _ = whole(halves, rows, [0, 1])
        return logprobs.alike(found, wanted)
    except (ValueError, TypeError, AttributeError):  # a trunk that takes no such cache
        return False
    finally:
        model.train(training)


class Queue:
    """Computes arrays; on a GPU without waiting, so that the host can prepare the next ones.

    At most two calls are under way at a time, to bound the memory.
    """

    def __init__(self) -> None:
        self.before: mx.array | None = None

    def compute(self, *arrays: Any) -> None:
        """Compute trees of arrays."""
        if device.select() == "cpu":
            cores.look()
            mx.eval(arrays)
            return
        mx.async_eval(arrays)
        if self.before is not None:
            mx.eval(self.before)
        self.before = tree_flatten(arrays)[0][1]  # computed when all arrays of its call are


def each(
    halves: Split,
    examples: Sequence[Example],
    micro_tokens: int,
    take: Callable[[mx.array, mx.array], Any],
) -> list[tuple[list[int], Any]]:
    """Call ``take`` on each micro-batch's states and tokens; return the indices of its rows with the result.

    ``take`` gets the (N, D) hidden states that predict N trained tokens and the (N,) tokens, row by row; it returns a
    tree of arrays. If memory runs out, it is called again for all rows, in smaller batches.
    """
    prompts = shared(halves, examples)

    def all_of_them(tokens: int) -> list[tuple[list[int], Any]]:
        done, queue = [], Queue()
        memory = prompts.read(halves, tokens, queue) if prompts else None
        for indices in micro_batches(prompts.rest if prompts else [len(example.ids) for example in examples], tokens):
            given = prompts.states(halves, memory, indices) if prompts else whole(halves, examples, indices)
            done.append((indices, take(*given)))
            queue.compute(done[-1][1])
        mx.eval(done)
        return done

    with blas.threads_for(halves, micro_tokens, distributed.world().size()):
        return halves.room.fit(micro_tokens, lengths_read(examples, prompts), all_of_them)


def by_row(
    halves: Split,
    examples: Sequence[Example],
    micro_tokens: int,
    take: Callable[[mx.array, mx.array], tuple[mx.array, ...]],
) -> list[list[np.ndarray]]:
    """Return what ``take`` computes for each row, on every rank; each rank computes its share of the rows.

    ``take`` gets states and tokens as in `each` and returns arrays with one number for each token. The result has, for
    each row, its part of each array in float32.
    """
    own = [examples[index] for index in distributed.share(len(examples))]
    found: list[Any] = [None] * len(own)
    for indices, arrays in each(halves, own, micro_tokens, take):
        arrays, start = [np.array(array) for array in arrays], 0
        for index in indices:
            end = start + own[index].count
            found[index], start = [array[start:end].tolist() for array in arrays], end
    return [[np.array(values, np.float32) for values in row] for row in distributed.gather(found)]


class Prompts:
    """The distinct prompts of some rows; a prompt is all tokens before the row's first trained token.

    `read` returns a list of arrays, each with a row for each prompt: the keys and values of every layer,
    (P, heads, L, size), padded right to the longest, and the last token's hidden state, (P, D). P and L are those of
    `batching.padded_shape`.
    """

    def __init__(self, halves: Split, examples: Sequence[Example]):
        starts = [max(1, example.trained.index(True, 1)) for example in examples]
        found: dict[tuple[int, ...], int] = {}
        self.examples = examples
        self.owner = [
            found.setdefault(example.ids[:start], len(found)) for example, start in zip(examples, starts, strict=True)
        ]
        self.lengths = np.array([len(ids) for ids in found], np.int32)
        self.rest = [len(example.ids) - start for example, start in zip(examples, starts, strict=True)]
        count, _, longest = batching.padded_shape(device.select(), len(found), 1, int(self.lengths.max()))
        self.ids, self.ends = np.zeros((count, longest), np.int32), np.zeros(count, np.int32)
        for row, ids in enumerate(found):
            self.ids[row, : len(ids)], self.ends[row] = ids, len(ids) - 1

    @property
    def saved(self) -> float:
        """The share of the rows' tokens that is saved; a prompt token costs 4/3, as `pull_back` reads it again."""
        every = sum(len(example.ids) for example in self.examples)
        return 1 - (sum(self.rest) + 4 / 3 * self.lengths.sum()) / every

    def read(self, halves: Split, micro_tokens: int, queue: Queue) -> Arrays:
        """Read all prompts, ``micro_tokens`` at a time; without a gradient."""
        parts = []
        for chunk in self._chunks(micro_tokens):
            parts.append(self._read(halves, chunk))
            queue.compute(parts[-1])
        return [mx.concatenate(arrays) for arrays in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def states(self, halves: Split, memory: Arrays, indices: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Return the (N, D) states and (N,) trained tokens of some rows; ``memory`` is the result of `read`."""
        owners = [self.owner[index] for index in indices]
        width, most = max(self.rest[index] for index in indices), int(self.lengths[owners].max())
        count, width, most = batching.padded_shape(device.select(), len(indices), width, most)
        owners += owners[:1] * (count - len(indices))
        rows, lengths = mx.array(owners), self.lengths[owners]
        ids, trained = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        for row, index in enumerate(indices):
            example, rest = self.examples[index], self.rest[index]
            ids[row, :rest], trained[row, :rest] = example.ids[-rest:], example.trained[-rest:]
        states = memory[-1][rows][:, None]
        if width > 1:
            pairs = zip(memory[:-1:2], memory[1:-1:2], strict=True)
            kept = [(keys[rows, :, :most], values[rows, :, :most]) for keys, values in pairs]
            hidden = halves.trunk(mx.array(ids[:, :-1]), cache=[_Continued(*pair, lengths) for pair in kept])
            states = mx.concatenate([states, hidden], axis=1)
        index = mx.array(np.flatnonzero(trained))
        return states.reshape(-1, states.shape[-1])[index], mx.array(ids.reshape(-1))[index]

    def pull_back(self, model: nn.Module, halves: Split, pulls: Arrays, micro_tokens: int) -> Iterator[Any]:
        """Yield the parameters' gradients through the prompts, one for each chunk of prompts; their sum is the whole.

        ``pulls`` are the loss's gradients with respect to the arrays of `read`.
        """
        for chunk in self._chunks(micro_tokens):

            def product(chunk: slice = chunk) -> mx.array:  # its gradient is the vector-Jacobian product with pulls
                read = self._read(halves, chunk)
                return sum((array * pull[chunk]).sum() for array, pull in zip(read, pulls, strict=True))

            yield nn.value_and_grad(model, product)()[1]

    def _chunks(self, micro_tokens: int) -> list[slice]:
        count, length = self.ids.shape
        parts = micro_batches([length] * count, micro_tokens)
        return [slice(part[0], part[-1] + 1) for part in parts]

    def _read(self, halves: Split, chunk: slice) -> Arrays:
        caches = [_Read() for _ in range(halves.caches)]
        hidden = halves.trunk(mx.array(self.ids[chunk]), cache=caches)
        last = hidden[mx.arange(len(hidden)), mx.array(self.ends[chunk])]
        return [array for cache in caches for array in (cache.keys, cache.values)] + [last]


class _Read:
    """The cache of a layer that reads prompts from the start; it has the interface of mlx_lm's caches."""

    offset = 0

    def make_mask(self, N: int, window_size: int | None = None, **_: Any) -> mx.array | str | None:
        return create_attention_mask(N, self.offset, False, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class _Continued:
    """The cache of a layer whose row r continues from ``lengths[r]`` of (R, heads, L, size) keys and values."""

    def __init__(self, keys: mx.array, values: mx.array, lengths: np.ndarray):
        self.keys, self.values, self.lengths = keys, values, lengths
        self.uniform = (lengths == keys.shape[2]).all()
        self.offset = int(lengths[0]) if self.uniform else mx.array(lengths)

    def make_mask(self, N: int, window_size: int | None = None, **_: Any) -> mx.array | str | None:
        if self.uniform:
            return create_attention_mask(N, self.offset, False, window_size)
        lengths, places = self.lengths[:, None, None], np.arange(self.keys.shape[2])
        before, own = places < lengths, np.tril(np.ones((N, N), bool))  # (R, 1, L) and (N, N)
        if window_size is not None:
            lost = lengths + np.arange(N)[:, None] - window_size  # (R, N, 1), the last position out of the window
            before, own = before & (places > lost), np.triu(own, 1 - window_size)
        mask = [np.broadcast_to(part, (len(lengths), N, part.shape[-1])) for part in (before, own)]
        return mx.array(np.concatenate(mask, axis=2)[:, None])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)


def shared(halves: Split, examples: Sequence[Example]) -> Prompts | None:
    """Return the rows' prompts if reading each once saves at least `LEAST_SAVED`, else None."""
    if not halves.caches or not examples:
        return None
    prompts = Prompts(halves, examples)
    return prompts if prompts.saved >= LEAST_SAVED else None


def lengths_read(examples: Sequence[Example], prompts: Prompts | None) -> list[int]:
    """Return the tokens of each sequence that is computed: whole rows, or what follows the prompts, and the prompts."""
    if prompts is None:
        return [len(example.ids) for example in examples]
    return [*prompts.rest, *prompts.lengths.tolist()]


def whole(halves: Split, examples: Sequence[Example], indices: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Return the (N, D) states and (N,) trained tokens of some rows, each read as a whole."""
    ids, positions = batching.pad([examples[index] for index in indices], device.select())
    return logprobs.token_states(halves, mx.array(ids), positions)


def micro_batches(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Split rows of these lengths into batches of at most ``micro_tokens`` tokens on this device; see `batching`."""
    return batching.micro_batches(range(len(lengths)), lengths, micro_tokens, device.select())
