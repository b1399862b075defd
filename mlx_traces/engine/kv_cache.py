"""The key-value cache of a batch whose rows join and leave: all rows write at one index; each began at its own.

Row r of the batch holds positions ``start[r] .. write - 1`` of a window that all rows share. A row that ends leaves
its slot to the next prompt, which is written so that it too ends at ``write``; nothing else moves. The window moves
left when it reaches the end of the buffer, once in hundreds of steps, and idle slots are dropped now and then.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_traces.engine import logprobs
from mlx_traces.engine.attention import SLICES, Reading
from mlx_traces.runtime import blas

STEP = 256  # positions by which the buffers grow
KEPT = "_mask_axes"  # the attribute of a model that keeps what `mask_axes` found


class Window:
    """What all layers share: where to write (host), where each row started (host and device), row positions.

    Attributes:
        write: index in the buffers that the next token's keys and values go to.
        start: (R,) first index of each row's own keys.
        offset: (R,) int32 on the device, each row's position for the rotary embedding; ``write - start``.
        low: first index that attention reads: the first that any row still needs, or 0 (`Reading.from_zero`).
        uniform: whether all rows began at 0; only then there is no mask, as attention without one may read keys from
            the beginning of the buffer, wherever its slice begins (`attention`).
        axes: number of axes of the mask, 4 or 5 (`mask_axes`).
    """

    def __init__(self, rows: int, axes: int = 4, reading: Reading = SLICES):
        self.write = 0
        self.low = 0
        self.axes = axes
        self.reading = reading
        self.start = np.zeros(rows, np.int32)
        self.refresh()

    def refresh(self) -> None:
        """Bring the device's copies up to date after ``start`` or ``write`` changed on the host."""
        self.low = 0 if self.reading.from_zero else int(self.start.min())
        self.offset = mx.array(self.write - self.start)
        self._starts = mx.array(self.start).reshape(-1, *[1] * (self.axes - 1))
        self.uniform = not self.start.any()

    def advance(self, by: int = 1) -> None:
        """Move to the next token, or back."""
        self.write += by
        self.offset = self.offset + by

    def mask(self, size: int | None = None) -> mx.array | None:
        """Return (R, 1, 1, K), or (R, 1, 1, 1, K): true where a key of the window is the row's own; None if all are.

        With a ``size``, that of a layer with a sliding window, only the row's last ``size`` keys count.
        """
        lost = 0 if size is None else max(0, self.write + 1 - size)
        if self.uniform and not lost:
            return None
        return mx.arange(self.low, self.write + 1) >= (mx.maximum(self._starts, lost) if lost else self._starts)


