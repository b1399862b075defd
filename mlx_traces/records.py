"""Data that packages pass to each other: problem, rollout, score, trace, result. Standard library only."""

from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_traces.errors import UserError


def problem_id(identity: str) -> str:
    """Return the id that all occurrences of a problem share; the second one in a file has the id ``ID#2``."""
    return identity.partition("#")[0]


def strata_of(stratum: str) -> list[str]:
    """Return the parts of the data that a problem belongs to; ``level 2; Algebra`` are two."""
    return [name for name in stratum.split("; ") if name]


@dataclass(frozen=True)
class Problem:
    """One question of a task.

    ``id`` is derived from the content, so it does not depend on the problem's source or place there; runs are paired
    by it. ``columns`` is the task's row (``question`` and ``answer``, or ``nums`` and ``target``). ``gold`` is
    the answer as text. ``stratum`` names the part of the data set that results are split by, or is empty; several parts
    are separated by ``; ``.
    """

    id: str
    columns: dict[str, Any]
    gold: str
    stratum: str = ""


@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    ``completion_ids`` are the exact sampled ids, the stop token included if it was sampled. ``text`` is decoded from
    them, without the stop token, without special tokens (thinking tags excepted), and up to a stop string.
    ``finish_reason`` is ``"stop"`` or ``"length"``. On request, per completion token and in nats: ``logprobs`` under
    the sampling distribution, ``model_logprobs`` under the model's own at temperature 1. ``stop_string`` is the one
    that ended the completion, None if none did. ``forced`` are the indices of the tokens that were inserted, not
    sampled, to close a thought or to keep it open; their log-probabilities are None. ``forced_text`` has the spans
    (start, end) of ``text`` that they wrote.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float | None, ...] | None = None
    model_logprobs: tuple[float | None, ...] | None = None
    stop_string: str | None = None
    forced: tuple[int, ...] = ()
    forced_text: tuple[tuple[int, int], ...] = ()


Span = tuple[int, int, float]  # start and end (exclusive) in characters, value


@dataclass(frozen=True)
class Stepped:
    """A reward's value for a completion, and its values for single steps of the completion.

    ``value`` is that of the whole completion, or None where the reward does not apply. ``steps`` maps a kind of step to
    spans ``(start, end, value)`` in characters of the rewarded text; spans of one kind do not overlap.
    """

    value: float | None
    steps: dict[str, list[Span]] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A task's verdict on one completion, by one extractor.

    ``verdict`` is ``"correct"`` or names the fault (``"no_answer"``, ``"wrong_value"``, ...). ``extracted`` is the
    judged text, ``None`` if nothing was found. ``note`` says how it was read if two readings are allowed.
    """

    verdict: str
    extracted: str | None
    note: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer counts."""
        return self.verdict == "correct"


LISTS = ("messages", "completion_ids", "logprobs", "not_learned", "forced", "forced_text")  # fields of a trace


