"""The key-value cache of a batch whose rows come and go: every row writes at one place, each began at its own.

Row r of the batch holds positions ``start[r] .. write - 1`` of a window that all rows share. A row that ends leaves
its slot to the next prompt, which is written so that it too ends at ``write``; nothing else moves. The window moves
left when it reaches the end of the buffer, once in hundreds of steps, and rows without work are dropped now and then.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_traces.errors import UserError

STEP = 256  # positions by which the buffers grow
KEPT = "_mask_axes"  # the attribute of a model that keeps what `mask_axes` found


class Window:
    """What all layers share: where to write (host), where each row started (host and device), row positions.

    Attributes:
        write: index in the buffers that the next token's keys and values go to.
        start: (R,) first index of each row's own keys.
        offset: (R,) int32 on the device, each row's position for the rotary embedding; ``write - start``.
        low: first index that any row still needs.
        axes: of the mask; 4 for nearly every model, else there is one more of size 1 (`mask_axes`).
    """

    def __init__(self, rows: int, axes: int = 4):
        self.write = 0
        self.low = 0
        self.axes = axes
        self.start = np.zeros(rows, np.int32)
        self.refresh()

    def refresh(self) -> None:
        """Bring the device's copies up to date after ``start`` or ``write`` changed on the host."""
        self.low = int(self.start.min())
        self.offset = mx.array(self.write - self.start)
        self._starts = mx.array(self.start).reshape(-1, *[1] * (self.axes - 1))
        self._uniform = bool((self.start == self.low).all())

    def advance(self) -> None:
        """Go on to the next token."""
        self.write += 1
        self.offset = self.offset + 1

    def mask(self) -> mx.array | None:
        """Return (R, 1, 1, K), or (R, 1, 1, 1, K): true where a key of the window is the row's own; None if all are."""
        if self._uniform:
            return None
        return mx.arange(self.low, self.write + 1) >= self._starts


class SlotCache:
    """One layer's keys and values, (R, heads, capacity, size), behind the interface of mlx_lm's caches."""

    def __init__(self, window: Window):
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """(R,) positions of the token that is being computed."""
        return self.window.offset

    def make_mask(self, N: int, return_array: bool = False, **_: Any) -> mx.array | None:
        """Return the window's mask; mlx_lm's models ask the first layer's cache for it."""
        return self.window.mask()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write one token of every row, (R, heads, 1, size), and return the window."""
        write, low = self.window.write, self.window.low
        self.reserve(write + 1, keys, values)
        self.keys[..., write : write + 1, :] = keys
        self.values[..., write : write + 1, :] = values
        return self.keys[..., low : write + 1, :], self.values[..., low : write + 1, :]

    def reserve(self, capacity: int, keys: mx.array, values: mx.array) -> None:
        """Make room for ``capacity`` positions, of the heads, size and dtype of ``keys`` and ``values``."""
        have = 0 if self.keys is None else self.keys.shape[2]
        if have >= capacity:
            return
        grown = []
        for old, like in ((self.keys, keys), (self.values, values)):
            shape = (len(self.window.start), like.shape[1], _round_up(capacity) - have, like.shape[3])
            new = mx.zeros(shape, like.dtype)
            grown.append(new if old is None else mx.concatenate([old, new], axis=2))
        self.keys, self.values = grown

    def fill(self, slots: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Put new rows, (len(slots), heads, L, size), into slots, ending at the place of the next write."""
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
        """Keep these rows alone."""
        if self.keys is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def mask_axes(model: nn.Module) -> int | None:
    """Find out how many axes a mask of rows that began apart has for a model; None if it takes none.

    Four, (R, 1, 1, K), for attention by ``mx.fast``; five for what parts the heads by key-value head itself, as
    mlx_lm's Gemma 2 does, where four do not fit. So rows that began apart are decoded here, and what is right with five
    axes is right. The answer is kept with the model.

    Raises:
        UserError: if not even a single row can be decoded.
    """
    if not hasattr(model, KEPT):
        rows = [(1, 2, 3), (2, 3)] * 3 + [(1, 2, 3)]  # seven: as many key-value heads would misread four axes
        training = model.training
        model.eval()
        found = 4 if _apart(model, 4, rows) is not None else None
        if found is None and (apart := _apart(model, 5, rows)) is not None and apart < 0.05:
            found = 5
        lost = found is None and _apart(model, 4, rows[:1]) is None
        model.train(training)
        if lost:
            raise UserError(f"{type(model).__module__} reads its cache in a way that the sampling engine does not know")
        setattr(model, KEPT, found)
    return getattr(model, KEPT)


def _apart(model: nn.Module, axes: int, rows: Sequence[tuple[int, ...]]) -> float | None:
    """Decode rows of two prompts in turn together, and each prompt alone; return how far logits are apart.

    Relative to the greatest; None if the model cannot.
    """
    token, window, alone = 4, Window(len(rows), axes), []
    caches = [SlotCache(window) for _ in model.layers]
    window.write = max(map(len, rows))
    window.start[:] = [window.write - len(row) for row in rows]
    window.refresh()
    try:
        for first, prompt in enumerate(rows[:2]):
            slots, read = list(range(first, len(rows), 2)), make_prompt_cache(model)
            alone.append(model(mx.array([[*prompt, token]]))[:, -1])
            model(mx.array([prompt]), cache=read)
            for cache, own in zip(caches, read, strict=True):
                cache.fill(slots, *(mx.repeat(array, len(slots), axis=0) for array in own.keys_and_values()))
        found = model(mx.full((len(rows), 1), token), cache=caches)[:, -1]
    except (ValueError, TypeError, AttributeError, IndexError):  # shapes or positions that do not go together
        return None
    expected = mx.concatenate([alone[place % 2] for place in range(len(rows))])
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def align_right(array: mx.array, lengths: Sequence[int]) -> mx.array:
    """Move each row of (k, heads, L, size) so that its first ``lengths[i]`` positions come last."""
    width = array.shape[2]
    if all(length == width for length in lengths):
        return array
    source = np.arange(width)[None] - (width - np.array(lengths))[:, None]
    return mx.take_along_axis(array, mx.array(np.maximum(source, 0))[:, None, :, None], axis=2)


def _round_up(capacity: int) -> int:
    return -(-capacity // STEP) * STEP
