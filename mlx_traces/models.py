"""A model by name: found or downloaded, loaded as the device likes it, asked by its chat template."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date as Date
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_traces.config import shipped
from mlx_traces.conversations import Chat, Rendered
from mlx_traces.errors import UserError, choices, did_you_mean, first_line
from mlx_traces.records import Problem
from mlx_traces.runtime import hub
from mlx_traces.runtime.device import Backend, choose
from mlx_traces.runtime.files import on_the_way
from mlx_traces.runtime.provenance import fingerprint
from mlx_traces.tasks.prompts import Message, Prompt, as_text
from mlx_traces.tasks.thoughts import TAGS, Pair, own_pair

NANO = "nano"
WELL_KNOWN = (
    "mlx-community/Qwen2.5-0.5B-Instruct-4bit",
    "mlx-community/Qwen2.5-1.5B-Instruct-4bit",
    "mlx-community/Qwen2.5-3B-Instruct-4bit",
    "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "mlx-community/Qwen2.5-Coder-0.5B-Instruct-4bit",
)
WHAT_A_NAME_IS = f"give {NANO}, a folder, or a hub id such as {WELL_KNOWN[0]}"
# What a base model's chat template ends a turn with, where its configuration names only the end of a text.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
HARMONY = "<|channel|>"  # of gpt-oss's format, whose special tokens frame its messages
_ANEW = "copy or download it anew, or pass another model"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model", "*.tiktoken")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


@dataclass
class LoadedModel:
    """A model ready to generate.

    ``name`` and ``adapter`` are as given, ``~`` expanded, ``revision`` is the hub commit, ``None`` for a
    folder. ``stop_ids`` end a completion; ``stop_strings`` do too, for a model without a chat template, which
    knows no other end of a turn. ``context`` is the longest sequence in tokens, ``None`` if unknown. ``notes``
    are lines the user should see, each once. ``template_args`` and ``day`` are what the chat template is given.
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

    @property
    def own_tags(self) -> Pair | None:
        """The tags that its tokenizer names for thoughts, if they are not among ``thoughts.TAGS``."""
        return own_pair(self.tokenizer.think_start, self.tokenizer.think_end)

    def about(self) -> dict[str, Any]:
        """Return what a result made with it depends on: names, revision, fingerprints of files, device, weights."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": fingerprint(self.path),
            "adapter": self.adapter,
            "adapter_fingerprint": fingerprint(Path(self.adapter)) if self.adapter else None,
            "backend": asdict(self.backend),
        }

    @cached_property
    def signs(self) -> dict[int, str]:
        """The tokens that are no text, with how they are written: special ones that are no part of a thought's tags."""
        tokens = self.tokenizer._tokenizer.added_tokens_decoder
        special = {token: str(added) for token, added in tokens.items() if added.special}
        if HARMONY in special.values():
            return {}  # all that stands between its messages tells them apart
        own = [tag for tag in (self.tokenizer.think_start, self.tokenizer.think_end) if tag]
        tags = [*own, *(tag for tags in TAGS for tag in tags)]
        return {token: text for token, text in special.items() if not any(text in tag for tag in tags)}

    def shown(self) -> dict[str, str]:
        """Return what the chat template shows beside its input, the date if it prints one: of a run's identity."""
        return {"date": self.day.isoformat()} if self.day and self.chat.dated else {}

    def render(self, prompt: Prompt, problem: Problem, thinking: bool | None = None) -> Rendered:
        """Put a problem to the model: by chat template, or as plain text where that is lacking or not wanted.

        ``thinking`` sets the template's switch; ``None`` leaves it at the template's own default.
        """
        messages = prompt.messages(problem)
        if not prompt.chat:
            text = as_text(messages) + prompt.prefill
            return Rendered(tuple(self.tokenizer.encode(text)), text, prompt.prefill)
        return self.render_turns(messages, prompt.prefill, thinking)

    def render_turns(self, messages: list[Message], prefill: str = "", thinking: bool | None = None) -> Rendered:
        """Put a conversation to the model by its chat template, the next turn being the assistant's."""
        return self.chat.prompt(messages, prefill, thinking)

    @cached_property
    def chat(self) -> Chat:
        """The model's chat template, with what it is always given."""
        return Chat(self.tokenizer, self.name, self.template_args, self.day, self.notes)


