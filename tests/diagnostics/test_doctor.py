"""The doctor's teeth: each fault planted, named, and given a way out; the self-test against wrong weights."""

import copy
import json
import math
import resource
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from packaging.requirements import Requirement

from mlx_traces.cli import main
from mlx_traces.diagnostics import doctor, selftest
from mlx_traces.engine import fused, kv_cache
from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.runtime import device

STORED = selftest.load_reference()


def nano(**weights):
    """Load nano in float32; ``weights`` maps a part of a matrix's name to what is done to it."""
    loaded = loading.load("nano", device="cpu", weights="dense", dtype="float32")
    arrays = dict(tree_flatten(loaded.model.parameters()))
    for part, change in weights.items():
        (name,) = (name for name in arrays if name.endswith(f"layers.2.{part}.weight"))
        loaded.model.load_weights([(name, change(arrays[name]))], strict=False)
    return loaded


def lines_of(monkeypatch, run):
    monkeypatch.setattr(selftest, "run", run)
    return doctor._self_test()


def test_the_stored_numbers_are_nanos_and_the_self_test_passes():
    made = selftest.reference()
    assert made["nano"] == STORED["nano"], "nano was built anew: mlx-traces nano reference"
    assert made["training"] == pytest.approx(STORED["training"], rel=1e-4)
    assert len(made["completions"]) == len(STORED["completions"]) == len(selftest.PROBLEMS)
    for one, two in zip(made["completions"], STORED["completions"], strict=True):
        assert one["prompt"] == two["prompt"] and one["tokens"] == two["tokens"]
        assert one["logprobs"] == pytest.approx(two["logprobs"], abs=1e-4)
    found = selftest.run(nano(), STORED)
    assert found.wrong == [] and found.nats < 1e-3 and found.share < 1e-3 and found.dtype == "float32"


@pytest.mark.parametrize("dtype", selftest.DEVIATIONS)
def test_tolerances_leave_room(dtype):
    found = selftest.run(loading.load("nano", device="cpu", dtype=dtype, weights="dense"), STORED)
    assert found.dtype == dtype and found.wrong == []
    for deviation, measured, allowed in zip(
        (found.nats, found.share), selftest.DEVIATIONS[dtype], selftest.TOLERANCES[dtype], strict=True
    ):
        assert deviation <= 2 * measured + 1e-5 and 4 * measured <= allowed


def test_tolerances_leave_room_for_four_bits_in_float16(monkeypatch):
    """One prompt, and no probes: a CPU multiplies such weights slowly, and the self-test takes it over a minute."""
    monkeypatch.setattr(selftest, "PROBLEMS", selftest.PROBLEMS[2:])
    for module in (fused, kv_cache):
        monkeypatch.setattr(module, "decodes_right", lambda *_: True)
    loaded = loading.load("nano", device="cpu", dtype="float16", weights="quantized")
    wrong, nats = selftest._generation(loaded, STORED["completions"][2:], selftest.TOLERANCES["float16"][0])
    assert not wrong and nats <= selftest.DEVIATIONS["float16"][0]


@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.k_proj"])
def test_a_wrong_weight_is_loud(monkeypatch, part):
    loaded = nano(**{part: lambda array: 1.1 * array})
    found = selftest.run(loaded, STORED)
    assert any(line.startswith("completion ") for line in found.wrong)
    assert any(line.startswith("training step: ") for line in found.wrong)
    line = lines_of(monkeypatch, lambda: found)
    assert line.failed and "FAILED in float32: completion" in line.value and "pip install" in line.fix


def test_numbers_that_are_none_are_wrong():
    found = selftest.run(nano(**{"mlp.up_proj": lambda array: array * mx.nan}), STORED)
    assert found.wrong == ["the model's outputs are not finite numbers"] and math.isinf(found.share)


def test_a_near_tie_may_be_broken_otherwise_and_a_clear_lead_may_not():
    completions = copy.deepcopy(STORED["completions"])
    token = completions[0]["tokens"][5]
    completions[0]["tokens"][5] = token + 1
    wrong, _ = selftest._generation(nano(), completions, 0.001)
    assert wrong == ["completion 1: token 6 is wrong"]
    completions[0]["gaps"][5] = 0.0019
    assert selftest._generation(nano(), completions, 0.001)[0] == []
    completions[1]["prompt"][0] += 1
    assert selftest._generation(nano(), completions, 0.001)[0] == ["prompt 2 is encoded to wrong tokens"]


