"""Reinforcement learning on a task's own grader: GRPO and its kin, resumable at any moment.

A step draws problems, samples a group of rollouts for each, scores them, and makes the likelier what was better than
its group. The log-probabilities are those of the exact sampled ids, their stop token included, given the prompt, at
the sampling temperature, in float32. The formulas are those of ``policy``, weighed over the whole optimizer step, so
micro-batches change nothing; rows with an advantage of 0 are left out, which without KL term changes nothing either.
Dropout is off: what is trained is the policy that sampled. With ``top_p``, ``top_k`` or ``min_p`` it is not quite: the
sampler's probabilities are then those of the filtered distribution, the update's are not, and ``policy/kl_sampler``
shows by how much.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_traces import (
    adapters,
    batching,
    checkpoints,
    device,
    evaluation,
    forward,
    memory,
    models,
    optim,
    policy,
    rewards,
    training,
)
from mlx_traces.batching import Example
from mlx_traces.config import EvalConfig, GRPOConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import Completion, Plan
from mlx_traces.models import LoadedModel
from mlx_traces.records import Problem
from mlx_traces.runs import RunFolder, fingerprint, provenance, read_json, to_json, write_atomic
from mlx_traces.tasks import Task
from mlx_traces.tasks.data import is_file

# ------------------------------------------------------------------------------------------------ rollouts


@dataclass(frozen=True)
class Rollout:
    """A sampled completion with its rewards: ``parts`` by name, ``reward`` their weighted sum."""

    problem: Problem
    completion: Completion
    parts: dict[str, float | None]
    reward: float

    @property
    def ids(self) -> tuple[int, ...]:
        """The exact sampled ids, the stop token included."""
        return self.completion.rollout.completion_ids

    @property
    def cut_off(self) -> bool:
        """Whether the limit ended it."""
        return self.completion.rollout.finish_reason == "length"


Group = list[Rollout]


def sample(
    loaded: LoadedModel, planned: Plan, problems: Sequence[Problem], size: int, seed: int, first: int = 0
) -> list[list[Completion]]:
    """Complete each problem ``size`` times; what is drawn follows from ``seed`` and the number, from ``first`` on."""
    planned = replace(planned, config=planned.config.model_copy(update={"seed": seed}))
    numbers = iter(range(first, first + size * len(problems)))
    todo = [(problem, next(numbers)) for problem in problems for _ in range(size)]
    done: list[Any] = [None] * len(todo)
    loaded.model.eval()
    with adapters.merged(loaded.model):
        for index, completion in evaluation.completions_of(loaded, planned, logprobs=True)(todo):
            done[index] = completion
    return [done[at : at + size] for at in range(0, len(done), size)]


def scored(
    planned: Plan,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Completion]],
    functions: Mapping[str, Callable],
    config: GRPOConfig,
) -> list[Group]:
    """Give every completion its rewards."""
    pairs = [(problem, one) for problem, group in zip(problems, groups, strict=True) for one in group]
    parts = rewards.score(planned, pairs, functions, config.rewards, config.tags)
    totals = [rewards.total(part, config.rewards) for part in parts]
    if config.overlong == "penalty":
        lengths = mx.array([len(one.rollout.completion_ids) for _, one in pairs])
        slope = min(config.overlong_tokens, config.max_tokens)
        for i, penalty in enumerate(policy.overlong_penalty(lengths, config.max_tokens, slope).tolist()):
            parts[i], totals[i] = parts[i] | {"overlong": penalty}, totals[i] + penalty
    rollouts = [Rollout(*pair, part, value) for pair, part, value in zip(pairs, parts, totals, strict=True)]
    return [rollouts[at : at + config.group_size] for at in range(0, len(rollouts), config.group_size)]


def informative(group: Group) -> bool:
    """Whether a group's rewards differ, without which there is nothing to prefer."""
    return len({rollout.reward for rollout in group}) > 1


def drawn(pool: Sequence[Problem], seed: int, start: int) -> Iterator[Problem]:
    """Yield problems without end, from the ``start``-th on: the pool over and over, shuffled anew each time."""
    epoch, place = divmod(start, len(pool))
    while True:
        order = list(pool)
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        yield from order[place:]
        epoch, place = epoch + 1, 0


