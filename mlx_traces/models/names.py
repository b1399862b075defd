"""Find the model that a name stands for: nano, a folder, a hub id with a revision; with an adapter or without."""

import json
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_traces.config import shipped
from mlx_traces.errors import UserError, choices, did_you_mean, first_line
from mlx_traces.models.adapter_config import read_config
from mlx_traces.runtime import hub
from mlx_traces.runtime.files import on_the_way

NANO = "nano"
WELL_KNOWN = (
    "mlx-community/Qwen2.5-0.5B-Instruct-4bit",
    "mlx-community/Qwen2.5-1.5B-Instruct-4bit",
    "mlx-community/Qwen2.5-3B-Instruct-4bit",
    "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "mlx-community/Qwen2.5-Coder-0.5B-Instruct-4bit",
)
WHAT_A_NAME_IS = f"give {NANO}, a folder, or a hub id such as {WELL_KNOWN[0]}"
GET_ANEW = "copy or download it anew, or pass another model"
_QUANTIZED = re.compile(  # 8 hexadecimal digits end the name of an own conversion
    r"(?:[-_.](?:[0-9]+-?bits?|bf16|fp?(?:16|32)|float(?:16|32)|mxfp[48]|nvfp4|g[0-9]+|q[0-9]|[ad]wq|gptq|mlx"
    r"|[0-9a-f]{8}))+$"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model", "*.tiktoken")


def is_folder(spec: str) -> bool:
    """Whether a name is an existing folder; False for names that the system refuses, such as very long ones."""
    return bool(spec) and _is(spec, Path.is_dir)


def local_folder(spec: str) -> Path | None:
    """Return the checked folder of nano or of a local model; None for a hub id."""
    return resolve(spec)[0] if spec == NANO or is_folder(spec) else None


def is_here(spec: str) -> bool:
    """Whether loading a model downloads nothing; for a name that `check` accepts."""
    if local_folder(spec):
        return True
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = spec.partition("@")
    found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return isinstance(found, str) and _missing(Path(found).parent) is None


def with_adapter(config: Any) -> Any:
    """Return settings with MODEL+ADAPTER split into ``model`` and ``adapter``.

    Raises:
        UserError: if both name an adapter.
    """
    model, adapter = split_adapter(config.model, config.adapter)
    return config.model_copy(update={"model": model, "adapter": adapter})


def split_adapter(spec: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Return the model and the adapter of ``MODEL+ADAPTER``, or of a model and a separate ``adapter``.

    A folder whose own name has a ``+`` is that folder; ``~`` is expanded in folders.

    Raises:
        UserError: for two adapters.
    """
    if "+" not in spec or is_folder(spec):
        return _expanded(spec), _expanded(adapter) if adapter else None
    parts = spec.split("+")
    splits = [("+".join(parts[:at]), "+".join(parts[at:])) for at in range(1, len(parts))]
    known = [split for split in splits if is_folder(split[1])]
    model, inner = next((split for split in known if is_folder(split[0])), (known or splits)[0])
    if inner and adapter:
        raise UserError(f"two adapters, {_short(inner)} and {_short(adapter)}: give one")
    return _expanded(model), _expanded(inner or adapter or "")


def check(name: str, adapter: str | None = None) -> None:
    """Refuse what `loading.load` would refuse, as far as the disk shows; without a download, weights or MLX.

    Raises:
        UserError: for a folder that is no model or no adapter, or a name that cannot be a hub id.
    """
    _locate(name_parts(name, adapter)[0])


def resolve(spec: str) -> tuple[Path, str | None]:
    """Find a model's folder, or download it; return it and the hub commit, ``None`` for a local folder.

    Raises:
        UserError: if it is not there, is not a model, or cannot be downloaded; the message says what to pass instead.
    """
    folder, name, revision = _locate(spec)
    if folder is not None:
        return folder, None
    folder = _download(name, revision)
    return _checked(folder, spec), folder.name


def base_name(spec: str) -> str:
    """Return a model's name without owner, revision and quantization: the same for its conversions and downloads."""
    path = Path(spec if spec.startswith((".", "/", "~")) else spec.partition("@")[0])
    cached = next((part for part in path.parts if part.startswith("models--")), "")  # in the hub's cache
    return _QUANTIZED.sub("", (cached.split("--", 2)[-1] or path.name)[-255:].lower())


def _locate(spec: str) -> tuple[Path | None, str, str | None]:
    """Return a local model's checked folder (``None`` for a hub id), the name without revision, and the revision."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    shown = _short(spec)
    if is_folder(spec) and (spec != NANO or _is(f"{spec}/config.json", Path.is_file)):
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


def name_parts(name: str, adapter: str | None) -> tuple[str, str | None]:
    """Split a name and check its adapter on disk; return the model and the adapter's folder."""
    spec, adapter = split_adapter(name, adapter)
    if adapter is None:
        return spec, None
    if not is_folder(adapter):
        raise UserError(f"{_short(adapter) or repr(adapter)}: no such adapter folder; give a folder in mlx_lm's format")
    read_config(Path(adapter))
    return spec, adapter


def cached_models() -> list[str]:
    """List the hub ids of downloaded models."""
    return sorted({name for name, _ in _cached()})


def _cached() -> Iterator[tuple[str, str]]:
    """Yield (hub id, branch, tag or commit) of each complete download."""
    from huggingface_hub import constants

    for snapshot in Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*"):
        if _missing(snapshot) is None:
            refs = snapshot.parent.parent / "refs"
            files = (path for path in refs.glob("**/*") if path.is_file())
            own = [str(path.relative_to(refs)) for path in files if path.read_bytes().strip() == snapshot.name.encode()]
            name = refs.parent.name.removeprefix("models--").replace("--", "/", 1)
            yield from ((name, ref) for ref in own or [snapshot.name])


def _download(name: str, revision: str | None) -> Path:
    """Download the missing files of a model; return its folder in the hub's cache."""
    from huggingface_hub import constants, snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    away = hub.out_of_reach()
    wanted = {"revision": revision, "allow_patterns": DEFAULT_ALLOW_PATTERNS, "local_files_only": bool(away)}
    with on_the_way(Path(constants.HF_HUB_CACHE), "repeat the command"):
        try:
            folder = Path(snapshot_download(name, **wanted))
        except Exception as error:  # the client and its transfer libraries raise a dozen unrelated types
            if getattr(error, "errno", None):
                raise  # an error of the disk, for `on_the_way`
            raise _not_downloaded(name, revision, away, error) from None
    if away and (folder / "config.json").exists() and (missing := _missing(folder)):
        # Hub clients before 1.20 return the folder of an incomplete download.
        raise _not_downloaded(name, revision, away, FileNotFoundError(missing))
    return folder


def _not_downloaded(name: str, revision: str | None, away: str, error: Exception) -> UserError:
    if why := hub.refusal(error, name, revision, known=[NANO, *cached_models(), *WELL_KNOWN]):
        return UserError(why)
    if not away:
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        return UserError(f"{name} could not be downloaded ({reason}); repeat the command: complete files are kept")
    here = sorted(_cached(), key=lambda found: found[0] != name)  # other revisions of it first
    specs = [found if ref == "main" else f"{found}@{ref}" for found, ref in here[:2]]
    instead = choices([NANO, "a folder", *(f"{spec} (downloaded)" for spec in specs)])
    wanted = f"{name}@{revision}" if revision else name
    return UserError(f"{wanted} could not be downloaded ({away}); pass {instead}{_close(name)}")


def _close(name: str) -> str:
    known = [NANO, *cached_models(), *WELL_KNOWN]
    return "" if name in known else did_you_mean(name, known)


def _checked(folder: Path, name: str) -> Path:
    """Return the folder if it looks like a model; UserError that says what is wrong if not."""
    if what := _missing(folder):
        hint = "; it is an adapter, pass it with --adapter" if any(folder.glob("adapter_config.json")) else ""
        raise UserError(f"{name}: not a model folder, {what} is missing{hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: config.json is not JSON ({first_line(error)}); {GET_ANEW}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{name}: config.json has no 'model_type', so this is not a model that mlx_lm can load")
    return folder


def _missing(folder: Path) -> str | None:
    """Return the file that a model's folder lacks, None if there is none; all parts of split weights are needed."""
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
        return None  # mlx_lm does not read the index, so its faults do not matter
    own = (part for part in parts if isinstance(part, str) and re.fullmatch(r"model[\w.-]*\.safetensors", part))
    return next((part for part in own if not (folder / part).exists()), None)


def _is(spec: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(spec).expanduser())
    except (OSError, RuntimeError, ValueError):  # too long, no such user's ~, not readable, a zero byte
        return False


def _expanded(spec: str) -> str:
    """Expand ``~`` if that gives a folder; ``adapters/NAME`` without a folder here is the shipped adapter."""
    if spec.startswith("adapters/") and not is_folder(spec) and (own := shipped("adapters") / spec[9:]).is_dir():
        return str(own)
    return str(Path(spec).expanduser()) if spec.startswith("~") and is_folder(spec) else spec


def _short(name: str) -> str:
    """Return a name fit for one line of an error message."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 200 else f"{name[:80]}...{name[-40:]}"
