"""PPO: a minibatch in float64, what must not change it, values and policies of small games solved exactly, its runs."""

import json
import math
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import (
    Moments,
    assert_close,
    assert_same_outcome,
    lora,
    made,
    make_config,
    make_model,
    make_tokenizer,
    outcome,
    wrap,
)
from mlx.utils import tree_flatten, tree_map

from mlx_traces.config import AdapterConfig, PPOConfig, build
from mlx_traces.engine import batching
from mlx_traces.engine.batching import Example
from mlx_traces.engine.logprobs import head_logprobs, split
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.rl import ppo
from mlx_traces.rl.rollouts import Row
from mlx_traces.train import checkpoints, memory, optimizer
from mlx_traces.train.gradients import checkpointed

# ---------------------------------------------------------------------------------- a minibatch


def settings_of(**changes):
    return PPOConfig(**{"max_tokens": 12, "temperature": 0.7, "entropy_coef": 0.3, "clip_eps": 0.15, **changes})


def critic(seed=0, **changes):
    """Return a policy with an adapter and a value head that has learned something, and the policy's halves."""
    model = make_model(**changes) if changes else lora()
    if changes:
        adapters.start(model, AdapterConfig(kind="full"))
    halves = split(model)
    module = ppo.ActorCritic(model, halves)
    draw = np.random.default_rng(seed)
    arrays = [
        (k, mx.array(draw.normal(0, 0.2, v.shape), mx.float32)) for k, v in tree_flatten(module.value.parameters())
    ]
    module.value.load_weights(arrays)
    return module, halves


def some_rows(module, halves, config, count=8, seed=0):
    """Return rows of unequal lengths, what they hold a little off the module's own, so that both bounds are met."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(draw.integers(1, 12))
        ids = tuple(draw.integers(0, 98, 5 + i % 3 + n).tolist())
        flags = (False,) * (len(ids) - n) + (True,) * n
        reward, sampler = float(draw.normal()), draw.normal(-4, 1, n).astype(np.float32)
        rows.append(Row(Example(f"r{i}", ids, flags), sampler, reward=reward))
    ppo.foresee(module, halves, rows, adapters.reference(module.policy, None, False), config)
    for row in rows:
        row.old = row.old + draw.normal(0, 0.3, row.example.count).astype(np.float32)
        row.values = row.values + draw.normal(0, 0.4, row.example.count).astype(np.float32)
    ppo.aim(rows, config)
    return ppo.weighed(rows)


def in_float64(module, rows, config):
    """Return (total, value loss, entropy) of a minibatch, a token at a time from the states on, in float64."""
    head = np.array(module.policy.model.embed_tokens.weight, np.float64)
    (w1, b1), (w2, b2) = (
        (np.array(layer.weight, np.float64), np.array(layer.bias, np.float64))
        for layer in (module.value.hidden, module.value.out)
    )
    erf = np.vectorize(math.erf)
    terms, errors, entropies, clipped = [], [], [], set()
    for row in rows:
        ids, n = row.example.ids, row.example.count
        states = np.array(module.policy.model(mx.array([ids])), np.float64)[0]
        for j, at in enumerate(range(len(ids) - n, len(ids))):
            state = states[at - 1]  # what was seen before the token
            logits = head @ state / config.temperature
            logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            ratio, advantage = np.exp(logs[ids[at]] - row.old[j]), float(row.advantage[j])
            held = np.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
            clipped |= {"high" if ratio > held else "low"} if held * advantage < ratio * advantage else set()
            terms.append(-min(ratio * advantage, held * advantage))
            entropies.append(-(np.exp(logs) * logs).sum())
            inner = w1 @ state + b1
            value = (w2 @ (inner * (1 + erf(inner / 2**0.5)) / 2) + b2)[0]
            old, target = float(row.values[j]), float(row.returns[j])
            bound = np.inf if config.value_clip is None else config.value_clip
            errors.append(max((value - target) ** 2, (np.clip(value, old - bound, old + bound) - target) ** 2))
    value, entropy = 0.5 * np.mean(errors), np.mean(entropies)
    return np.mean(terms) + value - config.entropy_coef * entropy, value, entropy, clipped


def plainly(module, rows, config):
    """Return the gradient of the same formulas on full logits, by MLX's own differentiation."""

    def loss_of():
        total = mx.array(0.0)
        for row in rows:
            n = row.example.count
            ids = mx.array(row.example.ids)
            states = module.policy.model(ids[None])[0, -n - 1 : -1]
            logits = module.policy.model.embed_tokens.as_linear(states) / config.temperature
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            ratio = mx.exp(mx.take_along_axis(logs, ids[-n:, None], axis=-1)[:, 0] - mx.array(row.old))
            advantages, old = mx.array(row.advantage), mx.array(row.values)
            gain = mx.minimum(ratio * advantages, mx.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps) * advantages)
            entropy = -(mx.exp(logs) * logs).sum(axis=-1)
            values, returns = module.value(states), mx.array(row.returns)
            held = old + mx.clip(values - old, -config.value_clip, config.value_clip)
            error = mx.maximum(mx.square(values - returns), mx.square(held - returns))
            total = total + (0.5 * error - gain - config.entropy_coef * entropy).sum()
        return total / sum(row.example.count for row in rows)

    return nn.value_and_grad(module, loss_of)()[1]


