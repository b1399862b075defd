"""compare, verify, study and rounds."""

import json
import sys
from pathlib import Path

import click

from mlx_traces.cli.options import ConfigFile, Sectioned, configured, console, note_unused, settings_options
from mlx_traces.cli.train import training_bar
from mlx_traces.config import CompareConfig, EvalConfig, RoundsConfig, ScoreConfig, StudyConfig, build, read_config
from mlx_traces.errors import UserError
from mlx_traces.runtime.device import import_mlx
from mlx_traces.tasks import get_task
from mlx_traces.text import clean

FORMATS = ("table", "markdown", "csv", "json")
BLOCK = CompareConfig.model_fields["block"].default
STOP = click.option(
    "--stop-when-decided", is_flag=True, help=CompareConfig.model_fields["stop_when_decided"].description
)
SIZE = click.option("--block", type=int, help=f"With --stop-when-decided: problems per block.  [default: {BLOCK}]")


def _recipes(_: click.Context, __: click.Parameter, items: tuple[str, ...]) -> dict[str, list[str]]:
    """Read NAME=RUN,RUN pairs."""
    found = {}
    for item in items:
        name, sign, runs = item.partition("=")
        if not (name and sign and all(runs.split(","))):
            raise UserError(f"--recipe {item}: give NAME=RUN,RUN, as in grpo=runs/grpo-1,runs/grpo-2")
        if name in found:
            raise UserError(f"--recipe {name}: named twice; name all its runs at once, as in {name}=RUN,RUN")
        found[name] = runs.split(",")
    return found


