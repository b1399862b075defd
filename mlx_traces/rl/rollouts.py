"""Rollouts: draw problems, sample and score groups of completions, compute their metrics.

Shared by GRPO and PPO; each computes its own advantages from the rewards.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_traces.config import EvalConfig, RLConfig
from mlx_traces.engine.batching import Example
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator, local
from mlx_traces.evaluation.completion import Completion
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.readers import read_json
from mlx_traces.records import Problem
from mlx_traces.rl import losses, rewards, steps
from mlx_traces.rl.steps import Located
from mlx_traces.runtime import distributed
from mlx_traces.runtime.files import on_the_way, to_json, write_atomic
from mlx_traces.tasks import Task
from mlx_traces.traces import filtering
from mlx_traces.train import loop


@dataclass(frozen=True)
class ScoredCompletion:
    """A sampled completion with its rewards: ``parts`` by name, ``reward`` their weighted sum, None if none applies.

    ``steps`` are the spans to which a reward gave values of their own.
    """

    problem: Problem
    completion: Completion
    parts: dict[str, float | None]
    reward: float | None
    steps: Located = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The exact sampled ids, the stop token included."""
        return self.completion.rollout.completion_ids

    @cached_property
    def drawn(self) -> np.ndarray:
        """(T,) bool: true for the tokens that the policy drew, false for those inserted to bound the thought."""
        found = np.ones(len(self.ids), bool)
        found[list(self.completion.rollout.forced)] = False
        return found

    @property
    def sampler(self) -> np.ndarray:
        """The log-probabilities of the drawn tokens under the sampling distribution, in float32."""
        return np.array(self.completion.rollout.logprobs, np.float32)[self.drawn]

    def example(self, learned: bool = True) -> Example:
        """Return prompt and completion as an example whose drawn tokens are trained on, or none if not ``learned``."""
        prompt = self.completion.rollout.prompt_ids
        return Example(self.problem.id, prompt + self.ids, (False,) * len(prompt) + (*(self.drawn & learned).tolist(),))

    @property
    def cut_off(self) -> bool:
        """Whether the token limit ended it."""
        return self.completion.rollout.finish_reason == "length"


Group = list[ScoredCompletion]


@dataclass
class Row:
    """What a scored completion is trained with; arrays have one float32 for each drawn token.

    ``sampler``, ``old`` and ``reference`` are log-probabilities: of sampling, of the policy before the step's first
    update (if the algorithm needs them), and of the reference (if there is one). ``advantage`` is one number for all
    tokens, or an array; ``weights`` are the tokens' weights in the loss. PPO also has the ``reward``, the weighted
    ``credit`` of steps, the value head's ``values`` before the first update, and the ``returns``, its targets.
    """

    example: Example
    sampler: np.ndarray
    advantage: float | np.ndarray = 0.0
    reward: float = 0.0
    weights: np.ndarray | None = None
    old: np.ndarray | None = None
    reference: np.ndarray | None = None
    values: np.ndarray | None = None
    returns: np.ndarray | None = None
    credit: np.ndarray | None = None


@dataclass
class Progress(loop.Progress):
    """Progress of a training, with the number of problems drawn so far."""

    drawn: int = 0


def sample(
    loaded: LoadedModel, planned: Plan, problems: Sequence[Problem], size: int, seed: int, first: int = 0
) -> list[list[Completion]]:
    """Sample ``size`` completions of each problem. Each depends on ``seed`` and its number, counted from ``first``."""
    planned = replace(planned, config=planned.config.model_copy(update={"seed": seed}))
    numbers = iter(range(first, first + size * len(problems)))
    todo = [(problem, next(numbers)) for problem in problems for _ in range(size)]
    done: list[Any] = [None] * len(todo)
    loaded.model.eval()
    with adapters.merged(loaded.model, loaded.backend):
        for index, completion in local.completions_of(loaded, planned, logprobs=True)(todo):
            done[index] = completion
    return [done[at : at + size] for at in range(0, len(done), size)]


def scored(
    loaded: LoadedModel,
    planned: Plan,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Completion]],
    functions: Mapping[str, Callable],
    config: RLConfig,
) -> list[Group]:
    """Score every completion; return the groups, each of ``group_size`` scored completions."""
    pairs = [(problem, one) for problem, group in zip(problems, groups, strict=True) for one in group]
    # Only on the first rank: a reward may differ from call to call, and all ranks must use the same values.
    first = rewards.score(planned, pairs, functions, config.rewards, config.tags) if distributed.first() else []
    apart = distributed.gather([rewards.apart(one) for one in first])
    parts, spans = [part for part, _ in apart], [rows for _, rows in apart]
    places = steps.located(loaded, [completion for _, completion in pairs], spans)
    totals = totals_of(parts, [one for _, one in pairs], config)
    found = zip(pairs, parts, totals, places, strict=True)
    rollouts = [ScoredCompletion(*pair, part, value, own) for pair, part, value, own in found]
    return [rollouts[at : at + config.group_size] for at in range(0, len(rollouts), config.group_size)]