@pytest.fixture
def poison(monkeypatch):
    """Let 1e4 stand wherever rows of unequal lengths are padded."""

    def padded(arrays):
        rows = np.full((len(arrays), max(1, *map(len, arrays))), 1e4, np.float32)
        for row, array in zip(rows, arrays, strict=True):
            row[: len(array)] = array
        return mx.array(rows)

    monkeypatch.setattr(batching, "padded", padded)


@pytest.mark.parametrize("changes", [{}, {"value_clip": None, "entropy_coef": 0.0}, {"gamma": 0.9, "whiten": False}])
def test_a_minibatch_is_the_formulas_in_float64(poison, changes):
    config = settings_of(micro_tokens=40, **changes)
    module, halves = critic()
    rows = some_rows(module, halves, config)
    loss, _, sums = ppo.gradient(module, halves, rows, config)
    expected, value, entropy, clipped = in_float64(module, rows, config)
    assert loss == pytest.approx(expected, abs=2e-5)
    assert sums["value_loss"] == pytest.approx(value, abs=1e-5)
    assert sums["entropy"] / sums["tokens"] == pytest.approx(entropy, abs=1e-5)
    assert clipped == {"low", "high"} and (sums["value_clip"] > 0) == (config.value_clip is not None)
    # tokens are counted by both losses; what a metric divides by is asked of one
    assert sums["tokens"] == sum(row.example.count for row in rows)


def test_the_gradient_is_that_of_the_formulas_on_full_logits(poison):
    config = settings_of(micro_tokens=40)
    module, halves = critic()
    rows = some_rows(module, halves, config)
    assert_close(ppo.gradient(module, halves, rows, config)[1], plainly(module, rows, config), 2e-4)


def test_split_padding_and_checkpointed_layers_change_nothing(poison):
    module, halves = critic()
    results = []
    for micro, again in ((9999, False), (40, False), (1, False), (60, True)):
        config = settings_of(micro_tokens=micro)
        rows = some_rows(module, halves, settings_of())
        with checkpointed(module.policy.layers, again):
            results.append(ppo.gradient(module, halves, rows, config))
    for loss, grads, sums in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        whole = dict(tree_flatten(results[0][1]))
        for part in ("policy", "value"):  # against a part's greatest slope: a sum may cancel to nearly nothing
            most = max(mx.abs(array).max().item() for name, array in whole.items() if name.startswith(part))
            for name, array in tree_flatten({part: grads[part]}):
                assert mx.abs(array - whole[name]).max().item() <= 1e-5 * most, name
        assert all(value == pytest.approx(results[0][2][name], rel=1e-4, abs=1e-5) for name, value in sums.items())


