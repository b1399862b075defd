"""LoRA and DoRA adapters in mlx_lm's format: attach, train, save, switch off, merge. MLX is imported late."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_traces.config import AdapterConfig
from mlx_traces.errors import UserError, choices, first_line
from mlx_traces.readers import is_number, parse_json, text_of
from mlx_traces.runtime.files import on_the_way, replacing

if TYPE_CHECKING:
    import mlx.nn as nn


CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
BASE = "base"  # names the bare model where an adapter is asked for
KINDS = ("lora", "dora", "full")
ADDED = ("lora_a", "lora_b", "m")  # what an adapter adds to a layer: the low-rank pair, DoRA's magnitudes


def start(model: "nn.Module", config: AdapterConfig, folder: str | Path | None = None) -> dict[str, Any]:
    """Prepare a model for training: a new adapter, or that of ``folder``, already attached; the rest is frozen.

    A new adapter changes nothing yet (arXiv 2106.09685, section 4.1): its second matrix is 0, its first is drawn from
    MLX's random state. ``full`` trains the layers' own weights.

    Returns:
        The adapter's settings, as `save` writes them. A given adapter keeps its own.

    Raises:
        UserError: for a target that no layer has, quantized layers that ``full`` cannot train, or a setting that
            was given and differs from the adapter's.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_traces.models.lora import in_activations_type

    if not -1 <= config.layers <= len(model.layers) or config.layers == 0:
        raise UserError(f"layers: this model has {len(model.layers)}, not {config.layers}; -1 stands for all")
    model.freeze()
    settings: dict[str, Any] = {"fine_tune_type": config.kind, "num_layers": config.layers}
    if folder is not None:
        stored = read_config(Path(folder))
        settings = {
            "fine_tune_type": "lora",
            **{key: stored[key] for key in (*settings, "lora_parameters") if key in stored},
        }
        _refuse_changes(config, settings, folder)
    elif config.kind != "full":
        _check_targets(model, config)
        settings["lora_parameters"] = {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            **({"keys": list(config.targets)} if config.targets else {}),
        }
        dora = config.kind == "dora"
        try:
            linear_to_lora_layers(model, config.layers, settings["lora_parameters"], use_dora=dora)
        except ValueError as error:  # experts take no DoRA
            raise UserError(f"{first_line(error)} Set targets, or --kind lora") from None
    if settings["fine_tune_type"] == "full":
        layers = model.layers[-max(settings.get("num_layers", -1), 0) :]
        for layer in layers:
            if any("scales" in module for _, module in layer.named_modules()):
                raise UserError("full fine-tuning cannot train quantized weights; pass --weights dense, or --kind lora")
            layer.unfreeze()
    else:
        for _, module in model.named_modules():
            if "lora_a" in module:
                module.unfreeze(keys=[name for name in ADDED if name in module], recurse=False)
        in_activations_type(model)
    if not tree_flatten(model.trainable_parameters()):
        raise UserError("nothing to train: no layer takes the adapter; set layers or targets")
    return settings


def own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter's settings file, as `read_config` gives it, in the names of ``AdapterConfig``."""
    own = {
        "kind": settings.get("fine_tune_type", "lora"),
        "layers": settings.get("num_layers"),
        **(settings.get("lora_parameters") or {}),
    }
    own["targets"] = own.pop("keys", None)
    return own


def _refuse_changes(config: AdapterConfig, settings: dict[str, Any], folder: str | Path) -> None:
    """Raise UserError if a setting was given that is not the adapter's own."""
    own = own_settings(settings)
    for name in AdapterConfig.model_fields.keys() & config.model_fields_set:
        if name in own and getattr(config, name) != own[name]:
            given = getattr(config, name)
            raise UserError(
                f"{name} {given} is not that of {folder} ({own[name]}); leave it out, or start without adapter"
            )


