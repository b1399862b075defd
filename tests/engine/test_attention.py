"""Devices whose attention reads other keys than it is given, by stand-ins: what a probe says, and what is sampled."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from factories import make_model, make_tokenizer, wrap

from mlx_traces.diagnostics import doctor
from mlx_traces.engine import attention, fused
from mlx_traces.engine.attention import Reading
from mlx_traces.engine.generation import generate
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError

FURTHER, SLICE = "a slice from the middle", "a slice"


class Device:
    """MLX's attention on a device with a fault: which slices it misreads, and how often it was asked of those."""

    def __init__(self, monkeypatch):
        self.bases, self.asked = {}, 0
        self.whole, self.slicing = mx.fast.scaled_dot_product_attention, attention.slice_of
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", self)
        monkeypatch.setattr(attention, "slice_of", self.slice_of)
        attention.misread.cache_clear()

    def slice_of(self, buffer, low, high):
        found = self.slicing(buffer, low, high)
        self.bases[id(found)] = found, buffer, low
        return found

    def __call__(self, queries, keys, values, *, scale, mask=None, **more):
        if queries.shape[2] == 1 and id(keys) in self.bases:
            keys, values = (self.misread(*self.bases[id(array)][1:], array.shape[2], mask) for array in (keys, values))
        self.bases.clear()
        return self.whole(queries, keys, values, scale=scale, mask=mask, **more)

    def misread(self, buffer, low, count, mask):
        return buffer[..., low : low + count, :]


class FromZero(Device):
    """Reads from the buffer's beginning if there is no mask, as MLX's attention by cuDNN."""

    def misread(self, buffer, low, count, mask):
        self.asked += mask is None
        return buffer[..., 0 if mask is None else low :, :][..., :count, :]


class MaskedFromZero(Device):
    """Reads from the buffer's beginning with a mask too."""

    def misread(self, buffer, low, count, mask):
        self.asked += mask is not None
        return buffer[..., :count, :]


class Packed(Device):
    """Takes rows of a buffer for as long as the slice is."""

    def misread(self, buffer, low, count, mask):
        self.asked += 1
        flat = buffer.reshape(-1, buffer.shape[-1])[: buffer.shape[0] * buffer.shape[1] * count]
        return flat.reshape(*buffer.shape[:2], count, -1)


class Wrong(Device):
    """Attends to nothing."""

    def __call__(self, queries, *given, **more):
        return mx.zeros_like(queries)


FAULTS = {
    Device: ((), Reading(), []),
    FromZero: (((FURTHER, False),), Reading(), []),
    MaskedFromZero: (
        ((FURTHER, False), (FURTHER, True)),
        Reading(from_zero=True),
        ["read from their buffer's beginning"],
    ),
    Packed: (
        ((SLICE, False), (FURTHER, False), (SLICE, True), (FURTHER, True)),
        Reading(from_zero=True, copied=True),
        ["copied for each step"],
    ),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAULTS)
def test_the_probe_says_what_is_misread(kind, dtype, monkeypatch):
    kind(monkeypatch)
    wrong, way, _ = FAULTS[kind]
    assert attention.misread(dtype) == wrong and attention.reading(dtype) == way
    line = doctor.attention()
    assert not line.failed and ("works around" in line.value) == bool(wrong)
    assert all(f"{what} {'with' if masked else 'without'} a mask" in line.value for what, masked in wrong)
    attention.misread.cache_clear()


def test_attention_that_is_wrong_in_any_case_is_refused(monkeypatch):
    Wrong(monkeypatch)
    loaded = wrap(make_tokenizer(), make_model())
    loaded = replace(loaded, backend=replace(loaded.backend, name="cuda"))
    with pytest.raises(UserError, match=r"^this device's attention is wrong in float32 .*--device cpu"):
        list(generate(loaded, [Request((1, 2))], SamplingParams(2)))
    line = doctor.attention()
    assert line.failed and "--device cpu" in line.fix
    attention.misread.cache_clear()


def sampled(backend):
    """Sample one row at once; rows that begin together, again and again; rows that begin apart; a window that moves."""
    random, loaded = np.random.default_rng(0), wrap(make_tokenizer(), make_model())
    alike = [tuple(row) for row in random.integers(0, 98, (8, 20)).tolist()]
    apart = [tuple(random.integers(0, 98, size).tolist()) for size in (3, 41, 7, 1, 29, 12, 5, 33)]
    own = replace(loaded, backend=replace(loaded.backend, name=backend), notes=[])
    each = [SamplingParams(max_tokens=7 + 3 * (i % 5)) for i in range(8)]
    found = [
        sorted(generate(own, [Request(p) for p in prompts], each[: len(prompts)], rows), key=lambda pair: pair[0])
        for prompts, rows in ((apart[:3], 1), (alike, 4), (apart, 3))
    ]
    return [rollout.completion_ids for pairs in found for _, rollout in pairs], own.notes


@pytest.fixture(scope="module")
def expected():
    return sampled("cpu")[0]


@pytest.mark.parametrize("by", ["modules", "fused step"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_misreading_device_samples_the_same_tokens(expected, kind, by, monkeypatch):
    if by == "modules":
        monkeypatch.setattr(fused, "step_of", lambda *_: None)
    device = kind(monkeypatch)
    found, notes = sampled("metal")
    assert found == expected
    assert len(notes) == len(FAULTS[kind][2]) and all(words in notes[0] for words in FAULTS[kind][2])
    assert device.asked > 20 or kind in (Device, Packed)
    attention.misread.cache_clear()
