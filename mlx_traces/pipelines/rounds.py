"""The rounds: from raw traces to the table and the report.

Round 1 is SFT on raw traces, round 2 SFT on the model's own traces, scored and filtered, round 3 reinforcement by GRPO
or PPO. The base model and the adapter of every round answer the same problems. Each round may be left out.

Every station's output is named by a hash of its settings and of all that came before it. What is there already is not
made again, what was cut off is continued, and changed settings make new files beside the old ones.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mlx_traces import text
from mlx_traces.config import (
    AdapterConfig,
    CompareConfig,
    Config,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    PPOConfig,
    RawConfig,
    RLConfig,
    RoundsConfig,
    ScoreConfig,
    SFTConfig,
    build,
)
from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import comparison, evaluator
from mlx_traces.models import adapters, names
from mlx_traces.pipelines import compare
from mlx_traces.readers import is_file
from mlx_traces.records import Problem, Trace
from mlx_traces.report import page
from mlx_traces.rl import grpo, ppo, rewards
from mlx_traces.runtime.files import on_the_way, to_json, write_atomic
from mlx_traces.runtime.provenance import fingerprint, provenance
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.tasks import Task, countdown, get_task, gsm8k, math
from mlx_traces.traces import files, filtering, generate, score, solutions
from mlx_traces.train import loop, sft, tracking

NOT_IN_NAMES = {"rows", "device", "memory_limit", "save_every", "report_to"}  # settings that change no output
RAW_PROBLEMS = 1000  # of Countdown, unless raw.count says otherwise
SOLVED = ("countdown", "gsm8k", "math")  # tasks whose problems come with worked solutions

Show = Callable[[str], Any]  # takes a station's name, returns a context whose value takes a line of metrics and a total


@dataclass(frozen=True)
class Station:
    """One step of the rounds: its name, what it writes, its recipe's complete settings, and what makes it."""

    name: str
    out: Path
    recipe: Config
    make: Callable[[], Any]

    @property
    def finished(self) -> bool:
        """Whether the output is complete; all stations write theirs whole."""
        return RunFolder(self.out).finished if self.out.suffix != ".jsonl" else files.manifest_path(self.out).exists()


def stations(config: RoundsConfig, show: Show) -> list[Station]:
    """Lay out the stations before the comparison, their names following from the settings.

    Raises:
        UserError: for settings that the rounds fill in themselves, and a task without worked solutions.
    """
    _check(config)
    plan: list[Station] = []
    spec, adapter = names.split_adapter(config.model)
    before: list[Any] = [config.model, config.task, config.prompt]
    before += [fingerprint(Path(folder)) for folder in (names.local_folder(spec), adapter) if folder]
    before += [get_task(config.task).identity] if ":" in config.task else []

    def add(name: str, folder: Path, settings: Config, recipe: Config, make: Callable[[Any, Path], Any]) -> Path:
        content = settings.model_dump(mode="json", exclude=NOT_IN_NAMES)
        files = [str(content[key]) for key in ("file", "data", "eval_data") if content.get(key)]
        before.append([name, content, *(loop.digest(file) for file in files if Path(file).is_file())])
        before[-1] += _read_by(settings) if isinstance(settings, RLConfig) else []
        digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:8]
        out = folder / f"{config.name}-{name}-{digest}{'' if folder == runs else '.jsonl'}"
        plan.append(Station(name, out, recipe, lambda: make(recipe, out)))
        return out

    data, runs, start = Path(config.data_dir), Path(config.runs_dir), adapter
    ask = {"task": config.task, "prompt": config.prompt}
    told = {"report_to": config.report_to} if config.report_to else {}
    if config.epoch1 is not None:
        raw = add("raw", data / "raw", config.raw, config.raw, lambda _, out: make_raw(config, out))
        first = _filled(SFTConfig, config.epoch1, model=spec, adapter=adapter, data=str(raw), **told)
        start = str(add("epoch1", runs, config.epoch1, first, lambda recipe, out: _sft(recipe, out, show)) / "adapter")
    if config.epoch2 is not None:
        drawn = _filled(GenerateConfig, config.generate, model=spec, adapter=start, **ask)
        own = add("generated", data / "generated", config.generate, drawn, lambda *given: _generate(*given, show))
        scored = add("scored", data / "processed", config.score, config.score, lambda *given: _score(own, *given))
        kept = add("filtered", data / "processed", config.filter, config.filter, lambda *given: _filter(scored, *given))
        second = _filled(SFTConfig, config.epoch2, model=spec, adapter=start, data=str(kept), **told)
        start = str(add("epoch2", runs, config.epoch2, second, lambda *given: _sft(*given, show)) / "adapter")
    if config.round3 is not None:
        settings = config.round3.grpo or config.round3.ppo
        third = _filled(type(settings), settings, model=spec, adapter=start, **ask, **told)
        add("round3", runs, settings, third, lambda *given: _reinforce(*given, show))
    return plan


