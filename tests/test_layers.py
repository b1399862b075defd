"""Imports point down only: no room imports one above it, at the top of a file or inside a function."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mlx_traces"
FLOORS = """
__main__
cli
cli.evaluate cli.data cli.bench cli.machine cli.quality cli.show cli.study cli.train cli.configs
cli.options
cli.unused
forecast
rounds doctor study verifying planning
comparison quantizing bench_grpo selftest
bench_sft fusing generation pushing
bench bench_ranks grpo ppo sft scoring reformatting
reinforcement
rollouts
training rewards memory
evaluation examples asking
webpage
sampling report curves findings
fallback nano figures cards
drawing tables traces tracking
models
adapters sharing slots
forward checkpoints ranks
optim runs batching device policy
selection endpoint conversations
quality
tasks.qa
tasks.gsm8k tasks.countdown
tasks
tasks.answers tasks.data tasks.prompts tasks.solver
tasks.numbers tasks.thoughts
config stats hub
records origins readers
errors blas interrupts progress fingerprints
"""


def imported(path):
    """Yield the rooms that a file imports; a name taken from the package itself is a room."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlx_traces":
            room = node.module.removeprefix("mlx_traces").removeprefix(".")
            names = [alias.name for alias in node.names]
            yield from ([f"{room}.{name}".strip(".") for name in names] if room in ("",) else [room])


def test_imports_point_down():
    floor = {room: number for number, line in enumerate(FLOORS.split("\n")) for room in line.split()}
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if room == "__init__":
            continue
        assert room in floor, f"{room} has no floor"
        for other in imported(path):
            if other in floor:
                seen += 1
                assert floor[other] > floor[room], f"{room} imports {other}, which is not below it"
    assert seen > 60
