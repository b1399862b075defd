"""The entries of ``run.json`` that say how a run was made: versions, git revision, settings, fingerprints."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("mlx-traces", "mlx", "mlx-lm", "transformers", "numpy")


def provenance() -> dict[str, Any]:
    """Return versions, git revision of this package, platform, command and time, for ``run.json``."""
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "git_revision": git_revision(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode(),
        "started": now(),
    }


def ids_digest(ids: Iterable[str]) -> str | None:
    """Return a digest of ids in their order, 12 hexadecimal digits; None if there are none."""
    listed = list(ids)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12] if listed else None


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def version_of(package: str) -> str | None:
    """Return an installed package's version, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def git_revision() -> str | None:
    """Return the commit of this package's checkout, with ``+`` if files differ from it; None outside a checkout.

    Git is asked once, since the code that runs was read at the beginning. A package that is installed below another
    project's checkout is not part of it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):
            return None
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*") or None
    except (OSError, subprocess.TimeoutExpired):
        return None
