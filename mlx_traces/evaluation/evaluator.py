"""Plan an evaluation, grade its completions, and summarize them as an EvalResult."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_traces.config import AnswerConfig, Config
from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import endpoint, stats
from mlx_traces.evaluation.completion import Completion, Sample, at_k
from mlx_traces.models import names
from mlx_traces.readers import is_file
from mlx_traces.records import EvalResult, Problem, Score, strata_of
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.runtime.provenance import now
from mlx_traces.tasks import Task, get_task
from mlx_traces.tasks.answers import as_asked
from mlx_traces.tasks.prompts import Prompt, columns_of
from mlx_traces.tasks.thoughts import after_last

LABEL_BYTES = 150  # of a folder's name, before its digits; file systems take 255

Generate = Callable[[list[tuple[Problem, int]]], Iterator[tuple[int, Completion]]]


@dataclass(frozen=True)
class Source:
    """Where completions come from: the engine with a loaded model, or a server.

    ``identity`` is added to the run's identity, ``details`` to ``run.json``. ``notes`` are lines for the user; the list
    may grow while completions come. ``files`` are the fingerprints of a loaded model. ``memory`` returns the peak
    memory in GB (1e9 bytes), None if it is unknown.
    """

    generate: Generate
    identity: dict[str, Any]
    details: dict[str, Any]
    notes: list[str]
    files: Mapping[str, str | None] | None = None
    memory: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class Plan:
    """An evaluation whose settings are complete and checked, with its problems; no model is loaded yet.

    The problems of a growing run are the first ones of a sequence. ``source`` then has all problems of the sequence, in
    the data's order; the run's identity depends on them, not on its size so far.
    """

    config: AnswerConfig
    task: Task
    prompt: Prompt
    extractor: str
    problems: list[Problem]
    source: list[Problem] | None = None

    def first(self, count: int) -> "Plan":
        """Return the plan of a growing run with its first ``count`` problems only."""
        config = self.config.model_copy(update={"limit": count})
        return replace(self, config=config, problems=self.problems[:count])

    @property
    def label(self) -> str:
        """A folder name: task, model, adapter and prompt, and 8 digits of the identity's digest."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        parts = (
            self.task.name,
            Path(self.config.model).name,
            Path(self.config.adapter or "").name,
            self.prompt.name,
        )
        name = "-".join(part for part in parts if part)
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lower().lstrip(".")
        return name.encode()[:LABEL_BYTES].decode(errors="ignore") + f"-{digest}"

    @property
    def model(self) -> str:
        """The model's name in results, with the host if a server answers."""
        return endpoint.named(self.config) if endpoint.behind(self.config) else self.config.model

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings without effect on this plan's completions; runs that differ in them alone are the same run."""
        greedy = ("top_p", "top_k", "min_p") if self.config.temperature == 0 else ()
        name = self.config.prompt or self.task.default_prompt
        return greedy if name in self.task.few_shot else (*greedy, "shots", "shots_data")

    @property
    def notes(self) -> list[str]:
        """Lines for the user: a split name without effect, a prompt that shows the answer."""
        gold = [name for name in columns_of(self.prompt.user) if name in self.task.gold_columns]
        shows = [f"the prompt {self.prompt.name} shows the model the answer ({{{', '.join(gold)}}})"] if gold else []
        return split_notes(self.config) + shows

    @property
    def wanted(self) -> list[tuple[Problem, int]]:
        """The completions to sample, in order: (problem, sample) pairs."""
        return [(problem, sample) for problem in self.problems for sample in range(self.config.samples)]

    @cached_property
    def files(self) -> dict[str, str | None]:
        """The fingerprints of a model that is a folder and of the adapter, for the identity; read once."""
        folder, adapter = names.local_folder(self.config.model), self.config.adapter
        return {
            "model_files": fingerprint(folder) if folder else None,
            "adapter_files": fingerprint(Path(adapter)) if adapter else None,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Every resolved setting, as plain JSON."""
        return {**self.config.model_dump(mode="json"), "prompt": self.prompt.name, "extractor": self.extractor}

    def shown(self) -> str:
        """Return a digest of the problems' ids, gold answers and chat messages, 12 hexadecimal digits."""
        problems = self.source or self.problems
        turns = [[problem.id, problem.gold, self.prompt.messages(problem)] for problem in problems]
        turns += [[self.task.source]] if self.task.source else []
        return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:12]

    def identity(self) -> dict[str, Any]:
        """Everything that decides which completions are sampled; problems and files by their content."""
        config = self.config
        golds = [[problem.id, problem.gold] for problem in self.source or self.problems]
        shared = {
            **config.identity(),
            **({"limit": None} if self.source else {}),
            **{name: AnswerConfig.model_fields[name].default for name in self.idle},
            "prompt": json.loads(json.dumps(asdict(self.prompt))),
            "problems": hashlib.sha256(json.dumps(golds).encode()).hexdigest()[:12],
            "shown": self.shown(),
            **self.task.identity,
        }
        if config.data_seed == config.seed:  # the same run as without it
            del shared["data_seed"]
        if endpoint.behind(config):
            return {**shared, "endpoint": config.endpoint}
        stops = self.prompt.chat and self.prompt.stop and not config.stop_in_thoughts
        return {
            **shared,
            **({"stops": "after thoughts"} if stops else {}),
            **self.files,
        }