def is_folder(spec: str) -> bool:
    """Whether a name is an existing folder; names that the system refuses, too long ones say, are not."""
    return bool(spec) and _is(spec, Path.is_dir)


def of_its_day(config: Any, begun: Mapping[str, Any]) -> Any:
    """Return settings whose ``date`` is that of the run that they continue, if it has one and they name none.

    Args:
        config: the settings.
        begun: the identity of the run, empty before it is begun.
    """
    day = begun.get("date")
    return config if config.date or not day else config.model_copy(update={"date": Date.fromisoformat(day)})


def with_adapter(config: Any) -> Any:
    """Return settings whose ``adapter`` is the one that ``model`` names too, as in MODEL+ADAPTER.

    Raises:
        UserError: if both name one.
    """
    model, inner = split_adapter(config.model)
    if inner and config.adapter:
        raise UserError(f"--adapter {config.adapter}: {config.model} already names an adapter")
    adapter = inner or (config.adapter and _expanded(config.adapter))
    return config.model_copy(update={"model": model, "adapter": adapter})


def split_adapter(spec: str) -> tuple[str, str | None]:
    """Split ``MODEL+ADAPTER``; a folder whose own name has a ``+`` is that folder, ``~`` is expanded in folders."""
    if "+" not in spec or is_folder(spec):
        return _expanded(spec), None
    parts = spec.split("+")
    splits = [("+".join(parts[:at]), "+".join(parts[at:])) for at in range(1, len(parts))]
    known = [split for split in splits if is_folder(split[1])]
    model, adapter = next((split for split in known if is_folder(split[0])), (known or splits)[0])
    return _expanded(model), _expanded(adapter)


def check(name: str, adapter: str | None = None) -> None:
    """Refuse what `load` would refuse, as far as the disk tells: nothing is downloaded, no weights, no MLX.

    Raises:
        UserError: for a folder that is no model or no adapter, and a name that cannot be a hub id.
    """
    _locate(_parts(name, adapter)[0])


