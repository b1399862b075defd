"""What this machine has, what it lacks, and how to fix that: the lines of ``mlx-traces doctor``."""

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from packaging.version import InvalidVersion, Version

from mlx_traces.errors import UserError, first_line
from mlx_traces.models import names
from mlx_traces.runtime import blas, device, hub

SLOW_GFLOPS = 20  # a CPU below this has no fast BLAS
# Oldest and newest version that tests/wheel.sh has passed with; the oldest are the lower bounds of pyproject.toml.
TESTED = {
    "python": ("3.11", "3.13"),
    "mlx": ("0.32.2", "0.32.4"),
    "mlx-lm": ("0.32.2", "0.32.2"),
    "transformers": ("5.7", "5.24.0"),
    "tokenizers": ("0.22", "0.23.3"),
    "safetensors": ("0.4.3", "0.8.0"),
    "huggingface-hub": ("1.5", "2.4.0"),
    "datasets": ("4.0", "5.2.0"),
    "numpy": ("2.0", "2.5.5"),
    "pandas": ("2.2.2", "3.1.1"),
    "pydantic": ("2.12", "2.14.4"),
}
BACKENDS = ("mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13")  # wheels that have to be of mlx's own version
LEAST_DISK_GB = 1  # for run folders
ROOM_FOR_MODELS_GB = 5  # a 7B model in 4 bits takes 4.3
LEAST_MEMORY_GB = 2  # a 0.5B model in 4 bits, with its cache
_GB = 1e9


@dataclass(frozen=True)
class Line:
    """One finding: ``what`` is ``value``, and ``fix`` says what to do about it, ``None`` if all is well.

    ``failed`` means that commands will fail, or that their results cannot be trusted.
    """

    what: str
    value: str
    fix: str | None = None
    failed: bool = False


def report(self_test: bool = True) -> list[Line]:
    """Check the machine; this takes seconds, and works without network, MLX or GPU."""
    lines = [_python(), *(_version(package) for package in ("mlx-traces", *TESTED) if package != "python")]
    backend = None
    try:
        backend = device.choose()
    except UserError as error:
        lines.append(Line("device", "MLX does not run here", str(error), failed=True))
    else:
        lines += [
            Line("device", backend.description),
            memory(backend),
            sizes(backend),
            _blas(backend.name),
            attention(),
        ]
    lines += [*disks(), _nano(), _hub()]
    return [*lines, _self_test()] if backend and self_test else lines


def show(lines: list[Line]) -> None:
    """Print a report with the fix under each line, and a summary."""
    width = max(len(line.what) for line in lines)
    for line in lines:
        mark = "x" if line.failed else "!" if line.fix else " "
        print(f"{mark} {line.what:<{width}}  {line.value}")
        if line.fix:
            print(f"{'':>{width + 4}}-> {line.fix}")
    failed, advised = sum(line.failed for line in lines), sum(bool(line.fix) and not line.failed for line in lines)
    parts = [f"{failed} to fix (x)" if failed else "", f"{advised} to look at (!)" if advised else ""]
    print(", ".join(filter(None, parts)) or "nothing to fix")


def as_rows(lines: list[Line]) -> list[dict[str, Any]]:
    """Return a report as JSON values."""
    return [asdict(line) for line in lines]


def matmul_gflops(size: int = 1024, tries: int = 2) -> float:
    """Return the speed of a float32 ``size`` x ``size`` matrix product, 2 size³ operations; the best of ``tries``."""
    mx = device.import_mlx()
    left = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(left, left @ left)
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        mx.eval(left @ left)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


# -------------------------------------------------------------------------------------------------- versions


def _python() -> Line:
    version, (low, high) = platform.python_version(), TESTED["python"]
    value = f"{version}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] > tuple(map(int, high.split("."))):
        return Line("python", f"{value}; newer than tested ({low} to {high})")
    return Line("python", value)


