"""Upload an adapter or a model to the hub: its own files and the model card, nothing else. No MLX."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from mlx_traces.errors import UserError, first_line
from mlx_traces.models import adapter_config
from mlx_traces.models.names import check
from mlx_traces.runtime import hub
from mlx_traces.runtime.files import to_json
from mlx_traces.runtime.fingerprints import MODEL_FILES
from mlx_traces.train import model_card

SETTINGS = (adapter_config.CONFIG, "fused.json")  # written by mlx-traces; they name files of this machine


@dataclass(frozen=True)
class Upload:
    """The files of an upload, by their names on the hub: a path, or the content if paths were removed from it."""

    what: str
    files: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


def prepare(folder: Path) -> Upload:
    """Collect the files of an adapter, of a run's adapter, or of a model folder, as from ``fuse``.

    Paths of this machine are removed from the settings, as on the card; all other files are uploaded unchanged.

    Raises:
        UserError: if the folder is none of these, or an adapter without a card.
    """
    folder = folder.expanduser()
    if not (folder / adapter_config.CONFIG).exists() and (folder / "adapter" / adapter_config.CONFIG).exists():
        folder = folder / "adapter"
    if (folder / "config.json").exists() and not (folder / adapter_config.CONFIG).exists():
        check(str(folder))
        found = {path for pattern in (*MODEL_FILES, "*.py", model_card.CARD) for path in folder.glob(pattern)}
        names = sorted(path.name for path in found if path.is_file() and not path.name.startswith("."))
        return Upload("model", {name: _content(folder / name) for name in names})
    adapter_config.read_config(folder)
    if not (folder / model_card.CARD).exists():
        raise UserError(f"{folder}: no {model_card.CARD} to go with it; write one with: mlx-traces card {folder}")
    return Upload(
        "adapter",
        {name: _content(folder / name) for name in (model_card.CARD, adapter_config.CONFIG, adapter_config.WEIGHTS)},
    )


def _content(file: Path) -> Path | bytes:
    if file.name not in SETTINGS:
        return file
    try:
        return to_json(model_card.shown(json.loads(file.read_text(encoding="utf-8")))).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({first_line(error)}); make it anew, or remove it") from None


def push(upload: Upload, name: str, public: bool = False, progress: Callable[[str], None] = lambda line: None) -> str:
    """Upload files to a repository of the hub, which is created if needed; return the commit's address.

    Args:
        upload: from `prepare`.
        name: the repository, ``user/name``.
        public: whether everybody may see it; a new repository is private otherwise.
        progress: gets lines for the user.

    Raises:
        UserError: without a token or network, if the hub refuses, and for a public repository without ``public``.
    """
    check_name(name)
    if away := hub.out_of_reach():
        raise UserError(f"{name}: nothing can be uploaded ({away})")
    if not get_token():
        raise UserError("not logged in to the hub: run `hf auth login` with a token that may write, or set HF_TOKEN")
    api = HfApi()
    try:
        try:
            private = api.repo_info(name, timeout=hub.TIMEOUT).private
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
            private = not public
        if not (private or public):
            raise UserError(f"{name} exists and is public; pass --public, or another name")
        if public and private:
            progress(f"{name} exists and stays private; change that on its page")
        made = api.create_commit(
            name,
            [CommitOperationAdd(path, file) for path, file in upload.files.items()],
            commit_message=f"Upload {upload.what} by mlx-traces",
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 403:
            told = f"{name}: the hub does not let you write there; take a name of your own, and a token that may write"
            raise UserError(told) from None
        told = hub.refusal(error, name) or f"{name} could not be uploaded ({first_line(error)}); repeat the command"
        raise UserError(told) from None
    return str(made.commit_url)


def check_name(name: str) -> None:
    """Raise UserError if this cannot be a repository's name."""
    try:
        validate_repo_id(name)
        fits = name.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise UserError(f"{name[:100]!r} cannot be a name on the hub; give USER/NAME, letters, digits, -, _ and . only")
