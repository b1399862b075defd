"""The rounds: raw traces, epoch 1, the model's own traces, scored and filtered, epoch 2, and the table of them all.

Every station's output is named by a hash of its settings and of all that came before it. What is there already is not
made again, what was cut off is continued, and changed settings make new files beside the old ones.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_traces import comparison, evaluation, generation, models, scoring, stats, tables, traces, training
from mlx_traces.config import (
    CompareConfig,
    Config,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    RoundsConfig,
    ScoreConfig,
    SFTConfig,
    build,
)
from mlx_traces.errors import UserError, unknown
from mlx_traces.records import Trace
from mlx_traces.runs import RunFolder, fingerprint
from mlx_traces.tasks import get_task, gsm8k

SOLVED = ("countdown", "gsm8k")  # tasks whose problems come with worked solutions

Show = Callable[[str], Any]  # takes a station's name, returns a context whose value takes a line of metrics and a total


@dataclass(frozen=True)
class Station:
    """One step of the rounds: its name, what it writes, its complete settings, and whether the output is there."""

    name: str
    out: Path
    settings: dict[str, Any]
    make: Callable[[], Any]

    @property
    def finished(self) -> bool:
        """Whether the output is complete; all stations write theirs whole."""
        return RunFolder(self.out).finished if self.out.suffix != ".jsonl" else traces.manifest_path(self.out).exists()


def stations(config: RoundsConfig, show: Show) -> list[Station]:
    """Lay out the stations before the comparison, their names following from the settings.

    Raises:
        UserError: for settings that the rounds fill in themselves, and a task without worked solutions.
    """
    _check(config)
    plan: list[Station] = []
    spec, adapter = models.split_adapter(config.model)
    local = spec == models.NANO or models.is_folder(spec)
    before: list[Any] = [config.model, config.task, config.prompt]
    before += [fingerprint(models.resolve(spec)[0])] if local else []
    before += [fingerprint(Path(adapter))] if adapter else []

    def add(name: str, folder: str, suffix: str, settings: Config, make: Callable[[Path], Any]) -> Path:
        content = settings.model_dump(mode="json", exclude={"rows", "device", "memory_limit", "save_every"})
        files = [str(content[key]) for key in ("file", "data", "eval_data") if content.get(key)]
        before.append([name, content, *(training.digest(file) for file in files if Path(file).is_file())])
        digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:8]
        out = Path(folder) / f"{config.name}-{name}-{digest}{suffix}"
        plan.append(Station(name, out, content, lambda: make(out)))
        return out

    data, ask, start = Path(config.data_dir), {"task": config.task, "prompt": config.prompt}, adapter
    if config.epoch1 is not None:
        raw = add("raw", data / "raw", ".jsonl", config.raw, lambda out: make_raw(config, out))
        first = _filled(SFTConfig, config.epoch1, model=spec, adapter=adapter, data=str(raw))
        start = str(add("epoch1", config.runs_dir, "", config.epoch1, lambda out: _sft(first, out, show)) / "adapter")
    drawn = _filled(GenerateConfig, config.generate, model=spec, adapter=start, **ask)
    own = add("generated", data / "generated", ".jsonl", config.generate, lambda out: _generate(drawn, out, show))
    scored = add("scored", data / "processed", ".jsonl", config.score, lambda out: _score(config.score, own, out))
    kept = add("filtered", data / "processed", ".jsonl", config.filter, lambda out: _filter(config.filter, scored, out))
    second = _filled(SFTConfig, config.epoch2, model=spec, adapter=start, data=str(kept))
    add("epoch2", config.runs_dir, "", config.epoch2, lambda out: _sft(second, out, show))
    return plan


def _check(config: RoundsConfig) -> None:
    for name, own in (("generate", {"model", "adapter", "task", "prompt"}), ("compare", {"model", "adapter", "task"})):
        if given := sorted(own & getattr(config, name).model_fields_set):
            raise UserError(f"{name}.{given[0]}: the rounds fill this in; set it at the top, or leave it out")
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
    raw, skipped, task = config.raw, Counter(), get_task(config.task)
    styles = [task.prompt(name) for name in raw.prompts or [config.prompt]] if raw.file is None else []
    if raw.file is not None:
        made: Iterator[Trace] = (trace for _, trace in traces.read_traces(Path(raw.file)))
        source = raw.file
    elif config.task == "countdown":
        made = traces.countdown_traces(raw.count or 1000, raw.split, raw.seed, prompts=styles, skipped=skipped)
        source = "solver"
    else:
        made = (
            trace
            for style in styles
            for trace in traces.gsm8k_traces(raw.split, raw.data, raw.count, raw.seed, style, raw.style, skipped)
        )
        source = raw.data or gsm8k.HUB
    counts = {"skipped": skipped}
    manifest = {"source": source, "config": raw.model_dump(mode="json"), "counts": counts, "seed": raw.seed}
    return [f"{traces.write_traces(out, made, manifest):,} traces"]


def _sft(config: SFTConfig, out: Path, show: Show) -> list[str]:
    from mlx_traces import sft

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
        counts = generation.generate(config, out, resume=True, show=count)
    return [", ".join(f"{count:,} {name}" for name, count in counts.items())]


def _score(config: ScoreConfig, source: Path, out: Path) -> list[str]:
    scored = scoring.score_file(source, out, config)
    means = [(name, mean) for name, mean, _ in scoring.summary(scored) if mean is not None]
    return [", ".join(f"{name} {mean:.3f}" for name, mean in means)]


def _filter(config: FilterConfig, source: Path, out: Path) -> list[str]:
    report = scoring.filter_file(source, out, config)
    return [f"{rule}: {removed:,} removed, {left:,} left" for rule, removed, left in report]


def run(config: RoundsConfig, say: Callable[[str], None], show: Show, progress: bool = False) -> Any:
    """Carry out what is missing, then compare base, epoch 1 and epoch 2 on the same problems.

    Args:
        config: the settings.
        say: takes lines for the user.
        show: see `Show`.
        progress: show the evaluations' progress bars.

    Returns:
        The comparison's table and its runs.

    Raises:
        UserError: if the input is wrong; finished stations stay.
    """
    plan = stations(config, show)
    compared = comparison_of(config, plan)
    evaluation.plan(compared.evals[0])  # a fault in the comparison's settings is found before hours of training
    for station in plan:
        if station.finished:
            say(f"{station.name}: {station.out} is there")
            continue
        say(f"{station.name}: making {station.out}")
        if station.out.suffix == ".jsonl":
            traces.discard_unfinished(station.out)
        for line in station.make():
            say(f"{station.name}: {line}")
    return comparison.compared(compared, progress)


def comparison_of(config: RoundsConfig, plan: list[Station]) -> CompareConfig:
    """Return the comparison at the end: the base model and each epoch's adapter, all on the same problems."""
    spec, adapter = models.split_adapter(config.model)
    adapters = [adapter, *(str(station.out / "adapter") for station in plan if station.name.startswith("epoch"))]
    prompt = config.compare.prompt or config.prompt
    evals = [
        _filled(EvalConfig, config.compare, model=spec, adapter=name, task=config.task, prompt=prompt)
        for name in adapters
    ]
    out = Path(config.runs_dir) / f"{config.name}-comparison"
    return CompareConfig(evals=evals, runs_dir=config.runs_dir, out=str(out))


def gains(runs: list[tables.Run]) -> list[str]:
    """Say what each round changed against the one before, by McNemar's exact test on the same problems."""
    lines = []
    for before, after in pairwise(runs):
        pairs = {row["id"]: row["correct"] for row in before.samples}
        won = sum(row["correct"] and not pairs[row["id"]] for row in after.samples)
        lost = sum(pairs[row["id"]] and not row["correct"] for row in after.samples)
        share = (won - lost) / len(after.samples)
        lines.append(
            f"{tables.label(after)} against {tables.label(before)}: {tables.percent(share, signed=True)} points, "
            f"{won} won, {lost} lost of {len(after.samples)}, exact McNemar {tables.p_text(stats.mcnemar(won, lost))}"
        )
    return lines