def totals_of(
    parts: Sequence[dict[str, float | None]], completions: Sequence[Completion], config: RLConfig
) -> list[float | None]:
    """Return each completion's reward, None where none applies. A penalty for length is added to its parts too.

    A completion that was cut off has the whole penalty: with a budget of thought it can be shorter than the limit.
    """
    totals = [rewards.total(part, config.rewards) for part in parts]
    if config.overlong == "penalty":
        slope = min(config.overlong_tokens, config.longest)
        lengths = mx.array([one.tokens for one in completions])
        cut_off = mx.array([one.finish_reason == "length" for one in completions])
        penalties = mx.where(cut_off, -1, losses.overlong_penalty(lengths, config.longest, slope)).tolist()
        for part, penalty in zip(parts, penalties, strict=True):
            part["overlong"] = penalty
        totals = [None if value is None else value + penalty for value, penalty in zip(totals, penalties, strict=True)]
    return totals


def informative(group: Group) -> bool:
    """Whether a group's rewards differ; if not, its advantages against the group's mean are all 0."""
    return len({rollout.reward for rollout in group} - {None}) > 1


def steps_of(group: Group) -> list[Located]:
    """Return the steps of each completion of a group; none for one without a reward, which teaches nothing."""
    return [() if rollout.reward is None else rollout.steps for rollout in group]


def drawn(pool: Sequence[Problem], seed: int, start: int) -> Iterator[Problem]:
    """Yield problems endlessly, the first ``start`` left out; each pass over the pool has its own random order."""
    epoch, place = divmod(start, len(pool))
    while True:
        order = list(pool)
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        yield from order[place:]
        epoch, place = epoch + 1, 0


# ------------------------------------------------------------------------------------------------ problems


def prepare(config: RLConfig) -> tuple[Plan, Plan | None, list[str]]:
    """Return the plan of the training, that of the validations (or None), and notes; no problem is in both plans."""
    held_out = loop.held_out_plan(config.model, config)
    shared = {name: getattr(config, name) for name in EvalConfig.model_fields if name in RLConfig.model_fields}
    planned = _training_plan(EvalConfig(**shared), config)
    notes = [*evaluator.split_notes(config), *(evaluator.split_notes(config.evaluate) if config.evaluate else [])]
    same = filtering.same_problem(held_out.problems, held_out.prompt) if held_out else lambda _: False
    problems = [problem for problem in planned.problems if not same(problem)]
    left_out = len(planned.problems) - len(problems)
    if left_out and config.limit is None:  # replace them, as far as there are others
        more = _training_plan(EvalConfig(**shared), config, len(held_out.problems)).problems
        problems = [problem for problem in more if not same(problem)][: len(planned.problems)]
    if left_out:
        notes.append(f"{left_out} training problems are validation problems and are left out")
    if not problems:
        raise UserError(
            f"split {config.split}: all its problems are validation problems; change split, here or in evaluate"
        )
    return replace(planned, problems=problems), held_out, notes


def _training_plan(settings: EvalConfig, config: RLConfig, more: int = 0) -> Plan:
    """Load as many problems as may be drawn, and ``more``; all problems if there are fewer and no limit was set."""
    rounds = 1 + getattr(config, "max_resamples", 0)
    wanted = config.limit or config.num_steps * config.prompts_per_step * rounds + more
    try:
        return evaluator.plan(settings.model_copy(update={"limit": wanted}))
    except UserError:
        if config.limit is not None:
            raise
    return evaluator.plan(settings)


def longest_prompt(loaded: LoadedModel, planned: Plan) -> int:
    """Return the longest prompt's tokens; UserError if a prompt and a completion do not fit in the context."""
    room, config, longest = loaded.context, planned.config, 0
    for problem in planned.problems:
        length = len(loaded.render(planned.prompt, problem, config.thinking).ids)
        longest = max(longest, length)
        if room is not None and length + config.longest > room:
            raise UserError(
                f"problem {problem.id}: its prompt has {length} tokens; {config.longest} more exceed the model's "
                f"context of {room}; lower max_tokens or leave it out of the data"
            )
    return longest


