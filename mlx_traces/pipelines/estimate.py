"""Estimate what the rounds, or one training, will take before they begin: problems, maximum tokens, and memory.

The estimates follow from the settings, the model's sizes and the data; nothing is trained, downloaded or written.
`train.memory` estimates memory.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from mlx_traces.config import (
    SIZES,
    CompareConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    GRPOConfig,
    PPOConfig,
    RLConfig,
    RoundsConfig,
    ScoreConfig,
    SFTConfig,
    read_config,
)
from mlx_traces.errors import MOST_NAME, UserError, choices, did_you_mean, unknown
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.models import adapters, loading, names
from mlx_traces.models.loading import LoadedModel
from mlx_traces.pipelines import rounds
from mlx_traces.pipelines.rounds import Stage
from mlx_traces.records import Trace
from mlx_traces.rl import rollouts
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.traces import encoding
from mlx_traces.traces.files import read_traces
from mlx_traces.train import loop, memory
from mlx_traces.train.memory import Estimate, Most
from mlx_traces.yaml_files import read_yaml

READ = 2_000  # traces that are read to find the longest
LARGEST_PROBED = 256  # problems whose prompts are measured to find the longest


@dataclass(frozen=True)
class Forecast:
    """Upper bounds for a stage: tokens sampled and trained on, and memory in 1e9 bytes; None if no model runs.

    ``told`` says what they are computed from, ``note`` what does not fit.
    """

    tokens: int | None
    memory_gb: float | None
    told: str
    note: str | None = None


def lines(config: RoundsConfig) -> list[str]:
    """Return the plan as lines: a table of the stages, and what the estimates are computed from.

    Raises:
        UserError: if the settings are wrong. The last line has any other error that the rounds would end with, such as
            missing data.
    """
    plan = rounds.stages(config, nullcontext)  # without progress bars
    compared = rounds.comparison_of(config, plan)
    found: dict[str, Forecast] = {}
    missing, notes = compared.evals, []
    try:
        rounds.check(plan, compared)
        missing = _missing(compared)
        found, notes = _estimates(config, plan, missing, len(compared.evals))
    except UserError as error:
        notes = [f"no estimates, and the rounds would end with: {error}"]
    ends = [(stage.name, stage.out, stage.finished) for stage in plan]
    ends.append(("comparison", Path(compared.out or ""), not missing))
    rows = [("stage", "state", "tokens at most", "memory", "output")]
    rows += [
        (name, "finished" if done else "to make", *_figures(found.get(name)), f"{out}") for name, out, done in ends
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  ".join([*(c.ljust(w) for c, w in zip(row[:4], widths, strict=True)), row[4]]) for row in rows]
    return [*table, *([""] if notes else []), *notes]


def _estimates(
    config: RoundsConfig, plan: list[Stage], missing: Sequence[EvalConfig], count: int
) -> tuple[dict[str, Forecast], list[str]]:
    """Return the estimates of the unfinished stages, by name, and lines that explain them."""
    left, spec = [stage for stage in plan if not stage.finished], names.split_adapter(config.model)[0]
    if not left and not missing:
        return {}, []
    if not names.is_here(spec):
        return {}, [f"no estimates: {spec} is not on this machine yet, and the rounds will download it"]
    outlook = Outlook(config, plan)
    found = {stage.name: outlook.of(stage) for stage in left}
    if missing:
        found["comparison"] = outlook.of_comparison(missing, count)
    peak = max((one.memory_gb for one in found.values() if one.memory_gb), default=0.0)
    told = [f"{name}: {one.told}" for name, one in found.items()]
    notes = [f"{name}: {one.note}" for name, one in found.items() if one.note]
    if peak:
        told.append(f"in all {peak:.2f} GB at most; {outlook.loaded.backend.description}")
        notes += outlook.loaded.notes
    return found, told + [f"note: {line}" for line in notes]


def _figures(found: Forecast | None) -> tuple[str, str]:
    tokens, memory_gb = (found.tokens, found.memory_gb) if found else (None, None)
    return "–" if tokens is None else f"{tokens:,}", "–" if memory_gb is None else f"{memory_gb:.2f} GB"


def _missing(compared: CompareConfig) -> list[EvalConfig]:
    """Return the comparison's unfinished evaluations."""

    def finished(settings: EvalConfig) -> bool:
        if settings.adapter and not Path(settings.adapter).is_dir():
            return False
        return RunFolder(Path(compared.runs_dir) / evaluator.plan(settings).label).finished

    return [settings for settings in compared.evals if not finished(settings)]


