"""Counting graphs: against counts by hand, against MLX's own fusion, and what our steps may cost."""

import gc
import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from mlx_lm.models.activations import swiglu

from mlx_traces.cli import main
from mlx_traces.config import AdapterConfig
from mlx_traces.diagnostics import bench_graph, graph
from mlx_traces.diagnostics.bench_graph import GraphRow
from mlx_traces.diagnostics.graph import Count, Stored
from mlx_traces.models import loading

DECODE = ("bare", "mlx-lm", "greedy", "temperature-1", "temperature-0.7", "top-p", "adapter-merged")


def array(*shape, dtype=mx.float32):
    found = mx.zeros(shape, dtype)
    mx.eval(found)
    return found


def counts(run, backend="metal", vocabulary=0, by=None):
    found = []
    with graph.traced(backend, found.append, vocabulary, by):
        run()
    return found


def test_kernels_and_bytes_are_those_counted_by_hand():
    x, w, table = array(4, 8), array(8, 100), array(50, 8)
    one = 4 * 8 * 4
    for made, expected in (
        (lambda: mx.exp(x), Count(1, 1, 2 * one)),
        (lambda: mx.exp(x) + x, Count(2, 2, 5 * one)),
        (lambda: x @ w, Count(1, 1, one + 8 * 100 * 4 + 4 * 100 * 4, 4 * 100 * 4)),
        (lambda: mx.argmax(x @ w, axis=-1), Count(3, 2, one + 3200 + 2 * 1600 + 16, 2 * 1600)),
        (lambda: x[:2].reshape(16), Count(2, 0, 0)),  # views
        (lambda: x.T.reshape(32), Count(2, 1, 2 * one)),  # out of order: a copy
        (lambda: mx.concatenate([x, x]), Count(1, 2, 4 * one)),
        (lambda: table[mx.array([3])], Count(2, 1, 4 + 2 * 8 * 4)),  # the row alone
        (lambda: x + mx.array(1.0), Count(1, 1, 2 * one + 4)),  # what is broadcast is read once
    ):
        (found,) = counts(lambda made=made: mx.eval(made()), vocabulary=100)
        assert found == expected


def test_as_wide_as_the_vocabulary_is_an_axis_or_two_and_what_was_made():
    wide = {(32, 49152): True, (32, 217, 227): True, (32, 1536): False, (32, 3, 64): False, (49152,): True}
    assert {shape: Stored(shape, 1).wide(49152) for shape in wide} == wide
    assert not Stored((32, 49152), 1, constant=True).wide(49152)


def test_writing_into_a_buffer_costs_what_is_written():
    buffer, row = array(4, 256, 8), array(4, 1, 8)

    def write():
        buffer[:, 3:4] = row
        mx.eval(buffer)

    assert counts(write)[0].bytes == 2 * 4 * 8 * 4


def test_fused_operations_are_one_kernel_forwards_and_one_backwards():
    x, w = array(4, 7, 16), array(16)

    for function in (
        lambda x: mx.fast.rms_norm(x, w, 1e-5),
        lambda x: mx.fast.layer_norm(x, w, None, 1e-5),
        lambda x: mx.fast.rope(x, 16, traditional=False, base=1e4, scale=1.0, offset=3),
    ):
        forwards, both = counts(lambda f=function: [mx.eval(f(x)), mx.eval(mx.vjp(f, [x], [x]))])
        assert forwards.kernels == 1 and both.kernels == 2
        assert forwards.bytes >= 2 * x.nbytes


@pytest.mark.parametrize(
    ("backend", "queries", "dtype", "masked", "training", "fused"),
    [
        ("metal", 1, mx.float16, True, False, True),
        ("metal", 1, mx.float32, False, False, True),
        ("metal", 32, mx.float16, True, False, True),
        ("metal", 32, mx.float16, False, True, False),  # Metal trains without
        ("cuda", 1, mx.bfloat16, False, False, True),
        ("cuda", 1, mx.bfloat16, True, False, False),  # no mask there
        ("cuda", 1, mx.float32, False, False, False),
        ("cuda", 128, mx.bfloat16, False, True, True),
        ("cuda", 100, mx.bfloat16, False, True, False),  # its backward pass wants multiples of 128
    ],
)
def test_attention_is_one_kernel_where_the_backend_has_one(backend, queries, dtype, masked, training, fused):
    q, k = array(2, 4, queries, 64, dtype=dtype), array(2, 2, 256, 64, dtype=dtype)
    mask = mx.ones((2, 1, 1, 256), mx.bool_) if masked else None
    mx.eval(mask)

    def attend(q):
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask=mask)

    def run():
        mx.eval(mx.vjp(attend, [q], [q]) if training else attend(q))

    kernels = counts(run, backend)[0].kernels
    assert kernels == 1 + training if fused else kernels > 3