def _read_by(settings: RLConfig) -> list[str]:
    """Stand for the files that a reinforcement reads beside the problems: functions of rewards, rubric, reference."""
    files = [_file_of(name.partition(":")[0]) for name in settings.rewards if ":" in name]
    files += [Path(settings.judge_prompt)] if settings.judge_prompt else []
    folder = settings.reference and Path(settings.reference)
    digests = [loop.digest(file) for file in files if file and file.is_file()]
    return [*digests, *([fingerprint(folder)] if folder and folder.is_dir() else [])]


def _file_of(module: str) -> Path | None:
    """Find the file of a module, in the working folder or where Python looks; it is not run."""
    here = Path(*module.split(".")).with_suffix(".py")
    if here.is_file():
        return here
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin else None


def _check(config: RoundsConfig) -> None:
    filled_in = [("generate", config.generate, {"model", "adapter", "task", "prompt"})]
    filled_in += [("compare", config.compare, {"model", "adapter", "task"})]
    if config.round3 is not None:
        given = [(f"round3.{name}", own) for name in ("grpo", "ppo") if (own := getattr(config.round3, name))]
        if len(given) != 1:
            raise UserError("round3: give grpo or ppo, one of them; as in {grpo: {num_steps: 100}}")
        filled_in += [(name, own, {"model", "adapter", "task", "prompt"}) for name, own in given]
    for name, settings, own in filled_in:
        if given := sorted(own & settings.model_fields_set):
            raise UserError(f"{name}.{given[0]}: the rounds fill this in; set it at the top, or leave it out")
    if config.epoch1 is config.epoch2 is config.round3 is None:
        raise UserError("epoch1, epoch2 and round3 are all null: no round is left; give settings to one of them")
    if config.epoch1 is None:
        return
    if config.raw.file is None and config.task not in SOLVED:
        raise unknown("task with worked solutions", config.task, SOLVED)
    if config.raw.file is not None and not Path(config.raw.file).exists():
        raise UserError(f"raw.file: {config.raw.file} does not exist; make it with `mlx-traces data`")


def _filled(kind: type[Config], settings: Config, **values: Any) -> Any:
    """Return a recipe's settings with what the rounds know put in; what was not set stays unset."""
    return build(kind, {**settings.model_dump(exclude_unset=True), **values})


def make_raw(config: RoundsConfig, out: Path) -> list[str]:
    """Write the first station's traces: the task's solved problems, or a file's, checked."""
    raw, skipped = config.raw, Counter()
    made, source = raw_traces(config, skipped)
    counts = {"skipped": skipped}
    origin = files.source_of(source) if source in (raw.file, raw.data) else {"source": source}
    manifest = {**origin, "config": raw.model_dump(mode="json"), "counts": counts, "seed": raw.seed}
    return [f"{files.write_traces(out, made, manifest):,} traces"]


def raw_traces(config: RoundsConfig, skipped: Counter) -> tuple[Iterator[Trace], str]:
    """Return the first station's traces as they are made, and where they are from; ``skipped`` counts the others."""
    raw, task = config.raw, get_task(config.task)
    if raw.file is not None:
        return (trace for _, trace in files.read_traces(Path(raw.file))), raw.file
    styles = [task.prompt(name) for name in raw.prompts or [config.prompt]]
    if config.task == "countdown":
        count = raw.count or RAW_PROBLEMS
        return solutions.countdown_traces(count, raw.split, raw.seed, prompts=styles, skipped=skipped), "solver"
    make = solutions.math_traces if config.task == "math" else solutions.gsm8k_traces
    made = (
        trace for style in styles for trace in make(raw.split, raw.data, raw.count, raw.seed, style, raw.style, skipped)
    )
    return made, raw.data or (math.source_of(raw.split, None) if config.task == "math" else gsm8k.HUB)


def _sft(config: SFTConfig, out: Path, show: Show) -> list[str]:
    with show(out.name) as advance:
        result = sft.train(config, out, resume=out.exists(), show=advance)
    speed = f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s"
    return [speed, *(f"note: {note}" for note in result.notes)]


