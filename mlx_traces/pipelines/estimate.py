"""What the rounds will take on this machine, told before they begin: nothing is trained and no file is written.

The work follows from the settings and from what is there already; the speed from a probe of a few seconds with the
model itself, an adapter on it: a few decoding steps at the station's rows, and the gradient of one micro-batch.
Memory is ``memory``'s estimate. How long completions will be is the mean of earlier evaluations of the same model, task
and prompt, or, without any, `LENGTH` of ``max_tokens``, which is the upper bound.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from mlx_traces.config import (
    CompareConfig,
    EvalConfig,
    GenerateConfig,
    GRPOConfig,
    PPOConfig,
    RLConfig,
    RoundsConfig,
    ScoreConfig,
    SFTConfig,
    read_config,
)
from mlx_traces.engine import logprobs
from mlx_traces.engine.batching import Example
from mlx_traces.engine.generation import Usage, generate
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.models import adapters, loading, names
from mlx_traces.models.names import NANO, is_folder
from mlx_traces.pipelines import rounds
from mlx_traces.pipelines.rounds import Station
from mlx_traces.readers import read_json
from mlx_traces.records import Trace
from mlx_traces.rl import rollouts
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.text import duration
from mlx_traces.traces import encoding, files
from mlx_traces.traces.files import read_traces
from mlx_traces.train import gradients, loop, memory, sft
from mlx_traces.train.memory import Estimate, Most

if TYPE_CHECKING:
    from mlx_traces.models.loading import LoadedModel


LENGTH = 0.5  # of max_tokens, where no earlier run tells how long completions are
CORRECT = 0.5  # of the completions, where no earlier run tells; the filter keeps those
FORWARD = 1 / 3  # of a gradient's time, for log-probabilities alone
PROBE_SECONDS = 2.0
REPEATS = 3  # of a measurement; the fastest counts, as other work only slows it
LEAST_SHARE = 0.7  # of a core's time that a probe on the CPU should get
PROBED = 64  # problems or traces whose lengths stand for all
MOST_STEPS = 32  # of a decoding probe


@dataclass(frozen=True)
class Forecast:
    """Seconds, about and at most; peak memory in 1e9 bytes; what they follow from; a warning. None: no model runs.

    ``most`` is with every completion at ``max_tokens`` and none dropped, at the speed that was measured.
    """

    seconds: float | None
    most: float | None
    memory_gb: float | None
    told: str
    note: str | None = None


def lines(config: RoundsConfig) -> list[str]:
    """Return the plan as lines: a table of the stations, and what the estimates follow from.

    Raises:
        UserError: if the settings are wrong. Where they are right and the rounds would end with an error all the same,
            as without the data, the last line says so.
    """
    plan = rounds.stations(config, nullcontext)  # no bar is shown
    compared = rounds.comparison_of(config, plan)
    found: dict[str, Forecast] = {}
    missing, notes = compared.evals, []
    try:
        rounds.check(plan, compared)
        missing = _missing(compared)
        found, notes = _estimates(config, plan, missing, len(compared.evals))
    except UserError as error:
        notes = [f"no estimates, and the rounds would end with: {error}"]
    rows = [("station", "state", "about", "at most", "memory", "output")]
    ends = [(station.name, station.out, station.finished) for station in plan]
    ends.append(("comparison", Path(compared.out or ""), not missing))
    for name, out, there in ends:
        rows.append((name, "there" if there else "to make", *_figures(found.get(name)), str(out)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = ["  ".join([*(c.ljust(w) for c, w in zip(row[:5], widths, strict=True)), row[5]]) for row in rows]
    return [*table, *([""] if notes else []), *notes]


def _estimates(
    config: RoundsConfig, plan: list[Station], missing: Sequence[EvalConfig], count: int
) -> tuple[dict[str, Forecast], list[str]]:
    """Return the forecasts of what is left, by station, and the lines that belong to them."""
    left, spec = [station for station in plan if not station.finished], names.split_adapter(config.model)[0]
    if not left and not missing:
        return {}, []
    if not _is_here(spec):
        return {}, [f"no estimates: {spec} is not on this machine yet, and the rounds will download it"]
    outlook = Outlook(config, plan)
    found = {station.name: outlook.of(station) for station in left}
    if missing:
        found["comparison"] = outlook.of_comparison(missing, count)
    return found, [f"{name}: {one.told}" for name, one in found.items()] + outlook.notes(found)


def _is_here(spec: str) -> bool:
    return spec == names.NANO or names.is_folder(spec) or spec.partition("@")[0] in names.cached_models()


def _figures(found: Forecast | None) -> tuple[str, str, str]:
    if found is None:
        return "–", "–", "–"
    times = ("–" if value is None else duration(value) for value in (found.seconds, found.most))
    return *times, "–" if found.memory_gb is None else f"{found.memory_gb:.2f} GB"


def _missing(compared: CompareConfig) -> list[EvalConfig]:
    """Return the comparison's evaluations that are not there."""

    def there(settings: EvalConfig) -> bool:
        if settings.adapter and not Path(settings.adapter).is_dir():
            return False
        return RunFolder(Path(compared.runs_dir) / evaluator.plan(settings).label).finished

    return [settings for settings in compared.evals if not there(settings)]


