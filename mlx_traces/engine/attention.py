"""A probe of this device's attention: does it read the right keys and values from a slice of a longer buffer?

MLX's attention by cuDNN (one query, no mask, 16 bits, 256 keys and more) does not: it reads from the beginning of the
buffer, wherever the slice begins. Completions are then noise, without an error.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from mlx_traces.engine.logprobs import alike
from mlx_traces.errors import UserError
from mlx_traces.models.convert import weight_name

KEYS, BEGIN, CAPACITY = 320, 100, 512  # of the probe: number of keys read, index of the first, length of the buffer
HEADS, GROUPS, SIZE = 4, 2, 64


@dataclass(frozen=True)
class Reading:
    """How keys and values are passed to attention.

    Attributes:
        from_zero: slices begin at the buffer's beginning with a mask too; without a mask they always do.
        copied: slices are copied first.
    """

    from_zero: bool = False
    copied: bool = False

    def part(self, buffer: mx.array, low: int, high: int) -> mx.array:
        """Return positions ``low`` to ``high`` of a buffer, (..., positions, size)."""
        piece = slice_of(buffer, low, high)
        return mx.contiguous(piece) if self.copied else piece


SLICES = Reading()  # for a device that misreads nothing
WHOLE, SLICE, FURTHER = "a whole buffer", "a slice", "a slice from the middle"


def slice_of(buffer: mx.array, low: int, high: int) -> mx.array:
    """Return positions ``low`` to ``high`` of a buffer, (..., positions, size), without a copy."""
    return buffer[..., low:high, :]


class Case(NamedTuple):
    """A case of the probe: ``what`` attention reads, and whether there is a mask."""

    what: str
    masked: bool

    def __str__(self) -> str:
        return f"{self.what} {'with' if self.masked else 'without'} a mask"


@cache
def misread(dtype: mx.Dtype) -> tuple[Case, ...]:
    """Return the cases in which attention of one query is wrong on the default device; empty if there are none.

    The cases are a whole buffer, a slice from a buffer's beginning, and a slice from its middle, each without and with
    a mask. Each is compared with the formula, computed step by step in float32.
    """
    keys, values = (mx.random.normal((2, GROUPS, CAPACITY, SIZE), dtype, key=mx.random.key(at)) for at in (1, 2))
    queries = 3 * mx.random.normal((2, HEADS, 1, SIZE), dtype, key=mx.random.key(3))
    wrong = []
    for masked in (False, True):
        mask = mx.arange(KEYS) >= mx.array([0, 50]).reshape(2, 1, 1, 1) if masked else None
        for what, begin in ((WHOLE, 0), (SLICE, 0), (FURTHER, BEGIN)):
            own = [slice_of(array, begin, begin + KEYS) for array in (keys, values)]
            wide = [mx.contiguous(array).astype(mx.float32) for array in own]
            if what == WHOLE:
                own = [mx.contiguous(array) for array in own]
                mx.eval(own)
            found = mx.fast.scaled_dot_product_attention(queries, *own, scale=SIZE**-0.5, mask=mask)
            scores = queries.astype(mx.float32).reshape(2, GROUPS, -1, SIZE) @ wide[0].swapaxes(-1, -2) * SIZE**-0.5
            scores = scores if mask is None else mx.where(mask, scores, -mx.inf)
            expected = (mx.softmax(scores, axis=-1) @ wide[1]).reshape(2, HEADS, 1, SIZE)
            if not alike(found.astype(mx.float32), expected.astype(dtype).astype(mx.float32)):
                wrong.append(Case(what, masked))
    return tuple(wrong)


def reading(dtype: mx.Dtype) -> Reading:
    """Return how keys and values of a type must be passed to attention on the default device.

    Raises:
        UserError: if attention is wrong even of whole buffers.
    """
    wrong = misread(dtype)
    kinds = {case.what for case in wrong}
    if WHOLE in kinds:
        raise UserError(
            f"this device's attention is wrong in {weight_name(dtype)} ({', '.join(map(str, wrong))}), so its results "
            "cannot be trusted: pass another --dtype, or --device cpu; run mlx-traces doctor for details"
        )
    return Reading(from_zero=Case(FURTHER, True) in wrong, copied=SLICE in kinds)