class SlotCache:
    """One layer's keys and values, (R, heads, capacity, size), with the interface of mlx_lm's caches."""

    def __init__(self, window: Window):
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """(R,) positions of the token that is being computed."""
        return self.window.offset

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        """Return the window's mask; mlx_lm's models ask the cache of the first layer of a kind for it."""
        return self.window.mask(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write one token of every row, (R, heads, 1, size), and return the window."""
        write, low, reading = self.window.write, self.window.low, self.window.reading
        self.reserve(write + 1, keys, values)
        self.keys[..., write : write + 1, :] = keys
        self.values[..., write : write + 1, :] = values
        return reading.part(self.keys, low, write + 1), reading.part(self.values, low, write + 1)

    def reserve(self, capacity: int, keys: mx.array, values: mx.array) -> None:
        """Make room for ``capacity`` positions, of the heads, size and dtype of ``keys`` and ``values``."""
        have = 0 if self.keys is None else self.keys.shape[2]
        if have >= capacity:
            return
        grown = []
        for old, like in ((self.keys, keys), (self.values, values)):
            shape = (len(self.window.start), like.shape[1], -(-capacity // STEP) * STEP - have, like.shape[3])
            new = mx.zeros(shape, like.dtype)
            grown.append(new if old is None else mx.concatenate([old, new], axis=2))
        self.keys, self.values = grown

    def fill(self, slots: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Put new rows, (len(slots), heads, L, size), into slots, so that they end just before the next write."""
        write = self.window.write
        self.reserve(write + 1, keys, values)
        first = write - keys.shape[2]
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            rows: Any = slice(slots[0], slots[0] + len(slots))
        else:
            rows = mx.array(slots)
        self.keys[rows, :, first:write, :] = keys
        self.values[rows, :, first:write, :] = values

    def shift(self, by: int) -> None:
        """Drop the first ``by`` positions of the buffer."""
        if self.keys is not None:
            self.keys, self.values = (
                mx.concatenate([array[:, :, by:], mx.zeros_like(array[:, :, :by])], axis=2)
                for array in (self.keys, self.values)
            )

    def keep(self, rows: mx.array) -> None:
        """Keep only these rows."""
        if self.keys is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def mask_axes(model: nn.Module, reading: Reading = SLICES) -> int | None:
    """Find out how many axes a model's mask needs when rows began at different places.

    Four, (R, 1, 1, K), for attention by ``mx.fast``. Five for models that split the heads by key-value head
    themselves, as mlx_lm's Gemma 2 does. To find out, rows that began at different places are decoded together and
    compared with each row alone. None if both masks give wrong logits: then only one row can be decoded at once. 0 if
    that is wrong too. The answer is kept with the model.
    """
    if not hasattr(model, KEPT):
        rows = [logprobs.probe(model, 24), logprobs.probe(model, 3)] * 4
        rows.pop()  # seven; with as many rows as key-value heads, a mask of four axes would be taken for one by head
        training = model.training
        model.eval()
        tries = ((4, rows, 4), (5, rows, 5), (4, rows[:1], None))
        with blas.threads_for(model, len(rows)):
            found = next((answer for axes, asked, answer in tries if decodes_right(model, axes, asked, reading)), 0)
        model.train(training)
        if not (found or mx.isfinite(model(mx.array([rows[0]]))).all().item()):
            return 4  # with broken weights the probe says nothing; drawing the first token reports them
        setattr(model, KEPT, found)
    return getattr(model, KEPT)


def decodes_right(
    model: nn.Module,
    axes: int,
    rows: Sequence[tuple[int, ...]],
    reading: Reading = SLICES,
    step: Callable[..., mx.array] | None = None,
) -> bool:
    """Return whether rows of two alternating prompts, decoded together, have the logits of each prompt alone.

    The first prompt is the longer one. It fills every slot first, so that the other rows' slots hold old keys, as in
    use. ``step`` decodes the rows, from (R,) tokens and the layers' caches; by default the model's modules do.
    """
    token, window, alone = 3, Window(len(rows), axes, reading), []
    caches = [SlotCache(window) for _ in model.layers]
    window.write = len(rows[0])
    window.start[:] = [window.write - len(row) for row in rows]
    window.refresh()
    try:
        for first, prompt in enumerate(rows[:2]):
            slots, read = list(range(first, len(rows), 1 + first)), make_prompt_cache(model)
            alone.append(model(mx.array([[*prompt, token]]))[:, -1])
            model(mx.array([prompt]), cache=read)
            for cache, own in zip(caches, read, strict=True):
                cache.fill(slots, *(mx.repeat(array, len(slots), axis=0) for array in own.keys_and_values()))
        tokens = mx.full((len(rows),), token)
        found = model(tokens[:, None], cache=caches)[:, -1] if step is None else step(tokens, caches)
        return logprobs.alike(found, mx.concatenate([alone[place % 2] for place in range(len(rows))]))
    except (ValueError, TypeError, AttributeError, IndexError):  # shapes or positions that do not go together
        return False


def align_right(array: mx.array, lengths: Sequence[int]) -> mx.array:
    """Move each row of (k, heads, L, size) so that its first ``lengths[i]`` positions come last."""
    width = array.shape[2]
    if all(length == width for length in lengths):
        return array
    source = np.arange(width)[None] - (width - np.array(lengths))[:, None]
    return mx.take_along_axis(array, mx.array(np.maximum(source, 0))[:, None, :, None], axis=2)
