"""Teach small language models to reason, and measure whether they did.

Importing this package loads a fast BLAS on Linux (`runtime.blas`) and nothing else; MLX loads on first use.
"""

from importlib import import_module

from mlx_traces.runtime import blas as blas

_LAZY = {
    "evaluate": "mlx_traces.evaluation.run",
    "compare": "mlx_traces.pipelines.compare",
    "plan_eval": "mlx_traces.evaluation.planning",
    **dict.fromkeys(("generate", "load", "train_grpo", "train_ppo", "train_sft"), "mlx_traces.api"),
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # few users need it

        try:
            return version("mlx-traces")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
