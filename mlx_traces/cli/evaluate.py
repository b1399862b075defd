"""eval and grade."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from mlx_traces.cli.options import ConfigFile, Sectioned, configured, settings_options
from mlx_traces.config import EvalConfig
from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import file_rows
from mlx_traces.records import EvalResult
from mlx_traces.runtime.files import refuse_existing, write_new
from mlx_traces.tasks import get_task
from mlx_traces.text import inert


@click.command("eval", cls=Sectioned)
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option("--out", type=click.Path(), help="Run folder.  [default: in --runs-dir, named by the settings]")
@click.option("--runs-dir", default="runs", show_default=True, type=click.Path(), help="Where run folders are kept.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; its finished samples are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of a summary.")
@settings_options(EvalConfig)
def eval_command(
    config_file: str | None, out: str | None, runs_dir: str, resume: bool, as_json: bool, settings: dict
) -> None:
    """Evaluate a model on a task. Writes a run folder with every sample and the result.

    With --endpoint a server that speaks OpenAI's protocol runs the model, and no model is loaded here.
    """
    from mlx_traces.evaluation.run import evaluate

    config = configured(EvalConfig, config_file, settings)
    result = evaluate(config=config, out=out, runs_dir=runs_dir, resume=resume, progress=True)
    if as_json:
        click.echo(json.dumps(asdict(result), indent=1))
        return
    click.echo("\n".join(summary(result)))


def summary(result: EvalResult) -> list[str]:
    """Return the result of an evaluation as lines; a server's memory is unknown, and sometimes its token counts."""

    def share(figures: dict) -> str:
        accuracy, low, high = (100 * figures[key] for key in ("accuracy", "ci_low", "ci_high"))
        return f"{accuracy:.1f} % [{low:.1f}, {high:.1f}], {figures['correct_count']} of {figures['total_questions']}"

    stopped = f"{result.stopped:,} of {result.total_questions:,} by a stop string"
    if result.stopped_in_thoughts:
        stopped += f", {result.stopped_in_thoughts:,} of them in a thought"
    bounds = [f"at least {result.think_at_least:,}"] if result.think_at_least else []
    bounds += [] if result.think_tokens is None else [f"at most {result.think_tokens:,}"]
    thought = bounds and f"{' and '.join(bounds)} tokens, forced in {result.forced:,} of {result.total_questions:,}"
    speed = [f"{result.wall_seconds:.1f} s"]
    if result.mean_tokens is not None:
        speed.insert(0, f"{result.tokens_per_second:.0f} tokens/s, {result.mean_tokens:.0f} tokens an answer")
    if result.peak_memory_gb is not None:
        speed.append(f"{result.peak_memory_gb:.2f} GB")
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
        *(f"  pass^{k:<7} {100 * value:.1f} %" for k, value in (result.pass_hat_k or {}).items()),
        *(f"  maj@{k:<8} {100 * value:.1f} %" for k, value in result.maj_at_k.items()),
        f"  verdicts     {', '.join(f'{verdict} {count}' for verdict, count in result.verdicts.items())}",
        f"  cut off      {100 * result.truncated:.1f} % at {result.max_tokens} tokens",
        *([f"  stopped      {stopped}"] if result.stopped else []),
        *([f"  thought      {thought}"] if thought else []),
        f"  speed        {', '.join(speed)}",
    ]
    return [*lines, *(f"  note         {note}" for note in result.notes)]


@click.command("grade")
@click.argument("file", type=click.Path())
@click.option("--task", required=True, help="Task whose grader to use: gsm8k, countdown, math, qa or module:TASK.")
@click.option("--extractor", help="How the answer is found; default: the task's first extractor.")
@click.option("--out", type=click.Path(), help="Write the rows here instead of to stdout.")
def grade_command(file: str, task: str, extractor: str | None, out: str | None) -> None:
    """Grade completions from any source.

    FILE is JSON lines, a .json list, Parquet or Arrow, with `completion` and the task's columns. Each row is printed
    with `correct`, `verdict` and `extracted`, and with a `note` if two readings of its answer are allowed. A
    summary goes to stderr.
    """
    from mlx_traces.evaluation import evaluator, stats

    grader = get_task(task)
    name = extractor or grader.extractors[0]
    if name not in grader.extractors:
        raise unknown(f"extractor of {task}", name, grader.extractors)
    if out:
        refuse_existing(Path(out))
    lines, correct = [], 0
    for where, row in file_rows(Path(file), ("completion", *grader.graded_columns)):
        score = evaluator.regrade(grader, row, where)[name]
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
    low, high = stats.wilson(correct, len(lines))
    share = f"{100 * correct / len(lines):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    click.echo(f"{correct} of {len(lines)} correct by {name}: {share}", err=True)