def test_another_nano_or_damaged_numbers_are_said(monkeypatch):
    for stored, message in (({**STORED, "nano": "0"}, "nano's files are not those"), ({"nano": STORED["nano"]}, "dam")):
        with pytest.raises(UserError, match=message):
            selftest.run(nano(), stored)

    def refuse():
        raise UserError("nano's files are not those")

    line = lines_of(monkeypatch, refuse)
    assert line.failed and line.fix == "reinstall mlx-traces"

    def crash():
        raise RuntimeError("[metal] no such kernel\ntrace")

    line = lines_of(monkeypatch, crash)
    assert line.failed and line.value == "FAILED: [metal] no such kernel" and "--device cpu" in line.fix


def test_versions_are_held_against_those_tested(monkeypatch):
    low, high = doctor.TESTED["mlx-lm"]
    assert doctor.judged("mlx-lm", high) == doctor.Line("mlx-lm", high)
    old = doctor.judged("mlx-lm", "0.9")
    assert old.failed and old.fix == f"pip install --upgrade 'mlx-lm>={low}'" and "older" in old.value
    new = doctor.judged("mlx-lm", "99.1")
    assert not new.failed and new.fix is None and "newer than tested" in new.value
    assert doctor.judged("numpy", "odd").fix is None
    monkeypatch.setattr(doctor, "_python", lambda: doctor.Line("python", "x"))
    installed = doctor.importlib.metadata.version("mlx")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.0.1")
    other = doctor.judged("mlx", installed)
    assert other.failed and other.fix == f"pip install --force-reinstall mlx-cpu=={installed}"


def test_the_oldest_tested_versions_are_the_lower_bounds():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bounds = {one.name.lower(): one.specifier for one in map(Requirement, project["dependencies"])}
    for name, (low, _) in doctor.TESTED.items():
        bound = project["requires-python"] if name == "python" else str(bounds[name])
        assert bound == f">={low}"


def test_disks(monkeypatch, tmp_path):
    line = doctor._disk("disk", tmp_path / "not" / "there", 0, "move")
    assert line.fix is None and "GB free in" in line.value
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3e8))
        full = doctor._disk("disk", tmp_path, 1, "move")
        assert full.fix == "move" and full.value.endswith("less than 1 GB") and "0.3 GB free" in full.value

    def no_space(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", no_space)
    line = doctor._disk("disk", tmp_path, 1, "move")
    assert line.failed and "cannot be written (No space left on device)" in line.value


def test_memory_limits(monkeypatch, tmp_path):
    backend = device.Backend("cpu", "dense", "float32", 16.0, "test")
    monkeypatch.setattr(doctor, "_limits_gb", lambda: iter(()))
    monkeypatch.setattr(doctor, "_free_gb", lambda: 8.0)
    assert doctor.memory(backend) == doctor.Line("memory", "16.0 GB, 8.0 GB free")
    monkeypatch.setattr(doctor, "_limits_gb", lambda: iter([("ulimit -v", 4.0), ("the container's limit", 6.0)]))
    line = doctor.memory(backend)
    assert "may have 4.0 GB (ulimit -v)" in line.value and "--memory-limit 3.2" in line.fix
    monkeypatch.setattr(doctor, "_free_gb", lambda: 0.5)
    assert doctor.memory(backend).fix.startswith("close other programs")
    monkeypatch.undo()
    (tmp_path / "memory.max").write_text("2000000000\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert list(doctor._limits_gb(tmp_path)) == [("the container's limit", 2.0)]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(doctor._limits_gb(tmp_path)) == []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**9, 10**9))
    assert list(doctor._limits_gb(tmp_path)) == [("ulimit -v", 1.0), ("ulimit -d", 1.0)]


@pytest.mark.parametrize(("line", "status", "end"), [
    (doctor.Line("disk", "fine"), 0, "nothing to fix"),
    (doctor.Line("hub", "not reachable", "check the network"), 0, "1 to look at (!)"),
    (doctor.Line("self-test", "FAILED", "reinstall", failed=True), 1, "1 to fix (x)"),
])  # fmt: skip
def test_the_command_ends_with_the_sum_and_1_where_results_cannot_be_trusted(monkeypatch, line, status, end):
    monkeypatch.setattr(doctor, "report", lambda self_test: [line])
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == status and done.output.splitlines()[-1] == end
    assert line.fix is None or f"-> {line.fix}" in done.output
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == status and json.loads(done.output) == doctor.as_rows([line])
