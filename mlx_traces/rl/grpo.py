"""GRPO (arXiv 2402.03300) and its variants: raise the probability of completions that beat their group's mean.

An advantage is a rollout's reward compared with the rewards of its group. Log-probabilities are those of the exact
sampled ids, the stop token included, given the prompt, at the sampling temperature, in float32. The formulas are in
`losses`. Weights are computed for the whole optimizer step, so micro-batches change nothing. Without a KL term rows
with advantage 0 have no gradient and are left out. Dropout is off, so the policy that is trained is the one that
sampled. With ``top_p``, ``top_k`` or ``min_p`` the sampler draws from a filtered distribution, but the update uses the
unfiltered one; ``policy/kl_sampler`` shows by how much they differ.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_traces.config import GRPOConfig
from mlx_traces.engine import batching, forward
from mlx_traces.engine.logprobs import Split, head_logprobs, split
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.rl import losses, steps, trainer
from mlx_traces.rl.rollouts import Group, Row, steps_of
from mlx_traces.rl.trainer import Learner, Result
from mlx_traces.train import gradients, loop
from mlx_traces.train.gradients import checkpointed
from mlx_traces.train.optimizer import make_optimizer


def train(config: GRPOConfig, out: str | Path, resume: bool = False, show: Callable | None = None) -> Result:
    """Train a model on a task by GRPO; ``mlx-traces grpo`` from Python. Arguments and errors: see `train.loop`."""
    with trainer.opened("grpo", config, out, resume, show) as setup:
        config, learner = setup.config, start(setup.loaded, setup.config)
        run = trainer.Run(setup, learner)
        for step in run.steps():
            groups, kept = run.collect(step, config.max_resamples)  # P groups of G scored completions
            rows = rows_of(kept, config)  # with their advantages
            metrics = learn(learner, rows, step, config)
            run.end_step(step, groups, metrics)  # logs, validates, keeps the best adapter, saves
        return run.result()


def start(loaded: LoadedModel, config: GRPOConfig) -> Learner:
    """Return the model, whose adapter is trained, its optimizer (AdamW) and the KL term's reference."""
    trunk_and_head = split(loaded.model) if config.checkpoint_layers else forward.split(loaded.model)
    reference = adapters.reference(loaded.model, config.reference, bool(config.kl_coef))
    updates = config.num_steps * config.updates_per_batch * config.minibatches
    return Learner(loaded.model, trunk_and_head, make_optimizer(config, updates), reference)


def advantages(groups: Sequence[Group], config: GRPOConfig) -> np.ndarray:
    """Return (P * G,) float32 advantages by group; a rollout without a reward has 0 and is left out of its group."""
    rewards = np.array([[np.nan if r.reward is None else r.reward for r in group] for group in groups], np.float32)
    there, found = ~np.isnan(rewards), np.zeros(rewards.shape, np.float32)
    if config.advantage == "mean":
        found[there] = np.array(losses.reinforce_advantages(mx.array(rewards[there]))) if there.any() else 0
        return found.reshape(-1)
    every = None if there.all() else mx.array(rewards[there])
    for size in range(2, rewards.shape[1] + 1):  # usually all groups have the full size
        if (alike := there.sum(axis=1) == size).any():
            places = there & alike[:, None]
            values = mx.array(rewards[places].reshape(-1, size))
            if config.advantage == "rloo":
                result = losses.rloo_advantages(values)
            else:
                result = losses.group_advantages(values, config.advantage, every=every)
            found[places] = np.array(result).reshape(-1)
    return found.reshape(-1)


def rows_of(groups: Sequence[Group], config: GRPOConfig) -> list[Row]:
    """Make the step's rows, one for each rollout; a masked cut-off rollout has no trained token."""
    if not groups:
        return []  # resampling found no group whose rewards differ
    rows = []
    rollouts = [rollout for group in groups for rollout in group]
    of_each = advantages(groups, config).tolist()
    if config.step_weight:
        of_each = steps.token_advantages(
            of_each,
            [steps_of(group) for group in groups],
            [len(rollout.ids) for rollout in rollouts],
            weight=config.step_weight,
            supervision=config.supervision,
            scale=config.advantage,
        )
    for rollout, advantage in zip(rollouts, of_each, strict=True):
        example = rollout.example(learned=not (rollout.cut_off and config.overlong == "mask"))
        rows.append(Row(example, rollout.sampler, advantage[rollout.drawn] if np.ndim(advantage) else advantage))
    return rows


