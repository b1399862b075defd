"""score, filter and reformat."""

import sys
from pathlib import Path
from typing import Any

import click

from mlx_traces.cli.options import ConfigFile, configured, settings_options
from mlx_traces.config import FilterConfig, ReformatConfig, ScoreConfig
from mlx_traces.errors import UserError


@click.command("score")
@click.argument("source", metavar="IN", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write, as data/processed/x.jsonl.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option("--mix", "mix", multiple=True, metavar="NAME=WEIGHT", help="Weight of a component; repeat for more.")
@settings_options(ScoreConfig, "mix")
def score_command(source: str, out: str, config_file: str | None, mix: tuple[str, ...], settings: dict) -> None:
    """Score the traces of IN: correctness, form, structure, faithfulness, length, repetition and what models say."""
    from mlx_traces.traces.score import score_file, summary

    if mix:
        settings["mix"] = dict(_weight(item) for item in mix)
    traces = score_file(Path(source), Path(out), configured(ScoreConfig, config_file, settings))
    rows = [
        (name, "–" if mean is None else f"{mean:.3f}", f"{100 * share:.0f} %") for name, mean, share in summary(traces)
    ]
    _print_table(("score", "mean", "applies to"), rows)
    click.echo(f"{len(traces)} scored traces written to {out}", err=True)


def _weight(item: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not sign:
        raise UserError(f"--mix {item}: give NAME=WEIGHT, as in faithfulness=2")
    return name, value


@click.command("filter")
@click.argument("source", metavar="IN", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write, as data/processed/y.jsonl.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@settings_options(FilterConfig)
def filter_command(source: str, out: str, config_file: str | None, settings: dict) -> None:
    """Keep the traces of IN that pass the rules, and tell what each rule removed."""
    from mlx_traces.traces.filter import filter_file

    report = filter_file(Path(source), Path(out), configured(FilterConfig, config_file, settings))
    _print_table(("rule", "removed", "left"), [(rule, f"{gone:,}", f"{left:,}") for rule, gone, left in report])
    click.echo(f"{report[-1][2] if report else 'all'} traces written to {out}", err=True)


@click.command("reformat")
@click.argument("source", metavar="IN", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="JSON-lines file to write, as data/processed/z.jsonl.")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@settings_options(ReformatConfig)
def reformat_command(source: str, out: str, config_file: str | None, settings: dict) -> None:
    """Rewrite the traces of IN as a thought and a solution; keep those that are still correct."""
    from mlx_traces.traces.files import counted
    from mlx_traces.traces.reformat import reformat_file

    written, dropped = reformat_file(Path(source), Path(out), configured(ReformatConfig, config_file, settings))
    left_out = counted({"dropped": dropped})
    click.echo(f"{written:,} traces written to {out}{left_out and f'; {left_out}'}", err=True)


def _print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a small table, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head[:1])
    for title in head[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
