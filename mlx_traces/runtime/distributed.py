"""Distributed runs, started by ``mlx.launch``: what each rank does, and how results are collected.

Each rank samples its part of the completions and computes its part of the gradient; completions are gathered and
gradients summed, so every rank holds the same model after each step. Rank 0 alone writes to the run folder; each other
rank writes to a temporary copy, made from rank 0's files. So a run may be continued with another number of ranks. A
single process sends nothing.
"""

import atexit
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_traces.errors import Lost, UserError, first_line
from mlx_traces.runtime.device import Backend, limits, out_of_memory
from mlx_traces.runtime.files import held
from mlx_traces.runtime.interrupts import listening
from mlx_traces.runtime.run_folder import RunFolder


@cache
def world() -> mx.distributed.Group:
    """Return the group of all ranks; it has one rank in a single process."""
    return mx.distributed.init(strict=False)


def first() -> bool:
    """Whether this is rank 0, which alone writes and prints."""
    return world().rank() == 0


def share(count: int) -> range:
    """Return the indices of this rank's part of ``count`` items: contiguous, sizes differing by at most one."""
    rank, size = world().rank(), world().size()
    return range(count)[count * rank // size : count * (rank + 1) // size]


def gather(rows: Sequence[Any]) -> list[Any]:
    """Return all ranks' rows, rank by rank; rows are JSON values (tuples come back as lists)."""
    if world().size() == 1:
        return list(rows)
    content = np.frombuffer(json.dumps(list(rows)).encode(), np.uint8)
    sizes = np.array(_arrived(mx.distributed.all_gather(mx.array([len(content)], mx.int32))))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = content
    every = np.array(_arrived(mx.distributed.all_gather(mx.array(padded)[None])))
    return [row for size, part in zip(sizes, every, strict=True) for row in json.loads(part[:size].tobytes())]


def total(tree: Any) -> Any:
    """Return the sum over the ranks of a tree of arrays, computed in float32."""
    if world().size() == 1:
        return tree
    flat = tree_flatten(tree)
    vector = mx.concatenate([array.astype(mx.float32).reshape(-1) for _, array in flat])
    mx.eval(vector)  # an error here is this rank's own, and must not be reported as a lost rank
    whole = _arrived(mx.distributed.all_sum(vector))
    summed, at = [], 0
    for name, array in flat:
        summed.append((name, whole[at : at + array.size].reshape(array.shape).astype(array.dtype)))
        at += array.size
    return tree_unflatten(summed)


def total_step(loss: float, grads: Any, sums: Mapping[str, float], parameters: Any) -> tuple[float, Any, Counter]:
    """Return a step's loss, gradient and further sums, each added up over the ranks.

    Args:
        loss: this rank's part.
        grads: its part of the gradient; None if this rank had no row.
        sums: its parts of the sums that metrics are computed from.
        parameters: the tree of trained arrays, for a gradient of 0.
    """
    if world().size() == 1:
        return loss, grads, Counter(sums)
    every = Counter()
    for part in gather([{"loss": loss, **sums}]):
        every.update(part)
    return every.pop("loss"), total(tree_map(mx.zeros_like, parameters) if grads is None else grads), every


def sizes(backend: Backend) -> dict[str, int]:
    """Return all ranks' batch sizes for settings that have none: the smallest of their devices' sizes."""
    every = gather([backend.sizes])
    return {name: min(own[name] for own in every) for name in every[0] if all(name in own for own in every)}


def any_of(wish: bool) -> bool:
    """Return whether ``wish`` is true on any rank; all ranks must call this."""
    return any(gather([wish]))


def _arrived(array: mx.array) -> mx.array:
    """Wait for the result of an exchange between the ranks, and return it.

    Raises:
        Lost: if a rank has ended. The backend does not say which, so it is named only where there are two.
    """
    try:
        mx.eval(array)
    except RuntimeError as error:
        name = f"rank {1 - world().rank()}" if world().size() == 2 else "a rank"
        raise Lost(f"{name} is gone ({first_line(error)}); what was finished is kept, go on with --resume") from None
    return array


@contextmanager
def at_work(out: Path, resume: bool) -> Iterator[tuple[RunFolder, Callable[[], bool]]]:
    """Begin or continue a run: yield its folder, locked meanwhile, and a function that says whether to stop (Ctrl-C).

    The folder is the run's on rank 0, and a temporary one on the others. All ranks must call the function equally
    often; they get the same answer.

    Raises:
        UserError: if a run cannot be written there, or memory runs out and no smaller size is left to try.
    """
    with ExitStack() as stack:
        stack.enter_context(_told())
        if first():
            RunFolder(out).refuse(resume)
            stack.enter_context(held(out / ".lock"))
        folder = RunFolder(own_folder(out))
        stack.enter_context(limits())
        pressed = stack.enter_context(listening(say=first()))
        yield folder, lambda: any_of(pressed())


@contextmanager
def _told() -> Iterator[None]:
    """Turn MLX's error for a failed allocation into one line for the user."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out ({first_line(error)}); what was finished is kept: close other programs and go on with "
            "--resume and lower rows or micro_tokens, or begin anew with a smaller model or shorter sequences"
        ) from None


def own_folder(path: Path) -> Path:
    """Return the folder that this rank works in: the run's on rank 0, a copy that ends with the process on the others.

    The copy has the files directly in the run's folder, except hidden ones; a run continues from these.
    """
    if world().size() == 1:
        return path
    writes, folder = first(), path
    if not writes:
        scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}-rank{world().rank()}-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        folder = scratch / path.name
    there = path.iterdir() if writes and path.is_dir() else ()
    files = sorted(file for file in there if file.is_file() and not file.name.startswith("."))
    for name, size in gather([(file.name, file.stat().st_size) for file in files]):
        content = np.frombuffer((path / name).read_bytes(), np.uint8) if writes else np.zeros(size, np.uint8)
        content = np.array(_arrived(mx.distributed.all_sum(mx.array(content))))  # all ranks but the first add zeros
        if not writes:
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content.tobytes())
    return folder
