"""The command line: parse, call, print. Heavy imports wait until a command runs, so ``--help`` is instant."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click

import mlx_traces
from mlx_traces.config import CompareConfig, Config, EvalConfig, LoadConfig, NanoConfig, read_config
from mlx_traces.errors import UserError, clean

FORMATS = ("table", "markdown", "csv", "json")


class Commands(click.Group):
    """A group in whose commands a UserError prints as one line and Ctrl-C says how to go on."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(clean(error)) from None
        except KeyboardInterrupt:
            click.echo("\nstopped; what was finished is kept: repeat the command, eval with --resume", err=True)
            ctx.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(128 + signal.SIGPIPE)


def settings_options(kind: type[Config], *leave_out: str) -> Callable:
    """Add an option for every field of a recipe's settings; the function gets those given, as ``settings``."""

    def decorate(function: Callable) -> Callable:
        names = [name for name in kind.model_fields if name not in leave_out]

        def call(**arguments: Any) -> Any:
            given = {name: value for name in names if (value := arguments.pop(name)) is not None}
            return function(settings=given, **arguments)

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__click_params__ = list(getattr(function, "__click_params__", []))
        for name in reversed(names):
            call = _option(name, kind)(call)
        return call

    return decorate


def _option(name: str, kind: type[Config]) -> Callable:
    """Make the click option of one field; validation is the settings' own."""
    field = kind.model_fields[name]
    flag = "--" + name.replace("_", "-")
    shown = field.get_default()
    text = (field.description or "") + (f"  [default: {shown}]" if shown is not None else "")
    types = [
        get_args(part)[0] if get_origin(part) is Annotated else part
        for part in (get_args(field.annotation) or (field.annotation,))
        if part is not type(None)
    ]
    if types == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    literal = next((part for part in (field.annotation, *types) if get_origin(part) is Literal), None)
    if literal is not None:
        choices = [str(value) for value in get_args(literal)]
        return click.option(flag, name, type=click.Choice(choices), default=None, help=text)
    if get_origin(field.annotation) is tuple:
        return click.option(flag, name, type=int, nargs=2, default=None, metavar="LOW HIGH", help=text)
    simple = next((part for part in (int, float) if part in types), str)
    return click.option(flag, name, type=simple, default=None, help=text)


@click.group(cls=Commands, context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.version_option(mlx_traces.__version__)
def main() -> None:
    """Teach small language models to reason, on a MacBook; measure whether they do.

    Start with `mlx-traces compare`: the embedded model, direct answers against thinking, in under a minute.
    """


@main.command("eval")
@click.option("--config", "config_file", type=click.Path(), help="YAML file of these settings; options win over it.")
@click.option("--out", type=click.Path(), help="Run folder.  [default: in --runs-dir, named by the settings]")
@click.option("--runs-dir", default="runs", show_default=True, type=click.Path(), help="Where run folders are kept.")
@click.option("--resume", is_flag=True, help="Continue a run that was cut off; finished samples are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of a summary.")
@settings_options(EvalConfig)
def eval_command(
    config_file: str | None, out: str | None, runs_dir: str, resume: bool, as_json: bool, settings: dict
) -> None:
    """Evaluate one model on one task; write a run folder with every sample and the result."""
    from mlx_traces.evaluation import evaluate

    config = read_config(EvalConfig, config_file, settings)
    result = evaluate(config=config, out=out, runs_dir=runs_dir, resume=resume, progress=True)
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps(asdict(result), indent=1))
        return
    for line in _summary(result):
        click.echo(line)


def _summary(result: Any) -> list[str]:
    """Say what came out of an evaluation, in a few lines."""

    def share(figures: dict) -> str:
        accuracy, low, high = (100 * figures[key] for key in ("accuracy", "ci_low", "ci_high"))
        return f"{accuracy:.1f} % [{low:.1f}, {high:.1f}], {figures['correct_count']} of {figures['total_questions']}"

    name = f"{result.model}+{result.adapter}" if result.adapter else result.model
    lines = [
        f"{name} on {result.task} {result.split}, prompt {result.prompt}, extractor {result.extractor}:",
        f"  correct      {share(vars(result))}",
        *(f"  {stratum:<12} {share(figures)}" for stratum, figures in result.by_stratum.items()),
        *(
            f"  by {extractor:<9} {share(figures)}"
            for extractor, figures in result.extractors.items()
            if extractor != result.extractor
        ),
        *(f"  pass@{k:<7} {100 * value:.1f} %" for k, value in result.pass_at_k.items()),
        *(f"  maj@{k:<8} {100 * value:.1f} %" for k, value in result.maj_at_k.items()),
        f"  verdicts     {', '.join(f'{verdict} {count}' for verdict, count in result.verdicts.items())}",
        f"  cut off      {100 * result.truncated:.1f} % at {result.max_tokens} tokens",
        f"  speed        {result.tokens_per_second:.0f} tokens/s, {result.mean_tokens:.0f} tokens an answer, "
        f"{result.wall_seconds:.1f} s, {result.peak_memory_gb:.2f} GB",
    ]
    return [*lines, *(f"  note         {note}" for note in result.notes)]


