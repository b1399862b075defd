"""nano, doctor and plan."""

import json
from pathlib import Path

import click

from mlx_traces.cli.options import ConfigFile, configured, settings_options
from mlx_traces.config import NanoConfig


@click.group("nano")
def nano_group() -> None:
    """The embedded model."""


@nano_group.command("build")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@settings_options(NanoConfig)
def nano_build(config_file: str | None, settings: dict) -> None:
    """Train nano from scratch and write it, quantized, as a model folder; minutes on two CPU cores."""
    from mlx_traces.runtime.device import import_mlx

    config = configured(NanoConfig, config_file, settings)
    import_mlx()
    from mlx_traces.models import nano
    from mlx_traces.runtime.progress import progress

    nano.check_sizes(config)
    with progress("nano") as shown:
        out = nano.build(config, lambda step, steps, loss: shown.update(step, steps, [f"loss {loss:.3f}"]))
    click.echo(f"written to {out}; try: mlx-traces eval --model {out} --task countdown")


@nano_group.command("reference")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file; it is replaced.")
def nano_reference(out: Path) -> None:
    """Write the numbers that doctor's self-test compares with: nano in float32 on this CPU.

    To be repeated whenever nano was built anew: --out mlx_traces/assets/selftest.json.
    """
    from mlx_traces.diagnostics import selftest

    content = selftest.write_reference(out)
    tokens = sum(len(completion["tokens"]) for completion in content["completions"])
    click.echo(f"written to {out}: {tokens} log-probabilities and a training step")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the lines as JSON.")
@click.option("--self-test/--no-self-test", default=True, help="Generate and train a step against stored numbers.")
def doctor_command(as_json: bool, self_test: bool) -> None:
    """Say what this machine runs on, how fast, whether right, and what to do about what is wrong.

    Looks at versions, device, memory, BLAS, disk and the hub, and tests generation and a training step of the
    embedded model against stored numbers. Exit status 1 if commands would fail, or results could not be trusted.
    """
    from mlx_traces.diagnostics import doctor

    lines = doctor.report(self_test)
    if as_json:
        click.echo(json.dumps(doctor.as_rows(lines), indent=1))
    else:
        doctor.show(lines)
    if any(line.failed for line in lines):
        raise SystemExit(1)


@click.command("plan")
@click.argument("config_file", metavar="CONFIG", type=ConfigFile())
@click.option("--kind", type=click.Choice(("sft", "grpo", "ppo")), help="Default: as the file's first line says.")
def plan_command(config_file: str, kind: str | None) -> None:
    """Say what memory the training of CONFIG will take, by part, and the largest settings that still fit.

    CONFIG is a YAML file of sft, grpo or ppo. The model is loaded; nothing is trained, downloaded or written.
    """
    from mlx_traces.runtime.device import import_mlx

    import_mlx()
    from mlx_traces.pipelines import estimate

    for line in estimate.plan(config_file, kind).lines():
        click.echo(line)
