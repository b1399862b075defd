"""Batches of token sequences with little padding."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

POOL = 64  # batches that are sorted by length together


@dataclass(frozen=True)
class Example:
    """A token sequence to learn from: its name ``id``, its token ``ids``, and whether each token is ``trained``."""

    id: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def count(self) -> int:
        """Number of trained tokens; the first token of a sequence is never trained, as nothing predicts it."""
        return sum(self.trained[1:])


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Split one epoch's examples into optimizer steps: every example once, similar lengths together, in seeded order.

    The examples are shuffled, sorted by length within pools of 64 batches, cut, and the batches shuffled again: a
    compromise between random batches, which pad much, and fully sorted ones, which are the same every epoch.

    Returns:
        Lists of indices into ``lengths``; the last examples may make a smaller batch.
    """
    draw = random.Random(f"{seed} epoch {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    batches = []
    for at in range(0, len(order), POOL * batch_size):
        pool = sorted(order[at : at + POOL * batch_size], key=lambda index: lengths[index])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    draw.shuffle(batches)
    return batches


def padded_shape(backend: str, rows: int, length: int, prompt: int = 0) -> tuple[int, int, int]:
    """Return the shape in which a batch is computed: rows, tokens of a row, tokens of the prompts before them.

    On CUDA the first use of a shape takes about a second, since attention's backward pass is planned anew, so few
    shapes are used there. Rows: 1, 2, 4, 8, 12, 16, then multiples of 8. Prompts: multiples of 128. Queries, one fewer
    than the tokens of a row: multiples of 128, which cuDNN's backward pass takes, where that adds at most a tenth, else
    of 32. Elsewhere the shape stays as it is.

    Args:
        backend: ``"metal"``, ``"cuda"`` or ``"cpu"``.
        rows: number of sequences, at least 1.
        length: tokens of the longest one.
        prompt: tokens of the longest prompt that was read before them; 0 if they include their prompts.
    """
    if backend != "cuda":
        return rows, length, prompt
    queries = length - 1
    wide = _up(queries, 128)
    return (
        _up(rows, 8) if rows > 16 else _up(rows, 4) if rows > 2 else rows,
        1 + (wide if wide <= 1.1 * queries else _up(queries, 32)),
        _up(prompt, 128),
    )


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def micro_batches(indices: Sequence[int], lengths: Sequence[int], budget: int, backend: str = "cpu") -> list[list[int]]:
    """Split a step's examples into batches of at most ``budget`` tokens, padding included; longest first.

    Sorted by length, so that padding is small; an example longer than the budget is a batch of its own. The
    ``backend`` decides how much padding is added (`padded_shape`).
    """
    order = sorted(indices, key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and _cells(backend, len(batches[-1]) + 1, lengths[batches[-1][0]]) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _cells(backend: str, rows: int, length: int) -> int:
    rows, length, _ = padded_shape(backend, rows, length)
    return rows * length


def pad(examples: Sequence[Example], backend: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Return (B, T) int32 ids, padded right and below with 0 (`padded_shape`), and the trained tokens' positions.

    Positions index the flattened (B, T - 1), as `logprobs.token_logprobs` takes them, row by row.
    """
    rows, width, _ = padded_shape(backend, len(examples), max(len(example.ids) for example in examples))
    ids = np.zeros((rows, width), np.int32)
    trained = np.zeros((rows, width - 1), bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        trained[row, : len(example.ids) - 1] = example.trained[1:]
    return ids, np.flatnonzero(trained)


def places(counts: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Return where each token of rows with these lengths lies in one flat array, (B, T) int32, and the (B, T) mask."""
    starts = np.cumsum([0, *counts[:-1]])[:, None]
    column = np.arange(max(counts))[None]
    mask = column < np.array(counts)[:, None]
    return mx.array(np.where(mask, starts + column, 0)), mx.array(mask)


def padded(arrays: Sequence[np.ndarray]) -> mx.array:
    """Stack float32 arrays as the rows of one array, padded right with 0."""
    rows = np.zeros((len(arrays), max(1, *map(len, arrays))), np.float32)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = array
    return mx.array(rows)


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int], backend: str = "cpu") -> float:
    """Return the share of padding among the cells of padded batches."""
    cells = sum(_cells(backend, len(batch), max(lengths[index] for index in batch)) for batch in batches)
    return 1 - sum(lengths[index] for batch in batches for index in batch) / cells if cells else 0.0
