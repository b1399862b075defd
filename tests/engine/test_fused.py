"""The fused decode step against mlx_lm's modules, on every kind of layer that it knows, and what it does not take."""

import copy
import gc
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import KNOWN, broken, make_known, make_tokenizer, wrap
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama, qwen2
from mlx_lm.models.rope_utils import Llama3RoPE

from mlx_traces.config import AdapterConfig
from mlx_traces.engine import cpu_trunk, fused, kv_cache
from mlx_traces.engine.generation import generate
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.models import adapters
from mlx_traces.models.loading import load


def loaded_as(model, backend="cpu"):
    loaded = wrap(make_tokenizer(), model)
    return replace(loaded, backend=replace(loaded.backend, name=backend), notes=[])


def sampled(loaded, rows=5, part=slice(None)):
    """Return the rollouts of prompts of uneven length, greedy ones and others, rows joining and leaving."""
    random = np.random.default_rng(2)
    asked = [Request(tuple(random.integers(0, 98, size).tolist()), size) for size in (3, 19, 7, 19, 1, 12, 30, 5)]
    each = [SamplingParams(max_tokens=5 + 2 * i, temperature=float(i % 2)) for i in range(len(asked))]
    found = dict(generate(loaded, asked[part], each[part], rows, logprobs=True))
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("kind", KNOWN)
def test_the_fused_step_samples_what_the_modules_do(kind, monkeypatch):
    """Each backend's layout is computed here, by what MLX does on a CPU in place of its kernels."""
    model, found = make_known(kind), {}
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    for backend in ("cpu", "metal", "cuda"):
        loaded = loaded_as(model, backend)
        found[backend] = sampled(loaded) + sampled(loaded, 1, slice(3))
        assert getattr(model, fused.PROVED + backend)
    assert not hasattr(model, kv_cache.KEPT)  # the modules' masks need no probe
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys() and all((before[name] == np.array(after[name])).all() for name in before)
    monkeypatch.setattr(fused, "step_of", lambda *_: None)
    loaded = loaded_as(model)
    expected = sampled(loaded) + sampled(loaded, 1, slice(3))
    for backend, rollouts in found.items():
        for own, wanted in zip(rollouts, expected, strict=True):
            assert own.completion_ids == wanted.completion_ids, backend
            np.testing.assert_allclose(own.model_logprobs, wanted.model_logprobs, atol=1e-5, err_msg=backend)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_joined_without_a_change_of_one_bit(bits):
    model = make_known("qwen2", bits)
    layer, x = model.layers[1], mx.array(np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32))
    apart = [[module(x) for module in modules] for modules in fused._to_join(layer)]
    mx.eval(apart)
    step = fused.step_of(model, "cpu")
    for outputs, joined, modules in zip(apart, step.joined[1], fused._to_join(layer), strict=True):
        assert (joined(x) == mx.concatenate(outputs, axis=-1)).all().item()
        assert all((module(x) == own).all().item() for module, own in zip(modules, outputs, strict=True))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("backend", ["cpu", "metal", "cuda"])
def test_sixteen_bits_are_taken(dtype, backend):
    model = make_known("qwen3", dtype=dtype)
    assert fused.step_of(model, backend) is not None
    rollout = sampled(loaded_as(model, backend), part=slice(3, 6))[1]
    logits = np.array(model(mx.array([rollout.prompt_ids + rollout.completion_ids[:-1]]))[0].astype(mx.float32))
    own = logits[len(rollout.prompt_ids) - 1 :]
    own = own - np.logaddexp.reduce(own, axis=-1, keepdims=True)
    expected = own[np.arange(len(own)), rollout.completion_ids]
    assert np.abs(np.array(rollout.model_logprobs) - expected).mean() < 0.25  # of logits up to 60


def test_joining_takes_no_memory_but_a_layers(exact_memory):
    model = make_known("llama")
    before = mx.get_active_memory()
    step = fused.step_of(model, "cpu")
    assert mx.get_active_memory() - before < 20_000  # sines, norms; the weights are 300,000 bytes
    layer = [array for modules in fused._to_join(model.layers[0]) for module in modules for array in module.values()]
    assert fused.extra_bytes(model) == sum(array.nbytes for array in layer)
    assert step.joined[0][0].weight.nbytes == 128 * 64 * 4
    assert fused.extra_bytes(nn.Linear(3, 3)) == 0


def joined(model):
    return [module for pair in fused.step_of(model, "cpu").joined for module in pair]


