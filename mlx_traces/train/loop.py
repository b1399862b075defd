"""What the training loops share: resume, log, validate, keep the best adapter, save, stop.

``sft``, ``grpo`` and ``ppo`` each write their own loop and call a `Training` between its steps:

    for step in run.steps():
        metrics = ...  # one optimizer step of the algorithm
        run.end_step(step, metrics)
    return run.end(...)

Each has a function ``train(config, out, resume, show)``:

    config: the settings.
    out: the run folder. It gets ``adapter/`` (the best by validation, the last without one), ``metrics.jsonl``,
        ``samples.jsonl``, ``checkpoint.safetensors`` and ``result.json``.
    resume: continue a run that was cut off; the result is that of an uninterrupted one.
    show: called with each line of metrics and the number of steps.

It returns the content of ``result.json``. It raises UserError if the input is wrong, a reward fails, or a loss, a
gradient or the model's outputs are not finite; the checkpoint then stays as it was. It raises Stopped after Ctrl-C,
once the current step is done and its checkpoint is written.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_traces.config import (
    EvalConfig,
    OptimizerConfig,
    RLConfig,
    SFTSettings,
    ThinkingConfig,
    ValidationConfig,
    build,
)
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator, local
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.runtime import device, memory_budget
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.runtime.run_folder import RunFolder, judged
from mlx_traces.tasks.answers import forms_of
from mlx_traces.tasks.thoughts import usual
from mlx_traces.train import checkpoints, model_card

SHOWN = 4  # validation completions kept in samples.jsonl


@dataclass
class Progress:
    """Progress of a training: steps done, the best validation so far, the number of validations since then."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    seconds: float = 0.0

    def record(self, value: float) -> None:
        """Record a validation's value; higher is better."""
        if self.best is not None and value <= self.best:
            self.waited += 1
        else:
            self.best, self.best_step, self.waited = value, self.step, 0


