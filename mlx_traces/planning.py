"""A training's memory before it begins, from its configuration: each part, and what would still fit."""

import math
import re
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_traces.config import GRPOConfig, PPOConfig, RLConfig, SFTConfig, read_config
from mlx_traces.errors import UserError, unknown
from mlx_traces.train import memory
from mlx_traces.train.memory import Estimate, Most

if TYPE_CHECKING:
    from mlx_traces.models.loading import LoadedModel

KINDS = {"sft": SFTConfig, "grpo": GRPOConfig, "ppo": PPOConfig}
PROBED = 256  # problems whose longest prompt stands for all
READ = 2_000  # traces likewise
NO_CONTEXT = 1 << 17  # tokens, of a model that states no limit
PARTS = {
    "weights": "weights and adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "merged": "merged weights",
    "cache": "key-value cache",
    "reading": "reading prompts",
    "draw": "drawing tokens",
    "activations": "activations",
    "logits": "logits chunk",
}


@dataclass(frozen=True)
class Planned:
    """The estimate, what it was made from in words, what does not fit (None: all does), and the largest settings."""

    estimate: Estimate
    told: str
    memory_gb: float
    fault: str | None
    most: dict[str, Most]

    def lines(self) -> list[str]:
        """Say it all in a table of text; parts that take nothing are left out."""
        found, values = self.estimate, asdict(self.estimate)
        parts = [f"  {label:<20} {values[name]:8.3f} GB" for name, label in PARTS.items() if values[name]]
        sampling = f"sampling {found.sampling:.3f} GB, " if found.rows else ""
        peak = f"  most: {sampling}update {found.update:.3f} GB; the device has {self.memory_gb:g} GB"
        rows = f"{found.rows} rows, " if found.rows else ""
        plural = "" if found.micro_rows == 1 else "s"
        alone = f"  taken: {rows}micro-batches of {found.micro_rows} sequence{plural}"
        return [self.told, *parts, peak, alone, f"  {self.fault or 'it fits'}", *map(self._largest, self.most)]

    def _largest(self, name: str) -> str:
        most = self.most[name]
        if most.value is None:
            return f"  largest {name}: none fits"
        why = {"rows": "all of a step", "micro_tokens": "all of a step at once"}.get(name, "the model's context")
        return f"  largest {name}: {most.value:,}{f' ({why})' if most.value == most.top else ''}"


def kind_of(path: Path) -> str:
    """Return the recipe of a configuration: the command in its first line of comment.

    Raises:
        UserError: if the file cannot be read, or that line names no training.
    """
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    match = re.match(r"#\s*mlx-traces (\S+)", first)
    if match is None or match[1] not in KINDS:
        found = f"names {match[1]!r}" if match else "names no command"
        raise UserError(f"{path}: its first line {found}; plan knows sft, grpo and ppo: pass --kind")
    return match[1]


def plan(path: str | Path, kind: str | None = None) -> Planned:
    """Foresee a training's memory; ``mlx-traces plan`` from Python. Nothing is trained, downloaded or written.

    Args:
        path: the YAML file of ``sft``, ``grpo`` or ``ppo``.
        kind: which of them; default: as its first line says.

    Raises:
        UserError: if the configuration is wrong, or its model or problems are not here.
    """
    path = Path(path)
    kind = kind or kind_of(path)
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    config = read_config(KINDS[kind], path, {})
    from mlx_traces.models import adapters, loading, names

    config = names.with_adapter(config)
    _refuse_absent(config.model)
    loaded = loading.load(config.model, config.adapter, **config.load_arguments())
    adapters.start(loaded.model, config, config.adapter)
    if isinstance(config, RLConfig):
        prompt, of = _longest_prompt(loaded, config)
        sizes = memory.sizes_of_reinforcement(loaded, config, prompt)
        length = f"prompts of {prompt} tokens ({of}) and completions of {config.max_tokens}"
    else:
        longest, of = _longest_trace(loaded, config)
        sizes = memory.sizes_of_sft(config, longest)
        length = f"sequences of {longest} tokens ({of})"
    shape, limit = memory.shape_of(loaded), loaded.backend.memory_gb
    estimate = memory.estimate(shape, **sizes)
    most = memory.largest(shape, sizes, limit, loaded.context or NO_CONTEXT)
    told = f"{kind} of {config.model} on {loaded.backend.description}: {length}"
    return Planned(estimate, told, limit, memory.fits(estimate, loaded.backend), most)


def _refuse_absent(model: str) -> None:
    """Raise UserError for a hub model that was not downloaded: a plan downloads nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from mlx_traces.models.names import NANO, is_folder

    name, _, revision = model.partition("@")
    if model == NANO or is_folder(model) or model.count("/") != 1:
        return
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except HFValidationError:
        return  # loading it says what is wrong
    if not isinstance(found, str):
        raise UserError(
            f"{model} is not on this machine; eval --model {model} --limit 1 downloads it, or name a folder"
        )


def _longest_prompt(loaded: "LoadedModel", config: RLConfig) -> tuple[int, str]:
    from mlx_traces.rl import rollouts

    few = math.ceil(PROBED / config.prompts_per_step)
    planned, _, _ = rollouts.prepare(config.model_copy(update={"num_steps": min(config.num_steps, few)}))
    return rollouts.longest_prompt(loaded, planned), f"the longest of {len(planned.problems):,}"


def _longest_trace(loaded: "LoadedModel", config: SFTConfig) -> tuple[int, str]:
    """Return the tokens of the longest trace; ``max_length`` where the traces are not made yet."""
    from mlx_traces.traces import encoding
    from mlx_traces.traces.files import read_traces

    if not Path(config.data).exists():
        return config.max_length, f"max_length, as {config.data} is not there yet"
    rows = islice(read_traces(Path(config.data)), READ)
    encoded = encoding.encode_all(loaded, rows, config.max_length, config.over_long, config.thinking).examples
    if not encoded:
        raise UserError(f"{config.data}: no traces to train on; raise max_length ({config.max_length})")
    return max(len(example.ids) for example in encoded), f"the longest of {len(encoded):,}"
