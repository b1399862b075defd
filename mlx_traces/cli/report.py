"""report, card, push and watch."""

import sys
import time
from contextlib import suppress
from pathlib import Path

import click

from mlx_traces.cli.options import console


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option(
    "--out", default="report.html", show_default=True, type=click.Path(), help="HTML file; an existing one is replaced."
)
@click.option("--png", type=click.Path(), help="Folder for the figures as PNG files too.")
@click.option("--baseline", help="Run to compare with, by name.  [default: the first on the same problems]")
def report_command(runs: tuple[str, ...], out: str, png: str | None, baseline: str | None) -> None:
    """Write runs as one HTML page. It has comparisons, curves, accuracy by difficulty, and traces to browse.

    RUNS are run folders of evaluations and trainings, and folders that `compare --out` wrote, in any mix, finished or
    not. The page needs no network.
    """
    from mlx_traces.report import page

    written, *pictures = page.write(runs, out, png, baseline)
    click.echo(f"written to {written}" + (f", {len(pictures)} pictures in {png}" if pictures else ""))


@click.command("card")
@click.argument("adapter", type=click.Path())
@click.option("--run", "runs", multiple=True, type=click.Path(), help="Evaluation to add.  Repeat for more.")
def card_command(adapter: str, runs: tuple[str, ...]) -> None:
    """Rewrite the model card of an adapter, and add evaluations.

    A training writes the first card. This command adds later evaluations of the adapter and of its base model.
    """
    from mlx_traces.train import model_card

    click.echo(f"written to {model_card.rewrite(Path(adapter), [Path(run) for run in runs])}")


@click.command("push")
@click.argument("adapter", type=click.Path())
@click.argument("name", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see it; without this a new repository is private.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded; upload nothing.")
def push_command(adapter: str, name: str, public: bool, dry_run: bool) -> None:
    """Upload an adapter and its model card to the hub, as USER/NAME.

    ADAPTER is an adapter's folder, a training's run folder, or a model that fuse made. No other files of the folder are
    uploaded, and paths of this machine are removed from the settings.
    """
    from mlx_traces.train import push

    upload = push.prepare(Path(adapter))
    push.check_name(name)
    sizes = upload.sizes()
    for file, size in sizes.items():
        click.echo(f"{size:>15,}  {file}")
    total = f"{sum(sizes.values()):,} bytes in {len(sizes)} files, {upload.what} {name}"
    if dry_run:
        click.echo(f"{total}, {'public' if public else 'private'}: nothing was uploaded (--dry-run)")
        return
    address = push.push(upload, name, public, lambda line: click.echo(line, err=True))
    click.echo(f"{total}: {address}")


@click.command("watch")
@click.argument("run", type=click.Path())
@click.option("--once", is_flag=True, help="Print once and exit; the default if the output is not a terminal.")
@click.option("--every", default=2.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between updates.")
def watch_command(run: str, once: bool, every: float) -> None:
    """Show a run's curves in the terminal. Updates them until the run is finished."""
    from mlx_traces.report import run_view, terminal

    record, screen = run_view.read(run), console()
    if once or not sys.stdout.isatty():
        screen.print(terminal.display(record, screen.width, time.time()))
        return
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            live.update(terminal.display(record, screen.width, time.time()), refresh=True)
            if record.result is not None:
                break
            time.sleep(every)
            record = run_view.read(run)