def weighed(rows: Sequence[Row], config: GRPOConfig) -> list[Row]:
    """Give the rows of one optimizer step their weights; return the rows that have a gradient."""
    if not rows:
        return []
    mask = batching.padded([np.ones(row.example.count, np.float32) for row in rows])
    weights = np.array(losses.token_weights(mask, config.loss, max_tokens=config.longest))
    for row, own in zip(rows, weights, strict=True):
        row.weights = own[: row.example.count]
    return [row for row in rows if row.example.count and (np.any(row.advantage) or config.kl_coef)]


def gradient(model: nn.Module, halves: Split, rows: Sequence[Row], config: GRPOConfig) -> tuple[float, Any, Counter]:
    """Return the loss of one optimizer step, its gradient, and sums for metrics."""

    def loss_of(states: mx.array, targets: mx.array, indices: list[int]) -> tuple[mx.array, dict[str, mx.array]]:
        micro = [rows[index] for index in indices]
        flat, entropies = head_logprobs(halves, states, targets, config.temperature, config.logits_mb)
        index, mask = batching.places([row.example.count for row in micro])
        logprobs = flat[index]
        old = mx.stop_gradient(logprobs) if micro[0].old is None else batching.padded([row.old for row in micro])
        sampler, importance = batching.padded([row.sampler for row in micro]), None
        if config.importance != "none":
            importance = losses.sampler_weights(old, sampler, mask, cap=config.importance_cap, level=config.importance)
        loss, sums = losses.policy_loss(
            logprobs,
            old,
            batching.padded([np.broadcast_to(row.advantage, row.example.count) for row in micro]),
            mask,
            batching.padded([row.weights for row in micro]),
            kind=config.loss,
            clip_eps=config.clip_eps,
            clip_eps_high=config.clip_eps_high,
            ref_logprobs=batching.padded([row.reference for row in micro]) if config.kl_coef else None,
            kl_coef=config.kl_coef,
            unbiased_kl=config.unbiased_kl,
            importance=importance,
        )
        return loss, sums | {"entropy": entropies.sum(), "kl_sampler": losses.kl_sampler(old, sampler, mask)}

    return gradients.accumulate(model, halves, [row.example for row in rows], config.micro_tokens, loss_of)


def logprobs_of(halves: Split, rows: Sequence[Row], config: GRPOConfig) -> Iterator[tuple[Row, np.ndarray]]:
    """Yield each row with the float32 log-probabilities of its completion, computed as in `gradient`."""

    def read(states: mx.array, targets: mx.array) -> tuple[mx.array]:
        return head_logprobs(halves, states, targets, config.temperature, config.logits_mb, False, False)[:1]

    found = forward.by_row(halves, [row.example for row in rows], config.micro_tokens, read)
    for row, (values,) in zip(rows, found, strict=True):
        yield row, values


def learn(learner: Learner, rows: Sequence[Row], step: int, config: GRPOConfig) -> dict[str, float]:
    """Update the model by a step's rows, once or several times; return metrics.

    If no row has a gradient, nothing is updated, the optimizer's state included.

    Raises:
        UserError: if the loss or the gradient is not finite, before that update changes anything.
    """
    model, halves, optimizer = learner.module, learner.split, learner.optimizer
    with checkpointed(model.layers, config.checkpoint_layers):
        useful = weighed(rows, config)
        if config.kl_coef:
            with learner.reference():
                for row, values in logprobs_of(halves, useful, config):
                    row.reference = values
        if config.updates_per_batch * config.minibatches > 1:
            for row, values in logprobs_of(halves, useful, config):
                row.old = values
        totals, norms, sums = [], [], Counter()
        draw = random.Random(f"{config.seed} step {step}")
        for _ in range(config.updates_per_batch):
            order = draw.sample(rows, len(rows)) if config.minibatches > 1 else rows
            for part in range(config.minibatches):
                batch = weighed(order[part :: config.minibatches], config)
                if not batch:
                    continue
                loss, grads, more = gradient(model, halves, batch, config)
                norm, update = optimizer.propose(model, grads)
                loop.refuse_nonfinite(loss, norm, step, config, f"max_grad_norm ({config.max_grad_norm:g})")
                update()
                totals.append(loss)
                norms.append(norm)
                sums.update(more)
    if not totals:
        return {"optim/updates": 0}
    return {
        "loss": sum(totals) / len(totals),
        "policy/kl_sampler": sums["kl_sampler"] / sums["tokens"],
        "policy/entropy": sums["entropy"] / sums["tokens"],
        "policy/clip_fraction": sums["clip"] / sums["ratios"],
        "policy/kl_old": sums["kl_old"] / sums["tokens"],
        **({"policy/kl_ref": sums["kl_ref"] / sums["tokens"]} if config.kl_coef else {}),
        "optim/updates": len(totals),
        "optim/grad_norm": sum(norms) / len(norms),
        "optim/lr": optimizer.learning_rate.item(),
    }
