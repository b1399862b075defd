"""data: make and bring in data sets."""

import json
from pathlib import Path

import click

from mlx_traces.errors import UserError


@click.group("data")
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
