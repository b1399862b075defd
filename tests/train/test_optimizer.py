"""The update: AdamW of clipped gradients, as one compiled function on a GPU; what is refused changes nothing."""

import platform
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from factories import lora
from mlx.utils import tree_flatten, tree_map

from mlx_traces.config import OptimizerConfig
from mlx_traces.runtime import device
from mlx_traces.train import checkpoints, optimizer
from mlx_traces.train.optimizer import make_optimizer

LINEAR = {  # of a small Qwen2's layer: inputs and outputs
    "self_attn": {"q_proj": (64, 64), "k_proj": (64, 16), "v_proj": (64, 16), "o_proj": (64, 64)},
    "mlp": {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)},
}


def adapter(layers, rank, seed):
    """Return a tree like that of an adapter on all linear layers."""
    mx.random.seed(seed)

    def pair(sizes):
        return {"lora_a": mx.random.normal((sizes[0], rank)), "lora_b": mx.random.normal((rank, sizes[1]))}

    tree = [tree_map(pair, LINEAR, is_leaf=lambda leaf: isinstance(leaf, tuple)) for _ in range(layers)]
    return {"model": {"layers": tree}}


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "select", lambda *_: "cuda")


def kernels(tmp_path, *outputs):
    """Count the operations of a graph that is not computed; views of an array take no kernel."""
    mx.export_to_dot(str(tmp_path / "graph.dot"), *(array for _, array in tree_flatten(outputs)))
    names = re.findall(r'label ="([^"]*)", shape=rectangle', (tmp_path / "graph.dot").read_text())
    return Counter("view" if name in ("Broadcast", "Squeeze", "Reshape") else "kernel" for name in names)["kernel"]


def test_an_update_of_a_large_adapter_takes_few_kernels(tmp_path):
    """Clipping and AdamW of rank 16 on all linear layers of 24: counted from the graph, which is not computed."""
    made = make_optimizer(OptimizerConfig(weight_decay=0.01), 100)
    parameters, grads = adapter(24, 16, 0), adapter(24, 16, 1)
    made.init(parameters)
    mx.eval(parameters, grads, made.state)  # given, not part of the graph
    assert kernels(tmp_path, made.rule(parameters, made.state, grads)) == 9428
    assert kernels(tmp_path, made.compiled(parameters, made.state, grads)) <= 1200


@pytest.fixture
def pair():
    """Return a module's parameters, an optimizer with its state, and gradients of three steps."""
    made = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.3, max_grad_norm=2.0), 5)
    return adapter(2, 4, 0), made, [adapter(2, 4, 1 + step) for step in range(3)]


def numbers(*trees):
    return {name: np.array(array) for name, array in tree_flatten(trees)}


def run(module, made, grads):
    norms = []
    for own in grads:
        norm, update = made.propose(module, own)
        update()
        norms.append(norm)
    return norms, numbers(module, made.state)


def test_the_compiled_update_is_the_plain_one(pair, monkeypatch):
    module, made, grads = pair
    other = tree_map(lambda array: array, module), make_optimizer(OptimizerConfig(), 5)
    other[1].rule, other[1].compiled = made.rule, made.compiled
    norms, plain = run(module, made, grads)
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(made, "rule", None)
    monkeypatch.setattr(other[1], "rule", None)  # not this one
    again, compiled = run(*other, grads)
    assert plain["1.step"] == 3 and plain["1.learning_rate"] == compiled["1.learning_rate"]
    assert norms == pytest.approx(again, rel=1e-6) and plain.keys() == compiled.keys()
    for name, array in plain.items():
        if platform.machine() == "x86_64":  # others contract a product and a sum to one rounding
            assert np.array_equal(array, compiled[name]), name
        np.testing.assert_allclose(compiled[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gpu", [False, True])
def test_an_update_that_is_not_taken_changes_nothing(pair, monkeypatch, gpu):
    module, made, grads = pair
    run(module, made, grads[:1])
    before = numbers(module, made.state)
    if gpu:
        on_a_gpu(monkeypatch)
    broken = tree_map(lambda array: array * float("nan"), grads[1])
    norm, _ = made.propose(module, broken)
    assert np.isnan(norm)
    after = numbers(module, made.state)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert run(module, made, grads[1:])[1]["1.step"] == 3  # and it goes on


def test_a_compiled_update_that_fails_leaves_the_state(pair, monkeypatch):
    module, made, grads = pair
    run(module, made, grads[:1])
    before = numbers(module, made.state)
    on_a_gpu(monkeypatch)

    def out_of_memory(*_):
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    for where, holder in (("compiled", made), ("eval", mx)):  # as it is traced, or as it is computed
        monkeypatch.setattr(holder, where, out_of_memory)
        with pytest.raises(RuntimeError, match="Unable to allocate"):
            made.propose(module, grads[1])
        monkeypatch.undo()
        on_a_gpu(monkeypatch)
        after = numbers(module, made.state)
        assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_a_tracing_that_fails_leaves_the_state(pair, monkeypatch):
    module, made, grads = pair
    before = numbers(module)
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(optimizer, "clip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.propose(module, grads[0])
    assert made.state["step"].item() == 0
    assert all(np.array_equal(array, before[name]) for name, array in numbers(module).items())
    monkeypatch.undo()
    on_a_gpu(monkeypatch)
    assert run(module, made, grads)[1]["1.step"] == 3


def test_large_parameters_are_not_held_twice(pair, monkeypatch):
    module, made, grads = pair
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(optimizer, "MOST_COMPILED", 1000)
    monkeypatch.setattr(made, "compiled", None)
    assert run(module, made, grads)[1]["1.step"] == 3


def test_a_compiled_training_goes_on_from_a_checkpoint_exactly(tmp_path, monkeypatch):
    on_a_gpu(monkeypatch)

    def steps(model, made, first, last):
        for step in range(first, last):
            mx.random.seed(step)
            grads = tree_map(lambda array: mx.random.normal(array.shape), model.trainable_parameters())
            made.propose(model, grads)[1]()
        return numbers(model.trainable_parameters(), made.state)

    config = OptimizerConfig(learning_rate=0.1, warmup=0.3)
    model, made = lora(), make_optimizer(config, 6)
    start = tree_map(lambda array: array, model.trainable_parameters())
    steps(model, made, 0, 3)
    checkpoints.save(tmp_path / "checkpoint.safetensors", model, made, {"step": 3})
    whole = steps(model, made, 3, 6)
    again, other = lora(), make_optimizer(config, 6)
    again.update(start)
    checkpoints.load(tmp_path / "checkpoint.safetensors", again, other)
    resumed = steps(again, other, 3, 6)
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[name], resumed[name]) for name in whole)