def same(some, others):
    return [one is other for one, other in zip(some, others, strict=True)]


def test_weights_stay_joined_until_one_is_replaced(monkeypatch):
    model = make_known("qwen2")
    first, old = joined(model), sampled(loaded_as(model))
    assert all(same(joined(model), first))
    copied = copy.deepcopy(model, {id(array): array for _, array in tree_flatten(model.parameters())})
    assert all(same(joined(copied), first))
    monkeypatch.setattr(fused, "_right", lambda *_: pytest.fail("proved once, whatever the weights"))
    model.layers[1].self_attn.k_proj.bias = model.layers[1].self_attn.k_proj.bias + 3 * mx.arange(32)
    new = sampled(loaded_as(model))
    assert same(joined(model), first) == [True, True, False, True]
    monkeypatch.setattr(fused, "step_of", lambda *_: None)
    assert new != old and [r.completion_ids for r in new] == [r.completion_ids for r in sampled(loaded_as(model))]


def test_replaced_weights_are_not_kept_for_ever(exact_memory):
    """As by full fine-tuning, which replaces all weights between two samplings."""
    model, active = make_known("qwen2"), []
    for _ in range(5):
        model.update(tree_map(lambda array: 1.001 * array, model.parameters()))
        mx.eval(model.parameters())
        assert fused.step_of(model, "cpu") is not None
        gc.collect()
        active.append(mx.get_active_memory())
    assert active[-1] - active[1] < 20_000  # a layer's joined weights are 98,000 bytes