def _version(package: str) -> Line:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "mlx-traces":
            return Line(package, "not installed, runs from a folder", "pip install -e . in the clone")
        # A missing MLX is the fault of the line "device".
        fix = None if package == "mlx" else f"pip install '{package}>={TESTED[package][0]}'"
        return Line(package, "not installed", fix, failed=fix is not None)
    return Line(package, version) if package == "mlx-traces" else judged(package, version)


def judged(package: str, version: str) -> Line:
    """Compare a version with those tested: an older one fails, a newer one is only mentioned."""
    low, high = TESTED[package]
    try:
        found = Version(version)
    except InvalidVersion:
        return Line(package, f"{version}; not a version number; tested are {low} to {high}")
    if found < Version(low):
        fix = f"pip install --upgrade '{package}>={low}'"
        return Line(package, f"{version}; older than the oldest tested, {low}", fix, failed=True)
    if package == "mlx" and (other := _other_backend(version)):
        return other
    newer = found > Version(high)
    return Line(package, f"{version}; newer than tested ({low} to {high}): see the self-test" if newer else version)


def _other_backend(version: str) -> Line | None:
    """Return a failed line if a wheel of MLX's backend has another version than MLX."""
    for name in BACKENDS:
        try:
            own = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if own != version:
            fix = f"pip install --force-reinstall {name}=={version}"
            return Line("mlx", f"{version}, but its backend {name} is {own}", fix, failed=True)
    return None


# -------------------------------------------------------------------------------------------------- the machine


def memory(backend: device.Backend) -> Line:
    """Report the memory, how much of it is free, and limits on this process."""
    parts, fix = [f"{backend.memory_gb:.1f} GB"], None
    free = _free_gb()
    if free is not None:
        parts.append(f"{free:.1f} GB free")
    if backend.name == "metal":
        parts[0] += f" for the GPU, of {device.device_info().get('memory_size', 0) / _GB:.1f} GB"
    limits = dict(_limits_gb())
    if limits and (least := min(limits, key=limits.__getitem__)) and limits[least] < 0.95 * backend.memory_gb:
        room = limits[least]
        parts.append(f"this process may have {room:.1f} GB ({least})")
        fix = f"raise that limit, or pass --memory-limit {0.8 * room:.1f} to eval, generate, grpo and ppo"
    if free is not None and free < LEAST_MEMORY_GB:
        fix = f"close other programs: below {LEAST_MEMORY_GB} GB only nano runs well"
    return Line("memory", ", ".join(parts), fix)


def sizes(backend: device.Backend) -> Line:
    """Return the batch sizes of this device for settings that have none."""
    own = ", ".join(f"{name} {size:,}" for name, size in backend.sizes.items())
    return Line("sizes", f"{own} where not set" if own else "each command's own defaults (--help)")


def _free_gb() -> float | None:
    """Return the memory that programs can get without swapping, by Linux's own figure; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / _GB for line in lines if line.startswith("MemAvailable:")), None)


def _limits_gb(folder: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[str, float]]:
    """Yield the limits on this process's memory by name: the shell's, and the container's (cgroup 2 and 1)."""
    for name, which in (("ulimit -v", resource.RLIMIT_AS), ("ulimit -d", resource.RLIMIT_DATA)):
        if (soft := resource.getrlimit(which)[0]) != resource.RLIM_INFINITY:
            yield name, soft / _GB
    for file in (folder / "memory.max", folder / "memory" / "memory.limit_in_bytes"):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 2**60:  # cgroup 1 writes no limit as a huge one
            yield "the container's limit", int(text) / _GB


def _blas(backend: str) -> Line:
    speed = matmul_gflops()
    value = f"{speed:.0f} GFLOP/s float32"
    if backend != "cpu":
        return Line("matrix product", value)
    value += f", {Path(blas.loaded.path).name}" if blas.loaded.path else f", {blas.loaded.reason}"
    if speed >= SLOW_GFLOPS or not sys.platform.startswith("linux"):
        return Line("matrix product", value)
    if blas.loaded.path:
        fix = "the machine is busy or has few cores: check its load and OPENBLAS_NUM_THREADS"
    elif "imported before" in blas.loaded.reason:
        fix = "import mlx_traces before mlx and mlx_lm"
    else:
        fix = "pip install 'mlx-traces[cpu]', or a system OpenBLAS (apt install libopenblas0-pthread)"
    return Line("matrix product", value, fix)


