"""The evaluator: problems in, a run folder and an EvalResult out."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_traces import endpoint, stats
from mlx_traces.config import AnswerConfig, Config, EndpointConfig, EvalConfig, build
from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import is_file
from mlx_traces.records import EvalResult, Problem, Rollout, Score
from mlx_traces.runtime import distributed
from mlx_traces.runtime.files import held
from mlx_traces.runtime.interrupts import Stopped, listening
from mlx_traces.runtime.provenance import fingerprint, now, provenance, settled
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.tasks import GRADER, Task, get_task, thoughts
from mlx_traces.tasks.prompts import Prompt, columns_of, load_prompt

# Settings that do not decide what is sampled, up to floating-point ties; every extractor judges every sample.
NOT_IDENTITY = {"rows", "device", "memory_limit", "extractor"} | set(EndpointConfig.model_fields)

LABEL_BYTES = 150  # of a folder's name, before its digits; file systems take 255

Sample = dict[str, Any]
Generate = Callable[[list[tuple[Problem, int]]], Iterator[tuple[int, "Completion"]]]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Completion:
    """A rollout as the grader sees it: what the model was shown, and what its turn held before it began.

    ``own_tags`` are those that the model thinks between, if they are not among ``thoughts.TAGS``.
    """

    prompt: str
    opened: str
    rollout: Rollout
    own_tags: thoughts.Pair | None = None

    @property
    def whole(self) -> str:
        """The assistant's whole turn, its thought between tags that graders know."""
        return thoughts.usual(self.opened + self.text, self.own_tags)

    @property
    def text(self) -> str:
        """What the model said, without the stop token."""
        return self.rollout.text

    @property
    def tokens(self) -> int:
        """How many tokens that took, the stop token included."""
        return len(self.rollout.completion_ids)

    @property
    def finish_reason(self) -> str:
        """Why it ended."""
        return self.rollout.finish_reason


@dataclass(frozen=True)
class Answered:
    """What a server answered: the prompt and the text of it; ``tokens`` is None where it does not count them."""

    prompt: str
    opened: str
    text: str
    tokens: int | None
    finish_reason: str

    @property
    def whole(self) -> str:
        """The assistant's whole turn."""
        return self.opened + self.text


@dataclass(frozen=True)
class Source:
    """Where completions come from: the engine with a loaded model, or a server.

    ``identity`` is what it adds to that of the run, ``details`` what ``run.json`` says besides, ``notes`` are lines
    for the user, some of which come up on the way. ``memory`` tells the peak in 1e9 bytes, None if that is not known.
    """

    generate: Generate
    identity: dict[str, Any]
    details: dict[str, Any]
    notes: list[str]
    memory: Callable[[], float | None]


@dataclass(frozen=True)
class Plan:
    """An evaluation whose settings are complete and checked, with its problems; no model is loaded yet."""

    config: AnswerConfig
    task: Task
    prompt: Prompt
    extractor: str
    problems: list[Problem]

    @property
    def label(self) -> str:
        """A folder name: task, model, adapter and prompt, and 8 digits that stand for all settings."""
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
        """The model's name in results: with its server's, where it is behind one."""
        return endpoint.named(self.config) if endpoint.behind(self.config) else self.config.model

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that change no completion here; runs that differ in them alone are the same run."""
        greedy = ("top_p", "top_k", "min_p") if self.config.temperature == 0 else ()
        name = self.config.prompt or self.task.default_prompt
        return greedy if name in self.task.few_shot else (*greedy, "shots", "shots_data")

    @property
    def notes(self) -> list[str]:
        """Lines for the user: a split's name that says nothing, an answer that is shown."""
        gold = [name for name in columns_of(self.prompt.user) if name in self.task.gold_columns]
        shows = [f"the prompt {self.prompt.name} shows the model the answer ({{{', '.join(gold)}}})"] if gold else []
        return split_notes(self.config) + shows

    def shown(self) -> str:
        """Return 12 hexadecimal digits that stand for all that the model is shown, and the gold answers."""
        told = [[problem.id, problem.gold, self.prompt.messages(problem)] for problem in self.problems]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def identity(self) -> dict[str, Any]:
        """Everything that decides which completions are sampled; problems and files by their content."""
        config = self.config
        asked = [[problem.id, problem.gold] for problem in self.problems]
        shared = {
            **config.model_dump(mode="json", exclude=NOT_IDENTITY),
            **{name: AnswerConfig.model_fields[name].default for name in self.idle},
            "prompt": json.loads(json.dumps(asdict(self.prompt))),
            "problems": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12],
            "shown": self.shown(),
        }
        if endpoint.behind(config):
            return {**shared, "endpoint": config.endpoint}
        from mlx_traces.models.names import NANO, is_folder, resolve

        local = config.model == NANO or is_folder(config.model)
        return {
            **shared,
            "model_files": fingerprint(resolve(config.model)[0]) if local else None,
            "adapter_files": fingerprint(Path(config.adapter)) if config.adapter else None,
        }