def advantages(groups: Sequence[Group], config: GRPOConfig) -> np.ndarray:
    """Return (P * G,) float32 advantages, group by group."""
    values = mx.array([[rollout.reward for rollout in group] for group in groups])
    if config.advantage == "rloo":
        result = policy.rloo_advantages(values)
    elif config.advantage == "mean":
        result = policy.reinforce_advantages(values)
    else:
        result = policy.group_advantages(values, config.advantage)
    return np.array(result).reshape(-1)


# ------------------------------------------------------------------------------------------------ the update


@dataclass
class Row:
    """A rollout as it is learned from; arrays have a float32 for each of its completion tokens.

    ``sampler`` are the log-probabilities that it was sampled with, ``old`` those of the policy before the step's first
    update where there are several, ``reference`` the reference's where there is one, ``weights`` the update's.
    """

    example: Example
    advantage: float
    sampler: np.ndarray
    weights: np.ndarray | None = None
    old: np.ndarray | None = None
    reference: np.ndarray | None = None


def rows_of(groups: Sequence[Group], config: GRPOConfig) -> list[Row]:
    """Make the step's rows, one for each rollout; a cut-off one that is masked has no token to learn."""
    rows = []
    rollouts = [rollout for group in groups for rollout in group]
    for rollout, advantage in zip(rollouts, advantages(groups, config).tolist(), strict=True):
        prompt, ids = rollout.completion.rollout.prompt_ids, rollout.ids
        learned = not (rollout.cut_off and config.overlong == "mask")
        example = Example(rollout.problem.id, prompt + ids, (False,) * len(prompt) + (learned,) * len(ids))
        rows.append(Row(example, advantage, np.array(rollout.completion.rollout.logprobs, np.float32)))
    return rows


def weighed(rows: Sequence[Row], config: GRPOConfig) -> list[Row]:
    """Give the rows of one optimizer step their weights, and return those that can teach."""
    if not rows:
        return []
    mask = _padded([np.ones(row.example.count, np.float32) for row in rows])
    weights = np.array(policy.token_weights(mask, config.loss, max_tokens=config.max_tokens))
    for row, own in zip(rows, weights, strict=True):
        row.weights = own[: row.example.count]
    return [row for row in rows if row.example.count and (row.advantage or config.kl_coef)]


def gradient(
    model: nn.Module, halves: forward.Split, rows: Sequence[Row], config: GRPOConfig
) -> tuple[float, Any, Counter]:
    """Return the loss of one optimizer step, its gradient, and the sums that its metrics are made of."""

    def loss_of(ids: mx.array, positions: np.ndarray, micro: list[Row]) -> tuple[mx.array, dict[str, mx.array]]:
        flat, entropies = forward.token_logprobs(
            halves, ids, positions, temperature=config.temperature, logits_mb=config.logits_mb
        )
        index, mask = _places([row.example.count for row in micro])
        logprobs = flat[index]
        old = mx.stop_gradient(logprobs) if micro[0].old is None else _padded([row.old for row in micro])
        sampler, importance = _padded([row.sampler for row in micro]), None
        if config.importance != "none":
            importance = policy.sampler_weights(old, sampler, mask, cap=config.importance_cap, level=config.importance)
        loss, sums = policy.policy_loss(
            logprobs,
            old,
            mx.array([row.advantage for row in micro]),
            mask,
            _padded([row.weights for row in micro]),
            kind=config.loss,
            clip_eps=config.clip_eps,
            clip_eps_high=config.clip_eps_high,
            ref_logprobs=_padded([row.reference for row in micro]) if config.kl_coef else None,
            kl_coef=config.kl_coef,
            importance=importance,
        )
        return loss, sums | {"entropy": entropies.sum(), "kl_sampler": policy.kl_sampler(old, sampler, mask)}

    value_and_grad = nn.value_and_grad(model, loss_of)
    loss, grads, sums = 0.0, None, Counter()
    for micro in _micro_batches(rows, config):
        ids, positions = batching.pad([row.example for row in micro])
        (part, more_sums), more = value_and_grad(mx.array(ids), positions, micro)
        grads = optim.add(grads, more)
        mx.eval(part, more_sums, grads)
        loss += part.item()
        sums.update({name: value.item() for name, value in more_sums.items()})
    return loss, grads, sums


def logprobs_of(halves: forward.Split, rows: Sequence[Row], config: GRPOConfig) -> Iterator[tuple[Row, np.ndarray]]:
    """Yield each row with the float32 log-probabilities of its completion, computed as in `gradient`."""
    for micro in _micro_batches(rows, config):
        ids, positions = batching.pad([row.example for row in micro])
        flat, _ = forward.token_logprobs(
            halves,
            mx.array(ids),
            positions,
            temperature=config.temperature,
            logits_mb=config.logits_mb,
            slopes=False,
            entropies=False,
        )
        ends = np.cumsum([row.example.count for row in micro])[:-1]
        yield from zip(micro, np.split(np.array(flat), ends), strict=True)


