"""plan, sft, grpo, ppo and fuse: train an adapter on traces or on rewards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_traces.cli.options import ConfigFile, Sectioned, configured, settings_options
from mlx_traces.config import GRPOConfig, PPOConfig, RLConfig, SFTConfig
from mlx_traces.runtime.device import import_mlx


class Plan(click.Group):
    """A group whose first argument is a subcommand or a training's configuration."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """Find the subcommand; default: ``training``."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["training", *args])


@click.group("plan", cls=Plan, context_settings={"ignore_unknown_options": True})
def plan_group() -> None:
    """Estimate a training's memory or a comparison's size.

    `plan CONFIG` is short for `plan training CONFIG`.
    """


@plan_group.command("training")
@click.argument("config_file", metavar="CONFIG", type=ConfigFile())
@click.option(
    "--kind", type=click.Choice(("sft", "grpo", "ppo")), help="Kind of training; default: decided by the file's fields."
)
def plan_command(config_file: str, kind: str | None) -> None:
    """Estimate the memory of a training. Also prints the largest settings that fit.

    CONFIG is a YAML file for sft, grpo or ppo, or the name of a shipped one. The model must be on this machine; nothing
    is trained, downloaded or written.
    """
    import_mlx()
    from mlx_traces.pipelines import estimate

    for line in estimate.plan(config_file, kind).lines():
        click.echo(line)


@plan_group.command("eval")
@click.option(
    "--difference", type=float, help="Smallest difference of two accuracies that the test should find, in points."
)
@click.option(
    "--from",
    "runs",
    type=click.Path(),
    multiple=True,
    metavar="RUN [RUN]",
    help="One or two finished runs, similar to the planned ones.",
)
@click.option("--discordant", type=float, help="Percent of the problems that only one of the two models gets right.")
@click.option("--problems", type=int, help="Number of available problems.  [default: that of the runs]")
@click.option("--power", type=float, default=80, show_default=True, help="Chance that the test finds it, in percent.")
@click.option("--alpha", type=float, default=5, show_default=True, help="Level of the two-sided test, in percent.")
@click.option("--holm", type=int, default=1, show_default=True, help="Number of comparisons in the table.")
@click.argument("second", required=False, metavar="", type=click.Path())
def plan_eval_command(runs: tuple[str, ...], second: str | None, **given: Any) -> None:
    """Compute how many problems a comparison needs, or the smallest difference that given problems show.

    The test is McNemar's exact test. --from RUN reads time and tokens of a finished run; --from RUN RUN also reads the
    share of problems that only one of the two runs gets right.
    """
    from mlx_traces.evaluation.planning import plan_eval

    for line in plan_eval(runs=[*runs, *filter(None, [second])], **given).lines():
        click.echo(line)