def split_notes(config: Config) -> list[str]:
    """Say that a split which was asked for by name is not there: a file has none, so all of it is read."""
    named = "split" in config.model_fields_set and "[" not in config.split
    if not (named and config.data and is_file(config.data)):
        return []
    return [f"{config.data} has no splits: {config.split!r} is all of it; a part is {config.split + '[:100]'!r}"]


def plan(config: AnswerConfig) -> Plan:
    """Fill in what the settings leave to the task, check names, and load the problems.

    Raises:
        UserError: for an unknown task, prompt or extractor, with the choices; for a missing model or adapter; for bad
            problems; for several samples without a temperature; for settings that do not go with a server, or need one.
    """
    config = endpoint.settled(config)
    if not endpoint.behind(config):
        from mlx_traces.models.names import check, with_adapter

        config = with_adapter(config)
    task = get_task(config.task)
    extractor = config.extractor or task.extractors[0]
    if extractor not in task.extractors:
        raise unknown(f"extractor of {task.name}", extractor, task.extractors)
    if config.samples > 1 and not config.temperature:
        raise UserError(f"--samples {config.samples} would all be alike at temperature 0; pass --temperature")
    if not endpoint.behind(config):
        check(config.model, config.adapter)
    problems = task.load(config.split, config.data, config.limit, config.seed)
    prompt = _prompt(task, config, problems)
    if endpoint.behind(config):
        endpoint.refuse_prefill(prompt)
    return Plan(config, task, prompt, extractor, problems)


def _prompt(task: Task, config: AnswerConfig, problems: list[Problem]) -> Prompt:
    """Find the prompt by name or file, and apply ``system`` and ``prefill``; no problem is its own worked example."""
    name = config.prompt or task.default_prompt
    if name in task.prompts:
        prompt = task.prompts[name]
    elif name in task.few_shot:
        prompt = task.few_shot[name](
            config.shots, config.seed, config.shots_data, frozenset(problem.id for problem in problems)
        )
    elif name.endswith((".yaml", ".yml")):
        prompt = load_prompt(Path(name), task.gold_columns)
    else:
        raise unknown(f"prompt of {task.name}", name, (*task.styles, "FILE.yaml"))
    changes = {key: getattr(config, key) for key in ("system", "prefill") if getattr(config, key) is not None}
    return replace(prompt, **changes)


def evaluate(
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    runs_dir: str | Path = "runs",
    config: EvalConfig | None = None,
    **settings: Any,
) -> EvalResult:
    """Evaluate a model on a task; ``mlx-traces eval`` from Python.

    Args:
        out: the run folder; default: a name made of the settings, under ``runs_dir``.
        resume: continue a run that was cut off; finished samples are kept.
        progress: show a progress bar on stderr.
        runs_dir: where run folders are kept.
        config: complete settings, in place of ``settings``.
        **settings: the fields of ``EvalConfig``: ``model``, ``task``, ``prompt``, ``limit``, ...

    Returns:
        The result; the run folder holds it as ``result.json``, beside every sample.

    Raises:
        UserError: if the input is wrong.
    """
    if config is not None and settings:
        raise UserError(f"give config or {', '.join(settings)}, not both")
    planned = plan(config or build(EvalConfig, settings))
    return run(planned, Path(out) if out else Path(runs_dir) / planned.label, resume, progress)


