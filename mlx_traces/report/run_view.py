"""Read a run folder for display, finished or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_traces.evaluation.comparison import Run, check_samples
from mlx_traces.readers import is_number
from mlx_traces.runtime.run_folder import SAMPLE_COLUMNS, RunFolder, existing, lines_so_far
from mlx_traces.text import clean

EVALUATION, REINFORCEMENT, FINE_TUNING = "evaluation", "reinforcement learning", "fine-tuning"


@dataclass(frozen=True)
class Record:
    """The current content of a run folder.

    ``about`` is run.json, ``metrics`` and ``samples`` are the lines so far, ``result`` is None until it is finished.
    ``run`` is the evaluation of a comparison that this was made of, perhaps of several trainings or with clusters.
    """

    path: Path
    kind: str
    about: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    result: dict[str, Any] | None
    run: Run | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return clean(self.path.resolve().name)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        identity = self.about.get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def step(self) -> int:
        """The last step of a training, or the number of samples of an evaluation."""
        if self.kind == EVALUATION:
            return len(self.samples)
        return int(max((row["step"] for row in self.metrics), default=0))

    @property
    def steps(self) -> int | None:
        """The total number of steps, or of an evaluation's samples; None if unknown."""
        if self.result is not None:
            return self.step
        if self.kind == EVALUATION:
            limit, samples = whole(self.settings.get("limit")), whole(self.settings.get("samples") or 1)
            return limit * samples if limit and samples else None
        return whole(self.settings.get("num_steps")) or whole(self.about.get("steps"))

    @property
    def lost(self) -> bool:
        """Whether this is an evaluation with a result but without samples."""
        return self.kind == EVALUATION and self.result is not None and not self.samples

    @property
    def notes(self) -> list[str]:
        """The notes of the result, or of ``run.json`` as long as there is no result, each on one line."""
        return notes_of(self.about if self.result is None else self.result)

    @property
    def seconds(self) -> float:
        """The seconds that the run has taken so far."""
        key, rows = ("elapsed", self.samples) if self.kind == EVALUATION else ("time/total", self.metrics)
        return float(max((row[key] for row in rows if is_number(row.get(key))), default=0.0))

    @property
    def remaining(self) -> float | None:
        """Estimated seconds to the end, from the speed of the last 20 lines; None if unknown."""
        timed = [(row["step"], row["time/total"]) for row in self.metrics if is_number(row.get("time/total"))]
        if self.kind == EVALUATION:
            timed = [(0, 0.0), (self.step, self.seconds)]
        timed = timed[-20:]
        if self.result is not None or self.steps is None or len(timed) < 2 or timed[-1][0] <= timed[0][0]:
            return None
        pace = (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0])
        return pace * (self.steps - self.step)


def read(path: str | Path) -> Record:
    """Read a run folder, finished or not, without changing it.

    An incomplete last line is left out: it is being written, or the run was interrupted there.

    Raises:
        UserError: if it is not a run folder, or a file in it is broken.
    """
    folder = existing(path, *([] if RunFolder(Path(path)).finished else ["run.json"]))
    path, about, result, metrics = folder.path, folder.about, folder.result, folder.metrics
    settings = about.get("identity")
    settings = settings if isinstance(settings, dict) else {}
    if not (path / "metrics.jsonl").exists() and "learning_rate" not in settings:
        samples = lines_so_far(folder.samples_path, SAMPLE_COLUMNS)
        check_samples(samples, str(folder.samples_path))
        return Record(path, EVALUATION, about, [], samples, result)
    reinforced = "group_size" in settings or any("reward/mean" in row for row in metrics)
    kind = REINFORCEMENT if reinforced else FINE_TUNING
    return Record(path, kind, about, metrics, lines_so_far(folder.samples_path, ("step", "completion")), result)


def notes_of(content: dict[str, Any]) -> list[str]:
    """Return the notes in a file's content, each on one line; none if they are not a list."""
    notes = content.get("notes")
    return [clean(note) for note in notes] if isinstance(notes, list) else []


def whole(value: Any) -> int | None:
    """Return a number of 1 or more from a file as an int, rounded down; None for anything else."""
    return int(value) if is_number(value) and value >= 1 else None
