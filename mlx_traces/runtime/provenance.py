"""What a run was made with: versions, device, git revision, settings."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_traces.runtime.fingerprints import fingerprint

PACKAGES = ("mlx-traces", "mlx", "mlx-lm", "transformers", "numpy")


def provenance() -> dict[str, Any]:
    """Return versions, git revision of the working folder, platform and time, for ``run.json``."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": _git_revision(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": now(),
    }


def resolved_config(
    config: dict[str, Any], model: Path | None, adapter: str | Path | None, **ids: Iterable[str]
) -> dict[str, Any]:
    """Return every setting as it was used, and fingerprints of what a run read, for ``run.json``.

    Args:
        config: the settings, filled in; plain JSON.
        model: the model's folder, downloaded ones too; None for one that is not here.
        adapter: the adapter's folder.
        **ids: the ids of problems or traces, in order, by what they were used for.
    """
    found = {"model": model and fingerprint(Path(model)), "adapter": adapter and fingerprint(Path(adapter))}
    found |= {name: ids_digest(own) for name, own in ids.items()}
    return {"config": config, "fingerprints": found}


def ids_digest(ids: Iterable[str]) -> str | None:
    """Return 12 hexadecimal digits that stand for ids in their order; None without any."""
    listed = list(ids)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12] if listed else None


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the commit that this package runs from, with ``+`` if files differ from it; None outside a checkout."""
    here = Path(__file__).parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