def run(planned: Plan, path: Path, resume: bool, progress: bool) -> EvalResult:
    """Carry out a plan in the run folder ``path``.

    Raises:
        UserError: if the input is wrong.
        Stopped: after Ctrl-C; what was finished is kept.
    """
    if endpoint.behind(planned.config):
        with _alone(path, resume) as (folder, stop):
            folder.check(planned.identity(), planned.idle)
            with _server(planned, stop) as source:
                return _run(planned, folder, progress, source)
    with distributed.at_work(path, resume) as (folder, stop):
        from mlx_traces.models.loading import of_its_day

        planned = replace(planned, config=of_its_day(planned.config, folder.identity))
        return _run(planned, folder, progress, _engine(planned, stop))


@contextmanager
def _alone(path: Path, resume: bool) -> Iterator[tuple[RunFolder, Stop]]:
    """Begin or continue a run as `ranks.at_work` does, in the one process that asks a server and needs no MLX."""
    RunFolder(path).refuse(resume)
    with held(path / ".lock"), listening() as pressed:
        yield RunFolder(path), pressed


def _engine(planned: Plan, stop: Stop) -> Source:
    """Load the model of a plan."""
    from mlx_traces.models.loading import load
    from mlx_traces.runtime import device

    config = planned.config
    loaded = load(config.model, config.adapter, **config.load_arguments())
    backend = loaded.backend
    device.reset_peak_memory()
    return Source(
        completions_of(loaded, planned, stop=stop),
        {"revision": loaded.revision, "weights": backend.weights, "dtype": backend.dtype, **loaded.shown()},
        ({"own_tags": loaded.own_tags} if loaded.own_tags else {})
        | {"backend": asdict(backend), "rows": config.rows, "ranks": distributed.world().size()}
        | _settled(planned, loaded.path),
        loaded.notes,
        device.peak_memory_gb,
    )


def _settled(planned: Plan, model: Path | None) -> dict[str, Any]:
    settings = {**planned.config.model_dump(mode="json"), "prompt": planned.prompt.name, "extractor": planned.extractor}
    return settled(settings, model, planned.config.adapter, problems=[problem.id for problem in planned.problems])


@contextmanager
def _server(planned: Plan, stop: Stop) -> Iterator[Source]:
    """Reach the server of a plan."""
    config = planned.config
    server = endpoint.Server(config)

    def generate(todo: list[tuple[Problem, int]]) -> Iterator[tuple[int, Answered]]:
        """Yield the server's answers as they come."""
        opened = "" if planned.prompt.chat else planned.prompt.prefill
        seeds = [sample_seed(config.seed, problem.id, sample) for problem, sample in todo]
        pairs = zip(todo, seeds, strict=True)
        asks = [endpoint.ask(config, planned.prompt, problem, seed) for (problem, _), seed in pairs]
        return (
            (index, Answered(asks[index].text, opened, reply.text, reply.tokens, reply.finish_reason))
            for index, reply in endpoint.answers(server, asks, stop)
        )

    try:
        known = server.models()
        details = {"server": {"url": server.url, "models": known}, "concurrency": config.concurrency}
        details |= _settled(planned, None)
        if known and config.model not in known:
            server.notes.append(f"the server's list of models does not name {config.model}")
        yield Source(generate, {}, details, server.notes, lambda: None)
    finally:
        server.close()


def _run(planned: Plan, folder: RunFolder, progress: bool, source: Source) -> EvalResult:
    config = planned.config
    identity = planned.identity() | source.identity
    samples = [rehead(row, planned.extractor) for row in folder.recover(identity, planned.idle)]
    wanted = [(problem, sample) for problem in planned.problems for sample in range(config.samples)]
    done = {(row["id"], row["sample"]) for row in samples}
    todo = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
    completions = source.generate(todo)  # refuses bad requests before anything is written
    folder.begin(identity, {**provenance(), "grader": GRADER, **source.details})
    before = max((row["elapsed"] for row in samples), default=0.0)
    start = perf_counter()
    with _bar(progress, len(wanted), samples) as advance:
        for index, completion in completions:
            problem, sample = todo[index]
            row = grade_sample(planned, problem, sample, completion)
            row["elapsed"] = round(before + perf_counter() - start, 3)
            folder.append([row])
            samples.append(row)
            advance(row)
    if len(samples) < len(wanted):
        raise Stopped(f"stopped after {len(samples):,} of {len(wanted):,} completions")
    order = {(problem.id, sample): place for place, (problem, sample) in enumerate(wanted)}
    samples.sort(key=lambda row: order[row["id"], row["sample"]])
    notes = [*planned.notes, *source.notes]
    result = summarize(planned, samples, folder.path.name, source.memory(), notes)
    folder.finish(samples, asdict(result))
    return result


