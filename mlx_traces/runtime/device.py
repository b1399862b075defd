"""Which MLX backend this is and what it is good at: weights, dtype, memory."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, choices

DEVICES = ("gpu", "cpu")
WEIGHTS = ("quantized", "dense")
DTYPES = ("float32", "bfloat16", "float16")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GB = 1e9
# Parts of MLX's messages; the last is CUDA's answer to any call after a failed allocation.
_OUT_OF_MEMORY = (
    *("out of memory", "unable to allocate", "attempting to allocate", "insufficient memory"),
    "illegal memory access",
)
CACHE_SHARE = 0.25  # of the device's memory that MLX may keep in freed buffers
# How many graphs and plans of attention MLX keeps on CUDA, by its environment variables. Its defaults, 400, 256 and 64,
# are fewer than the shapes of a training, so they would be made again and again, at a second each.
CUDA_CACHES = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": 2000,
    "MLX_CUDA_SDPA_CACHE_SIZE": 1024,
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": 512,
}
for _name, _count in CUDA_CACHES.items():  # MLX reads them at the first use of a GPU
    os.environ.setdefault(_name, str(_count))
_limited = 0  # contexts of `limits` that are open


@dataclass(frozen=True)
class Backend:
    """How a model runs here.

    ``name`` is ``"metal"``, ``"cuda"`` or ``"cpu"``. ``weights`` ``"dense"`` means that quantized weights are
    dequantized at load, ``"quantized"`` that they stay as the model folder has them. ``dtype`` is that of
    dense weights, scales and activations; ``None`` keeps the folder's. ``memory_gb`` is the device's, in 1e9
    bytes.
    """

    name: str
    weights: str
    dtype: str | None
    memory_gb: float
    description: str

    @property
    def sizes(self) -> dict[str, int]:
        """The batch sizes of this device for settings that have none; see `sizes`."""
        return sizes(self.name, self.memory_gb)


# Least GB of a GPU's memory; there, completions decoded at once, tokens of a training's forward pass, MiB of logits.
GPU_SIZES = (
    (64, {"rows": 256, "micro_tokens": 16_384, "logits_mb": 1024}),
    (32, {"rows": 128, "micro_tokens": 4096, "logits_mb": 256}),
)


def sizes(name: str, memory_gb: float) -> dict[str, int]:
    """Return the batch sizes for a backend and its memory in GB; none for a CPU or a small GPU.

    On a CPU the settings' own defaults are fastest. At such small sizes a GPU would wait for its host.
    """
    return next((dict(found) for least, found in GPU_SIZES if name != "cpu" and memory_gb >= least), {})


def import_mlx() -> Any:
    """Import and return ``mlx.core``.

    Raises:
        UserError: on Linux without one of MLX's backends; the message is the install command.
    """
    try:
        import mlx.core as mx
    except ImportError as error:
        _refuse_no_gpu(error)
        # Without an extra there is no `mlx` at all; with the bare `mlx` wheel its libmlx.so is missing.
        if not isinstance(error, ModuleNotFoundError) and "libmlx" not in str(error):
            raise UserError(f"MLX does not load here: {error}; `pip install --force-reinstall mlx` may help") from None
        raise UserError(
            "MLX has no backend here: pip install 'mlx-traces[cpu]', or 'mlx-traces[cuda]' for an NVIDIA GPU "
            "(from a clone: pip install -e '.[cpu]')"
        ) from None
    return mx


def select(device: str | None = None) -> str:
    """Make ``device`` (``"gpu"`` or ``"cpu"``) MLX's default one and return the backend's name.

    ``None`` keeps MLX's own choice, the GPU where there is one.

    Raises:
        UserError: if there is no such device.
    """
    mx = import_mlx()
    if device not in (None, *DEVICES):
        raise UserError(f"unknown device {device!r}: choose {choices(DEVICES)}")
    gpu = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None
    if device == "gpu" and gpu is None:
        raise UserError("no GPU that MLX can use on this machine; leave --device out, or pass --device cpu")
    if device:
        mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    return gpu if gpu and mx.default_device() == mx.Device(mx.gpu) else "cpu"


def choose(
    device: str | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    parameters: int | None = None,
) -> Backend:
    """Decide how a model runs here: as the arguments say, else as is fastest on this backend.

    Metal keeps the folder's weights. CUDA takes dense bfloat16, as 4-bit kernels lose time with many rows, when
    that fills less than half of the memory. A CPU takes dense float32, as MLX's quantized kernels use one
    thread there; a model that would then fill more than 80 % of the memory stays quantized, and slow.

    Args:
        device: ``"gpu"`` or ``"cpu"``, set as MLX's default; ``None`` for MLX's own choice.
        weights: ``"quantized"`` or ``"dense"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        parameters: number of the model's parameters; ``None`` counts as few.

    Raises:
        UserError: for a value that is none of these, a device that is not there, or no MLX.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError(f"unknown weights {weights!r}: choose {choices(WEIGHTS)}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"unknown dtype {dtype!r}: choose {choices(DTYPES)}")
    name = select(device)
    memory = memory_bytes()
    best, share = {"metal": (None, 0.0), "cuda": ("bfloat16", 0.5), "cpu": ("float32", 0.8)}[name]
    if weights is None:
        size = (parameters or 0) * _BYTES[dtype or best or "float32"]
        weights = "dense" if best and size < share * memory else "quantized"
    if dtype is None and (weights == "dense" or name == "cpu"):
        dtype = best
    info = device_info()
    own = str(info.get("device_name") or info.get("architecture") or "unknown device")
    title = f"{own} ({'CPU' if name == 'cpu' else name.upper() if name == 'cuda' else 'Metal'})"
    kept = "weights as in the folder" if weights == "quantized" else "dense weights"
    description = f"{title}, {memory / _GB:.0f} GB, {kept}{f', {dtype}' if dtype else ''}"
    return Backend(name, weights, dtype, round(memory / _GB, 1), description)


def device_info() -> dict[str, Any]:
    """Return what MLX knows of its default device.

    Raises:
        UserError: if macOS shows no GPU to this process.
    """
    try:
        return import_mlx().device_info()
    except RuntimeError as error:
        _refuse_no_gpu(error)
        raise


def _refuse_no_gpu(error: Exception) -> None:
    """Raise UserError if an error of MLX says that it found no GPU on a Mac."""
    if "No Metal device" in str(error):
        raise UserError(
            "macOS shows no GPU to this process, as in a sandbox, a virtual machine or a session without a screen: "
            "run the command in Terminal"
        ) from None


def memory_bytes() -> int:
    """Return the bytes that MLX's default device can use; on Metal, the recommended working set."""
    mx = import_mlx()
    if mx.default_device() == mx.Device(mx.gpu):
        info = device_info()
        for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_gb() -> float:
    """Return the peak memory in 1e9 bytes: MLX's since the reset; on a CPU, that of the whole process if higher."""
    mx = import_mlx()
    peak = mx.get_peak_memory()
    if mx.default_device() == mx.Device(mx.cpu):
        peak = max(peak, peak_resident_bytes())
    return peak / _GB


def peak_resident_bytes() -> int:
    """Return the peak memory of this process in bytes; on Linux without its parent's, which ru_maxrss includes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Reset the peak of MLX's memory for `peak_memory_gb`."""
    import_mlx().reset_peak_memory()


def out_of_memory(error: BaseException) -> bool:
    """Whether MLX could not allocate what it needed.

    Metal and CUDA raise an exception with these words. A Mac that runs out of memory within a command buffer ends the
    process instead, and so does Linux when the machine's memory is full.
    """
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OUT_OF_MEMORY)


