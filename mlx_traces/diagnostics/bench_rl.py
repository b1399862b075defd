"""How fast steps of reinforcement learning are here: GRPO against mlx-lm-lora's trainer, PPO against our own GRPO.

A step of ours is what ``mlx-traces grpo`` or ``ppo`` does: sample groups with the engine, grade them, update the
adapter, with PPO the values too. PPO has no peer on MLX: mlx-lm-lora's learns from pairs that a judge ranks, without
rewards and values. So PPO is compared with our GRPO, with the same sizes, problems and engine.

Our steps and the peer's alternate within one call of the peer's ``train_grpo`` (its batches are drawn through a
function that times them), so that both are warm; the first step of each is the warm-up. The median step counts. With no
repeats, for steps that take many minutes, the first step of each counts.

Both get the same prompts as token ids, the same sizes, temperature and grader. Otherwise the peer keeps its defaults,
and so differs from us: it decodes as many rows at once as it is given problems, filters by top-p 0.95 and top-k 20,
ends a completion at ``</answer>`` too, always reads a reference model (KL 0.1), learns from every rollout, also in
groups of equal rewards, with Adam at 1e-5, and computes the logits of all prompts and completions that it learns from.
So completions differ in length, and speeds are compared in tokens per second too.
"""

import contextlib
import gc
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.optimizers import Adam
from mlx_lm.tuner.callbacks import TrainingCallback

from mlx_traces.config import AdapterConfig, GRPOConfig, PPOConfig, RLConfig, build
from mlx_traces.diagnostics.bench_sft import held_alone, twin
from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import evaluator
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Problem
from mlx_traces.rl import grpo, ppo, rewards, rollouts
from mlx_traces.runtime import distributed
from mlx_traces.train import memory

PEERS = ("mlx-lm-lora",)
OURS = ("grpo",)  # what PPO is compared with
PEER_ADAPTER = AdapterConfig(rank=8, scale=10.0)  # its command's defaults, as its other settings below
PEER_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class GRPORow:
    """The result of ``bench grpo`` or ``bench ppo``.

    Seconds are medians over the steps: of the whole step, of the time until the last completion is done
    (``sample_seconds``), and of the rest, grading included (``update_seconds``). ``completion_tokens`` is the mean
    number of sampled tokens a step, stop tokens included, and ``tokens_per_second`` that over the seconds of whole
    steps. ``learned`` is the share of the rollouts that the update learns from; groups of equal rewards are left out.
    ``kl_sampler`` is the mean KL divergence between sampler and trainer, in nats a token.
    ``ratio`` is the peer's seconds a step over ours, at the same numbers of problems and rollouts;
    ``tokens_ratio`` is our tokens per second over the peer's, whatever the completions' lengths. Memory is MLX's peak
    in 1e9 bytes, weights included, without what only the other tool holds. The estimate assumes that all completions
    have ``max_tokens`` and are learned from.
    """

    prompts: int
    group_size: int
    max_tokens: int
    steps: int
    seconds: float
    sample_seconds: float
    update_seconds: float
    completion_tokens: float
    tokens_per_second: float
    learned: float
    peak_memory_gb: float
    estimated_memory_gb: float
    warmup_seconds: float
    kl_sampler: float | None = None
    ranks: int = 1
    peer: str | None = None
    peer_weights: str | None = None
    peer_seconds: float | None = None
    peer_sample_seconds: float | None = None
    peer_update_seconds: float | None = None
    peer_completion_tokens: float | None = None
    peer_tokens_per_second: float | None = None
    peer_peak_memory_gb: float | None = None
    peer_warmup_seconds: float | None = None
    ratio: float | None = None
    tokens_ratio: float | None = None


@dataclass
class Step:
    """A measured step: seconds, those of sampling, tokens sampled, share of rollouts learned from, memory."""

    seconds: float = 0.0
    sampling: float = 0.0
    tokens: int = 0
    learned: float = 1.0
    memory_gb: float = 0.0
    began: float = 0.0
    kl: float | None = None

    def begin(self) -> "Step":
        """Start the clock."""
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        self.began = perf_counter()
        return self

    def end(self, tokens: int) -> None:
        """Stop the clock, after everything has been computed."""
        self.seconds, self.memory_gb = perf_counter() - self.began, mx.get_peak_memory() / 1e9
        self.tokens = tokens


