"""What the training loops share: progress, held-out problems, the check for numbers that are not finite."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_traces.config import EvalConfig, OptimizerConfig, RLConfig, SFTSettings, ValidationConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator, local
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.train import model_card

SHOWN = 4  # validation completions kept in samples.jsonl
# Settings that may change when a run is continued: where it runs, what it reports, and how a step is split into
# micro-batches, which changes only rounding (and the masks of dropout).
NOT_IDENTITY = {"device", "save_every", "report_to", "micro_tokens", "logits_mb", "checkpoint_layers"}


@dataclass
class Progress:
    """Progress of a training: steps done, the best validation so far, the number of validations since then."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    seconds: float = 0.0

    def better(self, value: float) -> bool:
        """Record a validation's value (higher is better); return whether it is the best so far."""
        if self.best is not None and value <= self.best:
            self.waited += 1
            return False
        self.best, self.best_step, self.waited = value, self.step, 0
        return True


def validation_of(config: RLConfig | SFTSettings) -> ValidationConfig | None:
    """Return the settings of the validation; its thinking switch is the training's, unless it sets its own."""
    asked = config.evaluate
    if asked is None or asked.thinking is not None:
        return asked
    return asked.model_copy(update={"thinking": config.thinking})


def held_out_plan(model: str, config: RLConfig | SFTSettings) -> evaluator.Plan | None:
    """Return the evaluation that is made at each validation, with its problems."""
    settings = validation_of(config)
    return None if settings is None else evaluator.plan(EvalConfig(model=model, **settings.model_dump()))


def identity_of(config: RLConfig | SFTSettings, *leave_out: str) -> dict[str, Any]:
    """Return the settings that decide what is learned, except those that name files."""
    asked = validation_of(config)
    settings = config.model_dump(mode="json", exclude=NOT_IDENTITY | {*leave_out})
    return {**settings, "evaluate": asked and asked.model_dump(mode="json")}


def answer(loaded: LoadedModel, held_out: evaluator.Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer the held-out problems; return accuracy, finished share and length as metrics, and some completions."""
    loaded.model.eval()
    with adapters.merged(loaded.model):
        samples = local.measure(loaded, held_out)
    row = {
        "valid/accuracy": sum(sample["correct"] for sample in samples) / len(samples),
        "valid/finished": sum(sample["finish_reason"] == "stop" for sample in samples) / len(samples),
        "valid/length": sum(sample["tokens"] for sample in samples) / len(samples),
    }
    keys = ("id", "question", "completion", "finish_reason", "verdict", "correct", "gold")
    return row, [{key: sample[key] for key in keys} for sample in samples[:SHOWN]]


def keep(
    loaded: LoadedModel,
    folder: RunFolder,
    settings: dict[str, Any],
    about: dict[str, Any],
    row: Mapping[str, Any] | None = None,
) -> None:
    """Save a run's current adapter with its model card; all trainings save here.

    Args:
        loaded: the model, its adapter on.
        folder: the run's; the adapter is in ``adapter/``.
        settings: as `adapters.start` returned them.
        about: further entries of the adapter's settings file.
        row: the metrics of the validation that chose it; default: those of the run's last line.
    """
    adapters.save(loaded.model, folder.path / "adapter", settings, about)
    model_card.write(folder.path / "adapter", row and [row], model_card.base_of(loaded.name, loaded.path))


def step_seed(seed: int, step: int) -> int:
    """Return the 64-bit seed of a step's random numbers; it depends on nothing else in the run."""
    return int.from_bytes(hashlib.sha256(f"{seed} step {step}".encode()).digest()[:8])


def refuse_nonfinite(loss: float, norm: float, step: int, config: OptimizerConfig, advice: str) -> None:
    """Raise UserError, before anything is changed, if a step's loss or gradient is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise UserError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was overwritten. "
        f"Lower learning_rate ({config.learning_rate:g}) or {advice}"
    )


def digest(file: str | Path) -> str:
    """Return 12 hexadecimal digits of a file's content."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
