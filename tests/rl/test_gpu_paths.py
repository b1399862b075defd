"""What a GPU does otherwise in an update, tried on a CPU: the result is that of a CPU."""

import platform

import mlx.core as mx
import numpy as np
import pytest
from factories import by_modules, lora, made, make_tokenizer, wrap
from mlx.utils import tree_flatten

from mlx_traces.config import GRPOConfig, PPOConfig
from mlx_traces.rl import grpo, ppo
from mlx_traces.runtime import device
from mlx_traces.train import optimizer

KINDS = {
    "grpo": (grpo, GRPOConfig(num_steps=4, micro_tokens=40, minibatches=2, kl_coef=0.1, max_tokens=12)),
    "ppo": (ppo, PPOConfig(num_steps=4, micro_tokens=40, minibatches=2, value_warmup_steps=1, max_tokens=12)),
}


def trained(algorithm, config):
    """Return the metrics of two updates by rollouts of unequal lengths, and the arrays afterwards."""
    learner = algorithm.start(wrap(make_tokenizer(), lora()), config)
    draw, metrics = np.random.default_rng(0), []
    for step in (1, 2):
        groups = [
            [made(float(i % 2), draw.integers(1, 98, 3 + i), prompt=prompt) for i in range(4)]
            for prompt in (tuple(range(1, 20)), (7, 8, 9, 10))
        ]
        metrics.append(algorithm.learn(learner, algorithm.rows_of(groups, config), step, config))
    arrays = tree_flatten([learner.module.trainable_parameters(), learner.optimizer.state])
    return metrics, {name: np.array(array) for name, array in arrays}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_a_cpu(kind, monkeypatch):
    algorithm, config = KINDS[kind]
    metrics, expected = trained(algorithm, config)
    with monkeypatch.context() as patched:
        by_modules(patched)
        _, of_modules = trained(algorithm, config)
    for backend in ("metal", "cuda"):
        submitted, submit = [], mx.async_eval
        monkeypatch.setattr(device, "select", lambda *_, name=backend: name)
        if backend == "cuda":  # the compiled update has been tried by then
            monkeypatch.setattr(optimizer, "MOST_COMPILED", 0)
        monkeypatch.setattr(mx, "async_eval", lambda *a, s=submitted, f=submit: (s.append(1), f(*a)))
        found_metrics, found = trained(algorithm, config)
        monkeypatch.undo()
        assert submitted and found.keys() == expected.keys()
        for name, array in expected.items():
            if backend == "metal" and platform.machine() == "x86_64":  # no padding, and no contracted rounding
                assert np.array_equal(found[name], of_modules[name]), name
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=2e-5, err_msg=name)
        for row, other in zip(metrics, found_metrics, strict=True):
            assert row.keys() == other.keys()
            assert [row[name] for name in row] == pytest.approx([other[name] for name in row], rel=1e-3, abs=1e-5)