def split_notes(config: Config) -> list[str]:
    """Return a note if the settings name a split of a file: files have none, so all of it is read."""
    named = "split" in config.model_fields_set and "[" not in config.split
    if not (named and config.data and is_file(config.data)):
        return []
    return [f"{config.data} has no splits: {config.split!r} is all of it; a part is {config.split + '[:100]'!r}"]


def plan(config: AnswerConfig) -> Plan:
    """Fill in the task's defaults, check names, and load the problems.

    Raises:
        UserError: for an unknown task, prompt or extractor, with the choices; for a missing model or adapter; for bad
            problems; for several samples without a temperature; for settings that do not go with a server, or need one.
    """
    config = endpoint.resolved(config)
    served = endpoint.behind(config)
    if not served:
        config = names.with_adapter(config)
        names.check(config.model, config.adapter)
    task = get_task(config.task)
    extractor = config.extractor or task.extractors[0]
    if extractor not in task.extractors:
        raise unknown(f"extractor of {task.name}", extractor, task.extractors)
    if config.samples > 1 and not config.temperature:
        raise UserError(f"--samples {config.samples} would all be the same at temperature 0; pass --temperature")
    problems = task.load(config.split, config.data, None if config.growing else config.limit, config.problem_seed)
    source = problems if config.growing else None
    if source:
        problems = sequence(task, config, source)
    leave_out = frozenset(problem.id for problem in source or problems)  # no problem is its own worked example
    examples = (config.shots, config.problem_seed, config.shots_data, leave_out)
    prompt = task.prompt(config.prompt or task.default_prompt, examples)
    changes = {key: getattr(config, key) for key in ("system", "prefill") if getattr(config, key) is not None}
    prompt = replace(prompt, **changes)
    if served:
        endpoint.refuse_prefill(prompt)
    return Plan(config, task, prompt, extractor, problems, source)


def sequence(task: Task, config: AnswerConfig, source: list[Problem]) -> list[Problem]:
    """Return the first problems of a growing run: the source in an order that depends only on ids and seed.

    A task that generates problems adds more if ``--limit`` is above the number of the source's problems.
    """

    def key(problem: Problem) -> bytes:
        return hashlib.sha256(f"{config.problem_seed} {problem.id}".encode()).digest()

    ordered = sorted(source, key=key)
    if config.limit and config.limit > len(source):
        known = {problem.id for problem in source}
        more = task.load(config.split, config.data, config.limit, config.problem_seed)
        ordered += [problem for problem in more if problem.id not in known]
    return ordered[: config.limit]


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """Return the 64-bit seed of one completion's random stream; it depends on nothing else in the run."""
    digest = hashlib.sha256(f"{seed} {problem_id} {sample}".encode()).digest()
    return int.from_bytes(digest[:8])


def grade_sample(planned: Plan, problem: Problem, sample: int, completion: Completion) -> Sample:
    """Judge one completion and make its line of ``samples.jsonl``."""
    scores = planned.task.grade(problem, completion.whole)
    headline = scores[planned.extractor]
    notes = {name: score.note for name, score in scores.items() if score.note}
    stop = completion.stop_string
    ended = {"stop_string": stop, "in_thought": after_last(completion.whole)[1]} if stop else {}
    columns = {name: problem.columns[name] for name in planned.task.sample_columns if name in problem.columns}
    forced = completion.rollout.forced_text if completion.rollout else ()
    return {
        "id": problem.id,
        "sample": sample,
        "question": question_of(planned.task, problem),
        "prompt": completion.prompt,
        "opened": completion.opened,
        "completion": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        **ended,
        "extracted": headline.extracted,
        "extractions": {name: score.extracted for name, score in scores.items()},
        "verdicts": {name: score.verdict for name, score in scores.items()},
        "gold": problem.gold,
        "correct": headline.correct,
        "verdict": headline.verdict,
        "stratum": problem.stratum,
    } | {name: value for name, value in (("forced", forced), ("notes", notes), ("columns", columns)) if value}


