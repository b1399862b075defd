"""The settings file of an adapter in mlx_lm's format, read and checked. No MLX."""

import json
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, choices
from mlx_traces.readers import is_number, parse_json, text_of

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
KINDS = ("lora", "dora", "full")


def own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename an adapter's settings, as `read_config` returns them, to the fields of ``AdapterConfig``."""
    own = {
        "kind": settings.get("fine_tune_type", "lora"),
        "layers": settings.get("num_layers"),
        **(settings.get("lora_parameters") or {}),
    }
    own["targets"] = own.pop("keys", None)
    return own


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check an adapter's settings; its weights are not read.

    Raises:
        UserError: if the folder has no mlx_lm adapter, or a setting is of the wrong kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder")
    if (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder}: a PEFT adapter; only mlx_lm's format ({CONFIG} and {WEIGHTS}) is read")
    where = folder / CONFIG
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"{folder}: not an adapter folder, {name} is missing")
    config = parse_json(text_of(where), str(where), several_lines=True)
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a JSON object, not a {type(config).__name__}")
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise UserError(f"{where}: 'fine_tune_type' is {choices(KINDS)}, not {_shown(kind)}")
    if kind == "full":
        return config
    for name in ("num_layers", "lora_parameters"):
        if name not in config:
            raise UserError(f"{where}: {name!r} is missing; is this mlx_lm's format?")
    settings = config["lora_parameters"]
    if not isinstance(settings, dict):
        raise UserError(f"{where}: 'lora_parameters' must be an object of rank, scale, dropout, not {_shown(settings)}")
    for name, value, right, what in (
        ("num_layers", config["num_layers"], _is_whole, "a whole number"),
        ("rank", settings.get("rank"), lambda value: _is_whole(value) and value > 0, "a whole number above 0"),
        ("scale", settings.get("scale"), is_number, "a number"),
        ("dropout", settings.get("dropout"), lambda value: is_number(value) and 0 <= value < 1, "a number, 0 to 1"),
        ("keys", settings.get("keys"), _are_names, "a list of layer names"),
    ):
        if name == "scale" and value is None and "alpha" in settings:
            raise UserError(f"{where}: 'scale' is missing; mlx_lm does not read 'alpha', give scale = alpha / rank")
        if not right(value):
            found = "it is missing" if value is None else f"not {_shown(value)}"
            raise UserError(f"{where}: {name!r} must be {what}, {found}")
    return config


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
