"""configs: the configurations that come with the package."""

import re
import textwrap
from collections.abc import Iterator
from itertools import takewhile

import click

from mlx_traces.config import shipped


@click.command("configs")
def configs_command() -> None:
    """List the configurations that come with the package.

    Every command that takes a configuration takes one of these by its name: mlx-traces grpo grpo_countdown_nano. A file
    of that name in the current folder or in its configs/ wins. The first line of a file is the command that runs it.
    """
    click.echo(f"in {shipped('configs')}")
    for name, command, what in shipped_configs():
        click.echo(f"\n{name}  (mlx-traces {command})")
        click.echo(textwrap.fill(what, 78, initial_indent="  ", subsequent_indent="  "))


def shipped_configs() -> Iterator[tuple[str, str, str]]:
    """Yield the name of each configuration, the command that runs it, and the first sentence of what it does."""
    for path in sorted(shipped("configs").glob("*.yaml")):
        first, *others = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        command = re.match(r"# mlx-traces ((?:nano )?\S+)", first)
        about = " ".join(line[1:].strip() for line in others if not line.startswith("# ("))
        yield path.stem, command[1] if command else "", re.split(r"(?<=[.?!])\s", about.strip())[0]
