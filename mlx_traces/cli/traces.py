"""data, score, filter, reformat and generate."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from mlx_traces.cli.options import ConfigFile, Sectioned, configured, console, settings_options
from mlx_traces.cli.train import training_bar
from mlx_traces.config import FilterConfig, GenerateConfig, RawConfig, ReformatConfig, ScoreConfig
from mlx_traces.errors import UserError, choices, unknown
from mlx_traces.readers import is_file
from mlx_traces.records import Trace
from mlx_traces.runtime.device import import_mlx
from mlx_traces.runtime.files import refuse_existing, write_new
from mlx_traces.tasks import Task, get_task
from mlx_traces.traces import FORMATS, files

OPERANDS = "Numbers per problem.  [default: 3 4]"
STYLE = "Prompt style.  Repeat for more.  [default: thinking]"
GIVE_UP, DAUNTING = (RawConfig.model_fields[name].description for name in ("give_up", "daunting"))
SPLIT = "train, valid or test; no two share a set of numbers."


@click.group("data")
def data_group() -> None:
    """Make files of problems and traces, or import traces."""


def generated_problems(command: Callable) -> Callable:
    """Add the options that choose the generated Countdown problems."""
    for option in (
        click.option("--operands", nargs=2, type=int, default=(3, 4), metavar="LOW HIGH", help=OPERANDS),
        click.option("--seed", default=0, show_default=True, help="Seed of the problems."),
        click.option("--split", default="train", show_default=True, help=SPLIT),
        click.option(
            "--n", "count", type=click.IntRange(1), default=1000, show_default=True, help="Number of problems."
        ),
    ):
        command = option(command)
    return command


@data_group.command("countdown")
@generated_problems
@click.option(
    "--numbers",
    nargs=2,
    type=int,
    default=(1, 50),
    metavar="LOW HIGH",
    help="Range of the numbers.  [default: 1 50]",
)
@click.option(
    "--target",
    nargs=2,
    type=int,
    default=(10, 100),
    metavar="LOW HIGH",
    help="Range of the target.  [default: 10 100]",
)
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write.")
def data_countdown(
    count: int,
    split: str,
    seed: int,
    operands: tuple[int, int],
    numbers: tuple[int, int],
    target: tuple[int, int],
    out: str,
) -> None:
    """Write solvable Countdown problems.

    A row has nums, target and solutions: how many there are, as a measure of difficulty.
    """
    from mlx_traces.tasks import countdown, solver

    refuse_existing(Path(out))
    rows = [
        {"nums": nums, "target": value, "solutions": solver.solutions(nums, value)}
        for nums, value in countdown.generate(split, count, seed, operands, numbers, target)
    ]
    write_new(Path(out), "".join(json.dumps(row) + "\n" for row in rows))
    click.echo(f"{len(rows)} problems written to {out}", err=True)


@data_group.command("countdown-traces")
@generated_problems
@click.option("--prompt", "prompts", multiple=True, default=("thinking",), help=STYLE)
@click.option("--give-up", type=click.FloatRange(0, 1), default=0.0, show_default=True, help=GIVE_UP)
@click.option("--daunting", type=click.FloatRange(0), default=0.0, show_default=True, help=DAUNTING)
@click.option("--out", default="data/raw/countdown.jsonl", show_default=True, type=click.Path(), help="File to write.")
def data_countdown_traces(
    count: int,
    split: str,
    seed: int,
    operands: tuple[int, int],
    prompts: tuple[str, ...],
    give_up: float,
    daunting: float,
    out: str,
) -> None:
    """Write a solver's traces of Countdown problems.

    A trace is a search with every step that the solver tried, then the answer. If the solver gives up, the answer is
    its nearest try, which is wrong.
    """
    from mlx_traces.tasks import countdown
    from mlx_traces.traces import solutions

    styles = [countdown.TASK.prompt(name) for name in dict.fromkeys(prompts)]
    config = {"n": count, "split": split, "seed": seed, "operands": list(operands), "prompts": [p.name for p in styles]}
    config |= {"give_up": give_up} if give_up else {}
    config |= {"daunting": daunting} if daunting else {}
    skipped = Counter()
    made = solutions.countdown_traces(count, split, seed, operands, styles, skipped, give_up, daunting)
    _write(out, made, "solver", config, skipped, seed)


def worked_solutions(task: str, source: str, styles: str) -> Callable:
    """Add the options of a command that makes traces from a task's worked solutions."""

    def decorate(function: Callable) -> Callable:
        for option in (
            click.option(
                "--out", default=f"data/raw/{task}.jsonl", show_default=True, type=click.Path(), help="File to write."
            ),
            click.option("--prompt", help="Prompt style.  [default: the one that fits --style]"),
            click.option("--style", default="think", show_default=True, help=f"Where the answer stands: {styles}."),
            click.option("--seed", default=0, show_default=True, help="Seed of the sample."),
            click.option(
                "--limit", type=click.IntRange(1), help="Number of problems, drawn by --seed.  [default: all]"
            ),
            click.option("--data", help=f"File or hub data set.  [default: {source}]"),
            click.option(
                "--split", default="train", show_default=True, help="train, test, or a part as in 'train[:1000]'."
            ),
        ):
            function = option(function)
        return function

    return decorate


