"""Imports point down, anywhere in a file: a package imports only packages below it, and modules never form a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_traces"
# Top to bottom; packages on one line do not import each other.
STACK = """
cli api
pipelines diagnostics
rl
train
report traces
evaluation
engine
models
tasks
runtime
config
yaml_files
readers records
text
errors
"""
FLOOR = {name: floor for floor, line in enumerate(reversed(STACK.split("\n"))) for name in line.split()}
WITHOUT_MLX = ("tasks", "report", "config", "yaml_files", "readers", "records", "text", "errors", "evaluation.stats")


def modules(package: Path) -> dict[str, Path]:
    """Return every module of a package by its name, the package's own name left out."""
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): path for name, path in paths.items()}


def imported(path: Path, names: set[str]) -> set[str]:
    """Return the modules that a file imports; ``from mlx_traces.tasks import gsm8k`` is ``tasks.gsm8k``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlx_traces":
            base = node.module.removeprefix("mlx_traces").lstrip(".")
            inside = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in names else base for name in inside}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("mlx_traces.") for a in node.names if a.name.startswith("mlx_traces.")}
    return found - {""}


def faults(package: Path) -> list[str]:
    """Return what is wrong with a package's imports, a line each."""
    files = modules(package)
    graph = {name: imported(path, set(files)) for name, path in files.items() if name not in ("", "__main__")}
    lines = []
    for name, others in graph.items():
        own = name.split(".")[0]
        if own not in FLOOR:
            lines.append(f"{name} has no place in the stack")
            continue
        for other in sorted(others):
            target = other.split(".")[0]
            if target != own and FLOOR.get(target, 99) >= FLOOR[own]:
                lines.append(f"{name} imports {other}, which is not below it")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        lines.append(f"a circle: {' imports '.join(reversed(error.args[1]))}")
    return lines


def test_imports_point_down_and_never_in_a_circle():
    assert sum(len(imported(path, set(modules(PACKAGE)))) for path in modules(PACKAGE).values()) > 200
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("tasks/a.py", "from mlx_traces.engine import sampling", "tasks.a imports engine, which is not below it"),
        ("report/a.py", "def f():\n    import mlx_traces.traces.b", "report.a imports traces.b, which is not below it"),
        ("rl/a.py", "from mlx_traces.rl import b", "a circle: rl.a imports rl.b imports rl.a"),
        ("new/a.py", "", "new.a has no place in the stack"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, file, line, fault):
    for name, text in {"rl/b.py": "from mlx_traces.rl.a import x", "traces/b.py": "", file: line}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert fault in faults(tmp_path)


def test_what_needs_no_arrays_does_not_load_mlx():
    for name, path in modules(PACKAGE).items():
        if any(name == own or name.startswith(f"{own}.") for own in WITHOUT_MLX):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            roots = {
                alias.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            roots |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not roots & {"mlx", "mlx_lm", "transformers"}, name
