"""Load a model by name: find or download it, choose weights for the device, render its chat template."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date as Date
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, get_total_parameters, load_model, load_tokenizer

from mlx_traces.errors import UserError, first_line
from mlx_traces.models.adapter_config import read_config
from mlx_traces.models.adapters import attach
from mlx_traces.models.chat import Chat, Rendered
from mlx_traces.models.names import GET_ANEW, base_name, name_parts, resolve
from mlx_traces.records import Problem
from mlx_traces.runtime.device import Backend, choose
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.runtime.memory_budget import MemoryBudget
from mlx_traces.tasks.prompts import Prompt, as_text
from mlx_traces.tasks.thoughts import TAGS, Pair, own_pair
from mlx_traces.text import clean

# Tokens with which chat templates end a turn; a base model's configuration may name only the end of a text.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
HARMONY = "<|channel|>"  # of gpt-oss's format, whose special tokens frame its messages
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


@dataclass
class LoadedModel:
    """A model ready to generate.

    ``name`` and ``adapter`` are as given, with ``~`` expanded. ``revision`` is the hub commit, ``None`` for a
    folder. ``stop_ids`` end a completion; so do ``stop_strings``, for a model without a chat template, which
    has no other end of a turn. ``context`` is the longest sequence in tokens, ``None`` if unknown. ``notes``
    are lines the user should see, each once. The chat template gets ``template_args`` and ``day``.
    """

    model: Any
    tokenizer: Any
    name: str
    adapter: str | None
    path: Path
    revision: str | None
    config: dict[str, Any]
    backend: Backend
    stop_ids: frozenset[int]
    context: int | None
    stop_strings: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    template_args: dict[str, Any] = field(default_factory=dict)
    day: Date | None = None

    @cached_property
    def row_budget(self) -> MemoryBudget:
        """The number of rows that fit in the memory while they are decoded together."""
        return MemoryBudget("rows", "rows", self.backend.name)

    def size(self, key: str) -> int:
        """Return a size from ``config.json``, the largest if it names one for each layer, 0 if it names none."""
        found = {**self.config, **(self.config.get("text_config") or {})}.get(key) or 0
        return max(found) if isinstance(found, list) else found

    @property
    def own_tags(self) -> Pair | None:
        """The tags that its tokenizer names for thoughts, if they are not among ``thoughts.TAGS``."""
        return own_pair(self.tokenizer.think_start, self.tokenizer.think_end)

    @cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """The fingerprints of the ``model``'s files and of the ``adapter``'s, None without one. They are read once."""
        adapter = fingerprint(Path(self.adapter)) if self.adapter else None
        return {"model": fingerprint(self.path), "adapter": adapter}

    def about(self) -> dict[str, Any]:
        """Return what the model's results depend on: names, revision, fingerprints of files, device, weights."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprints["model"],
            "adapter": self.adapter,
            "adapter_fingerprint": self.fingerprints["adapter"],
            "backend": asdict(self.backend),
        }

    @cached_property
    def signs(self) -> dict[int, str]:
        """Special tokens that a completion's text leaves out, with their spelling: all but those of thinking tags."""
        tokens = self.tokenizer._tokenizer.added_tokens_decoder
        special = {token: str(added) for token, added in tokens.items() if added.special}
        if HARMONY in special.values():
            return {}  # its special tokens separate its messages, so they stay
        own = [tag for tag in (self.tokenizer.think_start, self.tokenizer.think_end) if tag]
        tags = [*own, *(tag for tags in TAGS for tag in tags)]
        return {token: text for token, text in special.items() if not any(text in tag for tag in tags)}

    def shown(self) -> dict[str, str]:
        """Return the date if the chat template prints it; it is part of a run's identity."""
        return {"date": self.day.isoformat()} if self.day and self.chat.dated else {}

    def render(self, prompt: Prompt, problem: Problem, thinking: bool | None = None) -> Rendered:
        """Render a problem by the chat template, or as plain text if the prompt is not for a chat.

        ``thinking`` sets the template's switch; ``None`` leaves it at the template's own default.
        """
        messages = prompt.messages(problem)
        if prompt.chat:
            return self.chat.prompt(messages, prompt.prefill, thinking)
        return self.chat.plain(as_text(messages) + prompt.prefill, prompt.prefill)

    @cached_property
    def chat(self) -> Chat:
        """The model's chat template with its fixed variables."""
        return Chat(self.tokenizer, self.name, self.template_args, self.day, self.notes)


def of_its_day(config: Any, begun: Mapping[str, Any]) -> Any:
    """Return the settings with the date of the run that they continue, unless they set one or the run has none.

    Args:
        config: the settings.
        begun: the identity of the run; empty if it is new.
    """
    day = begun.get("date")
    return config if config.date or not day else config.model_copy(update={"date": Date.fromisoformat(day)})