@data_group.command("gsm8k")
@worked_solutions("gsm8k", "openai/gsm8k", "think (<answer> after the thought), plain (####) or boxed")
def data_gsm8k(**options: Any) -> None:
    """Write GSM8K's worked solutions as traces. Their calculator annotations are removed."""
    from mlx_traces.tasks import gsm8k
    from mlx_traces.traces import solutions

    _write_solutions(gsm8k.TASK, solutions.gsm8k_traces, solutions.GSM8K_STYLES, gsm8k.HUB, **options)


@data_group.command("math")
@worked_solutions("math", "MATH's train split", "think (<answer> after the thought) or boxed")
def data_math(**options: Any) -> None:
    """Write MATH's solutions as traces. The code of their figures is removed."""
    from mlx_traces.tasks import math
    from mlx_traces.traces import solutions

    source = math.source_of(options["split"], options["data"])
    _write_solutions(math.TASK, solutions.math_traces, solutions.MATH_STYLES, source, **options)


def _write_solutions(
    task: Task,
    make: Callable,
    styles: dict[str, str],
    source: str,
    out: str,
    style: str,
    prompt: str | None,
    **config: Any,
) -> None:
    """Write a task's worked solutions as traces in a style; default prompt: the style's own."""
    if style not in styles:
        raise unknown("style", style, styles)
    asked = task.prompt(prompt or styles[style])
    skipped = Counter()
    made = make(**config, prompt=asked, style=style, skipped=skipped)
    settings = {**config, "style": style, "prompt": asked.name}
    _write(out, made, config["data"] or source, settings, skipped, config["seed"])


@data_group.command("import")
@click.argument("data", metavar="FILE")
@click.option(
    "--format",
    "form",
    required=True,
    help=f"Format of a row: {choices(FORMATS)}; Sky-T1 uses sharegpt.",
)
@click.option(
    "--task",
    help="Task that can grade the traces: gsm8k, countdown, math, qa or module:TASK; each row needs its columns.",
)
@click.option(
    "--style",
    default="think",
    show_default=True,
    help="Tags to write: think or sky-t1; keep: leave the tags as they are.",
)
@click.option(
    "--split", default="train", show_default=True, help="Split of a hub data set; a slice as in 'train[:1000]'."
)
@click.option("--strict", is_flag=True, help="Refuse turns with fields that are not imported.  [default: drop them]")
@click.option("--out", type=click.Path(), help="File to write.  [default: data/raw/NAME.jsonl]")
def data_import(data: str, form: str, task: str | None, style: str, split: str, strict: bool, out: str | None) -> None:
    """Import traces from a file or a hub data set.

    FILE is .jsonl, .json, .parquet, .arrow or .txt, or OWNER/NAME on the hub. A thought in a field of its own
    (reasoning_content, thinking, reasoning, thought) is put in tags before the answer. A turn of weight 0 is not
    learned. Other fields of a turn are left out and counted.
    """
    from mlx_traces.traces import importing

    grader = get_task(task) if task else None
    config = {"data": data, "format": form, "task": task, "style": style, "split": split, "strict": strict}
    skipped, dropped = Counter(), Counter()
    own = None if style == "keep" else style
    made = importing.import_traces(data, form, grader, own, split, skipped, dropped, strict)
    name = Path(data).stem if is_file(data) else Path(data.partition("@")[0]).name
    _write(out or f"data/raw/{name}.jsonl", made, data, config, skipped, None, dropped)


