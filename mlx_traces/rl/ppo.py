"""PPO (arXiv 1707.06347): a value head and generalized advantage estimation, token by token.

A completion is an episode. The state is the text before a token, the action is the token, and the reward comes with
the last token, which is the stop token if the completion ended by itself. ``kl_coef`` * (log p - log p_ref) is
subtracted from each token's reward (arXiv 1909.08593, eq. 2). The value head predicts the reward still to come from the
last hidden state, before the token is drawn. Advantages are generalized estimates (arXiv 1506.02438), whitened over the
tokens of the batch. The credits of single steps of a completion (`steps`) are added to the advantages of their tokens
(``local``), or to the reward after a step's last token (``cumulative``). Advantages are computed once and used for
``epochs`` passes over the rollouts, each in ``minibatches`` updates. A loss is a mean over the tokens of an update, so
micro-batches change nothing.

A completion that was cut off gets the reward that it earned, and the value after it is 0: the token limit belongs to
the task. ``overlong: mask`` leaves such completions out, for the value head too.

No gradient flows from the value head into the adapter. Each has its own loss, optimizer, learning rate and gradient
norm, so there is no weight between the two losses. The value head is in the checkpoint, not in the saved adapter.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_traces.config import PPOConfig
from mlx_traces.engine import batching, forward
from mlx_traces.engine.logprobs import Split, head_logprobs, split
from mlx_traces.errors import UserError
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.rl import losses, steps, trainer
from mlx_traces.rl.rollouts import Group, Row
from mlx_traces.rl.trainer import Learner, Result
from mlx_traces.train import gradients, loop
from mlx_traces.train.gradients import checkpointed
from mlx_traces.train.optimizer import make_optimizer, of_parts


def train(config: PPOConfig, out: str | Path, resume: bool = False, show: Callable | None = None) -> Result:
    """Train a model on a task by PPO; ``mlx-traces ppo`` from Python. Arguments and errors: see `train.loop`."""
    with trainer.opened("ppo", config, out, resume, show) as setup:
        config, learner = setup.config, start(setup.loaded, setup.config)
        run = trainer.Run(setup, learner)
        for step in run.steps():
            groups, kept = run.collect(step)  # PPO keeps groups of equal reward too
            rows = rows_of(kept, config)
            metrics = learn(learner, rows, step, config)
            run.end_step(step, groups, metrics)  # logs, validates, keeps the best adapter, saves
        return run.result()


class ValueHead(nn.Module):
    """A hidden layer and an output layer that starts at 0, in float32: (..., D) states to (...,) values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(size, size), nn.Linear(size, 1)
        self.out.weight = mx.zeros_like(self.out.weight)
        self.out.bias = mx.zeros_like(self.out.bias)

    def __call__(self, states: mx.array) -> mx.array:
        """Predict values; no gradient flows to the states."""
        states = mx.stop_gradient(states).astype(mx.float32)
        return self.out(nn.gelu(self.hidden(states)))[..., 0]


class ActorCritic(nn.Module):
    """What is trained: the policy (the model with its adapter) and the value head on its last hidden states."""

    def __init__(self, model: nn.Module, halves: Split) -> None:
        super().__init__()
        self.policy = model
        self.value = ValueHead(halves.trunk(mx.array([[0]])).shape[-1])


def start(loaded: LoadedModel, config: PPOConfig) -> Learner:
    """Return what is trained: the model's adapter and a value head, each with its own AdamW."""
    warmup = config.value_warmup_steps
    if warmup >= config.num_steps:
        raise UserError(f"value_warmup_steps ({warmup}) leaves no step to the policy; num_steps is {config.num_steps}")
    trunk_and_head = split(loaded.model) if config.checkpoint_layers else forward.split(loaded.model)
    reference = adapters.reference(loaded.model, config.reference, bool(config.kl_coef))
    module = ActorCritic(loaded.model, trunk_and_head)
    updates = config.epochs * config.minibatches
    critic = config.model_copy(update={"learning_rate": config.value_learning_rate})
    optimizers = {
        "policy": make_optimizer(config, (config.num_steps - warmup) * updates),
        "value": make_optimizer(critic, config.num_steps * updates),
    }
    return Learner(module, trunk_and_head, of_parts(optimizers), reference)


