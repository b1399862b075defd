"""A completion to be graded, from the engine or from a server, and its line of ``samples.jsonl``."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_traces.errors import unknown
from mlx_traces.evaluation import stats
from mlx_traces.records import Rollout
from mlx_traces.tasks import thoughts

Sample = dict[str, Any]  # a line of samples.jsonl, made by `evaluator.grade_sample`


@dataclass(frozen=True)
class Completion:
    """A prompt and a model's completion of it.

    ``prompt`` is the prompt as text, ``opened`` the start of the assistant's turn that the prompt already holds.
    ``text`` is the completion without the stop token. ``tokens`` is its length, the stop token included, or None
    if a server does not count. ``own_tags`` are the model's thinking tags, if they are not among ``thoughts.TAGS``.
    ``rollout`` has the ids and log-probabilities; None from a server.
    """

    prompt: str
    opened: str
    text: str
    tokens: int | None
    finish_reason: str
    stop_string: str | None = None
    own_tags: thoughts.Pair | None = None
    rollout: Rollout | None = None

    @classmethod
    def sampled(cls, prompt: str, opened: str, rollout: Rollout, own_tags: thoughts.Pair | None = None) -> "Completion":
        """Make a completion from a rollout of the engine."""
        tokens, stop = len(rollout.completion_ids), rollout.stop_string
        return cls(prompt, opened, rollout.text, tokens, rollout.finish_reason, stop, own_tags, rollout)

    @property
    def whole(self) -> str:
        """The assistant's whole turn, its thought between tags that the graders know."""
        return thoughts.usual(self.opened + self.text, self.own_tags)

    @property
    def forced(self) -> tuple[tuple[int, int], ...]:
        """The spans (start, end) of ``whole`` that were inserted, not sampled."""
        spans = self.rollout.forced_text if self.rollout else ()
        return tuple(
            tuple(len(thoughts.usual(self.opened + self.text[:at], self.own_tags)) for at in span) for span in spans
        )


def rehead(row: Sample, extractor: str) -> Sample:
    """Return a sample with the stored verdict of another extractor as its headline.

    Raises:
        UserError: if that extractor has not judged it.
    """
    if extractor not in row["verdicts"]:
        raise unknown("extractor of this run", extractor, row["verdicts"])
    verdict = row["verdicts"][extractor]
    return row | {"extracted": row["extractions"].get(extractor), "correct": verdict == "correct", "verdict": verdict}


def at_k(
    samples: Sequence[Sample], votes: Callable[[Sequence[str | None], str], Sequence[str | None]]
) -> dict[str, dict[str, float]]:
    """Return unbiased pass@k and pass^k, and maj@k, for k = 1, 2, 4, ... and the number of samples of a problem.

    They are empty with one sample a problem.

    Args:
        samples: of every problem, each problem's in order; the first k of them vote.
        votes: returns a problem's extracted answers with those that count as one answer made equal, given its gold.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in samples:
        groups[row["id"]].append(row)
    n = min(map(len, groups.values()), default=1)
    ks = sorted({1 << i for i in range(n.bit_length())} & set(range(1, n + 1)) | {n}) if n > 1 else []
    passes, hats, majorities = ({str(k): 0.0 for k in ks} for _ in range(3))
    for rows in groups.values() if ks else ():
        count = sum(row["correct"] for row in rows)
        answers = votes([row["extracted"] for row in rows], rows[0]["gold"])
        for k in ks:
            passes[str(k)] += stats.pass_at_k(len(rows), count, k) / len(groups)
            hats[str(k)] += stats.pass_hat_k(len(rows), count, k) / len(groups)
            winner = stats.majority(answers[:k])
            won = any(row["correct"] for row, answer in zip(rows[:k], answers, strict=False) if answer == winner)
            majorities[str(k)] += won / len(groups)
    return {"pass_at_k": passes, "pass_hat_k": hats, "maj_at_k": majorities}
