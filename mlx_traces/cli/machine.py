"""nano and doctor."""

import click

from mlx_traces.cli.options import settings_options
from mlx_traces.config import NanoConfig, read_config


@click.group("nano")
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


@click.command("doctor")
def doctor_command() -> None:
    """Say what this machine runs on, how fast, and what to do about what is wrong."""
    from mlx_traces import doctor

    doctor.show()