def deep(x):
    for _ in range(30):
        x = mx.exp(x) * 2
    return x


def branches(x):
    top = x.max(axis=-1, keepdims=True)
    weights = mx.exp(x - top)
    return weights / weights.sum(axis=-1, keepdims=True), top[..., 0] + mx.log(weights.sum(axis=-1))


def many(x):
    return sum(mx.sin(x[row]) * row for row in range(40))


def clipped_update(x):
    parameters = {str(row): x[row] for row in range(4)}
    rule = AdamW(1e-3)
    rule.init(parameters)
    norm = mx.sqrt(sum(mx.square(array).sum() for array in parameters.values()))
    grads = {name: array * mx.minimum(1 / norm, 1) for name, array in parameters.items()}
    return rule.apply_gradients(grads, parameters), norm


@pytest.mark.parametrize("function", [swiglu, deep, branches, many, clipped_update, partial(nn.gelu_approx)])
def test_compiled_functions_have_the_kernels_that_mlx_makes_of_them(function):
    given = [array(64, 32) for _ in range(2 if function is swiglu else 1)]
    compiled = function if function is swiglu else mx.compile(function)
    text = io.StringIO()
    made = [array for _, array in tree_flatten(compiled(*given)) if isinstance(array, mx.array)]
    mx.export_to_dot(text, *made)  # with MLX's compiled kernels in it
    operations = text.getvalue().count("shape=rectangle") - text.getvalue().count('"Broadcast"')
    assert counts(lambda: mx.eval(compiled(*given)))[0].primitives == operations


def test_what_is_differentiated_is_not_compiled():
    x = array(4, 8)
    (found,) = counts(lambda: mx.eval(mx.grad(lambda x: swiglu(x, x).sum())(x)))
    text = io.StringIO()
    mx.export_to_dot(text, mx.grad(lambda x: swiglu(x, x).sum())(x))
    names = re.findall(r'label ="(\w+)", shape=rectangle', text.getvalue())
    assert not any("Compiled" in name for name in names)
    assert found.primitives == sum(name not in ("Broadcast", "Copy") for name in names)


def test_nothing_is_computed_and_all_is_put_back():
    functions = {name: getattr(mx, name) for name in ("eval", "async_eval", "compile", "vjp", "default_device")}
    fast, key, kept = mx.fast.rope, np.array(mx.random.state[0]), mx.full(3, 7.0)
    mx.eval(kept)
    gc.freeze()
    counts(lambda: mx.eval(array(1), mx.random.state[0], mx.random.uniform(shape=(10**6, 10**6))))  # 4 TB
    assert {name: getattr(mx, name) for name in functions} == functions and mx.fast.rope is fast
    assert np.array_equal(np.array(mx.random.state[0]), key) and kept.tolist() == [7.0] * 3
    assert gc.get_freeze_count() > 0
    x, text = array(3), io.StringIO()
    mx.export_to_dot(text, swiglu(x, x))
    assert "Compiled" in text.getvalue()