def rehead(row: Sample, extractor: str) -> Sample:
    """Return a sample with another extractor as its headline; all have judged it already.

    Raises:
        UserError: if that extractor has not.
    """
    if extractor not in row["verdicts"]:
        raise unknown("extractor of this run", extractor, row["verdicts"])
    verdict = row["verdicts"][extractor]
    return row | {"extracted": row["extractions"][extractor], "correct": verdict == "correct", "verdict": verdict}


def measure(loaded: Any, planned: Plan) -> list[Sample]:
    """Answer a plan's problems by a model that is loaded, in memory; samples come in the problems' order."""
    todo = [(problem, sample) for problem in planned.problems for sample in range(planned.config.samples)]
    rows: list[Sample] = [{}] * len(todo)
    for index, completion in completions_of(loaded, planned)(todo):
        rows[index] = grade_sample(planned, *todo[index], completion)
    return rows


def completions_of(
    loaded: Any, planned: Plan, logprobs: bool = False, stop: Callable[[], bool] | None = None
) -> Generate:
    """Make the plain function from (problem, sample) pairs to completions, as they finish, until ``stop`` says so."""
    from mlx_traces.engine.generate import generate
    from mlx_traces.engine.sampling import Request, SamplingParams

    config = planned.config
    params = SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=planned.prompt.stop,
    )

    def completions(todo: list[tuple[Problem, int]]) -> Iterator[tuple[int, Completion]]:
        rendered = [loaded.render(planned.prompt, problem, config.thinking) for problem, _ in todo]
        seeds = [sample_seed(config.seed, problem.id, sample) for problem, sample in todo]
        requests = [Request(asked.ids, seed) for asked, seed in zip(rendered, seeds, strict=True)]

        def sampled(indices: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
            """Complete some requests."""
            asked = [requests[index] for index in indices]
            done = generate(loaded, asked, params, config.rows, logprobs=logprobs, memory_gb=config.memory_limit)
            return ((indices[place], rollout) for place, rollout in done)

        whole = sampled(range(len(requests)))  # refuses bad requests, on every rank alike
        return (
            (index, Completion(rendered[index].text, rendered[index].opened, rollout, loaded.own_tags))
            for index, rollout in _shared_out(whole, sampled, len(requests), 4 * config.rows, stop)
        )

    return completions


def _shared_out(
    whole: Iterator[tuple[int, Rollout]],
    sampled: Callable[[Sequence[int]], Iterator[tuple[int, Rollout]]],
    count: int,
    wave: int,
    stop: Callable[[], bool] | None,
) -> Iterator[tuple[int, Rollout]]:
    """Let every rank complete its part and hand it to the others, ``wave`` rollouts a rank at a time.

    One process alone completes the ``whole``, and hands on each rollout at once. After what is handed on, ``stop`` is
    asked.
    """
    size = distributed.world().size()
    if size == 1:
        for found in whole:
            yield found
            if stop and stop():
                return
        return
    for start in range(0, count, wave * size):
        part = range(start, min(count, start + wave * size))
        own = [(index, asdict(rollout)) for index, rollout in sampled([part[i] for i in distributed.share(len(part))])]
        for index, fields in distributed.gather(own):
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            yield index, Rollout(**fields | lists)
        if stop and stop():
            return


@contextmanager
def _bar(show: bool, total: int, samples: list[Sample]) -> Iterator[Callable[[Sample], None]]:
    """Yield a function to call with each finished sample; it drives the progress on stderr."""
    if not show:
        yield lambda row: None
        return
    from mlx_traces.runtime.progress import progress

    correct, tokens, start = sum(row["correct"] for row in samples), 0, perf_counter()
    done = len(samples)
    with progress("eval") as shown:
        shown.update(done, total)

        def advance(row: Sample) -> None:
            nonlocal correct, tokens, done
            correct, tokens, done = correct + row["correct"], tokens + (row["tokens"] or 0), done + 1
            speed = tokens / (perf_counter() - start)
            shown.update(done, total, [f"{100 * correct / done:.1f} % correct", f"{speed:.0f} tokens/s"])

        yield advance


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """Return the 64-bit seed of one completion's random stream; it depends on nothing else in the run."""
    digest = hashlib.sha256(f"{seed} {problem_id} {sample}".encode()).digest()
    return int.from_bytes(digest[:8])


def grade_sample(planned: Plan, problem: Problem, sample: int, completion: Completion | Answered) -> Sample:
    """Judge one completion and make its line of ``samples.jsonl``."""
    scores = planned.task.grade(problem, completion.whole)
    headline = scores[planned.extractor]
    notes = {name: score.note for name, score in scores.items() if score.note}
    return {
        "id": problem.id,
        "sample": sample,
        "question": question_of(planned.task, problem),
        "prompt": completion.prompt,
        "completion": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "extracted": headline.extracted,
        "extractions": {name: score.extracted for name, score in scores.items()},
        "verdicts": {name: score.verdict for name, score in scores.items()},
        "gold": problem.gold,
        "correct": headline.correct,
        "verdict": headline.verdict,
        "stratum": problem.stratum,
    } | ({"notes": notes} if notes else {})


def question_of(task: Task, problem: Problem) -> str:
    """Return the question as one text, for tables."""
    if "question" in problem.columns:
        return str(problem.columns["question"])
    return ", ".join(f"{column} {problem.columns[column]}" for column in task.columns)


def summarize(
    planned: Plan, samples: list[Sample], run_name: str, memory_gb: float | None, notes: list[str]
) -> EvalResult:
    """Compute a result from graded samples, in any order; figures of tokens are None if not all were counted."""
    config = planned.config
    counts = [row["tokens"] for row in samples]
    tokens = None if None in counts else sum(counts)
    uncounted, unsaid = counts.count(None), sum(row["finish_reason"] == "unknown" for row in samples)
    said = [f"the server gave no count of tokens for {uncounted:,} of {len(counts):,} completions"] if uncounted else []
    said += [f"the server did not say why {unsaid:,} of {len(counts):,} completions ended"] if unsaid else []
    seconds = max(row["elapsed"] for row in samples)
    overall = accuracy_of(samples, lambda row: row["correct"])
    strata = sorted({row["stratum"] for row in samples} - {""})
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
            name: accuracy_of([row for row in samples if row["stratum"] == name], lambda row: row["correct"])
            for name in strata
        },
        extractors={
            name: accuracy_of(samples, lambda row, name=name: row["verdicts"][name] == "correct")
            for name in planned.task.extractors
        },
        **_at_k(planned, samples),
        notes=[*notes, *said],
    )


