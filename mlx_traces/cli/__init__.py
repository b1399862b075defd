"""The command line: parse, call, print. Heavy imports wait until a command runs, so ``--help`` is instant."""

import click

import mlx_traces
from mlx_traces.cli.configs import configs_command
from mlx_traces.cli.diagnostics import bench_group, doctor_command, nano_group
from mlx_traces.cli.evaluate import eval_command, grade_command
from mlx_traces.cli.options import Commands
from mlx_traces.cli.pipelines import compare_command, rounds_command, study_command, verify_command
from mlx_traces.cli.report import card_command, push_command, report_command, watch_command
from mlx_traces.cli.traces import data_group, filter_command, generate_command, reformat_command, score_command
from mlx_traces.cli.train import fuse_command, grpo_command, plan_command, ppo_command, sft_command


@click.group(cls=Commands, context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.version_option(mlx_traces.__version__)
def main() -> None:
    """Teach small language models to reason on a MacBook, and measure whether they do.

    Start with `mlx-traces compare`: it compares direct answers with thinking, on the embedded model, in about a minute.
    """


for command in (
    *(eval_command, compare_command, study_command, grade_command, verify_command),
    *(data_group, generate_command, score_command, filter_command, reformat_command, sft_command, rounds_command),
    *(grpo_command, ppo_command, fuse_command),
    *(report_command, watch_command, card_command, push_command),
    *(bench_group, nano_group, doctor_command, plan_command, configs_command),
):
    main.add_command(command)
