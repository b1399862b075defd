"""A reinforcement run: rollouts, an algorithm's update, held-out accuracy, the best adapter; resumable at any moment.

The algorithms (`grpo`, `ppo`) define the update from a step's groups of rollouts; the rest of a run is here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_traces.config import RLConfig
from mlx_traces.engine import logprobs
from mlx_traces.errors import UserError
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.models import adapters, loading, names
from mlx_traces.models.loading import LoadedModel
from mlx_traces.readers import is_file
from mlx_traces.rl import rewards, rollouts
from mlx_traces.rl.rollouts import Group
from mlx_traces.runtime import device, distributed
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.runtime.provenance import fingerprint, provenance, settled
from mlx_traces.runtime.run_folder import RunFolder, whole_lines
from mlx_traces.train import checkpoints, loop, memory, tracking

NOT_IDENTITY = ("rows", "memory_limit", "data", "judge_cache")  # or by their content


class Learner(Protocol):
    """An algorithm at work on a model that has its adapter on.

    ``module`` holds everything that is trained, ``optimizer`` is its optimizer; a checkpoint keeps both. ``halves`` is
    the model's `Split`, which also holds the memory limit. ``resamples`` is how often problems may be drawn again to
    replace groups of equal reward.
    """

    module: nn.Module
    halves: logprobs.Split
    optimizer: Any
    resamples: int

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update the module by a step's groups; return metrics.

        Raises:
            UserError: if the loss or the gradient is not finite; this update is not made.
        """


@dataclass(frozen=True)
class Result:
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


def train(
    name: str,
    config: RLConfig,
    out: str | Path,
    make_learner: Callable[[LoadedModel, Any], Learner],
    resume: bool = False,
    show: Callable | None = None,
) -> Result:
    """Train a model by reinforcement on a task.

    The run folder gets ``adapter/`` (the best by held-out accuracy, the last without ``evaluate``), ``metrics.jsonl``,
    ``samples.jsonl``, ``checkpoint.safetensors`` and ``result.json``.

    Args:
        name: of the algorithm, for the adapter's settings file.
        config: the settings.
        out: the run folder.
        make_learner: takes the model, its adapter on, and the settings.
        resume: continue a run that was cut off; the result is that of an uninterrupted one.
        show: called with each line of metrics and the number of steps.

    Raises:
        UserError: if the input is wrong, a reward fails, or the loss stops being a number: the checkpoint stays.
        Stopped: after Ctrl-C, when a step is done and its checkpoint written.
    """
    with (
        distributed.at_work(Path(out), resume) as (folder, stop),
        tracking.reported(config, folder, show) as show,
    ):
        return _train(name, config, folder, make_learner, stop, show)


def _train(
    name: str,
    config: RLConfig,
    folder: RunFolder,
    make_learner: Callable[[LoadedModel, Any], Learner],
    stop: Callable[[], bool],
    show: Callable | None,
) -> Result:
    config = with_reference(names.with_adapter(config), folder.identity)
    config = loading.of_its_day(config, folder.identity)
    planned, held_out, notes = rollouts.prepare(config)
    functions = rewards.load(config.rewards, list(planned.problems[0].columns), config)
    loaded = loading.load(config.model, config.adapter, **config.load_arguments())
    longest = rollouts.longest_prompt(loaded, planned)
    identity = identity_of(config, planned, loaded, functions)
    identity |= {"shown": planned.shown(), "held_out": held_out and held_out.shown()}
    folder.check(identity)
    mx.random.seed(config.seed)
    settings = adapters.start(loaded.model, config, config.adapter)
    learner = make_learner(loaded, config)
    notes += filter(None, [memory.fits(memory.of_reinforcement(loaded, config, longest), loaded.backend)])
    ran = {"backend": asdict(loaded.backend), "ranks": distributed.world().size(), "notes": [*loaded.notes, *notes]}
    asked = {"problems": [problem.id for problem in planned.problems]}
    asked["held_out"] = [problem.id for problem in held_out.problems] if held_out else []
    read = settled(config.model_dump(mode="json"), loaded.path, config.adapter, **asked)
    folder.begin(identity, {**provenance(), **read, **ran})
    planned, more = rollouts.by_difficulty(loaded, planned, config, folder.path / "pass_rates.json")
    notes += more

    progress, checkpoint = rollouts.Progress(), folder.path / "checkpoint.safetensors"
    if checkpoint.exists():
        progress = rollouts.Progress(**checkpoints.load(checkpoint, learner.module, learner.optimizer))
    kept = progress.step if checkpoint.exists() else -1
    for file in ("metrics.jsonl", "samples.jsonl"):
        folder.rewind(file, kept)

    def validate() -> dict[str, Any]:
        if held_out is None:
            return {}
        row, shown = loop.answer(loaded, held_out)
        if progress.better(row["valid/accuracy"]):
            loop.keep(loaded, folder, settings, about(name, config), {"step": progress.step, **row})
        folder.log("samples.jsonl", *({"step": progress.step, "kind": "held out", **one} for one in shown))
        return row

    def log(row: dict[str, Any]) -> None:
        row = {"step": progress.step, **row}
        folder.log("metrics.jsonl", row)
        if show:
            show(row, config.num_steps)

    device.reset_peak_memory()
    start = perf_counter() - progress.seconds
    if not progress.step and (first := validate()):
        log(first)
    for step in range(progress.step + 1, config.num_steps + 1):
        if config.patience and progress.waited >= config.patience:
            break
        groups, kept_groups, seconds = rollouts.collect(
            loaded, planned, functions, progress, step, config, learner.resamples
        )
        began = perf_counter()
        learned = learner.learn(kept_groups, step)
        _refuse_broken(loaded, step, config)
        seconds["time/update"] = perf_counter() - began
        progress.step, progress.seconds = step, perf_counter() - start
        row = {
            **rollouts.figures(groups),
            **learned,
            **seconds,
            "memory/peak_gb": device.peak_memory_gb(),
            "time/total": progress.seconds,
            **learner.halves.room.metrics(),
        }
        folder.log(
            "samples.jsonl",
            *({"step": step, **one} for one in rollouts.shown_of(groups, planned.task, step, config.seed)),
        )
        if step % config.eval_every == 0 or step == config.num_steps:
            row |= validate()
        log(row)
        stopping = stop() and step < config.num_steps
        if step % config.save_every == 0 or step == config.num_steps or stopping:
            checkpoints.save(checkpoint, learner.module, learner.optimizer, asdict(progress))
        if stopping:
            raise Stopped(f"stopped after step {step} of {config.num_steps}")
    if progress.best is None:
        loop.keep(loaded, folder, settings, about(name, config))
    result = _result(folder, progress, [*loaded.notes, *learner.halves.room.notes, *notes])
    folder.conclude(asdict(result))
    return result