def _generate(config: GenerateConfig, out: Path, show: Show) -> list[str]:
    seen = correct = 0

    def count(trace: Trace, total: int) -> None:
        nonlocal seen, correct
        seen, correct = seen + 1, correct + (trace.verdict == "correct")
        advance({"step": seen, "correct": 100 * correct / seen}, total)

    with show(out.name) as advance:
        counts = generate.generate(config, out, resume=True, show=count)
    return [", ".join(f"{count:,} {name}" for name, count in counts.items())]


def _reinforce(config: RLConfig, out: Path, show: Show) -> list[str]:
    train = ppo.train if isinstance(config, PPOConfig) else grpo.train
    with show(out.name) as advance:
        result = train(config, out, resume=out.exists(), show=advance)
    spent = f"sampling {result.sample_seconds:.0f} s, updates {result.update_seconds:.0f} s"
    best = "" if result.best_step is None else f"; best at step {result.best_step}"
    return [
        f"{result.steps} steps in {result.seconds:.0f} s ({spent}){best}",
        *(f"note: {note}" for note in result.notes),
    ]


def _score(source: Path, config: ScoreConfig, out: Path) -> list[str]:
    scored = score.score_file(source, out, config)
    means = [(name, mean) for name, mean, _ in score.summary(scored) if mean is not None]
    return [", ".join(f"{name} {mean:.3f}" for name, mean in means)]


def _filter(source: Path, config: FilterConfig, out: Path) -> list[str]:
    report = filtering.filter_file(source, out, config)
    return [f"{rule}: {removed:,} removed, {left:,} left" for rule, removed, left in report]


class Outcome(NamedTuple):
    """What the rounds end with: the comparison's table, its runs, and the report's file."""

    frame: Any
    runs: list[comparison.Run]
    page: Path


def run(config: RoundsConfig, say: Callable[[str], None], show: Show, progress: bool = False) -> Outcome:
    """Carry out what is missing, then compare the base model and every round on the same problems.

    Args:
        config: the settings.
        say: takes lines for the user.
        show: see `Show`.
        progress: show the evaluations' progress bars.

    Raises:
        UserError: if the input is wrong; finished stations stay.
    """
    plan = stations(config, show)
    compared = comparison_of(config, plan)
    check(plan, compared)
    for settings in (config.raw, config.generate, config.compare):
        for note in evaluator.split_notes(settings):
            say(f"note: {note}")
    for station in plan:
        if station.finished:
            say(f"{station.name}: {station.out} is there")
            continue
        say(f"{station.name}: making {station.out}")
        if station.out.suffix == ".jsonl":
            files.discard_unfinished(station.out)
        for line in station.make():
            say(f"{station.name}: {line}")
    frame, runs = compare.compared(compared, progress)
    made = [
        {"name": station.name, "out": str(station.out), "config": station.recipe.model_dump(mode="json")}
        for station in plan
    ]
    about = {**provenance(), "config": config.model_dump(mode="json"), "stations": made}
    file = Path(compared.out) / "rounds.json"
    with on_the_way(file, "repeat the command"):
        write_atomic(file, to_json(about))
    trained = [station.out for station in trainings(plan)]
    answered = [Path(config.runs_dir) / run.name for run in runs]
    return Outcome(frame, runs, page.write([*answered, *trained], Path(compared.out) / "report.html")[0])


def check(plan: list[Station], compared: CompareConfig) -> None:
    """Find what is wrong with the settings of later stations before hours are spent on earlier ones.

    Raises:
        UserError: for a comparison or a third round that could not begin, one that trains on the comparison's
            problems, or a round that asks for another adapter than the one it goes on with.
    """
    _refuse_other_adapters(trainings(plan))
    for name in {station.recipe.report_to for station in trainings(plan) if not station.finished} - {None}:
        tracking.client(name)
    asked = evaluator.plan(compared.evals[0])
    same = filtering.same_problem(asked.problems, asked.prompt)
    for station in plan:
        if not isinstance(station.recipe, (RawConfig, GenerateConfig, RLConfig)):
            continue
        learned = _learned(station, asked.task)
        if shared := sum(map(same, learned)):
            raise UserError(
                f"{station.name}: {shared} of its {len(learned)} problems are the comparison's; "
                f"choose another split or data for one of them{_no_splits(station.recipe, asked.config)}"
            )
    third = plan[-1].recipe
    if not isinstance(third, RLConfig) or plan[-1].finished:
        return
    weights = {name: weight for name, weight in third.rewards.items() if name != "judge" or not third.judge}
    if weights:  # the judge itself is not loaded
        rewards.load(weights, list(learned[0].columns))