@pytest.mark.parametrize("changes", [{}, {"gamma": 0.8, "gae_lambda": 0.5}, {"gae_lambda": 1.0, "kl_coef": 0.0}])
def test_what_is_aimed_at_is_the_definition_in_float64(poison, changes):
    config = settings_of(**{"kl_coef": 0.4, **changes})
    module, halves = critic()
    rows = some_rows(module, halves, config.model_copy(update={"kl_coef": 0.0}))
    draw = np.random.default_rng(5)
    for row in rows:
        row.reference = (row.old + draw.normal(0, 1, row.example.count)).astype(np.float32)
    metrics = ppo.aim(rows, config)
    gamma, lam = config.gamma, config.gae_lambda
    advantages, returns, outcomes, values = [], [], [], []
    for row in rows:
        old, ref, v = (array.astype(np.float64) for array in (row.old, row.reference, row.values))
        n, r = len(v), -config.kl_coef * (old - ref)
        r[-1] += row.reward
        deltas = r + gamma * np.append(v[1:], 0) - v
        own = [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        advantages += own
        returns += [a + b for a, b in zip(own, v, strict=True)]
        outcomes += [sum(gamma**k * r[t + k] for k in range(n - t)) for t in range(n)]
        values += v.tolist()
    whitened = (np.array(advantages) - np.mean(advantages)) / np.std(advantages, ddof=1)
    np.testing.assert_allclose(np.concatenate([row.advantage for row in rows]), whitened, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([row.returns for row in rows]), returns, atol=1e-5)
    explained = 1 - np.var(np.array(outcomes) - values) / np.var(outcomes)
    assert metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert metrics["value/mean"] == pytest.approx(np.mean(values), abs=1e-5)


@pytest.mark.parametrize("head", [{}, {"tie_word_embeddings": False}])
def test_entropies_can_be_differentiated(head):
    model = make_model(**head)
    model.freeze()
    if head:
        model.lm_head.unfreeze()
    halves = split(model)
    assert halves.frozen_head is not bool(head)
    draw = np.random.default_rng(0)
    states, weights = (draw.normal(0, 1, shape).astype(np.float32) for shape in ((9, 64), (9,)))
    targets = mx.array(draw.integers(0, 128, 9))
    weights = mx.array(weights)

    def ours(states, both):
        logprobs, entropies = head_logprobs(halves, states, targets, 0.7, 0.002, entropy_slopes=both)
        return (weights * (logprobs + 2 * entropies)).sum()

    def plain(states):
        logits = halves.head(states) / 0.7
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        own = mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
        return (weights * (own - 2 * (mx.exp(logs) * logs).sum(axis=-1))).sum()

    found, expected = mx.grad(lambda s: ours(s, True))(mx.array(states)), mx.grad(plain)(mx.array(states))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert mx.abs(mx.grad(lambda s: ours(s, False))(mx.array(states)) - expected).max() > 0.1
    # In float64, by finite differences along a random direction.
    matrix = np.array((model.lm_head if head else model.model.embed_tokens).weight, np.float64)

    def exact(states):
        logits = states @ matrix.T / 0.7
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return (np.array(weights) * (logs[np.arange(9), np.array(targets)] - 2 * (np.exp(logs) * logs).sum(-1))).sum()

    way = draw.normal(0, 1, states.shape)
    slope = (exact(states + 1e-5 * way) - exact(states - 1e-5 * way)) / 2e-5
    assert (np.array(found) * way).sum() == pytest.approx(slope, rel=1e-3)


# ---------------------------------------------------------------------------------- rewards


def rows_for(rewards_, module, halves, config, finish="stop"):
    group = [made(reward, (20 + i, 30, 40), finish) for i, reward in enumerate(rewards_)]
    rows = ppo.rows_of([group], config)
    ppo.foresee(module, halves, rows, adapters.reference(module.policy, None, False), config)
    ppo.aim(rows, config)
    return ppo.weighed(rows)


@pytest.mark.parametrize("whiten", [True, False])
def test_reversed_rewards_reverse_the_gradient(whiten):
    model = lora()
    halves = split(model)
    module, config = ppo.ActorCritic(model, halves), PPOConfig(whiten=whiten, group_size=2)
    one, other = (
        ppo.gradient(module, halves, rows_for(values, module, halves, config), config)[1]["policy"]
        for values in ((1, -1), (-1, 1))
    )
    assert max(mx.abs(array).max().item() for _, array in tree_flatten(one)) > 1e-3
    assert_close(one, tree_map(lambda array: -array, other))


def test_what_the_values_foresaw_teaches_the_policy_nothing():
    model = lora()
    halves = split(model)
    module = ppo.ActorCritic(model, halves)
    config = PPOConfig(whiten=False, gae_lambda=0.9)
    rows = rows_for((0.5, 0.5), module, halves, config)
    _, grads, _ = ppo.gradient(module, halves, rows, config)
    assert any(array.any() for _, array in tree_flatten(grads["policy"]))  # the values start at 0
    module.value.out.bias = mx.array([0.5])
    rows = rows_for((0.5, 0.5), module, halves, config)
    assert not any(row.advantage.any() for row in rows)
    _, grads, sums = ppo.gradient(module, halves, rows, config)
    assert not any(array.any() for _, array in tree_flatten(grads)) and sums["value_error"] == 0
    whitened = rows_for((0.5, 0.5), module, halves, PPOConfig())
    assert not any(row.advantage.any() for row in whitened)


def test_values_are_told_apart_from_the_policy():
    """The value's error leaves the adapter alone, and the reward is foreseen before the token, not with it."""
    module, halves = critic()
    config = settings_of(entropy_coef=0.0)
    rows = some_rows(module, halves, config)
    for row in rows:
        row.advantage = np.zeros_like(row.advantage)
    _, grads, _ = ppo.gradient(module, halves, rows, config)
    assert not any(array.any() for _, array in tree_flatten(grads["policy"]))
    assert all(array.any() for _, array in tree_flatten(grads["value"]))
    alone = ppo.gradient(module, halves, rows, config, values_only=True)[1]
    assert alone.keys() == {"value"}
    assert_close(alone["value"], grads["value"])
    first, second = (made(0.0, (20, last)) for last in (30, 31))
    rows = ppo.rows_of([[first, second]], config)
    ppo.foresee(module, halves, rows, None, config)
    np.testing.assert_allclose(rows[0].values, rows[1].values, atol=1e-6)
    assert len(rows[0].values) == 2 and rows[0].old[1] != rows[1].old[1]


def test_cut_off_completions():
    module, halves = critic()
    kept = rows_for((1.0, 0.0), module, halves, settings_of(gae_lambda=1.0), "length")
    np.testing.assert_allclose(kept[0].returns, 1.0, atol=1e-6)  # no value stands for what was cut off
    np.testing.assert_allclose(kept[1].returns, 0.0, atol=1e-6)
    masked = settings_of(overlong="mask")
    group = [made(1.0, (20, 30)), made(0.0, (20, 31), "length")]
    rows = ppo.rows_of([group], masked)
    assert len(rows) == 1 and rows[0].reward == 1.0
    learner = ppo.start(wrap(make_tokenizer(), lora()), masked)
    before = tree_flatten(learner.module.trainable_parameters())
    assert ppo.learn(learner, ppo.rows_of([group[1:]], masked), 1, masked) == {"optim/updates": 0}
    after = dict(tree_flatten(learner.module.trainable_parameters()))
    assert all(mx.array_equal(array, after[name]) for name, array in before)


def test_the_value_head_learns_first():
    config = PPOConfig(value_warmup_steps=2, num_steps=4, warmup=0)
    learner = ppo.start(wrap(make_tokenizer(), lora()), config)

    def weights(part):
        return [np.array(array) for _, array in tree_flatten(learner.module[part].trainable_parameters())]

    group = [made(float(i % 2), (20 + i, 30, 40)) for i in range(4)]
    for step, moved in ((1, False), (2, False), (3, True)):
        adapter, values = weights("policy"), weights("value")
        row = ppo.learn(learner, ppo.rows_of([group], config), step, config)
        same = [np.array_equal(a, b) for a, b in zip(adapter, weights("policy"), strict=True)]
        assert not any(np.array_equal(a, b) for a, b in zip(values, weights("value"), strict=True))
        assert not all(same) if moved else all(same)
        assert ("policy/clip_fraction" in row) == moved and row["optim/updates"] == 4
    actor, value = learner.optimizer.optimizers
    assert (actor.step.item(), value.step.item()) == (4, 12)


# ---------------------------------------------------------------------------------- games solved exactly

GAME = np.array([[0.6, 0.1, 0.3, 0.2], [0.0, 0.5, 1.0, 0.1], [0.4, 0.4, 0.2, 0.0], [0.6, 0.3, 0.1, 0.2]])
ASKED = (2, 0)


class Game:
    """Two tokens of four, a reward for each of the 16 texts; a tiny model plays, and all of it can be enumerated."""

    def __init__(self, **changes):
        self.config = PPOConfig(**{"warmup": 0, "max_tokens": 2, "clip_eps": 0.2, **changes})
        self.model = make_model(vocab_size=4, tie_word_embeddings=False, seed=1)
        self.model.lm_head.weight = 0.4 * self.model.lm_head.weight  # every text has its chance
        mx.random.seed(0)
        adapters.start(self.model, AdapterConfig(rank=8))
        self.learner = ppo.start(wrap(make_tokenizer(), self.model), self.config)

    def odds(self):
        """Return (4, 4) float64 probabilities of the texts."""
        logits = np.array(self.model(mx.array([[*ASKED, first] for first in range(4)])), np.float64)[:, -2:]
        odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return odds[0, 0][:, None] * odds[:, 1]

    def values(self):
        """Return what the value head foresees: before the first token, and after each one."""
        ids = mx.array([[*ASKED, first] for first in range(4)])
        values = np.array(self.learner.module.value(self.learner.split.trunk(ids)))
        return values[0, -2], values[:, -1]

    def play(self, count, step):
        """Draw games and learn from them."""
        texts = np.random.default_rng([7, step]).choice(16, count, p=self.odds().reshape(-1))
        rows = ppo.rows_of([[self.text(place) for place in texts]], self.config)
        return ppo.learn(self.learner, rows, step, self.config)

    @staticmethod
    def text(place):
        """Return the rollout of one of the 16 texts."""
        first, second = divmod(int(place), 4)
        return made(GAME[first, second], (first, second), prompt=ASKED)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.8, 0.5)])
