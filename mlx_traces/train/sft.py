"""Supervised fine-tuning on traces: LoRA, DoRA or full, on the completion's tokens, resumable at any moment.

How this differs from mlx_lm's trainer: the loss counts what the model has to write (completion, the template's tokens
around it, stop token) and no padding. It is normalised over the whole optimizer step, so micro-batches change nothing.
Every trace is seen once an epoch. Validation uses the same traces and problems each time. Logits are computed for the
learned positions only.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_traces.config import SFTConfig
from mlx_traces.engine import batching, forward, generation
from mlx_traces.engine.batching import Example
from mlx_traces.engine.logprobs import Split, head_logprobs, split
from mlx_traces.engine.sampling import Request, SamplingParams, decode
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.models import adapters, loading, names
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Trace, problem_id
from mlx_traces.runtime import distributed
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.traces import encoding, filtering
from mlx_traces.traces.files import read_traces
from mlx_traces.train import gradients, loop, memory, tracking
from mlx_traces.train.gradients import checkpointed
from mlx_traces.train.loop import Progress
from mlx_traces.train.optimizer import make_optimizer


def step_gradient(model: nn.Module, halves: Split, batch: Sequence[Example], config: SFTConfig) -> tuple[float, Any]:
    """Return the mean cross-entropy of a step's learned tokens, in nats, and its gradient.

    The sums of micro-batches and ranks are divided by the tokens of the whole step, so the split changes only rounding.
    """
    total = sum(example.count for example in batch)

    def loss_of(states: mx.array, targets: mx.array, _: list[int]) -> tuple[mx.array, dict[str, mx.array]]:
        logprobs, _ = head_logprobs(halves, states, targets, logits_mb=config.logits_mb, entropies=False)
        return -logprobs.sum() / total, {}

    return gradients.accumulate(model, halves, batch, config.micro_tokens, loss_of)[:2]


def mean_loss(halves: Split, rows: Sequence[Example], config: SFTConfig) -> float:
    """Return the mean cross-entropy of all learned tokens, in nats; each rank reads its part of the rows."""
    own = [rows[index] for index in distributed.share(len(rows))]

    def read(states: mx.array, targets: mx.array) -> mx.array:
        logprobs, _ = head_logprobs(halves, states, targets, logits_mb=config.logits_mb, slopes=False, entropies=False)
        return logprobs.sum()

    total = -sum(part.item() for _, part in forward.each(halves, own, config.micro_tokens, read))
    return sum(distributed.gather([total])) / sum(example.count for example in rows)


@dataclass(frozen=True)
class Data:
    """Training rows, validation rows, held-out problems, and notes on what was left out.

    ``by_content`` says whether a problem in one of the first two may have several ids.
    """

    train: list[Example]
    valid: list[Example]
    held_out: evaluator.Plan | None
    notes: list[str]
    by_content: bool = False


def prepare(loaded: LoadedModel, config: SFTConfig) -> Data:
    """Read and encode the traces; split them into training and validation, by problem.

    Traces of the held-out problems (``evaluate``) are left out of the training, with a note. The prompts of these
    problems use the thinking switch of the settings, or that of the traces if all were made with the same one.
    """
    how = config.max_length, config.over_long, config.thinking
    plan = loop.held_out_plan(config.model, config)
    same = filtering.same_problem(plan.problems, plan.prompt) if plan else lambda _: False
    left_out, switches, asked = 0, set(), []

    def learned() -> Iterator[tuple[str, Trace]]:
        nonlocal left_out
        for where, trace in read_traces(Path(config.data)):
            if same(trace):
                left_out += 1
            else:
                switches.add(trace.thinking)
                asked.append(replace(trace, completion="", completion_ids=None, logprobs=None))
                yield where, trace

    encoded = encoding.encode_all(loaded, learned(), *how)
    notes = evaluator.split_notes(config.evaluate) if config.evaluate else []
    notes += encoding.describe(encoded, config.max_length)
    rows = encoded.examples
    if plan and plan.config.thinking is None and len(switches) == 1:
        plan = replace(plan, config=plan.config.model_copy(update={"thinking": switches.pop()}))
    if left_out:
        notes.append(f"{left_out} traces of validation problems are left out")
    if config.valid is not None:
        read = list(read_traces(Path(config.valid)))
        kept = encoding.encode_all(loaded, read, *how)
        notes += [f"{config.valid}: {line}" for line in encoding.describe(kept, config.max_length)]
        if not kept.examples:
            raise UserError(f"{config.valid}: no traces to validate with{_brackets(notes)}")
        name_of = filtering.problems_of([*asked, *(trace for _, trace in read)])
        ids, valid = {name_of(example.id) for example in kept.examples}, kept.examples
        train = [row for row in rows if name_of(row.id) not in ids]
        if len(train) < len(rows):
            notes.append(f"{len(rows) - len(train)} traces of problems in {config.valid} are left out")
    else:
        name_of = filtering.problems_of(asked)
        apart = [_draw(f"{config.seed} {name_of(row.id)}") < config.valid_share for row in rows]
        train, valid = ([row for row, held in zip(rows, apart, strict=True) if held is kind] for kind in (False, True))
    if train and not valid and config.valid_share:
        problems = len({name_of(row.id) for row in rows})
        notes.append(
            f"no validation loss: valid_share {config.valid_share:g} keeps none of {problems:,} problems apart"
        )
    if not train:
        raise UserError(f"{config.data}: no traces to train on{_brackets(notes)}")
    if plan is None and (full := sum(_room(loaded, row) < 1 for row in valid)):
        notes.append(
            f"{full} validation traces have no room for an answer; their loss counts, but they are not completed"
        )
    split_up = config.valid is not None or config.valid_share > 0
    by_content = split_up and any(name_of(row.id) != problem_id(row.id) for row in (*rows, *valid))
    return Data(train, valid, plan, notes, by_content)


def _brackets(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _draw(text: str) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


@dataclass(frozen=True)
class SFTResult:
    """A finished training: its adapter's folder, steps, the best validation and its step.

    ``stopped`` is ``patience`` if that ended the training early.
    """

    adapter: str
    steps: int
    best_step: int | None
    valid_loss: float | None
    accuracy: float | None
    seconds: float
    tokens_per_second: float
    peak_memory_gb: float
    padding: float
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None


def train(config: SFTConfig, out: str | Path, resume: bool = False, show: Callable | None = None) -> SFTResult:
    """Fine-tune a model on traces; ``mlx-traces sft`` from Python. Arguments and errors: see `train.loop`."""
    with (
        distributed.at_work(Path(out), resume) as (folder, stop),
        tracking.reported(config, folder, show) as show,
    ):
        config = loading.of_its_day(names.with_adapter(config), folder.identity)
        loaded = loading.load(config.model, config.adapter, **config.load_arguments())
        config = config.sized(distributed.sizes(loaded.backend))
        data = prepare(loaded, config)
        lengths = [len(example.ids) for example in data.train]
        per_epoch = math.ceil(len(data.train) / config.batch_size)
        last = config.epochs * per_epoch
        config, adapter = _begin(config, folder, loaded, data, last)
        model, halves, optimizer = loaded.model, split(loaded.model), make_optimizer(config, last)
        run = loop.Training(
            folder,
            loaded,
            config,
            module=model,
            optimizer=optimizer,
            room=halves.room,
            adapter=adapter,
            about=about(config),
            last=last,
            every=config.eval_every or per_epoch,
            validate=lambda: validation(loaded, halves, data, config),
            progress=Progress(),
            stop=stop,
            show=show,
        )
        batches = islice(_batches(lengths, config), run.progress.step, None)
        with checkpointed(model.layers, config.checkpoint_layers):
            for step in run.steps():
                batch, began = [data.train[index] for index in next(batches)], perf_counter()
                mx.random.seed(loop.step_seed(config.seed, step))  # dropout
                model.train()
                loss, grads = step_gradient(model, halves, batch, config)
                norm, update = optimizer.propose(model, grads)
                ids = ", ".join(sorted({example.id for example in batch}))
                loop.refuse_nonfinite(loss, norm, step, config, f"look at the step's traces: {ids}")
                update()
                tokens = sum(len(example.ids) for example in batch)
                metrics = {
                    "loss": loss,
                    "optim/lr": optimizer.learning_rate.item(),
                    "optim/grad_norm": norm,
                    "tokens": tokens,
                    "tokens_per_second": tokens / (perf_counter() - began),
                }
                run.end_step(step, metrics)
        result = _result(run, data, lengths)
        folder.conclude(asdict(result))
        return result


def _begin(
    config: SFTConfig, folder: RunFolder, loaded: LoadedModel, data: Data, last: int
) -> tuple[SFTConfig, dict[str, Any]]:
    """Check that the run is the one in the folder, put the adapter on, and begin the folder.

    Returns:
        The settings, with the device's micro-batches lowered until they fit, and the result of `adapters.start`.
    """
    identity = identity_of(config, loaded, data) | {"held_out": data.held_out and data.held_out.shown()}
    folder.check(identity)
    mx.random.seed(config.seed)
    adapter = adapters.start(loaded.model, config, config.adapter)
    if adapter["fine_tune_type"] == "full" and "quantization" in loaded.config:
        data.notes.append("the base is quantized: mlx_lm reads an adapter of kind full only after `mlx-traces fuse`")
    longest = max(len(example.ids) for example in data.train)
    config = memory.fitted(config, loaded.backend, lambda config: memory.of_sft(loaded, config, longest))
    data.notes.extend(filter(None, [memory.fits(memory.of_sft(loaded, config, longest), loaded.backend)]))
    folder.begin(
        identity,
        config.model_dump(mode="json"),
        loaded.fingerprints,
        {
            "traces": [example.id for example in data.train],
            "valid": [example.id for example in data.valid],
            "held_out": [problem.id for problem in data.held_out.problems] if data.held_out else [],
        },
        backend=asdict(loaded.backend),
        steps=last,
        ranks=distributed.world().size(),
        notes=[*loaded.notes, *data.notes],
    )
    return config, adapter


def _batches(lengths: list[int], config: SFTConfig) -> Iterator[list[int]]:
    """Yield the indices of the examples of every step of the whole training; their order depends on the seed alone."""
    for epoch in range(config.epochs):
        yield from batching.epoch_batches(lengths, config.batch_size, config.seed, epoch)


def _padding(lengths: list[int], config: SFTConfig, steps: int, backend: str) -> float:
    """Return the share of padding in the micro-batches of the training's first ``steps``."""
    micro = [
        batch
        for indices in islice(_batches(lengths, config), steps)
        for batch in batching.micro_batches(indices, lengths, config.micro_tokens, backend)
    ]
    return batching.padding_share(micro, lengths, backend)


