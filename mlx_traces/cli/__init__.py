"""The command line: parse, call, print. A command imports its packages when it runs, so ``--help`` is fast."""

import click

import mlx_traces
from mlx_traces.cli.configs import configs_command
from mlx_traces.cli.diagnostics import bench_group, doctor_command, nano_group
from mlx_traces.cli.evaluate import eval_command, grade_command
from mlx_traces.cli.options import Commands
from mlx_traces.cli.pipelines import compare_command, rounds_command, study_command, verify_command
from mlx_traces.cli.report import card_command, push_command, report_command, watch_command
from mlx_traces.cli.traces import data_group, filter_command, generate_command, reformat_command, score_command
from mlx_traces.cli.train import fuse_command, grpo_command, plan_group, ppo_command, sft_command

GROUPS = {  # sections of the root's help
    "Evaluate": (eval_command, compare_command, study_command, grade_command, verify_command),
    "Traces": (data_group, generate_command, score_command, filter_command, reformat_command),
    "Train": (sft_command, grpo_command, ppo_command, rounds_command, fuse_command),
    "Show and share": (report_command, watch_command, card_command, push_command),
    "Machine and configurations": (doctor_command, plan_group, bench_group, nano_group, configs_command),
}


class Root(Commands):
    """The root group; its help lists the commands by purpose."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, group by group."""
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{one.name:<8}", one.get_short_help_str(68)) for one in commands])


@click.group(
    cls=Root,
    commands=[command for commands in GROUPS.values() for command in commands],
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(mlx_traces.__version__)
def main() -> None:
    """Teach small language models to reason on a MacBook, and measure whether they do.

    Start with `mlx-traces compare`: it compares direct answers with thinking, on the embedded model, in about a minute.
    """
