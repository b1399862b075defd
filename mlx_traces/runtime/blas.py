"""A fast BLAS under MLX on Linux: load an OpenBLAS before MLX asks for one, and choose its threads.

Standard library only. MLX's Linux CPU wheel links reference BLAS, about a hundredth of what a machine can do. It looks
the plain ``cblas_*`` symbols up in the process's global scope, so a library put there first is the one that it uses.

OpenBLAS's threads spin while they wait for each other, twice a product. A small product takes less time than that: nano
decodes 8 rows in 2.0 ms with two threads, and in 1.4 with one; beside two busy processes in 42 to 174 ms and in 5.
A real 0.5B model's step of 32 rows takes 145 ms with two threads and 209 with one. The gradient of a micro-batch of 512
tokens of nano, beside a dozen busy processes on two cores, takes 10 to 13 s with two threads, and 0.5 to 0.9 with one.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_traces.runtime import cores

# Where wheels keep a library with plain symbols, beside the packages: cmeel-openblas, ngsolve-openblas.
WHEELS = ("cmeel.prefix/lib/libopenblas.so.0", "ngsolve_openblas/libopenblas*.so*")
SYSTEM = "libopenblas.so.0"
FORTRAN = "libgfortran.so.5"
# Where wheels keep that library under a name of their own: MLX's CPU backend, numpy.
FORTRAN_WHEELS = ("mlx_cpu.libs", "numpy.libs")
GIVEN = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")  # if one is set, the number of threads is left alone
# All threads are used if a layer's largest product has at least so many multiply-adds: just above nano's with a
# micro-batch of 1,024 tokens. Fewer rows count as 16: reading weights from beyond the caches takes as long as 16 rows.
LARGE, LEAST_ROWS = 6e7, 16


@dataclass(frozen=True)
class Blas:
    """What was loaded: ``path`` and the ``library``, or ``None`` and the ``reason``."""

    path: str | None
    reason: str = ""
    library: Any = field(default=None, compare=False, repr=False)


def load() -> Blas:
    """Load the first OpenBLAS with plain ``cblas_*`` symbols into the global scope; do nothing off Linux."""
    if not sys.platform.startswith("linux"):
        return Blas(None, "not needed here: MLX uses the system's own")
    if "mlx.core" in sys.modules:
        return Blas(None, "mlx was imported before mlx_traces")
    folders = [Path(folder) for folder in dict.fromkeys(sys.path) if folder]
    wheels = [str(path) for wheel in WHEELS for folder in folders for path in folder.glob(wheel)]
    reason = "no OpenBLAS found"
    for path in [*wheels, SYSTEM]:
        library = _open(path)
        if isinstance(library, OSError) and FORTRAN in str(library) and _load_fortran(folders):
            library = _open(path)
        if not isinstance(library, OSError):
            if hasattr(library, "cblas_sgemm"):
                return Blas(path, library=library)
            reason = f"{path} has no plain cblas symbols"
        elif path in wheels:
            reason = f"{Path(path).name} could not be loaded ({library})"
    return Blas(None, reason)


def _open(path: str) -> ctypes.CDLL | OSError:
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return error


def _load_fortran(folders: list[Path]) -> bool:
    """Load a wheel's libgfortran under the usual name, which OpenBLAS wheels ask for; return whether it worked.

    Many machines have no libgfortran.so.5, but MLX's CPU wheel brings one that is named libgfortran-HASH.so.5. The
    loader goes by the name inside the file, so a copy in memory with the usual name satisfies it.
    """
    for folder in folders:
        for wheel in FORTRAN_WHEELS:
            for path in (folder / wheel).glob("libgfortran-*.so.5*"):
                name, content = path.name.encode() + b"\0", path.read_bytes()
                if content.count(name) != 1:
                    continue
                for quadmath in path.parent.glob("libquadmath-*"):  # libgfortran needs it, and only this folder has it
                    _open(str(quadmath))
                try:
                    copy = os.memfd_create(FORTRAN)
                except OSError:
                    return False
                with os.fdopen(copy, "wb") as file:
                    file.write(content.replace(name, FORTRAN.encode().ljust(len(name), b"\0")))
                    file.flush()
                    if not isinstance(_open(f"/proc/self/fd/{copy}"), OSError):
                        return True
    return False


loaded = load()
_wanted: dict[object, int] = {}  # threads of each open `threads_for`, the newest last
_before = 0  # threads before the first of them


@contextmanager
def threads_for(model: Any, rows: int, processes: int = 1) -> Iterator[None]:
    """Use one thread while the context lasts if a model's products are small, all threads if they are large.

    The newest of several open contexts counts, and the number is put back when the last one ends. It stays as it is if
    ``OPENBLAS_NUM_THREADS`` or ``OMP_NUM_THREADS`` is set, or without an OpenBLAS. With one thread on a CPU,
    `cores.look` may move MLX's thread meanwhile.

    Args:
        model: a model, or another object with ``layers``; their largest weight matrix gives the size of the products.
        rows: rows of the products: completions decoded at once, or tokens of a forward pass.
        processes: number of processes that share this machine's cores.
    """
    global _before
    library = loaded.library
    if not hasattr(library, "openblas_set_num_threads"):
        yield
        return
    if not _wanted:
        _before = library.openblas_get_num_threads()
    modules = [module for layer in model.layers for _, module in layer.named_modules()]
    largest = max((module.weight.size for module in modules if "weight" in module), default=0)
    large = largest * max(rows, LEAST_ROWS) >= LARGE
    from mlx_traces.runtime import device  # not needed to load a BLAS

    own, given = object(), any(os.environ.get(name) for name in GIVEN)
    threads = _before if given else max(1, _before // processes) if large else 1
    computation = cores.begin(threads == 1 and device.select() == "cpu")
    try:
        _wanted[own] = threads
        library.openblas_set_num_threads(threads)
        yield
    finally:
        computation.end()
        _wanted.pop(own, None)
        library.openblas_set_num_threads(next(reversed(_wanted.values()), _before))
