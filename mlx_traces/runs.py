"""Run folders: what was asked (``run.json``), every sample as it finished (``samples.jsonl``), the result. No MLX."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError

PACKAGES = ("mlx-traces", "mlx", "mlx-lm", "transformers", "numpy")


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content all at once: temporary file, fsync, rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Return readable JSON with a line end."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @property
    def samples_path(self) -> Path:
        """Where the finished samples are, one JSON object per line."""
        return self.path / "samples.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.path / "result.json").exists()

    def start(self, identity: dict[str, Any], details: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
        """Open the folder for writing and return the samples that are already there.

        Args:
            identity: what decides the result; a resumed run must have been started with the same.
            details: versions, device and alike, recorded but not compared.
            resume: continue an existing run.

        Raises:
            UserError: if the folder exists and ``resume`` is false, cannot be written, or has another identity.
        """
        file = self.path / "run.json"
        if self.path.exists() and not resume and any(self.path.iterdir()):
            raise UserError(f"{self.path} exists; pass --resume to continue it, or choose another --out")
        if file.exists():
            if differences := self._differences(identity):
                raise UserError(
                    f"{self.path} was started with other settings ({'; '.join(differences)}); "
                    "repeat those, or choose another --out"
                )
            return self._recover()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(file, to_json({"identity": identity, **details}))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from None
        return []

    def identity(self) -> dict[str, Any]:
        """Return what the run was started with."""
        return read_json(self.path / "run.json").get("identity", {})

    def _differences(self, identity: dict[str, Any]) -> list[str]:
        """Name what differs between the stored identity and this one."""
        stored = self.identity()
        return [
            f"{key} was {stored.get(key)!r}, now {identity.get(key)!r}"
            for key in dict.fromkeys((*stored, *identity))
            if stored.get(key) != identity.get(key)
        ]

    def _recover(self) -> list[dict[str, Any]]:
        """Read the finished samples; a last line that was cut off while being written is removed."""
        if not self.samples_path.exists():
            return []
        content = self.samples_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.samples_path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished samples; once this returns, a killed process does not lose them."""
        with self.samples_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self, samples: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Write the samples in their final order, then the result."""
        write_atomic(self.samples_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
        write_atomic(self.path / "result.json", to_json(result))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({str(error)[:80]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def provenance() -> dict[str, Any]:
    """Return versions, git revision of the working folder, platform and time, for ``run.json``."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": _git_revision(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": now(),
    }


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
    here = Path(__file__).parent
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


def fingerprint(folder: Path) -> str:
    """Return 12 hexadecimal digits that change with a model's or adapter's files.

    Names, sizes, and the first and last MiB of every weight file and JSON file: cheap for large models.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:12]
