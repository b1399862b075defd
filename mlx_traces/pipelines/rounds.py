"""Training in rounds, from raw traces to the table and the report.

Round 1 is SFT on raw traces. Round 2 is SFT on the model's own traces, scored and filtered. Round 3 is GRPO, PPO, or
both as two arms from the same start. Each round may be left out. The base model and the adapter of every round answer
the same problems; their accuracy and the quality of their answers are compared.

The name of a stage's output contains a hash of its settings and of all stages before it. So finished stages are not
repeated, an interrupted one is continued, and changed settings make new files beside the old ones.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
from mlx_traces.evaluation import comparison, evaluator, stats
from mlx_traces.models import adapters, names
from mlx_traces.pipelines import compare
from mlx_traces.readers import is_file
from mlx_traces.records import Problem, Trace
from mlx_traces.rl import grpo, ppo, rewards, rollouts
from mlx_traces.runtime.files import on_the_way, to_json, write_atomic
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.runtime.provenance import provenance
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.tasks import Task, countdown, get_task, gsm8k, math
from mlx_traces.text import p_relation, percent
from mlx_traces.traces import files, filtering, generate, score, solutions
from mlx_traces.train import loop, sft, tracking

INPUTS = ("file", "data", "eval_data", "shots_data", "judge_prompt")  # settings that may name a file
NOT_IN_NAMES = {"rows", "device", "memory_limit", "save_every", "report_to"}  # settings that do not change an output
RAW_PROBLEMS = 1000  # of Countdown, unless raw.count says otherwise
SOLVED = ("countdown", "gsm8k", "math")  # tasks whose problems come with worked solutions

Show = Callable[[str], Any]  # from a stage's name to a context manager; its value takes a line of metrics and a total


@dataclass(frozen=True)
class Stage:
    """One step of the rounds: name, output, complete settings (``recipe``), and the function that makes the output."""

    name: str
    out: Path
    recipe: Config
    make: Callable[[], Any]

    @property
    def finished(self) -> bool:
        """Whether the output is complete."""
        return RunFolder(self.out).finished if self.out.suffix != ".jsonl" else files.manifest_path(self.out).exists()


def stages(config: RoundsConfig, show: Show) -> list[Stage]:
    """Plan the stages before the comparison; the settings decide the names of their outputs.

    Raises:
        UserError: for settings that the rounds fill in themselves, and a task without worked solutions.
    """
    check_settings(config)
    plan: list[Stage] = []
    spec, adapter = names.split_adapter(config.model)
    before: list[Any] = [config.model, config.task, config.prompt]
    before += [fingerprint(Path(folder)) for folder in (names.local_folder(spec), adapter) if folder]
    before += list(get_task(config.task).identity.values())
    before += _digests([config.prompt])

    def add(name: str, folder: Path, settings: Config, recipe: Config, make: Callable[[Any, Path], Any]) -> Path:
        content = settings.model_dump(mode="json", exclude=NOT_IN_NAMES)
        inputs = [content.get(key) for key in INPUTS] + (content.get("prompts") or [])
        before.append([name, content, *_digests(inputs)])
        before[-1] += digests_of(settings) if isinstance(settings, RLConfig) else []
        digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:8]
        out = folder / f"{config.name}-{name}-{digest}{'' if folder == runs else '.jsonl'}"
        plan.append(Stage(name, out, recipe, lambda: make(recipe, out)))
        return out

    data, runs, start = Path(config.data_dir), Path(config.runs_dir), adapter
    processed = data / "processed"
    problems = {"task": config.task, "prompt": config.prompt}
    tracker = {"report_to": config.report_to} if config.report_to else {}
    if config.epoch1 is not None:
        raw = add("raw", data / "raw", config.raw, config.raw, lambda _, out: make_raw(config, out))
        first = filled(SFTConfig, config.epoch1, model=spec, adapter=adapter, data=str(raw), **tracker)
        start = str(add("epoch1", runs, config.epoch1, first, lambda *given: make_sft(*given, show)) / "adapter")
    if config.epoch2 is not None:
        drawn = filled(GenerateConfig, config.generate, model=spec, adapter=start, **problems)
        own = add("generated", data / "generated", config.generate, drawn, lambda *given: make_generated(*given, show))
        scored = add("scored", processed, config.score, config.score, lambda *given: make_scored(own, *given))
        kept = add("filtered", processed, config.filter, config.filter, lambda *given: make_filtered(scored, *given))
        second = filled(SFTConfig, config.epoch2, model=spec, adapter=start, data=str(kept), **tracker)
        start = str(add("epoch2", runs, config.epoch2, second, lambda *given: make_sft(*given, show)) / "adapter")
    arms, shared = arms_of(config), len(before)
    for name, settings in arms.items():
        del before[shared:]  # an arm's name does not depend on the other arm
        third = filled(type(settings), settings, model=spec, adapter=start, **problems, **tracker)
        stage = f"round3-{name}" if len(arms) > 1 else "round3"
        add(stage, runs, settings, third, lambda *given: make_rl(*given, show))
    return plan


def arms_of(config: RoundsConfig) -> dict[str, RLConfig]:
    """Return the settings of the third round by algorithm; two algorithms are two arms from the same start."""
    return {name: own for name in ("grpo", "ppo") if (own := getattr(config.round3, name, None))}


def _digests(inputs: Iterable[str | None]) -> list[str]:
    """Hash those of some settings that name a file."""
    return [loop.digest(name) for name in inputs if name and Path(name).is_file()]


def digests_of(settings: RLConfig) -> list[str]:
    """Hash the files that GRPO and PPO read apart from the problems: reward functions, rubric, reference."""
    paths = [_module_file(name.partition(":")[0]) for name in settings.rewards if ":" in name]
    paths += [Path(settings.judge_prompt)] if settings.judge_prompt else []
    folder = settings.reference and Path(settings.reference)
    digests = [loop.digest(file) for file in paths if file and file.is_file()]
    return [*digests, *([fingerprint(folder)] if folder and folder.is_dir() else [])]


def _module_file(module: str) -> Path | None:
    """Find the file of a module, in the working folder or on Python's path, without running it."""
    here = Path(*module.split(".")).with_suffix(".py")
    if here.is_file():
        return here
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin else None


