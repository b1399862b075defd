"""Run folders: settings (``run.json``), samples as they finish (``samples.jsonl``), ``result.json``. No MLX."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.readers import is_number, parse_row, read_json, read_jsonl
from mlx_traces.runtime.files import on_the_way, to_json, write_atomic
from mlx_traces.runtime.fingerprints import doubt
from mlx_traces.runtime.provenance import ids_digest, provenance

SAMPLE_COLUMNS = (
    *("id", "sample", "question", "tokens", "finish_reason", "extracted", "extractions", "verdicts", "gold", "correct"),
    *("verdict", "stratum", "elapsed"),
)
_UNNOTED = "not noted by an older version"
NOTED_SINCE = {  # entries of an identity that earlier versions did not store, and what an error says about that
    "shown": _UNNOTED,
    "held_out": _UNNOTED,
    "stops": "an older version let stop strings end thoughts too",
}
WAY_OUT = {"run.json": "name a folder that eval, sft, grpo or ppo wrote", "result.json": "finish the run with --resume"}


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @property
    def samples_path(self) -> Path:
        """The file of finished samples, one JSON object per line."""
        return self.path / "samples.jsonl"

    @property
    def begun(self) -> bool:
        """Whether ``run.json`` is written."""
        return (self.path / "run.json").exists()

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.path / "result.json").exists()

    @property
    def about(self) -> dict[str, Any]:
        """The content of ``run.json``: settings, versions, device, fingerprints; empty before the run begins."""
        return read_json(self.path / "run.json") if self.begun else {}

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of ``result.json``; None until the run is finished."""
        return read_json(self.path / "result.json") if self.finished else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` so far, each with its ``step``; an evaluation has none."""
        return lines_so_far(self.path / "metrics.jsonl", ("step",))

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The samples of a finished evaluation; UserError if the file is missing or a line is not a sample."""
        return [row for _, row in read_jsonl(self.samples_path, SAMPLE_COLUMNS)]

    def refuse(self, resume: bool) -> None:
        """Raise UserError if a run cannot be written here; nothing is changed."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")
        # Hidden files do not count: a killed process leaves a temporary one.
        used = self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir())
        if used and not resume:
            raise UserError(
                f"{self.path} exists; pass --resume to continue it, or choose another --out "
                "(in Python: resume=True, or another out)"
            )
        if used and not self.begun:
            raise UserError(f"{self.path} is not a run folder, it has no run.json; choose another --out")

    def recover(self, identity: dict[str, Any], idle: Collection[str] = ()) -> list[dict[str, Any]]:
        """Return the finished samples of a run to continue; an incomplete last line is removed from the file.

        Raises:
            UserError: if the run was started with another identity, or a line is broken.
        """
        self.check(identity, idle)
        return whole_lines(self.samples_path, SAMPLE_COLUMNS)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as stored when the run began; empty before that.

        It has every setting except the ``MAY_CHANGE`` of its class in `config`, and fingerprints of files. It is built
        by `evaluator.Plan.identity` and `loop.identity_of`.
        """
        stored = self.about.get("identity") if self.begun else {}
        if not isinstance(stored, dict):
            raise UserError(f"{self.path / 'run.json'}: 'identity' is missing; the file is damaged")
        return stored

    def check(self, identity: dict[str, Any], idle: Collection[str] = ()) -> None:
        """Raise UserError if the run was started with another identity; keys in ``idle`` may differ."""
        if not self.begun:
            return
        stored = self.identity
        if changes := differences(stored, identity, idle):
            raise UserError(
                f"{self.path} was started with other settings ({'; '.join(changes)}); "
                "repeat those, or choose another --out"
            )
        if unsure := doubts(stored, identity):
            raise UserError(
                f"{self.path} cannot be continued, since its files may have changed ({'; '.join(unsure)}); "
                "choose another --out"
            )

    def begin(
        self,
        identity: dict[str, Any],
        config: dict[str, Any],
        files: Mapping[str, str | None] | None = None,
        ids: Mapping[str, Iterable[str]] | None = None,
        **details: Any,
    ) -> None:
        """Make the folder and write ``run.json``, which says how the run is made; do nothing if it exists.

        Args:
            identity: what decides the result.
            config: every setting as it is used, as JSON values.
            files: fingerprints of the loaded ``model`` and its ``adapter``; None for a model behind a server.
            ids: the ids of problems or traces, in order, each list under the name of its use.
            **details: further entries, such as the device.
        """
        if self.begun:
            return
        digests = {name: ids_digest(listed) for name, listed in (ids or {}).items()}
        about = {"identity": identity, **provenance(), **details, "config": config}
        about["fingerprints"] = {"model": None, "adapter": None, **(files or {}), **digests}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "run.json", to_json(about))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from None

    def reopen(self) -> None:
        """Remove the result, since a run that gets more samples is not finished."""
        with on_the_way(self.path / "result.json"):
            (self.path / "result.json").unlink(missing_ok=True)

    def log(self, name: str, *rows: dict[str, Any]) -> None:
        """Append rows to a file of JSON lines; they stay if the process is killed after this returns."""
        path = self.path / name
        with on_the_way(path), path.open("a", encoding="utf-8") as file:
            file.write(_json_lines(rows))

    def rewind(self, name: str, step: int) -> None:
        """Remove the rows of steps after ``step``, which will be run again."""
        path = self.path / name
        rows = [row for row in lines_so_far(path, ("step",)) if row["step"] <= step]
        if path.exists():
            self.write(name, _json_lines(rows))

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run atomically."""
        with on_the_way(self.path / name):
            write_atomic(self.path / name, text)

    def finish(self, samples: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Write the samples in their final order, then the result."""
        self.write(self.samples_path.name, _json_lines(samples))
        self.conclude(result)

    def conclude(self, result: dict[str, Any]) -> None:
        """Write the result, which marks the run as finished."""
        self.write("result.json", to_json(result))


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _flat(identity: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Flatten nested settings; the keys of inner ones have the form ``evaluate.limit``."""
    return {
        name: value
        for key, inner in identity.items()
        for name, value in (
            _flat(inner, f"{place}{key}.").items() if isinstance(inner, dict) and inner else [(f"{place}{key}", inner)]
        )
    }


def differences(stored: dict[str, Any], identity: dict[str, Any], idle: Collection[str] = ()) -> list[str]:
    """Describe each difference between a stored identity and this one, except fingerprints in `doubts`."""
    stored, identity = _flat(stored), _flat(identity)
    return [
        f"{key} was {str(stored.get(key))[:60]}, now {str(identity.get(key))[:60]}"
        for key in dict.fromkeys((*stored, *identity))
        if stored.get(key) != identity.get(key)
        and key not in idle
        and not doubt(stored.get(key), identity.get(key))
        and (key in stored or key not in NOTED_SINCE)
    ]


def doubts(stored: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Name the fingerprints that do not show whether their files are the same, and say why."""
    reasons = {key: doubt(stored.get(key), identity.get(key)) for key in stored}
    reasons |= {key: why for key, why in NOTED_SINCE.items() if key in identity and key not in stored}
    return [f"{key}: {reason}" for key, reason in reasons.items() if reason]


def existing(path: str | Path, *files: str) -> RunFolder:
    """Return an existing run folder that has ``files``; UserError if the folder or a file is missing."""
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{path}: no such run folder")
    for name in files:
        if not (folder.path / name).exists():
            raise UserError(f"{path}: no {name}; {WAY_OUT[name]}")
    return folder


def whole_lines(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read JSON lines as `lines_so_far` does, and remove an incomplete last line from the file."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with on_the_way(path), path.open("r+b") as file:
                file.truncate(whole)
    return lines_so_far(path, columns)


def lines_so_far(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the complete lines of a file of JSON lines that may still be written to; none if there is no file.

    Raises:
        UserError: at a complete line that is no JSON object, lacks a column, or has a step that is no number.
    """
    try:
        content = path.read_bytes()
        text = content[: content.rfind(b"\n") + 1].decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(parse_row(line, f"{path}:{number}", columns, finite=False))
            if "step" in columns and not is_number(step := rows[-1]["step"]):
                kind = type(step).__name__
                raise UserError(f"{path}:{number}: 'step' must be a number, not {kind}; the file is damaged")
    return rows


def judged(row: Mapping[str, Any]) -> float | None:
    """Return the validation score in a line of metrics, higher is better: accuracy, else minus the loss, else None."""
    return row.get("valid/accuracy", -row["valid/loss"] if "valid/loss" in row else None)


def best_of(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the line with the best validation, the first of equal ones; None if no line has one."""
    return max((row for row in rows if judged(row) is not None), key=judged, default=None)
