"""nano, doctor and plan."""

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


@click.command("plan")
@click.argument("config_file", metavar="CONFIG", type=click.Path())
@click.option("--kind", type=click.Choice(("sft", "grpo", "ppo")), help="Default: as the file's first line says.")
def plan_command(config_file: str, kind: str | None) -> None:
    """Say what memory the training of CONFIG will take, by part, and the largest settings that still fit.

    CONFIG is a YAML file of sft, grpo or ppo. The model is loaded; nothing is trained, downloaded or written.
    """
    from mlx_traces.device import import_mlx

    import_mlx()
    from mlx_traces import planning

    for line in planning.plan(config_file, kind).lines():
        click.echo(line)