class Training:
    """A training in its run folder.

    A new object continues from the checkpoint, if the folder has one: it loads module, optimizer and progress, and cuts
    ``metrics.jsonl`` and ``samples.jsonl`` back to the last saved step.

    Args:
        folder: the run's.
        loaded: the model, its adapter on.
        config: the settings, with ``patience`` and ``save_every``.
        module: holds everything that is trained; a checkpoint saves it and ``optimizer``.
        optimizer: its optimizer.
        room: the memory budget of micro-batches, with metrics and notes.
        adapter: the adapter's settings, as `adapters.start` returned them.
        about: further entries of the adapter's settings file.
        last: number of steps.
        every: steps between validations.
        validate: returns metrics, empty if nothing is held out, and lines for ``samples.jsonl``.
        progress: that of a new training; a checkpoint has its own.
        stop: returns whether the user asked to stop.
        show: called with each line of metrics and the number of steps.
    """

    def __init__(
        self,
        folder: RunFolder,
        loaded: LoadedModel,
        config: RLConfig | SFTSettings,
        *,
        module: nn.Module,
        optimizer: Any,
        room: Any,
        adapter: dict[str, Any],
        about: dict[str, Any],
        last: int,
        every: int,
        validate: Callable[[], tuple[dict[str, Any], Sequence[dict[str, Any]]]],
        progress: Progress,
        stop: Callable[[], bool],
        show: Callable | None,
    ) -> None:
        self.folder, self.loaded, self.config = folder, loaded, config
        self.module, self.optimizer, self.room = module, optimizer, room
        self.adapter, self.about, self.last, self.every = adapter, about, last, every
        self.validate, self.progress, self.stop, self.show = validate, progress, stop, show
        self.checkpoint = folder.path / "checkpoint.safetensors"
        begun = self.checkpoint.exists()
        if begun:
            self.progress = type(progress)(**checkpoints.load(self.checkpoint, module, optimizer))
        for file in ("metrics.jsonl", "samples.jsonl"):
            folder.rewind(file, self.progress.step if begun else -1)  # without one the first validation is repeated

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the remaining steps, from 1; validate the start before the first one."""
        device.reset_peak_memory()
        self.began = perf_counter() - self.progress.seconds
        if not self.progress.step and (row := self._validated()):
            self._log(row)
        if self.progress.best_step == self.progress.step and not self.folder.finished:
            self._keep()  # the start, or what a run that was cut off had saved, but not kept
        while not self._done:
            yield self.progress.step + 1

    def end_step(self, step: int, metrics: Mapping[str, Any], samples: Iterable[dict[str, Any]] = ()) -> None:
        """Log a step; validate, save a checkpoint and keep the best adapter when they are due.

        A new best has a checkpoint, written before the adapter: a resumed run then goes on from the adapter that is
        there, or writes it from the checkpoint, whatever its later steps find.

        Raises:
            UserError: if the model's outputs are no longer finite numbers; nothing is saved.
            Stopped: if the user asked to stop; the checkpoint is written.
        """
        _refuse_broken(self.loaded, step, self.config)
        self.progress.step, self.progress.seconds = step, perf_counter() - self.began
        row = {**metrics, "memory/peak_gb": device.peak_memory_gb(), "time/total": self.progress.seconds}
        row |= memory_budget.metrics_of(self.room, self.loaded.row_budget)
        self.folder.log("samples.jsonl", *({"step": step, **sample} for sample in samples))
        if step % self.every == 0 or step == self.last:
            row |= self._validated()
        self._log(row)
        best, stopping = self.progress.best_step == step, self.stop() and not self._done
        if best or step % self.config.save_every == 0 or self._done or stopping:
            checkpoints.save(self.checkpoint, self.module, self.optimizer, asdict(self.progress))
        if best:
            self._keep()
        if stopping:
            raise Stopped(f"stopped after step {step} of {self.last}")

    def end(self) -> list[dict[str, Any]]:
        """Keep the last adapter if no validation chose one; return the lines of metrics."""
        if self.progress.best is None:
            self._keep()
        return self.folder.metrics

    @property
    def _done(self) -> bool:
        return self.progress.step >= self.last or 0 < self.config.patience <= self.progress.waited

    @property
    def stopped(self) -> str | None:
        """Return what ended the training before its last step: ``patience``, or None."""
        return "patience" if self.progress.step < self.last else None

    def unmoved(self) -> list[str]:
        """Return a note if no validation was better than the start."""
        note = "no validation was better than the start; the adapter is the one training began with"
        return [note] if self.progress.best_step == 0 else []

    def _validated(self) -> dict[str, Any]:
        """Validate, and record whether it is the best so far; return the metrics."""
        row, shown = self.validate()
        if not math.isfinite(loss := row.get("valid/loss", 0.0)):
            raise UserError(
                f"step {self.progress.step}: the validation loss is {loss}; nothing was overwritten. "
                f"Lower learning_rate ({self.config.learning_rate:g})"
            )
        if row:
            self.progress.record(judged(row))
        self.folder.log("samples.jsonl", *({"step": self.progress.step, **sample} for sample in shown))
        return row

    def _keep(self) -> None:
        keep(self.loaded, self.folder, self.adapter, self.about)

    def _log(self, row: Mapping[str, Any]) -> None:
        row = {"step": self.progress.step, **row}
        self.folder.log("metrics.jsonl", row)
        if self.show:
            self.show(row, self.last)


def validation_of(config: RLConfig | SFTSettings) -> ValidationConfig | None:
    """Return the validation's settings; the thinking switch and bounds are the training's, unless it sets its own."""
    asked = config.evaluate
    if asked is None:
        return None
    names = [
        name for name in ThinkingConfig.model_fields if hasattr(config, name) and name not in asked.model_fields_set
    ]
    names += ["thinking"] if asked.thinking is None else []
    return asked.model_copy(update={name: getattr(config, name) for name in names})


def held_out_plan(model: str, config: RLConfig | SFTSettings) -> evaluator.Plan | None:
    """Return the plan of the validations, with its problems and the training's memory limit; None without ``evaluate``.

    Raises:
        UserError: if its bounds on thoughts and those of the training contradict each other.
    """
    if (settings := validation_of(config)) is None:
        return None
    own = {"model": model, "memory_limit": getattr(config, "memory_limit", None)}
    return evaluator.plan(build(EvalConfig, own | settings.model_dump(), "evaluate"))


def identity_of(config: RLConfig | SFTSettings, loaded: LoadedModel, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that decides the result: settings, files by their content, and the algorithm's ``own`` entries."""
    held_out = validation_of(config.sized({}))  # the same on every device
    return {
        **config.identity(),
        "evaluate": held_out and held_out.model_dump(mode="json"),
        **own,
        **loaded.shown(),
        **{f"{name}_files": digest for name, digest in loaded.fingerprints.items()},
        "weights": loaded.backend.weights,
        "dtype": loaded.backend.dtype,
    }


