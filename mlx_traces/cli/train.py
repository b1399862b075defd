"""generate, sft, grpo and ppo: a model's own traces, an adapter trained on traces, or on rewards."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_traces.cli.options import ConfigFile, Sectioned, configured, settings_options
from mlx_traces.config import GenerateConfig, GRPOConfig, PPOConfig, RLConfig, RoundsConfig, SFTConfig


@click.command("generate", cls=Sectioned)
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option("--out", default="data/generated/traces.jsonl", show_default=True, type=click.Path(), help="File.")
@click.option("--resume", is_flag=True, help="Continue what was cut off; finished completions are kept.")
@settings_options(GenerateConfig)
def generate_command(config_file: str | None, out: str, resume: bool, settings: dict) -> None:
    """Sample completions of training problems; write them as traces, with their log-probabilities."""
    config = configured(GenerateConfig, config_file, settings)
    from mlx_traces.evaluation.evaluator import split_notes
    from mlx_traces.traces.generate import generate

    for note in split_notes(config):
        click.echo(f"note: {note}", err=True)
    with training_bar("generate") as show:
        seen = correct = 0

        def advance(trace: Any, total: int) -> None:
            nonlocal seen, correct
            seen, correct = seen + 1, correct + (trace.verdict == "correct")
            show({"step": seen, "correct": 100 * correct / seen}, total)

        counts = generate(config, out, resume, advance)
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    click.echo(f"{told}; in {out}", err=True)


@click.command("sft", cls=Sectioned)
@click.argument("config_file", metavar="[CONFIG]", required=False, type=ConfigFile())
@click.option("--out", default="runs/sft", show_default=True, type=click.Path(), help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue a run that was cut off.")
@settings_options(SFTConfig, "evaluate", "betas")
def sft_command(config_file: str | None, out: str, resume: bool, settings: dict) -> None:
    """Fine-tune a model on traces: LoRA, DoRA or full. CONFIG is a YAML file of these settings; options win over it."""
    config = configured(SFTConfig, config_file, settings)
    from mlx_traces.runtime.device import import_mlx

    import_mlx()
    from mlx_traces.train import sft

    with training_bar("sft") as show:
        result = sft.train(config, out, resume, show)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    best = "" if result.best_step is None else f", best at step {result.best_step}"
    loss = "" if result.valid_loss is None else f", validation loss {result.valid_loss:.4f}"
    accuracy = "" if result.accuracy is None else f", held-out accuracy {100 * result.accuracy:.1f} %"
    click.echo(f"{result.steps} steps in {result.seconds:.0f} s{best}{loss}{accuracy}; adapter in {result.adapter}")
    speed, padding = f"{result.tokens_per_second:.0f} tokens/s", f"{100 * result.padding:.1f} %"
    click.echo(f"{speed}, {result.peak_memory_gb:.2f} GB at most, padding {padding}", err=True)


def reinforcement_command(name: str, kind: type[RLConfig], what: str) -> click.Command:
    """Make the command of an algorithm of reinforcement learning."""

    @click.command(name, cls=Sectioned, help=f"{what} CONFIG is a YAML file of these settings; options win over it.")
    @click.argument("config_file", metavar="[CONFIG]", required=False, type=ConfigFile())
    @click.option("--out", default=f"runs/{name}", show_default=True, type=click.Path(), help="Run folder.")
    @click.option("--resume", is_flag=True, help="Continue a run that was cut off.")
    @click.option("--reward", "rewards", multiple=True, metavar="NAME=WEIGHT", help="Reward; give it once for each.")
    @settings_options(kind, "evaluate", "betas", "rewards")
    def command(config_file: str | None, out: str, resume: bool, rewards: tuple[str, ...], settings: dict) -> None:
        if rewards:
            settings["rewards"] = {name: weight or 1 for name, _, weight in (text.partition("=") for text in rewards)}
        config = configured(kind, config_file, settings)
        from mlx_traces.runtime.device import import_mlx

        import_mlx()
        from mlx_traces.rl import grpo, ppo

        train = {"grpo": grpo.train, "ppo": ppo.train}[name]
        with training_bar(name) as show:
            result = train(config, out, resume, show)
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        best = "" if result.best_step is None else f", best at step {result.best_step}"
        if result.accuracy is not None:
            best += f", held-out accuracy {100 * result.accuracy_before:.1f} % -> {100 * result.accuracy:.1f} %"
        click.echo(f"{result.steps} steps in {result.seconds:.0f} s{best}; adapter in {result.adapter}")
        spent = f"sampling {result.sample_seconds:.0f} s, updates {result.update_seconds:.0f} s"
        click.echo(
            f"{spent}, {result.tokens_per_second:.0f} tokens/s, {result.peak_memory_gb:.2f} GB at most", err=True
        )

    return command


grpo_command = reinforcement_command(
    "grpo", GRPOConfig, "Train with GRPO: raise the probability of completions that beat their group's mean."
)
ppo_command = reinforcement_command(
    "ppo", PPOConfig, "Train with PPO: a value head and generalized advantage estimation."
)


@click.command("fuse")
@click.option("--model", required=True, help="nano, a folder, or a hub id; MODEL+ADAPTER works.")
@click.option("--adapter", type=click.Path(), help="Folder of the adapter.")
@click.option("--out", default="runs/fused", show_default=True, type=click.Path(), help="Folder of the fused model.")
@click.option("--bits", type=int, default=16, show_default=True, help="Per weight; below 16 the loss is measured.")
@click.option("--data", type=click.Path(), help="File of traces to measure the loss on, before and after.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="How many of them.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def fuse_command(**arguments: Any) -> None:
    """Make model and adapter one stand-alone model, in the base's 16-bit type or quantized anew."""
    from mlx_traces.runtime.device import import_mlx

    import_mlx()
    from mlx_traces.train import fuse

    result = fuse.fuse(**arguments, progress=lambda line: click.echo(line, err=True))
    click.echo(f"{result.path}: {result.bits} bits, {result.dtype}")
    if result.loss_fused is not None:
        base = "" if result.loss_base is None else f"base {result.loss_base:.4f}, "
        losses = f"with adapter {result.loss_unfused:.4f}, fused {result.loss_fused:.4f}"
        click.echo(f"loss on {result.tokens:,} tokens: {base}{losses} nats per token")
    if line := fuse.warning(result):
        click.echo(f"warning: {line}", err=True)


