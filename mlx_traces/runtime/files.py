"""Atomic writes of files and folders, and locks."""

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.runtime.provenance import now

TRIES = 100  # to make a lock's folder, which another process may remove at that moment


@cache
def machine() -> str:
    """Return this machine's name; a Mac's local one, as the other one changes with the network."""
    name = ""
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            asked = ["scutil", "--get", "LocalHostName"]
            name = subprocess.run(asked, capture_output=True, text=True, timeout=5).stdout.strip()
    return name or platform.node()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` atomically when the context ends without an error.

    The file is synced to the disk before the rename, and the rename before this returns. After an error the temporary
    file is removed; temporary files that killed processes left for the same path are removed first.
    """
    for left in leftovers(path):
        with suppress(OSError):
            left.unlink()
    scratch = path.with_name(f".{os.getpid()}-{machine()}.tmp-{path.name}")
    try:
        yield scratch
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink()


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files for ``path`` that processes of this machine left when they were killed."""
    mark = f"-{machine()}.tmp-{path.name}"
    temporary = [file for file in path.parent.glob(".*") if file.name.endswith(mark)]
    return [file for file in temporary if not is_alive(file.name.removesuffix(mark)[1:])]


def is_alive(number: str) -> bool:
    """Whether a process of this number exists; True for a text that is no number, as nothing is known about it."""
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
    """Wait until a file, or a folder's list of files, is on the disk; not all file systems sync folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content atomically: temporary file, fsync, rename."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def on_the_way(path: Path, again: str = "go on with --resume") -> Iterator[None]:
    """Turn an OSError in the context into one line: the file that cannot be written, and how to continue the run.

    The existing file is left intact.
    """
    try:
        yield
    except OSError as error:
        first = {errno.ENOSPC: "make room", errno.EDQUOT: "make room"}.get(error.errno or 0, "make it writable")
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {first}, then {again}") from None


def refuse_existing(path: Path) -> None:
    """Raise UserError if a file exists, or none can have its name."""
    try:
        if path.exists():
            raise UserError(f"{path} exists; remove it, or choose another --out")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def write_new(path: Path, text: str) -> None:
    """Write a new file and the folders above it; UserError if it exists or cannot be written."""
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def scratch_folder(out: Path) -> Path:
    """Make an empty temporary folder beside ``out``, for `put_in_place` to rename.

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
    except (OSError, ValueError) as error:  # a ValueError for a path without a name, such as /
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(out)[:200]} cannot be written ({why}); choose another --out") from None
    return scratch


def put_in_place(scratch: Path, out: Path) -> None:
    """Sync a finished folder's files to the disk, and rename it to ``out``."""
    for path in scratch.rglob("*"):
        sync(path)
    sync(scratch)
    scratch.rename(out)
    sync(out.parent)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Lock a run against other processes while the context lasts, by the file ``lock`` beside its files.

    The file names the owner; the lock itself is the system's (``flock``), which ends with its process however that
    ends. So one process takes over the lock file that a killed process left, even if another now has that one's number.

    Raises:
        UserError: if another process holds it, or may do so on another machine; if the file cannot be written.
    """
    made = [folder for folder in lock.parents if not folder.exists()]

    def tidy() -> None:
        with suppress(OSError):  # one of them is not empty
            for folder in made:
                folder.rmdir()

    try:
        descriptor = _take(lock)
    except OSError as error:
        tidy()
        raise UserError(f"{lock.parent}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be read-only by now; closing the file ends the lock anyway
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        tidy()


def _take(lock: Path) -> int:
    """Take a lock for this process; return its open file."""
    while True:
        descriptor = _open(lock)
        try:
            free = _try_lock(descriptor)
            if free and not _is_at(lock, descriptor):
                os.close(descriptor)  # its owner finished and removed it after we opened it
                continue
            _refuse_owner(lock, free)
            owner = to_json({"pid": os.getpid(), "host": machine(), "since": now()})
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


def _open(lock: Path) -> int:
    """Make a lock's folder and open its file; try again if a process that ends removes them at that moment."""
    for left in reversed(range(TRIES)):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):  # the second if the folder was removed while mkdir ran
            if not left:
                raise


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    """Lock a file; False if another process has. On a file system without locks this always succeeds."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
    return True


def _refuse_owner(lock: Path, free: bool) -> None:
    """Raise UserError if another process has the lock: it is not ``free``, or the file names another machine."""
    try:
        owner = json.loads(lock.read_text())
        host, holder = owner["host"], f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # a new file, or one whose owner was killed while writing it
        host, holder = machine(), "another process"
    if not free:
        raise UserError(f"{lock.parent} is in use by {holder}; wait until that has ended, or choose another --out")
    if host != machine():
        raise UserError(f"{lock.parent} is in use by {holder}; if that has ended, remove {lock}")


def to_json(value: Any) -> str:
    """Return indented JSON that ends with a newline."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