@dataclass(frozen=True)
class Trace:
    """A conversation whose last turn is a thinking trace: one line of a file under ``data/``.

    ``messages`` are the turns before the completion, each with ``role`` and ``content``, the last one the user's;
    ``completion`` is the assistant's last turn, without the stop token. ``id`` is the problem's, so traces of one
    problem share it, or a hash of the conversation. ``task`` names the grader and ``columns`` is its row; both are
    empty for a conversation that no task can judge. ``prompt`` is the prompt style's name, ``source`` names the
    trace's origin, ``sample`` numbers the traces of one problem. ``not_learned`` has the indices of the assistant's
    ``messages`` that training leaves out of the loss. ``thinking`` (None: unset) and ``template_args`` are the chat
    template's variables when the completion was sampled; ``stop_string`` ended it.

    Generated traces have the exact ``completion_ids``, the stop token included, their ``logprobs`` (nats, of the
    distribution that was sampled) and a ``finish_reason``, ``"stop"`` or ``"length"``; else these are None. ``forced``
    are the indices of the tokens that were inserted, not sampled; their log-probability is None. ``forced_text`` has
    the spans (start, end) of ``completion`` that those tokens wrote, for a model with other tokens: no model learns
    them. Files of earlier versions lack it.
    Scored ones have the headline ``verdict`` of the task's grader, named ``scores`` from 0 to 1 (None where one does
    not apply) and the combined ``score``.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    completion: str
    task: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    source: str = ""
    sample: int = 0
    completion_ids: tuple[int, ...] | None = None
    logprobs: tuple[float | None, ...] | None = None
    finish_reason: str | None = None
    verdict: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    score: float | None = None
    not_learned: tuple[int, ...] | None = None
    thinking: bool | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    stop_string: str | None = None
    forced: tuple[int, ...] | None = None
    forced_text: tuple[tuple[int, int], ...] | None = None

    def to_row(self) -> dict[str, Any]:
        """Return this trace as a JSON object, without unknown values."""
        needed = ("id", "messages", "completion")
        return {name: value for name, value in asdict(self).items() if name in needed or value not in (None, "", {})}

    @classmethod
    def from_row(cls, row: dict[str, Any], where: str) -> "Trace":
        """Read a JSON object; UserError, starting with ``where``, for a missing, unknown or malformed field."""
        names = cls.__dataclass_fields__
        for name in ("id", "messages", "completion"):
            if name not in row:
                raise UserError(f"{where}: {name!r} is missing; this row has {', '.join(map(str, row)) or 'nothing'}")
        if strange := [name for name in row if name not in names]:
            raise UserError(f"{where}: unknown field {strange[0]!r}; a trace has {', '.join(names)}")
        turns = row["messages"]
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict)
            and set(turn) == {"role", "content"}
            and all(isinstance(v, str) for v in turn.values())
            for turn in turns
        ):
            raise UserError(f"{where}: 'messages' must be a list of {{role, content}} objects of texts")
        for name in ("id", "completion"):
            if not isinstance(row[name], str):
                raise UserError(f"{where}: {name!r} must be a text, not {type(row[name]).__name__}")
        for name, kind, what in (("thinking", bool | None, "true or false"), ("template_args", dict, "an object")):
            if name in row and not isinstance(row[name], kind):
                raise UserError(f"{where}: {name!r} must be {what}, not {type(row[name]).__name__}")
        lists = {name: tuple(row[name]) for name in LISTS if row.get(name) is not None}
        if "forced_text" in lists:
            lists["forced_text"] = tuple(map(tuple, lists["forced_text"]))
        return cls(**{**row, **lists})


@dataclass(frozen=True)
class EvalResult:
    """A finished evaluation, as in ``result.json``.

    Shares are fractions from 0 to 1; ``accuracy`` is the mean over problems and samples with its 95 % interval;
    ``correct_count`` of ``total_questions`` counts completions. ``mean_tokens`` is per completion, its stop token
    included. ``tokens_per_second`` counts completion tokens over ``wall_seconds`` of generation (loading excluded). A
    model behind a server has ``model`` as ``NAME@HOST``; its memory is not known (None), nor are its tokens if the
    server does not count them. ``by_stratum`` and ``extractors`` hold the same figures for parts of the data and for
    the other extractors. ``stopped`` counts the completions that a stop string ended, ``stopped_in_thoughts`` those of
    them whose thought was open. ``forced`` counts the completions whose thought was closed by its budget,
    ``think_tokens``, or kept open up to ``think_at_least``; with a budget, ``max_tokens`` bounds the answer alone.
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
    mean_tokens: float | None
    tokens_per_second: float | None
    wall_seconds: float
    peak_memory_gb: float | None
    timestamp: str
    verdicts: dict[str, int]
    by_stratum: dict[str, dict[str, Any]]
    extractors: dict[str, dict[str, Any]]
    pass_at_k: dict[str, float]
    maj_at_k: dict[str, float]
    notes: list[str]
    stopped: int = 0
    stopped_in_thoughts: int = 0
    think_tokens: int | None = None
    think_at_least: int = 0
    forced: int = 0
    pass_hat_k: dict[str, float] | None = None  # None: an earlier version did not compute it
