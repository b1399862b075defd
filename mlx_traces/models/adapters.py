"""LoRA and DoRA adapters in mlx_lm's format: attach, train, save, switch off, and sample with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_traces.config import AdapterConfig
from mlx_traces.errors import UserError, first_line
from mlx_traces.models.adapter_config import CONFIG, WEIGHTS, own_settings, read_config
from mlx_traces.models.lora import in_activations_type
from mlx_traces.runtime import blas, device
from mlx_traces.runtime.device import Backend
from mlx_traces.runtime.files import on_the_way, replacing, to_json, write_atomic

BASE = "base"  # stands for no adapter where one is named
ADDED = ("lora_a", "lora_b", "m")  # what an adapter adds to a layer: the low-rank pair, DoRA's magnitudes


def start(model: nn.Module, config: AdapterConfig, folder: str | Path | None = None) -> dict[str, Any]:
    """Prepare a model for training: add a new adapter, or continue that of ``folder``, which is attached already.

    All else is frozen. A new adapter changes nothing yet (arXiv 2106.09685, section 4.1): its second matrix is 0, its
    first is drawn from MLX's random state. ``full`` trains the layers' own weights.

    Returns:
        The adapter's settings, as `save` writes them. The adapter of ``folder`` keeps its own.

    Raises:
        UserError: for a target that no layer has, quantized layers that ``full`` cannot train, a setting that was given
            and differs from that of the adapter in ``folder``, or a model that does not run with the adapter.
    """
    if not -1 <= config.layers <= len(model.layers) or config.layers == 0:
        raise UserError(f"layers: this model has {len(model.layers)}, not {config.layers}; -1 stands for all")
    try:
        model.freeze()
    except AttributeError as error:  # mlx_lm's RecurrentGemma is not a complete module
        told = f"mlx_lm's class of this model cannot be trained ({first_line(error)}); take another model"
        raise UserError(told) from None
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
        try:
            _add(model, settings)
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
    _refuse_unfit(model)
    return settings


def _add(model: nn.Module, settings: dict[str, Any]) -> None:
    """Add a new adapter; mlx_lm counts the inputs of DoRA on 3-, 5- and 6-bit weights wrongly."""
    dora = settings.get("fine_tune_type") == "dora"
    linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"], use_dora=dora)
    for layer in model.modules():
        if isinstance(layer, DoRALinear) and "scales" in layer.linear:
            inputs = layer.linear.scales.shape[1] * layer.linear.group_size
            if inputs != layer.lora_a.shape[0]:
                bound = inputs**-0.5
                layer.lora_a = mx.random.uniform(-bound, bound, (inputs, layer.lora_a.shape[1]))


def _refuse_unfit(model: nn.Module) -> None:
    """Raise UserError if the model does not run with an adapter on its layers; nothing is computed.

    Gemma 3n reads the weights of some of its linear layers itself.
    """
    training = model.training
    model.eval()
    try:
        model(mx.array([[0]]))
    except (AttributeError, TypeError, ValueError) as error:
        told = f"mlx_lm's class of this model does not run with the adapter ({first_line(error)})"
        raise UserError(f"{told}; set other targets, or --kind full") from None
    finally:
        model.train(training)


def _refuse_changes(config: AdapterConfig, settings: dict[str, Any], folder: str | Path) -> None:
    """Raise UserError if a setting was given that differs from the adapter's."""
    own = own_settings(settings)
    for name in AdapterConfig.model_fields.keys() & config.model_fields_set:
        if name in own and getattr(config, name) != own[name]:
            given = getattr(config, name)
            raise UserError(
                f"{name} {given} differs from that of {folder} ({own[name]}); leave it out, or start without adapter"
            )


def _check_targets(model: nn.Module, config: AdapterConfig) -> None:
    """Raise UserError for a target that is no linear or embedding module, or takes no adapter of this kind."""
    experts = (SwitchLinear, QuantizedSwitchLinear)
    linear = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding, *experts)
    inside = {name: part for layer in model.layers for name, part in layer.named_modules() if isinstance(part, linear)}
    known = inside | {name: part for name, part in model.named_modules() if isinstance(part, linear)}
    for target in config.targets or ():
        if target not in known and not any(hasattr(layer, "to_lora") for layer in model.layers):
            raise UserError(f"targets: no module {target!r}; the layers have {', '.join(sorted(inside))}")
        if config.kind == "dora" and isinstance(known.get(target), nn.QuantizedEmbedding):
            raise UserError(f"targets: {target!r} is quantized and takes no DoRA; pass --weights dense, or --kind lora")


