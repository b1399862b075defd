"""LoRA and DoRA adapters in mlx_lm's format, put on a model unfused. MLX is imported only to do that."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_traces.errors import UserError, choices, first_line

if TYPE_CHECKING:
    import mlx.nn as nn

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
KINDS = ("lora", "dora", "full")


def attach(model: "nn.Module", folder: str | Path) -> "nn.Module":
    """Put the adapter of ``folder`` on ``model``, dense or quantized, and return it.

    The base weights stay as they are: fusing into a 4-bit base rounds a small adapter away. An adapter of
    type ``full`` replaces the weights that it names.

    Raises:
        UserError: if the folder has no mlx_lm adapter, or one that was made for another model: a tensor that
            the model has no place for, one of another shape, or one that its layers need and the file lacks.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = Path(folder)
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    try:
        weights = mx.load(str(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({first_line(error)})") from None
    if kind != "full":
        try:
            linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=kind == "dora")
        except Exception as error:  # mlx_lm meets a wrong setting with whatever its code runs into
            message = f"does not describe an adapter for this model ({first_line(error)})"
            raise UserError(f"{folder / CONFIG}: {message}") from None
    places = dict(tree_flatten(model.parameters()))
    needed = set() if kind == "full" else {name for name in places if name.endswith((".lora_a", ".lora_b", ".m"))}
    faults = {
        "not in the model": [name for name in weights if name not in (needed or places)],
        "missing from the file": [name for name in sorted(needed) if name not in weights],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(places[name].shape)}"
            for name in weights
            if name in places and weights[name].shape != places[name].shape
        ],
    }
    if not needed and kind != "full":
        raise UserError(f"{folder}: no layer of this model takes the adapter; was it made for another one?")
    if any(faults.values()):
        summary = "; ".join(f"{len(names)} tensors {what}, e.g. {names[0]}" for what, names in faults.items() if names)
        raise UserError(f"{folder}: the adapter does not fit this model ({summary})")
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's settings; the folder is checked as far as that goes without its weights.

    Raises:
        UserError: if it is no mlx_lm adapter, or a setting is of the wrong kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder")
    if (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder}: a PEFT adapter; only mlx_lm's format ({CONFIG} and {WEIGHTS}) is read")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"{folder}: not an adapter folder, {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: expected a JSON object, not a {type(config).__name__}")
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise UserError(f"{folder / CONFIG}: 'fine_tune_type' is {choices(KINDS)}, not {_shown(kind)}")
    if kind != "full":
        _check_settings(config, f"{folder / CONFIG}")
    return config


def _check_settings(config: dict[str, Any], where: str) -> None:
    for name in ("num_layers", "lora_parameters"):
        if name not in config:
            raise UserError(f"{where}: {name!r} is missing; is this mlx_lm's format?")
    settings = config["lora_parameters"]
    if not isinstance(settings, dict):
        raise UserError(f"{where}: 'lora_parameters' must be an object of rank, scale, dropout, not {_shown(settings)}")
    for name, value, right, what in (
        ("num_layers", config["num_layers"], _is_whole, "a whole number"),
        ("rank", settings.get("rank"), lambda value: _is_whole(value) and value > 0, "a whole number above 0"),
        ("scale", settings.get("scale"), _is_number, "a number"),
        ("dropout", settings.get("dropout"), lambda value: _is_number(value) and 0 <= value < 1, "a number, 0 to 1"),
        ("keys", settings.get("keys"), _are_names, "a list of layer names"),
    ):
        if name == "scale" and value is None and "alpha" in settings:
            raise UserError(f"{where}: 'scale' is missing; mlx_lm does not read 'alpha', give scale = alpha / rank")
        if not right(value):
            found = "it is missing" if value is None else f"not {_shown(value)}"
            raise UserError(f"{where}: {name!r} must be {what}, {found}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