def _micro_batches(rows: Sequence[Row], config: GRPOConfig) -> Iterator[list[Row]]:
    lengths = [len(row.example.ids) for row in rows]
    for indices in batching.micro_batches(range(len(rows)), lengths, config.micro_tokens):
        yield [rows[index] for index in indices]


def _places(counts: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Return where the rows' tokens are in the flat array, (B, T), and which of these places are tokens."""
    starts = np.cumsum([0, *counts[:-1]])[:, None]
    column = np.arange(max(counts))[None]
    mask = column < np.array(counts)[:, None]
    return mx.array(np.where(mask, starts + column, 0)), mx.array(mask)


def _padded(arrays: Sequence[np.ndarray]) -> mx.array:
    """Return float32 arrays as the rows of one, padded right with 0."""
    rows = np.zeros((len(arrays), max(1, *map(len, arrays))), np.float32)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = array
    return mx.array(rows)


def learn(
    model: nn.Module,
    halves: forward.Split,
    rows: Sequence[Row],
    optimizer: Any,
    reference: Callable,
    step: int,
    config: GRPOConfig,
) -> dict[str, float]:
    """Update the model by a step's rows, once or several times; return metrics.

    Where no row can teach, nothing happens, not even a step of the optimizer.

    Raises:
        UserError: if the loss or the gradient is not finite; this update is not made.
    """
    useful = weighed(rows, config)
    if config.kl_coef:
        with reference():
            for row, values in logprobs_of(halves, useful, config):
                row.reference = values
    if config.updates_per_batch * config.minibatches > 1:
        for row, values in logprobs_of(halves, useful, config):
            row.old = values
    losses, norms, sums = [], [], Counter()
    draw = random.Random(f"{config.seed} step {step}")
    for _ in range(config.updates_per_batch):
        order = draw.sample(rows, len(rows)) if config.minibatches > 1 else rows
        for part in range(config.minibatches):
            batch = weighed(order[part :: config.minibatches], config)
            if not batch:
                continue
            loss, grads, more = gradient(model, halves, batch, config)
            grads, norm = optim.clip(grads, config.max_grad_norm)
            training.refuse_nonfinite(loss, norm.item(), step, config, f"max_grad_norm ({config.max_grad_norm:g})")
            optimizer.update(model, grads)
            mx.eval(model.trainable_parameters(), optimizer.state)
            losses.append(loss)
            norms.append(norm.item())
            sums.update(more)
    if not losses:
        return {"optim/updates": 0}
    return {
        "loss": sum(losses) / len(losses),
        "policy/kl_sampler": sums["kl_sampler"] / sums["tokens"],
        "policy/entropy": sums["entropy"] / sums["tokens"],
        "policy/clip_fraction": sums["clip"] / sums["ratios"],
        "policy/kl_old": sums["kl_old"] / sums["tokens"],
        **({"policy/kl_ref": sums["kl_ref"] / sums["tokens"]} if config.kl_coef else {}),
        "optim/updates": len(losses),
        "optim/grad_norm": sum(norms) / len(norms),
        "optim/lr": optimizer.learning_rate.item(),
    }


def reference_of(model: nn.Module, config: GRPOConfig) -> Callable:
    """Return a context in which the model is the reference: its adapter left out, or that of ``reference``."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    if config.reference is None:
        if config.kl_coef and not any(name.endswith("lora_a") for name in trained):
            raise UserError("kl_coef: fully trained layers have no adapter to leave out; pass reference, or kl_coef 0")
        return lambda: adapters.switched_off(model)
    folder = Path(config.reference).expanduser()
    adapters.read_config(folder)
    arrays = mx.load(str(folder / adapters.WEIGHTS))
    if {name: array.shape for name, array in arrays.items()} != {name: trained[name].shape for name in trained}:
        raise UserError(f"{folder}: the reference is not of the layers and rank that are trained here")

    @contextmanager
    def swapped() -> Iterator[None]:
        before = tree_flatten(model.trainable_parameters())
        model.load_weights(list(arrays.items()), strict=False)
        try:
            yield
        finally:
            model.load_weights(before, strict=False)

    return swapped


# ------------------------------------------------------------------------------------------------ problems


def prepare(config: GRPOConfig) -> tuple[Plan, Plan | None, list[str]]:
    """Return what is trained on and what is answered at validations, no problem in both; and notes."""
    held_out = training.held_out_plan(config.model, config.evaluate)
    shared = {name: getattr(config, name) for name in EvalConfig.model_fields if name in GRPOConfig.model_fields}
    planned = _training_plan(EvalConfig(**shared), config)
    asked = {problem.id for problem in held_out.problems} if held_out else set()
    problems = [problem for problem in planned.problems if problem.id.partition("#")[0] not in asked]
    notes = []
    if left_out := len(planned.problems) - len(problems):
        notes.append(f"{left_out} training problems are validation problems and are left out")
    if not problems:
        raise UserError(f"split {config.split}: all its problems are validation problems; choose another part for one")
    return replace(planned, problems=problems), held_out, notes


def _training_plan(settings: EvalConfig, config: GRPOConfig) -> Plan:
    """Load as many problems as will be drawn; all there are, if that is fewer and no number was asked for."""
    wanted = config.limit or config.num_steps * config.prompts_per_step
    try:
        return evaluation.plan(settings.model_copy(update={"limit": wanted}))
    except UserError:
        if config.limit is not None:
            raise
    return evaluation.plan(settings)


def longest_prompt(loaded: LoadedModel, planned: Plan) -> int:
    """Return the most tokens of a prompt; UserError for one that leaves no room for a completion in the context."""
    room, config, longest = loaded.context, planned.config, 0
    for problem in planned.problems:
        length = len(loaded.render(planned.prompt, problem, config.thinking).ids)
        longest = max(longest, length)
        if room is not None and length + config.max_tokens > room:
            raise UserError(
                f"problem {problem.id}: its prompt has {length} tokens; {config.max_tokens} more pass the model's "
                f"context of {room}; lower max_tokens or leave it out of the data"
            )
    return longest


def by_difficulty(loaded: LoadedModel, planned: Plan, config: GRPOConfig, file: Path) -> tuple[Plan, list[str]]:
    """Leave out problems that the model, as it is now, solves too seldom or too often; rates are kept in ``file``."""
    low, high = config.pass_rate_low, config.pass_rate_high
    if (low, high) == (0, 1):
        return planned, []
    if not file.exists():
        groups = sample(loaded, planned, planned.problems, config.probe_samples, training.step_seed(config.seed, 0))
        pairs = [(problem, one) for problem, group in zip(planned.problems, groups, strict=True) for one in group]
        parts = rewards.score(planned, pairs, {}, {"correct": 1.0}, config.tags)
        counts = Counter()
        for (problem, _), part in zip(pairs, parts, strict=True):
            counts[problem.id] += part["correct"]
        rates = {problem.id: counts[problem.id] / config.probe_samples for problem in planned.problems}
        write_atomic(file, to_json(rates))
    rates = read_json(file)
    kept = [problem for problem in planned.problems if low <= rates[problem.id] <= high]
    if not kept:
        raise UserError(f"no problem has a pass rate from {low:g} to {high:g}; widen pass_rate_low and pass_rate_high")
    note = f"{len(planned.problems) - len(kept)} of {len(planned.problems)} problems are too easy or too hard"
    return replace(planned, problems=kept), [note]


# ------------------------------------------------------------------------------------------------ the loop


@dataclass
class Progress(training.Progress):
    """Where a training is, and how many problems were drawn."""

    drawn: int = 0


@dataclass(frozen=True)
class GRPOResult:
    """A finished training: its adapter's folder, steps, the best validation, where it was, and the one at the start."""

    adapter: str
    steps: int
    best_step: int | None
    accuracy: float | None
    accuracy_before: float | None
    seconds: float
    sample_seconds: float
    update_seconds: float
    tokens_per_second: float
    peak_memory_gb: float
    notes: list[str] = field(default_factory=list)


def train(config: GRPOConfig, out: str | Path, resume: bool = False, show: Callable | None = None) -> GRPOResult:
    """Train a model by reinforcement on a task; ``mlx-traces grpo`` from Python.

    The run folder gets ``adapter/`` (the best by held-out accuracy, the last without ``evaluate``), ``metrics.jsonl``,
    ``samples.jsonl``, ``checkpoint.safetensors`` and ``result.json``.

    Args:
        config: the settings.
        out: the run folder.
        resume: continue a run that was cut off; the result is that of an uninterrupted one.
        show: called with each line of metrics and the number of steps.

    Raises:
        UserError: if the input is wrong, a reward fails, or the loss stops being a number: the checkpoint stays.
    """
    folder = RunFolder(Path(out))
    folder.refuse(resume)
    model_name, inner = models.split_adapter(config.model)
    config = config.model_copy(update={"model": model_name, "adapter": config.adapter or inner})
    planned, held_out, notes = prepare(config)
    functions = rewards.load(config.rewards, list(planned.problems[0].columns))
    loaded = models.load(config.model, config.adapter, **config.load_arguments())
    longest = longest_prompt(loaded, planned)
    identity = identity_of(config, planned, loaded)
    folder.check(identity)
    mx.random.seed(config.seed)
    settings = adapters.start(loaded.model, config, config.adapter)
    reference = reference_of(loaded.model, config)
    notes += filter(None, [memory.fits(memory.of_grpo(loaded, config, longest), loaded.backend)])
    folder.begin(identity, {**provenance(), "backend": asdict(loaded.backend), "notes": [*loaded.notes, *notes]})
    planned, more = by_difficulty(loaded, planned, config, folder.path / "pass_rates.json")
    notes += more

    updates = config.num_steps * config.updates_per_batch * config.minibatches
    optimizer = optim.make_optimizer(config, updates)
    progress, checkpoint = Progress(), folder.path / "checkpoint.safetensors"
    if checkpoint.exists():
        progress = Progress(**checkpoints.load(checkpoint, loaded.model, optimizer))
    kept = progress.step if checkpoint.exists() else -1
    metrics = folder.rewind("metrics.jsonl", kept)
    folder.rewind("samples.jsonl", kept)

    def validate() -> dict[str, Any]:
        if held_out is None:
            return {}
        row, shown = training.answer(loaded, held_out)
        if progress.better(row["valid/accuracy"]):
            adapters.save(loaded.model, folder.path / "adapter", settings, about(config))
        folder.log("samples.jsonl", *({"step": progress.step, "kind": "held out", **one} for one in shown))
        return row

    def log(row: dict[str, Any]) -> None:
        row = {"step": progress.step, **row}
        metrics.append(row)
        folder.log("metrics.jsonl", row)
        if show:
            show(row, config.num_steps)

    halves = forward.split(loaded.model)
    device.reset_peak_memory()
    start = perf_counter() - progress.seconds
    if not progress.step and (first := validate()):
        log(first)
    for step in range(progress.step + 1, config.num_steps + 1):
        if config.patience and progress.waited >= config.patience:
            break
        groups, kept_groups, seconds = collect(loaded, planned, functions, progress, step, config)
        began = perf_counter()
        rows = rows_of(kept_groups, config) if kept_groups else []  # resampling may have found none
        with forward.checkpointed(loaded.model.layers, config.checkpoint_layers):
            learned = learn(loaded.model, halves, rows, optimizer, reference, step, config)
        seconds["time/update"] = perf_counter() - began
        progress.step, progress.seconds = step, perf_counter() - start
        row = {
            **figures(groups),
            **learned,
            **seconds,
            "memory/peak_gb": device.peak_memory_gb(),
            "time/total": progress.seconds,
        }
        folder.log(
            "samples.jsonl", *({"step": step, **one} for one in shown_of(groups, planned.task, step, config.seed))
        )
        if step % config.eval_every == 0 or step == config.num_steps:
            row |= validate()
        log(row)
        if step % config.save_every == 0 or step == config.num_steps:
            checkpoints.save(checkpoint, loaded.model, optimizer, asdict(progress))
    if progress.best is None:
        adapters.save(loaded.model, folder.path / "adapter", settings, about(config))
    result = _result(folder, progress, metrics, [*loaded.notes, *notes])
    folder.conclude(asdict(result))
    return result


def collect(
    loaded: LoadedModel,
    planned: Plan,
    functions: Mapping[str, Callable],
    progress: Progress,
    step: int,
    config: GRPOConfig,
) -> tuple[list[Group], list[Group], dict[str, float]]:
    """Sample and score a step's groups, again for those that teach nothing if so set.

    Returns:
        All groups; those to learn from; seconds of sampling and of scoring.
    """
    groups: list[Group] = []
    kept: list[Group] = []
    seconds = {"time/sample": 0.0, "time/reward": 0.0}
    stream = drawn(planned.problems, config.seed, progress.drawn)
    for _ in range(1 + config.max_resamples):
        began = perf_counter()
        problems = [next(stream) for _ in range(config.prompts_per_step - len(kept))]
        first = len(groups) * config.group_size
        seed = training.step_seed(config.seed, step)
        completions = sample(loaded, planned, problems, config.group_size, seed, first)
        sampled = perf_counter()
        groups += scored(planned, problems, completions, functions, config)
        kept = [group for group in groups if informative(group)] if config.max_resamples else groups
        seconds["time/sample"] += sampled - began
        seconds["time/reward"] += perf_counter() - sampled
        if len(kept) == config.prompts_per_step:
            break
    progress.drawn += len(groups)
    return groups, kept, seconds


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """Return metrics of a step's rollouts."""
    rollouts = [rollout for group in groups for rollout in group]
    count = len(rollouts)
    row = {"reward/mean": sum(rollout.reward for rollout in rollouts) / count}
    for name in rollouts[0].parts:
        values = [value for rollout in rollouts if (value := rollout.parts[name]) is not None]
        row[f"reward/{name}"] = sum(values) / len(values) if values else None
    return row | {
        "rollout/length": sum(len(rollout.ids) for rollout in rollouts) / count,
        "rollout/finished": sum(not rollout.cut_off for rollout in rollouts) / count,
        "rollout/zero_std_groups": sum(not informative(group) for group in groups) / len(groups),
        "rollout/groups": len(groups),
        "tokens": sum(len(rollout.ids) for rollout in rollouts),
    }


def shown_of(groups: Sequence[Group], task: Task, step: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the best, the worst and a random rollout of a step as lines of ``samples.jsonl``."""
    rollouts = [rollout for group in groups for rollout in group]
    chosen = {
        "best": max(rollouts, key=lambda rollout: rollout.reward),
        "worst": min(rollouts, key=lambda rollout: rollout.reward),
        "random": random.Random(f"{seed} shown {step}").choice(rollouts),
    }
    for kind, rollout in chosen.items():
        yield {
            "kind": kind,
            "id": rollout.problem.id,
            "question": evaluation.question_of(task, rollout.problem),
            "completion": rollout.completion.rollout.text,
            "finish_reason": rollout.completion.rollout.finish_reason,
            "tokens": len(rollout.ids),
            "reward": rollout.reward,
            "rewards": rollout.parts,
            "gold": rollout.problem.gold,
        }


def identity_of(config: GRPOConfig, planned: Plan, loaded: LoadedModel) -> dict[str, Any]:
    """Everything that decides what is learned; files by their content."""
    return {
        **config.model_dump(mode="json", exclude={"device", "save_every", "memory_limit", "data"}),
        "data_files": training.digest(config.data) if config.data and is_file(config.data) else config.data,
        "prompt": json.loads(json.dumps(asdict(planned.prompt))),
        "model_files": fingerprint(loaded.path),
        "adapter_files": fingerprint(Path(config.adapter)) if config.adapter else None,
        "weights": loaded.backend.weights,
        "dtype": loaded.backend.dtype,
    }


def about(config: GRPOConfig) -> dict[str, Any]:
    """Return what an adapter's settings file says beyond mlx_lm's own entries."""
    return {
        "model": config.model,
        "trained_by": "mlx-traces grpo",
        "training": config.model_dump(mode="json", exclude_unset=True),
    }


def _result(folder: RunFolder, progress: Progress, metrics: list[dict[str, Any]], notes: list[str]) -> GRPOResult:
    rows = [row for row in metrics if "tokens" in row]
    accuracies = {row["step"]: row["valid/accuracy"] for row in metrics if "valid/accuracy" in row}
    sampling, updating = (sum(row[name] for row in rows) for name in ("time/sample", "time/update"))
    if progress.best_step == 0:
        notes = [*notes, "no validation was better than the start; the adapter is the one training began with"]
    return GRPOResult(
        adapter=str(folder.path / "adapter"),
        steps=progress.step,
        best_step=progress.best_step,
        accuracy=accuracies.get(progress.best_step),
        accuracy_before=accuracies.get(0),
        seconds=progress.seconds,
        sample_seconds=sampling,
        update_seconds=updating,
        tokens_per_second=sum(row["tokens"] for row in rows) / (sampling + updating) if sampling else 0.0,
        peak_memory_gb=max((row["memory/peak_gb"] for row in rows), default=0.0),
        notes=notes,
    )
