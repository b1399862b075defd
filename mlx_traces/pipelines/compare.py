"""Compare runs: make the missing evaluations, then put all runs in one table of paired differences."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_traces.config import (
    CompareConfig,
    ComparedConfig,
    EvalConfig,
    GRPOConfig,
    PPOConfig,
    RLConfig,
    ScoreConfig,
    StudyTask,
    build,
    find_config,
    read_config,
    shipped,
)
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, endpoint, evaluator, stats
from mlx_traces.evaluation.comparison import Run, by_extractor, read_run
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.evaluation.pairs import pairs as pairs_of
from mlx_traces.evaluation.run import evaluate, progress_bar, run
from mlx_traces.models import names
from mlx_traces.pipelines import quality
from mlx_traces.runtime.run_folder import RunFolder, lines_so_far
from mlx_traces.text import clean

if TYPE_CHECKING:
    import pandas as pd

    from mlx_traces.models.convert import Conversion


DEFAULT_LIMIT = 500  # problems of the comparison that runs without arguments
# Adapters that come with the package, in the order of their making.
TRAINED = ("nano-epoch1", "nano-epoch2", "nano-grpo", "nano-ppo")


@dataclass(frozen=True)
class Entry:
    """One evaluation: its settings, the conversion that its model needs first, and its name in the tables.

    ``where`` is the model's place in the configuration: ``models.0``, ``evals.0``, with several tasks ``tasks.1,
    models.0``. Entries with the same ``recipe`` are trainings of one recipe, and one row.
    """

    config: EvalConfig
    where: str
    conversion: "Conversion | None" = None
    label: str | None = None
    recipe: tuple[object, ...] | None = None

    @property
    def ready(self) -> bool:
        """Whether the model exists, converted if needed."""
        return self.conversion is None or self.conversion.path.is_dir()

    def plan(self) -> Plan:
        """Check the evaluation and load its problems; before a conversion, with the unconverted model."""
        converted = {"model": str(self.conversion.path)} if self.conversion and self.ready else {}
        return evaluator.plan(self.config.model_copy(update=converted))

    def named(self, made: Run) -> Run:
        """Return a run with its name in the tables."""
        if self.label:
            return replace(made, result=made.result | {"model": self.label, "adapter": None})
        return replace(made, result=made.result | {"model": self.conversion.label}) if self.conversion else made


def entries(config: ComparedConfig, task: StudyTask) -> tuple[list[Entry], list[str]]:
    """List the evaluations of one task, for each model and prompt; also return notes on models that are left out.

    Raises:
        UserError: for a wrong setting, or one that models or prompts fill in.
    """
    from mlx_traces.models import convert

    found, notes = [], []
    shared = task.model_dump(exclude_unset=True, exclude={"prompts"})
    for given in (name for name in ("model", "adapter", "prompt") if name in shared):
        raise UserError(f"tasks: {given!r} is filled in; name it under models, or in prompts")
    for place, model in enumerate(config.models):
        spec, adapter = names.split_adapter(model.model, model.adapter)
        if model.adapters and (adapter or not model.label):
            raise UserError(f"models.{place}: adapters are trainings of one recipe; give them a label, and no adapter")
        adapters = model.adapters or [adapter]
        absent = next((folder for folder in adapters if folder and not names.is_folder(folder)), None)
        if model.optional and absent:
            notes.append(f"{model.label or model.model} is left out: there is no adapter in {absent} yet")
            continue
        wanted, served = None, bool(model.settings.get("endpoint"))
        if model.bits is not None and (served or task.endpoint):
            raise UserError(f"models.{place}: bits cannot be chosen for a model behind a server; leave bits out")
        if model.bits is not None:
            names.check(spec)
            wanted = convert.conversion(spec, model.bits, model.group_size, Path(config.runs_dir) / "models")
        for prompt, adapter in product(model.prompts or task.prompts, adapters):
            own = {"model": spec, "adapter": adapter, "prompt": prompt}
            if taken := sorted(own.keys() & model.settings.keys()):
                raise UserError(f"models.{place}.settings: {taken[0]!r} is a field of its own, beside settings")
            # Settings of models that are loaded here do not apply to a model behind a server.
            kept = {name: value for name, value in shared.items() if not (served and name in endpoint.LOCAL)}
            settings = build(EvalConfig, {**kept, **model.settings, **own}, f"models.{place}.settings")
            settings = settings.model_copy(update={"growing": True}) if config.stop_when_decided else settings
            recipe = (place, prompt, id(task)) if model.adapters else None
            found.append(Entry(settings, f"models.{place}", wanted, model.label, recipe))
    if not found:
        raise UserError(f"models: no model is left to evaluate; {'; '.join(notes)}")
    return found, notes


def plans_of(found: Sequence[Entry]) -> list[Plan]:
    """Check evaluations and load their problems; UserError also if models have different problems."""
    plans = [entry.plan() for entry in found]
    ids = [[problem.id for problem in planned.problems] for planned in plans]
    asked = [own if planned.source else frozenset(own) for own, planned in zip(ids, plans, strict=True)]
    for entry, planned, own in zip(found, plans, asked, strict=True):
        if own != asked[0]:
            task, first = planned.task.name, plans[0].task.name
            other = f"{'' if task == first else f'{first} in '}{found[0].where}"
            way = "set task, split, data, limit and seed once, for all models (data_seed, where their seeds differ)"
            if entry.where.startswith("tasks."):
                way = "name one task, or use `mlx-traces study`, which has a table for each task"
            raise UserError(
                f"{entry.where}: its {len(own):,} problems of {task} are not the {len(asked[0]):,} of {other}, and "
                f"rows are compared on the same problems; {way}"
            )
    return plans


def make(
    found: Sequence[Entry],
    plans: Sequence[Plan],
    runs_dir: str | Path,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    apart: bool = False,
    count: int | None = None,
    kept: dict[str, Any] | None = None,
) -> list[Run]:
    """Convert models, and make or finish the missing evaluations; return their runs, in order.

    ``plans`` are from `plans_of`, ``say`` gets a line before each conversion, ``apart``, ``count`` and ``kept`` are
    those of `obtain`; by default a model is kept from row to row.

    Raises:
        UserError: if the input is wrong.
    """
    for entry in found:
        if not entry.ready:
            from mlx_traces.models import convert

            say(f"converting {entry.conversion.model} to {entry.conversion.path}")
            convert.convert(entry.conversion, entry.config.trust_remote_code)
    runs, kept = [], {} if kept is None else kept
    for entry, planned in zip(found, plans, strict=True):
        now = entry.plan() if entry.conversion else planned
        runs.append(entry.named(obtain(now, Path(runs_dir) / now.label, progress, apart, count, kept)))
    return runs


def rows(found: Sequence[Entry]) -> list[list[int]]:
    """Return the table's rows: for each the indices of its entries, several where these are trainings of a recipe."""
    grouped: dict[object, list[int]] = {}
    for i, entry in enumerate(found):
        key = (entry.recipe, entry.config.think_tokens) if entry.recipe else i  # each budget of thought is a row
        grouped.setdefault(key, []).append(i)
    return list(grouped.values())


