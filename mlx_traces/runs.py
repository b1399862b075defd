"""Run folders: what was asked (``run.json``), every sample as it finished (``samples.jsonl``), the result. No MLX."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.tasks.data import read_jsonl

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
SAMPLE_COLUMNS = (
    *("id", "sample", "question", "tokens", "finish_reason", "extracted", "extractions", "verdicts", "gold", "correct"),
    *("verdict", "stratum", "elapsed"),
)
TRIES = 100  # at a folder that others remove
PACKAGES = ("mlx-traces", "mlx", "mlx-lm", "transformers", "numpy")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that takes a file's place, all at once, when the context ends well.

    It is on the disk before it is renamed, and the renaming too before this returns. Where the context fails nothing is
    left of it; what a killed process left of the same file's making goes first.
    """
    for left in leftovers(path):
        with suppress(OSError):
            left.unlink()
    scratch = path.with_name(f".{os.getpid()}-{platform.node()}.tmp-{path.name}")
    try:
        yield scratch
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink()


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files in which processes of this machine that are gone were writing ``path``."""
    mark = f"-{platform.node()}.tmp-{path.name}"
    found = [file for file in path.parent.glob(".*") if file.name.endswith(mark)]
    return [file for file in found if not _lives(file.name.removesuffix(mark)[1:])]


def _lives(number: str) -> bool:
    """Whether a process number is somebody's; what is no number belongs to nobody that we know."""
    if not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk; some file systems know no such thing for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content all at once: temporary file, fsync, rename."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def on_the_way(path: Path, again: str = "go on with --resume") -> Iterator[None]:
    """Say in one line, while the context lasts, that a file of a run cannot be written, and how the run goes on.

    What was there before is whole.
    """
    try:
        yield
    except OSError as error:
        first = {errno.ENOSPC: "make room", errno.EDQUOT: "make room"}.get(error.errno or 0, "make it writable")
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {first}, then {again}") from None


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, its folders included; UserError if it is, or cannot be written."""
    try:
        if path.exists():
            raise UserError(f"{path} exists; remove it, or choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def scratch_folder(out: Path) -> Path:
    """Make the empty folder beside ``out`` that becomes it by a rename in the end.

    Raises:
        UserError: if ``out`` exists, or its folder cannot be written.
    """
    try:
        if out.exists():
            raise UserError(f"{out} exists; remove it, or choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(f".{out.name}-{os.getpid()}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    except (OSError, ValueError) as error:  # a ValueError for a path without a name, / say
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(out)[:200]} cannot be written ({why}); choose another --out") from None
    return scratch


def put_in_place(scratch: Path, out: Path) -> None:
    """Give a finished folder its name, its files being on the disk."""
    for path in scratch.rglob("*"):
        sync(path)
    sync(scratch)
    scratch.rename(out)
    sync(out.parent)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Keep other processes from what a run writes, by the file ``lock`` beside it, while the context lasts.

    The file names the owner; the lock itself is the system's (``flock``), which ends with its process in whatever way.
    So what a killed process left is taken over, by one alone where two find it, and a process number that was given
    away again misleads nobody.

    Raises:
        UserError: if another process holds it, or may do so on another machine; if the file cannot be written.
    """
    made = [folder for folder in lock.parents if not folder.exists()]

    def tidy() -> None:
        with suppress(OSError):  # one of them is not empty
            for folder in made:
                folder.rmdir()

    try:
        descriptor = _taken(lock)
    except OSError as error:
        tidy()
        raise UserError(f"{lock.parent}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that is read-only by now: the lock itself ends all the same
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        tidy()


def _taken(lock: Path) -> int:
    """Return the open file of a lock that is now this process's."""
    while True:
        descriptor = _opened(lock)
        try:
            free = _try_lock(descriptor)
            if free and not (lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())):
                os.close(descriptor)  # its owner finished, and removed it, since it was opened
                continue
            _refuse_owner(lock, free)
            owner = to_json({"pid": os.getpid(), "host": platform.node(), "since": now()})
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.encode(), 0)
                os.fsync(descriptor)
            except OSError:
                lock.unlink(missing_ok=True)
                raise
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor


def _opened(lock: Path) -> int:
    """Open a lock's file, its folder made; a few times, as one that ends may just then remove a folder that it made."""
    for _ in range(TRIES):
        with suppress(FileNotFoundError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(lock))


