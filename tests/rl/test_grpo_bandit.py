"""A policy small enough to enumerate: the mean sampled gradient is the exact gradient of the expected reward.

Four tokens, one of them the stop token, at most two a completion: 13 outcomes for each of two prompts. The engine
samples them; ``grpo.rows_of``, ``weighed`` and ``gradient`` make a gradient of each step; the mean over the steps is
compared with the sum over all outcomes, probabilities in float64, within its standard error.
"""

from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import make_config, make_model, make_tokenizer, wrap
from mlx.utils import tree_flatten

from mlx_traces.config import AdapterConfig, GRPOConfig
from mlx_traces.engine import generation, logprobs
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.evaluation import completion
from mlx_traces.models import adapters
from mlx_traces.records import Problem
from mlx_traces.rl import grpo, rollouts
from mlx_traces.rl.steps import Step

STOP = 3
TEMPERATURE = 0.6
PROMPTS = ((0, 1), (2, 2, 1))
OUTCOMES = ((STOP,), *product(range(STOP), range(STOP + 1)))
STEPS, GROUPS, SIZE = 50, 4, 16  # a step's groups are of either prompt in turn
LIMIT = 4.5  # standard errors


class Bandit:
    """The policy, its rollouts, and for each prompt and outcome probability, reward and the slope of log p."""

    def __init__(self):
        sizes = {"vocab_size": 4, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
        self.model = make_model(seed=3, **sizes, **heads)
        self.model.lm_head.weight = self.model.lm_head.weight * 0.3  # so that every outcome is drawn now and then
        mx.random.seed(0)
        adapters.start(self.model, AdapterConfig(rank=2))
        trained = [
            (name, 0.3 * mx.random.normal(a.shape)) for name, a in tree_flatten(self.model.trainable_parameters())
        ]
        self.model.load_weights(trained, strict=False)
        loaded = wrap(make_tokenizer(), self.model)
        self.loaded = replace(loaded, stop_ids=frozenset({STOP}), config=make_config(**sizes, **heads))
        self.rewards = np.random.default_rng(1).normal(0.5, 1, (len(PROMPTS), len(OUTCOMES)))
        self.rewards[:, [outcome[-1] == STOP for outcome in OUTCOMES]] += 2  # stopping is worth learning
        self.probabilities = np.array([[self.probability(p, o) for o in OUTCOMES] for p in PROMPTS])

    def logprobs(self, prompt, outcome):
        """Return (tokens,) log-probabilities by a plain forward pass and full logits, float32 and differentiable."""
        logits = self.model(mx.array([prompt + outcome]))[0, len(prompt) - 1 : -1] / TEMPERATURE
        return (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[mx.arange(len(outcome)), mx.array(outcome)]

    def probability(self, prompt, outcome):
        """Return an outcome's probability, softmax in float64."""
        logits = np.array(self.model(mx.array([prompt + outcome])), np.float64)[0, len(prompt) - 1 : -1] / TEMPERATURE
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return np.prod([row[token] for row, token in zip(shares, outcome, strict=True)])

    def exact(self):
        """Return the gradient of the expected reward, the mean over the prompts, by array."""
        total = {}
        for i, prompt in enumerate(PROMPTS):
            for j, outcome in enumerate(OUTCOMES):
                share = self.probabilities[i, j] * self.rewards[i, j] / len(PROMPTS)
                slope = nn.value_and_grad(self.model, lambda p=prompt, o=outcome: self.logprobs(p, o).sum())()[1]
                for name, array in tree_flatten(slope):
                    total[name] = total.get(name, 0) + share * np.array(array, np.float64)
        return total

    def steps(self, **changes):
        """Return every step's groups of rollouts; ``changes`` go to the sampling."""
        requests = [Request(PROMPTS[i % 2], seed=1000 + i) for i in range(STEPS * GROUPS * SIZE)]
        params = SamplingParams(**{"max_tokens": 2, "temperature": TEMPERATURE, **changes})
        with adapters.merged(self.model):
            made = dict(generation.generate(self.loaded, requests, params, 1024, logprobs=True))
        found = [self.rollout(i % 2, made[i]) for i in range(len(requests))]
        by_prompt = [found[i :: len(PROMPTS)] for i in range(len(PROMPTS))]
        groups = [own[at : at + SIZE] for at in range(0, len(by_prompt[0]), SIZE) for own in by_prompt]
        return [groups[at : at + GROUPS] for at in range(0, len(groups), GROUPS)]

    def rollout(self, prompt, sampled):
        reward = float(self.rewards[prompt, OUTCOMES.index(sampled.completion_ids)])
        return rollouts.ScoredCompletion(
            Problem(str(prompt), {}, ""), completion.Completion.sampled("", "", sampled), {}, reward
        )


@pytest.fixture(scope="module")
def bandit():
    return Bandit()


@pytest.fixture(scope="module")
def exact(bandit):
    return bandit.exact()


@pytest.fixture(scope="module")
def steps(bandit):
    return bandit.steps()


def settings_of(**changes):
    own = {"group_size": SIZE, "max_tokens": 2, "temperature": TEMPERATURE, "loss": "reinforce", "advantage": "rloo"}
    return GRPOConfig(**{**own, **changes})


def sampled_gradients(bandit, steps, config):
    """Return the negative gradient of every step by array, (steps, size) float64."""
    halves, found = logprobs.split(bandit.model), {}
    for groups in steps:
        rows = grpo.weighed(grpo.rows_of(groups, config), config)
        _, grads, _ = grpo.gradient(bandit.model, halves, rows, config)
        # What stands below a kind's sum over tokens: undone, each is the mean over rows of each row's sum.
        tokens = sum(len(rollout.ids) for group in groups for rollout in group)
        below = {"dapo": tokens / (SIZE * len(groups)), "dr_grpo": config.max_tokens}.get(config.loss, 1)
        for name, array in tree_flatten(grads):
            found.setdefault(name, []).append(-below * np.array(array, np.float64).ravel())
    return {name: np.array(rows) for name, rows in found.items()}


def farthest(sampled, exact, factor=1.0):
    """Return the greatest distance of a mean from the exact gradient, in standard errors.

    Each array is looked at along its exact gradient and along two random directions.
    """
    draw, distances = np.random.default_rng(5), []
    assert sampled.keys() == exact.keys()
    for name, rows in sampled.items():
        expected = factor * exact[name].ravel()
        for direction in (expected, draw.normal(size=expected.size), draw.normal(size=expected.size)):
            along = (rows - expected) @ direction
            error = along.std(ddof=1) / np.sqrt(len(along))
            distances.append(abs(along.mean()) / error)
    return max(distances)


def test_outcomes_and_probabilities(bandit, steps):
    assert len(OUTCOMES) == len(set(OUTCOMES)) == 13
    assert bandit.probabilities.sum(axis=1) == pytest.approx([1, 1], abs=1e-12)
    assert bandit.probabilities.min() > 0.001 and bandit.probabilities.max() < 0.6  # all can be seen, none alone
    for i, counted in enumerate(np.zeros((2, 13))):
        drawn = [rollout for groups in steps for group in groups[i::2] for rollout in group]
        for rollout in drawn:
            counted[OUTCOMES.index(rollout.ids)] += 1
        expected = len(drawn) * bandit.probabilities[i]
        assert ((counted - expected) ** 2 / expected).sum() < 37  # chi-square, 12 degrees of freedom, p = 2e-4
        for rollout in drawn[:50]:
            logprobs = rollout.completion.rollout.logprobs
            assert np.exp(sum(logprobs)) == pytest.approx(
                bandit.probabilities[i, OUTCOMES.index(rollout.ids)], rel=1e-4
            )


@pytest.mark.parametrize(
    ("loss", "advantage", "factor"),
    [
        ("reinforce", "rloo", 1),
        ("reinforce", "none", 1 - 1 / SIZE),  # the mean taken away includes a rollout's own reward
        ("reinforce", "mean", 1 - 1 / (SIZE * GROUPS)),
        ("dapo", "rloo", 1),
        ("dapo", "mean", 1 - 1 / (SIZE * GROUPS)),
        ("dr_grpo", "none", 1 - 1 / SIZE),
    ],
)
def test_the_mean_sampled_gradient_is_the_exact_one(bandit, steps, exact, loss, advantage, factor):
    config = settings_of(loss=loss, advantage=advantage)
    assert farthest(sampled_gradients(bandit, steps, config), exact, factor) < LIMIT


# ---------------------------------------------------------------------------------- values of steps

WEIGHT = 0.6
VALUES = np.random.default_rng(7).normal(0, 1.5, (2, len(PROMPTS), len(OUTCOMES)))


def steps_of(prompt, outcome):
    """Return an outcome's steps: its first token, whose value depends on that alone, and its last one."""
    last, place = len(outcome) - 1, OUTCOMES.index(outcome)
    opening = next(at for at, other in enumerate(OUTCOMES) if other[0] == outcome[0])
    first = Step("first", 0, 1, VALUES[0, prompt, opening], 0, 1)
    return first, Step("last", last, last + 1, VALUES[1, prompt, place], last, last + 1)


def with_steps(steps, shift=0):
    """Return the rollouts with their steps, ``shift`` tokens off (held within the completion)."""

    def stepped(rollout):
        prompt, most = int(rollout.problem.id), len(rollout.ids) - 1
        own = [step._replace(first=min(most, max(0, step.first + shift))) for step in steps_of(prompt, rollout.ids)]
        return replace(rollout, steps=tuple(step._replace(stop=step.first + 1) for step in own))

    return [[[stepped(rollout) for rollout in group] for group in groups] for groups in steps]


def exact_with_steps(bandit, exact, supervision):
    """Return the gradient by enumeration: of the reward, plus that of each step's value at the tokens it counts for.

    A step's value is compared with the mean of its kind's. ``cumulative`` is the gradient of the expected sum of reward
    and weighed values; ``local`` counts a value for the step's own tokens only.
    """
    total = dict(exact)
    for i, prompt in enumerate(PROMPTS):
        found = [steps_of(i, outcome) for outcome in OUTCOMES]
        means = [sum(bandit.probabilities[i, j] * own[k].value for j, own in enumerate(found)) for k in range(2)]
        for j, outcome in enumerate(OUTCOMES):
            factors = np.zeros(len(outcome))
            for step, mean in zip(found[j], means, strict=True):
                begin = 0 if supervision == "cumulative" else step.first
                factors[begin : step.stop] += WEIGHT * (step.value - mean)
            share = bandit.probabilities[i, j] / len(PROMPTS)
            slope = nn.value_and_grad(
                bandit.model,
                lambda p=prompt, o=outcome, f=factors: (bandit.logprobs(p, o) * mx.array(f, mx.float32)).sum(),
            )()[1]
            for name, array in tree_flatten(slope):
                total[name] = total[name] + share * np.array(array, np.float64)
    return total


@pytest.mark.parametrize("supervision", ["local", "cumulative"])
def test_the_mean_gradient_with_values_of_steps_is_the_exact_one(bandit, steps, exact, supervision):
    config = settings_of(advantage="none", step_weight=WEIGHT, supervision=supervision)
    exact = exact_with_steps(bandit, exact, supervision)
    factor = 1 - 1 / SIZE  # a mean includes a completion's own value
    assert farthest(sampled_gradients(bandit, with_steps(steps), config), exact, factor) < LIMIT
    # Steps a token too early are seen, and too late: except in a cumulative sum, to which that only adds noise.
    for shift in (-1, 1) if supervision == "local" else (-1,):
        shifted = sampled_gradients(bandit, with_steps(steps[:30], shift), config)
        assert farthest(shifted, exact, factor) > 2 * LIMIT, shift


def test_all_weights_trained_the_head_included(bandit, steps):
    try:
        bandit.model.unfreeze()
        sampled, exact = sampled_gradients(bandit, steps, settings_of()), bandit.exact()
    finally:
        bandit.model.freeze()
        bandit.model.unfreeze(keys=["lora_a", "lora_b"], strict=False)
    assert "lm_head.linear.weight" in exact or "lm_head.weight" in exact
    assert farthest(sampled, exact) < LIMIT


def cut(rollout):
    """Return a rollout as if its stop token had not been kept."""
    sampled = rollout.completion.rollout
    if sampled.completion_ids[-1] == STOP:
        sampled = replace(sampled, completion_ids=sampled.completion_ids[:-1], logprobs=sampled.logprobs[:-1])
    return replace(rollout, completion=replace(rollout.completion, rollout=sampled))


def test_faults_are_seen(bandit, steps, exact):
    other = settings_of(temperature=1.0)  # not the one that was sampled at
    assert farthest(sampled_gradients(bandit, steps, other), exact) > 2 * LIMIT
    stopless = [[[cut(rollout) for rollout in group] for group in groups] for groups in steps]
    assert farthest(sampled_gradients(bandit, stopless, settings_of()), exact) > 2 * LIMIT
    filtered = bandit.steps(top_k=2)  # another distribution than the one that is learned
    assert farthest(sampled_gradients(bandit, filtered, settings_of()), exact) > 2 * LIMIT