def outlines(found: Sequence[Entry], plans: Sequence[Plan]) -> list[Run]:
    """Return the table's rows before they are made: runs with names and settings, but without samples."""
    outlined = []
    for first, *_ in rows(found):
        entry, planned = found[first], plans[first]
        about = {**planned.config.model_dump(), "model": planned.model, "prompt": planned.prompt.name}
        about["extractor"] = planned.extractor
        name = planned.label if entry.ready else ""  # a converted model's run is new
        outlined.append(entry.named(Run(name, about, [])))
    return outlined


def joined(found: Sequence[Entry], runs: Sequence[Run]) -> list[Run]:
    """Return a run for each row: the trainings of a recipe joined into one."""
    return [
        runs[row[0]] if len(row) == 1 else comparison.recipe(found[row[0]].label or "", [runs[i] for i in row])
        for row in rows(found)
    ]


def default_evals() -> list[EvalConfig]:
    """Return the comparison without arguments: nano on held-out Countdown problems.

    Direct against thinking, and the shipped adapters, from the working folder, the installed package, or the checkout
    that this package runs from.
    """
    homes = (Path("adapters"), shipped("adapters"))
    found = [next((home / name for home in homes if (home / name).is_dir()), None) for name in TRAINED]
    settings = {"task": "countdown", "data": "3-numbers", "limit": DEFAULT_LIMIT, "max_tokens": 320, "rows": 256}
    return [
        *(EvalConfig(prompt=prompt, **settings) for prompt in ("direct", "thinking")),
        *(EvalConfig(prompt="thinking", adapter=str(folder), **settings) for folder in found if folder),
    ]