@click.command("compare", cls=Sectioned)
@click.argument("runs", nargs=-1, type=click.Path())
@click.option("--model", "models", multiple=True, help="Model to evaluate: MODEL or MODEL+ADAPTER.  Repeat for more.")
@click.option("--prompt", "prompts", multiple=True, help="Prompt style for each model.  Repeat for more.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file: runs, tasks, models, baseline, out.")
@click.option("--baseline", help="Run that others are compared with, by name or label.  [default: the first]")
@click.option("--out", type=click.Path(), help="Folder for the table, CSV files, JSON, a chart and report.html.")
@click.option("--runs-dir", default=None, type=click.Path(), help="Where run folders are kept.  [default: runs]")
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), default="table", help="Output format.  [default: table]"
)
@click.option("--extractors", is_flag=True, help="Also print the accuracy by every extractor.")
@click.option("--quality", is_flag=True, help="Also compare the form, structure, true equations and length of answers.")
@click.option(
    "--score",
    "scoring",
    multiple=True,
    metavar="NAME=VALUE",
    help="With --quality: a setting of `score`, as in tags=none, model=MODEL (perplexity), judge=MODEL.  "
    "Repeat for more.",
)
@click.option("--rewards", "reward_file", type=ConfigFile(), help=CompareConfig.model_fields["rewards"].description)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME=RUN,RUN,...",
    callback=_recipes,
    help="Several trainings of one recipe: finished runs, shown as one row with their variance.  Repeat for more.",
)
@click.option("--cluster", help=CompareConfig.model_fields["cluster"].description)
@STOP
@SIZE
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
    quality: bool,
    scoring: tuple[str, ...],
    reward_file: str | None,
    recipes: dict[str, list[str]],
    cluster: str | None,
    stop_when_decided: bool,
    block: int | None,
    settings: dict,
) -> None:
    """Compare models or runs in one table with paired statistics. Evaluates what is missing.

    RUNS are finished run folders. Without any argument the command compares nano on 500 held-out Countdown problems:
    direct, thinking, and thinking with its shipped adapters.
    """
    from mlx_traces.evaluation import comparison
    from mlx_traces.pipelines import compare
    from mlx_traces.report import tables

    overrides = {"baseline": baseline, "out": out, "runs_dir": runs_dir, "recipes": recipes or None}
    overrides |= {
        "cluster": cluster,
        "stop_when_decided": stop_when_decided or None,
        "block": block,
        "rewards": reward_file,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    requested = read_config(CompareConfig, config_file, given)
    if quality or scoring:
        known = requested.quality.model_dump(exclude_unset=True) if requested.quality else {}
        scores = build(ScoreConfig, known | dict(map(_setting, scoring)), "--score")
        requested = requested.model_copy(update={"quality": scores})
    config = compare.requested(requested, runs, models, prompts, settings)
    note_unused(config)
    if (config.quality or config.rewards) and format_ == "csv":
        click.echo("note: --format csv leaves out the quality; --out writes quality.csv", err=True)
    if extractors and format_ != "table":
        click.echo(f"note: --extractors changes nothing in --format {format_}", err=True)
    frame, collected, scored = compare.compared(config, progress=True, say=lambda line: click.echo(line, err=True))
    for line in comparison.differences(collected):
        click.echo(f"note: {line}", err=True)
    if format_ == "json":
        scores = {} if scored is None else {"quality": tables.records(scored)}
        click.echo(json.dumps(tables.to_json(frame) | scores, indent=1))
    elif format_ == "csv":
        click.echo(tables.to_csv(frame), nl=False)
    elif format_ == "markdown":
        click.echo(tables.to_markdown(frame) + ("" if scored is None else f"\n{tables.quality_markdown(scored)}"))
    else:
        by_extractor = tables.extractors_table(collected) if extractors else None
        scores = None if scored is None else tables.quality_table(scored)
        for table in (tables.to_terminal(frame), tables.strata_table(collected), by_extractor, scores):
            if table is not None:
                console().print(table)
    if config.out:
        click.echo(f"written to {config.out}", err=True)


def _setting(item: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, sign, value = item.partition("=")
    if not sign:
        raise UserError(f"--score {item}: give NAME=VALUE, as in tags=none")
    return name, value


@click.command("verify")
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--task", help="Task of the runs, if it is a plug-in module:TASK; its code runs only if named here.")
def verify_command(runs: tuple[str, ...], task: str | None) -> None:
    """Check finished runs and files of traces.

    RUNS are run folders of evaluations and trainings (sft, grpo, ppo), or files of traces. Grades every stored
    completion again and recomputes the figures. For a training, checks its steps, its best step and its adapter.
    Models and comparisons are passed over. The exit status is 1 if anything differs or could not be checked, such as
    an unfinished run; the others are checked all the same.
    """
    from mlx_traces.pipelines import verify

    if task:
        get_task(task)
    failed = False
    for run in runs:
        if other := verify.other_folder(run):
            click.echo(f"{run}: {other}, not a run: nothing to check")
            continue
        try:
            agrees, lines = verify.verify(run)
        except UserError as error:
            click.echo(clean(f"{run}: not checked: {str(error).removeprefix(f'{run}: ')}"), err=True)
            failed = True
            continue
        click.echo(
            f"{run}: {len(lines):,} {'difference' if len(lines) == 1 else 'differences'}"
            if lines
            else f"{run}: {agrees}"
        )
        for line in verify.shown(lines):
            click.echo(f"  {clean(line)}")
        failed = failed or bool(lines)
    if failed:
        sys.exit(1)


@click.command("study")
@click.argument("config_file", metavar="CONFIG", type=ConfigFile())
@click.option("--out", type=click.Path(), help="Folder of the tables.  [default: tables/ and CONFIG's name]")
@click.option("--runs-dir", type=click.Path(), help="Where run folders and converted models are kept.  [default: runs]")
@STOP
@SIZE
@click.option("--dry-run", is_flag=True, help="List the evaluations, and which are finished; run none.")
def study_command(
    config_file: str, out: str | None, runs_dir: str | None, stop_when_decided: bool, block: int | None, dry_run: bool
) -> None:
    """Evaluate every model in every prompt, and test every pair.

    Models with `bits` are converted first. After an interruption, or with more models in CONFIG, repeat the command:
    finished evaluations are not repeated.
    """
    given = {"out": out, "runs_dir": runs_dir, "stop_when_decided": stop_when_decided or None, "block": block}
    given = {name: value for name, value in given.items() if value is not None}
    config = configured(StudyConfig, config_file, given)
    if config.out is None:
        config = config.model_copy(update={"out": str(Path("tables") / Path(config_file).stem)})
    import_mlx()
    from mlx_traces.pipelines import study

    if dry_run:
        for line in study.preview(config):
            click.echo(line)
        return
    for part in study.run(config, lambda line: click.echo(line, err=True), progress=True):
        for item in study.to_terminal(part):
            console().print(item, markup=False)
    click.echo(f"written to {config.out}", err=True)


@click.command("rounds")
@click.argument("config_file", metavar="CONFIG", type=ConfigFile())
@click.option("--data-dir", type=click.Path(), help="Where raw/, generated/ and processed/ are.  [default: data]")
@click.option("--runs-dir", type=click.Path(), help="Where run folders are kept.  [default: runs]")
@click.option(
    "--report-to", type=click.Choice(["trackio", "wandb"]), help="Also send every training's metrics to this client."
)
@click.option("--dry-run", is_flag=True, help="List the stages, with estimates of tokens and memory; run none.")
def rounds_command(
    config_file: str, data_dir: str | None, runs_dir: str | None, report_to: str | None, dry_run: bool
) -> None:
    """Train in rounds (SFT, own traces, GRPO or PPO), then compare them.

    Epoch 1 is SFT on raw traces, epoch 2 SFT on the model's own filtered traces, round 3 GRPO or PPO. Then the base and
    every round answer the same problems, in one table and an HTML report.

    After an interruption repeat the command: finished stages are not repeated.
    """
    given = {"data_dir": data_dir, "runs_dir": runs_dir, "report_to": report_to}
    config = configured(RoundsConfig, config_file, {name: value for name, value in given.items() if value})
    import_mlx()
    from mlx_traces.pipelines import estimate, rounds
    from mlx_traces.report import tables

    if dry_run:
        click.echo("\n".join(estimate.lines(config)))
        return
    done = rounds.run(config, lambda line: click.echo(line, err=True), training_bar, progress=True)
    console().print(tables.to_terminal(done.frame))
    for line in rounds.gains(done.runs, done.pairs):
        click.echo(line)
    console().print(tables.quality_table(done.quality))
    click.echo(f"report: {done.page}")
