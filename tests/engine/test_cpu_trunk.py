"""The trunk that a CPU trains by: states and gradients against float64, and what it leaves to the modules."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import KNOWN, make_known
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from mlx_lm.models.cache import make_prompt_cache

from mlx_traces.config import AdapterConfig
from mlx_traces.engine import cpu_trunk, forward, fused
from mlx_traces.models import adapters, lora
from mlx_traces.models.loading import load
from mlx_traces.runtime import device
from mlx_traces.train import gradients

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}  # it scales queries and keys


def spread(model, trunk, ids):
    """Return a trunk's states, and the gradient of their weighted sum in what is trained, as float64."""
    states = trunk(ids)
    weights = mx.random.normal((*ids.shape, 1), key=mx.random.key(7)).astype(states.dtype)
    grads = nn.value_and_grad(model, lambda: (trunk(ids) * weights).sum())()[1]
    return [np.concatenate([np.array(a, np.float64).ravel() for a in part]) for part in ([states], leaves(grads))]


def leaves(tree):
    return [array for _, array in tree_flatten(tree)]


@pytest.mark.parametrize("kind", ["nano", *KNOWN, "yarn"])
@pytest.mark.parametrize("trained", ["lora", "dora", "full"])
def test_the_trunk_and_its_gradient_are_as_near_to_float64_as_the_modules(kind, trained):
    made = {"nano": lambda: load("nano").model, "yarn": lambda: make_known("qwen2", rope_scaling=YARN)}
    model = made[kind]() if kind in made else make_known(kind)
    mx.random.seed(1)
    adapters.start(model, AdapterConfig(rank=4, kind=trained))
    added = [(n, a + 0.05 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.trainable_parameters())]
    model.load_weights(added, strict=False)
    ids = mx.array(np.random.default_rng(5).integers(0, 98, (3, 20)))
    assert cpu_trunk.serves(model)
    own, theirs = spread(model, cpu_trunk.trunk(model), ids), spread(model, model.model, ids)
    for module in model.modules():  # mlx_lm's forward pass, in float64
        module.__class__ = {ours: base for base, ours in lora.OWN.items()}.get(type(module), type(module))
    model.set_dtype(mx.float64, lambda _: True)
    for found, modules, expected in zip(own, theirs, spread(model, model.model, ids), strict=True):
        most = 1.5 * np.linalg.norm(modules - expected)
        assert np.linalg.norm(found - expected) < most < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", KNOWN)
def test_prompts_are_read_as_the_modules_do(kind):
    model, tokens = make_known(kind), mx.array(np.random.default_rng(3).integers(0, 98, (3, 21)))
    own, expected = make_prompt_cache(model), make_prompt_cache(model)
    for part in (tokens[:, :13], tokens[:, 13:]):
        cpu_trunk.trunk(model)(part, cache=own)
        model(part, cache=expected)
    for one, other in zip(own, expected, strict=True):
        assert one.offset == 21
        for found, wanted in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5 * mx.abs(wanted).max().item())


def test_checkpointed_layers_stay_so():
    model, ids = make_known("qwen2"), mx.array([[3, 1, 4, 1, 5]])
    model.freeze()
    own = cpu_trunk.trunk(model)
    assert fused.known(model) and not mx.array_equal(own(ids), model.model(ids)).item()
    with gradients.checkpointed(model.layers):
        assert mx.array_equal(own(ids), model.model(ids)).item()


def test_a_trunk_that_computes_otherwise_is_not_taken(monkeypatch):
    model = make_known("qwen2")
    own, ids = forward.split(model).trunk, mx.array([[3, 1, 4, 1, 5]])
    assert forward.split(model).caches and not mx.array_equal(own(ids), model.model(ids)).item()
    monkeypatch.setattr(device, "select", lambda: "cuda")
    assert mx.array_equal(own(ids), model.model(ids)).item()
    monkeypatch.undo()
    monkeypatch.setattr(qwen2, "swiglu", lambda gate, x: nn.gelu(gate) * x)
    assert forward.split(model).trunk is model.model and forward.split(model).caches


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_gates_gradient_is_float64s_within_rounding(dtype):
    gate = mx.array([*np.linspace(-100, 100, 20_001), *np.linspace(-1e-3, 1e-3, 101), 6e4, -6e4]).astype(dtype)
    wide, ones = np.array(gate, np.float64), mx.ones_like(gate)
    sigmoid = np.exp(-np.logaddexp(0, -wide))
    _, slopes = mx.vjp(lambda *both: cpu_trunk._gated(*both)[0], [gate, 2 * ones], [ones])
    for own, exact in zip(slopes, (2 * sigmoid * (1 + wide * (1 - sigmoid)), wide * sigmoid), strict=True):
        limits = np.finfo(np.array(own).dtype)
        most = 1e-6 * (1 + np.abs(wide)) + 2 * limits.eps * np.abs(exact) + limits.smallest_subnormal
        assert own.dtype == dtype and (np.abs(np.array(own, np.float64) - exact) <= most).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits_are_taken(dtype):
    model, exact = make_known("qwen3", dtype=dtype), make_known("qwen3", dtype=dtype)
    exact.set_dtype(mx.float32)
    ids = mx.array(np.random.default_rng(5).integers(0, 98, (4, 30)))
    own, modules, wanted = forward.split(model).trunk(ids), model.model(ids), exact.model(ids)
    assert own.dtype == dtype and not mx.array_equal(own, modules).item()
    assert mx.linalg.norm((own - wanted).flatten()) < 1.5 * mx.linalg.norm((modules - wanted).flatten())
