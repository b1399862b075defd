"""The model and data hub: whether it can be reached, why it refuses, which names are close. No MLX.

One short request first checks whether the hub answers, since its client would retry for half a minute.
"""

import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants

from mlx_traces.errors import choices, did_you_mean, first_line

TIMEOUT = 3  # seconds
LISTED = 100  # names among which close ones are searched


def switched_off() -> bool:
    """Whether HF_HUB_OFFLINE tells the hub's client not to use the network."""
    return constants.HF_HUB_OFFLINE


@cache
def fault() -> str:
    """Return why the hub does not answer, an empty string if it does; checked once per process."""
    answers: list[str] = []

    def ask() -> None:
        try:  # by the client's own session: its certificates, its proxies
            status = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT).status_code
            answers.append(f"status {status}" if status >= 500 else "")
        except Exception as error:  # the client's version decides which of two HTTP libraries raises it
            answers.append(first_line(error))

    # In a thread, since a name look-up can outlast the request's timeout.
    worker = threading.Thread(target=ask, daemon=True)
    worker.start()
    worker.join(TIMEOUT)
    return answers[0] if answers else f"no answer in {TIMEOUT} seconds"


def out_of_reach() -> str:
    """Return why nothing can be downloaded, an empty string if something can."""
    if switched_off():
        return "HF_HUB_OFFLINE is set"
    return f"no network or hub not reachable: {fault()}" if fault() else ""


def refusal(
    error: Exception, name: str, revision: str | None = None, kind: str = "model", known: Iterable[str] = ()
) -> str | None:
    """Say why the hub refused a repository, with the way out; None if the error is not the hub's refusal.

    Args:
        error: raised by the hub's client.
        name: of the repository, ``owner/name``.
        revision: the one requested.
        kind: ``"model"`` or ``"dataset"``.
        known: names, besides the hub's own, among which a close one is searched.
    """
    from huggingface_hub import errors  # loads an HTTP client

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"{name} asks for an agreement first: accept it on {page}, then run `hf auth login`"
    if isinstance(error, errors.DisabledRepoError):
        return f"{name}: the hub has disabled it; take another one"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "data set" if kind == "dataset" else kind
        owner, _, short = name.partition("/")
        queries = {"search": short}, {"author": owner, "search": short.rpartition("-")[0]}, {"author": owner}
        similar = [found for query in queries for found in _names(f"{kind}s", "id", **query)]
        close = did_you_mean(name, [*known, *similar])
        return f"unknown {what} {name!r}: not on the hub, or private (then run `hf auth login`); check the name{close}"
    if isinstance(error, errors.RevisionNotFoundError):
        refs = _names(f"{kind}s/{name}/refs", "name")[:8] or ["a branch", "a tag"]
        return f"{name} has no revision {revision!r}; give {choices(['a whole commit hash of it', *refs])}"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"{name}: the hub refuses the token; run `hf auth login` anew, or unset HF_TOKEN"
    return None


def ask_why(name: str, revision: str | None, kind: str) -> str | None:
    """Ask the hub why it refuses a repository; return `refusal`'s message, None if it does not refuse."""
    try:
        for path in ("auth-check", f"revision/{quote(revision or 'main', safe='')}"):
            huggingface_hub.hf_raise_for_status(_get(f"{kind}s/{name}/{path}"))
    except Exception as error:  # the client's version decides which of two HTTP libraries raises it
        return refusal(error, name, revision, kind)
    return None


def _names(path: str, key: str, **query: str) -> list[str]:
    """Return ``key`` of each entry in the hub's reply, a list or an object of lists; an empty list on failure."""
    try:
        reply: Any = _get(path, limit=str(LISTED), **query).json()
    except Exception:  # close names only improve the message
        return []
    lists = reply.values() if isinstance(reply, dict) else [reply]
    entries = [entry for one in lists if isinstance(one, list) for entry in one if isinstance(entry, dict)]
    return [entry[key] for entry in entries if isinstance(entry.get(key), str)]


def _get(path: str, **query: str) -> Any:
    """Return the reply of the hub's API, through the client's own session, in bounded time."""
    from huggingface_hub.utils import build_hf_headers  # loads an HTTP client

    address = f"{constants.ENDPOINT}/api/{path}"
    return huggingface_hub.get_session().get(address, params=query, headers=build_hf_headers(), timeout=TIMEOUT)


def commit_here(name: str, revision: str | None, kind: str) -> str | None:
    """Return the commit that a branch or tag named at its last download; None if the cache does not have it."""
    refs = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs"
    try:
        return (refs / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