def by_difficulty(loaded: LoadedModel, planned: Plan, config: RLConfig, file: Path) -> tuple[Plan, list[str]]:
    """Leave out problems whose pass rate is outside the range; return notes. ``file`` keeps the measured rates."""
    low, high = config.pass_rate_low, config.pass_rate_high
    if (low, high) == (0, 1):
        return planned, []
    if not file.exists():
        groups = sample(loaded, planned, planned.problems, config.probe_samples, loop.step_seed(config.seed, 0))
        pairs = [(problem, one) for problem, group in zip(planned.problems, groups, strict=True) for one in group]
        parts = rewards.score(planned, pairs, {}, {"correct": 1.0}, config.tags)
        counts = Counter()
        for (problem, _), part in zip(pairs, parts, strict=True):
            counts[problem.id] += part["correct"]
        rates = {problem.id: counts[problem.id] / config.probe_samples for problem in planned.problems}
        with on_the_way(file):
            write_atomic(file, to_json(rates))
    rates = read_json(file)
    kept = [problem for problem in planned.problems if low <= rates[problem.id] <= high]
    if not kept:
        raise UserError(f"no problem has a pass rate from {low:g} to {high:g}; widen pass_rate_low and pass_rate_high")
    note = f"{len(planned.problems) - len(kept)} of {len(planned.problems)} problems are too easy or too hard"
    return replace(planned, problems=kept), [note]


# ------------------------------------------------------------------------------------------------ a step


def collect(
    loaded: LoadedModel,
    planned: Plan,
    functions: Mapping[str, Callable],
    progress: Progress,
    step: int,
    config: RLConfig,
    resamples: int = 0,
) -> tuple[list[Group], list[Group], dict[str, float]]:
    """Sample and score a step's groups; replace groups of equal reward, in up to ``resamples`` more rounds.

    Returns:
        All groups; those to learn from; seconds of sampling and of scoring.
    """
    groups: list[Group] = []
    kept: list[Group] = []
    seconds = {"time/sample": 0.0, "time/reward": 0.0}
    stream = drawn(planned.problems, config.seed, progress.drawn)
    for _ in range(1 + resamples):
        began = perf_counter()
        problems = [next(stream) for _ in range(config.prompts_per_step - len(kept))]
        first = len(groups) * config.group_size
        seed = loop.step_seed(config.seed, step)
        completions = sample(loaded, planned, problems, config.group_size, seed, first)
        sampled = perf_counter()
        groups += scored(loaded, planned, problems, completions, functions, config)
        kept = groups
        if resamples:
            kept = [one for one in groups if informative(one) or (config.step_weight and steps.differ(steps_of(one)))]
        seconds["time/sample"] += sampled - began
        seconds["time/reward"] += perf_counter() - sampled
        if len(kept) == config.prompts_per_step:
            break
    progress.drawn += len(groups)
    return groups, kept, seconds


def figures(groups: Sequence[Group], bounded: bool = False) -> dict[str, float]:
    """Return metrics of a step's rollouts, ``rollout/forced`` among them if the thoughts are ``bounded``."""
    rollouts = [rollout for group in groups for rollout in group]
    count = len(rollouts)
    named = [("mean", [rollout.reward for rollout in rollouts])]
    named += [(name, [rollout.parts[name] for rollout in rollouts]) for name in rollouts[0].parts]
    row = {}
    for name, values in named:
        applied = [value for value in values if value is not None]
        row[f"reward/{name}"] = sum(applied) / len(applied) if applied else None
    row |= steps.figures([rollout.steps for rollout in rollouts])
    if bounded:
        row["rollout/forced"] = sum(not rollout.drawn.all() for rollout in rollouts) / count
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
    rewarded = [rollout for rollout in rollouts if rollout.reward is not None] or rollouts[:1]
    chosen = {
        "best": max(rewarded, key=lambda rollout: rollout.reward),
        "worst": min(rewarded, key=lambda rollout: rollout.reward),
        "random": random.Random(f"{seed} shown {step}").choice(rollouts),
    }
    for kind, rollout in chosen.items():
        yield {
            "kind": kind,
            "id": rollout.problem.id,
            "question": evaluator.question_of(task, rollout.problem),
            "completion": rollout.completion.rollout.text,
            "finish_reason": rollout.completion.rollout.finish_reason,
            "tokens": len(rollout.ids),
            **({"forced": spans} if (spans := rollout.completion.rollout.forced_text) else {}),
            "reward": rollout.reward,
            "rewards": rollout.parts,
            **({"steps": [step[:4] for step in rollout.steps]} if rollout.steps else {}),
            "gold": rollout.problem.gold,
        }
