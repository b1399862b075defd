"""How fast optimizer steps are here, compared with mlx_lm's own trainer on the same sequences.

Every figure is of whole epochs. Ours and the peer's alternate within one call of the peer's ``train`` (its batches are
drawn through a function that times them), so that both are warm and nothing is compiled twice. The first epoch of each
is the warm-up. Only tokens that both read are counted: sequences that do not fill a batch are left out, as mlx_lm does,
and padding does not count.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx.optimizers import Adam
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

from mlx_traces.config import SFTConfig
from mlx_traces.diagnostics.bench_generate import PEERS, Run, measured, middle, ratio
from mlx_traces.engine import batching, logprobs
from mlx_traces.engine.batching import Example
from mlx_traces.errors import UserError, unknown
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.runtime import distributed
from mlx_traces.traces import encoding
from mlx_traces.traces.files import read_traces
from mlx_traces.traces.solutions import countdown_traces, gsm8k_traces
from mlx_traces.train import sft
from mlx_traces.train.optimizer import make_optimizer


@dataclass(frozen=True)
class SFTRow:
    """The result of ``bench sft``.

    ``tokens`` are the real tokens of an epoch, prompts included, ``learned`` those with a loss; ``tokens_per_second``
    is real tokens over the seconds of an epoch's optimizer steps, and ``ratio`` is ours over the peer's. Memory is
    MLX's peak in 1e9 bytes, model included, without what only the other tool holds. ``padding`` is the share of
    padding in the batches. With several ranks the memory is the first one's, and all else is of all ranks.
    """

    examples: int
    batch_size: int
    steps: int
    tokens: int
    learned: int
    seconds: float
    tokens_per_second: float
    seconds_per_step: float
    peak_memory_gb: float
    padding: float
    warmup_seconds: float
    ranks: int = 1
    peer: str | None = None
    peer_weights: str | None = None
    peer_tokens_per_second: float | None = None
    peer_seconds_per_step: float | None = None
    peer_peak_memory_gb: float | None = None
    peer_padding: float | None = None
    peer_warmup_seconds: float | None = None
    ratio: float | None = None


def bench_sft(
    loaded: LoadedModel,
    rows: Sequence[Example],
    config: SFTConfig,
    against: str | None = None,
    as_shipped: bool = False,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> SFTRow:
    """Time epochs of optimizer steps on a new adapter; the model itself stays as it is.

    Args:
        loaded: the model.
        rows: the sequences; those beyond a multiple of the batch size are left out.
        config: adapter, batch size, learning rate and limits; the data and the model are not read from it.
        against: ``"mlx-lm"`` for the trainer of ``mlx_lm.lora --mask-prompt``, with our weights.
        as_shipped: let the peer load the weights as its user gets them, instead.
        repeats: timed epochs of each, in turn.
        progress: is called with a line before each epoch.

    Raises:
        UserError: for an unknown peer, fewer sequences than a batch, or settings of the adapter that do not fit.
    """
    if against not in (None, *PEERS):
        raise unknown("peer", str(against), PEERS)
    if against and distributed.world().size() > 1:
        raise UserError(f"--against {against} runs in one process; leave out mlx.launch, or the peer")
    rows = rows[: len(rows) // config.batch_size * config.batch_size]
    if not rows:
        raise UserError(f"batch_size: {config.batch_size} traces make a batch, there are fewer; give more, or lower it")
    total, ours, peers = sum(len(row.ids) for row in rows), [], []
    model = twin(loaded.model)
    epochs = our_epochs(model, rows, config)

    def turns() -> Iterator[str]:
        for turn in range(repeats + 1):
            name = "warm-up" if turn == 0 else f"epoch {turn} of {repeats}"
            progress(f"{name}, mlx-traces")
            with measured() as run:
                next(epochs)
                run.tokens = total
            ours.append(run)
            yield name

    if not against:
        for _ in turns():
            pass
        return _line(rows, config, ours)

    peer = mlx_lm.load(str(loaded.path))[0] if as_shipped else twin(loaded.model)

    def batches(dataset: Any, batch_size: int, max_seq_length: int, **_: Any) -> Iterator[Any]:
        """Yield mlx_lm's batches of all epochs, each timed until its last step is done, after one of ours."""
        for name in turns():
            progress(f"{name}, {against}")
            with measured() as run:
                yield from iterate_batches(dataset, batch_size, max_seq_length)
                run.tokens = total
            peers.append(run)

    apart = _train_peer(peer, rows, config, batches, repeats + 1, model)
    for runs, other in ((ours, apart[1]), (peers, apart[0])):
        for run in runs:
            run.memory_gb -= other / 1e9
    line = _line(rows, config, ours)
    first, *rest = peers
    run = middle(rest)
    told = {
        "peer": against,
        "peer_weights": "as shipped" if as_shipped else "same",
        "peer_tokens_per_second": run.tokens / run.seconds,
        "peer_seconds_per_step": run.seconds / line.steps,
        "peer_peak_memory_gb": run.memory_gb,
        "peer_padding": 1 - total / peer_cells(rows, config),
        "peer_warmup_seconds": first.seconds,
        "ratio": ratio(ours[1:], rest),
    }
    return SFTRow(**{**vars(line), **told})


