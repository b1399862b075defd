"""Estimate the memory of a training before it begins: by part, from sizes alone.

Sampling and updates alternate, and the larger one counts. Sampling holds the rows' keys and values; an update holds
the activations and a chunk of logits of the micro-batches under way. Little stays allocated in between.

The factors below are fitted to MLX's peak memory in some fifty runs on a CPU (2 to 12 layers, 64 to 256 wide, 16 to 256
tokens, ranks 4 to 64, with and without checkpointing); for the updates they are within 20 % of it. They count numbers
of the activations' type that are alive at the peak, which is in the backward pass of the last layer: what every layer
keeps for it, and what the layer at work needs beside that. They are not measured on a GPU, where attention is fused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from mlx.utils import tree_flatten

from mlx_traces.config import GRPOConfig, PPOConfig, RLConfig, SFTConfig, SFTSettings
from mlx_traces.engine import cpu_trunk
from mlx_traces.engine.generation import DRAWN, MEMORY_SHARE, PREFILL_TOKENS, buffers_of_a_draw, rows_that_fit
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.models import adapters
from mlx_traces.runtime.device import Backend

if TYPE_CHECKING:
    from mlx_traces.models.loading import LoadedModel


C = TypeVar("C", SFTConfig, GRPOConfig, PPOConfig)

# Per token: (hidden, feed-forward, attention scores); a score is one head's for one earlier token.
KEPT = (7.0, 5.0, 1.2)  # by each layer
WORKING = (16.0, 4.5, 1.6)  # by the layer at work, beside what it keeps
KEPT_TRUNK = (7.4, 3.9, 1.0)  # where `cpu_trunk` computes the layers
WORKING_TRUNK = (13.0, 2.8, 2.1)
KEPT_CHECKPOINTED = (2.0, 0.0, 0.0)
WORKING_CHECKPOINTED = (16.0, 16.0, 1.9)  # it keeps nothing before, and computes all again
READING = (4.0, 2.0, 1.0)  # prompts: no backward pass, one layer at a time
LOGITS = 2.5  # float32 buffers of a chunk: logits, their softmax, its gradient
LOGITS_NARROW = 1.25  # in addition, if the model's own logits and their gradient have 16 bits
AT_ONCE = 2  # micro-batches under way on a GPU (`forward.Queue`)
ADAM = 2.0  # averages per trained parameter
GRADIENTS = 2.0  # those of a micro-batch, and the sum


@dataclass(frozen=True)
class Shape:
    """A model's sizes: counts, bytes of an activation (``itemsize``), and the bytes of three sets of weights.

    ``weights`` are all weights, adapter included, ``trained`` those that are trained, ``merged`` the copies that exist
    while the model samples (`adapters.merged`). ``reading`` is how many prompt tokens are read at once, ``at_once`` how
    many micro-batches are under way.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    itemsize: int
    weights: int
    trained: int
    merged: int
    reading: int
    at_once: int = 1


