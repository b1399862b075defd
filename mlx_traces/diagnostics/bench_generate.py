"""How fast this machine generates, compared with a named peer in the same run.

Every figure is of a whole run over the same prompts. Our runs and the peer's alternate, the median counts, and a
first run of each, which compiles kernels and touches memory, is reported separately.
"""

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm import batch_generate

from mlx_traces.engine.generation import Usage, generate
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError, unknown
from mlx_traces.models.loading import LoadedModel
from mlx_traces.runtime import distributed
from mlx_traces.tasks import get_task

PEERS = ("mlx-lm",)
SOURCE = "countdown"
COUNT = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


@dataclass(frozen=True)
class GenerateRow:
    """One line of ``bench generate``.

    ``tokens_per_second`` counts completion tokens, stop tokens included, over the seconds of the whole run, prompts
    included. ``ratio`` is ours over the peer's, ``busy_ratio`` ours beside ``busy`` busy processes over ours alone.
    Memory is MLX's peak in 1e9 bytes. With several ranks the tokens are of all, the seconds end when the last rank is
    done, and all else is of the first rank.
    """

    rows: int
    prompts: int
    completion_tokens: int
    seconds: float
    tokens_per_second: float
    prompt_tokens_per_second: float
    ms_per_step: float
    first_token_seconds: float
    occupancy: float
    peak_memory_gb: float
    warmup_seconds: float
    ranks: int = 1
    peer: str | None = None
    peer_weights: str | None = None
    peer_completion_tokens: int | None = None
    peer_tokens_per_second: float | None = None
    peer_peak_memory_gb: float | None = None
    peer_warmup_seconds: float | None = None
    ratio: float | None = None
    busy: int = 0
    busy_tokens_per_second: float | None = None
    busy_ratio: float | None = None


@dataclass
class Run:
    """One measured run: wall-clock seconds, tokens, and MLX's peak memory in 1e9 bytes."""

    tokens: int = 0
    seconds: float = 0.0
    memory_gb: float = 0.0
    usage: Any = None


def bench_generate(
    loaded: LoadedModel,
    prompts: list[tuple[int, ...]],
    rows: list[int],
    max_tokens: int,
    against: str | None = None,
    as_shipped: bool = False,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda line: None,
    busy: int = 0,
) -> list[GenerateRow]:
    """Time greedy generation of all prompts, for each number of rows.

    Args:
        loaded: the model.
        prompts: token ids; several ranks share them.
        rows: completions decoded at once, one bench each.
        max_tokens: most tokens of a completion.
        against: ``"mlx-lm"`` for its ``batch_generate``, with our weights.
        as_shipped: let the peer load the weights as its user gets them, instead.
        repeats: timed runs of each, in turn.
        progress: is called with a line before each run.
        busy: each run of ours is repeated beside so many new processes that do nothing but count.

    Raises:
        UserError: for an unknown peer, or a peer with several ranks.
    """
    if against and distributed.world().size() > 1:
        raise UserError(f"--against {against} runs in one process; leave out mlx.launch, or the peer")
    if against not in (None, *PEERS):
        raise unknown("peer", str(against), PEERS)
    peer_model, tokenizer, weights = loaded.model, loaded.tokenizer, "same"
    if against and as_shipped:
        (peer_model, tokenizer), weights = mlx_lm.load(str(loaded.path))[:2], "as shipped"
    lines = []
    for count in rows:
        ours: list[Run] = []
        peers: list[Run] = []
        beside: list[Run] = []
        for turn in range(repeats + 1):
            name = "warm-up" if turn == 0 else f"run {turn} of {repeats}"
            progress(f"{count} rows, {name}, mlx-traces")
            with measured() as run:
                run.tokens, run.usage = _ours(loaded, prompts, count, max_tokens)
            ours.append(run)
            if busy:
                progress(f"{count} rows, {name}, mlx-traces beside {busy} busy processes")
                with counting(busy), measured() as run:
                    run.tokens, run.usage = _ours(loaded, prompts, count, max_tokens)
                beside.append(run)
            if against:
                progress(f"{count} rows, {name}, {against}")
                with measured() as run:
                    run.tokens = _mlx_lm(peer_model, tokenizer, prompts, count, max_tokens)
                peers.append(run)
        line = _line(count, len(prompts), ours, peers, against, weights)
        if busy:
            _, *timed = beside
            run = middle(timed)
            speed = {"busy_tokens_per_second": run.tokens / run.seconds, "busy_ratio": ratio(timed, ours[1:])}
            line = replace(line, busy=busy, **speed)
        lines.append(line)
    return lines