def check_settings(config: RoundsConfig) -> None:
    """Raise UserError for settings that the rounds fill in themselves, and settings that leave nothing to do."""
    filled_in = [("generate", config.generate, {"model", "adapter", "task", "prompt"})]
    filled_in += [("compare", config.compare, {"model", "adapter", "task"})]
    if config.round3 is not None:
        if not (arms := arms_of(config)):
            raise UserError("round3: give grpo, ppo or both; as in {grpo: {num_steps: 100}}")
        filled_in += [(f"round3.{name}", own, {"model", "adapter", "task", "prompt"}) for name, own in arms.items()]
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


def filled(kind: type[Config], settings: Config, **values: Any) -> Any:
    """Add the values that the rounds fill in to a recipe's settings; fields that were not set stay unset."""
    return build(kind, {**settings.model_dump(exclude_unset=True), **values})


def make_raw(config: RoundsConfig, out: Path) -> list[str]:
    """Write the first stage's traces: the task's solved problems, or those of a file."""
    raw, skipped = config.raw, Counter()
    made, source = raw_traces(config, skipped)
    counts = {"skipped": skipped}
    origin = files.source_of(source) if source in (raw.file, raw.data) else {"source": source}
    manifest = {**origin, "config": raw.model_dump(mode="json"), "counts": counts, "seed": raw.seed}
    return [f"{files.write_traces(out, made, manifest):,} traces"]


def raw_traces(config: RoundsConfig, skipped: Counter) -> tuple[Iterator[Trace], str]:
    """Return an iterator over the first stage's traces, and their source; ``skipped`` counts the other problems."""
    raw, task = config.raw, get_task(config.task)
    if raw.file is not None:
        return (trace for _, trace in files.read_traces(Path(raw.file))), raw.file
    styles = [task.prompt(name) for name in raw.prompts or [config.prompt]]
    if config.task == "countdown":
        count, operands = raw.count or RAW_PROBLEMS, countdown.generated_operands(raw.data)
        if operands is None:
            raise UserError(f"raw.data: {raw.data} has no solutions; name generated problems, such as 3-numbers")
        given = (count, raw.split, raw.seed, operands, styles, skipped, raw.give_up, raw.daunting)
        return solutions.countdown_traces(*given), "solver"
    make = solutions.math_traces if config.task == "math" else solutions.gsm8k_traces
    made = (
        trace for style in styles for trace in make(raw.split, raw.data, raw.count, raw.seed, style, raw.style, skipped)
    )
    return made, raw.data or (math.source_of(raw.split, None) if config.task == "math" else gsm8k.HUB)


def make_sft(config: SFTConfig, out: Path, show: Show) -> list[str]:
    """Fine-tune on traces, or continue an interrupted run; return lines for the user, as all these functions do."""
    with show(out.name) as advance:
        result = sft.train(config, out, resume=out.exists(), show=advance)
    speed = f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s"
    return [speed, *(f"note: {note}" for note in result.notes)]


def make_generated(config: GenerateConfig, out: Path, show: Show) -> list[str]:
    """Sample the model's own traces."""
    seen = correct = 0

    def count(trace: Trace, total: int) -> None:
        nonlocal seen, correct
        seen, correct = seen + 1, correct + (trace.verdict == "correct")
        advance({"step": seen, "correct": 100 * correct / seen}, total)

    with show(out.name) as advance:
        counts = generate.generate(config, out, resume=True, show=count)
    return [", ".join(f"{count:,} {name}" for name, count in counts.items())]


