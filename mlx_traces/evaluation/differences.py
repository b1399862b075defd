"""What runs were made with, side by side: versions, device, weights, prompt texts, files. No MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

from mlx_traces.runtime.fingerprints import doubt
from mlx_traces.text import clean

LIBRARIES = ("mlx-traces", "mlx", "mlx-lm", "transformers")  # of run.json's versions, those that can move a result
SAMPLING = ("top_p", "top_k", "min_p")  # which greedy decoding ignores
STOPS = "whether stop strings end thoughts differs"
FILES = ("model_files", "revision", "adapter_files")


def differences(abouts: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing in which runs were made differently, by the run's names.

    What a table shows itself is left out (model, adapter, prompt's name), as are the settings of `comparison.PROTOCOL`.
    A run that says nothing of a thing is not held to it.

    Args:
        abouts: the content of each run's ``run.json``, by the run's name; empty where there is none.
    """
    known = {name: about for name, about in abouts.items() if isinstance(about, dict) and about}
    versions = {name: _versions(about) for name, about in known.items()}
    moved = [library for library in LIBRARIES if len({own[library] for own in versions.values()} - {None}) > 1]
    told = {name: ", ".join(f"{key} {own[key]}" for key in moved if own[key]) for name, own in versions.items()}
    lines = _line("versions differ", told)
    graders = {name: f"version {_text(about.get('grader', 1))}" for name, about in known.items()}
    lines += _line("graders' rules differ", graders)
    lines += _line("device differs", {name: _device(about) for name, about in known.items()})
    lines += _line("weights differ", {name: _weights(about) for name, about in known.items()})
    asked = {name: _part(about, "identity") for name, about in known.items()}
    for key in SAMPLING:
        drawn = {name: own for name, own in asked.items() if own.get("temperature")}
        lines += _line(f"{key} differs", {name: _text(own.get(key)) for name, own in drawn.items()})
    lines += _line(
        "thinking switch differs",
        {name: str(own["thinking"]) for name, own in asked.items() if own.get("thinking") is not None},
    )
    for key, what in (("template_args", "variables of the chat template differ"), ("stop_in_thoughts", STOPS)):
        if any(own.get(key) for own in asked.values()):
            lines += _line(what, {name: _text(own.get(key) or "unset") for name, own in asked.items()})
    lines += _line("date in the prompts differs", {name: _text(own.get("date")) for name, own in asked.items()})
    lines += _alike("prompt", asked, lambda own: _text(_part(own, "prompt").get("name")), _prompt)
    lines += _alike("model", asked, _model, lambda own: {key: own.get(key) for key in FILES})
    return [clean(line) for line in lines]


def _line(what: str, values: Mapping[str, str]) -> list[str]:
    """Return the line that says who has which value, if there are several; empty values are not known."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        if value:
            groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return []
    return [f"{what}: {'; '.join(f'{value} in {_names(names)}' for value, names in groups.items())}"]


def _alike(
    what: str,
    settings: Mapping[str, dict[str, Any]],
    name_of: Callable[[dict[str, Any]], str],
    content_of: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[str]:
    """Return a line for each name that stands for several contents."""
    lines = []
    for shown in dict.fromkeys(filter(None, map(name_of, settings.values()))):
        own = {name: content_of(one) for name, one in settings.items() if name_of(one) == shown}
        keys = dict.fromkeys(key for content in own.values() for key in content)
        parts = [key for key in keys if len({repr(content.get(key)) for content in own.values()}) > 1]
        if parts:
            groups: dict[str, list[str]] = {}
            for name, content in own.items():
                groups.setdefault(repr([content.get(key) for key in parts]), []).append(name)
            apart = " than in ".join(map(_names, groups.values()))
            pairs = [(a.get(key), b.get(key)) for key in parts for a, b in combinations(own.values(), 2)]
            reasons = [doubt(*pair) for pair in pairs if pair[0] != pair[1]]
            sure = f"is another one ({', '.join(parts)})"
            lines.append(f"{what} {shown} {sure if '' in reasons else f'may be another one ({reasons[0]})'} in {apart}")
    return lines


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := content.get(key), dict) else {}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _versions(about: dict[str, Any]) -> dict[str, str | None]:
    """Return the versions by library; this package's with its revision, as it changes between releases."""
    found = _part(about, "versions")
    own = {library: _text(found.get(library)) or None for library in LIBRARIES}
    if revision := about.get("git_revision"):
        own["mlx-traces"] = f"{own['mlx-traces'] or ''} at {revision}".strip()
    return own


def _device(about: dict[str, Any]) -> str:
    return _text(_part(about, "backend").get("description")).partition(",")[0]


def _weights(about: dict[str, Any]) -> str:
    own = _part(about, "identity")
    return f"{own['weights']} {own.get('dtype') or 'as in the folder'}" if own.get("weights") else ""


def _prompt(own: dict[str, Any]) -> dict[str, Any]:
    return {f"its {key}": value for key, value in _part(own, "prompt").items() if key != "name"}


def _model(own: dict[str, Any]) -> str:
    return "+".join(_text(own[key]) for key in ("model", "adapter") if own.get(key))