@contextmanager
def counting(processes: int) -> Iterator[None]:
    """Keep so many cores busy meanwhile."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", COUNT]))
            stack.callback(process.kill)
        yield


def _line(rows: int, prompts: int, ours: list[Run], peers: list[Run], against: str | None, weights: str) -> GenerateRow:
    """Summarize the runs; the first of each is the warm-up."""
    warmup, *timed = ours
    run = middle(timed)
    usage = run.usage
    line = {
        "rows": rows,
        "prompts": prompts,
        "completion_tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds,
        "prompt_tokens_per_second": usage.prompt_tokens / usage.prompt_seconds if usage.prompt_seconds else 0.0,
        "ms_per_step": 1000 * (run.seconds - usage.prompt_seconds) / max(usage.steps, 1),
        "first_token_seconds": usage.first_token_seconds,
        "occupancy": usage.occupancy,
        "peak_memory_gb": run.memory_gb,
        "warmup_seconds": warmup.seconds,
        "ranks": distributed.world().size(),
    }
    if against:
        first, *rest = peers
        peer = middle(rest)
        line |= {
            "peer": against,
            "peer_weights": weights,
            "peer_completion_tokens": peer.tokens,
            "peer_tokens_per_second": peer.tokens / peer.seconds,
            "peer_peak_memory_gb": peer.memory_gb,
            "peer_warmup_seconds": first.seconds,
            "ratio": ratio(timed, rest),
        }
    return GenerateRow(**line)


@contextmanager
def measured() -> Iterator[Run]:
    """Measure the context's time and memory; the yielded run has them once the context ends."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    run, start = Run(), perf_counter()
    yield run
    run.seconds, run.memory_gb = perf_counter() - start, mx.get_peak_memory() / 1e9


def middle(runs: list[Run]) -> Run:
    """Return the run of median duration; of an even number, the slower of the two."""
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def ratio(ours: list[Run], peers: list[Run]) -> float:
    """Return our tokens per second over the peer's, the median of the pairs."""
    pairs = zip(ours, peers, strict=True)
    return median((a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in pairs)


def _ours(loaded: LoadedModel, prompts: list[tuple[int, ...]], rows: int, max_tokens: int) -> tuple[int, Any]:
    usage, asked = Usage(), [Request(prompts[index]) for index in distributed.share(len(prompts))]
    for _ in generate(loaded, asked, SamplingParams(max_tokens), rows, usage=usage):
        pass
    return sum(distributed.gather([usage.completion_tokens])), usage


def _mlx_lm(model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], rows: int, max_tokens: int) -> int:
    """Run mlx_lm's ``batch_generate`` with its own settings, except the number of rows."""
    asked = [list(ids) for ids in prompts]
    response = batch_generate(model, tokenizer, asked, max_tokens=max_tokens, completion_batch_size=rows)
    return response.stats.generation_tokens


def bench_prompts(loaded: LoadedModel, file: Path | None, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Return the token ids of ``count`` prompts: GSM8K-like questions of a file, else generated Countdown problems."""
    task = get_task("gsm8k" if file else SOURCE)
    problems = task.load("test", str(file) if file else None, count, seed)
    return [loaded.render(task.prompts[task.default_prompt], problem).ids for problem in problems]
