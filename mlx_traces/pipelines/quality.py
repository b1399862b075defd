"""The quality of stored answers: the scores of `traces.quality` and a training's reward, paired on the same problems.

They are computed from stored samples; nothing is generated. MLX is loaded only for a reward, perplexity and a judge.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_traces.config import RLConfig, ScoreConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, stats, variance
from mlx_traces.evaluation.comparison import Run
from mlx_traces.evaluation.completion import Completion
from mlx_traces.pipelines import verify
from mlx_traces.records import Problem, Rollout, Trace
from mlx_traces.tasks import Task, get_task, is_known
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.tasks.thoughts import parts
from mlx_traces.traces import score
from mlx_traces.traces.equations import equations
from mlx_traces.traces.quality import last_turn, own_words, text_scores

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("format", "structure", "faithfulness", "repetition", "tokens")
RESAMPLES = 2_000  # per bootstrap; few, as a row needs ten, and distinct values make them slow

Scores = Mapping[str, float | None]


def compare_quality(
    runs: Sequence[Run], config: ScoreConfig, pairs: Sequence[tuple[int, int]], recipe: RLConfig | None = None
) -> pd.DataFrame:
    """Score the answers of runs, and compare the runs of each pair on the problems where both have a value.

    Every figure is a mean over problems, of all answers and of the correct ones alone; the value of a problem is the
    mean of its answers. The interval is the paired bootstrap's with 2,000 resamples, the p-value that of the exact
    sign-flip test (`stats.sign_flip_of_reals`), Holm's adjustment covers all differences of one kind of
    ``answers``. With clusters of problems the interval is that of `variance.estimate`, and the test is on the clusters'
    sums. The answers of several trainings of a recipe are pooled, and nothing allows for the variance between these.

    Args:
        runs: runs over the same problems.
        config: tags, and the models for perplexity and judge; without these models the two scores are left out.
        pairs: (later, earlier) indices of the runs to compare; a run without a pair has only its means.
        recipe: a training whose reward, as that of a rollout, is one more measure: ``reward``.

    Returns:
        One row for each run or pair, kind of ``answers`` (``all`` or ``correct``) and ``measure``: ``run``, ``label``,
        ``against`` (the earlier run's label, or None), ``mean`` of the run over ``problems`` with its interval from
        ``mean_low`` to ``mean_high``; ``diff``, ``diff_low``, ``diff_high``, ``p_value`` and ``p_holm`` over ``paired``
        problems. NaN where there is no value, and no differences where all values are in one cluster.
        ``attrs["clusters"]`` and ``attrs["pooled"]`` say whether there are clusters and pooled trainings.

    Raises:
        UserError: if a model cannot be loaded, or too many of the judge's replies cannot be read; as `rewards_of`.
    """
    extra = (("perplexity", config.model), ("judge", config.judge), ("reward", recipe))
    measures = [*MEASURES, *(name for name, asked in extra if asked)]
    names, scores = comparison.labels(runs), scores_of(runs, config)
    if recipe:
        rewarded = rewards_of(runs, recipe)
        scores = [
            [{**one, "reward": r} for one, r in zip(*own, strict=True)] for own in zip(scores, rewarded, strict=True)
        ]
    clusters = runs[0].clusters
    alone = [(place, None) for place in range(len(runs)) if place not in {later for later, _ in pairs}]
    rows: list[dict[str, Any]] = []
    for answers in ("all", "correct"):
        found = [
            {name: by_problem(run, own, name, answers == "correct") for name in measures}
            for run, own in zip(runs, scores, strict=True)
        ]
        block = [
            {
                "run": runs[place].name,
                "label": names[place],
                "against": None if base is None else names[base],
                "answers": answers,
                "measure": name,
                **averaged(own := found[place][name], clusters),
                "problems": len(own),
                **tested(own, {} if base is None else found[base][name], clusters),
            }
            for place, base in sorted([*alone, *pairs], key=lambda pair: pair[0])
            for name in measures
        ]
        known = [row for row in block if row["paired"]]
        for row, adjusted in zip(known, stats.holm([row["p_value"] for row in known]), strict=True):
            row["p_holm"] = adjusted
        rows += block
    table = comparison.frame(rows)
    table.attrs |= {"clusters": bool(clusters), "pooled": any(run.trainings > 1 for run in runs)}
    return table


def averaged(values: Mapping[str, float], clusters: Mapping[str, str]) -> dict[str, float]:
    """Return the mean of a run's values with its interval; NaN without any."""
    figures = change_of(values, dict.fromkeys(values, 0.0), clusters)
    return dict(zip(("mean", "mean_low", "mean_high"), figures, strict=True))


def tested(own: Mapping[str, float], other: Mapping[str, float], clusters: Mapping[str, str]) -> dict[str, float | int]:
    """Compare two runs' values on the problems where both have one; ``clusters`` may be empty."""
    shared = [name for name in own if name in other]
    figures = dict.fromkeys(("diff", "diff_low", "diff_high", "p_value", "p_holm"), math.nan) | {"paired": 0}
    low = (change := change_of({name: own[name] for name in shared}, other, clusters))[1]
    if math.isnan(low):
        return figures
    sums: dict[str, float] = defaultdict(float)
    for name in shared:
        sums[clusters.get(name, name)] += own[name] - other[name]
    figures |= zip(("diff", "diff_low", "diff_high"), change, strict=True)
    return figures | {"p_value": stats.sign_flip_of_reals([*sums.values()]), "paired": len(shared)}


def change_of(
    own: Mapping[str, float], other: Mapping[str, float], clusters: Mapping[str, str]
) -> tuple[float, float, float]:
    """Return the mean difference on the problems of ``own`` with its interval; NaN without problems."""
    if not own:
        return (math.nan,) * 3
    a, b = np.array([*own.values()]), np.array([other[name] for name in own])
    if not clusters:
        return stats.paired_bootstrap(a, b, resamples=RESAMPLES)
    groups = [clusters[name] for name in own]
    if len(set(groups)) < 2:
        return float((a - b).mean()), math.nan, math.nan
    found = variance.estimate(a[None], b[None], groups)
    return found.mean, *found.interval()


def by_problem(run: Run, scores: Sequence[Scores], measure: str, correct_only: bool) -> dict[str, float]:
    """Return the mean of a measure over each problem's answers; problems without a value are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for row, own in zip(run.samples, scores, strict=True):
        if own[measure] is not None and (row["correct"] or not correct_only):
            found[row["id"]].append(own[measure])
    return {name: sum(values) / len(values) for name, values in found.items()}


def scores_of(runs: Sequence[Run], config: ScoreConfig) -> list[list[Scores]]:
    """Return the scores of each sample of each run, by name; each model is loaded once."""
    answers = [answer for run in runs for answer in answers_of(run)]
    traces, problems = [trace for trace, _ in answers], [problem for _, problem in answers]
    by_models = iter(score.model_scores(traces, problems, config, {}))
    own = iter(traces)
    return [[text_scores_of(row, next(own), config) | next(by_models) for row in run.samples] for run in runs]


def rewards_of(runs: Sequence[Run], recipe: RLConfig) -> list[list[float | None]]:
    """Return the reward that a training would give each sample of each run; None where none applies.

    A penalty for length uses the training's limit, not the evaluation's; an answer that was cut off has all of it.

    Raises:
        UserError: if a reward needs what samples do not have (ids of tokens, a column), or cannot be loaded; if a
            run's problems cannot be rebuilt.
    """
    from mlx_traces.rl import rewards, rollouts  # needs MLX

    functions: dict[str, Callable] | None = None
    found = []
    for run in runs:
        planned = verify.plan_of(Path(run.name), run.about.get("identity") or {}, run.result)
        if planned.task.name != get_task(recipe.task).name:
            raise UserError(
                f"rewards: the configuration is for {recipe.task}, and {run.name} is of {planned.task.name}; name "
                "one of its task"
            )
        planned = replace(planned, config=recipe, extractor=recipe.extractor or planned.task.extractors[0])
        own_tags = tags if verify.is_pair(tags := run.about.get("own_tags")) else None
        pairs = []
        for row in run.samples:
            problem = verify.problem_of(planned.task, row, run.name)
            ids = (0,) * (row.get("tokens") or 0)  # their number alone counts
            rollout = Rollout((), ids, row["completion"], row["finish_reason"])
            pairs.append((problem, Completion.sampled(row["prompt"], row.get("opened") or "", rollout, own_tags)))
        if functions is None:
            functions = rewards.load(recipe.rewards, list(pairs[0][0].columns), recipe, planned.prompt, planned.task)
            for name, function in functions.items():
                if name != "judge" and "completion_ids" in signature(function).parameters:
                    raise UserError(f"reward {name}: takes completion_ids, which samples do not have; leave it out")
        parts = [rewards.apart(one)[0] for one in rewards.score(planned, pairs, functions, recipe.rewards, recipe.tags)]
        found.append(rollouts.totals_of(parts, [one for _, one in pairs], recipe))
    return found


def true_equations(run: Run) -> float:
    """Return the share of the equations in a run's thoughts that are true, by exact computation; NaN without any."""
    thoughts = (parts(row.get("opened", "") + row["completion"])[0] for row in run.samples)
    verdicts = [true for thought in thoughts if thought for true in equations(thought)]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


def text_scores_of(row: Mapping[str, Any], trace: Trace, config: ScoreConfig) -> dict[str, float | None]:
    """Return the scores of a sample's text, and its length in tokens."""
    tokens = row.get("tokens")
    return text_scores(own_words(trace), trace.finish_reason, tokens, config, last_turn(trace)) | {"tokens": tokens}


def answers_of(run: Run) -> list[tuple[Trace, Problem | None]]:
    """Return a run's samples as traces, each with its problem.

    Without the task's code, and in runs of earlier versions, the prompt cannot be rebuilt: the turn is then the
    question alone, and the problem None.
    """
    identity, name = run.about.get("identity") or {}, run.result.get("task")
    task = get_task(name) if is_known(name) else None
    try:
        prompt = Prompt(**identity["prompt"]) if task else None
    except (KeyError, TypeError):
        prompt = None
    return [_answer(run, row, task, prompt, identity) for row in run.samples]


def _answer(
    run: Run, row: Mapping[str, Any], task: Task | None, prompt: Prompt | None, identity: Mapping[str, Any]
) -> tuple[Trace, Problem | None]:
    problem, opened = None, row.get("opened")
    turns = [{"role": "user", "content": row.get("question", "")}]
    own_tags = tags if verify.is_pair(tags := run.about.get("own_tags")) else None
    if task and prompt:
        try:
            problem = verify.problem_of(task, row, run.name)
            turns = prompt.messages(problem)
        except UserError:
            problem = None
        if opened is None and problem:
            opened = verify.opened_of(prompt, problem, row.get("prompt", ""), (own_tags or ())[:1])
    said = Rollout((), (), row.get("completion", ""), "", forced_text=tuple(map(tuple, row.get("forced") or ())))
    answer = Completion.sampled(row.get("prompt", ""), opened or "", said, own_tags)
    trace = Trace(
        id=row["id"],
        messages=tuple(turns),
        completion=answer.whole,
        forced_text=answer.forced or None,
        task=task.name if task else "",
        prompt=prompt.name if prompt else "",
        sample=row.get("sample", 0),
        finish_reason=row.get("finish_reason"),
        thinking=identity.get("thinking"),
        template_args=identity.get("template_args") or {},
    )
    return trace, problem