def _refuse_broken(loaded: LoadedModel, step: int, config: RLConfig) -> None:
    """Raise UserError, before anything is saved, if the model's outputs are not finite; a loss need not show it."""
    if not mx.isfinite(loaded.model(mx.array([[0, 1, 2]]))).all().item():
        raise UserError(
            f"step {step}: the model's outputs are no longer finite numbers; nothing was overwritten. "
            f"Lower learning_rate ({config.learning_rate:g})"
        )


def with_reference(config: RLConfig, begun: Mapping[str, Any]) -> RLConfig:
    """Return settings that name the reference: by default the adapter that training starts from, else None, the base.

    ``begun`` is the identity of the run that is continued, if any. In earlier versions None meant the base even with an
    adapter; runs that began that way continue that way.
    """
    if not config.kl_coef:
        return config
    reference = config.reference
    if reference in (None, adapters.BASE):
        was_base = begun.get("reference", "") is None
        reference = None if was_base or not config.adapter else reference or config.adapter
    return config if reference == config.reference else config.model_copy(update={"reference": reference})


def identity_of(
    config: RLConfig, planned: Plan, loaded: LoadedModel, functions: Mapping[str, Callable]
) -> dict[str, Any]:
    """Everything that decides what is learned; files by their content, those of the rewards' functions too."""
    own = {name: rewards.sources(name, function) for name, function in functions.items() if ":" in name}
    return {
        **loop.identity_of(config, *NOT_IDENTITY),
        **({"judge_files": functions["judge"].identity} if "judge" in functions else {}),
        "data_files": loop.digest(config.data) if config.data and is_file(config.data) else config.data,
        "prompt": json.loads(json.dumps(asdict(planned.prompt))),
        **loaded.shown(),
        "model_files": fingerprint(loaded.path),
        "adapter_files": fingerprint(Path(config.adapter)) if config.adapter else None,
        "weights": loaded.backend.weights,
        "dtype": loaded.backend.dtype,
        **{f"reward {name}": ", ".join(f"{file.name} {loop.digest(file)}" for file in own[name]) for name in own},
    }


def about(name: str, config: RLConfig) -> dict[str, Any]:
    """Return what an adapter's settings file says beyond mlx_lm's own entries."""
    return {
        "model": config.model,
        "trained_by": f"mlx-traces {name}",
        "training": config.model_dump(mode="json", exclude_unset=True, exclude={"report_to"}),
    }


def _result(folder: RunFolder, progress: rollouts.Progress, notes: list[str]) -> Result:
    metrics = whole_lines(folder.path / "metrics.jsonl", ("step",))
    rows = [row for row in metrics if "tokens" in row]
    accuracies = {row["step"]: row["valid/accuracy"] for row in metrics if "valid/accuracy" in row}
    sampling, updating = (sum(row[name] for row in rows) for name in ("time/sample", "time/update"))
    if rows and not any(row.get("optim/updates") for row in rows):
        notes = [*notes, "no step had anything to learn from; see rollout/zero_std_groups: the adapter is as it began"]
    if progress.best_step == 0:
        notes = [*notes, "no validation was better than the start; the adapter is the one training began with"]
    return Result(
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
