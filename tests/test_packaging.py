"""What a wheel holds: all packages, nano with its adapters, configurations, templates, licence; nothing heavy."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        str(file.parent.relative_to(ROOT)).replace("/", ".") for file in (ROOT / "mlx_traces").rglob("__init__.py")
    }
    assert set(settings["packages"]) == found | set(settings["package-dir"])


def test_every_import_is_a_dependency_with_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(line) for line in (*project["dependencies"], *extras["cpu"], *extras["math"])]
    unbound = [str(one) for one in asked if not any(part.operator == ">=" for part in one.specifier)]
    assert not unbound, "tests/wheel.sh lowest-direct has nothing to test"
    linux = {one.name for one in asked if one.marker and not one.marker.evaluate({"sys_platform": "darwin"})}
    assert linux == {"mlx", "cmeel-openblas"}  # of the extra `cpu`; on a Mac plain mlx alone
    known = {one.name.lower().replace("-", "_").replace("pyyaml", "yaml") for one in asked} | {"mlx_lm_lora"}
    optional = {"trackio", "wandb"}
    found = set()
    for file in (ROOT / "mlx_traces").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) - {"mlx_traces"} - optional <= known
    assert known - found <= {"cmeel_openblas", "mlx_lm_lora"}, "nothing imports it"


def test_a_wheel_holds_what_the_comparison_needs(tmp_path):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.splitlines():
        if (
            name.startswith(("mlx_traces/", "adapters/", "configs/", "pyproject.toml", "README.md"))
            and (ROOT / name).exists()
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stat().st_size < 8e6
    for needed in (
        "mlx_traces/assets/nano/model.safetensors",
        "mlx_traces/report/templates/report.html",
        "mlx_traces/__main__.py",
        *(f"mlx_traces/configs/{file.name}" for file in (ROOT / "configs").glob("*.yaml")),
        next(name for name in names if name.endswith(".dist-info/licenses/mlx_traces/LICENSE")),
        *(
            f"mlx_traces/shipped/{name}/adapters.safetensors"
            for name in ("nano-epoch1", "nano-epoch2", "nano-grpo", "nano-ppo")
        ),
        *(
            f"mlx_traces/shipped/{name}/adapter_config.json"
            for name in ("nano-epoch1", "nano-epoch2", "nano-grpo", "nano-ppo")
        ),
    ):
        assert needed in names
    assert not any(name.startswith(("tests/", "data/", "configs/")) for name in names)