def rows_of(groups: Sequence[Group], config: PPOConfig) -> list[Row]:
    """Make the step's rows, one for each rollout with a reward and a drawn token; masked cut-off ones are left out."""
    rollouts = [
        rollout
        for group in groups
        for rollout in group
        if not (rollout.cut_off and config.overlong == "mask") and rollout.reward is not None and rollout.drawn.any()
    ]
    rows = [Row(rollout.example(), rollout.sampler, reward=rollout.reward) for rollout in rollouts]
    if config.step_weight:  # a group may have a single completion, so the means are over all completions
        earned = steps.credits_of([rollout.steps for rollout in rollouts])
        for row, rollout, values in zip(rows, rollouts, earned, strict=True):
            if config.supervision == "local":
                credit = steps.spread(rollout.steps, values, len(rollout.ids))[rollout.drawn]
            else:  # the credit at an inserted token counts at the drawn token before it, or at the first one
                at_tokens = steps.at_ends(rollout.steps, values, len(rollout.ids))
                credit = np.bincount(np.maximum(rollout.drawn.cumsum() - 1, 0), at_tokens)
            row.credit = (config.step_weight * credit).astype(np.float32)
    return rows


def foresee(module: ActorCritic, halves: Split, rows: Sequence[Row], reference: Callable, config: PPOConfig) -> None:
    """Set the rows' log-probabilities and values before the step's first update, and the reference's."""
    for row, own, foreseen in _read_all(module, halves, rows, config):
        row.old, row.values = own, foreseen
    if config.kl_coef:
        with reference():
            for row, own, _ in _read_all(module, halves, rows, config):
                row.reference = own