def accuracy_of(samples: Iterable[Sample], correct: Callable[[Sample], bool]) -> dict[str, Any]:
    """Return accuracy, counts and the 95 % interval; completions of one problem count as a cluster."""
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for row in samples:
        by_problem[row["id"]].append(correct(row))
    return stats.accuracy(list(by_problem.values()))


def _at_k(planned: Plan, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Return unbiased pass@k and maj@k for k = 1, 2, 4, ... and the number of samples.

    The first k completions vote; what the grader takes for one answer is one.
    """
    if (n := planned.config.samples) == 1:
        return {"pass_at_k": {}, "maj_at_k": {}}
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in samples:
        groups[row["id"]].append(row)
    ks = sorted({1 << i for i in range(n.bit_length())} & set(range(1, n + 1)) | {n})
    passes = {str(k): 0.0 for k in ks}
    votes = {str(k): 0.0 for k in ks}
    for rows in groups.values():
        count = sum(row["correct"] for row in rows)
        answers = planned.task.votes((row["extracted"] for row in rows), rows[0]["gold"], planned.extractor)
        for k in ks:
            passes[str(k)] += stats.pass_at_k(len(rows), count, k) / len(groups)
            winner = stats.majority(answers[:k])
            won = any(row["correct"] for row, answer in zip(rows[:k], answers, strict=False) if answer == winner)
            votes[str(k)] += won / len(groups)
    return {"pass_at_k": passes, "maj_at_k": votes}


def regrade(task: Task, row: dict[str, Any], where: str) -> dict[str, Score]:
    """Judge a completion made anywhere: a row with ``completion`` and the task's graded columns."""
    completion = row["completion"]
    if not isinstance(completion, str):
        raise UserError(f"{where}: 'completion' must be a text, not {type(completion).__name__}")
    return task.grade(task.parse(row, where), completion)