@main.command("compare")
@click.argument("runs", nargs=-1, type=click.Path())
@click.option("--model", "models", multiple=True, help="Model to evaluate: MODEL or MODEL+ADAPTER; repeat for more.")
@click.option("--prompt", "prompts", multiple=True, help="Prompt style to try with each model; repeat for more.")
@click.option("--config", "config_file", type=click.Path(), help="YAML file: runs, evals, baseline, out.")
@click.option("--baseline", help="Run to compare the others with, by name or label.  [default: the first]")
@click.option("--out", type=click.Path(), help="Folder for table, CSVs, results.json and chart.")
@click.option("--runs-dir", default=None, type=click.Path(), help="Where run folders are kept.  [default: runs]")
@click.option("--format", "format_", type=click.Choice(FORMATS), default="table", help="What to print.")
@click.option("--extractors", is_flag=True, help="Also print the accuracy by every extractor.")
@settings_options(EvalConfig, "model", "prompt", "adapter")
def compare_command(
    runs: tuple[str, ...],
    models: tuple[str, ...],
    prompts: tuple[str, ...],
    config_file: str | None,
    baseline: str | None,
    out: str | None,
    runs_dir: str | None,
    format_: str,
    extractors: bool,
    settings: dict,
) -> None:
    """Evaluate what is missing, then print one table with intervals and paired p-values.

    RUNS are finished run folders. Without any argument: nano on 500 held-out Countdown problems, direct against
    thinking.
    """
    from mlx_traces import comparison, tables

    overrides = {"baseline": baseline, "out": out, "runs_dir": runs_dir}
    given = {name: value for name, value in overrides.items() if value is not None}
    config = comparison.requested(read_config(CompareConfig, config_file, given), runs, models, prompts, settings)
    frame, collected = comparison.compared(config, progress=True)
    for line in tables.differences(collected):
        click.echo(f"note: {line}", err=True)
    _print(frame, collected, format_, extractors)
    if config.out:
        click.echo(f"written to {config.out}", err=True)


def _print(frame: Any, collected: list, format_: str, extractors: bool) -> None:
    """Print a comparison in one of FORMATS."""
    from mlx_traces import tables

    if format_ == "json":
        click.echo(json.dumps(tables.to_json(frame), indent=1))
    elif format_ == "csv":
        click.echo(tables.to_csv(frame), nl=False)
    elif format_ == "markdown":
        click.echo(tables.to_markdown(frame))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 100)
        console.print(tables.to_terminal(frame))
        for part in (
            tables.strata_table(collected),
            tables.extractors_table(collected) if extractors else None,
        ):
            if part is not None:
                console.print(part)


@main.command("grade")
@click.argument("file", type=click.Path())
@click.option("--task", required=True, help="Task whose grader judges: gsm8k, countdown or qa.")
@click.option("--extractor", help="How the answer is found; default: the task's headline one.")
@click.option("--out", type=click.Path(), help="Write the rows here instead of to stdout.")
def grade_command(file: str, task: str, extractor: str | None, out: str | None) -> None:
    """Grade completions made anywhere: JSON lines with `completion` and the task's columns.

    Each row comes back with `correct`, `verdict` and `extracted`; a summary goes to stderr.
    """
    from mlx_traces.errors import unknown
    from mlx_traces.evaluation import regrade
    from mlx_traces.runs import write_new
    from mlx_traces.stats import wilson
    from mlx_traces.tasks import get_task
    from mlx_traces.tasks.data import read_jsonl

    grader = get_task(task)
    name = extractor or grader.extractors[0]
    if name not in grader.extractors:
        raise unknown(f"extractor of {task}", name, grader.extractors)
    lines, correct = [], 0
    for where, row in read_jsonl(Path(file), ("completion", *grader.graded_columns)):
        score = regrade(grader, row, where)[name]
        graded = {**row, "correct": score.correct, "verdict": score.verdict, "extracted": score.extracted}
        lines.append(json.dumps(graded, ensure_ascii=False) + "\n")
        correct += score.correct
    if not lines:
        raise UserError(f"{file} has no rows")
    if out:
        write_new(Path(out), "".join(lines))
    else:
        click.echo("".join(lines), nl=False)
    low, high = wilson(correct, len(lines))
    share = f"{100 * correct / len(lines):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    click.echo(f"{correct} of {len(lines)} correct by {name}: {share}", err=True)


@main.group("bench")
def bench_group() -> None:
    """Measure this machine, beside a peer where one is named."""