def save(model: nn.Module, folder: Path, settings: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """Write the trained parameters as an adapter folder that `attach` and ``mlx_lm.load(adapter_path=)`` read.

    ``settings`` are as `start` returned them, ``about`` is further entries for ``adapter_config.json``: base model,
    data, versions.
    """
    with on_the_way(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / WEIGHTS, dict(tree_flatten(model.trainable_parameters())))
    with on_the_way(folder / CONFIG):
        write_atomic(folder / CONFIG, to_json({**settings, **(about or {})}))


def _swap(model: nn.Module, change: Any) -> Any:
    """Replace every adapted layer by ``change(layer)``; return a function that puts them back."""
    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    model.update_modules(tree_unflatten([(name, change(module)) for name, module in adapted]))
    return lambda: model.update_modules(tree_unflatten(adapted))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside the context: the model is its base, without a second copy."""
    back = _swap(model, lambda layer: layer["linear"] if "linear" in layer else layer["embedding"])
    try:
        yield
    finally:
        back()


def reference(model: nn.Module, folder: str | Path | None, used: bool = True) -> Callable[[], Any]:
    """Return a context in which the model is the reference: its adapter left out, or replaced by that of ``folder``.

    The adapter of ``folder`` has the scale that it was trained with; None and `BASE` leave the adapter out.

    Raises:
        UserError: if the reference is ``used`` and there is no adapter to leave out, or ``folder`` has none of the same
            kind and shapes.
    """
    trained = dict(tree_flatten(model.trainable_parameters()))
    if folder in (None, BASE):
        if used and _kind_of(trained) == "full":
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
    """Return the kind of adapter that parameters of these names belong to."""
    last = {_part_of(name) for name in trained}
    return "full" if "lora_a" not in last else "dora" if "m" in last else "lora"


def _part_of(name: str) -> str:
    """Return which array of its layer a parameter is; AFM 7B's layers have lists of them (``lora_a.0``)."""
    return name.rstrip(".0123456789").rpartition(".")[2]


# The class of each kind of layer once its weights are dense.
DENSE = {
    **dict.fromkeys((nn.Linear, nn.QuantizedLinear), nn.Linear),
    **dict.fromkeys((nn.Embedding, nn.QuantizedEmbedding), nn.Embedding),
    **dict.fromkeys((SwitchLinear, QuantizedSwitchLinear), SwitchLinear),
}
ADAPTED = (LoRALinear, DoRALinear, LoRAEmbedding, DoRAEmbedding, LoRASwitchLinear)
WEIGHTS_SHARE = 0.75  # of the device's memory that weights and dense copies of them may take
_WEIGHED = "_sampling_bytes"  # the attribute of a model within `merged` that keeps what `sampling_bytes` found


@contextmanager
def merged(model: nn.Module, backend: Backend | None = None) -> Iterator[None]:
    """Let a model with an adapter sample at the speed of its base while the context lasts.

    * A dense layer with an adapter becomes one with the adapter added in. The sum is computed in float32 and rounded
      once to the weights' type, so log-probabilities are as near to float32's as with the adapter apart. On a GPU all
      layers' sums are one compiled function.
    * On CUDA, where products with 4-bit weights take several times as long as dense ones, quantized layers become dense
      too, with an adapter or without, in the type of their scales (the activations' if those are integers).
    * A linear layer that is not made dense keeps its weights, and one more product adds its adapter (`LowRank`):
      quantized layers on other backends, and all if the copies do not fit in ``WEIGHTS_SHARE`` of the memory.

    Afterwards the model has its own layers again. MLX's cache is cleared at both ends if it has grown, as arrays have
    other sizes in sampling than in training.

    Args:
        model: with or without an adapter.
        backend: where it runs; without one, copies are taken to fit, and quantized layers stay quantized.
    """
    dense, low_rank = _layers_to_change(model, backend)
    on_gpu = backend is not None and backend.name != "cpu"
    dtype = _activations(model)
    changed = dict(zip(dense, _dense([*dense.values()], dtype, compiled=on_gpu), strict=True))
    changed |= {name: LowRank(layer, dtype) for name, layer in low_rank.items()}
    before, outer = [*dense.items(), *low_rank.items()], getattr(model, _WEIGHED, None)
    weighed = sampling_bytes(model, backend)
    device.clear_grown_cache()
    with blas.threads_for(model, 1):
        mx.eval([changed[name].weight for name in dense])
        for name in low_rank:  # one after the other, to hold one layer's float32 sums of DoRA at a time
            mx.eval(changed[name].parameters())
    model.update_modules(tree_unflatten(list(changed.items())))
    setattr(model, _WEIGHED, weighed)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(before))
        setattr(model, _WEIGHED, outer)
        changed.clear()
    device.clear_grown_cache()  # not after an error: CUDA can do no more then


def sampling_bytes(model: nn.Module, backend: Backend | None = None) -> int:
    """Return the bytes of all weights while a model samples within `merged`: its own and the copies."""
    weighed = getattr(model, _WEIGHED, None)
    return _bytes(model) + copied_bytes(model, backend) if weighed is None else weighed