# ------------------------------------------------------------------------------------------------ this machine


class Probe:
    """How fast a model is here, ready to train; each speed is measured once, in about `PROBE_SECONDS`."""

    def __init__(self, loaded: loading.LoadedModel, prompts: Sequence[tuple[int, ...]]) -> None:
        self.loaded, self.prompts = loaded, list(prompts)
        self.halves = logprobs.split(loaded.model)
        self.began = perf_counter(), process_time()
        self.known: dict[Any, Any] = {}

    @property
    def disturbed(self) -> str | None:
        """A line if other work took the processor away, so that what was measured is too slow; None on a GPU."""
        wall, own = (now() - before for now, before in zip((perf_counter, process_time), self.began, strict=True))
        if self.loaded.backend.name != "cpu" or own > LEAST_SHARE * wall:
            return None
        return f"other work left {own / wall:.0%} of a core to the probe; on a free machine these times are shorter"

    def sampling(self, rows: int, max_tokens: int, limit: float | None) -> tuple[float, float]:
        """Return prompt tokens read and completion tokens sampled in a second, ``rows`` completions at once."""
        key = "sampling", rows, max_tokens, limit
        if key not in self.known:
            self.loaded.model.eval()
            with adapters.merged(self.loaded.model):
                self._sampled(rows, 1, limit)  # compiles kernels
                runs = [self._sampled(rows, 2, limit)]
                usage, seconds = runs[0]
                steps = max(2, min(MOST_STEPS, max_tokens, int(PROBE_SECONDS / REPEATS * usage.steps / seconds)))
                while len(runs) <= REPEATS and sum(seconds for _, seconds in runs) < PROBE_SECONDS:
                    runs.append(self._sampled(rows, steps, limit))
            read = max(usage.prompt_tokens / usage.prompt_seconds for usage, _ in runs)
            self.known[key] = read, max(usage.row_steps / seconds for usage, seconds in runs)
        return self.known[key]

    def _sampled(self, rows: int, max_tokens: int, limit: float | None) -> tuple[Usage, float]:
        """Return what the engine did for some completions, and the seconds that it decoded."""
        usage, params = Usage(), SamplingParams(max_tokens=max_tokens, temperature=1.0)
        requests = [Request(self.prompts[row % len(self.prompts)], row) for row in range(rows)]
        began, made = perf_counter(), 0
        for _, rollout in generate(self.loaded, requests, params, rows, logprobs=True, memory_gb=limit, usage=usage):
            made += len(rollout.completion_ids)
        seconds = perf_counter() - began
        if not usage.steps:  # mlx_lm's generator, which tells nothing
            usage.steps, usage.row_steps = max_tokens, made
            usage.prompt_tokens, usage.prompt_seconds = sum(len(r.prompt_ids) for r in requests), seconds
        return usage, max(seconds - usage.prompt_seconds, seconds / 100)

    def training(self, config: SFTConfig | RLConfig, length: int, learned: int) -> float:
        """Return tokens a second of the gradient of sequences of ``length`` tokens, the last ``learned`` of them so.

        It is that of one micro-batch, or of as much of it as the time allows.
        """
        key = "training", length, learned, config.micro_tokens, config.checkpoint_layers, config.logits_mb
        if key not in self.known:
            size, count = min(length, 64), 1
            self._gradient(config, size, min(learned, size), count)  # compiles kernels
            spent = [self._gradient(config, size, min(learned, size), count)]
            affordable = int(PROBE_SECONDS / REPEATS * size / spent[0])
            if affordable > size:  # else this is all that there is time for
                size = min(length, affordable)
                count = max(1, min(affordable, config.micro_tokens) // size)
                spent = [self._gradient(config, size, min(learned, size), count) for _ in range(1 + REPEATS)]
            self.known[key] = count * size / min(spent)
        return self.known[key]

    def _gradient(self, config: SFTConfig | RLConfig, length: int, learned: int, count: int) -> float:
        """Return the seconds of one gradient; no weight changes."""
        ids = [token for prompt in self.prompts for token in prompt]
        ids = tuple((ids * (length // len(ids) + 1))[:length])
        batch = [Example("probe", ids, (False,) * (length - learned) + (True,) * learned)] * count
        began = perf_counter()
        with gradients.checkpointed(self.loaded.model.layers, config.checkpoint_layers):
            sft.step_gradient(self.loaded.model, self.halves, batch, config)
        return perf_counter() - began


# ------------------------------------------------------------------------------------------------ the work


@dataclass(frozen=True)
class Asked:
    """What is sampled: problems, completions of each, mean and longest prompt in tokens, and how long completions are.

    ``tokens`` are about and at most.
    """

    problems: int
    samples: int
    prompt: float
    longest: int
    tokens: tuple[float, float]
    rows: int
    limit: float | None
    drawn: float

    @property
    def completions(self) -> int:
        """How many completions there are."""
        return self.problems * self.samples


class Outlook:
    """The forecasts of a plan's stations; models and traces are read once, when they are first needed."""

    def __init__(self, config: RoundsConfig, plan: Sequence[Station]) -> None:
        self.config, self.plan = config, {station.name: station for station in plan}
        self.first = rounds.trainings(list(plan))[0].recipe
        self.spec, self.adapter = names.split_adapter(config.model)
        prompt = config.compare.prompt or config.prompt
        self.earlier = earlier(config.runs_dir, self.spec, config.task, {prompt, config.prompt})

    @cached_property
    def probe(self) -> Probe:
        """The model with the adapter that is trained, and its speeds."""
        loaded = loading.load(self.spec, self.adapter, **self.first.load_arguments())
        adapters.start(loaded.model, self.first, self.adapter)
        settings = self.config.compare.model_copy(
            update={"model": self.spec, "task": self.config.task, "prompt": self.config.prompt}
        )
        planned = evaluator.plan(settings)
        prompts = [loaded.render(planned.prompt, problem).ids for problem in planned.problems[:4]]
        return Probe(loaded, prompts)

    @cached_property
    def raw(self) -> tuple[list[Trace], float]:
        """The first station's traces, as they are or would be, and the seconds that this took."""
        station, began = self.plan["raw"], perf_counter()
        if station.finished:
            return [trace for _, trace in files.read_traces(station.out)], 0.0
        return list(rounds.raw_traces(self.config, Counter())[0]), perf_counter() - began

    def of(self, station: Station) -> Forecast:
        """Return a station's forecast."""
        recipe = station.recipe
        if station.name == "raw":
            made, seconds = self.raw
            return Forecast(seconds, seconds, None, f"{len(made):,} traces; made just now to count them, and dropped")
        if isinstance(recipe, GenerateConfig):
            asked = self._asked(evaluator.plan(recipe.model_copy(update={"adapter": None})), recipe)
            return self._sampling(asked, asked.problems, "")
        if isinstance(recipe, SFTConfig):
            return self._sft(station, recipe)
        if isinstance(recipe, RLConfig):
            return self._reinforcement(recipe)
        readers = [recipe.model, recipe.judge] if isinstance(recipe, ScoreConfig) else []
        names = " and ".join(name for name in readers if name)
        told = f"every completion is read by {names}, which is not estimated" if names else "no model runs"
        return Forecast(None, None, None, told)

    def of_comparison(self, missing: Sequence[EvalConfig], count: int) -> Forecast:
        """Return the forecast of the evaluations that are missing."""
        asked = self._asked(evaluator.plan(missing[0].model_copy(update={"adapter": None})), missing[0])
        return self._sampling(asked, asked.problems * len(missing), f"{len(missing)} of {count} evaluations, each of ")

    def notes(self, found: dict[str, Forecast]) -> list[str]:
        """Return the sums, what they rest on, and what does not fit."""
        backend, known = self.probe.loaded.backend, [one for one in found.values() if one.seconds is not None]
        total, most = (sum(getattr(one, name) for one in known) for name in ("seconds", "most"))
        peak = max((one.memory_gb for one in known if one.memory_gb), default=0.0)
        runs, share = len(self.earlier), f"{LENGTH:.0%} of max_tokens, as no earlier run tells"
        length = f"the mean of {runs} earlier run{'s' * (runs > 1)}" if runs else share
        told = [
            f"in all about {duration(total)}, at most {duration(most)}, and {peak:.2f} GB; {backend.description}",
            f"about: the length of completions is {length}; at most: all of them reach max_tokens and none is dropped",
            "both: at the best speed of a short probe just now; loading models, scores, reports and files come on top",
        ]
        warnings = [f"{name}: {one.note}" for name, one in found.items() if one.note]
        warnings += filter(None, [self.probe.disturbed])
        return told + [f"note: {line}" for line in dict.fromkeys([*warnings, *self.probe.loaded.notes])]

    # -------------------------------------------------------------------------------- one kind of work each

    def _asked(self, planned: Plan, config: Any, samples: int | None = None, problems: int | None = None) -> Asked:
        loaded = self.probe.loaded
        some = planned.problems[:PROBED]
        lengths = [len(loaded.render(planned.prompt, problem).ids) for problem in some]
        about = min(_mean([run["mean_tokens"] for run in self.earlier], LENGTH * config.max_tokens), config.max_tokens)
        return Asked(
            problems or len(planned.problems),
            samples or getattr(config, "samples", 1),
            sum(lengths) / len(lengths),
            max(lengths),
            (about, config.max_tokens),
            config.rows,
            getattr(config, "memory_limit", None),
            memory.buffers_of_a_draw(config),
        )

    def _spent(self, asked: Asked) -> tuple[float, float]:
        """Return the seconds that completions take, about and at most."""
        rows = min(asked.rows, asked.completions)
        read, sampled = self.probe.sampling(rows, int(asked.tokens[1]), asked.limit)
        prompts = asked.problems * asked.prompt / read
        return tuple(prompts + asked.completions * tokens / sampled for tokens in asked.tokens)

    def _memory(self, asked: Asked) -> float:
        most = int(asked.tokens[1])
        sizes = asked.longest, most, asked.rows, asked.completions, asked.limit, asked.drawn
        return memory.of_sampling(self.probe.loaded, *sizes)

    def _sampling(self, asked: Asked, problems: int, before: str) -> Forecast:
        times = problems / asked.problems
        rows = min(asked.rows, asked.completions)
        speed = self.probe.sampling(rows, int(asked.tokens[1]), asked.limit)[1]
        about, most = (times * seconds for seconds in self._spent(asked))
        each = f" x {asked.samples}" if asked.samples > 1 else ""
        told = f"{before}{asked.problems:,} problems{each}, {_tokens(asked)}, {speed:,.0f} tokens/s with {rows} rows"
        return Forecast(about, most, self._memory(asked), told)

    def _held_out(self, config: RLConfig | SFTConfig, times: int) -> tuple[float, float, float, str]:
        """Return seconds about and at most, memory, and words, of the problems answered at validations."""
        planned = loop.held_out_plan(self.spec, config)
        if planned is None:
            return 0.0, 0.0, 0.0, ""
        asked = self._asked(planned, config.evaluate)
        about, most = self._spent(asked)
        return times * about, times * most, self._memory(asked), f", {times} validations of {asked.problems:,} problems"

    def _sft(self, station: Station, config: SFTConfig) -> Forecast:
        (count, length), (most_count, most_length), longest, words = (
            self._given(config) if station.name == "epoch1" else self._own(config)
        )
        trained = 1 - config.valid_share
        rate = self.probe.training(config, max(2, round(length)), max(1, round(length / 2)))
        steps = [math.ceil(n * trained / config.batch_size) * config.epochs for n in (count, most_count)]
        every = [config.eval_every or max(1, n // config.epochs) for n in steps]
        checks = [1 + math.ceil(n / each) for n, each in zip(steps, every, strict=True)]
        about, _, memory_gb, answered = self._held_out(config, checks[0])
        _, most, _, _ = self._held_out(config, checks[1])
        seconds = [
            n * size / rate * (trained * config.epochs + FORWARD * config.valid_share * times)
            for n, size, times in ((count, length, checks[0]), (most_count, most_length, checks[1]))
        ]
        estimate = memory.of_sft(self.probe.loaded, config, min(longest, config.max_length))
        told = (
            f"{words} of about {length:.0f} tokens, prompts included, {config.epochs} x, {rate:,.0f} tokens/s{answered}"
        )
        return self._training(seconds[0] + about, seconds[1] + most, estimate, memory_gb, told)

    def _given(self, config: SFTConfig) -> tuple[tuple[float, float], tuple[float, float], int, str]:
        """Return number and mean length of the raw traces, about and at most, the longest, and words."""
        made, _ = self.raw
        if not made:
            raise UserError(f"{config.data}: no traces to train on")
        some = random.Random(0).sample(made, min(PROBED, len(made)))
        mean, longest = self._lengths(some, config)
        return (len(made), mean), (len(made), mean), longest, f"{len(made):,} traces"

    def _lengths(self, some: Sequence[Trace], config: SFTConfig) -> tuple[float, int]:
        how = config.max_length, config.over_long, config.thinking
        encoded = encoding.encode_all(self.probe.loaded, ((trace.id, trace) for trace in some), *how)
        lengths = [len(example.ids) for example in encoded.examples] or [config.max_length]
        return sum(lengths) / len(lengths), max(lengths)

    def _own(self, config: SFTConfig) -> tuple[tuple[float, float], tuple[float, float], int, str]:
        """The same of the traces that the filter will have kept."""
        if self.plan["filtered"].finished:
            kept = [trace for _, trace in files.read_traces(self.plan["filtered"].out)]
            mean, longest = self._lengths(kept[:PROBED], config)
            return (len(kept), mean), (len(kept), mean), longest, f"{len(kept):,} traces"
        drawn = self.plan["generated"].recipe
        asked = self._asked(evaluator.plan(drawn.model_copy(update={"adapter": None})), drawn)
        right = _mean([run["accuracy"] for run in self.earlier], CORRECT)
        most = asked.problems * min(asked.samples, self.config.filter.per_problem or asked.samples)
        count = min(most, right * asked.completions)
        mean, longest = (min(asked.prompt + tokens, config.max_length) for tokens in asked.tokens)
        words = f"{count:,.0f} traces if {right:.0%} of the completions are kept, {most:,} at most,"
        return (count, mean), (most, longest), int(asked.longest + asked.tokens[1]), words

    def _reinforcement(self, config: RLConfig) -> Forecast:
        planned, _, _ = rollouts.prepare(config.model_copy(update={"adapter": None}))
        try:
            longest = rollouts.longest_prompt(self.probe.loaded, planned)
        except UserError as error:
            raise UserError(f"round3: {error}") from None
        asked = self._asked(planned, config, config.group_size, config.prompts_per_step)
        asked = replace(asked, longest=longest)
        shared = isinstance(config, GRPOConfig) and not config.checkpoint_layers
        prompts = asked.prompt / (config.group_size if shared else 1)  # a group's prompt is read once
        length = max(2, round(asked.prompt + asked.tokens[0]))
        rate = self.probe.training(config, length, max(1, round(asked.tokens[0])))
        passes = _passes(config)
        sampled = self._spent(asked)
        updated = [asked.completions * (prompts + tokens) * passes / rate for tokens in asked.tokens]
        checks = 1 + math.ceil(config.num_steps / config.eval_every)
        *answered, memory_gb, words = self._held_out(config, checks)
        probed = 0.0
        if (config.pass_rate_low, config.pass_rate_high) != (0, 1):
            probed = len(planned.problems) * config.probe_samples / asked.completions
            words += f", {len(planned.problems):,} problems x {config.probe_samples} for their pass rates"
        about, most = (
            config.num_steps * (one + update) + probed * one + held_out
            for one, update, held_out in zip(sampled, updated, answered, strict=True)
        )
        estimate = memory.of_reinforcement(self.probe.loaded, config, asked.longest)
        rows = min(asked.rows, asked.completions)
        speed = self.probe.sampling(rows, config.max_tokens, asked.limit)[1]
        told = (
            f"{config.num_steps} steps of {asked.problems} problems x {asked.samples}, {_tokens(asked)}, sampling "
            f"{speed:,.0f} tokens/s with {rows} rows, updates {rate:,.0f} tokens/s if every group teaches{words}"
        )
        return self._training(about, most, estimate, memory_gb, told)

    def _training(
        self, about: float, most: float, estimate: memory.Estimate, answering_gb: float, told: str
    ) -> Forecast:
        note = memory.fits(estimate, self.probe.loaded.backend)
        return Forecast(about, most, max(estimate.peak, answering_gb), told, note)


def _tokens(asked: Asked) -> str:
    return f"about {asked.tokens[0]:.0f} tokens each and at most {asked.tokens[1]:,}"


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _passes(config: RLConfig) -> float:
    """Return how often a step's tokens go through the model, a gradient being 1."""
    reads = bool(config.kl_coef)
    if isinstance(config, PPOConfig):
        return config.epochs + FORWARD * (1 + reads)
    several = config.updates_per_batch * config.minibatches > 1
    return config.updates_per_batch + FORWARD * (several + reads)


def earlier(runs_dir: str | Path, model: str, task: str, prompts: set[str]) -> list[dict[str, Any]]:
    """Return the results of finished evaluations of a model, with or without adapter, on a task in these prompts."""
    found = []
    for file in sorted(Path(runs_dir).glob("*/result.json")):
        with suppress(UserError):  # a broken one is another command's to complain of
            result = read_json(file)
            same = (result.get("model"), result.get("task")) == (model, task) and result.get("prompt") in prompts
            if same and {"mean_tokens", "accuracy"} <= result.keys():
                found.append(result)
    return found


KINDS = {"sft": SFTConfig, "grpo": GRPOConfig, "ppo": PPOConfig}
LARGEST_PROBED = 256  # problems whose longest prompt stands for all
READ = 2_000  # traces likewise
NO_CONTEXT = 1 << 17  # tokens, of a model that states no limit
PARTS = {
    "weights": "weights and adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "merged": "merged weights",
    "cache": "key-value cache",
    "reading": "reading prompts",
    "draw": "drawing tokens",
    "activations": "activations",
    "logits": "logits chunk",
}


@dataclass(frozen=True)
class Planned:
    """The estimate, what it was made from in words, what does not fit (None: all does), and the largest settings."""

    estimate: Estimate
    told: str
    memory_gb: float
    fault: str | None
    most: dict[str, Most]

    def lines(self) -> list[str]:
        """Say it all in a table of text; parts that take nothing are left out."""
        found, values = self.estimate, asdict(self.estimate)
        parts = [f"  {label:<20} {values[name]:8.3f} GB" for name, label in PARTS.items() if values[name]]
        sampling = f"sampling {found.sampling:.3f} GB, " if found.rows else ""
        peak = f"  most: {sampling}update {found.update:.3f} GB; the device has {self.memory_gb:g} GB"
        rows = f"{found.rows} rows, " if found.rows else ""
        plural = "" if found.micro_rows == 1 else "s"
        alone = f"  taken: {rows}micro-batches of {found.micro_rows} sequence{plural}"
        return [self.told, *parts, peak, alone, f"  {self.fault or 'it fits'}", *map(self._largest, self.most)]

    def _largest(self, name: str) -> str:
        most = self.most[name]
        if most.value is None:
            return f"  largest {name}: none fits"
        why = {"rows": "all of a step", "micro_tokens": "all of a step at once"}.get(name, "the model's context")
        return f"  largest {name}: {most.value:,}{f' ({why})' if most.value == most.top else ''}"


def kind_of(path: Path) -> str:
    """Return the recipe of a configuration: the command in its first line of comment.

    Raises:
        UserError: if the file cannot be read, or that line names no training.
    """
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    match = re.match(r"#\s*mlx-traces (\S+)", first)
    if match is None or match[1] not in KINDS:
        found = f"names {match[1]!r}" if match else "names no command"
        raise UserError(f"{path}: its first line {found}; plan knows sft, grpo and ppo: pass --kind")
    return match[1]


def plan(path: str | Path, kind: str | None = None) -> Planned:
    """Foresee a training's memory; ``mlx-traces plan`` from Python. Nothing is trained, downloaded or written.

    Args:
        path: the YAML file of ``sft``, ``grpo`` or ``ppo``.
        kind: which of them; default: as its first line says.

    Raises:
        UserError: if the configuration is wrong, or its model or problems are not here.
    """
    path = Path(path)
    kind = kind or kind_of(path)
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    config = read_config(KINDS[kind], path, {})
    from mlx_traces.models import adapters, loading, names

    config = names.with_adapter(config)
    _refuse_absent(config.model)
    loaded = loading.load(config.model, config.adapter, **config.load_arguments())
    adapters.start(loaded.model, config, config.adapter)
    if isinstance(config, RLConfig):
        prompt, of = _longest_prompt(loaded, config)
        sizes = memory.sizes_of_reinforcement(loaded, config, prompt)
        length = f"prompts of {prompt} tokens ({of}) and completions of {config.max_tokens}"
    else:
        longest, of = _longest_trace(loaded, config)
        sizes = memory.sizes_of_sft(config, longest)
        length = f"sequences of {longest} tokens ({of})"
    shape, limit = memory.shape_of(loaded), loaded.backend.memory_gb
    estimate = memory.estimate(shape, **sizes)
    most = memory.largest(shape, sizes, limit, loaded.context or NO_CONTEXT)
    told = f"{kind} of {config.model} on {loaded.backend.description}: {length}"
    return Planned(estimate, told, limit, memory.fits(estimate, loaded.backend), most)


def _refuse_absent(model: str) -> None:
    """Raise UserError for a hub model that was not downloaded: a plan downloads nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, _, revision = model.partition("@")
    if model == NANO or is_folder(model) or model.count("/") != 1:
        return
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except HFValidationError:
        return  # loading it says what is wrong
    if not isinstance(found, str):
        raise UserError(
            f"{model} is not on this machine; eval --model {model} --limit 1 downloads it, or name a folder"
        )


def _longest_prompt(loaded: "LoadedModel", config: RLConfig) -> tuple[int, str]:
    few = math.ceil(LARGEST_PROBED / config.prompts_per_step)
    planned, _, _ = rollouts.prepare(config.model_copy(update={"num_steps": min(config.num_steps, few)}))
    return rollouts.longest_prompt(loaded, planned), f"the longest of {len(planned.problems):,}"


def _longest_trace(loaded: "LoadedModel", config: SFTConfig) -> tuple[int, str]:
    """Return the tokens of the longest trace; ``max_length`` where the traces are not made yet."""
    if not Path(config.data).exists():
        return config.max_length, f"max_length, as {config.data} is not there yet"
    rows = islice(read_traces(Path(config.data)), READ)
    encoded = encoding.encode_all(loaded, rows, config.max_length, config.over_long, config.thinking).examples
    if not encoded:
        raise UserError(f"{config.data}: no traces to train on; raise max_length ({config.max_length})")
    return max(len(example.ids) for example in encoded), f"the longest of {len(encoded):,}"