def _check_targets(model: "nn.Module", config: AdapterConfig) -> None:
    """Raise UserError for a target that is no linear module of the layers, or of the model."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    experts = (SwitchLinear, QuantizedSwitchLinear)
    linear = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding, *experts)
    inside = {name for layer in model.layers for name, module in layer.named_modules() if isinstance(module, linear)}
    known = inside | {name for name, module in model.named_modules() if isinstance(module, linear)}
    for target in config.targets or ():
        if target not in known and not any(hasattr(layer, "to_lora") for layer in model.layers):
            raise UserError(f"targets: no module {target!r}; the layers have {', '.join(sorted(inside))}")


def save(model: "nn.Module", folder: Path, settings: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """Write what is trained as an adapter folder that `attach` and ``mlx_lm.load(adapter_path=)`` read.

    ``settings`` are as `start` returned them, ``about`` is further entries for ``adapter_config.json``: base model,
    data, versions.
    """
    from mlx.utils import tree_flatten

    from mlx_traces.runtime.files import on_the_way, to_json, write_atomic

    with on_the_way(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / WEIGHTS, dict(tree_flatten(model.trainable_parameters())))
    with on_the_way(folder / CONFIG):
        write_atomic(folder / CONFIG, to_json({**settings, **(about or {})}))


def _swap(model: "nn.Module", change: Any) -> Any:
    """Replace every adapted layer by ``change(layer)``; return a function that puts them back."""
    from mlx.utils import tree_unflatten

    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    model.update_modules(tree_unflatten([(name, change(module)) for name, module in adapted]))
    return lambda: model.update_modules(tree_unflatten(adapted))


@contextmanager
def switched_off(model: "nn.Module") -> Iterator[None]:
    """Switch the adapter off inside the context: the model is its base, without a second copy."""
    back = _swap(model, lambda layer: layer["linear"] if "linear" in layer else layer["embedding"])
    try:
        yield
    finally:
        back()


def reference(model: "nn.Module", folder: str | Path | None, used: bool = True) -> Callable[[], Any]:
    """Return a context in which the model is the reference: its adapter left out, or replaced by that of ``folder``.

    Its weights come with the scale that they were trained at; None and `BASE` stand for the bare model.

    Raises:
        UserError: if it is ``used`` and there is no adapter to leave out, or ``folder`` has none of the same kind and
            shapes.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    trained = dict(tree_flatten(model.trainable_parameters()))
    if folder in (None, BASE):
        if used and not any(name.endswith("lora_a") for name in trained):
            raise UserError("kl_coef: fully trained layers have no adapter to leave out; pass reference, or kl_coef 0")
        return lambda: switched_off(model)
    folder = Path(folder).expanduser()
    settings, arrays = read_config(folder), _read_weights(folder)
    kind, own = settings.get("fine_tune_type", "lora"), _kind_of(trained)
    if kind != own or {name: array.shape for name, array in arrays.items()} != {
        name: array.shape for name, array in trained.items()
    }:
        raise UserError(
            f"{folder}: the reference is not of the kind, layers, targets and rank that are trained here ({own})"
        )
    mx.eval(list(arrays.values()))  # read now: the file may be replaced later
    scale = None if kind == "full" else settings["lora_parameters"]["scale"]

    @contextmanager
    def swapped() -> Iterator[None]:
        before = tree_flatten(model.trainable_parameters())
        scales = [(module, module.scale) for _, module in model.named_modules() if "lora_a" in module]
        model.load_weights(list(arrays.items()), strict=False)
        for module, _ in scales:
            module.scale = scale
        try:
            yield
        finally:
            model.load_weights(before, strict=False)
            for module, trained_at in scales:
                module.scale = trained_at

    return swapped


def _kind_of(trained: Iterable[str]) -> str:
    """Return the kind of adapter that trained parameters are, by their names."""
    last = {name.rpartition(".")[2] for name in trained}
    return "full" if "lora_a" not in last else "dora" if "m" in last else "lora"


@contextmanager
def merged(model: "nn.Module") -> Iterator[None]:
    """Add the adapter into dense float32 weights while the context lasts, for faster sampling.

    Exact up to float32's rounding, so only where weights are that: elsewhere nothing changes, as rounding to 16 or 4
    bits would lose a small adapter.
    """
    import mlx.core as mx

    def dense(layer: Any) -> Any:
        inner = layer["linear"] if "linear" in layer else layer["embedding"]
        return layer.fuse() if "scales" not in inner and inner.weight.dtype == mx.float32 else layer

    back = _swap(model, dense)
    # Each new layer draws weights that are not used: without evaluating the state, the graph of draws would grow.
    mx.eval(model.parameters(), list(mx.random.state))
    try:
        yield
    finally:
        back()


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
    weights = _read_weights(folder)
    if kind != "full":
        try:
            linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=kind == "dora")
        except Exception as error:  # mlx_lm raises many kinds of errors for a wrong setting
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
        quantized = kind == "full" and any(name.endswith(".scales") for name in places)
        way_out = "; it holds dense weights and the model's are quantized: pass --weights dense" if quantized else ""
        raise UserError(f"{folder}: the adapter does not fit this model ({summary}){way_out}")
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def _read_weights(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    try:
        return mx.load(str(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({first_line(error)})") from None


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
    config = parse_json(text_of(folder / CONFIG), str(folder / CONFIG), several_lines=True)
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
        ("scale", settings.get("scale"), is_number, "a number"),
        ("dropout", settings.get("dropout"), lambda value: is_number(value) and 0 <= value < 1, "a number, 0 to 1"),
        ("keys", settings.get("keys"), _are_names, "a list of layer names"),
    ):
        if name == "scale" and value is None and "alpha" in settings:
            raise UserError(f"{where}: 'scale' is missing; mlx_lm does not read 'alpha', give scale = alpha / rank")
        if not right(value):
            found = "it is missing" if value is None else f"not {_shown(value)}"
            raise UserError(f"{where}: {name!r} must be {what}, {found}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def write_arrays(path: Path, arrays: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file all at once: temporary file, fsync, rename."""
    import mlx.core as mx

    mx.eval(list(arrays.values()))  # errors of the computation are not the disk's
    try:
        with on_the_way(path), replacing(path) as scratch:
            mx.save_safetensors(str(scratch), arrays, metadata or {})
    except RuntimeError as error:  # MLX's word for a disk that is full
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}); make room, then go on with --resume"
        ) from None