def copied_bytes(model: nn.Module, backend: Backend | None = None) -> int:
    """Return the bytes of the copies that `merged` makes."""
    (dense, low_rank), dtype = _layers_to_change(model, backend), _activations(model)
    pairs = [(layer.lora_a.size + layer.lora_b.size, _type_of(layer.linear, dtype).size) for layer in low_rank.values()]
    return sum(_dense_bytes(layer, dtype) for layer in dense.values()) + sum(count * size for count, size in pairs)


def _layers_to_change(model: nn.Module, backend: Backend | None) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return by name the layers that are dense within `merged`, and those that are `LowRank` there."""
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, ADAPTED)}
    dense = {name: layer for name, layer in adapted.items() if "scales" not in _base(layer)}
    if backend and backend.name == "cuda":
        inside = {id(_base(layer)) for layer in adapted.values()}
        quantized = {n: m for n, m in modules.items() if type(m) in DENSE and "scales" in m and id(m) not in inside}
        dense = {**adapted, **quantized}
    # Layers of unknown classes stay as they are, as do experts with a second scale.
    bases = {name: _base(layer) for name, layer in dense.items()}
    dense = {n: dense[n] for n, base in bases.items() if type(base) in DENSE and base.get("global_scale") is None}
    dtype = _activations(model)
    size = _bytes(model) + sum(_dense_bytes(layer, dtype) for layer in dense.values())
    if backend and size > WEIGHTS_SHARE * 1e9 * backend.memory_gb:
        dense = {}
    low_rank = {n: m for n, m in adapted.items() if n not in dense and isinstance(m, LoRALinear | DoRALinear)}
    return dense, low_rank


def activation_bytes(model: nn.Module) -> int:
    """Return the bytes of a number in the activations: that of the widest weights, an adapter's own left out."""
    weights = [(_part_of(name), array.dtype) for name, array in tree_flatten(model.parameters())]
    sizes = [dtype.size for last, dtype in weights if last not in ADDED and mx.issubdtype(dtype, mx.floating)]
    return max(sizes, default=4)


