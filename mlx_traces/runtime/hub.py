"""What the model and data hub answers: whether it does, why it refuses, what it has instead. No MLX.

The hub is asked whether it answers before its client is, which would retry for half a minute.
"""

import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_traces.errors import choices, did_you_mean, first_line

TIMEOUT = 3  # seconds
LISTED = 100  # names that are looked through for close ones


def switched_off() -> bool:
    """Whether the user has told the hub's client not to use the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@cache
def fault() -> str:
    """Return why the hub does not answer, an empty string if it does; asked once per process."""
    from huggingface_hub import constants

    answers: list[str] = []
    # In a thread, as looking a name up can take longer than any timeout given to the request.
    worker = threading.Thread(target=lambda: answers.append(_ask(constants.ENDPOINT)), daemon=True)
    worker.start()
    worker.join(TIMEOUT)
    return answers[0] if answers else f"no answer in {TIMEOUT} seconds"


def _ask(address: str) -> str:
    """Return what is wrong with a web address, an empty string if it answers."""
    from huggingface_hub import get_session

    try:  # by the client's own session: its certificates, its proxies
        status = get_session().head(address, timeout=TIMEOUT).status_code
    except Exception as error:  # which of two HTTP libraries it is depends on the client's version
        return first_line(error)
    return f"status {status}" if status >= 500 else ""


def out_of_reach() -> str:
    """Return why nothing can be downloaded, an empty string if something can."""
    if switched_off():
        return "HF_HUB_OFFLINE is set"
    return f"no network or hub not reachable: {fault()}" if fault() else ""


def refusal(
    error: Exception, name: str, revision: str | None = None, kind: str = "model", known: Iterable[str] = ()
) -> str | None:
    """Say why the hub did not give a repository, with the way out; None where it is not the hub that refused.

    Args:
        error: what the hub's client raised.
        name: of the repository, ``owner/name``.
        revision: that was asked for.
        kind: ``"model"`` or ``"dataset"``.
        known: names that may have been meant, besides the hub's own.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"{name} asks for an agreement first: accept it on {page}, then run `hf auth login`"
    if isinstance(error, errors.DisabledRepoError):
        return f"{name}: the hub has disabled it; take another one"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "data set" if kind == "dataset" else kind
        close = did_you_mean(name, [*known, *_similar(name, kind)])
        return f"unknown {what} {name!r}: not on the hub, or private (then run `hf auth login`); check the name{close}"
    if isinstance(error, errors.RevisionNotFoundError):
        refs = _names(f"{kind}s/{name}/refs", "name")[:8] or ["a branch", "a tag"]
        return f"{name} has no revision {revision!r}; give {choices(['a whole commit hash of it', *refs])}"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"{name}: the hub refuses the token; run `hf auth login` anew, or unset HF_TOKEN"
    return None


def ask_why(name: str, revision: str | None, kind: str) -> str | None:
    """Ask the hub why it does not give a repository; return `refusal`'s words, None if it would give it."""
    from huggingface_hub.utils import hf_raise_for_status

    try:
        for path in ("auth-check", f"revision/{quote(revision or 'main', safe='')}"):
            hf_raise_for_status(_get(f"{kind}s/{name}/{path}"))
    except Exception as error:  # which of two HTTP libraries raises it depends on the client's version
        return refusal(error, name, revision, kind)
    return None


def _similar(name: str, kind: str) -> list[str]:
    """Return repositories of the hub that may be meant: of the same name, or the same owner's."""
    owner, _, own = name.partition("/")
    queries = {"search": own}, {"author": owner, "search": own.rpartition("-")[0]}, {"author": owner}
    return list(dict.fromkeys(found for query in queries for found in _names(f"{kind}s", "id", **query)))


def _names(path: str, key: str, **query: str) -> list[str]:
    """Ask the hub for a list, or for an object of lists, and return what ``key`` says in each entry; else none."""
    try:
        found: Any = _get(path, limit=str(LISTED), **query).json()
    except Exception:  # what is close is good to know, no more
        return []
    lists = found.values() if isinstance(found, dict) else [found]
    entries = [entry for one in lists if isinstance(one, list) for entry in one if isinstance(entry, dict)]
    return [entry[key] for entry in entries if isinstance(entry.get(key), str)]


def _get(path: str, **query: str) -> Any:
    """Return the answer of the hub's interface, by the client's own session, in bounded time."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    address = f"{constants.ENDPOINT}/api/{path}"
    return get_session().get(address, params=query, headers=build_hf_headers(), timeout=TIMEOUT)


def commit_here(name: str, revision: str | None, kind: str) -> str | None:
    """Return the commit that a branch or tag was when it was downloaded last, None if nobody has noted it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    refs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs"
    try:
        return (refs / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
