"""What this machine has, what is missing, and what to do about it: the lines of ``mlx-traces doctor``."""

import importlib.metadata
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_traces import blas, device, hub
from mlx_traces.errors import UserError

SLOW_GFLOPS = 20  # below it, a CPU's BLAS is not one
_PACKAGES = ("mlx-traces", "mlx", "mlx-lm", "transformers")


@dataclass(frozen=True)
class Line:
    """One finding: ``what`` is ``value``, and what to do about it, ``None`` if all is well."""

    what: str
    value: str
    fix: str | None = None


def report() -> list[Line]:
    """Look the machine over, in seconds, with or without network, MLX or GPU."""
    lines = [Line("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]
    lines += [_version(package) for package in _PACKAGES]
    try:
        backend = device.choose()
    except UserError as error:
        lines.append(Line("device", "MLX does not run here", str(error)))
    else:
        lines.append(Line("device", backend.description))
        lines.append(Line("memory", f"{backend.memory_gb:.1f} GB"))
        lines.append(_blas(backend.name))
    return [*lines, _nano(), _hub()]


def show() -> None:
    """Print the report."""
    for line in report():
        print(f"{line.what:<15} {line.value}")
        if line.fix:
            print(f"{'':<15} -> {line.fix}")


def matmul_gflops(size: int = 1024, tries: int = 2) -> float:
    """Return the speed of a float32 ``size`` x ``size`` matrix product, 2 size³ operations, best of tries."""
    mx = device.import_mlx()
    left = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(left, left @ left)
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        mx.eval(left @ left)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _version(package: str) -> Line:
    try:
        return Line(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        fix = None if package == "mlx" else "pip install -e . in the clone"  # MLX is the device's line
        return Line(package, "not installed", fix)


def _blas(backend: str) -> Line:
    speed = matmul_gflops()
    value = f"{speed:.0f} GFLOP/s float32"
    if backend != "cpu":
        return Line("matrix product", value)
    value += f", {Path(blas.loaded.path).name}" if blas.loaded.path else f", {blas.loaded.reason}"
    if speed >= SLOW_GFLOPS or not sys.platform.startswith("linux"):
        return Line("matrix product", value)
    if blas.loaded.path:
        fix = "the machine is busy, or its cores are few: look at its load, and at OPENBLAS_NUM_THREADS"
    elif "imported before" in blas.loaded.reason:
        fix = "import mlx_traces before mlx and mlx_lm"
    else:
        fix = "pip install 'mlx-traces[cpu]', or a system OpenBLAS (apt install libopenblas0-pthread)"
    return Line("matrix product", value, fix)


def _nano() -> Line:
    from mlx_traces import models

    try:
        path, _ = models.resolve(models.NANO)
    except UserError as error:
        return Line("nano", "missing", str(error))
    return Line("nano", f"{sum(f.stat().st_size for f in path.iterdir()) / 1e6:.1f} MB, in the package")


def _hub() -> Line:
    """Ask the hub for its headers; without it, say what works all the same."""
    offline = "works without it: nano, model folders, downloaded models, --data FILE"
    if hub.switched_off():
        return Line("hub", f"switched off (HF_HUB_OFFLINE); {offline}", "unset HF_HUB_OFFLINE to download")
    if fault := hub.fault():
        return Line("hub", f"not reachable ({fault}); {offline}", "check the network, its proxy, and HF_ENDPOINT")
    return Line("hub", "reachable")