def make_rl(config: RLConfig, out: Path, show: Show) -> list[str]:
    """Train by GRPO or PPO."""
    train = ppo.train if isinstance(config, PPOConfig) else grpo.train
    with show(out.name) as advance:
        result = train(config, out, resume=out.exists(), show=advance)
    spent = f"sampling {result.sample_seconds:.0f} s, updates {result.update_seconds:.0f} s"
    best = "" if result.best_step is None else f"; best at step {result.best_step}"
    return [
        f"{result.steps} steps in {result.seconds:.0f} s ({spent}){best}",
        *(f"note: {note}" for note in result.notes),
    ]


def make_scored(source: Path, config: ScoreConfig, out: Path) -> list[str]:
    """Score traces."""
    scored = score.score_file(source, out, config)
    means = [(name, mean) for name, mean, _ in score.summary(scored) if mean is not None]
    return [", ".join(f"{name} {mean:.3f}" for name, mean in means)]


def make_filtered(source: Path, config: FilterConfig, out: Path) -> list[str]:
    """Filter scored traces."""
    report = filtering.filter_file(source, out, config)
    return [f"{rule}: {removed:,} removed, {left:,} left" for rule, removed, left in report]


class Outcome(NamedTuple):
    """The result of the rounds: the comparison's table, its runs, the report's file, and the quality of the answers.

    ``pairs`` are the (later, earlier) rows whose answers are compared, in accuracy and in quality.
    """

    frame: Any
    runs: list[comparison.Run]
    page: Path
    quality: Any
    pairs: list[tuple[int, int]]


def run(config: RoundsConfig, say: Callable[[str], None], show: Show, progress: bool = False) -> Outcome:
    """Make the missing stages, then compare the base model and every round on the same problems.

    Args:
        config: the settings.
        say: gets lines for the user.
        show: see `Show`.
        progress: show the evaluations' progress bars.

    Raises:
        UserError: if the input is wrong; finished stages are kept.
    """
    plan = stages(config, show)
    compared = comparison_of(config, plan)
    check(plan, compared)
    for settings in (config.raw, config.generate, config.compare):
        for note in evaluator.split_notes(settings):
            say(f"note: {note}")
    for stage in plan:
        if stage.finished:
            say(f"{stage.name}: {stage.out} is finished")
            continue
        say(f"{stage.name}: making {stage.out}")
        if stage.out.suffix == ".jsonl":
            files.discard_unfinished(stage.out)
        for line in stage.make():
            say(f"{stage.name}: {line}")
    pairs = pairs_of(plan)
    trained = [stage.out for stage in trainings(plan)]
    labels = [None, *(stage.name for stage in trainings(plan))]
    frame, runs, quality = compare.compared(compared, progress, pairs=pairs, trainings=trained, labels=labels)
    made = [
        {"name": stage.name, "out": str(stage.out), "config": stage.recipe.model_dump(mode="json")} for stage in plan
    ]
    about = {**provenance(), "config": config.model_dump(mode="json"), "stations": made, "gains": gains(runs, pairs)}
    file = Path(compared.out) / "rounds.json"
    with on_the_way(file, "repeat the command"):
        write_atomic(file, to_json(about))
    return Outcome(frame, runs, Path(compared.out) / "report.html", quality, pairs)


def check(plan: list[Stage], compared: CompareConfig) -> None:
    """Check the settings of later stages before hours are spent on earlier ones.

    Raises:
        UserError: for a comparison or a third round that could not begin, a stage that trains on the comparison's
            problems, or a round whose settings differ from the adapter that it continues.
    """
    check_adapters(trainings(plan))
    for name in {stage.recipe.report_to for stage in trainings(plan) if not stage.finished} - {None}:
        tracking.client(name)
    asked = evaluator.plan(compared.evals[0])
    same = filtering.same_problem(asked.problems, asked.prompt)
    for stage in plan:
        if not isinstance(stage.recipe, (RawConfig, GenerateConfig, RLConfig)):
            continue
        learned = problems_of(stage, asked.task)
        if shared := sum(map(same, learned)):
            data = asked.config.data
            one_file = data and stage.recipe.data == data and is_file(data)
            parts = f": {data} has no splits, only parts as in 'train[100:]' and 'test[:100]'" if one_file else ""
            raise UserError(
                f"{stage.name}: {shared} of its {len(learned)} problems are the comparison's; "
                f"choose another split or data for one of them{parts}"
            )
        if isinstance(recipe := stage.recipe, RLConfig) and not stage.finished:
            weights = {name: weight for name, weight in recipe.rewards.items() if name != "judge" or not recipe.judge}
            if weights:  # the judge itself is not loaded
                rewards.load(weights, list(learned[0].columns))


