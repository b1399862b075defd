"""study."""

import sys
from pathlib import Path

import click

from mlx_traces.cli.options import ConfigFile, configured
from mlx_traces.config import StudyConfig


@click.command("study")
@click.argument("config_file", metavar="CONFIG", type=ConfigFile())
@click.option("--out", type=click.Path(), help="Folder of the tables.  [default: tables/ and CONFIG's name]")
@click.option("--runs-dir", type=click.Path(), help="Where run folders and converted models are.  [default: runs]")
@click.option("--dry-run", is_flag=True, help="Print the evaluations and which are there; make nothing.")
def study_command(config_file: str, out: str | None, runs_dir: str | None, dry_run: bool) -> None:
    """Every model in every prompt: summary, strata, every pair tested, and what may be said of it.

    A model that is to have other bits is converted first. Repeat the command after it was cut off, or with more
    models in CONFIG: what is there is not made again.
    """
    folders = {"out": out, "runs_dir": runs_dir}
    config = configured(StudyConfig, config_file, {name: value for name, value in folders.items() if value})
    if config.out is None:
        config = config.model_copy(update={"out": str(Path("tables") / Path(config_file).stem)})
    from mlx_traces.runtime.device import import_mlx

    import_mlx()
    from rich.console import Console

    from mlx_traces.pipelines import study

    if dry_run:
        for line in study.preview(config):
            click.echo(line)
        return
    parts = study.run(config, lambda line: click.echo(line, err=True), progress=True)
    console = Console(width=None if sys.stdout.isatty() else 100)
    for part in parts:
        for item in study.to_terminal(part):
            console.print(item, markup=False, highlight=False)
    click.echo(f"written to {config.out}", err=True)