@click.command("sft", cls=Sectioned)
@click.argument("config_file", metavar="[CONFIG]", required=False, type=ConfigFile())
@click.option("--out", default="runs/sft", show_default=True, type=click.Path(), help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@settings_options(SFTConfig, "evaluate", "betas")
def sft_command(config_file: str | None, out: str, resume: bool, settings: dict) -> None:
    """Fine-tune a model on traces: LoRA, DoRA or full weights.

    CONFIG is a YAML file of these settings, or the name of a shipped one. Options win over it.
    """
    config = configured(SFTConfig, config_file, settings)
    import_mlx()
    from mlx_traces.train import sft

    with training_bar("sft") as show:
        result = sft.train(config, out, resume, show)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    best = "" if result.best_step is None else f", best at step {result.best_step}"
    loss = "" if result.valid_loss is None else f", validation loss {result.valid_loss:.4f}"
    accuracy = "" if result.accuracy is None else f", held-out accuracy {100 * result.accuracy:.1f} %"
    click.echo(f"{_steps(result)} in {result.seconds:.0f} s{best}{loss}{accuracy}; adapter in {result.adapter}")
    speed, padding = f"{result.tokens_per_second:.0f} tokens/s", f"{100 * result.padding:.1f} %"
    click.echo(f"{speed}, {result.peak_memory_gb:.2f} GB at most, padding {padding}", err=True)


_CONFIG = "CONFIG is a YAML file of these settings, or the name of a shipped one. Options win over it."
_REWARD = (
    "A reward and its weight: correct, gated, equations, format, judge, ..., or your own module:function. Repeat for "
    "more.  [default: correct=1]"
)


def _steps(result: Any) -> str:
    return f"{result.steps} steps" + (f", ended by {result.stopped}," if result.stopped else "")


def reinforcement_command(name: str, kind: type[RLConfig], what: str) -> click.Command:
    """Make the command ``grpo`` or ``ppo``."""

    @click.command(name, cls=Sectioned, help=f"{what}\n\n{_CONFIG}")
    @click.argument("config_file", metavar="[CONFIG]", required=False, type=ConfigFile())
    @click.option("--out", default=f"runs/{name}", show_default=True, type=click.Path(), help="Run folder.")
    @click.option("--resume", is_flag=True, help="Continue an interrupted run.")
    @click.option("--reward", "rewards", multiple=True, metavar="NAME=WEIGHT", help=_REWARD)
    @settings_options(kind, "evaluate", "betas", "rewards")
    def command(config_file: str | None, out: str, resume: bool, rewards: tuple[str, ...], settings: dict) -> None:
        if rewards:
            settings["rewards"] = {name: weight or 1 for name, _, weight in (text.partition("=") for text in rewards)}
        config = configured(kind, config_file, settings)
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
        click.echo(f"{_steps(result)} in {result.seconds:.0f} s{best}; adapter in {result.adapter}")
        times = f"sampling {result.sample_seconds:.0f} s, updates {result.update_seconds:.0f} s"
        click.echo(
            f"{times}, {result.tokens_per_second:.0f} tokens/s, {result.peak_memory_gb:.2f} GB at most", err=True
        )

    return command


grpo_command = reinforcement_command(
    "grpo",
    GRPOConfig,
    "Train a model with GRPO. It raises the probability of completions that beat their group's mean.",
)
ppo_command = reinforcement_command(
    "ppo", PPOConfig, "Train a model with PPO. It uses a value head and generalized advantage estimation."
)


@click.command("fuse")
@click.option("--model", required=True, help="nano, a folder, or a hub id; MODEL+ADAPTER works.")
@click.option("--adapter", type=click.Path(), help="Folder of the adapter.")
@click.option("--out", default="runs/fused", show_default=True, type=click.Path(), help="Folder of the fused model.")
@click.option("--bits", type=int, default=16, show_default=True, help="Bits per weight; below 16 needs --data.")
@click.option("--data", type=click.Path(), help="File of traces to measure the loss on, before and after fusing.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Number of these traces.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def fuse_command(**arguments: Any) -> None:
    """Write a model and its adapter as one model. Its weights have 16 bits, or are quantized again."""
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


SHOWN = (
    *(("reward/mean", "reward {:.3f}"), ("rollout/length", "length {:.0f}"), ("rollout/finished", "finished {:.0%}")),
    *(("steps/equations", "true equations {:.0%}"), ("steps/claims", "true claims {:.0%}")),
    *(("rollout/zero_std_groups", "equal rewards {:.0%}"), ("policy/kl_ref", "KL {:.3f}")),
    ("value/explained_variance", "explained variance {:.0%}"),
    *(("policy/entropy", "entropy {:.2f}"), ("time/sample", "sampling {:.1f} s"), ("time/update", "update {:.1f} s")),
    *(("loss", "loss {:.4f}"), ("correct", "{:.1f} % correct"), ("tokens_per_second", "{:.0f} tokens/s")),
    ("memory/peak_gb", "{:.2f} GB"),
)


@contextmanager
def training_bar(name: str) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """Yield a function that shows progress on stderr; it takes a line of metrics and the number of steps."""
    from mlx_traces.runtime.progress import progress

    with progress(name) as shown:

        def show(row: dict[str, Any], steps: int) -> None:
            shown.update(row["step"], steps, [text.format(row[key]) for key, text in SHOWN if row.get(key) is not None])
            held_out = [f"{key.removeprefix('valid/')} {value:.4g}" for key, value in row.items() if "valid/" in key]
            if held_out:
                shown.say(f"step {row['step']}: held out: {', '.join(held_out)}")

        yield show