def test_bench_graph_prints_every_row(monkeypatch):
    result = CliRunner().invoke(main, ["bench", "graph", "--rows", "8", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    rows = {(row["what"], row["variant"], row["logprobs"]): row for row in told.pop("rows")}
    assert told == {"model": "nano", "rows_at_once": 8, "backend": "metal"}
    decode = [("decode", variant, wanted) for wanted in (False, True) for variant in (*DECODE, "adapter-quantized")]
    assert [*rows] == [*decode, *(("update", variant, False) for variant in ("micro-batch", "prompts", "optimizer"))]
    for row in rows.values():
        assert [*row] == ["what", "variant", "logprobs", "primitives", "kernels", "gb", "vocabulary_passes"]
        assert row["primitives"] >= row["kernels"] > 0 and row["gb"] > 0
    assert rows["decode", "bare", False]["vocabulary_passes"] == 1  # in 16 bits: written once, read once
    found = [GraphRow(**row) for row in rows.values()]
    monkeypatch.setattr(bench_graph, "bench_graph", lambda *given: found)
    table = CliRunner().invoke(main, ["bench", "graph", "--rows", "8"]).stdout.splitlines()
    assert len(table) == 2 + len(found) and max(map(len, table)) <= 80


def counted_of_qwen(layers):
    """Return the rows for a model of Qwen2.5-0.5B's shape in 4 bits, without weights, with fewer layers."""
    config = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": layers, "intermediate_size": 4864}
    config |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6}
    config |= {"tie_word_embeddings": True, "max_position_embeddings": 32768, "rope_theta": 1e6}
    loaded = loading.load("nano")
    with graph.uncomputed():
        model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, 64, 4)
        mx.eval(model.parameters())
    loaded.model, loaded.config = model, config
    return bench_graph.count(loaded, 256, "metal", AdapterConfig())


@pytest.fixture(scope="module")
def qwen():
    """What a step of Qwen2.5-0.5B takes on Metal, at 256 rows: a layer is like another, so two sizes tell of 24."""
    two, three = counted_of_qwen(2), counted_of_qwen(3)
    found = {}
    for a, b in zip(two, three, strict=True):
        kernels, gb = a.kernels + 22 * (b.kernels - a.kernels), a.gb + 22 * (b.gb - a.gb)
        found[a.variant, a.logprobs] = replace(a, kernels=kernels, gb=gb)
    return found


def test_a_bare_step_has_the_kernels_counted_by_hand(qwen):
    # A layer: 7 products, 3 biases, 2 norms, 2 ropes, 2 writes, attention, swiglu, 2 sums. Beside the layers: the row
    # of the embedding, its scales, its biases and its numbers, the last norm, the head, the likeliest token.
    bare = qwen["bare", False]
    assert bare.kernels == 24 * (7 + 3 + 2 + 2 + 2 + 1 + 1 + 2) + 7 and bare.vocabulary_passes == 1
    assert 1.0 < qwen["mlx-lm", False].kernels / bare.kernels < 1.1
    weights = 24 * (896 * 896 * 2 + 896 * 128 * 2 + 3 * 896 * 4864) + 151936 * 896
    assert bare.gb > weights * (4 + 32 / 64) / 8e9  # all are read, in 4 bits, with their scales and biases


def test_our_steps_take_no_more_kernels_and_passes_than_this(qwen):
    bare = qwen["bare", False].kernels
    for variant, most in (("greedy", 0.8), ("temperature-1", 0.9), ("adapter-merged", 0.7), ("adapter-quantized", 1.3)):
        assert qwen[variant, False].kernels <= most * bare, variant
        assert qwen[variant, True].kernels <= qwen[variant, False].kernels + 10
    for variant, most in (("greedy", 3.6), ("temperature-1", 3.1), ("temperature-0.7", 6.1), ("top-p", 4.1)):
        assert qwen[variant, True].vocabulary_passes <= most, variant
    assert qwen["greedy", False].vocabulary_passes == 1
    assert qwen["optimizer", False].kernels <= 1200 and qwen["optimizer", False].vocabulary_passes == 0
    assert qwen["micro-batch", False].kernels <= 4500 and qwen["prompts", False].kernels <= 6000


def test_the_readme_has_these_counts(qwen):
    text = (Path(bench_graph.__file__).parent / "README.md").read_text()
    lines = re.findall(r"^\| ([a-z].*?) \| ([\d,]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    rows = [("bare", False), ("mlx-lm", True), ("greedy", False), ("temperature-1", True), ("adapter-merged", True)]
    rows += [("adapter-quantized", True), ("top-p", True), ("optimizer", False)]
    for (name, kernels, passes), key in zip(lines, rows, strict=True):
        assert int(kernels.replace(",", "")) == pytest.approx(qwen[key].kernels, rel=0.05), name
        assert float(passes) == pytest.approx(qwen[key].vocabulary_passes, abs=0.1), name
