"""A fast BLAS under MLX on Linux: load an OpenBLAS before MLX asks for one. Standard library only.

MLX's Linux CPU wheel links reference BLAS, about a hundredth of what a machine can do. It looks the plain
``cblas_*`` symbols up in the process's global scope, so a library put there first is the one that it uses.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Where wheels keep a library with plain symbols, beside the packages: cmeel-openblas, ngsolve-openblas.
WHEELS = ("cmeel.prefix/lib/libopenblas.so.0", "ngsolve_openblas/libopenblas*.so*")
SYSTEM = "libopenblas.so.0"
FORTRAN = "libgfortran.so.5"
# Where wheels keep that library under a name of their own: MLX's CPU backend, numpy.
FORTRAN_WHEELS = ("mlx_cpu.libs", "numpy.libs")


@dataclass(frozen=True)
class Blas:
    """What was loaded: ``path``, or ``None`` and the ``reason``."""

    path: str | None
    reason: str = ""


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
                return Blas(path)
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
    """Load a wheel's libgfortran under the usual name, which OpenBLAS wheels ask for; return success.

    Many machines have no libgfortran.so.5, but MLX's CPU wheel brings one that calls itself
    libgfortran-HASH.so.5. The loader goes by the name inside the file, so a copy in memory with the usual
    name satisfies it.
    """
    for folder in folders:
        for wheel in FORTRAN_WHEELS:
            for path in (folder / wheel).glob("libgfortran-*.so.5*"):
                name, content = path.name.encode() + b"\0", path.read_bytes()
                if content.count(name) != 1:
                    continue
                for quadmath in path.parent.glob("libquadmath-*"):  # what it needs itself, found by name only there
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