def _write(
    out: str,
    made: Iterable[Trace],
    source: str,
    config: dict[str, Any],
    skipped: Counter,
    seed: int | None,
    dropped: Counter | None = None,
) -> None:
    """Write traces and their manifest; print how many."""
    counts = {"skipped": skipped} | ({} if dropped is None else {"dropped": dropped})
    origin = files.source_of(source) if source == config.get("data") else {"source": source}
    written = files.write_traces(Path(out), made, {**origin, "config": config, "counts": counts, "seed": seed})
    left_out = files.counted(counts)
    click.echo(f"{written:,} traces written to {out}{left_out and f'; {left_out}'}", err=True)


@click.command("score")
@click.argument("source", metavar="IN", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write, as in data/processed/x.jsonl.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option("--mix", "mix", multiple=True, metavar="NAME=WEIGHT", help="Weight of a component.  Repeat for more.")
@settings_options(ScoreConfig, "mix")
def score_command(source: str, out: str, config_file: str | None, mix: tuple[str, ...], settings: dict) -> None:
    """Score the traces of IN.

    The scores are correctness, form, structure, faithfulness, length, repetition, and if requested the perplexity
    under a model and the grade of a judge.
    """
    from mlx_traces.traces import score

    if mix:
        for item in mix:
            if "=" not in item:
                raise UserError(f"--mix {item}: give NAME=WEIGHT, as in faithfulness=2")
        settings["mix"] = dict(item.split("=", 1) for item in mix)
    traces = score.score_file(Path(source), Path(out), configured(ScoreConfig, config_file, settings))
    rows = [
        (name, "–" if mean is None else f"{mean:.3f}", f"{100 * share:.0f} %")
        for name, mean, share in score.summary(traces)
    ]
    _print_table(("score", "mean", "applies to"), rows)
    click.echo(f"{len(traces)} scored traces written to {out}", err=True)


@click.command("filter")
@click.argument("source", metavar="IN", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write, as in data/processed/y.jsonl.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@settings_options(FilterConfig)
def filter_command(source: str, out: str, config_file: str | None, settings: dict) -> None:
    """Keep the traces of IN that pass the rules. Prints the number of traces that each rule removed."""
    from mlx_traces.traces import filtering

    report = filtering.filter_file(Path(source), Path(out), configured(FilterConfig, config_file, settings))
    _print_table(("rule", "removed", "left"), [(rule, f"{gone:,}", f"{left:,}") for rule, gone, left in report])
    click.echo(f"{report[-1][2] if report else 'all'} traces written to {out}", err=True)


@click.command("reformat")
@click.argument("source", metavar="IN", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write, as in data/processed/z.jsonl.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@settings_options(ReformatConfig)
def reformat_command(source: str, out: str, config_file: str | None, settings: dict) -> None:
    """Rewrite the traces of IN as a thought and a solution. Keeps those that are still correct."""
    from mlx_traces.traces import reformat

    written, dropped = reformat.reformat_file(
        Path(source), Path(out), configured(ReformatConfig, config_file, settings)
    )
    left_out = files.counted({"dropped": dropped})
    click.echo(f"{written:,} traces written to {out}{left_out and f'; {left_out}'}", err=True)


def _print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a small table, its numbers right-aligned."""
    from rich.table import Table

    table = Table(*head[:1])
    for title in head[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


@click.command("generate", cls=Sectioned)
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option(
    "--out", default="data/generated/traces.jsonl", show_default=True, type=click.Path(), help="File to write."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run; its finished completions are kept.")
@settings_options(GenerateConfig)
def generate_command(config_file: str | None, out: str, resume: bool, settings: dict) -> None:
    """Sample completions of training problems as traces. Keeps their log-probabilities."""
    config = configured(GenerateConfig, config_file, settings)
    import_mlx()
    from mlx_traces.evaluation import evaluator
    from mlx_traces.traces import generate

    for note in evaluator.split_notes(config):
        click.echo(f"note: {note}", err=True)
    with training_bar("generate") as show:
        seen = correct = 0

        def advance(trace: Any, total: int) -> None:
            nonlocal seen, correct
            seen, correct = seen + 1, correct + (trace.verdict == "correct")
            show({"step": seen, "correct": 100 * correct / seen}, total)

        counts = generate.generate(config, out, resume, advance)
    totals = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    click.echo(f"{totals}; in {out}", err=True)
