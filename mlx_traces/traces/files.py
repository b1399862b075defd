r"""Read and write files of traces and their manifests. No MLX.

The normal form of a completion is ``<think>\n{thought}\n</think>\n{solution}``; ``<answer>…</answer>``, ``\boxed{}``
and ``####`` stay in the solution.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.readers import listed, read_json, read_jsonl
from mlx_traces.records import Problem, Trace
from mlx_traces.runtime.files import leftovers, replacing, sync, to_json
from mlx_traces.runtime.provenance import ids_digest, provenance

NUMBER = (int, float)
FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("task", "prompt", "source", "finish_reason", "stop_string", "verdict"), ("a text", (str,))),
    **dict.fromkeys(("columns", "scores"), ("an object", (dict,))),
    **dict.fromkeys(("completion_ids", "logprobs", "not_learned", "forced"), ("a list of numbers", (list,))),
    "forced_text": ("a list of pairs", (list,)),
    "sample": ("a whole number", (int,)),
    "score": ("a number", NUMBER),
}


def read_traces(path: Path) -> Iterator[tuple[str, Trace]]:
    """Yield (``file:line``, trace) of a JSON-lines file; UserError at the first line that is not a trace."""
    for where, row in read_jsonl(Path(path)):
        if missing := [name for name in ("id", "messages", "completion") if name not in row]:
            raise UserError(
                f"{where}: {missing[0]!r} is missing; this row has {listed(row)}; "
                "`mlx-traces data import` reads rows of another form"
            )
        row = {name: value for name, value in row.items() if value is not None or name not in FIELDS}
        for name, (kind, types) in FIELDS.items():
            if row.get(name) is not None and (not isinstance(row[name], types) or isinstance(row[name], bool)):
                raise UserError(f"{where}: {name!r} must be {kind}, not {type(row[name]).__name__}")
        forced = {place for place in row.get("forced") or () if type(place) is int}
        for name in ("completion_ids", "logprobs", "forced"):
            missing = [place for place, value in enumerate(row.get(name) or ()) if not isinstance(value, NUMBER)]
            if missing and not (name == "logprobs" and forced.issuperset(missing)):
                raise UserError(f"{where}: {name!r} must be a list of numbers")
        turns = len(row["messages"]) if isinstance(row["messages"], list) else 0
        if not all(type(value) is int and 0 <= value < turns for value in row.get("not_learned") or ()):
            raise UserError(f"{where}: 'not_learned' must be numbers of messages, from 0 to {turns - 1}")
        length = len(row["completion"]) if isinstance(row["completion"], str) else 0
        for span in row.get("forced_text") or ():
            if not (isinstance(span, list) and [*map(type, span)] == [int, int] and 0 <= span[0] <= span[1] <= length):
                raise UserError(f"{where}: 'forced_text' must be pairs of places in the completion, 0 to {length}")
        if not all(value is None or isinstance(value, NUMBER) for value in row.get("scores", {}).values()):
            raise UserError(f"{where}: 'scores' must be numbers or null, by name")
        yield where, Trace.from_row(row, where)


def write_traces(path: Path, traces: Iterable[Trace], manifest: dict[str, Any]) -> int:
    """Write a new file of traces and its manifest; return the number of traces. The file appears when it is complete.

    Args:
        path: ``NAME.jsonl``; its folders are made.
        traces: may be a generator; it is not started if the file exists.
        manifest: ``source``, the origin: a file (add its hash by `source_of`), a data set or a model; ``config``, every
            setting; ``counts``, the skipped traces by reason; ``seed``, None if nothing is random. Optional:
            ``models``, those used, as `LoadedModel.about` describes them, and ``problems``, of whose ids a fingerprint
            is stored. Counts and models are read at the end, so a generator may add to them; ``written`` is added as
            the first count.

    Raises:
        UserError: if the file or its manifest exists, it cannot be written, or there are no traces.
    """
    path, written = Path(path), 0
    refuse_written(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(manifest_path(path)) as about, replacing(path) as scratch:  # renamed from right to left
            with scratch.open("w", encoding="utf-8") as file:
                for written, trace in enumerate(traces, 1):  # noqa: B007
                    row = {"id": trace.id, "messages": trace.messages, "completion": trace.completion, **trace.to_row()}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not written:
                raise UserError(
                    f"{path}: there are no traces to write; counted: {counted(manifest['counts']) or 'nothing'}"
                )
            own = {**manifest, "counts": {"written": written, **manifest["counts"]}}
            about.write_text(to_json(_manifest(path.name, _sha256(scratch), **own)), encoding="utf-8")
            sync(about)
    except OSError as error:
        with suppress(OSError):
            discard_unfinished(path)  # this call has made it
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return written


def refuse_written(path: Path) -> None:
    """Raise UserError if a file of traces or its manifest exists, or the path has no name.

    A writer that was killed after it renamed the file leaves the manifest as a temporary file; if that has the file's
    hash, it is renamed here.
    """
    refuse_nameless(path)
    try:
        if path.exists() and not manifest_path(path).exists():
            for left in leftovers(manifest_path(path)):
                with suppress(UserError):
                    if read_json(left).get("sha256") == _sha256(path):
                        left.replace(manifest_path(path))
                        break
        for file in (path, manifest_path(path)):
            if file.exists():
                raise UserError(f"{file} exists; remove it, or choose another --out")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def refuse_nameless(path: Path) -> None:
    """Raise UserError for the path of a folder that names no file: an empty text, ``.`` and ``/``."""
    if not path.name:
        raise UserError(f"{path} is a folder; name a file with --out, as in data/traces.jsonl")


def discard_unfinished(path: Path) -> None:
    """Remove a file that has no manifest: its writer was stopped between the two."""
    if not manifest_path(path).exists():
        Path(path).unlink(missing_ok=True)


def manifest_path(path: Path) -> Path:
    """Return ``NAME.manifest.json`` for ``NAME.jsonl``."""
    return Path(path).with_suffix(".manifest.json")


def _manifest(
    file: str,
    sha256: str,
    *,
    source: str,
    config: dict[str, Any],
    counts: dict[str, Any],
    seed: int | None,
    source_sha256: str | None = None,
    models: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    problems: Iterable[Problem] = (),
) -> dict[str, Any]:
    """Describe a file of traces and how it was made."""
    made = provenance()
    read = {"source_sha256": source_sha256} if source_sha256 else {}
    read |= {"problems": ids_digest(own)} if (own := [problem.id for problem in problems]) else {}
    read |= {"models": dict(models)} if models else {}
    return {
        "file": file,
        "sha256": sha256,
        "source": source,
        **read,
        "command": made["command"],
        "seed": seed,
        "counts": counts,
        "config": config,
        "config_hash": config_hash(config),
        "versions": made["versions"],
        "git_revision": made["git_revision"],
        "platform": made["platform"],
        "time": made["started"],
    }


def source_of(source: str | Path) -> dict[str, str]:
    """Return a manifest's entries for a source: its name and, for a file, the hash of its present content.

    A pipe gets no hash, since it can be read only once.
    """
    try:
        return {"source": str(source)} | ({"source_sha256": _sha256(Path(source))} if Path(source).is_file() else {})
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def manifest_of(path: Path) -> dict[str, Any]:
    """Return a file's manifest; UserError if there is none, or the file has changed since it was written."""
    manifest = read_json(manifest_path(path))
    try:
        same = manifest.get("sha256") == _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not same:
        raise UserError(f"{path} is not the file that its manifest describes; write it anew, or remove the manifest")
    return manifest


def config_hash(config: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits of the settings' hash; the order of the settings does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def counted(counts: dict[str, Any], name: str = "") -> str:
    """Format counts in one line: ``12 written, 3 skipped (no short trace)``; ``name`` is the word before the reason."""
    told = (
        counted(value, key) if isinstance(value, dict) else f"{value:,} {name} ({key})" if name else f"{value:,} {key}"
        for key, value in counts.items()
    )
    return ", ".join(filter(None, told))


def _sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
