"""Differences in how runs were made: versions, device, weights, prompt texts, files. No MLX."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from mlx_traces.runtime.fingerprints import doubt
from mlx_traces.text import clean

LIBRARIES = ("mlx-traces", "mlx", "mlx-lm", "transformers")  # those of run.json that can change a result
SAMPLING = ("top_p", "top_k", "min_p")  # greedy decoding ignores them
OPTIONAL = {  # settings that a run stores only if they are set
    "template_args": "variables of the chat template differ",
    "stop_in_thoughts": "whether stop strings end thoughts differs",
    "think_more": "what continues a thought differs",
    "think_then": "what follows a closed thought differs",
}
FILES = ("model_files", "revision", "adapter_files")


def differences(abouts: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that differs between runs, with the names of the runs.

    It ignores what a table itself shows (model, adapter, the prompt's name), the settings of `comparison.PROTOCOL`, and
    entries that a run does not store.

    Args:
        abouts: the content of each run's ``run.json``, by the run's name; empty if there is none.
    """
    known = {name: about for name, about in abouts.items() if isinstance(about, dict) and about}
    settings = {name: part(about, "identity") for name, about in known.items()}
    versions = {name: versions_of(about) for name, about in known.items()}
    changed = [library for library in LIBRARIES if len({each[library] for each in versions.values()} - {None}) > 1]
    shown = {name: ", ".join(f"{key} {each[key]}" for key in changed if each[key]) for name, each in versions.items()}
    lines = line_of("versions differ", shown)
    graders = {name: f"version {text(about.get('grader', 1))}" for name, about in known.items()}
    lines += line_of("graders' rules differ", graders)
    devices = {name: text(part(about, "backend").get("description")).partition(",")[0] for name, about in known.items()}
    lines += line_of("device differs", devices)
    lines += line_of(
        "weights differ",
        {
            name: f"{each['weights']} {each.get('dtype') or 'as in the folder'}" if each.get("weights") else ""
            for name, each in settings.items()
        },
    )
    drawn = {name: each for name, each in settings.items() if each.get("temperature")}
    for key in SAMPLING:
        lines += line_of(f"{key} differs", {name: text(each.get(key)) for name, each in drawn.items()})
    switches = {name: each["thinking"] for name, each in settings.items() if "thinking" in each}
    switches = {name: "the template's own" if switch is None else text(switch) for name, switch in switches.items()}
    lines += line_of("thinking switch differs", switches)
    for key, what in OPTIONAL.items():
        if any(each.get(key) for each in settings.values()):
            lines += line_of(what, {name: text(each.get(key) or "unset") for name, each in settings.items()})
    lines += line_of("date in the prompts differs", {name: text(each.get("date")) for name, each in settings.items()})
    prompts = {name: part(each, "prompt") for name, each in settings.items()}
    lines += namesakes(
        "prompt",
        {name: text(prompt.get("name")) for name, prompt in prompts.items()},
        {name: {f"its {key}": prompt[key] for key in prompt if key != "name"} for name, prompt in prompts.items()},
    )
    lines += namesakes(
        "model",
        {
            name: "+".join(text(each[key]) for key in ("model", "adapter") if each.get(key))
            for name, each in settings.items()
        },
        {name: {key: each.get(key) for key in FILES} for name, each in settings.items()},
    )
    return [clean(line) for line in lines]


def line_of(what: str, values: Mapping[str, str]) -> list[str]:
    """Return a line that lists the runs of each value; none if all values are equal. Empty values are left out."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        if value:
            groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return []
    shown = (f"{value} in {', '.join(names)}" for value, names in groups.items())
    return [f"{what}: {'; '.join(shown)}"]


def namesakes(what: str, named: Mapping[str, str], contents: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return a line for each name that has different contents in different runs.

    Args:
        what: the kind of thing: prompt, model.
        named: the thing's name in each run, by the run's name; empty if the run has none.
        contents: the thing's content in each run.
    """
    lines = []
    for shown in dict.fromkeys(filter(None, named.values())):
        same = {name: contents[name] for name in named if named[name] == shown}
        keys = dict.fromkeys(key for content in same.values() for key in content)
        parts = [key for key in keys if len({repr(content.get(key)) for content in same.values()}) > 1]
        if parts:
            groups: dict[str, list[str]] = {}
            for name, content in same.items():
                groups.setdefault(repr([content.get(key) for key in parts]), []).append(name)
            apart = " than in ".join(map(", ".join, groups.values()))
            pairs = [(a.get(key), b.get(key)) for key in parts for a, b in combinations(same.values(), 2)]
            reasons = [doubt(*pair) for pair in pairs if pair[0] != pair[1]]
            sure = f"is another one ({', '.join(parts)})"
            lines.append(f"{what} {shown} {sure if '' in reasons else f'may be another one ({reasons[0]})'} in {apart}")
    return lines


def part(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object within an object; an empty one if it is missing or not an object."""
    return value if isinstance(value := content.get(key), dict) else {}


def text(value: Any) -> str:
    """Return a value as text; None is empty."""
    return "" if value is None else str(value)


def versions_of(about: dict[str, Any]) -> dict[str, str | None]:
    """Return the versions by library; this package's with its git revision, since it changes between releases."""
    stored = part(about, "versions")
    versions = {library: text(stored.get(library)) or None for library in LIBRARIES}
    if revision := about.get("git_revision"):
        versions["mlx-traces"] = f"{versions['mlx-traces'] or ''} at {revision}".strip()
    return versions