def test_the_values_become_the_exact_ones(gamma, lam):
    steps = 20
    game = Game(
        **{"num_steps": steps + 1, "value_warmup_steps": steps, "value_learning_rate": 0.02, "gamma": gamma},
        **{"gae_lambda": lam, "epochs": 4, "minibatches": 1, "value_clip": None},
    )
    counts = np.round(120 * game.odds())  # each text as often as the policy would draw it
    group = [game.text(place) for place in range(16) for _ in range(int(counts.flat[place]))]
    before = game.odds()
    for step in range(1, steps + 1):
        metrics = ppo.learn(game.learner, ppo.rows_of([group], game.config), step, game.config)
    np.testing.assert_array_equal(game.odds(), before)
    later = (counts * GAME).sum(1) / counts.sum(1)
    first = gamma * (counts * GAME).sum() / counts.sum()
    found = game.values()
    np.testing.assert_allclose(found[0], first, atol=0.003)
    np.testing.assert_allclose(found[1], later, atol=0.003)
    exact = (before * GAME).sum(1) / before.sum(1)
    np.testing.assert_allclose(found[1], exact, atol=0.02)
    # What is left is chance, and no values could foresee it.
    outcomes = np.concatenate(
        [[gamma * r, r] for r, n in zip(GAME.flat, counts.flat, strict=True) for _ in range(int(n))]
    )
    foreseen = np.concatenate(
        [[first, later[place // 4]] for place, n in enumerate(counts.flat) for _ in range(int(n))]
    )
    best = 1 - np.var(outcomes - foreseen) / np.var(outcomes)
    assert metrics["value/explained_variance"] == pytest.approx(best, abs=0.003) and best > 0.005


def test_the_policy_becomes_the_optimal_one():
    game = Game(num_steps=20, learning_rate=0.01, value_learning_rate=0.02, value_warmup_steps=3)
    assert game.odds()[1, 2] < 0.2
    for step in range(1, 21):
        game.play(64, step)
    assert GAME.argmax() == 6 and game.odds()[1, 2] > 0.95
    assert game.values()[0] == pytest.approx(1, abs=0.1)


def test_with_a_kl_penalty_it_becomes_the_tilted_reference():
    """The best policy under reward - beta * KL is known: the reference times exp(reward / beta), normalised."""
    beta = 0.3
    game = Game(num_steps=12, learning_rate=0.005, value_learning_rate=0.02, value_warmup_steps=3, kl_coef=beta)
    best = game.odds() * np.exp(GAME / beta)
    best /= best.sum()

    def lost():
        """Return by how much the objective is below the greatest possible."""
        return beta * (game.odds() * np.log(game.odds() / best)).sum()

    start = lost()
    for step in range(1, 13):
        game.play(256, step)
    assert lost() < 0.05 * start


def test_an_entropy_bonus_keeps_the_odds_even():
    found = []
    for coefficient in (0.0, 3.0):
        game = Game(num_steps=6, learning_rate=0.01, value_learning_rate=0.01, entropy_coef=coefficient)
        for step in range(1, 7):
            game.play(64, step)
        found.append(-(game.odds() * np.log(game.odds())).sum())
    assert found[1] > 0.97 * np.log(16) and found[0] < found[1] - 0.3


# ---------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(model_folder, tmp_path):
    """Settings of a run of 4 steps of 3 problems out of 7, with a validation and a checkpoint every 2."""
    file, valid = tmp_path / "problems.jsonl", tmp_path / "valid.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(7)))
    valid.write_text(json.dumps({"question": "20+1", "answer": "21"}) + "\n")
    sizes = {"num_steps": 4, "prompts_per_step": 3, "max_tokens": 6, "rank": 4, "eval_every": 2, "save_every": 2}
    return {
        **sizes,
        "model": str(model_folder),
        "task": "qa",
        "data": str(file),
        "limit": 7,
        "rewards": {"factories:capitals": 1.0},
        "learning_rate": 0.01,
        "value_learning_rate": 0.01,
        "warmup": 0.5,
        "evaluate": {"task": "qa", "data": str(valid), "limit": 1, "max_tokens": 4},
        "device": "cpu",
    }


def test_a_run_that_is_cut_off_ends_the_same(settings, tmp_path, monkeypatch):
    changes = {"value_warmup_steps": 2, "kl_coef": 0.1, "entropy_coef": 0.1, "group_size": 1}
    config = PPOConfig(**{**settings, **changes})
    moments = Moments(monkeypatch, (ppo, "learn"), (checkpoints, "save"))
    ppo.train(config, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert expected[3]["steps"] == 4 and len(expected[1]) == 5
    stored = {name.partition(".")[2] for name in expected[0] if "optimizer" in name}
    assert any("states.0.policy" in name for name in stored) and any("states.1.value" in name for name in stored)
    moments.live(partial(ppo.train, config, tmp_path / "cut"), 2, 6, 4, 6)
    assert_same_outcome(tmp_path / "cut", expected)


def test_it_learns_and_says_what_it_did(settings, tmp_path):
    changes = {"num_steps": 10, "prompts_per_step": 4, "group_size": 4, "learning_rate": 0.02, "warmup": 0}
    config = PPOConfig(**{**settings, **changes, "eval_every": 100, "kl_coef": 0.001})
    result = ppo.train(config, tmp_path / "run")
    _, metrics, _, _ = outcome(tmp_path / "run")
    steps = [row for row in metrics if "reward/mean" in row]
    rewards_ = [row["reward/mean"] for row in steps]
    assert np.mean(rewards_[-4:]) > np.mean(rewards_[:4]) + 0.2
    names = {
        *("reward/mean", "reward/factories:capitals", "rollout/length", "policy/kl_sampler", "policy/kl_ref"),
        *("policy/entropy", "policy/clip_fraction", "policy/kl_old", "optim/grad_norm", "optim/lr", "loss"),
        *("value/loss", "value/explained_variance", "value/mean", "value/clip_fraction", "value/grad_norm", "value/lr"),
    }
    assert all(names <= row.keys() for row in steps)
    assert all(abs(row["policy/kl_sampler"]) < 1e-6 for row in steps)
    assert result.steps == 10 and result.update_seconds > 0
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["trained_by"] == "mlx-traces ppo"
    names = mx.load(str(tmp_path / "run" / "adapter" / "adapters.safetensors"))
    assert names and all("lora" in name and "value" not in name for name in names)
    loading.load(config.model, str(tmp_path / "run" / "adapter"), device="cpu")


def test_equal_rewards_explain_nothing(settings, tmp_path):
    config = PPOConfig(**{**settings, "rewards": {"factories:level": 1.0}, "num_steps": 1, "evaluate": None})
    ppo.train(config, tmp_path / "run")
    (row,) = outcome(tmp_path / "run")[1]
    assert row["value/explained_variance"] is None and row["reward/mean"] == 0.5


# ---------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_warmup_steps": 4}, r"value_warmup_steps \(4\) leaves no step to the policy; num_steps is 4"),
        ({"kl_coef": 0.1, "kind": "full"}, "kl_coef: fully trained layers have no adapter to leave out"),
        (
            {"rewards": {"factories:no_number": 1}},
            "reward factories:no_number returned 'nan', not a finite number or None",
        ),
    ],
)
def test_wrong_input(settings, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ppo.train(PPOConfig(**{**settings, **changes}), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("group_size", 0), ("gae_lambda", 1.5), ("gamma", -0.1), ("value_clip", 0), ("epochs", 0), ("clip_eps", 2)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(UserError, match=f"^{name}: must be "):
        build(PPOConfig, {name: value})


@pytest.mark.parametrize("part", ["policy", "value"])
def test_numbers_that_are_none_stop_and_overwrite_nothing(settings, tmp_path, monkeypatch, part):
    whole, clip = ppo.learn, optimizer.clip

    def broken(*args):
        if args[2] == 3:
            monkeypatch.setattr(
                optimizer, "clip", lambda grads, most: (grads, clip(grads, most)[1] * (np.nan if part in grads else 1))
            )
        return whole(*args)

    monkeypatch.setattr(ppo, "learn", broken)
    with pytest.raises(UserError, match=r"step 3: the loss is .*Lower learning_rate \(0.01\) or value_learning_rate"):
        ppo.train(PPOConfig(**settings), tmp_path / "run")
    state = json.loads(mx.load(str(tmp_path / "run" / "checkpoint.safetensors"), return_metadata=True)[1]["state"])
    assert state["step"] == 2


def test_the_memory_estimate_still_holds():
    """Several epochs, old values and the value head take no more than the estimate leaves room for."""
    config = PPOConfig(rank=16, micro_tokens=16 * 128, max_tokens=112, prompts_per_step=8, group_size=4, num_steps=5)
    loaded = wrap(make_tokenizer(), make_model(max_position_embeddings=2048))
    loaded = replace(loaded, context=2048, config=make_config(max_position_embeddings=2048))
    adapters.start(loaded.model, config)
    recipe = config.model_copy(update={"epochs": 3, "entropy_coef": 0.1})
    learner = ppo.start(loaded, recipe)
    for name, own in zip(("policy", "value"), learner.optimizer.optimizers, strict=True):
        own.init({name: learner.module[name].trainable_parameters()})
    mx.eval(learner.module.parameters(), learner.optimizer.state)
    draw = np.random.default_rng(0)
    group = [made(float(i % 2), draw.integers(0, 98, 112), prompt=(1,) * 16) for i in range(32)]
    held = mx.get_active_memory() / 1e9  # by other tests too
    mx.clear_cache()
    mx.reset_peak_memory()
    ppo.learn(learner, ppo.rows_of([group], recipe), 1, recipe)
    peak = mx.get_peak_memory() / 1e9 - held
    found = memory.of_reinforcement(loaded, config, 16)
    assert abs((found.update - found.weights - found.optimizer) / peak - 1) < 0.25