def problems_of(stage: Stage, task: Task) -> list[Problem] | list[Trace]:
    """Return a stage's problems: those in its file of traces, if it exists, else those that it will use."""
    recipe = stage.recipe
    if isinstance(recipe, RLConfig):  # its adapter may not exist yet
        return rollouts.prepare(recipe.model_copy(update={"adapter": None}))[0].problems
    if stage.finished and stage.out.exists():
        return [trace for _, trace in files.read_traces(stage.out)]
    if isinstance(recipe, GenerateConfig):
        return evaluator.plan(recipe.model_copy(update={"adapter": None})).problems
    if recipe.file is not None:
        return [trace for _, trace in files.read_traces(Path(recipe.file))]
    if task.name == "countdown":
        operands = countdown.generated_operands(recipe.data) or (3, 4)
        made = countdown.generate(recipe.split, recipe.count or RAW_PROBLEMS, recipe.seed, operands)
        return [task.parse({"nums": nums, "target": target}, "raw") for nums, target in made]
    return task.load(recipe.split, recipe.data, recipe.count, recipe.seed)


def check_adapters(trained: list[Stage]) -> None:
    """Refuse a round whose settings differ from the adapter that it continues, before `adapters.start` does."""
    first = trained[0].recipe
    if first.adapter is None:
        fields = ("kind", "layers") if first.kind == "full" else ("kind", "layers", "rank", "scale", "dropout")
        own = {name: getattr(first, name) for name in fields}
        own["targets"] = None if first.kind == "full" else first.targets or None
        origin, later = trained[0].name, trained[1:]
    else:
        origin, own, later = first.adapter, adapters.own_settings(adapters.read_config(Path(first.adapter))), trained
    for stage in later:
        for name in AdapterConfig.model_fields:
            given = getattr(stage.recipe, name)
            if not stage.finished and name in stage.recipe.model_fields_set & own.keys() and given != own[name]:
                raise UserError(
                    f"{stage.name}: {name} {given} differs from that of {origin} ({own[name]}), which it continues; "
                    "leave it out"
                )


def trainings(plan: list[Stage]) -> list[Stage]:
    """Return the stages that end with an adapter, in order."""
    return [stage for stage in plan if isinstance(stage.recipe, (SFTConfig, RLConfig))]


def comparison_of(config: RoundsConfig, plan: list[Stage]) -> CompareConfig:
    """Return the comparison at the end: the base model and each round's adapter, all on the same problems."""
    spec, adapter = names.split_adapter(config.model)
    folders = [adapter, *(str(stage.out / "adapter") for stage in trainings(plan))]
    prompt = config.compare.prompt or config.prompt
    evals = [
        filled(EvalConfig, config.compare, model=spec, adapter=folder, task=config.task, prompt=prompt)
        for folder in folders
    ]
    out = Path(config.runs_dir) / f"{config.name}-comparison"
    return CompareConfig(evals=evals, runs_dir=config.runs_dir, out=str(out), quality=config.score)


def pairs_of(plan: list[Stage]) -> list[tuple[int, int]]:
    """Return the (later, earlier) rows to compare: each round with the one it continues, arms with each other too.

    Row 0 is the base model.
    """
    trained = trainings(plan)
    last = sum(isinstance(stage.recipe, SFTConfig) for stage in trained)  # the row that round 3 starts from
    arms = range(last + 1, len(trained) + 1)
    return [*((row, row - 1) for row in range(1, last + 1)), *((row, last) for row in arms), *pairwise(arms[::-1])]


def gains(runs: list[comparison.Run], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Compare each (later, earlier) pair of rounds by the comparison's paired test (`comparison.paired`); a line each.

    Won (lost) are the problems that the later round answered right more (less) often. With several pairs the p-value
    is Holm's over them.
    """
    lines = []
    chosen = [(runs[later], runs[earlier]) for later, earlier in pairs]
    found = [comparison.paired(after, before) for after, before in chosen]
    family = f" after Holm over {len(found)} pairs" if len(found) > 1 else ""
    for (after, before), pair, p in zip(chosen, found, stats.holm([one["p_value"] for one in found]), strict=True):
        test = "McNemar" if all(len(run.samples) == pair["problems"] for run in (before, after)) else "sign-flip"
        lines.append(
            f"{comparison.label(after)} against {comparison.label(before)}: {percent(pair['diff'], signed=True)} "
            f"points, {pair['wins']} won, {pair['losses']} lost of {pair['problems']}, exact {test} "
            f"p {p_relation(p)}{family}"
        )
    return lines
