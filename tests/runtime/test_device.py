"""The device's decisions, the BLAS under it, and the doctor's report."""

import builtins
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from factories import make_model, make_tokenizer, wrap

from mlx_traces.config import AdapterConfig, EvalConfig, GRPOConfig, ValidationConfig
from mlx_traces.diagnostics import doctor
from mlx_traces.engine import forward, kv_cache, logprobs
from mlx_traces.engine.batching import Example
from mlx_traces.engine.generation import generate
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError
from mlx_traces.models import adapters
from mlx_traces.runtime import blas, device, hub
from mlx_traces.train import gradients

BILLION = 10**9


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be another machine: ``machine(name, memory_gb)``."""

    def pretend(name: str, memory_gb: float) -> None:
        monkeypatch.setattr(device, "select", lambda wanted=None: "cpu" if wanted == "cpu" else name)
        monkeypatch.setattr(device, "memory_bytes", lambda: int(memory_gb * BILLION))

    return pretend


@pytest.mark.parametrize(
    ("name", "memory", "parameters", "expected"),
    [
        ("metal", 16, BILLION // 2, ("quantized", None)),
        ("metal", 128, None, ("quantized", None)),
        ("cpu", 16, BILLION // 2, ("dense", "float32")),
        ("cpu", 16, 3 * BILLION, ("dense", "float32")),  # 12 of 12.8 GB
        ("cpu", 16, 4 * BILLION, ("quantized", "float32")),  # 16 GB
        ("cpu", 16, None, ("dense", "float32")),
        ("cuda", 24, 5 * BILLION, ("dense", "bfloat16")),  # 10 of 12 GB
        ("cuda", 24, 7 * BILLION, ("quantized", None)),  # 14 GB
    ],
)
def test_choice(machine, name, memory, parameters, expected):
    machine(name, memory)
    backend = device.choose(parameters=parameters)
    assert (backend.name, backend.weights, backend.dtype) == (name, *expected)
    assert backend.memory_gb == memory and f"{memory} GB" in backend.description


def test_overrides(machine):
    machine("metal", 16)
    assert device.choose(weights="dense").dtype is None
    backend = device.choose(weights="dense", dtype="float16")
    assert (backend.weights, backend.dtype) == ("dense", "float16")
    assert device.choose("cpu").name == "cpu"
    machine("cuda", 24)
    assert device.choose(weights="quantized", parameters=1).weights == "quantized"
    assert device.choose(dtype="float32", parameters=4 * BILLION).weights == "quantized"  # 16 of 12 GB
    assert device.choose(dtype="float32", parameters=2 * BILLION).dtype == "float32"


LARGE = {"rows": 256, "micro_tokens": 16_384, "logits_mb": 1024}
MIDDLE = {"rows": 128, "micro_tokens": 4096, "logits_mb": 256}


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("cpu", 512, {}),
        ("cuda", 141, LARGE),
        ("metal", 64, LARGE),
        ("cuda", 63.9, MIDDLE),
        ("metal", 32, MIDDLE),
        ("cuda", 24, {}),
    ],
)
def test_sizes_of_batches_by_backend_and_memory(name, memory, expected):
    assert device.Backend(name, "dense", None, memory, "test").sizes == expected
    told = doctor.sizes(device.Backend(name, "dense", None, memory, "test")).value
    assert told == (
        f"rows {expected['rows']}, micro_tokens {expected['micro_tokens']:,}, logits_mb {expected['logits_mb']:,} "
        "where not set"
        if expected
        else "each command's own defaults (--help)"
    )


def test_settings_that_are_not_set_take_the_device_s_sizes_and_keep_their_identity():
    held_out = ValidationConfig(split="test")
    config = GRPOConfig(micro_tokens=512, evaluate=held_out)
    large, same = config.sized(LARGE), config.sized({})
    assert (large.rows, large.micro_tokens, large.logits_mb, large.evaluate.rows) == (256, 512, 1024, 256)
    assert (same.rows, same.micro_tokens, same.logits_mb, same.evaluate.rows) == (256, 512, 128, 64)
    assert same == config and large.sized({}) == config == large.sized(LARGE).sized({})
    assert large.model_fields_set == config.model_fields_set and large.identity() != config.identity()  # evaluate.rows
    assert GRPOConfig().sized(MIDDLE).rows == 256  # never fewer than on a CPU
    assert EvalConfig(rows=8).sized(LARGE).rows == 8 and EvalConfig().sized(LARGE).rows == 256


def test_bad_values():
    with pytest.raises(UserError, match="unknown weights '4bit': choose quantized or dense"):
        device.choose(weights="4bit")
    with pytest.raises(UserError, match="unknown dtype 'int8': choose float32, bfloat16 or float16"):
        device.choose(dtype="int8")
    with pytest.raises(UserError, match="unknown device 'tpu': choose gpu or cpu"):
        device.choose("tpu")


@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(UserError, match="no GPU that MLX can use"):
        device.choose("gpu")


def test_a_mac_that_shows_no_gpu_is_one_line(monkeypatch):
    def fail():
        raise RuntimeError("[metal::load_device] No Metal device available. More words.")

    monkeypatch.setattr(mx, "device_info", fail)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for ask in (device.choose, device.memory_bytes):
        with pytest.raises(UserError, match="^macOS shows no GPU to this process, .*: run the command in Terminal$"):
            ask()


def test_peak_memory_sees_an_array():
    """In a process of its own: on a CPU the peak is the process's, whatever ran in it before."""
    code = "from mlx_traces.runtime import device; import mlx.core as mx; device.reset_peak_memory()\n"
    code += (
        "before = device.peak_memory_gb(); held = [mx.ones((64, 1024, 1024)) + n for n in range(4)]; mx.eval(held)\n"
    )
    before, peak = map(float, python(f"{code}print(before, device.peak_memory_gb())").split())  # 1.07 GB are held
    assert peak > 1.0 and before < peak < before + 4


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'mlx'"), ImportError("libmlx.so: cannot open shared object file")],
    ids=["neither extra", "mlx without a backend"],
)
def test_no_mlx_is_one_line_with_the_command(monkeypatch, error):
    plain = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "mlx.core":
            raise error
        return plain(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as caught:
        device.choose()
    assert "pip install 'mlx-traces[cpu]'" in str(caught.value) and "pip install -e '.[cpu]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    lines = {line.what: line for line in doctor.report()}
    assert lines["device"].fix == str(caught.value)


def python(code: str) -> str:
    """Run code in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cuda_keeps_more_graphs_and_plans_unless_the_user_says_how_many():
    code = "import os; os.environ['MLX_CUDA_SDPA_CACHE_SIZE'] = '7'; from mlx_traces.runtime import device\n"
    code += "print(*(os.environ[name] for name in device.CUDA_CACHES))"
    clean = "import os\nfor name in [n for n in os.environ if n.startswith('MLX_CUDA')]: del os.environ[name]\n"
    assert python(clean + code) == "2000 7 512"


def test_importing_the_package_loads_neither_mlx_nor_numpy():
    found = python("import sys, mlx_traces; print([m for m in ('mlx.core', 'numpy', 'mlx_lm') if m in sys.modules])")
    assert found == "[]"


def test_recipes_are_functions_of_the_package():
    import mlx_traces

    for name in ("evaluate", "compare"):
        assert importlib.util.find_spec(f"mlx_traces.{name}") is None  # a module would hide the function
        assert callable(getattr(mlx_traces, name)) and name in dir(mlx_traces)
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        _ = mlx_traces.evalute


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
wheel = pytest.mark.skipif(
    not any(Path(folder, blas.WHEELS[0]).exists() for folder in sys.path),
    reason="no OpenBLAS wheel installed",
)


@linux
@wheel
def test_openblas_is_loaded_and_fast():
    assert blas.loaded.path is not None, blas.loaded.reason
    assert blas.loaded.path.endswith(blas.WHEELS[0])
    # One thread, best of many: a busy machine must not fail this. Reference BLAS makes 2 to 6.
    one = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'"
    speed = python(f"{one}; from mlx_traces.diagnostics import doctor; print(doctor.matmul_gflops(512, tries=40))")
    assert float(speed) > 10


@linux
def test_too_late_is_said():
    out = python("import mlx.core, mlx_traces.runtime.blas as b; print(b.loaded.path, b.loaded.reason)")
    assert out == "None mlx was imported before mlx_traces"


@linux
def test_none_found_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(blas, "SYSTEM", "libnosuch.so.0")
    assert blas.load() == blas.Blas(None, "no OpenBLAS found")


@linux
def test_a_library_that_is_no_blas_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(blas, "SYSTEM", "libc.so.6")
    assert blas.load() == blas.Blas(None, "libc.so.6 has no plain cblas symbols")


class Library:
    """An OpenBLAS that multiplies nothing and counts its threads."""

    def __init__(self, threads):
        self.threads = threads

    def openblas_get_num_threads(self):
        return self.threads

    def openblas_set_num_threads(self, threads):
        self.threads = threads


@pytest.fixture
def library(monkeypatch):
    for name in blas.GIVEN:
        monkeypatch.delenv(name, raising=False)
    library = Library(4)
    monkeypatch.setattr(blas, "loaded", blas.Blas("/x/libopenblas.so.0", library=library))
    return library


def test_small_products_get_one_thread_and_large_ones_all(library, monkeypatch):
    model = make_model()  # its largest matrix has 64 x 128 numbers
    monkeypatch.setattr(blas, "LARGE", 64 * 128 * 100)
    for rows, processes, expected in ((99, 1, 1), (100, 1, 4), (100, 3, 1), (100, 2, 2), (99, 2, 1)):
        with blas.threads_for(model, rows, processes):
            assert library.threads == expected
        assert library.threads == 4
    with pytest.raises(ZeroDivisionError), blas.threads_for(model, 1):
        1 / 0  # noqa: B018
    assert library.threads == 4
    monkeypatch.setattr(blas, "LARGE", 64 * 128 * blas.LEAST_ROWS)
    with blas.threads_for(model, 1):  # weights that no cache holds
        assert library.threads == 4


def test_the_newest_wish_for_threads_counts_until_the_last_ends(library, monkeypatch):
    model = make_model()
    monkeypatch.setattr(blas, "LARGE", 64 * 128 * 100)
    small, large = blas.threads_for(model, 1), blas.threads_for(model, 100)
    small.__enter__()
    assert library.threads == 1
    large.__enter__()
    assert library.threads == 4
    small.__exit__(None, None, None)  # as two streams of completions may end
    assert library.threads == 4
    with blas.threads_for(model, 1):
        assert library.threads == 1
    large.__exit__(None, None, None)
    assert library.threads == 4


@pytest.mark.parametrize("name", blas.GIVEN)
def test_threads_that_were_asked_for_stay(library, monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with blas.threads_for(make_model(), 1):
        assert library.threads == 4  # the stand-in reads no environment
    monkeypatch.setattr(blas, "loaded", blas.Blas(None, "no OpenBLAS found"))
    monkeypatch.delenv(name)
    with blas.threads_for(make_model(), 1):
        pass


@pytest.mark.parametrize(("hidden", "tokens", "expected"), [(128, 512, 1), (128, 1024, 1), (896, 512, 4)])
def test_training_uses_one_thread_for_products_as_small_as_nanos(library, hidden, tokens, expected):
    """At the micro-batches of a CPU; the other size is that of a 0.5B model."""
    feed_forward = {128: 384, 896: 4864}[hidden]
    model = make_model(hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=1)
    halves, used = forward.split(model), []
    examples = [Example("", (1, 2, 3, 4), (False, False, True, True))] * 2

    def take(states, targets):
        used.append(library.threads)
        return states.sum()

    forward.each(halves, examples, tokens, take)
    adapters.start(model, AdapterConfig(rank=2))
    gradients.accumulate(model, halves, examples, tokens, lambda states, *_: (take(states, None), {}))
    assert set(used) == {expected} and library.threads == 4


def test_sampling_a_small_model_and_its_probes_use_one_thread(library, monkeypatch):
    loaded, probed, alike = wrap(make_tokenizer(), make_model()), [], logprobs.alike
    monkeypatch.setattr(logprobs, "alike", lambda *given: probed.append(library.threads) or alike(*given))
    forward.split(loaded.model)
    assert probed == [1] and library.threads == 4
    stream = generate(loaded, [Request((1, 2)), Request((3,))], SamplingParams(3))
    next(stream)
    assert library.threads == 1 and probed == [1] * 3
    stream.close()
    assert kv_cache.mask_axes(loaded.model) == 4 and probed == [1] * 4  # asked for a model without a step of ours
    assert library.threads == 4


def test_doctor_names_a_slow_blas(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor, "matmul_gflops", lambda: 4.0)
    for loaded, fix in (
        (blas.Blas(None, "mlx was imported before mlx_traces"), "import mlx_traces before mlx"),
        (blas.Blas(None, "no OpenBLAS found"), r"pip install 'mlx-traces[cpu]'"),
        (blas.Blas("/x/libopenblas.so.0"), "busy"),
    ):
        monkeypatch.setattr(blas, "loaded", loaded)
        line = doctor._blas("cpu")
        assert fix in line.fix and "4 GFLOP/s" in line.value
    monkeypatch.setattr(doctor, "matmul_gflops", lambda: 40.0)
    assert doctor._blas("cpu").fix is None


def test_doctor_without_network(monkeypatch):
    from huggingface_hub import constants

    start = time.perf_counter()
    lines = {line.what: line for line in doctor.report()}
    assert time.perf_counter() - start < 30
    assert {"python", "mlx", "mlx-lm", "device", "memory", "matrix product", "nano", "hub"} <= set(lines)
    assert "HF_HUB_OFFLINE" in lines["hub"].fix and "--data FILE" in lines["hub"].value
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    hub.fault.cache_clear()
    line = doctor._hub()
    assert "not reachable" in line.value and "nano, model folders" in line.value and line.fix
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: time.sleep(2))
    hub.fault.cache_clear()
    assert "no answer in 0.1 seconds" in doctor._hub().value


def test_doctor_reaches_a_hub(monkeypatch):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from huggingface_hub import constants

    class Answers(BaseHTTPRequestHandler):
        status = 200

        def do_HEAD(self):
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        hub.fault.cache_clear()
        assert doctor._hub() == doctor.Line("hub", "reachable")
        Answers.status = 503
        hub.fault.cache_clear()
        assert "status 503" in doctor._hub().value
    finally:
        server.shutdown()
        hub.fault.cache_clear()
