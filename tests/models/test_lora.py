"""LoRA's and DoRA's forward pass while they train: in the activations' 16 bits, in float32 exactly mlx_lm's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import make_model
from mlx.utils import tree_flatten
from mlx_lm.tuner import dora as their_dora
from mlx_lm.tuner import lora as theirs

from mlx_traces.config import AdapterConfig
from mlx_traces.models import adapters, lora

IDS = mx.array([[5, 9, 17, 40, 3], [88, 2, 2, 61, 30]])


def started(dtype, bits=None, **settings):
    """Return a model with a trained-like adapter, in float32, and the same numbers whatever the model's type."""
    model = make_model()
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    mx.random.seed(1)
    adapters.start(model, AdapterConfig(**{"rank": 4, **settings}))
    trained = tree_flatten(model.trainable_parameters())
    model.load_weights([(name, array + 0.1 * mx.random.normal(array.shape)) for name, array in trained], strict=False)
    return model


def plain(model):
    """Give the layers mlx_lm's own forward pass."""
    for module in model.modules():
        module.__class__ = {own: base for base, own in lora.OWN.items()}.get(type(module), type(module))
    return model


def loss_and_gradient(model):
    loss, grads = nn.value_and_grad(model, lambda ids: model(ids).astype(mx.float32).square().mean())(IDS)
    return loss.item(), dict(tree_flatten(grads))


def apart(found, expected):
    """Return the norm of the difference, relative to the norm expected."""
    found, expected = (
        np.concatenate([np.array(array.astype(mx.float32)).ravel() for array in arrays.values()]).astype(np.float64)
        for arrays in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def products(model, dtype):
    """Count the low-rank products of a type, by watching what the layers are asked for."""
    found, product = [], mx.array.__matmul__

    def watched(self, other):
        result = product(self, other)
        found.append(result.dtype)
        return result

    mx.array.__matmul__ = watched
    try:
        model(IDS)
    finally:
        mx.array.__matmul__ = product
    return found.count(dtype)


KINDS = {"lora": lora.LoRALinear, "dora": lora.DoRALinear}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_in_16_bits_the_products_are_too_and_the_gradients_float32(dtype, bits, kind):
    model = started(dtype, bits, kind=kind)
    layers = [module for module in model.modules() if type(module) is KINDS[kind]]
    assert len(layers) == 2 * 7 and type(model.layers[0].mlp.up_proj) is KINDS[kind]
    assert products(model, mx.float32) == 0 < products(plain(started(dtype, bits, kind=kind)), mx.float32)
    loss, grads = loss_and_gradient(model)
    assert {array.dtype for array in grads.values()} == {mx.float32}
    assert {array.dtype for _, array in tree_flatten(model.trainable_parameters())} == {mx.float32}
    expected_loss, expected = loss_and_gradient(plain(started(mx.float32, bits, kind=kind)))
    _, promoted = loss_and_gradient(plain(started(dtype, bits, kind=kind)))
    assert loss == pytest.approx(expected_loss, rel=0.03)
    # The base's own rounding is there anyway; the low-rank products add little to it.
    assert apart(grads, expected) < max(0.02, 1.5 * apart(promoted, expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_in_float32_it_is_exactly_mlx_lms(bits, kind):
    loss, grads = loss_and_gradient(started(mx.float32, bits, kind=kind))
    expected_loss, expected = loss_and_gradient(plain(started(mx.float32, bits, kind=kind)))
    assert loss == expected_loss and all(mx.array_equal(grads[name], expected[name]).item() for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_drops_out(kind):
    model = make_model()
    model.set_dtype(mx.bfloat16)
    before = model(IDS)
    adapters.start(model, AdapterConfig(rank=4, dropout=0.5, kind=kind))
    rounding = 0 if kind == "lora" else 0.2  # DoRA adds the bias after it has scaled the rest
    assert mx.allclose(model(IDS), before, rtol=0, atol=rounding).item()
    model.train()
    layer = model.layers[0].mlp.up_proj
    x = mx.random.normal((4, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    assert mx.array_equal(layer(x), layer.linear(x)).item()
    layer.lora_b = mx.ones_like(layer.lora_b)
    assert not mx.array_equal(layer(x), layer(x)).item()


def test_only_the_models_own_layers_change():
    calls = theirs.LoRALinear.__call__, their_dora.DoRALinear.__call__
    started(mx.bfloat16), started(mx.bfloat16, kind="dora")
    other = theirs.LoRALinear.from_base(nn.Linear(8, 8))
    assert (theirs.LoRALinear.__call__, their_dora.DoRALinear.__call__) == calls
    assert type(other) is theirs.LoRALinear
