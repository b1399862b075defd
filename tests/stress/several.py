"""One small run of each kind that several ranks share, whole or stopped on the way: shared by the tests of ranks.

`main`, called by each of two ranks, goes on with the runs that a single process began and stopped, and begins others
that a single process will go on with.
"""

import json
import os
import signal
from pathlib import Path

import mlx_traces
from mlx_traces import config
from mlx_traces.evaluation import evaluator, local, run
from mlx_traces.rl import grpo, ppo
from mlx_traces.runtime import distributed
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.tasks import countdown
from mlx_traces.traces import files, generate, solutions
from mlx_traces.train import sft

ADAPTER = str(Path(__file__).parents[2] / "adapters/nano-epoch1")
ASKED = {"task": "countdown", "prompt": "thinking", "max_tokens": 12}
RL = {
    **{**ASKED, "data": "3-numbers", "max_tokens": 32, "temperature": 1.5},  # so that a group's rewards differ
    **{"adapter": ADAPTER, "num_steps": 3, "prompts_per_step": 3, "group_size": 4, "micro_tokens": 512, "warmup": 0},
    **{"learning_rate": 5e-5, "minibatches": 2, "eval_every": 2, "evaluate": {**ASKED, "limit": 2}},
    **{"rewards": {"correct": 1.0, "equations": 0.0, "steps": 0.0}, "step_weight": 1.0},
}
SETTINGS = {
    "grpo": {**RL, "kl_coef": 0.01},
    "ppo": {**RL, "kl_coef": 0.01, "epochs": 1, "value_warmup_steps": 1, "supervision": "cumulative"},
    "sft": {"batch_size": 5, "micro_tokens": 200, "learning_rate": 5e-5, "warmup": 0, "eval_every": 1},
    "eval": {**ASKED, "adapter": ADAPTER, "limit": 19, "rows": 2, "max_tokens": 8},
    "generate": {**ASKED, "limit": 5, "samples": 4, "temperature": 1.0, "rows": 2},
}


def prepare(folder):
    """Write what is trained on."""
    problems = countdown.TASK.prompt("thinking")
    made = solutions.countdown_traces(14, "train", 3, prompts=[problems])
    files.write_traces(folder / "data.jsonl", made, {"source": "solver", "config": {}, "counts": {}, "seed": 3})


def place(kind, folder, name):
    """Return where a run writes."""
    return folder / f"{name}-{kind}{'.jsonl' if kind == 'generate' else ''}"


def make(kind, folder, name, resume=False, stop=False):
    """Make a run or go on with it; ``stop`` presses Ctrl-C after its first unit."""
    units = 0

    def show(*_):
        nonlocal units
        units += 1
        if stop and units == 3 and distributed.world().rank() == distributed.world().size() - 1:
            os.kill(os.getpid(), signal.SIGINT)

    out, settings = place(kind, folder, name), SETTINGS[kind]
    if kind == "eval":
        local.grade_sample = run.grade_sample = counted(show)
        try:
            return mlx_traces.evaluate(out=out, resume=resume, **settings)
        finally:
            local.grade_sample = run.grade_sample = evaluator.grade_sample
    if kind == "sft":
        settings = {**settings, "data": str(folder / "data.jsonl"), "valid_share": 0.2}
    if kind == "generate":
        return generate.generate(config.GenerateConfig(**settings), out, resume, show)
    recipe, form = {"grpo": (grpo, "GRPOConfig"), "ppo": (ppo, "PPOConfig"), "sft": (sft, "SFTConfig")}[kind]
    return recipe.train(getattr(config, form)(**settings), out, resume, show)


def counted(show, grade=evaluator.grade_sample):
    """Return the grader that calls ``show`` each time."""

    def graded(*args):
        show()
        return grade(*args)

    return graded


def stopped(kind, folder, name):
    """Begin a run and stop it; return what it says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have begun deaf to it
    try:
        make(kind, folder, name, stop=True)
    except Stopped as error:
        return str(error)
    raise AssertionError(f"{kind} was not stopped")


def main(folder):
    """Do what several ranks do."""
    said = {}
    for kind in SETTINGS:
        make(kind, folder, "first", resume=True)
        said[kind] = stopped(kind, folder, "second")
    if distributed.first():
        (folder / "said.json").write_text(json.dumps(said))