@contextmanager
def limits() -> Iterator[None]:
    """Set MLX's memory limits while the context lasts, then restore them; contexts within it change nothing.

    On Metal the recommended working set is wired, as in mlx_lm, so that weights stay where the GPU reads them. Freed
    buffers are kept for reuse, up to a quarter of the device's memory; MLX would keep nearly all of a GPU's. If MLX's
    own limit is lower, such as 32 MiB on a CPU, that holds.
    """
    global _limited
    mx = import_mlx()
    _limited += 1
    outermost, wired, cached = _limited == 1, None, 0
    try:
        if outermost:
            if mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu):
                wired = mx.set_wired_limit(int(device_info()["max_recommended_working_set_size"]))
            cached = mx.set_cache_limit(0)
            mx.set_cache_limit(min(cached, int(CACHE_SHARE * memory_bytes())))
        yield
    finally:
        _limited -= 1
        if outermost:
            mx.set_cache_limit(cached)
            if wired is not None:
                mx.synchronize()  # running work may still read wired memory
                mx.set_wired_limit(wired)


def clear_grown_cache() -> None:
    """Free the buffers that MLX keeps, if they take more than half of its limit; called between phases of a run.

    MLX reuses a buffer only for an array of nearly its size, so the buffers of one phase are of no use in the next.
    """
    mx = import_mlx()
    if mx.get_cache_memory() > CACHE_SHARE / 2 * memory_bytes():
        mx.clear_cache()