def _try_lock(descriptor: int) -> bool:
    """Lock a file unless another process has; a file system that knows no locks lets everybody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
    return True


def _refuse_owner(lock: Path, free: bool) -> None:
    """Raise UserError if a lock is another process's; one that is free is, if another machine's name is in it."""
    try:
        owner = json.loads(lock.read_text())
        host, told = owner["host"], f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is new, or its owner was killed while writing
        host, told = platform.node(), "another process"
    if not free:
        raise UserError(f"{lock.parent} is in use by {told}; wait until that has ended, or choose another --out")
    if host != platform.node():
        raise UserError(f"{lock.parent} is in use by {told}; if that has ended, remove {lock}")


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

    def refuse(self, resume: bool) -> None:
        """Raise UserError if a run cannot be written here; nothing is touched."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")
        # A process that was killed leaves its hidden temporary file.
        used = self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir())
        if used and not resume:
            raise UserError(f"{self.path} exists; pass --resume to continue it, or choose another --out")
        if used and not (self.path / "run.json").exists():
            raise UserError(f"{self.path} is not a run folder, it has no run.json; choose another --out")

    def recover(self, identity: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the finished samples of a run to be continued; a last line cut off while being written is removed.

        Raises:
            UserError: if the run was started with another identity, or a line is broken.
        """
        self.check(identity)
        return whole_lines(self.samples_path, SAMPLE_COLUMNS)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, as the run was begun; empty before that."""
        if not (self.path / "run.json").exists():
            return {}
        stored = read_json(self.path / "run.json").get("identity")
        if not isinstance(stored, dict):
            raise UserError(f"{self.path / 'run.json'}: 'identity' is missing; the file is damaged")
        return stored

    def check(self, identity: dict[str, Any]) -> None:
        """Raise UserError if the run was started with another identity."""
        if (self.path / "run.json").exists() and (differences := self._differences(identity)):
            raise UserError(
                f"{self.path} was started with other settings ({'; '.join(differences)}); "
                "repeat those, or choose another --out"
            )

    def begin(self, identity: dict[str, Any], details: dict[str, Any]) -> None:
        """Make the folder and note what decides the result, and details that do not: versions, device and alike."""
        if (self.path / "run.json").exists():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "run.json", to_json({"identity": identity, **details}))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from None

    def _differences(self, identity: dict[str, Any]) -> list[str]:
        """Name what differs between the stored identity and this one, briefly."""
        stored, identity = _flat(self.identity), _flat(identity)
        return [
            f"{key} was {str(stored.get(key))[:60]}, now {str(identity.get(key))[:60]}"
            for key in dict.fromkeys((*stored, *identity))
            if stored.get(key) != identity.get(key)
        ]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished samples; once this returns, a killed process does not lose them."""
        with on_the_way(self.samples_path), self.samples_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def log(self, name: str, *rows: dict[str, Any]) -> None:
        """Add rows to ``metrics.jsonl`` or another file of JSON lines."""
        path = self.path / name
        with on_the_way(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rewind(self, name: str, step: int) -> None:
        """Drop the rows of later steps than ``step``, which are about to be made again."""
        path = self.path / name
        rows = whole_lines(path, ("step",))
        if strange := [row["step"] for row in rows if not isinstance(row["step"], int | float)]:
            raise UserError(f"{path}: 'step' must be a number, not {type(strange[0]).__name__}; the file is damaged")
        rows = [row for row in rows if row["step"] <= step]
        if path.exists():
            self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run, all at once."""
        with on_the_way(self.path / name):
            write_atomic(self.path / name, text)

    def finish(self, samples: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Write the samples in their final order, then the result."""
        self.write(self.samples_path.name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
        self.conclude(result)

    def conclude(self, result: dict[str, Any]) -> None:
        """Write the result: the run is finished."""
        self.write("result.json", to_json(result))


def _flat(identity: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Return settings with those of settings within them as entries of their own, as in ``evaluate.limit``."""
    return {
        name: value
        for key, inner in identity.items()
        for name, value in (
            _flat(inner, f"{place}{key}.").items() if isinstance(inner, dict) and inner else [(f"{place}{key}", inner)]
        )
    }


def whole_lines(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that was cut off while being written is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with on_the_way(path), path.open("r+b") as file:
            file.truncate(whole)
    return [row for _, row in read_jsonl(path, columns)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
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


def settled(
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

    Names, sizes, and the first and last MiB of weights, settings, templates and tokenizer: cheap for large models.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:12]