def _read_all(
    module: ActorCritic, halves: Split, rows: Sequence[Row], config: PPOConfig
) -> Iterator[tuple[Row, np.ndarray, np.ndarray]]:
    """Yield each row with its log-probabilities and values, computed as in `gradient`."""

    def read(states: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logprobs, _ = head_logprobs(halves, states, targets, config.temperature, config.logits_mb, False, False)
        return logprobs, module.value(states)

    found = forward.by_row(halves, [row.example for row in rows], config.micro_tokens, read)
    for row, arrays in zip(rows, found, strict=True):
        yield row, *arrays


def aim(rows: Sequence[Row], config: PPOConfig) -> dict[str, float]:
    """Set the rows' advantages and returns; return metrics of the values before the update.

    ``value/explained_variance`` compares the values with the discounted rewards that were received. It does not use the
    returns, which contain the values if ``gae_lambda`` is below 1. None if those rewards are all equal.
    """
    _, mask = batching.places([row.example.count for row in rows])
    old, sampler, values = (
        batching.padded([getattr(row, name) for row in rows]) for name in ("old", "sampler", "values")
    )
    got = batching.padded([_rewards(row, config) for row in rows])
    advantages, returns = losses.gae(got, values, mask, gamma=config.gamma, lam=config.gae_lambda)
    outcomes, _ = losses.gae(got, mx.zeros_like(values), mask, gamma=config.gamma, lam=1.0)
    if config.whiten:
        advantages = losses.whiten(advantages, mask)
    if config.step_weight and config.supervision == "local":
        advantages = advantages + batching.padded([row.credit for row in rows])
    for row, own, target in zip(rows, np.array(advantages), np.array(returns), strict=True):
        row.advantage, row.returns = own[: row.example.count], target[: row.example.count]
    explained = losses.explained_variance(values, outcomes, mask).item()
    vary = mx.where(mask, outcomes, -math.inf).max().item() > mx.where(mask, outcomes, math.inf).min().item()
    metrics = {
        "value/explained_variance": explained if vary else None,
        "value/mean": np.concatenate([row.values for row in rows]).mean().item(),
        "policy/kl_sampler": losses.kl_sampler(old, sampler, mask).item() / mask.sum().item(),
    }
    if config.kl_coef:
        metrics["policy/kl_ref"] = np.concatenate([row.old - row.reference for row in rows]).mean().item()
    return metrics


def _rewards(row: Row, config: PPOConfig) -> np.ndarray:
    """Return the reward after each token: the KL penalty, the rollout's reward at its last token, and the credits.

    Credits of steps are included only if they are ``cumulative``.
    """
    rewards = -config.kl_coef * (row.old - row.reference) if config.kl_coef else np.zeros_like(row.old)
    rewards[-1] += row.reward
    return rewards + row.credit if config.step_weight and config.supervision == "cumulative" else rewards


def weighed(rows: Sequence[Row]) -> Sequence[Row]:
    """Set the weights of one optimizer step's rows: a mean over all their tokens."""
    tokens = sum(row.example.count for row in rows)
    for row in rows:
        row.weights = np.full(row.example.count, 1 / tokens, np.float32)
    return rows


def gradient(
    module: ActorCritic, halves: Split, rows: Sequence[Row], config: PPOConfig, values_only: bool = False
) -> tuple[float, dict[str, Any], Counter]:
    """Return the loss of one optimizer step, its gradients by part (policy, value), and sums for metrics.

    Each rank computes its part of the rows; the result covers all rows. The loss is the clipped policy loss, minus
    ``entropy_coef`` times the entropy, plus the clipped value loss. With ``values_only`` it is the value loss alone,
    and the policy has no gradient.
    """
    options = {"temperature": config.temperature, "logits_mb": config.logits_mb}
    bound = math.inf if config.value_clip is None else config.value_clip

    def loss_of(states: mx.array, targets: mx.array, indices: list[int]) -> tuple[mx.array, dict[str, mx.array]]:
        micro = [rows[index] for index in indices]
        index, mask = batching.places([row.example.count for row in micro])
        weights, old_values, returns, old, advantages = (
            batching.padded([getattr(row, name) for row in micro])
            for name in ("weights", "values", "returns", "old", "advantage")
        )
        loss, sums = losses.value_loss(module.value(states)[index], old_values, returns, mask, weights, clip_eps=bound)
        sums |= {"value_loss": mx.stop_gradient(loss)}
        if values_only:
            return loss, sums
        logprobs, entropies = head_logprobs(
            halves, states, targets, **options, entropy_slopes=bool(config.entropy_coef)
        )
        surrogate, more = losses.policy_loss(
            logprobs[index], old, advantages, mask, weights, kind="dapo", clip_eps=config.clip_eps
        )
        loss = loss + surrogate
        if config.entropy_coef:
            loss = loss - config.entropy_coef * mx.where(mask, weights * entropies[index], 0).sum()
        return loss, sums | more | {"entropy": mx.stop_gradient(entropies.sum())}

    learned = module.value if values_only else module
    examples = [row.example for row in rows]
    loss, grads, sums = gradients.accumulate(learned, halves, examples, config.micro_tokens, loss_of)
    return loss, {"value": grads} if values_only else grads, sums


def learn(learner: Learner, rows: Sequence[Row], step: int, config: PPOConfig) -> dict[str, float]:
    """Update policy and value head on a step's rows, in several passes; in the warm-up steps the value head alone.

    Without rows nothing is updated, the optimizers' states included.

    Raises:
        UserError: if the loss or a gradient is not finite, before that update changes anything.
    """
    if not rows:
        return {"optim/updates": 0}
    module, halves, optimizer = learner.module, learner.split, learner.optimizer
    with checkpointed(module.policy.layers, config.checkpoint_layers):
        foresee(module, halves, rows, learner.reference, config)
        metrics = aim(rows, config)
        parts = dict(zip(("policy", "value"), optimizer.optimizers, strict=True))
        totals, norms, sums = [], Counter(), Counter()
        draw = random.Random(f"{config.seed} step {step}")
        for _ in range(config.epochs):
            order = draw.sample(rows, len(rows)) if config.minibatches > 1 else rows
            for at in range(min(config.minibatches, len(rows))):
                batch = weighed(order[at :: config.minibatches])
                loss, grads, more = gradient(module, halves, batch, config, step <= config.value_warmup_steps)
                proposed = {name: parts[name].propose(module, {name: own}) for name, own in grads.items()}
                total = math.hypot(*(norm for norm, _ in proposed.values()))
                advice = f"value_learning_rate ({config.value_learning_rate:g})"
                loop.refuse_nonfinite(loss, total, step, config, advice)
                for name, (norm, update) in proposed.items():
                    update()
                    norms[name] += norm
                totals.append(loss)
                sums.update(more)
    count = len(totals)
    metrics |= {
        "loss": sum(totals) / count,
        "value/loss": sums["value_loss"] / count,
        "value/clip_fraction": sums["value_clip"] / sums["tokens"],
        "value/grad_norm": norms["value"] / count,
        "value/lr": parts["value"].learning_rate.item(),
        "optim/updates": count,
    }
    if "policy" not in norms:
        return metrics
    return metrics | {
        "policy/entropy": sums["entropy"] / sums["tokens"],
        "policy/clip_fraction": sums["clip"] / sums["ratios"],
        "policy/kl_old": sums["kl_old"] / sums["tokens"],
        "optim/grad_norm": norms["policy"] / count,
        "optim/lr": parts["policy"].learning_rate.item(),
    }
