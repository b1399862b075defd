"""The state of a training run in one file: trained weights, optimizer, step. The file is written atomically."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_traces.errors import UserError, first_line
from mlx_traces.models.adapters import write_arrays
from mlx_traces.runtime.files import on_the_way, sync
from mlx_traces.train.optimizer import restore, state_of

WEIGHTS, OPTIMIZER = "weights.", "optimizer."


def save(path: Path, model: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Write the trained weights, the optimizer and ``state`` (plain JSON values, ``step`` among them).

    The logged lines are synced to the disk first; otherwise a resumed run could lack some.
    """
    for lines in path.parent.glob("*.jsonl"):
        with on_the_way(lines):
            sync(lines)
    arrays = {WEIGHTS + name: array for name, array in tree_flatten(model.trainable_parameters())}
    arrays |= {OPTIMIZER + name: array for name, array in state_of(optimizer).items()}
    write_arrays(path, arrays, {"state": json.dumps(state)})


def load(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimizer from a checkpoint; return its ``state``.

    Raises:
        UserError: if the file is damaged or was made for other weights.
    """
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        state = json.loads(metadata["state"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint ({first_line(error)}); remove it to start anew") from None
    weights = {name.removeprefix(WEIGHTS): array for name, array in arrays.items() if name.startswith(WEIGHTS)}
    shapes = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
    if {name: array.shape for name, array in weights.items()} != shapes:
        raise UserError(f"{path}: its weights are not those that are trained here; choose another --out")
    model.load_weights(list(weights.items()), strict=False)
    kept = {name.removeprefix(OPTIMIZER): array for name, array in arrays.items() if name.startswith(OPTIMIZER)}
    restore(optimizer, model.trainable_parameters(), kept)
    mx.eval(model.parameters(), optimizer.state)
    return state