def load(
    name: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    template_args: dict[str, Any] | None = None,
    date: Date | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer, and an adapter on top, unfused.

    Dense weights are the quantized ones' exact values in float32, rounded once for another ``dtype``.

    Args:
        name: ``nano``, a folder, or a hub id, perhaps with ``@revision``; each also as ``MODEL+ADAPTER``.
        adapter: folder of an mlx_lm adapter.
        device: ``"gpu"`` or ``"cpu"``; ``None`` for the GPU where there is one.
        weights: ``"quantized"`` or ``"dense"``; ``None`` for what is fastest here (`device.choose`).
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` likewise.
        trust_remote_code: run Python code that comes with the model.
        template_args: other variables of the chat template, such as ``reasoning_effort``.
        date: the day that the chat template prints, if it prints one; ``None`` for today.

    Raises:
        UserError: if there is no such model, it cannot be downloaded or read, or the adapter does not fit.
    """
    choose(device, weights, dtype)  # refuses bad values and sets the device before anything is read
    for what, value in (("model", name), ("adapter", adapter or "")):
        if not isinstance(value, str | Path):
            raise UserError(f"{what}: must be a text or a path, not {str(value)[:60]!r}; give a name or a folder")
    spec, adapter = name_parts(str(name), str(adapter) if adapter else None)
    path, revision = resolve(spec)
    try:
        model, config = load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # mlx_lm raises many kinds of errors for a broken folder
        raise _unloadable(spec, "cannot be loaded", error, trust_remote_code) from None
    tokenizer = _load_tokenizer(path, spec, config, trust_remote_code)
    backend = choose(device, weights, dtype, get_total_parameters(model))
    notes = place(model, backend)
    if adapter is not None:
        attach(model, adapter)
        trained_on = read_config(Path(adapter)).get("model")
        same = ("", base_name(spec), base_name(str(path.absolute())))
        if isinstance(trained_on, str) and base_name(trained_on) not in same:
            notes.append(f"the adapter {adapter} was trained on {clean(trained_on)[:200]}")
    stop_ids = _stop_ids(tokenizer)
    if not stop_ids:
        notes.append(f"{spec} names no token that ends a text; completions run to the token limit")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=spec,
        adapter=adapter,
        path=path,
        revision=revision,
        config=config,
        backend=backend,
        stop_ids=stop_ids,
        context=_context(config, model),
        stop_strings=() if tokenizer.has_chat_template else ("\n\nUser:",),
        notes=notes,
        template_args=template_args or {},
        day=date or Date.today(),
    )


def place(model: Any, backend: Backend) -> list[str]:
    """Give the model the backend's weights and dtype, in place, and evaluate them; return notes."""
    notes = []
    quantized = [module for _, module in model.named_modules() if "scales" in module]
    if backend.name == "cuda" and backend.weights == "quantized" and quantized:
        notes.append(
            "the weights stay quantized, which on CUDA is several times as slow as dense ones, and takes minutes to "
            "compile the first kernels; pass --weights dense where the memory allows"
        )
    if backend.weights == "dense":
        if any(module.get("global_scale") is not None for module in quantized):
            notes.append("nvfp4 experts with a global scale stay quantized")
        elif quantized:
            # Scales are float16 or bfloat16; widened first, they round nothing on the way to dense.
            model.set_dtype(mx.float32)
            dequantize_model(model)
            left = sum("scales" in module for _, module in model.named_modules())
            if left:
                notes.append(f"{left} quantized layers of a special kind stay quantized")
    if backend.dtype is not None:
        model.set_dtype(getattr(mx, backend.dtype))
    model.eval()
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time, to keep memory low
    return notes


def _load_tokenizer(path: Path, name: str, config: dict[str, Any], trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(path, {"trust_remote_code": trust_remote_code}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # as above
        raise _unloadable(name, "its tokenizer cannot be loaded", error, trust_remote_code) from None


def _unloadable(name: str, what: str, error: Exception, trusted: bool) -> UserError:
    if "trust_remote_code" in str(error) and not trusted:
        return UserError(f"{name}: comes with Python code of its own; pass --trust-remote-code if you trust it")
    return UserError(f"{name}: {what} ({first_line(error)}); {GET_ANEW}")


def _stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a completion: the configured ones, and those with which chat templates end a turn."""
    vocabulary = tokenizer.get_vocab()
    # In the harmony format <|end|> closes one message of a turn, not the turn.
    ends = {*TURN_ENDS} - ({"<|end|>"} if "<|channel|>" in vocabulary else set())
    return frozenset({*tokenizer.eos_token_ids, *(vocabulary[end] for end in ends if end in vocabulary)})


def _context(config: dict[str, Any], model: Any) -> int | None:
    """Return the longest sequence in tokens; YaRN may stretch it past the one that the configuration names.

    mlx_lm builds some models without the YaRN of their configuration.
    """
    built = any("Yarn" in type(module).__name__ for module in model.modules())
    for settings in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(settings.get(key), int):
                rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
                yarn = built and "yarn" in (rope.get("rope_type"), rope.get("type"))
                stretched = rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or 0) if yarn else 0
                return max(settings[key], int(stretched))
    return None