def requested(
    config: CompareConfig,
    runs: Sequence[str] = (),
    models: Sequence[str] = (),
    prompts: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> CompareConfig:
    """Add a command's arguments to a configuration; without any it is the default comparison.

    Each model is evaluated in each prompt. Without models, prompts and settings replace those of the configuration's
    tasks and evaluations. An ``extractor`` also judges finished runs; no other setting can change a finished run.

    Raises:
        UserError: for a wrong setting, or one that cannot change a finished run.
    """
    settings, everything, evals, tasks = dict(settings or {}), [*config.runs, *runs], list(config.evals), config.tasks
    finished = everything or config.recipes
    if models or ((prompts or settings) and not (finished or evals or tasks)):
        crossed = [(model, prompt) for model in models or ["nano"] for prompt in prompts or [None]]
        evals += [build(EvalConfig, {**settings, "model": model, "prompt": prompt}) for model, prompt in crossed]
    elif evals or tasks:
        asked = {**settings, **({"prompts": list(prompts)} if prompts else {})}
        tasks = [build(StudyTask, {**task.model_dump(exclude_unset=True), **asked}) for task in tasks]
        evals = [
            build(EvalConfig, {**eval_.model_dump(exclude_unset=True), **settings, "prompt": prompt})
            for eval_ in evals
            for prompt in prompts or [eval_.prompt]
        ]
    elif finished:
        fixed = [*(["prompt"] if prompts else []), *(name for name in settings if name != "extractor")]
        if fixed:
            raise UserError(f"finished runs cannot be given another {fixed[0]}; name a model to evaluate it anew")
    else:
        evals = default_evals()
    extractor = settings.get("extractor", config.extractor)
    return config.model_copy(update={"runs": everything, "evals": evals, "tasks": tasks, "extractor": extractor})


def runs_and_entries(
    config: CompareConfig, say: Callable[[str], None] = lambda line: None, labels: Sequence[str | None] = ()
) -> tuple[list[Run], list[Entry]]:
    """Read the named runs, and list the evaluations; ``say`` gets a line for each model that is left out.

    ``labels`` are names of ``config.evals`` in the tables; None or missing: the model's and the adapter's.

    Raises:
        UserError: if the input is wrong.
    """
    if config.models and not config.tasks:
        raise UserError("models: there are no tasks for them; add tasks, as in [{task: countdown, prompts: [direct]}]")

    def judged(path: str) -> Run:
        stored = read_run(path)
        return by_extractor(stored, config.extractor) if config.extractor else stored

    collected = [judged(path) for path in dict.fromkeys(config.runs)]
    for name, paths in config.recipes.items():
        collected.append(comparison.recipe(name, [judged(path) for path in paths]))
    named = zip_longest(config.evals, labels)
    found = [Entry(settings, f"evals.{place}", label=label) for place, (settings, label) in enumerate(named)]
    for place, task in enumerate(config.tasks):
        own, notes = entries(config, task)
        found += [replace(entry, where=f"tasks.{place}, {entry.where}") for entry in own] if config.tasks[1:] else own
        for note in notes:
            say(note)
    changes = ({"extractor": config.extractor} if config.extractor else {}) | (
        {"growing": True} if config.stop_when_decided else {}
    )
    return collected, [replace(entry, config=entry.config.model_copy(update=changes)) for entry in found]


def collect(
    config: CompareConfig,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    labels: Sequence[str | None] = (),
) -> list[Run]:
    """Read the named runs, then make or finish the evaluations; return the runs in that order.

    An evaluation is not repeated if its run folder exists with the same settings, problems and model files. ``say``
    gets a line for each model that is left out, and before each conversion. ``labels`` are as in `runs_and_entries`.

    Raises:
        UserError: if the input is wrong; runs, settings, models, problems and the baseline are checked before the first
            evaluation.
    """
    collected, found = runs_and_entries(config, say, labels)
    plans = plans_of(found)
    comparison.baseline_index([*collected, *outlines(found, plans)], config.baseline or 0)
    made = joined(found, make(found, plans, config.runs_dir, say, progress))
    return collected + list({_shown(one): one for one in made}.values())


def _shown(one: Run) -> tuple[str, ...]:
    """Return what is the same in two rows of a table that are one evaluation."""
    return one.name, one.result["model"], one.result["extractor"]


def collect_until_decided(
    config: CompareConfig, progress: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Run]:
    """Make the evaluations until every difference from the baseline is decided (`until_decided`); return their runs.

    Raises:
        UserError: as `collect` and `until_decided`, and for finished runs.
    """
    if finished := [*config.runs, *(f"recipe {name}" for name in config.recipes)]:
        raise UserError(
            "--stop-when-decided evaluates models block by block and cannot continue finished runs "
            f"({clean(finished[0])}); name models in their place, or leave it out"
        )
    _, found = runs_and_entries(config, say)
    check_stopping(config, found)
    plans = plans_of(found)
    keys = [_shown(row) for row in outlines(found, plans)]
    distinct = [keys.index(key) for key in dict.fromkeys(keys)]  # two equal rows would never be decided
    found, plans = [found[i] for i in distinct], [plans[i] for i in distinct]
    baseline = comparison.baseline_index(outlines(found, plans), config.baseline or 0)
    check_stopping(config, found)  # once more: equal rows are gone
    return until_decided(config, found, plans, baseline, progress, say)


def check_stopping(config: ComparedConfig, found: Sequence[Entry]) -> None:
    """Raise UserError for rows that cannot stop early: trainings of a recipe, clusters, or fewer than two."""
    together = [f"--cluster {clean(config.cluster)}"] if config.cluster else []
    together += [f"several trainings of a recipe ({entry.where}.adapters)" for entry in found if entry.recipe]
    if together:
        raise UserError(
            f"--stop-when-decided tests problem by problem, so it does not go with {together[0]}; leave out one of them"
        )
    if len(found) < 2:
        raise UserError("--stop-when-decided needs two different rows or more; name another model or prompt")


def until_decided(
    config: ComparedConfig,
    found: Sequence[Entry],
    plans: Sequence[Plan],
    baseline: int | None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    apart: bool = False,
) -> list[Run]:
    """Evaluate all rows together, block by block, until every difference is decided.

    A difference is decided when its anytime-valid p-value, adjusted by Holm over the pairs, is at most `stats.LEVEL`.
    Such p-values remain valid if several rows stop together. The seed determines the order of the problems; a stored
    run continues where it ended.

    Args:
        config: its ``block`` and ``runs_dir``.
        found: two rows or more, that `check_stopping` lets pass.
        plans: from `plans_of`.
        baseline: index of the row that all others are compared with; None: every pair is tested.
        progress: show progress bars on stderr.
        say: gets a line after each block.
        apart: as for `obtain`.

    Returns:
        The runs, with the sentence on how it ended as ``stopped``.

    Raises:
        UserError: if the input is wrong.
    """
    budget, kept = len(plans[0].problems), {}
    for count in (*range(config.block, budget, config.block), budget):
        runs = make(found, plans, config.runs_dir, say, progress, apart, count, kept)
        runs = [replace(run, stopped=f"After {count:,} of {budget:,} problems.") for run in runs]
        p_values = [pair.p_holm for pair in pairs_of(runs, baseline)]
        decided = sum(p <= stats.LEVEL for p in p_values)
        say(f"{count:,} of {budget:,} problems: {decided} of {len(p_values)} differences decided")
        if decided == len(p_values):
            break
    every = "the difference is" if len(p_values) == 1 else f"all {len(p_values)} differences are"
    ended = f"Stopped after {count:,} of {budget:,} problems: {every} decided"
    if count == budget:
        ended = f"Ended with the budget of {budget:,} problems: {decided} of {len(p_values)} differences decided"
    ended += ". Intervals and p-values of differences in accuracy allow for that; other intervals and tests do not."
    return [replace(run, stopped=ended) for run in runs]


def obtain(
    planned: Plan,
    path: Path,
    progress: bool = False,
    apart: bool = False,
    count: int | None = None,
    kept: dict[str, Any] | None = None,
) -> Run:
    """Return a planned evaluation's run; make or finish it in ``path`` if needed.

    Args:
        planned: the evaluation.
        path: its run folder.
        progress: show a progress bar on stderr.
        apart: evaluate in another process, so that the peak memory is that of this evaluation alone.
        count: number of problems to return of a growing run; the stored run keeps all of its problems.
        kept: where the loaded model is kept, as for `run.run`.

    Raises:
        UserError: if the input is wrong, or a process apart dies.
    """
    missing, wanted = not RunFolder(path).finished, planned
    if planned.source:
        have = {row["id"] for row in lines_so_far(RunFolder(path).samples_path, ("id",))}
        count = count or len(planned.problems)
        places = [i for i, problem in enumerate(planned.problems, 1) if problem.id in have]  # a cut left gaps
        missing, wanted = missing or len(have) < count, planned.first(max([count, len(have), *places]))
    if missing and apart:
        settings = wanted.config.model_dump(exclude_unset=True)
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(evaluate, out=path, resume=path.exists(), progress=progress, **settings).result()
        except BrokenProcessPool:
            raise UserError(
                f"{path}: the process that evaluated it died, perhaps for lack of memory; try fewer rows"
            ) from None
    elif missing:
        with progress_bar(progress) as show:
            run(wanted, path, path.exists(), show, kept)
    stored = read_run(path)
    return by_extractor(part(stored, planned.first(count)) if planned.source else stored, planned.extractor)


def part(stored: Run, planned: Plan) -> Run:
    """Return the part of a growing run that answers a plan's problems."""
    wanted = {problem.id for problem in planned.problems}
    samples = [row for row in stored.samples if row["id"] in wanted]
    if len(samples) == len(stored.samples):
        return stored
    known = stored.result
    result = evaluator.summarize(planned, samples, stored.name, known["peak_memory_gb"], known["notes"])
    return replace(stored, result=known | asdict(result), samples=samples)


class Compared(NamedTuple):
    """A comparison: its table, its runs, and the quality of their answers if requested."""

    frame: "pd.DataFrame"
    runs: list[Run]
    quality: "pd.DataFrame | None"


def compared(
    config: CompareConfig,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    pairs: Sequence[tuple[int, int]] | None = None,
    trainings: Sequence[Path] = (),
    labels: Sequence[str | None] = (),
) -> Compared:
    """Carry out a comparison, and write the files and the page into ``config.out`` if it is set.

    ``say`` is as in `collect`. ``pairs`` are the (later, earlier) rows whose quality is compared; default: each row
    with the baseline. ``trainings`` are run folders for the page, ``labels`` are as in `runs_and_entries`.
    """
    from mlx_traces.report import export, page

    recipe = training_config(config.rewards) if config.rewards else None  # a wrong file ends it before the first run
    if config.stop_when_decided:
        runs = collect_until_decided(config, progress, say)
    else:
        runs = comparison.clustered(collect(config, progress, say, labels), config.cluster)
    base = comparison.baseline_index(runs, config.baseline or 0)
    frame = comparison.compare_runs(runs, base)
    frame["true_equations"] = [quality.true_equations(one) for one in runs]
    scored = None
    if config.quality is not None or recipe:
        against = [(row, base) for row in range(len(runs)) if row != base] if pairs is None else pairs
        scored = quality.compare_quality(runs, config.quality or ScoreConfig(), against, recipe)
    if config.out:
        export.write_all(runs, frame, Path(config.out), config.model_dump(mode="json"), scored)
        page.write([*runs, *trainings], config.out, quality=scored, baselines=[runs[base]])
    return Compared(frame, runs, scored)


def training_config(name: str) -> RLConfig:
    """Read a configuration of grpo or ppo, by its path or name."""
    path = find_config(name)
    try:
        return read_config(GRPOConfig, path, {})
    except UserError as error:
        try:
            return read_config(PPOConfig, path, {})
        except UserError:
            raise error from None


def compare(
    *runs: str | Path,
    model: str | Path | Sequence[str | Path] = (),
    prompt: str | Sequence[str] = (),
    baseline: str | None = None,
    out: str | Path | None = None,
    runs_dir: str | Path | None = None,
    progress: bool = False,
    recipes: Mapping[str, Sequence[str | Path]] | None = None,
    cluster: str | None = None,
    stop_when_decided: bool | None = None,
    block: int | None = None,
    config: CompareConfig | None = None,
    **settings: Any,
) -> "pd.DataFrame":
    """Compare runs and models; ``mlx-traces compare`` from Python.

    Args:
        *runs: finished run folders.
        model: models to evaluate, each ``MODEL`` or ``MODEL+ADAPTER``.
        prompt: prompt styles, each tried with each model.
        baseline: the run that the others are compared with, by its name or label; default: the first.
        out: folder for the table, the per-question CSV, ``results.json``, the chart and ``report.html``.
        runs_dir: where the run folders of evaluations are kept; default: ``runs``.
        progress: show progress bars on stderr.
        recipes: finished runs of several trainings of one recipe, by the name of their common row.
        cluster: column of the data whose equal values mark problems that belong together.
        stop_when_decided: evaluate all rows together, block by block, until every difference is decided.
        block: problems per block; default: 50.
        config: a comparison to extend by these arguments, as from a YAML file.
        **settings: other fields of ``EvalConfig``, the same for every model.

    Returns:
        One row per run: model, adapter, prompt, accuracy, correct_count, total_questions, ci_low, ci_high, diff,
        diff_low, diff_high, p_value, p_holm, tokens_per_answer, tokens_per_second, the other columns of
        `comparison.compare_runs`, and true_equations. Without any argument: nano, direct against thinking, and its
        adapters.

    Raises:
        UserError: if the input is wrong, or the runs are of different problems.
    """
    changes = {"baseline": baseline, "out": out and str(out), "runs_dir": runs_dir and str(runs_dir)}
    changes |= {"cluster": cluster, "stop_when_decided": stop_when_decided, "block": block}
    changes |= {"recipes": {name: [*map(str, paths)] for name, paths in recipes.items()} if recipes else None}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = build(CompareConfig, {**(config.model_dump(exclude_unset=True) if config else {}), **changes})
    models, prompts = (
        [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
        for names in (model, prompt)
    )
    config = requested(config, [str(path) for path in runs], models, prompts, settings)
    return compared(config, progress).frame