@bench_group.command("generate")
@click.option("--model", default="nano", show_default=True, help="nano, a folder, or a hub id.")
@click.option("--rows", default="32", show_default=True, help="Completions decoded at once; several as in 32,128.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest completion.")
@click.option("--count", type=click.IntRange(1), default=512, show_default=True, help="How many prompts.")
@click.option("--prompts", type=click.Path(), help="File of GSM8K-like questions.  [default: Countdown problems]")
@click.option("--against", type=click.Choice(["mlx-lm"]), help="Peer to measure in the same run, with our weights.")
@click.option("--as-shipped", is_flag=True, help="Let the peer load the weights as its user gets them.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs of each, in turn.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of rows as JSON.")
@settings_options(LoadConfig)
def bench_generate_command(
    model: str,
    rows: str,
    max_tokens: int,
    count: int,
    prompts: str | None,
    against: str | None,
    as_shipped: bool,
    repeats: int,
    as_json: bool,
    settings: dict,
) -> None:
    """Time the sampling engine: tokens per second, milliseconds a step, memory, and the ratio to a peer."""
    if not all(part.strip().isdigit() and int(part) for part in rows.split(",")):
        raise UserError(f"--rows {rows}: give numbers from 1 up, as in 32,128")
    from mlx_traces import bench, models

    loaded = models.load(model, **settings)
    asked = bench.bench_prompts(loaded, Path(prompts) if prompts else None, count)
    lines = bench.bench_generate(
        loaded,
        asked,
        [int(part) for part in rows.split(",")],
        max_tokens,
        against,
        as_shipped,
        repeats,
        lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps(bench.to_rows(lines), indent=1))
        return
    click.echo(f"{model}, {loaded.backend.description}; {count} prompts, at most {max_tokens} tokens each, greedy")
    for line in lines:
        click.echo(
            f"{line.rows:>5} rows  {line.tokens_per_second:8.1f} tokens/s  {line.ms_per_step:7.1f} ms a step  "
            f"prompts {line.prompt_tokens_per_second:8.0f} tokens/s  first token {line.first_token_seconds:.2f} s  "
            f"occupancy {line.occupancy:.0%}  {line.peak_memory_gb:.2f} GB  warm-up {line.warmup_seconds:.1f} s"
        )
        if line.ratio is not None:
            click.echo(
                f"{'':>10}  {line.peer_tokens_per_second:8.1f} tokens/s by {line.peer} ({line.peer_weights} weights), "
                f"{line.peer_peak_memory_gb:.2f} GB, warm-up {line.peer_warmup_seconds:.1f} s: "
                f"ratio {line.ratio:.2f}"
            )


@main.group("data")
def data_group() -> None:
    """Make and bring in data sets."""


@data_group.command("countdown")
@click.option("--n", "count", type=click.IntRange(1), default=1000, show_default=True, help="How many problems.")
@click.option(
    "--split", default="train", show_default=True, help="train, valid or test: never a shared set of numbers."
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same problems.")
@click.option(
    "--operands",
    nargs=2,
    type=int,
    default=(3, 4),
    metavar="LOW HIGH",
    help="Numbers per problem.  [default: 3 4]",
)
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
    """Write solvable Countdown problems: nums, target, and the number of solutions as a measure of difficulty."""
    from mlx_traces.runs import write_new
    from mlx_traces.tasks.countdown import generate
    from mlx_traces.tasks.solver import solutions

    if Path(out).exists():
        raise UserError(f"{out} exists; remove it, or choose another --out")
    rows = [
        {"nums": nums, "target": value, "solutions": solutions(nums, value)}
        for nums, value in generate(split, count, seed, operands, numbers, target)
    ]
    write_new(Path(out), "".join(json.dumps(row) + "\n" for row in rows))
    click.echo(f"{len(rows)} problems written to {out}", err=True)


@main.group("nano")
def nano_group() -> None:
    """The embedded model."""


@nano_group.command("build")
@click.option("--config", "config_file", type=click.Path(), help="YAML file of these settings; options win over it.")
@settings_options(NanoConfig)
def nano_build(config_file: str | None, settings: dict) -> None:
    """Train nano from scratch and write it, quantized, as a model folder; minutes on two CPU cores."""
    from mlx_traces.device import import_mlx

    config = read_config(NanoConfig, config_file, settings)
    import_mlx()
    from rich.console import Console
    from rich.progress import Progress

    from mlx_traces import nano

    nano.check_sizes(config)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("training nano", total=None)

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=steps, description=f"training nano, loss {loss:.3f}")

        out = nano.build(config, show)
    click.echo(f"written to {out}; try: mlx-traces eval --model {out} --task countdown")


@main.command("doctor")
def doctor_command() -> None:
    """Say what this machine runs on, how fast, and what to do about what is wrong."""
    from mlx_traces import doctor

    doctor.show()
