"""Shared fixtures: a tiny random model with its own tokenizer, and the real model's folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side, one thread each

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

os.fsync = os.fstat  # tests kill processes, which keeps what was written; none cuts the power
SLOW = (  # files in which tests take the longest: they begin first, so that no worker is left alone with one
    "test_distributed", "test_grpo", "test_rounds", "test_ppo", "test_memory", "test_thinking", "test_evaluator",
    "test_sft", "test_generation", "test_fused", "test_study", "test_faults", "test_bench", "test_grpo_bandit",
)  # fmt: skip
settings.register_profile("suite", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Import the package in processes that run tests; the one that hands tests out starts seconds sooner without it."""
    if not config.getoption("numprocesses", None):
        import mlx_traces  # noqa: F401 - before mlx: it loads the fast BLAS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later garbage collection."""
    gc.freeze()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from factories import save_model

    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def _tiny():
    from factories import make_model, make_tokenizer, wrap

    return wrap(make_tokenizer(), make_model())


@pytest.fixture
def tiny(_tiny):
    """A tiny random model, float32, with a ChatML tokenizer."""
    return replace(_tiny, notes=[])


@pytest.fixture
def exact_memory() -> Iterator[None]:
    """MLX's count of active memory is that of the arrays: no array lies in a larger buffer that another has left."""
    import mlx.core as mx

    limit = mx.set_cache_limit(0)
    mx.clear_cache()
    yield
    mx.set_cache_limit(limit)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with 4-bit weights and float16 scales."""
    import mlx.core as mx
    import mlx.nn as nn
    from factories import make_config, make_model, make_tokenizer
    from mlx.utils import tree_flatten

    folder = tmp_path_factory.mktemp("models") / "tiny-4bit"
    folder.mkdir()
    model = make_model(seed=1)
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(make_config(quantization=quantization)))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def real_model() -> Path:
    """The folder named by MLX_TRACES_TEST_MODEL."""
    folder = os.environ.get("MLX_TRACES_TEST_MODEL")
    if not folder:
        pytest.skip("MLX_TRACES_TEST_MODEL names no model folder")
    return Path(folder)


@pytest.fixture
def real_templates() -> Path:
    """The folder named by MLX_TRACES_TEMPLATES."""
    folder = os.environ.get("MLX_TRACES_TEMPLATES")
    if not folder:
        pytest.skip("MLX_TRACES_TEMPLATES names no folder of chat templates")
    return Path(folder)