def answer(loaded: LoadedModel, held_out: evaluator.Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer the held-out problems; return accuracy, finished share and length as metrics, and some completions.

    ``valid/accuracy_strict`` counts only answers in the form that the prompt asks for. If it falls behind
    ``valid/accuracy`` with a tolerant extractor, the model is losing that form.
    """
    loaded.model.eval()
    with adapters.merged(loaded.model, loaded.backend):
        samples = local.measure(loaded, held_out)
    row = {
        "valid/accuracy": sum(sample["correct"] for sample in samples) / len(samples),
        "valid/finished": sum(sample["finish_reason"] == "stop" for sample in samples) / len(samples),
        "valid/length": sum(sample["tokens"] for sample in samples) / len(samples),
    }
    if forms_of(held_out.prompt.text):
        responses = [usual(sample["opened"] + sample["completion"], loaded.own_tags) for sample in samples]
        pairs = zip(held_out.problems, responses, strict=True)  # one sample a problem
        strict = sum(evaluator.strictly_correct(held_out, *pair) for pair in pairs)
        row["valid/accuracy_strict"] = strict / len(samples)
    keys = ("id", "question", "completion", "finish_reason", "verdict", "correct", "gold")
    return row, [{key: sample[key] for key in keys} for sample in samples[:SHOWN]]


def keep(loaded: LoadedModel, folder: RunFolder, settings: dict[str, Any], about: dict[str, Any]) -> None:
    """Save a run's current adapter with its model card, which has the metrics of the best validation, else the last.

    Args:
        loaded: the model, its adapter on.
        folder: the run's; the adapter is in ``adapter/``.
        settings: as `adapters.start` returned them.
        about: further entries of the adapter's settings file.
    """
    adapters.save(loaded.model, folder.path / "adapter", settings, about)
    model_card.write(folder.path / "adapter", base=model_card.base_of(loaded.name, loaded.path))


def step_seed(seed: int, step: int) -> int:
    """Return the 64-bit seed of a step's random numbers; it depends on these two numbers alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} step {step}".encode()).digest()[:8])


def refuse_nonfinite(loss: float, norm: float, step: int, config: OptimizerConfig, advice: str) -> None:
    """Raise UserError, before anything is changed, if a step's loss or gradient is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise UserError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was overwritten. "
        f"Lower learning_rate ({config.learning_rate:g}) or {advice}"
    )


def _refuse_broken(loaded: LoadedModel, step: int, config: OptimizerConfig) -> None:
    """Raise UserError, before anything is saved, if the model's outputs are not finite, even if the loss is.

    Some models give tokens that do not exist -inf, which is no fault.
    """
    loaded.model.eval()
    if not mx.isfinite(mx.logsumexp(loaded.model(mx.array([[0, 1, 2]])), axis=-1)).all().item():
        raise UserError(
            f"step {step}: the model's outputs are no longer finite numbers; nothing was overwritten. "
            f"Lower learning_rate ({config.learning_rate:g})"
        )


def digest(file: str | Path) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of a file's content."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
