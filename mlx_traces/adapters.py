"""LoRA and DoRA adapters in mlx_lm's format, put on a model unfused."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_traces.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def attach(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of ``folder`` on ``model``, dense or quantized, and return it.

    The base weights stay as they are: fusing into a 4-bit base rounds a small adapter away. An adapter of
    type ``full`` replaces the weights that it names.

    Raises:
        UserError: if the folder has no mlx_lm adapter, or one that was made for another model: a tensor that
            the model has no place for, one of another shape, or one that its layers need and the file lacks.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = Path(folder)
    config = _read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    try:
        weights = mx.load(str(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from None
    if kind != "full":
        try:
            linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=kind == "dora")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / CONFIG}: does not describe an adapter for this model ({error})") from None
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


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder")
    if (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder}: a PEFT adapter; only mlx_lm's format ({CONFIG} and {WEIGHTS}) is read")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"{folder}: not an adapter folder, {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: expected a JSON object, not a {type(config).__name__}")
    for name in () if config.get("fine_tune_type") == "full" else ("num_layers", "lora_parameters"):
        if name not in config:
            raise UserError(f"{folder / CONFIG}: {name!r} is missing; is this mlx_lm's format?")
    return config