def _bytes(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def _base(layer: nn.Module) -> nn.Module:
    """Return the layer under an adapter; a layer without one is its own."""
    return layer.get("linear", layer.get("embedding", layer)) if isinstance(layer, ADAPTED) else layer


def _activations(model: nn.Module) -> mx.Dtype:
    """Return the type of a model's activations, which its norms have; bfloat16 for a model without any."""
    norms = (array.dtype for name, array in tree_flatten(model.parameters()) if "norm" in name)
    return next((dtype for dtype in norms if mx.issubdtype(dtype, mx.floating)), mx.bfloat16)


def _type_of(base: nn.Module, activations: mx.Dtype) -> mx.Dtype:
    """Return the type of a layer's weights; of quantized ones, that of their scales, or for integers the activations'.

    The scales of mxfp4, mxfp8 and nvfp4 are integers.
    """
    dtype = base.get("scales", base["weight"]).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else activations


def _dense_bytes(layer: nn.Module, activations: mx.Dtype) -> int:
    base = _base(layer)
    numbers = base.weight.size * 32 // base.bits if "scales" in base else base.weight.size
    return numbers * _type_of(base, activations).size


def _dense(layers: Sequence[nn.Module], activations: mx.Dtype, compiled: bool) -> list[nn.Module]:
    """Return frozen dense layers with the layers' weights and biases; MLX's constructors would draw random ones."""
    types = [mx.array(0, _type_of(_base(layer), activations)) for layer in layers]  # compiled functions take arrays
    parts = [{**_parts(layer), "like": like} for layer, like in zip(layers, types, strict=True)]
    weights = (_compiled if compiled else _dense_weights)(parts)
    made = []
    for base, weight in zip(map(_base, layers), weights, strict=True):
        dense = DENSE[type(base)].__new__(DENSE[type(base)])
        nn.Module.__init__(dense)
        dense.weight = weight
        if "bias" in base:
            dense.bias = base.bias
        made.append(dense.freeze())
    return made


def _parts(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's arrays, its adapter's included, and their constants, as `_summed` takes them."""
    base = _base(layer)
    parts = {"weight": base.weight}
    if "scales" in base:
        parts |= {name: base[name] for name in ("scales", "biases") if base.get(name) is not None}
        parts |= {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    if isinstance(layer, ADAPTED):
        left, right = layer.lora_a, layer.lora_b  # of an embedding
        if isinstance(layer, LoRASwitchLinear):
            left, right = right, left
        elif "linear" in layer:
            left, right = right.T, left.T
        parts |= {"left": left, "right": right, "scale": float(layer.scale)}
    return parts | ({"m": layer.m} if "m" in layer else {})


def _dense_weights(layers: list[dict[str, Any]]) -> list[mx.array]:
    """Return the dense weights, of the type of ``like``, of layers given by their `_parts`.

    One layer's float32 sums are held at a time.
    """
    weights: list[mx.array] = []
    for parts in layers:
        if weights:  # compute one layer after the other, not the sums of many first
            parts = {**parts, "weight": mx.depends(parts["weight"], weights[-1])}
        weight = _summed(parts)
        if "m" in parts:
            weight = weight * _gain(parts["m"], weight)[:, None]
        weights.append(weight.astype(parts["like"].dtype))
    return weights


_compiled = mx.compile(_dense_weights)  # traced once for the layers of a model


def _summed(parts: dict[str, Any]) -> mx.array:
    """Return a layer's weights with its adapter's product added, (out, in) or (experts, out, in), in float32."""
    weight = parts["weight"]
    if "scales" in parts:
        numbers = [parts["scales"], parts.get("biases")]
        if parts["mode"] == "affine":  # their own 16 bits would round the weights
            numbers = [array.astype(mx.float32) for array in numbers]
        weight = mx.dequantize(weight, *numbers, **{name: parts[name] for name in ("group_size", "bits", "mode")})
    if "left" not in parts:
        return weight
    weight, left, right = (array.astype(mx.float32) for array in (weight, parts["left"], parts["right"]))
    return mx.addmm(weight, left, right, alpha=parts["scale"])


def _gain(m: mx.array, summed: mx.array) -> mx.array:
    """Return DoRA's (out,) factors, which give the rows the learned norms ``m`` (arXiv 2402.09353, equation 5)."""
    return m / mx.linalg.norm(summed, axis=-1)


class LowRank(nn.Module):
    """A linear layer that stays as it is, and its adapter as one more product: ``linear(x) + x a b``.

    ``a`` (in, r) and ``b`` (r, out) have the activations' type; ``b`` includes the adapter's scale. ``gain`` (out,) is
    DoRA's factor of each output. It must not scale the bias, so ``rest`` adds back the part that it takes.
    """

    def __init__(self, layer: nn.Module, activations: mx.Dtype = mx.bfloat16):
        super().__init__()
        self.linear, dtype = layer.linear, _type_of(layer.linear, activations)
        self.a, b = layer.lora_a.astype(dtype), layer.scale * layer.lora_b
        if "m" in layer:
            gain = _gain(layer.m, _summed(_parts(layer)))
            b, self.gain = gain * b, gain.astype(dtype)
            self.rest = ((1 - gain) * self.linear.get("bias", mx.array(0.0))).astype(dtype)
        self.b = b.astype(dtype)
        self.freeze(recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        if "gain" in self:
            y = y * self.gain + self.rest
        return mx.addmm(y, x @ self.a, self.b)


def attach(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of ``folder`` on ``model``, dense or quantized, and return it.

    The base weights stay as they are: fusing into a 4-bit base rounds a small adapter away. An adapter of
    type ``full`` replaces the weights that it names.

    Raises:
        UserError: if the folder has no mlx_lm adapter, or one for another model: with a tensor that the model lacks,
            one of another shape, or without one that the layers need.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    weights = _read_weights(folder)
    too_few_bits = is_of_dense_embedding(model, config)
    if kind != "full":
        try:
            _add(model, config)
        except Exception as error:  # mlx_lm raises many kinds of errors for a wrong setting
            message = f"does not describe an adapter for this model ({first_line(error)})"
            raise UserError(f"{folder / CONFIG}: {message}") from None
    places = dict(tree_flatten(model.parameters()))
    needed = set() if kind == "full" else {name for name in places if _part_of(name) in ADDED}
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
        too_few_bits |= kind == "full" and any(name.endswith(".scales") for name in places)
        way_out = "; it is of dense weights and the model has quantized ones: pass --weights dense"
        raise UserError(f"{folder}: the adapter does not fit this model ({summary}){way_out if too_few_bits else ''}")
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def is_of_dense_embedding(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether an adapter is DoRA on an embedding that is quantized in this model, where it would have to be dense."""
    keys = (config.get("lora_parameters") or {}).get("keys") or ()
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.QuantizedEmbedding)}
    return config.get("fine_tune_type") == "dora" and not embeddings.isdisjoint(keys)


def _read_weights(folder: Path) -> dict[str, Any]:
    try:
        return mx.load(str(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({first_line(error)})") from None


def write_arrays(path: Path, arrays: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file atomically: temporary file, fsync, rename."""
    mx.eval(list(arrays.values()))  # before the try: errors of the computation are not the disk's
    try:
        with on_the_way(path), replacing(path) as scratch:
            mx.save_safetensors(str(scratch), arrays, metadata or {})
    except RuntimeError as error:  # what MLX raises if the disk is full
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}); make room, then go on with --resume"
        ) from None
