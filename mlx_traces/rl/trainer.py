"""What GRPO and PPO share: a run's model, problems and rewards; rollouts; log, validation, checkpoints.

``grpo`` and ``ppo`` own their loops and call this before, between and after the steps.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_traces.config import RLConfig
from mlx_traces.engine import logprobs
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.models import adapters, loading, names
from mlx_traces.models.loading import LoadedModel
from mlx_traces.readers import is_file
from mlx_traces.rl import rewards, rollouts
from mlx_traces.rl.rollouts import Group
from mlx_traces.runtime import device, distributed
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.train import loop, memory, tracking


@dataclass
class Learner:
    """The module that an algorithm trains, and its optimizer; a checkpoint holds both.

    ``split`` is the model's trunk and head; inside the context ``reference()`` the model is the KL term's reference.
    """

    module: nn.Module
    split: logprobs.Split
    optimizer: Any
    reference: Callable


@dataclass(frozen=True)
class Result:
    """A finished training: its adapter's folder, steps, the best validation and its step, accuracy before training.

    ``stopped`` is ``patience`` if that ended the training early.
    """

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
    stopped: str | None = None


class Run(loop.Training):
    """A training whose steps draw problems, sample rollouts, and score them.

    Args:
        setup: from `opened`.
        learner: what the algorithm trains.
    """

    def __init__(self, setup: "Setup", learner: Learner) -> None:
        self.setup, config, folder, loaded = setup, setup.config, setup.folder, setup.loaded
        setup.begin()
        self.planned, more = rollouts.by_difficulty(loaded, setup.planned, config, folder.path / "pass_rates.json")
        self.notes = [*setup.notes, *more]
        super().__init__(
            folder,
            loaded,
            config,
            module=learner.module,
            optimizer=learner.optimizer,
            room=learner.split.room,
            adapter=setup.adapter,
            about=about(setup.name, config),
            last=config.num_steps,
            every=config.eval_every,
            validate=self._answered,
            progress=rollouts.Progress(),
            stop=setup.stop,
            show=setup.show,
        )

    def collect(self, step: int, resamples: int = 0) -> tuple[list[Group], list[Group]]:
        """Return a step's groups of scored completions, and those to learn from; see `rollouts.collect`."""
        functions, progress = self.setup.functions, self.progress
        groups, kept, self.seconds = rollouts.collect(
            self.loaded, self.planned, functions, progress, step, self.config, resamples
        )
        self.collected = perf_counter()
        return groups, kept

    def end_step(self, step: int, groups: Sequence[Group], learned: Mapping[str, Any]) -> None:
        """Log, validate and save as `Training.end_step` does, with the metrics and samples of the step's rollouts."""
        seconds = {**self.seconds, "time/update": perf_counter() - self.collected}
        shown = rollouts.shown_of(groups, self.planned.task, step, self.config.seed)
        metrics = rollouts.figures(groups, self.config.bounded)
        super().end_step(step, {**metrics, **learned, **seconds}, shown)

    def result(self) -> Result:
        """End the training; write ``result.json`` and return its content."""
        metrics, progress = self.end(), self.progress
        rows = [row for row in metrics if "tokens" in row]
        accuracies = {row["step"]: row["valid/accuracy"] for row in metrics if "valid/accuracy" in row}
        sampling, updating = (sum(row[name] for row in rows) for name in ("time/sample", "time/update"))
        notes = [*self.loaded.notes, *self.room.notes, *self.notes]
        if rows and not any(row.get("optim/updates") for row in rows):
            notes.append("no step had anything to learn from (see rollout/zero_std_groups); the adapter is unchanged")
        result = Result(
            adapter=str(self.folder.path / "adapter"),
            steps=progress.step,
            best_step=progress.best_step,
            accuracy=accuracies.get(progress.best_step),
            accuracy_before=accuracies.get(0),
            seconds=progress.seconds,
            sample_seconds=sampling,
            update_seconds=updating,
            tokens_per_second=sum(row["tokens"] for row in rows) / (sampling + updating) if sampling else 0.0,
            peak_memory_gb=max((row["memory/peak_gb"] for row in rows), default=0.0),
            notes=[*notes, *self.unmoved()],
            stopped=self.stopped,
        )
        self.folder.conclude(asdict(result))
        return result

    def _answered(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if self.setup.held_out is None:
            return {}, []
        row, shown = loop.answer(self.loaded, self.setup.held_out)
        return row, [{"kind": "held out", **one} for one in shown]


@dataclass
class Setup:
    """A run before its first step: model with adapter, problems, rewards; ``longest`` prompt in tokens."""

    name: str
    config: RLConfig
    folder: RunFolder
    loaded: LoadedModel
    planned: Plan
    held_out: Plan | None
    functions: Mapping[str, Callable]
    adapter: dict[str, Any]
    identity: dict[str, Any]
    longest: int
    notes: list[str]
    stop: Callable[[], bool]
    show: Callable | None

    def begin(self) -> None:
        """Begin the run folder: write the identity, the resolved settings, versions, backend and notes."""
        config, loaded, held_out = self.config, self.loaded, self.held_out
        found = memory.of_reinforcement(loaded, config, self.longest)
        self.notes += filter(None, [memory.fits(found, loaded.backend)])
        self.folder.begin(
            self.identity,
            config.model_dump(mode="json"),
            loaded.fingerprints,
            {
                "problems": [problem.id for problem in self.planned.problems],
                "held_out": [problem.id for problem in held_out.problems] if held_out else [],
            },
            backend=asdict(loaded.backend),
            ranks=distributed.world().size(),
            notes=[*loaded.notes, *self.notes],
        )


@contextmanager
def opened(name: str, config: RLConfig, out: str | Path, resume: bool, show: Callable | None) -> Iterator[Setup]:
    """Open a run folder; check settings, problems and rewards; load the model and put the adapter on it.

    ``name`` is the algorithm's, for the adapter's settings file; the other arguments and the errors: see `train.loop`.
    """
    with (
        distributed.at_work(Path(out), resume) as (folder, stop),
        tracking.reported(config, folder, show) as show,
    ):
        config = with_reference(names.with_adapter(config), folder.identity)
        config = loading.of_its_day(config, folder.identity).sized(distributed.sizes(device.choose(config.device)))
        planned, held_out, notes = rollouts.prepare(config)
        functions = rewards.load(
            config.rewards, list(planned.problems[0].columns), config, planned.prompt, planned.task
        )
        loaded = loading.load(config.model, config.adapter, **config.load_arguments())
        longest = rollouts.longest_prompt(loaded, planned)
        identity = identity_of(config, planned, loaded, functions)
        identity |= {"shown": planned.shown(), "held_out": held_out and held_out.shown()}
        if folder.begun and "reference_files" not in folder.identity:  # earlier versions did not store it
            identity.pop("reference_files", None)
        folder.check(identity)
        mx.random.seed(config.seed)
        adapter = adapters.start(loaded.model, config, config.adapter)
        config = memory.fitted(config, loaded.backend, lambda one: memory.of_reinforcement(loaded, one, longest))
        yield Setup(
            name,
            config,
            folder,
            loaded,
            planned,
            held_out,
            functions,
            adapter,
            identity,
            longest,
            notes,
            stop,
            show,
        )


def with_reference(config: RLConfig, begun: Mapping[str, Any]) -> RLConfig:
    """Return settings that name the reference: by default the adapter that training starts from; None is the base.

    ``begun`` is the identity of the run that is continued, if any. In earlier versions the default was the base even
    with an adapter; such runs keep it.
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
    """Return everything that decides what is learned; files by their content, those of reward functions too."""
    own = {name: rewards.sources(name, function) for name, function in functions.items() if ":" in name}
    read = {
        **({"judge_files": functions["judge"].identity} if "judge" in functions else {}),
        "data_files": loop.digest(config.data) if config.data and is_file(config.data) else config.data,
        "prompt": json.loads(json.dumps(asdict(planned.prompt))),
        **planned.task.identity,
    }
    if config.kl_coef and config.reference not in (None, adapters.BASE, config.adapter):
        read["reference_files"] = fingerprint(Path(config.reference).expanduser())
    return {
        **loop.identity_of(config, loaded, read),
        **{f"reward {name}": ", ".join(f"{file.name} {loop.digest(file)}" for file in own[name]) for name in own},
    }


def about(name: str, config: RLConfig) -> dict[str, Any]:
    """Return what an adapter's settings file says beyond mlx_lm's own entries."""
    return {
        "model": config.model,
        "trained_by": f"mlx-traces {name}",
        "training": config.model_dump(mode="json", exclude_unset=True, exclude={"report_to"}),
    }