def _line(rows: Sequence[Example], config: SFTConfig, ours: list[Run]) -> SFTRow:
    """Summarize our epochs; the first is the warm-up."""
    warmup, *timed = ours
    run, steps = middle(timed), len(rows) // config.batch_size
    lengths = [len(row.ids) for row in rows]
    parts = [
        micro
        for indices in batching.epoch_batches(lengths, config.batch_size, config.seed, 0)
        for micro in batching.micro_batches(indices, lengths, config.micro_tokens)
    ]
    return SFTRow(
        examples=len(rows),
        batch_size=config.batch_size,
        steps=steps,
        tokens=run.tokens,
        learned=sum(row.count for row in rows),
        seconds=run.seconds,
        tokens_per_second=run.tokens / run.seconds,
        seconds_per_step=run.seconds / steps,
        peak_memory_gb=run.memory_gb,
        padding=batching.padding_share(parts, lengths),
        warmup_seconds=warmup.seconds,
        ranks=distributed.world().size(),
    )


def our_epochs(model: nn.Module, rows: Sequence[Example], config: SFTConfig) -> Iterator[None]:
    """Put a new adapter on the model, then train an epoch before each item, as ``mlx-traces sft`` does."""
    adapters.start(model, config)
    halves, optimizer = logprobs.split(model), make_optimizer(config, 1000)
    lengths = [len(row.ids) for row in rows]
    model.train()
    epoch = 0
    while True:
        for indices in batching.epoch_batches(lengths, config.batch_size, config.seed, epoch):
            _, grads = sft.step_gradient(model, halves, [rows[index] for index in indices], config)
            _, update = optimizer.propose(model, grads)
            update()
        epoch += 1
        yield


def _train_peer(
    model: nn.Module, rows: Sequence[Example], config: SFTConfig, batches: Callable, epochs: int, ours: nn.Module
) -> tuple[int, int]:
    """Run mlx_lm's trainer on ``batches``; return the bytes that belong to (our model, the peer's model) alone."""
    adapters.start(model, config)
    apart = held_alone([ours], [model]), held_alone([model], [ours])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArgs(
            batch_size=config.batch_size,
            # One more than there are, so that it asks for another batch, which ends the last epoch's clock.
            iters=epochs * (len(rows) // config.batch_size) + 1,
            steps_per_report=2**31,
            steps_per_save=2**31,
            max_seq_length=config.max_length,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        data = [(list(row.ids), prompt_length(row)) for row in rows]
        train(model, Adam(learning_rate=config.learning_rate), data, None, arguments, iterate_batches=batches)
    return apart


def prompt_length(row: Example) -> int:
    """Return how many tokens precede the first learned one: what ``--mask-prompt`` masks."""
    return row.trained.index(True)


def peer_cells(rows: Sequence[Example], config: SFTConfig) -> int:
    """Return how many tokens mlx_lm's batches of an epoch have, padding and each row's last token included."""
    lengths = sorted(len(row.ids) for row in rows)
    longest = lengths[config.batch_size - 1 :: config.batch_size]
    return sum(config.batch_size * min(-(-length // 32) * 32 + 1, config.max_length) for length in longest)


def twin(model: nn.Module) -> nn.Module:
    """Return a second module tree of the same arrays; an adapter on one does not change the other."""
    return copy.deepcopy(model, {id(array): array for _, array in tree_flatten(model.parameters())})


def held_alone(models: Sequence[nn.Module], others: Sequence[nn.Module]) -> int:
    """Return the bytes that only ``models`` hold, with Adam's two averages of each of their trained parameters."""
    shared = {id(array) for other in others for _, array in tree_flatten(other.parameters())}
    own = {id(array): array.nbytes for model in models for _, array in tree_flatten(model.parameters())}
    trained = sum(array.nbytes for model in models for _, array in tree_flatten(model.trainable_parameters()))
    return sum(size for key, size in own.items() if key not in shared) + 2 * trained


def bench_rows(
    loaded: LoadedModel, config: SFTConfig, data: Path | None, problems: Path | None, count: int
) -> list[Example]:
    """Encode the first ``count`` traces of a file, or of GSM8K-like problems, else of Countdown's solver.

    Raises:
        UserError: if both are given, a file cannot be read, or no trace is short enough.
    """
    if data and problems:
        raise UserError("give traces (--data) or problems (--problems), not both")
    if data:
        found = read_traces(data)
    else:
        made = gsm8k_traces("train", str(problems), count, 0) if problems else countdown_traces(2 * count, "train", 0)
        found = ((f"trace {number}", trace) for number, trace in enumerate(made, 1))
    encoded = encoding.encode_all(loaded, islice(found, count), config.max_length, "skip")
    if not encoded.examples:
        raise UserError(f"no trace of at most {config.max_length} tokens; raise --max-length or give other --data")
    return encoded.examples
