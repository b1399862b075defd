"""Fingerprints of model and adapter folders, and how to compare two of them. No MLX."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
MIB = 1 << 20
SMALL = 2 * MIB  # bytes; the first form of fingerprints read the first and last MiB of a file: all of a small one
WHOLE = 512 * MIB  # bytes; larger files are not read whole
BLOCKS = 512  # of a MiB each, evenly spread over a file that is not read whole

_FORM = re.compile(r"(?:(2-)?([0-9a-f]{12}))(?:-[0-9a-f]{6})?")


def fingerprint(folder: Path) -> str:
    """Return a text that changes with a model's or adapter's files: weights, settings, templates and tokenizer.

    It has one of three forms: 12 hexadecimal digits, the form of older versions, if no file exceeds 2 MiB; ``2-`` and
    12 digits if every file was read whole; and 6 digits more, for dates, if a file exceeds 512 MiB. Of such a file the
    size, the date and 512 blocks of 1 MiB are read.
    """
    digest, dates, large = hashlib.sha256(), "", False
    found = (path for pattern in MODEL_FILES for path in folder.glob(pattern))
    for path in sorted(path for path in found if path.is_file()):
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} ".encode())
        large |= about.st_size > SMALL
        if about.st_size > SMALL:
            digest.update(_content(str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))
        else:
            content = path.read_bytes()
            digest.update(content[:MIB] + content[max(0, len(content) - MIB) :])
        if about.st_size > WHOLE:
            dates += f"{path.name} {about.st_mtime_ns} "
    dated = f"-{hashlib.sha256(dates.encode()).hexdigest()[:6]}" if dates else ""
    return f"{'2-' if large else ''}{digest.hexdigest()[:12]}{dated}"


@lru_cache(maxsize=1024)
def _content(path: str, size: int, *_: int) -> bytes:
    """Return a digest of a large file's content; it is computed again only if its size or dates change."""
    with Path(path).open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256()
        for index in range(BLOCKS):
            file.seek((size - MIB) * index // (BLOCKS - 1))
            digest.update(file.read(MIB))
        return digest.digest()


def doubt(one: Any, other: Any) -> str:
    """Say why two different fingerprints may be of the same files; an empty text if they cannot be."""
    forms = [_FORM.fullmatch(text) if isinstance(text, str) else None for text in (one, other)]
    if None in forms or one == other:
        return ""
    if forms[0][1] != forms[1][1]:
        return "noted by an older version, which read only the first and last MiB of a file"
    return "large files have other dates, and only parts of them are read" if forms[0][2] == forms[1][2] else ""
