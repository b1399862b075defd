"""Fuse an adapter into its model: a model folder that needs no adapter, in 16 bits or fewer."""

import math
import shutil
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import quantize_model, save_config, save_model

from mlx_traces.config import SFTConfig
from mlx_traces.engine import logprobs
from mlx_traces.errors import UserError, choices, first_line
from mlx_traces.models import adapters, convert, loading, names
from mlx_traces.models.convert import GROUP, LEFT_BEHIND, add_up, own_dtype, weight_name
from mlx_traces.runtime.files import put_in_place, scratch_folder, to_json
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.runtime.provenance import provenance
from mlx_traces.traces import encoding
from mlx_traces.traces.files import read_traces, source_of
from mlx_traces.train import model_card, sft

BITS = (16, 8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Fused:
    """A fused model: its folder, bits per weight, type of the weights that are not quantized, and mean losses.

    The losses of the base, the base with its adapter, and the fused model are in nats per learned token. That of the
    base is None for an adapter of type ``full``; all are None without traces.
    """

    path: str
    bits: int
    dtype: str
    loss_base: float | None = None
    loss_unfused: float | None = None
    loss_fused: float | None = None
    tokens: int = 0


def fuse(
    model: str,
    adapter: str | None,
    out: str | Path,
    bits: int = 16,
    data: str | Path | None = None,
    count: int = 64,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Fused:
    """Write model and adapter as one folder that ``mlx_lm.load`` and `loading.load` read.

    Quantized weights are expanded to float32, the adapter is added, and the sum is rounded once, to the base's own
    16-bit type. With fewer bits the result is then quantized, which can round a small adapter away; so the loss on
    traces is measured before and after.

    Args:
        model: as for `loading.load`.
        adapter: folder of the adapter; None if ``model`` names it.
        out: the new folder, which appears when it is complete.
        bits: per weight.
        data: file of traces to measure the loss on; needed below 16 bits.
        count: number of traces, from the file's start.
        trust_remote_code: run Python code that comes with the model.
        progress: gets a line before each stage.

    Raises:
        UserError: for wrong input, an existing folder, weights that are not finite after the sum, or a full disk.
    """
    out = Path(out)
    if bits not in BITS:
        raise UserError(f"bits: {bits}; choose {choices(str(b) for b in BITS)}")
    name, adapter = names.split_adapter(model, adapter)
    if adapter is None:
        raise UserError("no adapter to fuse: give --adapter, the folder that mlx-traces sft wrote")
    if bits < 16 and data is None:
        raise UserError(f"{bits} bits can round an adapter away: pass --data FILE, traces to measure the loss on")
    names.check(name, adapter)
    settings = adapters.read_config(Path(adapter).expanduser())
    base = convert.lazily(names.resolve(name)[0], name, trust_remote_code)[0]
    quantized = {path for path, module in base.named_modules() if "scales" in module}
    full = settings.get("fine_tune_type") == "full"
    # What the adapter holds is for dense weights, so the base must be dense before it fits.
    dense = full or adapters.is_of_dense_embedding(base, settings)
    traces = list(islice(read_traces(Path(data)), count)) if data else []
    scratch = scratch_folder(out)
    try:
        losses: dict[str, Any] = {}
        if traces:
            progress("loss before")
            weights = "dense" if dense else None
            loaded = loading.load(name, adapter, weights=weights, trust_remote_code=trust_remote_code)
            losses["loss_unfused"], losses["tokens"] = mean_loss(loaded, traces)
            if not full:
                with adapters.switched_off(loaded.model):
                    losses["loss_base"] = mean_loss(loaded, traces)[0]
            del loaded
        progress("fusing")
        dtype = _write(scratch, name, adapter, quantized, dense, bits, trust_remote_code)
        if traces:
            progress("loss after")
            losses["loss_fused"] = mean_loss(loading.load(str(scratch), trust_remote_code=trust_remote_code), traces)[0]
        result = Fused(str(out), bits, dtype, **losses)
        folder, revision = names.resolve(name)
        about = {"model": name, "revision": revision, "adapter": str(adapter), **asdict(result), **provenance()}
        about["fingerprints"] = {"model": fingerprint(folder), "adapter": fingerprint(Path(adapter).expanduser())}
        about["data"] = source_of(data) if data else None
        (scratch / "fused.json").write_text(to_json(about), encoding="utf-8")
        weights, own = (scratch, f"{bits} bits, {dtype}"), Path(adapter).expanduser()
        model_card.write(own, base=model_card.base_of(name), fused=weights, title=model_card.title_of(out))
        put_in_place(scratch, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def mean_loss(loaded: loading.LoadedModel, traces: Iterable[Any]) -> tuple[float, int]:
    """Return the mean cross-entropy of (where, trace) pairs, in nats per learned token, and the number of tokens."""
    config = SFTConfig(data="")
    rows = encoding.encode_all(loaded, traces, config.max_length, "cut").examples
    if not rows:
        raise UserError("the traces have no token to measure a loss on")
    return sft.mean_loss(logprobs.split(loaded.model), rows, config), sum(row.count for row in rows)


def _write(
    folder: Path, name: str, adapter: str, quantized: set[str], dense: bool, bits: int, trust_remote_code: bool
) -> str:
    """Fuse, and write weights, configuration and the base's other files; return the 16-bit type.

    ``quantized`` names the base's quantized layers.
    """
    kind = {"weights": "dense", "dtype": "float32"} if dense else {"weights": "quantized"}
    loaded = loading.load(name, adapter, **kind, trust_remote_code=trust_remote_code)
    model, config = loaded.model, dict(loaded.config)
    dtype = own_dtype(loaded.path, config)
    own = config.pop("quantization", None) or {}
    config.pop("quantization_config", None)
    same = own.get("bits") == bits and isinstance(own.get("group_size"), int)
    untouched = {name: module for name, module in model.named_modules() if same and "scales" in module}
    add_up(model)
    model.set_dtype(dtype)
    for label, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time, so that float32 intermediates do not add up
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise UserError(
                f"{label} does not fit {weight_name(dtype)} with the adapter; train with a lower scale or rate"
            )
    if bits < 16:
        # Layers that are dense in the base stay dense, and the group size stays. With the same bits each layer keeps
        # its own settings, and one without an adapter its quantized weights: quantizing anew would change them.
        with redirect_stdout(StringIO()):
            model, config = quantize_model(
                model,
                config,
                own.get("group_size") or GROUP,
                bits,
                quant_predicate=(lambda path, _: path in quantized and (own.get(path, True) if same else True))
                if quantized
                else None,
            )
    for name in quantized & untouched.keys():  # an adapted layer's base has another name
        untouched[name].set_dtype(dtype)
        model.update_modules(tree_unflatten([(name, untouched[name])]))
    try:
        save_model(folder, model)
    except RuntimeError as error:  # MLX raises this if the disk is full
        raise OSError(first_line(error)) from None
    save_config(config, folder / "config.json", keep_vision_config=True)
    left = {path for pattern in LEFT_BEHIND for path in loaded.path.glob(pattern)}
    for path in sorted(set(loaded.path.iterdir()) - left):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return weight_name(dtype)


def warning(result: Fused) -> str | None:
    """Return a line on how quantizing changed the loss, or None for 16 bits."""
    if result.bits >= 16 or result.loss_fused is None or result.loss_unfused is None:
        return None
    change = result.loss_fused - result.loss_unfused
    text = f"{result.bits} bits round weights and adapter together: the loss changed by {change:+.4f} nats per token"
    gain = (result.loss_base or math.nan) - result.loss_unfused
    return f"{text}, {change / gain:.0%} of what the adapter had gained" if gain > 0 and change > 0 else text