class Outlook:
    """The estimates of a plan's stages; models and traces are read once, when they are first needed."""

    def __init__(self, config: RoundsConfig, plan: Sequence[Stage]) -> None:
        self.config, self.plan = config, {stage.name: stage for stage in plan}
        self.spec, self.adapter = names.split_adapter(config.model)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with the adapter that is trained first."""
        return _ready(rounds.trainings(list(self.plan.values()))[0].recipe, self.spec, self.adapter)

    @cached_property
    def raw(self) -> list[Trace]:
        """The first stage's traces, read from its file or made in memory."""
        stage = self.plan["raw"]
        if stage.finished:
            return [trace for _, trace in read_traces(stage.out)]
        return list(rounds.raw_traces(self.config, Counter())[0])

    def of(self, stage: Stage) -> Forecast:
        """Return a stage's estimate."""
        if stage.name == "raw":
            return Forecast(None, None, f"{len(self.raw):,} traces, counted in memory")
        if isinstance(recipe := stage.recipe, ScoreConfig | FilterConfig):
            readers = [recipe.model, recipe.judge] if isinstance(recipe, ScoreConfig) else []
            read = " and ".join(name for name in readers if name)
            told = f"every completion is read by {read}, which is not estimated" if read else "no model runs"
            return Forecast(None, None, told)
        recipe = recipe.sized(self.loaded.backend.sizes)
        if isinstance(recipe, GenerateConfig):
            return self._sampling(recipe, 1, "")
        if isinstance(recipe, SFTConfig):
            return self._sft(recipe, *(self._given(recipe) if stage.name == "epoch1" else self._own(recipe)))
        return self._reinforcement(recipe)

    def of_comparison(self, missing: Sequence[EvalConfig], count: int) -> Forecast:
        """Return the estimate of the missing evaluations."""
        settings = missing[0].sized(self.loaded.backend.sizes)
        return self._sampling(settings, len(missing), f"{len(missing)} of {count} evaluations, each of ")

    def _sampling(self, config: GenerateConfig | EvalConfig, times: int, before: str) -> Forecast:
        planned = evaluator.plan(config.model_copy(update={"adapter": None}))  # it may not exist yet
        tokens, memory_gb = self._answering(planned, config.samples)
        told = f"{before}{_problems(len(planned.problems), config.samples)}, {_each(config.longest)}"
        return Forecast(times * tokens, memory_gb, told)

    def _answering(self, planned: Plan, samples: int) -> tuple[int, float]:
        """Return the maximum tokens and the memory of ``samples`` answers to each problem of a plan."""
        config, completions = planned.config, samples * len(planned.problems)
        sizes = self._prompt(planned), config.longest, config.rows, completions
        return completions * config.longest, memory.of_sampling(
            self.loaded, *sizes, config.memory_limit, memory.buffers_of_a_draw(config)
        )

    def _prompt(self, planned: Plan) -> int:
        """Return the length of the longest prompt in tokens, among the first problems."""
        some = planned.problems[:LARGEST_PROBED]
        return max(len(self.loaded.render(planned.prompt, problem, planned.config.thinking).ids) for problem in some)

    def _held_out(self, config: RLConfig | SFTConfig, times: int) -> tuple[int, float, str]:
        """Return maximum tokens, memory, and a description of the validations' answers."""
        planned = loop.held_out_plan(self.spec, config)
        if planned is None:
            return 0, 0.0, ""
        tokens, memory_gb = self._answering(planned, 1)
        return times * tokens, memory_gb, f", {times} validations of {len(planned.problems):,} problems"

    def _sft(self, config: SFTConfig, count: int, longest: int, words: str) -> Forecast:
        steps = math.ceil(count * (1 - config.valid_share) / config.batch_size) * config.epochs
        checks = 1 + math.ceil(steps / (config.eval_every or max(1, steps // config.epochs)))
        sampled, answering_gb, answered = self._held_out(config, checks)
        longest = min(longest, config.max_length)
        config = memory.fitted(config, self.loaded.backend, lambda one: memory.of_sft(self.loaded, one, longest))
        found = memory.of_sft(self.loaded, config, longest)
        told = f"{words} of at most {longest:,} tokens, prompts included, {config.epochs} x{answered}"
        return self._training(count * longest * config.epochs + sampled, found, answering_gb, told)

    def _given(self, config: SFTConfig) -> tuple[int, int, str]:
        """Return the number of raw traces, the tokens of the longest, and a description."""
        if not self.raw:
            raise UserError(f"{config.data}: no traces to train on")
        longest, _ = _longest_trace(self.loaded, ((trace.id, trace) for trace in self.raw), config)
        return len(self.raw), longest, f"{len(self.raw):,} traces"

    def _own(self, config: SFTConfig) -> tuple[int, int, str]:
        """Return the same for the filtered traces; upper bounds if the filter has not run yet."""
        stage = self.plan["filtered"]
        if stage.finished:
            kept = list(read_traces(stage.out))
            return len(kept), _longest_trace(self.loaded, kept, config)[0], f"{len(kept):,} traces"
        drawn = self.plan["generated"].recipe
        planned = evaluator.plan(drawn.model_copy(update={"adapter": None}))
        most = len(planned.problems) * min(drawn.samples, self.config.filter.per_problem or drawn.samples)
        return most, self._prompt(planned) + drawn.longest, f"{most:,} traces at most,"

    def _reinforcement(self, config: RLConfig) -> Forecast:
        planned, _, _ = rollouts.prepare(config.model_copy(update={"adapter": None}))
        try:
            prompt = rollouts.longest_prompt(self.loaded, planned)
        except UserError as error:
            raise UserError(f"round3: {error}") from None
        draws = 1 + getattr(config, "max_resamples", 0)
        completions = config.num_steps * config.prompts_per_step * config.group_size * draws
        answered, answering_gb, words = self._held_out(config, 1 + math.ceil(config.num_steps / config.eval_every))
        if (config.pass_rate_low, config.pass_rate_high) != (0, 1):
            completions += len(planned.problems) * config.probe_samples
            words += f", {_problems(len(planned.problems), config.probe_samples)} for their pass rates"
        steps = f"{config.num_steps} steps of {_problems(config.prompts_per_step, config.group_size)}"
        steps += f", drawn up to {draws} times where a group's rewards are equal" * (draws > 1)
        backend = self.loaded.backend
        config = memory.fitted(config, backend, lambda one: memory.of_reinforcement(self.loaded, one, prompt))
        found = memory.of_reinforcement(self.loaded, config, prompt)
        tokens = completions * config.longest + answered
        return self._training(tokens, found, answering_gb, f"{steps}, {_each(config.longest)}{words}")

    def _training(self, tokens: int, found: Estimate, answering_gb: float, told: str) -> Forecast:
        return Forecast(tokens, max(found.peak, answering_gb), told, memory.fits(found, self.loaded.backend))


def _problems(count: int, samples: int) -> str:
    return f"{count:,} problems" + (f" x {samples}" if samples > 1 else "")


def _each(max_tokens: int) -> str:
    return f"at most {max_tokens:,} tokens each"


def _ready(config: SFTConfig | RLConfig, model: str, adapter: str | None) -> LoadedModel:
    """Load a model as its training does, with the adapter that is trained on it."""
    loaded = loading.load(model, adapter, **config.load_arguments())
    adapters.start(loaded.model, config, adapter)
    return loaded


def _longest_trace(loaded: LoadedModel, traces: Iterable[tuple[str, Trace]], config: SFTConfig) -> tuple[int, int]:
    """Return the tokens of the longest trace to train on, and the number of such traces, among the first `READ`."""
    found = encoding.encode_all(loaded, islice(traces, READ), config.max_length, config.over_long, config.thinking)
    if not found.examples:
        raise UserError(f"{config.data}: no traces to train on; raise max_length ({config.max_length})")
    return max(len(example.ids) for example in found.examples), len(found.examples)


KINDS = {"sft": SFTConfig, "grpo": GRPOConfig, "ppo": PPOConfig}
NO_CONTEXT = 1 << 17  # tokens; for a model that states no limit
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
    """The estimate, a description of its inputs (``told``), what does not fit (None: all fits), the largest settings.

    ``sizes`` describes the settings of batches: those of the file and those of the device.
    """

    estimate: Estimate
    told: str
    sizes: str
    memory_gb: float
    fault: str | None
    most: dict[str, Most]

    def lines(self) -> list[str]:
        """Return the estimate as lines of text; parts without memory are left out."""
        found, values = self.estimate, asdict(self.estimate)
        parts = [f"  {label:<20} {values[name]:8.3f} GB" for name, label in PARTS.items() if values[name]]
        sampling = f"sampling {found.sampling:.3f} GB, " if found.rows else ""
        peak = f"  peak: {sampling}update {found.update:.3f} GB; the device has {self.memory_gb:g} GB"
        rows = f"{found.rows} rows, " if found.rows else ""
        plural = "" if found.micro_rows == 1 else "s"
        alone = f"  batches: {rows}micro-batches of {found.micro_rows} sequence{plural}"
        sizes = f"  {self.sizes}"
        return [self.told, *parts, peak, sizes, alone, f"  {self.fault or 'it fits'}", *map(self._largest, self.most)]

    def _largest(self, name: str) -> str:
        most = self.most[name]
        if most.value is None:
            return f"  largest {name}: none fits"
        why = {"rows": "all of a step", "micro_tokens": "all of a step at once"}.get(name, "the model's context")
        return f"  largest {name}: {most.value:,}{f' ({why})' if most.value == most.top else ''}"


def kinds_of(path: Path) -> list[str]:
    """Return the kinds of training whose settings have all fields of a file, and require no others.

    Raises:
        UserError: if the file cannot be read, or no kind fits.
    """
    given, every = read_yaml(path).keys(), choices(KINDS)
    known = [name for settings in KINDS.values() for name in settings.model_fields]
    if stray := sorted(given - {*known}):
        near = did_you_mean(stray[0], known)
        raise UserError(f"{path}: {stray[0][:MOST_NAME]!r} is no setting of {every}{near}")
    found = []
    for kind, settings in KINDS.items():
        needed = {name for name, field in settings.model_fields.items() if field.is_required()}
        found += [kind] if needed <= given <= settings.model_fields.keys() else []
    if not found:
        raise UserError(f"{path}: its fields fit none of {every}; --kind KIND says what that kind misses")
    return found


def plan(path: str | Path, kind: str | None = None) -> Planned:
    """Estimate a training's memory; ``mlx-traces plan`` from Python. Nothing is trained, downloaded or written.

    Args:
        path: the YAML file of ``sft``, ``grpo`` or ``ppo``.
        kind: which of these; default: the one whose settings have the file's fields.

    Raises:
        UserError: if the configuration is wrong, or its model or problems are not on this machine.
    """
    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    kinds = [kind] if kind else kinds_of(Path(path))
    config, *others = [read_config(KINDS[kind], path, {}) for kind in kinds]
    # GRPO and PPO take the same memory if their shared settings are equal.
    shared = [one.model_dump(include={*RLConfig.model_fields}) for one in (config, *others)]
    if any(one != shared[0] for one in shared):
        raise UserError(f"{path}: its fields fit {' and '.join(kinds)} alike; pass --kind")
    config = names.with_adapter(config)
    names.check(config.model, config.adapter)
    if not names.is_here(config.model):
        loads = f"eval --model {config.model} --limit 1 downloads it"
        raise UserError(f"{config.model} is not on this machine; {loads}, or name a folder")
    loaded = _ready(config, config.model, config.adapter)
    config = config.sized(loaded.backend.sizes)
    if isinstance(config, RLConfig):
        few = min(config.num_steps, math.ceil(LARGEST_PROBED / config.prompts_per_step))
        planned, _, _ = rollouts.prepare(config.model_copy(update={"num_steps": few}))
        prompt, of = rollouts.longest_prompt(loaded, planned), f"the longest of {len(planned.problems):,}"
        config = memory.fitted(config, loaded.backend, lambda one: memory.of_reinforcement(loaded, one, prompt))
        sizes = memory.sizes_of_reinforcement(loaded, config, prompt)
        length = f"prompts of {prompt} tokens ({of}) and completions of {config.max_tokens}"
    else:
        longest, of = config.max_length, f"max_length, as {config.data} is not there yet"
        if Path(config.data).exists():
            longest, count = _longest_trace(loaded, read_traces(Path(config.data)), config)
            of = f"the longest of {count:,}"
        config = memory.fitted(config, loaded.backend, lambda one: memory.of_sft(loaded, one, longest))
        sizes = memory.sizes_of_sft(config, longest)
        length = f"sequences of {longest} tokens ({of})"
    shape, limit = memory.shape_of(loaded), loaded.backend.memory_gb
    estimate = memory.estimate(shape, **sizes)
    most = memory.largest(shape, sizes, limit, loaded.context or NO_CONTEXT)
    told = f"{choices(kinds)} of {config.model} on {loaded.backend.description}: {length}"
    batches = [(name, f"{name} {getattr(config, name):,}") for name in SIZES if name in type(config).model_fields]
    given = ", ".join(text for name, text in batches if name in config.model_fields_set)
    own = ", ".join(text for name, text in batches if name not in config.model_fields_set)
    words = "; ".join(filter(None, [given and f"set: {given}", own and f"this device's: {own}"]))
    return Planned(estimate, told, words, limit, memory.fits(estimate, loaded.backend), most)