def test_an_adapter_is_called_and_a_merged_one_joined(exact_memory):
    model = make_known("qwen2")
    adapters.start(model, AdapterConfig(rank=4))
    shaken = [
        (n, 0.3 * mx.random.normal(a.shape, key=mx.random.key(1)))
        for n, a in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(shaken, strict=False)
    assert not fused.known(model)
    expected = sampled(loaded_as(model))
    before = mx.get_active_memory()
    with adapters.merged(model):
        assert fused.step_of(model, "cpu") is not None
        assert [r.completion_ids for r in sampled(loaded_as(model))] == [r.completion_ids for r in expected]
    assert fused.step_of(model, "cpu") is None
    gc.collect()
    assert mx.get_active_memory() - before < 20_000  # nothing keeps what was merged


@pytest.mark.parametrize("targets", [None, ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_is_kept_apart_is_joined_too(targets, kind, monkeypatch):
    """As for a 4-bit base on Metal; DoRA's is called."""
    model = make_known("qwen2", 4)
    adapters.start(model, AdapterConfig(rank=4, targets=targets, kind=kind))
    trained = tree_flatten(model.trainable_parameters())
    shaken = [(n, 0.2 * mx.random.normal(a.shape, key=mx.random.key(1))) for n, a in trained if n.endswith("lora_b")]
    model.load_weights(shaken, strict=False)
    layers = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    model.update_modules(tree_unflatten([(name, adapters.LowRank(module)) for name, module in layers]))
    step = fused.step_of(model, "metal")
    assert (step is None) == (kind == "dora")
    if step is None:
        return
    rollouts = sampled(loaded_as(model, "metal"))
    q = step.joined[0][0]
    assert type(q) is adapters.LowRank and q.a.shape == (64, 4 * (2 if targets else 3)) and q.b.shape[1] == 128
    monkeypatch.setattr(fused, "step_of", lambda *_: None)
    for own, expected in zip(rollouts, sampled(loaded_as(model, "metal")), strict=True):
        assert own.completion_ids == expected.completion_ids
        np.testing.assert_allclose(own.model_logprobs, expected.model_logprobs, atol=5e-5)


class Gelu(qwen2.MLP):
    """Another activation."""

    def __call__(self, x):
        return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))


def slide(model):
    model.layers[1].use_sliding = True


def activate(model):
    model.layers[0].mlp.__class__ = Gelu


def bias_out(model):
    model.layers[0].self_attn.o_proj.bias = mx.zeros(64)


def quantize_one(model):
    model.layers[0].self_attn.v_proj = model.layers[0].self_attn.v_proj.to_quantized(32, 4)


def turn_otherwise(model):
    model.layers[0].self_attn.rope.traditional = True


def turn_a_part(model):
    model.layers[0].self_attn.rope.dims = 8


def norm_otherwise(model):
    model.layers[0].input_layernorm = nn.LayerNorm(64)


def sink(model):
    model.layers[1].self_attn.sinks = mx.zeros(4)


def round_one(model):
    model.layers[0].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight.astype(mx.float16)


@pytest.mark.parametrize(
    "change",
    [slide, activate, bias_out, quantize_one, turn_otherwise, turn_a_part, norm_otherwise, sink, round_one],
)
def test_what_is_not_known_takes_the_modules(change):
    model = make_known("qwen2")
    assert fused.known(model)
    change(model)
    assert fused.step_of(model, "cuda") is None and not hasattr(model, fused.PROVED + "cuda")
    assert not cpu_trunk.serves(model)


@pytest.mark.parametrize("fault", ["activation", "rope", "scale"])
def test_what_looks_known_and_computes_otherwise_takes_the_modules(fault, monkeypatch):
    """Found by the probe alone."""
    model = make_known("llama")
    assert type(model.layers[0].self_attn.rope) is Llama3RoPE
    if fault == "activation":
        monkeypatch.setattr(llama, "swiglu", lambda gate, x: nn.gelu(gate) * x)
    elif fault == "rope":
        monkeypatch.setattr(Llama3RoPE, "__call__", lambda self, x, offset=0: x + mx.array(offset).reshape(-1, 1, 1, 1))
    else:
        whole = llama.scaled_dot_product_attention
        monkeypatch.setattr(
            llama, "scaled_dot_product_attention", lambda *a, scale, **more: whole(*a, scale=scale / 4, **more)
        )
    assert fused.known(model)
    assert fused.step_of(model, "cpu") is None and getattr(model, fused.PROVED + "cpu") is False
    monkeypatch.undo()
    assert fused.step_of(model, "cpu") is None  # found once


def test_broken_weights_say_nothing_of_a_model():
    model = broken(make_known("qwen2"))
    assert fused.step_of(model, "cpu") is None and not hasattr(model, fused.PROVED + "cpu")


def test_a_cpu_joins_small_weights_alone(monkeypatch):
    model = make_known("qwen2")
    monkeypatch.setattr(fused, "SMALL", 2 * 64 * 128 - 1)
    apart, gate = sampled(loaded_as(model)), model.layers[0].mlp.gate_proj
    assert fused.step_of(model, "cpu") is not None and not hasattr(gate, fused.KEPT)
    assert fused.step_of(model, "cuda") is not None and hasattr(gate, fused.KEPT)
    monkeypatch.setattr(fused, "step_of", lambda *_: None)
    for own, expected in zip(apart, sampled(loaded_as(model)), strict=True):
        assert own.completion_ids == expected.completion_ids
        np.testing.assert_allclose(own.model_logprobs, expected.model_logprobs, atol=5e-5)


def float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def linear64(module, x):
    return x @ float64(module.weight).T + (float64(module.bias) if "bias" in module else 0)


def norm64(module, x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + module.eps) * float64(module.weight)


def turned64(rope, x):
    half = rope.dims // 2
    turns = 1 / float64(rope._freqs) if "_freqs" in rope else rope.base ** (-np.arange(half) / half)
    angles = np.arange(x.shape[1])[:, None] * turns
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def logprobs64(model, ids):
    """Return the log-probability of each token but the first, in nats, all computed in float64 by the formulas."""
    h = float64(model.model.embed_tokens.weight)[list(ids)]
    for layer in model.layers:
        attention, mlp, x = layer.self_attn, layer.mlp, norm64(layer.input_layernorm, h)
        q, k, v = (
            linear64(part, x).reshape(len(ids), -1, attention.rope.dims).swapaxes(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if "q_norm" in attention:
            q, k = norm64(attention.q_norm, q), norm64(attention.k_norm, k)
        k, v = (np.repeat(part, len(q) // len(part), axis=0) for part in (turned64(attention.rope, k), v))
        scores = turned64(attention.rope, q) @ k.swapaxes(1, 2) * attention.scale
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = scores / scores.sum(axis=-1, keepdims=True) @ v
        h = h + linear64(attention.o_proj, out.swapaxes(0, 1).reshape(len(ids), -1))
        x = norm64(layer.post_attention_layernorm, h)
        gate = linear64(mlp.gate_proj, x)
        h = h + linear64(mlp.down_proj, gate / (1 + np.exp(-gate)) * linear64(mlp.up_proj, x))
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    logits = norm64(model.model.norm, h) @ float64(head.weight).T
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[np.arange(len(ids) - 1), ids[1:]]


def from_float64(loaded, rollouts):
    """Return how far rollouts' log-probabilities are from float64: the root of the mean square, and the most."""
    apart = [
        np.array(rollout.model_logprobs)
        - logprobs64(loaded.model, rollout.prompt_ids + rollout.completion_ids)[len(rollout.prompt_ids) - 1 :]
        for rollout in rollouts
    ]
    apart = np.concatenate(apart)
    return np.sqrt((apart**2).mean()), np.abs(apart).max()


@pytest.mark.parametrize("kind", ["nano", *KNOWN])
def test_the_step_is_as_near_to_float64_as_the_modules_are(kind, monkeypatch):
    """Neither is right to the last bit of float32: their sums have other orders."""
    loaded = load("nano") if kind == "nano" else loaded_as(make_known(kind))
    joined = sampled(loaded)
    assert getattr(loaded.model, fused.PROVED + "cpu")
    monkeypatch.setattr(fused, "step_of", lambda *_: None)
    modules = sampled(loaded)
    assert [r.completion_ids for r in joined] == [r.completion_ids for r in modules]
    (own, most), (theirs, _) = from_float64(loaded, joined), from_float64(loaded, modules)
    assert 0 < own < 1.5 * theirs and most < 1e-4, (own, theirs, most)


@pytest.mark.real_model
def test_a_real_model_answers_the_same_within_float32s_rounding(real_model, monkeypatch):
    """The step is no further from the modules than they are from themselves with another number of rows."""
    loaded = load(str(real_model))
    requests = [Request(tuple(range(100, 100 + size))) for size in (5, 9, 14)]

    def found(rows):
        rollouts = dict(generate(loaded, requests, SamplingParams(12), rows, logprobs=True))
        return [rollouts[index] for index in range(len(requests))]

    def apart(some, others):
        pairs = [(a.model_logprobs, b.model_logprobs) for a, b in zip(some, others, strict=True)]
        return np.abs(np.concatenate([np.subtract(a, b) for a, b in pairs]))

    joined = found(2)
    assert getattr(loaded.model, fused.PROVED + "cpu")
    monkeypatch.setattr(fused, "step_of", lambda *_: None)
    modules, one_by_one = found(2), found(1)
    assert [r.completion_ids for r in joined] == [r.completion_ids for r in modules]
    assert 0 < apart(joined, modules).mean() < 2 * apart(modules, one_by_one).mean()
    assert apart(joined, modules).max() < 5e-5
    for rollouts in (joined, modules):
        assert 0 < from_float64(loaded, rollouts)[1] < 1e-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_cpus_gate_is_float64s_within_rounding(dtype):
    gate = mx.array([*np.linspace(-100, 100, 20_001), *np.linspace(-1e-3, 1e-3, 101), 6e4, -6e4]).astype(dtype)
    wide = np.array(gate, np.float64)
    wanted = wide * np.exp(-np.logaddexp(0, -wide))
    found = fused._swiglu(gate, mx.ones_like(gate))
    assert found.dtype == dtype
    limits = np.finfo(np.array(found).dtype)
    most = 3e-7 * np.abs(wide) + limits.eps * np.abs(wanted) + limits.smallest_subnormal
    assert (np.abs(np.array(found, np.float64) - wanted) <= most).all()
    ends = np.array(
        fused._swiglu(mx.array([np.inf, np.nan, 1.0, 0.0, -np.inf]), mx.array([1.0, 1.0, np.nan, 1.0, 1.0]))
    )
    np.testing.assert_array_equal(ends[:4], [np.inf, np.nan, np.nan, 0])
    assert not np.isfinite(ends[4])  # as x * sigmoid(x), a NaN; the draw tells of both


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_cpus_exponential_is_float64s_within_rounding(dtype):
    x = mx.array([*-np.linspace(0, 70, 200_001), *-np.logspace(-9, 2, 10_001)]).astype(dtype)
    wide = np.array(x, np.float64)
    found = fused.exp(x)
    assert found.dtype == mx.float32
    assert np.abs(np.array(found, np.float64) - np.exp(wide)).max() < 2e-7
    assert np.array(found).min() == 0 and (np.array(found)[wide <= -64] == 0).all() and found[0].item() == 1
    ends = fused.exp(mx.array([mx.finfo(mx.float32).min, -np.inf, np.nan]))
    np.testing.assert_array_equal(np.array(ends), [0, 0, np.nan])
