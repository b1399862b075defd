"""bench: measure this machine, beside a peer where one is named."""

import json
from pathlib import Path

import click

from mlx_traces.cli.options import settings_options
from mlx_traces.config import LoadConfig
from mlx_traces.errors import UserError


@click.group("bench")
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