def load(
    name: str,
    adapter: str | None = None,
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
        name: ``nano``, a folder, or a hub id, the hub id with ``@revision`` if wanted; ``MODEL+ADAPTER`` too.
        adapter: folder of an mlx_lm adapter.
        device: ``"gpu"`` or ``"cpu"``; ``None`` for the GPU where there is one.
        weights: ``"quantized"`` or ``"dense"``; ``None`` for what is fastest here (`device.choose`).
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` likewise.
        trust_remote_code: run Python code that comes with the model.
        template_args: other variables of the chat template, ``reasoning_effort`` say.
        date: the day that the chat template prints, if it does; ``None`` for today.

    Raises:
        UserError: if there is no such model, it cannot be downloaded or read, or the adapter does not fit.
    """
    choose(device, weights, dtype)  # refuses bad values and sets the device before anything is read
    from mlx_lm.utils import get_total_parameters, load_model

    spec, adapter = _parts(name, adapter)
    path, revision = resolve(spec)
    try:
        model, config = load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # mlx_lm meets a broken folder with whatever its code runs into
        raise _unloadable(spec, "cannot be loaded", error, trust_remote_code) from None
    tokenizer = _load_tokenizer(path, spec, config, trust_remote_code)
    backend = choose(device, weights, dtype, get_total_parameters(model))
    notes = place(model, backend)
    if adapter is not None:
        from mlx_traces.adapters import attach

        attach(model, adapter)
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
        context=_context(config),
        stop_strings=() if tokenizer.has_chat_template else ("\n\nUser:",),
        notes=notes,
        template_args=template_args or {},
        day=date or Date.today(),
    )


def place(model: Any, backend: Backend) -> list[str]:
    """Give the model the backend's weights and dtype, in place, and evaluate them; return notes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model

    notes = []
    if backend.weights == "dense":
        quantized = [module for _, module in model.named_modules() if "scales" in module]
        if any(module.get("global_scale") is not None for module in quantized):
            notes.append("nvfp4 experts with a global scale stay quantized")
        elif quantized:
            # Scales are float16 or bfloat16: widen them first, and nothing is rounded on the way to dense.
            model.set_dtype(mx.float32)
            dequantize_model(model)
            left = sum("scales" in module for _, module in model.named_modules())
            if left:
                notes.append(f"{left} quantized layers of a special kind stay quantized")
    if backend.dtype is not None:
        model.set_dtype(getattr(mx, backend.dtype))
    model.eval()
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time: the wide intermediates do not pile up
    return notes


def resolve(spec: str) -> tuple[Path, str | None]:
    """Find a model's folder, or download it; return it and the hub commit, ``None`` for a folder.

    Raises:
        UserError: if it is not there, is not a model, or cannot be downloaded; it says what to pass instead.
    """
    folder, name, revision = _locate(spec)
    if folder is not None:
        return folder, None
    folder = _download(name, revision)
    return _checked(folder, spec), folder.name


def _locate(spec: str) -> tuple[Path | None, str, str | None]:
    """Return (a local model's folder, checked, ``None`` for a hub id; the name and the revision without ``@``)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    shown = _short(spec)
    if is_folder(spec):
        return _checked(Path(spec).expanduser(), shown), spec, None
    if _is(spec, Path.is_file):
        raise UserError(f"{shown}: a file; a model is a folder with config.json, model*.safetensors and a tokenizer")
    name, _, revision = spec.partition("@")
    if name == NANO:
        if revision:
            raise UserError(f"{shown}: {NANO} comes with this package and has no revisions")
        folder = Path(str(resources.files("mlx_traces") / "assets" / NANO))
        if not folder.is_dir():
            raise UserError(f"{NANO} is not in this installation; build it with: mlx-traces nano build")
        return _checked(folder, NANO), name, None
    if revision and is_folder(name):
        raise UserError(f"{shown}: a folder has no revisions; give {_short(name)}")
    if spec.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{shown}: no such folder; {WHAT_A_NAME_IS}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"unknown model {shown!r}: {WHAT_A_NAME_IS}{_close(name)}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"unknown model {shown!r}: not of the form of a hub id; {WHAT_A_NAME_IS}") from None
    return None, name, revision or None


def _parts(name: str, adapter: str | None) -> tuple[str, str | None]:
    """Return (model, adapter folder) of ``name`` and ``adapter``, the adapter checked on disk."""
    from mlx_traces.adapters import read_config

    spec, inner = split_adapter(name)
    if inner and adapter:
        raise UserError(f"two adapters, {_short(inner)} and {_short(adapter)}: give one")
    adapter = adapter or inner
    if adapter is None:
        return spec, None
    if not is_folder(adapter):
        raise UserError(f"{_short(adapter) or repr(adapter)}: no such adapter folder; give one that mlx_lm has trained")
    read_config(Path(adapter).expanduser())
    return spec, _expanded(adapter)


def cached_models() -> list[str]:
    """List the hub ids of downloaded models."""
    return sorted({name for name, _ in _cached()})


def _cached() -> Iterator[tuple[str, str]]:
    """Yield (hub id, branch, tag or commit) of what was downloaded whole."""
    from huggingface_hub import constants

    for snapshot in Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*"):
        if _missing(snapshot) is None:
            refs = snapshot.parent.parent / "refs"
            files = (path for path in refs.glob("**/*") if path.is_file())
            own = [str(path.relative_to(refs)) for path in files if path.read_bytes().strip() == snapshot.name.encode()]
            name = refs.parent.name.removeprefix("models--").replace("--", "/", 1)
            yield from ((name, ref) for ref in own or [snapshot.name])


def _download(name: str, revision: str | None) -> Path:
    """Download what is not here of a model; return its folder in the hub's cache."""
    from huggingface_hub import constants, snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    away = hub.out_of_reach()
    wanted = {"revision": revision, "allow_patterns": DEFAULT_ALLOW_PATTERNS, "local_files_only": bool(away)}
    with on_the_way(Path(constants.HF_HUB_CACHE), "repeat the command"):
        try:
            return Path(snapshot_download(name, **wanted))
        except Exception as error:  # the client, and what it transfers with, raise a dozen unrelated types
            if getattr(error, "errno", None):
                raise  # the disk's
            raise _not_downloaded(name, revision, away, error) from None


def _not_downloaded(name: str, revision: str | None, away: str, error: Exception) -> UserError:
    if why := hub.refusal(error, name, revision, known=[NANO, *cached_models(), *WELL_KNOWN]):
        return UserError(why)
    if not away:
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        return UserError(f"{name} could not be downloaded ({reason}); repeat the command: what is whole is kept")
    here = sorted(_cached(), key=lambda found: found[0] != name)  # other revisions of it first
    specs = [found if ref == "main" else f"{found}@{ref}" for found, ref in here[:2]]
    instead = choices([NANO, "a folder", *(f"{spec} (downloaded)" for spec in specs)])
    wanted = f"{name}@{revision}" if revision else name
    return UserError(f"{wanted} could not be downloaded ({away}); pass {instead}{_close(name)}")


def _close(name: str) -> str:
    known = [NANO, *cached_models(), *WELL_KNOWN]
    return "" if name in known else did_you_mean(name, known)


def _checked(folder: Path, name: str) -> Path:
    """Return the folder if it looks like a model, else say which file is missing."""
    if what := _missing(folder):
        hint = "; it is an adapter, pass it with --adapter" if any(folder.glob("adapter_config.json")) else ""
        raise UserError(f"{name}: not a model folder, {what} is missing{hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: config.json is not JSON ({first_line(error)}); {_ANEW}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{name}: config.json has no 'model_type', so this is not a model that mlx_lm can load")
    return folder


def _missing(folder: Path) -> str | None:
    """Return what a folder lacks to be a model's, None if nothing; of weights in parts every one must be there."""
    for what, patterns in (
        ("config.json", ("config.json",)),
        ("model*.safetensors", ("model*.safetensors",)),
        ("a tokenizer (tokenizer.json)", _TOKENIZER_FILES),
    ):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return what
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        parts = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # the index is not read by anybody else
    own = (part for part in parts if isinstance(part, str) and re.fullmatch(r"model[\w.-]*\.safetensors", part))
    return next((part for part in own if not (folder / part).exists()), None)


def _load_tokenizer(path: Path, name: str, config: dict[str, Any], trust_remote_code: bool) -> Any:
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(path, {"trust_remote_code": trust_remote_code}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # as above
        raise _unloadable(name, "its tokenizer cannot be loaded", error, trust_remote_code) from None


def _unloadable(name: str, what: str, error: Exception, trusted: bool) -> UserError:
    if "trust_remote_code" in str(error) and not trusted:
        return UserError(f"{name}: comes with Python code of its own; pass --trust-remote-code if you trust it")
    return UserError(f"{name}: {what} ({first_line(error)}); {_ANEW}")


def _stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a completion: the configured ones, and the chat templates' ends of a turn."""
    vocabulary = tokenizer.get_vocab()
    # In the harmony format <|end|> closes one message of a turn, not the turn.
    ends = {*TURN_ENDS} - ({"<|end|>"} if "<|channel|>" in vocabulary else set())
    return frozenset({*tokenizer.eos_token_ids, *(vocabulary[end] for end in ends if end in vocabulary)})


def _context(config: dict[str, Any]) -> int | None:
    for settings in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(settings.get(key), int):
                return settings[key]
    return None


def _is(spec: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(spec).expanduser())
    except (OSError, RuntimeError, ValueError):  # too long, no such user's ~, not readable, a zero byte
        return False


def _expanded(spec: str) -> str:
    """Expand ``~`` where that leads to a folder; ``adapters/NAME`` that is not here is the one that is shipped."""
    if spec.startswith("adapters/") and not is_folder(spec) and (own := shipped("adapters") / spec[9:]).is_dir():
        return str(own)
    return str(Path(spec).expanduser()) if spec.startswith("~") and is_folder(spec) else spec


def _short(name: str) -> str:
    """Return a name as one line of an error message."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 200 else f"{name[:80]}...{name[-40:]}"