def validation(
    loaded: LoadedModel, halves: Split, data: Data, config: SFTConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return validation loss and accuracy as metrics, if there is data for them, and some completions to look at."""
    loaded.model.eval()
    row: dict[str, Any] = {}
    shown: list[dict[str, Any]] = []
    if data.valid:
        row["valid/loss"] = mean_loss(halves, data.valid, config)
    if data.held_out:
        answers, shown = loop.answer(loaded, data.held_out)
        row |= answers
    elif data.valid:
        with_room = (row for row in data.valid if _room(loaded, row) > 0)
        shown = continued(loaded, list(islice(with_room, loop.SHOWN)))
    return row, shown


def _start(row: Example) -> int:
    """Return the index at which a trace's last learned span begins; 0 for a text, which has no prompt."""
    return max((at + 1 for at, learned in enumerate(row.trained) if not learned), default=0)


def _room(loaded: LoadedModel, row: Example) -> int:
    """Return the token limit for completing a trace's prompt: twice the trace's own length, within the context."""
    start = _start(row)
    return min(2 * (len(row.ids) - start), (loaded.context or 10**6) - start)


def continued(loaded: LoadedModel, rows: Sequence[Example]) -> list[dict[str, Any]]:
    """Complete the prompts of some validation traces greedily, at up to twice the trace's length, to look at."""
    asked = [(row, start) for row in rows if (start := _start(row))]
    params = [SamplingParams(max_tokens=_room(loaded, row)) for row, _ in asked]
    shown: list[dict[str, Any]] = [{}] * len(asked)
    with adapters.merged(loaded.model, loaded.backend):
        requests = [Request(row.ids[:start]) for row, start in asked]
        for index, rollout in generation.generate(loaded, requests, params, rows=loop.SHOWN):
            row, start = asked[index]
            shown[index] = {
                "id": row.id,
                "completion": rollout.text,
                "finish_reason": rollout.finish_reason,
                "trace": decode(loaded.tokenizer, list(row.ids[start:])),
            }
    return shown


def identity_of(config: SFTConfig, loaded: LoadedModel, data: Data) -> dict[str, Any]:
    """Return everything that decides what is learned; files by their content."""
    digests = {
        name: loop.digest(file)
        for name, file in (("data_files", config.data), ("valid_files", config.valid))
        if file is not None
    }
    # In earlier versions a problem that a file has twice, or under two ids, could be in both training and validation.
    apart = {"apart": "by problem"} if any("#" in row.id for row in (*data.train, *data.valid)) else {}
    apart |= {"apart": "by content"} if data.by_content else {}
    identity = loop.identity_of(config, loaded, {**apart, **digests})
    if data.held_out and data.held_out.config.thinking is not None:  # perhaps that of the traces
        identity["evaluate"]["thinking"] = data.held_out.config.thinking
    return identity


def about(config: SFTConfig) -> dict[str, Any]:
    """Return what an adapter's settings file says beyond mlx_lm's own entries."""
    own = config.model_dump(mode="json", exclude_unset=True, exclude={"report_to"})
    return {"model": config.model, "trained_by": "mlx-traces sft", "training": own}


def _result(run: loop.Training, data: Data, lengths: list[int]) -> SFTResult:
    metrics, progress = run.end(), run.progress
    rows = [row for row in metrics if "tokens" in row]
    at_best = next((row for row in metrics if row["step"] == progress.best_step), {})
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
    return SFTResult(
        adapter=str(run.folder.path / "adapter"),
        steps=progress.step,
        best_step=progress.best_step,
        valid_loss=at_best.get("valid/loss"),
        accuracy=at_best.get("valid/accuracy"),
        seconds=progress.seconds,
        tokens_per_second=sum(row["tokens"] for row in rows) / seconds if seconds else 0.0,
        peak_memory_gb=max((row["memory/peak_gb"] for row in rows), default=0.0),
        padding=_padding(lengths, run.config, progress.step, run.loaded.backend.name),
        notes=[*run.loaded.notes, *run.room.notes, *data.notes, *run.unmoved()],
        stopped=run.stopped,
    )