def _learned(station: Station, task: Task) -> list[Problem] | list[Trace]:
    """Return what a station's problems are, or will be: those in its file of traces, if that is there."""
    recipe = station.recipe
    if isinstance(recipe, RLConfig):
        from mlx_traces.rl import rollouts

        return rollouts.prepare(recipe.model_copy(update={"adapter": None}))[0].problems  # which may not be there yet
    if station.finished and station.out.exists():
        return [trace for _, trace in files.read_traces(station.out)]
    if isinstance(recipe, GenerateConfig):
        return task.load(recipe.split, recipe.data, recipe.limit, recipe.seed)
    if recipe.file is not None:
        return [trace for _, trace in files.read_traces(Path(recipe.file))]
    if task.name == "countdown":
        made = countdown.generate(recipe.split, recipe.count or RAW_PROBLEMS, recipe.seed)
        return [task.parse({"nums": nums, "target": target}, "raw") for nums, target in made]
    return task.load(recipe.split, recipe.data, recipe.count, recipe.seed)


def _no_splits(recipe: Config, asked: Config) -> str:
    """Say how a file is parted, where it is both learned from and compared on."""
    if not (asked.data and recipe.data == asked.data and is_file(asked.data)):
        return ""
    return f": {asked.data} has no splits, only parts as in 'train[100:]' and 'test[:100]'"


def _refuse_other_adapters(trained: list[Station]) -> None:
    """Refuse a round that sets what the adapter it goes on with has otherwise; `adapters.start` would do so later."""
    first = trained[0].recipe
    if first.adapter is None:
        origin, own, later = trained[0].name, _adapter_settings(first), trained[1:]
    else:
        origin, own, later = first.adapter, adapters.own_settings(adapters.read_config(Path(first.adapter))), trained
    for station in later:
        for name in AdapterConfig.model_fields:
            given = getattr(station.recipe, name)
            if not station.finished and name in station.recipe.model_fields_set & own.keys() and given != own[name]:
                raise UserError(
                    f"{station.name}: {name} {given} is not that of {origin} ({own[name]}), which it goes on with; "
                    "leave it out"
                )


def _adapter_settings(config: AdapterConfig) -> dict[str, Any]:
    """Return what an adapter that begins with these settings will have; all weights have neither rank nor scale."""
    names = ("kind", "layers") if config.kind == "full" else ("kind", "layers", "rank", "scale", "dropout")
    targets = None if config.kind == "full" else config.targets or None
    return {**{name: getattr(config, name) for name in names}, "targets": targets}


def trainings(plan: list[Station]) -> list[Station]:
    """Return the stations that end with an adapter, in order."""
    return [station for station in plan if isinstance(station.recipe, (SFTConfig, RLConfig))]


def comparison_of(config: RoundsConfig, plan: list[Station]) -> CompareConfig:
    """Return the comparison at the end: the base model and each round's adapter, all on the same problems."""
    spec, adapter = names.split_adapter(config.model)
    adapters = [adapter, *(str(station.out / "adapter") for station in trainings(plan))]
    prompt = config.compare.prompt or config.prompt
    evals = [
        _filled(EvalConfig, config.compare, model=spec, adapter=name, task=config.task, prompt=prompt)
        for name in adapters
    ]
    out = Path(config.runs_dir) / f"{config.name}-comparison"
    return CompareConfig(evals=evals, runs_dir=config.runs_dir, out=str(out))


def gains(runs: list[comparison.Run]) -> list[str]:
    """Say what each round changed against the one before, by the paired test of the comparison (`tables.paired`).

    Won and lost are problems that the later round answered right more, or less, often.
    """
    lines = []
    for before, after in pairwise(runs):
        pair = comparison.paired(after, before)
        test = "McNemar" if all(len(run.samples) == pair["problems"] for run in (before, after)) else "sign-flip"
        lines.append(
            f"{comparison.label(after)} against {comparison.label(before)}: {text.percent(pair['diff'], signed=True)} "
            f"points, {pair['wins']} won, {pair['losses']} lost of {pair['problems']}, exact {test} "
            f"{text.p_text(pair['p_value'])}"
        )
    return lines
