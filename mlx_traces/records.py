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
    ``"length"``.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    finish_reason: str


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