@dataclass(frozen=True)
class Estimate:
    """Memory by part, in 1e9 bytes, and the settings that it depends on."""

    weights: float
    optimizer: float
    gradients: float
    merged: float
    cache: float
    reading: float
    draw: float
    activations: float
    logits: float
    rows: int
    micro_tokens: int
    micro_rows: int
    checkpoint_layers: bool

    @property
    def sampling(self) -> float:
        """Peak while rollouts are sampled; prompts are not read while tokens are drawn."""
        return self.weights + self.optimizer + self.merged + self.cache + max(self.reading, self.draw)

    @property
    def update(self) -> float:
        """Peak during an update."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.logits

    @property
    def peak(self) -> float:
        """Peak of the training."""
        return max(self.sampling, self.update)


def shape_of(loaded: "LoadedModel") -> Shape:
    """Return the sizes of a model that is ready to train: its adapter is on it, the rest is frozen."""
    heads, hidden = loaded.size("num_attention_heads") or 1, loaded.size("hidden_size")
    return Shape(
        layers=len(loaded.model.layers),
        hidden=hidden,
        intermediate=loaded.size("intermediate_size") or 4 * hidden,
        heads=heads,
        kv_heads=loaded.size("num_key_value_heads") or heads,
        head_size=loaded.size("head_dim") or hidden // heads,
        vocabulary=loaded.size("vocab_size"),
        itemsize=adapters.activation_bytes(loaded.model),
        weights=sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters())),
        trained=sum(array.nbytes for _, array in tree_flatten(loaded.model.trainable_parameters())),
        merged=adapters.copied_bytes(loaded.model, loaded.backend),
        reading=PREFILL_TOKENS[loaded.backend.name],
        at_once=1 if loaded.backend.name == "cpu" else AT_ONCE,
    )


def estimate(
    shape: Shape,
    *,
    length: int,
    learned: int,
    micro_tokens: int,
    sequences: int,
    logits_mb: float,
    checkpoint_layers: bool = False,
    own_trunk: bool = False,
    rows: int = 0,
    completions: int = 0,
    prompt: int = 0,
    drawn: float = DRAWN,
) -> Estimate:
    """Return the memory that training takes when every sequence is as long as the longest.

    Args:
        shape: the model's sizes.
        length: tokens of the longest sequence, prompt included.
        learned: how many of them have a loss.
        micro_tokens: most tokens of a forward pass, padding included.
        sequences: number of sequences in an optimizer step.
        logits_mb: most MiB of one vocabulary-wide float32 buffer.
        checkpoint_layers: whether activations are computed twice.
        own_trunk: whether `cpu_trunk` computes the layers, as in reinforcement; fine-tuning calls the modules.
        rows: completions decoded at once; 0 if nothing is sampled.
        completions: how many are sampled in all, ``rows`` at a time.
        prompt: tokens of the longest prompt.
        drawn: vocabulary-wide float32 buffers of a row, from `buffers_of_a_draw`.
    """
    gb = 1e9
    micro_rows = max(1, min(micro_tokens // max(length, 1), sequences))
    tokens = micro_rows * length
    sizes = (shape.hidden, shape.intermediate, shape.heads * length)
    kept, working = (KEPT_TRUNK, WORKING_TRUNK) if own_trunk else (KEPT, WORKING)
    if checkpoint_layers:
        kept, working = KEPT_CHECKPOINTED, WORKING_CHECKPOINTED
    at_once = min(shape.at_once, math.ceil(sequences / micro_rows))
    numbers = at_once * tokens * (shape.layers * _dot(kept, sizes) + _dot(working, sizes))
    chunk = min(micro_rows * learned, max(1, int(logits_mb * 2**20 // (4 * max(shape.vocabulary, 1)))))
    cache = reading = 0.0
    rows = min(rows, completions)
    if rows:
        from mlx_traces.engine.kv_cache import STEP

        token = 2 * shape.kv_heads * shape.head_size * shape.itemsize  # a layer's key and value
        buffer = rows * token * -(-length // STEP) * STEP
        read = min(shape.reading, completions * prompt)
        read *= shape.itemsize * _dot(READING, (shape.hidden, shape.intermediate, shape.heads * prompt))
        # Beside the buffers: a batch of prompts while it is read, then its keys and values; or copies of the buffers of
        # one layer while they grow or move, of two where rows come and go.
        beside = (1 if completions <= rows else 2) * buffer
        cache, reading = shape.layers * buffer, max(read, rows * prompt * token * shape.layers, beside)
    return Estimate(
        weights=shape.weights / gb,
        optimizer=ADAM * shape.trained / gb,
        gradients=GRADIENTS * shape.trained / gb,
        merged=shape.merged / gb if rows else 0.0,
        cache=cache / gb,
        reading=reading / gb,
        draw=drawn * 4 * rows * shape.vocabulary / gb,
        activations=numbers * shape.itemsize / gb,
        logits=at_once * (LOGITS + LOGITS_NARROW * (shape.itemsize < 4)) * 4 * chunk * shape.vocabulary / gb,
        rows=rows,
        micro_tokens=micro_tokens,
        micro_rows=micro_rows,
        checkpoint_layers=checkpoint_layers,
    )


def _dot(factors: tuple[float, ...], sizes: tuple[int, ...]) -> float:
    return sum(factor * size for factor, size in zip(factors, sizes, strict=True))


def of_reinforcement(loaded: "LoadedModel", config: RLConfig, prompt: int) -> Estimate:
    """Return the memory of a reinforcement step, for prompts of at most ``prompt`` tokens.

    Its rows are those that the engine decodes at once: fewer than the setting ``rows`` where that many do not fit.
    """
    return estimate(shape_of(loaded), **sizes_of_reinforcement(loaded, config, prompt))


def sizes_of_reinforcement(loaded: "LoadedModel", config: RLConfig, prompt: int) -> dict[str, Any]:
    """Return the arguments of `estimate` for `of_reinforcement`."""
    fit = _rows_that_fit(loaded, prompt, config.longest, config.memory_limit)
    completions = config.prompts_per_step * config.group_size
    return {
        "length": prompt + config.longest,
        "learned": config.longest,
        "micro_tokens": config.micro_tokens,
        "sequences": completions,
        "logits_mb": config.logits_mb,
        "checkpoint_layers": config.checkpoint_layers,
        "own_trunk": cpu_trunk.serves(loaded.model),
        "rows": min(config.rows, fit),
        "completions": completions,
        "prompt": prompt,
        "drawn": buffers_of_a_draw(config),
    }


def _rows_that_fit(loaded: "LoadedModel", prompt: int, max_tokens: int, memory_limit: float | None) -> int:
    return rows_that_fit(loaded, [Request((0,) * prompt)], [SamplingParams(max_tokens)], memory_limit)


def of_sampling(
    loaded: "LoadedModel",
    prompt: int,
    max_tokens: int,
    rows: int,
    completions: int,
    memory_limit: float | None = None,
    drawn: float = DRAWN,
) -> float:
    """Return the memory, in 1e9 bytes, of sampling without training; otherwise as `of_reinforcement`."""
    return estimate(
        replace(shape_of(loaded), trained=0),
        length=prompt + max_tokens,
        learned=0,
        micro_tokens=0,
        sequences=1,
        logits_mb=1,
        rows=min(rows, _rows_that_fit(loaded, prompt, max_tokens, memory_limit)),
        completions=completions,
        prompt=prompt,
        drawn=drawn,
    ).sampling


def of_sft(loaded: "LoadedModel", config: SFTSettings, length: int) -> Estimate:
    """Return the memory of a fine-tuning step on sequences of at most ``length`` tokens, all of them learned."""
    return estimate(shape_of(loaded), **sizes_of_sft(config, length))


def sizes_of_sft(config: SFTSettings, length: int) -> dict[str, Any]:
    """Return the arguments of `estimate` for `of_sft`."""
    return {
        "length": length,
        "learned": length,
        "micro_tokens": config.micro_tokens,
        "sequences": config.batch_size,
        "logits_mb": config.logits_mb,
        "checkpoint_layers": config.checkpoint_layers,
    }


@dataclass(frozen=True)
class Most:
    """The largest value of a setting that fits, None if 1 does not; values above ``top`` change nothing."""

    value: int | None
    top: int


def largest(shape: Shape, sizes: dict[str, Any], limit: float, context: int) -> dict[str, Most]:
    """Return the largest rows, micro_tokens and max_tokens (or max_length) that fit, each with the others as they are.

    Args:
        shape: the model's sizes.
        sizes: the other arguments of `estimate`.
        limit: the memory, in 1e9 bytes.
        context: the model's context length, in tokens.
    """
    prompt, rows = sizes.get("prompt", 0), sizes.get("rows", 0)

    def fit(**changes: int) -> bool:
        return estimate(shape, **{**sizes, **changes}).peak <= limit

    def long(tokens: int) -> bool:
        return fit(length=prompt + tokens, learned=tokens)

    found = {}
    if rows:
        top = sizes["completions"]  # all at once, so that no rows come and go: needs less than slightly fewer rows
        value = top if fit(rows=top) else _bisect(lambda count: fit(rows=count), 1, top - 1)
        found["rows"] = Most(value, top)
    top = sizes["length"] * sizes["sequences"]
    found["micro_tokens"] = Most(_bisect(lambda count: fit(micro_tokens=count), 1, top), top)
    # Longer sequences need more memory, until one fewer fits into a micro-batch: there they need less.
    top, value = context - prompt, None
    for micro_rows in range(1, max(1, sizes["sequences"]) + 1):
        low = sizes["micro_tokens"] // (micro_rows + 1) + 1 - prompt if micro_rows < sizes["sequences"] else 1
        high = sizes["micro_tokens"] // micro_rows - prompt if micro_rows > 1 else top
        if (value := _bisect(long, max(1, low), min(high, top))) is not None:
            break
    found["max_tokens" if rows else "max_length"] = Most(value, top)
    return found


def _bisect(fit: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest number from ``low`` to ``high`` that fits, None if ``low`` does not; ``fit`` is monotonic."""
    if low > high or not fit(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle) else (low, middle - 1)
    return low


