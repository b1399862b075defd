"""Convert a model to another number of bits: expand it to 16, or quantize it from there. Each folder is made once."""

import hashlib
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import compute_bits_per_weight, dequantize_model, load_model, quantize_model, save_config, save_model

from mlx_traces.errors import UserError, first_line
from mlx_traces.models import names
from mlx_traces.runtime.files import put_in_place, scratch_folder, to_json
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.runtime.provenance import provenance


@dataclass(frozen=True)
class Conversion:
    """A model at ``bits`` per weight, ``group_size`` weights sharing a scale; ``path`` is its folder."""

    model: str
    bits: int
    group_size: int
    path: Path

    @property
    def label(self) -> str:
        """Name the result: ``nano-16bit``, ``nano-8bit-g32``."""
        return _label(self.model, self.bits, self.group_size)


def conversion(model: str, bits: int, group_size: int, folder: Path) -> Conversion:
    """Return a conversion whose path in ``folder`` is its label and 8 digits of a hash; nothing is downloaded or made.

    The hash is of the bits, the group size and the source: a local model's files, or a hub id with its revision.
    """
    own = names.local_folder(model)
    source = [model, fingerprint(own)] if own else [model]
    digest = hashlib.sha256(json.dumps([source, bits, group_size if bits < 16 else 0]).encode()).hexdigest()[:8]
    return Conversion(model, bits, group_size, folder / f"{_label(model, bits, group_size)}-{digest}")


def convert(wanted: Conversion, trust_remote_code: bool = False) -> Path:
    """Make the converted model unless it exists; return its folder, which appears when it is complete.

    Quantized weights are first expanded in float32 and rounded once to the model's own 16-bit type, then quantized by
    mlx_lm as its ``convert`` does it. Layers that a quantized source keeps dense stay dense. Tokenizer and templates
    are copied as they are.

    Raises:
        UserError: for a model that cannot be read or expanded, a group size that fits no layer, or a full disk.
    """
    if wanted.path.is_dir():
        return wanted.path
    source, revision = names.resolve(wanted.model)
    scratch = scratch_folder(wanted.path)
    try:
        origin = _write(scratch, source, wanted, trust_remote_code)
        about = {"model": wanted.model, "revision": revision, "bits": wanted.bits, "group_size": wanted.group_size}
        about |= {"origin": origin, "fingerprints": {"model": fingerprint(source)}, **provenance()}
        (scratch / "converted.json").write_text(to_json(about), encoding="utf-8")
        put_in_place(scratch, wanted.path)
    except OSError as error:
        raise UserError(f"{wanted.path} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wanted.path


def describe(folder: Path) -> dict[str, Any]:
    """Return ``bits``, ``group_size`` (None for dense weights), ``bits_per_weight`` and ``file_mb`` of a model folder.

    ``bits_per_weight`` counts scales, biases and what stays dense (mlx_lm's count); ``file_mb`` is the size of the
    weights on disk in 1e6 bytes. No weights are read.
    """
    model, config = lazily(folder, str(folder), False)
    own = config.get("quantization") or {}
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    exact = compute_bits_per_weight(model)
    return {
        "bits": own.get("bits", round(exact)),
        "group_size": own.get("group_size"),
        "bits_per_weight": exact,
        "file_mb": size / 1e6,
    }


def origin(model: str) -> dict[str, Any] | None:
    """Return the bits and group size of a local model as it is, None for dense weights and hub ids."""
    folder = names.local_folder(model)
    return _quantization(json.loads((folder / "config.json").read_text(encoding="utf-8"))) if folder else None


def _write(folder: Path, source: Path, wanted: Conversion, trust_remote_code: bool) -> dict[str, Any] | None:
    """Write weights, configuration and the source's other files; return the source's own quantization."""
    model, config = lazily(source, wanted.model, trust_remote_code)
    own, dtype = _quantization(config), own_dtype(source, config)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    kept = add_up(model)
    model.set_dtype(dtype)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time, to keep memory low
    if wanted.bits < 16:
        chosen = (lambda path, _: path in kept) if kept else None
        with redirect_stdout(StringIO()):
            model, config = quantize_model(model, config, wanted.group_size, wanted.bits, quant_predicate=chosen)
        if not any("scales" in module for _, module in model.named_modules()):
            raise UserError(f"{wanted.model}: no layer's width is a multiple of the group size {wanted.group_size}")
    try:
        save_model(folder, model)
    except RuntimeError as error:  # what MLX raises if the disk is full
        raise OSError(first_line(error)) from None
    save_config(config, folder / "config.json", keep_vision_config=True)
    left = {path for pattern in LEFT_BEHIND for path in source.glob(pattern)}
    for path in sorted(set(source.iterdir()) - left):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return own


def lazily(folder: Path, name: str, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Load a model without reading its weights."""
    try:
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # mlx_lm raises many kinds of errors for a broken folder
        raise UserError(f"{name}: cannot be loaded ({first_line(error)}); copy or download it anew") from None
    return model, dict(config)


def _quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    own = config.get("quantization") or config.get("quantization_config")
    return {"bits": own.get("bits"), "group_size": own.get("group_size")} if own else None


def _label(model: str, bits: int, group_size: int) -> str:
    short = Path(model.partition("@")[0]).name
    return f"{short}-16bit" if bits == 16 else f"{short}-{bits}bit-g{group_size}"


GROUP = 64  # weights that share a scale, if the base is not quantized itself
LEFT_BEHIND = ("*.safetensors*", "config.json", "*.bin", "*.bin.index.json", "*.gguf", "*.md", ".*")


def add_up(model: nn.Module) -> set[str]:
    """Make every layer dense and float32, its adapter added; return the names of those that were quantized.

    Nothing is computed yet: evaluating one array after the other keeps memory low.

    Raises:
        UserError: for a layer that cannot be expanded or fused.
    """
    model.set_dtype(mx.float32)  # scales and biases: 16-bit ones would round the weights
    modules = list(model.named_modules())
    adapted = {name: module for name, module in modules if "lora_a" in module}
    quantized = {
        next((base for base in adapted if name in (f"{base}.linear", f"{base}.embedding")), name)
        for name, module in modules
        if "scales" in module
    }
    for name, module in adapted.items():
        if not hasattr(module, "fuse"):
            raise UserError(f"{name}: a {type(module).__name__} cannot be fused; evaluate it as MODEL+ADAPTER")
    fused = [(name, module.fuse(dequantize=True)) for name, module in adapted.items()]
    model.update_modules(tree_unflatten(fused))
    dequantize_model(model)
    left = [name for name, module in model.named_modules() if "scales" in module]
    if left:
        raise UserError(f"{left[0]}: quantized in a special way, which cannot be expanded and fused")
    return quantized


def own_dtype(folder: Path, config: dict[str, Any]) -> mx.Dtype:
    """Return the 16-bit type of a model's weights or scales; if they have none, that of its configuration."""
    for file in sorted(folder.glob("model*.safetensors")):
        for array in mx.load(str(file)).values():  # lazy: no weights are read
            if array.dtype in (mx.float16, mx.bfloat16):
                return array.dtype
    named = config.get("dtype") or config.get("torch_dtype")
    return mx.float16 if named == "float16" else mx.bfloat16


def weight_name(dtype: mx.Dtype) -> str:
    """Return a type's name, such as ``"bfloat16"``."""
    return str(dtype).rpartition(".")[2]