def strictly_correct(planned: Plan, problem: Problem, response: str) -> bool:
    """Whether a response gives a correct answer in the form that the prompt asks for."""
    strict = as_asked(response, planned.prompt.text)
    return planned.task.grade(problem, strict)[planned.extractor].correct


def question_of(task: Task, problem: Problem) -> str:
    """Return the question as one text, for tables."""
    if "question" in problem.columns:
        return str(problem.columns["question"])
    return ", ".join(f"{column} {problem.columns[column]}" for column in task.columns)


def _ended_early(row: Sample, max_tokens: int) -> bool:
    """Whether a limit of the server's own ended a completion; counts of servers differ by a few tokens."""
    return row["finish_reason"] == "length" and row["tokens"] is not None and row["tokens"] < 0.9 * max_tokens


def summarize(
    planned: Plan, samples: list[Sample], run_name: str, memory_gb: float | None, notes: list[str]
) -> EvalResult:
    """Compute a result from graded samples in any order; token figures are None if a server did not count them all."""
    config = planned.config
    counts = [row["tokens"] for row in samples]
    tokens = None if None in counts else sum(counts)
    uncounted, unexplained = counts.count(None), sum(row["finish_reason"] == "unknown" for row in samples)
    if uncounted:
        notes = [*notes, f"the server gave no count of tokens for {uncounted:,} of {len(counts):,} completions"]
    if unexplained:
        notes = [*notes, f"the server did not say why {unexplained:,} of {len(counts):,} completions ended"]
    if config.endpoint and (early := [row["tokens"] for row in samples if _ended_early(row, config.max_tokens)]):
        cut = f"the server cut off {len(early):,} of {len(counts):,} completions before --max-tokens"
        notes = [*notes, f"{cut}, one after {min(early):,} tokens; raise its context length"]
    seconds = max(row["elapsed"] for row in samples)
    overall = accuracy_of(samples, lambda row: row["correct"])
    strata = sorted({name for row in samples for name in strata_of(row["stratum"])})
    return EvalResult(
        run=run_name,
        model=planned.model,
        adapter=config.adapter,
        task=planned.task.name,
        prompt=planned.prompt.name,
        extractor=planned.extractor,
        split=config.split,
        **overall,
        samples_per_problem=config.samples,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=config.seed,
        truncated=sum(row["finish_reason"] == "length" for row in samples) / len(samples),
        mean_tokens=None if tokens is None else tokens / len(samples),
        tokens_per_second=None if tokens is None else tokens / seconds if seconds else 0.0,
        wall_seconds=seconds,
        peak_memory_gb=memory_gb,
        timestamp=now(),
        verdicts=dict(Counter(row["verdict"] for row in samples).most_common()),
        by_stratum={
            name: accuracy_of([row for row in samples if name in strata_of(row["stratum"])], lambda row: row["correct"])
            for name in strata
        },
        extractors={
            name: accuracy_of(samples, lambda row, name=name: row["verdicts"][name] == "correct")
            for name in planned.task.extractors
        },
        **at_k(samples, lambda answers, gold: planned.task.votes(answers, gold, planned.extractor)),
        notes=[*notes],
        stopped=sum("stop_string" in row for row in samples),
        stopped_in_thoughts=sum(row.get("in_thought") is True for row in samples),
        think_tokens=config.think_tokens,
        think_at_least=config.think_at_least,
        forced=sum("forced" in row for row in samples),
    )


def accuracy_of(samples: Iterable[Sample], correct: Callable[[Sample], bool]) -> dict[str, Any]:
    """Return accuracy, counts and the 95 % interval; completions of one problem count as a cluster."""
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for row in samples:
        by_problem[row["id"]].append(correct(row))
    return stats.accuracy(list(by_problem.values()))


def regrade(task: Task, row: dict[str, Any], where: str) -> dict[str, Score]:
    """Judge a completion from any source: a row with ``completion`` and the task's graded columns."""
    completion = row["completion"]
    if not isinstance(completion, str):
        raise UserError(f"{where}: 'completion' must be a text, not {type(completion).__name__}")
    return task.grade(task.parse(row, where), completion)