@click.command("rounds")
@click.argument("config_file", metavar="CONFIG", type=ConfigFile())
@click.option("--data-dir", type=click.Path(), help="Where raw/, generated/ and processed/ are.  [default: data]")
@click.option("--runs-dir", type=click.Path(), help="Where run folders are kept.  [default: runs]")
@click.option("--report-to", type=click.Choice(["trackio", "wandb"]), help="Send every training's metrics there too.")
@click.option(
    "--dry-run", is_flag=True, help="Print the stations, and the time and memory of those to make; make nothing."
)
def rounds_command(
    config_file: str, data_dir: str | None, runs_dir: str | None, report_to: str | None, dry_run: bool
) -> None:
    """SFT on raw traces, SFT on the model's own filtered traces, GRPO or PPO; then the table and report of it all.

    Repeat the command after it was cut off: what is there is not made again.
    """
    given = {"data_dir": data_dir, "runs_dir": runs_dir, "report_to": report_to}
    config = configured(RoundsConfig, config_file, {name: value for name, value in given.items() if value})
    from mlx_traces.runtime.device import import_mlx

    import_mlx()
    from rich.console import Console

    from mlx_traces.pipelines import estimate, rounds
    from mlx_traces.report import tables

    if dry_run:
        click.echo("\n".join(estimate.lines(config)))
        return
    frame, runs, page = rounds.run(config, lambda line: click.echo(line, err=True), training_bar, progress=True)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(tables.to_terminal(frame))
    for line in rounds.gains(runs):
        click.echo(line)
    click.echo(f"report: {page}")


SHOWN = (
    *(("reward/mean", "reward {:.3f}"), ("rollout/length", "length {:.0f}"), ("rollout/finished", "finished {:.0%}")),
    *(("rollout/zero_std_groups", "level groups {:.0%}"), ("policy/kl_ref", "KL {:.3f}")),
    ("value/explained_variance", "value explains {:.0%}"),
    *(("policy/entropy", "entropy {:.2f}"), ("time/sample", "sampling {:.1f} s"), ("time/update", "update {:.1f} s")),
    *(("loss", "loss {:.4f}"), ("correct", "{:.1f} % correct"), ("tokens_per_second", "{:.0f} tokens/s")),
    ("memory/peak_gb", "{:.2f} GB"),
)


@contextmanager
def training_bar(name: str) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """Yield the function that takes each line of metrics and the number of steps; it drives the progress on stderr."""
    from mlx_traces.runtime.progress import progress

    with progress(name) as shown:

        def show(row: dict[str, Any], steps: int) -> None:
            shown.update(row["step"], steps, [text.format(row[key]) for key, text in SHOWN if row.get(key) is not None])
            held_out = [f"{key.removeprefix('valid/')} {value:.4g}" for key, value in row.items() if "valid/" in key]
            if held_out:
                shown.say(f"step {row['step']}: held out: {', '.join(held_out)}")

        yield show