def bench_grpo(
    loaded: LoadedModel,
    config: RLConfig,
    against: str | None = None,
    as_shipped: bool = False,
    repeats: int = 3,
    every_row: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> GRPORow:
    """Time steps on a new adapter; the model itself stays as it is.

    Args:
        loaded: the model, without adapter.
        config: the settings of GRPO or of PPO, which is then timed; the number of steps follows from ``repeats``. PPO
            has no warm-up steps of the values alone here.
        against: for GRPO ``"mlx-lm-lora"``, its ``train_grpo`` with our weights and our adapter's sizes; for PPO
            ``"grpo"``, our GRPO with the same settings as far as both have them.
        as_shipped: let the peer load the weights as its user gets them instead, with its own adapter's sizes.
        repeats: timed steps of each, in turn, after a first one; with 0 the first one is timed.
        every_row: make all rewards of a group differ, so that every rollout is learned from, as the peer always does.
        progress: is called with a line before each step.

    Raises:
        UserError: for an unknown peer, one that is not installed, or settings that do not fit the model.
    """
    peers_of = OURS if isinstance(config, PPOConfig) else PEERS
    if against not in (None, *peers_of):
        raise unknown("peer", str(against), peers_of)
    if against and distributed.world().size() > 1:
        raise UserError(f"--against {against} runs in one process; leave out mlx.launch, or the peer")
    if against in PEERS:
        trainer()
    config = _alone(config, repeats + 1)
    planned, _, _ = rollouts.prepare(config)
    longest = rollouts.longest_prompt(loaded, planned)
    ours, peers = [], []
    stream = OurSteps(loaded, planned, config, every_row)

    def turns() -> Iterator[tuple[str, list[Problem]]]:
        for turn in range(repeats + 1):
            name = f"step {turn} of {repeats}" if turn else "warm-up" if repeats else "first step"
            progress(f"{name}, mlx-traces")
            step, problems = stream.make()
            ours.append(step)
            yield name, problems

    mine, theirs = [stream.learner.module], []
    if against in PEERS:
        theirs = [*_peer_models(loaded, config, as_shipped)]
        peers += _run_peer(*theirs, loaded, planned, config, turns, repeats + 1, progress)
    else:
        # GRPO's settings are PPO's where both have them.
        same = {name: value for name, value in config if name in GRPOConfig.model_fields}
        other = OurSteps(loaded, planned, build(GRPOConfig, same), every_row) if against else None
        theirs = [other.learner.module] if other else []
        for name, _ in turns():
            if other:
                progress(f"{name}, {against}")
                peers.append(other.make()[0])
    for steps, tools, others in ((peers, theirs, mine), (ours, mine, theirs)):
        for step in steps:
            step.memory_gb -= held_alone(others, tools) / 1e9
    line = _line(config, ours, memory.of_reinforcement(stream.loaded, config, longest).peak)
    if not against:
        return line
    rest = _timed(peers)
    pairs = list(zip(_timed(ours), rest, strict=True))
    told = {
        "peer": against,
        "peer_weights": "as shipped" if as_shipped else "same",
        "peer_seconds": median(step.seconds for step in rest),
        "peer_sample_seconds": median(step.sampling for step in rest),
        "peer_update_seconds": median(step.seconds - step.sampling for step in rest),
        "peer_completion_tokens": sum(step.tokens for step in rest) / len(rest),
        "peer_tokens_per_second": sum(step.tokens for step in rest) / sum(step.seconds for step in rest),
        "peer_peak_memory_gb": max(step.memory_gb for step in rest),
        "peer_warmup_seconds": peers[0].seconds,
        "ratio": median(theirs.seconds / own.seconds for own, theirs in pairs),
        "tokens_ratio": median((own.tokens / own.seconds) / (b.tokens / b.seconds) for own, b in pairs),
    }
    return replace(line, **told)


def _alone(config: RLConfig, steps: int) -> RLConfig:
    """Return the settings for so many complete steps, without evaluation, reference model, resampling or warm-up."""
    changes = {"num_steps": steps, "evaluate": None, "adapter": None, "kl_coef": 0.0, "reference": None}
    own = {"value_warmup_steps": 0} if isinstance(config, PPOConfig) else {"max_resamples": 0, "unbiased_kl": False}
    return config.model_copy(update=changes | own)


def _line(config: RLConfig, steps: Sequence[Step], estimated_gb: float) -> GRPORow:
    """Summarize our steps; the first is the warm-up."""
    timed = _timed(steps)
    return GRPORow(
        prompts=config.prompts_per_step,
        group_size=config.group_size,
        max_tokens=config.max_tokens,
        steps=len(timed),
        seconds=median(step.seconds for step in timed),
        sample_seconds=median(step.sampling for step in timed),
        update_seconds=median(step.seconds - step.sampling for step in timed),
        completion_tokens=sum(step.tokens for step in timed) / len(timed),
        tokens_per_second=sum(step.tokens for step in timed) / sum(step.seconds for step in timed),
        learned=sum(step.learned for step in timed) / len(timed),
        peak_memory_gb=max(step.memory_gb for step in timed),
        estimated_memory_gb=estimated_gb,
        warmup_seconds=steps[0].seconds,
        kl_sampler=timed[-1].kl,
        ranks=distributed.world().size(),
    )


def _timed(steps: Sequence[Step]) -> Sequence[Step]:
    """Return the steps that count: all but the first, or the first if it is the only one."""
    return steps[1:] or steps


class OurSteps:
    """Makes steps of training with a new adapter on a second tree of the model's arrays."""

    def __init__(self, loaded: LoadedModel, planned: evaluator.Plan, config: RLConfig, every_row: bool) -> None:
        self.loaded, self.planned, self.config = replace(loaded, model=twin(loaded.model)), planned, config
        self.every_row, self.progress, self.number = every_row, rollouts.Progress(), 0
        mx.random.seed(config.seed)
        adapters.start(self.loaded.model, config)
        self.room = ppo if isinstance(config, PPOConfig) else grpo
        self.learner = self.room.start(self.loaded, config)
        mx.eval(self.learner.module.parameters())
        self.functions = rewards.load(config.rewards, list(planned.problems[0].columns))

    def make(self) -> tuple[Step, list[Problem]]:
        """Make a step; return its measurements and its problems."""
        self.number += 1
        step = Step().begin()
        groups, _, seconds = rollouts.collect(
            self.loaded, self.planned, self.functions, self.progress, self.number, self.config
        )
        learned = groups
        if self.every_row:  # all rewards of a group differ, and none is their mean
            learned = [[replace(one, reward=at or 0.25) for at, one in enumerate(group)] for group in groups]
        rows = self.room.rows_of(learned, self.config)
        step.kl = self.room.learn(self.learner, rows, self.number, self.config).get("policy/kl_sampler")
        every = [rollout for group in groups for rollout in group]
        step.end(sum(len(rollout.ids) for rollout in every))
        step.sampling = seconds["time/sample"]
        # PPO's values learn from rows without an advantage too.
        taught = sum(bool((self.room is ppo or np.any(row.advantage)) and row.example.count) for row in rows)
        step.learned = taught / len(every)
        return step, [group[0].problem for group in groups]


# ------------------------------------------------------------------------------------------------ the peer


def trainer() -> Any:
    """Import and return mlx-lm-lora's GRPO trainer.

    Raises:
        UserError: if it is not installed.
    """
    try:
        from mlx_lm_lora.trainer import grpo_trainer
    except ImportError as error:
        raise UserError(
            f"mlx-lm-lora is not installed ({' '.join(str(error).split())}): pip install 'mlx-traces[peers]'"
        ) from None
    return grpo_trainer


def _peer_models(loaded: LoadedModel, config: GRPOConfig, as_shipped: bool) -> tuple[nn.Module, nn.Module]:
    """Return the peer's model with an adapter, and its reference: the same arrays, or two loads as its user gets."""
    if as_shipped:
        peer, reference = (mlx_lm.load(str(loaded.path))[0] for _ in range(2))
        adapters.start(peer, PEER_ADAPTER)
    else:
        peer, reference = twin(loaded.model), twin(loaded.model)
        adapters.start(peer, config)
    mx.eval(peer.parameters())
    return peer, reference.freeze()


def _run_peer(
    peer: nn.Module,
    reference: nn.Module,
    loaded: LoadedModel,
    planned: evaluator.Plan,
    config: GRPOConfig,
    turns: Callable,
    count: int,
    progress: Callable[[str], None],
) -> list[Step]:
    """Run ``train_grpo``, a step of ours before each of its own; return its steps."""
    module, steps, stderr = trainer(), [], sys.stderr
    asked: list[Problem] = []
    rendered: list[Any] = []

    def batches(**_: Any) -> Iterator[Any]:
        """Yield the problems of each of our steps as a batch of the peer's; its clock starts here."""
        while True:
            with contextlib.redirect_stderr(stderr):
                name, problems = next(told)
                progress(f"{name}, {PEERS[0]}")
            asked[:] = problems
            rendered[:] = [loaded.render(planned.prompt, problem, config.thinking) for problem in problems]
            prompts = [list(one.ids) for one in rendered]
            texts = [planned.prompt.messages(problem)[-1]["content"] for problem in problems]
            steps.append(Step().begin())
            yield prompts, [[0] for _ in problems], texts, [problem.gold for problem in problems], [*range(len(asked))]

    def correct(prompts: list[str], completions: list[str], answer: list[Any], types: list[int]) -> list[float]:
        """Grade as we do; the peer has sampled when it calls this."""
        steps[-1].sampling = perf_counter() - steps[-1].began
        graded = (
            planned.task.grade(asked[place], rendered[place].opened + text)[planned.extractor]
            for place, text in zip(types, completions, strict=True)
        )
        return [float(score.correct) for score in graded]

    class Clock(TrainingCallback):
        """Stops the clock at the report of each step, when its results are computed."""

        before = 0

        def on_train_loss_report(self, train_info: dict) -> None:
            steps[-1].end(train_info["trained_tokens"] - self.before)
            self.before = train_info["trained_tokens"]

    told = turns()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),  # its progress bar
    ):
        module.train_grpo(
            model=peer,
            ref_model=reference,
            tokenizer=loaded.tokenizer,
            optimizer=Adam(learning_rate=PEER_LEARNING_RATE),
            train_dataset=[],
            reward_funcs=[correct],
            args=module.GRPOTrainingArgs(
                batch_size=config.prompts_per_step,
                group_size=config.group_size,
                max_completion_length=config.max_tokens,
                temperature=config.temperature,
                iters=count,
                steps_per_report=1,
                steps_per_save=2**31,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
            ),
            iterate_batches=batches,
            training_callback=Clock(),
        )
    return steps
