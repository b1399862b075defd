"""Several processes at one run, started by ``mlx.launch``: who does what, and how results come together.

Completions are shared out and gathered, gradients are shared out and summed, so every rank holds the same model after
each step. Rank 0 alone writes to the run folder; the others write to a folder of their own that is thrown away, and
what a run goes on from they have from rank 0. In a single process nothing here does anything.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx


@cache
def world() -> "mx.distributed.Group":
    """Return the group of all ranks; of this process alone where nothing else was launched."""
    import mlx.core as mx

    return mx.distributed.init(strict=False)


def share(count: int) -> range:
    """Return the indices of this rank's part of ``count`` things: one piece, as even as can be."""
    rank, size = world().rank(), world().size()
    return range(count)[count * rank // size : count * (rank + 1) // size]


def gather(rows: Sequence[Any]) -> list[Any]:
    """Return all ranks' rows, rank by rank; they are what JSON can hold (tuples come back as lists)."""
    import mlx.core as mx
    import numpy as np

    if world().size() == 1:
        return list(rows)
    content = np.frombuffer(json.dumps(list(rows)).encode(), np.uint8)
    sizes = np.array(mx.distributed.all_gather(mx.array([len(content)], mx.int32)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = content
    every = np.array(mx.distributed.all_gather(mx.array(padded)[None]))
    return [row for size, part in zip(sizes, every, strict=True) for row in json.loads(part[:size].tobytes())]


def total(tree: Any) -> Any:
    """Return the sum of all ranks' trees of arrays, added up in float32."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    if world().size() == 1:
        return tree
    flat = tree_flatten(tree)
    whole = mx.distributed.all_sum(mx.concatenate([array.astype(mx.float32).reshape(-1) for _, array in flat]))
    summed, at = [], 0
    for name, array in flat:
        summed.append((name, whole[at : at + array.size].reshape(array.shape).astype(array.dtype)))
        at += array.size
    return tree_unflatten(summed)


def own_folder(path: Path) -> Path:
    """Return the folder that this rank works in: rank 0 in the run's, every other in a copy that goes with the process.

    Only the files that stand in the folder itself are copied: what a run goes on from.
    """
    import mlx.core as mx
    import numpy as np

    if world().size() == 1:
        return path
    first, folder = world().rank() == 0, path
    if not first:
        scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}-rank{world().rank()}-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        folder = scratch / path.name
    found = sorted(file for file in path.iterdir() if file.is_file()) if first and path.is_dir() else []
    for name, size in gather([(file.name, file.stat().st_size) for file in found]):
        content = np.frombuffer((path / name).read_bytes(), np.uint8) if first else np.zeros(size, np.uint8)
        content = np.array(mx.distributed.all_sum(mx.array(content)))  # the others' are zeros
        if not first:
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content.tobytes())
    return folder