def attention() -> Line:
    """Report, for each dtype, whether attention reads the right keys."""
    from mlx_traces.engine.attention import WHOLE, misread

    found = {name: misread(getattr(device.import_mlx(), name)) for name in device.DTYPES}
    told = "; ".join(f"{' and '.join(map(str, wrong))} ({name})" for name, wrong in found.items() if wrong)
    if not told:
        return Line("attention", f"reads slices of longer buffers correctly in {', '.join(found)}")
    if any(case.what == WHOLE for wrong in found.values() for case in wrong):
        fix = "do not trust this machine's results in that type: pass another --dtype, or --device cpu"
        return Line("attention", f"misreads {told}", fix, failed=True)
    return Line("attention", f"misreads {told}; sampling works around it")


def disks() -> list[Line]:
    """Report the free disk space for run folders, here, and for downloaded models."""
    cache = Path(constants.HF_HUB_CACHE)
    return [
        _disk("disk, runs", Path.cwd(), LEAST_DISK_GB, "free some space, or work in another folder"),
        _disk("disk, models", cache, ROOM_FOR_MODELS_GB, "free some space, or set HF_HOME to a folder on another disk"),
    ]


def _disk(what: str, folder: Path, least: float, fix: str) -> Line:
    """Check the disk of a folder by writing to it, or to its nearest existing parent."""
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        free = shutil.disk_usage(place).free / _GB
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Line(what, f"{folder} cannot be written ({error.strerror})", fix, failed=True)
    value = f"{free:,.1f} GB free in {folder}"
    if free >= least:
        return Line(what, value)
    return Line(what, f"{value}, less than {least} GB", fix)


# -------------------------------------------------------------------------------------------------- models


def _nano() -> Line:
    try:
        path, _ = names.resolve(names.NANO)
    except UserError as error:
        return Line("nano", "missing", str(error), failed=True)
    return Line("nano", f"{sum(f.stat().st_size for f in path.iterdir()) / 1e6:.1f} MB, in the package")


def _hub() -> Line:
    """Report whether the hub answers; if not, say what works without it."""
    offline = "works without it: nano, model folders, downloaded models, --data FILE"
    if hub.switched_off():
        return Line("hub", f"switched off (HF_HUB_OFFLINE); {offline}", "unset HF_HUB_OFFLINE to download")
    if fault := hub.fault():
        return Line("hub", f"not reachable ({fault}); {offline}", "check the network, its proxy, and HF_ENDPOINT")
    return Line("hub", "reachable")


def _self_test() -> Line:
    """Generate and train one step with nano, and compare with stored numbers; any error is reported in the line."""
    versions = " ".join(f"{name}=={TESTED[name][1]}" for name in ("mlx", "mlx-lm"))
    fix = f"do not trust this machine's results; pip install --force-reinstall {versions}, then run doctor again"
    fix += "; on a GPU, --device cpu may work meanwhile"
    try:
        from mlx_traces.diagnostics import selftest

        found = selftest.run()
    except UserError as error:
        return Line("self-test", f"could not run: {error}", "reinstall mlx-traces", failed=True)
    except Exception as error:  # what a broken MLX, driver or tokenizer raises is not known beforehand
        return Line("self-test", f"FAILED: {first_line(error)}", fix, failed=True)
    if found.wrong:
        more = f"; and {len(found.wrong) - 2} more" if len(found.wrong) > 2 else ""
        return Line("self-test", f"FAILED in {found.dtype}: {'; '.join(found.wrong[:2])}{more}", fix, failed=True)
    nats, share = found.tolerance
    return Line(
        "self-test",
        f"passed in {found.seconds:.1f} s: generation within {found.nats:.1g} nats ({nats:g} allowed), a training step "
        f"within {100 * found.share:.1g} % ({100 * share:g} allowed), {found.dtype}",
    )
