"""A model's trunk as a CPU computes it fastest, with gradients: GRPO, PPO and the reading of prompts call it.

MLX has no kernels of its own on a CPU for the gate, the rotary embedding and attention, and makes many passes of them.
Here the gate is one pass with its gradient written out, the embedding's cosines and sines are computed once for all
layers, and the queries that share keys are one product. An update of nano takes a sixth less time.
The decode step's own exponential (`fused`) would save another tenth, and take twice the memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from mlx_traces.engine import fused
from mlx_traces.models.adapters import LowRank
from mlx_traces.models.lora import DoRALinear, LoRALinear
from mlx_traces.runtime import device

ADAPTERS = (LowRank, LoRALinear, DoRALinear)  # they may stand around linear modules


def trunk(model: nn.Module) -> Callable[..., mx.array]:
    """Return a function from (B, T) ids, with mlx_lm's caches or without, to (B, T, D) hidden states.

    Where it does not serve a model (`serves`), it calls the model's own trunk; so it does for checkpointed layers.
    """

    def states(ids: mx.array, cache: Sequence[KVCache] | None = None) -> mx.array:
        if not serves(model):
            return model.model(ids, cache=cache)
        h, offset = model.model.embed_tokens(ids), cache[0].offset if cache else 0
        mask = _added_mask(h, cache[0] if cache else None, offset)
        rotate = _rotation(model.layers[0].self_attn.rope, offset, ids.shape[1])
        for layer, own in zip(model.layers, cache or [None] * len(model.layers), strict=True):
            h = h + _attention(layer.self_attn, layer.input_layernorm(h), mask, rotate, own)
            x, mlp = layer.post_attention_layernorm(h), layer.mlp
            h = h + mlp.down_proj(_gated(mlp.gate_proj(x), mlp.up_proj(x))[0])
        return model.model.norm(h)

    return states


def serves(model: nn.Module) -> bool:
    """Whether `trunk` computes a model itself: on a CPU, one whose modules are all `fused.known`."""
    return device.select() == "cpu" and fused.known(model, ADAPTERS)


def _added_mask(h: mx.array, cache: KVCache | None, offset: int | mx.array) -> mx.array | None:
    """Return (..., T, 1, K) to add to the scores: the lowest number where a key is not seen. None: all are seen."""
    mask, length = create_attention_mask(h, cache), h.shape[1]
    if mask is None:
        return None
    if isinstance(mask, str):  # causal, and all rows begin at the same position
        mask = mx.arange(offset + length) <= mx.arange(offset, offset + length)[:, None]
    return mx.where(mask, 0, mx.finfo(h.dtype).min).astype(h.dtype)[..., None, :]


def _rotation(rope: nn.Module, offset: int | mx.array, length: int) -> Callable[[mx.array], mx.array]:
    """Return the function that applies the rotary embedding to (B, T, heads, size).

    The rows' positions begin at the ``offset``, one for all or (B,). The cosines and sines are the embedding's output
    for a first half of ones and a second half of zeros.
    """
    unit = (mx.arange(rope.dims) < rope.dims // 2).astype(mx.float32)
    unit = mx.broadcast_to(unit, (mx.array(offset).size, 1, length, rope.dims))
    cos, sin = mx.split(rope(unit, offset=offset).reshape(-1, length, 1, 1, rope.dims), 2, axis=-1)
    sin = mx.concatenate([-sin, sin], axis=3)  # of the first half and of the second

    def rotate(x: mx.array) -> mx.array:
        halves = x.reshape(*x.shape[:3], 2, -1)
        return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)

    return rotate


def _attention(
    module: nn.Module, x: mx.array, mask: mx.array | None, rotate: Callable[[mx.array], mx.array], cache: KVCache | None
) -> mx.array:
    """Return a layer's (B, T, D) attention of normed (B, T, D) states."""
    projections, (rows, length, _) = (module.q_proj, module.k_proj, module.v_proj), x.shape
    queries, keys, values = (linear(x).reshape(rows, length, -1, module.rope.dims) for linear in projections)
    if "q_norm" in module:
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    queries, keys, values = rotate(queries) * module.scale, rotate(keys).swapaxes(1, 2), values.swapaxes(1, 2)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    groups, count, size = keys.shape[1:]
    queries = queries.reshape(rows, length, groups, -1, size).swapaxes(1, 2).reshape(rows, groups, -1, size)
    scores = queries @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = (scores.reshape(rows, groups, length, -1, count) + mask).reshape(scores.shape)
    out = mx.softmax(scores, axis=-1, precise=True) @ values
    return module.o_proj(out.reshape(rows, groups, length, -1, size).swapaxes(1, 2).reshape(rows, length, -1))


@mx.custom_function
@partial(mx.compile, shapeless=True)
def _gated(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """Return ``silu(gate) * up``, and the sigmoid of the gate, which is for its gradient and has none itself."""
    sigmoid = fused.sigmoid(gate)
    return (gate * sigmoid * up).astype(up.dtype), sigmoid


@_gated.vjp
def _gated_vjp(primals: Any, slopes: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    (gate, up), slope, sigmoid = primals, slopes[0], outputs[1]
    silu = gate * sigmoid
    return (slope * up * (sigmoid + silu * (1 - sigmoid))).astype(gate.dtype), (slope * silu).astype(up.dtype)