def fitted(config: C, backend: Backend, estimate_of: Callable[[C], Estimate]) -> C:
    """Return a training's settings with the device's ``micro_tokens`` halved until the update fits in memory.

    A value that the user set is kept; the result is not below the default, which is that of a CPU.
    """
    default = type(config).model_fields["micro_tokens"].default
    while (
        "micro_tokens" not in config.model_fields_set
        and config.micro_tokens > default
        and estimate_of(config).update > MEMORY_SHARE * backend.memory_gb
    ):
        config = config.sized({**backend.sizes, "micro_tokens": config.micro_tokens // 2})
    return config


def fits(found: Estimate, backend: Backend) -> str | None:
    """Return None if a training fits in the device's memory, else a line that names the setting to lower."""
    if found.peak <= backend.memory_gb:
        return None
    fixed = found.weights + found.optimizer
    if fixed > backend.memory_gb:
        advice = "weights and optimizer alone exceed it; choose a smaller model, --weights quantized, or a lower rank"
    elif found.sampling > found.update:
        advice = f"lower rows ({found.rows})"
    elif found.logits > found.activations:
        advice = "lower logits_mb"
    elif found.micro_rows > 1:
        advice = f"lower micro_tokens ({found.micro_tokens})"
        advice += "" if found.checkpoint_layers else " or set checkpoint_layers"
    else:  # a micro-batch is one sequence already
        advice = "shorten the sequences" if found.checkpoint_layers else "set checkpoint_layers"
    return f"training would take about {found.peak:.1f} GB and the device has {backend.memory_gb:g}: {advice}"
