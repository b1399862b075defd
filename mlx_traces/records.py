"""What flows between the rooms: a problem, a rollout, a score. Standard library only."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One question of a task.

    ``id`` is derived from the content, so the same problem has the same id whichever file, hub or order it came from;
    runs are paired by it. ``columns`` is the task's row (``question`` and ``answer``, or ``nums`` and ``target``).
    ``gold`` is the answer as text. ``stratum`` names the part of the data set that results are split by, or is empty.
    """

    id: str
    columns: dict[str, Any]
    gold: str
    stratum: str = ""


@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    ``completion_ids`` are the exact sampled ids, the stop token included when it was sampled. ``text`` is decoded from
    them, without the stop token and without a stop string and what follows it. ``finish_reason`` is ``"stop"`` or
    ``"length"``. On request, per completion token and in nats: ``logprobs`` of the distribution that was sampled,
    ``model_logprobs`` of the model's own at temperature 1.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None = None
    model_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Score:
    """A task's verdict on one completion, by one extractor.

    ``verdict`` is ``"correct"`` or says what is wrong (``"no_answer"``, ``"wrong_value"``, ...). ``extracted`` is the
    text that was judged, ``None`` if nothing was found.
    """

    verdict: str
    extracted: str | None

    @property
    def correct(self) -> bool:
        """Whether the answer counts."""
        return self.verdict == "correct"


@dataclass(frozen=True)
class EvalResult:
    """A finished evaluation, as in ``result.json``.

    Shares are fractions from 0 to 1; ``accuracy`` is the mean over problems and samples with its 95 % interval;
    ``correct_count`` of ``total_questions`` counts completions. ``mean_tokens`` is per completion, its stop token
    included. ``tokens_per_second`` counts completion tokens over ``wall_seconds`` of generation (loading excluded).
    ``by_stratum`` and ``extractors`` hold the same figures for parts of the data and for the other extractors.
    """

    run: str
    model: str
    adapter: str | None
    task: str
    prompt: str
    extractor: str
    split: str
    accuracy: float
    correct_count: int
    total_questions: int
    ci_low: float
    ci_high: float
    samples_per_problem: int
    temperature: float
    max_tokens: int
    seed: int
    truncated: float
    mean_tokens: float
    tokens_per_second: float
    wall_seconds: float
    peak_memory_gb: float
    timestamp: str
    verdicts: dict[str, int]
    by_stratum: dict[str, dict[str, Any]]
    extractors: dict[str, dict[str, Any]]
    pass_at_k: dict[str, float]
    maj_at_k: dict[str, float]
    notes: list[str]
