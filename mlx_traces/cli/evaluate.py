"""eval, compare, grade and verify."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from mlx_traces.cli.options import ConfigFile, Sectioned, configured, note_unused, settings_options
from mlx_traces.config import CompareConfig, EvalConfig, read_config
from mlx_traces.errors import UserError
from mlx_traces.text import clean, inert

FORMATS = ("table", "markdown", "csv", "json")


@click.command("eval", cls=Sectioned)
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option("--out", type=click.Path(), help="Run folder.  [default: in --runs-dir, named by the settings]")
@click.option("--runs-dir", default="runs", show_default=True, type=click.Path(), help="Where run folders are kept.")
@click.option("--resume", is_flag=True, help="Continue a run that was cut off; finished samples are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of a summary.")
@settings_options(EvalConfig)
def eval_command(
    config_file: str | None, out: str | None, runs_dir: str, resume: bool, as_json: bool, settings: dict
) -> None:
    """Evaluate one model on one task; write a run folder with every sample and the result.

    With --endpoint a server that speaks OpenAI's protocol runs the model, and no model is loaded here.
    """
    from mlx_traces.evaluation.run import evaluate

    config = configured(EvalConfig, config_file, settings)
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
        f"  speed        {', '.join(_speed(result))}",
    ]
    return [*lines, *(f"  note         {note}" for note in result.notes)]


def _speed(result: Any) -> list[str]:
    """Say what an evaluation took, as far as that is known; a server tells no memory, and not always its tokens."""
    counted = result.mean_tokens is not None
    return [
        *([f"{result.tokens_per_second:.0f} tokens/s, {result.mean_tokens:.0f} tokens an answer"] if counted else []),
        f"{result.wall_seconds:.1f} s",
        *([f"{result.peak_memory_gb:.2f} GB"] if result.peak_memory_gb is not None else []),
    ]


@click.command("compare")
@click.argument("runs", nargs=-1, type=click.Path())
@click.option("--model", "models", multiple=True, help="Model to evaluate: MODEL or MODEL+ADAPTER; repeat for more.")
@click.option("--prompt", "prompts", multiple=True, help="Prompt style to try with each model; repeat for more.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file: runs, evals, baseline, out.")
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
    thinking, and with its trained adapters where the checkout has them.
    """
    from mlx_traces.pipelines import compare

    overrides = {"baseline": baseline, "out": out, "runs_dir": runs_dir}
    given = {name: value for name, value in overrides.items() if value is not None}
    asked = read_config(CompareConfig, config_file, given)
    config = compare.requested(asked, runs, models, prompts, settings)
    note_unused(config)
    if extractors and format_ != "table":
        click.echo(f"note: --extractors changes nothing in --format {format_}", err=True)
    frame, collected = compare.compared(config, progress=True)
    for line in compare.differences(collected):
        click.echo(f"note: {line}", err=True)
    _print(frame, collected, format_, extractors)
    if config.out:
        click.echo(f"written to {config.out}", err=True)


def _print(frame: Any, collected: list, format_: str, extractors: bool) -> None:
    """Print a comparison in one of FORMATS."""
    from mlx_traces.report import tables

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


@click.command("grade")
@click.argument("file", type=click.Path())
@click.option("--task", required=True, help="Task whose grader judges: gsm8k, countdown or qa.")
@click.option("--extractor", help="How the answer is found; default: the task's headline one.")
@click.option("--out", type=click.Path(), help="Write the rows here instead of to stdout.")
def grade_command(file: str, task: str, extractor: str | None, out: str | None) -> None:
    """Grade completions made anywhere: JSON lines with `completion` and the task's columns.

    Each row comes back with `correct`, `verdict` and `extracted`, and with a `note` where an answer may be read in two
    ways; a summary goes to stderr.
    """
    from mlx_traces.errors import unknown
    from mlx_traces.evaluation.evaluator import regrade
    from mlx_traces.evaluation.stats import wilson
    from mlx_traces.readers import read_jsonl
    from mlx_traces.runtime.files import write_new
    from mlx_traces.tasks import get_task

    grader = get_task(task)
    name = extractor or grader.extractors[0]
    if name not in grader.extractors:
        raise unknown(f"extractor of {task}", name, grader.extractors)
    lines, correct = [], 0
    for where, row in read_jsonl(Path(file), ("completion", *grader.graded_columns)):
        score = regrade(grader, row, where)[name]
        graded = {**row, "correct": score.correct, "verdict": score.verdict, "extracted": score.extracted}
        graded |= {"note": score.note} if score.note else {}
        lines.append(json.dumps(graded, ensure_ascii=False) + "\n")
        correct += score.correct
    if not lines:
        raise UserError(f"{file} has no rows")
    if out:
        write_new(Path(out), "".join(lines))
    else:
        click.echo("".join(map(inert, lines)), nl=False)
    low, high = wilson(correct, len(lines))
    share = f"{100 * correct / len(lines):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    click.echo(f"{correct} of {len(lines)} correct by {name}: {share}", err=True)


@click.command("verify")
@click.argument("runs", nargs=-1, required=True, type=click.Path())
def verify_command(runs: tuple[str, ...]) -> None:
    """Check finished RUNS against themselves: of evaluations, trainings by sft, grpo and ppo, files of traces.

    Grades every stored completion anew and computes the figures from that; of a training, checks its steps, its best
    and its adapter. Exits with 1 if anything differs.
    """
    from mlx_traces.pipelines import verify

    differ = False
    for run in runs:
        agrees, lines = verify.verify(run)
        click.echo(
            f"{run}: {len(lines):,} {'difference' if len(lines) == 1 else 'differences'}"
            if lines
            else f"{run}: {agrees}"
        )
        for line in verify.shown(lines):
            click.echo(f"  {clean(line)}")
        differ = differ or bool(lines)
    if differ:
        sys.exit(1)
